//! `bon-engine logprobs`: what a model thinks of given texts.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::engine::{DeviceArg, with_backend};
use super::progress::note;
use super::{PrecisionArgs, number, open_model};
use crate::backend::{Backend, Batch, HeadSpec, TEMPERATURES, Target};
use crate::checkpoint::atomic;
use crate::model_dir::{ModelDir, Precision};
use crate::segments::Segments;
use crate::train::setup::spelled;

/// Arguments of `logprobs`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Writes a line {\"ids\": [...], \"logprobs\": [...]} for each line read: logprobs[t] is that of ids[t+1] after the ids \
before it.")]
pub struct Args {
    /// Model directory (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of that model (PEFT's layout)
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// JSON lines with a "prompt" each, or "ids" (token ids, BOS included)
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where to write [default: standard output]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    precision: PrecisionArgs,
    #[command(flatten)]
    device: DeviceArg,
    /// Softmax temperature
    #[arg(
        long, value_name = "T", default_value = "1", allow_negative_numbers = true,
        value_parser = number(|x| TEMPERATURES.contains(&x), "above 0, from 1e-6 to 1e6")
    )]
    temperature: f32,
}

#[derive(Deserialize)]
struct Line {
    prompt: Option<String>,
    ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Scored {
    ids: Vec<u32>,
    logprobs: Vec<f32>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    with_backend!(args.device.choice.open()?, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: B, args: Args) -> anyhow::Result<()> {
    let input = File::open(&args.input).with_context(|| format!("cannot open {}", args.input.display()))?;
    let loaded =
        open_model(backend, &args.model, args.adapter.as_deref(), args.precision.or(Precision::default()))?;
    let mut written = Vec::new();
    // Prompts that spell control tokens.
    let mut spelling = 0;
    for (n, line) in BufReader::new(input).lines().enumerate() {
        let at = || format!("{}:{}", args.input.display(), n + 1);
        let line = line.with_context(at)?;
        let line = line.strip_prefix('\u{feff}').unwrap_or(&line);
        if line.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(line).with_context(at)?;
        if let Some(problem) = line.prompt.as_ref().and_then(|text| spelled(&loaded.tokenizer, text)) {
            if spelling == 0 {
                note(&format!("warning: {}: the prompt {problem}", at()));
            }
            spelling += 1;
        }
        let scored = score(&loaded, line, args.temperature).with_context(at)?;
        let mut text = serde_json::to_vec(&scored)?;
        text.push(b'\n');
        match args.output {
            Some(_) => written.extend(text),
            None => std::io::stdout().write_all(&text)?,
        }
    }
    if spelling > 1 {
        note(&format!(
            "warning: {}: {} more prompts spell control tokens",
            args.input.display(),
            spelling - 1
        ));
    }
    if let Some(path) = &args.output {
        atomic::write_file(path, |f| f.write_all(&written))?;
    }
    Ok(())
}

/// The log-probs of one line of input.
fn score<B: Backend>(loaded: &ModelDir<B>, line: Line, temperature: f32) -> anyhow::Result<Scored> {
    let (model, config) = (&loaded.model, &loaded.model.config);
    let ids = match (line.ids, line.prompt) {
        (Some(ids), _) => ids,
        (None, Some(text)) => {
            loaded.tokenizer.encode_prompt(text.strip_prefix('\u{feff}').unwrap_or(&text))?
        }
        (None, None) => bail!("neither \"prompt\" nor \"ids\""),
    };
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        bail!("token {id} is not in the vocabulary of {} tokens", config.vocab_size);
    }
    if ids.is_empty() || ids.len() > config.max_positions {
        bail!("{} tokens; the model's context is 1 to {} tokens", ids.len(), config.max_positions);
    }
    let segments = Segments::separate(&[ids.len()]);
    let runs = segments.all_queries();
    let (hidden, _) = model.forward(&Batch::new(&ids, &segments, &runs));
    let head = HeadSpec { softcap: config.final_softcap, temperature };
    let targets: Vec<Target> = ids[1..].iter().zip(0..).map(|(&token, row)| Target { row, token }).collect();
    let (logprobs, _) =
        model.backend.lm_head_logprob_forward(&hidden, model.params.lm_head(), &head, &targets, false);
    model.backend.check()?;
    Ok(Scored { ids, logprobs })
}
