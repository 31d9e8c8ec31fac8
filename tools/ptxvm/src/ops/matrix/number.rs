//! The element types of matrix fragments: how they lie in registers, and how their products add up.

use bytemuck::Pod;

use crate::machine::registers::Value;

/// An element type of A, B, C or D.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Elem {
    F16,
    Bf16,
    Tf32,
    F32,
    F64,
    E4m3,
    E5m2,
    S8,
    U8,
    S4,
    U4,
    B1,
    S32,
}

impl Elem {
    pub(super) const NAMES: [(&'static str, Self); 13] = [
        ("f16", Self::F16),
        ("bf16", Self::Bf16),
        ("tf32", Self::Tf32),
        ("f32", Self::F32),
        ("f64", Self::F64),
        ("e4m3", Self::E4m3),
        ("e5m2", Self::E5m2),
        ("s8", Self::S8),
        ("u8", Self::U8),
        ("s4", Self::S4),
        ("u4", Self::U4),
        ("b1", Self::B1),
        ("s32", Self::S32),
    ];

    /// Width in memory and in a register.
    pub(super) const fn bits(self) -> u32 {
        match self {
            Self::F64 => 64,
            Self::Tf32 | Self::F32 | Self::S32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::E4m3 | Self::E5m2 | Self::S8 | Self::U8 => 8,
            Self::S4 | Self::U4 => 4,
            Self::B1 => 1,
        }
    }

    /// Elements of one register of a fragment.
    pub(super) const fn per_register(self) -> u8 {
        if matches!(self, Self::F64) { 1 } else { (32 / self.bits()) as u8 }
    }
}

// ------------------------------------------------------------------------------------------------ 16- and 8-bit floats

/// Exact.
#[inline(always)]
pub(super) fn f16_to_f32(h: u32) -> f32 {
    let bits = (h & 0x7fff) << 13;
    let exponent = h & 0x7c00;
    let normal = bits + (112 << 23) + if exponent == 0x7c00 { 112 << 23 } else { 0 };
    // A subnormal's bits are those of 2^-14 plus the value, once 2^-14's exponent is put there.
    let subnormal = (f32::from_bits(bits + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
    f32::from_bits((if exponent == 0 { subnormal } else { normal }) | (h & 0x8000) << 16)
}

/// Rounds to nearest even; NaN becomes 0x7fff.
#[inline(always)]
pub(super) fn f32_to_f16(x: f32) -> u32 {
    let bits = x.to_bits() & 0x7fff_ffff;
    let sign = x.to_bits() >> 16 & 0x8000;
    // A carry out of the significand is right as it is: it goes to the next power of two, or to infinity.
    let rounded = bits.wrapping_add(0xfff + (bits >> 13 & 1)) >> 13;
    let normal = rounded.wrapping_sub(112 << 10).min(0x7c00);
    // Beside 0.5 the last bit of an f32 is worth 2^-24, the last bit of a subnormal f16: the addition rounds.
    let subnormal = (f32::from_bits(bits) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let value = if bits < 113 << 23 { subnormal } else { normal };
    if bits > 0x7f80_0000 { 0x7fff } else { value | sign }
}

/// All values of `e4m3`: no infinities, one NaN.
pub(super) static E4M3: [f32; 256] = {
    let mut table = small_float(3, 7);
    (table[0x7f], table[0xff]) = (f32::NAN, f32::NAN);
    table
};
/// All values of `e5m2`.
pub(super) static E5M2: [f32; 256] = {
    let mut table = small_float(2, 15);
    (table[0x7c], table[0xfc]) = (f32::INFINITY, f32::NEG_INFINITY);
    let mut i = 0x7d;
    while i < 0x80 {
        (table[i], table[i | 0x80]) = (f32::NAN, f32::NAN);
        i += 1;
    }
    table
};
/// All values of `e2m3`.
pub(super) static E2M3: [f32; 64] = small_float(3, 1);
/// All values of `e3m2`.
pub(super) static E3M2: [f32; 64] = small_float(2, 3);
/// All values of `e2m1`.
pub(super) static E2M1: [f32; 16] = small_float(1, 1);

/// The values of a float of few bits without infinities and NaN.
const fn small_float<const N: usize>(mantissa_bits: u32, bias: i32) -> [f32; N] {
    let mut table = [0.0; N];
    let mut i = 0;
    while i < N {
        let magnitude = (i % (N / 2)) as u32;
        let exponent = magnitude >> mantissa_bits;
        let mantissa = magnitude & ((1 << mantissa_bits) - 1);
        let (lead, power) =
            if exponent == 0 { (0, 1 - bias) } else { (1 << mantissa_bits, exponent as i32 - bias) };
        // 2^(power - mantissa_bits), times the significand as an integer: exact.
        let unit = f32::from_bits(((power - mantissa_bits as i32 + 127) as u32) << 23);
        let value = (lead + mantissa) as f32 * unit;
        table[i] = if i >= N / 2 { -value } else { value };
        i += 1;
    }
    table
}

// ------------------------------------------------------------------------------------------------ products

/// Reads an element of a factor as a number that products are made of.
pub(super) trait Widen {
    type X: Copy + Default;
    /// Elements of a register.
    const E: usize;
    fn widen(word: u32, sub: usize) -> Self::X;
}

macro_rules! widen {
    ($($(#[$doc:meta])* $name:ident $x:ty, $e:literal, |$w:ident, $i:ident| $value:expr;)*) => {$(
        $(#[$doc])*
        pub(super) struct $name;
        impl Widen for $name {
            type X = $x;
            const E: usize = $e;
            #[inline(always)]
            fn widen($w: u32, $i: usize) -> $x { $value }
        }
    )*};
}
widen! {
    F16 f32, 2, |w, i| f16_to_f32(w >> (16 * i));
    Bf16 f32, 2, |w, i| f32::from_bits(w >> (16 * i) << 16);
    /// The upper 19 bits of an f32; the other 13 do not count.
    Tf32 f32, 1, |w, _i| f32::from_bits(w & !0x1fff);
    E4m3 f32, 4, |w, i| E4M3[(w >> (8 * i) & 0xff) as usize];
    E5m2 f32, 4, |w, i| E5M2[(w >> (8 * i) & 0xff) as usize];
    S8 i32, 4, |w, i| i32::from((w >> (8 * i)) as i8);
    U8 i32, 4, |w, i| i32::from((w >> (8 * i)) as u8);
    S4 i32, 8, |w, i| (w << (28 - 4 * i)) as i32 >> 28;
    U4 i32, 8, |w, i| (w >> (4 * i) & 0xf) as i32;
}

/// How the elements of A and B multiply and add up.
pub(super) trait Product {
    /// A register of A or B.
    type Word: Value;
    type X: Pod + Default;
    type Acc: Pod + Default;
    /// Elements of a register of A or B.
    const E: usize;
    /// Whether X and Acc are f32, and products and sums are fused.
    const F32: bool = false;
    fn a(word: <Self::Word as Value>::Raw, sub: usize) -> Self::X;
    fn b(word: <Self::Word as Value>::Raw, sub: usize) -> Self::X;
    fn mul_add(a: Self::X, b: Self::X, acc: Self::Acc) -> Self::Acc;
}

/// f32 sums of the products of narrower floats.
pub(super) struct Floats<A, B>(A, B);

impl<A: Widen<X = f32>, B: Widen<X = f32>> Product for Floats<A, B> {
    type Word = u32;
    type X = f32;
    type Acc = f32;
    const E: usize = A::E;
    const F32: bool = true;
    #[inline(always)]
    fn a(word: u32, sub: usize) -> f32 {
        A::widen(word, sub)
    }
    #[inline(always)]
    fn b(word: u32, sub: usize) -> f32 {
        B::widen(word, sub)
    }
    #[inline(always)]
    fn mul_add(a: f32, b: f32, acc: f32) -> f32 {
        a.mul_add(b, acc)
    }
}

/// Integer sums. 64 products of 8 bits never leave 32 bits; only the addition of C can, and wraps.
pub(super) struct Ints<A, B>(A, B);

impl<A: Widen<X = i32>, B: Widen<X = i32>> Product for Ints<A, B> {
    type Word = u32;
    type X = i32;
    type Acc = i32;
    const E: usize = A::E;
    #[inline(always)]
    fn a(word: u32, sub: usize) -> i32 {
        A::widen(word, sub)
    }
    #[inline(always)]
    fn b(word: u32, sub: usize) -> i32 {
        B::widen(word, sub)
    }
    #[inline(always)]
    fn mul_add(a: i32, b: i32, acc: i32) -> i32 {
        acc.wrapping_add(a.wrapping_mul(b))
    }
}

/// Counts of bits that are set in both factors, or for `XOR` in one of them; 32 elements at a time.
pub(super) struct Bits<const XOR: bool>;

impl<const XOR: bool> Product for Bits<XOR> {
    type Word = u32;
    type X = u32;
    type Acc = i32;
    const E: usize = 1;
    #[inline(always)]
    fn a(word: u32, _sub: usize) -> u32 {
        word
    }
    #[inline(always)]
    fn b(word: u32, _sub: usize) -> u32 {
        word
    }
    #[inline(always)]
    fn mul_add(a: u32, b: u32, acc: i32) -> i32 {
        acc.wrapping_add((if XOR { a ^ b } else { a & b }).count_ones() as i32)
    }
}

/// f64 throughout.
pub(super) struct Doubles;

impl Product for Doubles {
    type Word = f64;
    type X = f64;
    type Acc = f64;
    const E: usize = 1;
    #[inline(always)]
    fn a(word: u64, _sub: usize) -> f64 {
        f64::from_bits(word)
    }
    #[inline(always)]
    fn b(word: u64, _sub: usize) -> f64 {
        f64::from_bits(word)
    }
    #[inline(always)]
    fn mul_add(a: f64, b: f64, acc: f64) -> f64 {
        a.mul_add(b, acc)
    }
}
