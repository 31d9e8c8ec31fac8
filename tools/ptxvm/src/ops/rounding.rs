//! Floating-point values taken apart, and their rounding to any binary format: the slow path of every rounding mode.
//!
//! A finite value is `±sig * 2^exp` with 128 bits of significand. Where an operation cannot keep all bits, the lowest
//! one is set in their place ("sticky"); it lies so far below what any format keeps that rounding never sees the
//! difference.

use std::cmp::Ordering;

/// How a value between two neighbours is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mode {
    /// `.rn`, `.rni`: to nearest, ties to even.
    Even,
    /// `.rz`, `.rzi`: towards zero.
    Zero,
    /// `.rm`, `.rmi`: towards minus infinity.
    Down,
    /// `.rp`, `.rpi`: towards plus infinity.
    Up,
    /// `.rna`: to nearest, ties away from zero.
    Away,
}

impl Mode {
    /// The mode that was stored as a number.
    pub const fn from_bits(bits: u64) -> Self {
        match bits & 7 {
            0 => Self::Even,
            1 => Self::Zero,
            2 => Self::Down,
            3 => Self::Up,
            _ => Self::Away,
        }
    }

    /// The four modes of arithmetic, as modifiers.
    pub const ARITHMETIC: [(&'static str, Self); 4] =
        [("rn", Self::Even), ("rz", Self::Zero), ("rm", Self::Down), ("rp", Self::Up)];

    /// The four modes of rounding to an integer, as modifiers.
    pub const INTEGRAL: [(&'static str, Self); 4] =
        [("rni", Self::Even), ("rzi", Self::Zero), ("rmi", Self::Down), ("rpi", Self::Up)];
}

/// A binary format: sign, exponent, fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Width in bits.
    pub bits: u32,
    /// Bits of the fraction.
    pub fraction: u32,
    /// Exponent bias.
    pub bias: i32,
    /// The first pattern beyond the finite ones: infinity, or where there is none, NaN.
    pub limit: u64,
    /// Whether `limit` is infinity.
    pub infinite: bool,
    /// The NaN that is the result of an operation without a numeric one.
    pub nan: u64,
    /// Zero bits below the format in its register (tf32 lies in the upper bits of an f32).
    pub pad: u32,
}

const fn ieee(bits: u32, fraction: u32, nan: u64) -> Format {
    let exponent = bits - 1 - fraction;
    let limit = ((1 << exponent) - 1) << fraction;
    Format { bits, fraction, bias: (1 << (exponent - 1)) - 1, limit, infinite: true, nan, pad: 0 }
}

/// Half precision.
pub const F16: Format = ieee(16, 10, 0x7fff);
/// bfloat16.
pub const BF16: Format = ieee(16, 7, 0x7fff);
/// Single precision.
pub const F32: Format = ieee(32, 23, 0x7fff_ffff);
/// Double precision. The NaN is the one that NVIDIA's units make (`CUDART_NAN`).
pub const F64: Format = ieee(64, 52, 0xfff8_0000_0000_0000);
/// TensorFloat-32, in the upper 19 bits of a 32-bit register.
pub const TF32: Format = Format { pad: 13, ..ieee(19, 10, 0x3ffff) };
/// 8 bits with 2 of fraction.
pub const E5M2: Format = ieee(8, 2, 0x7f);
/// 8 bits with 3 of fraction, no infinity.
pub const E4M3: Format =
    Format { bits: 8, fraction: 3, bias: 7, limit: 0x7f, infinite: false, nan: 0x7f, pad: 0 };
/// 6 bits with 3 of fraction.
pub const E2M3: Format = finite(6, 3);
/// 6 bits with 2 of fraction.
pub const E3M2: Format = finite(6, 2);
/// 4 bits with 1 of fraction.
pub const E2M1: Format = finite(4, 1);

/// A format without infinity and NaN, whose greatest number stands for NaN, too.
const fn finite(bits: u32, fraction: u32) -> Format {
    let limit = 1 << (bits - 1);
    let bias = (1 << (bits - 2 - fraction)) - 1;
    Format { bits, fraction, bias, limit, infinite: false, nan: limit - 1, pad: 0 }
}

/// A finite value, `±sig * 2^exp`; `sig` is below 2^127.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finite {
    /// Whether it is negative, or the negative zero.
    pub negative: bool,
    /// Power of two of the lowest bit.
    pub exp: i32,
    /// Significand.
    pub sig: u128,
}

/// Any value of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Number {
    /// Not a number.
    Nan,
    /// Infinity, negative where true.
    Infinite(bool),
    /// Zero or a finite number.
    Finite(Finite),
}
use Number::{Infinite, Nan};

impl Finite {
    /// An integer.
    pub const fn integer(value: i128) -> Self {
        Self { negative: value < 0, exp: 0, sig: value.unsigned_abs() }
    }

    const fn is_zero(self) -> bool {
        self.sig == 0
    }

