//! Memory, copies and fills.

use std::ffi::{c_int, c_uint, c_void};

use super::{Entry, Handle, answer, checked, export, give, known};
use crate::code::{Code, say};
use crate::driver::{self, Context, Kind, LEGACY, with, with_context};

/// CUmemLocation: a kind of place, and its number.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Location {
    kind: c_int,
    id: c_int,
}

/// One side of CUDA_MEMCPY2D.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Side {
    x: usize,
    y: usize,
    /// Host, device, array, or whatever the address says.
    kind: c_uint,
    host: usize,
    device: u64,
    array: usize,
    pitch: usize,
}

/// CUDA_MEMCPY2D.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Rectangle {
    from: Side,
    to: Side,
    width: usize,
    height: usize,
}

impl Side {
    fn side(&self, context: &Context) -> Result<(u64, bool, [usize; 2]), Code> {
        let (at, on_device) = match self.kind {
            1 => (self.host as u64, false),
            2 => (self.device, true),
            4 => (self.device, context.on_device(self.device)),
            _ => {
                say("arrays are not built");
                return Err(Code::NOT_SUPPORTED);
            }
        };
        let skipped = self.y.checked_mul(self.pitch).and_then(|rows| rows.checked_add(self.x));
        let at = skipped.and_then(|bytes| at.checked_add(bytes as u64)).ok_or(Code::INVALID_VALUE)?;
        Ok((at, on_device, [self.pitch, 0]))
    }
}

/// Copies between any two addresses.
///
/// # Safety
/// As the driver's documentation says of cuMemcpyAsync's.
pub unsafe fn line(to: u64, from: u64, bytes: usize, stream: u64) -> Result<(), Code> {
    if to == 0 || from == 0 {
        return Err(Code::INVALID_VALUE);
    }
    with_context(|context| {
        let side = |at: u64| (at, context.on_device(at), [0; 2]);
        let (to, from) = (side(to), side(from));
        // SAFETY: the caller's word.
        unsafe { context.copy_box(to, from, [bytes, 1, 1], stream) }
    })
}

/// Sets rows of values.
fn set(to: u64, pattern: &[u8], pitch: usize, [count, rows]: [usize; 2], stream: Handle) -> Result<(), Code> {
    let width = count.checked_mul(pattern.len()).ok_or(Code::INVALID_VALUE)?;
    with_context(|context| context.fill(to, pattern, pitch, [width, rows], known(stream)))
}

/// Whether bytes lie in managed memory.
fn managed(address: u64, bytes: usize) -> Result<(), Code> {
    with_context(|context| {
        let found = context.block(address);
        let inside = found.is_some_and(|(start, block)| {
            let is_managed = matches!(block.kind, Kind::Managed | Kind::ManagedVariable);
            is_managed && (address - start).saturating_add(bytes as u64) <= block.bytes
        });
        if inside { Ok(()) } else { Err(Code::INVALID_VALUE) }
    })
}

