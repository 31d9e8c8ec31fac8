//! f32 and f64 arithmetic against exact values, in every rounding mode and with every modifier.

use ptxvm::types::Type;

use crate::support::exact::{self, Exact, F32, F64, Format, MODES, Mode, decode, encode, flushed, saturated};
use crate::support::op::run;

/// The exact result of an operation, rounded, with its modifiers.
pub(crate) fn expected(op: &str, format: Format, mode: Mode, ftz: bool, sat: bool, sources: &[u64]) -> u64 {
    let sources: Vec<u64> = sources.iter().map(|x| if ftz { flushed(format, *x) } else { *x }).collect();
    let x: Vec<Exact> = sources.iter().map(|x| decode(format, *x)).collect();
    let rounded = match op {
        "add" => encode(format, mode, &exact::sum(&x[0], &x[1], mode)),
        "sub" => encode(format, mode, &exact::sum(&x[0], &exact::negated(&x[1]), mode)),
        "mul" => encode(format, mode, &exact::product(&x[0], &x[1])),
        "fma" | "mad" => encode(format, mode, &exact::sum(&exact::product(&x[0], &x[1]), &x[2], mode)),
        "div" => exact::quotient(format, mode, &x[0], &x[1]).unwrap_or(format.nan),
        "rcp" => {
            let one = Exact::Finite(false, exact::Dyadic::new(1, 0));
            exact::quotient(format, mode, &one, &x[0]).unwrap_or(format.nan)
        }
        "sqrt" => exact::root(format, mode, &x[0]).unwrap_or(format.nan),
        _ => panic!("no definition of `{op}`"),
    };
    let rounded = if exact::is_nan(format, rounded) { exact::nan(format, &sources) } else { rounded };
    let rounded = if ftz { flushed(format, rounded) } else { rounded };
    if sat { saturated(format, rounded) } else { rounded }
}

/// Runs one instruction on columns of sources and compares every row.
pub(crate) fn check(instruction: &str, ty: Type, columns: &[Vec<u64>], expected: impl Fn(&[u64]) -> u64) {
    let names: Vec<String> = (0..columns.len()).map(|i| format!("%in{i}")).collect();
    let body = format!("{instruction} %out0, {};", names.join(", "));
    let inputs: Vec<(Type, &[u64])> = columns.iter().map(|c| (ty, c.as_slice())).collect();
    let got = run(&body, &inputs, &[ty]);
    for (i, got) in got[0].iter().enumerate() {
        let row: Vec<u64> = columns.iter().map(|c| c[i]).collect();
        let want = expected(&row);
        assert_eq!(*got, want, "{instruction} of {row:x?}: {got:x}, not {want:x}");
    }
}

fn check_modes<const N: usize>(
    op: &str,
    ty: Type,
    modes: &[(&str, Mode)],
    flags: &[&str],
    columns: &[Vec<u64>; N],
) {
    let format = exact::format_of(ty);
    for (name, mode) in modes {
        for flag in flags {
            let (ftz, sat) = (flag.contains(".ftz"), flag.contains(".sat"));
            check(&format!("{op}{name}{flag}{ty}"), ty, columns, |row| {
                expected(op, format, *mode, ftz, sat, row)
            });
        }
    }
}

const WITH_DEFAULT: [(&str, Mode); 5] =
    [("", Mode::Rn), (".rn", Mode::Rn), (".rz", Mode::Rz), (".rm", Mode::Rm), (".rp", Mode::Rp)];
const FLAGS: [&str; 4] = ["", ".ftz", ".sat", ".ftz.sat"];

#[test]
fn f32_add_sub_mul() {
    let columns = exact::sources::<2>(F32, 1, 1500, 1);
    for op in ["add", "sub", "mul"] {
        check_modes(op, Type::F32, &WITH_DEFAULT, &FLAGS, &columns);
    }
}

#[test]
fn f64_add_sub_mul() {
    let columns = exact::sources::<2>(F64, 1, 1500, 2);
    for op in ["add", "sub", "mul"] {
        check_modes(op, Type::F64, &WITH_DEFAULT, &[""], &columns);
    }
}

