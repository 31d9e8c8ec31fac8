//! The LM head fused with what consumes it: sampling, log-probs and their gradient. Logits exist for a tile of
//! 192 rows x 96 tokens at a time.
//!
//! The vocabulary is cut into chunks of `CHUNK` tokens, the unit of parallelism. Inside a chunk, blocks of
//! `BLOCK` tokens update a running (max, sum of exp) per row; chunks are merged in order. Cuts are constants, so
//! a row's log-sum-exp has the same bits in sampling and in training, in any batch.
//!
//! Sampling is Gumbel-max: argmax_v l_v + G_v with G_v = -ln E_v, E_v ~ Exp(1), is a draw from softmax(l)
//! (Maddison et al. 2014, "A* Sampling"). Noise is Philox of (vocabulary index / 4, position, stream, prompt). E = -ln(1 - u)
//! is at least u, so only tokens with u < exp(l_v - best so far) can win; that exponential is there already for the
//! log-sum-exp, and the noise of the other tokens, nearly all, is never computed.

use std::ops::Range;
use std::sync::Mutex;

use rayon::prelude::*;

use super::form::{Form, Rows, pack_weights, put, put_rows, term_bytes};
use super::matmul::{Broadcast, PANEL, Panels, accumulate, products, tile};
use super::simd::{Block, LANES, exp, ln, map, multiversion, sum, tanh};
use super::sums::Sums;
use super::tasks::{Out, mapped};
use super::{Cpu, Draws, Tensor, zeroed};
use crate::backend::{Choice, Compute, HeadSpec, HeadTrace, LmHead, Sampled, Target, Truncation};
use crate::device::DeviceError;
use crate::rng::{DrawKey, PHILOX_MULTIPLIERS, PHILOX_ROUNDS, philox_next_key, philox4x32};

/// Tokens per task.
const CHUNK: usize = 8192;
/// Tokens per logit tile, a multiple of [`DRAWS`].
const BLOCK: usize = 96;
/// Rows per logit tile: so many share a packing of the embedding's block.
const ROWS: usize = 192;
/// Counters of Philox side by side.
const COUNTERS: usize = 8;
/// Tokens of so many counters, which make 4 draws each.
const DRAWS: usize = 4 * COUNTERS;
/// Rows that a chain of the embedding's gradient adds up.
const ROW_TILE: usize = 256;
/// Rows per pass of the gradient, whole tiles: share a packing of the embedding, and a block of its gradient in cache; bounds the
/// partial dX that every chunk keeps.
const PASS: usize = 2 * ROW_TILE;
/// Rows per pass where truncation needs a row's whole vocabulary at once.
const TRUNCATED_TILE: usize = 16;

/// Bytes that the gradient of so many rows' log-probs takes beside its operands and results, with so many threads: what every
/// chunk adds to dX, the rows as products take them, and a tile of each thread.
pub fn gradient_bytes(rows: usize, d: usize, vocab: usize, compute: Compute, threads: usize) -> usize {
    let (rows, chunks, padded) = (rows.min(PASS), vocab.div_ceil(CHUNK), d.next_multiple_of(LANES));
    let term = term_bytes(compute);
    let rounded = if term == size_of::<f32>() && compute == Compute::F32 { 0 } else { rows * d * term };
    let tiles = rows.next_multiple_of(ROW_TILE);
    let panels = rows * d.next_multiple_of(PANEL) * term;
    let thread = BLOCK * (padded * term + rows * (size_of::<f32>() + term) + tiles * term);
    chunks * rows * padded * size_of::<f32>() + rounded + panels + chunks.min(threads) * thread
}

/// The running log-sum-exp of a row.
#[derive(Clone, Copy)]
struct Lse {
    max: f32,
    sum: f32,
}

impl Lse {
    const EMPTY: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };

    fn merge(self, other: Self) -> Self {
        let max = self.max.max(other.max);
        if max > f32::NEG_INFINITY {
            Self { max, sum: self.sum * exp(self.max - max) + other.sum * exp(other.max - max) }
        } else {
            // Nothing finite yet; a NaN sum must survive.
            Self { max, sum: self.sum + other.sum }
        }
    }

    fn value(&self) -> f32 {
        self.max + ln(self.sum)
    }
}

/// The best token so far of a row.
#[derive(Clone, Copy)]
struct Best {
    score: f32,
    logit: f32,
    token: u32,
}

