//! A model directory, loaded: configuration, tokenizer, weights.

use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::backend::{Backend, DType};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::config::{ConfigError, ConfigFile};
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
}

impl<B: Backend> ModelDir<B> {
    /// Loads a directory; weights in `dtype`, or as stored where it is `None`.
    pub fn open(backend: B, path: &Path, dtype: Option<DType>) -> Result<Self, OpenError> {
        if !path.is_dir() {
            return Err(OpenError::NoDirectory { path: path.into() });
        }
        let config = ConfigFile::open(path)?;
        let tokenizer = Tokenizer::open(path, &config.gemma)?;
        let params = load(&backend, &config.gemma, &Checkpoint::open(path)?, dtype)?;
        let model = Gemma { backend, config: config.gemma.clone(), params };
        Ok(Self { path: path.into(), config, tokenizer, model })
    }
}
