//! Arithmetic of f32 and f64.
//!
//! Results that are no number: f32 gives the canonical NaN 0x7fffffff; f64 gives the first source that is NaN, made
//! quiet, else 0xfff8000000000000. Both are stated here and not left to the host, whose rule depends on the order in
//! which a compiler puts the operands.

use std::marker::PhantomData;

use super::lane::{self, Binary, Ternary, lane_op};
use super::rounding::{F32, F64, Format, Mode, Number, flag};
use crate::decode::decoder::Decoder;
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, LaneFn};
use crate::machine::isa::Isa;
use crate::machine::registers::Value;
use crate::ptx::ast::Instruction;
use crate::types::Type;

/// f32 and f64.
pub trait Real:
    Value
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
{
    /// The binary format.
    const FORMAT: Format;
    /// 1
    const ONE: Self;
    /// +0
    const ZERO: Self;
    /// The value of a pattern.
    fn from_pattern(bits: u64) -> Self;
    /// The pattern of a value.
    fn pattern(self) -> u64;
    /// a * b + c, rounded once.
    fn fma(self, b: Self, c: Self) -> Self;
    /// The square root.
    fn root(self) -> Self;
    /// Zero of the same sign instead of a subnormal number.
    fn flushed(self) -> Self;
    /// Replaces a NaN by the one that the instruction gives for these sources.
    fn or_nan<const N: usize>(self, sources: [Self; N]) -> Self;
}