impl Best {
    const NONE: Self = Self { score: f32::NEG_INFINITY, logit: f32::NEG_INFINITY, token: 0 };

    /// Tokens come in ascending order, so a strict comparison leaves ties to the lowest.
    #[inline(always)]
    fn offer(&mut self, score: f32, logit: f32, token: u32) {
        if score > self.score {
            *self = Self { score, logit, token };
        }
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

/// Random bits of the tokens from 4 * `counter` on: [`philox4x32`] of several counters, word by word in arrays, so that it
/// vectorises.
#[inline(always)]
fn philox_block(counter: u32, key: &DrawKey) -> [u32; DRAWS] {
    const LOW: u64 = 0xffff_ffff;
    let [m0, m1] = PHILOX_MULTIPLIERS;
    let mut words = [[0; COUNTERS]; 4];
    for l in 0..COUNTERS {
        // Words lie in the lower halves of lanes of 64 bits, where they are multiplied; upper halves hold anything.
        let counter = [counter + l as u32, key.position, key.stream, key.prompt];
        let [mut c0, mut c1, mut c2, mut c3] = counter.map(u64::from);
        let mut k = key.key;
        for _ in 0..PHILOX_ROUNDS {
            let (p0, p1) = (m0 * (c0 & LOW), m1 * (c2 & LOW));
            c0 = p1 >> 32 ^ c1 ^ u64::from(k[0]);
            c2 = p0 >> 32 ^ c3 ^ u64::from(k[1]);
            (c1, c3) = (p1, p0);
            k = philox_next_key(k);
        }
        for (words, c) in words.iter_mut().zip([c0, c1, c2, c3]) {
            words[l] = c;
        }
    }
    // Words of a counter are neighbours: two in a lane, and lanes of the first and the last two in turn.
    let two = |low: u64, high: u64| (low & LOW | high << 32).to_le();
    let mut pairs = [0; DRAWS / 2];
    for (l, pair) in pairs.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        *pair = [two(words[0][l], words[1][l]), two(words[2][l], words[3][l])];
    }
    bytemuck::cast::<_, [u32; DRAWS]>(pairs).map(u32::from_le)
}

/// The Gumbel noise of one row's draw for one token.
pub fn gumbel_noise(key: &DrawKey, token: u32) -> f32 {
    let draw = philox4x32([token / 4, key.position, key.stream, key.prompt], key.key);
    gumbel(draw[token as usize % 4])
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
    /// Adds a row's logits of one block, in whole vectors, to the running log-sum-exp; `terms` become e^(logit - max).
    fn update_lse(logits: &[f32], terms: &mut [f32], lse: &mut Lse) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        for x in logits.as_chunks::<LANES>().0 {
            for l in 0..LANES {
                lanes[l] = lanes[l].max(x[l]);
            }
        }
        let max = lse.max.max(largest(lanes));
        let mut sums = [0.0; LANES];
        for (x, term) in logits.as_chunks::<LANES>().0.iter().zip(terms.as_chunks_mut::<LANES>().0) {
            *term = map(*x, |x| exp(x - max));
            for l in 0..LANES {
                sums[l] += term[l];
            }
        }
        // The block's own sum first: added one by one to a sum near 1, a long tail would be rounded away.
        let before = if max == lse.max && max.is_finite() { lse.sum } else { lse.sum * exp(lse.max - max) };
        *lse = Lse { max, sum: sum(sums) + before };
    }
}

multiversion! {
    /// Adds a row's logits of tokens `v0..`, whole vectors, to the running argmax.
    fn update_greedy(logits: &[f32], v0: usize, best: &mut Best) {
        for (i, x) in logits.as_chunks::<LANES>().0.iter().enumerate() {
            let mut better = false;
            for x in x {
                better |= *x > best.score;
            }
            if better {
                for (l, &x) in x.iter().enumerate() {
                    best.offer(x, x, (v0 + i * LANES + l) as u32);
                }
            }
        }
    }
}

/// The largest lane.
#[inline(always)]
fn largest(x: Block) -> f32 {
    let x: [f32; 8] = std::array::from_fn(|l| x[l].max(x[l + 8]));
    let x: [f32; 4] = std::array::from_fn(|l| x[l].max(x[l + 4]));
    x[0].max(x[2]).max(x[1].max(x[3]))
}

