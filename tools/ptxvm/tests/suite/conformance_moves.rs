//! Comparisons, selections and moves.

use std::cmp::Ordering;

use ptxvm::types::Type::{self, *};
use ptxvm::types::TypeKind;

use crate::support::op::{Random, check, check_cases, edges, kernel, mask, run};

const INTEGERS: [Type; 9] = [B16, U16, S16, B32, U32, S32, B64, U64, S64];
const FLOATS: [Type; 4] = [F16, BF16, F32, F64];
type BoolOp = fn(bool, bool) -> bool;
const BOOL_OPS: [(&str, BoolOp); 3] = [("and", |a, b| a && b), ("or", |a, b| a || b), ("xor", |a, b| a != b)];

/// Bits of exponent and mantissa.
fn format(ty: Type) -> (u32, u32) {
    match ty {
        F16 => (5, 10),
        BF16 => (8, 7),
        F32 => (8, 23),
        _ => (11, 52),
    }
}

/// How two values are ordered: `None` where one is a NaN.
fn order(a: u64, b: u64, ty: Type, ftz: bool) -> Option<Ordering> {
    let n = ty.bits();
    let signed = |x: u64| x as i64 as i128 - if x >> (n - 1) & 1 != 0 && n < 64 { 1 << n } else { 0 };
    match ty.kind() {
        TypeKind::Signed => Some(signed(a).cmp(&signed(b))),
        TypeKind::Float => {
            // Sign, exponent and mantissa as the format has them.
            let (exponent, mantissa) = format(ty);
            let parts = |x: u64| {
                let e = x >> mantissa & mask(exponent);
                let m = x & mask(mantissa);
                (e == mask(exponent) && m != 0, x >> (n - 1) & 1 != 0, e, if ftz && e == 0 { 0 } else { m })
            };
            let ((a_nan, a_minus, ae, am), (b_nan, b_minus, be, bm)) = (parts(a), parts(b));
            if a_nan || b_nan {
                return None;
            }
            let zero = |e: u64, m: u64| e == 0 && m == 0;
            let of_size = (ae, am).cmp(&(be, bm));
            Some(match (a_minus, b_minus) {
                _ if zero(ae, am) && zero(be, bm) => Ordering::Equal,
                (false, false) => of_size,
                (true, true) => of_size.reverse(),
                (true, false) => Ordering::Less,
                (false, true) => Ordering::Greater,
            })
        }
        _ => Some(a.cmp(&b)),
    }
}

/// What an operator says about an order.
fn holds(op: &str, order: Option<Ordering>) -> bool {
    let Some(order) = order else {
        return op.len() == 3 && op.ends_with('u') || op == "nan";
    };
    match op {
        "eq" | "equ" => order.is_eq(),
        "ne" | "neu" => order.is_ne(),
        "lt" | "ltu" | "lo" => order.is_lt(),
        "le" | "leu" | "ls" => order.is_le(),
        "gt" | "gtu" | "hi" => order.is_gt(),
        "ge" | "geu" | "hs" => order.is_ge(),
        "num" => true,
        _ => false,
    }
}

fn operators(ty: Type) -> &'static [&'static str] {
    match ty.kind() {
        TypeKind::Bits => &["eq", "ne"],
        TypeKind::Signed => &["eq", "ne", "lt", "le", "gt", "ge"],
        TypeKind::Unsigned => &["eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs"],
        _ => &["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"],
    }
}

/// Values of a type where comparisons go wrong, and random ones.
fn samples(ty: Type) -> Vec<u64> {
    let mut values = edges(ty.bits());
    values.truncate(12);
    if ty.kind() == TypeKind::Float {
        let (exponent, mantissa) = format(ty);
        let top = 1 << (ty.bits() - 1);
        let infinity = mask(exponent) << mantissa;
        let one = mask(exponent - 1) << mantissa;
        let (least_normal, largest) = (1 << mantissa, infinity - 1);
        for x in [0, 1, one, one + 1, infinity, infinity + 1, infinity | 1 << (mantissa - 1)] {
            values.extend([x, x | top]);
        }
        for x in [least_normal, least_normal - 1, least_normal >> 1, largest, mask(ty.bits() - 1)] {
            values.extend([x, x | top]);
        }
    }
    let mut random = Random(u64::from(ty.bits()));
    values.extend((0..8).map(|_| random.number(ty.bits())));
    values
}

