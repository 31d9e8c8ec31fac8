//! The forward pass.

use super::Gemma;
use crate::backend::{AttentionSpec, Backend, Batch, HeadNorm, RopeSpec};
use crate::config::{GemmaConfig, LayerSpec};

/// Keys and values of every layer, rows as the segment table says: shared prompts once, tails per stream.
pub struct KvCache<B: Backend> {
    layers: Vec<(B::Tensor, B::Tensor)>,
}

impl<B: Backend> KvCache<B> {
    /// Room for `rows` tokens.
    pub fn new(backend: &B, config: &GemmaConfig, rows: usize) -> Self {
        let width = config.num_kv_heads * config.head_dim;
        let room = || backend.zeros(backend.activation_dtype(), rows, width);
        Self { layers: config.layers.iter().map(|_| (room(), room())).collect() }
    }
}

/// What the backward pass needs.
pub struct Trace<B: Backend> {
    pub(super) tables: B::Tables,
    /// The residual stream before every layer, and after the last.
    pub(super) stream: Vec<B::Tensor>,
}

/// What an attention block computed.
pub(super) struct Attention<B: Backend> {
    /// Projections of q and k, before norm and RoPE.
    pub(super) q_raw: B::Tensor,
    pub(super) k_raw: B::Tensor,
    /// What attention reads.
    pub(super) q: B::Tensor,
    pub(super) k: B::Tensor,
    pub(super) v: B::Tensor,
    /// What attention returns.
    pub(super) o: B::Tensor,
    pub(super) lse: B::Tensor,
    /// The block's output, before its norm.
    pub(super) out: B::Tensor,
}

/// What an MLP computed.
pub(super) struct Mlp<B: Backend> {
    /// (gate, up), where kept.
    pub(super) gate_up: Option<(B::Tensor, B::Tensor)>,
    /// gelu(gate) * up.
    pub(super) inner: B::Tensor,
    /// The block's output, before its norm.
    pub(super) out: B::Tensor,
}

impl<B: Backend> Gemma<B> {
    /// Final-norm hidden states `[T, D]` of a batch whose keys and values go to `cache` (and stay there).
    pub fn forward_cached(&self, batch: &Batch, cache: &mut KvCache<B>) -> B::Tensor {
        let tables = self.tables(batch);
        // Decoding asks for the same ops token after token.
        self.backend.begin_sequence();
        let (mut x, mut normed) = self.enter(&tables);
        for (l, kv) in cache.layers.iter_mut().enumerate() {
            let attn_out = self.cached_attention(l, &normed, &tables, kv);
            let (mid, mlp_in) = self.after_attention(l, &x, &attn_out);
            let mlp = self.mlp(l, &mlp_in, false);
            (x, normed) = self.after_mlp(l, &mid, &mlp.out);
        }
        self.backend.end_sequence();
        normed
    }

    /// Final-norm hidden states `[T, D]` where every token is a query (row = key/value row), and what the backward
    /// pass needs.
    pub fn forward(&self, batch: &Batch) -> (B::Tensor, Trace<B>) {
        let tables = self.tables(batch);
        let (mut x, mut normed) = self.enter(&tables);
        let mut stream = Vec::with_capacity(self.config.layers.len() + 1);
        for l in 0..self.config.layers.len() {
            let attention = self.attention(l, &normed, &tables);
            let (mid, mlp_in) = self.after_attention(l, &x, &attention.out);
            let mlp = self.mlp(l, &mlp_in, false);
            stream.push(x);
            (x, normed) = self.after_mlp(l, &mid, &mlp.out);
        }
        stream.push(x);
        (normed, Trace { tables, stream })
    }

    fn tables(&self, batch: &Batch) -> B::Tables {
        let mut specs: Vec<AttentionSpec> = Vec::new();
        for layer in &self.config.layers {
            let spec = attention_spec(&self.config, layer);
            if !specs.contains(&spec) {
                specs.push(spec);
            }
        }
        self.backend.tables(batch, &specs)
    }

