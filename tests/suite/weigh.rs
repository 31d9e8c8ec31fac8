//! `bon-engine weigh`: the filter on strings, and the binary.

use assert_cmd::Command;
use bon_engine::cli::weigh::{config, weigh};
use std::io::Write;

/// What `weigh` writes for `input`, or its error chain in one line.
fn run(objective: &str, n: Option<usize>, set: &[&str], input: &str) -> Result<String, String> {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).collect();
    let mut out = Vec::new();
    config(objective, n, &set)
        .and_then(|config| weigh(&config, input.as_bytes(), &mut out))
        .map_err(|e| format!("{e:#}"))?;
    Ok(String::from_utf8(out).unwrap())
}

fn error(objective: &str, n: Option<usize>, set: &[&str], input: &str) -> String {
    run(objective, n, set, input).unwrap_err()
}

#[test]
fn one_line_out_for_every_line_in() {
    let input = r#"{"scores": [1, 0, 0, 0]}
{"scores": [0.5, 0.25, 2, 1], "rewards": [1, 1, 0, 0]}
"#;
    // One pass in four: C(3, 1) / C(4, 2). Two: C(2, 1) / C(4, 2) = 1/6 + 1/6.
    let out = run("pass-at-n", Some(2), &[], input).unwrap();
    let rows: Vec<Vec<f64>> = out
        .lines()
        .map(|line| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(value.as_object().unwrap().len(), 1);
            serde_json::from_value(value["coefficients"].clone()).unwrap()
        })
        .collect();
    assert_eq!(rows.len(), 2);
    for (row, expected) in rows.iter().zip([[0.5, 0.0, 0.0, 0.0], [1.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]]) {
        row.iter().zip(expected).for_each(|(c, e)| assert!((c - e).abs() < 1e-15, "{rows:?}"));
    }
}

