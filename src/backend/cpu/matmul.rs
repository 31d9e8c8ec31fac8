//! Y = X W^T and its two gradients, on one micro-kernel.
//!
//! The kernel computes a tile C\[M, lanes\] += A\[M, k\] B\[k, lanes\]: rows of A are broadcast, B is read as vectors of
//! 16 lanes. Every element of C is one chain of fused multiply-adds in the order of k (in bf16 the odd term of a pair
//! before the even one, see [`super::form`]), so its bits depend neither on the tile it falls in, nor on threads, batch
//! or instruction set. An element of Y is one chain from zero; to one of a gradient chains of `KC` terms from zero are
//! added in order.
//!
//! | op | A (broadcast) | B (lanes) | k |
//! |---|---|---|---|
//! | forward Y | rows of X | W, as it lies in memory ([`super::packed`]), or transposed a block at a time | in |
//! | dX += dY W | rows of dY | W, packed a block at a time | out |
//! | dW += dY^T X | columns of dY, a block at a time | X, packed once | tokens |
//!
//! Lanes are outputs, so that one row of X costs one row's work. Weights stream through once: a tile asks for the next one's while
//! it computes, because memory and registers are then busy at the same time.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Mutex;

use half::bf16;
use rayon::prelude::*;

use super::form::{
    Floats, Form, InOrder, InPairs, LINE, Layout, OddFirst, Rows, pack_weights, put_pairs, transposed,
};
use super::packed::unpacked_rows;
use super::simd::{Isa, LANES, Simd, isa, multiversion, prefetch};
use super::sums::Sums;
use super::tasks::{Out, filled};
use super::{Cpu, Data, Tensor, room, rows, tasks, zeroed};
use crate::backend::{Compute, DType, Matmul, Platform};

/// Lanes of a panel of B, and outputs per task: twice the vectors of a register tile, of which eight rows, 24 accumulators, fit
/// AVX-512's 32 registers.
pub(super) const PANEL: usize = 6 * LANES;
/// Rows of A per block: the block and one panel of B stay in a 1 MiB L2.
const ROWS: usize = 48;
/// Terms per chain of the gradients: a panel of B is at most KC * PANEL * 4 = 192 KiB.
const KC: usize = 512;
/// The most rows of X for which f32 weights are transposed in registers: six accumulators beside 16 x 4 words.
const FEW: usize = 6;
/// Words of packed weights per pass, where rows of X are many: these take 384 KiB of a 1 MiB L2, the weights 96.
const WORDS: usize = 512;
/// Rows of X up to which a pass takes all words.
const MANY: usize = 64;
/// Words of packed weights per pass where they are widened first.
const WIDENED: usize = 128;
/// Rows of X up to which each thread rounds them for itself.
const ALONE: usize = 48;
/// k per pass over transposed weights: 16 lanes of them take 8 KiB of the first cache.
const TRANSPOSED: usize = 128;
/// Rows of X per task: beyond, batches are cut so that there are tasks enough.
const T_CUT: usize = 4 * ROWS;
/// Rows of dY per task, which share a packing of W.
const DX_CUT: usize = 8 * ROWS;
/// Tasks below which outputs are shared out by half panels: threads then finish closer together.
const TASKS: usize = 16;

/// Vectors of words that tiles read: rows `row` floats apart, and vectors of a row `next` floats apart.
#[derive(Clone, Copy)]
struct Vectors<'a> {
    first: *const f32,
    floats: usize,
    row: usize,
    next: usize,
    of: PhantomData<&'a [f32]>,
}

impl<'a> Vectors<'a> {
    /// Of rows of floats, `ld` apart.
    fn in_rows(x: &'a [f32], ld: usize) -> Self {
        Self { first: x.as_ptr(), floats: x.len(), row: ld, next: LANES, of: PhantomData }
    }

    /// Of panels of a packed matrix, from word `word` on.
    fn in_panels(w: &'a [bf16], cols: usize, word: usize) -> Self {
        let w = &w[2 * word * LANES..];
        let (first, floats) = (w.as_ptr().cast(), w.len() / 2);
        Self { first, floats, row: LANES, next: cols / 2 * LANES, of: PhantomData }
    }
}

