//! Logic, shifts and byte permutations, bit by bit.

use ptxvm::types::Type::{self, *};

use crate::support::op::{Random, cases, check, check_cases, kernel, mask};

const BITS: [Type; 3] = [B16, B32, B64];

/// The number whose bit i is `f(i)`.
fn build(n: u64, f: impl Fn(u64) -> u64) -> u64 {
    (0..n).fold(0, |d, i| d | (f(i) & 1) << i)
}

fn sign(a: u64, n: u64) -> u64 {
    a >> (n - 1) & 1
}

#[test]
fn bitwise() {
    for ty in BITS.into_iter().chain([Pred]) {
        let n = u64::from(ty.bits());
        let binary = |op: &str, f: fn(u64, u64) -> u64| {
            check(&format!("{op}{ty} %out0, %in0, %in1;"), [ty; 2], [ty], |[a, b]| {
                [build(n, |i| f(a >> i & 1, b >> i & 1))]
            });
        };
        binary("and", |a, b| a * b);
        binary("or", |a, b| a.max(b));
        binary("xor", |a, b| u64::from(a != b));
        check(&format!("not{ty} %out0, %in0;"), [ty], [ty], |[a]| [build(n, |i| 1 - (a >> i & 1))]);
    }
    for ty in BITS {
        check(&format!("cnot{ty} %out0, %in0;"), [ty], [ty], |[a]| [u64::from(a == 0)]);
    }
}

#[test]
fn predicates() {
    // A negated operand, and a number.
    for (op, f) in
        [("and", (|a, b| a & b) as fn(u64, u64) -> u64), ("or", |a, b| a | b), ("xor", |a, b| a ^ b)]
    {
        for (not_a, not_b) in [(0, 1), (1, 0), (1, 1)] {
            let mark = |not: u64| if not == 1 { "!" } else { "" };
            let body = format!("{op}.pred %out0, {}%in0, {}%in1;", mark(not_a), mark(not_b));
            check(&body, [Pred; 2], [Pred], |[a, b]| [f(a ^ not_a, b ^ not_b)]);
        }
        for number in [0, 1] {
            check(&format!("{op}.pred %out0, %in0, {number};"), [Pred], [Pred], |[a]| [f(a, number)]);
        }
    }
}

fn table(table: u64, a: u64, b: u64, c: u64) -> u64 {
    build(32, |i| table >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)))
}

#[test]
fn lop3() {
    let mut random = Random(3);
    let cases: [Vec<u64>; 3] = std::array::from_fn(|_| (0..40).map(|_| random.number(32)).collect());
    for lut in 0..256 {
        let body = format!("lop3.b32 %out0, %in0, %in1, %in2, {lut};");
        check_cases(&body, [B32; 3], [B32], &cases, |[a, b, c]| [table(lut, a, b, c)]);
    }
    // Only the table's lowest eight bits count.
    check("lop3.b32 %out0, %in0, %in1, %in2, 0x196;", [B32; 3], [B32], |[a, b, c]| [a ^ b ^ c]);
}

#[test]
fn lop3_with_predicate() {
    for lut in [0x80, 0xfe, 0x01, 0x96, 0x00] {
        for (op, f) in [("and", (|a, b| a && b) as fn(bool, bool) -> bool), ("or", |a, b| a || b)] {
            for (mark, not) in [("", false), ("!", true)] {
                let want = |a, b, c, q| {
                    let d = table(lut, a, b, c);
                    [d, u64::from(f(d != 0, (q != 0) != not))]
                };
                let body = format!("lop3.{op}.b32 %out0|%out1, %in0, %in1, %in2, {lut}, {mark}%in3;");
                check(&body, [B32, B32, B32, Pred], [B32, Pred], |[a, b, c, q]| want(a, b, c, q));
                let body = format!("lop3.{op}.b32 _|%out0, %in0, %in1, %in2, {lut}, {mark}%in3;");
                check(&body, [B32, B32, B32, Pred], [Pred], |[a, b, c, q]| [want(a, b, c, q)[1]]);
                // The result may replace a source, and the predicate the one that it is combined with, or the guard.
                let body = format!(
                    "mov.b32 %out0, %in0; mov.pred %out1, %in3;
                     lop3.{op}.b32 %out0|%out1, %out0, %in1, %in2, {lut}, {mark}%out1;"
                );
                check(&body, [B32, B32, B32, Pred], [B32, Pred], |[a, b, c, q]| want(a, b, c, q));
                let body = format!(
                    "mov.b32 %out0, 5; mov.pred %out1, %in3;
                     @%out1 lop3.{op}.b32 %out0|%out1, %in0, %in1, %in2, {lut}, {mark}%out1;"
                );
                check(&body, [B32, B32, B32, Pred], [B32, Pred], |[a, b, c, q]| {
                    if q != 0 { want(a, b, c, q) } else { [5, 0] }
                });
            }
        }
    }
}

#[test]
fn shifts() {
    for ty in BITS {
        let n = u64::from(ty.bits());
        check(&format!("shl{ty} %out0, %in0, %in1;"), [ty, U32], [ty], |[a, by]| {
            [build(n, |i| if i >= by { a >> (i - by) } else { 0 })]
        });
    }
    for ty in [B16, B32, B64, U16, U32, U64, S16, S32, S64] {
        let n = u64::from(ty.bits());
        let fill = |a: u64| if ty.is_signed() { sign(a, n) } else { 0 };
        check(&format!("shr{ty} %out0, %in0, %in1;"), [ty, U32], [ty], |[a, by]| {
            [build(n, |i| if i + by < n { a >> (i + by) } else { fill(a) })]
        });
        for by in [0, 3, 15, 16, 31, 32, 63, 64, 255] {
            check(&format!("shr{ty} %out0, %in0, {by};"), [ty], [ty], |[a]| {
                [build(n, |i| if i + by < n { a >> (i + by) } else { fill(a) })]
            });
        }
    }
}

