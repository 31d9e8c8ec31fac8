//! cvt: conversions between all types.
//!
//! One slow function converts any value to any type in any rounding mode; conversions that compilers emit everywhere
//! have operations of their own, which vectorise.
//!
//! NaN becomes: the canonical NaN of f16, bf16, f32 and the 8-bit formats; the greatest number of the formats with 6 and 4
//! bits, which have no NaN; in f64 the same payload, made quiet (f16 and bf16 go through f32's canonical NaN); as an integer
//! 0, but the most negative number's pattern where the source is f64 or the destination has 64 bits. Other values beyond an
//! integer type's range go to its nearest end.

use std::marker::PhantomData;

use super::float::{self, Real};
use super::half::{self, Bf16, F16 as Half, Format16};
use super::lane::{self, Binary, Unary, lane_op};
use super::rounding::{self, F32, F64, Finite, Format, Mode, Number, flag};
use crate::decode::decoder::{Decoder, operands, width_of};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, LaneFn};
use crate::machine::isa::Isa;
use crate::machine::registers::{Value, Width};
use crate::ptx::ast::Instruction;
use crate::types::{Type, TypeKind};

/// A type to convert from or to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scalar {
    Integer { bits: u32, signed: bool },
    Float(Format),
}

/// The scalar types in the order of their numbers in an instruction's constants.
const SCALARS: [Scalar; 18] = {
    const fn integer(bits: u32, signed: bool) -> Scalar {
        Scalar::Integer { bits, signed }
    }
    [
        integer(8, false),
        integer(8, true),
        integer(16, false),
        integer(16, true),
        integer(32, false),
        integer(32, true),
        integer(64, false),
        integer(64, true),
        Scalar::Float(rounding::F16),
        Scalar::Float(rounding::BF16),
        Scalar::Float(F32),
        Scalar::Float(F64),
        Scalar::Float(rounding::TF32),
        Scalar::Float(rounding::E4M3),
        Scalar::Float(rounding::E5M2),
        Scalar::Float(rounding::E2M3),
        Scalar::Float(rounding::E3M2),
        Scalar::Float(rounding::E2M1),
    ]
};

/// The number of a type in [`SCALARS`]; a packed one has its elements'.
const fn index(ty: Type) -> Option<u64> {
    Some(match ty {
        Type::U8 => 0,
        Type::S8 => 1,
        Type::U16 => 2,
        Type::S16 => 3,
        Type::U32 => 4,
        Type::S32 => 5,
        Type::U64 => 6,
        Type::S64 => 7,
        Type::F16 | Type::F16X2 => 8,
        Type::BF16 | Type::BF16X2 => 9,
        Type::F32 => 10,
        Type::F64 => 11,
        Type::TF32 => 12,
        Type::E4M3X2 => 13,
        Type::E5M2X2 => 14,
        Type::E2M3X2 => 15,
        Type::E3M2X2 => 16,
        Type::E2M1X2 => 17,
        _ => return None,
    })
}

// Constants of the slow operation, above the flags: source type, destination type, bits of the destination register.
const FROM: u32 = 16;
const TO: u32 = 21;
const REGISTER: u32 = 26;
/// A rounding to an integral value of the same type.
const INTEGRAL: u64 = 1 << 9;

