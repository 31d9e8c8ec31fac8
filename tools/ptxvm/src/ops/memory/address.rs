//! Conversions of addresses, and tests of their space: `cvta`, `isspacep`, `mapa`, `getctarank`.

use super::operands::space;
use crate::decode::decoder::{Decoder, operands, window};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::ErrorKind;
use crate::machine::cluster::{RANK_BIT, rank_of};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::layout::{PARAM_WINDOW, WINDOW_BYTES};
use crate::machine::memory::access::by_space;
use crate::machine::memory::{lanes, pick};
use crate::ops::forms::Handler;
use crate::ops::lane::{Unary, unary};
use crate::ptx::ast::Instruction;
use crate::types::{Space, Type};

/// d = a + imm
struct Shift;

impl Unary for Shift {
    type A = u64;
    type D = u64;
    fn eval(imm: u64, a: u64) -> u64 {
        a.wrapping_add(imm)
    }
}

/// The generic address of what compilers may have as an offset among the parameters, because they took a parameter's address
/// in 32 bits (`mov.b32`).
pub(super) const fn parameter(window: u64, at: u64) -> u64 {
    if at < WINDOW_BYTES { at | window } else { at }
}

/// d = a, or that behind the window `imm`
struct Parameter;

impl Unary for Parameter {
    type A = u64;
    type D = u64;
    fn eval(imm: u64, a: u64) -> u64 {
        parameter(imm, a)
    }
}

pub(super) fn cvta(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let to = mods.take("to");
    let space = space(&mut mods);
    let ty = mods.ty()?;
    mods.finish()?;
    if space == Space::Generic {
        return Err(invalid(format!("`{written}` names no space")));
    }
    if ty == Type::U32 {
        return Err(unsupported(format!("`{written}`: addresses of 32 bits")));
    }
    if ty != Type::U64 {
        return Err(invalid(format!("`{written}`: an address has type .u64")));
    }
    let [dst, src] = operands(inst)?;
    let dst = d.dst(dst, Type::U64)?;
    let src = d.src(src, Type::U64)?;
    let (operation, imm): (Handler, _) = match (space, to) {
        // Addresses of parameters are generic from the beginning, but for those in 32 bits. They are a kernel's, by the ISA also in
        // functions.
        (Space::Param, true) => (unary::<Shift>, 0),
        (Space::Param, false) => (unary::<Parameter>, PARAM_WINDOW),
        (_, true) => (unary::<Shift>, window(space).wrapping_neg()),
        (_, false) => (unary::<Shift>, window(space)),
    };
    d.lane(operation(d.isa), Class::Integer, &[dst], &[src], imm);
    Ok(())
}

/// `isspacep`: destination a predicate, source the address.
#[derive(Debug)]
struct IsSpace {
    space: Space,
    /// Whether shared memory of other blocks of the cluster counts.
    cluster: bool,
}

pub(super) fn isspacep(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let cluster = inst.modifiers.contains(&"shared::cluster");
    let space = space(&mut mods);
    mods.finish()?;
    if space == Space::Generic {
        return Err(invalid("`isspacep` names no space"));
    }
    let [dst, src] = operands(inst)?;
    let dst = d.dst(dst, Type::Pred)?;
    let src = d.src(src, Type::U64)?;
    d.warp(IsSpace { space, cluster }, Class::Integer, &[dst], &[src]);
    Ok(())
}

impl WarpOp for IsSpace {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.regs().get::<u64>(inst.src(0));
        let parts = by_space(mask, at);
        let mut hit = parts.iter().find(|(space, _)| *space == self.space).map_or(0, |(_, lanes)| *lanes);
        let blocks = ctx.cluster_blocks();
        if self.space == Space::Shared && blocks > 1 {
            let at = ctx.regs().get::<u64>(inst.src(0)).map(|at| rank_of(at & (WINDOW_BYTES - 1)));
            let own = ctx.block.rank();
            hit = pick(hit, |lane| if self.cluster { at[lane] < blocks } else { at[lane] == own });
        }
        let defined = ctx.regs().defined(inst.src(0));
        ctx.regs().set_pred(inst.dst(0), mask, hit);
        ctx.regs().set_defined(inst.dst(0), mask, defined);
        Ok(())
    }
}

/// `mapa`: the address in the shared memory of a block of the cluster. Sources: the address in the own, and the block's rank.
#[derive(Debug)]
struct MapAddress {
    wide: bool,
}

pub(super) fn mapa(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    mods.take("shared::cluster");
    let ty = mods.ty()?;
    mods.finish()?;
    if !matches!(ty, Type::U32 | Type::U64) {
        return Err(invalid("`mapa` gives an address of type .u32 or .u64"));
    }
    let [dst, address, rank] = operands(inst)?;
    let (dst, address, rank) = (d.dst(dst, ty)?, d.src(address, ty)?, d.src(rank, Type::U32)?);
    d.warp(MapAddress { wide: ty == Type::U64 }, Class::Integer, &[dst], &[address, rank]);
    Ok(())
}

impl WarpOp for MapAddress {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        ctx.need_defined(mask, inst.src(1), "the rank of a block");
        let ranks = *ctx.regs().get::<u32>(inst.src(1));
        let blocks = ctx.cluster_blocks();
        let others = pick(mask, |lane| ranks[lane] as usize >= blocks);
        if others != 0 {
            let rank = ranks[others.trailing_zeros() as usize];
            let message = format!(
                "the shared memory of block {rank} of the cluster, which has {blocks}: ranks begin with 0"
            );
            return Err(ctx.fault(ErrorKind::Cluster, others, message));
        }
        let (from, to) = (inst.src(0), inst.dst(0));
        let rank_bits = 0xff << RANK_BIT;
        if self.wide {
            let mut address = *ctx.regs().get::<u64>(from);
            for lane in lanes(mask) {
                address[lane] = address[lane] & !rank_bits | u64::from(ranks[lane]) << RANK_BIT;
            }
            ctx.regs().set::<u64>(to, mask, &address);
        } else {
            let mut address = *ctx.regs().get::<u32>(from);
            for lane in lanes(mask) {
                address[lane] = address[lane] & !(rank_bits as u32) | ranks[lane] << RANK_BIT;
            }
            ctx.regs().set::<u32>(to, mask, &address);
        }
        let known = ctx.regs().defined(from);
        ctx.regs().set_defined(to, mask, known);
        Ok(())
    }
}

/// `getctarank`: the rank of the block in whose shared memory an address lies.
#[derive(Debug)]
struct CtaRank {
    wide: bool,
}

pub(super) fn getctarank(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    mods.take("shared::cluster");
    let ty = mods.ty()?;
    mods.finish()?;
    if !matches!(ty, Type::U32 | Type::U64) {
        return Err(invalid("`getctarank` takes an address of type .u32 or .u64"));
    }
    let [dst, address] = operands(inst)?;
    let (dst, address) = (d.dst(dst, Type::U32)?, d.src(address, ty)?);
    d.warp(CtaRank { wide: ty == Type::U64 }, Class::Integer, &[dst], &[address]);
    Ok(())
}

impl WarpOp for CtaRank {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let known = ctx.regs().defined(inst.src(0));
        let at = match self.wide {
            true => *ctx.regs().get::<u64>(inst.src(0)),
            false => ctx.regs().get::<u32>(inst.src(0)).map(u64::from),
        };
        let ranks = at.map(|at| ctx.split_rank(at & (WINDOW_BYTES - 1)).0 as u32);
        ctx.regs().set::<u32>(inst.dst(0), mask, &ranks);
        ctx.regs().set_defined(inst.dst(0), mask, known);
        Ok(())
    }
}
