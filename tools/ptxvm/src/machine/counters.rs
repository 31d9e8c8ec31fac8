//! What a launch did, instruction by instruction. All are sums, so their values do not depend on host threads.

/// Counts for one instruction of the code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstCount {
    /// Times a warp executed it with at least one lane.
    pub warps: u64,
    /// Lanes for which it ran, over all times.
    pub lanes: u64,
    /// For a branch: times that lanes of a warp parted.
    pub divergent: u64,
}

/// Memory traffic of one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryCount {
    /// Warp-wide requests to global (or local) memory.
    pub requests: u64,
    /// 32-byte sectors that they touched, each request's counted once.
    pub sectors: u64,
    /// The fewest sectors that could hold the bytes asked for: distinct bytes / 32, rounded up, request by request.
    pub ideal_sectors: u64,
    /// Bytes that lanes asked for.
    pub bytes: u64,
    /// Shared memory: passes over the banks.
    pub wavefronts: u64,
    /// Shared memory: passes that the width alone needs, without conflicts.
    pub ideal_wavefronts: u64,
}

/// 32-byte sectors of global memory that a launch touched, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UniqueSectors {
    /// Read.
    pub read: u64,
    /// Written, atomics included.
    pub written: u64,
}

/// Counters of a launch, or of one worker's part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By instruction.
    pub insts: Vec<InstCount>,
    /// By instruction.
    pub memory: Vec<MemoryCount>,
    /// Distinct sectors over the whole launch.
    pub unique_sectors: UniqueSectors,
    /// Times a block's barrier opened.
    pub barriers: u64,
}

impl Counters {
    /// Counters of a program with `n` instructions.
    pub fn new(n: usize) -> Self {
        Self {
            insts: vec![InstCount::default(); n],
            memory: vec![MemoryCount::default(); n],
            ..Self::default()
        }
    }

    /// Adds another worker's.
    pub fn add(&mut self, other: &Self) {
        for (a, b) in self.insts.iter_mut().zip(&other.insts) {
            a.warps += b.warps;
            a.lanes += b.lanes;
            a.divergent += b.divergent;
        }
        for (a, b) in self.memory.iter_mut().zip(&other.memory) {
            a.requests += b.requests;
            a.sectors += b.sectors;
            a.ideal_sectors += b.ideal_sectors;
            a.bytes += b.bytes;
            a.wavefronts += b.wavefronts;
            a.ideal_wavefronts += b.ideal_wavefronts;
        }
        self.unique_sectors.read += other.unique_sectors.read;
        self.unique_sectors.written += other.unique_sectors.written;
        self.barriers += other.barriers;
    }
}
