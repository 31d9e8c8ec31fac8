//! The objectives against exact enumeration. A categorical policy over a handful of outcomes is small enough to sum
//! over every group it can produce, so expected gradients are compared with finite differences of the closed-form
//! objectives without any sampling noise.

use approx::{assert_abs_diff_eq, assert_relative_eq};
use bon_engine::objective::bon_rlb::{self, Weights};
use bon_engine::objective::pkpo::Baseline;
use bon_engine::objective::shared::{Ranking, lambda_n, ln_none_of, rank_weights};
use bon_engine::objective::*;
use proptest::prelude::*;

/// A softmax policy whose outcomes have fixed scores (with a tie) and rewards (which the scores get partly wrong).
struct Policy {
    theta: Vec<f64>,
    score: Vec<f64>,
    reward: Vec<f64>,
}

impl Policy {
    fn mixed() -> Self {
        Self {
            theta: vec![0.3, -0.5, 0.1, 0.8, -0.2],
            score: vec![1.0, 2.0, 2.0, -0.5, 3.0],
            reward: vec![0.7, 0.0, 1.5, 1.0, -0.4],
        }
    }

    /// Binary rewards, two passing outcomes.
    fn binary() -> Self {
        let reward = vec![0.0, 1.0, 0.0, 1.0];
        Self { theta: vec![0.9, -0.4, 0.6, 0.1], score: reward.clone(), reward }
    }

    fn with_theta(&self, theta: Vec<f64>) -> Self {
        Self { theta, score: self.score.clone(), reward: self.reward.clone() }
    }

    fn outcomes(&self) -> usize {
        self.theta.len()
    }

    fn probabilities(&self) -> Vec<f64> {
        let z: f64 = self.theta.iter().map(|t| t.exp()).sum();
        self.theta.iter().map(|t| t.exp() / z).collect()
    }

    fn p_fail(&self) -> f64 {
        self.probabilities().iter().zip(&self.reward).filter(|(_, r)| **r == 0.0).map(|(p, _)| p).sum()
    }

    /// Every sequence of `m` outcomes with its probability.
    fn groups(&self, m: usize) -> Vec<(f64, Vec<usize>)> {
        let p = self.probabilities();
        let mut groups = vec![(1.0, Vec::new())];
        for _ in 0..m {
            groups = groups
                .iter()
                .flat_map(|(q, group)| {
                    p.iter().enumerate().map(move |(y, p)| (q * p, [group.as_slice(), &[y]].concat()))
                })
                .collect();
        }
        groups
    }

    fn scored(&self, group: &[usize], expert_score: Option<f64>) -> ScoredGroup {
        ScoredGroup {
            scores: group.iter().map(|&y| self.score[y]).collect(),
            rewards: group.iter().map(|&y| self.reward[y]).collect(),
            expert_score,
        }
    }

    /// E[sum_j c_j grad log pi(y_j)] over groups of `m`, with respect to theta.
    fn expected_gradient(&self, m: usize, coefficients: impl Fn(&[usize]) -> Vec<f64>) -> Vec<f64> {
        let p = self.probabilities();
        let mut gradient = vec![0.0; self.outcomes()];
        for (q, group) in self.groups(m) {
            for (&y, c) in group.iter().zip(coefficients(&group)) {
                for (a, g) in gradient.iter_mut().enumerate() {
                    *g += q * c * (f64::from(u8::from(a == y)) - p[a]);
                }
            }
        }
        gradient
    }

    /// Central differences of `objective`, Richardson-extrapolated: good to about 1e-11.
    fn finite_difference(&self, objective: impl Fn(&Policy) -> f64) -> Vec<f64> {
        let central = |a: usize, h: f64| {
            let shifted = |h: f64| {
                let mut theta = self.theta.clone();
                theta[a] += h;
                objective(&self.with_theta(theta))
            };
            (shifted(h) - shifted(-h)) / (2.0 * h)
        };
        let h = 1e-3;
        (0..self.outcomes()).map(|a| (4.0 * central(a, h / 2.0) - central(a, h)) / 3.0).collect()
    }

    /// E[`values` of the best of `n` by `selector`], by brute force over every draw.
    fn best_of_n(&self, n: usize, selector: &[f64], values: &[f64]) -> f64 {
        self.groups(n).iter().map(|(q, group)| q * value_of_best(group, selector, values)).sum()
    }
}

/// Mean value of the members that score highest: Best-of-N with ties broken at random. 0 for nobody.
fn value_of_best(members: &[usize], scores: &[f64], values: &[f64]) -> f64 {
    let best = members.iter().map(|&i| scores[i]).fold(f64::NEG_INFINITY, f64::max);
    let tied: Vec<f64> = members.iter().filter(|&&i| scores[i] == best).map(|&i| values[i]).collect();
    tied.iter().sum::<f64>() / tied.len().max(1) as f64
}

/// Every `n`-subset of `0..m`.
fn subsets(m: usize, n: usize) -> Vec<Vec<usize>> {
    (0u32..1 << m)
        .filter(|mask| mask.count_ones() as usize == n)
        .map(|mask| (0..m).filter(|i| mask >> i & 1 == 1).collect())
        .collect()
}

fn config(kind: Kind, n: usize) -> ObjectiveConfig {
    ObjectiveConfig::new(kind, Some(n))
}

fn samples(config: &ObjectiveConfig, group: &ScoredGroup) -> Vec<f64> {
    coefficients(config, group).unwrap().samples
}

fn group(scores: &[f64], rewards: &[f64]) -> ScoredGroup {
    ScoredGroup { scores: scores.to_vec(), rewards: rewards.to_vec(), expert_score: None }
}

fn assert_close(found: &[f64], expected: &[f64], epsilon: f64) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f - e).abs() <= epsilon, "{found:?} is not {expected:?} to {epsilon}");
    }
}

// Group 1: the exact estimator.

#[test]
fn exact_is_unbiased_for_any_selector_and_reward() {
    let policy = Policy::mixed();
    for (m, n) in [(4, 1), (4, 2), (4, 3), (4, 4), (5, 2), (1, 1), (2, 2)] {
        for (selector, reward) in [
            (Signal::Verifier, Signal::Environment),
            (Signal::Verifier, Signal::Verifier),
            (Signal::Environment, Signal::Environment),
            (Signal::Environment, Signal::Verifier),
        ] {
            let config =
                ObjectiveConfig { selector: Some(selector), reward: Some(reward), ..config(Kind::BonRl, n) };
            let found = policy.expected_gradient(m, |group| samples(&config, &policy.scored(group, None)));
            let signal = |s| match s {
                Signal::Verifier => &policy.score,
                Signal::Environment => &policy.reward,
            };
            let expected = policy.finite_difference(|p| p.best_of_n(n, signal(selector), signal(reward)));
            assert_close(&found, &expected, 1e-8);
        }
    }
}

