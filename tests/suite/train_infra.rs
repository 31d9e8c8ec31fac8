//! What surrounds the training loop: configuration, tasks, metrics, checkpoints, signals.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Lines};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use bon_engine::checkpoint::Dtype;
use bon_engine::layered::LayeredError;
use bon_engine::objective::Kind;
use bon_engine::tasks::{Order, Tasks};
use bon_engine::train::config::{ConfigError, TrainConfig};
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::metrics::{EvalMetrics, Metrics, MetricsError, PhaseSeconds, StepMetrics};
use bon_engine::train::snapshot::{
    Array, Arrays, SnapshotError, Snapshots, TrainState, newest_valid, write_arrays,
};
use proptest::prelude::*;
use rustix::process::{Pid, Signal, kill_process};

// ---- configuration

const RUN: &str = r#"
[model]
path = "gemma"

[data]
tasks = "tasks.jsonl"

[objective]
kind = "bon-rl-s"
n = 4

[verifier]
kind = "exact"

[optimizer]
lr = 1e-5
schedule = "cosine"

[train]
steps = 100
output = "out"
"#;

fn config(overrides: &[&str]) -> TrainConfig {
    parse(RUN, overrides).unwrap()
}

fn parse(text: &str, overrides: &[&str]) -> Result<TrainConfig, ConfigError> {
    let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
    TrainConfig::parse("run.toml", text, &overrides)
}

fn refusal(text: &str, overrides: &[&str]) -> String {
    parse(text, overrides).unwrap_err().to_string()
}

#[test]
fn an_error_in_the_file_names_line_key_and_nearest_name() {
    for (from, to, message) in [
        ("lr =", "lrate =", "run.toml:16: unknown key `lrate` in [optimizer]; did you mean `lr`?"),
        (
            "[optimizer]",
            "[optimiser]",
            "run.toml:15: unknown key `optimiser` at the top level; did you mean `optimizer`?",
        ),
        (
            "\"cosine\"",
            "\"cosin\"",
            "run.toml:17: optimizer.schedule: unknown value `cosin`; did you mean `cosine`?",
        ),
        ("steps = 100", "steps = -1", "run.toml:20: train.steps: invalid value: integer `-1`, expected u64"),
        ("1e-5", "\"1e-5\"", "run.toml:16: optimizer.lr: invalid type: string \"1e-5\", expected f64"),
        ("lr = 1e-5", "lr = ", "run.toml:16: string values must be quoted, expected literal string"),
        (
            "[model]",
            "generate.stop = [\n'a',\n1]\n[model]",
            "run.toml:4: generate.stop: invalid type: integer `1`, expected a string",
        ),
        ("lr = 1e-5", "lr = 1e-5\nlr = 1", "run.toml:17: duplicate key"),
        (
            "tasks =",
            "zzz =",
            "run.toml:6: unknown key `zzz` in [data]; known: tasks, eval_tasks, report, pass_rate, prefix, prefix_file, suffix, template",
        ),
    ] {
        assert!(RUN.contains(from));
        assert_eq!(refusal(&RUN.replacen(from, to, 1), &[]), message);
    }
    assert_eq!(refusal("", &[]), "run.toml: missing field `objective`");
}

#[test]
fn an_error_in_an_override_names_the_override() {
    for (overrides, message) in [
        (
            &["train.seed=1", "train.sead=1", "train.steps=3"][..],
            "--set train.sead=1: unknown key `sead` in [train]; did you mean `seed`?",
        ),
        (
            &["optimizer.lr=fast"],
            "--set optimizer.lr=fast: optimizer.lr: invalid type: string \"fast\", expected f64",
        ),
        (&["train.steps.x=1"], "--set train.steps.x=1: train.steps: invalid type: map, expected u64"),
        (&["model=1"], "--set model=1: model: invalid type: integer `1`, expected struct ModelSection"),
        (&["steps"], "--set steps: expected key.path=value, such as --set optimizer.lr=1e-5"),
        (&["=1"], "--set =1: expected key.path=value, such as --set optimizer.lr=1e-5"),
    ] {
        assert_eq!(refusal(RUN, overrides), message);
    }
    // An error in the file stays one while overrides follow.
    let text = RUN.replace("lr =", "lrate =");
    assert!(refusal(&text, &["train.steps=3"]).starts_with("run.toml:16: unknown key `lrate`"));
}

