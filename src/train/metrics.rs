//! What a run reports: `metrics.jsonl` (a line per step), `eval.jsonl` (a line per evaluation), the same figures as
//! TensorBoard scalars in `tensorboard/`, and `unjudged.jsonl` (a line per response that could not be judged).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

use super::tensorboard::EventWriter;
use crate::eval::Unjudged;

/// One optimizer step. Rates and means are over the step's sampled responses unless said otherwise; a figure that is
/// not finite is written as null.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// 1, 2, 3, ...
    pub step: u64,
    /// The weighted negative log-likelihood that was differentiated. Its gradient means something, its size little.
    pub loss: f64,
    /// Mean reward R.
    pub reward_mean: f64,
    /// Unbiased pass@1: the share of right responses, those with a reward of at least `objective.pass_threshold`.
    pub pass_at_1: f64,
    /// Unbiased pass@N at the objective's N, mean over prompts.
    pub pass_at_n: f64,
    /// Reward of the response that the verifier selects out of N, mean over prompts (unbiased, all samples used).
    pub best_of_n_reward: f64,
    /// KL from the starting model per token (k3), where it is computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Tokens sampled.
    pub tokens: u64,
    /// Tokens sampled per second of the whole step.
    pub tokens_per_second: f64,
    /// Largest |log pi(sampler) - log pi(trainer)| over the sampled tokens that the step trains on (those of
    /// responses with a coefficient other than 0, or all under a KL term); 0 when both compute the same bits.
    pub logprob_gap_max: f64,
    /// Mean of the same.
    pub logprob_gap_mean: f64,
    /// Groups in which every response is right.
    pub all_pass_groups: u64,
    /// Groups in which none is.
    pub all_fail_groups: u64,
    /// Groups in which all responses earn the same, whatever that is: they teach nothing, except by `bon-sft` and
    /// `bon-rlb`.
    #[serde(default)]
    pub zero_variance_groups: u64,
    /// Prompts drawn beyond `generate.prompts_per_step` (`generate.refill_prompts`). All figures are over them, too, and over
    /// those that they replaced.
    #[serde(default)]
    pub refill_prompts: u64,
    /// Groups that others took the place of, because they taught nothing.
    #[serde(default)]
    pub refilled_groups: u64,
    /// Groups whose weights were cut at `objective.weight_clip`.
    pub clipped_groups: u64,
    /// Distinct answers per group, mean over prompts.
    pub distinct_answers: f64,
    /// Entropy of the answers of a group in nats, mean over prompts.
    pub answer_entropy: f64,
    /// Mean of -log pi over the sampled tokens in nats, pi at the sampling temperature: an estimate of the policy's entropy
    /// per token along its own responses. Where `top_k`, `top_p` or `min_p` cut the distribution, pi is the uncut one:
    /// the mean is then over the tokens that the cut leaves, and lower than the entropy.
    #[serde(default)]
    pub token_entropy: f64,
    /// Mean length of responses in tokens, end tokens included.
    #[serde(default)]
    pub response_length: f64,
    /// Responses cut by `generate.max_new_tokens`.
    pub truncated_responses: u64,
    /// Their share.
    #[serde(default)]
    pub truncated_share: f64,
    /// Responses that the verifier could not judge, by kind of failure.
    #[serde(default)]
    pub verifier_failures: BTreeMap<String, u64>,
    /// What a verifier that is trained said of the step's responses, before it learnt from them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verifier: Option<VerifierMetrics>,
    /// Wall-clock time of the phases.
    pub seconds: PhaseSeconds,
}

/// Scores r of a step's labelled responses; right are those with a label of at least `objective.pass_threshold`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct VerifierMetrics {
    /// Responses.
    pub responses: u64,
    /// Share of right ones.
    pub base_rate: f64,
    /// Mean of r.
    pub mean_score: f64,
    /// Share of responses that are right exactly if r is at least 1/2.
    pub accuracy: f64,
    /// Chance that a right response scores above a wrong one, whatever their prompts; none without both.
    pub auc: Option<f64>,
    /// The same within a group, mean over those that have both.
    pub pair_accuracy: Option<f64>,
}

/// Wall-clock seconds of a step's phases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseSeconds {
    /// Sampling.
    pub generate: f64,
    /// Scoring.
    pub verify: f64,
    /// Forward and backward pass.
    pub forward_backward: f64,
    /// Clipping and AdamW.
    pub optimizer: f64,
}

/// One evaluation on `data.eval_tasks`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Optimizer steps taken before it; 0 is the starting model.
    pub step: u64,
    /// Tasks.
    pub tasks: u64,
    /// Responses per task.
    pub samples: u64,
    /// N of the two figures below.
    pub n: u64,
    /// Unbiased pass@1.
    pub pass_at_1: f64,
    /// Unbiased pass@N.
    pub pass_at_n: f64,
    /// Share of tasks on which the verifier's choice out of N is right (unbiased).
    #[serde(alias = "best_of_n_reward")]
    pub best_of_n: f64,
    /// Chance that a right response scores above a wrong one, where the verifier is not the environment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auc: Option<f64>,
    /// The same within a problem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pair_accuracy: Option<f64>,
    /// Share of responses that are right exactly if their score, a probability, is at least 1/2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<f64>,
    /// Expected calibration error of such scores.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ece: Option<f64>,
    /// Wall-clock time.
    pub seconds: f64,
}

/// Why metrics cannot be written.
#[derive(Debug, Error)]
pub enum MetricsError {
    /// The system refuses.
    #[error("cannot write {path}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A whole line that no run of ours has written.
    #[error("{path}:{line}: not a line of metrics with a `step`; move the file away to resume")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
}

