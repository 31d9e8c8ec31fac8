//! Happens-before within a block, and of a block with others.
//!
//! Every warp has a vector clock. An access of warp v at clock c happens before an access of warp w if w's vector has at
//! least c for v. Barriers merge vectors; so does memory: release and acquire, or fences around strong accesses. Lanes of
//! one warp are ordered by `bar.warp.sync` and block barriers. Where precision would cost much, the check orders too much
//! rather than too little, so that it may miss a race but raises no false alarm: `bar.warp.sync` orders all lanes whatever
//! its mask, and a release or acquire by one lane counts for its whole warp.
//!
//! What asynchronous copies write when an mbarrier is waited for is the work of one party more, the *agent*, whose clock
//! the barrier hands to those who wait. What the products of a warpgroup read (`wgmma`) is another's, whose clock those get who
//! wait for the products. With an agent a vector has a second half: the latest clock of each warp whose writes
//! a proxy fence has made visible to the asynchronous proxy.
//!
//! The blocks of a cluster have one set of clocks, since their warps reach each other's shared memory: a *party* is a warp, an
//! agent (each block has its own) or a warpgroup's products, of any of the blocks. Numbers of warps are those of the block that
//! runs.
//!
//! Between blocks the knowledge is coarser still: see `Releases`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::access::{Access, Act};
use crate::machine::barrier::WARPS;

/// Most addresses with a clock of their own; all further addresses share one.
const MAX_SYNC_CLOCKS: usize = 1 << 16;

/// Makes every set of clocks different from all others, whatever block it belonged to.
static ERAS: AtomicU64 = AtomicU64::new(1);

/// The vector clocks of a block's warps.
#[derive(Debug, Default)]
pub struct Clocks {
    /// Shadow memory of another era says nothing about these clocks.
    pub(crate) era: u64,
    /// All parties: warps, and where there are agents these, and one for the products of each warpgroup.
    warps: usize,
    /// Warps of a block.
    own: usize,
    /// Blocks of the cluster, and which of them runs.
    blocks: usize,
    rank: usize,
    /// The running block's first party.
    base: usize,
    /// All that happened before the cluster began has a clock up to this.
    origin: u32,
    /// Entries of a vector: one for each of `warps`, or two with an agent.
    width: usize,
    /// The first agent's number, behind the warps.
    agent: Option<usize>,
    /// Each warp's own.
    clock: Vec<u32>,
    /// The vector clocks: at `w * width + v`, the latest clock of warp v that is ordered before warp w.
    knows: Vec<u32>,
    /// The smallest entry of each warp's vector.
    floor: Vec<u32>,
    /// Each warp's vector at its last fence.
    fenced: Vec<u32>,
    /// Vectors that each warp read with strong accesses, and merges into its own at its next fence or barrier.
    pending: Vec<u32>,
    /// Vectors that strong writes left at their addresses.
    sync: HashMap<u64, Vec<u32>>,
    /// One vector for all addresses beyond [`MAX_SYNC_CLOCKS`].
    sync_rest: Vec<u32>,
}

/// The later of each two clocks.
pub(crate) fn join(to: &mut [u32], from: &[u32]) {
    for (a, b) in to.iter_mut().zip(from) {
        *a = (*a).max(*b);
    }
}

impl Clocks {
    /// All that touch shared memory: warps, with agents also these and the products of each warpgroup.
    pub(crate) fn parties(blocks: u32, warps: u32, agent: bool) -> u32 {
        blocks * if agent { warps + 1 + warps.div_ceil(WARPS) } else { warps }
    }

    /// Prepares for a cluster of so many blocks of `warps` warps, and of an agent if they have one; everything before is ordered
    /// before it. The first block runs.
    pub fn start(&mut self, blocks: u32, warps: u32, agent: bool) {
        let n = Self::parties(blocks, warps, agent) as usize;
        let mut top = self.clock.iter().copied().max().unwrap_or(0);
        if self.era == 0 || top > 1 << 31 {
            self.era = ERAS.fetch_add(1, Relaxed);
            top = 0;
        }
        self.warps = n;
        (self.own, self.blocks) = (warps as usize, blocks as usize);
        self.enter(0);
        self.origin = top;
        self.agent = agent.then_some((blocks * warps) as usize);
        self.width = if agent { 2 * n } else { n };
        let width = self.width;
        let refill = |v: &mut Vec<u32>, n: usize, value: u32| {
            v.clear();
            v.resize(n, value);
        };
        refill(&mut self.clock, n, top + 1);
        if let Some(agent) = self.agent {
            self.clock[agent..].fill(top);
        }
        refill(&mut self.knows, n * width, top);
        refill(&mut self.floor, n, top);
        refill(&mut self.fenced, n * width, 0);
        refill(&mut self.pending, n * width, 0);
        refill(&mut self.sync_rest, width, 0);
        self.sync.clear();
    }

