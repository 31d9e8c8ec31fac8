//! `mma.sync` of floats of 4 to 8 bits, with and without scales, against sums of exact values.

use ptxvm::MmaOrder;
use ptxvm::error::ErrorKind;

use crate::support::exact::{self, Dyadic, E2M1, E2M3, E3M2, E4M3, E5M2, Exact, F16, F32, Format, Mode};
use crate::support::product::{Case, Matrix, a_at, b_at, c_at, case, collect, list, spread};
use crate::support::warp::{Random, Row, faults, run_in, run_one, undefined};

const FACTORS: [(&str, Format); 5] =
    [("e4m3", E4M3), ("e5m2", E5M2), ("e3m2", E3M2), ("e2m3", E2M3), ("e2m1", E2M1)];

/// A kind of product: its types, what stands before and behind them, and the scales of a row.
struct Product {
    kind: &'static str,
    a: (&'static str, Format),
    b: (&'static str, Format),
    /// f32 or f16.
    c: &'static str,
    /// The scales' type, empty if there are none.
    scale: &'static str,
    blocks: usize,
    k: usize,
}

impl Product {
    /// Shapes and places of elements are those of integers of as many bits.
    fn case(&self) -> Case {
        let ty = if self.k == 64 { "u4" } else { "u8" };
        case(16, 8, self.k, ty, ty, self.c, "")
    }

    /// The instruction on inputs in order, with selectors of the scales.
    fn body(&self, [byte_a, thread_a, byte_b, thread_b]: [usize; 4]) -> String {
        let n = if self.c == "f16" { 2 } else { 4 };
        let (dot, scales) = match self.scale {
            "" => ("", String::new()),
            _ => (".", format!(", %in10, {{{byte_a}, {thread_a}}}, %in11, {{{byte_b}, {thread_b}}}")),
        };
        let (a, b, c) = (self.a.0, self.b.0, self.c);
        format!(
            "mma.sync.aligned.m16n8k{}.row.col.{}.{c}.{a}.{b}.{c}{dot}{} {}, {}, {}, {}{scales};\n",
            self.k,
            self.kind,
            self.scale,
            list("out", 0, n),
            list("in", 0, 4),
            list("in", 4, 2),
            list("in", 6, n)
        )
    }

    /// The value of a container: in one of 8 bits four lie in the middle.
    fn value(&self, format: Format, bits: u64) -> Exact {
        exact::decode(format, if self.k == 32 && format == E2M1 { bits >> 2 } else { bits })
    }

    fn scale(&self, byte: u32) -> Exact {
        match (self.scale, byte) {
            ("ue4m3", _) => exact::decode(E4M3, (byte & 0x7f).into()),
            (_, 0xff) => Exact::Nan,
            _ => Exact::Finite(false, Dyadic::new(1, i64::from(byte) - 127)),
        }
    }

    /// D by definition. Scales: of a row of A they lie in the lanes 4 (row % 8) + 2 thread + row / 8, of a column of B in
    /// 4 column + thread, from the selected byte on.
    fn definition(&self, [a, b, c]: &[Matrix; 3], scales: &[Row; 2], selectors: [usize; 4]) -> Matrix {
        let [byte_a, thread_a, byte_b, thread_b] = selectors;
        let narrow = if self.c == "f16" { F16 } else { F32 };
        let scaled = |x: Exact, word: u32, byte: usize, k: usize| match self.scale {
            "" => x,
            _ => {
                let block = k * self.blocks / self.k;
                exact::product(&x, &self.scale(word >> (8 * (byte + block)) & 0xff))
            }
        };
        Matrix::new(16, 8, |row, column| {
            let start = exact::decode(narrow, c.get(row, column));
            let of_a = scales[0][row % 8 * 4 + 2 * thread_a + row / 8];
            let of_b = scales[1][4 * column + thread_b];
            let sum = (0..self.k).fold(start, |sum, k| {
                let x = scaled(self.value(self.a.1, a.get(row, k)), of_a, byte_a, k);
                let y = scaled(self.value(self.b.1, b.get(k, column)), of_b, byte_b, k);
                let sum = exact::sum(&sum, &exact::product(&x, &y), Mode::Rn);
                exact::decode(F32, exact::encode(F32, Mode::Rn, &sum))
            });
            exact::encode(narrow, Mode::Rn, &sum)
        })
    }

    /// Random elements; `tame`: finite ones, and scales near 1.
    fn inputs(&self, random: &mut Random, tame: bool) -> ([Matrix; 3], [Row; 2]) {
        let mut factor = |rows, columns, format: Format| {
            Matrix::new(rows, columns, |_, _| {
                loop {
                    let bits = random.next() & ((1 << format.bits) - 1);
                    if !tame || matches!(exact::decode(format, bits), Exact::Finite(..)) {
                        break if self.k == 32 && format == E2M1 { bits << 2 } else { bits };
                    }
                }
            })
        };
        let (a, b) = (factor(16, self.k, self.a.1), factor(self.k, 8, self.b.1));
        let c = Matrix::new(16, 8, |_, _| match (self.c, tame) {
            ("f16", true) => random.next() & 0x83ff | 0x4000,
            ("f16", false) => random.next() & 0xffff,
            (_, true) => random.next() & 0x83ff_ffff | 0x4000_0000,
            _ => random.next() & 0xffff_ffff,
        });
        let scales = [(); 2].map(|()| {
            let row = random.row();
            let near_one = if self.scale == "ue4m3" { 0x3030_3030 } else { 0x7c7c_7c7c };
            if tame { row.map(|word| near_one + (word & 0x0707_0707)) } else { row }
        });
        ([a, b, c], scales)
    }

    fn check(&self, selectors: [usize; 4], seed: u64) {
        let case = self.case();
        let mut random = Random(seed);
        let all: Vec<_> = [true, true, false].map(|tame| self.inputs(&mut random, tame)).into();
        let warps: Vec<Vec<Row>> = all
            .iter()
            .map(|([a, b, c], scales)| {
                let mut rows = spread(a, case.a, |lane, i| a_at(&case, lane, i));
                rows.extend(spread(b, case.b, |lane, i| b_at(&case, lane, i)));
                rows.extend(spread(c, case.c, |lane, i| c_at(&case, lane, i)));
                rows.extend(if self.scale.is_empty() { &[][..] } else { scales });
                rows
            })
            .collect();
        let body = self.body(selectors);
        let n = if self.c == "f16" { 2 } else { 4 };
        let got = run_in(MmaOrder::Chain, &body, &warps, n);
        for ((inputs, scales), rows) in all.iter().zip(got) {
            let got = collect(&rows, self.c, 16, 8, |lane, i| c_at(&case, lane, i));
            let want = self.definition(inputs, scales, selectors);
            for i in 0..128 {
                let (row, column) = (i / 8, i % 8);
                assert_eq!(got.bits[i], want.bits[i], "{body}D[{row}][{column}]");
            }
        }
    }
}

#[test]
fn products_without_scales() {
    for (i, a) in FACTORS.into_iter().enumerate() {
        for (j, b) in FACTORS.into_iter().enumerate() {
            for c in ["f32", "f16"] {
                let product = Product { kind: "kind::f8f6f4", a, b, c, scale: "", blocks: 1, k: 32 };
                product.check([0; 4], (5 * i + j) as u64);
            }
        }
    }
}

#[test]
fn a_scale_for_a_row() {
    for (i, a) in FACTORS.into_iter().enumerate() {
        for (j, b) in FACTORS.into_iter().enumerate() {
            let kind =
                ["kind::mxf8f6f4.block_scale", "kind::mxf8f6f4.block_scale.scale_vec::1X"][(i + j) % 2];
            let product = Product { kind, a, b, c: "f32", scale: "ue8m0", blocks: 1, k: 32 };
            let seed = 30 + 5 * i + j;
            product.check([i % 4, j % 2, (i + j) % 4, (i + 2 * j) % 4], seed as u64);
        }
    }
}

#[test]
fn scales_for_blocks_of_a_row() {
    let e2m1 = FACTORS[4];
    for (kind, scale, blocks, bytes) in [
        ("kind::mxf4.block_scale", "ue8m0", 2, &[0, 2][..]),
        ("kind::mxf4.block_scale.scale_vec::2X", "ue8m0", 2, &[0, 2]),
        ("kind::mxf4nvf4.block_scale.scale_vec::2X", "ue8m0", 2, &[0, 2]),
        ("kind::mxf4nvf4.block_scale.scale_vec::4X", "ue4m3", 4, &[0]),
        ("kind::mxf4nvf4.block_scale.scale_vec::4X", "ue8m0", 4, &[0]),
    ] {
        let product = Product { kind, a: e2m1, b: e2m1, c: "f32", scale, blocks, k: 64 };
        for (i, byte) in bytes.iter().enumerate() {
            for thread in 0..4 {
                let selectors = [*byte, thread % 2, bytes[bytes.len() - 1 - i], thread];
                product.check(selectors, (100 + 4 * i + thread) as u64);
            }
        }
    }
}

fn scaled() -> Product {
    let [a, b, ..] = FACTORS;
    Product { kind: "kind::mxf8f6f4.block_scale", a, b, c: "f32", scale: "ue8m0", blocks: 1, k: 32 }
}

/// CUTLASS gives the selectors in registers.
#[test]
fn selectors_in_registers() {
    let product = scaled();
    let mut random = Random(200);
    let inputs: Vec<Row> = (0..12).map(|_| random.row().map(|word| word & 0x3f3f_3f3f)).collect();
    let body = |set: &str, selectors: [&str; 4]| {
        let text = product.body([91, 92, 93, 94]);
        let named =
            [91, 92, 93, 94].iter().zip(selectors).fold(text, |text, (n, s)| text.replace(&n.to_string(), s));
        format!(".reg .b16 %s<4>;\n.reg .b32 %l;\n{set}{named}")
    };
    let set = "mov.b16 %s0, 3;\nmov.b16 %s1, 1;\nmov.b16 %s2, 2;\nmov.b16 %s3, 3;\n";
    let registers = body(set, ["%s0", "%s1", "%s2", "%s3"]);
    let numbers = body("", ["3", "1", "2", "3"]);
    assert_eq!(run_one(&registers, &inputs, 4), run_one(&numbers, &inputs, 4));
    for (set, kind) in [
        (set.replace("%s0, 3", "%s0, 4"), ErrorKind::OutOfBounds),
        (set.replace("%s1, 1", "%s1, 2"), ErrorKind::OutOfBounds),
        (
            set.to_owned() + "mov.u32 %l, %laneid;\nand.b32 %l, %l, 1;\ncvt.u16.u32 %s3, %l;\n",
            ErrorKind::OutOfBounds,
        ),
        (set.replace("mov.b16 %s2, 2;\n", ""), ErrorKind::Uninitialized),
    ] {
        let found = faults(&body(&set, ["%s0", "%s1", "%s2", "%s3"]), &inputs, 4);
        assert_eq!(found.first(), Some(&kind), "{set}{found:?}");
    }
}

/// Of a row's or a column's scale that nobody wrote, or of factors and C as elsewhere.
#[test]
fn what_is_defined() {
    let body = scaled().body([0, 1, 0, 3]);
    let inputs = vec![[0; 32]; 12];
    let all = vec![u32::MAX; 12];
    assert_eq!(undefined(&body, &inputs, &all, 4), [0; 4]);
    let without = |input: usize, lane: u32| {
        let mut written = all.clone();
        written[input] &= !(1 << lane);
        undefined(&body, &inputs, &written, 4)
    };
    // Lane 4 g + 2 has A's scale of row g, and 4 g + 3 that of row g + 8; others' are not read.
    assert_eq!(without(10, 4 * 5 + 2), [0xf << 20, 0xf << 20, 0, 0]);
    assert_eq!(without(10, 4 * 5 + 3), [0, 0, 0xf << 20, 0xf << 20]);
    assert_eq!(without(10, 4 * 5 + 1), [0; 4]);
    // Column 5 lies in the second registers of the lanes 4 g + 2.
    assert_eq!(without(11, 4 * 5 + 3), [0, 0x4444_4444, 0, 0x4444_4444]);
    assert_eq!(without(11, 4 * 5), [0; 4]);
    assert_eq!(without(0, 4 * 5), [0xf << 20, 0xf << 20, 0, 0]);
    assert_eq!(without(7, 9), [0, 1 << 9, 0, 0]);
}

#[test]
fn wrong_kinds_are_refused() {
    let inputs = vec![[0; 32]; 12];
    let right = scaled().body([0, 0, 0, 0]);
    assert_eq!(faults(&right, &inputs, 4), []);
    for (from, to, kind) in [
        (".block_scale", "", ErrorKind::Invalid),
        (".ue8m0", "", ErrorKind::Invalid),
        ("kind::mxf8f6f4", "kind::f8f6f4", ErrorKind::Invalid),
        (".block_scale", ".block_scale.scale_vec::2X", ErrorKind::Invalid),
        ("{0, 0}, %in11", "{4, 0}, %in11", ErrorKind::Invalid),
        ("{0, 0}, %in11", "{0, 2}, %in11", ErrorKind::Invalid),
        ("{0, 0}, %in11", "{0}, %in11", ErrorKind::Invalid),
        ("row.col", "row.row", ErrorKind::Invalid),
        (", %in11, {0, 0}", "", ErrorKind::Invalid),
        (", %in10, {0, 0}, %in11, {0, 0}", "", ErrorKind::Invalid),
        ("{0, 0}, %in11", "{4294967296, 0}, %in11", ErrorKind::Invalid),
        ("ue8m0", "ue4m3", ErrorKind::Unsupported),
        ("m16n8k32", "m16n8k64", ErrorKind::Unsupported),
        ("kind::mxf8f6f4", "kind::mxf4", ErrorKind::Unsupported),
        ("kind::mxf8f6f4", "kind::i8", ErrorKind::Unsupported),
    ] {
        let body = right.replacen(from, to, 1);
        assert_eq!(faults(&body, &inputs, 4), [kind], "{body}");
    }
}