impl Real for f32 {
    const FORMAT: Format = F32;
    const ONE: Self = 1.0;
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn from_pattern(bits: u64) -> Self {
        Self::from_bits(bits as u32)
    }
    #[inline(always)]
    fn pattern(self) -> u64 {
        u64::from(self.to_bits())
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn flushed(self) -> Self {
        let bits = self.to_bits();
        Self::from_bits(if bits & 0x7f80_0000 == 0 { bits & 0x8000_0000 } else { bits })
    }
    #[inline(always)]
    fn or_nan<const N: usize>(self, _: [Self; N]) -> Self {
        Self::from_bits(if self.is_nan() { F32.nan as u32 } else { self.to_bits() })
    }
}

impl Real for f64 {
    const FORMAT: Format = F64;
    const ONE: Self = 1.0;
    const ZERO: Self = 0.0;
    #[inline(always)]
    fn from_pattern(bits: u64) -> Self {
        Self::from_bits(bits)
    }
    #[inline(always)]
    fn pattern(self) -> u64 {
        self.to_bits()
    }
    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        self.mul_add(b, c)
    }
    #[inline(always)]
    fn root(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn flushed(self) -> Self {
        let bits = self.to_bits();
        Self::from_bits(if bits & F64.limit == 0 { bits & (1 << 63) } else { bits })
    }
    #[inline(always)]
    fn or_nan<const N: usize>(self, sources: [Self; N]) -> Self {
        let mut nan = F64.nan;
        for i in (0..N).rev() {
            nan = if sources[i].is_nan() { sources[i].to_bits() | 1 << 51 } else { nan };
        }
        Self::from_bits(if self.is_nan() { nan } else { self.to_bits() })
    }
}

/// `.ftz` of a source.
#[inline(always)]
pub(crate) fn flush_if<T: Real>(imm: u64, x: T) -> T {
    if imm & flag::FTZ != 0 { x.flushed() } else { x }
}

/// Applies `.ftz` and `.sat` to a result.
#[inline(always)]
pub(crate) fn finish<T: Real>(imm: u64, x: T) -> T {
    let x = flush_if(imm, x);
    // A comparison that is false for NaN and for -0, which both become +0.
    let held = if x > T::ZERO { x } else { T::ZERO };
    let held = if held > T::ONE { T::ONE } else { held };
    if imm & flag::SAT != 0 { held } else { x }
}

/// An operation on numbers, in the host's arithmetic and exactly.
pub trait Operation<const N: usize> {
    /// Rounded to nearest even.
    fn near<T: Real>(sources: [T; N]) -> T;
    /// Exactly, but for sticky bits; `mode` is for the sign of zero.
    fn exact(sources: [Number; N], mode: Mode) -> Number;
}

macro_rules! operations {
    ($($(#[$doc:meta])* $name:ident($($x:ident),*) $near:expr, |$mode:ident| $exact:expr;)*) => {$(
        $(#[$doc])*
        pub struct $name;
        impl Operation<{ [$(stringify!($x)),*].len() }> for $name {
            #[inline(always)]
            fn near<T: Real>([$($x),*]: [T; [$(stringify!($x)),*].len()]) -> T { $near }
            fn exact([$($x),*]: [Number; [$(stringify!($x)),*].len()], $mode: Mode) -> Number { $exact }
        }
    )*};
}
operations! {
    /// a + b
    Add(a, b) a + b, |mode| a.plus(b, mode);
    /// a - b
    Sub(a, b) a - b, |mode| a.plus(b.negated(), mode);
    /// a * b
    Mul(a, b) a * b, |_mode| a.times(b);
    /// a / b
    Div(a, b) a / b, |_mode| a.over(b);
    /// a * b + c
    Fma(a, b, c) a.fma(b, c), |mode| a.times(b).plus(c, mode);
    /// 1 / a
    Rcp(a) T::ONE / a, |_mode| Number::unpack(0x3f80_0000, F32).over(a);
    /// The square root of a
    Sqrt(a) a.root(), |_mode| a.root();
}

/// `.rn` without further modifiers.
pub struct Near<O, T>(PhantomData<(O, T)>);
/// `.rn` with `.ftz`, `.sat`.
pub struct NearFlags<O, T>(PhantomData<(O, T)>);
/// Any rounding mode, with `.ftz`, `.sat`: slow.
pub struct Directed<O, T>(PhantomData<(O, T)>);

impl<O, T: Real> Near<O, T> {
    #[inline(always)]
    fn run<const N: usize>(sources: [T; N]) -> T
    where
        O: Operation<N>,
    {
        O::near(sources).or_nan(sources)
    }
}

impl<O, T: Real> NearFlags<O, T> {
    #[inline(always)]
    fn run<const N: usize>(imm: u64, sources: [T; N]) -> T
    where
        O: Operation<N>,
    {
        let sources = sources.map(|x| flush_if(imm, x));
        finish(imm, O::near(sources).or_nan(sources))
    }
}

impl<O, T: Real> Directed<O, T> {
    fn run<const N: usize>(imm: u64, sources: [T; N]) -> T
    where
        O: Operation<N>,
    {
        let sources = sources.map(|x| flush_if(imm, x));
        let mode = Mode::from_bits(imm);
        let exact = O::exact(sources.map(|x| Number::unpack(x.pattern(), T::FORMAT)), mode);
        finish(imm, T::from_pattern(exact.pack(T::FORMAT, mode, false)).or_nan(sources))
    }
}

macro_rules! lifts {
    ($($name:ident: $($imm:ident)?;)*) => {$(
        lane_op!([O: Operation<1>, T: Real] $name<O, T>, |_imm, a: T| -> T {
            $(let $imm = _imm;)?
            Self::run($($imm,)? [a])
        });
        lane_op!([O: Operation<2>, T: Real] $name<O, T>, |_imm, a: T, b: T| -> T {
            $(let $imm = _imm;)?
            Self::run($($imm,)? [a, b])
        });
        lane_op!([O: Operation<3>, T: Real] $name<O, T>, |_imm, a: T, b: T, c: T| -> T {
            $(let $imm = _imm;)?
            Self::run($($imm,)? [a, b, c])
        });
    )*};
}
lifts! { Near: ; NearFlags: imm; Directed: imm; }

/// The handler of a unary operation for the modifiers in `imm`.
pub fn unary<O: Operation<1>, T: Real>(isa: Isa, imm: u64) -> LaneFn {
    match (imm & 7, imm) {
        (0, 0) => lane::unary::<Near<O, T>>(isa),
        (0, _) => lane::unary::<NearFlags<O, T>>(isa),
        _ => lane::unary::<Directed<O, T>>(isa),
    }
}

fn binary<O: Operation<2>, T: Real>(isa: Isa, imm: u64) -> LaneFn {
    match (imm & 7, imm) {
        (0, 0) => lane::binary::<Near<O, T>>(isa),
        (0, _) => lane::binary::<NearFlags<O, T>>(isa),
        _ => lane::binary::<Directed<O, T>>(isa),
    }
}

fn ternary<O: Operation<3>, T: Real>(isa: Isa, imm: u64) -> LaneFn {
    match (imm & 7, imm) {
        (0, 0) => lane::ternary::<Near<O, T>>(isa),
        (0, _) => lane::ternary::<NearFlags<O, T>>(isa),
        _ => lane::ternary::<Directed<O, T>>(isa),
    }
}

/// Two f32 in a 64-bit register.
struct Pair<O>(PhantomData<O>);

#[inline(always)]
fn halves(x: u64) -> [f32; 2] {
    [f32::from_bits(x as u32), f32::from_bits((x >> 32) as u32)]
}

#[inline(always)]
fn join(low: f32, high: f32) -> u64 {
    low.pattern() | high.pattern() << 32
}

lane_op!([O: Binary<A = f32, B = f32, D = f32>] Pair<O>, |imm, a: u64, b: u64| -> u64 {
    let (a, b) = (halves(a), halves(b));
    join(O::eval(imm, a[0], b[0]), O::eval(imm, a[1], b[1]))
});

lane_op!([O: Ternary<A = f32, B = f32, C = f32, D = f32>] Pair<O>, |imm, a: u64, b: u64, c: u64| -> u64 {
    let (a, b, c) = (halves(a), halves(b), halves(c));
    join(O::eval(imm, a[0], b[0], c[0]), O::eval(imm, a[1], b[1], c[1]))
});

/// `div.approx.f32`: a * (1/b), at most 2 ulp for |b| up to 2^126; beyond that the reciprocal counts as 0.
struct DivApprox;
lane_op!(DivApprox, |imm, a: f32, b: f32| -> f32 {
    let (a, b) = (flush_if(imm, a), flush_if(imm, b));
    finish(imm, (a * (1.0 / b).flushed()).or_nan([a, b]))
});

/// min or max of a binary format of at most 32 bits, given by its sign bit and its infinity. `.ftz`, `.NaN` and
/// `.xorsign.abs` are flags of `imm`; -0 is less than +0.
#[inline(always)]
pub(crate) fn extremum<const MAX: bool>(imm: u64, a: u32, b: u32, sign: u32, infinity: u32) -> u32 {
    let flush = |v: u32| if imm & flag::FTZ != 0 && v & infinity == 0 { v & sign } else { v };
    let xorsign = imm & flag::XORSIGN_ABS != 0;
    let strip = |v: u32| if xorsign { v & (sign - 1) } else { v };
    let (a, b) = (flush(a), flush(b));
    let (x, y) = (strip(a), strip(b));
    // Signed integers in the order of the numbers.
    let key = |v: u32| {
        let magnitude = (v & (sign - 1)) as i32;
        if v & sign != 0 { !magnitude } else { magnitude }
    };
    let nan = |v: u32| v & (sign - 1) > infinity;
    let chosen = if (key(x) > key(y)) == MAX { x } else { y };
    let chosen = if nan(x) {
        y
    } else if nan(y) {
        x
    } else {
        chosen
    };
    let signed = if xorsign { chosen | ((a ^ b) & sign) } else { chosen };
    let invalid = (nan(x) & nan(y)) | ((imm & flag::NAN != 0) & (nan(x) | nan(y)));
    // The canonical NaN of f16, bf16 and f32: all bits but the sign.
    if invalid { sign - 1 } else { signed }
}

struct Extremum32<const MAX: bool>;
lane_op!([const MAX: bool] Extremum32<MAX>, |imm, a: u32, b: u32| -> u32 {
    extremum::<MAX>(imm, a, b, 0x8000_0000, 0x7f80_0000)
});

/// min or max of three f32 (sm_100): that of the first two with the third. `.abs` takes the sources without their signs.
struct Extremum3<const MAX: bool>;
lane_op!([const MAX: bool] Extremum3<MAX>, |imm, a: u32, b: u32, c: u32| -> u32 {
    let [a, b, c] = [a, b, c].map(|v| if imm & flag::XORSIGN_ABS != 0 { v & 0x7fff_ffff } else { v });
    let imm = imm & !flag::XORSIGN_ABS;
    let two = Extremum32::<MAX>::eval(imm, a, b);
    Extremum32::<MAX>::eval(imm, two, c)
});

struct Extremum64<const MAX: bool>;
lane_op!([const MAX: bool] Extremum64<MAX>, |_, a: f64, b: f64| -> f64 {
    let key = |v: f64| {
        let bits = v.to_bits() as i64;
        if bits < 0 { !(bits & i64::MAX) } else { bits }
    };
    let chosen = if (key(a) > key(b)) == MAX { a } else { b };
    let chosen = if b.is_nan() { a } else { chosen };
    let chosen = if a.is_nan() { b } else { chosen };
    chosen.or_nan([a, b])
});

/// abs, and with `NEG` neg: f64 NaNs keep their payload, their sign changes like a number's.
struct Sign<T, const NEG: bool>(PhantomData<T>);
lane_op!([T: Real, const NEG: bool] Sign<T, NEG>, |imm, a: T| -> T {
    let a = flush_if(imm, a);
    let sign = 1 << (T::FORMAT.bits - 1);
    let d = T::from_pattern(if NEG { a.pattern() ^ sign } else { a.pattern() & !sign });
    d.or_nan([d])
});

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let ty = mods.ty()?;
    if !matches!(ty, Type::F32 | Type::F64 | Type::F32X2) {
        return Err(unsupported(format!("`{}`: arithmetic of {ty}", mods.written())));
    }
    let isa = d.isa;
    let class = if ty == Type::F64 { Class::Float64 } else { Class::Float32 };
    let lanes = if ty == Type::F32X2 { 2 } else { 1 };
    match inst.opcode {
        "add" | "sub" | "mul" => {
            let mut imm = mods.one_of(&Mode::ARITHMETIC).map_or(0, |mode| mode as u64);
            imm |= flags(&mut mods, ty, ty == Type::F32);
            mods.finish()?;
            let f = match (inst.opcode, ty) {
                ("add", Type::F32) => binary::<Add, f32>(isa, imm),
                ("add", Type::F64) => binary::<Add, f64>(isa, imm),
                ("add", _) => pair_binary::<Add>(isa, imm),
                ("sub", Type::F32) => binary::<Sub, f32>(isa, imm),
                ("sub", Type::F64) => binary::<Sub, f64>(isa, imm),
                ("sub", _) => pair_binary::<Sub>(isa, imm),
                (_, Type::F32) => binary::<Mul, f32>(isa, imm),
                (_, Type::F64) => binary::<Mul, f64>(isa, imm),
                _ => pair_binary::<Mul>(isa, imm),
            };
            emit::<2>(d, inst, ty, f, class, imm)?.flops = lanes;
        }
        // Since sm_20 `mad` is another name of `fma`.
        "fma" | "mad" => {
            let mut imm = rounding(&mut mods)? as u64;
            imm |= flags(&mut mods, ty, ty == Type::F32);
            mods.finish()?;
            let f = match (ty, imm & 7) {
                (Type::F32, _) => ternary::<Fma, f32>(isa, imm),
                (Type::F64, _) => ternary::<Fma, f64>(isa, imm),
                (_, 0) => lane::ternary::<Pair<NearFlags<Fma, f32>>>(isa),
                _ => lane::ternary::<Pair<Directed<Fma, f32>>>(isa),
            };
            emit::<3>(d, inst, ty, f, class, imm)?.flops = 2 * lanes;
        }
        "div" if ty != Type::F32X2 => {
            let approx = ty == Type::F32 && mods.take("approx");
            // `.full` may be off by 2 ulp; rounding correctly satisfies that over the full range.
            let full = ty == Type::F32 && !approx && mods.take("full");
            let mode = if approx || full { Mode::Even } else { rounding(&mut mods)? };
            let imm = mode as u64 | flags(&mut mods, ty, false);
            mods.finish()?;
            let f = match ty {
                Type::F32 if approx => lane::binary::<DivApprox>(isa),
                Type::F32 => binary::<Div, f32>(isa, imm),
                _ => binary::<Div, f64>(isa, imm),
            };
            emit::<2>(d, inst, ty, f, Class::Special, imm)?.flops = 1;
        }
        "min" | "max" if ty != Type::F32X2 => {
            let max = inst.opcode == "max";
            if inst.operands.len() == 4 && ty == Type::F32 {
                let mut imm = 0;
                for (name, flag) in [("ftz", flag::FTZ), ("NaN", flag::NAN), ("abs", flag::XORSIGN_ABS)] {
                    imm |= if mods.take(name) { flag } else { 0 };
                }
                mods.finish()?;
                let f = match max {
                    true => lane::ternary::<Extremum3<true>>(isa),
                    false => lane::ternary::<Extremum3<false>>(isa),
                };
                emit::<3>(d, inst, ty, f, class, imm)?;
                return Ok(());
            }
            let imm = if ty == Type::F32 { extremum_flags(&mut mods, true)? } else { 0 };
            mods.finish()?;
            let f = match (ty, max) {
                (Type::F32, true) => lane::binary::<Extremum32<true>>(isa),
                (Type::F32, false) => lane::binary::<Extremum32<false>>(isa),
                (_, true) => lane::binary::<Extremum64<true>>(isa),
                (_, false) => lane::binary::<Extremum64<false>>(isa),
            };
            emit::<2>(d, inst, ty, f, class, imm)?;
        }
        "abs" | "neg" if ty != Type::F32X2 => {
            let imm = flags(&mut mods, ty, false);
            mods.finish()?;
            let f = match (ty, inst.opcode) {
                (Type::F32, "abs") => lane::unary::<Sign<f32, false>>(isa),
                (Type::F32, _) => lane::unary::<Sign<f32, true>>(isa),
                (_, "abs") => lane::unary::<Sign<f64, false>>(isa),
                _ => lane::unary::<Sign<f64, true>>(isa),
            };
            emit::<1>(d, inst, ty, f, class, imm)?;
        }
        _ => return Err(unsupported(format!("`{}`", mods.written()))),
    }
    Ok(())
}

fn pair_binary<O: Operation<2>>(isa: Isa, imm: u64) -> LaneFn {
    if imm & 7 == 0 {
        lane::binary::<Pair<NearFlags<O, f32>>>(isa)
    } else {
        lane::binary::<Pair<Directed<O, f32>>>(isa)
    }
}

/// The rounding mode, which must be written.
///
/// # Errors
/// It is missing.
pub(crate) fn rounding(mods: &mut Mods<'_, '_>) -> Result<Mode, Refusal> {
    let written = mods.written();
    mods.one_of(&Mode::ARITHMETIC).ok_or_else(|| invalid(format!("`{written}` needs a rounding mode")))
}

/// `.ftz`, which f64 does not have, and where `sat` says so `.sat`.
fn flags(mods: &mut Mods<'_, '_>, ty: Type, sat: bool) -> u64 {
    let mut imm = 0;
    if ty != Type::F64 && mods.take("ftz") {
        imm |= flag::FTZ;
    }
    if sat && mods.take("sat") {
        imm |= flag::SAT;
    }
    imm
}

/// The modifiers of min and max.
///
/// # Errors
/// `.xorsign` without `.abs`.
pub(crate) fn extremum_flags(mods: &mut Mods<'_, '_>, ftz: bool) -> Result<u64, Refusal> {
    let mut imm = 0;
    if ftz && mods.take("ftz") {
        imm |= flag::FTZ;
    }
    if mods.take("NaN") {
        imm |= flag::NAN;
    }
    if mods.take("xorsign") {
        if !mods.take("abs") {
            return Err(invalid(format!("`{}`: `.xorsign` goes with `.abs`", mods.written())));
        }
        imm |= flag::XORSIGN_ABS;
    }
    Ok(imm)
}

/// Appends an instruction whose destination and `N` sources have one type.
///
/// # Errors
/// Another number of operands, or operands that do not fit.
pub(crate) fn emit<'d, const N: usize>(
    d: &'d mut Decoder<'_, '_>,
    inst: &Instruction<'_>,
    ty: Type,
    f: LaneFn,
    class: Class,
    imm: u64,
) -> Result<&'d mut crate::machine::inst::Inst, Refusal> {
    let Some((dst, sources)) = inst.operands.split_first().filter(|(_, rest)| rest.len() == N) else {
        return Err(invalid(format!("`{}` takes {} operands", crate::decode::mods::written(inst), N + 1)));
    };
    let dst = d.dst(dst, ty)?;
    let mut srcs = Vec::with_capacity(N);
    for source in sources {
        srcs.push(d.src(source, ty)?);
    }
    Ok(d.lane(f, class, &[dst], &srcs, imm))
}
