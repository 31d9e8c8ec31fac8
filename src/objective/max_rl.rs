//! `max-rl`: maximum likelihood of passing, for binary R (Tajwar et al. 2026, "Maximum Likelihood Reinforcement
//! Learning", arXiv 2602.02710). With pass rate p and K of the M samples passing,
//!
//! ```text
//! log p = - sum_{k>=1} (1-p)^k / k          J_T = - sum_{k=1..T} (1-p)^k / k,   grad J_T = (1 - (1-p)^T) / p grad p
//!
//! c_j = R_j / K - 1/M                       0 where K = 0
//!     = (R_j - mean R) / (M mean R)         the mean score of the samples that pass, less the mean score of all
//! ```
//!
//! J_T is the likelihood to order T: J_1 is pass@1 less 1, and grad J_T = sum_{k=1..T} (1/k) grad pass@k. The mean of the
//! passing samples' scores, R_j / K alone (`control_variate = false`), is unbiased for grad J_M. Less the mean score of
//! all samples, a control variate whose expectation is 0, and with both left out where nothing passes, as in the
//! authors' program (github.com/tajwarfahim/maxrl, but for a small constant in its denominator), it is unbiased for
//! grad J_(M-1). Either way the group size sets the order: more samples per prompt come closer to log p.
//!
//! `bon-rl` with the environment as selector and reward maximises the one term pass@N; this is the harmonic mixture of
//! all of them up to the group size, in which prompts that rarely pass weigh up to M times as much as in `rl`.

use super::{Expert, Objective};

/// `max-rl`.
pub const MAX_RL: Objective = Objective {
    coefficient: "reward minus the group's mean, over the group's mean",
    when: "rewards of 0 and 1: the log of the pass rate, to the order of the group size",
    needs_n: false,
    needs_samples: true,
    expert: Expert::Unused,
    binary: true,
    required: &[],
    optional: &["control_variate"],
    compute: |config, group| Ok(coefficients(&group.rewards, config.control_variate.unwrap_or(true)).into()),
};

/// c_j of every sample; rewards are 0 and 1.
fn coefficients(rewards: &[f64], control_variate: bool) -> Vec<f64> {
    let passes = rewards.iter().sum::<f64>();
    if passes == 0.0 {
        return vec![0.0; rewards.len()];
    }
    let all = if control_variate { 1.0 / rewards.len() as f64 } else { 0.0 };
    rewards.iter().map(|reward| reward / passes - all).collect()
}
