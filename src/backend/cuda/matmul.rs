//! Launchers of kernels/matmul.cu. Widths (in, out, F) are multiples of 8; any number of tokens.

use std::cell::RefCell;

use super::entries::Entry;
use super::workload::{Shape, Workload, random};
use super::{Cuda, PIECE, Tensor, narrow};
use crate::backend::DType;
use crate::device::{Arg, Launch, Ptr};

/// All tiles have four warps.
const THREADS: u32 = 128;
/// Large tiles from this many of them on: about what two blocks on each of half the multiprocessors of a GPU take.
const MANY: usize = 64;

/// A tile's share of the output, and its shared memory: M and N rows of operands, `depth` columns of them in each of
/// `stages` stages.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Variant {
    m: usize,
    n: usize,
    depth: usize,
    stages: usize,
}

/// CUDA's limit on blocks along y, where tiles of features are: with the narrowest tile, of 32, so many features.
pub(super) const MOST_FEATURES: usize = 65_535 * 32;

const T32X32: Variant = Variant { m: 32, n: 32, depth: 128, stages: 5 };
const T32X64: Variant = Variant { m: 32, n: 64, depth: 64, stages: 4 };
const T64X32: Variant = Variant { m: 64, n: 32, depth: 128, stages: 4 };
const T64X64: Variant = Variant { m: 64, n: 64, depth: 64, stages: 3 };
const T128X128: Variant = Variant { m: 128, n: 128, depth: 64, stages: 2 };

impl Variant {
    /// A grid of `x` by `y` tiles.
    fn launch(self, x: usize, y: usize) -> Launch {
        assert!(y <= MOST_FEATURES / 32, "{y} tiles along y");
        let mut launch = Launch::linear(x, THREADS);
        launch.grid[1] = narrow(y);
        launch.shared((self.m + self.n) * self.depth * self.stages * DType::Bf16.bytes())
    }

    /// Large tiles where there are enough of them.
    fn large(rows: usize, cols: usize) -> Self {
        match rows.div_ceil(T128X128.m) * cols.div_ceil(T128X128.n) >= MANY {
            true => T128X128,
            false => T64X64,
        }
    }

    /// For a product with weights of `features` rows in all: while the tokens fit one tile, each byte of the weights
    /// is requested once; then the tile is as wide as leaves enough blocks to draw on all of the memory's bandwidth.
    fn forward(tokens: usize, features: usize) -> Self {
        let wide = features >= 2 * MANY * 64;
        match tokens {
            0..=32 if wide => T32X64,
            0..=32 => T32X32,
            33..=64 if wide => T64X64,
            33..=64 => T64X32,
            _ => Self::large(tokens, features),
        }
    }
}

/// As kernels/matmul.cu has it.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct Weights {
    w: [u64; 3],
    y: [u64; 3],
    out: [u32; 3],
    first: [u32; 3],
}

/// As kernels/matmul.cu has it, `end` being the four bytes that pad it.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::NoUninit)]
struct Pairs {
    dy: [u64; 3],
    w: [u64; 3],
    out: [u32; 3],
    end: u32,
}

fn assert_bf16(what: &str, x: &Tensor) {
    let fits = x.dtype == DType::Bf16 && x.cols > 0 && x.cols.is_multiple_of(PIECE);
    assert!(fits, "{what} is bf16 with a multiple of {PIECE} columns, not {:?} with {}", x.dtype, x.cols);
}

/// See [`crate::backend::Backend::matmul_forward`]. Up to three weights. Every row's bits are the same for any T.
pub(super) fn forward<const N: usize>(cuda: &Cuda, x: &Tensor, w: [&Tensor; N]) -> [Tensor; N] {
    assert!((1..=3).contains(&N), "{N} weights");
    assert_bf16("X", x);
    for w in w {
        assert_bf16("W", w);
        assert_eq!(w.cols, x.cols, "X [T, {}] and W [{}, {}]", x.cols, w.rows, w.cols);
        assert!(w.rows.is_multiple_of(PIECE), "W has a multiple of {PIECE} rows, not {}", w.rows);
    }
    let variant = Variant::forward(x.rows, w.iter().map(|w| w.rows).sum());
    let y = w.map(|w| cuda.empty(DType::Bf16, x.rows, w.rows));
    let mut weights = Weights { w: [0; 3], y: [0; 3], out: [0; 3], first: [u32::MAX; 3] };
    let mut tiles = 0;
    for i in 0..N {
        weights.w[i] = w[i].memory.ptr().0;
        weights.y[i] = y[i].memory.ptr().0;
        weights.out[i] = narrow(w[i].rows);
        weights.first[i] = narrow(tiles);
        tiles += w[i].rows.div_ceil(variant.n);
    }
    let entry = match variant {
        T32X32 => Entry::MatmulForward32x32,
        T32X64 => Entry::MatmulForward32x64,
        T64X32 => Entry::MatmulForward64x32,
        T64X64 => Entry::MatmulForward64x64,
        _ => Entry::MatmulForward128x128,
    };
    let weights = Arg::Bytes(bytemuck::bytes_of(&weights).to_vec());
    let launch = variant.launch(x.rows.div_ceil(variant.m), tiles);
    cuda.launch(entry, launch, &[x.arg(), weights, x.rows.into(), x.cols.into()]);
    y
}

