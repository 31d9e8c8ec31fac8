//! Evaluation: the estimators against brute force over all N-subsets, the intervals and the tables.

use approx::{assert_abs_diff_eq, assert_relative_eq};
use bon_engine::eval::estimators::{answer_counts, best_of_n, entropy, majority_at_n, pass_at_n};
use bon_engine::eval::scaling::{fit, predicted};
use bon_engine::eval::{
    EvalError, Examples, Grid, Judged, Problem, Provenance, Report, Sample, Why, evaluate,
    weighted_majority_at_n,
};
use bon_engine::rng::{Domain, Stream};
use std::collections::BTreeMap;

fn sample(score: f64, correct: bool, answer: &str) -> Sample {
    let answer = (!answer.is_empty()).then(|| answer.to_owned());
    Sample { score, correct, answer, ..Sample::default() }
}

/// Ties in score, ties in votes, samples without an answer, and an answer ("c") that is right only sometimes.
fn pool() -> Vec<Sample> {
    vec![
        sample(0.5, true, "a"),
        sample(1.0, false, "b"),
        sample(1.0, true, "a"),
        sample(0.5, false, ""),
        sample(-2.0, false, "b"),
        sample(1.0, true, "c"),
        sample(0.0, false, "c"),
        sample(2.0, false, ""),
        sample(0.25, false, "d"),
    ]
}

/// Mean of `f` over the `n`-subsets of the pool.
fn over_subsets(pool: &[Sample], n: usize, f: impl Fn(&[&Sample]) -> f64) -> f64 {
    let values: Vec<f64> = (0u32..1 << pool.len())
        .filter(|mask| mask.count_ones() as usize == n)
        .map(|mask| {
            let subset: Vec<&Sample> =
                pool.iter().enumerate().filter(|(i, _)| mask >> i & 1 == 1).map(|(_, s)| s).collect();
            f(&subset)
        })
        .collect();
    values.iter().sum::<f64>() / values.len() as f64
}

fn share_correct(samples: &[&Sample]) -> f64 {
    samples.iter().filter(|s| s.correct).count() as f64 / samples.len() as f64
}

#[test]
fn estimators_are_means_over_all_subsets() {
    let pool = pool();
    let correct = pool.iter().filter(|s| s.correct).count();
    let (answers, unanswered) = answer_counts(&pool);
    assert_eq!((answers.len(), unanswered), (4, 2));
    for n in 1..=pool.len() {
        let pass = over_subsets(&pool, n, |s| f64::from(u8::from(s.iter().any(|s| s.correct))));
        assert_abs_diff_eq!(pass_at_n(pool.len(), correct, n), pass, epsilon = 1e-14);

        let best = over_subsets(&pool, n, |s| {
            let top = s.iter().map(|s| s.score).fold(f64::NEG_INFINITY, f64::max);
            share_correct(&s.iter().copied().filter(|s| s.score == top).collect::<Vec<_>>())
        });
        assert_abs_diff_eq!(best_of_n(&pool, n), best, epsilon = 1e-14);

        let majority = over_subsets(&pool, n, |s| {
            let mut votes: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
            for &sample in s {
                if let Some(answer) = &sample.answer {
                    votes.entry(answer).or_default().push(sample);
                }
            }
            let most = votes.values().map(Vec::len).max().unwrap_or(0);
            let winners: Vec<f64> =
                votes.values().filter(|v| v.len() == most).map(|v| share_correct(v)).collect();
            if winners.is_empty() { 0.0 } else { winners.iter().sum::<f64>() / winners.len() as f64 }
        });
        assert_abs_diff_eq!(majority_at_n(&answers, unanswered, n), majority, epsilon = 1e-12);

        let weighted = over_subsets(&pool, n, elected);
        assert_abs_diff_eq!(weighted_majority_at_n(&pool, n, 0, 0), weighted, epsilon = 1e-12);
    }
}

/// The chance that the answer with the largest total score is right. Scores are multiples of 1/8 here, so that totals are
/// exact.
fn elected(samples: &[&Sample]) -> f64 {
    let mut votes: BTreeMap<&str, Vec<&Sample>> = BTreeMap::new();
    for &sample in samples {
        if let Some(answer) = &sample.answer {
            votes.entry(answer).or_default().push(sample);
        }
    }
    let total = |votes: &Vec<&Sample>| votes.iter().map(|s| s.score).sum::<f64>();
    let most = votes.values().map(total).fold(f64::NEG_INFINITY, f64::max);
    let winners: Vec<f64> = votes.values().filter(|v| total(v) == most).map(|v| share_correct(v)).collect();
    if winners.is_empty() { 0.0 } else { winners.iter().sum::<f64>() / winners.len() as f64 }
}

