//! A mixture of experts: the routes of rows, and the experts' MLPs on the rows that they have.

use rayon::prelude::*;

use super::matmul::{backward_input_groups, backward_weight_groups, forward_groups};
use super::rows::{self, new_rows};
use super::simd::{exp, multiversion};
use super::{Cpu, Tensor, geglu, zeroed};
use crate::backend::{Compute, ExpertTrace, Experts, Routing, Rows};

/// See [`crate::backend::Platform::Routes`].
#[derive(Debug, Clone, PartialEq)]
pub struct Routes {
    /// G.
    pub top: usize,
    /// e_g `[T, G]`.
    pub experts: Vec<u32>,
    /// `[T, G]`.
    pub shares: Vec<f32>,
    /// `[T, G]`.
    pub weights: Vec<f32>,
    /// The rows of expert e, in the order of experts, are `first[e]..first[e + 1]`.
    pub first: Vec<usize>,
    /// The route t G + g of each row in that order, and thus those of each expert in the order of tokens.
    pub order: Vec<u32>,
}

impl Routes {
    /// The row of each route in the order of experts, `[T, G]`.
    fn rows(&self) -> Vec<u32> {
        let mut rows = vec![0; self.order.len()];
        for (row, &route) in self.order.iter().enumerate() {
            rows[route as usize] = row as u32;
        }
        rows
    }

    /// x\[t\] for every row in the order of experts.
    fn gathered(&self, x: &Tensor) -> Tensor {
        let tokens: Vec<u32> = self.order.iter().map(|route| route / self.top as u32).collect();
        Cpu::F32.gather_rows(x, &tokens)
    }
}

multiversion! {
    fn add_scaled(factor: f32, x: &[f32], y: &mut [f32]) {
        super::simd::axpy(factor, x, y);
    }
}

multiversion! {
    fn dot(x: &[f32], y: &[f32]) -> f32 {
        super::simd::dot(x, y)
    }
}

multiversion! {
    fn scaled(factor: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor * x;
        }
    }
}

/// y\[t\] = sum over g of factor(route) x\[row of the route\], in the order of g.
fn combined(x: &Tensor, routes: &Routes, factor: impl Fn(usize) -> f32 + Sync) -> Tensor {
    let (from, cols, top) = (x.as_f32(), x.cols, routes.top);
    let rows = routes.rows();
    let y = new_rows(rows.len() / top, cols, |first, block| {
        for (i, y) in block.chunks_exact_mut(cols).enumerate() {
            for route in (first + i) * top..(first + i + 1) * top {
                add_scaled(factor(route), &from[rows[route] as usize * cols..][..cols], y);
            }
        }
    });
    Tensor::f32(rows.len() / top, cols, y)
}

/// See [`Experts::experts_forward`].
pub fn forward(
    x: &Tensor,
    routes: &Routes,
    gate_up: &Tensor,
    down: &Tensor,
    keep: bool,
    compute: Compute,
) -> (Tensor, Option<ExpertTrace<Tensor>>) {
    let [gate, up] = forward_groups(&routes.gathered(x), &routes.first, gate_up, compute);
    let product = geglu::forward(&gate, &up);
    let [out] = forward_groups(&product, &routes.first, down, compute);
    let y = combined(&out, routes, |route| routes.weights[route]);
    (y, keep.then_some(ExpertTrace { gate, up, product }))
}

/// See [`Experts::experts_backward`].
pub fn backward(
    dy: &Tensor,
    x: &Tensor,
    routes: &Routes,
    trace: &ExpertTrace<Tensor>,
    (gate_up, d_gate_up): (&Tensor, &mut Tensor),
    (down, d_down): (&Tensor, &mut Tensor),
    compute: Compute,
) -> (Tensor, Tensor) {
    let (first, width) = (&routes.first, trace.product.cols);
    let zeros = |like: &Tensor| Tensor::f32(like.rows, like.cols, zeroed(like.rows * like.cols));
    // The gradient of an expert's output, but for the weight of its route, which meets it as a number.
    let d_out = routes.gathered(dy);
    let mut d_product = zeros(&trace.product);
    backward_input_groups(&d_out, first, down, 1, 0, &mut d_product, compute);
    let mut product = zeros(&trace.product);
    let mut by_row = vec![0.0; routes.order.len()];
    product
        .as_f32_mut()
        .par_chunks_exact_mut(width)
        .zip(d_product.as_f32_mut().par_chunks_exact_mut(width))
        .zip(trace.product.as_f32().par_chunks_exact(width))
        .zip(&routes.order)
        .zip(&mut by_row)
        .for_each(|((((weighted, d_product), product), &route), d_weight)| {
            *d_weight = dot(d_product, product);
            let weight = routes.weights[route as usize];
            scaled(weight, product, weighted);
            rows::scale_slice(d_product, weight);
        });
    let mut d_weights = vec![0.0; routes.order.len()];
    for (&route, d_weight) in routes.order.iter().zip(by_row) {
        d_weights[route as usize] = d_weight;
    }
    backward_weight_groups(&d_out, first, &product, 1, 0, d_down, compute);
    let (d_gate, d_up) = geglu::backward(&d_product, &trace.gate, &trace.up);
    let x = routes.gathered(x);
    let mut dx = zeros(&x);
    for (at, d) in [d_gate, d_up].iter().enumerate() {
        backward_weight_groups(d, first, &x, 2, at, d_gate_up, compute);
        backward_input_groups(d, first, gate_up, 2, at, &mut dx, compute);
    }
    let tokens = routes.order.len() / routes.top;
    (combined(&dx, routes, |_| 1.0), Tensor::f32(tokens, routes.top, d_weights))
}

