//! `pkpo`: the estimators of Pass-at-k Policy Optimization (Walder & Karkhanis 2025, arXiv 2505.15201) for
//! max@N = E[max of N rewards], which is pass@N for binary R. The sums run over the N-subsets I of the group that hold j.
//!
//! ```text
//! s_j           = sum_I max_I R / C(M, N)                              none                      (eq. 19, 27)
//! s_j^(loo)     = s_j - N/(M-1) best_N(all but j)                      leave-one-out             (eq. 29)
//! s_j^(loo-1)   = sum_I [max_I R - max_{I \ j} R] / C(M, N)            leave-one-out-minus-one   (eq. 33)
//! ```
//!
//! `baseline` chooses; each is unbiased for grad max@N and c_j itself, with no further 1/M. best_N is the mean of max@N
//! over the subsets of a set: the paper's b_j^(k) = sum_{i != j} S(i, k, all but j) counts each subset's maximum k times.
//! The third is its recommendation, and the default. For N = 1 there is no I \ j, and that one is `rl`, as in its
//! experiments.
//!
//! With k the rank by R, 1 best, and w_k = C(M-k, N-1) / C(M, N) the chance that rank k is a subset's best,
//!
//! ```text
//! s_(k) = w_k R_(k) + sum_{l<k} u_l R_(l),      u_l = C(M-l-1, N-2) / C(M, N) = w_l (N-1)/(M-l)
//! ```
//!
//! because a better sample l is the maximum of those subsets that hold both and none above l. A tie of samples shares one
//! value, the one at its best rank. One sort and one running sum: O(M log M), no binomial is formed.
//!
//! The third is the marginal contribution that `bon-rl` computes exactly, with the reward for a selector: `pkpo` with its
//! default is `bon-rl-s`, coefficient for coefficient. What `bon-rl` adds is a selector that is not the reward. The first
//! two give equal rewards coefficients other than 0, whose expected gradient is 0: noise that the third has not.

use serde::{Deserialize, Serialize};

use super::shared::{Ranking, rank_weights};
use super::{Expert, Objective, ObjectiveConfig, ObjectiveError, ScoredGroup, Weighed, bon_rl};

/// `pkpo`.
pub const PKPO: Objective = Objective {
    coefficient: "what it adds to the best reward among N (PKPO's leave-one-out-minus-one)",
    when: "max@N of rewards of any range; `bon-rl-s` by its other name",
    needs_n: true,
    needs_samples: true,
    expert: Expert::Unused,
    binary: false,
    required: &[],
    optional: &["baseline"],
    compute: coefficients,
};

/// What `pkpo` subtracts from a sample's share in the subsets' maxima.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Baseline {
    /// Nothing.
    None,
    /// The mean of the same over the other samples, from subsets without this one: there must be some, so N < M.
    LeaveOneOut,
    /// The maximum of each subset without this sample.
    #[default]
    LeaveOneOutMinusOne,
}

/// c_j of every sample.
fn coefficients(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<Weighed, ObjectiveError> {
    let (n, rewards) = (config.required("n", config.n)?, &group.rewards);
    Ok(match config.baseline.unwrap_or_default() {
        Baseline::None => shares(n, rewards),
        Baseline::LeaveOneOut => {
            let share = n as f64 / (rewards.len() - 1) as f64;
            let others = Ranking::new(rewards).leave_one_out_best_of_n(rewards, n);
            shares(n, rewards).iter().zip(others).map(|(s, best)| s - share * best).collect()
        }
        Baseline::LeaveOneOutMinusOne => bon_rl::marginal_contributions(n, rewards, rewards),
    }
    .into())
}

/// s_j of every sample. Needs `1 <= n <= M`.
fn shares(n: usize, rewards: &[f64]) -> Vec<f64> {
    let m = rewards.len();
    let ranking = Ranking::new(rewards);
    let weights = rank_weights(m, n);
    let mut s = vec![0.0; m];
    let mut above = 0.0;
    for tie in ranking.ties() {
        let samples = ranking.samples(&tie);
        let reward = rewards[samples[0]];
        samples.iter().for_each(|&j| s[j] = weights[tie.start] * reward + above);
        // Of the last rank there is nothing below to share a subset with.
        let shared = tie.filter(|&l| l + 1 < m).map(|l| weights[l] * (n - 1) as f64 / (m - l - 1) as f64);
        above += shared.sum::<f64>() * reward;
    }
    s
}
