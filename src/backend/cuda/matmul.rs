//! Launchers of kernels/matmul.cu. Widths (in, out, F) are multiples of 8; any number of tokens.

use std::ops::Range;

use super::entries::shared::products;
use super::entries::{Entry, same_size};
use super::{Cuda, Tensor, VECTOR, narrow};
use crate::backend::{DType, Matmul};
use crate::device::{Arg, Launch, Ptr};

/// CUDA's limit on the blocks along y, which count tiles of features.
const MAX_TILES: usize = 65_535;
/// The most features: MAX_TILES tiles of 32. Narrower tiles are chosen only where there are few features.
pub(super) const MAX_FEATURES: usize = MAX_TILES * 32;
/// Multiprocessors of the GPU for which contractions are cut, an H100. The cuts do not depend on the GPU in use, because they
/// determine the order of sums.
const REFERENCE: u32 = 132;
/// The most parts of a contraction, and the unit of their lengths.
const MAX_PARTS: usize = 32;
const PART_UNIT: usize = 64;
/// Bytes that an H100's memory moves in a clock (3352 GB/s at 1.83 GHz), and the clocks of a launch that adds up parts (1.5 us).
/// Both are modelled.
const BYTES_PER_CLOCK: usize = 1830;
const LAUNCH_CLOCKS: usize = 2700;

/// A tile of kernels/products.cuh: M x N, as many warps along each, and `stages` stages of `depth` columns of k.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Variant {
    pub(super) m: usize,
    pub(super) n: usize,
    warps_m: usize,
    warps_n: usize,
    depth: usize,
    stages: usize,
}

const T32X16: Variant = Variant::of(products::TILE32X16);
const T32X32: Variant = Variant::of(products::TILE32X32);
pub(super) const T32X64: Variant = Variant::of(products::TILE32X64);
const T64X32: Variant = Variant::of(products::TILE64X32);
pub(super) const T64X64: Variant = Variant::of(products::TILE64X64);
pub(super) const T128X128: Variant = Variant::of(products::TILE128X128);

impl Variant {
    /// Of the arguments of `Tile`.
    const fn of([m, n, warps_m, warps_n, depth, stages]: [usize; 6]) -> Self {
        Self { m, n, warps_m, warps_n, depth, stages }
    }

    /// A grid of `x` by `y` tiles.
    pub(super) fn launch(self, x: usize, y: usize) -> Launch {
        assert!(y <= MAX_TILES, "{y} tiles along y");
        let mut launch = Launch::linear(x, narrow(32 * self.warps_m * self.warps_n));
        launch.grid[1] = narrow(y);
        launch.shared((self.m + self.n) * self.depth * self.stages * DType::Bf16.bytes())
    }

    /// Clocks of a multiprocessor for 16 of k, modelled: the larger of the wavefronts of shared memory that copies write and warps
    /// read (each is 4 rows of an operand), and of the products at 1.6 clocks, which is the rate of `mma.sync` on an H100.
    fn clocks(self) -> usize {
        ((self.m * (1 + self.warps_n) + self.n * (1 + self.warps_m)) / 4).max(self.m * self.n / 80)
    }

    /// Half-clocks of a product [rows, cols] for each 16 of k, modelled, if `parts` parts run at the same time: the time of the
    /// multiprocessor that has the most tiles. A tile that is alone on a multiprocessor counts as one and a half, because nothing
    /// hides the latency of its barriers.
    fn time(self, rows: usize, cols: usize, parts: usize, multiprocessors: u32) -> usize {
        let tiles = rows.div_ceil(self.m) * cols.div_ceil(self.n) * parts;
        let most = tiles.div_ceil(multiprocessors as usize);
        (2 * most).max(3) * self.clocks()
    }

    /// The faster one of the two tiles for many rows. No bit depends on the choice.
    pub(super) fn large(rows: usize, cols: usize, parts: usize, multiprocessors: u32) -> Self {
        let time = |v: &Self| v.time(rows, cols, parts, multiprocessors);
        if time(&T128X128) <= time(&T64X64) { T128X128 } else { T64X64 }
    }

