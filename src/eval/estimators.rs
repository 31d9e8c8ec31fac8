//! Estimators from the pool of one problem. Each equals the mean over all N-subsets of the pool, so it is unbiased
//! for N fresh samples, and each is computed in closed form: no resampling, no noise of its own.

use super::Sample;
use crate::objective::shared::{Ranking, ln_none_of};
use std::collections::BTreeMap;

/// pass@N = 1 - C(M-c, N)/C(M, N) for `correct` = c of `m` = M samples (Chen et al., arXiv 2107.03374). Needs
/// `correct <= m` and `n <= m`.
pub fn pass_at_n(m: usize, correct: usize, n: usize) -> f64 {
    -ln_none_of(m, correct, n).exp_m1()
}

/// Accuracy of the response that the verifier picks among N, ties broken at random. Needs `1 <= n <= samples.len()`.
pub fn best_of_n(samples: &[Sample], n: usize) -> f64 {
    let scores: Vec<f64> = samples.iter().map(|s| s.score).collect();
    let correct: Vec<f64> = samples.iter().map(|s| f64::from(u8::from(s.correct))).collect();
    Ranking::new(&scores).best_of_n(&correct, n)
}

/// How often an answer occurs in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AnswerCount {
    /// Samples with this answer.
    pub count: usize,
    /// Those of them that the environment accepts: all or none, unless it judges more than the answer.
    pub correct: usize,
}

/// The pool's distinct answers (in the order of their text), and the number of samples without one.
pub fn answer_counts(samples: &[Sample]) -> (Vec<AnswerCount>, usize) {
    let mut by_answer: BTreeMap<&str, AnswerCount> = BTreeMap::new();
    let mut unanswered = 0;
    for sample in samples {
        match &sample.answer {
            Some(answer) => {
                let entry = by_answer.entry(answer).or_default();
                entry.count += 1;
                entry.correct += usize::from(sample.correct);
            }
            None => unanswered += 1,
        }
    }
    (by_answer.into_values().collect(), unanswered)
}

/// Shannon entropy of the answers' empirical distribution, in nats, over the samples that have an answer. The plug-in
/// estimate: low by about (distinct - 1)/(2M).
pub fn entropy(answers: &[AnswerCount]) -> f64 {
    let total: usize = answers.iter().map(|a| a.count).sum();
    let entropy: f64 = answers
        .iter()
        .map(|a| a.count as f64 / total as f64)
        .map(|p| if p < 1.0 { -p * p.ln() } else { 0.0 })
        .sum();
    entropy.max(0.0)
}

/// Accuracy of the most frequent answer among N samples. Samples without an answer do not vote; equally frequent
/// answers win with equal chance; if nobody votes the outcome is wrong. An answer counts as correct to the share of
/// its samples that are. Needs `n` at most the size of the pool.
///
/// Exact: the sum over t of the chance that the winner has t votes. For each t a pass over the answers carries the
/// chance of (votes drawn so far, rivals with exactly t votes, winner met or not); an answer's votes given what was
/// drawn before are hypergeometric. At most about N^2 M log N steps in all.
pub fn majority_at_n(answers: &[AnswerCount], unanswered: usize, n: usize) -> f64 {
    let pool = unanswered + answers.iter().map(|a| a.count).sum::<usize>();
    let most = answers.iter().map(|a| a.count).max().unwrap_or(0);
    if n == pool {
        // The only subset.
        let winners = || answers.iter().filter(|a| a.count == most);
        let right: f64 = winners().map(|a| a.correct as f64 / a.count as f64).sum();
        return right / winners().count().max(1) as f64;
    }
    let sizes: Vec<usize> = answers.iter().map(|a| a.count).collect();
    let draws = draws(&sizes, pool, n);
    (1..=most.min(n)).map(|t| wins_with(t, answers, &draws, n)).sum()
}

/// `[a][d][u]`: the chance that answer a, of which the pool has `sizes[a]` samples, gets u of the n - d votes that are
/// left after d went to the answers before it (hypergeometric). What is left after the last answer falls on samples
/// without one.
pub(super) fn draws(sizes: &[usize], pool: usize, n: usize) -> Vec<Vec<Vec<f64>>> {
    let ln_factorial: Vec<f64> = (0..=pool)
        .scan(0.0, |acc, i| {
            *acc += (i.max(1) as f64).ln();
            Some(*acc)
        })
        .collect();
    let ln_choose = |m: usize, k: usize| ln_factorial[m] - ln_factorial[k] - ln_factorial[m - k];
    let mut left = pool;
    sizes
        .iter()
        .map(|&size| {
            let others = left - size;
            let table = (0..=n)
                .map(|d| {
                    let votes = n - d;
                    (0..=size.min(votes))
                        .map(|u| match votes <= left && votes - u <= others {
                            true => {
                                let ln = ln_choose(size, u) + ln_choose(others, votes - u);
                                (ln - ln_choose(left, votes)).exp()
                            }
                            false => 0.0,
                        })
                        .collect()
                })
                .collect();
            left = others;
            table
        })
        .collect()
}

/// The part of [`majority_at_n`] in which the winner has exactly `t` votes.
fn wins_with(t: usize, answers: &[AnswerCount], draws: &[Vec<Vec<f64>>], n: usize) -> f64 {
    // State (d, s): d votes drawn, s rivals that have t votes as well; (s + 1) t <= n bounds s once there is a winner.
    let width = n / t + 1;
    let at = |d: usize, s: usize| d * width + s;
    let mut open = vec![0.0; (n + 1) * width];
    let mut won = open.clone();
    open[0] = 1.0;
    for (answer, table) in answers.iter().zip(draws) {
        let accuracy = answer.correct as f64 / answer.count as f64;
        let mut next_open = vec![0.0; open.len()];
        let mut next_won = vec![0.0; won.len()];
        for (d, chances) in table.iter().enumerate() {
            for s in 0..=d / t {
                let (o, w) = (open[at(d, s)], won[at(d, s)]);
                if o == 0.0 && w == 0.0 {
                    continue;
                }
                for (u, p) in chances.iter().enumerate().take(t) {
                    next_open[at(d + u, s)] += p * o;
                    next_won[at(d + u, s)] += p * w;
                }
                if let Some(p) = chances.get(t) {
                    next_open[at(d + t, s + 1)] += p * o;
                    next_won[at(d + t, s + 1)] += p * w;
                    next_won[at(d + t, s)] += p * o * accuracy;
                }
            }
        }
        (open, won) = (next_open, next_won);
    }
    // Whatever votes are left fall on samples without an answer: the tables account for their chance.
    won.iter().enumerate().map(|(i, p)| p / (i % width + 1) as f64).sum()
}
