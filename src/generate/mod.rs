//! Generation: N streams per prompt from one prefill.
//!
//! Prompts of a batch share one key/value cache: what they all begin with is held once, each prompt once, each
//! stream only its tail. All live streams of all prompts decode together; a finished stream leaves the batch.
//! A stream's tokens depend on the model, its prompt and its RNG keys alone, never on its neighbours.
//!
//! Streams that have drawn the same tokens so far are one row, from which each draws with its own noise: they are computed
//! once until they differ. Since a row's bits depend on that row alone, no token changes. Of short answers most rows are such.
//!
//! Tokens stay on the device from one step to the next: what a step needs of the host, where each row belongs and what
//! it draws with, does not depend on them. So the host may look at them while the device computes the next step
//! ([`Pace`]); a stream that turns out to have ended was then in one step too many, whose draw nobody looks at, and streams
//! have rows of their own from the beginning. Rows that pad a step are tokens of nobody, each in a segment of its own.

use std::collections::VecDeque;

use thiserror::Error;

use crate::backend::{Backend, Batch, Choice, DType, Decode, HeadSpec, Pace, Sampled, Truncation};
use crate::device::DeviceError;
use crate::gemma::config::GemmaConfig;
use crate::gemma::{Gemma, KvCache};
use crate::rng::{Domain, DrawKey, derive_key};
use crate::segments::{Layout, QueryRun, Segments, by_next};

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

/// About what a prompt and its streams take of a device: keys and values of the prompt and of the `streams` tails of `new`
/// tokens, and the activations of one layer for the prompt and for a token of each stream.
pub fn bytes(config: &GemmaConfig, activations: DType, prompt: usize, streams: usize, new: usize) -> usize {
    let own = config.layers.iter().filter(|layer| layer.kv_from.is_none());
    let cached = own.map(|layer| 2 * layer.shape.kv_width()).sum();
    let shapes = config.layers.iter().map(|layer| layer.shape);
    let widths = shapes.map(|shape| shape.intermediate + 6 * (config.hidden_size + shape.q_width()));
    // The layers' inputs, and what they are the sum of.
    let inputs = 3 * config.per_layer_columns();
    // Of each route its input, product and output.
    let experts =
        config.experts.map_or(0, |experts| experts.per_token * (2 * config.hidden_size + experts.width));
    let active = widths.max().unwrap_or(0) + inputs + experts;
    let elements = |tokens: usize, each: usize| tokens.saturating_mul(each);
    let tokens = streams.saturating_mul(new).saturating_add(prompt);
    elements(tokens, cached)
        .saturating_add(elements(prompt.saturating_add(streams), active))
        .saturating_mul(activations.bytes())
}

/// How many of the first prompts, of these lengths, are sampled together: as many as the device has room for, and one at
/// least. What a stream draws does not depend on it.
pub fn fitting<B: Backend>(
    model: &Gemma<B>,
    lengths: impl Iterator<Item = usize>,
    streams: usize,
    new: usize,
) -> usize {
    let dtype = model.backend.activation_dtype();
    let costs = lengths.map(|length| bytes(&model.config, dtype, length, streams, new));
    within(costs, model.backend.generation_bytes())
}

/// How many of the first may cost what there is room for together; one at least.
pub fn within(costs: impl Iterator<Item = usize>, room: usize) -> usize {
    let mut left = room;
    let fits = |cost: &usize| {
        let after = left.checked_sub(*cost);
        left = after.unwrap_or(0);
        after.is_some()
    };
    costs.take_while(fits).count().max(1)
}

/// How many of a prompt's streams are sampled at once where that prompt is sampled by itself: all of them if they fit what a
/// batch of generation may take, or a quarter of all that is free if that is more; else as many as fit, in parts of one size,
/// and one at least. What a stream draws does not depend on it; each part reads the prompt again.
pub fn streams_at_once<B: Backend>(model: &Gemma<B>, prompt: usize, streams: usize, new: usize) -> usize {
    let b = &model.backend;
    let room = room_of_one(b.generation_bytes(), b.training_bytes());
    streams_within(&model.config, b.activation_dtype(), prompt, streams, new, room)
}

