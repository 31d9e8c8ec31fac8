//! Sums of squares.

use super::{Workload, random};
use crate::backend::{Backend, DType, ModelShape};

/// The gradient of one layer's projection and of a norm.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload([(shape.heads * shape.head_dim, shape.hidden), (1, shape.hidden)])]
}

/// That of a matrix of the MLP's.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload([(shape.intermediate, shape.hidden), (1, shape.hidden)])]
}

fn workload(shapes: [(usize, usize); 2]) -> Workload {
    let elements: usize = shapes.iter().map(|(rows, cols)| rows * cols).sum();
    Workload {
        name: format!("sum_squares {elements} elements"),
        bytes: (elements * 4) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let x = shapes.map(|(rows, cols)| random(cuda, 1, DType::F32, rows, cols));
            Box::new(move |cuda| drop(cuda.sum_squares(&[&x[0], &x[1]])))
        }),
    }
}