export! { TABLE:
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

    /// Page-locked memory without flags.
    fn cuMemAllocHost_v2(address: *mut Handle, bytes: usize) {
        checked(cuMemHostAlloc(address, bytes, 0))
    }

    /// The same address on the device, of page-locked memory; of registered memory another.
    fn cuMemHostGetDevicePointer_v2(device: *mut u64, address: Handle, flags: c_uint) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        give(device, with_context(|context| context.device_pointer(address.addr()))?)
    }

    /// Flags that page-locked memory was asked for with.
    fn cuMemHostGetFlags(flags: *mut c_uint, address: Handle) {
        let block = with_context(|context| {
            Ok(context.block(address.addr() as u64).or(context.registered(address.addr())))
        })?;
        let (_, block) = block.filter(|(_, b)| b.kind.on_host()).ok_or(Code::INVALID_VALUE)?;
        give(flags, block.flags)
    }

    /// Page-locks memory of the program's own.
    fn cuMemHostRegister_v2(address: Handle, bytes: usize, flags: c_uint) {
        with_context(|context| context.register(address.expose_provenance(), bytes, flags))
    }

    /// Ends that.
    fn cuMemHostUnregister(address: Handle) {
        with_context(|context| context.unregister(address.addr()))
    }

    /// Memory with one address on host and device.
    fn cuMemAllocManaged(address: *mut u64, bytes: usize, flags: c_uint) {
        give(address, with_context(|context| context.alloc_managed(bytes, flags))?)
    }

    /// Rows that each begin at a multiple of 512 bytes.
    fn cuMemAllocPitch_v2(address: *mut u64, pitch: *mut usize, width: usize, rows: usize, _element: c_uint) {
        let row = width.checked_next_multiple_of(512).ok_or(Code::INVALID_VALUE)?;
        let bytes = row.checked_mul(rows).ok_or(Code::INVALID_VALUE)?;
        give(address, with_context(|context| context.alloc(bytes))?)?;
        give(pitch, row)
    }

    /// Device memory that a stream's later work uses: it is there at once.
    fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: Handle) {
        with_context(|context| context.stream_told(known(stream)).map(drop))?;
        give(address, with_context(|context| context.alloc(bytes))?)
    }

    /// Gives memory back behind a stream's work.
    fn cuMemFreeAsync(address: u64, stream: Handle) {
        with_context(|context| context.free_later(address, known(stream)))
    }

    /// Where an address's allocation begins, and its bytes.
    fn cuMemGetAddressRange_v2(start: *mut u64, bytes: *mut usize, address: u64) {
        let (at, block) = with_context(|context| context.block(address).ok_or(Code::NOT_FOUND))?;
        if !start.is_null() {
            give(start, at)?;
        }
        if bytes.is_null() { Ok(()) } else { give(bytes, block.bytes as usize) }
    }

    /// A property of an address.
    fn cuPointerGetAttribute(value: Handle, which: c_uint, address: u64) {
        if value.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let found = with(|driver| {
            let Some(context) = driver.owner(address) else {
                let here = driver.contexts_mut().find_map(|context| {
                    let (start, block) = context.registered(address as usize)?;
                    Some((start, block, context.handle(), context.device))
                });
                return Ok(here);
            };
            let (handle, device) = (context.handle(), context.device);
            Ok(context.block(address).map(|(start, block)| (start, block, handle, device)))
        })?;
        let (start, block, context, device) = found.ok_or(Code::INVALID_VALUE)?;
        let host = match block.kind {
            Kind::Registered(host) => host as u64,
            _ => start,
        };
        let is_host = matches!(block.kind, Kind::Locked | Kind::Registered(_));
        let is_managed = matches!(block.kind, Kind::Managed | Kind::ManagedVariable);
        // An address on the host of registered memory, or one of the device's.
        let at = if address >= start && address < start + block.bytes { address - start } else { address - host };
        match which {
            1 => value.cast::<u64>().write(context),                            // CONTEXT
            2 => value.cast::<c_uint>().write(if is_host { 1 } else { 2 }),     // MEMORY_TYPE
            3 => value.cast::<u64>().write(start + at),                         // DEVICE_POINTER
            4 if block.kind.on_host() => value.cast::<u64>().write(host + at),  // HOST_POINTER
            6 => value.cast::<c_uint>().write(1),                               // SYNC_MEMOPS
            7 => value.cast::<u64>().write(block.id),                           // BUFFER_ID
            8 => value.cast::<c_uint>().write(c_uint::from(is_managed)),        // IS_MANAGED
            9 => value.cast::<c_int>().write(device),                           // DEVICE_ORDINAL
            11 => value.cast::<u64>().write(start),                             // RANGE_START_ADDR
            12 => value.cast::<usize>().write(block.bytes as usize),            // RANGE_SIZE
            13 => value.cast::<c_uint>().write(1),                              // MAPPED
            _ => return Err(Code::INVALID_VALUE),
        }
        Ok(())
    }

    /// Where managed memory should be before it is used: it is everywhere.
    fn cuMemPrefetchAsync(address: u64, bytes: usize, _to: c_int, stream: Handle) {
        with_context(|context| context.stream_told(known(stream)).map(drop))?;
        managed(address, bytes)
    }

    /// The same with a place by kind and number.
    fn cuMemPrefetchAsync_v2(address: u64, bytes: usize, to: Location, flags: c_uint, stream: Handle) {
        if flags != 0 || !(0..=4).contains(&to.kind) {
            return Err(Code::INVALID_VALUE);
        }
        checked(cuMemPrefetchAsync(address, bytes, to.id, stream))
    }

    /// A hint of how managed memory is used.
    fn cuMemAdvise(address: u64, bytes: usize, advice: c_uint, _device: c_int) {
        if !(1..=6).contains(&advice) {
            return Err(Code::INVALID_VALUE);
        }
        managed(address, bytes)
    }

    /// The same with a place by kind and number.
    fn cuMemAdvise_v2(address: u64, bytes: usize, advice: c_uint, place: Location) {
        checked(cuMemAdvise(address, bytes, advice, place.id))
    }

    /// Who may use managed memory while work runs, which is nobody here.
    fn cuStreamAttachMemAsync(stream: Handle, address: u64, _bytes: usize, flags: c_uint) {
        if ![1, 2, 4].contains(&flags) {
            return Err(Code::INVALID_VALUE);
        }
        with_context(|context| context.stream_told(known(stream)).map(drop))?;
        managed(address, 1)
    }

    /// Between any two addresses, ordered with all streams.
    fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        line(to, from, bytes, LEGACY)?;
        with_context(|context| context.wait(LEGACY))
    }

    /// Between any two addresses.
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) {
        line(to, from, bytes, known(stream))
    }

    /// Host to device, and waits.
    fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) {
        checked(cuMemcpyHtoDAsync_v2(to, from, bytes, std::ptr::null_mut()))?;
        with_context(|context| context.wait(LEGACY))
    }

    /// Device to host, and waits.
    fn cuMemcpyDtoH_v2(to: Handle, from: u64, bytes: usize) {
        checked(cuMemcpyDtoHAsync_v2(to, from, bytes, std::ptr::null_mut()))?;
        with_context(|context| context.wait(LEGACY))
    }

    /// Within the device, ordered with all streams.
    fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        checked(cuMemcpyDtoDAsync_v2(to, from, bytes, std::ptr::null_mut()))
    }

    /// Within the device.
    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) {
        let sides = ((to, true, [0; 2]), (from, true, [0; 2]));
        with_context(|context| context.copy_box(sides.0, sides.1, [bytes, 1, 1], known(stream)))
    }

    /// From a context to itself, ordered with all streams; between two, it is not built.
    fn cuMemcpyPeer(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize) {
        checked(cuMemcpyPeerAsync(to, to_context, from, from_context, bytes, std::ptr::null_mut()))
    }

    /// From a context to itself.
    fn cuMemcpyPeerAsync(
        to: u64,
        to_context: Handle,
        from: u64,
        from_context: Handle,
        bytes: usize,
        stream: Handle,
    ) {
        if to_context != from_context || known(to_context) != driver::current() {
            say("copies between devices are not built");
            return Err(Code::NOT_SUPPORTED);
        }
        checked(cuMemcpyDtoDAsync_v2(to, from, bytes, stream))
    }

    /// A rectangle, and waits.
    fn cuMemcpy2D_v2(copy: *const Rectangle) {
        checked(cuMemcpy2DAsync_v2(copy, std::ptr::null_mut()))?;
        with_context(|context| context.wait(LEGACY))
    }

    /// The same: it has no need of aligned rows.
    fn cuMemcpy2DUnaligned_v2(copy: *const Rectangle) {
        checked(cuMemcpy2D_v2(copy))
    }

    /// A rectangle.
    fn cuMemcpy2DAsync_v2(copy: *const Rectangle, stream: Handle) {
        if copy.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let Rectangle { from, to, width, height } = copy.read();
        let extent = [width, height, 1];
        with_context(|context| {
            let (to, from) = (to.side(context)?, from.side(context)?);
            context.copy_box(to, from, extent, known(stream))
        })
    }

    /// Sets bytes, ordered with all streams.
    fn cuMemsetD8_v2(to: u64, value: u8, count: usize) {
        checked(cuMemsetD8Async(to, value, count, std::ptr::null_mut()))
    }

    /// Sets words of 16 bits, ordered with all streams.
    fn cuMemsetD16_v2(to: u64, value: u16, count: usize) {
        checked(cuMemsetD16Async(to, value, count, std::ptr::null_mut()))
    }

    /// Sets words of 32 bits, ordered with all streams.
    fn cuMemsetD32_v2(to: u64, value: u32, count: usize) {
        checked(cuMemsetD32Async(to, value, count, std::ptr::null_mut()))
    }

    /// Sets bytes.
    fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: Handle) {
        set(to, &[value], 0, [count, 1], stream)
    }

    /// Sets words of 16 bits.
    fn cuMemsetD16Async(to: u64, value: u16, count: usize, stream: Handle) {
        set(to, &value.to_le_bytes(), 0, [count, 1], stream)
    }

    /// Sets words of 32 bits.
    fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: Handle) {
        set(to, &value.to_le_bytes(), 0, [count, 1], stream)
    }

    /// Sets bytes of rows, ordered with all streams.
    fn cuMemsetD2D8_v2(to: u64, pitch: usize, value: u8, width: usize, rows: usize) {
        set(to, &[value], pitch, [width, rows], std::ptr::null_mut())
    }

    /// Sets words of 16 bits of rows, ordered with all streams.
    fn cuMemsetD2D16_v2(to: u64, pitch: usize, value: u16, width: usize, rows: usize) {
        set(to, &value.to_le_bytes(), pitch, [width, rows], std::ptr::null_mut())
    }

    /// Sets words of 32 bits of rows, ordered with all streams.
    fn cuMemsetD2D32_v2(to: u64, pitch: usize, value: u32, width: usize, rows: usize) {
        set(to, &value.to_le_bytes(), pitch, [width, rows], std::ptr::null_mut())
    }

    /// Sets bytes of rows.
    fn cuMemsetD2D8Async(to: u64, pitch: usize, value: u8, width: usize, rows: usize, stream: Handle) {
        set(to, &[value], pitch, [width, rows], stream)
    }

    /// Sets words of 16 bits of rows.
    fn cuMemsetD2D16Async(to: u64, pitch: usize, value: u16, width: usize, rows: usize, stream: Handle) {
        set(to, &value.to_le_bytes(), pitch, [width, rows], stream)
    }

    /// Sets words of 32 bits of rows.
    fn cuMemsetD2D32Async(to: u64, pitch: usize, value: u32, width: usize, rows: usize, stream: Handle) {
        set(to, &value.to_le_bytes(), pitch, [width, rows], stream)
    }
}