const fn low_bits(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// The value of the lower `bits` of `x`.
fn extended(x: u64, bits: u32, signed: bool) -> i128 {
    if signed { i128::from((x << (64 - bits)) as i64 >> (64 - bits)) } else { i128::from(x & low_bits(bits)) }
}

/// Any conversion, by the constants of [`Convert`].
fn convert(imm: u64, bits: u64) -> u64 {
    let from = SCALARS[(imm >> FROM & 31) as usize];
    let to = SCALARS[(imm >> TO & 31) as usize];
    let mode = Mode::from_bits(imm);
    let flush = |x: u64, format: Format| {
        let subnormal = imm & flag::FTZ != 0 && format == F32 && x & F32.limit == 0;
        if subnormal { x & 0x8000_0000 } else { x }
    };
    let value = match from {
        Scalar::Integer { bits: n, signed } => Number::Finite(Finite::integer(extended(bits, n, signed))),
        Scalar::Float(format) => {
            Number::unpack(flush(bits & low_bits(format.bits + format.pad), format), format)
        }
    };
    match to {
        Scalar::Integer { bits: n, signed } => {
            let most = if signed { (1 << (n - 1)) - 1 } else { (1 << n) - 1 };
            let least = if signed { -(1 << (n - 1)) } else { 0 };
            // Only integers become integers without being held in the range.
            let held = imm & flag::SAT != 0 || matches!(from, Scalar::Float(_));
            let whole: i128 = match value {
                Number::Nan if from == Scalar::Float(F64) || n == 64 => 1 << (n - 1),
                Number::Nan => 0,
                Number::Infinite(negative) => {
                    if negative {
                        least
                    } else {
                        most
                    }
                }
                Number::Finite(finite) => {
                    let whole = finite.to_integer(mode);
                    if held { whole.clamp(least, most) } else { whole }
                }
            };
            // The register may be wider.
            let register = (imm >> REGISTER & 0x7f) as u32;
            extended(whole as u64, n, signed) as u64 & low_bits(register)
        }
        Scalar::Float(format) => {
            let value = match value {
                Number::Finite(finite) if imm & INTEGRAL != 0 => Number::Finite(finite.integral(mode)),
                _ => value,
            };
            let packed = flush(value.pack(format, mode, imm & flag::SATFINITE != 0), format);
            let (nan, sign) = (value == Number::Nan, 1 << (format.bits + format.pad - 1));
            if imm & flag::SAT != 0 {
                let one = (format.bias as u64) << format.fraction;
                return if nan || packed & sign != 0 { 0 } else { packed.min(one) };
            }
            match (nan, format) {
                (true, F64) if from == Scalar::Float(F64) => bits | 1 << 51,
                (true, F64) if from == Scalar::Float(F32) => wide_nan(bits as u32),
                (true, F64) => wide_nan(F32.nan as u32),
                (true, rounding::TF32) => F32.nan,
                (true, _) => packed,
                _ if imm & flag::RELU != 0 && packed & sign != 0 => 0,
                _ => packed,
            }
        }
    }
}

/// An f32 NaN as f64.
#[inline(always)]
fn wide_nan(bits: u32) -> u64 {
    let bits = u64::from(bits);
    (bits & 0x8000_0000) << 32 | (bits & 0x007f_ffff) << 29 | 0x7ff8_0000_0000_0000
}

/// Any conversion; A and D are u32 or u64, as the registers are.
struct Convert<A, D>(PhantomData<(A, D)>);

trait Raw: Value {
    fn widened(self) -> u64;
    fn narrowed(bits: u64) -> Self;
}
impl Raw for u32 {
    #[inline(always)]
    fn widened(self) -> u64 {
        u64::from(self)
    }
    #[inline(always)]
    fn narrowed(bits: u64) -> Self {
        bits as Self
    }
}
impl Raw for u64 {
    #[inline(always)]
    fn widened(self) -> u64 {
        self
    }
    #[inline(always)]
    fn narrowed(bits: u64) -> Self {
        bits
    }
}

impl<A: Raw, D: Raw> Unary for Convert<A, D> {
    type A = A;
    type D = D;
    fn eval(imm: u64, a: A) -> D {
        D::narrowed(convert(imm, a.widened()))
    }
}

/// Two f32 to a packed pair with elements of so many bits; the first source is the upper one.
struct ConvertPair<const ELEMENT: u32>;
impl<const ELEMENT: u32> Binary for ConvertPair<ELEMENT> {
    type A = u32;
    type B = u32;
    type D = u32;
    fn eval(imm: u64, a: u32, b: u32) -> u32 {
        (convert(imm, b.into()) | convert(imm, a.into()) << ELEMENT) as u32
    }
}

/// A packed pair to another, element by element.
struct ConvertPacked<const FROM_BITS: u32, const TO_BITS: u32>;
impl<const FROM_BITS: u32, const TO_BITS: u32> Unary for ConvertPacked<FROM_BITS, TO_BITS> {
    type A = u32;
    type D = u32;
    fn eval(imm: u64, a: u32) -> u32 {
        let low = convert(imm, u64::from(a) & low_bits(FROM_BITS));
        (low | convert(imm, u64::from(a) >> FROM_BITS) << TO_BITS) as u32
    }
}

// ------------------------------------------------------------------------------------------------ powers of two

/// The power of two (ue8m0) that an f32's magnitude is rounded to: its exponent. Only NaN and, without `.satfinite`, what is
/// beyond the greatest give NaN; what is below the smallest gives that. (What a negative number gives, and these limits, the
/// headers of CUDA say by the code that they have for the host.)
fn power(imm: u64, a: u32) -> u32 {
    let (a, infinity, smallest) = (a & 0x7fff_ffff, 0x7f80_0000, 0x0040_0000);
    let up = Mode::from_bits(imm) == Mode::Up && a & 0x007f_ffff != 0 && a > smallest && a < infinity;
    let exponent = (a >> 23) + u32::from(up);
    if imm & flag::SATFINITE != 0 && a <= infinity { exponent.min(0xfe) } else { exponent }
}

/// Two f32 to ue8m0x2; the first source is the upper one.
struct PowerPair;
lane_op!(PowerPair, |imm, a: u32, b: u32| -> u32 { power(imm, b) | power(imm, a) << 8 });

/// bf16x2 to ue8m0x2.
struct PowerPacked;
lane_op!(PowerPacked, |imm, a: u32| -> u32 { power(imm, a << 16) | power(imm, a & 0xffff_0000) << 8 });

/// ue8m0x2 to bf16x2, exact.
struct FromPowers;
lane_op!(FromPowers, |_, a: u32| -> u32 {
    let one = |power: u32| match power {
        0 => 0x0040,
        0xff => rounding::BF16.nan as u32,
        _ => power << 7,
    };
    one(a & 0xff) | one(a >> 8 & 0xff) << 16
});

/// Decodes the conversions to and from ue8m0x2.
fn decode_powers(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
    (to, from): (Type, Type),
) -> Result<(), Refusal> {
    let written = mods.written();
    let modes: &[(&str, Mode)] = match to {
        Type::UE8M0X2 => &[("rz", Mode::Zero), ("rp", Mode::Up)],
        _ => &[("rn", Mode::Even)],
    };
    let mode = mods.one_of(modes).ok_or_else(|| invalid(format!("`{written}` needs a rounding mode")))?;
    let saturates = to == Type::UE8M0X2 && mods.take("satfinite");
    mods.finish()?;
    let imm = mode as u64 | if saturates { flag::SATFINITE } else { 0 };
    let isa = d.isa;
    if from == Type::F32 && to == Type::UE8M0X2 {
        let [dst, a, b] = operands::<3>(inst)?;
        let (dst, a, b) = (d.dst(dst, to)?, d.src(a, from)?, d.src(b, from)?);
        d.lane(lane::binary::<PowerPair>(isa), Class::Convert, &[dst], &[a, b], imm);
        return Ok(());
    }
    let f = match (to, from) {
        (Type::UE8M0X2, Type::BF16X2) => lane::unary::<PowerPacked>(isa),
        (Type::BF16X2, Type::UE8M0X2) => lane::unary::<FromPowers>(isa),
        _ => return Err(invalid(format!("cvt from {from} to {to}"))),
    };
    let [dst, a] = operands::<2>(inst)?;
    let (dst, a) = (d.dst(dst, to)?, d.src(a, from)?);
    d.lane(f, Class::Convert, &[dst], &[a], imm);
    Ok(())
}

// ------------------------------------------------------------------------------------------------ integers

/// Integer to integer without saturation. Constants: bits of the source type, of the destination type, of the
/// destination register, a byte each; then whether source and destination are signed.
struct Resize<A, D>(PhantomData<(A, D)>);
lane_op!([A: Raw, D: Raw] Resize<A, D>, |imm, a: A| -> D {
    // Xor and subtraction of the sign bit extend a sign; of 0, nothing.
    let extend = |x: u64, bits: u32, signed: u64| {
        let sign = signed << (bits - 1);
        ((x & low_bits(bits)) ^ sign).wrapping_sub(sign)
    };
    let (from, to, register) = (imm as u8, (imm >> 8) as u8, (imm >> 16) as u8);
    let x = extend(a.widened(), from.into(), imm >> 24 & 1);
    D::narrowed(extend(x, to.into(), imm >> 25 & 1) & low_bits(register.into()))
});

/// Integer to f32 or f64, to nearest even.
struct FromInteger<I, T>(PhantomData<(I, T)>);
/// f32 or f64 to integer, rounded as `MODE` says.
struct ToInteger<T, I, const MODE: u8>(PhantomData<(T, I)>);
/// f32 or f64 to an integral value, rounded as `MODE` says.
struct Integral<T, const MODE: u8>(PhantomData<T>);

macro_rules! from_integer {
    ($($i:ty => $($t:ty),*;)*) => {$($(
        impl Unary for FromInteger<$i, $t> {
            type A = $i;
            type D = $t;
            #[inline(always)]
            fn eval(_: u64, a: $i) -> $t { a as $t }
        }
    )*)*};
}
from_integer! {
    u8 => f32; i8 => f32; u16 => f32; i16 => f32;
    u32 => f32, f64; i32 => f32, f64; u64 => f32, f64; i64 => f32, f64;
}

/// f32 and f64, whose operations have the same names.
trait Rounded: Real {
    fn rounded<const MODE: u8>(self) -> Self;
}
macro_rules! rounded {
    ($($t:ty)*) => {$(
        impl Rounded for $t {
            #[inline(always)]
            fn rounded<const MODE: u8>(self) -> Self {
                match MODE {
                    0 => self.round_ties_even(),
                    1 => self.trunc(),
                    2 => self.floor(),
                    _ => self.ceil(),
                }
            }
        }
    )*};
}
rounded! { f32 f64 }

macro_rules! to_integer {
    ($($t:ty => $($i:ty: $nan:expr),*;)*) => {$($(
        impl<const MODE: u8> Unary for ToInteger<$t, $i, MODE> {
            type A = $t;
            type D = $i;
            #[inline(always)]
            fn eval(imm: u64, a: $t) -> $i {
                let a = if imm & flag::FTZ != 0 { a.flushed() } else { a };
                // `as` holds the value in the range.
                if a.is_nan() { $nan } else { a.rounded::<MODE>() as $i }
            }
        }
    )*)*};
}
to_integer! {
    f32 => u32: 0, i32: 0, u64: 1 << 63, i64: i64::MIN;
    f64 => u32: 1 << 31, i32: i32::MIN, u64: 1 << 63, i64: i64::MIN;
}

lane_op!([T: Rounded, const MODE: u8] Integral<T, MODE>, |imm, a: T| -> T {
    let a = float::flush_if(imm, a);
    float::finish(imm, a.rounded::<MODE>().or_nan([a]))
});

// ------------------------------------------------------------------------------------------------ floats

/// f32 to f16 or bf16, to nearest even.
struct Narrow<F>(PhantomData<F>);
lane_op!([F: Format16] Narrow<F>, |imm, a: f32| -> u32 {
    // `.ftz` is about f32 alone.
    half::finish::<F>(imm & !flag::FTZ, F::narrow(float::flush_if(imm, a)))
});

/// Two f32 to f16x2 or bf16x2; the first source is the upper one.
struct NarrowPair<F>(PhantomData<F>);
lane_op!([F: Format16] NarrowPair<F>, |imm, a: f32, b: f32| -> u32 {
    Narrow::<F>::eval(imm, b) | Narrow::<F>::eval(imm, a) << 16
});

/// f16 or bf16 to f32.
struct Widen<F>(PhantomData<F>);
lane_op!([F: Format16] Widen<F>, |imm, a: u16| -> f32 {
    float::finish(imm, F::wide(a.into()).or_nan([]))
});

struct Single;
lane_op!(Single, |imm, a: f64| -> f32 { float::finish(imm, (a as f32).or_nan([])) });

struct Double;
lane_op!(Double, |imm, a: f32| -> f64 {
    let wide = f64::from(float::flush_if(imm, a));
    let d = if a.is_nan() { f64::from_bits(wide_nan(a.to_bits())) } else { wide };
    float::finish(imm & flag::SAT, d)
});

/// The same type: only `.ftz` and `.sat` change anything.
struct Same<T>(PhantomData<T>);
lane_op!([T: Real] Same<T>, |imm, a: T| -> T {
    float::finish(imm, a.or_nan([a]))
});

/// `cvt.rna.tf32.f32`
struct Tf32;
lane_op!(Tf32, |_, a: u32| -> u32 {
    let nan = a & 0x7fff_ffff > 0x7f80_0000;
    // Half a step more; a carry may reach infinity, and infinity stays.
    if nan { F32.nan as u32 } else { a.wrapping_add(0x1000) & !0x1fff }
});

// ------------------------------------------------------------------------------------------------ cvt.pack

/// `cvt.pack.sat`: two s32, held in the range of the narrow type, above them what remains of c. Constants: bits of the
/// narrow type, then whether it is signed.
struct Pack;
lane_op!(Pack, |imm, a: i32, b: i32, c: u32| -> u32 {
    let bits = imm as u8 as u32;
    let keep = low_bits(bits) as i32;
    let (least, most) = if imm >> 8 & 1 != 0 { (!(keep >> 1), keep >> 1) } else { (0, keep) };
    let hold = |x: i32| (x.max(least).min(most) & keep) as u32;
    let above = if bits == 16 { 0 } else { c << (2 * bits) };
    above | hold(a) << bits | hold(b)
});

/// The narrow types: bits and whether signed.
const NARROW: [(&str, u64); 8] = [
    ("u16", 16),
    ("s16", 16 | 1 << 8),
    ("u8", 8),
    ("s8", 8 | 1 << 8),
    ("u4", 4),
    ("s4", 4 | 1 << 8),
    ("u2", 2),
    ("s2", 2 | 1 << 8),
];

fn decode_pack(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    mut mods: Mods<'_, '_>,
) -> Result<(), Refusal> {
    let written = mods.written();
    let refused = || invalid(format!("`{written}`"));
    if !mods.take("sat") {
        return Err(refused());
    }
    let imm = mods.one_of(&NARROW).ok_or_else(refused)?;
    if mods.ty()? != Type::S32 {
        return Err(refused());
    }
    // Without a third source the pair must fill the register.
    let third = mods.take("b32");
    mods.finish()?;
    if third == (imm as u8 == 16) {
        return Err(refused());
    }
    let (dst, a, b, c) = if third {
        let [dst, a, b, c] = operands::<4>(inst)?;
        (dst, a, b, d.src(c, Type::B32)?)
    } else {
        let [dst, a, b] = operands::<3>(inst)?;
        (dst, a, b, d.constant(Width::B32, 0))
    };
    let (dst, a, b) = (d.dst(dst, Type::B32)?, d.src(a, Type::S32)?, d.src(b, Type::S32)?);
    d.lane(lane::ternary::<Pack>(d.isa), Class::Convert, &[dst], &[a, b, c], imm);
    Ok(())
}

// ------------------------------------------------------------------------------------------------ decoding

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    if mods.take("pack") {
        return decode_pack(d, inst, mods);
    }
    let written = mods.written();
    let (to, from) = (mods.ty()?, mods.ty()?);
    if to == Type::UE8M0X2 || from == Type::UE8M0X2 {
        return decode_powers(d, inst, mods, (to, from));
    }
    let (Some(to_index), Some(from_index)) = (index(to), index(from)) else {
        return Err(unsupported(format!("`{written}`")));
    };
    let imm = from_index << FROM | to_index << TO | modifiers(&mut mods, to, from, &written)?;
    mods.finish()?;
    if packed(to) || packed(from) {
        return decode_packed(d, inst, to, from, imm);
    }
    let [dst, src] = operands::<2>(inst)?;
    let float = |ty: Type| ty.kind() == TypeKind::Float;
    // A wider register gives its low bits, and gets the value extended by its sign or with zeros. bf16 allows neither,
    // nor integers of 8 bits.
    let exact = to == Type::BF16 || from == Type::BF16;
    if exact && (to.bits() == 8 || from.bits() == 8) {
        return Err(invalid(format!("`{written}`: no conversion between {from} and {to}")));
    }
    let dst = if exact { d.dst(dst, to)? } else { d.dst_wide(dst, to)? };
    let src = if exact { d.src(src, from)? } else { d.src_wide(src, from)? };
    let (isa, wide) = (d.isa, |width| width == Width::B64);
    let register = match dst.width {
        Width::B64 => 64,
        Width::B32 | Width::None => 32,
        Width::B16 => 16,
        Width::B128 | Width::Pred => return Err(unsupported(format!("`{written}` to such a register"))),
    };
    if src.width == Width::B128 {
        return Err(unsupported(format!("`{written}` from a register of 128 bits")));
    }
    let plain = dst.width == width_of(to) && src.width == width_of(from) && to.bits() > 8;
    let fast = if plain { fast(isa, to, from, imm) } else { None };
    let (f, imm) = if let Some(f) = fast {
        (f, imm)
    } else if !float(to) && !float(from) && imm & flag::SAT == 0 {
        let signs = u64::from(from.is_signed()) << 24 | u64::from(to.is_signed()) << 25;
        let imm = u64::from(from.bits()) | u64::from(to.bits()) << 8 | register << 16 | signs;
        let f = match (wide(src.width), wide(dst.width)) {
            (false, false) => lane::unary::<Resize<u32, u32>>(isa),
            (false, true) => lane::unary::<Resize<u32, u64>>(isa),
            (true, false) => lane::unary::<Resize<u64, u32>>(isa),
            (true, true) => lane::unary::<Resize<u64, u64>>(isa),
        };
        (f, imm)
    } else {
        let f = match (wide(src.width), wide(dst.width)) {
            (false, false) => lane::unary::<Convert<u32, u32>>(isa),
            (false, true) => lane::unary::<Convert<u32, u64>>(isa),
            (true, false) => lane::unary::<Convert<u64, u32>>(isa),
            (true, true) => lane::unary::<Convert<u64, u64>>(isa),
        };
        (f, imm | register << REGISTER)
    };
    d.lane(f, Class::Convert, &[dst], &[src], imm);
    Ok(())
}

