//! RMSNorm, and the residual sums that it begins and ends.

use super::platform::Platform;

/// An RMSNorm: y = x rsqrt(mean(x^2) + eps) (offset + w).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormSpec {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weight: 1 up to Gemma 3, whose weights are differences from 1; 0 in Gemma 4.
    pub offset: f32,
}

/// A sum on the residual stream: sum = scale (x + branch), of which `norm` says how it and the branch are normed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResidualSpec {
    /// Of the norm of the branch and of that of the sum.
    pub norm: NormSpec,
    /// The layer scalar of Gemma 4, at the end of a layer; 1 elsewhere.
    pub scale: f32,
}

/// RMSNorm, alone and with the sums on the residual stream.
pub trait RmsNorm: Platform {
    /// y = x rsqrt(mean(x^2) + eps) (offset + w) over the columns of x; w `[1, D]`.
    fn rms_norm_forward(&self, x: &Self::Tensor, w: &Self::Tensor, norm: NormSpec) -> Self::Tensor;
    /// The end of a branch and the beginning of the next: sum = scale (x + norm(branch; post)), or scale (x + branch) without
    /// `post`, and normed = norm(sum; pre). Returns (sum, normed); normed is computed from sum as stored.
    fn add_norm_forward(
        &self,
        x: &Self::Tensor,
        branch: &Self::Tensor,
        post: Option<&Self::Tensor>,
        pre: &Self::Tensor,
        spec: ResidualSpec,
    ) -> (Self::Tensor, Self::Tensor);
    /// Gradient of [`RmsNorm::add_norm_forward`], given those of sum (`None`: zero) and normed. `pre` is (w, dw),
    /// `post` (branch, w, dw); weights' gradients += over all rows in a fixed order. Returns (dx, dbranch); without
    /// `post` there is no dbranch: it equals dx.
    fn add_norm_backward(
        &self,
        d_sum: Option<&Self::Tensor>,
        d_normed: &Self::Tensor,
        sum: &Self::Tensor,
        pre: (&Self::Tensor, &mut Self::Tensor),
        post: Option<(&Self::Tensor, &Self::Tensor, &mut Self::Tensor)>,
        spec: ResidualSpec,
    ) -> (Self::Tensor, Option<Self::Tensor>);
    /// [`RmsNorm::add_norm_forward`] where no norm follows: scale (x + norm(branch; post)).
    fn add_forward(
        &self,
        x: &Self::Tensor,
        branch: &Self::Tensor,
        post: &Self::Tensor,
        spec: ResidualSpec,
    ) -> Self::Tensor;
    /// Gradient of [`RmsNorm::add_forward`], given that of the sum, which is `d_sum` plus `more`; `post` as in
    /// [`RmsNorm::add_norm_backward`]. Returns (dx, dbranch).
    fn add_backward(
        &self,
        d_sum: &Self::Tensor,
        more: Option<&Self::Tensor>,
        post: (&Self::Tensor, &Self::Tensor, &mut Self::Tensor),
        spec: ResidualSpec,
    ) -> (Self::Tensor, Self::Tensor);
}
