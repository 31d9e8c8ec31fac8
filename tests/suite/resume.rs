//! Runs that are interrupted, in every way there is, and go on: the end is to the bit that of a run in one piece.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use bon_engine::checkpoint::Checkpoint;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fixture::{Fixture, Ran};
use crate::places::program;

/// `train run.toml` into `output` with more settings.
fn train(output: &str, set: &[&str]) -> Vec<String> {
    let output = format!("train.output={output}");
    let set = [&output[..]].into_iter().chain(set.iter().copied());
    ["train", "run.toml"].into_iter().chain(set.flat_map(|s| ["--set", s])).map(String::from).collect()
}

fn resume(output: &str, set: &[&str]) -> Vec<String> {
    let mut args = train(output, set);
    args.push("--resume".into());
    args
}

fn run(f: &Fixture, args: &[String]) -> Ran {
    f.run(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

fn succeed(f: &Fixture, args: &[String]) -> Ran {
    let ran = run(f, args);
    assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
    ran
}

/// Starts the program and gives its stderr, line by line.
fn start(f: &Fixture, args: &[String]) -> (Child, impl Iterator<Item = String> + use<>) {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut child = f.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    (child, lines)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// The lines of `metrics.jsonl` and `eval.jsonl` without what clocks say.
fn logs(run_dir: &Path) -> Vec<Value> {
    let mut lines = Vec::new();
    for name in ["metrics.jsonl", "eval.jsonl"] {
        for line in fs::read_to_string(run_dir.join(name)).unwrap().lines() {
            let mut line: Value = serde_json::from_str(line).unwrap();
            line.as_object_mut().unwrap().retain(|key, _| key != "seconds" && key != "tokens_per_second");
            lines.push(line);
        }
    }
    lines
}

/// All files under a directory, by path relative to it.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = PathBuf::from(path.file_name().unwrap());
        match path.is_dir() {
            true => found.extend(files(&path).into_iter().map(|(inner, bytes)| (name.join(inner), bytes))),
            false => found.push((name, fs::read(&path).unwrap())),
        }
    }
    found.sort();
    found
}

/// Asserts that two runs ended alike: model, optimizer, counters, every step's figures, every evaluation.
fn assert_same_end(f: &Fixture, a: &str, b: &str, step: u64) {
    let (a, b) = (f.path(a), f.path(b));
    for part in [format!("checkpoints/step-{step:06}"), "eval".into()] {
        if part == "eval" && !a.join(&part).exists() {
            continue;
        }
        let (mut left, mut right) = (files(&a.join(&part)), files(&b.join(&part)));
        // A kill while a report is written leaves its beginning, under a name that nobody reads.
        for files in [&mut left, &mut right] {
            files.retain(|(name, _)| !name.to_string_lossy().contains(".json.partial-"));
        }
        let names =
            |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&left), names(&right));
        for ((name, left), (_, right)) in left.iter().zip(&right) {
            assert!(left == right, "{} differs between {} and {}", name.display(), a.display(), b.display());
        }
    }
    assert_eq!(logs(&a), logs(&b));
}

#[test]
fn twenty_kills_at_random_moments_change_nothing() {
    let f = Fixture::new();
    // Master weights beside bf16, a reference model, several updates per batch: all the state that there can be.
    let set = [
        "model.dtype=bf16",
        "train.steps=60",
        "train.save_every=1",
        "train.eval_every=7",
        "train.kl_coefficient=0.01",
        "train.updates_per_batch=2",
        "data.eval_tasks=eval.jsonl",
        "train.eval_samples=4",
        "optimizer.schedule=cosine",
    ];
    succeed(&f, &train("whole", &set));

    // A round is killed a random time after its start or after one of its first lines, of which a step writes two:
    // twenty rounds end before the run does, however fast or busy the machine is.
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut below = |bound: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % bound
    };
    let mut interrupted = 0;
    for round in 0..20 {
        // Before the configuration is written, there is no run to resume.
        let begun = f.path("killed/config.toml").exists();
        let (mut child, mut lines) =
            start(&f, &if begun { resume("killed", &set) } else { train("killed", &set) });
        let mut said: Vec<String> = lines.by_ref().take(below(6) as usize).collect();
        sleep(Duration::from_micros(below(30_000)));
        child.kill().unwrap();
        said.extend(lines);
        let code = child.wait().unwrap().code();
        // Killed, or else done: never out of order.
        assert!(matches!(code, None | Some(0)), "round {round}: {said:?}");
        let bad = ["error", "damaged", "panicked"];
        assert!(
            !said.iter().any(|line| bad.iter().any(|word| line.contains(word))),
            "round {round}: {said:?}"
        );
        interrupted += u32::from(code.is_none());
    }
    assert!(interrupted >= 15, "only {interrupted} of the kills found a run at work");
    succeed(&f, &resume("killed", &set));
    assert_same_end(&f, "whole", "killed", 60);
    // Sixty steps have moved the model, so that equality means something.
    let rewards = logs(&f.path("whole")).into_iter().filter_map(|line| line["grad_norm"].as_f64());
    assert!(rewards.filter(|norm| *norm > 0.0).count() > 20);
}

