//! RMSNorm as Gemma has it (Zhang and Sennrich 2019; up to Gemma 3 the weight is stored as its difference from 1), over groups
//! of columns: whole rows for a layer norm, heads for the norms of q, k and v.

use std::borrow::Cow;

use rayon::prelude::*;

use super::rows::new_rows;
use super::simd::{LANES, dot, f32_from_bf16, multiversion, sum};
use super::{Cpu, Data, Tensor, rows};
use crate::backend::{NormSpec, ResidualSpec, RmsNorm};

/// What a norm multiplies by in the `n` columns of a group: offset + w in f32, or 1 without a weight.
fn scales(w: Option<&Tensor>, n: usize, offset: f32) -> Vec<f32> {
    let Some(w) = w else { return vec![1.0; n] };
    assert_eq!(w.cols, n, "a weight for every column of a group");
    let w: Cow<[f32]> = match w.data() {
        Data::F32(w) => Cow::Borrowed(w),
        Data::Packed(_) => unreachable!("norms are not packed"),
        Data::Bf16(w) => w.iter().map(|&w| f32_from_bf16(w)).collect(),
    };
    w.iter().map(|w| offset + w).collect()
}

/// 1 / sqrt(mean(x^2) + eps) of one group.
#[inline(always)]
fn reciprocal_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

multiversion! {
    fn forward_groups(x: &[f32], scale: &[f32], eps: f32, y: &mut [f32]) {
        let n = scale.len();
        for (x, y) in x.chunks_exact(n).zip(y.chunks_exact_mut(n)) {
            let r = reciprocal_rms(x, eps);
            for ((y, x), s) in y.iter_mut().zip(x).zip(scale) {
                *y = x * r * s;
            }
        }
    }
}

/// y = x rsqrt(mean(x^2) + eps) (offset + w) over each group of `n` columns of x; w is f32 or bf16.
pub fn forward(x: &Tensor, w: Option<&Tensor>, n: usize, norm: NormSpec) -> Tensor {
    let scale = scales(w, n, norm.offset);
    assert!(x.cols.is_multiple_of(n), "groups of {n} columns in rows of {}", x.cols);
    let data = x.as_f32();
    let y = new_rows(x.rows, x.cols, |first, block| {
        forward_groups(&data[first * x.cols..][..block.len()], &scale, norm.eps, block);
    });
    Tensor::f32(x.rows, x.cols, y)
}

multiversion! {
    /// With g = dy (offset + w), xhat = r x: dx = r (g - xhat mean(g xhat)).
    fn backward_groups(dy: &[f32], x: &[f32], scale: &[f32], eps: f32, dx: &mut [f32]) {
        let n = scale.len();
        for ((dy, x), dx) in dy.chunks_exact(n).zip(x.chunks_exact(n)).zip(dx.chunks_exact_mut(n)) {
            let r = reciprocal_rms(x, eps);
            let mut acc = [0.0; LANES];
            let full = n / LANES * LANES;
            for i in (0..full).step_by(LANES) {
                for l in 0..LANES {
                    acc[l] = (dy[i + l] * scale[i + l]).mul_add(x[i + l], acc[l]);
                }
            }
            for i in full..n {
                acc[i - full] = (dy[i] * scale[i]).mul_add(x[i], acc[i - full]);
            }
            let coefficient = sum(acc) * r * r / n as f32;
            for (((dx, dy), x), s) in dx.iter_mut().zip(dy).zip(x).zip(scale) {
                *dx = r * (-coefficient).mul_add(*x, dy * s);
            }
        }
    }
}

multiversion! {
    fn reciprocal_rms_of_groups(x: &[f32], n: usize, eps: f32, out: &mut [f32]) {
        for (x, out) in x.chunks_exact(n).zip(out) {
            *out = reciprocal_rms(x, eps);
        }
    }
}

multiversion! {
    /// dw\[c\] += dy\[c\] xhat\[c\] over groups of `n` columns, of which this is columns `first..first + dw.len()`.
    fn backward_weight(dy: &[f32], x: &[f32], r: &[f32], n: usize, first: usize, dw: &mut [f32]) {
        for ((dy, x), r) in dy.chunks_exact(n).zip(x.chunks_exact(n)).zip(r) {
            let (dy, x) = (&dy[first..first + dw.len()], &x[first..first + dw.len()]);
            for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
                *dw = dy.mul_add(x * r, *dw);
            }
        }
    }
}

