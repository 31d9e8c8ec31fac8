//! `bon-engine plan`: what a run will take of memory.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

use super::engine::{DeviceChoice, Engine};
use super::progress::note;
use crate::backend::DType;
use crate::backend::cuda::Cuda;
use crate::chat::ChatTemplate;
use crate::device::{driver, host};
use crate::gemma::config::{ConfigFile, GemmaConfig};
use crate::gemma::published;
use crate::model_dir::{Precision, look_at};
use crate::plan::{CONTEXT, Place, Plan, Purpose, Run};
use crate::rollout::{PromptFormat, Wrapping};
use crate::tasks::Tasks;
use crate::tokenizer::{TOKENIZER_FILE, Tokenizer};
use crate::train::config::{Template, TrainConfig};
use crate::verifier::VerifierConfig;

/// Arguments of `plan`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
On a GPU a plan is what the launchers ask for, counted; neither the GPU nor the weights are needed. On the CPU it is the tensors that a \
step holds at once, within 5 %. Examples:

  bon-engine plan config.toml --memory 24GB
  bon-engine plan config.toml --memory 24GB --published \"Gemma 3 4B\" --set lora.rank=16")]
pub struct Args {
    /// Configuration as for `train`
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Override a setting, as in --set optimizer.moments=8bit; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Memory of the GPU, or of the host with --device cpu, as in 24GB or 24GiB [default: what is free here]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    memory: Option<u64>,
    /// Memory of the host beside a GPU, as in 64GB, for what settings put there [default: any, or what is free here]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    host_memory: Option<u64>,
    /// What will compute: cpu or cuda [default: cuda with --memory, else what there is here]
    #[arg(long, value_name = "DEVICE")]
    device: Option<DeviceChoice>,
    /// Plan for a published model instead of the one in model.path: a name that `devices --models` lists
    #[arg(long, value_name = "NAME")]
    published: Option<String>,
    /// Tokens of a prompt [default: as in the tasks, or 256 without tasks or tokenizer]
    #[arg(long, value_name = "T", value_parser = super::positive(1 << 20))]
    prompt_tokens: Option<u64>,
}

/// Prompts of a plan that knows none.
const PROMPT_TOKENS: usize = 256;

/// Bytes, as people write them.
fn size(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match text[number.len()..].to_ascii_lowercase().as_str() {
        "gb" | "g" => 1e9,
        "gib" => f64::from(1 << 30),
        "mb" | "m" => 1e6,
        "mib" => f64::from(1 << 20),
        _ => return Err("must be a size such as 24GB or 24GiB".into()),
    };
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number < 1e6 => Ok((number * unit) as u64),
        _ => Err("must be a size such as 24GB or 24GiB".into()),
    }
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut config = TrainConfig::load(&args.config, &args.set)?;
    config.check_for_plan()?;
    let (model, dtype) = match &args.published {
        Some(name) => (published(name)?, config.model.dtype.unwrap_or(DType::Bf16)),
        None => {
            look_at(&config.model.path)?;
            let file = ConfigFile::open(&config.model.path)?;
            let dtype = config.model.precision().storage(&config.model.path, &file);
            (file.gemma, dtype)
        }
    };
    let prompts = match args.prompt_tokens {
        Some(tokens) => alike(&config, tokens as usize),
        None if args.published.is_some() => alike(&config, PROMPT_TOKENS),
        None if config.model.path.join(TOKENIZER_FILE).is_file() && config.data.tasks.is_file() => {
            let (prompts, known) = prompts(&config, &model, Purpose::Train)?;
            config = known;
            prompts
        }
        None => alike(&config, PROMPT_TOKENS),
    };
    let place = match (args.device, args.memory) {
        (Some(DeviceChoice::Vm), _) => {
            bail!("--device vm: a virtual GPU has the memory of the host; give cuda or cpu")
        }
        (Some(DeviceChoice::Cpu), Some(memory)) => Place::Cpu(memory),
        (_, Some(memory)) => Place::Gpu { memory, driver: CONTEXT, host: args.host_memory },
        (choice, None) => here(choice.unwrap_or(DeviceChoice::Auto), args.host_memory)?,
    };
    if matches!(place, Place::Cpu(_)) {
        streams_nothing(&config)?;
    }
    let purpose = Purpose::Train;
    let judging = reward_models(&config)?;
    let reward_models = &judging;
    let run = Run { model: &model, dtype, config: &config, prompts: &prompts, purpose, reward_models };
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let (new, context) = (config.generate.max_new_tokens, model.max_positions);
    if prompts.is_empty() || run.too_long() > 0 {
        bail!(
            "a prompt has {longest} tokens, and with {new} of generate.max_new_tokens the model's context is {context}"
        );
    }
    let plan = Plan::new(&run, place);
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}, prompts of up to {longest} tokens, responses of up to {new}:",
        args.published.as_deref().unwrap_or(&config.model.path.display().to_string()),
    )?;
    writeln!(out, "{plan}")?;
    Ok(())
}