#[test]
fn overrides_replace_and_add_and_the_last_wins() {
    let c = config(&[
        "model.path=/some dir/gemma-3",
        "optimizer.lr = 3e-4",
        "train.seed=1",
        "train.seed=2",
        "generate.stop=[\"\\n\", \"Q:\"]",
        "generate.temperature=0.7",
        "data.prefix='''it's \"quoted\"'''",
        "objective.n=8",
        "train={ steps = 7 }",
    ]);
    assert_eq!(c.model.path, Path::new("/some dir/gemma-3"));
    assert_eq!(c.optimizer.lr, 3e-4);
    assert_eq!(c.train.seed, 2);
    assert_eq!(c.generate.stop, ["\n", "Q:"]);
    assert_eq!(c.data.prefix, "it's \"quoted\"");
    assert_eq!((c.objective.kind, c.objective.n), (Kind::BonRlS, Some(8)));
    assert_eq!((c.train.steps, c.train.output.as_path()), (7, Path::new("out")));
}

#[test]
fn the_resolved_configuration_reads_back_as_itself() {
    let c = config(&[
        "generate.temperature=0.1",
        "model.dtype=bf16",
        "data.template=turn",
        "train.length_normalizer=per-sequence",
        "train.max_minutes=1.5",
        "environment.kind=numeric",
        "data.eval_tasks=eval.jsonl",
        "generate.stop=[\"a\"]",
        "train.seed=9223372036854775807",
    ]);
    let text = c.to_toml().unwrap();
    assert_eq!(parse(&text, &[]).unwrap(), c, "{text}");
    assert!(text.contains("warmup_steps = 0"), "defaults are spelled out: {text}");
}

#[test]
fn the_prefix_file_moves_into_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let (run, shots) = (dir.path().join("run.toml"), dir.path().join("shots.txt"));
    fs::write(&run, RUN).unwrap();
    fs::write(&shots, "Q: 1+1\nA: 2\n\n").unwrap();
    let set = format!("data.prefix_file={}", shots.display());
    let c = TrainConfig::load(&run, std::slice::from_ref(&set)).unwrap();
    assert_eq!((c.data.prefix.as_str(), c.data.prefix_file), ("Q: 1+1\nA: 2\n\n", None));

    let both = TrainConfig::load(&run, &[set, "data.prefix=x".into()]).unwrap_err();
    assert!(both.to_string().ends_with("data.prefix_file: is set beside data.prefix; remove one"), "{both}");
    let missing = TrainConfig::load(&run, &["data.prefix_file=nowhere".into()]).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read nowhere");
    fs::write(&run, b"a = \"\xff\"").unwrap();
    assert!(matches!(TrainConfig::load(&run, &[]), Err(ConfigError::Layered(LayeredError::Read { .. }))));
}

fn problems(c: &TrainConfig) -> BTreeMap<&'static str, String> {
    match c.validate() {
        Ok(()) => BTreeMap::new(),
        Err(ConfigError::Invalid { problems }) => problems.into_iter().map(|p| (p.key, p.message)).collect(),
        Err(e) => panic!("{e}"),
    }
}

/// A configuration with files behind its paths.
fn usable(dir: &Path, overrides: &[&str]) -> TrainConfig {
    fs::write(dir.join("tasks.jsonl"), "").unwrap();
    let mut c = config(overrides);
    c.model.path = dir.into();
    c.data.tasks = dir.join("tasks.jsonl");
    c.train.output = dir.join("out");
    c
}

#[test]
fn validation_reports_every_problem_at_once() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(problems(&usable(dir.path(), &[])), BTreeMap::new());

    let found = problems(&usable(dir.path(), &["optimizer.lr=nan", "generate.samples=3", "train.steps=0"]));
    assert_eq!(found["optimizer.lr"], "is NaN; it must be above 0");
    assert_eq!(found["generate.samples"], "is 3, less than the 4 of objective.n");
    assert_eq!(found["train.steps"], "must be at least 1");
    assert_eq!(found.len(), 3);
    let text =
        usable(dir.path(), &["optimizer.eps=0", "optimizer.beta1=1"]).validate().unwrap_err().to_string();
    assert_eq!(
        text,
        "the configuration cannot be used:\n  optimizer.beta1: is 1; it must be in [0, 1)\n  \
         optimizer.eps: is 0; it must be above 0"
    );
}

