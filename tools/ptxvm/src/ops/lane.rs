//! Lifts functions of one lane to whole warps, compiled for each instruction set the host may have.
//!
//! An operation is a type without values that implements [`Unary`], [`Binary`] or [`Ternary`]; `unary::<Op>(isa)` is
//! the handler that the bytecode holds. The same Rust code gives the same bits on every instruction set: it uses only
//! correctly rounded operations (`mul_add` is always fused).

use crate::machine::inst::{Inst, LaneFn};
use crate::machine::isa::Isa;
use crate::machine::registers::{LANES, Registers, Value};

/// Compiles `fn $name<...>(regs, inst, mask)` once for each instruction set; `$name(isa)` gives the handler.
macro_rules! multiversion {
    ($(#[$doc:meta])* $name:ident, $body:ident, $bound:ident) => {
        $(#[$doc])*
        pub fn $name<O: $bound>(isa: Isa) -> LaneFn {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c")]
                fn avx2<O: $bound>(regs: &mut Registers, inst: &Inst, mask: u32) {
                    $body::<O>(regs, inst, mask);
                }
                #[target_feature(
                    enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512cd"
                )]
                fn avx512<O: $bound>(regs: &mut Registers, inst: &Inst, mask: u32) {
                    $body::<O>(regs, inst, mask);
                }
                if isa == Isa::Avx512 {
                    // SAFETY: `Isa::Avx512` and `Isa::Avx2` are made by `detect` alone, which has seen the features.
                    return |regs, inst, mask| unsafe { avx512::<O>(regs, inst, mask) };
                }
                if isa == Isa::Avx2 {
                    // SAFETY: as above.
                    return |regs, inst, mask| unsafe { avx2::<O>(regs, inst, mask) };
                }
            }
            let _ = isa;
            $body::<O>
        }
    };
}

/// d = f(a)
pub trait Unary {
    /// Source type.
    type A: Value;
    /// Result type.
    type D: Value;
    /// One lane; `imm` are the instruction's constants.
    fn eval(imm: u64, a: Self::A) -> Self::D;
}

/// d = f(a, b)
pub trait Binary {
    /// First source's type.
    type A: Value;
    /// Second source's type.
    type B: Value;
    /// Result type.
    type D: Value;
    /// One lane; `imm` are the instruction's constants.
    fn eval(imm: u64, a: Self::A, b: Self::B) -> Self::D;
}

/// d = f(a, b, c)
pub trait Ternary {
    /// First source's type.
    type A: Value;
    /// Second source's type.
    type B: Value;
    /// Third source's type.
    type C: Value;
    /// Result type.
    type D: Value;
    /// One lane; `imm` are the instruction's constants.
    fn eval(imm: u64, a: Self::A, b: Self::B, c: Self::C) -> Self::D;
}

/// d = f(a, b, c, e)
pub trait Quaternary {
    /// First source's type.
    type A: Value;
    /// Second source's type.
    type B: Value;
    /// Third source's type.
    type C: Value;
    /// Fourth source's type.
    type E: Value;
    /// Result type.
    type D: Value;
    /// One lane; `imm` are the instruction's constants.
    fn eval(imm: u64, a: Self::A, b: Self::B, c: Self::C, e: Self::E) -> Self::D;
}

/// Implements [`Unary`], [`Binary`] or [`Ternary`] by one signature: `[generics] Type, |imm, a: A, b: B| -> D { .. }`, where the
/// generics may be left out.
macro_rules! lane_op {
    ([$($generic:tt)*] $op:ty, |$imm:tt, $a:ident: $A:ty| -> $d:ty $body:block) => {
        impl<$($generic)*> $crate::ops::lane::Unary for $op {
            type A = $A;
            type D = $d;
            #[inline(always)]
            fn eval($imm: u64, $a: $A) -> $d $body
        }
    };
    ([$($generic:tt)*] $op:ty, |$imm:tt, $a:ident: $A:ty, $b:ident: $B:ty| -> $d:ty $body:block) => {
        impl<$($generic)*> $crate::ops::lane::Binary for $op {
            type A = $A;
            type B = $B;
            type D = $d;
            #[inline(always)]
            fn eval($imm: u64, $a: $A, $b: $B) -> $d $body
        }
    };
    ([$($generic:tt)*] $op:ty, |$imm:tt, $a:ident: $A:ty, $b:ident: $B:ty, $c:ident: $C:ty| -> $d:ty $body:block) => {
        impl<$($generic)*> $crate::ops::lane::Ternary for $op {
            type A = $A;
            type B = $B;
            type C = $C;
            type D = $d;
            #[inline(always)]
            fn eval($imm: u64, $a: $A, $b: $B, $c: $C) -> $d $body
        }
    };
    ($op:ty, |$($arg:tt)*) => {
        lane_op!([] $op, |$($arg)*);
    };
}
pub(super) use lane_op;

