//! Launcher of kernels/reduce.cu.

use super::entries::shared::reduce::THREADS;
use super::entries::{Entry, same_size};
use super::{Cuda, Tensor, narrow};
use crate::backend::{DType, Reduce};
use crate::device::Launch;

/// Elements of a block. They determine the order of the sum.
const CHUNK: usize = 64 * 1024;

/// `struct Chunk` of the kernel.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Chunk {
    x: u64,
    len: u32,
    is_bf16: u32,
}

same_size!(reduce: Chunk = CHUNK_BYTES);

impl Reduce for Cuda {
    fn sum_squares(&self, x: &[&Tensor]) -> Vec<f64> {
        let mut chunks = Vec::new();
        let mut firsts = vec![0u32];
        for x in x {
            let n = x.rows * x.cols;
            chunks.extend((0..n).step_by(CHUNK).map(|first| Chunk {
                x: x.memory.ptr().0 + (x.dtype.bytes() * first) as u64,
                len: narrow(CHUNK.min(n - first)),
                is_bf16: u32::from(x.dtype == DType::Bf16),
            }));
            firsts.push(narrow(chunks.len()));
        }
        let (on_device, firsts) = (self.array(&chunks), self.array(&firsts));
        let partials = self.memory(8 * chunks.len());
        self.launch(
            Entry::ReduceSquares,
            Launch::linear(chunks.len(), THREADS as u32),
            &[on_device.arg(), partials.arg()],
        );
        let sums = self.memory(8 * x.len());
        let args = [partials.arg(), firsts.arg(), sums.arg()];
        self.launch(Entry::ReducePartials, Launch::linear(x.len(), THREADS as u32), &args);
        self.read(&sums, x.len())
    }
}