/// The operand that tiles broadcast: its float of row i and step k lies at `i * row + k * step`.
#[derive(Clone, Copy)]
pub(super) struct Broadcast<'a> {
    floats: &'a [f32],
    row: usize,
    step: usize,
}

impl<'a> Broadcast<'a> {
    /// Rows of steps, `ld` apart.
    pub(super) fn rows(floats: &'a [f32], ld: usize) -> Self {
        Self { floats, row: ld, step: 1 }
    }

    /// Steps, `ld` apart, of one float of each row.
    pub(super) fn columns(floats: &'a [f32], ld: usize) -> Self {
        Self { floats, row: 1, step: ld }
    }

    /// From row i and step k on.
    fn from(self, i: usize, k: usize) -> Self {
        Self { floats: &self.floats[i * self.row + k * self.step..], ..self }
    }
}

/// Operands of one tile product. `a`: M rows, as in [`Broadcast`]. `b`: `words` rows of vectors. `c`: M rows, `ldc` apart.
/// A float holds a pair of bf16 where the form says so.
#[derive(Clone, Copy)]
struct Tile {
    words: usize,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    row: usize,
    next: usize,
    c: *mut f32,
    ldc: usize,
}

/// C\[M, 16 NV\] += A B, accumulators in registers.
#[inline(always)]
unsafe fn kernel<S: Simd, L: Layout, const M: usize, const NV: usize>(t: Tile) {
    // SAFETY: the caller owns M rows of a and c and the words of NV vectors of b, with the strides of `t`.
    unsafe {
        let mut acc = [[S::splat(0.0); NV]; M];
        for (i, row) in acc.iter_mut().enumerate() {
            *row = S::load_all(t.c.add(i * t.ldc), LANES);
        }
        for k in 0..t.words {
            let words = S::load_all::<NV>(t.b.add(k * t.row), t.next);
            if L::STREAMED && M > 2 {
                // The next NV vectors, as far as these ones have come: while few rows are multiplied, the processor asks for less
                // than memory can give.
                for v in 0..NV {
                    S::prefetch(t.b.wrapping_add(k * t.row + (NV + v) * t.next).cast());
                }
            }
            for f in 0..L::FLOATS {
                let mut b = words;
                for b in &mut b {
                    *b = L::floats(*b)[f];
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let a = S::splat(*t.a.add(i * t.a_row + (k * L::FLOATS + f) * t.a_step));
                    for (acc, b) in row.iter_mut().zip(b) {
                        *acc = acc.fma(a, b);
                    }
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            for (v, acc) in row.iter().enumerate() {
                acc.store(t.c.add(i * t.ldc + v * LANES));
            }
        }
    }
}

/// All `m` rows of A against NV vectors.
#[inline(always)]
unsafe fn rows<S: Simd, L: Layout, const NV: usize>(mut m: usize, mut t: Tile) {
    // SAFETY: each call stays inside the m rows that the caller owns.
    unsafe {
        while m > 0 {
            let now = m.min(S::ROWS);
            match now {
                1 => kernel::<S, L, 1, NV>(t),
                2 => kernel::<S, L, 2, NV>(t),
                3 => kernel::<S, L, 3, NV>(t),
                4 => kernel::<S, L, 4, NV>(t),
                5 => kernel::<S, L, 5, NV>(t),
                6 if S::ROWS >= 6 => kernel::<S, L, 6, NV>(t),
                7 if S::ROWS == 8 => kernel::<S, L, 7, NV>(t),
                8 if S::ROWS == 8 => kernel::<S, L, 8, NV>(t),
                _ => unreachable!("rows of a tile"),
            }
            (t.a, t.c, m) = (t.a.wrapping_add(now * t.a_row), t.c.wrapping_add(now * t.ldc), m - now);
        }
    }
}

/// C\[m, 16 nv\] += A\[m, _\] B\[words, 16 nv\].
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "operands and their strides, as in BLAS")]
fn tiles<S: Simd, L: Layout>(
    m: usize,
    nv: usize,
    words: usize,
    a: Broadcast,
    b: Vectors,
    c: &mut [f32],
    ldc: usize,
) {
    if m == 0 || nv == 0 || words == 0 {
        return;
    }
    let last = (m - 1) * a.row + (words * L::FLOATS - 1) * a.step;
    assert!(a.floats.len() > last && c.len() >= (m - 1) * ldc + nv * LANES);
    assert!(b.floats >= (words - 1) * b.row + (nv - 1) * b.next + LANES);
    let Vectors { first, row, next, .. } = b;
    let mut t = Tile {
        words,
        a: a.floats.as_ptr(),
        a_row: a.row,
        a_step: a.step,
        b: first,
        row,
        next,
        c: c.as_mut_ptr(),
        ldc,
    };
    let mut left = nv;
    while left > 0 {
        let now = left.min(S::VECTORS);
        // SAFETY: the assertions are the kernels' contract, and the caller has found `S`.
        unsafe {
            match now {
                1 => rows::<S, L, 1>(m, t),
                2 if S::VECTORS == 3 => rows::<S, L, 2>(m, t),
                3 if S::VECTORS == 3 => rows::<S, L, 3>(m, t),
                _ => unreachable!("vectors of a tile"),
            }
        }
        (t.b, t.c, left) = (t.b.wrapping_add(now * next), t.c.wrapping_add(now * LANES), left - now);
    }
}