#[test]
fn f32_fma() {
    let columns = exact::sources::<3>(F32, 17, 3000, 3);
    check_modes("fma", Type::F32, &MODES, &FLAGS, &columns);
    let columns = exact::sources::<3>(F32, 1001, 100, 4);
    check_modes("mad", Type::F32, &MODES, &FLAGS, &columns);
}

#[test]
fn f64_fma() {
    let columns = exact::sources::<3>(F64, 17, 3000, 5);
    check_modes("fma", Type::F64, &MODES, &[""], &columns);
    let columns = exact::sources::<3>(F64, 1001, 100, 6);
    check_modes("mad", Type::F64, &MODES, &[""], &columns);
}

#[test]
fn cancelling_products() {
    // a * b - round(a * b) is the product's rounding error: only a fused operation gives it.
    for (ty, format) in [(Type::F32, F32), (Type::F64, F64)] {
        let mut columns = exact::sources::<3>(format, 1, 0, 0).map(|_| Vec::new());
        let mut rng = exact::Random(7);
        for _ in 0..1000 {
            let (a, b) = (rng.pattern(format), rng.pattern(format));
            let product = exact::product(&decode(format, a), &decode(format, b));
            columns[0].push(a);
            columns[1].push(b);
            columns[2].push(encode(format, Mode::Rn, &exact::negated(&product)));
        }
        check_modes("fma", ty, &MODES, &[""], &columns);
    }
}

#[test]
fn division() {
    let columns = exact::sources::<2>(F32, 1, 1500, 8);
    check_modes("div", Type::F32, &MODES, &["", ".ftz"], &columns);
    let columns = exact::sources::<2>(F64, 1, 1500, 9);
    check_modes("div", Type::F64, &MODES, &[""], &columns);
}

#[test]
fn division_approximate() {
    // 2 ulp are allowed; specials and signs are exact. `.approx` has its bound for divisors up to 2^126.
    let columns = exact::sources::<2>(F32, 1, 3000, 10);
    let inputs = [(Type::F32, columns[0].as_slice()), (Type::F32, columns[1].as_slice())];
    for (variant, full) in [(".full", true), (".approx", false)] {
        for ftz in [false, true] {
            let name = format!("div{variant}{}.f32", if ftz { ".ftz" } else { "" });
            let got = run(&format!("{name} %out0, %in0, %in1;"), &inputs, &[Type::F32]);
            for (i, got) in got[0].iter().enumerate() {
                let (a, b) = (columns[0][i], columns[1][i]);
                let want = expected("div", F32, Mode::Rn, ftz, false, &[a, b]);
                let divisor = f32::from_bits(b as u32).abs();
                let context = format!("{name} of {a:x}, {b:x}: {got:x}, {want:x} exactly");
                if !full && divisor > 2f32.powi(126) && divisor.is_finite() {
                    let a = f32::from_bits(a as u32);
                    let zero = *got & 0x7fff_ffff == 0;
                    assert!(if a.is_finite() { zero } else { *got == F32.nan }, "{context}");
                } else if full || divisor >= f32::MIN_POSITIVE || divisor == 0.0 || exact::is_nan(F32, want) {
                    // Numbers of one sign are ordered like their patterns.
                    assert!(got.abs_diff(want) <= 2, "{context}");
                }
            }
        }
    }
}

#[test]
fn reciprocals_and_roots() {
    for (ty, format, flags) in [(Type::F32, F32, &["", ".ftz"][..]), (Type::F64, F64, &[""])] {
        let columns = exact::sources::<1>(format, 1, 4000, 11);
        for op in ["rcp", "sqrt"] {
            check_modes(op, ty, &MODES, flags, &columns);
        }
    }
}

