//! Arithmetic of f16 and bf16, also packed. Every result is rounded once and every NaN is 0x7fff.

use std::marker::PhantomData;

use super::float::{self, Add, Mul, Operation, Sub};
use super::lane::{self, Binary, Ternary, Unary, lane_op};
use super::rounding::{Mode, flag};
use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, LaneFn};
use crate::machine::isa::Isa;
use crate::ptx::ast::Instruction;
use crate::types::Type;

/// The sign bit of both formats.
const SIGN: u32 = 0x8000;
/// The NaN of both formats.
const NAN: u32 = 0x7fff;

/// f16 or bf16, whose values lie in the lower half of a `u32`, zero-extended.
pub trait Format16 {
    /// +infinity
    const INFINITY: u32;
    /// 1
    const ONE: u32;
    /// The same value as f32. Takes the lower 16 bits.
    fn wide(bits: u32) -> f32;
    /// Rounds to nearest even.
    fn narrow(x: f32) -> u32;
    /// a * b + c, rounded once.
    fn fma(a: u32, b: u32, c: u32) -> u32;
}

/// Half precision.
pub struct F16;
/// bfloat16.
pub struct Bf16;

/// The neighbour of `x` that `x + rest` lies at or is nearer to by rounding to odd: where the sum is not exact, its
/// last bit is 1. A second rounding to at least two bits less is then as good as one rounding.
#[inline(always)]
fn to_odd(x: f32, rest_positive: bool, rest_negative: bool) -> f32 {
    let bits = x.to_bits();
    let negative = bits >> 31 != 0;
    let away = u32::from(if negative { rest_negative } else { rest_positive });
    let back = u32::from(if negative { rest_positive } else { rest_negative });
    let even = !bits & 1;
    f32::from_bits(bits.wrapping_add(away & even).wrapping_sub(back & even))
}

impl Format16 for F16 {
    const INFINITY: u32 = 0x7c00;
    const ONE: u32 = 0x3c00;

