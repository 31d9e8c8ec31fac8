//! The cost of the kernels, counted without a GPU: registers and shared memory from ptxas, work from the virtual GPU, and the least
//! time of that work on a chip.
//!
//! None of these times is measured. A *bound* is the time in which a chip at its limits could do the work. There are two: the bound
//! of the op (every input read once, every output written once, only useful FLOPs at the data sheet's rate), and the bound of the
//! kernels' work (unique bytes, tensor FLOPs at the rate of `mma.sync`, instructions issued, wavefronts of shared memory, bytes
//! requested from L2), by the whole chip and by the multiprocessor that has the most work. The first is the best possible time, the
//! second a time that these kernels cannot beat; launches and latency add to both. A chip may be faster than the second if one of
//! three premises does not hold: that all inputs are in memory and none in its L2 cache, that no multiprocessor finds a requested
//! sector in its L1, and that it issues an instruction for each PTX instruction, some of which ptxas folds away.

use std::collections::BTreeMap;
use std::env;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde::Serialize;
use thiserror::Error;

use super::workloads::Workload;
use crate::backend::Platform;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::entries::{MODULES, Module, NO_KERNELS, PTXAS};
use crate::device::DeviceError;
use crate::device::dependent::{self, dependent};
use crate::device::vm::{BlockWork, Checks, Options, Report, Vm};

// ---------------------------------------------------------------------------------------------------------- chips

/// A GPU's limits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Chip {
    /// Its name, for people.
    pub name: &'static str,
    /// Its name for ptxas.
    pub arch: &'static str,
    /// Bytes per second to and from memory.
    pub bandwidth: f64,
    /// Dense bf16 FLOPs per second of the tensor cores, f32 accumulators: the data sheet's.
    pub tensor: f64,
    /// The rate of `mma.sync`, in FLOPs per second.
    pub mma_sync: f64,
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
/// `mma.sync` reaches the tensor cores' peak on Ampere and Ada, and 62.9 % of it on Hopper, whose peak needs wgmma: Luo,
/// Fan, Li, Du, Wang and Chu, "Benchmarking and dissecting the Nvidia Hopper GPU architecture" (2024,
/// arXiv:2402.13499), by microbenchmarks of A100, RTX 4090 and H100 PCIe.
pub const CHIPS: [Chip; 3] = [
    Chip {
        name: "A100",
        arch: "sm_80",
        bandwidth: 2039e9,
        tensor: 312e12,
        mma_sync: 312e12,
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
        mma_sync: 165.2e12,
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
        mma_sync: 622e12,
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
/// Bytes a clock that a multiprocessor gets from L2: the width of its port. Jia, Maggioni, Staiger and Scarpazza,
/// "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking" (2018, arXiv:1804.06826) find it on Volta; that
/// all of [`CHIPS`] have the same is assumed.
const L2_PORT: f64 = 64.0;
/// Shared memory that the system takes from every block, on all of [`CHIPS`].
const SHARED_RESERVED: u32 = 1024;
/// Unit in which registers are allocated to warps.
const REGISTER_UNIT: u32 = 256;

/// The resource that sets a bound.
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
    /// Bytes that multiprocessors request from L2.
    L2,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Memory, Self::Tensor, Self::Issue, Self::Shared, Self::L2];

    /// In lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Tensor => "tensor",
            Self::Issue => "issue",
            Self::Shared => "shared",
            Self::L2 => "l2",
        }
    }
}

/// The least time in which a chip can do something.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bound {
    /// In seconds.
    pub seconds: f64,
    /// The resource that needs this time.
    pub limit: Limit,
    /// Whether this is the time of one multiprocessor with the most work that it can get, and the chip as a whole would need less.
    pub uneven: bool,
}

impl Bound {
    /// The limit, for people.
    pub fn label(&self) -> String {
        format!("{}{}", self.limit.name(), if self.uneven { " of one multiprocessor" } else { "" })
    }

    fn slowest(parts: impl IntoIterator<Item = Self>) -> Self {
        // Of equals, but for rounding, the first: a whole chip that is as slow as its slowest multiprocessor is even.
        let slower = |a: Self, b: Self| if b.seconds > a.seconds * (1.0 + 1e-12) { b } else { a };
        parts.into_iter().reduce(slower).expect("something limits")
    }
}

