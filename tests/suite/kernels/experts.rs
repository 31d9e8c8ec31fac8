//! Tiles are chosen by the rows that an expert has on average, and by the multiprocessors (src/backend/cuda/experts.rs): on the
//! virtual GPU, which has 108, the sizes below take the smallest tiles, and on one of a single multiprocessor all others.

use std::collections::BTreeSet;
use std::sync::Arc;

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cpu::experts::Routes as CpuRoutes;
use bon_engine::backend::cuda::entries::MODULES;
use bon_engine::backend::cuda::{Cuda, Tensor, experts::HostRoutes};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, DType, ExpertTrace, Routing};
use bon_engine::device::vm::{Checks, Options, Report, Vm};

use super::matmul::overhead;
use super::{
    Case, activation, activation_of, activation_up_to, check, coalescing, counted, counting, devices, orders,
    outputs, rounded, single, single_of, traffic, vm_in, weight, workloads_of,
};
use crate::ops::{bits, randoms};
use crate::tolerance::{EPS, Rule, assert_within};

/// Which experts tokens prefer.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scores {
    /// Any.
    Random,
    /// Any, of few different scores: most have equals.
    Ties,
    /// All tokens the same ones, from the last on.
    Last,
}

/// A mixture and a batch.
#[derive(Debug, Clone, Copy)]
struct Mixture {
    tokens: usize,
    experts: usize,
    top: usize,
    /// D.
    width: usize,
    /// Fe.
    features: usize,
    scores: Scores,
}

const SCALE: f32 = 1.7;

impl Mixture {
    const fn new([tokens, experts, top]: [usize; 3], [width, features]: [usize; 2], scores: Scores) -> Self {
        Self { tokens, experts, top, width, features, scores }
    }

    fn routing(&self) -> Routing {
        Routing { experts: self.experts, top: self.top, scale: SCALE }
    }

    fn score(&self, i: usize, random: f32) -> f32 {
        match self.scores {
            Scores::Random => 4.0 * random,
            Scores::Ties => (2.0 * random).round(),
            Scores::Last => (i % self.experts) as f32 / 8.0,
        }
    }

    fn scores<B: Backend>(&self, b: &B) -> B::Tensor {
        let random = randoms(1, self.tokens * self.experts);
        let scores: Vec<f32> = random.iter().enumerate().map(|(i, x)| self.score(i, *x)).collect();
        activation_of(b, self.tokens, self.experts, &scores)
    }

    fn routes<B: Backend>(&self, b: &B) -> B::Routes {
        b.route_forward(&self.scores(b), &weight(b, 2, 1, self.experts), &self.routing())
    }

    /// The weights: gate and up, and down.
    fn weights<B: Backend>(&self, b: &B) -> (B::Tensor, B::Tensor) {
        let Mixture { experts, width, features, .. } = *self;
        (weight(b, 3, experts * 2 * features, width), weight(b, 4, experts * width, features))
    }
}

/// Every count of routes, tokens and columns by itself: one token, all experts, more experts than routes, experts without a row and
/// experts with all, last tiles of all lengths.
const MIXTURES: [Mixture; 12] = [
    Mixture::new([1, 8, 1], [8, 8], Scores::Random),
    Mixture::new([1, 8, 8], [24, 16], Scores::Random),
    Mixture::new([3, 16, 16], [40, 72], Scores::Ties),
    Mixture::new([5, 16, 3], [72, 40], Scores::Random),
    Mixture::new([33, 8, 2], [136, 72], Scores::Ties),
    Mixture::new([7, 128, 8], [64, 24], Scores::Random),
    Mixture::new([5, 256, 32], [16, 8], Scores::Ties),
    Mixture::new([70, 24, 1], [72, 64], Scores::Last),
    Mixture::new([67, 16, 2], [72, 136], Scores::Last),
    Mixture::new([129, 8, 1], [136, 40], Scores::Last),
    Mixture::new([120, 8, 2], [72, 136], Scores::Random),
    Mixture::new([200, 8, 2], [200, 56], Scores::Random),
];

/// A virtual GPU of one multiprocessor, to which small products are large.
fn alone(checks: Checks) -> Cuda {
    let vm = Vm::new(Options { checks, counters: false, ..Options::default() }).with_multiprocessors(1);
    Cuda::new(Box::new(vm)).expect("the kernels load")
}

