//! config.json in every spelling that Transformers has written, and what must be refused. Expected values are what
//! Transformers 5.23 makes of the same JSON.

use bon_engine::backend::{DType, NormSpec, RopeSpec, Routing};
use bon_engine::gemma::config::{
    ConfigError, ConfigFile, ExpertShape, GemmaConfig, LayerShape, LayerSpec, NormPlacement,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn open(config: &Value, generation: Option<&Value>) -> Result<ConfigFile, ConfigError> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    if let Some(generation) = generation {
        std::fs::write(dir.path().join("generation_config.json"), generation.to_string()).unwrap();
    }
    ConfigFile::open(dir.path())
}

fn gemma(config: Value) -> GemmaConfig {
    open(&config, None).unwrap().gemma
}

/// The whole chain, as `main` prints it.
fn refusal(config: &Value) -> String {
    format!("{:#}", anyhow::Error::from(open(config, None).expect_err(&config.to_string())))
}

/// The shape that absent fields mean in Gemma 1.
const GEMMA_1: LayerShape = LayerShape { heads: 16, kv_heads: 16, head_dim: 256, intermediate: 24_576 };

/// A layer of the shape that absent fields mean in Gemma 2 and 3.
fn layer(window: Option<usize>, theta: f64, factor: f64) -> LayerSpec {
    let shape = LayerShape { heads: 8, kv_heads: 4, head_dim: 256, intermediate: 9216 };
    LayerSpec {
        shape,
        window,
        rope: RopeSpec { factor, ..RopeSpec::new(256, theta) },
        keys_are_values: false,
        kv_from: None,
    }
}

/// The layer with other widths.
fn shaped(layer: LayerSpec, shape: LayerShape) -> LayerSpec {
    let rope = RopeSpec { head_dim: shape.head_dim, pairs: shape.head_dim / 2, ..layer.rope };
    LayerSpec { shape, rope, ..layer }
}

fn merged(mut base: Value, changes: Value) -> Value {
    base.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    base
}

#[test]
fn absent_fields_have_transformers_defaults() {
    let one = gemma(json!({ "model_type": "gemma" }));
    let expected = GemmaConfig {
        model_type: "gemma".into(),
        vocab_size: 256_000,
        hidden_size: 3072,
        layers: vec![shaped(layer(None, 1e4, 1.0), GEMMA_1); 28],
        norm: NormSpec { eps: 1e-6, offset: 1.0 },
        attention_scale: 1.0 / 16.0,
        attention_softcap: None,
        final_softcap: None,
        norms: NormPlacement::Pre,
        mlp_pre_norm: "post_attention_layernorm",
        qk_norm: false,
        value_norm: false,
        layer_scalars: false,
        per_layer_width: 0,
        trains_per_layer_embed: false,
        experts: None,
        max_positions: 8192,
        eos_tokens: vec![1],
        bos_token: 2,
        tied: true,
        score_head: false,
    };
    assert_eq!(one, expected);

    let alternating = |i| layer((i % 2 == 0).then_some(4096), 1e4, 1.0);
    let expected = GemmaConfig {
        model_type: "gemma2".into(),
        hidden_size: 2304,
        layers: (0..26).map(alternating).collect(),
        attention_softcap: Some(50.0),
        final_softcap: Some(30.0),
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        ..expected
    };
    assert_eq!(gemma(json!({ "model_type": "gemma2" })), expected);

    let every_sixth = |i| if i % 6 == 5 { layer(None, 1e6, 1.0) } else { layer(Some(4096), 1e4, 1.0) };
    let expected = GemmaConfig {
        model_type: "gemma3_text".into(),
        vocab_size: 262_208,
        layers: (0..26).map(every_sixth).collect(),
        attention_softcap: None,
        final_softcap: None,
        qk_norm: true,
        max_positions: 131_072,
        ..expected
    };
    assert_eq!(gemma(json!({ "model_type": "gemma3_text" })), expected);
}

