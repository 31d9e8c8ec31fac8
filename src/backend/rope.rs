//! Rotary embeddings, with the norms of heads before them.

use super::platform::Platform;
use super::rms_norm::NormSpec;

/// One layer's rotary embedding: pairs (i, i + Dh/2) of every head turn by position / factor * theta^(-2i/Dh).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeSpec {
    /// Dh.
    pub head_dim: usize,
    /// Pairs that turn, the first ones; the others stay as they are (Gemma 4's "proportional" RoPE). Dh / 2 elsewhere.
    pub pairs: usize,
    /// Base of the angles.
    pub theta: f64,
    /// Positions are divided by this (linear scaling).
    pub factor: f64,
}

impl RopeSpec {
    /// All pairs turn, by position * theta^(-2i/Dh).
    pub fn new(head_dim: usize, theta: f64) -> Self {
        Self { head_dim, pairs: head_dim / 2, theta, factor: 1.0 }
    }

    /// No pair turns.
    pub fn still(head_dim: usize) -> Self {
        Self { pairs: 0, ..Self::new(head_dim, 1.0) }
    }

    /// The angle per position of every pair, `[Dh / 2]`, rounded where Transformers rounds: theta^(2i/Dh), its
    /// reciprocal and the division by the scaling factor are f32.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let of_pair = |i: usize| {
            let exponent = (2 * i) as f32 / self.head_dim as f32;
            1.0 / self.theta.powf(f64::from(exponent)) as f32 / self.factor as f32
        };
        (0..self.head_dim / 2).map(|i| if i < self.pairs { of_pair(i) } else { 0.0 }).collect()
    }
}

/// The norm of every head of q, k (Gemma 3) and v (Gemma 4).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadNorm<W> {
    /// The weight `[1, Dh]` (and, in the backward pass, its gradient); without one the norm is x rsqrt(mean(x^2) + eps).
    pub weight: Option<W>,
    /// Its figures.
    pub spec: NormSpec,
}

/// What turns q and k, and appends k and v to a cache.
pub trait Rope: Platform {
    /// q or k as attention reads it: the heads of x `[T, heads Dh]` normed, where there is a `norm`, and turned.
    fn rope_forward(
        &self,
        x: &Self::Tensor,
        norm: Option<HeadNorm<&Self::Tensor>>,
        tables: &Self::Tables,
        rope: &RopeSpec,
    ) -> Self::Tensor;
    /// [`Rope::rope_forward`] of q, which it returns, and of k into the batch's rows of a cache, and there v, normed but not
    /// turned: the cache's append. The norms are those of q, k and v; v is normed only where q and k are.
    #[allow(clippy::too_many_arguments, reason = "three tensors in, two caches out")]
    fn rope_append(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        norms: [Option<HeadNorm<&Self::Tensor>>; 3],
        tables: &Self::Tables,
        rope: &RopeSpec,
        cached_k: &mut Self::Tensor,
        cached_v: &mut Self::Tensor,
    ) -> Self::Tensor;
    /// Gradient of [`Rope::rope_forward`] by x; that of the norm's weight, if it has one, +=.
    fn rope_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        norm: Option<HeadNorm<(&Self::Tensor, &mut Self::Tensor)>>,
        tables: &Self::Tables,
        rope: &RopeSpec,
    ) -> Self::Tensor;
}

#[cfg(test)]
mod tests {
    use super::RopeSpec;

    /// Bit patterns that Transformers computes (`ROPE_INIT_FUNCTIONS`, PyTorch float32).
    #[test]
    fn frequencies_are_those_of_transformers() {
        let tables = [
            (256, 128, 1e6, 8.0, [(0, 0x3e000000), (1, 0x3de5ced3), (17, 0x3ca3770f), (127, 0x341583da)]),
            (256, 128, 1e4, 1.0, [(0, 0x3f800000), (2, 0x3f5dafd7), (40, 0x3d6655c2), (127, 0x38e15c91)]),
            (128, 64, 1e4, 1.0, [(1, 0x3f5dafd7), (17, 0x3db15978), (40, 0x3b4f3e38), (63, 0x38f22ce2)]),
            (512, 64, 1e6, 1.0, [(1, 0x3f728cf8), (17, 0x3ecc90c7), (63, 0x3d08b588), (64, 0)]),
        ];
        for (head_dim, pairs, theta, factor, want) in tables {
            let frequencies = RopeSpec { head_dim, pairs, theta, factor }.inverse_frequencies();
            assert_eq!(frequencies.len(), head_dim / 2);
            for (i, bits) in want {
                assert_eq!(frequencies[i].to_bits(), bits, "pair {i} of {head_dim}, theta {theta}");
            }
        }
    }
}
