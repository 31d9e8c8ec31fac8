//! A model directory, loaded: configuration, tokenizer, weights.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use crate::adapter::{AdapterError, AdapterFile, LoraSpec};
use crate::backend::{Backend, Compute, DType, ModelShape, Unsupported};
use crate::chat::{ChatError, ChatTemplate, MAX_TEMPLATE_BYTES, template_text};
use crate::checkpoint::{
    Action, Checkpoint, CheckpointError, Dtype, FileError, INDEX_FILE, MAX_SHARD_BYTES, TensorSpec,
    TensorView, WEIGHTS_FILE, atomic, read_file, write_tensors,
};
use crate::device::DeviceError;
use crate::gemma::Gemma;
use crate::gemma::config::{
    CONFIG_FILE, ConfigError, ConfigFile, GENERATION_CONFIG_FILE, GemmaConfig, LayerShape,
};
use crate::gemma::lora;
use crate::gemma::params::{
    LoadError, Params, TextNames, convert, frozen, load, load_frozen, plan, stored_dtype,
};
use crate::tokenizer::{TOKENIZER_FILE, Tokenizer, TokenizerError, writes_turns};

/// Everything in a model directory.
pub struct ModelDir<B: Backend> {
    /// The directory.
    pub path: PathBuf,
    /// config.json.
    pub config: ConfigFile,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The chat template, where [`ModelDir::with_chat`] has read it.
    pub chat: Option<ChatTemplate>,
    /// The model.
    pub model: Gemma<B>,
    /// What its products are computed in.
    pub compute: Compute,
    /// The settings of the model's adapters, where it has some.
    pub lora: Option<LoraSpec>,
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
    /// Something that is known, and no model directory.
    #[error("{path} {found}")]
    Other {
        /// The path.
        path: PathBuf,
        /// What it is, and what to do.
        found: String,
    },
    /// config.json or generation_config.json.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// tokenizer.json.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The safetensors files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tensors that are not the model's.
    #[error(transparent)]
    Params(#[from] LoadError),
    /// An adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A model that scores responses, where one is wanted that writes them.
    #[error(
        "{path} is a reward model, which scores responses and writes none; give the model that writes them, and this one \
         as [verifier] kind = \"model\""
    )]
    RewardModel {
        /// The directory.
        path: PathBuf,
    },
    /// A model that writes responses, where one is wanted that scores them.
    #[error(
        "{path} has no score head (score.weight, and a ...ForSequenceClassification in its config.json): it writes \
         responses and scores none; train a reward model from it with objective.kind = \"verifier\""
    )]
    NoScoreHead {
        /// The directory.
        path: PathBuf,
    },
    /// A family that has no reward models.
    #[error(
        "{path}: Transformers has no sequence classifier of {model_type}, so none could load the reward model; train one \
         from a Gemma 1, 2 or 3"
    )]
    NoClassifier {
        /// The directory.
        path: PathBuf,
        /// The family.
        model_type: String,
    },
    /// bf16 products with f32 weights.
    #[error("compute bf16 wants bf16 weights; ask for dtype bf16 as well, or leave it out")]
    Compute,
    /// f32 weights or products on a device that computes in bf16.
    #[error(
        "{device} computes with bf16 {what}; ask for {setting} bf16 or leave it out{note}, or use --device cpu"
    )]
    OnlyBf16 {
        /// The device.
        device: String,
        /// What in.
        what: &'static str,
        /// The setting that asks for f32.
        setting: &'static str,
        /// What happens otherwise.
        note: &'static str,
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

/// What a model is to be: one that writes responses or one that scores them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelRole {
    /// It writes responses.
    Policy,
    /// It scores them.
    Reward,
    /// It scores them, or will: a model without a score head gets one of zeros.
    NewReward,
}

