//! `bon-rlb` and `bon-rlb-p`: pass@N = 1 - p^N for binary R, in the paper's closed forms. p is the chance to fail.
//!
//! ```text
//! bon-rlb:    c_j = w_j (g+ R_j + s g- (1 - R_j))      g+ = N p^(N-1) / (1 - p^N),   g- = N p / (1 - p)
//! bon-rlb-p:  c_j = w_j gbar+ R_j                      gbar+ = (1 - p) g+
//! ```
//!
//! Both rest on a selector that returns a passing sample whenever there is one and does not favour one passing
//! sample over another (nor, for `bon-rlb`, one failing sample over another). Then `bon-rlb-p` and `bon-rlb` with
//! s = +1 (`unbiased`) have the gradient of 1 - p^N, and s = -1 (`penalize`) has (1+p)/(1-p) times that. For another
//! selector use `bon-rl`.
//!
//! **Which p.** p must come from the group, which the w_j come from too, and the plug-in F/M (F failures among M)
//! ignores that: both terms of `bon-rlb` are then so far off that their sum can point downhill (M = 32, N = 8,
//! p = 0.9, groups without a pass left out: -3.2 times the gradient). Instead powers of p are replaced by their
//! U-statistics, and p in g- by the failures among the *other* samples, F - 1, over M (one imaginary pass keeps it
//! below 1):
//!
//! ```text
//! g+    = N C(F, N-1)/C(M-1, N-1) / (1 - C(F, N)/C(M, N))
//! g-    = N (F - 1) / (M - F + 1)
//! gbar+ = g+ (M - F)/M
//! ```
//!
//! With these, `bon-rlb-p` and unclipped `bon-rlb` with s = +1 are unbiased for grad(1 - p^N) at every M >= N, not
//! only in the limit: a passing and a failing sample that see the same others differ by exactly
//! c+ - c- = C(F', N-1)/C(M, N), F' the failures among those others. p = 1 needs no special case (no sample passes,
//! and g- = N (M-1) is finite), nor p = 0 (both weights are 0 unless N = 1).
//!
//! **Clipping.** g+ and g- are cut at `weight_clip`: unclipped they reach N (M-1), on hard prompts above all. A clip
//! changes the length of a prompt's expected gradient but never turns it (c+ - c- above stays >= 0). The length
//! changes a lot: with s = +1 the default is up to ten times too long on prompts that nearly always fail. Only
//! `weight_clip = inf` is unbiased.

use super::shared::{Ranking, ln_none_of};
use super::{Expert, NegativeSign, Objective, ObjectiveConfig, ObjectiveError, ScoredGroup, Weighed};

/// `bon-rlb`.
pub const BON_RLB: Objective = Objective {
    coefficient: "the paper's weights for passing and failing responses",
    when: "rewards of 0 and 1: pass@N, hard prompts weigh more",
    needs_n: true,
    needs_samples: true,
    expert: Expert::Unused,
    binary: true,
    required: &[],
    optional: &["negative_sign", "weight_clip"],
    compute: |config, group| coefficients(config, group, Some(config.negative_sign.unwrap_or_default())),
};

/// `bon-rlb-p`.
pub const BON_RLB_P: Objective = Objective {
    coefficient: "the same from passing responses alone",
    when: "as above, when failures are noisy",
    optional: &["weight_clip"],
    compute: |config, group| coefficients(config, group, None),
    ..BON_RLB
};

/// `weight_clip` if it is not given: a hard prompt may weigh ten times as much as its selection probability.
pub const DEFAULT_WEIGHT_CLIP: f64 = 10.0;

/// What multiplies w_j.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weights {
    /// g+ (or gbar+), for samples that pass: those with R = 1.
    pub pass: f64,
    /// s g- (or 0), for samples with R = 0.
    pub fail: f64,
}

impl Weights {
    /// The estimates of the head comment for `failures` among `m` samples; `sign: None` is `bon-rlb-p`.
    pub fn estimate(n: usize, m: usize, failures: usize, sign: Option<NegativeSign>) -> Self {
        let passes = (m - failures) as f64;
        let g_pass = if passes > 0.0 {
            let others_fail = ln_none_of(m - 1, m - failures - 1, n - 1).exp();
            let some_passes = -ln_none_of(m, m - failures, n).exp_m1();
            n as f64 * others_fail / some_passes
        } else {
            0.0
        };
        let g_fail = if failures > 0 { n as f64 * (failures as f64 - 1.0) / (passes + 1.0) } else { 0.0 };
        match sign {
            None => Self { pass: g_pass * passes / m as f64, fail: 0.0 },
            Some(NegativeSign::Unbiased) => Self { pass: g_pass, fail: g_fail },
            Some(NegativeSign::Penalize) => Self { pass: g_pass, fail: -g_fail },
        }
    }
}

/// c_j of every sample; `sign: None` is `bon-rlb-p`.
fn coefficients(
    config: &ObjectiveConfig,
    group: &ScoredGroup,
    sign: Option<NegativeSign>,
) -> Result<Weighed, ObjectiveError> {
    let (n, clip) = (config.required("n", config.n)?, config.clip());
    let rewards = &group.rewards;
    let failures = rewards.iter().filter(|&&x| x == 0.0).count();
    let raw = Weights::estimate(n, rewards.len(), failures, sign);
    let weights = Weights { pass: raw.pass.min(clip), fail: raw.fail.clamp(-clip, clip) };
    let mut clipped = 0;
    if weights.pass != raw.pass {
        clipped += rewards.len() - failures;
    }
    if weights.fail != raw.fail {
        clipped += failures;
    }
    Ok(Weighed { clipped, ..weigh(n, &group.scores, rewards, weights).into() })
}

/// w_j times the weight of sample j's outcome.
pub fn weigh(n: usize, scores: &[f64], rewards: &[f64], weights: Weights) -> Vec<f64> {
    let mut c = Ranking::new(scores).selection_weights(n);
    for (c, &reward) in c.iter_mut().zip(rewards) {
        *c *= if reward == 0.0 { weights.fail } else { weights.pass };
    }
    c
}
