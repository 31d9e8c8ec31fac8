//! From tasks to scored groups: prompt, N streams, verdicts. Training and evaluation both begin here.

use std::sync::Arc;

use thiserror::Error;

use crate::backend::Backend;
use crate::config::GemmaConfig;
use crate::eval::{Sample, Unjudged};
use crate::gemma::Gemma;
use crate::generate::{GenerateError, Prompt, Response, Sampling, generate};
use crate::objective::{DEFAULT_PASS_THRESHOLD, ScoredGroup, passes};
use crate::tasks::Task;
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::verifier::pool::{Job, Pool};
use crate::verifier::{Failure, Request, Verifier};

/// When a response is complete, and what its text is.
pub struct StopRule<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    strings: &'a [String],
    /// A string of so many bytes lies within so many tokens of text.
    window: usize,
    interrupt: Option<&'a dyn Fn() -> bool>,
}

impl<'a> StopRule<'a> {
    /// Ends at the model's end tokens, at `<end_of_turn>` and where the text contains one of `strings`.
    pub fn new(config: &GemmaConfig, tokenizer: &'a Tokenizer, strings: &'a [String]) -> Self {
        let mut tokens = config.eos_tokens.clone();
        tokens.extend([tokenizer.eos(), tokenizer.end_of_turn()]);
        let window = strings.iter().map(String::len).max().unwrap_or(0);
        Self { tokenizer, tokens, strings, window, interrupt: None }
    }

    /// Also ends every response, wherever it is, as soon as `interrupt` says so: a rollout then ends as
    /// [`RolloutError::Interrupted`].
    pub fn interrupted_by(self, interrupt: &'a dyn Fn() -> bool) -> Self {
        Self { interrupt: Some(interrupt), ..self }
    }

    fn interrupted(&self) -> bool {
        self.interrupt.is_some_and(|interrupt| interrupt())
    }

    /// Whether a response ends with the last of these tokens.
    pub fn reached(&self, tokens: &[u32]) -> bool {
        if self.interrupted() || tokens.last().is_some_and(|t| self.tokens.contains(t)) {
            return true;
        }
        let tail = &tokens[tokens.len().saturating_sub(self.window)..];
        // A tail that cannot be decoded contains nothing.
        !self.strings.is_empty()
            && self.tokenizer.decode(tail).is_ok_and(|t| self.strings.iter().any(|s| t.contains(s.as_str())))
    }

    /// The response's text: without control tokens, up to the first stop string.
    pub fn text(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        let mut text = self.tokenizer.decode(tokens)?;
        if let Some(end) = self.strings.iter().filter_map(|s| text.find(s.as_str())).min() {
            text.truncate(end);
        }
        Ok(text)
    }

    /// The tokens that a response with this text would have: the text, then a stop string or else `end`.
    pub fn complete(&self, text: &str, end: u32) -> Result<Vec<u32>, TokenizerError> {
        match self.strings.first() {
            Some(stop) if text.contains(stop.as_str()) => self.tokenizer.encode(text),
            Some(stop) => self.tokenizer.encode(&format!("{text}{stop}")),
            None => Ok([self.tokenizer.encode(text)?, vec![end]].concat()),
        }
    }
}

/// How a task becomes a prompt.
#[derive(Debug, Clone, Copy)]
pub struct PromptFormat<'a> {
    /// Text before every prompt: few-shot examples.
    pub prefix: &'a str,
    /// Text after every prompt.
    pub suffix: &'a str,
    /// Whether to wrap it as a user's turn.
    pub turn: bool,
}

impl PromptFormat<'_> {
    /// The text and the tokens of a prompt.
    pub fn apply(&self, tokenizer: &Tokenizer, prompt: &str) -> Result<(String, Vec<u32>), TokenizerError> {
        let text = [self.prefix, prompt, self.suffix].concat();
        let ids = if self.turn { tokenizer.encode_turn(&text)? } else { tokenizer.encode_prompt(&text)? };
        Ok((text, ids))
    }
}

