//! `bon-engine kernels --device cuda`: what the driver of a GPU makes of the kernels.

use std::io::Write;
use std::sync::Arc;

use anyhow::bail;
use serde::Serialize;

use crate::backend::Platform;
use crate::backend::cuda::Cuda;
use crate::cost::workloads::{Model, workloads};
use crate::device::Launch;
use crate::device::driver::{Gpu, Resources};

#[derive(Serialize)]
struct All {
    device: String,
    multiprocessors: u32,
    resources: Vec<Resources>,
    launches: Vec<Launched>,
}

/// A launch of a workload.
#[derive(Serialize)]
struct Launched {
    workload: String,
    model: &'static str,
    kernel: String,
    grid: [u32; 3],
    block: [u32; 3],
    /// Dynamic shared memory of a block.
    shared_bytes: u32,
    /// How many blocks a multiprocessor holds at once.
    blocks_per_multiprocessor: u32,
}

/// Kernels and ops whose names begin with `op`, on `cuda:<ordinal>`; each op is run once for each of `models`.
pub(super) fn run(ordinal: usize, op: &str, models: &[Model], json: bool) -> anyhow::Result<()> {
    let gpu = Arc::new(Gpu::open(ordinal)?);
    let multiprocessors = gpu.description().multiprocessors;
    let cuda = Cuda::new(Box::new(Arc::clone(&gpu)))?;
    let mut resources = gpu.resources()?;
    resources.retain(|kernel| kernel.kernel.starts_with(op));
    let mut out = std::io::stdout().lock();
    if !json {
        writeln!(out, "{}, {multiprocessors} multiprocessors", cuda.device_name())?;
        write_resources(&resources, &mut out)?;
        // What follows runs kernels, and may fail.
        out.flush()?;
    }
    let mut launches = Vec::new();
    for model in models {
        for workload in workloads(model).iter().filter(|w| w.name.starts_with(op)) {
            let run = (workload.prepare)(&cuda);
            gpu.take_launches()?;
            run(&cuda);
            cuda.check()?;
            // In the order in which they came, each once.
            let mut seen: Vec<(String, Launch, u32)> = Vec::new();
            for launch in gpu.take_launches()? {
                if !seen.contains(&launch) {
                    seen.push(launch);
                }
            }
            let of = |(kernel, launch, blocks): (String, Launch, u32)| Launched {
                workload: workload.name.clone(),
                model: model.name,
                kernel,
                grid: launch.grid,
                block: launch.block,
                shared_bytes: launch.shared_bytes,
                blocks_per_multiprocessor: blocks,
            };
            let found: Vec<Launched> = seen.into_iter().map(of).collect();
            if !json {
                write_launches(&found, multiprocessors, &mut out)?;
            }
            launches.extend(found);
        }
    }
    if resources.is_empty() && launches.is_empty() {
        bail!("no op or kernel has a name that begins with {op:?}");
    }
    if json {
        let all = All { device: cuda.device_name(), multiprocessors, resources, launches };
        writeln!(out, "{}", serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

fn write_resources(resources: &[Resources], out: &mut impl Write) -> std::io::Result<()> {
    let head = ["registers", "local bytes", "static shared bytes", "machine code"];
    writeln!(
        out,
        "{:<44}{:>10}{:>13}{:>21}{:>14}",
        "of a thread, of a block", head[0], head[1], head[2], head[3]
    )?;
    for Resources { kernel, registers, local, shared, code } in resources {
        let code = format!("sm_{}{}", code.0, code.1);
        writeln!(out, "{kernel:<44}{registers:>10}{local:>13}{shared:>21}{code:>14}")?;
    }
    Ok(())
}

fn write_launches(launches: &[Launched], multiprocessors: u32, out: &mut impl Write) -> std::io::Result<()> {
    if let Some(first) = launches.first() {
        writeln!(out, "\n{} ({})", first.workload, first.model)?;
    }
    for l in launches {
        let blocks: u64 = l.grid.iter().map(|n| u64::from(*n)).product();
        let threads: u32 = l.block.iter().product();
        let at_once = u64::from(multiprocessors) * u64::from(l.blocks_per_multiprocessor);
        writeln!(
            out,
            "  {}: {blocks} blocks of {threads} with {} bytes of dynamic shared memory, {} to a multiprocessor: {:.2} \
             waves",
            l.kernel,
            l.shared_bytes,
            l.blocks_per_multiprocessor,
            blocks as f64 / at_once.max(1) as f64
        )?;
    }
    Ok(())
}
