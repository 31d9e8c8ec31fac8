//! This binary as a child process, for tests that kill one.

use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};

/// Runs this binary again with nothing but the test at the path `test`, which finds `dir` in [`child_dir`] and so knows that
/// it is the process to kill.
pub(crate) fn child(test: &str, dir: &Path) -> (Child, Lines<BufReader<ChildStdout>>) {
    let (_, name) = test.split_once("::").unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env("TEST_CHILD_DIR", dir)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

/// The `dir` of [`child`], in the child.
pub(crate) fn child_dir() -> Option<std::path::PathBuf> {
    std::env::var_os("TEST_CHILD_DIR").map(Into::into)
}

/// The line of a child that `read` understands, past what the test harness prints.
pub(crate) fn wait_for<T>(
    lines: &mut Lines<BufReader<ChildStdout>>,
    read: impl Fn(&str) -> Option<T>,
) -> Option<T> {
    lines.map_while(Result::ok).find_map(|line| read(&line))
}

/// Prints a line at once, for [`wait_for`].
pub(crate) fn say(line: &str) {
    use std::io::Write;
    let mut out = std::io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush()).unwrap();
}
