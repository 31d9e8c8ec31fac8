//! The model's parameters, and the table of them ([`plan`]) that drives loading, checking and saving.
//!
//! [`Params`] is a container of one `T` per tensor, always in the same order: backend tensors, gradients, moments,
//! or [`ParamSpec`]s.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use half::{bf16, f16};

use super::config::{
    CONFIG_FILE, ExpertShape, GemmaConfig, LayerShape, LayerSpec, MAX_SPARE_ROWS, NormPlacement,
};
use crate::backend::{Backend, DType};
use crate::checkpoint::{Checkpoint, Dtype, TensorView};

/// One `T` for every parameter of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Params<T> {
    /// `[V, D]`: the embedding and, where there is no [`Self::head`], the LM head (transposed).
    pub embed: T,
    /// `[V, L P]`: the layers' own embeddings (Gemma 4 E2B, E4B), where they are trained; else they are [`Frozen`].
    pub per_layer_embed: Option<T>,
    /// `[L P, D]`: from the embedding to the layers' own inputs (Gemma 4 E2B, E4B).
    pub per_layer: Option<T>,
    /// `[1, P]`: on each layer's share of what [`Self::per_layer`] gives.
    pub per_layer_norm: Option<T>,
    /// One per decoder layer.
    pub layers: Vec<LayerParams<T>>,
    /// `[1, D]`: before the LM head.
    pub final_norm: T,
    /// `[V, D]`: the LM head, where it is not the embedding.
    pub head: Option<T>,
    /// `[1, D]`: of a reward model, what a response's last hidden state is multiplied with.
    pub score: Option<T>,
}

/// One `T` for every parameter of a decoder layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerParams<T> {
    /// `[1, D]`: before attention.
    pub attn_pre_norm: T,
    /// `[H Dh, D]`.
    pub q: T,
    /// `[K Dh, D]`; none where the layer reads another's.
    pub k: Option<T>,
    /// `[K Dh, D]`; none there, nor where values are keys (Gemma 4).
    pub v: Option<T>,
    /// `[D, H Dh]`.
    pub o: T,
    /// `[1, Dh]`: on every query head (Gemma 3 and 4).
    pub q_norm: Option<T>,
    /// `[1, Dh]`: on every key head (Gemma 3 and 4).
    pub k_norm: Option<T>,
    /// `[1, D]`: on attention's output, before the residual sum (Gemma 2 to 4).
    pub attn_post_norm: Option<T>,
    /// `[1, D]`: before the MLP.
    pub mlp_pre_norm: T,
    /// `[F, D]`.
    pub gate: T,
    /// `[F, D]`.
    pub up: T,
    /// `[D, F]`.
    pub down: T,
    /// `[1, D]`: on the MLP's output, before the residual sum (Gemma 2 to 4).
    pub mlp_post_norm: Option<T>,
    /// The experts beside the MLP.
    pub experts: Option<ExpertParams<T>>,
    /// The block behind the MLP, which meets the layer's own input.
    pub input: Option<InputParams<T>>,
    /// Low-rank adapters of its linear maps, by [`Linear`].
    pub adapters: Adapters<T>,
}

/// One `T` for every parameter of the experts beside an MLP (Gemma 4 26B-A4B).
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertParams<T> {
    /// `[1, D]`: before the router.
    pub router_norm: T,
    /// `[E, D]`: what a token's scores are, once normed.
    pub router: T,
    /// `[1, E]`: factors on the weights of routes.
    pub factors: T,
    /// `[1, D]`: before the experts.
    pub pre_norm: T,
    /// `[E 2 Fe, D]`: gate and then up of each expert.
    pub gate_up: T,
    /// `[E D, Fe]`: down of each.
    pub down: T,
    /// `[1, D]`: on the MLP's output, before the sum of both.
    pub mlp_norm: T,
    /// `[1, D]`: on the experts' output, before the sum of both.
    pub post_norm: T,
}

impl<T> ExpertParams<T> {
    fn map<'a, U>(&'a self, f: &mut impl FnMut(&'a T) -> U) -> ExpertParams<U> {
        ExpertParams {
            router_norm: f(&self.router_norm),
            router: f(&self.router),
            factors: f(&self.factors),
            pre_norm: f(&self.pre_norm),
            gate_up: f(&self.gate_up),
            down: f(&self.down),
            mlp_norm: f(&self.mlp_norm),
            post_norm: f(&self.post_norm),
        }
    }

    fn push_mut<'a>(&'a mut self, all: &mut Vec<&'a mut T>) {
        all.extend([&mut self.router_norm, &mut self.router, &mut self.factors, &mut self.pre_norm]);
        all.extend([&mut self.gate_up, &mut self.down, &mut self.mlp_norm, &mut self.post_norm]);
    }
}

/// One `T` for every parameter of the block in which a layer meets its own input (Gemma 4 E2B, E4B).
#[derive(Debug, Clone, PartialEq)]
pub struct InputParams<T> {
    /// `[P, D]`.
    pub gate: T,
    /// `[D, P]`.
    pub projection: T,
    /// `[1, D]`: on the block's output, before the residual sum.
    pub post_norm: T,
}

