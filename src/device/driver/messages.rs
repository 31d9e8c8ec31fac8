//! What the driver's results mean to a user, and what to do about them.

use super::*;

/// The driver's name and sentence for a result.
pub(super) fn told(result: CUresult) -> String {
    let text = |f: unsafe fn(CUresult, *mut *const c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: `f` writes a pointer to a text that lives as long as the driver, or null.
        unsafe {
            let known = f(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            if known { CStr::from_ptr(text).to_string_lossy().into_owned() } else { format!("{result:?}") }
        }
    };
    format!("{} ({})", text(sys::cuGetErrorString), text(sys::cuGetErrorName))
}

/// Whether a kernel failed. The driver tells that to whoever calls it next, and to everybody from then on.
pub(super) fn is_fault(result: CUresult) -> bool {
    matches!(
        result,
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS
            | CUresult::CUDA_ERROR_MISALIGNED_ADDRESS
            | CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUresult::CUDA_ERROR_INVALID_PC
            | CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUresult::CUDA_ERROR_ASSERT
            | CUresult::CUDA_ERROR_LAUNCH_TIMEOUT
            | CUresult::CUDA_ERROR_LAUNCH_FAILED
    )
}

/// What to do about a result, where there is something.
pub(super) fn advice(result: CUresult) -> &'static str {
    match result {
        CUresult::CUDA_ERROR_NO_DEVICE => {
            "; the driver sees no GPU: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, start a container with its \
             GPUs, or use --device cpu"
        }
        CUresult::CUDA_ERROR_SYSTEM_NOT_READY => {
            "; GPUs that an NVSwitch connects need the service nvidia-fabricmanager, of the driver's version: start it, \
             or use --device cpu"
        }
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | CUresult::CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
        | CUresult::CUDA_ERROR_STUB_LIBRARY
        | CUresult::CUDA_ERROR_UNKNOWN => {
            "; the driver's library does not fit the kernel module or is a stub: see whether `nvidia-smi` works and \
             which libcuda.so is found first, or use --device cpu"
        }
        CUresult::CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "; another process has the GPU for itself: see `nvidia-smi`, or use another with --device cuda:<number>"
        }
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => "; the GPU's memory is defective: use another GPU",
        _ if is_fault(result) => {
            "; a kernel failed, which is a defect of this program: with CUDA_LAUNCH_BLOCKING=1 in the environment \
             the message names it, and --device vm, on a small case, names its line; please report both"
        }
        _ => "",
    }
}

pub(super) fn check(device: &str, doing: &str, result: CUresult) -> Result<(), DeviceError> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        _ => Err(DeviceError::new(device, format!("cannot {doing}: {}{}", told(result), advice(result)))),
    }
}
