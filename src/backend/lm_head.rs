//! The LM head: draws, log-probs and their gradient, without logits in memory unless they are asked for.

use super::platform::{DType, Platform};
use crate::device::DeviceError;
use crate::rng::DrawKey;

/// Temperatures of [`HeadSpec`]. Below, f32 logits over the temperature may overflow, and what is left is greedy
/// sampling; above, what is left is uniform.
pub const TEMPERATURES: std::ops::RangeInclusive<f32> = 1e-6..=1e6;

/// What the LM head's log-probs leave for their backward pass.
#[derive(Debug, Clone)]
pub struct HeadTrace<T> {
    /// Log-sum-exp of each row's logits: `[1, R]`, f32.
    pub lse: T,
    /// The products that the logits are made of, in f32 as the backend lays them out.
    pub logits: Option<T>,
}

impl<T> HeadTrace<T> {
    /// An upper bound of the bytes of [`Self::logits`]: rows and tokens come in whole tiles.
    pub fn logits_bytes(rows: usize, vocab: usize) -> u64 {
        rows.next_multiple_of(64) as u64 * vocab.next_multiple_of(512) as u64 * DType::F32.bytes() as u64
    }
}

/// What turns hidden states into probabilities: pi(v) = softmax(cap(x . E_v) / temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadSpec {
    /// `c tanh(l / c)` on the logits.
    pub softcap: Option<f32>,
    /// Sampling temperature, one of [`TEMPERATURES`]; it is part of pi.
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

/// The LM head.
pub trait LmHead: Platform {
    /// Room for draws of up to `rows` rows.
    fn draws(&self, rows: usize) -> Self::Draws;
    /// Chooses tokens, each after a row of x `[R, D]`: choice i after row `rows`\[i\]. These ascend; a row that several choices
    /// are after is computed once by devices that compute more than they read. Logits exist only for a tile of rows x vocabulary.
    /// Waits for nothing.
    #[allow(clippy::too_many_arguments, reason = "all that the formula reads, and where tokens go")]
    fn lm_head_draw(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        rows: &[u32],
        choices: &[Choice],
        draws: &mut Self::Draws,
    );
    /// The tokens of the oldest draw that was not taken yet; waits for it, and for nothing that was asked later. The
    /// device's first error, if there was one by then. Panics if all were taken.
    fn take_draw(&self, draws: &mut Self::Draws) -> Result<Vec<Sampled>, DeviceError>;
    /// [`LmHead::lm_head_draw`] of a token after each row, and what it drew; zeros after an error.
    fn lm_head_sample(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        truncation: &Truncation,
        choices: &[Choice],
    ) -> Vec<Sampled> {
        let mut draws = self.draws(choices.len());
        let rows: Vec<u32> = (0..choices.len() as u32).collect();
        self.lm_head_draw(x, embedding, head, truncation, &rows, choices, &mut draws);
        let nothing = |_| vec![Sampled { token: 0, logprob: 0.0 }; choices.len()];
        self.take_draw(&mut draws).unwrap_or_else(nothing)
    }
    /// log pi(token | row) of every target, and what the backward pass needs of it: with `keep`, the logits as well.
    fn lm_head_logprob_forward(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        targets: &[Target],
        keep: bool,
    ) -> (Vec<f32>, HeadTrace<Self::Tensor>);
    /// Gradient of L = -sum_i weights\[i\] * logprob(targets\[i\]): returns dx `[R, D]`, and d_embedding +=. Logits that were not
    /// kept are computed again, in tiles; no bit depends on it.
    #[allow(clippy::too_many_arguments, reason = "all that the formula reads, and a sum")]
    fn lm_head_logprob_backward(
        &self,
        x: &Self::Tensor,
        embedding: &Self::Tensor,
        head: &HeadSpec,
        trace: &HeadTrace<Self::Tensor>,
        targets: &[Target],
        weights: &[f32],
        d_embedding: &mut Self::Tensor,
    ) -> Self::Tensor;
}
