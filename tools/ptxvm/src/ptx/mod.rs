//! PTX text to syntax tree.

pub mod ast;
mod lex;
mod parse;

pub use parse::{MAX_DEPTH, MAX_DIMENSIONS, MAX_TEXT_BYTES, parse};
