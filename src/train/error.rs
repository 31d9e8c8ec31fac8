//! Why a run cannot begin or go on.

use std::path::PathBuf;

use thiserror::Error;

use super::config::ConfigError;
use super::metrics::MetricsError;
use super::optimizer::NotFinite;
use super::pass_rate::PassRateError;
use super::pools::PoolError;
use super::snapshot::SnapshotError;
use crate::checkpoint::FileError;
use crate::device::DeviceError;
use crate::eval::EvalError;
use crate::generate::GenerateError;
use crate::model_dir::OpenError;
use crate::objective::ObjectiveError;
use crate::reward::RewardError;
use crate::rollout::RolloutError;
use crate::tasks::TaskError;
use crate::tokenizer::{ChatTextError, TokenizerError};
use crate::verifier::{BuildError, Failure};

/// What to do when a device failed within a step.
fn after(source: &DeviceError) -> &'static str {
    if source.out_of_memory {
        "; begin a new run, from model.path or the model of a checkpoint, with a lower generate.prompts_per_step, \
         generate.samples or generate.max_new_tokens, or a higher train.gradient_accumulation"
    } else {
        "; the newest checkpoint is untouched, and --resume goes on from it"
    }
}

fn after_rollout(source: &RolloutError) -> &'static str {
    match source {
        RolloutError::Generate(GenerateError::Device(source))
        | RolloutError::Reward { source: RewardError::Device(source), .. } => after(source),
        _ => "",
    }
}

