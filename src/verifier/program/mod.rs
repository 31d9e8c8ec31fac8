//! `program`: a task's tests judge the code in a response, in processes that are confined and thrown away. What that
//! guarantees is in the [parent module](super#what-program-guarantees).
//!
//! `harness.py`, which is part of this program, does it: each worker is an interpreter that has loaded it and forks two
//! processes for each verdict. The filter of system calls that they give themselves is made in [`filter`].

#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
mod filter;

use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::workers::{Process, Workers};
use super::{BuildError, Failure, Request, Verifier, check_workers};

const HARNESS: &str = include_str!("harness.py");
/// What the interpreter is started with: it reads the harness' length as 8 hexadecimal digits, and the harness.
const LOADER: &str = "import os
def read(n):
    parts = b''
    while len(parts) < n:
        part = os.read(0, n - len(parts))
        if not part:
            raise SystemExit('nobody sends the harness')
        parts += part
    return parts
exec(compile(read(int(read(8), 16)), 'harness.py', 'exec'))
";
/// How long an interpreter may take to start.
const START: Duration = Duration::from_secs(60);
/// What the harness may take beyond the time of a verdict, which it bounds itself: half of it to begin.
const BEYOND: Duration = Duration::from_secs(60);
/// How long the harness gets to remove its directory.
const PARTING: Duration = Duration::from_secs(5);
/// Open files of a program, of which three are taken.
const FILES: u64 = 64;
/// Threads of all processes of a verdict.
const THREADS: u64 = 66;

/// Where the program stands in a response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The response goes on where the task's prompt ends, which is code.
    #[default]
    Continuation,
    /// The response's first fenced block of Python; without one its first fenced block, without any all of it.
    Fenced,
}

/// What happens on a system that cannot confine programs as told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// They are confined as far as the system can, and a note says what is left open.
    #[default]
    Best,
    /// The verifier is refused.
    Required,
}

/// The settings of `program`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProgramSettings {
    /// Python 3.9 or newer, and arguments for it. `["python3"]` unless set.
    pub interpreter: Vec<String>,
    /// Where the program stands in a response.
    pub code: Code,
    /// Seconds that a response's tests may take in all. 10 unless set.
    pub timeout_seconds: f64,
    /// Seconds of processor time that the program may take, and the tests. 5 unless set.
    pub cpu_seconds: u64,
    /// Address space of the program, and of the tests, in MiB, the interpreter's included. 512 unless set.
    pub memory_mb: u64,
    /// What the program may write to its directory in MiB. 16 unless set.
    pub disk_mb: u64,
    /// Number of responses that are judged at once. 1 unless set.
    pub workers: usize,
    /// What happens on a system that cannot confine programs as told.
    pub isolation: Isolation,
}

impl Default for ProgramSettings {
    fn default() -> Self {
        Self {
            interpreter: vec!["python3".to_owned()],
            code: Code::default(),
            timeout_seconds: 10.0,
            cpu_seconds: 5,
            memory_mb: 512,
            disk_mb: 16,
            workers: 1,
            isolation: Isolation::default(),
        }
    }
}

pub(super) struct Program {
    workers: Workers,
    code: Code,
    timeout: Duration,
    /// What is not confined here, until somebody asks.
    untold: Mutex<Option<String>>,
}

/// What a task says of its tests.
#[derive(Debug, Serialize)]
struct Exam<'a> {
    setup: &'a str,
    tests: &'a str,
    entry_point: &'a str,
}

#[derive(Serialize)]
struct Solution<'a> {
    source: String,
    entry_point: &'a str,
}

/// The harness' first line.
#[derive(Deserialize)]
struct Ready {
    ready: bool,
    /// What could not be confined, and why.
    open: Vec<[String; 2]>,
}

/// Its line for each response.
#[derive(Deserialize)]
#[serde(tag = "verdict", rename_all = "kebab-case")]
enum Verdict {
    Pass,
    Fail,
    Unjudged { why: String },
}

