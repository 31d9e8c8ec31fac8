//! A model directory, loaded: configuration, tokenizer, weights.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::backend::{Backend, DType, ModelShape, Unsupported};
use crate::checkpoint::{Checkpoint, CheckpointError, Dtype};
use crate::config::{ConfigError, ConfigFile, GemmaConfig};
use crate::device::DeviceError;
use crate::gemma::Gemma;
use crate::gemma::params::{LoadError, load};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Everything in a model directory.
pub struct ModelDir<B: Backend> {
    /// The directory.
    pub path: PathBuf,
    /// config.json.
    pub config: ConfigFile,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The model.
    pub model: Gemma<B>,
    /// Whether weights were rounded to bf16 because the backend wants that, not because `dtype` said so.
    pub rounded: bool,
}

/// Why a model directory cannot be used.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such directory.
    #[error("{path} is not a directory; give a model directory, such as the one that `make gemma` writes")]
    NoDirectory {
        /// The path.
        path: PathBuf,
    },
    /// config.json or generation_config.json.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// tokenizer.json.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The safetensors files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tensors that are not the model's.
    #[error(transparent)]
    Params(#[from] LoadError),
    /// f32 weights on a device that computes with bf16 ones.
    #[error(
        "{device} computes with bf16 weights; ask for dtype bf16 or leave it out (f32 checkpoints are rounded), or use \
         --device cpu"
    )]
    DType {
        /// The device.
        device: String,
    },
    /// No kernels for such a model.
    #[error("{path}")]
    Unsupported {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: Unsupported,
    },
    /// The device failed at the start; above all, it may be too small.
    #[error("{path}: {doing}{}", if source.out_of_memory { "; take a device with more memory, or a smaller model" } else { "" })]
    Device {
        /// The directory.
        path: PathBuf,
        /// What for.
        doing: &'static str,
        /// How.
        source: DeviceError,
    },
}

impl<B: Backend> ModelDir<B> {
    /// Loads a directory; weights in `dtype`, or as stored where it is `None`. A backend with bf16 activations has bf16
    /// weights, whatever is stored.
    pub fn open(backend: B, path: &Path, dtype: Option<DType>) -> Result<Self, OpenError> {
        if !path.is_dir() {
            return Err(OpenError::NoDirectory { path: path.into() });
        }
        let only_bf16 = backend.activation_dtype() == DType::Bf16;
        if only_bf16 && dtype == Some(DType::F32) {
            return Err(OpenError::DType { device: backend.device_name() });
        }
        let config = ConfigFile::open(path)?;
        backend
            .supports(&shape(&config.gemma))
            .map_err(|source| OpenError::Unsupported { path: path.into(), source })?;
        let tokenizer = Tokenizer::open(path, &config.gemma)?;
        let checkpoint = Checkpoint::open(path)?;
        let wider = |name: &str| checkpoint.tensor(name).is_some_and(|t| t.dtype != Dtype::BF16);
        let rounded = only_bf16 && dtype.is_none() && checkpoint.names().any(wider);
        let dtype = if only_bf16 { Some(DType::Bf16) } else { dtype };
        let params = load(&backend, &config.gemma, &checkpoint, dtype)?;
        let doing = "loading its weights, 2 bytes a parameter";
        backend.check().map_err(|source| OpenError::Device { path: path.into(), doing, source })?;
        let model = Gemma { backend, config: config.gemma.clone(), params };
        Ok(Self { path: path.into(), config, tokenizer, model, rounded })
    }
}

/// What a backend needs to know of a model.
fn shape(config: &GemmaConfig) -> ModelShape {
    ModelShape {
        hidden: config.hidden_size,
        heads: config.num_heads,
        kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        intermediate: config.intermediate_size,
        vocab: config.vocab_size,
    }
}