fn published(name: &str) -> anyhow::Result<GemmaConfig> {
    let mut all = published::all();
    let found = all.iter().position(|(known, _)| known.eq_ignore_ascii_case(name));
    let Some(found) = found else {
        let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        bail!("--published {name}: must be one of {}", names.join(", "));
    };
    Ok(all.swap_remove(found).1)
}

/// So many prompts as a step and its evaluation may have, which have nothing in common.
fn alike(config: &TrainConfig, tokens: usize) -> Vec<Vec<u32>> {
    (0..config.generate.prompts_per_step as u32).map(|i| vec![i % 2; tokens]).collect()
}

/// Refuses to stream from the host's memory what computes in it.
pub(super) fn streams_nothing(config: &TrainConfig) -> anyhow::Result<()> {
    if config.optimizer.offload {
        bail!(
            "optimizer.offload: the CPU computes in the host's memory, where the optimizer's state lies anyway; remove the setting, \
             or train on a GPU"
        );
    }
    Ok(())
}

/// What this machine has.
fn here(choice: DeviceChoice, host: Option<u64>) -> anyhow::Result<Place> {
    let gpu = match choice {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(index) => Some(index),
        DeviceChoice::Auto | DeviceChoice::Vm => driver::gpus()
            .ok()
            .and_then(|gpus| gpus.into_iter().find(|gpu| gpu.usable))
            .map(|gpu| gpu.ordinal),
    };
    let of_gpu = |index: usize| {
        let gpus = driver::gpus()?;
        let found = gpus.into_iter().find(|gpu| gpu.ordinal == index);
        Ok::<_, anyhow::Error>(found.with_context(|| format!("there is no GPU {index}"))?.memory)
    };
    Ok(match gpu {
        Some(index) => {
            Place::Gpu { memory: of_gpu(index)?, driver: CONTEXT, host: host.or_else(host::available) }
        }
        None => Place::Cpu(host::available().context("nothing says how much memory is free; give --memory")?),
    })
}

/// The shapes of the reward models that judge, and what their weights will be stored in.
fn reward_models(config: &TrainConfig) -> anyhow::Result<Vec<(GemmaConfig, DType)>> {
    let judges = [&config.verifier, &config.environment].into_iter().flatten();
    let shape = |path: &Path| {
        if !path.is_dir() {
            bail!(
                "kind = \"model\": no directory at {}; `bon-engine train` with objective.kind = \"verifier\" writes a reward model",
                path.display()
            );
        }
        let file = ConfigFile::open(path)?;
        let dtype = Precision::default().storage(path, &file);
        Ok((file.gemma, dtype))
    };
    judges.filter_map(VerifierConfig::model).map(shape).collect()
}

