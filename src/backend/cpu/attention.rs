//! Segment attention: softmax(cap(scale q k^T)) v over what [`Segments::visible`] names, forward and backward.
//!
//! Every pass has the same shape: a few *rows* (queries times the heads that share a key/value head; or keys) stay in
//! cache while a *stream* of vectors (keys; or queries) passes by once. Order, and thereby every bit of a query's
//! result, depends on its position and window alone: scores are [`dot`] products laid down by absolute position,
//! their exponentials are summed in 16 lanes counted from the first visible key, and the output collects key after
//! key. So one sequence gives the same result cut into segments in any way, in prefill, decode and training.
//!
//! While streams decode, each has one query, so neighbours that continue much the same are computed together: its keys and
//! values pass by once for all their rows, and then each one's own.
//!
//! The backward pass computes the probabilities again from q, k and lse (Dao 2023): once by query for dq, once by key
//! for dk and dv, so that no two tasks add to one place.

use std::ops::Range;

use super::rows::new_rows;
use super::simd::{LANES, Simd, axpy, dot, exp, ln, multiversion, padded, sum, tanh};
use super::tasks::{Out, for_each};
use super::{Cpu, Tables, Tensor};
use crate::backend::{Attention, AttentionBackward, AttentionSpec};
use crate::segments::{QueryRun, Segments};

/// Rows that are computed together, so that a vector of the stream is loaded once for all of them.
const TILE: usize = 4;
/// Rows per task: enough that the stream comes from cache most of the time.
const ROWS: usize = 16;
/// Vectors of the stream between the two halves of a backward pass.
const STREAM: usize = 256;

/// Vectors of `dim` floats at `offsets` of `base`, read only.
#[derive(Clone, Copy)]
struct Vectors<'a> {
    base: &'a [f32],
    offsets: &'a [usize],
    dim: usize,
}

impl<'a> Vectors<'a> {
    /// Some that follow one another.
    #[inline(always)]
    fn part(self, range: Range<usize>) -> Self {
        Self { offsets: &self.offsets[range], ..self }
    }

    #[inline(always)]
    fn len(&self) -> usize {
        self.offsets.len()
    }

    #[inline(always)]
    fn get(&self, i: usize) -> &'a [f32] {
        &self.base[self.offsets[i]..][..self.dim]
    }
}

/// [`dot`] of four vectors with each of K, bit for bit: so many sums hide how long each addition takes.
#[inline(always)]
fn dot_tile<S: Simd, const K: usize>(rows: [&[f32]; TILE], x: [&[f32]; K]) -> [[f32; TILE]; K] {
    let len = rows[0].len();
    assert!(rows.iter().chain(&x).all(|x| x.len() == len));
    let full = len / LANES * LANES;
    // SAFETY: `S` is the set that `multiversion!` found; all slices have `full` floats or more, blocks have 16.
    unsafe {
        let mut acc = [[S::splat(0.0); TILE]; K];
        for i in (0..full).step_by(LANES) {
            let mut of_rows = [S::splat(0.0); TILE];
            for (x, row) in of_rows.iter_mut().zip(rows) {
                *x = S::load(row.as_ptr().add(i));
            }
            for (acc, x) in acc.iter_mut().zip(x) {
                let x = S::load(x.as_ptr().add(i));
                for (acc, row) in acc.iter_mut().zip(of_rows) {
                    *acc = acc.fma(row, x);
                }
            }
        }
        if full < len {
            for (acc, x) in acc.iter_mut().zip(x) {
                let x = S::load(padded(&x[full..]).as_ptr());
                for (acc, row) in acc.iter_mut().zip(rows) {
                    *acc = acc.fma(S::load(padded(&row[full..]).as_ptr()), x);
                }
            }
        }
        let mut sums = [[0.0; TILE]; K];
        for (sums, acc) in sums.iter_mut().zip(acc) {
            *sums = S::sums(acc);
        }
        sums
    }
}

/// [`dot_tile`] of `stream[first..first + K]`, to columns `first..` of rows of `out`, `n` apart.
#[inline(always)]
fn dots_of_tile<S: Simd, const K: usize>(
    tile: [&[f32]; TILE],
    stream: Vectors,
    first: usize,
    out: &mut [f32],
    n: usize,
) {
    let sums = dot_tile::<S, K>(tile, std::array::from_fn(|k| stream.get(first + k)));
    for (i, sums) in (first..).zip(sums) {
        for (r, sum) in sums.into_iter().enumerate() {
            out[r * n + i] = sum;
        }
    }
}

