//! What a training step keeps of its forward pass, and what the backward pass computes again: activation
//! recomputation, layer by layer and in two grades (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost";
//! Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models").
//!
//! The residual stream before every layer is always kept. Of a layer's two blocks each may keep what it computed, or
//! compute it again from that stream; so may the LM head its logits. The ops and their inputs are the same either way, and
//! so are the gradients, to the bit. To compute all of it again takes a forward pass more, of three that a step has the work
//! of.

use serde::{Deserialize, Serialize};

use super::config::{GemmaConfig, LayerShape, NormPlacement};
use crate::backend::{Backend, DType, HeadTrace};

/// Which activations the backward pass computes again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// What there is no memory to keep.
    #[default]
    Auto,
    /// None: a step needs the memory for all of them.
    None,
    /// All but the residual stream.
    All,
}

/// What keeps its activations: of the blocks those of the last layers, which the backward pass needs first, so that their
/// memory is free again when it comes to layers whose activations it must compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    /// Layers of the model.
    pub layers: usize,
    /// Layers whose attention block keeps: the last so many.
    pub attention: usize,
    /// Layers whose MLP keeps: the last so many.
    pub mlp: usize,
    /// Whether the LM head keeps its logits.
    pub logits: bool,
}

/// A share of all activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// None.
    None,
    /// Not all.
    Some,
    /// All of them.
    All,
}

impl Kept {
    /// Nothing beside the residual stream.
    pub fn none(config: &GemmaConfig) -> Self {
        Self { layers: config.layers.len(), attention: 0, mlp: 0, logits: false }
    }

    /// Everything.
    pub fn all(config: &GemmaConfig) -> Self {
        let layers = config.layers.len();
        Self { layers, attention: layers, mlp: layers, logits: true }
    }

    /// As much as fits `bytes` of memory beside what the step needs in any case. Attention goes first: what it keeps is
    /// small, and what it computes runs farther from a device's limits than the MLP's products. The logits go last: they
    /// take 4 bytes for a chain of D products that is saved, an MLP in bf16 takes 3.
    pub fn within(bytes: u64, config: &GemmaConfig, activations: DType, size: &StepSize) -> Self {
        // What is free lies in pieces, and blocks do not fill them: an eighth is lost to that.
        let room = bytes.saturating_sub(size.least_bytes(config, activations)) / 8 * 7;
        let layers = config.layers.len();
        // How many of the last layers there is room for, by the bytes of a token of each, and what is left of it.
        let fitting = |room: u64, each: fn(BlockBytes) -> usize| {
            let mut left = room;
            let fits = |&l: &usize| {
                let bytes = each(BlockBytes::new(config, l, activations)) as u64 * size.tokens as u64;
                let after = left.checked_sub(bytes);
                left = after.unwrap_or(left);
                after.is_some()
            };
            ((0..layers).rev().take_while(fits).count(), left)
        };
        let (attention, left) = fitting(room, |block| block.attention);
        let (mlp, left) = if attention == layers { fitting(left, |block| block.mlp) } else { (0, left) };
        let logits = mlp == layers && left >= size.logits_bytes(config);
        Self { layers, attention, mlp, logits }
    }

    /// Blocks, and the head, that keep their activations.
    pub fn parts(&self) -> usize {
        self.attention + self.mlp + usize::from(self.logits)
    }

    /// How large a share this is.
    pub fn share(&self) -> Share {
        match self.parts() {
            0 => Share::None,
            parts if parts == 2 * self.layers + 1 => Share::All,
            _ => Share::Some,
        }
    }

    /// Bytes that the layers keep for each token, beside the residual stream.
    pub fn bytes_per_token(&self, config: &GemmaConfig, activations: DType) -> usize {
        let bytes = |l: usize| {
            let each = BlockBytes::new(config, l, activations);
            usize::from(self.attention_of(l)) * each.attention + usize::from(self.mlp_of(l)) * each.mlp
        };
        (0..config.layers.len()).map(bytes).sum()
    }

    /// Whether the attention block of layer `l` keeps.
    pub(crate) fn attention_of(&self, l: usize) -> bool {
        l + self.attention >= self.layers
    }

    /// Whether the MLP of layer `l` keeps.
    pub(crate) fn mlp_of(&self, l: usize) -> bool {
        l + self.mlp >= self.layers
    }
}

/// Bytes of a token's route to an expert: number, share, weight, and its rows there and back.
const ROUTE_BYTES: usize = 5 * 4;

/// Bytes that the blocks of one layer keep for each token.
pub(crate) struct BlockBytes {
    /// Of the attention block.
    pub(crate) attention: usize,
    /// Of the MLP, and of what stands beside it and behind it.
    pub(crate) mlp: usize,
}

