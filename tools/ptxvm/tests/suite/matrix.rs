//! mma, wmma, ldmatrix, stmatrix, movmatrix. The layouts here are written down from the ISA's text, shape by shape, and
//! share nothing with the machine's.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

use ptxvm::error::ErrorKind;
use ptxvm::{Arg, Gpu, Launch, MmaOrder, Module, Options};

use crate::support::warp::{Random, Row, faults, run_in, run_one, undefined};

/// Value of an element of a factor.
fn decode(ty: &str, bits: u64) -> f64 {
    let float = |exponent_bits: u32, mantissa_bits: u32, inf: bool| {
        let sign = if bits >> (exponent_bits + mantissa_bits) & 1 != 0 { -1.0 } else { 1.0 };
        let top = (1 << exponent_bits) - 1;
        let exponent = (bits >> mantissa_bits & top) as i32;
        let mantissa = bits & ((1 << mantissa_bits) - 1);
        let bias = (1 << (exponent_bits - 1)) - 1;
        let scale = |e: i32| 2f64.powi(e - bias - mantissa_bits as i32);
        sign * if exponent == top as i32 && inf {
            if mantissa == 0 { f64::INFINITY } else { f64::NAN }
        } else if !inf && bits & 0x7f == 0x7f {
            f64::NAN
        } else if exponent == 0 {
            mantissa as f64 * scale(1)
        } else {
            (mantissa + (1 << mantissa_bits)) as f64 * scale(exponent)
        }
    };
    match ty {
        "f16" => float(5, 10, true),
        "bf16" => float(8, 7, true),
        "tf32" => f64::from(f32::from_bits(bits as u32 >> 13 << 13)),
        "f32" => f64::from(f32::from_bits(bits as u32)),
        "f64" => f64::from_bits(bits),
        "e4m3" => float(4, 3, false),
        "e5m2" => float(5, 2, true),
        "s8" => f64::from(bits as i8),
        "s4" => f64::from((bits as i8) << 4 >> 4),
        "s32" => f64::from(bits as i32),
        "u8" | "u4" | "b1" => bits as f64,
        _ => panic!("{ty}"),
    }
}

fn bits(ty: &str) -> usize {
    match ty {
        "f64" => 64,
        "f32" | "tf32" | "s32" => 32,
        "f16" | "bf16" => 16,
        "s4" | "u4" => 4,
        "b1" => 1,
        _ => 8,
    }
}

/// f32 to f16, by trying all of them: the nearest, of two equally near ones the even.
fn to_f16(x: f32) -> u64 {
    if x.is_nan() {
        return 0x7fff;
    }
    let sign = u64::from(x.to_bits() >> 31) << 15;
    let x = f64::from(x.abs());
    let (mut low, mut high) = (0, 0x7c00);
    let value = |h: u64| if h == 0x7c00 { 65536.0 } else { decode("f16", h) };
    while high - low > 1 {
        let middle = (low + high) / 2;
        if value(middle) <= x { low = middle } else { high = middle }
    }
    let (down, up) = (x - value(low), value(high) - x);
    sign | if x >= 65536.0 || up < down || (up == down && high % 2 == 0) { high } else { low }
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: &'static str,
    b: &'static str,
    c: &'static str,
    /// `.satfinite`, or the operation of b1.
    extra: &'static str,
}

type At = (usize, usize);

