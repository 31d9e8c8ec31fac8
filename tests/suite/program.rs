//! The `program` verifier: sound programs pass, hostile ones do not, and nothing of them stays.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bon_engine::train::config::TrainConfig;
use bon_engine::verifier::{
    BuildError, Code, Failure, ProgramSettings, Request, Verifier, VerifierConfig, build,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Map, Value, json};

use crate::fixture::{Fixture, Ran};
use crate::places::checkout;

/// What a sound program needs on a busy machine, in seconds.
const AMPLE: f64 = 60.0;

/// The tests that programs pass which bring none of their own.
const TESTS: &str = "def check(candidate):
    assert candidate([]) == 0
    assert candidate([1, 2, 3]) == 6
    assert candidate([-4, 4, 10]) == 10
";

/// A verifier with a directory of its own, whose processes can be told from all others.
struct Judge {
    verifier: Box<dyn Verifier>,
    dir: tempfile::TempDir,
    mark: String,
}

impl Judge {
    /// `settings` beside interpreter and memory; `lacking` are numbers of system calls that the system does not grant.
    fn new(settings: &Value, lacking: &[i64]) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let dir = tempfile::tempdir().unwrap();
        let tmp = format!("TMPDIR={}", dir.path().display());
        let mark = format!("MARK=bon-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let mut interpreter = vec!["env".to_owned(), tmp];
        if !lacking.is_empty() {
            let numbers = lacking.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
            let script = checkout().join("tests/programs/without.py").display().to_string();
            interpreter.extend(["python3".into(), script, numbers]);
        }
        // In the command line of all its processes.
        interpreter.extend(["python3", "-X", &mark].map(String::from));
        let mut table = json!({"kind": "program", "interpreter": interpreter, "code": "fenced"});
        table.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        let verifier = build(&serde_json::from_value(table).unwrap()).unwrap();
        Self { verifier, dir, mark }
    }

    fn score(&self, response: &str, task: &Value) -> Result<f64, Failure> {
        let task = task.as_object().unwrap();
        self.verifier.score(&Request { prompt: "", response, answer: "-", task })
    }

    /// How many processes of this verifier there are.
    fn processes(&self) -> usize {
        self.pids().len()
    }

    fn pids(&self) -> Vec<i32> {
        let marked = |pid: &Path| {
            let line = fs::read(pid.join("cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).split('\0').any(|word| word == self.mark)
        };
        let number = |pid: &Path| pid.file_name()?.to_str()?.parse().ok();
        let entries = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| marked(path)).filter_map(|path| number(&path)).collect()
    }

    /// What lies in its directory, as far down as it goes.
    fn files(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut open = vec![self.dir.path().to_owned()];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() && !path.is_symlink() {
                    open.push(path.clone());
                }
                found.push(path);
            }
        }
        found
    }

    /// Drops the verifier and checks that no process and no file of it is left.
    #[track_caller]
    fn finish(self) {
        let Self { verifier, dir, mark } = self;
        drop(verifier);
        let gone = Self { verifier: build(&VerifierConfig::Boxed { evaluate: false }).unwrap(), dir, mark };
        assert_eq!((gone.processes(), gone.files()), (0, vec![]));
    }
}

fn task(tests: &str) -> Value {
    json!({"prompt": "Add.", "answer": "-", "tests": tests, "entry_point": "total"})
}

/// The programs in a folder of tests/programs: name, program, task.
fn programs(folder: &str) -> Vec<(String, String, Value)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(checkout().join("tests/programs").join(folder)).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("# "), "{}: its first line says what it tries", path.display());
        let (program, tests) = text.split_once("# tests:\n").unwrap_or((&text, TESTS));
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        found.push((name, program.to_owned(), task(tests)));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// What systems may lack: namespaces, as in most containers; then Landlock as well; then everything.
fn lacks() -> [Vec<i64>; 3] {
    let namespaces = [libc::SYS_unshare];
    let landlock = [libc::SYS_unshare, libc::SYS_landlock_create_ruleset];
    let all = [libc::SYS_unshare, libc::SYS_landlock_create_ruleset, -1];
    [namespaces.to_vec(), landlock.to_vec(), all.to_vec()]
}

