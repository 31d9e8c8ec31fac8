//! SIMD within a register, against its definition element by element (PTX ISA, "SIMD Video Instructions").

use ptxvm::types::Type::{S32, U32};

use crate::support::op::check;

/// The elements of a word, each of `bits` bits.
fn elements(word: u64, bits: u32, signed: bool) -> Vec<i64> {
    let size = 1i64 << bits;
    let part = |i: u32| (word >> (i * bits)) as i64 & (size - 1);
    (0..32 / bits).map(part).map(|v| if signed && v >= size / 2 { v - size } else { v }).collect()
}

#[test]
fn simd_within_a_register() {
    let mut variants = 0;
    for (name, apply) in [
        ("vadd", (|x, y| x + y) as fn(i64, i64) -> i64),
        ("vsub", |x, y| x - y),
        // Half of the sum; a half is rounded up where the sum is not negative.
        ("vavrg", |x, y| if x + y >= 0 { (x + y + 1).div_euclid(2) } else { (x + y).div_euclid(2) }),
        ("vabsdiff", |x, y| (x - y).abs()),
        ("vmin", i64::min),
        ("vmax", i64::max),
    ] {
        for (n, bits) in [(2, 16), (4, 8)] {
            for signs in 0..8 {
                let [d, a, b] = [4, 2, 1].map(|bit| signs & bit != 0);
                let [td, ta, tb] = [d, a, b].map(|signed| if signed { S32 } else { U32 });
                for suffix in ["", ".sat", ".add"] {
                    let body = format!("{name}{n}{td}{ta}{tb}{suffix} %out0, %in0, %in1, %in2;");
                    check(&body, [U32; 3], [U32], |[x, y, z]| {
                        let (low, high) = match (suffix, d) {
                            (".sat", true) => (-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
                            (".sat", false) => (0, (1 << bits) - 1),
                            _ => (i64::MIN, i64::MAX),
                        };
                        let pairs = elements(x, bits, a).into_iter().zip(elements(y, bits, b));
                        let results = pairs.map(|(x, y)| apply(x, y).clamp(low, high));
                        let word = if suffix == ".add" {
                            results.fold(z as i64, |sum, v| sum + v)
                        } else {
                            results
                                .zip(0..)
                                .fold(0, |word, (v, i)| word | (v & ((1 << bits) - 1)) << (i * bits))
                        };
                        [u64::from(word as u32)]
                    });
                    variants += 1;
                }
            }
        }
    }
    assert_eq!(variants, 6 * 2 * 8 * 3);
}
