//! A configuration's architecture: its family, and the text model that its fields describe.

use serde_json::{Map, Value};

use super::families::{FAMILIES, Family, Scale, WRAPPERS};
use super::fields::{ConfigError, Fields, MAX_WIDTH, brief};
use super::layers::layers;
use super::{ExpertShape, GemmaConfig, LayerShape, NormPlacement};
use crate::backend::NormSpec;

/// Bound on the number of experts, so that no product of sizes overflows 64 bits.
const MAX_EXPERTS: usize = 1 << 12;

/// RoPE's sines and cosines are exact for angles up to 2^18, and the first pair's angle is the position. That is the largest
/// Gemma context.
const MAX_POSITIONS: usize = 1 << 18;

/// The text model's configuration within a wrapper's.
pub(super) const TEXT_CONFIG: &str = "text_config";

/// Words in the names of settings that say what a layer computes.
const OF_LAYERS: [&str; 18] = [
    "altup",
    "attention",
    "attn",
    "decoder",
    "encoder",
    "expert",
    "laurel",
    "layer",
    "mlp",
    "moe",
    "multiplier",
    "norm",
    "residual",
    "rope",
    "router",
    "scal",
    "softcap",
    "sparsity",
];

/// Such settings that the engine reads, and those that change nothing of what it computes.
const KNOWN: [&str; 17] = [
    "attention_bias",
    "attention_dropout",
    "attn_implementation",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "is_decoder",
    "layer_types",
    "num_attention_heads",
    "num_hidden_layers",
    "output_attentions",
    "query_pre_attn_scalar",
    "rms_norm_eps",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "use_bidirectional_attention",
];

/// Those of Gemma 4 beside them, and those that only its models with per-layer embeddings or experts have.
const KNOWN_IN_GEMMA_4: [&str; 4] =
    ["attention_k_eq_v", "num_kv_shared_layers", "per_layer_config", "use_double_wide_mlp"];
const KNOWN_OF_PARTS: [&str; 6] = [
    "enable_moe_block",
    "hidden_size_per_layer_input",
    "moe_intermediate_size",
    "num_experts",
    "top_k_experts",
    "vocab_size_per_layer_input",
];

/// The configuration, and whether it is that of a wrapper's text part.
pub(super) fn parse(json: &Fields) -> Result<(GemmaConfig, bool), ConfigError> {
    let model_type = json.map.get("model_type").and_then(Value::as_str);
    let Some(wrapper) = WRAPPERS.iter().find(|w| Some(w.model_type) == model_type) else {
        return Ok((parse_text(json, family(json)?, json)?, false));
    };
    check_architecture(json, wrapper.architecture, wrapper.classifier)?;
    check_weights(json)?;
    tied(json, true)?;
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
    if !matches!(json.map.get("quantization_config"), None | Some(Value::Null)) {
        return Err(json.unsupported("quantization_config", "save the weights as bfloat16 or float32 first"));
    }
    Ok(())
}

/// Refuses settings of layers that the engine knows nothing of, as a later version of a family may have them.
fn check_known(json: &Fields, family: &Family) -> Result<(), ConfigError> {
    let parts = family.gemma4.is_some_and(|gemma4| gemma4.per_layer_width.is_some());
    let known = |name: &str| {
        KNOWN.contains(&name)
            || family.gemma4.is_some() && KNOWN_IN_GEMMA_4.contains(&name)
            || parts && KNOWN_OF_PARTS.contains(&name)
    };
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(true) => false,
    };
    // What begins with an underscore is Transformers' own.
    let of_layers = |name: &str| !name.starts_with('_') && OF_LAYERS.iter().any(|word| name.contains(word));
    match json.map.iter().find(|(name, value)| of_layers(name) && !known(name) && !off(value)) {
        None => Ok(()),
        Some((name, _)) => Err(json.unsupported(
            name,
            "the engine does not know what it does in this family; if Transformers ignores it, set it to null",
        )),
    }
}

/// Whether the LM head is the embedding. That of a model `inside` one of text and other things always is: Transformers' versions do
/// not agree on which of both configurations says so.
fn tied(json: &Fields, inside: bool) -> Result<bool, ConfigError> {
    const FIELD: &str = "tie_word_embeddings";
    match json.map.get(FIELD) {
        None | Some(Value::Null | Value::Bool(true)) => Ok(true),
        Some(Value::Bool(false)) if !inside => Ok(false),
        Some(Value::Bool(false)) => {
            let why = "the LM head of a multimodal model is its embedding here; save the language model by itself, with Transformers' \
                       save_pretrained";
            Err(json.unsupported(FIELD, why))
        }
        Some(other) => Err(json.bad(FIELD, format!("expected true or false, found {}", brief(other)))),
    }
}

/// A text model's configuration. `top` is the whole file: wrappers name control tokens there.
fn parse_text(json: &Fields, family: &Family, top: &Fields) -> Result<GemmaConfig, ConfigError> {
    check_known(json, family)?;
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
        trains_per_layer_embed: false,
        experts: match per_layer {
            Some(_) => experts(json)?,
            None => None,
        },
        max_positions: json.count("max_position_embeddings", family.max_positions, MAX_POSITIONS)?,
        eos_tokens,
        bos_token,
        tied: tied(json, !json.prefix.is_empty())?,
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
    check_architecture(json, family.architecture, family.classifier)?;
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

pub(super) fn names_architecture(json: &Map<String, Value>, architecture: &str) -> bool {
    let names = json.get("architectures").and_then(Value::as_array);
    names.is_some_and(|names| names.iter().any(|name| name == architecture))
}

/// The refusal of a model for the value of a field.
fn not_gemma(json: &Fields, field: &str) -> ConfigError {
    let found = match json.map.get(field) {
        None => format!("a configuration without {field}"),
        Some(value) => format!("{field} {}", brief(value)),
    };
    ConfigError::NotGemma { path: json.path.to_owned(), found }
}
