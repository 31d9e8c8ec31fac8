//! `GemmaConfig`: every Gemma variant as data. The model code asks this table and never the family's name.
//!
//! [`ConfigFile`] reads it from a Hugging Face directory, in all spellings that Transformers 4 and 5 have written.
//! Absent fields mean what they mean to Transformers; whatever would make the engine compute something else than
//! Transformers does is an error.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::backend::{DType, NormSpec, RopeSpec, Routing};
use crate::checkpoint::{FileError, read_file};

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
    /// A mixture of experts (Gemma 4 26B-A4B).
    pub experts: Option<ExpertShape>,
    /// Context length in tokens.
    pub max_positions: usize,
    /// Tokens that end a response, from config.json and generation_config.json.
    pub eos_tokens: Vec<u32>,
    /// Beginning-of-sequence token; mandatory for Gemma.
    pub bos_token: u32,
    /// Whether it is a reward model, which has a row of weights for a response's score beside the rest.
    pub score_head: bool,
}

impl GemmaConfig {
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

/// The model's shape, in a Hugging Face directory.
pub const CONFIG_FILE: &str = "config.json";
/// Further end-of-response tokens; optional.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Real files have a few kB.
const MAX_JSON_BYTES: u64 = 1 << 20;
/// Bound on every width, so that no product of sizes overflows 64 bits. The largest Gemma vocabulary is 2^18.
const MAX_WIDTH: usize = 1 << 22;
/// Bound on the number of experts, for the same reason.
const MAX_EXPERTS: usize = 1 << 12;
/// Bound on the number of layers, for the same reason.
const MAX_LAYERS: usize = 1 << 12;
/// RoPE's sines and cosines are exact for angles up to 2^18, and the first pair's angle is the position. That is the largest
/// Gemma context.
const MAX_POSITIONS: usize = 1 << 18;

/// Rows by which an embedding may exceed the tokenizer's vocabulary: Gemma 3's are padded to a multiple of 64, and
/// other tools pad to up to 1024. Another Gemma's vocabulary differs by thousands.
pub const MAX_SPARE_ROWS: usize = 1023;

/// Why a directory's configuration cannot be used. Every message names the file and the field.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not JSON, or not an object.
    #[error("{}: not a JSON object", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// Another architecture.
    #[error("{}: {found} is not a Gemma that the engine runs; it runs {}", path.display(), known_models())]
    NotGemma {
        /// The file.
        path: PathBuf,
        /// The field and its value.
        found: String,
    },
    /// A value that makes no sense.
    #[error("{}: {field}: {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, dotted where nested.
        field: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A value that makes sense to Transformers, but which the engine would silently ignore.
    #[error("{}: {field} = {value} is not supported: {reason}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field, dotted where nested.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What the engine supports.
        reason: &'static str,
    },
}

/// A directory's configuration: the part that the engine understands, and the whole as it was.
#[derive(Debug, Clone, PartialEq)]
pub struct ConfigFile {
    /// What the engine understands.
    pub gemma: GemmaConfig,
    /// Whether `gemma` is the text part of a vision-and-text model, whose other tensors the checkpoint holds as well.
    pub wrapped: bool,
    /// config.json, unchanged, in its own order.
    pub json: Map<String, Value>,
}

impl ConfigFile {
    /// Reads `config.json` and, where there is one, `generation_config.json`.
    pub fn open(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(CONFIG_FILE);
        let json = read_object(&path)?;
        let (mut gemma, wrapped) = parse(&Fields { path: &path, prefix: String::new(), map: &json })?;
        let classifies = classifier(&gemma.model_type, wrapped);
        gemma.score_head = classifies.is_some_and(|name| names_architecture(&json, name));
        let path = dir.join(GENERATION_CONFIG_FILE);
        if std::fs::symlink_metadata(&path).is_ok() {
            let map = read_object(&path)?;
            for id in (Fields { path: &path, prefix: String::new(), map: &map }).tokens(
                "eos_token_id",
                &[],
                gemma.vocab_size,
            )? {
                if !gemma.eos_tokens.contains(&id) {
                    gemma.eos_tokens.push(id);
                }
            }
        }
        if gemma.eos_tokens.is_empty() {
            let problem =
                format!("neither here nor in {GENERATION_CONFIG_FILE}: nothing would end a response");
            return Err(Fields { path: &dir.join(CONFIG_FILE), prefix: String::new(), map: &json }
                .bad("eos_token_id", problem));
        }
        Ok(Self { gemma, wrapped, json })
    }

    /// What config.json says that the weights are stored in, where it says so; f16 is loaded as f32.
    pub fn dtype(&self) -> Option<DType> {
        let name = self.json.get(self.dtype_key())?.as_str()?;
        Some(if name == "bfloat16" { DType::Bf16 } else { DType::F32 })
    }