/// The linear maps of a layer that may have an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[allow(missing_docs, reason = "as in the papers")]
pub enum Linear {
    #[serde(rename = "q_proj")]
    Q,
    #[serde(rename = "k_proj")]
    K,
    #[serde(rename = "v_proj")]
    V,
    #[serde(rename = "o_proj")]
    O,
    #[serde(rename = "gate_proj")]
    Gate,
    #[serde(rename = "up_proj")]
    Up,
    #[serde(rename = "down_proj")]
    Down,
}

impl Linear {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Transformers' name of the module within a layer.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// The last part of that.
    pub fn name(self) -> &'static str {
        self.path().split_once('.').map_or("", |(_, name)| name)
    }
}

/// The two matrices of an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter<T> {
    /// A `[r, in]`.
    pub a: T,
    /// B `[out, r]`.
    pub b: T,
}

/// A layer's adapters, by [`Linear`].
pub type Adapters<T> = [Option<Adapter<T>>; 7];

impl<T> Params<T> {
    /// `f` of every tensor, in order.
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Params<U> {
        Params {
            embed: f(&self.embed),
            per_layer_embed: self.per_layer_embed.as_ref().map(&mut f),
            per_layer: self.per_layer.as_ref().map(&mut f),
            per_layer_norm: self.per_layer_norm.as_ref().map(&mut f),
            layers: self.layers.iter().map(|layer| layer.map(&mut f)).collect(),
            final_norm: f(&self.final_norm),
            head: self.head.as_ref().map(&mut f),
            score: self.score.as_ref().map(f),
        }
    }

    /// All tensors, in order.
    pub fn tensors(&self) -> Vec<&T> {
        let mut all = Vec::new();
        self.map(|t| all.push(t));
        all
    }

    /// All tensors, in the order of [`Params::tensors`].
    pub fn tensors_mut(&mut self) -> Vec<&mut T> {
        let mut all = vec![&mut self.embed];
        all.extend(&mut self.per_layer_embed);
        all.extend(&mut self.per_layer);
        all.extend(&mut self.per_layer_norm);
        for layer in &mut self.layers {
            layer.push_mut(&mut all);
        }
        all.push(&mut self.final_norm);
        all.extend(&mut self.head);
        all.extend(&mut self.score);
        all
    }

    /// The LM head: a matrix of its own or the embedding.
    pub fn lm_head(&self) -> &T {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// The same, to be changed.
    pub fn lm_head_mut(&mut self) -> &mut T {
        self.head.as_mut().unwrap_or(&mut self.embed)
    }
}

impl<T: Send + Sync> Params<T> {
    /// f32 zeros in the shape of every tensor: gradients, moments.
    pub fn zeros_like<B: Backend<Tensor = T>>(&self, backend: &B) -> Params<T> {
        self.map(|t| {
            let (rows, cols) = backend.shape(t);
            backend.zeros(DType::F32, rows, cols)
        })
    }
}

impl<T> LayerParams<T> {
    fn map<'a, U>(&'a self, f: &mut impl FnMut(&'a T) -> U) -> LayerParams<U> {
        LayerParams {
            attn_pre_norm: f(&self.attn_pre_norm),
            q: f(&self.q),
            k: self.k.as_ref().map(&mut *f),
            v: self.v.as_ref().map(&mut *f),
            o: f(&self.o),
            q_norm: self.q_norm.as_ref().map(&mut *f),
            k_norm: self.k_norm.as_ref().map(&mut *f),
            attn_post_norm: self.attn_post_norm.as_ref().map(&mut *f),
            mlp_pre_norm: f(&self.mlp_pre_norm),
            gate: f(&self.gate),
            up: f(&self.up),
            down: f(&self.down),
            mlp_post_norm: self.mlp_post_norm.as_ref().map(&mut *f),
            experts: self.experts.as_ref().map(|experts| experts.map(f)),
            input: self.input.as_ref().map(|input| InputParams {
                gate: f(&input.gate),
                projection: f(&input.projection),
                post_norm: f(&input.post_norm),
            }),
            adapters: self
                .adapters
                .each_ref()
                .map(|adapter| adapter.as_ref().map(|Adapter { a, b }| Adapter { a: f(a), b: f(b) })),
        }
    }

    /// The weight of a linear map that adapters are for, if the layer has it.
    pub fn weight(&self, map: Linear) -> Option<&T> {
        match map {
            Linear::Q => Some(&self.q),
            Linear::K => self.k.as_ref(),
            Linear::V => self.v.as_ref(),
            Linear::O => Some(&self.o),
            Linear::Gate => Some(&self.gate),
            Linear::Up => Some(&self.up),
            Linear::Down => Some(&self.down),
        }
    }

