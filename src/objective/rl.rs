//! `rl`: REINFORCE on E[R(y)] with the leave-one-out baseline (RLOO), the paper's RL baseline.
//!
//! ```text
//! c_j = (R_j - b_j) / M,      b_j = mean of R over the other samples
//!     = (R_j - mean R) / (M - 1)
//! ```
//!
//! A group of one has no others: its baseline is 0 and this is plain REINFORCE.

use super::shared::{equal, mean};
use super::{Expert, Objective};

/// `rl`.
pub const RL: Objective = Objective {
    coefficient: "reward minus the mean of the others (RLOO)",
    when: "the baseline: one response at deployment",
    needs_n: false,
    needs_samples: true,
    expert: Expert::Unused,
    binary: false,
    required: &[],
    optional: &[],
    compute: |_, group| Ok(coefficients(&group.rewards).into()),
};

/// c_j of every sample.
pub(super) fn coefficients(rewards: &[f64]) -> Vec<f64> {
    match rewards {
        [only] => vec![*only],
        // Exactly 0, because rounding would make noise of it.
        _ if equal(rewards) => vec![0.0; rewards.len()],
        _ => {
            let mean = mean(rewards.iter().copied());
            let others = rewards.len() as f64 - 1.0;
            rewards.iter().map(|x| (x - mean) / others).collect()
        }
    }
}