/// [`check`], and the same bits in other tiles.
#[track_caller]
fn check_tiles(what: &[&str], rule: Rule, case: &impl Case) {
    check(what, rule, case);
    if counting() {
        let few = outputs(&alone(Options::default().checks), case);
        let many = outputs(&vm_in(Options::default().mma), case);
        for ((few, many), what) in few.iter().zip(&many).zip(what) {
            assert_eq!(bits(few), bits(many), "{what}: other bits in other tiles");
        }
    }
}

// ------------------------------------------------------------------------------------------------------------- routes

/// Holds the routes of a device to those of the CPU: the same experts and rows, and shares that are as wrong as f32 is.
fn assert_routes(got: &HostRoutes, want: &CpuRoutes, scores: &[f32], factors: &[f32], count: usize) {
    assert_eq!(got.experts, want.experts, "experts");
    assert_eq!(got.first.iter().map(|&n| n as usize).collect::<Vec<_>>(), want.first, "first rows");
    assert_eq!(got.order, want.order, "order");
    for (row, &route) in got.order.iter().enumerate() {
        assert_eq!(got.rows[route as usize], row as u32, "rows are the order's inverse");
    }
    // By the formula, in f64.
    let score = |route: usize| f64::from(scores[route / want.top * count + got.experts[route] as usize]);
    let mut shares = Vec::new();
    let mut errors = Vec::new();
    for first in (0..got.experts.len()).step_by(want.top) {
        let of_token = first..first + want.top;
        let argument = |route: usize| f64::from(SCALE) * (score(route) - score(first));
        let sum: f64 = of_token.clone().map(|route| argument(route).exp()).sum();
        let farthest = argument(first + want.top - 1).abs();
        for route in of_token {
            shares.push(argument(route).exp() / sum);
            // The argument has two roundings, exp is good to two ulp, of this choice and of those that are summed; the sum has G
            // roundings, the quotient one.
            let of = |argument: f64| argument + 2.0;
            errors.push(EPS * (of(argument(route).abs()) + of(farthest) + want.top as f64 / 2.0 + 0.5));
        }
    }
    assert_within("shares", &got.shares, &shares, |route| errors[route] * shares[route]);
    let factor = |route: usize| f64::from(factors[got.experts[route] as usize]);
    let weights: Vec<f64> = shares.iter().enumerate().map(|(route, share)| share * factor(route)).collect();
    assert_within("weights", &got.weights, &weights, |route| {
        (errors[route] + EPS / 2.0) * weights[route].abs()
    });
}

#[test]
fn routes_are_those_of_the_cpu() {
    for cuda in devices() {
        // Also so many routes that a warp of a block has several times 32.
        for mixture in MIXTURES.into_iter().chain([Mixture::new([700, 16, 4], [8, 8], Scores::Ties)]) {
            let (scores, factors) = (mixture.scores(&Cpu::F32), weight(&Cpu::F32, 2, 1, mixture.experts));
            let got = mixture.routes(&cuda).to_host(&cuda);
            cuda.check().expect("no finding");
            let factors = Cpu::F32.to_f32(&factors);
            assert_routes(&got, &mixture.routes(&Cpu::F32), scores.as_f32(), &factors, mixture.experts);
        }
    }
}

/// Zeros of both signs are equals, infinity is a score like others, and what is no number is taken and shows.
#[test]
fn scores_of_every_kind() {
    const E: usize = 16;
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let rows: [&[f32]; 6] = [
        &[-0.0, 0.0, -0.0, 0.0, -1.0],
        &[-1.0, -2.0, -0.5, -3e38, -0.0, -inf, -1e-39],
        &[inf, 1.0, -inf, 2.0],
        &[1.0, nan, 2.0],
        &[3.0; E],
        &[-3.0; E],
    ];
    // What a row does not name is far below.
    let scores: Vec<f32> =
        rows.iter().flat_map(|row| (0..E).map(|i| row.get(i).copied().unwrap_or(-1e9))).collect();
    let routing = Routing { experts: E, top: 5, scale: 0.5 };
    fn run<B: Backend>(b: &B, scores: &[f32], routing: &Routing) -> B::Routes {
        let rows = scores.len() / E;
        b.route_forward(&activation_of(b, rows, E, scores), &weight(b, 1, 1, E), routing)
    }
    for cuda in devices() {
        let (got, want) = (run(&cuda, &scores, &routing).to_host(&cuda), run(&Cpu::F32, &scores, &routing));
        assert_eq!((&got.experts, &got.order), (&want.experts, &want.order));
        assert_eq!(got.experts[..5], [0, 1, 2, 3, 4]);
        // NaN, and the row with it, and no other but that with infinity.
        assert_eq!(got.experts[15], 1);
        for (row, shares) in got.shares.chunks_exact(5).enumerate() {
            assert_eq!(shares.iter().all(|share| share.is_finite()), row != 3 && row != 2, "row {row}");
        }
    }
}

