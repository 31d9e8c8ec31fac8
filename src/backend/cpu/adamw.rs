//! AdamW (Loshchilov and Hutter 2019), with PyTorch's order of operations.

use half::bf16;
use rayon::prelude::*;

use super::simd::{bf16_from_f32, multiversion};
use super::{Data, Tensor};
use crate::backend::{AdamW, AdamWCoefficients};

/// Elements per task.
const CHUNK: usize = 64 * 1024;

multiversion! {
    fn update(c: AdamWCoefficients, keep: f32, grad: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(grad) {
            let g = g * c.grad_scale;
            *m = c.new1.mul_add(g - *m, *m);
            *v = c.beta2.mul_add(*v, c.new2 * g * g);
            let denominator = v.sqrt() / c.root_correction + c.eps;
            *p = (-c.size).mul_add(*m / denominator, *p * keep);
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
    let (c, keep) = (hyper.coefficients(), hyper.keep(weight_decay));
    let chunks = grad
        .as_f32()
        .par_chunks(CHUNK)
        .zip(master.as_f32_mut().par_chunks_mut(CHUNK))
        .zip(m.as_f32_mut().par_chunks_mut(CHUNK).zip(v.as_f32_mut().par_chunks_mut(CHUNK)));
    match copy {
        None => chunks.for_each(|((g, p), (m, v))| update(c, keep, g, p, m, v)),
        Some(copy) => {
            assert_eq!((copy.rows, copy.cols), shape);
            let Data::Bf16(copy) = copy.data_mut() else { panic!("the copy of a master weight is bf16") };
            chunks.zip(copy.par_chunks_mut(CHUNK)).for_each(|(((g, p), (m, v)), copy)| {
                update(c, keep, g, p, m, v);
                round(p, copy);
            });
        }
    }
}
