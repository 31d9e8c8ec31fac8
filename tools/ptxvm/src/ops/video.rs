//! SIMD within a register: `vadd4`, `vabsdiff4` and their like on two halves or four bytes.

use super::lane::{Ternary, ternary};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::Class;
use crate::ptx::ast::Instruction;
use crate::types::Type;

/// The operation on each pair of elements.
const OPERATIONS: [(&str, u64); 6] =
    [("vadd", 0), ("vsub", 1), ("vavrg", 2), ("vabsdiff", 3), ("vmin", 4), ("vmax", 5)];

// Bits of `imm`: operation 0-2, then flags.
const HALVES: u64 = 1 << 3;
const SIGNED_A: u64 = 1 << 4;
const SIGNED_B: u64 = 1 << 5;
const SIGNED_D: u64 = 1 << 6;
const SATURATE: u64 = 1 << 7;
const SUM: u64 = 1 << 8;

/// `vop2` and `vop4`; elements from c where the destination's mask leaves them out, which it never does here.
struct Video;

impl Ternary for Video {
    type A = u32;
    type B = u32;
    type C = u32;
    type D = u32;
    fn eval(imm: u64, a: u32, b: u32, c: u32) -> u32 {
        let bits = if imm & HALVES != 0 { 16 } else { 8 };
        let element = |word: u32, i: u32, signed: bool| {
            let up = word << (32 - bits * (i + 1));
            if signed { i64::from(up as i32 >> (32 - bits)) } else { i64::from(up >> (32 - bits)) }
        };
        let (low, high) = if imm & SIGNED_D != 0 {
            (-(1i64 << (bits - 1)), (1i64 << (bits - 1)) - 1)
        } else {
            (0, (1i64 << bits) - 1)
        };
        let mut d = if imm & SUM != 0 { c } else { 0 };
        for i in 0..32 / bits {
            let (x, y) = (element(a, i, imm & SIGNED_A != 0), element(b, i, imm & SIGNED_B != 0));
            let mut value = match imm & 7 {
                0 => x + y,
                1 => x - y,
                // Half of the sum, rounded away from zero where it is a half.
                2 => (x + y + i64::from(x + y >= 0)) >> 1,
                3 => (x - y).abs(),
                4 => x.min(y),
                _ => x.max(y),
            };
            if imm & SATURATE != 0 {
                value = value.clamp(low, high);
            }
            if imm & SUM != 0 {
                d = d.wrapping_add(value as u32);
            } else {
                d |= (value as u32 & (u32::MAX >> (32 - bits))) << (bits * i);
            }
        }
        d
    }
}

/// Decodes `vadd2`, `vadd4` and the rest. Selectors of elements (`a.b3210`) are not built.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let (name, halves) = match (inst.opcode.strip_suffix('2'), inst.opcode.strip_suffix('4')) {
        (Some(name), _) => (name, HALVES),
        (_, Some(name)) => (name, 0),
        _ => return Err(unsupported(format!("the instruction `{}`", inst.opcode))),
    };
    let operation = OPERATIONS.iter().find(|(n, _)| *n == name).map(|(_, code)| *code);
    let operation = operation.ok_or_else(|| unsupported(format!("the instruction `{}`", inst.opcode)))?;
    let mut mods = Mods::new(inst);
    let mut imm = operation | halves;
    for flag in [SIGNED_D, SIGNED_A, SIGNED_B] {
        imm |= match mods.ty()? {
            Type::U32 => 0,
            Type::S32 => flag,
            ty => return Err(invalid(format!("`{}` with {ty}", inst.opcode))),
        };
    }
    if mods.take("sat") {
        imm |= SATURATE;
    }
    if mods.take("add") {
        imm |= SUM;
    }
    mods.finish()?;
    let [dst, a, b, c] = operands(inst)?;
    let dst = d.dst(dst, Type::U32)?;
    let (a, b, c) = (d.src(a, Type::U32)?, d.src(b, Type::U32)?, d.src(c, Type::U32)?);
    d.lane(ternary::<Video>(d.isa), Class::Integer, &[dst], &[a, b, c], imm);
    Ok(())
}
