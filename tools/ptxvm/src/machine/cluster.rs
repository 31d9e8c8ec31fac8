//! Clusters: blocks that run at the same time and reach each other's shared memory.
//!
//! An address of shared memory has the rank of its block in the bits from [`RANK_BIT`] on, as on hardware, so that the address
//! of a variable is a valid one for the whole cluster. One block of a cluster runs at a time, and owns the cluster's state
//! meanwhile. Its instructions reach another block's memory by *showing* it in place of the own ([`Context::at_rank`]): bounds,
//! marks of copies, mbarriers and the record of races are then that block's, while clocks and findings are the running warp's.

use super::block::Block;
use super::bulk::BulkQueue;
use super::context::{Context, Stop};
use super::flights::Flights;
use super::launch::LaunchState;
use super::layout::WINDOW_BYTES;
use super::memory::lanes;
use super::memory::race::{Releases, join};
use super::memory::shared::SharedMemory;
use super::registers::LANES;
use super::run::random;
use crate::error::{ErrorKind, Finding, Threads};

/// The lowest bit of a rank in an address of shared memory.
pub(crate) const RANK_BIT: u32 = 24;

/// Most blocks of a cluster, as of an H100 that was asked for more than 8.
pub(crate) const MAX_CLUSTER: u32 = 16;

/// The rank in an address of shared memory.
#[inline(always)]
pub(crate) fn rank_of(at: u64) -> usize {
    (at >> RANK_BIT) as usize
}

/// A block's shared memory, and what is under way to it.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    pub(crate) shared: SharedMemory,
    pub(crate) flights: Flights,
    pub(crate) bulk: BulkQueue,
}

/// The last access of a warp of another block.
#[derive(Clone, Copy, Debug, Default)]
struct Visit {
    /// The warp's clock; 0 for none.
    clock: u32,
    pc: u32,
    lanes: u32,
}

/// The barrier of a cluster. Warps are counted over all of its blocks.
#[derive(Debug, Default)]
struct Meeting {
    /// Lanes of each warp that have not exited.
    live: Vec<u32>,
    /// Lanes that have arrived in the running phase.
    arrived: Vec<u32>,
    /// Lanes whose phase is complete, and that have not waited for it.
    passed: Vec<u32>,
    /// What those who arrived released, and all that they had done, as the race check knows it.
    released: Vec<u32>,
    done: Vec<u32>,
    /// The same of the last complete phase.
    complete: (Vec<u32>, Vec<u32>),
}

/// The state of a cluster.
#[derive(Debug, Default)]
pub(crate) struct Cluster {
    /// The rank of the block that runs.
    pub(crate) rank: usize,
    /// The rank whose memory it sees; mostly its own.
    pub(crate) shown: usize,
    /// The other blocks' memory, by rank. In the place of one that is shown lies the running block's.
    pub(crate) memories: Vec<Memory>,
    /// Whether a block has ended.
    left: Vec<bool>,
    /// For each block, the last accesses of others' warps to its memory.
    visits: Vec<Vec<Visit>>,
    /// For each block, what its warps have learnt at the cluster's barrier, also from relaxed arrivals: who has started, and how
    /// far others had come.
    told: Vec<Vec<u32>>,
    /// Warps of a block.
    warps: usize,
    meeting: Meeting,
}

impl Cluster {
    /// Prepares for a new cluster of `blocks` blocks, whose warps have the lanes `live`.
    pub(crate) fn start(&mut self, blocks: usize, live: &[u32]) {
        self.memories.resize_with(blocks, Memory::default);
        (self.rank, self.shown, self.warps) = (0, 0, live.len());
        let n = blocks * live.len();
        self.left = vec![false; blocks];
        self.visits = vec![Vec::new(); blocks];
        self.told = vec![Vec::new(); blocks];
        self.meeting = Meeting {
            live: live.iter().cycle().take(n).copied().collect(),
            arrived: vec![0; n],
            passed: vec![0; n],
            ..Meeting::default()
        };
    }

