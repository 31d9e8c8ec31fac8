//! The whole engine on the kernels: tiny Gemmas of every family sample, score, weigh, differentiate and step on the
//! virtual GPU, under all of its checks, beside the CPU in f32. How far they may be apart says [`Rounded`], the same
//! step in naive bf16.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Batch, HeadSpec, NormSpec, Pace, RopeSpec, Truncation};
use bon_engine::delegate_device;
use bon_engine::device::vm::{MmaOrder, Options, Vm};
use bon_engine::device::{Arg, Device, DeviceError, Kernel, Launch, Ptr, Reading};
use bon_engine::gemma::config::{ExpertShape, GemmaConfig, LayerShape, LayerSpec, NormPlacement};
use bon_engine::gemma::{Frozen, Gemma, params};
use bon_engine::generate::{GenerateError, Prompt, Response, Sampling, generate, generate_at};
use bon_engine::objective::{Kind, ObjectiveConfig, ScoredGroup, Signal, coefficients};
use bon_engine::rng::{Domain, DrawKey, derive_key, philox4x32};
use bon_engine::rollout::RolloutError;
use bon_engine::segments::Segments;
use bon_engine::train::config::OptimizerSection;
use bon_engine::train::error::TrainError;
use bon_engine::train::interrupt::Interrupt;
use bon_engine::train::optimizer::Optimizer;
use bon_engine::train::policy::Forward;
use bon_engine::train::run::run;

use crate::device::gpu;
use crate::fixture::Fixture;
use crate::kernels::{compiled, rounded, vm, vm_in, weight_of};
use crate::ops::randoms;
use crate::rounded::Rounded;
use crate::tiny::{self, Groups};
use crate::tolerance::{BF16_ROUNDOFF, Rule, assert_rule};
use crate::training::{Workplace, checkpoint, metrics, train_on};

pub(crate) const FAMILIES: [&str; 7] =
    ["gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_e", "gemma4_e_trained", "gemma4_moe"];
/// N.
const STREAMS: usize = 8;

const SAMPLING: Sampling = Sampling {
    temperature: 0.9,
    truncation: Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 },
    max_new_tokens: 6,
    seed: 11,
    step: 3,
};

/// A Gemma as small as the kernels take it, with all that its family has; no width is a multiple of a tile, and the
/// vocabulary is odd.
pub(crate) fn config(family: &str) -> GemmaConfig {
    let shape = match family {
        "gemma2" => LayerShape { heads: 4, kv_heads: 2, head_dim: 64, intermediate: 200 },
        _ => LayerShape { heads: 3, kv_heads: 1, head_dim: 64, intermediate: 200 },
    };
    let layer = |window, theta, factor| {
        let rope = RopeSpec { factor, ..RopeSpec::new(shape.head_dim, theta) };
        LayerSpec { shape, window, rope, keys_are_values: false, kv_from: None }
    };
    let base = GemmaConfig {
        model_type: family.to_owned(),
        vocab_size: 333,
        hidden_size: 104,
        layers: vec![layer(None, 1e4, 1.0); 2],
        norm: NormSpec { eps: 1e-6, offset: 1.0 },
        attention_scale: 0.125,
        attention_softcap: None,
        final_softcap: None,
        norms: NormPlacement::Pre,
        mlp_pre_norm: "post_attention_layernorm",
        qk_norm: false,
        value_norm: false,
        layer_scalars: false,
        per_layer_width: 0,
        trains_per_layer_embed: false,
        experts: None,
        max_positions: 64,
        eos_tokens: vec![1],
        bos_token: 2,
        tied: true,
        score_head: false,
    };
    match family {
        "gemma" => base,
        "gemma2" => GemmaConfig {
            layers: vec![layer(Some(9), 1e4, 1.0), layer(None, 1e4, 1.0)],
            attention_scale: 0.2,
            attention_softcap: Some(4.0),
            final_softcap: Some(6.0),
            norms: NormPlacement::Sandwich,
            mlp_pre_norm: "pre_feedforward_layernorm",
            ..base
        },
        "gemma3_text" => GemmaConfig {
            layers: vec![layer(Some(8), 1e4, 1.0), layer(None, 1e6, 8.0), layer(Some(8), 1e4, 1.0)],
            norms: NormPlacement::Sandwich,
            mlp_pre_norm: "pre_feedforward_layernorm",
            qk_norm: true,
            ..base
        },
        _ => {
            // Heads of global layers as Gemma 4 has them, and half as wide.
            let global = |head_dim, kv_heads| LayerSpec {
                shape: LayerShape { kv_heads, head_dim, ..shape },
                window: None,
                rope: RopeSpec { pairs: head_dim / 8, ..RopeSpec::new(head_dim, 1e6) },
                keys_are_values: kv_heads == 1,
                kv_from: None,
            };
            let dense = GemmaConfig {
                layers: vec![
                    layer(Some(8), 1e4, 1.0),
                    global(512, 1),
                    layer(Some(8), 1e4, 1.0),
                    global(128, 3),
                ],
                norm: NormSpec { eps: 1e-6, offset: 0.0 },
                attention_scale: 1.0,
                final_softcap: Some(6.0),
                norms: NormPlacement::Sandwich,
                mlp_pre_norm: "pre_feedforward_layernorm",
                qk_norm: true,
                value_norm: true,
                layer_scalars: true,
                ..base
            };
            if family == "gemma4_text" {
                return dense;
            }
            if family == "gemma4_moe" {
                let layers = vec![layer(Some(8), 1e4, 1.0), global(128, 3)];
                let experts = Some(ExpertShape { count: 8, per_token: 2, width: 40 });
                return GemmaConfig { layers, experts, ..dense };
            }
            // The last layers read keys and values, and have wider MLPs.
            let reader = |from: usize| {
                let of: LayerSpec = dense.layers[from];
                let shape = LayerShape { intermediate: 400, ..of.shape };
                LayerSpec { shape, keys_are_values: false, kv_from: Some(from), ..of }
            };
            let layers = [&dense.layers[..3], &[reader(1), reader(2), reader(2)]].concat();
            let trains_per_layer_embed = family == "gemma4_e_trained";
            GemmaConfig { layers, per_layer_width: 24, trains_per_layer_embed, ..dense }
        }
    }
}

