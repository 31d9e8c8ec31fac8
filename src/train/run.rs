//! A run from start or checkpoint to its end: steps, evaluations, saves.
//!
//! What happens in a step, in this order, and the function that does it:
//!
//! 1. tasks are drawn: [`Order::task`]
//! 2. prompts are formatted and tokenised: [`PromptFormat::apply`](crate::rollout::PromptFormat::apply)
//! 3. M responses to each are sampled, with their log-probs: [`generate`](crate::generate::generate())
//! 4. the verifier judges responses while others are still sampled: [`Rollout::run_from`](crate::rollout::Rollout::run_from)
//! 5. rewards and scores become a coefficient c_j per response: [`coefficients`](crate::objective::coefficients); groups
//!    without one other than 0 give way to further tasks where that is asked for: `Stepper::refill` in `step.rs`
//! 6. the responses that count run again, forward: [`Forward::with`](super::policy::Forward::with)
//! 7. a coefficient becomes a weight per token (length, PPO's clip, KL term): `Stepper::backward` in `step.rs`
//! 8. gradients of the weighted log-probs are summed: [`Forward::backward`](super::policy::Forward::backward)
//! 9. its norm is clipped, AdamW updates masters and weights: [`Optimizer::step`]
//! 10. the step's figures are written: [`Metrics::step`]
//!
//! A verifier is trained on scored responses that are given: [`Fit`](super::scored) takes the place of 2 to 8.
//!
//! Steps 6 to 8 repeat for each of `gradient_accumulation` micro-batches, 6 to 9 for each of `updates_per_batch` updates.

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::config::{ConfigError, Problem, Template, TrainConfig};
use super::error::TrainError;
use super::evaluation::{
    Evaluation, comparable, eval_sampling, evaluation, provenance, same_measure, scores_report, sizes,
    with_model,
};
use super::inputs;
use super::interrupt::Interrupt;
use super::metrics::{EVALS, EVENTS, EvalMetrics, Metrics, STEPS, StepMetrics, UNJUDGED};
use super::optimizer::Optimizer;
use super::pass_rate;
use super::scored::{Scored, check_labels, fewest, judged, scored};
use super::setup::{
    check_experts, check_judges, check_prompts, check_tasks, judges, rollout, stop_rule, warnings,
};
use super::snapshot::{LOCK, Newest, Snapshot, SnapshotError, Snapshots, TrainState, begun, newest_step};
use super::step::Stepper;
use crate::adapter::{self, LoraSpec};
use crate::backend::Backend;
use crate::checkpoint::{Action, Checkpoint, FileError, atomic};
use crate::eval::{Comparison, Provenance, Report, Unjudged};
use crate::gemma::Gemma;
use crate::gemma::activations::Kept;
use crate::gemma::params::{Linear, TextNames};
use crate::model_dir::{self, ModelDir, ModelRole, OpenError, Precision, open_weights};
use crate::rollout::{Judges, RolloutError};
use crate::tasks::{Order, Tasks};