struct RouteBackward(Mixture);

impl Case for RouteBackward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Mixture { tokens, experts, top, .. } = self.0;
        let (routes, factors) = (self.0.routes(b), weight(b, 2, 1, experts));
        let d_weights = single(b, 5, tokens, top);
        let mut d_factors = single(b, 6, 1, experts);
        let d_scores = b.route_backward(&d_weights, &routes, &self.0.routing(), (&factors, &mut d_factors));
        vec![d_scores, d_factors]
    }
}

#[test]
fn gradients_of_routes() {
    for mixture in MIXTURES.into_iter().chain([Mixture::new([700, 16, 4], [8, 8], Scores::Ties)]) {
        check(&["dscores", "dfactors"], Rule::Backward, &RouteBackward(mixture));
    }
}

/// 0 of every expert that a token does not go to, and the factors of experts without a row keep their gradient.
#[test]
fn experts_without_a_row_have_no_gradient() {
    let mixture = Mixture::new([70, 16, 2], [72, 136], Scores::Last);
    for cuda in devices() {
        let [d_scores, d_factors] = outputs(&cuda, &RouteBackward(mixture)).try_into().expect("two");
        for scores in d_scores.as_f32().chunks_exact(16) {
            assert!(scores[..14].iter().all(|d| d.to_bits() == 0) && scores[14..].iter().all(|d| *d != 0.0));
        }
        let before = randoms(6, 16);
        assert_eq!(d_factors.as_f32()[..14], before[..14]);
        assert!((14..16).all(|e| d_factors.as_f32()[e] != before[e]));
        // What experts compute: the last two piles are added to.
        let gradients = outputs(&cuda, &Backward(mixture));
        for (pile, gradient, seed) in [(2 * 136 * 72, &gradients[2], 11), (72 * 136, &gradients[3], 12)] {
            let (got, before) = (gradient.as_f32(), randoms(seed, 16 * pile));
            assert_eq!(got[..14 * pile], before[..14 * pile]);
            for (got, before) in got.chunks_exact(pile).zip(before.chunks_exact(pile)).skip(14) {
                let kept = got.iter().zip(before).filter(|(got, before)| got == before).count();
                assert!(kept < pile / 100, "{kept} of {pile} are as before");
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ experts

/// y, and what is kept.
struct Forward {
    mixture: Mixture,
    keep: bool,
}

impl Case for Forward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (routes, (gate_up, down)) = (self.mixture.routes(b), self.mixture.weights(b));
        let x = activation(b, 5, self.mixture.tokens, self.mixture.width);
        let (y, kept) = b.experts_forward(&x, &routes, &gate_up, &down, self.keep);
        match kept.filter(|_| self.keep) {
            Some(ExpertTrace { gate, up, product }) => vec![y, gate, up, product],
            None => vec![y],
        }
    }
}

#[test]
fn experts_in_all_tiles() {
    for (i, mixture) in MIXTURES.into_iter().enumerate() {
        let keep = i % 3 != 0;
        let names = ["y", "gate", "up", "product"];
        check_tiles(&names[..if keep { 4 } else { 1 }], Rule::Forward, &Forward { mixture, keep });
    }
}

/// dx, d_weights, and the gradients of the weights added to what was there. The trace is any.
struct Backward(Mixture);

impl Case for Backward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Mixture { experts, width, features, .. } = self.0;
        let d_gate_up = single(b, 11, experts * 2 * features, width);
        self.add(b, d_gate_up, single(b, 12, experts * width, features))
    }
}

