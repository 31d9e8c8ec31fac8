//! `bon-engine eval`.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::engine::{DeviceArg, with_backend};
use super::plan::of_run;
use super::progress::{Screen, note, unjudged};
use super::{PrecisionArgs, open_model, positive};
use crate::backend::Backend;
use crate::checkpoint::atomic;
use crate::eval::{Provenance, Report};
use crate::model_dir::Precision;
use crate::plan::Purpose;
use crate::rollout::Group;
use crate::tasks::{Task, Tasks};
use crate::train::config::{MAX_SAMPLES, ModelSection, Problems, Template, TrainConfig};
use crate::train::evaluation::{
    comparable, eval_sampling, evaluation_of, provenance, same_measure, with_model,
};
use crate::train::setup::{check_judges, check_prompts, check_tasks, judges, rollout, stop_rule, warnings};

/// Arguments of `eval`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Example, without a configuration file:

  bon-engine eval --model gemma-3-270m --tasks test.jsonl --samples 32 --set verifier.kind=numeric")]
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
    /// Responses per task [default: train.eval_samples, else 16]
    #[arg(long, value_name = "M", value_parser = positive(MAX_SAMPLES))]
    samples: Option<u64>,
    /// Write the report as JSON: the figures, what made them, and the responses that could not be judged
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the tasks with the sampled responses and their rewards as JSON lines, which `train` with objective.kind =
    /// "verifier" learns from; what could not be judged is left out
    #[arg(long, value_name = "FILE")]
    save_samples: Option<PathBuf>,
    /// Compare with an earlier report on the same tasks, judged alike, and as many samples; says what else differs
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

fn run_on<B: Backend + Clone + 'static>(
    backend: B,
    args: &Args,
    config: &TrainConfig,
    plan: Option<String>,
) -> anyhow::Result<()> {
    let tasks = Tasks::read(&config.data.tasks)?;
    let samples = config.train.eval_samples;
    let mut model = config.model.path.display().to_string();
    if let Some(adapter) = &config.model.adapter {
        model += &format!(" with {}", adapter.display());
    }
    let provenance = provenance(config, model, &config.data.tasks, &tasks, backend.device_name())?;
    let earlier = |path: &PathBuf| earlier(path, &tasks, samples, &provenance);
    let before = args.compare.as_ref().map(earlier).transpose()?;
    for (name, path) in [("--output", &args.output), ("--save-samples", &args.save_samples)] {
        let Some(path) = path else { continue };
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
        if path.is_dir() || parent.is_some_and(|p| !p.is_dir()) {
            bail!("{name} {}: give a file in a directory that exists", path.display());
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
    let provenance = with_model(provenance, &dir);
    for text in warnings(config, &dir, &config.data.tasks, &tasks, false)? {
        note(&format!("warning: {text}"));
    }
    if let Some(plan) = plan {
        note(&plan);
    }
    let stop = stop_rule(config, &dir);
    let progress = Screen::default().responses((tasks.list.len() * samples) as u64);
    let evaluated = evaluation_of(
        &rollout(config, &dir, &stop),
        &tasks,
        samples,
        &eval_sampling(config),
        &mut judges,
        provenance,
        || {
            progress.inc(1);
        },
    );
    progress.finish_and_clear();
    let notes = judges.notes();
    let (report, groups) = evaluated.inspect_err(|_| tell(&notes))?;
    let place = match &args.output {
        Some(path) => format!("all of them are in {}", path.display()),
        None => "--output FILE keeps all of them".to_owned(),
    };
    unjudged(&report.unjudged, &place, &mut BTreeSet::new()).iter().for_each(|news| note(news));
    tell(&notes);
    if let Some(path) = &args.output {
        let text = serde_json::to_string_pretty(&report)?;
        atomic::write_file(path, |f| f.write_all(text.as_bytes()))?;
    }
    if let Some(path) = &args.save_samples {
        atomic::write_file(path, |f| {
            let lines = tasks.list.iter().zip(&groups).filter_map(|(task, group)| labelled(task, group));
            lines.into_iter().try_for_each(|line| writeln!(f, "{line}"))
        })?;
    }
    let mut out = std::io::stdout().lock();
    match before {
        None => writeln!(out, "{}", report.to_table())?,
        Some(before) => writeln!(out, "{}", before.compare(&report)?.to_table())?,
    }
    Ok(())
}

/// A task with its responses, their tokens and rewards; `None` where none of them could be judged.
fn labelled(task: &Task, group: &Group) -> Option<Value> {
    let of = |i: usize| json!({ "text": group.texts[i], "score": group.rewards[i], "tokens": group.responses[i].tokens });
    let responses: Vec<Value> = (0..group.texts.len()).filter(|&i| group.rewarded[i]).map(of).collect();
    let mut fields = (*task.fields).clone();
    let some = !responses.is_empty();
    fields.insert("responses".to_owned(), responses.into());
    some.then_some(Value::Object(fields))
}

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
    let Precision { dtype, compute } = args.precision.or(config.model.precision());
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

/// The report to compare with, checked before any time is spent.
fn earlier(path: &Path, tasks: &Tasks, samples: usize, now: &Provenance) -> anyhow::Result<Report> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let report: Report = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a report of `eval --output`", path.display()))?;
    if !comparable(&report, tasks, samples) {
        let each = report.problems.first().map_or(0, |p| p.samples);
        bail!(
            "{} is a report of {} tasks with {each} samples each; compare it with an evaluation of the same tasks and \
             as many samples",
            path.display(),
            report.problems.len()
        );
    }
    same_measure(&report, now).with_context(|| path.display().to_string())?;
    Ok(report)
}