impl<B: Backend> ModelDir<B> {
    /// Loads a directory of a model that writes responses. A backend with bf16 activations has bf16 weights, whatever is
    /// stored.
    pub fn open(backend: B, path: &Path, precision: Precision) -> Result<Self, OpenError> {
        Self::open_as(ModelRole::Policy, backend, path, precision)
    }

    /// The same of a model that is to be this or that.
    pub fn open_as(
        role: ModelRole,
        backend: B,
        path: &Path,
        precision: Precision,
    ) -> Result<Self, OpenError> {
        look_at(path)?;
        let only_bf16 = backend.activation_dtype() == DType::Bf16;
        let f32_on_bf16 = |what, setting, note| {
            Err(OpenError::OnlyBf16 { device: backend.device_name(), what, setting, note })
        };
        let dtype = match precision {
            Precision { dtype: Some(DType::F32), .. } if only_bf16 => {
                return f32_on_bf16("weights", "dtype", " (f32 checkpoints are rounded)");
            }
            Precision { compute: ComputeChoice::F32, .. } if only_bf16 => {
                return f32_on_bf16("products", "compute", "");
            }
            Precision { dtype: Some(DType::F32), compute: ComputeChoice::Bf16, .. } => {
                return Err(OpenError::Compute);
            }
            Precision { dtype: None, compute: ComputeChoice::Bf16, .. } => Some(DType::Bf16),
            Precision { dtype, .. } => dtype,
        };
        let mut config = ConfigFile::open(path)?;
        config.gemma.trains_per_layer_embed = precision.trains_per_layer_embed(&config.gemma);
        match (role, config.gemma.score_head) {
            (ModelRole::Policy, true) => return Err(OpenError::RewardModel { path: path.into() }),
            (ModelRole::Reward, false) => return Err(OpenError::NoScoreHead { path: path.into() }),
            _ => {}
        }
        let with_head = if role == ModelRole::NewReward && !config.gemma.score_head {
            let model_type = config.gemma.model_type.clone();
            let no_classifier = || OpenError::NoClassifier { path: path.into(), model_type };
            Some(config.clone().with_score_head().ok_or_else(no_classifier)?)
        } else {
            None
        };
        shapes(&config.gemma)
            .try_for_each(|shape| backend.supports(&shape))
            .map_err(|source| OpenError::Unsupported { path: path.into(), source })?;
        let weights = || {
            let checkpoint = open_weights(path, &config)?;
            let wider = |name: &str| checkpoint.tensor(name).is_some_and(|t| t.dtype != Dtype::BF16);
            let rounded = only_bf16 && dtype.is_none() && checkpoint.names().any(wider);
            let dtype = if only_bf16 { Some(DType::Bf16) } else { dtype };
            let params = load(&backend, &config.gemma, &checkpoint, dtype)?;
            let on_host = precision.per_layer_embeddings == Placement::Host;
            let frozen = load_frozen(&backend, &config.gemma, &checkpoint, dtype, on_host);
            Ok::<_, OpenError>((params, frozen, rounded))
        };
        // Side by side, because a vocabulary of 2^18 pieces takes as long to read as the weights of a small model.
        let (tokenizer, weights) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| Tokenizer::open(path, &config.gemma));
            let weights = weights();
            (tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), weights)
        });
        let (tokenizer, (mut params, frozen, rounded)) = (tokenizer?, weights?);
        if with_head.is_some() {
            // Zeros are as good a beginning as any: the first step moves the head alone, the next all that it reads.
            params.head = None;
            params.score = Some(backend.zeros(backend.dtype(&params.embed), 1, config.gemma.hidden_size));
        }
        let config = with_head.unwrap_or(config);
        let compute = match backend.dtype(&params.embed) {
            DType::Bf16 if precision.compute != ComputeChoice::F32 => Compute::Bf16,
            _ => Compute::F32,
        };
        let backend = backend.computing(compute);
        let doing = "loading its weights, 2 bytes a parameter";
        backend.check().map_err(|source| OpenError::Device { path: path.into(), doing, source })?;
        let model = Gemma { backend, config: config.gemma.clone(), params, frozen, adapter_scale: None };
        Ok(Self { path: path.into(), config, tokenizer, chat: None, model, compute, lora: None, rounded })
    }

    /// The same with the adapters of a directory, where one is given.
    pub fn with_adapter(mut self, dir: Option<&Path>) -> Result<Self, OpenError> {
        let Some(dir) = dir else { return Ok(self) };
        let file = AdapterFile::open(dir)?;
        file.load(&mut self.model)?;
        let doing = "loading its adapters";
        self.model.backend.check().map_err(|source| OpenError::Device { path: dir.into(), doing, source })?;
        self.lora = Some(file.spec);
        Ok(self)
    }

    /// The same with new adapters, which change nothing yet.
    pub fn with_new_adapter(mut self, spec: &LoraSpec, seed: u64) -> Self {
        lora::begin(&mut self.model, spec.rank, &spec.targets, seed);
        self.model.adapter_scale = Some(spec.scale());
        self.lora = Some(spec.clone());
        self
    }

    /// The same with its chat template, where that is `wanted`.
    pub fn with_chat(self, wanted: bool) -> Result<Self, OpenError> {
        let chat = wanted.then(|| ChatTemplate::open(&self.path)).transpose()?;
        Ok(Self { chat, ..self })
    }
}

