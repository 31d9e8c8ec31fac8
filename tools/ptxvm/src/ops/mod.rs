//! The instructions, a file or folder for each family: how modifiers and operands are read (`decode`), and the meaning
//! for a lane or a warp.

pub mod approx;
pub mod async_copy;
pub mod atomic;
mod bulk;
pub mod cancel;
pub mod convert;
pub mod float;
pub mod forms;
pub mod half;
pub mod integer;
pub mod lane;
pub mod logic;
pub mod matrix;
pub mod mbarrier;
pub mod memory;
pub mod moves;
pub mod rounding;
pub mod shuffle;
pub mod tensormap;
pub mod video;

use crate::decode::decoder::Decoder;
use crate::decode::{Refusal, unsupported};
use crate::machine::inst::{Defs, Moved};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::{Type, TypeKind};

/// A family's decoder: appends the instruction's bytecode to the decoder's code.
pub type Decode = fn(&mut Decoder<'_, '_>, &Instruction<'_>) -> Result<(), Refusal>;

/// Decodes one instruction that is not control flow.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    // `add` and its like are different instructions for integers, for f32 and f64, and for the 16-bit formats.
    let ty = inst.modifiers.iter().rev().find_map(|m| Type::from_name(m));
    let arithmetic = match ty {
        Some(Type::F16 | Type::F16X2 | Type::BF16 | Type::BF16X2) => half::decode,
        Some(ty) if ty.kind() == TypeKind::Float => float::decode,
        _ => integer::decode,
    };
    let family: Decode = match inst.opcode {
        "st" | "red" if inst.modifiers.first() == Some(&"async") => bulk::small::decode,
        "add" | "sub" | "fma" if half::is_mixed(inst) => half::mixed,
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "abs" | "neg" | "min" | "max" => arithmetic,
        "addc" | "subc" | "madc" | "mul24" | "mad24" | "sad" | "rem" | "popc" | "clz" | "bfind" | "fns"
        | "brev" | "bfe" | "bfi" | "bmsk" | "szext" | "dp4a" | "dp2a" => integer::decode,
        "and" | "or" | "xor" | "not" | "cnot" | "lop3" | "shl" | "shr" | "shf" | "prmt" => logic::decode,
        "setp" | "set" | "selp" | "slct" | "mov" => moves::decode,
        "copysign" | "testp" | "rcp" | "sqrt" | "rsqrt" | "sin" | "cos" | "lg2" | "ex2" | "tanh" => {
            approx::decode
        }
        "cvt" => convert::decode,
        "ld" | "ldu" | "st" | "cvta" | "isspacep" | "prefetch" | "prefetchu" | "membar" | "fence"
        | "createpolicy" | "applypriority" | "discard" | "mapa" | "getctarank" => memory::decode,
        "atom" | "red" => atomic::decode,
        "cp" => async_copy::decode,
        "mbarrier" => mbarrier::decode,
        "tensormap" => tensormap::decode,
        "clusterlaunchcontrol" => cancel::decode,
        "mma" | "wmma" | "wgmma" | "setmaxnreg" | "ldmatrix" | "stmatrix" | "movmatrix" => matrix::decode,
        "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" => shuffle::decode,
        opcode if opcode.starts_with('v') => video::decode,
        "tcgen05" => {
            return Err(unsupported("the instruction `tcgen05`: tensor memory and its products, of sm_100"));
        }
        opcode => return Err(unsupported(format!("the instruction `{opcode}`"))),
    };
    family(d, inst)?;
    let constant = |i: usize| matches!(inst.operands.get(i), Some(Operand::Integer(_)));
    let rule = match inst.opcode {
        "and" if constant(1) => Defs::Some(0b01),
        "and" if constant(2) => Defs::Some(0b10),
        "bfi" => Defs::Some(0b1101),
        "and" | "or" | "xor" | "not" | "lop3" | "mov" => Defs::Bytes,
        _ => moved(inst, ty).map_or(Defs::All, Defs::Moved),
    };
    let strong = ["volatile", "relaxed", "acquire"].iter().any(|m| inst.modifiers.contains(m));
    if let Some(last) = d.code.last_mut() {
        let waits = |m: &&str| matches!(*m, "test_wait" | "try_wait");
        last.may_wait = inst.opcode == "atom"
            || inst.opcode == "ld" && strong
            || inst.opcode == "mbarrier" && inst.modifiers.first().is_some_and(waits);
    }
    if let Some(last) = d.code.last_mut().filter(|last| last.defs == Defs::All && last.dsts == 1) {
        last.defs = rule;
    }
    Ok(())
}

/// How an instruction moves bytes, if it does nothing else.
fn moved(inst: &Instruction<'_>, ty: Option<Type>) -> Option<Moved> {
    let ty = ty?;
    let bytes = ty.bytes() as u8;
    Some(match inst.opcode {
        "shl" => Moved::Left(bytes),
        "shr" => Moved::Right(bytes, ty.is_signed()),
        "bfe" => Moved::Field(bytes, ty.is_signed()),
        "shf" => Moved::Funnel(inst.modifiers.contains(&"l")),
        "prmt" => Moved::Permute,
        "cvt" => {
            // Rounding, saturation and packing are modifiers of their own.
            let [to, from] = inst.modifiers.as_slice() else { return None };
            let [to, from] = [Type::from_name(to)?, Type::from_name(from)?];
            if [to, from].iter().any(|ty| !matches!(ty.kind(), TypeKind::Signed | TypeKind::Unsigned)) {
                return None;
            }
            let (from_signed, to_signed) = (from.is_signed(), to.is_signed());
            Moved::Resize { from: from.bytes() as u8, from_signed, to: to.bytes() as u8, to_signed }
        }
        _ => return None,
    })
}
