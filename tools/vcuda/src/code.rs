//! Results: numbers and names are the driver's, sentences our own.

use std::ffi::CStr;
use std::io::Write as _;

/// A sentence on standard error, for whoever debugs the program.
pub fn say(text: &str) {
    // That standard error is closed is no reason to fail.
    let _ = writeln!(std::io::stderr(), "vcuda: {text}");
}

/// A result other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

macro_rules! table {
    ($($constant:ident = $number:literal $name:literal $text:literal)*) => {
        impl Code {
            $(
                #[doc = stringify!($name $text)]
                pub const $constant: Self = Self($number);
            )*

            /// Name and sentence of a number; `None` for one that does not exist here.
            pub fn told(number: u32) -> Option<(&'static CStr, &'static CStr)> {
                match number {
                    0 => Some((c"CUDA_SUCCESS", c"no error")),
                    $($number => Some(($name, $text)),)*
                    _ => None,
                }
            }
        }
    };
}

table! {
    INVALID_VALUE = 1 c"CUDA_ERROR_INVALID_VALUE" c"an argument is not allowed"
    OUT_OF_MEMORY = 2 c"CUDA_ERROR_OUT_OF_MEMORY" c"the device has not as much memory"
    NOT_INITIALIZED = 3 c"CUDA_ERROR_NOT_INITIALIZED" c"cuInit was not called, or failed"
    DEINITIALIZED = 4 c"CUDA_ERROR_DEINITIALIZED" c"the driver has ended"
    NO_DEVICE = 100 c"CUDA_ERROR_NO_DEVICE" c"there is no device"
    INVALID_DEVICE = 101 c"CUDA_ERROR_INVALID_DEVICE" c"there is no such device"
    INVALID_IMAGE = 200 c"CUDA_ERROR_INVALID_IMAGE" c"the module is damaged"
    INVALID_CONTEXT = 201 c"CUDA_ERROR_INVALID_CONTEXT" c"no context is current, or not the one that is meant"
    NO_BINARY_FOR_GPU = 209 c"CUDA_ERROR_NO_BINARY_FOR_GPU" c"the module is for newer devices"
    PEER_ACCESS_UNSUPPORTED = 217 c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED" c"a device has no access to another's memory"
    INVALID_PTX = 218 c"CUDA_ERROR_INVALID_PTX" c"the text is no PTX"
    UNSUPPORTED_PTX_VERSION = 222 c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION" c"the PTX is newer than the driver"
    FILE_NOT_FOUND = 301 c"CUDA_ERROR_FILE_NOT_FOUND" c"there is no such file"
    INVALID_HANDLE = 400 c"CUDA_ERROR_INVALID_HANDLE" c"a handle does not exist, or not any more"
    ILLEGAL_STATE = 401 c"CUDA_ERROR_ILLEGAL_STATE" c"something is still in use"
    NOT_FOUND = 500 c"CUDA_ERROR_NOT_FOUND" c"the module has nothing of this name"
    NOT_READY = 600 c"CUDA_ERROR_NOT_READY" c"the work is not done yet"
    ILLEGAL_ADDRESS = 700 c"CUDA_ERROR_ILLEGAL_ADDRESS" c"a kernel used an address that is not its own"
    PEER_ACCESS_NOT_ENABLED = 705 c"CUDA_ERROR_PEER_ACCESS_NOT_ENABLED" c"access to this device was not enabled"
    ASSERT = 710 c"CUDA_ERROR_ASSERT" c"a kernel trapped"
    HOST_MEMORY_ALREADY_REGISTERED = 712 c"CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED" c"the memory is registered already"
    HOST_MEMORY_NOT_REGISTERED = 713 c"CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED" c"the memory is not registered"
    MISALIGNED_ADDRESS = 716 c"CUDA_ERROR_MISALIGNED_ADDRESS" c"a kernel used a misaligned address"
    LAUNCH_FAILED = 719 c"CUDA_ERROR_LAUNCH_FAILED" c"a kernel failed"
    COOPERATIVE_LAUNCH_TOO_LARGE = 720 c"CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE" c"the blocks cannot run at the same time"
    NOT_PERMITTED = 800 c"CUDA_ERROR_NOT_PERMITTED" c"the call is not allowed here"
    NOT_SUPPORTED = 801 c"CUDA_ERROR_NOT_SUPPORTED" c"this virtual driver cannot do that"
    SYSTEM_NOT_READY = 802 c"CUDA_ERROR_SYSTEM_NOT_READY" c"a service that the devices need does not run"
    CAPTURE_UNSUPPORTED = 900 c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" c"not allowed while a stream is captured"
    CAPTURE_INVALIDATED = 901 c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" c"the capture was broken by an earlier call"
    CAPTURE_MERGE = 902 c"CUDA_ERROR_STREAM_CAPTURE_MERGE" c"two captures would become one"
    CAPTURE_UNMATCHED = 903 c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED" c"the stream is not captured"
    CAPTURE_ISOLATION = 905 c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION" c"a captured stream would wait for work that is not captured"
    CAPTURE_IMPLICIT = 906 c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT" c"the legacy stream would wait for a captured one"
    CAPTURED_EVENT = 907 c"CUDA_ERROR_CAPTURED_EVENT" c"the event was recorded in a captured stream"
    CAPTURE_WRONG_THREAD = 908 c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD" c"another thread began the capture"
    INVALID_CLUSTER_SIZE = 912 c"CUDA_ERROR_INVALID_CLUSTER_SIZE" c"a cluster has more blocks than there may be"
    UNKNOWN = 999 c"CUDA_ERROR_UNKNOWN" c"a defect of this virtual driver"
}
