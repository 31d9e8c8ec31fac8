//! What a report says of how it was made, and what becomes of that when two are compared.

use std::fs;

use serde_json::Value;

use crate::fixture::{Fixture, RUN, Ran};
use crate::judging::by_programs;

const EVAL: [&str; 6] = ["eval", "run.toml", "--samples", "4", "--set", "data.tasks=eval.jsonl"];

fn eval(f: &Fixture, more: &[&str]) -> Ran {
    f.run(&[&EVAL[..], more].concat())
}

fn report(f: &Fixture, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(f.path(name)).unwrap()).unwrap()
}

#[test]
fn a_report_says_what_made_it() {
    let f = Fixture::new();
    f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    let made = &report(&f, "r.json")["provenance"];
    let settings = &made["settings"];
    for (key, value) in [
        ("program", concat!("bon-engine ", env!("CARGO_PKG_VERSION"))),
        ("device", "cpu"),
        ("model", "model"),
        ("model.dtype", "f32"),
        ("model.compute", "f32"),
        ("data.tasks", "eval.jsonl"),
        ("data.prefix", "\"\""),
        ("data.template", "\"none\""),
        ("generate.temperature", "1.0"),
        ("generate.max_new_tokens", "4"),
        ("generate.stop", "[]"),
        ("train.seed", "0"),
        ("verifier.kind", "\"numeric\""),
        ("verifier.pick", "\"first\""),
        ("objective.pass_threshold", "0.5"),
    ] {
        assert_eq!(settings[key], value, "{key}: {settings}");
    }
    for key in ["model.weights", "model.config", "model.tokenizer", "data.other_fields"] {
        assert!(settings[key].as_str().unwrap().starts_with("crc32c "), "{key}: {settings}");
    }
    assert_eq!(made["answers"], serde_json::json!(["0", "1", "2", "3"]));
}

