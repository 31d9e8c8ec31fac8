//! Products, and GeGLU forward.

use std::cell::RefCell;

use super::{Workload, random};
use crate::backend::cuda::Tensor;
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape};

/// Of adapters.
const RANK: usize = 16;

/// One layer's products: decoding (T = 32) and training (T = 512).
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    let widths = Widths::new(shape);
    let mut all = forward_workloads(&widths, 32, false);
    all.extend(forward_workloads(&widths, 512, true));
    let Widths { d, q, kv, .. } = widths;
    all.push(input_workload("q k v", 512, &[q, kv, kv], d));
    all.push(weight_workload("q", 512, q, d, DType::F32));
    all.push(weight_workload("q", 512, q, d, DType::Bf16));
    all.extend(adapter_workloads(&widths, 32));
    all.extend(adapter_workloads(&widths, 512));
    all.push(input_workload("B of q, rank 16", 512, &[q], RANK));
    all.push(weight_workload("A of q, rank 16", 512, RANK, d, DType::F32));
    all.push(weight_workload("B of q, rank 16", 512, q, RANK, DType::F32));
    all
}

/// Decoding with many streams, and a batch of training.
pub(super) fn large_workloads(shape: &ModelShape) -> Vec<Workload> {
    const T: usize = 4096;
    let widths = Widths::new(shape);
    let mut all = forward_workloads(&widths, 256, false);
    all.extend(forward_workloads(&widths, T, true));
    let Widths { d, f, q, kv } = widths;
    for (name, out, width) in
        [("q k v", &[q, kv, kv][..], d), ("out", &[d], q), ("down", &[d], f), ("gate up", &[f, f], d)]
    {
        all.push(input_workload(name, T, out, width));
    }
    for (name, out, width) in [("q", q, d), ("k", kv, d), ("out", d, q), ("down", d, f), ("gate", f, d)] {
        all.push(weight_workload(name, T, out, width, DType::F32));
        all.push(weight_workload(name, T, out, width, DType::Bf16));
    }
    all
}

/// D, F, and the widths of all query heads and of all key heads.
#[derive(Clone, Copy)]
struct Widths {
    d: usize,
    f: usize,
    q: usize,
    kv: usize,
}

impl Widths {
    fn new(shape: &ModelShape) -> Self {
        let (q, kv) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        Self { d: shape.hidden, f: shape.intermediate, q, kv }
    }
}

/// Bytes of a bf16 matrix.
fn bf16_bytes(rows: usize, cols: usize) -> u64 {
    (rows * cols * DType::Bf16.bytes()) as u64
}

/// FLOPs of a product.
fn product_flops(t: usize, out: usize, width: usize) -> u64 {
    2 * (t * out * width) as u64
}

/// A layer's forward products of `t` tokens.
fn forward_workloads(&Widths { d, f, q, kv }: &Widths, t: usize, keep: bool) -> Vec<Workload> {
    let mut all = vec![Workload {
        name: format!("matmul_forward q k v, T = {t}"),
        bytes: bf16_bytes(t, d) + bf16_bytes(q + 2 * kv, d) + bf16_bytes(t, q + 2 * kv),
        flops: product_flops(t, q + 2 * kv, d),
        prepare: Box::new(move |cuda| {
            let x = random(cuda, 1, DType::Bf16, t, d);
            let w = [(2, q), (3, kv), (4, kv)].map(|(seed, out)| random(cuda, seed, DType::Bf16, out, d));
            Box::new(move |cuda| drop(cuda.matmul_forward(&x, w.each_ref())))
        }),
    }];
    for (name, width) in [("out", q), ("down", f)] {
        all.push(Workload {
            name: format!("matmul_forward {name}, T = {t}"),
            bytes: bf16_bytes(t, width) + bf16_bytes(d, width) + bf16_bytes(t, d),
            flops: product_flops(t, d, width),
            prepare: Box::new(move |cuda| {
                let x = random(cuda, 1, DType::Bf16, t, width);
                let w = random(cuda, 2, DType::Bf16, d, width);
                Box::new(move |cuda| drop(cuda.matmul_forward(&x, [&w])))
            }),
        });
    }
    all.push(Workload {
        name: format!("geglu_forward, T = {t}"),
        bytes: bf16_bytes(t, d) + 2 * bf16_bytes(f, d) + bf16_bytes(t, f) * if keep { 3 } else { 1 },
        flops: product_flops(t, 2 * f, d),
        prepare: Box::new(move |cuda| {
            let x = random(cuda, 1, DType::Bf16, t, d);
            let (gate, up) = (random(cuda, 2, DType::Bf16, f, d), random(cuda, 3, DType::Bf16, f, d));
            Box::new(move |cuda| drop(cuda.geglu_forward(&x, &gate, &up, keep)))
        }),
    });
    all
}

