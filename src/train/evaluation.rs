//! Evaluation: tasks to a report.

use std::fs;
use std::path::Path;
use std::time::Instant;

use super::config::TrainConfig;
use super::error::TrainError;
use super::inputs::{self, crc};
use super::pools::{PoolFile, TaskKey};
use super::setup::sampling;
use crate::backend::Backend;
use crate::eval::provenance::OTHER_FIELDS;
use crate::eval::{
    EvalError, Examples, Judged, Problem, Provenance, Report, calibrate_with_intervals, check_ns, evaluate,
    evaluate_problem,
};
use crate::gemma::config::GemmaConfig;
use crate::gemma::params;
use crate::generate::Sampling;
use crate::model_dir::ModelDir;
use crate::rollout::{Judges, Rollout};
use crate::tasks::{Task, Tasks};
use crate::tokenizer::TOKENIZER_FILE;

/// The RNG step of evaluations: none that training reaches. All evaluations of a run draw the same noise, so that
/// their differences are the models'.
const EVAL_STEP: u64 = u64::MAX;

/// How a configuration samples for evaluation.
pub fn eval_sampling(config: &TrainConfig) -> Sampling {
    sampling(config, EVAL_STEP)
}

/// What is to be evaluated, and how.
pub struct Evaluation<'a> {
    /// The tasks.
    pub tasks: &'a Tasks,
    /// M, the responses per task.
    pub samples: usize,
    /// The N that figures are wanted at, each at most M.
    pub ns: Vec<usize>,
    /// How responses are sampled.
    pub sampling: Sampling,
    /// Tasks of each kind whose responses the report shows.
    pub examples: usize,
    /// Becomes the report's.
    pub provenance: Provenance,
}

/// Samples and judges M responses to every task, and estimates pass@N, Best-of-N and majorities. Fails if no response at
/// all could be judged. Pools that `file` has are taken from there, and others are written to it. `pooled` sees every task's
/// pool, `progress` hears of every response.
///
/// Tasks are taken in portions, with a file of up to about a minute, because a stopped evaluation loses the last one; what is
/// kept in memory beyond a portion are figures. What a task's responses are does not depend on its portion.
pub fn evaluation<B: Backend>(
    rollout: &Rollout<B>,
    wanted: Evaluation,
    judges: &mut Judges,
    mut file: Option<&mut PoolFile>,
    mut pooled: impl FnMut(&Task, &[Judged]),
    mut progress: impl FnMut(),
) -> Result<Report, TrainError> {
    let Evaluation { tasks, samples, ns, sampling, examples, provenance } = wanted;
    check_ns(&ns)?;
    let ids = tasks.problem_ids();
    let keys = match &file {
        None => Vec::new(),
        Some(_) => tasks.list.iter().map(|task| task_key(rollout, task)).collect::<Result<Vec<_>, _>>()?,
    };
    let kept = file.as_ref().map(|file| file.kept(&keys)).unwrap_or_default();
    let mut problems = Vec::with_capacity(ids.len());
    let mut examples = Examples::new(examples);
    let mut unjudged = Vec::new();
    // A calibration is of all samples together.
    let (differ, mut judged) = (judges.differ(), Vec::new());
    let first = if file.is_some() { FIRST_PORTION } else { MAX_AT_ONCE };
    let mut portion = (first / samples.max(1)).max(1);
    let mut next = 0;
    while next < tasks.list.len() {
        let pools = if let (true, Some(file)) = (kept.contains(&next), &mut file) {
            (0..samples).for_each(|_| progress());
            vec![file.read(next)?]
        } else {
            let end = (next..tasks.list.len()).take(portion).take_while(|task| !kept.contains(task));
            let list: Vec<&Task> = end.map(|task| &tasks.list[task]).collect();
            let started = Instant::now();
            let groups = rollout.run_from(next, &list, samples, &sampling, judges, &mut progress);
            let (groups, _) = groups.map_err(TrainError::Evaluation)?;
            portion = match started.elapsed().as_secs_f64() {
                ..QUICK => 4 * portion,
                ..SHORT => 2 * portion,
                LONG.. => portion / 2,
                _ => portion,
            };
            portion = portion.clamp(1, (MAX_AT_ONCE / samples.max(1)).max(1));
            let pools: Vec<_> = groups.into_iter().map(|group| (group.judged(), group.unjudged)).collect();
            if let Some(file) = &mut file {
                for (task, (pool, unjudged)) in (next..).zip(&pools) {
                    file.append(task, keys[task], pool, unjudged)?;
                }
                file.sync()?;
            }
            pools
        };
        for (pool, failures) in pools {
            let task = &tasks.list[next];
            examples.offer(next + 1, &task.prompt, &task.answer, &pool);
            pooled(task, &pool);
            let samples = pool.into_iter().map(|judged| judged.sample).collect();
            let problem = Problem { id: ids[next].clone(), samples };
            problems.push(evaluate_problem(&problem, next as u64, &ns, sampling.seed)?);
            if differ {
                judged.push(problem);
            }
            unjudged.extend(failures);
            next += 1;
        }
    }
    // What was taken over was judged.
    if kept.is_empty() {
        judges.check().map_err(TrainError::Evaluation)?;
    }
    let report = Report::new(ns, sampling.seed, problems)?;
    let calibration = differ.then(|| calibrate_with_intervals(&judged, sampling.seed));
    let provenance = Some(provenance);
    Ok(Report { calibration, provenance, examples: examples.into_list(), unjudged, ..report })
}

