//! The reference is the formula in f64, token by token and choice by choice, with a running error analysis (Wilkinson 1963): every
//! number carries how far off its twin in f32 may be.

use bon_engine::backend::cpu::experts::{Routes, backward, forward};
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Compute, Routing};
use half::bf16;

use super::{bits, laid_out, random, random_bf16, randoms, same_everywhere, wide};
use crate::tolerance::{BF16_ROUNDOFF, DERIVATIVE_ERROR, EPS, assert_within, derivative};

/// What weights are stored in, and what products are computed in.
const KINDS: [(bool, Compute); 3] = [(false, Compute::F32), (true, Compute::F32), (true, Compute::Bf16)];

/// A number, and how far off it may be in f32.
#[derive(Debug, Clone, Copy, Default)]
struct Near {
    x: f64,
    off: f64,
}

impl Near {
    fn exact(x: f64) -> Self {
        Self { x, off: 0.0 }
    }

    fn times(self, y: Self) -> Self {
        let x = self.x * y.x;
        let off = self.x.abs() * y.off + y.x.abs() * self.off + self.off * y.off;
        Self { x, off: off + EPS / 2.0 * (x.abs() + off) }
    }

    fn over(self, y: Self) -> Self {
        let x = self.x / y.x;
        let off = (self.off + x.abs() * y.off) / (y.x.abs() - y.off);
        Self { x, off: off + EPS / 2.0 * (x.abs() + off) }
    }

    fn minus(self, y: Self) -> Self {
        sum([self, Self { x: -y.x, ..y }])
    }

    /// exp in f32 is good to two ulp.
    fn exp(self) -> Self {
        let x = self.x.exp();
        Self { x, off: x * (self.off.exp_m1() + 2.0 * EPS) }
    }

    /// As an operand of a product.
    fn entering(self, compute: Compute) -> Self {
        match compute {
            Compute::F32 => self,
            Compute::Bf16 if self.off == 0.0 => Self::exact(bf16::from_f64(self.x).to_f64()),
            Compute::Bf16 => Self { off: self.off + 2.0 * BF16_ROUNDOFF * (self.x.abs() + self.off), ..self },
        }
    }
}

/// In any order: each addition rounds a sum of some of the terms.
fn sum(terms: impl IntoIterator<Item = Near>) -> Near {
    let (mut n, mut x, mut off, mut size) = (0.0, 0.0, 0.0, 0.0);
    for term in terms {
        (n, x, off, size) = (n + 1.0, x + term.x, off + term.off, size + term.x.abs() + term.off);
    }
    Near { x, off: off + n * EPS / 2.0 * size }
}

const CUBIC: f64 = 0.044715;

/// The logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3), by which gelu multiplies, and its derivative.
fn gate(x: f64) -> (f64, f64) {
    let factor = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    let s = 1.0 / (1.0 + (-factor * (x + CUBIC * x * x * x)).exp());
    (s, s * (1.0 - s) * factor * (1.0 + 3.0 * CUBIC * x * x))
}

/// Relative error of a gate: its argument has 4 roundings, and 8 others follow (`geglu`'s tests).
fn gate_error(x: f64) -> f64 {
    (8.0 + 8.0 * (0.8 * (x + CUBIC * x * x * x)).abs()) * EPS
}

fn gelu(x: Near) -> Near {
    let y = x.x * gate(x.x).0;
    // Its slope is at most 1.13.
    Near { x: y, off: 1.13 * x.off + gate_error(x.x) * y.abs() }
}

fn gelu_slope(x: Near) -> Near {
    let (s, slope) = gate(x.x);
    // The second derivative is at most 0.8.
    let off = 0.8 * x.off + gate_error(x.x) * (s + (x.x * slope).abs());
    Near { x: s + x.x * slope, off }
}

/// A mixture of E experts of width Fe for T tokens of D columns, each of which goes to G of them.
struct Case {
    compute: Compute,
    routing: Routing,
    scores: Tensor,
    factors: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    dy: Tensor,
    /// What the gradients of factors, gate_up and down hold before.
    before: [Tensor; 3],
}

/// Its results, in this order.
const NAMES: [&str; 9] =
    ["shares", "weights", "y", "dx", "d_weights", "d_gate_up", "d_down", "d_scores", "d_factors"];

