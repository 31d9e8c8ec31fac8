//! Floating point by definition: a value is an integer times a power of two of any size, and rounding looks for its
//! neighbours among all patterns of a format. Slow, and independent of how the machine computes.

use std::cmp::Ordering;

use num_bigint::{BigInt, BigUint, Sign};
use ptxvm::types::Type;

/// A binary format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Format {
    pub(crate) bits: u32,
    pub(crate) fraction: u32,
    /// The first magnitude that is not finite.
    pub(crate) limit: u64,
    pub(crate) bias: i64,
    /// Whether `limit` is infinity, not NaN.
    pub(crate) infinity: bool,
    pub(crate) nan: u64,
}

pub(crate) const F16: Format =
    Format { bits: 16, fraction: 10, limit: 0x7c00, bias: 15, infinity: true, nan: 0x7fff };
pub(crate) const BF16: Format =
    Format { bits: 16, fraction: 7, limit: 0x7f80, bias: 127, infinity: true, nan: 0x7fff };
pub(crate) const F32: Format =
    Format { bits: 32, fraction: 23, limit: 0x7f80_0000, bias: 127, infinity: true, nan: 0x7fff_ffff };
pub(crate) const F64: Format = Format {
    bits: 64,
    fraction: 52,
    limit: 0x7ff0_0000_0000_0000,
    bias: 1023,
    infinity: true,
    nan: 0xfff8_0000_0000_0000,
};
/// The upper 19 bits of an f32.
pub(crate) const TF32: Format =
    Format { bits: 19, fraction: 10, limit: 0x3fc00, bias: 127, infinity: true, nan: 0x3ffff };
pub(crate) const E4M3: Format =
    Format { bits: 8, fraction: 3, limit: 0x7f, bias: 7, infinity: false, nan: 0x7f };
pub(crate) const E5M2: Format =
    Format { bits: 8, fraction: 2, limit: 0x7c, bias: 15, infinity: true, nan: 0x7f };
pub(crate) const E2M3: Format =
    Format { bits: 6, fraction: 3, limit: 0x20, bias: 1, infinity: false, nan: 0x1f };
pub(crate) const E3M2: Format =
    Format { bits: 6, fraction: 2, limit: 0x20, bias: 3, infinity: false, nan: 0x1f };
pub(crate) const E2M1: Format = Format { bits: 4, fraction: 1, limit: 8, bias: 1, infinity: false, nan: 7 };

/// The format of a scalar type.
pub(crate) fn format_of(ty: Type) -> Format {
    match ty {
        Type::F16 | Type::F16X2 => F16,
        Type::BF16 | Type::BF16X2 => BF16,
        Type::F32 => F32,
        Type::F64 => F64,
        Type::TF32 => TF32,
        Type::E4M3X2 => E4M3,
        Type::E5M2X2 => E5M2,
        Type::E2M3X2 => E2M3,
        Type::E3M2X2 => E3M2,
        Type::E2M1X2 => E2M1,
        _ => panic!("{ty} is no floating-point type"),
    }
}

/// Rounding modes, named as the modifiers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Mode {
    Rn,
    Rz,
    Rm,
    Rp,
    Rna,
}

pub(crate) const MODES: [(&str, Mode); 4] =
    [(".rn", Mode::Rn), (".rz", Mode::Rz), (".rm", Mode::Rm), (".rp", Mode::Rp)];

/// `integer * 2^exp`
#[derive(Clone, Debug)]
pub(crate) struct Dyadic {
    pub(crate) integer: BigInt,
    pub(crate) exp: i64,
}

impl Dyadic {
    pub(crate) fn new(integer: impl Into<BigInt>, exp: i64) -> Self {
        Self { integer: integer.into(), exp }
    }

    fn aligned(&self, exp: i64) -> BigInt {
        &self.integer << (self.exp - exp) as u64
    }

    pub(crate) fn plus(&self, other: &Self) -> Self {
        let exp = self.exp.min(other.exp);
        Self { integer: self.aligned(exp) + other.aligned(exp), exp }
    }

