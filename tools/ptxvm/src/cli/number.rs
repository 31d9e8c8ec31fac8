//! Types of elements: their names here and in npy files, and numbers from and to text.

macro_rules! elements {
    ($($name:ident $text:literal $npy:literal $bytes:literal),* $(,)?) => {
        /// The type of a number on the command line.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Element { $($name),* }

        impl Element {
            pub(crate) const NAMES: &[&str] = &[$($text),*];

            pub(crate) fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)* _ => None }
            }

            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// The type that NumPy writes so. `<V2` is what ml_dtypes makes of bfloat16.
            pub(crate) fn from_npy(descr: &str) -> Option<Self> {
                match descr { $($npy => Some(Self::$name),)* "|V2" => Some(Self::Bf16), _ => None }
            }

            pub(crate) const fn npy(self) -> &'static str {
                match self { $(Self::$name => $npy),* }
            }

            pub(crate) const fn bytes(self) -> usize {
                match self { $(Self::$name => $bytes),* }
            }
        }
    };
}

elements! {
    I8 "i8" "|i1" 1, I16 "i16" "<i2" 2, I32 "i32" "<i4" 4, I64 "i64" "<i8" 8,
    U8 "u8" "|u1" 1, U16 "u16" "<u2" 2, U32 "u32" "<u4" 4, U64 "u64" "<u8" 8,
    F16 "f16" "<f2" 2, Bf16 "bf16" "<V2" 2, F32 "f32" "<f4" 4, F64 "f64" "<f8" 8,
}

impl Element {
    /// Bits of exponent and of stored mantissa; `None` for integers.
    const fn float(self) -> Option<(u32, u32)> {
        match self {
            Self::F16 => Some((5, 10)),
            Self::Bf16 => Some((8, 7)),
            Self::F32 => Some((8, 23)),
            Self::F64 => Some((11, 52)),
            _ => None,
        }
    }

    const fn is_signed(self) -> bool {
        matches!(self, Self::I8 | Self::I16 | Self::I32 | Self::I64)
    }

    /// The bytes of a number, little-endian. Decimal fractions are rounded to the nearest value.
    pub(crate) fn parse(self, text: &str) -> Result<Vec<u8>, String> {
        let bits = if let Some((exponent, mantissa)) = self.float() {
            let wrong = || format!("`{text}` is no number");
            let bits = match self {
                Self::F32 => text.parse::<f32>().map_err(|_| wrong())?.to_bits().into(),
                Self::F64 => text.parse::<f64>().map_err(|_| wrong())?.to_bits(),
                _ => narrow(text.parse().map_err(|_| wrong())?, exponent, mantissa),
            };
            let infinite = bits & ((1 << (exponent + mantissa)) - 1) == ((1 << exponent) - 1) << mantissa;
            if infinite && !text.contains(['n', 'N']) {
                return Err(format!("`{text}` is too large for {}", self.name()));
            }
            bits
        } else {
            let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
            let (digits, radix) = digits.strip_prefix("0x").map_or((digits, 10), |rest| (rest, 16));
            // A second sign is no digit.
            let magnitude = digits.bytes().next().filter(u8::is_ascii_alphanumeric);
            let magnitude = magnitude.and_then(|_| i128::from_str_radix(digits, radix).ok());
            let value = magnitude.map(|m| if negative { -m } else { m });
            let bits = 8 * self.bytes() as u32;
            let (low, high) = if self.is_signed() {
                (-1i128 << (bits - 1), 1i128 << (bits - 1))
            } else {
                (0, 1i128 << bits)
            };
            let value = value.filter(|v| (low..high).contains(v));
            value.ok_or_else(|| format!("`{text}` is no integer of {low} to {}", high - 1))? as u64
        };
        Ok(bits.to_le_bytes()[..self.bytes()].to_vec())
    }

    /// A number as text, from its bytes, little-endian.
    pub(crate) fn text(self, bytes: &[u8]) -> String {
        let mut wide = [0; 8];
        wide[..self.bytes()].copy_from_slice(&bytes[..self.bytes()]);
        let bits = u64::from_le_bytes(wide);
        let unused = 64 - 8 * self.bytes() as u32;
        match self {
            Self::F16 => format!("{:?}", widen_f16(bits as u16)),
            Self::Bf16 => format!("{:?}", f32::from_bits((bits as u32) << 16)),
            Self::F32 => format!("{:?}", f32::from_bits(bits as u32)),
            Self::F64 => format!("{:?}", f64::from_bits(bits)),
            _ if self.is_signed() => ((bits << unused) as i64 >> unused).to_string(),
            _ => bits.to_string(),
        }
    }
}

/// Rounds to the nearest number with so many bits of exponent and of stored mantissa, ties to even; its bits.
fn narrow(x: f64, exponent: u32, mantissa: u32) -> u64 {
    let sign = u64::from(x.is_sign_negative()) << (exponent + mantissa);
    let infinity = ((1u64 << exponent) - 1) << mantissa;
    if x.is_nan() {
        return sign | infinity | 1 << (mantissa - 1);
    }
    let lowest = 2 - (1i32 << (exponent - 1));
    let own = ((x.to_bits() >> 52 & 0x7ff) as i32 - 1023).max(lowest);
    // In units of the last place: a power of two scales exactly, so that this is the only rounding. A carry into the
    // next binade is right by itself, as the bits of one binade follow those of the one below.
    let units = (x.abs() * 2f64.powi(mantissa as i32 - own)).round_ties_even();
    if !units.is_finite() {
        return sign | infinity;
    }
    sign | ((((own - lowest) as u64) << mantissa) + units as u64).min(infinity)
}

fn widen_f16(bits: u16) -> f32 {
    let (exponent, fraction) = (bits >> 10 & 0x1f, f32::from(bits & 0x3ff));
    let size = match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction == 0.0 => f32::INFINITY,
        31 => f32::NAN,
        e => (1024.0 + fraction) * 2f32.powi(i32::from(e) - 25),
    };
    if bits >> 15 == 1 { -size } else { size }
}