fn values(x: &Tensor) -> Vec<f64> {
    Cpu::F32.to_f32(x).iter().map(|&x| f64::from(x)).collect()
}

impl Case {
    fn new([t, e, top, d, width]: [usize; 5], (bf16, compute): (bool, Compute)) -> Self {
        let weights = |seed, rows, cols| match bf16 {
            true => laid_out(&random_bf16(seed, rows, cols).0),
            false => random(seed, rows, cols),
        };
        // In each row a permutation, so that no score is near another.
        let score = |(i, x): (usize, f32)| ((i % e * 7 + i / e * 3) % e.max(8)) as f32 / 4.0 + 0.1 * x;
        let scores: Vec<f32> = randoms(1, t * e).into_iter().enumerate().map(score).collect();
        Self {
            compute,
            routing: Routing { experts: e, top, scale: 0.7 },
            scores: Tensor::f32(t, e, scores),
            factors: weights(2, 1, e),
            x: random(3, t, d),
            gate_up: weights(4, e * 2 * width, d),
            down: weights(5, e * d, width),
            dy: random(6, t, d),
            before: [random(7, 1, e), random(8, e * 2 * width, d), random(9, e * d, width)],
        }
    }

    fn routes(&self) -> Routes {
        Cpu::F32.route_forward(&self.scores, &self.factors, &self.routing)
    }

    /// By the ops, as [`NAMES`] has them.
    fn run(&self) -> Vec<Tensor> {
        let routes = self.routes();
        let (t, top) = (self.x.rows, self.routing.top);
        let (y, trace) = forward(&self.x, &routes, &self.gate_up, &self.down, true, self.compute);
        let (without, none) = forward(&self.x, &routes, &self.gate_up, &self.down, false, self.compute);
        assert!(none.is_none() && bits(&y) == bits(&without), "y depends on what is kept");
        let trace = trace.expect("it is kept");
        let [mut d_factors, mut d_gate_up, mut d_down] = self.before.clone();
        let weights = ((&self.gate_up, &mut d_gate_up), (&self.down, &mut d_down));
        let (dx, d_weights) =
            backward(&self.dy, &self.x, &routes, &trace, weights.0, weights.1, self.compute);
        let d_scores =
            Cpu::F32.route_backward(&d_weights, &routes, &self.routing, (&self.factors, &mut d_factors));
        let of_routes = |x: &[f32]| Tensor::f32(t, top, x.to_vec());
        let (shares, factors) = (of_routes(&routes.shares), of_routes(&routes.weights));
        vec![shares, factors, y, dx, d_weights, d_gate_up, d_down, d_scores, d_factors]
    }

    /// The experts of token t, the best first.
    fn chosen(&self, t: usize) -> Vec<usize> {
        let Routing { experts, top, .. } = self.routing;
        let scores = &self.scores.as_f32()[t * experts..][..experts];
        let mut left: Vec<usize> = (0..experts).collect();
        (0..top)
            .map(|_| {
                let best = left.iter().fold(f32::NEG_INFINITY, |best, &e| best.max(scores[e]));
                left.remove(left.iter().position(|&e| scores[e] == best).expect("it is one of them"))
            })
            .collect()
    }

