//! The LM head, op by op in bf16: logits, capped logits and those divided by the temperature are stored, then come
//! log-softmax in f32 and, backwards, the stored gradient of the logits.

use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{HeadSpec, Target};

use super::{add_rounded, round};

/// The stored logits `[R, V]`, finished, and d finished / d logit.
fn logits(x: &Tensor, embedding: &Tensor, head: &HeadSpec) -> (Tensor, Vec<f32>) {
    let [raw] = Cpu::F32.matmul_forward(x, [embedding]);
    let mut l = round(raw);
    let mut slope = vec![1.0; x.rows * embedding.rows];
    if let Some(cap) = head.softcap {
        for (l, slope) in l.as_f32_mut().iter_mut().zip(&mut slope) {
            let tanh = (*l / cap).tanh();
            *l = cap * tanh;
            *slope = 1.0 - tanh * tanh;
        }
        l = round(l);
    }
    for (l, slope) in l.as_f32_mut().iter_mut().zip(&mut slope) {
        *l /= head.temperature;
        *slope /= head.temperature;
    }
    (round(l), slope)
}

pub(crate) fn logprob_forward(
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    targets: &[Target],
) -> (Vec<f32>, Tensor) {
    let (l, _) = logits(x, embedding, head);
    let rows: Vec<&[f32]> = l.as_f32().chunks(embedding.rows).collect();
    let lse = |row: &&[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        max + row.iter().map(|l| (l - max).exp()).sum::<f32>().ln()
    };
    let lse: Vec<f32> = rows.iter().map(lse).collect();
    let logprob = |t: &Target| rows[t.row as usize][t.token as usize] - lse[t.row as usize];
    (targets.iter().map(logprob).collect(), Tensor::f32(1, x.rows, lse))
}

pub(crate) fn logprob_backward(
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    lse: &Tensor,
    targets: &[Target],
    weights: &[f32],
    d_embedding: &mut Tensor,
) -> Tensor {
    let (mut d, slope) = logits(x, embedding, head);
    let mut total = vec![0.0; x.rows];
    for (t, w) in targets.iter().zip(weights) {
        total[t.row as usize] += w;
    }
    let (rows, lse) = (embedding.rows, lse.as_f32());
    for (i, d) in d.as_f32_mut().iter_mut().enumerate() {
        *d = (*d - lse[i / rows]).exp() * total[i / rows];
    }
    for (t, w) in targets.iter().zip(weights) {
        d.as_f32_mut()[t.row as usize * rows + t.token as usize] -= w;
    }
    for (d, slope) in d.as_f32_mut().iter_mut().zip(slope) {
        *d *= slope;
    }
    let d = round(d);
    add_rounded(d_embedding, |d_embedding| Cpu::F32.matmul_backward_weight(&d, x, d_embedding));
    round(Cpu::F32.matmul_backward_input(&[(&d, embedding)]))
}
