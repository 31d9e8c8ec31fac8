//! A mixture of experts, at the shape of Gemma 4 26B-A4B.

use std::cell::RefCell;
use std::collections::BTreeSet;

use half::bf16;

use super::{GEMMA_2B, Workload, random, random_of};
use crate::backend::cuda::{Cuda, Tensor, experts::Routes};
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape, Routing, Uniform};

/// D, Fe and G.
const D: usize = 2816;
const WIDTH: usize = 704;
const TOP: usize = 8;
/// E.
const EXPERTS: usize = 128;
/// Experts of the training workloads for the virtual GPU, with as many rows each as 4096 tokens give to all.
const SLICE: usize = 16;

/// Decoding (T = 32) and training, in which the products are of some of the experts: all do the same work. Gemma 2B stands for the
/// model, so that they are in its tables, once.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    if *shape != GEMMA_2B.shape {
        return Vec::new();
    }
    let (decode, training) = (Mixture::new(32, EXPERTS), Mixture::new(4096, EXPERTS));
    let slice = Mixture::new(4096 * SLICE / EXPERTS, SLICE);
    vec![
        decode.route_forward(),
        training.route_forward(),
        training.route_backward(),
        decode.forward(false),
        slice.forward(true),
        slice.backward(DType::F32),
        slice.backward(DType::Bf16),
    ]
}

/// A batch of training.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    if *shape != GEMMA_2B.shape {
        return Vec::new();
    }
    let training = Mixture::new(4096, EXPERTS);
    vec![training.forward(true), training.backward(DType::F32), training.backward(DType::Bf16)]
}

/// Tokens with their scores, at random.
struct Mixture {
    tokens: usize,
    experts: usize,
    /// `[T, E]`.
    scores: Vec<bf16>,
    /// Experts that have a row.
    taken: usize,
}

/// What routes are given as, in bytes: an expert, its share and its weight, a row, and the route of a row.
const ROUTE: usize = 5 * 4;

impl Mixture {
    fn new(tokens: usize, experts: usize) -> Self {
        let uniform = Uniform::up_to(1.0, 1);
        let scores = (0..(tokens * experts).div_ceil(4) as u64).flat_map(|n| uniform.four(n));
        let scores: Vec<bf16> = scores.take(tokens * experts).map(bf16::from_f32).collect();
        let chosen = |scores: &[bf16]| {
            let mut ranked: Vec<usize> = (0..experts).collect();
            ranked.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            ranked[..TOP].to_vec()
        };
        let taken = scores.chunks_exact(experts).flat_map(chosen).collect::<BTreeSet<_>>().len();
        Self { tokens, experts, scores, taken }
    }

    fn routes(&self) -> usize {
        self.tokens * TOP
    }

    fn name(&self, op: &str) -> String {
        format!("{op} T = {}, {TOP} of {} experts", self.tokens, self.experts)
    }

    /// What routes a batch: scores, factors and how.
    fn routing(&self) -> impl Fn(&Cuda) -> (Tensor, Tensor, Routing) + use<> {
        let (tokens, experts, scores) = (self.tokens, self.experts, self.scores.clone());
        move |cuda| {
            let routing = Routing { experts, top: TOP, scale: 1.0 };
            let scores = cuda.upload(DType::Bf16, tokens, experts, bytemuck::cast_slice(&scores));
            (scores, random(cuda, 2, DType::Bf16, 1, experts), routing)
        }
    }

    /// Routes of a batch.
    fn routed(&self) -> impl Fn(&Cuda) -> Routes + use<> {
        let routing = self.routing();
        move |cuda| {
            let (scores, factors, routing) = routing(cuda);
            cuda.route_forward(&scores, &factors, &routing)
        }
    }

