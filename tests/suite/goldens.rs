//! The engine against Transformers, on the tiny models of tests/goldens: tools/reference/README.md says what the files
//! hold.

use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Batch, DType, HeadSpec, Target};
use bon_engine::gemma::{Frozen, Gemma, params};
use bon_engine::segments::Segments;
use bon_engine::train::config::OptimizerSection;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::{Continued, Forward};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::kernels::devices;
use crate::ops::{bits, random_bf16};
use crate::tiny::{self, NAMES};
use crate::tolerance::{BF16_ROUNDOFF, EPS, Rule, assert_within, f32_error, relative_error, rms};

/// What Transformers computed.
pub(crate) struct Golden {
    tensors: Vec<u8>,
    json: Value,
    sequences: Vec<Vec<u32>>,
}

impl Golden {
    pub(crate) fn open(name: &str) -> Self {
        let read = |file: &str| std::fs::read(tiny::dir(name).join(file)).unwrap();
        let json: Value = serde_json::from_slice(&read("golden.json")).unwrap();
        let mut golden = Self { tensors: read("golden.safetensors"), json, sequences: vec![] };
        let count = golden.json["lengths"].as_array().unwrap().len();
        golden.sequences = (0..count)
            .map(|i| bytemuck::pod_collect_to_vec(&golden.bytes(&format!("input_ids.{i}"))))
            .collect();
        golden
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.tensors).unwrap().tensor(name).unwrap().data().to_vec()
    }

    pub(crate) fn floats(&self, name: &str) -> Vec<f64> {
        let floats: Vec<f32> = bytemuck::pod_collect_to_vec(&self.bytes(name));
        floats.into_iter().map(f64::from).collect()
    }

    /// `name.0`, `name.1`... laid end to end.
    pub(crate) fn all(&self, name: &str) -> Vec<f64> {
        (0..self.sequences.len()).flat_map(|i| self.floats(&format!("{name}.{i}"))).collect()
    }

    /// The settings of the updates.
    pub(crate) fn adamw(&self) -> OptimizerSection {
        let of = |key: &str| self.number(&format!("/adamw/{key}"));
        OptimizerSection {
            lr: of("lr"),
            beta1: of("betas/0"),
            beta2: of("betas/1"),
            eps: of("eps"),
            weight_decay: of("weight_decay"),
            clip_norm: of("max_grad_norm"),
            ..OptimizerSection::default()
        }
    }

    pub(crate) fn number(&self, path: &str) -> f64 {
        self.json.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("{path} in golden.json"))
    }

    /// Error of plain bf16 in the logits, relative to their size: how this model amplifies rounding.
    fn bf16_relative_error(&self) -> f64 {
        let bf16: Vec<f32> = self.all("logits_bf16").into_iter().map(|x| x as f32).collect();
        relative_error(&bf16, &self.all("logits"))
    }

    /// Allowed error of a gradient in f32, relative to its norm: it goes through the model twice, there and back.
    pub(crate) fn gradient_error(&self) -> f64 {
        2.0 * f32_error(self.bf16_relative_error())
    }

    /// Allowed error of a log-prob in f32 at temperature 1.
    pub(crate) fn logprob_error(&self) -> f64 {
        f32_error(self.number("/bf16_logprob_error/max"))
    }

    /// Runs `f` on all sequences as one batch; their first token is the prompt.
    pub(crate) fn with_batch<R>(&self, f: impl FnOnce(&[Continued]) -> R) -> R {
        let responses: Vec<[&[u32]; 1]> = self.sequences.iter().map(|s| [&s[1..]]).collect();
        let groups = self.sequences.iter().zip(&responses);
        let groups: Vec<_> = groups.map(|(s, r)| Continued { prompt: &s[..1], responses: r }).collect();
        f(&groups)
    }

    /// Number of predicted tokens.
    pub(crate) fn predicted(&self) -> usize {
        self.sequences.iter().map(|s| s.len() - 1).sum()
    }
}

pub(crate) fn mean_loss(logprobs: &[f32]) -> f64 {
    -logprobs.iter().map(|&l| f64::from(l)).sum::<f64>() / logprobs.len() as f64
}

/// Final-norm hidden states of one sequence.
fn hidden<B: Backend>(model: &Gemma<B>, ids: &[u32]) -> B::Tensor {
    let segments = Segments::separate(&[ids.len()]);
    let runs = segments.all_queries();
    model.forward(&Batch::new(ids, &segments, &runs)).0
}