/// What adapters add to a layer's q, k and v of `t` tokens: H = X A^T of one map, and Y = X W^T + H B^T of the three.
fn adapter_workloads(&Widths { d, q, kv, .. }: &Widths, t: usize) -> [Workload; 2] {
    let out = q + 2 * kv;
    [
        Workload {
            name: format!("matmul_forward A of q, rank {RANK}, T = {t}"),
            bytes: bf16_bytes(t, d) + bf16_bytes(RANK, d) + bf16_bytes(t, RANK),
            flops: product_flops(t, RANK, d),
            prepare: Box::new(move |cuda| {
                let [x, a] = [(1, t), (2, RANK)].map(|(seed, rows)| random(cuda, seed, DType::Bf16, rows, d));
                Box::new(move |cuda| drop(cuda.matmul_forward(&x, [&a])))
            }),
        },
        Workload {
            name: format!("matmul_low_rank_forward q k v, rank {RANK}, T = {t}"),
            bytes: bf16_bytes(t, d + 3 * RANK) + bf16_bytes(out, d + RANK) + bf16_bytes(t, out),
            flops: product_flops(t, out, d + RANK),
            prepare: Box::new(move |cuda| {
                let x = random(cuda, 1, DType::Bf16, t, d);
                let maps = [(2, q), (5, kv), (8, kv)].map(|(seed, out)| {
                    let w = random(cuda, seed, DType::Bf16, out, d);
                    (
                        w,
                        random(cuda, seed + 1, DType::Bf16, t, RANK),
                        random(cuda, seed + 2, DType::Bf16, out, RANK),
                    )
                });
                Box::new(move |cuda| {
                    let w = maps.each_ref().map(|(w, ..)| w);
                    let low_rank = maps.each_ref().map(|(_, h, b)| Some((h, b)));
                    drop(cuda.matmul_low_rank_forward(&x, w, low_rank));
                })
            }),
        },
    ]
}

/// dX `[t, width]`, the sum over dY_i `[t, out_i]` times W_i.
fn input_workload(name: &str, t: usize, out: &[usize], width: usize) -> Workload {
    let (out, all) = (out.to_vec(), out.iter().sum());
    Workload {
        name: format!("matmul_backward_input {name}, T = {t}"),
        bytes: bf16_bytes(t, width) + bf16_bytes(all, width) + bf16_bytes(t, all),
        flops: product_flops(t, all, width),
        prepare: Box::new(move |cuda| {
            let terms: Vec<(Tensor, Tensor)> = (1..)
                .step_by(2)
                .zip(&out)
                .map(|(seed, &out)| {
                    (random(cuda, seed, DType::Bf16, t, out), random(cuda, seed + 1, DType::Bf16, out, width))
                })
                .collect();
            Box::new(move |cuda| {
                let terms: Vec<(&Tensor, &Tensor)> = terms.iter().map(|(dy, w)| (dy, w)).collect();
                drop(cuda.matmul_backward_input(&terms));
            })
        }),
    }
}

/// dW `[out, width]` += dY^T X.
fn weight_workload(name: &str, t: usize, out: usize, width: usize, dtype: DType) -> Workload {
    let of_bf16 = if dtype == DType::Bf16 { ", bf16" } else { "" };
    Workload {
        name: format!("matmul_backward_weight {name}, T = {t}{of_bf16}"),
        bytes: bf16_bytes(t, width) + bf16_bytes(t, out) + 2 * (out * width * dtype.bytes()) as u64,
        flops: product_flops(t, out, width),
        prepare: Box::new(move |cuda| {
            let (dy, x) = (random(cuda, 1, DType::Bf16, t, out), random(cuda, 2, DType::Bf16, t, width));
            let dw = RefCell::new(random(cuda, 3, dtype, out, width));
            Box::new(move |cuda| cuda.matmul_backward_weight(&dy, &x, &mut dw.borrow_mut()))
        }),
    }
}
