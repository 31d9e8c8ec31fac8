//! `bon-engine report`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

use crate::checkpoint::atomic;
use crate::eval::{Grid, Report};
use crate::layered::read_text;
pub(super) use crate::page::Sources;
use crate::page::{Evaluated, Run, Step, page};
use crate::train::config::TrainConfig;
use crate::train::metrics::{EVALS, STEPS};
use crate::train::run::{CONFIG, EVAL_DIR, PAGE};

/// Arguments of `report`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Two models on the same tasks, and a run that is still under way:

  bon-engine eval CONFIG --output before.json
  bon-engine eval CONFIG --model runs/first/checkpoints/step-000100/model --output after.json
  bon-engine report before.json after.json --html page.html
  bon-engine report runs/first

The page needs no network, no script and no other file.")]
pub struct Args {
    /// Reports of `eval --output`, and run directories of `train`; differences are against the first
    #[arg(value_name = "REPORT|RUN", required = true)]
    sources: Vec<PathBuf>,
    /// The page [default, where a single run directory is given: report.html in it]
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let target = match (&args.html, &args.sources[..]) {
        (Some(path), _) => path.clone(),
        (None, [dir]) if dir.is_dir() => dir.join(PAGE),
        (None, _) => bail!("give --html FILE, the page to write"),
    };
    writable("--html", &target)?;
    let names = names(&args.sources);
    let mut sources = Sources::default();
    for (path, name) in args.sources.iter().zip(names) {
        if path.is_dir() {
            sources.runs.push(read_run(path, name)?);
        } else {
            sources.evaluations.push((name, read_grid(path)?));
        }
    }
    write_page(&target, sources)?;
    writeln!(std::io::stdout(), "{}", target.display())?;
    Ok(())
}

/// Writes the page of a run directory into it, unless the run has done nothing yet.
pub(super) fn write_run(dir: &Path) -> anyhow::Result<()> {
    let run = read_run(dir, name_of(dir))?;
    if run.steps.is_empty() && run.course.is_empty() {
        return Ok(());
    }
    write_page(&dir.join(PAGE), Sources { evaluations: Vec::new(), runs: vec![run] })
}

/// Writes a page.
pub(super) fn write_page(path: &Path, sources: Sources) -> anyhow::Result<()> {
    let text = page(&sources)?;
    atomic::write_file(path, |f| f.write_all(text.as_bytes()))?;
    Ok(())
}

/// Refuses a place where no file can be written, before any time is spent.
pub(super) fn writable(argument: &str, path: &Path) -> anyhow::Result<()> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    if path.is_dir() || parent.is_some_and(|p| !p.is_dir()) {
        bail!("{argument} {}: give a file in a directory that exists", path.display());
    }
    Ok(())
}

/// What a page calls a file or directory.
pub(super) fn name_of(path: &Path) -> String {
    let name = if path.is_dir() { path.file_name() } else { path.file_stem() };
    name.map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

/// [`name_of`] each, or the whole path where two have one name.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let short: Vec<String> = paths.iter().map(|path| name_of(path)).collect();
    let unique = |name: &String| short.iter().filter(|other| *other == name).count() == 1;
    let name = |(path, name): (&PathBuf, &String)| {
        if unique(name) { name.clone() } else { path.display().to_string() }
    };
    paths.iter().zip(&short).map(name).collect()
}

/// Reads what `eval --output` wrote.
pub(super) fn read_grid(path: &Path) -> anyhow::Result<Grid> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    Grid::from_json(&text).with_context(|| format!("{} is not a report of `eval --output`", path.display()))
}

/// Reads what a run has left so far.
fn read_run(dir: &Path, name: String) -> anyhow::Result<Run> {
    let config = dir.join(CONFIG);
    if !config.is_file() {
        bail!("{} is no run directory: it has no {CONFIG}", dir.display());
    }
    let config = read_text(&config)?;
    let settings = TrainConfig::parse(&dir.join(CONFIG).display().to_string(), &config, &[])?;
    let imitates = !settings.objective.kind.objective().needs_samples;
    let mut run = Run { name, config, n: settings.objective.n, imitates, ..Run::default() };
    run.steps = lines(&dir.join(STEPS), Step::of)?;
    // Two runs of one directory may have left reports of steps that the newer one has not reached.
    let mut steps: Vec<u64> = lines(&dir.join(EVALS), |line| line.get("step")?.as_u64())?;
    steps.sort_unstable();
    steps.dedup();
    let count = steps.len();
    for (i, step) in steps.into_iter().enumerate() {
        let path = dir.join(EVAL_DIR).join(format!("step-{step:06}.json"));
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let report: Report = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a report of an evaluation", path.display()))?;
        run.course.push(Evaluated { step, ns: report.ns.clone(), figures: report.figures.clone() });
        match i {
            0 => run.first = Some(report),
            _ if i + 1 == count => run.last = Some(report),
            _ => {}
        }
    }
    Ok(run)
}

/// The lines of a file that a run appends to; none where there is no file. A last line without its end is being written.
fn lines<T>(path: &Path, of: impl Fn(&Value) -> Option<T>) -> anyhow::Result<Vec<T>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        file => file.with_context(|| format!("cannot read {}", path.display()))?,
    };
    let mut reader = BufReader::new(file);
    let (mut found, mut line) = (Vec::new(), Vec::new());
    loop {
        line.clear();
        reader.read_until(b'\n', &mut line).with_context(|| format!("cannot read {}", path.display()))?;
        if !line.ends_with(b"\n") {
            return Ok(found);
        }
        let parsed = serde_json::from_slice::<Value>(&line).ok().and_then(|value| of(&value));
        let bad = || format!("{}:{}: not a line of metrics with a `step`", path.display(), found.len() + 1);
        found.push(parsed.with_context(bad)?);
    }
}
