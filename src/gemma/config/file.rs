//! config.json and generation_config.json of a directory.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::GemmaConfig;
use super::families::classifier;
use super::fields::{ConfigError, Fields};
use super::text::{TEXT_CONFIG, names_architecture, parse};
use crate::backend::DType;
use crate::checkpoint::read_file;

/// The model's shape, in a Hugging Face directory.
pub const CONFIG_FILE: &str = "config.json";
/// Further end-of-response tokens; optional.
pub const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Real files have a few kB.
const MAX_JSON_BYTES: u64 = 1 << 20;

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

    /// The same model with an LM head that is not the embedding.
    pub fn untied(mut self) -> Self {
        self.gemma.tied = false;
        self.json.insert("tie_word_embeddings".to_owned(), false.into());
        self
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
