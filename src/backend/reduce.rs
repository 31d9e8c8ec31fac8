//! Sums over whole tensors.

use super::platform::Platform;

/// Reductions over tensors.
pub trait Reduce: Platform {
    /// Sum of squares of every (f32 or bf16) tensor in f64, fixed order. NaN or Inf in one makes its sum non-finite.
    fn sum_squares(&self, x: &[&Self::Tensor]) -> Vec<f64>;
}
