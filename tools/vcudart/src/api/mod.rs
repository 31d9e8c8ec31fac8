//! The exported functions. Each sees to it that the thread has a context, calls the driver, and keeps its error for
//! cudaGetLastError.

pub mod device;
pub mod launch;
pub mod memory;
pub mod register;
pub mod stream;

use std::cell::Cell;
use std::ffi::{c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use vcuda::code::Code;

/// A handle or an address of the caller's.
pub type Handle = *mut c_void;

thread_local! {
    /// The last error of this thread; 0 for none.
    static LAST: Cell<u32> = const { Cell::new(0) };
}

/// What a C caller gets for a result, which is kept if it is an error: no panic leaves this library.
fn answer(f: impl FnOnce() -> Result<(), Code>) -> c_uint {
    let code = match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(Code(code))) => code,
        Err(_) => Code::UNKNOWN.0,
    };
    // That work is not done yet is an answer, no error.
    if code != 0 && code != Code::NOT_READY.0 {
        LAST.set(code);
    }
    code
}

/// The result of another function.
fn checked(code: c_uint) -> Result<(), Code> {
    if code == 0 { Ok(()) } else { Err(Code(code)) }
}

/// Writes a value to where the caller wants it.
///
/// # Safety
/// `to` is null or can be written.
unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the caller's word.
    unsafe { to.write(value) };
    Ok(())
}

/// The same of a handle.
///
/// # Safety
/// As for [`give`].
unsafe fn give_handle(to: *mut Handle, handle: u64) -> Result<(), Code> {
    // SAFETY: the caller's word.
    unsafe { give(to, std::ptr::with_exposed_provenance_mut(handle as usize)) }
}

fn known(handle: Handle) -> u64 {
    handle.addr() as u64
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
