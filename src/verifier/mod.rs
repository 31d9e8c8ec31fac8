//! Verifiers: text in, score out. They know no device and no model; the `command` verifier's program and the
//! [`pool`]'s threads are all that they touch.
//!
//! A response that is wrong, or in which no answer can be found, scores 0. A [`Failure`] is something else: the
//! verifier could not judge. The two are never mixed, because a failure that counted as 0 would teach the model
//! to avoid whatever broke the verifier.
//!
//! # The protocol of `command`
//!
//! The program is started once per worker and lives on. For each response it reads one line from stdin,
//!
//! ```json
//! {"id": 17, "prompt": "2+2?", "response": "It is 4.", "answer": "4", "task": {"prompt": "2+2?", "answer": "4"}}
//! ```
//!
//! and writes one line to stdout, with the same id: `{"id": 17, "score": 1.0}`. Any finite number is a score; further
//! fields are ignored; `"score": null` says that it cannot judge this response. It gets its next request after it has
//! answered, so it must flush its stdout line by line. Everything else that it has to say belongs on stderr, whose
//! end is quoted when something goes wrong. Blank lines are passed over.
//!
//! Limits: an answer has at most 64 KiB in its line and `timeout_seconds` to come, which for a process's first answer
//! includes its start; a request may be of any length. Of stderr the last 2 KiB are kept, of a line that is quoted the
//! first 200 characters.
//!
//! A program that exceeds `timeout_seconds`, ends, or writes anything else is killed with its whole process group and
//! started anew for the next request. So are all programs when the verifier is dropped. If a process that has
//! answered before ends or breaks the protocol, the request is put once more to a fresh one, so that no response pays
//! for an earlier one; the cause is told once, through [`Verifier::notes`]. A program that has never answered and fails
//! three times in a row, or that can three times in a row not be started, is [`Failure::Unavailable`] from then on; an
//! answer without the field `score` is a failure in this count. A verifier of any kind that could judge none of the
//! first 64 responses, or none of an evaluation's or a whole run's, is [`Failure::Silent`]: the run stops. Programs are
//! not confined in any way: one that runs what the model wrote must bring its own sandbox.
//!
//! # The tasks of `program`
//!
//! A task carries its tests in further fields of its line:
//!
//! - `entry_point`: the name of the function under test.
//! - `tests`: Python that asserts what it returns, by that name, or in a function `check(candidate)`, as HumanEval's do.
//! - `setup`, optional: Python that the tests need beside it, such as imports and helpers. Tests see it whatever the
//!   response defines; with `code = "fenced"` it also stands before the response.
//!
//! With `code = "continuation"` the program is the task's `prompt` (of conversations there is none) and the response behind
//! it. `answer` is not read.
//!
//! A response scores 1 if the tests run to their end without an error and have called the function, else 0: also where it
//! is no program, meets a limit, or ends before it has answered. [`Failure::Task`] is what no response is to blame for:
//! tests or setup that do not compile, lack a name or a module, raise an error in the setup, hand over what cannot be, or never
//! call the function.
//!
//! # What `program` guarantees
//!
//! **Tests run in another process than the program.** The program answers calls over a pipe: arguments go to it and
//! results come back as plain data, which are None, numbers, strings, bytes, lists, tuples, dictionaries, sets, ranges, `Fraction`,
//! `Decimal` and iterators over such, exhausted. What is derived from one of these comes back as that. Any other result, such as an
//! object that is equal to everything, is wrong. An exception comes back as the nearest of Python's own; lists, dictionaries and
//! sets that the function changes are changed in the tests. So whatever a program does to its interpreter, to `assert`,
//! `check`, builtins, frames or exit codes, it does to itself: no process that runs it holds the tests, their expected
//! values, other responses or a descriptor on which a verdict is written. The one way to pass is to give the results
//! that the tests ask for.
//!
//! It is not guaranteed that a response which passes is right beyond its tests, nor that it computes in good faith:
//! it may recognise the arguments of a known test. Tests see no output, no files and no objects of the program.
//!
//! **It is confined**, on Linux (x86-64 or AArch64; in all of them from 5.13 on), in layers that the kernel holds, none of which
//! needs privileges:
//!
//! - Landlock: it reads the interpreter's and the system's libraries, and writes in its directory, nothing else.
//! - Namespaces: it sees no other processes and no network but its own, empty one; all other files are read-only for it, and its
//!   directory is in memory, at most `disk_mb`.
//! - A seccomp filter: it makes no processes (threads it may), sends no signals, opens no sockets, traces nobody, and gains no
//!   rights.
//! - Limits: `timeout_seconds`, `cpu_seconds`, `memory_mb`, file size, 64 open files, 64 threads where there are namespaces, no core
//!   dumps. Its standard streams lead nowhere; its environment and its directory are empty, and the directory goes with it. It
//!   inherits the two pipes on which it answers, and no other descriptor, no capability and no terminal.
//!
//! What the system does not grant is told in [`Verifier::notes`], or refused with `isolation = "required"`. Without
//! namespaces, as in most containers, the other layers hold the same but for the space on disk and the number of threads. A
//! response close to a limit of time may be judged differently another time. Kernels have bugs: who expects
//! attacks, and not the accidents and tricks of a model in training, runs all of it in a virtual machine.
//!
//! Everything that a verdict has started is killed before the next; if the engine is killed, they end, too. Python's hashes
//! are not randomised (unless `interpreter` has -E or -I), and `random` begins in the same state in every verdict.