    /// Transformers 4 writes `torch_dtype`, 5 writes `dtype`; both read the former.
    fn dtype_key(&self) -> &'static str {
        if self.json.contains_key("dtype") { "dtype" } else { "torch_dtype" }
    }

    /// The same model with a score head, as Transformers' class for sequence classification with a single label has it.
    /// `None` in families for which there is no such class.
    pub fn with_score_head(mut self) -> Option<Self> {
        let name = classifier(&self.gemma.model_type, self.wrapped)?;
        self.gemma.score_head = true;
        for (key, value) in [
            ("architectures", json!([name])),
            // What says that there is a single label.
            ("id2label", json!({ "0": "LABEL_0" })),
            ("label2id", json!({ "LABEL_0": 0 })),
        ] {
            self.json.insert(key.to_owned(), value);
        }
        self.json.remove("num_labels");
        Some(self)
    }

    /// config.json as it was, except that it names `dtype`.
    pub fn to_json(&self, dtype: DType) -> String {
        let mut json = self.json.clone();
        let name = match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
        };
        let key = self.dtype_key();
        json.insert(key.to_owned(), name.into());
        if let (true, Some(Value::Object(text))) = (self.wrapped, json.get_mut(TEXT_CONFIG)) {
            for key in ["dtype", "torch_dtype"] {
                if let Some(said) = text.get_mut(key) {
                    *said = name.into();
                }
            }
        }
        format!("{:#}\n", Value::Object(json))
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_slice(&read_file(path, MAX_JSON_BYTES)?)
        .map_err(|source| ConfigError::Json { path: path.to_owned(), source })
}

/// What the families' configuration classes differ in (Transformers 5.24, `configuration_*gemma*.py`).
struct Family {
    model_type: &'static str,
    architecture: &'static str,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    max_positions: usize,
    activation: &'static str,
    attention_softcap: Option<f64>,
    final_softcap: Option<f64>,
    /// Local and global layers alternate in this period, the last of each being global; `None`: all global.
    pattern: Option<usize>,
    /// Tokens that a local layer sees.
    window: usize,
    rope: Ropes,
    norms: NormPlacement,
    mlp_pre_norm: &'static str,
    scale: Scale,
    qk_norm: bool,
    /// What Gemma 4 has and the others have not.
    gemma4: Option<Gemma4>,
}

/// Where a family's RoPE is described.
#[derive(Clone, Copy, PartialEq)]
enum Ropes {
    /// One for all layers.
    Uniform,
    /// One for local and one for global layers; Gemma 3's older spellings as well.
    ByType,
    /// One for local and one for global layers, of which the latter turns a quarter of the pairs if nothing is said.
    Proportional,
}

/// What scores are scaled by.
#[derive(Clone, Copy)]
enum Scale {
    /// The heads' width to the power of -1/2.
    HeadDim,
    /// `query_pre_attn_scalar` to the power of -1/2.
    Query,
    /// 1.
    One,
}

/// Parts of Gemma 4 that only some of its models have.
#[derive(Clone, Copy)]
struct Gemma4 {
    /// `hidden_size_per_layer_input` if config.json does not say it; `None`: there is no such setting, and no experts.
    per_layer_width: Option<usize>,
}

const GEMMA_2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    vocab_size: 256_000,
    hidden_size: 2304,
    intermediate_size: 9216,
    layers: 26,
    heads: 8,
    kv_heads: 4,
    max_positions: 8192,
    activation: "hidden_activation",
    attention_softcap: Some(50.0),
    final_softcap: Some(30.0),
    pattern: Some(2),
    window: 4096,
    rope: Ropes::Uniform,
    norms: NormPlacement::Sandwich,
    mlp_pre_norm: "pre_feedforward_layernorm",
    scale: Scale::Query,
    qk_norm: false,
    gemma4: None,
};

const GEMMA_4: Family = Family {
    model_type: "gemma4_text",
    architecture: "Gemma4ForCausalLM",
    vocab_size: 262_144,
    hidden_size: 2304,
    intermediate_size: 9216,
    layers: 30,
    heads: 8,
    kv_heads: 4,
    max_positions: 131_072,
    activation: "hidden_activation",
    attention_softcap: None,
    final_softcap: None,
    pattern: Some(6),
    window: 512,
    rope: Ropes::Proportional,
    norms: NormPlacement::Sandwich,
    mlp_pre_norm: "pre_feedforward_layernorm",
    scale: Scale::One,
    qk_norm: true,
    gemma4: Some(Gemma4 { per_layer_width: Some(256) }),
};

