//! The state of a launch: shared by all blocks ([`LaunchState`]), and collected by each host thread ([`Worker`]).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::counters::Counters;
use super::heap::Heap;
use super::layout::FUNCTION_WINDOW;
use super::memory::global::GlobalMemory;
use super::memory::variables::SharedRange;
use super::module::Module;
use super::options::{Checks, MmaOrder};
use super::program::{Constant, Function, Program};
use crate::error::{ErrorKind, Finding, Place};

/// State that all blocks of a launch share.
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
    /// Blocks of a cluster.
    pub cluster: [u32; 3],
    /// Whether the launch or the kernel asked for clusters.
    pub explicit_cluster: bool,
    /// Bytes of shared memory of a block, as a GPU counts them.
    pub shared_bytes: u32,
    /// Bytes that they take here, with the gaps between variables.
    pub shared_span: u32,
    /// The variables of shared memory in order, dynamic shared memory as the last.
    pub variables: Vec<SharedRange>,
    /// Where dynamic shared memory begins.
    pub dynamic_shared: u32,
    /// Address of the grid's workspace; 0 without a cooperative launch, as on hardware.
    pub workspace: u64,
    /// The device heap, for kernels that call `malloc`.
    pub heap: Option<&'a Mutex<Heap>>,
    /// The clusters that have not started.
    pub(crate) waiting: Waiting,
    /// Number of this launch on its device, from 1, because accesses of earlier launches are ordered before it.
    pub serial: u32,
}

/// The clusters of a launch that have not started, which start in the order of their numbers.
pub(crate) struct Waiting {
    next: AtomicU64,
    /// How many clusters the launch has.
    all: u64,
}

impl Waiting {
    /// None of them has.
    pub(crate) fn new(all: u64) -> Self {
        Self { next: AtomicU64::new(0), all }
    }

    /// The next one, which then does not wait any more.
    pub(crate) fn take(&self) -> Option<u64> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.all).then_some(number)
    }
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

    /// The value of a constant in a frame whose local memory begins at `local_base`, of a block whose shared memory begins at
    /// `shared_base` in that of the cluster.
    pub fn resolve(&self, constant: Constant, local_base: u32, shared_base: u64) -> u64 {
        match constant {
            Constant::Bits(bits) => bits,
            Constant::Global(i, addend) => self.globals[i as usize].wrapping_add_signed(addend),
            Constant::Function(i) => FUNCTION_WINDOW + u64::from(i),
            Constant::Local(at, window) => window.wrapping_add(u64::from(local_base) + u64::from(at)),
            Constant::DynamicShared(addend, window) => {
                let base = window.wrapping_add(shared_base);
                base.wrapping_add(u64::from(self.dynamic_shared)).wrapping_add_signed(addend)
            }
            Constant::Shared(i, window) => {
                let used = &self.kernel.shared;
                // The linker has listed all that the kernel and its callees name.
                let at = used.binary_search_by_key(&i, |(index, _)| *index).map_or(0, |at| used[at].1);
                window.wrapping_add(shared_base).wrapping_add(u64::from(at))
            }
        }
    }
}

/// Counters, findings and printed text that one host thread collects during a launch.
#[derive(Default)]
pub struct Worker {
    /// Counters.
    pub counters: Counters,
    /// Text that the kernel printed, with the block's place in the order of their start.
    pub printed: Vec<(u64, String)>,
    /// By kind and instruction, with the place of the first one's block in the order of their start.
    pub(super) findings: HashMap<(ErrorKind, u32), (u64, Finding)>,
}

impl Worker {
    pub(super) fn new(instructions: usize) -> Self {
        Self { counters: Counters::new(instructions), ..Self::default() }
    }

    /// Counts a finding that was recorded before in this block or an earlier one of this worker.
    pub fn seen(&mut self, kind: ErrorKind, pc: u32) -> bool {
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

    /// Adds the counters, text and findings of another host thread.
    pub(super) fn take_in(&mut self, other: Self) {
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
