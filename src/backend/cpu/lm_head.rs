//! The LM head fused with what consumes it: sampling, log-probs and their gradient. Logits exist for a tile of
//! 96 tokens x 64 rows at a time.
//!
//! The vocabulary is cut into chunks of `CHUNK` tokens, the unit of parallelism. Inside a chunk, blocks of
//! `BLOCK` tokens update a running (max, sum of exp) per row; chunks are merged in order. Cuts are constants, so
//! a row's log-sum-exp has the same bits in sampling and in training, in any batch.
//!
//! Sampling is Gumbel-max: argmax_v l_v + G_v with G_v = -ln E_v, E_v ~ Exp(1), is a draw from softmax(l)
//! (Maddison et al. 2014, "A* Sampling"). Noise is Philox of (vocabulary index / 4, position, stream, prompt).

use rayon::prelude::*;

use super::matmul::{PANEL, Panels, accumulate, tile, widen_rows};
use super::simd::{Block, LANES, exp, ln, map, multiversion, tanh};
use super::{Tensor, zeroed};
use crate::backend::{Choice, HeadSpec, HeadTrace, Sampled, Target, Truncation};
use crate::rng::{DrawKey, PHILOX_ROUNDS, philox_next_key, philox_round, philox4x32};

/// Tokens per task.
const CHUNK: usize = 8192;
/// Tokens per logit tile; a multiple of the 4 draws of one Philox block.
const BLOCK: usize = 96;
/// Rows per pass of the gradient: bounds the partial dX that every chunk keeps.
const ROW_TILE: usize = 256;
/// Rows per pass where truncation needs a row's whole vocabulary at once.
const TRUNCATED_TILE: usize = 16;

/// Running log-sum-exp of the rows of a panel.
#[derive(Clone, Copy)]
struct Lse {
    max: [f32; PANEL],
    sum: [f32; PANEL],
}

impl Lse {
    const EMPTY: Self = Self { max: [f32::NEG_INFINITY; PANEL], sum: [0.0; PANEL] };

    fn merge(&mut self, other: &Self) {
        for l in 0..PANEL {
            let max = self.max[l].max(other.max[l]);
            if max > f32::NEG_INFINITY {
                self.sum[l] = self.sum[l] * exp(self.max[l] - max) + other.sum[l] * exp(other.max[l] - max);
                self.max[l] = max;
            } else {
                // Nothing finite yet; a NaN sum must survive.
                self.sum[l] += other.sum[l];
            }
        }
    }

    fn value(&self, lane: usize) -> f32 {
        self.max[lane] + ln(self.sum[lane])
    }
}

/// The best token so far of every row of a panel.
#[derive(Clone, Copy)]
struct Best {
    score: [f32; PANEL],
    logit: [f32; PANEL],
    token: [u32; PANEL],
}

impl Best {
    const NONE: Self =
        Self { score: [f32::NEG_INFINITY; PANEL], logit: [f32::NEG_INFINITY; PANEL], token: [0; PANEL] };

    /// Later chunks have higher tokens, so a strict comparison leaves ties to the lowest.
    fn merge(&mut self, other: &Self) {
        for l in 0..PANEL {
            if other.score[l] > self.score[l] {
                (self.score[l], self.logit[l], self.token[l]) =
                    (other.score[l], other.logit[l], other.token[l]);
            }
        }
    }
}

/// The RNG keys of a panel's rows, one lane each. Rows that choose greedily have `noise` 0.
struct Keys {
    key: [[u32; PANEL]; 2],
    position: [u32; PANEL],
    stream: [u32; PANEL],
    prompt: [u32; PANEL],
    noise: [f32; PANEL],
    any: bool,
}