/// The model with the same random bf16 weights on every backend: linear maps keep the size of what they map.
pub(crate) fn model<B: Backend>(backend: B, config: &GemmaConfig) -> Gemma<B> {
    // With these no token is so close to two experts that rounding sends it to the other.
    let mut seed = 100;
    let params = params::plan(config).map(|spec| {
        seed += 1;
        let size = match spec.kind {
            params::ParamKind::Vector => 0.2,
            params::ParamKind::Matrix if spec.is_per_layer_embed() => 1.0,
            params::ParamKind::Matrix if spec.rows == config.vocab_size => 0.1,
            _ => (3.0 / spec.cols as f32).sqrt(),
        };
        // What norms multiply by is around 1, however they store it.
        let center = if spec.kind == params::ParamKind::Vector { 1.0 - config.norm.offset } else { 0.0 };
        let values: Vec<f32> =
            randoms(seed, spec.rows * spec.cols).iter().map(|x| center + size * x).collect();
        weight_of(&backend, spec.rows, spec.cols, &values)
    });
    let scalars =
        (0..config.layers.len()).map(|l| if config.layer_scalars { 0.75 + 0.25 * l as f32 } else { 1.0 });
    let (rows, cols) = (config.vocab_size, config.per_layer_columns());
    let is_frozen = cols != 0 && !config.trains_per_layer_embed;
    let per_layer_embed = is_frozen.then(|| weight_of(&backend, rows, cols, &randoms(99, rows * cols)));
    let frozen = Frozen { scalars: scalars.collect(), per_layer_embed };
    Gemma { backend, config: config.clone(), params, frozen, adapter_scale: None }
}

/// Two prompts with a beginning in common.
fn prompts() -> Vec<Vec<u32>> {
    let prompt = |own: &[u32]| [&[2][..], &tiny::tokens(1, 11), own].concat();
    vec![prompt(&tiny::tokens(2, 7)), prompt(&tiny::tokens(3, 2))]
}

fn sample<B: Backend>(model: &Gemma<B>) -> Vec<Vec<Response>> {
    sample_at(model.backend.pace(), model)
}

fn sample_at<B: Backend>(pace: Pace, model: &Gemma<B>) -> Vec<Vec<Response>> {
    let prompts = prompts();
    let requests: Vec<Prompt> =
        (5..).zip(&prompts).map(|(number, ids)| Prompt { ids, number, streams: STREAMS }).collect();
    // About one token in ten ends a response.
    let stop = |tokens: &[u32]| tokens.last().is_some_and(|t| t % 10 == 7);
    generate_at(pace, model, &requests, &SAMPLING, stop, |_, _, _| {}).unwrap_or_else(|e| panic!("{e}"))
}

fn groups(responses: &[Vec<Response>]) -> Groups {
    let of = |group: &Vec<Response>| group.iter().map(|r| r.tokens.clone()).collect();
    Groups(prompts().into_iter().zip(responses.iter().map(of)).collect())
}

