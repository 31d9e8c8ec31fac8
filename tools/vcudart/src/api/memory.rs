//! Memory, copies and fills.

use std::ffi::{c_int, c_uint};

use vcuda::api::memory as driver;
use vcuda::code::{Code, say};
use vcuda::driver::{Context, Kind, LEGACY, with, with_context};

use super::device::POOL;
use super::{Handle, answer, checked, export, give, give_handle, known};
use crate::error::{INVALID_DIRECTION, INVALID_SYMBOL};
use crate::registry;

/// cudaExtent.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Extent {
    width: usize,
    height: usize,
    depth: usize,
}

/// cudaPitchedPtr.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Pitched {
    at: Handle,
    pitch: usize,
    width: usize,
    rows: usize,
}

/// cudaMemcpy3DParms.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Copy3D {
    from_array: Handle,
    from_place: [usize; 3],
    from: Pitched,
    to_array: Handle,
    to_place: [usize; 3],
    to: Pitched,
    extent: Extent,
    kind: c_uint,
}

/// cudaPointerAttributes up to where CUDA 12 and 13 agree.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PointerAttributes {
    kind: c_uint,
    device: c_int,
    device_pointer: Handle,
    host_pointer: Handle,
}

/// Whether a side of a copy is on the device. `said` is what the kind of the copy says of it.
fn side(context: &Context, at: u64, said: Option<bool>, what: &str) -> Result<bool, Code> {
    let block = context.block(at);
    let wrong = |is: &str, kind: &str| {
        say(&format!("a copy's {what} at {at:#x} is {is}, and its kind says {kind}"));
        Err(Code::INVALID_VALUE)
    };
    match (said, block) {
        (Some(true), None) => wrong("no memory of the device", "device"),
        (Some(false), Some((_, block))) if !block.kind.on_host() => wrong("memory of the device", "host"),
        // Page-locked memory that is named as the host's is read and written as such.
        (Some(said), _) => Ok(said),
        (None, block) => Ok(block.is_some_and(|(_, block)| !matches!(block.kind, Kind::Locked))),
    }
}

/// What a kind of copy says of its sides: target and source.
fn kinds(kind: c_uint) -> Result<(Option<bool>, Option<bool>), Code> {
    Ok(match kind {
        0 => (Some(false), Some(false)),
        1 => (Some(true), Some(false)),
        2 => (Some(false), Some(true)),
        3 => (Some(true), Some(true)),
        4 => (None, None),
        _ => return Err(INVALID_DIRECTION),
    })
}

/// Copies a box; a copy that is not asynchronous waits for it, unless it stays on the device.
unsafe fn copy(
    (to, to_pitch): (Handle, [usize; 2]),
    (from, from_pitch): (Handle, [usize; 2]),
    extent: [usize; 3],
    kind: c_uint,
    stream: Option<Handle>,
) -> Result<(), Code> {
    registry::context()?;
    let (to_said, from_said) = kinds(kind)?;
    if extent.contains(&0) {
        return Ok(());
    }
    if to.is_null() || from.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let (to, from) = (to.expose_provenance() as u64, from.expose_provenance() as u64);
    let on_device = with_context(|context| {
        let to_device = side(context, to, to_said, "target")?;
        let from_device = side(context, from, from_said, "source")?;
        let (to, from) = ((to, to_device, to_pitch), (from, from_device, from_pitch));
        // SAFETY: the caller's word.
        unsafe { context.copy_box(to, from, extent, stream.map_or(LEGACY, known)) }?;
        Ok(to_device && from_device)
    })?;
    if stream.is_some() || on_device { Ok(()) } else { with_context(|context| context.wait(LEGACY)) }
}

/// Copies a 3D box, both sides of which are pitched memory.
unsafe fn copy_3d(copied: *const Copy3D, stream: Option<Handle>) -> Result<(), Code> {
    if copied.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: the caller's word.
    let Copy3D { from_array, from_place, from, to_array, to_place, to, extent, kind } =
        unsafe { copied.read() };
    if !from_array.is_null() || !to_array.is_null() {
        say("arrays are not built");
        return Err(Code::NOT_SUPPORTED);
    }
    let place = |side: Pitched, [x, y, z]: [usize; 3]| {
        let slice = side.pitch.checked_mul(side.rows).ok_or(Code::INVALID_VALUE)?;
        let skipped = y.checked_mul(side.pitch).and_then(|rows| z.checked_mul(slice)?.checked_add(rows));
        let skipped = skipped.and_then(|bytes| bytes.checked_add(x)).ok_or(Code::INVALID_VALUE)?;
        Ok((side.at.wrapping_byte_add(skipped), [side.pitch, slice]))
    };
    let extent = [extent.width, extent.height, extent.depth];
    // SAFETY: the caller's word.
    unsafe { copy(place(to, to_place)?, place(from, from_place)?, extent, kind, stream) }
}

