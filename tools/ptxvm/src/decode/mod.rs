//! Tools for decoding one instruction: names and registers, modifiers, and the reasons to refuse it.

pub mod decoder;
pub mod mods;
pub mod symbols;

use crate::error::ErrorKind;

/// Why an instruction cannot be decoded; the place is added by the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// `Invalid` or `Unsupported`.
    pub kind: ErrorKind,
    /// One sentence.
    pub message: String,
}

/// The text is wrong.
pub fn invalid(message: impl Into<String>) -> Refusal {
    Refusal { kind: ErrorKind::Invalid, message: message.into() }
}

/// The machine does not run this.
pub fn unsupported(message: impl Into<String>) -> Refusal {
    Refusal { kind: ErrorKind::Unsupported, message: message.into() }
}