multiversion! {
    fn tiles_of<L: Layout>(m: usize, nv: usize, words: usize, a: Broadcast, b: Vectors, c: &mut [f32], ldc: usize) {
        tiles::<S, L>(m, nv, words, a, b, c, ldc);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
#[allow(clippy::too_many_arguments, reason = "operands and their strides, as in BLAS")]
fn tiles_of_pairs<L: Layout>(
    m: usize,
    nv: usize,
    words: usize,
    a: Broadcast,
    b: Vectors,
    c: &mut [f32],
    ldc: usize,
) {
    tiles::<super::simd::x86::Pairs, L>(m, nv, words, a, b, c, ldc);
}

#[cfg(not(target_arch = "x86_64"))]
fn tiles_of_pairs<L: Layout>(
    _: usize,
    _: usize,
    _: usize,
    _: Broadcast,
    _: Vectors,
    _: &mut [f32],
    _: usize,
) {
    unreachable!("pairs are x86's");
}

/// C\[m, 16 nv\] += A\[m, k\] B\[k, 16 nv\]: `b`, `c` are row-major with row strides `ldb`, `ldc`, and k counts
/// [`Form::steps`].
#[allow(clippy::too_many_arguments, reason = "operands and their strides, as in BLAS")]
pub(super) fn tile(
    form: Form,
    m: usize,
    nv: usize,
    k: usize,
    a: Broadcast,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
) {
    let b = Vectors::in_rows(b, ldb);
    match form {
        // SAFETY: the form is chosen where the machine has the instruction.
        #[allow(unused_unsafe, reason = "elsewhere than on x86 the function is safe")]
        Form::Pairs => unsafe { tiles_of_pairs::<Floats>(m, nv, k, a, b, c, ldc) },
        _ => tiles_of::<Floats>(m, nv, k, a, b, c, ldc),
    }
}

/// M rows of X, `ldx` apart, times 16 rows of f32 W `[_, k]`, which are transposed in registers.
#[inline(always)]
unsafe fn in_registers<S: Simd, const M: usize>(
    x: *const f32,
    ldx: usize,
    w: *const f32,
    k: usize,
    y: *mut f32,
    ldy: usize,
) {
    // SAFETY: the caller owns M rows of x and y, and 16 of w; 4 divides k.
    unsafe {
        let row = k * size_of::<f32>();
        let mut acc = [S::splat(0.0); M];
        for at in (0..k).step_by(4) {
            // The next 16 rows, as far as these ones have come.
            for line in (0..4 * LANES).step_by(LINE / size_of::<f32>()) {
                S::prefetch(w.wrapping_add((k + at) * LANES + line).cast());
            }
            for (i, w) in S::transposed(w.add(at).cast(), row).into_iter().enumerate() {
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = acc.fma(S::splat(*x.add(r * ldx + at + i)), w);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            acc.store(y.add(i * ldy));
        }
    }
}

multiversion! {
    /// y\[m, outputs\] = X W^T for m <= [`FEW`] rows of X, `ldx` apart, and f32 W; outputs come in whole vectors, k in
    /// blocks of 4.
    fn products_of_few(m: usize, x: &[f32], ldx: usize, w: &[f32], k: usize, y: &mut [f32], ldy: usize) {
        let outputs = w.len() / k;
        assert!(outputs.is_multiple_of(LANES) && k.is_multiple_of(4));
        assert!(x.len() >= (m - 1) * ldx + k && y.len() >= (m - 1) * ldy + outputs);
        for at in (0..outputs).step_by(LANES) {
            let (x, w, y) = (x.as_ptr(), w[at * k..].as_ptr(), y[at..].as_mut_ptr());
            // SAFETY: by the assertions; `multiversion!` found `S`.
            unsafe {
                match m {
                    1 => in_registers::<S, 1>(x, ldx, w, k, y, ldy),
                    2 => in_registers::<S, 2>(x, ldx, w, k, y, ldy),
                    3 => in_registers::<S, 3>(x, ldx, w, k, y, ldy),
                    4 => in_registers::<S, 4>(x, ldx, w, k, y, ldy),
                    5 => in_registers::<S, 5>(x, ldx, w, k, y, ldy),
                    FEW => in_registers::<S, FEW>(x, ldx, w, k, y, ldy),
                    _ => unreachable!("few rows"),
                }
            }
        }
    }
}

/// Rows of X beyond which bf16 weights are widened once for all of them: more than a register tile.
fn widen_beyond() -> usize {
    if isa() >= Isa::Avx512 { 8 } else { 5 }
}

multiversion! {
    /// The floats that `n` words of each of `nv` panels of packed W become, from word `word` on: `[floats, 16 nv]`.
    fn widened<L: Layout>(w: &[bf16], cols: usize, word: usize, n: usize, nv: usize, out: &mut [f32]) {
        let b = Vectors::in_panels(w, cols, word);
        assert!(b.floats >= (n - 1) * b.row + (nv - 1) * b.next + LANES && out.len() >= n * L::FLOATS * nv * LANES);
        for k in 0..n {
            for v in 0..nv {
                // SAFETY: by the assertion; `multiversion!` found `S`.
                unsafe {
                    let floats = L::floats(S::load(b.first.add(k * b.row + v * b.next)));
                    for (f, float) in floats.into_iter().take(L::FLOATS).enumerate() {
                        float.store(out.as_mut_ptr().add(((k * L::FLOATS + f) * nv + v) * LANES));
                    }
                }
            }
        }
    }
}

/// y\[m, outputs\] = X W\[outputs\]^T of packed W, whose outputs begin at a panel. `scratch` is scratch.
#[allow(clippy::too_many_arguments, reason = "operands and their strides, as in BLAS")]
fn products_of_packed(
    m: usize,
    x: &Rows,
    first: usize,
    w: &[bf16],
    cols: usize,
    scratch: &mut Vec<f32>,
    y: &mut [f32],
    ldy: usize,
    nv: usize,
) {
    for y in y.chunks_mut(ldy).take(m) {
        y[..nv * LANES].fill(0.0);
    }
    let (words, form) = (cols / 2, x.form);
    if form != Form::Pairs && m > widen_beyond() {
        scratch.resize(scratch.len().max(2 * WIDENED * nv * LANES), 0.0);
        for word in (0..words).step_by(WIDENED) {
            let n = WIDENED.min(words - word);
            match form {
                Form::F32 => widened::<InOrder>(w, cols, word, n, nv, scratch),
                _ => widened::<OddFirst>(w, cols, word, n, nv, scratch),
            }
            for i in (0..m).step_by(ROWS) {
                let (m, a) = (ROWS.min(m - i), Broadcast::rows(&x.from(first + i)[2 * word..], x.stride));
                tile(form, m, nv, 2 * n, a, scratch, nv * LANES, &mut y[i * ldy..], ldy);
            }
        }
        return;
    }
    let pass = if m <= MANY { words } else { WORDS };
    for word in (0..words).step_by(pass) {
        let (n, a, b) = (
            pass.min(words - word),
            Broadcast::rows(&x.from(first)[form.steps(2 * word)..], x.stride),
            Vectors::in_panels(w, cols, word),
        );
        match form {
            Form::F32 => tiles_of::<InOrder>(m, nv, n, a, b, y, ldy),
            Form::Widened => tiles_of::<OddFirst>(m, nv, n, a, b, y, ldy),
            // SAFETY: the form is chosen where the machine has the instruction.
            #[allow(unused_unsafe, reason = "elsewhere than on x86 the function is safe")]
            Form::Pairs => unsafe { tiles_of_pairs::<InPairs>(m, nv, n, a, b, y, ldy) },
        }
    }
}

/// y\[m, outputs\] = X W\[outputs\]^T for m rows of X from row `first` on; y's rows are `ldy` apart and have room for
/// whole vectors, whose lanes beyond the outputs are left as they come. `packed` is scratch.
#[allow(clippy::too_many_arguments, reason = "operands and their strides, as in BLAS")]
pub(super) fn products(
    m: usize,
    x: &Rows,
    first: usize,
    w: &Tensor,
    outputs: Range<usize>,
    packed: &mut Vec<f32>,
    y: &mut [f32],
    ldy: usize,
) {
    let (k, lanes) = (w.cols, outputs.len().next_multiple_of(LANES));
    let (form, ldx, rows) = (x.form, x.stride, x.from(first));
    if let Data::Packed(w) = w.data() {
        if !outputs.start.is_multiple_of(LANES) {
            // A pile of odd size; no published model has such.
            let w = unpacked_rows(w, k, outputs.clone());
            return products(m, x, first, &w, 0..outputs.len(), packed, y, ldy);
        }
        return products_of_packed(m, x, first, &w[outputs.start * k..], k, packed, y, ldy, lanes / LANES);
    }
    let weights = outputs.start * k..outputs.end * k;
    if let Data::F32(w) = w.data()
        && m <= FEW
        && lanes == outputs.len()
        && k.is_multiple_of(4)
    {
        return products_of_few(m, rows, ldx, &w[weights], k, y, ldy);
    }
    packed.resize(packed.len().max(TRANSPOSED * lanes), 0.0);
    for y in y.chunks_mut(ldy).take(m) {
        y[..lanes].fill(0.0);
    }
    for k0 in (0..k).step_by(TRANSPOSED) {
        let ks = k0..k.min(k0 + TRANSPOSED);
        match (w.data(), form) {
            (Data::F32(w), _) => transposed::<Floats>(&w[weights.clone()], k, &ks, packed, lanes),
            (Data::Bf16(w), Form::F32) => transposed::<InOrder>(&w[weights.clone()], k, &ks, packed, lanes),
            (Data::Bf16(w), Form::Widened) => {
                transposed::<OddFirst>(&w[weights.clone()], k, &ks, packed, lanes)
            }
            (Data::Bf16(w), Form::Pairs) => transposed::<InPairs>(&w[weights.clone()], k, &ks, packed, lanes),
            (Data::Packed(_), _) => unreachable!("seen to"),
        }
        for i in (0..m).step_by(ROWS) {
            let x = Broadcast::rows(&rows[i * ldx + form.steps(k0)..], ldx);
            let (m, y) = (ROWS.min(m - i), &mut y[i * ldy..]);
            tile(form, m, lanes / LANES, form.steps(ks.len()), x, packed, lanes, y, ldy);
        }
    }
}

/// A matrix cut into panels of [`PANEL`] lanes, each `[steps, PANEL]`, lanes beyond the matrix zero.
pub(super) struct Panels {
    data: Vec<f32>,
    form: Form,
    /// [`Form::steps`] of the reduction.
    steps: usize,
    /// Number of lanes.
    n: usize,
}

impl Panels {
    /// Lanes are columns of x `[k, n]`.
    pub(super) fn from_cols(form: Form, x: &[f32], n: usize) -> Self {
        let k = x.len().checked_div(n).unwrap_or(0);
        let steps = form.steps(k);
        let data = filled(n.div_ceil(PANEL) * PANEL * steps, PANEL * steps, |first, out| {
            let lanes = first / steps..n.min(first / steps + PANEL);
            put_pairs(form, x, n, lanes, out, PANEL);
        });
        Self { data, form, steps, n }
    }
}

/// A product of some rows of X with some rows of a W, which become all columns of a Y.
struct Part {
    rows: Range<usize>,
    /// Number of W.
    w: usize,
    outputs: Range<usize>,
    /// Number of Y.
    y: usize,
}

/// Y = X W^T for each W: X `[T, in]`, W `[out, in]`, Y `[T, out]`. Weights are all stored in one type.
pub fn forward<const N: usize>(x: &Tensor, w: [&Tensor; N], compute: Compute) -> [Tensor; N] {
    let part = |i: usize| Part { rows: 0..x.rows, w: i, outputs: 0..w[i].rows, y: i };
    forward_parts(x, &w, w.map(|w| w.rows), (0..N).map(part), compute)
}

/// [`forward`] of N stacked weights, one pile for each group of rows of X: W `[groups, N out, in]`. Group i has the rows
/// `first[i]..first[i + 1]`.
pub fn forward_groups<const N: usize>(
    x: &Tensor,
    first: &[usize],
    w: &Tensor,
    compute: Compute,
) -> [Tensor; N] {
    let groups = first.len() - 1;
    let out = w.rows / (groups * N);
    assert!(first[0] == 0 && first[groups] == x.rows && w.rows == groups * N * out, "groups of all rows");
    let part = |i: usize, y: usize| {
        let pile = (i * N + y) * out;
        Part { rows: first[i]..first[i + 1], w: 0, outputs: pile..pile + out, y }
    };
    let parts = (0..groups).flat_map(|i| (0..N).map(move |y| (i, y))).map(|(i, y)| part(i, y));
    forward_parts(x, &[w], [out; N], parts, compute)
}

/// The parts of Y `[T, out]`, which are all rows and columns of each, once.
fn forward_parts<const N: usize>(
    x: &Tensor,
    w: &[&Tensor],
    out: [usize; N],
    parts: impl Iterator<Item = Part>,
    compute: Compute,
) -> [Tensor; N] {
    for w in w {
        assert_eq!(x.cols, w.cols, "matmul: X is [T, {}], W is [out, {}]", x.cols, w.cols);
    }
    let t = x.rows;
    if x.cols == 0 {
        return out.map(|out| Tensor::f32(t, out, zeroed(t * out)));
    }
    let mut y = out.map(|out| room(t * out));
    {
        let form = Form::with_weights(compute, w);
        // A few rows each thread rounds by itself, because it would wait for each line of them that another core has written.
        let rounded = || Rows::new(form, x.as_f32(), x.cols);
        let shared = (t > ALONE).then(rounded);
        let to = y.each_mut().map(Out::of_room);
        let parts: Vec<Part> = parts.collect();
        let total: usize = parts.iter().map(|part| part.outputs.len()).sum();
        let width = if total < PANEL * TASKS { PANEL / 2 } else { PANEL };
        // Panels of all parts side by side, because each wait for the other threads costs as much as a small panel.
        let mut tasks = Vec::new();
        for part in &parts {
            for p in (0..part.outputs.len()).step_by(width) {
                let columns = p..part.outputs.len().min(p + width);
                tasks.extend(cuts(part.rows.clone(), T_CUT).map(|rows| (part, columns.clone(), rows)));
            }
        }
        tasks::for_each(
            tasks.len(),
            || {
                if let Some(shared) = &shared {
                    prefetch(shared.from(0));
                }
                let own = if shared.is_none() { Some(rounded()) } else { None };
                (own, Vec::new(), vec![0.0; T_CUT.min(t) * PANEL])
            },
            |(own, packed, c), i| {
                let x = own.as_ref().or(shared.as_ref()).expect("one of both");
                let (part, columns, rows) = &tasks[i];
                let &Part { w: matrix, y, .. } = *part;
                let outputs = part.outputs.start + columns.start..part.outputs.start + columns.end;
                products(rows.len(), x, rows.start, w[matrix], outputs, packed, c, PANEL);
                for (row, c) in rows.clone().zip(c.chunks_exact(PANEL)) {
                    // SAFETY: this task alone owns these rows and columns of this Y.
                    unsafe { to[y].write(row * out[y] + columns.start, &c[..columns.len()]) };
                }
            },
        );
    }
    let mut y = y.into_iter().zip(out).map(|(mut y, out)| {
        // SAFETY: parts are all rows and columns of each Y.
        unsafe { y.set_len(t * out) };
        Tensor::f32(t, out, y)
    });
    std::array::from_fn(|_| y.next().expect("N of them"))
}

multiversion! {
    fn add(x: &[f32], sum: &mut [f32]) {
        for (sum, x) in sum.iter_mut().zip(x) {
            *sum += x;
        }
    }
}

/// c\[m, cols\] += a\[m, k\] b\[k, cols..\] where c is a block of a larger matrix (row stride `ldc`), k counts steps of at
/// most KC terms, and `cols` need not be a multiple of the lanes.
#[allow(clippy::too_many_arguments, reason = "operands and their strides, as in BLAS")]
fn add_product(
    form: Form,
    m: usize,
    cols: usize,
    k: usize,
    a: Broadcast,
    b: &[f32],
    c: Out,
    at: usize,
    ldc: usize,
) {
    for i0 in (0..m).step_by(ROWS) {
        let rows = ROWS.min(m - i0);
        // SAFETY: the caller's task alone owns rows i of c at these columns.
        let of_c = |i: usize| unsafe { c.slice(at + (i0 + i) * ldc, cols) };
        // They arrive while chains are computed.
        (0..rows).for_each(|i| prefetch(of_c(i)));
        let mut chains = [0.0; ROWS * PANEL];
        tile(form, rows, cols.div_ceil(LANES), k, a.from(i0, 0), b, PANEL, &mut chains, PANEL);
        for (i, chains) in chains.chunks_exact(PANEL).take(rows).enumerate() {
            add(&chains[..cols], of_c(i));
        }
    }
}

/// dX += dY W: dY `[T, out]`, W `[out, in]`, dX `[T, in]`.
pub fn backward_input(dy: &Tensor, w: &Tensor, dx: &mut Tensor, compute: Compute) {
    assert_eq!(dy.cols, w.rows, "matmul: dX += dY W");
    backward_input_groups(dy, &[0, dy.rows], w, 1, 0, dx, compute);
}

/// [`backward_input`] of groups of rows, group i having the rows `first[i]..first[i + 1]` and weight `at` of the `of` that are
/// stacked in its pile of W `[groups, of out, in]`.
pub fn backward_input_groups(
    dy: &Tensor,
    first: &[usize],
    w: &Tensor,
    of: usize,
    at: usize,
    dx: &mut Tensor,
    compute: Compute,
) {
    let (k, n, groups) = (dy.cols, w.cols, first.len() - 1);
    assert_eq!((dy.rows, n, groups * of * k), (dx.rows, dx.cols, w.rows), "matmul: dX += dY W");
    let form = Form::with_weights(compute, &[w]);
    let dy = Rows::new(form, dy.as_f32(), k);
    let out = Out::new(dx.as_f32_mut());
    let mut tasks = Vec::new();
    for lanes in (0..n).step_by(PANEL) {
        for i in 0..groups {
            let rows = cuts(first[i]..first[i + 1], DX_CUT);
            tasks.extend(rows.map(|rows| (lanes..n.min(lanes + PANEL), i, rows)));
        }
    }
    tasks::for_each(
        tasks.len(),
        || {
            prefetch(dy.from(0));
            vec![0.0; KC * PANEL]
        },
        |b, task| {
            let (lanes, i, rows) = &tasks[task];
            let pile = (i * of + at) * k;
            for k0 in (0..k).step_by(KC) {
                let terms = pile + k0..pile + k.min(k0 + KC);
                let steps = form.steps(terms.len());
                pack_weights(form, w, terms, lanes.clone(), &mut b[..steps * PANEL], PANEL);
                // This task alone owns these rows and columns of dX.
                let a = Broadcast::rows(&dy.from(rows.start)[form.steps(k0)..], dy.stride);
                let at = rows.start * n + lanes.start;
                add_product(form, rows.len(), lanes.len(), steps, a, b, out, at, n);
            }
        },
    );
}

/// Rows in parts of one size, but for the last, of at most `most`.
fn cuts(rows: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let size = rows.len().div_ceil(rows.len().div_ceil(most).max(1)).next_multiple_of(LANES);
    let end = rows.end;
    rows.step_by(size.max(1)).map(move |cut| cut..end.min(cut + size))
}

/// dW += dY^T X: dY `[T, out]`, X `[T, in]`, dW `[out, in]`.
pub fn backward_weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor, compute: Compute) {
    if dw.rows == 0 {
        return;
    }
    assert_eq!((dy.rows, dy.cols, x.cols), (x.rows, dw.rows, dw.cols), "matmul: dW += dY^T X");
    add_backward_weight(dy.as_f32(), dy.cols, x.as_f32(), x.cols, Sums::of(dw), compute);
}

/// [`backward_weight`] of groups, as in [`backward_input_groups`].
pub fn backward_weight_groups(
    dy: &Tensor,
    first: &[usize],
    x: &Tensor,
    of: usize,
    at: usize,
    dw: &mut Tensor,
    compute: Compute,
) {
    let (m, n, groups) = (dy.cols, x.cols, first.len() - 1);
    if dw.rows == 0 {
        return;
    }
    assert_eq!((dy.rows, groups * of * m, n), (x.rows, dw.rows, dw.cols), "matmul: dW += dY^T X");
    let (dy, x) = (dy.as_f32(), x.as_f32());
    Sums::of(dw).chunks(of * m * n).into_par_iter().enumerate().for_each(|(i, pile)| {
        let (dy, x) = (&dy[first[i] * m..first[i + 1] * m], &x[first[i] * n..first[i + 1] * n]);
        add_backward_weight(dy, m, x, n, pile.part(at * m * n, m * n), compute);
    });
}

/// dw\[m, n\] += dy\[_, m\]^T x\[_, n\].
fn add_backward_weight(dy: &[f32], m: usize, x: &[f32], n: usize, dw: Sums, compute: Compute) {
    let k = dy.len() / m;
    if k == 0 {
        return;
    }
    let form = Form::of_activations(compute);
    let panels = Panels::from_cols(form, x, n);
    let blocks: Vec<Mutex<Sums>> = dw.chunks(ROWS * n).into_iter().map(Mutex::new).collect();
    tasks::for_each(
        blocks.len(),
        || vec![0.0; ROWS * form.steps(k)],
        |columns, block| {
            let mut dw = blocks[block].try_lock().expect("one task has the block");
            let rows = dw.len() / n;
            let first = block * ROWS;
            put_pairs(form, dy, m, first..first + rows, columns, ROWS);
            dw.add(|dw| accumulate(&panels, rows, Broadcast::columns(columns, ROWS), dw));
        },
    );
}

/// c\[m, n\] += a\[m, k\] times all panels, c row-major; `a` in the panels' form.
pub(super) fn accumulate(panels: &Panels, m: usize, a: Broadcast, c: &mut [f32]) {
    let Panels { form, steps, n, .. } = *panels;
    assert!(c.len() >= m * n);
    let out = Out::new(c);
    let pass = form.steps(KC);
    for p in 0..n.div_ceil(PANEL) {
        let lanes = PANEL.min(n - p * PANEL);
        let panel = &panels.data[p * PANEL * steps..][..PANEL * steps];
        for k0 in (0..steps).step_by(pass) {
            let (a, b) = (a.from(0, k0), &panel[k0 * PANEL..]);
            add_product(form, m, lanes, pass.min(steps - k0), a, b, out, p * PANEL, n);
        }
    }
}

impl Matmul for Cpu {
    fn matmul_forward<const N: usize>(&self, x: &Tensor, w: [&Tensor; N]) -> [Tensor; N] {
        forward(x, w, self.compute)
    }

    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Tensor,
        w: [&Tensor; N],
        low_rank: [Option<(&Tensor, &Tensor)>; N],
    ) -> [Tensor; N] {
        let mut y = forward(x, w, self.compute);
        for (y, low_rank) in y.iter_mut().zip(low_rank) {
            if let Some((h, b)) = low_rank {
                let [more] = forward(h, [b], self.compute);
                rows::add_scaled(y, &more, 1.0);
            }
        }
        y
    }

    fn matmul_backward_input(&self, pairs: &[(&Tensor, &Tensor)]) -> Tensor {
        let (dy, w) = pairs[0];
        let mut dx = self.zeros(DType::F32, dy.rows, w.cols);
        for (dy, w) in pairs {
            backward_input(dy, w, &mut dx, self.compute);
        }
        dx
    }

    fn matmul_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
        backward_weight(dy, x, dw, self.compute);
    }
}