/// The same from what bf16 holds, in bf16 or in f32.
struct FromBf16(Mixture, DType);

impl Case for FromBf16 {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Mixture { experts, width, features, .. } = self.0;
        let begin = |seed, rows, cols| match self.1 {
            DType::F32 => single_of(b, rows, cols, &rounded(&randoms(seed, rows * cols))),
            DType::Bf16 => weight(b, seed, rows, cols),
        };
        let d_gate_up = begin(11, experts * 2 * features, width);
        Backward(self.0).add(b, d_gate_up, begin(12, experts * width, features))
    }
}

impl Backward {
    /// Adds to these gradients of the weights.
    fn add<B: Backend>(&self, b: &B, mut d_gate_up: B::Tensor, mut d_down: B::Tensor) -> Vec<B::Tensor> {
        let Mixture { tokens, top, width, features, .. } = self.0;
        let (routes, (gate_up, down)) = (self.0.routes(b), self.0.weights(b));
        let [x, dy] = [5, 6].map(|seed| activation(b, seed, tokens, width));
        let kept = |seed| activation(b, seed, tokens * top, features);
        let gate = activation_up_to(b, 4.0, 7, tokens * top, features);
        let trace = ExpertTrace { gate, up: kept(8), product: kept(9) };
        let weights = ((&gate_up, &mut d_gate_up), (&down, &mut d_down));
        let (dx, d_weights) = b.experts_backward(&dy, &x, &routes, &trace, weights.0, weights.1);
        vec![dx, d_weights, d_gate_up, d_down]
    }
}

#[test]
fn gradients_of_experts_in_all_tiles() {
    for mixture in MIXTURES {
        check_tiles(&["dx", "dweights", "dgate_up", "ddown"], Rule::Backward, &Backward(mixture));
    }
}

/// A gradient in bf16 is that in f32, rounded once, on the CPU and in every tile.
#[test]
fn gradients_in_bf16_are_those_in_f32_rounded_once() {
    fn holds<B: Backend>(b: &B) {
        for mixture in MIXTURES {
            let wide = outputs(b, &FromBf16(mixture, DType::F32));
            let narrow = outputs(b, &FromBf16(mixture, DType::Bf16));
            for (i, (wide, narrow)) in wide.iter().zip(&narrow).enumerate().skip(2) {
                assert!(rounded(wide.as_f32()) == narrow.as_f32(), "output {i} on {}", b.device_name());
            }
        }
    }
    holds(&Cpu::F32);
    devices().iter().for_each(holds);
    if counting() {
        holds(&Cuda::new(Box::new(Vm::new(Options::default()).with_multiprocessors(1))).expect("they load"));
    }
}

/// The sizes above launch every kernel of the file.
#[test]
fn every_kernel_is_reached() {
    if !counting() {
        return;
    }
    let mut reached = BTreeSet::new();
    for multiprocessors in [1, 108] {
        let vm = Vm::new(Options { checks: Checks::NONE, counters: false, ..Options::default() });
        let vm = Arc::new(vm.with_multiprocessors(multiprocessors));
        let cuda = Cuda::new(Box::new(Arc::clone(&vm))).expect("the kernels load");
        vm.keep_reports();
        for mixture in MIXTURES {
            outputs(&cuda, &RouteBackward(mixture));
            outputs(&cuda, &Forward { mixture, keep: true });
            outputs(&cuda, &Backward(mixture));
            outputs(&cuda, &FromBf16(mixture, DType::Bf16));
        }
        reached.extend(vm.take_reports().into_iter().map(|report| report.kernel));
    }
    let module = MODULES.iter().find(|module| module.name == "experts").expect("it is one");
    for entry in module.entries {
        assert!(reached.contains(entry.name()), "no size launches {}", entry.name());
    }
}