/// What a run tells while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// It goes on from a checkpoint after so many steps.
    Resumed {
        /// Steps completed.
        step: u64,
    },
    /// Something in settings or tasks can be used, but is hardly meant.
    Warning {
        /// What.
        text: &'a str,
    },
    /// Tasks were chosen by their pass rates.
    Chosen {
        /// How many there are.
        tasks: usize,
        /// How many the file has.
        of: usize,
        /// `data.pass_rate`.
        range: [f64; 2],
    },
    /// The starting model's weights were rounded, because the device wants bf16.
    Rounded {
        /// The model's directory.
        path: &'a Path,
    },
    /// A newer checkpoint is damaged and was passed over.
    PassedOver {
        /// Where it lies.
        path: &'a Path,
        /// What is wrong with it.
        error: &'a SnapshotError,
    },
    /// An evaluation begins.
    EvalStarted {
        /// Steps taken before it.
        step: u64,
        /// Responses to sample.
        responses: u64,
    },
    /// A response of the evaluation is complete.
    EvalResponse,
    /// An evaluation is done.
    Eval {
        /// Steps taken before it.
        step: u64,
        /// What it found.
        report: &'a Report,
    },
    /// Responses of a step or an evaluation could not be judged.
    Unjudged {
        /// They, one at least.
        responses: &'a [Unjudged],
        /// The file that has them all.
        path: &'a Path,
    },
    /// A verifier does something that is put up with and costs time.
    VerifierNote {
        /// What, and what to do about it.
        note: &'a str,
    },
    /// An earlier run in this directory ended before its first checkpoint; this one takes its place.
    Replaced {
        /// The run directory.
        path: &'a Path,
    },
    /// The evaluation before training is missing, or of other tasks or another number of samples than now: there
    /// will be no comparison at the end.
    NoComparison,
    /// How many activations the steps keep for the backward pass: after the first step, and when that is told by another
    /// sentence.
    Activations {
        /// The fewest that a micro-batch kept so far.
        kept: &'a Kept,
    },
    /// A step is done.
    Step {
        /// Its figures.
        metrics: &'a StepMetrics,
        /// Estimated seconds until the run ends.
        eta: f64,
    },
    /// A checkpoint is in place.
    Saved {
        /// Where it lies.
        path: &'a Path,
    },
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Steps completed.
    pub step: u64,
    /// How many of them this process took: 0 where a finished run was resumed.
    pub taken: u64,
    /// Whether all steps of the configuration (or this process's minutes) and the last evaluation are done; otherwise
    /// `--resume` goes on.
    pub finished: bool,
    /// The newest checkpoint.
    pub checkpoint: PathBuf,
    /// The evaluations before and after, compared, where there are evaluation tasks and the run is finished.
    pub comparison: Option<Comparison>,
}

/// The name of a run's settings in its directory.
pub const CONFIG: &str = "config.toml";
const CHECKPOINTS: &str = "checkpoints";
/// That of the directory of reports of evaluations.
pub const EVAL_DIR: &str = "eval";
/// That of the page that shows the run, which whoever calls [`run`] may write.
pub const PAGE: &str = "report.html";
/// Tasks of each kind whose responses a report of an evaluation shows.
const EXAMPLES: usize = 3;
/// The evaluations before and after, compared.
const COMPARISON: &str = "comparison.txt";

