//! The shapes of published models, as their config.json has them: what benchmarks and counts are told of, without a
//! download.

use super::config::{ExpertShape, GemmaConfig, LayerShape, LayerSpec, NormPlacement};
use crate::backend::{NormSpec, RopeSpec};

/// Every published model that the engine runs, with its name; of multimodal ones the text part.
pub fn all() -> Vec<(&'static str, GemmaConfig)> {
    vec![
        ("Gemma 2B", gemma_2b()),
        ("Gemma 7B", gemma_1(3072, 28, shape(16, 16, 256, 24_576))),
        ("Gemma 2 2B", gemma_2(2304, 26, shape(8, 4, 256, 9216))),
        ("Gemma 2 9B", gemma_2(3584, 42, shape(16, 8, 256, 14_336))),
        ("Gemma 2 27B", gemma_2(4608, 46, shape(32, 16, 128, 36_864))),
        ("Gemma 3 270M", gemma_3_270m()),
        ("Gemma 3 1B", gemma_3_1b()),
        ("Gemma 3 4B", gemma_3(2560, 34, shape(8, 4, 256, 10_240), 1024)),
        ("Gemma 3 12B", gemma_3(3840, 48, shape(16, 8, 256, 15_360), 1024)),
        ("Gemma 3 27B", gemma_3(5376, 62, shape(32, 16, 128, 21_504), 1024)),
        ("Gemma 4 E2B", gemma_4_e2b()),
        ("Gemma 4 E4B", gemma_4_e(2560, 42, 6, shape(8, 2, 256, 10_240), 18, 1)),
        ("Gemma 4 12B", gemma_4(3840, 48, shape(16, 8, 256, 15_360), 1)),
        ("Gemma 4 26B-A4B", gemma_4_26b()),
        ("Gemma 4 31B", gemma_4(5376, 60, shape(32, 16, 256, 21_504), 4)),
    ]
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, intermediate: usize) -> LayerShape {
    LayerShape { heads, kv_heads, head_dim, intermediate }
}

/// Gemma 2B, the paper's model.
pub fn gemma_2b() -> GemmaConfig {
    gemma_1(2048, 18, shape(8, 1, 256, 16_384))
}

fn layer(shape: LayerShape, window: Option<usize>, theta: f64) -> LayerSpec {
    let rope = RopeSpec::new(shape.head_dim, theta);
    LayerSpec { shape, window, rope, keys_are_values: false, kv_from: None }
}

fn gemma_1(hidden_size: usize, layers: usize, shape: LayerShape) -> GemmaConfig {
    GemmaConfig {
        model_type: "gemma".into(),
        vocab_size: 256_000,
        hidden_size,
        layers: vec![layer(shape, None, 1e4); layers],
        norm: NormSpec { eps: 1e-6, offset: 1.0 },
        // 256^-1/2: `head_dim` of Gemma 1, `query_pre_attn_scalar` of most others.
        attention_scale: 0.0625,
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
    }
}

fn gemma_2(hidden_size: usize, layers: usize, shape: LayerShape) -> GemmaConfig {
    let alternating = |l: usize| layer(shape, l.is_multiple_of(2).then_some(4096), 1e4);
    GemmaConfig {
        model_type: "gemma2".into(),
        layers: (0..layers).map(alternating).collect(),
        attention_softcap: Some(50.0),
        final_softcap: Some(30.0),
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        ..gemma_1(hidden_size, layers, shape)
    }
}

/// Gemma 3 270M.
pub fn gemma_3_270m() -> GemmaConfig {
    GemmaConfig { max_positions: 32_768, ..gemma_3(640, 18, shape(4, 1, 256, 2048), 512) }
}

/// Gemma 3 1B.
pub fn gemma_3_1b() -> GemmaConfig {
    GemmaConfig { max_positions: 32_768, ..gemma_3(1152, 26, shape(4, 1, 256, 6912), 512) }
}

fn gemma_3(hidden_size: usize, layers: usize, shape: LayerShape, window: usize) -> GemmaConfig {
    GemmaConfig {
        model_type: "gemma3_text".into(),
        vocab_size: 262_144,
        layers: five_to_one(shape, window).take(layers).collect(),
        norms: NormPlacement::Sandwich,
        mlp_pre_norm: "pre_feedforward_layernorm",
        qk_norm: true,
        max_positions: 131_072,
        ..gemma_1(hidden_size, layers, shape)
    }
}

