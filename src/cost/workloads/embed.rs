//! The embedding.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::{Workload, random};
use crate::backend::cuda::Cuda;
use crate::backend::ops::*;
use crate::backend::{Batch, DType, ModelShape};
use crate::segments::Segments;

/// A training batch; most of a vocabulary does not occur in it, so a small embedding serves.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    const T: usize = 2048;
    const VOCAB: u32 = 4096;
    const SCALE: f32 = 25.25;
    let d = shape.hidden;
    // A few hundred ids, the frequent ones some ten times.
    let ids: Vec<u32> = (0..T as u32).map(|t| (t * t % 1021 * 31 + t % 7) % VOCAB).collect();
    let distinct = ids.iter().collect::<BTreeSet<_>>().len();
    let tables = move |cuda: &Cuda| {
        let segments = Segments::separate(&[T]);
        let runs = segments.all_queries();
        cuda.tables(&Batch::new(&ids, &segments, &runs), &[])
    };
    let tables_backward = tables.clone();
    let backward = |what: &str, dtype: DType| {
        let tables = tables_backward.clone();
        Workload {
            name: format!("embed_backward T = {T}{what}"),
            bytes: (distinct * (2 * d * dtype.bytes() + 12) + T * (d * 2 + 4)) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (tables, dx) = (tables(cuda), random(cuda, 1, DType::Bf16, T, d));
                let d_embedding = RefCell::new(random(cuda, 2, dtype, VOCAB as usize, d));
                Box::new(move |cuda| cuda.embed_backward(&dx, &tables, SCALE, &mut d_embedding.borrow_mut()))
            }),
        }
    };
    vec![
        Workload {
            name: format!("embed_forward T = {T}"),
            bytes: ((distinct + T) * d * 2 + T * 4) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (tables, embedding) = (tables(cuda), random(cuda, 1, DType::Bf16, VOCAB as usize, d));
                Box::new(move |cuda| drop(cuda.embed_forward(&embedding, &tables, SCALE)))
            }),
        },
        backward("", DType::F32),
        backward(", bf16", DType::Bf16),
    ]
}
