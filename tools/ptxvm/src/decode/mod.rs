//! What decoding one instruction needs: names, registers, modifiers, and why an instruction is refused.

pub mod decoder;
pub mod mods;
pub mod symbols;

use crate::error::Kind;

/// Why an instruction cannot be decoded; the place is added by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `Invalid` or `Unsupported`.
    pub kind: Kind,
    /// One sentence.
    pub message: String,
}

/// The text is wrong.
pub fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { kind: Kind::Invalid, message: message.into() }
}

/// The machine does not run this.
pub fn unsupported(message: impl Into<String>) -> Refusal {
    Refusal { kind: Kind::Unsupported, message: message.into() }
}
