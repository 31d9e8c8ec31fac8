//! The training configuration: a TOML file, then `--set key.path=value` overrides. The fields' docs below are its
//! reference.
//!
//! Unknown keys and values of the wrong type are errors that name the file and line (or the override), the key and
//! the nearest known name. [`TrainConfig::validate`] then reports all that is out of range at once. Relative paths
//! are relative to the working directory.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::schedule::Schedule;
use crate::backend::{DType, TEMPERATURES, Truncation};
use crate::gemma::activations::Recompute;
use crate::model_dir::{ComputeChoice, OpenError, Precision, look_at};
use crate::objective::{Objective, ObjectiveConfig};
use crate::verifier::VerifierConfig;

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The model to start from.
    #[serde(default)]
    pub model: ModelSection,
    /// Tasks and how they become prompts.
    #[serde(default)]
    pub data: DataSection,
    /// Sampling.
    #[serde(default)]
    pub generate: GenerateSection,
    /// What is optimised, and N.
    pub objective: ObjectiveConfig,
    /// Scores r that select among responses. Needed by every objective but `sft`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verifier: Option<VerifierConfig>,
    /// Gives the reward R. Default: the verifier's score is the reward.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub environment: Option<VerifierConfig>,
    /// AdamW and its learning rate.
    #[serde(default)]
    pub optimizer: OptimizerSection,
    /// The loop.
    #[serde(default)]
    pub train: TrainSection,
}

/// `[model]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// Directory of a Hugging Face checkpoint. Required.
    pub path: PathBuf,
    /// Storage of the parameters: `"f32"` or `"bf16"`. Default: as in the checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<DType>,
    /// What matrix products are computed in, where the device has the choice: `"auto"` (bf16 where the weights are
    /// bf16), `"bf16"` or `"f32"`. In bf16 both operands are rounded and sums are f32. Default: `"auto"`.
    pub compute: ComputeChoice,
}

impl ModelSection {
    /// What the model is stored and computed in.
    pub fn precision(&self) -> Precision {
        Precision { dtype: self.dtype, compute: self.compute }
    }
}

/// `[data]`
///
/// The text of a prompt is `prefix + task.prompt + suffix`, wrapped by the template.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// JSON lines, each `{"prompt": ..., "answer": ...}`; `"response"` may hold an expert response. Required.
    pub tasks: PathBuf,
    /// Tasks for evaluation during training, in the same format. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_tasks: Option<PathBuf>,
    /// Text before every prompt, such as few-shot examples; its activations are computed once for the whole batch.
    /// Default: empty.
    pub prefix: String,
    /// File with the text for `prefix`, read when the configuration is. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_file: Option<PathBuf>,
    /// Text after every prompt. Default: empty.
    pub suffix: String,
    /// `"none"`, or `"turn"` for models tuned to Gemma's chat turns. Default: `"none"`.
    pub template: Template,
}

/// What is put around a prompt.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Template {
    /// Nothing but the BOS token.
    #[default]
    None,
    /// A user turn, and the opening of the model's turn.
    Turn,
}

/// `[generate]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateSection {
    /// M, the group size: responses drawn per prompt. At least the objective's N. Default: 8.
    pub samples: usize,
    /// Prompts per optimizer step. Default: 8.
    pub prompts_per_step: usize,
    /// Longest response, in tokens; a longer one is cut and counted as truncated. Default: 256.
    pub max_new_tokens: usize,
    /// Sampling temperature, from 1e-6 to 1e6; the loss is taken at the same temperature. Default: 1.
    pub temperature: f64,
    /// Strings that end a response, beside the model's own end tokens; the name of a control token ends it at that token.
    /// An expert response ends at the first of them, too, and gets the first string of the list where it holds none.
    /// Default: none.
    pub stop: Vec<String>,
    /// Sample among the k most probable tokens; 0 is off. Default: 0.
    pub top_k: usize,
    /// Sample among the most probable tokens that together reach probability p; 1 is off. Default: 1.
    pub top_p: f64,
    /// Sample among tokens at least p times as probable as the most probable one; 0 is off. Default: 0.
    pub min_p: f64,
    /// Permit `top_k`, `top_p` or `min_p` although they bias the gradient of an on-policy objective. Default: false.
    pub allow_truncated_sampling: bool,
}

