//! Y = X W^T and its two gradients, on one micro-kernel.
//!
//! The kernel computes a tile C\[M, lanes\] += A\[M, k\] B\[k, lanes\]: rows of A are broadcast, B is read as vectors of
//! 16 lanes. Every element of C is one chain of fused multiply-adds in the order of k, continued from what C
//! holds, so its bits depend neither on the tile it falls in, nor on threads, batch or instruction set.
//!
//! | op | A (broadcast) | B (lanes) | k |
//! |---|---|---|---|
//! | forward Y | rows of X, as stored | W, transposed a block at a time | in |
//! | dX += dY W | rows of dY, as stored | W, packed a block at a time | out |
//! | dW += dY^T X | columns of dY, transposed a block at a time | X, packed once | tokens |
//!
//! Weights stream through once, widened to f32 in cache: lanes are outputs, so that one row of X costs one row's work.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::simd::{Block, Isa, LANES, Simd, f32_from_bf16, isa, multiversion};
use super::{Data, Tensor, zeroed};

/// Lanes of a packed panel: four vectors.
pub(super) const PANEL: usize = 4 * LANES;
/// Rows of A per register tile: 6 x 4 accumulators + 4 vectors of B + 1 broadcast fit AVX-512's 32 registers.
const MR: usize = 6;
/// Rows of A per block: the block and one panel of B stay in a 1 MiB L2.
const ROWS: usize = 48;
/// k per pass of the gradients: a panel of B is KC * PANEL * 4 = 128 KiB.
const KC: usize = 512;
/// k per pass over transposed weights: 16 lanes of them take 8 KiB of the first cache.
const TRANSPOSED: usize = 128;
/// bf16 in a line of the cache.
const LINE: usize = 32;
/// Rows of A that share a packing of W: beyond, batches are cut so that there are tasks enough.
const T_CUT: usize = 4 * ROWS;

/// Operands of one tile product. `a`: M rows of k floats, `lda` apart. `b`: k rows of vectors, `ldb` apart. `c`: M
/// rows, `ldc` apart.
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

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn rows_avx512(m: usize, nv: usize, mut t: Tile) {
    use super::simd::x86::Avx512;
    // SAFETY: the caller's contract, and AVX-512F is on.
    unsafe {
        let mut left = nv;
        while left >= 4 {
            rows::<Avx512, 4>(m, t);
            (t.b, t.c, left) = (t.b.add(PANEL), t.c.add(PANEL), left - 4);
        }
        match left {
            1 => rows::<Avx512, 1>(m, t),
            2 => rows::<Avx512, 2>(m, t),
            3 => rows::<Avx512, 3>(m, t),
            _ => {}
        }
    }
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

/// C\[m, 16 nv\] += A\[m, k\] B\[k, 16 nv\] on slices: `a`, `b`, `c` are row-major with row strides `lda`, `ldb`, `ldc`.
#[allow(clippy::too_many_arguments)]
pub(super) fn tile(
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
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => rows_avx512(m, nv, t),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => rows_avx2(m, nv, t),
            _ => rows_portable(m, nv, t),
        }
    }
}

/// Widens `rows` of `w` into `out`, row stride `ld`; the columns between are left as they are.
pub(super) fn widen_rows(w: &Tensor, rows: std::ops::Range<usize>, out: &mut [f32], ld: usize) {
    let n = w.cols;
    for (i, r) in rows.enumerate() {
        widen(w, r * n, &mut out[i * ld..i * ld + n]);
    }
}

/// Widens the elements of `w` from flat index `at` into `out`.
fn widen(w: &Tensor, at: usize, out: &mut [f32]) {
    match &w.data {
        Data::F32(d) => out.copy_from_slice(&d[at..at + out.len()]),
        Data::Bf16(d) => {
            for (o, x) in out.iter_mut().zip(&d[at..]) {
                *o = f32::from_bits(u32::from(bf16::to_bits(*x)) << 16);
            }
        }
    }
}

/// How weights are stored.
trait Weight: Copy {
    /// Weights in 16 bytes.
    const STEP: usize = 16 / size_of::<Self>();

    fn widened(self) -> f32;

    /// Writes the weights that 4 words of 16 rows hold, widened, to [`Self::STEP`] rows of 16 lanes.
    ///
    /// # Safety
    /// The caller owns these rows, `ld` floats apart, and `S` is on.
    unsafe fn put<S: Simd>(words: [S; 4], to: *mut f32, ld: usize);
}