/// Whether it is a pair of formats with 8 bits or fewer.
const fn narrow(ty: Type) -> bool {
    matches!(ty, Type::E4M3X2 | Type::E5M2X2 | Type::E2M3X2 | Type::E3M2X2 | Type::E2M1X2)
}

const fn packed(ty: Type) -> bool {
    matches!(ty, Type::F16X2 | Type::BF16X2) || narrow(ty)
}

/// Rounding mode and flags, as the pair of types asks for them.
fn modifiers(mods: &mut Mods<'_, '_>, to: Type, from: Type, written: &str) -> Result<u64, Refusal> {
    let float = |ty: Type| ty.kind() == TypeKind::Float;
    let missing = |what: &str| invalid(format!("`{written}` needs {what}"));
    if mods.take("rs") {
        return Err(unsupported(format!("`{written}`, which rounds by random bits")));
    }
    let mut imm = match (float(to), float(from)) {
        (false, false) => 0,
        (false, true) => mods.one_of(&Mode::INTEGRAL).ok_or_else(|| missing("a rounding to integer"))? as u64,
        (true, true) if to == from => mods.one_of(&Mode::INTEGRAL).map_or(0, |mode| mode as u64 | INTEGRAL),
        (true, true) if matches!((to, from), (Type::F32, Type::F16 | Type::BF16)) || to == Type::F64 => 0,
        (true, true) if to == Type::TF32 && mods.take("rna") => Mode::Away as u64,
        // Of all narrowing conversions these alone have a default, which the ISA does not tell; ptxas makes the instruction that it
        // makes of `.rn`.
        (true, true) if matches!((to, from), (Type::F16, Type::BF16) | (Type::BF16, Type::F16)) => {
            mods.one_of(&Mode::ARITHMETIC).map_or(Mode::Even as u64, |mode| mode as u64)
        }
        _ => mods.one_of(&Mode::ARITHMETIC).ok_or_else(|| missing("a rounding mode"))? as u64,
    };
    let to_nearest_or_zero = matches!(Mode::from_bits(imm), Mode::Even | Mode::Zero);
    let mut take = |allowed: bool, name: &str, flag: u64| {
        if allowed && mods.take(name) {
            imm |= flag;
        }
    };
    let plain = !packed(to) && !packed(from) && to != Type::TF32;
    take(plain && (to == Type::F32 || from == Type::F32), "ftz", flag::FTZ);
    take(plain && to != Type::BF16 && from != Type::BF16, "sat", flag::SAT);
    let narrowing = from == Type::F32
        && matches!(to, Type::F16 | Type::BF16 | Type::F16X2 | Type::BF16X2 | Type::TF32)
        || narrow(to);
    take((narrowing || narrow(from)) && to_nearest_or_zero, "relu", flag::RELU);
    take(narrowing || to == Type::BF16X2 && narrow(from), "satfinite", flag::SATFINITE);
    if narrow(to) && imm & flag::SATFINITE == 0 {
        return Err(missing("`.satfinite`"));
    }
    if (narrow(to) || narrow(from)) && Mode::from_bits(imm) != Mode::Even {
        return Err(missing("`.rn`"));
    }
    // The conversions for tensor-core data know neither directed rounding nor the older modifiers.
    let special = !plain || imm & (flag::RELU | flag::SATFINITE) != 0;
    let directed = matches!(Mode::from_bits(imm), Mode::Down | Mode::Up);
    if special && (directed || imm & (flag::FTZ | flag::SAT) != 0) {
        return Err(invalid(format!("`{written}` combines modifiers that exclude each other")));
    }
    Ok(imm)
}