/// out\[r, i\] = rows\[r\] . stream\[i\] for i in seen\[r\] (and perhaps for others); rows of `out` are `n` apart.
#[inline(always)]
fn dots<S: Simd>(rows: Vectors, stream: Vectors, seen: &[Range<usize>], out: &mut [f32], n: usize) {
    for chunk in chunks(stream.len()) {
        let mut r = 0;
        while r + TILE <= rows.len() {
            let tile: [&[f32]; TILE] = std::array::from_fn(|i| rows.get(r + i));
            let first = seen[r..r + TILE].iter().map(|s| s.start).min().unwrap_or(0);
            let end = seen[r..r + TILE].iter().map(|s| s.end).max().unwrap_or(0);
            let (mut i, end) = (first.max(chunk.start), end.min(chunk.end));
            // As many sums as there are registers.
            while S::ROWS == 8 && i + 4 <= end {
                dots_of_tile::<S, 4>(tile, stream, i, &mut out[r * n..], n);
                i += 4;
            }
            for i in i..end {
                dots_of_tile::<S, 1>(tile, stream, i, &mut out[r * n..], n);
            }
            r += TILE;
        }
        for r in r..rows.len() {
            for i in cut(&seen[r], &chunk) {
                out[r * n + i] = dot(rows.get(r), stream.get(i));
            }
        }
    }
}

/// The stream in pieces that stay in the first cache while all rows pass over them.
#[inline(always)]
fn chunks(n: usize) -> impl Iterator<Item = Range<usize>> {
    const PIECE: usize = 16;
    (0..n).step_by(PIECE).map(move |i| i..n.min(i + PIECE))
}

/// What two ranges share (possibly nothing, then somewhere in `b`).
#[inline(always)]
fn cut(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    a.start.clamp(b.start, b.end)..a.end.clamp(b.start, b.end)
}

/// out\[r\] += sum over i in seen\[r\], in order, of coefficients\[r, i\] * stream\[i\]; rows of coefficients are `n` apart.
#[inline(always)]
fn accumulate<S: Simd>(
    coefficients: &[f32],
    n: usize,
    stream: Vectors,
    seen: &[Range<usize>],
    out: &mut [f32],
) {
    let dim = stream.dim;
    for chunk in chunks(stream.len()) {
        let mut r = 0;
        while r < seen.len() {
            let rows = if r + TILE <= seen.len() { TILE } else { 1 };
            let ranges: [Range<usize>; TILE] =
                std::array::from_fn(|k| cut(&seen[r + k.min(rows - 1)], &chunk));
            // What all rows of the tile see; the ends that only some see go row by row.
            let first = ranges.iter().map(|s| s.start).max().unwrap_or(0);
            let end = ranges.iter().map(|s| s.end).min().unwrap_or(0).max(first);
            let out = &mut out[r * dim..(r + rows) * dim];
            let c = &coefficients[r * n..];
            for (k, out) in out.chunks_exact_mut(dim).enumerate() {
                weighted_sum(&c[k * n..], stream, ranges[k].start..first.min(ranges[k].end), out);
            }
            if rows == TILE {
                weighted_sum_tile::<S>(c, n, stream, first..end, out);
            } else {
                weighted_sum(c, stream, first..end, out);
            }
            for (k, out) in out.chunks_exact_mut(dim).enumerate() {
                weighted_sum(&c[k * n..], stream, end.max(ranges[k].start)..ranges[k].end, out);
            }
            r += rows;
        }
    }
}

/// out += sum over i in `range`, in order, of coefficients\[i\] * stream\[i\].
#[inline(always)]
fn weighted_sum(coefficients: &[f32], stream: Vectors, range: Range<usize>, out: &mut [f32]) {
    for i in range {
        axpy(coefficients[i], stream.get(i), out);
    }
}

