//! `tools/moments.py`, on a tiny model: every state of the optimizer trains, is evaluated and is in the table; and the table
//! that is committed is what the committed results say.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Fixture, Ran};

fn moments(arguments: &[&str]) -> Ran {
    let tool = crate::places::checkout().join("tools/moments.py");
    Ran::of(Command::new("python3").arg(tool).args(arguments))
}

fn succeed(arguments: &[&str]) -> Ran {
    let ran = moments(arguments);
    assert_eq!(ran.code, Some(0), "{arguments:?}: {}", ran.stderr);
    ran
}

fn read(path: impl AsRef<Path>) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

const MARK: &str = "<!-- What follows is written by `python3 tools/moments.py tables`. -->\n";

#[test]
fn every_state_runs_once_and_is_in_the_table() {
    let fixture = Fixture::new();
    let path = |name| fixture.path(name).display().to_string();
    let (model, out, runs, readme) =
        (format!("model.path={}", path("model")), path("results"), path("runs"), path("README.md"));
    let engine = crate::places::program().display().to_string();
    let places = ["--engine", &engine, "--results", &out, "--runs", &runs, "--device", "cpu"];
    // In bf16, so that there are masters to do without.
    let settings = [
        "--set",
        &model,
        "--set",
        "data.prefix=",
        "--set",
        "train.steps=10",
        "--set",
        "optimizer.lr=1e-2",
        "--set",
        "model.dtype=bf16",
    ];
    let run = [&["run", "--only", "seed[12]$"][..], &places, &settings].concat();
    assert!(succeed(&run).stderr.contains("[8/8] 8-bit-moments-no-masters.seed2"));
    assert_eq!(fs::read_dir(&runs).unwrap().count(), 0, "weights are left");
    let losses = |name: &str| read(Path::new(&out).join(format!("{name}.json")))["loss"].clone();
    let all = [
        "f32.seed1",
        "f32.seed2",
        "8-bit-moments.seed1",
        "no-masters.seed1",
        "8-bit-moments-no-masters.seed1",
    ];
    for (i, name) in all.iter().enumerate() {
        assert_eq!(losses(name).as_array().unwrap().len(), 10);
        // No state is another by mistake, but all begin as one.
        assert!(all[..i].iter().all(|other| losses(other) != losses(name)), "{name}");
        assert_eq!(losses(name)[0] == losses(all[0])[0], name.ends_with("seed1"), "{name}");
    }

    // What is there is not run again; what is deleted is, to the same bits, and where it was interrupted it goes on.
    assert_eq!(succeed(&run).stderr, "");
    let gone = Path::new(&out).join("no-masters.seed1.json");
    let before = read(&gone);
    fs::remove_file(&gone).unwrap();
    let place = Path::new(&runs).join("no-masters.seed1");
    let half = ["train", "examples/moments/sum.toml", "--set=optimizer.masters=false", "--set=train.seed=1"];
    let sets: Vec<String> = settings.chunks(2).map(|set| format!("--set={}", set[1])).collect();
    let begun = Command::new(&engine)
        .current_dir(crate::places::checkout())
        .args(half)
        .args(&sets)
        .arg(format!("--set=train.output={}", place.display()))
        .args(["--set=train.max_minutes=0.00001", "--device=cpu"])
        .output()
        .unwrap();
    assert!(begun.status.success() && place.join("checkpoints/step-000001").is_dir(), "{begun:?}");
    assert!(succeed(&run).stderr.contains("[1/1] no-masters.seed1"));
    assert_eq!((&read(&gone)["loss"], &read(&gone)["passes"]), (&before["loss"], &before["passes"]));

    let tables = ["tables", "--results", &out, "--readme", &readme];
    fs::write(&readme, "no mark").unwrap();
    assert!(moments(&tables).stderr.contains("does not hold the line"));
    fs::write(&readme, format!("Words.\n{MARK}stale")).unwrap();
    let refused = moments(&[&tables[..], &["--check"]].concat());
    assert!(refused.code == Some(1) && refused.stderr.contains("is not what the results say"));
    succeed(&tables);
    succeed(&[&tables[..], &["--check"]].concat());
    let text = fs::read_to_string(&readme).unwrap();
    assert!(text.starts_with("Words.\n") && text.ends_with("8 of 12 runs are done.\n"), "{text}");
    for state in ["f32", "8-bit moments", "no masters", "8-bit moments, no masters"] {
        assert!(text.contains(&format!("| `{state}` | 2 |")), "{text}");
    }
    assert!(moments(&["run", "--only", "f64"]).stderr.contains("no run has such a name"));
}

#[test]
fn the_table_is_what_the_results_say() {
    succeed(&["tables", "--check"]);
}

#[test]
fn the_table_of_known_results() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("results");
    fs::create_dir(&out).unwrap();
    // Ten steps in five parts.
    let result = |name: &str, state: &str, seed: u64, first: f64, passes: [u64; 2]| {
        let loss: Vec<f64> = (0..10).map(|step| first + f64::from(step / 2)).collect();
        let json = json!({ "state": state, "seed": seed, "loss": loss, "samples": 8, "passes": passes });
        fs::write(out.join(format!("{name}.json")), json.to_string()).unwrap();
    };
    let readme = dir.path().join("README.md");
    fs::write(&readme, MARK).unwrap();
    let text = |path: &Path| path.display().to_string();
    let told = || {
        succeed(&["tables", "--results", &text(&out), "--readme", &text(&readme)]);
        fs::read_to_string(&readme).unwrap()
    };
    assert!(told().contains("No run of `f32` is done"));
    result("f32.seed1", "f32", 1, 1.0, [4, 8]);
    result("f32.seed2", "f32", 2, 1.5, [8, 8]);
    result("8-bit-moments.seed1", "8-bit moments", 1, 1.25, [4, 4]);
    result("8-bit-moments.seed2", "8-bit moments", 2, 1.25, [8, 8]);
    result("no-masters.seed2", "no masters", 2, 2.5, [0, 8]);
    let table = told();
    assert!(table.contains("| `f32` | 2 | 1.2500 | 2.2500 | 3.2500 | 4.2500 | 5.2500 | 0.875 |"), "{table}");
    assert!(
        table.contains("| between seeds of `f32` | 2 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.5000 | 0.250 |"),
        "{table}"
    );
    assert!(table.contains("| `8-bit moments` from `f32` | 2 | +0.0000, 0.2500 |"), "{table}");
    assert!(table.contains("| -0.125, 0.250 |"), "{table}");
    assert!(
        table.contains("- `8-bit moments`: the mean difference of the loss is within what seeds"),
        "{table}"
    );
    assert!(table.contains("| `no masters` from `f32` | 1 | +1.0000, 1.0000 |"), "{table}");
    assert!(table.contains("- `no masters`: the mean difference of the loss is not within"), "{table}");
    assert!(table.ends_with("5 of 12 runs are done.\n"), "{table}");
}