/// All pairs of samples, and random values that are equal or close.
fn pairs(ty: Type) -> [Vec<u64>; 2] {
    let samples = samples(ty);
    let mut pairs = [Vec::new(), Vec::new()];
    for a in &samples {
        for b in &samples {
            pairs[0].push(*a);
            pairs[1].push(*b);
        }
    }
    let mut random = Random(1);
    for i in 0..300 {
        let a = random.next() & mask(ty.bits());
        pairs[0].push(a);
        pairs[1].push(
            if i % 2 == 0 { a.wrapping_add(random.next() % 3) } else { random.next() } & mask(ty.bits()),
        );
    }
    pairs
}

/// The third and fourth operands of a comparison: random predicates.
fn with_predicates(pairs: &[Vec<u64>; 2]) -> [Vec<u64>; 3] {
    let mut random = Random(2);
    let c = pairs[0].iter().map(|_| random.next() & 1).collect();
    [pairs[0].clone(), pairs[1].clone(), c]
}

fn flushes(ty: Type) -> &'static [bool] {
    match ty {
        F32 | F16 => &[false, true],
        _ => &[false],
    }
}

#[test]
fn setp() {
    for ty in INTEGERS.into_iter().chain(FLOATS) {
        let pairs = pairs(ty);
        let triples = with_predicates(&pairs);
        for op in operators(ty) {
            for ftz in flushes(ty) {
                let mark = if *ftz { ".ftz" } else { "" };
                let truth = |a, b| holds(op, order(a, b, ty, *ftz));
                // Both results of 16-bit floats cannot be had.
                let second = !matches!(ty, F16 | BF16);
                let body = format!("setp.{op}{mark}{ty} %out0, %in0, %in1;");
                check_cases(&body, [ty; 2], [Pred], &pairs, |[a, b]| [truth(a, b).into()]);
                if second {
                    let body = format!("setp.{op}{mark}{ty} %out0|%out1, %in0, %in1;");
                    let want = |[a, b]: [u64; 2]| [truth(a, b).into(), (!truth(a, b)).into()];
                    check_cases(&body, [ty; 2], [Pred; 2], &pairs, want);
                }
                for (bool_op, f) in BOOL_OPS {
                    for (not, negate) in [("", false), ("!", true)] {
                        let c = |c: u64| (c != 0) != negate;
                        let types = [ty, ty, Pred];
                        let body = format!("setp.{op}.{bool_op}{mark}{ty} %out0, %in0, %in1, {not}%in2;");
                        let want = |[a, b, p]: [u64; 3]| [f(truth(a, b), c(p)).into()];
                        check_cases(&body, types, [Pred], &triples, want);
                        if second {
                            let body =
                                format!("setp.{op}.{bool_op}{mark}{ty} %out0|%out1, %in0, %in1, {not}%in2;");
                            let want = |[a, b, p]: [u64; 3]| {
                                [f(truth(a, b), c(p)).into(), f(!truth(a, b), c(p)).into()]
                            };
                            check_cases(&body, types, [Pred; 2], &triples, want);
                        }
                    }
                }
            }
        }
    }
}

/// Pairs of packed values: two independent pairs of halves.
fn packed_pairs(half: Type) -> [Vec<u64>; 2] {
    let [a, b] = pairs(half);
    let n = a.len();
    let pack = |x: &[u64]| (0..n).map(|i| x[(i * 7 + 3) % n] << 16 | x[i]).collect();
    [pack(&a), pack(&b)]
}

#[test]
fn setp_packed() {
    for (name, half) in [("f16x2", F16), ("bf16x2", BF16)] {
        let pairs = packed_pairs(half);
        let triples = with_predicates(&pairs);
        for op in operators(half) {
            for ftz in flushes(half) {
                let mark = if *ftz { ".ftz" } else { "" };
                let low = |a: u64, b: u64| holds(op, order(a & 0xffff, b & 0xffff, half, *ftz));
                let high = |a: u64, b: u64| holds(op, order(a >> 16, b >> 16, half, *ftz));
                let body = format!("setp.{op}{mark}.{name} %out0|%out1, %in0, %in1;");
                let want = |[a, b]: [u64; 2]| [low(a, b).into(), high(a, b).into()];
                check_cases(&body, [B32; 2], [Pred; 2], &pairs, want);
                for (bool_op, f) in BOOL_OPS {
                    // The result may be the predicate that it is combined with.
                    let body = format!(
                        "mov.pred %out0, %in2; setp.{op}.{bool_op}{mark}.{name} %out0|%out1, %in0, %in1, !%out0;"
                    );
                    let want =
                        |[a, b, c]: [u64; 3]| [f(low(a, b), c == 0).into(), f(high(a, b), c == 0).into()];
                    check_cases(&body, [B32, B32, Pred], [Pred; 2], &triples, want);
                }
            }
        }
    }
}

