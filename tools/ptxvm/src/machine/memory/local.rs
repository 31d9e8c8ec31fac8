//! Local memory of a warp's threads: the stack of frames.
//!
//! Words of the 32 threads lie side by side, as on hardware, because spilled registers and arguments are accessed at the
//! same address by all lanes: such an access is one row.

use super::buffer::Cell;
use crate::machine::registers::LANES;

/// Local memory of the 32 threads of a warp.
#[derive(Debug, Default)]
pub struct LocalMemory {
    words: Vec<[u32; LANES]>,
    /// For each word and lane a bit for each of its 4 bytes: the low four of those that are initialised, the high four of those
    /// that are a variable's.
    defined: Vec<[u8; LANES]>,
}

impl LocalMemory {
    /// Makes `bytes` bytes exist for each thread.
    pub fn reserve(&mut self, bytes: u32) {
        let words = bytes.div_ceil(4) as usize;
        if self.words.len() < words {
            self.words.resize(words, [0; LANES]);
            self.defined.resize(words, [0; LANES]);
        }
    }

    /// Bytes of each thread.
    pub fn bytes(&self) -> u64 {
        self.words.len() as u64 * 4
    }

    /// A frame of `bytes` bytes begins at `base`, in the lanes of `mask`: nothing in it was written, and only the pieces in
    /// `live`, offset and bytes, are variables'.
    pub fn begin(&mut self, mask: u32, base: u32, bytes: u32, live: &[(u32, u32)]) {
        self.end(mask, base, bytes);
        for (from, n) in live {
            self.set(mask, base + from, *n, |d, bits| d | bits << 4);
        }
    }

    /// A frame ends: none of its bytes is a variable's any more.
    pub fn end(&mut self, mask: u32, base: u32, bytes: u32) {
        self.set(mask, base, bytes, |d, bits| d & !(bits | bits << 4));
    }

    /// Changes what is known of bytes, word by word: `change` gets the old state and the bytes' bits.
    fn set(&mut self, mask: u32, from: u32, bytes: u32, change: impl Fn(u8, u8) -> u8) {
        let end = (u64::from(from) + u64::from(bytes)).min(self.bytes());
        for word in u64::from(from) / 4..end.div_ceil(4) {
            let (first, last) = (u64::from(from).saturating_sub(word * 4), (end - word * 4).min(4));
            let bits = ((1u8 << last) - 1) & !((1u8 << first) - 1);
            for (lane, d) in self.defined[word as usize].iter_mut().enumerate() {
                *d = if mask >> lane & 1 != 0 { change(*d, bits) } else { *d };
            }
        }
    }

    /// The lanes of `mask` whose access, of a multiple of its size within the reserved bytes, touches bytes of no variable.
    pub(crate) fn dead(&self, mask: u32, at: &[u64; LANES], size: u64) -> u32 {
        let wrong = |lane: usize| {
            let word = (at[lane] / 4) as usize;
            let want = if size < 4 { ((1u8 << size) - 1) << (at[lane] % 4) } else { 15 };
            let words = &self.defined[word..word + size.div_ceil(4) as usize];
            words.iter().any(|d| d[lane] >> 4 & want != want)
        };
        super::pick(mask, wrong)
    }

    /// Copies bytes with their initialisation state within each thread's memory, in the lanes of `mask`: arguments and
    /// results of calls.
    pub fn copy(&mut self, mask: u32, from: u32, to: u32, bytes: u32) {
        let end = u64::from(from.max(to)) + u64::from(bytes);
        if end > self.bytes() {
            self.reserve(end.min(u64::from(u32::MAX)) as u32);
        }
        for i in 0..bytes {
            let (from, to) = (u64::from(from) + u64::from(i), u64::from(to) + u64::from(i));
            for lane in 0..LANES {
                if mask >> lane & 1 != 0 {
                    let defined = self.defined(from, 1, lane);
                    self.write(to, lane, self.read::<u8>(from, lane), defined);
                }
            }
        }
    }