const FAMILIES: [Family; 6] = [
    Family {
        model_type: "gemma",
        architecture: "GemmaForCausalLM",
        vocab_size: 256_000,
        hidden_size: 3072,
        intermediate_size: 24_576,
        layers: 28,
        heads: 16,
        kv_heads: 16,
        max_positions: 8192,
        activation: "hidden_act",
        attention_softcap: None,
        final_softcap: None,
        pattern: None,
        window: 4096,
        rope: Ropes::Uniform,
        norms: NormPlacement::Pre,
        mlp_pre_norm: "post_attention_layernorm",
        scale: Scale::HeadDim,
        qk_norm: false,
        gemma4: None,
    },
    GEMMA_2,
    // Gemma 2 without the norms behind attention and MLP.
    Family {
        model_type: "vaultgemma",
        architecture: "VaultGemmaForCausalLM",
        norms: NormPlacement::Pre,
        ..GEMMA_2
    },
    Family {
        model_type: "gemma3_text",
        architecture: "Gemma3ForCausalLM",
        vocab_size: 262_208,
        hidden_size: 2304,
        intermediate_size: 9216,
        layers: 26,
        heads: 8,
        kv_heads: 4,
        max_positions: 131_072,
        activation: "hidden_activation",
        attention_softcap: None,
        final_softcap: None,
        pattern: Some(6),
        window: 4096,
        rope: Ropes::ByType,
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        scale: Scale::Query,
        qk_norm: true,
        gemma4: None,
    },
    GEMMA_4,
    // The text part of the 12B, whose images and sounds have no towers.
    Family {
        model_type: "gemma4_unified_text",
        architecture: "Gemma4UnifiedForCausalLM",
        max_positions: 262_144,
        window: 1024,
        gemma4: Some(Gemma4 { per_layer_width: None }),
        ..GEMMA_4
    },
];

/// A vision-and-text model around a text model.
struct Wrapper {
    model_type: &'static str,
    architecture: &'static str,
    /// The `model_type` of the text model.
    text: &'static str,
}

const WRAPPERS: [Wrapper; 3] = [
    Wrapper { model_type: "gemma3", architecture: "Gemma3ForConditionalGeneration", text: "gemma3_text" },
    Wrapper { model_type: "gemma4", architecture: "Gemma4ForConditionalGeneration", text: "gemma4_text" },
    Wrapper {
        model_type: "gemma4_unified",
        architecture: "Gemma4UnifiedForConditionalGeneration",
        text: "gemma4_unified_text",
    },
];

/// The text model's configuration within a wrapper's.
const TEXT_CONFIG: &str = "text_config";
/// The share of a head's pairs that RoPE turns.
const SHARE: &str = "partial_rotary_factor";
/// RoPE's settings.
const ROPE: &str = "rope_parameters";
/// Settings of single layers.
const PER_LAYER: &str = "per_layer_config";
const LOCAL: &str = "sliding_attention";
const GLOBAL: &str = "full_attention";

/// What the engine runs, as error messages say it.
fn known_models() -> String {
    let text = FAMILIES.iter().map(|f| format!("{} ({})", f.model_type, f.architecture));
    let wrapped = WRAPPERS.iter().map(|w| format!("the text part of {} ({})", w.model_type, w.architecture));
    text.chain(wrapped).collect::<Vec<_>>().join(", ")
}

/// The configuration, and whether it is that of a wrapper's text part.
fn parse(json: &Fields) -> Result<(GemmaConfig, bool), ConfigError> {
    let model_type = json.map.get("model_type").and_then(Value::as_str);
    let Some(wrapper) = WRAPPERS.iter().find(|w| Some(w.model_type) == model_type) else {
        return Ok((parse_text(json, family(json)?, json)?, false));
    };
    check_architecture(json, wrapper.architecture, classifier(wrapper.text, true))?;
    check_weights(json)?;
    let Some(map) = json.object(TEXT_CONFIG)? else {
        return Err(json.bad(TEXT_CONFIG, "missing; it describes the text model".into()));
    };
    let text = Fields { path: json.path, prefix: TEXT_CONFIG.into(), map };
    let family = match FAMILIES.iter().find(|f| f.model_type == wrapper.text) {
        Some(family) if map.get("model_type").is_none_or(|name| name == family.model_type) => family,
        _ => {
            let found = brief(map.get("model_type").unwrap_or(&Value::Null));
            return Err(text.bad("model_type", format!("expected {:?}, found {found}", wrapper.text)));
        }
    };
    Ok((parse_text(&text, family, json)?, true))
}

/// Refuses weights that the engine would read as something else than they are.
fn check_weights(json: &Fields) -> Result<(), ConfigError> {
    if !matches!(json.map.get("tie_word_embeddings"), None | Some(Value::Null | Value::Bool(true))) {
        return Err(json.unsupported("tie_word_embeddings", "the engine's LM head is the embedding"));
    }
    if !matches!(json.map.get("quantization_config"), None | Some(Value::Null)) {
        return Err(json.unsupported("quantization_config", "save the weights as bfloat16 or float32 first"));
    }
    Ok(())
}

