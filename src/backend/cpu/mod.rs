//! The native backend: f32 arithmetic throughout, parameters stored as f32 or bf16.

pub mod adamw;
pub mod attention;
pub mod embed;
pub mod geglu;
pub mod lm_head;
pub mod matmul;
pub mod reduce;
pub mod rms_norm;
pub mod rope;
pub mod rows;
pub mod simd;

use half::bf16;

use super::{AdamW, AttentionSpec, Backend, Choice, DType, Direction, HeadSpec, Sampled, Target, Truncation};
use crate::segments::{QueryRun, Segments};

/// A row-major matrix in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// `rows * cols` elements.
    pub data: Data,
}

/// The elements of a [`Tensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// Activations, gradients, master weights.
    F32(Vec<f32>),
    /// Parameters.
    Bf16(Vec<bf16>),
}

impl Tensor {
    /// An f32 matrix.
    pub fn f32(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols);
        Self { rows, cols, data: Data::F32(data) }
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::Bf16(_) => DType::Bf16,
        }
    }

    /// The elements, where the op's contract says f32.
    pub fn as_f32(&self) -> &[f32] {
        match &self.data {
            Data::F32(d) => d,
            Data::Bf16(_) => panic!("the op's contract says f32"),
        }
    }

    /// The elements, where the op's contract says f32.
    pub fn as_f32_mut(&mut self) -> &mut [f32] {
        match &mut self.data {
            Data::F32(d) => d,
            Data::Bf16(_) => panic!("the op's contract says f32"),
        }
    }
}

/// The CPU as a device: no state, the thread pool is rayon's.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cpu;

impl Backend for Cpu {
    type Tensor = Tensor;

    fn zeros(&self, rows: usize, cols: usize) -> Tensor {
        Tensor::f32(rows, cols, vec![0.0; rows * cols])
    }

    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Tensor {
        assert_eq!(bytes.len(), rows * cols * dtype.bytes(), "the bytes of a [{rows}, {cols}] matrix");
        // `bytes` may lie at any address: it comes from a mapped file.
        let data = match dtype {
            DType::F32 => Data::F32(bytemuck::pod_collect_to_vec(bytes)),
            DType::Bf16 => Data::Bf16(bytemuck::pod_collect_to_vec(bytes)),
        };
        Tensor { rows, cols, data }
    }

    fn download(&self, x: &Tensor) -> Vec<u8> {
        match &x.data {
            Data::F32(d) => bytemuck::cast_slice(d).to_vec(),
            Data::Bf16(d) => bytemuck::cast_slice(d).to_vec(),
        }
    }

    fn to_f32(&self, x: &Tensor) -> Vec<f32> {
        let mut out = vec![0.0; x.rows * x.cols];
        matmul::widen_rows(x, 0..x.rows, &mut out, x.cols);
        out
    }

    fn shape(&self, x: &Tensor) -> (usize, usize) {
        (x.rows, x.cols)
    }

    fn dtype(&self, x: &Tensor) -> DType {
        x.dtype()
    }

    fn copy(&self, x: &Tensor) -> Tensor {
        x.clone()
    }

    fn clear(&self, x: &mut Tensor) {
        match &mut x.data {
            Data::F32(d) => d.fill(0.0),
            Data::Bf16(d) => d.fill(bf16::ZERO),
        }
    }

    fn embed_forward(&self, table: &Tensor, ids: &[u32], scale: f32) -> Tensor {
        embed::forward(table, ids, scale)
    }

    fn embed_backward(&self, dx: &Tensor, ids: &[u32], scale: f32, dtable: &mut Tensor) {
        embed::backward(dx, ids, scale, dtable);
    }

    fn rms_norm_forward(&self, x: &Tensor, w: &Tensor, eps: f32) -> Tensor {
        rms_norm::forward(x, w, eps)
    }

    fn rms_norm_backward(&self, dy: &Tensor, x: &Tensor, w: &Tensor, eps: f32, dw: &mut Tensor) -> Tensor {
        rms_norm::backward(dy, x, w, eps, dw)
    }

    fn matmul_forward(&self, x: &Tensor, w: &Tensor) -> Tensor {
        matmul::forward(x, w)
    }

    fn matmul_backward_input(&self, dy: &Tensor, w: &Tensor, dx: &mut Tensor) {
        matmul::backward_input(dy, w, dx);
    }

    fn matmul_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
        matmul::backward_weight(dy, x, dw);
    }

    fn rope(
        &self,
        x: &mut Tensor,
        positions: &[u32],
        head_dim: usize,
        theta: f64,
        factor: f64,
        direction: Direction,
    ) {
        rope::rotate(x, positions, head_dim, theta, factor, direction);
    }

    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        segments: &Segments,
        runs: &[QueryRun],
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor) {
        attention::forward(q, k, v, segments, runs, spec)
    }

    fn attention_backward(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        segments: &Segments,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor, Tensor) {
        attention::backward(d_o, q, k, v, o, lse, segments, spec)
    }

    fn geglu_forward(&self, gate: &Tensor, up: &Tensor) -> Tensor {
        geglu::forward(gate, up)
    }

    fn geglu_backward(&self, dh: &Tensor, gate: &Tensor, up: &Tensor) -> (Tensor, Tensor) {
        geglu::backward(dh, gate, up)
    }

    fn add(&self, x: &mut Tensor, y: &Tensor) {
        rows::add(x, y);
    }

    fn gather_rows(&self, x: &Tensor, indices: &[u32]) -> Tensor {
        rows::gather(x, indices)
    }

    fn scatter_add_rows(&self, dy: &Tensor, indices: &[u32], dx: &mut Tensor) {
        rows::scatter_add(dy, indices, dx);
    }

    fn write_rows(&self, src: &Tensor, indices: &[u32], dst: &mut Tensor) {
        rows::write(src, indices, dst);
    }

    fn lm_head_sample(
        &self,
        x: &Tensor,
        table: &Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        choices: &[Choice],
    ) -> Vec<Sampled> {
        lm_head::sample(x, table, head, truncation, choices)
    }

    fn lm_head_logprob_forward(
        &self,
        x: &Tensor,
        table: &Tensor,
        head: &HeadSpec,
        targets: &[Target],
    ) -> (Vec<f32>, Vec<f32>) {
        lm_head::logprob_forward(x, table, head, targets)
    }

    fn lm_head_logprob_backward(
        &self,
        x: &Tensor,
        table: &Tensor,
        head: &HeadSpec,
        lse: &[f32],
        targets: &[Target],
        weights: &[f32],
        dtable: &mut Tensor,
    ) -> Tensor {
        lm_head::logprob_backward(x, table, head, lse, targets, weights, dtable)
    }

    fn sum_squares(&self, x: &Tensor) -> f64 {
        reduce::sum_squares(x)
    }

    fn adamw(
        &self,
        hyper: &AdamW,
        grad: &Tensor,
        master: &mut Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        copy: Option<&mut Tensor>,
    ) {
        adamw::step(hyper, grad, master, m, v, copy);
    }
}
