//! `bon-engine train`.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::PathBuf;

use indicatif::ProgressBar;

use super::engine::{DeviceArg, DeviceChoice, with_backend};
use super::plan::of_run;
use super::progress::{Screen, duration, note, unjudged};
use super::report::write_run;
use super::{quoted, rounded};
use crate::backend::Backend;
use crate::gemma::activations::{Kept, Share};
use crate::plan::Purpose;
use crate::train::config::TrainConfig;
use crate::train::interrupt::Interrupt;
use crate::train::metrics::{PhaseSeconds, StepMetrics, VerifierMetrics};
use crate::train::run::{Event, run as train};

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
eval.jsonl and eval/ (the evaluations), report.html (a page with plots of all that, at the end), unjudged.jsonl (responses that no verifier could judge, and why), tensorboard/, and checkpoints/step-NNNNNN/model: a model directory for \
`sample`, `eval` and Transformers.

Ctrl-C, SIGTERM or SIGHUP (a closed terminal): the step ends, a checkpoint is saved, the command to go on is printed, and the exit code is 0. A \
second one ends the run at once. After that, a kill or a power cut, --resume loses no more than the steps since the \
newest checkpoint (train.save_minutes, train.save_every), and the result is to the bit that of an uninterrupted run.")]
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
    /// train.recompute, train.save_every, train.save_minutes, train.keep_checkpoints, a verifier's workers and timeout, the
    /// evaluation's settings, train.max_minutes (which counts anew) and, with a constant learning rate, train.steps. The device
    /// must be of the kind that the run was begun on: another rounds otherwise.
    #[arg(long)]
    resume: bool,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = TrainConfig::load(&args.config, &args.set)?;
    let engine = args.device.choice.open()?;
    let plan = of_run(&config, &engine, Purpose::Train)?;
    with_backend!(engine, |backend| run_on(backend, &args, &config, plan))
}

fn run_on<B: Backend + Clone + 'static>(
    backend: B,
    args: &Args,
    config: &TrainConfig,
    plan: Option<String>,
) -> anyhow::Result<()> {
    let device = backend.device_name();
    let stop = Interrupt::on_signals()?;
    let mut progress = Progress::new(config, device, plan);
    let outcome = train(backend, config, args.resume, &stop, |event| progress.show(event));
    progress.clear();
    let outcome = outcome?;
    let mut out = std::io::stdout().lock();
    if let (Some(comparison), Some(tasks)) = (&outcome.comparison, &config.data.eval_tasks) {
        writeln!(out, "before and after {} steps, on {}:", outcome.step, tasks.display())?;
        writeln!(out, "{}", comparison.to_table())?;
    }
    // The run is over and saved: that its page cannot be written is news, and no failure. That it was is none, because
    // scripts read the last line of either output.
    let page = write_run(&config.train.output);
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
    match (&config.lora, config.objective.kind.trains_verifier()) {
        (None, false) => writeln!(out, "the model: {}", model.display())?,
        (None, true) => writeln!(
            out,
            "the reward model, for [verifier] kind = \"model\" with this path: {}",
            model.display()
        )?,
        (Some(_), false) => {
            writeln!(out, "the adapter of {}: {}", config.model.path.display(), model.display())?;
        }
        (Some(_), true) => writeln!(
            out,
            "the reward model's adapter of {}, for `bon-engine merge`: {}",
            config.model.path.display(),
            model.display()
        )?,
    }
    if let Err(e) = page {
        note(&format!("warning: the run's page could not be written: {e:#}"));
    }
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

/// One bar for the run on a terminal, a line per step elsewhere.
struct Progress<'a> {
    config: &'a TrainConfig,
    /// What computes.
    device: String,
    /// Of memory, until it has been told.
    plan: Option<String>,
    screen: Screen,
    run: Option<ProgressBar>,
    eval: Option<ProgressBar>,
    /// Kinds of verifier failures that have been told, and whether it has been that verifiers are slow.
    told: BTreeSet<String>,
}

impl<'a> Progress<'a> {
    fn new(config: &'a TrainConfig, device: String, plan: Option<String>) -> Self {
        let screen = Screen::default();
        Self { config, device, plan, screen, run: None, eval: None, told: BTreeSet::new() }
    }

    fn show(&mut self, event: Event) {
        let begins =
            matches!(event, Event::EvalStarted { .. } | Event::Activations { .. } | Event::Step { .. });
        if begins && let Some(plan) = self.plan.take() {
            self.screen.line(&plan);
        }
        match event {
            Event::Rounded { path } => note(&rounded(path, &self.device)),
            Event::Chosen { tasks, of, range: [low, high] } => {
                note(&format!("{tasks} of {of} tasks have a pass rate from {low} to {high}"));
            }
            Event::Warning { text } => note(&format!("warning: {text}")),
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
            Event::Unjudged { responses, path } => {
                let place = format!("all of them are in {}", path.display());
                for news in unjudged(responses, &place, &mut self.told) {
                    self.screen.line(&news);
                }
            }
            Event::VerifierNote { note } => self.screen.line(&format!("note: {note}")),
            Event::Replaced { path } => note(&format!(
                "note: a run in {} ended before its first checkpoint; this one takes its place",
                path.display()
            )),
            Event::Eval { report, .. } => {
                if let Some(bar) = self.eval.take() {
                    bar.finish_and_clear();
                }
                self.screen.line(&report.to_table());
            }
            Event::NoComparison => self.screen.line(
                "there is no evaluation before training on these tasks, judged as now and with so many samples: no comparison at the end",
            ),
            Event::Activations { kept } => self.screen.line(&activations(kept)),
            Event::Step { metrics, eta } => {
                let PhaseSeconds { generate, verify, .. } = metrics.seconds;
                if verify > generate.max(1.0) && self.told.insert("slow".to_owned()) {
                    self.screen.line(&format!(
                        "note: step {} waited {verify:.1} s for verdicts, longer than it sampled ({generate:.1} s); \
                         raise the `workers` of the verifier, or make its program faster",
                        metrics.step
                    ));
                }
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

    fn clear(&mut self) {
        for bar in [self.eval.take(), self.run.take()].into_iter().flatten() {
            bar.finish_and_clear();
        }
    }
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
    if config.objective.kind.objective().needs_samples {
        all.push(format!("reward {:.3}  pass@1 {:.3}", m.reward_mean, m.pass_at_1));
        if let Some(n) = config.objective.n.filter(|&n| n > 1) {
            all.push(format!("pass@{n} {:.3}", m.pass_at_n));
        }
    }
    all.push(format!("loss {:+.4}  grad {:.3}", m.loss, m.grad_norm));
    if let Some(VerifierMetrics { accuracy, auc, pair_accuracy, .. }) = m.verifier {
        let shown = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.3}"));
        all.push(format!("accuracy {accuracy:.3}  AUC {}  in groups {}", shown(auc), shown(pair_accuracy)));
    }
    if let Some(kl) = m.kl {
        all.push(format!("kl {kl:.4}"));
    }
    if config.objective.kind.objective().needs_samples {
        all.push(format!("{:.0} tokens/s", m.tokens_per_second));
    }
    // Exactly 0 is no coincidence: nothing was worth more than what it was compared with.
    if m.grad_norm == 0.0 && m.verifier.is_some() {
        all.push("(nothing to learn: in no group do labels differ)".to_owned());
    } else if m.grad_norm == 0.0 {
        all.push("(nothing to learn: in no group do responses earn different rewards)".to_owned());
    }
    all.join("  ")
}
