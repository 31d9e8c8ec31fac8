//! Bytes that several host threads may touch at once, and the values that lie in them.

use std::alloc::{Layout, alloc_zeroed};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{AcqRel, Relaxed};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};

use crate::machine::registers::LANES;

/// Memory that starts as zeros, which the system provides page by page when they are touched.
///
/// Every access is a relaxed atomic one, so a kernel that races is no undefined behaviour of the host. Accesses of
/// different widths to the same bytes give the result of the host's caches: all targets keep single accesses whole.
pub(crate) struct Buffer {
    words: NonNull<[AtomicU64]>,
    /// Whether the words are this buffer's, a `Box` of them; the host program's otherwise.
    owned: bool,
}

// SAFETY: the words are atomic, and the buffer is all that has them, or they are the host program's for as long as it lives.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.owned {
            // SAFETY: the words were a box's, which `of` took apart.
            drop(unsafe { Box::from_raw(self.words.as_ptr()) });
        }
    }
}

macro_rules! views {
    ($($(#[$doc:meta])* $name:ident $t:ty, $per_word:literal;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $name(&self) -> &[$t] {
            // SAFETY: the words are valid for their whole length and live as long as `self`; a word is $per_word such
            // values without padding, its alignment is at least theirs, and both kinds are atomic, so shared
            // references to the same bytes may exist side by side.
            unsafe { std::slice::from_raw_parts(self.words.as_ptr().cast(), self.words.len() * $per_word) }
        }
    )*};
}

impl Buffer {
    /// `words` words of 8 bytes; `None` where the host has no room for them.
    pub(crate) fn zeroed(words: usize) -> Option<Self> {
        if words == 0 {
            return Some(Self::of(Box::default()));
        }
        let layout = Layout::array::<AtomicU64>(words).ok()?;
        // SAFETY: the layout has a size above zero.
        let start = unsafe { alloc_zeroed(layout) }.cast::<AtomicU64>();
        if start.is_null() {
            return None;
        }
        // SAFETY: `start` comes from the global allocator with the layout of `[AtomicU64; words]`, and zero bytes are
        // a valid AtomicU64.
        Some(Self::of(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(start, words)) }))
    }

    fn of(words: Box<[AtomicU64]>) -> Self {
        // A box is never null.
        Self { words: NonNull::from(Box::leak(words)), owned: true }
    }

    /// The host program's own memory.
    ///
    /// # Safety
    /// At `start`, a multiple of 8, are `words` words that can be read and written until the buffer is dropped.
    pub(crate) unsafe fn over(start: NonNull<AtomicU64>, words: usize) -> Self {
        Self { words: NonNull::slice_from_raw_parts(start, words), owned: false }
    }

    /// Room for `bytes` bytes.
    pub(crate) fn for_bytes(bytes: u64) -> Option<Self> {
        Self::zeroed(usize::try_from(bytes.div_ceil(8)).ok()?)
    }

    views! {
        /// As bytes.
        u8s AtomicU8, 8;
        /// As 16-bit values.
        u16s AtomicU16, 4;
        /// As 32-bit values.
        u32s AtomicU32, 2;
    }

    /// As 64-bit values.
    #[inline(always)]
    pub(crate) fn u64s(&self) -> &[AtomicU64] {
        // SAFETY: the words live as long as the buffer, and are only ever used as atomic values.
        unsafe { self.words.as_ref() }
    }

    /// All bytes, for a host that is alone with them.
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `&mut self` shows that nobody else looks; any bytes are valid AtomicU64s, and bytes need no alignment.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_ptr().cast(), self.words.len() * 8) }
    }

    /// Copies bytes in, whole words where they are.
    pub(crate) fn write(&self, at: usize, from: &[u8]) {
        let bytes = self.u8s();
        let head = from.len().min(at.wrapping_neg() % 8);
        let (head, body) = from.split_at(head);
        for (i, b) in head.iter().enumerate() {
            bytes[at + i].store(*b, Relaxed);
        }
        let at = at + head.len();
        let (body, tail) = body.as_chunks::<8>();
        for (chunk, word) in body.iter().zip(&self.u64s()[at / 8..]) {
            word.store(u64::from_ne_bytes(*chunk), Relaxed);
        }
        let at = at + body.len() * 8;
        for (i, b) in tail.iter().enumerate() {
            bytes[at + i].store(*b, Relaxed);
        }
    }

    /// Copies bytes out.
    pub(crate) fn read(&self, at: usize, to: &mut [u8]) {
        let bytes = self.u8s();
        let head = to.len().min(at.wrapping_neg() % 8);
        let (head, body) = to.split_at_mut(head);
        for (i, b) in head.iter_mut().enumerate() {
            *b = bytes[at + i].load(Relaxed);
        }
        let at = at + head.len();
        let (body, tail) = body.as_chunks_mut::<8>();
        for (chunk, word) in body.iter_mut().zip(&self.u64s()[at / 8..]) {
            *chunk = word.load(Relaxed).to_ne_bytes();
        }
        let at = at + body.len() * 8;
        for (i, b) in tail.iter_mut().enumerate() {
            *b = bytes[at + i].load(Relaxed);
        }
    }
}

