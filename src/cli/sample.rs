//! `bon-engine sample`: N responses to a prompt.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Serialize;

use super::engine::{DeviceArg, with_backend};
use super::progress::note;
use super::{PrecisionArgs, number, open_model, positive};
use crate::backend::{Backend, TEMPERATURES, Truncation};
use crate::generate::{Finish, Prompt, Response, Sampling, generate};
use crate::model_dir::Precision;
use crate::rollout::{PromptFormat, ResponseEnd, Wrapping};
use crate::train::config::{MAX_GROUP_TOKENS, MAX_SAMPLES};
use crate::train::setup::{escape_warning, spelled, stop_warnings, template_warning};

/// Arguments of `sample`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
A single response is printed while it is sampled; of several, each as soon as it is complete, under a line with its \
number. With --json there is one line per response, in order: {\"text\", \"tokens\", \"logprobs\", \"finish\"}, where \
finish is \"stop\" or, if --max-new-tokens cut it, \"length\", and logprobs are those of the tokens at the \
temperature, before --top-k, --top-p and --min-p.")]
pub struct Args {
    /// Model directory (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of that model (PEFT's layout)
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The prompt
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// File with the prompt, all of it: a line break at its end is part of the prompt
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    prompt_file: Option<PathBuf>,
    /// Wrap the prompt as a user's turn, for instruction-tuned models
    #[arg(long)]
    turn: bool,
    /// Wrap the prompt as the model's own chat template does
    #[arg(long, conflicts_with = "turn")]
    chat: bool,
    /// Responses to sample
    #[arg(short, long, value_name = "N", default_value = "1", value_parser = positive(MAX_SAMPLES))]
    n: u64,
    /// Softmax temperature; 0 is greedy
    #[arg(
        long, value_name = "T", default_value = "1", allow_negative_numbers = true,
        value_parser = number(
            |x| x == 0.0 || TEMPERATURES.contains(&x), "0 (greedy) or more, from 1e-6 to 1e6"
        )
    )]
    temperature: f32,
    /// Sample among the K most probable tokens; 0 is off
    #[arg(long, value_name = "K", default_value = "0")]
    top_k: usize,
    /// Sample among the most probable tokens that together reach probability P; 1 is off
    #[arg(
        long, value_name = "P", default_value = "1", allow_negative_numbers = true,
        value_parser = number(|x| x > 0.0 && x <= 1.0, "above 0 and at most 1")
    )]
    top_p: f32,
    /// Sample among tokens at least P times as probable as the most probable; 0 is off
    #[arg(
        long, value_name = "P", default_value = "0", allow_negative_numbers = true,
        value_parser = number(|x| (0.0..1.0).contains(&x), "at least 0 and below 1")
    )]
    min_p: f32,
    /// Longest response in tokens
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = positive(MAX_GROUP_TOKENS))]
    max_new_tokens: u64,
    /// End a response at this text; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    stop: Vec<String>,
    /// Seed; the same seed gives the same responses
    #[arg(long, default_value = "0")]
    seed: u64,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Write JSON lines with tokens and log-probs
    #[arg(long)]
    json: bool,
    /// Say on standard error what loading, the prompt and further tokens took
    #[arg(long)]
    timings: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    text: &'a str,
    tokens: &'a [u32],
    logprobs: &'a [f32],
    finish: &'static str,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    with_backend!(args.device.choice.open()?, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: B, args: Args) -> anyhow::Result<()> {
    let (streams, max_new_tokens) = (args.n as usize, args.max_new_tokens as usize);
    if streams * max_new_tokens > MAX_GROUP_TOKENS {
        bail!(
            "-n {streams} times --max-new-tokens {max_new_tokens} is more than {MAX_GROUP_TOKENS}; lower one"
        );
    }
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => {
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?
        }
        (None, None) => bail!("give --prompt or --prompt-file"),
    };
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    let began = Instant::now();
    let loaded =
        open_model(backend, &args.model, args.adapter.as_deref(), args.precision.or(Precision::default()))?;
    let loaded = loaded.with_chat(args.chat)?;
    let tokenizer = &loaded.tokenizer;
    let wrapping = match (args.turn, &loaded.chat) {
        (_, Some(template)) => Wrapping::Chat(template),
        (true, None) => Wrapping::Turn,
        (false, None) => Wrapping::None,
    };
    let (_, ids) = PromptFormat { prefix: "", suffix: "", wrapping }.apply(tokenizer, &[], &text)?;
    let stop = ResponseEnd::new(&loaded.model.config, tokenizer, &args.stop);
    let mut warnings = stop_warnings("--stop", &args.stop, tokenizer);
    warnings.extend(args.prompt.as_ref().and_then(|text| escape_warning("--prompt", text)));
    warnings.extend(spelled(tokenizer, &text).map(|problem| format!("the prompt {problem}")));
    if args.turn {
        warnings.extend(template_warning("--turn", &args.model));
    }
    warnings.iter().for_each(|text| note(&format!("warning: {text}")));
    let sampling = Sampling {
        temperature: args.temperature,
        truncation: Truncation { top_k: args.top_k, top_p: args.top_p, min_p: args.min_p },
        max_new_tokens,
        seed: args.seed,
        step: 0,
    };
    let prompts = [Prompt { ids: &ids, number: 0, streams }];
    let started = Instant::now();
    // When the first token of a response is known: then the prompt has been read.
    let first: Cell<Option<Instant>> = Cell::default();
    let printer = Printer { stop: &stop, shown: Cell::new(0) };
    let live = !args.json && streams == 1;
    let failed: RefCell<Option<anyhow::Error>> = RefCell::default();
    let note_failure = |printed: anyhow::Result<()>| {
        if let Err(e) = printed {
            failed.replace(Some(e));
        }
    };
    let groups = generate(
        &loaded.model,
        &prompts,
        &sampling,
        |tokens| {
            if first.get().is_none() {
                first.set(Some(Instant::now()));
            }
            if live {
                note_failure(printer.beginning(&stop.settled(tokens)));
            }
            // When nobody reads on, nothing more need be sampled.
            failed.borrow().is_some() || stop.reached(tokens)
        },
        |_, stream, response| {
            if !args.json && !live {
                note_failure(printer.numbered(stream, streams, response));
            }
        },
    )?;
    if let Some(e) = failed.into_inner() {
        return Err(e);
    }
    if let (true, Some(first)) = (args.timings, first.get()) {
        let further = groups[0].iter().map(|r| r.tokens.len()).sum::<usize>() - streams;
        let timings = Timings {
            loading: started - began,
            prompt: (ids.len(), first - started),
            further: (further, first.elapsed()),
        };
        note(&timings.to_string());
    }
    let mut out = io::stdout().lock();
    for response in &groups[0] {
        let Response { tokens, logprobs, finish } = response;
        if args.json {
            let finish = match finish {
                Finish::Stop => "stop",
                Finish::Length => "length",
            };
            let text = &stop.text(tokens);
            writeln!(out, "{}", serde_json::to_string(&Line { text, tokens, logprobs, finish })?)?;
        } else if live {
            printer.beginning(&stop.text(tokens))?;
            writeln!(out)?;
            let speed = tokens.len() as f64 / started.elapsed().as_secs_f64();
            note(&format!("--- {}, {speed:.1} tokens/s", summary(response)));
        }
    }
    Ok(())
}

