//! Y = X W^T and its two gradients, on one micro-kernel.
//!
//! The kernel computes a tile C\[M, lanes\] += A\[M, k\] B\[k, lanes\]: rows of A are broadcast, B is read as vectors of
//! 16 lanes. Every element of C is one chain of fused multiply-adds in the order of k, continued from what C
//! holds, so its bits depend neither on the tile it falls in, nor on threads, batch or instruction set.
//!
//! | op | A (broadcast) | B (lanes) | k |
//! |---|---|---|---|
//! | forward Y | rows of W, as stored | X transposed, packed once | in |
//! | dX += dY W | rows of dY, as stored | W, packed a block at a time | out |
//! | dW += dY^T X | columns of dY, transposed a block at a time | X, packed once | tokens |
//!
//! The large operand is thereby never transposed: weights stream through once, widened to f32 in cache.

use half::bf16;
use rayon::prelude::*;

use super::simd::{Block, Isa, LANES, Simd, isa};
use super::{Data, Tensor};

/// Lanes of a packed panel: four vectors.
pub(super) const PANEL: usize = 4 * LANES;
/// Rows of A per register tile: 6 x 4 accumulators + 4 vectors of B + 1 broadcast fit AVX-512's 32 registers.
const MR: usize = 6;
/// Rows of A per block: the block and one panel of B stay in a 1 MiB L2.
const ROWS: usize = 48;
/// k per pass: a panel of B is KC * PANEL * 4 = 128 KiB.
const KC: usize = 512;

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
unsafe fn rows_avx512(m: usize, nv: usize, t: Tile) {
    use super::simd::x86::Avx512;
    // SAFETY: the caller's contract, and AVX-512F is on.
    unsafe {
        match nv {
            1 => rows::<Avx512, 1>(m, t),
            2 => rows::<Avx512, 2>(m, t),
            3 => rows::<Avx512, 3>(m, t),
            _ => rows::<Avx512, 4>(m, t),
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
    assert!(nv <= 4 && a.len() >= (m - 1) * lda + k);
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

/// Lanes of panel `p` out of `n`, in vectors: 4, or what the last panel needs.
fn vectors(p: usize, n: usize) -> usize {
    (n - p * PANEL).min(PANEL).div_ceil(LANES)
}

/// A matrix cut into panels of 64 lanes, each `[k, 64]`, lanes beyond the matrix zero.
pub(super) struct Panels {
    data: Vec<f32>,
    /// Length of the reduction.
    pub(super) k: usize,
    /// Number of lanes.
    pub(super) n: usize,
}

impl Panels {
    /// Lanes are rows of x `[n, k]`: x transposed.
    pub(super) fn from_rows(x: &[f32], k: usize) -> Self {
        let n = x.len().checked_div(k).unwrap_or(0);
        let mut data = vec![0.0; n.div_ceil(PANEL) * PANEL * k];
        data.par_chunks_mut((PANEL * k).max(1)).enumerate().for_each(|(p, out)| {
            for lane in 0..PANEL.min(n - p * PANEL) {
                let row = &x[(p * PANEL + lane) * k..][..k];
                for (o, v) in out[lane..].iter_mut().step_by(PANEL).zip(row) {
                    *o = *v;
                }
            }
        });
        Self { data, k, n }
    }

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

    /// Number of panels.
    pub(super) fn count(&self) -> usize {
        self.n.div_ceil(PANEL)
    }

    /// Lanes of panel `p` that exist.
    pub(super) fn lanes(&self, p: usize) -> usize {
        PANEL.min(self.n - p * PANEL)
    }

    /// c\[m, 64\] += a\[m, k\] * panel p, k in blocks that keep the panel in cache.
    pub(super) fn multiply(&self, p: usize, m: usize, a: &[f32], lda: usize, c: &mut [f32], ldc: usize) {
        let panel = &self.data[p * PANEL * self.k..][..PANEL * self.k];
        for k0 in (0..self.k).step_by(KC) {
            let k = KC.min(self.k - k0);
            tile(m, vectors(p, self.n), k, &a[k0..], lda, &panel[k0 * PANEL..], PANEL, c, ldc);
        }
    }
}

/// A raw pointer that tasks write through; each task owns its own elements.
#[derive(Clone, Copy)]
struct Out(*mut f32);
// SAFETY: tasks that share an `Out` write disjoint elements; each use says which.
unsafe impl Send for Out {}
// SAFETY: as above.
unsafe impl Sync for Out {}

impl Out {
    fn at(self, i: usize) -> *mut f32 {
        // Method, not field access: closures then capture the wrapper, which is Sync.
        self.0.wrapping_add(i)
    }
}

/// Y = X W^T: X `[T, in]`, W `[out, in]`, Y `[T, out]`.
pub fn forward(x: &Tensor, w: &Tensor) -> Tensor {
    assert_eq!(x.cols, w.cols, "matmul: X is [T, {}], W is [out, {}]", x.cols, w.cols);
    let (t, k, n) = (x.rows, x.cols, w.rows);
    let panels = Panels::from_rows(x.as_f32(), k);
    let mut y = vec![0.0; t * n];
    let out = Out(y.as_mut_ptr());
    // Up to four panels share one widening of a block of W; more panels make more tasks.
    let groups = panels.count().div_ceil(4);
    (0..n.div_ceil(ROWS) * groups).into_par_iter().for_each_init(
        || (vec![0.0; ROWS * k], vec![0.0; ROWS * PANEL]),
        |(a, c), task| {
            let (block, group) = (task / groups, task % groups);
            let rows = block * ROWS..n.min((block + 1) * ROWS);
            let m = rows.len();
            let a: &[f32] = match &w.data {
                Data::F32(d) => &d[rows.start * k..rows.end * k],
                Data::Bf16(_) => {
                    widen_rows(w, rows.clone(), a, k);
                    a
                }
            };
            for p in group * 4..panels.count().min(group * 4 + 4) {
                c.fill(0.0);
                panels.multiply(p, m, a, k, c, PANEL);
                for lane in 0..panels.lanes(p) {
                    for i in 0..m {
                        // SAFETY: this task alone owns columns `rows` of the group's rows of Y.
                        unsafe { *out.at((p * PANEL + lane) * n + rows.start + i) = c[i * PANEL + lane] };
                    }
                }
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
    let out = Out(dx.as_f32_mut().as_mut_ptr());
    // Long batches are cut so that there are tasks enough; each cut packs W's panel again.
    const T_CUT: usize = 4 * ROWS;
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
            accumulate(&panels, rows, a, k, dw, n);
        },
    );
}

/// c\[m, n\] += a\[m, k\] times all panels, c row-major with n columns.
pub(super) fn accumulate(panels: &Panels, m: usize, a: &[f32], lda: usize, c: &mut [f32], n: usize) {
    let out = Out(c.as_mut_ptr());
    assert!(c.len() >= m * n && panels.n == n);
    for p in 0..panels.count() {
        let panel = &panels.data[p * PANEL * panels.k..][..PANEL * panels.k];
        for k0 in (0..panels.k).step_by(KC) {
            let kc = KC.min(panels.k - k0);
            tile_into(m, panels.lanes(p), kc, &a[k0..], lda, &panel[k0 * PANEL..], out, p * PANEL, n);
        }
    }
}