    /// Another block of the cluster runs.
    pub(crate) fn enter(&mut self, rank: usize) {
        (self.rank, self.base) = (rank, rank * self.own);
    }

    /// The party that a warp of the running block is.
    #[inline(always)]
    pub(crate) fn party(&self, warp: u32) -> u32 {
        self.base as u32 + warp
    }

    /// A lane of a warp of the running block.
    pub(crate) fn who(&self, warp: u32, lane: usize) -> Who {
        Who::new(self.base + warp as usize, lane)
    }

    /// In words, as the running block sees it.
    pub(crate) fn describe(&self, who: Who) -> String {
        let (party, n) = (who.warp(), self.own.max(1));
        let warp = match who.lane() {
            LANES_MIXED => format!("lanes of warp {}", party % n),
            lane => format!("lane {lane} of warp {}", party % n),
        };
        let rank = party / n;
        if rank == self.rank || rank >= self.blocks {
            warp
        } else {
            format!("{warp} of block {rank} of the cluster")
        }
    }

    /// All that a warp knows and has done, also what it has read strongly; it is in a new clock from now on.
    pub(crate) fn all_of(&mut self, warp: u32) -> Vec<u32> {
        let (w, n) = (self.base + warp as usize, self.width);
        let mut all = self.knows[w * n..][..n].to_vec();
        join(&mut all, &self.pending[w * n..][..n]);
        all[w] = self.clock[w];
        self.clock[w] = self.clock[w].saturating_add(1);
        all
    }

    /// Whether something that a block of the cluster did is ordered before a warp: known to it, or in `told`.
    pub(crate) fn has_heard_of(&self, warp: u32, rank: usize, told: &[u32]) -> bool {
        let row = &self.knows[(self.base + warp as usize) * self.width..];
        (rank * self.own..(rank + 1) * self.own)
            .any(|party| row[party].max(told.get(party).copied().unwrap_or(0)) > self.origin)
    }

    /// How many parties there are, and the clock of one.
    pub(crate) fn clocks(&self) -> &[u32] {
        &self.clock
    }

    /// A barrier opens: all accesses so far by warps of `arrived` happen before all later ones by warps of `waiting`.
    pub fn barrier(&mut self, arrived: &[u32], waiting: &[u32]) {
        let n = self.width;
        let mut all = vec![0; n];
        let mut top = 0;
        for &w in arrived {
            let w = self.base + w as usize;
            self.take_pending(w);
            join(&mut all, &self.knows[w * n..][..n]);
            top = top.max(self.clock[w]);
        }
        for &w in arrived {
            // All clocks leap to the same value: later, one comparison with the least shows that all is ordered.
            let w = self.base + w as usize;
            all[w] = top;
            self.clock[w] = top.saturating_add(1);
        }
        for &w in waiting {
            let w = self.base + w as usize;
            join(&mut self.knows[w * n..][..n], &all);
            self.lower(w);
        }
    }

    /// `bar.warp.sync` of lanes of a warp; it orders all of them here.
    pub fn warp_barrier(&mut self, warp: u32) {
        let w = self.base + warp as usize;
        self.take_pending(w);
        self.knows[w * self.width + w] = self.clock[w];
        self.clock[w] = self.clock[w].saturating_add(1);
        self.lower(w);
    }

    /// Works out the least that a warp knows.
    fn lower(&mut self, w: usize) {
        let mut row = &self.knows[w * self.width..][..self.warps];
        let mut floor = u32::MAX;
        if let Some(agent) = self.agent {
            // Who knows all that a party has done knows it up to any clock so far, because what it does next has a later clock
            // than all of these.
            let late = |p: usize| (row[p] < self.clock[p]).then_some(row[p]);
            floor = (agent..self.warps).filter_map(late).min().unwrap_or(floor);
            row = &row[..agent];
        }
        self.floor[w] = row.iter().copied().min().unwrap_or(0).min(floor);
    }