    pub(crate) fn times(&self, other: &Self) -> Self {
        Self { integer: &self.integer * &other.integer, exp: self.exp + other.exp }
    }

    pub(crate) fn negative(&self) -> bool {
        self.integer.sign() == Sign::Minus
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.integer.sign() == Sign::NoSign
    }

    pub(crate) fn magnitude(&self) -> Self {
        Self { integer: BigInt::from(self.integer.magnitude().clone()), exp: self.exp }
    }

    /// Compares magnitudes.
    pub(crate) fn compare(&self, other: &Self) -> Ordering {
        // Where the leading bits differ nothing has to be aligned.
        let top = |x: &Self| if x.is_zero() { i64::MIN } else { x.exp + x.integer.bits() as i64 };
        top(self).cmp(&top(other)).then_with(|| {
            if self.is_zero() {
                return Ordering::Equal;
            }
            let exp = self.exp.min(other.exp);
            self.aligned(exp).magnitude().cmp(other.aligned(exp).magnitude())
        })
    }

    /// The nearest f64, for error bounds.
    pub(crate) fn to_f64(&self) -> f64 {
        let magnitude = self.magnitude();
        let bits = round(F64, Mode::Rn, self.negative(), |candidate| magnitude.compare(candidate));
        f64::from_bits(bits)
    }
}

/// A value of a format, taken apart.
#[derive(Clone, Debug)]
pub(crate) enum Exact {
    Nan,
    /// Negative if true.
    Infinite(bool),
    /// The sign says which zero it is.
    Finite(bool, Dyadic),
}

/// The value of a magnitude; `limit` is what would follow the greatest finite number.
fn value(format: Format, magnitude: u64) -> Dyadic {
    let fraction = magnitude & ((1 << format.fraction) - 1);
    let exponent = (magnitude >> format.fraction) as i64;
    let lowest = 1 - format.bias - i64::from(format.fraction);
    if exponent == 0 {
        return Dyadic::new(fraction, lowest);
    }
    Dyadic::new(fraction + (1 << format.fraction), lowest + exponent - 1)
}

/// What a pattern stands for.
pub(crate) fn decode(format: Format, bits: u64) -> Exact {
    let negative = bits >> (format.bits - 1) & 1 == 1;
    let magnitude = bits & ((1 << (format.bits - 1)) - 1);
    if magnitude > format.limit || magnitude == format.limit && !format.infinity {
        return Exact::Nan;
    }
    if magnitude == format.limit {
        return Exact::Infinite(negative);
    }
    let value = value(format, magnitude);
    Exact::Finite(negative, if negative { Dyadic::new(-value.integer, value.exp) } else { value })
}

/// The pattern that a value rounds to; `compare` says how its magnitude compares with a candidate.
pub(crate) fn round(
    format: Format,
    mode: Mode,
    negative: bool,
    compare: impl Fn(&Dyadic) -> Ordering,
) -> u64 {
    let sign = u64::from(negative) << (format.bits - 1);
    // The greatest finite magnitude that is not above the value.
    let (mut low, mut above) = (0, format.limit);
    while above - low > 1 {
        let middle = low + (above - low) / 2;
        if compare(&value(format, middle)) == Ordering::Less {
            above = middle;
        } else {
            low = middle;
        }
    }
    let below = value(format, low);
    if compare(&below) == Ordering::Equal {
        return sign | low;
    }
    let sum = below.plus(&value(format, low + 1));
    let middle = compare(&Dyadic::new(sum.integer, sum.exp - 1));
    let up = match mode {
        Mode::Rn => middle == Ordering::Greater || middle == Ordering::Equal && low & 1 == 1,
        Mode::Rna => middle != Ordering::Less,
        Mode::Rz => false,
        Mode::Rm => negative,
        Mode::Rp => !negative,
    };
    sign | (low + u64::from(up))
}