/// What the streams of one prompt may take, of what [`generation_bytes`](crate::backend::Platform::generation_bytes) and
/// [`training_bytes`](crate::backend::Platform::training_bytes) say.
pub fn room_of_one(generation: usize, training: u64) -> usize {
    generation.max(usize::try_from(training / 2).unwrap_or(usize::MAX))
}

/// How many of the streams cost no more than `room` with their prompt, in parts of one size; one at least.
pub fn streams_within(
    config: &GemmaConfig,
    activations: DType,
    prompt: usize,
    streams: usize,
    new: usize,
    room: usize,
) -> usize {
    let cost = |streams| bytes(config, activations, prompt, streams, new);
    if streams <= 1 || cost(streams) <= room {
        return streams;
    }
    let (alone, each) = (cost(0), cost(1).saturating_sub(cost(0)));
    let most = room.saturating_sub(alone) / each.max(1);
    streams.div_ceil(streams.div_ceil(most.clamp(1, streams)))
}

/// A response in the making.
struct Stream {
    prompt: usize,
    stream: usize,
    /// Its own rows of the key/value cache, one for each token that is read.
    start: usize,
    /// Absolute position of its first token.
    begin: usize,
    response: Response,
    ended: bool,
}

/// Streams that have drawn the same tokens so far. What they have read is in the cache once.
struct Branch {
    /// In ascending order. The keys and values of their latest tokens are in rows of the first one.
    streams: Vec<usize>,
    /// Of the tokens that they alone have in common.
    segment: usize,
    /// Which token of their responses is the segment's first.
    first: usize,
}

impl Branch {
    /// The branches of its streams that go on, by the token of each that is read next, token `read` of `room` in the responses.
    fn parts(self, read: usize, room: usize, all: &[Stream], segments: &mut Segments) -> Vec<Self> {
        let Self { streams, segment, first } = self;
        // Where streams are by themselves, the host need not know their tokens.
        if let [stream] = streams[..] {
            return if all[stream].ended { vec![] } else { vec![Self { streams, segment, first }] };
        }
        let next = |i: usize| (!all[i].ended).then(|| all[i].response.tokens[read]);
        let mut parts = by_next(&streams, next);
        if let [part] = &mut parts[..] {
            return vec![Self { streams: std::mem::take(part), segment, first }];
        }
        segments.end(segment, read - first);
        let prefix = if read == first { segments.list()[segment].prefix } else { Some(segment) };
        let begin = |streams: Vec<usize>| {
            let segment = segments.push(prefix, all[streams[0]].start + read, room - read);
            Self { streams, segment, first: read }
        };
        parts.into_iter().map(begin).collect()
    }
}

/// A step of decoding.
#[derive(Default)]
struct Work {
    /// Which draw each row's token is from, and which token of which segment it is.
    from: Vec<u32>,
    runs: Vec<QueryRun>,
    /// Which row each draw is after, and how it is made.
    rows: Vec<u32>,
    choices: Vec<Choice>,
}

impl Work {
    /// A row, and the draws after it.
    fn push(&mut self, segment: usize, first: usize, from: u32, choices: impl Iterator<Item = Choice>) {
        let row = self.runs.len();
        self.from.push(from);
        self.runs.push(QueryRun { segment, first, len: 1, row });
        self.choices.extend(choices);
        self.rows.resize(self.choices.len(), row as u32);
    }
}

/// Samples all streams of all prompts, those of a single prompt in as many parts as [`streams_at_once`] says. `stop` sees a
/// stream's tokens so far and says whether they are complete;
/// `on_finish(prompt index, stream, response)` runs as soon as a stream is known to have ended, while others still
/// generate. Returns the responses as `[prompt][stream]`.
pub fn generate<B: Backend>(
    model: &Gemma<B>,
    prompts: &[Prompt],
    sampling: &Sampling,
    stop: impl Fn(&[u32]) -> bool,
    mut on_finish: impl FnMut(usize, usize, &Response),
) -> Result<Vec<Vec<Response>>, GenerateError> {
    let pace = model.backend.pace();
    let &[Prompt { ids, number, streams }] = prompts else {
        return generate_at(pace, model, prompts, sampling, stop, on_finish);
    };
    let at_once = streams_at_once(model, ids.len(), streams, sampling.max_new_tokens);
    let mut all = Vec::with_capacity(streams);
    let mut first = 0;
    while first < streams || first == 0 {
        let part = [Prompt { ids, number, streams: at_once.min(streams - first) }];
        all.extend(
            from_stream(first, pace, model, &part, sampling, &stop, &mut on_finish)?.into_iter().flatten(),
        );
        first += at_once.max(1);
    }
    Ok(vec![all])
}

