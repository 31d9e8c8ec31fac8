//! The machine: registers, bytecode, memory, and what runs them.

mod barrier;
pub mod block;
pub mod context;
pub mod counters;
pub mod heap;
pub mod inst;
pub mod launch;
pub mod layout;
pub mod memory;
pub mod options;
pub mod registers;
mod run;
mod system;
pub mod warp;
