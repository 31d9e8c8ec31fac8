//! `GemmaConfig`: every Gemma variant as data. The model code asks this table and never the family's name.
//!
//! [`ConfigFile`] reads it from a Hugging Face directory, in all spellings that Transformers 4 and 5 have written.
//! Absent fields mean what they mean to Transformers; whatever would make the engine compute something else than
//! Transformers does is an error.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::backend::DType;
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

/// One decoder layer's share of the differences between Gemma variants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerSpec {
    /// Its widths.
    pub shape: LayerShape,
    /// Sliding window in tokens, the query's own included; `None` attends to everything before it.
    pub window: Option<usize>,
    /// RoPE base.
    pub rope_theta: f64,
    /// Positions are divided by this before RoPE (Gemma 3's "linear" scaling of global layers); 1 elsewhere.
    pub rope_factor: f64,
}

/// Where a layer puts its norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// Gemma 1, VaultGemma: one norm before attention, one before the MLP.
    Pre,
    /// Gemma 2 and 3: one before and one after each.
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
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Factor on q . k: `head_dim^-1/2` (Gemma 1) or `query_pre_attn_scalar^-1/2`.
    pub attention_scale: f32,
    /// Attention scores become `c tanh(s / c)` (Gemma 2, VaultGemma).
    pub attention_softcap: Option<f32>,
    /// Final logits become `c tanh(l / c)` (Gemma 2, VaultGemma).
    pub final_softcap: Option<f32>,
    /// Placement of norms.
    pub norms: NormPlacement,
    /// Transformers' name of the norm before the MLP, in each layer.
    pub mlp_pre_norm: &'static str,
    /// RMSNorm of every q and k head (Gemma 3).
    pub qk_norm: bool,
    /// Context length in tokens.
    pub max_positions: usize,
    /// Tokens that end a response, from config.json and generation_config.json.
    pub eos_tokens: Vec<u32>,
    /// Beginning-of-sequence token; mandatory for Gemma.
    pub bos_token: u32,
}