impl Default for GenerateSection {
    fn default() -> Self {
        Self {
            samples: 8,
            prompts_per_step: 8,
            max_new_tokens: 256,
            temperature: 1.0,
            stop: Vec::new(),
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            allow_truncated_sampling: false,
        }
    }
}

impl GenerateSection {
    /// The cuts to the distribution, as the sampler takes them.
    pub fn truncation(&self) -> Truncation {
        Truncation { top_k: self.top_k, top_p: self.top_p as f32, min_p: self.min_p as f32 }
    }
}

/// `[optimizer]`: AdamW (Loshchilov and Hutter 2019).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSection {
    /// Peak learning rate. Default: 1e-6.
    pub lr: f64,
    /// Decay of the first moment, in \[0, 1). Default: 0.9.
    pub beta1: f64,
    /// Decay of the second moment, in \[0, 1). Default: 0.95.
    pub beta2: f64,
    /// Added to the root of the second moment. Default: 1e-8.
    pub eps: f64,
    /// Decoupled weight decay: each step takes off `lr * weight_decay` of every weight. Default: 0.
    pub weight_decay: f64,
    /// Largest global L2 norm of the gradient; a larger gradient is scaled down to it. 0 is off. Default: 1.
    pub clip_norm: f64,
    /// `"constant"`, `"linear"` or `"cosine"`. Default: `"constant"`.
    pub schedule: Schedule,
    /// Steps of linear warm-up from 0 to `lr`. Default: 0.
    pub warmup_steps: u64,
    /// Learning rate of the last step of a linear or cosine schedule, as a share of `lr`. Default: 0.1.
    pub min_lr_ratio: f64,
}

impl Default for OptimizerSection {
    fn default() -> Self {
        Self {
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.0,
            clip_norm: 1.0,
            schedule: Schedule::Constant,
            warmup_steps: 0,
            min_lr_ratio: 0.1,
        }
    }
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Optimizer steps on fresh samples. Required.
    pub steps: u64,
    /// Seed of everything random, below 2^63. Default: 0.
    pub seed: u64,
    /// Micro-batches that a step's prompts are split into; divides `generate.prompts_per_step`. More of them need
    /// less memory. Default: 1.
    pub gradient_accumulation: usize,
    /// Activations that the backward pass computes again, instead of keeping them from the forward pass: `"auto"`, what
    /// there is no memory to keep; `"none"`; or `"all"` but each layer's input. Changes no result. Default: `"auto"`.
    pub recompute: Recompute,
    /// Optimizer updates on each batch of samples (PPO's epochs). Default: 1, which is on-policy and clips nothing.
    pub updates_per_batch: usize,
    /// PPO's clip: from the second update on, a token counts while its probability ratio is within 1 ± this.
    /// Default: 0.2.
    pub clip_epsilon: f64,
    /// Weight of the KL divergence from the starting model (k3 estimator, per sampled token). 0 is off and keeps no
    /// second copy of the weights. Default: 0.
    pub kl_coefficient: f64,
    /// `"per-token"`, `"per-sequence"` or `"constant"`. Default: `"constant"`.
    pub length_normalizer: LengthNormalizer,
    /// Evaluate every so many steps; 0 never. Default: 0.
    pub eval_every: u64,
    /// Samples per task in evaluation; at least the objective's N. Default: 16.
    pub eval_samples: usize,
    /// Save a checkpoint every so many steps, beside those by time; 0 is off. Default: 0.
    pub save_every: u64,
    /// Save a checkpoint after the step that ends so many minutes or more after the last one was saved; 0 is off, and
    /// with `save_every` off, too, a run saves at its end alone. Default: 30.
    pub save_minutes: f64,
    /// Newest checkpoints to keep, at least 1. Default: 2.
    pub keep_checkpoints: usize,
    /// The run directory. Required.
    pub output: PathBuf,
    /// Minutes after which the run finishes its step, saves and ends. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_minutes: Option<f64>,
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            steps: 0,
            seed: 0,
            gradient_accumulation: 1,
            recompute: Recompute::Auto,
            updates_per_batch: 1,
            clip_epsilon: 0.2,
            kl_coefficient: 0.0,
            length_normalizer: LengthNormalizer::Constant,
            eval_every: 0,
            eval_samples: 16,
            save_every: 0,
            save_minutes: 30.0,
            keep_checkpoints: 2,
            output: PathBuf::new(),
            max_minutes: None,
        }
    }
}

