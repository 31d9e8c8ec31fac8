//! Bulk copies (`cp.async.bulk`) under way: what they move, and how they end.
//!
//! A copy that arrives at an mbarrier lands when somebody waits there, one of a bulk group when its issuer waits for the group;
//! as late as hardware may do it. What it moves is a list of runs of consecutive bytes.

use std::borrow::Cow;

use super::context::{Context, Stop};
use super::memory::access::{Access, Act, Order, Span};
use super::memory::buffer::{Cell, Word};
use super::memory::race::Nothing;
use super::registers::LANES;
use crate::error::ErrorKind;

/// Copies of a block that may be under way at once. Beyond them the oldest lands early, as on hardware it may as well.
const MAX_BULK: usize = 4096;

/// Bytes that are consecutive on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Address in shared memory.
    pub(crate) shared: u64,
    /// Address on the other side; `None` outside the tensor, where a load fills and a store does nothing, and for bytes that a load
    /// ignores.
    pub(crate) other: Option<u64>,
    /// How many.
    pub(crate) bytes: u64,
}

/// A new value from the old one and the copied one.
pub(crate) type Combine = fn(u64, u64) -> u64;

/// A reduction: bytes of an element, and what it does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reduction {
    pub(crate) bytes: u64,
    pub(crate) combine: Combine,
}

/// Which way, and who is told of the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From global to shared memory; then the mbarrier at this address.
    Load(u64),
    /// From shared memory (the other side) to shared memory, of the own or another block of the cluster; then the mbarrier at
    /// this address.
    Within(u64),
    /// From shared to global memory; the issuer's bulk group.
    Store,
}

/// A copy.
#[derive(Clone, Debug)]
pub(crate) struct Bulk {
    pub(crate) way: Way,
    pub(crate) runs: Vec<Run>,
    /// The pieces of shared memory that all runs lie in, multiples of 16 bytes.
    cover: Vec<(u64, u64)>,
    /// Bytes of all runs, as the mbarrier counts them.
    pub(crate) bytes: u64,
    pub(crate) reduction: Option<Reduction>,
    /// What a load writes where there is no other side, again and again: outside the tensor; or the values of registers.
    pub(crate) fill: Cow<'static, [u8]>,
    /// Whether what a load writes there is indeterminate, and counts as unwritten.
    pub(crate) ignores: bool,
    /// Whether it is the answer that no cluster was cancelled.
    pub(crate) refuses: bool,
    /// Whether a store leaves out single bytes of what it covers.
    pub(crate) masked: bool,
    /// Whether another copy of the same instruction has read the same global memory: a multicast.
    pub(crate) repeats: bool,
    /// The issuer's block in the cluster, and its warp to the race check.
    rank: usize,
    party: u32,
    warp: u32,
    lane: usize,
    pc: u32,
    /// The issuer's group.
    group: u32,
    /// What a store has read, and not written.
    taken: Option<Vec<u8>>,
    /// What the issuer knew and had done.
    clocks: Vec<u32>,
}

impl Bulk {
    /// A copy that is to be issued.
    pub(crate) fn new(way: Way, runs: Vec<Run>, cover: Vec<(u64, u64)>) -> Self {
        let bytes = runs.iter().map(|run| run.bytes).sum();
        Self {
            way,
            runs,
            cover,
            bytes,
            reduction: None,
            fill: Cow::Borrowed(&[0]),
            ignores: false,
            refuses: false,
            masked: false,
            repeats: false,
            rank: 0,
            party: 0,
            warp: 0,
            lane: 0,
            pc: 0,
            group: 0,
            taken: None,
            clocks: Vec::new(),
        }
    }

    /// The mbarrier that is told of the end.
    pub(crate) fn mbarrier(&self) -> Option<u64> {
        match self.way {
            Way::Load(at) | Way::Within(at) => Some(at),
            Way::Store => None,
        }
    }

