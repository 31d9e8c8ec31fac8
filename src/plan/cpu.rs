//! What the CPU holds at once while it samples and trains.
//!
//! Its ops take the host's memory, which nobody counts before a run. So these are the lives of tensors as the passes order them: a
//! tensor is counted from the op that returns it to where `gemma/forward.rs` and `gemma/backward.rs` drop it, and an op's own
//! scratch while it runs. Sizes are of f32, which is what the CPU's activations are, and of operands as products take them.

use crate::backend::cpu::{self, form, lm_head};
use crate::backend::{Compute, DType};
use crate::gemma::activations::{BlockBytes, Kept, StepSize, shared_width};
use crate::gemma::config::{GemmaConfig, NormPlacement};
use crate::model_dir::ComputeChoice;

/// Bytes of a float.
const F32: usize = size_of::<f32>();
/// Bytes of scratch that each thread takes for the products of any layer: panels of both operands and of a result.
const THREAD: usize = 400 << 10;
/// Rows of a weight's gradient that a task computes, for which it takes the columns of dY.
const COLUMNS: usize = 48;
/// Rows of logits where sampling ranks a whole vocabulary.
const RANKED: usize = 16;

/// Bytes of a tokenizer for each token of the vocabulary. Gemma's tables take 229, 60 MB in all; reading tokenizer.json takes
/// as much again, which the program's allocator keeps.
pub(super) const TOKENIZER: usize = 480;

/// A model on the CPU.
pub(super) struct OnCpu<'a> {
    model: &'a GemmaConfig,
    compute: Compute,
    threads: usize,
}

/// The widths of one layer that the arithmetic below is in.
struct Widths {
    d: usize,
    q: usize,
    /// Of keys and of values, each; 0 where the layer reads another's.
    kv: usize,
    heads: usize,
    f: usize,
}

impl<'a> OnCpu<'a> {
    /// Whose weights are of this type, with the threads that there are.
    pub(super) fn new(model: &'a GemmaConfig, weights: DType, compute: ComputeChoice) -> Self {
        let compute = match weights {
            DType::Bf16 if compute != ComputeChoice::F32 => Compute::Bf16,
            _ => Compute::F32,
        };
        Self { model, compute, threads: cpu::threads() }
    }

    fn widths(&self, l: usize) -> Widths {
        let shape = self.model.layers[l].shape;
        let own = self.model.layers[l].kv_from.is_none();
        Widths {
            d: self.model.hidden_size,
            q: shape.q_width(),
            kv: if own { shape.kv_width() } else { 0 },
            heads: shape.heads,
            f: shape.intermediate,
        }
    }

    /// Bytes of a term in the panels of a gradient's product.
    fn panel(&self) -> usize {
        form::term_bytes(self.compute)
    }

    /// Bytes of a term of rows beside the rows themselves, which f32 products read where they lie.
    fn rounded(&self) -> usize {
        if self.compute == Compute::F32 { 0 } else { self.panel() }
    }

    /// Each thread's scratch where products run over so many tokens.
    fn scratch(&self, tokens: usize) -> usize {
        self.threads * (THREAD + COLUMNS * tokens * self.panel())
    }

    /// Bytes of a token's way through a layer without anything being kept, the residual stream before it included.
    fn through(&self, l: usize) -> usize {
        let Widths { d, q, kv, heads, f } = self.widths(l);
        let rounded = self.rounded();
        // The stream and its norm; q before and after RoPE, k, v, and attention's output.
        let attention = F32 * (3 * d + 3 * q + 3 * kv + heads) + rounded * q.max(d);
        // The stream before and behind attention, both norms, attention's output; gate, up and product.
        let gated = F32 * (5 * d + 3 * f) + rounded * d;
        let down = F32 * (8 * d + f) + rounded * f;
        let experts = self
            .model
            .experts
            .map_or(0, |experts| F32 * experts.per_token * (2 * d + 3 * experts.width) + F32 * 3 * d);
        attention.max(gated).max(down) + experts
    }

    /// The most of any layer.
    fn through_any(&self) -> usize {
        let layers = 0..self.model.layers.len();
        // The layers' inputs, and what they are the sum of.
        layers.map(|l| self.through(l)).max().unwrap_or(0) + 3 * F32 * self.model.per_layer_columns()
    }

