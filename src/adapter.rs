//! Adapter directories in PEFT's layout, `adapter_config.json` and `adapter_model.safetensors`: read, written, and merged into
//! the weights that they are for.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use half::bf16;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::backend::{Backend, DType};
use crate::checkpoint::{
    Checkpoint, CheckpointError, Dtype, FileError, TensorSpec, TensorView, atomic, read_file, write_file_of,
};
use crate::gemma::Gemma;
use crate::gemma::config::ConfigFile;
use crate::gemma::lora::{self, Adapter, Linear, full_plan, held_rank};
use crate::gemma::params::{LayerParams, ParamSpec, SCORE, TextNames, convert, plan};

/// What an adapter is and is for.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Its matrices.
pub const ADAPTER_WEIGHTS: &str = "adapter_model.safetensors";

/// Real files have less than a kB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;
/// Before the names of the model's own modules.
const PREFIX: &str = "base_model.model.";
/// What PEFT takes for a classifier's head.
const HEADS: [&str; 2] = ["classifier", "score"];
/// The largest rank; beyond, training all weights is less work.
pub const MAX_RANK: usize = 4096;
/// Most lines of an error.
const MAX_LISTED: usize = 8;

/// Settings of adapters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSpec {
    /// r, from 1 to 4096. Default: 16.
    pub rank: usize,
    /// What adapters add is multiplied by alpha / rank. Default: 32.
    pub alpha: f64,
    /// Multiply by alpha / sqrt(rank) instead (rsLoRA). Default: false.
    pub rslora: bool,
    /// The linear maps that get adapters, in every layer that has them. Default: all, that is `q_proj`, `k_proj`, `v_proj`,
    /// `o_proj`, `gate_proj`, `up_proj` and `down_proj`.
    pub targets: Vec<Linear>,
    /// Only 0: dropped inputs would make the log-probs of training others than those of sampling. Default: 0.
    pub dropout: f64,
}

impl Default for LoraSpec {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, rslora: false, targets: Linear::ALL.to_vec(), dropout: 0.0 }
    }
}

impl LoraSpec {
    /// s, the factor on what adapters add.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f64;
        (self.alpha / if self.rslora { rank.sqrt() } else { rank }) as f32
    }

    /// What is out of range: the field and what would do.
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if !(1..=MAX_RANK).contains(&self.rank) {
            problems.push(("rank", format!("is {}; it must be from 1 to {MAX_RANK}", self.rank)));
        }
        if !(self.alpha as f32 > 0.0 && (self.alpha as f32).is_finite()) {
            problems.push(("alpha", format!("is {}; it must be above 0", self.alpha)));
        }
        if self.targets.is_empty() {
            problems
                .push(("targets", "is empty; name one linear map at least, or leave it out for all".into()));
        }
        if self.dropout != 0.0 {
            let message = format!(
                "is {}; only 0 is possible, because dropped inputs would make the log-probs of training others than those of \
                 sampling",
                self.dropout
            );
            problems.push(("dropout", message));
        }
        problems
    }
}

/// Why an adapter directory cannot be used. Every message names the file.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The matrices cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// There is no adapter.
    #[error("{}: no {ADAPTER_CONFIG} is there; give a directory that PEFT's save_pretrained or `train` with [lora] wrote",
            dir.display())]
    NoAdapter {
        /// The directory.
        dir: PathBuf,
    },
    /// adapter_config.json is no JSON object.
    #[error("{}: not a JSON object", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What and where.
        source: serde_json::Error,
    },
    /// A setting that makes no sense, or which the engine would silently ignore.
    #[error("{}: {field}: {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// The embedding and the LM head cannot be told apart.
    #[error("{}: the embedding and the LM head cannot be untied: {problem}", path.display())]
    Untie {
        /// adapter_config.json.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Matrices that are not this model's.
    #[error("{}: not an adapter of this model{}:{}{}",
            path.display(),
            base.as_ref().map_or(String::new(), |base| format!(" (it says that it is of {base})")),
            problems.iter().take(MAX_LISTED).map(|p| format!("\n  {p}")).collect::<String>(),
            match problems.len().saturating_sub(MAX_LISTED) { 0 => String::new(), more => format!("\n  and {more} more") })]
    Tensors {
        /// The file.
        path: PathBuf,
        /// The model that the adapter names.
        base: Option<String>,
        /// Never empty.
        problems: Vec<String>,
    },
}

