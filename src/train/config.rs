//! The training configuration: a TOML file, then `--set key.path=value` overrides. The fields' docs below are its
//! reference.
//!
//! [`layered`](crate::layered) reads it; [`TrainConfig::validate`] then reports all that is out of range at once.
//! Relative paths are relative to the working directory.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::adapter::LoraSpec;
use crate::backend::{DType, TEMPERATURES, Truncation};
use crate::gemma::activations::Recompute;
use crate::layered::{LayeredError, parse, read_text};
use crate::model_dir::{ComputeChoice, OpenError, Placement, Precision, look_at};
use crate::objective::ObjectiveConfig;
use crate::verifier::VerifierConfig;

/// Most responses to one prompt; the paper's N goes up to 2^10.
pub const MAX_SAMPLES: usize = 1 << 16;
/// Most tokens of one prompt's responses together: the smallest Gemma's cache of them takes terabytes.
pub const MAX_GROUP_TOKENS: usize = 1 << 28;
/// Most prompts per step.
const MAX_PROMPTS: usize = 1 << 20;

/// A training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The model to start from.
    #[serde(default)]
    pub model: ModelSection,
    /// Train low-rank adapters, and leave the model's weights as they are. Default: none, all weights are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSpec>,
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
    /// Directory of an adapter of that model, in PEFT's layout; `train` goes on with it, and needs `[lora]` with its settings.
    /// Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<PathBuf>,
    /// Storage of the parameters: `"f32"` or `"bf16"`. Default: as in the checkpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<DType>,
    /// What matrix products are computed in, where the device has the choice: `"auto"` (bf16 where the weights are
    /// bf16), `"bf16"` or `"f32"`. In bf16 both operands are rounded and sums are f32. Default: `"auto"`.
    pub compute: ComputeChoice,
    /// How per-layer embeddings are held (Gemma 4 E2B and E4B). They are read and not trained, on the `"device"`, or on the `"host"`:
    /// in page-locked memory, of which a GPU reads the rows of a batch's tokens, and on the CPU in the checkpoint's file, mapped,
    /// if that has them in the type of the weights. Between these no result changes. `"trained"`: on the device, as parameters with
    /// all that these need. Default: `"device"`.
    pub per_layer_embeddings: Placement,
}

impl ModelSection {
    /// What the model is stored and computed in.
    pub fn precision(&self) -> Precision {
        let Self { dtype, compute, per_layer_embeddings, .. } = *self;
        Precision { dtype, compute, per_layer_embeddings }
    }

    /// Refuses a path that is missing or, where the model is to be read, leads to none.
    pub fn check(&self, read: bool, problems: &mut Problems) {
        if unset(&self.path) {
            problems.add("model.path", "missing; give the directory of a Hugging Face checkpoint".into());
        } else if read && let Err(e) = look_at(&self.path) {
            let message = match e {
                OpenError::Other { path, found } => format!("{} {found}", path.display()),
                _ => format!("no directory at {}", self.path.display()),
            };
            problems.add("model.path", message);
        }
        if let Some(path) = self.adapter.as_ref().filter(|path| read && !path.is_dir()) {
            problems.add("model.adapter", format!("no directory at {}", path.display()));
        }
    }
}

/// `[data]`
///
/// The text of a prompt is `prefix + task.prompt + suffix`, wrapped by the template.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// JSON lines, each `{"prompt": ..., "answer": ...}`; `"response"` may hold an expert response. For objective
    /// `verifier`, each `{"prompt": ..., "responses": [{"text": ..., "score": ...}, ...]}`. Required.
    pub tasks: PathBuf,
    /// Tasks for evaluation during training, in the same format. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_tasks: Option<PathBuf>,
    /// Report of `bon-engine eval --output` on the tasks of `tasks`, which says the pass rates for `pass_rate`. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<PathBuf>,
    /// Train on the tasks alone whose pass@1 in `report` is from the first number to the second, both included. Estimates
    /// from M samples are multiples of 1/M. Default: on all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pass_rate: Option<[f64; 2]>,
    /// Text before every prompt, such as few-shot examples; its activations are computed once for the whole batch.
    /// Default: empty.
    pub prefix: String,
    /// File with the text for `prefix`, read when the configuration is. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_file: Option<PathBuf>,
    /// Text after every prompt. Default: empty.
    pub suffix: String,
    /// `"none"`, `"turn"` for models tuned to Gemma's chat turns, or `"chat"` for the chat template that the model comes with.
    /// Default: `"none"`.
    pub template: Template,
}

