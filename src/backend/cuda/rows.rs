//! Launchers of kernels/rows.cu.

use std::ops::Range;

use super::entries::Entry;
use super::{Cuda, Tensor, VECTOR};
use crate::backend::{DType, Platform, Rows};
use crate::device::{Arg, Launch, Ptr};

fn threads(cols: usize) -> u32 {
    ((cols / VECTOR).next_multiple_of(32).clamp(32, 256)) as u32
}

/// Some rows of x in f32, to the first ones of y.
pub(super) fn widen(cuda: &Cuda, x: &Tensor, rows: Range<usize>, y: &Tensor) {
    assert!(x.dtype == DType::Bf16 && y.dtype == DType::F32 && x.cols == y.cols, "bf16 to f32");
    assert!(rows.end <= x.rows && rows.len() <= y.rows, "rows of both");
    let (launch, n) = elements(rows.len(), x.cols);
    let from = Ptr(x.memory.ptr().0 + (rows.start * x.cols * DType::Bf16.bytes()) as u64);
    cuda.launch(Entry::WidenRows, launch, &[from.into(), y.arg(), n]);
}

/// The launch over the elements of x, 4 for a thread, and their number.
fn all_of(x: &Tensor) -> (Launch, Arg) {
    elements(x.rows, x.cols)
}

fn elements(rows: usize, cols: usize) -> (Launch, Arg) {
    assert!(cols.is_multiple_of(4), "rows of a multiple of 4");
    let n = rows * cols;
    (Launch::linear(n.div_ceil(256 * 4), 256), (n as u64).into())
}

impl Rows for Cuda {
    fn scaled(&self, x: Tensor, factor: f32) -> Tensor {
        if factor == 1.0 {
            return x;
        }
        assert!(x.dtype == DType::Bf16, "bf16");
        let (launch, n) = all_of(&x);
        let y = self.empty(DType::Bf16, x.rows, x.cols);
        self.launch(Entry::ScaleRows, launch, &[x.arg(), y.arg(), n, factor.into()]);
        y
    }

    fn accumulate(&self, x: &Tensor, sum: &mut Tensor) {
        assert!(
            x.dtype == DType::Bf16 && sum.dtype == DType::F32 && (x.rows, x.cols) == (sum.rows, sum.cols)
        );
        let (launch, n) = all_of(x);
        self.launch(Entry::AccumulateRows, launch, &[x.arg(), sum.arg(), n]);
    }

    fn narrowed(&self, sum: &Tensor) -> Tensor {
        assert!(sum.dtype == DType::F32, "an f32 sum");
        let (launch, n) = all_of(sum);
        let x = self.empty(DType::Bf16, sum.rows, sum.cols);
        self.launch(Entry::NarrowRows, launch, &[sum.arg(), x.arg(), n]);
        x
    }

    fn widened(&self, x: &Tensor) -> Tensor {
        if x.dtype == DType::F32 || !x.cols.is_multiple_of(VECTOR) {
            return self.upload(DType::F32, x.rows, x.cols, bytemuck::cast_slice(&self.to_f32(x)));
        }
        let y = self.empty(DType::F32, x.rows, x.cols);
        widen(self, x, 0..x.rows, &y);
        y
    }

    fn gather_rows(&self, x: &Tensor, rows: &[u32]) -> Tensor {
        assert!(
            x.dtype == DType::Bf16 && x.cols.is_multiple_of(VECTOR),
            "bf16 rows of a multiple of {VECTOR}"
        );
        assert!(rows.iter().all(|&r| (r as usize) < x.rows), "rows of x");
        let out = self.empty(DType::Bf16, rows.len(), x.cols);
        let rows_on_device = self.array(rows);
        let launch = Launch::linear(rows.len(), threads(x.cols));
        self.launch(Entry::GatherRows, launch, &[x.arg(), rows_on_device.arg(), out.arg(), x.cols.into()]);
        out
    }

    fn scatter_rows(&self, dy: &Tensor, rows: &[u32], total: usize) -> Tensor {
        assert!(
            dy.dtype == DType::Bf16 && dy.cols.is_multiple_of(VECTOR),
            "bf16 rows of a multiple of {VECTOR}"
        );
        assert_eq!(dy.rows, rows.len());
        let mut source = vec![u32::MAX; total];
        for (i, &r) in rows.iter().enumerate() {
            source[r as usize] = i as u32;
        }
        let dx = self.empty(DType::Bf16, total, dy.cols);
        let source = self.array(&source);
        let launch = Launch::linear(total, threads(dy.cols));
        self.launch(Entry::ScatterRows, launch, &[dy.arg(), source.arg(), dx.arg(), dy.cols.into()]);
        dx
    }
}
