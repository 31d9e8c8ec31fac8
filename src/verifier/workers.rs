//! Programs that judge: a process per worker, asked over its pipes, and what happens when one does not answer.
//!
//! A process has one request in flight, so that a timeout or a crash is the fault of exactly one response, and all
//! its pipes are non-blocking and polled under one deadline, so that nothing it does or leaves undone (not reading,
//! not writing, writing without end, leaving children that hold its pipes) can block us or leave a thread behind.
//! It leads a process group of its own, which is killed as a whole.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, waitid};

use super::{Failure, excerpt};

/// Failures in a row that prove that the program does not work.
const HOPELESS: u32 = 3;
/// The longest line that can be an answer, in bytes.
const MAX_LINE_BYTES: usize = 64 << 10;
/// How much of the end of stderr is kept for messages, in bytes.
const STDERR_KEPT: usize = 2 << 10;
/// How long a program that closed its stdout gets to exit, so that its exit status can be told.
const EXIT_GRACE: Duration = Duration::from_millis(200);

/// Processes of one program, and the state of its health.
pub(super) struct Workers {
    program: String,
    start: Box<dyn Fn() -> Result<Process, Failure> + Send + Sync>,
    /// What a program must do so that its processes live on.
    advice: &'static str,
    count: usize,
    /// One slot per worker that is not in use; `None` is a process still to be started.
    idle: Mutex<Vec<Option<Process>>>,
    returned: Condvar,
    health: Mutex<Health>,
    notes: Mutex<Notes>,
}

/// What was put up with: the causes, and the sentences that nobody has taken yet.
#[derive(Default)]
struct Notes {
    causes: BTreeSet<&'static str>,
    untold: Vec<String>,
}

/// Tells a program that does not work from one that some responses break.
#[derive(Default)]
struct Health {
    /// It has answered a request: from now on only failures to start count.
    proven: bool,
    failures_in_a_row: u32,
    hopeless: Option<Failure>,
}

impl Workers {
    /// Takes over the processes that `start` makes more of, where one must be replaced. `program` is its name.
    pub(super) fn new(
        program: &str,
        processes: Vec<Process>,
        advice: &'static str,
        start: impl Fn() -> Result<Process, Failure> + Send + Sync + 'static,
    ) -> Self {
        Self {
            program: program.to_owned(),
            start: Box::new(start),
            advice,
            count: processes.len(),
            idle: Mutex::new(processes.into_iter().map(Some).collect()),
            returned: Condvar::new(),
            health: Mutex::default(),
            notes: Mutex::default(),
        }
    }

