//! Shared memory of a block.

use super::buffer::Cell;
use super::lanes;
use super::mbarrier::Mbarriers;
use super::race::{Shadow, Who};
use crate::machine::registers::LANES;

/// The bytes of shared memory, and which of them are initialised.
#[derive(Clone, Copy)]
pub(crate) struct Contents<'a> {
    pub(crate) bytes: &'a [u8],
    written: &'a [u64],
}

impl Contents<'_> {
    /// Whether all bytes of an aligned piece of up to 64 bytes are initialised.
    #[inline(always)]
    pub(crate) fn is_written(&self, at: u64, bytes: u64) -> bool {
        let want = (u64::MAX >> (64 - bytes)) << (at % 64);
        self.written[(at / 64) as usize] & want == want
    }
}

/// Bytes of shared memory that are the system's, as on hardware since sm_80.
const RESERVED_BYTES: u32 = 1024;
/// Where they may begin.
const RESERVED_ALIGN: u64 = 128;

/// Shared memory of a block.
#[derive(Debug, Default)]
pub struct SharedMemory {
    /// The block's, and behind that the system's where the kernel uses it.
    bytes: Vec<u8>,
    /// How many are the block's.
    own: u64,
    /// Initialised bytes, a bit each.
    written: Vec<u64>,
    /// The last accesses to each piece of memory, for the race check.
    pub(crate) shadow: Shadow,
    /// What asynchronous copies will write.
    copying: Marks,
    /// What bulk copies will read.
    reading: Marks,
    /// The mbarriers that lie there.
    pub(crate) mbarriers: Mbarriers,
}

/// Words of 4 bytes that asynchronous copies are about to touch, a bit each, and by which lane of which warp and which
/// instruction.
#[derive(Debug, Default)]
struct Marks {
    words: Vec<u64>,
    by: Vec<(Who, u32)>,
    /// Whether any bit may be set.
    any: bool,
}

impl Marks {
    fn clear(&mut self) {
        if std::mem::take(&mut self.any) {
            self.words.fill(0);
        }
    }

    /// Marks bytes (multiples of 4) of a memory of `len` bytes.
    fn set(&mut self, len: usize, at: u64, bytes: u64, by: Who, pc: u32) {
        let words = len.div_ceil(4);
        if self.by.len() < words {
            self.words.resize(words.div_ceil(64), 0);
            self.by.resize(words, (Who::default(), 0));
        }
        self.any = true;
        for word in (at / 4) as usize..((at + bytes) / 4) as usize {
            self.words[word / 64] |= 1 << (word % 64);
            self.by[word] = (by, pc);
        }
    }

    fn unset(&mut self, at: u64, bytes: u64) {
        for word in (at / 4) as usize..((at + bytes) / 4) as usize {
            self.words[word / 64] &= !(1 << (word % 64));
        }
    }

    /// The lanes of an access that meet marks, and whose mark the first of them meets.
    fn find(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, Who, u32)> {
        let mut found: Option<(u32, Who, u32)> = None;
        for lane in lanes(mask) {
            let words = (at[lane] / 4) as usize..=((at[lane] + bytes - 1) / 4) as usize;
            for word in words {
                if self.words[word / 64] >> (word % 64) & 1 != 0 {
                    let (by, pc) = self.by[word];
                    found.get_or_insert((0, by, pc)).0 |= 1 << lane;
                    break;
                }
            }
        }
        found
    }
}

impl SharedMemory {
    /// Prepares for a new block: `bytes` uninitialised bytes, all zero; `grain` is the smallest access. With `reserved` there are
    /// bytes of the system's behind them, which are zeros that may be read: cooperative groups begin with them as they are.
    pub fn start(&mut self, bytes: u32, reserved: bool, grain: u32, warps: u32) {
        self.own = u64::from(bytes);
        let bytes = if reserved { self.reserved_at() + RESERVED_BYTES } else { bytes };
        self.shadow.start(bytes, grain, warps);
        self.copying.clear();
        self.reading.clear();
        self.mbarriers.clear();
        self.bytes.clear();
        self.bytes.resize(bytes as usize, 0);
        self.written.clear();
        self.written.resize((bytes as usize).div_ceil(64), 0);
        if reserved {
            // They begin with a word of this set.
            let first = self.reserved_at() as usize / 64;
            self.written[first..].fill(u64::MAX);
        }
    }

    /// The record of accesses, and beside it what they find.
    #[inline(always)]
    pub(crate) fn parts(&mut self) -> (&mut Shadow, Contents<'_>) {
        (&mut self.shadow, Contents { bytes: &self.bytes, written: &self.written })
    }

    /// How many bytes the block has.
    pub fn len(&self) -> u64 {
        self.own
    }

    /// Where the system's bytes begin.
    pub(crate) fn reserved_at(&self) -> u32 {
        self.own.next_multiple_of(RESERVED_ALIGN) as u32
    }

