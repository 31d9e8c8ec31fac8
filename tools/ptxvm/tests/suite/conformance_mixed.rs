//! What sm_100 adds to arithmetic: min and max of three f32, `redux` of f32, and f32 with sources of f16 and bf16.

use ptxvm::types::Type;

use crate::conformance_float::{check, expected, extremum};
use crate::support::exact::{self, BF16, Exact, F16, F32, Mode, decode};
use crate::support::op::run;
use crate::support::warp::{Random, Row, faults, run_one, undefined};

/// The lesser or greater of any number of f32, by sorting: those that are numbers, in the order of their values, -0 before +0.
fn among(max: bool, flags: &str, sources: &[u64]) -> u64 {
    let nan = |x: &u64| x & 0x7fff_ffff > 0x7f80_0000;
    if sources.iter().all(nan) || flags.contains(".NaN") && sources.iter().any(nan) {
        return 0x7fff_ffff;
    }
    let subnormal = |x: u64| x & 0x7f80_0000 == 0 && flags.contains(".ftz");
    let source = |x: &u64| {
        let x = if flags.contains(".abs") { x & 0x7fff_ffff } else { *x };
        if subnormal(x) { x & 0x8000_0000 } else { x }
    };
    let mut numbers: Vec<u64> = sources.iter().filter(|x| !nan(x)).map(source).collect();
    numbers.sort_by(|a, b| {
        let value = |x: u64| (f32::from_bits(x as u32), x >> 31 == 0);
        value(*a).partial_cmp(&value(*b)).unwrap()
    });
    if max { numbers[numbers.len() - 1] } else { numbers[0] }
}

#[test]
fn extremes_of_three() {
    let columns = exact::sources::<3>(F32, 101, 6000, 31);
    for op in ["min", "max"] {
        for ftz in ["", ".ftz"] {
            for nan in ["", ".NaN"] {
                for abs in ["", ".abs"] {
                    let flags = format!("{ftz}{nan}{abs}");
                    check(&format!("{op}{flags}.f32"), Type::F32, &columns, |row| {
                        let want = among(op == "max", &flags, row);
                        if abs.is_empty() && !row.iter().any(|x| x & 0x7fff_ffff > 0x7f80_0000) {
                            let two = extremum(op == "max", F32, &flags, &row[..2]);
                            assert_eq!(want, extremum(op == "max", F32, &flags, &[two, row[2]]));
                        }
                        want
                    });
                }
            }
        }
    }
}

#[test]
fn extremes_of_a_warp() {
    let mut random = Random(32);
    for round in 0..40 {
        let mut a: Row = random.row();
        let mask = if round == 0 { 1 << 7 } else { random.next() as u32 | 1 << 7 };
        // NaNs alone, some of them, none.
        for (i, x) in a.iter_mut().enumerate() {
            let nan = round % 4 == 0 || round % 4 == 1 && i % 3 == 0;
            *x = if nan { *x | 0x7fc0_0000 } else { *x & 0xbfff_ffff };
        }
        let here: Vec<u64> = (0..32).filter(|i| mask >> i & 1 != 0).map(|i| u64::from(a[i])).collect();
        for op in ["min", "max"] {
            for flags in ["", ".abs", ".NaN", ".abs.NaN"] {
                let body = format!(
                    "shr.u32 %r0, {mask:#x}, %lane;\nand.b32 %r0, %r0, 1;\nsetp.eq.u32 %p1, %r0, 1;\nmov.u32 %out0, 0;\n\
                     @%p1 redux.sync.{op}{flags}.f32 %out0, %in0, {mask:#x};\n"
                );
                let want = among(op == "max", flags, &here) as u32;
                let got = run_one(&body, &[a], 1).remove(0);
                for (lane, got) in got.iter().enumerate() {
                    let want = if mask >> lane & 1 != 0 { want } else { 0 };
                    assert_eq!(*got, want, "{body} of {here:x?}, lane {lane}");
                }
            }
        }
    }
    let lanes = undefined("redux.sync.min.f32 %out0, %in0, -1;\n", &[random.row()], &[!2], 1);
    assert_eq!(lanes, [u32::MAX]);
    for wrong in ["redux.sync.add.f32 %out0, %in0, -1;\n", "redux.sync.min.abs.s32 %out0, %in0, -1;\n"] {
        let wrong = faults(wrong, &[random.row()], 1);
        assert_eq!(wrong.len(), 1, "{wrong:?}");
    }
}

/// The same value as f32: every number of the smaller formats is one, a NaN is any.
fn widened(format: exact::Format, bits: u64) -> u64 {
    match decode(format, bits) {
        Exact::Nan => F32.nan,
        // The exponent's bias is that of bf16 already; f16's numbers are multiples of 2^-24.
        _ if format == BF16 => bits << 16,
        Exact::Infinite(negative) => u64::from(negative) << 31 | 0x7f80_0000,
        _ => {
            let (sign, exponent, fraction) = (bits >> 15, bits >> 10 & 31, bits & 0x3ff);
            let units = if exponent == 0 { fraction as f64 } else { (0x400 | fraction) as f64 };
            let value = units * 2f64.powi(exponent.max(1) as i32 - 25);
            sign << 31 | u64::from((value as f32).to_bits())
        }
    }
}

#[test]
fn sources_of_16_bits() {
    let modes = [("", Mode::Rn), (".rn", Mode::Rn), (".rz", Mode::Rz), (".rm", Mode::Rm), (".rp", Mode::Rp)];
    for (ty, format) in [(Type::F16, F16), (Type::BF16, BF16)] {
        let [a, b] = exact::sources::<2>(format, 7, 5000, 33);
        let n = a.len();
        let [c] = exact::sources::<1>(F32, 1, n, 34);
        let c: Vec<u64> = c.iter().cycle().take(n).copied().collect();
        for op in ["add", "sub", "fma"] {
            for (name, mode) in modes {
                for sat in ["", ".sat"] {
                    if op == "fma" && name.is_empty() {
                        continue;
                    }
                    let instruction = format!("{op}{name}{sat}.f32{ty}");
                    let (inputs, names) = match op {
                        "fma" => (vec![(ty, &*a), (ty, &*b), (Type::F32, &*c)], "%in0, %in1, %in2"),
                        _ => (vec![(ty, &*a), (Type::F32, &*c)], "%in0, %in1"),
                    };
                    let got = run(&format!("{instruction} %out0, {names};"), &inputs, &[Type::F32]);
                    for i in 0..n {
                        let wide = |x: u64| widened(format, x);
                        let row = match op {
                            "fma" => vec![wide(a[i]), wide(b[i]), c[i]],
                            _ => vec![wide(a[i]), c[i]],
                        };
                        let want = expected(op, F32, mode, false, !sat.is_empty(), &row);
                        assert_eq!(got[0][i], want, "{instruction} of {row:x?}");
                    }
                }
            }
        }
    }
}
