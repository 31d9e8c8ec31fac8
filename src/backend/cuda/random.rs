//! Launcher of kernels/random.cu.

use super::entries::{Entry, same_size};
use super::{Cuda, Tensor};
use crate::backend::{DType, Random, Uniform};
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

same_size!(random: Argument = UNIFORM_BYTES);

impl Random for Cuda {
    fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let x = self.empty(dtype, rows, cols);
        let &Uniform { seed, center, spread } = uniform;
        let argument = Arg::Bytes(bytemuck::bytes_of(&Argument { center, spread, seed }).to_vec());
        let entry = match dtype {
            DType::F32 => Entry::RandomF32,
            DType::Bf16 => Entry::RandomBf16,
        };
        let launch = Launch::linear(x.bytes().div_ceil(PER_THREAD * THREADS), THREADS as u32);
        self.launch(entry, launch, &[x.arg(), Arg::U64((rows * cols) as u64), argument]);
        x
    }
}
