//! `eval` at several temperatures, the pools that it keeps, and the pages of `eval`, `report` and `train`.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::fixture::{Fixture, Ran};
use crate::judging::by_programs;

const EVAL: [&str; 6] = ["eval", "run.toml", "--samples", "6", "--set", "data.tasks=eval.jsonl"];

fn json(f: &Fixture, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(f.path(name)).unwrap()).unwrap()
}

/// The report without the command that made it.
fn figures(f: &Fixture, name: &str) -> Value {
    let mut report = json(f, name);
    let strip = |report: &mut Value| drop(report["provenance"].as_object_mut().unwrap().remove("command"));
    match report.get_mut("reports") {
        Some(reports) => reports.as_array_mut().unwrap().iter_mut().for_each(strip),
        None => strip(&mut report),
    }
    report
}

/// The files of pools in a directory.
fn pools(f: &Fixture, dir: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        fs::read_dir(f.path(dir)).unwrap().map(|entry| entry.unwrap().path()).collect();
    all.sort();
    all
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""), "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert!(words.iter().all(|word| ran.stderr.contains(word)), "{words:?}: {}", ran.stderr);
}

/// Each temperature of a grid is what an evaluation at that temperature alone is.
#[test]
fn a_grid_is_its_temperatures() {
    let f = Fixture::new();
    let grid = ["--temperatures", "1.3,0.4", "--n", "4,1", "--output", "grid.json", "--report", "grid.html"];
    let ran = f.succeed(&[&EVAL[..], &grid].concat());
    let reports = figures(&f, "grid.json")["reports"].clone();
    assert_eq!(reports.as_array().unwrap().len(), 2);
    for (i, temperature) in ["0.4", "1.3"].into_iter().enumerate() {
        let set = format!("generate.temperature={temperature}");
        f.succeed(&[&EVAL[..], &["--set", &set, "--n", "1,4", "--output", "one.json"]].concat());
        assert_eq!(figures(&f, "one.json"), reports[i], "{temperature}");
        assert_eq!(reports[i]["ns"], serde_json::json!([1, 4]));
        assert_eq!(reports[i]["provenance"]["settings"]["generate.temperature"], temperature);
    }
    assert_ne!(reports[0]["figures"], reports[1]["figures"]);
    for words in ["problems: 4, samples each: 6", "T = 0.4", "T = 1.3", "the best temperature for each N"] {
        assert!(ran.stdout.contains(words), "no {words:?} in {}", ran.stdout);
    }
    assert!(ran.stderr.contains("temperature 1.3 (2 of 2)"), "{}", ran.stderr);
    let command = json(&f, "grid.json")["reports"][0]["provenance"]["command"].as_str().unwrap().to_owned();
    assert!(command.starts_with("bon-engine eval run.toml") && command.contains("1.3,0.4"), "{command}");
    let page = fs::read_to_string(f.path("grid.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("T\u{a0}=\u{a0}0.4"), "a page");
    // One response at 0 is as good as many, and so is the single temperature of a list.
    let greedy = ["--temperatures", "0", "--output", "greedy.json"];
    f.succeed(&[&EVAL[..], &greedy].concat());
    let distinct = json(&f, "greedy.json")["figures"]["distinct_answers"]["mean"].as_f64().unwrap();
    assert!(distinct <= 1.0, "{distinct}");
}

#[test]
fn arguments_of_a_grid() {
    let f = Fixture::new();
    for (args, words) in [
        (&["--temperatures", "0.5,-1"][..], &["--temperatures: -1", "generate.temperature: is -1"][..]),
        (&["--temperatures", "0.5,1,0.50"], &["--temperatures: 0.5 is there twice"]),
        (&["--temperatures", "nan"], &["--temperatures: NaN"]),
        (&["--n", "1,7"], &["--n 7: more than the 6 responses per task"]),
        (&["--report", "no/where.html"], &["--report no/where.html: give a file in a directory that exists"]),
        (&["--report", "model"], &["--report model: give a file"]),
    ] {
        refused(&f.run(&[&EVAL[..], args].concat()), words);
    }
    for args in [&["--temperatures", "warm"][..], &["--n", "0"], &["--n", ""], &["--examples", "51"]] {
        assert_eq!(f.run(&[&EVAL[..], args].concat()).code, Some(2), "{args:?}");
    }
}

/// A verifier that leaves a line for each response that it judges.
fn counted(f: &Fixture) {
    by_programs(f, "echo x >>judged; reply 1", None);
}

/// How many responses were judged since the last call.
fn judged(f: &Fixture) -> usize {
    let count = fs::read_to_string(f.path("judged")).unwrap_or_default().lines().count();
    let _ = fs::remove_file(f.path("judged"));
    count
}

const GRID: [&str; 4] = ["--temperatures", "0.5,1.0", "--output", "r.json"];

#[test]
fn pools_that_are_there_are_taken_over() {
    let f = Fixture::new();
    counted(&f);
    let run = |more: &[&str]| f.succeed(&[&EVAL[..], &GRID, more].concat());
    run(&[]);
    assert_eq!(judged(&f), 2 * 4 * 6);
    let whole = figures(&f, "r.json");
    let files = pools(&f, "r.pools");
    assert_eq!(files.len(), 2);
    let texts: Vec<String> = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    // All of it.
    run(&[]);
    assert_eq!((judged(&f), figures(&f, "r.json")), (0, whole.clone()));
    // A kill leaves some tasks, and the beginning of another.
    let lines: Vec<&str> = texts[0].lines().collect();
    assert_eq!(lines.len(), 5, "a head and a line per task");
    fs::write(&files[0], format!("{}\n{}\n{}\n{}", lines[0], lines[1], lines[3], &lines[4][..40])).unwrap();
    fs::write(&files[1], &texts[1][..10]).unwrap();
    run(&[]);
    assert_eq!((judged(&f), figures(&f, "r.json")), ((2 + 4) * 6, whole.clone()));
    // What came later stands behind what was there.
    let mended = fs::read_to_string(&files[0]).unwrap();
    assert!(mended.starts_with(&format!("{}\n{}\n{}\n", lines[0], lines[1], lines[3])), "{mended}");
    assert_eq!(mended.lines().count(), 5);
    // Another N and another number of examples are drawn from the same pools.
    run(&["--n", "2,3", "--examples", "0"]);
    assert_eq!(judged(&f), 0);
    assert_eq!(json(&f, "r.json")["reports"][0]["ns"], serde_json::json!([2, 3]));
    // Without a report nothing is kept.
    f.succeed(&[&EVAL[..], &["--temperatures", "0.5"]].concat());
    assert_eq!(judged(&f), 4 * 6);
}

/// Each with how many of the four tasks it leaves to be drawn again.
#[test]
fn pools_of_something_else_are_not_taken_over() {
    let f = Fixture::new();
    counted(&f);
    let run = |more: &[&str]| {
        f.succeed(&[&EVAL[..], &["--output", "r.json"], more].concat());
        judged(&f) / 6
    };
    assert_eq!(run(&[]), 4);
    let mut files = pools(&f, "r.pools").len();
    crate::fixture::write_model(&f.path("copy"));
    for (more, want) in [
        (&["--set", "generate.max_new_tokens=3"][..], 4),
        (&["--set", "generate.top_k=3"], 4),
        (&["--set", "generate.stop=['1']"], 4),
        (&["--set", "train.seed=7"], 4),
        (&["--set", "data.suffix= ="], 4),
        (&["--set", "objective.pass_threshold=0.7"], 4),
        (&["--dtype", "bf16"], 4),
        (&["--set", "environment={kind=\"exact\"}"], 4),
        (&["--set", "verifier.workers=2", "--set", "verifier.timeout_seconds=7"], 0),
        (&["--model", "copy"], 0),
    ] {
        assert_eq!(run(more), want, "{more:?}");
        let now = pools(&f, "r.pools").len();
        assert_eq!(now - files, usize::from(want > 0), "{more:?}: settings have files of their own");
        files = now;
    }
    f.succeed(
        &[&EVAL[..2], &["--samples", "5", "--set", "data.tasks=eval.jsonl", "--output", "r.json"]].concat(),
    );
    assert_eq!(judged(&f), 4 * 5, "another number of samples");
    assert_eq!(run(&[]), 0, "what was there is there");
    // Another text of the verifier.
    by_programs(&f, ": now; echo x >>judged; reply 1", None);
    assert_eq!(run(&[]), 4);
    // Tasks of their own: another answer, another prompt, a further task, a field that only programs read.
    let tasks = fs::read_to_string(f.path("eval.jsonl")).unwrap();
    for (text, want) in [
        (tasks.replacen("\"answer\":\"2\"", "\"answer\":\"7\"", 1), 1),
        (tasks.replacen("0+1=", "0+9=", 1), 2),
        (format!("{tasks}\n{{\"prompt\":\"1+1=\",\"answer\":\"2\"}}"), 3),
        (format!("{tasks}\n{{\"prompt\":\"1+1=\",\"answer\":\"2\"}}"), 0),
        (tasks.replace("\"prompt\"", "\"tests\":[1],\"prompt\""), 4),
    ] {
        f.write("eval.jsonl", &text);
        // Each line is of the task that its file had last: those that change back are drawn again, too.
        assert!(run(&[]) <= want, "{text}");
        assert_eq!(run(&[]), 0, "{text}");
    }
}

/// What a program could not judge because it ended is tried again; that it cannot judge something is what it says.
#[test]
fn tasks_that_a_verifier_failed_at_are_drawn_again() {
    let f = Fixture::new();
    let body = "echo x >>judged; case $line in *'\"0+1=\"'*) if [ -e ended ]; then reply 1; else : >ended; exit 3; fi;; \
                *'\"0+2=\"'*) reply null;; *) reply 1;; esac";
    by_programs(&f, body, None);
    let run = || f.succeed(&[&EVAL[..], &["--output", "r.json"]].concat());
    let unjudged = || -> Vec<(String, String)> {
        let list = json(&f, "r.json")["unjudged"].clone();
        let text = |response: &Value, key: &str| response[key].as_str().unwrap().to_owned();
        list.as_array().unwrap().iter().map(|r| (text(r, "prompt"), text(r, "kind"))).collect()
    };
    run();
    let missing = vec![("0+2=".to_owned(), "missing".to_owned()); 6];
    let crashed = vec![("0+1=".to_owned(), "crashed".to_owned())];
    assert_eq!((judged(&f), unjudged()), (4 * 6, [crashed, missing.clone()].concat()));
    run();
    assert_eq!((judged(&f), unjudged()), (6, missing.clone()));
    run();
    assert_eq!((judged(&f), unjudged()), (0, missing));
}

#[test]
fn damaged_pools_are_named() {
    let f = Fixture::new();
    let run = || f.run(&[&EVAL[..], &["--output", "r.json"]].concat());
    assert_eq!(run().code, Some(0));
    let file = pools(&f, "r.pools").remove(0);
    let name = format!("r.pools/{}", file.file_name().unwrap().to_str().unwrap());
    let text = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(&file, text.replacen(lines[2], "nonsense", 1)).unwrap();
    refused(&run(), &[&format!("{name}:3: not a line of judged samples; remove the file")]);
    fs::write(&file, text.replacen("\"samples\":6", "\"samples\":7", 1)).unwrap();
    refused(&run(), &[&format!("{name} is of another evaluation")]);
    fs::write(&file, "{}\n").unwrap();
    refused(&run(), &[&format!("{name}:1: not a line")]);
    fs::write(&file, &text).unwrap();
    let held = fs::File::open(&file).unwrap();
    held.lock().unwrap();
    refused(&run(), &["another evaluation writes this pool"]);
    drop(held);
    assert_eq!(run().code, Some(0));
    // What stands where the directory would.
    fs::remove_dir_all(f.path("r.pools")).unwrap();
    f.write("r.pools", "");
    refused(&run(), &["cannot use r.pools"]);
}

/// Ctrl-C within a grid, and the same command again: the report is that of one in one piece.
#[test]
fn a_stopped_grid_goes_on_where_it_was() {
    let f = Fixture::new();
    // A response takes a moment, so that there is time to stop.
    by_programs(&f, "sleep 0.005; reply 1", None);
    let args = ["eval", "run.toml", "--samples", "16", "--temperatures", "0.5,1", "--output", "r.json"];
    let mut child = f.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let begun = Instant::now();
    let kept = || -> usize {
        let files = fs::read_dir(f.path("r.pools")).into_iter().flatten().flatten();
        files.map(|file| fs::read_to_string(file.path()).unwrap().lines().count().saturating_sub(1)).sum()
    };
    while kept() == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it kept a pool");
        assert!(begun.elapsed() < Duration::from_secs(120), "no pool in two minutes");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ran = Ran::from(child.wait_with_output().unwrap());
    refused(&ran, &["stopped at temperature 0.5; what is judged is in r.pools/t0.5-", "goes on from there"]);
    assert!(!f.path("r.json").exists());
    let before = kept();
    assert!(before < 2 * 25, "it was stopped, not finished");
    by_programs(&f, "sleep 0.005; reply 1", None);
    f.succeed(&args);
    assert_eq!(kept(), 2 * 25);
    let resumed = figures(&f, "r.json");
    fs::remove_dir_all(f.path("r.pools")).unwrap();
    f.succeed(&args);
    assert_eq!(figures(&f, "r.json"), resumed);
}

#[test]
fn grids_are_compared_temperature_by_temperature() {
    let f = Fixture::new();
    let run = |more: &[&str]| f.run(&[&EVAL[..], more].concat());
    run(&["--temperatures", "0.5,1.0", "--output", "r.json"]);
    let ran = run(&["--temperatures", "1.0,1.5", "--compare", "r.json", "--report", "both.html"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stdout.matches("compared with r.json, T = 1:").count(), 1, "{}", ran.stdout);
    assert!(
        !ran.stdout.contains("compared with r.json, T = 1.5") && !ran.stdout.contains("differs"),
        "{}",
        ran.stdout
    );
    let page = fs::read_to_string(f.path("both.html")).unwrap();
    assert!(page.contains("Differences from r, task by task"), "the earlier report is on the page");
    refused(
        &run(&["--temperatures", "0.7", "--compare", "r.json"]),
        &["r.json is of T = 0.5, 1; evaluate at one of"],
    );
    refused(
        &run(&["--set", "verifier.pick=last", "--temperatures", "0.5", "--compare", "r.json"]),
        &["do not measure the same"],
    );
    // A grid does not say which of its pass rates tasks are chosen by.
    let set =
        ["--set", "data.report=r.json", "--set", "data.pass_rate=[0,1]", "--set", "data.tasks=eval.jsonl"];
    refused(&f.run(&[&["train", "run.toml"][..], &set].concat()), &["data.report: r.json is of T = 0.5, 1"]);
}

#[test]
fn reports_become_a_page() {
    let f = Fixture::new();
    f.succeed(&[&EVAL[..], &["--output", "before.json"]].concat());
    f.succeed(&[&EVAL[..], &["--output", "after.json", "--set", "train.seed=3"]].concat());
    let ran = f.succeed(&["report", "before.json", "after.json", "--html", "page.html"]);
    assert_eq!(ran.stdout, "page.html\n");
    let page = fs::read(f.path("page.html")).unwrap();
    f.succeed(&["report", "before.json", "after.json", "--html", "again.html"]);
    assert_eq!(fs::read(f.path("again.html")).unwrap(), page, "the same inputs, the same bytes");
    let text = String::from_utf8(page).unwrap();
    for words in ["Evaluation of before, after", "Differences from before", "train.seed", "differs"] {
        assert!(text.contains(words), "no {words:?}");
    }
    // Two of one name are told apart by their paths.
    fs::create_dir(f.path("other")).unwrap();
    fs::copy(f.path("after.json"), f.path("other/after.json")).unwrap();
    f.succeed(&["report", "after.json", "other/after.json", "--html", "page.html"]);
    assert!(
        fs::read_to_string(f.path("page.html"))
            .unwrap()
            .contains("Evaluation of after.json, other/after.json")
    );

    refused(&f.run(&["report", "before.json"]), &["give --html FILE"]);
    refused(&f.run(&["report", "nowhere.json", "--html", "p.html"]), &["cannot read nowhere.json"]);
    refused(
        &f.run(&["report", "run.toml", "--html", "p.html"]),
        &["run.toml is not a report of `eval --output`"],
    );
    refused(
        &f.run(&["report", "model", "--html", "p.html"]),
        &["model is no run directory: it has no config.toml"],
    );
    refused(&f.run(&["report", "before.json", "--html", "no/p.html"]), &["--html no/p.html: give a file"]);
    let nine = ["before.json"; 9];
    refused(
        &f.run(&[&["report", "--html", "p.html"], &nine[..]].concat()),
        &["9 reports and runs", "at most 8"],
    );
    assert_eq!(f.run(&["report"]).code, Some(2));
    assert!(!f.path("p.html").exists());
}

#[test]
fn a_run_leaves_its_page() {
    let f = Fixture::new();
    let set = [
        "--set",
        "data.eval_tasks=eval.jsonl",
        "--set",
        "train.eval_samples=4",
        "--set",
        "train.eval_every=2",
    ];
    let ran = f.succeed(&[&["train", "run.toml"], &set[..]].concat());
    assert!(!ran.stderr.contains("warning"), "{}", ran.stderr);
    let page = fs::read_to_string(f.path("out/report.html")).unwrap();
    for words in [
        "Training run out",
        "Log-prob gap, sampler to trainer",
        "Time of a step",
        "out, before",
        "out, 4 steps",
        "Differences from out, before",
        "on the evaluation&#39;s tasks",
        "Learning rate",
        "config.toml",
    ] {
        assert!(page.contains(words), "no {words:?}");
    }
    // Again from what it left, with the same bytes; and of a run under way, whose last line is not whole.
    assert_eq!(f.succeed(&["report", "out"]).stdout, "out/report.html\n");
    assert_eq!(fs::read_to_string(f.path("out/report.html")).unwrap(), page);
    let log = fs::read_to_string(f.path("out/metrics.jsonl")).unwrap();
    let two: Vec<&str> = log.lines().take(2).collect();
    f.write("out/metrics.jsonl", format!("{}\n{}", two.join("\n"), "{\"step\":3,\"lo"));
    f.succeed(&["report", "out", "--html", "early.html"]);
    let early = fs::read_to_string(f.path("early.html")).unwrap();
    assert!(
        page.contains("row\">out</th><td>4</td>") && early.contains("row\">out</th><td>2</td>"),
        "{early}"
    );
    f.write("out/metrics.jsonl", format!("{}\nnonsense\n", two[0]));
    refused(&f.run(&["report", "out"]), &["out/metrics.jsonl:2: not a line of metrics"]);
    f.write("out/metrics.jsonl", &log);
    // Two runs side by side, and an evaluation with them.
    f.succeed(
        &[&["train", "run.toml", "--set", "train.output=second", "--set", "train.seed=5"], &set[..]].concat(),
    );
    f.succeed(&["report", "out", "second", "--html", "two.html"]);
    let page = fs::read_to_string(f.path("two.html")).unwrap();
    assert!(page.contains("Training run out, second") && page.contains("second, 4 steps"));
    // A run goes on over its page; a directory with a page that is no run's is left alone.
    f.succeed(&[&["train", "run.toml", "--resume", "--set", "train.steps=5"], &set[..]].concat());
    assert!(fs::read_to_string(f.path("out/report.html")).unwrap().contains("out, 5 steps"));
    fs::create_dir(f.path("mine")).unwrap();
    f.write("mine/report.html", "my own");
    let ran = f.run(&["train", "run.toml", "--set", "train.output=mine"]);
    refused(&ran, &["mine/report.html is there already"]);
    assert_eq!(fs::read_to_string(f.path("mine/report.html")).unwrap(), "my own");
}

/// Figures of samples that nobody drew are not shown as zeros.
#[test]
fn the_page_of_an_imitation_shows_what_it_has() {
    let f = Fixture::new();
    f.write("run.toml", crate::fixture::RUN.replace("kind = \"pass-at-n\"\nn = 2", "kind = \"sft\""));
    f.succeed(&["train", "run.toml"]);
    let page = fs::read_to_string(f.path("out/report.html")).unwrap();
    for (title, there) in
        [("Loss", true), ("Time of a step", true), ("Reward", false), ("Right responses", false)]
    {
        assert_eq!(page.contains(&format!(">{title}</h4>")), there, "{title}");
    }
}
