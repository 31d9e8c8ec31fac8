//! The driver, its devices and contexts.

use std::ffi::{c_char, c_int, c_uint, c_void};

use super::{Entry, Handle, answer, checked, export, give, give_handle, known, text, write_text};
use crate::code::{Code, say};
use crate::driver::{self, with, with_context};

/// CUctxCreateParams.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ContextParams {
    affinity: *const c_void,
    affinities: c_int,
    graphics: *const c_void,
}

export! { TABLE:
    /// Starts the driver.
    fn cuInit(flags: c_uint) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        driver::init()
    }

    /// 1000 major + 10 minor.
    fn cuDriverGetVersion(version: *mut c_int) {
        let (major, minor) = driver::version()?;
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
        give(value, with(|driver| driver.device(device).and_then(|_| driver.attribute(which, device)))?)
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

    /// A device's identity: its number, among zeros.
    fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) {
        let device = with(|driver| driver.device(device))?;
        let mut told = *b"vcuda           ";
        told[15] = device as u8;
        give(uuid, told)
    }

    /// The first form.
    fn cuDeviceGetUuid(uuid: *mut [u8; 16], device: c_int) {
        checked(cuDeviceGetUuid_v2(uuid, device))
    }

    /// Where a device is on the bus.
    fn cuDeviceGetPCIBusId(text: *mut c_char, room: c_int, device: c_int) {
        let device = with(|driver| driver.device(device))?;
        write_text(text, room, &format!("0000:{:02X}:00.0", device + 1))
    }

    /// The device at a place on the bus.
    fn cuDeviceGetByPCIBusId(device: *mut c_int, place: *const c_char) {
        let bus = text(place)?.rsplit(':').nth(1).and_then(|bus| i32::from_str_radix(bus, 16).ok());
        let bus = bus.ok_or(Code::INVALID_VALUE)?;
        give(device, with(|driver| driver.device(bus - 1))?)
    }

    /// Whether a device can use another's memory: none can.
    fn cuDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        with(|driver| driver.device(device).and(driver.device(peer)))?;
        give(can, 0)
    }

    /// Ends a device's primary context.
    fn cuDevicePrimaryCtxReset_v2(device: c_int) {
        with(|driver| driver.reset(device))
    }

    /// Flags of a primary context: how threads wait, which makes no difference.
    fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: c_uint) {
        with(|driver| driver.device(device))?;
        if flags & !0x1f == 0 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// Whether there is a primary context.
    fn cuDevicePrimaryCtxGetState(device: c_int, flags: *mut c_uint, active: *mut c_int) {
        let is_active = with(|driver| driver.is_active(device))?;
        give(flags, 0)?;
        give(active, c_int::from(is_active))
    }

    /// A context of its own.
    fn cuCtxCreate_v2(context: *mut Handle, flags: c_uint, device: c_int) {
        if flags & !0x1f != 0 {
            return Err(Code::INVALID_VALUE);
        }
        give_handle(context, with(|driver| driver.create(device))?)
    }

    /// The same; parameters, which choose a part of the device, are not built.
    fn cuCtxCreate_v4(context: *mut Handle, params: *const ContextParams, flags: c_uint, device: c_int) {
        if !params.is_null() && (params.read().affinities != 0 || !params.read().graphics.is_null()) {
            say("parameters of cuCtxCreate are not built");
            return Err(Code::NOT_SUPPORTED);
        }
        checked(cuCtxCreate_v2(context, flags, device))
    }

    /// Ends it.
    fn cuCtxDestroy_v2(context: Handle) {
        with(|driver| driver.destroy(known(context)))
    }

    /// This thread's context, null for none.
    fn cuCtxGetCurrent(context: *mut Handle) {
        with(|_| Ok(()))?;
        give_handle(context, driver::current())
    }

    /// Makes a context this thread's, above those that it has.
    fn cuCtxPushCurrent_v2(context: Handle) {
        driver::push_current(known(context))
    }

    /// Takes the context away that was pushed last.
    fn cuCtxPopCurrent_v2(context: *mut Handle) {
        let popped = driver::pop_current()?;
        if context.is_null() { Ok(()) } else { give_handle(context, popped) }
    }

    /// The device of this thread's context.
    fn cuCtxGetDevice(device: *mut c_int) {
        give(device, with(|driver| driver.device_of(driver::current()))?)
    }

    /// The flags of this thread's context: none.
    fn cuCtxGetFlags(flags: *mut c_uint) {
        with(|driver| driver.device_of(driver::current()))?;
        give(flags, 0)
    }

    /// The version of the API that a context was made for.
    fn cuCtxGetApiVersion(context: Handle, version: *mut c_uint) {
        let context = if context.is_null() { driver::current() } else { known(context) };
        with(|driver| driver.device_of(context))?;
        give(version, 3020)
    }

    /// Waits for all work of this thread's context.
    fn cuCtxSynchronize() {
        with_context(|context| context.wait_all())
    }

    /// The least and the greatest priority of streams.
    fn cuCtxGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        with_context(|_| Ok(()))?;
        if !least.is_null() {
            give(least, 0)?;
        }
        if greatest.is_null() { Ok(()) } else { give(greatest, driver::GREATEST_PRIORITY) }
    }

    /// A limit of this thread's context, as this machine has it.
    fn cuCtxGetLimit(value: *mut usize, which: c_uint) {
        with_context(|_| Ok(()))?;
        let told = match which {
            0 => 512 << 10,        // STACK_SIZE
            1 => 1 << 20,          // PRINTF_FIFO_SIZE
            2 => 8 << 20,          // MALLOC_HEAP_SIZE
            _ => return Err(Code::NOT_SUPPORTED),
        };
        give(value, told)
    }

    /// Sets a limit: what is not above what this machine has, it has already.
    fn cuCtxSetLimit(which: c_uint, value: usize) {
        let mut most = 0;
        checked(cuCtxGetLimit(&raw mut most, which))?;
        if value <= most || which == 1 {
            return Ok(());
        }
        say(&format!("limit {which} cannot be raised above {most}"));
        Err(Code::NOT_SUPPORTED)
    }

    /// How caches are cut, of which there are none: no preference.
    fn cuCtxGetCacheConfig(config: *mut c_uint) {
        with_context(|_| Ok(()))?;
        give(config, 0)
    }

    /// A hint of how caches are cut.
    fn cuCtxSetCacheConfig(config: c_uint) {
        with_context(|_| Ok(()))?;
        if config <= 3 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// Access to another device's memory, which no device has.
    fn cuCtxEnablePeerAccess(peer: Handle, _flags: c_uint) {
        with(|driver| driver.device_of(known(peer)))?;
        Err(Code::PEER_ACCESS_UNSUPPORTED)
    }

    /// Ends it.
    fn cuCtxDisablePeerAccess(peer: Handle) {
        with(|driver| driver.device_of(known(peer)))?;
        Err(Code::PEER_ACCESS_NOT_ENABLED)
    }

    /// The address of a function by its name, without a version; `version` is the newest that the caller knows.
    fn cuGetProcAddress(symbol: *const c_char, address: *mut *const (), _version: c_int, flags: u64) {
        let mut status = 0;
        checked(cuGetProcAddress_v2(symbol, address, _version, flags, &raw mut status))?;
        if status == 0 { Ok(()) } else { Err(Code::NOT_FOUND) }
    }

    /// The same; status 1 says that there is none of the name.
    fn cuGetProcAddress_v2(
        symbol: *const c_char,
        address: *mut *const (),
        _version: c_int,
        flags: u64,
        status: *mut c_uint,
    ) {
        // CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM asks for functions that take 0 for the thread's stream: there are none.
        let found = super::entry(text(symbol)?).filter(|_| flags & 2 == 0);
        give(address, found.unwrap_or(std::ptr::null()))?;
        if !status.is_null() {
            give(status, c_uint::from(found.is_none()))?;
        }
        if found.is_some() || !status.is_null() { Ok(()) } else { Err(Code::NOT_FOUND) }
    }

    /// Tables of functions that only NVIDIA's own runtime knows.
    fn cuGetExportTable(_table: *mut *const c_void, _which: *const [u8; 16]) {
        say(
            "the program asks for what only NVIDIA's own runtime does, which it holds within: build it with \
             nvcc -cudart shared and let it find libcudart.so of tools/vcudart",
        );
        Err(Code::NOT_SUPPORTED)
    }

    /// A profiler begins here: there is none.
    fn cuProfilerStart() {
        with_context(|_| Ok(()))
    }

    /// It ends here.
    fn cuProfilerStop() {
        with_context(|_| Ok(()))
    }
}