/// Pools of all kinds: scores of one sign and of both, of two levels and of many, answers that are right now and then.
#[test]
fn weighted_majorities_are_means_over_all_subsets() {
    let mut stream = Stream::new(11, Domain::Shuffle, 0);
    let mut below = |n: u64| stream.below(n);
    for round in 0..60 {
        let size = 3 + below(8) as usize;
        let (levels, answers) = (2 + below(14), 1 + below(4));
        let shift = if round % 3 == 0 { 0.0 } else { below(levels) as f64 };
        let pool: Vec<Sample> = (0..size)
            .map(|_| {
                let score = (below(levels) as f64 - shift) / 8.0;
                let answer = below(answers + 1);
                let answer = if answer == 0 { String::new() } else { format!("a{answer}") };
                sample(score, below(3) == 0, &answer)
            })
            .collect();
        for n in 1..=size {
            let want = over_subsets(&pool, n, elected);
            assert_abs_diff_eq!(weighted_majority_at_n(&pool, n, 0, 0), want, epsilon = 1e-12);
        }
    }
}

/// 0.1 + 0.2 is not 0.3 in f64, and a verifier that gives such scores means that they tie.
#[test]
fn totals_tie_as_decimals_do() {
    for scale in [1.0, 1e-3, 7.0, 1e9, -1.0] {
        let pool = [(0.1, false, "a"), (0.2, false, "a"), (0.3, true, "b")]
            .map(|(score, correct, answer)| sample(score * scale, correct, answer));
        assert_abs_diff_eq!(weighted_majority_at_n(&pool, 3, 0, 0), 0.5, epsilon = 1e-12);
    }
    // Scores beyond all bounds are compared, too.
    let pool = [sample(f64::MAX, true, "a"), sample(-f64::MAX, false, "b"), sample(1e300, false, "b")];
    assert_eq!(weighted_majority_at_n(&pool, 3, 0, 0), 1.0);
    let tiny = [sample(5e-324, true, "a"), sample(0.0, false, "b")];
    assert!((0.5..=1.0).contains(&weighted_majority_at_n(&tiny, 2, 0, 0)));
}

#[test]
fn weights_that_say_nothing_or_all_give_the_votes_or_pass_at_n() {
    let answers = [3, 2, 1, 1, 1, 2, 0, 1, 2, 3, 1, 0];
    let pool = |score: fn(u32) -> f64| -> Vec<Sample> {
        let name = |a| if a == 0 { String::new() } else { format!("{a}") };
        answers.iter().map(|&a| sample(score(a), a == 2, &name(a))).collect()
    };
    let (even, perfect) = (pool(|_| 0.7), pool(|a| if a == 2 { 1.0 } else { 0.0 }));
    let (counts, unanswered) = answer_counts(&even);
    for n in 1..=answers.len() {
        let votes = majority_at_n(&counts, unanswered, n);
        assert_abs_diff_eq!(weighted_majority_at_n(&even, n, 0, 0), votes, epsilon = 1e-12);
        let pass = pass_at_n(answers.len(), 3, n);
        assert_abs_diff_eq!(weighted_majority_at_n(&perfect, n, 0, 0), pass, epsilon = 1e-12);
    }
}

/// Totals without end are sampled: unbiased, the same for a seed, and other subsets for another one.
#[test]
fn weighted_majorities_of_endless_totals_are_near_and_repeat() {
    let pool: Vec<Sample> = (0..19)
        .map(|i| {
            // Sums of powers of two are all different, and exact.
            let score = f64::from(1u32 << i) / 1024.0;
            sample(score, i % 3 == 0 || i == 14, if i % 9 == 4 { "few" } else { "many" })
        })
        .collect();
    for n in [9, 17] {
        let want = over_subsets(&pool, n, elected);
        let found = weighted_majority_at_n(&pool, n, 5, 3);
        // Five standard errors of 2048 subsets.
        assert_abs_diff_eq!(found, want, epsilon = 5.0 * 0.5 / 2048f64.sqrt());
        assert_eq!(found, weighted_majority_at_n(&pool, n, 5, 3));
        assert_ne!(found, weighted_majority_at_n(&pool, n, 6, 3), "the seed counts");
        assert_ne!(found, weighted_majority_at_n(&pool, n, 5, 4), "the problem counts");
    }
    assert_eq!(weighted_majority_at_n(&pool, 19, 5, 3), over_subsets(&pool, 19, elected));
}