#[test]
fn each_bad_value_is_named_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    for (set, key) in [
        ("generate.prompts_per_step=0", "generate.prompts_per_step"),
        ("generate.max_new_tokens=0", "generate.max_new_tokens"),
        ("generate.temperature=0", "generate.temperature"),
        ("generate.temperature=inf", "generate.temperature"),
        ("generate.temperature=1e-50", "generate.temperature"),
        ("generate.stop=[\"\"]", "generate.stop"),
        ("generate.top_k=5", "generate.allow_truncated_sampling"),
        ("generate.top_p=0.9", "generate.allow_truncated_sampling"),
        ("generate.min_p=0.1", "generate.allow_truncated_sampling"),
        ("generate={top_p = 0, allow_truncated_sampling = true}", "generate.top_p"),
        ("generate={min_p = 1, allow_truncated_sampling = true}", "generate.min_p"),
        ("objective.n=0", "objective"),
        ("objective.kind=bon-rl", "objective"),
        ("objective.n=9", "generate.samples"),
        ("objective={kind = \"sft\"}\ntrain.kl_coefficient = 0.1", "train.kl_coefficient"),
        ("objective={kind = \"sft\"}\ntrain.mask_truncated = true", "train.mask_truncated"),
        ("objective={kind = \"sft\"}\ngenerate.refill_prompts = 1", "generate.refill_prompts"),
        ("generate.refill_prompts=1048577", "generate.refill_prompts"),
        ("objective={kind = \"pkpo\", n = 8, baseline = \"leave-one-out\"}", "generate.samples"),
        ("optimizer.lr=0", "optimizer.lr"),
        ("optimizer.lr=-1", "optimizer.lr"),
        ("optimizer.beta1=-0.1", "optimizer.beta1"),
        ("optimizer.beta2=1", "optimizer.beta2"),
        ("optimizer.eps=-1", "optimizer.eps"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay"),
        ("optimizer.clip_norm=nan", "optimizer.clip_norm"),
        ("optimizer.min_lr_ratio=1.5", "optimizer.min_lr_ratio"),
        ("optimizer.warmup_steps=101", "optimizer.warmup_steps"),
        ("train.seed=9223372036854775808", "train.seed"),
        ("train.gradient_accumulation=0", "train.gradient_accumulation"),
        ("train.gradient_accumulation=3", "train.gradient_accumulation"),
        ("train.updates_per_batch=0", "train.updates_per_batch"),
        ("train.clip_epsilon=1", "train.clip_epsilon"),
        ("train.clip_epsilon_high=0", "train.clip_epsilon_high"),
        ("train.clip_epsilon_high=nan", "train.clip_epsilon_high"),
        ("train.kl_coefficient=-0.1", "train.kl_coefficient"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints"),
        ("train.max_minutes=0", "train.max_minutes"),
        ("train.eval_every=5", "train.eval_every"),
        ("data.eval_tasks=nowhere", "data.eval_tasks"),
        ("data.report=nowhere", "data.report"),
        ("data.pass_rate=[0.1, 0.9]", "data.report"),
        ("data={report = \"nowhere\", pass_rate = [0.1, 0.9]}", "data.report"),
    ] {
        let found = problems(&usable(dir.path(), &[set]));
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [key], "{set}");
    }
    for (change, key) in [
        ((|c| c.model.path = "nowhere".into()) as fn(&mut TrainConfig), "model.path"),
        (|c| c.model.path = "".into(), "model.path"),
        (|c| c.data.tasks = "nowhere".into(), "data.tasks"),
        (|c| c.data.tasks = "".into(), "data.tasks"),
        (|c| c.train.output = "".into(), "train.output"),
        (|c| c.train.output = c.data.tasks.clone(), "train.output"),
        (|c| c.verifier = None, "verifier"),
    ] {
        let mut c = usable(dir.path(), &[]);
        change(&mut c);
        assert_eq!(problems(&c).keys().copied().collect::<Vec<_>>(), [key]);
    }
    for range in ["[0.5, 0.4]", "[-0.1, 0.4]", "[0.1, 1.1]", "[nan, 0.5]", "[0.5, nan]"] {
        let set = [
            &*format!("data.pass_rate={range}"),
            &*format!("data.report={}", dir.path().join("tasks.jsonl").display()),
        ];
        let found = problems(&usable(dir.path(), &set));
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), ["data.pass_rate"], "{range}");
    }
    // What is refused where responses are compared is fine where none are drawn.
    let sft = ["objective={kind = \"sft\", n = 1}", "generate.samples=1", "generate.top_k=5"];
    assert_eq!(problems(&usable(dir.path(), &sft)), BTreeMap::new());
    let single = problems(&usable(dir.path(), &["objective.n=1", "generate.samples=1"]));
    assert!(single["generate.samples"].starts_with("is 1; "), "{single:?}");
}

