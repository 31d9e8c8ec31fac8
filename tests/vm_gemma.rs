//! The real Gemma 3 270M on the virtual GPU: eight streams sampled by the kernels under all checks, their log-probs
//! and the gradient of a training step beside the CPU's. It needs the weights (`make gemma`) and takes minutes, so
//! `make vm-gemma` runs it and `make test` does not.

#[path = "suite/rounded/mod.rs"]
mod rounded;
#[allow(dead_code, reason = "the other tests use the rest")]
#[path = "suite/tolerance.rs"]
mod tolerance;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Truncation};
use bon_engine::device::vm::{Options, Vm};
use bon_engine::gemma::{Gemma, params};
use bon_engine::generate::{Prompt, Response, Sampling, generate};
use bon_engine::model_dir::{ComputeChoice, ModelDir, Precision};
use bon_engine::train::policy::{Continued, Forward};

use rounded::Rounded;
use tolerance::{BF16_ROUNDOFF, Rule, assert_rule, rms};

const PROMPT: &str = "3 + 4 = 7\n6 + 1 = 7\n5 + 9 =";
const STREAMS: usize = 8;
/// The first token comes from the prefill, each further one from a decode step.
const DECODE_STEPS: usize = 8;

/// With the CPU's products in f32: they are what the kernels are held to.
fn open<B: Backend>(backend: B, compute: ComputeChoice) -> ModelDir<B> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/gemma-3-270m");
    ModelDir::open(backend, &dir, Precision { compute, ..Precision::default() })
        .unwrap_or_else(|e| panic!("{e}"))
}

fn sample<B: Backend>(model: &Gemma<B>, ids: &[u32]) -> Vec<Response> {
    let sampling = Sampling {
        temperature: 1.0,
        truncation: Truncation::default(),
        max_new_tokens: 1 + DECODE_STEPS,
        seed: 1,
        step: 0,
    };
    let prompt = Prompt { ids, number: 0, streams: STREAMS };
    generate(model, &[prompt], &sampling, |_| false, |_, _, _| {}).unwrap_or_else(|e| panic!("{e}")).remove(0)
}

/// What training computes of given responses.
struct Step {
    logprobs: Vec<f32>,
    /// Of every parameter, by name.
    gradients: Vec<(String, Vec<f32>)>,
}

