//! AdamW.

use std::cell::RefCell;

use super::{Workload, random_of};
use crate::backend::adamw::BLOCK;
use crate::backend::cuda::Tensor;
use crate::backend::cuda::adamw::Codes;
use crate::backend::ops::*;
use crate::backend::{AdamW, DType, ModelShape, Moments, Quantised, Uniform, Update, Weight};

/// A projection of one layer and a norm's weight.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    let shapes = [(shape.heads * shape.head_dim, shape.hidden), (1, shape.hidden)];
    all(shapes)
}

/// A matrix of the MLP's.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    all([(shape.intermediate, shape.hidden), (1, shape.hidden)])
}

fn all(shapes: [(usize, usize); 2]) -> Vec<Workload> {
    let kept = [(false, DType::F32), (true, DType::F32), (true, DType::Bf16)];
    kept.into_iter().map(|(small, gradients)| workload(shapes, small, gradients)).collect()
}

/// With f32 moments and masters, or with moments in codes of 8 bits and without masters.
fn workload(shapes: [(usize, usize); 2], small: bool, gradients: DType) -> Workload {
    let elements: usize = shapes.iter().map(|(rows, cols)| rows * cols).sum();
    let scales: usize = shapes.iter().map(|(rows, cols)| (rows * cols).div_ceil(BLOCK)).sum();
    Workload {
        name: format!(
            "adamw{}{} {elements} parameters",
            if small { ", 8 bits" } else { "" },
            if gradients == DType::Bf16 { ", bf16 gradients" } else { "" }
        ),
        bytes: (if small { elements * 8 + scales * 16 } else { elements * 26 }
            + elements * 2 * gradients.bytes()) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let of = |dtype, uniform: Uniform| {
                shapes.map(|(rows, cols)| random_of(cuda, &uniform, dtype, rows, cols))
            };
            let grads = of(gradients, Uniform::up_to(1.0, 1));
            let weights = of(DType::Bf16, Uniform::up_to(1.0, 2));
            let masters = of(DType::F32, Uniform::up_to(1.0, 2)).map(|master| (!small).then_some(master));
            let moments = shapes.map(|(rows, cols)| {
                let random = |uniform| random_of(cuda, &uniform, DType::F32, rows, cols);
                // Means of squares: not negative.
                let positive = Uniform { seed: 4, center: 0.5, spread: 0.5 };
                if !small {
                    return Moments::F32 { m: random(Uniform::up_to(1.0, 3)), v: random(positive) };
                }
                let codes: Vec<u8> = (0..rows * cols).map(|i| (i * 37 % 251) as u8).collect();
                let quantised = || Quantised {
                    codes: cuda.upload_codes(&codes),
                    scales: random_of(cuda, &positive, DType::F32, 1, codes.len().div_ceil(BLOCK)),
                };
                Moments::Blockwise { m: quantised(), v: quantised() }
            });
            let held = RefCell::new((grads, masters, moments, weights));
            Box::new(move |cuda| {
                let (grads, masters, moments, weights) = &mut *held.borrow_mut();
                let tensors = grads.iter_mut().zip(masters).zip(moments).zip(weights);
                let mut updates: Vec<Update<Tensor, Codes>> = (0..)
                    .zip(tensors)
                    .map(|(number, (((grad, master), moments), weight))| Update {
                        grad,
                        moments,
                        weight: match master {
                            Some(master) => Weight::Master { master, copy: weight },
                            None => Weight::Bf16 { weight, number },
                        },
                        weight_decay: 0.1,
                    })
                    .collect();
                let hyper = AdamW {
                    lr: 1e-3,
                    beta1: 0.9,
                    beta2: 0.95,
                    eps: 1e-8,
                    step: 3,
                    grad_scale: 0.5,
                    key: [5, 6],
                };
                cuda.adamw(&hyper, &mut updates);
            })
        }),
    }
}
