//! The address space: which addresses lie where.
//!
//! A generic address names a byte of any space. Shared, local, constant and parameter memory have windows; every other
//! address is global. Within a space's own instructions (`ld.shared`) addresses count from 0. Kernel parameters and
//! the parameters of calls are always addressed generically: the former lie in their bank's window, the latter in
//! local memory.

/// Bytes of a window.
pub const WINDOW_BYTES: u64 = 1 << 32;
/// Kernel parameters.
pub const PARAM_WINDOW: u64 = 0x7a00_0000_0000;
/// The constant bank.
pub const CONST_WINDOW: u64 = 0x7b00_0000_0000;
/// Local memory of the thread.
pub const LOCAL_WINDOW: u64 = 0x7c00_0000_0000;
/// Shared memory of the block.
pub const SHARED_WINDOW: u64 = 0x7d00_0000_0000;
/// Addresses of functions: this plus their index.
pub const FUNCTION_WINDOW: u64 = 0x7e00_0000_0000;
/// The first address that an allocation of global memory may have. All below is the null page.
pub const GLOBAL_START: u64 = 0x2_0000_0000;
/// Allocations begin at multiples of this, so that an address's upper bits find its allocation.
pub const GLOBAL_SLOT: u64 = 1 << 21;
/// The end of global memory.
pub const GLOBAL_END: u64 = 0x1000_0000_0000;

/// Most bytes of local memory of one thread, as on hardware.
pub const MAX_LOCAL_BYTES: u32 = 512 << 10;

/// The space of a generic address, if the address alone determines one; for messages.
pub(crate) fn region(address: u64) -> Option<&'static str> {
    Some(match address & !(WINDOW_BYTES - 1) {
        PARAM_WINDOW => "a parameter",
        CONST_WINDOW => "constant memory",
        LOCAL_WINDOW => "local memory",
        SHARED_WINDOW => "shared memory",
        FUNCTION_WINDOW => "a function",
        _ if (GLOBAL_START..GLOBAL_END).contains(&address) => "global memory",
        _ => return None,
    })
}
