//! Launchers of kernels/experts.cu. E, D and Fe are multiples of 8; any number of tokens.

use super::entries::Entry;
use super::entries::shared::experts::WARPS;
pub(super) use super::entries::shared::experts::{MAX_EXPERTS, MAX_TOP};
use super::matmul::{T32X64, T64X64, T128X128, Variant};
use super::{Cuda, Memory, Tensor, VECTOR, narrow};
use crate::backend::{DType, ExpertTrace, Experts, Routing};
use crate::device::{Arg, Launch, Ptr};

/// The tiles of forward products; the first two are also those of gradients.
const TILES: [Variant; 3] = [T128X128, T64X64, T32X64];

/// See [`crate::backend::Platform::Routes`]. All of it is on the device; launches depend on the counts alone.
pub struct Routes {
    /// T.
    tokens: usize,
    /// E.
    count: usize,
    /// G.
    top: usize,
    /// e_g `[T, G]`.
    experts: Memory,
    /// `[T, G]`.
    shares: Memory,
    /// `[T, G]`.
    weights: Memory,
    /// The rows of expert e, in the order of experts, are `first[e]..first[e + 1]`.
    first: Memory,
    /// The route t G + g of each row in that order, and thus those of each expert in the order of tokens.
    order: Memory,
    /// The row of each route in that order.
    rows: Memory,
}

/// [`Routes`] on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct HostRoutes {
    /// e_g `[T, G]`.
    pub experts: Vec<u32>,
    /// `[T, G]`.
    pub shares: Vec<f32>,
    /// `[T, G]`.
    pub weights: Vec<f32>,
    /// The rows of expert e are `first[e]..first[e + 1]`: `[E + 1]`.
    pub first: Vec<u32>,
    /// The route t G + g of each row `[T G]`.
    pub order: Vec<u32>,
    /// The row of each route `[T, G]`.
    pub rows: Vec<u32>,
}

impl Routes {
    /// T G.
    fn len(&self) -> usize {
        self.tokens * self.top
    }

    /// Experts that may have rows.
    fn filled(&self) -> usize {
        self.count.min(self.len())
    }

    /// Reads them; waits for the device.
    pub fn to_host(&self, cuda: &Cuda) -> HostRoutes {
        HostRoutes {
            experts: cuda.read(&self.experts, self.len()),
            shares: cuda.read(&self.shares, self.len()),
            weights: cuda.read(&self.weights, self.len()),
            first: cuda.read(&self.first, self.count + 1),
            order: cuda.read(&self.order, self.len()),
            rows: cuda.read(&self.rows, self.len()),
        }
    }

    /// The launch of a product of all rows with each expert's weights, which have `cols` columns of results in all: a block for
    /// each tile of columns of each tile of rows that there may be. Experts' last tiles have M - 1 rows too many at most.
    fn launch(&self, variant: Variant, cols: usize) -> Launch {
        let tiles = (self.len() + self.filled() * (variant.m - 1)) / variant.m;
        variant.launch(tiles * cols.div_ceil(variant.n), 1)
    }

    /// The tile of such a product.
    fn variant(&self, cuda: &Cuda, tiles: &[Variant], cols: usize) -> Variant {
        Variant::of_groups(tiles, self.len(), self.filled().max(1), cols, cuda.device().multiprocessors())
    }
}

fn assert_bf16(what: &str, x: &Tensor, rows: usize) {
    let fits = x.dtype == DType::Bf16 && x.rows == rows && x.cols > 0 && x.cols.is_multiple_of(VECTOR);
    assert!(
        fits,
        "{what} is bf16 [{rows}, ..], columns a multiple of {VECTOR}, not {:?} [{}, {}]",
        x.dtype, x.rows, x.cols
    );
}

/// The launch with a warp for each of `rows` rows.
fn warps(rows: usize) -> Launch {
    Launch::linear(rows.div_ceil(WARPS), narrow(32 * WARPS))
}

/// Threads of a block that has `n` accesses to make, or more.
fn threads(n: usize) -> u32 {
    n.next_multiple_of(32).clamp(32, 512) as u32
}

