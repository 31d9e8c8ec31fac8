//! Training from end to end on a tiny model with random weights: it learns, and it resumes to the same bits.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, DType, Truncation};
use bon_engine::checkpoint::Dtype;
use bon_engine::gemma::config::{CONFIG_FILE, ConfigFile};
use bon_engine::gemma::{Gemma, Params, params};
use bon_engine::generate::Sampling;
use bon_engine::model_dir::{self, ModelDir, Precision};
use bon_engine::objective::{ScoredGroup, coefficients};
use bon_engine::rollout::{PromptFormat, ResponseEnd, Rollout, Wrapping};
use bon_engine::tasks::{Order, Task, Tasks};
use bon_engine::tokenizer::TOKENIZER_FILE;
use bon_engine::train::config::{LengthNormalizer, OptimizerSection, TrainConfig};
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::metrics::StepMetrics;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::Forward;
use bon_engine::train::run::{Event, run};
use bon_engine::train::setup::judges;
use bon_engine::train::snapshot::{Arrays, newest_valid};
use serde_json::Value;
use tempfile::TempDir;

use crate::ops::{randoms, wide};
use crate::tiny::{self, Groups};
use crate::tokenizer::{tokenizer_json, vocabulary};

/// A directory with a model (the shape of the golden `gemma3`, three layers of it) and tasks.
pub(crate) struct Workplace(TempDir);

impl Workplace {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// The same in widths that the kernels take.
    pub(crate) fn for_kernels() -> Self {
        Self::with(|json| {
            json["head_dim"] = 64.into();
            json["hidden_size"] = 72.into();
            json["intermediate_size"] = 136.into();
        })
    }

    /// `change` has the last word on config.json.
    fn with(change: impl FnOnce(&mut Value)) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let source = place.path("source");
        fs::create_dir(&source).unwrap();
        let text = fs::read_to_string(tiny::dir("gemma3").join(CONFIG_FILE)).unwrap();
        let mut json: Value = serde_json::from_str(&text).unwrap();
        json["vocab_size"] = vocabulary().len().into();
        json["num_hidden_layers"] = 3.into();
        json["layer_types"] = serde_json::json!(["sliding_attention", "full_attention", "sliding_attention"]);
        change(&mut json);
        fs::write(source.join(CONFIG_FILE), json.to_string()).unwrap();
        fs::write(source.join(TOKENIZER_FILE), tokenizer_json().to_string()).unwrap();
        let config = ConfigFile::open(&source).unwrap();
        let mut seed = 0;
        let params = params::plan(&config.gemma).map(|spec| {
            seed += 1;
            // Linear maps keep the size of what they map; norms and embedding are small.
            let size = if spec.name.contains("proj") { (3.0 / spec.cols as f32).sqrt() } else { 0.1 };
            let data = randoms(seed, spec.rows * spec.cols).iter().map(|x| size * x).collect();
            Tensor::f32(spec.rows, spec.cols, data)
        });
        model_dir::save(&Cpu::F32, &config, &params, &source, &place.path("model")).unwrap();
        let tasks: String = ["first", "second", "third", "fourth"]
            .map(|prompt| {
                format!("{{\"prompt\": \"{prompt}\", \"answer\": \"e\", \"response\": \"zeal\"}}\n")
            })
            .concat();
        fs::write(place.path("tasks.jsonl"), tasks).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A run that rewards responses whose first letter is an e.
    pub(crate) fn config(&self, output: &str, overrides: &[&str]) -> TrainConfig {
        let text = format!(
            r#"
            model.path = "{model}"
            data.tasks = "{tasks}"
            data.prefix = "a shared beginning, "
            generate = {{ samples = 8, prompts_per_step = 2, max_new_tokens = 5 }}
            objective = {{ kind = "bon-rl-v", n = 2 }}
            verifier = {{ kind = "regex", pattern = "[a-z]", pick = "first" }}
            optimizer = {{ lr = 3e-3 }}
            train = {{ steps = 6, seed = 3, output = "{output}" }}
            "#,
            model = self.path("model").display(),
            tasks = self.path("tasks.jsonl").display(),
            output = self.path(output).display(),
        );
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        TrainConfig::parse("run.toml", &text, &overrides).unwrap()
    }
}