/// See [`crate::backend::Backend::geglu_forward`]. h is computed from the products before they are rounded, and its bits
/// do not depend on `keep` or T.
pub(super) fn geglu_forward(
    cuda: &Cuda,
    x: &Tensor,
    w_gate: &Tensor,
    w_up: &Tensor,
    keep: bool,
) -> (Tensor, Option<(Tensor, Tensor)>) {
    assert_bf16("X", x);
    assert_bf16("Wg", w_gate);
    assert_bf16("Wu", w_up);
    let features = w_gate.rows;
    assert_eq!((w_gate.cols, w_up.rows, w_up.cols), (x.cols, features, x.cols), "Wg and Wu are [F, D]");
    assert!(features.is_multiple_of(PIECE), "F is a multiple of {PIECE}, not {features}");
    let (variant, entry) = match x.rows {
        0..=32 => (T32X64, Entry::GegluForward32x64),
        33..=64 => (T64X64, Entry::GegluForward64x64),
        _ => match Variant::large(x.rows, 2 * features) {
            T128X128 => (T128X128, Entry::GegluForward128x128),
            _ => (T64X64, Entry::GegluForward64x64),
        },
    };
    let empty = || cuda.empty(DType::Bf16, x.rows, features);
    let h = empty();
    let kept = keep.then(|| (empty(), empty()));
    let none = Arg::Ptr(Ptr(0));
    let (gate, up) = kept.as_ref().map_or((none.clone(), none), |(gate, up)| (gate.arg(), up.arg()));
    let launch = variant.launch(x.rows.div_ceil(variant.m), (2 * features).div_ceil(variant.n));
    let sizes: [Arg; 3] = [x.rows.into(), features.into(), x.cols.into()];
    let [tokens, features, width] = sizes;
    cuda.launch(
        entry,
        launch,
        &[x.arg(), w_gate.arg(), w_up.arg(), h.arg(), gate, up, tokens, features, width],
    );
    (h, kept)
}

/// See [`crate::backend::Backend::matmul_backward_input`]. Up to three pairs.
pub(super) fn backward_input(cuda: &Cuda, pairs: &[(&Tensor, &Tensor)]) -> Tensor {
    assert!((1..=3).contains(&pairs.len()), "{} pairs", pairs.len());
    let (tokens, cols) = (pairs[0].0.rows, pairs[0].1.cols);
    let mut arg = Pairs::default();
    for (i, (dy, w)) in pairs.iter().enumerate() {
        assert_bf16("dY", dy);
        assert_bf16("W", w);
        assert_eq!(
            (dy.rows, dy.cols, w.cols),
            (tokens, w.rows, cols),
            "dX [T, in] = dY [T, out] W [out, in]"
        );
        arg.dy[i] = dy.memory.ptr().0;
        arg.w[i] = w.memory.ptr().0;
        arg.out[i] = narrow(w.rows);
    }
    let dx = cuda.empty(DType::Bf16, tokens, cols);
    let variant = Variant::large(tokens, cols);
    let entry = match variant {
        T128X128 => Entry::MatmulBackwardInput128x128,
        _ => Entry::MatmulBackwardInput64x64,
    };
    let launch = variant.launch(tokens.div_ceil(variant.m), cols.div_ceil(variant.n));
    let pairs = Arg::Bytes(bytemuck::bytes_of(&arg).to_vec());
    cuda.launch(entry, launch, &[pairs, dx.arg(), tokens.into(), cols.into()]);
    dx
}