    /// Its blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.memories.len()
    }

    fn party(&self, warp: usize) -> usize {
        self.rank * self.warps + warp
    }

    /// Lanes of a warp of the running block arrive at the barrier. `Err` says what is wrong.
    pub(crate) fn arrive(&mut self, warp: usize, lanes: u32) -> Result<(), &'static str> {
        let w = self.party(warp);
        if (self.meeting.arrived[w] | self.meeting.passed[w]) & lanes != 0 {
            return Err("a second arrival at the cluster's barrier, without barrier.cluster.wait between");
        }
        self.meeting.arrived[w] |= lanes;
        Ok(())
    }

    /// What a warp that arrives has done, and of that what it releases.
    pub(crate) fn bring(&mut self, done: &[u32], released: &[u32]) {
        let add = |to: &mut Vec<u32>, what: &[u32]| {
            to.resize(what.len(), 0);
            join(to, what);
        };
        add(&mut self.meeting.done, done);
        add(&mut self.meeting.released, released);
    }

    /// Lanes of a warp of the running block exit.
    pub(crate) fn exit(&mut self, warp: usize, lanes: u32) {
        let w = self.party(warp);
        self.meeting.live[w] &= !lanes;
        self.meeting.arrived[w] &= !lanes;
    }

    /// Completes the phase if all that have not exited have arrived. Gives whether it did.
    pub(crate) fn complete(&mut self) -> bool {
        let m = &mut self.meeting;
        let any = m.arrived.iter().any(|lanes| *lanes != 0);
        if !any || m.live.iter().zip(&m.arrived).any(|(live, arrived)| live & !arrived != 0) {
            return false;
        }
        for (passed, arrived) in m.passed.iter_mut().zip(&mut m.arrived) {
            *passed |= std::mem::take(arrived);
        }
        m.complete = (std::mem::take(&mut m.released), std::mem::take(&mut m.done));
        true
    }

    /// Lanes of a warp of the running block that wait: those whose phase is complete. `Err` if some have not arrived.
    pub(crate) fn wait(&self, warp: usize, lanes: u32) -> Result<u32, &'static str> {
        let w = self.party(warp);
        let (passed, arrived) = (self.meeting.passed[w] & lanes, self.meeting.arrived[w] & lanes);
        if passed | arrived != lanes {
            return Err("a wait at the cluster's barrier without barrier.cluster.arrive before");
        }
        Ok(passed)
    }

    /// Lanes of a warp of the running block go on behind the barrier.
    fn pass(&mut self, warp: usize, lanes: u32) {
        let w = self.party(warp);
        self.meeting.passed[w] &= !lanes;
        let told = &mut self.told[self.rank];
        told.resize(self.meeting.complete.1.len(), 0);
        join(told, &self.meeting.complete.1);
    }
}

impl Block {
    /// Shows the memory of a block of the cluster.
    fn show(&mut self, rank: usize) {
        let Some(mut cluster) = self.cluster.take() else { return };
        if cluster.shown != cluster.rank {
            let shown = cluster.shown;
            self.swap_memory(&mut cluster.memories[shown]);
        }
        if rank != cluster.rank {
            self.swap_memory(&mut cluster.memories[rank]);
        }
        cluster.shown = rank;
        self.cluster = Some(cluster);
    }

    /// Exchanges the memory that the block sees.
    pub(crate) fn swap_memory(&mut self, other: &mut Memory) {
        std::mem::swap(&mut self.shared, &mut other.shared);
        std::mem::swap(&mut self.flights, &mut other.flights);
        std::mem::swap(&mut self.bulk, &mut other.bulk);
    }

    /// The shared memory of a block of the cluster.
    pub(crate) fn shared_of(&mut self, rank: usize) -> &mut SharedMemory {
        match &mut self.cluster {
            Some(c) if rank != c.shown => {
                let place = if rank == c.rank { c.shown } else { rank };
                &mut c.memories[place].shared
            }
            _ => &mut self.shared,
        }
    }

