//! Ops at the shapes of real models, for counting and timing: what `bon-engine kernels`, the tests with ceilings and
//! the benchmarks run. Every op's file lists its own in `workloads`, and in `large_workloads` what is
//! only timed.

use half::bf16;

use super::{Cuda, Tensor};
use crate::backend::{Backend, DType, Uniform};

/// The figures of a model that shapes depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// For people.
    pub name: &'static str,
    /// D.
    pub hidden: usize,
    /// H.
    pub heads: usize,
    /// K.
    pub kv_heads: usize,
    /// Dh.
    pub head_dim: usize,
    /// F.
    pub intermediate: usize,
    /// V.
    pub vocab: usize,
}

/// Gemma 2B (version 1), the model of the paper.
pub const GEMMA_2B: Shape = Shape {
    name: "Gemma 2B",
    hidden: 2048,
    heads: 8,
    kv_heads: 1,
    head_dim: 256,
    intermediate: 16_384,
    vocab: 256_000,
};

/// Gemma 3 270M, the model of the demo.
pub const GEMMA_270M: Shape = Shape {
    name: "Gemma 3 270M",
    hidden: 640,
    heads: 4,
    kv_heads: 1,
    head_dim: 256,
    intermediate: 2048,
    vocab: 262_144,
};

/// An op with inputs on the device.
pub type Prepared = Box<dyn Fn(&Cuda)>;

/// One op at one shape.
pub struct Workload {
    /// The op and its shape, as in `matmul_forward q k v, T = 512`.
    pub name: String,
    /// Compulsory traffic: every input read once and every output written once, in bytes.
    pub bytes: u64,
    /// FLOPs of the op's matrix products; 0 where it has none.
    pub flops: u64,
    /// Makes inputs; the result runs the op once and may run again.
    pub prepare: Box<dyn Fn(&Cuda) -> Prepared>,
}

/// Random numbers in (-1, 1).
pub(super) fn random(cuda: &Cuda, seed: u32, dtype: DType, rows: usize, cols: usize) -> Tensor {
    random_of(cuda, &Uniform::up_to(1.0, seed), dtype, rows, cols)
}

/// Random numbers. A GPU makes them itself; for the virtual one the host, which is faster, makes the same.
pub(super) fn random_of(cuda: &Cuda, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor {
    if let Ok(Some(_)) = cuda.device().available() {
        return cuda.random(uniform, dtype, rows, cols);
    }
    let values = (0..(rows * cols).div_ceil(4) as u64).flat_map(|n| uniform.four(n)).take(rows * cols);
    match dtype {
        DType::F32 => cuda.upload(dtype, rows, cols, bytemuck::cast_slice(&values.collect::<Vec<f32>>())),
        DType::Bf16 => {
            let values: Vec<bf16> = values.map(bf16::from_f32).collect();
            cuda.upload(dtype, rows, cols, bytemuck::cast_slice(&values))
        }
    }
}

/// All ops' workloads at a shape, the LM head's at a slice of the vocabulary that the virtual GPU does in seconds.
pub fn workloads(shape: &Shape) -> Vec<Workload> {
    with_vocabulary(shape, 2048)
}

/// What is timed on a GPU: the same at the whole vocabulary, of which a slice is a handful of blocks, so that its time
/// would say nothing; and the sizes that training and large batches run, minutes of work for the virtual GPU.
pub fn whole_workloads(shape: &Shape) -> Vec<Workload> {
    let mut all = with_vocabulary(shape, shape.vocab);
    all.extend(super::adamw::large_workloads(shape));
    all.extend(super::attention::large_workloads(shape));
    all.extend(super::attention_backward::large_workloads(shape));
    all.extend(super::geglu::large_workloads(shape));
    all.extend(super::lm_head::large_workloads(shape));
    all.extend(super::matmul::large_workloads(shape));
    all.extend(super::reduce::large_workloads(shape));
    all
}

fn with_vocabulary(shape: &Shape, tokens: usize) -> Vec<Workload> {
    let mut all = Vec::new();
    all.extend(super::adamw::workloads(shape));
    all.extend(super::attention::workloads(shape));
    all.extend(super::attention_backward::workloads(shape));
    all.extend(super::embed::workloads(shape));
    all.extend(super::geglu::workloads(shape));
    all.extend(super::lm_head::workloads(shape, tokens));
    all.extend(super::matmul::workloads(shape));
    all.extend(super::random::workloads(shape));
    all.extend(super::reduce::workloads(shape));
    all.extend(super::rms_norm::workloads(shape));
    all.extend(super::rope::workloads(shape));
    all.extend(super::rows::workloads(shape));
    all
}
