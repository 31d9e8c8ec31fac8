//! Tensor-core operations: mma, wmma, ldmatrix, stmatrix, movmatrix.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop)]

mod grouped;
pub mod layout;
mod ldmatrix;
mod mma;
mod number;
mod vectors;
mod wmma;

use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::error::Kind;
use crate::machine::context::{Context, Stop};
use crate::machine::registers::Reg;
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Type;

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.opcode {
        "mma" => mma::decode(d, inst),
        "wmma" => wmma::decode(d, inst),

        "ldmatrix" | "stmatrix" => ldmatrix::decode(d, inst),
        "movmatrix" => ldmatrix::decode_movmatrix(d, inst),
        opcode => Err(unsupported(format!("the instruction `{opcode}`"))),
    }
}

/// Takes `.sync.aligned`, which all instructions of this family must have.
fn sync_aligned(mods: &mut Mods<'_, '_>) -> Result<(), Refusal> {
    if mods.take("sync") && mods.take("aligned") {
        Ok(())
    } else {
        Err(invalid(format!("`{}` without `.sync.aligned`", mods.written())))
    }
}

/// The registers of `{a, b, ...}`, exactly `n` of them.
fn vector<'o, 'a>(op: &'o Operand<'a>, n: usize, what: &str) -> Result<&'o [Operand<'a>], Refusal> {
    match op {
        Operand::Vector(regs) if regs.len() == n => Ok(regs),
        Operand::Vector(regs) => {
            Err(invalid(format!("{what} has {n} registers here, {} are given", regs.len())))
        }
        _ => Err(invalid(format!("{what} must be a vector of {n} registers in braces"))),
    }
}

/// Source registers; immediates are not allowed in fragments.
fn sources(
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

fn destinations(d: &mut Decoder<'_, '_>, ops: &[Operand<'_>], ty: Type) -> Result<Vec<Reg>, Refusal> {
    ops.iter().map(|op| d.dst(op, ty)).collect()
}

/// The ISA leaves it undefined what these instructions do when a lane of the warp has exited, never existed, or has a
/// false guard. Nobody should rely on it: it ends the launch.
#[inline(always)]
fn whole_warp(ctx: &Context<'_>, mask: u32) -> Result<(), Stop> {
    if mask == u32::MAX { Ok(()) } else { Err(partial_warp(ctx, mask)) }
}

#[cold]
fn partial_warp(ctx: &Context<'_>, mask: u32) -> Stop {
    ctx.fault(
        Kind::WarpMask,
        !mask,
        "the instruction needs all 32 lanes of the warp; these do not take part".to_owned(),
    )
}
