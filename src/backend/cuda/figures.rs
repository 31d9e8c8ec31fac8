//! What the kernels cost, counted where there is no GPU to time them: registers and shared memory from ptxas, work from
//! the virtual GPU, and how long chips need for that at least.
//!
//! None of these times is measured. A *bound* is the time in which a chip at the limits of its data sheet could do the
//! work: of the op itself (every input read once, every output written once, only useful FLOPs) and of what the
//! kernels did (different bytes touched, tensor FLOPs, instructions issued, shared-memory wavefronts). The first says
//! what is possible, the second what these kernels cannot beat; launches and latency come on top of both. Two premises
//! can fail in a chip's favour: that inputs lie in memory and none in its L2 cache, and that it issues an instruction
//! for each of PTX, of which ptxas folds some away.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;

use super::Cuda;
use super::entries::{MODULES, Module, NO_KERNELS, PTXAS};
use super::workload::Workload;
use crate::backend::Backend;
use crate::device::DeviceError;
use crate::device::vm::{Checks, Options, Report, Vm};

// ---------------------------------------------------------------------------------------------------------- chips

/// A GPU's limits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Chip {
    /// For people.
    pub name: &'static str,
    /// What ptxas calls it.
    pub arch: &'static str,
    /// Bytes per second to and from memory.
    pub bandwidth: f64,
    /// Dense bf16 FLOPs per second of the tensor cores, f32 accumulators.
    pub tensor: f64,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Clock under load in Hz.
    pub clock: f64,
    /// Registers of a multiprocessor.
    pub registers: u32,
    /// Threads that a multiprocessor holds.
    pub threads: u32,
    /// Blocks that a multiprocessor holds.
    pub blocks: u32,
    /// Bytes of shared memory of a multiprocessor.
    pub shared: u32,
    /// Bytes of shared memory that a block may have.
    pub shared_block: u32,
}

/// Sources: NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM) and architecture whitepaper; NVIDIA Ada GPU
/// architecture whitepaper, appendix A (RTX 4090); NVIDIA H100 data sheet (SXM5, without sparsity) and Hopper
/// architecture whitepaper. Clocks are those at which the stated FLOPs come out: multiprocessors x FLOPs per clock.
/// Limits per multiprocessor: CUDA C++ Programming Guide, table of technical specifications per compute capability.
///
/// On Hopper `mma.sync` reaches about 0.6 of the tensor cores' peak, which needs wgmma.
pub const CHIPS: [Chip; 3] = [
    Chip {
        name: "A100",
        arch: "sm_80",
        bandwidth: 2039e9,
        tensor: 312e12,
        multiprocessors: 108,
        clock: 1.41e9,
        registers: 65_536,
        threads: 2048,
        blocks: 32,
        shared: 167_936,
        shared_block: 166_912,
    },
    Chip {
        name: "RTX 4090",
        arch: "sm_89",
        bandwidth: 1008e9,
        tensor: 165.2e12,
        multiprocessors: 128,
        clock: 2.52e9,
        registers: 65_536,
        threads: 1536,
        blocks: 24,
        shared: 102_400,
        shared_block: 101_376,
    },
    Chip {
        name: "H100",
        arch: "sm_90",
        bandwidth: 3352e9,
        tensor: 989.4e12,
        multiprocessors: 132,
        clock: 1.83e9,
        registers: 65_536,
        threads: 2048,
        blocks: 32,
        shared: 233_472,
        shared_block: 232_448,
    },
];

/// Warp schedulers of a multiprocessor: each issues an instruction a clock.
const SCHEDULERS: f64 = 4.0;
/// Shared memory that the system takes from every block, on all of [`CHIPS`].
const SHARED_RESERVED: u32 = 1024;
/// Registers are given to warps in such pieces.
const REGISTER_UNIT: u32 = 256;

/// What a bound comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Limit {
    /// Bytes to and from memory.
    Memory,
    /// The tensor cores.
    Tensor,
    /// Instructions issued.
    Issue,
    /// Wavefronts of shared memory: one a clock and multiprocessor.
    Shared,
}

/// The least time in which a chip can do something.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bound {
    /// In seconds.
    pub seconds: f64,
    /// The slowest part.
    pub limit: Limit,
}

impl Chip {
    fn bound(parts: impl IntoIterator<Item = (f64, Limit)>) -> Bound {
        let slowest = parts.into_iter().max_by(|a, b| a.0.total_cmp(&b.0));
        let (seconds, limit) = slowest.expect("something limits");
        Bound { seconds, limit }
    }