#[test]
fn the_first_signal_saves_and_the_second_ends_at_once() {
    // A suite that was begun under `nohup` hands on that SIGHUP is ignored, unless this process listens to it.
    signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::default()).unwrap();
    let f = Fixture::new();
    let set = ["train.steps=100000", "train.length_normalizer=per-token", "data.suffix= "];
    for (signal_, output) in [(Signal::INT, "int"), (Signal::TERM, "term"), (Signal::HUP, "hup")] {
        let (child, mut lines) = start(&f, &train(output, &set));
        lines.find(|line| line.starts_with("step 3/")).expect("it trains");
        signal(&child, signal_);
        let rest: Vec<String> = lines.collect();
        let ran = Ran::from(child.wait_with_output().unwrap());
        assert_eq!(ran.code, Some(0), "{rest:?}");
        let saved = rest.last().and_then(|l| l.strip_prefix("saved ")).expect("it saves");
        let step: u64 = saved.rsplit('-').next().unwrap().parse().unwrap();
        assert!(step >= 3);
        let command = format!(
            "bon-engine train run.toml --set train.output={output} --set train.steps=100000 \
             --set train.length_normalizer=per-token --set 'data.suffix= ' --resume"
        );
        let words = format!("stopped after step {step} of 100000; go on with:\n  {command}\n");
        assert!(ran.stdout.starts_with(&words), "{}", ran.stdout);

        // What it prints is what a shell needs.
        let command = command.replace("bon-engine", program().to_str().unwrap());
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{command} --set train.steps={}", step + 2)]).current_dir(f.root());
        let ran = Ran::of(&mut shell);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        // The plan of memory stands between the two, and what is kept of activations where free memory changes it.
        let first = ran.stderr.lines().find(|line| line.starts_with("step ")).expect("a step");
        assert!(
            ran.stderr.starts_with(&format!("resuming after step {step}\nmemory"))
                && first.starts_with(&format!("step {}/", step + 1)),
            "{}",
            ran.stderr
        );
    }
    // A verifier that takes its time keeps the step from ending; the second signal does not wait for it.
    let verifier = "kind = \"command\"\nprogram = [\"sh\", \"-c\", \"read x; touch asked; exec sleep 20\"]";
    f.write("run.toml", crate::fixture::RUN.replace("kind = \"numeric\"\npick = \"first\"", verifier));
    let (mut child, _lines) = start(&f, &["train", "run.toml"].map(String::from));
    while !f.path("asked").exists() {
        sleep(Duration::from_millis(5));
    }
    signal(&child, Signal::INT);
    sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "the first signal lets the step end");
    signal(&child, Signal::INT);
    let began = Instant::now();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(began.elapsed() < Duration::from_secs(10));
}

/// As `nohup` has it: what the program was begun to ignore, it ignores.
#[test]
fn a_hang_up_that_is_ignored_from_the_start_does_not_stop_a_run() {
    let f = Fixture::new();
    let words = train("out", &["train.steps=300"]).join(" ");
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("trap '' HUP; exec \"$0\" {words}"), program().to_str().unwrap()]);
    shell.current_dir(f.root()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = shell.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    lines.find(|line| line.starts_with("step 3/")).expect("it trains");
    signal(&child, Signal::HUP);
    let last = lines.filter(|line| line.starts_with("step ")).last().unwrap_or_default();
    assert!(last.starts_with("step 300/300 "), "{last}");
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert!(ran.stdout.starts_with("done after 300 steps\n"), "{}", ran.stdout);
}