impl BlockBytes {
    /// Of layer `l`.
    pub(crate) fn new(config: &GemmaConfig, l: usize, activations: DType) -> Self {
        let layer = &config.layers[l];
        let (d, LayerShape { heads, intermediate: f, .. }) = (config.hidden_size, layer.shape);
        let (q, own, p) = (layer.shape.q_width(), layer.kv_from.is_none(), config.per_layer_width);
        let kv = if own { layer.shape.kv_width() } else { 0 };
        // What attention reads is held anyway if it is another layer's, or if another reads it.
        let read = if config.is_read(l) { 0 } else { 2 * kv };
        // A block's output is asked for by the gradient of the norm behind it, and by nothing else.
        let out = match config.norms {
            NormPlacement::Pre => 0,
            NormPlacement::Sandwich => d,
        };
        let input = if p == 0 { 0 } else { 2 * (p + d) };
        // v before its norm, unless that is k.
        let raw_values = if config.value_norm && !layer.keys_are_values && own { kv } else { 0 };
        let size = activations.bytes();
        // gate, up and product of every route; the MLP's output and theirs, of which `out` is the sum.
        let (routes, experts) = config.experts.map_or((0, 0), |experts| {
            (ROUTE_BYTES * experts.per_token, 3 * experts.per_token * experts.width + 2 * d)
        });
        Self {
            // q and k before and after RoPE, v, o, the residual stream behind the block; lse.
            attention: size * (3 * q + kv + read + raw_values + d + out) + DType::F32.bytes() * heads,
            // gate, up and their product; gate, product, output and the residual stream of the block behind it; experts.
            mlp: size * (3 * f + out + input + experts) + routes,
        }
    }
}

/// Columns of the keys and values that several layers read.
pub(crate) fn shared_width(config: &GemmaConfig) -> usize {
    let read = (0..config.layers.len()).filter(|&l| config.is_read(l));
    read.map(|l| 2 * config.layers[l].shape.kv_width()).sum()
}

/// How large a step's batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// T.
    pub tokens: usize,
    /// Rows of the hidden states that predict a token.
    pub predicting: usize,
}

/// Runs a forward pass of that size that keeps what it is told to: as much as `recompute` says and, where that is for the memory
/// to decide, nothing beside the residual stream if there turns out to be too little. Returns what was kept as well.
pub fn keeping<B: Backend, R>(
    recompute: Recompute,
    backend: &B,
    config: &GemmaConfig,
    size: &StepSize,
    run: impl Fn(Kept) -> R,
) -> (Kept, R) {
    let dtype = backend.activation_dtype();
    let kept = match recompute {
        Recompute::Auto => Kept::within(backend.training_bytes(), config, dtype, size),
        Recompute::None => Kept::all(config),
        Recompute::All => Kept::none(config),
    };
    let ran = run(kept);
    // What is free may lie in pieces that are too small.
    let lacking = || backend.check().is_err_and(|e| e.out_of_memory);
    if recompute == Recompute::Auto && kept != Kept::none(config) && lacking() {
        drop(ran);
        backend.forget_out_of_memory();
        return (Kept::none(config), run(Kept::none(config)));
    }
    (kept, ran)
}

/// The most that the LM head takes for logits, their gradient and what it sums them into.
const HEAD_WORKSPACE: u64 = 512 << 20;

impl StepSize {
    /// Bytes of the LM head's logits, where they are kept.
    pub fn logits_bytes(&self, config: &GemmaConfig) -> u64 {
        HeadTrace::<()>::logits_bytes(self.predicting, config.vocab_size)
    }

    /// An upper bound of the bytes that a step takes which keeps nothing but the residual stream: that stream; the LM
    /// head; and, of one layer at a time, the activations and as much again for their gradients.
    pub(crate) fn least_bytes(&self, config: &GemmaConfig, activations: DType) -> u64 {
        let (tokens, predicting) = (self.tokens as u64, self.predicting as u64);
        let (width, size) = (config.hidden_size as u64, activations.bytes() as u64);
        let block = |l: usize| {
            let each = BlockBytes::new(config, l, activations);
            (each.attention + each.mlp) as u64
        };
        let largest = (0..config.layers.len()).map(block).max().unwrap_or(0);
        // Keys and values that several layers read, and the sums of their gradients.
        let shared = shared_width(config) as u64 * tokens * (size + DType::F32.bytes() as u64);
        let stream = (config.layers.len() as u64 + 1) * tokens * width * size;
        // Hidden states, those that predict, and the gradients of both, one of them in f32.
        let head = (2 * tokens + 3 * predicting) * width * DType::F32.bytes() as u64;
        let logits = predicting * config.vocab_size as u64 * DType::F32.bytes() as u64;
        let layer = 2 * tokens * (largest + 4 * width * size);
        // The layers' inputs, what they are the sum of, and the gradients of both.
        let inputs = 4 * tokens * config.per_layer_columns() as u64 * size;
        // x, dx and the output's gradient once for every route; and of the products what is weighted, and gradients of all.
        let routes = config
            .experts
            .map_or(0, |experts| experts.per_token * (3 * config.hidden_size + 2 * experts.width));
        let routes = tokens * routes as u64 * size;
        stream + head + logits.min(HEAD_WORKSPACE) + layer + inputs + shared + routes
    }

    /// An upper bound of the bytes that the backward pass takes beside what the forward pass left.
    pub(crate) fn backward_bytes(&self, config: &GemmaConfig, activations: DType) -> u64 {
        let stream = (config.layers.len() + 1) * config.hidden_size;
        // The layers' inputs, and keys and values that several layers read, are held as well.
        let held = stream + 2 * config.per_layer_columns() + shared_width(config);
        self.least_bytes(config, activations) - (held * self.tokens * activations.bytes()) as u64
    }
}
