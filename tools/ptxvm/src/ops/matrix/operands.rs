//! Operands and lanes of the family's instructions: fragments in braces, and warps that must be whole.

use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid};
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::registers::Reg;
use crate::ptx::ast::Operand;
use crate::types::Type;

/// Takes `.sync.aligned`, which all instructions of this family must have.
pub(super) fn sync_aligned(mods: &mut Mods<'_, '_>) -> Result<(), Refusal> {
    if mods.take("sync") && mods.take("aligned") {
        Ok(())
    } else {
        Err(invalid(format!("`{}` without `.sync.aligned`", mods.written())))
    }
}

/// The registers of `{a, b, ...}`, exactly `n` of them.
pub(super) fn vector<'o, 'a>(
    op: &'o Operand<'a>,
    n: usize,
    what: &str,
) -> Result<&'o [Operand<'a>], Refusal> {
    match op {
        Operand::Vector(regs) if regs.len() == n => Ok(regs),
        Operand::Vector(regs) => {
            Err(invalid(format!("{what} has {n} registers here, {} are given", regs.len())))
        }
        _ => Err(invalid(format!("{what} must be a vector of {n} registers in braces"))),
    }
}

/// Source registers; immediates are not allowed in fragments.
pub(super) fn sources(
    d: &mut Decoder<'_, '_>,
    ops: &[Operand<'_>],
    ty: Type,
    out: &mut Vec<Reg>,
) -> Result<(), Refusal> {
    for op in ops {
        match op {
            Operand::Name(..) => out.push(d.src(op, ty)?),
            _ => return Err(invalid("a fragment is made of registers")),
        }
    }
    Ok(())
}

pub(super) fn destinations(
    d: &mut Decoder<'_, '_>,
    ops: &[Operand<'_>],
    ty: Type,
) -> Result<Vec<Reg>, Refusal> {
    ops.iter().map(|op| d.dst(op, ty)).collect()
}

/// A warp without all its 32 lanes ends the launch: the ISA leaves these instructions undefined when a lane has exited,
/// never existed, or has a false guard.
#[inline(always)]
pub(super) fn whole_warp(ctx: &Context<'_>, mask: u32) -> Result<(), Stop> {
    if mask == u32::MAX { Ok(()) } else { Err(partial_warp(ctx, mask)) }
}

#[cold]
fn partial_warp(ctx: &Context<'_>, mask: u32) -> Stop {
    ctx.fault(
        ErrorKind::WarpMask,
        !mask,
        "the instruction needs all 32 lanes of the warp; these do not take part".to_owned(),
    )
}
