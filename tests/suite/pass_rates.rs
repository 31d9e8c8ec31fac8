//! Training tasks chosen by the pass rates of an evaluation.

use std::fs;
use std::path::Path;

use bon_engine::eval::{Problem, Provenance, Report, Sample, evaluate};
use bon_engine::tasks::Tasks;
use bon_engine::train::pass_rate::filter;

use crate::fixture::Fixture;

const TASKS: &str = r#"{"prompt":"a","answer":"1"}

{"prompt":"b","answer":"2"}
{"prompt":"c","answer":"3"}
{"prompt":"d","answer":"4"}
"#;

/// A report of the tasks in which 0, 1, 2... of four samples pass.
fn report(prompts: &[&str], answers: &[&str]) -> Report {
    let problems: Vec<Problem> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| {
            let sample = |j| Sample { correct: j < i, ..Sample::default() };
            Problem { id: format!("{}: {prompt}", i + 1), samples: (0..4).map(sample).collect() }
        })
        .collect();
    let answers = answers.iter().map(|a| (*a).to_owned()).collect();
    let provenance = Some(Provenance { answers, ..Provenance::default() });
    Report { provenance, ..evaluate(&problems, &[1, 2, 4], 0).unwrap() }
}

fn write(dir: &Path, report: &Report) -> std::path::PathBuf {
    let path = dir.join("report.json");
    fs::write(&path, serde_json::to_string(report).unwrap()).unwrap();
    path
}

const PROMPTS: [&str; 4] = ["a", "b", "c", "d"];
const ANSWERS: [&str; 4] = ["1", "2", "3", "4"];

#[test]
fn a_range_keeps_both_of_its_ends_and_the_order_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tasks.jsonl");
    fs::write(&file, TASKS).unwrap();
    let all = Tasks::read(&file).unwrap();
    let path = write(dir.path(), &report(&PROMPTS, &ANSWERS));
    let mut fingerprints = vec![all.fingerprint];
    for (range, kept) in [
        ([0.25, 0.5], &["b", "c"][..]),
        ([0.0, 0.25], &["a", "b"]),
        ([0.26, 0.5], &["c"]),
        ([0.25, 0.49], &["b"]),
        ([0.75, 0.75], &["d"]),
        ([0.1, 1.0], &["b", "c", "d"]),
        ([0.0, 1.0], &PROMPTS),
    ] {
        let found = filter(all.clone(), &file, &path, range).unwrap();
        let prompts: Vec<&str> = found.list.iter().map(|task| task.prompt.as_str()).collect();
        assert_eq!(prompts, kept, "{range:?}");
        assert!(found.list.iter().all(|task| all.list.contains(task)), "lines stay: {:?}", found.list);
        assert!(!fingerprints.contains(&found.fingerprint), "a run must not resume on another choice");
        fingerprints.push(found.fingerprint);
    }
}

#[test]
fn a_report_that_cannot_choose_is_named_with_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tasks.jsonl");
    fs::write(&file, TASKS).unwrap();
    let error = |path: &Path, range| {
        let refused = filter(Tasks::read(&file).unwrap(), &file, path, range).unwrap_err();
        format!("{:#}", anyhow::Error::from(refused)).replace(&dir.path().display().to_string(), "DIR")
    };
    let with = |report: &Report| error(&write(dir.path(), report), [0.0, 1.0]);
    let good = report(&PROMPTS, &ANSWERS);

    let text = error(&write(dir.path(), &good), [0.8, 1.0]);
    assert_eq!(
        text,
        "data.pass_rate: no task of DIR/tasks.jsonl has a pass rate from 0.8 to 1 in DIR/report.json; they are from 0 \
         to 0.75, so widen the range"
    );
    let text = error(&dir.path().join("nowhere"), [0.0, 1.0]);
    assert!(text.starts_with("data.report: cannot read DIR/nowhere: "), "{text}");
    let text = error(&file, [0.0, 1.0]);
    assert!(text.starts_with("data.report: DIR/tasks.jsonl is not a report of `bon-engine eval"), "{text}");

    for (prompts, found, wanted) in [
        (&["a", "b", "x", "d"][..], "`3: x`", "`3: c`"),
        (&["a", "b", "c"], "nothing", "`4: d`"),
        (&["a", "b", "c", "d", "e"], "`5: e`", "nothing"),
    ] {
        let text = with(&report(prompts, &["1", "2", "3", "4", "5"][..prompts.len()]));
        let says =
            format!("is of other tasks than DIR/tasks.jsonl: {found} stands where the file has {wanted};");
        assert!(text.contains(&says) && text.contains("eval --tasks DIR/tasks.jsonl"), "{text}");
    }
    let text = with(&report(&PROMPTS, &["1", "2", "9", "4"]));
    assert!(text.contains("judged by another answer than that of DIR/tasks.jsonl:4;"), "{text}");
    // What does not say its answers is believed.
    filter(
        Tasks::read(&file).unwrap(),
        &file,
        &write(dir.path(), &Report { provenance: None, ..good.clone() }),
        [0.0, 1.0],
    )
    .unwrap();

    let mut short = good.clone();
    short.problems[1].figures.pass_at_n.clear();
    let text = with(&short);
    assert!(text.starts_with("data.report: DIR/report.json has no pass@1 of 2: b;"), "{text}");
    let text = with(&Report { ns: vec![2, 3, 4], ..good });
    assert!(text.contains("has no pass@1 of 1: a;"), "{text}");
}

