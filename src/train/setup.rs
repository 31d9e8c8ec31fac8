//! From a configuration to what a run works with: prompts, ends of responses, verifiers; and the checks that need
//! the model or the tasks.

use std::path::Path;
use std::sync::Arc;

use super::config::{Template, TrainConfig, escape};
use super::error::TrainError;
use crate::backend::Backend;
use crate::generate::Sampling;
use crate::model_dir::{ModelDir, ModelRole, Precision, foreign_template};
use crate::reward::Scorer;
use crate::rollout::{Judge, Judges, PromptFormat, ResponseEnd, Rollout, Wrapping};
use crate::tasks::{Task, Tasks};
use crate::tokenizer::{Role, Tokenizer, TokenizerError, role};
use crate::verifier::{Verifier, VerifierConfig, build};

/// Checks that behind every prompt of a task file there is room for the longest response that may be sampled.
pub fn check_prompts<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    path: &Path,
    tasks: &Tasks,
) -> Result<(), TrainError> {
    let (context, new) = (dir.model.config.max_positions, config.generate.max_new_tokens);
    for task in &tasks.list {
        let tokens = prompt(config, dir, path, task)?.1.len();
        if tokens.saturating_add(new) > context {
            let (path, line) = (path.into(), task.line);
            return Err(TrainError::PromptTooLong { path, line, tokens, new, context });
        }
    }
    Ok(())
}

/// Checks that every expert response fits behind its prompt.
pub(super) fn check_experts<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    tasks: &Tasks,
) -> Result<(), TrainError> {
    let (context, path) = (dir.model.config.max_positions, &config.data.tasks);
    let stop_rule = stop_rule(config, dir);
    for task in &tasks.list {
        let (_, prompt) = prompt(config, dir, path, task)?;
        let tokens = prompt.len() + expert(config, dir, &stop_rule, task)?.len();
        if tokens > context {
            let (path, line) = (path.clone(), task.line);
            return Err(TrainError::ExpertTooLong { path, line, tokens, context });
        }
    }
    Ok(())
}

/// What in settings and tasks can be used, but is hardly meant: a sentence each. Of tasks the first line and the number of
/// others; `experts` says whether their responses count.
pub fn warnings<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    path: &Path,
    tasks: &Tasks,
    experts: bool,
) -> Result<Vec<String>, TokenizerError> {
    let (data, stop_rule) = (&config.data, stop_rule(config, dir));
    let mut all = stop_warnings("generate.stop", &config.generate.stop, &dir.tokenizer);
    for (key, text) in [("data.prefix", &data.prefix), ("data.suffix", &data.suffix)] {
        all.extend(escape_warning(key, text));
        all.extend(spelled(&dir.tokenizer, text).map(|problem| format!("{key} {problem}")));
    }
    if data.template == Template::Turn {
        all.extend(template_warning("data.template = \"turn\"", &dir.path));
    }
    let mut prompts = Vec::new();
    let mut responses = Vec::new();
    for task in &tasks.list {
        let said = task.history.iter().map(|message| &message.content).chain([&task.prompt]);
        prompts.extend(
            said.filter_map(|text| spelled(&dir.tokenizer, text))
                .map(|p| (task.line, format!("the prompt {p}"))),
        );
        if !experts {
            continue;
        }
        let kept = stop_rule.text(&expert(config, dir, &stop_rule, task)?);
        let problem = match spelled(&dir.tokenizer, task.response()) {
            Some(problem) => format!("the expert response {problem}"),
            None if kept.len() < task.response().len() => format!(
                "the expert response ends where sampled ones do, at a stop string or end token: the last {} of its {} \
                 bytes are left out",
                task.response().len() - kept.len(),
                task.response().len()
            ),
            None => continue,
        };
        responses.push((task.line, problem));
    }
    for found in [prompts, responses] {
        let Some((line, problem)) = found.first() else { continue };
        let others = match found.len() {
            1 => String::new(),
            n => format!(" (and {} more like it)", n - 1),
        };
        all.push(format!("{}:{line}: {problem}{others}", path.display()));
    }
    Ok(all)
}