#[test]
fn every_field_is_read() {
    let config = gemma(json!({
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": 131, "hidden_size": 40,
        "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
        "head_dim": 10, "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 7.0,
        "final_logit_softcapping": null, "sliding_window": 9, "rope_theta": 77.0,
        "layer_types": ["full_attention", "full_attention", "sliding_attention"],
        "eos_token_id": [3, 5], "bos_token_id": 4,
    }));
    let shape = LayerShape { heads: 6, kv_heads: 3, head_dim: 10, intermediate: 56 };
    let expected = GemmaConfig {
        model_type: "gemma2".into(),
        vocab_size: 131,
        hidden_size: 40,
        layers: [None, None, Some(9)].map(|window| shaped(layer(window, 77.0, 1.0), shape)).to_vec(),
        norm: NormSpec { eps: 1e-5, offset: 1.0 },
        attention_scale: 0.5,
        attention_softcap: Some(7.0),
        final_softcap: None,
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        qk_norm: false,
        value_norm: false,
        layer_scalars: false,
        per_layer_width: 0,
        trains_per_layer_embed: false,
        experts: None,
        max_positions: 64,
        eos_tokens: vec![3, 5],
        bos_token: 4,
        tied: true,
        score_head: false,
    };
    assert_eq!(config, expected);
}

#[test]
fn rope_in_both_spellings() {
    let base = |family: &str| json!({ "model_type": family, "num_hidden_layers": 2 });
    let layers = |family: &str, changes: Value| gemma(merged(base(family), changes)).layers;

    let flat = |theta, factor| vec![shaped(layer(None, theta, factor), GEMMA_1); 2];
    assert_eq!(layers("gemma", json!({ "rope_theta": 3.0, "rope_scaling": null })), flat(3.0, 1.0));
    assert_eq!(
        layers("gemma", json!({ "rope_theta": 7.0, "rope_scaling": { "type": "linear", "factor": 2.0 } })),
        flat(7.0, 2.0)
    );
    assert_eq!(
        layers("gemma", json!({ "rope_parameters": { "rope_theta": 5.0 }, "rope_scaling": {} })),
        flat(5.0, 1.0)
    );
    let both = json!({ "rope_parameters": { "rope_type": "linear", "factor": 3.0, "rope_theta": 5.0 }, "rope_theta": 6.0 });
    assert_eq!(layers("gemma2", both), [layer(Some(4096), 5.0, 3.0), layer(None, 5.0, 3.0)]);

    let old = json!({
        "rope_theta": 11.0, "rope_local_base_freq": 13.0, "sliding_window_pattern": 2, "sliding_window": 5,
        "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
    });
    assert_eq!(layers("gemma3_text", old), [layer(Some(5), 13.0, 1.0), layer(None, 11.0, 8.0)]);
    let new = json!({
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5, "rope_theta": 11.0,
        "rope_parameters": {
            "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 21.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 22.0 },
        },
    });
    assert_eq!(layers("gemma3_text", new), [layer(None, 21.0, 8.0), layer(Some(5), 22.0, 1.0)]);
    // The base may be left to the old field, and a layer type may be left out.
    let mixed = json!({
        "rope_parameters": { "full_attention": { "rope_type": "default" } }, "rope_theta": 11.0,
        "sliding_window_pattern": 2,
    });
    assert_eq!(layers("gemma3_text", mixed), [layer(Some(4096), 1e4, 1.0), layer(None, 11.0, 1.0)]);
}

#[test]
fn only_local_layers_need_a_window() {
    let config = gemma(json!({
        "model_type": "gemma3_text", "num_hidden_layers": 1, "layer_types": ["full_attention"], "sliding_window": null,
    }));
    assert_eq!(config.layers, [layer(None, 1e6, 1.0)]);
    let problem = refusal(&json!({ "model_type": "gemma3_text", "sliding_window": null }));
    assert!(problem.contains("config.json: sliding_window: expected an integer"), "{problem}");
}

#[test]
fn gemma_1_calls_the_tanh_gelu_gelu() {
    gemma(json!({ "model_type": "gemma", "hidden_act": "gelu" }));
    let problem = refusal(&json!({ "model_type": "gemma2", "hidden_activation": "gelu" }));
    assert!(problem.contains("hidden_activation = \"gelu\" is not supported"), "{problem}");
}

