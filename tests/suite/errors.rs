//! What users get wrong: one clear error each, from the real program, before it has done or written anything.

use std::fs;

use serde_json::json;

use crate::fixture::{CONTEXT, Fixture, config_json, tokenizer_json};

/// The program must refuse `args` with `code`, nothing on stdout, and one error on stderr that says all of `words`:
/// one line, or a line and an indented list.
fn refuse(f: &Fixture, args: &[&str], code: i32, words: &[&str]) {
    let ran = f.run(args);
    let error = &ran.stderr;
    assert_eq!(ran.code, Some(code), "{args:?}: {error}");
    assert_eq!(ran.stdout, "", "{args:?}");
    assert!(error.starts_with("error: ") && !error.contains("panicked"), "{args:?}: {error}");
    for word in words {
        assert!(error.contains(word), "{args:?}: no {word:?} in: {error}");
    }
    // clap adds usage and a hint to its errors.
    if code == 1 {
        assert!(error.lines().skip(1).all(|line| line.starts_with("  ")), "{args:?}: {error}");
        assert_eq!(error.matches("error: ").count(), 1, "{args:?}: {error}");
    }
}

/// [`refuse`], for `train`, which must leave no run directory behind.
fn refuse_train(f: &Fixture, set: &[&str], words: &[&str]) {
    let args: Vec<&str> =
        ["train", "run.toml"].into_iter().chain(set.iter().flat_map(|s| ["--set", s])).collect();
    refuse(f, &args, 1, words);
    assert!(!f.path("out").exists(), "{set:?}: left a run directory behind");
}

#[test]
fn settings_of_a_training_run() {
    let f = Fixture::new();
    for (set, words) in [
        (
            &["generate.sample=4"][..],
            &["--set generate.sample=4", "unknown key `sample` in [generate]", "`samples`"][..],
        ),
        (&["verifier.kind=numerik"], &["unknown value `numerik`", "did you mean `numeric`?"]),
        (&["nonsense"], &["--set nonsense: expected key.path=value"]),
        (&["generate.samples=two"], &["--set generate.samples=two: generate.samples: invalid type"]),
        (&["generate.samples=0"], &["  generate.samples: must be at least 1"]),
        (&["generate.samples=-1"], &["generate.samples", "-1"]),
        (
            &["generate.samples=1000000000000"],
            &["  generate.samples: is 1000000000000; it must be at most 65536"],
        ),
        (
            &["generate.max_new_tokens=9223372036854775807"],
            &["  generate.max_new_tokens: is 9223372036854775807"],
        ),
        (
            &["generate.prompts_per_step=9223372036854775807"],
            &["  generate.prompts_per_step: is 9223372036854775807; it must be at most"],
        ),
        (&["optimizer.lr=nan"], &["  optimizer.lr: is NaN; it must be above 0"]),
        (
            &["optimizer.lr=-1.0", "train.steps=0"],
            &["  optimizer.lr: is -1; ", "  train.steps: must be at least 1"],
        ),
        (&["generate.temperature=inf"], &["  generate.temperature: is inf"]),
        (&["train.max_minutes=0"], &["  train.max_minutes: is 0; it must be above 0"]),
        (&["objective.n=5"], &["  generate.samples: is 4, less than the 5 of objective.n"]),
        (&["objective.n=0"], &["  objective: "]),
        (
            &["data.eval_tasks=eval.jsonl", "train.eval_samples=0"],
            &["  train.eval_samples: is 0; an evaluation needs at least 1"],
        ),
        (&["model.path=nowhere"], &["  model.path: no directory at nowhere"]),
        (&["data.tasks=nowhere.jsonl"], &["  data.tasks: no file at nowhere.jsonl"]),
        (&["data.tasks=model"], &["  data.tasks: no file at model"]),
        (&["data.prefix_file=nowhere.txt"], &["cannot read nowhere.txt: No such file"]),
        (&["train.output=run.toml"], &["  train.output: run.toml is a file; give a directory"]),
        (
            &["verifier={kind=\"command\", program=[\"./no-such-judge\"]}", "verifier.pick=first"],
            &["[verifier]", "unknown key `pick`"],
        ),
    ] {
        refuse_train(&f, set, words);
    }
    refuse(&f, &["train", "nowhere.toml"], 1, &["cannot read nowhere.toml: No such file or directory"]);
    f.write("run.toml", "[train\nsteps = 1");
    refuse(&f, &["train", "run.toml"], 1, &["run.toml:1: "]);
    f.write("run.toml", b"[train]\nsteps = 1 # \xff");
    refuse(&f, &["train", "run.toml"], 1, &["run.toml", "UTF-8"]);
    refuse(&f, &["train"], 2, &["<CONFIG>"]);
    refuse(&f, &["trian"], 2, &["'trian'", "'train'"]);
}