impl DataSection {
    /// Refuses files that are not there.
    pub fn check(&self, problems: &mut Problems) {
        let tasks = &self.tasks;
        if unset(tasks) {
            problems.add("data.tasks", "missing; give a JSON lines file with `prompt` and `answer`".into());
        } else {
            problems.require(tasks.is_file(), "data.tasks", || format!("no file at {}", tasks.display()));
        }
        if let Some(path) = &self.eval_tasks {
            problems.require(path.is_file(), "data.eval_tasks", || format!("no file at {}", path.display()));
        }
    }

    /// Refuses a choice of training tasks that cannot be made. Evaluation does not ask: it may be to write the report.
    fn check_choice(&self, problems: &mut Problems) {
        if let Some([low, high]) = self.pass_rate {
            let ok = (0.0..=1.0).contains(&low) && (low..=1.0).contains(&high);
            problems.require(ok, "data.pass_rate", || {
                format!("is [{low}, {high}]; it must be a range within [0, 1], the lower end first")
            });
        }
        match (&self.report, self.pass_rate) {
            (None, Some(_)) => problems.add(
                "data.report",
                "missing; data.pass_rate needs a report of `bon-engine eval --output` on data.tasks".into(),
            ),
            (Some(_), None) => {
                problems.add(
                    "data.report",
                    "has no effect without data.pass_rate; set that, or remove this".into(),
                );
            }
            (Some(path), Some(_)) => problems.require(path.is_file(), "data.report", || {
                format!("no file at {}; `bon-engine eval --output` writes it", path.display())
            }),
            (None, None) => {}
        }
    }
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
    /// What the checkpoint's own chat template writes.
    Chat,
}

/// `[generate]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GenerateSection {
    /// M, the group size: responses drawn per prompt. At least the objective's N. Default: 8.
    pub samples: usize,
    /// Prompts per optimizer step. Default: 8.
    pub prompts_per_step: usize,
    /// Most further prompts that a step draws to put in the place of those from whose group the objective learns nothing,
    /// every coefficient being 0 (dynamic sampling, Yu et al. 2025, "DAPO", arXiv 2503.14476). What still teaches nothing
    /// then stays, and what is replaced is out of the KL term, too. 0 is off. Default: 0.
    pub refill_prompts: usize,
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
            refill_prompts: 0,
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

    /// Refuses values out of range. A temperature of 0, greedy decoding, is for evaluation alone.
    pub fn check(&self, greedy: bool, problems: &mut Problems) {
        problems.at_least_one("generate.samples", self.samples as u64);
        problems.at_least_one("generate.prompts_per_step", self.prompts_per_step as u64);
        problems.at_least_one("generate.max_new_tokens", self.max_new_tokens as u64);
        let temperature =
            TEMPERATURES.contains(&(self.temperature as f32)) || (greedy && self.temperature == 0.0);
        problems.bound("generate.temperature", self.temperature, "in [1e-6, 1e6]", temperature);
        problems.bound("generate.top_p", self.top_p, "in (0, 1]", self.top_p > 0.0 && self.top_p <= 1.0);
        problems.bound("generate.min_p", self.min_p, "in [0, 1)", (0.0..1.0).contains(&self.min_p));
        let stops = self.stop.iter().all(|s| !s.is_empty());
        problems.require(stops, "generate.stop", || "holds an empty string".into());
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
    /// How the two moments of matrices are kept: `"f32"`, 8 bytes a parameter, or `"8bit"`, as codes with a scale for every
    /// 256 of them, 2 bytes (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv 2110.02861). Those of
    /// norms, adapters and score heads are f32. Default: `"f32"`.
    pub moments: MomentKind,
    /// The same of the embedding, whose gradients are the most uneven. Default: `"f32"`.
    pub embedding_moments: MomentKind,
    /// Keep f32 masters of matrices whose parameters are bf16, 4 bytes a parameter. Without them an update is rounded to bf16
    /// at random, up or down so that its expectation is exact (stochastic rounding). Norms, adapters and score heads have
    /// masters.
    /// Default: true.
    pub masters: bool,
    /// What gradients of matrices are summed up in over a step's micro-batches: `"f32"`, 4 bytes a parameter, or `"bf16"`, 2
    /// bytes. A micro-batch adds its own sum, which is f32, in f32 and rounds to nearest, once for each use of the
    /// matrix (of the embedding there are two, and the CPU's LM head rounds for every 256 predicted tokens): after n
    /// micro-batches the error is at most n 2^-8 of the largest sum on the way, and sqrt(n / 3) 2^-8 of it as a rule. PyTorch's
    /// bf16 rounds twice as often, each addend as well. Gradients of norms, adapters and score heads are f32. Default: `"f32"`.
    pub gradients: DType,
    /// Keep moments and masters of matrices in the host's memory, page-locked, and stream them through the GPU at each update: as
    /// many bytes over the bus each way, while AdamW runs. Changes no result. For a GPU; those of norms, adapters and score heads
    /// stay there. Default: false.
    pub offload: bool,
}

