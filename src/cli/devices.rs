//! `bon-engine devices`: what this program can compute on.

use std::io::Write;

use crate::backend::cpu::simd::{Isa, isa};
use crate::backend::cuda::entries::{NO_KERNELS, compiled};
use crate::device::driver::{self, Description};

/// Arguments of `devices`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_: Args) -> anyhow::Result<()> {
    let threads = rayon::current_num_threads();
    let vectors = match isa() {
        Isa::Avx512Bf16 => "AVX-512 with bf16",
        Isa::Avx512 => "AVX-512",
        Isa::Avx2 => "AVX2 and FMA",
        Isa::Portable => "portable vector code",
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "cpu     {vectors}, {threads} threads (RAYON_NUM_THREADS changes that)")?;
    if !compiled() {
        writeln!(out, "cuda    none: {NO_KERNELS}")?;
        writeln!(out, "vm      none: {NO_KERNELS}")?;
        return Ok(());
    }
    match driver::gpus() {
        Ok(gpus) => {
            for gpu in &gpus {
                writeln!(out, "{:<7} {}", format!("cuda:{}", gpu.ordinal), described(gpu))?;
            }
            if gpus.is_empty() {
                writeln!(out, "cuda    none: the driver sees no GPU")?;
            }
        }
        Err(e) => writeln!(out, "cuda    none: {}", e.message)?,
    }
    writeln!(
        out,
        "vm      a virtual GPU on the CPU, which checks every access of the kernels; slow, for tests"
    )?;
    Ok(())
}

fn described(gpu: &Description) -> String {
    let (major, minor) = gpu.capability;
    let memory = gpu.memory as f64 / (1u64 << 30) as f64;
    let cuda = format!("CUDA {}.{}", gpu.driver.0, gpu.driver.1);
    let told = format!("{}, {memory:.1} GiB, compute capability {major}.{minor}, driver of {cuda}", gpu.name);
    if gpu.usable {
        told
    } else {
        format!("{told}; too old: the kernels need compute capability 8.0 or newer")
    }
}