/// Runs a training configuration on `backend` until it is done or `stop` is raised. `resume` goes on from the newest
/// valid checkpoint in `train.output`; a run that was killed before its first checkpoint begins again. A new run
/// writes nothing before the model, the tasks and the verifier have been found to be usable, and never over what is not
/// a run's; that of a run without a checkpoint it replaces.
///
/// `stop` lets a step end, but no evaluation: the resumed run repeats that. `train.max_minutes` counts from the start
/// of this process, its evaluation before training included; a run that it ends is finished, and evaluated as such.
pub fn run<B: Backend + Clone + 'static>(
    backend: B,
    config: &TrainConfig,
    resume: bool,
    stop: &Interrupt,
    mut report: impl FnMut(Event),
) -> Result<Outcome, TrainError> {
    config.validate_for(!resume || config.train.kl_coefficient > 0.0)?;
    let out = &config.train.output;
    let (config_path, dir) = (out.join(CONFIG), out.join(CHECKPOINTS));
    if resume && !config_path.exists() && !dir.exists() {
        return Err(TrainError::NothingToResume { path: dir });
    }
    let replaces = !resume && !vacant(out)?;
    let verifier = config.objective.kind.trains_verifier();
    let read = if verifier { Tasks::read_judged } else { Tasks::read };
    let mut tasks = read(&config.data.tasks)?;
    if let (Some(path), Some(range)) = (&config.data.report, config.data.pass_rate) {
        let of = tasks.list.len();
        tasks = pass_rate::filter(tasks, &config.data.tasks, path, range)?;
        report(Event::Chosen { tasks: tasks.list.len(), of, range });
    }
    let eval_tasks = config.data.eval_tasks.as_deref().map(read).transpose()?;
    let judged = config.objective.kind.objective().needs_samples || eval_tasks.is_some();
    let judges = if judged && !verifier { judges(config, &backend)? } else { None };
    if eval_tasks.is_some() && judges.is_none() && !verifier {
        let message = "missing; the evaluation on data.eval_tasks needs one".into();
        return Err(ConfigError::Invalid { problems: vec![Problem { key: "verifier", message }] }.into());
    }
    let files: Vec<(&Path, &Tasks)> =
        [Some((&*config.data.tasks, &tasks)), config.data.eval_tasks.as_deref().zip(eval_tasks.as_ref())]
            .into_iter()
            .flatten()
            .collect();
    // Scored responses of these files, once there is a tokenizer.
    let labelled: OnceCell<Vec<Vec<Scored>>> = OnceCell::new();
    if let Some(judges) = &judges {
        if config.objective.kind.objective().needs_samples {
            check_tasks(judges, &config.data.tasks, &tasks)?;
        }
        if let (Some(path), Some(tasks)) = (&config.data.eval_tasks, &eval_tasks) {
            check_tasks(judges, path, tasks)?;
        }
        judges.notes().iter().for_each(|note| report(Event::VerifierNote { note }));
    }
    let inputs = inputs::of_steps(config);
    // The start, or a checkpoint's model: weights stored as it has them, or adapters of the start's.
    let open = |checkpoint: Option<&Path>| -> Result<ModelDir<B>, TrainError> {
        let chat = config.data.template == Template::Chat;
        let (start, precision) = (&*config.model.path, config.model.precision());
        let (path, adapter, precision) = match (checkpoint, &config.lora) {
            (Some(dir), None) => (dir, None, Precision { dtype: None, ..precision }),
            (Some(dir), Some(_)) => (start, Some(dir), precision),
            (None, _) => (start, config.model.adapter.as_deref(), precision),
        };
        let role = if verifier { ModelRole::NewReward } else { ModelRole::Policy };
        let mut model_dir = ModelDir::open_as(role, backend.clone(), path, precision)?.with_chat(chat)?;
        model_dir = match (&config.lora, adapter) {
            (Some(spec), None) => model_dir.with_new_adapter(spec, config.train.seed),
            (_, adapter) => model_dir.with_adapter(adapter)?,
        };
        if let (Some(wanted), Some(found)) = (&config.lora, &model_dir.lora) {
            same_adapter(wanted, found, &model_dir.model)?;
        }
        if config.objective.kind.objective().needs_samples {
            check_prompts(config, &model_dir, &config.data.tasks, &tasks)?;
        }
        if config.objective.kind.objective().needs_expert() {
            check_experts(config, &model_dir, &tasks)?;
        }
        if verifier {
            let read = |(path, tasks): &(&Path, &Tasks)| scored(config, &model_dir, path, tasks);
            let read = files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
            labelled.get_or_init(|| read);
        } else if let (Some(path), Some(tasks)) = (&config.data.eval_tasks, &eval_tasks) {
            check_prompts(config, &model_dir, path, tasks)?;
        }
        if let Some(judges) = &judges {
            check_judges(config, &model_dir, judges, &files)?;
        }
        Ok(model_dir)
    };
    // Before anything is written.
    let fresh = match resume {
        true => None,
        false => {
            let dir = open(None)?;
            if dir.rounded {
                report(Event::Rounded { path: &config.model.path });
            }
            Some(Start::new(dir, config)?)
        }
    };
    let snapshots = Snapshots::open(&dir, config.train.keep_checkpoints)?;
    let newest = snapshots.newest_valid()?;
    for (path, error) in &newest.passed_over {
        report(Event::PassedOver { path, error });
    }
    let start = match fresh {
        Some(_) if newest.snapshot.is_some() || !newest.passed_over.is_empty() => {
            return Err(TrainError::Exists { path: out.clone() });
        }
        Some(fresh) => {
            if replaces {
                report(Event::Replaced { path: out });
                remove_logs(out)?;
            }
            fresh
        }
        None => {
            let start = go_on(&backend, config, (&tasks, &inputs), newest, open)?;
            report(Event::Resumed { step: start.step });
            start
        }
    };
    let kind = config.objective.kind;
    let mut told = BTreeSet::new();
    for (at, (path, tasks)) in files.into_iter().enumerate() {
        for text in warnings(config, &start.dir, path, tasks, at == 0 && kind.objective().needs_expert())? {
            if told.insert(text.clone()) {
                report(Event::Warning { text: &text });
            }
        }
    }
    if let Some(groups) = labelled.get().and_then(|files| files.first())
        && let Some(text) = check_labels(config, &config.data.tasks, groups)?
    {
        report(Event::Warning { text: &text });
    }
    let mut labelled = labelled.into_inner().unwrap_or_default().into_iter();
    let (train_scored, eval_scored) =
        (labelled.next().unwrap_or_default(), labelled.next().unwrap_or_default());
    let text = config.to_toml()?;
    atomic::write_file(&config_path, |f| f.write_all(text.as_bytes()))?;
    // Where adapters are trained, the model without them is the start.
    let reference = match config.train.kl_coefficient > 0.0 && config.lora.is_none() {
        true => Some(ModelDir::open(backend.clone(), &config.model.path, config.model.precision())?.model),
        false => None,
    };
    let metrics = Metrics::open(out, start.step)?;
    let (first, resumed) = (start.step, resume);
    let (count, seed) = (tasks.list.len(), config.train.seed);
    let (order, refills) = (Order::new(count, seed), Order::refills(count, seed));
    let (scored, kept) = (train_scored, None);
    let stepper = Stepper { config, tasks: &tasks, order, refills, judges, reference, scored, kept };
    let trainer = Trainer { stepper, metrics, snapshots, inputs, first, resumed, eval_scored };
    trainer.run(start, eval_tasks.as_ref(), stop, &mut report)
}

