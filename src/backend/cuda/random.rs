//! Launcher of kernels/random.cu.

use super::entries::Entry;
use super::workload::{Shape, Workload};
use super::{Cuda, Tensor};
use crate::backend::{DType, Uniform};
use crate::device::{Arg, Launch};

const THREADS: usize = 256;
/// Bytes that a thread makes.
const PER_THREAD: usize = 16;

/// `struct Uniform` of the kernel.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Argument {
    center: f32,
    spread: f32,
    seed: u32,
}

/// See [`crate::backend::Backend::random`].
pub(super) fn random(cuda: &Cuda, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor {
    let x = cuda.empty(dtype, rows, cols);
    let &Uniform { seed, center, spread } = uniform;
    let argument = Arg::Bytes(bytemuck::bytes_of(&Argument { center, spread, seed }).to_vec());
    let entry = match dtype {
        DType::F32 => Entry::RandomF32,
        DType::Bf16 => Entry::RandomBf16,
    };
    let launch = Launch::linear(x.bytes().div_ceil(PER_THREAD * THREADS), THREADS as u32);
    cuda.launch(entry, launch, &[x.arg(), Arg::U64((rows * cols) as u64), argument]);
    x
}

/// A matrix of weights, and a gradient's or a moment's.
pub(super) fn workloads(shape: &Shape) -> Vec<Workload> {
    let (rows, cols) = (shape.heads * shape.head_dim, shape.hidden);
    [("bf16", DType::Bf16), ("f32", DType::F32)]
        .map(|(name, dtype)| Workload {
            name: format!("random_{name} {} elements", rows * cols),
            bytes: (rows * cols * dtype.bytes()) as u64,
            flops: 0,
            prepare: Box::new(move |_| {
                Box::new(move |cuda| drop(random(cuda, &Uniform::up_to(1.0, 1), dtype, rows, cols)))
            }),
        })
        .into()
}