/// Whether the scores, or their gradient, fit.
fn assert_routing(cuda: &Cuda, factors: &Tensor, Routing { experts, top, .. }: Routing) {
    assert!(
        experts.is_multiple_of(VECTOR) && experts <= MAX_EXPERTS && (1..=MAX_TOP.min(experts)).contains(&top),
        "{top} of {experts} experts on {}",
        cuda.0.device.name()
    );
    assert_bf16("factors", factors, 1);
    assert_eq!(factors.cols, experts, "a factor for each expert");
}

impl Experts for Cuda {
    fn route_forward(&self, scores: &Tensor, factors: &Tensor, routing: &Routing) -> Routes {
        let Routing { experts: count, top, scale } = *routing;
        assert_routing(self, factors, *routing);
        assert_bf16("scores", scores, scores.rows);
        assert_eq!(scores.cols, count, "a score for each expert");
        let (tokens, routes) = (scores.rows, scores.rows * top);
        let of_routes = || self.memory(4 * routes);
        let first = self.memory(4 * (count + 1));
        let [experts, shares, weights, order, rows] = [(); 5].map(|()| of_routes());
        let to = Routes { tokens, count, top, experts, shares, weights, first, order, rows };
        let args = [scores.arg(), factors.arg(), to.experts.arg(), to.shares.arg(), to.weights.arg()];
        let sizes: [Arg; 4] = [tokens.into(), count.into(), top.into(), scale.into()];
        self.launch(Entry::RouteForward, warps(tokens), &[&args[..], &sizes].concat());
        let args = [to.experts.arg(), to.first.arg(), to.order.arg(), to.rows.arg(), routes.into()];
        self.launch(Entry::RouteOrder, Launch::linear(count, threads(routes)), &args);
        to
    }

    fn route_backward(
        &self,
        d_weights: &Tensor,
        routes: &Routes,
        routing: &Routing,
        (factors, d_factors): (&Tensor, &mut Tensor),
    ) -> Tensor {
        let Routes { tokens, count, top, .. } = *routes;
        assert_routing(self, factors, *routing);
        assert_eq!((count, top), (routing.experts, routing.top), "the routing that chose the routes");
        assert!(d_weights.dtype == DType::F32 && (d_weights.rows, d_weights.cols) == (tokens, top));
        let trained = d_factors.rows > 0;
        assert!(d_factors.dtype == DType::F32 && d_factors.rows <= 1 && d_factors.cols == count);
        let d_scores = self.empty(DType::Bf16, tokens, count);
        let args =
            [d_weights.arg(), routes.experts.arg(), routes.shares.arg(), factors.arg(), d_scores.arg()];
        let sizes: [Arg; 4] = [tokens.into(), count.into(), top.into(), routing.scale.into()];
        self.launch(Entry::RouteBackward, warps(tokens), &[&args[..], &sizes].concat());
        if !trained {
            return d_scores;
        }
        let args = [
            d_weights.arg(),
            routes.shares.arg(),
            routes.first.arg(),
            routes.order.arg(),
            d_factors.arg(),
            count.into(),
        ];
        self.launch(Entry::RouteBackwardFactors, warps(count), &args);
        d_scores
    }

    /// Every row's bits are the same for any T, and with `keep` or without.
    fn experts_forward(
        &self,
        x: &Tensor,
        routes: &Routes,
        gate_up: &Tensor,
        down: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<ExpertTrace<Tensor>>) {
        assert_weights(routes, x.cols, gate_up, down);
        let x = dispatch(self, x, routes);
        let (product, kept) = geglu_forward(self, &x, routes, gate_up, keep);
        let out = matmul_forward(self, &product, routes, down);
        let y = combine(self, &out, routes, true);
        (y, kept.map(|(gate, up)| ExpertTrace { gate, up, product }))
    }

