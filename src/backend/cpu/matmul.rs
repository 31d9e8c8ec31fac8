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
//! | forward Y, few rows | rows of X | W, transposed a block at a time | in |
//! | forward Y, more rows, on AVX-512 | W, as it is | X, transposed once | in |
//! | dX += dY W | rows of dY | W, packed a block at a time | out |
//! | dW += dY^T X | columns of dY, transposed a block at a time | X, packed once | tokens |
//!
//! Weights stream through once and become a product's operands in cache. Where lanes are outputs, one row of X costs one row's
//! work; where they are rows of X, sixteen rows cost the same as one, and weights are read as they lie in memory.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::form::{
    FEW, Floats, Form, InOrder, InPairs, LINE, Layout, OddFirst, Rows, few_rows, pack_weights, put_rows,
    transposed,
};
use super::simd::{Block, Isa, LANES, Simd, isa, multiversion};
use super::sums::Sums;
use super::{Data, Tensor, form, zeroed};
use crate::backend::Compute;

/// Lanes of a packed panel: four vectors.
pub(super) const PANEL: usize = 4 * LANES;
/// Rows of A per register tile: 6 x 4 accumulators + 4 vectors of B + 1 broadcast fit AVX-512's 32 registers.
const MR: usize = 6;
/// Rows of A per block: the block and one panel of B stay in a 1 MiB L2.
const ROWS: usize = 48;
/// Terms per chain of the gradients: a panel of B is at most KC * PANEL * 4 = 128 KiB.
const KC: usize = 512;
/// k per pass over transposed weights: 16 lanes of them take 8 KiB of the first cache.
const TRANSPOSED: usize = 128;
/// Rows of A that share a packing of W: beyond, batches are cut so that there are tasks enough.
const T_CUT: usize = 4 * ROWS;

/// Operands of one tile product. `a`: M rows of k floats, `lda` apart. `b`: k rows of vectors, `ldb` apart. `c`: M
/// rows, `ldc` apart. A float holds a pair of bf16 where the form says so.
#[derive(Clone, Copy)]
struct Tile {
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
}