/// What a response's token weights c_j are divided by, after the mean over the step's prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LengthNormalizer {
    /// The mean length of the step's responses: every token of the batch counts alike.
    PerToken,
    /// The response's own length: every response counts alike, but long ones are pushed less per token, which biases
    /// the policy gradient.
    PerSequence,
    /// `generate.max_new_tokens`: the direction of the exact policy gradient (Liu et al. 2025, "Dr. GRPO").
    Constant,
}

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// TOML that does not parse, an unknown key, a value of the wrong type.
    #[error("{place}: {message}")]
    Parse {
        /// `file:line`, or the override.
        place: String,
        /// What is wrong, and what was meant.
        message: String,
    },
    /// An override that is no `key.path=value`.
    #[error("--set {0}: expected key.path=value, such as --set optimizer.lr=1e-5")]
    Override(String),
    /// Values out of range.
    #[error("the configuration cannot be used:{}", problems.iter().map(|p| format!("\n  {p}")).collect::<String>())]
    Invalid {
        /// All of them.
        problems: Vec<Problem>,
    },
    /// A number that TOML cannot hold.
    #[error("the configuration cannot be written as TOML")]
    Write(#[from] toml::ser::Error),
}

/// One value out of range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// `section.field`.
    pub key: &'static str,
    /// What is wrong and what would do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.message)
    }
}

/// Fields that do not change what a step computes, so that a run may resume with others. Of the files behind paths
/// it is the contents that must agree: see [`super::snapshot::TrainState`].
const FREE_TO_CHANGE: [&str; 14] = [
    "verifier.workers",
    "verifier.timeout_seconds",
    "environment.workers",
    "environment.timeout_seconds",
    "data.tasks",
    "data.eval_tasks",
    "train.recompute",
    "train.eval_every",
    "train.eval_samples",
    "train.save_every",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.output",
    "train.max_minutes",
];