/// [`weighted_sum`] of [`TILE`] rows at once, bit for bit: vectors of columns of each stay in registers.
#[inline(always)]
fn weighted_sum_tile<S: Simd>(
    coefficients: &[f32],
    n: usize,
    stream: Vectors,
    range: Range<usize>,
    out: &mut [f32],
) {
    let dim = stream.dim;
    if range.is_empty() {
        return;
    }
    let full = if S::ROWS == 8 && dim.is_multiple_of(4 * LANES) {
        weighted_sum_columns::<S, 4>(coefficients, n, stream, range.clone(), out)
    } else {
        weighted_sum_columns::<S, 2>(coefficients, n, stream, range.clone(), out)
    };
    if full < dim {
        for i in range {
            for (r, out) in out.chunks_exact_mut(dim).enumerate() {
                axpy(coefficients[r * n + i], &stream.get(i)[full..], &mut out[full..]);
            }
        }
    }
}

/// The columns of [`weighted_sum_tile`] that make whole blocks of so many vectors. Returns how many.
#[inline(always)]
fn weighted_sum_columns<S: Simd, const VECTORS: usize>(
    coefficients: &[f32],
    n: usize,
    stream: Vectors,
    range: Range<usize>,
    out: &mut [f32],
) -> usize {
    let dim = stream.dim;
    assert!(out.len() == TILE * dim && range.end <= stream.len());
    assert!(coefficients.len() >= (TILE - 1) * n + range.end);
    let full = dim / (VECTORS * LANES) * VECTORS * LANES;
    for column in (0..full).step_by(VECTORS * LANES) {
        // SAFETY: `S` is the set that `multiversion!` found; the block's columns are within the TILE rows of
        // `out` and the vectors of `stream`, and r * n + i within `coefficients`, by the assertion.
        unsafe {
            let at = |r: usize, v: usize| r * dim + column + v * LANES;
            let mut acc = [[S::splat(0.0); VECTORS]; TILE];
            for (r, acc) in acc.iter_mut().enumerate() {
                *acc = S::load_all(out.as_ptr().add(at(r, 0)), LANES);
            }
            for i in range.clone() {
                let x = stream.get(i);
                let x: [S; VECTORS] = S::load_all(x.as_ptr().add(column), LANES);
                for (r, acc) in acc.iter_mut().enumerate() {
                    let c = S::splat(*coefficients.get_unchecked(r * n + i));
                    for (acc, x) in acc.iter_mut().zip(x) {
                        *acc = acc.fma(c, x);
                    }
                }
            }
            for (r, acc) in acc.into_iter().enumerate() {
                for (v, acc) in acc.into_iter().enumerate() {
                    acc.store(out.as_mut_ptr().add(at(r, v)));
                }
            }
        }
    }
    full
}

/// Scores from dot products, in place: scale, then soft-cap.
#[inline(always)]
fn cap(scores: &mut [f32], spec: &AttentionSpec) {
    match spec.softcap {
        None => scores.iter_mut().for_each(|s| *s *= spec.scale),
        Some(c) => scores.iter_mut().for_each(|s| *s = c * tanh(*s * spec.scale / c)),
    }
}

/// Replaces scores by exp(score - max); returns (log of the sum of exp(score), sum of what it wrote).
#[inline(always)]
fn softmax_numerators(scores: &mut [f32]) -> (f32, f32) {
    let mut highest = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = scores.as_chunks::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            highest[l] = if block[l] > highest[l] { block[l] } else { highest[l] };
        }
    }
    let max = rest.iter().chain(&highest).fold(f32::NEG_INFINITY, |m, &s| if s > m { s } else { m });
    let mut total = [0.0; LANES];
    let (blocks, rest) = scores.as_chunks_mut::<LANES>();
    for block in blocks {
        for l in 0..LANES {
            block[l] = exp(block[l] - max);
            total[l] += block[l];
        }
    }
    for (s, total) in rest.iter_mut().zip(&mut total) {
        *s = exp(*s - max);
        *total += *s;
    }
    let total = sum(total);
    (max + ln(total), total)
}

/// What some rows of a task see: the keys `stream`, which are its columns from `column` on.
#[derive(Clone)]
struct Part {
    rows: Range<usize>,
    stream: Range<usize>,
    column: usize,
}

/// A task of the forward pass.
struct Forward<'a> {
    rows: Vectors<'a>,
    keys: Vectors<'a>,
    values: Vectors<'a>,
    /// The columns that each row sees.
    seen: &'a [Range<usize>],
    /// In ascending order of a row's columns.
    parts: &'a [Part],
    columns: usize,
    spec: &'a AttentionSpec,
}

