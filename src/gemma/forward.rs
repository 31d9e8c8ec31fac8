//! The forward pass.

use std::ops::Range;
use std::sync::Arc;

use super::Gemma;
use super::activations::Kept;
use super::config::{GemmaConfig, LayerSpec};
use super::lora::Linear;
use super::params::ExpertParams;
use crate::backend::{
    AttentionSpec, Backend, Batch, Decode, ExpertTrace, HeadNorm, NormSpec, ResidualSpec, RopeSpec,
};

/// Keys and values of every layer that has its own, rows as the segment table says: shared prompts once, tails per stream.
pub struct KvCache<B: Backend> {
    layers: Vec<Option<(B::Tensor, B::Tensor)>>,
}

impl<B: Backend> KvCache<B> {
    /// Room for `rows` tokens.
    pub fn new(backend: &B, config: &GemmaConfig, rows: usize) -> Self {
        let room =
            |layer: &LayerSpec| backend.zeros(backend.activation_dtype(), rows, layer.shape.kv_width());
        let of_layer = |layer: &LayerSpec| layer.kv_from.is_none().then(|| (room(layer), room(layer)));
        Self { layers: config.layers.iter().map(of_layer).collect() }
    }
}

/// What the backward pass needs.
pub struct Trace<B: Backend> {
    pub(super) tables: B::Tables,
    /// The residual stream before every layer, and after the last.
    pub(super) stream: Vec<B::Tensor>,
    /// What the blocks of every layer keep.
    pub(super) layers: Vec<Activations<B>>,
    /// Keys and values that later layers read.
    pub(super) shared: SharedKv<B>,
    /// The layers' own inputs.
    pub(super) inputs: Option<LayerInputs<B>>,
    /// The rows whose hidden states are asked for, where those are not all.
    pub(super) wanted: Option<Wanted<B>>,
}

/// Some of a batch's rows.
pub(super) struct Wanted<B: Backend> {
    pub(super) rows: Vec<u32>,
    /// T.
    pub(super) total: usize,
    pub(super) tail: Option<Tail<B>>,
}

/// The layers from [`GemmaConfig::narrowing`] on: nothing but the wanted rows runs through them, beside the keys and values of all
/// rows in the first.
pub(super) struct Tail<B: Backend> {
    pub(super) tables: B::Tables,
    /// The residual stream before them, all rows.
    pub(super) before: B::Tensor,
    /// The wanted rows of the layers' inputs.
    pub(super) inputs: Option<B::Tensor>,
}

/// All rows of a batch, as they enter the layer in which the wanted ones go on alone.
pub(super) struct Entering<'a, B: Backend> {
    pub(super) tables: &'a B::Tables,
    pub(super) wanted: &'a [u32],
}

/// By layer, its keys and values as attention reads them, if a later layer reads them too.
pub(super) type SharedKv<B> = Vec<Option<Kv<B>>>;

/// Keys and values.
pub(super) struct Kv<B: Backend> {
    pub(super) k: Arc<B::Tensor>,
    pub(super) v: Arc<B::Tensor>,
}

impl<B: Backend> Clone for Kv<B> {
    fn clone(&self) -> Self {
        Self { k: Arc::clone(&self.k), v: Arc::clone(&self.v) }
    }
}

/// The layers' own inputs.
pub(super) struct LayerInputs<B: Backend> {
    /// The share that comes from the embedding, before its norm: `[T L, P]`.
    pub(super) raw: B::Tensor,
    /// `[T, L P]`.
    pub(super) all: B::Tensor,
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
    pub(super) mlp: Option<(MlpBlock<B>, Option<InputBlock<B>>)>,
}

impl<B: Backend> Default for Activations<B> {
    fn default() -> Self {
        Self { attention: None, mlp: None }
    }
}

/// What an attention block computed.
pub(super) struct Attention<B: Backend> {
    /// Projections before norm and RoPE.
    pub(super) q_raw: B::Tensor,
    /// `None` where the layer reads another's.
    pub(super) k_raw: Option<B::Tensor>,
    /// v before its norm, where it has one and is not k.
    pub(super) v_raw: Option<B::Tensor>,
    /// What attention reads.
    pub(super) q: B::Tensor,
    pub(super) kv: Kv<B>,
    /// What attention returns.
    pub(super) o: B::Tensor,
    pub(super) lse: B::Tensor,
}

