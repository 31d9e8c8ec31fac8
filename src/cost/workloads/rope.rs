//! RoPE.

use std::cell::RefCell;

use super::{Workload, random};
use crate::backend::cuda::{Cuda, Tables};
use crate::backend::ops::*;
use crate::backend::{Batch, DType, HeadNorm, ModelShape, NormSpec, RopeSpec};
use crate::segments::Segments;

/// One token for each of `rows` positions, and rows of the cache for them.
fn one_segment(cuda: &Cuda, rows: usize) -> Tables {
    let segments = Segments::separate(&[rows]);
    let (ids, runs) = (vec![0; rows], segments.all_queries());
    cuda.tables(&Batch::new(&ids, &segments, &runs), &[])
}

/// q of a training batch and k of a decode step, without and with the norm of heads.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    const T: usize = 2048;
    const N: usize = 32;
    const NORM: NormSpec = NormSpec { eps: 1e-6, offset: 1.0 };
    let rope = RopeSpec::new(shape.head_dim, 10_000.0);
    let (dim, q_cols, k_cols) =
        (shape.head_dim, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let weight = 2 * dim;
    let mut all = Vec::new();
    for with_norm in [false, true] {
        let suffix = if with_norm { " norm" } else { "" };
        let norms = usize::from(with_norm);
        for rows in [T, N] {
            all.push(Workload {
                name: format!("rope_forward{suffix} q, T = {rows}"),
                bytes: (2 * rows * q_cols * 2 + rows * 4 + norms * weight) as u64,
                flops: 0,
                prepare: Box::new(move |cuda| {
                    let tables = one_segment(cuda, rows);
                    let (x, w) =
                        (random(cuda, 1, DType::Bf16, rows, q_cols), random(cuda, 2, DType::Bf16, 1, dim));
                    Box::new(move |cuda| {
                        let norm = with_norm.then_some(HeadNorm { weight: Some(&w), spec: NORM });
                        drop(cuda.rope_forward(&x, norm, &tables, &rope));
                    })
                }),
            });
        }
        all.push(Workload {
            name: format!("rope_append{suffix} q k v, T = {N}"),
            bytes: ((2 * q_cols + 4 * k_cols) * N * 2 + 2 * N * 4 + 2 * norms * weight) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let tables = one_segment(cuda, N);
                let q = random(cuda, 1, DType::Bf16, N, q_cols);
                let [k, v] = [2, 3].map(|seed| random(cuda, seed, DType::Bf16, N, k_cols));
                let weights = [4, 5].map(|seed| random(cuda, seed, DType::Bf16, 1, dim));
                let cached = RefCell::new([0, 1].map(|_| cuda.zeros(DType::Bf16, N, k_cols)));
                Box::new(move |cuda| {
                    let [cached_k, cached_v] = &mut *cached.borrow_mut();
                    let [w_q, w_k] = weights
                        .each_ref()
                        .map(|w| with_norm.then_some(HeadNorm { weight: Some(w), spec: NORM }));
                    let norms = [w_q, w_k, None];
                    drop(cuda.rope_append(&q, &k, &v, norms, &tables, &rope, cached_k, cached_v));
                })
            }),
        });
        all.push(Workload {
            name: format!("rope_backward{suffix} q, T = {T}"),
            bytes: ((2 + norms) * T * q_cols * 2 + T * 4 + norms * (weight + 8 * dim)) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let tables = one_segment(cuda, T);
                let [dy, x] = [1, 2].map(|seed| random(cuda, seed, DType::Bf16, T, q_cols));
                let w = random(cuda, 3, DType::Bf16, 1, dim);
                let dw = RefCell::new(random(cuda, 4, DType::F32, 1, dim));
                Box::new(move |cuda| {
                    let dw = &mut *dw.borrow_mut();
                    let norm = with_norm.then_some(HeadNorm { weight: Some((&w, dw)), spec: NORM });
                    drop(cuda.rope_backward(&dy, &x, norm, &tables, &rope));
                })
            }),
        });
    }
    all
}