/// The log-probs of the whole vocabulary for each of these rows, and their log-sum-exp: the logits are the sum of both.
fn vocabulary<B: Backend>(model: &Gemma<B>, hidden: &B::Tensor) -> (Vec<f32>, Vec<f32>) {
    let (b, vocab) = (&model.backend, model.config.vocab_size);
    let targets: Vec<Target> = (0..b.shape(hidden).0 * vocab)
        .map(|at| Target { row: (at / vocab) as u32, token: (at % vocab) as u32 })
        .collect();
    let head = HeadSpec { softcap: model.config.final_softcap, temperature: 1.0 };
    let (logprobs, trace) = b.lm_head_logprob_forward(hidden, model.params.lm_head(), &head, &targets, false);
    (logprobs, b.to_f32(&trace.lse))
}

#[test]
fn logits_and_log_probs() {
    for name in NAMES {
        let (golden, model) = (Golden::open(name), tiny::model(name, DType::F32));
        let vocab = model.config.vocab_size;
        let largest_error = |a: &str, b: &str| {
            let (a, b) = (golden.all(a), golden.all(b));
            a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        let bound = f32_error(largest_error("logits_bf16", "logits"));
        for (i, ids) in golden.sequences.iter().enumerate() {
            let (logprobs, lse) = vocabulary(&model, &hidden(&model, ids));
            let logits: Vec<f32> =
                logprobs.iter().enumerate().map(|(i, logprob)| logprob + lse[i / vocab]).collect();
            let rounding = |i: usize| EPS * f64::from(lse[i / vocab].abs() + logprobs[i].abs());
            let want = golden.floats(&format!("logits.{i}"));
            assert_within(&format!("{name}: logits.{i}"), &logits, &want, |i| bound + rounding(i));
        }

        let bound = f32_error(largest_error("logprobs_bf16", "logprobs"));
        for (key, temperature) in [("logprobs", 1.0), ("logprobs_t07", golden.number("/temperature"))] {
            let got = golden.with_batch(|groups| Forward::new(&model, groups, temperature as f32).logprobs);
            let want = golden.all(key);
            // A log-prob is a difference of two numbers of about its own size.
            let bound = |i: usize| bound / temperature + 2.0 * EPS * want[i].abs();
            assert_within(&format!("{name}: {key}"), &got, &want, bound);
        }
    }
}

/// The residual stream after each layer, through the final norm: tells which layer is wrong.
#[test]
fn every_layer() {
    for name in NAMES {
        let (golden, mut model) = (Golden::open(name), tiny::model(name, DType::F32));
        let allowed = f32_error(golden.bf16_relative_error());
        check_every_layer(name, &golden, &mut model, allowed);
    }
}

/// Leaves no layers.
fn check_every_layer<B: Backend>(name: &str, golden: &Golden, model: &mut Gemma<B>, allowed: f64) {
    let norm = model.backend.to_f32(&model.params.final_norm);
    let (d, spec) = (model.config.hidden_size, model.config.norm);
    let check = |what: &str, model: &Gemma<B>, want: &[f64]| {
        let got = model.backend.to_f32(&hidden(model, &golden.sequences[0]));
        let (off, on) = (relative_error(&got, want), model.backend.device_name());
        assert!(off <= allowed, "{name}: {what} on {on} is off by {off:e} of its norm, allowed {allowed:e}");
    };
    check("hidden.norm", model, &golden.floats("hidden.norm"));
    for layers in (0..model.config.layers.len()).rev() {
        truncate(model, layers);
        let what = layers.checked_sub(1).map_or("hidden.embed".into(), |l| format!("hidden.layer.{l}"));
        let mut want = golden.floats(&what);
        for row in want.chunks_mut(d) {
            let r = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / d as f64 + f64::from(spec.eps)).sqrt();
            row.iter_mut().zip(&norm).for_each(|(x, &w)| *x *= r * f64::from(spec.offset + w));
        }
        check(&what, model, &want);
    }
}

