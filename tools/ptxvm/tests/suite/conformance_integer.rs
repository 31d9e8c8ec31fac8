//! Integer arithmetic against arithmetic in 128 bits, and the ISA's bit-by-bit definitions.

use ptxvm::error::ErrorKind;
use ptxvm::types::Type::{self, *};
use ptxvm::{Checks, Error, Options};

use crate::support::op::{cases, check, check_cases, mask, run_with};

const INTS: [Type; 6] = [U16, S16, U32, S32, U64, S64];
const SIGNED: [Type; 3] = [S16, S32, S64];
const CARRIED: [Type; 4] = [U32, S32, U64, S64];

/// The number that bits stand for.
fn value(bits: u64, ty: Type) -> i128 {
    let bits = bits & mask(ty.bits());
    if ty.is_signed() && bits >> (ty.bits() - 1) & 1 != 0 {
        i128::from(bits) - (1 << ty.bits())
    } else {
        i128::from(bits)
    }
}

/// The bits of a number, modulo 2^bits.
fn bits(value: i128, ty: Type) -> u64 {
    value as u64 & mask(ty.bits())
}

/// The upper half of a product; 128 bits hold those of 64-bit numbers, signed or not, only as what they are.
fn high(a: u64, b: u64, ty: Type) -> u64 {
    let product = match ty {
        U64 => (u128::from(a) * u128::from(b)) as i128,
        _ => value(a, ty) * value(b, ty),
    };
    bits(product >> ty.bits(), ty)
}

fn saturated(value: i128, ty: Type) -> u64 {
    let (low, high) = if ty.is_signed() {
        (-(1 << (ty.bits() - 1)), (1 << (ty.bits() - 1)) - 1)
    } else {
        (0, (1 << ty.bits()) - 1)
    };
    bits(value.clamp(low, high), ty)
}

fn wide(ty: Type) -> Type {
    match ty {
        U16 => U32,
        S16 => S32,
        U32 => U64,
        _ => S64,
    }
}

/// Each half of packed operands by itself.
fn halves(a: u64, b: u64, half: Type, f: impl Fn(i128, i128) -> i128) -> u64 {
    let part = |shift: u32| bits(f(value(a >> shift, half), value(b >> shift, half)), half);
    part(16) << 16 | part(0)
}

#[test]
fn add_sub_mul() {
    for ty in INTS {
        let [a, b] = [ty; 2];
        let bin = |op: &str, want: &dyn Fn(u64, u64) -> u64| {
            check(&format!("{op}{ty} %out0, %in0, %in1;"), [a, b], [ty], |[a, b]| [want(a, b)]);
        };
        bin("add", &|a, b| bits(value(a, ty) + value(b, ty), ty));
        bin("sub", &|a, b| bits(value(a, ty) - value(b, ty), ty));
        bin("mul.lo", &|a, b| bits(value(a, ty).wrapping_mul(value(b, ty)), ty));
        bin("mul.hi", &|a, b| high(a, b, ty));
        bin("min", &|a, b| bits(value(a, ty).min(value(b, ty)), ty));
        bin("max", &|a, b| bits(value(a, ty).max(value(b, ty)), ty));
        let tern = |op: &str, want: &dyn Fn(u64, u64, u64) -> u64| {
            check(&format!("{op}{ty} %out0, %in0, %in1, %in2;"), [ty; 3], [ty], |[a, b, c]| [want(a, b, c)]);
        };
        tern("mad.lo", &|a, b, c| {
            bits(value(a, ty).wrapping_mul(value(b, ty)).wrapping_add(value(c, ty)), ty)
        });
        tern("mad.hi", &|a, b, c| bits(value(high(a, b, ty), ty) + value(c, ty), ty));
        tern("sad", &|a, b, c| bits((value(a, ty) - value(b, ty)).abs() + value(c, ty), ty));
    }
}

#[test]
fn wide_products() {
    for ty in [U16, S16, U32, S32] {
        let wide = wide(ty);
        let text = format!("mul.wide{ty} %out0, %in0, %in1;");
        check(&text, [ty; 2], [wide], |[a, b]| [bits(value(a, ty) * value(b, ty), wide)]);
        let text = format!("mad.wide{ty} %out0, %in0, %in1, %in2;");
        check(&text, [ty, ty, wide], [wide], |[a, b, c]| {
            [bits(value(a, ty) * value(b, ty) + value(c, wide), wide)]
        });
    }
}