mod boxed;
mod command;
mod exact;
mod number;
mod numeric;
pub mod pool;
mod program;
mod regex;
mod workers;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use thiserror::Error;

pub use program::{Code, Isolation, ProgramSettings};

/// One response to judge.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Request<'a> {
    /// The prompt as the model saw it, without the turn template.
    pub prompt: &'a str,
    /// What the model wrote.
    pub response: &'a str,
    /// The reference answer of the task.
    pub answer: &'a str,
    /// The task line's whole JSON object, so that a program can use fields that the engine does not know.
    pub task: &'a Map<String, Value>,
}

/// Judges responses. Built by [`build`]; shared by the threads of a [`pool::Pool`].
pub trait Verifier: Send + Sync {
    /// The score of a response: 1 or 0 for the built-in kinds, any finite number for a program's.
    fn score(&self, request: &Request) -> Result<f64, Failure>;

    /// The answer that this verifier reads from a response, normalised so that equal answers are equal strings:
    /// what majority voting and diversity count. `None` where there is none to read, as always for `command` and `program`.
    fn extract(&self, response: &str) -> Option<String>;

    /// What keeps this verifier from judging any response to a task, as words that follow "the task".
    fn check_task(&self, _task: &Map<String, Value>) -> Result<(), String> {
        Ok(())
    }

    /// What it has put up with since it was last asked: deviations from its protocol that cost time or could cost
    /// verdicts, each cause once in its life.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// How many requests are worth judging at once. The built-in kinds take microseconds, so one thread does.
    fn parallelism(&self) -> usize {
        1
    }
}

/// Why a response could not be judged.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum Failure {
    /// The program was too slow. It has been killed and is started again for the next request.
    #[error(
        "the verifier program gave no answer within {seconds} s; make it flush its stdout after each line, make it \
         faster, or raise timeout_seconds{}",
        said(stderr)
    )]
    Timeout {
        /// `timeout_seconds`.
        seconds: f64,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// The program ended, or closed its stdout, instead of answering.
    #[error("the verifier program ended without an answer ({how}){}", said(stderr))]
    Crashed {
        /// Its exit status or signal.
        how: String,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// The program's score is NaN or infinite.
    #[error("the verifier program gave a score that is not finite: {line:?}{}", said(stderr))]
    Nan {
        /// The line it wrote.
        line: String,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// The program answered with the score null: its way to say that it could not judge.
    #[error("the verifier program answered without a score: {line:?}{}", said(stderr))]
    Missing {
        /// The line it wrote.
        line: String,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// The program's answer has no field `score`.
    #[error(
        "the verifier program answered without the field `score`: {line:?}; write {{\"id\": .., \"score\": ..}}, with \
         null where it cannot judge{}",
        said(stderr)
    )]
    NoScore {
        /// The line it wrote.
        line: String,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// The program wrote something other than the answer to the request.
    #[error(
        "the verifier program wrote {line:?} ({why}); write one line {{\"id\": .., \"score\": ..}} per request \
         on stdout and everything else on stderr{}",
        said(stderr)
    )]
    Protocol {
        /// The line it wrote, cut where it is long.
        line: String,
        /// What is wrong with it.
        why: String,
        /// The end of what it wrote on stderr.
        stderr: String,
    },
    /// The program could not be started.
    #[error("cannot start the verifier program {program:?}: {error}")]
    Start {
        /// `program[0]`.
        program: String,
        /// The operating system's words.
        error: String,
    },
    /// The program does not work at all, so requests are no longer sent to it.
    #[error(
        "the verifier program {program:?} does not work: it failed {times} times in a row, at last so: {last}"
    )]
    Unavailable {
        /// `program[0]`.
        program: String,
        /// Number of failures in a row.
        times: u32,
        /// The last of them.
        last: Box<Failure>,
    },
    /// No response has ever been judged, so figures of them mean nothing.
    #[error("none of {times} responses could be judged, the first for this reason: {first}")]
    Silent {
        /// How many were to be judged.
        times: usize,
        /// Why the first could not.
        first: Box<Failure>,
    },
    /// The task's own answer cannot be compared with anything.
    #[error(
        "the task's answer {answer:?} holds no {wanted}; correct the task or choose another verifier kind"
    )]
    Answer {
        /// The answer, cut where it is long.
        answer: String,
        /// What the verifier looked for.
        wanted: &'static str,
    },
    /// The task's own tests cannot be run.
    #[error("{problem}; correct the task")]
    Task {
        /// What is wrong with them.
        problem: String,
    },
}

