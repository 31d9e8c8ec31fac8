//! The exported functions. Each sees to it that the thread has a context, calls the driver, and keeps its error for
//! cudaGetLastError.

pub mod device;
pub mod launch;
pub mod memory;
pub mod register;
pub mod stream;

use std::cell::Cell;
use std::ffi::c_uint;

pub use vcuda::api::Handle;
use vcuda::api::{checked, give, known};
use vcuda::code::Code;

thread_local! {
    /// The last error of this thread; 0 for none.
    static LAST: Cell<u32> = const { Cell::new(0) };
}

/// What a C caller gets for a result, which is kept if it is an error: no panic leaves this library.
fn answer(f: impl FnOnce() -> Result<(), Code>) -> c_uint {
    let code = vcuda::api::answer(f);
    // That work is not done yet is an answer, no error.
    if code != 0 && code != Code::NOT_READY.0 {
        LAST.set(code);
    }
    code
}

/// [`give`] of a handle.
///
/// # Safety
/// As for [`give`].
unsafe fn give_handle(to: *mut Handle, handle: u64) -> Result<(), Code> {
    // SAFETY: the caller's word.
    unsafe { give(to, std::ptr::with_exposed_provenance_mut(handle as usize)) }
}

/// Exports functions. Their callers keep to the runtime's documentation: pointers are null or good, texts end.
macro_rules! export {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// As the runtime's documentation says of its pointers.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, unused_unsafe, clippy::too_many_arguments, reason = "CUDA's names and lists")]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> c_uint {
                // SAFETY: what the body does with pointers is what the documentation allows.
                answer(|| unsafe { $body })
            }
        )*
    };
}
use export;