/// A value as it lies in memory: little-endian, at a multiple of its size.
pub(crate) trait Cell: Copy + Default + PartialEq {
    /// Its size.
    const BYTES: usize;
    /// Reads it at a byte offset.
    fn load(buffer: &Buffer, at: usize) -> Self;
    /// Writes it at a byte offset.
    fn store(self, buffer: &Buffer, at: usize);
    /// Reads one for each lane, `step` values apart.
    #[inline(always)]
    fn load_run(buffer: &Buffer, at: usize, step: usize) -> [Self; LANES] {
        std::array::from_fn(|i| Self::load(buffer, at + i * step * Self::BYTES))
    }
    /// Writes one for each lane, `step` values apart.
    #[inline(always)]
    fn store_run(values: &[Self; LANES], buffer: &Buffer, at: usize, step: usize) {
        for (i, value) in values.iter().enumerate() {
            value.store(buffer, at + i * step * Self::BYTES);
        }
    }
    /// From exactly as many bytes.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// To exactly as many bytes.
    fn to_bytes(self, bytes: &mut [u8]);
    /// The low 32 bits of the zero-extended value.
    fn low(self) -> u32;
    /// The low 64 bits of the zero-extended value.
    fn wide(self) -> u64;
    /// The value zero-extended.
    fn full(self) -> u128;
    /// The value sign-extended to 64 bits.
    fn signed(self) -> u64;
    /// The low bits of a register.
    fn cut(bits: u64) -> Self;
    /// The low bits of a wide register.
    fn cut_full(bits: u128) -> Self;
}

macro_rules! cells {
    ($($t:ty, $signed:ty, $bytes:literal, $view:ident;)*) => {$(
        impl Cell for $t {
            const BYTES: usize = $bytes;
            #[inline(always)]
            fn load(buffer: &Buffer, at: usize) -> Self {
                Self::from_le(buffer.$view()[at / $bytes].load(Relaxed))
            }
            #[inline(always)]
            fn store(self, buffer: &Buffer, at: usize) {
                buffer.$view()[at / $bytes].store(self.to_le(), Relaxed);
            }
            #[inline(always)]
            fn load_run(buffer: &Buffer, at: usize, step: usize) -> [Self; LANES] {
                // One check of the bounds for all lanes.
                let cells = &buffer.$view()[at / $bytes..][..(LANES - 1) * step + 1];
                let mut values = [0; LANES];
                if step == 1 {
                    for (value, cell) in values.iter_mut().zip(cells) {
                        *value = Self::from_le(cell.load(Relaxed));
                    }
                } else {
                    for (value, cell) in values.iter_mut().zip(cells.iter().step_by(step)) {
                        *value = Self::from_le(cell.load(Relaxed));
                    }
                }
                values
            }
            #[inline(always)]
            fn store_run(values: &[Self; LANES], buffer: &Buffer, at: usize, step: usize) {
                let cells = &buffer.$view()[at / $bytes..][..(LANES - 1) * step + 1];
                if step == 1 {
                    for (value, cell) in values.iter().zip(cells) {
                        cell.store(value.to_le(), Relaxed);
                    }
                } else {
                    for (value, cell) in values.iter().zip(cells.iter().step_by(step)) {
                        cell.store(value.to_le(), Relaxed);
                    }
                }
            }
            cells!(@common $t, $signed, $bytes);
        }
    )*};
    (@common $t:ty, $signed:ty, $bytes:literal) => {
        #[inline(always)]
        fn from_bytes(bytes: &[u8]) -> Self {
            Self::from_le_bytes(bytes.try_into().expect("as many bytes as the value has"))
        }
        #[inline(always)]
        fn to_bytes(self, bytes: &mut [u8]) {
            bytes.copy_from_slice(&self.to_le_bytes());
        }
        #[inline(always)]
        fn low(self) -> u32 {
            self as u32
        }
        #[inline(always)]
        fn wide(self) -> u64 {
            self as u64
        }
        #[inline(always)]
        fn full(self) -> u128 {
            self as u128
        }
        #[inline(always)]
        fn signed(self) -> u64 {
            self as $signed as i64 as u64
        }
        #[inline(always)]
        fn cut(bits: u64) -> Self {
            bits as Self
        }
        #[inline(always)]
        fn cut_full(bits: u128) -> Self {
            bits as Self
        }
    };
}
cells! {
    u8, i8, 1, u8s;
    u16, i16, 2, u16s;
    u32, i32, 4, u32s;
    u64, i64, 8, u64s;
}

/// A value that can be changed indivisibly.
pub(crate) trait Word: Cell {
    /// Replaces the value at a byte offset by `f` of it, and returns the old one.
    fn update(buffer: &Buffer, at: usize, f: impl Fn(Self) -> Self) -> Self;
}