impl Keys {
    fn new(choices: &[Choice]) -> Self {
        let mut k = Keys {
            key: [[0; PANEL]; 2],
            position: [0; PANEL],
            stream: [0; PANEL],
            prompt: [0; PANEL],
            noise: [0.0; PANEL],
            any: false,
        };
        for (l, choice) in choices.iter().enumerate() {
            if let Choice::Draw(DrawKey { key, prompt, stream, position }) = *choice {
                (k.key[0][l], k.key[1][l]) = (key[0], key[1]);
                (k.prompt[l], k.stream[l], k.position[l]) = (prompt, stream, position);
                k.noise[l] = 1.0;
                k.any = true;
            }
        }
        k
    }
}

/// Standard Gumbel noise from 32 random bits: -ln E with E = -ln(1 - u), u in (0, 1).
///
/// The largest noise decides draws, so small E needs resolution: E is taken from u near 0 (down to 2^-33), where
/// ln(1 - u) is corrected for the rounding of 1 - u (Kahan's log1p).
#[inline(always)]
fn gumbel(bits: u32) -> f32 {
    let u = ((bits as f32 + 0.5) * (1.0 / 4_294_967_296.0)).min(1.0 - f32::EPSILON / 2.0);
    let w = 1.0 - u;
    let e = if w == 1.0 { u } else { -ln(w) * (u / (1.0 - w)) };
    -ln(e)
}

/// The noise of four tokens (a Philox block, number `counter`) for the 16 rows from lane `at`: [`philox4x32`] round
/// by round over the lanes, so that it vectorises.
#[inline(always)]
fn gumbel_block(counter: u32, keys: &Keys, at: usize) -> [[f32; LANES]; 4] {
    let load = |x: &[u32; PANEL]| -> [u32; LANES] { std::array::from_fn(|l| x[at + l]) };
    let mut c = [[counter; LANES], load(&keys.position), load(&keys.stream), load(&keys.prompt)];
    let mut k = [load(&keys.key[0]), load(&keys.key[1])];
    for _ in 0..PHILOX_ROUNDS {
        for l in 0..LANES {
            let [c0, c1, c2, c3] = philox_round([c[0][l], c[1][l], c[2][l], c[3][l]], [k[0][l], k[1][l]]);
            (c[0][l], c[1][l], c[2][l], c[3][l]) = (c0, c1, c2, c3);
        }
        let [k0, k1] = &mut k;
        for (k0, k1) in k0.iter_mut().zip(k1) {
            [*k0, *k1] = philox_next_key([*k0, *k1]);
        }
    }
    c.map(|bits| std::array::from_fn(|l| gumbel(bits[l])))
}

/// One row's noise for one token, as the tiles compute it.
fn gumbel_of(key: &DrawKey, token: u32) -> f32 {
    let draw = philox4x32([token / 4, key.position, key.stream, key.prompt], key.key);
    gumbel(draw[token as usize % 4])
}

#[inline(always)]
fn block(x: &[f32], at: usize) -> Block {
    let mut b = [0.0; LANES];
    b.copy_from_slice(&x[at..at + LANES]);
    b
}

multiversion! {
    /// Soft-cap and temperature, in place.
    fn finish_logits(tile: &mut [f32], softcap: Option<f32>, temperature: f32) {
        if let Some(cap) = softcap {
            for x in tile.as_chunks_mut::<LANES>().0 {
                *x = map(*x, |v| cap * tanh(v / cap));
            }
        }
        if temperature != 1.0 {
            for x in tile.as_chunks_mut::<LANES>().0 {
                *x = map(*x, |v| v / temperature);
            }
        }
    }
}

multiversion! {
    /// Adds a tile `[m, 64]` of logits to the running log-sum-exp; `nv` vectors of lanes are in use.
    fn update_lse(tile: &[f32], m: usize, nv: usize, lse: &mut Lse) {
        for v in (0..nv * LANES).step_by(LANES) {
            let old = block(&lse.max, v);
            let mut max = old;
            for i in 0..m {
                let x = block(tile, i * PANEL + v);
                for l in 0..LANES {
                    max[l] = max[l].max(x[l]);
                }
            }
            // The tile's own sum first: added one by one to a sum near 1, a long tail would be rounded away.
            let mut sum = [0.0; LANES];
            for i in 0..m {
                let x = block(tile, i * PANEL + v);
                for l in 0..LANES {
                    sum[l] += exp(x[l] - max[l]);
                }
            }
            let before = block(&lse.sum, v);
            for l in 0..LANES {
                sum[l] += before[l] * exp(old[l] - max[l]);
            }
            lse.max[v..v + LANES].copy_from_slice(&max);
            lse.sum[v..v + LANES].copy_from_slice(&sum);
        }
    }
}