    fn take_pending(&mut self, w: usize) {
        let own = w * self.width..(w + 1) * self.width;
        join(&mut self.knows[own.clone()], &self.pending[own]);
        self.lower(w);
    }

    /// A fence of a warp, of whatever scope.
    pub(crate) fn fence(&mut self, warp: u32) {
        let (w, n) = (self.base + warp as usize, self.width);
        self.take_pending(w);
        let own = w * n..(w + 1) * n;
        self.fenced[own.clone()].copy_from_slice(&self.knows[own]);
        self.fenced[w * n + w] = self.clock[w];
        self.clock[w] = self.clock[w].saturating_add(1);
    }

    /// A strong write or atomic of a warp leaves the warp's vector of its last fence at the address; a releasing access has
    /// just fenced.
    pub(crate) fn strong_write(&mut self, warp: u32, address: u64) {
        let (w, n) = (self.base + warp as usize, self.width);
        let known = &self.fenced[w * n..][..n];
        if known[w] == 0 {
            return;
        }
        let full = self.sync.len() >= MAX_SYNC_CLOCKS;
        match self.sync.get_mut(&(address / 8)) {
            Some(clock) => join(clock, known),
            None if full => join(&mut self.sync_rest, known),
            None => {
                self.sync.insert(address / 8, known.to_vec());
            }
        }
    }

    /// A strong read or atomic of a warp reads the vector left at the address; an acquiring one merges it at once.
    pub(crate) fn strong_read(&mut self, warp: u32, address: u64, acquire: bool) {
        if self.sync.is_empty() {
            return;
        }
        let (w, n) = (self.base + warp as usize, self.width);
        if let Some(clock) = self.sync.get(&(address / 8)) {
            join(&mut self.pending[w * n..][..n], clock);
        }
        join(&mut self.pending[w * n..][..n], &self.sync_rest);
        if acquire {
            self.take_pending(w);
        }
    }

    /// What a warp knows and has done, for others to acquire; with `release` up to now, without it up to the warp's last
    /// fence.
    pub(crate) fn released(&mut self, warp: u32, release: bool) -> &[u32] {
        if release {
            self.fence(warp);
        }
        &self.fenced[(self.base + warp as usize) * self.width..][..self.width]
    }

    /// A warp acquires a vector of [`Clocks::released`]; without `acquire` its next fence or barrier does.
    pub(crate) fn acquired(&mut self, warp: u32, vector: &[u32], acquire: bool) {
        let (w, n) = (self.base + warp as usize, self.width);
        let own = w * n..w * n + vector.len();
        if acquire {
            join(&mut self.knows[own], vector);
            self.lower(w);
        } else {
            join(&mut self.pending[own], vector);
        }
    }

    /// The products of a warpgroup begin to read. Gives the number and the clock of the party that does.
    pub(crate) fn group_reads(&mut self, group: u32) -> Option<(u32, u32)> {
        let party = self.products(self.agent?, group);
        self.clock[party] += 1;
        Some((party as u32, self.clock[party]))
    }

    /// The party of the products of a warpgroup of the running block.
    fn products(&self, agent: usize, group: u32) -> usize {
        agent + self.blocks + self.rank * self.own.div_ceil(WARPS as usize) + group as usize
    }

    /// What the products of a warp's group read up to a clock happens before all that the warp does from now on.
    pub(crate) fn acquire_reads(&mut self, warp: u32, group: u32, clock: u32) {
        if let Some(agent) = self.agent {
            let (w, party) = (self.base + warp as usize, self.products(agent, group));
            let known = &mut self.knows[w * self.width + party];
            *known = clock.max(*known);
            self.lower(w);
        }
    }

    /// The agent begins to write, after everything so far. Gives its number.
    pub(crate) fn agent_writes(&mut self) -> Option<u32> {
        let agent = self.agent? + self.rank;
        self.clock[agent] = self.clock.iter().copied().max().unwrap_or(0).saturating_add(1);
        Some(agent as u32)
    }

