//! `mma`: every shape and type against the definition of `support/product.rs`, the order of sums, what of D is defined, and what is
//! refused of all instructions on matrices in registers.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

use ptxvm::MmaOrder;
use ptxvm::error::ErrorKind;

use crate::support::product::{
    At, Case, Matrix, a_at, b_at, bits, body, c_at, case, cases, check, check_in, decode, list, product,
    small, spread, words,
};
use crate::support::warp::{Random, faults, run_in, run_one, undefined};

#[test]
fn mma_has_each_element_at_its_place() {
    for case in cases().into_iter().filter(|case| case.extra != "satfinite") {
        let mut random = Random(case.k as u64);
        let mut some = |ty: &str, rows, cols| Matrix::new(rows, cols, |_, _| small(ty, random.next()));
        let (m, n, k) = (case.m, case.n, case.k);
        let mut inputs = Vec::new();
        // A one-hot at each place, B random; then the other way round; then C alone.
        for at in 0..m * k {
            let a = Matrix::new(m, k, |r, c| small(case.a, u64::from(r * k + c == at)));
            inputs.push([a, some(case.b, k, n), some(case.c, m, n)]);
        }
        for at in 0..k * n {
            let b = Matrix::new(k, n, |r, c| small(case.b, u64::from(r * n + c == at)));
            inputs.push([some(case.a, m, k), b, some(case.c, m, n)]);
        }
        inputs.push([Matrix::new(m, k, |_, _| 0), Matrix::new(k, n, |_, _| 0), some(case.c, m, n)]);
        check(&case, &inputs);
    }
}

/// Inputs with all kinds of numbers.
fn all_kinds(case: &Case) -> Vec<[Matrix; 3]> {
    let mut random = Random(7 + case.k as u64);
    // All bit patterns: subnormals, infinities, NaN, overflow. For some of f32's bits and of the wide types, near 1.
    let mut any = |ty: &str, rows, cols, tame: bool| {
        Matrix::new(rows, cols, |_, _| {
            let word = random.next();
            match (ty, tame) {
                ("f32" | "tf32", true) => word & 0x83ff_ffff | 0x3c00_0000,
                ("bf16", true) => word & 0x83ff | 0x3c00,
                ("f64", true) => word & 0x800f_ffff_ffff_ffff | 0x3ff0 << 48,
                ("f16", true) => word & 0x83ff | 0x3800,
                ("f64", _) => word,
                ("s32", true) => [0x7fff_ffff, 0x8000_0000][(word & 1) as usize],
                _ => word & ((1 << bits(ty)) - 1),
            }
        })
    };
    (0..64)
        .map(|i| {
            let tame = i % 2 == 0;
            [
                any(case.a, case.m, case.k, tame),
                any(case.b, case.k, case.n, tame),
                any(case.c, case.m, case.n, tame),
            ]
        })
        .collect()
}

#[test]
fn mma_sums_in_the_documented_order() {
    for case in cases() {
        check(&case, &all_kinds(&case));
    }
}

// ------------------------------------------------------------------------------------------------ groups of tensor cores

/// A finite number as stored: value = significand x 2^(exponent - fraction), with the exponent of its field. Zero counts
/// as exponent -126.
struct Stored {
    significand: i128,
    exponent: i32,
    fraction: i32,
}

fn stored(ty: &str, bits: u64) -> Stored {
    let (exponent_bits, fraction) = match ty {
        "f16" => (5, 10),
        "bf16" => (8, 7),
        "f32" => (8, 23),
        "tf32" => (8, 10),
        _ => panic!("{ty}"),
    };
    let bits = if ty == "tf32" { bits >> 13 } else { bits };
    let field = (bits >> fraction) as i32 & ((1 << exponent_bits) - 1);
    let below = (bits & ((1 << fraction) - 1)) as i128;
    let bias = (1 << (exponent_bits - 1)) - 1;
    let (magnitude, exponent) = match (field, below) {
        (0, 0) => (0, -126),
        (0, _) => (below, 1 - bias),
        _ => (below + (1 << fraction), field - bias),
    };
    let negative = bits >> (exponent_bits + fraction) & 1 != 0;
    Stored { significand: if negative { -magnitude } else { magnitude }, exponent, fraction }
}