multiversion! {
    /// Adds a tile `[m, 64]` of logits of tokens `v0..` to the running argmax of logit + noise.
    fn update_best(tile: &[f32], m: usize, nv: usize, v0: usize, keys: &Keys, best: &mut Best) {
        for v in (0..nv * LANES).step_by(LANES) {
            let noise_on = block(&keys.noise, v);
            for i0 in (0..m).step_by(4) {
                let mut noise = [[0.0f32; LANES]; 4];
                if keys.any {
                    noise = gumbel_block(((v0 + i0) / 4) as u32, keys, v);
                }
                for (i, noise) in noise.iter().enumerate().take(m - i0) {
                    let token = (v0 + i0 + i) as u32;
                    let logit = block(tile, (i0 + i) * PANEL + v);
                    for l in 0..LANES {
                        let score = noise[l].mul_add(noise_on[l], logit[l]);
                        let better = score > best.score[v + l];
                        best.score[v + l] = if better { score } else { best.score[v + l] };
                        best.logit[v + l] = if better { logit[l] } else { best.logit[v + l] };
                        best.token[v + l] = if better { token } else { best.token[v + l] };
                    }
                }
            }
        }
    }
}

multiversion! {
    /// A tile `[m, stride]` of raw logits becomes total_weight * softmax * d(finished logit)/d(raw logit), row by
    /// row of the vocabulary; `derivative` keeps that last factor for the one-hot terms.
    fn softmax_gradient(
        tile: &mut [f32],
        derivative: &mut [f32],
        m: usize,
        stride: usize,
        softcap: Option<f32>,
        temperature: f32,
        lse: &[f32],
        total: &[f32],
    ) {
        for i in 0..m {
            for v in (0..stride).step_by(LANES) {
                let at = i * stride + v;
                let mut x = block(tile, at);
                let mut d = [1.0; LANES];
                if let Some(cap) = softcap {
                    for l in 0..LANES {
                        let t = tanh(x[l] / cap);
                        x[l] = cap * t;
                        d[l] = 1.0 - t * t;
                    }
                }
                let (lse, total) = (block(lse, v), block(total, v));
                for l in 0..LANES {
                    d[l] /= temperature;
                    x[l] = exp(x[l] / temperature - lse[l]) * total[l] * d[l];
                }
                tile[at..at + LANES].copy_from_slice(&x);
                derivative[at..at + LANES].copy_from_slice(&d);
            }
        }
    }
}

/// Calls `visit(first token, tokens, panel, finished logits [tokens, 64])` for every tile of one chunk. Before they are
/// finished they go to `keep`, the chunk's rows of [`HeadTrace::logits`], which is empty where they are not kept.
fn for_each_tile(
    chunk: usize,
    table: &Tensor,
    panels: &Panels,
    head: &HeadSpec,
    keep: &mut [f32],
    mut visit: impl FnMut(usize, usize, usize, &[f32]),
) {
    let (d, stride) = (table.cols, panels.count() * PANEL);
    let (mut w, mut logits) = (vec![0.0; BLOCK * d], vec![0.0; BLOCK * PANEL]);
    let end = table.rows.min((chunk + 1) * CHUNK);
    for v0 in (chunk * CHUNK..end).step_by(BLOCK) {
        let m = BLOCK.min(end - v0);
        widen_rows(table, v0..v0 + m, &mut w, d);
        for p in 0..panels.count() {
            let tile = &mut logits[..m * PANEL];
            tile.fill(0.0);
            panels.multiply(p, m, &w, d, tile, PANEL);
            let first = (v0 - chunk * CHUNK) * stride;
            let rows = keep.get_mut(first..).into_iter().flat_map(|keep| keep.chunks_mut(stride));
            for (to, from) in rows.zip(tile.chunks(PANEL)) {
                to[p * PANEL..][..PANEL].copy_from_slice(from);
            }
            finish_logits(tile, head.softcap, head.temperature);
            visit(v0, m, p, tile);
        }
    }
}