    /// The rank of the running block; 0 without a cluster.
    pub(crate) fn rank(&self) -> usize {
        self.cluster.as_ref().map_or(0, |c| c.rank)
    }

    /// Where the block's shared memory begins in that of the cluster.
    pub(crate) fn shared_base(&self) -> u64 {
        (self.rank() as u64) << RANK_BIT
    }

    /// The same of the memory that is shown.
    #[inline(always)]
    pub(crate) fn shown_base(&self) -> u64 {
        self.cluster.as_ref().map_or(0, |c| (c.shown as u64) << RANK_BIT)
    }

    /// An address in the memory that is shown, in words.
    #[cold]
    pub(crate) fn place(&self, at: u64) -> String {
        match self.cluster.as_ref().filter(|c| c.shown != c.rank) {
            None => format!("shared memory at {at:#x}"),
            Some(c) => format!("shared memory of block {} of the cluster at {at:#x}", c.shown),
        }
    }
}

impl<'a> Context<'a> {
    /// How many blocks the cluster has.
    pub(crate) fn cluster_blocks(&self) -> usize {
        self.block.cluster.as_ref().map_or(1, |c| c.blocks())
    }

    /// Whether the block may take the place of one more cluster that has not started. Hardware refuses when it likes; here a block
    /// is granted two, or under a seed up to three, so that work is shared among blocks and the race check sees several.
    pub(crate) fn may_cancel(&self) -> bool {
        let most = self.launch.seed.map_or(2, |seed| {
            let mut state = seed ^ self.block.order.wrapping_mul(0xd134_2543_de82_ef95);
            (random(&mut state) & 3) as u32
        });
        self.block.granted < most
    }

    /// Does something with the shared memory of a block of the cluster, for some lanes, which reach it from the running one.
    pub(crate) fn at_rank<T>(
        &mut self,
        rank: usize,
        lanes: u32,
        f: impl FnOnce(&mut Self) -> Result<T, Stop>,
    ) -> Result<T, Stop> {
        let Some(own) = self.block.cluster.as_ref().map(|c| c.rank) else { return f(self) };
        if rank == own {
            return f(self);
        }
        if rank >= self.cluster_blocks() {
            let message = format!(
                "shared memory of block {rank} of the cluster, which has {} blocks",
                self.cluster_blocks()
            );
            return Err(self.fault(ErrorKind::Cluster, lanes, message));
        }
        if self.launch.checks.race {
            self.visit(rank, lanes);
        }
        self.block.show(rank);
        let done = f(self);
        self.block.show(own);
        done
    }

    /// Calls `f` for the lanes of each block that addresses of shared memory lie in, with the addresses in that block's memory.
    /// Without `remote` the instruction may reach the own block's alone.
    #[inline(always)]
    pub(crate) fn each_block(
        &mut self,
        mask: u32,
        at: &[u64; LANES],
        remote: bool,
        mut f: impl FnMut(&mut Self, u32, &[u64; LANES]) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        if self.block.cluster.is_none() {
            return f(self, mask, at);
        }
        let parts = self.by_rank(mask, at, remote)?;
        let here = at.map(|at| at & ((1 << RANK_BIT) - 1));
        for (rank, part) in parts {
            self.at_rank(rank, part, |ctx| f(ctx, part, &here))?;
        }
        Ok(())
    }

