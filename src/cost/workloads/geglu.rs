//! GeGLU's gradient.

use super::{Workload, random};
use crate::backend::{Backend, DType, ModelShape};

/// A training batch.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload(shape, 256)]
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