/// Every sound program passes, however little a system grants.
#[test]
fn sound_programs_pass() {
    for lacking in [vec![]].into_iter().chain(lacks()) {
        let judge = Judge::new(&json!({"timeout_seconds": AMPLE, "cpu_seconds": 60}), &lacking);
        let wrong: Vec<String> = programs("sound")
            .iter()
            .map(|(name, program, task)| (name, judge.score(program, task)))
            .filter(|(_, score)| *score != Ok(1.0))
            .map(|(name, score)| format!("{name}: {score:?}"))
            .collect();
        assert!(wrong.is_empty(), "without {lacking:?}: {wrong:#?}");
        judge.finish();
    }
}

/// No hostile program passes, hangs, or leaves anything, where the system grants all and where it grants no namespaces.
/// Many of them answer right if what they try succeeds. Where it does, it is harmless: whoever finds a hole keeps the machine.
#[test]
fn hostile_programs_are_wrong_and_leave_nothing() {
    let [no_namespaces, ..] = lacks();
    for lacking in [vec![], no_namespaces] {
        let settings = json!({"timeout_seconds": 3.0, "cpu_seconds": 1, "workers": 2, "disk_mb": 4});
        let judge = Judge::new(&settings, &lacking);
        let at_rest = judge.processes();
        assert_eq!(
            at_rest,
            if lacking.is_empty() { 4 } else { 2 },
            "a warden per worker, and in namespaces a keeper"
        );
        let hostile = programs("hostile");
        assert!(hostile.len() >= 40, "{}", hostile.len());
        let (next, wrong) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while let Some((name, program, task)) = hostile.get(next.fetch_add(1, Ordering::Relaxed))
                    {
                        let begun = Instant::now();
                        let score = judge.score(program, task);
                        let took = begun.elapsed();
                        if score != Ok(0.0) || took > Duration::from_secs(20) {
                            wrong.lock().unwrap().push(format!("{name}: {score:?} after {took:?}"));
                        }
                    }
                });
            }
        });
        let wrong = wrong.into_inner().unwrap();
        assert!(wrong.is_empty(), "without {lacking:?}: {wrong:#?}");
        // No worker had to be started anew, and all of them still judge.
        let notes = judge.verifier.notes();
        assert_eq!(notes.len(), usize::from(!lacking.is_empty()), "{notes:?}");
        assert_eq!(judge.processes(), at_rest);
        assert_eq!(judge.files().len(), 2, "a directory per worker, and empty: {:?}", judge.files());
        for _ in 0..4 {
            assert_eq!(judge.score("def total(n): return sum(n)", &task(TESTS)), Ok(1.0));
        }
        judge.finish();
        for folder in ["/tmp", "/var/tmp", "/dev/shm", "/root", "/home"] {
            assert!(!Path::new(folder).join("escaped-from-a-program").exists(), "{folder}");
        }
    }
}

/// Text that is no program, or hardly one.
#[test]
fn odd_texts_are_wrong() {
    let judge = Judge::new(&json!({"timeout_seconds": AMPLE}), &[]);
    let right = "def total(n):\n    return sum(n)\n";
    for text in [
        String::new(),
        "\0".into(),
        format!("{right}\0"),
        format!("{right}# \u{fffd}\u{202e}\n\u{c}\u{b}!"),
        "'\\ud800' + ".into(),
        "\u{feff}\u{feff}".into(),
        "\r\n\r".into(),
        "(".repeat(100_000),
        "[".repeat(50_000) + &"]".repeat(50_000),
        "-".repeat(100_000) + "1",
        "a = ".repeat(50_000) + "1",
        format!("total = {}", "9".repeat(100_000)),
        format!("total = {}1", "lambda n: ".repeat(5_000)),
        "if 1:\n".to_owned() + &(1..200).map(|i| " ".repeat(i) + "if 1:\n").collect::<String>(),
        "# coding: utf-7\n+AAA-".into(),
        "x".repeat(4 << 20),
        "<eos><bos>".into(),
    ] {
        let shown: String = text.chars().take(40).collect();
        assert_eq!(judge.score(&text, &task(TESTS)), Ok(0.0), "{shown:?}");
    }
    for text in [right.replace('\n', "\r\n"), format!("# {}\n{right}", "é".repeat(1 << 20))] {
        assert_eq!(judge.score(&text, &task(TESTS)), Ok(1.0), "{:?}", &text[..20]);
    }
    judge.finish();
}