#[test]
fn weighted_majority_of_large_pools_is_quick_and_a_probability() {
    // A verifier of two levels, which is wrong now and then.
    let pool: Vec<Sample> = (0..512)
        .map(|i| {
            sample(
                f64::from(u8::from(i % 5 < 3)),
                i % 7 < 3,
                &format!("{}", if i % 7 < 3 { 0 } else { i % 11 }),
            )
        })
        .collect();
    let curve = [1, 4, 32, 256, 512].map(|n| weighted_majority_at_n(&pool, n, 0, 0));
    assert!(curve.iter().all(|p| (0.0..=1.0 + 1e-9).contains(p)), "{curve:?}");
    assert!(curve[4] >= curve[0], "{curve:?}");
}

#[test]
fn fits_find_the_curves_that_points_were_taken_from() {
    let ns = [1, 2, 4, 8, 16, 32, 64];
    for (a, b) in [(-1.7, -0.6), (-0.02, -0.3), (-5.0, -1.2), (-0.9, 0.0)] {
        let pass = ns.map(|n| predicted((a, b), n));
        let found = fit(&ns, &pass).unwrap();
        assert_relative_eq!(found.0, a, max_relative = 1e-9);
        assert_abs_diff_eq!(found.1, b, epsilon = 1e-9);
    }
    // What never or always passes has no place on the line.
    let mut pass = ns.map(|n| predicted((-1.7, -0.6), n));
    (pass[0], pass[5], pass[6]) = (0.0, 1.0, 1.0 - 1e-15);
    assert_abs_diff_eq!(fit(&ns, &pass).unwrap().1, -0.6, epsilon = 1e-9);
    pass[4] = 1.0;
    assert!(fit(&ns, &pass).is_some(), "three are left");
    pass[3] = 1.0;
    assert_eq!(fit(&ns, &pass), None, "two are left");
    assert_eq!(fit(&[], &[]), None);
}

/// Weighted least squares by its normal equations, written out.
#[test]
fn fits_are_weighted_least_squares() {
    let (ns, pass) = ([1usize, 3, 8, 20, 50], [0.1, 0.35, 0.5, 0.9, 0.999]);
    let point = |i: usize| {
        let (x, p): (f64, f64) = ((ns[i] as f64).ln(), pass[i]);
        (x, (-p.ln()).ln(), p * p.ln() * p.ln() / (1.0 - p))
    };
    let sum = |f: fn((f64, f64, f64)) -> f64| (0..5).map(point).map(f).sum::<f64>();
    let (w, wx, wy) = (sum(|(_, _, w)| w), sum(|(x, _, w)| w * x), sum(|(_, y, w)| w * y));
    let (wxx, wxy) = (sum(|(x, _, w)| w * x * x), sum(|(x, y, w)| w * x * y));
    let b = (w * wxy - wx * wy) / (w * wxx - wx * wx);
    let (found_a, found_b) = fit(&ns, &pass).unwrap();
    assert_relative_eq!(found_b, b, max_relative = 1e-10);
    assert_relative_eq!(found_a, -((wy - b * wx) / w).exp(), max_relative = 1e-10);
}

#[test]
fn reports_have_fits_with_residuals_and_intervals() {
    // Pass rates that differ from problem to problem: the mean over them is no exact curve.
    let mixed: Vec<Problem> = (0..50)
        .map(|i| {
            let samples = (0..32).map(|j| sample(0.0, j < 1 + i % 9, "a")).collect();
            Problem { id: format!("p{i}"), samples }
        })
        .collect();
    let ns = [1, 2, 4, 8, 16];
    let report = evaluate(&mixed, &ns, 7).unwrap();
    let scaling = report.scaling.clone().unwrap();
    let pass: Vec<f64> = report.figures.pass_at_n.iter().map(|p| p.mean).collect();
    assert_eq!(fit(&ns, &pass), Some((scaling.a.mean, scaling.b.mean)));
    for estimate in [scaling.a, scaling.b] {
        assert!(
            estimate.ci95.is_some_and(|[lo, hi]| lo < estimate.mean && estimate.mean < hi),
            "{estimate:?}"
        );
    }
    for (point, (n, p)) in scaling.points.iter().zip(ns.iter().zip(&pass)) {
        assert_eq!(point.n, *n);
        assert_relative_eq!(
            point.fitted,
            predicted((scaling.a.mean, scaling.b.mean), *n),
            max_relative = 1e-12
        );
        let line = (-point.fitted.ln()).ln();
        assert_abs_diff_eq!((-p.ln()).ln() - line, point.residual, epsilon = 1e-9);
    }
    assert!(scaling.points.iter().any(|p| p.residual.abs() > 1e-3), "{scaling:?}");
    assert_eq!(evaluate(&problems(&[0, 0]), &[1, 2, 3], 0).unwrap().scaling, None, "nothing passes");
}