multiversion! {
    /// Attention of the rows over the columns that they see: adds to `out` (zeros) and writes `lse`. `scores` is scratch, a row
    /// for each row.
    fn forward_rows(task: &Forward, scores: &mut [f32], out: &mut [f32], lse: &mut [f32]) {
        let Forward { rows, keys, values, seen, parts, columns: n, spec } = *task;
        let mut seen_part = Vec::with_capacity(seen.len());
        for Part { rows: of_rows, stream, column } in parts.iter().cloned() {
            set_seen_part(&seen[of_rows.clone()], column, stream.len(), &mut seen_part);
            let scores = &mut scores[of_rows.start * n + column..];
            dots::<S>(rows.part(of_rows), keys.part(stream), &seen_part, scores, n);
        }
        let mut totals = Vec::with_capacity(lse.len());
        for ((r, seen), lse) in seen.iter().enumerate().zip(lse) {
            let scores = &mut scores[r * n..][seen.clone()];
            cap(scores, spec);
            let (log, total) = softmax_numerators(scores);
            *lse = log;
            totals.push(total);
        }
        for Part { rows: of_rows, stream, column } in parts.iter().cloned() {
            set_seen_part(&seen[of_rows.clone()], column, stream.len(), &mut seen_part);
            let (scores, out) = (&scores[of_rows.start * n + column..], &mut out[of_rows.start * values.dim..]);
            accumulate::<S>(scores, n, values.part(stream), &seen_part, out);
        }
        for (out, total) in out.chunks_exact_mut(values.dim).zip(totals) {
            out.iter_mut().for_each(|x| *x /= total);
        }
    }
}

/// `seen` within the `len` columns from `first` on, counted from there.
#[inline(always)]
fn set_seen_part(seen: &[Range<usize>], first: usize, len: usize, part: &mut Vec<Range<usize>>) {
    let local = |x: usize| x.saturating_sub(first).min(len);
    refill(part, seen.iter().map(|s| local(s.start)..local(s.end)));
}

/// With s = dots of queries and keys, dp = dots of do and values: replaces s by the probabilities p and dp by the
/// gradients of the dots, scale * cap' * p (dp - delta).
#[inline(always)]
fn probability_gradients(s: &mut [f32], dp: &mut [f32], lse: &[f32], delta: &[f32], spec: &AttentionSpec) {
    let items = s.iter_mut().zip(dp).zip(lse).zip(delta);
    match spec.softcap {
        None => {
            for (((s, dp), lse), delta) in items {
                let p = exp(*s * spec.scale - lse);
                *dp = spec.scale * p * (*dp - delta);
                *s = p;
            }
        }
        Some(c) => {
            for (((s, dp), lse), delta) in items {
                let t = tanh(*s * spec.scale / c);
                let p = exp(c * t - lse);
                *dp = spec.scale * t.mul_add(-t, 1.0) * p * (*dp - delta);
                *s = p;
            }
        }
    }
}

multiversion! {
    /// dq\[r\] += the gradients that query r gets from the keys in seen\[r\]. `lse` and `delta` hold one figure per row.
    fn backward_query_rows(
        q: Vectors,
        d_o: Vectors,
        keys: Vectors,
        values: Vectors,
        seen: &[Range<usize>],
        lse: &[f32],
        delta: &[f32],
        spec: &AttentionSpec,
        s: &mut [f32],
        dp: &mut [f32],
        dq: &mut [f32],
    ) {
        let n = keys.len();
        dots::<S>(q, keys, seen, s, n);
        dots::<S>(d_o, values, seen, dp, n);
        for (r, seen) in seen.iter().enumerate() {
            let lse = [lse[r]; STREAM];
            let delta = [delta[r]; STREAM];
            let range = r * n + seen.start..r * n + seen.end;
            probability_gradients(&mut s[range.clone()], &mut dp[range], &lse, &delta, spec);
        }
        accumulate::<S>(dp, n, keys, seen, dq);
    }
}