    /// The same, to be changed.
    pub fn weight_mut(&mut self, map: Linear) -> Option<&mut T> {
        match map {
            Linear::Q => Some(&mut self.q),
            Linear::K => self.k.as_mut(),
            Linear::V => self.v.as_mut(),
            Linear::O => Some(&mut self.o),
            Linear::Gate => Some(&mut self.gate),
            Linear::Up => Some(&mut self.up),
            Linear::Down => Some(&mut self.down),
        }
    }

    fn push_mut<'a>(&'a mut self, all: &mut Vec<&'a mut T>) {
        all.extend([&mut self.attn_pre_norm, &mut self.q]);
        all.extend([&mut self.k, &mut self.v].into_iter().flatten());
        all.push(&mut self.o);
        all.extend([&mut self.q_norm, &mut self.k_norm, &mut self.attn_post_norm].into_iter().flatten());
        all.extend([&mut self.mlp_pre_norm, &mut self.gate, &mut self.up, &mut self.down]);
        all.extend(&mut self.mlp_post_norm);
        if let Some(experts) = &mut self.experts {
            experts.push_mut(all);
        }
        if let Some(input) = &mut self.input {
            all.extend([&mut input.gate, &mut input.projection, &mut input.post_norm]);
        }
        all.extend(self.adapters.iter_mut().flatten().flat_map(|adapter| [&mut adapter.a, &mut adapter.b]));
    }
}

/// What a parameter is; weight decay is customarily for matrices only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParamKind {
    /// A linear map's weight or the embedding, `[rows, cols]`.
    Matrix,
    /// A linear map's weight for each of so many experts, `[rows, cols]` here and `[experts, rows / experts, cols]` in files.
    Stack(usize),
    /// A matrix of a low-rank adapter, `[rows, cols]`.
    Adapter,
    /// The score head's weight, `[1, cols]`: a linear map, which is kept as precisely as vectors are.
    Head,
    /// An RMSNorm's weight or other factors, `[1, cols]` here and `[cols]` in files.
    Vector,
}

/// One line of the model's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Its name in Transformers.
    pub name: String,
    /// Matrix or vector.
    pub kind: ParamKind,
    /// Rows; 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl ParamSpec {
    /// Dimensions in files.
    pub fn shape(&self) -> Vec<usize> {
        match self.kind {
            ParamKind::Matrix | ParamKind::Adapter | ParamKind::Head => vec![self.rows, self.cols],
            ParamKind::Stack(experts) => vec![experts, self.rows / experts, self.cols],
            ParamKind::Vector => vec![self.cols],
        }
    }

    /// Whether rows of it are looked up: the token embedding, which is the LM head as well unless the model has another, and the
    /// layers' own embeddings.
    pub fn is_embedding(&self) -> bool {
        self.name == EMBED || self.is_per_layer_embed()
    }

    /// Whether it is the layers' own embeddings, which no product reads.
    pub fn is_per_layer_embed(&self) -> bool {
        self.name == PER_LAYER_EMBED
    }
}

const EMBED: &str = "model.embed_tokens.weight";
/// The score head, which is none of a text model's.
pub const SCORE: &str = "score.weight";
/// The layers' own embeddings.
const PER_LAYER_EMBED: &str = "model.embed_tokens_per_layer.weight";
/// The LM head where it is not the embedding; some tools save the tied one a second time.
pub const LM_HEAD: &str = "lm_head.weight";
/// How the names of tensors end that Transformers computes from config.json: some tools save them, and no reader needs
/// them.
const BUFFERS: [&str; 5] = ["inv_freq", ".embed_scale", ".position_ids", ".causal_mask", ".masked_bias"];
/// What names of quantised weights contain.
const QUANTISED: [&str; 8] =
    [".qweight", ".weight_scale", ".weight_packed", ".absmax", ".quant_map", ".SCB", ".scales", ".qzeros"];
/// Most lines of a [`LoadError`].
const MAX_LISTED: usize = 12;

/// How a vision-and-text checkpoint names the tensors of its text model: what stands where a text model has `model.`, and
/// its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextNames {
    body: &'static str,
    head: &'static str,
}

impl TextNames {
    const BODY: &'static str = "model.";
    /// In the order of Transformers' versions: since 5, and before (as Gemma 3 was published).
    pub(crate) const KNOWN: [Self; 2] = [
        Self { body: "model.language_model.", head: LM_HEAD },
        Self { body: "language_model.model.", head: "language_model.lm_head.weight" },
    ];

    /// The naming of a checkpoint, if it is one of these.
    pub fn of(checkpoint: &Checkpoint) -> Option<Self> {
        Self::KNOWN.into_iter().find(|names| checkpoint.names().any(|name| name.starts_with(names.body)))
    }

    /// A text model's name of a stored tensor; `None` for those of other parts.
    pub fn inner(&self, stored: &str) -> Option<String> {
        if stored == self.head {
            return Some(LM_HEAD.to_owned());
        }
        if stored == SCORE {
            return Some(SCORE.to_owned());
        }
        Some(format!("{}{}", Self::BODY, stored.strip_prefix(self.body)?))
    }