/// What is wrong with a text that spells control tokens.
pub fn spelled(tokenizer: &Tokenizer, text: &str) -> Option<String> {
    let names = tokenizer.spelled(text);
    let turn = names.iter().any(|name| name.ends_with("_of_turn>"));
    (!names.is_empty()).then(|| {
        format!(
            "spells {}, and text never becomes a control token, so that the model reads the characters; leave it out: BOS \
             comes before every prompt, {}",
            names.join(", "),
            if turn { "and data.template = \"turn\" (--turn) writes the turns" } else { "and end tokens follow responses" }
        )
    })
}

/// What is wrong with stop strings, given by a setting or argument of that name.
pub fn stop_warnings(name: &str, strings: &[String], tokenizer: &Tokenizer) -> Vec<String> {
    let escaped = strings.iter().filter_map(|s| escape_warning(name, s));
    // Reserved tokens are in the text of responses.
    let within = |s: &&String| {
        tokenizer.control(s).is_none() && tokenizer.spelled(s).iter().any(|t| role(t) != Role::Reserved)
    };
    let spelled = strings.iter().filter(within).map(|s| {
        format!(
            "{name}: {s:?} holds the name of a control token, which is in no response's text; give the token's name alone \
             to end there"
        )
    });
    escaped.chain(spelled).collect()
}

/// The hint that a line break was meant.
pub fn escape_warning(name: &str, text: &str) -> Option<String> {
    let escape = escape(text)?;
    let meant = if escape == "\\t" { "tabulator" } else { "line break" };
    let how = match name {
        _ if name.starts_with("--") => format!("{name} $'...{escape}'"),
        "generate.stop" => format!("double quotes, as in --set '{name}=[\"...{escape}\"]'"),
        _ => format!("double quotes, as in --set '{name}=\"...{escape}\"'"),
    };
    Some(format!("{name}: {escape} is taken as the two characters that it is; if a {meant} is meant: {how}"))
}

/// The note that a model was tuned to other turns than `setting` writes.
pub fn template_warning(setting: &str, dir: &Path) -> Option<String> {
    foreign_template(dir).map(|path| {
        format!(
            "{}: this chat template does not write Gemma's turns, and {setting} does; the model was tuned to another format: \
             use that template (data.template = \"chat\", --chat), take a model that knows Gemma's turns, or leave {setting} out and \
             write prompts as the model knows them",
            path.display()
        )
    })
}

/// A task's expert response as tokens.
pub(super) fn expert<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    stop_rule: &ResponseEnd,
    task: &Task,
) -> Result<Vec<u32>, TokenizerError> {
    completed(config, dir, stop_rule, task.response())
}

/// The tokens of a response with this text, to its end.
pub(super) fn completed<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    stop_rule: &ResponseEnd,
    text: &str,
) -> Result<Vec<u32>, TokenizerError> {
    let end = match config.data.template {
        Template::Turn | Template::Chat => dir.tokenizer.end_of_turn(),
        Template::None => dir.tokenizer.eos(),
    };
    stop_rule.complete(text, end)
}

/// Builds the verifiers of a configuration, reward models on `backend`, which say what passes by its objective's threshold.
/// Objectives that draw no samples may have none.
pub fn judges<B: Backend + Clone + 'static>(
    config: &TrainConfig,
    backend: &B,
) -> Result<Option<Judges>, TrainError> {
    let build = |section: &'static str, verifier: &VerifierConfig| -> Result<Judge, TrainError> {
        if let Some(path) = verifier.model() {
            let opened = ModelDir::open_as(ModelRole::Reward, backend.clone(), path, Precision::default());
            let scorer: Box<dyn Scorer> =
                Box::new(opened.map_err(|source| TrainError::RewardModel { section, source })?);
            return Ok(scorer.into());
        }
        let built = build(verifier).map_err(|source| TrainError::Build { section, source })?;
        Ok(Arc::<dyn Verifier>::from(built).into())
    };
    let Some(verifier) = &config.verifier else { return Ok(None) };
    let environment = config.environment.as_ref().map(|e| build("[environment]", e)).transpose()?;
    let judges = Judges::of(build("[verifier]", verifier)?, environment);
    Ok(Some(judges.passing_at(config.objective.threshold())))
}