    /// Adds to a vector what the agent has written.
    pub(crate) fn add_agent(&self, vector: &mut Vec<u32>) {
        if let Some(agent) = self.agent.map(|first| first + self.rank) {
            vector.resize(self.width, 0);
            vector[agent] = vector[agent].max(self.clock[agent]);
        }
    }

    /// A fence of the asynchronous proxy: what is ordered before it, the proxy sees.
    pub(crate) fn proxy_fence(&mut self, warp: u32) {
        let (w, n) = (self.base + warp as usize, self.warps);
        if self.agent.is_none() {
            return;
        }
        let (knows, seen) = self.knows[w * self.width..][..self.width].split_at_mut(n);
        join(seen, knows);
        seen[w] = self.clock[w];
        self.clock[w] = self.clock[w].saturating_add(1);
    }

    /// Whether a copy that a warp issues now sees what `by` wrote at `clock` with ordinary stores.
    fn is_seen(&self, warp: u32, clock: u32, by: Who) -> bool {
        let seen = &self.knows[(self.base + warp as usize) * self.width..][..self.width][self.warps..];
        self.agent.is_some_and(|first| (first..first + self.blocks).contains(&by.warp()))
            || seen.get(by.warp()).is_none_or(|seen| clock <= *seen)
    }

    /// Whether it was the agent, or a warpgroup's products.
    pub(crate) fn is_agent(&self, who: Who) -> bool {
        self.agent.is_some_and(|agent| who.warp() >= agent)
    }

    /// The view of one party.
    #[inline(always)]
    pub(crate) fn view(&self, party: u32) -> View<'_> {
        let w = party as usize;
        let knows = &self.knows[w * self.width..][..self.warps];
        View { warp: w, clock: self.clock[w], floor: self.floor[w], knows }
    }
}

/// One warp's view of the others: its row of the vector clocks.
#[derive(Clone, Copy)]
pub(crate) struct View<'c> {
    /// The warp.
    pub(crate) warp: usize,
    /// Its clock.
    pub(crate) clock: u32,
    /// Accesses of all warps up to this clock are ordered before: the smallest entry of the vector.
    pub(crate) floor: u32,
    /// Warp by warp.
    knows: &'c [u32],
}

impl View<'_> {
    /// Whether an access by a lane of `by` at `clock` happens before an access by `lane` of this warp now.
    #[inline(always)]
    pub(crate) fn ordered(&self, clock: u32, by: Who, lane: usize) -> bool {
        clock <= self.floor
            || self.knows.get(by.warp()).is_none_or(|known| clock <= *known)
            || by == Who::new(self.warp, lane)
    }
}

/// A lane of a warp, or several of its lanes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Who(u16);

/// Stands for more than one lane of a warp.
const LANES_MIXED: usize = 32;

impl Who {
    /// More than one warp: the table of readers says which.
    const MANY: Self = Self(u16::MAX);

    /// Lane `lane` of a warp.
    #[inline(always)]
    pub(crate) fn new(warp: usize, lane: usize) -> Self {
        Self((warp << 6 | lane) as u16)
    }

    /// The lanes of a mask.
    #[inline(always)]
    pub(crate) fn of(warp: usize, lanes: u32) -> Self {
        let one = lanes.is_power_of_two();
        Self::new(warp, if one { lanes.trailing_zeros() as usize } else { LANES_MIXED })
    }

    #[inline(always)]
    pub(crate) fn warp(self) -> usize {
        (self.0 >> 6) as usize
    }

    #[inline(always)]
    fn lane(self) -> usize {
        (self.0 & 63) as usize
    }
}

/// Who touched a grain of shared memory last.
#[derive(Clone, Copy, Debug, Default)]
struct Grain {
    write_clock: u32,
    write_pc: u32,
    /// The latest of all plain reads that count.
    read_clock: u32,
    read_pc: u32,
    writer: Who,
    /// The one reader that counts: all others are ordered before it. Or `MANY`.
    reader: Who,
    strong_write: bool,
    /// The last write was a compare-and-swap.
    swap: bool,
    /// The last write was `.volatile`.
    volatile: bool,
    /// Several warps wrote the same value, unordered; the table of writers says which.
    repeated: bool,
}