#[test]
fn exact_is_the_marginal_contribution_to_every_subset() {
    let scores = [2.0, 1.0, 2.0, 2.0, -1.0, 1.0, 0.5];
    let rewards = [0.3, 1.0, -2.0, 0.9, 4.0, 0.0, 1.0];
    let m = scores.len();
    for n in 2..=m {
        let all = subsets(m, n);
        let expected: Vec<f64> = (0..m)
            .map(|j| {
                let gain: f64 = all
                    .iter()
                    .filter(|s| s.contains(&j))
                    .map(|s| {
                        let rest: Vec<usize> = s.iter().copied().filter(|&i| i != j).collect();
                        value_of_best(s, &scores, &rewards) - value_of_best(&rest, &scores, &rewards)
                    })
                    .sum();
                gain / all.len() as f64
            })
            .collect();
        let config = ObjectiveConfig {
            selector: Some(Signal::Verifier),
            reward: Some(Signal::Environment),
            ..config(Kind::BonRl, n)
        };
        assert_close(&samples(&config, &group(&scores, &rewards)), &expected, 1e-13);
    }
}

/// The binomial formula of the head comment by ranks, ties ranked by index, averaged over every order of the samples.
#[test]
fn ties_are_the_average_over_their_orders() {
    fn choose(m: usize, k: usize) -> f64 {
        if k > m { 0.0 } else { (0..k).map(|i| (m - i) as f64 / (k - i) as f64).product() }
    }
    fn orders(m: usize) -> Vec<Vec<usize>> {
        let Some(last) = m.checked_sub(1) else { return vec![vec![]] };
        let insert = |order: Vec<usize>| (0..m).map(move |i| [&order[..i], &[last], &order[i..]].concat());
        orders(last).into_iter().flat_map(insert).collect()
    }
    let scores: [f64; 6] = [1.0, 3.0, 1.0, 3.0, 1.0, 0.0];
    let rewards = [0.2, 1.0, 0.7, -0.5, 0.0, 2.0];
    let m = scores.len();
    for n in 2..=m {
        let (mut c, mut w) = (vec![0.0; m], vec![0.0; m]);
        let orders = orders(m);
        for order in &orders {
            let mut ranked = order.clone();
            ranked.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            for (k, &j) in ranked.iter().enumerate() {
                let own = choose(m - k - 1, n - 1);
                let rest: f64 = (k + 1..m).map(|l| choose(m - l - 1, n - 2) * rewards[ranked[l]]).sum();
                c[j] += (own * rewards[j] - rest) / choose(m, n) / orders.len() as f64;
                w[j] += own / choose(m, n) / orders.len() as f64;
            }
        }
        let config = ObjectiveConfig {
            selector: Some(Signal::Verifier),
            reward: Some(Signal::Environment),
            ..config(Kind::BonRl, n)
        };
        assert_close(&samples(&config, &group(&scores, &rewards)), &c, 1e-12);
        assert_close(&Ranking::new(&scores).selection_weights(n), &w, 1e-12);
    }
}

#[test]
fn n_of_1_is_rloo() {
    let scores = [0.5, 2.0, 2.0, -1.0];
    let rewards = [1.0, 0.25, 0.0, 3.0];
    let group = group(&scores, &rewards);
    let by_definition = |values: &[f64]| -> Vec<f64> {
        let sum: f64 = values.iter().sum();
        values.iter().map(|x| (x - (sum - x) / 3.0) / 4.0).collect()
    };
    let rl = samples(&ObjectiveConfig::new(Kind::Rl, None), &group);
    assert_close(&rl, &by_definition(&rewards), 1e-15);
    for estimator in [Estimator::Exact, Estimator::Variational] {
        let with = |kind| ObjectiveConfig { estimator: Some(estimator), ..config(kind, 1) };
        assert_close(&samples(&with(Kind::BonRlS), &group), &rl, 1e-15);
        assert_close(&samples(&with(Kind::BonRlV), &group), &by_definition(&scores), 1e-15);
    }
}

/// PKPO's leave-one-out rewards (Walder & Karkhanis, arXiv 2505.15201) for binary g, by their definition over
/// subsets: max over S less max over S without j.
#[test]
fn pass_at_n_is_leave_one_out_pkpo() {
    for m in 2..=7 {
        for correct in 0..=m {
            let rewards: Vec<f64> = (0..m).map(|j| f64::from(u8::from((j * 5) % m < correct))).collect();
            for n in 2..=m {
                let all = subsets(m, n);
                let max = |s: &mut dyn Iterator<Item = usize>| s.map(|i| rewards[i]).fold(0.0, f64::max);
                let expected: Vec<f64> = (0..m)
                    .map(|j| {
                        let with = all.iter().filter(|s| s.contains(&j));
                        let gain: f64 = with
                            .map(|s| {
                                let mut rest = s.iter().copied().filter(|&i| i != j);
                                max(&mut s.iter().copied()) - max(&mut rest)
                            })
                            .sum();
                        gain / all.len() as f64
                    })
                    .collect();
                let group = group(&vec![0.0; m], &rewards);
                let pass = samples(&config(Kind::PassAtN, n), &group);
                assert_close(&pass, &expected, 1e-14);
                assert_eq!(pass, samples(&config(Kind::BonRlS, n), &group));
            }
        }
    }
}

// Group 2: the variational Best-of-N policy.

#[test]
fn bon_sft_with_population_win_rates_is_the_gradient_of_log_pi_bon() {
    let policy = Policy::mixed();
    let win_rate = |p: &Policy, score: f64| -> f64 {
        let p_of = p.probabilities();
        (0..p.outcomes()).filter(|&a| score >= p.score[a]).map(|a| p_of[a]).sum()
    };
    let partition = |p: &Policy, lambda: f64| -> f64 {
        let terms = p.probabilities().into_iter().zip(&p.score);
        terms.map(|(p_a, &r)| p_a * (lambda * win_rate(p, r)).exp()).sum()
    };
    for (n, m) in [(2, 2), (4, 4), (8, 3), (1, 2)] {
        let lambda = lambda_n(n);
        for expert in 0..policy.outcomes() {
            let expert_score = policy.score[expert];
            let mut found = policy.expected_gradient(m, |group| {
                let scores = policy.scored(group, None).scores;
                let z = partition(&policy, lambda) * m as f64;
                let v: Vec<f64> = scores.iter().map(|&r| (lambda * win_rate(&policy, r)).exp() / z).collect();
                bon_sft::sample_coefficients(lambda, &Ranking::new(&scores), expert_score, &v)
            });
            for (a, g) in found.iter_mut().enumerate() {
                *g += f64::from(u8::from(a == expert)) - policy.probabilities()[a];
            }
            let expected = policy.finite_difference(|p| {
                p.probabilities()[expert].ln() + lambda * win_rate(p, expert_score)
                    - partition(p, lambda).ln()
            });
            assert_close(&found, &expected, 1e-8);
        }
    }
}

