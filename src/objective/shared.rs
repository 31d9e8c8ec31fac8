//! What several objectives and the evaluation share: ranks, selection weights, win rates and the Best-of-N tilt.
//!
//! Ties. Best-of-N among equal scores returns any of them. Ranking a tie by the order of the samples would be
//! unbiased, the samples being i.i.d.; averaging over all its orders is unbiased too, has less variance (a verifier
//! of few levels ties all the time), and makes every result independent of the order of the samples.

use std::ops::Range;

/// Mean, as an offset from the first value: equal values have exactly that mean. 0 of nothing.
pub(crate) fn mean(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let Some(first) = values.clone().next() else { return 0.0 };
    let (count, sum) = values.fold((0usize, 0.0), |(n, s), x| (n + 1, s + (x - first)));
    first + sum / count as f64
}

/// Whether there is one value only. A single sample is compared with nothing, so it is no such case.
pub(super) fn equal(values: &[f64]) -> bool {
    values.len() > 1 && values.iter().all(|x| *x == values[0])
}

/// log of C(m - marked, n) / C(m, n): the chance that a uniformly drawn n-subset of m items holds none of the
/// `marked` ones. Accurate also where the chance is near 1; needs `marked <= m` and `n <= m`.
pub fn ln_none_of(m: usize, marked: usize, n: usize) -> f64 {
    if marked + n > m {
        return f64::NEG_INFINITY;
    }
    // The quotient is symmetric in `marked` and `n`: multiply over the smaller.
    let (few, many) = (marked.min(n), marked.max(n) as f64);
    (0..few).map(|i| (-many / (m - i) as f64).ln_1p()).sum()
}

/// w_k = C(m-k, n-1) / C(m, n) for ranks k = 1..=m (index k-1): the chance that rank k is the best of a uniformly
/// drawn n-subset of m. Sums to 1. Needs `1 <= n <= m`. Ratios of neighbours, so nothing overflows.
pub fn rank_weights(m: usize, n: usize) -> Vec<f64> {
    let mut w = n as f64 / m as f64;
    (1..=m)
        .map(|k| {
            let this = w;
            if k < m {
                w *= (m - k + 1).saturating_sub(n) as f64 / (m - k) as f64;
            }
            this
        })
        .collect()
}

/// A group's samples by descending score.
#[derive(Debug, Clone)]
pub struct Ranking<'a> {
    scores: &'a [f64],
    order: Vec<usize>,
    /// One past the last position in `order` of each tie.
    ends: Vec<usize>,
}

