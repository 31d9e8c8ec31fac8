//! The commands: one file each. The only place that knows anyhow, the terminal and the environment.

pub mod bench;
pub mod devices;
pub mod engine;
pub mod eval;
mod gpu_kernels;
pub mod inspect;
pub mod kernels;
pub mod logprobs;
pub mod merge;
pub mod plan;
mod progress;
pub mod report;
pub mod sample;
mod step;
pub mod train;
pub mod weigh;

use std::path::Path;

use clap::builder::RangedU64ValueParser;
use clap::{Parser, Subcommand};

use crate::backend::cpu::compute_on_this_thread;
use crate::backend::{Backend, DType};
use crate::model_dir::{ComputeChoice, ModelDir, OpenError, Precision};

/// Fine-tunes Gemma so that it is best when you sample it N times and keep the best answer.
#[derive(Debug, Parser)]
#[command(name = "bon-engine", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Fine-tune a model for Best-of-N
    Train(train::Args),
    /// Show what a run will take of memory, and what would make it fit
    Plan(plan::Args),
    /// Measure pass@N, Best-of-N and majority votes on tasks
    Eval(eval::Args),
    /// Show evaluations and training runs as a page with plots
    Report(report::Args),
    /// Sample responses to a prompt
    Sample(sample::Args),
    /// Measure how fast a model reads a prompt and decodes N streams here
    Bench(bench::Args),
    /// Log-probs of given texts, token by token
    Logprobs(logprobs::Args),
    /// Show what a model directory holds, and check that its files fit together
    Inspect(inspect::Args),
    /// Write a model with an adapter merged into its weights
    Merge(merge::Args),
    /// Turn scored groups into the objective's coefficients, for use with other trainers
    Weigh(weigh::Args),
    /// Show what this program can compute on
    Devices(devices::Args),
    /// Show what the CUDA kernels cost: registers, counted work, and the least time that GPUs need for it
    Kernels(kernels::Args),
}

/// Runs the command.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    compute_on_this_thread();
    match cli.command {
        Command::Train(args) => train::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Report(args) => report::run(args),
        Command::Weigh(args) => weigh::run(args),
        Command::Sample(args) => sample::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Logprobs(args) => logprobs::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Kernels(args) => kernels::run(args),
    }
}

/// The words of the command line, as a shell reads them back; the program by its name alone.
fn command_line() -> String {
    let words = std::env::args_os().skip(1).map(|word| quoted(&word.to_string_lossy()));
    std::iter::once("bon-engine".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/=,:+%@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// A count from 1 to `most`.
fn positive(most: usize) -> RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=most as u64)
}

/// A finite number that is `ok`; `range` says in words which are.
fn number(
    ok: fn(f32) -> bool,
    range: &'static str,
) -> impl Fn(&str) -> Result<f32, String> + Clone + Send + Sync + 'static {
    move |text| match text.parse() {
        Ok(x) if f32::is_finite(x) && ok(x) => Ok(x),
        _ => Err(format!("must be {range}")),
    }
}

/// Loads a model, with an adapter where one is given, and says on standard error if that has rounded its weights.
fn open_model<B: Backend>(
    backend: B,
    path: &Path,
    adapter: Option<&Path>,
    precision: Precision,
) -> Result<ModelDir<B>, OpenError> {
    let opened = ModelDir::open(backend, path, precision)?.with_adapter(adapter)?;
    if opened.rounded {
        progress::note(&rounded(path, &opened.model.backend.device_name()));
    }
    Ok(opened)
}

/// The news that a checkpoint was rounded to fit a device.
fn rounded(path: &Path, device: &str) -> String {
    format!(
        "note: {device} computes with bf16 weights; those of {} are wider and were rounded",
        path.display()
    )
}

/// `--dtype` and `--compute`.
#[derive(Debug, Clone, Copy, clap::Args)]
struct PrecisionArgs {
    /// Storage of the weights: f32 or bf16 [default: as in the checkpoint]
    #[arg(long, value_parser = parse_dtype)]
    dtype: Option<DType>,
    /// What matrix products are computed in on the CPU: bf16 (weights are stored so as well), f32, or auto: bf16 where the
    /// weights are bf16 [default: auto]
    #[arg(long, value_parser = parse_compute)]
    compute: Option<ComputeChoice>,
}

impl PrecisionArgs {
    fn or(self, default: Precision) -> Precision {
        let (dtype, compute) = (self.dtype.or(default.dtype), self.compute.unwrap_or(default.compute));
        Precision { dtype, compute, ..default }
    }
}

fn parse_compute(text: &str) -> Result<ComputeChoice, String> {
    match text {
        "auto" => Ok(ComputeChoice::Auto),
        "bf16" => Ok(ComputeChoice::Bf16),
        "f32" => Ok(ComputeChoice::F32),
        _ => Err("must be auto, bf16 or f32".into()),
    }
}

fn parse_dtype(text: &str) -> Result<DType, String> {
    match text {
        "f32" => Ok(DType::F32),
        "bf16" => Ok(DType::Bf16),
        _ => Err("must be f32 or bf16".into()),
    }
}