/// The formulas of objectives `bon-sft` and `bon-rl` (variational), term by term over all pairs.
#[test]
fn variational_coefficients_follow_their_formulas() {
    let scores = [1.0, 0.5, 1.0, 2.0, 0.5, 0.5, -3.0];
    let rewards = [0.0, 1.0, 1.0, 0.0, 1.0, 0.25, 2.0];
    let m = scores.len();
    let others = m as f64 - 1.0;
    let at_least = |i: usize, j: usize| f64::from(u8::from(scores[i] >= scores[j]));
    for n in 1..=m {
        let lambda = lambda_n(n);
        let q = |i: usize, j: usize| if i == j { 0.0 } else { at_least(i, j) / others };
        let tilt: Vec<f64> = (0..m).map(|i| (lambda * (0..m).map(|j| q(i, j)).sum::<f64>()).exp()).collect();
        let v: Vec<f64> = tilt.iter().map(|t| t / tilt.iter().sum::<f64>()).collect();
        let partition: Vec<f64> =
            (0..m).map(|j| v[j] + lambda * (0..m).map(|i| v[i] * q(i, j)).sum::<f64>()).collect();

        let expert_score = 1.0;
        let sft = ScoredGroup { expert_score: Some(expert_score), ..group(&scores, &rewards) };
        let found = coefficients(&config(Kind::BonSft, n), &sft).unwrap();
        let expected: Vec<f64> = (0..m)
            .map(|j| lambda / m as f64 * f64::from(u8::from(expert_score >= scores[j])) - partition[j])
            .collect();
        assert_eq!(found.expert, Some(1.0));
        assert_close(&found.samples, &expected, 1e-13);

        let w = Ranking::new(&scores).selection_weights(n);
        let advantage: Vec<f64> = (0..m)
            .map(|j| {
                let rest: Vec<usize> = (0..m).filter(|&i| i != j).collect();
                let all = subsets(m - 1, n.min(m - 1));
                let values = all.iter().map(|s| {
                    let s: Vec<usize> = s.iter().map(|&i| rest[i]).collect();
                    value_of_best(&s, &scores, &rewards)
                });
                w[j] * (rewards[j] - values.sum::<f64>() / all.len() as f64)
            })
            .collect();
        let expected: Vec<f64> = (0..m)
            .map(|j| {
                let wins: f64 = (0..m).map(|i| advantage[i] * q(i, j)).sum();
                advantage[j] + lambda * wins - advantage.iter().sum::<f64>() * partition[j]
            })
            .collect();
        let config = ObjectiveConfig {
            estimator: Some(Estimator::Variational),
            selector: Some(Signal::Verifier),
            reward: Some(Signal::Environment),
            ..config(Kind::BonRl, n)
        };
        assert_close(&samples(&config, &group(&scores, &rewards)), &expected, 1e-13);
    }
}

// Group 3: the closed forms for binary rewards.

#[test]
fn closed_forms_with_population_p_are_the_gradient_of_pass_at_n() {
    let policy = Policy::binary();
    let p = policy.p_fail();
    for (m, n) in [(4, 1), (4, 2), (5, 3), (4, 4)] {
        let power = p.powi(n as i32 - 1);
        let size = n as f64;
        let (g_pass, g_fail) = (size * power / (1.0 - power * p), size * p / (1.0 - p));
        let gradient = policy.finite_difference(|q| 1.0 - q.p_fail().powi(n as i32));
        for (weights, factor) in [
            (Weights { pass: g_pass, fail: g_fail }, 1.0),
            (Weights { pass: g_pass, fail: -g_fail }, (1.0 + p) / (1.0 - p)),
            (Weights { pass: g_pass * (1.0 - p), fail: 0.0 }, 1.0),
        ] {
            let found = policy.expected_gradient(m, |group| {
                let group = policy.scored(group, None);
                bon_rlb::weigh(n, &group.scores, &group.rewards, weights)
            });
            let expected: Vec<f64> = gradient.iter().map(|g| g * factor).collect();
            assert_close(&found, &expected, 1e-8);
        }
    }
}

#[test]
fn closed_forms_with_estimated_p_are_unbiased_at_every_group_size() {
    let binary = Policy::binary();
    // Without a term for failures, a verifier may also prefer one failure over another.
    let graded = Policy { score: vec![-1.0, 1.0, 0.0, 1.0], ..Policy::binary() };
    for (m, n) in [(1, 1), (2, 2), (4, 1), (4, 2), (5, 3), (4, 4), (6, 2)] {
        let expected = binary.finite_difference(|q| 1.0 - q.p_fail().powi(n as i32));
        let unclipped = ObjectiveConfig { weight_clip: Some(f64::INFINITY), ..config(Kind::BonRlb, n) };
        let positive = config(Kind::BonRlbP, n);
        for (policy, config) in [(&binary, &unclipped), (&binary, &positive), (&graded, &positive)] {
            let found = policy.expected_gradient(m, |group| samples(config, &policy.scored(group, None)));
            assert_close(&found, &expected, 1e-8);
        }
    }
}

#[test]
fn clipping_changes_the_length_and_not_the_direction() {
    let policy = Policy::binary();
    for (m, n) in [(4, 2), (6, 3), (4, 4)] {
        let direction = policy.finite_difference(|q| 1.0 - q.p_fail().powi(n as i32));
        for sign in [NegativeSign::Unbiased, NegativeSign::Penalize] {
            for clip in [0.1, 0.5, 1.0, 2.0, 5.0] {
                let config = ObjectiveConfig {
                    weight_clip: Some(clip),
                    negative_sign: Some(sign),
                    ..config(Kind::BonRlb, n)
                };
                let found =
                    policy.expected_gradient(m, |group| samples(&config, &policy.scored(group, None)));
                let factor = found[0] / direction[0];
                assert!(factor > 0.0, "clip {clip}, {sign:?}: turned by {factor}");
                let expected: Vec<f64> = direction.iter().map(|d| d * factor).collect();
                assert_close(&found, &expected, 1e-8);
            }
        }
    }
}

#[test]
fn all_pass_and_all_fail_groups() {
    let (m, n) = (4, 2);
    let pass = group(&[1.0; 4], &[1.0; 4]);
    let fail = group(&[0.0; 4], &[0.0; 4]);
    for kind in [
        Kind::BonRlb,
        Kind::BonRlbP,
        Kind::PassAtN,
        Kind::BonRlS,
        Kind::Rl,
        Kind::Pkpo,
        Kind::MaxRl,
        Kind::Grpo,
    ] {
        let answer = coefficients(&config(kind, n), &pass).unwrap();
        assert_eq!(answer.samples, [0.0; 4], "{kind}");
        let metrics = answer.metrics.unwrap();
        assert!(metrics.all_pass && !metrics.all_fail);
        assert_eq!((metrics.p_fail, metrics.best_of_n, metrics.clipped), (0.0, 1.0, 0));

        let answer = coefficients(&config(kind, n), &fail).unwrap();
        let metrics = answer.metrics.unwrap();
        assert!(metrics.all_fail && !metrics.all_pass);
        assert_eq!((metrics.p_fail, metrics.oracle_best_of_n), (1.0, 0.0));
        if kind != Kind::BonRlb {
            assert_eq!(answer.samples, [0.0; 4], "{kind}");
        }
    }
    // g- = N (M-1) = 6 at w_j = 1/M, and clipped at 4.
    let clipped = |sign| ObjectiveConfig {
        weight_clip: Some(4.0),
        negative_sign: Some(sign),
        ..config(Kind::BonRlb, n)
    };
    assert_close(&samples(&config(Kind::BonRlb, n), &fail), &[6.0 / m as f64; 4], 1e-15);
    let answer = coefficients(&clipped(NegativeSign::Penalize), &fail).unwrap();
    assert_close(&answer.samples, &[-1.0; 4], 1e-15);
    assert_eq!(answer.metrics.unwrap().clipped, 4);
    assert_close(&samples(&clipped(NegativeSign::Unbiased), &fail), &[1.0; 4], 1e-15);
}