impl Weight for f32 {
    #[inline(always)]
    fn widened(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(words: [S; 4], to: *mut f32, ld: usize) {
        for (j, word) in words.into_iter().enumerate() {
            // SAFETY: the caller's word.
            unsafe { word.store(to.add(j * ld)) };
        }
    }
}

impl Weight for bf16 {
    #[inline(always)]
    fn widened(self) -> f32 {
        f32_from_bf16(self)
    }

    #[inline(always)]
    unsafe fn put<S: Simd>(words: [S; 4], to: *mut f32, ld: usize) {
        for (j, pair) in words.into_iter().enumerate() {
            // SAFETY: the caller's word.
            unsafe {
                pair.low().store(to.add(2 * j * ld));
                pair.high().store(to.add((2 * j + 1) * ld));
            }
        }
    }
}

/// The transposition of weights `[rows, cols]`: out\[k * ld + l\] = w\[l, ks.start + k\], widened.
#[inline(always)]
fn transpose<S: Simd, W: Weight>(w: &[W], cols: usize, ks: &Range<usize>, out: &mut [f32], ld: usize) {
    let line = 4 * W::STEP;
    let (rows, whole) = (w.len() / cols, ks.len() / W::STEP * W::STEP);
    assert!(ks.end <= cols && rows <= ld && out.len() >= ks.len() * ld);
    let blocks = rows / LANES * LANES;
    for l in (0..blocks).step_by(LANES) {
        for k in (0..whole).step_by(W::STEP) {
            let from = w[l * cols + ks.start + k..].as_ptr();
            if k.is_multiple_of(line) {
                for r in 0..LANES {
                    S::prefetch(from.wrapping_add(r * cols + 2 * line).cast());
                }
            }
            // SAFETY: 16 rows of so many weights, and so many rows of 16 lanes, by the assertion; `multiversion!` found `S`.
            unsafe {
                let words = S::transposed(from.cast(), cols * size_of::<W>());
                W::put(words, out.as_mut_ptr().add(k * ld + l), ld);
            }
        }
    }
    for (l, w) in w.chunks_exact(cols).enumerate() {
        let done = if l < blocks { whole } else { 0 };
        for (k, w) in w[ks.clone()].iter().enumerate().skip(done) {
            out[k * ld + l] = w.widened();
        }
    }
}

multiversion! {
    fn transpose_f32(w: &[f32], cols: usize, ks: &Range<usize>, out: &mut [f32], ld: usize) {
        transpose::<S, f32>(w, cols, ks, out, ld);
    }
}

multiversion! {
    fn transpose_bf16(w: &[bf16], cols: usize, ks: &Range<usize>, out: &mut [f32], ld: usize) {
        transpose::<S, bf16>(w, cols, ks, out, ld);
    }
}

/// M rows of X times 16 rows of W `[_, k]`, which are transposed in registers.
#[inline(always)]
unsafe fn in_registers<S: Simd, const M: usize>(
    x: *const f32,
    w: *const bf16,
    k: usize,
    y: *mut f32,
    ldy: usize,
) {
    // SAFETY: the caller owns M rows of x and y, and 16 of w; k is a multiple of 8.
    unsafe {
        let mut acc = [S::splat(0.0); M];
        for k0 in (0..k).step_by(8) {
            // The next 16 rows, as far as these ones have come.
            for line in 0..8 * LANES / LINE {
                S::prefetch(w.wrapping_add((k + k0) * LANES + line * LINE).cast());
            }
            let pairs = S::transposed(w.add(k0).cast(), k * size_of::<bf16>());
            for (j, pair) in pairs.into_iter().enumerate() {
                let (low, high) = (pair.low(), pair.high());
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x = x.add(i * k + k0 + 2 * j);
                    *acc = acc.fma(S::splat(*x), low);
                    *acc = acc.fma(S::splat(*x.add(1)), high);
                }
            }
        }
        for (i, acc) in acc.into_iter().enumerate() {
            acc.store(y.add(i * ldy));
        }
    }
}

/// Rows of X that are multiplied with weights in registers: then accumulators leave room for a block of W.
const FEW: usize = 6;

