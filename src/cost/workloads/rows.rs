//! Moving rows, and sums of them.

use std::cell::RefCell;

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape};

/// The rows that predict a token, of a training batch; a matrix of weights that the optimizer begins with.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    const TOTAL: usize = 2048;
    const PICKED: usize = 1536;
    const WIDENED: usize = 2048;
    let d = shape.hidden;
    let picked: Vec<u32> = (0..PICKED as u32).map(|i| i * 4 / 3).collect();
    let scattered = picked.clone();
    vec![
        Workload {
            name: format!("gather_rows {PICKED} of {TOTAL}"),
            bytes: (2 * PICKED * d * 2 + PICKED * 4) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (x, rows) = (random(cuda, 1, DType::Bf16, TOTAL, d), picked.clone());
                Box::new(move |cuda| drop(cuda.gather_rows(&x, &rows)))
            }),
        },
        Workload {
            name: format!("scatter_rows {PICKED} into {TOTAL}"),
            bytes: ((PICKED + TOTAL) * d * 2 + TOTAL * 4) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (dy, rows) = (random(cuda, 1, DType::Bf16, PICKED, d), scattered.clone());
                Box::new(move |cuda| drop(cuda.scatter_rows(&dy, &rows, TOTAL)))
            }),
        },
        Workload {
            name: format!("widen_rows {WIDENED}"),
            bytes: (WIDENED * d * (DType::Bf16.bytes() + DType::F32.bytes())) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let x = random(cuda, 1, DType::Bf16, WIDENED, d);
                Box::new(move |cuda| drop(cuda.widened(&x)))
            }),
        },
        Workload {
            name: format!("accumulate_rows {WIDENED}"),
            bytes: (WIDENED * d * (DType::Bf16.bytes() + 2 * DType::F32.bytes())) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let x = random(cuda, 1, DType::Bf16, WIDENED, d);
                let sum = RefCell::new(random(cuda, 2, DType::F32, WIDENED, d));
                Box::new(move |cuda| cuda.accumulate(&x, &mut sum.borrow_mut()))
            }),
        },
        Workload {
            name: format!("narrow_rows {WIDENED}"),
            bytes: (WIDENED * d * (DType::Bf16.bytes() + DType::F32.bytes())) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let sum = random(cuda, 1, DType::F32, WIDENED, d);
                Box::new(move |cuda| drop(cuda.narrowed(&sum)))
            }),
        },
    ]
}
