//! The race check of global memory between the warps of a block.
//!
//! A table holds lines of 64 bytes with up to four earlier accesses of warps to each: bytes, clock of the warp ([`Clocks`]),
//! read or write. Only lines of allocations that the block has written to are followed, because most are only read. A line
//! takes the place of the one that has its entry of the table, and a fifth access that of an earlier one: both may hide a race,
//! and neither invents one.
//!
//! Warps that write the value that is there do not race with who wrote it, as in shared memory.
//!
//! [`Clocks`]: super::race::Clocks

use super::access::{Access, Act, Part};
use super::blocks::LINE;
use super::race::{View, Who};
use crate::error::ErrorKind;
use crate::machine::context::Context;
use crate::machine::registers::LANES;

/// Entries of a block's table: 256 KiB, as much as stays in a core's own cache.
const ENTRIES: usize = 1 << 11;
/// Accesses that a line is known by.
const TOUCHES: usize = 4;

/// A warp's access to bytes of a line.
#[derive(Clone, Copy, Debug, Default)]
struct Touch {
    /// The bytes, one bit each.
    bytes: u64,
    /// The warp's clock.
    clock: u32,
    /// The instruction.
    pc: u32,
    /// Which warp, and a lane of it.
    who: Who,
    write: bool,
    strong: bool,
    /// Whether it was a compare-and-swap.
    swap: bool,
    /// Whether other warps wrote the same value, or this one wrote what was there.
    repeated: bool,
}

impl Touch {
    fn like(&self, other: &Self) -> bool {
        self.who.warp() == other.who.warp()
            && (self.write, self.strong, self.swap) == (other.write, other.strong, other.swap)
    }

    fn conflicts(&self, earlier: &Self) -> bool {
        self.who.warp() != earlier.who.warp()
            && self.bytes & earlier.bytes != 0
            && (self.write || earlier.write)
            && !(self.strong && earlier.strong)
            // A loop around a compare-and-swap begins with a plain read; see the race check of shared memory.
            && (self.write || !earlier.swap) && (earlier.write || !self.swap)
    }
}

/// A line, by its number in the address space.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(128))]
struct Entry {
    line: u64,
    /// Entries of other blocks say nothing.
    era: u32,
    known: u32,
    touches: [Touch; TOUCHES],
}

/// Earlier accesses of other warps.
#[derive(Clone, Copy, Debug, Default)]
struct Conflicts {
    read: Option<Touch>,
    write: Option<Touch>,
}

impl Conflicts {
    fn first(&self) -> Option<Touch> {
        self.write.or(self.read)
    }
}

/// A store over what another warp wrote, which is no race if it leaves the bytes as they are.
#[derive(Clone, Debug)]
pub(crate) struct Overwrite {
    /// The line, and its number in the allocation.
    line: u64,
    number: u64,
    earlier: Touch,
    /// The bytes of both.
    bytes: u64,
    /// A read of bytes that no other warp wrote, which is a race whatever is stored.
    read: Option<Touch>,
    /// What they held.
    held: [u8; LINE as usize],
}

/// The accesses of a block's warps to global memory.
#[derive(Debug, Default)]
pub(crate) struct WarpLines {
    entries: Vec<Entry>,
    era: u32,
    /// First addresses of the allocations that the block has written to.
    written: Vec<u64>,
    /// Stores whose effect is not known yet.
    overwrites: Vec<Overwrite>,
}

impl WarpLines {
    /// A block begins.
    pub(crate) fn start(&mut self) {
        self.written.clear();
        self.overwrites.clear();
        self.era = self.era.wrapping_add(1);
        if self.era == 0 {
            (self.entries, self.era) = (Vec::new(), 1);
        }
    }

    /// Whether an access to the allocation that starts at an address has to be looked at.
    #[inline(always)]
    fn concerns(&mut self, start: u64, writes: bool) -> bool {
        if self.written.contains(&start) {
            return true;
        }
        if writes {
            self.written.push(start);
        }
        writes
    }

    fn entry(&mut self, line: u64) -> &mut Entry {
        if self.entries.is_empty() {
            self.entries = vec![Entry::default(); ENTRIES];
        }
        let entry = &mut self.entries[(line.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53) as usize % ENTRIES];
        if entry.line != line || entry.era != self.era {
            (entry.line, entry.era, entry.known) = (line, self.era, 0);
        }
        entry
    }