/// What a model is stored and computed in.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Precision {
    /// Storage of the weights; as in the checkpoint if nothing is said.
    pub dtype: Option<DType>,
    /// What products are computed in.
    pub compute: ComputeChoice,
    /// How per-layer embeddings are held, which is none of precision, and of the same concern.
    pub per_layer_embeddings: Placement,
}

/// `model.per_layer_embeddings`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Where all weights lie.
    #[default]
    Device,
    /// In the host's memory, or in the file.
    Host,
    /// On the device, as parameters.
    Trained,
}

impl Precision {
    /// Whether the layers' own embeddings of such a model are to be parameters.
    pub fn trains_per_layer_embed(self, config: &GemmaConfig) -> bool {
        self.per_layer_embeddings == Placement::Trained && config.per_layer_width != 0
    }

    /// What the weights of a directory will be stored in, of which config.json may be all that is there yet: on the CPU, that is,
    /// since a GPU has bf16. bf16 where nothing says.
    pub fn storage(self, dir: &Path, config: &ConfigFile) -> DType {
        let told = match self.compute {
            ComputeChoice::Bf16 => Some(DType::Bf16),
            ComputeChoice::Auto | ComputeChoice::F32 => self.dtype,
        };
        let stored = || stored_dtype(&open_weights(dir, config).ok()?);
        told.or_else(stored).or_else(|| config.dtype()).unwrap_or(DType::Bf16)
    }
}

/// `model.compute` and `--compute`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeChoice {
    /// bf16 where the weights are bf16.
    #[default]
    Auto,
    /// bf16; weights are stored so as well.
    Bf16,
    /// f32, whatever the weights are stored in.
    F32,
}

/// Refuses what people take for a model directory, with a word on what it is.
pub fn look_at(path: &Path) -> Result<(), OpenError> {
    match other(path) {
        Some(found) => Err(OpenError::Other { path: path.into(), found }),
        None if !path.is_dir() => Err(OpenError::NoDirectory { path: path.into() }),
        None => Ok(()),
    }
}