impl Grain {
    /// Whether all that touched it is ordered before a warp, as mostly.
    #[inline(always)]
    fn is_past(&self, view: &View<'_>) -> bool {
        self.write_clock.max(self.read_clock) <= view.floor
    }

    #[inline(always)]
    fn without_writes(&self) -> Self {
        Self { read_clock: self.read_clock, read_pc: self.read_pc, reader: self.reader, ..Self::default() }
    }
}

/// The other party of a race.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conflict {
    /// Who.
    pub(crate) who: Who,
    /// Where.
    pub(crate) pc: u32,
    /// Whether it wrote.
    pub(crate) wrote: bool,
    /// The lane of the running warp.
    pub(crate) lane: usize,
    /// All its lanes that meet the same fate.
    pub(crate) lanes: u32,
    /// Whether the two belong to the same instruction.
    pub(crate) same: bool,
    /// Whether they are `volatile` accesses of one warp, which are no race: they are right if its lanes run in step.
    pub(crate) step: bool,
}

/// Last accesses to shared memory, grain by grain.
///
/// Clocks grow from block to block, so that nothing is cleared between blocks.
#[derive(Debug, Default)]
pub(crate) struct Shadow {
    era: u64,
    shift: u32,
    warps: usize,
    grains: Vec<Grain>,
    /// Last plain read of each warp, at `grain * warps + warp`: clock, lane, pc. Used where a grain has many readers.
    readers: Vec<u64>,
    /// The warps that wrote the same value to a grain, a bit each, where there are more than 64 parties for several. Used where
    /// several did.
    writers: Vec<u64>,
}

/// What an access stores to shared memory, asked only where it meets an unordered one.
pub(crate) trait Stored {
    /// Whether two lanes write the same value.
    fn same(&self, a: usize, b: usize) -> bool;
    /// Whether these bytes of shared memory, of which lane `lane` writes all, already hold what it writes.
    fn held(&self, lane: usize, from: u64, bytes: u64) -> bool;
}

/// No plain store: nothing to compare.
pub(crate) struct Nothing;

impl Stored for Nothing {
    fn same(&self, _: usize, _: usize) -> bool {
        false
    }

    fn held(&self, _: usize, _: u64, _: u64) -> bool {
        false
    }
}

const PC_BITS: u32 = 26;

fn pack_read(clock: u32, lane: usize, pc: u32) -> u64 {
    u64::from(clock) << 32 | (lane as u64) << PC_BITS | u64::from(pc.min((1 << PC_BITS) - 1))
}

impl Shadow {
    /// Prepares for a block.
    pub(crate) fn start(&mut self, bytes: u32, grain: u32, warps: u32) {
        let shift = grain.clamp(1, 16).ilog2();
        let grains = (bytes as usize).div_ceil(1 << shift);
        if self.shift != shift || self.warps != warps as usize || self.grains.len() < grains {
            self.shift = shift;
            self.warps = warps as usize;
            self.clear(grains);
        }
    }

    fn clear(&mut self, grains: usize) {
        self.grains = vec![Grain::default(); grains];
        self.readers = Vec::new();
        self.writers = Vec::new();
    }