impl<'a> Ranking<'a> {
    /// Ranks finite scores.
    pub fn new(scores: &'a [f64]) -> Self {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // Adding 0 makes -0 and 0 the tie that they are.
        order.sort_by(|&a, &b| (scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)));
        let ends = (1..=order.len())
            .filter(|&i| i == order.len() || scores[order[i - 1]] != scores[order[i]])
            .collect();
        Self { scores, order, ends }
    }

    /// The scores that were ranked.
    pub fn scores(&self) -> &'a [f64] {
        self.scores
    }

    /// Runs of equal scores as ranges of rank positions (0 is best), best first.
    pub fn ties(&self) -> impl DoubleEndedIterator<Item = Range<usize>> {
        self.ends.iter().enumerate().map(|(t, &end)| if t == 0 { 0..end } else { self.ends[t - 1]..end })
    }

    /// The samples at a range of rank positions.
    pub fn samples(&self, tie: &Range<usize>) -> &[usize] {
        &self.order[tie.clone()]
    }

    /// w_j of every sample: the chance that Best-of-N over a uniformly drawn n-subset returns it. Sums to 1.
    /// Needs `1 <= n <= M`.
    pub fn selection_weights(&self, n: usize) -> Vec<f64> {
        let by_rank = rank_weights(self.scores.len(), n);
        let mut w = vec![0.0; by_rank.len()];
        for tie in self.ties() {
            let each = mean(by_rank[tie.clone()].iter().copied());
            self.samples(&tie).iter().for_each(|&j| w[j] = each);
        }
        w
    }

    /// sum_j w_j x_j: unbiased estimate of the expected x of the response that Best-of-N returns. Needs
    /// `1 <= n <= M`.
    pub fn best_of_n(&self, values: &[f64], n: usize) -> f64 {
        self.selection_weights(n).iter().zip(values).map(|(w, x)| w * x).sum()
    }

    /// For every sample, the Best-of-N value of the others; of best-of-(M-1) where N = M leaves too few, and 0 for a
    /// group of one. A baseline: it does not depend on the sample.
    pub fn leave_one_out_best_of_n(&self, values: &[f64], n: usize) -> Vec<f64> {
        let m = self.scores.len();
        let mut out = vec![0.0; m];
        if m < 2 {
            return out;
        }
        let w = rank_weights(m - 1, n.min(m - 1));
        let mass = |ranks: Range<usize>| w[ranks].iter().sum::<f64>();
        let mean_of = |tie: &Range<usize>| mean(self.samples(tie).iter().map(|&j| values[j]));
        // Ties above j keep their ranks, those below move up by one.
        let mut below: Vec<f64> = vec![0.0];
        for tie in self.ties().rev() {
            let shifted = tie.start.saturating_sub(1)..tie.end - 1;
            below.push(below[below.len() - 1] + mass(shifted) * mean_of(&tie));
        }
        below.pop();
        let mut above = 0.0;
        for tie in self.ties() {
            let rest = below.pop().unwrap_or(0.0);
            let own = mass(tie.start..tie.end - 1);
            let (mean, others) = (mean_of(&tie), tie.len() as f64 - 1.0);
            for &j in self.samples(&tie) {
                let own_value = if others > 0.0 { own * (mean + (mean - values[j]) / others) } else { 0.0 };
                out[j] = above + own_value + rest;
            }
            if tie.end < m {
                above += mass(tie.clone()) * mean;
            }
        }
        out
    }

    /// Q_i: the share of the other samples that sample i scores at least as high as; 1 in a group of one.
    pub fn win_rates(&self) -> Vec<f64> {
        let m = self.scores.len();
        let mut q = vec![1.0; m];
        if m > 1 {
            for tie in self.ties() {
                let rate = (m - tie.start - 1) as f64 / (m - 1) as f64;
                self.samples(&tie).iter().for_each(|&j| q[j] = rate);
            }
        }
        q
    }

    /// v_i = exp(lambda Q_i) / sum_l exp(lambda Q_l): the Best-of-N policy's weights on the group.
    pub fn tilt(&self, lambda: f64) -> Vec<f64> {
        let q = self.win_rates();
        let max = q.iter().copied().fold(0.0, f64::max);
        let mut v: Vec<f64> = q.iter().map(|q| (lambda * (q - max)).exp()).collect();
        let z: f64 = v.iter().sum();
        v.iter_mut().for_each(|v| *v /= z);
        v
    }
}

/// The coefficients on log pi of `sum_i y_i grad[log pi(y_i) + lambda Q(y_i)]`:
/// c_j = y_j + lambda sum_{i != j} y_i 1{r_i >= r_j} / (M-1).
pub(super) fn tilt_gradient(lambda: f64, ranking: &Ranking<'_>, y: &[f64]) -> Vec<f64> {
    let each = match y.len() {
        0 | 1 => 0.0,
        m => lambda / (m - 1) as f64,
    };
    let mut c = vec![0.0; y.len()];
    let mut at_least = 0.0;
    for tie in ranking.ties() {
        let samples = ranking.samples(&tie);
        at_least += samples.iter().map(|&j| y[j]).sum::<f64>();
        for &j in samples {
            c[j] = y[j] + each * (at_least - y[j]);
        }
    }
    c
}

/// lambda_N: the exponential tilt of a uniform whose KL divergence is Best-of-N's, i.e. the root of
/// ((l-1) e^l + 1)/(e^l - 1) - log((e^l - 1)/l) = log N - (N-1)/N. 0 for N = 1; needs `n >= 1`.
///
/// The left side is increasing and, rearranged, needs no e^l of a large l: log l - 1 + l/(e^l - 1) - log(1 - e^-l).
/// The root lies in (N, N+2) (it tends to N+1), so bisection is safe, and short enough for every N.
pub fn lambda_n(n: usize) -> f64 {
    if n == 1 {
        return 0.0;
    }
    let n = n as f64;
    let target = n.ln() - (n - 1.0) / n;
    let kl = |l: f64| l.ln() - 1.0 + l / l.exp_m1() - (-(-l).exp_m1()).ln();
    let (mut lo, mut hi) = (n, n + 2.0);
    loop {
        let middle = 0.5 * (lo + hi);
        if middle <= lo || middle >= hi {
            return middle;
        }
        if kl(middle) < target {
            lo = middle;
        } else {
            hi = middle;
        }
    }
}
