//! Products of matrices by definition: the values of the types, where the fragments of `mma` have each element, written down from
//! the ISA's text shape by shape, and sums in the documented order. Nothing of it is the machine's.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

use ptxvm::MmaOrder;

use crate::support::warp::{Row, run_in};

/// Value of an element of a factor.
pub(crate) fn decode(ty: &str, bits: u64) -> f64 {
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

pub(crate) fn bits(ty: &str) -> usize {
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
pub(crate) fn to_f16(x: f32) -> u64 {
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

pub(crate) struct Case {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: &'static str,
    pub(crate) b: &'static str,
    pub(crate) c: &'static str,
    /// `.satfinite`, or the operation of b1.
    pub(crate) extra: &'static str,
}

pub(crate) type At = (usize, usize);

/// Row and column of a_i.
pub(crate) fn a_at(case: &Case, lane: usize, i: usize) -> At {
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
pub(crate) fn b_at(case: &Case, lane: usize, i: usize) -> At {
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
pub(crate) fn c_at(case: &Case, lane: usize, i: usize) -> At {
    let (g, t) = (lane >> 2, lane % 4);
    (if case.m == 16 && i >= 2 { g + 8 } else { g }, t * 2 + (i & 1))
}

/// A matrix of element bits, by rows.
#[derive(Clone)]
pub(crate) struct Matrix {
    pub(crate) cols: usize,
    pub(crate) bits: Vec<u64>,
}

impl Matrix {
    pub(crate) fn new(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> u64) -> Self {
        Self { cols, bits: (0..rows * cols).map(|i| f(i / cols, i % cols)).collect() }
    }
    pub(crate) fn get(&self, row: usize, col: usize) -> u64 {
        self.bits[row * self.cols + col]
    }
}

/// The rows of registers of a fragment; an f64 register is two.
pub(crate) fn spread(matrix: &Matrix, ty: &str, at: impl Fn(usize, usize) -> At) -> Vec<Row> {
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

pub(crate) fn collect(rows: &[Row], ty: &str, m: usize, n: usize, at: impl Fn(usize, usize) -> At) -> Matrix {
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
pub(crate) fn product(case: &Case, to: &str, a: &Matrix, b: &Matrix, c: &Matrix) -> Matrix {
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

pub(crate) const fn case(
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

pub(crate) fn cases() -> Vec<Case> {
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
pub(crate) fn list(prefix: &str, from: usize, n: usize) -> String {
    let names: Vec<String> = (from..from + n).map(|i| format!("%{prefix}{i}")).collect();
    format!("{{{}}}", names.join(","))
}

/// Words of 32 bits that one lane has of each operand.
pub(crate) fn words(case: &Case) -> [usize; 3] {
    [(case.m * case.k, case.a), (case.k * case.n, case.b), (case.m * case.n, case.c)]
        .map(|(elements, ty)| elements * bits(ty) / 32 / 32)
}

pub(crate) fn body(case: &Case) -> String {
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

pub(crate) fn check(case: &Case, inputs: &[[Matrix; 3]]) {
    check_in(MmaOrder::Chain, case, inputs, product);
}

/// In an order, against a definition.
pub(crate) fn check_in(
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
pub(crate) fn small(ty: &str, value: u64) -> u64 {
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
