//! How far scores tell right from wrong responses, and whether they are the probabilities of that.

use serde::{Deserialize, Serialize};

use super::Problem;
use super::interval::bootstrap;

/// Bins of equal width between 0 and 1.
const BINS: usize = 10;
/// Standard deviations to either side of a normal distribution's mean that hold 95 % of it.
const NORMAL_95: f64 = 1.959_964;

/// What scores r say of correctness, over all samples of all problems unless said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Samples.
    pub samples: usize,
    /// Share of right ones.
    pub base_rate: f64,
    /// Mean of r.
    pub mean_score: f64,
    /// The area under the ROC curve: the chance that a right response scores above a wrong one, of any problem; ties count
    /// half. `None` where all are right or all wrong.
    pub auc: Option<f64>,
    /// The same of two responses to one problem, which is what selection needs: the mean over problems that have both.
    pub pair_accuracy: Option<f64>,
    /// 95 % intervals of these two over problems, if they were asked for; reports of earlier versions have none.
    #[serde(default)]
    pub intervals: RankIntervals,
    /// What is said of r as a probability; `None` where some r is none.
    pub probabilities: Option<Probabilities>,
}

/// 95 % confidence intervals, over problems, of how well scores rank; `None` where there is no such figure, or for a single problem.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct RankIntervals {
    /// Of [`Calibration::auc`]: two standard errors to either side, as Obuchowski (1997) estimates them where samples come in
    /// clusters, here problems.
    pub auc: Option<[f64; 2]>,
    /// Of [`Calibration::pair_accuracy`], by the bootstrap.
    pub pair_accuracy: Option<[f64; 2]>,
}

/// How true probabilities are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Probabilities {
    /// Share of samples that are right exactly if r is at least 1/2.
    pub accuracy: f64,
    /// Mean of (r - correct)^2.
    pub brier: f64,
    /// Expected calibration error: the mean over samples of the distance between their bin's mean r and share of right ones
    /// (Naeini et al. 2015).
    pub ece: f64,
    /// The reliability diagram: bins that are not empty, ascending.
    pub bins: Vec<Bin>,
}

/// Samples whose r is from `low` to `high`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the line above")]
pub struct Bin {
    pub low: f64,
    pub high: f64,
    /// How many.
    pub samples: usize,
    /// Mean of their r.
    pub mean_score: f64,
    /// Share of right ones.
    pub right: f64,
}

/// The scores of a problem's samples, and whether these are right.
fn of(problem: &Problem) -> Vec<(f64, bool)> {
    problem.samples.iter().map(|sample| (sample.score, sample.correct)).collect()
}

/// Compares scores with correctness. Scores must be finite, and there must be some.
pub fn calibrate(problems: &[Problem]) -> Calibration {
    let all: Vec<(f64, bool)> = problems.iter().flat_map(of).collect();
    let pairs: Vec<f64> = problems.iter().filter_map(|problem| auc(&mut of(problem))).collect();
    let proper = all.iter().all(|(r, _)| (0.0..=1.0).contains(r));
    Calibration {
        samples: all.len(),
        base_rate: mean(all.iter().map(|&(_, correct)| one(correct))),
        mean_score: mean(all.iter().map(|&(r, _)| r)),
        auc: auc(&mut all.clone()),
        pair_accuracy: (!pairs.is_empty()).then(|| mean(pairs.iter().copied())),
        intervals: RankIntervals::default(),
        probabilities: proper.then(|| probabilities(&all)),
    }
}

/// [`calibrate`] with intervals; `seed` is the bootstrap's.
pub fn calibrate_with_intervals(problems: &[Problem], seed: u64) -> Calibration {
    let found = calibrate(problems);
    let pairs: Vec<Vec<f64>> =
        problems.iter().filter_map(|problem| auc(&mut of(problem))).map(|share| vec![share]).collect();
    let intervals = RankIntervals {
        auc: found.auc.and_then(|auc| auc_interval(problems, auc)),
        pair_accuracy: bootstrap(&pairs, seed).first().and_then(|estimate| estimate.ci95),
    };
    Calibration { intervals, ..found }
}