#[test]
fn setp_immediates_and_guards() {
    check_cases("setp.lt.s32 %out0, %in0, -5;", [S32], [Pred], &[edges(32)], |[a]| {
        [u64::from((a as i32) < -5)]
    });
    check_cases("setp.hs.u16 %out0, %in0, 0xfffe;", [U16], [Pred], &[edges(16)], |[a]| {
        [u64::from(a >= 0xfffe)]
    });
    let floats = [samples(F32)];
    check_cases("setp.gtu.f32 %out0, %in0, 0f3F800000;", [F32], [Pred], &floats, |[a]| {
        [holds("gtu", order(a, 0x3f80_0000, F32, false)).into()]
    });
    check_cases("setp.gt.f32 _|%out0, %in0, 1.0;", [F32], [Pred], &floats, |[a]| {
        [(!holds("gt", order(a, 0x3f80_0000, F32, false))).into()]
    });
    let body = "mov.pred %out0, %in1; mov.pred %out1, 1; @%out0 setp.eq.u32 %out0|%out1, %in0, 31;";
    check(body, [U32, Pred], [Pred; 2], |[a, p]| {
        let equal = u64::from(a == 31);
        if p != 0 { [equal, 1 - equal] } else { [0, 1] }
    });
}

/// What `set` writes for true.
fn truth(dst: Type) -> u64 {
    match dst {
        F32 => u64::from(1f32.to_bits()),
        F16 => 15 << 10,
        BF16 => 127 << 7,
        _ => mask(dst.bits()),
    }
}

#[test]
fn set() {
    for ty in INTEGERS.into_iter().chain(FLOATS) {
        let results: &[Type] = match ty {
            F16 => &[U16, S16, U32, S32, F16, BF16],
            BF16 => &[U16, S16, U32, S32, BF16],
            F64 => &[U32, S32, F32],
            _ => &[U32, S32, F32, F16, BF16],
        };
        let pairs = pairs(ty);
        let triples = with_predicates(&pairs);
        for op in operators(ty) {
            for dst in results {
                for ftz in flushes(ty) {
                    if *ftz && *dst == BF16 {
                        continue; // refused
                    }
                    let mark = if *ftz { ".ftz" } else { "" };
                    let holds = |a, b| holds(op, order(a, b, ty, *ftz));
                    let body = format!("set.{op}{mark}{dst}{ty} %out0, %in0, %in1;");
                    let result = |holds: bool| [if holds { truth(*dst) } else { 0 }];
                    check_cases(&body, [ty; 2], [*dst], &pairs, |[a, b]| result(holds(a, b)));
                    let (bool_op, f) = BOOL_OPS[op.len() % 3];
                    let body = format!("set.{op}.{bool_op}{mark}{dst}{ty} %out0, %in0, %in1, !%in2;");
                    check_cases(&body, [ty, ty, Pred], [*dst], &triples, |[a, b, c]| {
                        result(f(holds(a, b), c == 0))
                    });
                }
            }
        }
    }
}

#[test]
fn set_packed() {
    for (name, half) in [("f16x2", F16), ("bf16x2", BF16)] {
        let pairs = packed_pairs(half);
        let triples = with_predicates(&pairs);
        for op in operators(half) {
            for (dst, one) in [(name, truth(half)), ("u32", 0xffff), ("s32", 0xffff)] {
                let results =
                    |low: bool, high: bool| [(u64::from(high) * one) << 16 | (u64::from(low) * one)];
                let low = |a: u64, b: u64| holds(op, order(a & 0xffff, b & 0xffff, half, false));
                let high = |a: u64, b: u64| holds(op, order(a >> 16, b >> 16, half, false));
                let body = format!("set.{op}.{dst}.{name} %out0, %in0, %in1;");
                check_cases(&body, [B32; 2], [B32], &pairs, |[a, b]| results(low(a, b), high(a, b)));
                for (bool_op, f) in BOOL_OPS {
                    let body = format!("set.{op}.{bool_op}.{dst}.{name} %out0, %in0, %in1, %in2;");
                    check_cases(&body, [B32, B32, Pred], [B32], &triples, |[a, b, c]| {
                        results(f(low(a, b), c != 0), f(high(a, b), c != 0))
                    });
                }
            }
        }
    }
}