/// The address of bytes of a variable.
fn in_symbol(symbol: Handle, bytes: usize, offset: usize) -> Result<Handle, Code> {
    let (at, size) = variable(symbol)?;
    if offset.checked_add(bytes).is_none_or(|end| end > size) {
        say(&format!("{bytes} bytes at {offset} of a variable of {size} bytes"));
        return Err(Code::INVALID_VALUE);
    }
    Ok(std::ptr::with_exposed_provenance_mut(at as usize + offset))
}

/// A variable's address and bytes. The host's name of a managed variable is its address already.
fn variable(symbol: Handle) -> Result<(u64, usize), Code> {
    registry::variable(symbol.addr()).or_else(|code| {
        let block = with_context(|context| Ok(context.block(known(symbol))))?;
        match block {
            Some((start, block)) if block.kind == Kind::ManagedVariable && code == INVALID_SYMBOL => {
                Ok((start, block.bytes as usize))
            }
            _ => Err(code),
        }
    })
}

/// Sets rows of bytes.
fn set(
    to: Handle,
    value: c_int,
    pitch: usize,
    [width, rows]: [usize; 2],
    stream: Handle,
) -> Result<(), Code> {
    registry::context()?;
    with_context(|context| context.fill(known(to), &[value as u8], pitch, [width, rows], known(stream)))
}

/// Sets a box of bytes, slice by slice.
fn set_3d(to: Pitched, value: c_int, extent: Extent, stream: Handle) -> Result<(), Code> {
    let slice = to.pitch.checked_mul(to.rows).ok_or(Code::INVALID_VALUE)?;
    (0..extent.depth).try_for_each(|i| {
        set(to.at.wrapping_byte_add(i * slice), value, to.pitch, [extent.width, extent.height], stream)
    })
}

const DEFAULT: Handle = std::ptr::null_mut();

