//! A mixture of experts.

use super::platform::Platform;

/// A mixture of experts (Gemma 4 26B-A4B): each row goes to those of E MLPs whose scores are the largest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Routing {
    /// E.
    pub experts: usize,
    /// G, the experts of each row.
    pub top: usize,
    /// Factor on scores.
    pub scale: f32,
}

/// What experts computed: a row `[Fe]` of each for every route, in the order of experts and, of one expert, of tokens.
pub struct ExpertTrace<T> {
    /// x Wg^T.
    pub gate: T,
    /// x Wu^T.
    pub up: T,
    /// gelu_tanh(gate) * up.
    pub product: T,
}

/// The router and its experts.
pub trait Experts: Platform {
    /// Sends every row t to the G experts e_g that have the largest scores `[T, E]`, the first among equals, in the order of
    /// scores: share\[t, g\] is the softmax over g of scale * scores\[t, e_g\], weight\[t, g\] = share\[t, g\] factors\[e_g\].
    /// factors `[1, E]`.
    fn route_forward(&self, scores: &Self::Tensor, factors: &Self::Tensor, routing: &Routing)
    -> Self::Routes;
    /// The gradient of the scores, 0 of experts that a row does not go to, given that of the weights, `[T, G]` in f32; that
    /// of the factors +=, over the rows in a fixed order.
    fn route_backward(
        &self,
        d_weights: &Self::Tensor,
        routes: &Self::Routes,
        routing: &Routing,
        factors: (&Self::Tensor, &mut Self::Tensor),
    ) -> Self::Tensor;
    /// y\[t\] = sum over g of weight\[t, g\] (gelu_tanh(x\[t\] Wg^T) * (x\[t\] Wu^T)) Wd^T with the weights of expert e_g:
    /// x `[T, D]`; gate_up `[E 2 Fe, D]` holds Wg and then Wu of each expert, down `[E D, Fe]` Wd of each. A row's sum is in f32,
    /// in the order of g. With `keep` also what the backward pass needs.
    fn experts_forward(
        &self,
        x: &Self::Tensor,
        routes: &Self::Routes,
        gate_up: &Self::Tensor,
        down: &Self::Tensor,
        keep: bool,
    ) -> (Self::Tensor, Option<ExpertTrace<Self::Tensor>>);
    /// Gradient of [`Experts::experts_forward`]; (weights, their gradient, which +=, an expert's rows in ascending order).
    /// Returns (dx, d_weights `[T, G]` in f32).
    fn experts_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        routes: &Self::Routes,
        trace: &ExpertTrace<Self::Tensor>,
        gate_up: (&Self::Tensor, &mut Self::Tensor),
        down: (&Self::Tensor, &mut Self::Tensor),
    ) -> (Self::Tensor, Self::Tensor);
}
