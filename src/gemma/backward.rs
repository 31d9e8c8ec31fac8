//! The backward pass: the transpose of `forward.rs`, line by line from the bottom up.

use super::forward::{
    Attention, AttentionBlock, Entering, ExpertBlock, InputBlock, Mlp, MlpBlock, Tail, Trace, Wanted,
    attention_spec,
};
use super::lora::Linear;
use super::params::{InputParams, LayerParams};
use super::{Gemma, Params};
use crate::backend::{Backend, DType, HeadNorm, NormSpec, RopeSpec};

impl<B: Backend> Gemma<B> {
    /// Adds to `grads` the gradient of everything below the LM head, given d_hidden, the gradient of the hidden
    /// states that [`Gemma::forward_keeping`] gave. What a layer has not kept is computed again from the residual stream before
    /// it, and exists for that layer's time.
    pub fn backward(&self, trace: Trace<B>, d_hidden: B::Tensor, grads: &mut Params<B::Tensor>) {
        let b = &self.backend;
        let norm = self.config.norm;
        let Trace { tables, mut stream, mut layers, shared, inputs, wanted } = trace;
        let (rows, tail) = match wanted {
            Some(Wanted { rows, total, tail }) => (Some((rows, total)), tail),
            None => (None, None),
        };
        // Of the wanted rows to all rows.
        let scatter = |x: &B::Tensor| {
            let (rows, total) = rows.as_ref().expect("only some rows are scattered");
            b.scatter_rows(x, rows, *total)
        };
        let all_inputs = inputs.as_ref().map(|inputs| &inputs.all);
        let d_hidden = if rows.is_some() && tail.is_none() { scatter(&d_hidden) } else { d_hidden };
        // The residual stream before the tail, while layers of the tail run.
        let (tail_tables, mut before, tail_inputs) = match tail {
            Some(Tail { tables, before, inputs }) => (Some(tables), Some(before), inputs),
            None => (None, None, None),
        };
        let mut pass = Pass {
            tables: tail_tables.as_ref().unwrap_or(&tables),
            inputs: if before.is_some() { tail_inputs.as_ref() } else { all_inputs },
            kv_sums: self.config.layers.iter().map(|_| None).collect(),
        };
        // Every layer writes its columns.
        let mut d_inputs = pass.inputs.map(|inputs| {
            let (rows, cols) = b.shape(inputs);
            b.zeros(b.activation_dtype(), rows, cols)
        });
        let mut pop =
            || stream.pop().expect("a trace holds the residual stream before and after every layer");
        let mut after = pop();
        // Gradients of the residual stream after a layer, and of its norm.
        let (mut d_after, mut d_normed) = (None, d_hidden);
        for l in (0..self.config.layers.len()).rev() {
            let x = pop();
            let p = &self.params.layers[l];
            // In the first layer of the tail all rows enter.
            let before = before.take_if(|_| self.config.narrowing() == Some(l));
            let entering = before.as_ref().and(rows.as_ref());
            let entering = entering.map(|(wanted, _)| Entering { tables: &tables, wanted });
            let attn_in = b.rms_norm_forward(before.as_ref().unwrap_or(&x), &p.attn_pre_norm, norm);
            let kept = layers.pop().unwrap_or_default();
            let (AttentionBlock { inner: attention, out: attn_out, mid }, mlp_in) = match kept.attention {
                Some(block) => {
                    let mlp_in = b.rms_norm_forward(&block.mid, &p.mlp_pre_norm, norm);
                    (block, mlp_in)
                }
                None => self.attention_block(l, &x, &attn_in, entering.as_ref(), pass.tables, &shared),
            };
            let (MlpBlock { inner: mlp, experts, out: mlp_out }, input) = kept.mlp.unwrap_or_else(|| {
                let inner = self.mlp(l, &mlp_in, true);
                let out = p.mlp_post_norm.as_ref().map(|_| self.mlp_out(l, &mid, &inner, true));
                let (out, experts) = out.map_or((None, None), |(out, experts)| (Some(out), experts));
                let input = out.as_ref().and_then(|out| self.input_block(l, &mid, out, pass.inputs));
                (MlpBlock { inner, experts, out }, input)
            });

            let (below, above) = grads.layers.split_at_mut(l + 1);
            let g = &mut below[l];
            let d_next = above.first_mut().map_or(&mut grads.final_norm, |g| &mut g.attn_pre_norm);
            let next = (self.norm_before(l + 1), d_next);
            let (d_mid, d_out) = match (&input, d_inputs.as_mut()) {
                (Some(block), Some(d_inputs)) => {
                    let (w, dw) = p.input.as_ref().zip(g.input.as_mut()).expect("the block's parameters");
                    let post = Some((&block.out, &w.post_norm, &mut dw.post_norm));
                    let spec = self.layer_sum(l);
                    let (d_mid, d_out) =
                        b.add_norm_backward(d_after.as_ref(), &d_normed, &after, next, post, spec);
                    let d_out = d_out.expect("the block has a norm behind it");
                    let inputs = pass.inputs.expect("layers with such a block have inputs");
                    let more = self.input_backward(l, &d_out, block, inputs, d_inputs, dw);
                    let post = with_norm(&mlp_out, &p.mlp_post_norm, &mut g.mlp_post_norm);
                    let post = post.expect("before such a block is a norm");
                    let (d_mid, d_out) = b.add_backward(&d_mid, Some(&more), post, self.inner_sum());
                    (d_mid, Some(d_out))
                }
                _ => {
                    let post = with_norm(&mlp_out, &p.mlp_post_norm, &mut g.mlp_post_norm);
                    b.add_norm_backward(d_after.as_ref(), &d_normed, &after, next, post, self.layer_sum(l))
                }
            };
            let (d_mid, d_out) = match (experts, d_out) {
                (Some(block), Some(d_out)) => self.experts_backward(l, &d_out, d_mid, block, &mid, g),
                (_, d_out) => (d_mid, d_out),
            };
            let d_mlp_in = self.mlp_backward(l, d_out.as_ref().unwrap_or(&d_mid), &mlp, &mlp_in, g);
            let (dx, d_out) = b.add_norm_backward(
                Some(&d_mid),
                &d_mlp_in,
                &mid,
                (&p.mlp_pre_norm, &mut g.mlp_pre_norm),
                with_norm(&attn_out, &p.attn_post_norm, &mut g.attn_post_norm),
                self.inner_sum(),
            );
            let d_out = d_out.as_ref().unwrap_or(&dx);
            d_normed = self.attention_backward(l, d_out, &attention, (&attn_in, entering), &mut pass, g);
            d_after = Some(dx);
            after = x;
            if let Some(before) = before {
                after = before;
                d_after = d_after.map(|dx| scatter(&dx));
                d_inputs = d_inputs.map(|d_inputs| scatter(&d_inputs));
                (pass.tables, pass.inputs) = (&tables, all_inputs);
            }
        }
        let d_first = grads.layers.first_mut().map_or(&mut grads.final_norm, |g| &mut g.attn_pre_norm);
        let pre = (self.norm_before(0), d_first);
        let (dx, _) = b.add_norm_backward(d_after.as_ref(), &d_normed, &after, pre, None, self.inner_sum());
        let scale = self.config.embed_scale(b.dtype(&self.params.embed));
        b.embed_backward(&dx, &tables, scale, &mut grads.embed);
        if let (Some(inputs), Some(d_inputs)) = (inputs, d_inputs) {
            let p = &self.params;
            let (rows, cols) = b.shape(&d_inputs);
            let (by_layer, width) = b.shape(&inputs.raw);
            let norm = p.per_layer_norm.as_ref().zip(grads.per_layer_norm.as_mut());
            let weight = p.per_layer.as_ref().zip(grads.per_layer.as_mut());
            let ((norm, d_norm), (weight, d_weight)) =
                norm.zip(weight).expect("the parameters of layers' inputs");
            let d_sum = b.reshaped(d_inputs, by_layer, width);
            let (d_own, d_raw) = b.add_backward(&d_sum, None, (&inputs.raw, norm, d_norm), self.input_sum());
            if let (Some(table), Some(d_table)) = (&p.per_layer_embed, &mut grads.per_layer_embed) {
                let scale = self.config.per_layer_scale(b.dtype(table));
                b.embed_backward(&b.reshaped(d_own, rows, cols), &tables, scale, d_table);
            }
            let d_raw = b.reshaped(d_raw, rows, cols);
            b.matmul_backward_weight(&d_raw, &after, d_weight);
            let dx = b.matmul_backward_input(&[(&d_raw, weight)]);
            b.embed_backward(&dx, &tables, scale, &mut grads.embed);
        }
    }

