//! Evaluation: tasks to a report.

use std::fs;
use std::path::Path;

use super::config::TrainConfig;
use super::error::TrainError;
use super::setup::sampling;
use crate::backend::Backend;
use crate::checkpoint::Checkpoint;
use crate::eval::provenance::OTHER_FIELDS;
use crate::eval::{EvalError, Problem, Provenance, Report, calibrate, evaluate};
use crate::gemma::params;
use crate::generate::Sampling;
use crate::model_dir::ModelDir;
use crate::rollout::{Group, Judges, Rollout};
use crate::tasks::{Task, Tasks};
use crate::tokenizer::TOKENIZER_FILE;
use crate::verifier::VerifierConfig;

/// The RNG step of evaluations: none that training reaches. All evaluations of a run draw the same noise, so that
/// their differences are the models'.
const EVAL_STEP: u64 = u64::MAX;

/// How a configuration samples for evaluation.
pub fn eval_sampling(config: &TrainConfig) -> Sampling {
    sampling(config, EVAL_STEP)
}

/// Samples `samples` responses to every task and estimates pass@N, Best-of-N and majority for N = 1, 2, 4... and
/// `samples`. Fails if no response at all could be judged. `provenance` becomes the report's.
pub fn evaluation<B: Backend>(
    rollout: &Rollout<B>,
    tasks: &Tasks,
    samples: usize,
    sampling: &Sampling,
    judges: &mut Judges,
    provenance: Provenance,
    progress: impl FnMut(),
) -> Result<Report, TrainError> {
    let done = evaluation_of(rollout, tasks, samples, sampling, judges, provenance, progress);
    done.map(|(report, _)| report)
}

/// [`evaluation`], and the groups that it is of, in the order of the tasks.
pub fn evaluation_of<B: Backend>(
    rollout: &Rollout<B>,
    tasks: &Tasks,
    samples: usize,
    sampling: &Sampling,
    judges: &mut Judges,
    provenance: Provenance,
    progress: impl FnMut(),
) -> Result<(Report, Vec<Group>), TrainError> {
    let list: Vec<&Task> = tasks.list.iter().collect();
    let groups = rollout.run(&list, samples, sampling, judges, progress);
    let (groups, _) = groups.map_err(TrainError::Evaluation)?;
    judges.check().map_err(TrainError::Evaluation)?;
    let problem = |(group, id): (&Group, String)| Problem { id, samples: group.samples() };
    let problems: Vec<Problem> = groups.iter().zip(tasks.problem_ids()).map(problem).collect();
    let mut report = evaluate(&problems, &sizes(samples), sampling.seed)?;
    report.calibration = judges.differ().then(|| calibrate(&problems));
    report.unjudged = groups.iter().flat_map(|group| group.unjudged.clone()).collect();
    report.provenance = Some(provenance);
    Ok((report, groups))
}

/// The report on a verifier's scores of responses that are given, `samples` to each problem or more.
pub fn scores_report(
    config: &TrainConfig,
    problems: &[Problem],
    samples: usize,
    provenance: Provenance,
) -> Result<Report, TrainError> {
    let mut report = evaluate(problems, &sizes(samples), config.train.seed)?;
    report.calibration = Some(calibrate(problems));
    report.provenance = Some(provenance);
    Ok(report)
}

/// Whether a report is of these tasks and this many samples, so that an [`evaluation`] now can be compared with it.
pub fn comparable(report: &Report, tasks: &Tasks, samples: usize) -> bool {
    report.ns == sizes(samples) && report.problems.iter().map(|p| &p.id).eq(&tasks.problem_ids())
}

/// The N that an evaluation reports: powers of two, and all samples.
fn sizes(samples: usize) -> Vec<usize> {
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
    for (section, verifier) in [("verifier", &config.verifier), ("environment", &config.environment)] {
        // Another model in the same place is another measure.
        if let Some(path) = verifier.as_ref().and_then(VerifierConfig::model)
            && let Ok(checkpoint) = Checkpoint::open(path)
        {
            let sum = checkpoint.names().filter_map(|name| checkpoint.tensor(name));
            let sum = sum.fold(0, |sum, tensor| crc32c::crc32c_append(sum, tensor.bytes));
            settings.insert(format!("{section}.weights"), crc(sum));
        }
        let Some(VerifierConfig::Command { program, .. }) = verifier else { continue };
        // The script beside its interpreter. What cannot be read is named by the verifier itself.
        for file in program.iter().filter(|word| Path::new(word).is_file()) {
            if let Ok(bytes) = fs::read(file) {
                settings.insert(format!("{section}_files.{file}"), crc(crc32c::crc32c(&bytes)));
            }
        }
    }
    Ok(Provenance { settings, answers: tasks.list.iter().map(|task| task.answer.clone()).collect() })
}

/// Adds the model's weights as they are now, and the files that belong to them.
pub fn with_model<B: Backend>(provenance: Provenance, dir: &ModelDir<B>) -> Provenance {
    let Provenance { mut settings, answers } = provenance;
    let (backend, params) = (&dir.model.backend, &dir.model.params);
    // A save writes config.json anew: what was read from it counts.
    let config = crc(crc32c::crc32c(format!("{:?}", dir.model.config).as_bytes()));
    let tokenizer = fs::read(dir.path.join(TOKENIZER_FILE));
    for (key, value) in [
        ("model.dtype", format!("{:?}", backend.dtype(&params.embed)).to_lowercase()),
        ("model.compute", format!("{:?}", dir.compute).to_lowercase()),
        ("model.weights", crc(params::checksum(backend, params))),
        ("model.config", config),
        ("model.tokenizer", tokenizer.map_or("unknown".to_owned(), |bytes| crc(crc32c::crc32c(&bytes)))),
    ] {
        settings.insert(key.to_owned(), value);
    }
    Provenance { settings, answers }
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

fn crc(value: u32) -> String {
    format!("crc32c {value:08x}")
}
