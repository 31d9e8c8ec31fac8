//! `bon-engine merge`: a model with an adapter merged into its weights.

use std::path::PathBuf;

use super::open_model;
use super::progress::note;
use crate::adapter::{AdapterFile, Untied, merged};
use crate::backend::cpu::Cpu;
use crate::model_dir::{self, ComputeChoice, ModelDir, ModelRole, Placement, Precision};

/// Arguments of `merge`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Adds to each weight what its adapter adds, in f32, and rounds it to what the model stores. Everything else of the model \
directory is copied. An adapter of a reward model makes one of it.

In Gemmas the LM head is the embedding. An adapter that changes one of them is refused therefore, unless --untie asks for a model that \
has both: lm_head.weight beside the embedding, and tie_word_embeddings = false in its config.json, which this program and Transformers \
load.")]
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
    /// Give the model an LM head of its own if the adapter changes the head or the embedding
    #[arg(long)]
    untie: bool,
}

/// Weights as the checkpoint has them, and products in f32 whatever that is.
const AS_STORED: Precision =
    Precision { dtype: None, compute: ComputeChoice::F32, per_layer_embeddings: Placement::Device };

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let file = AdapterFile::open(&args.adapter)?;
    if args.untie && file.unties() {
        return untied(&args, &file);
    }
    let scores = file.scores();
    let opened = match scores {
        false => open_model(Cpu::F32, &args.model, Some(&args.adapter), AS_STORED)?,
        true => ModelDir::open_as(ModelRole::NewReward, Cpu::F32, &args.model, AS_STORED)?
            .with_adapter(Some(&args.adapter))?,
    };
    let model = merged(opened.model);
    model_dir::save(&model.backend, &opened.config, &model.params, &args.model, &args.output)?;
    note(&format!("wrote {}", args.output.display()));
    Ok(())
}

/// The same of an adapter that changes the embedding or the LM head.
fn untied(args: &Args, file: &AdapterFile) -> anyhow::Result<()> {
    let mut opened = open_model(Cpu::F32, &args.model, None, AS_STORED)?;
    let Untied { embed, head } = file.untied(&mut opened.model, &opened.config)?;
    let mut model = merged(opened.model);
    (model.params.embed, model.params.head) = (embed, Some(head));
    model_dir::save(&model.backend, &opened.config.untied(), &model.params, &args.model, &args.output)?;
    note(&format!("wrote {}, whose LM head is no longer its embedding", args.output.display()));
    Ok(())
}