#[test]
fn a_run_saves_by_the_clock() {
    let f = Fixture::new();
    let saved = |output: &str, set: &[&str]| {
        let ran = succeed(&f, &train(output, &[&["train.keep_checkpoints=9"], set].concat()));
        ran.stderr.matches("\nsaved ").count()
    };
    // Every step takes longer than 6 microseconds; none takes half an hour.
    assert_eq!(saved("often", &["train.save_minutes=1e-7"]), 4);
    assert_eq!(saved("both", &["train.save_minutes=1e-7", "train.save_every=2"]), 4);
    assert_eq!(saved("default", &[]), 1);
    assert_eq!(saved("off", &["train.save_minutes=0"]), 1);
    assert_same_end(&f, "often", "default", 4);
    let config = fs::read_to_string(f.path("default/config.toml")).unwrap();
    assert!(config.contains("\nsave_minutes = 30.0\n"), "{config}");
    let ran = run(&f, &train("bad", &["train.save_minutes=-1"]));
    assert!(ran.stderr.contains("train.save_minutes: is -1; it must be 0 (off) or more"), "{}", ran.stderr);
}

/// Steps are counted from the run's beginning, wherever it was interrupted.
#[test]
fn a_resumed_run_saves_at_the_same_steps() {
    let f = Fixture::new();
    let set = |steps: &'static str| [steps, "train.save_every=2", "train.keep_checkpoints=9"];
    succeed(&f, &train("out", &set("train.steps=3")));
    succeed(&f, &resume("out", &set("train.steps=7")));
    let saved = |step: &u32| f.path(&format!("out/checkpoints/step-{step:06}")).exists();
    assert_eq!((1..=7).filter(saved).collect::<Vec<u32>>(), [2, 3, 4, 6, 7]);
}

#[test]
fn what_no_run_wrote_is_not_touched() {
    let f = Fixture::new();
    let mine = "{\"step\":1,\"loss\":2.5,\"from\":\"another tool\"}\n";
    for name in [
        "metrics.jsonl",
        "eval.jsonl",
        "unjudged.jsonl",
        "comparison.txt",
        "config.toml",
        "tensorboard/events.out.tfevents.1.host",
        "eval/step-000000.json",
        "checkpoints/checkpoint-500/model.safetensors",
        "checkpoints/.lock",
    ] {
        let path = f.path("out").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, mine).unwrap();
        let before = files(&f.path("out"));
        let ran = run(&f, &train("out", &[]));
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{name}: {}", ran.stderr);
        let top = name.split('/').next().unwrap();
        let words =
            format!("error: out/{top} is there already, and no run of this program wrote it; move it away");
        assert!(ran.stderr.starts_with(&words), "{name}: {}", ran.stderr);
        assert_eq!(files(&f.path("out")), before, "{name}");
        fs::remove_dir_all(f.path("out")).unwrap();
    }
    // The tasks themselves, where a run would log its evaluations.
    let tasks = fs::read(f.path("eval.jsonl")).unwrap();
    let ran = run(&f, &train(".", &["data.eval_tasks=eval.jsonl", "train.eval_samples=2"]));
    assert!(ran.stderr.starts_with("error: ./eval.jsonl is there already"), "{}", ran.stderr);
    assert_eq!(fs::read(f.path("eval.jsonl")).unwrap(), tasks);
    // The configuration, kept where the run is to be.
    fs::create_dir(f.path("out")).unwrap();
    fs::copy(f.path("run.toml"), f.path("out/config.toml")).unwrap();
    let ran = f.run(&["train", "out/config.toml"]);
    assert!(
        ran.code == Some(1) && ran.stderr.starts_with("error: out already holds a run"),
        "{}",
        ran.stderr
    );
    assert_eq!(fs::read(f.path("out/config.toml")).unwrap(), fs::read(f.path("run.toml")).unwrap());
    fs::remove_dir_all(f.path("out")).unwrap();
    // Other things may be there, and empty directories.
    fs::create_dir_all(f.path("out/tensorboard")).unwrap();
    fs::create_dir_all(f.path("out/checkpoints")).unwrap();
    f.write("out/notes.txt", "mine");
    succeed(&f, &train("out", &[]));
    assert_eq!(fs::read(f.path("out/notes.txt")).unwrap(), b"mine");
}

