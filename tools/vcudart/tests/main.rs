//! Programs that nvcc built with `-cudart shared`, run on this library by `LD_LIBRARY_PATH` alone.

#[path = "suite/programs.rs"]
mod programs;
#[path = "suite/readme.rs"]
mod readme;
#[path = "suite/toolchain.rs"]
mod toolchain;
