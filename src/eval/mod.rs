//! Evaluation: from one pool of M samples per problem to pass@N, Best-of-N and majority@N for every N <= M, with
//! 95 % confidence intervals over problems; over several temperatures a [`Grid`]. Pure: it generates nothing and reads no
//! file.

mod calibration;
pub mod estimators;
mod examples;
mod grid;
mod interval;
pub mod provenance;
mod report;
pub mod scaling;
mod weighted;

pub use calibration::{Bin, Calibration, Probabilities, RankIntervals, calibrate, calibrate_with_intervals};
pub use examples::{Example, Examples, Shown, Text, Why};
pub use grid::{Best, BestTemperature, Grid, GridError};
pub use interval::Estimate;
pub use provenance::{Difference, Provenance};
pub use report::{
    Change, Comparison, Figures, ProblemReport, Report, Unjudged, calibration_rows, count_by_kind,
};
pub use scaling::{FitPoint, ScalingFit};
pub use weighted::weighted_majority_at_n;

use estimators::{answer_counts, best_of_n, entropy, majority_at_n, pass_at_n};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// One sampled response to a problem.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The verifier's score, which Best-of-N selects by.
    pub score: f64,
    /// Whether its reward passes.
    pub correct: bool,
    /// The answer found in the response, in a form in which equal answers are equal strings; `None` if it has none.
    pub answer: Option<String>,
    /// Its length, the end token included.
    pub tokens: usize,
    /// Whether the length limit cut it.
    pub truncated: bool,
}

/// A [`Sample`] with what it was made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judged {
    /// The response.
    pub text: String,
    /// Its tokens by their ids, to its end.
    pub ids: Vec<u32>,
    /// Its reward.
    pub reward: f64,
    /// Whether that was found. Of what could not be judged it is the least there is.
    pub rewarded: bool,
    /// What evaluation needs of it.
    #[serde(flatten)]
    pub sample: Sample,
}

/// A problem and its pool of i.i.d. samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Problem {
    /// What errors and reports call it.
    pub id: String,
    /// The pool.
    pub samples: Vec<Sample>,
}

/// Why pools cannot be evaluated, or reports not compared.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum EvalError {
    /// Nothing to evaluate.
    #[error("there is no problem to evaluate")]
    NoProblems,
    /// No N, or N = 0.
    #[error("name at least one N to evaluate, each at least 1")]
    NoN,
    /// The pool cannot tell about Best-of-N.
    #[error("problem `{problem}` has {m} samples, too few for N = {n}; draw more samples or lower N")]
    PoolTooSmall {
        /// The problem's id.
        problem: String,
        /// N.
        n: usize,
        /// M.
        m: usize,
    },
    /// NaN or infinity.
    #[error("problem `{problem}`: the score of sample {sample} is {value}, not a finite number")]
    NonFiniteScore {
        /// The problem's id.
        problem: String,
        /// Index of the sample.
        sample: usize,
        /// The score.
        value: f64,
    },
    /// Reports of a grid are not each of a temperature of its own.
    #[error("reports of a grid must each be of another temperature, and say of which")]
    Temperatures,
    /// Two reports that are compared have no N in common.
    #[error("the reports list different N: {before:?} before, {after:?} after")]
    DifferentN {
        /// N of the first report.
        before: Vec<usize>,
        /// N of the second.
        after: Vec<usize>,
    },
    /// Two reports that are compared judge by different measures.
    #[error(
        "the two evaluations do not measure the same, so their difference means nothing; evaluate both with the same \
         answers, the same verifier and the same `objective.pass_threshold`. What differs:{}",
        differences.iter().map(|d| format!("\n  {d}")).collect::<String>()
    )]
    DifferentMeasure {
        /// All that differs.
        differences: Vec<Difference>,
    },
    /// Two reports that are compared are not about the same problems in the same order.
    #[error("the reports differ at problem {index}: {before} before, {after} after")]
    DifferentProblems {
        /// First position that differs, from 0.
        index: usize,
        /// The first report's problem there, or that it has none.
        before: String,
        /// The second report's.
        after: String,
    },
}

/// Refuses N that nothing can be evaluated at.
pub fn check_ns(ns: &[usize]) -> Result<(), EvalError> {
    match ns.is_empty() || ns.contains(&0) {
        true => Err(EvalError::NoN),
        false => Ok(()),
    }
}

/// Evaluates every problem at every N of `ns`. `seed` drives the bootstrap of the intervals and, where weighted majorities
/// have no closed form, the subsets that they are taken over; no other estimate involves randomness.
pub fn evaluate(problems: &[Problem], ns: &[usize], seed: u64) -> Result<Report, EvalError> {
    check_ns(ns)?;
    let numbered = (0..).zip(problems);
    let reports = numbered.map(|(number, problem)| evaluate_problem(problem, number, ns, seed));
    Report::new(ns.to_vec(), seed, reports.collect::<Result<_, _>>()?)
}

/// Evaluates one problem, which is the one of this number.
pub fn evaluate_problem(
    problem: &Problem,
    number: u64,
    ns: &[usize],
    seed: u64,
) -> Result<ProblemReport, EvalError> {
    let (m, samples) = (problem.samples.len(), &problem.samples);
    let name = || problem.id.clone();
    if let Some(&n) = ns.iter().find(|&&n| n > m) {
        return Err(EvalError::PoolTooSmall { problem: name(), n, m });
    }
    if let Some((sample, s)) = samples.iter().enumerate().find(|(_, s)| !s.score.is_finite()) {
        return Err(EvalError::NonFiniteScore { problem: name(), sample, value: s.score });
    }
    let correct = samples.iter().filter(|s| s.correct).count();
    let (answers, unanswered) = answer_counts(samples);
    let share = |count: usize| count as f64 / m as f64;
    Ok(ProblemReport {
        id: name(),
        samples: m,
        figures: Figures {
            pass_at_n: ns.iter().map(|&n| pass_at_n(m, correct, n)).collect(),
            best_of_n: ns.iter().map(|&n| best_of_n(samples, n)).collect(),
            majority_at_n: ns.iter().map(|&n| majority_at_n(&answers, unanswered, n)).collect(),
            weighted_majority_at_n: ns
                .iter()
                .map(|&n| weighted_majority_at_n(samples, n, seed, number))
                .collect(),
            answer_entropy: entropy(&answers),
            distinct_answers: answers.len() as f64,
            unanswered: share(unanswered),
            response_length: Some(share(samples.iter().map(|s| s.tokens).sum())),
            truncated: Some(share(samples.iter().filter(|s| s.truncated).count())),
        },
    })
}
