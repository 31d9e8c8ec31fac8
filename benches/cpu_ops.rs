//! The CPU backend's heavy ops at the shapes of Gemma 3 270M, and forward and backward of its layers with activations
//! kept and computed again: `cargo bench --bench cpu_ops`.
//! Throughput is in FLOPs (criterion prints them as elements).

use bon_engine::backend::adamw::BLOCK;
use bon_engine::backend::cpu::{Cpu, Tensor, compute_on_this_thread, lm_head, matmul};
use bon_engine::backend::ops::*;
use bon_engine::backend::{
    AdamW, Choice, Compute, DType, HeadSpec, Moments, Quantised, Target, Truncation, Update, Weight,
};
use bon_engine::gemma::activations::Recompute;
use bon_engine::gemma::config::GemmaConfig;
use bon_engine::gemma::{Frozen, Gemma, params, published};
use bon_engine::rng::{Domain, DrawKey, Stream, derive_key};
use bon_engine::train::policy::{Continued, Forward};
use criterion::{Criterion, Throughput, criterion_group};
use half::bf16;

fn random(rows: usize, cols: usize, seed: u64) -> Tensor {
    let mut rng = Stream::new(seed, Domain::Sample, 0);
    let data = (0..rows * cols).map(|_| (rng.next_u64() >> 40) as f32 / (1 << 24) as f32 - 0.5).collect();
    Tensor::f32(rows, cols, data)
}

/// As models hold their weights.
fn to_bf16(x: &Tensor) -> Tensor {
    let data: Vec<bf16> = x.as_f32().iter().map(|v| bf16::from_f32(*v)).collect();
    Cpu::BF16.upload_weight(DType::Bf16, x.rows, x.cols, bytemuck::cast_slice(&data))
}

fn matmuls(c: &mut Criterion) {
    let mut group = c.benchmark_group("matmul");
    group.sample_size(10);
    for (t, out, k) in [(1, 2048, 640), (8, 2048, 640), (64, 2048, 640), (512, 2048, 640), (512, 640, 2048)] {
        let (x, w, dy) = (random(t, k, 1), to_bf16(&random(out, k, 2)), random(t, out, 3));
        group.throughput(Throughput::Elements((2 * t * out * k) as u64));
        for compute in [Compute::F32, Compute::Bf16] {
            let shape = format!("T{t} {k}->{out} in {compute:?}");
            group.bench_function(format!("forward {shape}"), |b| {
                b.iter(|| matmul::forward(&x, [&w], compute));
            });
            if t < 64 {
                continue;
            }
            let mut dx = random(t, k, 4);
            group.bench_function(format!("backward_input {shape}"), |b| {
                b.iter(|| matmul::backward_input(&dy, &w, &mut dx, compute));
            });
            let mut dw = random(out, k, 5);
            group.bench_function(format!("backward_weight {shape}"), |b| {
                b.iter(|| matmul::backward_weight(&dy, &x, &mut dw, compute));
            });
        }
    }
}

fn heads(c: &mut Criterion) {
    let mut group = c.benchmark_group("lm_head");
    group.sample_size(10);
    const V: usize = 262_144;
    const D: usize = 640;
    let embedding = to_bf16(&random(V, D, 1));
    let head = HeadSpec { softcap: None, temperature: 1.0 };
    let shapes = [1, 8, 64, 256].into_iter().flat_map(|rows| [(rows, Compute::F32), (rows, Compute::Bf16)]);
    for (rows, compute) in shapes {
        let x = random(rows, D, 2);
        group.throughput(Throughput::Elements((2 * rows * V * D) as u64));
        let key = derive_key(1, Domain::Sample, 0);
        let choices: Vec<Choice> = (0..rows as u32)
            .map(|stream| Choice::Draw(DrawKey { key, prompt: 0, stream, position: 9 }))
            .collect();
        let shape = format!("R{rows} in {compute:?}");
        group.bench_function(format!("sample {shape}"), |b| {
            b.iter(|| {
                Cpu { compute }.lm_head_sample(&x, &embedding, &head, &Truncation::default(), &choices)
            });
        });
        if rows < 64 {
            continue;
        }
        let targets: Vec<Target> =
            (0..rows as u32).map(|row| Target { row, token: row * 997 % V as u32 }).collect();
        group.bench_function(format!("logprob_forward {shape}"), |b| {
            b.iter(|| lm_head::logprob_forward(&x, &embedding, &head, &targets, false, compute));
        });
        let weights = vec![0.1; rows];
        let mut d_embedding = Tensor::f32(V, D, vec![0.0; V * D]);
        // As training does it: the gradient with logits that are computed again, or that were kept.
        for keep in [false, true] {
            let kept = if keep { ", logits kept" } else { "" };
            group.bench_function(format!("logprob_forward and backward {shape}{kept}"), |b| {
                b.iter(|| {
                    let (_, trace) = lm_head::logprob_forward(&x, &embedding, &head, &targets, keep, compute);
                    let (embedding, targets, weights) = (&embedding, &targets, &weights);
                    lm_head::logprob_backward(
                        &x,
                        embedding,
                        &head,
                        &trace,
                        targets,
                        weights,
                        &mut d_embedding,
                        compute,
                    )
                });
            });
        }
    }
}