/// dX += dY W\[first..first + n\] in f32, n being the first columns of dY `[T, ..]` that are used; dX `[T, in]`. If n is
/// not a multiple of 8, the columns of dY up to the next must hold finite numbers.
pub(super) fn add_backward_input(
    cuda: &Cuda,
    dy: &Tensor,
    n: usize,
    w: &Tensor,
    first: usize,
    dx: &mut Tensor,
) {
    assert_bf16("dY", dy);
    assert_bf16("W", w);
    assert!(n <= dy.cols && first + n <= w.rows, "columns of dY and rows of W");
    assert_eq!((dx.dtype, dx.rows, dx.cols), (DType::F32, dy.rows, w.cols), "dX [T, in] in f32");
    let variant = Variant::large(dx.rows, dx.cols);
    let entry = match variant {
        T128X128 => Entry::MatmulBackwardInputAdd128x128,
        _ => Entry::MatmulBackwardInputAdd64x64,
    };
    let launch = variant.launch(dx.rows.div_ceil(variant.m), dx.cols.div_ceil(variant.n));
    let w = Ptr(w.memory.ptr().0 + (first * w.cols * w.dtype.bytes()) as u64);
    let sizes: [Arg; 4] = [dx.rows.into(), n.into(), dy.cols.into(), dx.cols.into()];
    let [tokens, out, ld, width] = sizes;
    cuda.launch(entry, launch, &[dy.arg(), w.into(), dx.arg(), tokens, out, ld, width]);
}

/// See [`crate::backend::Backend::matmul_backward_weight`].
pub(super) fn backward_weight(cuda: &Cuda, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
    assert_eq!(dw.rows, dy.cols, "dW [out, in] += dY [T, out]^T X [T, in]");
    add_backward_weight(cuda, dy, dy.cols, x, 0, dw);
}

/// dW\[first..first + n\] += dY^T X, n being the first columns of dY `[T, ..]` that are used; X `[T, in]`, dW `[.., in]`
/// in f32.
pub(super) fn add_backward_weight(
    cuda: &Cuda,
    dy: &Tensor,
    n: usize,
    x: &Tensor,
    first: usize,
    dw: &mut Tensor,
) {
    assert_bf16("dY", dy);
    assert_bf16("X", x);
    assert!(n <= dy.cols && first + n <= dw.rows, "columns of dY and rows of dW");
    assert_eq!((dy.rows, dw.dtype, dw.cols), (x.rows, DType::F32, x.cols), "dW [out, in] in f32");
    if x.rows == 0 {
        return;
    }
    let variant = Variant::large(n, x.cols);
    let entry = match variant {
        T128X128 => Entry::MatmulBackwardWeight128x128,
        _ => Entry::MatmulBackwardWeight64x64,
    };
    let launch = variant.launch(x.cols.div_ceil(variant.n), n.div_ceil(variant.m));
    let dw = Ptr(dw.memory.ptr().0 + (first * dw.cols * dw.dtype.bytes()) as u64);
    let sizes: [Arg; 4] = [x.rows.into(), n.into(), dy.cols.into(), x.cols.into()];
    let [tokens, out, ld, width] = sizes;
    cuda.launch(entry, launch, &[dy.arg(), x.arg(), dw.into(), tokens, out, ld, width]);
}

