//! A virtual GPU: runs NVIDIA PTX on the CPU, with a sanitizer's checks and a profiler's counters.
//!
//! ```text
//! text ──> syntax tree ──> bytecode ──────────> warps in lockstep ──> Report, or Error with its findings
//!          ptx             compile + ops        machine + ops
//! ```
//!
//! [`Module::load`] takes text, [`Gpu`] has memory and launches kernels; the README shows both in fifteen lines.
//!
//! # Code map
//!
//! From the bottom up; a module names only those before it, and `tests/suite/tidy.rs` fails where one does not.
//!
//! - [`error`]: errors and findings, each with its place in the text.
//! - [`types`]: scalar types and state spaces.
//! - [`ptx`]: the parser. Names and modifiers stay text.
//! - [`machine`]: the program ([`machine::program`], [`machine::inst`]), registers ([`machine::registers`]), memories
//!   with the state of the checks beside the bytes ([`machine::memory`]), how warps and blocks run, and the blocks of a grid
//!   over host threads ([`machine::grid`]). Some of its files need each other; no others do.
//! - [`decode`]: tools for decoding one instruction: names become registers ([`decode::decoder`]), and every modifier is
//!   taken or refused ([`decode::mods`]).
//! - [`ops`]: the instructions, a file or folder for each family: how the text is read, and the meaning for a lane or a warp.
//!   [`ops::lane`] lifts functions of one lane to warps for each of the host's instruction sets.
//! - [`compile`]: functions become code with joins where lanes meet again ([`compile::function`], [`compile::flow`]),
//!   registers get rows by liveness ([`compile::slots`]), a module is linked ([`compile::module`]).
//! - [`report`]: the counters of a launch.
//! - [`gpu`]: the public device.
//!
//! The program `ptxvm` (`src/main.rs`, `src/cli/`) is a user of the library.
//!
//! # Invariants
//!
//! - The same text, input, options and seed give the same bits, counters and findings, on any number of host threads
//!   and on any host: only correctly rounded operations, fixed orders, no libm.
//! - A modifier is understood or refused, never ignored.
//! - No text, argument or kernel makes the machine panic or use memory out of proportion; endless kernels end at their
//!   instruction budget.
//! - A launch with a finding is a failed launch.

pub mod compile;
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
pub use machine::program::ClusterShape;
pub use machine::tensor_map::{Swizzle, TENSOR_MAP_BYTES, TensorMap, TensorMapError, TensorType, Tiled};
pub use report::Report;

/// The README's examples are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
