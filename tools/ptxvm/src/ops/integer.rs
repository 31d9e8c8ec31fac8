//! Integer arithmetic.

use std::marker::PhantomData;

use super::forms::{self, Form, signed, table, unsigned};
use super::lane::{Binary, Carry, Quaternary, binary, carry, lane_op, quaternary, ternary, unary};
use crate::decode::Refusal;
use crate::decode::decoder::Decoder;
use crate::error::ErrorKind;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Class, Inst, LaneFn, WarpOp};
use crate::machine::registers::{LANES, Value, Width};
use crate::ptx::ast::{Instruction, Operand};
use crate::types::Type;

const FORMS: &[Form] = &[
    Form::new("add", &[], "t=tt", unsigned!(binary Add)),
    Form::new("add", &[], "t=tt", table![binary AddHalves: U16X2 u16, S16X2 u16]),
    Form::new("add", &["sat"], "t=tt", table![binary AddSat: S32 i32, U32 u32]),
    Form::new("add", &["sat"], "t=tt", table![binary AddSatHalves: U16X2 u16, S16X2 i16]),
    Form::new("add", &["cc"], "tc=tt__", table![carry CarryAdd: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("addc", &[], "t_=tt_c", table![carry CarryAdd: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("addc", &["cc"], "tc=tt_c", table![carry CarryAdd: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("sub", &[], "t=tt", unsigned!(binary Sub)),
    Form::new("sub", &[], "t=tt", table![binary SubHalves: U16X2 u16, S16X2 u16]),
    Form::new("sub", &["sat"], "t=tt", table![binary SubSat: S32 i32]),
    Form::new("sub", &["cc"], "tc=tt__", table![carry CarrySub: U32 u32, S32 u32, U64 u64, S64 u64]).with(1),
    Form::new("subc", &[], "t_=tt_c", table![carry CarrySub: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("subc", &["cc"], "tc=tt_c", table![carry CarrySub: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("mul", &["lo"], "t=tt", unsigned!(binary MulLo)),
    Form::new("mul", &["hi"], "t=tt", signed!(binary MulHi)),
    Form::new("mul", &["wide"], "w=tt", table![binary MulWide: U16 u16, S16 i16, U32 u32, S32 i32]),
    Form::new("mad", &["lo"], "t=ttt", unsigned!(ternary MadLo)),
    Form::new("mad", &["hi"], "t=ttt", signed!(ternary MadHi)),
    Form::new("mad", &["hi", "sat"], "t=ttt", table![ternary MadHiSat: S32 i32]),
    Form::new("mad", &["wide"], "w=ttw", table![ternary MadWide: U16 u16, S16 i16, U32 u32, S32 i32]),
    Form::new("mad", &["lo", "cc"], "tc=ttt_", table![carry CarryMadLo: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("mad", &["hi", "cc"], "tc=ttt_", table![carry CarryMadHi: U32 u32, S32 i32, U64 u64, S64 i64]),
    Form::new("madc", &["lo"], "t_=tttc", table![carry CarryMadLo: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("madc", &["hi"], "t_=tttc", table![carry CarryMadHi: U32 u32, S32 i32, U64 u64, S64 i64]),
    Form::new("madc", &["lo", "cc"], "tc=tttc", table![carry CarryMadLo: U32 u32, S32 u32, U64 u64, S64 u64]),
    Form::new("madc", &["hi", "cc"], "tc=tttc", table![carry CarryMadHi: U32 u32, S32 i32, U64 u64, S64 i64]),
    Form::new("mul24", &["lo"], "t=tt_", table![ternary Mad24: U32 u32, S32 i32]),
    Form::new("mul24", &["hi"], "t=tt_", table![ternary Mad24: U32 u32, S32 i32]).with(16),
    Form::new("mad24", &["lo"], "t=ttt", table![ternary Mad24: U32 u32, S32 i32]),
    Form::new("mad24", &["hi"], "t=ttt", table![ternary Mad24: U32 u32, S32 i32]).with(16),
    Form::new("mad24", &["hi", "sat"], "t=ttt", table![ternary Mad24Sat: S32 i32]).with(16),
    Form::new("sad", &[], "t=ttt", signed!(ternary Sad)),
    Form::new("div", &[], "t=tt", signed!(binary Div)),
    Form::new("rem", &[], "t=tt", signed!(binary Rem)),
    Form::new("abs", &[], "t=t", table![unary Abs: S16 i16, S32 i32, S64 i64]),
    Form::new("neg", &[], "t=t", table![unary Neg: S16 i16, S32 i32, S64 i64]),
    Form::new("neg", &[], "t=_t", table![binary SubHalves: S16X2 u16]),
    Form::new("min", &[], "t=tt", signed!(binary Min)),
    Form::new("min", &[], "t=tt", table![binary MinHalves: U16X2 u16, S16X2 i16]),
    Form::new("min", &["relu"], "t=tt", table![binary MinRelu: S32 i32]),
    Form::new("min", &["relu"], "t=tt", table![binary MinReluHalves: S16X2 i16]),
    Form::new("max", &[], "t=tt", signed!(binary Max)),
    Form::new("max", &[], "t=tt", table![binary MaxHalves: U16X2 u16, S16X2 i16]),
    Form::new("max", &["relu"], "t=tt", table![binary MaxRelu: S32 i32]),
    Form::new("max", &["relu"], "t=tt", table![binary MaxReluHalves: S16X2 i16]),
    Form::new("popc", &[], "u=t", table![unary Popc: B32 u32, B64 u64]),
    Form::new("clz", &[], "u=t", table![unary Clz: B32 u32, B64 u64]),
    Form::new("bfind", &[], "u=t", table![unary Bfind: U32 u32, S32 i32, U64 u64, S64 i64]),
    Form::new("bfind", &["shiftamt"], "u=t", table![unary Bfind: U32 u32, S32 i32, U64 u64, S64 i64]).with(1),
    Form::new("fns", &[], "t=tuu", &[(Type::B32, ternary::<Fns>)]),
    Form::new("brev", &[], "t=t", table![unary Brev: B32 u32, B64 u64]),
    Form::new("bfe", &[], "t=tuu", table![ternary Bfe: U32 u32, S32 i32, U64 u64, S64 i64]),
    Form::new("bfi", &[], "t=ttuu", table![quaternary Bfi: B32 u32, B64 u64]),
    Form::new("bmsk", &["wrap"], "t=uu", &[(Type::B32, binary::<Bmsk>)]),
    Form::new("bmsk", &["clamp"], "t=uu", &[(Type::B32, binary::<Bmsk>)]).with(1),
    Form::new("szext", &["wrap"], "t=tu", table![binary Szext: U32 u32, S32 i32]),
    Form::new("szext", &["clamp"], "t=tu", table![binary Szext: U32 u32, S32 i32]).with(1),
    Form::new("dp4a", &["u32"], "u=tuu", table![ternary Dp4aU: U32 u8, S32 i8]),
    Form::new("dp4a", &["s32"], "u=tuu", table![ternary Dp4aS: U32 u8, S32 i8]),
    Form::new("dp2a", &["lo", "u32"], "u=tuu", table![ternary Dp2aU: U32 u16, S32 i16]),
    Form::new("dp2a", &["lo", "s32"], "u=tuu", table![ternary Dp2aS: U32 u16, S32 i16]),
    Form::new("dp2a", &["hi", "u32"], "u=tuu", table![ternary Dp2aU: U32 u16, S32 i16]).with(16),
    Form::new("dp2a", &["hi", "s32"], "u=tuu", table![ternary Dp2aS: U32 u16, S32 i16]).with(16),
];

/// Decodes the instructions of this family.
///
/// # Errors
/// The instruction is wrong, or not built.
pub fn decode(d: &mut Decoder<'_, '_>, inst: &Instruction<'_>) -> Result<(), Refusal> {
    // A divisor that is a number other than 0 needs no check.
    let divides = matches!(inst.opcode, "div" | "rem");
    if !divides || matches!(inst.operands.last(), Some(Operand::Integer(n)) if n & 0xffff != 0) {
        forms::decode(d, FORMS, Class::Integer, inst)?;
        return Ok(());
    }
    let (form, ty, handler) = forms::find(FORMS, inst)?;
    let (dsts, srcs) = forms::registers(d, form, ty, inst)?;
    let handler = handler(d.isa);
    d.warp(Divide { handler }, Class::Integer, &dsts, &srcs);
    Ok(())
}

// -------------------------------------------------------------------------------------------------- integers

/// An integer of 16, 32 or 64 bits.
pub(super) trait Int: Value + Ord {
    /// The type of a whole product.
    type Wide: Copy;
    const BITS: u32;
    const ZERO: Self;
    const ONE: Self;
    fn add(self, b: Self) -> Self;
    fn sub(self, b: Self) -> Self;
    fn add_sat(self, b: Self) -> Self;
    fn sub_sat(self, b: Self) -> Self;
    fn mul_lo(self, b: Self) -> Self;
    fn mul_wide(self, b: Self) -> Self::Wide;
    fn add_wide(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    fn high(product: Self::Wide) -> Self;
    /// a + b + carry as unsigned numbers, and the carry out.
    fn add_carry(self, b: Self, carry: bool) -> (Self, bool);
    /// a - (b + borrow) as unsigned numbers, and the borrow out.
    fn sub_borrow(self, b: Self, borrow: bool) -> (Self, bool);
    /// Shifted by any number of bits; zeros, or copies of the sign, come in.
    fn shl(self, n: u32) -> Self;
    fn shr(self, n: u32) -> Self;
    fn not(self) -> Self;
    fn and(self, b: Self) -> Self;
    fn or(self, b: Self) -> Self;
    fn xor(self, b: Self) -> Self;
    /// The unsigned bits.
    fn bits(self) -> u64;
}

macro_rules! ints {
    ($($t:ident $u:ident $wide:ident;)*) => {$(
        impl Int for $t {
            type Wide = $wide;
            const BITS: u32 = $t::BITS;
            const ZERO: Self = 0;
            const ONE: Self = 1;
            #[inline(always)]
            fn add(self, b: Self) -> Self { self.wrapping_add(b) }
            #[inline(always)]
            fn sub(self, b: Self) -> Self { self.wrapping_sub(b) }
            #[inline(always)]
            fn add_sat(self, b: Self) -> Self { self.saturating_add(b) }
            #[inline(always)]
            fn sub_sat(self, b: Self) -> Self { self.saturating_sub(b) }
            #[inline(always)]
            fn mul_lo(self, b: Self) -> Self { self.wrapping_mul(b) }
            #[inline(always)]
            fn mul_wide(self, b: Self) -> $wide { $wide::from(self) * $wide::from(b) }
            #[inline(always)]
            fn add_wide(a: $wide, b: $wide) -> $wide { a.wrapping_add(b) }
            #[inline(always)]
            fn high(product: $wide) -> Self { (product >> $t::BITS) as Self }
            #[inline(always)]
            fn add_carry(self, b: Self, carry: bool) -> (Self, bool) {
                let (sum, one) = (self as $u).overflowing_add(b as $u);
                let (sum, two) = sum.overflowing_add(carry.into());
                (sum as Self, one | two)
            }
            #[inline(always)]
            fn sub_borrow(self, b: Self, borrow: bool) -> (Self, bool) {
                let (difference, one) = (self as $u).overflowing_sub(b as $u);
                let (difference, two) = difference.overflowing_sub(borrow.into());
                (difference as Self, one | two)
            }
            #[inline(always)]
            fn shl(self, n: u32) -> Self { if n < $t::BITS { self << n } else { 0 } }
            #[inline(always)]
            fn shr(self, n: u32) -> Self {
                // Twice where the shift takes all bits: zeros or signs are left.
                if n < $t::BITS { self >> n } else { self >> ($t::BITS - 1) >> 1 }
            }
            #[inline(always)]
            fn not(self) -> Self { !self }
            #[inline(always)]
            fn and(self, b: Self) -> Self { self & b }
            #[inline(always)]
            fn or(self, b: Self) -> Self { self | b }
            #[inline(always)]
            fn xor(self, b: Self) -> Self { self ^ b }
            #[inline(always)]
            fn bits(self) -> u64 { u64::from(self as $u) }
        }
    )*};
}
ints! {
    u16 u16 u32; i16 u16 i32;
    u32 u32 u64; i32 u32 i64;
    u64 u64 u128; i64 u64 i128;
}

/// Defines operations on integers: `name<T>(imm, a, b) -> result`.
macro_rules! ops {
    ($($(#[$doc:meta])* $lift:ident $name:ident<$t:ident: $bound:path>($($arg:tt)*) -> $d:ty $body:block)*) => {$(
        $(#[$doc])*
        pub(super) struct $name<T>(PhantomData<T>);
        ops!(@ $lift $name $t $bound; ($($arg)*) $d; $body);
    )*};
    (@ Carry $name:ident $t:ident $bound:path;
     ($imm:tt, $a:ident, $b:ident, $c:ident, $carry:ident) $d:ty; $body:block) => {
        impl<$t: $bound> Carry for $name<$t> {
            type A = $t;
            #[inline(always)]
            fn eval($imm: u64, $a: $t, $b: $t, $c: $t, $carry: bool) -> $d $body
        }
    };
    // The word says how many operands there are; with another number nothing here matches.
    (@ Unary $name:ident $t:ident $bound:path; ($imm:tt, $a:ident: $A:ty) $d:ty; $body:block) => {
        lane_op!([$t: $bound] $name<$t>, |$imm, $a: $A| -> $d $body);
    };
    (@ Binary $name:ident $t:ident $bound:path; ($imm:tt, $a:ident: $A:ty, $b:ident: $B:ty) $d:ty; $body:block) => {
        lane_op!([$t: $bound] $name<$t>, |$imm, $a: $A, $b: $B| -> $d $body);
    };
    (@ Ternary $name:ident $t:ident $bound:path;
     ($imm:tt, $a:ident: $A:ty, $b:ident: $B:ty, $c:ident: $C:ty) $d:ty; $body:block) => {
        lane_op!([$t: $bound] $name<$t>, |$imm, $a: $A, $b: $B, $c: $C| -> $d $body);
    };
}
pub(super) use ops; // also logic.rs

/// An integer whose product is a register's value.
trait Widening: Int<Wide: Value> {}
impl<T: Int<Wide: Value>> Widening for T {}

ops! {
    Binary Add<T: Int>(_, a: T, b: T) -> T { a.add(b) }
    Binary Sub<T: Int>(_, a: T, b: T) -> T { a.sub(b) }
    Binary AddSat<T: Int>(_, a: T, b: T) -> T { a.add_sat(b) }
    Binary SubSat<T: Int>(_, a: T, b: T) -> T { a.sub_sat(b) }
    Binary MulLo<T: Int>(_, a: T, b: T) -> T { a.mul_lo(b) }
    Binary MulHi<T: Int>(_, a: T, b: T) -> T { T::high(a.mul_wide(b)) }
    Binary MulWide<T: Widening>(_, a: T, b: T) -> T::Wide { a.mul_wide(b) }
    Ternary MadLo<T: Int>(_, a: T, b: T, c: T) -> T { a.mul_lo(b).add(c) }
    Ternary MadHi<T: Int>(_, a: T, b: T, c: T) -> T { T::high(a.mul_wide(b)).add(c) }
    Ternary MadHiSat<T: Int>(_, a: T, b: T, c: T) -> T { T::high(a.mul_wide(b)).add_sat(c) }
    Ternary MadWide<T: Widening>(_, a: T, b: T, c: T::Wide) -> T::Wide { T::add_wide(a.mul_wide(b), c) }
    Carry CarryAdd<T: Int>(_, a, b, _c, carry) -> (T, bool) { a.add_carry(b, carry) }
    /// The ISA calls the flag behind a subtraction its borrow. Hardware adds the complement, so the flag is 1 where
    /// nothing was borrowed. Code that mixes both shows it: nvcc's own 128-bit division reads a borrow with `addc`.
    Carry CarrySub<T: Int>(first, a, b, _c, carry) -> (T, bool) {
        let (difference, borrow) = a.sub_borrow(b, first == 0 && !carry);
        (difference, !borrow)
    }
    Carry CarryMadLo<T: Int>(_, a, b, c, carry) -> (T, bool) { a.mul_lo(b).add_carry(c, carry) }
    Carry CarryMadHi<T: Int>(_, a, b, c, carry) -> (T, bool) { T::high(a.mul_wide(b)).add_carry(c, carry) }
    Ternary Sad<T: Int>(_, a: T, b: T, c: T) -> T { if a < b { b.sub(a) } else { a.sub(b) }.add(c) }
    Unary Abs<T: Int>(_, a: T) -> T { if a < T::ZERO { T::ZERO.sub(a) } else { a } }
    Unary Neg<T: Int>(_, a: T) -> T { T::ZERO.sub(a) }
    Binary Min<T: Int>(_, a: T, b: T) -> T { a.min(b) }
    Binary Max<T: Int>(_, a: T, b: T) -> T { a.max(b) }
    Binary MinRelu<T: Int>(_, a: T, b: T) -> T { a.min(b).max(T::ZERO) }
    Binary MaxRelu<T: Int>(_, a: T, b: T) -> T { a.max(b).max(T::ZERO) }
}

/// A 16-bit operation for each half of 32 bits.
pub(super) struct Halves<O>(PhantomData<O>);

lane_op!([T: Value<Raw = u32>, O: Binary<A = T, B = T, D = T>] Halves<O>, |imm, a: u32, b: u32| -> u32 {
    let low = O::eval(imm, T::from_raw(a & 0xffff), T::from_raw(b & 0xffff)).into_raw();
    let high = O::eval(imm, T::from_raw(a >> 16), T::from_raw(b >> 16)).into_raw();
    high << 16 | low
});

type AddHalves<T> = Halves<Add<T>>;
type SubHalves<T> = Halves<Sub<T>>;
type AddSatHalves<T> = Halves<AddSat<T>>;
type MinHalves<T> = Halves<Min<T>>;
type MaxHalves<T> = Halves<Max<T>>;
type MinReluHalves<T> = Halves<MinRelu<T>>;
type MaxReluHalves<T> = Halves<MaxRelu<T>>;

/// 24-bit numbers in 32 bits; the upper 8 are ignored.
trait Low24: Int {
    fn low24(self) -> i64;
    fn low32(wide: i64) -> Self;
}
impl Low24 for u32 {
    #[inline(always)]
    fn low24(self) -> i64 {
        i64::from(self & 0xff_ffff)
    }
    #[inline(always)]
    fn low32(wide: i64) -> Self {
        wide as u32
    }
}
impl Low24 for i32 {
    #[inline(always)]
    fn low24(self) -> i64 {
        i64::from(self << 8 >> 8)
    }
    #[inline(always)]
    fn low32(wide: i64) -> Self {
        wide as i32
    }
}

ops! {
    /// The 32 bits of the 48-bit product from bit `from` on, plus c.
    Ternary Mad24<T: Low24>(from, a: T, b: T, c: T) -> T { T::low32((a.low24() * b.low24()) >> (from & 63)).add(c) }
    Ternary Mad24Sat<T: Low24>(from, a: T, b: T, c: T) -> T {
        T::low32((a.low24() * b.low24()) >> (from & 63)).add_sat(c)
    }
}

// -------------------------------------------------------------------------------------------------- division

/// Quotient and remainder. Division by zero gives all ones for both, as the instruction sequence does that hardware
/// runs for it (it has no divider); the smallest number by -1 gives itself, remainder 0.
trait Divisible: Value {
    fn quotient(self, b: Self) -> Self;
    fn remainder(self, b: Self) -> Self;
}

impl Divisible for u32 {
    /// Through f64, which vectorises: a quotient of 32-bit numbers is at least 2^-32 away from the next integer that
    /// it is not, and f64 has 53 bits, so that rounding cannot reach it.
    #[inline(always)]
    fn quotient(self, b: Self) -> Self {
        let q = (f64::from(self) / f64::from(b)) as u32;
        if b == 0 { u32::MAX } else { q }
    }
    #[inline(always)]
    fn remainder(self, b: Self) -> Self {
        let r = self.wrapping_sub(self.quotient(b).wrapping_mul(b));
        if b == 0 { u32::MAX } else { r }
    }
}

impl Divisible for i32 {
    #[inline(always)]
    fn quotient(self, b: Self) -> Self {
        let q = self.unsigned_abs().quotient(b.unsigned_abs()) as i32;
        // All ones of a division by zero stay all ones.
        if (self ^ b) < 0 && b != 0 { q.wrapping_neg() } else { q }
    }
    #[inline(always)]
    fn remainder(self, b: Self) -> Self {
        let r = self.wrapping_sub(self.quotient(b).wrapping_mul(b));
        if b == 0 { -1 } else { r }
    }
}

macro_rules! divisible {
    ($($t:ident $wide:ident;)*) => {$(
        impl Divisible for $t {
            #[inline(always)]
            fn quotient(self, b: Self) -> Self { $wide::from(self).quotient(b.into()) as $t }
            #[inline(always)]
            fn remainder(self, b: Self) -> Self { $wide::from(self).remainder(b.into()) as $t }
        }
    )*};
    (64: $($t:ident)*) => {$(
        impl Divisible for $t {
            #[inline(always)]
            fn quotient(self, b: Self) -> Self { if b == 0 { !0 } else { self.wrapping_div(b) } }
            #[inline(always)]
            fn remainder(self, b: Self) -> Self { if b == 0 { !0 } else { self.wrapping_rem(b) } }
        }
    )*};
}
divisible!(u16 u32; i16 i32;);
divisible!(64: u64 i64);

ops! {
    Binary Div<T: Divisible>(_, a: T, b: T) -> T { a.quotient(b) }
    Binary Rem<T: Divisible>(_, a: T, b: T) -> T { a.remainder(b) }
}

/// A division. Where the divisor is zero the result counts as one that nobody wrote, because compilers compute ahead what
/// they may not need.
#[derive(Debug)]
struct Divide {
    handler: LaneFn,
}

impl WarpOp for Divide {
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop> {
        let divisor = inst.src(1);
        let regs = ctx.regs();
        let zero = match divisor.width {
            Width::B64 => zeros(regs.get::<u64>(divisor)),
            _ => zeros(regs.get::<u32>(divisor)),
        } & mask;
        (self.handler)(regs, inst, mask);
        let defined = regs.defined(inst.src(0)) & regs.defined(divisor);
        regs.set_defined(inst.dst(0), mask, defined & !zero);
        if zero != 0 {
            ctx.finding(ErrorKind::DivisionByZero, zero, None, || {
                "an integer is divided by zero: the result is undefined".to_owned()
            });
        }
        Ok(())
    }
}

fn zeros<T: Copy + Default + PartialEq>(row: &[T; LANES]) -> u32 {
    (0..LANES).fold(0, |mask, i| mask | u32::from(row[i] == T::default()) << i)
}

// -------------------------------------------------------------------------------------------------- bits

ops! {
    Unary Popc<T: Int>(_, a: T) -> u32 { a.bits().count_ones() }
    Unary Clz<T: Int>(_, a: T) -> u32 { a.bits().leading_zeros() - (64 - T::BITS) }
    Unary Brev<T: Reverse>(_, a: T) -> T { a.reverse() }
    /// Position of the highest bit that differs from the sign; `shiftamt`: how far it is from the top.
    Unary Bfind<T: Int>(shiftamt, a: T) -> u32 {
        let a = if a < T::ZERO { a.not() } else { a }.bits();
        let zeros = a.leading_zeros() - (64 - T::BITS);
        if a == 0 {
            u32::MAX
        } else if shiftamt != 0 {
            zeros
        } else {
            T::BITS - 1 - zeros
        }
    }
    /// Bits `pos .. pos + len` of a, extended by their highest for signed types. Positions above the top are the sign.
    Ternary Bfe<T: Int>(_, a: T, pos: u32, len: u32) -> T {
        let (pos, len) = (pos & 0xff, len & 0xff);
        let unused = T::BITS - len.min(T::BITS);
        a.shr(pos).shl(unused).shr(unused)
    }
}

/// An integer with its bits in reverse order.
trait Reverse: Int {
    fn reverse(self) -> Self;
}
impl Reverse for u32 {
    #[inline(always)]
    fn reverse(self) -> Self {
        self.reverse_bits()
    }
}
impl Reverse for u64 {
    #[inline(always)]
    fn reverse(self) -> Self {
        self.reverse_bits()
    }
}

/// The lowest `len` bits of a replace the bits of b from `pos` on; bits beyond the top are lost.
struct Bfi<T>(PhantomData<T>);

macro_rules! bfi {
    ($($t:ident)*) => {$(
        impl Quaternary for Bfi<$t> {
            type A = $t;
            type B = $t;
            type C = u32;
            type E = u32;
            type D = $t;
            #[inline(always)]
            fn eval(_: u64, a: $t, b: $t, pos: u32, len: u32) -> $t {
                let (pos, len) = (pos & 0xff, len & 0xff);
                let field = Int::shl(!Int::shl(!0, len), pos);
                Int::shl(a, pos) & field | b & !field
            }
        }
    )*};
}
bfi!(u32 u64);

/// The n-th set bit of a mask, counted from `base` upwards, or downwards for a negative n.
struct Fns;

lane_op!(Fns, |_, mask: u32, base: u32, n: i32| -> u32 {
    if base > 31 {
        return u32::MAX; // undefined; no bit is there
    }
    let mut rest = match n {
        0 => mask & 1 << base,
        1.. => mask & u32::MAX << base,
        // Downwards is upwards in the reversed mask.
        _ => (mask & u32::MAX >> (31 - base)).reverse_bits(),
    };
    let skipped = n.unsigned_abs().saturating_sub(1);
    if skipped >= 32 {
        return u32::MAX;
    }
    for _ in 0..skipped {
        rest &= rest.wrapping_sub(1);
    }
    match (rest, n) {
        (0, _) => u32::MAX,
        (_, ..0) => 31 - rest.trailing_zeros(),
        _ => rest.trailing_zeros(),
    }
});

/// `b` ones from bit `a` on; `imm` 1 clamps: a position or width of 32 and more is taken as such, not modulo 32.
struct Bmsk;

lane_op!(Bmsk, |clamp, a: u32, b: u32| -> u32 {
    let (a, b) = if clamp != 0 { (a.min(32), b.min(32)) } else { (a & 31, b & 31) };
    Int::shl(!Int::shl(u32::MAX, b), a)
});

ops! {
    /// The lowest b bits of a, extended; `imm` 1 clamps b (32 and more keep all), otherwise it counts modulo 32.
    Binary Szext<T: Int>(clamp, a: T, b: u32) -> T {
        let b = if clamp != 0 { b.min(T::BITS) } else { b & (T::BITS - 1) };
        a.shl(T::BITS - b).shr(T::BITS - b)
    }
}

// -------------------------------------------------------------------------------------------------- dot products

/// 8 or 16 bits as a number.
trait Part: Copy {
    const BITS: u32;
    fn number(bits: u32) -> i32;
}

macro_rules! parts {
    ($($t:ident)*) => {$(
        impl Part for $t {
            const BITS: u32 = $t::BITS;
            #[inline(always)]
            fn number(bits: u32) -> i32 { i32::from(bits as $t) }
        }
    )*};
}
parts!(u8 i8 u16 i16);

/// c plus the products of the parts of a with the bytes of b, from bit `imm` of b on.
struct Dot<A, B>(PhantomData<(A, B)>);

lane_op!([A: Part, B: Part] Dot<A, B>, |from, a: u32, b: u32, c: u32| -> u32 {
    let b = b >> (from & 31);
    (0..32 / A::BITS).fold(c, |sum, i| {
        sum.wrapping_add((A::number(a >> (i * A::BITS)) * B::number(b >> (i * B::BITS))) as u32)
    })
});

type Dp4aU<A> = Dot<A, u8>;
type Dp4aS<A> = Dot<A, i8>;
type Dp2aU<A> = Dot<A, u8>;
type Dp2aS<A> = Dot<A, i8>;
