//! How pass@N grows with N, in the paper's form: pass@N ~ exp(a N^b) with a < 0 (arXiv 2412.15287, where a and b depend
//! on the temperature). Then log(-log pass@N) = log(-a) + b log N, a line in log N, and b < 0.
//!
//! The line is fitted by weighted least squares, because plain ones would let the noisiest points decide: near pass@N = 1
//! log(-log pass@N) falls without bound, and its error grows as 1/(1 - pass@N). The weights p log^2 p / (1 - p) are the
//! inverse variances of log(-log p), to first order, were p a share of independent trials, the same number at every N.
//! They are not those of the pool's estimates, which share their samples from one N to the next, but depend on nothing
//! else than p, and fall to 0 at both ends.

use serde::{Deserialize, Serialize};

use super::interval::Estimate;

/// pass@N ~ exp(a N^b), fitted to the means over problems.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScalingFit {
    /// a: the log of pass@1.
    pub a: Estimate,
    /// b: how fast the log shrinks.
    pub b: Estimate,
    /// What the fit is made of, and how far off it is.
    pub points: Vec<FitPoint>,
}

/// A point of a [`ScalingFit`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FitPoint {
    /// N.
    pub n: usize,
    /// log(-log pass@N) less what the fit has there.
    pub residual: f64,
    /// pass@N of the fit.
    pub fitted: f64,
}

/// a and b for pass rates `pass` at `ns`. Pass rates of 0 and 1 have no place on the line and are left out; `None` if
/// fewer than three are left, since there is a line through any two.
pub fn fit(ns: &[usize], pass: &[f64]) -> Option<(f64, f64)> {
    let points: Vec<(f64, f64, f64)> = usable(ns, pass)
        .map(|(n, p)| {
            let log = p.ln();
            ((n as f64).ln(), (-log).ln(), p * log * log / (1.0 - p))
        })
        .collect();
    if points.len() < 3 {
        return None;
    }
    let weight: f64 = points.iter().map(|(_, _, w)| w).sum();
    let mean = |value: fn(&(f64, f64, f64)) -> f64| {
        points.iter().map(|point| point.2 * value(point)).sum::<f64>() / weight
    };
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let (mut xx, mut xy) = (0.0, 0.0);
    for (px, py, w) in &points {
        xx += w * (px - x) * (px - x);
        xy += w * (px - x) * (py - y);
    }
    let b = xy / xx;
    let a = -(y - b * x).exp();
    (a.is_finite() && b.is_finite()).then_some((a, b))
}

/// exp(a N^b).
pub fn predicted((a, b): (f64, f64), n: usize) -> f64 {
    (a * (n as f64).powf(b)).exp()
}

/// The points of a fit.
pub(super) fn points(fit: (f64, f64), ns: &[usize], pass: &[f64]) -> Vec<FitPoint> {
    let point = |(n, p): (usize, f64)| {
        let line = (-fit.0).ln() + fit.1 * (n as f64).ln();
        FitPoint { n, residual: (-p.ln()).ln() - line, fitted: predicted(fit, n) }
    };
    usable(ns, pass).map(point).collect()
}

/// Pass rates that have a place on the line. What is 1 but for rounding is 1.
fn usable<'a>(ns: &'a [usize], pass: &'a [f64]) -> impl Iterator<Item = (usize, f64)> + 'a {
    let inside = |(_, p): &(usize, f64)| *p > 1e-12 && *p < 1.0 - 1e-12;
    ns.iter().copied().zip(pass.iter().copied()).filter(inside)
}