/// The prompts of a configuration's tasks, the longest first, and the configuration. Of one that trains a verifier, groups
/// and responses are those of the tasks.
fn prompts(
    config: &TrainConfig,
    model: &GemmaConfig,
    purpose: Purpose,
) -> anyhow::Result<(Vec<Vec<u32>>, TrainConfig)> {
    let mut config = config.clone();
    let verifier = purpose == Purpose::Train && config.objective.kind.trains_verifier();
    let read = if verifier { Tasks::read_judged } else { Tasks::read };
    let (mut group, mut longest) = (1, 1);
    let (dir, data) = (&config.model.path, &config.data);
    let tokenizer = Tokenizer::open(dir, model)?;
    let chat = (data.template == Template::Chat).then(|| ChatTemplate::open(dir)).transpose()?;
    let wrapping = match (&chat, data.template) {
        (Some(chat), _) => Wrapping::Chat(chat),
        (None, Template::Turn) => Wrapping::Turn,
        (None, _) => Wrapping::None,
    };
    let format = PromptFormat { prefix: &data.prefix, suffix: &data.suffix, wrapping };
    let mut all = Vec::new();
    let eval_tasks = data.eval_tasks.as_ref().filter(|_| purpose == Purpose::Train);
    for path in [Some(&data.tasks), eval_tasks].into_iter().flatten() {
        for task in &read(path)?.list {
            all.push(format.apply(&tokenizer, &task.history, &task.prompt)?.1);
            let responses = task.fields.get("responses").and_then(Value::as_array).filter(|_| verifier);
            for response in responses.into_iter().flatten() {
                let length = match (response["tokens"].as_array(), response["text"].as_str()) {
                    (Some(tokens), _) => tokens.len(),
                    // What ends it may take a token more.
                    (None, text) => tokenizer.encode(text.unwrap_or_default())?.len() + 1,
                };
                longest = longest.max(length);
            }
            group = group.max(responses.map_or(0, Vec::len));
        }
    }
    all.sort_by_key(|ids| std::cmp::Reverse(ids.len()));
    if verifier {
        (config.generate.samples, config.generate.max_new_tokens) = (group, longest);
    }
    Ok((all, config))
}

/// The plan of a run that is about to begin, to be told once its files have been found to be usable. Warns at once where it
/// does not fit, and refuses a run whose weights and state alone a GPU has no memory for: what sampling and training take is
/// the most that they may, where all responses are as long as they may be.
pub(super) fn of_run(
    config: &TrainConfig,
    engine: &Engine,
    purpose: Purpose,
) -> anyhow::Result<Option<String>> {
    if matches!(engine, Engine::Cpu(_)) && purpose == Purpose::Train {
        streams_nothing(config)?;
    }
    // What is wrong with settings and files is for the run to say, which reads them all.
    if config.check_for_plan().is_err() {
        return Ok(None);
    }
    let Ok(file) = ConfigFile::open(&config.model.path) else { return Ok(None) };
    let Ok((prompts, config)) = prompts(config, &file.gemma, purpose) else { return Ok(None) };
    let config = &config;
    let place = match engine {
        Engine::Cpu(_) => host::available().map(Place::Cpu),
        Engine::Cuda(cuda) => {
            free(cuda).map(|memory| Place::Gpu { memory, driver: 0, host: host::available() })
        }
    };
    let dtype = config.model.precision().storage(&config.model.path, &file);
    let Ok(judging) = reward_models(config) else { return Ok(None) };
    let reward_models = &judging;
    let run = Run { model: &file.gemma, dtype, config, prompts: &prompts, purpose, reward_models };
    let Some(place) = place.filter(|_| !prompts.is_empty() && run.too_long() == 0) else { return Ok(None) };
    let plan = Plan::new(&run, place);
    if plan.host_memory.is_some_and(|there| plan.host_bytes() > there) {
        bail!("there is not enough memory on the host of {}:\n{plan}", engine.name());
    }
    let text = format!("memory on {}:\n{plan}", engine.name());
    if plan.fits {
        return Ok(Some(text));
    }
    if matches!(place, Place::Gpu { .. }) && plan.held_bytes() > plan.memory {
        bail!("there is not enough {text}");
    }
    note(&format!("warning: {text}"));
    Ok(None)
}

/// Bytes of a GPU that are free; a virtual one has no memory of its own.
fn free(cuda: &Cuda) -> Option<u64> {
    cuda.device().available().ok().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(size("24GB"), Ok(24_000_000_000));
        assert_eq!(size("24GiB"), Ok(24 << 30));
        assert_eq!(size("0.5gb"), Ok(500_000_000));
        assert_eq!(size("800 MB"), Ok(800_000_000));
        for wrong in ["24", "GB", "-1GB", "24TB", "0GB", "1e9GB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
