//! The configuration of a training run: what it reads, what it refuses, and what a resumed run may change.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use bon_engine::layered::LayeredError;
use bon_engine::objective::Kind;
use bon_engine::train::config::{ConfigError, TrainConfig};
use proptest::prelude::*;

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

proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..60), cut in 0..400usize) {
        let text = String::from_utf8_lossy(&bytes);
        let _ = parse(&text, &[]);
        let _ = parse(RUN, &[&text, &format!("train.{text}"), &format!("train.seed={text}")]);
        let _ = parse(&format!("{}{text}", &RUN[..cut.min(RUN.len())]), &["train.steps=1"]);
    }
}