/// Row and column of a_i.
fn a_at(case: &Case, lane: usize, i: usize) -> At {
    let (g, t) = (lane >> 2, lane % 4);
    let high = |low: bool| if low { g } else { g + 8 };
    match (case.m, case.k, bits(case.a)) {
        (16, 8, 16) => (high(i < 2), t * 2 + (i & 1)),
        (16, 16, 16) => (high(i < 2 || (4..6).contains(&i)), t * 2 + (i & 1) + if i < 4 { 0 } else { 8 }),
        (16, 4, 32 | 64) => (high(i == 0), t),
        (16, 8, 32 | 64) => (high(i == 0 || i == 2), if i < 2 { t } else { t + 4 }),
        (8, 4, 64) => (g, t),
        (16, 16, 64) => {
            (high(i.is_multiple_of(2)), if i.is_multiple_of(2) { i * 2 + t } else { i * 2 - 2 + t })
        }
        (8, 16, 8) => (g, t * 4 + i),
        (16, 16, 8) => (high(i < 4), t * 4 + (i & 3)),
        (16, 32, 8) => (high(i < 4 || (8..12).contains(&i)), t * 4 + (i & 3) + if i < 8 { 0 } else { 16 }),
        (8, 32, 4) => (g, t * 8 + i),
        (16, 32, 4) => (high(i < 8), t * 8 + (i & 7)),
        (16, 64, 4) => (high(i < 8 || (16..24).contains(&i)), t * 8 + (i & 7) + if i < 16 { 0 } else { 32 }),
        (8, 128, 1) => (g, t * 32 + i),
        (16, 128, 1) => (high(i < 32), t * 32 + (i & 31)),
        (16, 256, 1) => {
            (high(i < 32 || (64..96).contains(&i)), t * 32 + (i & 31) + if i < 64 { 0 } else { 128 })
        }
        other => panic!("{other:?}"),
    }
}

/// Row and column of b_i.
fn b_at(case: &Case, lane: usize, i: usize) -> At {
    let (g, t) = (lane >> 2, lane % 4);
    let row = match (case.k, bits(case.a)) {
        (8, 16) => t * 2 + i,
        (16, 16) => t * 2 + (i & 1) + if i < 2 { 0 } else { 8 },
        (4, 32 | 64) => t,
        (8, 32 | 64) => {
            if i == 0 {
                t
            } else {
                t + 4
            }
        }
        (16, 64) => t + i * 4,
        (16, 8) => t * 4 + i,
        (32, 8) => t * 4 + (i & 3) + if i < 4 { 0 } else { 16 },
        (32, 4) => t * 8 + i,
        (64, 4) => t * 8 + (i & 7) + if i < 8 { 0 } else { 32 },
        (128, 1) => t * 32 + i,
        (256, 1) => t * 32 + (i & 31) + if i < 32 { 0 } else { 128 },
        other => panic!("{other:?}"),
    };
    (row, g)
}

/// Row and column of c_i.
fn c_at(case: &Case, lane: usize, i: usize) -> At {
    let (g, t) = (lane >> 2, lane % 4);
    (if case.m == 16 && i >= 2 { g + 8 } else { g }, t * 2 + (i & 1))
}

/// A matrix of element bits, by rows.
#[derive(Clone)]
struct Matrix {
    cols: usize,
    bits: Vec<u64>,
}

impl Matrix {
    fn new(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> u64) -> Self {
        Self { cols, bits: (0..rows * cols).map(|i| f(i / cols, i % cols)).collect() }
    }
    fn get(&self, row: usize, col: usize) -> u64 {
        self.bits[row * self.cols + col]
    }
}

/// The rows of registers of a fragment; an f64 register is two.
fn spread(matrix: &Matrix, ty: &str, at: impl Fn(usize, usize) -> At) -> Vec<Row> {
    let per_lane = matrix.bits.len() / 32;
    let mut rows = vec![[0; 32]; (per_lane * bits(ty)).div_ceil(32)];
    for lane in 0..32 {
        for i in 0..per_lane {
            let (row, col) = at(lane, i);
            let value = matrix.get(row, col);
            let bit = i * bits(ty);
            rows[bit / 32][lane] |= (value << (bit % 32)) as u32;
            if bits(ty) == 64 {
                rows[bit / 32 + 1][lane] = (value >> 32) as u32;
            }
        }
    }
    rows
}

fn collect(rows: &[Row], ty: &str, m: usize, n: usize, at: impl Fn(usize, usize) -> At) -> Matrix {
    let mut matrix = Matrix::new(m, n, |_, _| u64::MAX);
    for lane in 0..32 {
        for i in 0..m * n / 32 {
            let (row, col) = at(lane, i);
            let bit = i * bits(ty);
            let value = match bits(ty) {
                64 => u64::from(rows[bit / 32][lane]) | u64::from(rows[bit / 32 + 1][lane]) << 32,
                32 => u64::from(rows[bit / 32][lane]),
                width => u64::from(rows[bit / 32][lane]) >> (bit % 32) & ((1 << width) - 1),
            };
            matrix.bits[row * n + col] = value;
        }
    }
    matrix
}

