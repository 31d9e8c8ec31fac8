//! Logic, shifts, permutations of bytes.

use super::forms::{self, Form, signed, table};
use super::integer::{Int, ops};
use super::lane::{binary, lane_op, ternary, unary};
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, Defs, Inst};
use crate::machine::registers::{Reg, Registers, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Type;

use std::marker::PhantomData;

const FORMS: &[Form] = &[
    Form::new("and", &[], "t=tt", table![binary And: B16 u16, B32 u32, B64 u64]),
    Form::new("or", &[], "t=tt", table![binary Or: B16 u16, B32 u32, B64 u64]),
    Form::new("xor", &[], "t=tt", table![binary Xor: B16 u16, B32 u32, B64 u64]),
    Form::new("not", &[], "t=t", table![unary Not: B16 u16, B32 u32, B64 u64]),
    Form::new("cnot", &[], "t=t", table![unary Cnot: B16 u16, B32 u32, B64 u64]),
    Form::new("shl", &[], "t=tu", table![binary Shl: B16 u16, B32 u32, B64 u64]),
    Form::new("shr", &[], "t=tu", table![binary Shr: B16 u16, B32 u32, B64 u64]),
    Form::new("shr", &[], "t=tu", signed!(binary Shr)),
    Form::new("shf", &["l", "wrap"], "t=ttu", &[(Type::B32, ternary::<FunnelLeft>)]).with(31),
    Form::new("shf", &["l", "clamp"], "t=ttu", &[(Type::B32, ternary::<FunnelLeft>)]),
    Form::new("shf", &["r", "wrap"], "t=ttu", &[(Type::B32, ternary::<FunnelRight>)]).with(31),
    Form::new("shf", &["r", "clamp"], "t=ttu", &[(Type::B32, ternary::<FunnelRight>)]),
    Form::new("prmt", &[], "t=ttu", &[(Type::B32, ternary::<Permute>)]),
    // Four selectors of 16 bits, for c = 3, 2, 1, 0.
    Form::new("prmt", &["f4e"], "t=ttu", PERMUTE_MODE).with(0x6543_5432_4321_3210),
    Form::new("prmt", &["b4e"], "t=ttu", PERMUTE_MODE).with(0x0123_7012_6701_5670),
    Form::new("prmt", &["rc8"], "t=ttu", PERMUTE_MODE).with(0x3333_2222_1111_0000),
    Form::new("prmt", &["ecl"], "t=ttu", PERMUTE_MODE).with(0x3333_3222_3211_3210),
    Form::new("prmt", &["ecr"], "t=ttu", PERMUTE_MODE).with(0x3210_2210_1110_0000),
    Form::new("prmt", &["rc16"], "t=ttu", PERMUTE_MODE).with(0x3232_1010_3232_1010),
];

const PERMUTE_MODE: forms::Handlers = &[(Type::B32, ternary::<PermuteMode>)];

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    if inst.opcode == "lop3" {
        return lop3(d, inst);
    }
    if matches!(inst.modifiers.as_slice(), ["pred"]) {
        return predicates(d, inst);
    }
    forms::decode(d, FORMS, Class::Integer, inst)?;
    Ok(())
}

// -------------------------------------------------------------------------------------------------- logic

ops! {
    Binary And<T: Int>(_, a: T, b: T) -> T { a.and(b) }
    Binary Or<T: Int>(_, a: T, b: T) -> T { a.or(b) }
    Binary Xor<T: Int>(_, a: T, b: T) -> T { a.xor(b) }
    Unary Not<T: Int>(_, a: T) -> T { a.not() }
    Unary Cnot<T: Int>(_, a: T) -> T { if a == T::ZERO { T::ONE } else { T::ZERO } }
    Binary Shl<T: Int>(_, a: T, n: u32) -> T { a.shl(n) }
    Binary Shr<T: Int>(_, a: T, n: u32) -> T { a.shr(n) }
}

/// `and`, `or`, `xor`, `not` of predicates: `imm` is the truth table, bit 2a + b; `not` has no b.
fn predicates(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut table = match inst.opcode {
        "and" => 0b1000,
        "or" => 0b1110,
        "xor" => 0b0110,
        "not" => 0b0011,
        opcode => return Err(unsupported(format!("`{opcode}.pred`"))),
    };
    let (dst, a, b) = if inst.opcode == "not" {
        let [dst, a] = operands(inst)?;
        (dst, d.pred(a)?, (Reg::NONE, false))
    } else {
        let [dst, a, b] = operands(inst)?;
        (dst, d.pred(a)?, d.pred(b)?)
    };
    if a.1 {
        table = table >> 2 | (table & 0b0011) << 2;
    }
    if b.1 {
        table = table >> 1 & 0b0101 | (table & 0b0101) << 1;
    }
    let dst = d.dst(dst, Type::Pred)?;
    d.lane(predicate_logic, Class::Integer, &[dst], &[a.0, b.0], table).defs = Defs::Own;
    Ok(())
}

/// A predicate from two others by the truth table in `imm`. One that is uninitialised does not count where the result is the same
/// for both of its values, because compilers make an `or` of `||` and an `and` of `&&`.
pub(super) fn predicate_logic(regs: &mut Registers, inst: &Inst, mask: u32) {
    let row = |bit: u32, lanes: u32| if inst.imm >> bit & 1 != 0 { lanes } else { 0 };
    let result = |a: u32, b: u32| row(0, !a & !b) | row(1, !a & b) | row(2, a & !b) | row(3, a & b);
    let [(a, known_a), (b, known_b)] =
        [inst.src(0), inst.src(1)].map(|reg| (regs.pred(reg), regs.defined(reg)));
    let least = result(a & known_a, b & known_b);
    let others = [
        result(a | !known_a, b & known_b),
        result(a & known_a, b | !known_b),
        result(a | !known_a, b | !known_b),
    ];
    let differs = others.iter().fold(0, |all, other| all | (other ^ least));
    regs.set_pred(inst.dst(0), mask, result(a, b));
    regs.set_defined(inst.dst(0), mask, !differs);
}

