//! The race check of global memory between blocks: who touched which bytes in this launch.
//!
//! Memory is cut into lines of 64 bytes. Each line has up to four records of earlier accesses: block, epoch
//! ([`BlockClock`]), read or write, and bytes. A warp's access to whole lines, the usual case, costs one record a line.
//! A fifth record replaces the oldest read: that may hide a race, and never invents one.
//!
//! Accesses of warps of the same block are not compared with each other here: `warps` does that.
//!
//! [`BlockClock`]: super::race::BlockClock

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use super::access::{Access, Act, Part};
use super::buffer::Buffer;
use crate::error::{ErrorKind, Finding, Threads};
use crate::machine::context::Context;
use crate::machine::registers::LANES;

/// Bytes of a line.
pub(crate) const LINE: u64 = 64;

/// One block's accesses to bytes of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The bytes, one bit each.
    pub(crate) bytes: u64,
    /// The block.
    pub(crate) block: u32,
    /// Its epoch; for strong accesses the time of it.
    pub(crate) epoch: u32,
    /// The last instruction.
    pub(crate) pc: u32,
    /// Its warp in the block.
    pub(crate) warp: u8,
    /// A lane of it.
    pub(crate) lane: u8,
    /// Whether it wrote.
    pub(crate) write: bool,
    /// Whether it was strong, with a scope that reaches other blocks.
    pub(crate) strong: bool,
    /// Whether it was a compare-and-swap.
    pub(crate) swap: bool,
}

impl Record {
    fn pack(&self) -> [u64; 3] {
        let flags = u64::from(self.warp) << 16
            | u64::from(self.lane) << 8
            | u64::from(self.write)
            | u64::from(self.strong) << 1
            | u64::from(self.swap) << 2;
        [self.bytes, u64::from(self.block) << 32 | u64::from(self.epoch), u64::from(self.pc) << 32 | flags]
    }

    fn unpack([bytes, who, what]: [u64; 3]) -> Self {
        Self {
            bytes,
            block: (who >> 32) as u32,
            epoch: who as u32,
            pc: (what >> 32) as u32,
            warp: (what >> 16) as u8,
            lane: (what >> 8) as u8,
            write: what & 1 != 0,
            strong: what & 2 != 0,
            swap: what & 4 != 0,
        }
    }

    fn conflicts(&self, other: &Self) -> bool {
        self.block != other.block
            && self.bytes & other.bytes != 0
            && (self.write || other.write)
            && !(self.strong && other.strong)
            // A loop around a compare-and-swap begins with a plain read; see the race check of shared memory.
            && (self.write || !other.swap) && (other.write || !self.swap)
    }
}

/// Records of an allocation. Words of 8 for each line: a head (launch, number of records, lock) and two records in
/// `near`, two more in `far`, whose pages exist only where blocks share lines.
pub(crate) struct Lines {
    near: Buffer,
    far: Buffer,
}

const WORDS: usize = 8;
const RECORDS: usize = 4;
const LOCK: u64 = 1;

impl Lines {
    /// For `bytes` bytes.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let words = usize::try_from(bytes.div_ceil(LINE)).ok()?.checked_mul(WORDS)?;
        Some(Self { near: Buffer::zeroed(words)?, far: Buffer::zeroed(words)? })
    }

    fn slot(&self, line: usize, i: usize) -> &[AtomicU64] {
        let buffer = if i < 2 { &self.near } else { &self.far };
        &buffer.u64s()[line * WORDS + 1 + i % 2 * 3..][..3]
    }

    fn get(&self, line: usize, i: usize) -> Record {
        let slot = self.slot(line, i);
        Record::unpack([slot[0].load(Relaxed), slot[1].load(Relaxed), slot[2].load(Relaxed)])
    }

    fn set(&self, line: usize, i: usize, record: &Record) {
        for (word, value) in self.slot(line, i).iter().zip(record.pack()) {
            word.store(value, Relaxed);
        }
    }

    /// Records an access and returns another block's access that races with it. `ordered` is whether a record's access
    /// happens before the running block's.
    #[inline(always)]
    pub(crate) fn touch(
        &self,
        line: usize,
        serial: u32,
        mine: &Record,
        ordered: impl Fn(&Record) -> bool,
    ) -> Option<Record> {
        let head = &self.near.u64s()[line * WORDS];
        let mut old = head.load(Relaxed) & !LOCK;
        while let Err(now) = head.compare_exchange_weak(old, old | LOCK, Acquire, Relaxed) {
            old = now & !LOCK;
            std::hint::spin_loop();
        }
        let mut n = if (old >> 32) as u32 == serial { (old as u32 >> 1) as usize } else { 0 };
        let mut conflict = None;
        let mut merged = false;
        for i in 0..n {
            let record = self.get(line, i);
            if record.conflicts(mine) && conflict.is_none() && !ordered(&record) {
                conflict = Some(record);
            }
            let like = record.block == mine.block
                && record.write == mine.write
                && record.strong == mine.strong
                && record.swap == mine.swap;
            // An older epoch's bytes keep it, unless all of them are touched anew.
            if like && !merged && (record.epoch == mine.epoch || record.bytes & !mine.bytes == 0) {
                self.set(line, i, &Record { bytes: record.bytes | mine.bytes, ..*mine });
                merged = true;
            }
        }
        if !merged {
            if n == RECORDS {
                let gone = (0..n).find(|i| !self.get(line, *i).write).unwrap_or(0);
                for i in gone..RECORDS - 1 {
                    self.set(line, i, &self.get(line, i + 1));
                }
                n -= 1;
            }
            self.set(line, n, mine);
            n += 1;
        }
        head.store(u64::from(serial) << 32 | (n as u64) << 1, Release);
        conflict
    }
}