#[test]
fn a_run_that_died_with_nothing_to_keep_makes_room() {
    let f = Fixture::new();
    let set = ["data.eval_tasks=eval.jsonl", "train.eval_samples=2"];
    succeed(&f, &train("whole", &set));
    let takes_over = |output: &str| {
        let ran = succeed(&f, &train(output, &set));
        let note =
            format!("note: a run in {output} ended before its first checkpoint; this one takes its place\n");
        assert!(ran.stderr.starts_with(&note), "{}", ran.stderr);
        assert_same_end(&f, "whole", output, 4);
    };
    // Killed in its third step; it was another run.
    let other = [&set[..], &["train.steps=100000", "train.seed=9", "train.eval_every=1"]].concat();
    let (mut child, mut lines) = start(&f, &train("killed", &other));
    lines.find(|line| line.starts_with("step 3/")).expect("it trains");
    child.kill().unwrap();
    child.wait().unwrap();
    f.write("killed/eval/mine.json", "");
    f.write("whole/eval/mine.json", "");
    takes_over("killed");
    fs::remove_file(f.path("whole/eval/mine.json")).unwrap();
    assert!(!f.path("killed/eval/step-000001.json").exists());

    // Its verifier did not work.
    let broken = [&set[..], &["verifier={kind=\"command\", program=[\"false\"]}"]].concat();
    let config = crate::fixture::RUN.replace("kind = \"numeric\"\npick = \"first\"", "");
    f.write("broken.toml", config.replace("[verifier]", ""));
    let mut args = train("broken", &broken);
    args[1] = "broken.toml".into();
    assert_eq!(run(&f, &args).code, Some(1));
    assert!(f.path("broken/config.toml").exists());
    takes_over("broken");

    // Killed between the lock and the settings, or before the lock had its text.
    for (output, text) in [("locked", "bon-engine train\n"), ("empty", "")] {
        fs::create_dir_all(f.path(output).join("checkpoints")).unwrap();
        f.write(&format!("{output}/checkpoints/.lock"), text);
        succeed(&f, &train(output, &set));
        assert_same_end(&f, "whole", output, 4);
    }

    // While it lives it is not dead.
    let (mut child, mut lines) = start(&f, &train("alive", &["train.steps=100000"]));
    lines.find(|line| line.starts_with("step 1/")).expect("it trains");
    let ran = run(&f, &train("alive", &[]));
    assert!(ran.code == Some(1) && ran.stderr.contains("in use by another"), "{}", ran.stderr);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_run_resumes_with_what_its_steps_need() {
    let f = Fixture::new();
    succeed(&f, &train("whole", &[]));
    // The starting model is gone: the checkpoint has its own.
    crate::fixture::write_model(&f.path("gone"));
    succeed(&f, &train("out", &["model.path=gone", "train.steps=2"]));
    let held = ["model.path=gone", "train.kl_coefficient=0.1"];
    succeed(&f, &train("held", &[&held[..], &["train.steps=2"]].concat()));
    succeed(&f, &train("unsaved", &["model.path=gone", "train.steps=2"]));
    fs::remove_dir_all(f.path("unsaved/checkpoints")).unwrap();
    fs::remove_dir_all(f.path("gone")).unwrap();
    succeed(&f, &resume("out", &["model.path=gone"]));
    assert_same_end(&f, "whole", "out", 4);
    // But for the KL term, which is taken from it, and where there is no checkpoint.
    let ran = run(&f, &resume("held", &held));
    assert!(ran.code == Some(1) && ran.stderr.contains("model.path: no directory at gone"), "{}", ran.stderr);
    let ran = run(&f, &resume("unsaved", &["model.path=gone"]));
    assert!(ran.code == Some(1) && ran.stderr.contains("gone is not a directory"), "{}", ran.stderr);
    let ran = run(&f, &train("new", &["model.path=gone"]));
    assert!(ran.code == Some(1) && ran.stderr.contains("model.path: no directory at gone"), "{}", ran.stderr);

    // How fast a verifier's programs work changes no step.
    crate::judging::by_programs(&f, "reply 1", Some("reply $((id % 2))"));
    succeed(&f, &train("fast-whole", &[]));
    succeed(&f, &train("fast", &["train.steps=2"]));
    let faster = ["verifier.timeout_seconds=7", "verifier.workers=2", "environment.timeout_seconds=7"];
    let ran = run(&f, &resume("fast", &faster));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    // Imitation without evaluation asks no verifier, so it may be broken.
    let sft = ["objective.kind=sft", "verifier.program=[\"./no-such-judge\"]"];
    let mut args = train("sft", &sft);
    f.write(
        "sft.toml",
        fs::read_to_string(f.path("run.toml")).unwrap().split("[environment]").next().unwrap(),
    );
    args[1] = "sft.toml".into();
    succeed(&f, &args);
}

/// What a step draws beyond its prompts depends on the step alone, so that a cut anywhere changes nothing.
#[test]
fn a_run_that_refills_and_masks_resumes_to_the_same_bits() {
    let f = Fixture::new();
    let set = [
        "objective.kind=grpo",
        "generate.refill_prompts=8",
        "train.mask_truncated=true",
        "train.clip_epsilon_high=0.3",
        "train.updates_per_batch=2",
        "generate.samples=6",
        "generate.max_new_tokens=8",
        "generate.stop=[\"a\", \"e\", \"i\", \"o\", \"n\", \"s\", \"t\", \"=\", \"+\"]",
        "train.steps=6",
    ];
    succeed(&f, &train("whole", &set));
    for line in logs(&f.path("whole")) {
        assert!(line["refill_prompts"].as_u64() <= Some(8), "{line}");
    }
    let refilled = |line: &Value| line["refilled_groups"].as_u64() > Some(0);
    let whole = logs(&f.path("whole"));
    assert!(whole.iter().filter(|line| refilled(line)).count() >= 3, "{whole:#?}");
    for cut in 1..6 {
        let output = format!("cut{cut}");
        let part = format!("train.steps={cut}");
        succeed(&f, &train(&output, &[&set[..], &[&part]].concat()));
        succeed(&f, &resume(&output, &set));
        assert_same_end(&f, "whole", &output, 6);
    }
}

#[test]
fn a_signal_ends_an_evaluation_and_the_resumed_run_repeats_it() {
    let f = Fixture::new();
    // Long enough to be met at work.
    let set = ["data.eval_tasks=tasks.jsonl", "train.eval_samples=600", "generate.max_new_tokens=50"];
    let (child, mut lines) = start(&f, &train("out", &set));
    lines.find(|line| line.starts_with("evaluating after step 0")).expect("it evaluates first");
    signal(&child, Signal::INT);
    let rest: Vec<String> = lines.collect();
    let ran = Ran::from(child.wait_with_output().unwrap());
    assert_eq!(ran.code, Some(0), "{rest:?}");
    assert!(ran.stdout.starts_with("stopped after step 0 of 4; go on with:"), "{} {rest:?}", ran.stdout);
    assert!(!f.path("out/eval").exists());
    let set = ["data.eval_tasks=eval.jsonl", "train.eval_samples=2", "generate.max_new_tokens=50"];
    let ran = succeed(&f, &resume("out", &set));
    assert!(ran.stderr.contains("evaluating after step 0: 8 responses"), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("before and after 4 steps"), "{}", ran.stdout);
}

#[test]
fn evaluations_are_neither_repeated_nor_forgotten() {
    let f = Fixture::new();
    let set =
        ["data.eval_tasks=eval.jsonl", "train.eval_samples=2", "train.eval_every=2", "train.save_every=2"];
    let evaluated = |ran: &Ran| ran.stderr.lines().filter(|l| l.starts_with("evaluating")).count();
    let whole = succeed(&f, &train("whole", &set));
    assert_eq!(evaluated(&whole), 3);

    // A run that is done says so, and shows its result from its files.
    let model = fs::read(f.path("whole/checkpoints/step-000004/model/model.safetensors")).unwrap();
    let again = succeed(&f, &resume("whole", &set));
    assert_eq!(evaluated(&again), 0);
    let table = whole
        .stdout
        .strip_suffix("done after 4 steps\nthe model: whole/checkpoints/step-000004/model\n")
        .unwrap();
    let nothing = "nothing left to do: the run had finished its 4 steps\nthe model: whole/checkpoints/step-000004/model\n";
    assert_eq!(again.stdout, format!("{table}{nothing}"));
    assert_eq!(fs::read(f.path("whole/checkpoints/step-000004/model/model.safetensors")).unwrap(), model);

    // Killed between the checkpoint of step 2 and its evaluation: the resumed run makes up for that one alone.
    let args = train("part", &set);
    let (mut child, mut lines) = start(&f, &args);
    lines.find(|line| line.starts_with("saved ")).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let log = fs::read_to_string(f.path("part/eval.jsonl")).unwrap();
    let first = log.split_inclusive('\n').next().unwrap();
    f.write("part/eval.jsonl", first);
    let ran = succeed(&f, &resume("part", &set));
    assert!(!ran.stderr.contains("evaluating after step 0"), "{}", ran.stderr);
    assert_same_end(&f, "whole", "part", 4);

    // With other tasks there is nothing to compare with, and that is said before training goes on.
    let longer = ["data.eval_tasks=tasks.jsonl", "train.eval_samples=2", "train.steps=5"];
    let ran = succeed(&f, &resume("whole", &longer));
    assert!(ran.stderr.contains("no comparison at the end"), "{}", ran.stderr);
    assert!(ran.stdout.starts_with("done after 5 steps"), "{}", ran.stdout);
}

#[test]
fn minutes_that_are_up_finish_a_run_and_count_anew_when_it_is_resumed() {
    let f = Fixture::new();
    let set = [
        "train.steps=100000",
        "data.eval_tasks=eval.jsonl",
        "train.eval_samples=2",
        "train.max_minutes=0.015",
    ];
    let step = |ran: &Ran| {
        let words = "time is up after step ";
        let rest =
            &ran.stdout[ran.stdout.find(words).unwrap_or_else(|| panic!("{}", ran.stdout)) + words.len()..];
        rest.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    let first = succeed(&f, &train("out", &set));
    assert!(first.stdout.starts_with("before and after "), "{}", first.stdout);
    let second = succeed(&f, &resume("out", &set));
    assert!(step(&first) > 0 && step(&second) > step(&first), "{} {}", first.stdout, second.stdout);
    assert!(second.stdout.starts_with("before and after "), "{}", second.stdout);
}

#[test]
fn a_resumed_run_outlives_the_checkpoint_that_it_began_from() {
    let f = Fixture::new();
    let set = ["train.save_every=1", "train.keep_checkpoints=1"];
    succeed(&f, &train("whole", &set));
    succeed(&f, &train("out", &["train.save_every=1", "train.keep_checkpoints=1", "train.steps=1"]));
    succeed(&f, &resume("out", &set));
    assert!(f.path("out/checkpoints/step-000004/model/tokenizer.json").exists());
    assert_same_end(&f, "whole", "out", 4);
}

#[test]
fn a_full_disk_costs_no_checkpoint() {
    let f = Fixture::new();
    let set = ["train.save_every=1"];
    succeed(&f, &train("whole", &set));
    succeed(&f, &train("out", &["train.save_every=1", "train.steps=2"]));
    let before = files(&f.path("out/checkpoints"));

    // No file may grow beyond 32 blocks, of 512 or 1024 bytes according to the shell: the optimizer's state does, the
    // metrics do not. SIGXFSZ, being ignored, leaves the write with an error, as a full disk does.
    let state = before.iter().find(|(name, _)| name.ends_with("optimizer.safetensors")).unwrap();
    assert!(state.1.len() > 32 << 10);
    let words: Vec<String> = resume("out", &set);
    let script = format!("trap '' XFSZ; ulimit -f 32; exec \"$0\" {}", words.join(" "));
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, program().to_str().unwrap()]).current_dir(f.root());
    let ran = Ran::of(&mut shell);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    let error = ran.stderr.lines().last().unwrap();
    for words in [
        "error: cannot save out/checkpoints/step-000003; earlier checkpoints are untouched: ",
        "File too large",
    ] {
        assert!(error.contains(words), "{words:?} is not in: {error}");
    }
    assert_eq!(files(&f.path("out/checkpoints")), before);
    succeed(&f, &resume("out", &set));
    assert_same_end(&f, "whole", "out", 4);
}

