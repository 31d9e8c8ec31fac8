//! Confidence intervals over problems.

use crate::rng::{Domain, Stream};
use serde::{Deserialize, Serialize};

/// Bootstrap resamples: enough that the ends of an interval vary by some 2 % of its width from seed to seed.
pub(super) const RESAMPLES: usize = 10_000;

/// A mean over problems, or a function of such means.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// 95 % confidence interval; `None` for a single problem, which says nothing of others.
    pub ci95: Option<[f64; 2]>,
}

/// Hands the mean of every column of `rows` (one row per problem, all of one length) to `each`, once for every resample
/// of the rows. Which rows a resample takes depends on `seed` and their number alone, so that whatever is resampled of
/// the same problems is resampled alike: figures at all N and temperatures, and of all models. A single row gives none.
pub(super) fn resamples(rows: &[Vec<f64>], seed: u64, mut each: impl FnMut(&[f64])) {
    let count = rows.len();
    if count < 2 {
        return;
    }
    let mut stream = Stream::new(seed, Domain::Bootstrap, 0);
    for _ in 0..RESAMPLES {
        each(&mean_of(rows, (0..count).map(|_| stream.below(count as u64) as usize)));
    }
}

/// The means of the rows with these indices, which are as many as there are rows.
fn mean_of(rows: &[Vec<f64>], indices: impl Iterator<Item = usize>) -> Vec<f64> {
    let mut sums = vec![0.0; rows.first().map_or(0, Vec::len)];
    for i in indices {
        sums.iter_mut().zip(&rows[i]).for_each(|(s, x)| *s += x);
    }
    sums.iter_mut().for_each(|s| *s /= rows.len() as f64);
    sums
}

/// The means of all rows.
pub(super) fn means(rows: &[Vec<f64>]) -> Vec<f64> {
    mean_of(rows, 0..rows.len())
}

/// Mean of every column of `rows`, with the percentile bootstrap over rows.
///
/// Problems differ far more than an estimate within one problem errs, and they are what a reader wants to generalise
/// over, so problems are what is resampled. The percentile interval needs no normality, respects the range of the
/// figure and pairs naturally: an interval of differences is this function on rows of differences. It is slightly
/// narrow for few problems (by about 1/(2K) for K). All columns share the resamples.
pub(super) fn bootstrap(rows: &[Vec<f64>], seed: u64) -> Vec<Estimate> {
    bootstrap_with(rows, seed, |_| Vec::new()).0
}

/// [`bootstrap`], and likewise what `derive` makes of the means. What it makes of a resample is left out where it is not
/// finite; more than one such in twenty and there is no interval.
pub(super) fn bootstrap_with(
    rows: &[Vec<f64>],
    seed: u64,
    derive: impl Fn(&[f64]) -> Vec<f64>,
) -> (Vec<Estimate>, Vec<Estimate>) {
    let with_derived = |means: &[f64]| [means, &derive(means)].concat();
    let means = means(rows);
    let found = with_derived(&means);
    let mut columns: Vec<Vec<f64>> = vec![Vec::new(); found.len()];
    resamples(rows, seed, |means| {
        columns.iter_mut().zip(with_derived(means)).for_each(|(column, x)| column.push(x));
    });
    let estimate = |(mean, mut column): (f64, Vec<f64>)| {
        column.retain(|x| x.is_finite());
        column.sort_by(f64::total_cmp);
        let tail = column.len() / 40; // 2.5 % on either side
        let enough = column.len() * 20 >= RESAMPLES * 19;
        Estimate { mean, ci95: enough.then(|| [column[tail], column[column.len() - 1 - tail]]) }
    };
    let mut all: Vec<Estimate> = found.into_iter().zip(columns).map(estimate).collect();
    let derived = all.split_off(means.len());
    (all, derived)
}