/// Runs to the end, or until `last` steps are done.
fn train(config: &TrainConfig, resume: bool, last: u64) -> Vec<StepMetrics> {
    train_on(Cpu::F32, config, resume, last)
}

/// [`train`] on any backend.
pub(crate) fn train_on<B: Backend + Clone + 'static>(
    backend: B,
    config: &TrainConfig,
    resume: bool,
    last: u64,
) -> Vec<StepMetrics> {
    let (stop, mut steps) = (Interrupt::default(), Vec::new());
    let outcome = run(backend, config, resume, &stop, |event| {
        if let Event::Step { metrics, .. } = event {
            steps.push(metrics.clone());
            if metrics.step == last {
                stop.request();
            }
        }
    })
    .unwrap_or_else(|e| panic!("{:#}", anyhow::Error::from(e)));
    assert_eq!(outcome.step, last.min(config.train.steps));
    steps
}

/// The bytes of the newest checkpoint: weights, optimizer.
pub(crate) fn checkpoint(config: &TrainConfig) -> (Vec<u8>, Vec<u8>) {
    let snapshot = newest_valid(&config.train.output.join("checkpoints")).unwrap().snapshot.unwrap();
    let weights = fs::read(snapshot.model_dir().join("model.safetensors")).unwrap();
    (weights, fs::read(snapshot.optimizer_path()).unwrap())
}

/// metrics.jsonl without what a clock says.
pub(crate) fn metrics(output: &Path) -> Vec<Value> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut json: Value = serde_json::from_str(line).unwrap();
        for timing in ["seconds", "tokens_per_second"] {
            json.as_object_mut().unwrap().remove(timing).unwrap();
        }
        json
    };
    text.lines().map(line).collect()
}

#[test]
fn bon_rl_learns() {
    learns(&[]);
}

/// As well with 6 bytes a parameter: 2 of it, 2 of its gradient, 2 of its moments.
#[test]
fn bon_rl_learns_without_masters_and_with_gradients_of_16_and_moments_of_8_bits() {
    let steps = learns(&[
        "model.dtype=bf16",
        "optimizer.gradients=bf16",
        "optimizer.moments=8bit",
        "optimizer.embedding_moments=8bit",
        "optimizer.masters=false",
    ]);
    assert!(steps.iter().all(|m| m.grad_norm.is_finite()));
}

fn learns(state: &[&str]) -> Vec<StepMetrics> {
    let place = Workplace::new();
    let settings = ["train.steps=40", "generate.samples=16", "generate.prompts_per_step=4"];
    let config = place.config("run", &[&settings, state].concat());
    let steps = train(&config, false, 40);
    let (first, last) = (&steps[..5], &steps[35..]);
    let mean = |steps: &[StepMetrics], f: fn(&StepMetrics) -> f64| steps.iter().map(f).sum::<f64>() / 5.0;
    let reward = [first, last].map(|s| mean(s, |m| m.reward_mean));
    let best = [first, last].map(|s| mean(s, |m| m.best_of_n_reward));
    assert!(reward[0] < 0.1 && reward[1] > 0.7, "mean reward {reward:?}");
    assert!(best[0] < 0.1 && best[1] > 0.9, "Best-of-2 reward {best:?}");
    // What the sampler and the trainer compute are the same bits.
    assert!(steps.iter().all(|m| m.logprob_gap_max == 0.0));
    steps
}

