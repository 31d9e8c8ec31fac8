//! `bon-engine eval`.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::engine::{DeviceArg, with_backend};
use super::plan::of_run;
use super::progress::{Screen, note, unjudged};
use super::report::{Sources, name_of, read_grid, writable, write_page};
use super::{PrecisionArgs, open_model, positive};
use crate::backend::Backend;
use crate::checkpoint::atomic;
use crate::eval::{Grid, Judged, Provenance, Report};
use crate::model_dir::Precision;
use crate::plan::Purpose;
use crate::rollout::RolloutError;
use crate::tasks::{Task, Tasks};
use crate::train::config::{GenerateSection, MAX_SAMPLES, ModelSection, Problems, Template, TrainConfig};
use crate::train::error::TrainError;
use crate::train::evaluation::{
    Evaluation, comparable, eval_sampling, evaluation, provenance, same_measure, sizes, with_model,
};
use crate::train::interrupt::Interrupt;
use crate::train::pools::PoolFile;
use crate::train::setup::{check_judges, check_prompts, check_tasks, judges, rollout, stop_rule, warnings};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Example, without a configuration file:

  bon-engine eval --model gemma-3-270m --tasks test.jsonl --samples 32 --set verifier.kind=numeric

Several temperatures, and a page to look at:

  bon-engine eval CONFIG --temperatures 0.4,0.7,1,1.3 --output runs/grid.json --report runs/grid.html

With --output, the samples and their verdicts are kept beside the report as they are made (grid.pools/ beside grid.json, a \
file per model, temperature and settings). Ctrl-C stops; the same command goes on from there, and draws again only what is \
not there, or was drawn by another model, with other settings, or judged otherwise. What a verifier's program reads beside \
its own files is not known: after a change of that, remove the directory. Nothing else needs it once the report is written.

Several models: evaluate each with --output, then show them side by side:

  bon-engine report first.json second.json --html page.html")]
pub struct Args {
    /// Configuration as for `train`; [model], [data], [generate], [verifier], [environment] and objective.pass_threshold
    /// count
    #[arg(value_name = "CONFIG")]
    config: Option<PathBuf>,
    /// Set or override a setting, as in --set generate.temperature=0.8; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Model directory [default: model.path]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Adapter of that model, in PEFT's layout [default: model.adapter]
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Tasks [default: data.eval_tasks, else data.tasks]
    #[arg(long, value_name = "FILE")]
    tasks: Option<PathBuf>,
    /// Responses per task and temperature [default: train.eval_samples, else 16]
    #[arg(long, value_name = "M", value_parser = positive(MAX_SAMPLES))]
    samples: Option<u64>,
    /// Evaluate at each of these temperatures, and say the best one for each N [default: generate.temperature]
    #[arg(long, value_name = "T,T,...", value_delimiter = ',')]
    temperatures: Vec<f64>,
    /// The N to report [default: powers of two up to M, and M]
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', value_parser = positive(MAX_SAMPLES))]
    n: Vec<u64>,
    /// Tasks of each kind (best, worst, verifier wrong) whose responses the report shows
    #[arg(long, value_name = "K", default_value_t = 3, value_parser = clap::value_parser!(u64).range(0..=50))]
    examples: u64,
    /// Write the report as JSON: the figures, what made them, a few responses, and those that could not be judged
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the tasks with the sampled responses and their rewards as JSON lines, which `train` with objective.kind =
    /// "verifier" learns from; what could not be judged is left out
    #[arg(long, value_name = "FILE")]
    save_samples: Option<PathBuf>,
    /// Write the report as a page to look at: one HTML file with plots, which needs nothing else
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Compare with an earlier report on the same tasks, judged alike, and as many samples, at the temperatures that both
    /// have; says what else differs
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = config(&args)?;
    let engine = args.device.choice.open()?;
    let plan = of_run(&config, &engine, Purpose::Evaluate)?;
    with_backend!(engine, |backend| run_on(backend, &args, &config, plan))
}