/// A matrix of the model that is two at once, the embedding and the LM head, and that an adapter may change as either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tied {
    Embedding,
    Head,
}

impl Tied {
    const ALL: [Self; 2] = [Self::Embedding, Self::Head];

    /// PEFT's names of A `[r, in]` and B `[out, r]`, and of the copy of the matrix that it saves beside them.
    fn names(self) -> [&'static str; 3] {
        match self {
            Self::Embedding => [
                "model.embed_tokens.lora_embedding_A",
                "model.embed_tokens.lora_embedding_B",
                "model.embed_tokens.base_layer.weight",
            ],
            Self::Head => ["lm_head.lora_A.weight", "lm_head.lora_B.weight", "lm_head.base_layer.weight"],
        }
    }

    /// What it is, and what it is as well.
    fn words(self) -> [&'static str; 2] {
        match self {
            Self::Embedding => ["embedding", "LM head"],
            Self::Head => ["LM head", "embedding"],
        }
    }

    /// That which has a matrix of this name.
    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|tied| tied.names().contains(&name))
    }
}

/// The embedding and the LM head of a model that has both, each `[V, D]`.
pub struct Untied<T> {
    /// What tokens are looked up in.
    pub embed: T,
    /// What hidden states are multiplied with.
    pub head: T,
}

/// An adapter directory, opened.
#[derive(Debug)]
pub struct AdapterFile {
    /// Its settings; `targets` are those of any layer.
    pub spec: LoraSpec,
    dir: PathBuf,
    /// What `base_model_name_or_path` says.
    base: Option<String>,
    /// Whether `ensure_weight_tying` is set.
    ties: bool,
    /// By a text model's names.
    tensors: Checkpoint,
}