fn chunks(table: &Tensor) -> usize {
    table.rows.div_ceil(CHUNK)
}

fn merge_lse(parts: impl Iterator<Item = Vec<Lse>>, panels: usize) -> Vec<Lse> {
    let mut all = vec![Lse::EMPTY; panels];
    for part in parts {
        for (a, b) in all.iter_mut().zip(&part) {
            a.merge(b);
        }
    }
    all
}

/// See [`crate::backend::Backend::lm_head_sample`].
pub fn sample(
    x: &Tensor,
    table: &Tensor,
    head: &HeadSpec,
    truncation: &Truncation,
    choices: &[Choice],
) -> Vec<Sampled> {
    assert_eq!(x.rows, choices.len(), "one choice per row");
    if !truncation.is_none() {
        let d = x.cols;
        return x
            .as_f32()
            .chunks(TRUNCATED_TILE * d)
            .zip(choices.chunks(TRUNCATED_TILE))
            .flat_map(|(x, choices)| sample_truncated(x, table, head, truncation, choices))
            .collect();
    }
    let panels = Panels::from_rows(x.as_f32(), x.cols);
    let keys: Vec<Keys> = choices.chunks(PANEL).map(Keys::new).collect();
    let parts: Vec<(Vec<Lse>, Vec<Best>)> = (0..chunks(table))
        .into_par_iter()
        .map(|chunk| {
            let mut lse = vec![Lse::EMPTY; panels.count()];
            let mut best = vec![Best::NONE; panels.count()];
            for_each_tile(chunk, table, &panels, head, &mut [], |v0, m, p, tile| {
                let nv = panels.lanes(p).div_ceil(LANES);
                update_lse(tile, m, nv, &mut lse[p]);
                update_best(tile, m, nv, v0, &keys[p], &mut best[p]);
            });
            (lse, best)
        })
        .collect();
    let mut best = vec![Best::NONE; panels.count()];
    for (_, part) in &parts {
        for (a, b) in best.iter_mut().zip(part) {
            a.merge(b);
        }
    }
    let lse = merge_lse(parts.into_iter().map(|p| p.0), panels.count());
    (0..x.rows)
        .map(|r| {
            let (p, l) = (r / PANEL, r % PANEL);
            Sampled { token: best[p].token[l], logprob: best[p].logit[l] - lse[p].value(l) }
        })
        .collect()
}

/// Truncation ranks a row's whole vocabulary, so here logits exist for up to 16 rows.
fn sample_truncated(
    x: &[f32],
    table: &Tensor,
    head: &HeadSpec,
    truncation: &Truncation,
    choices: &[Choice],
) -> Vec<Sampled> {
    let panels = Panels::from_rows(x, table.cols);
    let rows = choices.len();
    let parts: Vec<(Vec<Lse>, Vec<Vec<f32>>)> = (0..chunks(table))
        .into_par_iter()
        .map(|chunk| {
            let mut lse = vec![Lse::EMPTY; 1];
            let mut logits = vec![Vec::with_capacity(CHUNK); rows];
            for_each_tile(chunk, table, &panels, head, &mut [], |_, m, p, tile| {
                update_lse(tile, m, 1, &mut lse[p]);
                for i in 0..m {
                    for (l, out) in logits.iter_mut().enumerate() {
                        out.push(tile[i * PANEL + l]);
                    }
                }
            });
            (lse, logits)
        })
        .collect();
    let lse = merge_lse(parts.iter().map(|p| p.0.clone()), 1);
    choices
        .par_iter()
        .enumerate()
        .map(|(r, choice)| {
            let logits: Vec<f32> = parts.iter().flat_map(|p| p.1[r].iter().copied()).collect();
            let kept = keep(&logits, lse[0].value(r), truncation);
            let score = |t: u32| match choice {
                Choice::Greedy => logits[t as usize],
                Choice::Draw(key) => logits[t as usize] + gumbel_of(key, t),
            };
            let mut token = kept[0];
            for &t in &kept[1..] {
                let (a, b) = (score(t), score(token));
                if a > b || (a == b && t < token) {
                    token = t;
                }
            }
            Sampled { token, logprob: logits[token as usize] - lse[0].value(r) }
        })
        .collect()
}