/// One layer's products: decoding (T = 32) and training (T = 512).
pub(super) fn workloads(shape: &Shape) -> Vec<Workload> {
    let (d, f) = (shape.hidden, shape.intermediate);
    let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let bf16 = |rows: usize, cols: usize| (rows * cols * DType::Bf16.bytes()) as u64;
    let flops = |t: usize, out: usize, width: usize| 2 * (t * out * width) as u64;
    let mut all = Vec::new();
    for t in [32, 512] {
        all.push(Workload {
            name: format!("matmul_forward q k v, T = {t}"),
            bytes: bf16(t, d) + bf16(q + 2 * kv, d) + bf16(t, q + 2 * kv),
            flops: flops(t, q + 2 * kv, d),
            prepare: Box::new(move |cuda| {
                let x = random(cuda, 1, DType::Bf16, t, d);
                let w = [(2, q), (3, kv), (4, kv)].map(|(seed, out)| random(cuda, seed, DType::Bf16, out, d));
                Box::new(move |cuda| drop(forward(cuda, &x, w.each_ref())))
            }),
        });
        for (name, width) in [("out", q), ("down", f)] {
            all.push(Workload {
                name: format!("matmul_forward {name}, T = {t}"),
                bytes: bf16(t, width) + bf16(d, width) + bf16(t, d),
                flops: flops(t, d, width),
                prepare: Box::new(move |cuda| {
                    let x = random(cuda, 1, DType::Bf16, t, width);
                    let w = random(cuda, 2, DType::Bf16, d, width);
                    Box::new(move |cuda| drop(forward(cuda, &x, [&w])))
                }),
            });
        }
        let keep = t > 32;
        all.push(Workload {
            name: format!("geglu_forward, T = {t}"),
            bytes: bf16(t, d) + 2 * bf16(f, d) + bf16(t, f) * if keep { 3 } else { 1 },
            flops: flops(t, 2 * f, d),
            prepare: Box::new(move |cuda| {
                let x = random(cuda, 1, DType::Bf16, t, d);
                let (gate, up) = (random(cuda, 2, DType::Bf16, f, d), random(cuda, 3, DType::Bf16, f, d));
                Box::new(move |cuda| drop(geglu_forward(cuda, &x, &gate, &up, keep)))
            }),
        });
    }
    let t = 512;
    all.push(Workload {
        name: format!("matmul_backward_input q k v, T = {t}"),
        bytes: bf16(t, d) + bf16(q + 2 * kv, d) + bf16(t, q + 2 * kv),
        flops: flops(t, q + 2 * kv, d),
        prepare: Box::new(move |cuda| {
            let pairs = [(1, q), (3, kv), (5, kv)].map(|(seed, out)| {
                (random(cuda, seed, DType::Bf16, t, out), random(cuda, seed + 1, DType::Bf16, out, d))
            });
            Box::new(move |cuda| drop(backward_input(cuda, &pairs.each_ref().map(|(dy, w)| (dy, w)))))
        }),
    });
    all.push(Workload {
        name: format!("matmul_backward_weight q, T = {t}"),
        bytes: bf16(t, d) + bf16(t, q) + 2 * (q * d * DType::F32.bytes()) as u64,
        flops: flops(t, q, d),
        prepare: Box::new(move |cuda| {
            let (dy, x) = (random(cuda, 1, DType::Bf16, t, q), random(cuda, 2, DType::Bf16, t, d));
            let dw = RefCell::new(random(cuda, 3, DType::F32, q, d));
            Box::new(move |cuda| backward_weight(cuda, &dy, &x, &mut dw.borrow_mut()))
        }),
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::device::vm::{Options, Vm};
    use crate::rng::philox4x32;

    /// Whole numbers in -8..8: their products and sums are exact.
    fn numbers(seed: u32, n: usize) -> Vec<f32> {
        (0..n as u32).map(|i| (philox4x32([i, 0, 0, 0], [seed, 0])[0] % 16) as f32 - 8.0).collect()
    }

    fn upload(cuda: &Cuda, dtype: DType, rows: usize, cols: usize, x: &[f32]) -> Tensor {
        match dtype {
            DType::F32 => cuda.upload(dtype, rows, cols, bytemuck::cast_slice(x)),
            DType::Bf16 => {
                let x: Vec<half::bf16> = x.iter().map(|x| half::bf16::from_f32(*x)).collect();
                cuda.upload(dtype, rows, cols, bytemuck::cast_slice(&x))
            }
        }
    }

    /// A part of dY's columns, any number of them, against a part of W's rows, added to what is there and to nothing
    /// else. The last size takes large tiles in both.
    #[test]
    #[cfg_attr(not(has_kernels), ignore = "built without nvcc; `make nvcc` fetches one")]
    fn parts_of_a_contraction_add_up() {
        let cuda = Cuda::new(Box::new(Vm::new(Options::default()))).expect("the kernels load");
        for (tokens, ld, n, total, first, width) in [
            (1, 8, 8, 8, 0, 8),
            (37, 72, 61, 150, 83, 136),
            (70, 136, 128, 300, 172, 72),
            (2, 16, 1, 3, 1, 24),
            (70, 136, 125, 142, 16, 8136),
        ] {
            let (dy, x, w) = (numbers(1, tokens * ld), numbers(2, tokens * width), numbers(3, total * width));
            let (dx, dw) = (numbers(4, tokens * width), numbers(5, total * width));
            let [mut got_dx, mut got_dw] = [(tokens, &dx), (total, &dw)]
                .map(|(rows, data)| upload(&cuda, DType::F32, rows, width, data));
            let [dy_, x_, w_] = [(tokens, ld, &dy), (tokens, width, &x), (total, width, &w)]
                .map(|(rows, cols, data)| upload(&cuda, DType::Bf16, rows, cols, data));
            add_backward_input(&cuda, &dy_, n, &w_, first, &mut got_dx);
            add_backward_weight(&cuda, &dy_, n, &x_, first, &mut got_dw);
            cuda.check().expect("no finding");
            let (mut want_dx, mut want_dw) = (dx, dw);
            for t in 0..tokens {
                for v in 0..n {
                    let dy = dy[t * ld + v];
                    let row = (first + v) * width..(first + v + 1) * width;
                    let dx = &mut want_dx[t * width..(t + 1) * width];
                    dx.iter_mut().zip(&w[row.clone()]).for_each(|(dx, w)| *dx += dy * w);
                    want_dw[row].iter_mut().zip(&x[t * width..]).for_each(|(dw, x)| *dw += dy * x);
                }
            }
            assert!(cuda.to_f32(&got_dx) == want_dx, "dX of {tokens} tokens, {n} columns");
            assert!(cuda.to_f32(&got_dw) == want_dw, "dW of {tokens} tokens, {n} columns");
        }
    }
}
