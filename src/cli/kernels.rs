//! `bon-engine kernels`: what the kernels cost, without a GPU.

use std::io::Write;

use anyhow::bail;
use serde::Serialize;

use super::progress::note;
use crate::backend::cuda::figures::{
    Bound, CHIPS, Chip, Counted, Figures, Resources, all_resources, figures,
};
use crate::backend::cuda::workload::{GEMMA_2B, GEMMA_270M, Shape, workloads};

/// GPU architectures that ptxas assembles for.
pub const ARCHS: [&str; 5] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"];

/// Arguments of `kernels`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
No figure is measured on a GPU. Registers and shared memory are what ptxas says. Instructions, bytes and wavefronts are \
counted on the virtual GPU, which runs every op once at the shapes of a real model; that takes minutes for all of \
them. The times are bounds by the limits of a chip's data sheet, with all inputs in memory and an instruction issued for \
each of PTX: of the op itself (each input read once, each output written once, useful FLOPs alone), and of what the \
kernels did.")]
pub struct Args {
    /// Only ops and kernels whose names begin so, as in --op matmul
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    op: String,
    /// Shapes of this model: 2b (Gemma 2B) or 270m (Gemma 3 270M) [default: both]
    #[arg(long, value_name = "MODEL", value_parser = parse_shape)]
    shape: Option<Shape>,
    /// Times on this chip alone: a100 (SXM, 80 GB), rtx4090 or h100 (SXM) [default: all]
    #[arg(long, value_name = "CHIP", value_parser = parse_chip)]
    chip: Option<Chip>,
    /// Registers and shared memory alone: nothing is run
    #[arg(long)]
    resources: bool,
    /// Write JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct All {
    resources: Vec<Resources>,
    workloads: Vec<Figures>,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let resources = match all_resources(&ARCHS, &args.op) {
        Ok(resources) => resources,
        Err(e) => {
            note(&format!("no registers and shared memory: {}", chain(&e)));
            Vec::new()
        }
    };
    let mut out = std::io::stdout().lock();
    if !args.json {
        write_resources(&resources, &mut out)?;
    }
    let shapes = args.shape.map_or_else(|| vec![GEMMA_2B, GEMMA_270M], |shape| vec![shape]);
    let chips: Vec<Chip> = args.chip.map_or_else(|| CHIPS.to_vec(), |chip| vec![chip]);
    let mut all = Vec::new();
    if !args.resources {
        for shape in &shapes {
            for workload in workloads(shape).iter().filter(|w| w.name.starts_with(&args.op)) {
                let found = figures(shape.name, workload, &chips)?;
                if !args.json {
                    write_figures(&found, &chips, &mut out)?;
                }
                all.push(found);
            }
        }
    }
    if all.is_empty() && resources.is_empty() {
        bail!("no op or kernel has a name that begins with {:?}", args.op);
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&All { resources, workloads: all })?)?;
    }
    Ok(())
}

fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(e) = source {
        text.push_str(&format!(": {e}"));
        source = e.source();
    }
    text
}

/// A line per kernel, a column per architecture.
fn write_resources(resources: &[Resources], out: &mut impl Write) -> std::io::Result<()> {
    if resources.is_empty() {
        return Ok(());
    }
    write!(out, "{:<44}", "registers of a thread")?;
    for arch in ARCHS {
        write!(out, "{arch:>8}")?;
    }
    writeln!(out, "  static shared memory, spills")?;
    let mut kernels: Vec<&str> = resources.iter().map(|r| r.kernel.as_str()).collect();
    kernels.sort_unstable();
    kernels.dedup();
    for kernel in kernels {
        let of: Vec<&Resources> = resources.iter().filter(|r| r.kernel == kernel).collect();
        write!(out, "{kernel:<44}")?;
        for arch in ARCHS {
            match of.iter().find(|r| r.arch == arch) {
                Some(r) => write!(out, "{:>8}", r.registers)?,
                None => write!(out, "{:>8}", "-")?,
            }
        }
        let shared = of.iter().map(|r| r.shared).max().unwrap_or(0);
        let spilled: u32 = of.iter().map(|r| r.stack + r.spill_stores + r.spill_loads).sum();
        let spilled = if spilled == 0 { "none".to_owned() } else { format!("{spilled} BYTES") };
        writeln!(out, "  {shared} bytes, {spilled}")?;
    }
    writeln!(out)
}

