//! The counters of a launch, for people and programs.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::Finding;
use crate::machine::counters::{BlockRange, BlockWork, Counters, InstCount, MemoryCount};
use crate::machine::inst::{Class, Control, Exec, Inst};
use crate::machine::module::Module;

/// Instructions of a class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassCount {
    /// Times that a warp executed one.
    pub warps: u64,
    /// Lanes for which they ran.
    pub lanes: u64,
}

/// Counters of one line of the PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LineCount {
    /// Line in the PTX, from 1.
    pub line: u32,
    /// `file:line` of the source, where the PTX tells.
    pub source: Option<String>,
    /// Times that a warp executed it.
    pub warps: u64,
    /// Lanes for which it ran.
    pub lanes: u64,
    /// Times that a warp's lanes parted there.
    pub divergent: u64,
    /// Its memory traffic.
    pub memory: MemoryCount,
}

/// A launch without findings: its counters, and the text that the kernel printed.
///
/// All figures are counted on the virtual machine, none is measured on a GPU. They do not depend on host threads.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// The kernel.
    pub kernel: String,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Shared memory of a block, static and dynamic.
    pub shared_bytes: u32,
    /// Instructions by class.
    pub classes: BTreeMap<Class, ClassCount>,
    /// Floating-point operations outside the tensor cores: an fma is two.
    pub flops: u64,
    /// Floating-point (or integer) operations of the tensor cores: 2 m n k each.
    pub mma_flops: u64,
    /// Global memory: loads, stores and atomics, over all instructions.
    pub global: MemoryCount,
    /// Shared memory.
    pub shared: MemoryCount,
    /// Local memory.
    pub local: MemoryCount,
    /// 32-byte sectors of global memory that the launch read and wrote, each counted once: the compulsory traffic.
    pub unique_sectors: (u64, u64),
    /// The most and the least work of a block: how evenly the work is spread, and a bound that more multiprocessors do not
    /// lower.
    pub blocks: BlockRange,
    /// Times that a barrier opened.
    pub barriers: u64,
    /// Times that a warp's lanes parted at a branch.
    pub divergent: u64,
    /// Lines of the PTX that ran, in order.
    pub lines: Vec<LineCount>,
    /// Text that the kernel printed with `printf`.
    pub printed: String,
    /// What is no error and yet may be one: lanes taken to run in step
    /// ([`ErrorKind::InStep`](crate::error::ErrorKind::InStep)), and divisions by zero where nothing else is found
    /// ([`ErrorKind::DivisionByZero`](crate::error::ErrorKind::DivisionByZero)).
    pub notes: Vec<Finding>,
}

fn add(a: &mut MemoryCount, b: &MemoryCount) {
    a.requests += b.requests;
    a.sectors += b.sectors;
    a.ideal_sectors += b.ideal_sectors;
    a.bytes += b.bytes;
    a.wavefronts += b.wavefronts;
    a.ideal_wavefronts += b.ideal_wavefronts;
}

