//! copysign, testp, and the special functions: rcp, sqrt, rsqrt, sin, cos, lg2, ex2, tanh.
//!
//! The approximations are polynomials and quotients of correctly rounded operations: the same bits on every host. The
//! bounds are those of the PTX ISA; beside them stand the greatest errors over every 17th f32. The test below
//! asserts them, a little rounded up, for as many as `PTXVM_STEP` says.
//!
//! | f32 instruction | bound | here |
//! |---|---|---|
//! | rcp | relative 2^-23 (1 ulp) | 2^-24.00, rounded correctly |
//! | sqrt | relative 2^-23 | 2^-24.00, rounded correctly |
//! | rsqrt | relative 2^-22.9 | 2^-23.41 |
//! | ex2 | relative 2^-22.5 | 2^-23.70 |
//! | lg2 | absolute 2^-22 in (0.5, 2) | 2^-23.27 |
//! | lg2 | relative 2^-22 elsewhere | 2^-23.46 |
//! | sin, cos | absolute 2^-20.9 up to 2 pi | 2^-24.99 |
//! | sin, cos | absolute 2^-14.7 up to 100 pi | 2^-24.99 |
//! | tanh | relative 2^-11 | 2^-22.22 |
//!
//! Those of f16 and bf16 round these to nearest.

use std::f64::consts::{LN_2, LOG2_E};
use std::marker::PhantomData;

use super::float::{self, Rcp, Real, Sqrt};
use super::half::{self, Bf16, F16, Format16};
use super::lane::{self, Compare, lane_op};
use super::rounding::flag;
use crate::decode::decoder::{Decoder, operands};
use crate::decode::mods::Mods;
use crate::decode::{Refusal, invalid, unsupported};
use crate::machine::inst::{Class, LaneFn};
use crate::machine::isa::Isa;
use crate::machine::registers::Reg;
use crate::ptx::ast::Instruction;
use crate::types::Type;

/// A function of one f32.
trait Function {
    /// The value; sources are not flushed, NaN may come out with any payload.
    fn value(x: f32) -> f32;
}

/// An f32 function with `.ftz` where the flag says so.
struct Single<O>(PhantomData<O>);
lane_op!([O: Function] Single<O>, |imm, a: f32| -> f32 {
    let ftz = imm & flag::FTZ != 0;
    let a = if ftz { a.flushed() } else { a };
    let d = O::value(a).or_nan([a]);
    if ftz { d.flushed() } else { d }
});

/// An f32 function of f16 or bf16: its error is far below the step of the result.
struct Narrow<O, F>(PhantomData<(O, F)>);
lane_op!([O: Function, F: Format16] Narrow<O, F>, |imm, a: u32| -> u32 {
    half::finish::<F>(imm, F::narrow(O::value(F::wide(half::flush::<F>(imm, a)))))
});

/// 1 / sqrt(a): two roundings, each of at most 2^-24.
struct Rsqrt;
impl Function for Rsqrt {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        1.0 / x.sqrt()
    }
}

/// ln(2)^k / k!, the Taylor series of 2^x: the first term left out is below 2^-27 for |x| up to 1/2.
const EXP2: [f32; 8] = {
    let mut c = [1.0; 8];
    let mut term = 1.0;
    let mut k = 1;
    while k < 8 {
        term *= LN_2 / k as f64;
        c[k] = term as f32;
        k += 1;
    }
    c
};