    /// Of the block in which a layer meets its own input: the gradient of the residual stream before it through the gate,
    /// given that of its output; parameter gradients +=, and `d_inputs` gets the layer's columns.
    fn input_backward(
        &self,
        l: usize,
        d_out: &B::Tensor,
        a: &InputBlock<B>,
        inputs: &B::Tensor,
        d_inputs: &mut B::Tensor,
        g: &mut InputParams<B::Tensor>,
    ) -> B::Tensor {
        let (b, p) = (&self.backend, self.params.layers[l].input.as_ref().expect("the block's parameters"));
        b.matmul_backward_weight(d_out, &a.product, &mut g.projection);
        let d_product = b.matmul_backward_input(&[(d_out, &p.projection)]);
        let first = l * self.config.per_layer_width;
        let d_gate = b.gelu_product_backward(&d_product, &a.gate, inputs, first, d_inputs);
        b.matmul_backward_weight(&d_gate, &a.mid, &mut g.gate);
        b.matmul_backward_input(&[(&d_gate, &p.gate)])
    }

    /// Of experts beside an MLP: (gradient of the residual stream `mid` before them, that of the MLP's output), given those of
    /// that stream behind them and of the output of both; parameter gradients +=.
    fn experts_backward(
        &self,
        l: usize,
        d_out: &B::Tensor,
        d_mid: B::Tensor,
        a: ExpertBlock<B>,
        mid: &B::Tensor,
        g: &mut LayerParams<B::Tensor>,
    ) -> (B::Tensor, Option<B::Tensor>) {
        let (b, spec, trace) = (&self.backend, self.inner_sum(), a.trace.as_ref());
        let parts = self.params.layers[l].experts.as_ref().zip(g.experts.as_mut());
        let ((p, g), routing) = parts.zip(self.config.routing()).expect("the experts' parameters");
        let post = (&a.out, &p.post_norm, &mut g.post_norm);
        let (d_normed, d_experts) = b.add_backward(d_out, None, post, spec);
        let pre = (&p.mlp_norm, &mut g.mlp_norm);
        let (d_mlp_out, _) = b.add_norm_backward(None, &d_normed, &a.mlp_out, pre, None, spec);
        let (router_in, x) = self.expert_inputs(p, mid);
        let (dx, d_weights) = b.experts_backward(
            &d_experts,
            &x,
            &a.routes,
            trace.expect("the backward pass keeps what experts computed"),
            (&p.gate_up, &mut g.gate_up),
            (&p.down, &mut g.down),
        );
        let d_scores = b.route_backward(&d_weights, &a.routes, &routing, (&p.factors, &mut g.factors));
        b.matmul_backward_weight(&d_scores, &router_in, &mut g.router);
        let d_router_in = b.matmul_backward_input(&[(&d_scores, &p.router)]);
        // Both read the residual stream, each through a norm of its own.
        let pre = (&p.pre_norm, &mut g.pre_norm);
        let (d_mid, _) = b.add_norm_backward(Some(&d_mid), &dx, mid, pre, None, spec);
        let pre = (&p.router_norm, &mut g.router_norm);
        let (d_mid, _) = b.add_norm_backward(Some(&d_mid), &d_router_in, mid, pre, None, spec);
        (d_mid, Some(d_mlp_out))
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
        let (gate, up) = a.gate_up.as_ref().expect("the backward pass keeps gate and up");
        let d_inner = self.linear_backward(l, &a.product, &[(Linear::Down, d_out)], g);
        let (d_gate, d_up) = self.backend.geglu_backward(&d_inner, gate, up);
        self.linear_backward(l, x, &[(Linear::Gate, &d_gate), (Linear::Up, &d_up)], g)
    }

