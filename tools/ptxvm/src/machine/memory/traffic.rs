//! Counting memory traffic: sectors of global memory, passes over the banks of shared memory.

use std::sync::atomic::Ordering::Relaxed;

use super::buffer::Buffer;
use crate::machine::registers::LANES;

/// Bytes of a sector, the unit in which global memory moves.
pub(crate) const SECTOR: u64 = 32;

/// Sectors of an allocation that the current launch touched.
///
/// Each word holds the launch's number above 32 bits for as many sectors, so that a new launch needs no clearing.
pub(crate) struct Sectors {
    read: Buffer,
    written: Buffer,
}

impl Sectors {
    /// For `bytes` bytes.
    pub(crate) fn new(bytes: u64) -> Option<Self> {
        let words = usize::try_from(bytes.div_ceil(SECTOR * 32)).ok()?;
        Some(Self { read: Buffer::zeroed(words)?, written: Buffer::zeroed(words)? })
    }

    /// Notes sectors `from..=to` and says how many of them are new in this launch.
    #[inline(always)]
    pub(crate) fn touch(&self, write: bool, serial: u32, from: u64, to: u64) -> u64 {
        let words = if write { &self.written } else { &self.read }.u64s();
        let mut new = 0;
        let mut at = from;
        while at <= to {
            let last = to.min(at | 31);
            let bits = (u32::MAX >> (31 - (last - at))) << (at % 32);
            let word = &words[(at / 32) as usize];
            let mut old = word.load(Relaxed);
            loop {
                let known = if (old >> 32) as u32 == serial { old as u32 } else { 0 };
                if known & bits == bits {
                    break;
                }
                let now = u64::from(serial) << 32 | u64::from(known | bits);
                match word.compare_exchange_weak(old, now, Relaxed, Relaxed) {
                    Ok(_) => {
                        new += u64::from((bits & !known).count_ones());
                        break;
                    }
                    Err(other) => old = other,
                }
            }
            at = last + 1;
        }
        new
    }
}

/// Passes over the 32 banks of shared memory that an access of `bytes` bytes by each lane of `mask` takes, and those
/// that it would take without conflicts. Accesses of 8 bytes go by half-warps, of 16 by quarters; lanes that want the
/// same 4-byte word of a bank are served together.
pub(crate) fn wavefronts(mask: u32, at: &[u64; LANES], bytes: u32) -> (u64, u64) {
    let words = (bytes / 4).max(1) as usize;
    let part = LANES / words;
    let (mut passes, mut ideal) = (0, 0);
    for first in (0..LANES).step_by(part) {
        let lanes = mask & (u32::MAX >> (LANES - part)) << first;
        if lanes == 0 {
            continue;
        }
        ideal += 1;
        passes += bank_passes(lanes, at, words);
    }
    (passes, ideal)
}

/// The most distinct words that lanes want of one bank.
fn bank_passes(lanes: u32, at: &[u64; LANES], words: usize) -> u64 {
    // The first word of each bank has a place of its own: without conflicts nothing else is needed.
    let mut first = [u64::MAX; 32];
    let mut more = [0u64; LANES];
    let mut n = 0;
    let mut rest = lanes;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        for i in 0..words {
            let word = at[lane] / 4 + i as u64;
            let bank = (word % 32) as usize;
            if first[bank] == u64::MAX {
                first[bank] = word;
            } else if first[bank] != word && !more[..n].contains(&word) {
                more[n] = word;
                n += 1;
            }
        }
    }
    let mut passes = [1u64; 32];
    for word in &more[..n] {
        passes[(word % 32) as usize] += 1;
    }
    passes.into_iter().max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(f: impl Fn(u64) -> u64, bytes: u32) -> (u64, u64) {
        wavefronts(u32::MAX, &std::array::from_fn(|i| f(i as u64)), bytes)
    }

    #[test]
    fn passes_follow_the_banks() {
        assert_eq!(of(|i| i * 4, 4), (1, 1));
        assert_eq!(of(|_| 64, 4), (1, 1), "one word for all");
        assert_eq!(of(|i| i, 1), (1, 1), "bytes of shared words");
        for stride in [2u64, 4, 8, 16, 32] {
            assert_eq!(of(|i| i * 4 * stride, 4), (stride, 1), "stride {stride}");
        }
        assert_eq!(of(|i| i * 4 * 33, 4), (1, 1), "padded");
        assert_eq!(of(|i| i * 8, 8), (2, 2));
        assert_eq!(of(|i| i * 16, 16), (4, 4));
        assert_eq!(of(|i| i * 128, 16), (32, 4), "a column of rows of 128 bytes");
        assert_eq!(wavefronts(0xff, &std::array::from_fn(|i| i as u64 * 16), 16), (1, 1));
        assert_eq!(wavefronts(1 << 31, &[0; LANES], 8), (1, 1));
    }

    #[test]
    fn sectors_are_new_once_in_a_launch() {
        let sectors = Sectors::new(4096).unwrap();
        assert_eq!(sectors.touch(false, 1, 3, 70), 68);
        assert_eq!(sectors.touch(false, 1, 0, 70), 3);
        assert_eq!(sectors.touch(true, 1, 31, 32), 2);
        assert_eq!(sectors.touch(false, 2, 70, 70), 1);
        assert_eq!(sectors.touch(false, 2, 0, 127), 127);
    }
}
