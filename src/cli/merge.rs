//! `bon-engine merge`: a model with an adapter merged into its weights.

use std::path::PathBuf;

use super::open_model;
use super::progress::note;
use crate::adapter::{AdapterFile, merged};
use crate::backend::cpu::Cpu;
use crate::model_dir::{self, ModelDir, ModelRole, Precision};

/// Arguments of `merge`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Adds to each weight what its adapter adds, in f32, and rounds it to what the model stores. Everything else of the model \
directory is copied. An adapter of a reward model makes one of it.")]
pub struct Args {
    /// Model directory (Hugging Face layout)
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Adapter of that model (PEFT's layout)
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where to write the merged model
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let scores = AdapterFile::open(&args.adapter)?.scores();
    let opened = match scores {
        false => open_model(Cpu::F32, &args.model, Some(&args.adapter), Precision::default())?,
        true => ModelDir::open_as(ModelRole::NewReward, Cpu::F32, &args.model, Precision::default())?
            .with_adapter(Some(&args.adapter))?,
    };
    let model = merged(opened.model);
    model_dir::save(&model.backend, &opened.config, &model.params, &args.model, &args.output)?;
    note(&format!("wrote {}", args.output.display()));
    Ok(())
}
