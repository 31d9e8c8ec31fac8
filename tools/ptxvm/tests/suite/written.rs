//! Which bytes of a word count as written as it travels through registers.
//!
//! The definition that the machine is held to knows no rules: an operation is computed with the bytes that nobody wrote filled in
//! many ways, and a byte of the result counts as written if it is always the same.

use std::collections::BTreeSet;

use ptxvm::error::ErrorKind;
use ptxvm::{Checks, Error, Options};

use crate::support::ptx::Kernel;

/// An operation on the words `x` (and `y`), with the name of the registers of its sources and of its result.
struct Moves {
    text: String,
    from: &'static str,
    to: &'static str,
    /// Bytes of a source, and of the result.
    bytes: (usize, usize),
    f: Box<dyn Fn(u64, u64) -> u64>,
}

fn moves(
    text: impl Into<String>,
    from: &'static str,
    to: &'static str,
    bytes: (usize, usize),
    f: impl Fn(u64, u64) -> u64 + 'static,
) -> Moves {
    Moves { text: text.into(), from, to, bytes, f: Box::new(f) }
}

fn operations() -> Vec<Moves> {
    let mut all = vec![
        moves("mov.b64 {_, D}, X;", "rd", "r", (8, 4), |x, _| x >> 32),
        moves("mov.b64 {D, _}, X;", "rd", "r", (8, 4), |x, _| x & 0xffff_ffff),
        moves("mov.b64 {%h4, %h5, D, %h6}, X;", "rd", "h", (8, 2), |x, _| x >> 32 & 0xffff),
        moves("mov.b32 {_, D}, X;", "r", "h", (4, 2), |x, _| x >> 16 & 0xffff),
        moves("mov.b64 D, {X, Y};", "r", "rd", (4, 8), |x, y| y << 32 | x),
        moves("mov.b32 D, {Y, X};", "h", "r", (2, 4), |x, y| x << 16 | y),
        moves("mov.b64 D, X;", "rd", "rd", (8, 8), |x, _| x),
        moves("xor.b64 D, X, Y;", "rd", "rd", (8, 8), |x, y| x ^ y),
        moves("lop3.b32 D, X, Y, 7, 0x96;", "r", "r", (4, 4), |x, y| x ^ y ^ 7),
        moves("selp.b64 D, X, Y, %p1;", "rd", "rd", (8, 8), |x, _| x),
        moves("selp.b32 D, X, Y, %p2;", "r", "r", (4, 4), |_, y| y),
        moves("shfl.sync.idx.b32 D, X, 0, 31, -1;", "r", "r", (4, 4), |x, _| x),
        moves("cvt.u32.u64 D, X;", "rd", "r", (8, 4), |x, _| x & 0xffff_ffff),
        moves("cvt.u64.u32 D, X;", "r", "rd", (4, 8), |x, _| x),
        moves("cvt.s64.s32 D, X;", "r", "rd", (4, 8), |x, _| i64::from(x as u32 as i32) as u64),
        moves("cvt.u16.u32 D, X;", "r", "h", (4, 2), |x, _| x & 0xffff),
        moves("cvt.s32.s8 D, X;", "r", "r", (4, 4), |x, _| u64::from(x as i8 as i32 as u32)),
        moves("cvt.u32.u8 D, X;", "r", "r", (4, 4), |x, _| x & 0xff),
        moves("cvt.s8.s32 D, X;", "r", "r", (4, 4), |x, _| u64::from(x as i8 as i32 as u32)),
    ];
    for n in [0u32, 3, 8, 12, 16, 24, 31, 32, 40, 63, 64, 200] {
        let (wide, clamped) = (n.min(64), n.min(32));
        let left = move |x: u64, n: u32, bits: u32| if n >= bits { 0 } else { x << n };
        all.extend([
            moves(format!("shl.b64 D, X, {n};"), "rd", "rd", (8, 8), move |x, _| left(x, wide, 64)),
            moves(format!("shl.b32 D, X, {n};"), "r", "r", (4, 4), move |x, _| {
                left(x, clamped, 32) & 0xffff_ffff
            }),
            moves(
                format!("shr.u64 D, X, {n};"),
                "rd",
                "rd",
                (8, 8),
                move |x, _| {
                    if n >= 64 { 0 } else { x >> n }
                },
            ),
            moves(format!("shr.s64 D, X, {n};"), "rd", "rd", (8, 8), move |x, _| {
                (x as i64 >> n.min(63)) as u64
            }),
            moves(format!("shr.s32 D, X, {n};"), "r", "r", (4, 4), move |x, _| {
                u64::from((x as i32 >> n.min(31)) as u32)
            }),
            moves(
                format!("shr.u16 D, X, {n};"),
                "h",
                "h",
                (2, 2),
                move |x, _| if n > 15 { 0 } else { x >> n },
            ),
            moves(format!("shf.r.clamp.b32 D, X, Y, {n};"), "r", "r", (4, 4), move |x, y| {
                (y << 32 | x) >> clamped & 0xffff_ffff
            }),
            moves(format!("shf.l.wrap.b32 D, X, Y, {n};"), "r", "r", (4, 4), move |x, y| {
                (y << 32 | x) << (n & 31) >> 32
            }),
        ]);
        for len in [0u32, 4, 8, 16, 20, 255] {
            let field = move |x: i128, bits: u32| {
                let (at, end) = (n.min(bits), (n + len).min(bits));
                (x >> at, end - at)
            };
            all.extend([
                moves(format!("bfe.u32 D, X, {n}, {len};"), "r", "r", (4, 4), move |x, _| {
                    let (x, len) = field(x.into(), 32);
                    x as u64 & ((1 << len) - 1)
                }),
                moves(format!("bfe.s64 D, X, {n}, {len};"), "rd", "rd", (8, 8), move |x, _| {
                    match field(i128::from(x as i64), 64) {
                        _ if len == 0 => 0,
                        (_, 0) => ((x as i64) >> 63) as u64,
                        (x, len) => ((x as i64) << (64 - len) >> (64 - len)) as u64,
                    }
                }),
            ]);
        }
    }
    for selector in [0x3210u32, 0x7654, 0x5140, 0xffff, 0x4440, 0x8a32] {
        all.push(moves(format!("prmt.b32 D, X, Y, {selector};"), "r", "r", (4, 4), move |x, y| {
            let bytes = (y << 32 | x).to_le_bytes();
            let byte = |i: u32| match selector >> (4 * i) & 15 {
                n if n < 8 => bytes[n as usize],
                n => (bytes[n as usize & 7] as i8 >> 7) as u8,
            };
            u64::from(u32::from_le_bytes(std::array::from_fn(|i| byte(i as u32))))
        }));
    }
    all
}

