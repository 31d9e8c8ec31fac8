//! CUDA's runtime library for a virtual GPU. Built as `libvcudart.so` and put where a program looks for `libcudart.so.12` or
//! `libcudart.so.13`, it lets a program that nvcc built with `-cudart shared` run on [`ptxvm`](../ptxvm/index.html), with that
//! machine's checks.
//!
//! It is [`vcuda`], the driver, with the runtime's functions above it in one library: calls of both see the same memory,
//! streams and kernels, and what `vcuda` checks is checked here.
//!
//! From the top down:
//!
//! - [`api`]: the exported functions. Functions that are missing are missing: the dynamic linker says so.
//! - [`registry`]: what a program registers before `main`: its fat binaries with their kernels and variables, and what has
//!   been loaded of them in which context.
//! - [`properties`]: cudaDeviceProp. [`error`]: results.

pub mod api;
pub mod error;
pub mod properties;
pub mod registry;
