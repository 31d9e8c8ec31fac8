//! Memory of a context: device, managed, page-locked; copies and fills.
//!
//! Managed and page-locked memory has one address on host and device: the virtual GPU gives the address, and the host maps
//! pages there, which both use. Memory that a program has registered keeps its host address and gets another on the device.

use std::ptr::NonNull;

use ptxvm::DevicePtr;

use super::{Context, handle};
use crate::code::{Code, say};
use crate::work::{Boxed, Host, Side, Work};

/// What an allocation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Device memory.
    Device,
    /// Managed memory.
    Managed,
    /// Page-locked memory.
    Locked,
    /// Memory of the program's own that it registered: its address on the host.
    Registered(usize),
    /// A variable of a module.
    Variable,
    /// A variable of a module in managed memory.
    ManagedVariable,
}

/// An allocation that the device can use.
#[derive(Debug, Clone, Copy)]
pub struct Block {
    /// Bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: Kind,
    /// Flags as it was asked for.
    pub flags: u32,
    /// A number of its own, as CU_POINTER_ATTRIBUTE_BUFFER_ID tells.
    pub id: u64,
}

impl Kind {
    /// Whether the host can use it.
    pub fn on_host(self) -> bool {
        !matches!(self, Self::Device | Self::Variable)
    }
}

/// Maps `bytes` zero bytes at an address of the host's.
pub(super) fn map(address: u64, bytes: u64) -> Option<NonNull<u64>> {
    let (at, bytes) = (address as usize, bytes as usize);
    let wanted = std::ptr::with_exposed_provenance_mut::<libc::c_void>(at);
    let (rights, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANON);
    // SAFETY: new pages; the system puts them elsewhere where these addresses are taken.
    let got = unsafe { libc::mmap(wanted, bytes, rights, kind, -1, 0) };
    if got == libc::MAP_FAILED {
        return None;
    }
    if got.addr() != at {
        // SAFETY: mapped just now.
        unsafe { libc::munmap(got, bytes) };
        return None;
    }
    NonNull::new(got.cast())
}

/// Gives that back.
pub(super) fn unmap(address: u64, bytes: u64) {
    // SAFETY: pages of `map`, which nobody uses any more.
    unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(address as usize), bytes as usize) };
}

impl Context {
    fn new_block(&mut self, bytes: usize, kind: Kind, flags: u32) -> Result<u64, Code> {
        self.unsafe_call()?;
        if bytes == 0 {
            return Err(Code::INVALID_VALUE);
        }
        self.allocated += 1;
        let name = match kind {
            Kind::Managed => "managed allocation",
            Kind::Locked => "page-locked allocation",
            Kind::Registered(_) => "registered memory",
            _ => "allocation",
        };
        let name = format!("{name} {} of {bytes} bytes", self.allocated);
        let DevicePtr(address) = self.gpu.alloc_named(bytes, &name).map_err(|_| Code::OUT_OF_MEMORY)?;
        let host = match kind {
            Kind::Managed | Kind::Locked => map(address, bytes as u64),
            Kind::Registered(host) => NonNull::new(std::ptr::with_exposed_provenance_mut::<u64>(host)),
            _ => None,
        };
        if let Some(host) = host {
            // SAFETY: pages of ours, or the program's word for its own memory, until the block is given back.
            unsafe { self.gpu.back(DevicePtr(address), host) }.map_err(|_| Code::UNKNOWN)?;
        } else if kind.on_host() {
            say(&format!(
                "the host's addresses from {address:#x} on are taken, so that it cannot share them with the device"
            ));
            let _ = self.gpu.free(DevicePtr(address));
            return Err(Code::OUT_OF_MEMORY);
        }
        self.memory.insert(address, Block { bytes: bytes as u64, kind, flags, id: handle() });
        Ok(address)
    }