/// Gemma 3's layers: five with a window to one without, from the first on.
pub fn five_to_one(shape: LayerShape, window: usize) -> impl Iterator<Item = LayerSpec> {
    (1..).map(move |number| match number % 6 {
        0 => layer(shape, None, 1e6),
        _ => layer(shape, Some(window), 1e4),
    })
}

/// A dense Gemma 4, whose global layers have so many heads for keys, which are values as well.
fn gemma_4(hidden_size: usize, layers: usize, shape: LayerShape, global_kv: usize) -> GemmaConfig {
    let kind = |l: usize| match (l + 1).is_multiple_of(6) {
        true => global(LayerShape { kv_heads: global_kv, head_dim: 512, ..shape }, true),
        false => layer(shape, Some(1024), 1e4),
    };
    GemmaConfig {
        model_type: "gemma4_text".into(),
        layers: (0..layers).map(kind).collect(),
        norm: NormSpec { eps: 1e-6, offset: 0.0 },
        attention_scale: 1.0,
        final_softcap: Some(30.0),
        value_norm: true,
        layer_scalars: true,
        max_positions: 262_144,
        eos_tokens: vec![1, 106, 50],
        ..gemma_3(hidden_size, layers, shape, 1024)
    }
}

/// Gemma 4 26B-A4B.
pub fn gemma_4_26b() -> GemmaConfig {
    let experts = Some(ExpertShape { count: 128, per_token: 8, width: 704 });
    GemmaConfig { experts, ..gemma_4(2816, 30, shape(16, 8, 256, 2112), 2) }
}

/// A global layer of Gemma 4, of whose pairs a quarter turns.
fn global(shape: LayerShape, keys_are_values: bool) -> LayerSpec {
    let all = layer(shape, None, 1e6);
    LayerSpec { rope: RopeSpec { pairs: shape.head_dim / 8, ..all.rope }, keys_are_values, ..all }
}

/// Gemma 4 E2B.
pub fn gemma_4_e2b() -> GemmaConfig {
    gemma_4_e(1536, 35, 5, shape(8, 1, 256, 6144), 20, 2)
}

/// A Gemma 4 with per-layer embeddings: every `period`th layer is global, and the last `sharing` read the keys and values of
/// the last of their kind before them, with MLPs `wider` times as wide.
fn gemma_4_e(
    hidden_size: usize,
    layers: usize,
    period: usize,
    shape: LayerShape,
    sharing: usize,
    wider: usize,
) -> GemmaConfig {
    let mut all: Vec<LayerSpec> = (1..=layers)
        .map(|number| match number.is_multiple_of(period) {
            true => global(LayerShape { head_dim: 512, ..shape }, false),
            false => layer(shape, Some(512), 1e4),
        })
        .collect();
    let (own, readers) = all.split_at_mut(layers - sharing);
    for reader in readers {
        reader.kv_from = own.iter().rposition(|other| other.window == reader.window);
        reader.shape.intermediate *= wider;
    }
    GemmaConfig {
        layers: all,
        per_layer_width: 256,
        max_positions: 131_072,
        ..gemma_4(hidden_size, layers, shape, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemma::params::plan;

    /// Parameters, in millions, as they were published; of multimodal models those of the text part. E2B and E4B are said to
    /// have so many effective ones, in round numbers, without all that belongs to per-layer embeddings.
    #[test]
    fn models_have_the_parameters_that_their_names_say() {
        let published = [
            2506, 8538, 2614, 9242, 27_227, 268, 1000, 3880, 11_766, 27_009, 2300, 4500, 11_900, 25_200,
            30_700,
        ];
        for ((name, config), millions) in all().into_iter().zip(published) {
            let count: usize = plan(&config).tensors().iter().map(|spec| spec.rows * spec.cols).sum();
            let off = count as f64 / 1e6 / f64::from(millions) - 1.0;
            let round = if config.per_layer_width == 0 { 0.02 } else { 0.04 };
            assert!(off.abs() < round, "{name}: {count} parameters, published {millions} million");
        }
        let e2b = gemma_4_e2b();
        let from: Vec<_> = [13, 14, 15, 19, 34].map(|l: usize| e2b.layers[l].kv_from).to_vec();
        assert_eq!(from, [None, None, Some(13), Some(14), Some(14)]);
    }
}