// Group 4: selection probabilities and lambda_N.

#[test]
fn selection_weights_are_the_brute_force_distribution() {
    let scores = [0.0, 2.0, -0.0, 2.0, 2.0, -7.5, 1.0];
    let m = scores.len();
    for n in 1..=m {
        let all = subsets(m, n);
        let expected: Vec<f64> = (0..m)
            .map(|j| {
                let is_j: Vec<f64> = (0..m).map(|i| f64::from(u8::from(i == j))).collect();
                all.iter().map(|s| value_of_best(s, &scores, &is_j)).sum::<f64>() / all.len() as f64
            })
            .collect();
        assert_close(&Ranking::new(&scores).selection_weights(n), &expected, 1e-15);
    }
}

/// Reference values from 60-digit arithmetic.
#[test]
fn lambda_table() {
    assert_eq!(lambda_n(1), 0.0);
    for (n, lambda) in [
        (2, 2.288_640_585_901_293_3),
        (3, 3.727_466_380_615_943_2),
        (4, 4.916_907_932_370_178_7),
        (8, 9.054_541_420_719_508),
        (16, 17.031_899_027_387_04),
        (32, 33.015_789_039_966_14),
        (64, 65.007_853_349_547_89),
        (1024, 1_025.000_488_440_234_5),
        (65_536, 65_537.000_007_629_43),
        (1_000_000, 1_000_001.000_000_5),
    ] {
        assert_relative_eq!(lambda_n(n), lambda, max_relative = 1e-12);
    }
    // The bracket of the bisection holds throughout.
    for n in (2..3000).chain([10_000, 123_457, 999_999]) {
        let offset = lambda_n(n) - n as f64;
        assert!(offset > 0.1 && offset < 1.1, "n = {n}: lambda - n = {offset}");
    }
}

/// Reference values from exact integer arithmetic.
#[test]
fn weights_of_large_groups() {
    for (m, n, k, exact) in [
        (4096, 2, 1, 4.882_812_5e-4),
        (4096, 2, 2048, 2.442_002_442_002_442e-4),
        (4096, 2, 4095, 1.192_384_004_884_005e-7),
        (4096, 64, 10, 0.013_588_134_684_861_345),
        (4096, 64, 100, 0.003_304_031_637_856_698_3),
        (4096, 64, 1000, 2.982_974_145_170_620_3e-10),
        (4096, 2048, 10, 9.701_309_766_695_271e-4),
        (4096, 2048, 100, 2.401_888_703_315_810_3e-31),
        (4096, 2048, 300, 4.204_006_992_232_561e-96),
        (4096, 4096, 1, 1.0),
        (1000, 500, 250, 4.822_021_445_665_905e-94),
    ] {
        let w = rank_weights(m, n);
        assert_relative_eq!(w[k - 1], exact, max_relative = 1e-12);
        assert_relative_eq!(w.iter().sum::<f64>(), 1.0, max_relative = 1e-12);
        // The same number by its factorisation: rank 1..k-1 missed, rank k drawn.
        let missed = ln_none_of(m, k - 1, n).exp();
        assert_relative_eq!(missed * n as f64 / (m - k + 1) as f64, exact, max_relative = 1e-12);
    }
    // pass@N at M = 4096 keeps its digits where naive differences of binomials cancel: C(M-c, N-1)/C(M, N).
    let m = 4096;
    let rewards: Vec<f64> = (0..m).map(|j| f64::from(u8::from(j * 7 % m < 999))).collect();
    let c = samples(&config(Kind::PassAtN, 64), &group(&rewards, &rewards));
    let exact = rank_weights(m, 64)[999 - 1];
    for (c, r) in c.iter().zip(&rewards) {
        assert_relative_eq!(*c, r * exact, max_relative = 1e-12);
    }
}

#[test]
fn metrics_say_what_best_of_n_earns() {
    // Of the three pairs, the verifier's best is right in one, the environment's in two.
    let answer = coefficients(
        &ObjectiveConfig::new(Kind::BonRlS, Some(2)),
        &group(&[3.0, 2.0, 1.0], &[0.0, 1.0, 0.0]),
    );
    let metrics = answer.unwrap().metrics.unwrap();
    assert_abs_diff_eq!(metrics.best_of_n, 1.0 / 3.0, epsilon = 1e-15);
    assert_abs_diff_eq!(metrics.oracle_best_of_n, 2.0 / 3.0, epsilon = 1e-15);
    assert_abs_diff_eq!(metrics.mean_reward, 1.0 / 3.0, epsilon = 1e-15);
    assert_abs_diff_eq!(metrics.p_fail, 2.0 / 3.0, epsilon = 1e-15);
    // Rewards that are not 0 and 1: Best-of-N earns them, pass@N counts who passes.
    let answer = coefficients(
        &ObjectiveConfig::new(Kind::BonRlS, Some(2)),
        &group(&[3.0, 2.0, 1.0], &[0.2, 0.9, 0.4]),
    );
    let metrics = answer.unwrap().metrics.unwrap();
    assert_abs_diff_eq!(metrics.best_of_n, (0.2 + 0.2 + 0.9) / 3.0, epsilon = 1e-15);
    assert_abs_diff_eq!(metrics.oracle_best_of_n, (0.9 + 0.4 + 0.9) / 3.0, epsilon = 1e-15);
    assert_abs_diff_eq!(metrics.pass_at_n, 2.0 / 3.0, epsilon = 1e-15);
}

#[test]
fn sft_needs_no_samples() {
    let sft = ObjectiveConfig::new(Kind::Sft, None);
    let answer = coefficients(&sft, &ScoredGroup::default()).unwrap();
    assert_eq!((answer.samples.len(), answer.expert, answer.metrics), (0, Some(1.0), None));
    assert_eq!(samples(&sft, &group(&[1.0, 2.0], &[0.0, 1.0])), [0.0, 0.0]);
}

// Group 6: other papers' objectives.

fn pkpo(n: usize, baseline: Baseline) -> ObjectiveConfig {
    ObjectiveConfig { baseline: Some(baseline), ..config(Kind::Pkpo, n) }
}

/// Rewards of many levels, below 0 too, with a tie of outcomes.
fn graded() -> Policy {
    Policy { reward: vec![0.7, 0.0, 1.5, 0.7, -0.4], ..Policy::mixed() }
}