struct Ex2;
impl Function for Ex2 {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        // Beyond these the result is 0 or infinity anyway. NaN passes, and every step below keeps it.
        let held = if x < -160.0 { -160.0 } else { x };
        let held = if held > 130.0 { 130.0 } else { held };
        // Added to 1.5 * 2^23 a number loses its fraction, and the integer stands in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        let shifted = held + MAGIC;
        let whole = shifted.to_bits().wrapping_sub(MAGIC.to_bits()) as i32;
        let rest = held - (shifted - MAGIC);
        // Written out: a loop here would keep the one over lanes from being vectorised.
        let p = EXP2[7].mul_add(rest, EXP2[6]).mul_add(rest, EXP2[5]).mul_add(rest, EXP2[4]);
        let p = p.mul_add(rest, EXP2[3]).mul_add(rest, EXP2[2]).mul_add(rest, EXP2[1]).mul_add(rest, EXP2[0]);
        // In two steps, of which only the second may round (subnormal results) or overflow.
        let half = whole >> 1;
        let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
        p * power(half) * power(whole.wrapping_sub(half))
    }
}

struct Lg2;
impl Function for Lg2 {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        let subnormal = x < f32::MIN_POSITIVE;
        let scaled = if subnormal { x * 16_777_216.0 } else { x };
        // x = 2^exponent * m, m from sqrt(1/2) to sqrt(2).
        const ROOT_HALF: u32 = 0x3f35_04f3;
        let bits = scaled.to_bits();
        let exponent = (bits.wrapping_sub(ROOT_HALF) as i32) >> 23;
        let m = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32));
        let exponent = exponent as f32 - if subnormal { 24.0 } else { 0.0 };
        // log2(m) = 2/ln(2) * artanh(s), s = (m - 1) / (m + 1), |s| < 0.172; the next term is below 2^-28 of it.
        const SCALE: f64 = 2.0 * LOG2_E;
        const C: [f32; 5] = [
            SCALE as f32,
            (SCALE / 3.0) as f32,
            (SCALE / 5.0) as f32,
            (SCALE / 7.0) as f32,
            (SCALE / 9.0) as f32,
        ];
        let s = (m - 1.0) / (m + 1.0);
        let z = s * s;
        let p = C[4].mul_add(z, C[3]).mul_add(z, C[2]).mul_add(z, C[1]).mul_add(z, C[0]);
        let d = s.mul_add(p, exponent);
        let d = if x == f32::INFINITY { x } else { d };
        let d = if x == 0.0 { f32::NEG_INFINITY } else { d };
        // Not `x < 0.0`: NaN, too.
        if x >= 0.0 { d } else { f32::NAN }
    }
}

/// Sine of `x + quarter * pi/2`, in f64.
#[inline(always)]
fn sine(x: f32, quarter: u64) -> f32 {
    // Where one step of f32 is many periods no bound is documented; hardware's reduced argument has no fraction left
    // there.
    let near = if x.abs() < 1_099_511_627_776.0 { x } else { 0.0 * x };
    const MAGIC: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52, see `Ex2`
    const PI_2_HIGH: f64 = std::f64::consts::FRAC_PI_2;
    const PI_2_LOW: f64 = 6.123_233_995_736_766e-17;
    let wide = f64::from(near);
    let shifted = wide.mul_add(std::f64::consts::FRAC_2_PI, MAGIC);
    let turns = shifted - MAGIC;
    let r = (-turns).mul_add(PI_2_LOW, (-turns).mul_add(PI_2_HIGH, wide));
    // The low bits of MAGIC are 0: they hold the quarter of the circle.
    let quarter = shifted.to_bits().wrapping_add(quarter);
    // Taylor series; |r| is at most pi/4, the next terms are below 2^-33.
    let z = r * r;
    let mut sin = -1.0 / 39_916_800.0;
    for c in [1.0 / 362_880.0, -1.0 / 5_040.0, 1.0 / 120.0, -1.0 / 6.0, 1.0] {
        sin = z.mul_add(sin, c);
    }
    let sin = r * sin;
    let mut cos = -1.0 / 3_628_800.0;
    for c in [1.0 / 40_320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0] {
        cos = z.mul_add(cos, c);
    }
    let d = if quarter & 1 != 0 { cos } else { sin };
    let d = f64::from_bits(d.to_bits() ^ (quarter & 2) << 62);
    if x.is_finite() { d as f32 } else { f32::NAN }
}

struct Sin;
impl Function for Sin {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        sine(x, 0)
    }
}

