//! The forward pass.

use super::Gemma;
use crate::backend::{AttentionSpec, Backend, Direction};
use crate::config::{GemmaConfig, LayerSpec};
use crate::segments::{QueryRun, Segments};

/// Tokens to run: flat, with who attends to whom.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Token ids `[T]`.
    pub ids: &'a [u32],
    /// Absolute positions `[T]`.
    pub positions: &'a [u32],
    /// The segment table of the key/value rows.
    pub segments: &'a Segments,
    /// Which tokens the rows of this batch are.
    pub runs: &'a [QueryRun],
}

/// Keys and values of every layer, rows as the segment table says: shared prompts once, tails per stream.
pub struct KvCache<B: Backend> {
    layers: Vec<(B::Tensor, B::Tensor)>,
}

impl<B: Backend> KvCache<B> {
    /// Room for `rows` tokens.
    pub fn new(backend: &B, config: &GemmaConfig, rows: usize) -> Self {
        let width = config.num_kv_heads * config.head_dim;
        let layers =
            config.layers.iter().map(|_| (backend.zeros(rows, width), backend.zeros(rows, width))).collect();
        Self { layers }
    }
}

/// What the backward pass needs: the input of every layer and of the final norm.
pub struct Trace<B: Backend> {
    pub(super) inputs: Vec<B::Tensor>,
}

/// Everything that one layer computed; the backward pass recomputes it from the layer's input.
pub(super) struct LayerActivations<B: Backend> {
    /// Normed input of attention.
    pub(super) attn_in: B::Tensor,
    /// Projections before qk-norm; `None` where the model has none (then they are q and k before RoPE, which the
    /// backward pass does not need).
    pub(super) q_raw: Option<B::Tensor>,
    pub(super) k_raw: Option<B::Tensor>,
    /// What attention reads.
    pub(super) q: B::Tensor,
    pub(super) k: B::Tensor,
    pub(super) v: B::Tensor,
    /// What attention returns.
    pub(super) o: B::Tensor,
    pub(super) lse: B::Tensor,
    /// Output projection, before its norm.
    pub(super) attn_out: B::Tensor,
    /// Residual stream between attention and MLP.
    pub(super) mid: B::Tensor,
    /// Normed input of the MLP.
    pub(super) mlp_in: B::Tensor,
    pub(super) gate: B::Tensor,
    pub(super) up: B::Tensor,
    /// gelu(gate) * up.
    pub(super) inner: B::Tensor,
    /// Down projection, before its norm.
    pub(super) mlp_out: B::Tensor,
}

impl<B: Backend> Gemma<B> {
    /// Final-norm hidden states `[T, D]` of a batch whose keys and values go to `cache` (and stay there).
    pub fn forward_cached(&self, batch: &Batch, cache: &mut KvCache<B>) -> B::Tensor {
        let rows = kv_rows(batch);
        let mut x = self.embed(batch.ids);
        for (l, (k, v)) in cache.layers.iter_mut().enumerate() {
            x = self.layer(l, &x, batch, Some((k, v, &rows))).0;
        }
        self.backend.rms_norm_forward(&x, &self.params.final_norm, self.config.rms_norm_eps)
    }

    /// Final-norm hidden states `[T, D]` where every token is a query (row = key/value row), and what the backward
    /// pass needs.
    pub fn forward(&self, batch: &Batch) -> (B::Tensor, Trace<B>) {
        let mut inputs = vec![self.embed(batch.ids)];
        for l in 0..self.config.layers.len() {
            let x = self.layer(l, &inputs[l], batch, None).0;
            inputs.push(x);
        }
        let last = &inputs[self.config.layers.len()];
        let hidden = self.backend.rms_norm_forward(last, &self.params.final_norm, self.config.rms_norm_eps);
        (hidden, Trace { inputs })
    }

    fn embed(&self, ids: &[u32]) -> B::Tensor {
        let scale = self.config.embed_scale(self.backend.dtype(&self.params.embed));
        self.backend.embed_forward(&self.params.embed, ids, scale)
    }