/// D by definition.
fn product(case: &Case, to: &str, a: &Matrix, b: &Matrix, c: &Matrix) -> Matrix {
    Matrix::new(case.m, case.n, |row, col| {
        let pairs = (0..case.k).map(|k| (decode(case.a, a.get(row, k)), decode(case.b, b.get(k, col))));
        let start = decode(case.c, c.get(row, col));
        match case.c {
            "s32" => {
                let sum: i64 = pairs
                    .map(|(x, y)| match case.extra {
                        "xor" => ((x as i64) ^ (y as i64)) as f64,
                        _ => x * y,
                    })
                    .sum::<f64>() as i64
                    + start as i64;
                let clamped = sum.clamp(i32::MIN.into(), i32::MAX.into());
                (if case.extra == "satfinite" { clamped } else { sum }) as u32 as u64
            }
            "f64" => {
                let sum = pairs.fold(start, |sum, (x, y)| x.mul_add(y, sum));
                if sum.is_nan() { 0x7ff8 << 48 } else { sum.to_bits() }
            }
            _ => {
                let sum = pairs.fold(start as f32, |sum, (x, y)| (x as f32).mul_add(y as f32, sum));
                match to {
                    "f16" => to_f16(sum),
                    _ if sum.is_nan() => 0x7fff_ffff,
                    _ => u64::from(sum.to_bits()),
                }
            }
        }
    })
}

const fn case(
    m: usize,
    n: usize,
    k: usize,
    a: &'static str,
    b: &'static str,
    c: &'static str,
    extra: &'static str,
) -> Case {
    Case { m, n, k, a, b, c, extra }
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for k in [8, 16] {
        all.extend(["f32", "f16"].map(|c| case(16, 8, k, "f16", "f16", c, "")));
        all.push(case(16, 8, k, "bf16", "bf16", "f32", ""));
    }
    all.extend([4, 8].map(|k| case(16, 8, k, "tf32", "tf32", "f32", "")));
    all.push(case(8, 8, 4, "f64", "f64", "f64", ""));
    all.extend([4, 8, 16].map(|k| case(16, 8, k, "f64", "f64", "f64", "")));
    for (wide, signed, unsigned) in [(1, "s8", "u8"), (2, "s4", "u4")] {
        for (a, b) in [(signed, signed), (signed, unsigned), (unsigned, signed), (unsigned, unsigned)] {
            for extra in ["", "satfinite"] {
                for (m, k) in [(8, 16), (16, 16), (16, 32)] {
                    all.push(case(m, 8, k * wide, a, b, "s32", extra));
                }
            }
        }
    }
    for extra in ["xor", "and"] {
        all.extend([(8, 128), (16, 128), (16, 256)].map(|(m, k)| case(m, 8, k, "b1", "b1", "s32", extra)));
    }
    for (a, b) in [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3"), ("e5m2", "e5m2")] {
        for k in [16, 32] {
            all.extend(["f32", "f16"].map(|c| case(16, 8, k, a, b, c, "")));
        }
    }
    all
}

/// `{%p0,%p1,..}`
fn list(prefix: &str, from: usize, n: usize) -> String {
    let names: Vec<String> = (from..from + n).map(|i| format!("%{prefix}{i}")).collect();
    format!("{{{}}}", names.join(","))
}

/// Words of 32 bits that one lane has of each operand.
fn words(case: &Case) -> [usize; 3] {
    [(case.m * case.k, case.a), (case.k * case.n, case.b), (case.m * case.n, case.c)]
        .map(|(elements, ty)| elements * bits(ty) / 32 / 32)
}

