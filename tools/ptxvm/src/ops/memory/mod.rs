//! Loads, stores, address conversions, fences, cache hints.

mod address;
mod fence;
mod hint;
mod load;
pub(crate) mod operands;
mod store;

use crate::decode::decoder::Decoder;
use crate::decode::{Refusal, unsupported};
use crate::ptx::ast::Instruction;

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    match inst.opcode {
        "ld" | "ldu" => load::load(d, inst),
        "st" => store::store(d, inst),
        "cvta" => address::cvta(d, inst),
        "isspacep" => address::isspacep(d, inst),
        "mapa" => address::mapa(d, inst),
        "getctarank" => address::getctarank(d, inst),
        "prefetch" | "prefetchu" | "applypriority" => hint::hint(d, inst),
        "discard" => hint::discard(d, inst),
        "membar" | "fence" => fence::fence(d, inst),
        "createpolicy" => hint::createpolicy(d, inst),
        opcode => Err(unsupported(format!("the instruction `{opcode}`"))),
    }
}
