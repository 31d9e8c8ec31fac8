//! Launchers of kernels/geglu.cu; the forward pass of the MLP is an epilogue of kernels/matmul.cu.

use super::entries::Entry;
use super::{Cuda, Tensor, VECTOR};
use crate::backend::DType;
use crate::device::{Arg, Launch};

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

/// The launch over the vectors of `gate`, and the last arguments: how they lie in `inputs`.
fn product(gate: &Tensor, inputs: &Tensor, first: usize) -> (Launch, [Arg; 4]) {
    for x in [gate, inputs] {
        assert!(
            x.dtype == DType::Bf16 && x.cols.is_multiple_of(VECTOR),
            "bf16 rows of a multiple of {VECTOR}"
        );
    }
    assert!(gate.rows == inputs.rows && first + gate.cols <= inputs.cols && first.is_multiple_of(VECTOR));
    let (count, vectors) = (gate.rows * gate.cols / VECTOR, gate.cols / VECTOR);
    let launch = Launch::linear(count.div_ceil(BLOCK), BLOCK as u32);
    (launch, [count.into(), vectors.into(), first.into(), inputs.cols.into()])
}

/// See [`crate::backend::Backend::gelu_product_forward`]; all columns multiples of 8.
pub(super) fn product_forward(cuda: &Cuda, gate: &Tensor, inputs: &Tensor, first: usize) -> Tensor {
    let (launch, figures) = product(gate, inputs, first);
    let h = cuda.empty(DType::Bf16, gate.rows, gate.cols);
    let args = [&[gate.arg(), inputs.arg(), h.arg()][..], &figures].concat();
    cuda.launch(Entry::GeluProductForward, launch, &args);
    h
}

/// See [`crate::backend::Backend::gelu_product_backward`]; all columns multiples of 8.
pub(super) fn product_backward(
    cuda: &Cuda,
    dh: &Tensor,
    gate: &Tensor,
    inputs: &Tensor,
    first: usize,
    d_inputs: &mut Tensor,
) -> Tensor {
    let (launch, figures) = product(gate, inputs, first);
    for (x, like) in [(dh, gate), (&*d_inputs, inputs)] {
        assert!(x.dtype == DType::Bf16 && (x.rows, x.cols) == (like.rows, like.cols), "bf16 of one shape");
    }
    let d_gate = cuda.empty(DType::Bf16, gate.rows, gate.cols);
    let tensors = [dh.arg(), gate.arg(), inputs.arg(), d_gate.arg(), d_inputs.arg()];
    cuda.launch(Entry::GeluProductBackward, launch, &[&tensors[..], &figures].concat());
    d_gate
}
