//! How a function's frame is set up: its constants and special registers are written when it begins.

use crate::machine::block::Block;
use crate::machine::launch::LaunchState;
use crate::machine::program::{Function, Special};
use crate::machine::registers::{Definedness, LANES, Reg, Registers, Width};
use crate::machine::warp::{Frame, WarpRun};

pub(super) fn broadcast(regs: &mut Registers, reg: Reg, mask: u32, value: u64) {
    match reg.width {
        Width::None => return,
        Width::Pred => regs.set_pred(reg, mask, if value != 0 { u32::MAX } else { 0 }),
        Width::B16 | Width::B32 => regs.set::<u32>(reg, mask, &[value as u32; LANES]),
        Width::B64 => regs.set::<u64>(reg, mask, &[value; LANES]),
        Width::B128 => regs.set::<u128>(reg, mask, &[u128::from(value); LANES]),
    }
    regs.set_defined(reg, mask, u32::MAX);
}

/// Selects the frame of a function and sets it up in the lanes of `mask`.
pub(super) fn enter(run: &mut WarpRun, launch: &LaunchState<'_>, frame: Frame, mask: u32, block: &Block) {
    let f = &launch.program.functions[frame.function as usize];
    run.warp.select(frame);
    let regs = &mut run.warp.regs;
    regs.reserve(f.rows as usize, f.preds as usize);
    regs.forget(f.rows as usize, f.preds as usize, mask);
    for (reg, constant) in &f.constants {
        broadcast(regs, *reg, mask, launch.resolve(*constant, frame.local_base, block.shared_base()));
    }
    for (reg, special) in &f.specials {
        set_special(regs, *reg, mask, *special, launch, run.warp.id, block);
    }
    begin_local(run, f, frame, mask);
}

/// Sets up the frame of a kernel that [`enter`] has set up for an earlier block: its constants and most special registers lie
/// there still, because rows of their own hold them.
pub(super) fn enter_again(
    run: &mut WarpRun,
    launch: &LaunchState<'_>,
    frame: Frame,
    defined: &Definedness,
    block: &Block,
) {
    let f = &launch.program.functions[frame.function as usize];
    run.warp.select(frame);
    run.warp.regs.set_definedness(defined);
    for (reg, special) in f.specials.iter().filter(|(_, special)| special.differs_by_block()) {
        set_special(&mut run.warp.regs, *reg, u32::MAX, *special, launch, run.warp.id, block);
    }
    begin_local(run, f, frame, u32::MAX);
}

fn begin_local(run: &mut WarpRun, f: &Function, frame: Frame, mask: u32) {
    if f.local_bytes > 0 {
        run.warp.local.reserve(frame.local_base + f.local_bytes);
        run.warp.local.begin(mask, frame.local_base, f.local_bytes, &f.local_live);
    }
}

fn set_special(
    regs: &mut Registers,
    reg: Reg,
    mask: u32,
    special: Special,
    launch: &LaunchState<'_>,
    warp: u32,
    block: &Block,
) {
    use Special as S;
    let [bx, by, bz] = launch.block;
    let [gx, gy, gz] = launch.grid;
    let [cx, cy, cz] = block.index;
    let [nx, ny, nz] = launch.cluster;
    let (rx, ry, rz) = (cx % nx, cy % ny, cz % nz);
    let mut lanes = [0; LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        let thread = warp * LANES as u32 + i as u32;
        let bit = 1u32 << i;
        *lane = match special {
            S::TidX => thread % bx,
            S::TidY => thread / bx % by,
            S::TidZ => thread / bx / by,
            S::NtidX => bx,
            S::NtidY => by,
            S::NtidZ => bz,
            S::CtaidX => cx,
            S::CtaidY => cy,
            S::CtaidZ => cz,
            S::NctaidX => gx,
            S::NctaidY => gy,
            S::NctaidZ => gz,
            S::ClusteridX => cx / nx,
            S::ClusteridY => cy / ny,
            S::ClusteridZ => cz / nz,
            S::NclusteridX => gx / nx,
            S::NclusteridY => gy / ny,
            S::NclusteridZ => gz / nz,
            S::LaneId => i as u32,
            S::WarpId => warp,
            S::NwarpId => block.warps,
            S::SmId => (block.number % u64::from(launch.multiprocessors)) as u32,
            S::NsmId => launch.multiprocessors,
            S::LanemaskEq => bit,
            S::LanemaskLt => bit - 1,
            S::LanemaskLe => bit | (bit - 1),
            S::LanemaskGt => !(bit | (bit - 1)),
            S::LanemaskGe => !(bit - 1),
            S::DynamicSmemSize => launch.shared_span - launch.dynamic_shared,
            S::TotalSmemSize => launch.shared_bytes,
            S::ReservedSmemOffset1 => block.shared_base() as u32 + block.shared.reserved_at(),
            S::Envreg1 => (launch.workspace >> 32) as u32,
            S::Envreg2 => launch.workspace as u32,
            S::ClusterCtaidX => rx,
            S::ClusterCtaidY => ry,
            S::ClusterCtaidZ => rz,
            S::ClusterCtarank => rx + nx * (ry + ny * rz),
            S::ClusterNctaidX => nx,
            S::ClusterNctaidY => ny,
            S::ClusterNctaidZ => nz,
            S::ClusterNctarank => nx * ny * nz,
            S::GridId | S::IsExplicitCluster => 0,
        };
    }
    match special {
        S::GridId => broadcast(regs, reg, mask, u64::from(launch.serial)),
        S::IsExplicitCluster => broadcast(regs, reg, mask, u64::from(launch.explicit_cluster)),
        _ => {
            regs.set::<u32>(reg, mask, &lanes);
            regs.set_defined(reg, mask, u32::MAX);
        }
    }
}