impl Experts for Cpu {
    fn route_forward(&self, scores: &Tensor, factors: &Tensor, routing: &Routing) -> Routes {
        let Routing { experts: count, top, scale } = *routing;
        assert!(scores.cols == count && factors.cols == count && (1..=count).contains(&top));
        let factors = rows::to_f32(factors);
        let routes = scores.rows * top;
        let mut to = Routes {
            top,
            experts: Vec::with_capacity(routes),
            shares: Vec::with_capacity(routes),
            weights: Vec::with_capacity(routes),
            first: vec![0; count + 1],
            order: vec![0; routes],
        };
        let mut ranked: Vec<u32> = Vec::with_capacity(count);
        for scores in scores.as_f32().chunks_exact(count) {
            ranked.clear();
            ranked.extend(0..count as u32);
            // Zeros of both signs are equals. A NaN comes first, and shows in what its row becomes.
            let score = |e: u32| scores[e as usize] + 0.0;
            ranked.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
            let chosen = &ranked[..top];
            let largest = scores[chosen[0] as usize];
            let parts: Vec<f32> =
                chosen.iter().map(|&e| exp(scale * (scores[e as usize] - largest))).collect();
            let sum: f32 = parts.iter().sum();
            for (&e, part) in chosen.iter().zip(parts) {
                let share = part / sum;
                to.experts.push(e);
                to.shares.push(share);
                to.weights.push(share * factors[e as usize]);
                to.first[e as usize + 1] += 1;
            }
        }
        for e in 0..count {
            to.first[e + 1] += to.first[e];
        }
        let mut next = to.first.clone();
        for (route, &e) in to.experts.iter().enumerate() {
            to.order[next[e as usize]] = route as u32;
            next[e as usize] += 1;
        }
        to
    }

    fn route_backward(
        &self,
        d_weights: &Tensor,
        routes: &Routes,
        routing: &Routing,
        (factors, d_factors): (&Tensor, &mut Tensor),
    ) -> Tensor {
        let Routing { experts: count, top, scale } = *routing;
        let (d_weights, factors) = (d_weights.as_f32(), rows::to_f32(factors));
        assert_eq!(d_weights.len(), routes.experts.len());
        let d_factors = d_factors.as_f32_mut();
        let wanted = if d_factors.is_empty() { &[][..] } else { &routes.order };
        for &route in wanted {
            let route = route as usize;
            d_factors[routes.experts[route] as usize] += d_weights[route] * routes.shares[route];
        }
        let mut d_scores = zeroed(d_weights.len() / top * count);
        for (t, d_scores) in d_scores.chunks_exact_mut(count).enumerate() {
            let of_row = t * top..(t + 1) * top;
            let (experts, shares) = (&routes.experts[of_row.clone()], &routes.shares[of_row.clone()]);
            let d_share = |g: usize| d_weights[t * top + g] * factors[experts[g] as usize];
            let mean: f32 = shares.iter().enumerate().map(|(g, share)| share * d_share(g)).sum();
            for (g, share) in shares.iter().enumerate() {
                d_scores[experts[g] as usize] = scale * share * (d_share(g) - mean);
            }
        }
        Tensor::f32(d_scores.len() / count, count, d_scores)
    }

    fn experts_forward(
        &self,
        x: &Tensor,
        routes: &Routes,
        gate_up: &Tensor,
        down: &Tensor,
        keep: bool,
    ) -> (Tensor, Option<ExpertTrace<Tensor>>) {
        forward(x, routes, gate_up, down, keep, self.compute)
    }

    fn experts_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        routes: &Routes,
        trace: &ExpertTrace<Tensor>,
        gate_up: (&Tensor, &mut Tensor),
        down: (&Tensor, &mut Tensor),
    ) -> (Tensor, Tensor) {
        backward(dy, x, routes, trace, gate_up, down, self.compute)
    }
}