#[test]
fn selections() {
    for ty in INTEGERS.into_iter().chain([F32, F64]) {
        check(&format!("selp{ty} %out0, %in0, %in1, %in2;"), [ty, ty, Pred], [ty], |[a, b, p]| {
            [if p != 0 { a } else { b }]
        });
        check(&format!("selp{ty} %out0, %in0, %in1, !%in2;"), [ty, ty, Pred], [ty], |[a, b, p]| {
            [if p != 0 { b } else { a }]
        });
        check(&format!("slct{ty}.s32 %out0, %in0, %in1, %in2;"), [ty, ty, S32], [ty], |[a, b, c]| {
            [if c < 1 << 31 { a } else { b }]
        });
        for ftz in [false, true] {
            let mark = if ftz { ".ftz" } else { "" };
            let c = samples(F32);
            let mut random = Random(5);
            let mut value = || c.iter().map(|_| random.number(ty.bits())).collect::<Vec<u64>>();
            let cases = [value(), value(), c.clone()];
            let body = format!("slct{mark}{ty}.f32 %out0, %in0, %in1, %in2;");
            check_cases(&body, [ty, ty, F32], [ty], &cases, |[a, b, c]| {
                [if holds("ge", order(c, 0, F32, ftz)) { a } else { b }]
            });
        }
    }
}

/// Only the chosen value must have been written.
#[test]
fn selection_of_unwritten_values() {
    let body = ".reg .b32 %never; setp.eq.u32 %out1, 1, 1; selp.b32 %out0, %in0, %never, %out1;";
    check(body, [B32], [B32, Pred], |[a]| [a, 1]);
}

#[test]
fn moves() {
    for ty in INTEGERS.into_iter().chain([F32, F64]) {
        check(&format!("mov{ty} %out0, %in0;"), [ty], [ty], |[a]| [a]);
    }
    check("mov.pred %out0, %in0; mov.pred %out1, !%in0;", [Pred], [Pred; 2], |[a]| [a, 1 - a]);
    check("mov.pred %out0, 1; mov.pred %out1, 0;", [B32], [Pred; 2], |_| [1, 0]);
    let body =
        "mov.b16 %out0, -2; mov.s32 %out1, -2; mov.u64 %out2, 0xfedcba9876543210; mov.f32 %out3, 0fC0490FDB;
        mov.f64 %out4, 0d400921FB54442D18;";
    check(body, [B32], [B16, S32, U64, F32, F64], |_| {
        [0xfffe, 0xffff_fffe, 0xfedc_ba98_7654_3210, 0xc049_0fdb, 0x4009_21fb_5444_2d18]
    });
    check("mov.f32 %out0, -1.5; mov.f64 %out1, 2.5;", [B32], [F32, F64], |_| {
        [u64::from((-1.5f32).to_bits()), 2.5f64.to_bits()]
    });
    // Only where the guard is true.
    check("mov.b64 %out0, 1; @!%in1 mov.b64 %out0, %in0;", [B64, Pred], [B64], |[a, p]| {
        [if p != 0 { 1 } else { a }]
    });
}

/// The `n` parts of a value of `bits` bits.
fn parts<const N: usize>(value: u64, bits: u32) -> [u64; N] {
    std::array::from_fn(|i| value >> (i as u32 * bits) & mask(bits))
}

