//! The approximate functions: special values exactly, all others within the bounds that the PTX ISA documents, over a
//! dense set of inputs. (All f32 inputs: the ignored test beside the functions.) Also testp and copysign.

use ptxvm::types::Type;

use crate::conformance_float::{check, expected};
use crate::support::exact::{self, BF16, Exact, F16, F32, F64, Format, Mode, Random, decode, flushed};
use crate::support::op::run;

/// The documented bound of an error.
#[derive(Clone, Copy)]
enum Bound {
    /// Relative to the exact value.
    Relative(f64),
    /// Absolute.
    Absolute(f64),
    /// None: the result must be a number from -1 to 1.
    Range,
}
use Bound::{Absolute, Range, Relative};

/// Every 9973th f32, edges, and random values of moderate size.
fn singles() -> Vec<u64> {
    let mut all: Vec<u64> = (0..=u64::from(u32::MAX)).step_by(9973 * 7).collect();
    all.extend(exact::edges(F32));
    let mut rng = Random(41);
    for _ in 0..20_000 {
        let exponent = 127 - 20 + rng.below(30);
        all.push((rng.bits() & 0x807f_ffff) | exponent << 23);
    }
    all
}

fn f64_of(format: Format, bits: u64) -> f64 {
    if format == F32 {
        return f32::from_bits(bits as u32).into();
    }
    match decode(format, bits) {
        Exact::Nan => f64::NAN,
        Exact::Infinite(negative) => {
            if negative {
                f64::NEG_INFINITY
            } else {
                f64::INFINITY
            }
        }
        Exact::Finite(true, value) if value.is_zero() => -0.0,
        Exact::Finite(_, value) => value.to_f64(),
    }
}

/// Compares a result with the function's value. Where that is a NaN, an infinity or a zero, or beyond the format, the
/// result is the same, signs included; below the normal numbers half a step is let pass, or with `.ftz` zero.
fn judge(format: Format, ftz: bool, exact: f64, got: u64, bound: Bound, context: &str) {
    let value = f64_of(format, got);
    let context = format!("{context}: {got:x} = {value:e}, exactly {exact:e}");
    if exact.is_nan() {
        assert_eq!(got, format.nan, "{context}");
        return;
    }
    let power = |n: i64| 2f64.powi(n as i32);
    let greatest = power(format.bias + 1) - power(format.bias - i64::from(format.fraction));
    if exact == 0.0 || exact.is_infinite() {
        assert_eq!(value.to_bits(), exact.to_bits(), "{context}");
        return;
    }
    let least = power(1 - format.bias);
    let step = power(1 - format.bias - i64::from(format.fraction));
    if ftz && exact.abs() < least && value == 0.0 && value.is_sign_negative() == exact.is_sign_negative() {
        return;
    }
    if value.is_infinite() {
        assert!(
            exact.abs() > greatest * (1.0 - 2f64.powi(-20)) && value.signum() == exact.signum(),
            "{context}"
        );
        return;
    }
    let slack = if exact.abs() < least { step / 2.0 } else { 0.0 };
    match bound {
        Relative(error) => assert!((value - exact).abs() <= error * exact.abs() + slack, "{context}"),
        Absolute(error) => assert!((value - exact).abs() <= error, "{context}"),
        Range => assert!(value.abs() <= 1.0, "{context}"),
    }
}

/// Checks an f32 function with and without `.ftz`.
fn check_single(name: &str, flags: &[&str], exact: fn(f64) -> f64, bound: impl Fn(f64) -> Bound) {
    let sources = singles();
    for flag in flags {
        let name = format!("{name}.approx{flag}.f32");
        let got = run(&format!("{name} %out0, %in0;"), &[(Type::F32, &sources)], &[Type::F32]);
        for (x, got) in sources.iter().zip(&got[0]) {
            let ftz = !flag.is_empty();
            let operand = f64_of(F32, if ftz { flushed(F32, *x) } else { *x });
            judge(F32, ftz, exact(operand), *got, bound(operand), &format!("{name} of {x:x} = {operand:e}"));
            assert!(!ftz || flushed(F32, *got) == *got, "{name} of {x:x} is subnormal: {got:x}");
        }
    }
}