    /// Records an access, and gives an earlier read and an earlier write of other warps that nothing orders before it.
    #[inline(always)]
    fn touch(&mut self, line: u64, mine: &Touch, view: &View<'_>) -> Conflicts {
        let entry = self.entry(line);
        let known = &mut entry.touches[..entry.known as usize];
        let mut conflicts = Conflicts::default();
        let mut place = None;
        for (i, touch) in known.iter().enumerate() {
            if mine.conflicts(touch) && !view.ordered(touch.clock, touch.who, 0) {
                let kind = if touch.write { &mut conflicts.write } else { &mut conflicts.read };
                kind.get_or_insert(*touch);
            }
            // An older clock's bytes keep it, unless all of them are touched anew.
            let merges = mine.like(touch) && (touch.clock == mine.clock || touch.bytes & !mine.bytes == 0);
            if merges && place.is_none() {
                place = Some(i);
            }
        }
        // Who wrote the value that the others wrote reads it whichever came last.
        if let Some(c) = conflicts.write.filter(|c| c.repeated && !mine.write) {
            let both = c.bytes & mine.bytes;
            let own = |t: &Touch| t.repeated && t.who.warp() == mine.who.warp() && both & !t.bytes == 0;
            conflicts.write = conflicts.write.filter(|_| !known.iter().any(own));
        }
        match place {
            Some(i) => {
                let old = known[i];
                known[i] = Touch { bytes: old.bytes | mine.bytes, repeated: old.repeated, ..*mine };
            }
            None if known.len() < TOUCHES => {
                entry.touches[entry.known as usize] = *mine;
                entry.known += 1;
            }
            None => {
                let past = known.iter().position(|t| t.clock <= view.floor);
                let gone = past.or_else(|| known.iter().position(|t| !t.write)).unwrap_or(0);
                known[gone] = *mine;
            }
        }
        conflicts
    }

    /// Several warps wrote the same to these bytes of a line.
    fn repeat(&mut self, line: u64, bytes: u64) {
        let entry = self.entry(line);
        let known = entry.known as usize;
        let same = entry.touches[..known].iter_mut().filter(|t| t.write && t.bytes & bytes != 0);
        same.for_each(|t| t.repeated = true);
    }
}

impl<'a> Context<'a> {
    /// Looks for races between a part of an access and the accesses of the block's other warps.
    #[inline(never)]
    pub(super) fn race_warps(&mut self, part: &Part<'a>, at: &[u64; LANES], access: &Access) {
        let block = &mut *self.block;
        let (lines, start) = (&mut block.warp_lines, part.allocation.start);
        if !lines.concerns(start, access.writes()) {
            return;
        }
        let party = block.clocks.party(self.warp.id);
        let view = block.clocks.view(party);
        let mut mine = Touch {
            bytes: 0,
            clock: view.clock,
            pc: self.pc,
            who: Who::of(party as usize, part.lanes),
            write: access.writes(),
            strong: access.order.strong,
            swap: access.act == Act::Swap,
            repeated: false,
        };
        let strict = self.launch.checks.repeated;
        let mut found: Option<(u64, Touch)> = None;
        part.lines(at, access.size, |number, bytes| {
            mine.bytes = bytes;
            let line = start / LINE + number;
            let conflicts = lines.touch(line, &mine, &view);
            let Some(earlier) = conflicts.first() else { return };
            let both = earlier.bytes & bytes;
            if access.act == Act::Write && earlier.write && !strict {
                let read = conflicts.read.map(|read| Touch { bytes: read.bytes & bytes & !both, ..read });
                let read = read.filter(|read| read.bytes != 0);
                let mut held = [0; LINE as usize];
                let end = (number * LINE + LINE).min(part.allocation.bytes) as usize;
                part.allocation
                    .data
                    .read((number * LINE) as usize, &mut held[..end - (number * LINE) as usize]);
                lines.overwrites.push(Overwrite { line, number, earlier, bytes: both, read, held });
            } else {
                found.get_or_insert((number * LINE + u64::from(both.trailing_zeros()), earlier));
            }
        });
        if let Some((offset, earlier)) = found {
            self.block.warp_lines.overwrites.clear();
            self.report_warps(part, at, access, offset, &earlier);
        }
    }