/// Conversions of pairs.
fn decode_packed(
    d: &mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    to: Type,
    from: Type,
    imm: u64,
) -> Result<(), Refusal> {
    let isa = d.isa;
    if from == Type::F32 {
        let near = imm & (7 | flag::SATFINITE) == 0;
        let f = match to {
            Type::F16X2 if near => lane::binary::<NarrowPair<Half>>(isa),
            Type::BF16X2 if near => lane::binary::<NarrowPair<Bf16>>(isa),
            Type::F16X2 | Type::BF16X2 => lane::binary::<ConvertPair<16>>(isa),
            Type::E2M1X2 => lane::binary::<ConvertPair<4>>(isa),
            _ => lane::binary::<ConvertPair<8>>(isa),
        };
        let [dst, a, b] = operands::<3>(inst)?;
        let (dst, a, b) = (d.dst(dst, to)?, d.src(a, from)?, d.src(b, from)?);
        d.lane(f, Class::Convert, &[dst], &[a, b], imm);
        return Ok(());
    }
    let f = match (to, from) {
        (Type::E2M1X2, Type::F16X2 | Type::BF16X2) => lane::unary::<ConvertPacked<16, 4>>(isa),
        (Type::F16X2 | Type::BF16X2, Type::E2M1X2) => lane::unary::<ConvertPacked<4, 16>>(isa),
        (to, Type::F16X2 | Type::BF16X2) if narrow(to) => lane::unary::<ConvertPacked<16, 8>>(isa),
        (Type::F16X2 | Type::BF16X2, from) if narrow(from) => lane::unary::<ConvertPacked<8, 16>>(isa),
        _ => return Err(unsupported(format!("cvt from {from} to {to}"))),
    };
    let [dst, a] = operands::<2>(inst)?;
    let (dst, a) = (d.dst(dst, to)?, d.src(a, from)?);
    d.lane(f, Class::Convert, &[dst], &[a], imm);
    Ok(())
}