/// What no response is to blame for is no score.
#[test]
fn tests_that_cannot_be_run_are_no_verdict() {
    let judge = Judge::new(&json!({"timeout_seconds": AMPLE}), &[]);
    let right = "def total(n):\n    return sum(n)\n";
    for (setup, tests, named) in [
        ("", "def check(candidate:\n", "the tests: SyntaxError"),
        (
            "import none_such",
            "assert total([1]) == 1",
            "the setup: ModuleNotFoundError: No module named 'none_such'",
        ),
        ("1 / 0", "assert total([1]) == 1", "the setup: ZeroDivisionError"),
        ("import", "assert total([1]) == 1", "the setup: SyntaxError"),
        ("", "'\0'", "the tests: "),
        ("", "assert total([1]) == one", "the tests: NameError: name 'one' is not defined"),
        ("", "import none_such\nassert total([1]) == 1", "No module named 'none_such'"),
        ("", "def check(candidate):\n    assert True\n", "the tests never call total"),
        ("", "total", "the tests never call total"),
        ("", "total(lambda: 1)", "a value of type function"),
        ("", "try:\n    total(object())\nexcept Exception:\n    pass", "a value of type object"),
        ("", "raise SystemExit(0)", "the tests ended with SystemExit"),
        ("", "import os\ntotal([])\nos._exit(0)", "the tests ended without a verdict"),
    ] {
        let mut task = task(tests);
        task["setup"] = setup.into();
        let failure = judge.score(right, &task).unwrap_err();
        assert!(matches!(&failure, Failure::Task { .. }) && failure.kind() == "task", "{failure:?}");
        let told = failure.to_string();
        assert!(told.contains(named) && told.ends_with("; correct the task"), "{tests:?}: {told}");
    }
    // The same errors, where they are the response's.
    for response in [
        "import none_such",
        "def total(n): return none_such",
        "def total(n): import none_such",
        "total = 1",
        "1 / 0",
    ] {
        assert_eq!(judge.score(response, &task(TESTS)), Ok(0.0), "{response:?}");
    }
    // A test that swallows every error does not see what is no answer.
    for tests in [
        "try:\n    total([])\nexcept:\n    pass\n",
        "for _ in range(3):\n    try:\n        total([])\n    except BaseException:\n        pass\n",
    ] {
        assert_eq!(judge.score("def total(n): return object()", &task(tests)), Ok(0.0), "{tests:?}");
        assert_eq!(judge.score("import os\ndef total(n): os._exit(0)", &task(tests)), Ok(0.0), "{tests:?}");
        assert_eq!(judge.score(right, &task(tests)), Ok(1.0), "{tests:?}");
    }
    // Tests that run for ever are no pass either.
    let judge = Judge::new(&json!({"timeout_seconds": 1.0, "cpu_seconds": 1}), &[]);
    for tests in ["total([])\nwhile True: pass", "import time\ntotal([])\ntime.sleep(1000)"] {
        assert_eq!(judge.score(right, &task(tests)), Ok(0.0), "{tests:?}");
    }
    judge.finish();
}

#[test]
fn a_response_goes_on_from_its_prompt_or_stands_in_a_fence() {
    let prompt = "def helper(n):\n    return sum(n)\n\n\ndef total(numbers):\n    \"\"\"The sum.\"\"\"\n";
    let mut task = task(
        "import math\ndef check(candidate):\n    assert candidate([1]) == helper([1]) + math.floor(0.5)\n",
    );
    task["prompt"] = prompt.into();
    task["setup"] = "def helper(n):\n    return sum(n)\n".into();
    let settings = |code: &str| json!({"timeout_seconds": AMPLE, "code": code});
    let judge = Judge::new(&settings("continuation"), &[]);
    for (response, score) in [
        ("    return helper(numbers)\n", 1.0),
        ("    return helper(numbers) + 1\n", 0.0),
        ("return helper(numbers)\n", 0.0),
        // The tests' helper is their own.
        ("    return 0\n\ndef helper(n):\n    return 0\n", 0.0),
        ("", 0.0),
    ] {
        assert_eq!(judge.score(response, &task), Ok(score), "{response:?}");
    }
    let judge = Judge::new(&settings("fenced"), &[]);
    for (response, score) in [
        ("Here:\n```python\ndef total(n):\n    return helper(n)\n```\nDone.", 1.0),
        ("```\ndef total(n):\n    return sum(n)", 1.0),
        ("def total(n):\n    return sum(n)", 1.0),
        ("```python\n    return helper(numbers)\n```", 0.0),
        ("```python\n```", 0.0),
    ] {
        assert_eq!(judge.score(response, &task), Ok(score), "{response:?}");
    }
    assert_eq!(judge.verifier.extract("def total(n): return sum(n)"), None);
}