/// The bytes of the result that depend on no byte of the sources that is missing in the masks.
fn written(op: &Moves, words: [u64; 2], masks: [u32; 2]) -> BTreeSet<usize> {
    let mut state = 1u64;
    let mut filled = |word: u64, mask: u32| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        let noise = (state ^ state >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let word = word.to_le_bytes();
        let bytes = std::array::from_fn(|i| match i {
            i if i >= op.bytes.0 => 0,
            i if mask >> i & 1 != 0 => word[i],
            i => noise[i],
        });
        u64::from_le_bytes(bytes)
    };
    let results: Vec<[u8; 8]> = (0..64)
        .map(|_| (op.f)(filled(words[0], masks[0]), filled(words[1], masks[1])).to_le_bytes())
        .collect();
    (0..op.bytes.1).filter(|i| results.iter().all(|r| r[*i] == results[0][*i])).collect()
}

#[test]
fn bytes_are_followed_through_registers() {
    let words = [0x8192_a3b4_c5d6_e7f8u64, 0x1726_3544_5362_7180];
    for op in operations() {
        let (from, to) = op.bytes;
        for masks in
            [[0b1111_0000u32, 0b0000_1111], [0b0000_0111, 0b1111_1110], [0b0101_1010, 0b1100_0011], [1, 2]]
        {
            // A source of which nothing is written is another matter.
            let all = (1 << from) - 1;
            let masks = masks.map(|mask| mask & all | u32::from(mask & all == 0));
            let mut body = String::new();
            for (at, (word, mask)) in [0, 16].iter().zip(words.iter().zip(masks)) {
                for i in (0..from).filter(|i| mask >> i & 1 != 0) {
                    body += &format!("st.shared.u8 [s+{}], {};\n", at + i, word.to_le_bytes()[i]);
                }
            }
            body += &format!(
                "ld.shared.b{0} %{1}8, [s];\nld.shared.b{0} %{1}9, [s+16];\nsetp.eq.u32 %p1, 0, 0;\n\
                 setp.eq.u32 %p2, 0, 1;\n",
                8 * from,
                op.from
            );
            let (x, y, d) = (format!("%{}8", op.from), format!("%{}9", op.from), format!("%{}10", op.to));
            body += &op.text.replace('X', &x).replace('Y', &y).replace('D', &d);
            body += &format!("\nst.shared.b{} [s+32], {d};\n", 8 * to);
            // Each byte by itself, so that each has a place of its own.
            for i in 0..to {
                body += &format!("ld.shared.u8 %r20, [s+{}];\nst.global.u8 [%rd1+{i}], %r20;\n", 32 + i);
            }
            // All lanes do the same, in the same places.
            let checks = Checks { race: false, ..Checks::ALL };
            let mut k = Kernel::with(&body, Options { checks, ..Options::default() });
            let out = k.upload("out", &[0; 8]);
            let unwritten: BTreeSet<String> = match k.run(1, 32, &[out.0]) {
                Ok(_) => BTreeSet::new(),
                Err(Error::Fault(found)) => {
                    assert!(found.iter().all(|f| f.kind == ErrorKind::Uninitialized), "{body}\n{found:#?}");
                    found.iter().map(|f| f.at.text.clone()).collect()
                }
                Err(e) => panic!("{body}\n{e}"),
            };
            let want = written(&op, words, masks);
            let want: BTreeSet<String> = (0..to)
                .filter(|i| !want.contains(i))
                .map(|i| format!("st.global.u8 [%rd1+{i}], %r20;"))
                .collect();
            let strip = |set: &BTreeSet<String>| -> BTreeSet<String> {
                set.iter().map(|t| t.replace("+0]", "]")).collect()
            };
            assert_eq!(strip(&unwritten), strip(&want), "{} with {masks:?}", op.text);
        }
    }
}
