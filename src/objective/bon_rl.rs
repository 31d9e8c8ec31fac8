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
//! For binary R and r = R this is the leave-one-out estimator of pass@k policy optimization (PKPO). For N = 1 there
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
use super::shared::{Ranking, lambda_n, mean, rank_weights, tilt_gradient};

/// c_j by marginal contribution: unbiased for grad J.
pub(super) fn exact(n: usize, selector: &[f64], reward: &[f64]) -> Vec<f64> {
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
pub(super) fn variational(n: usize, selector: &[f64], reward: &[f64]) -> Vec<f64> {
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
