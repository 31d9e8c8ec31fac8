//! From tasks to scored groups: prompt, N streams, verdicts. Training and evaluation both begin here.

use std::sync::Arc;

use thiserror::Error;

use crate::backend::Backend;
use crate::chat::{ChatTemplate, Message, Role};
use crate::eval::{Judged, Sample, Unjudged};
use crate::gemma::Gemma;
use crate::gemma::config::GemmaConfig;
use crate::generate::{Finish, GenerateError, Prompt, Response, Sampling, fitting, generate};
use crate::objective::{DEFAULT_PASS_THRESHOLD, ScoredGroup, passes};
use crate::reward::{RewardError, Scorer};
use crate::segments::Continued;
use crate::tasks::Task;
use crate::tokenizer::{ChatTextError, Tokenizer, TokenizerError};
use crate::verifier::pool::{Job, Pool};
use crate::verifier::{Failure, Request, Verifier};

/// When a response is complete, and what its text is: for sampling, live output, verifiers and experts alike.
///
/// A response ends with the first end token, or with the token that completes the first occurrence of a stop string in
/// the bytes of its text. Its text is what comes before either.
pub struct ResponseEnd<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    strings: &'a [String],
    /// Length of the longest string in bytes.
    window: usize,
    interrupt: Option<&'a dyn Fn() -> bool>,
}

