//! The command line as users see it.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use serde_json::Value;

use crate::fixture::{CONTEXT, Fixture, RUN, Ran, vocabulary};

#[test]
fn every_command_explains_itself() {
    let f = Fixture::new();
    let commands = f.succeed(&["--help"]).stdout;
    let listed = commands.lines().skip_while(|line| *line != "Commands:").skip(1);
    let listed = listed.take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
    let names = listed.filter(|line| !line.starts_with(' ')).filter_map(|line| line.split(' ').next());
    let names: Vec<&str> = names.filter(|name| *name != "help").collect();
    assert!(names.len() >= 12, "{commands}");
    let readme = std::fs::read_to_string(crate::places::checkout().join("README.md")).unwrap();
    for command in names {
        assert!(readme.contains(&format!("bon-engine {command}")), "README.md does not speak of {command}");
        let help = f.succeed(&[command, "--help"]).stdout;
        assert!(help.contains(&format!("Usage: bon-engine {command}")), "{help}");
        // Every argument has a sentence: its own line is longer than its name and default, or the next one explains.
        let lines: Vec<&str> = help.lines().collect();
        for (i, line) in lines.iter().enumerate().filter(|(_, l)| l.starts_with("      --")) {
            let explained =
                line.trim().contains("  ") || lines.get(i + 1).is_some_and(|l| l.starts_with("     "));
            assert!(explained, "{command}: {line}");
        }
    }
    assert_eq!(f.succeed(&["--version"]).stdout, concat!("bon-engine ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn sample_prints_one_response_alone_and_several_with_their_numbers() {
    let f = Fixture::new();
    let args = ["sample", "--model", "model", "--prompt", "1+1=", "--max-new-tokens", "12", "--seed", "3"];
    let json = f.succeed(&[&args[..], &["-n", "3", "--json"]].concat()).stdout;
    let lines: Vec<Value> = json.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let text = |i: usize| lines[i]["text"].as_str().unwrap();
    assert_eq!(lines.len(), 3);
    for line in &lines {
        let count = |key: &str| line[key].as_array().unwrap().len();
        assert_eq!(count("tokens"), count("logprobs"));
        assert!((line["finish"] == "length") == (count("tokens") == 12) || line["finish"] == "stop");
    }
    assert_ne!(text(0), text(1));

    // Stream 0 draws the same tokens whether it is alone or not.
    let one = f.succeed(&args);
    assert_eq!(one.stdout, format!("{}\n", text(0)));
    assert!(one.stderr.starts_with("--- ") && one.stderr.contains("tokens/s"), "{}", one.stderr);

    let several = f.succeed(&[&args[..], &["-n", "3"]].concat()).stdout;
    for (i, line) in lines.iter().enumerate() {
        let tokens = line["tokens"].as_array().unwrap().len();
        let header = format!("--- {} of 3: {tokens} tokens, log-prob ", i + 1);
        let at = several.find(&header).unwrap_or_else(|| panic!("no {header:?} in {several}"));
        let (_, rest) = several[at..].split_once('\n').unwrap();
        assert!(rest.starts_with(&format!("{}\n", text(i))), "{rest}");
    }

    // Prompt and decoding apart: all tokens are counted once.
    let ran = f.run(&[&args[..], &["-n", "3", "--timings"]].concat());
    let tokens: usize = lines.iter().map(|line| line["tokens"].as_array().unwrap().len()).sum();
    let timings = ran.stderr.lines().find(|line| line.starts_with("--- loading: ")).unwrap();
    assert!(timings.contains("; prompt of 5 tokens and the first of each response: "), "{timings}");
    assert!(timings.contains(&format!("; {} further tokens: ", tokens - 3)), "{timings}");
    assert_eq!(ran.stdout, several);

    // The text ends before the stop string.
    let stop = &text(0).chars().last().unwrap().to_string();
    let stopped = f.succeed(&[&args[..], &["--stop", stop]].concat()).stdout;
    assert_eq!(stopped, format!("{}\n", text(0).split(stop.as_str()).next().unwrap()));
}

/// A line for each N, of all rounds but the one that warms up, and every token counted.
#[test]
fn bench_tells_the_prompt_and_decoding_apart_for_each_n() {
    let f = Fixture::new();
    let args = [
        "bench",
        "--model",
        "model",
        "--prompt-tokens",
        "9",
        "--new-tokens",
        "5",
        "-n",
        "4,1",
        "--rounds",
        "3",
    ];
    let json = f.succeed(&[&args[..], &["--json"]].concat()).stdout;
    let lines: Vec<Value> = json.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    for (line, streams) in lines.iter().zip([4, 1]) {
        assert_eq!((&line["streams"], &line["prompt_tokens"]), (&streams.into(), &9.into()));
        assert_eq!(line["decoded_tokens"], streams * 4);
        for key in ["prompt_seconds", "decode_seconds"] {
            let seconds: Vec<f64> = serde_json::from_value(line[key].clone()).unwrap();
            assert!(seconds.len() == 3 && seconds.iter().all(|&s| s > 0.0), "{line}");
        }
    }
    let rows = |stdout: &str| -> Vec<Vec<String>> {
        stdout.lines().skip(1).map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
    };
    let found = rows(&f.succeed(&args).stdout);
    assert!(found.len() == 2 && found[0][0] == "4" && found[1][0] == "1" && found[0][4] == "ms", "{found:?}");
    // A first token alone leaves nothing to decode.
    let found =
        rows(&f.succeed(&["bench", "--model", "model", "--prompt-tokens", "1", "--new-tokens", "1"]).stdout);
    assert!(found.len() == 3 && found.iter().all(|row| row[2..] == ["-", "-"]), "{found:?}");

    for (more, reason) in [
        (&["--prompt-tokens", "60"][..], "context"),
        (&["-n", "100000"], "100000"),
        (&["-n", "1,,2"], "invalid"),
        (&["-n", "0"], "invalid"),
        (&["--rounds", "0"], "invalid"),
    ] {
        let ran = f.run(&[&["bench", "--model", "model", "--new-tokens", "8"], more].concat());
        assert!(ran.code != Some(0) && ran.stderr.contains(reason), "{more:?}: {}", ran.stderr);
    }
}

/// The calling thread is one of those that compute: alone, it must not wait for others.
#[test]
fn one_thread_computes_what_several_do() {
    let f = Fixture::new();
    let sample =
        ["sample", "--model", "model", "--prompt", "1+1=", "--max-new-tokens", "5", "-n", "3", "--json"];
    let eval = ["eval", "run.toml", "--samples", "3", "--tasks", "eval.jsonl"];
    for args in [&sample[..], &eval[..]] {
        let [one, several] = ["1", "3"].map(|threads| {
            let ran = Ran::of(f.command(args).env("RAYON_NUM_THREADS", threads));
            assert_eq!(ran.code, Some(0), "{}", ran.stderr);
            ran.stdout
        });
        assert!(!one.is_empty());
        assert_eq!(one, several);
    }
}

#[test]
fn eval_needs_no_configuration_file() {
    let f = Fixture::new();
    let with_file = ["eval", "run.toml", "--samples", "3", "--tasks", "eval.jsonl"];
    let by_file = f.succeed(&with_file).stdout;
    let set = [
        "--set",
        "verifier.kind=numeric",
        "--set",
        "verifier.pick=first",
        "--set",
        "generate.max_new_tokens=4",
    ];
    let alone = ["eval", "--model", "model", "--tasks", "eval.jsonl", "--samples", "3"];
    let by_arguments = f.succeed(&[&alone[..], &set].concat()).stdout;
    assert_eq!(by_file, by_arguments);
    assert!(by_file.contains("problems: 4, samples each: 3") && by_file.contains("pass@N"), "{by_file}");
    // The sections that evaluation reads are enough for a file, too.
    f.write("eval.toml", "[model]\npath='model'\n[data]\ntasks='eval.jsonl'\n[generate]\nmax_new_tokens=4\n[verifier]\nkind='numeric'\npick='first'\n");
    assert_eq!(f.succeed(&["eval", "eval.toml", "--samples", "3"]).stdout, by_file);
    f.succeed(&["eval", "eval.toml", "--samples", "1", "--set", "generate.temperature=0"]);
}

#[test]
fn arguments_count() {
    let f = Fixture::new();
    let sample = ["sample", "--model", "model", "--prompt", "1+1=", "--max-new-tokens", "12", "--seed"];
    let drawn = |seed| f.succeed(&[&sample[..], &[seed]].concat()).stdout;
    assert_ne!(drawn("3"), drawn("4"));
    assert_eq!(drawn("3"), drawn("3"));

    f.write("texts.jsonl", "{\"prompt\":\"1+1=2\"}\n");
    let score = |temperature| {
        let args = ["logprobs", "--model", "model", "--input", "texts.jsonl", "--temperature", temperature];
        let line: Value = serde_json::from_str(&f.succeed(&args).stdout).unwrap();
        line["logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect::<Vec<f64>>()
    };
    let (plain, flat) = (score("1"), score("1000000"));
    assert_ne!(plain, flat);
    // The 50 tokens are equally likely at last.
    assert!(flat.iter().all(|l| (l + 50f64.ln()).abs() < 1e-3), "{flat:?}");

    // What is said on the command line goes before the file.
    let set = ["--set", "data.eval_tasks=tasks.jsonl", "--set", "model.dtype=f32", "--samples", "2"];
    let more = ["--tasks", "eval.jsonl", "--dtype", "bf16", "--output", "r.json"];
    let shown = f.succeed(&[&["eval", "run.toml"], &set[..], &more].concat()).stdout;
    assert!(shown.contains("problems: 4, samples each: 2"), "{shown}");
    let report: Value = serde_json::from_slice(&std::fs::read(f.path("r.json")).unwrap()).unwrap();
    assert_eq!(report["provenance"]["settings"]["model.dtype"], "bf16");
    let shown = f.succeed(&[&["eval", "run.toml"], &set[..]].concat()).stdout;
    assert!(shown.contains("problems: 25, samples each: 2"), "{shown}");
}

/// Each leaves one token.
#[test]
fn truncation_of_the_configuration_counts() {
    let f = Fixture::new();
    for (set, truncated) in [
        ("generate.top_k=1", true),
        ("generate.top_p=1e-6", true),
        ("generate.min_p=0.99999", true),
        ("generate.top_k=0", false),
    ] {
        let args = ["eval", "run.toml", "--samples", "8", "--set", set, "--output", "r.json"];
        f.succeed(&args);
        let report: Value = serde_json::from_slice(&std::fs::read(f.path("r.json")).unwrap()).unwrap();
        let most = |p: &Value| p["distinct_answers"].as_f64().unwrap();
        let most = report["problems"].as_array().unwrap().iter().map(most).fold(0.0, f64::max);
        assert_eq!(most <= 1.0, truncated, "{set}: {most} answers to a problem");
    }
}

/// Prompt, response and the token that ends it.
#[test]
fn an_expert_may_fill_the_context() {
    let f = Fixture::new();
    f.write("run.toml", RUN.replace("kind = \"pass-at-n\"\nn = 2", "kind = \"sft\""));
    let train = |letters: usize| {
        let response = "a".repeat(letters);
        f.write(
            "tasks.jsonl",
            format!("{{\"prompt\":\"1+1=\",\"answer\":\"2\",\"response\":\"{response}\"}}\n").repeat(4),
        );
        f.run(&[
            "train",
            "run.toml",
            "--set",
            "train.steps=1",
            "--set",
            &format!("train.output=of-{letters}"),
        ])
    };
    let fits = CONTEXT - 5 - 1;
    let ran = train(fits);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let ran = train(fits + 1);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("tasks.jsonl:1: ") && ran.stderr.contains("65 tokens"), "{}", ran.stderr);
}

/// The loss of imitation is that of the expert's tokens and of the one that ends the model's turn.
#[test]
fn an_expert_of_a_turn_ends_it() {
    let f = Fixture::new();
    f.write("run.toml", RUN.replace("kind = \"pass-at-n\"\nn = 2", "kind = \"sft\""));
    f.write("tasks.jsonl", "{\"prompt\":\"1+1=\",\"answer\":\"2\"}\n");
    let set = ["data.template=turn", "train.steps=1", "generate.prompts_per_step=1"];
    let set = set.into_iter().chain(["train.length_normalizer=per-sequence"]).flat_map(|s| ["--set", s]);
    f.succeed(&["train", "run.toml"].into_iter().chain(set).collect::<Vec<&str>>());
    let log = std::fs::read_to_string(f.path("out/metrics.jsonl")).unwrap();
    let step: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();

    let words = vocabulary();
    let ids = |text: &str| -> Vec<usize> {
        text.chars().map(|c| words.iter().position(|w| *w == c.to_string()).unwrap()).collect()
    };
    let (start, end) = (vec![4], vec![5]);
    let turn =
        [vec![2], start.clone(), ids("user\n1+1="), end.clone(), ids("\n"), start, ids("model\n2"), end];
    f.write("texts.jsonl", serde_json::json!({ "ids": turn.concat() }).to_string());
    let scored = f.succeed(&["logprobs", "--model", "model", "--input", "texts.jsonl"]).stdout;
    let scored: Value = serde_json::from_str(&scored).unwrap();
    let all: Vec<f64> = scored["logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
    let want = -all[all.len() - 2..].iter().sum::<f64>() / 2.0;
    let loss = step["loss"].as_f64().unwrap();
    assert!((loss - want).abs() < 1e-5, "{loss}, {want}");
}

#[test]
fn equal_warnings_are_told_once() {
    let f = Fixture::new();
    // Two characters, which may have been meant as one.
    let set = ["--set", r"data.suffix='\n'", "--set", "data.eval_tasks=eval.jsonl"];
    let few = ["--set", "train.steps=1", "--set", "train.eval_samples=2"];
    let ran = f.succeed(&[&["train", "run.toml"], &set[..], &few].concat());
    assert_eq!(ran.stderr.matches("warning: data.suffix").count(), 1, "{}", ran.stderr);
}

#[test]
fn inspect_and_devices_tell_what_is_there() {
    let f = Fixture::new();
    let model = f.succeed(&["inspect", "model", "--tensors"]).stdout;
    for words in [
        "family       gemma3_text\n",
        "L 2, D 16, H 2, K 1, Dh 8, F 32, V 50, context 64\n",
        "layers       0: see a window of 8",
        "layers       1: see everything before",
        "<bos> 2, <eos> 1, <start_of_turn> 4, <end_of_turn> 5\n",
        "tensor       model.norm.weight F32 [16]\n",
    ] {
        assert!(model.contains(words), "no {words:?} in {model}");
    }
    let devices = f.succeed(&["devices"]).stdout;
    assert!(devices.starts_with("cpu   "), "{devices}");
    let models = f.succeed(&["devices", "--models"]).stdout;
    assert!(read_readme().contains(&format!("```text\n{models}```\n")), "README has not: {models}");
}

fn read_readme() -> String {
    std::fs::read_to_string(crate::places::checkout().join("README.md")).unwrap()
}

#[test]
fn a_run_tells_its_progress_on_stderr_and_its_result_on_stdout() {
    let f = Fixture::new();
    let args = ["train", "run.toml", "--set", "data.eval_tasks=eval.jsonl", "--set", "train.eval_samples=2"];
    let ran = f.succeed(&args);
    for step in 1..=4 {
        let line = ran.stderr.lines().find(|l| l.starts_with(&format!("step {step}/4  reward "))).unwrap();
        for words in ["  pass@1 ", "  pass@2 ", "  loss ", "  grad ", " tokens/s  ", " left"] {
            assert!(line.contains(words), "no {words:?} in {line}");
        }
    }
    assert!(ran.stderr.contains("evaluating after step 0: 8 responses\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("evaluating after step 4: 8 responses\n"), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("before and after 4 steps, on eval.jsonl:\n"), "{}", ran.stdout);
    let end = "done after 4 steps\nthe model: out/checkpoints/step-000004/model\n";
    assert!(ran.stdout.ends_with(end), "{}", ran.stdout);
    f.succeed(&["inspect", "out/checkpoints/step-000004/model"]);
}

#[test]
fn verifier_failures_are_told_once() {
    let f = Fixture::new();
    let tasks = ["2", "two", "two", "two"]
        .map(|answer| format!("{{\"prompt\": \"1+1=\", \"answer\": {answer:?}}}\n"));
    f.write("tasks.jsonl", tasks.concat());
    let ran = f.succeed(&["train", "run.toml"]);
    let warning = "warning: 12 responses could not be judged (answer); they count as wrong\n  the first, by the verifier: \
        the task's answer \"two\" holds no number; correct the task or choose another verifier kind\n  all of them are in \
        out/unjudged.jsonl\n";
    assert_eq!(ran.stderr.matches("could not be judged").count(), 1, "{}", ran.stderr);
    assert!(ran.stderr.contains(warning), "{}", ran.stderr);
}

#[test]
fn a_reader_that_goes_away_ends_the_program_quietly() {
    let f = Fixture::new();
    let many = "{\"scores\": [1, 0, 0, 1]}\n".repeat(50_000);
    f.write("many.jsonl", many);
    for args in [
        &["weigh", "--objective", "rl", "many.jsonl"][..],
        &["sample", "--model", "model", "--prompt", "1", "-n", "400", "--max-new-tokens", "60"],
        &["sample", "--model", "model", "--prompt", "1", "-n", "400", "--max-new-tokens", "60", "--json"],
    ] {
        let mut child = f.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        BufReader::with_capacity(64, child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        assert!(!first.is_empty());
        let mut error = String::new();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert_eq!((child.wait().unwrap().code(), error.as_str()), (Some(0), ""), "{args:?}");
    }
}

#[test]
fn training_goes_on_when_nobody_reads_its_progress() {
    let f = Fixture::new();
    let mut child =
        f.command(&["train", "run.toml"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    f.succeed(&["inspect", "out/checkpoints/step-000004/model"]);
    // And an error with no stderr to print it on is still an error.
    let mut child = f.command(&["train", "nowhere"]).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}
