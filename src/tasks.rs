//! Tasks: JSON lines with a `prompt` (or `messages`, a conversation that ends with one), its `answer` and whatever else the
//! verifier reads, and the order in which training draws them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::chat::{Message, Role};
use crate::checkpoint::without_bom;
use crate::rng::{Domain, Stream};

/// One problem.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// The text put to the model; not blank. Of a conversation, the user's last turn.
    pub prompt: String,
    /// The turns of a conversation before that.
    pub history: Vec<Message>,
    /// What a right response amounts to; not blank. A number in the file becomes its decimal text.
    pub answer: String,
    /// The line of the file, counted from 1.
    pub line: usize,
    /// The whole line, for verifiers that read further fields.
    pub fields: Arc<Map<String, Value>>,
}

impl Task {
    /// The expert response that `sft` and `bon-sft` imitate: the field `response`, or else the answer.
    pub fn response(&self) -> &str {
        self.fields.get("response").and_then(Value::as_str).unwrap_or(&self.answer)
    }
}

/// A task file in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Tasks {
    /// In the order of the file; never empty.
    pub list: Vec<Task>,
    /// CRC-32C of the file's bytes: a run resumes on the data that it began with.
    pub fingerprint: u32,
}

/// Why a task file cannot be used.
#[derive(Debug, Error)]
pub enum TaskError {
    /// The file cannot be read.
    #[error("cannot read the tasks in {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No line holds a task.
    #[error(
        "{path}: no tasks; each line must be a JSON object such as {{\"prompt\": \"2+2=\", \"answer\": \"4\"}}"
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line cannot be used.
    #[error("{path}:{line}: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: LineProblem,
    },
}