    /// One decoder layer: x `[T, D]` to its output and all it computed.
    pub(super) fn layer(
        &self,
        l: usize,
        x: &B::Tensor,
        batch: &Batch,
        cache: Option<(&mut B::Tensor, &mut B::Tensor, &[u32])>,
    ) -> (B::Tensor, LayerActivations<B>) {
        let (b, c, p) = (&self.backend, &self.config, &self.params.layers[l]);
        let spec = &c.layers[l];
        let eps = c.rms_norm_eps;

        let attn_in = b.rms_norm_forward(x, &p.attn_pre_norm, eps);
        let (q_raw, mut q) = self.project(&attn_in, &p.q, p.q_norm.as_ref());
        let (k_raw, mut k) = self.project(&attn_in, &p.k, p.k_norm.as_ref());
        let v = b.matmul_forward(&attn_in, &p.v);
        self.rotate(&mut q, spec, batch.positions, Direction::Forward);
        self.rotate(&mut k, spec, batch.positions, Direction::Forward);
        let attention = attention_spec(c, spec);
        let (o, lse) = match cache {
            None => b.attention_forward(&q, &k, &v, batch.segments, batch.runs, &attention),
            Some((cached_k, cached_v, rows)) => {
                b.write_rows(&k, rows, cached_k);
                b.write_rows(&v, rows, cached_v);
                b.attention_forward(&q, cached_k, cached_v, batch.segments, batch.runs, &attention)
            }
        };
        let attn_out = b.matmul_forward(&o, &p.o);
        let mid = self.residual(x, &attn_out, p.attn_post_norm.as_ref());

        let mlp_in = b.rms_norm_forward(&mid, &p.mlp_pre_norm, eps);
        let gate = b.matmul_forward(&mlp_in, &p.gate);
        let up = b.matmul_forward(&mlp_in, &p.up);
        let inner = b.geglu_forward(&gate, &up);
        let mlp_out = b.matmul_forward(&inner, &p.down);
        let y = self.residual(&mid, &mlp_out, p.mlp_post_norm.as_ref());

        let activations = LayerActivations {
            attn_in,
            q_raw,
            k_raw,
            q,
            k,
            v,
            o,
            lse,
            attn_out,
            mid,
            mlp_in,
            gate,
            up,
            inner,
            mlp_out,
        };
        (y, activations)
    }

    /// A q or k projection: (before qk-norm where there is one, what RoPE rotates).
    fn project(
        &self,
        x: &B::Tensor,
        w: &B::Tensor,
        norm: Option<&B::Tensor>,
    ) -> (Option<B::Tensor>, B::Tensor) {
        let raw = self.backend.matmul_forward(x, w);
        match norm {
            None => (None, raw),
            Some(norm) => {
                let normed = self.backend.rms_norm_forward(&raw, norm, self.config.rms_norm_eps);
                (Some(raw), normed)
            }
        }
    }

    /// RoPE of one layer.
    pub(super) fn rotate(
        &self,
        x: &mut B::Tensor,
        spec: &LayerSpec,
        positions: &[u32],
        direction: Direction,
    ) {
        let head_dim = self.config.head_dim;
        self.backend.rope(x, positions, head_dim, spec.rope_theta, spec.rope_factor, direction);
    }

    /// x + branch, the branch normed first where the model has sandwich norms.
    fn residual(&self, x: &B::Tensor, branch: &B::Tensor, norm: Option<&B::Tensor>) -> B::Tensor {
        let mut y = match norm {
            Some(norm) => self.backend.rms_norm_forward(branch, norm, self.config.rms_norm_eps),
            None => self.backend.copy(branch),
        };
        self.backend.add(&mut y, x);
        y
    }
}

/// What attention needs to know of a layer.
pub(super) fn attention_spec(config: &GemmaConfig, layer: &LayerSpec) -> AttentionSpec {
    AttentionSpec {
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        scale: config.attention_scale,
        softcap: config.attention_softcap,
        window: layer.window,
    }
}

/// The key/value row of every query row.
fn kv_rows(batch: &Batch) -> Vec<u32> {
    let mut rows = vec![0; batch.ids.len()];
    for run in batch.runs {
        let start = batch.segments.list()[run.segment].start + run.first;
        for t in 0..run.len {
            rows[run.row + t] = (start + t) as u32;
        }
    }
    rows
}