    /// Moves the leading bit to `bit`, upwards only where `sig` would lose bits otherwise.
    fn lifted(self, bit: u32) -> Self {
        let shift = bit as i32 - (127 - self.sig.leading_zeros() as i32);
        debug_assert!(shift >= 0 && self.sig != 0);
        Self { sig: self.sig << shift, exp: self.exp - shift, ..self }
    }

    fn negated(self) -> Self {
        Self { negative: !self.negative, ..self }
    }

    /// The sum; `mode` decides the sign of an exact zero.
    fn plus(self, other: Self, mode: Mode) -> Self {
        if self.is_zero() && other.is_zero() {
            let negative = if self.negative == other.negative { self.negative } else { mode == Mode::Down };
            return Self { negative, ..self };
        }
        if self.is_zero() || other.is_zero() {
            return if self.is_zero() { other } else { self };
        }
        let (a, b) = (self.lifted(125), other.lifted(125));
        let (big, small) = if a.exp >= b.exp { (a, b) } else { (b, a) };
        let shift = (big.exp - small.exp) as u32;
        // Only a product can have more than 53 bits, and 106 of them leave room for the 20 zeros below, so that a
        // shift which loses bits is followed by a cancellation of one bit at most.
        let low = if shift > 126 { 1 } else { jam(small.sig, shift) };
        if big.negative == small.negative {
            return Self { sig: big.sig + low, ..big };
        }
        match big.sig.cmp(&low) {
            Ordering::Equal => Self { negative: mode == Mode::Down, exp: 0, sig: 0 },
            Ordering::Greater => Self { sig: big.sig - low, ..big },
            Ordering::Less => Self { sig: low - big.sig, negative: small.negative, ..big },
        }
    }

    /// The product, exact: sources have at most 53 bits.
    fn times(self, other: Self) -> Self {
        Self {
            negative: self.negative != other.negative,
            exp: self.exp + other.exp,
            sig: self.sig * other.sig,
        }
    }

    /// Rounds to an integer.
    pub fn integral(self, mode: Mode) -> Self {
        if self.exp >= 0 {
            return self;
        }
        Self { sig: self.shifted(-self.exp, mode), exp: 0, ..self }
    }

    /// The significand shifted right and rounded.
    fn shifted(self, shift: i32, mode: Mode) -> u128 {
        if shift <= 0 {
            return self.sig << -shift;
        }
        // `sig` is below 2^127: all of it lies below half of the lowest bit when it moves by 128 or more.
        let (kept, rest, half) = if shift >= 128 {
            (0, u128::from(self.sig != 0), 2)
        } else {
            (self.sig >> shift, self.sig & ((1 << shift) - 1), 1 << (shift - 1))
        };
        let up = match mode {
            Mode::Even => rest > half || rest == half && kept & 1 != 0,
            Mode::Away => rest >= half,
            Mode::Zero => false,
            Mode::Down => self.negative && rest != 0,
            Mode::Up => !self.negative && rest != 0,
        };
        kept + u128::from(up)
    }

    /// The value as an integer, rounded; beyond 2^126 it stays there.
    pub fn to_integer(self, mode: Mode) -> i128 {
        let whole = self.integral(mode);
        let magnitude = if whole.is_zero() {
            0
        } else if whole.exp as u32 >= whole.sig.leading_zeros() {
            1 << 126
        } else {
            (whole.sig << whole.exp).min(1 << 126) as i128
        };
        if self.negative { -magnitude } else { magnitude }
    }
}

/// Shifts right; the lowest bit is set if a bit that is shifted out was.
fn jam(sig: u128, shift: u32) -> u128 {
    let kept = sig >> shift;
    kept | u128::from(kept << shift != sig)
}

impl Number {
    /// Takes a value apart.
    pub fn unpack(bits: u64, format: Format) -> Self {
        let bits = bits >> format.pad;
        let negative = bits >> (format.bits - 1) & 1 != 0;
        let magnitude = bits & ((1 << (format.bits - 1)) - 1);
        if magnitude >= format.limit {
            return if format.infinite && magnitude == format.limit { Infinite(negative) } else { Nan };
        }
        let fraction = u128::from(magnitude & ((1 << format.fraction) - 1));
        let exponent = (magnitude >> format.fraction) as i32;
        let sig = if exponent == 0 { fraction } else { fraction | 1 << format.fraction };
        let exp = exponent.max(1) - format.bias - format.fraction as i32;
        Self::Finite(Finite { negative, exp, sig })
    }