/// What is wrong with one line.
#[derive(Debug, Error)]
pub enum LineProblem {
    /// Bytes that are no text.
    #[error("not UTF-8 at byte {0} of the line; save the file as UTF-8")]
    Encoding(usize),
    /// Text that is no JSON.
    #[error("not JSON: {0}; write one whole object per line")]
    Syntax(serde_json::Error),
    /// JSON of another type.
    #[error("{0}, where an object with `prompt` and `answer` must stand")]
    NotAnObject(&'static str),
    /// A field that every task has.
    #[error("field `{0}` is missing")]
    Missing(&'static str),
    /// A field of another type.
    #[error("field `{field}` is {found}; it must be {expected}")]
    Type {
        /// The field.
        field: &'static str,
        /// What stands there.
        found: &'static str,
        /// What may stand there.
        expected: &'static str,
    },
    /// A field with nothing but white space in it.
    #[error("field `{0}` is blank")]
    Blank(&'static str),
    /// Two fields of which a task has one.
    #[error("fields `prompt` and `messages`: a task has one of them")]
    Twice,
    /// A conversation that is none.
    #[error("field `messages`: {0}")]
    Messages(String),
    /// A number that JSON readers round.
    #[error("field `answer`: {0} is too large to be read exactly; write it as a string")]
    Inexact(f64),
}

impl Tasks {
    /// Reads a task file. Blank lines are passed over; anything else that is no task is an error that names its line.
    pub fn read(path: &Path) -> Result<Self, TaskError> {
        Self::read_with(path, true)
    }

    /// The same of tasks that need no `answer`, because what is made of them was judged before: without one it is empty.
    pub fn read_judged(path: &Path) -> Result<Self, TaskError> {
        Self::read_with(path, false)
    }

    fn read_with(path: &Path, answers: bool) -> Result<Self, TaskError> {
        let bytes = fs::read(path).map_err(|source| TaskError::Read { path: path.into(), source })?;
        let mut list = Vec::new();
        for (i, line) in task_lines(&bytes) {
            let task = parse_line(i, line, answers).map_err(|problem| TaskError::Line {
                path: path.into(),
                line: i,
                problem,
            })?;
            list.push(task);
        }
        if list.is_empty() {
            return Err(TaskError::Empty { path: path.into() });
        }
        Ok(Self { list, fingerprint: crc32c::crc32c(&bytes) })
    }

    /// What reports of evaluations call the tasks, in their order.
    pub fn problem_ids(&self) -> Vec<String> {
        self.list.iter().enumerate().map(|(i, task)| format!("{}: {}", i + 1, task.prompt)).collect()
    }

    /// The tasks of which `keep`, given a task's index, is true; `None` if there is none. Their fingerprint is that of the
    /// file and of the choice.
    pub fn filtered(self, keep: impl Fn(usize) -> bool) -> Option<Self> {
        let kept = self.list.into_iter().enumerate().filter(|(index, _)| keep(*index));
        let list: Vec<Task> = kept.map(|(_, task)| task).collect();
        let lines = list.iter().map(|task| (task.line as u64).to_le_bytes());
        let fingerprint = lines.fold(self.fingerprint, |crc, line| crc32c::crc32c_append(crc, &line));
        (!list.is_empty()).then_some(Self { list, fingerprint })
    }
}

/// The lines of a task file that are not blank, without byte order marks (joined files have them in the middle), and
/// their numbers from 1.
fn task_lines(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let lines = bytes.split(|&b| b == b'\n').map(without_bom).enumerate();
    lines.filter(|(_, line)| !line.trim_ascii().is_empty()).map(|(i, line)| (i + 1, line))
}

fn parse_line(number: usize, line: &[u8], answers: bool) -> Result<Task, LineProblem> {
    let text = str::from_utf8(line).map_err(|e| LineProblem::Encoding(e.valid_up_to() + 1))?;
    let mut fields = match serde_json::from_str(text).map_err(LineProblem::Syntax)? {
        Value::Object(fields) => fields,
        other => return Err(LineProblem::NotAnObject(kind(&other))),
    };
    // Converters of tables carry the mark of their source into its first field.
    for (_, value) in &mut fields {
        if let Value::String(text) = value
            && let Some(rest) = text.strip_prefix('\u{feff}')
        {
            *text = rest.to_owned();
        }
    }
    let (prompt, history) = match (fields.get("prompt"), fields.get("messages")) {
        (Some(_), Some(_)) => return Err(LineProblem::Twice),
        (Some(Value::String(s)), None) => (s.clone(), Vec::new()),
        (Some(other), None) => return Err(wrong_type("prompt", other, "a string")),
        (None, Some(messages)) => conversation(messages)?,
        (None, None) => return Err(LineProblem::Missing("prompt")),
    };
    let answer = match fields.get("answer") {
        None if answers => return Err(LineProblem::Missing("answer")),
        None => String::new(),
        Some(Value::String(s)) => s.clone(),
        Some(Value::Number(n)) => match n.as_f64() {
            // Integers are exact up to 64 bits; the rest are f64, which skips integers above 2^53.
            Some(x) if n.is_f64() && x.abs() >= (1u64 << 53) as f64 => return Err(LineProblem::Inexact(x)),
            _ => n.to_string(),
        },
        Some(other) => return Err(wrong_type("answer", other, "a string or a number")),
    };
    for (field, text) in [("prompt", &prompt), ("answer", &answer)] {
        if text.trim().is_empty() && (field == "prompt" || answers) {
            return Err(LineProblem::Blank(field));
        }
    }
    match fields.get("response") {
        None => {}
        Some(Value::String(s)) if s.trim().is_empty() => return Err(LineProblem::Blank("response")),
        Some(Value::String(_)) => {}
        Some(other) => return Err(wrong_type("response", other, "a string")),
    }
    Ok(Task { prompt, history, answer, line: number, fields: Arc::new(fields) })
}

/// The user's last turn, and what came before it.
fn conversation(messages: &Value) -> Result<(String, Vec<Message>), LineProblem> {
    let bad = |problem: &str| LineProblem::Messages(problem.to_owned());
    let mut messages: Vec<Message> = Vec::deserialize(messages)
        .map_err(|e| bad(&format!("{e}; each is {{\"role\": \"user\", \"content\": \"...\"}}")))?;
    if messages.iter().any(|message| message.content.trim().is_empty()) {
        return Err(bad("a turn is blank"));
    }
    if messages.iter().skip(1).any(|message| message.role == Role::System) {
        return Err(bad("`system` speaks first or not at all"));
    }
    match messages.pop() {
        Some(Message { role: Role::User, content }) => Ok((content, messages)),
        _ => Err(bad("the last turn must be the user's: the model answers it")),
    }
}

fn wrong_type(field: &'static str, value: &Value, expected: &'static str) -> LineProblem {
    LineProblem::Type { field, found: kind(value), expected }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The order of training: epoch after epoch, each a permutation of all tasks that depends on the seed and the
/// epoch's number alone. A place in the data is therefore one integer, the number of tasks drawn so far.
#[derive(Debug, Clone)]
pub struct Order {
    seed: u64,
    domain: Domain,
    epoch: u64,
    permutation: Vec<usize>,
}

impl Order {
    /// An order over `tasks` tasks. Panics if there are none.
    pub fn new(tasks: usize, seed: u64) -> Self {
        Self::of(Domain::Shuffle, tasks, seed)
    }

    /// The order, unlike that one, in which tasks take the place of others within a step.
    pub fn refills(tasks: usize, seed: u64) -> Self {
        Self::of(Domain::Refill, tasks, seed)
    }

    fn of(domain: Domain, tasks: usize, seed: u64) -> Self {
        assert!(tasks > 0, "an order needs a task");
        Self { seed, domain, epoch: 0, permutation: permutation(tasks, seed, domain, 0) }
    }

    /// The index of the task that draw `position` (0, 1, 2, ...) takes.
    pub fn task(&mut self, position: u64) -> usize {
        let tasks = self.permutation.len();
        let epoch = position / tasks as u64;
        if epoch != self.epoch {
            self.permutation = permutation(tasks, self.seed, self.domain, epoch);
            self.epoch = epoch;
        }
        self.permutation[(position % tasks as u64) as usize]
    }
}

fn permutation(tasks: usize, seed: u64, domain: Domain, epoch: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..tasks).collect();
    Stream::new(seed, domain, epoch).shuffle(&mut order);
    order
}
