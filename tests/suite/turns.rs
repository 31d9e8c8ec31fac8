//! Rollouts of more prompts, or of more responses to one, than the device holds at once.

use std::fs;
use std::sync::Arc;

use bon_engine::backend::Truncation;
use bon_engine::generate::Sampling;
use bon_engine::model_dir::{ModelDir, Precision};
use bon_engine::rollout::{Group, Judges, PromptFormat, ResponseEnd, Rollout, Wrapping};
use bon_engine::tasks::{Task, Tasks};
use bon_engine::train::config::TrainConfig;
use bon_engine::verifier::{Failure, Request, Verifier};

use crate::delegating::Delegating;
use crate::fixture::Fixture;
use crate::training::{checkpoint, metrics, train_on};

/// A score that depends on all that a verdict is asked for, and no score for some.
struct Everything;

impl Verifier for Everything {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        let Request { prompt, response, answer, task } = request;
        let text = format!("{prompt}|{response}|{answer}|{}", task["prompt"]);
        match crc32c::crc32c(text.as_bytes()) % 100 {
            0..20 => Err(Failure::Answer { answer: text, wanted: "luck" }),
            score => Ok(f64::from(score) - 60.0),
        }
    }

    fn extract(&self, response: &str) -> Option<String> {
        response.chars().next().map(String::from)
    }
}

/// Six prompts of different lengths.
fn fixture() -> Fixture {
    let f = Fixture::new();
    let line = |i: usize| format!("{{\"prompt\":\"{}=\",\"answer\":\"{i}\"}}\n", "1+".repeat(1 + 5 * i % 7));
    f.write("tasks.jsonl", (0..6).map(line).collect::<String>());
    f
}

/// What a rollout makes of all tasks.
fn rolled(f: &Fixture, backend: &Delegating) -> Vec<Group> {
    let dir = ModelDir::open(backend.clone(), &f.path("model"), Precision::default()).unwrap();
    let tasks = Tasks::read(&f.path("tasks.jsonl")).unwrap();
    let list: Vec<&Task> = tasks.list.iter().collect();
    let strings = ["a".to_owned()];
    let stop = ResponseEnd::new(&dir.model.config, &dir.tokenizer, &strings);
    let format = PromptFormat { prefix: "see ", suffix: "", wrapping: Wrapping::None };
    let rollout = Rollout { model: &dir.model, tokenizer: &dir.tokenizer, format, stop: &stop };
    let sampling =
        Sampling { temperature: 1.0, truncation: Truncation::default(), max_new_tokens: 8, seed: 5, step: 3 };
    // Verifier and environment in pools of their own.
    let mut judges = Judges::new(Arc::new(Everything), Some(Arc::new(Everything)));
    let mut heard = 0;
    let (groups, _) = rollout.run(&list, 5, &sampling, &mut judges, || heard += 1).unwrap();
    assert_eq!(heard, 30, "each stream once");
    groups
}

#[test]
fn several_turns_make_the_groups_of_one() {
    let f = fixture();
    let backend = Delegating::new();
    let whole = rolled(&f, &backend);
    assert_eq!((backend.take_turns(), whole.len()), (1, 6));
    // They differ, so that a group in another's place would be seen.
    for (i, group) in whole.iter().enumerate() {
        assert!(whole[..i].iter().all(|other| other.responses != group.responses));
        assert!(group.scores.iter().any(|&score| score != group.scores[0]), "{:?}", group.scores);
    }
    assert!(whole.iter().filter(|group| !group.unjudged.is_empty()).count() >= 2);
    let mut seen = [Vec::new(), Vec::new()];
    // In turns of prompts alone, and of the responses to one as well.
    for (room, training_bytes) in
        (0..24).map(|power| (1usize << power) - 1).flat_map(|room| [(room, u64::from(u32::MAX)), (room, 0)])
    {
        let small = Delegating { generation_bytes: room, training_bytes, ..Delegating::new() };
        let parts = rolled(&f, &small);
        let turns = small.take_turns();
        let seen = &mut seen[usize::from(training_bytes == 0)];
        assert!(seen.last().is_none_or(|&last| turns <= last), "{room} bytes: {turns} turns after {seen:?}");
        seen.push(turns);
        assert_eq!(format!("{parts:?}"), format!("{whole:?}"), "{room} bytes, {turns} turns");
    }
    let [of_prompts, of_responses] = &seen;
    assert!(of_prompts[0] == 6 && of_prompts[23] == 1, "{seen:?}");
    assert!(of_prompts.iter().any(|turns| (2..6).contains(turns)), "turns of several prompts: {seen:?}");
    assert!(of_responses[0] == 30 && of_responses[23] == 1, "{seen:?}");
    assert!(of_responses.iter().any(|turns| (7..30).contains(turns)), "turns of several responses: {seen:?}");
}

/// A run is what it is whatever the device holds.
#[test]
fn a_run_in_several_turns_is_the_run_in_one() {
    let f = fixture();
    let run = |output: &str, backend: Delegating| {
        let path = |key: &str, name: &str| format!("{key}={}", f.path(name).display());
        let overrides = [
            path("model.path", "model"),
            path("data.tasks", "tasks.jsonl"),
            path("data.eval_tasks", "tasks.jsonl"),
            path("train.output", output),
            "train.eval_samples=4".to_owned(),
            "train.steps=3".to_owned(),
        ];
        let config = TrainConfig::load(&f.path("run.toml"), &overrides).unwrap();
        train_on(backend.clone(), &config, false, 9);
        let report = fs::read_to_string(f.path(output).join("eval/step-000003.json")).unwrap();
        let made: serde_json::Value = serde_json::from_str(&report).unwrap();
        let problems = made["problems"].clone();
        (backend.take_turns(), (checkpoint(&config), metrics(&config.train.output), problems))
    };
    let (turns, whole) = run("whole", Delegating::new());
    assert_eq!(turns, 3 + 2, "a batch for each step and evaluation");
    let little = Delegating { generation_bytes: 1, ..Delegating::new() };
    let (turns, parts) = run("parts", little.clone());
    assert_eq!(turns, 3 * 4 + 2 * 6, "a batch for each prompt");
    assert!(parts == whole);
    // Then the backward pass also computes all activations again.
    let (turns, parts) = run("single", Delegating { training_bytes: 0, ..little });
    assert_eq!(turns, 3 * 4 * 4 + 2 * 6 * 4, "a batch for each response");
    assert!(parts == whole);
}
