//! The kernels as build.rs compiled them: `Entry`, one variant per entry point, `MODULES`, and `shared`, the constants of
//! kernels that launchers use.

use crate::device::Cubin;

/// One file of `kernels/`.
#[derive(Debug)]
pub struct Module {
    /// Its stem.
    pub name: &'static str,
    /// Its PTX; `None` where the program was built without nvcc.
    pub ptx: Option<&'static str>,
    /// Its machine code; none in a debug build.
    pub cubins: &'static [Cubin<'static>],
    /// Its entry points.
    pub entries: &'static [Entry],
}

/// What to do about a program without kernels.
pub const NO_KERNELS: &str =
    "this program was built without nvcc and has no kernels; run `make nvcc`, then build again";

/// Whether the program has kernels.
pub fn compiled() -> bool {
    MODULES.iter().all(|module| module.ptx.is_some())
}

/// Asserts that a launcher's struct has the size of the kernel's: `same_size!(attention: Item = ITEM_BYTES)`.
macro_rules! same_size {
    ($stem:ident: $($name:ident = $bytes:ident),+ $(,)?) => {
        $(const _: () = assert!(size_of::<$name>() == super::entries::shared::$stem::$bytes);)+
    };
}
pub(super) use same_size;

/// Bytes that lie as the widest fields of an ELF file want it.
#[allow(dead_code, reason = "a debug build has none")]
#[repr(C, align(64))]
struct Aligned<T>(T);

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