/// p = f(a, b), combined with another predicate: `setp`. Destinations: p, and q or none. Sources: a, b, and c or none.
pub trait Compare {
    /// Type of both sources.
    type A: Value;
    /// One lane.
    fn eval(a: Self::A, b: Self::A) -> bool;
}

#[inline(always)]
fn unary_body<O: Unary>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [<O::D as Value>::Raw::default(); LANES];
    let a = regs.get::<O::A>(inst.src(0));
    for i in 0..LANES {
        d[i] = O::eval(inst.imm, O::A::from_raw(a[i])).into_raw();
    }
    regs.set::<O::D>(inst.dst(0), mask, &d);
}
multiversion!(
    /// Handler of a unary operation.
    unary, unary_body, Unary
);

#[inline(always)]
fn binary_body<O: Binary>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [<O::D as Value>::Raw::default(); LANES];
    let a = regs.get::<O::A>(inst.src(0));
    let b = regs.get::<O::B>(inst.src(1));
    for i in 0..LANES {
        d[i] = O::eval(inst.imm, O::A::from_raw(a[i]), O::B::from_raw(b[i])).into_raw();
    }
    regs.set::<O::D>(inst.dst(0), mask, &d);
}
multiversion!(
    /// Handler of a binary operation.
    binary, binary_body, Binary
);

#[inline(always)]
fn ternary_body<O: Ternary>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [<O::D as Value>::Raw::default(); LANES];
    let a = regs.get::<O::A>(inst.src(0));
    let b = regs.get::<O::B>(inst.src(1));
    let c = regs.get::<O::C>(inst.src(2));
    for i in 0..LANES {
        d[i] = O::eval(inst.imm, O::A::from_raw(a[i]), O::B::from_raw(b[i]), O::C::from_raw(c[i])).into_raw();
    }
    regs.set::<O::D>(inst.dst(0), mask, &d);
}
multiversion!(
    /// Handler of a ternary operation.
    ternary, ternary_body, Ternary
);

#[inline(always)]
fn quaternary_body<O: Quaternary>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [<O::D as Value>::Raw::default(); LANES];
    let a = regs.get::<O::A>(inst.src(0));
    let b = regs.get::<O::B>(inst.src(1));
    let c = regs.get::<O::C>(inst.src(2));
    let e = regs.get::<O::E>(inst.src(3));
    for i in 0..LANES {
        let (a, b) = (O::A::from_raw(a[i]), O::B::from_raw(b[i]));
        d[i] = O::eval(inst.imm, a, b, O::C::from_raw(c[i]), O::E::from_raw(e[i])).into_raw();
    }
    regs.set::<O::D>(inst.dst(0), mask, &d);
}
multiversion!(
    /// Handler of an operation with four sources.
    quaternary, quaternary_body, Quaternary
);

/// How `setp` combines its comparison with source c: bits 0-1 of `imm`; bit 2 negates c, bit 3 the comparison.
pub mod combine {
    /// p = cmp, q = !cmp
    pub const NONE: u64 = 0;
    /// p = cmp and c, q = !cmp and c
    pub const AND: u64 = 1;
    /// p = cmp or c, q = !cmp or c
    pub const OR: u64 = 2;
    /// p = cmp xor c, q = !cmp xor c
    pub const XOR: u64 = 3;
    /// c is negated first.
    pub const NOT_C: u64 = 4;
    /// The comparison is negated first: `a >= b` of integers is `!(a < b)`, `ltu` of floats `!(a >= b)`.
    pub const NOT_CMP: u64 = 8;
}

/// The lanes where a comparison holds, `combine::NOT_CMP` applied. `view` says which part of the row is compared.
#[inline(always)]
fn hits<O: Compare>(regs: &Registers, inst: &Inst, view: impl Fn(<O::A as Value>::Raw) -> O::A) -> u32 {
    let a = regs.get::<O::A>(inst.src(0));
    let b = regs.get::<O::A>(inst.src(1));
    // Comparison and packing apart: the first loop vectorises whatever the second one becomes.
    let mut hit = [0u32; LANES];
    for i in 0..LANES {
        hit[i] = u32::from(O::eval(view(a[i]), view(b[i]))) << i;
    }
    hit.iter().fold(0, |all, bit| all | bit) ^ if inst.imm & combine::NOT_CMP != 0 { u32::MAX } else { 0 }
}

/// `BoolOp` of comparisons with source 2.
#[inline(always)]
fn combined<const N: usize>(regs: &Registers, inst: &Inst, hits: [u32; N]) -> [u32; N] {
    let c = regs.pred(inst.src(2)) ^ if inst.imm & combine::NOT_C != 0 { u32::MAX } else { 0 };
    hits.map(|hit| match inst.imm & 3 {
        combine::NONE => hit,
        combine::AND => hit & c,
        combine::OR => hit | c,
        _ => hit ^ c,
    })
}

