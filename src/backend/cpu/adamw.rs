//! AdamW (Loshchilov and Hutter 2019), with PyTorch's order of operations.

use half::bf16;
use rayon::prelude::*;

use super::simd::{bf16_from_f32, multiversion};
use super::{Data, Tensor};
use crate::backend::AdamW;

/// Elements per task.
const CHUNK: usize = 64 * 1024;

/// The figures of one step, as the elements need them.
#[derive(Clone, Copy)]
struct Step {
    grad_scale: f32,
    keep: f32,
    new1: f32,
    beta2: f32,
    new2: f32,
    size: f32,
    root_correction: f32,
    eps: f32,
}

impl Step {
    fn new(h: &AdamW, weight_decay: f32) -> Self {
        assert!(h.step > 0, "AdamW counts steps from 1");
        let (beta1, beta2, lr) = (f64::from(h.beta1), f64::from(h.beta2), f64::from(h.lr));
        let correction = |beta: f64| 1.0 - beta.powf(h.step as f64);
        Self {
            grad_scale: h.grad_scale,
            keep: (1.0 - lr * f64::from(weight_decay)) as f32,
            new1: (1.0 - beta1) as f32,
            beta2: h.beta2,
            new2: (1.0 - beta2) as f32,
            size: (lr / correction(beta1)) as f32,
            root_correction: correction(beta2).sqrt() as f32,
            eps: h.eps,
        }
    }
}

multiversion! {
    fn update(step: Step, grad: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(grad) {
            let g = g * step.grad_scale;
            *m = step.new1.mul_add(g - *m, *m);
            *v = step.beta2.mul_add(*v, step.new2 * g * g);
            let denominator = v.sqrt() / step.root_correction + step.eps;
            *p = (-step.size).mul_add(*m / denominator, *p * step.keep);
        }
    }
}

multiversion! {
    fn round(p: &[f32], copy: &mut [bf16]) {
        for (copy, p) in copy.iter_mut().zip(p) {
            *copy = bf16_from_f32(*p);
        }
    }
}

/// One update of f32 `master` from `grad`, with the moments m and v; then `copy` (the bf16 parameter), where given,
/// is `master` rounded to nearest even. With g the gradient times `grad_scale` and t the step:
/// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
/// p = p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).
pub fn step(
    hyper: &AdamW,
    weight_decay: f32,
    grad: &Tensor,
    master: &mut Tensor,
    m: &mut Tensor,
    v: &mut Tensor,
    copy: Option<&mut Tensor>,
) {
    let shape = (master.rows, master.cols);
    assert!([grad, m, v].iter().all(|x| (x.rows, x.cols) == shape));
    let step = Step::new(hyper, weight_decay);
    let chunks = grad
        .as_f32()
        .par_chunks(CHUNK)
        .zip(master.as_f32_mut().par_chunks_mut(CHUNK))
        .zip(m.as_f32_mut().par_chunks_mut(CHUNK).zip(v.as_f32_mut().par_chunks_mut(CHUNK)));
    match copy {
        None => chunks.for_each(|((g, p), (m, v))| update(step, g, p, m, v)),
        Some(copy) => {
            assert_eq!((copy.rows, copy.cols), shape);
            let Data::Bf16(copy) = &mut copy.data else { panic!("the copy of a master weight is bf16") };
            chunks.zip(copy.par_chunks_mut(CHUNK)).for_each(|(((g, p), (m, v)), copy)| {
                update(step, g, p, m, v);
                round(p, copy);
            });
        }
    }
}