/// A report at a temperature.
fn at_temperature(correct: &[usize], temperature: f64) -> Report {
    let settings = BTreeMap::from([("generate.temperature".to_owned(), format!("{temperature:?}"))]);
    let provenance = Some(Provenance { settings, ..Provenance::default() });
    Report { provenance, ..evaluate(&problems(correct), &[1, 4], 2).unwrap() }
}

#[test]
fn the_best_temperature_is_told_for_each_n() {
    // At N = 1 the colder one is the better, at N = 4 the hotter one, in every resample.
    let (cold, hot) = (vec![4, 0, 4, 0, 4, 4, 4, 4], vec![1; 8]);
    let grid = Grid::new(vec![at_temperature(&hot, 1.5), at_temperature(&cold, 0.5)]).unwrap();
    assert_eq!(grid.temperatures(), [0.5, 1.5], "in their order");
    let best: Vec<(usize, f64)> = grid.best.iter().map(|b| (b.n, b.pass_at_n.temperature)).collect();
    assert_eq!(best, [(1, 0.5), (4, 1.5)]);
    assert!(grid.best[0].pass_at_n.share > 0.95, "{:?}", grid.best);
    assert_eq!(grid.best[0].pass_at_n.figure.mean, 0.75);
    assert!(
        grid.best[1].pass_at_n.share > 0.8,
        "ties in resamples without the two failures: {:?}",
        grid.best
    );
    // Of equal ones the lower, which is the best in half of the resamples' ties.
    let grid = Grid::new(vec![at_temperature(&hot, 1.0), at_temperature(&hot, 2.0)]).unwrap();
    let best = grid.best[0].pass_at_n;
    assert_eq!(best.temperature, 1.0);
    assert_abs_diff_eq!(best.share, 0.5, epsilon = 1e-9);
    // Alone there is nothing to choose.
    assert!(Grid::new(vec![at_temperature(&hot, 1.0)]).unwrap().best.is_empty());
}

/// The share counts resamples under the seed, those that intervals come from.
#[test]
fn shares_are_counted_over_the_resamples_of_intervals() {
    let (a, b) = ([3, 0, 2, 4, 1, 1, 0, 2, 3], [2, 2, 1, 4, 2, 0, 1, 1, 2]);
    let grid = Grid::new(vec![at_temperature(&a, 0.7), at_temperature(&b, 1.0)]).unwrap();
    let mut stream = Stream::new(2, Domain::Bootstrap, 0);
    let mut wins = 0.0;
    for _ in 0..10_000 {
        let picked: Vec<usize> = (0..9).map(|_| stream.below(9) as usize).collect();
        let sum = |counts: &[usize]| picked.iter().map(|&i| counts[i]).sum::<usize>();
        wins += match sum(&a).cmp(&sum(&b)) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        };
    }
    let best = grid.best[0].pass_at_n;
    assert_eq!(best.temperature, 0.7);
    assert_abs_diff_eq!(best.share, wins / 10_000.0, epsilon = 1e-9);
}