impl Chip {
    /// Whether blocks of a kernel become resident while the kernel before it runs.
    pub fn launches_dependents(&self) -> bool {
        launches_dependents(self.arch)
    }

    /// The bound of the op.
    pub fn of_op(&self, bytes: u64, flops: u64) -> Bound {
        let part = |seconds, limit| Bound { seconds, limit, uneven: false };
        Bound::slowest([
            part(bytes as f64 / self.bandwidth, Limit::Memory),
            part(flops as f64 / self.tensor, Limit::Tensor),
        ])
    }

    /// The bound of one launch, whose resources are used at the same time: the largest of bytes / bandwidth and, for what a
    /// multiprocessor does at a rate r of its own (FLOPs of `mma.sync`, 4 instructions a clock, one wavefront a clock, 64 bytes
    /// from L2 a clock), of three times on P multiprocessors:
    ///
    /// - all of it / (P r): the whole chip, work spread evenly;
    /// - the most that a block does / r: it runs on one multiprocessor, alone at best;
    /// - ceil(blocks / P) x the least that a block does / r: some multiprocessor gets so many blocks. Where all blocks do
    ///   the same this is the longest block x waves; where they differ, short ones can fill a wave up, and the second
    ///   time is all that is certain.
    pub fn of_launch(&self, launch: &Counted) -> Bound {
        let chip = f64::from(self.multiprocessors);
        let rounds = launch.blocks().div_ceil(u64::from(self.multiprocessors)) as f64;
        let memory = launch.unique_bytes as f64 / self.bandwidth;
        // Of each limit: what a multiprocessor does in a second, what all blocks do, and the most and the least of one.
        let Counted { most, least, .. } = launch;
        let work = [
            (Limit::Tensor, self.mma_sync / chip, launch.mma_flops, [most.mma_flops, least.mma_flops]),
            (
                Limit::Issue,
                SCHEDULERS * self.clock,
                launch.instructions,
                [most.instructions, least.instructions],
            ),
            (Limit::Shared, self.clock, launch.wavefronts, [most.wavefronts, least.wavefronts]),
            (
                Limit::L2,
                L2_PORT * self.clock,
                launch.requested_bytes,
                [most.requested_bytes, least.requested_bytes],
            ),
        ];
        let parts = work.into_iter().flat_map(|(limit, rate, all, [most, least])| {
            let longest = (most as f64).max(rounds * least as f64);
            [
                Bound { seconds: all as f64 / (chip * rate), limit, uneven: false },
                Bound { seconds: longest / rate, limit, uneven: true },
            ]
        });
        Bound::slowest(
            [Bound { seconds: memory, limit: Limit::Memory, uneven: false }].into_iter().chain(parts),
        )
    }

    /// The bound of launches one after the other. Its limit is the one that sets most of the time.
    pub fn of_launches(&self, launches: &[Counted]) -> Bound {
        let bounds: Vec<Bound> = launches.iter().map(|launch| self.of_launch(launch)).collect();
        let sums = Limit::ALL.into_iter().flat_map(|limit| [false, true].map(|uneven| (limit, uneven))).map(
            |kind| {
                let mine = bounds.iter().filter(|bound| (bound.limit, bound.uneven) == kind);
                Bound { seconds: mine.map(|bound| bound.seconds).sum(), limit: kind.0, uneven: kind.1 }
            },
        );
        let seconds = bounds.iter().map(|bound| bound.seconds).sum();
        Bound { seconds, ..Bound::slowest(sums) }
    }

    /// Blocks of a launch, over the multiprocessors.
    pub fn blocks_each(&self, launch: &Counted) -> f64 {
        launch.blocks() as f64 / f64::from(self.multiprocessors)
    }

    /// The launch that takes longest.
    pub fn longest<'a>(&self, launches: &'a [Counted]) -> Option<&'a Counted> {
        launches.iter().max_by(|a, b| self.of_launch(a).seconds.total_cmp(&self.of_launch(b).seconds))
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