multiversion! {
    /// y\[m, outputs\] = X W^T for at most [`FEW`] rows of X, outputs a multiple of 16 and k of 8.
    fn products_of_few(x: &[f32], w: &[bf16], k: usize, y: &mut [f32], ldy: usize) {
        let (m, outputs) = (x.len() / k, w.len() / k);
        assert!(matches!(m, 1..=FEW) && outputs.is_multiple_of(LANES) && k.is_multiple_of(8));
        assert!(y.len() >= (m - 1) * ldy + outputs);
        for at in (0..outputs).step_by(LANES) {
            let (x, w, y) = (x.as_ptr(), w[at * k..].as_ptr(), y[at..].as_mut_ptr());
            // SAFETY: by the assertions.
            unsafe {
                match m {
                    1 => in_registers::<S, 1>(x, w, k, y, ldy),
                    2 => in_registers::<S, 2>(x, w, k, y, ldy),
                    3 => in_registers::<S, 3>(x, w, k, y, ldy),
                    4 => in_registers::<S, 4>(x, w, k, y, ldy),
                    5 => in_registers::<S, 5>(x, w, k, y, ldy),
                    _ => in_registers::<S, FEW>(x, w, k, y, ldy),
                }
            }
        }
    }
}

/// y\[rows, outputs\] = X W\[outputs\]^T for the rows of x `[_, k]`; y's rows are `ldy` apart and have room for whole
/// vectors, whose lanes beyond the outputs are left as they come. `packed` is scratch.
pub(super) fn products(
    x: &[f32],
    w: &Tensor,
    outputs: Range<usize>,
    packed: &mut Vec<f32>,
    y: &mut [f32],
    ldy: usize,
) {
    let (k, lanes) = (w.cols, outputs.len().next_multiple_of(LANES));
    let (m, weights) = (x.len() / k, outputs.start * k..outputs.end * k);
    if let Data::Bf16(w) = &w.data
        && m <= FEW
        && lanes == outputs.len()
        && k.is_multiple_of(8)
    {
        return products_of_few(x, &w[weights], k, y, ldy);
    }
    packed.resize(packed.len().max(TRANSPOSED * lanes), 0.0);
    for y in y.chunks_mut(ldy).take(m) {
        y[..lanes].fill(0.0);
    }
    for k0 in (0..k).step_by(TRANSPOSED) {
        let ks = k0..k.min(k0 + TRANSPOSED);
        match &w.data {
            Data::F32(w) => transpose_f32(&w[weights.clone()], k, &ks, packed, lanes),
            Data::Bf16(w) => transpose_bf16(&w[weights.clone()], k, &ks, packed, lanes),
        }
        for i in (0..m).step_by(ROWS) {
            let (rows, x, y) = (ROWS.min(m - i), &x[i * k + k0..], &mut y[i * ldy..]);
            tile(rows, lanes / LANES, ks.len(), x, k, packed, lanes, y, ldy);
        }
    }
}

/// A matrix cut into panels of 64 lanes, each `[k, 64]`, lanes beyond the matrix zero.
pub(super) struct Panels {
    data: Vec<f32>,
    /// Length of the reduction.
    k: usize,
    /// Number of lanes.
    n: usize,
}

