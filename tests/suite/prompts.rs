//! The prompts that a plan is made of, for tests here and in binaries of their own.

use bon_engine::gemma::config::ConfigFile;
use bon_engine::rollout::{PromptFormat, Wrapping};
use bon_engine::tasks::Tasks;
use bon_engine::tokenizer::Tokenizer;
use bon_engine::train::config::TrainConfig;

/// The prompts of a run whose template is none, the longest first.
pub(crate) fn prompts(config: &TrainConfig, file: &ConfigFile) -> Vec<Vec<u32>> {
    let tokenizer = Tokenizer::open(&config.model.path, &file.gemma).unwrap();
    let data = &config.data;
    let format = PromptFormat { prefix: &data.prefix, suffix: &data.suffix, wrapping: Wrapping::None };
    let tasks = Tasks::read(&data.tasks).unwrap();
    let ids = |task: &bon_engine::tasks::Task| format.apply(&tokenizer, &[], &task.prompt).unwrap().1;
    let mut all: Vec<Vec<u32>> = tasks.list.iter().map(ids).collect();
    all.sort_by_key(|ids| std::cmp::Reverse(ids.len()));
    all
}
