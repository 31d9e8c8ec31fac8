//! Training tasks chosen by pass rate (`data.pass_rate`): those that an earlier evaluation of the same file found neither
//! too easy nor too hard.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::eval::{Grid, GridError, Report};
use crate::tasks::Tasks;

/// Why tasks cannot be chosen by a report.
#[derive(Debug, Error)]
pub enum PassRateError {
    /// The report cannot be read.
    #[error("data.report: cannot read {path}")]
    Read {
        /// The report.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file is no report.
    #[error("data.report: {path} is not a report of `bon-engine eval --output`")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Why.
        source: GridError,
    },
    /// The report is of several temperatures.
    #[error(
        "data.report: {path} is of T = {}; give one of a single temperature, that of generate.temperature",
        temperatures.iter().map(f64::to_string).collect::<Vec<_>>().join(", ")
    )]
    Several {
        /// The file.
        path: PathBuf,
        /// Its temperatures.
        temperatures: Vec<f64>,
    },
    /// The report is of other tasks.
    #[error(
        "data.report: {path} is of other tasks than {tasks}: {found} stands where the file has {wanted}; evaluate that \
         file, with `bon-engine eval --tasks {tasks} --output FILE`"
    )]
    OtherTasks {
        /// The report.
        path: PathBuf,
        /// The task file.
        tasks: PathBuf,
        /// The report's problem.
        found: String,
        /// The file's.
        wanted: String,
    },
    /// The tasks had other answers when they were evaluated.
    #[error(
        "data.report: {path} was judged by another answer than that of {tasks}:{line}; evaluate the tasks again"
    )]
    OtherAnswer {
        /// The report.
        path: PathBuf,
        /// The task file.
        tasks: PathBuf,
        /// Its line.
        line: usize,
    },
    /// The report lists no pass@1.
    #[error(
        "data.report: {path} has no pass@1 of {problem}; `bon-engine eval --output` writes one for every task"
    )]
    NoPassRate {
        /// The report.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// No task is left.
    #[error(
        "data.pass_rate: no task of {tasks} has a pass rate from {low} to {high} in {path}; they are from {least} to \
         {most}, so widen the range"
    )]
    NoneLeft {
        /// The report.
        path: PathBuf,
        /// The task file.
        tasks: PathBuf,
        /// The least rate asked for.
        low: f64,
        /// The highest rate asked for.
        high: f64,
        /// The least rate there is.
        least: f64,
        /// The highest rate there is.
        most: f64,
    },
}

/// The tasks of the file at `path` whose pass@1 in `report` is from `low` to `high`, both included. The report must be of
/// these tasks, all of them and in this order, judged by these answers as far as it says by which.
pub fn filter(
    tasks: Tasks,
    path: &Path,
    report: &Path,
    [low, high]: [f64; 2],
) -> Result<Tasks, PassRateError> {
    let (report, path) = (report.to_owned(), path.to_owned());
    let text = fs::read(&report).map_err(|source| PassRateError::Read { path: report.clone(), source })?;
    let text = String::from_utf8_lossy(&text);
    let found =
        Grid::from_json(&text).map_err(|source| PassRateError::Syntax { path: report.clone(), source })?;
    let temperatures = found.temperatures();
    let Ok([found]) = <[Report; 1]>::try_from(found.reports) else {
        return Err(PassRateError::Several { path: report, temperatures });
    };
    let ids = tasks.problem_ids();
    let differs = |i: &usize| ids.get(*i) != found.problems.get(*i).map(|problem| &problem.id);
    if let Some(i) = (0..ids.len().max(found.problems.len())).find(differs) {
        let name = |id: Option<&String>| id.map_or("nothing".to_owned(), |id| format!("`{id}`"));
        let (wanted, found) = (name(ids.get(i)), name(found.problems.get(i).map(|problem| &problem.id)));
        return Err(PassRateError::OtherTasks { path: report, tasks: path, found, wanted });
    }
    if let Some(made) = &found.provenance
        && let Some((_, task)) =
            (0..).zip(&tasks.list).find(|(i, task)| made.answers.get(*i) != Some(&task.answer))
    {
        return Err(PassRateError::OtherAnswer { path: report, tasks: path, line: task.line });
    }
    let single = found.ns.iter().position(|&n| n == 1);
    let rates: Vec<f64> = found
        .problems
        .iter()
        .map(|problem| {
            let rate = single.and_then(|at| problem.figures.pass_at_n.get(at));
            let none = || PassRateError::NoPassRate { path: report.clone(), problem: problem.id.clone() };
            // The share itself, because the estimate is that but for rounding, and ends of a range count.
            let samples = problem.samples.max(1) as f64;
            rate.map(|rate| (rate * samples).round() / samples).ok_or_else(none)
        })
        .collect::<Result<_, _>>()?;
    let (least, most) = rates
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), &rate| (least.min(rate), most.max(rate)));
    tasks.filtered(|index| (low..=high).contains(&rates[index])).ok_or(PassRateError::NoneLeft {
        path: report,
        tasks: path,
        low,
        high,
        least,
        most,
    })
}
