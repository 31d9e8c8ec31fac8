//! Shared memory of a block.

use super::buffer::Cell;
use super::lanes;
use super::race::{Shadow, Who};
use crate::machine::registers::LANES;

/// Shared memory of a block.
#[derive(Debug, Default)]
pub struct SharedMemory {
    bytes: Vec<u8>,
    /// Initialised bytes, a bit each.
    written: Vec<u64>,
    /// The last accesses to each piece of memory, for the race check.
    pub(crate) shadow: Shadow,
    /// Words of 4 bytes that asynchronous copies will write, a bit each, and by which lane of which warp and which
    /// instruction.
    copying: Vec<u64>,
    copying_by: Vec<(Who, u32)>,
    /// Whether any bit of `copying` may be set.
    copies: bool,
}

impl SharedMemory {
    /// Prepares for a new block: `bytes` uninitialised bytes, all zero; `grain` is the smallest access.
    pub fn start(&mut self, bytes: u32, grain: u32, warps: u32) {
        self.shadow.start(bytes, grain, warps);
        if std::mem::take(&mut self.copies) {
            self.copying.fill(0);
        }
        self.bytes.clear();
        self.bytes.resize(bytes as usize, 0);
        self.written.clear();
        self.written.resize((bytes as usize).div_ceil(64), 0);
    }

    /// How many bytes there are.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
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
        let want = (u64::MAX >> (64 - bytes)) << (at % 64);
        self.written[(at / 64) as usize] & want == want
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
        let words = self.bytes.len().div_ceil(4);
        if self.copying_by.len() < words {
            self.copying.resize(words.div_ceil(64), 0);
            self.copying_by.resize(words, (Who::default(), 0));
        }
        self.copies = true;
        for word in (at / 4) as usize..((at + bytes) / 4) as usize {
            self.copying[word / 64] |= 1 << (word % 64);
            self.copying_by[word] = (by, pc);
        }
    }

    /// Notes that a copy has written these bytes.
    pub(crate) fn end_copy(&mut self, at: u64, bytes: u64) {
        for word in (at / 4) as usize..((at + bytes) / 4) as usize {
            self.copying[word / 64] &= !(1 << (word % 64));
        }
    }

    /// The lanes whose bytes a copy will still write, and the copy that the first of them meets.
    #[inline(always)]
    pub(crate) fn copying(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, Who, u32)> {
        if self.copies { self.find_copying(mask, at, bytes) } else { None }
    }

    fn find_copying(&self, mask: u32, at: &[u64; LANES], bytes: u64) -> Option<(u32, Who, u32)> {
        let mut found: Option<(u32, Who, u32)> = None;
        for lane in lanes(mask) {
            let words = (at[lane] / 4) as usize..=((at[lane] + bytes - 1) / 4) as usize;
            for word in words {
                if self.copying[word / 64] >> (word % 64) & 1 != 0 {
                    let (by, pc) = self.copying_by[word];
                    found.get_or_insert((0, by, pc)).0 |= 1 << lane;
                    break;
                }
            }
        }
        found
    }
}