#[test]
fn grids_are_of_one_kind_and_survive_json() {
    let (cold, hot) = (at_temperature(&[1, 2], 0.5), at_temperature(&[2, 2], 1.0));
    let grid = Grid::new(vec![cold.clone(), hot.clone()]).unwrap();
    assert_eq!(Grid::from_json(&grid.to_json().unwrap()).unwrap(), grid);
    let table = grid.to_table();
    for words in
        ["\nN               T = 0.5                 T = 1\n", "weighted majority@N", "pass@N best at T"]
    {
        assert!(table.contains(words), "no {words:?} in {table}");
    }
    // One temperature is a report, as other readers know it.
    let single = Grid::new(vec![cold.clone()]).unwrap();
    let json = single.to_json().unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), cold);
    assert_eq!(Grid::from_json(&json).unwrap(), single);
    let refused = |reports: Vec<Report>| Grid::new(reports).unwrap_err();
    assert_eq!(refused(vec![]), EvalError::NoProblems);
    assert_eq!(refused(vec![hot.clone(), hot.clone()]), EvalError::Temperatures);
    let silent = Report { provenance: None, ..hot.clone() };
    assert_eq!(refused(vec![silent, hot.clone()]), EvalError::Temperatures);
    assert!(matches!(refused(vec![hot, at_temperature(&[1], 0.1)]), EvalError::DifferentProblems { .. }));
    for wrong in ["[1, 2]", "{}", "{\"reports\": []}", "{\"reports\": 3}", "nonsense"] {
        assert!(Grid::from_json(wrong).is_err(), "{wrong}");
    }
}

/// What a version wrote that knew of no weighted majority and no lengths.
#[test]
fn earlier_reports_are_read_and_compared_in_what_they_say() {
    let mut old = serde_json::to_value(evaluate(&problems(&[1, 3]), &[1, 4], 0).unwrap()).unwrap();
    let young = ["weighted_majority_at_n", "response_length", "truncated"];
    let strip = |object: &mut serde_json::Value| {
        young.iter().for_each(|name| drop(object.as_object_mut().unwrap().remove(*name)));
    };
    strip(&mut old["figures"]);
    old["problems"].as_array_mut().unwrap().iter_mut().for_each(strip);
    let old: Report = serde_json::from_value(old).unwrap();
    assert!(!old.to_table().contains("weighted") && !old.to_table().contains("truncated"));
    let new = evaluate(&problems(&[2, 3]), &[1, 2, 4], 0).unwrap();
    let change = old.compare(&new).unwrap();
    assert_eq!(change.ns, [1, 4], "the N that both list");
    assert_eq!(change.figures.pass_at_n[1].after, new.figures.pass_at_n[2]);
    assert_eq!(change.figures.answer_entropy.after, new.figures.answer_entropy);
    assert!(change.figures.weighted_majority_at_n.is_empty() && change.figures.truncated.is_none());
    assert_eq!(new.compare(&old).unwrap().ns, [1, 4]);
}

/// A pool in which the verifier prefers `chosen` samples that are wrong.
fn judged(right: usize, wrong: usize, chosen: usize) -> Vec<Judged> {
    let sample = |i: usize| {
        let correct = i < right;
        let score = if i >= right + wrong - chosen { 2.0 } else { f64::from(u8::from(correct)) };
        Judged {
            text: format!("text {i}"),
            ids: vec![i as u32],
            rewarded: true,
            reward: f64::from(u8::from(correct)),
            sample: sample(score, correct, "a"),
        }
    };
    (0..right + wrong).map(sample).collect()
}

#[test]
fn examples_are_the_most_telling_whatever_the_order() {
    let pools = [
        judged(2, 2, 0),
        judged(0, 4, 0),
        judged(4, 0, 0),
        judged(3, 1, 1),
        judged(0, 4, 2),
        judged(1, 3, 1),
    ];
    let list = |order: &[usize], each: usize| {
        let mut examples = Examples::new(each);
        order.iter().for_each(|&i| examples.offer(i + 1, &format!("prompt {i}"), "a", &pools[i]));
        examples.into_list()
    };
    let found = list(&[0, 1, 2, 3, 4, 5], 2);
    let told: Vec<(Why, usize)> = found.iter().map(|e| (e.why, e.number)).collect();
    assert_eq!(
        told,
        [(Why::Disagreement, 4), (Why::Disagreement, 6), (Why::Worst, 2), (Why::Worst, 5), (Why::Best, 3)],
        "the second best is told of already"
    );
    assert_eq!(list(&[5, 4, 3, 2, 1, 0], 2), found);
    assert!(list(&[0, 1, 2], 0).is_empty());
    // The verifier's choice, and the best that is right.
    let responses = &found[0].responses;
    assert_eq!((responses[0].correct, responses[0].score, responses[1].correct), (false, 2.0, true));
    assert_eq!((found[0].pass_rate, found[0].best_of_all, found[0].samples), (0.75, 0.0, 4));
    // Long texts are cut between characters, and equal ones counted.
    let mut long = judged(0, 3, 0);
    long.iter_mut().for_each(|j| j.text = "\u{e9}".repeat(4000));
    let mut examples = Examples::new(1);
    examples.offer(1, "p", "a", &long);
    let shown = &examples.into_list()[0].responses;
    assert_eq!((shown.len(), shown[0].count, shown[0].text.left_out), (1, 3, 2500));
}

