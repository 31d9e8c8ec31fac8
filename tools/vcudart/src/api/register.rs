//! What nvcc's own code in a program calls: before `main`, and around each `<<<...>>>`.

use std::cell::RefCell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::ManuallyDrop;

use vcuda::code::{Code, say};

use super::launch::{Dim3, cudaLaunchKernel};
use super::{Handle, answer, checked, export, give, known};
use crate::error::MISSING_CONFIGURATION;
use crate::registry;

/// Grid, block, bytes of shared memory, stream.
type Configuration = (Dim3, Dim3, usize, Handle);

thread_local! {
    /// Configurations of launches whose stubs have not run yet.
    static PUSHED: RefCell<ManuallyDrop<Vec<Configuration>>> = const { RefCell::new(ManuallyDrop::new(Vec::new())) };
}

/// A name that the compiler wrote into the program.
///
/// # Safety
/// `name` is null or ends with a zero.
unsafe fn name(name: *const c_char) -> String {
    if name.is_null() {
        return String::new();
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// A fat binary: its name, as a pointer.
///
/// # Safety
/// `wrapper` is what nvcc makes, and lives as long as the program.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaRegisterFatBinary(wrapper: *const c_void) -> *mut Handle {
    // SAFETY: the caller's word.
    std::ptr::without_provenance_mut(unsafe { registry::register(wrapper) })
}

/// All kernels and variables of a fat binary are registered.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaRegisterFatBinaryEnd(_binary: *mut Handle) {}

/// The program ends.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaUnregisterFatBinary(binary: *mut Handle) {
    let _ = std::panic::catch_unwind(|| registry::unregister(binary.addr()));
}

/// A kernel: the address of its stub, and its name in the PTX.
///
/// # Safety
/// Names end with a zero.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "what nvcc's code calls it with")]
pub unsafe extern "C" fn __cudaRegisterFunction(
    binary: *mut Handle,
    stub: *const c_void,
    _device: *mut c_char,
    device_name: *const c_char,
    _threads: c_int,
    _tid: *const c_void,
    _bid: *const c_void,
    _block: *const c_void,
    _grid: *const c_void,
    _warp: *const c_int,
) {
    // SAFETY: the caller's word.
    registry::register_kernel(binary.addr(), stub.addr(), &unsafe { name(device_name) });
}

/// A variable: its address on the host, and its name in the PTX.
///
/// # Safety
/// Names end with a zero.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "what nvcc's code calls it with")]
pub unsafe extern "C" fn __cudaRegisterVar(
    binary: *mut Handle,
    host: *const c_void,
    _device: *mut c_char,
    device_name: *const c_char,
    _external: c_int,
    bytes: usize,
    _constant: c_int,
    _global: c_int,
) {
    // SAFETY: the caller's word.
    registry::register_variable(binary.addr(), host.addr(), &unsafe { name(device_name) }, bytes, false);
}

/// A managed variable: the address of the pointer to it, and its name in the PTX.
///
/// # Safety
/// Names end with a zero, and the pointer can be written for as long as the program runs.
#[unsafe(no_mangle)]
#[allow(clippy::too_many_arguments, reason = "what nvcc's code calls it with")]
pub unsafe extern "C" fn __cudaRegisterManagedVar(
    binary: *mut Handle,
    host: *mut Handle,
    _device: *mut c_char,
    device_name: *const c_char,
    _external: c_int,
    bytes: usize,
    _constant: c_int,
    _global: c_int,
) {
    let host = host.expose_provenance();
    // SAFETY: the caller's word.
    registry::register_variable(binary.addr(), host, &unsafe { name(device_name) }, bytes, true);
}

/// The host is about to use a binary's managed variables: 1 if it can.
#[unsafe(no_mangle)]
pub extern "C" fn __cudaInitModule(binary: *mut Handle) -> c_char {
    c_char::from(answer(|| registry::begin(binary.addr())) == 0)
}

/// Keeps the configuration of a launch for its stub: 0 if it did.
///
/// # Safety
/// Any values are allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __cudaPushCallConfiguration(
    grid: Dim3,
    block: Dim3,
    shared_bytes: usize,
    stream: Handle,
) -> c_uint {
    PUSHED.with_borrow_mut(|pushed| pushed.push((grid, block, shared_bytes, stream)));
    0
}

export! {
    /// Takes it back.
    fn __cudaPopCallConfiguration(grid: *mut Dim3, block: *mut Dim3, shared_bytes: *mut usize, stream: *mut Handle) {
        let (g, b, s, of) = PUSHED.with_borrow_mut(|pushed| pushed.pop()).ok_or(MISSING_CONFIGURATION)?;
        give(grid, g)?;
        give(block, b)?;
        give(shared_bytes, s)?;
        give(stream, of)
    }

    /// The name of a kernel for the function below: the address of its stub.
    fn __cudaGetKernel(kernel: *mut Handle, stub: Handle) {
        give(kernel, stub)
    }

    /// Launches a kernel by that name.
    fn __cudaLaunchKernel(
        kernel: Handle,
        grid: Dim3,
        block: Dim3,
        args: *mut Handle,
        shared_bytes: usize,
        stream: Handle,
    ) {
        checked(cudaLaunchKernel(kernel, grid, block, args, shared_bytes, stream))
    }

    /// Variables that the host has and the device uses are not built.
    fn __cudaRegisterHostVar(_binary: *mut Handle, host_name: *const c_char, _host: Handle, _bytes: usize) {
        say(&format!("the host variable {} cannot be used by kernels here", name(host_name)));
        Err(Code::NOT_SUPPORTED)
    }

    /// The handle of the driver for a kernel.
    fn cudaGetFuncBySymbol(function: *mut Handle, stub: Handle) {
        super::give_handle(function, registry::function(stub.addr())?)
    }

    /// The same: here a kernel is its function.
    fn cudaGetKernel(kernel: *mut Handle, stub: Handle) {
        super::give_handle(kernel, registry::function(known(stub) as usize)?)
    }
}