    /// The fastest one of `tiles`, of equals the first, for a product [rows, cols] whose rows are `groups` groups with weights of
    /// their own. The host does not know how many rows a group has; it takes the last tile of each to be half empty. No bit depends
    /// on the choice.
    pub(super) fn of_groups(
        tiles: &[Self],
        rows: usize,
        groups: usize,
        cols: usize,
        multiprocessors: u32,
    ) -> Self {
        let filled = |v: &Self| groups * (rows.div_ceil(groups) + v.m / 2).max(v.m);
        let time = |v: &&Self| v.time(filled(v), cols, 1, multiprocessors);
        *tiles.iter().min_by_key(time).expect("there are tiles")
    }

    /// The tile of a product whose weights have `features` rows in all. While the tokens fit one tile, each byte of the weights is
    /// requested once, and the tile is as wide as it can be if every multiprocessor is to have a block that reads them.
    /// Adapters have as many features as their rank: tiles that are no wider compute nothing in vain, and lower ones are more
    /// blocks.
    fn forward(tokens: usize, features: usize, multiprocessors: u32) -> Self {
        let wide = features >= multiprocessors as usize * 64;
        // The narrowest tile only if no multiprocessor gets two, which would read more of shared memory than one tile of 32.
        let narrow = features.div_ceil(16) <= multiprocessors as usize;
        match tokens {
            0..=32 if wide => T32X64,
            0..=32 if narrow => T32X16,
            0..=32 => T32X32,
            _ if features <= T32X16.n => T32X16,
            _ if features <= T32X32.n => T32X32,
            33..=64 if wide => T64X64,
            33..=64 => T64X32,
            _ => Self::large(tokens, features, 1, multiprocessors),
        }
    }

    /// The tile of GeGLU, whose columns are gate and up, alternating.
    pub(super) fn geglu(tokens: usize, features: usize, multiprocessors: u32) -> Self {
        match tokens {
            0..=32 => T32X64,
            33..=64 => T64X64,
            _ => Self::large(tokens, 2 * features, 1, multiprocessors),
        }
    }
}

/// The cut of a gradient's contraction into `parts` parts of `length` (the last may be shorter), each of which is one chain.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cut {
    parts: usize,
    length: usize,
}