struct Cos;
impl Function for Cos {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        sine(x, 1)
    }
}

struct Tanh;
impl Function for Tanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        let a = x.abs();
        // Near 0 the quotient of Lambert's continued fraction, else 1 - 2 / (e^2a + 1).
        let z = a * a;
        let near = a * ((z + 105.0).mul_add(z, 945.0) / z.mul_add(15.0, 420.0).mul_add(z, 945.0));
        let far = 1.0 - 2.0 / (Ex2::value(a * (2.0 * LOG2_E) as f32) + 1.0);
        let d = if a < 0.5 { near } else { far };
        f32::from_bits(d.to_bits() | x.to_bits() & 0x8000_0000)
    }
}

/// `rcp.approx.ftz.f64` and `rsqrt.approx.ftz.f64`: only the upper 32 bits of source and result count.
struct Gross<const ROOT: bool>;
lane_op!([const ROOT: bool] Gross<ROOT>, |_, a: u64| -> u64 {
    let x = f64::from_bits(a & 0xffff_ffff_0000_0000).flushed();
    let exact = 1.0 / if ROOT { x.sqrt() } else { x };
    // To the nearest of what 20 bits of fraction can hold.
    let rounded = (exact.flushed().to_bits() + 0x8000_0000) & 0xffff_ffff_0000_0000;
    if exact.is_nan() { 0x7fff_ffff_0000_0000 } else { rounded }
});

/// `rsqrt.approx.f64`: two roundings.
struct Rsqrt64;
lane_op!(Rsqrt64, |_, a: f64| -> f64 { (1.0 / a.sqrt()).or_nan([a]) });

/// The magnitude of b with the sign of a.
struct Copysign<T>(PhantomData<T>);
lane_op!([T: Real] Copysign<T>, |_, a: T, b: T| -> T {
    let sign = 1 << (T::FORMAT.bits - 1);
    T::from_pattern(a.pattern() & sign | b.pattern() & !sign)
});

/// `testp`; `PROPERTY` is the index in [`PROPERTIES`]. The second source is not there.
struct Testp<T, const PROPERTY: usize>(PhantomData<T>);
impl<T: Real, const PROPERTY: usize> Compare for Testp<T, PROPERTY> {
    type A = T;
    #[inline(always)]
    fn eval(a: T, _: T) -> bool {
        let magnitude = a.pattern() & !(1 << (T::FORMAT.bits - 1));
        let infinity = T::FORMAT.limit;
        let least = 1 << T::FORMAT.fraction;
        match PROPERTY {
            0 => magnitude < infinity,
            1 => magnitude == infinity,
            2 => magnitude <= infinity,
            3 => magnitude > infinity,
            4 => (magnitude >= least || magnitude == 0) && magnitude < infinity,
            _ => magnitude < least && magnitude != 0,
        }
    }
}

/// `.number` includes infinity, and `.normal` zero.
const PROPERTIES: [(&str, usize); 6] =
    [("finite", 0), ("infinite", 1), ("number", 2), ("notanumber", 3), ("normal", 4), ("subnormal", 5)];