/// Checks that reward models read the tokens that a model writes as the same text, and have room for the longest prompts
/// and responses of a task file.
pub fn check_judges<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    judges: &Judges,
    files: &[(&Path, &Tasks)],
) -> Result<(), TrainError> {
    for (section, model) in judges.models() {
        if !model.tokenizer().has_tokens_of(&dir.tokenizer) {
            return Err(TrainError::OtherTokens { section, model: dir.path.clone() });
        }
        let (new, context) = (config.generate.max_new_tokens, model.context());
        for (path, tasks) in files {
            for task in &tasks.list {
                let tokens = prompt(config, dir, path, task)?.1.len();
                if tokens + new > context {
                    let (path, line) = (path.to_path_buf(), task.line);
                    return Err(TrainError::PromptTooLong { path, line, tokens, new, context });
                }
            }
        }
    }
    Ok(())
}

/// Refuses tasks that a verifier could judge no response to.
pub fn check_tasks(judges: &Judges, path: &Path, tasks: &Tasks) -> Result<(), TrainError> {
    for task in &tasks.list {
        if let Some((section, problem)) = judges.unfit(task) {
            return Err(TrainError::Unfit { path: path.to_owned(), line: task.line, section, problem });
        }
    }
    Ok(())
}

/// The prompts of a configuration, to a model that was opened for it: panics if that lacks the chat template.
fn prompt_format<'a, B: Backend>(config: &'a TrainConfig, dir: &'a ModelDir<B>) -> PromptFormat<'a> {
    let wrapping = match config.data.template {
        Template::None => Wrapping::None,
        Template::Turn => Wrapping::Turn,
        Template::Chat => Wrapping::Chat(dir.chat.as_ref().expect("opened with its chat template")),
    };
    PromptFormat { prefix: &config.data.prefix, suffix: &config.data.suffix, wrapping }
}

/// The text and the tokens of a task's prompt; errors name its line.
pub(super) fn prompt<B: Backend>(
    config: &TrainConfig,
    dir: &ModelDir<B>,
    path: &Path,
    task: &Task,
) -> Result<(String, Vec<u32>), TrainError> {
    prompt_format(config, dir)
        .apply(&dir.tokenizer, &task.history, &task.prompt)
        .map_err(|source| TrainError::Prompt { path: path.to_owned(), line: task.line, source })
}

/// Where a configuration ends responses.
pub fn stop_rule<'a, B: Backend>(config: &'a TrainConfig, dir: &'a ModelDir<B>) -> ResponseEnd<'a> {
    ResponseEnd::new(&dir.model.config, &dir.tokenizer, &config.generate.stop)
}

/// Prompts as a configuration describes them, to a model.
pub fn rollout<'a, B: Backend>(
    config: &'a TrainConfig,
    dir: &'a ModelDir<B>,
    stop: &'a ResponseEnd<'a>,
) -> Rollout<'a, B> {
    Rollout { model: &dir.model, tokenizer: &dir.tokenizer, format: prompt_format(config, dir), stop }
}

/// How a configuration samples at an RNG step. Validation has seen to it that training truncates nothing unasked.
pub(super) fn sampling(config: &TrainConfig, step: u64) -> Sampling {
    let generate = &config.generate;
    Sampling {
        temperature: generate.temperature as f32,
        truncation: generate.truncation(),
        max_new_tokens: generate.max_new_tokens,
        seed: config.train.seed,
        step,
    }
}
