//! Sums of squares.

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape};

/// The gradient of one layer's projection and of a norm.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    let shapes = [(shape.heads * shape.head_dim, shape.hidden), (1, shape.hidden)];
    vec![workload(shapes, DType::F32), workload(shapes, DType::Bf16)]
}

/// That of a matrix of the MLP's.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload([(shape.intermediate, shape.hidden), (1, shape.hidden)], DType::F32)]
}

fn workload(shapes: [(usize, usize); 2], dtype: DType) -> Workload {
    let of_bf16 = if dtype == DType::Bf16 { ", bf16," } else { "" };
    let elements: usize = shapes.iter().map(|(rows, cols)| rows * cols).sum();
    Workload {
        name: format!("sum_squares{of_bf16} {elements} elements"),
        bytes: (elements * dtype.bytes()) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let x = shapes.map(|(rows, cols)| random(cuda, 1, dtype, rows, cols));
            Box::new(move |cuda| drop(cuda.sum_squares(&[&x[0], &x[1]])))
        }),
    }
}