/// A score's distance from the best below which a token is looked at, beyond what the exponentials say: covers their
/// errors and those of the noise (1e-5 at most), and of adding it to a logit.
fn margin(max: f32, best: f32) -> f32 {
    0.01 + 4.0 * f32::EPSILON * max.abs().max(best.abs())
}

/// The bound on 2^32 u / e^(logit - max) of tokens that may win; infinity where all have to be looked at.
#[inline(always)]
fn reach(max: f32, best: f32) -> f32 {
    let ahead = max - best + margin(max, best);
    // u = bits / 2^32 < e^(logit - max) e^(max - best)
    if ahead.is_nan() || ahead > FAR { f32::INFINITY } else { exp(ahead) * 4_294_967_296.0 }
}

/// Exponents beyond which float products of exponentials are not relied upon.
const FAR: f32 = 60.0;

multiversion! {
    /// Adds a row's logits of tokens `v0..`, whole vectors, to the running argmax of logit + noise; `terms` are
    /// e^(logit - max).
    fn update_best(logits: &[f32], terms: &[f32], max: f32, v0: usize, key: &DrawKey, best: &mut Best) {
        let mut reach = self::reach(max, best.score);
        for (i, (logits, terms)) in logits.chunks(DRAWS).zip(terms.chunks(DRAWS)).enumerate() {
            let first = v0 + i * DRAWS;
            let bits = philox_block((first / 4) as u32, key);
            let vectors = logits.as_chunks::<LANES>().0.iter().zip(terms.as_chunks::<LANES>().0);
            for (v, ((x, term), bits)) in vectors.zip(bits.as_chunks::<LANES>().0).enumerate() {
                let mut any = reach == f32::INFINITY;
                for l in 0..LANES {
                    any |= (bits[l] as f32) < term[l] * reach;
                }
                if any {
                    let mut scores = [0.0; LANES];
                    for l in 0..LANES {
                        scores[l] = x[l] + gumbel(bits[l]);
                    }
                    for l in 0..LANES {
                        best.offer(scores[l], x[l], (first + v * LANES + l) as u32);
                    }
                    reach = self::reach(max, best.score);
                }
            }
        }
    }
}

multiversion! {
    /// A row's raw logits become total * softmax * d(finished logit)/d(raw logit).
    fn softmax_gradient(logits: &mut [f32], head: &HeadSpec, lse: f32, total: f32) {
        let HeadSpec { softcap, temperature } = *head;
        for x in logits.as_chunks_mut::<LANES>().0 {
            let mut d = [1.0; LANES];
            if let Some(cap) = softcap {
                for l in 0..LANES {
                    let t = tanh(x[l] / cap);
                    x[l] = cap * t;
                    d[l] = 1.0 - t * t;
                }
            }
            for l in 0..LANES {
                d[l] /= temperature;
                x[l] = exp(x[l] / temperature - lse) * total * d[l];
            }
        }
    }
}

/// d(finished logit)/d(raw logit), with the bits of [`softmax_gradient`]'s.
fn derivative(raw: f32, head: &HeadSpec) -> f32 {
    let of_cap = head.softcap.map_or(1.0, |cap| {
        let t = tanh(raw / cap);
        1.0 - t * t
    });
    of_cap / head.temperature
}

/// The blocks of one chunk of a vocabulary of so many tokens.
fn blocks(chunk: usize, vocab: usize) -> impl Iterator<Item = Range<usize>> {
    let end = vocab.min((chunk + 1) * CHUNK);
    (chunk * CHUNK..end).step_by(BLOCK).map(move |v0| v0..end.min(v0 + BLOCK))
}

