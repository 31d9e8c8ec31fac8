//! Launchers of kernels/geglu.cu; the forward pass of the MLP is an epilogue of kernels/matmul.cu.

use super::entries::Entry;
use super::matmul::{T32X64, T64X64, Variant, assert_bf16};
use super::{Cuda, Tensor, VECTOR};
use crate::backend::{DType, Geglu};
use crate::device::{Arg, Launch, Ptr};

/// Threads of a block.
const BLOCK: usize = 256;

impl Geglu for Cuda {
    /// By kernels/matmul.cu. h is computed from the products before they are rounded; its bits do not depend on `keep` or T.
    fn geglu_forward(
        &self,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<(Tensor, Tensor)>) {
        assert_bf16("X", x);
        assert_bf16("Wg", w_gate);
        assert_bf16("Wu", w_up);
        let features = w_gate.rows;
        assert_eq!((w_gate.cols, w_up.rows, w_up.cols), (x.cols, features, x.cols), "Wg and Wu are [F, D]");
        assert!(features.is_multiple_of(VECTOR), "F is a multiple of {VECTOR}, not {features}");
        let variant = Variant::geglu(x.rows, features, self.device().multiprocessors());
        let entry = match variant {
            T32X64 => Entry::GegluForward32x64,
            T64X64 => Entry::GegluForward64x64,
            _ => Entry::GegluForward128x128,
        };
        let empty = || self.empty(DType::Bf16, x.rows, features);
        let h = empty();
        let kept = keep.then(|| (empty(), empty()));
        let none = Arg::Ptr(Ptr(0));
        let (gate, up) = kept.as_ref().map_or((none.clone(), none), |(gate, up)| (gate.arg(), up.arg()));
        let launch = variant.launch(x.rows.div_ceil(variant.m), (2 * features).div_ceil(variant.n));
        let sizes: [Arg; 3] = [x.rows.into(), features.into(), x.cols.into()];
        let [tokens, features, width] = sizes;
        self.launch(
            entry,
            launch,
            &[x.arg(), w_gate.arg(), w_up.arg(), h.arg(), gate, up, tokens, features, width],
        );
        (h, kept)
    }

    /// Columns a multiple of 8.
    fn geglu_backward(&self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
        for x in [dh, gate, up] {
            assert!(x.dtype == DType::Bf16 && (x.rows, x.cols) == (dh.rows, dh.cols), "bf16 of one shape");
        }
        assert!(dh.cols.is_multiple_of(VECTOR), "rows of a multiple of {VECTOR} columns");
        let [d_gate, d_up] = [0, 1].map(|_| self.empty(DType::Bf16, dh.rows, dh.cols));
        let vectors = dh.rows * dh.cols / VECTOR;
        let launch = Launch::linear(vectors.div_ceil(BLOCK), BLOCK as u32);
        let args = [dh.arg(), gate.arg(), up.arg(), d_gate.arg(), d_up.arg(), (vectors as u64).into()];
        self.launch(Entry::GegluBackward, launch, &args);
        (d_gate, d_up)
    }

    /// All columns multiples of 8.
    fn gelu_product_forward(&self, gate: &Tensor, inputs: &Tensor, first: usize) -> Tensor {
        let (launch, figures) = product(gate, inputs, first);
        let h = self.empty(DType::Bf16, gate.rows, gate.cols);
        let args = [&[gate.arg(), inputs.arg(), h.arg()][..], &figures].concat();
        self.launch(Entry::GeluProductForward, launch, &args);
        h
    }

    /// All columns multiples of 8.
    fn gelu_product_backward(
        &self,
        dh: &Tensor,
        gate: &Tensor,
        inputs: &Tensor,
        first: usize,
        d_inputs: &mut Tensor,
    ) -> Tensor {
        let (launch, figures) = product(gate, inputs, first);
        for (x, like) in [(dh, gate), (&*d_inputs, inputs)] {
            assert!(
                x.dtype == DType::Bf16 && (x.rows, x.cols) == (like.rows, like.cols),
                "bf16 of one shape"
            );
        }
        let d_gate = self.empty(DType::Bf16, gate.rows, gate.cols);
        let tensors = [dh.arg(), gate.arg(), inputs.arg(), d_gate.arg(), d_inputs.arg()];
        self.launch(Entry::GeluProductBackward, launch, &[&tensors[..], &figures].concat());
        d_gate
    }
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
