//! `bon-engine train`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::PathBuf;

use indicatif::ProgressBar;

use super::device::{DeviceArg, DeviceChoice, Engine};
use super::progress::{Screen, duration, note};
use super::rounded;
use crate::backend::Backend;
use crate::gemma::activations::{Kept, Share};
use crate::train::config::TrainConfig;
use crate::train::metrics::StepMetrics;
use crate::train::run::{Event, run as train};
use crate::train::stop::Stop;

/// Arguments of `train`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
A configuration that says what it must; all else has a default:

  model.path = \"gemma-3-270m\"
  data.tasks = \"train.jsonl\"                        # {\"prompt\": \"2+2=\", \"answer\": \"4\"} a line
  objective = { kind = \"pass-at-n\", n = 4 }
  verifier = { kind = \"numeric\" }
  train = { steps = 100, output = \"runs/first\" }

The run directory, train.output, gets config.toml (the settings with all defaults), metrics.jsonl (a line per step), \
eval.jsonl and eval/ (the evaluations), tensorboard/, and checkpoints/step-NNNNNN/model: a model directory for \
`sample`, `eval` and Transformers.

Ctrl-C or SIGTERM: the step ends, a checkpoint is saved, the command to go on is printed, and the exit code is 0. A \
second one ends the run at once. After that, a kill or a power cut, --resume loses no more than the steps since the \
newest checkpoint (train.save_every), and the result is to the bit that of an uninterrupted run.")]
pub struct Args {
    /// Configuration (TOML)
    #[arg(value_name = "CONFIG")]
    config: PathBuf,
    /// Override a setting, as in --set optimizer.lr=1e-5; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    device: DeviceArg,
    /// Go on from the newest checkpoint in train.output
    ///
    /// Settings that change what a step computes must be those of the run. What may change: train.output,
    /// train.recompute, train.save_every, train.keep_checkpoints, the evaluation's settings, train.max_minutes (which
    /// counts anew) and, with a constant learning rate, train.steps. The device must be of the kind that the run was
    /// begun on: another rounds otherwise.
    #[arg(long)]
    resume: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = TrainConfig::load(&args.config, &args.set)?;
    match args.device.choice.open()? {
        Engine::Cpu(backend) => run_on(backend, &args, &config),
        Engine::Cuda(backend) => run_on(backend, &args, &config),
    }
}

fn run_on<B: Backend + Clone>(backend: B, args: &Args, config: &TrainConfig) -> anyhow::Result<()> {
    let device = backend.device_name();
    let stop = Stop::on_signals()?;
    let mut progress = Progress::new(config, device);
    let outcome = train(backend, config, args.resume, &stop, |event| progress.show(event));
    progress.clear();
    let outcome = outcome?;
    let mut out = std::io::stdout().lock();
    if let (Some(comparison), Some(tasks)) = (&outcome.comparison, &config.data.eval_tasks) {
        writeln!(out, "before and after {} steps, on {}:", outcome.step, tasks.display())?;
        writeln!(out, "{}", comparison.to_table())?;
    }
    let (step, steps) = (outcome.step, config.train.steps);
    let model = outcome.checkpoint.join("model");
    if !outcome.finished {
        writeln!(out, "stopped after step {step} of {steps}; go on with:\n  {}", args.to_resume())?;
    } else if outcome.taken == 0 && step >= steps {
        writeln!(out, "nothing left to do: the run had finished its {steps} steps")?;
    } else if step < steps {
        writeln!(out, "time is up after step {step} of {steps}; for more: {}", args.to_resume())?;
    } else {
        writeln!(out, "done after {step} steps")?;
    }
    writeln!(out, "the model: {}", model.display())?;
    Ok(())
}

impl Args {
    /// The command that goes on from here.
    fn to_resume(&self) -> String {
        let mut words = vec!["bon-engine train".to_owned(), quoted(&self.config.display().to_string())];
        words.extend(self.set.iter().map(|set| format!("--set {}", quoted(set))));
        if self.device.choice != DeviceChoice::Auto {
            words.push(format!("--device {}", self.device.choice));
        }
        words.push("--resume".to_owned());
        words.join(" ")
    }
}

/// A word as a shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/=,:+%@".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// One bar for the run on a terminal, a line per step elsewhere.
struct Progress<'a> {
    config: &'a TrainConfig,
    /// What computes.
    device: String,
    screen: Screen,
    run: Option<ProgressBar>,
    eval: Option<ProgressBar>,
    /// Kinds of verifier failures that have been told.
    told: BTreeSet<String>,
}

impl<'a> Progress<'a> {
    fn new(config: &'a TrainConfig, device: String) -> Self {
        Self { config, device, screen: Screen::default(), run: None, eval: None, told: BTreeSet::new() }
    }

    fn show(&mut self, event: Event) {
        match event {
            Event::Rounded { path } => note(&rounded(path, &self.device)),
            Event::Resumed { step: 0 } => note("no step completed yet: starting again"),
            Event::Resumed { step } => note(&format!("resuming after step {step}")),
            Event::PassedOver { path, error } => {
                note(&format!("passing over the damaged checkpoint {}: {error}", path.display()));
            }
            Event::EvalStarted { step, responses } => {
                self.screen.line(&format!("evaluating after step {step}: {responses} responses"));
                self.eval = Some(self.screen.responses(responses));
            }
            Event::EvalResponse => {
                if let Some(bar) = &self.eval {
                    bar.inc(1);
                }
            }
            Event::Eval { report, failures, .. } => {
                if let Some(bar) = self.eval.take() {
                    bar.finish_and_clear();
                }
                self.screen.line(&report.to_table());
                self.tell(failures);
            }
            Event::NoComparison => self.screen.line(
                "there is no evaluation before training on these tasks and with so many samples: no comparison at the end",
            ),
            Event::Activations { kept } => self.screen.line(&activations(kept)),
            Event::Step { metrics, eta } => {
                self.tell(&metrics.verifier_failures);
                let (steps, figures) = (self.config.train.steps, figures(metrics, self.config));
                if self.screen.has_bars() {
                    let template = "step {pos}/{len} {wide_bar} {elapsed}, {prefix} left\n{msg}";
                    let bar = self.run.get_or_insert_with(|| self.screen.bar(steps, template));
                    bar.set_prefix(duration(eta));
                    bar.set_message(figures);
                    bar.set_position(metrics.step);
                } else {
                    note(&format!("step {}/{steps}  {figures}  {} left", metrics.step, duration(eta)));
                }
            }
            Event::Saved { path } => {
                if !self.screen.has_bars() {
                    note(&format!("saved {}", path.display()));
                }
            }
        }
    }

    /// Says once of every kind of failure that it happens; the metrics count on.
    fn tell(&mut self, failures: &BTreeMap<String, u64>) {
        for (kind, count) in failures {
            if self.told.insert(kind.clone()) {
                self.screen.line(&unjudged(kind, *count));
            }
        }
    }

    fn clear(&mut self) {
        for bar in [self.eval.take(), self.run.take()].into_iter().flatten() {
            bar.finish_and_clear();
        }
    }
}

/// The news that responses could not be judged.
pub(super) fn unjudged(kind: &str, count: u64) -> String {
    format!("warning: {count} responses could not be judged ({kind}); they count as wrong")
}

/// What is kept of the forward passes, in a sentence.
fn activations(kept: &Kept) -> String {
    let Kept { layers, attention, mlp, .. } = kept;
    match kept.share() {
        Share::All => "activations: all are kept for the backward pass".into(),
        Share::None => "activations: the backward pass computes all again; with more memory, or a higher \
             train.gradient_accumulation, they are kept"
            .into(),
        Share::Some if mlp == layers => {
            "activations: all layers keep theirs for the backward pass, which computes the LM head's logits again".into()
        }
        Share::Some => format!(
            "activations: {attention} of {layers} layers keep their attention's and {mlp} their MLP's for the backward \
             pass; there is no memory for more"
        ),
    }
}

/// A step's figures in one line, those that its objective has.
fn figures(m: &StepMetrics, config: &TrainConfig) -> String {
    let mut all = Vec::new();
    if config.objective.kind.needs_samples() {
        all.push(format!("reward {:.3}  pass@1 {:.3}", m.reward_mean, m.pass_at_1));
        if let Some(n) = config.objective.n.filter(|&n| n > 1) {
            all.push(format!("pass@{n} {:.3}", m.pass_at_n));
        }
    }
    all.push(format!("loss {:+.4}  grad {:.3}", m.loss, m.grad_norm));
    if let Some(kl) = m.kl {
        all.push(format!("kl {kl:.4}"));
    }
    if config.objective.kind.needs_samples() {
        all.push(format!("{:.0} tokens/s", m.tokens_per_second));
    }
    // Exactly 0 is no coincidence: every group was all right or all wrong.
    if m.grad_norm == 0.0 {
        all.push("(nothing to learn: no group has both right and wrong responses)".to_owned());
    }
    all.join("  ")
}
