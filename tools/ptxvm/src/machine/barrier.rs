//! The block's barriers: who has arrived, who waits.

use super::inst::BarrierKind;

/// Barriers of a block.
pub(crate) const BARRIERS: usize = 16;

/// Stands for the barrier of the cluster.
pub(crate) const CLUSTER: u8 = u8::MAX;

/// Warps of a warpgroup: the first has a number that 4 divides.
pub(crate) const WARPS: u32 = 4;

/// One barrier between two openings.
#[derive(Clone, Debug, Default)]
pub(crate) struct Barrier {
    /// Lanes of each warp that have arrived.
    pub arrived: Vec<u32>,
    /// Arrivals so far; a warp all of whose lanes arrived counts 32.
    pub threads: u32,
    /// The thread count that arrivals gave: `None` before the first.
    pub count: Option<Option<u32>>,
    /// Warps that arrived, waiting or not; a warp may arrive twice.
    pub warps: Vec<u32>,
    /// True predicates.
    pub popc: u32,
    /// Whether a predicate was false, whether one was true.
    pub seen: (bool, bool),
    /// The kind of the arrivals so far: all arrivals must agree on a reduction.
    pub kind: Option<BarrierKind>,
}

impl Barrier {
    /// Empty, for a block of `warps` warps.
    pub(super) fn clear(&mut self, warps: usize) {
        self.arrived.clear();
        self.arrived.resize(warps, 0);
        self.threads = 0;
        self.count = None;
        self.warps.clear();
        self.popc = 0;
        self.seen = (false, false);
        self.kind = None;
    }
}
