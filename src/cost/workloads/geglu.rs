//! GeGLU's gradient, and the product of gates with the layers' inputs of Gemma 4 E2B.

use std::cell::RefCell;

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape};

/// A training batch.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    let mut all = vec![workload(shape, 256)];
    all.extend(products(1024));
    all
}

/// At a batch of training.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload(shape, 4096)]
}

fn workload(shape: &ModelShape, t: usize) -> Workload {
    let f = shape.intermediate;
    Workload {
        name: format!("geglu_backward T = {t}"),
        bytes: (5 * t * f * 2) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let [dh, gate, up] = [1, 2, 3].map(|seed| random(cuda, seed, DType::Bf16, t, f));
            Box::new(move |cuda| drop(cuda.geglu_backward(&dh, &gate, &up)))
        }),
    }
}

/// Both passes, of `t` tokens and one of E2B's 35 layers.
fn products(t: usize) -> [Workload; 2] {
    const P: usize = 256;
    const WIDTH: usize = 35 * P;
    const FIRST: usize = 17 * P;
    let inputs = move |cuda: &_, seed| random(cuda, seed, DType::Bf16, t, WIDTH);
    let forward = Workload {
        name: format!("gelu_product_forward P = {P}, T = {t}"),
        bytes: (3 * t * P * 2) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let (gate, inputs) = (random(cuda, 1, DType::Bf16, t, P), inputs(cuda, 2));
            Box::new(move |cuda| drop(cuda.gelu_product_forward(&gate, &inputs, FIRST)))
        }),
    };
    let backward = Workload {
        name: format!("gelu_product_backward P = {P}, T = {t}"),
        bytes: (5 * t * P * 2) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let [dh, gate] = [1, 2].map(|seed| random(cuda, seed, DType::Bf16, t, P));
            let (inputs, d_inputs) = (inputs(cuda, 3), RefCell::new(inputs(cuda, 4)));
            Box::new(move |cuda| {
                let d_inputs = &mut *d_inputs.borrow_mut();
                drop(cuda.gelu_product_backward(&dh, &gate, &inputs, FIRST, d_inputs));
            })
        }),
    };
    [forward, backward]
}
