//! The exported functions. Each turns the caller's pointers into values, calls [`crate::driver`], and writes back.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use ptxvm::Launch;

use crate::code::{Code, say};
use crate::driver::{self, with, with_context};

/// A handle or an address of the caller's.
type Handle = *mut c_void;

/// What a C caller gets for a result: no panic leaves this library.
fn answer(f: impl FnOnce() -> Result<(), Code>) -> c_uint {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(Code(code))) => code,
        Err(_) => Code::UNKNOWN.0,
    }
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
    unsafe { give(to, std::ptr::without_provenance_mut(handle as usize)) }
}

fn known(handle: Handle) -> u64 {
    handle.addr() as u64
}

/// A text of the caller's.
///
/// # Safety
/// `text` is null or ends with a zero, and lives as long as the result is used.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, Code> {
    if text.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the caller's word.
    unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| Code::INVALID_VALUE)
}

/// CUlaunchAttributeID of launches that may begin before the kernel ahead has ended.
const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;

/// CUlaunchAttribute.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    id: c_uint,
    _padding: c_uint,
    value: [c_int; 16],
}

/// CUlaunchConfig.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *const Attribute,
    count: c_uint,
}

/// Launches a kernel with the arguments at `params`.
///
/// # Safety
/// As the driver's documentation says of cuLaunchKernel's pointers.
unsafe fn launch(
    function: Handle,
    shape: Launch,
    stream: Handle,
    params: *mut Handle,
    extra: *mut Handle,
) -> Result<(), Code> {
    if !extra.is_null() {
        return Err(Code::NOT_SUPPORTED);
    }
    let sizes = with_context(|context| context.params(known(function)))?;
    let mut args = Vec::with_capacity(sizes.len());
    for (i, bytes) in sizes.iter().enumerate() {
        // SAFETY: the caller has as many pointers as the kernel has parameters, or none.
        let at = if params.is_null() { std::ptr::null_mut() } else { unsafe { params.add(i).read() } };
        if at.is_null() {
            say(&format!("argument {i} of {} is missing", sizes.len()));
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: each points to a value of its parameter's size.
        args.push(unsafe { std::slice::from_raw_parts(at.cast::<u8>(), *bytes as usize) }.to_vec());
    }
    with_context(|context| context.launch(known(function), shape, args, known(stream)))
}

/// Exports functions. Their callers keep to the driver's documentation: pointers are null or good, texts end.
macro_rules! export {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$doc])*
            ///
            /// # Safety
            /// As the driver's documentation says of its pointers.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, unused_unsafe, clippy::too_many_arguments)]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> c_uint {
                // SAFETY: what the body does with pointers is what the documentation allows.
                answer(|| unsafe { $body })
            }
        )*
    };
}