/// The handler for a rounding mode known when it is chosen.
macro_rules! by_mode {
    ($isa:ident, $mode:ident, $op:ident, $($t:ty),*) => {
        match $mode {
            0 => lane::unary::<$op<$($t,)* 0>>($isa),
            1 => lane::unary::<$op<$($t,)* 1>>($isa),
            2 => lane::unary::<$op<$($t,)* 2>>($isa),
            _ => lane::unary::<$op<$($t,)* 3>>($isa),
        }
    };
}

/// The operation of its own that a conversion has, if it has one. Registers have the types' widths.
fn fast(isa: Isa, to: Type, from: Type, imm: u64) -> Option<LaneFn> {
    use Type::{BF16, F16, F32, F64, S8, S16, S32, S64, TF32, U8, U16, U32, U64};
    let mode = imm & 7;
    let flags = imm & 0xfff8 & !INTEGRAL;
    let integral = imm & INTEGRAL != 0;
    Some(match (to, from) {
        (F32, U8) if imm & 0xffff == 0 => lane::unary::<FromInteger<u8, f32>>(isa),
        (F32, S8) if imm & 0xffff == 0 => lane::unary::<FromInteger<i8, f32>>(isa),
        (F32, U16) if imm & 0xffff == 0 => lane::unary::<FromInteger<u16, f32>>(isa),
        (F32, S16) if imm & 0xffff == 0 => lane::unary::<FromInteger<i16, f32>>(isa),
        (F32, U32) if imm & 0xffff == 0 => lane::unary::<FromInteger<u32, f32>>(isa),
        (F32, S32) if imm & 0xffff == 0 => lane::unary::<FromInteger<i32, f32>>(isa),
        (F32, U64) if imm & 0xffff == 0 => lane::unary::<FromInteger<u64, f32>>(isa),
        (F32, S64) if imm & 0xffff == 0 => lane::unary::<FromInteger<i64, f32>>(isa),
        (F64, U32) if imm & 0xffff == 0 => lane::unary::<FromInteger<u32, f64>>(isa),
        (F64, S32) if imm & 0xffff == 0 => lane::unary::<FromInteger<i32, f64>>(isa),
        (F64, U64) if imm & 0xffff == 0 => lane::unary::<FromInteger<u64, f64>>(isa),
        (F64, S64) if imm & 0xffff == 0 => lane::unary::<FromInteger<i64, f64>>(isa),
        (U32, F32) => by_mode!(isa, mode, ToInteger, f32, u32),
        (S32, F32) => by_mode!(isa, mode, ToInteger, f32, i32),
        (U64, F32) => by_mode!(isa, mode, ToInteger, f32, u64),
        (S64, F32) => by_mode!(isa, mode, ToInteger, f32, i64),
        (U32, F64) => by_mode!(isa, mode, ToInteger, f64, u32),
        (S32, F64) => by_mode!(isa, mode, ToInteger, f64, i32),
        (U64, F64) => by_mode!(isa, mode, ToInteger, f64, u64),
        (S64, F64) => by_mode!(isa, mode, ToInteger, f64, i64),
        (F32, F32) if integral => by_mode!(isa, mode, Integral, f32),
        (F64, F64) if integral => by_mode!(isa, mode, Integral, f64),
        (F32, F32) => lane::unary::<Same<f32>>(isa),
        (F64, F64) => lane::unary::<Same<f64>>(isa),
        (F16, F32) if mode == 0 && flags & flag::SATFINITE == 0 => lane::unary::<Narrow<Half>>(isa),
        (BF16, F32) if mode == 0 && flags & flag::SATFINITE == 0 => lane::unary::<Narrow<Bf16>>(isa),
        (F32, F16) => lane::unary::<Widen<Half>>(isa),
        (F32, BF16) => lane::unary::<Widen<Bf16>>(isa),
        (F32, F64) if mode == 0 => lane::unary::<Single>(isa),
        (F64, F32) => lane::unary::<Double>(isa),
        (TF32, F32) if mode == Mode::Away as u64 && flags == 0 => lane::unary::<Tf32>(isa),
        _ => return None,
    })
}
