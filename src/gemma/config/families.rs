//! The families of Gemma, as their configuration classes in Transformers differ, and the vision-and-text models around them:
//! a new family is an entry here.

use super::NormPlacement;

/// What the families' configuration classes differ in (Transformers 5.24, `configuration_*gemma*.py`).
pub(super) struct Family {
    pub model_type: &'static str,
    pub architecture: &'static str,
    /// The class for sequence classification (5.24, `modeling_*gemma*.py`), where there is one.
    pub classifier: Option<&'static str>,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub max_positions: usize,
    pub activation: &'static str,
    pub attention_softcap: Option<f64>,
    pub final_softcap: Option<f64>,
    /// Local and global layers alternate in this period, the last of each being global; `None`: all global.
    pub pattern: Option<usize>,
    /// Tokens that a local layer sees.
    pub window: usize,
    pub rope: Ropes,
    pub norms: NormPlacement,
    pub mlp_pre_norm: &'static str,
    pub scale: Scale,
    pub qk_norm: bool,
    /// What Gemma 4 has and the others have not.
    pub gemma4: Option<Gemma4>,
}

/// Where a family's RoPE is described.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Ropes {
    /// One for all layers.
    Uniform,
    /// One for local and one for global layers; Gemma 3's older spellings as well.
    ByType,
    /// One for local and one for global layers, of which the latter turns a quarter of the pairs if nothing is said.
    Proportional,
}

/// What scores are scaled by.
#[derive(Clone, Copy)]
pub(super) enum Scale {
    /// The heads' width to the power of -1/2.
    HeadDim,
    /// `query_pre_attn_scalar` to the power of -1/2.
    Query,
    /// 1.
    One,
}

/// Parts of Gemma 4 that only some of its models have.
#[derive(Clone, Copy)]
pub(super) struct Gemma4 {
    /// `hidden_size_per_layer_input` if config.json does not say it; `None`: there is no such setting, and no experts.
    pub per_layer_width: Option<usize>,
}

const GEMMA_2: Family = Family {
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    classifier: Some("Gemma2ForSequenceClassification"),
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
    classifier: None,
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

pub(super) const FAMILIES: [Family; 6] = [
    Family {
        model_type: "gemma",
        architecture: "GemmaForCausalLM",
        classifier: Some("GemmaForSequenceClassification"),
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
        classifier: None,
        norms: NormPlacement::Pre,
        ..GEMMA_2
    },
    Family {
        model_type: "gemma3_text",
        architecture: "Gemma3ForCausalLM",
        classifier: Some("Gemma3TextForSequenceClassification"),
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
        classifier: None,
        max_positions: 262_144,
        window: 1024,
        gemma4: Some(Gemma4 { per_layer_width: None }),
        ..GEMMA_4
    },
];

/// A vision-and-text model around a text model.
pub(super) struct Wrapper {
    pub model_type: &'static str,
    pub architecture: &'static str,
    /// As of a [`Family`].
    pub classifier: Option<&'static str>,
    /// The `model_type` of the text model.
    pub text: &'static str,
}

pub(super) const WRAPPERS: [Wrapper; 3] = [
    Wrapper {
        model_type: "gemma3",
        architecture: "Gemma3ForConditionalGeneration",
        classifier: Some("Gemma3ForSequenceClassification"),
        text: "gemma3_text",
    },
    Wrapper {
        model_type: "gemma4",
        architecture: "Gemma4ForConditionalGeneration",
        classifier: None,
        text: "gemma4_text",
    },
    Wrapper {
        model_type: "gemma4_unified",
        architecture: "Gemma4UnifiedForConditionalGeneration",
        classifier: None,
        text: "gemma4_unified_text",
    },
];

/// What the engine runs, as error messages say it.
pub(super) fn known_models() -> String {
    let text = FAMILIES.iter().map(|f| format!("{} ({})", f.model_type, f.architecture));
    let wrapped = WRAPPERS.iter().map(|w| format!("the text part of {} ({})", w.model_type, w.architecture));
    text.chain(wrapped).collect::<Vec<_>>().join(", ")
}

/// The class for sequence classification with the text model `model_type`, where there is one; `wrapped` says whether that is the
/// text part of a vision-and-text model.
pub(super) fn classifier(model_type: &str, wrapped: bool) -> Option<&'static str> {
    match wrapped {
        true => WRAPPERS.iter().find(|w| w.text == model_type)?.classifier,
        false => FAMILIES.iter().find(|f| f.model_type == model_type)?.classifier,
    }
}