impl TrainConfig {
    /// Reads a configuration file and applies `key.path=value` overrides in order. A value that is no TOML is taken
    /// as a string, so that paths need no quotes. The text of `data.prefix_file` moves into `data.prefix`, so the
    /// result stands on its own. Does not [`validate`](Self::validate).
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let read = |path: &Path| {
            let text = fs::read_to_string(path);
            let text = text.map(|t| t.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(t));
            text.map_err(|e| ConfigError::Read { path: path.into(), source: e })
        };
        let mut config = Self::parse(&path.display().to_string(), &read(path)?, overrides)?;
        if let Some(file) = &config.data.prefix_file {
            if !config.data.prefix.is_empty() {
                let message = "both `prefix` and `prefix_file` are set in [data]; remove one".into();
                return Err(ConfigError::Parse { place: path.display().to_string(), message });
            }
            config.data.prefix = read(file)?;
            config.data.prefix_file = None;
        }
        Ok(config)
    }

    /// [`TrainConfig::load`] on text; `name` stands for the file in errors. Reads no other file.
    pub fn parse(name: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        Sources::new(name, text, overrides)?.deserialize()
    }

    /// The configuration as TOML, every default spelled out.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        Ok(toml::to_string(self)?)
    }

    /// Checks every value, and that the files to read exist. Reports all problems at once.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_for(true)
    }

    /// [`TrainConfig::validate`], where the starting model must exist only if it is to be read: a checkpoint has
    /// weights of its own.
    pub(super) fn validate_for(&self, needs_model: bool) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        let mut require = |ok: bool, key: &'static str, message: String| {
            if !ok {
                problems.push(Problem { key, message });
            }
        };
        let Self { model, data, generate, objective, verifier, environment, optimizer, train } = self;
        let unset = |p: &Path| p.as_os_str().is_empty();
        let Objective { needs_samples, .. } = *objective.kind.objective();
        let n = objective.n.unwrap_or(1);

        if unset(&model.path) {
            require(false, "model.path", "missing; give the directory of a Hugging Face checkpoint".into());
        } else if needs_model {
            let usable = look_at(&model.path);
            let message = match &usable {
                Err(OpenError::Other { path, found }) => format!("{} {found}", path.display()),
                _ => format!("no directory at {}", model.path.display()),
            };
            require(usable.is_ok(), "model.path", message);
        }
        if unset(&data.tasks) {
            require(false, "data.tasks", "missing; give a JSON lines file with `prompt` and `answer`".into());
        } else {
            require(data.tasks.is_file(), "data.tasks", format!("no file at {}", data.tasks.display()));
        }
        if let Some(path) = &data.eval_tasks {
            require(path.is_file(), "data.eval_tasks", format!("no file at {}", path.display()));
        }

        for (key, value) in [
            ("generate.samples", generate.samples as u64),
            ("generate.prompts_per_step", generate.prompts_per_step as u64),
            ("generate.max_new_tokens", generate.max_new_tokens as u64),
            ("train.steps", train.steps),
            ("train.gradient_accumulation", train.gradient_accumulation as u64),
            ("train.updates_per_batch", train.updates_per_batch as u64),
            ("train.keep_checkpoints", train.keep_checkpoints as u64),
        ] {
            require(value >= 1, key, "must be at least 1".into());
        }
        if let Err(e) = objective.validate() {
            require(false, "objective", e.to_string());
        }
        // The bounds read `value is in ...`, so that NaN is in none.
        for (key, value, bounds, ok) in [
            (
                "generate.temperature",
                generate.temperature,
                "in [1e-6, 1e6]",
                TEMPERATURES.contains(&(generate.temperature as f32)),
            ),
            ("generate.top_p", generate.top_p, "in (0, 1]", generate.top_p > 0.0 && generate.top_p <= 1.0),
            ("generate.min_p", generate.min_p, "in [0, 1)", (0.0..1.0).contains(&generate.min_p)),
            ("optimizer.lr", optimizer.lr, "above 0", above_zero(optimizer.lr)),
            ("optimizer.beta1", optimizer.beta1, "in [0, 1)", (0.0..1.0).contains(&optimizer.beta1)),
            ("optimizer.beta2", optimizer.beta2, "in [0, 1)", (0.0..1.0).contains(&optimizer.beta2)),
            ("optimizer.eps", optimizer.eps, "above 0", above_zero(optimizer.eps)),
            ("optimizer.weight_decay", optimizer.weight_decay, "0 or more", zero_up(optimizer.weight_decay)),
            ("optimizer.clip_norm", optimizer.clip_norm, "0 (off) or more", zero_up(optimizer.clip_norm)),
            (
                "optimizer.min_lr_ratio",
                optimizer.min_lr_ratio,
                "in [0, 1]",
                (0.0..=1.0).contains(&optimizer.min_lr_ratio),
            ),
            (
                "train.clip_epsilon",
                train.clip_epsilon,
                "in (0, 1)",
                train.clip_epsilon > 0.0 && train.clip_epsilon < 1.0,
            ),
            ("train.kl_coefficient", train.kl_coefficient, "0 (off) or more", zero_up(train.kl_coefficient)),
            ("train.save_minutes", train.save_minutes, "0 (off) or more", zero_up(train.save_minutes)),
        ] {
            require(ok, key, format!("is {value}; it must be {bounds}"));
        }
        if let Some(minutes) = train.max_minutes {
            require(above_zero(minutes), "train.max_minutes", format!("is {minutes}; it must be above 0"));
        }

        require(generate.stop.iter().all(|s| !s.is_empty()), "generate.stop", "holds an empty string".into());
        require(
            optimizer.warmup_steps <= train.steps,
            "optimizer.warmup_steps",
            format!("is {}, more than the {} of train.steps", optimizer.warmup_steps, train.steps),
        );
        require(train.seed < 1 << 63, "train.seed", "must be below 2^63".into());
        require(
            generate.prompts_per_step.is_multiple_of(train.gradient_accumulation.max(1)),
            "train.gradient_accumulation",
            format!(
                "is {}, which does not divide the {} of generate.prompts_per_step",
                train.gradient_accumulation, generate.prompts_per_step
            ),
        );
        require(!unset(&train.output), "train.output", "missing; give the run's directory".into());
        require(
            !train.output.is_file(),
            "train.output",
            format!("{} is a file; give a directory", train.output.display()),
        );
        require(
            train.eval_samples > 0 || data.eval_tasks.is_none(),
            "train.eval_samples",
            "is 0; an evaluation needs at least 1".into(),
        );
        if train.eval_every > 0 {
            require(
                data.eval_tasks.is_some(),
                "train.eval_every",
                "needs data.eval_tasks; set that, or this to 0".into(),
            );
            require(
                train.eval_samples >= n || train.eval_samples == 0,
                "train.eval_samples",
                format!("is {}, less than the {n} of objective.n", train.eval_samples),
            );
        }

        if !needs_samples {
            require(
                train.kl_coefficient == 0.0 || train.kl_coefficient.is_nan(),
                "train.kl_coefficient",
                format!(
                    "is taken over sampled responses, and objective \"{}\" draws none; set it to 0",
                    objective.kind
                ),
            );
        } else {
            require(
                verifier.is_some(),
                "verifier",
                format!("missing; it scores the samples that objective \"{}\" learns from", objective.kind),
            );
            require(
                generate.samples != 1,
                "generate.samples",
                "is 1; a response is compared with others of its group, so at least 2 are needed".into(),
            );
            require(
                generate.samples >= n,
                "generate.samples",
                format!("is {}, less than the {n} of objective.n", generate.samples),
            );
            require(
                generate.allow_truncated_sampling || generate.truncation().is_none(),
                "generate.allow_truncated_sampling",
                "top_k, top_p or min_p biases the gradient; turn them off, or set this to true to accept that".into(),
            );
        }
        require(
            environment.is_none() || verifier.is_some(),
            "environment",
            "is set without [verifier]; a single one goes there".into(),
        );
        if problems.is_empty() { Ok(()) } else { Err(ConfigError::Invalid { problems }) }
    }

    /// Every setting that is set: `section.field` to its TOML text.
    pub(super) fn fields(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        fn flatten(prefix: &str, table: &toml::Table, out: &mut BTreeMap<String, String>) {
            for (name, value) in table {
                let key = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                match value {
                    toml::Value::Table(inner) => flatten(&key, inner, out),
                    value => {
                        out.insert(key, value.to_string());
                    }
                }
            }
        }
        let mut fields = BTreeMap::new();
        flatten("", &toml::Table::try_from(self)?, &mut fields);
        Ok(fields)
    }

    /// What must be equal for a resumed run to compute, bit for bit, what the uninterrupted run would have, of
    /// [`TrainConfig::fields`].
    fn resume_fields(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let mut fields = self.fields()?;
        for key in FREE_TO_CHANGE {
            fields.remove(key);
        }
        // The checkpoint has weights of its own: where the start came from matters to the KL's reference alone.
        if self.train.kl_coefficient == 0.0 {
            fields.remove("model.path");
        }
        // How long the run goes on does not change a step, unless the learning rate aims at the last one.
        if self.optimizer.schedule == Schedule::Constant {
            fields.remove("train.steps");
        }
        Ok(fields)
    }

    /// CRC-32C over the fields that must be equal for a bit-exact resume: all but paths and when to evaluate, save
    /// and stop.
    pub fn resume_hash(&self) -> Result<u32, ConfigError> {
        Ok(self
            .resume_fields()?
            .iter()
            .fold(0, |crc, (key, value)| crc32c::crc32c_append(crc, format!("{key} = {value}\n").as_bytes())))
    }

    /// The fields that keep `self` from resuming a run of `saved`, as `key: saved value -> new value`. Empty where
    /// [`TrainConfig::resume_hash`] agrees.
    pub fn resume_differences(&self, saved: &Self) -> Result<Vec<String>, ConfigError> {
        let (old, new) = (saved.resume_fields()?, self.resume_fields()?);
        let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
        let show = |value: Option<&String>| value.map_or("unset".to_string(), String::clone);
        Ok(keys
            .into_iter()
            .filter(|&k| old.get(k) != new.get(k))
            .map(|k| format!("{k}: {} -> {}", show(old.get(k)), show(new.get(k))))
            .collect())
    }
}

