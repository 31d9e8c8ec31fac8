//! Launcher of kernels/geglu.cu; the forward pass is an epilogue of kernels/matmul.cu.

use super::entries::Entry;
use super::{Cuda, Tensor, VECTOR};
use crate::backend::DType;
use crate::device::Launch;

/// Threads of a block.
const BLOCK: usize = 256;

/// See [`crate::backend::Backend::geglu_backward`]; columns a multiple of 8.
pub(super) fn backward(cuda: &Cuda, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    for x in [dh, gate, up] {
        assert!(x.dtype == DType::Bf16 && (x.rows, x.cols) == (dh.rows, dh.cols), "bf16 of one shape");
    }
    assert!(dh.cols.is_multiple_of(VECTOR), "rows of a multiple of {VECTOR} columns");
    let [d_gate, d_up] = [0, 1].map(|_| cuda.empty(DType::Bf16, dh.rows, dh.cols));
    let vectors = dh.rows * dh.cols / VECTOR;
    let launch = Launch::linear(vectors.div_ceil(BLOCK), BLOCK as u32);
    let args = [dh.arg(), gate.arg(), up.arg(), d_gate.arg(), d_up.arg(), (vectors as u64).into()];
    cuda.launch(Entry::GegluBackward, launch, &args);
    (d_gate, d_up)
}