    /// By the formula, as [`NAMES`] has them.
    fn reference(&self) -> Vec<Vec<Near>> {
        let Routing { experts, scale, .. } = self.routing;
        let (tokens, d, width) = (self.x.rows, self.x.cols, self.down.cols);
        let exact = |x: &Tensor| values(x).into_iter().map(Near::exact).collect::<Vec<_>>();
        let entering =
            |x: &Tensor| exact(x).into_iter().map(|x| x.entering(self.compute)).collect::<Vec<_>>();
        let (scores, factors, x, dy) =
            (exact(&self.scores), exact(&self.factors), entering(&self.x), entering(&self.dy));
        let (gate_up, down) = (exact(&self.gate_up), exact(&self.down));
        let zeros = |n: usize| vec![Near::default(); n];
        let (mut shares, mut weights, mut d_weights) = (Vec::new(), Vec::new(), Vec::new());
        let (mut y, mut dx, mut d_scores) = (Vec::new(), Vec::new(), zeros(tokens * experts));
        // Terms of sums over tokens.
        let terms = |like: &Tensor| -> Vec<Vec<Near>> { vec![Vec::new(); like.rows * like.cols] };
        let [mut d_factors, mut d_gate_up, mut d_down] =
            [&self.factors, &self.gate_up, &self.down].map(terms);
        for t in 0..tokens {
            let chosen = self.chosen(t);
            let (x, dy) = (&x[t * d..][..d], &dy[t * d..][..d]);
            let scale = Near::exact(f64::from(scale));
            let argument =
                |e: usize| scale.times(scores[t * experts + e].minus(scores[t * experts + chosen[0]]));
            let parts: Vec<Near> = chosen.iter().map(|&e| argument(e).exp()).collect();
            let of_token: Vec<Near> =
                parts.iter().map(|part| part.over(sum(parts.iter().copied()))).collect();
            let (mut outs, mut d_rows) = (Vec::new(), Vec::new());
            let mut d_of_token = Vec::new();
            for (&e, share) in chosen.iter().zip(&of_token) {
                let weight = share.times(factors[e]);
                let row = |pile: &[Near], first: usize, n: usize| pile[first * n..][..n].to_vec();
                let dot = |a: &[Near], b: &[Near]| sum(a.iter().zip(b).map(|(a, b)| a.times(*b)));
                let products = |i: usize| -> Vec<Near> {
                    (0..width).map(|f| dot(x, &row(&gate_up, (2 * e + i) * width + f, d))).collect()
                };
                let (gates, ups) = (products(0), products(1));
                let product: Vec<Near> = gates.iter().zip(&ups).map(|(g, u)| gelu(*g).times(*u)).collect();
                let entered: Vec<Near> = product.iter().map(|h| h.entering(self.compute)).collect();
                let out: Vec<Near> = (0..d).map(|i| dot(&entered, &row(&down, e * d + i, width))).collect();
                outs.push(out.iter().map(|out| weight.times(*out)).collect::<Vec<_>>());

                // The gradient of the product, but for the weight.
                let d_product: Vec<Near> = (0..width)
                    .map(|f| sum((0..d).map(|i| dy[i].times(down[(e * d + i) * width + f]))))
                    .collect();
                let d_weight = dot(&d_product, &product);
                d_of_token.push(d_weight.times(factors[e]));
                d_factors[e].push(d_weight.times(*share));
                for (i, dy) in dy.iter().enumerate() {
                    for (f, h) in product.iter().enumerate() {
                        let h = weight.times(*h).entering(self.compute);
                        d_down[(e * d + i) * width + f].push(dy.times(h));
                    }
                }
                let mut d_row = vec![Vec::new(); d];
                for f in 0..width {
                    let d = weight.times(d_product[f]);
                    let d_gate = d.times(ups[f]).times(gelu_slope(gates[f])).entering(self.compute);
                    let d_up = d.times(gelu(gates[f])).entering(self.compute);
                    for (i, d_of) in [d_gate, d_up].into_iter().enumerate() {
                        let first = ((2 * e + i) * width + f) * x.len();
                        for (j, x) in x.iter().enumerate() {
                            d_gate_up[first + j].push(d_of.times(*x));
                            d_row[j].push(d_of.times(gate_up[first + j]));
                        }
                    }
                }
                d_rows.push(d_row.into_iter().map(sum).collect::<Vec<_>>());
                weights.push(weight);
                d_weights.push(d_weight);
            }
            let column = |rows: &[Vec<Near>], i: usize| sum(rows.iter().map(|row| row[i]));
            y.extend((0..d).map(|i| column(&outs, i)));
            dx.extend((0..d).map(|i| column(&d_rows, i)));
            let mean = sum(of_token.iter().zip(&d_of_token).map(|(share, d)| share.times(*d)));
            for ((&e, share), d_share) in chosen.iter().zip(&of_token).zip(d_of_token) {
                d_scores[t * experts + e] = scale.times(*share).times(d_share.minus(mean));
            }
            shares.extend(of_token);
        }
        let [d_factors, d_gate_up, d_down] = [d_factors, d_gate_up, d_down].map(Vec::into_iter);
        let [factors_before, gate_up_before, down_before] = self.before.each_ref().map(exact);
        let added = |terms: std::vec::IntoIter<Vec<Near>>, before: Vec<Near>| -> Vec<Near> {
            terms.zip(before).map(|(terms, before)| sum(terms.into_iter().chain([before]))).collect()
        };
        vec![
            shares,
            weights,
            y,
            dx,
            d_weights,
            added(d_gate_up, gate_up_before),
            added(d_down, down_before),
            d_scores,
            added(d_factors, factors_before),
        ]
    }
}

