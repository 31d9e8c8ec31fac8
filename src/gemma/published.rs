//! The shapes of published models, as their config.json has them: what benchmarks and counts are told of, without a
//! download.

use super::config::{GemmaConfig, LayerShape, LayerSpec, NormPlacement};
use crate::backend::{NormSpec, RopeSpec};

/// Gemma 2B, the paper's model.
pub fn gemma_2b() -> GemmaConfig {
    let shape = LayerShape { heads: 8, kv_heads: 1, head_dim: 256, intermediate: 16_384 };
    GemmaConfig {
        model_type: "gemma".into(),
        vocab_size: 256_000,
        hidden_size: 2048,
        layers: vec![
            LayerSpec { shape, window: None, rope: RopeSpec::new(256, 1e4), keys_are_values: false };
            18
        ],
        norm: NormSpec { eps: 1e-6, offset: 1.0 },
        // 256^-1/2: `head_dim` of Gemma 2B, `query_pre_attn_scalar` of Gemma 3 270M and 1B.
        attention_scale: 0.0625,
        attention_softcap: None,
        final_softcap: None,
        norms: NormPlacement::Pre,
        mlp_pre_norm: "post_attention_layernorm",
        qk_norm: false,
        value_norm: false,
        layer_scalars: false,
        max_positions: 8192,
        eos_tokens: vec![1],
        bos_token: 2,
    }
}

/// Gemma 3 270M.
pub fn gemma_3_270m() -> GemmaConfig {
    gemma_3(640, 2048, 18)
}

/// Gemma 3 1B.
pub fn gemma_3_1b() -> GemmaConfig {
    gemma_3(1152, 6912, 26)
}

fn gemma_3(hidden_size: usize, intermediate: usize, layers: usize) -> GemmaConfig {
    let shape = LayerShape { heads: 4, kv_heads: 1, head_dim: 256, intermediate };
    GemmaConfig {
        model_type: "gemma3_text".into(),
        vocab_size: 262_144,
        hidden_size,
        layers: five_to_one(shape, 512).take(layers).collect(),
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        qk_norm: true,
        max_positions: 32_768,
        ..gemma_2b()
    }
}

/// Gemma 3's layers: five with a window to one without, from the first on.
pub fn five_to_one(shape: LayerShape, window: usize) -> impl Iterator<Item = LayerSpec> {
    let layer = move |window, theta| LayerSpec {
        shape,
        window,
        rope: RopeSpec::new(shape.head_dim, theta),
        keys_are_values: false,
    };
    (1..).map(move |number| if number % 6 == 0 { layer(None, 1e6) } else { layer(Some(window), 1e4) })
}
