//! What is right and what could not be judged, from a verifier's words to every figure and line that a user sees.

use std::fs;

use serde_json::Value;

use crate::fixture::{Fixture, RUN, Ran};

/// `run.toml` with programs for the verifier and, where there is one, the environment: bodies of `while read` loops in
/// sh, in which `reply SCORE` answers the request in `$line` and `$id` is its number.
pub(crate) fn by_programs(f: &Fixture, verifier: &str, environment: Option<&str>) {
    let section = |name: &str, body: &str| {
        let script = format!(
            "reply() {{ printf '{{\"id\":%s,\"score\":%s}}\\n' \"$id\" \"$1\"; }}\n\
             while read -r line; do id=${{line#*\\\"id\\\":}}; id=${{id%%,*}}; {body}; done\n"
        );
        f.write(&format!("{name}.sh"), script);
        format!("kind = \"command\"\nprogram = [\"sh\", \"{name}.sh\"]")
    };
    let text = RUN.replace("kind = \"numeric\"\npick = \"first\"", &section("verifier", verifier));
    let environment = environment.map(|body| format!("\n[environment]\n{}\n", section("environment", body)));
    f.write("run.toml", text + &environment.unwrap_or_default());
}

/// A line of a run's log.
fn lines(f: &Fixture, file: &str) -> Vec<Value> {
    let text = fs::read_to_string(f.path(file)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn train(f: &Fixture, output: &str, set: &[&str]) -> Ran {
    let output = format!("train.output={output}");
    let set = [&output[..]].into_iter().chain(set.iter().copied()).flat_map(|s| ["--set", s]);
    f.run(&["train", "run.toml"].into_iter().chain(set).collect::<Vec<_>>())
}

#[track_caller]
fn fails_with(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, Some(1), "{} {}", ran.stdout, ran.stderr);
    let missing: Vec<&&str> = words.iter().filter(|word| !ran.stderr.contains(**word)).collect();
    assert!(missing.is_empty(), "{missing:?} not in: {}", ran.stderr);
}

#[test]
fn training_and_evaluation_call_the_same_right() {
    let f = Fixture::new();
    for (i, (score, threshold, right)) in [
        ("-1", None, 0.0),
        ("0.25", None, 0.0),
        ("0.4999", None, 0.0),
        ("0.5", None, 1.0),
        ("0.75", None, 1.0),
        ("7", None, 1.0),
        ("0.75", Some("0.9"), 0.0),
        ("-2", Some("-3"), 1.0),
    ]
    .into_iter()
    .enumerate()
    {
        by_programs(&f, &format!("reply {score}"), None);
        let threshold = threshold.map(|t| format!("objective.pass_threshold={t}"));
        let set = threshold.as_deref().unwrap_or("train.seed=0");
        for kind in ["rl", "bon-rl-v", "pass-at-n"] {
            let (output, kind_is) = (format!("{kind}-{i}"), format!("objective.kind={kind}"));
            let ran = train(&f, &output, &["train.steps=1", &kind_is, set]);
            assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            let shown =
                format!("reward {:.3}  pass@1 {right:.3}  pass@2 {right:.3}", score.parse::<f64>().unwrap());
            assert!(ran.stderr.contains(&shown), "{shown:?} not in: {}", ran.stderr);
            assert!(
                ran.stderr.contains("(nothing to learn: in no group do responses earn different"),
                "{}",
                ran.stderr
            );
            let step = &lines(&f, &format!("{output}/metrics.jsonl"))[0];
            let figure = |name: &str| step[name].as_f64().unwrap();
            assert_eq!((figure("pass_at_1"), figure("pass_at_n")), (right, right), "{kind} {score} {set}");
            let groups =
                (figure("all_pass_groups"), figure("all_fail_groups"), figure("zero_variance_groups"));
            assert_eq!(groups, (4.0 * right, 4.0 - 4.0 * right, 4.0), "{kind} {score} {set}");
            assert_eq!(figure("reward_mean"), score.parse::<f64>().unwrap());
        }
        let args = [
            "eval",
            "run.toml",
            "--samples",
            "2",
            "--tasks",
            "eval.jsonl",
            "--set",
            set,
            "--output",
            "r.json",
        ];
        f.succeed(&args);
        let report: Value = serde_json::from_str(&fs::read_to_string(f.path("r.json")).unwrap()).unwrap();
        for figure in ["pass_at_n", "best_of_n"] {
            assert_eq!(report["figures"][figure][1]["mean"], right, "{score} {set}");
        }
    }
}

/// A run's evaluations say how often the verifier's choice is right, and call it that.
#[test]
fn an_evaluation_does_not_call_a_share_a_reward() {
    let f = Fixture::new();
    by_programs(&f, "reply 5", None);
    let ran = train(&f, "out", &["train.steps=1", "data.eval_tasks=eval.jsonl", "train.eval_samples=2"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let line = &lines(&f, "out/eval.jsonl")[0];
    assert_eq!((&line["best_of_n"], line.get("best_of_n_reward")), (&Value::from(1.0), None));
    let step = &lines(&f, "out/metrics.jsonl")[0];
    assert_eq!(step["best_of_n_reward"], 5.0);
}

/// Even where nothing is worth more than -1, and whoever it is that cannot judge.
#[test]
fn what_nobody_judged_earns_no_more_than_what_is_wrong() {
    let f = Fixture::new();
    let half = "case $((id % 2)) in 0) reply null;; *) reply -1;; esac";
    for (output, verifier, environment) in
        [("score", half, None), ("reward", "reply 1", Some(half)), ("both", half, Some(half))]
    {
        by_programs(&f, verifier, environment);
        for kind in ["rl", "bon-rl-v", "bon-rl-s"] {
            let (output, kind) = (format!("{output}-{kind}"), format!("objective.kind={kind}"));
            let ran = train(&f, &output, &["train.steps=3", &kind, "train.kl_coefficient=0"]);
            assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            for step in lines(&f, &format!("{output}/metrics.jsonl")) {
                assert_eq!(step["reward_mean"], -1.0, "{step}");
                assert_eq!(
                    (&step["grad_norm"], &step["pass_at_n"]),
                    (&Value::from(0.0), &Value::from(0.0)),
                    "{step}"
                );
                let unjudged = if output.starts_with("both") { 16 } else { 8 };
                assert_eq!(step["verifier_failures"]["missing"], unjudged, "{step}");
            }
        }
    }
    // A null is not right though all others are, and though the threshold is below what it is given.
    by_programs(&f, "case $((id % 4)) in 0) reply null;; *) reply 0;; esac", None);
    let ran = train(&f, "costs", &["train.steps=1", "objective.pass_threshold=0"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(lines(&f, "costs/metrics.jsonl")[0]["pass_at_1"], 0.75);
}

/// The first of each kind is told in full, once, and all of them are in a file, of steps and of evaluations.
#[test]
fn why_a_response_could_not_be_judged_is_told_and_kept() {
    let f = Fixture::new();
    for (output, body, kind, reason) in [
        (
            "dies",
            "case $((id % 3)) in 2) echo \"TypeError: 'str' and 'int'\" >&2; exit 3;; *) reply 1;; esac",
            "crashed",
            &["exit status 3", "TypeError: 'str' and 'int'"][..],
        ),
        (
            "long",
            "case $((id % 4)) in 3) printf '{\"id\":%s,\"log\":\"%070000d\"}\\n' \"$id\" 0;; *) reply 1;; esac",
            "protocol",
            &["a line of more than 65536 bytes", "\"log"],
        ),
        (
            "words",
            "case $((id % 4)) in 3) echo \"{\\\"id\\\":$id,\\\"score\\\":\\\"good\\\"}\";; *) reply 1;; esac",
            "protocol",
            &["the score is no number", "good"],
        ),
        ("not-finite", "case $((id % 2)) in 1) reply NaN;; *) reply 1;; esac", "nan", &["not finite", "NaN"]),
        (
            "null",
            "case $((id % 2)) in 1) echo no compiler >&2; sleep 0.02; reply null;; *) reply 1;; esac",
            "missing",
            &["without a score", "no compiler"],
        ),
        (
            "name",
            "case $((id % 2)) in 1) echo \"{\\\"id\\\":$id,\\\"reward\\\":1}\";; *) reply 1;; esac",
            "missing",
            &["without the field `score`", "reward"],
        ),
        ("killed", "case $((id % 4)) in 3) kill -SEGV $$;; *) reply 1;; esac", "crashed", &["signal 11"]),
    ] {
        by_programs(&f, body, None);
        let set = ["train.steps=2", "data.eval_tasks=eval.jsonl", "train.eval_samples=2"];
        let ran = train(&f, output, &set);
        assert_eq!(ran.code, Some(0), "{output}: {}", ran.stderr);
        let told = format!(
            "responses could not be judged ({kind}); they count as wrong\n  the first, by the verifier: "
        );
        assert_eq!(ran.stderr.matches(&told).count(), 1, "{output}: {}", ran.stderr);
        let at = ran.stderr.find(&told).unwrap() + told.len();
        let (first, _) =
            ran.stderr[at..].split_once(&format!("\n  all of them are in {output}/unjudged.jsonl")).unwrap();
        assert!(reason.iter().all(|word| first.contains(word)), "{output}: {first}");

        let unjudged = lines(&f, &format!("{output}/unjudged.jsonl"));
        let steps = lines(&f, &format!("{output}/metrics.jsonl"));
        let counted: u64 =
            steps.iter().map(|step| step["verifier_failures"][kind].as_u64().unwrap_or(0)).sum();
        let of = |evaluation: bool| unjudged.iter().filter(|line| line["evaluation"] == evaluation).count();
        assert!(counted > 0 && of(false) == counted as usize && of(true) > 0, "{output}: {unjudged:?}");
        for line in &unjudged {
            assert_eq!((&line["judge"], &line["kind"]), (&"verifier".into(), &kind.into()), "{output}");
            let words = line["reason"].as_str().unwrap();
            assert!(reason.iter().all(|word| words.contains(word)), "{output}: {words}");
            assert!(line["prompt"].as_str().unwrap().ends_with('=') && line["response"].is_string());
        }
        let report: Value = serde_json::from_str(
            &fs::read_to_string(f.path(&format!("{output}/eval/step-000000.json"))).unwrap(),
        )
        .unwrap();
        let filed = report["unjudged"].as_array().unwrap().len();
        let logged = unjudged.iter().filter(|line| line["evaluation"] == true && line["step"] == 0);
        assert_eq!(filed, logged.count(), "{output}");
    }
    // `eval` says it, too, and where the others are.
    let args = ["eval", "run.toml", "--samples", "4", "--tasks", "eval.jsonl"];
    let ran = f.succeed(&args);
    assert!(ran.stderr.contains("by the verifier: ") && ran.stderr.contains("signal 11"), "{}", ran.stderr);
    assert!(ran.stderr.contains("--output FILE keeps all of them"), "{}", ran.stderr);
    let ran = f.succeed(&[&args[..], &["--output", "r.json"]].concat());
    assert!(ran.stderr.contains("all of them are in r.json"), "{}", ran.stderr);
    assert!(fs::read_to_string(f.path("r.json")).unwrap().contains("signal 11"));
}

#[test]
fn a_resumed_run_keeps_the_unjudged_of_its_checkpoint_alone() {
    let f = Fixture::new();
    by_programs(&f, "case $((id % 2)) in 1) reply null;; *) reply 1;; esac", None);
    let set = ["train.steps=4", "train.save_every=2"];
    assert_eq!(train(&f, "out", &set).code, Some(0));
    // Requests are numbered anew by every process, and their numbers are in what is quoted.
    let unjudged = || -> Vec<String> {
        let fields =
            |line: Value| ["step", "prompt", "response", "kind"].map(|key| line[key].to_string()).join(" ");
        lines(&f, "out/unjudged.jsonl").into_iter().map(fields).collect()
    };
    let whole = unjudged();
    fs::remove_dir_all(f.path("out/checkpoints/step-000004")).unwrap();
    let ran = f.run(&["train", "run.toml", "--set", set[0], "--set", set[1], "--resume"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!((unjudged(), whole.len()), (whole, 4 * 8));
}

/// What never judges stops a run, with what it wrote.
#[test]
fn a_verifier_without_a_verdict_stops_the_run() {
    let f = Fixture::new();
    let misnamed = "echo \"{\\\"id\\\":$id,\\\"reward\\\":1}\"";
    for (output, verifier, environment, words) in [
        ("name", misnamed, None, &["step 1: the verifier cannot be used", "field `score`", "reward"][..]),
        ("null", "reply null", None, &["the verifier cannot be used", "none of 16 responses", "null"]),
        ("not-finite", "reply NaN", None, &["the verifier cannot be used", "none of 16 responses", "NaN"]),
        (
            "mixed",
            "case $((id % 2)) in 0) reply null;; *) echo '{}';; esac",
            None,
            &["the verifier cannot be used", "none of 16 responses", "null"],
        ),
        // Of several reasons the first, in the order of the responses.
        (
            "first",
            "case $id in 0) reply NaN;; *) reply null;; esac",
            None,
            &["the verifier cannot be used", "none of 16 responses", "NaN"],
        ),
        ("reward", "reply 1", Some("reply null"), &["the environment cannot be used", "none of 16", "null"]),
        ("reward-name", "reply 1", Some(misnamed), &["the environment cannot be used", "field `score`"]),
    ] {
        by_programs(&f, verifier, environment);
        let ran = train(&f, output, &["train.steps=1"]);
        fails_with(&ran, words);
        assert!(!f.path(&format!("{output}/checkpoints/step-000001")).exists(), "{output}");
        let ran = f.run(&["eval", "run.toml", "--samples", "4", "--tasks", "eval.jsonl"]);
        let words: Vec<&str> =
            words.iter().map(|word| word.strip_prefix("step 1: ").unwrap_or(word)).collect();
        fails_with(&ran, &words);
    }
    // In the middle of a long run: after 64 responses.
    by_programs(&f, "reply null", None);
    let ran = train(&f, "long", &["train.steps=1000"]);
    fails_with(&ran, &["step 4: the verifier cannot be used: none of 64 responses could be judged", "null"]);
    // Built-in ones as well: here the tasks are at fault.
    f.write("run.toml", RUN);
    f.write("tasks.jsonl", "{\"prompt\": \"1+1=\", \"answer\": \"two\"}\n");
    fails_with(
        &train(&f, "words", &[]),
        &["none of 64 responses", "\"two\" holds no number; correct the task"],
    );
}

#[test]
fn few_verdicts_are_enough() {
    let f = Fixture::new();
    by_programs(&f, "case $id in 60) reply 1;; *) reply null;; esac", None);
    let ran = train(&f, "out", &["train.steps=8"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let unjudged = lines(&f, "out/unjudged.jsonl");
    assert_eq!(unjudged.len(), 8 * 16 - 1);
}

/// A program that is started over and over is slow, and who wrote it should hear of that.
#[test]
fn what_slows_a_verifier_is_told_once() {
    let f = Fixture::new();
    for (output, body, words) in [
        ("one-shot", "reply 1; exit 0", &["exit status 0", "must go on reading requests"][..]),
        ("fails-later", "reply 1; echo out of files >&2; exit 9", &["exit status 9", "out of files"]),
        ("twice", "reply 1; reply 1", &["answers the request with id", "one line for each"]),
        ("chatty", "reply 1; echo done with it", &["\"done with it\""]),
        ("deaf", "exec <&-; reply 1; exec sleep 1000", &["closed its stdin and runs on"]),
    ] {
        by_programs(&f, body, None);
        let ran = train(&f, output, &["train.steps=2"]);
        assert_eq!(ran.code, Some(0), "{output}: {}", ran.stderr);
        let note = "note: [verifier] a verifier process that had answered before was started anew";
        assert_eq!(ran.stderr.matches(note).count(), 1, "{output}: {}", ran.stderr);
        assert!(words.iter().all(|word| ran.stderr.contains(word)), "{output}: {}", ran.stderr);
        assert!(!ran.stderr.contains("could not be judged"), "{output}: {}", ran.stderr);
    }
    // One that is slower than sampling.
    by_programs(&f, "sleep 0.08; reply 1", None);
    let ran = train(&f, "slow", &["train.steps=2"]);
    assert_eq!(ran.stderr.matches("s for verdicts, longer than it sampled").count(), 1, "{}", ran.stderr);
    // The environment's, by its name; a sound program has nothing to tell.
    by_programs(&f, "reply 1", Some("reply 1; exit 0"));
    let ran = train(&f, "environment", &["train.steps=2"]);
    assert_eq!(ran.stderr.matches("note: ").count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains("note: [environment] "), "{}", ran.stderr);
    let ran = f.succeed(&["eval", "run.toml", "--samples", "2", "--tasks", "eval.jsonl"]);
    assert!(ran.stderr.contains("note: [environment] "), "{}", ran.stderr);
}