impl<'a> ResponseEnd<'a> {
    /// Ends at the model's end tokens, at `<end_of_turn>` and where the text contains one of `strings`; a string that
    /// is the name of a control token also ends at that token, which no text contains.
    pub fn new(config: &GemmaConfig, tokenizer: &'a Tokenizer, strings: &'a [String]) -> Self {
        let mut tokens = config.eos_tokens.clone();
        tokens.extend([tokenizer.eos(), tokenizer.end_of_turn()]);
        tokens.extend(strings.iter().filter_map(|s| tokenizer.control(s)));
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

    /// Whether a response that none of its earlier tokens ended ends with the last of these.
    pub fn reached(&self, tokens: &[u32]) -> bool {
        self.interrupted() || self.ends(tokens)
    }

    /// [`ResponseEnd::reached`] but for the interruption.
    fn ends(&self, tokens: &[u32]) -> bool {
        let Some(last) = tokens.last() else { return false };
        if self.tokens.contains(last) {
            return true;
        }
        // An occurrence that is new has a byte of the last token, and at most `window - 1` before it. Tokens without
        // text, of which there may be any number, lie between.
        let (mut begin, mut before) = (tokens.len() - 1, 0);
        while begin > 0 && before + 1 < self.window {
            begin -= 1;
            before += self.tokenizer.bytes(&tokens[begin..=begin]).len();
        }
        !self.strings.is_empty() && self.stop_in(&self.tokenizer.bytes(&tokens[begin..])).is_some()
    }

    /// Where the first stop string begins.
    fn stop_in(&self, text: &[u8]) -> Option<usize> {
        let find = |s: &String| text.windows(s.len().max(1)).position(|bytes| bytes == s.as_bytes());
        self.strings.iter().filter_map(find).min()
    }

    /// The response's text: without control tokens, up to the first end token or stop string.
    pub fn text(&self, tokens: &[u32]) -> String {
        String::from_utf8_lossy(&self.bytes(tokens).0).into_owned()
    }

    /// The bytes of the text, and whether anything ends it.
    fn bytes(&self, tokens: &[u32]) -> (Vec<u8>, bool) {
        let end = tokens.iter().position(|t| self.tokens.contains(t));
        let mut text = self.tokenizer.bytes(&tokens[..end.unwrap_or(tokens.len())]);
        let stop = self.stop_in(&text);
        text.truncate(stop.unwrap_or(text.len()));
        (text, end.or(stop).is_some())
    }

    /// The beginning of [`ResponseEnd::text`] that no further token can change: until the response ends, without a beginning
    /// of a stop string at its end, and without a character whose bytes are not complete.
    pub fn settled(&self, tokens: &[u32]) -> String {
        let (mut text, ended) = self.bytes(tokens);
        if !ended {
            let beginnings = self.strings.iter().flat_map(|s| (1..s.len()).map(|end| &s.as_bytes()[..end]));
            let held = beginnings.filter(|b| text.ends_with(b)).map(<[u8]>::len).max().unwrap_or(0);
            text.truncate(text.len() - held);
            let rest = text.utf8_chunks().last().map_or(&[][..], |chunk| chunk.invalid());
            if str::from_utf8(rest).is_err_and(|e| e.error_len().is_none()) {
                text.truncate(text.len() - rest.len());
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    /// The tokens that a response with this text would have: the text up to where the rule ends it, with a stop string
    /// or else `end` behind it.
    pub fn complete(&self, text: &str, end: u32) -> Result<Vec<u32>, TokenizerError> {
        let text = &text[..self.stop_in(text.as_bytes()).unwrap_or(text.len())];
        let stop = self.strings.first();
        let end = stop.and_then(|s| self.tokenizer.control(s)).unwrap_or(end);
        if let Some(stop) = stop.filter(|s| self.tokenizer.control(s).is_none()) {
            let tokens = self.cut(self.tokenizer.encode(&format!("{text}{stop}"))?);
            // The end of the text and the stop string may hold an earlier occurrence, as "-" and "--" do.
            if self.text(&tokens) == text {
                return Ok(tokens);
            }
        }
        let mut tokens = self.cut(self.tokenizer.encode(text)?);
        if !self.ends(&tokens) {
            tokens.push(end);
        }
        Ok(tokens)
    }

    /// The tokens up to the first with which the rule ends them.
    fn cut(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        let end = (1..tokens.len()).find(|&n| self.ends(&tokens[..n]));
        tokens.truncate(end.unwrap_or(tokens.len()));
        tokens
    }
}

/// How a task becomes a prompt.
#[derive(Debug, Clone, Copy)]
pub struct PromptFormat<'a> {
    /// Text before every prompt: few-shot examples.
    pub prefix: &'a str,
    /// Text after every prompt.
    pub suffix: &'a str,
    /// What stands around it.
    pub wrapping: Wrapping<'a>,
}

/// What stands around a prompt.
#[derive(Debug, Clone, Copy)]
pub enum Wrapping<'a> {
    /// BOS before it.
    None,
    /// Gemma's turns.
    Turn,
    /// What the checkpoint's chat template writes.
    Chat(&'a ChatTemplate),
}

impl PromptFormat<'_> {
    /// The text and the tokens of a prompt that `history` comes before. Of a conversation the text is the last turn's.
    pub fn apply(
        &self,
        tokenizer: &Tokenizer,
        history: &[Message],
        prompt: &str,
    ) -> Result<(String, Vec<u32>), ChatTextError> {
        let text = [self.prefix, prompt, self.suffix].concat();
        let turns = || {
            let last = Message { role: Role::User, content: text.clone() };
            history.iter().cloned().chain([last]).collect::<Vec<_>>()
        };
        let ids = match self.wrapping {
            Wrapping::None if !history.is_empty() => return Err(ChatTextError::NoTurns),
            Wrapping::None => tokenizer.encode_prompt(&text)?,
            Wrapping::Turn => tokenizer.encode_turns(&turns())?,
            Wrapping::Chat(template) => tokenizer.encode_chat(template, &turns())?,
        };
        Ok((text, ids))
    }
}

/// What judges responses: a verifier by their text, or a reward model by their tokens.
pub enum Judge {
    /// A verifier, and the threads that ask it.
    Text(Arc<dyn Verifier>, Pool),
    /// A reward model.
    Model(Box<dyn Scorer>),
}

impl From<Arc<dyn Verifier>> for Judge {
    fn from(verifier: Arc<dyn Verifier>) -> Self {
        Self::Text(Arc::clone(&verifier), Pool::new(verifier))
    }
}

impl From<Box<dyn Scorer>> for Judge {
    fn from(scorer: Box<dyn Scorer>) -> Self {
        Self::Model(scorer)
    }
}

/// A response that nobody sampled, to be judged.
#[derive(Debug, Clone, Copy)]
pub struct Given<'a> {
    /// The prompt's text and tokens.
    pub prompt: (&'a str, &'a [u32]),
    /// The response's.
    pub response: (&'a str, &'a [u32]),
    /// The task.
    pub task: &'a Task,
}

impl Judge {
    fn pool(&self) -> Option<&Pool> {
        match self {
            Self::Text(_, pool) => Some(pool),
            Self::Model(_) => None,
        }
    }

    fn model(&self) -> Option<&dyn Scorer> {
        match self {
            Self::Text(..) => None,
            Self::Model(scorer) => Some(&**scorer),
        }
    }

    /// Hands over a response that is complete, while others are still sampled. A reward model waits for all of them.
    fn submit(&mut self, job: Job) {
        if let Self::Text(_, pool) = self {
            pool.submit(job);
        }
    }