/// What is evaluated at one temperature.
struct Run {
    config: TrainConfig,
    provenance: Provenance,
    /// What it is compared with.
    before: Option<Report>,
}

fn run_on<B: Backend + Clone + 'static>(
    backend: B,
    args: &Args,
    config: &TrainConfig,
    plan: Option<String>,
) -> anyhow::Result<()> {
    let tasks = Tasks::read(&config.data.tasks)?;
    let samples = config.train.eval_samples;
    let ns = wanted_ns(args, samples)?;
    let mut runs = Vec::new();
    for temperature in temperatures(args, config)? {
        let mut config = config.clone();
        config.generate.temperature = temperature;
        let mut model = config.model.path.display().to_string();
        if let Some(adapter) = &config.model.adapter {
            model += &format!(" with {}", adapter.display());
        }
        let made = provenance(&config, model, &config.data.tasks, &tasks, backend.device_model())?;
        runs.push(Run {
            config,
            provenance: Provenance { command: super::command_line(), ..made },
            before: None,
        });
    }
    let before =
        args.compare.as_deref().map(|path| earlier(path, &tasks, samples, &ns, &mut runs)).transpose()?;
    for (name, path) in
        [("--output", &args.output), ("--report", &args.report), ("--save-samples", &args.save_samples)]
    {
        if let Some(path) = path {
            writable(name, path)?;
        }
    }
    let Some(mut judges) = judges(config, &backend)? else {
        bail!(
            "evaluation needs a verifier: add [verifier] to CONFIG, or for instance --set verifier.kind=numeric"
        )
    };
    check_tasks(&judges, &config.data.tasks, &tasks)?;
    tell(&judges.notes());
    let ModelSection { path, adapter, .. } = &config.model;
    let dir = open_model(backend, path, adapter.as_deref(), config.model.precision())?;
    let dir = dir.with_chat(config.data.template == Template::Chat)?;
    check_prompts(config, &dir, &config.data.tasks, &tasks)?;
    check_judges(config, &dir, &judges, &[(&config.data.tasks, &tasks)])?;
    for text in warnings(config, &dir, &config.data.tasks, &tasks, false)? {
        note(&format!("warning: {text}"));
    }
    if let Some(plan) = plan {
        note(&plan);
    }
    // Where pools are kept a stop loses nothing; elsewhere a signal ends the program as it does others.
    let pools = args.output.as_ref().map(|path| path.with_extension("pools"));
    let interrupt = if pools.is_some() { Interrupt::on_signals()? } else { Interrupt::default() };
    let interrupted = || interrupt.requested();
    let (count, mut reports, mut comparisons) = (runs.len(), Vec::new(), Vec::new());
    let mut told = BTreeSet::new();
    let (keep, mut saved) = (args.save_samples.is_some(), Vec::new());
    for (i, Run { config, provenance, before }) in runs.into_iter().enumerate() {
        let provenance = with_model(provenance, &dir);
        let temperature = config.generate.temperature;
        let mut file = pools.as_ref().map(|dir| PoolFile::open(dir, &provenance, samples)).transpose()?;
        let screen = Screen::default();
        if count > 1 {
            let i = i + 1;
            screen.line(&format!(
                "temperature {temperature} ({i} of {count}): {samples} responses to each of {} tasks",
                tasks.list.len()
            ));
        }
        let progress = screen.responses((tasks.list.len() * samples) as u64);
        let stop = stop_rule(&config, &dir).interrupted_by(&interrupted);
        let wanted = Evaluation {
            tasks: &tasks,
            samples,
            ns: ns.clone(),
            sampling: eval_sampling(&config),
            examples: args.examples as usize,
            provenance,
        };
        let rollout = rollout(&config, &dir, &stop);
        let pooled = |task: &Task, pool: &[Judged]| {
            saved.extend(keep.then(|| labelled(task, pool)).flatten());
        };
        let evaluated = evaluation(&rollout, wanted, &mut judges, file.as_mut(), pooled, || progress.inc(1));
        progress.finish_and_clear();
        let notes = judges.notes();
        let report = match (evaluated, &file) {
            (Err(TrainError::Evaluation(RolloutError::Interrupted)), Some(file)) => bail!(
                "stopped at temperature {temperature}; what is judged is in {}, and the same command goes on from there",
                file.path().display()
            ),
            (evaluated, _) => evaluated.inspect_err(|_| tell(&notes))?,
        };
        let place = match &args.output {
            Some(path) => format!("all of them are in {}", path.display()),
            None => "--output FILE keeps all of them".to_owned(),
        };
        unjudged(&report.unjudged, &place, &mut told).iter().for_each(|news| note(news));
        tell(&notes);
        if let Some(before) = before {
            comparisons.push((temperature, before.compare(&report)?));
        }
        reports.push(report);
    }
    let grid = Grid::new(reports)?;
    if let Some(path) = &args.output {
        let text = grid.to_json()?;
        atomic::write_file(path, |f| f.write_all(text.as_bytes()))?;
    }
    if let Some(path) = &args.save_samples {
        atomic::write_file(path, |f| saved.iter().try_for_each(|line| writeln!(f, "{line}")))?;
    }
    let mut out = std::io::stdout().lock();
    if comparisons.is_empty() || count > 1 {
        writeln!(out, "{}", grid.to_table())?;
    }
    for (temperature, comparison) in &comparisons {
        if count > 1 {
            let with = args.compare.as_deref().unwrap_or(Path::new("")).display();
            writeln!(out, "compared with {with}, T = {temperature}:")?;
        }
        writeln!(out, "{}", comparison.to_table())?;
    }
    if let Some(path) = &args.report {
        let name = args.output.as_ref().unwrap_or(&config.model.path);
        let first = before.zip(args.compare.as_ref()).map(|(grid, path)| (name_of(path), grid));
        let entries = first.into_iter().chain([(name_of(name), grid)]).collect();
        write_page(path, Sources { evaluations: entries, runs: Vec::new() })?;
    }
    Ok(())
}

