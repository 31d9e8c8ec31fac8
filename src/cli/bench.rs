//! `bon-engine bench`: how fast a model reads a prompt and decodes N streams here.

use std::cell::Cell;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde::Serialize;

use super::engine::{DeviceArg, with_backend};
use super::progress::{Screen, note};
use super::{PrecisionArgs, open_model, positive};
use crate::backend::{Backend, Truncation};
use crate::generate::{Prompt, Sampling, generate};
use crate::model_dir::Precision;
use crate::rng::{Domain, Stream};
use crate::train::config::{MAX_GROUP_TOKENS, MAX_SAMPLES};

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
The prompt is made of random tokens, no response ends before --new-tokens, and each token is drawn from the whole softmax \
at temperature 1 with its log-prob recorded. The time of the prompt includes the first token of each response; decoding is \
all that follows. Before the rounds that count, one warms up. With --json there is a line for each N: {\"streams\", \
\"prompt_tokens\", \"prompt_seconds\": [...], \"decoded_tokens\", \"decode_seconds\": [...]}, with the seconds of each round. \
What a single run takes, loading and a cold start included, is told by `sample --timings`.")]
pub struct Args {
    /// Model directory (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of that model (PEFT's layout)
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Streams that share the prompt; several are measured in turn
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "1,8,32", value_parser = positive(MAX_SAMPLES))]
    n: Vec<u64>,
    /// Length of the prompt, BOS included
    #[arg(long, value_name = "TOKENS", default_value = "256", value_parser = positive(MAX_GROUP_TOKENS))]
    prompt_tokens: u64,
    /// Length of each response
    #[arg(long, value_name = "TOKENS", default_value = "32", value_parser = positive(MAX_GROUP_TOKENS))]
    new_tokens: u64,
    /// Rounds over all N, of which medians are told
    #[arg(long, default_value = "5", value_parser = positive(1000))]
    rounds: u64,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Write JSON lines with the seconds of each round
    #[arg(long)]
    json: bool,
}

/// The seconds of one N.
#[derive(Serialize)]
struct Line {
    streams: usize,
    prompt_tokens: usize,
    prompt_seconds: Vec<f64>,
    decoded_tokens: usize,
    decode_seconds: Vec<f64>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    with_backend!(args.device.choice.open()?, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: B, args: Args) -> anyhow::Result<()> {
    let (prompt_tokens, new_tokens) = (args.prompt_tokens as usize, args.new_tokens as usize);
    if let Some(n) = args.n.iter().find(|&&n| n as usize * new_tokens > MAX_GROUP_TOKENS) {
        bail!("-n {n} times --new-tokens {new_tokens} is more than {MAX_GROUP_TOKENS}; lower one");
    }
    let loaded =
        open_model(backend, &args.model, args.adapter.as_deref(), args.precision.or(Precision::default()))?;
    let model = &loaded.model;
    let (bos, vocab) = (loaded.tokenizer.bos(), model.config.vocab_size);
    let measure = |streams: usize, round: u64| -> anyhow::Result<(Duration, Duration)> {
        let ids = random_prompt(round, bos, vocab, prompt_tokens);
        let sampling = Sampling {
            temperature: 1.0,
            truncation: Truncation::default(),
            max_new_tokens: new_tokens,
            seed: round,
            step: 0,
        };
        let first: Cell<Option<Instant>> = Cell::default();
        let never = |_: &[u32]| {
            first.set(first.get().or_else(|| Some(Instant::now())));
            false
        };
        let began = Instant::now();
        generate(model, &[Prompt { ids: &ids, number: 0, streams }], &sampling, never, |_, _, _| ())?;
        let first = first.get().expect("each response has a token");
        Ok((first - began, first.elapsed()))
    };

    let screen = Screen::default();
    let bar = screen
        .bar(args.n.len() as u64 * (1 + args.rounds), "measuring {wide_bar} {pos}/{len} runs, {eta} left");
    let line = |&streams: &u64| Line {
        streams: streams as usize,
        prompt_tokens,
        prompt_seconds: vec![],
        decoded_tokens: streams as usize * (new_tokens - 1),
        decode_seconds: vec![],
    };
    let mut lines: Vec<Line> = args.n.iter().map(line).collect();
    // Rounds go over all N, so that a slow minute of the machine falls on all of them.
    for round in 0..=args.rounds {
        for line in &mut lines {
            let (prompt, decode) = measure(line.streams, round)?;
            if round > 0 {
                line.prompt_seconds.push(prompt.as_secs_f64());
                line.decode_seconds.push(decode.as_secs_f64());
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let mut out = io::stdout().lock();
    if args.json {
        for line in &lines {
            writeln!(out, "{}", serde_json::to_string(line)?)?;
        }
        return Ok(());
    }
    note(&format!(
        "{}; a prompt of {prompt_tokens} tokens, {new_tokens} new ones a stream; medians of {} rounds",
        model.backend.device_name(),
        args.rounds
    ));
    writeln!(
        out,
        "{:>7}  {:>20}  {:>15}  {:>13}",
        "streams", "prompt, its tokens/s", "decode, tokens/s", "a step"
    )?;
    for line in &lines {
        let prompt = line.prompt_tokens as f64 / median(&line.prompt_seconds);
        let decode = median(&line.decode_seconds);
        let (rate, step) = match line.decoded_tokens {
            0 => ("-".into(), "-".into()),
            tokens => (
                format!("{:.1}", tokens as f64 / decode),
                format!("{:.2} ms", 1000.0 * decode / (new_tokens - 1) as f64),
            ),
        };
        writeln!(out, "{:>7}  {prompt:>20.1}  {rate:>15}  {step:>13}", line.streams)?;
    }
    Ok(())
}

/// BOS and random tokens, other ones in each round.
fn random_prompt(round: u64, bos: u32, vocab: usize, tokens: usize) -> Vec<u32> {
    let mut draws = Stream::new(round, Domain::Prompts, 0);
    std::iter::once(bos)
        .chain(std::iter::repeat_with(|| draws.below(vocab as u64) as u32))
        .take(tokens)
        .collect()
}

fn median(seconds: &[f64]) -> f64 {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[at] } else { (sorted[at - 1] + sorted[at]) / 2.0 }
}