impl Program {
    pub(super) fn start(settings: &ProgramSettings) -> Result<Self, BuildError> {
        let &ProgramSettings { timeout_seconds, cpu_seconds, memory_mb, disk_mb, workers, .. } = settings;
        let Some(program) = settings.interpreter.first().filter(|word| !word.is_empty()) else {
            return Err(BuildError::NoInterpreter);
        };
        check_workers(timeout_seconds, workers)?;
        for (name, value, bounds, range) in [
            ("cpu_seconds", cpu_seconds, 1..=86_400, "1 to 86400"),
            ("memory_mb", memory_mb, 64..=1 << 20, "64 to 1048576"),
            ("disk_mb", disk_mb, 1..=1 << 20, "1 to 1048576"),
        ] {
            if !bounds.contains(&value) {
                return Err(BuildError::Range { name, value: value as f64, range });
            }
        }
        let Some(kernel) = kernel() else { return Err(BuildError::Platform) };
        let told = json!({
            "timeout": timeout_seconds,
            "cpu": cpu_seconds,
            "memory": memory_mb << 20,
            "disk": disk_mb << 20,
            "files": FILES,
            "threads": THREADS,
            "kernel": kernel,
        });
        let words = settings.interpreter.to_vec();
        let start = move || {
            let mut command = Command::new(&words[0]);
            // No site of the user's, no files beside modules. The order of sets is part of a program's result.
            command.args(&words[1..]).args(["-s", "-B", "-c", LOADER]).env_clear();
            command.env("PYTHONHASHSEED", "0").env("LC_ALL", "C.UTF-8").env("PYTHONUTF8", "1");
            if let Some(path) = std::env::var_os("PATH") {
                command.env("PATH", path);
            }
            if let Some(place) = std::env::var_os("TMPDIR") {
                command.env("TMPDIR", place);
            }
            Process::start(command, PARTING)
        };
        // All of them load while the first is waited for.
        let processes = (0..workers).map(|_| start()).collect::<Result<Vec<_>, _>>();
        let mut processes =
            processes.map_err(|source| BuildError::Start { program: program.clone(), source })?;
        let told = told.to_string();
        let hello = format!("{:08x}{HARNESS}{:08x}{told}", HARNESS.len(), told.len()).into_bytes();
        let mut open = Vec::new();
        for process in &mut processes {
            let unusable =
                |source| BuildError::Interpreter { program: program.clone(), source: Box::new(source) };
            open = greet(process, &hello).map_err(unusable)?;
        }
        let untold = match (open.is_empty(), settings.isolation) {
            (true, _) => None,
            (false, Isolation::Required) => return Err(BuildError::Open { what: list(&open) }),
            (false, Isolation::Best) => Some(format!(
                "what models write is run here without all of its confinement; not confined: {}. isolation = \"required\" \
                 refuses that",
                list(&open)
            )),
        };
        let name = program.clone();
        let again = move || {
            let mut process =
                start().map_err(|e| Failure::Start { program: name.clone(), error: e.to_string() })?;
            greet(&mut process, &hello)?;
            Ok(process)
        };
        let advice = "the system may have killed it for want of memory";
        Ok(Self {
            workers: Workers::new(program, processes, advice, again),
            code: settings.code,
            timeout: Duration::from_secs_f64(timeout_seconds) + BEYOND,
            untold: Mutex::new(untold),
        })
    }

    /// The exam of a task and the program that a response makes.
    fn read<'a>(
        &self,
        task: &'a Map<String, Value>,
        response: &str,
    ) -> Result<(Exam<'a>, Solution<'a>), String> {
        let exam = exam(task)?;
        let source = match self.code {
            Code::Continuation => text(task, "prompt")?
                .ok_or("has no field `prompt`, which the response goes on from; with `messages` set code = \"fenced\"")?
                .to_owned()
                + response,
            Code::Fenced => format!("{}\n{}", exam.setup, fenced(response)),
        };
        let solution = Solution { source, entry_point: exam.entry_point };
        Ok((exam, solution))
    }
}

/// What the harness must know of the kernel's interface: filters of system calls and numbers of such. `None` where programs
/// cannot be confined.
fn kernel() -> Option<Value> {
    #[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]
    return Some(json!({
        "filter": filter::filter(false),
        "filter_alone": filter::filter(true),
        "capset": libc::SYS_capset,
        "mount_setattr": libc::SYS_mount_setattr,
        "landlock_create_ruleset": libc::SYS_landlock_create_ruleset,
        "landlock_add_rule": libc::SYS_landlock_add_rule,
        "landlock_restrict_self": libc::SYS_landlock_restrict_self,
    }));
    #[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
    None
}

/// Sends the harness and its settings, and waits until they are loaded; returns what it cannot confine.
fn greet(process: &mut Process, hello: &[u8]) -> Result<Vec<[String; 2]>, Failure> {
    let line = process.ask(hello, START).map_err(|failure| in_time(failure, process))?;
    match serde_json::from_str(&line) {
        Ok(Ready { ready: true, open }) => Ok(open),
        Ok(_) => Err(process.protocol(&line, "the harness is not ready".to_owned())),
        Err(error) => Err(process.protocol(&line, error.to_string())),
    }
}

/// A harness that does not answer is no program that is too slow: it has a limit for that.
fn in_time(failure: Failure, process: &Process) -> Failure {
    match failure {
        Failure::Timeout { seconds, .. } => process.crashed(&format!("it was silent for {seconds} s")),
        failure => failure,
    }
}

fn list(open: &[[String; 2]]) -> String {
    open.iter().map(|[what, why]| format!("{what} ({why})")).collect::<Vec<_>>().join(", ")
}

