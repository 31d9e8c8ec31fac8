//! A launch: what all blocks share, what each host thread collects, and the threads themselves.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::context::Stop;
use super::counters::Counters;
use super::heap::Heap;
use super::layout::FUNCTION_WINDOW;
use super::memory::global::GlobalMemory;
use super::options::{Checks, MmaOrder};
use super::run::{BlockRun, Progress};
use crate::decode::module::Module;
use crate::decode::program::{Constant, Function, Program};
use crate::error::{Finding, Kind, Place};

/// What all blocks of a launch share.
pub struct LaunchState<'a> {
    /// The module, for places in its text.
    pub module: &'a Module,
    /// The code.
    pub program: &'a Program,
    /// The kernel.
    pub kernel: &'a Function,
    /// Its index among the module's functions.
    pub kernel_index: u32,
    /// Addresses of the module's global variables.
    pub globals: &'a [u64],
    /// Global memory.
    pub memory: &'a GlobalMemory,
    /// The constant bank of the module.
    pub constants: &'a [u8],
    /// The kernel's parameters.
    pub params: &'a [u8],
    /// Checks that run.
    pub checks: Checks,
    /// Whether memory traffic is counted.
    pub counters: bool,
    /// Most instructions of a block.
    pub budget: u64,
    /// Seed of the schedule.
    pub seed: Option<u64>,
    /// Multiprocessors that `%nsmid` tells.
    pub multiprocessors: u32,
    /// How products add up.
    pub mma: MmaOrder,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
    /// Where dynamic shared memory begins.
    pub dynamic_shared: u32,
    /// The device heap, for kernels that call `malloc`.
    pub heap: Option<&'a Mutex<Heap>>,
    /// Number of this launch on its device, from 1: what earlier launches wrote is ordered before it.
    pub serial: u32,
}

impl LaunchState<'_> {
    /// The kernel's name.
    pub fn kernel_name(&self) -> &str {
        &self.kernel.name
    }

    /// Does something with the device heap.
    pub fn heap<T: Default>(&self, f: impl FnOnce(&mut Heap) -> T) -> T {
        // A panic while the lock is held is a defect that ends the launch anyway.
        let lock = |heap: &'_ Mutex<Heap>| f(&mut heap.lock().unwrap_or_else(PoisonError::into_inner));
        self.heap.map(lock).unwrap_or_default()
    }

    /// Where in the text the instruction at `pc` stands.
    pub fn place(&self, pc: u32) -> Place {
        self.module.place(pc)
    }

    /// The value of a constant in a frame whose local memory begins at `local_base`.
    pub fn resolve(&self, constant: Constant, local_base: u32) -> u64 {
        match constant {
            Constant::Bits(bits) => bits,
            Constant::Global(i, addend) => self.globals[i as usize].wrapping_add_signed(addend),
            Constant::Function(i) => FUNCTION_WINDOW + u64::from(i),
            Constant::Local(at, window) => window.wrapping_add(u64::from(local_base) + u64::from(at)),
            Constant::DynamicShared(addend, window) => {
                window.wrapping_add(u64::from(self.dynamic_shared)).wrapping_add_signed(addend)
            }
            Constant::Shared(i, window) => {
                let used = &self.kernel.shared;
                // The linker has listed all that the kernel and its callees name.
                let at = used.binary_search_by_key(&i, |(index, _)| *index).map_or(0, |at| used[at].1);
                window.wrapping_add(u64::from(at))
            }
        }
    }
}

/// What one host thread collects during a launch.
#[derive(Default)]
pub struct Worker {
    /// Counters.
    pub counters: Counters,
    /// What the kernel printed: (block number, text) in the order of printing.
    pub printed: Vec<(u64, String)>,
    findings: HashMap<(Kind, u32), (u64, Finding)>,
}

impl Worker {
    fn new(instructions: usize) -> Self {
        Self { counters: Counters::new(instructions), ..Self::default() }
    }