    /// The verdicts on all that has been submitted since the last call, which are these groups.
    fn collect(
        &mut self,
        section: &'static str,
        groups: &[Continued],
    ) -> Result<Vec<Result<f64, Failure>>, RolloutError> {
        match self {
            Self::Text(_, pool) => {
                let verdicts = pool.collect().map_err(|source| RolloutError::Verifier { section, source })?;
                Ok(verdicts.scores.into_iter().map(|(_, score)| score).collect())
            }
            Self::Model(scorer) => {
                let scores =
                    scorer.score(groups).map_err(|source| RolloutError::Reward { section, source })?;
                Ok(scores.into_iter().map(Ok).collect())
            }
        }
    }
}

/// The judges at work.
pub struct Judges {
    scores: Judge,
    /// Where the reward is not the verifier's score.
    rewards: Option<Judge>,
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
        Self::of(verifier.into(), environment.map(Judge::from))
    }

    /// The same of judges of either kind.
    pub fn of(verifier: Judge, environment: Option<Judge>) -> Self {
        Self { scores: verifier, rewards: environment, pass_threshold: DEFAULT_PASS_THRESHOLD }
    }

    /// The same with another least reward of a response that passes.
    pub fn passing_at(self, pass_threshold: f64) -> Self {
        Self { pass_threshold, ..self }
    }

    fn all(&self) -> impl Iterator<Item = (&'static str, &Judge)> {
        [(VERIFIER, &self.scores)].into_iter().chain(self.rewards.as_ref().map(|judge| (ENVIRONMENT, judge)))
    }

    fn pools(&self) -> impl Iterator<Item = (&'static str, &Pool)> {
        self.all().filter_map(|(name, judge)| Some((name, judge.pool()?)))
    }

    /// The reward models among them, each with the name of its section.
    pub fn models(&self) -> impl Iterator<Item = (&'static str, &dyn Scorer)> {
        self.all().filter_map(|(name, judge)| Some((name, judge.model()?)))
    }

    /// Whether what selects is judged apart from what counts.
    pub fn differ(&self) -> bool {
        self.rewards.is_some()
    }

    /// The answer read in a response, by the verifier or, where that is a model, by the environment.
    fn extract(&self, response: &str) -> Option<String> {
        self.all().find_map(|(_, judge)| match judge {
            Judge::Text(verifier, _) => Some(verifier.extract(response)),
            Judge::Model(_) => None,
        })?
    }

    /// What the verifiers put up with and have not told yet, each with `verifier` or `environment` before it.
    pub fn notes(&self) -> Vec<String> {
        let told = |(name, pool): (&str, &Pool)| {
            pool.notes().into_iter().map(move |note| format!("[{name}] {note}")).collect::<Vec<_>>()
        };
        self.pools().flat_map(told).collect()
    }

    /// What keeps a verifier from judging any response to a task: its section of the settings, and words that follow "the
    /// task".
    pub fn unfit(&self, task: &Task) -> Option<(&'static str, String)> {
        self.pools().find_map(|(name, pool)| Some((name, pool.check_task(&task.fields).err()?)))
    }

    /// Fails if responses have been put to a verifier and it has never judged one: figures of them mean nothing.
    pub fn check(&self) -> Result<(), RolloutError> {
        match self.pools().find_map(|(name, pool)| Some((name, pool.silent()?))) {
            Some((section, source)) => Err(RolloutError::Verifier { section, source }),
            None => Ok(()),
        }
    }

    /// The verifier's score r of a response that nobody sampled.
    pub fn score(&self, given: Given) -> Result<Result<f64, Failure>, RewardError> {
        let Given { prompt: (prompt, prompt_tokens), response: (response, tokens), task } = given;
        match &self.scores {
            Judge::Text(verifier, _) => {
                let request = Request { prompt, response, answer: &task.answer, task: &task.fields };
                Ok(verifier.score(&request))
            }
            Judge::Model(scorer) => {
                let group = Continued { prompt: prompt_tokens, responses: &[tokens] };
                scorer.score(&[group]).map(|scores| Ok(scores[0]))
            }
        }
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
    /// Whether R was judged, and not made up for one that could not be.
    pub rewarded: Vec<bool>,
    /// What could not be judged, and why.
    pub unjudged: Vec<Unjudged>,
}

impl Group {
    /// The group as evaluation sees it.
    pub fn samples(&self) -> Vec<Sample> {
        let sample = |i: usize| Sample {
            score: self.scores[i],
            correct: self.correct[i],
            answer: self.answers[i].clone(),
            tokens: self.responses[i].tokens.len(),
            truncated: self.responses[i].finish == Finish::Length,
        };
        (0..self.responses.len()).map(sample).collect()
    }

