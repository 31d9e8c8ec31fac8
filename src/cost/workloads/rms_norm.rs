//! Norms.

use std::cell::RefCell;

use super::{Workload, random};
use crate::backend::ops::*;
use crate::backend::{DType, ModelShape, NormSpec, ResidualSpec};

/// A decode step's rows and a training batch's.
pub(super) fn workloads(shape: &ModelShape) -> Vec<Workload> {
    const NORM: NormSpec = NormSpec { eps: 1e-6, offset: 1.0 };
    const SUM: ResidualSpec = ResidualSpec { norm: NORM, scale: 1.0 };
    let d = shape.hidden;
    let weight = 2 * d;
    let mut all = Vec::new();
    for t in [32, 2048] {
        let matrix = 2 * t * d;
        all.push(Workload {
            name: format!("rms_norm_forward T = {t}"),
            bytes: (2 * matrix + weight) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let (x, w) = (random(cuda, 1, DType::Bf16, t, d), random(cuda, 2, DType::Bf16, 1, d));
                Box::new(move |cuda| drop(cuda.rms_norm_forward(&x, &w, NORM)))
            }),
        });
        for with_post in [false, true] {
            all.push(Workload {
                name: format!("add_norm_forward{} T = {t}", if with_post { " post" } else { "" }),
                bytes: (4 * matrix + weight * (1 + usize::from(with_post))) as u64,
                flops: 0,
                prepare: Box::new(move |cuda| {
                    let [x, branch] = [1, 2].map(|seed| random(cuda, seed, DType::Bf16, t, d));
                    let [pre, post] = [3, 4].map(|seed| random(cuda, seed, DType::Bf16, 1, d));
                    Box::new(move |cuda| {
                        drop(cuda.add_norm_forward(&x, &branch, with_post.then_some(&post), &pre, SUM));
                    })
                }),
            });
        }
    }
    const T: usize = 2048;
    all.push(Workload {
        name: format!("add_forward post T = {T}"),
        bytes: (3 * 2 * T * d + weight) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let [x, branch] = [1, 2].map(|seed| random(cuda, seed, DType::Bf16, T, d));
            let post = random(cuda, 3, DType::Bf16, 1, d);
            Box::new(move |cuda| drop(cuda.add_forward(&x, &branch, &post, SUM)))
        }),
    });
    all.push(Workload {
        name: format!("add_backward post T = {T}"),
        bytes: (5 * 2 * T * d + weight + 8 * d) as u64,
        flops: 0,
        prepare: Box::new(move |cuda| {
            let [d_sum, more, branch] = [1, 2, 3].map(|seed| random(cuda, seed, DType::Bf16, T, d));
            let post = random(cuda, 4, DType::Bf16, 1, d);
            let gradient = RefCell::new(random(cuda, 5, DType::F32, 1, d));
            Box::new(move |cuda| {
                let d_post = &mut *gradient.borrow_mut();
                drop(cuda.add_backward(&d_sum, Some(&more), (&branch, &post, d_post), SUM));
            })
        }),
    });
    for with_post in [false, true] {
        let matrices = if with_post { 6 } else { 4 };
        all.push(Workload {
            name: format!("add_norm_backward{} T = {T}", if with_post { " post" } else { "" }),
            // A weight is read; its f32 gradient is read and written.
            bytes: (matrices * 2 * T * d + (1 + usize::from(with_post)) * (weight + 8 * d)) as u64,
            flops: 0,
            prepare: Box::new(move |cuda| {
                let [d_sum, d_normed, sum, branch] =
                    [1, 2, 3, 4].map(|seed| random(cuda, seed, DType::Bf16, T, d));
                let [pre, post] = [5, 6].map(|seed| random(cuda, seed, DType::Bf16, 1, d));
                let gradients = RefCell::new([7, 8].map(|seed| random(cuda, seed, DType::F32, 1, d)));
                Box::new(move |cuda| {
                    let [d_pre, d_post] = &mut *gradients.borrow_mut();
                    let post = with_post.then_some((&branch, &post, d_post));
                    drop(cuda.add_norm_backward(Some(&d_sum), &d_normed, &sum, (&pre, d_pre), post, SUM));
                })
            }),
        });
    }
    all
}