impl AdapterFile {
    /// Reads the settings and maps the matrices; [`AdapterFile::load`] checks these against a model.
    pub fn open(dir: &Path) -> Result<Self, AdapterError> {
        let path = dir.join(ADAPTER_CONFIG);
        if std::fs::symlink_metadata(&path).is_err() {
            return Err(AdapterError::NoAdapter { dir: dir.into() });
        }
        let text = read_file(&path, MAX_CONFIG_BYTES)?;
        let json: Map<String, Value> = serde_json::from_slice(&text)
            .map_err(|source| AdapterError::Json { path: path.clone(), source })?;
        let spec = settings(&json, &path)?;
        let base = json.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned);
        let tensors = Checkpoint::open_file(&dir.join(ADAPTER_WEIGHTS))?;
        let tensors = tensors.part(inner_name);
        let ties = json.get("ensure_weight_tying") == Some(&Value::Bool(true));
        let mut file = Self { spec, dir: dir.into(), base, ties, tensors };
        let targets = Linear::ALL.into_iter();
        let any =
            |map: &Linear| file.tensors.names().any(|name| name.contains(&format!(".{}.lora_", map.path())));
        file.spec.targets = targets.filter(any).collect();
        Ok(file)
    }

    /// Whether it has the score head of a reward model as well.
    pub fn scores(&self) -> bool {
        self.tensors.tensor(SCORE).is_some()
    }

    /// Whether it changes the embedding or the LM head, which [`AdapterFile::load`] refuses and [`AdapterFile::untied`] computes.
    pub fn unties(&self) -> bool {
        self.tensors.names().any(|name| Tied::of(name).is_some())
    }

    /// Gives a model the adapters, switched on, and a reward model the score head that was trained with them. All that differs
    /// from what the model's would be is told at once.
    pub fn load<B: Backend>(&self, model: &mut Gemma<B>) -> Result<(), AdapterError> {
        self.load_all(model, false)
    }

    /// The same without what the adapter adds to the embedding and to the LM head, and these two as it makes them: E + s (B A)^T as
    /// lora.Embedding of PEFT adds it, and E + s B A, each rounded to what the model stores, or E where it adds nothing; in the
    /// place of E a head of its own, where the model has one already. `config` is of the model.
    pub fn untied<B: Backend>(
        &self,
        model: &mut Gemma<B>,
        config: &ConfigFile,
    ) -> Result<Untied<B::Tensor>, AdapterError> {
        let path = self.dir.join(ADAPTER_CONFIG);
        let cannot = |problem: &str| AdapterError::Untie { path: path.clone(), problem: problem.into() };
        if self.ties {
            return Err(cannot(
                "ensure_weight_tying is true, so that the embedding and the LM head were trained as one",
            ));
        }
        if config.wrapped {
            return Err(cannot(
                "its model is the text part of a multimodal one; save the language model by itself first, with Transformers' \
                 save_pretrained",
            ));
        }
        if model.params.score.is_some() {
            return Err(cannot("it is of a reward model, which has no LM head"));
        }
        let (backend, params) = (&model.backend, &model.params);
        let matrix = |tied: Tied| match tied {
            Tied::Embedding => &params.embed,
            Tied::Head => params.lm_head(),
        };
        let dtype = backend.dtype(&params.embed);
        let (rows, cols) = backend.shape(&params.embed);
        let mut problems = Vec::new();
        let mut read = |tied: Tied| {
            let rank = self.spec.rank;
            let [a, b, copy] = tied.names();
            let shapes = match tied {
                Tied::Embedding => [[rank, rows], [cols, rank]],
                Tied::Head => [[rank, cols], [rows, rank]],
            };
            let stored = [a, b, copy].map(|name| self.tensors.tensor(name));
            if let Some(stored) = stored[2] {
                let base = backend.to_f32(matrix(tied));
                let same = values_of(stored, &[rows, cols]).map(|values| {
                    let rounded = |x: f32| if dtype == DType::Bf16 { bf16::from_f32(x).to_f32() } else { x };
                    values.iter().zip(&base).all(|(value, base)| rounded(*value) == *base)
                });
                let problem = match same {
                    Ok(true) => None,
                    Ok(false) => Some(format!("differs from the model's {}", tied.words()[0])),
                    Err(problem) => Some(problem),
                };
                problems.extend(problem.map(|problem| format!("{copy}: {problem}")));
            }
            if stored[..2].iter().all(Option::is_none) {
                return None;
            }
            let mut part = |name: &str, stored: Option<TensorView>, shape: [usize; 2]| {
                let values = stored.ok_or("missing beside the other of its pair".to_owned());
                let values = values.and_then(|stored| values_of(stored, &shape));
                values.map_err(|problem| problems.push(format!("{name}: {problem}"))).ok()
            };
            let of_a = part(a, stored[0], shapes[0]);
            of_a.zip(part(b, stored[1], shapes[1]))
        };
        let parts = Tied::ALL.map(|tied| (tied, read(tied)));
        if !problems.is_empty() {
            let path = self.dir.join(ADAPTER_WEIGHTS);
            return Err(AdapterError::Tensors { path, base: self.base.clone(), problems });
        }
        let scale = self.spec.scale();
        let [embed, head] = parts.map(|(tied, part)| {
            let Some((a, b)) = part else {
                return backend.upload(dtype, rows, cols, &backend.download(matrix(tied)));
            };
            let (up, down) = match tied {
                Tied::Embedding => (a, transposed(&b, cols)),
                Tied::Head => (transposed(&b, rows), a),
            };
            sum(backend, matrix(tied), scale, up, down)
        });
        self.load_all(model, true)?;
        Ok(Untied { embed, head })
    }

    /// [`AdapterFile::load`], or all but what changes the embedding and the LM head.
    fn load_all<B: Backend>(&self, model: &mut Gemma<B>, apart: bool) -> Result<(), AdapterError> {
        let rank = self.spec.rank;
        let mut problems: Vec<String> = self
            .tensors
            .others()
            .map(|(name, _)| {
                format!("{name}: the engine has adapters on the linear maps of attention and MLP only")
            })
            .collect();
        let tied: Vec<(&str, Tied)> =
            self.tensors.names().filter_map(|name| Some((name, Tied::of(name)?))).collect();
        if !apart {
            problems.extend(tied.iter().map(|(name, tied)| {
                let [this, other] = tied.words();
                if model.config.has_own_head() {
                    format!(
                        "{name}: the engine has no adapters on the {this}; `bon-engine merge --untie` writes a model with it merged"
                    )
                } else {
                    format!(
                        "{name}: it changes the {this}, which is the {other} as well in this model; `bon-engine merge --untie` writes \
                         a model in which they are two"
                    )
                }
            }));
        }
        let (backend, dtype, held) = (&model.backend, model.backend.activation_dtype(), held_rank(rank));
        let mut known: BTreeSet<String> = tied.iter().map(|(name, _)| (*name).to_owned()).collect();
        let mut adapters = Vec::new();
        let mut head = None;
        match (&model.params.score, self.tensors.tensor(SCORE)) {
            (Some(present), Some(stored)) => {
                let (width, dtype) = (model.config.hidden_size, backend.dtype(present));
                known.insert(SCORE.to_owned());
                match values_of(stored, &[1, width]) {
                    Ok(values) => head = Some(lora::upload(backend, dtype, 1, width, &values)),
                    Err(problem) => problems.push(format!("{SCORE}: {problem}")),
                }
            }
            (None, Some(_)) => {
                known.insert(SCORE.to_owned());
                problems.push(format!(
                    "{SCORE}: it is of a reward model, which scores responses and writes none; `bon-engine merge` makes that, for \
                     [verifier] kind = \"model\""
                ));
            }
            (Some(_), None) => {
                problems.push(format!("{SCORE}: missing; it is an adapter of no reward model"))
            }
            (None, None) => {}
        }
        for (l, layer) in plan(&model.config).layers.iter().enumerate() {
            adapters.push(lora::layer_plan(layer, l, rank, |_| true).map(|adapter| {
                let Adapter { a, b } = adapter?;
                known.extend([a.name.clone(), b.name.clone()]);
                let stored = [&a, &b].map(|spec| self.tensors.tensor(&spec.name));
                if stored.iter().all(Option::is_none) {
                    return None;
                }
                let mut read = |spec: &ParamSpec, stored: Option<TensorView>, shape: [usize; 2]| {
                    let values = stored.ok_or("missing beside the other of its pair".to_owned());
                    let values = values.and_then(|stored| values_of(stored, &shape));
                    values.map_err(|problem| problems.push(format!("{}: {problem}", spec.name))).ok()
                };
                let [stored_a, stored_b] = stored;
                let of_a = read(&a, stored_a, [rank, a.cols]);
                let (mut of_a, of_b) = of_a.zip(read(&b, stored_b, [b.rows, rank]))?;
                of_a.resize(held * a.cols, 0.0);
                let mut filled = vec![0.0; b.rows * held];
                for (to, from) in filled.chunks_exact_mut(held).zip(of_b.chunks_exact(rank)) {
                    to[..rank].copy_from_slice(from);
                }
                Some(Adapter {
                    a: lora::upload(backend, dtype, held, a.cols, &of_a),
                    b: lora::upload(backend, dtype, b.rows, held, &filled),
                })
            }));
        }
        let unknown = self.tensors.names().filter(|name| !known.contains(*name));
        problems.extend(unknown.map(|name| format!("{name}: the model has no such linear map")));
        if problems.is_empty() && tied.is_empty() && adapters.iter().flatten().all(Option::is_none) {
            problems.push("it holds no matrices".into());
        }
        if !problems.is_empty() {
            let path = self.dir.join(ADAPTER_WEIGHTS);
            return Err(AdapterError::Tensors { path, base: self.base.clone(), problems });
        }
        for (layer, adapters) in model.params.layers.iter_mut().zip(adapters) {
            layer.adapters = adapters;
        }
        if head.is_some() {
            model.params.score = head;
        }
        model.adapter_scale = Some(self.spec.scale());
        Ok(())
    }
}