fn body(case: &Case) -> String {
    let Case { m, n, k, a, b, c, extra } = case;
    let [na, nb, nc] = words(case);
    let (sat, op) = match *extra {
        "satfinite" => (".satfinite", String::new()),
        "" => ("", String::new()),
        op => ("", format!(".{op}.popc")),
    };
    let name = format!("mma.sync.aligned.m{m}n{n}k{k}.row.col{sat}.{c}.{a}.{b}.{c}{op}");
    if *a != "f64" {
        return format!(
            "{name} {}, {}, {}, {};\n",
            list("out", 0, nc),
            list("in", 0, na),
            list("in", na, nb),
            list("in", na + nb, nc)
        );
    }
    let all = (na + nb + nc) / 2;
    let mut text: String = (0..all).map(|i| format!("mov.b64 %d{i}, {};\n", list("in", 2 * i, 2))).collect();
    text += &format!(
        "{name} {}, {}, {}, {};\n",
        list("d", all, nc / 2),
        list("d", 0, na / 2),
        list("d", na / 2, nb / 2),
        list("d", (na + nb) / 2, nc / 2)
    );
    text + &(0..nc / 2)
        .map(|i| format!("mov.b64 {}, %d{};\n", list("out", 2 * i, 2), all + i))
        .collect::<String>()
}

fn check(case: &Case, inputs: &[[Matrix; 3]]) {
    check_in(MmaOrder::Chain, case, inputs, product);
}

/// In an order, against a definition.
fn check_in(
    order: MmaOrder,
    case: &Case,
    inputs: &[[Matrix; 3]],
    definition: impl Fn(&Case, &str, &Matrix, &Matrix, &Matrix) -> Matrix,
) {
    let warps: Vec<Vec<Row>> = inputs
        .iter()
        .map(|[a, b, c]| {
            let mut rows = spread(a, case.a, |lane, i| a_at(case, lane, i));
            rows.extend(spread(b, case.b, |lane, i| b_at(case, lane, i)));
            rows.extend(spread(c, case.c, |lane, i| c_at(case, lane, i)));
            rows
        })
        .collect();
    let text = body(case);
    for (i, ([a, b, c], out)) in inputs.iter().zip(run_in(order, &text, &warps, words(case)[2])).enumerate() {
        let got = collect(&out, case.c, case.m, case.n, |lane, i| c_at(case, lane, i));
        let want = definition(case, case.c, a, b, c);
        assert_eq!(got.bits, want.bits, "{text} input {i}, {order:?}");
    }
}

/// Bits of a small integer of the type.
fn small(ty: &str, value: u64) -> u64 {
    let value = value % if ty == "b1" { 2 } else { 4 };
    match ty {
        "f64" => (value as f64).to_bits(),
        "f32" | "tf32" => u64::from((value as f32).to_bits()),
        "bf16" => u64::from((value as f32).to_bits() >> 16),
        "f16" => to_f16(value as f32),
        "e5m2" => to_f16(value as f32) >> 8,
        "e4m3" => [0, 0x38, 0x40, 0x44][value as usize],
        _ => value,
    }
}

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

// ------------------------------------------------------------------------------------------------ ldmatrix

/// A tile of 32 rows of 8 words in shared memory, whose word w of row r is 2 r' and 2 r' + 1 for r' = 8 r + w.
const FILL: &str =
    "mov.u32 %r30, tile;\nmad.lo.u32 %r31, %lane, 48, %r30;\nst.shared.v4.b32 [%r31], %RS;\nbar.sync 0;\n";

fn fill() -> String {
    FILL.replace("%RS", "{%in0, %in1, %in2, %in3}")
}