    /// The lanes whose addresses lie in each block.
    #[inline(never)]
    fn by_rank(&self, mask: u32, at: &[u64; LANES], remote: bool) -> Result<Vec<(usize, u32)>, Stop> {
        let mut parts: Vec<(usize, u32)> = Vec::new();
        for lane in lanes(mask) {
            let rank = rank_of(at[lane]);
            match parts.iter_mut().find(|(known, _)| *known == rank) {
                Some((_, part)) => *part |= 1 << lane,
                None => parts.push((rank, 1 << lane)),
            }
        }
        let own = self.block.rank();
        if let Some((rank, part)) = parts.iter().find(|(rank, _)| *rank != own && !remote) {
            let first = at[part.trailing_zeros() as usize];
            if first >= WINDOW_BYTES {
                return Err(self.beyond(*part, at, 1, self.block.shared.len(), "shared memory of the block"));
            }
            let message = format!(
                "{first:#x} is an address of block {rank} of the cluster, and this reaches the own shared memory alone \
                 (.shared::cluster is missing)"
            );
            return Err(self.fault(ErrorKind::WrongSpace, *part, message));
        }
        Ok(parts)
    }

    /// The addresses in the block's own memory, for what reaches no other.
    #[inline(always)]
    pub(crate) fn own_shared(&self, mask: u32, at: [u64; LANES]) -> Result<[u64; LANES], Stop> {
        if self.block.cluster.is_none() {
            return Ok(at);
        }
        self.by_rank(mask, &at, false)?;
        Ok(at.map(|at| at & ((1 << RANK_BIT) - 1)))
    }

    /// A lane's address: the block, and where in its memory.
    pub(crate) fn split_rank(&self, at: u64) -> (usize, u64) {
        match self.block.cluster {
            None => (0, at),
            Some(_) => (rank_of(at), at & ((1 << RANK_BIT) - 1)),
        }
    }

    /// Notes that lanes reach another block's shared memory, which must have started and not have left.
    fn visit(&mut self, rank: usize, lanes: u32) {
        let (warp, pc) = (self.warp.id, self.pc);
        let Some(cluster) = &mut self.block.cluster else { return };
        let clocks = &self.block.clocks;
        let party = clocks.party(warp) as usize;
        let all = clocks.clocks();
        let visits = &mut cluster.visits[rank];
        visits.resize(all.len(), Visit::default());
        visits[party] = Visit { clock: all[party], pc, lanes };
        let what = if cluster.left[rank] {
            "has left"
        } else if !clocks.has_heard_of(warp, rank, &cluster.told[cluster.rank]) {
            "may not have started: nothing orders this after its start, as the cluster's barrier would"
        } else {
            return;
        };
        self.finding(ErrorKind::Cluster, lanes, None, || {
            format!("the shared memory of block {rank} of the cluster, which {what}")
        });
    }

    /// The block has ended: nobody may reach its memory any more, and who has must be ordered before the end.
    pub(crate) fn leave_cluster(&mut self, warps: u32) {
        let Some(cluster) = &mut self.block.cluster else { return };
        let rank = cluster.rank;
        cluster.left[rank] = true;
        if !self.launch.checks.race || cluster.blocks() == 1 {
            return;
        }
        let mut known = cluster.told[rank].clone();
        for warp in 0..warps {
            let all = self.block.clocks.all_of(warp);
            known.resize(all.len(), 0);
            join(&mut known, &all);
        }
        let mut found: Vec<(usize, Visit)> = Vec::new();
        for (party, visit) in cluster.visits[rank].iter().enumerate() {
            if visit.clock > known[party] {
                found.push((party, *visit));
            }
        }
        let per_block = cluster.warps;
        let reading: Vec<u32> = (0..cluster.blocks())
            .filter(|other| *other != rank)
            .filter_map(|other| cluster.memories[other].bulk.reads_from(rank))
            .collect();
        for (party, visit) in found {
            let what = format!(
                "the shared memory of block {rank} of the cluster, which may have left: it waits for nothing behind this"
            );
            let (by, warp) = (party / per_block, (party % per_block) as u32);
            self.of_other(ErrorKind::Cluster, by, warp, visit, what);
        }
        for pc in reading {
            self.pc = pc;
            self.finding(ErrorKind::AsyncRace, 1, None, || {
                "the block ends while this may still read its shared memory".to_owned()
            });
        }
    }