impl Failure {
    /// A short name, for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Timeout { .. } => "timeout",
            Self::Crashed { .. } => "crashed",
            Self::Nan { .. } => "nan",
            Self::Missing { .. } | Self::NoScore { .. } => "missing",
            Self::Protocol { .. } => "protocol",
            Self::Start { .. } => "start",
            Self::Unavailable { .. } => "unavailable",
            Self::Silent { .. } => "silent",
            Self::Answer { .. } => "answer",
            Self::Task { .. } => "task",
        }
    }
}

fn said(stderr: &str) -> String {
    match stderr.lines().count() {
        0 => String::new(),
        1 => format!("; its stderr ends with: {stderr}"),
        _ => format!("\nits stderr ends with:\n{stderr}"),
    }
}

/// The start of `text`, short enough for an error message.
fn excerpt(text: &str) -> String {
    const MAX_CHARS: usize = 200;
    match text.char_indices().nth(MAX_CHARS) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}

/// Which of several matches in a response is its answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pick {
    /// The first.
    First,
    /// The last: models reason first and conclude last.
    #[default]
    Last,
}

impl Pick {
    fn of<T>(self, mut items: impl Iterator<Item = T>) -> Option<T> {
        match self {
            Self::First => items.next(),
            Self::Last => items.last(),
        }
    }
}

/// The `[verifier]` table of the training configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum VerifierConfig {
    /// The whole response, without surrounding white space, is the answer.
    Exact {
        /// Upper and lower case are the same.
        #[serde(default)]
        case_insensitive: bool,
    },
    /// A number in the response equals the last number of the answer, up to
    /// max(`absolute_tolerance`, `relative_tolerance` x |answer|). Two whole numbers are compared exactly, unless a
    /// tolerance above the default is set.
    Numeric {
        /// Which number of the response.
        #[serde(default)]
        pick: Pick,
        /// 0 unless set.
        #[serde(default)]
        absolute_tolerance: f64,
        /// 1e-12 unless set: rounding of binary fractions.
        #[serde(default = "default_relative_tolerance")]
        relative_tolerance: f64,
    },
    /// The response's last `\boxed{...}` means the same as the answer, judged as graders of MATH do.
    Boxed {
        /// Arithmetic that is left in the box is worked out, as graders of MATH do: `17 \times 23` is 391. false unless
        /// set, in evaluation too: who restates the question has not answered it.
        #[serde(default)]
        evaluate: bool,
    },
    /// What the pattern captures, without surrounding white space, is the answer, or what it captures of the answer;
    /// decimal numbers are compared as numbers.
    Regex {
        /// In the syntax of the regex crate: no look-around, no back-references, linear time.
        pattern: String,
        /// The capture group to compare; 0 is the whole match. Unless set: 1 if the pattern has a group, else 0.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        group: Option<usize>,
        /// Which match of the response.
        #[serde(default)]
        pick: Pick,
    },
    /// A program judges: one JSON object per line in, one out; the
    /// [module](self#the-protocol-of-command) describes the protocol.
    Command {
        /// The program and its arguments. No shell is involved.
        program: Vec<String>,
        /// Seconds that one answer may take; the first answer of a process includes its start. 30 unless set.
        #[serde(default = "default_timeout_seconds")]
        timeout_seconds: f64,
        /// Number of processes. 1 unless set.
        #[serde(default = "default_workers")]
        workers: usize,
    },
    /// A reward model scores the response's tokens, by the probability that it is right. No [`Verifier`]: it takes a device,
    /// and judges above generation.
    Model {
        /// Directory of the reward model, as training with objective `verifier` writes it.
        path: PathBuf,
    },
    /// The tests that a task carries pass on the code in the response, run in confined processes; the
    /// [module](self#the-tasks-of-program) says how tasks carry them and what is guaranteed.
    Program(ProgramSettings),
}

