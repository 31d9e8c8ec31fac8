//! `command`: programs that judge, and hostile ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bon_engine::verifier::{Failure, Request, Verifier};
use serde_json::{Value, json};

use super::{score, verifier};

/// Starts of shell programs: `reply SCORE` answers the request in `$line`.
const REPLY: &str = r#"
reply() { id=${line#*\"id\":}; printf '{"id":%s,"score":%s}\n' "${id%%,*}" "$1"; }
"#;

/// A `command` verifier whose program is a shell script that can note process ids in `$pids`.
pub(super) struct Script {
    dir: tempfile::TempDir,
    pub(super) verifier: Arc<dyn Verifier>,
}

impl Script {
    pub(super) fn new(body: &str, timeout_seconds: f64, workers: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("verify.sh");
        let pids = dir.path().join("pids");
        let head = format!("pids='{}'\necho $$ >> \"$pids\"\n{REPLY}", pids.display());
        std::fs::write(&path, format!("{head}{body}\n")).unwrap();
        let verifier = verifier(json!({
            "kind": "command", "program": ["sh", path], "timeout_seconds": timeout_seconds, "workers": workers,
        }));
        let script = Self { dir, verifier: verifier.into() };
        // So that a process that survives cannot be overlooked.
        while script.pids().len() < workers {
            std::thread::sleep(Duration::from_millis(2));
        }
        script
    }

    pub(super) fn score(&self, response: &str) -> Result<f64, Failure> {
        score(&*self.verifier, response, "answer")
    }

    fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default()
    }

    fn pids(&self) -> Vec<i32> {
        self.file("pids").lines().map(|pid| pid.parse().unwrap()).collect()
    }

    /// Drops the verifier and checks that every process that was noted is gone.
    #[track_caller]
    pub(super) fn finish(self) {
        let begun = Instant::now();
        let Self { dir, verifier } = self;
        drop(verifier);
        assert!(begun.elapsed() < Duration::from_secs(5), "dropping took {:?}", begun.elapsed());
        let pids = std::fs::read_to_string(dir.path().join("pids")).unwrap();
        assert!(!pids.is_empty());
        for pid in pids.lines() {
            while alive(pid.parse().unwrap()) {
                assert!(begun.elapsed() < Duration::from_secs(10), "process {pid} survives");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A killed child of the program stays a zombie until whoever inherited it reaps it; that is not alive.
fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let zombie = stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z"));
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::test_kill_process(pid).is_ok() && !zombie
}

/// Runs the body on one request, larger than a pipe holds, and checks the kind of failure, that it came no later than
/// the timeout needs, and that nothing survives.
#[track_caller]
fn misbehaves(body: &str, kind: &str, timeout_seconds: f64) -> Failure {
    let script = Script::new(body, timeout_seconds, 1);
    let begun = Instant::now();
    let failure = script.score(&"x".repeat(300_000)).unwrap_err();
    let seconds = begun.elapsed().as_secs_f64();
    assert_eq!(failure.kind(), kind, "{body:?}: {failure}");
    assert!(seconds < 5.0, "{body:?} took {seconds} s");
    assert!(kind != "timeout" || seconds >= timeout_seconds, "{body:?} took only {seconds} s");
    script.finish();
    failure
}

/// A timeout that a sound program meets on a busy machine, and one worth waiting for.
pub(super) const AMPLE: f64 = 30.0;
const SHORT: f64 = 0.4;

#[test]
fn a_program_reads_the_whole_request_and_answers() {
    let script = Script::new(
        r#"while read -r line; do printf '%s\n' "$line" >> "$pids.lines"; reply -2.5e-1; done"#,
        AMPLE,
        1,
    );
    let Value::Object(task) = json!({"prompt": "2+2?", "answer": "4", "unit": {"of": ["x", 1.5, null]}})
    else {
        unreachable!()
    };
    let response = "four\n\"4\"\u{2028}\\boxed{é}";
    for _ in 0..3 {
        let request = Request { prompt: "2+2?", response, answer: "4", task: &task };
        assert_eq!(script.verifier.score(&request), Ok(-0.25));
    }
    let lines: Vec<Value> =
        script.file("pids.lines").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let wanted = |id| json!({"id": id, "prompt": "2+2?", "response": response, "answer": "4", "task": task});
    assert_eq!(lines, [wanted(0), wanted(1), wanted(2)]);
    assert_eq!(script.pids().len(), 1, "one process serves all requests");
    assert_eq!(script.verifier.extract("4"), None);
    script.finish();
}

#[test]
fn programs_that_do_not_answer_time_out() {
    misbehaves("sleep 1000", "timeout", SHORT);
    misbehaves("exec <&-; sleep 1000", "timeout", SHORT);
    misbehaves("cat > /dev/null", "timeout", SHORT);
    misbehaves(r#"read -r line; printf '{"id":0,'; sleep 1000"#, "timeout", SHORT);
    misbehaves("read -r line; yes ''", "timeout", SHORT);
    misbehaves("trap '' TERM INT HUP PIPE; while :; do sleep 0.1; done", "timeout", SHORT);
    misbehaves(r#"sleep 1000 & echo $! >> "$pids"; wait"#, "timeout", SHORT);
    let flood = misbehaves("yes 'out of paper' >&2", "timeout", SHORT);
    assert!(flood.to_string().contains("stderr ends with:\nout of paper\n"), "{flood}");
    assert!(flood.to_string().len() < 4096);
}

#[test]
fn programs_that_end_have_crashed() {
    let ended = misbehaves("echo no licence >&2; exit 3", "crashed", AMPLE).to_string();
    assert!(ended.contains("exit status 3") && ended.contains("no licence"), "{ended}");
    let killed = misbehaves("read -r line; kill -SEGV $$", "crashed", AMPLE).to_string();
    assert!(killed.contains("signal 11"), "{killed}");
    let closed =
        misbehaves(r#"exec >&-; sleep 1000 & echo $! >> "$pids"; wait"#, "crashed", AMPLE).to_string();
    assert!(closed.contains("closed its stdout"), "{closed}");
    // Its child keeps stdout open, so only the deadline ends the wait.
    let orphan = misbehaves(r#"sleep 1000 & echo $! >> "$pids"; exit 7"#, "crashed", SHORT).to_string();
    assert!(orphan.contains("exit status 7"), "{orphan}");
    // A line is a line only with its end.
    misbehaves(r#"read -r line; printf '{"id":0,"score":1}'"#, "crashed", AMPLE);
}

#[test]
fn programs_that_write_something_else_break_the_protocol() {
    for (body, reason) in [
        ("echo Loading...; cat", "Loading..."),
        ("read -r line; echo '{}'", "no id"),
        ("read -r line; echo '{\"score\":1}'", "no id"),
        ("read -r line; echo '{\"id\":7,\"score\":1}'", "id 7"),
        ("read -r line; echo '{\"id\":-1,\"score\":1}'", "-1"),
        ("read -r line; echo '{\"id\":0,\"score\":\"1\"}'", "no number"),
        ("read -r line; echo '{\"id\":0,\"score\":1e999}'", "out of range"),
        ("read -r line; echo '[0,1]'; cat", "expected a map"),
        ("read -r line; printf '\\377\\376\\n'; cat", "expected value"),
        ("yes", "\"y\""),
        ("yes | tr -d '\\n'", "65536"),
        ("cat", "65536"),
        ("echo oops >&2; sleep 0.1; echo bad; sleep 1000", "oops"),
    ] {
        let failure = misbehaves(body, "protocol", AMPLE).to_string();
        assert!(failure.contains(reason) && failure.len() < 4096, "{body:?}: {failure}");
    }
}

#[test]
fn a_program_may_say_that_it_cannot_judge() {
    let script = Script::new(
        r#"while read -r line; do
            case "$line" in
                *say:nan*) reply NaN;; *say:inf*) reply -Infinity;; *say:null*) reply null;;
                *say:nothing*) id=${line#*\"id\":}; echo "{\"id\":${id%%,*},\"why\":\"NaN\"}";;
                *) reply 1;;
            esac
        done"#,
        AMPLE,
        1,
    );
    let kinds: Vec<_> = ["say:nan", "say:inf", "say:null", "say:nothing", "fine"]
        .map(|response| script.score(response).map_err(|failure| failure.kind()))
        .into();
    assert_eq!(kinds, [Err("nan"), Err("nan"), Err("missing"), Err("missing"), Ok(1.0)]);
    assert_eq!(script.pids().len(), 1, "a program that answers is not restarted");
    script.finish();
}

#[test]
fn only_the_request_that_breaks_a_program_fails() {
    let script = Script::new(
        r#"while read -r line; do
            case "$line" in *bomb*) echo boom >&2; exit 1;; *hang*) sleep 1000;; *) reply 1;; esac
        done"#,
        2.0,
        1,
    );
    assert_eq!(script.score("fine"), Ok(1.0));
    for _ in 0..5 {
        let bomb = script.score("bomb").unwrap_err();
        assert!(bomb.kind() == "crashed" && bomb.to_string().contains("boom"), "{bomb}");
    }
    assert_eq!(script.score("fine"), Ok(1.0));
    assert_eq!(script.score("hang").unwrap_err().kind(), "timeout");
    assert_eq!(script.score("fine"), Ok(1.0));
    script.finish();
}

#[test]
fn a_process_that_served_before_is_replaced_without_a_failure() {
    for body in [
        // One request per process.
        "read -r line; reply 1",
        // Answers twice, so that the second answer meets the next request.
        "while read -r line; do reply 1; reply 1; done",
        // Blank lines say nothing.
        "while read -r line; do echo; reply 1; echo; done",
        // More on stderr than a pipe holds.
        "while read -r line; do head -c 300000 /dev/zero >&2; reply 1; done",
    ] {
        let script = Script::new(body, AMPLE, 1);
        for _ in 0..5 {
            assert_eq!(script.score("fine"), Ok(1.0), "{body:?}");
        }
        script.finish();
    }
}

#[test]
fn a_program_that_never_works_is_reported_as_such() {
    let script = Script::new("echo no module named sympy >&2; exit 1", AMPLE, 1);
    let kinds = [(); 4].map(|()| script.score("fine").unwrap_err());
    assert_eq!(kinds.each_ref().map(Failure::kind), ["crashed", "crashed", "unavailable", "unavailable"]);
    assert!(kinds[3].to_string().contains("no module named sympy"), "{}", kinds[3]);
    assert_eq!(script.pids().len(), 3, "it is not started any more");
    script.finish();

    // It worked, and then its file is gone.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("verify");
    // Written by another process, because a child that another test forks holds what this one writes until it becomes a program,
    // and a file that is held for writing cannot be run.
    let written = path.with_extension("sh");
    std::fs::write(&written, format!("#!/bin/sh\n{REPLY}\nread -r line; reply 1\n")).unwrap();
    std::fs::set_permissions(&written, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    assert!(std::process::Command::new("cp").arg("-p").arg(&written).arg(&path).status().unwrap().success());
    let gone = verifier(json!({"kind": "command", "program": [path]}));
    assert_eq!(score(&*gone, "fine", "answer"), Ok(1.0));
    std::fs::remove_file(&path).unwrap();
    let kinds = [(); 4].map(|()| score(&*gone, "fine", "answer").unwrap_err().kind());
    assert_eq!(kinds, ["start", "start", "unavailable", "unavailable"]);
}
