//! `tools/paper.py`, on a tiny model: the reward model is made, every method trains, is evaluated and appears in the tables; and
//! the tables and plots that are committed are what the committed results say.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::fixture::{Fixture, Ran};

fn paper(arguments: &[&str]) -> Ran {
    let tool = crate::places::checkout().join("tools/paper.py");
    Ran::of(Command::new("python3").arg(tool).args(arguments))
}

fn succeed(arguments: &[&str]) -> Ran {
    let ran = paper(arguments);
    assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.stderr);
    ran
}

fn results(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

/// What there is of a task, with one seed.
const ONE_SEED: &str = "^difference.*(base|verifier|seed1)$";

fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_method_runs_once_and_is_in_the_tables() {
    let fixture = Fixture::new();
    let path = |name| fixture.path(name).display().to_string();
    let (model, out, runs, readme) =
        (format!("model.path={}", path("model")), path("results"), path("runs"), path("README.md"));
    let engine = crate::places::program().display().to_string();
    let run = [
        "run",
        "--only",
        ONE_SEED,
        "--device",
        "cpu",
        "--engine",
        &engine,
        "--results",
        &out,
        "--runs",
        &runs,
        "--set",
        &model,
        "--set",
        "data.prefix=",
        "--set",
        "train.steps=2",
        "--set",
        "optimizer.warmup_steps=0",
        "--set",
        "optimizer.lr=1e-2",
        "--set",
        "generate.prompts_per_step=2",
    ];
    let first = succeed(&run);
    let listed = succeed(&["list", "--only", ONE_SEED, "--results", &out]);
    let files = results(Path::new(&out));
    assert_eq!(listed.stdout.lines().count(), files.len(), "{}\n{files:?}", listed.stdout);
    assert!(listed.stdout.lines().all(|line| line.starts_with("done")), "{}", listed.stdout);
    assert!(first.stderr.contains(&format!("[{0}/{0}]", files.len())), "{}", first.stderr);
    // The reward model stays for the other seeds.
    let kept = Path::new(&runs).join("difference.verifier");
    assert_eq!(results(Path::new(&runs)), std::slice::from_ref(&kept), "weights are left");
    let verifier = read(Path::new(&out).join("difference.verifier.json"));
    assert_eq!(verifier["problems"], 1310);
    // All but a tenth: one right response to each, and up to seven wrong ones.
    assert_eq!(verifier["right"], 1310);
    assert!(verifier["responses"].as_u64().is_some_and(|n| n > 1310 && n <= 8 * 1310), "{verifier}");
    let mut passes = std::collections::BTreeSet::new();
    for file in files.iter().filter(|file| !file.ends_with("difference.verifier.json")) {
        let result = read(file);
        assert_eq!(result["passes"].as_array().unwrap().len(), 200, "{file:?}");
        for n in ["8", "32"] {
            assert_eq!(result["chosen"][n].as_array().unwrap().len(), 200, "{file:?}");
        }
        assert_eq!(result["verifier"]["weights"], verifier["weights"], "{file:?}");
        let grid = ["base", "rl", "bon-rl-s"].contains(&result["method"].as_str().unwrap());
        assert_eq!(result["temperatures"].as_array().map(Vec::len), grid.then_some(4), "{file:?}");
        passes.insert(result["passes"].to_string());
        let steps = result["training"].as_array().unwrap().len();
        assert_eq!(steps, if result["method"] == "base" { 0 } else { 2 }, "{file:?}");
        assert!(result["training"].as_array().unwrap().iter().all(|part| part["logprob_gap_max"] == 0.0));
    }

    // Samples that are all wrong teach nothing, but experts do.
    assert!(passes.len() > 2, "sft and bon-sft leave the model as it was: {passes:?}");

    // What is there is not run again; what is deleted is, to the same bits, and so is the reward model.
    assert_eq!(succeed(&run).stderr, "");
    let gone = files.iter().find(|file| file.ends_with("difference.bon-rl-v.seed1.json")).unwrap();
    let before = fs::read(gone).unwrap();
    fs::remove_file(gone).unwrap();
    fs::remove_dir_all(&kept).unwrap();
    assert!(succeed(&run).stderr.contains("[1/1] difference.bon-rl-v.seed1"));
    assert_eq!(fs::read(gone).unwrap(), before);
    // Another one is no part of the same comparison.
    fs::remove_file(gone).unwrap();
    fs::remove_dir_all(&kept).unwrap();
    let other = paper(&[&run[..], &["--set", "optimizer.lr=2e-2"]].concat());
    assert!(other.code == Some(1) && other.stderr.contains("is not that of"), "{}", other.stderr);
    fs::write(gone, before).unwrap();

    let mark = "<!-- What follows is written by `python3 tools/paper.py tables`. -->\n";
    let tables = ["tables", "--results", &out, "--readme", &readme];
    fs::write(&readme, "no mark").unwrap();
    assert!(paper(&tables).stderr.contains("does not hold the line"));
    fs::write(&readme, format!("Words.\n{mark}stale")).unwrap();
    let refused = paper(&[&tables[..], &["--check"]].concat());
    assert!(
        refused.code == Some(1) && refused.stderr.contains("is not what the results say"),
        "{}",
        refused.stderr
    );
    succeed(&tables);
    succeed(&[&tables[..], &["--check"]].concat());
    let text = fs::read_to_string(&readme).unwrap();
    assert!(text.starts_with("Words.\n") && !text.contains("stale"), "{text}");
    for file in &files {
        let result = read(file);
        let method = result["method"].as_str().unwrap();
        // In the table of pass@N and in that of Best-of-N.
        let rows = text.matches(&format!("| `{method}` |")).count();
        assert!(if method == "verifier" { rows == 0 } else { rows >= 2 }, "{method}: {text}");
    }
    for plot in ["matrix", "temperatures", "verifier"] {
        let file = format!("difference.{plot}.svg");
        assert!(text.contains(&format!("({file})")), "{text}");
        let drawn = fs::read_to_string(fixture.path(&file)).unwrap();
        assert!(
            drawn.starts_with("<svg ") && drawn.ends_with("</svg>\n") && !drawn.contains("NaN"),
            "{drawn}"
        );
        fs::write(fixture.path(&file), "stale").unwrap();
        assert!(paper(&[&tables[..], &["--check"]].concat()).stderr.contains(&format!("{file} is not what")));
        succeed(&tables);
    }
}

#[test]
fn the_tables_are_what_the_results_say() {
    succeed(&["tables", "--check"]);
}

#[test]
fn figures_are_those_of_a_known_result() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("results");
    fs::create_dir(&out).unwrap();
    // Two problems: pass@8 of 4 right among 32 is 1 - C(28, 8) / C(32, 8) = 0.70453, of 32 it is 1.
    let result = |method: &str, seed: u64, passes: [u64; 2], chosen: Value| {
        let json = serde_json::json!({
            "task": "difference", "method": method, "seed": seed, "samples": 32, "passes": passes,
            "distinct_answers": 2.5, "training": [], "chosen": chosen,
            "verifier": { "auc": 0.75, "pair_accuracy": Value::Null },
            "best_of_n": { "1": 0.5, "2": 0.5, "4": 0.5, "8": 0.5, "16": 0.5, "32": 0.5 },
        });
        fs::write(out.join(format!("{method}{seed}.json")), json.to_string()).unwrap();
    };
    let chosen = |eight: [f64; 2]| serde_json::json!({ "8": eight, "32": [0.25, 0.25] });
    result("base", 0, [4, 4], chosen([0.25, 0.5]));
    result("rl", 1, [4, 32], Value::Null);
    result("rl", 2, [32, 32], chosen([0.75, 1.0]));
    let verifier = serde_json::json!({
        "task": "difference", "method": "verifier", "config": "some.toml", "architecture": "Some", "weights": "0123",
        "problems": 3, "responses": 24, "right": 3,
        "checked": { "tasks": 2, "samples": 16, "n": 16, "pass_at_1": 0.1, "pass_at_n": 0.5, "best_of_n": 0.25,
                     "auc": Value::Null, "pair_accuracy": 0.875 },
    });
    fs::write(out.join("verifier.json"), verifier.to_string()).unwrap();
    let readme = dir.path().join("README.md");
    fs::write(&readme, "<!-- What follows is written by `python3 tools/paper.py tables`. -->\n").unwrap();
    let text = |path: &Path| path.display().to_string();
    succeed(&["tables", "--results", &text(&out), "--readme", &text(&readme)]);
    let tables = fs::read_to_string(&readme).unwrap();
    assert!(tables.contains("| `base` |  | 0.125 [0.125, 0.125] | 0.705 [0.705, 0.705] | 1.000"), "{tables}");
    // Means over problems and seeds: (0.125 + 1 + 1 + 1) / 4, and (0.70453 + 3) / 4.
    assert!(tables.contains("| `rl` | 2 | 0.781 [") && tables.contains("| 0.926 ["), "{tables}");
    assert!(tables.contains("| RL for one sample gains pass@1 | undecided: +0.656 [+0.000, "), "{tables}");
    // What the reward model chooses: of the seed that it judged alone.
    assert!(tables.contains("| `base` |  | 0.125 | 0.375 [0.250, 0.500] | 0.705 | 0.250 [0.250, 0.250] | 1.000 | -0.500 [-0.500, -0.500] | 0.750 | - |"), "{tables}");
    assert!(tables.contains("| `rl` | 1 | 1.000 | 0.875 [0.750, 1.000] | 1.000 |"), "{tables}");
    assert!(
        tables.contains("| RL for one sample gains Best-of-8 | holds: +0.500 [+0.500, +0.500] |\n"),
        "{tables}"
    );
    // Each claim once, for all tasks; those of which nothing is known not at all.
    assert_eq!(tables.matches("| claim | `difference` |\n").count(), 1, "{tables}");
    assert!(!tables.contains("SFT"), "{tables}");
    assert!(tables.contains("0.875 of the pairs of a problem, and in - of all"), "{tables}");
}
