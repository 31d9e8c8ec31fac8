//! bf16 weights as products read them: panels of [`LANES`] rows, in which the words of a row lie [`LANES`] apart.
//!
//! A word is two columns of a row, 32 bits. Panel p of a matrix `[rows, cols]` holds rows 16 p to 16 p + 15, and is
//! `[cols / 2, 16]` words: a vector load gives one word of 16 rows, which products take without a shuffle, and 16 rows are read
//! in one stream. (oneDNN calls such layouts `BA16b2a`.)

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::simd::{LANES, multiversion};
use super::{Data, Tensor, zeroed};

/// Elements of a word.
const WORD: usize = 2;
/// Columns that [`Simd::transposed`] turns at a time.
const COLUMNS: usize = LANES * WORD;

/// Whether matrices of this shape are packed: whole panels, of whole blocks of columns.
pub fn fits(rows: usize, cols: usize) -> bool {
    rows > 0 && cols > 0 && rows.is_multiple_of(LANES) && cols.is_multiple_of(COLUMNS)
}

/// The matrix whose row-major bytes are given, which may lie at any address.
pub fn pack(bytes: &[u8], cols: usize) -> Vec<bf16> {
    let mut packed = zeroed(bytes.len() / size_of::<bf16>());
    let panels = packed.par_chunks_exact_mut(LANES * cols);
    let rows = bytes.par_chunks_exact(LANES * cols * size_of::<bf16>());
    panels.zip(rows).for_each(|(panel, rows)| pack_panel(rows, cols, panel));
    packed
}

/// The row-major elements.
pub fn unpacked(packed: &[bf16], cols: usize) -> Vec<bf16> {
    let mut rows: Vec<bf16> = zeroed(packed.len());
    let panels = packed.par_chunks_exact(LANES * cols);
    rows.par_chunks_exact_mut(LANES * cols)
        .zip(panels)
        .for_each(|(rows, panel)| unpack_panels(panel, cols, rows));
    rows
}

/// The bytes of the row-major elements.
pub fn unpacked_bytes(packed: &[bf16], cols: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = zeroed(size_of_val(packed));
    let panels = packed.par_chunks_exact(LANES * cols);
    bytes.par_chunks_exact_mut(LANES * cols * size_of::<bf16>()).zip(panels).for_each_init(
        || vec![bf16::ZERO; LANES * cols],
        |rows, (bytes, panel)| {
            unpack_panels(panel, cols, rows);
            bytes.copy_from_slice(bytemuck::cast_slice(rows));
        },
    );
    bytes
}

/// Rows that need not begin or end at panels, as a row-major matrix.
pub(super) fn unpacked_rows(packed: &[bf16], cols: usize, rows: Range<usize>) -> Tensor {
    let mut data = vec![bf16::ZERO; rows.len() * cols];
    for (row, out) in rows.clone().zip(data.chunks_exact_mut(cols)) {
        unpack_row(packed, cols, row, out);
    }
    Tensor::new(rows.len(), cols, Data::Bf16(data))
}

/// Row `row` of the matrix.
pub fn unpack_row(packed: &[bf16], cols: usize, row: usize, out: &mut [bf16]) {
    let panel = &packed[row / LANES * LANES * cols..][..LANES * cols];
    let words = panel.as_chunks::<WORD>().0.iter().skip(row % LANES).step_by(LANES);
    for (out, word) in out.as_chunks_mut::<WORD>().0.iter_mut().zip(words) {
        *out = *word;
    }
}

/// Rows that begin and end at panels.
pub fn unpack_panels(panels: &[bf16], cols: usize, rows: &mut [bf16]) {
    for (panel, rows) in panels.chunks_exact(LANES * cols).zip(rows.chunks_exact_mut(LANES * cols)) {
        unpack_columns(panel, 0, rows, cols);
    }
}

/// The same back.
pub fn pack_panels(rows: &[bf16], cols: usize, panels: &mut [bf16]) {
    for (panel, rows) in panels.chunks_exact_mut(LANES * cols).zip(rows.chunks_exact(LANES * cols)) {
        pack_panel(bytemuck::cast_slice(rows), cols, panel);
    }
}

multiversion! {
    /// The panel of 16 rows.
    fn pack_panel(rows: &[u8], cols: usize, panel: &mut [bf16]) {
        let row = cols * size_of::<bf16>();
        assert!(fits(LANES, cols) && rows.len() == LANES * row && panel.len() == LANES * cols);
        for (at, to) in (0..row).step_by(16).zip(panel.chunks_exact_mut(4 * LANES * WORD)) {
            // SAFETY: 16 bytes of each row from `at` on, and four vectors in `to`; `multiversion!` found `S`.
            unsafe {
                for (word, to) in S::transposed(rows.as_ptr().add(at), row).into_iter().zip(to.chunks_exact_mut(LANES * WORD)) {
                    word.store(to.as_mut_ptr().cast());
                }
            }
        }
    }
}

multiversion! {
    /// `cols` columns of a panel's rows from column `first` on, both whole [`COLUMNS`], row-major.
    pub(super) fn unpack_columns(panel: &[bf16], first: usize, rows: &mut [bf16], cols: usize) {
        assert!(first.is_multiple_of(COLUMNS) && cols.is_multiple_of(COLUMNS));
        assert!(panel.len() >= (first + cols) * LANES && rows.len() >= LANES * cols);
        for at in (0..cols).step_by(COLUMNS) {
            for row in (0..LANES).step_by(4) {
                // SAFETY: 16 bytes in each of 16 lines of the panel, and a vector in each of 4 rows, by the assertions;
                // `multiversion!` found `S`.
                unsafe {
                    let from = panel.as_ptr().add((first + at) * LANES + row * WORD).cast();
                    for (i, words) in S::transposed(from, LANES * WORD * size_of::<bf16>()).into_iter().enumerate() {
                        words.store(rows.as_mut_ptr().add((row + i) * cols + at).cast());
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::simd::{Isa, with_isa};
    use super::*;

    #[test]
    fn packing_puts_a_word_of_16_rows_side_by_side_and_is_undone() {
        for (rows, cols) in [(16, 32), (48, 96), (32, 640)] {
            assert!(fits(rows, cols));
            let matrix: Vec<bf16> = (0..rows * cols).map(|i| bf16::from_bits(i as u16)).collect();
            for isa in Isa::ALL {
                with_isa(isa, || {
                    // At an odd address, as in a file.
                    let bytes = [&[0], bytemuck::cast_slice::<_, u8>(&matrix)].concat();
                    let packed = pack(&bytes[1..], cols);
                    for (i, x) in packed.iter().enumerate() {
                        let (panel, word, row, column) =
                            (i / (16 * cols), i / 32 % (cols / 2), i / 2 % 16, i % 2);
                        assert_eq!(
                            *x,
                            matrix[(16 * panel + row) * cols + 2 * word + column],
                            "{i} on {isa:?}"
                        );
                    }
                    assert_eq!(unpacked(&packed, cols), matrix, "{isa:?}");
                    let mut row = vec![bf16::ZERO; cols];
                    for i in 0..rows {
                        unpack_row(&packed, cols, i, &mut row);
                        assert_eq!(row, matrix[i * cols..(i + 1) * cols]);
                    }
                });
            }
        }
        for (rows, cols) in [(0, 32), (16, 0), (24, 32), (16, 48), (1, 640)] {
            assert!(!fits(rows, cols), "[{rows}, {cols}]");
        }
    }
}