impl<'a> Context<'a> {
    /// Looks for races between a part of an access and the accesses of other blocks.
    #[inline(never)]
    pub(super) fn race_global(&mut self, part: &Part<'a>, at: &[u64; LANES], access: &Access) {
        let Some(shadow) = &part.allocation.lines else { return };
        let launch = self.launch;
        // Saturates: strong accesses from number 2^32 - 1 on share one time, and a block that acquired at that time counts
        // them all as ordered. A race between such accesses may be missed; none is invented.
        let time = |t: u64| t.min(u64::from(u32::MAX)) as u32;
        let strong = access.order.strong && self.reaches(access.order);
        let block = &mut self.block.epochs;
        block.used = true;
        let (acquired, seen) = (block.acquired, block.acquired.max(block.seen));
        let mut mine = Record {
            bytes: 0,
            block: self.block.number as u32,
            epoch: if strong { time(block.strong) } else { block.epoch },
            pc: self.pc,
            warp: self.warp.id as u8,
            lane: part.lanes.trailing_zeros() as u8,
            write: access.writes(),
            strong,
            swap: access.act == Act::Swap,
        };
        let ordered = |r: &Record| match r.strong {
            true => r.epoch <= time(seen),
            false => launch.memory.releases.known(launch.serial, r.block, r.epoch, acquired),
        };
        let mut found: Option<(u64, Record)> = None;
        part.lines(at, access.size, |line, bytes| {
            mine.bytes = bytes;
            if let Some(other) = shadow.touch(line as usize, launch.serial, &mine, ordered) {
                let first = (bytes & other.bytes).trailing_zeros();
                found.get_or_insert((line * LINE + u64::from(first), other));
            }
        });
        if let Some((offset, other)) = found {
            let address = part.allocation.start + offset;
            mine.lane = part.lane_of(at, access.size, offset).map_or(mine.lane, |lane| lane as u8);
            self.report_blocks(address, &mine, &other);
        }
    }

    /// Reports a race between blocks. The higher block counts as the one that comes second, whichever it was, so that
    /// the report depends less on the order in which host threads ran them.
    #[cold]
    fn report_blocks(&mut self, address: u64, mine: &Record, other: &Record) {
        let (second, first) = if mine.block > other.block { (mine, other) } else { (other, mine) };
        if self.worker.seen(ErrorKind::GlobalRace, second.pc) {
            return;
        }
        let verb = |r: &Record| match (r.strong, r.write) {
            (true, true) => "updates",
            (false, true) => "writes",
            (_, false) => "reads",
        };
        let message = format!(
            "block {} {} {} ({address:#x}), block {} {} it, and nothing orders the two",
            first.block,
            verb(first),
            self.launch.memory.describe(address),
            second.block,
            verb(second),
        );
        let [x, y, _] = self.launch.grid.map(u64::from);
        let number = u64::from(second.block);
        let index = [number % x, number / x % y, number / (x * y)].map(|i| i as u32);
        let finding = Finding {
            kind: ErrorKind::GlobalRace,
            kernel: self.launch.kernel_name().to_owned(),
            at: self.launch.place(second.pc),
            other: Some(self.launch.place(first.pc)),
            threads: Some(Threads { block: index, warp: u32::from(second.warp), lanes: 1 << second.lane }),
            message,
            count: 1,
        };
        self.worker.record(second.pc, self.launch.order_of(number), finding);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(block: u32, bytes: u64, write: bool) -> Record {
        Record { bytes, block, epoch: 0, pc: 7, warp: 1, lane: 2, write, strong: false, swap: false }
    }

    #[test]
    fn blocks_that_share_bytes_conflict() {
        let lines = Lines::new(256).unwrap();
        let touch = |serial, r: Record| lines.touch(1, serial, &r, |_| false);
        assert_eq!(touch(1, record(0, 0xff, true)), None);
        assert_eq!(touch(1, record(1, 0xff00, true)), None, "other bytes of the line");
        assert_eq!(touch(1, record(0, 0xff, false)), None, "its own");
        assert_eq!(touch(1, record(2, 0x10, false)), Some(record(0, 0xff, true)));
        assert_eq!(touch(2, record(3, 0xff, false)), None, "another launch");
        assert_eq!(touch(2, record(4, 0xff, false)), None, "readers alone");
        assert!(touch(2, record(4, 0xff, true)).is_some());
        let atomic = |block| Record { strong: true, ..record(block, 15, true) };
        assert_eq!(touch(3, atomic(0)), None);
        assert_eq!(touch(3, atomic(1)), None);
        assert!(touch(3, record(2, 1, false)).is_some());
    }

    #[test]
    fn many_readers_leave_the_writer_known() {
        let lines = Lines::new(64).unwrap();
        let touch = |r: Record| lines.touch(0, 1, &r, |_| false);
        assert_eq!(touch(record(0, 1, true)), None);
        for block in 1..50 {
            assert_eq!(touch(record(block, 2, false)), None);
        }
        assert_eq!(touch(record(99, 1, false)), Some(record(0, 1, true)));
        assert!(touch(record(100, 2, true)).is_some());
    }

    #[test]
    fn what_is_ordered_is_no_race() {
        let lines = Lines::new(64).unwrap();
        assert_eq!(lines.touch(0, 1, &record(0, 1, true), |_| false), None);
        assert_eq!(lines.touch(0, 1, &record(1, 1, true), |r| r.block == 0), None);
        // The ordered record is still there for those who do not know it.
        assert_eq!(lines.touch(0, 1, &record(2, 1, false), |r| r.block == 1), Some(record(0, 1, true)));
    }
}
