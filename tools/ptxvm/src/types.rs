//! Scalar types and state spaces of PTX (PTX ISA, "Types" and "State Spaces").

use std::fmt;

macro_rules! types {
    ($($name:ident $text:literal $bits:literal $kind:ident),* $(,)?) => {
        /// A scalar type, as in `.reg .f32` or `add.s32`. Packed types (`f16x2`) are one 32-bit value.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Type { $(#[doc = concat!("`.", $text, "`")] $name),* }

        impl Type {
            /// The type that a modifier without its dot names.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)* _ => None }
            }

            /// The name without the dot.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text),* }
            }

            /// Width in bits; a predicate has 1.
            pub const fn bits(self) -> u32 {
                match self { $(Self::$name => $bits),* }
            }

            /// The interpretation of the bits.
            pub const fn kind(self) -> TypeKind {
                match self { $(Self::$name => TypeKind::$kind),* }
            }
        }
    };
}

types! {
    Pred "pred" 1 Predicate,
    B8 "b8" 8 Bits, B16 "b16" 16 Bits, B32 "b32" 32 Bits, B64 "b64" 64 Bits, B128 "b128" 128 Bits,
    U8 "u8" 8 Unsigned, U16 "u16" 16 Unsigned, U32 "u32" 32 Unsigned, U64 "u64" 64 Unsigned,
    S8 "s8" 8 Signed, S16 "s16" 16 Signed, S32 "s32" 32 Signed, S64 "s64" 64 Signed,
    F16 "f16" 16 Float, BF16 "bf16" 16 Float, F32 "f32" 32 Float, TF32 "tf32" 32 Float, F64 "f64" 64 Float,
    F16X2 "f16x2" 32 Float, BF16X2 "bf16x2" 32 Float, F32X2 "f32x2" 64 Float,
    U16X2 "u16x2" 32 Unsigned, S16X2 "s16x2" 32 Signed,
    E4M3X2 "e4m3x2" 16 Float, E5M2X2 "e5m2x2" 16 Float, E2M3X2 "e2m3x2" 16 Float, E3M2X2 "e3m2x2" 16 Float,
    E2M1X2 "e2m1x2" 8 Float, UE8M0X2 "ue8m0x2" 16 Float,
}

/// The family of a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TypeKind {
    /// True or false, one bit a lane.
    Predicate,
    /// Bits without an interpretation.
    Bits,
    /// Two's complement, read as not negative.
    Unsigned,
    /// Two's complement.
    Signed,
    /// IEEE 754 binary formats, bfloat16 and what is narrower, also packed.
    Float,
}

impl Type {
    /// Bytes in memory. A predicate cannot be stored; it counts as 1.
    pub const fn bytes(self) -> u32 {
        self.bits().div_ceil(8)
    }

    /// Whether the type is a signed integer.
    pub const fn is_signed(self) -> bool {
        matches!(self.kind(), TypeKind::Signed)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, ".{}", self.name())
    }
}

/// Where a variable or an access lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    /// No space named: the address says by itself which window it lies in.
    Generic,
    /// Memory of the device, seen by all blocks.
    Global,
    /// Memory of one block.
    Shared,
    /// Memory of one thread.
    Local,
    /// The constant bank of the module.
    Const,
    /// Parameters: of a kernel, or of a call.
    Param,
}

impl Space {
    /// The space that a modifier without its dot names; `shared::cta` and `param::entry` included.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "global" => Self::Global,
            "shared" | "shared::cta" => Self::Shared,
            "local" => Self::Local,
            "const" => Self::Const,
            "param" | "param::entry" | "param::func" => Self::Param,
            _ => return None,
        })
    }

    /// The name without the dot.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Generic => "generic",
            Self::Global => "global",
            Self::Shared => "shared",
            Self::Local => "local",
            Self::Const => "const",
            Self::Param => "param",
        }
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
