//! Tensor-core operations: mma, wmma, wgmma, ldmatrix, stmatrix, movmatrix; and setmaxnreg, which warpgroups share registers by.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

mod descriptor;
mod grouped;
pub mod layout;
mod ldmatrix;
mod mma;
mod narrow;
mod number;
mod operands;
mod tile;
mod vectors;
mod wgmma;
mod wmma;

use crate::decode::decoder::Decoder;
use crate::decode::{Refusal, unsupported};
use crate::ptx::ast::Instruction;

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.opcode {
        "mma" if narrow::has_kind(inst) => narrow::decode(d, inst),
        "mma" => mma::decode(d, inst),
        "wmma" => wmma::decode(d, inst),
        "wgmma" => wgmma::decode(d, inst),
        "setmaxnreg" => wgmma::decode_registers(d, inst),
        "ldmatrix" | "stmatrix" => ldmatrix::decode(d, inst),
        "movmatrix" => ldmatrix::decode_movmatrix(d, inst),
        opcode => Err(unsupported(format!("the instruction `{opcode}`"))),
    }
}
