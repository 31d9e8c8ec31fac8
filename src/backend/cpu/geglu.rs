//! Gemma's gated MLP activation: h = gelu(gate) * up, with the tanh form of GELU (Hendrycks and Gimpel 2016).
//!
//! (1 + tanh u) / 2 is the logistic function of 2u, which is computed instead: it keeps its relative accuracy where
//! 1 + tanh u cancels.

use rayon::prelude::*;

use super::rows::new_rows;
use super::simd::{exp, multiversion};
use super::{Cpu, Tensor, matmul};
use crate::backend::Geglu;

/// sqrt(2 / pi) * 2.
const TWO_SQRT_2_OVER_PI: f32 = 1.595_769;
/// Weight of the cubic term.
const CUBIC: f32 = 0.044_715;

/// s = logistic(v) with v = 2 sqrt(2/pi) (x + 0.044715 x^3), and x times the derivative of s by x.
#[inline(always)]
fn gate_and_slope(x: f32) -> (f32, f32) {
    let square = x * x;
    let v = TWO_SQRT_2_OVER_PI * (CUBIC * square).mul_add(x, x);
    let e = exp(-v.abs());
    let small = e / (1.0 + e);
    let large = 1.0 / (1.0 + e);
    let dv = TWO_SQRT_2_OVER_PI * (3.0 * CUBIC).mul_add(square, 1.0);
    (if v < 0.0 { small } else { large }, small * large * dv * x)
}

multiversion! {
    fn forward_slices(gate: &[f32], up: &[f32], h: &mut [f32]) {
        for ((h, &x), up) in h.iter_mut().zip(gate).zip(up) {
            *h = x * gate_and_slope(x).0 * up;
        }
    }
}

multiversion! {
    fn backward_slices(dh: &[f32], gate: &[f32], up: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        for ((((dgate, dup), dh), &x), up) in dgate.iter_mut().zip(dup).zip(dh).zip(gate).zip(up) {
            let (s, slope) = gate_and_slope(x);
            *dgate = dh * up * (s + slope);
            *dup = dh * (x * s);
        }
    }
}

/// h = gelu_tanh(gate) * up, elementwise.
pub fn forward(gate: &Tensor, up: &Tensor) -> Tensor {
    assert_eq!((gate.rows, gate.cols), (up.rows, up.cols));
    let (g, u) = (gate.as_f32(), up.as_f32());
    let h = new_rows(g.len(), 1, |first, h| {
        let range = first..first + h.len();
        forward_slices(&g[range.clone()], &u[range], h);
    });
    Tensor::f32(gate.rows, gate.cols, h)
}

/// (dgate, dup) of [`forward`].
pub fn backward(dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
    /// Elements per task.
    const CHUNK: usize = 16 * 1024;
    assert_eq!((gate.rows, gate.cols), (up.rows, up.cols));
    assert_eq!((gate.rows, gate.cols), (dh.rows, dh.cols));
    let (d, g, u) = (dh.as_f32(), gate.as_f32(), up.as_f32());
    let mut dgate = vec![0.0; g.len()];
    let mut dup = vec![0.0; g.len()];
    dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK)).enumerate().for_each(|(i, (dgate, dup))| {
        let range = i * CHUNK..i * CHUNK + dgate.len();
        backward_slices(&d[range.clone()], &g[range.clone()], &u[range], dgate, dup);
    });
    (Tensor::f32(gate.rows, gate.cols, dgate), Tensor::f32(gate.rows, gate.cols, dup))
}

impl Geglu for Cpu {
    fn geglu_forward(
        &self,
        x: &Tensor,
        w_gate: &Tensor,
        w_up: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<(Tensor, Tensor)>) {
        let [gate, up] = matmul::forward(x, [w_gate, w_up], self.compute);
        let h = forward(&gate, &up);
        (h, keep.then_some((gate, up)))
    }

    fn geglu_backward(&self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
        backward(dh, gate, up)
    }

    fn gelu_product_forward(&self, gate: &Tensor, inputs: &Tensor, first: usize) -> Tensor {
        assert!(gate.rows == inputs.rows && first + gate.cols <= inputs.cols);
        let (g, u, cols) = (gate.as_f32(), inputs.as_f32(), gate.cols);
        let h = new_rows(gate.rows, cols, |row, block| {
            for (i, h) in block.chunks_exact_mut(cols).enumerate() {
                let row = row + i;
                forward_slices(&g[row * cols..][..cols], &u[row * inputs.cols + first..][..cols], h);
            }
        });
        Tensor::f32(gate.rows, cols, h)
    }

    fn gelu_product_backward(
        &self,
        dh: &Tensor,
        gate: &Tensor,
        inputs: &Tensor,
        first: usize,
        d_inputs: &mut Tensor,
    ) -> Tensor {
        let (rows, cols, width) = (gate.rows, gate.cols, inputs.cols);
        assert!(rows == inputs.rows && first + cols <= width && (dh.rows, dh.cols) == (rows, cols));
        assert_eq!((d_inputs.rows, d_inputs.cols), (rows, width));
        let (d, g, u) = (dh.as_f32(), gate.as_f32(), inputs.as_f32());
        let mut dgate = vec![0.0; g.len()];
        dgate
            .par_chunks_exact_mut(cols)
            .zip(d_inputs.as_f32_mut().par_chunks_exact_mut(width))
            .with_min_len((16 * 1024 / width).max(1))
            .enumerate()
            .for_each(|(row, (dgate, d_inputs))| {
                let range = row * cols..(row + 1) * cols;
                let up = &u[row * width + first..][..cols];
                backward_slices(&d[range.clone()], &g[range], up, dgate, &mut d_inputs[first..first + cols]);
            });
        Tensor::f32(rows, cols, dgate)
    }
}