impl VerifierConfig {
    /// The reward model's directory, where it is one.
    pub fn model(&self) -> Option<&Path> {
        match self {
            Self::Model { path } => Some(path),
            _ => None,
        }
    }
}

fn default_relative_tolerance() -> f64 {
    numeric::ROUNDING
}

fn default_timeout_seconds() -> f64 {
    30.0
}

fn default_workers() -> usize {
    1
}

/// Why a configured verifier cannot be built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The pattern is not a regular expression.
    #[error("verifier.pattern: {0}")]
    Pattern(#[source] Box<::regex::Error>),
    /// The pattern has no such group.
    #[error("verifier.group = {group}, but the pattern's groups are 0..={last}")]
    Group {
        /// The group asked for.
        group: usize,
        /// The last one there is.
        last: usize,
    },
    /// A number is out of range.
    #[error("verifier.{name} = {value}: must be {range}")]
    Range {
        /// The field.
        name: &'static str,
        /// Its value.
        value: f64,
        /// The values that are allowed.
        range: &'static str,
    },
    /// No program is named.
    #[error(
        "verifier.program is empty: name the program and its arguments, as in [\"python3\", \"verify.py\"]"
    )]
    NoProgram,
    /// A reward model, which is none of the verifiers that judge text.
    #[error("kind = \"model\" scores tokens on a device, and here texts are to be judged")]
    Model,
    /// The program cannot be started.
    #[error(
        "verifier.program: cannot start {program:?}; check the path, its execute permission and its #! line"
    )]
    Start {
        /// `program[0]`.
        program: String,
        /// The operating system's words.
        source: std::io::Error,
    },
    /// Programs can be confined on Linux alone.
    #[error(
        "verifier.kind = \"program\" needs Linux on x86-64 or AArch64, which this is not; judge by a `command`"
    )]
    Platform,
    /// No interpreter is named.
    #[error("verifier.interpreter is empty: name the interpreter, as in [\"python3\"]")]
    NoInterpreter,
    /// The interpreter does not run the harness.
    #[error("verifier.interpreter: {program:?} cannot judge programs; it must be Python 3.9 or newer")]
    Interpreter {
        /// `interpreter[0]`.
        program: String,
        /// What it did instead.
        source: Box<Failure>,
    },
    /// The system cannot confine programs as `isolation` requires.
    #[error(
        "verifier.isolation = \"required\", and this system does not confine: {what}; allow it to, or set \"best\" and run what \
         models write as it is"
    )]
    Open {
        /// What stays open, and why.
        what: String,
    },
}

/// Refuses limits of processes that are out of range.
fn check_workers(timeout_seconds: f64, workers: usize) -> Result<(), BuildError> {
    let range = |name, value, range| Err(BuildError::Range { name, value, range });
    if !(timeout_seconds > 0.0 && timeout_seconds <= 86_400.0) {
        return range("timeout_seconds", timeout_seconds, "above 0 and at most 86400");
    }
    if !(1..=1024).contains(&workers) {
        return range("workers", workers as f64, "1 to 1024");
    }
    Ok(())
}

/// Builds the verifier that a configuration describes. `command` and `program` start their processes here, so that what
/// cannot be started is known at once and the others load while the model does.
pub fn build(config: &VerifierConfig) -> Result<Box<dyn Verifier>, BuildError> {
    Ok(match config {
        VerifierConfig::Exact { case_insensitive } => {
            Box::new(exact::Exact { case_insensitive: *case_insensitive })
        }
        &VerifierConfig::Numeric { pick, absolute_tolerance, relative_tolerance } => {
            let tolerances =
                [("absolute_tolerance", absolute_tolerance), ("relative_tolerance", relative_tolerance)];
            for (name, value) in tolerances {
                if !(value.is_finite() && value >= 0.0) {
                    return Err(BuildError::Range { name, value, range: "finite and not negative" });
                }
            }
            Box::new(numeric::Numeric { pick, absolute_tolerance, relative_tolerance })
        }
        VerifierConfig::Boxed { evaluate } => Box::new(boxed::Boxed { evaluate: *evaluate }),
        VerifierConfig::Regex { pattern, group, pick } => {
            Box::new(regex::Regex::new(pattern, *group, *pick)?)
        }
        VerifierConfig::Command { program, timeout_seconds, workers } => {
            Box::new(command::Command::start(program, *timeout_seconds, *workers)?)
        }
        VerifierConfig::Model { .. } => return Err(BuildError::Model),
        VerifierConfig::Program(settings) => Box::new(program::Program::start(settings)?),
    })
}