/// Every value of f16 or bf16, one and two in a register.
fn check_halves(name: &str, flag: &str, (one, two): (Type, Type), exact: fn(f64) -> f64, bound: Bound) {
    let format = exact::format_of(one);
    let ftz = !flag.is_empty();
    let all: Vec<u64> = (0..=0xffff).collect();
    let single = format!("{name}.approx{flag}{one}");
    let got = run(&format!("{single} %out0, %in0;"), &[(one, &all)], &[one]);
    for (x, got) in all.iter().zip(&got[0]) {
        let operand = f64_of(format, if ftz { flushed(format, *x) } else { *x });
        judge(format, ftz, exact(operand), *got, bound, &format!("{single} of {x:x} = {operand:e}"));
    }
    let pairs: Vec<u64> = all.iter().map(|x| x | ((x * 40_503) & 0xffff) << 16).collect();
    check(&format!("{name}.approx{flag}{two}"), two, &[pairs], |row| {
        got[0][(row[0] & 0xffff) as usize] | got[0][(row[0] >> 16) as usize] << 16
    });
}

const FTZ: [&str; 2] = ["", ".ftz"];

#[test]
fn reciprocal_and_roots() {
    // 1 ulp
    check_single("rcp", &FTZ, |x| 1.0 / x, |_| Relative(2f64.powi(-23)));
    check_single("sqrt", &FTZ, f64::sqrt, |_| Relative(2f64.powi(-23)));
    check_single("rsqrt", &FTZ, |x| 1.0 / x.sqrt(), |_| Relative(2f64.powf(-22.9)));
}

#[test]
fn exponential() {
    check_single("ex2", &FTZ, f64::exp2, |_| Relative(2f64.powf(-22.5)));
    // Whole powers are exact.
    let whole: Vec<u64> = (-149..128).map(|n| u64::from((n as f32).to_bits())).collect();
    let got = run("ex2.approx.f32 %out0, %in0;", &[(Type::F32, &whole)], &[Type::F32]);
    for (n, got) in (-149..128).zip(&got[0]) {
        assert_eq!(f64_of(F32, *got), 2f64.powi(n));
    }
    check_halves("ex2", "", (Type::F16, Type::F16X2), f64::exp2, Relative(2f64.powf(-9.9)));
    check_halves("ex2", ".ftz", (Type::BF16, Type::BF16X2), f64::exp2, Relative(2f64.powi(-7)));
}

#[test]
fn logarithm() {
    check_single("lg2", &FTZ, f64::log2, |x| {
        if x > 0.5 && x < 2.0 { Absolute(2f64.powi(-22)) } else { Relative(2f64.powi(-22)) }
    });
}

#[test]
fn sine_and_cosine() {
    let bound = |x: f64| {
        let turns = x.abs() / std::f64::consts::PI;
        if turns <= 2.0 {
            Absolute(2f64.powf(-20.9))
        } else if turns <= 100.0 {
            Absolute(2f64.powf(-14.7))
        } else {
            Range
        }
    };
    check_single("sin", &FTZ, |x| if x.is_infinite() { f64::NAN } else { x.sin() }, bound);
    check_single("cos", &FTZ, |x| if x.is_infinite() { f64::NAN } else { x.cos() }, bound);
}

#[test]
fn hyperbolic_tangent() {
    check_single("tanh", &[""], f64::tanh, |_| Relative(2f64.powi(-11)));
    check_halves("tanh", "", (Type::F16, Type::F16X2), f64::tanh, Absolute(2f64.powf(-10.987)));
    check_halves("tanh", "", (Type::BF16, Type::BF16X2), f64::tanh, Absolute(2f64.powi(-8)));
}

