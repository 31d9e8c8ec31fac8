//! `bon-rl`, `bon-rl-v`, `bon-rl-s`, `pass-at-n`: the expected reward of Best-of-N,
//! J = E[R(best of N samples by r)], for any selector r and any reward R.
//!
//! **Exact.** The estimate of J from the group is a mean over its N-subsets S. Subtracting from each S the value of
//! S without j, which y_j cannot influence, leaves j's marginal contribution, and an unbiased gradient:
//!
//! ```text
//! c_j = sum_{S: j in S} [R(best of S) - R(best of S \ j)] / C(M, N)
//!     = [C(M - k_j, N-1) R_j - sum_{k_i > k_j} C(M - k_i, N-2) R_i] / C(M, N)       k = rank by r, 1 is best
//! ```
//!
//! The binomials telescope. Going up the ranks, with w_k = C(M-k, N-1) / C(M, N) and R_(k) the reward at rank k,
//!
//! ```text
//! c_(M) = 0,      c_(k) = c_(k+1) + w_k (R_(k) - R_(k+1))
//! ```
//!
//! which cancels nothing when r and R agree and shows that a constant added to R changes nothing. Averaging over the
//! orders of a tie of m samples at ranks a..b, of mean reward R_T and mean weight w_T, gives
//!
//! ```text
//! c_j = E_T + (R_j - R_T) [w_b + (w_T - w_b) m / (m-1)],      E_T = E_below + w_b (R_T - R_below)
//! ```
//!
//! For r = R this is the recommended estimator of pass@k policy optimization, see `pkpo`. For N = 1 there
//! is no S \ j, and the baseline is RLOO's.
//!
//! **Variational** (the paper's). Score function of pi_bon(y) ~ pi(y) exp(lambda_N Q(y)), with the leave-one-out
//! Best-of-N value b_j for a baseline and v, q as in `bon-sft`:
//!
//! ```text
//! sum_j w_j (R_j - b_j) grad log pi_bon(y_j)
//! c_j = y_j + lambda sum_{i != j} y_i q_ij,      y_i = A_i - v_i sum_l A_l,      A_j = w_j (R_j - b_j)
//! ```

use super::rl;
use super::shared::{Ranking, equal, lambda_n, mean, rank_weights, tilt_gradient};
use super::{Estimator, Expert, Objective, ObjectiveConfig, ObjectiveError, ScoredGroup, Signal, Weighed};

/// `bon-rl-v`: the verifier selects and rewards.
pub const BON_RL_V: Objective = Objective {
    coefficient: "its marginal contribution to the best of N, the verifier selecting and rewarding",
    when: "the verifier's score is what you want",
    needs_n: true,
    needs_samples: true,
    expert: Expert::Unused,
    binary: false,
    required: &[],
    optional: &["estimator"],
    compute: |config, group| coefficients(config, group, Signal::Verifier, Signal::Verifier),
};

/// `bon-rl-s`: the environment selects and rewards.
pub const BON_RL_S: Objective = Objective {
    coefficient: "the same, the environment selecting and rewarding",
    when: "upper bound: a perfect verifier at deployment",
    compute: |config, group| coefficients(config, group, Signal::Environment, Signal::Environment),
    ..BON_RL_V
};

/// `bon-rl`: `selector` selects, `reward` rewards.
pub const BON_RL: Objective = Objective {
    coefficient: "the same, `selector` and `reward` set one by one",
    when: "`selector = \"verifier\"`, `reward = \"environment\"` is deployed Best-of-N itself",
    required: &["selector", "reward"],
    compute: |config, group| {
        let selector = config.required("selector", config.selector)?;
        coefficients(config, group, selector, config.required("reward", config.reward)?)
    },
    ..BON_RL_V
};

/// `pass-at-n`: `bon-rl-s` with the exact estimator.
pub const PASS_AT_N: Objective = Objective {
    coefficient: "`bon-rl-s` with the exact estimator",
    when: "pass@N by its plain name",
    optional: &[],
    ..BON_RL_S
};

fn coefficients(
    config: &ObjectiveConfig,
    group: &ScoredGroup,
    selector: Signal,
    earned: Signal,
) -> Result<Weighed, ObjectiveError> {
    let (n, reward) = (config.required("n", config.n)?, group.signal(earned));
    let samples = match config.estimator.unwrap_or_default() {
        Estimator::Exact => marginal_contributions(n, group.signal(selector), reward),
        // Exactly 0, because rounding would make noise of it.
        Estimator::Variational if equal(reward) => vec![0.0; reward.len()],
        Estimator::Variational => variational(n, group.signal(selector), reward),
    };
    Ok(Weighed { earned, ..samples.into() })
}

/// c_j by marginal contribution: unbiased for grad J. Needs `1 <= n <= M`.
pub(super) fn marginal_contributions(n: usize, selector: &[f64], reward: &[f64]) -> Vec<f64> {
    // Exactly 0, because rounding would make noise of it.
    if equal(reward) {
        return vec![0.0; reward.len()];
    }
    if n == 1 {
        return rl::coefficients(reward);
    }
    let ranking = Ranking::new(selector);
    let weights = rank_weights(selector.len(), n);
    let mut c = vec![0.0; selector.len()];
    let mut below: Option<(f64, f64)> = None;
    for tie in ranking.ties().rev() {
        let samples = ranking.samples(&tie);
        let size = samples.len() as f64;
        let reward_t = mean(samples.iter().map(|&j| reward[j]));
        let last = weights[tie.end - 1];
        let e = below.map_or(0.0, |(e, reward_below)| e + last * (reward_t - reward_below));
        let slope = if samples.len() > 1 {
            last + (mean(weights[tie].iter().copied()) - last) * size / (size - 1.0)
        } else {
            0.0
        };
        for &j in samples {
            c[j] = e + slope * (reward[j] - reward_t);
        }
        below = Some((e, reward_t));
    }
    c
}

/// c_j by the score function of the variational Best-of-N policy.
fn variational(n: usize, selector: &[f64], reward: &[f64]) -> Vec<f64> {
    let lambda = lambda_n(n);
    let ranking = Ranking::new(selector);
    let baselines = ranking.leave_one_out_best_of_n(reward, n);
    let advantages: Vec<f64> = ranking
        .selection_weights(n)
        .iter()
        .zip(reward.iter().zip(&baselines))
        .map(|(w, (r, b))| w * (r - b))
        .collect();
    let total: f64 = advantages.iter().sum();
    let y: Vec<f64> = advantages.iter().zip(ranking.tilt(lambda)).map(|(a, v)| a - v * total).collect();
    tilt_gradient(lambda, &ranking, &y)
}