    /// Counts a finding that was recorded before in this block or an earlier one of this worker.
    pub fn seen(&mut self, kind: Kind, pc: u32) -> bool {
        if let Some((_, finding)) = self.findings.get_mut(&(kind, pc)) {
            finding.count += 1;
            return true;
        }
        false
    }

    /// Records the first finding of its kind at an instruction.
    pub fn record(&mut self, pc: u32, block: u64, finding: Finding) {
        self.findings.insert((finding.kind, pc), (block, finding));
    }

    fn take_in(&mut self, other: Self) {
        self.counters.add(&other.counters);
        self.printed.extend(other.printed);
        for (key, (block, finding)) in other.findings {
            match self.findings.get_mut(&key) {
                None => {
                    self.findings.insert(key, (block, finding));
                }
                Some((first, mine)) => {
                    let count = mine.count + finding.count;
                    if block < *first {
                        (*first, *mine) = (block, finding);
                    }
                    mine.count = count;
                }
            }
        }
    }
}

/// What a launch gave.
pub(crate) struct Outcome {
    /// Counters of all blocks.
    pub counters: Counters,
    /// What the kernel printed, by block.
    pub printed: String,
    /// A fault first, then findings by their instruction.
    pub findings: Vec<Finding>,
}

/// Runs all blocks of a launch on `threads` host threads.
///
/// The result does not depend on their number: counters are sums, of several faults that of the first block counts, and
/// kernels in which the order of blocks shows run on one thread, block after block.
pub(crate) fn run(launch: &LaunchState<'_>, threads: usize, cooperative: bool) -> Outcome {
    let blocks: u64 = launch.grid.iter().map(|n| u64::from(*n)).product();
    let instructions = launch.program.code.len();
    let next = AtomicU64::new(0);
    // The lowest block that ended in a fault: later blocks need not run, earlier ones must.
    let fault_block = AtomicU64::new(u64::MAX);
    let work = || {
        let mut worker = Worker::new(instructions);
        let mut fault: Option<(u64, Box<Finding>)> = None;
        let mut run = BlockRun::new(launch);
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= blocks || number > fault_block.load(Ordering::Relaxed) {
                return (worker, fault);
            }
            run.start(launch, number);
            if let Err(Stop(finding)) = run.run(launch, &mut worker, true) {
                fault_block.fetch_min(number, Ordering::Relaxed);
                fault = Some((number, finding));
                return (worker, fault);
            }
            worker.counters.end(run.work());
        }
    };
    let parts = if cooperative {
        vec![together(launch, blocks)]
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
        // How far other threads were when the fault came is chance: what came after it does not count.
        findings.retain(|(_, block, _)| block <= last);
        findings.iter_mut().for_each(|(.., f)| f.count = 1);
        all.printed.retain(|(block, _)| block <= last);
    }
    Outcome {
        counters: all.counters,
        printed: all.printed.into_iter().map(|(_, text)| text).collect(),
        findings: fault.into_iter().map(|(_, f)| *f).chain(findings.into_iter().map(|(.., f)| f)).collect(),
    }
}

/// Runs all blocks of a cooperative launch at the same time, each for a turn after the other: they may wait for each
/// other.
fn together(launch: &LaunchState<'_>, blocks: u64) -> (Worker, Option<(u64, Box<Finding>)>) {
    let mut worker = Worker::new(launch.program.code.len());
    let mut runs: Vec<(u64, BlockRun)> = Vec::new();
    for number in 0..blocks {
        let mut run = BlockRun::new(launch);
        run.start(launch, number);
        runs.push((number, run));
    }
    while !runs.is_empty() {
        let mut i = 0;
        while i < runs.len() {
            match runs[i].1.run(launch, &mut worker, false) {
                Ok(Progress::Over) => i += 1,
                Ok(Progress::Done) => {
                    worker.counters.end(runs[i].1.work());
                    runs.remove(i);
                }
                Err(Stop(finding)) => return (worker, Some((runs[i].0, finding))),
            }
        }
    }
    (worker, None)
}