    /// [`Group::samples`] with texts and rewards.
    pub fn judged(&self) -> Vec<Judged> {
        let of = |(i, sample): (usize, Sample)| Judged {
            text: self.texts[i].clone(),
            ids: self.responses[i].tokens.clone(),
            reward: self.rewards[i],
            rewarded: self.rewarded[i],
            sample,
        };
        self.samples().into_iter().enumerate().map(of).collect()
    }
}

/// Why groups could not be made.
#[derive(Debug, Error)]
pub enum RolloutError {
    /// Generation refused or failed.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A prompt that does not become tokens.
    #[error(transparent)]
    Prompt(#[from] ChatTextError),
    /// The verifier does not work at all.
    #[error("the {section} cannot be used")]
    Verifier {
        /// `verifier` or `environment`.
        section: &'static str,
        /// Why.
        source: Failure,
    },
    /// A reward model fails.
    #[error("the {section} cannot be used")]
    Reward {
        /// `verifier` or `environment`.
        section: &'static str,
        /// Why.
        source: RewardError,
    },
    /// [`ResponseEnd::interrupted_by`] said so.
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
    pub stop: &'a ResponseEnd<'a>,
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
        progress: impl FnMut(),
    ) -> Result<(Vec<Group>, RolloutSeconds), RolloutError> {
        self.run_from(0, tasks, samples, sampling, judges, progress)
    }

    /// [`Rollout::run`] for tasks whose numbers in RNG keys begin with `begin`: further ones of the same RNG step.
    pub fn run_from(
        &self,
        begin: usize,
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
            .map(|task| self.format.apply(self.tokenizer, &task.history, &task.prompt))
            .collect::<Result<Vec<_>, _>>()?;
        seconds.generate += started.elapsed().as_secs_f64();
        let mut first = 0;
        while first < tasks.len() {
            if self.stop.interrupted() {
                return Err(RolloutError::Interrupted);
            }
            let started = std::time::Instant::now();
            let lengths = prompts.iter().map(|(_, ids)| ids.len());
            let rest = prompts.split_off(fitting(self.model, lengths, samples, sampling.max_new_tokens));
            let (prompts, tasks) = (std::mem::replace(&mut prompts, rest), &tasks[first..]);
            let requests: Vec<Prompt> = (begin + first..)
                .zip(&prompts)
                .map(|(number, (_, ids))| Prompt { ids, number: number as u32, streams: samples })
                .collect();
            let texts: Vec<(Arc<str>, Arc<str>)> = tasks
                .iter()
                .zip(&prompts)
                .map(|(task, (text, _))| (text.as_str().into(), task.answer.as_str().into()))
                .collect();
            let mut decoded = vec![vec![String::new(); samples]; prompts.len()];
            let responses = generate(
                self.model,
                &requests,
                sampling,
                |tokens| self.stop.reached(tokens),
                |prompt, stream, response| {
                    progress();
                    let response = self.stop.text(&response.tokens);
                    decoded[prompt][stream].clone_from(&response);
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
            if self.stop.interrupted() {
                return Err(RolloutError::Interrupted);
            }
            seconds.generate += started.elapsed().as_secs_f64();
            let started = std::time::Instant::now();
            let tokens: Vec<Vec<&[u32]>> =
                responses.iter().map(|group| group.iter().map(|r| r.tokens.as_slice()).collect()).collect();
            let sampled: Vec<Continued> = (prompts.iter().zip(&tokens))
                .map(|((_, prompt), responses)| Continued { prompt, responses })
                .collect();
            let mut scores = judges.scores.collect(VERIFIER, &sampled)?.into_iter();
            let rewards = judges.rewards.as_mut().map(|judge| judge.collect(ENVIRONMENT, &sampled));
            let mut rewards = rewards.transpose()?.map(Vec::into_iter);
            let groups_of = prompts.into_iter().zip(responses).zip(decoded).zip(tasks);
            for ((((_, prompt), responses), texts), task) in groups_of {
                let scores: Vec<_> = scores.by_ref().take(samples).collect();
                let rewards: Option<Vec<_>> = rewards.as_mut().map(|r| r.by_ref().take(samples).collect());
                groups.push(judged(task, prompt, responses, texts, scores, rewards, judges));
            }
            seconds.verify += started.elapsed().as_secs_f64();
            first = groups.len();
        }
        Ok((groups, seconds))
    }
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
    let rewarded = rewards.iter().map(Option::is_some).collect();
    let ScoredGroup { scores, rewards, .. } = ScoredGroup::judged(&values(&scores), &rewards, threshold);
    let answers = texts.iter().map(|t| judges.extract(t)).collect();
    let correct = rewards.iter().map(|&reward| passes(reward, threshold)).collect();
    Group { prompt, responses, texts, answers, scores, rewards, correct, rewarded, unjudged }
}