/// Any function of three bits: bit 4a + 2b + c of `imm` is its value.
struct Lop3;

lane_op!(Lop3, |table, a: u32, b: u32, c: u32| -> u32 {
    // Rows as masks: these do not depend on the lane, and are made once.
    let row = |bit: u32| ((table >> bit & 1) as u32).wrapping_neg();
    let pick = |s: u32, one: u32, zero: u32| zero ^ (s & (one ^ zero));
    let not_a = pick(b, pick(c, row(3), row(2)), pick(c, row(1), row(0)));
    pick(a, pick(b, pick(c, row(7), row(6)), pick(c, row(5), row(4))), not_a)
});

/// `lop3.b32 d, a, b, c, table` and `lop3.BoolOp.b32 d|p, a, b, c, table, q` with p = (d != 0) BoolOp q.
fn lop3(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    // Truth tables of `predicate_logic`.
    let bool_op = mods.one_of(&[("or", 0b1110), ("and", 0b1000)]);
    if mods.ty()? != Type::B32 {
        return Err(unsupported(format!("`{}`", mods.written())));
    }
    mods.finish()?;
    let (dst, rest, q): (_, &[Operand<'_>; 4], _) = if bool_op.is_some() {
        let [dst, rest @ .., q] = operands::<6>(inst)?;
        (dst, rest, Some(q))
    } else {
        let [dst, rest @ ..] = operands::<5>(inst)?;
        (dst, rest, None)
    };
    let (dst, p) = match (dst, bool_op) {
        (Operand::Pair(dst, p), Some(_)) => (&**dst, Some(&**p)),
        (dst, None) => (dst, None),
        _ => return Err(invalid("`lop3` with a Boolean operation writes `d|p`")),
    };
    let [a, b, c, table] = rest;
    let Operand::Integer(table) = table else {
        return Err(invalid("the table of `lop3` is a number"));
    };
    // Bits above the table's eight are ignored, as assemblers do.
    let table = table & 0xff;
    let srcs = [d.src(a, Type::B32)?, d.src(b, Type::B32)?, d.src(c, Type::B32)?];
    let mut result = d.dst(dst, Type::B32)?;
    let (Some(bool_op), Some(p), Some(q)) = (bool_op, p, q) else {
        d.lane(ternary::<Lop3>(d.isa), Class::Integer, &[result], &srcs, table);
        return Ok(());
    };
    let p = d.dst(p, Type::Pred)?;
    let (q, negated) = d.pred(q)?;
    if !result.is_some() {
        result = d.temp(Width::B32);
    }
    d.lane(ternary::<Lop3>(d.isa), Class::Integer, &[result], &srcs, table);
    let bool_op = if negated { bool_op >> 1 & 0b0101 | (bool_op & 0b0101) << 1 } else { bool_op };
    d.lane(not_zero, Class::Integer, &[p], &[result, q], bool_op);
    Ok(())
}

/// p = (a != 0) BoolOp q, by the truth table in `imm`.
fn not_zero(regs: &mut Registers, inst: &Inst, mask: u32) {
    let a = regs.get::<u32>(inst.src(0));
    let a = a.iter().rev().fold(0, |bits, a| bits << 1 | u32::from(*a != 0));
    let q = regs.pred(inst.src(1));
    let row = |bit: u32, lanes: u32| if inst.imm >> bit & 1 != 0 { lanes } else { 0 };
    let p = row(0, !a & !q) | row(1, !a & q) | row(2, a & !q) | row(3, a & q);
    regs.set_pred(inst.dst(0), mask, p);
}

// -------------------------------------------------------------------------------------------------- shifts, bytes

/// The upper half of b:a shifted left; `imm` 31 wraps the amount, 0 clamps it to 32.
struct FunnelLeft;
/// The lower half of b:a shifted right.
struct FunnelRight;

#[inline(always)]
fn amount(wrap: u64, n: u32) -> u32 {
    if wrap != 0 { n & 31 } else { n.min(32) }
}

lane_op!(FunnelLeft, |wrap, a: u32, b: u32, c: u32| -> u32 {
    (((u64::from(b) << 32 | u64::from(a)) << amount(wrap, c)) >> 32) as u32
});

lane_op!(FunnelRight, |wrap, a: u32, b: u32, c: u32| -> u32 {
    ((u64::from(b) << 32 | u64::from(a)) >> amount(wrap, c)) as u32
});

/// Each byte of the result is one of the eight of b:a, by a nibble of c; the nibble's top bit spreads the byte's sign.
struct Permute;

lane_op!(Permute, |_, a: u32, b: u32, c: u32| -> u32 {
    let all = u64::from(b) << 32 | u64::from(a);
    (0..4).fold(0, |d, i| {
        let nibble = c >> (4 * i);
        let byte = (all >> (8 * (nibble & 7))) as u8;
        let byte = if nibble & 8 != 0 { (byte as i8 >> 7) as u8 } else { byte };
        d | u32::from(byte) << (8 * i)
    })
});

/// `prmt` with a mode: the lowest two bits of c choose one of four selectors in `imm`.
struct PermuteMode;

lane_op!(PermuteMode, |selectors, a: u32, b: u32, c: u32| -> u32 {
    Permute::eval(0, a, b, (selectors >> (16 * (c & 3))) as u32 & 0xffff)
});
