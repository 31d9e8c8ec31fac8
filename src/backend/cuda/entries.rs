//! The kernels as build.rs compiled them: `Entry`, one variant per entry point, and `MODULES`.

/// One file of `kernels/`.
#[derive(Debug)]
pub struct Module {
    /// Its stem.
    pub name: &'static str,
    /// Its PTX; `None` where the program was built without nvcc.
    pub ptx: Option<&'static str>,
    /// Its entry points.
    pub entries: &'static [Entry],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