/// A text model's configuration. `top` is the whole file: wrappers name control tokens there.
fn parse_text(json: &Fields, family: &Family, top: &Fields) -> Result<GemmaConfig, ConfigError> {
    let off = |field: &str| matches!(json.map.get(field), None | Some(Value::Null | Value::Bool(false)));
    if !off("attention_bias") {
        return Err(json.unsupported("attention_bias", "the engine's projections have no bias"));
    }
    // Gemma 4 says "vision" where the tokens of an image, of which text has none, see each other.
    let field = "use_bidirectional_attention";
    let of_images = family.gemma4.is_some() && json.map.get(field).is_some_and(|value| value == "vision");
    if !off(field) && !of_images {
        return Err(json.unsupported(field, "the engine's attention is causal"));
    }
    let per_layer = family.gemma4.and_then(|gemma4| gemma4.per_layer_width);
    check_weights(json)?;
    // Gemma 1's first release said "gelu" and meant the tanh approximation, as Transformers knows.
    let tanh = ["gelu_pytorch_tanh", "gelu"];
    let spellings = if family.activation == "hidden_act" { &tanh[..] } else { &tanh[..1] };
    match json.map.get(family.activation) {
        None => {}
        Some(Value::String(name)) if spellings.contains(&name.as_str()) => {}
        Some(_) => {
            return Err(json.unsupported(family.activation, "the engine's MLP has gelu_pytorch_tanh only"));
        }
    }

    let num_heads = json.count("num_attention_heads", family.heads, MAX_WIDTH)?;
    let num_kv_heads = json.kv_heads("num_key_value_heads", family.kv_heads, num_heads)?;
    let head_dim = json.head_dim("head_dim", 256, num_heads)?;
    let intermediate = json.count("intermediate_size", family.intermediate_size, MAX_WIDTH)?;
    let shape = LayerShape { heads: num_heads, kv_heads: num_kv_heads, head_dim, intermediate };
    let vocab_size = json.count("vocab_size", family.vocab_size, MAX_WIDTH)?;
    let attention_scale = match family.scale {
        Scale::HeadDim => head_dim as f64,
        Scale::Query => json.positive("query_pre_attn_scalar", 256.0)?,
        Scale::One => 1.0,
    }
    .powf(-0.5) as f32;
    let attention_softcap = json.softcap("attn_logit_softcapping", family.attention_softcap)?;
    if attention_softcap.is_some() && family.qk_norm {
        return Err(json.unsupported(
            "attn_logit_softcapping",
            "Transformers ignores it in this family; set it to null",
        ));
    }
    let tokens = |field, default: &[u32]| {
        // Within a wrapper, what its text part does not say.
        let fields = if json.map.contains_key(field) { json } else { top };
        fields.tokens(field, default, vocab_size)
    };
    let mut eos_tokens = tokens("eos_token_id", &[1])?;
    // A wrapper may know of more than its text part.
    for id in top.tokens("eos_token_id", &[], vocab_size)? {
        if !eos_tokens.contains(&id) {
            eos_tokens.push(id);
        }
    }
    let bos_token = match tokens("bos_token_id", &[2])?[..] {
        [id] => id,
        _ => return Err(json.bad("bos_token_id", "must be one token id; Gemma cannot do without".into())),
    };
    let layers = layers(json, family, shape)?;
    let per_layer_width = match per_layer {
        Some(default) => json.width("hidden_size_per_layer_input", default)?,
        None => 0,
    };
    if per_layer_width != 0 {
        let field = "vocab_size_per_layer_input";
        let rows = json.count(field, 262_144, MAX_WIDTH)?;
        if rows < vocab_size {
            let problem =
                format!("{rows}, but vocab_size is {vocab_size}; every token needs embeddings of layers");
            return Err(json.bad(field, problem));
        }
        if layers.len() * per_layer_width > MAX_WIDTH {
            let problem =
                format!("{per_layer_width} x num_hidden_layers = {} exceeds {MAX_WIDTH}", layers.len());
            return Err(json.bad("hidden_size_per_layer_input", problem));
        }
    }
    Ok(GemmaConfig {
        model_type: family.model_type.to_owned(),
        vocab_size,
        hidden_size: json.count("hidden_size", family.hidden_size, MAX_WIDTH)?,
        layers,
        norm: NormSpec {
            eps: json.positive("rms_norm_eps", 1e-6)? as f32,
            offset: if family.gemma4.is_some() { 0.0 } else { 1.0 },
        },
        attention_scale,
        attention_softcap,
        final_softcap: match family.final_softcap {
            None if family.norms == NormPlacement::Pre => None,
            default => json.softcap("final_logit_softcapping", default)?,
        },
        norms: family.norms,
        mlp_pre_norm: family.mlp_pre_norm,
        qk_norm: family.qk_norm,
        value_norm: family.gemma4.is_some(),
        layer_scalars: family.gemma4.is_some(),
        per_layer_width,
        experts: match per_layer {
            Some(_) => experts(json)?,
            None => None,
        },
        max_positions: json.count("max_position_embeddings", family.max_positions, MAX_POSITIONS)?,
        eos_tokens,
        bos_token,
        score_head: false,
    })
}

