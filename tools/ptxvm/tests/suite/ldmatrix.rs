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