/// A text model's name of a stored matrix; `None` for what is none of a linear map's.
fn inner_name(stored: &str) -> Option<String> {
    let name = stored.strip_prefix(PREFIX)?;
    if name == SCORE {
        return Some(SCORE.to_owned());
    }
    let within = TextNames::KNOWN.iter().find_map(|names| names.inner(name));
    let inner = within.unwrap_or_else(|| name.to_owned());
    let adapter = name.ends_with(".lora_A.weight") || name.ends_with(".lora_B.weight");
    (adapter || Tied::of(&inner).is_some()).then_some(inner)
}

/// A stored matrix of this shape, all of it finite.
fn values_of(stored: TensorView, shape: &[usize]) -> Result<Vec<f32>, String> {
    if stored.shape != shape {
        return Err(format!("expected {shape:?}, found {:?}", stored.shape));
    }
    if !matches!(stored.dtype, Dtype::F32 | Dtype::BF16 | Dtype::F16) {
        return Err(format!("expected F32, BF16 or F16, found {:?}", stored.dtype));
    }
    let (_, bytes) = convert(stored, Some(DType::F32));
    let values: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes);
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(format!("element {at} is {}", values[at])),
        None => Ok(values),
    }
}

/// What adapter_config.json says, if the engine would compute what PEFT does.
fn settings(json: &Map<String, Value>, path: &Path) -> Result<LoraSpec, AdapterError> {
    let bad =
        |field: &'static str, problem: String| AdapterError::Field { path: path.into(), field, problem };
    let said = |field: &str| json.get(field).filter(|value| !value.is_null());
    if said("peft_type").and_then(Value::as_str) != Some("LORA") {
        let found = json.get("peft_type").unwrap_or(&Value::Null);
        return Err(bad("peft_type", format!("{found}; the engine reads \"LORA\"")));
    }
    let off = |value: &Value| match value {
        Value::Bool(on) => !on,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::String(text) => text == "none",
        _ => false,
    };
    for field in [
        "use_dora",
        "fan_in_fan_out",
        "lora_bias",
        "bias",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "megatron_config",
        "trainable_token_indices",
        "target_parameters",
        "use_qalora",
        "alora_invocation_tokens",
        "layer_replication",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        "use_bdlora",
        "velora_config",
    ] {
        // PEFT saves the head of a classifier beside its adapters, by either name that such heads have.
        let head = |value: &Value| {
            let names = value.as_array().into_iter().flatten().filter_map(Value::as_str);
            field == "modules_to_save"
                && names.clone().count() > 0
                && names.clone().all(|name| HEADS.contains(&name))
        };
        if let Some(value) = said(field).filter(|value| !off(value) && !head(value)) {
            return Err(bad(
                field,
                format!("{value} is not supported; the engine has plain low-rank adapters"),
            ));
        }
    }
    // These begin with other weights of the model than its checkpoint holds.
    let moved = ["pissa", "olora", "corda", "loftq", "lora_ga"];
    if let Some(Value::String(how)) = said("init_lora_weights")
        && moved.iter().any(|name| how.starts_with(name))
    {
        let problem =
            format!("{how:?} changes the model's own weights; convert the adapter to plain LoRA first");
        return Err(bad("init_lora_weights", problem));
    }
    let default = LoraSpec::default();
    let rank = match said("r") {
        Some(value) => value.as_u64().map_or(usize::MAX, |rank| rank as usize),
        None => return Err(bad("r", "missing; it is the rank".into())),
    };
    let alpha = match said("lora_alpha") {
        Some(value) => value.as_f64().unwrap_or(f64::NAN),
        None => return Err(bad("lora_alpha", "missing; it scales what adapters add".into())),
    };
    let rslora = match said("use_rslora") {
        None => false,
        Some(Value::Bool(on)) => *on,
        Some(value) => return Err(bad("use_rslora", format!("{value} is neither true nor false"))),
    };
    let spec = LoraSpec { rank, alpha, rslora, ..default };
    if let Some((field, problem)) = spec.problems().into_iter().next() {
        let field = if field == "rank" { "r" } else { "lora_alpha" };
        return Err(bad(field, problem));
    }
    Ok(spec)
}

