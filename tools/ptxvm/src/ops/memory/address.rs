//! Conversions of addresses, and tests of their space: `cvta`, `isspacep`.

use super::operands::space;
use crate::decode::decoder::{Decoder, operands, window};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, WarpOp};
use crate::machine::memory::access::by_space;
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
    // Addresses of parameters are generic from the beginning.
    let base = if space == Space::Param { 0 } else { window(space) };
    let imm = if to { base.wrapping_neg() } else { base };
    d.lane(unary::<Shift>(d.isa), Class::Integer, &[dst], &[src], imm);
    Ok(())
}

/// `isspacep`: destination a predicate, source the address.
#[derive(Debug)]
struct IsSpace(Space);

pub(super) fn isspacep(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let space = space(&mut mods);
    mods.finish()?;
    if space == Space::Generic {
        return Err(invalid("`isspacep` names no space"));
    }
    let [dst, src] = operands(inst)?;
    let dst = d.dst(dst, Type::Pred)?;
    let src = d.src(src, Type::U64)?;
    d.warp(IsSpace(space), Class::Integer, &[dst], &[src]);
    Ok(())
}

impl WarpOp for IsSpace {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let at = ctx.regs().get::<u64>(inst.src(0));
        let parts = by_space(mask, at);
        let hit = parts.iter().find(|(space, _)| *space == self.0).map_or(0, |(_, lanes)| *lanes);
        let defined = ctx.regs().defined(inst.src(0));
        ctx.regs().set_pred(inst.dst(0), mask, hit);
        ctx.regs().set_defined(inst.dst(0), mask, defined);
        Ok(())
    }
}