/// What `--timings` says.
struct Timings {
    loading: Duration,
    /// Tokens of the prompt, and the time for them and the first token of each response.
    prompt: (usize, Duration),
    /// All other tokens.
    further: (usize, Duration),
}

impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |(tokens, time): (usize, Duration)| {
            let seconds = time.as_secs_f64();
            format!("{seconds:.3} s, {:.1} tokens/s", tokens as f64 / seconds)
        };
        let (loading, prompt, further) = (self.loading.as_secs_f64(), self.prompt, self.further);
        write!(f, "--- loading: {loading:.3} s")?;
        write!(f, "; prompt of {} tokens and the first of each response: {}", prompt.0, part(prompt))?;
        write!(f, "; {} further tokens: {}", further.0, part(further))
    }
}

/// Prints responses as they come.
struct Printer<'a> {
    stop: &'a ResponseEnd<'a>,
    /// Bytes of a live response that have been printed.
    shown: Cell<usize>,
}

impl Printer<'_> {
    /// What is new in the beginning of a live response.
    fn beginning(&self, text: &str) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(&text.as_bytes()[self.shown.get()..])?;
        out.flush()?;
        self.shown.set(text.len());
        Ok(())
    }

    /// One complete response of several.
    fn numbered(&self, stream: usize, streams: usize, response: &Response) -> anyhow::Result<()> {
        let text = self.stop.text(&response.tokens);
        writeln!(io::stdout(), "--- {} of {streams}: {}\n{text}", stream + 1, summary(response))?;
        Ok(())
    }
}

fn summary(response: &Response) -> String {
    let logprob: f32 = response.logprobs.iter().sum();
    let cut = if response.finish == Finish::Length { ", cut at --max-new-tokens" } else { "" };
    format!("{} tokens, log-prob {logprob:.2}{cut}", response.tokens.len())
}