impl Report {
    pub(crate) fn new(
        module: &Module,
        kernel: &str,
        [grid, block]: [[u32; 3]; 2],
        shared_bytes: u32,
        counters: &Counters,
        unique_sectors: (u64, u64),
        printed: String,
    ) -> Self {
        let mut report = Self {
            kernel: kernel.to_owned(),
            grid,
            block,
            shared_bytes,
            classes: BTreeMap::new(),
            flops: 0,
            mma_flops: 0,
            global: MemoryCount::default(),
            shared: MemoryCount::default(),
            local: MemoryCount::default(),
            unique_sectors,
            blocks: counters
                .blocks
                .unwrap_or(BlockRange { most: BlockWork::default(), least: BlockWork::default() }),
            barriers: counters.barriers,
            divergent: 0,
            lines: Vec::new(),
            printed,
            notes: Vec::new(),
        };
        let mut lines: BTreeMap<u32, LineCount> = BTreeMap::new();
        let all = module.program.code.iter().zip(&counters.insts).zip(&counters.memory);
        // A join is no instruction of the program: it only marks where lanes meet.
        let ran = |inst: &Inst, count: &InstCount| {
            count.warps > 0 && !matches!(inst.exec, Exec::Control(Control::Join | Control::Warpgroup))
        };
        for ((inst, count), memory) in all.filter(|((inst, count), _)| ran(inst, count)) {
            let class = report.classes.entry(inst.class).or_default();
            class.warps += count.warps;
            class.lanes += count.lanes;
            report.divergent += count.divergent;
            if inst.class == Class::Mma {
                report.mma_flops += u64::from(inst.flops) * count.warps;
            } else {
                report.flops += u64::from(inst.flops) * count.lanes;
            }
            match inst.class {
                Class::Shared => add(&mut report.shared, memory),
                Class::Local => add(&mut report.local, memory),
                // A copy from global to shared memory, or an atomic, may touch both.
                _ => {
                    let shared = MemoryCount {
                        wavefronts: memory.wavefronts,
                        ideal_wavefronts: memory.ideal_wavefronts,
                        ..MemoryCount::default()
                    };
                    add(&mut report.shared, &shared);
                    add(&mut report.global, &MemoryCount { wavefronts: 0, ideal_wavefronts: 0, ..*memory });
                }
            }
            let place = module.program.places.get(inst.place as usize).copied().unwrap_or_default();
            let line = lines.entry(place.line).or_insert_with(|| LineCount {
                line: place.line,
                source: module.source(place),
                warps: 0,
                lanes: 0,
                divergent: 0,
                memory: MemoryCount::default(),
            });
            line.warps += count.warps;
            line.lanes += count.lanes;
            line.divergent += count.divergent;
            add(&mut line.memory, memory);
        }
        report.lines = lines.into_values().collect();
        report
    }

    /// Instructions over all classes.
    pub fn instructions(&self) -> ClassCount {
        self.classes.values().fold(ClassCount::default(), |a, b| ClassCount {
            warps: a.warps + b.warps,
            lanes: a.lanes + b.lanes,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([gx, gy, gz], [bx, by, bz]) = (self.grid, self.block);
        writeln!(
            f,
            "{}: grid ({gx},{gy},{gz}), block ({bx},{by},{bz}), {} bytes shared",
            self.kernel, self.shared_bytes
        )?;
        let all = self.instructions();
        writeln!(f, "  instructions  {:>14} of warps, {:>16} of lanes", all.warps, all.lanes)?;
        for (class, count) in &self.classes {
            writeln!(
                f,
                "    {:<11} {:>14}           {:>16}",
                format!("{class:?}"),
                count.warps,
                count.lanes
            )?;
        }
        if self.flops > 0 {
            writeln!(f, "  FLOPs         {:>14}", self.flops)?;
        }
        if self.mma_flops > 0 {
            writeln!(f, "  tensor FLOPs  {:>14}", self.mma_flops)?;
        }
        let g = &self.global;
        if g.requests > 0 {
            writeln!(
                f,
                "  global        {:>14} requests, {} sectors ({} ideal), {} bytes asked for",
                g.requests, g.sectors, g.ideal_sectors, g.bytes
            )?;
            let (read, written) = self.unique_sectors;
            writeln!(f, "  unique        {:>14} bytes read, {} written", read * 32, written * 32)?;
        }
        if self.shared.wavefronts > 0 {
            let s = &self.shared;
            writeln!(
                f,
                "  shared        {:>14} wavefronts ({} without conflicts)",
                s.wavefronts, s.ideal_wavefronts
            )?;
        }
        if self.local.requests > 0 {
            writeln!(f, "  local         {:>14} requests, {} bytes", self.local.requests, self.local.bytes)?;
        }
        writeln!(f, "  barriers      {:>14}", self.barriers)?;
        write!(f, "  divergent     {:>14} branches", self.divergent)
    }
}