#[test]
fn saturation() {
    check("add.sat.s32 %out0, %in0, %in1;", [S32; 2], [S32], |[a, b]| {
        [saturated(value(a, S32) + value(b, S32), S32)]
    });
    check("sub.sat.s32 %out0, %in0, %in1;", [S32; 2], [S32], |[a, b]| {
        [saturated(value(a, S32) - value(b, S32), S32)]
    });
    check("add.sat.u32 %out0, %in0, %in1;", [U32; 2], [U32], |[a, b]| {
        [saturated(value(a, U32) + value(b, U32), U32)]
    });
    check("mad.hi.sat.s32 %out0, %in0, %in1, %in2;", [S32; 3], [S32], |[a, b, c]| {
        [saturated(((value(a, S32) * value(b, S32)) >> 32) + value(c, S32), S32)]
    });
    for (name, half) in [("u16x2", U16), ("s16x2", S16)] {
        check(&format!("add.sat.{name} %out0, %in0, %in1;"), [B32; 2], [B32], |[a, b]| {
            [halves(a, b, half, |a, b| value(saturated(a + b, half), half))]
        });
    }
}

#[test]
fn packed() {
    for (name, half) in [("u16x2", U16), ("s16x2", S16)] {
        let op = |op: &str, f: &dyn Fn(i128, i128) -> i128| {
            check(&format!("{op}.{name} %out0, %in0, %in1;"), [B32; 2], [B32], |[a, b]| {
                [halves(a, b, half, f)]
            });
        };
        op("add", &|a, b| a + b);
        op("sub", &|a, b| a - b);
        op("min", &|a, b| a.min(b));
        op("max", &|a, b| a.max(b));
    }
    check("neg.s16x2 %out0, %in0;", [B32], [B32], |[a]| [halves(a, 0, S16, |a, _| -a)]);
    check("min.relu.s16x2 %out0, %in0, %in1;", [B32; 2], [B32], |[a, b]| {
        [halves(a, b, S16, |a, b| a.min(b).max(0))]
    });
    check("max.s16x2.relu %out0, %in0, %in1;", [B32; 2], [B32], |[a, b]| {
        [halves(a, b, S16, |a, b| a.max(b).max(0))]
    });
    for (name, f) in [("min", i128::min as fn(i128, i128) -> i128), ("max", i128::max)] {
        check(&format!("{name}.relu.s32 %out0, %in0, %in1;"), [S32; 2], [S32], |[a, b]| {
            [bits(f(value(a, S32), value(b, S32)).max(0), S32)]
        });
    }
}

#[test]
fn signs() {
    for ty in SIGNED {
        check(&format!("abs{ty} %out0, %in0;"), [ty], [ty], |[a]| [bits(value(a, ty).abs(), ty)]);
        check(&format!("neg{ty} %out0, %in0;"), [ty], [ty], |[a]| [bits(-value(a, ty), ty)]);
    }
}

