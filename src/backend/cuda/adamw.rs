//! Launcher of kernels/adamw.cu.

use super::entries::{Entry, same_size};
use super::{Cuda, Tensor};
use crate::backend::{AdamW, AdamWCoefficients, DType, Update};
use crate::device::{Arg, Launch};

/// Elements of a block: a few MiB of traffic. The list of chunks is small beside that, and blocks still divide evenly.
const CHUNK: usize = 64 * 1024;

/// `struct Chunk` of the kernel.
#[derive(Clone, Copy, bytemuck::NoUninit)]
#[repr(C)]
struct Chunk {
    grad: u64,
    master: u64,
    m: u64,
    v: u64,
    copy: u64,
    len: u32,
    keep: f32,
}

same_size!(adamw: Chunk = CHUNK_BYTES, AdamWCoefficients = STEP_BYTES);

/// See [`crate::backend::Backend::adamw`].
pub(super) fn step(cuda: &Cuda, hyper: &AdamW, updates: &mut [Update<Tensor>]) {
    let mut chunks = Vec::new();
    for u in updates {
        let shape = (u.master.rows, u.master.cols);
        for x in [&*u.grad, &*u.master, &*u.m, &*u.v] {
            assert!(x.dtype == DType::F32 && (x.rows, x.cols) == shape, "f32 of one shape");
        }
        if let Some(copy) = &u.copy {
            assert!(
                copy.dtype == DType::Bf16 && (copy.rows, copy.cols) == shape,
                "a bf16 copy of that shape"
            );
        }
        let keep = hyper.keep(u.weight_decay);
        let n = shape.0 * shape.1;
        for first in (0..n).step_by(CHUNK) {
            let at = |x: &Tensor| x.memory.ptr().0 + (first * x.dtype.bytes()) as u64;
            chunks.push(Chunk {
                grad: at(u.grad),
                master: at(u.master),
                m: at(u.m),
                v: at(u.v),
                copy: u.copy.as_deref().map_or(0, at),
                len: CHUNK.min(n - first) as u32,
                keep,
            });
        }
    }
    let step = Arg::Bytes(bytemuck::bytes_of(&hyper.coefficients()).to_vec());
    let on_device = cuda.array(&chunks);
    cuda.launch(Entry::Adamw, Launch::linear(chunks.len(), 256), &[on_device.arg(), step]);
}