    /// The value in a format, rounded. `saturate` gives the greatest finite number for anything beyond it
    /// (`.satfinite`).
    pub fn pack(self, format: Format, mode: Mode, saturate: bool) -> u64 {
        let sign = |negative: bool| u64::from(negative) << (format.bits - 1);
        let value = match self {
            Nan => format.nan,
            Infinite(negative) if saturate => sign(negative) | (format.limit - 1),
            // A format without infinity has its NaN there.
            Infinite(negative) => sign(negative) | format.limit,
            Self::Finite(value) if value.is_zero() => sign(value.negative),
            Self::Finite(value) => {
                let fraction = format.fraction as i32;
                let leading = value.exp + 127 - value.sig.leading_zeros() as i32;
                let lowest = leading.max(1 - format.bias) - fraction;
                let beyond = leading > (format.limit >> format.fraction) as i32 - format.bias;
                // The leading bit of a normal number adds 1 to the exponent field, as does a carry of the rounding.
                let field = (lowest + fraction + format.bias - 1) as u64;
                let magnitude = if beyond {
                    format.limit
                } else {
                    (field << format.fraction) + value.shifted(lowest - value.exp, mode) as u64
                };
                let towards_zero = match mode {
                    Mode::Zero => true,
                    Mode::Down => !value.negative,
                    Mode::Up => value.negative,
                    Mode::Even | Mode::Away => false,
                };
                let magnitude = if magnitude < format.limit {
                    magnitude
                } else if saturate || towards_zero {
                    format.limit - 1
                } else {
                    format.limit
                };
                sign(value.negative) | magnitude
            }
        };
        value << format.pad
    }

    fn negative(self) -> bool {
        match self {
            Nan => false,
            Infinite(negative) => negative,
            Self::Finite(value) => value.negative,
        }
    }

    fn is_zero(self) -> bool {
        matches!(self, Self::Finite(value) if value.is_zero())
    }

    /// -a
    #[must_use]
    pub fn negated(self) -> Self {
        match self {
            Nan => Nan,
            Infinite(negative) => Infinite(!negative),
            Self::Finite(value) => Self::Finite(value.negated()),
        }
    }

    /// a + b
    #[must_use]
    pub fn plus(self, other: Self, mode: Mode) -> Self {
        match (self, other) {
            (Nan, _) | (_, Nan) => Nan,
            (Infinite(a), Infinite(b)) => {
                if a == b {
                    Infinite(a)
                } else {
                    Nan
                }
            }
            (Infinite(a), _) | (_, Infinite(a)) => Infinite(a),
            (Self::Finite(a), Self::Finite(b)) => Self::Finite(a.plus(b, mode)),
        }
    }

    /// a * b
    #[must_use]
    pub fn times(self, other: Self) -> Self {
        match (self, other) {
            (Nan, _) | (_, Nan) => Nan,
            (Self::Finite(a), Self::Finite(b)) => Self::Finite(a.times(b)),
            // An infinity and something else.
            (a, b) if a.is_zero() || b.is_zero() => Nan,
            (a, b) => Infinite(a.negative() != b.negative()),
        }
    }

    /// a / b
    #[must_use]
    pub fn over(self, other: Self) -> Self {
        let negative = self.negative() != other.negative();
        match (self, other) {
            (Nan, _) | (_, Nan) | (Infinite(_), Infinite(_)) => Nan,
            (Infinite(_), _) => Infinite(negative),
            (_, Infinite(_)) => Self::Finite(Finite { negative, exp: 0, sig: 0 }),
            (Self::Finite(a), Self::Finite(b)) => match (a.is_zero(), b.is_zero()) {
                (true, true) => Nan,
                (true, false) => Self::Finite(Finite { negative, ..a }),
                (false, true) => Infinite(negative),
                (false, false) => {
                    // 127 bits by at most 53: a quotient of 73 bits or more.
                    let a = a.lifted(126);
                    let sig = (a.sig / b.sig) | u128::from(a.sig % b.sig != 0);
                    Self::Finite(Finite { negative, exp: a.exp - b.exp, sig })
                }
            },
        }
    }

    /// The square root.
    #[must_use]
    pub fn root(self) -> Self {
        match self {
            Self::Finite(a) if a.is_zero() => self,
            Infinite(false) => self,
            Self::Finite(a) if !a.negative => {
                let a = a.lifted(126);
                // The exponent must be even; a root of 63 bits.
                let a = if a.exp & 1 == 0 { a } else { Finite { sig: a.sig >> 1, exp: a.exp + 1, ..a } };
                let root = a.sig.isqrt();
                let sig = root << 1 | u128::from(root * root != a.sig);
                Self::Finite(Finite { negative: false, exp: a.exp / 2 - 1, sig })
            }
            _ => Nan,
        }
    }
}

/// Flags of modifiers beside the rounding mode, which takes bits 0 to 2 of an instruction's constants.
pub mod flag {
    /// `.ftz`: subnormal sources and results become zeros of their sign.
    pub const FTZ: u64 = 1 << 3;
    /// `.sat`: the result is held in [0, 1], NaN becomes +0.
    pub const SAT: u64 = 1 << 4;
    /// `.relu`: negative results become +0.
    pub const RELU: u64 = 1 << 5;
    /// `.NaN`: a NaN source makes the result NaN.
    pub const NAN: u64 = 1 << 6;
    /// `.xorsign.abs`: magnitudes are compared, the result's sign is the xor of the sources'.
    pub const XORSIGN_ABS: u64 = 1 << 7;
    /// `.satfinite`: results beyond the greatest finite number become that.
    pub const SATFINITE: u64 = 1 << 8;
}