/// A field that is a text, if it is there.
fn text<'a>(task: &'a Map<String, Value>, field: &str) -> Result<Option<&'a str>, String> {
    match task.get(field) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("its field `{field}` is no string")),
    }
}

fn exam(task: &Map<String, Value>) -> Result<Exam<'_>, String> {
    let needed = |field: &str, what: &str| {
        text(task, field)?
            .filter(|text| !text.trim().is_empty())
            .ok_or_else(|| format!("has no field `{field}`: {what}"))
    };
    let tests = needed("tests", "Python code with assertions on the function, or with check(candidate)")?;
    let entry_point = needed("entry_point", "the name of the function that the tests call")?;
    let name = |c: char| c == '_' || c.is_alphanumeric();
    if !entry_point.chars().all(name) || entry_point.starts_with(|c: char| c.is_numeric()) {
        return Err(format!("its field `entry_point` is {entry_point:?}, which is no name of a function"));
    }
    Ok(Exam { setup: text(task, "setup")?.unwrap_or(""), tests, entry_point })
}

/// The first fenced block of Python in a text, or else its first fenced block, or else the text.
fn fenced(response: &str) -> String {
    let mut blocks: Vec<(String, String)> = Vec::new();
    let mut open: Option<(&str, Vec<&str>, String)> = None;
    for line in response.lines() {
        let bare = line.trim_start();
        let ticks = &bare[..bare.len() - bare.trim_start_matches('`').len()];
        match &mut open {
            None if ticks.len() >= 3 => {
                let language = bare[ticks.len()..].trim().to_lowercase();
                open = Some((ticks, Vec::new(), language));
            }
            None => {}
            Some((fence, lines, language)) if ticks.len() >= fence.len() && bare.trim_end() == ticks => {
                blocks.push((std::mem::take(language), lines.join("\n")));
                open = None;
            }
            Some((_, lines, _)) => lines.push(line),
        }
    }
    // A response that was cut has no closing fence.
    blocks.extend(open.map(|(_, lines, language)| (language, lines.join("\n"))));
    let python = |(language, _): &&(String, String)| {
        matches!(language.split(|c: char| !c.is_alphanumeric()).next(), Some("python" | "python3" | "py"))
    };
    let block = blocks.iter().find(python).or(blocks.first());
    block.map_or(response, |(_, code)| code).to_owned()
}

impl Verifier for Program {
    fn score(&self, request: &Request) -> Result<f64, Failure> {
        let parts = self.read(request.task, request.response);
        let (exam, solution) =
            parts.map_err(|problem| Failure::Task { problem: format!("the task {problem}") })?;
        // Structs of strings always serialise.
        let solution = serde_json::to_vec(&solution).expect("plain JSON");
        let exam = serde_json::to_vec(&exam).expect("plain JSON");
        let mut bytes = format!("{:08x}{:08x}", solution.len(), exam.len()).into_bytes();
        bytes.extend_from_slice(&solution);
        bytes.extend_from_slice(&exam);
        self.workers.judge(|process| {
            let line = process.ask(&bytes, self.timeout).map_err(|failure| in_time(failure, process))?;
            match serde_json::from_str(&line) {
                Ok(Verdict::Pass) => Ok(1.0),
                Ok(Verdict::Fail) => Ok(0.0),
                Ok(Verdict::Unjudged { why }) => Err(Failure::Task { problem: why }),
                Err(error) => Err(process.protocol(&line, error.to_string())),
            }
        })
    }

    fn extract(&self, _response: &str) -> Option<String> {
        None
    }

    fn check_task(&self, task: &Map<String, Value>) -> Result<(), String> {
        self.read(task, "").map(drop)
    }

    fn notes(&self) -> Vec<String> {
        let untold = self.untold.lock().unwrap_or_else(PoisonError::into_inner).take();
        untold.into_iter().chain(self.workers.notes()).collect()
    }

    fn parallelism(&self) -> usize {
        self.workers.count()
    }
}

#[cfg(test)]
mod tests {
    use super::fenced;

    #[test]
    fn a_fenced_program_is_found() {
        for (response, code) in [
            ("def f(): pass", "def f(): pass"),
            ("Sure:\n```python\ndef f(): pass\n```\nIt is right.", "def f(): pass"),
            ("```\nfirst\n```\n```py\nsecond\n```\n```python\nthird\n```", "second"),
            ("```sh\npip\n```\n```\nplain\n```", "pip"),
            ("```python\ncut = 1\n", "cut = 1"),
            ("````Python3 title=x\na = '''\n```\n'''\n````", "a = '''\n```\n'''"),
            ("  ```python\n  x\n  ```", "  x"),
            ("`inline` and ``more``", "`inline` and ``more``"),
            ("```python\n```\n", ""),
            ("", ""),
        ] {
            assert_eq!(fenced(response), code, "{response:?}");
        }
    }
}
