//! The exported functions. Each turns the caller's pointers into values, calls [`crate::driver`], and writes back.

pub mod device;
pub mod memory;
pub mod module;
pub mod stream;
pub mod tensor;

use std::collections::BTreeSet;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};

use crate::code::Code;

/// A handle or an address of the caller's.
pub type Handle = *mut c_void;

/// The address of an exported function.
#[derive(Clone, Copy)]
struct Entry(*const ());

// SAFETY: functions are everybody's.
unsafe impl Sync for Entry {}

/// The function that a name without a version means: the newest one there is.
fn entry(name: &str) -> Option<*const ()> {
    let all =
        || [device::TABLE, memory::TABLE, module::TABLE, stream::TABLE, tensor::TABLE].into_iter().flatten();
    ["_v4", "_v3", "_v2", ""].iter().find_map(|version| {
        let found = all().find(|(known, _)| known.strip_suffix(version).is_some_and(|stem| stem == name));
        found.map(|(_, entry)| entry.0)
    })
}

/// What a C caller gets for a result: no panic leaves this library.
pub fn answer(f: impl FnOnce() -> Result<(), Code>) -> c_uint {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(Code(code))) => code,
        Err(_) => Code::UNKNOWN.0,
    }
}

/// The result of another function of these.
///
/// # Errors
/// The function's.
pub fn checked(code: c_uint) -> Result<(), Code> {
    if code == 0 { Ok(()) } else { Err(Code(code)) }
}

/// A text for as long as the program runs; each once.
pub fn kept(text: String) -> *const c_char {
    static KEPT: Mutex<BTreeSet<CString>> = Mutex::new(BTreeSet::new());
    let Ok(text) = CString::new(text) else { return c"".as_ptr() };
    let mut kept = KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    if !kept.contains(&text) {
        kept.insert(text.clone());
    }
    // The texts lie on the heap, where they stay.
    kept.get(&text).map_or(c"".as_ptr(), |text| text.as_ptr())
}

/// Writes a text and a zero to `room` bytes.
///
/// # Safety
/// `to` is null or has as many bytes.
pub(crate) unsafe fn write_text(to: *mut c_char, room: c_int, text: &str) -> Result<(), Code> {
    if to.is_null() || (room as i64) <= text.len() as i64 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the caller's word.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// Writes a value to where the caller wants it.
///
/// # Errors
/// `to` is null.
///
/// # Safety
/// `to` is null or can be written.
pub unsafe fn give<T>(to: *mut T, value: T) -> Result<(), Code> {
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
pub(crate) unsafe fn give_handle(to: *mut Handle, handle: u64) -> Result<(), Code> {
    // SAFETY: the caller's word.
    unsafe { give(to, std::ptr::without_provenance_mut(handle as usize)) }
}

/// The number behind a handle.
pub fn known(handle: Handle) -> u64 {
    handle.addr() as u64
}

/// A text of the caller's.
///
/// # Safety
/// `text` is null or ends with a zero, and lives as long as the result is used.
pub(crate) unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, Code> {
    if text.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| Code::INVALID_VALUE)
}

/// Exports functions. Their callers keep to the driver's documentation: pointers are null or good, texts end.
macro_rules! export {
    ($table:ident: $($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// As the driver's documentation says of its pointers.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, unused_unsafe, clippy::too_many_arguments, reason = "CUDA's names and lists")]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> c_uint {
                // SAFETY: what the body does with pointers is what the documentation allows.
                answer(|| unsafe { $body })
            }
        )*

        /// The functions of this file, by their names.
        pub(super) static $table: &[(&str, Entry)] = &[$((stringify!($name), Entry($name as *const ()))),*];
    };
}
pub(crate) use export;