    /// The runs that have another side.
    fn present(&self) -> impl Iterator<Item = (Run, u64)> + '_ {
        self.runs.iter().filter_map(|run| run.other.map(|other| (*run, other)))
    }

    /// The pieces of shared memory that it reads.
    fn sources(&self) -> Vec<(u64, u64)> {
        match self.way {
            Way::Load(_) => Vec::new(),
            Way::Within(_) => self.present().map(|(run, from)| (from, run.bytes)).collect(),
            Way::Store => self.present().map(|(run, _)| (run.shared, run.bytes)).collect(),
        }
    }

    /// The same for the race check, whose pieces are multiples of `unit` bytes: what a border of the tensor cuts is left out.
    fn whole_sources(&self, unit: u64) -> Vec<(u64, u64)> {
        let whole = |(at, n): (u64, u64)| {
            let from = at.next_multiple_of(unit);
            (from, (at + n).saturating_sub(from) / unit * unit)
        };
        self.sources().into_iter().map(whole).filter(|(_, n)| *n != 0).collect()
    }

    /// What the race check takes as read when the copy is issued or has read. Kernels that mask bytes are checked by bytes.
    fn read_pieces(&self) -> Vec<(u64, u64)> {
        self.whole_sources(if self.masked { 1 } else { 16 })
    }

    /// What it marks as being read meanwhile, by words.
    fn marked_pieces(&self) -> Vec<(u64, u64)> {
        self.whole_sources(if self.masked { 4 } else { 16 })
    }

    /// The pieces that it writes.
    fn targets(&self) -> Vec<(u64, u64)> {
        if self.way == Way::Store { Vec::new() } else { self.cover.clone() }
    }
}

/// Bulk copies of a block, and the groups of its threads.
#[derive(Debug, Default)]
pub(crate) struct BulkQueue {
    pub(super) copies: Vec<Bulk>,
    /// Groups that threads have closed, by warp and lane.
    closed: std::collections::BTreeMap<(u32, usize), u32>,
}

impl BulkQueue {
    /// Whether none is under way.
    pub(super) fn is_empty(&self) -> bool {
        self.copies.is_empty()
    }

    /// The instruction of a copy that reads the shared memory of another block of the cluster.
    pub(super) fn reads_from(&self, rank: usize) -> Option<u32> {
        self.copies.iter().find(|b| matches!(b.way, Way::Within(_)) && b.rank == rank).map(|b| b.pc)
    }

    /// There is none, for a new block.
    pub(super) fn clear(&mut self) {
        self.copies.clear();
        self.closed.clear();
    }
}