/// Reference values from exact rational arithmetic.
#[test]
fn pass_at_n_of_large_pools() {
    for (m, c, n, exact) in [
        (4096, 1, 1, 0.000_244_140_625),
        (4096, 1, 64, 0.015_625),
        (4096, 2000, 3, 0.866_097_005_120_957_9),
        (4096, 7, 2048, 0.992_227_515_172_305_9),
        (4096, 3000, 1096, 1.0),
        (4096, 0, 4096, 0.0),
        (10, 4, 7, 1.0),
        (10, 10, 1, 1.0),
    ] {
        assert_relative_eq!(pass_at_n(m, c, n), exact, max_relative = 1e-13);
    }
}

#[test]
fn majority_of_large_pools_is_a_probability() {
    // 300 right answers against 200 equal wrong ones and 12 singles: the majority grows more reliable with N.
    let mut pool = vec![sample(0.0, true, "right"); 300];
    pool.extend(vec![sample(0.0, false, "wrong"); 200]);
    pool.extend((0..12).map(|i| sample(0.0, false, &format!("odd {i}"))));
    let (answers, unanswered) = answer_counts(&pool);
    let at = |n| majority_at_n(&answers, unanswered, n);
    assert_relative_eq!(at(1), 300.0 / 512.0, max_relative = 1e-10);
    assert_relative_eq!(at(512), 1.0, max_relative = 1e-10);
    let curve: Vec<f64> = [1, 3, 15, 63, 255].map(at).to_vec();
    assert!(curve.is_sorted() && curve[4] > 0.99 && curve[4] <= 1.0 + 1e-10, "{curve:?}");
}

#[test]
fn diversity_of_answers() {
    let entropy_of = |answers: &[&str]| {
        entropy(&answer_counts(&answers.iter().map(|a| sample(0.0, false, a)).collect::<Vec<_>>()).0)
    };
    assert_eq!(entropy_of(&[]), 0.0);
    assert_eq!(entropy_of(&["", ""]), 0.0);
    assert_eq!(entropy_of(&["x", "x", ""]), 0.0);
    assert_abs_diff_eq!(entropy_of(&["x", "y", "z", "w"]), 4f64.ln(), epsilon = 1e-15);
    let expected = 0.75 * (4.0f64 / 3.0).ln() + 0.25 * 4f64.ln();
    assert_abs_diff_eq!(entropy_of(&["x", "x", "y", "x"]), expected, epsilon = 1e-15);
}

/// `correct[i]` of 4 samples of problem i are correct, and score highest.
fn problems(correct: &[usize]) -> Vec<Problem> {
    correct
        .iter()
        .enumerate()
        .map(|(i, &c)| Problem {
            id: format!("p{i}"),
            samples: (0..4).map(|j| sample(-(j as f64), j < c, if j < c { "yes" } else { "no" })).collect(),
        })
        .collect()
}

#[test]
fn intervals_cover_as_the_normal_one_does() {
    // 200 problems, half at accuracy 1 and half at 0: standard error 0.5 / sqrt(200).
    let counts: Vec<usize> = (0..200).map(|i| 4 * (i % 2)).collect();
    let report = evaluate(&problems(&counts), &[1], 3).unwrap();
    let pass = report.figures.pass_at_n[0];
    assert_abs_diff_eq!(pass.mean, 0.5, epsilon = 1e-12);
    let [lo, hi] = pass.ci95.unwrap();
    let half = 1.96 * 0.5 / 200f64.sqrt();
    assert_abs_diff_eq!(lo, 0.5 - half, epsilon = 0.006);
    assert_abs_diff_eq!(hi, 0.5 + half, epsilon = 0.006);
    assert_eq!(report, evaluate(&problems(&counts), &[1], 3).unwrap(), "same seed, same bits");
    let figures = |seed| {
        let counts: Vec<usize> = (0..37).map(|i| i * i % 5).collect();
        evaluate(&problems(&counts), &[1, 2, 3], seed).unwrap().figures
    };
    assert_ne!(figures(3), figures(4), "the seed is used");
    let single = evaluate(&problems(&[2]), &[1], 0).unwrap();
    assert_eq!(single.figures.pass_at_n[0].ci95, None);
}