    /// Whether an access lies in the system's bytes.
    pub(crate) fn is_reserved(&self, at: u64, bytes: u64) -> bool {
        at >= u64::from(self.reserved_at()) && at.saturating_add(bytes) <= self.bytes.len() as u64
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.own == 0
    }

    /// Reads a value; the caller has checked the bounds.
    #[inline(always)]
    pub(crate) fn read<T: Cell>(&self, at: u64) -> T {
        T::from_bytes(&self.bytes[at as usize..at as usize + T::BYTES])
    }

    /// Writes a value; the caller has checked the bounds.
    #[inline(always)]
    pub(crate) fn write<T: Cell>(&mut self, at: u64, value: T) {
        value.to_bytes(&mut self.bytes[at as usize..at as usize + T::BYTES]);
    }

    /// Reads one value for each lane, `step` values apart, from the first lane's address on.
    #[inline(always)]
    pub(crate) fn read_run<T: Cell>(&self, at: u64, step: usize) -> [T; LANES] {
        let bytes = &self.bytes[at as usize..][..(LANES - 1) * step * T::BYTES + T::BYTES];
        std::array::from_fn(|lane| T::from_bytes(&bytes[lane * step * T::BYTES..][..T::BYTES]))
    }

    /// Writes one value for each lane, one behind the other from the first lane's address on.
    #[inline(always)]
    pub(crate) fn write_run<T: Cell>(&mut self, at: u64, values: &[T; LANES]) {
        let bytes = &mut self.bytes[at as usize..][..LANES * T::BYTES];
        for (to, value) in bytes.chunks_exact_mut(T::BYTES).zip(values) {
            value.to_bytes(to);
        }
    }

    /// Whether all of these bytes are initialised.
    pub(crate) fn all_written(&self, at: u64, bytes: u64) -> bool {
        let end = at + bytes;
        (at / 64..end.div_ceil(64)).all(|word| {
            let low = u64::MAX << at.saturating_sub(word * 64).min(63);
            let high = u64::MAX >> (word * 64 + 64).saturating_sub(end);
            self.written[word as usize] & low & high == low & high
        })
    }

    /// Whether all bytes of an aligned access of up to 64 bytes are initialised.
    #[inline(always)]
    pub(crate) fn is_written(&self, at: u64, bytes: u64) -> bool {
        Contents { bytes: &self.bytes, written: &self.written }.is_written(at, bytes)
    }

    /// Notes for an aligned access of up to 64 bytes whether its bytes now hold a written value.
    #[inline(always)]
    pub(crate) fn set_written(&mut self, at: u64, bytes: u64, written: bool) {
        let bits = (u64::MAX >> (64 - bytes)) << (at % 64);
        let word = &mut self.written[(at / 64) as usize];
        *word = if written { *word | bits } else { *word & !bits };
    }

    /// Notes that a lane's copy will write these bytes (multiples of 4).
    pub(crate) fn begin_copy(&mut self, at: u64, bytes: u64, by: Who, pc: u32) {
        self.copying.set(self.bytes.len(), at, bytes, by, pc);
    }

    /// Notes that a copy has written these bytes.
    pub(crate) fn end_copy(&mut self, at: u64, bytes: u64) {
        self.copying.unset(at, bytes);
    }

    /// Notes that a lane's copy will read these bytes (multiples of 4).
    pub(crate) fn begin_reading(&mut self, at: u64, bytes: u64, by: Who, pc: u32) {
        self.reading.set(self.bytes.len(), at, bytes, by, pc);
    }

    /// Notes that a copy has read these bytes.
    pub(crate) fn end_reading(&mut self, at: u64, bytes: u64) {
        self.reading.unset(at, bytes);
    }

    /// The lanes whose bytes a copy will still read, and the copy that the first of them meets.
    #[inline(always)]
    pub(crate) fn reading(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, Who, u32)> {
        if self.reading.any { self.reading.find(mask, at, bytes) } else { None }
    }

    /// Some of the bytes; the caller has checked the bounds.
    pub(crate) fn bytes(&self, at: u64, bytes: u64) -> &[u8] {
        &self.bytes[at as usize..(at + bytes) as usize]
    }

    /// The same, to be changed.
    pub(crate) fn bytes_mut(&mut self, at: u64, bytes: u64) -> &mut [u8] {
        &mut self.bytes[at as usize..(at + bytes) as usize]
    }

    /// Notes whether any number of bytes now hold written values.
    pub(crate) fn set_all_written(&mut self, at: u64, bytes: u64, written: bool) {
        let mut from = at;
        while from < at + bytes {
            let n = (64 - from % 64).min(at + bytes - from);
            self.set_written(from, n, written);
            from += n;
        }
    }

    /// The lanes whose bytes a copy will still write, and the copy that the first of them meets.
    #[inline(always)]
    pub(crate) fn copying(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, Who, u32)> {
        if self.copying.any { self.copying.find(mask, at, bytes) } else { None }
    }
}