/// Leaves the first layers, and of the layers' inputs theirs.
fn truncate<B: Backend>(model: &mut Gemma<B>, layers: usize) {
    model.config.layers.truncate(layers);
    model.params.layers.truncate(layers);
    let (b, columns, d) = (&model.backend, model.config.per_layer_columns(), model.config.hidden_size);
    if let Some(weight) = &mut model.params.per_layer {
        let dtype = b.dtype(weight);
        *weight = b.upload(dtype, columns, d, &b.download(weight)[..columns * d * dtype.bytes()]);
    }
    for table in model.params.per_layer_embed.iter_mut().chain(&mut model.frozen.per_layer_embed) {
        let (dtype, (rows, width)) = (b.dtype(table), b.shape(table));
        let bytes = b.download(table);
        let kept = bytes.chunks_exact(width * dtype.bytes()).flat_map(|row| &row[..columns * dtype.bytes()]);
        *table = b.upload(dtype, rows, columns, &kept.copied().collect::<Vec<u8>>());
    }
    if layers == 0 {
        model.config.per_layer_width = 0;
    }
}

#[test]
fn loss_and_every_gradient() {
    for name in NAMES {
        let (golden, model) = (Golden::open(name), tiny::model(name, DType::F32));
        let weights = vec![1.0 / golden.predicted() as f32; golden.predicted()];
        let (logprobs, grads) = golden.with_batch(|groups| tiny::gradient(&model, groups, 1.0, &weights));
        let bound = golden.logprob_error();
        assert_within(
            &format!("{name}: loss"),
            &[mean_loss(&logprobs) as f32],
            &[golden.number("/loss")],
            |_| bound,
        );
        for (parameter, grad) in tiny::named(&model, &grads) {
            let off = relative_error(grad.as_f32(), &golden.floats(&format!("grad.{parameter}")));
            let allowed = golden.gradient_error();
            assert!(
                off <= allowed,
                "{name}: grad.{parameter} is off by {off:e} of its norm, allowed {allowed:e}"
            );
        }
    }
}

#[test]
fn ten_updates_of_adamw() {
    for name in NAMES {
        let (golden, mut model) = (Golden::open(name), tiny::model(name, DType::F32));
        let of = |key: &str| golden.number(&format!("/adamw/{key}"));
        let section = golden.adamw();
        let weights = vec![1.0 / golden.predicted() as f32; golden.predicted()];
        let mut optimizer = Optimizer::new(&model, &section, 0);
        let updates = of("updates") as u64;
        for k in 0..=updates {
            let forward = golden.with_batch(|groups| Forward::new(&model, groups, 1.0));
            let (got, want) = (mean_loss(&forward.logprobs), of(&format!("losses/{k}")));
            // Beside its own error, a loss has that of the way down to it: to first order the gradients'. AdamW lets small
            // entries of a gradient, which are relatively less exact than its norm, count as much as large ones: 4.
            let way = 4.0 * golden.gradient_error() * (of("losses/0") - want);
            let bound = golden.logprob_error() + way;
            assert!((got - want).abs() <= bound, "{name}: loss {k} is {got}, want {want}, allowed {bound:e}");
            if k < updates {
                forward.backward(&model, &weights, &mut optimizer.grads);
                let norm = optimizer.step(&mut model, &section, section.lr, k + 1).unwrap();
                let (off, allowed) =
                    (norm / of(&format!("grad_norms/{k}")) - 1.0, 4.0 * golden.gradient_error());
                assert!(
                    off.abs() <= allowed,
                    "{name}: gradient norm {k} is off by {off:e}, allowed {allowed:e}"
                );
            }
        }
    }
}

/// With weights in bf16 the engine still computes in f32: it may be at most twice as wrong as Transformers in bf16.
#[test]
fn bf16_weights_are_as_good_as_plain_bf16() {
    for name in NAMES {
        let (golden, model) = (Golden::open(name), tiny::model(name, DType::Bf16));
        let got = golden.with_batch(|groups| Forward::new(&model, groups, 1.0).logprobs);
        let errors: Vec<f64> =
            got.iter().zip(golden.all("logprobs")).map(|(&got, want)| f64::from(got) - want).collect();
        let max = errors.iter().map(|e| e.abs()).fold(0.0, f64::max);
        let rms = rms(errors.into_iter());
        assert!(rms <= 2.0 * golden.number("/bf16_logprob_error/rms"), "{name}: rms {rms}");
        assert!(max <= 2.0 * golden.number("/bf16_logprob_error/max"), "{name}: max {max}");
    }
}

/// The models whose heads are as wide as the kernels take them.
const ON_KERNELS: [&str; 10] = [
    "gemma1_heads64",
    "gemma2_heads64",
    "vaultgemma_heads64",
    "gemma3_wrapper_heads64",
    "gemma3_untied",
    "gemma4",
    "gemma4_e",
    "gemma4_e_trained",
    "gemma4_moe",
    "gemma4_wrapper",
];