/// Log-probs of 8 responses to a prompt and their gradient. Of the vocabulary there is a part, so that the head does not
/// hide the layers.
fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(10);
    let config = GemmaConfig { vocab_size: 4096, ..published::gemma_3_270m() };
    let mut seed = 0;
    let params = params::plan(&config).map(|spec| {
        seed += 1;
        let mut x = random(spec.rows, spec.cols, seed);
        x.as_f32_mut().iter_mut().for_each(|x| *x *= 0.1);
        to_bf16(&x)
    });
    let frozen = Frozen { scalars: vec![1.0; config.layers.len()], per_layer_embed: None };
    let model = Gemma { backend: Cpu::BF16, config, params, frozen, adapter_scale: None };
    let tokens =
        |n: u32, seed: u32| -> Vec<u32> { (0..n).map(|i| 3 + (i * 97 + seed * 31) % 4000).collect() };
    let (prompt, responses) = (tokens(128, 0), (1..=8).map(|seed| tokens(49, seed)).collect::<Vec<_>>());
    let responses: Vec<&[u32]> = responses.iter().map(Vec::as_slice).collect();
    let mut grads = model.params.zeros_like(&Cpu::BF16);
    for (name, recompute) in [("kept", Recompute::None), ("computed again", Recompute::All)] {
        group.bench_function(format!("T512 activations {name}"), |b| {
            b.iter(|| {
                let continued = Continued { prompt: &prompt, responses: &responses };
                let forward = Forward::with(&model, &[continued], 1.0, recompute);
                let weights = vec![1.0; forward.logprobs.len()];
                forward.backward(&model, &weights, &mut grads);
            });
        });
    }
}

/// AdamW of bf16 weights of a matrix as large as 32 of the model's: throughput is in parameters.
fn updates(c: &mut Criterion) {
    let mut group = c.benchmark_group("adamw");
    group.sample_size(10);
    const ROWS: usize = 32 * 2048;
    const D: usize = 640;
    group.throughput(Throughput::Elements((ROWS * D) as u64));
    let hyper = AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 3, grad_scale: 0.5, key: [5, 6] };
    let cpu = Cpu::BF16;
    let start = random(ROWS, D, 1);
    for (name, masters, blockwise) in [
        ("f32 moments", true, false),
        ("8-bit moments", true, true),
        ("8-bit moments, no masters", false, true),
    ] {
        let (mut weight, mut master) = (to_bf16(&start), start.clone());
        let mut grad = random(ROWS, D, 2);
        let mut moments = if blockwise {
            let zeros = || Quantised {
                codes: cpu.zero_codes(ROWS * D),
                scales: cpu.zeros(DType::F32, 1, (ROWS * D).div_ceil(BLOCK)),
            };
            Moments::Blockwise { m: zeros(), v: zeros() }
        } else {
            let zeros = || cpu.zeros(DType::F32, ROWS, D);
            Moments::F32 { m: zeros(), v: zeros() }
        };
        let mut update = |grad: &mut Tensor| {
            let weight = match masters {
                true => Weight::Master { master: &mut master, copy: &mut weight },
                false => Weight::Bf16 { weight: &mut weight, number: 0 },
            };
            let moments = &mut moments;
            cpu.adamw(&hyper, &mut [Update { grad, moments, weight, weight_decay: 0.1 }]);
        };
        // Later ones have gradients of zero, and moments that are not.
        update(&mut grad);
        group.bench_function(name, |b| b.iter(|| update(&mut grad)));
    }
}

criterion_group!(benches, matmuls, heads, steps, updates);

fn main() {
    compute_on_this_thread();
    benches();
    Criterion::default().configure_from_args().final_summary();
}