    /// The op itself.
    pub fn of_op(&self, bytes: u64, flops: u64) -> Bound {
        Self::bound([
            (bytes as f64 / self.bandwidth, Limit::Memory),
            (flops as f64 / self.tensor, Limit::Tensor),
        ])
    }

    /// What one launch did, all parts at once: with P multiprocessors at clock f, the largest of bytes / bandwidth, tensor
    /// FLOPs / peak, instructions / (4 P f) and wavefronts / (P f). A grid that is too small for the chip is not held
    /// against it.
    pub fn of_launch(&self, launch: &Counted) -> Bound {
        let clocks = f64::from(self.multiprocessors) * self.clock;
        Self::bound([
            (launch.unique_bytes as f64 / self.bandwidth, Limit::Memory),
            (launch.mma_flops as f64 / self.tensor, Limit::Tensor),
            (launch.instructions as f64 / (SCHEDULERS * clocks), Limit::Issue),
            (launch.wavefronts as f64 / clocks, Limit::Shared),
        ])
    }

    /// Launches one after the other; the limit is that of most of the time.
    pub fn of_launches(&self, launches: &[Counted]) -> Bound {
        let mut by_limit: Vec<(f64, Limit)> =
            [Limit::Memory, Limit::Tensor, Limit::Issue, Limit::Shared].map(|limit| (0.0, limit)).to_vec();
        for launch in launches {
            let bound = self.of_launch(launch);
            if let Some(sum) = by_limit.iter_mut().find(|(_, limit)| *limit == bound.limit) {
                sum.0 += bound.seconds;
            }
        }
        let seconds = by_limit.iter().map(|(seconds, _)| seconds).sum();
        Bound { seconds, ..Self::bound(by_limit) }
    }

    /// Blocks of a kernel that a multiprocessor holds at the same time.
    pub fn occupancy(&self, registers: u32, shared_bytes: u32, threads: u32) -> u32 {
        let warps = threads.div_ceil(32).max(1);
        let by_registers = self.registers / ((registers * 32).next_multiple_of(REGISTER_UNIT) * warps).max(1);
        let by_shared = self.shared / (shared_bytes + SHARED_RESERVED);
        by_registers.min(by_shared).min(self.threads / (warps * 32)).min(self.blocks)
    }
}

// ---------------------------------------------------------------------------------------------------- resources

/// What ptxas says that a kernel takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Resources {
    /// The entry point.
    pub kernel: String,
    /// As in `sm_80`.
    pub arch: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Bytes of stack of a thread.
    pub stack: u32,
    /// Bytes of registers written to local memory.
    pub spill_stores: u32,
    /// Bytes of registers read back.
    pub spill_loads: u32,
}

