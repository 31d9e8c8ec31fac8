//! The ops that Gemma needs, as one trait. [`cpu`] implements it natively.
//!
//! Conventions. Tensors are row-major matrices `[rows, cols]`; a vector is `[1, n]`. Activations, statistics,
//! gradients, AdamW's moments and master weights are f32 on the CPU; parameters are f32 or bf16. Linear weights
//! are `[out, in]` as in Transformers. Names as in Gemma's literature: T tokens (flat), D model width, H query
//! heads, K key/value heads, Dh head width, F MLP width, V vocabulary.
//!
//! Every reduction has a fixed order that depends on the row's own data alone: the same row gives the same bits in
//! any batch, on any number of threads. So a log-prob recorded in sampling is the log-prob that training computes.

pub mod cpu;

use crate::rng::DrawKey;
use crate::segments::{QueryRun, Segments};

/// Storage type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE binary32.
    F32,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// Size of one element.
    pub fn bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 => 2,
        }
    }
}

/// Which way RoPE turns: backward is the inverse rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// By +angle.
    Forward,
    /// By -angle: the transpose, which carries gradients back.
    Backward,
}

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

/// What turns hidden states into probabilities: pi(v) = softmax(cap(x . E_v) / temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadSpec {
    /// `c tanh(l / c)` on the logits.
    pub softcap: Option<f32>,
    /// Sampling temperature, > 0; it is part of pi.
    pub temperature: f32,
}

/// Truncation of the distribution before a draw. The default truncates nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Truncation {
    /// Keep the k most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens whose probability is at least p times the most probable one's; 0 keeps all.
    pub min_p: f32,
}

impl Default for Truncation {
    fn default() -> Self {
        Self { top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

impl Truncation {
    /// Whether the whole distribution remains.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// How one row's token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The most probable token; the lowest id among equals.
    Greedy,
    /// Gumbel-max with Philox noise under this key.
    Draw(DrawKey),
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// log pi(token) under the full (untruncated) distribution at the head's temperature.
    pub logprob: f32,
}

/// One log-prob asked of the LM head: `token` after hidden row `row`. A row may have several targets (N responses
/// begin after the same prompt token) and is then computed once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Row of the hidden states.
    pub row: u32,
    /// Token id.
    pub token: u32,
}

/// AdamW's figures for one step (Loshchilov and Hutter 2019; decoupled decay).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// First-moment decay.
    pub beta1: f32,
    /// Second-moment decay.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1, 2, 3...: for bias correction.
    pub step: u64,
    /// Factor on the gradient: the global-norm clip (and the accumulation's mean).
    pub grad_scale: f32,
}

/// The ops. `+=` in an op's docs means it adds to what the output holds; otherwise outputs are new tensors.
pub trait Backend: Send + Sync {
    /// A matrix on the backend's device.
    type Tensor: Send + Sync;

    /// An f32 matrix of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Self::Tensor;
    /// Uploads row-major bytes of `dtype`. Panics unless `bytes` is exactly the matrix.
    fn upload(&self, dtype: DType, rows: usize, cols: usize, bytes: &[u8]) -> Self::Tensor;
    /// Downloads row-major bytes in the tensor's own dtype.
    fn download(&self, x: &Self::Tensor) -> Vec<u8>;
    /// Downloads as f32 whatever the dtype.
    fn to_f32(&self, x: &Self::Tensor) -> Vec<f32>;
    /// `[rows, cols]`.
    fn shape(&self, x: &Self::Tensor) -> (usize, usize);
    /// Storage type.
    fn dtype(&self, x: &Self::Tensor) -> DType;
    /// A copy.
    fn copy(&self, x: &Self::Tensor) -> Self::Tensor;
    /// Sets every element to zero.
    fn clear(&self, x: &mut Self::Tensor);

    /// x\[t\] = scale * table\[ids\[t\]\]: `[T, D]` f32.
    fn embed_forward(&self, table: &Self::Tensor, ids: &[u32], scale: f32) -> Self::Tensor;
    /// dtable\[ids\[t\]\] += scale * dx\[t\], tokens in order.
    fn embed_backward(&self, dx: &Self::Tensor, ids: &[u32], scale: f32, dtable: &mut Self::Tensor);

    /// y = x * rsqrt(mean(x^2) + eps) * (1 + w) over each group of `w.cols` columns of x: whole rows for a layer
    /// norm, heads for qk-norm.
    fn rms_norm_forward(&self, x: &Self::Tensor, w: &Self::Tensor, eps: f32) -> Self::Tensor;
    /// Gradient of [`Backend::rms_norm_forward`]: returns dx, and dw += over all rows in order.
    fn rms_norm_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Tensor,
        eps: f32,
        dw: &mut Self::Tensor,
    ) -> Self::Tensor;