multiversion! {
    /// dk\[r\], dv\[r\] += the gradients that key r gets from the queries in seen\[r\]. `lse` and `delta` hold one figure
    /// per query.
    fn backward_key_rows(
        k: Vectors,
        v: Vectors,
        queries: Vectors,
        d_o: Vectors,
        seen: &[Range<usize>],
        lse: &[f32],
        delta: &[f32],
        spec: &AttentionSpec,
        s: &mut [f32],
        dp: &mut [f32],
        dk: &mut [f32],
        dv: &mut [f32],
    ) {
        let n = queries.len();
        dots::<S>(k, queries, seen, s, n);
        dots::<S>(v, d_o, seen, dp, n);
        for (r, seen) in seen.iter().enumerate() {
            let range = r * n + seen.start..r * n + seen.end;
            let (lse, delta) = (&lse[seen.clone()], &delta[seen.clone()]);
            probability_gradients(&mut s[range.clone()], &mut dp[range], lse, delta, spec);
        }
        accumulate::<S>(s, n, d_o, seen, dv);
        accumulate::<S>(dp, n, queries, seen, dk);
    }
}

multiversion! {
    /// delta\[t, h\] = do . o of every head.
    fn deltas(d_o: &[f32], o: &[f32], dim: usize, out: &mut [f32]) {
        for ((out, a), b) in out.iter_mut().zip(d_o.chunks_exact(dim)).zip(o.chunks_exact(dim)) {
            *out = dot(a, b);
        }
    }
}

/// Buffers that a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    rows: Vec<usize>,
    stream: Vec<usize>,
    seen: Vec<Range<usize>>,
    /// `seen` within a chunk of the stream.
    seen_chunk: Vec<Range<usize>>,
    parts: Vec<Part>,
    lse: Vec<f32>,
    delta: Vec<f32>,
    s: Vec<f32>,
    dp: Vec<f32>,
}

/// Consecutive tokens of one segment.
struct Span {
    segment: usize,
    /// Absolute position of the first token.
    position: usize,
    len: usize,
    /// The first token's row.
    row: usize,
}

/// Cuts runs into spans of at most `len` tokens.
fn spans(segments: &Segments, runs: &[QueryRun], len: usize) -> Vec<Span> {
    let mut spans = Vec::new();
    for run in runs {
        let position = segments.list()[run.segment].position + run.first;
        spans.extend((0..run.len).step_by(len).map(|first| Span {
            segment: run.segment,
            position: position + first,
            len: len.min(run.len - first),
            row: run.row + first,
        }));
    }
    spans
}

/// Spans that are computed together, and how many first positions they have in common.
struct Group {
    spans: Vec<Span>,
    common: usize,
}

/// Neighbours of at most `len` tokens in all of which at least half of what each continues is the same, because these keys are then
/// read once for all of them.
fn together(segments: &Segments, spans: Vec<Span>, len: usize) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for span in spans {
        let position = segments.list()[span.segment].position;
        if let Some(group) = groups.last_mut() {
            let common = segments.common(group.spans[0].segment, span.segment).min(group.common);
            let tokens: usize = group.spans.iter().map(|span| span.len).sum();
            if common > 0 && 2 * common >= position.max(group.common) && tokens + span.len <= len {
                group.spans.push(span);
                group.common = common;
                continue;
            }
        }
        groups.push(Group { spans: vec![span], common: position });
    }
    groups
}

/// First absolute position that the query at `position` sees.
fn first_seen(position: usize, window: Option<usize>) -> usize {
    window.map_or(0, |w| (position + 1).saturating_sub(w))
}

/// What the passes know beside the tensors.
struct Layout<'a> {
    segments: &'a Segments,
    spec: &'a AttentionSpec,
    /// Query heads per key/value head.
    group: usize,
}

impl<'a> Layout<'a> {
    fn new(segments: &'a Segments, spec: &'a AttentionSpec) -> Self {
        assert!(spec.heads.is_multiple_of(spec.kv_heads) && spec.window != Some(0));
        Self { segments, spec, group: spec.heads / spec.kv_heads }
    }

    /// Queries per task.
    fn queries(&self) -> usize {
        (ROWS / self.group).max(1)
    }

    /// Offset of the first of the task's query heads in row `row` of q.
    fn query(&self, row: usize, kv_head: usize) -> usize {
        (row * self.spec.heads + kv_head * self.group) * self.spec.head_dim
    }

    /// Offset of a key.
    fn key(&self, row: usize, kv_head: usize) -> usize {
        (row * self.spec.kv_heads + kv_head) * self.spec.head_dim
    }

