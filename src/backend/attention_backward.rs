//! The gradient of attention.

use super::attention::AttentionSpec;
use super::platform::Platform;

/// Gradient of segment attention.
pub trait AttentionBackward: Platform {
    /// Gradient of [`attention_forward`](super::Attention::attention_forward), of which every row of k and v belongs to a
    /// segment of the batch: returns (dq, dk, dv). Keys of a shared prefix collect the gradients of all that see them, in a
    /// fixed order; those that no query sees have none, zero.
    #[allow(clippy::too_many_arguments, reason = "all that the formula reads")]
    fn attention_backward(
        &self,
        d_o: &Self::Tensor,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        o: &Self::Tensor,
        lse: &Self::Tensor,
        tables: &Self::Tables,
        spec: &AttentionSpec,
    ) -> (Self::Tensor, Self::Tensor, Self::Tensor);
}