/// What a path is that is known, and no model directory; and what to do.
fn other(path: &Path) -> Option<String> {
    const GGUF: &str = "convert it to Hugging Face's layout first: Transformers' from_pretrained takes it as gguf_file, and \
                        save_pretrained writes the directory";
    let extension =
        |path: &Path, wanted: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(wanted));
    if path.is_file() {
        return Some(match path {
            _ if extension(path, "gguf") => format!("is a GGUF file; {GGUF}"),
            _ if extension(path, "safetensors") => {
                "is a file of weights; give the directory that it is in".into()
            }
            _ => return None,
        });
    }
    let hub = path.to_str().is_some_and(|name| name.split('/').count() == 2 && !name.starts_with(['.', '/']));
    // A name there is an owner and a model; here it would be a directory in a directory.
    if hub && !path.parent().is_some_and(Path::is_dir) {
        return Some(format!(
            "is not a directory; if it is a model on the Hugging Face Hub, download it first: hf download {} --local-dir DIR",
            path.display()
        ));
    }
    let entries = fs::read_dir(path).ok()?;
    let mut names: Vec<PathBuf> = entries.flatten().map(|entry| entry.file_name().into()).collect();
    names.sort();
    let has = |name: &str| path.join(name).exists();
    let any = |wanted: &str| names.iter().find(|name| extension(name, wanted));
    let weights = has(WEIGHTS_FILE) || has(INDEX_FILE);
    if has(CONFIG_FILE) && weights {
        return (!has(TOKENIZER_FILE) && has("tokenizer.model")).then(|| {
            format!(
                "has a tokenizer.model and no {TOKENIZER_FILE}; write that with Transformers: \
                 AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        });
    }
    if has("adapter_config.json") {
        let config = read_file(&path.join("adapter_config.json"), MAX_TEMPLATE_BYTES).unwrap_or_default();
        let config: Value = serde_json::from_slice(&config).unwrap_or_default();
        let base =
            config["base_model_name_or_path"].as_str().map_or(String::new(), |base| format!(" of {base}"));
        return Some(format!(
            "is an adapter{base}, not a model; give the model's directory, and this one as --adapter (in a configuration \
             model.adapter), or merge both first: bon-engine merge"
        ));
    }
    if let Some(file) = any("gguf") {
        return Some(format!("holds a GGUF file, {}; {GGUF}", file.display()));
    }
    if !has(CONFIG_FILE) {
        // A checkpoint of a run, a run, a snapshot folder of the Hub's cache.
        let model = |dir: &Path| dir.join(CONFIG_FILE).is_file().then(|| dir.to_path_buf());
        let models = |parent: &Path, inner: fn(PathBuf) -> PathBuf| {
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            let mut found: Vec<PathBuf> = entries.filter_map(|entry| model(&inner(entry.path()))).collect();
            found.sort();
            found
        };
        let newest = models(&path.join("checkpoints"), |dir| dir.join("model")).pop();
        let snapshot = || models(&path.join("snapshots"), |dir| dir).pop();
        let only = || Some(models(path, |dir| dir)).filter(|all| all.len() == 1)?.pop();
        let within = model(&path.join("model")).or(newest).or_else(snapshot).or_else(only)?;
        return Some(format!("is no model directory, but {} is; give that", within.display()));
    }
    let other = any("bin").or_else(|| any("pt")).or_else(|| any("pth")).or_else(|| any("npz"))?;
    Some(format!(
        "holds its weights as {}; write safetensors with Transformers: from_pretrained, then save_pretrained",
        other.display()
    ))
}

/// The file with a directory's chat template, if that does not write Gemma's turns: those of
/// [`Tokenizer::encode_turns`] are then not what the model was tuned to. `None` where there is no template.
pub fn foreign_template(dir: &Path) -> Option<PathBuf> {
    let (path, template) = template_text(dir)?;
    (!writes_turns(&template)).then_some(path)
}

/// What a backend needs to know of each of a model's layers.
fn shapes(config: &GemmaConfig) -> impl Iterator<Item = ModelShape> {
    config.layers.iter().map(|layer| {
        let LayerShape { heads, kv_heads, head_dim, intermediate } = layer.shape;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let (per_layer_width, per_layer_columns) = (config.per_layer_width, config.per_layer_columns());
        let experts = config.experts.unwrap_or_default();
        ModelShape {
            hidden,
            heads,
            kv_heads,
            head_dim,
            intermediate,
            vocab,
            per_layer_width,
            per_layer_columns,
            experts: experts.count,
            experts_per_token: experts.per_token,
            expert_width: experts.width,
        }
    })
}

/// Opens the weights beside a configuration; of a vision-and-text model those of its text part, by a text model's names.
pub fn open_weights(dir: &Path, config: &ConfigFile) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open(dir)?;
    match TextNames::of(&checkpoint).filter(|_| config.wrapped) {
        Some(names) => Ok(checkpoint.part(|stored| names.inner(stored))),
        None => Ok(checkpoint),
    }
}

/// What a model directory holds beside config.json and weights: the tokenizer, generation defaults, how images are
/// prepared, and the terms under which Gemma and its derivatives are passed on.
const COMPANIONS: [&str; 14] = [
    TOKENIZER_FILE,
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG_FILE,
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "NOTICE",
    "NOTICE.md",
    "GEMMA_TERMS.html",
];

/// Writes a directory that Transformers loads: config.json as it was but for the dtype, the weights as the backend
/// stores them, and from `source` the tokenizer and the rest that belongs to a model: tensors that training leaves, in the
/// weights' type, and of a multimodal model those of other parts, byte for byte, and its names. An older save at `out` is
/// replaced whole or, on any error, not at all (see [`atomic::replace_dir`]).
pub fn save<B: Backend>(
    backend: &B,
    config: &ConfigFile,
    params: &Params<B::Tensor>,
    source: &Path,
    out: &Path,
) -> Result<(), CheckpointError> {
    let frozen = frozen(&config.gemma);
    let untouched = config.wrapped || !frozen.is_empty();
    let stored = untouched.then(|| Checkpoint::open(source)).transpose()?;
    let names = stored.as_ref().filter(|_| config.wrapped).and_then(TextNames::of);
    let outer = |name: &str| names.map_or(name.to_owned(), |names| names.outer(name));
    let stored = stored.map(|checkpoint| match names {
        Some(names) => checkpoint.part(|stored| names.inner(stored)),
        None => checkpoint,
    });
    atomic::replace_dir(out, |dir| {
        let dtype = backend.dtype(&params.embed);
        atomic::write_new(&dir.join(CONFIG_FILE), config.to_json(dtype).as_bytes())?;
        for name in COMPANIONS {
            let from = source.join(name);
            if from.is_file() {
                fs::copy(&from, dir.join(name)).map_err(FileError::io(Action::Write, &dir.join(name)))?;
            }
        }
        let plan = plan(&config.gemma);
        let tensors = params.tensors();
        let own = plan.tensors().into_iter().zip(&tensors).map(|(spec, tensor)| TensorSpec {
            name: outer(&spec.name),
            dtype: match backend.dtype(tensor) {
                DType::F32 => Dtype::F32,
                DType::Bf16 => Dtype::BF16,
            },
            shape: spec.shape(),
        });
        let weights = if dtype == DType::Bf16 { Dtype::BF16 } else { Dtype::F32 };
        let frozen = frozen
            .iter()
            .filter_map(|(name, _)| Some((outer(name), weights, stored.as_ref()?.tensor(name)?)));
        let others = stored.iter().flat_map(Checkpoint::others);
        let others: Vec<(String, Dtype, TensorView)> =
            frozen.chain(others.map(|(name, view)| (name.to_owned(), view.dtype, view))).collect();
        let other = |(name, dtype, view): &(String, Dtype, TensorView)| TensorSpec {
            name: name.clone(),
            dtype: *dtype,
            shape: view.shape.to_vec(),
        };
        let specs: Vec<TensorSpec> = own.chain(others.iter().map(other)).collect();
        write_tensors(dir, &specs, MAX_SHARD_BYTES, |i| match tensors.get(i) {
            Some(tensor) => backend.bytes(tensor),
            None => match others[i - tensors.len()] {
                (_, to, view) if to == view.dtype => view.bytes.into(),
                (_, _, view) => convert(view, Some(dtype)).1,
            },
        })?;
        Ok(())
    })
}
