//! f16 and bf16 arithmetic against exact values: every modifier, one value or two in a register.

use ptxvm::types::Type;

use crate::conformance_float::{check, expected, extremum};
use crate::support::exact::{self, BF16, F16, Format, Mode};

const TYPES: [(Type, Type, Format); 2] = [(Type::F16, Type::F16X2, F16), (Type::BF16, Type::BF16X2, BF16)];

/// The definition of one value, applied to both halves.
fn halves(row: &[u64], one: impl Fn(&[u64]) -> u64) -> u64 {
    let half = |shift: u32| one(&row.iter().map(|x| x >> shift & 0xffff).collect::<Vec<_>>());
    half(0) | half(16) << 16
}

/// Checks an instruction `name` without its type on single and packed values.
fn check_both<const N: usize>(
    name: &str,
    (one, two, format): (Type, Type, Format),
    (every, random): (usize, usize),
    definition: impl Fn(&[u64]) -> u64,
) {
    let low = exact::sources::<N>(format, every, random, 21);
    check(&format!("{name}{one}"), one, &low, &definition);
    let mut high = exact::sources::<N>(format, every, random, 22);
    high.iter_mut().for_each(|column| column.rotate_left(5));
    let columns: [Vec<u64>; N] =
        std::array::from_fn(|k| low[k].iter().zip(&high[k]).map(|(l, h)| l | h << 16).collect());
    check(&format!("{name}{two}"), two, &columns, |row| halves(row, &definition));
}

fn relu(bits: u64) -> u64 {
    if bits & 0x8000 != 0 { 0 } else { bits }
}

#[test]
fn add_sub_mul() {
    for types in TYPES {
        let flags: &[&str] = if types.2 == F16 { &["", ".ftz", ".sat", ".ftz.sat"] } else { &[""] };
        for op in ["add", "sub", "mul"] {
            for mode in ["", ".rn"] {
                for flag in flags {
                    let (ftz, sat) = (flag.contains(".ftz"), flag.contains(".sat"));
                    check_both::<2>(&format!("{op}{mode}{flag}"), types, (1, 6000), |row| {
                        expected(op, types.2, Mode::Rn, ftz, sat, row)
                    });
                }
            }
        }
    }
}

#[test]
fn fused() {
    for types in TYPES {
        let flags: &[&str] = if types.2 == F16 {
            &["", ".ftz", ".sat", ".ftz.sat", ".relu", ".ftz.relu"]
        } else {
            &["", ".relu"]
        };
        for flag in flags {
            let (ftz, sat) = (flag.contains(".ftz"), flag.contains(".sat"));
            check_both::<3>(&format!("fma.rn{flag}"), types, (7, 20_000), |row| {
                let d = expected("fma", types.2, Mode::Rn, ftz, sat, row);
                if flag.contains(".relu") { relu(d) } else { d }
            });
        }
    }
}

#[test]
fn fused_at_ties() {
    // Products in the middle between two values, and a third source that is tiny beside them, or the reverse: where
    // two roundings go wrong.
    for (one, _, format) in TYPES {
        let mut columns = [Vec::new(), Vec::new(), Vec::new()];
        let mut rng = exact::Random(23);
        let step = 1 << format.fraction;
        let last = format.limit >> format.fraction;
        while columns[0].len() < 40_000 {
            // (2^k + 1) * (2^j + 1) and the like have few bits, so that ties are common.
            let pattern = |rng: &mut exact::Random| {
                let exponent = rng.below(last) << format.fraction;
                let bits =
                    (1 << rng.below(format.fraction.into())) | (1 << rng.below(format.fraction.into()));
                exponent | bits & (step - 1) | (rng.below(2) << 15)
            };
            for column in &mut columns {
                let x = pattern(&mut rng);
                column.push(x);
            }
        }
        check(&format!("fma.rn{one}"), one, &columns, |row| {
            expected("fma", format, Mode::Rn, false, false, row)
        });
    }
}

#[test]
fn minimum_and_maximum() {
    for types in TYPES {
        let flushing: &[&str] = if types.2 == F16 { &["", ".ftz"] } else { &[""] };
        for op in ["min", "max"] {
            for ftz in flushing {
                for nan in ["", ".NaN"] {
                    for xorsign in ["", ".xorsign.abs"] {
                        let flags = format!("{ftz}{nan}{xorsign}");
                        check_both::<2>(&format!("{op}{flags}"), types, (1, 4000), |row| {
                            extremum(op == "max", types.2, &flags, row)
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn absolute_and_negated() {
    for (one, two, format) in TYPES {
        let all: Vec<u64> = (0..=0xffff).collect();
        let pairs: Vec<u64> = all.iter().map(|x| x | ((x * 40_503) & 0xffff) << 16).collect();
        let flushing: &[&str] = if format == F16 { &["", ".ftz"] } else { &[""] };
        for (op, on, flip) in [("abs", 0x7fff, 0), ("neg", 0xffff, 0x8000)] {
            for ftz in flushing {
                let definition = |row: &[u64]| {
                    let x = if ftz.is_empty() { row[0] } else { exact::flushed(format, row[0]) };
                    if exact::is_nan(format, x) { format.nan } else { (x & on) ^ flip }
                };
                check(&format!("{op}{ftz}{one}"), one, std::slice::from_ref(&all), definition);
                check(&format!("{op}{ftz}{two}"), two, std::slice::from_ref(&pairs), |row| {
                    halves(row, definition)
                });
            }
        }
    }
}
