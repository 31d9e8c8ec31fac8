//! Runs the blocks of a grid over host threads, and merges the threads' counters and findings.

use std::sync::atomic::{AtomicU64, Ordering};

use super::context::Stop;
use super::counters::Counters;
use super::launch::{LaunchState, Worker};
use super::run::{ClusterRun, Progress};
use crate::error::Finding;

/// Results of a launch.
pub(crate) struct Outcome {
    /// Counters of all blocks.
    pub counters: Counters,
    /// Text that the kernel printed, by block.
    pub printed: String,
    /// A fault first, then findings by their instruction.
    pub findings: Vec<Finding>,
}

/// Runs all blocks of a launch on `threads` host threads.
///
/// The result does not depend on their number: counters are sums, of several faults that of the first block counts, and
/// kernels in which the order of blocks shows run on one thread, block after block.
pub(crate) fn run(launch: &LaunchState<'_>, threads: usize, cooperative: bool) -> Outcome {
    // Clusters, mostly of one block, are started together and run on one host thread.
    let blocks = launch.grid.iter().map(|n| u64::from(*n)).product::<u64>() / launch.cluster_blocks();
    let instructions = launch.program.code.len();
    // The lowest block that ended in a fault: later blocks need not run, earlier ones must.
    let fault_block = AtomicU64::new(u64::MAX);
    let work = || {
        let mut worker = Worker::new(instructions);
        let mut fault: Option<(u64, Box<Finding>)> = None;
        let mut run = ClusterRun::new(launch);
        loop {
            let Some(number) = launch.waiting.take() else { return (worker, fault) };
            if number > fault_block.load(Ordering::Relaxed) {
                return (worker, fault);
            }
            run.start(launch, number);
            if let Err(Stop(finding)) = run.run(launch, &mut worker, true) {
                fault_block.fetch_min(number, Ordering::Relaxed);
                fault = Some((number, finding));
                return (worker, fault);
            }
            run.work().for_each(|work| worker.counters.end(work));
        }
    };
    let parts = if cooperative {
        vec![together(launch)]
    } else if threads <= 1 || launch.kernel.ordered || blocks <= 1 {
        vec![work()]
    } else {
        let threads = threads.min(usize::try_from(blocks).unwrap_or(usize::MAX));
        std::thread::scope(|scope| {
            let handles: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut parts = vec![work()];
            // A panic in a worker is a defect: it goes on here, in the caller's thread.
            parts.extend(
                handles.into_iter().map(|h| h.join().unwrap_or_else(|p| std::panic::resume_unwind(p))),
            );
            parts
        })
    };
    let mut all = Worker::new(instructions);
    let mut fault: Option<(u64, Box<Finding>)> = None;
    for (worker, part_fault) in parts {
        all.take_in(worker);
        if let Some(f) = part_fault
            && fault.as_ref().is_none_or(|(first, _)| f.0 < *first)
        {
            fault = Some(f);
        }
    }
    all.printed.sort_by_key(|(block, _)| *block);
    let mut findings: Vec<(u32, u64, Finding)> =
        all.findings.into_iter().map(|((_, pc), (block, finding))| (pc, block, finding)).collect();
    findings.sort_by_key(|a| (a.0, a.2.kind));
    if let Some((last, _)) = &fault {
        // Findings of blocks after the faulting one are dropped, and counts become 1, because how far other host threads
        // had come is chance.
        let unit = |order: u64| order / launch.cluster_blocks();
        findings.retain(|(_, block, _)| unit(*block) <= *last);
        findings.iter_mut().for_each(|(.., f)| f.count = 1);
        all.printed.retain(|(block, _)| unit(*block) <= *last);
    }
    Outcome {
        counters: all.counters,
        printed: all.printed.into_iter().map(|(_, text)| text).collect(),
        findings: fault.into_iter().map(|(_, f)| *f).chain(findings.into_iter().map(|(.., f)| f)).collect(),
    }
}

/// Runs all blocks of a cooperative launch at the same time, a time slice each in turn, because they may wait for each
/// other.
fn together(launch: &LaunchState<'_>) -> (Worker, Option<(u64, Box<Finding>)>) {
    let mut worker = Worker::new(launch.program.code.len());
    let mut runs: Vec<(u64, ClusterRun)> = Vec::new();
    while let Some(number) = launch.waiting.take() {
        let mut run = ClusterRun::new(launch);
        run.start(launch, number);
        runs.push((number, run));
    }
    while !runs.is_empty() {
        let mut i = 0;
        while i < runs.len() {
            match runs[i].1.run(launch, &mut worker, false) {
                Ok(Progress::Ready | Progress::Stuck) => i += 1,
                Ok(Progress::Done) => {
                    runs[i].1.work().for_each(|work| worker.counters.end(work));
                    runs.remove(i);
                }
                Err(Stop(finding)) => return (worker, Some((runs[i].0, finding))),
            }
        }
    }
    (worker, None)
}