    /// Records a finding at an instruction of another block of the cluster.
    #[cold]
    fn of_other(&mut self, kind: ErrorKind, rank: usize, warp: u32, visit: Visit, message: String) {
        if self.worker.seen(kind, visit.pc) {
            return;
        }
        let order = self.block.order - self.block.rank() as u64 + rank as u64;
        let finding = Finding {
            kind,
            kernel: self.launch.kernel_name().to_owned(),
            at: self.launch.place(visit.pc),
            other: None,
            threads: Some(Threads { block: self.launch.index_of(order), warp, lanes: visit.lanes }),
            message,
            count: 1,
        };
        self.worker.record(visit.pc, order, finding);
    }

    /// The running warp goes on behind the cluster's barrier, with some of its lanes.
    pub(crate) fn pass_cluster_barrier(&mut self, lanes: u32) {
        let warp = self.warp.id;
        let Some(cluster) = &mut self.block.cluster else { return };
        cluster.pass(warp as usize, lanes);
        if self.launch.checks.race {
            self.block.clocks.acquired(warp, &cluster.meeting.complete.0, true);
            self.launch.memory.releases.strong_read(&mut self.block.epochs, true);
        }
    }

    /// The running warp arrives at the cluster's barrier; with `releases` others that wait see what it wrote, without it what it
    /// wrote before its last fence.
    pub(crate) fn bring_to_cluster_barrier(&mut self, releases: bool) {
        if !self.launch.checks.race {
            return;
        }
        let warp = self.warp.id;
        if releases {
            self.publish();
        } else {
            let (number, serial) = (self.block.number as u32, self.launch.serial);
            self.launch.memory.releases.strong_write(serial, number, &mut self.block.epochs);
        }
        let released = self.block.clocks.released(warp, releases).to_vec();
        let done = self.block.clocks.all_of(warp);
        if let Some(cluster) = &mut self.block.cluster {
            cluster.bring(&done, &released);
        }
    }

    /// What the block wrote to global memory may be seen by those who synchronise with it.
    pub(crate) fn publish(&mut self) {
        let (number, serial) = (self.block.number as u32, self.launch.serial);
        Releases::fence(&mut self.block.epochs);
        self.launch.memory.releases.strong_write(serial, number, &mut self.block.epochs);
    }
}

impl LaunchState<'_> {
    /// Blocks of a cluster.
    pub(crate) fn cluster_blocks(&self) -> u64 {
        self.cluster.iter().map(|n| u64::from(*n)).product()
    }

    /// The index in the grid of the block that is started as the `order`-th: clusters follow each other, x fastest, and so do
    /// the blocks of each.
    pub(crate) fn index_of(&self, order: u64) -> [u32; 3] {
        let [cx, cy, _] = self.cluster.map(u64::from);
        let n = self.cluster_blocks();
        let (unit, rank) = (order / n, order % n);
        let clusters: [u64; 3] = std::array::from_fn(|i| u64::from(self.grid[i] / self.cluster[i]));
        let at = [unit % clusters[0], unit / clusters[0] % clusters[1], unit / (clusters[0] * clusters[1])];
        let within = [rank % cx, rank / cx % cy, rank / (cx * cy)];
        std::array::from_fn(|i| (at[i] * u64::from(self.cluster[i]) + within[i]) as u32)
    }

    /// When the block of a number is started ([`LaunchState::index_of`]).
    pub(crate) fn order_of(&self, number: u64) -> u64 {
        if self.cluster == [1, 1, 1] {
            return number;
        }
        let [gx, gy, _] = self.grid.map(u64::from);
        let index = [number % gx, number / gx % gy, number / (gx * gy)];
        let [cx, cy, cz] = self.cluster.map(u64::from);
        let (at, within) =
            ([index[0] / cx, index[1] / cy, index[2] / cz], [index[0] % cx, index[1] % cy, index[2] % cz]);
        let unit = at[0] + gx / cx * (at[1] + gy / cy * at[2]);
        unit * self.cluster_blocks() + within[0] + cx * (within[1] + cy * within[2])
    }
}