impl Cut {
    /// The cut for a product [rows, cols] over k: the fewest parts whose time on the reference, with the traffic of their f32 sums,
    /// is within a sixteenth of the fastest.
    fn new(rows: usize, cols: usize, k: usize) -> Self {
        let cut = |parts: usize| {
            let length = k.div_ceil(parts).next_multiple_of(PART_UNIT).max(PART_UNIT);
            Self { parts: k.div_ceil(length).max(1), length }
        };
        let time = |cut: &Self| {
            let time = |v: Variant| v.time(rows, cols, cut.parts, REFERENCE) * cut.length.div_ceil(16) / 2;
            let sums = match cut.parts {
                1 => 0,
                parts => LAUNCH_CLOCKS + parts * rows * cols * 2 * DType::F32.bytes() / BYTES_PER_CLOCK,
            };
            time(T128X128).min(time(T64X64)) + sums
        };
        let cuts: Vec<(Self, usize)> = (1..=MAX_PARTS).map(cut).map(|cut| (cut, time(&cut))).collect();
        let least = cuts.iter().map(|(_, time)| *time).min().unwrap_or(0);
        cuts.iter().find(|(_, time)| time * 16 <= least * 17).expect("the fastest is one of them").0
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

/// As kernels/matmul.cu has it.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::NoUninit)]
struct Terms {
    dy: [u64; 3],
    w: [u64; 3],
    out: [u32; 3],
    ld: [u32; 3],
}

/// As kernels/matmul.cu has it.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::NoUninit)]
struct LowRank {
    h: [u64; 3],
    b: [u64; 3],
    rank: u32,
    _padding: u32,
}

same_size!(matmul: Weights = WEIGHTS_BYTES, LowRank = LOW_RANK_BYTES, Terms = TERMS_BYTES);

impl From<Terms> for Arg {
    fn from(terms: Terms) -> Self {
        Arg::Bytes(bytemuck::bytes_of(&terms).to_vec())
    }
}

pub(super) fn assert_bf16(what: &str, x: &Tensor) {
    let fits = x.dtype == DType::Bf16 && x.cols > 0 && x.cols.is_multiple_of(VECTOR);
    assert!(fits, "{what} is bf16 with a multiple of {VECTOR} columns, not {:?} with {}", x.dtype, x.cols);
}

impl Matmul for Cuda {
    /// Up to three weights. Every row's bits are the same for any T.
    fn matmul_forward<const N: usize>(&self, x: &Tensor, w: [&Tensor; N]) -> [Tensor; N] {
        launch_forward(self, x, w, None)
    }

    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Tensor,
        w: [&Tensor; N],
        low_rank: [Option<(&Tensor, &Tensor)>; N],
    ) -> [Tensor; N] {
        let mut arg = LowRank::default();
        for (i, (w, (h, b))) in
            w.iter().zip(low_rank).enumerate().filter_map(|(i, (w, low))| Some((i, (w, low?))))
        {
            assert_bf16("H", h);
            assert_bf16("B", b);
            assert_eq!((h.rows, b.rows, b.cols), (x.rows, w.rows, h.cols), "H [T, r] and B [out, r]");
            assert!([0, narrow(h.cols)].contains(&arg.rank), "adapters of one rank");
            arg.h[i] = h.memory.ptr().0;
            arg.b[i] = b.memory.ptr().0;
            arg.rank = narrow(h.cols);
        }
        launch_forward(self, x, w, Some(arg))
    }

    fn matmul_backward_input(&self, terms: &[(&Tensor, &Tensor)]) -> Tensor {
        let (tokens, cols) = (terms[0].0.rows, terms[0].1.cols);
        let of = |terms: &[(&Tensor, &Tensor)]| {
            let mut arg = Terms::default();
            for (i, (dy, w)) in terms.iter().enumerate() {
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
                arg.ld[i] = narrow(dy.cols);
            }
            arg
        };
        let rows = |terms: &[(&Tensor, &Tensor)]| terms.iter().map(|(_, w)| w.rows).sum::<usize>();
        let cut = Cut::new(tokens, cols, rows(terms));
        // A launch takes three terms; those of more go on with the sums in f32.
        if cut.parts > 1 || terms.len() > 3 {
            let sum = InputSum { cut, partials: self.empty(DType::F32, cut.parts * tokens, cols), tokens };
            let mut begin = 0;
            for terms in terms.chunks(3) {
                let end = begin + rows(terms);
                sum.launch(self, of(terms), begin..end);
                begin = end;
            }
            return sum.finish(self);
        }
        let arg = of(terms);
        let dx = self.empty(DType::Bf16, tokens, cols);
        let variant = Variant::large(tokens, cols, 1, self.device().multiprocessors());
        let entry = match variant {
            T128X128 => Entry::MatmulBackwardInput128x128,
            _ => Entry::MatmulBackwardInput64x64,
        };
        let launch = variant.launch(tokens.div_ceil(variant.m), cols.div_ceil(variant.n));
        self.launch(entry, launch, &[arg.into(), dx.arg(), tokens.into(), cols.into()]);
        dx
    }

    fn matmul_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Tensor) {
        if dw.rows == 0 {
            return;
        }
        assert_eq!(dw.rows, dy.cols, "dW [out, in] += dY [T, out]^T X [T, in]");
        let cut = Cut::new(dw.rows, dw.cols, dy.rows);
        if cut.parts == 1 {
            return add_backward_weight(self, dy, dy.cols, x, 0, dw);
        }
        assert_weight_operands(dy, x, dw);
        let partials = self.empty(DType::F32, cut.parts * dw.rows, dw.cols);
        let variant = Variant::large(dw.rows, dw.cols, cut.parts, self.device().multiprocessors());
        let entry = match variant {
            T128X128 => Entry::MatmulBackwardWeightPart128x128,
            _ => Entry::MatmulBackwardWeightPart64x64,
        };
        let mut launch = variant.launch(x.cols.div_ceil(variant.n), dw.rows.div_ceil(variant.m));
        launch.grid[2] = narrow(cut.parts);
        let sizes: [Arg; 5] = [dy.rows, dy.cols, dy.cols, x.cols, cut.length].map(Arg::from);
        let [tokens, out, ld, width, length] = sizes;
        self.launch(entry, launch, &[dy.arg(), x.arg(), partials.arg(), tokens, out, ld, width, length]);
        let entry = match dw.dtype {
            DType::F32 => Entry::MatmulBackwardWeightSum,
            DType::Bf16 => Entry::MatmulBackwardWeightSumBf16,
        };
        add_parts(self, entry, &partials, dw, cut);
    }
}

