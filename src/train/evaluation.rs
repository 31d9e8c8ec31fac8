//! Evaluation: tasks to a report.

use std::collections::BTreeMap;

use super::config::TrainConfig;
use super::error::TrainError;
use super::setup::sampling;
use crate::backend::Backend;
use crate::eval::{Problem, Report, evaluate};
use crate::generate::Sampling;
use crate::rollout::{Judges, Rollout};
use crate::tasks::{Task, Tasks};

/// The RNG step of evaluations: none that training reaches. All evaluations of a run draw the same noise, so that
/// their differences are the models'.
const EVAL_STEP: u64 = u64::MAX;

/// How a configuration samples for evaluation.
pub fn eval_sampling(config: &TrainConfig) -> Sampling {
    sampling(config, EVAL_STEP)
}

/// Samples `samples` responses to every task and estimates pass@N, Best-of-N and majority for N = 1, 2, 4... and
/// `samples`. Also counts the responses that could not be judged, by kind of failure.
pub fn evaluation<B: Backend>(
    rollout: &Rollout<B>,
    tasks: &Tasks,
    samples: usize,
    sampling: &Sampling,
    judges: &mut Judges,
    progress: impl FnMut(),
) -> Result<(Report, BTreeMap<String, u64>), TrainError> {
    let list: Vec<&Task> = tasks.list.iter().collect();
    let groups = rollout.run(&list, samples, sampling, judges, progress);
    let (groups, _) = groups.map_err(TrainError::Evaluation)?;
    let mut failures = BTreeMap::new();
    let problems: Vec<Problem> = groups
        .into_iter()
        .zip(problem_ids(tasks))
        .map(|(g, id)| {
            for (kind, n) in &g.failures {
                *failures.entry(kind.clone()).or_default() += n;
            }
            Problem { id, samples: g.samples() }
        })
        .collect();
    Ok((evaluate(&problems, &sizes(samples), sampling.seed)?, failures))
}

/// Whether a report is of these tasks and this many samples, so that an [`evaluation`] now compares with it.
pub fn comparable(report: &Report, tasks: &Tasks, samples: usize) -> bool {
    report.ns == sizes(samples) && report.problems.iter().map(|p| &p.id).eq(&problem_ids(tasks))
}

/// The N that an evaluation reports: powers of two, and all samples.
fn sizes(samples: usize) -> Vec<usize> {
    (0..).map(|i| 1 << i).take_while(|n| *n < samples).chain([samples]).collect()
}

fn problem_ids(tasks: &Tasks) -> Vec<String> {
    tasks.list.iter().enumerate().map(|(i, task)| format!("{}: {}", i + 1, task.prompt)).collect()
}
