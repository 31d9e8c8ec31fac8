//! The forward pass.

use super::Gemma;
use super::activations::Kept;
use super::config::{GemmaConfig, LayerSpec};
use crate::backend::{AttentionSpec, Backend, Batch, Decode, HeadNorm, ResidualSpec, RopeSpec};

/// Keys and values of every layer, rows as the segment table says: shared prompts once, tails per stream.
pub struct KvCache<B: Backend> {
    layers: Vec<(B::Tensor, B::Tensor)>,
}

impl<B: Backend> KvCache<B> {
    /// Room for `rows` tokens.
    pub fn new(backend: &B, config: &GemmaConfig, rows: usize) -> Self {
        let room =
            |layer: &LayerSpec| backend.zeros(backend.activation_dtype(), rows, layer.shape.kv_width());
        Self { layers: config.layers.iter().map(|layer| (room(layer), room(layer))).collect() }
    }
}

/// What the backward pass needs.
pub struct Trace<B: Backend> {
    pub(super) tables: B::Tables,
    /// The residual stream before every layer, and after the last.
    pub(super) stream: Vec<B::Tensor>,
    /// What the blocks of every layer keep.
    pub(super) layers: Vec<Activations<B>>,
}

impl<B: Backend> Trace<B> {
    /// Gives back all activations but the residual stream: the backward pass computes them again.
    pub fn forget_activations(&mut self) {
        self.layers.fill_with(Activations::default);
    }
}

/// What the blocks of a layer computed, where they keep it.
pub(super) struct Activations<B: Backend> {
    pub(super) attention: Option<AttentionBlock<B>>,
    pub(super) mlp: Option<MlpBlock<B>>,
}

impl<B: Backend> Default for Activations<B> {
    fn default() -> Self {
        Self { attention: None, mlp: None }
    }
}

/// What an attention block computed.
pub(super) struct Attention<B: Backend> {
    /// Projections of q and k, before norm and RoPE.
    pub(super) q_raw: B::Tensor,
    pub(super) k_raw: B::Tensor,
    /// What attention reads.
    pub(super) q: B::Tensor,
    pub(super) k: B::Tensor,
    /// v before its norm, where it has one and is not k.
    pub(super) v_raw: Option<B::Tensor>,
    pub(super) v: B::Tensor,
    /// What attention returns.
    pub(super) o: B::Tensor,
    pub(super) lse: B::Tensor,
}

/// An attention block and what it led to.
pub(super) struct AttentionBlock<B: Backend> {
    pub(super) inner: Attention<B>,
    /// The block's output, where a norm follows it.
    pub(super) out: Option<B::Tensor>,
    /// The residual stream behind it.
    pub(super) mid: B::Tensor,
}

/// What an MLP computed.
pub(super) struct Mlp<B: Backend> {
    /// (gate, up), where kept.
    pub(super) gate_up: Option<(B::Tensor, B::Tensor)>,
    /// gelu(gate) * up.
    pub(super) product: B::Tensor,
}

/// An MLP.
pub(super) struct MlpBlock<B: Backend> {
    pub(super) inner: Mlp<B>,
    /// The block's output, where a norm follows it.
    pub(super) out: Option<B::Tensor>,
}

impl<B: Backend> Gemma<B> {
    /// Final-norm hidden states `[T, D]` of a batch whose keys and values go to `cache` (and stay there).
    pub fn forward_cached(&self, batch: &Batch, cache: &mut KvCache<B>) -> B::Tensor {
        self.cached(&self.backend.tables(batch, &self.attention_specs()), cache)
    }

    /// The same of a step of decoding.
    pub fn decode(&self, step: &Decode<B::Draws>, cache: &mut KvCache<B>) -> B::Tensor {
        self.cached(&self.backend.decode_tables(step, &self.attention_specs()), cache)
    }

    fn cached(&self, tables: &B::Tables, cache: &mut KvCache<B>) -> B::Tensor {
        let (mut x, mut normed) = self.enter(tables);
        for (l, kv) in cache.layers.iter_mut().enumerate() {
            let attn_out = self.cached_attention(l, &normed, tables, kv);
            let (mid, mlp_in) = self.after_attention(l, &x, &attn_out);
            let mlp = self.mlp(l, &mlp_in, false);
            (x, normed) = self.after_mlp(l, &mid, &self.mlp_out(l, &mlp));
        }
        normed
    }