#[test]
fn end_tokens_are_the_union_of_both_files() {
    let config = json!({ "model_type": "gemma3_text", "eos_token_id": 1 });
    let eos = |generation: Value| open(&config, Some(&generation)).map(|c| c.gemma.eos_tokens);
    assert_eq!(eos(json!({ "eos_token_id": [1, 106] })).unwrap(), [1, 106]);
    assert_eq!(eos(json!({ "temperature": 1.0 })).unwrap(), [1]);
    let problem = eos(json!({ "eos_token_id": 262_208 })).unwrap_err().to_string();
    assert!(problem.contains("generation_config.json: eos_token_id: expected token ids below"), "{problem}");
    let none = json!({ "model_type": "gemma3_text", "eos_token_id": null });
    assert_eq!(open(&none, Some(&json!({ "eos_token_id": 7 }))).unwrap().gemma.eos_tokens, [7]);
    assert!(refusal(&none).contains("config.json: eos_token_id: neither here nor in generation_config.json"));
}

#[test]
fn saving_changes_the_dtype_alone() {
    let old =
        json!({ "zeta": 1e-6, "model_type": "gemma", "torch_dtype": "float16", "alpha": [1, { "b": null }] });
    let file = open(&old, None).unwrap();
    let saved: Value = serde_json::from_str(&file.to_json(DType::Bf16)).unwrap();
    assert_eq!(saved, merged(old.clone(), json!({ "torch_dtype": "bfloat16" })));
    let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&saved), keys(&old), "the order of fields stays");

    let new = json!({ "model_type": "gemma", "dtype": "bfloat16" });
    let saved: Value = serde_json::from_str(&open(&new, None).unwrap().to_json(DType::F32)).unwrap();
    assert_eq!(saved, json!({ "model_type": "gemma", "dtype": "float32" }));
}

#[test]
fn other_models_are_named() {
    for (config, expected) in [
        (json!({}), "a configuration without model_type is not a Gemma"),
        (json!({ "model_type": "llama" }), "model_type \"llama\" is not a Gemma"),
        (json!({ "model_type": "gemma3n_text" }), "model_type \"gemma3n_text\" is not a Gemma"),
        (json!({ "model_type": 3 }), "model_type 3 is not a Gemma"),
        (json!({ "model_type": "gemma3" }), "text_config: missing; it describes the text model"),
        (
            json!({ "model_type": "gemma3", "text_config": { "model_type": "gemma2" } }),
            "text_config.model_type: expected \"gemma3_text\", found \"gemma2\"",
        ),
        (
            json!({ "model_type": "gemma3", "architectures": ["Gemma3TextForSequenceClassification"], "text_config": {} }),
            "the text part of gemma3 (Gemma3ForConditionalGeneration)",
        ),
        (json!({ "model_type": "diffusion_gemma" }), "model_type \"diffusion_gemma\" is not a Gemma"),
        (json!({ "model_type": "t5gemma2" }), "model_type \"t5gemma2\" is not a Gemma"),
        (
            json!({ "model_type": "gemma2", "architectures": ["Gemma2ForTokenClassification"] }),
            "architectures [\"Gemma2ForTokenClassification\"] is not a Gemma",
        ),
        (
            json!({ "model_type": "vaultgemma", "architectures": ["VaultGemmaForSequenceClassification"] }),
            "architectures",
        ),
        (json!({ "model_type": "gemma2", "architectures": ["GemmaForCausalLM"] }), "architectures"),
    ] {
        let problem = refusal(&config);
        assert!(problem.contains("config.json: ") && problem.contains(expected), "{problem}");
    }
}

