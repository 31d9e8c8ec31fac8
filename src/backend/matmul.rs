//! Products with weights, and their gradients.

use super::platform::Platform;

/// Linear maps.
pub trait Matmul: Platform {
    /// Y_i = X W_i^T: X `[T, in]`, W_i `[out_i, in]`, Y_i `[T, out_i]`.
    fn matmul_forward<const N: usize>(&self, x: &Self::Tensor, w: [&Self::Tensor; N]) -> [Self::Tensor; N];
    /// Y_i = X W_i^T + H_i B_i^T, where there is such an (H_i, B_i), summed before it is rounded: H_i `[T, r]`, B_i `[out_i, r]`.
    fn matmul_low_rank_forward<const N: usize>(
        &self,
        x: &Self::Tensor,
        w: [&Self::Tensor; N],
        low_rank: [Option<(&Self::Tensor, &Self::Tensor)>; N],
    ) -> [Self::Tensor; N];
    /// dX = sum over i of dY_i W_i, summed before it is rounded.
    fn matmul_backward_input(&self, pairs: &[(&Self::Tensor, &Self::Tensor)]) -> Self::Tensor;
    /// dW += dY^T X.
    fn matmul_backward_weight(&self, dy: &Self::Tensor, x: &Self::Tensor, dw: &mut Self::Tensor);
}