/// The tokens that truncation keeps: top-k, then top-p of what is left (renormalised), then min-p; ties by lower id.
/// At least one token stays.
fn keep(logits: &[f32], lse: f32, truncation: &Truncation) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    // Descending; NaN orders last so that a broken row still yields a token, whose log-prob is NaN.
    let order = |a: &u32, b: &u32| {
        let rank = |t: u32| if logits[t as usize].is_nan() { f32::NEG_INFINITY } else { logits[t as usize] };
        rank(*b).total_cmp(&rank(*a)).then(a.cmp(b))
    };
    if truncation.top_k > 0 && truncation.top_k < ids.len() {
        ids.select_nth_unstable_by(truncation.top_k - 1, order);
        ids.truncate(truncation.top_k);
    }
    if truncation.top_p < 1.0 {
        ids.sort_unstable_by(order);
        let mass = |t: u32| f64::from(logits[t as usize] - lse).exp();
        let reach = f64::from(truncation.top_p) * ids.iter().map(|&t| mass(t)).sum::<f64>();
        let mut sum = 0.0;
        let kept = ids.iter().take_while(|&&t| {
            let before = sum;
            sum += mass(t);
            before < reach
        });
        let kept = kept.count().max(1);
        ids.truncate(kept);
    }
    if truncation.min_p > 0.0 {
        let max = ids.iter().map(|&t| logits[t as usize]).fold(f32::NEG_INFINITY, f32::max);
        let floor = max + truncation.min_p.ln();
        ids.retain(|&t| logits[t as usize] >= floor);
    }
    if ids.is_empty() { vec![0] } else { ids }
}

/// See [`crate::backend::Backend::lm_head_logprob_forward`].
pub fn logprob_forward(
    x: &Tensor,
    table: &Tensor,
    head: &HeadSpec,
    targets: &[Target],
    keep: bool,
) -> (Vec<f32>, HeadTrace<Tensor>) {
    let panels = Panels::from_rows(x.as_f32(), x.cols);
    let by_token = by_token(targets);
    let stride = panels.count() * PANEL;
    // [V, rows in whole panels]
    let mut logits: Vec<f32> = zeroed(if keep { table.rows * stride } else { 0 });
    let mut of_chunks: Vec<&mut [f32]> = logits.chunks_mut((CHUNK * stride).max(1)).collect();
    of_chunks.resize_with(chunks(table), Default::default);
    let parts: Vec<_> = of_chunks
        .into_par_iter()
        .enumerate()
        .map(|(chunk, keep)| {
            let mut lse = vec![Lse::EMPTY; panels.count()];
            let mut found = Vec::new();
            for_each_tile(chunk, table, &panels, head, keep, |v0, m, p, tile| {
                update_lse(tile, m, panels.lanes(p).div_ceil(LANES), &mut lse[p]);
                for &i in within(&by_token, targets, v0, m) {
                    let t = targets[i as usize];
                    if t.row as usize / PANEL == p {
                        let logit = tile[(t.token as usize - v0) * PANEL + t.row as usize % PANEL];
                        found.push((i, logit));
                    }
                }
            });
            (lse, found)
        })
        .collect();
    let lse = merge_lse(parts.iter().map(|p| p.0.clone()), panels.count());
    let lse: Vec<f32> = (0..x.rows).map(|r| lse[r / PANEL].value(r % PANEL)).collect();
    let mut logprobs = vec![f32::NAN; targets.len()];
    for (i, logit) in parts.into_iter().flat_map(|p| p.1) {
        logprobs[i as usize] = logit - lse[targets[i as usize].row as usize];
    }
    let logits = keep.then(|| Tensor::f32(table.rows, stride, logits));
    (logprobs, HeadTrace { lse: Tensor::f32(1, lse.len(), lse), logits })
}