    /// The stored name of a text model's tensor.
    pub fn outer(&self, name: &str) -> String {
        name.strip_prefix(Self::BODY).map_or(name.to_owned(), |rest| format!("{}{rest}", self.body))
    }
}

/// The tensors that this model has, without adapters: nothing more and nothing less.
pub fn plan(config: &GemmaConfig) -> Params<ParamSpec> {
    let d = config.hidden_size;
    let matrix = |name: String, rows, cols| ParamSpec { name, kind: ParamKind::Matrix, rows, cols };
    let norm = |name: String, cols| ParamSpec { name, kind: ParamKind::Vector, rows: 1, cols };
    let stack =
        |name: String, n, rows, cols| ParamSpec { name, kind: ParamKind::Stack(n), rows: n * rows, cols };
    let sandwich = config.norms == NormPlacement::Sandwich;
    let (p, per_layer) = (config.per_layer_width, config.per_layer_width != 0);
    let layer = |(i, spec): (usize, &LayerSpec)| {
        let LayerShape { head_dim: head, intermediate: f, .. } = spec.shape;
        let (q, kv) = (spec.shape.q_width(), spec.shape.kv_width());
        let bare = |part: &str| format!("model.layers.{i}.{part}");
        let name = |part: &str| format!("{}.weight", bare(part));
        let own_kv = spec.kv_from.is_none();
        LayerParams {
            attn_pre_norm: norm(name("input_layernorm"), d),
            q: matrix(name("self_attn.q_proj"), q, d),
            k: own_kv.then(|| matrix(name("self_attn.k_proj"), kv, d)),
            v: (own_kv && !spec.keys_are_values).then(|| matrix(name("self_attn.v_proj"), kv, d)),
            o: matrix(name("self_attn.o_proj"), d, q),
            q_norm: config.qk_norm.then(|| norm(name("self_attn.q_norm"), head)),
            k_norm: (own_kv && config.qk_norm).then(|| norm(name("self_attn.k_norm"), head)),
            // Transformers calls by one name what stands after attention in Gemma 2 and before the MLP in Gemma 1.
            attn_post_norm: sandwich.then(|| norm(name("post_attention_layernorm"), d)),
            mlp_pre_norm: norm(name(config.mlp_pre_norm), d),
            gate: matrix(name("mlp.gate_proj"), f, d),
            up: matrix(name("mlp.up_proj"), f, d),
            down: matrix(name("mlp.down_proj"), d, f),
            mlp_post_norm: sandwich.then(|| norm(name("post_feedforward_layernorm"), d)),
            experts: config.experts.map(|ExpertShape { count, width, .. }| ExpertParams {
                router_norm: norm(bare("router.scale"), d),
                router: matrix(name("router.proj"), count, d),
                factors: norm(bare("router.per_expert_scale"), count),
                pre_norm: norm(name("pre_feedforward_layernorm_2"), d),
                gate_up: stack(bare("experts.gate_up_proj"), count, 2 * width, d),
                down: stack(bare("experts.down_proj"), count, d, width),
                mlp_norm: norm(name("post_feedforward_layernorm_1"), d),
                post_norm: norm(name("post_feedforward_layernorm_2"), d),
            }),
            input: per_layer.then(|| InputParams {
                gate: matrix(name("per_layer_input_gate"), p, d),
                projection: matrix(name("per_layer_projection"), d, p),
                post_norm: norm(name("post_per_layer_input_norm"), d),
            }),
            adapters: Default::default(),
        }
    };
    let name = |part: &str| format!("model.{part}.weight");
    Params {
        embed: matrix(EMBED.to_owned(), config.vocab_size, d),
        per_layer_embed: (per_layer && config.trains_per_layer_embed)
            .then(|| matrix(PER_LAYER_EMBED.to_owned(), config.vocab_size, config.per_layer_columns())),
        per_layer: per_layer
            .then(|| matrix(name("per_layer_model_projection"), config.per_layer_columns(), d)),
        per_layer_norm: per_layer.then(|| norm(name("per_layer_projection_norm"), p)),
        layers: config.layers.iter().enumerate().map(layer).collect(),
        final_norm: norm("model.norm.weight".to_owned(), d),
        head: config.has_own_head().then(|| matrix(LM_HEAD.to_owned(), config.vocab_size, d)),
        score: config.score_head.then(|| ParamSpec {
            name: SCORE.to_owned(),
            kind: ParamKind::Head,
            rows: 1,
            cols: d,
        }),
    }
}

/// What the model reads and training leaves as it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Frozen<T> {
    /// What the output of each layer is multiplied by, residual stream included: numbers of the checkpoint in Gemma 4, 1
    /// elsewhere.
    pub scalars: Vec<f32>,
    /// `[V, L P]`: the layers' own embeddings (Gemma 4 E2B, E4B), looked up and never multiplied; none where they are among the
    /// parameters.
    pub per_layer_embed: Option<T>,
}