/// Calls `visit(tokens, row, raw logits, finished logits)` for the `rows` rows of x and every block of one chunk.
/// Finished logits come in whole vectors: those beyond the tokens are -inf.
fn for_each_row(
    chunk: usize,
    embedding: &Tensor,
    rows: usize,
    x: &Rows,
    head: &HeadSpec,
    mut visit: impl FnMut(Range<usize>, usize, &[f32], &[f32]),
) {
    let mut packed = Vec::new();
    let mut raw = vec![0.0; ROWS.min(rows) * BLOCK];
    let mut finished = [0.0; BLOCK];
    for tokens in blocks(chunk, embedding.rows) {
        let as_they_are =
            head.softcap.is_none() && head.temperature == 1.0 && tokens.len().is_multiple_of(LANES);
        for first in (0..rows).step_by(ROWS) {
            let m = ROWS.min(rows - first);
            products(m, x, first, embedding, tokens.clone(), &mut packed, &mut raw, BLOCK);
            for (row, raw) in (first..).zip(raw.chunks_exact(BLOCK).take(m)) {
                let raw = &raw[..tokens.len()];
                if as_they_are {
                    visit(tokens.clone(), row, raw, raw);
                    continue;
                }
                let finished = &mut finished[..tokens.len().next_multiple_of(LANES)];
                finished[..raw.len()].copy_from_slice(raw);
                finished[raw.len()..].fill(0.0);
                finish_logits(finished, head.softcap, head.temperature);
                finished[raw.len()..].fill(f32::NEG_INFINITY);
                visit(tokens.clone(), row, raw, finished);
            }
        }
    }
}

/// Where the kept logits of a row and a block of tokens begin: block by block, and within one row by row, so that a task writes
/// and reads what lies together.
fn in_block(tokens: &Range<usize>, rows: usize, row: usize) -> usize {
    tokens.start * rows + row * tokens.len()
}

fn chunks(embedding: &Tensor) -> usize {
    embedding.rows.div_ceil(CHUNK)
}

/// The log-sum-exp of every row, from those of its chunks in order.
fn merged<'a>(chunks: impl Iterator<Item = &'a [Lse]>, rows: usize) -> Vec<Lse> {
    let mut all = vec![Lse::EMPTY; rows];
    for chunk in chunks {
        for (a, b) in all.iter_mut().zip(chunk) {
            *a = a.merge(*b);
        }
    }
    all
}

/// The choices after every row: choice i is after row `rows[i]`, and these ascend.
fn of_rows<'a>(count: usize, rows: &[u32], choices: &'a [Choice]) -> Vec<&'a [Choice]> {
    assert!(rows.len() == choices.len() && rows.is_sorted(), "a row for each choice, in order");
    assert!(rows.last().is_none_or(|&row| (row as usize) < count), "rows of x");
    let from = |row: usize| rows.partition_point(|&r| (r as usize) < row);
    (0..count).map(|row| &choices[from(row)..from(row + 1)]).collect()
}

/// What [`LmHead::lm_head_draw`] draws.
fn sample(
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    truncation: &Truncation,
    choices: &[&[Choice]],
    compute: Compute,
) -> Vec<Sampled> {
    let form = Form::with_weights(compute, &[embedding]);
    if !truncation.is_none() {
        let tiles = x.as_f32().chunks(TRUNCATED_TILE * x.cols).zip(choices.chunks(TRUNCATED_TILE));
        return tiles
            .flat_map(|(tile, choices)| {
                sample_truncated(&Rows::new(form, tile, x.cols), embedding, head, truncation, choices)
            })
            .collect();
    }
    let rows = Rows::new(form, x.as_f32(), x.cols);
    let parts: Vec<(Vec<Lse>, Vec<Vec<Best>>)> = mapped(chunks(embedding), |chunk| {
        let mut lse = vec![Lse::EMPTY; x.rows];
        let mut best: Vec<Vec<Best>> = choices.iter().map(|of_row| vec![Best::NONE; of_row.len()]).collect();
        let mut terms = [0.0; BLOCK];
        for_each_row(chunk, embedding, x.rows, &rows, head, |tokens, row, _, logits| {
            let terms = &mut terms[..logits.len()];
            update_lse(logits, terms, &mut lse[row]);
            for (choice, best) in choices[row].iter().zip(&mut best[row]) {
                match choice {
                    Choice::Greedy => update_greedy(logits, tokens.start, best),
                    Choice::Draw(key) => update_best(logits, terms, lse[row].max, tokens.start, key, best),
                }
            }
        });
        (lse, best)
    });
    let lse = merged(parts.iter().map(|p| p.0.as_slice()), x.rows);
    let of_choice = |row: usize, i: usize| {
        let mut best = Best::NONE;
        parts.iter().map(|part| &part.1[row][i]).for_each(|b| best.offer(b.score, b.logit, b.token));
        Sampled { token: best.token, logprob: best.logit - lse[row].value() }
    };
    let of_row = |row: usize| (0..choices[row].len()).map(move |i| (row, i));
    (0..x.rows).flat_map(of_row).map(|(row, i)| of_choice(row, i)).collect()
}