/// The verifiers at work.
pub struct Judges {
    verifier: Arc<dyn Verifier>,
    scores: Pool,
    /// Where the reward is not the verifier's score.
    rewards: Option<Pool>,
    pass_threshold: f64,
}

/// The settings' name of what gives the score.
const VERIFIER: &str = "verifier";
/// The settings' name of what gives the reward, where that is not the verifier.
const ENVIRONMENT: &str = "environment";

impl Judges {
    /// `verifier` gives the score r that selects; `environment`, where there is one, the reward R. A response passes
    /// at [`DEFAULT_PASS_THRESHOLD`].
    pub fn new(verifier: Arc<dyn Verifier>, environment: Option<Arc<dyn Verifier>>) -> Self {
        let (scores, rewards) = (Pool::new(Arc::clone(&verifier)), environment.map(Pool::new));
        Self { verifier, scores, rewards, pass_threshold: DEFAULT_PASS_THRESHOLD }
    }

    /// The same with another least reward of a response that passes.
    pub fn passing_at(self, pass_threshold: f64) -> Self {
        Self { pass_threshold, ..self }
    }

    fn pools(&self) -> impl Iterator<Item = (&'static str, &Pool)> {
        [(VERIFIER, &self.scores)].into_iter().chain(self.rewards.as_ref().map(|pool| (ENVIRONMENT, pool)))
    }

    /// What the verifiers put up with and have not told yet, each with `verifier` or `environment` before it.
    pub fn notes(&self) -> Vec<String> {
        let told = |(name, pool): (&str, &Pool)| {
            pool.notes().into_iter().map(move |note| format!("[{name}] {note}")).collect::<Vec<_>>()
        };
        self.pools().flat_map(told).collect()
    }

    /// Fails if responses have been put to a verifier and it has never judged one: figures of them mean nothing.
    pub fn check(&self) -> Result<(), RolloutError> {
        match self.pools().find_map(|(name, pool)| Some((name, pool.silent()?))) {
            Some((section, source)) => Err(RolloutError::Verifier { section, source }),
            None => Ok(()),
        }
    }

    /// The verifier's score r of a task's expert response.
    pub fn score(&self, prompt: &str, task: &Task) -> Result<f64, Failure> {
        let (response, answer) = (task.response(), task.answer.as_str());
        self.verifier.score(&Request { prompt, response, answer, task: &task.fields })
    }
}

/// M responses to one task, judged.
#[derive(Debug, Clone)]
pub struct Group {
    /// The prompt's tokens.
    pub prompt: Vec<u32>,
    /// What was sampled.
    pub responses: Vec<Response>,
    /// Its text.
    pub texts: Vec<String>,
    /// The answer that the verifier read in each, for votes and counts of distinct answers.
    pub answers: Vec<Option<String>>,
    /// r: what selects. Of those that could not be judged, what [`ScoredGroup::judged`] makes of them.
    pub scores: Vec<f64>,
    /// R: what counts; likewise.
    pub rewards: Vec<f64>,
    /// Whether it passes.
    pub correct: Vec<bool>,
    /// What could not be judged, and why.
    pub unjudged: Vec<Unjudged>,
}

impl Group {
    /// The group as evaluation sees it.
    pub fn samples(&self) -> Vec<Sample> {
        let judged = self.scores.iter().zip(&self.correct).zip(&self.answers);
        let sample = |((&score, &correct), answer): ((&f64, &bool), &Option<String>)| Sample {
            score,
            correct,
            answer: answer.clone(),
        };
        judged.map(sample).collect()
    }
}

/// Why groups could not be made.
#[derive(Debug, Error)]
pub enum RolloutError {
    /// Generation refused or failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// Text that is no tokens or the reverse.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The verifier does not work at all.
    #[error("the {section} cannot be used")]
    Verifier {
        /// `verifier` or `environment`.
        section: &'static str,
        /// Why.
        source: Failure,
    },
    /// [`StopRule::interrupted_by`] said so.
    #[error("interrupted")]
    Interrupted,
}