#[test]
fn pkpo_is_unbiased_for_the_best_reward_of_n() {
    for policy in [graded(), Policy::binary()] {
        for (m, n) in [(1, 1), (3, 1), (2, 2), (4, 2), (4, 3), (4, 4), (5, 3)] {
            let expected = policy.finite_difference(|p| p.best_of_n(n, &p.reward, &p.reward));
            for baseline in [Baseline::None, Baseline::LeaveOneOut, Baseline::LeaveOneOutMinusOne] {
                let config = pkpo(n, baseline);
                if m >= config.least_samples() {
                    let found =
                        policy.expected_gradient(m, |group| samples(&config, &policy.scored(group, None)));
                    assert_close(&found, &expected, 1e-8);
                }
            }
        }
    }
}

/// Equations 27, 29 and 33 of Walder & Karkhanis as they stand there, over all subsets.
#[test]
fn pkpo_follows_the_paper_subset_by_subset() {
    let rewards: [f64; 7] = [0.3, 1.0, -2.0, 1.0, 0.3, 0.0, 4.0];
    let m = rewards.len();
    let max = |s: &[usize]| s.iter().map(|&i| rewards[i]).fold(f64::NEG_INFINITY, f64::max);
    let without = |s: &[usize], j: usize| s.iter().copied().filter(|&i| i != j).collect::<Vec<_>>();
    // S(i, k, set).
    let share = |i: usize, k: usize, set: &[usize]| -> f64 {
        let all = subsets(set.len(), k);
        let named = all.iter().map(|s| s.iter().map(|&a| set[a]).collect::<Vec<_>>());
        named.filter(|s| s.contains(&i)).map(|s| max(&s)).sum::<f64>() / all.len() as f64
    };
    let whole: Vec<usize> = (0..m).collect();
    for n in 1..=m {
        let s: Vec<f64> = whole.iter().map(|&j| share(j, n, &whole)).collect();
        let found = samples(&pkpo(n, Baseline::None), &group(&[0.0; 7], &rewards));
        assert_close(&found, &s, 1e-14);
        if n < m {
            let others = |j: usize| {
                let rest = without(&whole, j);
                rest.iter().map(|&i| share(i, n, &rest)).sum::<f64>() / (m - 1) as f64
            };
            let expected: Vec<f64> = whole.iter().map(|&j| s[j] - others(j)).collect();
            assert_close(
                &samples(&pkpo(n, Baseline::LeaveOneOut), &group(&[0.0; 7], &rewards)),
                &expected,
                1e-14,
            );
        }
        if n > 1 {
            let all = subsets(m, n);
            let gain = |j: usize| {
                let with = all.iter().filter(|s| s.contains(&j));
                with.map(|s| max(s) - max(&without(s, j))).sum::<f64>() / all.len() as f64
            };
            let expected: Vec<f64> = whole.iter().map(|&j| gain(j)).collect();
            let group = group(&[0.0; 7], &rewards);
            let found = samples(&config(Kind::Pkpo, n), &group);
            assert_close(&found, &expected, 1e-14);
            assert_eq!(found, samples(&config(Kind::BonRlS, n), &group));
        }
    }
}

/// Equation 8: N/M for a sample that passes, N/M rho(M-1, K, N-1) for one that fails, K of M passing.
#[test]
fn pkpo_without_a_baseline_is_the_papers_binary_form() {
    for m in 1..=8 {
        for n in 1..=m {
            for passing in 0..=m {
                let rewards: Vec<f64> = (0..m).map(|j| f64::from(u8::from(j < passing))).collect();
                // All subsets of the others hold a pass where too few of them fail.
                let rho = -ln_none_of(m - 1, passing.min(m - 1), n - 1).exp_m1();
                let share = n as f64 / m as f64;
                let expected: Vec<f64> =
                    rewards.iter().map(|&r| if r == 1.0 { share } else { share * rho }).collect();
                let found = samples(&pkpo(n, Baseline::None), &group(&vec![0.0; m], &rewards));
                assert_close(&found, &expected, 1e-14);
            }
        }
    }
}

/// -sum_{k=1..order} (1-p)^k / k.
fn log_to_order(p: f64, order: usize) -> f64 {
    -(1..=order as i32).map(|k| (1.0 - p).powi(k) / f64::from(k)).sum::<f64>()
}

#[test]
fn max_rl_is_unbiased_for_the_likelihood_to_the_order_of_the_group() {
    let policy = Policy::binary();
    for m in 1..=6 {
        for (control_variate, order) in [(None, m - 1), (Some(true), m - 1), (Some(false), m)] {
            let config = ObjectiveConfig { control_variate, ..ObjectiveConfig::new(Kind::MaxRl, None) };
            let found = policy.expected_gradient(m, |group| samples(&config, &policy.scored(group, None)));
            let expected = policy.finite_difference(|p| log_to_order(1.0 - p.p_fail(), order));
            assert_close(&found, &expected, 1e-8);
        }
    }
    // Order 1 is pass@1, and the mixture over k is of pass@k.
    let pass_at = |k: i32| policy.finite_difference(|p| 1.0 - p.p_fail().powi(k));
    let mixture: Vec<f64> =
        (0..4).map(|a| (1..=3).map(|k| pass_at(k)[a] / f64::from(k)).sum::<f64>()).collect();
    assert_close(&policy.finite_difference(|p| log_to_order(1.0 - p.p_fail(), 3)), &mixture, 1e-8);
}

#[test]
fn max_rl_by_hand() {
    let with = |control_variate| ObjectiveConfig {
        control_variate: Some(control_variate),
        ..ObjectiveConfig::new(Kind::MaxRl, None)
    };
    let at = |rewards: &[f64]| group(&vec![0.0; rewards.len()], rewards);
    let (quarter, third) = (0.25, 1.0 / 3.0);
    let mixed = at(&[1.0, 0.0, 0.0, 1.0]);
    assert_close(&samples(&with(true), &mixed), &[quarter, -quarter, -quarter, quarter], 1e-15);
    assert_close(&samples(&with(false), &mixed), &[0.5, 0.0, 0.0, 0.5], 1e-15);
    assert_close(&samples(&with(true), &at(&[0.0, 1.0, 0.0])), &[-third, 2.0 * third, -third], 1e-15);
    // Nothing to gain, and nothing to learn from.
    for control_variate in [true, false] {
        assert_eq!(samples(&with(control_variate), &at(&[0.0; 3])), [0.0; 3]);
        assert_eq!(samples(&with(control_variate), &at(&[0.0])), [0.0]);
    }
    for m in 1..50 {
        assert_eq!(samples(&with(true), &at(&vec![1.0; m])), vec![0.0; m]);
    }
    assert_close(&samples(&with(false), &at(&[1.0; 3])), &[third; 3], 1e-15);
}

