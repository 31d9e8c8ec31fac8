//! The program: parse the command line, do what it says, report an error once.

mod cli;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let command = cli::Cli::parse();
    // A panic is a defect like `Error::Internal`. The panic hook has said where it was.
    let outcome = std::panic::catch_unwind(|| cli::run(&command)).unwrap_or(Err(cli::Failure::Panic));
    let Err(failure) = outcome else { return ExitCode::SUCCESS };
    if let Some(message) = failure.message() {
        // That standard error is closed as well is no reason to panic.
        let _ = writeln!(std::io::stderr(), "error: {message}");
    }
    ExitCode::from(failure.code())
}
