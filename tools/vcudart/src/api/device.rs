//! Devices, errors and versions.

use std::ffi::{c_char, c_int, c_uint, c_void};

use vcuda::api::device as driver_device;
use vcuda::code::{Code, say};
use vcuda::driver::{with, with_context};

use super::{Handle, LAST, answer, checked, export, give};
use crate::error::told;
use crate::properties::{Properties12, Properties13, properties12, properties13};
use crate::registry;

/// The last error of this thread, which is forgotten then. An error of a kernel stays with the context.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetLastError() -> c_uint {
    LAST.replace(0)
}

/// The last error of this thread.
#[unsafe(no_mangle)]
pub extern "C" fn cudaPeekAtLastError() -> c_uint {
    LAST.get()
}

/// The name of a result.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorName(code: c_uint) -> *const c_char {
    told(code).map_or(c"unrecognized error code", |(name, _)| name).as_ptr()
}

/// The sentence of a result.
#[unsafe(no_mangle)]
pub extern "C" fn cudaGetErrorString(code: c_uint) -> *const c_char {
    told(code).map_or(c"unrecognized error code", |(_, sentence)| sentence).as_ptr()
}

export! {
    /// 1000 major + 10 minor of the driver.
    fn cudaDriverGetVersion(version: *mut c_int) {
        checked(driver_device::cuDriverGetVersion(version))
    }

    /// The same of the runtime, which is the driver's.
    fn cudaRuntimeGetVersion(version: *mut c_int) {
        checked(cudaDriverGetVersion(version))
    }

    /// How many devices there are.
    fn cudaGetDeviceCount(count: *mut c_int) {
        give(count, 0)?;
        registry::start()?;
        give(count, with(|driver| Ok(driver.settings.devices))?)
    }

    /// This thread's device.
    fn cudaGetDevice(device: *mut c_int) {
        registry::start()?;
        give(device, registry::device())
    }

    /// Chooses it.
    fn cudaSetDevice(device: c_int) {
        registry::choose(device).map(drop)
    }

    /// Chooses and starts a device.
    fn cudaInitDevice(device: c_int, flags: c_uint, device_flags: c_uint) {
        if flags > 1 || device_flags & !0x1f != 0 {
            return Err(Code::INVALID_VALUE);
        }
        registry::choose(device).map(drop)
    }

    /// How threads wait, which makes no difference.
    fn cudaSetDeviceFlags(flags: c_uint) {
        registry::start()?;
        if flags & !0x1f == 0 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// The flags: none.
    fn cudaGetDeviceFlags(flags: *mut c_uint) {
        registry::context()?;
        give(flags, 0)
    }

    /// A device's properties in the layout of CUDA 13.
    fn cudaGetDeviceProperties(to: *mut Properties13, device: c_int) {
        registry::start()?;
        give(to, properties13(device)?)
    }

    /// The same in the layout of CUDA 12.
    fn cudaGetDeviceProperties_v2(to: *mut Properties12, device: c_int) {
        registry::start()?;
        give(to, properties12(device)?)
    }

    /// A device's attribute; the numbers are the driver's.
    fn cudaDeviceGetAttribute(value: *mut c_int, which: c_uint, device: c_int) {
        registry::start()?;
        checked(driver_device::cuDeviceGetAttribute(value, which, device))
    }

    /// Where a device is on the bus.
    fn cudaDeviceGetPCIBusId(text: *mut c_char, room: c_int, device: c_int) {
        registry::start()?;
        checked(driver_device::cuDeviceGetPCIBusId(text, room, device))
    }

    /// The device at a place on the bus.
    fn cudaDeviceGetByPCIBusId(device: *mut c_int, place: *const c_char) {
        registry::start()?;
        checked(driver_device::cuDeviceGetByPCIBusId(device, place))
    }

    /// Waits for all work of this thread's device.
    fn cudaDeviceSynchronize() {
        registry::context()?;
        with_context(|context| context.wait_all())
    }

    /// Ends this thread's device with all in it. What a program has not given back is told.
    fn cudaDeviceReset() {
        registry::reset()
    }

    /// Whether a device can use another's memory: none can.
    fn cudaDeviceCanAccessPeer(can: *mut c_int, device: c_int, peer: c_int) {
        registry::start()?;
        checked(driver_device::cuDeviceCanAccessPeer(can, device, peer))
    }

    /// What two devices have between them: nothing.
    fn cudaDeviceGetP2PAttribute(value: *mut c_int, which: c_uint, device: c_int, peer: c_int) {
        registry::start()?;
        with(|driver| driver.device(device).and(driver.device(peer)))?;
        if device == peer || !(1..=5).contains(&which) {
            return Err(Code::INVALID_VALUE);
        }
        give(value, 0)
    }

    /// Access to another device's memory, which no device has.
    fn cudaDeviceEnablePeerAccess(peer: c_int, _flags: c_uint) {
        registry::start()?;
        with(|driver| driver.device(peer))?;
        Err(Code::PEER_ACCESS_UNSUPPORTED)
    }

    /// Ends it.
    fn cudaDeviceDisablePeerAccess(peer: c_int) {
        registry::start()?;
        with(|driver| driver.device(peer))?;
        Err(Code::PEER_ACCESS_NOT_ENABLED)
    }

    /// A limit, as this machine has it.
    fn cudaDeviceGetLimit(value: *mut usize, which: c_uint) {
        registry::context()?;
        checked(driver_device::cuCtxGetLimit(value, which))
    }

    /// Sets a limit: what is not above what this machine has, it has already.
    fn cudaDeviceSetLimit(which: c_uint, value: usize) {
        registry::context()?;
        checked(driver_device::cuCtxSetLimit(which, value))
    }

    /// How caches are cut, of which there are none.
    fn cudaDeviceGetCacheConfig(config: *mut c_uint) {
        registry::context()?;
        give(config, 0)
    }

    /// A hint of that.
    fn cudaDeviceSetCacheConfig(config: c_uint) {
        registry::context()?;
        if config <= 3 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// How wide banks of shared memory are: 4 bytes.
    fn cudaDeviceGetSharedMemConfig(config: *mut c_uint) {
        registry::context()?;
        give(config, 1)
    }

    /// A hint of that, which later devices do not take.
    fn cudaDeviceSetSharedMemConfig(config: c_uint) {
        registry::context()?;
        if config <= 2 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// The least and the greatest priority of streams.
    fn cudaDeviceGetStreamPriorityRange(least: *mut c_int, greatest: *mut c_int) {
        registry::context()?;
        checked(driver_device::cuCtxGetStreamPriorityRange(least, greatest))
    }

    /// The pool that cudaMallocAsync takes memory from: the device's, by a name that is not null.
    fn cudaDeviceGetDefaultMemPool(pool: *mut Handle, device: c_int) {
        registry::start()?;
        with(|driver| driver.device(device))?;
        give(pool, POOL)
    }

    /// The same: no other can be made.
    fn cudaDeviceGetMemPool(pool: *mut Handle, device: c_int) {
        checked(cudaDeviceGetDefaultMemPool(pool, device))
    }

    /// A property of the pool: that it keeps what was given back (1 to 4) says how, and makes no difference.
    fn cudaMemPoolSetAttribute(pool: Handle, which: c_uint, value: *const c_void) {
        registry::start()?;
        if pool != POOL || value.is_null() || !(1..=4).contains(&which) {
            return Err(Code::INVALID_VALUE);
        }
        Ok(())
    }

    /// Gives back what the pool keeps: nothing.
    fn cudaMemPoolTrimTo(pool: Handle, _bytes: usize) {
        registry::start()?;
        if pool == POOL { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// The device that is most like what is asked for: the first.
    fn cudaChooseDevice(device: *mut c_int, _wanted: *const c_void) {
        registry::start()?;
        give(device, 0)
    }

    /// Devices that a thread may use, of which it uses the first.
    fn cudaSetValidDevices(devices: *const c_int, count: c_int) {
        registry::start()?;
        if devices.is_null() || count < 1 {
            say("cudaSetValidDevices without a device");
            return Err(Code::INVALID_VALUE);
        }
        registry::choose(devices.read()).map(drop)
    }
}

/// The only pool.
pub(super) const POOL: Handle = std::ptr::without_provenance_mut(0xc0da);