    /// Finds an earlier access that races with one by the lanes of `mask`, and records the new one. Warps that write the value
    /// that is there do not race with who wrote it, because every order leaves the same bytes. Without `note` nothing is
    /// recorded: an asynchronous copy, which writes later, or a product, whose reads are the agent's.
    #[inline(always)]
    #[allow(
        clippy::too_many_arguments,
        reason = "inlined into every access: a struct would be built for each"
    )]
    pub(crate) fn touch(
        &mut self,
        clocks: &Clocks,
        party: u32,
        pc: u32,
        mask: u32,
        at: &[u64; 32],
        access: &Access,
        note: bool,
        stored: &impl Stored,
    ) -> Option<Conflict> {
        let bytes = access.size;
        if bytes < 1 << self.shift {
            // The grain is the smallest access of the kernel; a smaller one can only be a host's own mistake.
            return None;
        }
        if self.era != clocks.era {
            self.era = clocks.era;
            self.clear(self.grains.len());
        }
        let view = clocks.view(party);
        let (strong, volatile) = (access.order.strong, access.order.volatile);
        let n = (bytes >> self.shift) as usize;
        let mut conflict: Option<Conflict> = None;
        for lane in super::lanes(mask) {
            let first = (at[lane] >> self.shift) as usize;
            for g in first..first + n {
                let found = if access.writes() {
                    let (from, size) = ((g as u64) << self.shift, 1 << self.shift);
                    let in_instruction = |other| {
                        // A lane of the same instruction: they meet only at equal addresses.
                        other < lane && mask >> other & 1 != 0 && at[other] == at[lane]
                    };
                    let held = || stored.held(lane, from, size);
                    self.write(g, &view, lane, pc, access, note, in_instruction, held)
                } else {
                    self.read(g, &view, lane, pc, strong, note)
                        .or_else(|| if volatile { self.in_step(g, &view, lane) } else { None })
                };
                if let Some(mut found) = found {
                    if found.same {
                        let differs = |other| at[other] == at[lane] && !stored.same(other, lane);
                        let Some(other) = super::lanes(mask & ((1 << lane) - 1)).find(|o| differs(*o)) else {
                            continue;
                        };
                        found.who = Who::new(view.warp, other);
                    }
                    // A race is told rather than what is none.
                    let first = match conflict {
                        Some(c) if c.step && !found.step => Conflict { lanes: 0, ..found },
                        Some(c) if found.step && !c.step => continue,
                        first => first.unwrap_or(found),
                    };
                    conflict = Some(Conflict { lanes: first.lanes | 1 << lane, ..first });
                }
            }
        }
        conflict
    }

    /// The ordinary store to some of these bytes that a copy, issued by a warp now, may not see because no proxy fence stands
    /// between.
    pub(crate) fn unseen(&self, clocks: &Clocks, warp: u32, at: u64, bytes: u64) -> Option<(Who, u32)> {
        if self.era != clocks.era {
            return None;
        }
        let grains =
            &self.grains[(at >> self.shift) as usize..(at + bytes).div_ceil(1 << self.shift) as usize];
        let grain = grains.iter().find(|g| !clocks.is_seen(warp, g.write_clock, g.writer))?;
        Some((grain.writer, grain.write_pc))
    }

    #[inline(always)]
    fn read(
        &mut self,
        g: usize,
        view: &View<'_>,
        lane: usize,
        pc: u32,
        strong: bool,
        note: bool,
    ) -> Option<Conflict> {
        let me = Who::new(view.warp, lane);
        let grain = &mut self.grains[g];
        if note && !strong && grain.is_past(view) {
            (grain.reader, grain.read_clock, grain.read_pc) = (me, view.clock, pc);
            return None;
        }
        let mut conflict = None;
        // A loop around a compare-and-swap begins with a plain read, as in CUDA's own examples: a stale value costs a
        // round, no more.
        let harmless = grain.strong_write && (strong || grain.swap);
        // Who wrote the value that the others wrote reads it whichever came last.
        let own = |writers: &[u64]| grain.repeated && writers[g] >> (view.warp % 64) & 1 != 0;
        if !harmless && !view.ordered(grain.write_clock, grain.writer, lane) && !own(&self.writers) {
            let (who, pc) = (grain.writer, grain.write_pc);
            conflict = Some(Conflict { who, pc, wrote: true, lane, lanes: 0, same: false, step: false });
        }
        if strong || !note {
            // Strong reads are not kept: a later plain write without ordering is not found out. That is the price of
            // flags that spin without being flagged.
            return conflict;
        }
        if grain.reader == me || grain.read_clock <= view.floor {
            grain.reader = me;
            grain.read_clock = view.clock;
            grain.read_pc = pc;
        } else if grain.reader != Who::MANY && grain.reader.warp() == view.warp {
            let known = view.knows[view.warp];
            let mixed = if grain.read_clock <= known { lane } else { LANES_MIXED };
            grain.reader = Who::new(view.warp, mixed);
            grain.read_clock = view.clock;
            grain.read_pc = pc;
        } else {
            self.add_reader(g, view, lane, pc);
        }
        conflict
    }

    /// A `volatile` read of what another lane of the warp wrote so, and that nothing orders.
    #[inline(never)]
    fn in_step(&self, g: usize, view: &View<'_>, lane: usize) -> Option<Conflict> {
        let grain = &self.grains[g];
        let (who, pc) = (grain.writer, grain.write_pc);
        let apart = who.warp() == view.warp && !view.ordered(grain.write_clock, who, lane);
        (grain.volatile && apart).then_some(Conflict {
            who,
            pc,
            wrote: true,
            lane,
            lanes: 0,
            same: false,
            step: true,
        })
    }

    #[inline(never)]
    fn add_reader(&mut self, g: usize, view: &View<'_>, lane: usize, pc: u32) {
        if self.readers.is_empty() {
            self.readers = vec![0; self.grains.len() * self.warps];
        }
        let row = &mut self.readers[g * self.warps..][..self.warps];
        let grain = &mut self.grains[g];
        if grain.reader != Who::MANY {
            row[grain.reader.warp()] = pack_read(grain.read_clock, grain.reader.lane(), grain.read_pc);
            grain.reader = Who::MANY;
        }
        let own = &mut row[view.warp];
        let known = (*own >> 32) as u32 <= view.knows[view.warp];
        let same = (*own >> PC_BITS & 63) as usize == lane;
        *own = pack_read(view.clock, if known || same { lane } else { LANES_MIXED }, pc);
        grain.read_clock = grain.read_clock.max(view.clock);
    }

    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "inlined, as `touch`")]
    fn write(
        &mut self,
        g: usize,
        view: &View<'_>,
        lane: usize,
        pc: u32,
        access: &Access,
        note: bool,
        in_instruction: impl Fn(usize) -> bool,
        held: impl Fn() -> bool,
    ) -> Option<Conflict> {
        let (strong, swap) = (access.order.strong, access.act == Act::Swap);
        let grain = &mut self.grains[g];
        if note && !strong && grain.is_past(view) {
            let writer = Who::new(view.warp, lane);
            let (write_clock, write_pc, volatile) = (view.clock, pc, access.order.volatile);
            *grain = Grain { write_clock, write_pc, writer, swap, volatile, ..grain.without_writes() };
            return None;
        }
        let mut conflict = None;
        let mut writer = Who::new(view.warp, lane);
        let earlier = grain.writer;
        let mut repeated = false;
        if !(view.ordered(grain.write_clock, grain.writer, lane) || (strong && grain.strong_write)) {
            let by = earlier;
            let same = by.warp() == view.warp
                && grain.write_pc == pc
                && grain.write_clock == view.clock
                && match by.lane() {
                    LANES_MIXED => (0..lane).any(&in_instruction),
                    other => in_instruction(other),
                };
            repeated = !same && held();
            if same || repeated && by.warp() == view.warp {
                writer = Who::new(view.warp, LANES_MIXED);
            }
            if !repeated {
                let pc = grain.write_pc;
                conflict = Some(Conflict { who: by, pc, wrote: true, lane, lanes: 0, same, step: false });
            }
        }
        // Who has read what an unordered store left reads the same after this one.
        if grain.read_clock > view.floor && !swap && !repeated && conflict.is_none_or(|c| c.same) {
            let found = if grain.reader != Who::MANY {
                let ordered = view.ordered(grain.read_clock, grain.reader, lane);
                (!ordered).then_some((grain.reader, grain.read_pc))
            } else {
                let row = &self.readers[g * self.warps..][..self.warps];
                // Counted first, so that the comparison vectorises; looked for only where there is one.
                let late = |(read, known): (&u64, &u32)| (*read >> 32) as u32 > *known;
                let n = row.iter().zip(view.knows).map(|pair| u32::from(late(pair))).sum::<u32>();
                let hit = |v: &usize| {
                    let who = Who::new(*v, (row[*v] >> PC_BITS & 63) as usize);
                    !view.ordered((row[*v] >> 32) as u32, who, lane)
                };
                let v = if n == 0 { None } else { (0..self.warps).find(hit) };
                v.map(|v| {
                    let who = Who::new(v, (row[v] >> PC_BITS & 63) as usize);
                    (who, (row[v] & ((1 << PC_BITS) - 1)) as u32)
                })
            };
            if let Some((who, pc)) = found {
                conflict = Some(Conflict { who, pc, wrote: false, lane, lanes: 0, same: false, step: false });
            }
        }
        // An atomic behind the warp's own plain write, with nothing between that others could have waited for, leaves the
        // record of the plain one: who did not wait for that races with it.
        let own = grain.writer.warp() == view.warp && grain.write_clock == view.clock;
        if note && !(strong && !grain.strong_write && own) {
            grain.write_clock = view.clock;
            grain.write_pc = pc;
            grain.writer = writer;
            grain.strong_write = strong;
            grain.swap = swap;
            grain.volatile = access.order.volatile;
            // Further lanes of the instruction do not change what its first one found.
            grain.repeated &= repeated || conflict.is_some_and(|c| c.same);
            if repeated && earlier.warp() != view.warp {
                self.add_writer(g, earlier.warp(), view.warp);
            }
        }
        conflict
    }

    #[inline(never)]
    fn add_writer(&mut self, g: usize, earlier: usize, warp: usize) {
        if self.writers.is_empty() {
            self.writers = vec![0; self.grains.len()];
        }
        if !std::mem::replace(&mut self.grains[g].repeated, true) {
            self.writers[g] = 1 << (earlier % 64);
        }
        self.writers[g] |= 1 << (warp % 64);
    }
}