#[test]
fn double_precision() {
    let [sources] = exact::sources::<1>(F64, 1, 20_000, 42);
    let got = run("rsqrt.approx.f64 %out0, %in0;", &[(Type::F64, &sources)], &[Type::F64]);
    for (x, got) in sources.iter().zip(&got[0]) {
        let want = expected(
            "rcp",
            F64,
            Mode::Rn,
            false,
            false,
            &[expected("sqrt", F64, Mode::Rn, false, false, &[*x])],
        );
        assert!(got.abs_diff(want) <= 1, "rsqrt.approx.f64 of {x:x}: {got:x}, {want:x}");
    }
    // These see the upper half of their source and give the upper half of the result: 20 bits of fraction.
    for (name, root) in [("rcp", false), ("rsqrt", true)] {
        let body = format!("{name}.approx.ftz.f64 %out0, %in0;");
        let got = run(&body, &[(Type::F64, &sources)], &[Type::F64]);
        for (x, got) in sources.iter().zip(&got[0]) {
            let operand = f64::from_bits(flushed(F64, x & 0xffff_ffff_0000_0000));
            let exact = 1.0 / if root { operand.sqrt() } else { operand };
            let context = format!("{body} {x:x}: {got:x}, exactly {exact:e}");
            let value = f64::from_bits(*got);
            assert_eq!(got & 0xffff_ffff, 0, "{context}");
            if exact.is_nan() {
                assert!(value.is_nan(), "{context}");
            } else if exact.is_infinite() || exact.abs() < f64::MIN_POSITIVE {
                let flushed = if exact.is_infinite() { exact } else { 0f64.copysign(exact) };
                assert_eq!(*got, flushed.to_bits(), "{context}");
            } else {
                assert!((value - exact).abs() <= exact.abs() * 2f64.powi(-20), "{context}");
            }
        }
    }
}

#[test]
fn tested_properties() {
    for (ty, format) in [(Type::F32, F32), (Type::F64, F64)] {
        let [sources] = exact::sources::<1>(format, 1, 500, 43);
        let least = 1 << format.fraction;
        for property in ["finite", "infinite", "number", "notanumber", "normal", "subnormal"] {
            let body = format!("testp.{property}{ty} %out0, %in0;");
            let got = run(&body, &[(ty, &sources)], &[Type::Pred]);
            for (x, got) in sources.iter().zip(&got[0]) {
                let magnitude = x & !(1 << (format.bits - 1));
                let value = decode(format, *x);
                let finite = matches!(value, Exact::Finite(..));
                let want = match property {
                    "finite" => finite,
                    "infinite" => matches!(value, Exact::Infinite(_)),
                    "number" => !matches!(value, Exact::Nan),
                    "notanumber" => matches!(value, Exact::Nan),
                    // Zero counts as normal.
                    "normal" => finite && (magnitude == 0 || magnitude >= least),
                    _ => finite && magnitude != 0 && magnitude < least,
                };
                assert_eq!(*got, u64::from(want), "{body} {x:x}");
            }
        }
    }
}

#[test]
fn copied_signs() {
    for (ty, format) in [(Type::F32, F32), (Type::F64, F64)] {
        let columns = exact::sources::<2>(format, 1, 500, 44);
        let sign = 1 << (format.bits - 1);
        check(&format!("copysign{ty}"), ty, &columns, |row| row[0] & sign | row[1] & !sign);
    }
}

#[test]
fn same_bits_in_both_halves_of_the_range() {
    // Odd and even functions: the sign of the source changes the result's sign, or nothing.
    let sources: Vec<u64> = singles().into_iter().filter(|x| !exact::is_nan(F32, *x)).collect();
    let mirrored: Vec<u64> = sources.iter().map(|x| x ^ 0x8000_0000).collect();
    for (name, odd) in [("sin", 0x8000_0000), ("cos", 0), ("tanh", 0x8000_0000)] {
        let body = format!("{name}.approx.f32 %out0, %in0;");
        let a = run(&body, &[(Type::F32, &sources)], &[Type::F32]);
        let b = run(&body, &[(Type::F32, &mirrored)], &[Type::F32]);
        for ((x, a), b) in sources.iter().zip(&a[0]).zip(&b[0]) {
            assert!(exact::is_nan(F32, *a) || a ^ odd == *b, "{body} {x:x}: {a:x}, {b:x}");
        }
    }
}

#[test]
fn formats_of_the_halves() {
    // The oracle itself, where mistakes would cancel: known patterns.
    assert_eq!(f64_of(F16, 0x3c00), 1.0);
    assert_eq!(f64_of(F16, 0x0001), 2f64.powi(-24));
    assert_eq!(f64_of(F16, 0xfbff), -65504.0);
    assert_eq!(f64_of(BF16, 0x3f80), 1.0);
    assert_eq!(f64_of(BF16, 0x4049), 3.140_625);
    assert_eq!(f64_of(exact::E4M3, 0x7e), 448.0);
    assert_eq!(f64_of(exact::E5M2, 0x7b), 57344.0);
    assert_eq!(f64_of(F32, 0x7f7f_ffff), f64::from(f32::MAX));
}