/// A line break or tabulator that was written as two characters and read as such, as in TOML's single quotes and in a
/// shell's: `\n`, `\r` or `\t`. Beside formulas, where `\nu` and `\times` are meant, only before what is no small letter.
pub fn escape(text: &str) -> Option<&str> {
    let lower = |at: usize| text.as_bytes().get(at).is_some_and(u8::is_ascii_lowercase);
    let escapes = || text.match_indices('\\').map(|(at, _)| at).filter(|&at| !text[..at].ends_with('\\'));
    let known = |at: usize| matches!(text.as_bytes().get(at + 1), Some(b'n' | b'r' | b't'));
    let formulas = text.contains('$') || escapes().any(|at| lower(at + 1) && !known(at));
    escapes().find(|&at| known(at) && !(formulas && lower(at + 2))).map(|at| &text[at..at + 2])
}

fn above_zero(x: f64) -> bool {
    x > 0.0 && x.is_finite()
}

fn zero_up(x: f64) -> bool {
    x >= 0.0 && x.is_finite()
}

/// The file and the overrides, laid end to end in one space of byte offsets: a TOML span then tells which of them
/// an error is about.
struct Sources {
    /// What errors call each text, and the text. All but the file are padded with line ends, from offset 0 to their
    /// place.
    texts: Vec<(String, String)>,
}