/// All streams at once, at another pace than the backend's own: the results and calls of [`generate`].
pub fn generate_at<B: Backend>(
    pace: Pace,
    model: &Gemma<B>,
    prompts: &[Prompt],
    sampling: &Sampling,
    stop: impl Fn(&[u32]) -> bool,
    on_finish: impl FnMut(usize, usize, &Response),
) -> Result<Vec<Vec<Response>>, GenerateError> {
    from_stream(0, pace, model, prompts, sampling, &stop, on_finish)
}

/// The same of streams whose numbers begin with `first`.
fn from_stream<B: Backend>(
    first: usize,
    pace: Pace,
    model: &Gemma<B>,
    prompts: &[Prompt],
    sampling: &Sampling,
    stop: &impl Fn(&[u32]) -> bool,
    mut on_finish: impl FnMut(usize, usize, &Response),
) -> Result<Vec<Vec<Response>>, GenerateError> {
    check(model, prompts, sampling)?;
    if prompts.is_empty() {
        return Ok(vec![]);
    }
    let empty = Response { tokens: vec![], logprobs: vec![], finish: Finish::Length };
    if sampling.max_new_tokens == 0 {
        for (prompt, p) in prompts.iter().enumerate() {
            (first..first + p.streams).for_each(|stream| on_finish(prompt, stream, &empty));
        }
        return Ok(prompts.iter().map(|p| vec![empty.clone(); p.streams]).collect());
    }

    let backend = &model.backend;
    let ids: Vec<&[u32]> = prompts.iter().map(|p| p.ids).collect();
    let (layout, segment_of) = Layout::of_prompts(&ids);
    // The last token of a response is never fed back.
    let room = sampling.max_new_tokens - 1;
    let mut rows = layout.ids().len();
    let mut reserve = |n: usize| {
        rows += n;
        rows - n
    };
    let mut streams = Vec::new();
    let mut of_prompts = Vec::new();
    for (prompt, p) in prompts.iter().enumerate() {
        of_prompts.push((streams.len()..streams.len() + p.streams).collect::<Vec<_>>());
        for stream in first..first + p.streams {
            let (start, begin, response) = (reserve(room), p.ids.len(), empty.clone());
            streams.push(Stream { prompt, stream, start, begin, response, ended: false });
        }
    }
    let mut segments = layout.segments().clone();
    let mut branch = |prompt: usize, of: Vec<usize>| {
        let segment = segments.push(Some(segment_of[prompt]), streams[of[0]].start, room);
        Branch { streams: of, segment, first: 0 }
    };
    let mut branches = Vec::new();
    for (prompt, of) in of_prompts.into_iter().enumerate().filter(|(_, of)| !of.is_empty()) {
        match pace.lag {
            0 => branches.push(branch(prompt, of)),
            // The host sees a token too late to find who drew the same.
            _ => branches.extend(of.into_iter().map(|stream| branch(prompt, vec![stream]))),
        }
    }
    let surplus = (1..=streams.len()).map(|live| (pace.rows)(live) - live).max().unwrap_or(0);
    let nobody: Vec<usize> = (0..surplus).map(|_| segments.push(None, reserve(1), 1)).collect();
    let mut cache = KvCache::new(backend, &model.config, rows);
    // All else is small beside it.
    backend.check()?;
    let prefill = layout.segments().all_queries();
    let batch = Batch::new(layout.ids(), layout.segments(), &prefill);
    let last: Vec<u32> = streams.iter().map(|s| layout.last_row(segment_of[s.prompt])).collect();
    let mut wanted = last.clone();
    wanted.dedup();
    let hidden = model.prefill(&batch, &wanted, &mut cache);

    let greedy = sampling.temperature == 0.0;
    let temperature = if greedy { 1.0 } else { sampling.temperature };
    let head = HeadSpec { softcap: model.config.final_softcap, temperature };
    let key = derive_key(sampling.seed, Domain::Sample, sampling.step);
    let choice = |s: &Stream, step: usize| match greedy {
        true => Choice::Greedy,
        false => Choice::Draw(DrawKey {
            key,
            prompt: prompts[s.prompt].number,
            stream: s.stream as u32,
            position: (s.begin + step) as u32,
        }),
    };
    let mut draws = backend.draws(streams.len() + surplus);
    let draw = |hidden: &B::Tensor, rows: &[u32], choices: &[Choice], draws: &mut B::Draws| {
        backend.lm_head_draw(
            hidden,
            model.params.lm_head(),
            &head,
            &sampling.truncation,
            rows,
            choices,
            draws,
        );
    };

    // Whose the draws are of the latest step, and of those whose tokens nobody has looked at, the oldest first.
    let mut drawn: Vec<usize> = (0..streams.len()).collect();
    let mut ahead = VecDeque::from([drawn.clone()]);
    let rows: Vec<u32> = last.iter().map(|row| wanted.partition_point(|other| other < row) as u32).collect();
    let choices: Vec<Choice> = streams.iter().map(|s| choice(s, 0)).collect();
    draw(&hidden, &rows, &choices, &mut draws);
    for step in 1..sampling.max_new_tokens {
        if ahead.len() > pace.lag {
            let looked_at = ahead.pop_front().unwrap_or_default();
            look(&mut streams, &looked_at, &backend.take_draw(&mut draws)?, sampling, stop, &mut on_finish)?;
        }
        let parts = |branch: Branch| branch.parts(step - 1, room, &streams, &mut segments);
        branches = branches.into_iter().flat_map(parts).collect();
        if branches.is_empty() {
            break;
        }
        let mut draw_of = vec![0; streams.len()];
        drawn.iter().zip(0..).for_each(|(&stream, draw)| draw_of[stream] = draw);
        let mut work = Work::default();
        for Branch { streams: of, segment, first } in &branches {
            let choices = of.iter().map(|&stream| choice(&streams[stream], step));
            work.push(*segment, step - 1 - first, draw_of[of[0]], choices);
        }
        for &segment in &nobody[..(pace.rows)(branches.len()) - branches.len()] {
            work.push(segment, 0, 0, [Choice::Greedy].into_iter());
        }
        drawn = branches.iter().flat_map(|branch| branch.streams.iter().copied()).collect();
        // The same work step after step.
        backend.begin_sequence();
        let decode = Decode { draws: &draws, from: &work.from, segments: &segments, runs: &work.runs };
        let hidden = model.decode(&decode, &mut cache);
        draw(&hidden, &work.rows, &work.choices, &mut draws);
        backend.end_sequence();
        ahead.push_back(drawn.clone());
    }
    for drawn in ahead {
        look(&mut streams, &drawn, &backend.take_draw(&mut draws)?, sampling, stop, &mut on_finish)?;
    }
    let mut responses = streams.into_iter().map(|s| s.response);
    Ok(prompts.iter().map(|p| responses.by_ref().take(p.streams).collect()).collect())
}

