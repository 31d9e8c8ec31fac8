//! Reductions of whole tensors.

use rayon::prelude::*;

use super::Tensor;
use super::simd::multiversion;

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

/// Sum of squares of an f32 tensor in f64, in chunks of a fixed size that are added in order. NaN or Inf in x makes
/// it non-finite.
pub fn sum_squares(x: &Tensor) -> f64 {
    let x = x.as_f32();
    if x.len() <= CHUNK {
        return chunk_sum_squares(x);
    }
    let partial: Vec<f64> = x.par_chunks(CHUNK).map(chunk_sum_squares).collect();
    partial.iter().sum()
}