#[test]
fn grpo_by_hand() {
    let with =
        |std_normalization| ObjectiveConfig { std_normalization, ..ObjectiveConfig::new(Kind::Grpo, None) };
    // Mean 2, deviations -2, -1, 0, 3, standard deviation sqrt(14/3).
    let rewards = [0.0, 1.0, 2.0, 5.0];
    let std = (14.0f64 / 3.0).sqrt();
    for std_normalization in [None, Some(true), Some(false)] {
        let divisor = if std_normalization == Some(false) { 4.0 } else { 4.0 * std };
        let found = samples(&with(std_normalization), &group(&[9.0, 0.0, 0.0, 0.0], &rewards));
        let expected: Vec<f64> = [-2.0, -1.0, 0.0, 3.0].iter().map(|d| d / divisor).collect();
        assert_close(&found, &expected, 1e-15);
    }
    // Units do not matter, where squares leave the range of f64 too.
    let plain = samples(&with(None), &group(&[0.0; 4], &rewards));
    for unit in [1e-300, 1e-3, 1e300] {
        let scaled: Vec<f64> = rewards.iter().map(|r| r * unit).collect();
        assert_close(&samples(&with(None), &group(&[0.0; 4], &scaled)), &plain, 1e-14);
    }
    for rewards in [&[0.1; 3][..], &[-2.0; 5], &[0.7], &[-0.0, 0.0]] {
        for std_normalization in [None, Some(false)] {
            let found = samples(&with(std_normalization), &group(&vec![0.0; rewards.len()], rewards));
            assert_eq!(found, vec![0.0; rewards.len()], "{rewards:?}");
        }
    }
}

#[test]
fn grpo_is_a_weighted_gradient_of_the_pass_rate() {
    let policy = Policy::binary();
    let p = 1.0 - policy.p_fail();
    let pass_rate = policy.finite_difference(|q| 1.0 - q.p_fail());
    let with =
        |std_normalization| ObjectiveConfig { std_normalization, ..ObjectiveConfig::new(Kind::Grpo, None) };
    for m in 2..=6usize {
        let found = policy.expected_gradient(m, |group| samples(&with(None), &policy.scored(group, None)));
        let mf = m as f64;
        let chance = |k: usize| {
            let ways: f64 = (0..k).map(|i| (m - i) as f64 / (k - i) as f64).product();
            ways * p.powi(k as i32) * (1.0 - p).powi((m - k) as i32)
        };
        let root: f64 = (0..=m).map(|k| chance(k) * ((k * (m - k)) as f64).sqrt()).sum();
        let weight = (mf * (mf - 1.0)).sqrt() / (mf * mf * p * (1.0 - p)) * root;
        let expected: Vec<f64> = pass_rate.iter().map(|g| g * weight).collect();
        assert_close(&found, &expected, 1e-8);
    }
    // Dr. GRPO: the plain gradient of the mean reward, (M-1)/M times as long.
    let policy = graded();
    for m in 1..=4 {
        let found =
            policy.expected_gradient(m, |group| samples(&with(Some(false)), &policy.scored(group, None)));
        let factor = (m as f64 - 1.0) / m as f64;
        let mean = |q: &Policy| q.probabilities().iter().zip(&q.reward).map(|(p, r)| p * r).sum::<f64>();
        let expected: Vec<f64> = policy.finite_difference(mean).iter().map(|g| g * factor).collect();
        assert_close(&found, &expected, 1e-8);
    }
}

// Bad input.

#[test]
fn configurations_are_checked() {
    use ObjectiveError::*;
    let check = |text: &str| toml::from_str::<ObjectiveConfig>(text).unwrap().validate();
    assert_eq!(check("kind = 'rl'"), Ok(()));
    assert_eq!(check("kind = 'rl'\nn = 4"), Ok(()));
    assert_eq!(check("kind = 'bon-rlb'\nn = 4\nweight_clip = inf"), Ok(()));
    let missing = |kind, setting| Err(MissingSetting { kind, setting });
    let useless = |kind, setting| Err(NotApplicable { kind, setting });
    assert_eq!(check("kind = 'bon-rl-v'"), missing(Kind::BonRlV, "n"));
    assert_eq!(check("kind = 'bon-rl'\nn = 2\nreward = 'verifier'"), missing(Kind::BonRl, "selector"));
    assert_eq!(check("kind = 'bon-rl'\nn = 2\nselector = 'verifier'"), missing(Kind::BonRl, "reward"));
    assert_eq!(check("kind = 'bon-rl-s'\nn = 0"), Err(ZeroN));
    assert_eq!(check("kind = 'bon-rlb'\nn = 2\nweight_clip = 0"), Err(WeightClip { value: 0.0 }));
    assert!(matches!(check("kind = 'bon-rlb'\nn = 2\nweight_clip = nan"), Err(WeightClip { .. })));
    assert_eq!(check("kind = 'rl'\nestimator = 'exact'"), useless(Kind::Rl, "estimator"));
    assert_eq!(
        check("kind = 'pass-at-n'\nn = 2\nestimator = 'variational'"),
        useless(Kind::PassAtN, "estimator")
    );
    assert_eq!(
        check("kind = 'bon-rlb-p'\nn = 2\nnegative_sign = 'penalize'"),
        useless(Kind::BonRlbP, "negative_sign")
    );
    assert_eq!(check("kind = 'bon-rl-v'\nn = 2\nweight_clip = 1"), useless(Kind::BonRlV, "weight_clip"));
    assert_eq!(check("kind = 'bon-rl-v'\nn = 2\nselector = 'verifier'"), useless(Kind::BonRlV, "selector"));
    assert_eq!(check("kind = 'pkpo'"), missing(Kind::Pkpo, "n"));
    assert_eq!(check("kind = 'pkpo'\nn = 2\nbaseline = 'leave-one-out'"), Ok(()));
    assert_eq!(check("kind = 'max-rl'\ncontrol_variate = false"), Ok(()));
    assert_eq!(check("kind = 'grpo'\nstd_normalization = false"), Ok(()));
    assert_eq!(check("kind = 'grpo'\nbaseline = 'none'"), useless(Kind::Grpo, "baseline"));
    assert_eq!(check("kind = 'rl'\ncontrol_variate = true"), useless(Kind::Rl, "control_variate"));
    assert_eq!(check("kind = 'max-rl'\nstd_normalization = true"), useless(Kind::MaxRl, "std_normalization"));
    let unknown = toml::from_str::<ObjectiveConfig>("kind = 'rl'\nkl = 0.1").unwrap_err();
    assert!(unknown.to_string().contains("unknown field `kl`"), "{unknown}");
}

/// `OPTIONS` lists what serde knows, and names are what files say.
#[test]
fn names_round_trip() {
    let full = ObjectiveConfig {
        kind: Kind::BonRlbP,
        n: Some(4),
        estimator: Some(Estimator::Variational),
        negative_sign: Some(NegativeSign::Penalize),
        weight_clip: Some(2.5),
        selector: Some(Signal::Environment),
        reward: Some(Signal::Verifier),
        baseline: Some(Baseline::LeaveOneOut),
        control_variate: Some(false),
        std_normalization: Some(false),
        loss: Some(bon_engine::objective::verifier::Loss::Pairwise),
        pass_threshold: Some(0.25),
    };
    let table = toml::Table::try_from(&full).unwrap();
    let mut keys: Vec<&str> = table.keys().map(String::as_str).collect();
    let mut known = [&["kind", "n"][..], &ObjectiveConfig::options()].concat();
    keys.sort_unstable();
    known.sort_unstable();
    assert_eq!(keys, known);
    assert_eq!(table["kind"].as_str(), Some("bon-rlb-p"));
    assert_eq!(full.kind.to_string(), "bon-rlb-p");
    assert_eq!(table.try_into::<ObjectiveConfig>().unwrap(), full);
}