/// Gemma 3 4B as it is published: what equals a default is left out, and end tokens stand outside.
#[test]
fn a_wrapper_describes_its_text_model() {
    let published = json!({
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10_240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": { "model_type": "siglip_vision_model", "hidden_size": 1152 },
    });
    let file = open(&published, None).unwrap();
    let shape = LayerShape { heads: 8, kv_heads: 4, head_dim: 256, intermediate: 10_240 };
    let numbered = |number| match number % 6 {
        0 => shaped(layer(None, 1e6, 8.0), shape),
        _ => shaped(layer(Some(1024), 1e4, 1.0), shape),
    };
    let expected = GemmaConfig {
        hidden_size: 2560,
        layers: (1..=34).map(numbered).collect(),
        eos_tokens: vec![1, 106],
        ..gemma(json!({ "model_type": "gemma3_text" }))
    };
    assert!(file.wrapped);
    assert_eq!(file.gemma, expected);
    assert!(!open(&json!({ "model_type": "gemma3_text" }), None).unwrap().wrapped);

    // Both say the dtype, if both did.
    let said = merged(published.clone(), json!({ "text_config": { "dtype": "bfloat16" } }));
    for (json, inner) in [(published, json!(null)), (said, json!("float32"))] {
        let saved: Value = serde_json::from_str(&open(&json, None).unwrap().to_json(DType::F32)).unwrap();
        assert_eq!((&saved["torch_dtype"], &saved["text_config"]["dtype"]), (&json!("float32"), &inner));
        assert_eq!(saved["vision_config"], json["vision_config"]);
    }
    // What would be ignored is refused in either place.
    for text in [json!({ "attention_bias": true }), json!({ "tie_word_embeddings": false })] {
        let problem = refusal(&json!({ "model_type": "gemma3", "text_config": text }));
        assert!(problem.contains("text_config."), "{problem}");
    }
    for (field, value) in
        [("quantization_config", json!({ "bits": 4 })), ("tie_word_embeddings", json!(false))]
    {
        let problem = refusal(&json!({ "model_type": "gemma3", "text_config": {}, field: value }));
        assert!(problem.contains(&format!("config.json: {field}")), "{problem}");
    }
    let problem = refusal(&json!({ "model_type": "gemma3_text", "tie_word_embeddings": "no" }));
    assert!(problem.contains("config.json: tie_word_embeddings: expected true or false"), "{problem}");
}

