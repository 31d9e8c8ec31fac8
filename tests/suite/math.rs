//! The recipe for MATH: `tools/math_tasks.py` and `examples/math`.

use std::fs;
use std::path::Path;
use std::process::Command;

use bon_engine::train::config::TrainConfig;
use bon_engine::verifier::{Request, VerifierConfig, build};
use serde_json::{Map, Value, json};

use crate::fixture::{Fixture, Ran};
use crate::places::checkout;

fn convert(dir: &Path, arguments: &[&str]) -> Ran {
    let mut script = Command::new("python3");
    script.arg(checkout().join("tools/math_tasks.py")).args(arguments).args(["--out", "out"]);
    Ran::of(script.current_dir(dir).env("PYTHONDONTWRITEBYTECODE", "1"))
}

fn tasks(dir: &Path, name: &str) -> Vec<Value> {
    let text = fs::read_to_string(dir.join("out").join(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn problem(number: u32, level: &str) -> Value {
    json!({
        "problem": format!("What is ${number} + 1$?"),
        "level": level,
        "type": "Algebra",
        "solution": format!("It is not $\\boxed{{0}}$ but ${number} + 1 = \\boxed{{{}}}.$", number + 1),
    })
}

#[test]
fn the_benchmarks_folders_become_tasks() {
    let dir = tempfile::tempdir().unwrap();
    for (part, number, level) in
        [("train", 10, "Level 1"), ("train", 9, "Level 5"), ("train", 8, "Level ?"), ("test", 7, "Level 1")]
    {
        let folder = dir.path().join("MATH").join(part).join("algebra");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(format!("{number}.json")), problem(number, level).to_string()).unwrap();
    }
    let ran = convert(dir.path(), &["MATH"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let answers: Vec<_> =
        tasks(dir.path(), "train.jsonl").iter().map(|task| task["answer"].clone()).collect();
    assert_eq!(answers, ["9", "10", "11"], "in the order of their numbers");
    let [task] = &tasks(dir.path(), "eval.jsonl")[..] else { panic!("one problem") };
    let found = problem(7, "Level 1");
    assert_eq!(
        *task,
        json!({
            "prompt": found["problem"], "answer": "8", "response": found["solution"], "subject": "Algebra", "level": "Level 1",
        })
    );
    let ran = convert(dir.path(), &["MATH", "--level", "5", "1"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(tasks(dir.path(), "train.jsonl").len(), 2);
    let ran = convert(dir.path(), &["MATH", "--level", "5"]);
    assert!(
        ran.code == Some(1) && ran.stderr.contains("MATH/test: no problem has level 5"),
        "{}",
        ran.stderr
    );
    assert_eq!(tasks(dir.path(), "train.jsonl").len(), 2, "what was there stays");
}

#[test]
fn files_of_its_layout_become_tasks() {
    let dir = tempfile::tempdir().unwrap();
    let solutions = [
        (r"so \boxed{\frac{1}{2}}.", None, r"\frac{1}{2}"),
        (r"so \boxed{\{1, 2\}}.", None, r"\{1, 2\}"),
        (r"so \boxed{\left\{ x \mid x > 0 \right\}}", None, r"\left\{ x \mid x > 0 \right\}"),
        (r"so \fbox{7}", None, "7"),
        (r"so $\boxed 5$, not $\boxed{unclosed", None, "5"),
        (r"so \boxed \pi", None, r"\pi"),
        (r"so \boxed{1}", Some(json!("3")), "3"),
        (r"no box", Some(json!(12)), "12"),
    ];
    let line = |(solution, answer, _): &(&str, Option<Value>, &str)| {
        let mut problem = json!({"problem": "?", "subject": "Algebra", "level": 3, "solution": solution});
        if let Some(answer) = answer {
            problem["answer"] = answer.clone();
        }
        problem.to_string() + "\n"
    };
    let text: String = solutions.iter().map(line).collect();
    fs::write(dir.path().join("test.jsonl"), format!("\u{feff}{text}\n")).unwrap();
    let ran = convert(dir.path(), &["--eval", "test.jsonl", "--level", "3"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let found = tasks(dir.path(), "eval.jsonl");
    for ((solution, _, wanted), task) in solutions.iter().zip(&found) {
        assert_eq!(task["answer"], *wanted, "{solution}");
    }
    assert_eq!(found.len(), solutions.len());
    assert!(!dir.path().join("out/train.jsonl").exists());

    for (text, reason) in [
        ("{}", "test.jsonl: line 2: no problem of MATH's layout"),
        ("[", "test.jsonl: line 2: no problem of MATH's layout"),
        ("[1]", "test.jsonl: line 2: no problem of MATH's layout"),
        (r#"{"problem": "?", "solution": 3}"#, "test.jsonl: line 2: no problem of MATH's layout"),
        (r#"{"problem": "?", "solution": "none"}"#, "test.jsonl: line 2: no `answer`"),
        (r#"{"problem": "?", "solution": "\\boxed{}"}"#, "test.jsonl: line 2: no `answer`"),
    ] {
        fs::write(dir.path().join("test.jsonl"), format!("{}\n{text}\n", problem(1, "1"))).unwrap();
        let ran = convert(dir.path(), &["--eval", "test.jsonl"]);
        assert!(ran.code == Some(1) && ran.stderr.contains(reason), "{text}: {}", ran.stderr);
    }
    for (arguments, reason) in [
        (&["--eval", "missing.jsonl"][..], "missing.jsonl: No such file"),
        (&["."], ".: neither train"),
        (&[], "which problems?"),
    ] {
        let ran = convert(dir.path(), arguments);
        assert!(ran.code != Some(0) && ran.stderr.contains(reason), "{arguments:?}: {}", ran.stderr);
    }
}

/// What the examples before a problem show is right by the verifier that the recipe judges with.
#[test]
fn the_four_examples_are_right() {
    let text = fs::read_to_string(checkout().join("examples/math/four-shot.txt")).unwrap();
    let judge = build(&VerifierConfig::Boxed { evaluate: false }).unwrap();
    let parts: Vec<&str> = text.split("Problem:\n").collect();
    let [first, shots @ .., last] = &parts[..] else { panic!("no examples") };
    let answers = ["147", "13/5", "0.4", "(-2,4)"];
    assert!(first.is_empty() && last.is_empty() && shots.len() == answers.len());
    for (shot, answer) in shots.iter().zip(answers) {
        let (prompt, response) = shot.split_once("\n\nSolution:\n").unwrap();
        let request = Request { prompt, response: response.trim_end(), answer, task: &Map::new() };
        assert_eq!(judge.score(&request), Ok(1.0), "{shot}");
    }
}

/// The configurations fit where they say that they do, with the settings that they say.
#[test]
fn the_examples_of_math_are_configurations_that_fit() {
    let f = Fixture::new();
    let plan = |name: &str, more: &[&str]| {
        let path = format!("examples/math/{name}");
        let config = TrainConfig::load(&checkout().join(&path), &[]).unwrap();
        assert_eq!(config.verifier, Some(VerifierConfig::Boxed { evaluate: false }));
        assert!(config.data.prefix.ends_with("\n\nProblem:\n"), "the examples are read");
        let arguments = [&["plan", &path, "--prompt-tokens", "1024"], more].concat();
        // Where the paths in it lead.
        let ran = Ran::of(f.command(&arguments).current_dir(checkout()));
        assert!(
            ran.code == Some(0) && ran.stdout.contains("it fits"),
            "{more:?}: {} {}",
            ran.stdout,
            ran.stderr
        );
    };
    plan("gemma-2b.toml", &["--published", "Gemma 2B", "--memory", "80GB"]);
    let set = |settings: &[&'static str]| settings.iter().flat_map(|s| ["--set", s]).collect::<Vec<_>>();
    let on_24 = ["--published", "Gemma 2B", "--memory", "24GB", "--host-memory", "31GB"];
    for settings in [
        &["lora.rank=16"][..],
        &[
            "optimizer.moments=8bit",
            "optimizer.embedding_moments=8bit",
            "optimizer.masters=false",
            "optimizer.gradients=bf16",
        ],
        &["optimizer.gradients=bf16", "optimizer.offload=true"],
    ] {
        plan("gemma-2b.toml", &[&on_24[..], &set(settings)].concat());
    }
    plan("gemma-3-4b.toml", &["--published", "Gemma 3 4B", "--memory", "24GB"]);
    plan("gemma-3-270m.toml", &["--published", "Gemma 3 270M", "--memory", "16GB"]);
}