/// Projections of a layer, before norms and RoPE: of k unless the layer reads another's, and then of v unless values are keys.
struct Projections<B: Backend> {
    q: B::Tensor,
    kv: Option<(B::Tensor, Option<B::Tensor>)>,
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

/// The block in which a layer meets its own input.
pub(super) struct InputBlock<B: Backend> {
    /// The residual stream before it.
    pub(super) mid: B::Tensor,
    pub(super) gate: B::Tensor,
    /// gelu(gate) * input.
    pub(super) product: B::Tensor,
    /// The block's output, before its norm.
    pub(super) out: B::Tensor,
}

/// An MLP, and the experts beside it.
pub(super) struct MlpBlock<B: Backend> {
    pub(super) inner: Mlp<B>,
    pub(super) experts: Option<ExpertBlock<B>>,
    /// The block's output, where a norm follows it.
    pub(super) out: Option<B::Tensor>,
}

/// What experts computed beside an MLP.
pub(super) struct ExpertBlock<B: Backend> {
    pub(super) routes: B::Routes,
    /// What their backward pass needs, where kept.
    pub(super) trace: Option<ExpertTrace<B::Tensor>>,
    /// The MLP's output and theirs, before their norms.
    pub(super) mlp_out: B::Tensor,
    pub(super) out: B::Tensor,
}

impl<B: Backend> Gemma<B> {
    /// Final-norm hidden states `[wanted, D]` of the rows `wanted`, which ascend, of a batch whose keys and values go to `cache`
    /// (and stay there). The last layers, where they read the keys and values of others, compute nothing else, and the layer before
    /// them little: see [`GemmaConfig::narrowing`].
    pub fn prefill(&self, batch: &Batch, wanted: &[u32], cache: &mut KvCache<B>) -> B::Tensor {
        let (b, specs, layers) = (&self.backend, self.attention_specs(), self.config.layers.len());
        let tables = b.tables(batch, &specs);
        let (x, normed) = self.enter(&tables);
        let inputs = self.layer_inputs(&x, &tables);
        let first = self.config.narrowing().unwrap_or(layers);
        let all = inputs.as_ref().map(|inputs| &inputs.all);
        let (x, normed) = self.cached(0..first, (x, normed), None, all, &tables, cache);
        let gather = |x: &B::Tensor| b.gather_rows(x, wanted);
        if first == layers {
            return gather(&normed);
        }
        let entering = Entering { tables: &tables, wanted };
        let (ids, runs) = batch.narrowed(wanted);
        let narrow = b.tables(&Batch::new(&ids, batch.segments, &runs), &specs);
        let inputs = inputs.map(|inputs| gather(&inputs.all));
        let state = (gather(&x), normed);
        self.cached(first..layers, state, Some(entering), inputs.as_ref(), &narrow, cache).1
    }

    /// Final-norm hidden states `[T, D]` of a step of decoding, whose keys and values go to `cache`.
    pub fn decode(&self, step: &Decode<B::Draws>, cache: &mut KvCache<B>) -> B::Tensor {
        self.all_cached(&self.backend.decode_tables(step, &self.attention_specs()), cache)
    }

    /// The same of tokens that the host knows.
    pub fn forward_cached(&self, batch: &Batch, cache: &mut KvCache<B>) -> B::Tensor {
        self.all_cached(&self.backend.tables(batch, &self.attention_specs()), cache)
    }

    fn all_cached(&self, tables: &B::Tables, cache: &mut KvCache<B>) -> B::Tensor {
        let (x, normed) = self.enter(tables);
        let inputs = self.layer_inputs(&x, tables);
        let layers = 0..self.config.layers.len();
        self.cached(layers, (x, normed), None, inputs.as_ref().map(|inputs| &inputs.all), tables, cache).1
    }

