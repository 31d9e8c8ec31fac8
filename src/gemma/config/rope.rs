//! RoPE of local and of global layers, in each family's spelling.

use serde_json::{Map, Value};

use super::families::Ropes;
use super::fields::{ConfigError, Fields};
use super::{GLOBAL, LOCAL};
use crate::backend::RopeSpec;

/// The share of a head's pairs that RoPE turns.
const SHARE: &str = "partial_rotary_factor";

/// RoPE's settings.
const ROPE: &str = "rope_parameters";

/// A set of RoPE parameters, of heads of any width.
#[derive(Clone, Copy)]
pub(super) struct Rope {
    theta: f64,
    factor: f64,
    /// The share of a head's pairs that turns.
    share: f64,
}

impl Rope {
    pub(super) fn of(self, head_dim: usize) -> RopeSpec {
        let pairs = (self.share * head_dim as f64 / 2.0).floor() as usize;
        RopeSpec { head_dim, pairs: pairs.min(head_dim / 2), theta: self.theta, factor: self.factor }
    }
}

/// RoPE of local layers, and of global ones.
pub(super) fn ropes(json: &Fields, spelling: Ropes) -> Result<(Rope, Rope), ConfigError> {
    match spelling {
        Ropes::Uniform => uniform_rope(json),
        Ropes::ByType => layered_rope(json),
        Ropes::Proportional => proportional_rope(json),
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
