//! A block while it runs.

use super::bulk::BulkQueue;
use std::collections::HashMap;

use super::cluster::Cluster;
use super::counters::BlockWork;
use super::flights::Flights;
use super::memory::mbarrier::Awaited;
use super::memory::race::{BlockClock, Clocks};
use super::memory::shared::SharedMemory;
use super::memory::warps::WarpLines;
use super::products::GroupReads;

/// State that the warps of a block share.
#[derive(Default)]
pub struct Block {
    /// Index in the grid.
    pub index: [u32; 3],
    /// Number in the grid: x fastest.
    pub number: u64,
    /// When it is started among the blocks of the grid: clusters follow each other.
    pub(crate) order: u64,
    /// Its warps.
    pub warps: u32,
    /// Instructions that its warps have executed.
    pub executed: u64,
    /// Its work, for the counters.
    pub work: BlockWork,
    /// Shared memory, static then dynamic.
    pub shared: SharedMemory,
    /// Vector clocks of the race check, those of all blocks of the cluster while the block runs.
    pub clocks: Clocks,
    /// How far its accesses to global memory have been published.
    pub(crate) epochs: BlockClock,
    /// Its warps' accesses to global memory.
    pub(crate) warp_lines: WarpLines,
    /// The state of its cluster, while it runs, where it has other blocks or uses the cluster's barrier.
    pub(crate) cluster: Option<Box<Cluster>>,
    /// Asynchronous work whose end mbarriers tell.
    pub(crate) flights: Flights,
    /// Bulk copies under way.
    pub(crate) bulk: BulkQueue,
    /// What the asynchronous products of each warpgroup read, by their number.
    pub(crate) products: HashMap<(u32, u64), GroupReads>,
    /// How many clusters it has taken the place of.
    pub(crate) granted: u32,
    /// Whether it has seen that a request for one was refused.
    pub(crate) refused: bool,
    /// Events that may end somebody's wait at an mbarrier.
    pub(crate) progress: u64,
    /// The wait at an mbarrier that has just found its phase incomplete.
    pub(crate) poll: Option<Poll>,
}

/// A wait at an mbarrier whose phase is not complete.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Poll {
    /// The instruction.
    pub(crate) pc: u32,
    /// The lanes whose phase is not.
    pub(crate) lanes: u32,
    /// The address that the first of them waits at.
    pub(crate) at: u64,
    /// What it waits for.
    pub(crate) awaited: Awaited,
}
