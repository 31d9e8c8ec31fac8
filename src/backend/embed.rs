//! Looking up rows of the embedding matrix.

use super::platform::Platform;

/// The embedding.
pub trait Embed: Platform {
    /// x\[t\] = scale * embedding\[ids\[t\]\]: `[T, D]`.
    fn embed_forward(&self, embedding: &Self::Tensor, tables: &Self::Tables, scale: f32) -> Self::Tensor;
    /// d_embedding\[ids\[t\]\] += scale * dx\[t\], the tokens of an id in ascending order.
    fn embed_backward(
        &self,
        dx: &Self::Tensor,
        tables: &Self::Tables,
        scale: f32,
        d_embedding: &mut Self::Tensor,
    );
}