/// The resources of a kernel, as ptxas reports them.
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
    #[error(
        "there is no ptxas beside the nvcc that this program was built with, and BON_PTXAS names none; `make nvcc` fetches both"
    )]
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

/// The assembler: the one that `BON_PTXAS` names in the environment, else the one beside the nvcc that compiled the
/// kernels; `None` where that is not there.
pub fn ptxas() -> Option<String> {
    env::var("BON_PTXAS").ok().or(PTXAS.map(str::to_owned)).filter(|ptxas| Path::new(ptxas).is_file())
}

/// Whether GPUs of an architecture, as ptxas calls it, begin kernels before those ahead of them have ended
/// ([`mod@dependent`]).
fn launches_dependents(arch: &str) -> bool {
    let capability = arch.trim_start_matches("sm_").parse().map(|sm: i32| (sm / 10, sm % 10));
    capability.is_ok_and(|capability| capability >= dependent::CAPABILITY)
}

/// Assembles a module for an architecture.
pub fn resources(module: &Module, arch: &str) -> Result<Vec<Resources>, FiguresError> {
    let ptx = module.ptx.ok_or(FiguresError::NoKernels)?;
    let ptx = if launches_dependents(arch) { &dependent(ptx) } else { ptx };
    let ptxas = ptxas().ok_or(FiguresError::NoPtxas)?;
    let failed = |source| FiguresError::Run { ptxas: ptxas.clone(), source };
    let mut child = Command::new(&ptxas)
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
        let arch = arch.to_owned();
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

/// The work of a block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Block {
    /// Instructions that its warps executed.
    pub instructions: u64,
    /// FLOPs of the tensor cores.
    pub mma_flops: u64,
    /// Bytes of all sectors that it requested.
    pub requested_bytes: u64,
    /// Wavefronts of shared memory.
    pub wavefronts: u64,
}

impl Block {
    fn new(work: &BlockWork) -> Self {
        Self {
            instructions: work.instructions,
            mma_flops: work.mma_flops,
            requested_bytes: 32 * work.sectors,
            wavefronts: work.wavefronts,
        }
    }
}

/// The work of a launch on the virtual GPU.
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
    /// Bytes of different sectors of global memory, read and written: each sector counts once.
    pub unique_bytes: u64,
    /// Bytes of all sectors that its warps requested.
    pub requested_bytes: u64,
    /// The same if every access were coalesced.
    pub ideal_bytes: u64,
    /// Wavefronts of shared memory.
    pub wavefronts: u64,
    /// The same without bank conflicts.
    pub ideal_wavefronts: u64,
    /// Bytes of local memory.
    pub local_bytes: u64,
    /// The most work of a block, each number by itself.
    pub most: Block,
    /// The least work of a block, likewise.
    pub least: Block,
}

impl Counted {
    /// Blocks of the grid.
    pub fn blocks(&self) -> u64 {
        self.grid.iter().map(|n| u64::from(*n)).product()
    }

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
            most: Block::new(&report.blocks.most),
            least: Block::new(&report.blocks.least),
        }
    }
}

/// Runs something on a virtual GPU with a chip's number of multiprocessors, by which launchers choose their tiles, at
/// full size and without checks, and counts: one entry per launch. What `prepare` launches is not counted.
pub fn count<T>(
    name: &str,
    chip: &Chip,
    prepare: impl FnOnce(&Cuda) -> T,
    run: impl FnOnce(&Cuda, T),
) -> Result<Vec<Counted>, FiguresError> {
    let failed = |source| FiguresError::Device { workload: name.to_owned(), source };
    let vm = Vm::new(Options { checks: Checks::NONE, ..Options::default() });
    let vm = Arc::new(vm.with_multiprocessors(chip.multiprocessors));
    let cuda = Cuda::new(Box::new(Arc::clone(&vm))).map_err(failed)?;
    let prepared = prepare(&cuda);
    vm.keep_reports();
    run(&cuda, prepared);
    cuda.check().map_err(failed)?;
    Ok(vm.take_reports().iter().map(Counted::new).collect())
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
    /// The launches, per chip: launchers choose tiles by the number of multiprocessors.
    pub launches: BTreeMap<&'static str, Vec<Counted>>,
    /// Per chip.
    pub bounds: BTreeMap<&'static str, Bounds>,
}

