//! Attention's gradient.

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{AttentionSpec, Batch, DType, ModelShape};
use crate::segments::{Segment, Segments};

/// A prompt with its responses, as in training, with and without a window; and as many heads of 512.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload(shape, 4, 256, None), workload(shape, 4, 256, Some(512)), wide(shape, 4, 256)]
}

/// A batch of training.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    vec![workload(shape, 32, 128, None), workload(shape, 32, 128, Some(512)), wide(shape, 32, 128)]
}

/// Heads of 512, without a window: the global layers of Gemma 4. With the 8 heads of Gemma 2B, they are those of E2B.
fn wide(shape: &ModelShape, responses: usize, len: usize) -> Workload {
    let found = workload(&ModelShape { head_dim: 512, ..*shape }, responses, len, None);
    Workload { name: format!("{}, Dh 512", found.name), ..found }
}

/// A prompt of 512 tokens with responses.
fn workload(shape: &ModelShape, responses: usize, len: usize, window: Option<usize>) -> Workload {
    const PROMPT: usize = 512;
    let &ModelShape { heads, kv_heads, head_dim, .. } = shape;
    let mut list = vec![Segment { start: 0, len: PROMPT, position: 0, prefix: None }];
    list.extend((0..responses).map(|i| {
        let start = PROMPT + i * len;
        Segment { start, len, position: PROMPT, prefix: Some(0) }
    }));
    let segments = Segments::new(list).expect("a valid table");
    let rows = segments.rows();
    let positions = segments.positions();
    let seen = |&p: &u32| (p as usize + 1).min(window.unwrap_or(usize::MAX));
    let pairs = heads * positions.iter().map(seen).sum::<usize>();
    // q, o, do, dq; k, v, dk, dv; lse.
    let bytes = rows * (4 * heads * head_dim * 2 + 4 * kv_heads * head_dim * 2 + heads * 4);
    let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 0.0625, softcap: None, window };
    let window = window.map_or(String::new(), |w| format!(", window {w}"));
    Workload {
        name: format!("attention_backward {PROMPT} + {responses} x {len} tokens{window}"),
        bytes: bytes as u64,
        // QK^T, dO V^T, P^T dO, dS^T Q, dS K. The kernels compute the first two twice.
        flops: (5 * 2 * head_dim * pairs) as u64,
        prepare: Box::new(move |cuda| {
            let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
            let [q, o, d_o] = [1, 2, 3].map(|seed| random(cuda, seed, DType::Bf16, rows, wide));
            let [k, v] = [4, 5].map(|seed| random(cuda, seed, DType::Bf16, rows, narrow));
            // About what random scores give; the work does not depend on it.
            let lse: Vec<f32> = positions
                .iter()
                .flat_map(|&p| std::iter::repeat_n((p as f32 + 1.0).ln() + 0.3, heads))
                .collect();
            let lse = cuda.upload(DType::F32, rows, heads, bytemuck::cast_slice(&lse));
            let (ids, runs) = (vec![0; rows], segments.all_queries());
            let batch = Batch::new(&ids, &segments, &runs);
            let tables = cuda.tables(&batch, &[spec]);
            Box::new(move |cuda| drop(cuda.attention_backward(&d_o, &q, &k, &v, &o, &lse, &tables, &spec)))
        }),
    }
}