/// BoN-RL's coefficient of every response, over the number of groups and its length, for each of its tokens. The
/// verifier likes high tokens, the environment even ones.
fn weigh(responses: &[Vec<Response>]) -> Vec<f32> {
    let objective = ObjectiveConfig {
        selector: Some(Signal::Verifier),
        reward: Some(Signal::Environment),
        ..ObjectiveConfig::new(Kind::BonRl, Some(4))
    };
    let weights = responses.iter().flat_map(|group| {
        let score =
            |r: &Response| r.tokens.iter().map(|&t| f64::from(t)).sum::<f64>() / r.tokens.len() as f64;
        let scores: Vec<f64> = group.iter().map(score).collect();
        let rewards = group.iter().map(|r| r.tokens.iter().filter(|t| **t % 2 == 0).count() as f64).collect();
        let scored = ScoredGroup { rewards, scores, expert_score: None };
        let c = coefficients(&objective, &scored).unwrap().samples;
        let scale = responses.len() as f64;
        group
            .iter()
            .zip(c)
            .flat_map(|(r, c)| vec![(c / (scale * r.tokens.len() as f64)) as f32; r.tokens.len()])
            .collect::<Vec<_>>()
    });
    weights.collect()
}

/// What one training step on given responses computed.
struct Step {
    logprobs: Vec<f32>,
    /// By name.
    gradients: Vec<(String, Vec<f32>)>,
    norm: f64,
    /// The parameters after it.
    updated: Vec<Vec<f32>>,
}

fn optimizer_config() -> OptimizerSection {
    OptimizerSection { weight_decay: 0.1, clip_norm: 0.5, ..OptimizerSection::default() }
}

fn step<B: Backend>(model: &mut Gemma<B>, responses: &[Vec<Response>], weights: &[f32]) -> Step {
    let mut optimizer = Optimizer::new(model, &optimizer_config(), 0);
    let forward = groups(responses).with(|groups| Forward::new(model, groups, SAMPLING.temperature));
    let logprobs = forward.logprobs.clone();
    forward.backward(model, weights, &mut optimizer.grads);
    let specs = params::plan(&model.config);
    let names = specs.tensors().into_iter().map(|s| s.name.clone());
    let gradients =
        names.zip(optimizer.grads.tensors().iter().map(|g| model.backend.to_f32(g))).collect::<Vec<_>>();
    let norm = optimizer.step(model, &optimizer_config(), 1e-2, 1).unwrap();
    if let Err(e) = model.backend.check() {
        panic!("{e}");
    }
    let updated = model.params.tensors().iter().map(|p| model.backend.to_f32(p)).collect();
    Step { logprobs, gradients, norm, updated }
}

// ------------------------------------------------------------------------------------------------------- sampling

/// Standard Gumbel noise of a token.
fn noise(key: &DrawKey, token: usize) -> f64 {
    let bits = philox4x32([token as u32 / 4, key.position, key.stream, key.prompt], key.key)[token % 4];
    let u = (f64::from(bits) + 0.5) / 4_294_967_296.0;
    -(-(-u).ln_1p()).ln()
}

/// The logits after `ids`, capped, over the temperature.
fn logits<B: Backend>(model: &Gemma<B>, ids: &[u32]) -> Vec<f64> {
    let segments = Segments::separate(&[ids.len()]);
    let runs = segments.all_queries();
    let batch = Batch::new(ids, &segments, &runs);
    let last = model.backend.gather_rows(&model.forward(&batch).0, &[ids.len() as u32 - 1]);
    let [logits] = model.backend.matmul_forward(&last, [model.params.lm_head()]);
    let head = HeadSpec { softcap: model.config.final_softcap, temperature: SAMPLING.temperature };
    let finish = |x: f32| {
        let x = f64::from(x);
        head.softcap.map_or(x, |c| f64::from(c) * (x / f64::from(c)).tanh()) / f64::from(head.temperature)
    };
    model.backend.to_f32(&logits).into_iter().map(finish).collect()
}

/// Holds two samples of a stream together up to the first draw that they decide differently. There the scores of the
/// two tokens must be closer than rounding could bring them: each logit may be off by what [`assert_rule`] allows. Says
/// whether all tokens are the same.
fn same_up_to_a_close_call(
    exact: &Gemma<Cpu>,
    naive: &Gemma<Rounded>,
    prompt: &[u32],
    key: impl Fn(usize) -> DrawKey,
    want: &Response,
    got: &Response,
) -> bool {
    let Some(at) = want.tokens.iter().zip(&got.tokens).position(|(a, b)| a != b) else {
        assert_eq!(want.tokens.len(), got.tokens.len(), "streams of the same tokens end together");
        return true;
    };
    let ids = [prompt, &want.tokens[..at]].concat();
    let (exact, naive) = (logits(exact, &ids), logits(naive, &ids));
    let largest = exact.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    let off = exact.iter().zip(&naive).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    let allowed = 2.0 * (2.0 * off + BF16_ROUNDOFF * largest);
    let score = |token: u32| exact[token as usize] + noise(&key(ids.len()), token as usize);
    let (best, other) = (score(want.tokens[at]), score(got.tokens[at]));
    assert!(
        (0.0..=allowed).contains(&(best - other)),
        "token {at}: {} scores {best}, {} scores {other}; only differences up to {allowed} may be decided otherwise",
        want.tokens[at],
        got.tokens[at]
    );
    false
}