/// Why a run cannot begin or go on.
#[derive(Debug, Error)]
pub enum TrainError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model directory.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A task file.
    #[error(transparent)]
    Tasks(#[from] TaskError),
    /// The report that tasks are chosen by.
    #[error(transparent)]
    PassRate(#[from] PassRateError),
    /// A checkpoint.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The metrics files.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Pools of judged samples.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// Another file of the run.
    #[error(transparent)]
    File(#[from] FileError),
    /// The verifier cannot be built.
    #[error("{section}: the verifier cannot be built")]
    Build {
        /// `[verifier]` or `[environment]`.
        section: &'static str,
        /// Why.
        source: BuildError,
    },
    /// A reward model cannot be opened.
    #[error("{section} kind = \"model\"")]
    RewardModel {
        /// `[verifier]` or `[environment]`.
        section: &'static str,
        /// Why.
        source: OpenError,
    },
    /// A reward model that would read other text than was written.
    #[error(
        "[{section}] kind = \"model\" has another vocabulary than {model}, so the tokens of a response would be others to it; \
         train the reward model from a model with the same tokenizer"
    )]
    OtherTokens {
        /// `verifier` or `environment`.
        section: &'static str,
        /// The model that writes.
        model: PathBuf,
    },
    /// A reward model fails at an expert response.
    #[error("{path}:{line}: the expert response")]
    ExpertScore {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// Why.
        source: RewardError,
    },
    /// Scored responses that cannot be trained on.
    #[error("{path}:{line}: {problem}")]
    Scored {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A score of a response in training is NaN or Inf.
    #[error(
        "step {step}: the logit of a response is {value}; begin a new run, from model.path or the model of a checkpoint, with a \
         lower optimizer.lr or a smaller optimizer.clip_norm"
    )]
    Logit {
        /// The step.
        step: u64,
        /// The value.
        value: f64,
    },
    /// The reward model that is trained fails at an evaluation.
    #[error("evaluation")]
    Scoring(#[source] RewardError),
    /// A task on which no response can be judged.
    #[error("{path}:{line}: the [{section}] cannot judge it: the task {problem}")]
    Unfit {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// `verifier` or `environment`.
        section: &'static str,
        /// What is wrong with the task.
        problem: String,
    },
    /// Sampling or scoring in training.
    #[error("step {step}{}", after_rollout(source))]
    Rollout {
        /// The step.
        step: u64,
        /// Why.
        source: RolloutError,
    },
    /// The run is over and nothing was ever judged.
    #[error("the run has learnt nothing")]
    Unjudged(#[source] RolloutError),
    /// A file or directory where the run would write, which no run has written.
    #[error(
        "{path} is there already, and no run of this program wrote it; move it away, or choose another train.output"
    )]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// Sampling or scoring in evaluation.
    #[error("evaluation")]
    Evaluation(#[source] RolloutError),
    /// The objective refuses a group.
    #[error("step {step}, {path}:{line}")]
    Objective {
        /// The step.
        step: u64,
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// Why.
        source: ObjectiveError,
    },
    /// Evaluation refuses its pools.
    #[error("the evaluation cannot be reported")]
    Eval(#[from] EvalError),
    /// Text that is no tokens.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A prompt that does not become tokens.
    #[error("{path}:{line}")]
    Prompt {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// Why.
        source: ChatTextError,
    },
    /// A prompt that leaves no room for a response.
    #[error(
        "{path}:{line}: the prompt has {tokens} tokens and generate.max_new_tokens is {new}, but the model's context \
         has {context}; shorten the prompt or lower generate.max_new_tokens"
    )]
    PromptTooLong {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// Tokens of the prompt.
        tokens: usize,
        /// `generate.max_new_tokens`.
        new: usize,
        /// The model's context.
        context: usize,
    },
    /// An expert response that does not fit behind its prompt.
    #[error(
        "{path}:{line}: prompt and expert response have {tokens} tokens, but the model's context has {context}; \
         shorten them"
    )]
    ExpertTooLong {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// Tokens of both.
        tokens: usize,
        /// The model's context.
        context: usize,
    },
    /// An expert response that the verifier cannot judge, and so not compare with samples.
    #[error("{path}:{line}: the verifier cannot judge the expert response; correct or remove the task")]
    Expert {
        /// The task file.
        path: PathBuf,
        /// Its line.
        line: usize,
        /// Why.
        source: Failure,
    },
    /// The device failed.
    #[error("step {step}{}", after(source))]
    Device {
        /// The step.
        step: u64,
        /// What happened.
        source: DeviceError,
    },
    /// NaN or Inf in the forward pass.
    #[error(
        "step {step}: the log-prob of a sampled token is {value}; begin a new run, from model.path or the model of a \
         checkpoint, with a lower optimizer.lr or a smaller optimizer.clip_norm"
    )]
    LogProb {
        /// The step.
        step: u64,
        /// The value.
        value: f32,
    },
    /// NaN or Inf in the gradient.
    #[error(
        "step {step}; begin a new run, from model.path or the model of a checkpoint, with a lower optimizer.lr, a \
         smaller optimizer.clip_norm or, on the CPU, model.dtype = \"f32\""
    )]
    Gradient {
        /// The step.
        step: u64,
        /// Which tensor.
        source: NotFinite,
    },
    /// The run directory holds a run, and nobody asked to resume it.
    #[error("{path} already holds a run; go on with --resume, or choose another train.output")]
    Exists {
        /// The run directory.
        path: PathBuf,
    },
    /// `--resume` without anything to resume.
    #[error("{path} holds no checkpoint to resume; start without --resume")]
    NothingToResume {
        /// The directory of checkpoints.
        path: PathBuf,
    },
    /// All checkpoints are damaged.
    #[error(
        "every checkpoint in {path} is damaged, the newest one thus: {reason}; move the directory away to start anew"
    )]
    AllDamaged {
        /// The directory of checkpoints.
        path: PathBuf,
        /// What is wrong with the newest.
        reason: String,
    },
    /// The run was begun with something else.
    #[error("{path} was begun with other settings, so it cannot go on to the same bits:{}", .differences.iter().map(|d| format!("\n  {d}")).collect::<String>())]
    Differs {
        /// The run directory.
        path: PathBuf,
        /// What differs.
        differences: Vec<String>,
    },
    /// A saved report that is none.
    #[error("{path}: not a report of an evaluation; remove it to evaluate anew")]
    Report {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_fails_at_says_how_to_go_on() {
        let text = |source: DeviceError| {
            let training = TrainError::Device { step: 7, source: source.clone() };
            let source = RolloutError::Generate(GenerateError::Device(source));
            [training, TrainError::Rollout { step: 7, source }]
                .map(|e| format!("{:#}", anyhow::Error::from(e)))
        };
        for text in text(DeviceError::new("cuda:0", "it fell off the bus")) {
            assert!(text.starts_with("step 7; ") && text.ends_with("cuda:0: it fell off the bus"), "{text}");
            assert!(text.contains("--resume goes on") && !text.contains("generate.samples"), "{text}");
        }
        // The same settings would fail again.
        for text in text(DeviceError::out_of_memory("cuda:0", "out of memory")) {
            assert!(
                text.contains("begin a new run") && text.contains("lower generate.prompts_per_step"),
                "{text}"
            );
            assert!(!text.contains("--resume"), "{text}");
        }
    }
}
