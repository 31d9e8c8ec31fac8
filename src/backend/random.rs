//! Random matrices.

use super::platform::{DType, Platform};
use crate::rng::philox4x32;

/// Random numbers between center - spread and center + spread, each as likely as any other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uniform {
    /// Different seeds give different numbers.
    pub seed: u32,
    /// The mean.
    pub center: f32,
    /// The largest distance from it.
    pub spread: f32,
}

impl Uniform {
    /// Numbers between -`spread` and `spread`.
    pub fn up_to(spread: f32, seed: u32) -> Self {
        Self { seed, center: 0.0, spread }
    }

    /// Elements 4 n to 4 n + 3 of what [`Random::random`] makes, before they are rounded to its dtype.
    pub fn four(&self, n: u64) -> [f32; 4] {
        philox4x32([n as u32, (n >> 32) as u32, 0, 0], [self.seed, 0])
            .map(|bits| self.center + self.spread * ((bits >> 7) as f32 / 16_777_216.0 - 1.0))
    }
}

/// Random numbers.
pub trait Random: Platform {
    /// A matrix of random numbers, the same on every device. Element i is center + spread u with u = b / 2^24 - 1, where
    /// b is the upper 25 bits of word i mod 4 of Philox over the counter (i / 4, 0, 0) under the key (seed, 0); every
    /// operation rounds to f32, the last one to `dtype`.
    fn random(&self, uniform: &Uniform, dtype: DType, rows: usize, cols: usize) -> Self::Tensor;
}