/// Indices of `targets` in order of token.
fn by_token(targets: &[Target]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..targets.len() as u32).collect();
    order.sort_by_key(|&i| targets[i as usize].token);
    order
}

/// The part of `order` whose tokens lie in `v0..v0 + m`.
fn within<'a>(order: &'a [u32], targets: &[Target], v0: usize, m: usize) -> &'a [u32] {
    let at = |v: usize| order.partition_point(|&i| (targets[i as usize].token as usize) < v);
    &order[at(v0)..at(v0 + m)]
}

/// See [`crate::backend::Backend::lm_head_logprob_backward`].
pub fn logprob_backward(
    x: &Tensor,
    table: &Tensor,
    head: &HeadSpec,
    trace: &HeadTrace<Tensor>,
    targets: &[Target],
    weights: &[f32],
    dtable: &mut Tensor,
) -> Tensor {
    let (d, lse) = (x.cols, trace.lse.as_f32());
    let mut dx = vec![0.0; x.rows * d];
    for (tile, dx) in dx.chunks_mut(ROW_TILE * d).enumerate() {
        let rows = tile * ROW_TILE..tile * ROW_TILE + dx.len() / d;
        let mut local = Vec::new();
        let mut local_weights = Vec::new();
        for (t, w) in targets.iter().zip(weights) {
            if rows.contains(&(t.row as usize)) {
                local.push(Target { row: t.row - rows.start as u32, token: t.token });
                local_weights.push(*w);
            }
        }
        let x = &x.as_f32()[rows.start * d..rows.end * d];
        let kept = trace.logits.as_ref().map(|logits| (&logits.as_f32()[rows.start..], logits.cols));
        backward_tile(x, table, head, &lse[rows], kept, &local, &local_weights, dtable, dx);
    }
    Tensor::f32(x.rows, d, dx)
}

