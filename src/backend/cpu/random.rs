//! Uniform random numbers.

use half::bf16;
use rayon::prelude::*;

use super::{Cpu, Data, Tensor};
use crate::backend::{DType, Random, Uniform};

/// Elements per task.
const CHUNK: usize = 16 * 1024;

fn fill<T: Send>(uniform: &Uniform, x: &mut [T], round: impl Fn(f32) -> T + Sync) {
    x.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| {
        for (quad, n) in chunk.chunks_mut(4).zip((i * CHUNK / 4) as u64..) {
            for (x, value) in quad.iter_mut().zip(uniform.four(n)) {
                *x = round(value);
            }
        }
    });
}

impl Random for Cpu {
    fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Tensor {
        let n = rows * cols;
        let data = match dtype {
            DType::F32 => {
                let mut x = vec![0.0; n];
                fill(uniform, &mut x, |x| x);
                Data::F32(x)
            }
            DType::Bf16 => {
                let mut x = vec![bf16::ZERO; n];
                fill(uniform, &mut x, bf16::from_f32);
                Data::Bf16(x)
            }
        };
        Tensor::new(rows, cols, data)
    }
}