    /// Reads a value at a multiple of its size, within the reserved bytes.
    #[inline(always)]
    pub(crate) fn read<T: Cell>(&self, at: u64, lane: usize) -> T {
        let word = (at / 4) as usize;
        if T::BYTES <= 4 {
            return T::cut(u64::from(self.words[word][lane] >> (at % 4 * 8)));
        }
        let mut bits = 0;
        for i in 0..T::BYTES / 4 {
            bits |= u128::from(self.words[word + i][lane]) << (32 * i);
        }
        T::cut_full(bits)
    }

    /// Whether all of `bytes` bytes were written.
    #[inline(always)]
    pub(crate) fn defined(&self, at: u64, bytes: u64, lane: usize) -> bool {
        let word = (at / 4) as usize;
        if bytes < 4 {
            let want = ((1u8 << bytes) - 1) << (at % 4);
            return self.defined[word][lane] & want == want;
        }
        self.defined[word..word + bytes as usize / 4].iter().all(|d| d[lane] & 15 == 15)
    }

    /// Writes a value at a multiple of its size, within the reserved bytes.
    #[inline(always)]
    pub(crate) fn write<T: Cell>(&mut self, at: u64, lane: usize, value: T, defined: bool) {
        let word = (at / 4) as usize;
        if T::BYTES < 4 {
            let shift = at % 4 * 8;
            let keep = !(((1u32 << (T::BYTES * 8)) - 1) << shift);
            let w = &mut self.words[word][lane];
            *w = *w & keep | value.low() << shift;
            let bits = ((1u8 << T::BYTES) - 1) << (at % 4);
            let d = &mut self.defined[word][lane];
            *d = if defined { *d | bits } else { *d & !bits };
            return;
        }
        for i in 0..T::BYTES / 4 {
            self.words[word + i][lane] = (value.full() >> (32 * i)) as u32;
            let d = &mut self.defined[word + i][lane];
            *d = if defined { *d | 15 } else { *d & !15 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_what_is_known_of_them() {
        let mut local = LocalMemory::default();
        local.reserve(64);
        local.write(8, 3, 0x1122_3344_5566_7788u64, true);
        assert_eq!(local.read::<u8>(10, 3), 0x66);
        assert_eq!(local.read::<u16>(12, 3), 0x3344);
        assert_eq!(local.read::<u64>(8, 3), 0x1122_3344_5566_7788);
        assert!(local.defined(8, 8, 3) && !local.defined(8, 8, 2) && !local.defined(0, 16, 3));
        local.write(9, 3, 0xffu8, false);
        assert_eq!(local.read::<u32>(8, 3), 0x5566_ff88);
        assert!(!local.defined(8, 4, 3) && local.defined(8, 1, 3) && local.defined(10, 2, 3));
        local.copy(1 << 3, 8, 25, 5);
        assert_eq!(local.read::<u8>(25, 3), 0x88);
        assert_eq!(local.read::<u8>(29, 3), 0x44);
        assert!(local.defined(25, 1, 3) && !local.defined(26, 1, 3) && local.defined(27, 1, 3));
        local.begin(1 << 3, 16, 12, &[(1, 5), (8, 4)]);
        assert!(local.defined(12, 1, 3) && !local.defined(25, 1, 3) && !local.defined(27, 1, 3));
        assert!(local.defined(28, 2, 3), "behind the frame");
        let dead = |at: u64, size| local.dead(1 << 3, &[at; LANES], size) != 0;
        assert!(dead(16, 1) && !dead(17, 1) && !dead(18, 2) && dead(16, 4) && !dead(20, 2) && dead(20, 4));
        assert!(dead(22, 1) && dead(22, 2) && !dead(24, 4) && dead(28, 4));
        local.end(1 << 3, 16, 12);
        assert!(local.dead(1 << 3, &[24; LANES], 4) == 1 << 3);
    }
}
