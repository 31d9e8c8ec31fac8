//! `command`: the user's program judges, over JSON lines (the protocol is in the [parent module](super)).

use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

use super::workers::{Process, Workers};
use super::{BuildError, Failure, Request, Verifier, check_workers, excerpt};

pub(super) struct Command {
    workers: Workers,
    timeout: Duration,
    next_id: AtomicU64,
}

#[derive(Serialize)]
struct Line<'a> {
    id: u64,
    #[serde(flatten)]
    request: Request<'a>,
}

impl Command {
    pub(super) fn start(
        program: &[String],
        timeout_seconds: f64,
        workers: usize,
    ) -> Result<Self, BuildError> {
        if program.first().is_none_or(String::is_empty) {
            return Err(BuildError::NoProgram);
        }
        check_workers(timeout_seconds, workers)?;
        let words = program.to_vec();
        let start = move || {
            let mut command = process::Command::new(&words[0]);
            command.args(&words[1..]);
            Process::start(command, Duration::ZERO)
        };
        let processes = (0..workers).map(|_| start()).collect::<Result<_, _>>();
        let processes =
            processes.map_err(|source| BuildError::Start { program: program[0].clone(), source })?;
        let name = program[0].clone();
        let again =
            move || start().map_err(|e| Failure::Start { program: name.clone(), error: e.to_string() });
        let advice = "it must go on reading requests, and write one line for each";
        Ok(Self {
            workers: Workers::new(&program[0], processes, advice, again),
            timeout: Duration::from_secs_f64(timeout_seconds),
            next_id: AtomicU64::new(0),
        })
    }
}

impl Verifier for Command {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        // Strings, numbers and maps with string keys always serialise.
        let mut line = serde_json::to_vec(&Line { id, request: *request }).expect("a request is plain JSON");
        line.push(b'\n');
        self.workers.judge(|process| {
            let answer = process.ask(&line, self.timeout)?;
            read_answer(id, &answer, process)
        })
    }

    fn extract(&self, _response: &str) -> Option<String> {
        None
    }

    fn notes(&self) -> Vec<String> {
        self.workers.notes()
    }

    fn parallelism(&self) -> usize {
        self.workers.count()
    }
}

fn read_answer(id: u64, line: &str, process: &Process) -> Result<f64, Failure> {
    let protocol = |why: String| Err(process.protocol(line, why));
    let parse = serde_json::from_str::<Map<String, Value>>;
    // Python's json.dumps writes NaN and Infinity, for which JSON has no words.
    let worded = || line.replace("-Infinity", "null").replace("Infinity", "null").replace("NaN", "null");
    let (answer, finite) = match parse(line) {
        Ok(answer) => (answer, true),
        Err(error) => match parse(&worded()) {
            Ok(answer) => (answer, false),
            Err(_) => return protocol(error.to_string()),
        },
    };
    match answer.get("id") {
        Some(found) if found.as_u64() == Some(id) => {}
        Some(found) => return protocol(format!("id {found} answers the request with id {id}")),
        None => return protocol("it names no id".to_owned()),
    }
    let (quoted, stderr) = (excerpt(line), process.said());
    match answer.get("score") {
        None => Err(Failure::NoScore { line: quoted, stderr }),
        Some(Value::Null) if finite => Err(Failure::Missing { line: quoted, stderr }),
        Some(Value::Null) => Err(Failure::Nan { line: quoted, stderr }),
        Some(score) => score.as_f64().map_or_else(|| protocol("the score is no number".to_owned()), Ok),
    }
}