/// The log-probs of the responses, and the gradient under these weights of their tokens.
fn step<B: Backend>(model: &Gemma<B>, ids: &[u32], responses: &[&[u32]], weights: &[f32]) -> Step {
    let forward = Forward::new(model, &[Continued { prompt: ids, responses }], 1.0);
    let logprobs = forward.logprobs.clone();
    let mut grads = model.params.zeros_like(&model.backend);
    forward.backward(model, weights, &mut grads);
    let specs = params::plan(&model.config);
    let names = specs.tensors().into_iter().map(|s| s.name.clone());
    let gradients = names.zip(grads.tensors().into_iter().map(|g| model.backend.to_f32(g))).collect();
    if let Err(e) = model.backend.check() {
        panic!("{e}");
    }
    Step { logprobs, gradients }
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// |got - want| and |want|, the Euclidean norms, of every tensor of a gradient.
fn distances(got: &Step, want: &Step) -> Vec<(f64, f64)> {
    let tensors = got.gradients.iter().zip(&want.gradients);
    let norm = |a: &[f32], b: &[f32], f: fn(f64, f64) -> f64| {
        rms(a.iter().zip(b).map(|(a, b)| f(f64::from(*a), f64::from(*b)))) * (a.len() as f64).sqrt()
    };
    tensors.map(|((_, a), (_, b))| (norm(a, b, |a, b| a - b), norm(a, b, |_, b| b))).collect()
}

/// The distance over the length, all parameters taken as one vector.
fn whole(tensors: &[(f64, f64)]) -> f64 {
    let (off, size) = tensors.iter().fold((0.0, 0.0), |(a, b), (off, size)| (a + off * off, b + size * size));
    (off / size).sqrt()
}

/// What a parameter is in its layer: its name without the layer's number.
fn role(name: &str) -> &str {
    name.split_once("layers.").and_then(|(_, rest)| rest.split_once('.')).map_or(name, |(_, role)| role)
}

/// Holds a gradient to the rule as a whole, and tensor by tensor. A few channels of the residual stream are far larger
/// than the others (Sun et al. 2024, "Massive Activations in Large Language Models"): the gradient of a
/// norm's weight is mostly theirs, a sum that cancels over the tokens, so that its error in one layer is one draw, and
/// may happen to be small in the naive implementation. So a tensor is measured by the worst of its role in all layers.
fn assert_gradient(got: &Step, exact: &Step, naive: &Step) {
    let (off, naive) = (distances(got, exact), distances(naive, exact));
    let (all, naive_all) = (whole(&off), whole(&naive));
    eprintln!("gradient, distance to the CPU's over its length: kernels {all:.4}, naive bf16 {naive_all:.4}");
    let allowed = |naive: f64| Rule::Backward.factor() * naive + BF16_ROUNDOFF;
    assert!(all <= allowed(naive_all), "the gradient: {all}, naive bf16 {naive_all}");
    let mut worst: BTreeMap<&str, f64> = BTreeMap::new();
    for ((name, _), (off, size)) in exact.gradients.iter().zip(&naive) {
        assert!(*size > 0.0, "{name} has no gradient");
        let worst = worst.entry(role(name)).or_default();
        *worst = worst.max(off / size);
    }
    for ((name, _), (off, size)) in exact.gradients.iter().zip(&off) {
        let (off, naive) = (off / size, worst[role(name)]);
        assert!(off <= allowed(naive), "{name}: {off}, naive bf16 in the worst layer {naive}");
    }
}

#[test]
fn gemma_3_270m_on_the_kernels_is_the_cpus_within_bf16() {
    let cpu = open(Cpu::F32, ComputeChoice::F32);
    let ids = cpu.tokenizer.encode_prompt(PROMPT).unwrap();
    let vm = Cuda::new(Box::new(Vm::new(Options::default()))).unwrap_or_else(|e| panic!("{e}"));
    let vm = open(vm, ComputeChoice::Auto).model;
    let started = Instant::now();
    let sampled = sample(&vm, &ids);
    eprintln!(
        "{} streams of {} tokens after {} of prompt: {:.0?} on the virtual GPU, all checks on",
        STREAMS,
        1 + DECODE_STEPS,
        ids.len(),
        started.elapsed()
    );
    let responses: Vec<&[u32]> = sampled.iter().map(|r| r.tokens.as_slice()).collect();
    let at_sampling: Vec<f32> = sampled.iter().flat_map(|r| r.logprobs.iter().copied()).collect();
    // As an objective would: some streams are to become likelier, others less.
    let weight = |(i, r): (usize, &Response)| vec![[1.0, -1.0, -0.5][i % 3] / STREAMS as f32; r.tokens.len()];
    let weights: Vec<f32> = sampled.iter().enumerate().flat_map(weight).collect();
    let started = Instant::now();
    let got = step(&vm, &ids, &responses, &weights);
    eprintln!("their log-probs and gradient in one pass: {:.0?}", started.elapsed());
    drop(vm);
    let exact = step(&cpu.model, &ids, &responses, &weights);
    let naive = step(&open(Rounded, ComputeChoice::Auto).model, &ids, &responses, &weights);
    let gap = largest(&at_sampling, &got.logprobs);
    eprintln!("log-probs, largest difference: sampling to training {gap:e}");
    eprintln!(
        "  to the CPU in f32: kernels {:e}, naive bf16 {:e}",
        largest(&at_sampling, &exact.logprobs),
        largest(&naive.logprobs, &exact.logprobs)
    );
    let same = sample(&cpu.model, &ids).iter().zip(&sampled).filter(|(a, b)| a.tokens == b.tokens).count();
    eprintln!("streams that the CPU samples token for token: {same} of {STREAMS}");
    assert_rule("log-probs", Rule::Forward, &at_sampling, &exact.logprobs, &naive.logprobs);
    assert_eq!(gap, 0.0, "a log-prob is one thing in sampling and another in training");
    assert_gradient(&got, &exact, &naive);
}