/// [`forward`], with what adapters add, where there are some.
fn launch_forward<const N: usize>(
    cuda: &Cuda,
    x: &Tensor,
    w: [&Tensor; N],
    low_rank: Option<LowRank>,
) -> [Tensor; N] {
    assert!((1..=3).contains(&N), "{N} weights");
    assert_bf16("X", x);
    for w in w {
        assert_bf16("W", w);
        assert_eq!(w.cols, x.cols, "X [T, {}] and W [{}, {}]", x.cols, w.rows, w.cols);
        assert!(w.rows.is_multiple_of(VECTOR), "W has a multiple of {VECTOR} rows, not {}", w.rows);
    }
    let features = w.iter().map(|w| w.rows).sum();
    let variant = Variant::forward(x.rows, features, cuda.device().multiprocessors());
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
    let [plain, with_low_rank] = match variant {
        T32X16 => [Entry::MatmulForward32x16, Entry::MatmulLowRankForward32x16],
        T32X32 => [Entry::MatmulForward32x32, Entry::MatmulLowRankForward32x32],
        T32X64 => [Entry::MatmulForward32x64, Entry::MatmulLowRankForward32x64],
        T64X32 => [Entry::MatmulForward64x32, Entry::MatmulLowRankForward64x32],
        T64X64 => [Entry::MatmulForward64x64, Entry::MatmulLowRankForward64x64],
        _ => [Entry::MatmulForward128x128, Entry::MatmulLowRankForward128x128],
    };
    let weights = Arg::Bytes(bytemuck::bytes_of(&weights).to_vec());
    let launch = variant.launch(x.rows.div_ceil(variant.m), tiles);
    let mut args = vec![x.arg(), weights, x.rows.into(), x.cols.into()];
    args.extend(low_rank.map(|low_rank| Arg::Bytes(bytemuck::bytes_of(&low_rank).to_vec())));
    let entry = if low_rank.is_some() { with_low_rank } else { plain };
    cuda.launch(entry, launch, &args);
    y
}

/// dX = dY W for a dY that comes in ranges of columns, in ascending order. The bits are those of dY as a whole.
pub(super) struct InputSum {
    cut: Cut,
    /// [parts T, in]
    partials: Tensor,
    tokens: usize,
}

impl InputSum {
    /// For dX `[tokens, w.cols]` of dY `[tokens, w.rows]`.
    pub(super) fn new(cuda: &Cuda, tokens: usize, w: &Tensor) -> Self {
        assert_bf16("W", w);
        let cut = Cut::new(tokens, w.cols, w.rows);
        Self { cut, partials: cuda.empty(DType::F32, cut.parts * tokens, w.cols), tokens }
    }