// ------------------------------------------------------------------------------------------------------- blocks

/// How far a block's accesses to global memory have been published.
///
/// A block's life is cut into epochs at its fences; an access belongs to one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BlockClock {
    /// The running epoch.
    pub(crate) epoch: u32,
    /// Whether an access belongs to it.
    pub(crate) used: bool,
    /// Epochs that a fence has ended.
    fenced: u32,
    /// Of these, the ones that a strong write has published.
    released: u32,
    /// When the block last acquired: everything published until then is ordered before it.
    pub(crate) acquired: u64,
    /// When it last made a strong load that does not acquire by itself: a fence or a barrier behind it does.
    pub(crate) seen: u64,
    /// When the block last made a strong access.
    pub(crate) strong: u64,
}

impl BlockClock {
    /// A fence, or a barrier: what strong loads have read is acquired.
    pub(crate) fn settle(&mut self) {
        self.acquired = self.acquired.max(self.seen);
    }
}

/// Which epochs of which blocks were published when, in the running launch.
///
/// A block that fences and then writes strongly (an atomic, a volatile, relaxed or releasing store of `.gpu` scope)
/// publishes its accesses before the fence. An atomic that reads, a load that acquires, and another strong load from the block's
/// next fence or barrier on, order after themselves everything published until they read, whatever address that was: coarse, but
/// without false alarms, and without a clock for each pair of blocks. Strong loads also order all earlier strong accesses of
/// other blocks, which may be atomics and flags. A missing fence on either side is found.
#[derive(Debug, Default)]
pub(crate) struct Releases {
    now: AtomicU64,
    blocks: Mutex<(u32, HashMap<u32, Vec<u64>>)>,
}