/// A task with its responses, their tokens and rewards; `None` where none of them could be judged.
fn labelled(task: &Task, pool: &[Judged]) -> Option<String> {
    let of = |judged: &Judged| json!({ "text": judged.text, "score": judged.reward, "tokens": judged.ids });
    let responses: Vec<Value> = pool.iter().filter(|judged| judged.rewarded).map(of).collect();
    let mut fields = (*task.fields).clone();
    let some = !responses.is_empty();
    fields.insert("responses".to_owned(), responses.into());
    some.then(|| Value::Object(fields).to_string())
}

/// The N that are asked for, in their order.
fn wanted_ns(args: &Args, samples: usize) -> anyhow::Result<Vec<usize>> {
    let mut ns: Vec<usize> = args.n.iter().map(|&n| n as usize).collect();
    ns.sort_unstable();
    ns.dedup();
    match ns.last() {
        None => Ok(sizes(samples)),
        Some(&most) if most > samples => {
            bail!("--n {most}: more than the {samples} responses per task; raise --samples, or lower N")
        }
        Some(_) => Ok(ns),
    }
}

/// The temperatures that are asked for, in their order.
fn temperatures(args: &Args, config: &TrainConfig) -> anyhow::Result<Vec<f64>> {
    let mut all = args.temperatures.clone();
    if all.is_empty() {
        return Ok(vec![config.generate.temperature]);
    }
    all.sort_by(f64::total_cmp);
    if let Some(pair) = all.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("--temperatures: {} is there twice", pair[0]);
    }
    if all.len() > MAX_TEMPERATURES {
        bail!("--temperatures: {} of them; at most {MAX_TEMPERATURES} make a report", all.len());
    }
    for &temperature in &all {
        let mut problems = Problems::default();
        let generate = GenerateSection { temperature, ..config.generate.clone() };
        generate.check(true, &mut problems);
        problems.none().with_context(|| format!("--temperatures: {temperature}"))?;
    }
    Ok(all)
}