/// The mixture of experts, where it is switched on.
fn experts(json: &Fields) -> Result<Option<ExpertShape>, ConfigError> {
    if !json.switch("enable_moe_block")? {
        return Ok(None);
    }
    let some = |field: &str, max: usize| match json.map.get(field) {
        None | Some(Value::Null) => Err(json.bad(field, "missing; enable_moe_block needs it".into())),
        Some(_) => json.count(field, 0, max),
    };
    let (count, width) = (some("num_experts", MAX_EXPERTS)?, some("moe_intermediate_size", MAX_WIDTH)?);
    let shape = ExpertShape { count, per_token: some("top_k_experts", count)?, width };
    if 2 * count * width > MAX_WIDTH {
        let problem = format!("2 x {width} x num_experts = {count} exceeds {MAX_WIDTH}");
        return Err(json.bad("moe_intermediate_size", problem));
    }
    Ok(Some(shape))
}

fn family(json: &Fields) -> Result<&'static Family, ConfigError> {
    let model_type = json.map.get("model_type").and_then(Value::as_str);
    let Some(family) = FAMILIES.iter().find(|f| Some(f.model_type) == model_type) else {
        return Err(not_gemma(json, "model_type"));
    };
    check_architecture(json, family.architecture, classifier(family.model_type, false))?;
    Ok(family)
}

/// Refuses another architecture than this and, where there is one, that of a classifier of the same family.
fn check_architecture(
    json: &Fields,
    architecture: &str,
    classifier: Option<&str>,
) -> Result<(), ConfigError> {
    match json.map.get("architectures") {
        None | Some(Value::Null) => Ok(()),
        Some(_) if names_architecture(json.map, architecture) => Ok(()),
        Some(_) if classifier.is_some_and(|name| names_architecture(json.map, name)) => Ok(()),
        Some(_) => Err(not_gemma(json, "architectures")),
    }
}

fn names_architecture(json: &Map<String, Value>, architecture: &str) -> bool {
    let names = json.get("architectures").and_then(Value::as_array);
    names.is_some_and(|names| names.iter().any(|name| name == architecture))
}

/// Transformers' class for sequence classification with a model of a family (5.24, `modeling_*gemma*.py`), where it has one;
/// `wrapped` says whether that is the text part of a vision-and-text model.
fn classifier(model_type: &str, wrapped: bool) -> Option<&'static str> {
    match (model_type, wrapped) {
        ("gemma", false) => Some("GemmaForSequenceClassification"),
        ("gemma2", false) => Some("Gemma2ForSequenceClassification"),
        ("gemma3_text", false) => Some("Gemma3TextForSequenceClassification"),
        ("gemma3_text", true) => Some("Gemma3ForSequenceClassification"),
        _ => None,
    }
}

/// The refusal of a model for the value of a field.
fn not_gemma(json: &Fields, field: &str) -> ConfigError {
    let found = match json.map.get(field) {
        None => format!("a configuration without {field}"),
        Some(value) => format!("{field} {}", brief(value)),
    };
    ConfigError::NotGemma { path: json.path.to_owned(), found }
}

/// Which layers are local, with their window, and every layer's widths and RoPE.
fn layers(json: &Fields, family: &Family, shape: LayerShape) -> Result<Vec<LayerSpec>, ConfigError> {
    let count = json.count("num_hidden_layers", family.layers, MAX_LAYERS)?;
    let mut local: Vec<bool> = match (family.pattern, json.map.get("layer_types")) {
        (None, _) => vec![false; count],
        (Some(period), None | Some(Value::Null)) => {
            // Gemma 3's period could be set before there was `layer_types`.
            let period = match family.rope {
                Ropes::ByType => json.count("sliding_window_pattern", period, MAX_LAYERS)?,
                _ => period,
            };
            (1..=count).map(|n| n % period != 0).collect()
        }
        (Some(_), Some(Value::Array(types))) => {
            if types.len() != count {
                let problem = format!("{} entries, but num_hidden_layers is {count}", types.len());
                return Err(json.bad("layer_types", problem));
            }
            let is_local = |(i, name): (usize, &Value)| match name.as_str() {
                Some(LOCAL) => Ok(true),
                Some(GLOBAL) => Ok(false),
                _ => Err(json.bad(
                    &format!("layer_types[{i}]"),
                    format!("{} is neither {LOCAL:?} nor {GLOBAL:?}", brief(name)),
                )),
            };
            types.iter().enumerate().map(is_local).collect::<Result<_, _>>()?
        }
        (Some(_), Some(other)) => {
            return Err(json.bad("layer_types", format!("expected a list, found {}", brief(other))));
        }
    };
    if family.gemma4.is_some() {
        // As Transformers does, whatever `layer_types` says.
        local[count - 1] = false;
    }
    let window = match local.contains(&true) {
        true => Some(json.count("sliding_window", family.window, u32::MAX as usize)?),
        false => None,
    };
    let (local_rope, global_rope) = match family.rope {
        Ropes::Uniform => uniform_rope(json)?,
        Ropes::ByType => layered_rope(json)?,
        Ropes::Proportional => proportional_rope(json)?,
    };
    let shared = family.gemma4.is_some() && json.switch("attention_k_eq_v")?;
    let shapes = match family.gemma4 {
        Some(_) => layer_shapes(json, shape, &local, shared)?,
        None => vec![shape; count],
    };
    let layer = |(local, shape): (bool, LayerShape)| LayerSpec {
        shape,
        window: window.filter(|_| local),
        rope: if local { local_rope } else { global_rope }.of(shape.head_dim),
        keys_are_values: shared && !local,
        kv_from: None,
    };
    let mut layers: Vec<LayerSpec> = local.into_iter().zip(shapes).map(layer).collect();
    if family.gemma4.is_some() {
        share_kv(json, &mut layers)?;
    }
    Ok(layers)
}

