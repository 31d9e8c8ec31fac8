//! Ops at the shapes of real models, for counting and timing: what `bon-engine kernels`, the tests with ceilings and
//! the benchmarks run. Every op's file has its own in `workloads`, and in `large_workloads` those that are
//! only timed.

mod adamw;
mod attention;
mod attention_backward;
mod embed;
mod experts;
mod geglu;
mod lm_head;
mod matmul;
mod random;
mod reduce;
mod rms_norm;
mod rope;
mod rows;

use half::bf16;

use crate::backend::cuda::{Cuda, Tensor};
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape, Uniform};

/// A model whose shape workloads have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Model {
    /// Its name, for people.
    pub name: &'static str,
    /// Its shape.
    pub shape: ModelShape,
}

/// Gemma 2B (version 1), the model of the paper.
pub const GEMMA_2B: Model = Model {
    name: "Gemma 2B",
    shape: ModelShape {
        hidden: 2048,
        heads: 8,
        kv_heads: 1,
        head_dim: 256,
        intermediate: 16_384,
        vocab: 256_000,
        per_layer_width: 0,
        per_layer_columns: 0,
        experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    },
};

/// Gemma 3 270M, the model of the demo.
pub const GEMMA_270M: Model = Model {
    name: "Gemma 3 270M",
    shape: ModelShape {
        hidden: 640,
        heads: 4,
        kv_heads: 1,
        head_dim: 256,
        intermediate: 2048,
        vocab: 262_144,
        per_layer_width: 0,
        per_layer_columns: 0,
        experts: 0,
        experts_per_token: 0,
        expert_width: 0,
    },
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
pub fn workloads(model: &Model) -> Vec<Workload> {
    with_vocabulary(&model.shape, 2048)
}

/// What is timed on a GPU: the same at the whole vocabulary, of which a slice is a handful of blocks, so that its time
/// would say nothing; and the sizes that training and large batches run, minutes of work for the virtual GPU.
pub fn whole_workloads(model: &Model) -> Vec<Workload> {
    let shape = &model.shape;
    let mut all = with_vocabulary(shape, shape.vocab);
    all.extend(adamw::large_workloads(shape));
    all.extend(attention::large_workloads(shape));
    all.extend(attention_backward::large_workloads(shape));
    all.extend(experts::large_workloads(shape));
    all.extend(geglu::large_workloads(shape));
    all.extend(lm_head::large_workloads(shape));
    all.extend(matmul::large_workloads(shape));
    all.extend(reduce::large_workloads(shape));
    all
}

fn with_vocabulary(shape: &ModelShape, tokens: usize) -> Vec<Workload> {
    let mut all = Vec::new();
    all.extend(adamw::workloads(shape));
    all.extend(attention::workloads(shape));
    all.extend(attention_backward::workloads(shape));
    all.extend(embed::workloads(shape));
    all.extend(experts::workloads(shape));
    all.extend(geglu::workloads(shape));
    all.extend(lm_head::workloads(shape, tokens));
    all.extend(matmul::workloads(shape));
    all.extend(random::workloads(shape));
    all.extend(reduce::workloads(shape));
    all.extend(rms_norm::workloads(shape));
    all.extend(rope::workloads(shape));
    all.extend(rows::workloads(shape));
    all
}