    /// Offsets of the queries in rows `rows`, each with the heads of its group.
    fn push_queries(&self, rows: Range<usize>, kv_head: usize, out: &mut Vec<usize>) {
        for row in rows {
            let first = self.query(row, kv_head);
            out.extend((0..self.group).map(|g| first + g * self.spec.head_dim));
        }
    }

    /// Sets scratch for spans that have their `common` first positions in common: the offsets of their queries, those of all keys
    /// that any of them sees, common ones first, and who sees which. A row's columns are positions in order. Returns the number
    /// of columns.
    fn set_queries(&self, spans: &[Span], common: usize, kv_head: usize, scratch: &mut Scratch) -> usize {
        let Scratch { rows, stream, parts, seen, .. } = scratch;
        rows.clear();
        stream.clear();
        parts.clear();
        seen.clear();
        let window = self.spec.window;
        let first = spans.iter().map(|span| first_seen(span.position, window)).min().unwrap_or(0);
        // Keys of the positions up to `last`, from `from` on.
        let mut push_keys = |segment: usize, from: usize, last: usize| {
            let begin = stream.len();
            for range in self.segments.visible(segment, last, Some(last + 1 - from)) {
                stream.extend(range.map(|row| self.key(row, kv_head)));
            }
            begin..stream.len()
        };
        // Nothing is shared by one span alone.
        let own = if spans.len() > 1 { first.max(common) } else { first };
        if own > first {
            let stream = push_keys(spans[0].segment, first, own - 1);
            let tokens = spans.iter().map(|span| span.len).sum::<usize>();
            parts.push(Part { rows: 0..tokens * self.group, stream, column: 0 });
        }
        let mut columns = 0;
        for span in spans {
            let begin = rows.len();
            let last = span.position + span.len - 1;
            self.push_queries(span.row..span.row + span.len, kv_head, rows);
            let stream = push_keys(span.segment, own, last);
            parts.push(Part { rows: begin..rows.len(), stream, column: own - first });
            for p in span.position..=last {
                let of_token = first_seen(p, window) - first..p + 1 - first;
                seen.extend(std::iter::repeat_n(of_token, self.group));
            }
            columns = columns.max(last + 1 - first);
        }
        columns
    }
}

/// Copies the rows of a task's result, `width` floats per token, to where they belong: token t to
/// out\[(row + t) * stride + column..\].
///
/// # Safety
/// There is such a place for each token, and nobody else uses it.
unsafe fn place(out: Out, part: &[f32], row: usize, stride: usize, column: usize, width: usize) {
    for (t, part) in part.chunks_exact(width).enumerate() {
        // SAFETY: the caller's word.
        unsafe { out.write((row + t) * stride + column, part) };
    }
}

/// Segment attention. q `[Tq, H Dh]` with rows as `runs` say; k, v `[rows, K Dh]` with rows as `segments` say. Returns
/// o `[Tq, H Dh]` and lse `[Tq, H]` (natural log of the sum of exp of the visible scores); rows of q that belong to no
/// run have o = 0 and lse = -inf.
pub fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    segments: &Segments,
    runs: &[QueryRun],
    spec: &AttentionSpec,
) -> (Tensor, Tensor) {
    let layout = Layout::new(segments, spec);
    let (heads, dim, group) = (spec.heads, spec.head_dim, layout.group);
    assert!(q.cols == heads * dim && k.cols == spec.kv_heads * dim && v.cols == k.cols);
    assert!(segments.rows() <= k.rows.min(v.rows));
    let (qs, ks, vs) = (q.as_f32(), k.as_f32(), v.as_f32());
    let spans = spans(segments, runs, layout.queries());
    // Where there are few, each thread has its own.
    let each = (spans.len() * spec.kv_heads / rayon::current_num_threads()).clamp(1, layout.queries());
    let groups = together(segments, spans, each);
    let mut o = vec![0.0; q.rows * heads * dim];
    let mut lse = vec![f32::NEG_INFINITY; q.rows * heads];
    let (to_o, to_lse) = (Out::new(&mut o), Out::new(&mut lse));
    let init = || (Scratch::default(), Vec::new(), Vec::new());
    for_each(groups.len() * spec.kv_heads, init, |(scratch, o, lse), i| {
        let (Group { spans, common }, kv_head) = (&groups[i / spec.kv_heads], i % spec.kv_heads);
        let columns = layout.set_queries(spans, *common, kv_head, scratch);
        let Scratch { rows, stream, parts, seen, s, .. } = scratch;
        let rows = Vectors { base: qs, offsets: rows, dim };
        let keys = Vectors { base: ks, offsets: stream, dim };
        let values = Vectors { base: vs, ..keys };
        s.resize(rows.len() * columns, 0.0);
        refill(o, std::iter::repeat_n(0.0, rows.len() * dim));
        refill(lse, std::iter::repeat_n(0.0, rows.len()));
        forward_rows(&Forward { rows, keys, values, seen, parts, columns, spec }, s, o, lse);
        let head = kv_head * group;
        let (mut o, mut lse) = (&o[..], &lse[..]);
        for span in spans {
            let (of_o, of_lse);
            (of_o, o) = o.split_at(span.len * group * dim);
            (of_lse, lse) = lse.split_at(span.len * group);
            // SAFETY: this task alone owns its tokens' parts of these heads.
            unsafe {
                place(to_o, of_o, span.row, heads * dim, head * dim, group * dim);
                place(to_lse, of_lse, span.row, heads, head, group);
            }
        }
    });
    (Tensor::f32(q.rows, heads * dim, o), Tensor::f32(q.rows, heads, lse))
}