/// Gemma 4 12B as published (`global_head_dim`), and as Transformers writes it again (`per_layer_config`).
#[test]
fn gemma_4_in_both_spellings() {
    let text = |widths: Value| {
        let base = json!({
            "model_type": "gemma4_unified_text", "attention_k_eq_v": true, "final_logit_softcapping": 30.0,
            "hidden_size": 3840, "intermediate_size": 15_360, "num_attention_heads": 16, "num_hidden_layers": 8,
            "num_key_value_heads": 8, "use_bidirectional_attention": "vision",
        });
        merged(base, widths)
    };
    let wrapper = |widths: Value| {
        json!({
            "architectures": ["Gemma4UnifiedForConditionalGeneration"], "model_type": "gemma4_unified",
            "eos_token_id": [1, 106, 50], "text_config": text(widths),
        })
    };
    let local = LayerShape { heads: 16, kv_heads: 8, head_dim: 256, intermediate: 15_360 };
    let global = LayerShape { kv_heads: 1, head_dim: 512, ..local };
    let of_local = shaped(layer(Some(1024), 1e4, 1.0), local);
    let of_global = LayerSpec {
        shape: global,
        window: None,
        rope: RopeSpec { head_dim: 512, pairs: 64, theta: 1e6, factor: 1.0 },
        keys_are_values: true,
        kv_from: None,
    };
    let layers: Vec<LayerSpec> =
        (0..8).map(|l| if [5, 7].contains(&l) { of_global } else { of_local }).collect();
    let expected = GemmaConfig {
        model_type: "gemma4_unified_text".into(),
        vocab_size: 262_144,
        hidden_size: 3840,
        layers,
        norm: NormSpec { eps: 1e-6, offset: 0.0 },
        attention_scale: 1.0,
        attention_softcap: None,
        final_softcap: Some(30.0),
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        qk_norm: true,
        value_norm: true,
        layer_scalars: true,
        per_layer_width: 0,
        trains_per_layer_embed: false,
        experts: None,
        max_positions: 262_144,
        eos_tokens: vec![1, 106, 50],
        bos_token: 2,
        tied: true,
        score_head: false,
    };
    let wide = json!({ "head_dim": 512, "num_key_value_heads": 1 });
    for widths in [
        json!({ "global_head_dim": 512, "num_global_key_value_heads": 1 }),
        json!({ "num_global_key_value_heads": 1 }),
        json!({ "per_layer_config": { "05": wide, "7": wide } }),
    ] {
        let file = open(&wrapper(widths), None).unwrap();
        assert!(file.wrapped);
        assert_eq!(file.gemma, expected);
    }
    // Where both are there, the newer spelling counts.
    let both = json!({ "global_head_dim": 128, "per_layer_config": { "05": wide, "07": wide } });
    assert_eq!(gemma(text(both)).layers, expected.layers);
    // It is there, and says nothing.
    let none = gemma(text(json!({ "global_head_dim": 128, "per_layer_config": null }))).layers[7];
    assert_eq!((none.shape, none.keys_are_values), (local, true));
    // Without k == v, global layers have as many heads for keys as local ones.
    let own = json!({ "attention_k_eq_v": false, "num_global_key_value_heads": 1 });
    let layer = gemma(text(own)).layers[7];
    assert_eq!((layer.shape.kv_heads, layer.keys_are_values), (8, false));

    // RoPE by type of layer, and the window, of the other kind of text model.
    let changed = json!({
        "model_type": "gemma4_text", "hidden_size_per_layer_input": null,
        "rope_parameters": {
            "full_attention": { "rope_type": "proportional", "rope_theta": 5e4, "partial_rotary_factor": 0.4, "factor": 2.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5 },
        },
    });
    let layers = gemma(text(changed.clone())).layers;
    assert_eq!(layers[7].rope, RopeSpec { head_dim: 512, pairs: 102, theta: 5e4, factor: 2.0 });
    // The share of pairs may stand beside, and `type` for `rope_type`.
    let mut beside = merged(changed, json!({ "partial_rotary_factor": 0.5 }));
    let full = json!({ "type": "proportional", "rope_theta": 5e4 });
    beside["rope_parameters"]["full_attention"] = full;
    assert_eq!(gemma(text(beside)).layers[7].rope.pairs, 128);
    // End tokens of the text part and of the whole.
    let mut ends = wrapper(json!({}));
    ends["text_config"]["eos_token_id"] = json!(1);
    assert_eq!(open(&ends, None).unwrap().gemma.eos_tokens, [1, 106, 50]);
    assert_eq!((layers[0].rope, layers[0].window), (RopeSpec::new(256, 300.0), Some(512)));

    // The last layers read the keys and values of the last of their kind before them.
    let sharing =
        json!({ "num_kv_shared_layers": 3, "use_double_wide_mlp": true, "attention_k_eq_v": false });
    let layers = gemma(text(merged(sharing, json!({ "num_hidden_layers": 10 })))).layers;
    let from: Vec<Option<usize>> = layers.iter().map(|layer| layer.kv_from).collect();
    assert_eq!(from, [None, None, None, None, None, None, None, Some(6), Some(6), Some(5)]);
    let widths: Vec<usize> = layers.iter().map(|layer| layer.shape.intermediate / 15_360).collect();
    assert_eq!(widths, [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]);

    // Experts, where they are switched on.
    let experts = |changes: Value| {
        let some = json!({
            "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "enable_moe_block": true, "num_experts": 6,
            "top_k_experts": 2, "moe_intermediate_size": 20,
        });
        merged(some, changes)
    };
    let shape = ExpertShape { count: 6, per_token: 2, width: 20 };
    assert_eq!(gemma(text(experts(json!({})))).experts, Some(shape));
    let routing = Routing { experts: 6, top: 2, scale: 0.125 };
    assert_eq!(gemma(text(experts(json!({ "hidden_size": 64 })))).routing(), Some(routing));
    assert_eq!(gemma(text(experts(json!({ "enable_moe_block": false })))).experts, None);
    for (changes, expected) in [
        (json!({ "num_experts": null }), "num_experts: missing; enable_moe_block needs it"),
        (json!({ "top_k_experts": 7 }), "top_k_experts: expected an integer from 1 to 6, found 7"),
        (json!({ "moe_intermediate_size": 0 }), "moe_intermediate_size: expected an integer from 1"),
        (
            json!({ "moe_intermediate_size": 1 << 20 }),
            "moe_intermediate_size: 2 x 1048576 x num_experts = 6 exceeds",
        ),
        (json!({ "enable_moe_block": 1 }), "enable_moe_block: expected true or false"),
    ] {
        let problem = refusal(&text(experts(changes)));
        assert!(problem.contains(&format!("config.json: {expected}")), "{problem}");
    }

    let problem = refusal(&wrapper(json!({ "global_head_dim": 7 })));
    assert!(problem.contains("config.json: text_config.global_head_dim: 7 is odd"), "{problem}");
}