export! {
    /// Device memory; null for no bytes.
    fn cudaMalloc(address: *mut Handle, bytes: usize) {
        registry::context()?;
        let at = if bytes == 0 { 0 } else { with_context(|context| context.alloc(bytes))? };
        give_handle(address, at)
    }

    /// Gives it back; null is nothing.
    fn cudaFree(address: Handle) {
        registry::context()?;
        if address.is_null() { Ok(()) } else { with_context(|context| context.free(known(address))) }
    }

    /// Memory with one address on host and device.
    fn cudaMallocManaged(address: *mut Handle, bytes: usize, flags: c_uint) {
        registry::context()?;
        give_handle(address, with_context(|context| context.alloc_managed(bytes, flags))?)
    }

    /// Page-locked memory.
    fn cudaMallocHost(address: *mut Handle, bytes: usize) {
        checked(cudaHostAlloc(address, bytes, 0))
    }

    /// Page-locked memory; null for no bytes.
    fn cudaHostAlloc(address: *mut Handle, bytes: usize, flags: c_uint) {
        registry::context()?;
        let at = if bytes == 0 { 0 } else { with_context(|context| context.lock(bytes, flags))? };
        give_handle(address, at as u64)
    }

    /// Gives it back.
    fn cudaFreeHost(address: Handle) {
        registry::context()?;
        if address.is_null() { Ok(()) } else { with_context(|context| context.unlock(address.addr())) }
    }

    /// Its address on the device.
    fn cudaHostGetDevicePointer(device: *mut Handle, address: Handle, flags: c_uint) {
        registry::context()?;
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        give_handle(device, with_context(|context| context.device_pointer(address.addr()))?)
    }

    /// The flags that it was asked for with.
    fn cudaHostGetFlags(flags: *mut c_uint, address: Handle) {
        registry::context()?;
        checked(driver::cuMemHostGetFlags(flags, address))
    }

    /// Page-locks memory of the program's own.
    fn cudaHostRegister(address: Handle, bytes: usize, flags: c_uint) {
        registry::context()?;
        checked(driver::cuMemHostRegister_v2(address, bytes, flags))
    }

    /// Ends that.
    fn cudaHostUnregister(address: Handle) {
        registry::context()?;
        checked(driver::cuMemHostUnregister(address))
    }

    /// Rows that each begin at a multiple of 512 bytes.
    fn cudaMallocPitch(address: *mut Handle, pitch: *mut usize, width: usize, rows: usize) {
        registry::context()?;
        let mut at = 0;
        checked(driver::cuMemAllocPitch_v2(&raw mut at, pitch, width, rows, 4))?;
        give_handle(address, at)
    }

    /// The same of slices.
    fn cudaMalloc3D(to: *mut Pitched, extent: Extent) {
        registry::context()?;
        let (mut at, mut pitch) = (0, 0);
        let rows = extent.height.checked_mul(extent.depth).ok_or(Code::INVALID_VALUE)?;
        checked(driver::cuMemAllocPitch_v2(&raw mut at, &raw mut pitch, extent.width, rows, 4))?;
        let at = std::ptr::with_exposed_provenance_mut(at as usize);
        give(to, Pitched { at, pitch, width: extent.width, rows: extent.height })
    }

    /// Device memory that a stream's later work uses: it is there at once.
    fn cudaMallocAsync(address: *mut Handle, bytes: usize, stream: Handle) {
        registry::context()?;
        with_context(|context| context.stream_told(known(stream)).map(drop))?;
        checked(cudaMalloc(address, bytes))
    }

    /// The same from a pool, of which there is one.
    fn cudaMallocFromPoolAsync(address: *mut Handle, bytes: usize, pool: Handle, stream: Handle) {
        if pool != POOL {
            return Err(Code::INVALID_VALUE);
        }
        checked(cudaMallocAsync(address, bytes, stream))
    }

    /// Gives memory back behind a stream's work.
    fn cudaFreeAsync(address: Handle, stream: Handle) {
        registry::context()?;
        if address.is_null() {
            return Ok(());
        }
        with_context(|context| context.free_later(known(address), known(stream)))
    }

    /// Free and total bytes of the device.
    fn cudaMemGetInfo(free: *mut usize, total: *mut usize) {
        registry::context()?;
        checked(driver::cuMemGetInfo_v2(free, total))
    }

    /// Copies.
    fn cudaMemcpy(to: Handle, from: Handle, bytes: usize, kind: c_uint) {
        copy((to, [0; 2]), (from, [0; 2]), [bytes, 1, 1], kind, None)
    }

    /// Copies behind a stream's work.
    fn cudaMemcpyAsync(to: Handle, from: Handle, bytes: usize, kind: c_uint, stream: Handle) {
        copy((to, [0; 2]), (from, [0; 2]), [bytes, 1, 1], kind, Some(stream))
    }

    /// Copies a rectangle.
    fn cudaMemcpy2D(
        to: Handle,
        to_pitch: usize,
        from: Handle,
        from_pitch: usize,
        width: usize,
        rows: usize,
        kind: c_uint,
    ) {
        copy((to, [to_pitch, 0]), (from, [from_pitch, 0]), [width, rows, 1], kind, None)
    }

    /// Copies a rectangle behind a stream's work.
    fn cudaMemcpy2DAsync(
        to: Handle,
        to_pitch: usize,
        from: Handle,
        from_pitch: usize,
        width: usize,
        rows: usize,
        kind: c_uint,
        stream: Handle,
    ) {
        copy((to, [to_pitch, 0]), (from, [from_pitch, 0]), [width, rows, 1], kind, Some(stream))
    }

    /// Copies a box.
    fn cudaMemcpy3D(copied: *const Copy3D) {
        copy_3d(copied, None)
    }

    /// Copies a box behind a stream's work.
    fn cudaMemcpy3DAsync(copied: *const Copy3D, stream: Handle) {
        copy_3d(copied, Some(stream))
    }

    /// From a device to itself; between two, it is not built.
    fn cudaMemcpyPeer(to: Handle, to_device: c_int, from: Handle, from_device: c_int, bytes: usize) {
        checked(cudaMemcpyPeerAsync(to, to_device, from, from_device, bytes, DEFAULT))
    }

    /// The same behind a stream's work.
    fn cudaMemcpyPeerAsync(
        to: Handle,
        to_device: c_int,
        from: Handle,
        from_device: c_int,
        bytes: usize,
        stream: Handle,
    ) {
        registry::start()?;
        with(|driver| driver.device(to_device).and(driver.device(from_device)))?;
        if to_device != from_device || to_device != registry::device() {
            say("copies between devices are not built");
            return Err(Code::NOT_SUPPORTED);
        }
        copy((to, [0; 2]), (from, [0; 2]), [bytes, 1, 1], 3, Some(stream))
    }

    /// Copies to a variable.
    fn cudaMemcpyToSymbol(symbol: Handle, from: Handle, bytes: usize, offset: usize, kind: c_uint) {
        copy((in_symbol(symbol, bytes, offset)?, [0; 2]), (from, [0; 2]), [bytes, 1, 1], kind, None)
    }

    /// Copies to a variable behind a stream's work.
    fn cudaMemcpyToSymbolAsync(
        symbol: Handle,
        from: Handle,
        bytes: usize,
        offset: usize,
        kind: c_uint,
        stream: Handle,
    ) {
        copy((in_symbol(symbol, bytes, offset)?, [0; 2]), (from, [0; 2]), [bytes, 1, 1], kind, Some(stream))
    }

    /// Copies from a variable.
    fn cudaMemcpyFromSymbol(to: Handle, symbol: Handle, bytes: usize, offset: usize, kind: c_uint) {
        copy((to, [0; 2]), (in_symbol(symbol, bytes, offset)?, [0; 2]), [bytes, 1, 1], kind, None)
    }

    /// Copies from a variable behind a stream's work.
    fn cudaMemcpyFromSymbolAsync(
        to: Handle,
        symbol: Handle,
        bytes: usize,
        offset: usize,
        kind: c_uint,
        stream: Handle,
    ) {
        copy((to, [0; 2]), (in_symbol(symbol, bytes, offset)?, [0; 2]), [bytes, 1, 1], kind, Some(stream))
    }

    /// A variable's address on the device.
    fn cudaGetSymbolAddress(address: *mut Handle, symbol: Handle) {
        give_handle(address, variable(symbol)?.0)
    }

    /// A variable's bytes.
    fn cudaGetSymbolSize(bytes: *mut usize, symbol: Handle) {
        give(bytes, variable(symbol)?.1)
    }

    /// Sets bytes, ordered with all streams.
    fn cudaMemset(to: Handle, value: c_int, bytes: usize) {
        set(to, value, 0, [bytes, 1], DEFAULT)
    }

    /// Sets bytes behind a stream's work.
    fn cudaMemsetAsync(to: Handle, value: c_int, bytes: usize, stream: Handle) {
        set(to, value, 0, [bytes, 1], stream)
    }

    /// Sets bytes of rows, ordered with all streams.
    fn cudaMemset2D(to: Handle, pitch: usize, value: c_int, width: usize, rows: usize) {
        set(to, value, pitch, [width, rows], DEFAULT)
    }

    /// Sets bytes of rows behind a stream's work.
    fn cudaMemset2DAsync(to: Handle, pitch: usize, value: c_int, width: usize, rows: usize, stream: Handle) {
        set(to, value, pitch, [width, rows], stream)
    }

    /// Sets bytes of a box, ordered with all streams.
    fn cudaMemset3D(to: Pitched, value: c_int, extent: Extent) {
        set_3d(to, value, extent, DEFAULT)
    }

    /// Sets bytes of a box behind a stream's work.
    fn cudaMemset3DAsync(to: Pitched, value: c_int, extent: Extent, stream: Handle) {
        set_3d(to, value, extent, stream)
    }

    /// Where managed memory should be before it is used: it is everywhere. CUDA 12 and 13 take what follows the bytes in
    /// different forms, so no more is looked at.
    fn cudaMemPrefetchAsync(address: Handle, bytes: usize) {
        registry::context()?;
        checked(driver::cuMemPrefetchAsync(known(address), bytes, 0, DEFAULT))
    }

    /// The same.
    fn cudaMemPrefetchAsync_v2(address: Handle, bytes: usize) {
        checked(cudaMemPrefetchAsync(address, bytes))
    }

    /// A hint of how managed memory is used; of CUDA 12 and 13 as above.
    fn cudaMemAdvise(address: Handle, bytes: usize, advice: c_uint) {
        registry::context()?;
        checked(driver::cuMemAdvise(known(address), bytes, advice, 0))
    }

    /// The same.
    fn cudaMemAdvise_v2(address: Handle, bytes: usize, advice: c_uint) {
        checked(cudaMemAdvise(address, bytes, advice))
    }

    /// What an address is: memory that CUDA does not know is no error.
    fn cudaPointerGetAttributes(to: *mut PointerAttributes, address: Handle) {
        registry::context()?;
        let at = address.addr();
        let found = with(|driver| {
            let found = driver.contexts_mut().find_map(|context| {
                let (start, block) = context.block(at as u64).or_else(|| context.registered(at))?;
                Some((start, block, context.device))
            });
            Ok(found)
        })?;
        let none = PointerAttributes { kind: 0, device: -2, device_pointer: DEFAULT, host_pointer: address };
        let told = found.map_or(none, |(start, block, device)| {
            let device_pointer = match block.kind {
                Kind::Registered(host) if at >= host => start as usize + (at - host),
                _ => at,
            };
            let host_pointer = match block.kind {
                Kind::Device | Kind::Variable => 0,
                Kind::Registered(host) if at < host => host + (at - start as usize),
                _ => at,
            };
            let kind = match block.kind {
                Kind::Locked | Kind::Registered(_) => 1,
                Kind::Device | Kind::Variable => 2,
                Kind::Managed | Kind::ManagedVariable => 3,
            };
            let pointer = std::ptr::with_exposed_provenance_mut;
            let (device_pointer, host_pointer) = (pointer(device_pointer), pointer(host_pointer));
            PointerAttributes { kind, device, device_pointer, host_pointer }
        });
        give(to, told)
    }
}