/// With a learning rate that moves no weight, a run of a bf16 model ends with the masters that it began with: those of its
/// checkpoint, in f32 or in bf16.
#[test]
fn masters_start_from_what_the_checkpoint_holds() {
    let place = Workplace::new();
    let start = |dir: &Path| ModelDir::open(Cpu::F32, dir, Precision::default()).unwrap().model;
    let check = |output: &str, dir: &Path| {
        let path = format!("model.path={}", dir.display());
        let settings = ["model.dtype=bf16", "train.steps=1", "optimizer.lr=1e-30", &path];
        let config = place.config(output, &settings);
        train(&config, false, 1);
        let snapshot = newest_valid(&config.train.output.join("checkpoints")).unwrap().snapshot.unwrap();
        let saved = Arrays::open(&snapshot.optimizer_path()).unwrap();
        let model = start(dir);
        for (spec, tensor) in params::plan(&model.config).tensors().iter().zip(model.params.tensors()) {
            let masters =
                saved.bytes(&format!("master.{}", spec.name), Dtype::F32, spec.rows, spec.cols).unwrap();
            let want: Vec<u8> = Cpu::F32.to_f32(tensor).iter().flat_map(|x| x.to_le_bytes()).collect();
            assert!(masters == want, "{output}: {}", spec.name);
        }
        snapshot.model_dir()
    };
    let rounded = check("from-f32", &place.path("model"));
    let embedding = |dir: &Path| Cpu::F32.to_f32(&start(dir).params.embed);
    assert_ne!(embedding(&rounded), embedding(&place.path("model")), "rounding has lost nothing");
    check("from-bf16", &rounded);
}

