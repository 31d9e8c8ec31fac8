//! `tools/paper.py`, on a tiny model: every method trains, is evaluated and appears in the tables; and the tables that are
//! committed are what the committed results say.

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
        "^difference.*(base|seed1)$",
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
    let listed = succeed(&["list", "--only", "^difference.*(base|seed1)$", "--results", &out]);
    let files = results(Path::new(&out));
    assert_eq!(listed.stdout.lines().count(), files.len(), "{}\n{files:?}", listed.stdout);
    assert!(listed.stdout.lines().all(|line| line.starts_with("done")), "{}", listed.stdout);
    assert!(first.stderr.contains(&format!("[{0}/{0}]", files.len())), "{}", first.stderr);
    assert!(results(Path::new(&runs)).is_empty(), "weights are left");
    let mut passes = std::collections::BTreeSet::new();
    for file in &files {
        let result: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        assert_eq!(result["passes"].as_array().unwrap().len(), 200, "{file:?}");
        passes.insert(result["passes"].to_string());
        let steps = result["training"].as_array().unwrap().len();
        assert_eq!(steps, if result["method"] == "base" { 0 } else { 2 }, "{file:?}");
        assert!(result["training"].as_array().unwrap().iter().all(|part| part["logprob_gap_max"] == 0.0));
    }

    // Samples that are all wrong teach nothing, but experts do.
    assert!(passes.len() > 2, "sft and bon-sft leave the model as it was: {passes:?}");

    // What is there is not run again; what is deleted is, to the same bits.
    assert_eq!(succeed(&run).stderr, "");
    let gone = files.iter().find(|file| file.ends_with("difference.bon-rlb.seed1.json")).unwrap();
    let before = fs::read(gone).unwrap();
    fs::remove_file(gone).unwrap();
    assert!(succeed(&run).stderr.contains("[1/1] difference.bon-rlb.seed1"));
    assert_eq!(fs::read(gone).unwrap(), before);

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
        let result: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        let method = result["method"].as_str().unwrap();
        assert!(text.contains(&format!("| `{method}` |")), "{method}: {text}");
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
    let result = |method: &str, seed: u64, passes: [u64; 2]| {
        let json = serde_json::json!({
            "task": "difference", "method": method, "seed": seed, "samples": 32, "passes": passes,
            "distinct_answers": 2.5, "training": [],
        });
        fs::write(out.join(format!("{method}{seed}.json")), json.to_string()).unwrap();
    };
    result("base", 0, [4, 4]);
    result("rl", 1, [4, 32]);
    result("rl", 2, [32, 32]);
    let readme = dir.path().join("README.md");
    fs::write(&readme, "<!-- What follows is written by `python3 tools/paper.py tables`. -->\n").unwrap();
    let text = |path: &Path| path.display().to_string();
    succeed(&["tables", "--results", &text(&out), "--readme", &text(&readme)]);
    let tables = fs::read_to_string(&readme).unwrap();
    assert!(tables.contains("| `base` |  | 0.125 [0.125, 0.125] | 0.705 [0.705, 0.705] | 1.000"), "{tables}");
    // Means over problems and seeds: (0.125 + 1 + 1 + 1) / 4, and (0.70453 + 3) / 4.
    assert!(tables.contains("| `rl` | 2 | 0.781 [") && tables.contains("| 0.926 ["), "{tables}");
    assert!(tables.contains("| RL for one sample gains pass@1 | +0.656 ["), "{tables}");
}