#[test]
fn what_cannot_be_resumed_or_begun() {
    let f = Fixture::new();
    let refused = |args: &[String], words: &[&str]| {
        let ran = run(&f, args);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{}", ran.stderr);
        assert!(words.iter().all(|w| ran.stderr.contains(w)), "{words:?}: {}", ran.stderr);
    };
    refused(
        &resume("out", &[]),
        &["error: out/checkpoints holds no checkpoint to resume; start without --resume\n"],
    );
    assert!(!f.path("out").exists());
    succeed(&f, &train("out", &["train.save_every=1", "train.steps=3", "train.keep_checkpoints=3"]));
    refused(
        &train("out", &[]),
        &["error: out already holds a run; go on with --resume, or choose another train.output\n"],
    );
    refused(
        &resume("out", &["optimizer.lr=0.5", "generate.samples=6", "train.save_every=7"]),
        &[
            "error: out was begun with other settings",
            "\n  generate.samples: 4 -> 6\n  optimizer.lr: 0.01 -> 0.5\n",
        ],
    );
    let tasks = fs::read(f.path("tasks.jsonl")).unwrap();
    f.write("tasks.jsonl", "{\"prompt\": \"1\", \"answer\": \"1\"}\n");
    refused(
        &resume("out", &[]),
        &["error: out was begun with other settings", "\n  tasks.jsonl: its tasks have changed\n"],
    );
    f.write("tasks.jsonl", tasks);

    // One byte of the newest checkpoint: the one before takes over.
    let weights = |step: u64| f.path(&format!("out/checkpoints/step-{step:06}/model/model.safetensors"));
    let flip = |step: u64| {
        let mut bytes = fs::read(weights(step)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(weights(step), bytes).unwrap();
    };
    let good = fs::read(weights(3)).unwrap();
    flip(3);
    let ran = succeed(&f, &resume("out", &["train.steps=3", "train.keep_checkpoints=3"]));
    let passed = "passing over the damaged checkpoint out/checkpoints/step-000003: ";
    assert!(ran.stderr.starts_with(passed) && ran.stderr.contains("CRC-32C"), "{}", ran.stderr);
    assert!(ran.stderr.contains("\nresuming after step 2\n"), "{}", ran.stderr);
    assert!(ran.stderr.contains("\nstep 3/3 ") && !ran.stderr.contains("\nstep 2/3 "), "{}", ran.stderr);
    assert!(fs::read(weights(3)).unwrap() == good);

    (1..=3).for_each(flip);
    refused(
        &resume("out", &[]),
        &["error: every checkpoint in out/checkpoints is damaged, the newest one thus: "],
    );
    // Its settings or its checkpoints alone are a run, too.
    fs::remove_file(f.path("out/config.toml")).unwrap();
    refused(&train("out", &[]), &["error: out already holds a run"]);
}

/// A checkpoint knows the settings that it was made with, whatever the file beside it says.
#[test]
fn settings_that_were_exchanged_under_a_checkpoint_are_noticed() {
    let f = Fixture::new();
    succeed(&f, &train("out", &["train.steps=2"]));
    let path = f.path("out/config.toml");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, set) in [
        ("lr = 0.01", "lr = 0.02", "optimizer.lr=0.02"),
        ("temperature = 1.0", "temperature = 0.5", "generate.temperature=0.5"),
        ("seed = 0", "seed = 1", "train.seed=1"),
    ] {
        assert_eq!(text.matches(from).count(), 1, "{text}");
        fs::write(&path, text.replace(from, to)).unwrap();
        let ran = run(&f, &resume("out", &["train.steps=3", set]));
        assert_eq!(ran.code, Some(1), "{set}: {}", ran.stderr);
        assert!(
            ran.stderr.contains("out/config.toml: not the settings of the checkpoints"),
            "{}",
            ran.stderr
        );
    }
    fs::write(&path, text).unwrap();
    succeed(&f, &resume("out", &["train.steps=3"]));
}