/// Lets the last `num_kv_shared_layers` layers read the keys and values of the last layer before them of their kind.
fn share_kv(json: &Fields, layers: &mut [LayerSpec]) -> Result<(), ConfigError> {
    let field = "num_kv_shared_layers";
    let count = json.width(field, 0)?;
    let double = json.switch("use_double_wide_mlp")?;
    let Some(first) = layers.len().checked_sub(count).filter(|first| *first > 0) else {
        let problem = format!("{count} of {} layers; the first must have keys and values", layers.len());
        return Err(json.bad(field, problem));
    };
    let (own, sharing) = layers.split_at_mut(first);
    for (i, layer) in sharing.iter_mut().enumerate() {
        let number = first + i;
        let kind = if layer.window.is_some() { LOCAL } else { GLOBAL };
        let Some(from) = own.iter().rposition(|other| other.window == layer.window) else {
            return Err(json.bad(field, format!("{count}: layer {number} is the first with {kind}")));
        };
        let widths = |shape: LayerShape| (shape.kv_heads, shape.head_dim);
        if widths(own[from].shape) != widths(layer.shape) {
            let problem =
                format!("{count}: layer {number} has other heads than layer {from}, whose keys it reads");
            return Err(json.bad(field, problem));
        }
        layer.kv_from = Some(from);
        layer.keys_are_values = false;
        if double {
            layer.shape.intermediate *= 2;
            if layer.shape.intermediate > MAX_WIDTH {
                let problem = format!("2 x intermediate_size exceeds {MAX_WIDTH}");
                return Err(json.bad("use_double_wide_mlp", problem));
            }
        }
    }
    Ok(())
}

/// The widths of Gemma 4's layers: `per_layer_config`, as Transformers writes them, by the layer's number; or else
/// `global_head_dim` and `num_global_key_value_heads`, as they were published, of global layers.
fn layer_shapes(
    json: &Fields,
    shape: LayerShape,
    local: &[bool],
    keys_are_values: bool,
) -> Result<Vec<LayerShape>, ConfigError> {
    let mut shapes = vec![shape; local.len()];
    if json.map.get(PER_LAYER).is_some_and(Value::is_null) {
        // It is there, and no layer has widths of its own.
        return Ok(shapes);
    }
    let Some(layers) = json.object(PER_LAYER)? else {
        let head_dim = json.head_dim("global_head_dim", 512, shape.heads)?;
        let field = "num_global_key_value_heads";
        let kv_heads = match json.map.get(field) {
            // Transformers heeds it only where keys are values.
            Some(value) if !value.is_null() && keys_are_values => {
                json.kv_heads(field, shape.kv_heads, shape.heads)?
            }
            _ => shape.kv_heads,
        };
        for (shape, _) in shapes.iter_mut().zip(local).filter(|(_, local)| !**local) {
            (shape.head_dim, shape.kv_heads) = (head_dim, kv_heads);
        }
        return Ok(shapes);
    };
    let layers = Fields { path: json.path, prefix: json.name(PER_LAYER), map: layers };
    for key in layers.map.keys() {
        let Some(shape) = key.parse().ok().and_then(|number: usize| shapes.get_mut(number)) else {
            let problem =
                format!("expected the number of a layer, below num_hidden_layers = {}", local.len());
            return Err(layers.bad(key, problem));
        };
        let Some(map) = layers.object(key)? else { continue };
        let layer = Fields { path: json.path, prefix: layers.name(key), map };
        if let Some(field) =
            map.keys().find(|field| !["head_dim", "num_key_value_heads"].contains(&&field[..]))
        {
            return Err(layer
                .unsupported(field, "layers of the engine may differ in head_dim and num_key_value_heads"));
        }
        shape.head_dim = layer.head_dim("head_dim", shape.head_dim, shape.heads)?;
        shape.kv_heads = layer.kv_heads("num_key_value_heads", shape.kv_heads, shape.heads)?;
    }
    Ok(shapes)
}

/// A set of RoPE parameters, of heads of any width.
#[derive(Clone, Copy)]
struct Rope {
    theta: f64,
    factor: f64,
    /// The share of a head's pairs that turns.
    share: f64,
}

impl Rope {
    fn of(self, head_dim: usize) -> RopeSpec {
        let pairs = (self.share * head_dim as f64 / 2.0).floor() as usize;
        RopeSpec { head_dim, pairs: pairs.min(head_dim / 2), theta: self.theta, factor: self.factor }
    }
}