fn check_samples(family: &str, want: &[Vec<Response>], got: &[Vec<Response>]) {
    let config = config(family);
    let (exact, naive) = (model(Cpu::F32, &config), model(Rounded, &config));
    let key = derive_key(SAMPLING.seed, Domain::Sample, SAMPLING.step);
    let mut same = 0;
    for (i, ((prompt, want), got)) in prompts().iter().zip(want).zip(got).enumerate() {
        for (stream, (want, got)) in want.iter().zip(got).enumerate() {
            let key = |position: usize| DrawKey {
                key,
                prompt: 5 + i as u32,
                stream: stream as u32,
                position: position as u32,
            };
            same += usize::from(same_up_to_a_close_call(&exact, &naive, prompt, key, want, got));
        }
    }
    assert!(same > STREAMS, "{family}: only {same} of {} streams are the CPU's", 2 * STREAMS);
}

// ------------------------------------------------------------------------------------------------------- training

/// Samples, scores, weighs and steps on `backend` and holds all of it to the CPU's. Returns the largest gap between a
/// log-prob as sampled and as trained on.
fn check_engine<B: Backend>(family: &str, backend: B) -> f32 {
    let config = config(family);
    let mut exact = model(Cpu::F32, &config);
    let want = sample(&exact);
    let mut tested = model(backend, &config);
    let got = sample(&tested);
    check_samples(family, &want, &got);

    // The log-probs of its own samples, as training computes them.
    let sampled = got.iter().flatten().flat_map(|r| r.logprobs.iter().copied());
    let trained = groups(&got).with(|groups| Forward::new(&tested, groups, SAMPLING.temperature).logprobs);
    let gap = sampled.zip(&trained).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);

    // A step on the same samples everywhere.
    let weights = weigh(&want);
    assert!(weights.iter().any(|w| *w > 0.0) && weights.iter().any(|w| *w < 0.0));
    let start: Vec<Vec<f32>> = exact.params.tensors().iter().map(|p| Cpu::F32.to_f32(p)).collect();
    let naive = step(&mut model(Rounded, &config), &want, &weights);
    let exact = step(&mut exact, &want, &weights);
    let got = step(&mut tested, &want, &weights);
    let what = |name: &str| format!("{family}: {name}");
    assert_rule(&what("log-probs"), Rule::Forward, &got.logprobs, &exact.logprobs, &naive.logprobs);
    let loss = |s: &Step| -> f64 {
        -s.logprobs.iter().zip(&weights).map(|(&l, &w)| f64::from(l) * f64::from(w)).sum::<f64>()
    };
    // By the triangle inequality from the largest error that the rule allows a log-prob.
    let off =
        |s: &Step| s.logprobs.iter().zip(&exact.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let largest = exact.logprobs.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let each = 2.0 * f64::from(off(&naive)) + BF16_ROUNDOFF * f64::from(largest);
    let allowed = each * weights.iter().map(|w| f64::from(w.abs())).sum::<f64>();
    assert!((loss(&got) - loss(&exact)).abs() <= allowed, "{family}: loss {} {}", loss(&got), loss(&exact));
    for (i, (name, want)) in exact.gradients.iter().enumerate() {
        assert!(want.iter().any(|g| *g != 0.0), "{family}: {name} has no gradient");
        let (got, naive) = (&got.gradients[i].1, &naive.gradients[i].1);
        assert_rule(&what(name), Rule::Backward, got, want, naive);
    }

    // The optimizer on the gradient that it was given: the CPU's update of it, rounded to bf16.
    let mut again = model(Cpu::F32, &config);
    let mut optimizer = Optimizer::new(&again, &optimizer_config(), 0);
    for (grad, (_, values)) in optimizer.grads.tensors_mut().into_iter().zip(&got.gradients) {
        grad.as_f32_mut().copy_from_slice(values);
    }
    let norm = optimizer.step(&mut again, &optimizer_config(), 1e-2, 1).unwrap();
    assert!((got.norm / norm - 1.0).abs() < 1e-12, "{family}: gradient norm {}, want {norm}", got.norm);
    let updated = again.params.tensors().into_iter().map(|p| Cpu::F32.to_f32(p));
    for ((got, want), start) in got.updated.iter().zip(updated).zip(&start) {
        let different = got.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert_eq!(different, 0, "{family}: of {} parameters", got.len());
        assert!(got != &rounded(start), "{family}: a tensor has not moved");
    }
    gap
}

#[test]
fn a_step_with_bf16_products_is_that_in_f32_within_bf16() {
    for family in FAMILIES {
        let gap = check_engine(family, Cpu::BF16);
        assert_eq!(gap, 0.0, "{family}: a log-prob is one thing in sampling and another in training");
    }
}