/// Why there are no figures.
#[derive(Debug, Error)]
pub enum FiguresError {
    /// The program has no kernels.
    #[error("{NO_KERNELS}")]
    NoKernels,
    /// No assembler.
    #[error("there is no ptxas beside the nvcc that this program was built with; `make nvcc` fetches both")]
    NoPtxas,
    /// It could not be run.
    #[error("cannot run {ptxas}")]
    Run {
        /// Its path.
        ptxas: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// It refused a module.
    #[error("{ptxas} refuses {module}.ptx for {arch}: {said}")]
    Refused {
        /// Its path.
        ptxas: String,
        /// The module.
        module: &'static str,
        /// The architecture.
        arch: String,
        /// Its words.
        said: String,
    },
    /// The virtual GPU found a fault.
    #[error("{workload}")]
    Device {
        /// What it ran.
        workload: String,
        /// What it found.
        source: DeviceError,
    },
}

/// Assembles a module for an architecture.
pub fn resources(module: &Module, arch: &str) -> Result<Vec<Resources>, FiguresError> {
    let ptx = module.ptx.ok_or(FiguresError::NoKernels)?;
    let ptxas = PTXAS.filter(|ptxas| Path::new(ptxas).is_file()).ok_or(FiguresError::NoPtxas)?;
    let failed = |source| FiguresError::Run { ptxas: ptxas.to_owned(), source };
    let mut child = Command::new(ptxas)
        .args(["-arch", arch, "-v", "-o", "/dev/null", "/dev/stdin"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // It reads all of its input before it says anything. If it will not, its own words are the better error.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(ptx.as_bytes()));
    let run = child.wait_with_output().map_err(failed)?;
    if run.status.success() {
        written.map_err(failed)?;
    }
    let said = String::from_utf8_lossy(&[run.stdout, run.stderr].concat()).into_owned();
    let found = parse(&said, arch);
    if !run.status.success() || found.len() != module.entries.len() {
        let (ptxas, arch) = (ptxas.to_owned(), arch.to_owned());
        return Err(FiguresError::Refused { ptxas, module: module.name, arch, said });
    }
    Ok(found)
}

/// The modules that have a kernel whose name begins with `op`, for all of `archs`, assembled side by side; those kernels.
pub fn all_resources(archs: &[&str], op: &str) -> Result<Vec<Resources>, FiguresError> {
    let runs: Vec<Result<Vec<Resources>, FiguresError>> = std::thread::scope(|scope| {
        let started: Vec<_> = archs
            .iter()
            .map(|arch| {
                scope.spawn(move || {
                    let has = |module: &&Module| module.entries.iter().any(|e| e.name().starts_with(op));
                    let modules = MODULES.iter().filter(has).map(|module| resources(module, arch));
                    modules.collect::<Result<Vec<_>, _>>().map(|all| all.concat())
                })
            })
            .collect();
        started.into_iter().map(|run| run.join().expect("it does not panic")).collect()
    });
    let mut all = runs.into_iter().collect::<Result<Vec<_>, _>>()?.concat();
    all.retain(|kernel| kernel.kernel.starts_with(op));
    Ok(all)
}

/// ptxas -v, of which three kinds of lines matter:
///
/// ```text
/// ptxas info    : Compiling entry function 'gather_rows' for 'sm_80'
///     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
/// ptxas info    : Used 16 registers, used 1 barriers, 4096 bytes smem, 380 bytes cmem[0]
/// ```
fn parse(said: &str, arch: &str) -> Vec<Resources> {
    let mut found = Vec::new();
    let mut current: Option<Resources> = None;
    for line in said.lines() {
        if let Some(rest) = line.split_once("Compiling entry function '").map(|(_, rest)| rest) {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            current = Some(Resources {
                kernel,
                arch: arch.to_owned(),
                registers: 0,
                shared: 0,
                stack: 0,
                spill_stores: 0,
                spill_loads: 0,
            });
        }
        let Some(kernel) = &mut current else { continue };
        let number =
            |part: &str| part.split_whitespace().find_map(|word| word.parse::<u32>().ok()).unwrap_or(0);
        if line.contains("bytes stack frame") {
            for part in line.split(',') {
                match part {
                    p if p.contains("stack frame") => kernel.stack = number(p),
                    p if p.contains("spill stores") => kernel.spill_stores = number(p),
                    p if p.contains("spill loads") => kernel.spill_loads = number(p),
                    _ => {}
                }
            }
        } else if let Some((_, used)) = line.split_once("Used ") {
            for part in used.split(',') {
                match part {
                    p if p.contains("registers") => kernel.registers = number(p),
                    p if p.contains("bytes smem") => kernel.shared = number(p),
                    _ => {}
                }
            }
            found.extend(current.take());
        }
    }
    found
}

// -------------------------------------------------------------------------------------------------------- counts

/// FLOPs of the one shape that the kernels use, m16n8k16.
const MMA_FLOPS: u64 = 2 * 16 * 8 * 16;

/// What a launch did on the virtual GPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Counted {
    /// The entry point.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Shared memory of a block, static and dynamic.
    pub shared_bytes: u32,
    /// Instructions that warps executed.
    pub instructions: u64,
    /// Those of the tensor cores among them.
    pub mma: u64,
    /// FLOPs of the tensor cores.
    pub mma_flops: u64,
    /// FLOPs elsewhere.
    pub flops: u64,
    /// Bytes of different sectors of global memory, read and written.
    pub unique_bytes: u64,
    /// Bytes of all sectors that were asked for.
    pub requested_bytes: u64,
    /// The same if every access were coalesced.
    pub ideal_bytes: u64,
    /// Wavefronts of shared memory.
    pub wavefronts: u64,
    /// The same without bank conflicts.
    pub ideal_wavefronts: u64,
    /// Bytes of local memory.
    pub local_bytes: u64,
}

impl Counted {
    /// From the virtual GPU's report.
    pub fn new(report: &Report) -> Self {
        Self {
            kernel: report.kernel.clone(),
            grid: report.grid,
            block: report.block,
            shared_bytes: report.shared_bytes,
            instructions: report.instructions().warps,
            mma: report.mma_flops / MMA_FLOPS,
            mma_flops: report.mma_flops,
            flops: report.flops,
            unique_bytes: 32 * (report.unique_sectors.0 + report.unique_sectors.1),
            requested_bytes: 32 * report.global.sectors,
            ideal_bytes: 32 * report.global.ideal_sectors,
            wavefronts: report.shared.wavefronts,
            ideal_wavefronts: report.shared.ideal_wavefronts,
            local_bytes: report.local.bytes,
        }
    }
}

/// Runs a workload once on the virtual GPU, at full size and without checks, and counts: one entry per launch.
pub fn count(workload: &Workload) -> Result<Vec<Report>, FiguresError> {
    let failed = |source| FiguresError::Device { workload: workload.name.clone(), source };
    let vm = Arc::new(Vm::new(Options { checks: Checks::NONE, ..Options::default() }));
    let cuda = Cuda::new(Box::new(Arc::clone(&vm))).map_err(failed)?;
    let run = (workload.prepare)(&cuda);
    vm.keep_reports();
    run(&cuda);
    cuda.check().map_err(failed)?;
    Ok(vm.take_reports())
}

/// A workload's figures.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figures {
    /// The op and its shape.
    pub workload: String,
    /// The model whose shape it is.
    pub model: &'static str,
    /// Compulsory bytes.
    pub bytes: u64,
    /// Useful FLOPs of matrix products.
    pub flops: u64,
    /// What ran.
    pub launches: Vec<Counted>,
    /// Per chip.
    pub bounds: BTreeMap<&'static str, Bounds>,
}

/// Bounds on a chip.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bounds {
    /// Of the op itself.
    pub op: Bound,
    /// Of what ran.
    pub kernels: Bound,
}