    fn route_forward(&self) -> Workload {
        let routing = self.routing();
        Workload {
            name: self.name("route_forward"),
            bytes: (2 * self.experts * (self.tokens + 1) + self.routes() * ROUTE + 4 * (self.experts + 1))
                as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (scores, factors, routing) = routing(cuda);
                Box::new(move |cuda| drop(cuda.route_forward(&scores, &factors, &routing)))
            }),
        }
    }

    fn route_backward(&self) -> Workload {
        let (routing, tokens) = (self.routing(), self.tokens);
        // Weights' gradients, experts, shares and the order; factors, their gradients and the first rows.
        let bytes = 2 * self.experts * (tokens + 1) + self.routes() * 4 * 4 + 4 * (3 * self.experts + 1);
        Workload {
            name: self.name("route_backward"),
            bytes: bytes as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (scores, factors, routing) = routing(cuda);
                let routes = cuda.route_forward(&scores, &factors, &routing);
                let d_weights = random(cuda, 3, DType::F32, tokens, TOP);
                let d_factors = RefCell::new(random(cuda, 4, DType::F32, 1, routing.experts));
                Box::new(move |cuda| {
                    let factors = (&factors, &mut *d_factors.borrow_mut());
                    drop(cuda.route_backward(&d_weights, &routes, &routing, factors));
                })
            }),
        }
    }

    /// Elements of the weights that have rows.
    fn weights(&self) -> usize {
        3 * self.taken * WIDTH * D
    }

    fn forward(&self, keep: bool) -> Workload {
        let (routed, tokens, experts) = (self.routed(), self.tokens, self.experts);
        let kept = if keep { 3 * 2 * self.routes() * WIDTH } else { 0 };
        // Of routes: rows and weights; the first rows.
        let routes = 8 * self.routes() + 4 * (experts + 1);
        Workload {
            name: self.name("experts_forward"),
            bytes: (2 * self.weights() + 2 * 2 * tokens * D + kept + routes) as u64,
            flops: (2 * 3 * self.routes() * WIDTH * D) as u64,
            prepare: Box::new(move |cuda| {
                let (routes, x) = (routed(cuda), random(cuda, 3, DType::Bf16, tokens, D));
                let [gate_up, down] = piles(cuda, experts);
                Box::new(move |cuda| drop(cuda.experts_forward(&x, &routes, &gate_up, &down, keep)))
            }),
        }
    }

    /// Gradients of weights are of `dtype`.
    fn backward(&self, dtype: DType) -> Workload {
        let (routed, tokens, experts) = (self.routed(), self.tokens, self.experts);
        // Of routes: the order, rows, weights and their gradients; the first rows.
        let routes = 16 * self.routes() + 4 * (experts + 1);
        let bytes =
            (2 + 2 * dtype.bytes()) * self.weights() + 3 * 2 * (tokens * D + self.routes() * WIDTH) + routes;
        Workload {
            name: self.name("experts_backward") + if dtype == DType::Bf16 { ", bf16" } else { "" },
            bytes: bytes as u64,
            flops: (2 * 2 * 3 * self.routes() * WIDTH * D) as u64,
            prepare: Box::new(move |cuda| {
                let routes = routed(cuda);
                let [x, dy] = [3, 4].map(|seed| random(cuda, seed, DType::Bf16, tokens, D));
                let [gate_up, down] = piles(cuda, experts);
                let trace = cuda.experts_forward(&x, &routes, &gate_up, &down, true).1.expect("it is kept");
                let gradient = |like: &Tensor| {
                    let (rows, cols) = cuda.shape(like);
                    RefCell::new(cuda.zeros(dtype, rows, cols))
                };
                let (d_gate_up, d_down) = (gradient(&gate_up), gradient(&down));
                Box::new(move |cuda| {
                    let (d_gate_up, d_down) = (&mut *d_gate_up.borrow_mut(), &mut *d_down.borrow_mut());
                    let (gate_up, down) = ((&gate_up, d_gate_up), (&down, d_down));
                    drop(cuda.experts_backward(&dy, &x, &routes, &trace, gate_up, down));
                })
            }),
        }
    }
}

/// The experts' weights: gate and up, and down, of a size that keeps activations around 1.
fn piles(cuda: &Cuda, experts: usize) -> [Tensor; 2] {
    [(5, 2 * WIDTH, D), (6, D, WIDTH)].map(|(seed, out, width)| {
        random_of(cuda, &Uniform::up_to(0.02, seed), DType::Bf16, experts * out, width)
    })
}