/// dX and dW of at most [`ROW_TILE`] rows, whose logits are kept from the first element on, a token's so many after the one
/// before: dlogits = (total_r softmax_r - sum of w_i onehot_i) * d cap / T, then
/// dX = dlogits^T W (summed over chunks in order) and dW += dlogits X.
#[allow(clippy::too_many_arguments)]
fn backward_tile(
    x: &[f32],
    table: &Tensor,
    head: &HeadSpec,
    lse: &[f32],
    kept: Option<(&[f32], usize)>,
    targets: &[Target],
    weights: &[f32],
    dtable: &mut Tensor,
    dx: &mut [f32],
) {
    let (d, rows) = (table.cols, lse.len());
    let padded = d.next_multiple_of(LANES);
    let by_row = Panels::from_rows(x, d);
    let by_col = Panels::from_cols(x, d);
    let stride = by_row.count() * PANEL;
    let mut total = vec![0.0; stride];
    for (t, w) in targets.iter().zip(weights) {
        total[t.row as usize] += w;
    }
    // Lanes beyond the rows: weight 0, and an lse that keeps exp finite.
    let mut lse_padded = vec![0.0; stride];
    lse_padded[..rows].copy_from_slice(lse);
    let by_token = by_token(targets);

    let parts: Vec<Vec<f32>> = dtable
        .as_f32_mut()
        .par_chunks_mut(CHUNK * d)
        .enumerate()
        .map(|(chunk, dtable)| {
            let mut dx = vec![0.0; rows * padded];
            let mut w = vec![0.0; BLOCK * padded];
            let mut logits = vec![0.0; BLOCK * stride];
            let mut derivative = vec![0.0; BLOCK * stride];
            let mut transposed = vec![0.0; rows * BLOCK];
            for (b, dtable) in dtable.chunks_mut(BLOCK * d).enumerate() {
                let (v0, m) = (chunk * CHUNK + b * BLOCK, dtable.len() / d);
                widen_rows(table, v0..v0 + m, &mut w, padded);
                let logits = &mut logits[..m * stride];
                match kept {
                    Some((kept, ld)) => {
                        for (to, from) in logits.chunks_mut(stride).zip(kept[v0 * ld..].chunks(ld)) {
                            to.copy_from_slice(&from[..stride]);
                        }
                    }
                    None => {
                        logits.fill(0.0);
                        for p in 0..by_row.count() {
                            by_row.multiply(p, m, &w, padded, &mut logits[p * PANEL..], stride);
                        }
                    }
                }
                softmax_gradient(
                    logits,
                    &mut derivative,
                    m,
                    stride,
                    head.softcap,
                    head.temperature,
                    &lse_padded,
                    &total,
                );
                for &i in within(&by_token, targets, v0, m) {
                    let t = targets[i as usize];
                    let at = (t.token as usize - v0) * stride + t.row as usize;
                    logits[at] -= weights[i as usize] * derivative[at];
                }
                accumulate(&by_col, m, logits, stride, dtable, d);
                for i in 0..m {
                    for r in 0..rows {
                        transposed[r * BLOCK + i] = logits[i * stride + r];
                    }
                }
                for at in (0..padded).step_by(PANEL) {
                    let nv = PANEL.min(padded - at) / LANES;
                    tile(rows, nv, m, &transposed, BLOCK, &w[at..], padded, &mut dx[at..], padded);
                }
            }
            dx
        })
        .collect();
    for part in parts {
        for (dx, part) in dx.chunks_exact_mut(d).zip(part.chunks_exact(padded)) {
            for (a, b) in dx.iter_mut().zip(part) {
                *a += b;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(u: f64) -> f64 {
        -(-(-u).ln_1p()).ln()
    }

    #[test]
    fn gumbel_noise_is_accurate_at_both_ends() {
        let ends = [1, 2, 3, u32::MAX - 1, u32::MAX];
        for bits in (0..=u32::MAX).step_by(4093).chain(ends) {
            // u is rounded to 24 bits, and so is 1 - u; then E and its logarithm are.
            let (u, got) = ((f64::from(bits) + 0.5) / 4_294_967_296.0, f64::from(gumbel(bits)));
            let (high, low) = (exact(u * (1.0 - 2e-7)), exact((u * (1.0 + 2e-7)).min(1.0)));
            let bound = 3.0 * f64::from(f32::EPSILON) * (1.0 + got.abs());
            assert!(low - bound <= got && got <= high + bound, "{bits:#x}: {got} is not in {low}..{high}");
        }
    }

    /// Mean: Euler's gamma. Variance: pi^2 / 6. Skewness: 1.139547. Over the midpoints of 2^20 equal cells, where the
    /// midpoint rule misses -ln u to its k-th power by about 2^-20 ln(2^20)^(k - 1) k at u = 0.
    #[test]
    fn gumbel_noise_has_the_moments_of_its_distribution() {
        let g: Vec<f64> = (0..1 << 20).map(|i| f64::from(gumbel((i << 12) + (1 << 11)))).collect();
        let moment = |about: f64, k: i32| g.iter().map(|g| (g - about).powi(k)).sum::<f64>() / g.len() as f64;
        let mean = moment(0.0, 1);
        let (variance, skewness) = (moment(mean, 2), moment(mean, 3) / moment(mean, 2).powf(1.5));
        assert!((mean - 0.577_215_665).abs() < 1e-6, "{mean}");
        assert!((variance - std::f64::consts::PI.powi(2) / 6.0).abs() < 3e-5, "{variance}");
        assert!((skewness - 1.139_547).abs() < 6e-4, "{skewness}");
    }
}