/// Wall-clock seconds spent in [`Rollout::run`].
#[derive(Debug, Clone, Copy, Default)]
pub struct RolloutSeconds {
    /// Sampling, with verification beside it.
    pub generate: f64,
    /// Waiting for verdicts after the last stream ended.
    pub verify: f64,
}

/// Everything that stays the same from one rollout to the next.
pub struct Rollout<'a, B: Backend> {
    /// The policy.
    pub model: &'a Gemma<B>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Prompts.
    pub format: PromptFormat<'a>,
    /// Ends of responses.
    pub stop: &'a StopRule<'a>,
}

impl<B: Backend> Rollout<'_, B> {
    /// Samples and judges `samples` responses to each of `tasks`, whose places in the list are their numbers in RNG
    /// keys; `progress` hears of every finished stream. Groups come in the order of the tasks.
    pub fn run(
        &self,
        tasks: &[&Task],
        samples: usize,
        sampling: &Sampling,
        judges: &mut Judges,
        mut progress: impl FnMut(),
    ) -> Result<(Vec<Group>, RolloutSeconds), RolloutError> {
        let mut groups = Vec::with_capacity(tasks.len());
        let mut seconds = RolloutSeconds::default();
        let started = std::time::Instant::now();
        let mut prompts = tasks
            .iter()
            .map(|task| self.format.apply(self.tokenizer, &task.prompt))
            .collect::<Result<Vec<_>, _>>()?;
        seconds.generate += started.elapsed().as_secs_f64();
        let room = self.model.backend.generation_bytes();
        let mut first = 0;
        while first < tasks.len() {
            if self.stop.interrupted() {
                return Err(RolloutError::Interrupted);
            }
            let started = std::time::Instant::now();
            let costs =
                prompts.iter().map(|(_, ids)| self.bytes(ids.len(), samples, sampling.max_new_tokens));
            let rest = prompts.split_off(fitting(costs, room));
            let (prompts, tasks) = (std::mem::replace(&mut prompts, rest), &tasks[first..]);
            let requests: Vec<Prompt> = (first..)
                .zip(&prompts)
                .map(|(number, (_, ids))| Prompt { ids, number: number as u32, streams: samples })
                .collect();
            let texts: Vec<(Arc<str>, Arc<str>)> = tasks
                .iter()
                .zip(&prompts)
                .map(|(task, (text, _))| (text.as_str().into(), task.answer.as_str().into()))
                .collect();
            let mut undecodable = None;
            let responses = generate(
                self.model,
                &requests,
                sampling,
                |tokens| self.stop.reached(tokens),
                |prompt, stream, response| {
                    progress();
                    let response = match self.stop.text(&response.tokens) {
                        Ok(text) => text,
                        Err(e) => {
                            undecodable = Some(e);
                            return;
                        }
                    };
                    let (text, answer) = &texts[prompt];
                    let job = Job {
                        id: prompt * samples + stream,
                        prompt: Arc::clone(text),
                        response,
                        answer: Arc::clone(answer),
                        task: Arc::clone(&tasks[prompt].fields),
                    };
                    if let Some(rewards) = &mut judges.rewards {
                        rewards.submit(job.clone());
                    }
                    judges.scores.submit(job);
                },
            )?;
            if let Some(e) = undecodable {
                return Err(e.into());
            }
            if self.stop.interrupted() {
                return Err(RolloutError::Interrupted);
            }
            seconds.generate += started.elapsed().as_secs_f64();
            let started = std::time::Instant::now();
            let collect = |section, pool: &mut Pool| {
                let verdicts = pool.collect().map_err(|source| RolloutError::Verifier { section, source });
                verdicts.map(|v| v.scores.into_iter().map(|(_, score)| score))
            };
            let mut scores = collect(VERIFIER, &mut judges.scores)?;
            let mut rewards = judges.rewards.as_mut().map(|pool| collect(ENVIRONMENT, pool)).transpose()?;
            for (((_, prompt), responses), task) in prompts.into_iter().zip(responses).zip(tasks) {
                let scores: Vec<_> = scores.by_ref().take(samples).collect();
                let rewards: Option<Vec<_>> = rewards.as_mut().map(|r| r.by_ref().take(samples).collect());
                let texts =
                    responses.iter().map(|r| self.stop.text(&r.tokens)).collect::<Result<Vec<_>, _>>()?;
                groups.push(judged(task, prompt, responses, texts, scores, rewards, judges));
            }
            seconds.verify += started.elapsed().as_secs_f64();
            first = groups.len();
        }
        Ok((groups, seconds))
    }

    /// About what a task takes of the device: keys and values of its prompt and of `samples` tails, and the activations
    /// of one layer for the prompt and for a token of each stream.
    fn bytes(&self, prompt: usize, samples: usize, new: usize) -> usize {
        let config = &self.model.config;
        let cached = config.layers.len() * 2 * config.num_kv_heads * config.head_dim;
        let active = config.intermediate_size + 6 * (config.hidden_size + config.num_heads * config.head_dim);
        let elements = |tokens: usize, each: usize| tokens.saturating_mul(each);
        let tokens = samples.saturating_mul(new).saturating_add(prompt);
        elements(tokens, cached)
            .saturating_add(elements(prompt.saturating_add(samples), active))
            .saturating_mul(self.model.backend.activation_dtype().bytes())
    }
}

