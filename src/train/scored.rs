//! What a verifier is trained on: prompts, responses to each, and what was found of them. One step of that, and the
//! evaluation.
//!
//! A line of the file is a task whose `responses` are objects with `text` and `score`, the label, as
//! `eval --save-samples` writes them. That also has each response's `tokens`, so that a reward model learns from the very
//! tokens that it will be asked about; without them the text is tokenised, and ends as sampled ones do.

use std::path::Path;

use serde_json::{Map, Value};

use super::config::TrainConfig;
use super::error::TrainError;
use super::metrics::VerifierMetrics;
use super::optimizer::Optimizer;
use super::setup::{completed, prompt, stop_rule};
use crate::backend::Backend;
use crate::eval::{Calibration, Problem, Sample, calibrate};
use crate::gemma::Gemma;
use crate::gemma::activations::Kept;
use crate::model_dir::ModelDir;
use crate::objective::verifier::{self, Loss};
use crate::objective::{ObjectiveError, ScoredGroup, coefficients, passes};
use crate::reward::{self, Forward, probability};
use crate::rollout::ResponseEnd;
use crate::segments::Continued;
use crate::tasks::{Task, Tasks};

/// A prompt and scored responses to it.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// The tokens of each response, to its end.
    pub responses: Vec<Vec<u32>>,
    /// y of each.
    pub labels: Vec<f64>,
    /// The text of each without surrounding white space: equal ones vote for the same.
    texts: Vec<String>,
}

/// Reads the scored responses of every task, and checks that they can be trained on. Errors name the line.
pub fn scored<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    path: &Path,
    tasks: &Tasks,
) -> Result<Vec<Scored>, TrainError> {
    let stop_rule = stop_rule(config, dir);
    let each = |task: &Task| {
        let (_, prompt) = prompt(config, dir, path, task)?;
        let bad = |problem: String| TrainError::Scored { path: path.to_owned(), line: task.line, problem };
        let (mut responses, mut labels, mut texts) = (Vec::new(), Vec::new(), Vec::new());
        for (i, response) in list(&task.fields).map_err(bad)?.iter().enumerate() {
            let read = one(config, dir, &stop_rule, response);
            let (tokens, label) = read.map_err(|(field, problem)| {
                let dot = if field.is_empty() { "" } else { "." };
                bad(format!("field `responses[{i}]{dot}{field}` {problem}"))
            })?;
            let (length, context) = (prompt.len() + tokens.len(), dir.model.config.max_positions);
            if length > context {
                return Err(bad(format!(
                    "prompt and `responses[{i}]` have {length} tokens, but the model's context has {context}; leave the \
                     response out"
                )));
            }
            texts.push(stop_rule.text(&tokens).trim().to_owned());
            responses.push(tokens);
            labels.push(label);
        }
        let group = ScoredGroup { scores: vec![0.0; labels.len()], rewards: labels, expert_score: None };
        // What the labels may be does not depend on what the model says of them.
        coefficients(&config.objective, &group).map_err(|e| match e {
            ObjectiveError::Label { index, value } => bad(format!(
                "field `responses[{index}].score` is {value}; with objective.loss = \"bernoulli\" scores are from 0 to 1: scale \
                 them, or take \"pairwise\""
            )),
            e => bad(e.to_string()),
        })?;
        Ok(Scored { prompt, responses, labels: group.rewards, texts })
    };
    tasks.list.iter().map(each).collect()
}

/// The field `responses`.
fn list(fields: &Map<String, Value>) -> Result<&Vec<Value>, String> {
    match fields.get("responses") {
        Some(Value::Array(list)) if !list.is_empty() => Ok(list),
        Some(Value::Array(_)) => Err("field `responses` is empty; leave the line out".into()),
        Some(_) => Err("field `responses` is no list; write [{\"text\": \"...\", \"score\": 1}, ...]".into()),
        None => Err("field `responses` is missing; a verifier learns from scored responses, \
                     [{\"text\": \"...\", \"score\": 1}, ...], which `bon-engine eval --save-samples` writes"
            .into()),
    }
}