/// Files that steps read and checkpoints do not hold: a verifier's script, and the start where adapters or a KL term need it.
#[test]
fn files_that_have_changed_under_a_run_are_noticed() {
    let f = Fixture::new();
    let model = f.path("model/model.safetensors");
    let good = fs::read(&model).unwrap();
    let mut other = good.clone();
    *other.last_mut().unwrap() ^= 1;
    let script = "while read -r line; do id=${line#*\\\"id\\\":}; printf '{\"id\":%s,\"score\":1}\\n' \"${id%%,*}\"; done\n";
    f.write("judge.sh", script);
    let judge = "verifier={kind=\"command\", program=[\"sh\", \"judge.sh\"]}";
    for (name, set, key) in [
        ("plain", "train.seed=0", None),
        ("kl", "train.kl_coefficient=0.1", Some("model.weights")),
        ("lora", "lora.rank=2", Some("model.weights")),
        ("judged", judge, Some("verifier_files.judge.sh")),
    ] {
        let of = |steps: &'static str| [set, "train.steps=2", steps];
        succeed(&f, &train(name, &of("train.steps=2")));
        fs::write(&model, &other).unwrap();
        f.write("judge.sh", format!("{script}# changed\n"));
        let ran = run(&f, &resume(name, &of("train.steps=3")));
        assert_eq!(ran.code, Some(i32::from(key.is_some())), "{name}: {}", ran.stderr);
        if let Some(key) = key {
            let words = format!(
                "error: {name} was begun with other settings, so it cannot go on to the same bits:\n  {key}: crc32c "
            );
            assert!(ran.stderr.contains(&words), "{}", ran.stderr);
            assert!(ran.stderr.ends_with(": the file has changed since the checkpoint\n"), "{}", ran.stderr);
        }
        fs::write(&model, &good).unwrap();
        f.write("judge.sh", script);
        succeed(&f, &resume(name, &of("train.steps=4")));
    }
}