#[test]
fn a_comparison_of_like_with_like_has_nothing_to_say() {
    let f = Fixture::new();
    f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    let ran = eval(&f, &["--compare", "r.json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(!ran.stdout.contains("differs"), "{}", ran.stdout);
}

/// Each with what it changes, and what the comparison must name of it.
#[test]
fn every_difference_is_named() {
    let f = Fixture::new();
    crate::fixture::write_model(&f.path("copy"));
    crate::fixture::write_model(&f.path("other"));
    let weights = f.path("other/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).unwrap();
    // Another tensor than the last.
    crate::fixture::write_model(&f.path("another"));
    bytes[last] ^= 1;
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header + 2] ^= 1;
    fs::write(f.path("another/model.safetensors"), &bytes).unwrap();
    fs::copy(f.path("eval.jsonl"), f.path("elsewhere.jsonl")).unwrap();
    f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    for (more, named) in [
        (&["--set", "generate.temperature=0.1"][..], &["generate.temperature: 1.0 -> 0.1"][..]),
        (&["--set", "data.prefix=ab\ncd"], &["data.prefix: \"\" -> ", "ab", "cd"]),
        (&["--set", "data.suffix= ="], &["data.suffix: \"\" -> \" =\""]),
        (&["--set", "data.template=turn"], &["data.template: \"none\" -> \"turn\""]),
        (&["--set", "generate.stop=['1']"], &["generate.stop: [] -> [\"1\"]"]),
        (&["--set", "generate.top_k=3"], &["generate.top_k: 0 -> 3"]),
        (&["--set", "generate.max_new_tokens=3"], &["generate.max_new_tokens: 4 -> 3"]),
        (&["--set", "train.seed=7"], &["train.seed: 0 -> 7"]),
        (
            &["--dtype", "bf16"],
            &["model.dtype: f32 -> bf16", "model.compute: f32 -> bf16", "model.weights: crc32c "],
        ),
        (&["--dtype", "bf16", "--compute", "f32"], &["model.dtype: f32 -> bf16", "model.weights: crc32c "]),
        (
            &["--compute", "bf16"],
            &["model.dtype: f32 -> bf16", "model.compute: f32 -> bf16", "model.weights: crc32c "],
        ),
        (&["--model", "copy"], &["\n  model: model -> copy\n"]),
        (&["--model", "other"], &["\n  model: model -> other\n", "model.weights: crc32c "]),
        (&["--model", "another"], &["\n  model: model -> another\n", "model.weights: crc32c "]),
        (&["--tasks", "elsewhere.jsonl"], &["data.tasks: eval.jsonl -> elsewhere.jsonl"]),
    ] {
        let ran = eval(&f, &[more, &["--compare", "r.json"]].concat());
        assert_eq!(ran.code, Some(0), "{more:?}: {}", ran.stderr);
        let (list, _) = ran.stdout.split_once("\n\npass@N").unwrap();
        let (_, list) = list.split_once("\nwhat differs between the two:").unwrap();
        assert!(named.iter().all(|word| format!("{list}\n").contains(word)), "{more:?}: {list}");
        let count = match named.last() {
            Some(last) if last.starts_with("model.weights") => named.len(),
            _ => 1,
        };
        assert_eq!(list.lines().count() - 1, count, "{more:?}: {list}");
    }
}

#[test]
fn what_measures_otherwise_is_not_compared() {
    let f = Fixture::new();
    f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    let refused = |more: &[&str], words: &[&str]| {
        let ran = eval(&f, &[more, &["--compare", "r.json"]].concat());
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{more:?}: {}", ran.stderr);
        let start = "error: r.json: the two evaluations do not measure the same";
        assert!(ran.stderr.starts_with(start), "{more:?}: {}", ran.stderr);
        assert!(words.iter().all(|word| ran.stderr.contains(word)), "{words:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("model."), "{}", ran.stderr);
    };
    // All that differs is listed, what forbids the comparison first.
    f.write("run.toml", RUN.replace("kind = \"numeric\"\npick = \"first\"", "kind = \"exact\""));
    refused(
        &["--set", "generate.temperature=0.5"],
        &[
            "What differs:\n  verifier",
            "verifier.kind: \"numeric\" -> \"exact\"",
            "\n  generate.temperature: 1.0 -> 0.5",
        ],
    );
    f.write("run.toml", RUN);
    refused(&["--set", "verifier.pick=last"], &["verifier.pick: \"first\" -> \"last\""]);
    refused(&["--set", "verifier.absolute_tolerance=2"], &["verifier.absolute_tolerance: 0.0 -> 2"]);
    refused(&["--set", "environment={kind=\"exact\"}"], &["environment.kind: unset -> \"exact\""]);
    refused(&["--set", "objective.pass_threshold=0.7"], &["objective.pass_threshold: 0.5 -> 0.7"]);
    let tasks = fs::read_to_string(f.path("eval.jsonl")).unwrap();
    f.write("eval.jsonl", tasks.replace("\"answer\":\"2\"", "\"answer\":\"999\""));
    refused(&[], &["the answer of problem 3: \"2\" -> \"999\""]);
    f.write("eval.jsonl", tasks.replace("\"answer\":\"", "\"answer\":\"1"));
    refused(&[], &["the answers of 4 problems, the first of problem 1: \"0\" -> \"10\""]);
}

#[test]
fn what_a_program_reads_and_is_counts() {
    let f = Fixture::new();
    by_programs(&f, "reply 1", None);
    f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    let compare = |more: &[&str]| eval(&f, &[more, &["--compare", "r.json"]].concat());
    // Its speed is no part of its judgement.
    let ran = compare(&["--set", "verifier.workers=2", "--set", "verifier.timeout_seconds=9"]);
    assert!(
        ran.stdout.contains("verifier.workers: 1 -> 2") && ran.code == Some(0),
        "{} {}",
        ran.stdout,
        ran.stderr
    );
    // Fields that only a program can see.
    let tasks = fs::read_to_string(f.path("eval.jsonl")).unwrap();
    for tasks in [
        tasks.replace("\"prompt\"", "\"tests\":[1],\"prompt\""),
        tasks.replacen("\"prompt\"", "\"tests\":[1],\"prompt\"", 1),
    ] {
        f.write("eval.jsonl", tasks);
        let ran = compare(&[]);
        assert!(ran.code == Some(1) && ran.stderr.contains("data.other_fields: crc32c "), "{}", ran.stderr);
    }
    f.write("eval.jsonl", tasks);
    // Another text of the script may judge otherwise, or not: that is for whoever reads the comparison.
    by_programs(&f, ": the same; reply 1", None);
    let ran = compare(&[]);
    assert!(
        ran.code == Some(0) && ran.stdout.contains("verifier_files.verifier.sh: crc32c "),
        "{} {}",
        ran.stdout,
        ran.stderr
    );
}

/// A report from before reports said what made them.
#[test]
fn what_is_not_known_is_said() {
    let f = Fixture::new();
    f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    let mut old = report(&f, "r.json");
    old.as_object_mut().unwrap().remove("provenance");
    f.write("r.json", old.to_string());
    let ran = eval(&f, &["--compare", "r.json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stdout.contains("one of the two reports does not say what made it"), "{}", ran.stdout);
}

/// A run compares its end with its start by the same rules.
#[test]
fn a_resumed_run_does_not_compare_with_other_answers() {
    let f = Fixture::new();
    let set = ["--set", "data.eval_tasks=eval.jsonl", "--set", "train.eval_samples=2"];
    let run = |more: &[&str]| f.succeed(&[&["train", "run.toml"], &set[..], more].concat());
    let ran = run(&[]);
    let named =
        "what differs between the two:\n  model: model -> model after 4 steps\n  model.weights: crc32c ";
    assert!(ran.stdout.contains(named), "{}", ran.stdout);
    assert!(fs::read_to_string(f.path("out/comparison.txt")).unwrap().contains(named));
    let tasks = fs::read_to_string(f.path("eval.jsonl")).unwrap();
    f.write("eval.jsonl", tasks.replace("\"answer\":\"2\"", "\"answer\":\"7\""));
    let ran = run(&["--set", "train.steps=5", "--resume"]);
    assert!(ran.stderr.contains("no comparison at the end"), "{}", ran.stderr);
    assert!(!ran.stdout.contains("before and after"), "{}", ran.stdout);
}

/// The line of an evaluation in `eval.jsonl` says of N = objective.n what its report says, and both are drawn under the
/// run's seed.
#[test]
fn the_log_of_evaluations_is_that_of_the_reports() {
    let f = Fixture::new();
    // The verifier prefers the last digit, the environment pays the first.
    let text = RUN.replace(
        "pick = \"first\"",
        "pick = \"last\"\n\n[environment]\nkind = \"numeric\"\npick = \"first\"",
    );
    f.write("run.toml", text);
    f.write("eval.jsonl", crate::fixture::tasks_jsonl());
    let set =
        ["--set", "data.eval_tasks=eval.jsonl", "--set", "train.eval_samples=8", "--set", "train.seed=7"];
    f.succeed(&[&["train", "run.toml"], &set[..]].concat());
    let log = fs::read_to_string(f.path("out/eval.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    let mut told = Vec::new();
    for line in &lines {
        let step = line["step"].as_u64().unwrap();
        let report = report(&f, &format!("out/eval/step-{step:06}.json"));
        assert_eq!((&report["seed"], &report["ns"]), (&7.into(), &serde_json::json!([1, 2, 4, 8])));
        let mean = |list: &str, n: usize| {
            let of = |problem: &Value| problem[list][n].as_f64().unwrap();
            let problems = report["problems"].as_array().unwrap();
            problems.iter().map(of).sum::<f64>() / problems.len() as f64
        };
        assert_eq!(line["n"], 2);
        for (key, want) in [
            ("pass_at_1", mean("pass_at_n", 0)),
            ("pass_at_n", mean("pass_at_n", 1)),
            ("best_of_n", mean("best_of_n", 1)),
        ] {
            let found = line[key].as_f64().unwrap();
            assert!((found - want).abs() < 1e-12, "{key} of step {step}: {found}, {want}");
            told.push(found);
        }
    }
    assert!(told[0] < told[1] && told[2] < told[1], "the figures differ: {told:?}");
}

/// What is right is the environment's to say where there is one; the verifier chooses.
#[test]
fn right_is_what_the_environment_pays() {
    let f = Fixture::new();
    let pick = |which: &str| format!("kind = \"numeric\"\npick = \"{which}\"");
    let passes = |sections: &str| {
        f.write("run.toml", RUN.replace(&format!("[verifier]\n{}", pick("first")), sections));
        let long = ["--samples", "16", "--set", "generate.max_new_tokens=16", "--output", "r.json"];
        f.succeed(&[&["eval", "run.toml"], &long[..]].concat());
        let problems = report(&f, "r.json")["problems"].clone();
        problems.as_array().unwrap().iter().map(|p| p["pass_at_n"].clone()).collect::<Vec<Value>>()
    };
    let (first, last) = (format!("[verifier]\n{}", pick("first")), format!("[verifier]\n{}", pick("last")));
    let both = passes(&format!("{last}\n\n[environment]\n{}", pick("first")));
    let (first, last) = (passes(&first), passes(&last));
    assert_eq!(both, first);
    assert_ne!(both, last);
}

/// A report that was filed without its line in the log is of a run that died in between.
#[test]
fn a_report_without_its_line_does_not_count() {
    let f = Fixture::new();
    let set = ["--set", "data.eval_tasks=eval.jsonl", "--set", "train.eval_samples=2"];
    let run = |more: &[&str]| f.succeed(&[&["train", "run.toml"], &set[..], more].concat());
    run(&[]);
    fs::write(f.path("out/eval.jsonl"), "").unwrap();
    let ran = run(&["--set", "train.steps=5", "--resume"]);
    assert!(ran.stderr.contains("no comparison at the end"), "{}", ran.stderr);
}

/// Of a step, what its prompts have in common is a mean over them.
#[test]
fn diversity_is_a_mean_over_prompts() {
    let f = Fixture::new();
    // Answers are whole responses, which differ.
    f.succeed(&["train", "run.toml", "--set", "verifier={kind='exact'}"]);
    let log = fs::read_to_string(f.path("out/metrics.jsonl")).unwrap();
    let mut some = 0;
    for line in log.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let (answers, entropy) = (&line["distinct_answers"], &line["answer_entropy"]);
        let (answers, entropy) = (answers.as_f64().unwrap(), entropy.as_f64().unwrap());
        // 4 responses to each of 4 prompts.
        assert!((0.0..=4.0).contains(&answers) && (0.0..=4f64.ln()).contains(&entropy), "{line}");
        some += usize::from(answers > 1.0 && entropy > 4f64.ln() / 4.0);
    }
    assert!(some > 0, "sums over prompts would be within the bounds: {log}");
}

/// The rows of a report by problem: pass@N, Best-of-N and majority at every N.
fn by_problem(report: &Value) -> Vec<Vec<f64>> {
    let figures = |problem: &Value| {
        let list = |name: &str| problem[name].as_array().unwrap().clone();
        ["pass_at_n", "best_of_n", "majority_at_n"]
            .map(list)
            .concat()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    };
    report["problems"].as_array().unwrap().iter().map(figures).collect()
}

/// `[before, after, difference]` of every N in the three tables of a comparison, each as mean and interval.
fn cells(text: &str) -> Vec<[(f64, [f64; 2]); 3]> {
    let tables = text
        .split("\n\n")
        .filter(|t| ["pass@N", "best-of-N", "majority@N"].iter().any(|n| t.starts_with(&format!("{n}\nN"))));
    let cell = |text: &str| {
        let number = |s: &str| s.trim().parse::<f64>().unwrap();
        let (mean, interval) = text.split_once('[').unwrap();
        let (low, high) = interval.split_once(',').unwrap();
        (number(mean), [number(low), number(high)])
    };
    let row = |line: &str| {
        let (_, rest) = line.trim_start().split_once(' ').unwrap();
        let found: Vec<_> = rest.split(']').filter(|c| !c.trim().is_empty()).map(cell).collect();
        <[_; 3]>::try_from(found).unwrap()
    };
    tables.flat_map(|table| table.trim_end().lines().skip(2).map(row).collect::<Vec<_>>()).collect()
}

/// Mean and 95 % bootstrap interval, drawn by another generator than the program's.
fn bootstrap(values: &[f64]) -> (f64, [f64; 2]) {
    let mut state = 1u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let n = values.len();
    let mut means: Vec<f64> =
        (0..8000).map(|_| (0..n).map(|_| values[below(n)]).sum::<f64>() / n as f64).collect();
    means.sort_by(f64::total_cmp);
    (values.iter().sum::<f64>() / n as f64, [means[200], means[7799]])
}

/// Experts teach a model the answers, so it is known which report is the better one: in `comparison.txt`, and in
/// `eval --compare`, whichever of the two is measured last.
#[test]
fn the_better_model_is_called_so_from_both_sides() {
    let f = Fixture::new();
    f.write("run.toml", RUN.replace("kind = \"pass-at-n\"\nn = 2", "kind = \"sft\"\nn = 2"));
    let tasks = crate::fixture::tasks_jsonl();
    f.write("eval.jsonl", tasks.lines().take(20).collect::<Vec<_>>().join("\n"));
    let set =
        ["--set", "data.eval_tasks=eval.jsonl", "--set", "train.eval_samples=8", "--set", "train.steps=60"];
    let trained = f.succeed(&[&["train", "run.toml"], &set[..]].concat());
    let filed = fs::read_to_string(f.path("out/comparison.txt")).unwrap();
    assert!(trained.stdout.contains(&filed), "{}", trained.stdout);
    let [before, after] = ["000000", "000060"].map(|step| report(&f, &format!("out/eval/step-{step}.json")));
    let (rows_before, rows_after) = (by_problem(&before), by_problem(&after));
    let column = |rows: &[Vec<f64>], i: usize| rows.iter().map(|row| row[i]).collect::<Vec<f64>>();

    // By the figures of each problem, and to the three decimals that a table has.
    let check = |text: &str, from: &[Vec<f64>], to: &[Vec<f64>]| {
        let found = cells(text);
        assert_eq!(found.len(), 3 * 4, "N = 1, 2, 4, 8: {text}");
        for (i, found) in found.iter().enumerate() {
            let (from, to) = (column(from, i), column(to, i));
            let pairs: Vec<f64> = from.iter().zip(&to).map(|(b, a)| a - b).collect();
            for (which, (found, values)) in found.iter().zip([&from, &to, &pairs]).enumerate() {
                let (mean, [low, high]) = bootstrap(values);
                assert!(
                    (found.0 - mean).abs() <= 0.0005 + 1e-9,
                    "{i} {which}: {found:?}, want {mean} {text}"
                );
                // The ends of a percentile interval vary by some 2 % of its width.
                let slack = 0.001 + 0.08 * (high - low);
                let [l, h] = found.1;
                assert!(
                    (l - low).abs() < slack && (h - high).abs() < slack,
                    "{i} {which}: {found:?}, want {low} {high}"
                );
            }
        }
    };
    check(&filed, &rows_before, &rows_after);
    assert!(cells(&filed)[0][2].0 > 0.15, "experts must have taught it much: {filed}");
    assert!(
        filed.contains("pass@N: gain beyond the interval at N = 1, 2") && !filed.contains("loss"),
        "{filed}"
    );

    let args = ["eval", "run.toml", "--samples", "8", "--set", "data.tasks=eval.jsonl"];
    let compared = |model: &str, with: &str| {
        let ran = f.succeed(&[&args[..], &["--model", model, "--compare", with]].concat());
        ran.stdout[ran.stdout.find("problems:").unwrap()..].to_owned()
    };
    let last = "out/checkpoints/step-000060/model";
    // The same noise as in the run, so the same responses.
    let forward = compared(last, "out/eval/step-000000.json");
    check(&forward[forward.rfind("problems:").unwrap()..], &rows_before, &rows_after);
    let backward = compared("model", "out/eval/step-000060.json");
    let backward = &backward[backward.rfind("problems:").unwrap()..];
    check(backward, &rows_after, &rows_before);
    assert!(
        backward.contains("pass@N: loss beyond the interval at N = 1, 2") && !backward.contains("gain"),
        "{backward}"
    );
}

/// A model that does not change is evaluated to the same figures, problem by problem, whatever was drawn in between.
#[test]
fn evaluations_of_a_run_share_their_noise() {
    let f = Fixture::new();
    let set =
        ["data.eval_tasks=eval.jsonl", "train.eval_samples=8", "optimizer.lr=1e-30", "train.eval_every=2"];
    let train = |output: &str, more: &str| {
        let output = format!("train.output={output}");
        let set = set.iter().copied().chain([&*output, more]).flat_map(|s| ["--set", s]);
        f.succeed(&["train", "run.toml"].into_iter().chain(set).collect::<Vec<_>>());
    };
    train("out", "train.steps=4");
    let problems = |output: &str, step: u64| {
        report(&f, &format!("{output}/eval/step-{step:06}.json"))["problems"].clone()
    };
    for step in [2, 4] {
        assert_eq!(problems("out", step), problems("out", 0));
    }
    let text = fs::read_to_string(f.path("out/comparison.txt")).unwrap();
    for [before, after, difference] in cells(&text) {
        assert_eq!((before, difference), (after, (0.0, [0.0; 2])));
    }
    assert_eq!(text.matches("no change beyond the interval at any N").count(), 4, "{text}");
    // Other noise shows.
    train("other", "train.seed=1");
    assert_ne!(problems("other", 0), problems("out", 0));
}