impl Sources {
    fn new(name: &str, file: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut end = file.len() + 1;
        let mut texts = vec![(name.to_string(), file.to_string())];
        for text in overrides {
            let bad = || ConfigError::Override(text.clone());
            let (key, value) = text.split_once('=').ok_or_else(bad)?;
            let quoted = format!("{key} = {}", toml::Value::from(value));
            let line = [text, &quoted].into_iter().find(|t| DeTable::parse(t).is_ok()).ok_or_else(bad)?;
            let padded = "\n".repeat(end) + line;
            end = padded.len() + 1;
            texts.push((format!("--set {text}"), padded));
        }
        Ok(Self { texts })
    }

    fn deserialize<T: serde::de::DeserializeOwned>(&self) -> Result<T, ConfigError> {
        let mut merged: Option<Spanned<DeTable<'_>>> = None;
        for (_, text) in &self.texts {
            let table = DeTable::parse(text).map_err(|e| self.error(&e, None))?;
            match &mut merged {
                None => merged = Some(table),
                Some(base) => merge(base.get_mut(), table.into_inner(), text),
            }
        }
        let merged = merged.unwrap_or_else(|| Spanned::new(0..0, DeTable::new()));
        T::deserialize(toml::de::Deserializer::from(merged.clone()))
            .map_err(|e| self.error(&e, Some(merged.get_ref())))
    }

    /// Turns a TOML error into one that says where and, for an unknown name, which known one is nearest. `table` is
    /// the document, where it parsed.
    fn error(&self, error: &toml::de::Error, table: Option<&DeTable<'_>>) -> ConfigError {
        let span = error.span().unwrap_or_default();
        let path = table.and_then(|t| find(t, &span)).unwrap_or_default();
        let source = self.texts.iter().position(|(_, text)| span.start <= text.len()).unwrap_or(0);
        // Keys that another kind has were not written for this one.
        let section = path.first().map_or("", String::as_str);
        let kind =
            self.texts[1..].iter().rfind(|(name, _)| name.starts_with(&format!("--set {section}.kind=")));
        let tagged = ["verifier", "environment"].contains(&section);
        if let (Some((name, _)), 0, true) =
            (kind, source, tagged && error.message().starts_with("unknown field"))
        {
            let message = format!(
                "{}; the keys that the file sets for another kind stay: to replace all of [{section}], --set \
                 '{section}={{kind=\"...\", ...}}'",
                explain(error.message(), path.clone())
            );
            return ConfigError::Parse { place: name.clone(), message };
        }
        let (name, text) = &self.texts[source];
        // A missing section is on no line.
        let missing = path.is_empty() && error.message().starts_with("missing field");
        let place = match text.get(..span.start) {
            Some(before) if source == 0 && !missing => format!("{name}:{}", before.matches('\n').count() + 1),
            _ => name.clone(),
        };
        ConfigError::Parse { place, message: explain(error.message(), path) }
    }
}