    #[inline(always)]
    fn wide(bits: u32) -> f32 {
        let magnitude = bits & 0x7fff;
        let shifted = magnitude << 13;
        // The exponent's bias grows by 112; a subnormal number is the fraction of 2^-14 without its leading 1.
        let normal = shifted + (112 << 23);
        let special = shifted | 0x7f80_0000;
        let subnormal = f32::from_bits(shifted + (113 << 23)) - f32::from_bits(113 << 23);
        let value = if magnitude >= 0x7c00 {
            special
        } else if magnitude >= 0x0400 {
            normal
        } else {
            subnormal.to_bits()
        };
        f32::from_bits(value | (bits & SIGN) << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> u32 {
        let bits = x.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let sign = (bits >> 16) & SIGN;
        let special = if magnitude > 0x7f80_0000 { NAN } else { 0x7c00 | sign };
        // Adding 0.5 leaves the sum's last bit at 2^-24, the step of subnormal numbers.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        // Half a step less a bit, plus the last kept bit: a tie goes to even. A carry may reach infinity.
        let rounded = magnitude.wrapping_sub(112 << 23).wrapping_add(0x0fff + (magnitude >> 13 & 1)) >> 13;
        if magnitude >= 0x4780_0000 {
            special
        } else if magnitude < 0x3880_0000 {
            subnormal | sign
        } else {
            rounded | sign
        }
    }

    #[inline(always)]
    fn fma(a: u32, b: u32, c: u32) -> u32 {
        // The product has 22 bits and is exact; the error of the sum is a number (Knuth's two-sum).
        let (product, c) = (Self::wide(a) * Self::wide(b), Self::wide(c));
        let sum = product + c;
        let part = sum - product;
        let rest = (product - (sum - part)) + (c - part);
        Self::narrow(to_odd(sum, rest > 0.0, rest < 0.0))
    }
}

impl Format16 for Bf16 {
    const INFINITY: u32 = 0x7f80;
    const ONE: u32 = 0x3f80;

    #[inline(always)]
    fn wide(bits: u32) -> f32 {
        f32::from_bits(bits << 16)
    }

    #[inline(always)]
    fn narrow(x: f32) -> u32 {
        let bits = x.to_bits();
        let nan = bits & 0x7fff_ffff > 0x7f80_0000;
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        if nan { NAN } else { rounded }
    }

    #[inline(always)]
    fn fma(a: u32, b: u32, c: u32) -> u32 {
        // As for f16, but f32 has no room for the product's exponent.
        let product = f64::from(Self::wide(a)) * f64::from(Self::wide(b));
        let c = f64::from(Self::wide(c));
        let sum = product + c;
        let part = sum - product;
        let rest = (product - (sum - part)) + (c - part);
        let single = sum as f32;
        // Exact, and not smaller than the last bit of `sum`, or zero: its sum with `rest` has the right sign.
        let rest = (sum - f64::from(single)) + rest;
        Self::narrow(to_odd(single, rest > 0.0, rest < 0.0))
    }
}

/// `.ftz` of a source.
#[inline(always)]
pub fn flush<F: Format16>(imm: u64, x: u32) -> u32 {
    if imm & flag::FTZ != 0 && x & F::INFINITY == 0 { x & SIGN } else { x }
}

/// `.ftz`, `.sat` and `.relu` of a result, whose NaN is canonical.
#[inline(always)]
pub fn finish<F: Format16>(imm: u64, x: u32) -> u32 {
    let x = flush::<F>(imm, x);
    let nan = x == NAN;
    let positive = if x & SIGN != 0 { 0 } else { x };
    let held = if nan { 0 } else { positive.min(F::ONE) };
    if imm & flag::SAT != 0 {
        held
    } else if imm & flag::RELU != 0 {
        positive
    } else {
        x
    }
}

/// add, sub or mul: both formats have less than half of f32's bits, so that rounding to f32 first does no harm.
struct Arithmetic<O, F>(PhantomData<(O, F)>);
lane_op!([O: Operation<2>, F: Format16] Arithmetic<O, F>, |imm, a: u32, b: u32| -> u32 {
    let sources = [F::wide(flush::<F>(imm, a)), F::wide(flush::<F>(imm, b))];
    finish::<F>(imm, F::narrow(O::near(sources)))
});

struct Fma<F>(PhantomData<F>);
lane_op!([F: Format16] Fma<F>, |imm, a: u32, b: u32, c: u32| -> u32 {
    finish::<F>(imm, F::fma(flush::<F>(imm, a), flush::<F>(imm, b), flush::<F>(imm, c)))
});

struct Extremum<F, const MAX: bool>(PhantomData<F>);
lane_op!([F: Format16, const MAX: bool] Extremum<F, MAX>, |imm, a: u32, b: u32| -> u32 {
    float::extremum::<MAX>(imm, a, b, SIGN, F::INFINITY)
});

/// abs, and with `NEG` neg.
struct Sign<F, const NEG: bool>(PhantomData<F>);
lane_op!([F: Format16, const NEG: bool] Sign<F, NEG>, |imm, a: u32| -> u32 {
    let a = flush::<F>(imm, a);
    let d = if NEG { a ^ SIGN } else { a & !SIGN };
    if a & !SIGN > F::INFINITY { NAN } else { d }
});

/// An operation on 16 bits, applied to both halves of a 32-bit register.
pub struct Both<O>(PhantomData<O>);
lane_op!([O: Unary<A = u32, D = u32>] Both<O>, |imm, a: u32| -> u32 {
    O::eval(imm, a & 0xffff) | O::eval(imm, a >> 16) << 16
});
lane_op!([O: Binary<A = u32, B = u32, D = u32>] Both<O>, |imm, a: u32, b: u32| -> u32 {
    O::eval(imm, a & 0xffff, b & 0xffff) | O::eval(imm, a >> 16, b >> 16) << 16
});
lane_op!([O: Ternary<A = u32, B = u32, C = u32, D = u32>] Both<O>, |imm, a: u32, b: u32, c: u32| -> u32 {
    O::eval(imm, a & 0xffff, b & 0xffff, c & 0xffff) | O::eval(imm, a >> 16, b >> 16, c >> 16) << 16
});

/// The handler of a unary operation for one value or two.
pub fn unary<O: Unary<A = u32, D = u32>>(isa: Isa, packed: bool) -> LaneFn {
    if packed { lane::unary::<Both<O>>(isa) } else { lane::unary::<O>(isa) }
}

fn binary<O: Binary<A = u32, B = u32, D = u32>>(isa: Isa, packed: bool) -> LaneFn {
    if packed { lane::binary::<Both<O>>(isa) } else { lane::binary::<O>(isa) }
}

fn ternary<O: Ternary<A = u32, B = u32, C = u32, D = u32>>(isa: Isa, packed: bool) -> LaneFn {
    if packed { lane::ternary::<Both<O>>(isa) } else { lane::ternary::<O>(isa) }
}

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let ty = mods.ty()?;
    match ty {
        Type::F16 | Type::F16X2 => decode_as::<F16>(d, inst, mods, ty, true),
        Type::BF16 | Type::BF16X2 => decode_as::<Bf16>(d, inst, mods, ty, false),
        _ => Err(unsupported(format!("`{}`: arithmetic of {ty}", mods.written()))),
    }
}

/// Only f16 has `.ftz` and `.sat`.
fn decode_as<F: Format16>(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    ty: Type,
    is_f16: bool,
) -> Result<(), Refusal> {
    let isa = d.isa;
    let packed = matches!(ty, Type::F16X2 | Type::BF16X2);
    let lanes = if packed { 2 } else { 1 };
    let class = Class::Half;
    let mut imm = 0;
    match inst.opcode {
        "add" | "sub" | "mul" => {
            mods.take("rn");
            imm |= taken(&mut mods, is_f16, "ftz", flag::FTZ) | taken(&mut mods, is_f16, "sat", flag::SAT);
            mods.finish()?;
            let f = match inst.opcode {
                "add" => binary::<Arithmetic<Add, F>>(isa, packed),
                "sub" => binary::<Arithmetic<Sub, F>>(isa, packed),
                _ => binary::<Arithmetic<Mul, F>>(isa, packed),
            };
            float::emit::<2>(d, inst, ty, f, class, imm)?.flops = lanes;
        }
        "fma" => {
            if float::rounding(&mut mods)? != Mode::Even {
                return Err(invalid(format!("`{}`: {ty} rounds to nearest only", mods.written())));
            }
            imm |= taken(&mut mods, is_f16, "ftz", flag::FTZ) | taken(&mut mods, is_f16, "sat", flag::SAT);
            imm |= taken(&mut mods, imm & flag::SAT == 0, "relu", flag::RELU);
            mods.finish()?;
            float::emit::<3>(d, inst, ty, ternary::<Fma<F>>(isa, packed), class, imm)?.flops = 2 * lanes;
        }
        "min" | "max" => {
            imm = float::extremum_flags(&mut mods, is_f16)?;
            mods.finish()?;
            let f = match inst.opcode {
                "max" => binary::<Extremum<F, true>>(isa, packed),
                _ => binary::<Extremum<F, false>>(isa, packed),
            };
            float::emit::<2>(d, inst, ty, f, class, imm)?;
        }
        "abs" | "neg" => {
            imm |= taken(&mut mods, is_f16, "ftz", flag::FTZ);
            mods.finish()?;
            let f = match inst.opcode {
                "abs" => unary::<Sign<F, false>>(isa, packed),
                _ => unary::<Sign<F, true>>(isa, packed),
            };
            float::emit::<1>(d, inst, ty, f, class, imm)?;
        }
        _ => return Err(unsupported(format!("`{}`", mods.written()))),
    }
    Ok(())
}

/// An operation of f32 whose first source is f16 or bf16 (sm_100), which is exact in f32.
struct Mixed<F, O>(PhantomData<(F, O)>);

lane_op!([F: Format16, O: Binary<A = f32, B = f32, D = f32>] Mixed<F, O>, |imm, a: u32, b: f32| -> f32 {
    O::eval(imm, F::wide(a), b)
});

// The same of a fused product of two.
lane_op!([F: Format16, O: Ternary<A = f32, B = f32, C = f32, D = f32>] Mixed<F, O>, |imm, a: u32, b: u32, c: f32| -> f32 {
    O::eval(imm, F::wide(a), F::wide(b), c)
});

/// Whether an instruction computes in f32 with sources of f16 or bf16.
pub(super) fn is_mixed(inst: &Instruction<'_>) -> bool {
    matches!(inst.opcode, "add" | "sub" | "fma")
        && matches!(inst.modifiers.as_slice(), [.., "f32", "f16" | "bf16"])
}

/// Decodes `add`, `sub` and `fma` of f32 with sources of f16 or bf16.
///
/// # Errors
/// The instruction is wrong.
pub(super) fn mixed(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    match mods.take("f16") {
        true => mixed_of::<F16>(d, inst, mods, Type::F16),
        false => mixed_of::<Bf16>(d, inst, mods, Type::BF16),
    }
}

fn mixed_of<F: Format16>(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    ty: Type,
) -> Result<(), Refusal> {
    use float::{Directed, Fma, NearFlags};
    mods.take("bf16");
    mods.take("f32");
    let isa = d.isa;
    let fused = inst.opcode == "fma";
    let mode = if fused {
        float::rounding(&mut mods)?
    } else {
        mods.one_of(&Mode::ARITHMETIC).unwrap_or(Mode::Even)
    };
    let imm = mode as u64 | taken(&mut mods, true, "sat", flag::SAT);
    mods.finish()?;
    let f = match (inst.opcode, mode) {
        ("add", Mode::Even) => lane::binary::<Mixed<F, NearFlags<Add, f32>>>(isa),
        ("add", _) => lane::binary::<Mixed<F, Directed<Add, f32>>>(isa),
        ("sub", Mode::Even) => lane::binary::<Mixed<F, NearFlags<Sub, f32>>>(isa),
        ("sub", _) => lane::binary::<Mixed<F, Directed<Sub, f32>>>(isa),
        (_, Mode::Even) => lane::ternary::<Mixed<F, NearFlags<Fma, f32>>>(isa),
        _ => lane::ternary::<Mixed<F, Directed<Fma, f32>>>(isa),
    };
    let (dst, sources) = match inst.operands.as_slice() {
        [dst, sources @ ..] if sources.len() == if fused { 3 } else { 2 } => (dst, sources),
        _ => {
            return Err(invalid(format!(
                "`{}`: wrong number of operands",
                crate::decode::mods::written(inst)
            )));
        }
    };
    let dst = d.dst(dst, Type::F32)?;
    let mut srcs = Vec::new();
    for (i, source) in sources.iter().enumerate() {
        let last = i + 1 == sources.len();
        srcs.push(d.src(source, if last { Type::F32 } else { ty })?);
    }
    d.lane(f, Class::Float32, &[dst], &srcs, imm).flops = if fused { 2 } else { 1 };
    Ok(())
}

fn taken(mods: &mut Mods<'_, '_>, allowed: bool, name: &str, flag: u64) -> u64 {
    if allowed && mods.take(name) { flag } else { 0 }
}