/// Writes the adapters of a model as PEFT reads them: `base` is the directory of the model that they are for, `names` how its
/// checkpoint names the text model's tensors. An older save at `out` is replaced whole or, on any error, not at all.
pub fn save<B: Backend>(
    model: &Gemma<B>,
    spec: &LoraSpec,
    base: &Path,
    names: Option<TextNames>,
    out: &Path,
) -> Result<(), AdapterError> {
    let (b, specs) = (&model.backend, full_plan(model));
    let outer = |name: &str| format!("{PREFIX}{}", names.map_or(name.to_owned(), |names| names.outer(name)));
    let mut matrices: Vec<(TensorSpec, &B::Tensor, [usize; 2])> = Vec::new();
    for (layer, of_layer) in model.params.layers.iter().zip(&specs.layers) {
        for (adapter, of_adapter) in layer.adapters.iter().zip(&of_layer.adapters) {
            let Some((adapter, of_adapter)) = adapter.as_ref().zip(of_adapter.as_ref()) else { continue };
            let (a, b_spec) = (&of_adapter.a, &of_adapter.b);
            for (matrix, tensor, shape) in
                [(a, &adapter.a, [spec.rank, a.cols]), (b_spec, &adapter.b, [b_spec.rows, spec.rank])]
            {
                let dtype = match b.dtype(tensor) {
                    DType::F32 => Dtype::F32,
                    DType::Bf16 => Dtype::BF16,
                };
                let stored = TensorSpec { name: outer(&matrix.name), dtype, shape: shape.to_vec() };
                matrices.push((stored, tensor, shape));
            }
        }
    }
    if let Some((spec, tensor)) = specs.score.as_ref().zip(model.params.score.as_ref()) {
        let dtype = match b.dtype(tensor) {
            DType::F32 => Dtype::F32,
            DType::Bf16 => Dtype::BF16,
        };
        let stored = TensorSpec { name: outer(&spec.name), dtype, shape: spec.shape() };
        matrices.push((stored, tensor, [1, spec.cols]));
    }
    let scores = model.params.score.is_some();
    let mut config = json!({
        "peft_type": "LORA",
        "task_type": if scores { "SEQ_CLS" } else { "CAUSAL_LM" },
        "base_model_name_or_path": base.to_string_lossy(),
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "target_modules": modules(model, spec, names),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": true,
    });
    if scores {
        config["modules_to_save"] = json!(HEADS);
    }
    atomic::replace_dir(out, |dir| {
        atomic::write_new(&dir.join(ADAPTER_CONFIG), format!("{config:#}\n").as_bytes())?;
        let specs: Vec<TensorSpec> = matrices.iter().map(|(spec, ..)| spec.clone()).collect();
        write_file_of(&dir.join(ADAPTER_WEIGHTS), &specs, |i| {
            let (_, tensor, [rows, cols]) = &matrices[i];
            // Without what ranks are filled up with.
            let ((_, held), size) = (b.shape(tensor), b.dtype(tensor).bytes());
            let bytes = b.download(tensor);
            let kept = bytes.chunks_exact(held * size).take(*rows).flat_map(|row| &row[..cols * size]);
            kept.copied().collect()
        })
    })?;
    Ok(())
}