    /// After a store: those over what other warps wrote are races if they changed it.
    #[inline(always)]
    pub(crate) fn settle_overwrites(&mut self, part: &Part<'a>, at: &[u64; LANES], access: &Access) {
        if !self.block.warp_lines.overwrites.is_empty() {
            self.judge_overwrites(part, at, access);
        }
    }

    #[cold]
    fn judge_overwrites(&mut self, part: &Part<'a>, at: &[u64; LANES], access: &Access) {
        let mut wrong = None;
        for o in std::mem::take(&mut self.block.warp_lines.overwrites) {
            let from = o.number * LINE;
            let mut holds = [0; LINE as usize];
            let end = (from + LINE).min(part.allocation.bytes);
            part.allocation.data.read(from as usize, &mut holds[..(end - from) as usize]);
            let changed =
                (0..LINE).find(|i| o.bytes >> i & 1 != 0 && holds[*i as usize] != o.held[*i as usize]);
            let read = o.read.map(|read| (from + u64::from(read.bytes.trailing_zeros()), read));
            match changed.map(|i| (from + i, o.earlier)).or(read) {
                None => self.block.warp_lines.repeat(o.line, o.bytes),
                Some(found) => _ = wrong.get_or_insert(found),
            }
        }
        if let Some((offset, earlier)) = wrong {
            self.report_warps(part, at, access, offset, &earlier);
        }
    }

    #[cold]
    fn report_warps(
        &mut self,
        part: &Part<'a>,
        at: &[u64; LANES],
        access: &Access,
        offset: u64,
        earlier: &Touch,
    ) {
        let lane =
            part.lane_of(at, access.size, offset).unwrap_or(part.lanes.trailing_zeros() as usize % LANES);
        let address = part.allocation.start + offset;
        let (place, other) = (self.launch.memory.describe(address), self.block.clocks.describe(earlier.who));
        let (did, verb) =
            (if earlier.write { "wrote" } else { "read" }, if access.writes() { "writes" } else { "reads" });
        let warp = self.warp.id;
        self.finding(ErrorKind::GlobalRace, 1 << lane, Some(earlier.pc), || {
            format!(
                "{place} ({address:#x}): lane {lane} of warp {warp} {verb} what {other} {did} without a barrier between"
            )
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::memory::race::Clocks;

    fn touch(warp: usize, bytes: u64, write: bool, clock: u32) -> Touch {
        Touch { bytes, clock, pc: 7, who: Who::new(warp, 0), write, ..Touch::default() }
    }

    #[test]
    fn only_allocations_that_the_block_wrote_are_followed() {
        let mut lines = WarpLines::default();
        lines.start();
        assert!(!lines.concerns(64, false) && lines.concerns(64, true) && lines.concerns(64, false));
        lines.start();
        assert!(!lines.concerns(64, false));
    }

    #[test]
    fn barriers_order_and_bytes_part() {
        let (mut lines, mut clocks) = (WarpLines::default(), Clocks::default());
        clocks.start(1, 2, false);
        lines.start();
        let mut step = |clocks: &Clocks, warp: usize, bytes, write| {
            let view = clocks.view(warp as u32);
            lines.touch(9, &touch(warp, bytes, write, view.clock), &view).first().is_some()
        };
        assert!(!step(&clocks, 0, 0xff, true) && !step(&clocks, 0, 0xff, false), "its own");
        assert!(!step(&clocks, 1, 0xff00, true), "other bytes");
        assert!(step(&clocks, 1, 0x1, false), "what it did not wait for");
        clocks.barrier(&[0, 1], &[0, 1]);
        assert!(!step(&clocks, 1, 0xff, true), "behind the barrier");
        assert!(step(&clocks, 0, 0x80, true), "and then again");
    }

    #[test]
    fn a_value_that_several_wrote_may_be_read_by_these() {
        let (mut lines, mut clocks) = (WarpLines::default(), Clocks::default());
        clocks.start(1, 3, false);
        lines.start();
        for warp in 0..2 {
            let view = clocks.view(warp);
            lines.touch(1, &touch(warp as usize, 15, true, view.clock), &view);
            lines.repeat(1, 15);
        }
        let mut reads = |warp: u32| {
            let view = clocks.view(warp);
            lines.touch(1, &touch(warp as usize, 15, false, view.clock), &view).first().is_some()
        };
        assert!(!reads(0) && !reads(1) && reads(2));
    }
}
