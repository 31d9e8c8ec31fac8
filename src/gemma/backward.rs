//! The backward pass: the transpose of `forward.rs`, line by line from the bottom up.

use super::forward::{Batch, Trace, attention_spec};
use super::params::LayerParams;
use super::{Gemma, Params};
use crate::backend::{Backend, Direction};

impl<B: Backend> Gemma<B> {
    /// Adds to `grads` the gradient of everything below the LM head, given d_hidden `[T, D]`, the gradient of
    /// [`Gemma::forward`]'s hidden states. One layer's activations exist at a time.
    pub fn backward(
        &self,
        batch: &Batch,
        trace: Trace<B>,
        d_hidden: &B::Tensor,
        grads: &mut Params<B::Tensor>,
    ) {
        let b = &self.backend;
        let mut inputs = trace.inputs;
        let last = inputs.pop().expect("a trace holds the final norm's input");
        let final_norm = &self.params.final_norm;
        let mut dx =
            b.rms_norm_backward(d_hidden, &last, final_norm, self.config.rms_norm_eps, &mut grads.final_norm);
        for l in (0..self.config.layers.len()).rev() {
            let x = inputs.pop().expect("a trace holds every layer's input");
            dx = self.layer_backward(l, &x, batch, dx, &mut grads.layers[l]);
        }
        let scale = self.config.embed_scale(b.dtype(&self.params.embed));
        b.embed_backward(&dx, batch.ids, scale, &mut grads.embed);
    }

    /// dy `[T, D]`, the gradient of a layer's output, to that of its input x; parameter gradients +=.
    fn layer_backward(
        &self,
        l: usize,
        x: &B::Tensor,
        batch: &Batch,
        dy: B::Tensor,
        g: &mut LayerParams<B::Tensor>,
    ) -> B::Tensor {
        let (b, c, p) = (&self.backend, &self.config, &self.params.layers[l]);
        let spec = &c.layers[l];
        let a = self.layer(l, x, batch, None).1;

        // y = mid + norm(mlp_out)
        let d_mlp_out = self.residual_backward(&dy, &a.mlp_out, &p.mlp_post_norm, &mut g.mlp_post_norm);
        let d_inner = self.linear_backward(&d_mlp_out, &a.inner, &p.down, &mut g.down);
        let (d_gate, d_up) = b.geglu_backward(&d_inner, &a.gate, &a.up);
        let mut d_mlp_in = self.linear_backward(&d_gate, &a.mlp_in, &p.gate, &mut g.gate);
        b.matmul_backward_input(&d_up, &p.up, &mut d_mlp_in);
        b.matmul_backward_weight(&d_up, &a.mlp_in, &mut g.up);
        let mut d_mid = dy;
        let d_norm =
            b.rms_norm_backward(&d_mlp_in, &a.mid, &p.mlp_pre_norm, c.rms_norm_eps, &mut g.mlp_pre_norm);
        b.add(&mut d_mid, &d_norm);

        // mid = x + norm(attn_out)
        let d_attn_out =
            self.residual_backward(&d_mid, &a.attn_out, &p.attn_post_norm, &mut g.attn_post_norm);
        let d_o = self.linear_backward(&d_attn_out, &a.o, &p.o, &mut g.o);
        let (mut dq, mut dk, dv) = b.attention_backward(
            &d_o,
            &a.q,
            &a.k,
            &a.v,
            &a.o,
            &a.lse,
            batch.segments,
            &attention_spec(c, spec),
        );
        self.rotate(&mut dq, spec, batch.positions, Direction::Backward);
        self.rotate(&mut dk, spec, batch.positions, Direction::Backward);
        let dq = self.head_norm_backward(dq, a.q_raw.as_ref(), p.q_norm.as_ref(), g.q_norm.as_mut());
        let dk = self.head_norm_backward(dk, a.k_raw.as_ref(), p.k_norm.as_ref(), g.k_norm.as_mut());
        let mut d_attn_in = self.linear_backward(&dq, &a.attn_in, &p.q, &mut g.q);
        for (d, w, dw) in [(&dk, &p.k, &mut g.k), (&dv, &p.v, &mut g.v)] {
            b.matmul_backward_input(d, w, &mut d_attn_in);
            b.matmul_backward_weight(d, &a.attn_in, dw);
        }
        let d_norm =
            b.rms_norm_backward(&d_attn_in, x, &p.attn_pre_norm, c.rms_norm_eps, &mut g.attn_pre_norm);
        let mut dx = d_mid;
        b.add(&mut dx, &d_norm);
        dx
    }

    /// Gradient of Y = X W^T: returns dX, dW +=.
    fn linear_backward(&self, dy: &B::Tensor, x: &B::Tensor, w: &B::Tensor, dw: &mut B::Tensor) -> B::Tensor {
        let (rows, cols) = self.backend.shape(x);
        let mut dx = self.backend.zeros(rows, cols);
        self.backend.matmul_backward_input(dy, w, &mut dx);
        self.backend.matmul_backward_weight(dy, x, dw);
        dx
    }

    /// Gradient of a branch that is added to the residual stream, through its norm where it has one.
    fn residual_backward(
        &self,
        dy: &B::Tensor,
        branch: &B::Tensor,
        norm: &Option<B::Tensor>,
        d_norm: &mut Option<B::Tensor>,
    ) -> B::Tensor {
        match (norm, d_norm) {
            (Some(w), Some(dw)) => {
                self.backend.rms_norm_backward(dy, branch, w, self.config.rms_norm_eps, dw)
            }
            _ => self.backend.copy(dy),
        }
    }

    /// Gradient of the qk-norm, where the model has one.
    fn head_norm_backward(
        &self,
        dy: B::Tensor,
        raw: Option<&B::Tensor>,
        norm: Option<&B::Tensor>,
        d_norm: Option<&mut B::Tensor>,
    ) -> B::Tensor {
        match (raw, norm, d_norm) {
            (Some(x), Some(w), Some(dw)) => {
                self.backend.rms_norm_backward(&dy, x, w, self.config.rms_norm_eps, dw)
            }
            _ => dy,
        }
    }
}
