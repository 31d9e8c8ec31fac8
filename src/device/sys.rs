//! The CUDA driver's functions: a table that [`load`] fills from the driver's library, all or none of them, but for those that
//! only later drivers have.
//!
//! Handles, and the numbers that go in, are as cudarc declares them. Results that come out are integers here: a driver
//! may be newer than the headers that a Rust enum was made from, and a number that the enum lacks would be undefined
//! behaviour.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys;
pub(super) use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction, CUfunction_attribute, CUgraph,
    CUgraphExec, CUjit_option, CUmodule, CUstream, CUstreamCaptureMode,
};

/// What the driver answers, by its number: 0, or an error.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct CUresult(pub(super) u32);

impl fmt::Debug for CUresult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error {}", self.0)
    }
}

macro_rules! results {
    ($($name:ident)*) => {
        /// Those that this program tells apart.
        impl CUresult {
            $(pub(super) const $name: Self = Self(sys::CUresult::$name as u32);)*
        }
    };
}

results! {
    CUDA_SUCCESS
    CUDA_ERROR_OUT_OF_MEMORY
    CUDA_ERROR_STUB_LIBRARY
    CUDA_ERROR_DEVICE_UNAVAILABLE
    CUDA_ERROR_NO_DEVICE
    CUDA_ERROR_ECC_UNCORRECTABLE
    CUDA_ERROR_JIT_COMPILER_NOT_FOUND
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    CUDA_ERROR_JIT_COMPILATION_DISABLED
    CUDA_ERROR_ILLEGAL_ADDRESS
    CUDA_ERROR_ASSERT
    CUDA_ERROR_HARDWARE_STACK_ERROR
    CUDA_ERROR_ILLEGAL_INSTRUCTION
    CUDA_ERROR_MISALIGNED_ADDRESS
    CUDA_ERROR_INVALID_ADDRESS_SPACE
    CUDA_ERROR_INVALID_PC
    CUDA_ERROR_LAUNCH_FAILED
    CUDA_ERROR_LAUNCH_TIMEOUT
    CUDA_ERROR_SYSTEM_NOT_READY
    CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
    CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    CUDA_ERROR_UNKNOWN
}

/// Where the driver's library is looked for. NVIDIA installs the first; the second also names the stub that a toolkit
/// has for the linker.
const LIBRARIES: [&CStr; 2] = [c"libcuda.so.1", c"libcuda.so"];

/// Why there is no driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Missing {
    /// No library.
    Library,
    /// A library without this function.
    Function(&'static str),
}

// The C library's, which std links anyway.
unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// RTLD_NOW: what the library lacks itself is an error when it is opened.
const NOW: c_int = 2;

static TABLE: OnceLock<Result<Table, Missing>> = OnceLock::new();

/// Finds the driver and all of its functions, once.
pub(super) fn load() -> Result<(), Missing> {
    let find = || {
        // SAFETY: the names end with a zero. Loading NVIDIA's library runs its initialisers, as every CUDA program does.
        let open = |name: &&CStr| unsafe { dlopen(name.as_ptr(), NOW) };
        // Never closed: functions of it are called until the process ends.
        let library =
            LIBRARIES.iter().map(open).find(|library| !library.is_null()).ok_or(Missing::Library)?;
        // SAFETY: the library stays open, and its functions of these names have these types.
        unsafe {
            let functions = Functions::find(library)?;
            let launch = dlsym(library, c"cuLaunchKernelEx".as_ptr());
            let launch_ex = (!launch.is_null()).then(|| std::mem::transmute::<*mut c_void, LaunchEx>(launch));
            Ok(Table { functions, launch_ex })
        }
    };
    TABLE.get_or_init(find).as_ref().map(drop).map_err(|missing| *missing)
}

/// cuLaunchKernelEx, of CUDA 11.8: the launch with its attributes, the kernel, its parameters, nothing.
type LaunchEx = unsafe extern "C" fn(
    *const sys::CUlaunchConfig,
    CUfunction,
    *mut *mut c_void,
    *mut *mut c_void,
) -> CUresult;

struct Table {
    functions: Functions,
    launch_ex: Option<LaunchEx>,
}

/// Whether the driver has [`launch_dependent`].
pub(super) fn launches_dependents() -> bool {
    matches!(TABLE.get(), Some(Ok(Table { launch_ex: Some(_), .. })))
}