/// The tensors of [`Frozen`], layer scalars first, each with its dimensions in files.
pub fn frozen(config: &GemmaConfig) -> Vec<(String, Vec<usize>)> {
    let layers = 0..if config.layer_scalars { config.layers.len() } else { 0 };
    let scalars = layers.map(|i| (format!("model.layers.{i}.layer_scalar"), vec![1]));
    let table = (PER_LAYER_EMBED.to_owned(), vec![config.vocab_size, config.per_layer_columns()]);
    let is_frozen = config.per_layer_width != 0 && !config.trains_per_layer_embed;
    scalars.chain(is_frozen.then_some(table)).collect()
}

/// Tensors that checkpoints may have and nobody reads: of layers that read another's keys and values, and the LM head of a
/// model that becomes a reward model.
fn unread(config: &GemmaConfig) -> impl Iterator<Item = String> {
    let head = (!config.tied && config.score_head).then(|| LM_HEAD.to_owned());
    let sharing = config.layers.iter().enumerate().filter(|(_, layer)| layer.kv_from.is_some());
    let names =
        |i| ["k_proj", "v_proj", "k_norm"].map(|part| format!("model.layers.{i}.self_attn.{part}.weight"));
    sharing.flat_map(move |(i, _)| names(i)).chain(head)
}

/// One way in which a checkpoint is not the model's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mismatch {
    /// The model needs it.
    Missing {
        /// Tensor.
        name: String,
        /// Its shape in the model.
        expected: Vec<usize>,
    },
    /// The model has no such tensor.
    Extra {
        /// Tensor.
        name: String,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// Another shape than config.json implies.
    Shape {
        /// Tensor.
        name: String,
        /// Its shape in the model.
        expected: Vec<usize>,
        /// Its shape in the file.
        found: Vec<usize>,
    },
    /// A storage type that the engine does not load.
    DType {
        /// Tensor.
        name: String,
        /// Its type in the file.
        found: Dtype,
    },
    /// `lm_head.weight` is there and is not the embedding.
    UntiedHead,
}

impl Mismatch {
    /// The tensor.
    fn name(&self) -> &str {
        match self {
            Self::Missing { name, .. }
            | Self::Extra { name, .. }
            | Self::Shape { name, .. }
            | Self::DType { name, .. } => name,
            Self::UntiedHead => LM_HEAD,
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Missing { name, expected } => write!(f, "{name}: missing, expected {expected:?}"),
            Mismatch::Extra { name, found } => write!(f, "{name}: unknown, found {found:?}"),
            Mismatch::Shape { name, expected, found } => {
                write!(f, "{name}: expected {expected:?}, found {found:?}")
            }
            Mismatch::DType { name, found } => {
                write!(f, "{name}: expected F32, BF16 or F16, found {found:?}")
            }
            Mismatch::UntiedHead => {
                write!(
                    f,
                    "{LM_HEAD}: differs from {EMBED}, and {CONFIG_FILE} does not say \"tie_word_embeddings\": false, by which the head \
                     would be a matrix of its own"
                )
            }
        }
    }
}

/// A checkpoint that is not the model that config.json describes: everything that differs, in the model's order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct LoadError {
    /// The first file of the checkpoint.
    pub file: PathBuf,
    /// What all or most of the mismatches come from, where that is known, and what to do.
    pub cause: Option<String>,
    /// Never empty.
    pub mismatches: Vec<Mismatch>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LoadError { file, cause, mismatches } = self;
        if let Some(cause) = cause {
            return write!(f, "{}: {cause}", file.display());
        }
        let count = mismatches.len();
        write!(
            f,
            "{}: not the model of {CONFIG_FILE} beside it; tensors that differ: {count}",
            file.display()
        )?;
        // What differs in many layers is told once.
        let mut groups: Vec<(String, Vec<&Mismatch>)> = Vec::new();
        for mismatch in mismatches {
            let text = any_layer(&mismatch.to_string());
            match groups.iter_mut().find(|(known, _)| *known == text) {
                Some((_, group)) => group.push(mismatch),
                None => groups.push((text, vec![mismatch])),
            }
        }
        for (text, group) in groups.iter().take(MAX_LISTED) {
            match group[..] {
                [one] => write!(f, "\n  {one}")?,
                _ => write!(f, "\n  {text} (in {} layers)", group.len())?,
            }
        }
        match groups.len().saturating_sub(MAX_LISTED) {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}

/// A tensor's name, or a text that begins with one, with `*` for the number of its layer.
fn any_layer(name: &str) -> String {
    match layer_of(name) {
        Some((_, number)) => name.replacen(&format!("layers.{number}."), "layers.*.", 1),
        None => name.to_owned(),
    }
}

/// What stands before the number of a tensor's layer in its name, and the number.
fn layer_of(name: &str) -> Option<(&str, usize)> {
    let (before, rest) = name.split_once("layers.")?;
    Some((before, rest.split('.').next()?.parse().ok()?))
}

