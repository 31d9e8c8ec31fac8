//! Log-probs of given responses under a model and the gradient of a weighted sum of them: the one backward pass that
//! every objective needs, L = - sum_j sum_t w_jt log pi(y_jt | x, y_j<t).

use crate::backend::{Backend, Batch, HeadSpec, HeadTrace, Target};
use crate::gemma::activations::{Kept, Recompute, StepSize, keeping};
use crate::gemma::{Gemma, Params, Trace};
pub use crate::segments::Continued;
use crate::segments::Layout;

/// A forward pass over prompts and responses: what sequences begin with alike is computed once, a header, a prompt, the first
/// tokens of responses.
pub struct Forward<B: Backend> {
    trace: Trace<B>,
    recompute: Recompute,
    size: StepSize,
    /// What is kept for the backward pass.
    pub kept: Kept,
    /// Hidden states of the rows that predict something, which ascend.
    head_in: B::Tensor,
    head: HeadSpec,
    targets: Vec<Target>,
    head_trace: HeadTrace<B::Tensor>,
    /// log pi of every response token: groups, responses and tokens in order, flat.
    pub logprobs: Vec<f32>,
}

impl<B: Backend> Forward<B> {
    /// Runs the model and keeps what there is memory for. The temperature is part of pi.
    pub fn new(model: &Gemma<B>, groups: &[Continued], temperature: f32) -> Self {
        Self::with(model, groups, temperature, Recompute::Auto)
    }

    /// [`Forward::new`] that is told what the backward pass is to compute again. Log-probs and gradients do not depend on
    /// it.
    pub fn with(model: &Gemma<B>, groups: &[Continued], temperature: f32, recompute: Recompute) -> Self {
        let prompts: Vec<&[u32]> = groups.iter().map(|g| g.prompt).collect();
        let (mut layout, prompt_segments) = Layout::of_prompts(&prompts);
        // (row that predicts, token): the prompt's last token predicts the first token of every response.
        let mut predictions = Vec::new();
        for (group, &prompt) in groups.iter().zip(&prompt_segments) {
            let last = layout.last_row(prompt);
            // Nothing is predicted from a response's last token.
            let read: Vec<&[u32]> = group.responses.iter().map(|r| &r[..r.len() - 1]).collect();
            for (response, rows) in group.responses.iter().zip(layout.push_tree(prompt, &read)) {
                predictions.extend([last].into_iter().chain(rows).zip(response.iter().copied()));
            }
        }
        let mut rows: Vec<u32> = predictions.iter().map(|p| p.0).collect();
        rows.sort_unstable();
        rows.dedup();
        let compact = |row: u32| rows.binary_search(&row).expect("every predicting row is listed") as u32;
        let targets: Vec<Target> =
            predictions.iter().map(|&(row, token)| Target { row: compact(row), token }).collect();
        let runs = layout.segments().all_queries();
        let batch = Batch::new(layout.ids(), layout.segments(), &runs);
        let config = &model.config;
        let size = StepSize { tokens: layout.ids().len(), predicting: rows.len() };
        let run = |kept: Kept| {
            let (head_in, trace) = model.forward_keeping(&batch, Some(&rows), &kept);
            let head = HeadSpec { softcap: config.final_softcap, temperature };
            let (logprobs, head_trace) = model.backend.lm_head_logprob_forward(
                &head_in,
                model.params.lm_head(),
                &head,
                &targets,
                kept.logits,
            );
            (trace, head_in, head, logprobs, head_trace)
        };
        let (kept, ran) = keeping(recompute, &model.backend, config, &size, run);
        let (trace, head_in, head, logprobs, head_trace) = ran;
        Self { trace, recompute, size, kept, head_in, head, targets, head_trace, logprobs }
    }

    /// Adds to `grads` the gradient of L = - sum_i weights\[i\] logprobs\[i\].
    pub fn backward(mut self, model: &Gemma<B>, weights: &[f32], grads: &mut Params<B::Tensor>) {
        let b = &model.backend;
        let needed = self.size.backward_bytes(&model.config, b.activation_dtype());
        // Others may have taken the memory since.
        if self.recompute == Recompute::Auto && b.training_bytes() < needed {
            self.trace.forget_activations();
            self.head_trace.logits = None;
        }
        let d_head_in = b.lm_head_logprob_backward(
            &self.head_in,
            model.params.lm_head(),
            &self.head,
            &self.head_trace,
            &self.targets,
            weights,
            grads.lm_head_mut(),
        );
        model.backward(self.trace, d_head_in, grads);
    }
}