/// What PEFT finds the adapted modules by: the maps' names, or where those are of other modules as well, in layers without an
/// adapter or in towers, each by its place.
fn modules<B: Backend>(model: &Gemma<B>, spec: &LoraSpec, names: Option<TextNames>) -> Vec<String> {
    let layers = || model.params.layers.iter().enumerate();
    let has = |layer: &LayerParams<B::Tensor>, map: Linear| layer.adapters[map as usize].is_some();
    let whole = |&map: &Linear| layers().all(|(_, layer)| layer.weight(map).is_some() == has(layer, map));
    if names.is_none() && spec.targets.iter().all(whole) {
        return spec.targets.iter().map(|map| map.name().to_owned()).collect();
    }
    let before = if names.is_some() { "language_model." } else { "" };
    let of_layer = |(l, layer)| {
        let own = Linear::ALL.into_iter().filter(move |&map| has(layer, map));
        own.map(move |map| format!("{before}layers.{l}.{}", map.path()))
    };
    layers().flat_map(of_layer).collect()
}

/// The weights W + s B A, rounded to what W is stored in, without adapters. Only linear maps that have adapters change.
pub fn merged<B: Backend>(model: Gemma<B>) -> Gemma<B> {
    let Gemma { backend, config, mut params, frozen, adapter_scale } = model;
    let scale = adapter_scale.unwrap_or(0.0);
    for layer in &mut params.layers {
        for map in Linear::ALL {
            let Some(Adapter { a, b }) = layer.adapters[map as usize].take() else { continue };
            merge(&backend, layer, map, &a, &b, scale);
        }
    }
    Gemma { backend, config, params, frozen, adapter_scale: None }
}