/// Takes in what one step drew, and for which streams.
fn look(
    streams: &mut [Stream],
    of: &[usize],
    drawn: &[Sampled],
    sampling: &Sampling,
    stop: &impl Fn(&[u32]) -> bool,
    on_finish: &mut impl FnMut(usize, usize, &Response),
) -> Result<(), GenerateError> {
    let mut in_order: Vec<(usize, Sampled)> = of.iter().copied().zip(drawn.iter().copied()).collect();
    in_order.sort_by_key(|&(stream, _)| stream);
    for (stream, Sampled { token, logprob }) in in_order {
        let s = &mut streams[stream];
        if s.ended {
            continue;
        }
        let Response { tokens, logprobs, finish } = &mut s.response;
        if !logprob.is_finite() {
            let (prompt, stream, position) = (s.prompt, s.stream, s.begin + tokens.len());
            return Err(GenerateError::NotFinite { prompt, stream, position, value: logprob });
        }
        tokens.push(token);
        logprobs.push(logprob);
        let stopped = stop(tokens);
        s.ended = stopped || tokens.len() == sampling.max_new_tokens;
        if s.ended {
            *finish = if stopped { Finish::Stop } else { Finish::Length };
            on_finish(s.prompt, s.stream, &s.response);
        }
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::within;

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
            assert_eq!(within(costs.iter().copied(), room), want, "{costs:?} in {room}");
        }
    }
}