#[test]
fn what_the_engine_would_ignore_is_refused() {
    for (family, field, value) in [
        ("gemma", "attention_bias", json!(true)),
        ("gemma", "use_bidirectional_attention", json!(true)),
        ("gemma3_text", "use_bidirectional_attention", json!("all")),
        ("gemma2", "quantization_config", json!({ "bits": 4 })),
        ("gemma", "hidden_act", json!("silu")),
        ("gemma2", "hidden_activation", json!(null)),
        ("gemma3_text", "attn_logit_softcapping", json!(50.0)),
        ("gemma", "rope_scaling.rope_type", json!("yarn")),
        ("gemma", "rope_scaling.type", json!("dynamic")),
        ("gemma2", "rope_parameters.rope_type", json!("llama3")),
        ("gemma2", "rope_parameters.partial_rotary_factor", json!(0.5)),
        ("gemma3_text", "rope_scaling.rope_type", json!("longrope")),
        ("gemma3_text", "rope_parameters.sliding_attention.rope_type", json!(null)),
        ("gemma4_text", "use_bidirectional_attention", json!("all")),
        ("gemma4_text", "attn_logit_softcapping", json!(50.0)),
        ("gemma4_text", "per_layer_config.03.intermediate_size", json!(2)),
        ("gemma4_text", "per_layer_config.3.skip", json!(["mlp"])),
        ("gemma4_unified_text", "rope_parameters.full_attention.rope_type", json!("linear")),
    ] {
        let mut fields = nested(field, value);
        if family == "gemma4_text" {
            fields["hidden_size_per_layer_input"] = json!(0);
        }
        if let Some(of_type) = fields.get_mut("rope_parameters").filter(|_| family.starts_with("gemma4")) {
            of_type["sliding_attention"] = json!({ "rope_type": "default" });
        }
        let problem = refusal(&merged(json!({ "model_type": family }), fields));
        let expected = format!("config.json: {field} = ");
        assert!(problem.contains(&expected) && problem.contains("is not supported: "), "{problem}");
    }
}

/// A later version of a family may have what this one has not.
#[test]
fn settings_of_layers_that_nobody_knows_are_refused() {
    for (family, field, value) in [
        ("gemma", "norm_type", json!("layernorm")),
        ("gemma2", "is_encoder_decoder", json!(true)),
        ("gemma3_text", "num_kv_shared_layers", json!(4)),
        ("gemma3_text", "qk_norm_eps", json!(1e-5)),
        ("gemma3_text", "altup_num_inputs", json!(4)),
        ("gemma3_text", "logits_scaling", json!(8.0)),
        ("gemma4_text", "mlp_layer_types", json!(["dense", "sparse"])),
        ("gemma4_text", "attention_sinks", json!(4)),
        ("gemma4_text", "num_shared_experts", json!(1)),
        ("gemma4_text", "post_norm", json!("rms")),
        ("gemma4_unified_text", "enable_moe_block", json!(true)),
        ("gemma4_unified_text", "hidden_size_per_layer_input", json!(256)),
    ] {
        let base = json!({ "model_type": family });
        let problem = refusal(&merged(base.clone(), json!({ field: value })));
        let told = format!("config.json: {field} = {value} is not supported: the engine does not know");
        assert!(problem.contains(&told), "{problem}");
        // Switched off, it is as if it were not there.
        for nothing in [json!(null), json!(false), json!(0), json!(""), json!([]), json!({})] {
            let fields = merged(base.clone(), json!({ field: nothing }));
            assert_eq!(gemma(fields), gemma(base.clone()), "{field}");
        }
    }
    let inside = json!({ "model_type": "gemma4", "text_config": { "model_type": "gemma4_text", "router_bias": true } });
    assert!(refusal(&inside).contains("config.json: text_config.router_bias = true is not supported: "));
    // Of what changes nothing, or is no setting of layers, nothing is said.
    let more = json!({
        "_attn_implementation_autoset": true, "attention_dropout": 0.1, "output_attentions": true, "use_cache": true,
        "unsloth_fixed": true, "transformers_version": "9.0",
    });
    let base = json!({ "model_type": "gemma3_text" });
    assert_eq!(gemma(merged(base.clone(), more)), gemma(base));
}

