//! `bon-engine kernels`: what the kernels cost, without a GPU; with `--device cuda`, what its driver makes of them.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Serialize;

use super::engine::DeviceChoice;
use super::gpu_kernels;
use super::progress::note;
use super::step;
use crate::checkpoint::atomic;
use crate::cost::figures::{
    Bound, CHIPS, Chip, Counted, Figures, FiguresError, Resources, all_resources, figures,
};
use crate::cost::workloads::{GEMMA_2B, GEMMA_270M, Model, Workload, workloads};

/// GPU architectures that ptxas assembles for.
pub const ARCHS: [&str; 5] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100"];

/// Arguments of `kernels`.
#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
No figure is measured on a GPU. Registers and shared memory are what ptxas says. Instructions, bytes and wavefronts are \
counted on the virtual GPU, which runs every op once at the shapes of a real model; that takes minutes for all of \
them, for every chip by itself, since launches depend on the number of multiprocessors. The times are modelled: bounds by \
the limits of a chip, with all inputs in memory and an instruction issued for each of PTX: of the op itself (each input \
read once, each output written once, useful FLOPs alone), and of what the kernels did, by the whole chip and by the \
multiprocessor with the most to do. With --device cuda the driver is asked instead: registers, local memory and machine \
code of every kernel as it loaded them, and, unless --resources is given, the launches of every op, which is run once, \
with the blocks that a multiprocessor holds of each.")]
pub struct Args {
    /// Only ops and kernels whose names begin so, as in --op matmul
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    op: String,
    /// Shapes of this model: 2b (Gemma 2B) or 270m (Gemma 3 270M) [default: both]
    #[arg(long, value_name = "MODEL", value_parser = parse_shape)]
    shape: Option<Model>,
    /// Times on this chip alone: a100 (SXM, 80 GB), rtx4090 or h100 (SXM) [default: all]
    #[arg(long, value_name = "CHIP", value_parser = parse_chip)]
    chip: Option<Chip>,
    /// Ask the driver of a GPU, cuda or cuda:1, instead of ptxas and the virtual GPU [default: vm]
    #[arg(long, value_name = "DEVICE", conflicts_with = "chip")]
    device: Option<DeviceChoice>,
    /// Registers and shared memory alone: nothing is run
    #[arg(long)]
    resources: bool,
    /// A whole decode step of Gemma 3 270M, 3 1B and 2B instead (--shape, --chip: of one), and the time it should take
    #[arg(long, conflicts_with_all = ["resources", "op", "device"])]
    step: bool,
    /// Write the figures of Gemma 2B on A100 and H100 into the tables of kernels/README.md
    #[arg(long, value_name = "PATH", conflicts_with_all = ["step", "resources", "op", "shape", "chip", "device", "json"])]
    readme: Option<PathBuf>,
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
    if let Some(path) = &args.readme {
        return write_readme(path);
    }
    let chips: Vec<Chip> = args.chip.map_or_else(|| CHIPS.to_vec(), |chip| vec![chip]);
    if args.step {
        let mut out = std::io::stdout().lock();
        let told = |found: &step::Step| if args.json { Ok(()) } else { step::write(found, &mut out) };
        let steps = step::steps(args.shape.map_or("", |model| model.name), &chips, told)?;
        if args.json {
            writeln!(out, "{}", serde_json::to_string_pretty(&steps)?)?;
        }
        return Ok(());
    }
    let models = args.shape.map_or_else(|| vec![GEMMA_2B, GEMMA_270M], |model| vec![model]);
    match args.device {
        None | Some(DeviceChoice::Vm) => {}
        Some(DeviceChoice::Cuda(ordinal)) => {
            let models = if args.resources { &[] } else { &models[..] };
            return gpu_kernels::run(ordinal, &args.op, models, args.json);
        }
        Some(other) => bail!("--device {other} has no kernels to ask for: leave it out, or give cuda or vm"),
    }
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
    let mut all = Vec::new();
    if !args.resources {
        for model in &models {
            for workload in workloads(model).iter().filter(|w| w.name.starts_with(&args.op)) {
                let found = figures(model.name, workload, &chips)?;
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
    let mut told: Option<&[Counted]> = None;
    for chip in chips {
        let (Some(bounds), Some(launches)) = (f.bounds.get(chip.name), f.launches.get(chip.name)) else {
            continue;
        };
        // Most launches are the same on all chips.
        if told != Some(launches.as_slice()) {
            for launch in launches {
                writeln!(out, "  {}", launch_line(launch))?;
            }
            told = Some(launches);
        }
        let each: Vec<String> = launches.iter().map(|l| format!("{:.2}", chip.blocks_each(l))).collect();
        writeln!(
            out,
            "  {:<9} op at least {}, these kernels at least {}: {:.0} % of the way; {} blocks for each multiprocessor",
            chip.name,
            bound(&bounds.op),
            bound(&bounds.kernels),
            100.0 * bounds.reach(),
            each.join(", ")
        )?;
    }
    writeln!(out)
}

fn launch_line(l: &Counted) -> String {
    let blocks = l.blocks();
    let threads: u32 = l.block.iter().product();
    let mut line = format!(
        "{}: {blocks} blocks of {threads}, {} instructions of warps, {} unique bytes, {} requested",
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
    let us = 1e6 * b.seconds;
    let digits = if us < 10.0 { 2 } else { 0 };
    format!("{us:.digits$} us ({})", b.label())
}

// ------------------------------------------------------------------------------------------ the tables of the README

/// The chips of the tables in kernels/README.md, and what the models' shapes are.
const TABLE_CHIPS: [Chip; 2] = [CHIPS[0], CHIPS[2]];
/// Where figures of an op's workloads stand in kernels/README.md: beginnings of their names, and headings of sections. What
/// no line names has its figures in the last.
const SECTIONS: [(&str, &str); 8] = [
    ("matmul_", "## matmul.cu"),
    ("geglu_forward", "## matmul.cu"),
    ("attention_forward", "## attention.cu"),
    ("attention_backward", "## attention_backward.cu"),
    ("lm_head", "## lm_head.cu"),
    ("route_", "## experts.cu"),
    ("experts_", "## experts.cu"),
    ("", "## What memory limits"),
];
/// The first two lines of each table.
pub const TABLE_HEAD: [&str; 2] = [
    "| work | bytes | FLOPs | unique | requested | tensor | other per mma | blocks / SMs, A100 | least on A100 | limit \
     | blocks / SMs, H100 | least on H100 | limit |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
];

/// The section of kernels/README.md that tells of a workload.
pub fn section_of(workload: &str) -> &'static str {
    SECTIONS.iter().find(|(op, _)| workload.starts_with(op)).map_or("", |(_, heading)| heading)
}

/// Counts a workload of Gemma 2B for its line in kernels/README.md.
///
/// # Errors
/// Those of [`figures`].
pub fn table_line(workload: &Workload) -> Result<String, FiguresError> {
    let f = figures(GEMMA_2B.name, workload, &TABLE_CHIPS)?;
    // Ratios are the same on both chips, or nearly: tiles differ.
    let launches = &f.launches[TABLE_CHIPS[0].name];
    let sum = |of: fn(&Counted) -> u64| launches.iter().map(of).sum::<u64>() as f64;
    let over = |n: f64, all: u64, digits: usize| match all {
        0 => "-".to_owned(),
        all => format!("{:.digits$}", n / all as f64),
    };
    let products: Vec<&Counted> = launches.iter().filter(|launch| launch.mma > 0).collect();
    let mma: u64 = products.iter().map(|launch| launch.mma).sum();
    let others = products.iter().map(|launch| launch.instructions - launch.mma).sum::<u64>() as f64;
    let flops = if f.flops == 0 { "-".to_owned() } else { short(f.flops, "FLOP") };
    let mut cells = vec![
        f.workload.clone(),
        short(f.bytes, "B"),
        flops,
        over(sum(|l| l.unique_bytes), f.bytes, 3),
        over(sum(|l| l.requested_bytes), f.bytes, 2),
        over(sum(|l| l.mma_flops), f.flops, 3),
        over(others, mma, 2),
    ];
    for chip in &TABLE_CHIPS {
        let (bounds, launches) = (&f.bounds[chip.name], &f.launches[chip.name]);
        let longest = chip.longest(launches).map_or(0.0, |launch| chip.blocks_each(launch));
        let us = |b: &Bound| three(1e6 * b.seconds);
        cells.push(three(longest));
        cells.push(format!("{}, {} us", us(&bounds.op), us(&bounds.kernels)));
        cells.push(bounds.kernels.label());
    }
    Ok(format!("| {} |", cells.join(" | ")))
}

/// Three digits.
fn three(x: f64) -> String {
    let digits = if x > 0.0 { (2 - x.log10().floor() as i32).clamp(0, 6) } else { 0 };
    let text = format!("{x:.*}", digits as usize);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// `10.8 MB`.
fn short(n: u64, unit: &str) -> String {
    let n = n as f64;
    let (size, prefix) = match n {
        n if n < 1e3 => (n, ""),
        n if n < 1e6 => (n / 1e3, "k"),
        n if n < 1e9 => (n / 1e6, "M"),
        n => (n / 1e9, "G"),
    };
    format!("{} {prefix}{unit}", three(size))
}

/// A section's heading, and the table that belongs below it.
type Table = (&'static str, Vec<String>);

/// Puts each section's table in place of the first that it has.
fn rewrite(text: &str, tables: &[Table]) -> anyhow::Result<String> {
    let mut out: Vec<&str> = Vec::new();
    let mut waiting: Vec<&Table> = tables.iter().collect();
    let (mut section, mut in_table) = ("", false);
    for line in text.lines() {
        if line.starts_with("## ") {
            section = line;
        }
        let table =
            line.starts_with('|').then(|| waiting.iter().position(|(of, _)| *of == section)).flatten();
        if let Some(table) = table {
            out.extend(waiting.remove(table).1.iter().map(String::as_str));
            in_table = true;
        }
        in_table = in_table && line.starts_with('|');
        if !in_table {
            out.push(line);
        }
    }
    if let Some((missing, _)) = waiting.first() {
        bail!("it has no table below {missing:?}");
    }
    Ok(out.join("\n") + "\n")
}

fn write_readme(path: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut tables: Vec<Table> = Vec::new();
    for workload in workloads(&GEMMA_2B) {
        note(&workload.name);
        let (heading, line) = (section_of(&workload.name), table_line(&workload)?);
        match tables.iter_mut().find(|(of, _)| *of == heading) {
            Some((_, lines)) => lines.push(line),
            None => tables.push((heading, TABLE_HEAD.map(str::to_owned).into_iter().chain([line]).collect())),
        }
    }
    let steps = step::steps("", &TABLE_CHIPS, |found| {
        note(&found.line());
        Ok(())
    })?;
    let lines = step::TABLE_HEAD.map(str::to_owned).into_iter().chain(steps.iter().map(step::Step::line));
    tables.push(("## A step of decoding", lines.collect()));
    let new = rewrite(&text, &tables).with_context(|| path.display().to_string())?;
    Ok(atomic::write_file(path, |f| f.write_all(new.as_bytes()))?)
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

fn parse_shape(text: &str) -> Result<Model, &'static str> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_put_where_tables_are() {
        let text =
            "a\n## One\nb\n\n| x |\n|---|\n| 1 |\n\nc | d\n## Two\n| other |\n## Three\n| y |\n| 2 |\n";
        let table = |lines: &[&str]| lines.iter().map(|line| (*line).to_owned()).collect();
        let tables = [("## Three", table(&["| y |", "| 3 |", "| 4 |"])), ("## One", table(&["| new |"]))];
        let want = "a\n## One\nb\n\n| new |\n\nc | d\n## Two\n| other |\n## Three\n| y |\n| 3 |\n| 4 |\n";
        assert_eq!(rewrite(text, &tables).unwrap(), want);
        assert_eq!(rewrite(want, &tables).unwrap(), want);
        let missing = rewrite(text, &[("## Four", Vec::new())]).unwrap_err();
        assert_eq!(missing.to_string(), "it has no table below \"## Four\"");
    }

    #[test]
    fn figures_have_three_digits() {
        for (x, text) in
            [(0.0, "0"), (0.01234, "0.0123"), (5.294, "5.29"), (33.46, "33.5"), (1.0, "1"), (1234.4, "1234")]
        {
            assert_eq!(three(x), text);
        }
        assert_eq!(
            [short(999, "B"), short(10_780_000, "B"), short(34_400_000_000, "FLOP")],
            ["999 B", "10.8 MB", "34.4 GFLOP"]
        );
    }
}