#[test]
fn a_step_on_the_kernels_is_the_cpus_within_bf16() {
    if !compiled() {
        return;
    }
    for family in FAMILIES {
        let gap = check_engine(family, vm(None));
        assert_eq!(gap, 0.0, "{family}: a log-prob is one thing in sampling and another in training");
    }
}

/// The same where products are summed in groups, as tensor cores sum them: what sampling and training have in common must
/// not rest on the chain of the virtual GPU.
#[test]
fn a_step_is_the_cpus_within_bf16_as_tensor_cores_sum() {
    if !compiled() {
        return;
    }
    for order in [MmaOrder::Ampere, MmaOrder::Hopper] {
        for family in FAMILIES {
            let gap = check_engine(family, vm_in(order));
            let what = "a log-prob is one thing in sampling and another in training";
            assert_eq!(gap, 0.0, "{family}, {order:?}: {what}");
        }
    }
}

#[test]
fn a_step_on_a_gpu_is_the_cpus_within_bf16() {
    // Sampling replays its decode steps there.
    if let Some(cuda) = compiled().then(crate::kernels::cuda).flatten() {
        for family in FAMILIES {
            let gap = check_engine(family, cuda.clone());
            assert_eq!(gap, 0.0, "{family}: a log-prob is one thing in sampling and another in training");
        }
    }
}

/// CUDA graphs pay only if decode steps repeat to the address while a response grows.
#[test]
fn decode_steps_are_replayed_on_a_gpu() {
    const TOKENS: usize = 24;
    let Some(gpu) = compiled().then(crate::device::gpu).flatten().map(Arc::new) else { return };
    let model = model(Cuda::new(Box::new(Arc::clone(&gpu))).unwrap(), &config("gemma3_text"));
    let prompts = prompts();
    let requests: Vec<Prompt> =
        (5..).zip(&prompts).map(|(number, ids)| Prompt { ids, number, streams: STREAMS }).collect();
    let sampling = Sampling { max_new_tokens: TOKENS, ..SAMPLING };
    let mut counts = vec![gpu.counts()];
    let responses: Vec<_> = (0..3)
        .map(|_| {
            let responses = generate(&model, &requests, &sampling, |_| false, |_, _, _| {}).unwrap();
            counts.push(gpu.counts());
            responses
        })
        .collect();
    assert!(responses.iter().all(|r| *r == responses[0]), "a replay samples other tokens");
    let replayed: Vec<u64> = counts.windows(2).map(|pair| pair[1].replayed - pair[0].replayed).collect();
    // A step must be seen twice before it is recorded, and work lists grow now and then.
    assert!(2 * replayed[0] >= TOKENS as u64, "of {TOKENS} passes each: {replayed:?}");
    assert!(
        replayed[1..].iter().all(|&n| 4 * n >= 3 * TOKENS as u64),
        "of {TOKENS} passes each: {replayed:?}"
    );
    assert_eq!(counts[3].allocations, counts[1].allocations, "the driver's allocator was called in a loop");
}

/// A stream that ends leaves most steps as they were.
#[test]
fn decode_steps_are_replayed_while_streams_end() {
    const TOKENS: usize = 48;
    const MANY: usize = 40;
    let Some(gpu) = compiled().then(crate::device::gpu).flatten().map(Arc::new) else { return };
    let config = GemmaConfig { max_positions: 128, ..config("gemma3_text") };
    let model = model(Cuda::new(Box::new(Arc::clone(&gpu))).unwrap(), &config);
    let prompts = prompts();
    let requests: Vec<Prompt> =
        (5..).zip(&prompts).map(|(number, ids)| Prompt { ids, number, streams: MANY / 2 }).collect();
    let sampling = Sampling { max_new_tokens: TOKENS, ..SAMPLING };
    let run = |pace: Pace| {
        let before = gpu.counts();
        let stop = |tokens: &[u32]| tokens.last().is_some_and(|t| t % 24 == 7);
        let responses = generate_at(pace, &model, &requests, &sampling, stop, |_, _, _| {}).unwrap();
        (responses, gpu.counts().replayed - before.replayed)
    };
    let (want, alone) = run(Pace { lag: 0, rows: |n| n });
    let (got, replayed) = run(model.backend.pace());
    assert!(got == want, "a pace samples other tokens");
    let mut lengths: Vec<usize> = got.iter().flatten().map(|r| r.tokens.len()).collect();
    lengths.sort_unstable();
    lengths.dedup();
    assert!(lengths.len() > 12, "streams end together: {lengths:?}");
    // Seven numbers of rows, and each is met once and may change its lists once; without padding, most steps are new.
    let new = |replayed: u64| TOKENS as u64 - replayed;
    assert!(new(replayed) <= 14 && new(alone) > 14, "of {TOKENS} steps {replayed}, {alone} without padding");
}