/// C\[M, 16 NV\] += A B, accumulators in registers.
#[inline(always)]
unsafe fn kernel<S: Simd, const M: usize, const NV: usize>(t: Tile) {
    // SAFETY: the caller owns M rows of a and c and k rows of b with the strides of `t`, 16 NV lanes wide.
    unsafe {
        let mut acc: [[S; NV]; M] =
            std::array::from_fn(|i| std::array::from_fn(|v| S::load(t.c.add(i * t.ldc + v * LANES))));
        for k in 0..t.k {
            let b: [S; NV] = std::array::from_fn(|v| S::load(t.b.add(k * t.ldb + v * LANES)));
            for (i, row) in acc.iter_mut().enumerate() {
                let a = S::splat(*t.a.add(i * t.lda + k));
                for (acc, b) in row.iter_mut().zip(b) {
                    *acc = acc.fma(a, b);
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
unsafe fn rows<S: Simd, const NV: usize>(m: usize, mut t: Tile) {
    // SAFETY: each call stays inside the m rows that the caller owns.
    unsafe {
        for _ in 0..m / MR {
            kernel::<S, MR, NV>(t);
            t.a = t.a.add(MR * t.lda);
            t.c = t.c.add(MR * t.ldc);
        }
        match m % MR {
            1 => kernel::<S, 1, NV>(t),
            2 => kernel::<S, 2, NV>(t),
            3 => kernel::<S, 3, NV>(t),
            4 => kernel::<S, 4, NV>(t),
            5 => kernel::<S, 5, NV>(t),
            _ => {}
        }
    }
}

/// Four vectors of lanes at a time.
#[inline(always)]
unsafe fn panels<S: Simd>(m: usize, nv: usize, mut t: Tile) {
    // SAFETY: the caller's contract.
    unsafe {
        let mut left = nv;
        while left >= 4 {
            rows::<S, 4>(m, t);
            (t.b, t.c, left) = (t.b.add(PANEL), t.c.add(PANEL), left - 4);
        }
        match left {
            1 => rows::<S, 1>(m, t),
            2 => rows::<S, 2>(m, t),
            3 => rows::<S, 3>(m, t),
            _ => {}
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn rows_avx512(m: usize, nv: usize, t: Tile) {
    // SAFETY: the caller's contract, and AVX-512F is on.
    unsafe { panels::<super::simd::x86::Avx512>(m, nv, t) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn rows_pairs(m: usize, nv: usize, t: Tile) {
    // SAFETY: the caller's contract, and AVX-512 with bf16 is on.
    unsafe { panels::<super::simd::x86::Pairs>(m, nv, t) }
}

/// 16 registers hold one vector of lanes (two ymm) at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_avx2(m: usize, nv: usize, mut t: Tile) {
    // SAFETY: the caller's contract, and AVX2 and FMA are on.
    unsafe {
        for _ in 0..nv {
            rows::<super::simd::x86::Avx2, 1>(m, t);
            t.b = t.b.add(LANES);
            t.c = t.c.add(LANES);
        }
    }
}

unsafe fn rows_portable(m: usize, nv: usize, mut t: Tile) {
    // SAFETY: the caller's contract.
    unsafe {
        for _ in 0..nv {
            rows::<Block, 1>(m, t);
            t.b = t.b.add(LANES);
            t.c = t.c.add(LANES);
        }
    }
}

/// C\[m, 16 nv\] += A\[m, k\] B\[k, 16 nv\] on slices: `a`, `b`, `c` are row-major with row strides `lda`, `ldb`, `ldc`,
/// and k counts [`Form::steps`].
#[allow(clippy::too_many_arguments)]
pub(super) fn tile(
    form: Form,
    m: usize,
    nv: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
) {
    if m == 0 || nv == 0 || k == 0 {
        return;
    }
    let lanes = nv * LANES;
    assert!(a.len() >= (m - 1) * lda + k);
    assert!(b.len() >= (k - 1) * ldb + lanes && c.len() >= (m - 1) * ldc + lanes);
    let t = Tile { k, a: a.as_ptr(), lda, b: b.as_ptr(), ldb, c: c.as_mut_ptr(), ldc };
    // SAFETY: the assertions are the kernels' contract, and isa() says what the processor has.
    unsafe {
        match (form, isa()) {
            #[cfg(target_arch = "x86_64")]
            (Form::Pairs, _) => rows_pairs(m, nv, t),
            #[cfg(target_arch = "x86_64")]
            (_, Isa::Avx512 | Isa::Avx512Bf16) => rows_avx512(m, nv, t),
            #[cfg(target_arch = "x86_64")]
            (_, Isa::Avx2) => rows_avx2(m, nv, t),
            _ => rows_portable(m, nv, t),
        }
    }
}

/// M rows of X, `ldx` apart, times 16 rows of W `[_, k]`, which are transposed in registers.
#[inline(always)]
unsafe fn in_registers<S: Simd, L: Layout, const M: usize>(
    x: *const f32,
    ldx: usize,
    w: *const L::Weight,
    k: usize,
    y: *mut f32,
    ldy: usize,
) {
    // SAFETY: the caller owns M rows of x and y, and 16 of w; 16 bytes divide a row of w.
    unsafe {
        let (w, row) = (w.cast::<u8>(), k * size_of::<L::Weight>());
        let mut acc = [S::splat(0.0); M];
        for at in (0..row).step_by(16) {
            // The next 16 rows, as far as these ones have come.
            for line in (0..16 * LANES).step_by(LINE) {
                S::prefetch(w.wrapping_add((row + at) * LANES + line));
            }
            let words = S::transposed(w.add(at), row);
            let mut x = x.add(at / 4 * L::FLOATS);
            for word in words {
                let floats = L::floats(word);
                for float in floats.into_iter().take(L::FLOATS) {
                    for (i, acc) in acc.iter_mut().enumerate() {
                        *acc = acc.fma_at(x.add(i * ldx), float);
                    }
                    x = x.add(1);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            acc.store(y.add(i * ldy));
        }
    }
}

/// y\[m, outputs\] = X W^T for m <= [`Simd::FEW`] rows of X, `ldx` apart; outputs come in whole vectors, rows of W in
/// blocks of 16 bytes.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn few<S: Simd, L: Layout>(
    m: usize,
    x: &[f32],
    ldx: usize,
    w: &[L::Weight],
    k: usize,
    y: &mut [f32],
    ldy: usize,
) {
    let (words, outputs) = (k / L::WEIGHTS, w.len() / k);
    assert!(outputs.is_multiple_of(LANES) && k.is_multiple_of(4 * L::WEIGHTS));
    assert!(x.len() >= (m - 1) * ldx + words * L::FLOATS && y.len() >= (m - 1) * ldy + outputs);
    for at in (0..outputs).step_by(LANES) {
        let (x, w, y) = (x.as_ptr(), w[at * k..].as_ptr(), y[at..].as_mut_ptr());
        // SAFETY: by the assertions.
        unsafe {
            match m {
                1 => in_registers::<S, L, 1>(x, ldx, w, k, y, ldy),
                2 => in_registers::<S, L, 2>(x, ldx, w, k, y, ldy),
                3 => in_registers::<S, L, 3>(x, ldx, w, k, y, ldy),
                4 => in_registers::<S, L, 4>(x, ldx, w, k, y, ldy),
                5 => in_registers::<S, L, 5>(x, ldx, w, k, y, ldy),
                6 => in_registers::<S, L, 6>(x, ldx, w, k, y, ldy),
                7 if S::FEW == FEW => in_registers::<S, L, 7>(x, ldx, w, k, y, ldy),
                8 if S::FEW == FEW => in_registers::<S, L, 8>(x, ldx, w, k, y, ldy),
                9 if S::FEW == FEW => in_registers::<S, L, 9>(x, ldx, w, k, y, ldy),
                FEW if S::FEW == FEW => in_registers::<S, L, FEW>(x, ldx, w, k, y, ldy),
                _ => unreachable!("few rows"),
            }
        }
    }
}

multiversion! {
    fn products_of_few<L: Layout>(
        m: usize,
        x: &[f32],
        ldx: usize,
        w: &[L::Weight],
        k: usize,
        y: &mut [f32],
        ldy: usize,
    ) {
        few::<S, L>(m, x, ldx, w, k, y, ldy);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn products_of_few_pairs(m: usize, x: &[f32], ldx: usize, w: &[bf16], k: usize, y: &mut [f32], ldy: usize) {
    few::<super::simd::x86::Pairs, InPairs>(m, x, ldx, w, k, y, ldy);
}

/// Rows of W per register tile of [`in_lanes`]: 8 x 3 accumulators + 3 vectors of X + 1 broadcast fit AVX-512's 32 registers.
const OR: usize = 8;
/// Words of k per pass of [`in_lanes`]: 192 rows of X take 384 KiB of a 1 MiB L2.
const K_WORDS: usize = 512;

/// C\[O, 16 NV\] += W X^T for O rows of W, `row` bytes apart, and NV vectors of rows of X, `panel` floats apart, over `words` words
/// of W; accumulators in registers.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn kernel_in_lanes<S: Simd, L: Layout, const O: usize, const NV: usize>(
    words: usize,
    w: *const u8,
    row: usize,
    x: *const f32,
    panel: usize,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: the caller owns `words` words of O rows of W, as many of NV panels of X, and O rows of c, 16 NV lanes wide.
    unsafe {
        let mut acc: [[S; NV]; O] =
            std::array::from_fn(|o| std::array::from_fn(|v| S::load(c.add(o * ldc + v * LANES))));
        for k in 0..words {
            if k.is_multiple_of(LINE / 4) {
                // The next O rows, as far as these ones have come.
                for o in 0..O {
                    S::prefetch(w.wrapping_add((O + o) * row + 4 * k));
                }
            }
            let x = x.add(k * L::FLOATS * LANES);
            let x: [[S; NV]; 2] = std::array::from_fn(|f| {
                std::array::from_fn(|v| S::load(x.add(v * panel + f.min(L::FLOATS - 1) * LANES)))
            });
            for (o, acc) in acc.iter_mut().enumerate() {
                let word = S::splat(w.add(o * row + 4 * k).cast::<f32>().read_unaligned());
                let floats = L::floats(word);
                for (float, x) in floats.into_iter().zip(x).take(L::FLOATS) {
                    for (acc, x) in acc.iter_mut().zip(x) {
                        *acc = acc.fma(float, x);
                    }
                }
            }
        }
        for (o, row) in acc.into_iter().enumerate() {
            for (v, acc) in row.into_iter().enumerate() {
                acc.store(c.add(o * ldc + v * LANES));
            }
        }
    }
}

/// c\[outputs, 16 nv\] = W X^T for the rows of w, and `nv` panels of X, each of [`Rows::PANEL`] rows.
#[inline(always)]
fn in_lanes<S: Simd, L: Layout>(w: &[L::Weight], k: usize, x: &[f32], nv: usize, c: &mut [f32]) {
    let (words, outputs, ldc) = (k / L::WEIGHTS, w.len() / k, nv * LANES);
    let (row, panel) = (k * size_of::<L::Weight>(), words * L::FLOATS * LANES);
    assert!(k.is_multiple_of(L::WEIGHTS) && x.len() >= nv * panel && c.len() >= outputs * ldc);
    c[..outputs * ldc].fill(0.0);
    for k0 in (0..words).step_by(K_WORDS) {
        let words = K_WORDS.min(words - k0);
        let mut o = 0;
        while o < outputs {
            let rows = if outputs - o < OR { 1 } else { OR };
            let mut v = 0;
            while v < nv {
                let vectors = (nv - v).min(3);
                // SAFETY: by the assertion, of these words of `rows` rows of w and of `vectors` panels of x.
                unsafe {
                    let w = w.as_ptr().add(o * k).cast::<u8>().add(4 * k0);
                    let x = x.as_ptr().add(v * panel + k0 * L::FLOATS * LANES);
                    let c = c.as_mut_ptr().add(o * ldc + v * LANES);
                    match (rows, vectors) {
                        (OR, 1) => kernel_in_lanes::<S, L, OR, 1>(words, w, row, x, panel, c, ldc),
                        (OR, 2) => kernel_in_lanes::<S, L, OR, 2>(words, w, row, x, panel, c, ldc),
                        (OR, _) => kernel_in_lanes::<S, L, OR, 3>(words, w, row, x, panel, c, ldc),
                        (_, 1) => kernel_in_lanes::<S, L, 1, 1>(words, w, row, x, panel, c, ldc),
                        (_, 2) => kernel_in_lanes::<S, L, 1, 2>(words, w, row, x, panel, c, ldc),
                        _ => kernel_in_lanes::<S, L, 1, 3>(words, w, row, x, panel, c, ldc),
                    }
                }
                v += vectors;
            }
            o += rows;
        }
    }
}

multiversion! {
    fn products_in_lanes<L: Layout>(w: &[L::Weight], k: usize, x: &[f32], nv: usize, c: &mut [f32]) {
        in_lanes::<S, L>(w, k, x, nv, c);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
fn products_in_lanes_of_pairs(w: &[bf16], k: usize, x: &[f32], nv: usize, c: &mut [f32]) {
    in_lanes::<super::simd::x86::Pairs, InPairs>(w, k, x, nv, c);
}

/// y\[m, outputs\] = X W\[outputs\]^T for m rows of X from row `first` on; y's rows are `ldy` apart and have room for
/// whole vectors, whose lanes beyond the outputs are left as they come. `packed` is scratch.
#[allow(clippy::too_many_arguments)]
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
    let weights = outputs.start * k..outputs.end * k;
    if m <= few_rows() && lanes == outputs.len() && k.is_multiple_of(16 / w.dtype().bytes()) {
        return match (w.data(), form) {
            (Data::F32(w), _) => products_of_few::<Floats>(m, rows, ldx, &w[weights], k, y, ldy),
            (Data::Bf16(w), Form::F32) => products_of_few::<InOrder>(m, rows, ldx, &w[weights], k, y, ldy),
            (Data::Bf16(w), Form::Widened) => {
                products_of_few::<OddFirst>(m, rows, ldx, &w[weights], k, y, ldy)
            }
            // SAFETY: the form is chosen where the machine has the instruction.
            #[cfg(target_arch = "x86_64")]
            (Data::Bf16(w), Form::Pairs) => unsafe {
                products_of_few_pairs(m, rows, ldx, &w[weights], k, y, ldy)
            },
            #[cfg(not(target_arch = "x86_64"))]
            (Data::Bf16(_), Form::Pairs) => unreachable!("pairs are x86's"),
        };
    }
    if let Some(x) = x.panels_from(first).filter(|_| (k * w.dtype().bytes()).is_multiple_of(4)) {
        let nv = m.div_ceil(LANES);
        packed.resize(packed.len().max(outputs.len() * nv * LANES), 0.0);
        match (w.data(), form) {
            (Data::F32(w), _) => products_in_lanes::<Floats>(&w[weights], k, x, nv, packed),
            (Data::Bf16(w), Form::F32) => products_in_lanes::<InOrder>(&w[weights], k, x, nv, packed),
            (Data::Bf16(w), Form::Widened) => products_in_lanes::<OddFirst>(&w[weights], k, x, nv, packed),
            // SAFETY: the form is chosen where the machine has the instruction.
            #[cfg(target_arch = "x86_64")]
            (Data::Bf16(w), Form::Pairs) => unsafe {
                products_in_lanes_of_pairs(&w[weights], k, x, nv, packed)
            },
            #[cfg(not(target_arch = "x86_64"))]
            (Data::Bf16(_), Form::Pairs) => unreachable!("pairs are x86's"),
        }
        let c = &packed[..outputs.len() * nv * LANES];
        return transposed::<Floats>(c, nv * LANES, &(0..m), y, ldy);
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
        }
        for i in (0..m).step_by(ROWS) {
            let (m, x, y) = (ROWS.min(m - i), &rows[i * ldx + form.steps(k0)..], &mut y[i * ldy..]);
            tile(form, m, lanes / LANES, form.steps(ks.len()), x, ldx, packed, lanes, y, ldy);
        }
    }
}

/// A matrix cut into panels of 64 lanes, each `[steps, 64]`, lanes beyond the matrix zero.
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
        let mut data = vec![0.0; n.div_ceil(PANEL) * PANEL * steps];
        data.par_chunks_mut((PANEL * steps).max(1)).enumerate().for_each(|(p, out)| {
            let lanes = p * PANEL..n.min((p + 1) * PANEL);
            for (two, out) in x.chunks(2 * n).zip(out.chunks_mut(form.steps(2) * PANEL)) {
                let (even, odd) = two.split_at(n);
                let odd = if odd.is_empty() { odd } else { &odd[lanes.clone()] };
                put_rows(form, &even[lanes.clone()], odd, out, PANEL);
            }
        });
        Self { data, form, steps, n }
    }
}

/// A raw pointer that tasks write through; each task owns its own elements.
#[derive(Clone, Copy)]
pub(super) struct Out(*mut f32);
// SAFETY: tasks that share an `Out` write disjoint elements; each use says which.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    pub(super) fn new(x: &mut [f32]) -> Self {
        Self(x.as_mut_ptr())
    }

    fn at(self, i: usize) -> *mut f32 {
        // Method, not field access: closures then capture the wrapper, which is Sync.
        self.0.wrapping_add(i)
    }

    /// Elements `i..i + len`.
    ///
    /// # Safety
    /// They are there, and nobody else uses them.
    pub(super) unsafe fn slice<'a>(self, i: usize, len: usize) -> &'a mut [f32] {
        // SAFETY: the caller's word.
        unsafe { std::slice::from_raw_parts_mut(self.at(i), len) }
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
    let part = |i: usize, y: usize| {
        let pile = (i * N + y) * out;
        Part { rows: first[i]..first[i + 1], w: 0, outputs: pile..pile + out, y }
    };
    let parts = (0..groups).flat_map(|i| (0..N).map(move |y| (i, y))).map(|(i, y)| part(i, y));
    forward_parts(x, &[w], [out; N], parts, compute)
}

/// The parts of Y `[T, out]`.
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
    let mut y = out.map(|out| zeroed(t * out));
    if x.cols > 0 {
        let x = Rows::for_products(Form::with_weights(compute, w), x.as_f32(), x.cols);
        let to = y.each_mut().map(|y| Out::new(y));
        // Panels of all parts side by side, because each wait for the other threads costs as much as a small panel.
        let mut tasks = Vec::new();
        for part in parts {
            for p in (0..part.outputs.len()).step_by(PANEL) {
                let columns = p..part.outputs.len().min(p + PANEL);
                for cut in part.rows.clone().step_by(T_CUT) {
                    let rows = cut..part.rows.end.min(cut + T_CUT);
                    tasks.push((rows, part.w, part.outputs.start, columns.clone(), part.y));
                }
            }
        }
        tasks.into_par_iter().for_each_init(
            || (Vec::new(), vec![0.0; T_CUT.min(t) * PANEL]),
            |(packed, c), (rows, i, first, columns, y)| {
                let outputs = first + columns.start..first + columns.end;
                products(rows.len(), &x, rows.start, w[i], outputs, packed, c, PANEL);
                for (row, c) in rows.zip(c.chunks_exact(PANEL)) {
                    // SAFETY: this task alone owns these rows and columns of this Y.
                    let y = unsafe { to[y].slice(row * out[y] + columns.start, columns.len()) };
                    y.copy_from_slice(&c[..columns.len()]);
                }
            },
        );
    }
    let mut y = y.into_iter();
    out.map(|out| Tensor::f32(t, out, y.next().unwrap_or_default()))
}

/// c\[m, cols\] += a\[m, k\] b\[k, cols..\] where c is a block of a larger matrix (row stride `ldc`), k counts steps of at
/// most KC terms, and `cols` need not be a multiple of the lanes.
#[allow(clippy::too_many_arguments)]
fn add_product(
    form: Form,
    m: usize,
    cols: usize,
    k: usize,
    a: &[f32],
    lda: usize,
    b: &[f32],
    c: Out,
    at: usize,
    ldc: usize,
) {
    for i0 in (0..m).step_by(ROWS) {
        let rows = ROWS.min(m - i0);
        let mut chains = [0.0; ROWS * PANEL];
        tile(form, rows, cols.div_ceil(LANES), k, &a[i0 * lda..], lda, b, PANEL, &mut chains, PANEL);
        for (i, chains) in chains.chunks_exact(PANEL).take(rows).enumerate() {
            for (j, chain) in chains.iter().take(cols).enumerate() {
                // SAFETY: the caller's task alone owns rows i of c at these columns.
                unsafe { *c.at(at + (i0 + i) * ldc + j) += chain };
            }
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
            let cuts = (first[i]..first[i + 1]).step_by(T_CUT);
            tasks
                .extend(cuts.map(|cut| (lanes..n.min(lanes + PANEL), i, cut..first[i + 1].min(cut + T_CUT))));
        }
    }
    tasks.into_par_iter().for_each_init(
        || vec![0.0; KC * PANEL],
        |b, (lanes, i, rows)| {
            let pile = (i * of + at) * k;
            for k0 in (0..k).step_by(KC) {
                let terms = pile + k0..pile + k.min(k0 + KC);
                let steps = form.steps(terms.len());
                pack_weights(form, w, terms, lanes.clone(), &mut b[..steps * PANEL], PANEL);
                // This task alone owns these rows and columns of dX.
                let a = &dy.from(rows.start)[form.steps(k0)..];
                let at = rows.start * n + lanes.start;
                add_product(form, rows.len(), lanes.len(), steps, a, dy.stride, b, out, at, n);
            }
        },
    );
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
    dw.chunks(ROWS * n).into_par_iter().enumerate().for_each_init(
        || (vec![0.0; ROWS * k], vec![0.0; ROWS * form.steps(k)]),
        |(columns, a), (block, mut dw)| {
            let rows = dw.len() / n;
            for (t, row) in dy.chunks_exact(m).enumerate() {
                for (i, v) in row[block * ROWS..][..rows].iter().enumerate() {
                    columns[i * k + t] = *v;
                }
            }
            let lda = form.steps(k);
            for (column, a) in columns.chunks_exact(k).zip(a.chunks_exact_mut(lda)).take(rows) {
                form::put(form, column, a);
            }
            dw.add(|dw| accumulate(&panels, rows, a, lda, dw));
        },
    );
}

/// c\[m, n\] += a\[m, k\] times all panels, c row-major; `a` in the panels' form.
pub(super) fn accumulate(panels: &Panels, m: usize, a: &[f32], lda: usize, c: &mut [f32]) {
    let Panels { form, steps, n, .. } = *panels;
    assert!(c.len() >= m * n && (steps == 0 || lda >= steps));
    let out = Out::new(c);
    let pass = form.steps(KC);
    for p in 0..n.div_ceil(PANEL) {
        let lanes = PANEL.min(n - p * PANEL);
        let panel = &panels.data[p * PANEL * steps..][..PANEL * steps];
        for k0 in (0..steps).step_by(pass) {
            let (a, b) = (&a[k0..], &panel[k0 * PANEL..]);
            add_product(form, m, lanes, pass.min(steps - k0), a, lda, b, out, p * PANEL, n);
        }
    }
}