/// Refuses an adapter of `model` with other settings than the configuration's.
fn same_adapter<B: Backend>(
    wanted: &LoraSpec,
    found: &LoraSpec,
    model: &Gemma<B>,
) -> Result<(), ConfigError> {
    // A map that no layer has cannot have an adapter.
    let there = |map: &&Linear| model.params.layers.iter().any(|layer| layer.weight(**map).is_some());
    let targets = |spec: &LoraSpec| spec.targets.iter().filter(there).copied().collect::<BTreeSet<Linear>>();
    let message = match () {
        () if wanted.rank != found.rank => {
            format!("lora.rank is {}, the adapter's {}", wanted.rank, found.rank)
        }
        () if wanted.scale() != found.scale() => {
            format!(
                "lora.alpha and lora.rslora give a factor of {}, the adapter's {}",
                wanted.scale(),
                found.scale()
            )
        }
        () if targets(wanted) != targets(found) => {
            let names = |spec| targets(spec).iter().map(|map| map.name()).collect::<Vec<_>>().join(", ");
            format!("lora.targets are {}, the adapter's {}", names(wanted), names(found))
        }
        () => return Ok(()),
    };
    Err(ConfigError::Invalid { problems: vec![Problem { key: "model.adapter", message }] })
}

/// How the checkpoint of a vision-and-text model names its text part's tensors.
fn text_names<B: Backend>(dir: &ModelDir<B>) -> Result<Option<TextNames>, OpenError> {
    if !dir.config.wrapped {
        return Ok(None);
    }
    Ok(TextNames::of(&Checkpoint::open(&dir.path)?))
}

/// Whether nothing stands where a new run would write: `false` if that is left of a run that ended before its first
/// checkpoint, which has nothing to go on from. A run with checkpoints, and what no run wrote, is refused.
fn vacant(out: &Path) -> Result<bool, TrainError> {
    let (config, dir) = (out.join(CONFIG), out.join(CHECKPOINTS));
    let exists = || TrainError::Exists { path: out.into() };
    let found = newest_step(&dir)?;
    if found.is_some() {
        return Err(exists());
    }
    if begun(&dir) {
        return Ok(false);
    }
    if config.exists() && TrainConfig::load(&config, &[]).is_ok() {
        return Err(exists());
    }
    for name in [CONFIG, STEPS, EVALS, UNJUDGED, COMPARISON, PAGE, EVENTS, EVAL_DIR, CHECKPOINTS] {
        let path = out.join(name);
        // A kill may have kept its text from the lock.
        let no_matter = |entry: &fs::DirEntry| {
            entry.file_name() == LOCK && entry.metadata().is_ok_and(|meta| meta.len() == 0)
        };
        let empty = || fs::read_dir(&path).is_ok_and(|entries| entries.flatten().all(|e| no_matter(&e)));
        if fs::symlink_metadata(&path).is_ok() && !empty() {
            return Err(TrainError::Foreign { path });
        }
    }
    Ok(true)
}