/// Evaluate, train on what is neither too hard nor too easy: to the bit the run on a file of these lines alone.
#[test]
fn a_run_on_the_chosen_tasks_is_the_run_on_a_file_of_them() {
    let f = Fixture::new();
    let eval = ["eval", "run.toml", "--tasks", "tasks.jsonl", "--samples", "8", "--output", "rates.json"];
    // The report that the settings name need not be there to be written.
    let chosen = ["--set", "data.report=rates.json", "--set", "data.pass_rate=[0.1, 0.5]"];
    f.succeed(&[&eval[..], &chosen].concat());
    let report: Report = serde_json::from_slice(&fs::read(f.path("rates.json")).unwrap()).unwrap();
    let within = |i: &usize| (0.1..=0.5).contains(&report.problems[*i].figures.pass_at_n[0]);
    let lines = fs::read_to_string(f.path("tasks.jsonl")).unwrap();
    let kept: Vec<&str> =
        lines.lines().enumerate().filter(|(i, _)| within(i)).map(|(_, line)| line).collect();
    assert!((3..23).contains(&kept.len()), "the fixture must have both: {}", kept.len());
    f.write("few.jsonl", kept.join("\n"));

    let train = |output: &str, set: &[&str]| {
        let output = format!("train.output={output}");
        let set = set.iter().flat_map(|s| ["--set", s]);
        let args: Vec<&str> = ["train", "run.toml", "--set", &output].into_iter().chain(set).collect();
        args.into_iter().map(str::to_owned).collect::<Vec<String>>()
    };
    let run = |args: &[String]| f.run(&args.iter().map(String::as_str).collect::<Vec<_>>());
    let set = ["data.report=rates.json", "data.pass_rate=[0.1, 0.5]"];
    let ran = run(&train("whole", &set));
    let note = format!("{} of 25 tasks have a pass rate from 0.1 to 0.5\n", kept.len());
    assert!(ran.code == Some(0) && ran.stderr.contains(&note), "{}", ran.stderr);
    assert_eq!(run(&train("few", &["data.tasks=few.jsonl"])).code, Some(0));
    let weights = |output: &str| {
        fs::read(f.path(output).join("checkpoints/step-000004/model/model.safetensors")).unwrap()
    };
    assert!(weights("whole") == weights("few"));

    // Cut after two steps it goes on to the same bits, wherever the report lies now.
    let half = [&set[..], &["train.steps=2"]].concat();
    assert_eq!(run(&train("cut", &half)).code, Some(0));
    fs::rename(f.path("rates.json"), f.path("moved.json")).unwrap();
    let resume = |set: &[&str]| run(&[train("cut", set), vec!["--resume".to_owned()]].concat());
    let ran = resume(&["data.report=moved.json", "data.pass_rate=[0.1, 0.6]"]);
    assert!(ran.stderr.contains("data.pass_rate: [0.1, 0.5] -> [0.1, 0.6]"), "{}", ran.stderr);
    let ran = resume(&["data.report=rates.json", "data.pass_rate=[0.1, 0.5]"]);
    assert!(ran.stderr.contains("data.report: no file at rates.json; "), "{}", ran.stderr);
    // Another report of the same tasks chooses others.
    let mut other = report.clone();
    other.problems.iter_mut().for_each(|p| p.figures.pass_at_n[0] = 1.0 - p.figures.pass_at_n[0]);
    f.write("other.json", serde_json::to_string(&other).unwrap());
    let ran = resume(&["data.report=other.json", "data.pass_rate=[0.1, 0.5]"]);
    assert!(
        ran.code == Some(1) && ran.stderr.contains("what data.report and data.pass_rate choose"),
        "{}",
        ran.stderr
    );
    let ran = resume(&["data.report=moved.json", "data.pass_rate=[0.1, 0.5]"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(weights("cut") == weights("whole"));
}