/// The tokens and the label of a response; or the field that is wrong, and how.
fn one<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    stop_rule: &ResponseEnd,
    response: &Value,
) -> Result<(Vec<u32>, f64), (&'static str, String)> {
    let Value::Object(fields) = response else {
        return Err(("", "is no object; write {\"text\": \"...\", \"score\": 1}".into()));
    };
    let Some(text) = fields.get("text").and_then(Value::as_str) else {
        return Err(("text", "is missing or no string".into()));
    };
    let Some(label) = fields.get("score").and_then(Value::as_f64) else {
        return Err((
            "score",
            "is missing or no number; leave a response out that could not be judged".into(),
        ));
    };
    let Some(tokens) = fields.get("tokens") else {
        let tokens = completed(config, dir, stop_rule, text);
        return tokens.map(|tokens| (tokens, label)).map_err(|e| ("text", format!("has no tokens: {e}")));
    };
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
    let ids = tokens.as_array().and_then(|list| list.iter().map(id).collect::<Option<Vec<u32>>>());
    let vocab = dir.model.config.vocab_size;
    match ids {
        Some(ids) if !ids.is_empty() && ids.iter().all(|&id| (id as usize) < vocab) => {
            if stop_rule.text(&ids) != text {
                let problem = "are not those of `text` to this model's tokenizer, or end elsewhere by generate.stop; \
                               leave `tokens` out, and the text is tokenised anew";
                return Err(("tokens", problem.into()));
            }
            Ok((ids, label))
        }
        _ => Err(("tokens", format!("is no list of token ids below {vocab}"))),
    }
}

/// What in labels can be used, but is hardly meant; an error where nothing can be learnt from them.
pub(super) fn check_labels(
    config: &TrainConfig,
    path: &Path,
    groups: &[Scored],
) -> Result<Option<String>, TrainError> {
    let equal = |labels: &[f64]| labels.iter().all(|y| *y == labels[0]);
    let none = groups.iter().all(|group| equal(&group.labels));
    let all: Vec<f64> = groups.iter().flat_map(|group| &group.labels).copied().collect();
    let (path, count) = (path.display(), all.len());
    match config.objective.loss.unwrap_or_default() {
        Loss::Pairwise if none => {
            let problem = "no prompt has responses with different scores, so there is nothing to compare; sample more \
                           responses, or harder prompts, or take objective.loss = \"bernoulli\"";
            Err(TrainError::Scored { path: path.to_string().into(), line: 1, problem: problem.into() })
        }
        Loss::Bernoulli if equal(&all) => Ok(Some(format!(
            "{path}: all {count} responses have the score {}; a verifier learns from right and wrong ones",
            all[0]
        ))),
        _ => Ok(None),
    }
}

/// Runs `f` on groups as models take them.
fn continued<R>(groups: &[&Scored], f: impl FnOnce(&[Continued]) -> R) -> R {
    let responses: Vec<Vec<&[u32]>> =
        groups.iter().map(|g| g.responses.iter().map(Vec::as_slice).collect()).collect();
    let all = groups.iter().zip(&responses);
    let all: Vec<Continued> = all.map(|(g, responses)| Continued { prompt: &g.prompt, responses }).collect();
    f(&all)
}

/// Logits of some groups' responses, group by group.
fn by_group<'a>(groups: &'a [&Scored], logits: &'a [f64]) -> impl Iterator<Item = (&'a Scored, Vec<f64>)> {
    let mut rest = logits;
    groups.iter().map(move |group| {
        let (own, others) = rest.split_at(group.responses.len());
        rest = others;
        (*group, own.to_vec())
    })
}