#[test]
fn ldmatrix_stmatrix_movmatrix() {
    let mut random = Random(13);
    // Lane l stores row l: 8 elements of 16 bits. Rows lie 48 bytes apart.
    let rows: Vec<Row> = (0..4).map(|_| random.row()).collect();
    let element = |row: usize, col: usize| rows[col / 2][row] >> (16 * (col % 2)) & 0xffff;
    for n in [1, 2, 4] {
        for trans in [false, true] {
            for generic in [false, true] {
                let dot = if trans { ".trans" } else { "" };
                let (space, address, cvt) = if generic {
                    ("", "%z", "cvt.u64.u32 %z, %r31;\ncvta.shared.u64 %z, %z;\n")
                } else {
                    (".shared", "%r31", "")
                };
                let text = format!(
                    "{}{cvt}ldmatrix.sync.aligned.m8n8.x{n}{dot}{space}.b16 {}, [{address}];\n",
                    fill(),
                    list("out", 0, n)
                );
                let out = run_one(&text, &rows, n);
                for (i, out) in out.iter().enumerate() {
                    for lane in 0..32 {
                        for sub in 0..2 {
                            let (row, col) = (lane / 4, 2 * (lane % 4) + sub);
                            let (row, col) = if trans { (col, row) } else { (row, col) };
                            let got = out[lane] >> (16 * sub) & 0xffff;
                            assert_eq!(got, element(8 * i + row, col), "{text} matrix {i} lane {lane}");
                        }
                    }
                }
                // Stored the same way elsewhere and read back by rows.
                let text = format!(
                    "{}add.u32 %r31, %r31, 16;\n{cvt}stmatrix.sync.aligned.m8n8.x{n}{dot}{space}.b16 [{address}], {};\n\
                     bar.sync 0;\nsetp.lt.u32 %p0, %lane, {};\n@%p0 ld.shared.v4.b32 {}, [%r31];\n\
                     @!%p0 mov.u32 %out0, 0;\n@!%p0 mov.u32 %out1, 0;\n@!%p0 mov.u32 %out2, 0;\n@!%p0 mov.u32 %out3, 0;\n",
                    fill(),
                    list("in", 0, n),
                    8 * n,
                    list("out", 0, 4)
                );
                let out = run_one(&text, &rows, 4);
                for row in 0..32 {
                    for col in 0..8 {
                        let (i, r) = (row / 8, row % 8);
                        let (er, ec) = if trans { (col, r) } else { (r, col) };
                        let want =
                            if i < n { rows[i][4 * er + ec / 2] >> (16 * (ec % 2)) & 0xffff } else { 0 };
                        assert_eq!(
                            out[col / 2][row] >> (16 * (col % 2)) & 0xffff,
                            want,
                            "{text} row {row} col {col}"
                        );
                    }
                }
            }
        }
    }
    let out = run_one("movmatrix.sync.aligned.m8n8.trans.b16 %out0, %in0;\n", &rows[..1], 1);
    let at = |row: &Row, r: usize, c: usize| row[4 * r + c / 2] >> (16 * (c % 2)) & 0xffff;
    for (r, c) in (0..64).map(|i| (i / 8, i % 8)) {
        assert_eq!(at(&out[0], r, c), at(&rows[0], c, r));
    }
}

#[test]
fn ldmatrix_and_stmatrix_keep_what_is_defined() {
    let rows = vec![[0; 32]; 4];
    let all = u32::MAX;
    let load =
        |dot: &str| format!("{}ldmatrix.sync.aligned.m8n8.x1{dot}.shared.b16 {{%out0}}, [%r31];\n", fill());
    // Lane 2 stores row 2; its third word holds columns 4 and 5.
    let written = [all, all, !(1 << 2), all];
    assert_eq!(undefined(&load(""), &rows, &written, 1), [1 << (4 * 2 + 2)]);
    assert_eq!(undefined(&load(".trans"), &rows, &written, 1), [1 << (4 * 4 + 1) | 1 << (4 * 5 + 1)]);
    // And through stmatrix: lane 9 has row 2, columns 2 and 3.
    let store = |dot: &str| {
        format!(
            "mov.u32 %r30, tile;\nmad.lo.u32 %r31, %lane, 48, %r30;\n\
             stmatrix.sync.aligned.m8n8.x1{dot}.shared.b16 [%r31], {{%in0}};\n\
             ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%out0}}, [%r31];\n"
        )
    };
    assert_eq!(undefined(&store(""), &rows[..1], &[!(1 << 9)], 1), [1 << 9]);
    assert_eq!(
        undefined(&store(".trans"), &rows[..1], &[!(1 << 9)], 1),
        [1 << (4 * 2 + 1) | 1 << (4 * 3 + 1)]
    );
    let text = "movmatrix.sync.aligned.m8n8.trans.b16 %out0, %in0;\n";
    assert_eq!(undefined(text, &rows[..1], &[!(1 << 9)], 1), [1 << (4 * 2 + 1) | 1 << (4 * 3 + 1)]);
}

// ------------------------------------------------------------------------------------------------ wmma