impl Releases {
    fn of(&self, serial: u32) -> impl std::ops::DerefMut<Target = (u32, HashMap<u32, Vec<u64>>)> + '_ {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if blocks.0 != serial {
            *blocks = (serial, HashMap::new());
        }
        blocks
    }

    /// Whether the accesses of block `by` in `epoch` were published before the time `acquired`.
    pub(crate) fn known(&self, serial: u32, by: u32, epoch: u32, acquired: u64) -> bool {
        let blocks = self.of(serial);
        blocks.1.get(&by).and_then(|times| times.get(epoch as usize)).is_some_and(|time| *time <= acquired)
    }

    /// A fence of a block that reaches other blocks.
    pub(crate) fn fence(block: &mut BlockClock) {
        block.settle();
        if block.used {
            block.epoch = block.epoch.saturating_add(1);
            block.used = false;
        }
        block.fenced = block.epoch;
    }

    /// A strong write of a block.
    pub(crate) fn strong_write(&self, serial: u32, number: u32, block: &mut BlockClock) {
        let time = self.now.fetch_add(1, Relaxed) + 1;
        block.strong = time;
        if block.fenced > block.released {
            block.released = block.fenced;
            let mut blocks = self.of(serial);
            blocks.1.entry(number).or_default().resize(block.fenced as usize, time);
        }
    }

    /// A strong read of a block.
    pub(crate) fn strong_read(&self, block: &mut BlockClock, acquires: bool) {
        block.strong = self.now.load(Relaxed);
        block.seen = block.strong;
        if acquires {
            block.settle();
        }
    }
}
