//! `bon-engine devices`: what this program can compute on.

use std::io::Write;

use crate::backend::cpu::simd::{Isa, isa};

/// Arguments of `devices`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the command.
pub fn run(_: Args) -> anyhow::Result<()> {
    let threads = rayon::current_num_threads();
    let vectors = match isa() {
        Isa::Avx512 => "AVX-512",
        Isa::Avx2 => "AVX2 and FMA",
        Isa::Portable => "portable vector code",
    };
    let mut out = std::io::stdout().lock();
    writeln!(out, "cpu   {vectors}, {threads} threads (RAYON_NUM_THREADS changes that)")?;
    writeln!(out, "cuda  not part of this build")?;
    writeln!(out, "vm    not part of this build")?;
    Ok(())
}