/// The ends of an interval as their definition has them: 10,000 resamples of the rows under the seed, of which 2.5 % are cut
/// off on either side.
fn percentile_interval(rows: &[f64], seed: u64) -> [f64; 2] {
    let mut stream = Stream::new(seed, Domain::Bootstrap, 0);
    let n = rows.len();
    let mut means: Vec<f64> = (0..10_000)
        .map(|_| (0..n).map(|_| rows[stream.below(n as u64) as usize]).sum::<f64>() / n as f64)
        .collect();
    means.sort_by(f64::total_cmp);
    [means[250], means[9_749]]
}

#[test]
fn intervals_are_percentiles_of_resamples_under_the_first_reports_seed() {
    // Shares of different numbers of samples, so that no two resamples have one mean.
    let counts = |step: usize| (0..41).map(move |i| (i * i * step % (i + 2), i + 2));
    let problem = |(i, (correct, samples)): (usize, (usize, usize))| Problem {
        id: format!("p{i}"),
        samples: (0..samples).map(|j| sample(0.0, j < correct, "a")).collect(),
    };
    let reports = [(1, 5), (3, 6)].map(|(step, seed)| {
        let problems: Vec<Problem> = counts(step).enumerate().map(problem).collect();
        evaluate(&problems, &[1], seed).unwrap()
    });
    let shares = [1, 3].map(|step| counts(step).map(|(c, of)| c as f64 / of as f64).collect::<Vec<f64>>());
    let close = |found: Option<[f64; 2]>, want: [f64; 2]| {
        let found = found.unwrap();
        assert_abs_diff_eq!(found[0], want[0], epsilon = 1e-12);
        assert_abs_diff_eq!(found[1], want[1], epsilon = 1e-12);
    };
    close(reports[0].figures.pass_at_n[0].ci95, percentile_interval(&shares[0], 5));
    let change = reports[0].compare(&reports[1]).unwrap().figures.pass_at_n[0];
    let gains: Vec<f64> = shares[1].iter().zip(&shares[0]).map(|(after, before)| after - before).collect();
    close(change.difference.ci95, percentile_interval(&gains, 5));
}

#[test]
fn a_change_is_one_where_its_interval_says_so() {
    let report = |counts: &[usize]| evaluate(&problems(counts), &[1], 0).unwrap();
    let told = |before: &[usize], after: &[usize]| {
        let table = report(before).compare(&report(after)).unwrap().to_table();
        table.lines().find_map(|line| line.strip_prefix("pass@N: ").map(str::to_owned)).unwrap()
    };
    let (few, many) = (vec![1; 30], vec![2; 30]);
    assert_eq!(told(&few, &many), "gain beyond the interval at N = 1");
    assert_eq!(told(&many, &few), "loss beyond the interval at N = 1");
    // Half of the problems gain and half lose.
    let mixed: Vec<usize> = (0..30).map(|i| 1 + 2 * (i % 2)).collect();
    assert_eq!(told(&many, &mixed), "no change beyond the interval at any N");
}

#[test]
fn unanswered_is_a_share() {
    let samples = vec![
        sample(0.0, false, ""),
        sample(0.0, false, "a"),
        sample(0.0, false, "b"),
        sample(0.0, true, "c"),
    ];
    let report = evaluate(&[Problem { id: "one".into(), samples }], &[1], 0).unwrap();
    assert_eq!(report.figures.unanswered.mean, 0.25);
}

#[test]
fn differences_are_paired() {
    // Problems differ widely, but each gains exactly a quarter.
    let before: Vec<usize> = (0..60).map(|i| i % 4).collect();
    let after: Vec<usize> = before.iter().map(|c| c + 1).collect();
    let before = evaluate(&problems(&before), &[1, 2], 0).unwrap();
    let after = evaluate(&problems(&after), &[1, 2], 0).unwrap();
    let change = before.compare(&after).unwrap();
    let at_1 = change.figures.pass_at_n[0];
    assert_eq!(at_1.before, before.figures.pass_at_n[0]);
    assert_eq!(at_1.after, after.figures.pass_at_n[0]);
    assert_abs_diff_eq!(at_1.difference.mean, 0.25, epsilon = 1e-12);
    let [lo, hi] = at_1.difference.ci95.unwrap();
    assert!(hi - lo < 1e-12, "nothing varies between the pairs: {lo} {hi}");
    let [lo, hi] = at_1.before.ci95.unwrap();
    assert!(hi - lo > 0.1, "problems vary: {lo} {hi}");
    // At N = 2 the gain depends on the problem: 1/2, 1/3, 1/6, 0 in equal parts.
    let at_2 = change.figures.pass_at_n[1].difference;
    assert_abs_diff_eq!(at_2.mean, 0.25, epsilon = 1e-12);
    assert!(at_2.ci95.is_some_and(|[lo, hi]| lo < 0.25 && hi > 0.25 && hi - lo < 0.12));
}

