//! `bon-sft`: maximum likelihood of the expert response y* under the variational Best-of-N policy
//! pi_bon(y) = pi(y) exp(lambda_N Q(y)) / Z, with Q the win rate.
//!
//! ```text
//! grad log pi_bon(y*) = grad log pi(y*) + lambda grad Q(y*) - E_{y~pi_bon}[grad log pi(y) + lambda grad Q(y)]
//!
//! c*  = 1
//! c_j = (lambda / M) 1{r* >= r_j} - v_j - lambda sum_{i != j} v_i q_ij
//! v_i = exp(lambda Q_i) / sum exp(lambda Q),    q_ij = 1{r_i >= r_j} / (M - 1)
//! ```
//!
//! grad Q(y) = E_{y'}[1{r(y) >= r(y')} grad log pi(y')] is estimated by the whole group for y*, which is not in it,
//! and by the other samples for y_i. With Q and Z of the population in v the estimate is unbiased; normalising v
//! over the group, as `bon-sft` does, costs a bias of order 1/M.

use super::shared::{Ranking, lambda_n, tilt_gradient};
use super::{Expert, Objective, ObjectiveConfig, ObjectiveError, ScoredGroup, Weighed};

/// `bon-sft`.
pub const BON_SFT: Objective = Objective {
    coefficient: "1 for the expert response; samples are pushed down as Best-of-N would favour them, and up as the \
                  expert beats them",
    when: "experts to imitate, and Best-of-N at deployment",
    needs_n: true,
    needs_samples: true,
    expert: Expert::Scored,
    binary: false,
    required: &[],
    optional: &[],
    compute: coefficients,
};

/// Coefficients of the samples and of the expert, with v from the group's own win rates.
fn coefficients(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<Weighed, ObjectiveError> {
    let expert_score = group.expert_score.ok_or(ObjectiveError::MissingExpertScore { kind: config.kind })?;
    let lambda = lambda_n(config.required("n", config.n)?);
    let ranking = Ranking::new(&group.scores);
    let v = ranking.tilt(lambda);
    let samples = sample_coefficients(lambda, &ranking, expert_score, &v);
    Ok(Weighed { expert: Some(1.0), ..samples.into() })
}

/// c_j of every sample under the tilt `lambda`, given the weights v_i (length M) of the Best-of-N policy.
pub fn sample_coefficients(lambda: f64, ranking: &Ranking<'_>, expert_score: f64, v: &[f64]) -> Vec<f64> {
    let scores = ranking.scores();
    let win = lambda / scores.len() as f64;
    let minus_v: Vec<f64> = v.iter().map(|v| -v).collect();
    let mut c = tilt_gradient(lambda, ranking, &minus_v);
    for (c, &score) in c.iter_mut().zip(scores) {
        if expert_score >= score {
            *c += win;
        }
    }
    c
}