/// Removes what a run without a checkpoint logged; in directories, what bears names that runs give.
fn remove_logs(out: &Path) -> Result<(), FileError> {
    let mut found: Vec<PathBuf> = [STEPS, EVALS, UNJUDGED, PAGE].map(|name| out.join(name)).into();
    for (dir, ours) in [
        (EVAL_DIR, (|name| name.starts_with("step-") && name.ends_with(".json")) as fn(&str) -> bool),
        (EVENTS, |name| name.starts_with("events.out.tfevents.") && name.contains(".bon-engine.")),
    ] {
        let entries = fs::read_dir(out.join(dir)).into_iter().flatten().flatten();
        found.extend(
            entries
                .map(|e| e.path())
                .filter(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(ours)),
        );
    }
    for path in found.iter().filter(|path| path.is_file()) {
        fs::remove_file(path).map_err(FileError::io(Action::Write, path))?;
    }
    Ok(())
}

/// Where a process begins.
struct Start<B: Backend> {
    dir: ModelDir<B>,
    optimizer: Optimizer<B>,
    /// Steps completed.
    step: u64,
    /// Their checkpoint, where there is one.
    checkpoint: Option<PathBuf>,
}

impl<B: Backend> Start<B> {
    fn new(dir: ModelDir<B>, config: &TrainConfig) -> Result<Self, TrainError> {
        let mut optimizer = Optimizer::new(&dir.model, &config.optimizer, config.train.seed);
        let checkpoint = open_weights(&dir.path, &dir.config).map_err(OpenError::from)?;
        optimizer.start_from(&dir.model.backend, &checkpoint);
        let start = Self { optimizer, dir, step: 0, checkpoint: None };
        start.check()?;
        Ok(start)
    }

    fn check(&self) -> Result<(), TrainError> {
        let path = self.dir.path.clone();
        let doing = match self.dir.lora {
            None => {
                "making room to train it, 16 bytes a parameter beside the weights; optimizer.moments = \"8bit\" takes 6 off, \
                 optimizer.masters = false 4, optimizer.gradients = \"bf16\" 2; optimizer.offload = true holds moments and masters in the host's memory"
            }
            Some(_) => "making room to train its adapters, 16 bytes a parameter of theirs",
        };
        let checked = self.dir.model.backend.check();
        Ok(checked.map_err(|source| OpenError::Device { path, doing, source })?)
    }
}

/// Where the run in `config.train.output` goes on, if it was begun with these settings, tasks and other files.
fn go_on<B: Backend>(
    backend: &B,
    config: &TrainConfig,
    (tasks, inputs): (&Tasks, &BTreeMap<String, String>),
    newest: Newest,
    open: impl Fn(Option<&Path>) -> Result<ModelDir<B>, TrainError>,
) -> Result<Start<B>, TrainError> {
    let out = &config.train.output;
    let differ = |differences: Vec<String>| match differences.is_empty() {
        true => Ok(()),
        false => Err(TrainError::Differs { path: out.clone(), differences }),
    };
    let config_path = out.join(CONFIG);
    let saved = match config_path.exists() {
        true => Some(TrainConfig::load(&config_path, &[])?),
        false => None,
    };
    if let Some(saved) = &saved {
        differ(config.resume_differences(saved)?)?;
    }
    match (newest.snapshot, newest.passed_over.first(), saved) {
        (Some(snapshot), _, _) => {
            let state = snapshot.state.clone();
            let device = backend.device_model();
            if state.device != device {
                differ(vec![format!(
                    "--device: the run is on {}, this is {device}; go on there, or begin a new run from the model in {}",
                    state.device,
                    snapshot.model_dir().display()
                )])?;
            }
            let which = match config.data.report {
                None => "its tasks have changed",
                Some(_) => "its tasks have changed, or what data.report and data.pass_rate choose of them",
            };
            let changes = [
                (state.data_hash != tasks.fingerprint, &config.data.tasks, which),
                (
                    state.config_hash != config.resume_hash()?,
                    &config_path,
                    "not the settings of the checkpoints",
                ),
            ];
            let changes = changes.into_iter().filter(|(changed, _, _)| *changed);
            let changes = changes.map(|(_, path, what)| format!("{}: {what}", path.display()));
            let files = state.inputs.iter().filter_map(|(key, old)| {
                let new = inputs.get(key)?;
                (new != old)
                    .then(|| format!("{key}: {old} -> {new}: the file has changed since the checkpoint"))
            });
            differ(changes.chain(files).collect())?;
            let mut start = Start::new(open(Some(&snapshot.model_dir()))?, config)?;
            start.optimizer.load(backend, &snapshot.optimizer_path())?;
            start.check()?;
            Ok(Start { step: state.step, checkpoint: Some(snapshot.path), ..start })
        }
        (None, Some((_, error)), _) => {
            Err(TrainError::AllDamaged { path: out.join(CHECKPOINTS), reason: error.to_string() })
        }
        // Killed before its first checkpoint.
        (None, None, Some(saved)) => {
            if saved.model.path != config.model.path {
                let (old, new) = (saved.model.path.display(), config.model.path.display());
                differ(vec![format!("model.path: {old} -> {new}")])?;
            }
            Start::new(open(None)?, config)
        }
        (None, None, None) => Err(TrainError::NothingToResume { path: out.join(CHECKPOINTS) }),
    }
}