/// The layers' own embeddings of a Gemma 4 E stay as they are, unless a run trains them: then it is another run, and goes on to the
/// same bits, in f32 and rounded at random.
#[test]
fn a_run_that_trains_per_layer_embeddings_resumes_to_the_same_bits() {
    let f = Fixture::gemma_4_e();
    let table = |model: &str| {
        let checkpoint = Checkpoint::open(&f.path(model)).unwrap();
        let view = checkpoint.tensor("model.embed_tokens_per_layer.weight").unwrap();
        let row = view.bytes.len() / view.shape[0];
        view.bytes.chunks(row).map(<[u8]>::to_vec).collect::<Vec<_>>()
    };
    let after = |run: &str| table(&format!("{run}/checkpoints/step-000004/model"));
    let trained = "model.per_layer_embeddings=trained";
    for (name, state) in [
        ("f32", &["train.kl_coefficient=0.05"][..]),
        (
            "small",
            &[
                "model.dtype=bf16",
                "optimizer.moments=8bit",
                "optimizer.masters=false",
                "optimizer.gradients=bf16",
            ],
        ),
    ] {
        let set = [&[trained][..], state].concat();
        let whole = format!("{name}-whole");
        succeed(&f, &train(&whole, &set));
        succeed(&f, &train(name, &[&set[..], &["train.steps=2"]].concat()));
        succeed(&f, &resume(name, &set));
        assert_same_end(&f, &whole, name, 4);
    }
    // What no step has read has no gradient: the last tokens of the vocabulary.
    let (start, end) = (table("model"), after("f32"));
    let moved: Vec<usize> = (0..start.len()).filter(|&id| start[id] != end[id]).collect();
    assert!(moved.len() > 5 && moved.len() < start.len(), "{moved:?}");

    let other = run(&f, &resume("f32", &["train.kl_coefficient=0.05", "train.steps=5"]));
    assert!(
        other.stderr.contains("\n  model.per_layer_embeddings: \"trained\" -> unset\n"),
        "{}",
        other.stderr
    );
    let both = run(&f, &train("both", &[trained, "lora.rank=2"]));
    let words =
        "model.per_layer_embeddings: is \"trained\", and under [lora] adapters alone are; leave one out";
    assert!(both.code == Some(1) && both.stderr.contains(words), "{}", both.stderr);
    succeed(&f, &train("frozen", &[]));
    assert!(after("frozen") == start);
}