/// Carries: what comes in is set by an addition that overflows where `%in3` is not zero, what goes out is read back.
#[test]
fn carries() {
    for ty in CARRIED {
        let number = if ty.bits() == 32 { U32 } else { U64 };
        let none = mask(ty.bits());
        let (set, get) = (format!("add.cc{ty} %out0, %in2, {none};"), format!("addc{ty} %out1, 0, 0;"));
        let carry = |c: u64| i128::from(c != 0);
        let top = |sum: i128| bits((sum >> ty.bits()) & 1, number);
        let chain = |op: &str, want: &dyn Fn(i128, i128, i128) -> [u64; 2]| {
            let body = format!("{set} {op}{ty} %out0, %in0, %in1; {get}");
            check(&body, [ty, ty, ty], [ty, ty], |[a, b, c]| {
                want(value(a, number), value(b, number), carry(c))
            });
        };
        let sum = |sum: i128| [bits(sum, ty), top(sum)];
        chain("add.cc", &|a, b, _| sum(a + b));
        chain("addc.cc", &|a, b, c| sum(a + b + c));
        // Without `.cc` the flag stays as it was.
        chain("addc", &|a, b, c| [bits(a + b + c, ty), c as u64]);
        // Hardware subtracts by adding the complement: the flag is the carry of a + !b + 1, not the ISA's borrow.
        let all = i128::from(none);
        chain("sub.cc", &|a, b, _| sum(a + (all - b) + 1));
        chain("subc.cc", &|a, b, c| sum(a + (all - b) + c));
        chain("subc", &|a, b, c| [bits(a + (all - b) + c, ty), c as u64]);
        let mad = |op: &str, want: &dyn Fn(u64, u64, i128, i128) -> [u64; 2]| {
            let set = format!("add.cc{ty} %out0, %in3, {none};");
            let body = format!("{set} {op}{ty} %out0, %in0, %in1, %in2; {get}");
            check(&body, [ty; 4], [ty; 2], |[a, b, c, carries]| want(a, b, value(c, number), carry(carries)));
        };
        let low = |a: u64, b: u64| value(bits(value(a, ty).wrapping_mul(value(b, ty)), ty), number);
        let high = |a: u64, b: u64| value(high(a, b, ty), number);
        mad("mad.lo.cc", &|a, b, c, _| sum(low(a, b) + c));
        mad("mad.hi.cc", &|a, b, c, _| sum(high(a, b) + c));
        mad("madc.lo.cc", &|a, b, c, carry| sum(low(a, b) + c + carry));
        mad("madc.hi.cc", &|a, b, c, carry| sum(high(a, b) + c + carry));
        mad("madc.lo", &|a, b, c, carry| [bits(low(a, b) + c + carry, ty), carry as u64]);
        mad("madc.hi", &|a, b, c, carry| [bits(high(a, b) + c + carry, ty), carry as u64]);
    }
}

/// 128-bit sums and products as compilers chain them.
#[test]
fn long_arithmetic() {
    let join = |low: u64, high: u64| u128::from(high) << 64 | u128::from(low);
    let body = "add.cc.u64 %out0, %in0, %in2; addc.cc.u64 %out1, %in1, %in3;";
    check(body, [U64; 4], [U64; 2], |[a, b, c, d]| {
        let sum = join(a, b).wrapping_add(join(c, d));
        [sum as u64, (sum >> 64) as u64]
    });
    let body = "sub.cc.s64 %out0, %in0, %in2; subc.s64 %out1, %in1, %in3;";
    check(body, [U64; 4], [U64; 2], |[a, b, c, d]| {
        let difference = join(a, b).wrapping_sub(join(c, d));
        [difference as u64, (difference >> 64) as u64]
    });
    // 64 x 64 bits from 32-bit pieces.
    let body = ".reg .b32 %a<2>, %b<2>, %r<4>;
        mov.b64 {%a0, %a1}, %in0; mov.b64 {%b0, %b1}, %in1;
        mul.lo.u32 %r0, %a0, %b0; mul.hi.u32 %r1, %a0, %b0;
        mad.lo.cc.u32 %r1, %a1, %b0, %r1; madc.hi.u32 %r2, %a1, %b0, 0;
        mad.lo.cc.u32 %r1, %a0, %b1, %r1; madc.hi.cc.u32 %r2, %a0, %b1, %r2; addc.u32 %r3, 0, 0;
        mad.lo.cc.u32 %r2, %a1, %b1, %r2; madc.hi.u32 %r3, %a1, %b1, %r3;
        mov.b64 %out0, {%r0, %r1}; mov.b64 %out1, {%r2, %r3};";
    check(body, [U64; 2], [U64; 2], |[a, b]| {
        let product = u128::from(a) * u128::from(b);
        [product as u64, (product >> 64) as u64]
    });
}

#[test]
fn products_of_24_bits() {
    for (ty, low) in [(U32, 0i128), (S32, 1 << 23)] {
        // Sign or zero extension from bit 23.
        let number = |a: u64| (i128::from(a & 0xff_ffff) ^ low) - low;
        let product = |a: u64, b: u64| number(a) * number(b);
        check(&format!("mul24.lo{ty} %out0, %in0, %in1;"), [ty; 2], [ty], |[a, b]| [bits(product(a, b), ty)]);
        check(&format!("mul24.hi{ty} %out0, %in0, %in1;"), [ty; 2], [ty], |[a, b]| {
            [bits(product(a, b) >> 16, ty)]
        });
        let three = |name: &str, want: &dyn Fn(i128, i128) -> u64| {
            check(&format!("mad24.{name}{ty} %out0, %in0, %in1, %in2;"), [ty; 3], [ty], |[a, b, c]| {
                [want(product(a, b), value(c, ty))]
            });
        };
        three("lo", &|p, c| bits(p + c, ty));
        three("hi", &|p, c| bits((p >> 16) + c, ty));
        if ty == S32 {
            three("hi.sat", &|p, c| saturated(value(bits(p >> 16, ty), ty) + c, ty));
        }
    }
}