/// Gemma 1 and 2, VaultGemma: `rope_scaling` or else `rope_parameters`, flat; the base inside or beside it.
fn uniform_rope(json: &Fields) -> Result<(Rope, Rope), ConfigError> {
    let theta = json.positive("rope_theta", 10_000.0)?;
    let name = if json.object("rope_scaling")?.is_some_and(|m| !m.is_empty()) {
        "rope_scaling"
    } else {
        "rope_parameters"
    };
    let rope = match json.object(name)? {
        None => Rope { theta, factor: 1.0, share: 1.0 },
        Some(map) => {
            if map.contains_key(LOCAL) || map.contains_key(GLOBAL) {
                return Err(json
                    .bad(name, "Gemma 1 and 2 have one RoPE for all layers, not one per layer type".into()));
            }
            rope(&Fields { path: json.path, prefix: json.name(name), map }, theta, RopeTypes::Legacy)?
        }
    };
    Ok((rope, rope))
}

/// Gemma 3: `rope_parameters` per layer type; the old spelling has `rope_local_base_freq` for local layers,
/// `rope_theta` and `rope_scaling` for global ones.
fn layered_rope(json: &Fields) -> Result<(Rope, Rope), ConfigError> {
    let none = Map::new();
    let nested =
        rope_by_type(json)?.unwrap_or(Fields { path: json.path, prefix: json.name(ROPE), map: &none });
    let mut global = nested.object(GLOBAL)?.cloned().unwrap_or_default();
    let mut prefix = nested.name(GLOBAL);
    if let Some(scaling) = json.object("rope_scaling")?.filter(|m| !m.is_empty()) {
        prefix = json.name("rope_scaling");
        global.extend(scaling.clone());
    }
    let global = Fields { path: json.path, prefix, map: &global };
    let global = rope(&global, json.positive("rope_theta", 1_000_000.0)?, RopeTypes::Scaled)?;
    let local = nested.object(LOCAL)?.unwrap_or(&none);
    let local = Fields { path: json.path, prefix: nested.name(LOCAL), map: local };
    let local = rope(&local, json.positive("rope_local_base_freq", 10_000.0)?, RopeTypes::Scaled)?;
    Ok((local, global))
}

/// Gemma 4: `rope_parameters` per layer type, or nothing.
fn proportional_rope(json: &Fields) -> Result<(Rope, Rope), ConfigError> {
    let Some(nested) = rope_by_type(json)? else {
        let rope = |theta, share| Rope { theta, factor: 1.0, share };
        return Ok((rope(10_000.0, 1.0), rope(1_000_000.0, 0.25)));
    };
    // What stands beside `rope_parameters` counts where they do not say it.
    let share = json.map.get(SHARE);
    let of_type = |name: &str, theta| match nested.object(name)? {
        Some(map) => {
            let mut map = map.clone();
            if let (Some(share), false) = (share, map.contains_key(SHARE)) {
                map.insert(SHARE.to_owned(), share.clone());
            }
            let fields = Fields { path: json.path, prefix: nested.name(name), map: &map };
            rope(&fields, theta, RopeTypes::Proportional)
        }
        None => Err(nested.bad(name, "missing; it says how layers of this type turn heads".into())),
    };
    Ok((of_type(LOCAL, 10_000.0)?, of_type(GLOBAL, 1_000_000.0)?))
}

/// `rope_parameters` with an entry for each type of layer.
fn rope_by_type<'a>(json: &Fields<'a>) -> Result<Option<Fields<'a>>, ConfigError> {
    let Some(map) = json.object(ROPE)? else { return Ok(None) };
    if let Some(key) = map.keys().find(|k| *k != LOCAL && *k != GLOBAL) {
        let problem =
            format!("this family has {LOCAL:?} and {GLOBAL:?} here, each with its own RoPE, not {key:?}");
        return Err(json.bad(ROPE, problem));
    }
    Ok(Some(Fields { path: json.path, prefix: json.name(ROPE), map }))
}

/// Which values `rope_type` may have.
#[derive(Clone, Copy, PartialEq)]
enum RopeTypes {
    /// default and linear, and `type` may stand for `rope_type`.
    Legacy,
    /// default and linear.
    Scaled,
    /// default and proportional, and `type` may stand for `rope_type`.
    Proportional,
}

