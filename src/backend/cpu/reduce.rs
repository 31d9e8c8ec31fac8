//! Reductions of whole tensors.

use half::bf16;
use rayon::prelude::*;

use super::simd::{f32_from_bf16, multiversion};
use super::{Cpu, Data, Tensor};
use crate::backend::Reduce;

/// Elements per partial sum: fixed, because it is part of the order of the sum.
const CHUNK: usize = 16 * 1024;

multiversion! {
    fn chunk_sum_squares(x: &[f32]) -> f64 {
        let mut acc = [0.0f64; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for block in blocks {
            for l in 0..16 {
                let x = f64::from(block[l]);
                acc[l] = x.mul_add(x, acc[l]);
            }
        }
        for (acc, &x) in acc.iter_mut().zip(rest) {
            *acc = f64::from(x).mul_add(f64::from(x), *acc);
        }
        acc.iter().sum()
    }
}

multiversion! {
    fn chunk_sum_squares_bf16(x: &[bf16]) -> f64 {
        let mut acc = [0.0f64; 16];
        let (blocks, rest) = x.as_chunks::<16>();
        for block in blocks {
            for l in 0..16 {
                let x = f64::from(f32_from_bf16(block[l]));
                acc[l] = x.mul_add(x, acc[l]);
            }
        }
        for (acc, &x) in acc.iter_mut().zip(rest) {
            let x = f64::from(f32_from_bf16(x));
            *acc = x.mul_add(x, *acc);
        }
        acc.iter().sum()
    }
}

/// Sum of squares of a tensor in f64, in chunks of a fixed size that are added in order. NaN or Inf in x makes
/// it non-finite.
pub fn sum_squares(x: &Tensor) -> f64 {
    let partial: Vec<f64> = match x.data() {
        Data::F32(x) if x.len() <= CHUNK => return chunk_sum_squares(x),
        Data::F32(x) => x.par_chunks(CHUNK).map(chunk_sum_squares).collect(),
        Data::Bf16(x) => x.par_chunks(CHUNK).map(chunk_sum_squares_bf16).collect(),
        Data::Packed(_) => unreachable!("gradients are not packed"),
    };
    partial.iter().sum()
}

impl Reduce for Cpu {
    fn sum_squares(&self, x: &[&Tensor]) -> Vec<f64> {
        x.iter().map(|x| sum_squares(x)).collect()
    }
}
