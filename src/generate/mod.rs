//! Generation: N streams per prompt from one prefill.
//!
//! Prompts of a batch share one key/value cache: what they all begin with is held once, each prompt once, each
//! stream only its tail. All live streams of all prompts decode together; a finished stream leaves the batch.
//! A stream's tokens depend on the model, its prompt and its RNG keys alone, never on its neighbours.

use thiserror::Error;

use crate::backend::{Backend, Batch, Choice, HeadSpec, Sampled, Truncation};
use crate::device::DeviceError;
use crate::gemma::{Gemma, KvCache};
use crate::rng::{Domain, DrawKey, derive_key};
use crate::segments::{Layout, QueryRun};

/// How tokens are chosen and when a stream ends.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Softmax temperature; 0 is greedy.
    pub temperature: f32,
    /// Truncation of the distribution.
    pub truncation: Truncation,
    /// Longest response in tokens, the stop token included.
    pub max_new_tokens: usize,
    /// RNG seed.
    pub seed: u64,
    /// RNG step: the training step, 0 elsewhere.
    pub step: u64,
}

/// Decode steps that the loop of [`generate`] gives to the device before it looks at the tokens of the step before: with 0
/// the device waits for the host between any two. What models a step's time reads it.
pub const STEPS_AHEAD: usize = 0;

/// One prompt and its streams.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Token ids, BOS included; not empty.
    pub ids: &'a [u32],
    /// The prompt's number in RNG keys: its index in the task file.
    pub number: u32,
    /// N.
    pub streams: usize,
}

/// Why a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The stop rule said so.
    Stop,
    /// `max_new_tokens` were reached: the response is truncated.
    Length,
}

/// One sampled response.
#[derive(Debug, Clone, PartialEq)]
pub struct Response {
    /// Token ids as sampled, a stop token included.
    pub tokens: Vec<u32>,
    /// log pi of every token at the sampling temperature (1 where that is greedy), untruncated distribution.
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// What generation refuses.
#[derive(Debug, Error, PartialEq)]
pub enum GenerateError {
    /// There is no token to continue from.
    #[error("prompt {prompt} is empty; Gemma's prompts begin with BOS")]
    EmptyPrompt {
        /// Index in the request.
        prompt: usize,
    },
    /// The positions would run past what the model was made for.
    #[error(
        "prompt {prompt} has {tokens} tokens and may grow by {new}: that is longer than the model's context of \
         {context}; shorten the prompt or lower max_new_tokens"
    )]
    TooLong {
        /// Index in the request.
        prompt: usize,
        /// Length of the prompt in tokens.
        tokens: usize,
        /// `max_new_tokens`.
        new: usize,
        /// Context of the model.
        context: usize,
    },
    /// A token id that the model has no embedding for.
    #[error("prompt {prompt} holds token {token}, but the model's vocabulary has {vocab} tokens")]
    Token {
        /// Index in the request.
        prompt: usize,
        /// The id.
        token: u32,
        /// V.
        vocab: usize,
    },
    /// The model produced NaN or Inf.
    #[error(
        "prompt {prompt}, stream {stream}: the log-prob of token {position} is {value}; the weights hold NaN or Inf, \
         or have diverged"
    )]
    NotFinite {
        /// Index in the request.
        prompt: usize,
        /// Stream.
        stream: usize,
        /// Absolute position.
        position: usize,
        /// The log-prob.
        value: f32,
    },
    /// The device failed.
    #[error("sampling{}", if .0.out_of_memory { "; sample fewer responses, or shorter ones" } else { "" })]
    Device(#[from] DeviceError),
}

/// A live stream.
struct Stream {
    prompt: usize,
    stream: usize,
    segment: usize,
    response: Response,
}