#[test]
fn packing() {
    let join2 = |a: u64, b: u64, bits: u32| b << bits | a;
    check("mov.b32 %out0, {%in0, %in1};", [B16; 2], [B32], |[a, b]| [join2(a, b, 16)]);
    check("mov.b64 %out0, {%in0, %in1};", [B32; 2], [B64], |[a, b]| [join2(a, b, 32)]);
    check("mov.b64 %out0, {%in0, -1};", [B32], [B64], |[a]| [join2(a, 0xffff_ffff, 32)]);
    check("mov.b64 %out0, {%in0, %in1, %in2, %in3};", [B16; 4], [B64], |[a, b, c, d]| {
        [join2(join2(a, b, 16), join2(c, d, 16), 32)]
    });
    check("mov.b32 {%out0, %out1}, %in0;", [B32], [B16; 2], |[a]| parts(a, 16));
    check("mov.b64 {%out0, %out1}, %in0;", [B64], [B32; 2], |[a]| parts(a, 32));
    check("mov.b64 {%out0, %out1, %out2, %out3}, %in0;", [B64], [B16; 4], |[a]| parts(a, 16));
    check("mov.b64 {%out0, %out1}, 0x123456789;", [B32], [B32; 2], |_| [0x2345_6789, 1]);
    // Sinks.
    check("mov.b64 {_, %out0}, %in0;", [B64], [B32], |[a]| [a >> 32]);
    check("mov.b64 {%out0, _}, %in0;", [B64], [B32], |[a]| [a & mask(32)]);
    check("mov.b64 {_, %out0, _, %out1}, %in0;", [B64], [B16; 2], |[a]| [a >> 16 & 0xffff, a >> 48]);
    // 8-bit parts.
    let bytes = ".reg .b8 %b<4>; mov.b32 {%b0, %b1, %b2, %b3}, %in0; mov.b32 %out0, {%b3, %b0, %b2, %b1};";
    check(bytes, [B32], [B32], |[a]| {
        let [w, x, y, z] = parts(a, 8);
        [z | w << 8 | y << 16 | x << 24]
    });
    let bytes = ".reg .b8 %b<2>; mov.b16 {%b0, %b1}, %in0; mov.b16 %out0, {%b1, %b0};";
    check(bytes, [B16], [B16], |[a]| [(a >> 8 | a << 8) & 0xffff]);
    // 128 bits.
    let body = ".reg .b128 %q, %s; mov.b128 %q, {%in0, %in1}; mov.b128 %s, %q; mov.b128 {%out0, %out1}, %s;
        mov.b128 {%out2, _, %out3, %out4}, %q;";
    check(body, [B64; 2], [B64, B64, B32, B32, B32], |[a, b]| [a, b, a & mask(32), b & mask(32), b >> 32]);
    let body = ".reg .b128 %q; mov.b128 %q, {%in0, %in1, %in2, %in3}; mov.b128 {%out0, %out1}, %q;";
    check(body, [B32; 4], [B64; 2], |[a, b, c, d]| [join2(a, b, 32), join2(c, d, 32)]);
    // A register may be both a part and the whole's source.
    let body = "mov.b32 %out0, %in0; mov.b32 %out1, %in1; .reg .b64 %d; mov.b64 %d, {%out0, %out1};
        mov.b64 {%out1, %out0}, %d;";
    check(body, [B32; 2], [B32; 2], |[a, b]| [b, a]);
    check(
        "mov.b64 %out0, {%in0, %in0}; @%in1 mov.b64 {%out1, _}, %out0; @!%in1 mov.b32 %out1, 3;",
        [B32, Pred],
        [B64, B32],
        |[a, p]| [join2(a, a, 32), if p != 0 { a } else { 3 }],
    );
}

#[test]
fn special_registers() {
    let lanes: Vec<u64> = (0..300).collect();
    let body = ".reg .b64 %grid; mov.u32 %out0, %tid.x; mov.u16 %out1, %tid.x; mov.u32 %out2, %laneid; mov.b32 %out3, %ntid.x;
        mov.u64 %grid, %gridid; mov.u32 %out4, %gridid; cvt.u32.u64 %out5, %grid; sub.u32 %out4, %out4, %out5;
        mov.u32 %out5, %ctaid.x;";
    check_cases(body, [B32], [B32, B16, B32, B32, B32, B32], &[lanes], |[i]| {
        [i % 128, i % 128, i % 32, 128, 0, i / 128]
    });
}