/// Log-probs and every gradient of the golden loss, by name, with weights in bf16.
fn on<B: Backend>(backend: B, name: &str, golden: &Golden) -> (Vec<f32>, Vec<(String, Vec<f32>)>) {
    let model = tiny::model_on(backend, name, DType::Bf16);
    let weights = vec![1.0 / golden.predicted() as f32; golden.predicted()];
    let (logprobs, grads) = golden.with_batch(|groups| tiny::gradient(&model, groups, 1.0, &weights));
    if let Err(e) = model.backend.check() {
        panic!("{name}: {e}");
    }
    let specs = params::plan(&model.config);
    let names = specs.tensors().into_iter().map(|spec| spec.name.clone());
    let values = grads.tensors().into_iter().map(|grad| model.backend.to_f32(grad));
    (logprobs, names.zip(values).collect())
}

/// Transformers in f32 is the truth, and what it makes of bf16 the measure: nothing of the engine's own is in either.
#[test]
fn log_probs_loss_and_every_gradient_on_the_kernels() {
    for device in devices() {
        for name in ON_KERNELS {
            let golden = Golden::open(name);
            let (logprobs, grads) = on(device.clone(), name, &golden);
            let check = |what: &str, rule: Rule, got: &[f32], want: &[f64], bf16: &str| {
                let off: Vec<f64> = got.iter().zip(want).map(|(&got, want)| f64::from(got) - want).collect();
                let largest = |x: &[f64]| x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
                let root = |x: &[f64]| rms(x.iter().copied());
                assert_eq!(got.len(), want.len(), "{name}: {what}");
                for (which, off, size) in
                    [("rms", root(&off), root(want)), ("max", largest(&off), largest(want))]
                {
                    let bf16 = golden.number(&format!("{bf16}/{which}"));
                    let allowed = rule.factor() * bf16 + BF16_ROUNDOFF * size;
                    let how = format!("allowed {allowed:e} (Transformers in bf16 {bf16:e}, size {size:e})");
                    assert!(
                        off <= allowed,
                        "{name}: {what} on {}: {which} error {off:e}, {how}",
                        device.device_name()
                    );
                }
            };
            let want = golden.all("logprobs");
            check("log-probs", Rule::Forward, &logprobs, &want, "/bf16_logprob_error");
            // A mean of errors is no larger than the root of the mean of their squares.
            let bf16 = golden.number("/bf16_logprob_error/rms");
            let allowed = Rule::Forward.factor() * bf16 + BF16_ROUNDOFF * rms(want.iter().copied());
            let off = mean_loss(&logprobs) - golden.number("/loss");
            assert!(off.abs() <= allowed, "{name}: loss is off by {off:e}, allowed {allowed:e}");
            for (parameter, got) in grads {
                let want = golden.floats(&format!("grad.{parameter}"));
                let bf16 = format!("/bf16_gradient_error/{parameter}");
                check(&parameter, Rule::Backward, &got, &want, &bf16);
            }
        }
    }
}

/// Those of the goldens that hold logits, hidden states and updates.
fn whole_on_kernels() -> impl Iterator<Item = &'static str> {
    ON_KERNELS.into_iter().filter(|name| NAMES.contains(name))
}