#[test]
fn groups_are_checked() {
    use ObjectiveError::*;
    let check = |kind, group: &ScoredGroup| coefficients(&config(kind, 2), group).unwrap_err();
    let (kind, rl) = (Kind::BonRlb, Kind::BonRlV);
    let lengths = LengthMismatch { scores: 2, rewards: 1 };
    assert_eq!(check(rl, &group(&[1.0, 2.0], &[1.0])), lengths);
    assert_eq!(check(rl, &group(&[1.0], &[1.0])), GroupTooSmall { n: 2, m: 1 });
    assert!(check(rl, &group(&[1.0], &[1.0])).to_string().contains("n = 2 is more than the group's 1"));
    assert_eq!(check(rl, &group(&[], &[])), EmptyGroup { kind: rl });
    let not_finite = NonFinite { field: "rewards", index: 1, value: f64::INFINITY };
    assert_eq!(check(rl, &group(&[1.0, 2.0], &[0.0, f64::INFINITY])), not_finite);
    let message = check(rl, &group(&[f64::NAN, 2.0], &[0.0, 1.0])).to_string();
    assert_eq!(message, "`scores[0]` is NaN, not a finite number");
    let half = NotBinary { kind, index: 1, value: 0.5 };
    assert_eq!(check(kind, &group(&[1.0, 2.0], &[0.0, 0.5])), half);
    let expert = |x| ScoredGroup { expert_score: Some(x), ..group(&[1.0, 2.0], &[0.0, 1.0]) };
    assert_eq!(check(rl, &expert(1.0)), UnneededExpertScore { kind: rl });
    let kind = Kind::BonSft;
    assert_eq!(check(kind, &group(&[1.0, 2.0], &[0.0, 1.0])), MissingExpertScore { kind });
    let infinite = NonFiniteExpert { value: f64::NEG_INFINITY };
    assert_eq!(check(kind, &expert(f64::NEG_INFINITY)), infinite);
    let huge = group(&[f64::MAX, -f64::MAX, f64::MAX], &[0.0; 3]);
    assert!(matches!(check(rl, &huge), Overflow { .. }));
    for kind in [Kind::Pkpo, Kind::Grpo] {
        let huge = group(&[0.0; 3], &[f64::MAX, -f64::MAX, f64::MAX]);
        assert!(matches!(check(kind, &huge), Overflow { .. }), "{kind}");
    }
    let kind = Kind::MaxRl;
    assert_eq!(check(kind, &group(&[1.0, 2.0], &[0.0, 0.5])), NotBinary { kind, index: 1, value: 0.5 });
    let others = ObjectiveConfig { baseline: Some(Baseline::LeaveOneOut), ..config(Kind::Pkpo, 2) };
    let error = coefficients(&others, &group(&[1.0, 2.0], &[0.0, 1.0])).unwrap_err();
    assert_eq!(error, NoOthers { n: 2, m: 2 });
    assert!(error.to_string().contains("needs more samples than n = 2, and the group has 2"), "{error}");
}

/// All that train a policy.
fn kinds() -> impl Iterator<Item = Kind> {
    Kind::ALL.iter().copied().filter(|kind| !kind.trains_verifier())
}

/// Every usable configuration of every kind at `n`.
fn all_configs(n: usize) -> Vec<ObjectiveConfig> {
    kinds()
        .flat_map(|kind| {
            let mut base = config(kind, n);
            if kind == Kind::BonRl {
                (base.selector, base.reward) = (Some(Signal::Verifier), Some(Signal::Environment));
            }
            let tilted = ObjectiveConfig { estimator: Some(Estimator::Variational), ..base.clone() };
            let penalize = ObjectiveConfig { negative_sign: Some(NegativeSign::Penalize), ..base.clone() };
            let bare = ObjectiveConfig { baseline: Some(Baseline::None), ..base.clone() };
            let others = ObjectiveConfig { baseline: Some(Baseline::LeaveOneOut), ..base.clone() };
            let varied = ObjectiveConfig { control_variate: Some(false), ..base.clone() };
            let spread = ObjectiveConfig { std_normalization: Some(false), ..base.clone() };
            [base, tilted, penalize, bare, others, varied, spread]
        })
        .filter(|config| config.validate().is_ok())
        .collect()
}

proptest! {
    /// Whatever the numbers, the answer is an error or finite coefficients of the right length.
    #[test]
    fn hostile_groups_do_not_panic(
        scores in prop::collection::vec(prop::num::f64::ANY, 0..9),
        rewards in prop::collection::vec(prop_oneof![prop::num::f64::ANY, Just(0.0), Just(1.0)], 0..9),
        expert_score in prop::option::of(prop::num::f64::ANY),
        n in prop_oneof![0usize..10, Just(usize::MAX)],
    ) {
        let group = ScoredGroup { scores, rewards, expert_score };
        for kind in kinds() {
            let _ = coefficients(&config(kind, n), &group);
        }
        for config in all_configs(n.max(1)) {
            if let Ok(answer) = coefficients(&config, &group) {
                prop_assert_eq!(answer.samples.len(), group.scores.len());
                prop_assert!(answer.samples.iter().all(|c| c.is_finite()));
            }
        }
    }

    /// Renaming the samples renames the coefficients, ties and all.
    #[test]
    fn coefficients_do_not_depend_on_the_order_of_samples(
        pairs in prop::collection::vec((0u8..4, 0u8..2), 1..12),
        keys in prop::collection::vec(any::<u32>(), 12),
        n in 1usize..12,
    ) {
        let n = n.min(pairs.len());
        let mut order: Vec<usize> = (0..pairs.len()).collect();
        order.sort_by_key(|&i| keys[i]);
        let scores: Vec<f64> = pairs.iter().map(|p| f64::from(p.0)).collect();
        let rewards: Vec<f64> = pairs.iter().map(|p| f64::from(p.1)).collect();
        let moved = |values: &[f64]| order.iter().map(|&i| values[i]).collect::<Vec<f64>>();
        for config in all_configs(n) {
            let expert_score = (config.kind == Kind::BonSft).then_some(1.5);
            let here = ScoredGroup { scores: scores.clone(), rewards: rewards.clone(), expert_score };
            let there = ScoredGroup { scores: moved(&scores), rewards: moved(&rewards), expert_score };
            if config.least_samples() > pairs.len() {
                continue;
            }
            let expected = moved(&samples(&config, &here));
            for (found, expected) in samples(&config, &there).iter().zip(expected) {
                prop_assert!((found - expected).abs() <= 1e-12, "{}: {} {}", config.kind, found, expected);
            }
        }
    }
}

// ------------------------------------------------------------------------------------- what is right, what is unjudged