/// Bounds on a chip.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Bounds {
    /// Of the op itself.
    pub op: Bound,
    /// Of the launches.
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
    let (mut launches, mut bounds) = (BTreeMap::new(), BTreeMap::new());
    for chip in chips {
        let counted = count(&workload.name, chip, &workload.prepare, |cuda, run| run(cuda))?;
        let (op, kernels) = (chip.of_op(workload.bytes, workload.flops), chip.of_launches(&counted));
        bounds.insert(chip.name, Bounds { op, kernels });
        launches.insert(chip.name, counted);
    }
    let (bytes, flops) = (workload.bytes, workload.flops);
    Ok(Figures { workload: workload.name.clone(), model, bytes, flops, launches, bounds })
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

    /// A launch of `blocks` blocks that do nothing.
    fn idle(blocks: u32) -> Counted {
        Counted {
            kernel: "k".into(),
            grid: [blocks, 1, 1],
            block: [128, 1, 1],
            shared_bytes: 0,
            instructions: 0,
            mma: 0,
            mma_flops: 0,
            flops: 0,
            unique_bytes: 0,
            requested_bytes: 0,
            ideal_bytes: 0,
            wavefronts: 0,
            ideal_wavefronts: 0,
            local_bytes: 0,
            most: Block::default(),
            least: Block::default(),
        }
    }

    #[test]
    fn a_grid_that_does_not_fill_the_chip_is_held_against_it() {
        let [a100, _, h100] = &CHIPS;
        let clock = 1.0 / a100.clock;
        let same = |blocks: u32, wavefronts: u64| {
            let block = Block { wavefronts, ..Block::default() };
            Counted { wavefronts: u64::from(blocks) * wavefronts, most: block, least: block, ..idle(blocks) }
        };
        let seconds = |launch: &Counted| a100.of_launch(launch).seconds;
        let near = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
        // One block, one for each multiprocessor and one more: one wave, one wave, two.
        for (blocks, waves) in [(1, 1.0), (108, 1.0), (109, 2.0), (216, 2.0)] {
            assert!(near(seconds(&same(blocks, 1000)), waves * 1000.0 * clock), "{blocks}");
        }
        assert!(a100.of_launch(&same(1, 1000)).uneven && !a100.of_launch(&same(108, 1000)).uneven);
        // Blocks that differ: the longest, until the whole is more.
        let mut mixed = same(109, 1000);
        mixed.least.wavefronts = 10;
        assert!(near(seconds(&mixed), 109.0 / 108.0 * 1000.0 * clock));
        mixed.most.wavefronts = 5000;
        assert!(near(seconds(&mixed), 5000.0 * clock));
        // Each rate of one multiprocessor.
        let one = |block: Block| a100.of_launch(&Counted { most: block, least: block, ..idle(1) });
        let bound = one(Block { instructions: 4000, ..Block::default() });
        assert!(bound.limit == Limit::Issue && near(bound.seconds, 1000.0 * clock));
        let bound = one(Block { requested_bytes: 64_000, ..Block::default() });
        assert!(bound.limit == Limit::L2 && near(bound.seconds, 1000.0 * clock));
        let bound = one(Block { mma_flops: 312_000_000, ..Block::default() });
        assert!(bound.limit == Limit::Tensor && near(bound.seconds, 108e-6));
        // mma.sync is not all that the chip has.
        let launch = Counted { mma_flops: 622_000_000, ..idle(132) };
        assert!(near(h100.of_launch(&launch).seconds, 1e-6) && h100.of_op(0, 622_000_000).seconds < 0.7e-6);
        // Of several launches the limit is that of most of the time.
        let two = [same(1, 1000), Counted { unique_bytes: 2039 * 2000, ..idle(1) }];
        let both = a100.of_launches(&two);
        assert!(both.limit == Limit::Memory && near(both.seconds, 1000.0 * clock + 2e-6));
        assert_eq!(a100.longest(&two).map(|launch| launch.unique_bytes), Some(2039 * 2000));
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