    /// The embedding, and the first layer's input.
    fn enter(&self, tables: &B::Tables) -> (B::Tensor, B::Tensor) {
        let scale = self.config.embed_scale(self.backend.dtype(&self.params.embed));
        let x = self.backend.embed_forward(&self.params.embed, tables, scale);
        let normed = self.backend.rms_norm_forward(&x, self.norm_before(0), self.config.rms_norm_eps);
        (x, normed)
    }

    /// The norm before layer `l`; after the last layer, the final one.
    pub(super) fn norm_before(&self, l: usize) -> &B::Tensor {
        self.params.layers.get(l).map_or(&self.params.final_norm, |p| &p.attn_pre_norm)
    }

    /// The attention block of one layer on its normed input `[T, D]`; keys and values are the batch's own.
    pub(super) fn attention(&self, l: usize, x: &B::Tensor, tables: &B::Tables) -> Attention<B> {
        let (b, p, spec) = (&self.backend, &self.params.layers[l], &self.config.layers[l]);
        let rope = rope_spec(&self.config, spec);
        let [q_raw, k_raw, v] = b.matmul_forward(x, [&p.q, &p.k, &p.v]);
        let q = b.rope_forward(&q_raw, self.head_norm(p.q_norm.as_ref()), tables, &rope);
        let k = b.rope_forward(&k_raw, self.head_norm(p.k_norm.as_ref()), tables, &rope);
        let (o, lse) = b.attention_forward(&q, &k, &v, tables, &attention_spec(&self.config, spec));
        let [out] = b.matmul_forward(&o, [&p.o]);
        Attention { q_raw, k_raw, q, k, v, o, lse, out }
    }

    /// The same over a cache, to which the batch's keys and values are added.
    fn cached_attention(
        &self,
        l: usize,
        x: &B::Tensor,
        tables: &B::Tables,
        (cached_k, cached_v): &mut (B::Tensor, B::Tensor),
    ) -> B::Tensor {
        let (b, p, spec) = (&self.backend, &self.params.layers[l], &self.config.layers[l]);
        let rope = rope_spec(&self.config, spec);
        let [q, k, v] = b.matmul_forward(x, [&p.q, &p.k, &p.v]);
        let norms =
            self.head_norm(p.q_norm.as_ref()).zip(self.head_norm(p.k_norm.as_ref())).map(<[_; 2]>::from);
        let q = b.rope_append(&q, &k, &v, norms, tables, &rope, cached_k, cached_v);
        let (o, _) = b.attention_forward(&q, cached_k, cached_v, tables, &attention_spec(&self.config, spec));
        let [out] = b.matmul_forward(&o, [&p.o]);
        out
    }

    fn head_norm<'a>(&self, weight: Option<&'a B::Tensor>) -> Option<HeadNorm<&'a B::Tensor>> {
        weight.map(|weight| HeadNorm { weight, eps: self.config.rms_norm_eps })
    }

    /// (residual stream, the MLP's normed input) after the attention block.
    pub(super) fn after_attention(&self, l: usize, x: &B::Tensor, out: &B::Tensor) -> (B::Tensor, B::Tensor) {
        let p = &self.params.layers[l];
        let eps = self.config.rms_norm_eps;
        self.backend.add_norm_forward(x, out, p.attn_post_norm.as_ref(), &p.mlp_pre_norm, eps)
    }

    /// The MLP of one layer on its normed input `[T, D]`.
    pub(super) fn mlp(&self, l: usize, x: &B::Tensor, keep: bool) -> Mlp<B> {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        let (inner, gate_up) = b.geglu_forward(x, &p.gate, &p.up, keep);
        let [out] = b.matmul_forward(&inner, [&p.down]);
        Mlp { gate_up, inner, out }
    }

    /// (residual stream, the next layer's normed input) after the MLP.
    fn after_mlp(&self, l: usize, mid: &B::Tensor, out: &B::Tensor) -> (B::Tensor, B::Tensor) {
        let post = self.params.layers[l].mlp_post_norm.as_ref();
        self.backend.add_norm_forward(mid, out, post, self.norm_before(l + 1), self.config.rms_norm_eps)
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

/// RoPE of a layer.
pub(super) fn rope_spec(config: &GemmaConfig, layer: &LayerSpec) -> RopeSpec {
    RopeSpec { head_dim: config.head_dim, theta: layer.rope_theta, factor: layer.rope_factor }
}