/// Loads A, B and C from memory, multiplies, doubles D element by element where `twice`, and stores it.
fn wmma(case: &Case, to: &str, layouts: [bool; 4], shared: bool) {
    let Case { m, n, k, a, b, c, extra } = *case;
    let mut random = Random(17);
    let dims = [(m, k, a), (k, n, b), (m, n, c), (m, n, to)];
    // Stride of rows or columns in elements, a multiple of 32 bytes wider than needed.
    let strides: Vec<usize> = dims
        .iter()
        .zip(layouts)
        .map(|((r, c, ty), rows)| if rows { *c } else { *r } + 256 / bits(ty))
        .collect();
    let matrices: Vec<Matrix> = dims[..3]
        .iter()
        .map(|(r, c, ty)| {
            Matrix::new(*r, *c, |_, _| match *ty {
                "f16" => random.next() & 0x83ff | 0x3800,
                "bf16" => random.next() & 0x83ff | 0x3c00,
                "f32" | "tf32" => random.next() & 0x83ff_ffff | 0x3c00_0000,
                "f64" => random.next() & 0x800f_ffff_ffff_ffff | 0x3ff0 << 48,
                "s32" => [0x7fff_ffff, 0x8000_0000, 5][(random.next() % 3) as usize],
                _ => random.next() & ((1 << bits(ty)) - 1),
            })
        })
        .collect();
    let offset =
        |i: usize, r: usize, c: usize| if layouts[i] { r * strides[i] + c } else { c * strides[i] + r };
    let mut memory = Vec::new();
    for (i, matrix) in matrices.iter().enumerate() {
        let (rows, cols, ty) = dims[i];
        let mut bytes = vec![0u8; 16384];
        for (r, c) in (0..rows * cols).map(|x| (x / cols, x % cols)) {
            let bit = offset(i, r, c) * bits(ty);
            for (j, byte) in matrix.get(r, c).to_le_bytes().iter().enumerate().take(bits(ty).div_ceil(8)) {
                bytes[bit / 8 + j] |= byte << (bit % 8);
            }
        }
        memory.extend(bytes);
    }
    let regs = |elements: usize, ty: &str| {
        (elements * bits(ty) / 32 / 32).div_ceil(if bits(ty) == 64 { 2 } else { 1 })
    };
    let factor = |elements, ty| if ty == "f16" { 8 } else { regs(elements, ty) };
    let counts = [factor(m * k, a), factor(k * n, b), regs(m * n, c), regs(m * n, to)];
    let prefix = |ty: &str, name: &str| if ty == "f64" { format!("d{name}") } else { format!("r{name}") };
    let names = ["a", "b", "c", "d"];
    let vector = |i: usize| list(&prefix(dims[i].2, names[i]), 0, counts[i]);
    let layout = |i: usize| if layouts[i] { "row" } else { "col" };
    let shape = format!("m{m}n{n}k{k}");
    let space = if shared { ".shared" } else { ".global" };
    let mut text = String::from(
        ".version 8.5\n.target sm_90a\n.address_size 64\n.extern .shared .align 32 .b8 tile[];\n.visible .entry k(.param .u64 p)\n{\n.reg .b64 %g, %q, %x;\n.reg .b32 %s, %i, %v;\n.reg .pred %p;\n",
    );
    for name in names {
        text += &format!(".reg .b32 %r{name}<8>;\n.reg .f64 %d{name}<8>;\n");
    }
    text += "ld.param.u64 %g, [p];\nmov.u32 %i, %tid.x;\n";
    if shared {
        // All of it to shared memory first, word by word.
        text += "shl.b32 %i, %i, 2;\nCOPY:\ncvt.u64.u32 %x, %i;\nadd.u64 %x, %x, %g;\nld.global.b32 %v, [%x];\nmov.u32 %s, tile;\nadd.u32 %s, %s, %i;\nst.shared.b32 [%s], %v;\nadd.u32 %i, %i, 128;\nsetp.lt.u32 %p, %i, 49152;\n@%p bra COPY;\nbar.sync 0;\n";
    }
    for i in 0..3 {
        let at = if shared { format!("tile+{}", 16384 * i) } else { format!("%g+{}", 16384 * i) };
        text += &format!(
            "mov.u32 %s, {};\nwmma.load.{}.sync.aligned.{}.{shape}{space}.{} {}, [{at}], %s;\n",
            strides[i],
            names[i],
            layout(i),
            dims[i].2,
            vector(i)
        );
    }
    let op = if a == "b1" { format!(".{extra}.popc") } else { String::new() };
    let sat = if extra == "satfinite" { ".satfinite" } else { "" };
    let types = if a == "f16" { format!("{to}.{c}") } else { format!("{to}.{a}.{b}.{c}") };
    text += &format!(
        "wmma.mma{op}.sync.aligned.{}.{}.{shape}.{types}{sat} {}, {}, {}, {};\n",
        layout(0),
        layout(1),
        vector(3),
        vector(0),
        vector(1),
        vector(2)
    );
    text += &format!(
        "wmma.store.d.sync.aligned.{}.{shape}.global.{to} [%g+49152], {}, {};\nret;\n}}\n",
        layout(3),
        vector(3),
        strides[3]
    );
    if let Ok(dir) = std::env::var("PTXVM_DUMP") {
        let id = format!(
            "{shape}_{a}_{b}_{c}_{to}_{extra}_{}{}{}{}_{shared}",
            layout(0),
            layout(1),
            layout(2),
            layout(3)
        );
        std::fs::write(format!("{dir}/{id}.ptx"), &text).unwrap();
    }
    let mut gpu = Gpu::new(Options { threads: 1, ..Options::default() });
    let module = Module::load("wmma.ptx", &text).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let loaded = gpu.load(&module).unwrap();
    let p = gpu.alloc(65536).unwrap();
    gpu.write(p, &memory).unwrap();
    let launch = Launch { shared_bytes: 49152, ..Launch::linear(1, 32) };
    gpu.launch(&loaded, "k", &launch, &[Arg::Ptr(p)]).unwrap_or_else(|e| panic!("{text}\n{e}"));
    let mut out = vec![0; 16384];
    gpu.read(p.offset(49152), &mut out).unwrap();
    let want = product(case, to, &matrices[0], &matrices[1], &matrices[2]);
    let got = Matrix::new(m, n, |r, c| {
        let bytes = bits(to) / 8;
        let at = offset(3, r, c) * bytes;
        out[at..at + bytes].iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
    });
    assert_eq!(got.bits, want.bits, "{text}");
}

