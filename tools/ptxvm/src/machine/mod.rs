//! The machine: the program that it runs, registers, memory, and how blocks and warps run.

pub(crate) mod barrier;
pub mod block;
pub(crate) mod bulk;
pub(crate) mod cluster;
pub mod context;
pub mod copies;
pub mod counters;
mod flights;
pub mod grid;
pub mod heap;
pub mod inst;
pub mod isa;
pub mod launch;
pub mod layout;
pub mod memory;
pub mod module;
pub mod options;
pub(crate) mod products;
pub mod program;
pub mod registers;
mod run;
mod system;
pub mod tensor_map;
pub mod warp;
mod written;