/// What most of the mismatches come from: another naming, another number of layers, another width.
fn cause(
    plan: &Params<ParamSpec>,
    frozen: &[(String, Vec<usize>)],
    mismatches: &[Mismatch],
) -> Option<String> {
    let mut missing: Vec<&str> = Vec::new();
    let mut extra: Vec<&str> = Vec::new();
    for mismatch in mismatches {
        match mismatch {
            Mismatch::Missing { name, .. } => missing.push(name),
            Mismatch::Extra { name, .. } => extra.push(name),
            _ => {}
        }
    }
    if let Some(name) = extra.iter().find(|name| name.contains("lora_") || name.contains(".base_layer.")) {
        return Some(format!(
            "tensor {name} is a LoRA adapter's; merge the adapter into its base model first (PEFT's merge_and_unload) and \
             give the merged model's directory"
        ));
    }
    if extra.contains(&SCORE) {
        return Some(format!(
            "tensor {SCORE} is the head of a sequence classifier, and {CONFIG_FILE} beside it does not name one in its \
             architectures: take both from the same model"
        ));
    }
    if let Some(Mismatch::Shape { found, .. }) = mismatches.iter().find(|mismatch| mismatch.name() == SCORE) {
        let labels = found.first().copied().unwrap_or(0);
        return Some(format!("{SCORE} is a classifier's of {labels} labels; a reward model has one"));
    }
    if let Some(name) = extra.iter().find(|name| QUANTISED.iter().any(|part| name.contains(part))) {
        return Some(format!(
            "tensor {name} is of quantised weights; save the model in bfloat16 or float32 first"
        ));
    }
    if let Some((own, other)) = renaming(&missing, &extra) {
        let inside =
            other.contains("language_model") || extra.iter().any(|name| name.contains("vision_tower"));
        let what = match inside {
            true => {
                "the language model inside a vision-and-text checkpoint, and config.json beside it describes a text model \
                     alone: take that of the same checkpoint, or save the language model once more"
            }
            false => "another layout than Transformers' text models have; save the model once more",
        };
        let names = match (own, other) {
            ("", other) => format!("have the prefix `{other}`"),
            (own, "") => format!("lack the prefix `{own}`"),
            (own, other) => format!("begin with `{other}` where `{own}` is expected"),
        };
        return Some(format!(
            "the names of its tensors {names}: this is {what} with Transformers' save_pretrained, or rename the tensors"
        ));
    }
    if missing.len() == plan.tensors().len() + frozen.len() {
        let first = extra.first().map_or(String::new(), |name| format!(", and it has {name}"));
        return Some(format!(
            "none of the model's {} tensors is in it{first}: not a Gemma with Transformers' names; convert it to \
             Hugging Face's layout first",
            missing.len()
        ));
    }
    if let Mismatch::Shape { expected, found, .. } = &mismatches[0]
        && mismatches[0].name() == EMBED
        && expected.last() != found.last()
    {
        return Some(format!(
            "the embedding is {found:?}, and {CONFIG_FILE} beside it describes a model with {expected:?}: take both from \
             the same model"
        ));
    }
    // Whole layers at the end, and nothing else.
    let layers = plan.layers.len();
    let numbers = |names: &[&str]| -> Option<Vec<usize>> {
        names.iter().map(|name| layer_of(name).map(|(_, number)| number)).collect()
    };
    let stored = if extra.len() == mismatches.len() {
        let numbers = numbers(&extra)?;
        numbers.iter().all(|&number| number >= layers).then(|| numbers.into_iter().max())?? + 1
    } else if missing.len() == mismatches.len() {
        let first = numbers(&missing)?.into_iter().min()?;
        let names =
            plan.tensors().into_iter().map(|spec| &spec.name).chain(frozen.iter().map(|(name, _)| name));
        let behind = names.filter(|name| layer_of(name).is_some_and(|(_, number)| number >= first));
        (missing.len() == behind.count()).then_some(first)?
    } else {
        return None;
    };
    Some(format!(
        "it has {stored} layers, and {CONFIG_FILE} beside it has num_hidden_layers = {layers}: take both from the same \
         model"
    ))
}

/// The beginnings of names in the model and in the checkpoint, if one in the place of the other explains most of what is
/// missing.
fn renaming<'a>(missing: &[&'a str], extra: &[&'a str]) -> Option<(&'a str, &'a str)> {
    let known: BTreeSet<&str> = extra.iter().copied().collect();
    let &sample = missing.iter().find(|name| layer_of(name).is_some())?;
    let begins = sample
        .match_indices('.')
        .map(|(dot, _)| dot + 1)
        .take_while(|&b| b <= sample.find("layers.").unwrap_or(0));
    std::iter::once(0).chain(begins).find_map(|begin| {
        let (own, rest) = sample.split_at(begin);
        let theirs = extra.iter().filter_map(|name| name.strip_suffix(rest));
        theirs.filter(|other| other.is_empty() || other.ends_with('.')).find_map(|other| {
            let explained = missing.iter().filter(|name| {
                name.strip_prefix(own).is_some_and(|rest| known.contains(format!("{other}{rest}").as_str()))
            });
            let explained = explained.count();
            (explained > 2 && explained * 2 > missing.len()).then_some((own, other))
        })
    })
}

