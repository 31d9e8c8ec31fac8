//! The backward pass: the transpose of `forward.rs`, line by line from the bottom up.

use super::forward::{Attention, AttentionBlock, Mlp, MlpBlock, Trace, attention_spec};
use super::params::LayerParams;
use super::{Gemma, Params};
use crate::backend::{Backend, HeadNorm, NormSpec, RopeSpec};

impl<B: Backend> Gemma<B> {
    /// Adds to `grads` the gradient of everything below the LM head, given d_hidden `[T, D]`, the gradient of
    /// [`Gemma::forward`]'s hidden states. What a layer has not kept is computed again from the residual stream before
    /// it, and exists for that layer's time.
    pub fn backward(&self, trace: Trace<B>, d_hidden: B::Tensor, grads: &mut Params<B::Tensor>) {
        let b = &self.backend;
        let norm = self.config.norm;
        let Trace { tables, mut stream, mut layers } = trace;
        let mut pop =
            || stream.pop().expect("a trace holds the residual stream before and after every layer");
        let mut after = pop();
        // Gradients of the residual stream after a layer, and of its norm.
        let (mut d_after, mut d_normed) = (None, d_hidden);
        for l in (0..self.config.layers.len()).rev() {
            let x = pop();
            let p = &self.params.layers[l];
            let attn_in = b.rms_norm_forward(&x, &p.attn_pre_norm, norm);
            let kept = layers.pop().unwrap_or_default();
            let (AttentionBlock { inner: attention, out: attn_out, mid }, mlp_in) = match kept.attention {
                Some(block) => {
                    let mlp_in = b.rms_norm_forward(&block.mid, &p.mlp_pre_norm, norm);
                    (block, mlp_in)
                }
                None => self.attention_block(l, &x, &attn_in, &tables),
            };
            let MlpBlock { inner: mlp, out: mlp_out } = kept.mlp.unwrap_or_else(|| {
                let inner = self.mlp(l, &mlp_in, true);
                let out = p.mlp_post_norm.as_ref().map(|_| self.mlp_out(l, &inner));
                MlpBlock { inner, out }
            });

            let (below, above) = grads.layers.split_at_mut(l + 1);
            let g = &mut below[l];
            let d_next = above.first_mut().map_or(&mut grads.final_norm, |g| &mut g.attn_pre_norm);
            let (d_mid, d_out) = b.add_norm_backward(
                d_after.as_ref(),
                &d_normed,
                &after,
                (self.norm_before(l + 1), d_next),
                with_norm(&mlp_out, &p.mlp_post_norm, &mut g.mlp_post_norm),
                self.mlp_sum(l),
            );
            let d_mlp_in = self.mlp_backward(l, d_out.as_ref().unwrap_or(&d_mid), &mlp, &mlp_in, g);
            let (dx, d_out) = b.add_norm_backward(
                Some(&d_mid),
                &d_mlp_in,
                &mid,
                (&p.mlp_pre_norm, &mut g.mlp_pre_norm),
                with_norm(&attn_out, &p.attn_post_norm, &mut g.attn_post_norm),
                self.attention_sum(),
            );
            d_normed =
                self.attention_backward(l, d_out.as_ref().unwrap_or(&dx), &attention, &attn_in, &tables, g);
            d_after = Some(dx);
            after = x;
        }
        let d_first = grads.layers.first_mut().map_or(&mut grads.final_norm, |g| &mut g.attn_pre_norm);
        let pre = (self.norm_before(0), d_first);
        let (dx, _) =
            b.add_norm_backward(d_after.as_ref(), &d_normed, &after, pre, None, self.attention_sum());
        let scale = self.config.embed_scale(b.dtype(&self.params.embed));
        b.embed_backward(&dx, &tables, scale, &mut grads.embed);
    }

    /// The gradient of an MLP's normed input x `[T, D]`, given that of its output; parameter gradients +=.
    fn mlp_backward(
        &self,
        l: usize,
        d_out: &B::Tensor,
        a: &Mlp<B>,
        x: &B::Tensor,
        g: &mut LayerParams<B::Tensor>,
    ) -> B::Tensor {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        let (gate, up) = a.gate_up.as_ref().expect("the backward pass keeps gate and up");
        b.matmul_backward_weight(d_out, &a.product, &mut g.down);
        let d_inner = b.matmul_backward_input(&[(d_out, &p.down)]);
        let (d_gate, d_up) = b.geglu_backward(&d_inner, gate, up);
        b.matmul_backward_weight(&d_gate, x, &mut g.gate);
        b.matmul_backward_weight(&d_up, x, &mut g.up);
        b.matmul_backward_input(&[(&d_gate, &p.gate), (&d_up, &p.up)])
    }

    /// The gradient of an attention block's normed input x `[T, D]`, given that of its output; parameter gradients +=.
    fn attention_backward(
        &self,
        l: usize,
        d_out: &B::Tensor,
        a: &Attention<B>,
        x: &B::Tensor,
        tables: &B::Tables,
        g: &mut LayerParams<B::Tensor>,
    ) -> B::Tensor {
        let (b, c, p) = (&self.backend, &self.config, &self.params.layers[l]);
        let (spec, rope) = (attention_spec(c, &c.layers[l]), &c.layers[l].rope);
        b.matmul_backward_weight(d_out, &a.o, &mut g.o);
        let d_o = b.matmul_backward_input(&[(d_out, &p.o)]);
        let (dq, dk, dv) = b.attention_backward(&d_o, &a.q, &a.k, &a.v, &a.o, &a.lse, tables, &spec);
        let weighted = |w, dw| head_norm(w, dw, c.norm);
        let dq = b.rope_backward(&dq, &a.q_raw, weighted(&p.q_norm, &mut g.q_norm), tables, rope);
        let dk = b.rope_backward(&dk, &a.k_raw, weighted(&p.k_norm, &mut g.k_norm), tables, rope);
        let dv = match c.value_norm {
            true => {
                let norm = Some(HeadNorm { weight: None, spec: c.norm });
                let raw = a.v_raw.as_ref().unwrap_or(&a.k_raw);
                b.rope_backward(&dv, raw, norm, tables, &RopeSpec::still(spec.head_dim))
            }
            false => dv,
        };
        b.matmul_backward_weight(&dq, x, &mut g.q);
        b.matmul_backward_weight(&dk, x, &mut g.k);
        // Where values are keys, both gradients are those of one projection.
        b.matmul_backward_weight(&dv, x, g.v.as_mut().unwrap_or(&mut g.k));
        b.matmul_backward_input(&[(&dq, &p.q), (&dk, &p.k), (&dv, p.v.as_ref().unwrap_or(&p.k))])
    }
}

/// A branch with its norm, where the model has one.
fn with_norm<'a, T>(
    branch: &'a Option<T>,
    w: &'a Option<T>,
    dw: &'a mut Option<T>,
) -> Option<(&'a T, &'a T, &'a mut T)> {
    branch.as_ref().zip(w.as_ref()).zip(dw.as_mut()).map(|((branch, w), dw)| (branch, w, dw))
}

/// A qk-norm with its gradient, where the model has one.
fn head_norm<'a, T>(
    w: &'a Option<T>,
    dw: &'a mut Option<T>,
    spec: NormSpec,
) -> Option<HeadNorm<(&'a T, &'a mut T)>> {
    w.as_ref().zip(dw.as_mut()).map(|weight| HeadNorm { weight: Some(weight), spec })
}
