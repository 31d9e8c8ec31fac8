//! Launchers of kernels/rows.cu.

use std::ops::Range;

use super::entries::Entry;
use super::{Cuda, Tensor, VECTOR};
use crate::backend::DType;
use crate::device::{Arg, Launch, Ptr};

fn threads(cols: usize) -> u32 {
    ((cols / VECTOR).next_multiple_of(32).clamp(32, 256)) as u32
}

/// See [`crate::backend::Backend::gather_rows`].
pub(super) fn gather(cuda: &Cuda, x: &Tensor, rows: &[u32]) -> Tensor {
    assert!(x.dtype == DType::Bf16 && x.cols.is_multiple_of(VECTOR), "bf16 rows of a multiple of {VECTOR}");
    assert!(rows.iter().all(|&r| (r as usize) < x.rows), "rows of x");
    let out = cuda.empty(DType::Bf16, rows.len(), x.cols);
    let rows_on_device = cuda.array(rows);
    let launch = Launch::linear(rows.len(), threads(x.cols));
    cuda.launch(Entry::GatherRows, launch, &[x.arg(), rows_on_device.arg(), out.arg(), x.cols.into()]);
    out
}

/// See [`crate::backend::Backend::scatter_rows`].
pub(super) fn scatter(cuda: &Cuda, dy: &Tensor, rows: &[u32], total: usize) -> Tensor {
    assert!(dy.dtype == DType::Bf16 && dy.cols.is_multiple_of(VECTOR), "bf16 rows of a multiple of {VECTOR}");
    assert_eq!(dy.rows, rows.len());
    let mut source = vec![u32::MAX; total];
    for (i, &r) in rows.iter().enumerate() {
        source[r as usize] = i as u32;
    }
    let dx = cuda.empty(DType::Bf16, total, dy.cols);
    let source = cuda.array(&source);
    let launch = Launch::linear(total, threads(dy.cols));
    cuda.launch(Entry::ScatterRows, launch, &[dy.arg(), source.arg(), dx.arg(), dy.cols.into()]);
    dx
}

/// See [`crate::backend::Backend::widened`].
pub(super) fn widened(cuda: &Cuda, x: &Tensor) -> Tensor {
    let y = cuda.empty(DType::F32, x.rows, x.cols);
    widen(cuda, x, 0..x.rows, &y);
    y
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

/// See [`crate::backend::Backend::accumulate`].
pub(super) fn accumulate(cuda: &Cuda, x: &Tensor, sum: &mut Tensor) {
    assert!(x.dtype == DType::Bf16 && sum.dtype == DType::F32 && (x.rows, x.cols) == (sum.rows, sum.cols));
    let (launch, n) = all_of(x);
    cuda.launch(Entry::AccumulateRows, launch, &[x.arg(), sum.arg(), n]);
}

/// See [`crate::backend::Backend::scaled`].
pub(super) fn scaled(cuda: &Cuda, x: &Tensor, factor: f32) -> Tensor {
    assert!(x.dtype == DType::Bf16, "bf16");
    let (launch, n) = all_of(x);
    let y = cuda.empty(DType::Bf16, x.rows, x.cols);
    cuda.launch(Entry::ScaleRows, launch, &[x.arg(), y.arg(), n, factor.into()]);
    y
}

/// See [`crate::backend::Backend::narrowed`].
pub(super) fn narrowed(cuda: &Cuda, sum: &Tensor) -> Tensor {
    assert!(sum.dtype == DType::F32, "an f32 sum");
    let (launch, n) = all_of(sum);
    let x = cuda.empty(DType::Bf16, sum.rows, sum.cols);
    cuda.launch(Entry::NarrowRows, launch, &[sum.arg(), x.arg(), n]);
    x
}