#[test]
fn no_tokens_are_nothing_to_do() {
    let mixture = Mixture::new([0, 8, 2], [16, 24], Scores::Random);
    for b in devices() {
        assert_eq!(mixture.routes(&b).to_host(&b).first, [0; 9]);
        let forward = outputs(&b, &Forward { mixture, keep: true });
        assert_eq!(
            forward.iter().map(|x| (x.rows, x.cols)).collect::<Vec<_>>(),
            [(0, 16), (0, 24), (0, 24), (0, 24)]
        );
        let backward = outputs(&b, &Backward(mixture));
        assert_eq!((backward[0].rows, backward[0].cols, backward[1].rows, backward[1].cols), (0, 16, 0, 2));
        assert_eq!(backward[2].as_f32(), randoms(11, 8 * 48 * 16));
        assert_eq!(backward[3].as_f32(), randoms(12, 8 * 16 * 24));
        assert_eq!(outputs(&b, &RouteBackward(mixture))[1].as_f32(), randoms(6, 8));
    }
}

/// Some rows of a bf16 matrix.
fn part(bytes: &[u8], cols: usize, rows: &[u32]) -> Vec<u8> {
    rows.iter().flat_map(|&r| bytes[r as usize * cols * 2..][..cols * 2].to_vec()).collect()
}

/// Of 200 tokens, in the largest tiles, every choice of tokens in the smallest has the same bits: y, dx, and the scores' gradient.
#[test]
fn a_row_has_the_same_bits_in_any_batch_and_tile() {
    const T: u32 = 200;
    let Mixture { experts, width, features, .. } = MIXTURES[11];
    // The GPUs, in each order of products, and one that takes the largest tiles for all tokens.
    let mut all: Vec<Cuda> = orders();
    if counting() {
        all.push(alone(Checks::NONE));
    }
    for b in all {
        let mixture = Mixture { tokens: T as usize, ..MIXTURES[11] };
        let (gate_up, down) = mixture.weights(&b);
        let factors = weight(&b, 2, 1, experts);
        let [x, dy] = [5, 6].map(|seed| activation(&b, seed, T as usize, width));
        let scores = mixture.scores(&b);
        let run = |x: &Tensor, dy: &Tensor, scores: &Tensor, keep: bool| {
            let routes = b.route_forward(scores, &factors, &mixture.routing());
            let (y, kept) = b.experts_forward(x, &routes, &gate_up, &down, keep);
            let Some(trace) = kept else { return vec![b.download(&y)] };
            let mut d_gate_up = single(&b, 11, experts * 2 * features, width);
            let mut d_down = single(&b, 12, experts * width, features);
            let weights = ((&gate_up, &mut d_gate_up), (&down, &mut d_down));
            let (dx, d_weights) = b.experts_backward(dy, x, &routes, &trace, weights.0, weights.1);
            let mut d_factors = single(&b, 6, 1, experts);
            let d_scores =
                b.route_backward(&d_weights, &routes, &mixture.routing(), (&factors, &mut d_factors));
            [&y, &dx, &d_scores].map(|x| b.download(x)).into()
        };
        let all = run(&x, &dy, &scores, true);
        let batches: [Vec<u32>; 5] =
            [vec![77], vec![129, 3, 64, 199, 0], (50..83).collect(), (66..T).collect(), (0..T).collect()];
        for rows in batches {
            let [x, dy, scores] = [&x, &dy, &scores].map(|x| b.gather_rows(x, &rows));
            let of_all = |i: usize, cols: usize| part(&all[i], cols, &rows);
            let want = vec![of_all(0, width), of_all(1, width), of_all(2, experts)];
            let what = format!("{} rows from {}", rows.len(), rows[0]);
            assert!(run(&x, &dy, &scores, true) == want, "{what}");
            assert!(run(&x, &dy, &scores, false) == want[..1], "{what}: y that keeps nothing");
        }
        b.check().expect("no error");
    }
}

/// A row that holds no numbers spoils none but its own: neither those that share its experts nor those whose experts are next.
#[test]
fn what_is_not_a_number_stays_in_its_row() {
    let mixture = MIXTURES[4];
    for b in devices() {
        let (routes, (gate_up, down)) = (mixture.routes(&b), mixture.weights(&b));
        let mut x = randoms(5, mixture.tokens * mixture.width);
        x[17 * mixture.width..18 * mixture.width].fill(f32::NAN);
        let x = activation_of(&b, mixture.tokens, mixture.width, &x);
        let (y, _) = b.experts_forward(&x, &routes, &gate_up, &down, false);
        for (t, y) in b.to_f32(&y).chunks_exact(mixture.width).enumerate() {
            assert!(y.iter().all(|y| y.is_nan() == (t == 17)), "row {t}");
        }
        b.check().expect("no error");
    }
}