/// How many of the first tasks are sampled together: as many as there is room for, and one at least. What a stream draws
/// does not depend on it.
fn fitting(costs: impl Iterator<Item = usize>, room: usize) -> usize {
    let mut left = room;
    let fits = |cost: &usize| {
        let after = left.checked_sub(*cost);
        left = after.unwrap_or(0);
        after.is_some()
    };
    costs.take_while(fits).count().max(1)
}

fn judged(
    task: &Task,
    prompt: Vec<u32>,
    responses: Vec<Response>,
    texts: Vec<String>,
    scores: Vec<Result<f64, Failure>>,
    rewards: Option<Vec<Result<f64, Failure>>>,
    judges: &Judges,
) -> Group {
    let mut unjudged = Vec::new();
    for (judge, verdicts) in [(VERIFIER, Some(&scores)), (ENVIRONMENT, rewards.as_ref())] {
        for (text, verdict) in texts.iter().zip(verdicts.into_iter().flatten()) {
            let Err(failure) = verdict else { continue };
            unjudged.push(Unjudged {
                prompt: task.prompt.clone(),
                response: text.clone(),
                judge: judge.to_owned(),
                kind: failure.kind().to_owned(),
                reason: failure.to_string(),
            });
        }
    }
    let values = |verdicts: &[Result<f64, Failure>]| -> Vec<Option<f64>> {
        verdicts.iter().map(|verdict| verdict.as_ref().ok().copied()).collect()
    };
    let (threshold, rewards) = (judges.pass_threshold, values(rewards.as_ref().unwrap_or(&scores)));
    let ScoredGroup { scores, rewards, .. } = ScoredGroup::judged(&values(&scores), &rewards, threshold);
    let answers = texts.iter().map(|t| judges.verifier.extract(t)).collect();
    let correct = rewards.iter().map(|&reward| passes(reward, threshold)).collect();
    Group { prompt, responses, texts, answers, scores, rewards, correct, unjudged }
}

#[cfg(test)]
mod tests {
    use super::fitting;

    #[test]
    fn a_batch_is_what_fits_and_never_nothing() {
        for (costs, room, want) in [
            (&[4, 4, 4][..], 8, 2),
            (&[4, 4, 4], 7, 1),
            (&[9, 1, 1], 8, 1),
            (&[1, 9, 1], 8, 1),
            (&[usize::MAX, 1], usize::MAX, 1),
            (&[0, 0, 0], 0, 3),
            (&[1], 0, 1),
        ] {
            assert_eq!(fitting(costs.iter().copied(), room), want, "{costs:?} in {room}");
        }
    }
}