/// How moments are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MomentKind {
    /// As f32.
    #[serde(rename = "f32")]
    F32,
    /// As codes of 8 bits.
    #[serde(rename = "8bit")]
    Blockwise,
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
            moments: MomentKind::F32,
            embedding_moments: MomentKind::F32,
            masters: true,
            gradients: DType::F32,
            offload: false,
        }
    }
}

/// The course of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays at `lr`.
    Constant,
    /// Falls on a straight line to `lr * min_lr_ratio` at the last step.
    Linear,
    /// Falls on half a cosine to `lr * min_lr_ratio` at the last step (Loshchilov and Hutter 2017, one cycle).
    Cosine,
}

impl OptimizerSection {
    /// Refuses values out of range in a run of that many steps.
    fn check(&self, steps: u64, problems: &mut Problems) {
        let Self { lr, beta1, beta2, eps, weight_decay, clip_norm, min_lr_ratio, .. } = *self;
        problems.bound("optimizer.lr", lr, "above 0", above_zero(lr));
        problems.bound("optimizer.beta1", beta1, "in [0, 1)", (0.0..1.0).contains(&beta1));
        problems.bound("optimizer.beta2", beta2, "in [0, 1)", (0.0..1.0).contains(&beta2));
        problems.bound("optimizer.eps", eps, "above 0", above_zero(eps));
        problems.bound("optimizer.weight_decay", weight_decay, "0 or more", zero_up(weight_decay));
        problems.bound("optimizer.clip_norm", clip_norm, "0 (off) or more", zero_up(clip_norm));
        problems.bound(
            "optimizer.min_lr_ratio",
            min_lr_ratio,
            "in [0, 1]",
            (0.0..=1.0).contains(&min_lr_ratio),
        );
        problems.require(self.warmup_steps <= steps, "optimizer.warmup_steps", || {
            format!("is {}, more than the {steps} of train.steps", self.warmup_steps)
        });
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
    /// less memory. Gradients are the same but for the order of their sums: what prompts share is computed once in each
    /// micro-batch, and its own sums come first. Default: 1.
    pub gradient_accumulation: usize,
    /// Activations that the backward pass computes again, instead of keeping them from the forward pass: `"auto"`, what
    /// there is no memory to keep; `"none"`; or `"all"` but each layer's input. Changes no result. Default: `"auto"`.
    pub recompute: Recompute,
    /// Optimizer updates on each batch of samples (PPO's epochs). Default: 1, which is on-policy and clips nothing.
    pub updates_per_batch: usize,
    /// PPO's clip: from the second update on, a token counts while its probability ratio is within 1 ± this.
    /// Default: 0.2.
    pub clip_epsilon: f64,
    /// The bound above 1 instead of `clip_epsilon`, which then is the one below 1 alone: tokens that are rare may become
    /// likelier by more (clip-higher, Yu et al. 2025, "DAPO", arXiv 2503.14476). Default: `clip_epsilon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_epsilon_high: Option<f64>,
    /// Weight of the KL divergence from the starting model (k3 estimator, per sampled token). 0 is off and keeps no
    /// second copy of the weights. Default: 0.
    pub kl_coefficient: f64,
    /// `"per-token"`, `"per-sequence"` or `"constant"`. Default: `"constant"`.
    pub length_normalizer: LengthNormalizer,
    /// Leave responses that `generate.max_new_tokens` cut out of the loss, the KL term included (overlong filtering, Yu et
    /// al. 2025, "DAPO", arXiv 2503.14476). Their rewards still count where others of the group are compared with them, and
    /// no other weight changes. Default: false.
    pub mask_truncated: bool,
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
            clip_epsilon_high: None,
            kl_coefficient: 0.0,
            length_normalizer: LengthNormalizer::Constant,
            mask_truncated: false,
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

impl TrainSection {
    /// How far a probability ratio may go below and above 1 before PPO's clip holds it.
    pub fn clip(&self) -> (f64, f64) {
        (self.clip_epsilon, self.clip_epsilon_high.unwrap_or(self.clip_epsilon))
    }

    /// Refuses values out of range where a step has that many prompts.
    fn check(&self, prompts_per_step: usize, problems: &mut Problems) {
        let Self { clip_epsilon, kl_coefficient, save_minutes, .. } = *self;
        problems.at_least_one("train.steps", self.steps);
        problems.at_least_one("train.updates_per_batch", self.updates_per_batch as u64);
        problems.at_least_one("train.keep_checkpoints", self.keep_checkpoints as u64);
        problems.bound(
            "train.clip_epsilon",
            clip_epsilon,
            "in (0, 1)",
            clip_epsilon > 0.0 && clip_epsilon < 1.0,
        );
        if let Some(high) = self.clip_epsilon_high {
            problems.bound("train.clip_epsilon_high", high, "above 0", above_zero(high));
        }
        problems.bound("train.kl_coefficient", kl_coefficient, "0 (off) or more", zero_up(kl_coefficient));
        problems.bound("train.save_minutes", save_minutes, "0 (off) or more", zero_up(save_minutes));
        if let Some(minutes) = self.max_minutes {
            problems.bound("train.max_minutes", minutes, "above 0", above_zero(minutes));
        }
        self.check_seed(problems);
        self.check_parts(prompts_per_step, problems);
        let output = &self.output;
        problems.require(!unset(output), "train.output", || "missing; give the run's directory".into());
        problems.require(!output.is_file(), "train.output", || {
            format!("{} is a file; give a directory", output.display())
        });
    }

    /// Refuses micro-batches of different sizes.
    fn check_parts(&self, prompts_per_step: usize, problems: &mut Problems) {
        problems.at_least_one("train.gradient_accumulation", self.gradient_accumulation as u64);
        let parts = self.gradient_accumulation;
        problems.require(
            prompts_per_step.is_multiple_of(parts.max(1)),
            "train.gradient_accumulation",
            || {
                format!(
                    "is {parts}, which does not divide the {prompts_per_step} of generate.prompts_per_step"
                )
            },
        );
    }

    /// Refuses a seed that TOML cannot hold.
    pub fn check_seed(&self, problems: &mut Problems) {
        problems.require(self.seed < 1 << 63, "train.seed", || "must be below 2^63".into());
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
    /// The file or an override cannot be read.
    #[error(transparent)]
    Layered(#[from] LayeredError),
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
const FREE_TO_CHANGE: [&str; 16] = [
    "verifier.workers",
    "verifier.timeout_seconds",
    "environment.workers",
    "environment.timeout_seconds",
    "data.tasks",
    "data.eval_tasks",
    "data.report",
    "optimizer.offload",
    "train.recompute",
    "train.eval_every",
    "train.eval_samples",
    "train.save_every",
    "train.save_minutes",
    "train.keep_checkpoints",
    "train.output",
    "train.max_minutes",
];

/// Fields that are younger than format 2 of checkpoints, and the defaults that runs from before them stand at. There they
/// leave no trace, so that such a run resumes.
const ADDED: [(&str, &str); 6] = [
    ("train.mask_truncated", "false"),
    ("generate.refill_prompts", "0"),
    ("optimizer.moments", "\"f32\""),
    ("optimizer.embedding_moments", "\"f32\""),
    ("optimizer.masters", "true"),
    ("optimizer.gradients", "\"f32\""),
];

impl TrainConfig {
    /// Reads a configuration file and applies `key.path=value` overrides in order. A value that is no TOML is taken
    /// as a string, so that paths need no quotes. The text of `data.prefix_file` moves into `data.prefix`, so the
    /// result stands on its own. Does not [`validate`](Self::validate).
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Self::parse(&path.display().to_string(), &read_text(path)?, overrides)?.with_prefix_file()
    }

    /// [`TrainConfig::load`] on text; `name` stands for the file in errors. Reads no other file.
    pub fn parse(name: &str, text: &str, overrides: &[String]) -> Result<Self, ConfigError> {
        Ok(parse(name, text, overrides)?)
    }

    /// The text of `data.prefix_file` moved into `data.prefix`.
    pub fn with_prefix_file(mut self) -> Result<Self, ConfigError> {
        if let Some(file) = self.data.prefix_file.take() {
            if !self.data.prefix.is_empty() {
                let message = "is set beside data.prefix; remove one".into();
                return Err(ConfigError::Invalid {
                    problems: vec![Problem { key: "data.prefix_file", message }],
                });
            }
            self.data.prefix = read_text(&file)?;
        }
        Ok(self)
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
        let mut problems = Problems::default();
        let Self { model, data, generate, objective, verifier, optimizer, train, .. } = self;
        model.check(needs_model || self.lora.is_some(), &mut problems);
        self.check_lora(&mut problems);
        data.check(&mut problems);
        data.check_choice(&mut problems);
        generate.check(false, &mut problems);
        if let Err(e) = objective.validate() {
            problems.add("objective", e.to_string());
        }
        optimizer.check(train.steps, &mut problems);
        train.check(generate.prompts_per_step, &mut problems);
        self.check_judges(&mut problems);
        self.check_sizes(&mut problems);

        let n = objective.n.unwrap_or(1);
        problems.require(train.eval_samples > 0 || data.eval_tasks.is_none(), "train.eval_samples", || {
            "is 0; an evaluation needs at least 1".into()
        });
        if train.eval_every > 0 {
            problems.require(data.eval_tasks.is_some(), "train.eval_every", || {
                "needs data.eval_tasks; set that, or this to 0".into()
            });
            problems.require(
                train.eval_samples >= n || train.eval_samples == 0,
                "train.eval_samples",
                || format!("is {}, less than the {n} of objective.n", train.eval_samples),
            );
        }
        if objective.kind.trains_verifier() {
            problems.require(verifier.is_none(), "verifier", || {
                "has no effect on objective \"verifier\", whose labels are in data.tasks; remove it, and [environment]".into()
            });
        }
        if !objective.kind.objective().needs_samples {
            problems.require(
                train.kl_coefficient == 0.0 || train.kl_coefficient.is_nan(),
                "train.kl_coefficient",
                || {
                    let kind = objective.kind;
                    format!(
                        "is taken over sampled responses, and objective \"{kind}\" draws none; set it to 0"
                    )
                },
            );
            problems.require(generate.refill_prompts == 0, "generate.refill_prompts", || {
                let kind = objective.kind;
                format!("replaces groups of samples, and objective \"{kind}\" draws none; set it to 0")
            });
            problems.require(!train.mask_truncated, "train.mask_truncated", || {
                let kind = objective.kind;
                format!("masks sampled responses, and objective \"{kind}\" draws none; set it to false")
            });
        } else {
            problems.require(verifier.is_some(), "verifier", || {
                format!("missing; it scores the samples that objective \"{}\" learns from", objective.kind)
            });
            problems.require(generate.samples != 1, "generate.samples", || {
                "is 1; a response is compared with others of its group, so at least 2 are needed".into()
            });
            problems.require(generate.samples >= n, "generate.samples", || {
                format!("is {}, less than the {n} of objective.n", generate.samples)
            });
            let least = objective.least_samples();
            problems.require(generate.samples >= least || generate.samples < n, "generate.samples", || {
                format!(
                    "is {n}, as objective.n is; objective.baseline takes subsets of others, so at least {least} are needed"
                )
            });
            let untruncated = generate.allow_truncated_sampling || generate.truncation().is_none();
            problems.require(untruncated, "generate.allow_truncated_sampling", || {
                "top_k, top_p or min_p biases the gradient; turn them off, or set this to true to accept that".into()
            });
        }
        problems.none()
    }

    /// Checks what a plan of memory depends on: files need not be there.
    pub fn check_for_plan(&self) -> Result<(), ConfigError> {
        let mut problems = Problems::default();
        self.generate.check(true, &mut problems);
        if let Err(e) = self.objective.validate() {
            problems.add("objective", e.to_string());
        }
        self.train.check_parts(self.generate.prompts_per_step, &mut problems);
        problems.at_least_one("train.eval_samples", self.train.eval_samples as u64);
        self.check_lora(&mut problems);
        self.check_sizes(&mut problems);
        problems.none()
    }

    /// Refuses settings of adapters that are out of range.
    fn check_lora(&self, problems: &mut Problems) {
        for (field, message) in self.lora.iter().flat_map(LoraSpec::problems) {
            let key = match field {
                "rank" => "lora.rank",
                "alpha" => "lora.alpha",
                "targets" => "lora.targets",
                _ => "lora.dropout",
            };
            problems.add(key, message);
        }
        let trained = self.model.per_layer_embeddings == Placement::Trained;
        problems.require(self.lora.is_none() || !trained, "model.per_layer_embeddings", || {
            "is \"trained\", and under [lora] adapters alone are; leave one out".into()
        });
        problems.require(self.lora.is_some() || self.model.adapter.is_none(), "model.adapter", || {
            "is set without [lora]; add that to train the adapter on, or merge it into the model first: bon-engine merge".into()
        });
    }

    /// Refuses an environment without a verifier, and a reward model that is not there.
    pub fn check_judges(&self, problems: &mut Problems) {
        for (key, judge) in [("verifier.path", &self.verifier), ("environment.path", &self.environment)] {
            let Some(path) = judge.as_ref().and_then(VerifierConfig::model) else { continue };
            let known = look_at(path).is_err_and(|e| matches!(e, OpenError::Other { .. }));
            problems.require(path.is_dir() || known, key, || {
                format!(
                    "no directory at {}; `bon-engine train` with objective.kind = \"verifier\" writes a reward model",
                    path.display()
                )
            });
        }
        problems.require(self.environment.is_none() || self.verifier.is_some(), "environment", || {
            "is set without [verifier]; a single one goes there".into()
        });
    }

    /// Refuses sizes that could only end in a failed allocation.
    pub fn check_sizes(&self, problems: &mut Problems) {
        let Self { generate, train, .. } = self;
        let tokens = MAX_GROUP_TOKENS / generate.samples.max(train.eval_samples).clamp(1, MAX_SAMPLES);
        for (key, value, max) in [
            ("generate.samples", generate.samples, MAX_SAMPLES),
            ("train.eval_samples", train.eval_samples, MAX_SAMPLES),
            ("generate.prompts_per_step", generate.prompts_per_step, MAX_PROMPTS),
            ("generate.refill_prompts", generate.refill_prompts, MAX_PROMPTS),
            ("generate.max_new_tokens", generate.max_new_tokens, tokens),
        ] {
            problems.require(value <= max, key, || format!("is {value}; it must be at most {max}"));
        }
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

    /// Whether steps read the weights of the start, though a checkpoint has weights of its own: those that its adapters are added
    /// to, or those that a KL term compares with.
    pub fn relies_on_start(&self) -> bool {
        self.train.kl_coefficient > 0.0 || self.lora.is_some()
    }

    /// What must be equal for a resumed run to compute, bit for bit, what the uninterrupted run would have, of
    /// [`TrainConfig::fields`].
    fn resume_fields(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let mut fields = self.fields()?;
        for key in FREE_TO_CHANGE {
            fields.remove(key);
        }
        for (key, default) in ADDED {
            if fields.get(key).is_some_and(|value| value == default) {
                fields.remove(key);
            }
        }
        // Where they lie changes no bit.
        if self.model.per_layer_embeddings != Placement::Trained {
            fields.remove("model.per_layer_embeddings");
        }
        if !self.relies_on_start() {
            fields.remove("model.path");
        }
        // So has it adapters of its own.
        fields.remove("model.adapter");
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

/// Values out of range, as they are found.
#[derive(Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Notes one.
    pub fn add(&mut self, key: &'static str, message: String) {
        self.0.push(Problem { key, message });
    }

    /// Notes one where something does not hold.
    pub fn require(&mut self, ok: bool, key: &'static str, message: impl FnOnce() -> String) {
        if !ok {
            self.add(key, message());
        }
    }

    /// Notes a number out of its bounds. `ok` is to be written so that NaN is in none.
    fn bound(&mut self, key: &'static str, value: f64, bounds: &str, ok: bool) {
        self.require(ok, key, || format!("is {value}; it must be {bounds}"));
    }

    fn at_least_one(&mut self, key: &'static str, value: u64) {
        self.require(value >= 1, key, || "must be at least 1".into());
    }

    /// All of them as an error, if there are any.
    pub fn none(self) -> Result<(), ConfigError> {
        if self.0.is_empty() { Ok(()) } else { Err(ConfigError::Invalid { problems: self.0 }) }
    }
}

fn unset(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

fn above_zero(x: f64) -> bool {
    x > 0.0 && x.is_finite()
}

fn zero_up(x: f64) -> bool {
    x >= 0.0 && x.is_finite()
}
