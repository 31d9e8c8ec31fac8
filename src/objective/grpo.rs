//! `grpo`: the group-relative advantage of Group Relative Policy Optimization (Shao et al. 2024, "DeepSeekMath",
//! arXiv 2402.03300, outcome supervision).
//!
//! ```text
//! c_j = A_j / M,      A_j = (R_j - mean R) / std R          std with M - 1 in the denominator
//! ```
//!
//! With `std_normalization = false` A_j = R_j - mean R, as in Dr. GRPO (Liu et al. 2025, arXiv 2503.20783): then
//! c_j is (M-1)/M times the coefficient of `rl`, and the expected gradient (M-1)/M times that of the expected reward.
//! The standard deviation makes it the gradient of something else; for binary R with pass rate p it is
//!
//! ```text
//! w(p) grad p,      w(p) = sqrt(M (M-1)) / (M^2 p (1-p)) E[sqrt(K (M-K))],   K ~ Binomial(M, p)
//! ```
//!
//! which tends to grad p / sqrt(p (1-p)) as M grows: pass@1, with more weight on prompts that nearly always pass or
//! nearly always fail. `bon-rl` weighs a sample by what it adds to the best of N instead; for N = 1 it is `rl`.
//!
//! What else GRPO's loss has is the trainer's, for every objective: the clipped surrogate (`train.updates_per_batch`,
//! `train.clip_epsilon`), the KL term (`train.kl_coefficient`, the same k3 estimator), and the division by a response's
//! own length (`train.length_normalizer = "per-sequence"`; Dr. GRPO's constant is `"constant"`).
//!
//! The standard deviation has no small constant added to it, as the paper's has none: a group of equal rewards, and a
//! group of one, teaches nothing.

use super::shared::{equal, mean};
use super::{Expert, Objective};

/// `grpo`.
pub const GRPO: Objective = Objective {
    coefficient: "reward minus the group's mean, over the group's standard deviation",
    when: "the usual baseline of RL with verifiable rewards",
    needs_n: false,
    needs_samples: true,
    expert: Expert::Unused,
    binary: false,
    required: &[],
    optional: &["std_normalization"],
    compute: |config, group| Ok(coefficients(&group.rewards, config.std_normalization.unwrap_or(true)).into()),
};

/// c_j of every sample.
fn coefficients(rewards: &[f64], std_normalization: bool) -> Vec<f64> {
    // Exactly 0, because rounding would make noise of it.
    if rewards.len() < 2 || equal(rewards) {
        return vec![0.0; rewards.len()];
    }
    let (m, mean) = (rewards.len() as f64, mean(rewards.iter().copied()));
    let above = rewards.iter().map(|x| x - mean);
    if !std_normalization {
        return above.map(|a| a / m).collect();
    }
    // In units of the largest, because squares of small and of large rewards leave the range of f64.
    let unit = above.clone().fold(0.0, |most: f64, a| most.max(a.abs()));
    let std = (above.clone().map(|a| (a / unit).powi(2)).sum::<f64>() / (m - 1.0)).sqrt();
    above.map(|a| a / unit / std / m).collect()
}
