//! Launcher of kernels/adamw.cu.

use std::cell::RefCell;

use super::entries::Entry;
use super::workload::{Shape, Workload, random_of};
use super::{Cuda, Tensor};
use crate::backend::{AdamW, DType, Uniform, Update};
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

/// A projection of one layer and a norm's weight.
pub(super) fn workloads(shape: &Shape) -> Vec<Workload> {
    vec![workload([(shape.heads * shape.head_dim, shape.hidden), (1, shape.hidden)])]
}

/// A matrix of the MLP's.
pub(super) fn large_workloads(shape: &Shape) -> Vec<Workload> {
    vec![workload([(shape.intermediate, shape.hidden), (1, shape.hidden)])]
}

fn workload(shapes: [(usize, usize); 2]) -> Workload {
    let elements: usize = shapes.iter().map(|(rows, cols)| rows * cols).sum();
    Workload {
        name: format!("adamw {elements} parameters"),
        bytes: (elements * 34) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let of = |uniform: Uniform| {
                shapes.map(|(rows, cols)| random_of(cuda, &uniform, DType::F32, rows, cols))
            };
            let [grads, masters, ms] = [1, 2, 3].map(|seed| of(Uniform::up_to(1.0, seed)));
            // Means of squares: not negative.
            let vs = of(Uniform { seed: 4, center: 0.5, spread: 0.5 });
            let copies = shapes.map(|(rows, cols)| cuda.empty(DType::Bf16, rows, cols));
            let held = RefCell::new((grads, masters, ms, vs, copies));
            Box::new(move |cuda| {
                let (grads, masters, ms, vs, copies) = &mut *held.borrow_mut();
                let tensors = grads.iter_mut().zip(masters).zip(ms).zip(vs).zip(copies);
                let mut updates: Vec<Update<Tensor>> = tensors
                    .map(|((((grad, master), m), v), copy)| Update {
                        grad,
                        master,
                        m,
                        v,
                        copy: Some(copy),
                        weight_decay: 0.1,
                    })
                    .collect();
                let hyper = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 3, grad_scale: 0.5 };
                step(cuda, &hyper, &mut updates);
            })
        }),
    }
}