    /// Runs some layers on (residual stream, its norm), and gives both behind them. What the norm has of rows beyond the
    /// stream's is `entering`.
    fn cached(
        &self,
        layers: Range<usize>,
        (mut x, mut normed): (B::Tensor, B::Tensor),
        mut entering: Option<Entering<B>>,
        inputs: Option<&B::Tensor>,
        tables: &B::Tables,
        cache: &mut KvCache<B>,
    ) -> (B::Tensor, B::Tensor) {
        for l in layers {
            let attn_out = self.cached_attention(l, &normed, entering.take(), tables, cache);
            let (mid, mlp_in) = self.after_attention(l, &x, &attn_out);
            let mlp = self.mlp(l, &mlp_in, false);
            let (mlp_out, _) = self.mlp_out(l, &mid, &mlp, false);
            (x, normed) = match self.input_block(l, &mid, &mlp_out, inputs) {
                Some(block) => self.after_input(l, &block),
                None => self.after_mlp(l, &mid, &mlp_out),
            };
        }
        (x, normed)
    }

    /// Final-norm hidden states `[T, D]` where every token is a query (row = key/value row), and what the backward
    /// pass needs, of which it computes all activations again.
    pub fn forward(&self, batch: &Batch) -> (B::Tensor, Trace<B>) {
        self.forward_keeping(batch, None, &Kept::none(&self.config))
    }

    /// [`Gemma::forward`] that keeps activations, and gives the hidden states of the rows `wanted` alone, which ascend. The last
    /// layers, where they read the keys and values of others, compute nothing else, and the layer before them little: see
    /// [`GemmaConfig::narrowing`].
    pub fn forward_keeping(
        &self,
        batch: &Batch,
        wanted: Option<&[u32]>,
        kept: &Kept,
    ) -> (B::Tensor, Trace<B>) {
        let b = &self.backend;
        let tables = self.backend.tables(batch, &self.attention_specs());
        let (mut x, mut normed) = self.enter(&tables);
        let inputs = self.layer_inputs(&x, &tables);
        let mut shared: SharedKv<B> = self.config.layers.iter().map(|_| None).collect();
        let count = self.config.layers.len();
        let (mut stream, mut layers) = (Vec::with_capacity(count + 1), Vec::with_capacity(count));
        let mut wanted = wanted.map(|rows| Wanted { rows: rows.to_vec(), total: batch.rows, tail: None });
        for l in 0..count {
            if let (Some(wanted), true) = (&mut wanted, self.config.narrowing() == Some(l)) {
                let gather = |x: &B::Tensor| b.gather_rows(x, &wanted.rows);
                let (ids, runs) = batch.narrowed(&wanted.rows);
                let tables = b.tables(&Batch::new(&ids, batch.segments, &runs), &self.attention_specs());
                let inputs = inputs.as_ref().map(|inputs| gather(&inputs.all));
                let some = gather(&x);
                wanted.tail = Some(Tail { tables, before: std::mem::replace(&mut x, some), inputs });
            }
            let entering = self.entering(l, &tables, wanted.as_ref());
            let (tables, inputs) = in_layer(&tables, inputs.as_ref(), wanted.as_ref());
            let (AttentionBlock { inner, out, mid }, mlp_in) =
                self.attention_block(l, &x, &normed, entering.as_ref(), tables, &shared);
            shared[l] = self.config.is_read(l).then(|| inner.kv.clone());
            // What is not kept gives way to what the MLP computes.
            let attention = kept.attention_of(l).then_some((inner, out));
            let mlp = self.mlp(l, &mlp_in, kept.mlp_of(l));
            let (mlp_out, experts) = self.mlp_out(l, &mid, &mlp, kept.mlp_of(l));
            stream.push(x);
            let input = self.input_block(l, &mid, &mlp_out, inputs);
            (x, normed) = match &input {
                Some(block) => self.after_input(l, block),
                None => self.after_mlp(l, &mid, &mlp_out),
            };
            let post = &self.params.layers[l].mlp_post_norm;
            let mlp = || (MlpBlock { inner: mlp, experts, out: post.as_ref().map(|_| mlp_out) }, input);
            layers.push(Activations {
                attention: attention.map(|(inner, out)| AttentionBlock { inner, out, mid }),
                mlp: kept.mlp_of(l).then(mlp),
            });
        }
        stream.push(x);
        let hidden = match &wanted {
            Some(Wanted { rows, tail: None, .. }) => b.gather_rows(&normed, rows),
            _ => normed,
        };
        (hidden, Trace { tables, stream, layers, shared, inputs, wanted })
    }