    /// The number of processes.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// What was put up with since the last call.
    pub(super) fn notes(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.notes).untold)
    }

    /// Waits for a process and has `ask` put a request to it, a second time to a fresh one where that is fair.
    pub(super) fn judge(&self, ask: impl Fn(&mut Process) -> Result<f64, Failure>) -> Result<f64, Failure> {
        let no_slot = |idle: &mut Vec<_>| idle.is_empty();
        let idle = self.returned.wait_while(lock(&self.idle), no_slot);
        let mut slot = idle.unwrap_or_else(PoisonError::into_inner).pop().expect("waited for a slot");
        // A process that has answered before may have died of, or still be talking about, an earlier request.
        // Only what happens to a fresh process is this request's doing.
        let used = slot.as_ref().is_some_and(|process| process.answered);
        let mut result = self.attempt(&mut slot, &ask);
        if let (true, Err(failure @ (Failure::Crashed { .. } | Failure::Protocol { .. }))) = (used, &result) {
            self.note_restart(failure);
            result = self.attempt(&mut slot, &ask);
        }
        lock(&self.idle).push(slot);
        self.returned.notify_one();
        result
    }

    /// Puts a request to the process in `slot`, starting it if need be; leaves the slot empty if the process is
    /// no longer in step with us.
    fn attempt(
        &self,
        slot: &mut Option<Process>,
        ask: &impl Fn(&mut Process) -> Result<f64, Failure>,
    ) -> Result<f64, Failure> {
        if let Some(failure) = &lock(&self.health).hopeless {
            return Err(failure.clone());
        }
        let started = slot.take().map_or_else(&self.start, Ok);
        let result = started.and_then(|mut process| {
            let result = ask(&mut process);
            if answered(&result) {
                process.answered = true;
                *slot = Some(process);
            }
            result
        });
        self.note(&result)
    }

    /// Notes that a process that had answered before was replaced, the first time for each kind of cause.
    fn note_restart(&self, failure: &Failure) {
        let mut notes = lock(&self.notes);
        if notes.causes.insert(failure.kind()) {
            notes.untold.push(format!(
                "a verifier process that had answered before was started anew, and its request put once more, which \
                 takes time; {}. The first time: {failure}",
                self.advice
            ));
        }
    }

    /// Counts failures in a row; the one that proves the program hopeless is replaced by that news.
    fn note(&self, result: &Result<f64, Failure>) -> Result<f64, Failure> {
        let mut health = lock(&self.health);
        match result {
            Ok(_) | Err(Failure::Nan { .. } | Failure::Missing { .. } | Failure::Task { .. }) => {
                health.proven = true;
                health.failures_in_a_row = 0;
            }
            Err(failure) if !health.proven || matches!(failure, Failure::Start { .. }) => {
                health.failures_in_a_row += 1;
                if health.failures_in_a_row >= HOPELESS {
                    let (program, times) = (self.program.clone(), health.failures_in_a_row);
                    let last = Box::new(failure.clone());
                    let unavailable = Failure::Unavailable { program, times, last };
                    return Err(health.hopeless.get_or_insert(unavailable).clone());
                }
            }
            Err(_) => {}
        }
        result.clone()
    }
}

/// Whether a process has answered its request and is ready for the next.
fn answered(result: &Result<f64, Failure>) -> bool {
    use Failure::{Missing, Nan, NoScore, Task};
    matches!(result, Ok(_) | Err(Nan { .. } | Missing { .. } | NoScore { .. } | Task { .. }))
}

/// Nothing panics while it holds one of our locks, and if it did, the data would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running program, the leader of its process group.
pub(super) struct Process {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    stderr: Option<ChildStderr>,
    /// What it wrote on stdout and nobody took yet.
    output: Vec<u8>,
    /// The end of what it wrote on stderr.
    complaints: Vec<u8>,
    answered: bool,
    /// How long it gets to end by itself once nothing more will be asked.
    parting: Duration,
}

