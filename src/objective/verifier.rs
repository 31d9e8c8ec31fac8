//! `verifier`: trains a reward model, whose scores r can then select among responses. Its coefficients are not on the
//! log-probs of responses but on their logits s_j, r_j = sigma(s_j) = 1 / (1 + e^-s_j): the gradient to ascend is
//! `sum_j c_j grad s_j`, where c_j = -dL/ds_j. The labels y_j are what was found of the responses, such as an environment's
//! rewards.
//!
//! ```text
//! loss = "bernoulli"   L = - mean_j [ y_j log sigma(s_j) + (1 - y_j) log sigma(-s_j) ],          y_j in [0, 1]
//!                      c_j = (y_j - sigma(s_j)) / M
//! loss = "pairwise"    L = - mean over the P pairs with y_i > y_j of log sigma(s_i - s_j)
//!                      c_k = 1/P [ sum_{j: y_k > y_j} sigma(s_j - s_k) - sum_{i: y_i > y_k} sigma(s_k - s_i) ]
//! ```
//!
//! The first is the likelihood of labels of which y_j is the probability, so that r_j comes to be that probability (the
//! verifier of Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168). The second is Bradley
//! and Terry's model of comparisons (Ouyang et al. 2022, arXiv 2203.02155): it learns which of a prompt's responses is
//! better, all that a selector needs, and nothing of whether any is good, since what all scores of a group have in common
//! cancels. A group whose labels are all equal has no pairs and teaches it nothing.

use serde::{Deserialize, Serialize};

use super::{Expert, Objective, ObjectiveConfig, ObjectiveError, ScoredGroup};

/// `verifier`.
pub const VERIFIER: Objective = Objective {
    coefficient: "on its logit, not on its log-prob: its label minus the verifier's probability, or what comparisons ask for",
    when: "to train the verifier itself, on scored responses",
    needs_n: false,
    needs_samples: false,
    expert: Expert::Unused,
    binary: false,
    required: &[],
    optional: &["loss"],
    compute: |config, group| Ok(coefficients(config, group)?.into()),
};

/// What a verifier's logits are compared with labels by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Loss {
    /// Binary cross-entropy; labels may be fractions.
    #[default]
    Bernoulli,
    /// Of every two responses to a prompt the one with the higher label.
    Pairwise,
}

/// sigma(x) = 1 / (1 + e^-x).
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// -log sigma(x), without a difference of large numbers.
fn surprise(x: f64) -> f64 {
    (-x).max(0.0) + (-x.abs()).exp().ln_1p()
}

/// Pairs (i, j) with y_i > y_j.
fn pairs(labels: &[f64]) -> impl Iterator<Item = (usize, usize)> {
    let below =
        move |i: usize| (0..labels.len()).filter(move |&j| labels[i] > labels[j]).map(move |j| (i, j));
    (0..labels.len()).flat_map(below)
}

/// Refuses what is no probability.
fn check(loss: Loss, labels: &[f64]) -> Result<(), ObjectiveError> {
    let bad = labels.iter().position(|y| !(0.0..=1.0).contains(y)).filter(|_| loss == Loss::Bernoulli);
    bad.map_or(Ok(()), |index| Err(ObjectiveError::Label { index, value: labels[index] }))
}

/// L of a group: `scores` are logits, `rewards` labels. 0 where there is nothing to compare.
pub fn loss(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<f64, ObjectiveError> {
    let (loss, ScoredGroup { scores: s, rewards: y, .. }) = (config.loss.unwrap_or_default(), group);
    check(loss, y)?;
    let terms: Vec<f64> = match loss {
        Loss::Bernoulli => {
            let term = |(&s, &y): (&f64, &f64)| y * surprise(s) + (1.0 - y) * surprise(-s);
            s.iter().zip(y).map(term).collect()
        }
        Loss::Pairwise => pairs(y).map(|(i, j)| surprise(s[i] - s[j])).collect(),
    };
    Ok(terms.iter().sum::<f64>() / terms.len().max(1) as f64)
}

/// c_j of every response.
fn coefficients(config: &ObjectiveConfig, group: &ScoredGroup) -> Result<Vec<f64>, ObjectiveError> {
    let (loss, ScoredGroup { scores: s, rewards: y, .. }) = (config.loss.unwrap_or_default(), group);
    check(loss, y)?;
    Ok(match loss {
        Loss::Bernoulli => {
            let count = s.len() as f64;
            s.iter().zip(y).map(|(&s, &y)| (y - sigmoid(s)) / count).collect()
        }
        Loss::Pairwise => {
            let mut c = vec![0.0; s.len()];
            let count = pairs(y).count().max(1) as f64;
            for (i, j) in pairs(y) {
                let push = sigmoid(s[j] - s[i]) / count;
                c[i] += push;
                c[j] -= push;
            }
            c
        }
    })
}