/// Puts `over`, an override of that text, on top of `base`, table by table. A table keeps the place where the file opens
/// it; one that is written as a whole and chooses a `kind` replaces the other choice with all its keys.
fn merge<'a>(base: &mut DeTable<'a>, over: DeTable<'a>, text: &str) {
    for (key, value) in over {
        let name = key.get_ref().clone();
        let whole = text.as_bytes().get(value.span().start) == Some(&b'{');
        match (base.get_mut(name.as_ref()).map(Spanned::get_mut), value.get_ref()) {
            (Some(DeValue::Table(old)), DeValue::Table(new)) if !(whole && new.contains_key("kind")) => {
                if let DeValue::Table(new) = value.into_inner() {
                    merge(old, new, text);
                }
            }
            _ => {
                // The map would keep the old key, and with it the old place.
                base.remove(name.as_ref());
                base.insert(key, value);
            }
        }
    }
}

/// The path of the key or value that lies at `span`.
fn find(table: &DeTable<'_>, span: &Range<usize>) -> Option<Vec<String>> {
    table.iter().find_map(|(key, value)| {
        let name = key.get_ref().to_string();
        let in_array = value.get_ref().is_array() && value.span().contains(&span.start);
        if key.span() == *span || value.span() == *span || in_array {
            return Some(vec![name]);
        }
        let mut path = find(value.get_ref().as_table()?, span)?;
        path.insert(0, name);
        Some(path)
    })
}

/// Serde words an unknown name as "unknown field `x`, expected one of `a`, `b`": the names stand between backticks.
fn explain(message: &str, mut path: Vec<String>) -> String {
    let names: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    let is_key = message.starts_with("unknown field");
    let ([unknown, known @ ..], true) = (&names[..], is_key || message.starts_with("unknown variant")) else {
        return if path.is_empty() { message.to_string() } else { format!("{}: {message}", path.join(".")) };
    };
    let nearest = known
        .iter()
        .map(|k| (strsim::jaro_winkler(unknown, k), k))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let hint = match nearest {
        Some((_, name)) => format!("did you mean `{name}`?"),
        None if known.is_empty() => "none is known here".to_string(),
        None => format!("known: {}", known.join(", ")),
    };
    if is_key {
        path.pop_if(|last| last == unknown);
        let section =
            if path.is_empty() { "at the top level".into() } else { format!("in [{}]", path.join(".")) };
        format!("unknown key `{unknown}` {section}; {hint}")
    } else {
        format!("{}: unknown value `{unknown}`; {hint}", path.join("."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the verifier's section is: serde buffers the table to find `kind`, and its errors lose their place in it.
    #[derive(Debug, Deserialize)]
    #[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
    #[allow(dead_code)]
    enum Tagged {
        Exact { strict: bool },
        Numeric {},
    }

    #[derive(Debug, Deserialize)]
    #[allow(dead_code)]
    struct Outer {
        verifier: Tagged,
    }

    #[test]
    fn errors_inside_a_tagged_section_name_the_section() {
        for (text, set, message) in [
            (
                "\n[verifier]\nkind = \"exact\"\nstrikt = true",
                "",
                "a:2: unknown key `strikt` in [verifier]; did you mean `strict`?",
            ),
            (
                "[verifier]\nkind = \"exakt\"",
                "",
                "a:2: verifier.kind: unknown value `exakt`; did you mean `exact`?",
            ),
            (
                "[verifier]\nkind = \"numeric\"",
                "verifier.kind=exact",
                "a:1: verifier: missing field `strict`",
            ),
        ] {
            let set = if set.is_empty() { vec![] } else { vec![set.to_string()] };
            let error = Sources::new("a", text, &set).and_then(|s| s.deserialize::<Outer>()).unwrap_err();
            assert_eq!(error.to_string(), message);
        }
    }
}