/// The host looks at a step's tokens when it has asked for the next one, and says all that the next one needs in two
/// uploads: where rows belong, and what they draw with.
#[test]
fn decoding_never_waits_for_the_step_that_runs() {
    if !compiled() {
        return;
    }
    let device = Arc::new(Failing::new(usize::MAX));
    let model = model(Cuda::new(Box::new(Arc::clone(&device))).unwrap(), &config("gemma"));
    let prompts = prompts();
    let requests: Vec<Prompt> =
        (5..).zip(&prompts).map(|(number, ids)| Prompt { ids, number, streams: 3 }).collect();
    device.asked.lock().unwrap().clear();
    generate(&model, &requests, &SAMPLING, |_| false, |_, _, _| {}).unwrap();
    let asked = device.asked.lock().unwrap().clone();
    // The steps are what lies between two beginnings of reads: w, launches, b, and e for the end of the one before.
    let steps: Vec<&str> = asked.split_inclusive('b').collect();
    assert_eq!(steps.len(), SAMPLING.max_new_tokens + 1, "{asked}");
    let without_launches: Vec<String> = steps.iter().map(|s| s.replace('l', "")).collect();
    assert!(without_launches[1] == "wwb" && steps[1].len() > 20, "{asked}");
    assert!(without_launches[2..SAMPLING.max_new_tokens].iter().all(|s| s == "ewwb"), "{asked}");
    assert_eq!(steps[SAMPLING.max_new_tokens], "ee", "{asked}");
}

#[test]
fn every_pace_samples_the_same_on_the_kernels() {
    if !compiled() {
        return;
    }
    for family in FAMILIES {
        let model = model(vm(None), &config(family));
        let want = sample_at(Pace { lag: 0, rows: |n| n }, &model);
        assert!(want.iter().flatten().any(|r| r.tokens.len() < SAMPLING.max_new_tokens));
        let paces = [
            Pace { lag: 1, rows: |n| n },
            Pace { lag: 0, rows: |n| n.next_power_of_two() },
            Pace { lag: 1, rows: |n| n.max(21) },
        ];
        for pace in paces {
            assert!(sample_at(pace, &model) == want, "{family}: lag {}, {} rows", pace.lag, (pace.rows)(5));
        }
        assert!(sample(&model) == want, "{family}");
    }
}

/// The token that a row of NaN draws is embedded before anybody has seen it.
#[test]
fn nan_is_told_where_it_began_on_the_kernels() {
    if !compiled() {
        return;
    }
    let config = config("gemma");
    let mut model = model(vm(None), &config);
    let nan = vec![f32::NAN; config.hidden_size];
    model.params.final_norm = weight_of(&model.backend, 1, config.hidden_size, &nan);
    let prompts = prompts();
    let requests: Vec<Prompt> =
        (5..).zip(&prompts).map(|(number, ids)| Prompt { ids, number, streams: 2 }).collect();
    for truncation in [SAMPLING.truncation, Truncation { top_k: 5, ..SAMPLING.truncation }] {
        let sampling = Sampling { truncation, ..SAMPLING };
        let refused = generate(&model, &requests, &sampling, |_| false, |_, _, _| {}).unwrap_err();
        let position = prompts[0].len();
        let want = format!("prompt 0, stream 0: the log-prob of token {position} is NaN");
        assert!(refused.to_string().starts_with(&want), "{refused}");
    }
}

/// The tests above on what they measure against: they can be passed, and not because nothing is compared.
#[test]
fn a_step_in_naive_bf16_is_the_cpus_within_bf16() {
    for family in FAMILIES {
        check_engine(family, Rounded);
    }
}

// --------------------------------------------------------------------------------------------------------- resume

/// BoN-SFT always has something to learn: the expert's response.
const RUN: [&str; 7] = [
    "objective.kind=bon-sft",
    "generate.samples=4",
    "generate.max_new_tokens=3",
    "train.steps=2",
    "train.kl_coefficient=0.05",
    "train.gradient_accumulation=2",
    "train.save_every=1",
];

#[test]
fn on_the_kernels_a_resumed_run_is_the_uninterrupted_run() {
    if !compiled() {
        return;
    }
    let place = Workplace::for_kernels();
    let (whole, parts) = (place.config("whole", &RUN), place.config("parts", &RUN));
    let steps = train_on(vm(None), &whole, false, 2);
    assert!(steps.iter().all(|m| m.logprob_gap_max == 0.0 && m.grad_norm > 0.0), "{steps:?}");
    train_on(vm(None), &parts, false, 1);
    // The CPU would round otherwise.
    let refused = run(Cpu::F32, &parts, true, &Interrupt::default(), |_| {}).unwrap_err();
    assert!(matches!(&refused, TrainError::Differs { .. }), "{refused}");
    assert!(refused.to_string().contains("--device: the run is on vm"), "{refused}");
    train_on(vm(None), &parts, true, 2);
    assert!(checkpoint(&parts) == checkpoint(&whole), "other weights or moments");
    assert_eq!(metrics(&parts.train.output), metrics(&whole.train.output));
}