    /// cuMemAlloc.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64, Code> {
        self.new_block(bytes, Kind::Device, 0)
    }

    /// cuMemAllocManaged.
    pub fn alloc_managed(&mut self, bytes: usize, flags: u32) -> Result<u64, Code> {
        // CU_MEM_ATTACH_GLOBAL and CU_MEM_ATTACH_HOST.
        if flags != 1 && flags != 2 {
            return Err(Code::INVALID_VALUE);
        }
        self.new_block(bytes, Kind::Managed, flags)
    }

    /// cuMemFree: waits for all work.
    pub fn free(&mut self, address: u64) -> Result<(), Code> {
        self.unsafe_call()?;
        self.drain_all()?;
        let kind = self.memory.get(&address).map(|block| block.kind);
        if !matches!(kind, Some(Kind::Device | Kind::Managed)) {
            say(&format!("{address:#x}, which is given back, is not the start of an allocation"));
            return Err(Code::INVALID_VALUE);
        }
        self.forget(address)
    }

    /// Gives a block back, whatever it is.
    pub(super) fn forget(&mut self, address: u64) -> Result<(), Code> {
        let Block { bytes, kind, .. } = *self.memory.get(&address).ok_or(Code::INVALID_VALUE)?;
        let inside =
            |work: &Work| matches!(work, Work::Fill(to, ..) if (address..address + bytes).contains(to));
        if self.executables.values().any(|steps| steps.iter().any(inside)) {
            say("memory is given back that an executable graph fills");
            return Err(Code::ILLEGAL_STATE);
        }
        self.memory.remove(&address);
        let freed = self.gpu.free(DevicePtr(address)).map_err(|_| Code::INVALID_VALUE);
        if matches!(kind, Kind::Managed | Kind::Locked) {
            unmap(address, bytes);
        }
        freed
    }

    /// cuMemFreeAsync.
    pub fn free_later(&mut self, address: u64, stream: u64) -> Result<(), Code> {
        match self.memory.get(&address) {
            Some(Block { kind: Kind::Device, .. }) => self.put(stream, Work::Free(address)),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    /// cuMemGetInfo: free and total.
    pub fn memory(&self) -> (u64, u64) {
        let used = self.memory.values().filter(|b| matches!(b.kind, Kind::Device | Kind::Managed));
        let used: u64 = used.map(|b| b.bytes).sum();
        (self.settings.memory - used.min(self.settings.memory), self.settings.memory)
    }

    /// The block that holds an address of the device, and where it begins.
    pub fn block(&self, address: u64) -> Option<(u64, Block)> {
        let (start, block) = self.memory.range(..=address).next_back()?;
        (address - start < block.bytes).then_some((*start, *block))
    }

    /// The registered block that holds an address of the host.
    pub fn registered(&self, address: usize) -> Option<(u64, Block)> {
        let holds = |block: &Block| match block.kind {
            Kind::Registered(host) => address >= host && ((address - host) as u64) < block.bytes,
            _ => false,
        };
        self.memory.iter().find(|(_, block)| holds(block)).map(|(start, block)| (*start, *block))
    }

    fn range(&self, address: u64, bytes: usize) -> Result<(), Code> {
        let end = address.checked_add(bytes as u64);
        let found = self.memory.range(..=address).next_back();
        match found.zip(end) {
            Some(((start, block), end)) if end <= start + block.bytes => Ok(()),
            _ => {
                say(&format!("{bytes} bytes at {address:#x} are not within one allocation"));
                Err(Code::INVALID_VALUE)
            }
        }
    }

    /// cuMemHostAlloc: portable, mapped and write-combined memory is as any other.
    pub fn lock(&mut self, bytes: usize, flags: u32) -> Result<usize, Code> {
        if flags > 7 {
            return Err(Code::INVALID_VALUE);
        }
        Ok(self.new_block(bytes, Kind::Locked, flags)? as usize)
    }

    /// cuMemFreeHost: waits for all work.
    pub fn unlock(&mut self, address: usize) -> Result<(), Code> {
        self.drain_all()?;
        match self.memory.get(&(address as u64)) {
            Some(Block { kind: Kind::Locked, .. }) => self.forget(address as u64),
            _ => Err(Code::INVALID_VALUE),
        }
    }

    /// cuMemHostRegister.
    ///
    /// # Safety
    /// `bytes` bytes at `address`, rounded up to a multiple of 8, can be used until they are unregistered.
    pub unsafe fn register(&mut self, address: usize, bytes: usize, flags: u32) -> Result<(), Code> {
        if address == 0 || bytes == 0 || flags & !7 != 0 {
            return Err(Code::INVALID_VALUE);
        }
        if !address.is_multiple_of(8) {
            say("memory is registered that does not begin at a multiple of 8 bytes");
            return Err(Code::NOT_SUPPORTED);
        }
        if self.registered(address).is_some() || self.registered(address + bytes - 1).is_some() {
            return Err(Code::HOST_MEMORY_ALREADY_REGISTERED);
        }
        self.new_block(bytes, Kind::Registered(address), flags).map(drop)
    }

    /// cuMemHostUnregister: waits for all work.
    pub fn unregister(&mut self, address: usize) -> Result<(), Code> {
        self.drain_all()?;
        match self.registered(address) {
            Some((start, Block { kind: Kind::Registered(host), .. })) if host == address => {
                self.forget(start)
            }
            _ => Err(Code::HOST_MEMORY_NOT_REGISTERED),
        }
    }

    /// cuMemHostGetDevicePointer.
    pub fn device_pointer(&self, address: usize) -> Result<u64, Code> {
        match (self.block(address as u64), self.registered(address)) {
            (Some((_, block)), _) if block.kind.on_host() => Ok(address as u64),
            (_, Some((start, Block { kind: Kind::Registered(host), .. }))) => {
                Ok(start + (address - host) as u64)
            }
            _ => Err(Code::INVALID_VALUE),
        }
    }

    /// Whether host memory is page-locked, all of it.
    fn is_locked(&self, address: usize, bytes: usize) -> bool {
        let last = address.saturating_add(bytes.saturating_sub(1));
        match self.registered(address) {
            Some((start, _)) => self.registered(last).is_some_and(|(other, _)| other == start),
            None => {
                let found = self.block(address as u64).filter(|(_, block)| block.kind.on_host());
                found.is_some_and(|(start, _)| {
                    self.block(last as u64).is_some_and(|(other, _)| other == start)
                })
            }
        }
    }

    /// Whether an address is one of the device's.
    pub fn on_device(&self, address: u64) -> bool {
        self.block(address).is_some()
    }

    /// Copies a box of `[bytes of a row, rows, slices]`. Each side is an address, whether it is meant as one of the device's,
    /// and its bytes from row to row and from slice to slice. To memory of the host that is not page-locked, it waits.
    ///
    /// # Safety
    /// Host memory can be read, or written, where the copy does.
    pub unsafe fn copy_box(
        &mut self,
        (to, to_device, to_pitch): (u64, bool, [usize; 2]),
        (from, from_device, from_pitch): (u64, bool, [usize; 2]),
        extent: [usize; 3],
        stream: u64,
    ) -> Result<(), Code> {
        let [width, rows, slices] = extent;
        if extent.contains(&0) {
            return Ok(());
        }
        let span = |[row, slice]: [usize; 2]| -> Result<usize, Code> {
            let far = (rows - 1).checked_mul(row).zip((slices - 1).checked_mul(slice));
            let far = far.and_then(|(rows, slices)| rows.checked_add(slices)?.checked_add(width));
            if rows > 1 && row < width || slices > 1 && slice < row * rows {
                return Err(Code::INVALID_VALUE);
            }
            far.filter(|far| *far <= isize::MAX as usize).ok_or(Code::INVALID_VALUE)
        };
        let (to_span, from_span) = (span(to_pitch)?, span(from_pitch)?);
        let from_side = if from_device {
            self.range(from, from_span)?;
            Side::Device(from)
        } else if self.is_locked(from as usize, from_span) {
            Side::Host(Host::Locked(from as usize))
        } else {
            let from = std::ptr::with_exposed_provenance::<u8>(from as usize);
            // SAFETY: the caller's word.
            Side::Host(Host::Copied(unsafe { std::slice::from_raw_parts(from, from_span) }.into()))
        };
        let mut waits = false;
        let to_side = if to_device {
            self.range(to, to_span)?;
            Side::Device(to)
        } else {
            waits = !self.is_locked(to as usize, to_span);
            Side::Host(Host::Locked(to as usize))
        };
        let boxed = |at, [row, slice]: [usize; 2]| Boxed { at, row, slice };
        let work = Work::Copy(boxed(to_side, to_pitch), boxed(from_side, from_pitch), extent);
        if waits && self.capturing(stream)? {
            return self.uncapturable(stream);
        }
        self.put(stream, work)?;
        if waits { self.drain_stream(stream) } else { Ok(()) }
    }

    /// cuMemcpyHtoDAsync.
    ///
    /// # Safety
    /// `bytes` bytes can be read at `from`.
    pub unsafe fn copy_in(&mut self, to: u64, from: usize, bytes: usize, stream: u64) -> Result<(), Code> {
        // SAFETY: the caller's word.
        unsafe { self.copy_box((to, true, [0; 2]), (from as u64, false, [0; 2]), [bytes, 1, 1], stream) }
    }

    /// cuMemcpyDtoHAsync, which waits unless the memory is page-locked.
    ///
    /// # Safety
    /// `bytes` bytes can be written at `to`.
    pub unsafe fn copy_out(&mut self, to: usize, from: u64, bytes: usize, stream: u64) -> Result<(), Code> {
        // SAFETY: the caller's word.
        unsafe { self.copy_box((to as u64, false, [0; 2]), (from, true, [0; 2]), [bytes, 1, 1], stream) }
    }

    /// cuMemsetD8Async and its like: `pattern` again and again in `rows` rows of `width` bytes, `pitch` bytes apart.
    pub fn fill(
        &mut self,
        to: u64,
        pattern: &[u8],
        pitch: usize,
        [width, rows]: [usize; 2],
        stream: u64,
    ) -> Result<(), Code> {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        let span = (rows - 1).checked_mul(pitch).and_then(|far| far.checked_add(width));
        let aligned = to.is_multiple_of(pattern.len() as u64) && pitch.is_multiple_of(pattern.len());
        if rows > 1 && pitch < width || !aligned {
            return Err(Code::INVALID_VALUE);
        }
        self.range(to, span.ok_or(Code::INVALID_VALUE)?)?;
        self.put(stream, Work::Fill(to, pattern.to_vec(), pitch, [width, rows]))
    }
}
