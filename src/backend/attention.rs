//! Attention over segments: N streams that continue one prompt read its keys and values once.

use super::platform::Platform;

/// What one layer's attention needs to know beside its tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// H.
    pub heads: usize,
    /// K; query head h reads key/value head h / (H / K).
    pub kv_heads: usize,
    /// Dh.
    pub head_dim: usize,
    /// Factor on q . k.
    pub scale: f32,
    /// `c tanh(s / c)` on the scaled scores, before the mask.
    pub softcap: Option<f32>,
    /// Sliding window.
    pub window: Option<usize>,
}

/// Segment attention.
pub trait Attention: Platform {
    /// Segment attention. q `[Tq, H Dh]` with rows as the batch's runs say; k, v `[rows, K Dh]` with rows as its
    /// segments say. Returns o `[Tq, H Dh]` and lse `[Tq, H]` (f32: natural log of the sum of exp of the visible
    /// scores); rows of q that belong to no run come out as zero with an lse of -inf.
    fn attention_forward(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        tables: &Self::Tables,
        spec: &AttentionSpec,
    ) -> (Self::Tensor, Self::Tensor);
}
