//! A block while it runs.

use super::counters::BlockWork;
use super::memory::race::Clocks;
use super::memory::shared::SharedMemory;

/// A block: what its warps share.
#[derive(Default)]
pub struct Block {
    /// Index in the grid.
    pub index: [u32; 3],
    /// Number in the grid: x fastest.
    pub number: u64,
    /// Its warps.
    pub warps: u32,
    /// Instructions that its warps have executed.
    pub executed: u64,
    /// What it did, for the counters.
    pub work: BlockWork,
    /// Shared memory, static then dynamic.
    pub shared: SharedMemory,
    /// Who happened before whom, for the race check.
    pub clocks: Clocks,
}