/// What a launch requested in sectors, over what it would if coalesced.
fn coalescing_of(report: &Report) -> f64 {
    coalescing(std::slice::from_ref(report))
}

#[test]
fn routes_are_found_without_detours() {
    if !counting() {
        return;
    }
    for workload in workloads_of("route_") {
        let reports = counted(&workload);
        for report in &reports {
            let (kernel, coalescing) = (&report.kernel, coalescing_of(report));
            // What a token's experts or an expert's routes name lies anywhere: 2 bytes of a factor, 4 of a weight's gradient.
            let most = match kernel.as_str() {
                "route_order" => 1.05,
                "route_backward_factors" => 6.0,
                _ => 1.4,
            };
            assert!(coalescing <= most, "{}: {kernel} {coalescing}", workload.name);
            assert_eq!(report.local.requests, 0, "{kernel}");
        }
        // The experts are written and read.
        let traffic = traffic(&workload, &reports);
        assert!(traffic <= 1.2, "{}: {traffic}", workload.name);
    }
}

/// A mixture of 8 experts, and the launches of both passes on a GPU of so many multiprocessors.
fn passes(tokens: usize, multiprocessors: u32) -> (Mixture, Vec<Report>) {
    let mixture = Mixture::new([tokens, 8, 4], [512, 256], Scores::Random);
    let vm = Vm::new(Options { checks: Checks::NONE, ..Options::default() });
    let vm = Arc::new(vm.with_multiprocessors(multiprocessors));
    let cuda = Cuda::new(Box::new(Arc::clone(&vm))).expect("the kernels load");
    vm.keep_reports();
    outputs(&cuda, &Forward { mixture, keep: true });
    let mut reports = vm.take_reports();
    outputs(&cuda, &Backward(mixture));
    reports.extend(vm.take_reports().into_iter().filter(|report| report.kernel.contains("backward")));
    (mixture, reports)
}

#[test]
fn work_is_lean() {
    if !counting() {
        return;
    }
    let (large, small) = (passes(300, 1).1, passes(8, 108).1);
    for report in large.iter().chain(&small).filter(|report| report.kernel.starts_with("experts")) {
        let conflicts = report.shared.wavefronts as f64 / report.shared.ideal_wavefronts.max(1) as f64;
        let coalescing = coalescing_of(report);
        let what = format!("{}: sectors {coalescing:.3}, shared {conflicts:.3}", report.kernel);
        assert!(coalescing <= 1.0 && conflicts <= 1.0, "{what}");
        assert_eq!(report.local.requests, 0, "{what}");
    }
    let products: Vec<&Report> = large.iter().filter(|report| report.kernel.ends_with("128x128")).collect();
    assert_eq!(products.len(), 6, "two products forward, two of inputs and two of weights");
    for report in products {
        assert!(overhead(report) <= 1.0, "{}: {} instructions per product", report.kernel, overhead(report));
    }
}

/// Of an expert whose rows fit a tile each byte of the weights is asked for once, and of an expert without a row none.
#[test]
fn weights_are_read_once() {
    if !counting() {
        return;
    }
    let (Mixture { tokens, experts, top, width, features, .. }, reports) = passes(8, 108);
    let mixture = Mixture::new([tokens, experts, top], [width, features], Scores::Random);
    let first = mixture.routes(&Cpu::F32).first;
    let counts: Vec<usize> = first.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(counts.iter().all(|n| *n <= 32), "{counts:?}");
    let taken = counts.iter().filter(|n| **n > 0).count();
    let rows = tokens * top;
    for (kernel, out, k, stored) in [
        ("experts_geglu_forward_32x64", 2 * features, width, 3 * features),
        ("experts_matmul_forward_32x64", width, features, width),
    ] {
        let report = reports.iter().find(|report| report.kernel == kernel).expect("it is launched");
        // Each of a block's 4 warps looks at the first rows, 9 for 8 experts.
        let looked = report.grid[0] as usize * 4 * experts / 8 * 9 * 4;
        let operands = 2 * (taken * out * k + rows * k * out / 64);
        assert_eq!(report.global.bytes, (looked + operands + 2 * rows * stored) as u64, "{kernel}");
    }
}
