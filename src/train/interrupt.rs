//! Ctrl-C, SIGTERM and SIGHUP (a terminal or a connection that goes away): the first asks the run to finish its step and save,
//! the second ends it at once.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

/// A request to stop, raised by a signal or by [`Interrupt::request`]. Clones share the request.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    requested: Arc<AtomicBool>,
}

impl Interrupt {
    /// Listens for Ctrl-C (SIGINT), SIGTERM and SIGHUP for the rest of the process. A signal that finds the request
    /// already made ends the process at once with the shell's code for it: 130 after Ctrl-C, 143 after SIGTERM, 129
    /// after SIGHUP. A SIGHUP that the process was begun to ignore, as `nohup` has it, stays ignored.
    pub fn on_signals() -> io::Result<Self> {
        let stop = Self::default();
        for (signal, exit_code) in [(SIGINT, 130), (SIGTERM, 143), (SIGHUP, 129)] {
            if signal == SIGHUP && ignored(signal) {
                continue;
            }
            // Handlers run in the order of registration: the exit must look at the flag before this signal sets it.
            flag::register_conditional_shutdown(signal, exit_code, stop.requested.clone())?;
            flag::register(signal, stop.requested.clone())?;
        }
        Ok(stop)
    }

    /// Asks for the stop.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// Whether the run should finish its step, save and end.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }
}

/// Whether this process ignores a signal, as far as the system says.
fn ignored(signal: i32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}