/// The open metrics files of a run.
#[derive(Debug)]
pub struct Metrics {
    steps: JsonLines,
    evals: JsonLines,
    unjudged: JsonLines,
    events: EventWriter,
    events_dir: PathBuf,
}

/// The name of [`StepMetrics`]' file in a run directory.
pub const STEPS: &str = "metrics.jsonl";
/// That of [`EvalMetrics`]'.
pub const EVALS: &str = "eval.jsonl";
/// That of the responses that could not be judged.
pub const UNJUDGED: &str = "unjudged.jsonl";
/// That of the directory of TensorBoard's events.
pub const EVENTS: &str = "tensorboard";

/// A line of [`UNJUDGED`].
#[derive(Serialize)]
struct UnjudgedLine<'a> {
    /// The step that sampled the response, or after which the evaluation did.
    step: u64,
    evaluation: bool,
    #[serde(flatten)]
    response: &'a Unjudged,
}

impl Metrics {
    /// Opens the files in `run_dir` to go on after `completed` steps (0: from the start). Whatever they say of later
    /// steps is cut off, so that they end up as if the run had never been interrupted.
    pub fn open(run_dir: &Path, completed: u64) -> Result<Self, MetricsError> {
        let events_dir = run_dir.join(EVENTS);
        Ok(Self {
            steps: JsonLines::open(run_dir.join(STEPS), completed)?,
            evals: JsonLines::open(run_dir.join(EVALS), completed)?,
            unjudged: JsonLines::open(run_dir.join(UNJUDGED), completed)?,
            events: EventWriter::create(&events_dir, completed + 1)
                .map_err(|source| MetricsError::Io { path: events_dir.clone(), source })?,
            events_dir,
        })
    }

    /// Records a step.
    pub fn step(&mut self, metrics: &StepMetrics) -> Result<(), MetricsError> {
        self.steps.append(metrics)?;
        self.scalars("train", metrics.step, metrics)
    }

    /// Records an evaluation.
    pub fn eval(&mut self, metrics: &EvalMetrics) -> Result<(), MetricsError> {
        self.evals.append(metrics)?;
        self.scalars("eval", metrics.step, metrics)
    }

    /// Records responses of a step, or of the evaluation after it, that could not be judged.
    pub fn unjudged(
        &mut self,
        step: u64,
        evaluation: bool,
        responses: &[Unjudged],
    ) -> Result<(), MetricsError> {
        let lines = responses.iter().map(|response| UnjudgedLine { step, evaluation, response });
        lines.into_iter().try_for_each(|line| self.unjudged.append(&line))
    }

    /// Makes all lines so far durable. Call before saving a checkpoint, so that a resumed run finds the lines of
    /// every step that the checkpoint has taken.
    pub fn sync(&self) -> Result<(), MetricsError> {
        [&self.steps, &self.evals, &self.unjudged]
            .into_iter()
            .try_for_each(|f| f.file.sync_data().map_err(|e| f.io_error(e)))
    }

    fn scalars(&mut self, tag: &str, step: u64, metrics: &impl Serialize) -> Result<(), MetricsError> {
        fn collect(tag: &str, value: &Value, out: &mut Vec<(String, f64)>) {
            match value {
                Value::Number(n) => out.extend(n.as_f64().map(|x| (tag.to_string(), x))),
                Value::Object(fields) => {
                    for (name, value) in fields.iter().filter(|(name, _)| *name != "step") {
                        collect(&format!("{tag}/{name}"), value, out);
                    }
                }
                _ => {}
            }
        }
        let io_error = |source| MetricsError::Io { path: self.events_dir.clone(), source };
        let mut values = Vec::new();
        collect(tag, &serde_json::to_value(metrics).map_err(|e| io_error(e.into()))?, &mut values);
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        self.events.scalars(step, wall_time, &values).map_err(io_error)
    }
}

/// A file of JSON objects with a `step`, one per line.
#[derive(Debug)]
struct JsonLines {
    path: PathBuf,
    file: File,
}

impl JsonLines {
    /// Opens or creates the file and cuts it before the first line of a step after `completed`, or before a last line
    /// that a crash left without its end.
    fn open(path: PathBuf, completed: u64) -> Result<Self, MetricsError> {
        #[derive(Deserialize)]
        struct Step {
            step: u64,
        }
        let io_error = |source| MetricsError::Io { path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_error)?;
        let mut reader = BufReader::new(&file);
        let mut keep = 0;
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            let length = reader.read_until(b'\n', &mut line).map_err(io_error)?;
            if !line.ends_with(b"\n") {
                break;
            }
            let Ok(Step { step }) = serde_json::from_slice(&line) else {
                return Err(MetricsError::Line { path, line: number });
            };
            if step > completed {
                break;
            }
            keep += length as u64;
        }
        file.set_len(keep).and_then(|()| file.seek(SeekFrom::Start(keep))).map_err(io_error)?;
        Ok(Self { path, file })
    }

    /// Appends one line in one write.
    fn append(&mut self, record: &impl Serialize) -> Result<(), MetricsError> {
        serde_json::to_vec(record)
            .map_err(io::Error::from)
            .and_then(|mut line| {
                line.push(b'\n');
                self.file.write_all(&line)
            })
            .map_err(|e| self.io_error(e))
    }

    fn io_error(&self, source: io::Error) -> MetricsError {
        MetricsError::Io { path: self.path.clone(), source }
    }
}
