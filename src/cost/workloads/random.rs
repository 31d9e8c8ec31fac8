//! Random numbers.

use super::Workload;
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape, Uniform};

/// A matrix of weights, and a gradient's or a moment's.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    let (rows, cols) = (shape.heads * shape.head_dim, shape.hidden);
    [("bf16", DType::Bf16), ("f32", DType::F32)]
        .map(|(name, dtype)| Workload {
            name: format!("random_{name} {} elements", rows * cols),
            bytes: (rows * cols * dtype.bytes()) as u64,
            flops: 0,
            prepare: Box::new(move |_| {
                Box::new(move |cuda| drop(cuda.random(&Uniform::up_to(1.0, 1), dtype, rows, cols)))
            }),
        })
        .into()
}