#[test]
fn a_start_that_was_killed_or_refused_can_be_repeated() {
    let f = Fixture::new();
    // Killed after the directory was made, before the settings were written.
    fs::create_dir_all(f.path("out/checkpoints")).unwrap();
    let ran = run(&f, &resume("out", &[]));
    assert!(ran.stderr.contains("start without --resume"), "{}", ran.stderr);
    succeed(&f, &train("out", &[]));

    // Killed after the settings were written, before the first checkpoint.
    fs::remove_dir_all(f.path("out/checkpoints")).unwrap();
    let ran = succeed(&f, &resume("out", &[]));
    assert!(ran.stderr.starts_with("no step completed yet: starting again\nmemory"), "{}", ran.stderr);
    assert!(ran.stderr.contains("it fits\nstep 1/4 "), "{}", ran.stderr);
    succeed(&f, &train("whole", &[]));
    assert_same_end(&f, "whole", "out", 4);

    // From another model, that would be another run.
    fs::remove_dir_all(f.path("out/checkpoints")).unwrap();
    crate::fixture::write_model(&f.path("other"));
    let ran = run(&f, &resume("out", &["model.path=other"]));
    assert!(ran.stderr.contains("\n  model.path: model -> other\n"), "{}", ran.stderr);
    assert_eq!(ran.code, Some(1));
}
