//! Evaluation: the estimators against brute force over all N-subsets, the intervals and the tables.

use approx::{assert_abs_diff_eq, assert_relative_eq};
use bon_engine::eval::estimators::{answer_counts, best_of_n, entropy, majority_at_n, pass_at_n};
use bon_engine::eval::{EvalError, Problem, Report, Sample, evaluate};
use bon_engine::rng::{Domain, Stream};
use std::collections::BTreeMap;

fn sample(score: f64, correct: bool, answer: &str) -> Sample {
    let answer = (!answer.is_empty()).then(|| answer.to_owned());
    Sample { score, correct, answer }
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
    }
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

N  pass@N  best-of-N  majority@N
1   0.250      0.250       0.250
2   0.500      0.500       0.250

answer entropy (nats)  0.562
     distinct answers  2.000
 share without answer  0.000
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

                                     before                 after               difference
answer entropy (nats)  0.562 [0.562, 0.562]  0.562 [0.562, 0.562]  +0.000 [+0.000, +0.000]
     distinct answers  2.000 [2.000, 2.000]  2.000 [2.000, 2.000]  +0.000 [+0.000, +0.000]
 share without answer  0.000 [0.000, 0.000]  0.000 [0.000, 0.000]  +0.000 [+0.000, +0.000]

pass@N: no change beyond the interval at any N
best-of-N: no change beyond the interval at any N
majority@N: gain beyond the interval at N = 4
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