/// `significand` 2^(`exponent` - `fraction`) in units of 2^(`largest` - `kept`), cut off towards zero: Rust's division.
fn cut(significand: i128, fraction: i32, exponent: i32, largest: i32, kept: i32) -> i128 {
    let up = kept - fraction + exponent - largest;
    if up >= 0 { significand << up } else { significand / (1i128 << (-up).min(126)) }
}

/// An integer of units 2^`unit` as f32, towards zero.
fn towards_zero(value: i128, mut unit: i32) -> u64 {
    let mut magnitude = value.unsigned_abs();
    while magnitude >= 1 << 24 || unit < -149 {
        magnitude /= 2;
        unit += 1;
    }
    while magnitude != 0 && magnitude < 1 << 23 && unit > -149 {
        magnitude *= 2;
        unit -= 1;
    }
    let sign = u64::from(value < 0 && magnitude != 0) << 31;
    sign | match magnitude {
        0 => 0,
        // Above the largest f32.
        _ if unit > 127 - 23 => 0x7f80_0000,
        subnormal if subnormal < 1 << 23 => subnormal as u64,
        normal => (((unit + 23 + 127) as u64) << 23) + (normal as u64 - (1 << 23)),
    }
}

/// D as groups of `group` products sum it, with `kept` bits below the largest exponent.
fn grouped(group: usize, kept: i32, case: &Case, a: &Matrix, b: &Matrix, c: &Matrix) -> Matrix {
    Matrix::new(case.m, case.n, |row, col| {
        let mut sum = c.get(row, col);
        let all: Vec<usize> = (0..case.k).collect();
        for ks in all.chunks(group) {
            let factors = ks.iter().map(|k| (a.get(row, *k), b.get(*k, col)));
            let plain = factors
                .clone()
                .fold(decode("f32", sum), |sum, (x, y)| sum + decode(case.a, x) * decode(case.b, y));
            if !plain.is_finite() {
                sum = if plain.is_nan() { 0x7fff_ffff } else { u64::from((plain as f32).to_bits()) };
                continue;
            }
            let mut terms: Vec<(i128, i32, i32)> = factors
                .map(|(x, y)| (stored(case.a, x), stored(case.b, y)))
                .map(|(x, y)| {
                    (x.significand * y.significand, x.fraction + y.fraction, x.exponent + y.exponent)
                })
                .collect();
            let start = stored("f32", sum);
            terms.push((start.significand, start.fraction, start.exponent));
            let largest = terms.iter().map(|(.., exponent)| *exponent).max().unwrap();
            let total = terms.iter().map(|(s, f, e)| cut(*s, *f, *e, largest, kept)).sum();
            sum = towards_zero(total, largest - kept);
        }
        sum
    })
}

/// Groups of 16-bit factors and of tf32, and bits below the largest exponent.
fn generations() -> [(MmaOrder, usize, usize, i32); 2] {
    [(MmaOrder::Ampere, 8, 4, 24), (MmaOrder::Hopper, 16, 8, 25)]
}