#[test]
fn division() {
    for ty in INTS {
        let [a, b] = cases([ty; 2]);
        let pairs: Vec<(u64, u64)> = a.into_iter().zip(b).filter(|(_, b)| *b != 0).collect();
        let cases = [pairs.iter().map(|p| p.0).collect(), pairs.iter().map(|p| p.1).collect()];
        let body = format!("div{ty} %out0, %in0, %in1; rem{ty} %out1, %in0, %in1;");
        // Division of i128 truncates, as PTX does; the smallest number by -1 overflows to itself.
        check_cases(&body, [ty; 2], [ty; 2], &cases, |[a, b]| {
            let (a, b) = (value(a, ty), value(b, ty));
            [bits(a / b, ty), bits(a % b, ty)]
        });
        for divisor in [1, 3, 7, 10, 100, 127] {
            let body = format!("div{ty} %out0, %in0, {divisor}; rem{ty} %out1, %in0, {divisor};");
            check(&body, [ty], [ty; 2], |[a]| {
                [bits(value(a, ty) / divisor, ty), bits(value(a, ty) % divisor, ty)]
            });
        }
    }
}

/// Division by zero: all ones, as hardware gives, and findings that name the lanes: the division, and where its result is used.
#[test]
fn division_by_zero() {
    for ty in INTS {
        for op in ["div", "rem"] {
            let a: Vec<u64> = (0..32).map(|i| (i * 0x0123_4567_89ab_cdef) & mask(ty.bits())).collect();
            let b: Vec<u64> = (0..32).map(|i| if i % 8 == 5 { 0 } else { i + 1 }).collect();
            let options = Options { threads: 1, ..Options::default() };
            let body = format!("{op}{ty} %out0, %in0, %in1;");
            let (got, error) = run_with(&options, &body, &[(ty, &a), (ty, &b)], &[ty]);
            let Some(Error::Fault(findings)) = error else { panic!("`{body}` by zero is found: {error:?}") };
            let kinds: Vec<_> = findings.iter().map(|f| f.kind).collect();
            assert_eq!(kinds, [ErrorKind::DivisionByZero, ErrorKind::Uninitialized]);
            assert!(
                findings.iter().all(|f| f.threads.as_ref().unwrap().lanes == 0x2020_2020),
                "{findings:?}"
            );
            for i in 0..32 {
                let (x, y) = (value(a[i], ty), value(b[i], ty));
                let want = match (y, op) {
                    (0, _) => mask(ty.bits()),
                    (_, "div") => bits(x / y, ty),
                    _ => bits(x % y, ty),
                };
                assert_eq!(got[0][i], want, "`{body}` of {x}, {y}");
            }
        }
    }
    let options = Options { threads: 1, ..Options::default() };
    let (_, error) = run_with(&options, "div.s32 %out0, %in0, 0;", &[(S32, &[1])], &[S32]);
    assert!(matches!(error, Some(Error::Fault(f)) if f[0].kind == ErrorKind::DivisionByZero));
    // What nothing uses is none: compilers compute the next turn's index ahead.
    let unused = "setp.eq.s32 %p, %in1, 0; div.s32 %out0, %in0, %in1; selp.s32 %out0, 7, %out0, %p;";
    let unused = format!("{{ .reg .pred %p; {unused} }}");
    let (got, error) = run_with(&options, &unused, &[(S32, &[6, 6]), (S32, &[0, 2])], &[S32]);
    assert!(error.is_none() && got[0][..2] == [7, 3], "{error:?} {got:?}");
    // Beside what may follow from it, it is told with any checks.
    let index = "{ .reg .b64 %z; div.s32 %out0, %in0, %in1; mul.wide.u32 %z, %out0, 4096; ld.global.s32 %out0, [%z]; }";
    for checks in [Checks::ALL, Checks::NONE] {
        let options = Options { checks, ..options.clone() };
        let (_, error) = run_with(&options, index, &[(S32, &[1]), (S32, &[0])], &[S32]);
        let Some(Error::Fault(found)) = &error else { panic!("{error:?}") };
        let kinds: Vec<_> = found.iter().map(|f| f.kind).collect();
        assert!(
            kinds.contains(&ErrorKind::DivisionByZero) && kinds.contains(&ErrorKind::OutOfBounds),
            "{found:?}"
        );
    }
    // The mask of an instruction of the warp is used as well.
    for user in
        ["shfl.sync.idx.b32 %out0, %in0, 0, 31, %m", "vote.sync.ballot.b32 %out0, 1, %m", "bar.warp.sync %m"]
    {
        let body =
            format!("{{ .reg .b32 %m; div.u32 %m, 5, %in1; mov.b32 %out0, 0; {user}; mov.b32 %out0, 0; }}");
        let all = [0; 32];
        let (_, error) = run_with(&options, &body, &[(S32, &all), (S32, &all)], &[S32]);
        let Some(Error::Fault(found)) = &error else { panic!("{user}: {error:?}") };
        assert_eq!(
            found.iter().map(|f| f.kind).collect::<Vec<_>>(),
            [ErrorKind::DivisionByZero, ErrorKind::Uninitialized]
        );
    }
}

