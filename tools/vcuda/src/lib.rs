//! The CUDA driver's library for a virtual GPU. Built as `libvcuda.so` and put where a program looks for
//! `libcuda.so.1`, it lets the program run on [`ptxvm`], with that machine's checks.
//!
//! It is for tests of a program's own use of the driver, so it is as strict as the driver may be and as late as it may
//! be: handles are looked up, addresses and sizes checked, and work of a stream runs only when somebody waits for it.
//! A program that reuses a page-locked buffer before its copy is done, or reads a result without waiting, gets the
//! wrong bytes here, always.
//!
//! From the top down:
//!
//! - [`api`]: the exported functions, which turn pointers into values. Functions that are missing are missing: a program
//!   that looks them up learns so.
//! - [`driver`]: devices, contexts, and the objects behind handles with their rules.
//! - [`work`]: the work in streams and graphs. [`fatbin`]: the PTX in fat binaries.
//! - [`code`]: results. [`settings`]: the machine, as the environment describes it.

pub mod api;
pub mod code;
pub mod driver;
pub mod fatbin;
pub mod settings;
pub mod work;
