//! The one place that compares floats. A tolerance is derived, never tuned: count of roundings * eps * the size of what
//! was rounded.

/// Distance from 1 to the next f32: two units of roundoff.
pub(crate) const EPS: f64 = f32::EPSILON as f64;

/// Asserts |got - want| <= bound(i) everywhere.
#[track_caller]
pub(crate) fn assert_within(what: &str, got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let off = (f64::from(got) - want).abs();
        let bound = bound(i);
        assert!(off <= bound, "{what}[{i}]: got {got:e}, want {want:e}, off by {off:e}, allowed {bound:e}");
    }
}

/// d f / d x\[i\] of a scalar function by a central difference of fourth order; with f64 and smooth functions of inputs
/// around 1, good to about 1e-10 of f's size.
pub(crate) fn derivative(f: &dyn Fn(&[f64]) -> f64, x: &[f64], i: usize) -> f64 {
    const H: f64 = 1e-3;
    let at = |step: f64| {
        let mut moved = x.to_vec();
        moved[i] += step * H;
        f(&moved)
    };
    (8.0 * (at(1.0) - at(-1.0)) - (at(2.0) - at(-2.0))) / (12.0 * H)
}

/// Error of [`derivative`] relative to the size of what it differentiates.
pub(crate) const DERIVATIVE_ERROR: f64 = 1e-9;

/// How wrong f32 may be on a model where Transformers in bf16 is wrong by `bf16_error` (in the same unit): a model
/// amplifies rounding by the same factor in both, and f32 rounds 2^16 times finer. 8 is for what rounds in f32 alone:
/// the partial sums of dot products of up to 64 terms.
pub(crate) fn f32_error(bf16_error: f64) -> f64 {
    8.0 * bf16_error / 65_536.0
}

/// Root of the mean square.
pub(crate) fn rms(x: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = x.len() as f64;
    (x.map(|x| x * x).sum::<f64>() / n).sqrt()
}

/// |got - want| / |want| in the Euclidean norm.
pub(crate) fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    rms(got.iter().zip(want).map(|(&got, want)| f64::from(got) - want)) / rms(want.iter().copied())
}

/// How close a kernel must come to the exact result.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Rule {
    /// The same numbers.
    Exact,
    /// A forward pass: at most twice as wrong as the naive bf16 implementation.
    Forward,
    /// A backward pass: at most three times.
    Backward,
}

impl Rule {
    /// So many times as wrong as the naive bf16 implementation.
    pub(crate) fn factor(self) -> f64 {
        match self {
            Rule::Exact => 0.0,
            Rule::Forward => 2.0,
            Rule::Backward => 3.0,
        }
    }
}

/// Half a unit in the last place of a bf16, relative to a number just below a power of two; relative to one just above, it
/// is twice that, the most that rounding takes off.
pub(crate) const BF16_ROUNDOFF: f64 = 1.0 / 256.0 / 2.0;

/// Holds `got` to a rule, in the mean square and at the worst element. `naive` is what bf16 gives where every op stores
/// its result. The floor is for outputs on which the naive implementation happens to be better than a rounding of
/// bf16 allows one to ask for: half a unit in the last place of the root of the mean square, and of the largest.
#[track_caller]
pub(crate) fn assert_rule(what: &str, rule: Rule, got: &[f32], exact: &[f32], naive: &[f32]) {
    assert_eq!(got.len(), exact.len(), "{what}: length");
    if rule == Rule::Exact {
        for (i, (got, want)) in got.iter().zip(exact).enumerate() {
            assert!(got == want, "{what}[{i}]: got {got:e}, want {want:e}");
        }
        return;
    }
    for (i, (got, want)) in got.iter().zip(exact).enumerate() {
        let same = got == want || (got.is_finite() && want.is_finite());
        assert!(same, "{what}[{i}]: got {got:e}, want {want:e}");
    }
    let finite: Vec<usize> = (0..exact.len()).filter(|&i| exact[i].is_finite()).collect();
    if finite.is_empty() {
        return;
    }
    let off = |x: &[f32], i: usize| f64::from(x[i]) - f64::from(exact[i]);
    let mean = |x: &[f32]| rms(finite.iter().map(|&i| off(x, i)));
    let worst = |x: &[f32]| finite.iter().map(|&i| off(x, i).abs()).fold(0.0, f64::max);
    let size = rms(finite.iter().map(|&i| f64::from(exact[i])));
    let largest = finite.iter().map(|&i| f64::from(exact[i]).abs()).fold(0.0, f64::max);
    for (which, got, naive, size) in
        [("rms", mean(got), mean(naive), size), ("largest", worst(got), worst(naive), largest)]
    {
        let allowed = rule.factor() * naive + BF16_ROUNDOFF * size;
        assert!(
            got <= allowed,
            "{what}: {which} error {got:e}, allowed {allowed:e} (naive bf16 {naive:e}, size {size:e})"
        );
    }
}
