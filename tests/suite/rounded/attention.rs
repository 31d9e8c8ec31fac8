//! Attention, op by op in bf16: the products q k^T times the scale, the capped scores, the probabilities and the outputs
//! are stored; softmax computes in f32. Row by row from the definition of `Segments::visible`.

use bon_engine::backend::AttentionSpec;
use bon_engine::backend::cpu::{Tables, Tensor};
use half::bf16;

use super::Owned;

fn stored(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

/// Dot product, summed in a fixed order of eight lanes.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += f64::from(a * b);
        }
    }
    lanes.iter().sum()
}

pub(crate) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    tables: &(Tables, Owned),
    spec: &AttentionSpec,
) -> (Tensor, Tensor) {
    let (heads, dim) = (spec.heads, spec.head_dim);
    let Owned { segments, runs, .. } = &tables.1;
    let mut o = vec![0.0; q.rows * q.cols];
    let mut lse = vec![f32::NEG_INFINITY; q.rows * heads];
    let queries = runs.iter().flat_map(|run| (0..run.len).map(move |t| (run, t)));
    for (run, t) in queries {
        let position = segments.first_position(run) + t;
        let keys: Vec<usize> =
            segments.visible(run.segment, position, spec.window).into_iter().flatten().collect();
        for head in 0..heads {
            let at = (run.row + t) * heads + head;
            let of_key = |key: usize| (key * spec.kv_heads + head / (heads / spec.kv_heads)) * dim;
            let query = &q.as_f32()[at * dim..][..dim];
            let scores: Vec<f64> = keys
                .iter()
                .map(|&key| {
                    let s = stored(dot(query, &k.as_f32()[of_key(key)..][..dim]) * f64::from(spec.scale));
                    spec.softcap.map_or(s, |c| stored(f64::from(c) * (s / f64::from(c)).tanh()))
                })
                .collect();
            let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - most).exp()).sum();
            lse[at] = (most + total.ln()) as f32;
            let mut sums = vec![0.0f64; dim];
            for (&key, s) in keys.iter().zip(scores) {
                let p = stored((s - most).exp() / total);
                for (sum, v) in sums.iter_mut().zip(&v.as_f32()[of_key(key)..][..dim]) {
                    *sum += p * f64::from(*v);
                }
            }
            for (o, sum) in o[at * dim..][..dim].iter_mut().zip(sums) {
                *o = stored(sum) as f32;
            }
        }
    }
    (Tensor::f32(q.rows, q.cols, o), Tensor::f32(q.rows, heads, lse))
}