// --------------------------------------------------------------------------------------------------------- errors

/// A device that fails once it has done so many things, and tells what it was asked: to write, to launch, to begin to
/// read and to end that, by their first letters, or to read or wait otherwise.
struct Failing {
    vm: Vm,
    left: AtomicUsize,
    asked: Mutex<String>,
}

impl Failing {
    fn new(left: usize) -> Self {
        let vm = Vm::new(Options::default());
        Self { vm, left: AtomicUsize::new(left), asked: Mutex::default() }
    }

    fn tell(&self, what: char) {
        self.asked.lock().unwrap().push(what);
    }

    fn count(&self) -> Result<(), DeviceError> {
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        left.map(drop).map_err(|_| DeviceError::new("failing", "it was made to fail"))
    }
}

impl Device for Failing {
    delegate_device!(self, self.vm; name, multiprocessors, load, alloc, free, fill);

    fn write(&self, dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.tell('w');
        self.vm.write(dst, bytes)
    }

    fn read(&self, src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.tell('r');
        self.count()?;
        self.vm.read(src, bytes)
    }

    fn begin_read(&self, src: Ptr, bytes: usize) -> Result<Reading, DeviceError> {
        self.tell('b');
        self.count()?;
        self.vm.begin_read(src, bytes)
    }

    fn end_read(&self, reading: Reading) -> Result<Vec<u8>, DeviceError> {
        self.tell('e');
        self.vm.end_read(reading)
    }

    fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError> {
        self.tell('l');
        self.count()?;
        self.vm.launch(kernel, launch, args)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.tell('s');
        self.vm.synchronize()
    }
}

#[test]
fn a_device_that_fails_leaves_nothing_wrong_behind() {
    if !compiled() {
        return;
    }
    let place = Workplace::for_kernels();
    let settings =
        ["objective.kind=bon-sft", "generate.samples=4", "generate.max_new_tokens=2", "train.steps=1"];
    let failing = |left: usize| Arc::new(Failing::new(left));
    let on = |device: &Arc<Failing>, output: &str| {
        let cuda = Cuda::new(Box::new(Arc::clone(device))).unwrap();
        run(cuda, &place.config(output, &settings), false, &Interrupt::default(), |_| {})
    };
    const PLENTY: usize = 1 << 20;
    let device = failing(PLENTY);
    on(&device, "whole").unwrap();
    let all = PLENTY - device.left.load(Ordering::Relaxed);

    let mut met = [0; 5];
    // At the start, in the midst of everything, and at the very last read of the save.
    for (i, after) in (0..12).map(|i| all * i / 12).chain([all - 1]).enumerate() {
        let output = format!("fails-{i}");
        let error = on(&failing(after), &output).unwrap_err();
        let kind = match &error {
            TrainError::Open(_) => 0,
            TrainError::Rollout { source: RolloutError::Generate(GenerateError::Device(_)), .. } => 1,
            TrainError::Device { step: 1, .. } => 2,
            TrainError::Snapshot(_) => 3,
            _ => 4,
        };
        met[kind] += 1;
        let text = format!("{:#}", anyhow::Error::from(error));
        assert!(
            ![1, 2].contains(&kind) || text.contains("--resume goes on"),
            "after {after} of {all}: {text}"
        );
        assert!(text.ends_with("failing: it was made to fail"), "after {after} of {all}: {text}");
        let checkpoints = place.path(&output).join("checkpoints");
        if checkpoints.exists() {
            let mut names = fs::read_dir(&checkpoints).unwrap().map(|e| e.unwrap().file_name());
            assert!(names.all(|name| name == ".lock"), "after {after} of {all} there is a checkpoint");
        }
    }
    let [open, sample, train, save, other] = met;
    assert!(open > 0 && sample > 0 && train > 0 && save > 0 && other == 0, "not all was tried: {met:?}");
}

/// 65,536 streams of 65,536 tokens are more rows than kernels can count, and far more than any device has room for: the
/// device says so, and the host makes nothing of that size.
#[test]
fn streams_that_no_device_has_room_for_are_an_error() {
    if !compiled() {
        return;
    }
    let config = GemmaConfig { max_positions: 1 << 17, ..config("gemma") };
    let model = model(vm(None), &config);
    let prompts = [Prompt { ids: &[2, 3], number: 0, streams: 1 << 16 }];
    let sampling = Sampling { max_new_tokens: 1 << 16, ..SAMPLING };
    let pace = model.backend.pace();
    let refused = generate_at(pace, &model, &prompts, &sampling, |_| true, |_, _, _| {}).unwrap_err();
    assert!(matches!(&refused, GenerateError::Device(e) if e.out_of_memory), "{refused}");
}

// --------------------------------------------------------------------------------------------------- command line