/// min and max as the PTX ISA's pseudo-code has them.
pub(crate) fn extremum(max: bool, format: Format, flags: &str, sources: &[u64]) -> u64 {
    let sign = 1u64 << (format.bits - 1);
    let ftz = flags.contains(".ftz");
    let original: Vec<u64> = sources.iter().map(|x| if ftz { flushed(format, *x) } else { *x }).collect();
    let xorsign = flags.contains(".xorsign");
    let (mut a, mut b) = (original[0], original[1]);
    if xorsign {
        a &= !sign;
        b &= !sign;
    }
    let chosen = match (decode(format, a), decode(format, b)) {
        (Exact::Nan, Exact::Nan) => return exact::nan(format, &original),
        (Exact::Nan, _) | (_, Exact::Nan) if flags.contains(".NaN") => return format.nan,
        (Exact::Nan, _) => b,
        (_, Exact::Nan) => a,
        (x, y) => {
            // -inf < negative < -0 < +0 < positive < +inf
            let order = |v: &Exact| match v {
                Exact::Infinite(negative) => {
                    if *negative {
                        -3
                    } else {
                        3
                    }
                }
                Exact::Finite(negative, v) if v.is_zero() => {
                    if *negative {
                        -1
                    } else {
                        1
                    }
                }
                Exact::Finite(negative, _) => {
                    if *negative {
                        -2
                    } else {
                        2
                    }
                }
                Exact::Nan => unreachable!(),
            };
            let less = order(&x).cmp(&order(&y)).then_with(|| match (&x, &y) {
                (Exact::Finite(true, x), Exact::Finite(_, y)) => y.compare(x),
                (Exact::Finite(false, x), Exact::Finite(_, y)) => x.compare(y),
                _ => std::cmp::Ordering::Equal,
            });
            if less.is_lt() == max { b } else { a }
        }
    };
    if xorsign { chosen | ((original[0] ^ original[1]) & sign) } else { chosen }
}

#[test]
fn minimum_and_maximum() {
    let columns = exact::sources::<2>(F32, 1, 1500, 12);
    for op in ["min", "max"] {
        for ftz in ["", ".ftz"] {
            for nan in ["", ".NaN"] {
                for xorsign in ["", ".xorsign.abs"] {
                    let flags = format!("{ftz}{nan}{xorsign}");
                    check(&format!("{op}{flags}.f32"), Type::F32, &columns, |row| {
                        extremum(op == "max", F32, &flags, row)
                    });
                }
            }
        }
        let columns = exact::sources::<2>(F64, 1, 1500, 13);
        check(&format!("{op}.f64"), Type::F64, &columns, |row| extremum(op == "max", F64, "", row));
    }
}

#[test]
fn absolute_and_negated() {
    for (ty, format, flags) in [(Type::F32, F32, &["", ".ftz"][..]), (Type::F64, F64, &[""])] {
        let columns = exact::sources::<1>(format, 1, 1000, 14);
        let sign = 1 << (format.bits - 1);
        for flag in flags {
            let operand = |x: u64| if flag.is_empty() { x } else { flushed(format, x) };
            let nan_or = |x: u64| if exact::is_nan(format, x) { exact::nan(format, &[x]) } else { x };
            check(&format!("abs{flag}{ty}"), ty, &columns, |row| nan_or(operand(row[0]) & !sign));
            check(&format!("neg{flag}{ty}"), ty, &columns, |row| nan_or(operand(row[0]) ^ sign));
        }
    }
}

#[test]
fn pairs() {
    // Two f32 in one register: each half as the scalar instruction.
    let low = exact::sources::<3>(F32, 101, 1000, 15);
    let high = exact::sources::<3>(F32, 101, 1000, 16);
    let columns: [Vec<u64>; 3] =
        std::array::from_fn(|k| low[k].iter().zip(&high[k]).map(|(l, h)| l | h << 32).collect());
    for (op, n) in [("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)] {
        for (name, mode) in MODES {
            for flag in ["", ".ftz"] {
                check(&format!("{op}{name}{flag}.f32x2"), Type::F32X2, &columns[..n], |row| {
                    let half = |shift: u32| {
                        let row: Vec<u64> = row.iter().map(|x| x >> shift & 0xffff_ffff).collect();
                        expected(op, F32, mode, !flag.is_empty(), false, &row)
                    };
                    half(0) | half(32) << 32
                });
            }
        }
    }
}