/// One of everything; all experts; a few of many, most without a row; beyond a pass and a tile of the products; weights in panels,
/// whose piles begin with them or, in the two cases before the last, within them.
const SHAPES: [[usize; 5]; 10] = [
    [1, 1, 1, 1, 1],
    [1, 8, 8, 5, 3],
    [5, 3, 2, 7, 9],
    [7, 64, 8, 9, 5],
    [33, 16, 3, 40, 24],
    [50, 4, 2, 17, 33],
    [60, 2, 1, 130, 70],
    [9, 2, 1, 32, 24],
    [9, 2, 2, 24, 32],
    [70, 4, 2, 64, 96],
];

#[test]
fn agrees_with_the_formula() {
    for shape in SHAPES {
        for kind in KINDS {
            let case = Case::new(shape, kind);
            let got = same_everywhere(|| case.run());
            for ((got, want), name) in got.iter().zip(case.reference()).zip(NAMES) {
                let x: Vec<f64> = want.iter().map(|want| want.x).collect();
                let what = format!("{name} of {shape:?} in {kind:?}");
                assert_within(&what, got.as_f32(), &x, |i| want[i].off);
                // The bound says something: it is far below the numbers, but for the scores of a single choice, whose gradient
                // is 0.
                let size = |f: fn(&Near) -> f64| want.iter().map(f).sum::<f64>();
                let part = if case.compute == Compute::Bf16 { 0.1 } else { 0.01 };
                let zero = shape[2] == 1 && name == "d_scores";
                assert!(zero || size(|want| want.off) <= part * size(|want| want.x.abs()), "{what}");
            }
        }
    }
}

/// sum of dy y, as a function of scores, factors, x, gate_up and down, one after the other.
fn loss(case: &Case, inputs: &[f64]) -> f64 {
    let Routing { experts, top, scale } = case.routing;
    let (d, width) = (case.x.cols, case.down.cols);
    let mut left = inputs;
    let mut take = |n: usize| {
        let (first, rest) = left.split_at(n);
        left = rest;
        first
    };
    let of = |x: &Tensor| x.rows * x.cols;
    let (scores, factors) = (take(of(&case.scores)), take(experts));
    let (x, gate_up, down) = (take(of(&case.x)), take(of(&case.gate_up)), take(of(&case.down)));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut loss = 0.0;
    for (t, (x, dy)) in x.chunks_exact(d).zip(wide(&case.dy).chunks_exact(d)).enumerate() {
        let chosen = case.chosen(t);
        assert_eq!(chosen.len(), top);
        let part = |e: usize| (f64::from(scale) * scores[t * experts + e]).exp();
        let sum: f64 = chosen.iter().map(|&e| part(e)).sum();
        for e in chosen {
            let product = |f: usize| {
                let row = |i: usize| &gate_up[((2 * e + i) * width + f) * d..][..d];
                let gates = dot(x, row(0));
                gates * gate(gates).0 * dot(x, row(1))
            };
            let product: Vec<f64> = (0..width).map(product).collect();
            let out = |i: usize| dot(&product, &down[(e * d + i) * width..][..width]);
            let out: f64 = (0..d).map(|i| dy[i] * out(i)).sum();
            loss += part(e) / sum * factors[e] * out;
        }
    }
    loss
}

