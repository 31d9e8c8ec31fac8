//! The real Gemma 3 270M on the virtual GPU: eight streams sampled by the kernels under all checks, their log-probs
//! beside the CPU's. It needs the weights (`make gemma`) and takes minutes, so `make vm-gemma` runs it and
//! `make test` does not.

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
use bon_engine::gemma::Gemma;
use bon_engine::generate::{Prompt, Response, Sampling, generate};
use bon_engine::model_dir::ModelDir;
use bon_engine::train::policy::{Continued, Forward};

use rounded::Rounded;
use tolerance::{Rule, assert_rule};

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

/// The log-probs of given responses, as training computes them.
fn score<B: Backend>(model: &Gemma<B>, ids: &[u32], responses: &[&[u32]]) -> Vec<f32> {
    let logprobs = Forward::new(model, &[Continued { prompt: ids, responses }], 1.0).logprobs;
    if let Err(e) = model.backend.check() {
        panic!("{e}");
    }
    logprobs
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
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
    let started = Instant::now();
    let responses: Vec<&[u32]> = sampled.iter().map(|r| r.tokens.as_slice()).collect();
    let at_sampling: Vec<f32> = sampled.iter().flat_map(|r| r.logprobs.iter().copied()).collect();
    let in_training = score(&vm, &ids, &responses);
    eprintln!("their log-probs in one pass: {:.0?}", started.elapsed());
    let exact = score(&cpu.model, &ids, &responses);
    let naive = score(&open(Rounded).model, &ids, &responses);
    let gap = largest(&at_sampling, &in_training);
    eprintln!("log-probs, largest difference: sampling to training {gap:e}");
    eprintln!(
        "  to the CPU in f32: kernels {:e}, naive bf16 {:e}",
        largest(&at_sampling, &exact),
        largest(&naive, &exact)
    );
    let same = sample(&cpu.model, &ids).iter().zip(&sampled).filter(|(a, b)| a.tokens == b.tokens).count();
    eprintln!("streams that the CPU samples token for token: {same} of {STREAMS}");
    assert_rule("log-probs", Rule::Forward, &at_sampling, &exact, &naive);
    assert_eq!(gap, 0.0, "a log-prob is one thing in sampling and another in training");
}
