//! Moving, adding and widening rows, and how the other ops split rows among threads.

use half::bf16;

use super::packed::unpacked;
use super::simd::{f32_from_bf16, multiversion};
use super::tasks::{self, Out};
use super::{Cpu, Data, Tensor};
use crate::backend::{DType, Platform, Rows};

/// Elements per task: a microsecond of work or more.
const TASK: usize = 4 * 1024;

/// Rows per task, of so many columns.
fn per_task(cols: usize) -> usize {
    (TASK / cols.max(1)).max(1)
}

/// Calls `f(first_row, rows)` on consecutive blocks of rows of `out`, in parallel. How rows fall into blocks is not
/// specified; `f` must compute each row from that row's data alone.
pub(crate) fn for_row_blocks(out: &mut [f32], cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = per_task(cols);
    let blocks = out.len().div_ceil(rows * cols.max(1));
    let (len, out) = (out.len(), Out::new(out));
    tasks::for_each(
        blocks,
        || (),
        |(), i| {
            let first = i * rows * cols;
            // SAFETY: this task alone owns the block.
            f(i * rows, unsafe { out.slice(first, (rows * cols).min(len - first)) });
        },
    );
}

/// A matrix of so many rows and columns, made by [`for_row_blocks`] of zeros.
pub(crate) fn new_rows(rows: usize, cols: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    tasks::filled(rows * cols, per_task(cols) * cols, |first, block| f(first / cols, block))
}

multiversion! {
    fn add_slices(x: &mut [f32], y: &[f32], factor: f32) {
        for (x, y) in x.iter_mut().zip(y) {
            *x = (*x + y) * factor;
        }
    }
}

multiversion! {
    pub(super) fn scale_slice(x: &mut [f32], factor: f32) {
        for x in x {
            *x *= factor;
        }
    }
}

/// x = factor (x + y); both f32 of one shape.
pub fn add_scaled(x: &mut Tensor, y: &Tensor, factor: f32) {
    assert_eq!((x.rows, x.cols), (y.rows, y.cols));
    let y = y.as_f32();
    for_row_blocks(x.as_f32_mut(), 1, |first, block| {
        add_slices(block, &y[first..first + block.len()], factor);
    });
}

/// x = factor x; f32.
pub fn scale(x: &mut Tensor, factor: f32) {
    for_row_blocks(x.as_f32_mut(), 1, |_, block| scale_slice(block, factor));
}

/// dst\[rows\[i\]\] = src\[i\].
pub fn write(src: &Tensor, rows: &[u32], dst: &mut Tensor) {
    assert_eq!((src.rows, src.cols), (rows.len(), dst.cols));
    let cols = dst.cols;
    let target = dst.as_f32_mut();
    for (&r, src) in rows.iter().zip(src.as_f32().chunks_exact(cols)) {
        target[r as usize * cols..][..cols].copy_from_slice(src);
    }
}

multiversion! {
    fn widen(x: &[bf16], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = f32_from_bf16(*x);
        }
    }
}

/// The elements of x in f32.
pub fn to_f32(x: &Tensor) -> Vec<f32> {
    match x.data() {
        Data::F32(x) => x.clone(),
        Data::Bf16(x) => all_widened(x),
        Data::Packed(packed) => all_widened(&unpacked(packed, x.cols)),
    }
}

fn all_widened(x: &[bf16]) -> Vec<f32> {
    new_rows(x.len(), 1, |at, block| widen(&x[at..], block))
}

impl Rows for Cpu {
    fn scaled(&self, mut x: Tensor, factor: f32) -> Tensor {
        if factor != 1.0 {
            scale(&mut x, factor);
        }
        x
    }

    fn accumulate(&self, x: &Tensor, sum: &mut Tensor) {
        add_scaled(sum, x, 1.0);
    }

    fn narrowed(&self, sum: &Tensor) -> Tensor {
        sum.clone()
    }

    fn widened(&self, x: &Tensor) -> Tensor {
        Tensor::f32(x.rows, x.cols, to_f32(x))
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Tensor {
        let source = x.as_f32();
        let mut out = Vec::with_capacity(rows.len() * x.cols);
        for &r in rows {
            out.extend_from_slice(&source[r as usize * x.cols..][..x.cols]);
        }
        Tensor::f32(rows.len(), x.cols, out)
    }

    fn scatter_rows(&self, dy: &Tensor, rows: &[u32], total: usize) -> Tensor {
        let mut dx = self.zeros(DType::F32, total, dy.cols);
        write(dy, rows, &mut dx);
        dx
    }
}