#[test]
fn nonsense_names_file_and_field() {
    for (family, field, value) in [
        ("gemma", "vocab_size", json!(0)),
        ("gemma", "vocab_size", json!(1u64 << 40)),
        ("gemma2", "hidden_size", json!(-3)),
        ("gemma2", "hidden_size", json!(640.5)),
        ("gemma2", "intermediate_size", json!("9216")),
        ("gemma2", "num_hidden_layers", json!(1_000_000)),
        ("gemma3_text", "num_attention_heads", json!(0)),
        ("gemma3_text", "num_attention_heads", json!(u64::MAX)),
        ("gemma3_text", "num_key_value_heads", json!(3)),
        ("gemma3_text", "head_dim", json!(255)),
        ("gemma3_text", "head_dim", json!(1 << 21)),
        ("gemma3_text", "max_position_embeddings", json!((1 << 18) + 1)),
        ("gemma3_text", "rms_norm_eps", json!(0.0)),
        ("gemma3_text", "rms_norm_eps", json!(1e-60)),
        ("gemma3_text", "query_pre_attn_scalar", json!(-1)),
        ("gemma3_text", "query_pre_attn_scalar", json!(1e300)),
        ("gemma2", "attn_logit_softcapping", json!(0.0)),
        ("gemma2", "final_logit_softcapping", json!("no")),
        ("gemma2", "sliding_window", json!(0)),
        ("gemma3_text", "sliding_window_pattern", json!(0)),
        ("gemma2", "layer_types", json!(["full_attention"])),
        ("gemma2", "layer_types", json!("full_attention")),
        ("gemma2", "bos_token_id", json!(null)),
        ("gemma2", "bos_token_id", json!([2, 3])),
        ("gemma2", "bos_token_id", json!(-1)),
        ("gemma2", "eos_token_id", json!([1, 256_000])),
        ("gemma", "rope_theta", json!("big")),
        ("gemma", "rope_scaling", json!(2.0)),
        ("gemma2", "rope_parameters", json!({ "full_attention": { "rope_type": "default" } })),
        ("gemma3_text", "rope_parameters", json!({ "rope_type": "default", "rope_theta": 1e6 })),
        ("gemma3_text", "rope_scaling.type", json!("linear")),
        ("gemma3_text", "rope_scaling.factor", json!(0)),
        ("gemma3_text", "rope_parameters.sliding_attention", json!([])),
        ("gemma4_text", "hidden_size_per_layer_input", json!(-1)),
        ("gemma4_text", "vocab_size_per_layer_input", json!(1000)),
        // All of them, and all but the only global layer before the last.
        ("gemma4_unified_text", "num_kv_shared_layers", json!(30)),
        ("gemma4_unified_text", "num_kv_shared_layers", json!(25)),
        ("gemma4_unified_text", "use_double_wide_mlp", json!(2)),
        ("gemma4_unified_text", "attention_k_eq_v", json!("yes")),
        ("gemma4_unified_text", "global_head_dim", json!(0)),
        ("gemma4_unified_text", "per_layer_config", json!([])),
        ("gemma4_unified_text", "per_layer_config.30", json!({})),
        ("gemma4_unified_text", "per_layer_config.5.num_key_value_heads", json!(3)),
        ("gemma4_unified_text", "num_kv_shared_layers", json!(-1)),
        ("gemma4_unified_text", "rope_parameters.full_attention", json!(null)),
        ("gemma4_unified_text", "rope_parameters.sliding_attention", json!([])),
    ] {
        let mut fields = nested(field, value);
        if field == "rope_scaling.factor" {
            fields["rope_scaling"]["rope_type"] = json!("linear");
        }
        if field == "rope_parameters.full_attention" {
            fields["rope_parameters"]["sliding_attention"] = json!({ "rope_type": "default" });
        }
        let problem = refusal(&merged(json!({ "model_type": family }), fields));
        assert!(problem.contains(&format!("config.json: {field}: ")), "{field}: {problem}");
    }
    let problem = refusal(&json!({
        "model_type": "gemma2", "num_hidden_layers": 2, "layer_types": ["full_attention", "chunked_attention"],
    }));
    assert!(problem.contains("config.json: layer_types[1]: \"chunked_attention\" is neither"), "{problem}");
}

