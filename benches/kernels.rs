//! The CUDA kernels at the shapes of real models: `cargo bench --bench kernels`.
//!
//! With a GPU: each op's time by CUDA events, its inputs random and out of the L2 cache, in criterion's statistics, and
//! the bytes or FLOPs that the op itself needs per second. What an op does besides its kernels is in its time: tables
//! that it uploads, tokens and log-probs that it reads back. Without a GPU nothing can be timed: the bounds of
//! `bon-engine kernels` are printed instead, for Gemma 3 270M. A name, or its beginning, as an argument chooses ops.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark speaks to whoever runs it")]

use std::time::Duration;

use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::ops::*;
use bon_engine::cost::figures::{CHIPS, figures};
use bon_engine::cost::workloads::{GEMMA_2B, GEMMA_270M, Workload, whole_workloads, workloads};
use bon_engine::device::driver::Gpu;
use bon_engine::device::{Device, DeviceError};
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};

/// More than the L2 cache of any chip.
const FLUSH_BYTES: usize = 256 << 20;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    match Gpu::open(0) {
        Ok(gpu) => {
            eprintln!("{}", gpu.name());
            if let Err(e) = on_gpu(&mut criterion, gpu) {
                panic!("{e}");
            }
        }
        Err(e) => {
            println!("no kernel is timed: {e}");
            counted();
        }
    }
    criterion.final_summary();
}

/// Every op at every shape.
fn on_gpu(criterion: &mut Criterion, gpu: Gpu) -> Result<(), DeviceError> {
    let cuda = Cuda::new(Box::new(gpu))?;
    let flush = cuda.device().alloc(FLUSH_BYTES)?;
    for model in [GEMMA_2B, GEMMA_270M] {
        let mut group = criterion.benchmark_group(model.name);
        // Criterion counts what the events say, not the flushes between, which take a hundred times as long as the
        // smallest ops: a second of those would be minutes.
        group
            .sample_size(20)
            .sampling_mode(SamplingMode::Flat)
            .warm_up_time(Duration::from_millis(300))
            .measurement_time(Duration::from_millis(10));
        for Workload { name, bytes, flops, prepare } in whole_workloads(&model) {
            // Criterion prints what it is told as bytes or elements per second.
            let per_op = match flops {
                0 => Throughput::Bytes(bytes),
                flops => Throughput::Elements(flops),
            };
            group.throughput(per_op);
            group.bench_function(BenchmarkId::from_parameter(&name), |b| {
                // The driver compiles and the arena grows before anything is timed.
                prepare(&cuda)(&cuda);
                b.iter_custom(|times| {
                    let mut total = 0.0;
                    for _ in 0..times {
                        // New inputs for every run, made on the device: AdamW leaves gradients of zero behind.
                        let run = prepare(&cuda);
                        let flushed = cuda.device().fill(flush, 0, FLUSH_BYTES);
                        let seconds = flushed.and_then(|()| cuda.device().timed(&mut || run(&cuda)));
                        total += seconds.unwrap_or_else(|e| panic!("{name}: {e}"));
                    }
                    Duration::from_secs_f64(total)
                });
            });
            cuda.check()?;
        }
    }
    Ok(())
}

/// What stands in for times where there is no GPU.
fn counted() {
    for workload in workloads(&GEMMA_270M) {
        match figures(GEMMA_270M.name, &workload, &CHIPS) {
            Ok(found) => {
                let bounds = CHIPS.iter().map(|chip| {
                    let bounds = &found.bounds[chip.name];
                    let us = 1e6 * bounds.kernels.seconds;
                    format!("{} {us:.2} us ({:.0} %)", chip.name, 100.0 * bounds.reach())
                });
                println!("{}: at least {}", found.workload, bounds.collect::<Vec<_>>().join(", "));
            }
            Err(e) => {
                println!("{e}");
                return;
            }
        }
    }
}