#[test]
fn a_resumed_run_is_the_uninterrupted_run() {
    let place = Workplace::new();
    for (dtype, state) in [
        ("f32", &[][..]),
        ("bf16", &[]),
        // An optimizer that rounds, at random.
        (
            "bf16",
            &[
                "optimizer.moments=8bit",
                "optimizer.embedding_moments=8bit",
                "optimizer.masters=false",
                "optimizer.gradients=bf16",
            ],
        ),
    ] {
        let dtype_is = format!("model.dtype={dtype}");
        let dtype = if state.is_empty() { dtype } else { "small" };
        let settings = [
            &*dtype_is,
            "train.kl_coefficient=0.05",
            "train.updates_per_batch=2",
            "train.gradient_accumulation=2",
            "train.save_every=2",
            "optimizer.schedule=cosine",
            "optimizer.warmup_steps=2",
            "generate.temperature=0.8",
        ];
        let settings = [&settings, state].concat();
        let whole = place.config(&format!("{dtype}-whole"), &settings);
        train(&whole, false, 6);
        // Stopped between two checkpoints, which saves; and killed there, which does not.
        for (name, killed) in [("stopped", false), ("killed", true)] {
            let parts = place.config(&format!("{dtype}-{name}"), &settings);
            assert_eq!(train(&parts, false, 3).len(), 3);
            if killed {
                fs::remove_dir_all(parts.train.output.join("checkpoints/step-000003")).unwrap();
            }
            assert_eq!(train(&parts, true, 6)[0].step, if killed { 3 } else { 4 });
            assert!(checkpoint(&parts) == checkpoint(&whole), "{dtype}, {name}: other weights or moments");
            assert_eq!(metrics(&parts.train.output), metrics(&whole.train.output), "{dtype}, {name}");
        }
        let steps = metrics(&whole.train.output);
        assert_eq!(steps.len(), 6);
        // The first step starts at the reference, the later ones have left it.
        assert!(steps[0]["kl"] == 0.0 && steps[5]["kl"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn evaluation_tasks_may_come_late() {
    let place = Workplace::new();
    let tasks = format!("data.eval_tasks={}", place.path("tasks.jsonl").display());
    let reports = |config: &TrainConfig| {
        let files = fs::read_dir(config.train.output.join("eval")).unwrap();
        let mut names: Vec<_> = files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    };
    let settings = [&*tasks, "train.eval_samples=4", "train.eval_every=4"];
    let from_the_start = place.config("start", &settings);
    train(&from_the_start, false, 3);
    train(&from_the_start, true, 6);
    // Stopped, so the last evaluation is left to a resumed run.
    assert_eq!(reports(&from_the_start), ["step-000000.json", "step-000004.json"]);
    // What is evaluated after three steps is not the start, and is not called so.
    train(&place.config("late", &[]), false, 3);
    let late = place.config("late", &settings);
    train(&late, true, 6);
    assert_eq!(reports(&late), ["step-000004.json"]);
}

/// A loss of one token as a function of its log-prob, as the papers write it: PPO's clipped surrogate (Schulman et al.
/// 2017, eq. 7) of c, and the k3 estimate of the KL from the reference.
fn token_loss(logprob: f64, old: f64, reference: f64, c: f64, clip: f64, kl: f64) -> f64 {
    let ratio = (logprob - old).exp();
    let d = reference - logprob;
    kl * (d.exp() - d - 1.0) - (ratio * c).min(ratio.clamp(1.0 - clip, 1.0 + clip) * c)
}

/// One step of the trainer, written down once more from its definition.
#[test]
fn a_step_descends_the_loss_that_the_configuration_names() {
    let place = Workplace::new();
    for normalizer in ["per-token", "per-sequence", "constant"] {
        let settings = [
            &*format!("train.length_normalizer={normalizer}"),
            "generate={ samples = 48, prompts_per_step = 4, temperature = 0.8 }",
            "train={ steps = 1, updates_per_batch = 4, gradient_accumulation = 2, kl_coefficient = 0.3 }",
            "train.clip_epsilon=0.02",
        ];
        let config = place.config(normalizer, &settings);
        let trained = train(&config, false, 1).remove(0);

        let open = || ModelDir::open(Cpu::F32, &config.model.path, Precision::default()).unwrap();
        let (mut dir, reference) = (open(), open().model);
        let tasks = Tasks::read(&config.data.tasks).unwrap();
        let mut order = Order::new(tasks.list.len(), config.train.seed);
        let picked: Vec<&Task> = (0..4).map(|at| &tasks.list[order.task(at)]).collect();
        let sampling = Sampling {
            temperature: 0.8,
            truncation: Truncation::default(),
            max_new_tokens: 5,
            seed: config.train.seed,
            step: 1,
        };
        let stop = ResponseEnd::new(&dir.model.config, &dir.tokenizer, &[]);
        let rollout = Rollout {
            model: &dir.model,
            tokenizer: &dir.tokenizer,
            format: PromptFormat { prefix: &config.data.prefix, suffix: "", wrapping: Wrapping::None },
            stop: &stop,
        };
        let mut judges = judges(&config, &Cpu::F32).unwrap().unwrap();
        let (groups, _) = rollout.run(&picked, 48, &sampling, &mut judges, || {}).unwrap();
        let c: Vec<Vec<f64>> = groups
            .iter()
            .map(|g| {
                let (scores, rewards) = (g.scores.clone(), g.rewards.clone());
                coefficients(&config.objective, &ScoredGroup { scores, rewards, expert_score: None })
                    .unwrap()
                    .samples
            })
            .collect();
        assert!(c.iter().filter(|c| c.iter().any(|&c| c != 0.0)).count() >= 2, "several groups must count");
        let responses = || groups.iter().zip(&c).flat_map(|(g, c)| g.responses.iter().zip(c));
        let mean_length = responses().map(|(r, _)| r.tokens.len()).sum::<usize>() as f64 / (4.0 * 48.0);
        let batch = Groups(
            groups
                .iter()
                .map(|g| (g.prompt.clone(), g.responses.iter().map(|r| r.tokens.clone()).collect()))
                .collect(),
        );
        let logprobs = |model: &Gemma<Cpu>| batch.with(|groups| Forward::new(model, groups, 0.8));

        let (start, reference) = (dir.model.params.clone(), logprobs(&reference).logprobs);
        let mut optimizer = Optimizer::new(&dir.model, &OptimizerSection::default(), 0);
        let (mut norm, mut clipped) = (0.0, 0);
        for update in 1..=4 {
            let forward = logprobs(&dir.model);
            let mut weights = Vec::new();
            for (response, &c) in responses() {
                let length = match config.train.length_normalizer {
                    LengthNormalizer::PerToken => mean_length,
                    LengthNormalizer::PerSequence => response.tokens.len() as f64,
                    LengthNormalizer::Constant => 5.0,
                };
                for &old in &response.logprobs {
                    let at = weights.len();
                    let (logprob, old) = (f64::from(forward.logprobs[at]), f64::from(old));
                    let loss = |x: f64| token_loss(x, old, f64::from(reference[at]), c, 0.02, 0.3 / 48.0);
                    // So short a step that hardly a token straddles the clip.
                    let slope = (loss(logprob + 1e-6) - loss(logprob - 1e-6)) / 2e-6;
                    clipped += usize::from(c != 0.0 && ((logprob - old).exp() - 1.0).abs() > 0.02);
                    weights.push((-slope / (4.0 * length)) as f32);
                }
            }
            forward.backward(&dir.model, &weights, &mut optimizer.grads);
            norm = optimizer.step(&mut dir.model, &config.optimizer, config.optimizer.lr, update).unwrap();
        }
        assert!(clipped > 20, "the clip must matter: {clipped}");

        let off = (norm / trained.grad_norm - 1.0).abs();
        assert!(off < 1e-5, "{normalizer}: gradient norm {}, want {norm}", trained.grad_norm);
        let snapshot = newest_valid(&config.train.output.join("checkpoints")).unwrap().snapshot.unwrap();
        let found =
            ModelDir::open(Cpu::F32, &snapshot.model_dir(), Precision::default()).unwrap().model.params;
        let distance = |a: &Params<Tensor>, b: &Params<Tensor>| {
            let squares =
                a.tensors().into_iter().zip(b.tensors()).flat_map(|(a, b)| wide(a).into_iter().zip(wide(b)));
            squares.map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
        };
        let (off, way) = (distance(&found, &dir.model.params), distance(&start, &dir.model.params));
        assert!(off < 1e-5 * way, "{normalizer}: {off:e} off after a way of {way:e}");
    }
}

#[test]
fn accumulation_does_not_change_the_gradient() {
    let place = Workplace::new();
    let step = |parts: usize| {
        let accumulation = format!("train.gradient_accumulation={parts}");
        let settings = ["train.steps=1", "generate={ samples = 48, prompts_per_step = 4 }"];
        let config = place.config(&format!("in-{parts}"), &[&settings[..], &[&*accumulation]].concat());
        train(&config, false, 1).remove(0)
    };
    let one = step(1);
    assert!(one.loss != 0.0 && one.grad_norm > 0.0);
    for parts in [2, 4] {
        let step = step(parts);
        // The same samples, and log-probs of the same bits; the gradient's sums in another order, once per layer.
        assert!((step.loss / one.loss - 1.0).abs() < 1e-12, "{} {}", step.loss, one.loss);
        assert!((step.grad_norm / one.grad_norm - 1.0).abs() < 1e-6, "{} {}", step.grad_norm, one.grad_norm);
    }
}

/// Prompts have their numbers in RNG keys by place: equal tasks of one batch draw differently.
#[test]
fn equal_tasks_are_sampled_independently() {
    let place = Workplace::new();
    let config = place.config("unused", &[]);
    let dir = ModelDir::open(Cpu::F32, &config.model.path, Precision::default()).unwrap();
    let (tasks, stop) =
        (Tasks::read(&config.data.tasks).unwrap(), ResponseEnd::new(&dir.model.config, &dir.tokenizer, &[]));
    let format = PromptFormat { prefix: "", suffix: "", wrapping: Wrapping::None };
    let rollout = Rollout { model: &dir.model, tokenizer: &dir.tokenizer, format, stop: &stop };
    let truncation = Truncation::default();
    let sampling = Sampling { temperature: 1.0, truncation, max_new_tokens: 5, seed: 1, step: 0 };
    let mut judges = judges(&config, &Cpu::F32).unwrap().unwrap();
    let (groups, _) = rollout.run(&[&tasks.list[0]; 5], 3, &sampling, &mut judges, || {}).unwrap();
    let distinct: BTreeSet<&Vec<u32>> = groups.iter().flat_map(|g| &g.responses).map(|r| &r.tokens).collect();
    assert_eq!(distinct.len(), 15);
    for group in &groups {
        for (i, response) in group.responses.iter().enumerate() {
            let text = stop.text(&response.tokens);
            let first = text.chars().find(char::is_ascii_lowercase);
            assert_eq!(group.answers[i], first.map(String::from));
            assert_eq!((group.scores[i], group.rewards[i]), (f64::from(first == Some('e')), group.scores[i]));
            assert_eq!(group.texts[i], text);
        }
    }
}

#[test]
fn sft_learns_the_expert_response() {
    let place = Workplace::new();
    let steps = train(&place.config("run", &["objective.kind=sft", "train.steps=40"]), false, 40);
    assert!(steps[39].loss < 0.05 * steps[0].loss, "{} {}", steps[0].loss, steps[39].loss);
    assert!(steps.iter().all(|m| m.tokens == 0 && m.kl.is_none()));
}

#[test]
fn every_objective_trains() {
    let place = Workplace::new();
    let start = fs::read(place.path("model").join("model.safetensors")).unwrap();
    let environment =
        ["objective.selector=verifier", "objective.reward=environment", "environment.kind=regex"];
    let environment = [&environment[..], &["environment.pattern=e"]].concat();
    for (kind, settings) in [
        ("bon-sft", &[][..]),
        ("rl", &[]),
        ("bon-rl", &environment),
        ("bon-rl-s", &["objective.estimator=variational"]),
        ("bon-rlb", &["train.updates_per_batch=2", "train.length_normalizer=per-sequence"]),
        ("bon-rlb-p", &["train.kl_coefficient=0.1"]),
        ("pass-at-n", &["data.template=turn", "generate.stop=['zz']"]),
    ] {
        let kind_is = format!("objective.kind={kind}");
        let common = [&*kind_is, "objective.n=4", "generate.samples=32"];
        let config = place.config(kind, &[&common[..], settings].concat());
        let steps = train(&config, false, 6);
        assert_eq!(steps.len(), 6, "{kind}");
        let finite = |m: &StepMetrics| [m.loss, m.grad_norm, m.reward_mean].iter().all(|x| x.is_finite());
        assert!(steps.iter().all(finite) && steps.iter().any(|m| m.grad_norm > 0.0), "{kind}: {steps:?}");
        assert!(steps.iter().all(|m| m.logprob_gap_max == 0.0 && m.tokens > 0), "{kind}");
        assert!(checkpoint(&config).0 != start, "{kind}: no weight has changed");
    }
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut model = tiny::model("gemma1", DType::F32);
        let before = model.params.embed.clone();
        let mut optimizer = Optimizer::new(&model, &OptimizerSection::default(), 0);
        optimizer.grads.final_norm.as_f32_mut()[1] = value;
        optimizer.grads.embed.as_f32_mut()[0] = 1.0;
        let refused = optimizer.step(&mut model, &OptimizerSection::default(), 1e-3, 1).unwrap_err();
        assert_eq!(refused.tensor, "model.norm.weight", "{value}");
        assert!(model.params.embed == before, "{value}");
    }
}
