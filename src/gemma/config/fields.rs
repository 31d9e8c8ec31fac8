//! Fields of a JSON object, of which every error names file and field.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::families::known_models;
use crate::checkpoint::FileError;

/// Bound on every width, so that no product of sizes overflows 64 bits. The largest Gemma vocabulary is 2^18.
pub(super) const MAX_WIDTH: usize = 1 << 22;

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

/// A JSON object of which every error names file and field.
pub(super) struct Fields<'a> {
    pub path: &'a Path,
    /// What stands before the names of its fields: empty, or that of the object in which it is.
    pub prefix: String,
    pub map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn name(&self, field: &str) -> String {
        if self.prefix.is_empty() { field.to_owned() } else { format!("{}.{field}", self.prefix) }
    }

    pub(super) fn bad(&self, field: &str, problem: String) -> ConfigError {
        ConfigError::Field { path: self.path.to_owned(), field: self.name(field), problem }
    }

    pub(super) fn unsupported(&self, field: &str, reason: &'static str) -> ConfigError {
        let value = brief(self.map.get(field).unwrap_or(&Value::Null));
        ConfigError::Unsupported { path: self.path.to_owned(), field: self.name(field), value, reason }
    }

    pub(super) fn count(&self, field: &str, default: usize, max: usize) -> Result<usize, ConfigError> {
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
    pub(super) fn width(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        match self.map.get(field) {
            Some(Value::Null) => Ok(0),
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => self.count(field, default, MAX_WIDTH),
        }
    }

    /// A switch that is off if nothing is said.
    pub(super) fn switch(&self, field: &str) -> Result<bool, ConfigError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(value) => Err(self.bad(field, format!("expected true or false, found {}", brief(value)))),
        }
    }

    /// The width of a head.
    pub(super) fn head_dim(&self, field: &str, default: usize, heads: usize) -> Result<usize, ConfigError> {
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
    pub(super) fn kv_heads(&self, field: &str, default: usize, heads: usize) -> Result<usize, ConfigError> {
        let kv_heads = self.count(field, default, MAX_WIDTH)?;
        if !heads.is_multiple_of(kv_heads) {
            let problem = format!("{kv_heads} does not divide num_attention_heads = {heads}");
            return Err(self.bad(field, problem));
        }
        Ok(kv_heads)
    }

    pub(super) fn positive(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        if self.map.contains_key(field) { self.positive_required(field) } else { Ok(default) }
    }

    pub(super) fn positive_required(&self, field: &str) -> Result<f64, ConfigError> {
        let value = self.map.get(field).unwrap_or(&Value::Null);
        match value.as_f64() {
            // Every such number is used in f32 sooner or later.
            Some(x) if x as f32 > 0.0 && (x as f32).is_finite() => Ok(x),
            _ => Err(self.bad(field, format!("expected a positive number, found {}", brief(value)))),
        }
    }

    pub(super) fn softcap(&self, field: &str, default: Option<f64>) -> Result<Option<f32>, ConfigError> {
        Ok(match self.map.get(field) {
            None => default,
            Some(Value::Null) => None,
            Some(_) => Some(self.positive_required(field)?),
        }
        .map(|c| c as f32))
    }

    pub(super) fn object(&self, field: &str) -> Result<Option<&'a Map<String, Value>>, ConfigError> {
        match self.map.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(other) => Err(self.bad(field, format!("expected an object, found {}", brief(other)))),
        }
    }

    /// One token id, a list of them, or null for none.
    pub(super) fn tokens(
        &self,
        field: &str,
        default: &[u32],
        vocab_size: usize,
    ) -> Result<Vec<u32>, ConfigError> {
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
pub(super) fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        None => text,
        Some((end, _)) => format!("{}...", &text[..end]),
    }
}