/// Truncation ranks a row's whole vocabulary, so here logits exist for up to 16 rows.
fn sample_truncated(
    x: &Rows,
    embedding: &Tensor,
    head: &HeadSpec,
    truncation: &Truncation,
    choices: &[&[Choice]],
) -> Vec<Sampled> {
    let (rows, vocab) = (choices.len(), embedding.rows);
    let mut logits = zeroed(rows * vocab);
    let out = Out::new(&mut logits);
    let parts: Vec<Vec<Lse>> = mapped(chunks(embedding), |chunk| {
        let mut lse = vec![Lse::EMPTY; rows];
        let mut terms = [0.0; BLOCK];
        for_each_row(chunk, embedding, rows, x, head, |tokens, row, _, logits| {
            update_lse(logits, &mut terms[..logits.len()], &mut lse[row]);
            // SAFETY: this task alone owns the columns of its chunk.
            let to = unsafe { out.slice(row * vocab + tokens.start, tokens.len()) };
            to.copy_from_slice(&logits[..tokens.len()]);
        });
        lse
    });
    let lse = merged(parts.iter().map(Vec::as_slice), rows);
    choices
        .par_iter()
        .zip(logits.par_chunks_exact(vocab))
        .zip(&lse)
        .flat_map_iter(|((of_row, logits), lse)| {
            let kept = keep(logits, lse.value(), truncation);
            of_row.iter().map(move |choice| {
                let score = |t: u32| match choice {
                    Choice::Greedy => logits[t as usize],
                    Choice::Draw(key) => logits[t as usize] + gumbel_noise(key, t),
                };
                let mut token = kept[0];
                for &t in &kept[1..] {
                    let (a, b) = (score(t), score(token));
                    if a > b || (a == b && t < token) {
                        token = t;
                    }
                }
                Sampled { token, logprob: logits[token as usize] - lse.value() }
            })
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

/// See [`LmHead::lm_head_logprob_forward`].
pub fn logprob_forward(
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    targets: &[Target],
    keep: bool,
    compute: Compute,
) -> (Vec<f32>, HeadTrace<Tensor>) {
    let vocab = embedding.rows;
    let rows = Rows::new(Form::with_weights(compute, &[embedding]), x.as_f32(), x.cols);
    let by_row = by_row(targets, x.rows);
    let mut logits = zeroed(if keep { x.rows * vocab } else { 0 });
    let kept = Out::new(&mut logits);
    let parts: Vec<_> = mapped(chunks(embedding), |chunk| {
        let mut lse = vec![Lse::EMPTY; x.rows];
        let mut terms = [0.0; BLOCK];
        let mut found = Vec::new();
        for_each_row(chunk, embedding, x.rows, &rows, head, |tokens, row, raw, logits| {
            update_lse(logits, &mut terms[..logits.len()], &mut lse[row]);
            if keep {
                // SAFETY: this task alone owns the blocks of its chunk.
                unsafe { kept.slice(in_block(&tokens, x.rows, row), raw.len()) }.copy_from_slice(raw);
            }
            for &i in &by_row[row] {
                let token = targets[i as usize].token as usize;
                if tokens.contains(&token) {
                    found.push((i, logits[token - tokens.start]));
                }
            }
        });
        (lse, found)
    });
    let lse = merged(parts.iter().map(|p| p.0.as_slice()), x.rows);
    let lse: Vec<f32> = lse.iter().map(Lse::value).collect();
    let mut logprobs = vec![f32::NAN; targets.len()];
    for (i, logit) in parts.into_iter().flat_map(|p| p.1) {
        logprobs[i as usize] = logit - lse[targets[i as usize].row as usize];
    }
    let logits = keep.then(|| Tensor::f32(x.rows, vocab, logits));
    (logprobs, HeadTrace { lse: Tensor::f32(1, lse.len(), lse), logits })
}

/// Indices of `targets` by row, in order.
fn by_row(targets: &[Target], rows: usize) -> Vec<Vec<u32>> {
    let mut by_row = vec![Vec::new(); rows];
    for (i, target) in (0..).zip(targets) {
        by_row[target.row as usize].push(i);
    }
    by_row
}

/// See [`LmHead::lm_head_logprob_backward`].
#[allow(clippy::too_many_arguments, reason = "the signature of LmHead::lm_head_logprob_backward")]
pub fn logprob_backward(
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    trace: &HeadTrace<Tensor>,
    targets: &[Target],
    weights: &[f32],
    d_embedding: &mut Tensor,
    compute: Compute,
) -> Tensor {
    let d = x.cols;
    let mut dx = vec![0.0; x.rows * d];
    for (pass, dx) in dx.chunks_mut(PASS * d).enumerate() {
        let rows = pass * PASS..pass * PASS + dx.len() / d;
        let pass =
            Pass { x: &x.as_f32()[rows.start * d..rows.end * d], rows, embedding, head, trace, compute };
        pass.backward(targets, weights, d_embedding, dx);
    }
    Tensor::f32(x.rows, d, dx)
}

/// A pass of the gradient: at most [`PASS`] rows of x.
struct Pass<'a> {
    rows: Range<usize>,
    /// These rows.
    x: &'a [f32],
    embedding: &'a Tensor,
    head: &'a HeadSpec,
    trace: &'a HeadTrace<Tensor>,
    compute: Compute,
}

impl Pass<'_> {
    /// dX and dW: dlogits = (total_r softmax_r - sum of w_i onehot_i) * d cap / T, then
    /// dX = dlogits W (summed over chunks in order) and dW += dlogits^T X.
    fn backward(&self, targets: &[Target], weights: &[f32], d_embedding: &mut Tensor, dx: &mut [f32]) {
        let (embedding, d, rows) = (self.embedding, self.embedding.cols, self.rows.len());
        let padded = d.next_multiple_of(LANES);
        let with_weights = Form::with_weights(self.compute, &[embedding]);
        let of_activations = Form::of_activations(self.compute);
        let x = Rows::new(with_weights, self.x, d);
        let of_tile = |x: &[f32]| Panels::from_cols(of_activations, x, d);
        let tiles: Vec<Panels> = self.x.chunks(ROW_TILE * d).map(of_tile).collect();
        let lse = &self.trace.lse.as_f32()[self.rows.clone()];
        let mut total = vec![0.0; rows];
        let row = |i: u32| targets[i as usize].row as usize - self.rows.start;
        let mut by_block: Vec<u32> = (0..)
            .zip(targets)
            .filter(|(_, t)| self.rows.contains(&(t.row as usize)))
            .map(|(i, _)| i)
            .collect();
        for &i in &by_block {
            total[row(i)] += weights[i as usize];
        }
        by_block.sort_by_key(|&i| (block_of(targets[i as usize].token as usize), row(i)));

        // Without a gradient of the embedding, nothing of it is here for any chunk.
        let mut of_chunks: Vec<Sums> = Sums::of(d_embedding).chunks(CHUNK * d);
        of_chunks.resize_with(embedding.rows.div_ceil(CHUNK), Default::default);
        let of_chunks: Vec<Mutex<Sums>> = of_chunks.into_iter().map(Mutex::new).collect();
        let parts: Vec<Vec<f32>> = mapped(of_chunks.len(), |chunk| {
            let d_embedding = std::mem::take(&mut *of_chunks[chunk].lock().expect("one task has the chunk"));
            let mut dx = vec![0.0; rows * padded];
            let mut w = vec![0.0; with_weights.steps(BLOCK) * padded];
            let mut packed = Vec::new();
            let mut logits = vec![0.0; if self.trace.logits.is_some() { 0 } else { rows * BLOCK }];
            let mut dlogits_rows = vec![0.0; rows * with_weights.steps(BLOCK)];
            let of_tile = of_activations.steps(ROW_TILE) * BLOCK;
            let mut dlogits_columns = vec![0.0; tiles.len() * of_tile];
            let mut d_embedding = d_embedding.chunks(BLOCK * d).into_iter();
            for tokens in blocks(chunk, embedding.rows) {
                let (v0, m, mut d_embedding) = (tokens.start, tokens.len(), d_embedding.next());
                let (logits, ld) = match &self.trace.logits {
                    Some(kept) => (&kept.as_f32()[in_block(&tokens, kept.rows, self.rows.start)..], m),
                    None => {
                        products(rows, &x, 0, embedding, tokens.clone(), &mut packed, &mut logits, BLOCK);
                        (&logits[..], BLOCK)
                    }
                };
                let steps = with_weights.steps(m);
                let mut targeted = within(&by_block, targets, block_of(v0)).iter().copied().peekable();
                for first in (0..rows).step_by(2) {
                    let mut two = [[0.0; BLOCK]; 2];
                    for (r, dlogits) in (first..rows).zip(&mut two) {
                        let raw = &logits[r * ld..][..m];
                        dlogits[..m].copy_from_slice(raw);
                        softmax_gradient(dlogits, self.head, lse[r], total[r]);
                        while let Some(i) = targeted.next_if(|&i| row(i) == r) {
                            let at = targets[i as usize].token as usize - v0;
                            dlogits[at] -= weights[i as usize] * derivative(raw[at], self.head);
                        }
                        put(with_weights, &dlogits[..m], &mut dlogits_rows[r * steps..][..steps]);
                    }
                    if d_embedding.is_some() {
                        let odd = if first + 1 < rows { &two[1][..m] } else { &[] };
                        let to = first / ROW_TILE * of_tile + of_activations.steps(first % ROW_TILE) * BLOCK;
                        put_rows(of_activations, &two[0][..m], odd, &mut dlogits_columns[to..], BLOCK);
                    }
                }
                if let Some(d_embedding) = &mut d_embedding {
                    d_embedding.add(|d_embedding| {
                        for (x, dlogits) in tiles.iter().zip(dlogits_columns.chunks_exact(of_tile)) {
                            accumulate(x, m, Broadcast::columns(dlogits, BLOCK), d_embedding);
                        }
                    });
                }
                pack_weights(with_weights, embedding, tokens, 0..d, &mut w[..steps * padded], padded);
                for at in (0..padded).step_by(PANEL) {
                    let (nv, dlogits) =
                        (PANEL.min(padded - at) / LANES, Broadcast::rows(&dlogits_rows, steps));
                    tile(with_weights, rows, nv, steps, dlogits, &w[at..], padded, &mut dx[at..], padded);
                }
            }
            dx
        });
        for part in parts {
            for (dx, part) in dx.chunks_exact_mut(d).zip(part.chunks_exact(padded)) {
                for (a, b) in dx.iter_mut().zip(part) {
                    *a += b;
                }
            }
        }
    }
}

/// The number of the block of a token.
fn block_of(token: usize) -> usize {
    token / CHUNK * CHUNK.div_ceil(BLOCK) + token % CHUNK / BLOCK
}

/// The part of `by_block` whose tokens lie in a block.
fn within<'a>(by_block: &'a [u32], targets: &[Target], block: usize) -> &'a [u32] {
    let of = |i: &u32| block_of(targets[*i as usize].token as usize);
    &by_block[by_block.partition_point(|i| of(i) < block)..by_block.partition_point(|i| of(i) <= block)]
}