    /// Final-norm hidden states `[T, D]` where every token is a query (row = key/value row), and what the backward
    /// pass needs, of which it computes all activations again.
    pub fn forward(&self, batch: &Batch) -> (B::Tensor, Trace<B>) {
        self.forward_keeping(batch, &Kept::none(&self.config))
    }

    /// [`Gemma::forward`] that keeps activations.
    pub fn forward_keeping(&self, batch: &Batch, kept: &Kept) -> (B::Tensor, Trace<B>) {
        let tables = self.backend.tables(batch, &self.attention_specs());
        let (mut x, mut normed) = self.enter(&tables);
        let count = self.config.layers.len();
        let (mut stream, mut layers) = (Vec::with_capacity(count + 1), Vec::with_capacity(count));
        for l in 0..count {
            let (AttentionBlock { inner, out, mid }, mlp_in) = self.attention_block(l, &x, &normed, &tables);
            // What is not kept gives way to what the MLP computes.
            let attention = kept.attention_of(l).then_some((inner, out));
            let mlp = self.mlp(l, &mlp_in, kept.mlp_of(l));
            let mlp_out = self.mlp_out(l, &mlp);
            stream.push(x);
            (x, normed) = self.after_mlp(l, &mid, &mlp_out);
            let post = &self.params.layers[l].mlp_post_norm;
            layers.push(Activations {
                attention: attention.map(|(inner, out)| AttentionBlock { inner, out, mid }),
                mlp: kept.mlp_of(l).then(|| MlpBlock { inner: mlp, out: post.as_ref().map(|_| mlp_out) }),
            });
        }
        stream.push(x);
        (normed, Trace { tables, stream, layers })
    }

    /// What attention of any layer needs to know, each once.
    fn attention_specs(&self) -> Vec<AttentionSpec> {
        let mut specs: Vec<AttentionSpec> = Vec::new();
        for layer in &self.config.layers {
            let spec = attention_spec(&self.config, layer);
            if !specs.contains(&spec) {
                specs.push(spec);
            }
        }
        specs
    }

    /// The embedding, and the first layer's input.
    fn enter(&self, tables: &B::Tables) -> (B::Tensor, B::Tensor) {
        let scale = self.config.embed_scale(self.backend.dtype(&self.params.embed));
        let x = self.backend.embed_forward(&self.params.embed, tables, scale);
        let normed = self.backend.rms_norm_forward(&x, self.norm_before(0), self.config.norm);
        (x, normed)
    }

    /// The norm before layer `l`; after the last layer, the final one.
    pub(super) fn norm_before(&self, l: usize) -> &B::Tensor {
        self.params.layers.get(l).map_or(&self.params.final_norm, |p| &p.attn_pre_norm)
    }

    /// Attention of one layer on its normed input `[T, D]`; keys and values are the batch's own.
    fn attention(&self, l: usize, x: &B::Tensor, tables: &B::Tables) -> Attention<B> {
        let (b, spec) = (&self.backend, &self.config.layers[l]);
        let [q_norm, k_norm, v_norm] = self.head_norms(l);
        let (q_raw, k_raw, v_raw) = self.projections(l, x);
        let q = b.rope_forward(&q_raw, q_norm, tables, &spec.rope);
        let k = b.rope_forward(&k_raw, k_norm, tables, &spec.rope);
        let values = |raw| b.rope_forward(raw, v_norm, tables, &RopeSpec::still(spec.shape.head_dim));
        let (v_raw, v) = match v_raw {
            Some(v) if v_norm.is_none() => (None, v),
            Some(raw) => {
                let v = values(&raw);
                (Some(raw), v)
            }
            None => (None, values(&k_raw)),
        };
        let (o, lse) = b.attention_forward(&q, &k, &v, tables, &attention_spec(&self.config, spec));
        Attention { q_raw, k_raw, v_raw, q, k, v, o, lse }
    }