    fn experts_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        routes: &Routes,
        trace: &ExpertTrace<Tensor>,
        (gate_up, d_gate_up): (&Tensor, &mut Tensor),
        (down, d_down): (&Tensor, &mut Tensor),
    ) -> (Tensor, Tensor) {
        assert_weights(routes, x.cols, gate_up, down);
        let d_out = dispatch(self, dy, routes);
        let d_product = matmul_backward_input(self, &d_out, routes, down);
        let (d_weights, weighted, d_both) = geglu_backward(self, &d_product, routes, trace);
        drop(d_product);
        matmul_backward_weight(self, &d_out, &weighted, routes, d_down);
        drop((d_out, weighted));
        let x = dispatch(self, x, routes);
        matmul_backward_weight(self, &d_both, &x, routes, d_gate_up);
        drop(x);
        let dx = matmul_backward_input(self, &d_both, routes, gate_up);
        (combine(self, &dx, routes, false), d_weights)
    }
}

/// Each token of x `[T, cols]` in its rows `[T G, cols]`.
fn dispatch(cuda: &Cuda, x: &Tensor, routes: &Routes) -> Tensor {
    assert_bf16("x", x, routes.tokens);
    let to = cuda.empty(DType::Bf16, routes.len(), x.cols);
    let args = [x.arg(), routes.rows.arg(), to.arg(), routes.top.into(), x.cols.into()];
    cuda.launch(Entry::ExpertsDispatch, Launch::linear(routes.tokens, threads(x.cols / VECTOR)), &args);
    to
}

/// The sum over each token's rows of x `[T G, cols]`, times the weights of their routes or without: `[T, cols]`.
fn combine(cuda: &Cuda, x: &Tensor, routes: &Routes, weighted: bool) -> Tensor {
    assert_bf16("x", x, routes.len());
    let y = cuda.empty(DType::Bf16, routes.tokens, x.cols);
    let weights = if weighted { routes.weights.arg() } else { Arg::Ptr(Ptr(0)) };
    let args = [x.arg(), routes.rows.arg(), weights, y.arg(), routes.top.into(), x.cols.into()];
    cuda.launch(Entry::ExpertsCombine, Launch::linear(routes.tokens, threads(x.cols / VECTOR)), &args);
    y
}

/// The last arguments of a product with a pile of weights, each `[out, in]`.
fn sizes(routes: &Routes, out: usize, width: usize) -> [Arg; 4] {
    [routes.first.arg(), routes.count.into(), out.into(), width.into()]
}

/// H, gate and up `[T G, Fe]`, the last two if they are kept, of x `[T G, D]` and w `[E 2 Fe, D]`.
fn geglu_forward(
    cuda: &Cuda,
    x: &Tensor,
    routes: &Routes,
    w: &Tensor,
    keep: bool,
) -> (Tensor, Option<(Tensor, Tensor)>) {
    let features = w.rows / (2 * routes.count);
    let variant = routes.variant(cuda, &TILES, 2 * features);
    let entry = match variant {
        T32X64 => Entry::ExpertsGegluForward32x64,
        T64X64 => Entry::ExpertsGegluForward64x64,
        _ => Entry::ExpertsGegluForward128x128,
    };
    let empty = || cuda.empty(DType::Bf16, routes.len(), features);
    let h = empty();
    let kept = keep.then(|| (empty(), empty()));
    let none = Arg::Ptr(Ptr(0));
    let (gate, up) = kept.as_ref().map_or((none.clone(), none), |(gate, up)| (gate.arg(), up.arg()));
    let args = [&[x.arg(), w.arg(), h.arg(), gate, up][..], &sizes(routes, features, x.cols)].concat();
    cuda.launch(entry, routes.launch(variant, 2 * features), &args);
    (h, kept)
}

/// `[T G, out]`, of x `[T G, in]` and w `[E out, in]`.
fn matmul_forward(cuda: &Cuda, x: &Tensor, routes: &Routes, w: &Tensor) -> Tensor {
    let out = w.rows / routes.count;
    let variant = routes.variant(cuda, &TILES, out);
    let entry = match variant {
        T32X64 => Entry::ExpertsMatmulForward32x64,
        T64X64 => Entry::ExpertsMatmulForward64x64,
        _ => Entry::ExpertsMatmulForward128x128,
    };
    let y = cuda.empty(DType::Bf16, routes.len(), out);
    let args = [&[x.arg(), w.arg(), y.arg()][..], &sizes(routes, out, x.cols)].concat();
    cuda.launch(entry, routes.launch(variant, out), &args);
    y
}