#[test]
fn mma_sums_in_groups_as_tensor_cores_do() {
    for (order, wide, narrow, kept) in generations() {
        let known = |case: &Case| matches!(case.a, "f16" | "bf16" | "tf32") && case.c == "f32";
        for case in cases().into_iter().filter(known) {
            let group = if case.a == "tf32" { narrow } else { wide };
            let mut inputs = all_kinds(&case);
            // Of one size: the sums carry, and all but the last bits of the smallest count.
            let mut random = Random(3);
            let mut near = |ty: &str, rows, cols| {
                Matrix::new(rows, cols, |_, _| {
                    let word = random.next();
                    match ty {
                        "f16" => word & 0x07ff | 0x3800 | word >> 16 & 0x8000,
                        "bf16" => word & 0x01ff | 0x3e80 | word >> 16 & 0x8000,
                        "tf32" => word & 0x01ff_ffff | 0x3e80_0000 | word >> 32 & 0x8000_0000,
                        _ => word & 0x03ff_ffff | 0x3e80_0000 | word >> 32 & 0x8000_0000,
                    }
                })
            };
            inputs.extend((0..32).map(|_| {
                [near(case.a, case.m, case.k), near(case.b, case.k, case.n), near(case.c, case.m, case.n)]
            }));
            // The largest significands, of one sign.
            let largest = |ty: &str, rows, cols| {
                let bits = match ty {
                    "f16" => 0x3fff,
                    "bf16" => 0x3fff,
                    _ => 0x3fff_ffff,
                };
                Matrix::new(rows, cols, |_, _| bits)
            };
            inputs.push([
                largest(case.a, case.m, case.k),
                largest(case.b, case.k, case.n),
                largest(case.c, case.m, case.n),
            ]);
            check_in(order, &case, &inputs, |case, _, a, b, c| grouped(group, kept, case, a, b, c));
        }
    }
}

/// What the studies show by single numbers: one product alone among small ones, on each generation.
#[test]
fn groups_cut_what_lies_far_below_the_largest() {
    let case = case(16, 8, 16, "bf16", "bf16", "f32", "");
    let one = |at: usize, small: f32| {
        let a = Matrix::new(16, 16, |_, k| u64::from(if k == at { 1.0f32 } else { small }.to_bits() >> 16));
        let b = Matrix::new(16, 8, |_, _| 0x3f80);
        let c = Matrix::new(16, 8, |_, _| 0);
        [a, b, c]
    };
    let sum = |order, small: f32| {
        let [a, b, c] = one(0, small);
        let mut rows = spread(&a, case.a, |lane, i| a_at(&case, lane, i));
        rows.extend(spread(&b, case.b, |lane, i| b_at(&case, lane, i)));
        rows.extend(spread(&c, case.c, |lane, i| c_at(&case, lane, i)));
        let out = run_in(order, &body(&case), &[rows], words(&case)[2]);
        f32::from_bits(out[0][0][0])
    };
    let power = |e: i32| 2f32.powi(e);
    // 2^-24 is half of 1's last bit: a chain rounds each to even, and loses all.
    assert_eq!(sum(MmaOrder::Chain, power(-24)), 1.0);
    // Ampere keeps one bit more: seven in the first group, of which the odd one is cut, then eight.
    assert_eq!(sum(MmaOrder::Ampere, power(-24)), 1.0 + 3.0 * power(-23) + 4.0 * power(-23));
    assert_eq!(sum(MmaOrder::Hopper, power(-24)), 1.0 + 7.0 * power(-23));
    // The bit after that is Hopper's alone.
    assert_eq!(sum(MmaOrder::Ampere, power(-25)), 1.0);
    assert_eq!(sum(MmaOrder::Hopper, power(-25)), 1.0 + 3.0 * power(-23));
    assert_eq!(sum(MmaOrder::Hopper, power(-26)), 1.0);
    // The largest exponent comes first: it does not matter where it stands.
    assert_eq!(sum(MmaOrder::Hopper, -power(-25)), 1.0 - 8.0 * power(-24));
}

/// Steps of k that hold zeros leave a sum as it is: rows end at different lengths in kernels.
#[test]
fn groups_of_zeros_change_nothing() {
    let case = case(16, 8, 16, "bf16", "bf16", "f32", "");
    let mut random = Random(5);
    let c = Matrix::new(16, 8, |_, _| random.next() & 0x8fff_ffff | 0x3000_0000);
    let b = Matrix::new(16, 8, |_, _| random.next() & 0x83ff | 0x3c00);
    for order in MmaOrder::ALL {
        let zeros = Matrix::new(16, 16, |_, k| if k % 2 == 0 { 0 } else { 0x8000 });
        check_in(order, &case, &[[zeros, b.clone(), c.clone()]], |_, _, _, _, c| c.clone());
    }
}

// ------------------------------------------------------------------------------------------------ f16 m8n8k4