/// `a.b.c` as objects within objects.
fn nested(field: &str, value: Value) -> Value {
    field.rsplit('.').fold(value, |inner, key| json!({ key: inner }))
}

#[test]
fn files_that_are_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.json");
    let problem = || format!("{:#}", anyhow::Error::from(ConfigFile::open(dir.path()).unwrap_err()));
    assert!(problem().starts_with(&format!("cannot read {}: No such file", path.display())), "{}", problem());
    for bytes in
        [&b""[..], b"[1]", b"{\"model_type\": \"gemma\"", b"{\"model_type\": \"\xff\"}", &b"[".repeat(9999)]
    {
        std::fs::write(&path, bytes).unwrap();
        assert!(problem().contains("config.json: not a JSON object: "), "{}", problem());
    }
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    assert!(
        problem().contains("config.json: 1099511627776 bytes, and such a file has at most"),
        "{}",
        problem()
    );
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert!(problem().contains("config.json: not a regular file"), "{}", problem());
}

proptest! {
    #[test]
    fn no_value_of_any_field_panics(
        family in prop::sample::select(vec!["gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text"]),
        fields in prop::collection::vec((
            prop::sample::select(vec![
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "layer_types",
                "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window",
                "sliding_window_pattern", "rope_theta", "rope_local_base_freq", "rope_scaling", "rope_parameters",
                "eos_token_id", "bos_token_id", "architectures", "hidden_act", "hidden_activation",
                "hidden_size_per_layer_input", "global_head_dim", "per_layer_config", "attention_k_eq_v",
                "num_kv_shared_layers", "enable_moe_block", "num_experts", "top_k_experts", "moe_intermediate_size",
            ]),
            prop_oneof![
                Just(json!(null)), Just(json!({})), Just(json!([])), Just(json!("linear")), Just(json!(1e308)),
                any::<u64>().prop_map(|n| json!(n)), (0u64..20).prop_map(|n| json!(n)),
                any::<f64>().prop_map(|x| json!(x)), Just(json!(["full_attention"])),
                Just(json!({ "rope_type": "linear", "factor": 1e-40 })), Just(json!(0)), Just(json!(true)),
                (0u64..20).prop_map(|n| json!({ n.to_string(): { "head_dim": n } })),
                Just(json!({ "full_attention": null, "sliding_attention": { "type": 1 } })),
            ],
        ), 0..6),
    ) {
        let mut config = json!({ "model_type": family });
        for (field, value) in fields {
            config[field] = value;
        }
        if let Ok(file) = open(&config, None) {
            let c = file.gemma;
            prop_assert!(!c.layers.is_empty());
            for LayerShape { heads, kv_heads, head_dim, .. } in c.layers.iter().map(|layer| layer.shape) {
                prop_assert!(heads % kv_heads == 0 && head_dim % 2 == 0);
            }
            prop_assert!(c.attention_scale > 0.0 && c.attention_scale.is_finite());
        }
    }
}

/// What Transformers' sequence classifiers are called says that a model scores responses.
#[test]
fn classifiers_are_reward_models() {
    for (model_type, architecture) in [
        ("gemma", "GemmaForSequenceClassification"),
        ("gemma2", "Gemma2ForSequenceClassification"),
        ("gemma3_text", "Gemma3TextForSequenceClassification"),
        ("gemma3", "Gemma3ForSequenceClassification"),
    ] {
        let mut json = json!({ "model_type": model_type, "num_labels": 2 });
        if model_type == "gemma3" {
            json["text_config"] = json!({});
        }
        let base = gemma(json.clone());
        json["architectures"] = json!([architecture]);
        let scores = gemma(json.clone());
        assert!(!base.score_head && scores.score_head, "{model_type}");
        assert_eq!(GemmaConfig { score_head: false, ..scores }, base);
    }
}