/// `[T G, in]`, of dy `[T G, out]` and w `[E out, in]`.
fn matmul_backward_input(cuda: &Cuda, dy: &Tensor, routes: &Routes, w: &Tensor) -> Tensor {
    let variant = routes.variant(cuda, &TILES[..2], w.cols);
    let entry = match variant {
        T64X64 => Entry::ExpertsMatmulBackwardInput64x64,
        _ => Entry::ExpertsMatmulBackwardInput128x128,
    };
    let dx = cuda.empty(DType::Bf16, routes.len(), w.cols);
    let args = [&[dy.arg(), w.arg(), dx.arg()][..], &sizes(routes, dy.cols, w.cols)].concat();
    cuda.launch(entry, routes.launch(variant, w.cols), &args);
    dx
}

/// dw `[E out, in]` += dy^T x of each expert's rows: dy `[T G, out]`, x `[T G, in]`.
fn matmul_backward_weight(cuda: &Cuda, dy: &Tensor, x: &Tensor, routes: &Routes, dw: &mut Tensor) {
    if dw.rows == 0 {
        return;
    }
    assert_eq!((dw.rows, dw.cols), (routes.count * dy.cols, x.cols), "dW [E out, in]");
    if x.rows == 0 {
        return;
    }
    let variant = Variant::large(dy.cols, x.cols, routes.count, cuda.device().multiprocessors());
    let entry = match (variant, dw.dtype) {
        (T64X64, DType::F32) => Entry::ExpertsMatmulBackwardWeight64x64,
        (T64X64, DType::Bf16) => Entry::ExpertsMatmulBackwardWeightBf1664x64,
        (_, DType::F32) => Entry::ExpertsMatmulBackwardWeight128x128,
        (_, DType::Bf16) => Entry::ExpertsMatmulBackwardWeightBf16128x128,
    };
    let mut launch = variant.launch(x.cols.div_ceil(variant.n), dy.cols.div_ceil(variant.m));
    launch.grid[2] = narrow(routes.count);
    let args = [dy.arg(), x.arg(), dw.arg(), routes.first.arg(), dy.cols.into(), x.cols.into()];
    cuda.launch(entry, launch, &args);
}

/// Of the gradient of h by rows, which has not met the weights of routes: d_weights `[T, G]`, h times the weights, and the
/// gradients of gate and up side by side `[T G, 2 Fe]`.
fn geglu_backward(
    cuda: &Cuda,
    dh: &Tensor,
    routes: &Routes,
    trace: &ExpertTrace<Tensor>,
) -> (Tensor, Tensor, Tensor) {
    let features = dh.cols;
    for x in [dh, &trace.gate, &trace.up, &trace.product] {
        assert_bf16("what the forward pass kept", x, routes.len());
        assert_eq!(x.cols, features, "columns of what the forward pass kept");
    }
    let weighted = cuda.empty(DType::Bf16, routes.len(), features);
    let d_both = cuda.empty(DType::Bf16, routes.len(), 2 * features);
    let d_weights = cuda.empty(DType::F32, routes.tokens, routes.top);
    let inputs = [dh, &trace.gate, &trace.up, &trace.product].map(Tensor::arg);
    let outputs = [&weighted, &d_both, &d_weights].map(Tensor::arg);
    let by_route = [routes.order.arg(), routes.weights.arg()];
    let sizes: [Arg; 2] = [routes.len().into(), features.into()];
    let args = [&inputs[..], &by_route, &outputs, &sizes].concat();
    cuda.launch(Entry::ExpertsGegluBackward, warps(routes.len()), &args);
    (d_weights, weighted, d_both)
}

/// Whether the piles of weights fit.
fn assert_weights(routes: &Routes, d: usize, gate_up: &Tensor, down: &Tensor) {
    let features = down.cols;
    assert_bf16("gate_up", gate_up, routes.count * 2 * features);
    assert_bf16("down", down, routes.count * d);
    assert_eq!(gate_up.cols, d, "gate_up [E 2 Fe, D] and down [E D, Fe]");
}