    /// What enters layer `l` beyond the rows that run through it.
    pub(super) fn entering<'a>(
        &self,
        l: usize,
        tables: &'a B::Tables,
        wanted: Option<&'a Wanted<B>>,
    ) -> Option<Entering<'a, B>> {
        let wanted = wanted.filter(|wanted| wanted.tail.is_some() && self.config.narrowing() == Some(l))?;
        Some(Entering { tables, wanted: &wanted.rows })
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

    /// The layers' own inputs, of the tokens and of their embedding x: (E\[ids\] + norm(x W^T D^-1/2)) 2^-1/2, with the norm
    /// over each layer's P columns.
    fn layer_inputs(&self, x: &B::Tensor, tables: &B::Tables) -> Option<LayerInputs<B>> {
        let (b, c, p) = (&self.backend, &self.config, &self.params);
        if c.per_layer_width == 0 {
            return None;
        }
        let table = p.per_layer_embed.as_ref().or(self.frozen.per_layer_embed.as_ref());
        let parts = table.zip(p.per_layer.as_ref()).zip(p.per_layer_norm.as_ref());
        let ((table, weight), norm) = parts.expect("a model whose layers have inputs has their parameters");
        let own = b.embed_forward(table, tables, c.per_layer_scale(b.dtype(table)));
        let [raw] = b.matmul_forward(x, [weight]);
        let (rows, cols) = b.shape(&own);
        let by_layer = |x| b.reshaped(x, rows * c.layers.len(), c.per_layer_width);
        let raw = by_layer(raw);
        let all = b.add_forward(&by_layer(own), &raw, norm, self.input_sum());
        Some(LayerInputs { raw, all: b.reshaped(all, rows, cols) })
    }

    /// The sum of a layer's own embedding and what comes from the model's. The norm's eps has the D that its input lacks.
    pub(super) fn input_sum(&self) -> ResidualSpec {
        let NormSpec { eps, offset } = self.config.norm;
        let norm = NormSpec { eps: eps * self.config.hidden_size as f32, offset };
        ResidualSpec { norm, scale: std::f32::consts::FRAC_1_SQRT_2 }
    }

    /// The norm before layer `l`; after the last layer, the final one.
    pub(super) fn norm_before(&self, l: usize) -> &B::Tensor {
        self.params.layers.get(l).map_or(&self.params.final_norm, |p| &p.attn_pre_norm)
    }

    /// Attention of one layer on its normed input `[T, D]`; keys and values are the batch's own. `tables` are those of its queries,
    /// to which fewer rows may belong than are `entering`.
    fn attention(
        &self,
        l: usize,
        x: &B::Tensor,
        entering: Option<&Entering<B>>,
        tables: &B::Tables,
        shared: &SharedKv<B>,
    ) -> Attention<B> {
        let (b, spec, queries) = (&self.backend, &self.config.layers[l], tables);
        let tables = entering.map_or(tables, |entering| entering.tables);
        let [q_norm, k_norm, v_norm] = self.head_norms(l);
        let Projections { q: q_raw, kv } = self.projections(l, x);
        let q = b.rope_forward(&q_raw, q_norm, tables, &spec.rope);
        let q = entering.map(|entering| b.gather_rows(&q, entering.wanted)).unwrap_or(q);
        let (k_raw, v_raw, kv) = match kv {
            None => (None, None, self.read(shared, l).clone()),
            Some((k_raw, v)) => {
                let k = b.rope_forward(&k_raw, k_norm, tables, &spec.rope);
                let normed = |raw| b.rope_forward(raw, v_norm, tables, &RopeSpec::still(spec.shape.head_dim));
                let (v_raw, v) = match v {
                    Some(v) if v_norm.is_none() => (None, v),
                    Some(raw) => {
                        let v = normed(&raw);
                        (Some(raw), v)
                    }
                    None => (None, normed(&k_raw)),
                };
                (Some(k_raw), v_raw, Kv { k: Arc::new(k), v: Arc::new(v) })
            }
        };
        let (o, lse) = b.attention_forward(&q, &kv.k, &kv.v, queries, &attention_spec(&self.config, spec));
        Attention { q_raw, k_raw, v_raw, q, kv, o, lse }
    }