/// The reference's gradients are slopes of the forward formula, and what the ops compute is the reference's.
#[test]
fn gradients_are_slopes() {
    let case = Case::new([3, 4, 2, 5, 3], KINDS[0]);
    let parts = [&case.scores, &case.factors, &case.x, &case.gate_up, &case.down];
    let inputs: Vec<f64> = parts.iter().flat_map(|x| values(x)).collect();
    let reference = case.reference();
    let [_, _, _, dx, _, d_gate_up, d_down, d_scores, d_factors] = &reference[..] else { panic!("nine") };
    let [factors_before, gate_up_before, down_before] = case.before.each_ref().map(wide);
    let zeros = |n: usize| vec![0.0; n];
    let gradients = [
        (d_scores, zeros(d_scores.len())),
        (d_factors, factors_before),
        (dx, zeros(dx.len())),
        (d_gate_up, gate_up_before),
        (d_down, down_before),
    ];
    let got = gradients.iter().flat_map(|(d, before)| d.iter().zip(before).map(|(d, before)| d.x - before));
    let size = loss(&case, &inputs).abs().max(1.0);
    let (mut slopes, mut sizes) = (0, 0.0);
    for (i, got) in got.enumerate() {
        let want = derivative(&|inputs| loss(&case, inputs), &inputs, i);
        assert!((got - want).abs() <= DERIVATIVE_ERROR * size, "input {i}: {got}, and the slope is {want}");
        (slopes, sizes) = (slopes + 1, sizes + want.abs());
    }
    assert!(slopes == inputs.len() && sizes > 1.0, "{slopes} slopes of size {sizes}");
}

/// Equals go to the lower number, whatever the sign of a zero, and the order of a token's choices is that of scores.
#[test]
fn the_first_of_equal_scores_is_chosen() {
    let scores = [
        [1.0f32, 3.0, 3.0, -1.0],
        [0.0, -0.0, -0.0, 0.0],
        [-1.0, -0.5, -0.25, -0.5],
        [7.0, f32::NAN, 8.0, 7.0],
    ];
    let routing = Routing { experts: 4, top: 3, scale: 1.0 };
    let routes = Cpu::F32.route_forward(&Tensor::f32(4, 4, scores.concat()), &random(1, 1, 4), &routing);
    assert_eq!(routes.experts, [1, 2, 0, 0, 1, 2, 2, 1, 3, 1, 2, 0]);
    assert_eq!(routes.first, [0, 3, 7, 11, 12]);
    assert_eq!(routes.order, [2, 3, 11, 0, 4, 7, 9, 1, 5, 6, 10, 8]);
    assert!(routes.shares[..9].iter().all(|share| share.is_finite()));
    assert!(routes.shares[9..].iter().all(|share| share.is_nan()));
    assert_eq!(routes.shares[3..6], [1.0 / 3.0; 3]);
}

/// A token's results have the same bits alone, with others, and wherever it stands.
#[test]
fn a_token_depends_on_itself_alone() {
    let case = Case::new([40, 8, 3, 70, 21], KINDS[2]);
    let all = case.run();
    for picked in [vec![17], vec![39, 0, 17, 5, 6]] {
        let rows = |x: &Tensor| Cpu::F32.gather_rows(x, &picked);
        let some = Case {
            scores: rows(&case.scores),
            x: rows(&case.x),
            dy: rows(&case.dy),
            factors: case.factors.clone(),
            gate_up: case.gate_up.clone(),
            down: case.down.clone(),
            before: case.before.clone(),
            ..case
        };
        for i in [0, 1, 2, 3, 4, 7] {
            assert_eq!(bits(&some.run()[i]), bits(&rows(&all[i])), "{} of {picked:?}", NAMES[i]);
        }
    }
}

/// Gradients are added, and those of experts without a row stay.
#[test]
fn experts_without_a_row_are_left_alone() {
    let case = Case::new([7, 64, 8, 9, 5], KINDS[0]);
    let (routes, got) = (case.routes(), case.run());
    let without: Vec<usize> = (0..64).filter(|&e| routes.first[e] == routes.first[e + 1]).collect();
    assert!(!without.is_empty() && without.len() < 64);
    for (i, before, pile) in
        [(5, &case.before[1], 2 * 5 * 9), (6, &case.before[2], 9 * 5), (8, &case.before[0], 1)]
    {
        for &e in &without {
            let of = |x: &Tensor| x.as_f32()[e * pile..(e + 1) * pile].to_vec();
            assert_eq!(of(&got[i]), of(before), "{} of expert {e}", NAMES[i]);
        }
    }
}