#[test]
fn wmma_of_all_shapes_types_and_layouts() {
    let both = [true, false];
    for (m, n) in [(16, 16), (8, 32), (32, 8)] {
        for (i, bits) in (0..16).map(|bits| (bits, [8, 4, 2, 1].map(|bit| bits & bit != 0))) {
            let shared = i % 3 == 0;
            for (c, to) in [("f32", "f32"), ("f16", "f16"), ("f16", "f32"), ("f32", "f16")] {
                wmma(&case(m, n, 16, "f16", "f16", c, ""), to, bits, shared);
            }
            wmma(&case(m, n, 16, "bf16", "bf16", "f32", ""), "f32", bits, !shared);
            for extra in ["", "satfinite"] {
                for ty in ["s8", "u8"] {
                    wmma(&case(m, n, 16, ty, ty, "s32", extra), "s32", bits, shared);
                }
            }
        }
    }
    for (x, y, z) in
        both.into_iter().flat_map(|x| both.map(|y| (x, y))).flat_map(|(x, y)| both.map(|z| (x, y, z)))
    {
        wmma(&case(16, 16, 8, "tf32", "tf32", "f32", ""), "f32", [x, y, z, x], z);
        wmma(&case(8, 8, 4, "f64", "f64", "f64", ""), "f64", [x, y, z, y], z);
        for ty in ["s4", "u4"] {
            wmma(&case(8, 8, 32, ty, ty, "s32", ""), "s32", [true, false, x, y], z);
        }
        for op in ["xor", "and"] {
            wmma(&case(8, 8, 128, "b1", "b1", "s32", op), "s32", [true, false, x, y], z);
        }
    }
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
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%out0, %out1}, [%in0];", ErrorKind::Unsupported),
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