#[test]
fn every_command_computes_on_the_device_that_it_is_told() {
    if !compiled() {
        return;
    }
    let f = Fixture::for_kernels();
    let note = "note: vm (a virtual GPU on the CPU) computes with bf16 weights; those of model are wider and were rounded";
    let sample =
        ["sample", "--model", "model", "--prompt", "1+1=", "--max-new-tokens", "3", "-n", "2", "--json"];
    let sampled = f.succeed(&[&sample[..], &["--device", "vm"]].concat());
    assert!(sampled.stderr.contains(note), "{}", sampled.stderr);
    assert_eq!(sampled.stdout.lines().count(), 2);

    // Close to the CPU's on the same rounded weights, and not the same.
    f.write("texts.jsonl", "{\"prompt\": \"1+1=2 and 2+2=4\"}\n");
    let scores = |device: &str| -> Vec<f64> {
        let args =
            ["logprobs", "--model", "model", "--input", "texts.jsonl", "--dtype", "bf16", "--device", device];
        let ran = f.succeed(&args);
        assert!(!ran.stderr.contains("rounded"), "that was asked for: {}", ran.stderr);
        let line: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        line["logprobs"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let (cpu, vm) = (scores("cpu"), scores("vm"));
    let off = cpu.iter().zip(&vm).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
    assert!(cpu.len() == vm.len() && off > 0.0 && off < 0.1, "off by {off}");

    let run = ["train", "run.toml", "--set", "train.steps=2", "--set", "generate.max_new_tokens=2"];
    let first = [&run[..], &["--set", "train.max_minutes=0.0001", "--device", "vm"]].concat();
    let trained = f.succeed(&first);
    assert!(trained.stderr.contains(note), "{}", trained.stderr);
    assert!(trained.stdout.contains(" --device vm --resume"), "{}", trained.stdout);
    let other = f.run(&[&run[..], &["--resume", "--device", "cpu"]].concat());
    assert_eq!(other.code, Some(1));
    let why = "--device: the run is on vm (a virtual GPU on the CPU), this is cpu";
    assert!(other.stderr.contains(why), "{}", other.stderr);
    f.succeed(&[&run[..], &["--resume", "--device", "vm"]].concat());
    let eval = ["eval", "run.toml", "--tasks", "eval.jsonl", "--samples", "2", "--device", "vm"];
    assert!(f.succeed(&eval).stdout.contains("pass@N"));
}

#[test]
fn devices_that_will_not_do_are_named_with_the_next_step() {
    if !compiled() {
        return;
    }
    let f = Fixture::new();
    let sample = ["sample", "--model", "model", "--prompt", "1", "--max-new-tokens", "2", "--device"];
    let error = |device: &[&str]| {
        let ran = f.run(&[&sample[..], device].concat());
        assert_ne!(ran.code, Some(0), "{device:?}");
        ran.stderr
    };
    let shape = error(&["vm"]);
    assert!(shape.contains("cannot run a model of this shape; --device cpu can:"), "{shape}");
    assert!(shape.contains("head_dim 8: the attention kernels are made for 64, 128, 256 and 512"), "{shape}");
    let wide = error(&["vm", "--dtype", "f32"]);
    assert!(wide.contains("computes with bf16 weights; ask for dtype bf16 or leave it out"), "{wide}");
    let products = error(&["vm", "--compute", "f32"]);
    assert!(
        products.contains("computes with bf16 products; ask for compute bf16 or leave it out"),
        "{products}"
    );
    let word = error(&["gpu"]);
    assert!(word.contains("must be auto, cpu, cuda, cuda:<number> or vm"), "{word}");
    let none = error(&["cuda:99"]);
    assert!(none.starts_with("error: cuda"), "{none}");
    // Without a word it is the CPU, where there is no GPU.
    if gpu().is_none() {
        let cpu = f.succeed(&[&sample[..], &["cpu"]].concat()).stdout;
        assert_eq!(f.succeed(&sample[..sample.len() - 1]).stdout, cpu);
    }
}

#[test]
fn kernels_tells_what_they_cost() {
    if !compiled() {
        return;
    }
    let f = Fixture::new();
    let args = ["kernels", "--op", "gather_rows", "--shape", "270m", "--chip", "a100"];
    let text = f.succeed(&args).stdout;
    for words in
        ["sm_100", "gather_rows 1536 of 2048 (Gemma 3 270M)", "  A100      op at least 1.93 us (memory)"]
    {
        assert!(text.contains(words), "no {words:?} in {text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&f.succeed(&[&args[..], &["--json"]].concat()).stdout).unwrap();
    let launch = &json["workloads"][0]["launches"]["A100"][0];
    assert_eq!((&launch["kernel"], &launch["local_bytes"]), (&"gather_rows".into(), &0.into()));
    assert_eq!(json["resources"].as_array().unwrap().len(), 5);
    assert!(f.run(&["kernels", "--op", "no_such"]).stderr.contains("no op or kernel has a name"));
}