#[test]
fn a_verifier_that_cannot_be_started() {
    let f = Fixture::new();
    let config = crate::fixture::RUN
        .replace("kind = \"numeric\"", "kind = \"command\"\nprogram = [\"./no-such-judge\"]");
    f.write("run.toml", config.replace("pick = \"first\"", ""));
    refuse_train(
        &f,
        &[],
        &["[verifier]", "cannot start \"./no-such-judge\"; check the path", "No such file"],
    );
    // One that starts, but is no verifier.
    let set = "verifier.program=[\"sh\", \"-c\", \"echo I am no judge >&2; exit 3\"]";
    let ran = f.run(&["train", "run.toml", "--set", set]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for words in ["step 1: the verifier cannot be used", "3 times in a row", "exit status 3", "I am no judge"]
    {
        assert!(ran.stderr.contains(words), "{words:?} is not in: {}", ran.stderr);
    }
}

#[test]
fn task_files() {
    let f = Fixture::new();
    let good = "{\"prompt\": \"1+1=\", \"answer\": 2}\n";
    for (content, words) in [
        (b"".to_vec(), "tasks.jsonl: no tasks; each line must be a JSON object such as"),
        (b"\n \n".to_vec(), "tasks.jsonl: no tasks"),
        (
            format!("{good}\n{{\"prompt\": \"2+2=\"}}").into_bytes(),
            "tasks.jsonl:3: field `answer` is missing",
        ),
        (
            format!("{good}{{\"prompt\": \"2+2=\", \"answer\": \" \"}}").into_bytes(),
            "tasks.jsonl:2: field `answer` is blank",
        ),
        (
            format!("{good}{{\"prompt\": 4, \"answer\": 4}}").into_bytes(),
            "tasks.jsonl:2: field `prompt` is a number",
        ),
        (format!("{good}nonsense").into_bytes(), "tasks.jsonl:2: not JSON"),
        ([good.as_bytes(), b"\xff"].concat(), "tasks.jsonl:2: not UTF-8 at byte 1"),
    ] {
        f.write("tasks.jsonl", &content);
        refuse_train(&f, &[], &[words]);
        refuse(&f, &["eval", "run.toml"], 1, &[words]);
    }
    let eval = ["eval", "--model", "model", "--set", "verifier.kind=exact", "--tasks"];
    refuse(&f, &[&eval[..], &["nowhere"]].concat(), 1, &["  data.tasks: no file at nowhere"]);
    refuse(&f, &[&eval[..], &["model"]].concat(), 1, &["  data.tasks: no file at model"]);
}

#[test]
fn prompts_that_do_not_fit_are_found_before_training() {
    let f = Fixture::new();
    // BOS, the prompt and four more tokens fill the context exactly; one more is too many.
    let task = |length: usize| json!({ "prompt": "1".repeat(length), "answer": "1" }).to_string();
    let most = CONTEXT - 1 - 4;
    f.write("tasks.jsonl", format!("\n{}\n\n{}\n", task(3), task(most)));
    f.succeed(&["train", "run.toml", "--set", "train.output=fits", "--set", "train.steps=1"]);
    f.write("tasks.jsonl", format!("\n{}\n\n{}\n", task(3), task(most + 1)));
    let words = [
        "tasks.jsonl:4: the prompt has 61 tokens and generate.max_new_tokens is 4",
        "context has 64; shorten",
    ];
    refuse_train(&f, &[], &words);
    refuse(&f, &["eval", "run.toml"], 1, &words);
    refuse_train(&f, &["data.tasks=eval.jsonl", "data.eval_tasks=tasks.jsonl"], &words);
    // An expert response needs its room too.
    f.write(
        "tasks.jsonl",
        json!({ "prompt": "1", "answer": "1", "response": "2".repeat(CONTEXT) }).to_string(),
    );
    let words = ["tasks.jsonl:1: prompt and expert response have 67 tokens, but the model's context has 64"];
    refuse_train(&f, &["objective={kind=\"sft\"}", "objective.kind=sft", "objective.n=1"], &words);
}

#[test]
fn model_directories() {
    let f = Fixture::new();
    let everywhere = |words: &[&str]| {
        refuse_train(&f, &[], words);
        refuse(&f, &["eval", "run.toml"], 1, words);
        refuse(&f, &["sample", "--model", "model", "--prompt", "1"], 1, words);
        refuse(&f, &["inspect", "model"], 1, words);
    };
    let weights = f.path("model/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    everywhere(&["model.safetensors: ", "bytes"]);
    fs::remove_file(&weights).unwrap();
    everywhere(&["model: ", "model.safetensors"]);
    fs::write(&weights, &bytes).unwrap();

    f.write("model/tokenizer.json", "{}");
    everywhere(&["model/tokenizer.json: not a valid tokenizer: "]);
    f.write("model/tokenizer.json", tokenizer_json().to_string());

    let mut config = config_json();
    config["hidden_size"] = json!(8);
    f.write("model/config.json", config.to_string());
    everywhere(&["model.safetensors: the embedding is [50, 16], and config.json", "[50, 8]: take both"]);
    config["model_type"] = json!("llama");
    f.write("model/config.json", config.to_string());
    everywhere(&["model/config.json: model_type \"llama\" is not a Gemma that the engine runs"]);
    f.write("model/config.json", "[]");
    everywhere(&["model/config.json: not a JSON object"]);
    fs::remove_file(f.path("model/config.json")).unwrap();
    everywhere(&["cannot read model/config.json: No such file"]);

    for args in [
        &["sample", "--prompt", "1", "--model", "nowhere"][..],
        &["inspect", "nowhere"],
        &["logprobs", "--input", "tasks.jsonl", "--model", "nowhere"],
        &["sample", "--prompt", "1", "--model", "run.toml"],
    ] {
        let path = args[args.len() - 1];
        refuse(&f, args, 1, &[path, "is not a directory; give a model directory"]);
    }
}

#[test]
fn arguments_of_sample() {
    let f = Fixture::new();
    let with = |more: &[&'static str]| [&["sample", "--model", "model"][..], more].concat();
    for (args, words) in [
        (&[][..], "--prompt <TEXT>"),
        (&["--prompt", "1", "--prompt-file", "x"], "cannot be used with"),
        (&["--prompt", "1", "-n", "0"], "0 is not in 1..=65536"),
        (&["--prompt", "1", "-n", "-3"], "-3"),
        (&["--prompt", "1", "--temperature", "-1"], "must be 0 (greedy) or more"),
        (&["--prompt", "1", "--temperature", "nan"], "must be 0 (greedy) or more"),
        (&["--prompt", "1", "--temperature", "inf"], "must be 0 (greedy) or more"),
        (&["--prompt", "1", "--temperature", "1e-40"], "must be 0 (greedy) or more, from 1e-6 to 1e6"),
        (&["--prompt", "1", "--top-p", "0"], "must be above 0 and at most 1"),
        (&["--prompt", "1", "--min-p", "1"], "must be at least 0 and below 1"),
        (&["--prompt", "1", "--max-new-tokens", "0"], "0 is not in 1..="),
        (&["--prompt", "1", "--max-new-tokens", "18446744073709551615"], "is not in 1..="),
        (&["--prompt", "1", "--dtype", "f16"], "must be f32 or bf16"),
        (&["--prompt", "1", "--compute", "f64"], "must be auto, bf16 or f32"),
        (&["--prompt", "1", "--stop", ""], "--stop"),
    ] {
        refuse(&f, &with(args), 2, &[words]);
    }
    let mixed = ["--prompt", "1", "--dtype", "f32", "--compute", "bf16"];
    refuse(&f, &with(&mixed), 1, &["compute bf16 wants bf16 weights"]);
    refuse(&f, &with(&["--prompt-file", "nowhere"]), 1, &["cannot read nowhere: No such file"]);
    refuse(
        &f,
        &with(&["--prompt-file", "model/model.safetensors"]),
        1,
        &["cannot read model/model.safetensors", "UTF-8"],
    );
    refuse(&f, &with(&["--prompt", "1", "--max-new-tokens", "63"]), 1, &["2 tokens", "context of 64"]);
    refuse(
        &f,
        &with(&["--prompt", "1", "-n", "65536", "--max-new-tokens", "8192"]),
        1,
        &["-n 65536", "lower one"],
    );
}

#[test]
fn arguments_of_eval() {
    let f = Fixture::new();
    f.write("numbers.json", "[1, 2]");
    for (args, words) in [
        (&["eval"][..], &["give --model DIR, or model.path in CONFIG"][..]),
        (&["eval", "--model", "model"], &["give --tasks FILE, or data.tasks in CONFIG"]),
        (
            &["eval", "--model", "model", "--tasks", "tasks.jsonl"],
            &["needs a verifier", "--set verifier.kind=numeric"],
        ),
        (&["eval", "run.toml", "--set", "generate.temperature=-1"], &["  generate.temperature: is -1"]),
        (&["eval", "run.toml", "--set", "train.eval_samples=0"], &["train.eval_samples: must be at least 1"]),
        (
            &["eval", "run.toml", "--set", "generate.top_p=2"],
            &["  generate.top_p: is 2; it must be in (0, 1]"],
        ),
        (
            &["eval", "run.toml", "--set", "verifier.pik=last"],
            &["unknown key `pik` in [verifier]; did you mean `pick`?"],
        ),
        (
            &["eval", "run.toml", "--output", "no/where.json"],
            &["--output no/where.json: give a file in a directory"],
        ),
        (&["eval", "run.toml", "--compare", "nowhere.json"], &["cannot read nowhere.json: No such file"]),
        (
            &["eval", "run.toml", "--compare", "numbers.json"],
            &["numbers.json is not a report of `eval --output`"],
        ),
    ] {
        refuse(&f, args, 1, words);
    }
    refuse(&f, &["eval", "run.toml", "--samples", "0"], 2, &["0 is not in 1..=65536"]);
    f.succeed(&["eval", "run.toml", "--tasks", "eval.jsonl", "--samples", "2", "--output", "report.json"]);
    let words = ["report.json is a report of 4 tasks with 2 samples each"];
    refuse(&f, &["eval", "run.toml", "--samples", "2", "--compare", "report.json"], 1, &words);
    let compare = ["eval", "run.toml", "--tasks", "eval.jsonl", "--compare", "report.json", "--samples"];
    refuse(&f, &[&compare[..], &["3"]].concat(), 1, &words);
    let table = f.succeed(&[&compare[..], &["2"]].concat()).stdout;
    assert!(table.contains("difference") && table.contains("+0.000 [+0.000, +0.000]"), "{table}");
}

#[test]
fn arguments_of_logprobs_and_inspect() {
    let f = Fixture::new();
    f.write("in.jsonl", "");
    let args = ["logprobs", "--model", "model", "--input", "in.jsonl"];
    for (line, words) in [
        ("{}", "in.jsonl:3: neither \"prompt\" nor \"ids\""),
        ("{\"ids\": []}", "in.jsonl:3: 0 tokens; the model's context is 1 to 64 tokens"),
        ("{\"ids\": [50]}", "in.jsonl:3: token 50 is not in the vocabulary of 50 tokens"),
        ("{\"ids\": [-1]}", "in.jsonl:3: invalid value: integer `-1`"),
        ("nonsense", "in.jsonl:3: expected ident"),
    ] {
        f.write("in.jsonl", format!("{{\"prompt\": \"1+1=\"}}\n\n{line}\n"));
        refuse(&f, &[&args[..], &["--output", "out.jsonl"]].concat(), 1, &[words]);
        assert!(!f.path("out.jsonl").exists());
    }
    for temperature in ["0", "1e-40", "1e7"] {
        refuse(
            &f,
            &[&args[..], &["--temperature", temperature]].concat(),
            2,
            &["must be above 0, from 1e-6 to 1e6"],
        );
    }
    refuse(
        &f,
        &["logprobs", "--model", "model", "--input", "nowhere"],
        1,
        &["cannot open nowhere: No such file"],
    );
    refuse(&f, &["inspect"], 2, &["<DIR>"]);
}

#[test]
fn weigh_names_file_and_line() {
    let f = Fixture::new();
    f.write("groups.jsonl", "{\"scores\": [1, 0]}\n{\"score\": [1]}\n");
    let ran = f.run(&["weigh", "--objective", "rl", "groups.jsonl"]);
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.stdout.lines().count(), 1);
    assert!(
        ran.stderr.starts_with("error: groups.jsonl: line 2: unknown field `score`; did you mean `scores`?"),
        "{}",
        ran.stderr
    );
}