#[test]
fn resuming_needs_the_fields_that_change_a_step() {
    // The hash in a checkpoint that was written before there were the options of `ADDED` in config.rs: at their defaults
    // they must not stop its run.
    assert_eq!(parse(crate::fixture::RUN, &[]).unwrap().resume_hash().unwrap(), 1_744_373_378);
    let saved = config(&[]);
    let hash = saved.resume_hash().unwrap();
    for free in [
        "model.path=b",
        "data.tasks=b",
        "data.eval_tasks=b",
        "data.report=b",
        "train.output=b",
        "train.eval_every=3",
        "train.eval_samples=3",
        "train.save_every=3",
        "train.keep_checkpoints=3",
        "train.max_minutes=3",
    ] {
        let c = config(&[free]);
        assert_eq!(
            (c.resume_hash().unwrap(), c.resume_differences(&saved).unwrap()),
            (hash, vec![]),
            "{free}"
        );
    }
    for (set, difference) in [
        ("optimizer.lr=2e-5", "optimizer.lr: 0.00001 -> 0.00002"),
        ("train.seed=1", "train.seed: 0 -> 1"),
        ("data.pass_rate=[0.1, 0.9]", "data.pass_rate: unset -> [0.1, 0.9]"),
        ("generate.refill_prompts=4", "generate.refill_prompts: unset -> 4"),
        ("train.mask_truncated=true", "train.mask_truncated: unset -> true"),
        ("train.clip_epsilon_high=0.28", "train.clip_epsilon_high: unset -> 0.28"),
        ("train.steps=101", "train.steps: 100 -> 101"),
        ("objective.n=5", "objective.n: 4 -> 5"),
        ("data.prefix=x", "data.prefix: \"\" -> \"x\""),
        ("model.dtype=f32", "model.dtype: unset -> \"f32\""),
        ("model.compute=f32", "model.compute: \"auto\" -> \"f32\""),
        (
            "environment.kind=exact",
            "environment.case_insensitive: unset -> false; environment.kind: unset -> \"exact\"",
        ),
    ] {
        let c = config(&[set]);
        assert_ne!(c.resume_hash().unwrap(), hash, "{set}");
        assert_eq!(c.resume_differences(&saved).unwrap().join("; "), difference);
    }
    // A constant learning rate does not look at the last step.
    let constant = |set| config(&["optimizer.schedule=constant", set]).resume_hash().unwrap();
    assert_eq!(constant("train.steps=100"), constant("train.steps=200"));
    // The KL's reference is read from the starting model.
    let kl = |set| config(&["train.kl_coefficient=0.1", set]).resume_hash().unwrap();
    assert_ne!(kl("model.path=a"), kl("model.path=b"));
}

// ---- tasks

fn tasks(bytes: &[u8]) -> Result<Tasks, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.jsonl");
    fs::write(&path, bytes).unwrap();
    Tasks::read(&path).map_err(|e| e.to_string().replace(&format!("{}/", dir.path().display()), ""))
}

#[test]
fn tasks_are_read_with_their_further_fields() {
    let text = "\u{feff}{\"prompt\": \"2+2=\", \"answer\": 4, \"level\": [1]}\r\n\n \
                {\"answer\":\"-0.50\",\"prompt\":\"ü\",\"response\":\"It is -0.50\"}\n\
                {\"prompt\":\"p\",\"answer\":2.5}\n{\"prompt\":\"p\",\"answer\":18446744073709551615}";
    let found = tasks(text.as_bytes()).unwrap();
    let rows: Vec<_> =
        found.list.iter().map(|t| (t.prompt.as_str(), t.answer.as_str(), t.response())).collect();
    assert_eq!(
        rows,
        [
            ("2+2=", "4", "4"),
            ("ü", "-0.50", "It is -0.50"),
            ("p", "2.5", "2.5"),
            ("p", "18446744073709551615", "18446744073709551615"),
        ]
    );
    assert_eq!(found.list[0].fields["level"], serde_json::json!([1]));
    assert_ne!(found.fingerprint, tasks(text.replace("[1]", "[2]").as_bytes()).unwrap().fingerprint);
}

#[test]
fn a_line_that_is_no_task_is_named() {
    let good = "{\"prompt\":\"p\",\"answer\":\"a\"}\n";
    for (line, message) in [
        ("[1]", "t.jsonl:3: an array, where an object with `prompt` and `answer` must stand"),
        ("\"prompt\"", "t.jsonl:3: a string, where an object with `prompt` and `answer` must stand"),
        ("{\"answer\":\"a\"}", "t.jsonl:3: field `prompt` is missing"),
        ("{\"prompt\":\"p\"}", "t.jsonl:3: field `answer` is missing"),
        ("{\"prompt\":7,\"answer\":\"a\"}", "t.jsonl:3: field `prompt` is a number; it must be a string"),
        (
            "{\"prompt\":\"p\",\"answer\":null}",
            "t.jsonl:3: field `answer` is null; it must be a string or a number",
        ),
        ("{\"prompt\":\" \\n\",\"answer\":\"a\"}", "t.jsonl:3: field `prompt` is blank"),
        ("{\"prompt\":\"p\",\"answer\":\"\"}", "t.jsonl:3: field `answer` is blank"),
        ("{\"prompt\":\"p\",\"answer\":\"a\",\"response\":\"\"}", "t.jsonl:3: field `response` is blank"),
        (
            "{\"prompt\":\"p\",\"answer\":\"a\",\"response\":{}}",
            "t.jsonl:3: field `response` is an object; it must be a string",
        ),
        (
            "{\"prompt\":\"p\",\"answer\":100000000000000000000}",
            "t.jsonl:3: field `answer`: 100000000000000000000 is too large to be read exactly; write it as a string",
        ),
    ] {
        assert_eq!(tasks(format!("{good}\n{line}\n{good}").as_bytes()).unwrap_err(), message);
    }
    let cut = tasks(format!("{good}{{\"prompt\":\"p\",").as_bytes()).unwrap_err();
    assert!(cut.starts_with("t.jsonl:2: not JSON: EOF while parsing"), "{cut}");
    let latin1 = tasks(b"{\"prompt\":\"\xfc\",\"answer\":\"a\"}").unwrap_err();
    assert_eq!(latin1, "t.jsonl:1: not UTF-8 at byte 12 of the line; save the file as UTF-8");
    for empty in ["", "\n \n", "\u{feff}"] {
        assert!(tasks(empty.as_bytes()).unwrap_err().starts_with("t.jsonl: no tasks; "));
    }
    let missing = Tasks::read(Path::new("nowhere.jsonl")).unwrap_err();
    assert_eq!(missing.to_string(), "cannot read the tasks in nowhere.jsonl");
}