impl Process {
    /// Starts a program that is killed when it is no longer needed, or `parting` after its stdin was closed.
    pub(super) fn start(mut command: Command, parting: Duration) -> io::Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take();
        let process = Self {
            child,
            stdin,
            stdout,
            stderr,
            output: Vec::new(),
            complaints: Vec::new(),
            answered: false,
            parting,
        };
        // From here on, an error drops the process and so kills it.
        rustix::io::ioctl_fionbio(&process.stdout, true)?;
        if let (Some(stdin), Some(stderr)) = (&process.stdin, &process.stderr) {
            rustix::io::ioctl_fionbio(stdin, true)?;
            rustix::io::ioctl_fionbio(stderr, true)?;
        }
        Ok(process)
    }

    /// Sends bytes and returns the next line of its stdout.
    pub(super) fn ask(&mut self, line: &[u8], timeout: Duration) -> Result<String, Failure> {
        let deadline = Instant::now() + timeout;
        let mut unsent = line;
        loop {
            let blank = self.output.iter().take_while(|c| c.is_ascii_whitespace()).count();
            self.output.drain(..blank);
            let end = self.output.iter().position(|&c| c == b'\n');
            if end.unwrap_or(self.output.len()) > MAX_LINE_BYTES {
                let start = String::from_utf8_lossy(&self.output[..MAX_LINE_BYTES]).into_owned();
                return Err(self.protocol(&start, format!("a line of more than {MAX_LINE_BYTES} bytes")));
            }
            if let Some(end) = end {
                let answer = String::from_utf8_lossy(&self.output[..end]).into_owned();
                self.output.drain(..=end);
                return Ok(answer);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // A child that outlives the program can hold its stdout open.
                if self.exited().is_some() {
                    return Err(self.ended());
                }
                return Err(Failure::Timeout { seconds: timeout.as_secs_f64(), stderr: self.said() });
            }
            let read = self.exchange(&mut unsent, left).map_err(|e| self.crashed(&e.to_string()))?;
            if read == Some(0) {
                return Err(self.ended());
            }
            // One that has answered waits for nothing else; a fresh one may answer without reading to the end.
            if self.answered && self.stdin.is_none() && !unsent.is_empty() {
                return Err(self.crashed("it closed its stdin and runs on"));
            }
        }
    }

    /// Waits up to `left` until a pipe is ready and moves what it takes. Returns how much came from stdout: 0 at its
    /// end, `None` if nothing was ready.
    fn exchange(&mut self, unsent: &mut &[u8], left: Duration) -> io::Result<Option<usize>> {
        let waiting = PollFlags::IN;
        let mut fds = vec![PollFd::new(&self.stdout, waiting)];
        fds.extend(self.stderr.iter().map(|pipe| PollFd::new(pipe, waiting)));
        if !unsent.is_empty() {
            fds.extend(self.stdin.iter().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        }
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        drop(fds);

        // The pipes do not block, so each can simply be tried.
        self.listen()?;
        if let (Some(stdin), false) = (&mut self.stdin, unsent.is_empty()) {
            match stdin.write(unsent) {
                Ok(sent) => *unsent = &unsent[sent..],
                Err(error) if not_yet(&error) => {}
                // It reads no more; it may still answer.
                Err(_) => self.stdin = None,
            }
        }
        let mut chunk = [0; 16 << 10];
        match self.stdout.read(&mut chunk) {
            Ok(read) => {
                self.output.extend_from_slice(&chunk[..read]);
                Ok(Some(read))
            }
            Err(error) if not_yet(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes one chunk of stderr, if there is one.
    fn listen(&mut self) -> io::Result<()> {
        let Some(stderr) = &mut self.stderr else { return Ok(()) };
        let mut chunk = [0; 16 << 10];
        match stderr.read(&mut chunk) {
            Ok(0) => self.stderr = None,
            Ok(read) => {
                self.complaints.extend_from_slice(&chunk[..read]);
                let excess = self.complaints.len().saturating_sub(STDERR_KEPT);
                self.complaints.drain(..excess);
            }
            Err(error) if not_yet(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The end of its stderr, whole lines where there are several.
    pub(super) fn said(&self) -> String {
        let text = String::from_utf8_lossy(&self.complaints);
        let cut = if self.complaints.len() < STDERR_KEPT { 0 } else { text.find('\n').map_or(0, |i| i + 1) };
        text[cut..].trim().to_owned()
    }

    pub(super) fn protocol(&self, line: &str, why: String) -> Failure {
        Failure::Protocol { line: excerpt(line), why, stderr: self.said() }
    }

    pub(super) fn crashed(&self, how: &str) -> Failure {
        Failure::Crashed { how: how.to_owned(), stderr: self.said() }
    }

    /// The failure of a program that closed its stdout: with its exit status, if it exits, and its last words.
    fn ended(&mut self) -> Failure {
        let give_up = Instant::now() + EXIT_GRACE;
        let status = loop {
            match self.exited() {
                Some(status) => break Some(status),
                None if Instant::now() > give_up => break None,
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        // The pipe holds no more than this many chunks, and nobody waits for a flood.
        for _ in 0..8 {
            if self.listen().is_err() {
                break;
            }
        }
        let how = match status {
            None => "it closed its stdout and runs on".to_owned(),
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(signal)) => format!("killed by signal {signal}"),
                (None, None) => "stopped".to_owned(),
            },
        };
        self.crashed(&how)
    }

    /// Whether it has exited, without reaping it: its process id must stay its own until the group is killed.
    fn exited(&self) -> Option<WaitIdStatus> {
        let peek = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(Pid::from_child(&self.child)), peek).ok().flatten()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stdin = None;
        let give_up = Instant::now() + self.parting;
        while Instant::now() < give_up && self.exited().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        // It fails only where nobody is left to kill.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

fn not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