/// The pattern of an exact value; NaN is the format's.
pub(crate) fn encode(format: Format, mode: Mode, value: &Exact) -> u64 {
    match value {
        Exact::Nan => format.nan,
        Exact::Infinite(negative) => u64::from(*negative) << (format.bits - 1) | format.limit,
        Exact::Finite(negative, value) => {
            round(format, mode, *negative, |candidate| value.compare(candidate))
        }
    }
}

fn signed(negative: bool, value: Dyadic) -> Exact {
    let negative = if value.is_zero() { negative } else { value.negative() };
    Exact::Finite(negative, value)
}

/// The sum; of an exact zero the mode says the sign.
pub(crate) fn sum(a: &Exact, b: &Exact, mode: Mode) -> Exact {
    match (a, b) {
        (Exact::Nan, _) | (_, Exact::Nan) => Exact::Nan,
        (Exact::Infinite(x), Exact::Infinite(y)) if x != y => Exact::Nan,
        (Exact::Infinite(x), _) | (_, Exact::Infinite(x)) => Exact::Infinite(*x),
        (Exact::Finite(x, a), Exact::Finite(y, b)) => {
            signed(if x == y { *x } else { mode == Mode::Rm }, a.plus(b))
        }
    }
}

pub(crate) fn product(a: &Exact, b: &Exact) -> Exact {
    match (a, b) {
        (Exact::Nan, _) | (_, Exact::Nan) => Exact::Nan,
        (Exact::Infinite(x), Exact::Infinite(y)) => Exact::Infinite(x != y),
        (Exact::Infinite(x), Exact::Finite(y, b)) | (Exact::Finite(y, b), Exact::Infinite(x)) => {
            if b.is_zero() { Exact::Nan } else { Exact::Infinite(x != y) }
        }
        (Exact::Finite(x, a), Exact::Finite(y, b)) => signed(x != y, a.times(b)),
    }
}

pub(crate) fn negated(a: &Exact) -> Exact {
    match a {
        Exact::Nan => Exact::Nan,
        Exact::Infinite(x) => Exact::Infinite(!x),
        Exact::Finite(x, a) => Exact::Finite(!x, Dyadic::new(-a.integer.clone(), a.exp)),
    }
}

/// The rounded quotient; `None` for NaN.
pub(crate) fn quotient(format: Format, mode: Mode, a: &Exact, b: &Exact) -> Option<u64> {
    let sign = |negative: bool| u64::from(negative) << (format.bits - 1);
    Some(match (a, b) {
        (Exact::Nan, _) | (_, Exact::Nan) | (Exact::Infinite(_), Exact::Infinite(_)) => return None,
        (Exact::Infinite(x), Exact::Finite(y, _)) => sign(x != y) | format.limit,
        (Exact::Finite(x, _), Exact::Infinite(y)) => sign(x != y),
        (Exact::Finite(x, a), Exact::Finite(y, b)) => match (a.is_zero(), b.is_zero()) {
            (true, true) => return None,
            (true, false) => sign(x != y),
            (false, true) => sign(x != y) | format.limit,
            // |a / b| < c where |a| < |b| c
            (false, false) => round(format, mode, x != y, |c| a.compare(&b.times(c))),
        },
    })
}

/// The rounded square root; `None` for NaN.
pub(crate) fn root(format: Format, mode: Mode, a: &Exact) -> Option<u64> {
    match a {
        Exact::Finite(negative, a) if a.is_zero() => Some(u64::from(*negative) << (format.bits - 1)),
        Exact::Finite(false, a) => Some(round(format, mode, false, |c| a.compare(&c.times(c)))),
        Exact::Infinite(false) => Some(format.limit),
        _ => None,
    }
}

/// The value rounded to an integer.
pub(crate) fn integral(value: &Dyadic, mode: Mode) -> BigInt {
    if value.exp >= 0 {
        return &value.integer << value.exp as u64;
    }
    let one = BigUint::from(1u8) << (-value.exp) as u64;
    let magnitude = value.integer.magnitude();
    let (whole, rest) = (magnitude / &one, magnitude % &one);
    let twice = (&rest * 2u8).cmp(&one);
    let inexact = rest != BigUint::ZERO;
    let up = match mode {
        Mode::Rn => twice == Ordering::Greater || twice == Ordering::Equal && whole.bit(0),
        Mode::Rna => twice != Ordering::Less,
        Mode::Rz => false,
        Mode::Rm => inexact && value.negative(),
        Mode::Rp => inexact && !value.negative(),
    };
    BigInt::from_biguint(value.integer.sign(), whole + u8::from(up))
}