struct Trainer<'a, B: Backend> {
    stepper: Stepper<'a, B>,
    metrics: Metrics,
    snapshots: Snapshots,
    /// [`inputs::of_steps`].
    inputs: BTreeMap<String, String>,
    /// Steps completed before this process.
    first: u64,
    /// Whether there was another process before.
    resumed: bool,
    /// Scored responses to evaluate a verifier on, in the order of the evaluation's tasks.
    eval_scored: Vec<Scored>,
}

impl<B: Backend> Trainer<'_, B> {
    /// Trains from `start` to the end of the run or of this process.
    fn run(
        mut self,
        start: Start<B>,
        eval_tasks: Option<&Tasks>,
        stop: &Interrupt,
        report: &mut impl FnMut(Event),
    ) -> Result<Outcome, TrainError> {
        let Start { mut dir, mut optimizer, mut step, checkpoint } = start;
        let dir = &mut dir;
        let train = &self.stepper.config.train;
        let started = Instant::now();
        let out_of_time =
            || train.max_minutes.is_some_and(|limit| started.elapsed().as_secs_f64() >= limit * 60.0);
        let mut before = None;
        if let Some(tasks) = eval_tasks {
            before = match self.first {
                0 => self.eval(dir, tasks, 0, stop, report)?,
                _ => self.filed(dir, tasks, 0)?,
            };
            if before.is_none() && !stop.requested() {
                report(Event::NoComparison);
            }
        }
        let training = Instant::now();
        let mut last_save = started;
        let mut saved = checkpoint.map(|path| (step, path));
        loop {
            // Here rather than after the step, so that a resumed run makes up for an evaluation that a kill cut short.
            let due = train.eval_every > 0 && step > 0 && step.is_multiple_of(train.eval_every);
            if let (true, Some(tasks)) = (due && step < train.steps, eval_tasks) {
                self.eval(dir, tasks, step, stop, report)?;
            }
            if step >= train.steps || stop.requested() || out_of_time() {
                break;
            }
            step += 1;
            let before = self.stepper.kept.map(|kept| kept.share());
            let (metrics, unjudged) = self.stepper.step(dir, &mut optimizer, step)?;
            if let Some(kept) = self.stepper.kept.as_ref().filter(|kept| Some(kept.share()) != before) {
                report(Event::Activations { kept });
            }
            self.metrics.unjudged(step, false, &unjudged)?;
            self.metrics.step(&metrics)?;
            self.tell(&unjudged, report);
            let per_step = training.elapsed().as_secs_f64() / (step - self.first) as f64;
            let mut eta = per_step * (train.steps - step) as f64;
            if let Some(minutes) = train.max_minutes {
                eta = eta.min(minutes * 60.0 - started.elapsed().as_secs_f64()).max(0.0);
            }
            report(Event::Step { metrics: &metrics, eta });
            let minutes = last_save.elapsed().as_secs_f64() / 60.0;
            if (train.save_every > 0 && step.is_multiple_of(train.save_every))
                || (train.save_minutes > 0.0 && minutes >= train.save_minutes)
            {
                saved = Some((step, self.save(dir, &optimizer, step, report)?));
                last_save = Instant::now();
            }
        }
        if let (false, Some(judges)) = (stop.requested(), &self.stepper.judges) {
            judges.check().map_err(TrainError::Unjudged)?;
        }
        let checkpoint = match saved {
            Some((at, path)) if at == step => path,
            _ => self.save(dir, &optimizer, step, report)?,
        };
        let mut comparison = None;
        if let (false, Some(tasks)) = (stop.requested(), eval_tasks) {
            let after = self.eval(dir, tasks, step, stop, report)?;
            if let (Some(before), Some(after)) = (before, after) {
                let compared = before.compare(&after)?;
                let text = compared.to_table();
                atomic::write_file(&train.output.join(COMPARISON), |f| f.write_all(text.as_bytes()))?;
                comparison = Some(compared);
            }
        }
        Ok(Outcome { step, taken: step - self.first, finished: !stop.requested(), checkpoint, comparison })
    }

    /// Tells of what could not be judged, and of what verifiers cost.
    fn tell(&self, unjudged: &[Unjudged], report: &mut impl FnMut(Event)) {
        if !unjudged.is_empty() {
            let path = self.stepper.config.train.output.join(UNJUDGED);
            report(Event::Unjudged { responses: unjudged, path: &path });
        }
        for note in self.stepper.judges.iter().flat_map(Judges::notes) {
            report(Event::VerifierNote { note: &note });
        }
    }

    /// Evaluates and files the report, unless the process before has. `None` if `stop` came in between.
    fn eval(
        &mut self,
        dir: &ModelDir<B>,
        tasks: &Tasks,
        step: u64,
        stop: &Interrupt,
        report: &mut impl FnMut(Event),
    ) -> Result<Option<Report>, TrainError> {
        if self.resumed
            && step == self.first
            && let Some(filed) = self.filed(dir, tasks, step)?
        {
            return Ok(Some(filed));
        }
        let config = self.stepper.config;
        let provenance = with_model(self.provenance(tasks, dir, step)?, dir);
        let started = Instant::now();
        let samples = self.eval_samples();
        let interrupt = || stop.requested();
        let found = match &mut self.stepper.judges {
            // Nothing is sampled for a verifier that is trained.
            None => {
                let groups = &self.eval_scored;
                let responses = groups.iter().map(|group| group.responses.len() as u64).sum();
                report(Event::EvalStarted { step, responses });
                let progress = || report(Event::EvalResponse);
                let problems = judged(config, &dir.model, tasks, groups, progress, interrupt)?;
                let Some(problems) = problems else { return Ok(None) };
                scores_report(config, &problems, samples, provenance)?
            }
            Some(judges) => {
                report(Event::EvalStarted { step, responses: (samples * tasks.list.len()) as u64 });
                let stop_rule = stop_rule(config, dir).interrupted_by(&interrupt);
                let wanted = Evaluation {
                    tasks,
                    samples,
                    ns: sizes(samples),
                    sampling: eval_sampling(config),
                    examples: EXAMPLES,
                    provenance,
                };
                let rollout = rollout(config, dir, &stop_rule);
                let progress = || report(Event::EvalResponse);
                let evaluated = evaluation(&rollout, wanted, judges, None, |_, _| {}, progress);
                match evaluated {
                    Err(TrainError::Evaluation(RolloutError::Interrupted)) => return Ok(None),
                    evaluated => evaluated?,
                }
            }
        };
        let path = self.report_path(step);
        let parent = config.train.output.join(EVAL_DIR);
        fs::create_dir_all(&parent).map_err(FileError::io(Action::Write, &parent))?;
        let text = serde_json::to_string_pretty(&found).expect("a report is plain data");
        atomic::write_file(&path, |f| f.write_all(text.as_bytes()))?;

        let at = |n: usize| found.ns.iter().position(|&x| x >= n).unwrap_or(found.ns.len() - 1);
        // A verifier is judged by the most that it may choose among.
        let most = if self.stepper.judges.is_none() { samples } else { 1 };
        let n = found.ns[at(config.objective.n.unwrap_or(most))];
        let (figures, calibration) = (&found.figures, found.calibration.as_ref());
        let probabilities = calibration.and_then(|calibration| calibration.probabilities.as_ref());
        self.metrics.unjudged(step, true, &found.unjudged)?;
        // After the report: `filed` takes this line for the sign that both are there.
        self.metrics.eval(&EvalMetrics {
            step,
            tasks: tasks.list.len() as u64,
            samples: samples as u64,
            n: n as u64,
            pass_at_1: figures.pass_at_n[0].mean,
            pass_at_n: figures.pass_at_n[at(n)].mean,
            best_of_n: figures.best_of_n[at(n)].mean,
            auc: calibration.and_then(|calibration| calibration.auc),
            pair_accuracy: calibration.and_then(|calibration| calibration.pair_accuracy),
            accuracy: probabilities.map(|p| p.accuracy),
            ece: probabilities.map(|p| p.ece),
            seconds: started.elapsed().as_secs_f64(),
        })?;
        report(Event::Eval { step, report: &found });
        self.tell(&found.unjudged, report);
        Ok(Some(found))
    }

    /// Responses per task that an evaluation estimates from.
    fn eval_samples(&self) -> usize {
        match self.eval_scored.is_empty() {
            true => self.stepper.config.train.eval_samples,
            false => fewest(&self.eval_scored),
        }
    }

    /// What an evaluation after `step` is made with, but for the weights.
    fn provenance(&self, tasks: &Tasks, dir: &ModelDir<B>, step: u64) -> Result<Provenance, TrainError> {
        let config = self.stepper.config;
        let path = config.data.eval_tasks.as_deref().unwrap_or(&config.data.tasks);
        let mut model = config.model.path.display().to_string();
        if step > 0 {
            model += &format!(" after {step} steps");
        }
        provenance(config, model, path, tasks, dir.model.backend.device_model())
    }

    /// The report that an earlier process filed after `step`, if it is of the present tasks and samples, and measures
    /// the same.
    fn filed(&self, dir: &ModelDir<B>, tasks: &Tasks, step: u64) -> Result<Option<Report>, TrainError> {
        let log = fs::read_to_string(self.stepper.config.train.output.join(EVALS)).unwrap_or_default();
        let mut recorded = log.lines().filter_map(|line| serde_json::from_str::<EvalMetrics>(line).ok());
        let path = self.report_path(step);
        if !recorded.any(|line| line.step == step) || !path.exists() {
            return Ok(None);
        }
        let text = fs::read(&path).map_err(FileError::io(Action::Read, &path))?;
        let filed: Report =
            serde_json::from_slice(&text).map_err(|source| TrainError::Report { path, source })?;
        let (samples, provenance) = (self.eval_samples(), self.provenance(tasks, dir, step)?);
        let fits =
            comparable(&filed, tasks, samples, &sizes(samples)) && same_measure(&filed, &provenance).is_ok();
        Ok(fits.then_some(filed))
    }

    fn report_path(&self, step: u64) -> PathBuf {
        self.stepper.config.train.output.join(EVAL_DIR).join(format!("step-{step:06}.json"))
    }

    /// Saves a checkpoint, with what else belongs to a model from `dir.path`, which then becomes the checkpoint's own
    /// directory: that of an older one will be removed in time.
    fn save(
        &self,
        dir: &mut ModelDir<B>,
        optimizer: &Optimizer<B>,
        step: u64,
        report: &mut impl FnMut(Event),
    ) -> Result<PathBuf, TrainError> {
        self.metrics.sync()?;
        let state = TrainState {
            step,
            config_hash: self.stepper.config.resume_hash()?,
            data_hash: self.stepper.tasks.fingerprint,
            device: dir.model.backend.device_model(),
            inputs: self.inputs.clone(),
        };
        let (b, model) = (&dir.model.backend, &dir.model);
        let path = self.snapshots.save(
            &state,
            |out| {
                match &dir.lora {
                    Some(spec) => adapter::save(model, spec, &dir.path, text_names(dir)?, out)?,
                    None => model_dir::save(b, &dir.config, &model.params, &dir.path, out)?,
                }
                Ok(b.check()?)
            },
            |out| {
                optimizer.save(b, out)?;
                Ok(b.check()?)
            },
        )?;
        report(Event::Saved { path: &path });
        if dir.lora.is_none() {
            dir.path = Snapshot { path: path.clone(), state }.model_dir();
        }
        Ok(path)
    }
}