export! {
    /// Starts the driver.
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        driver::init()
    }

    /// 1000 major + 10 minor.
    fn cuDriverGetVersion(version: *mut c_int) {
        let (major, minor) = crate::settings::Settings::read().map_err(|_| Code::INVALID_VALUE)?.version;
        give(version, major * 1000 + minor * 10)
    }

    /// Name of a result.
    fn cuGetErrorName(result: c_uint, name: *mut *const c_char) {
        give(name, Code::told(result).ok_or(Code::INVALID_VALUE)?.0.as_ptr())
    }

    /// Sentence for a result.
    fn cuGetErrorString(result: c_uint, told: *mut *const c_char) {
        give(told, Code::told(result).ok_or(Code::INVALID_VALUE)?.1.as_ptr())
    }

    /// Number of devices.
    fn cuDeviceGetCount(count: *mut c_int) {
        give(count, with(|driver| Ok(driver.settings.devices))?)
    }

    /// A device by its number.
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        give(device, with(|driver| driver.device(ordinal))?)
    }

    /// A device's name.
    fn cuDeviceGetName(name: *mut c_char, room: c_int, device: c_int) {
        with(|driver| driver.device(device))?;
        let told = c"vcuda (a virtual GPU on the CPU)".to_bytes_with_nul();
        if name.is_null() || (room as i64) < told.len() as i64 {
            return Err(Code::INVALID_VALUE);
        }
        std::ptr::copy_nonoverlapping(told.as_ptr().cast(), name, told.len());
        Ok(())
    }

    /// A device's memory.
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) {
        let total = with(|driver| driver.device(device).map(|_| driver.settings.memory))?;
        give(bytes, total as usize)
    }

    /// A device's attributes.
    fn cuDeviceGetAttribute(value: *mut c_int, which: c_uint, device: c_int) {
        give(value, with(|driver| driver.device(device).and_then(|_| driver.attribute(which)))?)
    }

    /// A device's primary context.
    fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) {
        give_handle(context, with(|driver| driver.retain(device))?)
    }

    /// Gives it back.
    fn cuDevicePrimaryCtxRelease_v2(device: c_int) {
        with(|driver| driver.release(device))
    }

    /// Makes a context this thread's.
    fn cuCtxSetCurrent(context: Handle) {
        driver::set_current(known(context))
    }

    /// Loads PTX, or a cubin that holds some ([`driver::Context::opened`]). Of the options, the logs and what is asked of
    /// the compiler for debuggers are honoured, and others are refused.
    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        count: c_uint,
        options: *const c_uint,
        values: *const Handle,
    ) {
        // Of errors and of what else there is to say: where to, and how much room there is.
        let (mut log, mut room): ([*mut u8; 2], [usize; 2]) = ([std::ptr::null_mut(); 2], [0; 2]);
        let (mut verbose, mut lines) = (false, false);
        for i in 0..count as usize {
            match (options.add(i).read(), values.add(i).read()) {
                (3, value) => log[1] = value.cast(),       // INFO_LOG_BUFFER
                (4, value) => room[1] = value.addr(),      // INFO_LOG_BUFFER_SIZE_BYTES
                (5, value) => log[0] = value.cast(),       // ERROR_LOG_BUFFER
                (6, value) => room[0] = value.addr(),      // ERROR_LOG_BUFFER_SIZE_BYTES
                (12, value) => verbose = value.addr() != 0, // LOG_VERBOSE
                (13, value) => lines = value.addr() != 0,  // GENERATE_LINE_INFO
                _ => return Err(Code::NOT_SUPPORTED),
            }
        }
        let say_in = |which: usize, message: &str| {
            if !log[which].is_null() && room[which] > 0 {
                let n = message.len().min(room[which] - 1);
                std::ptr::copy_nonoverlapping(message.as_ptr(), log[which], n);
                log[which].add(n).write(0);
            }
        };
        if image.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        // Anything shorter than the mark of an ELF file ends with a zero before it does.
        let is_elf = (0..4).all(|i| image.cast::<u8>().add(i).read() == b"\x7fELF"[i]);
        let text = match is_elf {
            true => {
                let header = image.cast::<[u8; driver::ELF_HEADER]>().read();
                let rest = text(image.cast::<c_char>().add(driver::ELF_HEADER)).unwrap_or_default();
                with_context(|context| context.opened(&header, rest))?
            }
            false => text(image.cast())?,
        };
        if verbose {
            let lines = if lines { "with" } else { "without" };
            say_in(1, &format!("compiled {lines} line numbers"));
        }
        match with_context(|context| Ok(context.load(text)))? {
            Ok(handle) => give_handle(module, handle),
            Err((code, message)) => {
                say_in(0, &message);
                Err(code)
            }
        }
    }

    /// Unloads a module.
    fn cuModuleUnload(module: Handle) {
        with_context(|context| context.unload(known(module)))
    }

    /// A kernel of a module.
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        let name = text(name)?;
        give_handle(function, with_context(|context| context.function(known(module), name))?)
    }

    /// A kernel's needs and limits.
    fn cuFuncGetAttribute(value: *mut c_int, which: c_uint, function: Handle) {
        give(value, with_context(|context| context.function_attribute(known(function), which))?)
    }

    /// Allows a kernel something.
    fn cuFuncSetAttribute(function: Handle, which: c_uint, value: c_int) {
        with_context(|context| context.set_function_attribute(known(function), which, value))
    }

    /// How many blocks of a kernel a multiprocessor holds at once.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: Handle,
        threads: c_int,
        shared_bytes: usize,
    ) {
        give(blocks, with_context(|context| context.occupancy(known(function), threads, shared_bytes))?)
    }

    /// Device memory.
    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        give(address, with_context(|context| context.alloc(bytes))?)
    }

    /// Gives device memory back.
    fn cuMemFree_v2(address: u64) {
        with_context(|context| context.free(address))
    }

    /// Free and total bytes of the device.
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let (left, all) = with_context(|context| Ok(context.memory()))?;
        give(free, left as usize)?;
        give(total, all as usize)
    }

    /// Page-locked host memory.
    fn cuMemHostAlloc(address: *mut Handle, bytes: usize, flags: c_uint) {
        let locked = with_context(|context| context.lock(bytes, flags))?;
        give(address, std::ptr::with_exposed_provenance_mut(locked))
    }

    /// Gives page-locked memory back.
    fn cuMemFreeHost(address: Handle) {
        with_context(|context| context.unlock(address.addr()))
    }

    /// Host to device.
    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) {
        if from.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        with_context(|context| context.copy_in(to, from.expose_provenance(), bytes, known(stream)))
    }

    /// Device to host.
    fn cuMemcpyDtoHAsync_v2(to: Handle, from: u64, bytes: usize, stream: Handle) {
        if to.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        with_context(|context| context.copy_out(to.expose_provenance(), from, bytes, known(stream)))
    }

    /// Sets bytes.
    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: Handle) {
        with_context(|context| context.fill(to, value, bytes, known(stream)))
    }

    /// A stream.
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) {
        give_handle(stream, with_context(|context| context.stream(flags))?)
    }

    /// Ends a stream.
    fn cuStreamDestroy_v2(stream: Handle) {
        with_context(|context| context.destroy_stream(known(stream)))
    }

    /// Waits for a stream.
    fn cuStreamSynchronize(stream: Handle) {
        with_context(|context| context.wait(known(stream)))
    }

    /// Records the calls that follow instead of running them.
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) {
        with_context(|context| context.begin_capture(known(stream), mode))
    }

    /// Ends that.
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) {
        let ended = with_context(|context| context.end_capture(known(stream)));
        give_handle(graph, ended.unwrap_or(0))?;
        ended.map(drop)
    }

    /// An event.
    fn cuEventCreate(event: *mut Handle, flags: c_uint) {
        give_handle(event, with_context(|context| context.event(flags))?)
    }

    /// Ends an event.
    fn cuEventDestroy_v2(event: Handle) {
        with_context(|context| context.destroy_event(known(event)))
    }

    /// Records an event behind a stream's work.
    fn cuEventRecord(event: Handle, stream: Handle) {
        with_context(|context| context.record(known(event), known(stream)))
    }

    /// Waits for an event.
    fn cuEventSynchronize(event: Handle) {
        with_context(|context| context.wait_event(known(event)))
    }

    /// Milliseconds between two events.
    fn cuEventElapsedTime(milliseconds: *mut f32, from: Handle, to: Handle) {
        give(milliseconds, with_context(|context| context.elapsed(known(from), known(to)))?)
    }

    /// Runs a kernel.
    fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        params: *mut Handle,
        extra: *mut Handle,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let shape = Launch { grid, block, shared_bytes, cooperative: false };
        launch(function, shape, stream, params, extra)
    }

    /// Launches a kernel with attributes.
    fn cuLaunchKernelEx(config: *const Config, function: Handle, params: *mut Handle, extra: *mut Handle) {
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let Config { grid, block, shared_bytes, stream, attributes, count } = config.read();
        for i in 0..count as usize {
            let Attribute { id, value, .. } = attributes.add(i).read();
            if id != PROGRAMMATIC_STREAM_SERIALIZATION {
                say(&format!("launch attribute {id} is not built"));
                return Err(Code::NOT_SUPPORTED);
            }
            if value[0] != 0 {
                with_context(|context| context.may_begin_early(known(function), known(stream)))?;
            }
        }
        launch(function, Launch { grid, block, shared_bytes, cooperative: false }, stream, params, extra)
    }

    /// Makes a graph executable.
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64) {
        give_handle(executable, with_context(|context| context.instantiate(known(graph), flags))?)
    }

    /// Runs an executable graph.
    fn cuGraphLaunch(executable: Handle, stream: Handle) {
        with_context(|context| context.launch_graph(known(executable), known(stream)))
    }

    /// Ends a graph.
    fn cuGraphDestroy(graph: Handle) {
        with_context(|context| context.destroy_graph(known(graph)))
    }

    /// Ends an executable graph.
    fn cuGraphExecDestroy(executable: Handle) {
        with_context(|context| context.destroy_executable(known(executable)))
    }
}