/// Most temperatures of a report.
const MAX_TEMPERATURES: usize = 32;

/// What verifiers do that costs time.
fn tell(notes: &[String]) {
    notes.iter().for_each(|text| note(&format!("note: {text}")));
}

/// The settings of the file, `--set` and the other arguments, as far as they concern evaluation.
fn config(args: &Args) -> anyhow::Result<TrainConfig> {
    // A training configuration must say its objective, and an evaluation reads no more of that than what passes.
    let set: Vec<String> = std::iter::once("objective.kind=sft".to_owned()).chain(args.set.clone()).collect();
    let mut config = match &args.config {
        Some(path) => TrainConfig::load(path, &set)?,
        None => TrainConfig::parse("--set", "", &set)?.with_prefix_file()?,
    };
    if let Some(path) = &args.model {
        config.model.path = path.clone();
    }
    if let Some(path) = &args.adapter {
        config.model.adapter = Some(path.clone());
    }
    if let Some(path) = args.tasks.clone().or(config.data.eval_tasks.take()) {
        config.data.tasks = path;
    }
    let Precision { dtype, compute, .. } = args.precision.or(config.model.precision());
    (config.model.dtype, config.model.compute) = (dtype, compute);
    config.train.eval_samples = args.samples.map_or(config.train.eval_samples, |samples| samples as usize);
    for (path, argument, key) in [
        (&config.model.path, "--model DIR", "model.path"),
        (&config.data.tasks, "--tasks FILE", "data.tasks"),
    ] {
        if path.as_os_str().is_empty() {
            bail!("give {argument}, or {key} in CONFIG");
        }
    }
    let mut problems = Problems::default();
    config.model.check(true, &mut problems);
    config.data.check(&mut problems);
    config.generate.check(true, &mut problems);
    config.check_judges(&mut problems);
    config.train.check_seed(&mut problems);
    config.check_sizes(&mut problems);
    let threshold = config.objective.threshold();
    problems.require(threshold.is_finite(), "objective.pass_threshold", || {
        format!("is {threshold}; it must be a finite number")
    });
    problems.require(config.train.eval_samples >= 1, "train.eval_samples", || "must be at least 1".into());
    problems.none()?;
    Ok(config)
}

/// The report to compare with, checked before any time is spent: what of it belongs to which run goes there.
fn earlier(
    path: &Path,
    tasks: &Tasks,
    samples: usize,
    ns: &[usize],
    runs: &mut [Run],
) -> anyhow::Result<Grid> {
    let grid = read_grid(path)?;
    let alone = runs.len() == 1 && grid.reports.len() == 1;
    for run in runs.iter_mut() {
        let temperature = Some(run.config.generate.temperature);
        let found = grid.reports.iter().find(|report| alone || report.temperature() == temperature);
        let Some(report) = found else { continue };
        if !comparable(report, tasks, samples, ns) {
            let each = report.problems.first().map_or(0, |p| p.samples);
            bail!(
                "{} is a report of {} tasks with {each} samples each at N = {}; compare it with an evaluation of the same \
                 tasks and as many samples",
                path.display(),
                report.problems.len(),
                listed(&report.ns)
            );
        }
        same_measure(report, &run.provenance).with_context(|| path.display().to_string())?;
        run.before = Some(report.clone());
    }
    if runs.iter().all(|run| run.before.is_none()) {
        let its = match &grid.temperatures()[..] {
            [] => "an unknown temperature".to_owned(),
            all => format!("T = {}", listed(all)),
        };
        bail!("{} is of {its}; evaluate at one of its temperatures, with --temperatures", path.display());
    }
    Ok(grid)
}

/// Numbers with commas between them.
fn listed(numbers: &[impl ToString]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
