//! Attention's gradient, op by op in bf16, as a framework does it that makes every tensor of the formula: scores,
//! probabilities and their gradients are stored in bf16, softmax's gradient is computed in f32 from the stored
//! probabilities. Every query head has its own copy of keys and values (`repeat_kv`): their gradients are stored per head,
//! then summed over the group and stored again.

use bon_engine::backend::AttentionSpec;
use bon_engine::backend::cpu::{Tables, Tensor};
use half::bf16;

use super::{Owned, round};

fn stored(x: f32) -> f32 {
    bf16::from_f32(x).to_f32()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(factor: f32, x: &[f32], sum: &mut [f32]) {
    for (sum, x) in sum.iter_mut().zip(x) {
        *sum += factor * x;
    }
}

pub(crate) fn backward(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    tables: &(Tables, Owned),
    spec: &AttentionSpec,
) -> (Tensor, Tensor, Tensor) {
    let Owned { segments, runs, .. } = &tables.1;
    let (heads, dim, group) = (spec.heads, spec.head_dim, spec.heads / spec.kv_heads);
    let zeros = |x: &Tensor| Tensor::f32(x.rows, x.cols, vec![0.0; x.rows * x.cols]);
    // Per query head.
    let mut dq = zeros(q);
    let [mut dk, mut dv] = [k, v].map(|x| Tensor::f32(x.rows, heads * dim, vec![0.0; x.rows * heads * dim]));
    for run in runs {
        let position = segments.first_position(run);
        for token in 0..run.len {
            let visible = segments.visible(run.segment, position + token, spec.window);
            let keys: Vec<usize> = visible.into_iter().flatten().collect();
            for h in 0..heads {
                let query = ((run.row + token) * heads + h) * dim;
                let key = |row: usize| (row * spec.kv_heads + h / group) * dim;
                let (q_row, d_o_row) = (&q.as_f32()[query..][..dim], &d_o.as_f32()[query..][..dim]);
                let mut scores = Vec::with_capacity(keys.len());
                let mut slopes = Vec::with_capacity(keys.len());
                for &row in &keys {
                    let s = stored(stored(dot(q_row, &k.as_f32()[key(row)..][..dim])) * spec.scale);
                    match spec.softcap {
                        None => scores.push(s),
                        Some(c) => {
                            let t = stored(stored(s / c).tanh());
                            scores.push(stored(c * t));
                            slopes.push(1.0 - t * t);
                        }
                    }
                }
                let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let total: f32 = scores.iter().map(|s| (s - max).exp()).sum();
                let p: Vec<f32> = scores.iter().map(|s| stored((s - max).exp() / total)).collect();
                let dp: Vec<f32> =
                    keys.iter().map(|&row| stored(dot(d_o_row, &v.as_f32()[key(row)..][..dim]))).collect();
                let delta = dot(&p, &dp);
                for (j, &row) in keys.iter().enumerate() {
                    let mut ds = stored(p[j] * (dp[j] - delta));
                    if spec.softcap.is_some() {
                        ds = stored(ds * slopes[j]);
                    }
                    let ds = stored(ds * spec.scale);
                    let own = (row * heads + h) * dim;
                    add(p[j], d_o_row, &mut dv.as_f32_mut()[own..][..dim]);
                    add(ds, q_row, &mut dk.as_f32_mut()[own..][..dim]);
                    add(ds, &k.as_f32()[key(row)..][..dim], &mut dq.as_f32_mut()[query..][..dim]);
                }
            }
        }
    }
    let summed = |x: Tensor| {
        let x = round(x);
        let mut sum = zeros(k);
        for (head, part) in x.as_f32().chunks_exact(dim).enumerate() {
            let (row, h) = (head / heads, head % heads);
            add(1.0, part, &mut sum.as_f32_mut()[(row * spec.kv_heads + h / group) * dim..][..dim]);
        }
        round(sum)
    };
    (round(dq), summed(dk), summed(dv))
}
