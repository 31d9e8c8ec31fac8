//! Attention, forward.

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{AttentionSpec, Batch, DType, ModelShape};
use crate::segments::{QueryRun, Segment, Segments};

/// One prompt and its responses.
fn group_of(prompt: usize, responses: usize, len: usize) -> Segments {
    let mut list = vec![Segment { start: 0, len: prompt, position: 0, prefix: None }];
    list.extend((0..responses).map(|i| Segment {
        start: prompt + i * len,
        len,
        position: prompt,
        prefix: Some(0),
    }));
    Segments::new(list).expect("a valid table")
}

/// The shape with heads as Gemma 4's global layers have them: those of E2B, for models that have as many.
fn wide(shape: &ModelShape) -> Option<ModelShape> {
    let e2b = (shape.heads, shape.kv_heads) == (8, 1);
    e2b.then_some(ModelShape { head_dim: 512, ..*shape })
}

/// Prefill, training and a step of decoding.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    let prefill = |shape: &ModelShape, what: &str, window| {
        let segments = Segments::separate(&[1024]);
        let runs = segments.all_queries();
        workload(shape, what, segments, runs, window)
    };
    let mut all = vec![
        prefill(shape, "prefill of 1024", None),
        prefill(shape, "prefill of 1024, window 512", Some(512)),
        training(shape, 4),
        decode(shape, 512, 32),
        decode(shape, 4096, 32),
    ];
    if let Some(wide) = wide(shape) {
        all.extend([prefill(&wide, "prefill of 1024", None), training(&wide, 4), decode(&wide, 512, 32)]);
    }
    all
}

/// A batch of training, and a step of decoding with many streams.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    let shapes = [Some(*shape), wide(shape)];
    shapes.iter().flatten().flat_map(|shape| [training(shape, 32), decode(shape, 512, 256)]).collect()
}

fn training(shape: &ModelShape, responses: usize) -> Workload {
    let segments = group_of(512, responses, 128);
    let runs = segments.all_queries();
    workload(shape, &format!("prompt of 512 and {responses} responses of 128"), segments, runs, None)
}

fn decode(shape: &ModelShape, prompt: usize, tails: usize) -> Workload {
    let one_each = (0..tails).map(|i| QueryRun { segment: i + 1, first: 127, len: 1, row: i }).collect();
    let what = format!("decode, prompt of {prompt} and {tails} tails of 128");
    workload(shape, &what, group_of(prompt, tails, 128), one_each, None)
}

fn workload(
    shape: &ModelShape,
    what: &str,
    segments: Segments,
    runs: Vec<QueryRun>,
    window: Option<usize>,
) -> Workload {
    let ModelShape { heads, kv_heads, head_dim, .. } = *shape;
    let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 0.0625, softcap: None, window };
    let queries: usize = runs.iter().map(|r| r.len).sum();
    let seen = |position: u32| (position as usize + 1).min(window.unwrap_or(usize::MAX));
    let positions = Batch::new(&vec![0; queries], &segments, &runs).positions();
    let pairs: usize = positions.into_iter().map(seen).sum();
    let rows = segments.rows();
    let width = if head_dim == 512 { "Dh 512, " } else { "" };
    Workload {
        name: format!("attention_forward {width}{what}"),
        // q, o and lse; k and v.
        bytes: (queries * heads * (head_dim * 4 + 4) + rows * kv_heads * head_dim * 4) as u64,
        flops: (4 * pairs * heads * head_dim) as u64,
        prepare: Box::new(move |cuda| {
            let x = |seed, rows, heads| random(cuda, seed, DType::Bf16, rows, heads * head_dim);
            let (q, k, v) = (x(1, queries, heads), x(2, rows, kv_heads), x(3, rows, kv_heads));
            let ids = vec![0; queries];
            let batch = Batch::new(&ids, &segments, &runs);
            let tables = cuda.tables(&batch, &[spec]);
            Box::new(move |cuda| drop(cuda.attention_forward(&q, &k, &v, &tables, &spec)))
        }),
    }
}
