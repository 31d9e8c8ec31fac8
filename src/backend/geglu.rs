//! The gated MLP's products.

use super::platform::Platform;

/// gate and up of the gated MLP, where they are kept.
pub type GateUp<T> = Option<(T, T)>;

/// GeGLU, and the gate of per-layer inputs.
pub trait Geglu: Platform {
    /// h = gelu_tanh(X Wg^T) * (X Wu^T): X `[T, D]`, weights `[F, D]`. With `keep` also the two products, (gate, up),
    /// which the backward pass needs.
    fn geglu_forward(
        &self,
        x: &Self::Tensor,
        w_gate: &Self::Tensor,
        w_up: &Self::Tensor,
        keep: bool,
    ) -> (Self::Tensor, GateUp<Self::Tensor>);
    /// (dgate, dup) of h = gelu_tanh(gate) * up.
    fn geglu_backward(
        &self,
        dh: &Self::Tensor,
        gate: &Self::Tensor,
        up: &Self::Tensor,
    ) -> (Self::Tensor, Self::Tensor);
    /// h = gelu_tanh(gate) * up, where up is columns `first..first + P` of `inputs`: gate `[T, P]`.
    fn gelu_product_forward(&self, gate: &Self::Tensor, inputs: &Self::Tensor, first: usize) -> Self::Tensor;
    /// dgate of [`Geglu::gelu_product_forward`]; the gradient of up replaces columns `first..first + P` of `d_inputs`.
    fn gelu_product_backward(
        &self,
        dh: &Self::Tensor,
        gate: &Self::Tensor,
        inputs: &Self::Tensor,
        first: usize,
        d_inputs: &mut Self::Tensor,
    ) -> Self::Tensor;
}