#[test]
fn funnel_shifts() {
    for (mode, clamp) in [("clamp", true), ("wrap", false)] {
        let amount = |c: u64| if clamp { c.min(32) } else { c % 32 };
        let both = |a: u64, b: u64, i: u64| if i < 32 { a >> i & 1 } else { b >> (i - 32) & 1 };
        check(&format!("shf.l.{mode}.b32 %out0, %in0, %in1, %in2;"), [B32; 3], [B32], |[a, b, c]| {
            [build(32, |i| both(a, b, i + 32 - amount(c)))]
        });
        check(&format!("shf.r.{mode}.b32 %out0, %in0, %in1, %in2;"), [B32; 3], [B32], |[a, b, c]| {
            [build(32, |i| both(a, b, i + amount(c)))]
        });
    }
}

#[test]
fn permutations() {
    let byte = |a: u64, b: u64, selector: u64| {
        let byte =
            if selector & 7 < 4 { a >> (8 * (selector & 3)) } else { b >> (8 * (selector & 3)) } & 0xff;
        match selector & 8 {
            0 => byte,
            _ => 0xff * (byte >> 7),
        }
    };
    let permute = |a: u64, b: u64, s: [u64; 4]| (0..4).fold(0, |d, i| d | byte(a, b, s[i]) << (8 * i));
    let nibbles = |c: u64| std::array::from_fn(|i| c >> (4 * i) & 15);
    check("prmt.b32 %out0, %in0, %in1, %in2;", [B32; 3], [B32], |[a, b, c]| [permute(a, b, nibbles(c))]);
    // All selectors of a byte, in each place.
    let mut random = Random(4);
    let cases = [
        (0..4096).map(|_| random.next() & mask(32)).collect(),
        (0..4096).map(|_| random.next() & mask(32)).collect(),
        (0..4096).map(|i| i * 16 + i / 256).collect::<Vec<u64>>(),
    ];
    check_cases("prmt.b32 %out0, %in0, %in1, %in2;", [B32; 3], [B32], &cases, |[a, b, c]| {
        [permute(a, b, nibbles(c))]
    });
    for selector in [0x7531, 0x5410, 0x7632, 0x3340, 0x00ba, 0x8888] {
        let body = format!("prmt.b32 %out0, %in0, %in1, {selector};");
        check(&body, [B32; 2], [B32], |[a, b]| [permute(a, b, nibbles(selector))]);
    }
}

/// The modes by what they are for; bytes are given from the lowest.
#[test]
fn permutation_modes() {
    let bytes = |a: u64, b: u64| -> [u64; 8] { std::array::from_fn(|i| (b << 32 | a) >> (8 * i) & 0xff) };
    let mode = |name: &str, f: fn(u64, u64) -> u64| {
        let three = |[a, b, c]: [u64; 3]| {
            let all = bytes(a, b);
            [(0..4).fold(0, |d, i| d | all[f(c % 4, i) as usize] << (8 * i))]
        };
        check(&format!("prmt.b32.{name} %out0, %in0, %in1, %in2;"), [B32; 3], [B32], three);
        let mut few = cases([B32; 3]);
        few[2].iter_mut().enumerate().for_each(|(i, c)| *c = i as u64 % 4);
        check_cases(&format!("prmt.b32.{name} %out0, %in0, %in1, %in2;"), [B32; 3], [B32], &few, three);
    };
    // Four bytes from byte c on, upwards and downwards through the ring of eight.
    mode("f4e", |c, i| c + i);
    mode("b4e", |c, i| (8 + c - i) % 8);
    // One byte four times; one half twice.
    mode("rc8", |c, _| c);
    mode("rc16", |c, i| c % 2 * 2 + i % 2);
    // Clamped to c from below, from above.
    mode("ecl", |c, i| c.max(i));
    mode("ecr", |c, i| c.min(i));
}

#[test]
fn refusals() {
    for body in [
        "and.u32 %out0, %in0, %in0;",
        "or.s32 %out0, %in0, %in0;",
        "shl.u32 %out0, %in0, %in0;",
        "shf.l.b32 %out0, %in0, %in0, %in0;",
        "shf.wrap.b32 %out0, %in0, %in0, %in0;",
        "lop3.xor.b32 %out0|%p, %in0, %in0, %in0, 1, %p;",
        "lop3.b32 %out0|%p, %in0, %in0, %in0, 1, %p;",
        "lop3.and.b32 %out0, %in0, %in0, %in0, 1, %p;",
        "lop3.b32 %out0, %in0, %in0, %in0, %in0;",
        "lop3.b64 %out0, %in0, %in0, %in0, 1;",
        "prmt.b32.foo %out0, %in0, %in0, %in0;",
        "cnot.pred %p, %p;",
        "not.pred %p, %p, %p;",
    ] {
        let text = kernel(&format!(".reg .pred %p;\n{body}"), &[B32], &[B32]);
        assert!(ptxvm::Module::load("op.ptx", &text).is_err(), "`{body}` is refused");
    }
}
