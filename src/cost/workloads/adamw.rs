//! AdamW.

use std::cell::RefCell;

use super::{Workload, random_of};
use crate::backend::cuda::Tensor;
use crate::backend::{AdamW, Backend, DType, ModelShape, Uniform, Update};

/// A projection of one layer and a norm's weight.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload([(shape.heads * shape.head_dim, shape.hidden), (1, shape.hidden)])]
}

/// A matrix of the MLP's.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
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
            let copies = shapes.map(|(rows, cols)| cuda.zeros(DType::Bf16, rows, cols));
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
                cuda.adamw(&hyper, &mut updates);
            })
        }),
    }
}