/// Gradient of [`forward`]: returns dx, and dw += over all groups in order. `weight` is (w, dw); w is f32 or bf16, dw f32.
pub fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: Option<(&Tensor, &mut Tensor)>,
    n: usize,
    norm: NormSpec,
) -> Tensor {
    /// Columns of dw per task: four cache lines.
    const COLUMNS: usize = 64;
    let (w, dw) = weight.unzip();
    let (scale, eps) = (scales(w, n, norm.offset), norm.eps);
    assert!(x.cols.is_multiple_of(n) && (dy.rows, dy.cols) == (x.rows, x.cols));
    let (dy, data) = (dy.as_f32(), x.as_f32());
    let dx = new_rows(x.rows, x.cols, |first, block| {
        let range = first * x.cols..first * x.cols + block.len();
        backward_groups(&dy[range.clone()], &data[range], &scale, eps, block);
    });
    let dx = Tensor::f32(x.rows, x.cols, dx);
    let Some(dw) = dw.filter(|dw| dw.rows > 0) else { return dx };
    assert_eq!(dw.cols, n, "a gradient for every column of a group");
    let r = new_rows(data.len() / n, 1, |first, block| {
        reciprocal_rms_of_groups(&data[first * n..][..block.len() * n], n, eps, block);
    });
    dw.as_f32_mut()
        .par_chunks_mut(COLUMNS)
        .enumerate()
        .for_each(|(i, dw)| backward_weight(dy, data, &r, n, i * COLUMNS, dw));
    dx
}

impl RmsNorm for Cpu {
    fn rms_norm_forward(&self, x: &Tensor, w: &Tensor, norm: NormSpec) -> Tensor {
        forward(x, Some(w), x.cols, norm)
    }

    fn add_norm_forward(
        &self,
        x: &Tensor,
        branch: &Tensor,
        post: Option<&Tensor>,
        pre: &Tensor,
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let normed_branch = |w| forward(branch, Some(w), branch.cols, spec.norm);
        let mut sum = post.map_or_else(|| branch.clone(), normed_branch);
        rows::add_scaled(&mut sum, x, spec.scale);
        let normed = self.rms_norm_forward(&sum, pre, spec.norm);
        (sum, normed)
    }

    fn add_norm_backward(
        &self,
        d_sum: Option<&Tensor>,
        d_normed: &Tensor,
        sum: &Tensor,
        (pre, d_pre): (&Tensor, &mut Tensor),
        post: Option<(&Tensor, &Tensor, &mut Tensor)>,
        spec: ResidualSpec,
    ) -> (Tensor, Option<Tensor>) {
        let backward = |dy: &Tensor, x: &Tensor, w, dw| backward(dy, x, Some((w, dw)), x.cols, spec.norm);
        let mut dx = backward(d_normed, sum, pre, d_pre);
        match d_sum {
            Some(d_sum) => rows::add_scaled(&mut dx, d_sum, spec.scale),
            None => rows::scale(&mut dx, spec.scale),
        }
        let d_branch = post.map(|(branch, w, dw)| backward(&dx, branch, w, dw));
        (dx, d_branch)
    }

    fn add_forward(&self, x: &Tensor, branch: &Tensor, post: &Tensor, spec: ResidualSpec) -> Tensor {
        let mut sum = forward(branch, Some(post), branch.cols, spec.norm);
        rows::add_scaled(&mut sum, x, spec.scale);
        sum
    }

    fn add_backward(
        &self,
        d_sum: &Tensor,
        more: Option<&Tensor>,
        (branch, w, dw): (&Tensor, &Tensor, &mut Tensor),
        spec: ResidualSpec,
    ) -> (Tensor, Tensor) {
        let mut dx = d_sum.clone();
        match more {
            Some(more) => rows::add_scaled(&mut dx, more, spec.scale),
            None => rows::scale(&mut dx, spec.scale),
        }
        let d_branch = backward(&dx, branch, Some((w, dw)), branch.cols, spec.norm);
        (dx, d_branch)
    }
}