/// What a task must say is asked before anything runs, and names where it stands.
#[test]
fn tasks_that_cannot_be_judged_are_refused_at_the_start() {
    let judge = Judge::new(&json!({"code": "continuation"}), &[]);
    let whole = task(TESTS);
    let check = |task: &Value| judge.verifier.check_task(task.as_object().unwrap());
    assert_eq!(check(&whole), Ok(()));
    for (field, value, problem) in [
        ("tests", None, "has no field `tests`"),
        ("tests", Some(json!(" \n")), "has no field `tests`"),
        ("tests", Some(json!(["assert f(1)"])), "its field `tests` is no string"),
        ("entry_point", None, "has no field `entry_point`"),
        ("entry_point", Some(json!("a b")), "\"a b\", which is no name"),
        ("entry_point", Some(json!("1a")), "which is no name"),
        ("setup", Some(json!(1)), "its field `setup` is no string"),
        ("prompt", None, "has no field `prompt`"),
    ] {
        let mut task: Map<String, Value> = whole.as_object().unwrap().clone();
        task.remove(field);
        task.extend(value.map(|value| (field.to_owned(), value)));
        let said = judge.verifier.check_task(&task).unwrap_err();
        assert!(said.contains(problem), "{field}: {said}");
        let failure = judge.score("", &Value::Object(task)).unwrap_err().to_string();
        assert!(failure.starts_with("the task ") && failure.contains(problem), "{failure}");
    }
    let f = Fixture::new();
    let text = crate::fixture::RUN.replace("kind = \"numeric\"\npick = \"first\"", "kind = \"program\"");
    f.write("run.toml", text);
    let good = json!({"prompt": "1+1=", "answer": "2", "tests": "f(1)", "entry_point": "f"}).to_string();
    f.write(
        "tasks.jsonl",
        format!("{good}\n\n{}\n", r#"{"prompt": "1+2=", "answer": "3", "entry_point": "f"}"#),
    );
    for args in [&["train", "run.toml"][..], &["eval", "run.toml"]] {
        let ran = f.run(args);
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        let named = "tasks.jsonl:3: the [verifier] cannot judge it: the task has no field `tests`: Python code with assertions";
        assert!(ran.stderr.contains(named), "{}", ran.stderr);
    }
    f.write("tasks.jsonl", &good);
    let environment = "environment={kind=\"program\", code=\"fenced\"}";
    f.succeed(&["eval", "run.toml", "--samples", "2", "--set", "verifier.kind=exact", "--set", environment]);
}

#[test]
fn interpreters_that_cannot_judge_are_refused() {
    let refusal = |table: Value| {
        let config: VerifierConfig = serde_json::from_value(table).unwrap();
        build(&config).err().expect("a refusal")
    };
    let with = |interpreter: &[&str]| refusal(json!({"kind": "program", "interpreter": interpreter}));
    assert!(matches!(with(&[]), BuildError::NoInterpreter));
    assert!(matches!(with(&[""]), BuildError::NoInterpreter));
    assert!(
        matches!(with(&["/no/such/python"]), BuildError::Start { program, .. } if program == "/no/such/python")
    );
    for (interpreter, said) in [
        (&["sh", "-c", "echo 'it is broken' >&2; exit 3"][..], &["exit status 3", "it is broken"][..]),
        (&["echo", "hello"], &["wrote \"hello"]),
        (&["sh", "-c", "echo '{\"ready\": false, \"open\": []}'; cat"], &["not ready"]),
        (
            &[
                "python3",
                "-c",
                "import sys; sys.version_info = (3, 8); sys.version = '3.8.0'; exec(sys.argv[-1])",
            ],
            &["Python 3.9 or newer is needed, this is 3.8.0"],
        ),
    ] {
        let error = with(interpreter);
        let BuildError::Interpreter { program, source } = &error else { panic!("{error:?}") };
        assert_eq!(program, interpreter[0]);
        for word in said {
            assert!(source.to_string().contains(word), "{source}");
        }
    }
    for (field, value) in [
        ("timeout_seconds", json!(0)),
        ("cpu_seconds", json!(0)),
        ("memory_mb", json!(1)),
        ("disk_mb", json!(0)),
        ("workers", json!(0)),
    ] {
        let mut table = json!({"kind": "program"});
        table[field] = value;
        let error = refusal(table);
        assert!(matches!(error, BuildError::Range { name, .. } if name == field), "{error}");
    }
}

/// What a system does not grant is told, or refused.
#[test]
fn what_is_not_confined_is_told_once_or_refused() {
    let told = |lacking: &[i64]| {
        let judge = Judge::new(&json!({}), lacking);
        let notes = judge.verifier.notes();
        assert_eq!(judge.verifier.notes(), Vec::<String>::new());
        judge.finish();
        notes
    };
    assert_eq!(told(&[]), Vec::<String>::new());
    let [namespaces, landlock, all] = lacks();
    let no_rights = "unshare: Operation not permitted";
    let no_landlock = "landlock_create_ruleset: Operation not permitted";
    let no_filter = "prctl: Operation not permitted";
    for (lacking, open) in [
        (&namespaces, format!("not confined: disk space ({no_rights}). ")),
        (&landlock, format!("not confined: files ({no_landlock}), disk space ({no_rights}). ")),
        (
            &all,
            format!(
                "not confined: files ({no_landlock}), disk space ({no_rights}), system calls ({no_filter}), network \
                 ({no_rights}), processes ({no_rights}). "
            ),
        ),
        (
            &vec![libc::SYS_landlock_create_ruleset],
            format!("not confined: files that may be read ({no_landlock}). "),
        ),
        (&vec![-1], format!("not confined: system calls ({no_filter}). ")),
        (&vec![libc::SYS_mount_setattr], "disk space (mount_setattr: Operation not permitted). ".to_owned()),
    ] {
        let notes = told(lacking);
        assert!(
            matches!(&notes[..], [note] if note.contains(&open)),
            "{lacking:?}: {notes:?} lacks {open:?}"
        );
        let numbers = lacking.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        let script = checkout().join("tests/programs/without.py");
        let config = json!({
            "kind": "program", "isolation": "required", "interpreter": ["python3", script, numbers, "python3"],
        });
        let error = build(&serde_json::from_value(config).unwrap()).err().expect("a refusal");
        assert!(matches!(error, BuildError::Open { .. }), "{error}");
    }
    let config = json!({"kind": "program", "isolation": "required"});
    build(&serde_json::from_value(config).unwrap()).unwrap();
    // Nor does every interpreter.
    let loader = "import sys; sys.modules['ctypes'] = None; exec(sys.argv[-1])";
    let config = json!({"kind": "program", "code": "fenced", "interpreter": ["python3", "-c", loader]});
    let verifier = build(&serde_json::from_value(config).unwrap()).unwrap();
    let note = verifier.notes().concat();
    assert!(note.contains("files (this Python has no ctypes), network (this"), "{note}");
    let task = task(TESTS);
    let request = Request {
        prompt: "",
        response: "def total(n): return sum(n)",
        answer: "-",
        task: task.as_object().unwrap(),
    };
    assert_eq!(verifier.score(&request), Ok(1.0));
}

/// Where nothing of the kernel's helps, what a verdict has started ends with it all the same.
#[test]
fn nothing_survives_a_verdict_even_without_namespaces_and_filter() {
    let [.., all] = lacks();
    let judge = Judge::new(&json!({"timeout_seconds": 1.0}), &all);
    let forks = "import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                time.sleep(1000)
        time.sleep(0.01)
        os._exit(0)
time.sleep(0.2)
def total(numbers): return sum(numbers)
";
    for _ in 0..3 {
        assert_eq!(judge.score(forks, &task(TESTS)), Ok(1.0));
        assert_eq!((judge.processes(), judge.files().len()), (1, 1), "the warden and its directory");
    }
    judge.finish();
}

/// The same program gives the same verdict in every worker: hashes and random numbers begin alike.
#[test]
fn verdicts_do_not_depend_on_the_process() {
    let bits = || {
        let judge = Judge::new(&json!({"timeout_seconds": AMPLE}), &[]);
        let ask = |i: i32| {
            let program =
                format!("import random\ndef total(n): return (hash('{i}') ^ random.getrandbits(9)) & 1\n");
            judge.score(&program, &task("import random\nassert total([]) == random.getrandbits(1)")).unwrap()
        };
        (0..24).map(ask).collect::<Vec<f64>>()
    };
    let first = bits();
    assert!(first.contains(&0.0) && first.contains(&1.0), "{first:?}");
    assert_eq!(first, bits());
}

/// If the engine is killed in the middle of a verdict, nothing runs on.
#[test]
fn programs_end_with_the_engine() {
    for lacking in ["", "unshare"] {
        let f = Fixture::new();
        let mark = format!("MARK=bon-{}-killed-{lacking}", std::process::id());
        let script = checkout().join("tests/programs/without.py").display().to_string();
        let number = libc::SYS_unshare.to_string();
        let tmp = format!("TMPDIR={}", f.root().join("tmp").display());
        fs::create_dir(f.path("tmp")).unwrap();
        let mut interpreter = vec!["env", &tmp];
        if !lacking.is_empty() {
            interpreter.extend(["python3", &script, &number]);
        }
        interpreter.extend(["python3", "-X", &mark]);
        let verifier =
            format!("kind = \"program\"\ntimeout_seconds = 600\ninterpreter = {}", json!(interpreter));
        f.write("run.toml", crate::fixture::RUN.replace("kind = \"numeric\"\npick = \"first\"", &verifier));
        let tests = "import time\ntime.sleep(1000)\nf(1)";
        let line = json!({"prompt": "1+1=", "answer": "2", "tests": tests, "entry_point": "f"});
        f.write("tasks.jsonl", line.to_string());
        let mut engine = f.command(&["eval", "run.toml", "--samples", "1"]).spawn().unwrap();
        let judge = Judge {
            verifier: build(&VerifierConfig::Boxed { evaluate: false }).unwrap(),
            dir: tempfile::tempdir().unwrap(),
            mark,
        };
        let wait = |what: &str, ok: &dyn Fn() -> bool| {
            let begun = Instant::now();
            while !ok() {
                assert!(begun.elapsed() < Duration::from_secs(60), "{what}: {} processes", judge.processes());
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        // The candidate ends by itself: what sleeps is the exam.
        let asleep = if lacking.is_empty() { 3 } else { 2 };
        wait("the exam runs", &|| judge.processes() == asleep);
        engine.kill().unwrap();
        engine.wait().unwrap();
        wait("nothing runs", &|| judge.processes() == 0);
        assert_eq!(fs::read_dir(f.path("tmp")).unwrap().count(), 0);
    }
}

/// HumanEval's own solutions pass its tests, and what its functions return by themselves, nothing, does not.
#[test]
fn the_solutions_of_humaneval_pass() {
    let path = checkout().join(".cache/humaneval/tasks.jsonl");
    let Ok(text) = fs::read_to_string(&path) else {
        crate::device::skipped("need HumanEval (`make humaneval` fetches it)");
        return;
    };
    let judge = Judge::new(&json!({"timeout_seconds": AMPLE, "code": "continuation"}), &[]);
    let tasks: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(tasks.len(), 164);
    let mut wrong = Vec::new();
    for task in &tasks {
        let solution = task["answer"].as_str().unwrap();
        for (response, wanted) in [(solution, 1.0), ("    pass\n", 0.0)] {
            let score = judge.score(response, task);
            if score != Ok(wanted) {
                wrong.push(format!("{}: {response:?} {score:?}", task["task_id"]));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    judge.finish();
}

/// The examples are configurations, and the one for Gemma 2B needs a card of 80 GB and no more.
#[test]
fn the_examples_of_humaneval_are_configurations_that_fit() {
    let f = Fixture::new();
    let plan = |name: &str, more: &[&str]| {
        let path = checkout().join("examples/humaneval").join(name);
        let text = fs::read_to_string(&path).unwrap();
        let config = TrainConfig::load(&path, &[]).unwrap();
        assert!(
            matches!(
                config.verifier,
                Some(VerifierConfig::Program(ProgramSettings { code: Code::Continuation, .. }))
            ),
            "{text}"
        );
        let args = ["plan", path.to_str().unwrap(), "--prompt-tokens", "422"];
        f.run(&[&args[..], more].concat())
    };
    let bytes = ["--published", "Gemma 2B", "--memory", "80GB"];
    let small = ["optimizer.moments=8bit", "optimizer.embedding_moments=8bit", "optimizer.masters=false"];
    let set: Vec<&str> = small.iter().flat_map(|set| ["--set", set]).collect();
    for (more, figure) in [
        (&bytes[..], "of 80.00 GB: it fits"),
        (&[&bytes[..3], &["48GB"], &set].concat(), "of 48.00 GB: it fits"),
        (&[&bytes[..3], &["24GB"], &set].concat(), "of 24.00 GB: it fits"),
    ] {
        let ran = plan("gemma-2b.toml", more);
        assert!(ran.code == Some(0) && ran.stdout.contains(figure), "{} {}", ran.stdout, ran.stderr);
    }
    let ran = plan("gemma-3-270m.toml", &["--published", "Gemma 3 270M", "--memory", "16GB"]);
    assert!(ran.stdout.contains("it fits"), "{} {}", ran.stdout, ran.stderr);
}

/// Files of HumanEval's layout become tasks; a line that is none is named.
#[test]
fn problems_of_humanevals_layout_become_tasks() {
    let dir = tempfile::tempdir().unwrap();
    let prompt = "from typing import List\n\n\ndef one() -> int:\n    return 1\n\n\ndef more(xs: List[int]):\n    \"\"\"More.\"\"\"\n";
    let problem = json!({
        "task_id": "Own/0",
        "prompt": prompt,
        "entry_point": "more",
        "canonical_solution": "    return [x + one() for x in xs]\n",
        "test": "def check(candidate):\n    assert candidate([1, 2]) == [1 + one(), 2 + one()]\n",
    });
    let convert = |text: String| {
        fs::write(dir.path().join("in.jsonl"), text).unwrap();
        let mut script = std::process::Command::new("python3");
        script.arg(checkout().join("tools/humaneval.py")).args(["--input", "in.jsonl", "--out", "out"]);
        Ran::of(script.current_dir(dir.path()).env("PYTHONDONTWRITEBYTECODE", "1"))
    };
    let ran = convert(format!("{problem}\n\n{problem}\n"));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let read = |name: &str| fs::read_to_string(dir.path().join("out").join(name)).unwrap();
    let lines = |name: &str| read(name).lines().count();
    assert_eq!([lines("tasks.jsonl"), lines("train.jsonl"), lines("eval.jsonl")], [2, 1, 1]);
    let task: Value = serde_json::from_str(read("eval.jsonl").trim()).unwrap();
    let judge = Judge::new(&json!({"code": "continuation", "timeout_seconds": AMPLE}), &[]);
    assert_eq!(judge.score(task["answer"].as_str().unwrap(), &task), Ok(1.0));
    assert_eq!(judge.score("    return [x + 2 for x in xs]\n", &task), Ok(0.0));
    for line in ["{}", "[", "[1]"] {
        let ran = convert(format!("{problem}\n{line}\n"));
        assert!(ran.code == Some(1) && ran.stderr.contains("line 2: no problem"), "{}", ran.stderr);
    }
    let mut other = problem.clone();
    other["entry_point"] = "less".into();
    let ran = convert(other.to_string());
    assert!(ran.stderr.contains("line 1: the prompt does not define less"), "{}", ran.stderr);
}

/// What the system kills is started anew, its response judged all the same, and that is told.
#[test]
fn a_killed_warden_is_replaced() {
    let judge = Judge::new(&json!({"timeout_seconds": AMPLE}), &[]);
    let right = "def total(n): return sum(n)";
    assert_eq!(judge.score(right, &task(TESTS)), Ok(1.0));
    let pids = judge.pids();
    let is_of_a_keeper = |pid: &&i32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap();
        pids.contains(&parent.trim().parse().unwrap())
    };
    // Without namespaces there is no keeper.
    let warden = *pids.iter().find(is_of_a_keeper).unwrap_or(&pids[0]);
    kill_process(Pid::from_raw(warden).unwrap(), Signal::KILL).unwrap();
    assert_eq!(judge.score(right, &task(TESTS)), Ok(1.0));
    let notes = judge.verifier.notes();
    assert!(
        matches!(&notes[..], [note] if note.contains("started anew") && note.contains("memory")),
        "{notes:?}"
    );
    judge.finish();
}
