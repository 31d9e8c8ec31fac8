//! A virtual GPU: runs NVIDIA PTX on the CPU, with a sanitizer's checks and a profiler's counters.
//!
//! ```text
//! text ──> syntax tree ──> bytecode ──────────> warps in lockstep ──> Report, or Error with its findings
//!          ptx             decode + ops         machine + ops
//! ```
//!
//! [`Module::load`] takes text, [`Gpu`] has memory and launches kernels; the README shows both in fifteen lines.
//!
//! # Code map
//!
//! - [`types`]: scalar types and state spaces. [`error`]: what can be wrong, and where.
//! - [`ptx`]: the parser. Names and modifiers stay text.
//! - [`decode`]: names become registers ([`decode::decoder`]), functions become code with joins where lanes meet again
//!   ([`decode::function`], [`decode::flow`]), registers get places by liveness ([`decode::slots`]), a module is linked
//!   ([`decode::module`]).
//! - [`ops`]: what each instruction does, a file a family: how its text is read, and its meaning for a lane or a warp.
//!   [`ops::lane`] lifts functions of one lane to warps for each of the host's instruction sets.
//! - [`machine`]: registers ([`machine::registers`]), bytecode ([`machine::inst`]), memories with what the checks keep
//!   beside the bytes ([`machine::memory`]), warps and blocks, and the launch over host threads ([`machine::launch`]).
//! - [`gpu`]: the public device. [`report`]: counters for people.
//!
//! # Invariants
//!
//! - The same text, input, options and seed give the same bits, counters and findings, on any number of host threads
//!   and on any host: only correctly rounded operations, fixed orders, no libm.
//! - A modifier is understood or refused, never ignored.
//! - No text, argument or kernel makes the machine panic or use memory out of proportion; endless kernels end at their
//!   instruction budget.
//! - A launch with a finding is a failed launch.

pub mod decode;
pub mod error;
pub mod gpu;
pub mod machine;
pub mod ops;
pub mod ptx;
pub mod report;
pub mod types;

pub use error::Error;
pub use gpu::{Arg, DevicePtr, Gpu, Launch, LoadedModule, Module};
pub use machine::options::{Checks, MmaOrder, Options};
pub use report::Report;

/// The README's examples are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
