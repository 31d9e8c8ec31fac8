//! Signals that end a run.

use std::time::Duration;

use bon_engine::train::interrupt::Interrupt;
use rustix::process::{Pid, Signal, kill_process};

use crate::child::{child, child_dir, say, wait_for};

fn stops_on_signals() {
    let stop = Interrupt::on_signals().unwrap();
    say("\nlistening");
    // Bounded, so that a broken handler ends the test too.
    for _ in 0..2000 {
        if stop.requested() {
            say("\nfinishing");
            std::thread::sleep(Duration::from_secs(20));
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_first_signal_asks_and_the_second_ends() {
    if child_dir().is_some() {
        return stops_on_signals();
    }
    let dir = tempfile::tempdir().unwrap();
    for (first, second, code) in
        [(Signal::INT, Signal::INT, 130), (Signal::TERM, Signal::INT, 130), (Signal::INT, Signal::TERM, 143)]
    {
        let (mut process, mut lines) =
            child(concat!(module_path!(), "::the_first_signal_asks_and_the_second_ends"), dir.path());
        let said = |text: &'static str| move |line: &str| (line == text).then_some(());
        let pid = Pid::from_child(&process);
        wait_for(&mut lines, said("listening")).unwrap();
        assert!(process.try_wait().unwrap().is_none());
        kill_process(pid, first).unwrap();
        wait_for(&mut lines, said("finishing")).expect("the first signal lets the process finish");
        kill_process(pid, second).unwrap();
        assert_eq!(process.wait().unwrap().code(), Some(code));
    }
    let stop = Interrupt::default();
    let shared = stop.clone();
    assert!(!stop.requested());
    shared.request();
    assert!(stop.requested());
}