/// Gradient of [`forward`]: returns (dq, dk, dv). Keys of a shared prefix collect the gradients of all that see them: segments
/// in table order, queries in order, heads in order.
#[allow(clippy::too_many_arguments, reason = "the signature of AttentionBackward::attention_backward")]
pub fn backward(
    d_o: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: &Tensor,
    lse: &Tensor,
    segments: &Segments,
    runs: &[QueryRun],
    spec: &AttentionSpec,
) -> (Tensor, Tensor, Tensor) {
    let layout = Layout::new(segments, spec);
    let (heads, kv_heads, dim, group) = (spec.heads, spec.kv_heads, spec.head_dim, layout.group);
    assert!(q.cols == heads * dim && k.cols == kv_heads * dim && v.cols == k.cols);
    assert!(segments.rows() <= k.rows && k.rows == v.rows);
    let (d_os, qs, ks, vs, lses) = (d_o.as_f32(), q.as_f32(), k.as_f32(), v.as_f32(), lse.as_f32());
    let delta = new_rows(q.rows * heads, 1, |first, block| {
        let range = first * dim..(first + block.len()) * dim;
        deltas(&d_os[range.clone()], &o.as_f32()[range], dim, block);
    });

    let by_query = spans(segments, runs, layout.queries());
    let mut dq = vec![0.0; qs.len()];
    let to = Out::new(&mut dq);
    for_each(by_query.len() * kv_heads, Scratch::default, |scratch, i| {
        let (span, kv_head) = (&by_query[i / kv_heads], i % kv_heads);
        layout.set_queries(std::slice::from_ref(span), 0, kv_head, scratch);
        let Scratch { rows, stream, seen, seen_chunk, lse, delta: delta_rows, s, dp, .. } = scratch;
        refill(lse, rows.iter().map(|x| lses[x / dim]));
        refill(delta_rows, rows.iter().map(|x| delta[x / dim]));
        let mut dq = vec![0.0; rows.len() * dim];
        for (i, chunk) in stream.chunks(STREAM).enumerate() {
            set_seen_part(seen, i * STREAM, chunk.len(), seen_chunk);
            s.resize(rows.len() * chunk.len(), 0.0);
            dp.resize(rows.len() * chunk.len(), 0.0);
            let queries = Vectors { base: qs, offsets: rows, dim };
            let keys = Vectors { base: ks, offsets: chunk, dim };
            let (d_o, values) = (Vectors { base: d_os, ..queries }, Vectors { base: vs, ..keys });
            backward_query_rows(
                queries, d_o, keys, values, seen_chunk, lse, delta_rows, spec, s, dp, &mut dq,
            );
        }
        // SAFETY: this task alone owns its queries' parts of these heads.
        unsafe { place(to, &dq, span.row, heads * dim, kv_head * group * dim, group * dim) };
    });

    let seen_by = seen_by(segments);
    let queries = by_segment(segments, runs);
    let by_key = spans(segments, &segments.all_queries(), ROWS);
    let (mut dk, mut dv) = (vec![0.0; ks.len()], vec![0.0; ks.len()]);
    let (to_dk, to_dv) = (Out::new(&mut dk), Out::new(&mut dv));
    for_each(by_key.len() * kv_heads, Scratch::default, |scratch, i| {
        let (span, kv_head) = (&by_key[i / kv_heads], i % kv_heads);
        let Scratch { rows, stream, seen, lse, delta: delta_stream, s, dp, .. } = scratch;
        refill(rows, (span.row..span.row + span.len).map(|row| layout.key(row, kv_head)));
        let (mut dk, mut dv) = (vec![0.0; rows.len() * dim], vec![0.0; rows.len() * dim]);
        // One past the last position that sees the key at `position`.
        let horizon = |position: usize| spec.window.map_or(usize::MAX, |w| position.saturating_add(w));
        for run in seen_by[span.segment].iter().flat_map(|&segment| &queries[segment]) {
            let begin = segments.list()[run.segment].position + run.first;
            let first = begin.max(span.position);
            let end = (begin + run.len).min(horizon(span.position + span.len - 1));
            let step = (STREAM / group).max(1);
            for first in (first..end).step_by(step) {
                let end = end.min(first + step);
                let row = |position: usize| run.row + (position - begin);
                stream.clear();
                layout.push_queries(row(first)..row(end), kv_head, stream);
                refill(lse, stream.iter().map(|x| lses[x / dim]));
                refill(delta_stream, stream.iter().map(|x| delta[x / dim]));
                let local = |position: usize| (position.clamp(first, end) - first) * group;
                let positions = span.position..span.position + span.len;
                refill(seen, positions.map(|p| local(p)..local(horizon(p))));
                s.resize(rows.len() * stream.len(), 0.0);
                dp.resize(rows.len() * stream.len(), 0.0);
                let keys = Vectors { base: ks, offsets: rows, dim };
                let queries = Vectors { base: qs, offsets: stream, dim };
                let (values, d_o) = (Vectors { base: vs, ..keys }, Vectors { base: d_os, ..queries });
                backward_key_rows(
                    keys,
                    values,
                    queries,
                    d_o,
                    seen,
                    lse,
                    delta_stream,
                    spec,
                    s,
                    dp,
                    &mut dk,
                    &mut dv,
                );
            }
        }
        // SAFETY: this task alone owns these keys' parts of this head.
        unsafe {
            place(to_dk, &dk, span.row, kv_heads * dim, kv_head * dim, dim);
            place(to_dv, &dv, span.row, kv_heads * dim, kv_head * dim, dim);
        }
    });
    (Tensor::f32(q.rows, q.cols, dq), Tensor::f32(k.rows, k.cols, dk), Tensor::f32(v.rows, v.cols, dv))
}