proptest! {
    #[test]
    fn no_bytes_make_the_readers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60), cut in 0..400usize) {
        let _ = tasks(&bytes);
        let _ = tasks(&[b"{\"prompt\":\"p\",\"answer\":", &bytes[..], b"}"].concat());
        let text = String::from_utf8_lossy(&bytes);
        let _ = parse(&text, &[]);
        let _ = parse(RUN, &[&text, &format!("train.{text}"), &format!("train.seed={text}")]);
        let _ = parse(&format!("{}{text}", &RUN[..cut.min(RUN.len())]), &["train.steps=1"]);
    }
}

#[test]
fn every_epoch_is_another_permutation_and_any_position_can_be_asked_for() {
    let (n, seed) = (10usize, 3);
    let mut order = Order::new(n, seed);
    let drawn: Vec<usize> = (0..40).map(|p| order.task(p)).collect();
    for epoch in drawn.chunks(n) {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..n).collect::<Vec<_>>());
    }
    assert_ne!(drawn[..n], drawn[n..2 * n]);
    // A resumed run begins in the middle; so does one that goes back.
    for p in (0..40).rev() {
        assert_eq!(order.task(p), drawn[p as usize]);
        assert_eq!(Order::new(n, seed).task(p), drawn[p as usize]);
    }
    let mut other = Order::new(n, seed + 1);
    assert_ne!((0..40).map(|p| other.task(p)).collect::<Vec<_>>(), drawn);
    // What takes the place of others comes in another order, which is one of permutations, too.
    let mut refills = Order::refills(10, 3);
    let further: Vec<usize> = (0..40).map(|p| refills.task(p)).collect();
    assert_ne!(further, drawn);
    for epoch in further.chunks(10) {
        assert_eq!(epoch.iter().copied().collect::<BTreeSet<_>>(), (0..10).collect::<BTreeSet<_>>());
    }
    assert!((0..5).all(|p| Order::new(1, 0).task(p) == 0));
}

// ---- metrics

fn step(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        loss: 0.1 * step as f64,
        kl: Some(0.25),
        token_entropy: 1.5 + step as f64,
        tokens: 1000 + step,
        verifier_failures: BTreeMap::from([("timeout".to_string(), step)]),
        seconds: PhaseSeconds { generate: 1.5, ..Default::default() },
        ..Default::default()
    }
}

