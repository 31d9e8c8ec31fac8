//! `ldmatrix`, `stmatrix`, `movmatrix`: which element each lane has, by the ISA's text.

// A loop over lanes reads better as one, and vectorises, with an index into several rows.
#![allow(clippy::needless_range_loop, reason = "lanes are numbers in several arrays")]

use crate::support::product::list;
use crate::support::warp::{Random, Row, run_one, undefined};

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

/// Bytes that lie in memory as 8, 6 or 4 bits: 8 rows of 16, or 16 x 16 transposed.
#[test]
fn ldmatrix_of_bytes() {
    let mut random = Random(14);
    let rows: Vec<Row> = (0..4).map(|_| random.row()).collect();
    for (shape, ty, bits) in [
        ("m16n16", "b8", 8),
        ("m16n16", "b8x16.b6x16_p32", 6),
        ("m16n16", "b8x16.b4x16_p64", 4),
        ("m8n16", "b8x16.b6x16_p32", 6),
        ("m8n16", "b8x16.b4x16_p64", 4),
    ] {
        // An element of a row of 128 bits, bit by bit.
        let element = |row: usize, column: usize| {
            let bit = |b: usize| rows[b / 32][row] >> (b % 32) & 1;
            (0..bits).map(|i| bit(column * bits + i) << i).sum::<u32>()
        };
        let square = shape == "m16n16";
        for n in if square { &[1, 2][..] } else { &[1, 2, 4] } {
            let dot = if square { ".trans" } else { "" };
            let regs = if square { 2 * n } else { *n };
            let text = format!(
                "{}ldmatrix.sync.aligned.{shape}.x{n}{dot}.shared.{ty} {}, [%r31];\n",
                fill(),
                list("out", 0, regs)
            );
            for (i, out) in run_one(&text, &rows, regs).iter().enumerate() {
                for (lane, sub) in (0..128).map(|i| (i / 4, i % 4)) {
                    let want = match square {
                        true => element(16 * (i / 2) + 4 * (lane % 4) + sub, lane / 4 + 8 * (i % 2)),
                        false => element(8 * i + lane / 4, 4 * (lane % 4) + sub),
                    };
                    assert_eq!(out[lane] >> (8 * sub) & 0xff, want, "{text} register {i} lane {lane}");
                }
            }
        }
    }
    let all = u32::MAX;
    let load =
        |of: &str, n: usize| format!("{}ldmatrix.sync.aligned.{of} {}, [%r31];\n", fill(), list("out", 0, n));
    // Word 1 of row 2 holds columns 4 to 7; of 6 bits bits 32 to 63, in columns 5 to 10; of 4 bits columns 8 to 15.
    let written = [all, !(1 << 2), all, all];
    let found = |of: &str, n| undefined(&load(of, n), &rows, &written, n);
    assert_eq!(found("m16n16.x1.trans.shared.b8", 2), [0x1111_0000, 0]);
    assert_eq!(found("m8n16.x1.shared.b8x16.b6x16_p32", 1), [0b0110 << 8]);
    assert_eq!(found("m8n16.x1.shared.b8x16.b4x16_p64", 1), [0b1100 << 8]);
    // What is padding need not be written.
    let written = [all, all, all, 0];
    assert_eq!(undefined(&load("m8n16.x1.shared.b8x16.b6x16_p32", 1), &rows, &written, 1), [0]);
    let written = [all, all, 0, 0];
    assert_eq!(undefined(&load("m8n16.x1.shared.b8x16.b4x16_p64", 1), &rows, &written, 1), [0]);
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