/// A group as evaluation sees it.
fn problem(config: &TrainConfig, id: String, group: &Scored, logits: &[f64]) -> Problem {
    let threshold = config.objective.threshold();
    let sample = |(i, &logit): (usize, &f64)| Sample {
        score: probability(logit),
        correct: passes(group.labels[i], threshold),
        answer: Some(group.texts[i].clone()),
        tokens: group.responses[i].len(),
        // Whatever drew it, it is scored as it is.
        truncated: false,
    };
    Problem { id, samples: logits.iter().enumerate().map(sample).collect() }
}

/// What a step's micro-batches add up to.
#[derive(Default)]
pub(super) struct Fit {
    /// L, the mean over the step's groups.
    pub(super) loss: f64,
    /// The fewest activations that a micro-batch kept.
    pub(super) kept: Option<Kept>,
    problems: Vec<Problem>,
}

impl Fit {
    /// Adds the gradient of one micro-batch of a step of so many groups.
    pub(super) fn backward<B: Backend>(
        &mut self,
        config: &TrainConfig,
        model: &Gemma<B>,
        optimizer: &mut Optimizer<B>,
        groups: &[&Scored],
        of: usize,
        step: u64,
    ) -> Result<(), TrainError> {
        let forward = continued(groups, |groups| Forward::new(model, groups, config.train.recompute));
        self.kept = self.kept.into_iter().chain([forward.kept]).min_by_key(Kept::parts);
        model.backend.check().map_err(|source| TrainError::Device { step, source })?;
        if let Some(&value) = forward.logits.iter().find(|s| !s.is_finite()) {
            return Err(TrainError::Logit { step, value });
        }
        let mut weights = Vec::with_capacity(forward.logits.len());
        for (group, logits) in by_group(groups, &forward.logits) {
            self.problems.push(problem(config, String::new(), group, &logits));
            let group = ScoredGroup { scores: logits, rewards: group.labels.clone(), expert_score: None };
            let checked = "labels were checked, and logits are finite";
            self.loss += verifier::loss(&config.objective, &group).expect(checked) / of as f64;
            let all = coefficients(&config.objective, &group).expect(checked).samples;
            weights.extend(all.into_iter().map(|c| c / of as f64));
        }
        forward.backward(model, &weights, &mut optimizer.grads);
        Ok(())
    }

    /// What the model said of the step's responses before it learnt from them.
    pub(super) fn metrics(&self) -> VerifierMetrics {
        let Calibration { samples, base_rate, mean_score, auc, pair_accuracy, probabilities, .. } =
            calibrate(&self.problems);
        let accuracy = probabilities.map(|p| p.accuracy).unwrap_or_default();
        VerifierMetrics { responses: samples as u64, base_rate, mean_score, accuracy, auc, pair_accuracy }
    }
}

/// The problems that an evaluation of a model on scored responses is made of: its scores, and what is right by the labels.
pub(super) fn judged<B: Backend>(
    config: &TrainConfig,
    model: &Gemma<B>,
    tasks: &Tasks,
    groups: &[Scored],
    mut progress: impl FnMut(),
    stop: impl Fn() -> bool,
) -> Result<Option<Vec<Problem>>, TrainError> {
    /// Groups between two looks at whether to stop.
    const TOGETHER: usize = 16;
    let groups: Vec<&Scored> = groups.iter().collect();
    let mut ids = tasks.problem_ids().into_iter();
    let mut problems = Vec::with_capacity(groups.len());
    for some in groups.chunks(TOGETHER) {
        if stop() {
            return Ok(None);
        }
        let logits = continued(some, |groups| reward::logits(model, groups)).map_err(TrainError::Scoring)?;
        for ((group, logits), id) in by_group(some, &logits).zip(&mut ids) {
            logits.iter().for_each(|_| progress());
            problems.push(problem(config, id, group, &logits));
        }
    }
    Ok(Some(problems))
}

/// Responses of the prompt with the fewest: what Best-of-N is estimated up to.
pub(super) fn fewest(groups: &[Scored]) -> usize {
    groups.iter().map(|group| group.responses.len()).min().unwrap_or(0)
}
