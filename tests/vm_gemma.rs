//! The real Gemma 3 270M on the virtual GPU: eight streams sampled by the kernels under all checks, their log-probs
//! and the gradient of a training step beside the CPU's. It needs the weights (`make gemma`) and takes minutes, so
//! `make vm-gemma` runs it and `make test` does not.

#[path = "suite/rounded/mod.rs"]
mod rounded;
#[allow(dead_code)] // the other tests use the rest
#[path = "suite/tolerance.rs"]
mod tolerance;

use std::path::Path;
use std::time::Instant;

use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::{Backend, Truncation};
use bon_engine::device::vm::{Options, Vm};
use bon_engine::gemma::{Gemma, params};
use bon_engine::generate::{Prompt, Response, Sampling, generate};
use bon_engine::model_dir::ModelDir;
use bon_engine::train::policy::{Continued, Forward};

use rounded::Rounded;
use tolerance::{Rule, assert_rule, rms};

const PROMPT: &str = "3 + 4 = 7\n6 + 1 = 7\n5 + 9 =";
const STREAMS: usize = 8;
/// The first token comes from the prefill, each further one from a decode step.
const DECODE_STEPS: usize = 8;

fn open<B: Backend>(backend: B) -> ModelDir<B> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/gemma-3-270m");
    ModelDir::open(backend, &dir, None).unwrap_or_else(|e| panic!("{e}"))
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

/// How far two gradients are apart, all parameters taken as one vector, over the length of the second.
fn apart(got: &Step, want: &Step) -> f64 {
    let all = |f: &dyn Fn(f64, f64) -> f64| {
        let tensors = got.gradients.iter().zip(&want.gradients);
        let of = |(a, b): (&f32, &f32)| f(f64::from(*a), f64::from(*b));
        let sums = tensors.map(|((_, a), (_, b))| rms(a.iter().zip(b).map(of)).powi(2) * a.len() as f64);
        sums.sum::<f64>().sqrt()
    };
    all(&|a, b| a - b) / all(&|_, b| b)
}

#[test]
fn gemma_3_270m_on_the_kernels_is_the_cpus_within_bf16() {
    let cpu = open(Cpu);
    let ids = cpu.tokenizer.encode_prompt(PROMPT).unwrap();
    let vm = Cuda::new(Box::new(Vm::new(Options::default()))).unwrap_or_else(|e| panic!("{e}"));
    let vm = open(vm).model;
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
    let naive = step(&open(Rounded).model, &ids, &responses, &weights);
    let gap = largest(&at_sampling, &got.logprobs);
    eprintln!("log-probs, largest difference: sampling to training {gap:e}");
    eprintln!(
        "  to the CPU in f32: kernels {:e}, naive bf16 {:e}",
        largest(&at_sampling, &exact.logprobs),
        largest(&naive.logprobs, &exact.logprobs)
    );
    eprintln!(
        "gradient, distance to the CPU's over its length: kernels {:.4}, naive bf16 {:.4}",
        apart(&got, &exact),
        apart(&naive, &exact)
    );
    let same = sample(&cpu.model, &ids).iter().zip(&sampled).filter(|(a, b)| a.tokens == b.tokens).count();
    eprintln!("streams that the CPU samples token for token: {same} of {STREAMS}");
    assert_rule("log-probs", Rule::Forward, &at_sampling, &exact.logprobs, &naive.logprobs);
    assert_eq!(gap, 0.0, "a log-prob is one thing in sampling and another in training");
    for (i, (name, want)) in exact.gradients.iter().enumerate() {
        assert!(want.iter().any(|g| *g != 0.0), "{name} has no gradient");
        assert_rule(name, Rule::Backward, &got.gradients[i].1, want, &naive.gradients[i].1);
    }
}
