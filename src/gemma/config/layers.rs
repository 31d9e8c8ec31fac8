//! Decoder layers: which are local, their widths, their RoPE, and whose keys and values they read.

use serde_json::Value;

use super::families::{Family, Ropes};
use super::fields::{ConfigError, Fields, MAX_WIDTH, brief};
use super::rope::ropes;
use super::{GLOBAL, LOCAL, LayerShape, LayerSpec};

/// Bound on the number of layers, so that no product of sizes overflows 64 bits.
const MAX_LAYERS: usize = 1 << 12;

/// Settings of single layers.
const PER_LAYER: &str = "per_layer_config";

/// Which layers are local, with their window, and every layer's widths and RoPE.
pub(super) fn layers(
    json: &Fields,
    family: &Family,
    shape: LayerShape,
) -> Result<Vec<LayerSpec>, ConfigError> {
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
    let (local_rope, global_rope) = ropes(json, family.rope)?;
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
            let problem =
                format!("{count}: layer {number} has no earlier one with {kind} whose keys it could read");
            return Err(json.bad(field, problem));
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