/// `.ftz`
pub(crate) fn flushed(format: Format, bits: u64) -> u64 {
    let sign = bits & 1 << (format.bits - 1);
    if (bits ^ sign) >> format.fraction == 0 { sign } else { bits }
}

/// `.sat`
pub(crate) fn saturated(format: Format, bits: u64) -> u64 {
    let one = (format.bias as u64) << format.fraction;
    match decode(format, bits) {
        Exact::Nan | Exact::Finite(true, _) | Exact::Infinite(true) => 0,
        _ => bits.min(one),
    }
}

/// Whether a pattern is NaN.
pub(crate) fn is_nan(format: Format, bits: u64) -> bool {
    matches!(decode(format, bits), Exact::Nan)
}

/// The NaN of an instruction: canonical, but for f64 the first NaN among the sources, made quiet.
pub(crate) fn nan(format: Format, sources: &[u64]) -> u64 {
    let first = sources.iter().find(|x| is_nan(format, **x));
    if format == F64 { first.map_or(F64.nan, |x| x | 1 << 51) } else { format.nan }
}

// ------------------------------------------------------------------------------------------------ inputs

/// A generator of pseudo-random bits (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 31
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    /// A pattern of the format: any, or one near 1 (where sums cancel), or near the ends of the exponent's range, with
    /// a long or a short fraction.
    pub(crate) fn pattern(&mut self, format: Format) -> u64 {
        let any = self.bits() & (u64::MAX >> (64 - format.bits));
        let kind = self.below(8);
        if kind < 3 {
            return any;
        }
        let last = format.limit >> format.fraction;
        let exponent = match kind {
            3 => self.below(4),
            4 => last - 1 - self.below(3),
            5 => (last / 2 - last / 4) + self.below(last / 2),
            _ => last / 2 - 2 + self.below(4),
        };
        let fraction = match self.below(4) {
            0 => 0,
            1 => any & (any >> 7) & (any >> 3),
            2 => any | (any >> 7) | (any >> 3),
            _ => any,
        } & ((1 << format.fraction) - 1);
        any & 1 << (format.bits - 1) | exponent << format.fraction | fraction
    }
}

/// The values at which something changes, with both signs.
pub(crate) fn edges(format: Format) -> Vec<u64> {
    let one = (format.bias as u64) << format.fraction;
    let step = 1 << format.fraction;
    let half = step / 2;
    let magnitudes = [
        0,
        1,
        2,
        half,
        step - 1,
        step,
        step + 1,
        one - step,
        one - 1,
        one,
        one + 1,
        one + half,
        one + step,
        one + (u64::from(format.fraction) << format.fraction),
        format.limit - step,
        format.limit - 1,
        format.limit,
        // NaNs: signalling and quiet.
        format.limit + 1,
        (format.limit | half) + 1,
    ];
    magnitudes.iter().flat_map(|m| [*m, m | 1 << (format.bits - 1)]).collect()
}

/// Columns of sources: the cross product of the edges (every n-th of them), then random rows.
pub(crate) fn sources<const N: usize>(
    format: Format,
    every: usize,
    random: usize,
    seed: u64,
) -> [Vec<u64>; N] {
    let edges = edges(format);
    let mut columns = [(); N].map(|()| Vec::new());
    for i in (0..edges.len().pow(N as u32)).step_by(every) {
        let mut rest = i;
        for column in &mut columns {
            column.push(edges[rest % edges.len()]);
            rest /= edges.len();
        }
    }
    let mut rng = Random(seed);
    for _ in 0..random {
        for column in &mut columns {
            column.push(rng.pattern(format));
        }
    }
    columns
}