/// Rewards of a group, the threshold, and what follows: share that fails, pass@2, whether all earn the same.
#[test]
fn one_definition_of_a_pass_whatever_the_rewards() {
    for (rewards, threshold, p_fail, pass_at_2, same) in [
        (&[-1.0; 4][..], None, 1.0, 0.0, true),
        (&[0.25; 4], None, 1.0, 0.0, true),
        (&[0.1; 3], None, 1.0, 0.0, true),
        (&[0.7; 4], None, 0.0, 1.0, true),
        (&[3.0; 4], None, 0.0, 1.0, true),
        (&[0.5, 0.499_999, 0.25, 0.0], None, 0.75, 0.5, false),
        (&[0.6, 1.0, 0.6, 1.0], None, 0.0, 1.0, false),
        (&[-1.0, 1.0, -1.0, -1.0], None, 0.75, 0.5, false),
        (&[0.6, 1.0, 0.6, 1.0], Some(0.9), 0.5, 5.0 / 6.0, false),
        (&[-3.0, -0.25, -8.0, -0.5], Some(-0.5), 0.5, 5.0 / 6.0, false),
        (&[0.0, -1.0, 0.0, 0.0], Some(0.0), 0.25, 1.0, false),
    ] {
        for kind in [
            Kind::Rl,
            Kind::BonRlV,
            Kind::BonRlS,
            Kind::PassAtN,
            Kind::BonSft,
            Kind::Sft,
            Kind::Pkpo,
            Kind::Grpo,
        ] {
            let config = ObjectiveConfig { pass_threshold: threshold, ..ObjectiveConfig::new(kind, Some(2)) };
            let expert_score = (kind == Kind::BonSft).then_some(1.0);
            let answer =
                coefficients(&config, &ScoredGroup { expert_score, ..group(rewards, rewards) }).unwrap();
            let m = answer.metrics.unwrap();
            let what = format!("{kind}, {rewards:?} at {threshold:?}");
            assert_eq!((m.p_fail, m.zero_variance), (p_fail, same), "{what}");
            assert_eq!((m.all_fail, m.all_pass), (p_fail == 1.0, p_fail == 0.0), "{what}");
            assert_abs_diff_eq!(m.pass_at_n, pass_at_2, epsilon = 1e-15);
            // To the last bit: what AdamW makes of rounding is a step like any other.
            if same && !matches!(kind, Kind::BonSft | Kind::Sft) {
                assert_eq!(answer.samples, vec![0.0; rewards.len()], "{what}");
            }
        }
    }
    // What is earned counts: here the score, which is the same for all.
    let by_score = ObjectiveConfig {
        selector: Some(Signal::Environment),
        reward: Some(Signal::Verifier),
        ..ObjectiveConfig::new(Kind::BonRl, Some(2))
    };
    for estimator in [Estimator::Exact, Estimator::Variational] {
        let config = ObjectiveConfig { estimator: Some(estimator), ..by_score.clone() };
        let answer = coefficients(&config, &group(&[0.1; 3], &[0.0, 1.0, 0.3])).unwrap();
        assert!(answer.metrics.unwrap().zero_variance && answer.samples == [0.0; 3], "{answer:?}");
    }
    // A single sample is compared with nothing: REINFORCE.
    let single = coefficients(&ObjectiveConfig::new(Kind::Rl, None), &group(&[0.25], &[0.25])).unwrap();
    assert!(single.samples == [0.25] && !single.metrics.unwrap().zero_variance);
}

#[test]
fn thresholds_that_define_nothing_are_refused() {
    let with = |kind, threshold| ObjectiveConfig { pass_threshold: Some(threshold), ..config(kind, 2) };
    for kind in [Kind::Rl, Kind::BonRlb, Kind::BonRlbP, Kind::MaxRl, Kind::BonSft] {
        for threshold in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let error = with(kind, threshold).validate().unwrap_err();
            assert!(matches!(error, ObjectiveError::PassThreshold { .. }), "{kind} {threshold}: {error}");
        }
    }
    for kind in [Kind::BonRlb, Kind::BonRlbP, Kind::MaxRl] {
        for threshold in [-1.0, 0.0, 1.000_1] {
            let error = with(kind, threshold).validate().unwrap_err().to_string();
            assert!(error.ends_with("above 0 and at most 1 where rewards are 0 and 1"), "{error}");
        }
        with(kind, 1.0).validate().unwrap();
    }
    with(Kind::Rl, -7.0).validate().unwrap();
}

#[test]
fn what_could_not_be_judged_gets_the_least() {
    let x = Some;
    for (given, threshold, scores, rewards) in [
        (&[x(1.0), None, x(-1.0)][..], 0.5, &[1.0, -1.0, -1.0][..], &[1.0, -1.0, -1.0][..]),
        (&[None, x(0.25), x(1.0)], 0.5, &[0.0, 0.25, 1.0], &[0.0, 0.25, 1.0]),
        (&[None, None], 0.5, &[0.0, 0.0], &[0.0, 0.0]),
        (&[x(3.0), None, x(7.0)], 0.5, &[3.0, 0.0, 7.0], &[3.0, 0.0, 7.0]),
        (&[x(-2.0), x(-5.0), None], -3.0, &[-2.0, -5.0, -5.0], &[-2.0, -5.0, -5.0]),
        // 0 is the best there is, and passes: what nobody judged does not.
        (&[x(0.0), None, x(0.0)], 0.0, &[0.0; 3], &[0.0, 0.0f64.next_down(), 0.0]),
        (&[None, x(-2.0)], -3.0, &[-2.0, -2.0], &[(-3.0f64).next_down(), -2.0]),
    ] {
        let group = ScoredGroup::judged(given, given, threshold);
        assert_eq!((&*group.scores, &*group.rewards), (scores, rewards), "{given:?} at {threshold}");
    }
}

/// In every objective a response that could not be judged weighs what the worst one weighs, or less.
#[test]
fn no_objective_pays_for_what_could_not_be_judged() {
    let scores = [Some(1.0), Some(-1.0), None, Some(0.5), Some(-1.0), Some(1.0)];
    let binary = [Some(1.0), Some(0.0), None, Some(0.0), Some(0.0), Some(1.0)];
    for kind in [
        Kind::Rl,
        Kind::BonRl,
        Kind::BonRlV,
        Kind::BonRlS,
        Kind::PassAtN,
        Kind::BonRlb,
        Kind::BonRlbP,
        Kind::BonSft,
        Kind::Pkpo,
        Kind::MaxRl,
        Kind::Grpo,
    ] {
        let values = if kind.objective().binary { &binary } else { &scores };
        let group = ScoredGroup {
            expert_score: (kind == Kind::BonSft).then_some(1.0),
            ..ScoredGroup::judged(values, values, 0.5)
        };
        let estimators = match kind {
            Kind::BonRl | Kind::BonRlV | Kind::BonRlS => {
                &[Some(Estimator::Exact), Some(Estimator::Variational)][..]
            }
            _ => &[None],
        };
        for &estimator in estimators {
            let settings = ObjectiveConfig { estimator, ..config(kind, 2) };
            let settings = match kind {
                Kind::BonRl => ObjectiveConfig {
                    selector: Some(Signal::Verifier),
                    reward: Some(Signal::Environment),
                    ..settings
                },
                _ => settings,
            };
            let c = coefficients(&settings, &group).unwrap().samples;
            assert!(c[2] == c[1] && c[2] == c[4], "{kind} {estimator:?}: {c:?}");
        }
    }
}