/// The same for one linear map.
fn merge<B: Backend>(
    backend: &B,
    layer: &mut LayerParams<B::Tensor>,
    map: Linear,
    a: &B::Tensor,
    b: &B::Tensor,
    scale: f32,
) {
    let weight = layer.weight_mut(map).expect("a map with an adapter");
    let up = transposed(&backend.to_f32(b), backend.shape(weight).0);
    *weight = sum(backend, weight, scale, up, backend.to_f32(a));
}

/// The transpose of a matrix of so many rows.
fn transposed(x: &[f32], rows: usize) -> Vec<f32> {
    let cols = x.len() / rows;
    (0..cols).flat_map(|c| x.iter().skip(c).step_by(cols)).copied().collect()
}

/// W `[V, D]` + (s U)^T D with U `[r, V]` and D `[r, D]`, rounded to what W is stored in.
fn sum<B: Backend>(
    backend: &B,
    weight: &B::Tensor,
    scale: f32,
    mut up: Vec<f32>,
    mut down: Vec<f32>,
) -> B::Tensor {
    let ((rows, cols), dtype) = (backend.shape(weight), backend.dtype(weight));
    let rank = held_rank(up.len() / rows);
    up.iter_mut().for_each(|x| *x *= scale);
    up.resize(rank * rows, 0.0);
    down.resize(rank * cols, 0.0);
    let [up, down] = [(&up, rows), (&down, cols)]
        .map(|(values, cols)| lora::upload(backend, backend.activation_dtype(), rank, cols, values));
    let mut sum = backend.widened(weight);
    backend.matmul_backward_weight(&up, &down, &mut sum);
    lora::upload(backend, dtype, rows, cols, &backend.to_f32(&sum))
}
