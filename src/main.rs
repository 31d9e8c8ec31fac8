//! The program: parse, run, report an error once.

use std::io::Write;
use std::process::ExitCode;

use bon_engine::cli::{Cli, run};
use clap::Parser;
use libmimalloc_sys::{mi_option_set, mi_option_t};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// `mi_option_purge_delay` of mimalloc.h: after how many milliseconds freed memory goes back to the system; -1 is never.
const PURGE_DELAY: mi_option_t = 15;

fn main() -> ExitCode {
    keep_memory();
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of our output has gone: that is how `| head` says thank you.
        Err(e) if is_broken_pipe(&e) => ExitCode::SUCCESS,
        Err(e) => {
            let chain: Vec<String> = e.chain().map(ToString::to_string).collect();
            // That standard error is closed as well is no reason to panic.
            let _ = writeln!(std::io::stderr(), "error: {}", chain.join(": "));
            ExitCode::FAILURE
        }
    }
}

/// Keeps memory that is freed, because every step of training and sampling asks for as much again, and the system clears each
/// page before it gives it: of a training step on the CPU that took a quarter.
fn keep_memory() {
    // SAFETY: an option may be set at any time.
    unsafe { mi_option_set(PURGE_DELAY, -1) };
}

fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|e| e.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    /// Pages of memory that this process has been given.
    fn faults() -> u64 {
        let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux tells of every process");
        let (_, fields) = stat.rsplit_once(')').expect("a name in parentheses");
        fields.split_ascii_whitespace().nth(7).and_then(|faults| faults.parse().ok()).expect("minor faults")
    }

    #[test]
    fn memory_that_was_freed_is_used_again_without_a_page_fault() {
        super::keep_memory();
        let pages = 1 << 14;
        let use_memory = || {
            let before = faults();
            std::hint::black_box(vec![1_u8; pages * 4096]);
            faults() - before
        };
        let first = use_memory();
        // Longer than the allocator would keep it otherwise.
        std::thread::sleep(std::time::Duration::from_secs(3));
        let again = use_memory();
        assert!(again < first / 16, "{again} faults after {first}");
    }
}