#[test]
fn expert_objectives_say_the_experts_coefficient() {
    let input = r#"{"scores": [1, 0], "expert_score": 1}"#;
    let out = run("bon-sft", Some(1), &[], input).unwrap();
    assert_eq!(out, "{\"coefficients\":[-0.5,-0.5],\"expert_coefficient\":1.0}\n");
    let out = run("sft", None, &[], r#"{"scores": []}"#).unwrap();
    assert_eq!(out, "{\"coefficients\":[],\"expert_coefficient\":1.0}\n");
}

#[test]
fn settings_reach_the_objective() {
    let input = r#"{"scores": [0, 0], "rewards": [0, 0]}"#;
    let coefficients = |set: &[&str]| run("bon-rlb", Some(2), set, input).unwrap();
    assert_eq!(coefficients(&[]), "{\"coefficients\":[1.0,1.0]}\n");
    assert_eq!(coefficients(&["weight_clip=1"]), "{\"coefficients\":[0.5,0.5]}\n");
    assert_eq!(
        coefficients(&["negative_sign = penalize", "weight_clip=0.5"]),
        "{\"coefficients\":[-0.25,-0.25]}\n"
    );
    assert_eq!(coefficients(&["negative_sign=\"penalize\""]), "{\"coefficients\":[-1.0,-1.0]}\n");
    let set = ["selector=verifier", "reward=environment"];
    let out = run("bon-rl", Some(2), &set, r#"{"scores": [2, 1], "rewards": [0, 1]}"#).unwrap();
    assert_eq!(out, "{\"coefficients\":[-1.0,0.0]}\n");
    let input = r#"{"scores": [1, 0, 0, 1]}"#;
    for (objective, n, set, expected) in [
        ("pkpo", Some(2), "baseline=none", "[0.5,0.3333333333333333,0.3333333333333333,0.5]"),
        ("max-rl", None, "control_variate=false", "[0.5,0.0,0.0,0.5]"),
        ("max-rl", None, "control_variate=true", "[0.25,-0.25,-0.25,0.25]"),
        ("grpo", None, "std_normalization=false", "[0.125,-0.125,-0.125,0.125]"),
    ] {
        let out = run(objective, n, &[set], input).unwrap();
        assert_eq!(out, format!("{{\"coefficients\":{expected}}}\n"), "{objective} {set}");
    }
}

#[test]
fn bad_settings_are_named() {
    let unknown = error("bon-rlb", Some(2), &["weight_clp=3"], "");
    assert_eq!(
        unknown,
        "--set weight_clp=3: `weight_clp` is no option of an objective; did you mean `weight_clip`?"
    );
    let unknown = error("bon-rlb", Some(2), &["kl=3"], "");
    assert!(
        unknown.ends_with(
            "known are estimator, negative_sign, weight_clip, selector, reward, baseline, control_variate, \
             std_normalization, loss, pass_threshold"
        ),
        "{unknown}"
    );
    assert_eq!(error("rl", None, &["estimator"], ""), "--set estimator: write it as key=value");
    let twice = error("bon-rlb", Some(2), &["weight_clip=3", "weight_clip=4"], "");
    assert_eq!(twice, "--set weight_clip=4: `weight_clip` is set twice");
    let kind = error("bon-rlx", Some(2), &[], "");
    assert!(kind.contains("unknown variant `bon-rlx`") && kind.contains("pass-at-n"), "{kind}");
    let word = error("bon-rl-v", Some(2), &["estimator=exakt"], "");
    assert!(word.contains("`exakt`") && word.contains("`exact`") && word.contains("estimator"), "{word}");
    let number = error("bon-rlb", Some(2), &["weight_clip=big"], "");
    assert!(number.contains("\"big\"") && number.contains("weight_clip"), "{number}");
    assert_eq!(error("bon-rl-v", None, &[], ""), "objective `bon-rl-v` needs the setting `n`");
    assert_eq!(error("bon-rl-v", Some(0), &[], ""), "`n` must be at least 1");
    let ignored = error("grpo", None, &["control_variate=false"], "");
    assert!(ignored.contains("`control_variate`") && ignored.contains("`grpo`"), "{ignored}");
    let type_ = error("grpo", None, &["std_normalization=1"], "");
    assert!(type_.contains("boolean") && type_.contains("std_normalization"), "{type_}");
}

#[test]
fn bad_lines_are_named() {
    let bad = |line: &str| error("bon-rl-v", Some(2), &[], &format!("{{\"scores\": [1, 2]}}\n{line}\n"));
    assert_eq!(bad(r#"{"scores": [1, "x"]}"#), r#"line 2: `scores[1]` is "x", not a number"#);
    assert_eq!(bad(r#"{"scores": 1}"#), "line 2: `scores` is 1, not a list of numbers");
    assert_eq!(bad(r#"{"rewards": [1]}"#), "line 2: the field `scores` is missing");
    assert_eq!(
        bad(r#"{"scores": [1, 2], "reward": [1, 2]}"#),
        "line 2: unknown field `reward`; did you mean `rewards`?"
    );
    assert_eq!(
        bad(r#"{"scores": [1, 2], "rewards": [1]}"#),
        "line 2: 2 `scores` but 1 `rewards`: a group has one of each per sample"
    );
    assert!(bad(r#"{"scores": [1]}"#).starts_with("line 2: n = 2 is more than the group's 1 samples"));
    assert!(bad(r#"{"scores": [1, 1e999]}"#).starts_with("line 2: a group is a JSON object"));
    assert!(bad("[1, 2]").starts_with("line 2: a group is a JSON object with `scores`"));
    assert!(bad("").starts_with("line 2: the line is empty"));
    assert_eq!(
        bad(r#"{"scores": [1, 2], "expert_score": 1}"#),
        "line 2: `expert_score` has no effect on objective `bon-rl-v`; remove it"
    );
    let expert = error("bon-sft", Some(2), &[], r#"{"scores": [1, 2], "expert_score": null}"#);
    assert_eq!(expert, "line 1: `expert_score` is null, not a number");
}

/// Lines before the bad one are answered.
#[test]
fn output_streams() {
    let config = config("rl", None, &[]).unwrap();
    let mut out = Vec::new();
    let input = "{\"scores\": [1, 0]}\nnonsense\n";
    assert!(weigh(&config, input.as_bytes(), &mut out).is_err());
    assert_eq!(out, b"{\"coefficients\":[0.5,-0.5]}\n");
}

fn command() -> Command {
    Command::new(crate::places::program())
}

#[test]
fn the_binary_reads_files_and_standard_input() {
    let line = "{\"scores\": [1, 0]}\n";
    let expected = "{\"coefficients\":[0.5,-0.5]}\n";
    command().args(["weigh", "--objective", "rl"]).write_stdin(line).assert().success().stdout(expected);
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(line.as_bytes()).unwrap();
    command().args(["weigh", "--objective", "rl"]).arg(file.path()).assert().success().stdout(expected);
    file.write_all(b"{}\n").unwrap();
    let failed = command().args(["weigh", "--objective", "rl"]).arg(file.path()).assert().failure();
    let stderr = String::from_utf8_lossy(&failed.get_output().stderr).into_owned();
    assert!(stderr.contains(&file.path().display().to_string()), "{stderr}");
    assert!(stderr.contains("line 2") && stderr.contains("`scores` is missing"), "{stderr}");
    let failed = command().args(["weigh", "--objective", "rl", "/no/such/file"]).assert().failure();
    assert!(String::from_utf8_lossy(&failed.get_output().stderr).contains("cannot open /no/such/file"));
}

/// `bon-engine weigh ... | head -1` is no error.
#[test]
fn a_closed_pipe_ends_it_quietly() {
    use std::process::{Command, Stdio};
    let mut child = Command::new(crate::places::program())
        .args(["weigh", "--objective", "rl"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut stdin = child.stdin.take().unwrap();
    let _ = stdin.write_all(b"{\"scores\": [1, 0]}\n");
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn null_stands_for_what_could_not_be_judged() {
    let weigh = |kind: &str, n, set: &[&str], line: &str| run(kind, n, set, line).unwrap();
    // Worth what the worst is worth, or 0 where that is less: as if it had been written down.
    for (kind, n, set, with_null, written) in [
        ("rl", None, &[][..], r#"{"scores": [1, -1, null]}"#, r#"{"scores": [1, -1, -1]}"#),
        ("bon-rl-v", Some(2), &[], r#"{"scores": [null, 3, 2]}"#, r#"{"scores": [0, 3, 2]}"#),
        ("pass-at-n", Some(2), &[], r#"{"scores": [1, null, 0]}"#, r#"{"scores": [1, 0, 0]}"#),
        ("bon-rlb", Some(2), &[], r#"{"scores": [1, null, 0]}"#, r#"{"scores": [1, 0, 0]}"#),
        ("bon-rlb-p", Some(2), &[], r#"{"scores": [1, null, 1]}"#, r#"{"scores": [1, 0, 1]}"#),
        (
            "bon-rl",
            Some(2),
            &["selector=verifier", "reward=environment"],
            r#"{"scores": [0.5, null, 0.25], "rewards": [null, 1, -2]}"#,
            r#"{"scores": [0.5, 0, 0.25], "rewards": [-2, 1, -2]}"#,
        ),
        (
            "bon-sft",
            Some(2),
            &[],
            r#"{"scores": [null, -4], "expert_score": 1}"#,
            r#"{"scores": [-4, -4], "expert_score": 1}"#,
        ),
    ] {
        assert_eq!(weigh(kind, n, set, with_null), weigh(kind, n, set, written), "{kind}");
    }
    // Right by a threshold of 0, and yet not what nobody judged: just below.
    let c = weigh("rl", None, &["pass_threshold=0"], r#"{"scores": [0, null]}"#);
    assert!(c.starts_with("{\"coefficients\":[") && !c.contains("[0.0,0.0]"), "{c}");
    let error = error("rl", None, &[], r#"{"scores": [1, "null"]}"#);
    assert_eq!(error, "line 1: `scores[1]` is \"null\", not a number");
    let error = self::error("bon-rlb", Some(2), &["pass_threshold=0"], "");
    assert!(error.starts_with("`pass_threshold` is 0; it must be a finite number, above 0"), "{error}");
}

/// Logits and labels in, what to push each logit by out; a response without a label is none to learn from.
#[test]
fn a_verifiers_coefficients_are_of_logits() {
    let input = r#"{"scores": [0, 0], "rewards": [1, 0.25]}"#;
    assert_eq!(run("verifier", None, &[], input).unwrap(), "{\"coefficients\":[0.25,-0.125]}\n");
    assert_eq!(run("verifier", None, &["loss=pairwise"], input).unwrap(), "{\"coefficients\":[0.5,-0.5]}\n");
    let unlabelled = error("verifier", None, &[], r#"{"scores": [0, 0], "rewards": [1, null]}"#);
    assert!(unlabelled.contains("`rewards[1]` is null; leave out"), "{unlabelled}");
}