    /// q, k and v of a layer before their norms and RoPE; no v where values are keys.
    fn projections(&self, l: usize, x: &B::Tensor) -> (B::Tensor, B::Tensor, Option<B::Tensor>) {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        match &p.v {
            Some(v) => {
                let [q, k, v] = b.matmul_forward(x, [&p.q, &p.k, v]);
                (q, k, Some(v))
            }
            None => {
                let [q, k] = b.matmul_forward(x, [&p.q, &p.k]);
                (q, k, None)
            }
        }
    }

    /// The attention block of one layer, from the residual stream x before it and x normed, and the MLP's normed input.
    pub(super) fn attention_block(
        &self,
        l: usize,
        x: &B::Tensor,
        normed: &B::Tensor,
        tables: &B::Tables,
    ) -> (AttentionBlock<B>, B::Tensor) {
        let p = &self.params.layers[l];
        let inner = self.attention(l, normed, tables);
        let [out] = self.backend.matmul_forward(&inner.o, [&p.o]);
        let (mid, mlp_in) = self.after_attention(l, x, &out);
        let out = p.attn_post_norm.as_ref().map(|_| out);
        (AttentionBlock { inner, out, mid }, mlp_in)
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
        let (q, k, v) = self.projections(l, x);
        let v = v.as_ref().unwrap_or(&k);
        let q = b.rope_append(&q, &k, v, self.head_norms(l), tables, &spec.rope, cached_k, cached_v);
        let (o, _) = b.attention_forward(&q, cached_k, cached_v, tables, &attention_spec(&self.config, spec));
        let [out] = b.matmul_forward(&o, [&p.o]);
        out
    }

    /// The norms of the heads of q, k and v of a layer.
    fn head_norms(&self, l: usize) -> [Option<HeadNorm<&B::Tensor>>; 3] {
        let (c, p) = (&self.config, &self.params.layers[l]);
        let [of_q, of_k] =
            [&p.q_norm, &p.k_norm].map(|w| w.as_ref().map(|w| HeadNorm { weight: Some(w), spec: c.norm }));
        [of_q, of_k, c.value_norm.then_some(HeadNorm { weight: None, spec: c.norm })]
    }

    /// (residual stream, the MLP's normed input) after the attention block.
    fn after_attention(&self, l: usize, x: &B::Tensor, out: &B::Tensor) -> (B::Tensor, B::Tensor) {
        let p = &self.params.layers[l];
        let spec = self.attention_sum();
        self.backend.add_norm_forward(x, out, p.attn_post_norm.as_ref(), &p.mlp_pre_norm, spec)
    }

    /// The MLP of one layer on its normed input `[T, D]`, but for the last product.
    pub(super) fn mlp(&self, l: usize, x: &B::Tensor, keep: bool) -> Mlp<B> {
        let p = &self.params.layers[l];
        let (product, gate_up) = self.backend.geglu_forward(x, &p.gate, &p.up, keep);
        Mlp { gate_up, product }
    }

    /// The MLP's output, before its norm.
    pub(super) fn mlp_out(&self, l: usize, mlp: &Mlp<B>) -> B::Tensor {
        let [out] = self.backend.matmul_forward(&mlp.product, [&self.params.layers[l].down]);
        out
    }

    /// (residual stream, the next layer's normed input) after the MLP.
    fn after_mlp(&self, l: usize, mid: &B::Tensor, out: &B::Tensor) -> (B::Tensor, B::Tensor) {
        let post = self.params.layers[l].mlp_post_norm.as_ref();
        self.backend.add_norm_forward(mid, out, post, self.norm_before(l + 1), self.mlp_sum(l))
    }

    /// The residual sum after attention.
    pub(super) fn attention_sum(&self) -> ResidualSpec {
        ResidualSpec { norm: self.config.norm, scale: 1.0 }
    }

    /// The residual sum after the MLP, at the end of layer `l`.
    pub(super) fn mlp_sum(&self, l: usize) -> ResidualSpec {
        ResidualSpec { norm: self.config.norm, scale: self.scalars[l] }
    }
}

/// What attention needs to know of a layer.
pub(super) fn attention_spec(config: &GemmaConfig, layer: &LayerSpec) -> AttentionSpec {
    AttentionSpec {
        heads: layer.shape.heads,
        kv_heads: layer.shape.kv_heads,
        head_dim: layer.shape.head_dim,
        scale: config.attention_scale,
        softcap: config.attention_softcap,
        window: layer.window,
    }
}