#[test]
fn quads() {
    let mut random = Random(11);
    for (a_rows, b_rows) in [(true, true), (true, false), (false, true), (false, false)] {
        for (to, from) in [("f32", "f32"), ("f32", "f16"), ("f16", "f16")] {
            let case = case(8, 8, 4, "f16", "f16", from, "");
            // (lane, i) of the ISA's tables to (computation, row, column).
            let quad = |lane: usize| lane % 16 / 4;
            let shift = |lane: usize| if lane < 16 { 0 } else { 4 };
            let a_at = |lane: usize, i: usize| {
                if a_rows { (lane % 4 + shift(lane), i) } else { (i % 4 + shift(lane), lane % 4) }
            };
            let b_at = |lane: usize, i: usize| {
                if b_rows { (lane % 4, i + shift(lane)) } else { (i, lane % 4 + shift(lane)) }
            };
            let c_at = |ty: &str, lane: usize, i: usize| {
                if ty == "f16" {
                    return (lane % 4 + shift(lane), i);
                }
                ((lane & 1) + (i & 2) + shift(lane), (i & 4) + (lane & 2) + (i & 1))
            };
            let mut some = |ty: &str, rows, cols| -> Vec<Matrix> {
                (0..4)
                    .map(|_| {
                        Matrix::new(rows, cols, |_, _| {
                            let word = random.next();
                            if ty == "f16" {
                                word & 0x83ff | 0x3800
                            } else {
                                word & 0x83ff_ffff | 0x3c00_0000
                            }
                        })
                    })
                    .collect()
            };
            let (a, b, c) = (some("f16", 8, 4), some("f16", 4, 8), some(from, 8, 8));
            let pack = |ty: &str, matrices: &[Matrix], n: usize, at: &dyn Fn(usize, usize) -> At| {
                let mut rows = vec![[0u32; 32]; n * bits(ty) / 32];
                for lane in 0..32 {
                    for i in 0..n {
                        let (row, col) = at(lane, i);
                        let bit = i * bits(ty);
                        rows[bit / 32][lane] |= (matrices[quad(lane)].get(row, col) << (bit % 32)) as u32;
                    }
                }
                rows
            };
            let mut inputs = pack("f16", &a, 4, &a_at);
            inputs.extend(pack("f16", &b, 4, &b_at));
            inputs.extend(pack(from, &c, 8, &|lane, i| c_at(from, lane, i)));
            let count = |ty| if ty == "f16" { 4 } else { 8 };
            let layout = |rows| if rows { "row" } else { "col" };
            let text = format!(
                "mma.sync.aligned.m8n8k4.{}.{}.{to}.f16.f16.{from} {}, {}, {}, {};\n",
                layout(a_rows),
                layout(b_rows),
                list("out", 0, count(to)),
                list("in", 0, 2),
                list("in", 2, 2),
                list("in", 4, count(from))
            );
            let out = run_one(&text, &inputs, count(to));
            let want: Vec<Matrix> = (0..4).map(|q| product(&case, to, &a[q], &b[q], &c[q])).collect();
            assert_eq!(out, pack(to, &want, 8, &|lane, i| c_at(to, lane, i)), "{text}");
        }
    }
}

// ------------------------------------------------------------------------------------------------ what is defined