/// Every event of a run's event files as TensorBoard reads them, with the checksums checked: the step, and for a
/// summary its tags and values. A session start drops what was said of its step and later ones.
fn scalars(run_dir: &Path) -> BTreeMap<(u64, String), f32> {
    fn varint(b: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = b[0];
            *b = &b[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return value;
            }
        }
        panic!("a varint that does not end");
    }
    /// (field number, value): numbers as their bits, messages as their bytes.
    fn fields(mut b: &[u8]) -> Vec<(u64, u64, &[u8])> {
        let mut out = Vec::new();
        while !b.is_empty() {
            let key = varint(&mut b);
            let (number, bytes) = match key & 7 {
                0 => (varint(&mut b), &b[..0]),
                kind => {
                    let n = match kind {
                        1 => 8,
                        2 => varint(&mut b) as usize,
                        5 => 4,
                        other => panic!("wire type {other}"),
                    };
                    let (bytes, rest) = b.split_at(n);
                    b = rest;
                    (0, bytes)
                }
            };
            out.push((key >> 3, number, bytes));
        }
        out
    }
    let check = |data: &[u8], crc: &[u8]| {
        let stored = u32::from_le_bytes(crc.try_into().unwrap()).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!(crc32c::crc32c(data), stored);
    };
    let mut files: Vec<_> =
        fs::read_dir(run_dir.join("tensorboard")).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let mut found = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        let mut rest = &bytes[..];
        let mut first = true;
        while !rest.is_empty() {
            check(&rest[..8], &rest[8..12]);
            let n = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let data = &rest[12..12 + n];
            check(data, &rest[12 + n..16 + n]);
            rest = &rest[16 + n..];

            let event = fields(data);
            let wall_time = f64::from_le_bytes(event[0].2.try_into().unwrap());
            assert!(event[0].0 == 1 && wall_time > 1.6e9);
            let step = event.iter().find(|f| f.0 == 2).map_or(0, |f| f.1);
            match event.last().unwrap() {
                (3, _, version) => assert!(first && *version == b"brain.Event:2"),
                (7, _, log) => {
                    assert_eq!(fields(log), [(1, 1, &[][..])]);
                    found.retain(|(s, _), _| *s < step);
                }
                (5, _, summary) => {
                    for (field, _, value) in fields(summary) {
                        let value = fields(value);
                        assert_eq!((field, value[0].0, value[1].0), (1, 1, 2));
                        let tag = String::from_utf8(value[0].2.to_vec()).unwrap();
                        found.insert((step, tag), f32::from_le_bytes(value[1].2.try_into().unwrap()));
                    }
                }
                other => panic!("{other:?}"),
            }
            first = false;
        }
    }
    found
}

#[test]
fn a_resumed_run_leaves_the_metrics_of_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, cut) = (dir.path().join("whole"), dir.path().join("cut"));
    let record = |dir: &Path, completed: u64, last: u64, factor: f64| {
        fs::create_dir_all(dir).unwrap();
        let mut metrics = Metrics::open(dir, completed).unwrap();
        for s in completed + 1..=last {
            metrics.step(&StepMetrics { lr: factor, ..step(s) }).unwrap();
            if s % 2 == 0 {
                metrics.eval(&EvalMetrics { step: s, pass_at_n: factor, ..Default::default() }).unwrap();
            }
        }
        metrics.sync().unwrap();
    };
    record(&whole, 0, 6, 1.0);
    // Killed in step 6, in the middle of a line; its last checkpoint was of step 3.
    record(&cut, 0, 3, 1.0);
    record(&cut, 3, 5, 9.0);
    let path = cut.join("metrics.jsonl");
    fs::write(&path, [&fs::read(&path).unwrap()[..], b"{\"step\":6,\"lo"].concat()).unwrap();
    record(&cut, 3, 6, 1.0);

    for file in ["metrics.jsonl", "eval.jsonl"] {
        let text = fs::read_to_string(whole.join(file)).unwrap();
        assert_eq!(text, fs::read_to_string(cut.join(file)).unwrap());
        assert_eq!(text.lines().count(), if file == "eval.jsonl" { 3 } else { 6 });
    }
    let lines = fs::read_to_string(whole.join("metrics.jsonl")).unwrap();
    let last: StepMetrics = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
    assert_eq!(last, StepMetrics { lr: 1.0, ..step(6) });

    let events = scalars(&whole);
    assert_eq!(events, scalars(&cut));
    assert_eq!(events[&(6, "train/loss".into())], 0.1f32 * 6.0);
    assert_eq!(events[&(6, "train/seconds/generate".into())], 1.5);
    assert_eq!(events[&(6, "train/token_entropy".into())], 7.5);
    assert!(events.contains_key(&(6, "train/response_length".into())));
    assert!(events.contains_key(&(6, "train/truncated_share".into())));
    assert_eq!(events[&(6, "train/verifier_failures/timeout".into())], 6.0);
    assert_eq!(events[&(4, "eval/pass_at_n".into())], 1.0);
    assert!(!events.contains_key(&(6, "train/step".into())));
}

#[test]
fn metrics_that_are_not_ours_are_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    fs::write(&path, "{\"step\":1}\nnotes\n{\"step\":2}\n").unwrap();
    let error = Metrics::open(dir.path(), 5).unwrap_err();
    assert!(matches!(error, MetricsError::Line { line: 2, .. }), "{error}");
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3);
}

/// Behind the last step of the checkpoint.
#[test]
fn a_torn_line_is_cut_off_wherever_it_was_torn() {
    let whole = "{\"step\":1}\n{\"step\":2}\n";
    for torn in ["{", "{\"step\":3", "{\"step\":3}"] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, format!("{whole}{torn}")).unwrap();
        let mut metrics = Metrics::open(dir.path(), 2).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), whole, "{torn}");
        metrics.step(&step(3)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 3, "{torn}");
    }
}