impl GemmaConfig {
    /// Factor on embeddings: sqrt(D), rounded to the dtype of the weights as Transformers does.
    pub fn embed_scale(&self, weights: DType) -> f32 {
        let scale = (self.hidden_size as f64).sqrt() as f32;
        match weights {
            DType::F32 => scale,
            DType::Bf16 => half::bf16::from_f32(scale).to_f32(),
        }
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
/// Bound on the number of layers, for the same reason.
const MAX_LAYERS: usize = 1 << 12;
/// RoPE's sines and cosines are exact for angles up to 2^18, and the first pair's angle is the position. The largest
/// Gemma context is 2^17.
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
        let (mut gemma, wrapped) = parse(&Fields { path: &path, prefix: "", map: &json })?;
        let path = dir.join(GENERATION_CONFIG_FILE);
        if std::fs::symlink_metadata(&path).is_ok() {
            let map = read_object(&path)?;
            for id in (Fields { path: &path, prefix: "", map: &map }).tokens(
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
            return Err(
                Fields { path: &dir.join(CONFIG_FILE), prefix: "", map: &json }.bad("eos_token_id", problem)
            );
        }
        Ok(Self { gemma, wrapped, json })
    }

    /// config.json as it was, except that it names `dtype`.
    pub fn to_json(&self, dtype: DType) -> String {
        let mut json = self.json.clone();
        let name = match dtype {
            DType::F32 => "float32",
            DType::Bf16 => "bfloat16",
        };
        // Transformers 4 writes `torch_dtype`, 5 writes `dtype`; both read the former.
        let key = if json.contains_key("dtype") { "dtype" } else { "torch_dtype" };
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

/// What the families' configuration classes differ in (Transformers 5.23, `configuration_*gemma*.py`).
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
    /// Local and global layers have RoPE bases of their own.
    local_rope: bool,
    norms: NormPlacement,
    mlp_pre_norm: &'static str,
    /// Scores are scaled by this setting to the power of -1/2, not by the head's width.
    query_pre_attn_scalar: bool,
    qk_norm: bool,
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
    local_rope: false,
    norms: NormPlacement::Sandwich,
    mlp_pre_norm: "pre_feedforward_layernorm",
    query_pre_attn_scalar: true,
    qk_norm: false,
};

const FAMILIES: [Family; 4] = [
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
        local_rope: false,
        norms: NormPlacement::Pre,
        mlp_pre_norm: "post_attention_layernorm",
        query_pre_attn_scalar: false,
        qk_norm: false,
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
        local_rope: true,
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        query_pre_attn_scalar: true,
        qk_norm: true,
    },
];

/// A vision-and-text model around a text model.
struct Wrapper {
    model_type: &'static str,
    architecture: &'static str,
    /// The `model_type` of the text model.
    text: &'static str,
}

const WRAPPERS: [Wrapper; 1] =
    [Wrapper { model_type: "gemma3", architecture: "Gemma3ForConditionalGeneration", text: "gemma3_text" }];

/// The text model's configuration within a wrapper's.
const TEXT_CONFIG: &str = "text_config";
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
    check_architecture(json, wrapper.architecture)?;
    check_weights(json)?;
    let Some(map) = json.object(TEXT_CONFIG)? else {
        return Err(json.bad(TEXT_CONFIG, "missing; it describes the text model".into()));
    };
    let text = Fields { path: json.path, prefix: TEXT_CONFIG, map };
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
    for (field, reason) in [
        ("attention_bias", "the engine's projections have no bias"),
        ("use_bidirectional_attention", "the engine's attention is causal"),
    ] {
        if !matches!(json.map.get(field), None | Some(Value::Null | Value::Bool(false))) {
            return Err(json.unsupported(field, reason));
        }
    }
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
    let num_kv_heads = json.count("num_key_value_heads", family.kv_heads, MAX_WIDTH)?;
    if num_heads % num_kv_heads != 0 {
        let problem = format!("{num_kv_heads} does not divide num_attention_heads = {num_heads}");
        return Err(json.bad("num_key_value_heads", problem));
    }
    let head_dim = json.count("head_dim", 256, MAX_WIDTH)?;
    if head_dim % 2 != 0 {
        return Err(json.bad("head_dim", format!("{head_dim} is odd; RoPE turns pairs")));
    }
    if num_heads * head_dim > MAX_WIDTH {
        let problem = format!("{head_dim} x num_attention_heads = {num_heads} exceeds {MAX_WIDTH}");
        return Err(json.bad("head_dim", problem));
    }
    let intermediate = json.count("intermediate_size", family.intermediate_size, MAX_WIDTH)?;
    let shape = LayerShape { heads: num_heads, kv_heads: num_kv_heads, head_dim, intermediate };
    let vocab_size = json.count("vocab_size", family.vocab_size, MAX_WIDTH)?;
    let attention_scale = match family.query_pre_attn_scalar {
        false => head_dim as f64,
        true => json.positive("query_pre_attn_scalar", 256.0)?,
    }
    .powf(-0.5) as f32;
    let attention_softcap = json.softcap("attn_logit_softcapping", family.attention_softcap)?;
    if attention_softcap.is_some() && family.qk_norm {
        return Err(
            json.unsupported("attn_logit_softcapping", "Transformers' Gemma 3 ignores it; set it to null")
        );
    }
    let tokens = |field, default: &[u32]| {
        // Within a wrapper, what its text part does not say.
        let fields = if json.map.contains_key(field) { json } else { top };
        fields.tokens(field, default, vocab_size)
    };
    let bos_token = match tokens("bos_token_id", &[2])?[..] {
        [id] => id,
        _ => return Err(json.bad("bos_token_id", "must be one token id; Gemma cannot do without".into())),
    };
    Ok(GemmaConfig {
        model_type: family.model_type.to_owned(),
        vocab_size,
        hidden_size: json.count("hidden_size", family.hidden_size, MAX_WIDTH)?,
        layers: layers(json, family, shape)?,
        rms_norm_eps: json.positive("rms_norm_eps", 1e-6)? as f32,
        attention_scale,
        attention_softcap,
        final_softcap: match family.final_softcap {
            None if family.norms == NormPlacement::Pre => None,
            default => json.softcap("final_logit_softcapping", default)?,
        },
        norms: family.norms,
        mlp_pre_norm: family.mlp_pre_norm,
        qk_norm: family.qk_norm,
        max_positions: json.count("max_position_embeddings", family.max_positions, MAX_POSITIONS)?,
        eos_tokens: tokens("eos_token_id", &[1])?,
        bos_token,
    })
}

fn family(json: &Fields) -> Result<&'static Family, ConfigError> {
    let model_type = json.map.get("model_type").and_then(Value::as_str);
    let Some(family) = FAMILIES.iter().find(|f| Some(f.model_type) == model_type) else {
        return Err(not_gemma(json, "model_type"));
    };
    check_architecture(json, family.architecture)?;
    Ok(family)
}

fn check_architecture(json: &Fields, architecture: &str) -> Result<(), ConfigError> {
    match json.map.get("architectures") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Array(names)) if names.iter().any(|n| n == architecture) => Ok(()),
        Some(_) => Err(not_gemma(json, "architectures")),
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

