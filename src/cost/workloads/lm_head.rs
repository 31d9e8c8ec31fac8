//! The LM head.

use std::sync::{Mutex, PoisonError};

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{Choice, DType, HeadSpec, HeadTrace, ModelShape, Target, Truncation};
use crate::rng::DrawKey;

/// The first `slice` tokens of the vocabulary: every chunk of it is the same work.
pub(super) fn workloads(shape: &ModelShape, slice: usize) -> Vec<Workload> {
    vec![
        sampled(shape, slice, 32),
        sampled_truncated(shape, slice),
        trained(shape, slice, 256),
        trained_backward(shape, slice, 256),
    ]
}

/// Decoding with many streams, and a batch of training.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    let slice = shape.vocab;
    vec![sampled(shape, slice, 256), trained(shape, slice, 4096), trained_backward(shape, slice, 4096)]
}

const HEAD: HeadSpec = HeadSpec { softcap: None, temperature: 1.0 };

fn hidden_bytes(shape: &ModelShape, rows: usize) -> u64 {
    (rows * shape.hidden * DType::Bf16.bytes()) as u64
}

fn product_flops(shape: &ModelShape, slice: usize, rows: usize) -> u64 {
    2 * (rows * slice * shape.hidden) as u64
}

/// A draw for each of `rows` streams.
fn draws(rows: usize) -> Vec<Choice> {
    let key = |stream| DrawKey { key: [1, 2], prompt: 3, stream, position: 4 };
    (0..rows as u32).map(|s| Choice::Draw(key(s))).collect()
}

fn sampled(shape: &ModelShape, slice: usize, rows: usize) -> Workload {
    let &ModelShape { hidden: d, vocab, .. } = shape;
    Workload {
        name: format!("lm_head_sample {rows} rows, {slice} of {vocab} tokens"),
        bytes: hidden_bytes(shape, slice + rows) + (rows * size_of::<[u32; 2]>()) as u64,
        flops: product_flops(shape, slice, rows),
        prepare: Box::new(move |cuda| {
            let (x, embedding) =
                (random(cuda, 1, DType::Bf16, rows, d), random(cuda, 2, DType::Bf16, slice, d));
            let choices = draws(rows);
            Box::new(move |cuda| {
                drop(cuda.lm_head_sample(&x, &embedding, &HEAD, &Truncation::default(), &choices))
            })
        }),
    }
}

fn sampled_truncated(shape: &ModelShape, slice: usize) -> Workload {
    const TRUNCATED: usize = 16;
    let &ModelShape { hidden: d, vocab, .. } = shape;
    Workload {
        name: format!("lm_head_truncated {TRUNCATED} rows, {slice} of {vocab} tokens"),
        bytes: hidden_bytes(shape, slice + TRUNCATED) + (2 * TRUNCATED * slice * DType::F32.bytes()) as u64,
        flops: product_flops(shape, slice, TRUNCATED),
        prepare: Box::new(move |cuda| {
            let x = random(cuda, 1, DType::Bf16, TRUNCATED, d);
            let embedding = random(cuda, 2, DType::Bf16, slice, d);
            let truncation = Truncation { top_k: 64, top_p: 0.95, min_p: 0.01 };
            let choices = draws(TRUNCATED);
            Box::new(move |cuda| drop(cuda.lm_head_sample(&x, &embedding, &HEAD, &truncation, &choices)))
        }),
    }
}

/// As many targets as the slice has of one per row.
fn targets(shape: &ModelShape, slice: usize, rows: usize) -> Vec<Target> {
    let target = |row: u32| Target { row, token: row * 31 % slice as u32 };
    (0..rows as u32).step_by(shape.vocab / slice).map(target).collect()
}

fn trained(shape: &ModelShape, slice: usize, rows: usize) -> Workload {
    let &ModelShape { hidden: d, vocab, .. } = shape;
    let targets = targets(shape, slice, rows);
    Workload {
        name: format!("lm_head_logprob_forward {rows} rows, {slice} of {vocab} tokens"),
        bytes: hidden_bytes(shape, slice + rows) + (2 * rows * DType::F32.bytes()) as u64,
        flops: product_flops(shape, slice, rows),
        prepare: Box::new(move |cuda| {
            let (x, embedding) =
                (random(cuda, 1, DType::Bf16, rows, d), random(cuda, 2, DType::Bf16, slice, d));
            let targets = targets.clone();
            Box::new(move |cuda| drop(cuda.lm_head_logprob_forward(&x, &embedding, &HEAD, &targets, false)))
        }),
    }
}

fn trained_backward(shape: &ModelShape, slice: usize, rows: usize) -> Workload {
    let &ModelShape { hidden: d, vocab, .. } = shape;
    let targets = targets(shape, slice, rows);
    Workload {
        name: format!("lm_head_logprob_backward {rows} rows, {slice} of {vocab} tokens"),
        bytes: hidden_bytes(shape, slice + 2 * rows) + 2 * (slice * d * DType::F32.bytes()) as u64,
        flops: 3 * product_flops(shape, slice, rows),
        prepare: Box::new(move |cuda| {
            let (x, embedding) =
                (random(cuda, 1, DType::Bf16, rows, d), random(cuda, 2, DType::Bf16, slice, d));
            let targets = targets.clone();
            let weights = vec![0.5; targets.len()];
            let lse = random(cuda, 3, DType::F32, 1, rows);
            let trace = HeadTrace { lse, logits: None };
            let d_embedding = Mutex::new(random(cuda, 4, DType::F32, slice, d));
            Box::new(move |cuda| {
                let mut d_embedding = d_embedding.lock().unwrap_or_else(PoisonError::into_inner);
                drop(cuda.lm_head_logprob_backward(
                    &x,
                    &embedding,
                    &HEAD,
                    &trace,
                    &targets,
                    &weights,
                    &mut d_embedding,
                ));
            })
        }),
    }
}