/// Samples all streams of all prompts. `stop` sees a stream's tokens so far and says whether they are complete;
/// `on_finish(prompt index, stream, response)` runs as soon as a stream ends, while others still generate. Returns
/// the responses as `[prompt][stream]`.
pub fn generate<B: Backend>(
    model: &Gemma<B>,
    prompts: &[Prompt],
    sampling: &Sampling,
    stop: impl Fn(&[u32]) -> bool,
    mut on_finish: impl FnMut(usize, usize, &Response),
) -> Result<Vec<Vec<Response>>, GenerateError> {
    check(model, prompts, sampling)?;
    if prompts.is_empty() {
        return Ok(vec![]);
    }
    if sampling.max_new_tokens == 0 {
        let empty = Response { tokens: vec![], logprobs: vec![], finish: Finish::Length };
        for (prompt, p) in prompts.iter().enumerate() {
            (0..p.streams).for_each(|stream| on_finish(prompt, stream, &empty));
        }
        return Ok(prompts.iter().map(|p| vec![empty.clone(); p.streams]).collect());
    }

    let mut done: Vec<Vec<Option<Response>>> = prompts.iter().map(|p| vec![None; p.streams]).collect();
    let ids: Vec<&[u32]> = prompts.iter().map(|p| p.ids).collect();
    let (mut layout, segment_of) = Layout::of_prompts(&ids);
    let (prefill, positions) = (layout.segments().all_queries(), layout.segments().positions());
    let mut live = Vec::new();
    for (prompt, p) in prompts.iter().enumerate() {
        for stream in 0..p.streams {
            // The last token of a response is never fed back.
            let segment = layout.reserve(Some(segment_of[prompt]), sampling.max_new_tokens - 1);
            let response = Response { tokens: vec![], logprobs: vec![], finish: Finish::Length };
            live.push(Stream { prompt, stream, segment, response });
        }
    }
    let segments = layout.segments();
    let mut cache = KvCache::new(&model.backend, &model.config, segments.rows());
    let batch = Batch { ids: layout.ids(), positions: &positions, segments, runs: &prefill };
    let hidden = model.forward_cached(&batch, &mut cache);
    let rows: Vec<u32> = live.iter().map(|s| layout.last_row(segment_of[s.prompt])).collect();
    let mut hidden = model.backend.gather_rows(&hidden, &rows);

    let greedy = sampling.temperature == 0.0;
    let head = HeadSpec {
        softcap: model.config.final_softcap,
        temperature: if greedy { 1.0 } else { sampling.temperature },
    };
    let key = derive_key(sampling.seed, Domain::Sample, sampling.step);
    loop {
        let position = |s: &Stream| segments.list()[s.segment].position + s.response.tokens.len();
        let choices: Vec<Choice> = live
            .iter()
            .map(|s| match greedy {
                true => Choice::Greedy,
                false => Choice::Draw(DrawKey {
                    key,
                    prompt: prompts[s.prompt].number,
                    stream: s.stream as u32,
                    position: position(s) as u32,
                }),
            })
            .collect();
        let sampled =
            model.backend.lm_head_sample(&hidden, &model.params.embed, &head, &sampling.truncation, &choices);
        model.backend.check()?;
        let mut still = Vec::with_capacity(live.len());
        for (mut s, Sampled { token, logprob }) in live.into_iter().zip(sampled) {
            if !logprob.is_finite() {
                let (prompt, stream, position) = (s.prompt, s.stream, position(&s));
                return Err(GenerateError::NotFinite { prompt, stream, position, value: logprob });
            }
            s.response.tokens.push(token);
            s.response.logprobs.push(logprob);
            let stopped = stop(&s.response.tokens);
            if stopped || s.response.tokens.len() == sampling.max_new_tokens {
                s.response.finish = if stopped { Finish::Stop } else { Finish::Length };
                on_finish(s.prompt, s.stream, &s.response);
                done[s.prompt][s.stream] = Some(s.response);
            } else {
                still.push(s);
            }
        }
        live = still;
        if live.is_empty() {
            break;
        }
        let ids: Vec<u32> = live.iter().map(|s| s.response.tokens[s.response.tokens.len() - 1]).collect();
        let positions: Vec<u32> = live.iter().map(|s| position(s) as u32 - 1).collect();
        let runs: Vec<QueryRun> = live
            .iter()
            .enumerate()
            .map(|(row, s)| QueryRun { segment: s.segment, first: s.response.tokens.len() - 1, len: 1, row })
            .collect();
        let batch = Batch { ids: &ids, positions: &positions, segments, runs: &runs };
        hidden = model.forward_cached(&batch, &mut cache);
    }
    Ok(done.into_iter().map(|streams| streams.into_iter().flatten().collect()).collect())
}

fn check<B: Backend>(model: &Gemma<B>, prompts: &[Prompt], sampling: &Sampling) -> Result<(), GenerateError> {
    let (vocab, context) = (model.config.vocab_size, model.config.max_positions);
    for (prompt, p) in prompts.iter().enumerate() {
        if p.ids.is_empty() {
            return Err(GenerateError::EmptyPrompt { prompt });
        }
        if let Some(&token) = p.ids.iter().find(|&&t| t as usize >= vocab) {
            return Err(GenerateError::Token { prompt, token, vocab });
        }
        let (tokens, new) = (p.ids.len(), sampling.max_new_tokens);
        if tokens + new > context {
            return Err(GenerateError::TooLong { prompt, tokens, new, context });
        }
    }
    Ok(())
}