#[test]
fn a_loss_that_is_not_a_number_stays_one_line_of_json() {
    let dir = tempfile::tempdir().unwrap();
    let mut metrics = Metrics::open(dir.path(), 0).unwrap();
    metrics.step(&StepMetrics { loss: f64::NAN, ..step(1) }).unwrap();
    let line: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap()).unwrap();
    assert!(line["loss"].is_null());
    assert!(!scalars(dir.path()).contains_key(&(1, "train/loss".into())));
}

// ---- checkpoints

fn save(snapshots: &Snapshots, step: u64) {
    let state = TrainState { step, config_hash: 2, data_hash: 3, device: "cpu".into() };
    let m: Vec<f32> = (0..6).map(|i| (i * step) as f32).collect();
    let v = [step as f32; 4];
    snapshots
        .save(
            &state,
            |dir| {
                fs::create_dir(dir)?;
                fs::write(dir.join("config.json"), "{}")?;
                Ok(fs::write(dir.join("model.safetensors"), vec![step as u8; 3000])?)
            },
            |path| {
                let little_endian = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
                Ok(write_arrays(
                    path,
                    [
                        ("m.w".to_string(), Array::new(Dtype::F32, 2, 3, || little_endian(&m))),
                        ("v.w".to_string(), Array::new(Dtype::F32, 1, 4, || little_endian(&v))),
                    ],
                )?)
            },
        )
        .unwrap();
}

#[test]
fn a_checkpoint_gives_back_what_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    assert!(newest_valid(&dir.path().join("none")).unwrap().snapshot.is_none());
    let snapshots = Snapshots::open(&dir.path().join("run/checkpoints"), 2).unwrap();
    assert!(snapshots.newest_valid().unwrap().snapshot.is_none());
    save(&snapshots, 7);
    let snapshot = snapshots.newest_valid().unwrap().snapshot.unwrap();
    assert!(snapshot.path.ends_with("run/checkpoints/step-000007"));
    assert_eq!(snapshot.state, TrainState { step: 7, config_hash: 2, data_hash: 3, device: "cpu".into() });
    assert_eq!(fs::read(snapshot.model_dir().join("model.safetensors")).unwrap(), vec![7; 3000]);
    let arrays = Arrays::open(&snapshot.optimizer_path()).unwrap();
    let m: &[f32] = bytemuck::cast_slice(arrays.bytes("m.w", Dtype::F32, 2, 3).unwrap());
    assert_eq!(m, [0.0, 7.0, 14.0, 21.0, 28.0, 35.0]);
    assert_eq!(bytemuck::cast_slice::<u8, f32>(arrays.bytes("v.w", Dtype::F32, 1, 4).unwrap()), [7.0; 4]);

    let shape = arrays.bytes("m.w", Dtype::F32, 3, 2).unwrap_err().to_string();
    assert!(shape.ends_with("`m.w` is F32 [2, 3]; the model needs F32 [3, 2]"), "{shape}");
    assert!(matches!(arrays.bytes("w", Dtype::F32, 1, 1), Err(SnapshotError::Arrays { .. })));
    assert!(Arrays::open(&snapshot.path.join("state.json")).is_err());
}

#[test]
fn any_damage_is_found_and_the_older_checkpoint_taken() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Snapshots::open(dir.path(), 5).unwrap();
    save(&snapshots, 1);
    save(&snapshots, 2);
    let newer = dir.path().join("step-000002");
    let files = [
        "manifest.json",
        "state.json",
        "optimizer.safetensors",
        "model/config.json",
        "model/model.safetensors",
    ];
    let falls_back = |file: &Path, how: &str| {
        let newest = snapshots.newest_valid().unwrap();
        assert_eq!(
            newest.snapshot.map(|s| s.state.step),
            Some(1),
            "{how} of {} was not seen",
            file.display()
        );
        let [(path, error)] = &newest.passed_over[..] else { panic!("{:?}", newest.passed_over) };
        assert_eq!(*path, newer);
        // Damage to the manifest may show as a mismatch of any file.
        assert!(error.to_string().contains("step-000002/"), "{error}");
        if !file.ends_with("manifest.json") {
            assert!(error.to_string().contains(&*file.to_string_lossy()), "{error}");
        }
    };
    for file in files {
        let file = newer.join(file);
        let whole = fs::read(&file).unwrap();
        for i in 0..whole.len().min(1500) {
            let mut bytes = whole.clone();
            bytes[i] ^= 1;
            fs::write(&file, &bytes).unwrap();
            falls_back(&file, &format!("a flip at {i}"));
        }
        for cut in [0, 1, whole.len() / 2, whole.len() - 1] {
            fs::write(&file, &whole[..cut]).unwrap();
            falls_back(&file, &format!("a cut to {cut}"));
        }
        fs::write(&file, [&whole[..], b"}"].concat()).unwrap();
        falls_back(&file, "a longer version");
        fs::remove_file(&file).unwrap();
        falls_back(&file, "the loss");
        fs::write(&file, &whole).unwrap();
        assert_eq!(snapshots.newest_valid().unwrap().snapshot.unwrap().state.step, 2);
    }
    fs::rename(&newer, dir.path().join("step-000003")).unwrap();
    let newest = snapshots.newest_valid().unwrap();
    assert_eq!(newest.snapshot.unwrap().state.step, 1);
    assert!(newest.passed_over[0].1.to_string().contains("is of step 2"));
}

