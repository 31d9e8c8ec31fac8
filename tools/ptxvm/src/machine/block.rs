//! A block while it runs.

use super::counters::BlockWork;
use super::memory::race::Clocks;
use super::memory::shared::SharedMemory;

/// State that the warps of a block share.
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
    /// Its work, for the counters.
    pub work: BlockWork,
    /// Shared memory, static then dynamic.
    pub shared: SharedMemory,
    /// Vector clocks of the race check.
    pub clocks: Clocks,
}