/// Which layers are local, with their window, and every layer's RoPE.
fn layers(json: &Fields, family: &Family, shape: LayerShape) -> Result<Vec<LayerSpec>, ConfigError> {
    let count = json.count("num_hidden_layers", family.layers, MAX_LAYERS)?;
    let local: Vec<bool> = match (family.pattern, json.map.get("layer_types")) {
        (None, _) => vec![false; count],
        (Some(period), None | Some(Value::Null)) => {
            // Gemma 3's period could be set before there was `layer_types`.
            let period = match family.local_rope {
                true => json.count("sliding_window_pattern", period, MAX_LAYERS)?,
                false => period,
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
    let window = match local.contains(&true) {
        true => Some(json.count("sliding_window", 4096, u32::MAX as usize)?),
        false => None,
    };
    let (local_rope, global_rope) = if family.local_rope { layered_rope(json)? } else { uniform_rope(json)? };
    Ok(local
        .into_iter()
        .map(|local| {
            let (rope_theta, rope_factor) = if local { local_rope } else { global_rope };
            LayerSpec { shape, window: window.filter(|_| local), rope_theta, rope_factor }
        })
        .collect())
}

type Rope = (f64, f64);

/// Gemma 1 and 2, VaultGemma: `rope_scaling` or else `rope_parameters`, flat; the base inside or beside it.
fn uniform_rope(json: &Fields) -> Result<(Rope, Rope), ConfigError> {
    let theta = json.positive("rope_theta", 10_000.0)?;
    let name = if json.object("rope_scaling")?.is_some_and(|m| !m.is_empty()) {
        "rope_scaling"
    } else {
        "rope_parameters"
    };
    let rope = match json.object(name)? {
        None => (theta, 1.0),
        Some(map) => {
            if map.contains_key(LOCAL) || map.contains_key(GLOBAL) {
                return Err(json
                    .bad(name, "Gemma 1 and 2 have one RoPE for all layers, not one per layer type".into()));
            }
            rope(&Fields { path: json.path, prefix: name, map }, theta, true)?
        }
    };
    Ok((rope, rope))
}

/// Gemma 3: `rope_parameters` per layer type; the old spelling has `rope_local_base_freq` for local layers,
/// `rope_theta` and `rope_scaling` for global ones.
fn layered_rope(json: &Fields) -> Result<(Rope, Rope), ConfigError> {
    let none = Map::new();
    let nested = json.object("rope_parameters")?.unwrap_or(&none);
    if let Some(key) = nested.keys().find(|k| *k != LOCAL && *k != GLOBAL) {
        let problem =
            format!("Gemma 3 has {LOCAL:?} and {GLOBAL:?} here, each with its own RoPE, not {key:?}");
        return Err(json.bad("rope_parameters", problem));
    }
    let nested = Fields { path: json.path, prefix: "rope_parameters", map: nested };
    let mut global = nested.object(GLOBAL)?.cloned().unwrap_or_default();
    let mut prefix = "rope_parameters.full_attention";
    if let Some(scaling) = json.object("rope_scaling")?.filter(|m| !m.is_empty()) {
        prefix = "rope_scaling";
        global.extend(scaling.clone());
    }
    let global = Fields { path: json.path, prefix, map: &global };
    let global = rope(&global, json.positive("rope_theta", 1_000_000.0)?, false)?;
    let local = nested.object(LOCAL)?.unwrap_or(&none);
    let local = Fields { path: json.path, prefix: "rope_parameters.sliding_attention", map: local };
    let local = rope(&local, json.positive("rope_local_base_freq", 10_000.0)?, false)?;
    Ok((local, global))
}

/// (theta, factor) of one set of RoPE parameters. `legacy`: `type` may stand for `rope_type`.
fn rope(json: &Fields, theta: f64, legacy: bool) -> Result<Rope, ConfigError> {
    let mut key = "rope_type";
    if !json.map.contains_key(key) && json.map.contains_key("type") {
        if !legacy {
            // Transformers 4 heeds it, 5 ignores it.
            return Err(json.bad(
                "type",
                "say rope_type: Transformers' versions disagree on \"type\" in Gemma 3".into(),
            ));
        }
        key = "type";
    }
    let factor = match json.map.get(key).map(Value::as_str) {
        None | Some(Some("default")) => 1.0,
        Some(Some("linear")) => json.positive_required("factor")?,
        Some(_) => return Err(json.unsupported(key, "the engine has \"default\" and \"linear\"")),
    };
    if json.positive("partial_rotary_factor", 1.0)? != 1.0 {
        return Err(json.unsupported("partial_rotary_factor", "the engine turns whole heads"));
    }
    Ok((json.positive("rope_theta", theta)?, factor))
}

/// A JSON object of which every error names file and field.
struct Fields<'a> {
    path: &'a Path,
    prefix: &'a str,
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