/// How bf16 amplifies through the model is measured in the logits, and hidden states, those of every layer through the final
/// norm, are at most as many roundings away from the tokens.
#[test]
fn logits_and_hidden_states_on_the_kernels() {
    for device in devices() {
        for name in whole_on_kernels() {
            let (golden, mut model) = (Golden::open(name), tiny::model_on(device.clone(), name, DType::Bf16));
            let allowed = Rule::Forward.factor() * golden.bf16_relative_error() + BF16_ROUNDOFF;
            let mut logits = Vec::new();
            for ids in &golden.sequences {
                let (logprobs, lse) = vocabulary(&model, &hidden(&model, ids));
                let vocab = model.config.vocab_size;
                logits.extend(logprobs.iter().enumerate().map(|(i, logprob)| logprob + lse[i / vocab]));
            }
            let (off, on) = (relative_error(&logits, &golden.all("logits")), device.device_name());
            assert!(
                off <= allowed,
                "{name}: logits on {on} are off by {off:e} of their norm, allowed {allowed:e}"
            );
            check_every_layer(name, &golden, &mut model, allowed);
            device.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

/// Ten updates on the kernels, with masters in f32 and weights rounded to bf16 from them, as close to Transformers' in f32 as its
/// own bf16 lets one expect: of a loss as of log-probs; of the way down to it as of the gradients, whose small entries count as
/// much as large ones to AdamW.
#[test]
fn ten_updates_of_adamw_on_the_kernels() {
    for device in devices() {
        for name in whole_on_kernels() {
            let (golden, mut model) = (Golden::open(name), tiny::model_on(device.clone(), name, DType::Bf16));
            let of = |key: &str| golden.number(&format!("/adamw/{key}"));
            let section = golden.adamw();
            let weights = vec![1.0 / golden.predicted() as f32; golden.predicted()];
            let gradient = {
                let names: Vec<String> =
                    params::plan(&model.config).tensors().into_iter().map(|spec| spec.name.clone()).collect();
                let squares = |of: &dyn Fn(&str) -> (f64, usize)| {
                    names.iter().map(|name| of(name)).map(|(rms, n)| rms * rms * n as f64).sum::<f64>()
                };
                let values = |name: &str| golden.floats(&format!("grad.{name}"));
                let error = squares(&|name| {
                    (golden.number(&format!("/bf16_gradient_error/{name}/rms")), values(name).len())
                });
                let size = squares(&|name| (rms(values(name).into_iter()), values(name).len()));
                Rule::Backward.factor() * (error / size).sqrt() + BF16_ROUNDOFF
            };
            let forward_error = Rule::Forward.factor() * golden.number("/bf16_logprob_error/rms");
            let mut optimizer = Optimizer::new(&model, &section, 0);
            let updates = of("updates") as u64;
            for k in 0..=updates {
                let forward = golden.with_batch(|groups| Forward::new(&model, groups, 1.0));
                let (got, want) = (mean_loss(&forward.logprobs), of(&format!("losses/{k}")));
                let way = 4.0 * gradient * (of("losses/0") - want);
                let bound = forward_error + BF16_ROUNDOFF * want + way;
                assert!(
                    (got - want).abs() <= bound,
                    "{name}: loss {k} on {} is {got}, want {want}, allowed {bound:e}",
                    device.device_name()
                );
                if k < updates {
                    forward.backward(&model, &weights, &mut optimizer.grads);
                    let norm = optimizer.step(&mut model, &section, section.lr, k + 1).unwrap();
                    let (off, allowed) = (norm / of(&format!("grad_norms/{k}")) - 1.0, 4.0 * gradient);
                    assert!(
                        off.abs() <= allowed,
                        "{name}: gradient norm {k} is off by {off:e}, allowed {allowed:e}"
                    );
                }
            }
            device.check().unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
}

/// Where sqrt(D) is no rounding matter, bf16 weights give the very bits of the f32 numbers that they stand for.
#[test]
fn bf16_weights_compute_as_the_numbers_that_they_hold() {
    for name in NAMES {
        let mut config = tiny::model(name, DType::F32).config;
        config.hidden_size = 64;
        if config.per_layer_width != 0 {
            config.per_layer_width = 16;
        }
        let run = |dtype: DType| {
            let mut seed = 0;
            let params = params::plan(&config).map(|spec| {
                seed += 1;
                let (bf16, values) = random_bf16(seed, spec.rows, spec.cols);
                match dtype {
                    DType::Bf16 => bf16,
                    DType::F32 => {
                        Tensor::f32(spec.rows, spec.cols, values.iter().map(|&x| x as f32).collect())
                    }
                }
            });
            let table = params::frozen(&config).pop().filter(|(_, shape)| shape.len() == 2);
            let per_layer_embed = table.map(|(_, shape)| {
                let (bf16, values) = random_bf16(seed + 1, shape[0], shape[1]);
                let widened = values.iter().map(|&x| x as f32).collect();
                if dtype == DType::Bf16 { bf16 } else { Tensor::f32(shape[0], shape[1], widened) }
            });
            let frozen = Frozen { scalars: vec![1.0; config.layers.len()], per_layer_embed };
            let model =
                Gemma { backend: Cpu::F32, config: config.clone(), params, frozen, adapter_scale: None };
            let golden = Golden::open(name);
            let weights = vec![0.5; golden.predicted()];
            let (logprobs, grads) = golden.with_batch(|groups| tiny::gradient(&model, groups, 0.7, &weights));
            let grads: Vec<Vec<u32>> = grads.tensors().into_iter().map(bits).collect();
            (logprobs.iter().map(|l| l.to_bits()).collect::<Vec<_>>(), grads)
        };
        assert!(run(DType::F32) == run(DType::Bf16), "{name}");
    }
}
