//! Confidence intervals over problems.

use crate::rng::{Domain, Stream};
use serde::{Deserialize, Serialize};

/// Bootstrap resamples: enough that the ends of an interval vary by some 2 % of its width from seed to seed.
const RESAMPLES: usize = 10_000;

/// A mean over problems.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The mean.
    pub mean: f64,
    /// 95 % confidence interval; `None` for a single problem, which says nothing of others.
    pub ci95: Option<[f64; 2]>,
}

/// Mean of every column of `rows` (one row per problem, all of one length), with the percentile bootstrap over rows.
///
/// Problems differ far more than an estimate within one problem errs, and they are what a reader wants to generalise
/// over, so problems are what is resampled. The percentile interval needs no normality, respects the range of the
/// figure and pairs naturally: an interval of differences is this function on rows of differences. It is slightly
/// narrow for few problems (by about 1/(2K) for K). All columns share the resamples.
pub(super) fn bootstrap(rows: &[Vec<f64>], seed: u64) -> Vec<Estimate> {
    let (count, width) = (rows.len(), rows.first().map_or(0, Vec::len));
    let mean_of = |indices: &mut dyn Iterator<Item = usize>| {
        let mut sums = vec![0.0; width];
        for i in indices {
            sums.iter_mut().zip(&rows[i]).for_each(|(s, x)| *s += x);
        }
        sums.iter_mut().for_each(|s| *s /= count as f64);
        sums
    };
    let means = mean_of(&mut (0..count));
    if count < 2 {
        return means.into_iter().map(|mean| Estimate { mean, ci95: None }).collect();
    }
    let mut stream = Stream::new(seed, Domain::Bootstrap, 0);
    let mut columns = vec![Vec::with_capacity(RESAMPLES); width];
    for _ in 0..RESAMPLES {
        let resample = mean_of(&mut (0..count).map(|_| stream.below(count as u64) as usize));
        columns.iter_mut().zip(resample).for_each(|(column, x)| column.push(x));
    }
    let tail = RESAMPLES / 40; // 2.5 % on either side
    means
        .into_iter()
        .zip(columns)
        .map(|(mean, mut column)| {
            column.sort_by(f64::total_cmp);
            Estimate { mean, ci95: Some([column[tail], column[RESAMPLES - 1 - tail]]) }
        })
        .collect()
}