fn testp<T: Real>(isa: Isa, property: usize) -> LaneFn {
    match property {
        0 => lane::compare::<Testp<T, 0>>(isa),
        1 => lane::compare::<Testp<T, 1>>(isa),
        2 => lane::compare::<Testp<T, 2>>(isa),
        3 => lane::compare::<Testp<T, 3>>(isa),
        4 => lane::compare::<Testp<T, 4>>(isa),
        _ => lane::compare::<Testp<T, 5>>(isa),
    }
}

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    let mut mods = Mods::new(inst);
    let written = mods.written();
    let isa = d.isa;
    let ty = mods.ty()?;
    match (inst.opcode, ty) {
        ("copysign", Type::F32 | Type::F64) => {
            mods.finish()?;
            let (f, class) = match ty {
                Type::F32 => (lane::binary::<Copysign<f32>>(isa), Class::Float32),
                _ => (lane::binary::<Copysign<f64>>(isa), Class::Float64),
            };
            float::emit::<2>(d, inst, ty, f, class, 0)?;
            return Ok(());
        }
        ("testp", Type::F32 | Type::F64) => {
            let property =
                mods.one_of(&PROPERTIES).ok_or_else(|| invalid(format!("`{written}` tests nothing")))?;
            mods.finish()?;
            let [p, a] = operands::<2>(inst)?;
            let (p, a) = (d.dst(p, Type::Pred)?, d.src(a, ty)?);
            let (f, class) = match ty {
                Type::F32 => (testp::<f32>(isa, property), Class::Float32),
                _ => (testp::<f64>(isa, property), Class::Float64),
            };
            d.lane(f, class, &[p, Reg::NONE], &[a, Reg::NONE, Reg::NONE], lane::combine::NONE);
            return Ok(());
        }
        // Rounded correctly; `.approx.f32` too, whose bounds are wider (1 ulp for rcp, 2^-23 for sqrt).
        ("rcp" | "sqrt", Type::F32 | Type::F64) => {
            let approx = mods.take("approx");
            let mode = if approx { 0 } else { float::rounding(&mut mods)? as u64 };
            let ftz = (ty == Type::F32 || approx) && mods.take("ftz");
            let imm = mode | if ftz { flag::FTZ } else { 0 };
            mods.finish()?;
            let f = match (inst.opcode, ty) {
                ("rcp", Type::F32) => float::unary::<Rcp, f32>(isa, imm),
                ("sqrt", Type::F32) => float::unary::<Sqrt, f32>(isa, imm),
                ("rcp", _) if approx && ftz => lane::unary::<Gross<false>>(isa),
                _ if approx => return Err(unsupported(format!("`{written}`"))),
                ("rcp", _) => float::unary::<Rcp, f64>(isa, imm),
                _ => float::unary::<Sqrt, f64>(isa, imm),
            };
            float::emit::<1>(d, inst, ty, f, Class::Special, imm)?.flops = 1;
            return Ok(());
        }
        _ => {}
    }
    // The rest is approximate by nature, and must say so.
    if !mods.take("approx") {
        return Err(invalid(format!("`{written}` needs `.approx`")));
    }
    let ftz = mods.take("ftz");
    mods.finish()?;
    let packed = matches!(ty, Type::F16X2 | Type::BF16X2);
    let f = match (inst.opcode, ty, ftz) {
        ("rsqrt", Type::F32, _) => lane::unary::<Single<Rsqrt>>(isa),
        ("rsqrt", Type::F64, true) => lane::unary::<Gross<true>>(isa),
        ("rsqrt", Type::F64, false) => lane::unary::<Rsqrt64>(isa),
        ("sin", Type::F32, _) => lane::unary::<Single<Sin>>(isa),
        ("cos", Type::F32, _) => lane::unary::<Single<Cos>>(isa),
        ("lg2", Type::F32, _) => lane::unary::<Single<Lg2>>(isa),
        ("ex2", Type::F32, _) => lane::unary::<Single<Ex2>>(isa),
        ("ex2", Type::F16 | Type::F16X2, _) => half::unary::<Narrow<Ex2, F16>>(isa, packed),
        ("ex2", Type::BF16 | Type::BF16X2, true) => half::unary::<Narrow<Ex2, Bf16>>(isa, packed),
        ("tanh", Type::F32, false) => lane::unary::<Single<Tanh>>(isa),
        ("tanh", Type::F16 | Type::F16X2, false) => half::unary::<Narrow<Tanh, F16>>(isa, packed),
        ("tanh", Type::BF16 | Type::BF16X2, false) => half::unary::<Narrow<Tanh, Bf16>>(isa, packed),
        _ => return Err(unsupported(format!("`{written}`"))),
    };
    let imm = if ftz { flag::FTZ } else { 0 };
    float::emit::<1>(d, inst, ty, f, Class::Special, imm)?.flops = if packed { 2 } else { 1 };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The greatest errors of a function, in two ranges of its source, over all f32 patterns.
    fn worst(function: fn(f32) -> f32, error: fn(f64, f64) -> [f64; 2]) -> [f64; 2] {
        let step =
            std::env::var("PTXVM_STEP").map_or(1009, |step| step.parse().expect("PTXVM_STEP is a number"));
        let part = |patterns: std::ops::RangeInclusive<u32>| {
            patterns.step_by(step).map(f32::from_bits).filter(|x| !x.is_nan()).fold(
                [0.0f64; 2],
                |worst, x| {
                    let [a, b] = error(x.into(), function(x).into());
                    [worst[0].max(a), worst[1].max(b)]
                },
            )
        };
        std::thread::scope(|s| {
            let negative = s.spawn(|| part(0x8000_0000..=u32::MAX));
            let ([a, b], [c, d]) = (part(0..=0x7fff_ffff), negative.join().expect("no panic"));
            [a.max(c), b.max(d)]
        })
    }

    /// The error relative to the exact value; half a step of subnormal numbers is let pass.
    fn relative(exact: f64, got: f64) -> f64 {
        if exact == got || exact.abs() > f64::from(f32::MAX) && got.abs() == f64::INFINITY || exact.is_nan() {
            return 0.0;
        }
        let slack = if exact.abs() < f64::from(f32::MIN_POSITIVE) { 2f64.powi(-150) } else { 0.0 };
        ((exact - got).abs() - slack).max(0.0) / exact.abs()
    }

    /// Absolute errors up to 2 pi and from there to 100 pi.
    fn periodic(x: f64, exact: f64, got: f64) -> [f64; 2] {
        let error = (exact - got).abs();
        match x.abs() / std::f64::consts::PI {
            turns if turns <= 2.0 => [error, 0.0],
            turns if turns <= 100.0 => [0.0, error],
            _ => [0.0; 2],
        }
    }

    /// The table at the top of this file, measured.
    /// Every so-manieth f32, as the environment variable `PTXVM_STEP` says; 1 takes minutes, in release.
    #[test]
    fn bounds_over_f32() {
        let logarithm = |x: f64, got: f64| {
            let near = x > 0.5 && x < 2.0;
            let exact = x.log2();
            if near { [(exact - got).abs(), 0.0] } else { [0.0, relative(exact, got)] }
        };
        // Name, errors, and as powers of two the greatest that the table allows.
        let figures = [
            ("rcp", worst(|x| 1.0 / x, |x, got| [relative(1.0 / x, got), 0.0]), [-23.9, 0.0]),
            ("sqrt", worst(f32::sqrt, |x, got| [relative(x.sqrt(), got), 0.0]), [-23.9, 0.0]),
            ("rsqrt", worst(Rsqrt::value, |x, got| [relative(1.0 / x.sqrt(), got), 0.0]), [-23.3, 0.0]),
            ("ex2", worst(Ex2::value, |x, got| [relative(x.exp2(), got), 0.0]), [-23.6, 0.0]),
            ("lg2", worst(Lg2::value, logarithm), [-23.2, -23.4]),
            ("sin", worst(Sin::value, |x, got| periodic(x, x.sin(), got)), [-24.9, -24.9]),
            ("cos", worst(Cos::value, |x, got| periodic(x, x.cos(), got)), [-24.9, -24.9]),
            ("tanh", worst(Tanh::value, |x, got| [relative(x.tanh(), got), 0.0]), [-22.1, 0.0]),
        ];
        let measured: Vec<_> = figures.iter().map(|(name, e, _)| (name, e.map(f64::log2))).collect();
        for (_, errors, limits) in figures {
            let within = errors.iter().zip(limits).all(|(error, limit)| error.log2() <= limit);
            assert!(within, "{measured:?}");
        }
    }
}