/// The report on a verifier's scores of responses that are given, `samples` to each problem or more.
pub fn scores_report(
    config: &TrainConfig,
    problems: &[Problem],
    samples: usize,
    provenance: Provenance,
) -> Result<Report, TrainError> {
    let mut report = evaluate(problems, &sizes(samples), config.train.seed)?;
    report.calibration = Some(calibrate_with_intervals(problems, config.train.seed));
    report.provenance = Some(provenance);
    Ok(report)
}

/// Responses of the first portion of an evaluation whose pools are kept, and most of any.
const FIRST_PORTION: usize = 64;
const MAX_AT_ONCE: usize = 1 << 16;
/// Seconds below which the next portion has four times and twice the tasks, and from which half.
const QUICK: f64 = 5.0;
const SHORT: f64 = 20.0;
const LONG: f64 = 60.0;

/// What a task's samples depend on beside the settings.
fn task_key<B: Backend>(rollout: &Rollout<B>, task: &Task) -> Result<TaskKey, TrainError> {
    let prompt = rollout.format.apply(rollout.tokenizer, &task.history, &task.prompt);
    let (_, ids) = prompt.map_err(|e| TrainError::Evaluation(e.into()))?;
    let prompt = ids.iter().fold(0, |crc, id| crc32c::crc32c_append(crc, &id.to_le_bytes()));
    let line = serde_json::Value::Object((*task.fields).clone()).to_string();
    Ok(TaskKey { prompt, line: crc32c::crc32c(line.as_bytes()) })
}

/// Whether a report is of these tasks and this many samples, and has one of the N, so that an [`evaluation`] now can be
/// compared with it.
pub fn comparable(report: &Report, tasks: &Tasks, samples: usize, ns: &[usize]) -> bool {
    report.ns.iter().any(|n| ns.contains(n))
        && report.problems.iter().all(|problem| problem.samples == samples)
        && report.problems.iter().map(|p| &p.id).eq(&tasks.problem_ids())
}

/// The N that an evaluation reports unless told otherwise: powers of two, and all samples.
pub fn sizes(samples: usize) -> Vec<usize> {
    (0..).map(|i| 1 << i).take_while(|n| *n < samples).chain([samples]).collect()
}

/// Settings of sections that evaluation reads, but of no effect on its figures.
const NO_MATTER: [&str; 8] = [
    "data.tasks",
    "data.eval_tasks",
    "data.report",
    "data.pass_rate",
    "generate.samples",
    "generate.prompts_per_step",
    "generate.refill_prompts",
    "generate.allow_truncated_sampling",
];

/// What an evaluation of the tasks at `path` is made with, but for the weights of what is called `model`.
pub fn provenance(
    config: &TrainConfig,
    model: String,
    path: &Path,
    tasks: &Tasks,
    device: String,
) -> Result<Provenance, TrainError> {
    let mut settings = config.fields()?;
    let sections = ["data.", "generate.", "verifier.", "environment."];
    settings.retain(|key, _| {
        sections.iter().any(|section| key.starts_with(section)) && !NO_MATTER.contains(&key.as_str())
    });
    // Fields that built-in verifiers cannot see.
    let others = tasks.list.iter().fold(0, |crc, task| {
        let mut fields = (*task.fields).clone();
        fields.retain(|name, _| name != "prompt" && name != "answer");
        crc32c::crc32c_append(crc, serde_json::Value::Object(fields).to_string().as_bytes())
    });
    for (key, value) in [
        ("program", format!("bon-engine {}", env!("CARGO_PKG_VERSION"))),
        ("device", device),
        ("model", model),
        ("data.tasks", path.display().to_string()),
        (OTHER_FIELDS, crc(others)),
        ("objective.pass_threshold", config.objective.threshold().to_string()),
        ("train.seed", config.train.seed.to_string()),
    ] {
        settings.insert(key.to_owned(), value);
    }
    settings.extend(inputs::of_verifiers(config));
    let answers = tasks.list.iter().map(|task| task.answer.clone()).collect();
    Ok(Provenance { settings, answers, command: String::new() })
}

/// Adds the model's weights as they are now, and the files that belong to them.
pub fn with_model<B: Backend>(provenance: Provenance, dir: &ModelDir<B>) -> Provenance {
    let Provenance { mut settings, .. } = provenance;
    let (backend, params) = (&dir.model.backend, &dir.model.params);
    // A save writes config.json anew: what was read from it counts.
    let config = GemmaConfig { trains_per_layer_embed: false, ..dir.model.config.clone() };
    let config = crc(crc32c::crc32c(format!("{config:?}").as_bytes()));
    let tokenizer = fs::read(dir.path.join(TOKENIZER_FILE));
    for (key, value) in [
        ("model.dtype", format!("{:?}", backend.dtype(&params.embed)).to_lowercase()),
        ("model.compute", format!("{:?}", dir.compute).to_lowercase()),
        ("model.weights", crc(params::checksum(backend, params, &dir.model.frozen))),
        ("model.config", config),
        ("model.tokenizer", tokenizer.map_or("unknown".to_owned(), |bytes| crc(crc32c::crc32c(&bytes)))),
    ] {
        settings.insert(key.to_owned(), value);
    }
    Provenance { settings, ..provenance }
}

/// Whether `report` measures what an evaluation with this provenance would, weights that are not known yet apart.
pub fn same_measure(report: &Report, provenance: &Provenance) -> Result<(), EvalError> {
    let mut now = provenance.clone();
    for (key, value) in report.provenance.iter().flat_map(|before| &before.settings) {
        if key.starts_with("model.") {
            now.settings.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    report.differences(Some(&now)).map(drop)
}