/// Clocks go on, are the same in every run, and their halves belong together.
#[test]
fn clocks() {
    let body = ".reg .b32 %c<3>; .reg .b64 %l<3>; .reg .pred %p;
        mov.u64 %out0, %clock64; mov.u32 %out1, %clock; mov.u32 %out2, %clock_hi;
        add.u32 %c0, %in0, 1; add.u32 %c0, %c0, 1; add.u32 %c0, %c0, 1;
        mov.u64 %out3, %clock64; mov.u64 %out4, %globaltimer;
        mov.u32 %out5, %globaltimer_lo; mov.u32 %out6, %globaltimer_hi;";
    let types = [B64, B32, B32, B64, B64, B32, B32];
    let inputs: Vec<u64> = (0..64).collect();
    let first = run(body, &[(B32, &inputs)], &types);
    assert_eq!(first, run(body, &[(B32, &inputs)], &types));
    for i in 0..64 {
        let at: Vec<u64> = first.iter().map(|values| values[i]).collect();
        assert!(at[0] < at[1] && at[1] < at[3] && at[3] < at[4] && at[4] < at[5], "{at:?}");
        assert!(at[3] - at[0] >= 5 && at[3] - at[0] < 100, "{at:?}");
        assert_eq!((at[2], at[6]), (0, 0));
    }
}

#[test]
fn refusals() {
    for body in [
        "setp.lo.s32 %p, %in0, %in0;",
        "setp.lt.b32 %p, %in0, %in0;",
        "setp.equ.s32 %p, %in0, %in0;",
        "setp.lt.ftz.f64 %p, %in1, %in1;",
        "setp.lt.ftz.s32 %p, %in0, %in0;",
        "setp.s32 %p, %in0, %in0;",
        "setp.lt.s32 %p, %in0;",
        "setp.lt.s32 %p, %in0, %in0, %p;",
        "setp.lt.and.s32 %p, %in0, %in0;",
        "setp.lt.nand.s32 %p, %in0, %in0, %p;",
        "setp.lt.s32 %in0, %in0, %in0;",
        "set.lt.u64.u32 %in1, %in0, %in0;",
        "set.lt.u16.u32 %in2, %in0, %in0;",
        "set.lt.f32.f16 %in0, %in2, %in2;",
        "set.lt.f16.bf16 %in2, %in2, %in2;",
        "set.lt.ftz.bf16.f32 %in2, %in0, %in0;",
        "set.lt.f16x2.bf16x2 %in0, %in0, %in0;",
        "selp.pred %p, %p, %p, %p;",
        "selp.b32 %in0, %in0, %in0;",
        "slct.u32.u32 %in0, %in0, %in0, %in0;",
        "mov.b32 %in0, %p;",
        "mov.b32 %in0, %in1;",
        "mov.b32 %in0, %in2;",
        "mov.u64 %in1, %tid.x;",
        "mov.u64 %in1, %clock;",
        "mov.u32 %in0, %clock64;",
        "mov.u32 %in0, %nowhere;",
        "mov.u32.wide %in0, %in0;",
        "mov.f16 %in2, %in2;",
        "mov.b64 {%in0, %in0, %in0}, %in1;",
        "mov.b64 {%in2, %in0}, %in1;",
        "mov.u64 {%in0, %in0}, %in1;",
        "mov.b64 {%in0, %in0}, {%in0, %in0};",
        "mov.b64 %in1, {%in0, _};",
        "mov.b32 %in0, {%in2, %in2, %in2, %in2};",
        "mov.f32 %in0, 1;",
    ] {
        let text = kernel(&format!(".reg .pred %p;\n{body}"), &[B32, B64, B16], &[]);
        assert!(ptxvm::Module::load("op.ptx", &text).is_err(), "`{body}` is refused");
    }
}

/// Addresses of variables: of the module, shared, and of the function's own.
#[test]
fn addresses() {
    let body = ".shared .align 8 .b8 %s[32]; .local .align 8 .b8 %l[32]; .reg .b64 %a<4>; .reg .b32 %b<2>;
        mov.u64 %a0, %s; mov.u64 %a1, %s+12; sub.u64 %out0, %a1, %a0;
        mov.u32 %b0, %s; mov.u32 %b1, %s+4; sub.u32 %out1, %b1, %b0;
        mov.u64 %a2, %l; mov.u64 %a3, %l+20; sub.u64 %out2, %a3, %a2;";
    check(body, [B32], [B64, B32, B64], |_| [12, 4, 20]);
}