    /// Y = X W^T: X `[T, in]`, W `[out, in]` (f32 or bf16), Y `[T, out]`.
    fn matmul_forward(&self, x: &Self::Tensor, w: &Self::Tensor) -> Self::Tensor;
    /// dX += dY W.
    fn matmul_backward_input(&self, dy: &Self::Tensor, w: &Self::Tensor, dx: &mut Self::Tensor);
    /// dW += dY^T X.
    fn matmul_backward_weight(&self, dy: &Self::Tensor, x: &Self::Tensor, dw: &mut Self::Tensor);

    /// Rotates pairs (i, i + Dh/2) of every head of every row in place by positions\[t\] / factor * theta^(-2i/Dh).
    fn rope(
        &self,
        x: &mut Self::Tensor,
        positions: &[u32],
        head_dim: usize,
        theta: f64,
        factor: f64,
        direction: Direction,
    );

    /// Segment attention. q `[Tq, H Dh]` with rows as `runs` say; k, v `[rows, K Dh]` with rows as `segments` say.
    /// Returns o `[Tq, H Dh]` and lse `[Tq, H]` (natural log of the sum of exp of the visible scores); rows of q
    /// that belong to no run come out as zero with an lse of -inf.
    fn attention_forward(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        segments: &Segments,
        runs: &[QueryRun],
        spec: &AttentionSpec,
    ) -> (Self::Tensor, Self::Tensor);
    /// Gradient of [`Backend::attention_forward`] where queries are all tokens (query row = key row): returns
    /// (dq, dk, dv). Keys of a shared prefix collect the gradients of all that see them, in a fixed order.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        d_o: &Self::Tensor,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        o: &Self::Tensor,
        lse: &Self::Tensor,
        segments: &Segments,
        spec: &AttentionSpec,
    ) -> (Self::Tensor, Self::Tensor, Self::Tensor);

    /// h = gelu_tanh(gate) * up.
    fn geglu_forward(&self, gate: &Self::Tensor, up: &Self::Tensor) -> Self::Tensor;
    /// (dgate, dup) of [`Backend::geglu_forward`].
    fn geglu_backward(
        &self,
        dh: &Self::Tensor,
        gate: &Self::Tensor,
        up: &Self::Tensor,
    ) -> (Self::Tensor, Self::Tensor);

    /// x += y.
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor);
    /// out\[i\] = x\[rows\[i\]\].
    fn gather_rows(&self, x: &Self::Tensor, rows: &[u32]) -> Self::Tensor;
    /// dx\[rows\[i\]\] += dy\[i\]; `rows` must not repeat.
    fn scatter_add_rows(&self, dy: &Self::Tensor, rows: &[u32], dx: &mut Self::Tensor);
    /// dst\[rows\[i\]\] = src\[i\]: the KV cache's append.
    fn write_rows(&self, src: &Self::Tensor, rows: &[u32], dst: &mut Self::Tensor);

    /// Chooses one token per row of x `[R, D]`: logits exist only for a tile of rows x vocabulary.
    fn lm_head_sample(
        &self,
        x: &Self::Tensor,
        table: &Self::Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        choices: &[Choice],
    ) -> Vec<Sampled>;
    /// log pi(token | row) of every target, and each row's log-sum-exp `[R]` for the backward pass.
    fn lm_head_logprob_forward(
        &self,
        x: &Self::Tensor,
        table: &Self::Tensor,
        head: &HeadSpec,
        targets: &[Target],
    ) -> (Vec<f32>, Vec<f32>);
    /// Gradient of L = -sum_i weights\[i\] * logprob(targets\[i\]): returns dx `[R, D]`, and dtable +=. Logit tiles
    /// are computed again.
    #[allow(clippy::too_many_arguments)]
    fn lm_head_logprob_backward(
        &self,
        x: &Self::Tensor,
        table: &Self::Tensor,
        head: &HeadSpec,
        lse: &[f32],
        targets: &[Target],
        weights: &[f32],
        dtable: &mut Self::Tensor,
    ) -> Self::Tensor;

    /// Sum of squares in f64, fixed order. NaN or Inf in x makes it non-finite.
    fn sum_squares(&self, x: &Self::Tensor) -> f64;
    /// One AdamW update of f32 `master` from `grad`, with the moments m and v; then `copy` (the bf16 parameter),
    /// where given, is `master` rounded to nearest even.
    fn adamw(
        &self,
        hyper: &AdamW,
        grad: &Self::Tensor,
        master: &mut Self::Tensor,
        m: &mut Self::Tensor,
        v: &mut Self::Tensor,
        copy: Option<&mut Self::Tensor>,
    );
}
