//! `GemmaConfig`: every Gemma variant as data. The model code asks this table and never the family's name.
//!
//! [`ConfigFile`] reads it from a Hugging Face directory, in all spellings that Transformers 4 and 5 have written.
//! Absent fields mean what they mean to Transformers; whatever would make the engine compute something else than
//! Transformers does is an error.

mod families;
mod fields;
mod file;
mod layers;
mod rope;
mod text;

use crate::backend::{DType, NormSpec, RopeSpec, Routing};
pub use fields::ConfigError;
pub use file::{CONFIG_FILE, ConfigFile, GENERATION_CONFIG_FILE};

/// Transformers' names of the two kinds of layers.
const LOCAL: &str = "sliding_attention";
const GLOBAL: &str = "full_attention";

/// Rows by which an embedding may exceed the tokenizer's vocabulary: Gemma 3's are padded to a multiple of 64, and
/// other tools pad to up to 1024. Another Gemma's vocabulary differs by thousands.
pub const MAX_SPARE_ROWS: usize = 1023;

/// The widths of one decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// H, query heads.
    pub heads: usize,
    /// K, key/value heads; divides H.
    pub kv_heads: usize,
    /// Dh, the width of a head; independent of D / H.
    pub head_dim: usize,
    /// F, the MLP's inner width.
    pub intermediate: usize,
}

impl LayerShape {
    /// Width of all query heads, H Dh.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads, K Dh.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The experts beside the MLP of every layer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertShape {
    /// E.
    pub count: usize,
    /// G, the experts of each token.
    pub per_token: usize,
    /// Fe, the inner width of each.
    pub width: usize,
}

/// One decoder layer's share of the differences between Gemma variants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSpec {
    /// Its widths.
    pub shape: LayerShape,
    /// Sliding window in tokens, the query's own included; `None` attends to everything before it.
    pub window: Option<usize>,
    /// Its rotary embedding.
    pub rope: RopeSpec,
    /// Whether values are the keys before their norm and RoPE, so that there is no projection of values (global layers of
    /// the larger Gemma 4).
    pub keys_are_values: bool,
    /// The layer whose keys and values it reads, a former one of the same kind; `None`: it has its own (the last layers of
    /// Gemma 4 E2B and E4B have not).
    pub kv_from: Option<usize>,
}

/// Where a layer puts its norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// Gemma 1, VaultGemma: one norm before attention, one before the MLP.
    Pre,
    /// Gemma 2 to 4: one before and one after each.
    Sandwich,
}

/// Everything the engine knows of a model's shape.
#[derive(Debug, Clone, PartialEq)]
pub struct GemmaConfig {
    /// Transformers' `model_type` of the text model, such as `gemma3_text`. For messages only.
    pub model_type: String,
    /// V.
    pub vocab_size: usize,
    /// D, the model width.
    pub hidden_size: usize,
    /// One entry per decoder layer; not empty.
    pub layers: Vec<LayerSpec>,
    /// Every RMSNorm.
    pub norm: NormSpec,
    /// Factor on q . k: `head_dim^-1/2` (Gemma 1), `query_pre_attn_scalar^-1/2`, or 1 (Gemma 4).
    pub attention_scale: f32,
    /// Attention scores become `c tanh(s / c)` (Gemma 2, VaultGemma).
    pub attention_softcap: Option<f32>,
    /// Final logits become `c tanh(l / c)` (Gemma 2 and 4, VaultGemma).
    pub final_softcap: Option<f32>,
    /// Placement of norms.
    pub norms: NormPlacement,
    /// Transformers' name of the norm before the MLP, in each layer.
    pub mlp_pre_norm: &'static str,
    /// RMSNorm of every q and k head (Gemma 3 and 4).
    pub qk_norm: bool,
    /// RMSNorm of every v head, without a weight (Gemma 4).
    pub value_norm: bool,
    /// Whether what leaves a layer is multiplied by a number that the checkpoint holds (Gemma 4).
    pub layer_scalars: bool,
    /// P, the width of the embeddings that each layer has of its own; 0: they have none (all but Gemma 4 E2B and E4B).
    pub per_layer_width: usize,
    /// Whether these embeddings are parameters: a choice of who trains the model, of which config.json says nothing.
    pub trains_per_layer_embed: bool,
    /// A mixture of experts (Gemma 4 26B-A4B).
    pub experts: Option<ExpertShape>,
    /// Context length in tokens.
    pub max_positions: usize,
    /// Tokens that end a response, from config.json and generation_config.json.
    pub eos_tokens: Vec<u32>,
    /// Beginning-of-sequence token; mandatory for Gemma.
    pub bos_token: u32,
    /// Whether the LM head is the embedding, as in all Gemmas that were published.
    pub tied: bool,
    /// Whether it is a reward model, which has a row of weights for a response's score beside the rest.
    pub score_head: bool,
}

impl GemmaConfig {
    /// Whether it has an LM head that is not the embedding; a reward model has no LM head.
    pub fn has_own_head(&self) -> bool {
        !self.tied && !self.score_head
    }

    /// Factor on embeddings: sqrt(D), rounded to the dtype of the weights as Transformers does.
    pub fn embed_scale(&self, weights: DType) -> f32 {
        embed_scale(self.hidden_size, weights)
    }

    /// The same of the layers' own embeddings: sqrt(P).
    pub fn per_layer_scale(&self, weights: DType) -> f32 {
        embed_scale(self.per_layer_width, weights)
    }

    /// Columns of the layers' own embeddings, L P.
    pub fn per_layer_columns(&self) -> usize {
        self.layers.len() * self.per_layer_width
    }

    /// How tokens are sent to experts, where the model has some: scores are scaled by D^-1/2.
    pub fn routing(&self) -> Option<Routing> {
        let scale = (self.hidden_size as f64).powf(-0.5) as f32;
        self.experts.map(|shape| Routing { experts: shape.count, top: shape.per_token, scale })
    }

    /// The first of the last layers that read the keys and values of others; the number of layers if there are none.
    pub fn first_sharing(&self) -> usize {
        let own = self.layers.iter().rposition(|layer| layer.kv_from.is_none());
        own.map_or(0, |last| last + 1)
    }

    /// The last layer with keys and values of its own, where others come behind it that have none: of a token that predicts
    /// nothing nobody reads more of that layer than its keys and values, and nothing of the others.
    pub fn narrowing(&self) -> Option<usize> {
        let first = self.first_sharing();
        first.checked_sub(1).filter(|_| first < self.layers.len())
    }

    /// Whether a later layer reads the keys and values of layer `l`.
    pub fn is_read(&self, l: usize) -> bool {
        self.layers.iter().any(|layer| layer.kv_from == Some(l))
    }
}

fn embed_scale(width: usize, weights: DType) -> f32 {
    let scale = (width as f64).sqrt() as f32;
    match weights {
        DType::F32 => scale,
        DType::Bf16 => half::bf16::from_f32(scale).to_f32(),
    }
}