    /// Adds the next range of dY, the first n columns of `dy` `[T, ..]`, times W\[first..first + n\]. `first` is a multiple of 16.
    /// If n is not a multiple of 8, the columns up to the next multiple must hold finite numbers.
    pub(super) fn add(&self, cuda: &Cuda, dy: &Tensor, n: usize, w: &Tensor, first: usize) {
        assert_bf16("dY", dy);
        assert!(n <= dy.cols && first + n <= w.rows, "columns of dY and rows of W");
        assert_eq!(
            (dy.rows, w.cols),
            (self.tokens, self.partials.cols),
            "dX [T, in] = dY [T, out] W [out, in]"
        );
        assert!(first.is_multiple_of(16), "a chain goes on at a multiple of 16, not {first}");
        let w = w.memory.ptr().0 + (first * w.cols * w.dtype.bytes()) as u64;
        let (dy, ld) = (dy.memory.ptr().0, narrow(dy.cols));
        let terms = Terms { dy: [dy, 0, 0], w: [w, 0, 0], out: [narrow(n), 0, 0], ld: [ld, 0, 0] };
        self.launch(cuda, terms, first..first + n);
    }

    /// Launches the range `k` of the contraction.
    fn launch(&self, cuda: &Cuda, terms: Terms, k: Range<usize>) {
        let Cut { length, .. } = self.cut;
        let parts = k.end.div_ceil(length) - k.start / length;
        let (tokens, cols) = (self.tokens, self.partials.cols);
        let variant = Variant::large(tokens, cols, parts, cuda.device().multiprocessors());
        let entry = match variant {
            T128X128 => Entry::MatmulBackwardInputPart128x128,
            _ => Entry::MatmulBackwardInputPart64x64,
        };
        let mut launch = variant.launch(tokens.div_ceil(variant.m), cols.div_ceil(variant.n));
        launch.grid[2] = narrow(parts);
        let [tokens, cols, first, length]: [Arg; 4] = [tokens, cols, k.start, length].map(Arg::from);
        cuda.launch(entry, launch, &[terms.into(), self.partials.arg(), tokens, cols, first, length]);
    }

    /// dX `[T, in]` in bf16, when all of dY has come.
    pub(super) fn finish(self, cuda: &Cuda) -> Tensor {
        let dx = cuda.empty(DType::Bf16, self.tokens, self.partials.cols);
        add_parts(cuda, Entry::MatmulBackwardInputSum, &self.partials, &dx, self.cut);
        dx
    }
}

/// Adds the parts up into `to`.
fn add_parts(cuda: &Cuda, entry: Entry, partials: &Tensor, to: &Tensor, cut: Cut) {
    let n = to.rows * to.cols;
    let launch = Launch::linear(n.div_ceil(256 * 4), 256);
    cuda.launch(entry, launch, &[partials.arg(), to.arg(), cut.parts.into(), (n as u64).into()]);
}

fn assert_weight_operands(dy: &Tensor, x: &Tensor, dw: &Tensor) {
    assert_bf16("dY", dy);
    assert_bf16("X", x);
    assert_eq!((dy.rows, dw.cols), (x.rows, x.cols), "dW [out, in]");
}