#[test]
fn reports_survive_json() {
    let report = evaluate(&problems(&[0, 1, 3]), &[1, 4], 9).unwrap();
    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
}

#[test]
fn tables_read_like_this() {
    let report = evaluate(&problems(&[1]), &[1, 2], 0).unwrap();
    assert_eq!(
        report.to_table(),
        "problems: 1, samples each: 4; brackets: 95 % confidence intervals over problems

N  pass@N  best-of-N  majority@N  weighted majority@N
1   0.250      0.250       0.250                0.250
2   0.500      0.500       0.250                0.500

   answer entropy (nats)  0.562
        distinct answers  2.000
    share without answer  0.000
response length (tokens)  0.000
         share truncated  0.000
"
    );
    let before = evaluate(&problems(&[1, 1]), &[4], 0).unwrap();
    let after = evaluate(&problems(&[3, 3]), &[4], 0).unwrap();
    assert_eq!(
        before.compare(&after).unwrap().to_table(),
        "problems: 2; brackets: 95 % confidence intervals over problems, paired for differences

pass@N
N                before                 after               difference
4  1.000 [1.000, 1.000]  1.000 [1.000, 1.000]  +0.000 [+0.000, +0.000]

best-of-N
N                before                 after               difference
4  1.000 [1.000, 1.000]  1.000 [1.000, 1.000]  +0.000 [+0.000, +0.000]

majority@N
N                before                 after               difference
4  0.000 [0.000, 0.000]  1.000 [1.000, 1.000]  +1.000 [+1.000, +1.000]

weighted majority@N
N                before                 after               difference
4  1.000 [1.000, 1.000]  0.500 [0.500, 0.500]  -0.500 [-0.500, -0.500]

                                        before                 after               difference
   answer entropy (nats)  0.562 [0.562, 0.562]  0.562 [0.562, 0.562]  +0.000 [+0.000, +0.000]
        distinct answers  2.000 [2.000, 2.000]  2.000 [2.000, 2.000]  +0.000 [+0.000, +0.000]
    share without answer  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]  +0.000 [+0.000, +0.000]
response length (tokens)  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]  +0.000 [+0.000, +0.000]
         share truncated  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]  +0.000 [+0.000, +0.000]

pass@N: no change beyond the interval at any N
best-of-N: no change beyond the interval at any N
majority@N: gain beyond the interval at N = 4
weighted majority@N: loss beyond the interval at N = 4
"
    );
}

#[test]
fn bad_input_is_refused() {
    assert_eq!(evaluate(&[], &[1], 0).unwrap_err(), EvalError::NoProblems);
    assert_eq!(evaluate(&problems(&[1]), &[], 0).unwrap_err(), EvalError::NoN);
    assert_eq!(evaluate(&problems(&[1]), &[2, 0], 0).unwrap_err(), EvalError::NoN);
    let small = EvalError::PoolTooSmall { problem: "p0".into(), n: 5, m: 4 };
    assert_eq!(evaluate(&problems(&[1]), &[1, 5], 0).unwrap_err(), small);
    let mut nan = problems(&[1, 1]);
    nan[1].samples[2].score = f64::INFINITY;
    let error = evaluate(&nan, &[1], 0).unwrap_err().to_string();
    assert_eq!(error, "problem `p1`: the score of sample 2 is inf, not a finite number");

    let report = |correct: &[usize], n| evaluate(&problems(correct), &[n], 0).unwrap();
    let error = report(&[1], 1).compare(&report(&[1], 2)).unwrap_err();
    assert_eq!(error, EvalError::DifferentN { before: vec![1], after: vec![2] });
    let error = report(&[1], 1).compare(&report(&[1, 2], 1)).unwrap_err();
    assert_eq!(error.to_string(), "the reports differ at problem 1: none before, `p1` after");
}
