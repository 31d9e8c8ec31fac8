//! Reward models: a Gemma with a score head, which says how good a response y to a prompt x is.
//!
//! ```text
//! s(x, y) = w . h      r(x, y) = 1 / (1 + e^-s)
//! ```
//!
//! h `[D]` is the hidden state behind the final norm at the last token of prompt and response: the token that ended the
//! response, which is an end token or completes a stop string, or the last that was sampled of one that was cut. w `[D]` is
//! `score.weight` of Transformers' classes for sequence classification with one label, which have no bias and read the same
//! token. s is the logit, r the score that selects: a probability if the model was trained for that.
//!
//! Prompts, and what they begin with, are computed once for all of their responses, in scoring and in training. s is summed in
//! f64 on the host, over the columns in order: D products of a response are nothing beside its tokens, and what devices store
//! in bf16 would make ties of responses that differ. A score depends on the prompt and the response alone, in scoring and in
//! training alike.

use thiserror::Error;

use crate::backend::{Backend, Batch, DType};
use crate::device::DeviceError;
use crate::gemma::activations::{Kept, Recompute, StepSize, keeping};
use crate::gemma::config::GemmaConfig;
use crate::gemma::{Gemma, KvCache, Params, Trace, lora};
use crate::generate;
use crate::model_dir::ModelDir;
use crate::objective::verifier::sigmoid;
use crate::segments::{Continued, Layout};
use crate::tokenizer::Tokenizer;

/// r of a logit s.
pub fn probability(logit: f64) -> f64 {
    sigmoid(logit)
}

/// Why responses cannot be scored.
#[derive(Debug, Error, PartialEq)]
pub enum RewardError {
    /// The positions run past what the reward model was made for.
    #[error(
        "a prompt and its response have {tokens} tokens, and the reward model's context is {context}; lower \
         generate.max_new_tokens or shorten the prompts"
    )]
    TooLong {
        /// Tokens of both.
        tokens: usize,
        /// Context of the model.
        context: usize,
    },
    /// The model produced NaN or Inf.
    #[error(
        "the reward model's score of a response is {value}; its weights hold NaN or Inf, or have diverged: train it anew with \
         a lower optimizer.lr"
    )]
    NotFinite {
        /// The logit.
        value: f64,
    },
    /// The device failed.
    #[error("scoring{}", if .0.out_of_memory { "; sample fewer responses, or shorter ones" } else { "" })]
    Device(#[from] DeviceError),
}

/// What scores responses by their tokens.
pub trait Scorer: Send + Sync {
    /// r of every response: groups and responses in order, flat.
    fn score(&self, groups: &[Continued]) -> Result<Vec<f64>, RewardError>;

    /// The longest prompt with its response, in tokens.
    fn context(&self) -> usize;

    /// What its tokens mean.
    fn tokenizer(&self) -> &Tokenizer;
}

impl<B: Backend> Scorer for ModelDir<B> {
    fn score(&self, groups: &[Continued]) -> Result<Vec<f64>, RewardError> {
        Ok(logits(&self.model, groups)?.into_iter().map(probability).collect())
    }

    fn context(&self) -> usize {
        self.model.config.max_positions
    }

    fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// The tokens of some groups, each response's as a whole, and the row of each response's last.
fn lay_out(groups: &[Continued]) -> (Layout, Vec<u32>) {
    let prompts: Vec<&[u32]> = groups.iter().map(|g| g.prompt).collect();
    let (mut layout, segments) = Layout::of_prompts(&prompts);
    let mut last = Vec::new();
    for (group, &prompt) in groups.iter().zip(&segments) {
        for response in group.responses {
            let segment = layout.push(Some(prompt), response);
            last.push(layout.last_row(segment));
        }
    }
    (layout, last)
}

/// w, in f32.
fn weight<B: Backend>(model: &Gemma<B>) -> Vec<f32> {
    model.backend.to_f32(model.params.score.as_ref().expect("a reward model has a score head"))
}

/// s of every row of h `[R, D]`.
fn head(w: &[f32], hidden: &[f32]) -> Vec<f64> {
    let row = |h: &[f32]| w.iter().zip(h).map(|(&w, &h)| f64::from(w) * f64::from(h)).sum();
    hidden.chunks_exact(w.len()).map(row).collect()
}

/// About what scoring so many tokens at once takes of a device.
pub fn bytes(config: &GemmaConfig, activations: DType, tokens: usize) -> usize {
    generate::bytes(config, activations, tokens, 0, 0)
}

/// The size of a training step of so many tokens, which are those of so many responses and of their prompts.
pub fn step_size(tokens: usize, responses: usize) -> StepSize {
    // There are no logits of tokens, and responses' hidden states are as many as tokens would be beside them.
    StepSize { tokens: tokens + responses, predicting: 0 }
}

/// s of every response by a reward model: groups and responses in order, flat. As many at once as there is room for, which
/// changes no bit. Panics if the model has no score head.
pub fn logits<B: Backend>(model: &Gemma<B>, groups: &[Continued]) -> Result<Vec<f64>, RewardError> {
    let context = model.config.max_positions;
    let lengths = groups.iter().flat_map(|g| g.responses.iter().map(|r| g.prompt.len() + r.len()));
    if let Some(tokens) = lengths.max().filter(|&tokens| tokens > context) {
        return Err(RewardError::TooLong { tokens, context });
    }
    let each = bytes(&model.config, model.backend.activation_dtype(), 1);
    let most = model.backend.generation_bytes() / each.max(1);
    let mut all = Vec::new();
    let mut piece: Vec<Continued> = Vec::new();
    let mut tokens = 0;
    for group in groups {
        let mut begin = 0;
        tokens += group.prompt.len();
        for (end, response) in group.responses.iter().enumerate() {
            let full = tokens + response.len() > most;
            if full && (end > begin || !piece.is_empty()) {
                piece.push(Continued { responses: &group.responses[begin..end], ..*group });
                all.extend(piece_logits(model, &piece)?);
                piece.clear();
                (begin, tokens) = (end, group.prompt.len());
            }
            tokens += response.len();
        }
        piece.push(Continued { responses: &group.responses[begin..], ..*group });
    }
    all.extend(piece_logits(model, &piece)?);
    Ok(all)
}

/// The same of what is computed at once.
fn piece_logits<B: Backend>(model: &Gemma<B>, groups: &[Continued]) -> Result<Vec<f64>, RewardError> {
    let groups: Vec<Continued> = groups.iter().copied().filter(|g| !g.responses.is_empty()).collect();
    if groups.is_empty() {
        return Ok(Vec::new());
    }
    let prompts: Vec<&[u32]> = groups.iter().map(|g| g.prompt).collect();
    let (mut layout, of_prompts) = Layout::of_prompts(&prompts);
    let mut last = Vec::new();
    for (group, &prompt) in groups.iter().zip(&of_prompts) {
        let before = layout.last_row(prompt);
        last.extend(
            layout.push_tree(prompt, group.responses).iter().map(|rows| *rows.last().unwrap_or(&before)),
        );
    }
    let mut wanted = last.clone();
    wanted.sort_unstable();
    wanted.dedup();
    let (segments, b) = (layout.segments(), &model.backend);
    let runs = segments.all_queries();
    let mut cache = KvCache::new(b, &model.config, segments.rows());
    let hidden = model.prefill(&Batch::new(layout.ids(), segments, &runs), &wanted, &mut cache);
    let hidden = b.to_f32(&hidden);
    b.check()?;
    let logits = head(&weight(model), &hidden);
    if let Some(&value) = logits.iter().find(|s| !s.is_finite()) {
        return Err(RewardError::NotFinite { value });
    }
    Ok(last.iter().map(|row| logits[wanted.partition_point(|other| other < row)]).collect())
}

/// A forward pass to be differentiated.
pub struct Forward<B: Backend> {
    trace: Trace<B>,
    recompute: Recompute,
    size: StepSize,
    /// What is kept for the backward pass.
    pub kept: Kept,
    /// w and h `[R, D]`.
    weight: Vec<f32>,
    hidden: Vec<f32>,
    /// s of every response: groups and responses in order, flat.
    pub logits: Vec<f64>,
}

impl<B: Backend> Forward<B> {
    /// Runs the model on groups that have responses, one at least; the backward pass computes again what `recompute` says. No
    /// bit depends on that, and logits are those of [`logits`].
    pub fn new(model: &Gemma<B>, groups: &[Continued], recompute: Recompute) -> Self {
        let (layout, last) = lay_out(groups);
        let runs = layout.segments().all_queries();
        let batch = Batch::new(layout.ids(), layout.segments(), &runs);
        let size = step_size(layout.ids().len(), last.len());
        let run = |kept: Kept| {
            let (hidden, trace) = model.forward_keeping(&batch, Some(&last), &kept);
            (model.backend.to_f32(&hidden), trace)
        };
        let (kept, (hidden, trace)) = keeping(recompute, &model.backend, &model.config, &size, run);
        let weight = weight(model);
        let logits = head(&weight, &hidden);
        Self { trace, recompute, size, kept, weight, hidden, logits }
    }

    /// Adds to `grads` the gradient of L = - sum_i coefficients\[i\] logits\[i\]: dw = - sum_i c_i h_i, in f64 over the
    /// responses in order, and dh_i = - c_i w.
    pub fn backward(mut self, model: &Gemma<B>, coefficients: &[f64], grads: &mut Params<B::Tensor>) {
        let (b, d) = (&model.backend, self.weight.len());
        let needed = self.size.backward_bytes(&model.config, b.activation_dtype());
        // Others may have taken the memory since.
        if self.recompute == Recompute::Auto && b.training_bytes() < needed {
            self.trace.forget_activations();
        }
        let score = grads.score.as_mut().expect("gradients of a reward model have those of its head");
        let mut sums: Vec<f64> = vec![0.0; d];
        for (c, h) in coefficients.iter().zip(self.hidden.chunks_exact(d)) {
            sums.iter_mut().zip(h).for_each(|(sum, &h)| *sum -= c * f64::from(h));
        }
        let sums: Vec<f32> =
            b.to_f32(score).iter().zip(sums).map(|(&before, sum)| (f64::from(before) + sum) as f32).collect();
        *score = b.upload(DType::F32, 1, d, bytemuck::cast_slice(&sums));
        let row = |&c: &f64| self.weight.iter().map(move |&w| (-c * f64::from(w)) as f32);
        let d_hidden: Vec<f32> = coefficients.iter().flat_map(row).collect();
        let d_hidden = lora::upload(b, b.activation_dtype(), coefficients.len(), d, &d_hidden);
        model.backward(self.trace, d_hidden, grads);
    }
}