/// Runs this binary again with nothing but the test `name`, which finds `dir` in [`child_dir`] and so knows that it is
/// the process to kill.
fn child(name: &str, dir: &Path) -> (Child, Lines<BufReader<ChildStdout>>) {
    let module = module_path!().split_once("::").unwrap().1;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{module}::{name}"), "--nocapture"])
        .env("TRAIN_INFRA_DIR", dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

fn child_dir() -> Option<std::path::PathBuf> {
    std::env::var_os("TRAIN_INFRA_DIR").map(Into::into)
}

/// The line of a child that `read` understands, past what the test harness prints.
fn wait_for<T>(lines: &mut Lines<BufReader<ChildStdout>>, read: impl Fn(&str) -> Option<T>) -> Option<T> {
    lines.map_while(Result::ok).find_map(|line| read(&line))
}

fn say(line: &str) {
    use std::io::Write;
    let mut out = std::io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
}

fn saves_until_killed(dir: &Path) {
    let snapshots = Snapshots::open(dir, 1).unwrap();
    let newest = snapshots.newest_valid().unwrap();
    assert!(newest.passed_over.is_empty(), "{:?}", newest.passed_over);
    let first = newest.snapshot.map_or(1, |s| s.state.step + 1);
    for step in first..first + 1000 {
        save(&snapshots, step);
        say(&format!("\nsaved {step}"));
    }
}

#[test]
fn a_kill_at_any_moment_leaves_a_usable_checkpoint() {
    if let Some(dir) = child_dir() {
        return saves_until_killed(&dir);
    }
    let dir = tempfile::tempdir().unwrap();
    let saved = |line: &str| line.strip_prefix("saved ").map(|s| s.parse::<u64>().unwrap());
    let mut before = 0;
    for round in 0..25u64 {
        let (mut process, mut lines) = child("a_kill_at_any_moment_leaves_a_usable_checkpoint", dir.path());
        let mut last = wait_for(&mut lines, saved).expect("the child saves once");
        assert_eq!(last, before + 1, "the child goes on from the newest checkpoint");
        // Saves take a few milliseconds: the delays fall all over one.
        std::thread::sleep(Duration::from_micros(round * 977));
        process.kill().unwrap();
        assert_eq!(process.wait().unwrap().signal(), Some(9));
        while let Some(step) = wait_for(&mut lines, saved) {
            last = step;
        }
        // As a start finds it: what is complete but for its name counts.
        let newest = Snapshots::open(dir.path(), 1).unwrap().newest_valid().unwrap();
        assert!(newest.passed_over.is_empty(), "{:?}", newest.passed_over);
        before = newest.snapshot.expect("a checkpoint survives").state.step;
        assert!(before == last || before == last + 1, "{last} was saved, {before} is left");
    }
}

// ---- signals

fn stops_on_signals() {
    let stop = Interrupt::on_signals().unwrap();
    say("\nlistening");
    // Bounded, so that a broken handler ends the test too.
    for _ in 0..2000 {
        if stop.requested() {
            say("\nfinishing");
            std::thread::sleep(Duration::from_secs(20));
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_first_signal_asks_and_the_second_ends() {
    if child_dir().is_some() {
        return stops_on_signals();
    }
    let dir = tempfile::tempdir().unwrap();
    for (first, second, code) in
        [(Signal::INT, Signal::INT, 130), (Signal::TERM, Signal::INT, 130), (Signal::INT, Signal::TERM, 143)]
    {
        let (mut process, mut lines) = child("the_first_signal_asks_and_the_second_ends", dir.path());
        let said = |text: &'static str| move |line: &str| (line == text).then_some(());
        let pid = Pid::from_child(&process);
        wait_for(&mut lines, said("listening")).unwrap();
        assert!(process.try_wait().unwrap().is_none());
        kill_process(pid, first).unwrap();
        wait_for(&mut lines, said("finishing")).expect("the first signal lets the process finish");
        kill_process(pid, second).unwrap();
        assert_eq!(process.wait().unwrap().code(), Some(code));
    }
    let stop = Interrupt::default();
    let shared = stop.clone();
    assert!(!stop.requested());
    shared.request();
    assert!(stop.requested());
}