impl LmHead for Cpu {
    fn draws(&self, _: usize) -> Draws {
        Draws::default()
    }

    fn lm_head_draw(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        rows: &[u32],
        choices: &[Choice],
        draws: &mut Draws,
    ) {
        let drawn = sample(x, embedding, head, truncation, &of_rows(x.rows, rows, choices), self.compute);
        let any = |token: u32| if (token as usize) < embedding.rows { token } else { 0 };
        draws.latest = drawn.iter().map(|s| any(s.token)).collect();
        draws.not_taken.push_back(drawn);
    }

    fn take_draw(&self, draws: &mut Draws) -> Result<Vec<Sampled>, DeviceError> {
        Ok(draws.not_taken.pop_front().expect("a draw that was not taken"))
    }

    fn lm_head_logprob_forward(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        targets: &[Target],
        keep: bool,
    ) -> (Vec<f32>, HeadTrace<Tensor>) {
        logprob_forward(x, embedding, head, targets, keep, self.compute)
    }

    fn lm_head_logprob_backward(
        &self,
        x: &Tensor,
        embedding: &Tensor,
        head: &HeadSpec,
        trace: &HeadTrace<Tensor>,
        targets: &[Target],
        weights: &[f32],
        d_embedding: &mut Tensor,
    ) -> Tensor {
        logprob_backward(x, embedding, head, trace, targets, weights, d_embedding, self.compute)
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