    /// Bytes that sampling takes: keys and values of `prompt` tokens and of `streams` tails of `new` tokens, and either all
    /// of the prompts or a token of every stream on its way through a layer.
    pub(super) fn sampling(&self, prompt: usize, streams: usize, new: usize, truncated: bool) -> u64 {
        let own = self.model.layers.iter().filter(|layer| layer.kv_from.is_none());
        let cached: usize = own.map(|layer| 2 * layer.shape.kv_width()).sum();
        let rows = prompt + streams * new.saturating_sub(1);
        let active = prompt.max(streams);
        let logits = if truncated { RANKED.min(streams) * self.model.vocab_size } else { 0 };
        let all = F32 * (cached * rows + logits) + active * self.through_any() + self.scratch(0);
        all as u64
    }

    /// Bytes that a reward model takes for so many tokens.
    pub(super) fn scoring(&self, tokens: usize) -> u64 {
        self.sampling(tokens, 0, 0, false)
    }

    /// Bytes that the forward and the backward pass of a step take.
    pub(super) fn training(&self, size: &StepSize, kept: &Kept) -> u64 {
        let (layers, d) = (self.model.layers.len(), self.model.hidden_size);
        let StepSize { tokens, predicting } = *size;
        let keeps = |l: usize| {
            let block = BlockBytes::new(self.model, l, DType::F32);
            usize::from(kept.attention_of(l)) * block.attention + usize::from(kept.mlp_of(l)) * block.mlp
        };
        // Keys and values that later layers read are held by the trace, their gradients' sums by the pass.
        let inputs = 4 * self.model.per_layer_columns();
        let shared = F32 * (2 * shared_width(self.model) + inputs);
        // The hidden states that predict and their gradient; of kept logits, all.
        let logits = if kept.logits { F32 * predicting * self.model.vocab_size } else { 0 };
        let head = F32 * 2 * d * predicting;
        let all_kept: usize = (0..layers).map(keeps).sum();
        let gradient =
            lm_head::gradient_bytes(predicting, d, self.model.vocab_size, self.compute, self.threads);
        let at_head = tokens * (F32 * (layers + 1) * d + shared + all_kept) + gradient;
        let at_layer = |l: usize| {
            // The stream up to behind the layer; above the top there is no gradient of it yet.
            let stream = F32 * d * (l + 2 + usize::from(l + 1 < layers));
            let below: usize = (0..=l).map(keeps).sum();
            tokens * (stream + below + shared + self.back(l, kept))
        };
        let at_layers = (0..layers).map(at_layer).max().unwrap_or(0) + self.scratch(tokens);
        (at_head.max(at_layers) + head + logits) as u64
    }

    /// Bytes of a token's way back through layer `l`, beside the residual stream and its gradient, and what blocks keep.
    fn back(&self, l: usize, kept: &Kept) -> usize {
        let Widths { d, q, kv, heads, f } = self.widths(l);
        let (panel, rounded) = (self.panel(), self.rounded());
        let block = BlockBytes::new(self.model, l, DType::F32);
        let again =
            usize::from(!kept.attention_of(l)) * block.attention + usize::from(!kept.mlp_of(l)) * block.mlp;
        let sandwich = self.model.norms == NormPlacement::Sandwich;
        let branch = if sandwich { d } else { 0 };
        // The gradient of the normed stream, both normed inputs; the gradients behind the MLP's block.
        let base = again + F32 * (4 * d + branch);
        // Through down, then back through GELU with all of dh, dgate and dup, then through gate and up.
        let down = (panel * f).max(F32 * f + rounded * d);
        let gated = F32 * 3 * f + (panel * d).max(F32 * d + rounded * f);
        let mlp = down.max(gated);
        // Behind it: its input's gradient, and those behind the attention block.
        let between = F32 * (2 * d + branch);
        let dense = |x: usize| F32 * x;
        let through_o = (panel * q).max(dense(q) + rounded * d);
        let of_scores = dense(2 * q + 2 * kv + 2 * heads);
        let of_rope = dense(4 * q + 2 * kv).max(dense(3 * q + 4 * kv));
        let value_norm = if self.model.value_norm { kv } else { 0 };
        let through_qkv = dense(3 * q + 3 * kv + value_norm) + (panel * d).max(dense(d) + rounded * q);
        let attention = through_o.max(of_scores).max(of_rope).max(through_qkv);
        let experts =
            self.model.experts.map_or(0, |experts| F32 * experts.per_token * (3 * d + 2 * experts.width));
        base + mlp.max(between + attention) + experts
    }
}
