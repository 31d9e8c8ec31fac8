//! Matrices in shared memory as `wgmma` reads them: the matrix descriptor, its layouts and swizzles (PTX ISA, "Asynchronous
//! Warpgroup Level Matrix Shared Memory Layout").
//!
//! A matrix is made of *units* of 16 bytes: eight neighbouring 16-bit elements, four of 32 bits, or sixteen of 8 bits. In a
//! K-major matrix the elements of a unit are neighbours along k, and a product reads two units of each row of A (column of B);
//! in an MN-major one they are neighbours along m (n). With LBO and SBO the leading and the stride byte offset, W the width of
//! the swizzle (16 bytes without one) and w = W / 16 its units, a unit lies at
//!
//! - K-major, row r, unit j: `r % 8 * W + r / 8 * SBO + j * (16, or LBO without a swizzle)`;
//! - MN-major, unit u, depth k: `u % w * 16 + u / w * LBO + k % 8 * W + k / 8 * SBO`, and without a swizzle
//!   `u * SBO + k % 8 * 16 + k / 8 * LBO`
//!
//! behind the start address. Of the sum, an address in shared memory, the swizzle then changes the bits that count units: they
//! are xored with those from bit 7 on, which count rows of 128 bytes.

use crate::machine::products::UNIT;

/// A matrix descriptor, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    /// Units of the swizzle's width: 1, 2, 4 or 8.
    units: u64,
}

impl Descriptor {
    /// Reads the 64 bits: three offsets in units of 16 bytes, and the swizzle.
    ///
    /// # Errors
    /// A base offset, which matrices have whose pattern does not begin where addresses make it begin.
    pub(super) fn read(bits: u64) -> Result<Self, String> {
        let field = |from: u32| (bits >> from & 0x3fff) * UNIT;
        let base = bits >> 49 & 7;
        if base != 0 {
            return Err(format!("the matrix descriptor {bits:#x} has a base offset ({base})"));
        }
        let units = [1, 8, 4, 2][(bits >> 62) as usize];
        Ok(Self { start: field(0), leading: field(16), stride: field(32), units })
    }

    fn swizzled(&self, at: u64) -> u64 {
        at ^ (at >> 3 & (self.units - 1) << 4)
    }

    /// The address of a unit of a K-major matrix: `j` is 0 or 1.
    pub(super) fn k_major(&self, row: u64, j: u64) -> u64 {
        let step = if self.units == 1 { self.leading } else { UNIT };
        self.swizzled(self.start + row % 8 * self.units * UNIT + row / 8 * self.stride + j * step)
    }

    /// The address of a unit of an MN-major matrix.
    pub(super) fn mn_major(&self, unit: u64, k: u64) -> u64 {
        let w = self.units;
        let (across, down) = if w == 1 { (self.stride, self.leading) } else { (self.leading, self.stride) };
        self.swizzled(self.start + unit % w * UNIT + unit / w * across + k % 8 * w * UNIT + k / 8 * down)
    }
}
