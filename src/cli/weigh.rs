//! `bon-engine weigh`: the objectives as a filter, for training loops that are not ours. JSON lines of scored groups
//! in, JSON lines of coefficients out, one for one and each as soon as it is there.

use crate::layered::nearest;
use crate::objective::{Kind, ObjectiveConfig, ScoredGroup, coefficients};
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;

/// Arguments of `weigh`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Reads JSON lines: {\"scores\": [...], \"rewards\": [...], \"expert_score\": x}, one group of responses to one prompt per \
line. `scores` are the verifier's, `rewards` the environment's (default: the scores); `expert_score` belongs to bon-sft. \
null stands for what could not be judged: it gets 0 or, where that is lower, the least value of its list, and never passes. \
For objective verifier `scores` are logits and `rewards` labels, and none may be null.

Writes a line {\"coefficients\": [...]} for each, as soon as it is read: coefficient j multiplies grad log pi(response \
j), and for verifier the gradient of logit j. Where an expert response takes part, \"expert_coefficient\" multiplies the expert response's.")]
pub struct Args {
    /// What is maximised
    #[arg(
        long, value_name = "KIND",
        help = format!("What is maximised: {}", names().join(", ")),
        long_help = format!("What is maximised, by the coefficient of a response:\n{}", described())
    )]
    pub objective: String,
    /// The Best-of-N size
    #[arg(
        long, value_name = "N",
        help = format!("The Best-of-N size; {} need none", Kind::listed(|objective| !objective.needs_n))
    )]
    pub n: Option<usize>,
    /// An option of the objective
    #[arg(
        long, value_name = "KEY=VALUE",
        help = format!("An option of the objective, may be given several times: {}", ObjectiveConfig::options().join(", "))
    )]
    pub set: Vec<String>,
    /// JSON lines; standard input if absent or `-`
    pub file: Option<PathBuf>,
}

fn names() -> Vec<String> {
    Kind::ALL.iter().map(Kind::to_string).collect()
}

fn described() -> String {
    let line = |kind: &Kind| format!("- {kind}: {}\n", kind.objective().coefficient);
    Kind::ALL.iter().map(line).collect()
}

/// Runs the command on its file or standard input.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = config(&args.objective, args.n, &args.set)?;
    let output = io::stdout().lock();
    match args.file.filter(|file| file.as_os_str() != "-") {
        None => weigh(&config, io::stdin().lock(), output),
        Some(path) => {
            let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            weigh(&config, BufReader::new(file), output).with_context(|| path.display().to_string())
        }
    }
}

/// The objective that the flags describe. A value of `set` is TOML; a word that is not stands for itself as a string.
pub fn config(objective: &str, n: Option<usize>, set: &[String]) -> anyhow::Result<ObjectiveConfig> {
    let mut table = toml::Table::new();
    table.insert("kind".to_owned(), objective.into());
    if let Some(n) = n {
        let n = i64::try_from(n).with_context(|| format!("--n {n} is too large"))?;
        table.insert("n".to_owned(), n.into());
    }
    for assignment in set {
        let Some((key, value)) = assignment.split_once('=') else {
            bail!("--set {assignment}: write it as key=value");
        };
        let (key, value) = (key.trim(), value.trim());
        let options = ObjectiveConfig::options();
        if !options.contains(&key) {
            let hint = match nearest(key, &options) {
                Some(known) => format!("did you mean `{known}`?"),
                None => format!("known are {}", options.join(", ")),
            };
            bail!("--set {assignment}: `{key}` is no option of an objective; {hint}");
        }
        let value = match format!("value = {value}").parse::<toml::Table>() {
            Ok(mut parsed) if parsed.len() == 1 => parsed.remove("value"),
            _ => None,
        }
        .unwrap_or_else(|| value.into());
        if table.insert(key.to_owned(), value).is_some() {
            bail!("--set {assignment}: `{key}` is set twice");
        }
    }
    let config = ObjectiveConfig::deserialize(table).map_err(|e| {
        let field = e.to_string();
        anyhow::anyhow!("{}", field.trim_end().replace("\nin `kind`", " in --objective").replace('\n', " "))
    })?;
    config.validate()?;
    Ok(config)
}

#[derive(Serialize)]
struct Weighed {
    coefficients: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expert_coefficient: Option<f64>,
}

/// One line of coefficients for every line of `input`, written and flushed before the next is read. Stops at the
/// first bad line with an error that names it.
pub fn weigh(config: &ObjectiveConfig, input: impl BufRead, mut output: impl Write) -> anyhow::Result<()> {
    for (i, line) in input.lines().enumerate() {
        let at = || format!("line {}", i + 1);
        // What could not be judged is no label, and a verifier must not learn that it is wrong.
        let nulls = !config.kind.trains_verifier();
        let group = parse_group(&line.with_context(at)?, config.threshold(), nulls).with_context(at)?;
        let weighed = coefficients(config, &group).with_context(at)?;
        let weighed = Weighed { coefficients: weighed.samples, expert_coefficient: weighed.expert };
        let mut text = serde_json::to_string(&weighed)?;
        text.push('\n');
        output.write_all(text.as_bytes())?;
        output.flush()?;
    }
    Ok(())
}

/// One line of input. Fields are read one by one so that an error can name its field.
fn parse_group(line: &str, pass_threshold: f64, nulls: bool) -> anyhow::Result<ScoredGroup> {
    const FIELDS: [&str; 3] = ["scores", "rewards", "expert_score"];
    let line = line.strip_prefix('\u{feff}').unwrap_or(line);
    if line.trim().is_empty() {
        bail!("the line is empty; a group is a JSON object with `scores`");
    }
    let mut object: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(line).context("a group is a JSON object with `scores`")?;
    if let Some(key) = object.keys().find(|key| !FIELDS.contains(&key.as_str())) {
        let hint = nearest(key, &FIELDS).map_or(String::new(), |known| format!("; did you mean `{known}`?"));
        bail!("unknown field `{key}`{hint}");
    }
    let scores = match object.remove("scores") {
        Some(value) => numbers("scores", &value)?,
        None => bail!("the field `scores` is missing"),
    };
    let rewards = match object.remove("rewards") {
        Some(value) => numbers("rewards", &value)?,
        None => scores.clone(),
    };
    for (field, values) in [("scores", &scores), ("rewards", &rewards)] {
        if let (false, Some(i)) = (nulls, values.iter().position(Option::is_none)) {
            bail!(
                "`{field}[{i}]` is null; leave out what could not be judged: a verifier learns from labels"
            );
        }
    }
    let expert_score = match object.remove("expert_score") {
        Some(value) => {
            Some(value.as_f64().with_context(|| format!("`expert_score` is {value}, not a number"))?)
        }
        None => None,
    };
    Ok(ScoredGroup { expert_score, ..ScoredGroup::judged(&scores, &rewards, pass_threshold) })
}

/// A list of numbers, in which null is `None`.
fn numbers(field: &str, value: &serde_json::Value) -> anyhow::Result<Vec<Option<f64>>> {
    let list = value.as_array().with_context(|| format!("`{field}` is {value}, not a list of numbers"))?;
    let number = |(i, x): (usize, &serde_json::Value)| match x.is_null() {
        true => Ok(None),
        false => x.as_f64().map(Some).with_context(|| format!("`{field}[{i}]` is {x}, not a number")),
    };
    list.iter().enumerate().map(number).collect()
}