impl Panels {
    /// Lanes are columns of x `[k, n]`.
    pub(super) fn from_cols(x: &[f32], n: usize) -> Self {
        let k = x.len().checked_div(n).unwrap_or(0);
        let mut data = vec![0.0; n.div_ceil(PANEL) * PANEL * k];
        data.par_chunks_mut((PANEL * k).max(1)).enumerate().for_each(|(p, out)| {
            let lanes = PANEL.min(n - p * PANEL);
            for (row, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(PANEL)) {
                out[..lanes].copy_from_slice(&row[p * PANEL..p * PANEL + lanes]);
            }
        });
        Self { data, k, n }
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

/// Y = X W^T: X `[T, in]`, W `[out, in]`, Y `[T, out]`.
pub fn forward(x: &Tensor, w: &Tensor) -> Tensor {
    assert_eq!(x.cols, w.cols, "matmul: X is [T, {}], W is [out, {}]", x.cols, w.cols);
    let (t, k, n) = (x.rows, x.cols, w.rows);
    let mut y = zeroed(t * n);
    if k == 0 {
        return Tensor::f32(t, n, y);
    }
    let x = x.as_f32();
    let out = Out::new(&mut y);
    let cuts = t.div_ceil(T_CUT);
    (0..n.div_ceil(PANEL) * cuts).into_par_iter().for_each_init(
        || (Vec::new(), vec![0.0; T_CUT.min(t) * PANEL]),
        |(packed, c), task| {
            let (p, cut) = (task / cuts, task % cuts);
            let rows = cut * T_CUT..t.min((cut + 1) * T_CUT);
            let outputs = p * PANEL..n.min((p + 1) * PANEL);
            products(&x[rows.start * k..rows.end * k], w, outputs.clone(), packed, c, PANEL);
            for (row, c) in rows.zip(c.chunks_exact(PANEL)) {
                // SAFETY: this task alone owns these rows and columns of Y.
                let y = unsafe { out.slice(row * n + outputs.start, outputs.len()) };
                y.copy_from_slice(&c[..outputs.len()]);
            }
        },
    );
    Tensor::f32(t, n, y)
}

/// c\[m, cols\] += a\[m, k\] b\[k, cols..\] where c is a block of a larger matrix (row stride `ldc`) and `cols` need not
/// be a multiple of the lanes: the ragged last panel goes through a copy.
#[allow(clippy::too_many_arguments)]
fn tile_into(
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
        let mut buf = [0.0; ROWS * PANEL];
        for i in 0..rows {
            for j in 0..cols {
                // SAFETY: the caller's task alone owns rows i of c at these columns.
                buf[i * PANEL + j] = unsafe { *c.at(at + (i0 + i) * ldc + j) };
            }
        }
        tile(rows, cols.div_ceil(LANES), k, &a[i0 * lda..], lda, b, PANEL, &mut buf, PANEL);
        for i in 0..rows {
            for j in 0..cols {
                // SAFETY: as above.
                unsafe { *c.at(at + (i0 + i) * ldc + j) = buf[i * PANEL + j] };
            }
        }
    }
}

/// dX += dY W: dY `[T, out]`, W `[out, in]`, dX `[T, in]`.
pub fn backward_input(dy: &Tensor, w: &Tensor, dx: &mut Tensor) {
    assert_eq!((dy.cols, dy.rows, w.cols), (w.rows, dx.rows, dx.cols), "matmul: dX += dY W");
    let (t, k, n) = (dy.rows, w.rows, w.cols);
    let a = dy.as_f32();
    let out = Out::new(dx.as_f32_mut());
    let cuts = t.div_ceil(T_CUT);
    (0..n.div_ceil(PANEL) * cuts).into_par_iter().for_each_init(
        || vec![0.0; KC * PANEL],
        |b, task| {
            let (p, cut) = (task / cuts, task % cuts);
            let rows = cut * T_CUT..t.min((cut + 1) * T_CUT);
            let lanes = PANEL.min(n - p * PANEL);
            for k0 in (0..k).step_by(KC) {
                let kc = KC.min(k - k0);
                for (i, row) in b.chunks_exact_mut(PANEL).take(kc).enumerate() {
                    widen(w, (k0 + i) * n + p * PANEL, &mut row[..lanes]);
                    row[lanes..].fill(0.0);
                }
                // This task alone owns these rows and columns of dX.
                let a = &a[rows.start * k + k0..];
                tile_into(rows.len(), lanes, kc, a, k, b, out, rows.start * n + p * PANEL, n);
            }
        },
    );
}

/// dW += dY^T X: dY `[T, out]`, X `[T, in]`, dW `[out, in]`.
pub fn backward_weight(dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
    assert_eq!((dy.rows, dy.cols, x.cols), (x.rows, dw.rows, dw.cols), "matmul: dW += dY^T X");
    let (k, m, n) = (dy.rows, dy.cols, x.cols);
    if k == 0 {
        return;
    }
    let panels = Panels::from_cols(x.as_f32(), n);
    let dy = dy.as_f32();
    dw.as_f32_mut().par_chunks_mut(ROWS * n).enumerate().for_each_init(
        || vec![0.0; ROWS * k],
        |a, (block, dw)| {
            let rows = dw.len() / n;
            for (t, row) in dy.chunks_exact(m).enumerate() {
                for (i, v) in row[block * ROWS..][..rows].iter().enumerate() {
                    a[i * k + t] = *v;
                }
            }
            accumulate(&panels, rows, a, k, dw);
        },
    );
}

/// c\[m, n\] += a\[m, k\] times all panels, c row-major.
pub(super) fn accumulate(panels: &Panels, m: usize, a: &[f32], lda: usize, c: &mut [f32]) {
    let n = panels.n;
    assert!(c.len() >= m * n);
    let out = Out::new(c);
    for p in 0..n.div_ceil(PANEL) {
        let lanes = PANEL.min(n - p * PANEL);
        let panel = &panels.data[p * PANEL * panels.k..][..PANEL * panels.k];
        for k0 in (0..panels.k).step_by(KC) {
            let kc = KC.min(panels.k - k0);
            tile_into(m, lanes, kc, &a[k0..], lda, &panel[k0 * PANEL..], out, p * PANEL, n);
        }
    }
}