/// The interval of the area under the curve over all samples. A sample's *placement* is the share of the others' kind on its right
/// side; the variance is that of the sums of placements, less what the mean lets expect, from problem to problem.
fn auc_interval(problems: &[Problem], auc: f64) -> Option<[f64; 2]> {
    let numbered = problems.iter().enumerate();
    let mut all: Vec<(usize, f64, bool)> = numbered
        .flat_map(|(k, problem)| of(problem).into_iter().map(move |(r, right)| (k, r, right)))
        .collect();
    all.sort_by(|a, b| a.1.total_cmp(&b.1));
    let right = all.iter().filter(|(_, _, right)| *right).count() as f64;
    let wrong = all.len() as f64 - right;
    let mut excess = vec![0.0; problems.len()];
    let (mut right_below, mut wrong_below) = (0.0, 0.0);
    for tie in all.chunk_by(|a, b| a.1 == b.1) {
        let right_here = tie.iter().filter(|(_, _, right)| *right).count() as f64;
        let wrong_here = tie.len() as f64 - right_here;
        for &(k, _, is_right) in tie {
            let (placement, of_kind) = match is_right {
                true => ((wrong_below + wrong_here / 2.0) / wrong, right),
                false => ((right - right_below - right_here / 2.0) / right, wrong),
            };
            excess[k] += (placement - auc) / of_kind;
        }
        right_below += right_here;
        wrong_below += wrong_here;
    }
    let clusters = problems.iter().filter(|problem| !problem.samples.is_empty()).count() as f64;
    let variance = clusters / (clusters - 1.0) * excess.iter().map(|x| x * x).sum::<f64>();
    let half = NORMAL_95 * variance.sqrt();
    (clusters > 1.0).then(|| [(auc - half).max(0.0), (auc + half).min(1.0)])
}

fn one(correct: bool) -> f64 {
    f64::from(u8::from(correct))
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len();
    values.sum::<f64>() / count.max(1) as f64
}

/// The chance that a right sample scores above a wrong one, ties counting half (Mann and Whitney's U over its largest value).
fn auc(samples: &mut [(f64, bool)]) -> Option<f64> {
    samples.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut wrong_below, mut won, mut right) = (0.0, 0.0, 0.0);
    for tie in samples.chunk_by(|a, b| a.0 == b.0) {
        let of_tie = tie.iter().filter(|(_, correct)| *correct).count() as f64;
        let wrong = tie.len() as f64 - of_tie;
        won += of_tie * (wrong_below + wrong / 2.0);
        wrong_below += wrong;
        right += of_tie;
    }
    (right > 0.0 && wrong_below > 0.0).then(|| won / (right * wrong_below))
}

fn probabilities(all: &[(f64, bool)]) -> Probabilities {
    let mut binned: Vec<Vec<(f64, bool)>> = vec![Vec::new(); BINS];
    for &sample in all {
        binned[((sample.0 * BINS as f64) as usize).min(BINS - 1)].push(sample);
    }
    let edge = |i: usize| i as f64 / BINS as f64;
    let bin = |(i, samples): (usize, &Vec<(f64, bool)>)| Bin {
        low: edge(i),
        high: edge(i + 1),
        samples: samples.len(),
        mean_score: mean(samples.iter().map(|&(r, _)| r)),
        right: mean(samples.iter().map(|&(_, correct)| one(correct))),
    };
    let bins: Vec<Bin> =
        binned.iter().enumerate().filter(|(_, samples)| !samples.is_empty()).map(bin).collect();
    let off = bins.iter().map(|bin| bin.samples as f64 * (bin.mean_score - bin.right).abs());
    Probabilities {
        accuracy: mean(all.iter().map(|&(r, correct)| one((r >= 0.5) == correct))),
        brier: mean(all.iter().map(|&(r, correct)| (r - one(correct)).powi(2))),
        ece: off.sum::<f64>() / all.len().max(1) as f64,
        bins,
    }
}