/// cuLaunchKernelEx with programmatic stream serialization: the kernel may begin before the one ahead of it in the stream
/// has ended. Panics where [`launches_dependents`] is false.
///
/// # Safety
/// As for [`cuLaunchKernel`]; and what the kernel does before it waits with `griddepcontrol.wait` does not depend on the
/// work ahead.
pub(super) unsafe fn launch_dependent(
    function: CUfunction,
    [grid_x, grid_y, grid_z]: [c_uint; 3],
    [block_x, block_y, block_z]: [c_uint; 3],
    shared_bytes: c_uint,
    stream: CUstream,
    params: *mut *mut c_void,
) -> CUresult {
    let Some(Ok(Table { launch_ex: Some(launch), .. })) = TABLE.get() else {
        panic!("this driver launches no dependents")
    };
    let mut attribute = sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
    };
    let config = sys::CUlaunchConfig {
        gridDimX: grid_x,
        gridDimY: grid_y,
        gridDimZ: grid_z,
        blockDimX: block_x,
        blockDimY: block_y,
        blockDimZ: block_z,
        sharedMemBytes: shared_bytes,
        hStream: stream,
        attrs: &mut attribute,
        numAttrs: 1,
    };
    // SAFETY: the caller's word; the attribute outlives the call.
    unsafe { launch(&config, function, params, std::ptr::null_mut()) }
}

macro_rules! functions {
    ($($name:ident($($arg:ident: $type:ty),* $(,)?))*) => {
        #[allow(non_snake_case, reason = "the driver's names")]
        struct Functions {
            $($name: unsafe extern "C" fn($($type),*) -> CUresult,)*
        }

        impl Functions {
            /// # Safety
            /// `library` is open, and what it has of these names is the CUDA driver's.
            unsafe fn find(library: *mut c_void) -> Result<Self, Missing> {
                Ok(Self {
                    $($name: {
                        // SAFETY: the library is open and the name ends with a zero.
                        let found = unsafe { dlsym(library, concat!(stringify!($name), "\0").as_ptr().cast()) };
                        if found.is_null() {
                            return Err(Missing::Function(stringify!($name)));
                        }
                        // SAFETY: the driver's function of this name has this type.
                        unsafe { std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> CUresult>(found) }
                    },)*
                })
            }
        }

        $(
            /// The driver's function of this name; panics before [`load`] has found it.
            ///
            /// # Safety
            /// As the driver's documentation says of its pointers and handles.
            #[allow(non_snake_case, clippy::too_many_arguments, reason = "the driver's names and lists")]
            pub(super) unsafe fn $name($($arg: $type),*) -> CUresult {
                let Some(Ok(table)) = TABLE.get() else { panic!("the driver is called before it is found") };
                // SAFETY: the caller's word.
                unsafe { (table.functions.$name)($($arg),*) }
            }
        )*
    };
}

functions! {
    cuInit(flags: c_uint)
    cuDriverGetVersion(version: *mut c_int)
    cuGetErrorName(result: CUresult, name: *mut *const c_char)
    cuGetErrorString(result: CUresult, told: *mut *const c_char)
    cuDeviceGetCount(count: *mut c_int)
    cuDeviceGet(device: *mut CUdevice, ordinal: c_int)
    cuDeviceGetName(name: *mut c_char, room: c_int, device: CUdevice)
    cuDeviceGetAttribute(value: *mut c_int, which: CUdevice_attribute, device: CUdevice)
    cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice)
    cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice)
    cuDevicePrimaryCtxRelease_v2(device: CUdevice)
    cuCtxSetCurrent(context: CUcontext)
    cuModuleLoadDataEx(
        module: *mut CUmodule,
        image: *const c_void,
        count: c_uint,
        options: *mut CUjit_option,
        values: *mut *mut c_void,
    )
    cuModuleUnload(module: CUmodule)
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char)
    cuFuncGetAttribute(value: *mut c_int, which: CUfunction_attribute, function: CUfunction)
    cuFuncSetAttribute(function: CUfunction, which: CUfunction_attribute, value: c_int)
    cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: CUfunction,
        threads: c_int,
        shared_bytes: usize,
    )
    cuMemAlloc_v2(address: *mut CUdeviceptr, bytes: usize)
    cuMemFree_v2(address: CUdeviceptr)
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize)
    cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint)
    cuMemFreeHost(address: *mut c_void)
    cuMemHostGetDevicePointer_v2(address: *mut CUdeviceptr, host: *mut c_void, flags: c_uint)
    cuMemcpyHtoDAsync_v2(to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream)
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream)
    cuMemsetD8Async(to: CUdeviceptr, value: u8, bytes: usize, stream: CUstream)
    cuStreamCreate(stream: *mut CUstream, flags: c_uint)
    cuStreamDestroy_v2(stream: CUstream)
    cuStreamSynchronize(stream: CUstream)
    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint)
    cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode)
    cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph)
    cuEventCreate(event: *mut CUevent, flags: c_uint)
    cuEventDestroy_v2(event: CUevent)
    cuEventRecord(event: CUevent, stream: CUstream)
    cuEventSynchronize(event: CUevent)
    cuEventElapsedTime(milliseconds: *mut f32, from: CUevent, to: CUevent)
    cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: CUstream,
        params: *mut *mut c_void,
        extra: *mut *mut c_void,
    )
    cuGraphInstantiateWithFlags(executable: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong)
    cuGraphLaunch(executable: CUgraphExec, stream: CUstream)
    cuGraphDestroy(graph: CUgraph)
    cuGraphExecDestroy(executable: CUgraphExec)
}
