//! A mixture of experts, one expert and one row of its sum after the other.

use bon_engine::backend::ExpertTrace;
use bon_engine::backend::cpu::experts::Routes;
use bon_engine::backend::cpu::packed::unpacked;
use bon_engine::backend::cpu::{Cpu, Data, Tensor};
use bon_engine::backend::ops::*;

use super::{Rounded, add, add_rounded, round, scale};

/// Rows `first..first + n`.
fn part(x: &Tensor, first: usize, n: usize) -> Tensor {
    let cols = x.cols;
    let range = first * x.cols..(first + n) * x.cols;
    let data = match x.data() {
        Data::F32(x) => Data::F32(x[range].to_vec()),
        Data::Bf16(x) => Data::Bf16(x[range].to_vec()),
        Data::Packed(x) => Data::Bf16(unpacked(x, cols)[range].to_vec()),
    };
    Tensor::new(n, x.cols, data)
}

fn stacked(parts: &[Tensor], cols: usize) -> Tensor {
    let data: Vec<f32> = parts.iter().flat_map(|part| part.as_f32().to_vec()).collect();
    Tensor::f32(data.len() / cols, cols, data)
}

/// Every expert's number, first row and rows.
fn experts(routes: &Routes) -> impl Iterator<Item = (usize, usize, usize)> {
    routes.first.windows(2).enumerate().map(|(e, pair)| (e, pair[0], pair[1] - pair[0]))
}

fn gathered(x: &Tensor, routes: &Routes) -> Tensor {
    let tokens: Vec<u32> = routes.order.iter().map(|route| route / routes.top as u32).collect();
    Cpu::F32.gather_rows(x, &tokens)
}

/// Adds every row to that of its token, in the order of experts.
fn added(x: &Tensor, routes: &Routes) -> Tensor {
    let tokens = routes.order.len() / routes.top;
    let mut sums: Vec<Tensor> = (0..tokens).map(|_| Tensor::f32(1, x.cols, vec![0.0; x.cols])).collect();
    for (row, &route) in routes.order.iter().enumerate() {
        let sum = &mut sums[route as usize / routes.top];
        *sum = add(sum, &part(x, row, 1));
    }
    stacked(&sums, x.cols)
}

/// Every row times the weight of its route.
fn weighted(x: &Tensor, routes: &Routes) -> Tensor {
    let rows = routes.order.iter().enumerate();
    let rows: Vec<Tensor> =
        rows.map(|(row, &route)| scale(&part(x, row, 1), routes.weights[route as usize])).collect();
    stacked(&rows, x.cols)
}

pub(super) fn forward(
    x: &Tensor,
    routes: &Routes,
    gate_up: &Tensor,
    down: &Tensor,
) -> (Tensor, ExpertTrace<Tensor>) {
    let (width, d) = (down.cols, x.cols);
    let x = gathered(x, routes);
    let [mut gate, mut up, mut product, mut out]: [Vec<Tensor>; 4] = Default::default();
    for (e, first, n) in experts(routes) {
        let [w_gate, w_up] = [0, 1].map(|i| part(gate_up, (2 * e + i) * width, width));
        let (h, kept) = Rounded.geglu_forward(&part(&x, first, n), &w_gate, &w_up, true);
        let (g, u) = kept.expect("kept");
        out.extend(Rounded.matmul_forward(&h, [&part(down, e * d, d)]));
        gate.push(g);
        up.push(u);
        product.push(h);
    }
    let y = added(&weighted(&stacked(&out, d), routes), routes);
    let [gate, up, product] = [gate, up, product].map(|parts| stacked(&parts, width));
    (y, ExpertTrace { gate, up, product })
}

pub(super) fn backward(
    dy: &Tensor,
    x: &Tensor,
    routes: &Routes,
    trace: &ExpertTrace<Tensor>,
    (gate_up, d_gate_up): (&Tensor, &mut Tensor),
    (down, d_down): (&Tensor, &mut Tensor),
) -> (Tensor, Tensor) {
    let (width, d) = (down.cols, x.cols);
    let (dy, x) = (gathered(dy, routes), gathered(x, routes));
    let d_out = weighted(&dy, routes);
    let mut d_weights = vec![0.0; routes.order.len()];
    let mut dx = Vec::new();
    for (e, first, n) in experts(routes) {
        let [w_gate, w_up] = [0, 1].map(|i| part(gate_up, (2 * e + i) * width, width));
        let [gate, up, product] = [&trace.gate, &trace.up, &trace.product].map(|all| part(all, first, n));
        let (w_down, d_out, x) = (part(down, e * d, d), part(&d_out, first, n), part(&x, first, n));
        let [out] = Rounded.matmul_forward(&product, [&w_down]);
        for row in 0..n {
            let (dy, out) = (part(&dy, first + row, 1), part(&out, row, 1));
            let dot: f32 = dy.as_f32().iter().zip(out.as_f32()).map(|(a, b)| a * b).sum();
            d_weights[routes.order[first + row] as usize] = dot;
        }
        let d_product = Rounded.matmul_backward_input(&[(&d_out, &w_down)]);
        let (d_gate, d_up) = Rounded.geglu_backward(&d_product, &gate, &up);
        let add_gradient = |dw: &mut Tensor, from: usize, dy: &Tensor, x: &Tensor| {
            let mut new = Tensor::f32(dy.cols, x.cols, vec![0.0; dy.cols * x.cols]);
            add_rounded(&mut new, |new| Cpu::F32.matmul_backward_weight(dy, x, new));
            let to = &mut dw.as_f32_mut()[from * x.cols..][..dy.cols * x.cols];
            to.iter_mut().zip(new.as_f32()).for_each(|(to, new)| *to += new);
        };
        add_gradient(d_down, e * d, &d_out, &product);
        add_gradient(d_gate_up, 2 * e * width, &d_gate, &x);
        add_gradient(d_gate_up, (2 * e + 1) * width, &d_up, &x);
        dx.push(Rounded.matmul_backward_input(&[(&d_gate, &w_gate), (&d_up, &w_up)]));
    }
    let dx = round(added(&stacked(&dx, d), routes));
    let tokens = routes.order.len() / routes.top;
    (dx, Tensor::f32(tokens, routes.top, d_weights))
}
