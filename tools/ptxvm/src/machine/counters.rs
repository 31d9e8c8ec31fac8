//! Counters of a launch, instruction by instruction, and the most and the least work of a block. They are sums, maxima
//! and minima, so that they do not depend on host threads.

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

/// Work of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockWork {
    /// Instructions that its warps executed with at least one lane.
    pub instructions: u64,
    /// Operations of the tensor cores.
    pub mma_flops: u64,
    /// 32-byte sectors of global memory that it asked for, as in [`MemoryCount::sectors`].
    pub sectors: u64,
    /// Passes over the banks of shared memory.
    pub wavefronts: u64,
}

impl BlockWork {
    fn each(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            instructions: f(self.instructions, other.instructions),
            mma_flops: f(self.mma_flops, other.mma_flops),
            sectors: f(self.sectors, other.sectors),
            wavefronts: f(self.wavefronts, other.wavefronts),
        }
    }
}

/// The most and the least work of a block, figure by figure: two figures may come from different blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRange {
    /// The most.
    pub most: BlockWork,
    /// The least.
    pub least: BlockWork,
}

impl BlockRange {
    /// The range of the blocks of both ranges.
    fn join(self, other: Self) -> Self {
        Self { most: self.most.each(other.most, u64::max), least: self.least.each(other.least, u64::min) }
    }
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
    /// Work of the blocks that have ended; `None` before the first.
    pub blocks: Option<BlockRange>,
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

    /// Notes a block that has ended.
    pub fn end(&mut self, work: BlockWork) {
        let block = BlockRange { most: work, least: work };
        self.blocks = Some(self.blocks.map_or(block, |others| others.join(block)));
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
        self.blocks = match (self.blocks, other.blocks) {
            (Some(a), Some(b)) => Some(a.join(b)),
            (a, b) => a.or(b),
        };
    }
}