#[test]
fn counting() {
    for ty in [B32, B64] {
        let n = ty.bits();
        let ones = |a: u64| (0..n).filter(|i| a >> i & 1 != 0).count() as u64;
        check(&format!("popc{ty} %out0, %in0;"), [ty], [U32], |[a]| [ones(a)]);
        check(&format!("clz{ty} %out0, %in0;"), [ty], [U32], |[a]| {
            [(0..n).rev().take_while(|i| a >> i & 1 == 0).count() as u64]
        });
        check(&format!("brev{ty} %out0, %in0;"), [ty], [ty], |[a]| {
            [(0..n).fold(0, |d, i| d | (a >> i & 1) << (n - 1 - i))]
        });
    }
    for ty in CARRIED {
        let msb = ty.bits() - 1;
        let find = |a: u64| {
            let a = if ty.is_signed() && a >> msb & 1 != 0 { !a } else { a };
            (0..=msb).rev().find(|i| a >> i & 1 != 0)
        };
        check(
            &format!("bfind{ty} %out0, %in0;"),
            [ty],
            [U32],
            |[a]| [find(a).map_or(0xffff_ffff, u64::from)],
        );
        check(&format!("bfind.shiftamt{ty} %out0, %in0;"), [ty], [U32], |[a]| {
            [find(a).map_or(0xffff_ffff, |i| u64::from(msb - i))]
        });
    }
}

#[test]
fn nth_set_bit() {
    let mut cases: [Vec<u64>; 3] = cases([B32, B32, S32]);
    // The ISA defines bases below 32 alone; offsets matter up to the width.
    cases[1].iter_mut().for_each(|base| *base &= 31);
    for (i, offset) in cases[2].iter_mut().enumerate().filter(|(i, _)| i % 3 != 0) {
        *offset = (i as i64 % 67 - 33) as u64 & 0xffff_ffff;
    }
    check_cases(
        "fns.b32 %out0, %in0, %in1, %in2;",
        [B32, B32, S32],
        [B32],
        &cases,
        |[bits, base, offset]| {
            let offset = value(offset, S32);
            if offset == 0 {
                return [if bits >> base & 1 != 0 { base } else { 0xffff_ffff }];
            }
            let (mut at, mut count) = (base as i128, offset.abs() - 1);
            while (0..32).contains(&at) {
                if bits >> at & 1 != 0 {
                    if count == 0 {
                        return [at as u64];
                    }
                    count -= 1;
                }
                at += offset.signum();
            }
            [0xffff_ffff]
        },
    );
}