#[inline(always)]
fn compare_body<O: Compare>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let hit = hits::<O>(regs, inst, O::A::from_raw);
    let [p, q] = combined(regs, inst, [hit, !hit]);
    regs.set_pred(inst.dst(0), mask, p);
    regs.set_pred(inst.dst(1), mask, q);
}
multiversion!(
    /// Handler of a comparison.
    compare, compare_body, Compare
);

#[inline(always)]
fn compare_halves_body<O: Compare<A = u16>>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let low = hits::<O>(regs, inst, |raw| raw as u16);
    let high = hits::<O>(regs, inst, |raw| (raw >> 16) as u16);
    let [p, q] = combined(regs, inst, [low, high]);
    regs.set_pred(inst.dst(0), mask, p);
    regs.set_pred(inst.dst(1), mask, q);
}

/// A comparison of 16-bit values, as packed types have two of.
pub trait CompareHalf: Compare<A = u16> {}
impl<O: Compare<A = u16>> CompareHalf for O {}

multiversion!(
    /// Handler of a comparison of packed 16-bit values: p from the lower halves, q from the upper ones.
    compare_halves, compare_halves_body, CompareHalf
);

/// An integer operation with the carry flag: d, carry = f(a, b, c, carry). Destinations: d, carry out (or none);
/// sources: a, b, c (or none), carry in (or none, which reads as 0).
pub trait Carry {
    /// Type of sources and result.
    type A: Value;
    /// One lane.
    fn eval(imm: u64, a: Self::A, b: Self::A, c: Self::A, carry: bool) -> (Self::A, bool);
}

#[inline(always)]
fn carry_body<O: Carry>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [<O::A as Value>::Raw::default(); LANES];
    let a = regs.get::<O::A>(inst.src(0));
    let b = regs.get::<O::A>(inst.src(1));
    let c = regs.get::<O::A>(inst.src(2));
    let carry_in = regs.pred(inst.src(3));
    let mut carry_out = 0;
    for i in 0..LANES {
        let (value, carry) = O::eval(
            inst.imm,
            O::A::from_raw(a[i]),
            O::A::from_raw(b[i]),
            O::A::from_raw(c[i]),
            carry_in >> i & 1 != 0,
        );
        d[i] = value.into_raw();
        carry_out |= u32::from(carry) << i;
    }
    regs.set::<O::A>(inst.dst(0), mask, &d);
    regs.set_pred(inst.dst(1), mask, carry_out);
}
multiversion!(
    /// Handler of an operation with carry.
    carry, carry_body, Carry
);

/// d = p ? a : b, the type's width being that of `V`. Sources: a, b, p; `imm` 1 negates p.
pub trait Select {
    /// Type of a, b and d.
    type A: Value;
}

#[inline(always)]
fn select_body<O: Select>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [<O::A as Value>::Raw::default(); LANES];
    let a = regs.get::<O::A>(inst.src(0));
    let b = regs.get::<O::A>(inst.src(1));
    let p = regs.pred(inst.src(2)) ^ if inst.imm & 1 != 0 { u32::MAX } else { 0 };
    for i in 0..LANES {
        d[i] = if p >> i & 1 != 0 { a[i] } else { b[i] };
    }
    regs.set::<O::A>(inst.dst(0), mask, &d);
}
multiversion!(
    /// Handler of a selection by predicate.
    select, select_body, Select
);

/// A wide value and the narrow ones it consists of, the lowest bits first.
pub trait Split {
    /// The whole.
    type Whole: Value;
    /// One part.
    type Part: Value;
    /// How many parts.
    const PARTS: usize;
    /// Part `i` of a whole.
    fn part(whole: Self::Whole, i: usize) -> Self::Part;
    /// The bits that part `i` contributes to the whole.
    fn whole(part: Self::Part, i: usize) -> Self::Whole;
    /// Both values' bits.
    fn join(a: Self::Whole, b: Self::Whole) -> Self::Whole;
}

#[inline(always)]
fn pack_body<O: Split>(regs: &mut Registers, inst: &Inst, mask: u32) {
    let mut d = [O::Whole::default(); LANES];
    for part in 0..O::PARTS {
        let a = regs.get::<O::Part>(inst.src(part));
        for i in 0..LANES {
            d[i] = O::join(d[i], O::whole(O::Part::from_raw(a[i]), part));
        }
    }
    regs.set::<O::Whole>(inst.dst(0), mask, &d.map(Value::into_raw));
}
multiversion!(
    /// Handler of `mov d, {a, b, ...}`.
    pack, pack_body, Split
);

#[inline(always)]
fn unpack_body<O: Split>(regs: &mut Registers, inst: &Inst, mask: u32) {
    // A copy: a destination may be the source itself.
    let a = *regs.get::<O::Whole>(inst.src(0));
    for part in 0..O::PARTS {
        let d = a.map(|raw| O::part(O::Whole::from_raw(raw), part).into_raw());
        regs.set::<O::Part>(inst.dst(part), mask, &d);
    }
}
multiversion!(
    /// Handler of `mov {a, b, ...}, d`.
    unpack, unpack_body, Split
);