/// For every segment, the runs of its queries in order.
fn by_segment(segments: &Segments, runs: &[QueryRun]) -> Vec<Vec<QueryRun>> {
    let mut of = vec![Vec::new(); segments.list().len()];
    for run in runs {
        of[run.segment].push(*run);
    }
    for runs in &mut of {
        runs.sort_by_key(|run| run.first);
    }
    of
}

/// For every segment, the segments whose queries see it, itself first, in table order.
fn seen_by(segments: &Segments) -> Vec<Vec<usize>> {
    let mut seen_by = vec![Vec::new(); segments.list().len()];
    for i in 0..segments.list().len() {
        for prefix in segments.chain(i) {
            seen_by[prefix].push(i);
        }
    }
    seen_by
}

/// Replaces what `buffer` holds.
fn refill<T>(buffer: &mut Vec<T>, items: impl Iterator<Item = T>) {
    buffer.clear();
    buffer.extend(items);
}

impl Attention for Cpu {
    fn attention_forward(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        tables: &Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor) {
        forward(q, k, v, &tables.segments, &tables.runs, spec)
    }
}

impl AttentionBackward for Cpu {
    fn attention_backward(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        tables: &Tables,
        spec: &AttentionSpec,
    ) -> (Tensor, Tensor, Tensor) {
        backward(d_o, q, k, v, o, lse, &tables.segments, &tables.runs, spec)
    }
}