/// Compares a checkpoint with what the model has.
pub fn check(config: &GemmaConfig, checkpoint: &Checkpoint) -> Result<(), LoadError> {
    let plan = &plan(config);
    let frozen = frozen(config);
    let mut mismatches = Vec::new();
    let unread: Vec<String> = unread(config).collect();
    let mut known: BTreeSet<&str> = unread.iter().map(String::as_str).collect();
    let params = plan.tensors().into_iter().map(|spec| (&spec.name, spec.shape(), Some(spec)));
    for (name, expected, spec) in params.chain(frozen.iter().map(|(name, shape)| (name, shape.clone(), None)))
    {
        known.insert(name.as_str());
        let name = name.clone();
        match checkpoint.tensor(&name) {
            None => mismatches.push(Mismatch::Missing { name, expected }),
            Some(t) if !fits(t, &expected, spec) => {
                mismatches.push(Mismatch::Shape { name, expected, found: t.shape.to_vec() });
            }
            Some(t) if !matches!(t.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) => {
                mismatches.push(Mismatch::DType { name, found: t.dtype });
            }
            Some(_) => {}
        }
    }
    let embed = checkpoint.tensor(EMBED).and_then(|t| used(t, &plan.embed));
    for name in checkpoint.names().filter(|name| !known.contains(name)) {
        let found = checkpoint.tensor(name).expect("it names its tensors");
        if name == LM_HEAD {
            let head = used(found, &plan.embed);
            if !embed.zip(head).is_some_and(|(embed, head)| same_values(embed, head)) {
                mismatches.push(Mismatch::UntiedHead);
            }
        } else if !BUFFERS.iter().any(|end| name.ends_with(end)) {
            mismatches.push(Mismatch::Extra { name: name.to_owned(), found: found.shape.to_vec() });
        }
    }
    if mismatches.is_empty() {
        return Ok(());
    }
    let file = checkpoint.files().next().map(|(path, _)| path.to_owned()).unwrap_or_default();
    Err(LoadError { file, cause: cause(plan, &frozen, &mismatches), mismatches })
}

/// Whether a stored tensor holds what the model expects: a parameter, or what it reads beside them.
fn fits(stored: TensorView, expected: &[usize], spec: Option<&ParamSpec>) -> bool {
    match (spec, expected) {
        (Some(spec), _) => used(stored, spec).is_some(),
        (None, &[rows, cols]) => stored.shape.last() == Some(&cols) && first_rows(stored, rows).is_some(),
        (None, _) => stored.shape == expected,
    }
}

/// The first rows of a stored matrix that has few more: tools pad the rows of embeddings.
fn first_rows(stored: TensorView<'_>, rows: usize) -> Option<TensorView<'_>> {
    let &[all, _] = stored.shape else { return None };
    let spare = all.checked_sub(rows).filter(|&spare| spare <= MAX_SPARE_ROWS)?;
    let bytes = &stored.bytes[..stored.bytes.len() / (rows + spare) * rows];
    Some(TensorView { bytes, ..stored })
}

/// A stored tensor as far as the model has it: tools pad the rows of embeddings, and no token of the model's vocabulary is
/// in those. `None` where the shapes differ otherwise.
fn used<'a>(stored: TensorView<'a>, spec: &ParamSpec) -> Option<TensorView<'a>> {
    if stored.shape == spec.shape() {
        return Some(stored);
    }
    let embedding = (spec.is_embedding() || spec.name == LM_HEAD) && stored.shape.last() == Some(&spec.cols);
    embedding.then(|| first_rows(stored, spec.rows)).flatten()
}

/// Whether two tensors of one shape hold the same numbers, as far as the narrower type can tell.
fn same_values(a: TensorView, b: TensorView) -> bool {
    let size = |dtype| match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    };
    let (Some(of_a), Some(of_b)) = (size(a.dtype), size(b.dtype)) else { return false };
    let read = |dtype, bytes: &[u8]| match (dtype, bytes) {
        (Dtype::F16, &[low, high]) => f16::from_le_bytes([low, high]).to_f32(),
        (_, &[low, high]) => bf16::from_le_bytes([low, high]).to_f32(),
        (_, bytes) => f32::from_le_bytes(bytes.try_into().expect("4 bytes")),
    };
    let round = |dtype, x: f32| match dtype {
        Dtype::F16 => f16::from_f32(x).to_f32(),
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    };
    let mut pairs = a.bytes.chunks_exact(of_a).zip(b.bytes.chunks_exact(of_b));
    pairs.all(|(x, y)| round(b.dtype, read(a.dtype, x)) == round(a.dtype, read(b.dtype, y)))
}

/// Loads all parameters, in `dtype` or, with `None`, as stored (f16 as f32, which holds it exactly).
pub fn load<B: Backend>(
    backend: &B,
    config: &GemmaConfig,
    checkpoint: &Checkpoint,
    dtype: Option<DType>,
) -> Result<Params<B::Tensor>, LoadError> {
    check(config, checkpoint)?;
    Ok(plan(config).map(|spec| {
        let stored = checkpoint.tensor(&spec.name).and_then(|t| used(t, spec)).expect("checked");
        let (dtype, bytes) = convert(stored, dtype);
        match spec.is_per_layer_embed() {
            true => backend.upload(dtype, spec.rows, spec.cols, &bytes),
            false => backend.upload_weight(dtype, spec.rows, spec.cols, &bytes),
        }
    }))
}