/// dW\[first..first + n\] += dY^T X, n being the first columns of dY `[T, ..]` that are used; X `[T, in]`, dW `[.., in]`
/// in f32 or bf16.
pub(super) fn add_backward_weight(
    cuda: &Cuda,
    dy: &Tensor,
    n: usize,
    x: &Tensor,
    first: usize,
    dw: &mut Tensor,
) {
    assert_weight_operands(dy, x, dw);
    assert!(n <= dy.cols && first + n <= dw.rows, "columns of dY and rows of dW");
    if x.rows == 0 {
        return;
    }
    let variant = Variant::large(n, x.cols, 1, cuda.device().multiprocessors());
    let entry = match (variant, dw.dtype) {
        (T128X128, DType::F32) => Entry::MatmulBackwardWeight128x128,
        (T128X128, DType::Bf16) => Entry::MatmulBackwardWeightBf16128x128,
        (_, DType::F32) => Entry::MatmulBackwardWeight64x64,
        (_, DType::Bf16) => Entry::MatmulBackwardWeightBf1664x64,
    };
    let launch = variant.launch(x.cols.div_ceil(variant.n), n.div_ceil(variant.m));
    let dw = Ptr(dw.memory.ptr().0 + (first * dw.cols * dw.dtype.bytes()) as u64);
    let sizes: [Arg; 4] = [x.rows.into(), n.into(), dy.cols.into(), x.cols.into()];
    let [tokens, out, ld, width] = sizes;
    cuda.launch(entry, launch, &[dy.arg(), x.arg(), dw.into(), tokens, out, ld, width]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Platform;
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

    fn on_vm(multiprocessors: u32) -> Cuda {
        let vm = Vm::new(Options::default()).with_multiprocessors(multiprocessors);
        Cuda::new(Box::new(vm)).expect("the kernels load")
    }

    /// Multiprocessors that an A100, an RTX 4090 and an H100 have.
    const GPUS: [u32; 3] = [108, 128, 132];

    /// Forward products, GeGLU and the gradients of Gemma 2B: the tile is the faster one by the model, and no
    /// multiprocessor is idle where the other tile would leave it so.
    #[test]
    fn tiles_fill_the_multiprocessors_that_there_are() {
        let name = |v: Variant| (v.m, v.n);
        for (what, want, tile) in [
            ("q k v, T = 32", [(32, 32); 3], (|sms| Variant::forward(32, 2560, sms)) as fn(u32) -> Variant),
            ("down, T = 32", [(32, 32), (32, 16), (32, 16)], |sms| Variant::forward(32, 2048, sms)),
            ("8192 features, T = 32", [(32, 64), (32, 64), (32, 32)], |sms| Variant::forward(32, 8192, sms)),
            ("8192 features, T = 64", [(64, 64), (64, 64), (64, 32)], |sms| Variant::forward(64, 8192, sms)),
            ("down, T = 256", [(64, 64); 3], |sms| Variant::forward(256, 2048, sms)),
            ("down, T = 512", [(64, 64); 3], |sms| Variant::forward(512, 2048, sms)),
            ("down, T = 1024", [(128, 128); 3], |sms| Variant::forward(1024, 2048, sms)),
            ("1536 features, T = 1024", [(128, 128), (64, 64), (64, 64)], |sms| {
                Variant::forward(1024, 1536, sms)
            }),
            ("A of rank 16, T = 512", [(32, 16); 3], |sms| Variant::forward(512, 16, sms)),
            ("A of rank 32, T = 4096", [(32, 32); 3], |sms| Variant::forward(4096, 32, sms)),
            ("geglu, T = 32", [(32, 64); 3], |sms| Variant::geglu(32, 16_384, sms)),
            ("geglu, T = 64", [(64, 64); 3], |sms| Variant::geglu(64, 16_384, sms)),
            ("geglu of 270M, T = 256", [(64, 64); 3], |sms| Variant::geglu(256, 2048, sms)),
            ("geglu, T = 512", [(128, 128); 3], |sms| Variant::geglu(512, 16_384, sms)),
            ("dX of out, T = 512", [(64, 64); 3], |sms| Variant::large(512, 2048, 1, sms)),
            ("dX of the MLP, T = 512", [(128, 128); 3], |sms| Variant::large(512, 2048, 4, sms)),
            ("dW of q", [(128, 128); 3], |sms| Variant::large(2048, 2048, 1, sms)),
            ("dW of k", [(64, 64); 3], |sms| Variant::large(256, 2048, 1, sms)),
        ] {
            assert_eq!(GPUS.map(|sms| name(tile(sms))), want, "{what}");
        }
        // What the issue is about: 128 x 128 tiles would leave half of an H100 idle.
        let blocks = |v: Variant, rows: usize, cols: usize| rows.div_ceil(v.m) * cols.div_ceil(v.n);
        for sms in GPUS {
            let down = Variant::forward(512, 2048, sms);
            assert!(blocks(down, 512, 2048) >= sms as usize, "{down:?} on {sms}");
        }
    }

    /// Parts, and blocks on an H100, of the gradients that small batches have: each has a block for nearly every
    /// multiprocessor, or is so short that parts would cost more than they gain.
    #[test]
    fn contractions_are_cut_where_that_pays() {
        for (what, rows, cols, k, parts, blocks) in [
            ("dX of q k v, T = 256", 256, 2048, 2560, 1, 128),
            ("dX of out, T = 512", 512, 2048, 2048, 1, 256),
            ("dX of the MLP, T = 256", 256, 2048, 32_768, 8, 256),
            ("dX of the MLP, T = 512", 512, 2048, 32_768, 4, 256),
            ("dX of the MLP, T = 1024", 1024, 2048, 32_768, 2, 256),
            ("dX of the MLP, T = 4096", 4096, 2048, 32_768, 1, 512),
            ("dX of 270M's MLP, T = 256", 256, 640, 4096, 5, 200),
            ("dW of k, T = 512", 256, 2048, 512, 1, 128),
            ("dW of k, T = 16384", 256, 2048, 16_384, 8, 256),
            ("dW of 270M's k, T = 4096", 256, 640, 4096, 5, 200),
            ("dX of the head, 32 rows", 32, 2048, 256_000, 8, 256),
            ("dX of the head, 256 rows", 256, 2048, 256_000, 8, 256),
            ("dX of the head, 4096 rows", 4096, 2048, 256_000, 1, 512),
        ] {
            let cut = Cut::new(rows, cols, k);
            let v = Variant::large(rows, cols, cut.parts, 132);
            let got = (cut.parts, rows.div_ceil(v.m) * cols.div_ceil(v.n) * cut.parts);
            assert_eq!(got, (parts, blocks), "{what}");
            assert!(
                (cut.parts - 1) * cut.length < k && k <= cut.parts * cut.length,
                "{what}: {cut:?} covers k"
            );
        }
    }

    /// The GPU decides about tiles, and not about bits.
    #[test]
    #[cfg_attr(not(has_kernels), ignore = "built without nvcc; `make nvcc` fetches one")]
    fn no_number_of_multiprocessors_changes_a_bit() {
        // Cut: dX over 6000 in parts, dW over 3000 tokens.
        let (tokens, out, width) = (70, 3000, 72);
        assert!(Cut::new(tokens, width, 2 * out).parts > 1 && Cut::new(tokens, width, out).parts > 1);
        let numbers = |seed, n: usize| {
            (0..n as u32).map(move |i| philox4x32([i, 0, 0, 0], [seed, 0])[0] as f32 / 3e9 - 0.7)
        };
        let run = |multiprocessors: u32| {
            let cuda = on_vm(multiprocessors);
            let of = |seed, rows, cols, dtype| {
                upload(&cuda, dtype, rows, cols, &numbers(seed, rows * cols).collect::<Vec<f32>>())
            };
            let (dy, w) = (of(1, tokens, out, DType::Bf16), of(2, out, width, DType::Bf16));
            let (x, dz) = (of(3, out, width, DType::Bf16), of(4, out, tokens + 2, DType::Bf16));
            let dx = cuda.matmul_backward_input(&[(&dy, &w), (&dy, &w)]);
            let mut dw = of(5, tokens + 2, width, DType::F32);
            cuda.matmul_backward_weight(&dz, &x, &mut dw);
            let [y] = cuda.matmul_forward(&x, [&w]);
            cuda.check().expect("no finding");
            [dx, dw, y].map(|x| cuda.download(&x))
        };
        // With one multiprocessor every tile is large, with 132 these are small.
        let want = run(132);
        assert!([1, 2, 108].into_iter().all(|multiprocessors| run(multiprocessors) == want));
    }

    /// A part of dY's columns, any number of them, against a part of W's rows, added to what is there and to nothing
    /// else.
    #[test]
    #[cfg_attr(not(has_kernels), ignore = "built without nvcc; `make nvcc` fetches one")]
    fn parts_of_a_gradient_add_up() {
        let cuda = on_vm(132);
        // The last size takes large tiles.
        for (tokens, ld, n, total, first, width) in [
            (1, 8, 8, 8, 0, 8),
            (37, 72, 61, 150, 83, 136),
            (70, 136, 128, 300, 172, 72),
            (2, 16, 1, 3, 1, 24),
            (7, 520, 509, 542, 16, 4072),
        ] {
            let (dy, x) = (numbers(1, tokens * ld), numbers(2, tokens * width));
            let dw = numbers(5, total * width);
            let mut got = upload(&cuda, DType::F32, total, width, &dw);
            let (dy_, x_) =
                (upload(&cuda, DType::Bf16, tokens, ld, &dy), upload(&cuda, DType::Bf16, tokens, width, &x));
            add_backward_weight(&cuda, &dy_, n, &x_, first, &mut got);
            cuda.check().expect("no finding");
            let mut want = dw;
            for (t, v) in (0..tokens).flat_map(|t| (0..n).map(move |v| (t, v))) {
                let row = (first + v) * width..(first + v + 1) * width;
                want[row].iter_mut().zip(&x[t * width..]).for_each(|(dw, x)| *dw += dy[t * ld + v] * x);
            }
            assert!(cuda.to_f32(&got) == want, "dW of {tokens} tokens, {n} columns");
        }
    }

    /// dY in ranges, which end within parts and beyond them, gives the bits of dY as a whole. These are right, because whole
    /// numbers have one sum, which is rounded once.
    #[test]
    #[cfg_attr(not(has_kernels), ignore = "built without nvcc; `make nvcc` fetches one")]
    fn a_gradient_may_come_in_ranges() {
        for (tokens, total, width, multiprocessors) in
            [(1, 8, 8, 132), (37, 2061, 136, 132), (70, 2100, 72, 1), (130, 333, 8, 132), (70, 70, 4104, 132)]
        {
            let cuda = on_vm(multiprocessors);
            let (dy, w) = (numbers(1, tokens * total), numbers(3, total * width));
            let w_ = upload(&cuda, DType::Bf16, total, width, &w);
            let run = |sizes: &[usize]| {
                let sum = InputSum::new(&cuda, tokens, &w_);
                let mut first = 0;
                for size in sizes.iter().cycle() {
                    let n = (*size).min(total - first);
                    let ld = n.next_multiple_of(8) + 8;
                    let column = |t: usize, v: usize| if v < n { dy[t * total + first + v] } else { 3.0 };
                    let range: Vec<f32> = (0..tokens)
                        .flat_map(|t| (0..ld).map(move |v| (t, v)))
                        .map(|(t, v)| column(t, v))
                        .collect();
                    sum.add(&cuda, &upload(&cuda, DType::Bf16, tokens, ld, &range), n, &w_, first);
                    first += n;
                    if first == total {
                        break;
                    }
                }
                let dx = sum.finish(&cuda);
                cuda.check().expect("no finding");
                cuda.to_f32(&dx)
            };
            let whole = run(&[total]);
            for (i, got) in whole.iter().enumerate() {
                let products = (0..total).map(|v| dy[i / width * total + v] * w[v * width + i % width]);
                let want = half::bf16::from_f32(products.sum::<f32>()).to_f32();
                assert_eq!(*got, want, "dX[{i}] of {tokens} x {total}");
            }
            for sizes in [&[16][..], &[512], &[48, 1024], &[1040]] {
                assert!(run(sizes) == whole, "{tokens} x {total} in ranges of {sizes:?}");
            }
        }
    }
}