impl Context<'_> {
    /// A lane issues a copy, which writes to the shared memory of a block of the cluster unless it is a store. Checks both sides,
    /// and that what it reads and writes is ordered before.
    pub(crate) fn issue_bulk(&mut self, lane: usize, rank: usize, mut bulk: Bulk) -> Result<(), Stop> {
        let mask = 1 << lane;
        (bulk.warp, bulk.lane, bulk.pc) = (self.warp.id, lane, self.pc);
        (bulk.rank, bulk.party) = (self.block.rank(), self.block.clocks.party(bulk.warp));
        let within = matches!(bulk.way, Way::Within(_));
        if within {
            self.fits(mask, &bulk.sources())?;
        } else if bulk.way == Way::Store {
            // What a border of the tensor cuts off a store's box must lie there, too.
            self.fits(mask, &bulk.sources())?;
            self.fits(mask, &bulk.cover)?;
        }
        if within && rank != bulk.rank {
            self.order_sources(&bulk, mask);
            return self.at_rank(rank, mask, |ctx| ctx.issue_bulk_here(lane, bulk, false));
        }
        self.at_rank(rank, mask, |ctx| ctx.issue_bulk_here(lane, bulk, true))
    }

    /// Pieces of shared memory must lie in the block's.
    fn fits(&self, mask: u32, pieces: &[(u64, u64)]) -> Result<(), Stop> {
        pieces.iter().try_for_each(|(at, n)| self.in_variable(mask, *at, *n))?;
        let have = self.block.shared.len();
        match pieces.iter().find(|(at, n)| at.saturating_add(*n) > have) {
            None => Ok(()),
            Some((at, n)) => Err(self.beyond(mask, &[*at; LANES], *n, have, "shared memory of the block")),
        }
    }

    /// The copy is issued in the block that it writes to; `sources` says whether what it reads has still to be checked.
    fn issue_bulk_here(&mut self, lane: usize, mut bulk: Bulk, sources: bool) -> Result<(), Stop> {
        let mask = 1 << lane;
        let targets = bulk.targets();
        self.fits(mask, &targets)?;
        if let Some(at) = bulk.mbarrier() {
            self.with_mbarrier(lane, at, |_| Ok(()))?;
        }
        if !matches!(bulk.way, Way::Within(_)) && !bulk.repeats {
            let access = if bulk.way == Way::Store { Access::write(1) } else { Access::read(1) };
            for (run, at) in bulk.present() {
                self.outside(lane, at, run.bytes, &access)?;
            }
        }
        if sources {
            self.order_sources(&bulk, mask);
        }
        for (at, n) in &targets {
            self.meets_mbarrier(mask, &[*at; LANES], *n);
        }
        if self.launch.checks.race {
            self.order_targets(&bulk, mask);
            bulk.clocks = self.block.clocks.released(bulk.warp, true).to_vec();
        }
        bulk.group = self.block.bulk.closed.get(&(bulk.warp, lane)).copied().unwrap_or(0);
        if self.block.bulk.copies.len() >= MAX_BULK {
            let oldest = self.block.bulk.copies.remove(0);
            self.land_bulk(oldest)?;
        }
        self.block.bulk.copies.push(bulk);
        Ok(())
    }

    /// Bounds and traffic of a piece of global memory; a load's race with other blocks, too.
    fn outside(&mut self, lane: usize, at: u64, bytes: u64, access: &Access) -> Result<(), Stop> {
        if access.writes() {
            // It is written later.
            if self.launch.memory.find(at, bytes).is_none() {
                let (kind, message) = self.launch.memory.explain(at, bytes);
                return Err(self.fault(kind, 1 << lane, message));
            }
        } else {
            self.global_piece(lane, at, bytes, access)?;
        }
        if self.launch.counters {
            let span = Span { first: at, last: at, run: true };
            self.count_global(1 << lane, &[at; LANES], &span, bytes);
        }
        Ok(())
    }

    /// One lane's ordinary access to `bytes` bytes (a multiple of 16) of shared memory: checks bounds and races.
    pub(crate) fn shared_piece(
        &mut self,
        lane: usize,
        at: u64,
        bytes: u64,
        access: &Access,
    ) -> Result<(), Stop> {
        let (mask, all, have) = (1 << lane, [at; LANES], self.block.shared.len());
        self.in_variable(mask, at, bytes)?;
        if at.saturating_add(bytes) > have {
            return Err(self.beyond(mask, &all, bytes, have, "shared memory of the block"));
        }
        if !self.meets_mbarrier(mask, &all, bytes) && self.launch.checks.race {
            self.race_shared(mask, &all, &Access { size: bytes, ..*access }, true, |_, _| None);
        }
        Ok(())
    }

    /// Looks for accesses that a new copy's reads of shared memory are not ordered after, and marks what it reads.
    fn order_sources(&mut self, bulk: &Bulk, mask: u32) {
        for (at, n) in bulk.sources() {
            self.meets_mbarrier(mask, &[at; LANES], n);
        }
        if self.launch.checks.init {
            let shared = &self.block.shared;
            if bulk.way == Way::Store && bulk.sources().iter().any(|(at, n)| !shared.all_written(*at, *n)) {
                self.report_undefined(mask, "a part of what a bulk copy stores to global memory");
            }
        }
        if !self.launch.checks.race {
            return;
        }
        let by = self.block.clocks.who(bulk.warp, bulk.lane);
        for (at, n) in bulk.read_pieces() {
            let access = Access { size: n, ..Access::read(1) };
            self.race_shared(mask, &[at; LANES], &access, true, |_, _| None);
            let block = &mut *self.block;
            let (shadow, _) = block.shared.parts();
            if let Some((who, pc)) = shadow.unseen(&block.clocks, bulk.warp, at, n) {
                let who = self.block.clocks.describe(who);
                self.finding(ErrorKind::AsyncRace, mask, Some(pc), || {
                    format!(
                        "shared memory at {at:#x}: a bulk copy reads what {who} stored, and no fence.proxy.async stands between"
                    )
                });
            }
        }
        for (at, n) in bulk.marked_pieces() {
            self.block.shared.begin_reading(at, n, by, bulk.pc);
        }
    }

    /// The same of what it writes.
    fn order_targets(&mut self, bulk: &Bulk, mask: u32) {
        let by = self.block.clocks.who(bulk.warp, bulk.lane);
        for (at, n) in bulk.targets() {
            let access = Access { size: n, ..Access::write(1) };
            self.race_shared(mask, &[at; LANES], &access, false, |_, _| None);
            self.block.shared.begin_copy(at, n, by, bulk.pc);
        }
    }

    /// The copies of some lanes so far become a group.
    pub(crate) fn close_bulk_group(&mut self, lane: usize) {
        let closed = self.block.bulk.closed.entry((self.warp.id, lane)).or_default();
        *closed = closed.saturating_add(1);
    }

    /// A lane waits until all but its last `leave` groups are done, or with `read` have read shared memory.
    pub(crate) fn wait_bulk_groups(&mut self, lane: usize, leave: u32, read: bool) -> Result<(), Stop> {
        let warp = self.warp.id;
        let closed = self.block.bulk.closed.get(&(warp, lane)).copied().unwrap_or(0);
        let mut all = std::mem::take(&mut self.block.bulk.copies);
        let due = |b: &Bulk| {
            b.way == Way::Store && (b.warp, b.lane) == (warp, lane) && b.group.saturating_add(leave) < closed
        };
        for bulk in all.iter_mut().filter(|b| due(b)) {
            self.take_source(bulk);
        }
        let (landing, rest) = if read { (Vec::new(), all) } else { all.into_iter().partition(|b| due(b)) };
        self.block.bulk.copies = rest;
        landing.into_iter().try_for_each(|bulk| self.land_bulk(bulk))
    }

    /// A store reads its source.
    fn take_source(&mut self, bulk: &mut Bulk) {
        if bulk.taken.is_some() {
            return;
        }
        let mut bytes = Vec::with_capacity(bulk.bytes as usize);
        for (at, n) in bulk.sources() {
            bytes.extend_from_slice(self.block.shared.bytes(at, n));
        }
        if self.launch.checks.race {
            for (at, n) in bulk.marked_pieces() {
                self.block.shared.end_reading(at, n);
            }
            if bulk.party == self.block.clocks.party(self.warp.id) {
                // Others may write there when they are ordered after this wait; who has written has been told so.
                for (at, n) in bulk.read_pieces() {
                    let access = Access { size: n, ..Access::read(1) };
                    let block = &mut *self.block;
                    let (shadow, _) = block.shared.parts();
                    let (clocks, mask, at) = (&block.clocks, 1 << bulk.lane, [at; LANES]);
                    shadow.touch(clocks, bulk.party, bulk.pc, mask, &at, &access, true, &Nothing);
                }
            }
        }
        bulk.taken = Some(bytes);
    }

    /// A copy lands.
    pub(super) fn land_bulk(&mut self, mut bulk: Bulk) -> Result<(), Stop> {
        let here = std::mem::replace(&mut self.pc, bulk.pc);
        match bulk.way {
            Way::Store => {
                self.take_source(&mut bulk);
                self.write_out(&bulk)?;
            }
            Way::Load(at) | Way::Within(at) => {
                self.write_in(&bulk);
                self.block.refused |= bulk.refuses;
                if self.launch.checks.race
                    && let Ok(object) = self.block.shared.mbarriers.at(at)
                {
                    object.release(&bulk.clocks);
                    self.block.clocks.add_agent(object.released());
                }
                let bytes = bulk.bytes as i64;
                self.with_mbarrier(bulk.lane, at, |object| object.transact(-bytes))?;
            }
        }
        self.pc = here;
        self.block.progress += 1;
        Ok(())
    }

    /// Somebody waits for the running phase of the mbarrier at `at`: if bytes are all that it waits for, they come, as far as
    /// the phase needs them.
    pub(super) fn land_bulk_at(&mut self, lane: usize, at: u64) -> Result<(), Stop> {
        let (phase, pending) = self.with_mbarrier(lane, at, |object| Ok((object.phase, object.pending)))?;
        if pending != 0 {
            return Ok(());
        }
        while let Some(i) = self.block.bulk.copies.iter().position(|b| b.mbarrier() == Some(at)) {
            let bulk = self.block.bulk.copies.remove(i);
            self.land_bulk(bulk)?;
            if self.with_mbarrier(lane, at, |object| Ok(object.phase))? != phase {
                break;
            }
        }
        Ok(())
    }

    /// A load, or a copy within shared memory, writes.
    fn write_in(&mut self, bulk: &Bulk) {
        let memory = self.launch.memory;
        let checks = self.launch.checks;
        let agent = if checks.race { self.block.clocks.agent_writes() } else { None };
        for run in &bulk.runs {
            let mut bytes = vec![0; run.bytes as usize];
            let mut written = true;
            let mut gaps: Vec<u64> = Vec::new();
            match (run.other, bulk.way) {
                (None, _) => {
                    for (i, byte) in bytes.iter_mut().enumerate() {
                        *byte = bulk.fill[i % bulk.fill.len()];
                    }
                    written = !bulk.ignores;
                }
                (Some(from), Way::Within(_)) => {
                    let source = self.block.shared_of(bulk.rank);
                    bytes.copy_from_slice(source.bytes(from, run.bytes));
                    written = source.all_written(from, run.bytes);
                }
                (Some(from), _) => {
                    // Bounds were checked when the copy was issued, and nothing is freed while a kernel runs.
                    if let Some(a) = memory.find(from, run.bytes) {
                        let offset = from - a.start;
                        a.data.read(offset as usize, &mut bytes);
                        if checks.init && !a.is_written(offset, run.bytes) {
                            gaps = (0..run.bytes).filter(|i| !a.is_written(offset + i, 1)).collect();
                        }
                    }
                }
            }
            let shared = &mut self.block.shared;
            if let Some(r) = bulk.reduction {
                let old = shared.bytes(run.shared, run.bytes).to_vec();
                written &= shared.all_written(run.shared, run.bytes);
                let n = r.bytes as usize;
                for (new, old) in bytes.chunks_exact_mut(n).zip(old.chunks_exact(n)) {
                    let value = (r.combine)(number(old), number(new));
                    new.copy_from_slice(&value.to_le_bytes()[..n]);
                }
            }
            shared.bytes_mut(run.shared, run.bytes).copy_from_slice(&bytes);
            if checks.init {
                shared.set_all_written(run.shared, run.bytes, written);
                gaps.iter().for_each(|i| shared.set_written(run.shared + i, 1, false));
            }
        }
        if let Some(agent) = agent {
            for (at, n) in bulk.marked_pieces() {
                self.block.shared_of(bulk.rank).end_reading(at, n);
            }
            for (at, n) in bulk.targets() {
                self.block.shared.end_copy(at, n);
                let access = Access { size: n, ..Access::write(1) };
                self.note_agent(agent, bulk.pc, 1, &[at; LANES], &access);
            }
        }
    }

    /// A store writes.
    fn write_out(&mut self, bulk: &Bulk) -> Result<(), Stop> {
        let taken = bulk.taken.as_deref().unwrap_or_default();
        let mut from = 0;
        let order = Order { strong: bulk.reduction.is_some(), gpu: true, ..Order::default() };
        let act = if bulk.reduction.is_some() { Act::Atomic } else { Act::Write };
        for (run, at) in bulk.present() {
            let bytes = &taken[from..from + run.bytes as usize];
            from += run.bytes as usize;
            let part =
                self.global_piece(bulk.lane, at, run.bytes, &Access { size: run.bytes, act, order })?;
            let (a, offset) = (part.allocation, at - part.allocation.start);
            match bulk.reduction {
                None => a.data.write(offset as usize, bytes),
                Some(r) => {
                    if self.launch.checks.init && !a.is_written(offset, run.bytes) {
                        self.report_undefined(1 << bulk.lane, "a value that a reduction changes");
                    }
                    for (i, piece) in bytes.chunks_exact(r.bytes as usize).enumerate() {
                        let (at, new) = (offset as usize + i * r.bytes as usize, number(piece));
                        match r.bytes {
                            2 => _ = u16::update(&a.data, at, |old| u16::cut((r.combine)(old.wide(), new))),
                            4 => _ = u32::update(&a.data, at, |old| u32::cut((r.combine)(old.wide(), new))),
                            _ => _ = u64::update(&a.data, at, |old| (r.combine)(old, new)),
                        }
                    }
                }
            }
            a.set_written(offset, run.bytes);
        }
        Ok(())
    }

    /// The block ends: stores are done, and what nobody waited for is reported.
    pub(super) fn end_bulk(&mut self) -> Result<(), Stop> {
        for bulk in std::mem::take(&mut self.block.bulk.copies) {
            self.pc = bulk.pc;
            let late = bulk.way != Way::Store || bulk.taken.is_none();
            if late && self.launch.checks.race {
                self.finding(ErrorKind::AsyncRace, 1 << bulk.lane, None, || match bulk.way {
                    Way::Store => "the block ends while this may still read its shared memory: \
                        cp.async.bulk.wait_group.read is missing"
                        .to_owned(),
                    _ => "the block ends while this may still write its shared memory: nobody waited at the mbarrier"
                        .to_owned(),
                });
            }
            if bulk.way == Way::Store {
                self.land_bulk(bulk)?;
            }
        }
        Ok(())
    }
}

/// A little-endian number of up to 8 bytes.
fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |all, b| all << 8 | u64::from(*b))
}