    /// The keys and values of another layer that layer `l` reads.
    fn read<'a, T>(&self, all: &'a [Option<T>], l: usize) -> &'a T {
        let from =
            self.config.layers[l].kv_from.expect("a layer without a projection of keys reads another's");
        all[from].as_ref().expect("a layer that others read comes before them")
    }

    /// q, k and v of a layer before their norms and RoPE.
    fn projections(&self, l: usize, x: &B::Tensor) -> Projections<B> {
        let p = &self.params.layers[l];
        match (&p.k, &p.v) {
            (Some(_), Some(_)) => {
                let [q, k, v] = self.linear(l, x, [Linear::Q, Linear::K, Linear::V]);
                Projections { q, kv: Some((k, Some(v))) }
            }
            (Some(_), None) => {
                let [q, k] = self.linear(l, x, [Linear::Q, Linear::K]);
                Projections { q, kv: Some((k, None)) }
            }
            (None, _) => {
                let [q] = self.linear(l, x, [Linear::Q]);
                Projections { q, kv: None }
            }
        }
    }

    /// The attention block of one layer, from the residual stream x before it and x normed, and the MLP's normed input. What of
    /// normed are rows beyond x's is `entering`.
    pub(super) fn attention_block(
        &self,
        l: usize,
        x: &B::Tensor,
        normed: &B::Tensor,
        entering: Option<&Entering<B>>,
        tables: &B::Tables,
        shared: &SharedKv<B>,
    ) -> (AttentionBlock<B>, B::Tensor) {
        let p = &self.params.layers[l];
        let inner = self.attention(l, normed, entering, tables, shared);
        let [out] = self.linear(l, &inner.o, [Linear::O]);
        let (mid, mlp_in) = self.after_attention(l, x, &out);
        let out = p.attn_post_norm.as_ref().map(|_| out);
        (AttentionBlock { inner, out, mid }, mlp_in)
    }

    /// The same over a cache, to which the batch's keys and values are added.
    fn cached_attention(
        &self,
        l: usize,
        x: &B::Tensor,
        entering: Option<Entering<B>>,
        tables: &B::Tables,
        cache: &mut KvCache<B>,
    ) -> B::Tensor {
        let (b, spec, queries) = (&self.backend, &self.config.layers[l], tables);
        let tables = entering.as_ref().map_or(tables, |entering| entering.tables);
        let Projections { q, kv } = self.projections(l, x);
        let norms = self.head_norms(l);
        let (q, (k, v)) = match (&kv, &mut cache.layers[l]) {
            (Some((k, v)), Some(own)) => {
                let v = v.as_ref().unwrap_or(k);
                (b.rope_append(&q, k, v, norms, tables, &spec.rope, &mut own.0, &mut own.1), &*own)
            }
            _ => (b.rope_forward(&q, norms[0], tables, &spec.rope), self.read(&cache.layers, l)),
        };
        let q = entering.map(|entering| b.gather_rows(&q, entering.wanted)).unwrap_or(q);
        let (o, _) = b.attention_forward(&q, k, v, queries, &attention_spec(&self.config, spec));
        let [out] = self.linear(l, &o, [Linear::O]);
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
        let spec = self.inner_sum();
        self.backend.add_norm_forward(x, out, p.attn_post_norm.as_ref(), &p.mlp_pre_norm, spec)
    }

    /// The MLP of one layer on its normed input `[T, D]`, but for the last product.
    pub(super) fn mlp(&self, l: usize, x: &B::Tensor, keep: bool) -> Mlp<B> {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        if [Linear::Gate, Linear::Up].iter().any(|&map| self.adapter(l, map).is_some()) {
            let [gate, up] = self.linear(l, x, [Linear::Gate, Linear::Up]);
            let product = b.gelu_product_forward(&gate, &up, 0);
            return Mlp { gate_up: keep.then_some((gate, up)), product };
        }
        let (product, gate_up) = b.geglu_forward(x, &p.gate, &p.up, keep);
        Mlp { gate_up, product }
    }

    /// The MLP's output, and that of the experts beside it, before the norm of both. mid is the residual stream before them.
    pub(super) fn mlp_out(
        &self,
        l: usize,
        mid: &B::Tensor,
        mlp: &Mlp<B>,
        keep: bool,
    ) -> (B::Tensor, Option<ExpertBlock<B>>) {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        let [mlp_out] = self.linear(l, &mlp.product, [Linear::Down]);
        let Some((p, routing)) = p.experts.as_ref().zip(self.config.routing()) else {
            return (mlp_out, None);
        };
        let (router_in, x) = self.expert_inputs(p, mid);
        let [scores] = b.matmul_forward(&router_in, [&p.router]);
        let routes = b.route_forward(&scores, &p.factors, &routing);
        let (out, trace) = b.experts_forward(&x, &routes, &p.gate_up, &p.down, keep);
        let normed = b.rms_norm_forward(&mlp_out, &p.mlp_norm, self.config.norm);
        let sum = b.add_forward(&normed, &out, &p.post_norm, self.inner_sum());
        (sum, Some(ExpertBlock { routes, trace, mlp_out, out }))
    }

    /// The residual stream before an MLP, normed for the router and for the experts beside it.
    pub(super) fn expert_inputs(
        &self,
        p: &ExpertParams<B::Tensor>,
        mid: &B::Tensor,
    ) -> (B::Tensor, B::Tensor) {
        let norm = |w| self.backend.rms_norm_forward(mid, w, self.config.norm);
        (norm(&p.router_norm), norm(&p.pre_norm))
    }

    /// (residual stream, the next layer's normed input) after the MLP.
    fn after_mlp(&self, l: usize, mid: &B::Tensor, out: &B::Tensor) -> (B::Tensor, B::Tensor) {
        let post = self.params.layers[l].mlp_post_norm.as_ref();
        self.backend.add_norm_forward(mid, out, post, self.norm_before(l + 1), self.layer_sum(l))
    }

    /// The block behind the MLP of one layer, from the residual stream before the MLP and the MLP's output, where the layer
    /// has an input of its own.
    pub(super) fn input_block(
        &self,
        l: usize,
        mid: &B::Tensor,
        mlp_out: &B::Tensor,
        inputs: Option<&B::Tensor>,
    ) -> Option<InputBlock<B>> {
        let (b, p) = (&self.backend, &self.params.layers[l]);
        let inputs = inputs?;
        let (block, post) =
            p.input.as_ref().zip(p.mlp_post_norm.as_ref()).expect("a layer with an input has such a block");
        let mid = b.add_forward(mid, mlp_out, post, self.inner_sum());
        let [gate] = b.matmul_forward(&mid, [&block.gate]);
        let product = b.gelu_product_forward(&gate, inputs, l * self.config.per_layer_width);
        let [out] = b.matmul_forward(&product, [&block.projection]);
        Some(InputBlock { mid, gate, product, out })
    }

    /// (residual stream, the next layer's normed input) after that block.
    fn after_input(&self, l: usize, block: &InputBlock<B>) -> (B::Tensor, B::Tensor) {
        let post = self.params.layers[l].input.as_ref().map(|input| &input.post_norm);
        let next = self.norm_before(l + 1);
        self.backend.add_norm_forward(&block.mid, &block.out, post, next, self.layer_sum(l))
    }

    /// A residual sum within a layer.
    pub(super) fn inner_sum(&self) -> ResidualSpec {
        ResidualSpec { norm: self.config.norm, scale: 1.0 }
    }

    /// The residual sum at the end of layer `l`.
    pub(super) fn layer_sum(&self, l: usize) -> ResidualSpec {
        ResidualSpec { norm: self.config.norm, scale: self.frozen.scalars[l] }
    }
}

/// The tables and the layers' inputs of the rows that run, which are the wanted ones once there is a tail.
pub(super) fn in_layer<'a, B: Backend>(
    tables: &'a B::Tables,
    inputs: Option<&'a LayerInputs<B>>,
    wanted: Option<&'a Wanted<B>>,
) -> (&'a B::Tables, Option<&'a B::Tensor>) {
    match wanted.and_then(|wanted| wanted.tail.as_ref()) {
        Some(tail) => (&tail.tables, tail.inputs.as_ref()),
        None => (tables, inputs.map(|inputs| &inputs.all)),
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