macro_rules! words {
    ($($t:ty, $view:ident;)*) => {$(
        impl Word for $t {
            #[inline(always)]
            fn update(buffer: &Buffer, at: usize, f: impl Fn(Self) -> Self) -> Self {
                let cell = &buffer.$view()[at / Self::BYTES];
                let mut old = cell.load(Relaxed);
                // Acquire and release, so that what atomics order for the program is ordered for the host as well.
                while let Err(now) =
                    cell.compare_exchange_weak(old, f(Self::from_le(old)).to_le(), AcqRel, Relaxed)
                {
                    old = now;
                }
                Self::from_le(old)
            }
        }
    )*};
}
words! {
    u16, u16s;
    u32, u32s;
    u64, u64s;
}

/// Not for the host: blocks of kernels with atomics of 16 bytes run one after another.
impl Word for u128 {
    fn update(buffer: &Buffer, at: usize, f: impl Fn(Self) -> Self) -> Self {
        let old = Self::load(buffer, at);
        f(old).store(buffer, at);
        old
    }
}

impl Cell for u128 {
    const BYTES: usize = 16;
    #[inline(always)]
    fn load(buffer: &Buffer, at: usize) -> Self {
        u128::from(u64::load(buffer, at)) | u128::from(u64::load(buffer, at + 8)) << 64
    }
    #[inline(always)]
    fn store(self, buffer: &Buffer, at: usize) {
        (self as u64).store(buffer, at);
        ((self >> 64) as u64).store(buffer, at + 8);
    }
    cells!(@common u128, i128, 16);
}

/// A bit for each byte (or sector, ...) of something.
pub(crate) struct Bits(Buffer);

impl Bits {
    /// `n` bits, all clear.
    pub(crate) fn zeroed(n: u64) -> Option<Self> {
        Buffer::zeroed(usize::try_from(n.div_ceil(64)).ok()?).map(Self)
    }

    /// The words that hold bits `from..to`, each with the bits concerned.
    #[inline(always)]
    fn words(&self, from: u64, to: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let (first, last) = ((from / 64) as usize, to.div_ceil(64) as usize);
        self.0.u64s()[first..last].iter().enumerate().map(move |(i, word)| {
            let start = (first + i) as u64 * 64;
            let low = if start < from { u64::MAX << (from - start) } else { u64::MAX };
            let high = if start + 64 > to { u64::MAX >> (start + 64 - to) } else { u64::MAX };
            (word, low & high)
        })
    }

    /// Whether all of `from..to` are set.
    #[inline(always)]
    pub(crate) fn all(&self, from: u64, to: u64) -> bool {
        self.words(from, to).all(|(word, bits)| word.load(Relaxed) & bits == bits)
    }

    /// Sets `from..to`.
    #[inline(always)]
    pub(crate) fn set(&self, from: u64, to: u64) {
        for (word, bits) in self.words(from, to) {
            // Most writes hit what was written before, and a load is much cheaper than a locked or.
            if word.load(Relaxed) & bits != bits {
                word.fetch_or(bits, Relaxed);
            }
        }
    }

    /// Clears `from..to`.
    pub(crate) fn clear(&self, from: u64, to: u64) {
        for (word, bits) in self.words(from, to) {
            word.fetch_and(!bits, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_out_from_any_offset() {
        let mut buffer = Buffer::for_bytes(40).unwrap();
        for (i, b) in buffer.bytes_mut().iter_mut().enumerate() {
            *b = i as u8;
        }
        for from in 0..40usize {
            for to in from..40 {
                let mut got = vec![0; to - from];
                buffer.read(from, &mut got);
                assert!(got.iter().enumerate().all(|(i, b)| *b as usize == from + i), "{from}..{to}");
            }
        }
    }

    #[test]
    fn copies_in_at_any_offset() {
        for from in 0..40usize {
            for to in from..40 {
                let mut buffer = Buffer::for_bytes(40).unwrap();
                let new: Vec<u8> = (from..to).map(|i| i as u8 + 1).collect();
                buffer.write(from, &new);
                for (i, b) in buffer.bytes_mut().iter().enumerate() {
                    assert_eq!(*b, if (from..to).contains(&i) { i as u8 + 1 } else { 0 }, "{from}..{to}");
                }
            }
        }
    }

    #[test]
    fn bits_of_any_range() {
        for (from, to) in [(0, 1), (0, 64), (63, 65), (5, 130), (64, 128), (100, 100)] {
            let bits = Bits::zeroed(192).unwrap();
            bits.set(from, to);
            for i in 0..192 {
                assert_eq!(bits.all(i, i + 1), (from..to).contains(&i), "{from}..{to} bit {i}");
            }
            assert!(bits.all(from, to));
            bits.clear(from, to);
            assert!((0..192).all(|i| !bits.all(i, i + 1)));
        }
    }
}