#[test]
fn bit_fields() {
    for ty in CARRIED {
        let msb = u64::from(ty.bits() - 1);
        check(&format!("bfe{ty} %out0, %in0, %in1, %in2;"), [ty, U32, U32], [ty], |[a, b, c]| {
            let (pos, len) = (b & 0xff, c & 0xff);
            let sign = if ty.is_signed() && len != 0 { a >> (pos + len - 1).min(msb) & 1 } else { 0 };
            let bit = |i: u64| if i < len && pos + i <= msb { a >> (pos + i) & 1 } else { sign };
            [(0..=msb).fold(0, |d, i| d | bit(i) << i)]
        });
    }
    for ty in [B32, B64] {
        let msb = u64::from(ty.bits() - 1);
        check(
            &format!("bfi{ty} %out0, %in0, %in1, %in2, %in3;"),
            [ty, ty, U32, U32],
            [ty],
            |[a, b, c, d]| {
                let (pos, len) = (c & 0xff, d & 0xff);
                let mut f = b;
                for i in (0..len).take_while(|i| pos + i <= msb) {
                    f = f & !(1 << (pos + i)) | (a >> i & 1) << (pos + i);
                }
                [f]
            },
        );
    }
    for clamp in [false, true] {
        let mode = if clamp { "clamp" } else { "wrap" };
        check(&format!("bmsk.{mode}.b32 %out0, %in0, %in1;"), [B32; 2], [B32], |[a, b]| {
            let (from, width) = if clamp { (a, b) } else { (a % 32, b % 32) };
            let bit = |i: u64| u64::from(i >= from && i - from < width);
            [(0..32).fold(0, |d, i| d | bit(i) << i)]
        });
        for ty in [U32, S32] {
            check(&format!("szext.{mode}{ty} %out0, %in0, %in1;"), [ty, U32], [ty], |[a, b]| {
                let n = if clamp { b.min(32) } else { b % 32 };
                let sign = if ty == S32 && n > 0 { a >> (n - 1) & 1 } else { 0 };
                let bit = |i: u64| if i < n { a >> i & 1 } else { sign };
                [(0..32).fold(0, |d, i| d | bit(i) << i)]
            });
        }
    }
}

#[test]
fn dot_products() {
    for a_ty in [U32, S32] {
        for b_ty in [U32, S32] {
            let part = |ty: Type, bits: u32| match (ty, bits) {
                (S32, 8) => S8,
                (S32, _) => S16,
                (_, 8) => U8,
                _ => U16,
            };
            let dot = |a: u64, b: u64, c: u64, n: u32| {
                let term = |i: u32| {
                    value(a >> (i * 32 / n), part(a_ty, 32 / n)) * value(b >> (i * 8), part(b_ty, 8))
                };
                bits((0..n).map(term).sum::<i128>() + i128::from(c), U32)
            };
            let body = format!("dp4a{a_ty}{b_ty} %out0, %in0, %in1, %in2;");
            check(&body, [U32; 3], [U32], |[a, b, c]| [dot(a, b, c, 4)]);
            let body = format!("dp2a.lo{a_ty}{b_ty} %out0, %in0, %in1, %in2;");
            check(&body, [U32; 3], [U32], |[a, b, c]| [dot(a, b, c, 2)]);
            let body = format!("dp2a.hi{a_ty}{b_ty} %out0, %in0, %in1, %in2;");
            check(&body, [U32; 3], [U32], |[a, b, c]| [dot(a, b >> 16, c, 2)]);
        }
    }
}

/// Immediates take the width of the type, and nothing is written where a guard is false.
#[test]
fn immediates_and_guards() {
    for ty in INTS {
        check(&format!("add{ty} %out0, %in0, -1;"), [ty], [ty], |[a]| [bits(value(a, ty) - 1, ty)]);
    }
    let body = "mov.u32 %out0, 7; @%in1 add.u32 %out0, %in0, 0x80000000; @!%in1 add.u32 %out0, %out0, %in0;";
    check(body, [U32, Pred], [U32], |[a, p]| [bits(i128::from(a) + if p != 0 { 1 << 31 } else { 7 }, U32)]);
}

/// What no assembler takes is refused, and so is what is not built: nothing is ignored.
#[test]
fn refusals() {
    for body in [
        "add.foo.s32 %out0, %in0, %in0;",
        "add.sat.s64 %out0, %in0, %in0;",
        "add %out0, %in0, %in0;",
        "mul.u32 %out0, %in0, %in0;",
        "mad.lo.sat.s32 %out0, %in0, %in0, %in0;",
        "min.relu.s64 %out0, %in0, %in0;",
        "neg.u32 %out0, %in0;",
        "add.s32 %out0, %in0;",
        "add.s64 %out0, %in0, %in0;",
        "add.s32 %out0, %in0, %nowhere;",
        "add.s32.s32 %out0, %in0, %in0;",
        "add.cc.cc.s32 %out0, %in0, %in0;",
    ] {
        let text = crate::support::op::kernel(body, &[U32], &[U32]);
        assert!(ptxvm::Module::load("op.ptx", &text).is_err(), "`{body}` is refused");
    }
}