/// Loads what training leaves as it is, in `dtype` or, with `None`, as the embedding is stored; per-layer embeddings, if so
/// wanted, to the host's memory. Panics unless [`load`] has taken the checkpoint: to check it again would compare a stored head
/// with the embedding again.
pub fn load_frozen<B: Backend>(
    backend: &B,
    config: &GemmaConfig,
    checkpoint: &Checkpoint,
    dtype: Option<DType>,
    on_host: bool,
) -> Frozen<B::Tensor> {
    let dtype = dtype.or(stored_dtype(checkpoint)).expect("checked");
    let mut all = Frozen { scalars: vec![1.0; config.layers.len()], per_layer_embed: None };
    for (i, (name, shape)) in frozen(config).into_iter().enumerate() {
        let stored = checkpoint.tensor(&name).expect("checked");
        match shape[..] {
            [rows, cols] => {
                let used = first_rows(stored, rows).expect("checked");
                let (dtype, bytes) = convert(used, Some(dtype));
                // What needs no conversion may stay where it is.
                let in_file = match &bytes {
                    Cow::Borrowed(bytes) => checkpoint.mapped(&name).map(|file| file.first(bytes.len())),
                    Cow::Owned(_) => None,
                };
                all.per_layer_embed = Some(match on_host {
                    true => backend.upload_to_host(dtype, rows, cols, &bytes, in_file),
                    false => backend.upload(dtype, rows, cols, &bytes),
                });
            }
            _ => {
                let (_, bytes) = convert(stored, Some(DType::F32));
                let scalar: f32 = bytemuck::pod_read_unaligned(&bytes);
                // Transformers rounds them with the weights.
                all.scalars[i] = match dtype {
                    DType::F32 => scalar,
                    DType::Bf16 => bf16::from_f32(scalar).to_f32(),
                };
            }
        }
    }
    all
}

/// A parameter's elements in f32, where the checkpoint has them in more than bf16.
pub fn wider_than_bf16<'a>(checkpoint: &'a Checkpoint, spec: &ParamSpec) -> Option<Cow<'a, [u8]>> {
    let stored = used(checkpoint.tensor(&spec.name)?, spec)?;
    let wider = matches!(stored.dtype, Dtype::F32 | Dtype::F16);
    wider.then(|| convert(stored, Some(DType::F32)).1)
}

/// What [`load`] stores the largest matrix in if it is told no type: that of the embedding.
pub fn stored_dtype(checkpoint: &Checkpoint) -> Option<DType> {
    Some(as_stored(checkpoint.tensor(EMBED)?))
}

/// f16 as f32, which holds it exactly.
fn as_stored(stored: TensorView<'_>) -> DType {
    if stored.dtype == Dtype::BF16 { DType::Bf16 } else { DType::F32 }
}

/// A tensor's elements in `dtype` (or as stored), rounded to nearest even where that is narrower.
pub fn convert(stored: TensorView<'_>, dtype: Option<DType>) -> (DType, Cow<'_, [u8]>) {
    let bytes = stored.bytes;
    let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
    let dtype = dtype.unwrap_or(as_stored(stored));
    let converted: Vec<u8> = match (stored.dtype, dtype) {
        (Dtype::F32, DType::F32) | (Dtype::BF16, DType::Bf16) => return (dtype, bytes.into()),
        (Dtype::BF16, DType::F32) => {
            pairs().flat_map(|b| bf16::from_le_bytes(b).to_f32().to_le_bytes()).collect()
        }
        (Dtype::F16, DType::F32) => {
            pairs().flat_map(|b| f16::from_le_bytes(b).to_f32().to_le_bytes()).collect()
        }
        (Dtype::F16, DType::Bf16) => {
            pairs().flat_map(|b| bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_le_bytes()).collect()
        }
        (Dtype::F32, DType::Bf16) => bytes
            .chunks_exact(4)
            .flat_map(|b| bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).to_le_bytes())
            .collect(),
        (other, _) => unreachable!("`check` refuses {other:?}"),
    };
    (dtype, converted.into())
}

/// CRC-32C over the weights' bytes as the backend stores them, tensor by tensor in the plan's order: the same for the
/// same weights, wherever they came from and whichever of them are trained.
pub fn checksum<B: Backend>(backend: &B, params: &Params<B::Tensor>, frozen: &Frozen<B::Tensor>) -> u32 {
    let mut all = params.map(|tensor| tensor);
    all.per_layer_embed = all.per_layer_embed.or(frozen.per_layer_embed.as_ref());
    all.tensors().into_iter().fold(0, |crc, tensor| crc32c::crc32c_append(crc, &backend.bytes(tensor)))
}