impl Bounds {
    /// How near to the op's bound the kernels can come at best: 1 is all the way.
    pub fn reach(&self) -> f64 {
        self.op.seconds / self.kernels.seconds
    }
}

/// Counts a workload and says what that takes on `chips`.
pub fn figures(model: &'static str, workload: &Workload, chips: &[Chip]) -> Result<Figures, FiguresError> {
    let launches: Vec<Counted> = count(workload)?.iter().map(Counted::new).collect();
    let bounds = chips.iter().map(|chip| {
        let (op, kernels) = (chip.of_op(workload.bytes, workload.flops), chip.of_launches(&launches));
        (chip.name, Bounds { op, kernels })
    });
    Ok(Figures {
        workload: workload.name.clone(),
        model,
        bytes: workload.bytes,
        flops: workload.flops,
        bounds: bounds.collect(),
        launches,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_ptxas_are_read() {
        let said = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'a_b' for 'sm_80'\n\
            ptxas info    : Function properties for a_b\n    \
            16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem, 380 bytes cmem[0]\n\
            ptxas info    : Compiling entry function 'c' for 'sm_80'\n\
            ptxas info    : Function properties for c\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 255 registers, used 0 barriers, 380 bytes cmem[0]\n";
        let of = |kernel: &str, [registers, shared, stack, spill_stores, spill_loads]: [u32; 5]| Resources {
            kernel: kernel.into(),
            arch: "sm_80".into(),
            registers,
            shared,
            stack,
            spill_stores,
            spill_loads,
        };
        assert_eq!(parse(said, "sm_80"), [of("a_b", [40, 4096, 16, 8, 4]), of("c", [255, 0, 0, 0, 0])]);
    }

    /// Against NVIDIA's occupancy calculator.
    #[test]
    fn occupancy_is_what_the_chip_has_room_for() {
        let [a100, rtx, _] = &CHIPS;
        assert_eq!(a100.occupancy(32, 0, 256), 8);
        assert_eq!(a100.occupancy(128, 0, 256), 2);
        assert_eq!(a100.occupancy(255, 96 << 10, 256), 1);
        assert_eq!(a100.occupancy(64, 48 << 10, 128), 3);
        assert_eq!(rtx.occupancy(40, 0, 1024), 1);
        assert_eq!(rtx.occupancy(32, 48 << 10, 128), 2);
    }

    #[test]
    fn the_slowest_part_is_the_bound() {
        let [a100, ..] = &CHIPS;
        let bound = a100.of_op(2039, 1);
        assert_eq!(bound.limit, Limit::Memory);
        assert!((bound.seconds - 1e-9).abs() < 1e-15);
        assert_eq!(a100.of_op(1, 312_000).limit, Limit::Tensor);
    }
}