#[test]
fn an_element_of_d_is_defined_where_its_row_column_and_c_are() {
    // Lane 4 r + t of A has rows r and r + 8; lane 4 c + t of B has column c; C's lane (g, t) row g, columns 2t, 2t+1.
    let text = body(&case(16, 8, 16, "bf16", "bf16", "f32", ""));
    let inputs = vec![[0; 32]; 10];
    let all = u32::MAX;
    let with = |i: usize, mask: u32| {
        let mut written = [all; 10];
        written[i] = mask;
        undefined(&text, &inputs, &written, 4)
    };
    assert_eq!(with(0, !(1 << 13)), [0xf << 12, 0xf << 12, 0, 0]); // row 3
    assert_eq!(with(3, !(1 << 13)), [0, 0, 0xf << 12, 0xf << 12]); // row 11
    assert_eq!(with(5, !(1 << 22)), [0, 0x4444_4444, 0, 0x4444_4444]); // column 5: t = 2, second register
    assert_eq!(with(8, !(1 << 22)), [0, 0, 1 << 22, 0]);
    // f16 accumulators hold two columns in a register.
    let text = body(&case(16, 8, 16, "f16", "f16", "f16", ""));
    let mut written = [all; 8];
    written[4] = !(1 << 22);
    assert_eq!(undefined(&text, &inputs[..8], &written, 2), [0x4444_4444; 2]);
    // Quads: row 1 of the first computation is spread over lanes 1 and 3 of f32 accumulators.
    let text = format!(
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {}, {}, {}, {};\n",
        list("out", 0, 8),
        list("in", 0, 2),
        list("in", 2, 2),
        list("in", 4, 8)
    );
    let mut written = [all; 12];
    written[0] = !2;
    assert_eq!(undefined(&text, &vec![[0; 32]; 12], &written, 8), [0xa, 0xa, 0, 0, 0xa, 0xa, 0, 0]);
}

// ------------------------------------------------------------------------------------------------ refusals

#[test]
fn partial_warps_and_what_is_not_built_are_refused() {
    let mma = body(&case(16, 8, 8, "bf16", "bf16", "f32", ""));
    let found = |text: &str| faults(text, &vec![[0; 32]; 12], 8);
    // All eight outputs must be written for the good case.
    let zeros: String = (0..8).map(|i| format!("mov.u32 %out{i}, 0;\n")).collect();
    assert_eq!(found(&format!("{zeros}{mma}")), []);
    let guarded = format!("{zeros}setp.lt.u32 %p0, %lane, 31;\n@%p0 {mma}");
    assert!(!found(&guarded).is_empty(), "a product of 31 lanes");
    for (text, kind) in [
        (
            "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {%in0,%in1}, {%in2,%in3}, {%f0,%f1,%f2,%f3}, %in4, 0;",
            ErrorKind::Unsupported,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {%in0,%in1,%in2,%in3}, {%in4,%in5}, {%f0,%f1,%f2,%f3};",
            ErrorKind::Invalid,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%f0,%f1,%f2,%f3}, {%in0,%in1,%in2,%in3}, {%in4,%in5}, {%f0,%f1,%f2,%f3};",
            ErrorKind::Unsupported,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {%in0,%in1,%in2}, {%in4,%in5}, {%f0,%f1,%f2,%f3};",
            ErrorKind::Invalid,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32 {%f0,%f1,%f2,%f3}, {%in0,%in1,%in2,%in3}, {%in4,%in5}, {%f0,%f1,%f2,%f3};",
            ErrorKind::Unsupported,
        ),
        (
            "mma.sync.aligned.m8n8k4.row.col.rz.f64.f64.f64.f64 {%d0,%d1}, {%d2}, {%d3}, {%d4,%d5};",
            ErrorKind::Unsupported,
        ),
        ("ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%out0, %out1}, [%in0];", ErrorKind::Invalid),
        ("ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {%out0, %out1}, [%in0];", ErrorKind::Invalid),
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%out0}, [%in0];", ErrorKind::Invalid),
        ("ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%out0}, [%in0];", ErrorKind::Invalid),
        ("stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%in0], {%in1};", ErrorKind::Unsupported),
        ("stmatrix.sync.aligned.m16n8.x1.trans.shared.b8 [%in0], {%in1};", ErrorKind::Unsupported),
        ("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%out0}, [%in0];", ErrorKind::Invalid),
        ("wmma.load.a.sync.aligned.row.m16n16k8.global.f16 {%r0}, [%a], 16;", ErrorKind::Unsupported),
        ("wmma.load.b.sync.aligned.row.m8n8k32.global.s4 {%r0}, [%a], 32;", ErrorKind::Invalid),
        (
            "wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.u8.s32 {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7}, {%in0,%in1}, {%in2,%in3}, {%r0,%r1,%r2,%r3,%r4,%r5,%r6,%r7};",
            ErrorKind::Unsupported,
        ),
    ] {
        assert_eq!(found(text), [kind], "{text}");
    }
}