    /// The gradient of an attention block's normed input x `[T, D]`, all rows that are `entering`, given that of its output;
    /// parameter gradients +=.
    fn attention_backward(
        &self,
        l: usize,
        d_out: &B::Tensor,
        a: &Attention<B>,
        (x, entering): (&B::Tensor, Option<Entering<B>>),
        pass: &mut Pass<B>,
        g: &mut LayerParams<B::Tensor>,
    ) -> B::Tensor {
        let (b, c, p) = (&self.backend, &self.config, &self.params.layers[l]);
        let (spec, rope) = (attention_spec(c, &c.layers[l]), &c.layers[l].rope);
        let d_o = self.linear_backward(l, &a.o, &[(Linear::O, d_out)], g);
        let (tables, kv_sums) = (pass.tables, &mut pass.kv_sums);
        let (k, v) = (&*a.kv.k, &*a.kv.v);
        let (dq, dk, dv) = b.attention_backward(&d_o, &a.q, k, v, &a.o, &a.lse, tables, &spec);
        let (dq, tables) = match entering {
            None => (dq, tables),
            Some(Entering { tables, wanted }) => (b.scatter_rows(&dq, wanted, b.shape(&a.q_raw).0), tables),
        };
        let weighted = |w, dw| head_norm(w, dw, c.norm);
        let dq = b.rope_backward(&dq, &a.q_raw, weighted(&p.q_norm, &mut g.q_norm), tables, rope);
        // Gradients of keys and values meet in the layer that has them, those of its last reader first.
        let from = c.layers[l].kv_from.unwrap_or(l);
        let (dk, dv) = match &mut kv_sums[from] {
            None if from == l => (dk, dv),
            sums => {
                let zeros = |x| {
                    let (rows, cols) = b.shape(x);
                    b.zeros(DType::F32, rows, cols)
                };
                let (k_sum, v_sum) = sums.get_or_insert_with(|| (zeros(&dk), zeros(&dv)));
                b.accumulate(&dk, k_sum);
                b.accumulate(&dv, v_sum);
                if from != l {
                    return self.linear_backward(l, x, &[(Linear::Q, &dq)], g);
                }
                (b.narrowed(k_sum), b.narrowed(v_sum))
            }
        };
        kv_sums[l] = None;
        let k_raw = a.k_raw.as_ref().expect("a layer that reads no other's has a projection of keys");
        let dk = b.rope_backward(&dk, k_raw, weighted(&p.k_norm, &mut g.k_norm), tables, rope);
        let dv = match c.value_norm {
            true => {
                let norm = Some(HeadNorm { weight: None, spec: c.norm });
                let raw = a.v_raw.as_ref().unwrap_or(k_raw);
                b.rope_backward(&dv, raw, norm, tables, &RopeSpec::still(spec.head_dim))
            }
            false => dv,
        };
        // Where values are keys, both gradients are those of one projection.
        let values = if p.v.is_some() { Linear::V } else { Linear::K };
        self.linear_backward(l, x, &[(Linear::Q, &dq), (Linear::K, &dk), (values, &dv)], g)
    }
}

/// What the backward pass carries from layer to layer.
struct Pass<'a, B: Backend> {
    /// Of the rows that run.
    tables: &'a B::Tables,
    /// The layers' inputs of these rows.
    inputs: Option<&'a B::Tensor>,
    /// By layer, the sums (dk, dv) in f32 of those layers that read its keys and values.
    kv_sums: Vec<Option<(B::Tensor, B::Tensor)>>,
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