fn write_figures(f: &Figures, chips: &[Chip], out: &mut impl Write) -> std::io::Result<()> {
    let flops = if f.flops > 0 { format!(", {} useful FLOPs", count(f.flops)) } else { String::new() };
    writeln!(out, "{} ({}): {} compulsory bytes{flops}", f.workload, f.model, count(f.bytes))?;
    for launch in &f.launches {
        writeln!(out, "  {}", launch_line(launch))?;
    }
    for chip in chips {
        if let Some(bounds) = f.bounds.get(chip.name) {
            writeln!(
                out,
                "  {:<9} op at least {}, these kernels at least {}: {:.0} % of the way",
                chip.name,
                bound(&bounds.op),
                bound(&bounds.kernels),
                100.0 * bounds.reach()
            )?;
        }
    }
    writeln!(out)
}

fn launch_line(l: &Counted) -> String {
    let blocks: u64 = l.grid.iter().map(|n| u64::from(*n)).product();
    let threads: u32 = l.block.iter().product();
    let mut line = format!(
        "{}: {blocks} blocks of {threads}, {} instructions of warps, {} bytes touched, {} asked for",
        l.kernel,
        count(l.instructions),
        count(l.unique_bytes),
        count(l.requested_bytes)
    );
    if l.requested_bytes > l.ideal_bytes {
        let over = l.requested_bytes as f64 / l.ideal_bytes.max(1) as f64;
        line.push_str(&format!(" ({over:.2} x coalesced)"));
    }
    if l.mma > 0 {
        let others = (l.instructions - l.mma) as f64 / l.mma as f64;
        line.push_str(&format!(", {} tensor FLOPs, {others:.2} others per mma", count(l.mma_flops)));
    }
    if l.wavefronts > 0 {
        let conflicts = l.wavefronts as f64 / l.ideal_wavefronts.max(1) as f64;
        line.push_str(&format!(
            ", {} wavefronts of shared memory ({conflicts:.2} x conflict-free)",
            count(l.wavefronts)
        ));
    }
    if l.local_bytes > 0 {
        line.push_str(&format!(", {} BYTES OF LOCAL MEMORY", count(l.local_bytes)));
    }
    line
}

fn bound(b: &Bound) -> String {
    let limit = format!("{:?}", b.limit).to_lowercase();
    let us = 1e6 * b.seconds;
    let digits = if us < 10.0 { 2 } else { 0 };
    format!("{us:.digits$} us ({limit})")
}

/// `12.3 M`.
fn count(n: u64) -> String {
    let n = n as f64;
    match n {
        n if n < 1e4 => format!("{n}"),
        n if n < 1e6 => format!("{:.1} k", n / 1e3),
        n if n < 1e9 => format!("{:.1} M", n / 1e6),
        n if n < 1e12 => format!("{:.1} G", n / 1e9),
        n => format!("{:.2} T", n / 1e12),
    }
}

fn parse_shape(text: &str) -> Result<Shape, &'static str> {
    match text {
        "2b" => Ok(GEMMA_2B),
        "270m" => Ok(GEMMA_270M),
        _ => Err("must be 2b or 270m"),
    }
}

fn parse_chip(text: &str) -> Result<Chip, &'static str> {
    let plain = |name: &str| name.replace(' ', "").to_lowercase();
    CHIPS.into_iter().find(|chip| plain(chip.name) == plain(text)).ok_or("must be a100, rtx4090 or h100")
}