/// One set of RoPE parameters.
fn rope(json: &Fields, theta: f64, types: RopeTypes) -> Result<Rope, ConfigError> {
    let mut key = "rope_type";
    if !json.map.contains_key(key) && json.map.contains_key("type") {
        if types == RopeTypes::Scaled {
            // Transformers 4 heeds it, 5 ignores it.
            return Err(json.bad(
                "type",
                "say rope_type: Transformers' versions disagree on \"type\" in Gemma 3".into(),
            ));
        }
        key = "type";
    }
    let proportional = types == RopeTypes::Proportional;
    let mut share = json.positive(SHARE, 1.0)?;
    let factor = match json.map.get(key).map(Value::as_str) {
        Some(Some("proportional")) if proportional => json.positive("factor", 1.0)?,
        None | Some(Some("default")) if proportional => {
            // Transformers does not heed it then.
            share = 1.0;
            1.0
        }
        None | Some(Some("default")) => 1.0,
        Some(Some("linear")) if !proportional => json.positive_required("factor")?,
        Some(_) if proportional => {
            return Err(json.unsupported(key, "the engine has \"default\" and \"proportional\" here"));
        }
        Some(_) => return Err(json.unsupported(key, "the engine has \"default\" and \"linear\"")),
    };
    if share > 1.0 || !proportional && share != 1.0 {
        return Err(json.unsupported(SHARE, "the engine turns whole heads, or a part of them in Gemma 4"));
    }
    Ok(Rope { theta: json.positive("rope_theta", theta)?, factor, share })
}

/// A JSON object of which every error names file and field.
struct Fields<'a> {
    path: &'a Path,
    /// What stands before the names of its fields: empty, or that of the object in which it is.
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    fn name(&self, field: &str) -> String {
        if self.prefix.is_empty() { field.to_owned() } else { format!("{}.{field}", self.prefix) }
    }

    fn bad(&self, field: &str, problem: String) -> ConfigError {
        ConfigError::Field { path: self.path.to_owned(), field: self.name(field), problem }
    }

    fn unsupported(&self, field: &str, reason: &'static str) -> ConfigError {
        let value = brief(self.map.get(field).unwrap_or(&Value::Null));
        ConfigError::Unsupported { path: self.path.to_owned(), field: self.name(field), value, reason }
    }

    fn count(&self, field: &str, default: usize, max: usize) -> Result<usize, ConfigError> {
        match self.map.get(field) {
            None => Ok(default),
            Some(value) => {
                match value.as_u64() {
                    Some(n) if n >= 1 && n <= max as u64 => Ok(n as usize),
                    _ => Err(self
                        .bad(field, format!("expected an integer from 1 to {max}, found {}", brief(value)))),
                }
            }
        }
    }

    /// A width that may be 0 or null, which mean that there is no such part.
    fn width(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        match self.map.get(field) {
            Some(Value::Null) => Ok(0),
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.count(field, default, MAX_WIDTH),
        }
    }

    /// A switch that is off if nothing is said.
    fn switch(&self, field: &str) -> Result<bool, ConfigError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(value) => Err(self.bad(field, format!("expected true or false, found {}", brief(value)))),
        }
    }

    /// The width of a head.
    fn head_dim(&self, field: &str, default: usize, heads: usize) -> Result<usize, ConfigError> {
        let head_dim = self.count(field, default, MAX_WIDTH)?;
        if head_dim % 2 != 0 {
            return Err(self.bad(field, format!("{head_dim} is odd; RoPE turns pairs")));
        }
        if heads * head_dim > MAX_WIDTH {
            let problem = format!("{head_dim} x num_attention_heads = {heads} exceeds {MAX_WIDTH}");
            return Err(self.bad(field, problem));
        }
        Ok(head_dim)
    }

    /// A number of key/value heads.
    fn kv_heads(&self, field: &str, default: usize, heads: usize) -> Result<usize, ConfigError> {
        let kv_heads = self.count(field, default, MAX_WIDTH)?;
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("{kv_heads} does not divide num_attention_heads = {heads}");
            return Err(self.bad(field, problem));
        }
        Ok(kv_heads)
    }

    fn positive(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        if self.map.contains_key(field) { self.positive_required(field) } else { Ok(default) }
    }

    fn positive_required(&self, field: &str) -> Result<f64, ConfigError> {
        let value = self.map.get(field).unwrap_or(&Value::Null);
        match value.as_f64() {
            // Every such number is used in f32 sooner or later.
            Some(x) if x as f32 > 0.0 && (x as f32).is_finite() => Ok(x),
            _ => Err(self.bad(field, format!("expected a positive number, found {}", brief(value)))),
        }
    }

    fn softcap(&self, field: &str, default: Option<f64>) -> Result<Option<f32>, ConfigError> {
        Ok(match self.map.get(field) {
            None => default,
            Some(Value::Null) => None,
            Some(_) => Some(self.positive_required(field)?),
        }
        .map(|c| c as f32))
    }

    fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.bad(field, format!("expected an object, found {}", brief(other)))),
        }
    }

    /// One token id, a list of them, or null for none.
    fn tokens(&self, field: &str, default: &[u32], vocab_size: usize) -> Result<Vec<u32>, ConfigError> {
        let values = match self.map.get(field) {
            None => return Ok(default.to_vec()),
            Some(Value::Null) => &[],
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let id = |value: &Value| match value.as_u64() {
            Some(id) if id < vocab_size as u64 => Ok(id as u32),
            _ => Err(self.bad(
                field,
                format!("expected token ids below vocab_size = {vocab_size}, found {}", brief(value)),
            )),
        };
        values.iter().map(id).collect()
    }
}

/// A value as JSON, cut to a length that a message can carry.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
