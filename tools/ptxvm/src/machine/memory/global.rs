//! Global memory: allocations, their initialised bytes, and the state of the race check.

use std::fmt;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::blocks::Lines;
use super::buffer::{Bits, Buffer};
use super::race::Releases;
use super::traffic::Sectors;
use crate::error::{Error, ErrorKind, Finding, Place};
use crate::machine::layout::{GLOBAL_END, GLOBAL_SLOT, GLOBAL_START, region};
use crate::machine::options::{Checks, Options};

/// A piece of global memory.
pub(crate) struct Allocation {
    /// First address.
    pub(crate) start: u64,
    /// How many bytes.
    pub(crate) bytes: u64,
    name: String,
    freed: bool,
    /// The bytes.
    pub(crate) data: Buffer,
    /// Initialised bytes; `None` without the check.
    written: Option<Bits>,
    /// Of the device heap, the bytes that belong to blocks.
    live: Option<Bits>,
    /// All bytes are initialised, so that `written` need not be read.
    all_written: AtomicBool,
    /// `written` has changed since `all_written` was worked out.
    news: AtomicBool,
    /// Sectors that the launch read and wrote; `None` without counters.
    pub(crate) sectors: Option<Sectors>,
    /// Records of the race check between blocks; `None` without the check.
    pub(crate) lines: Option<Lines>,
}

impl Allocation {
    /// Whether `address..address + bytes` lies within.
    #[inline(always)]
    fn holds(&self, address: u64, bytes: u64) -> bool {
        let at = address.wrapping_sub(self.start);
        at <= self.bytes && bytes <= self.bytes - at && !self.freed
    }

    /// Whether only a part of the bytes may be touched: those of the heap's blocks.
    #[inline(always)]
    pub(crate) fn is_heap(&self) -> bool {
        self.live.is_some()
    }

    /// Whether all of these bytes belong to blocks of the heap.
    pub(crate) fn is_live(&self, at: u64, bytes: u64) -> bool {
        self.live.as_ref().is_none_or(|live| live.all(at, at + bytes))
    }

    /// Whether all bytes are known to be written.
    #[inline(always)]
    pub(crate) fn all_written(&self) -> bool {
        self.all_written.load(Relaxed)
    }

    /// Whether all of these bytes are initialised.
    #[inline(always)]
    pub(crate) fn is_written(&self, at: u64, bytes: u64) -> bool {
        self.all_written() || self.written.as_ref().is_none_or(|w| w.all(at, at + bytes))
    }

    /// Notes that these bytes are written.
    #[inline(always)]
    pub(crate) fn set_written(&self, at: u64, bytes: u64) {
        if self.all_written() {
            return;
        }
        if let Some(written) = &self.written {
            written.set(at, at + bytes);
            if !self.news.load(Relaxed) {
                self.news.store(true, Relaxed);
            }
        }
    }

    /// Notes that these bytes hold nothing any more.
    pub(crate) fn forget(&self, at: u64, bytes: u64) {
        if let Some(written) = &self.written {
            if self.all_written.swap(false, Relaxed) {
                written.set(0, self.bytes);
            }
            written.clear(at, at + bytes);
        }
    }
}

/// Global memory of a device.
pub struct GlobalMemory {
    /// Allocation + 1 of each slot from `GLOBAL_START` on; 0 for none.
    slots: Vec<u32>,
    allocations: Vec<Allocation>,
    /// Records of allocations whose slots were taken over, to use again.
    spare: Vec<u32>,
    /// The slot where the search for free ones goes on.
    next: u64,
    used: u64,
    limit: u64,
    checks: Checks,
    counters: bool,
    /// Published epochs of the running launch's blocks.
    pub(crate) releases: Releases,
}

const SLOTS: u64 = (GLOBAL_END - GLOBAL_START) / GLOBAL_SLOT;

impl Default for GlobalMemory {
    fn default() -> Self {
        Self::new(&Options::default())
    }
}

impl fmt::Debug for GlobalMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GlobalMemory({} of {} bytes used)", self.used, self.limit)
    }
}

/// A fault of the host program.
fn fault(kind: ErrorKind, message: String) -> Error {
    Error::Fault(vec![Finding::load(kind, Place::default(), message)])
}

impl GlobalMemory {
    /// Empty memory of a device with these options.
    pub fn new(options: &Options) -> Self {
        Self {
            slots: Vec::new(),
            allocations: Vec::new(),
            spare: Vec::new(),
            next: 0,
            used: 0,
            limit: options.memory,
            checks: options.checks,
            counters: options.counters,
            releases: Releases::default(),
        }
    }

    /// Bytes in allocations that are not freed.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The first allocation will be `bytes` behind where it otherwise were, so that devices have no address in common.
    pub fn begin_at(&mut self, bytes: u64) {
        self.next = self.next.max((bytes / GLOBAL_SLOT).min(SLOTS));
    }

    /// From now on the bytes of an allocation are the host program's at `host`, with what they hold, which counts as written
    /// because nobody sees the program write it.
    ///
    /// # Errors
    /// Not the start of an allocation.
    ///
    /// # Safety
    /// `host` is a multiple of 8, and the allocation's bytes, rounded up to a multiple of 8, can be read and written there
    /// until it is freed.
    pub unsafe fn back(&mut self, address: u64, host: NonNull<u64>) -> Result<(), Error> {
        let Some(i) = self.index(address).filter(|i| self.allocations[*i].start == address) else {
            return Err(fault(ErrorKind::OutOfBounds, format!("no allocation starts at {address:#x}")));
        };
        let a = &mut self.allocations[i];
        // SAFETY: the caller's word.
        a.data = unsafe { Buffer::over(host.cast::<AtomicU64>(), a.bytes.div_ceil(8) as usize) };
        *a.all_written.get_mut() = true;
        Ok(())
    }

    /// Allocates; the bytes are zero but count as never written. `name` appears in messages.
    ///
    /// # Errors
    /// More than the device's memory, or than the host has.
    pub fn alloc(&mut self, bytes: u64, name: &str) -> Result<u64, Error> {
        let free = self.limit - self.used;
        let full = |what: &str| {
            fault(ErrorKind::Launch, format!("out of memory: `{name}` needs {bytes} bytes, {what}"))
        };
        if bytes > free {
            return Err(full(&format!("{free} of the device's {} are free", self.limit)));
        }
        // At least one byte behind every allocation belongs to no allocation, so that overruns are found.
        let Some(slot) = self.find_slots(bytes / GLOBAL_SLOT + 1) else {
            return Err(full("the address space has no such gap"));
        };
        let make = || {
            Some(Allocation {
                start: GLOBAL_START + slot * GLOBAL_SLOT,
                bytes,
                name: name.to_owned(),
                freed: false,
                data: Buffer::for_bytes(bytes)?,
                written: if self.checks.init { Some(Bits::zeroed(bytes)?) } else { None },
                live: None,
                all_written: AtomicBool::new(!self.checks.init),
                news: AtomicBool::new(false),
                sectors: if self.counters { Some(Sectors::new(bytes)?) } else { None },
                lines: if self.checks.race { Some(Lines::new(bytes)?) } else { None },
            })
        };
        let allocation = make().ok_or_else(|| full("the host has no room for them"))?;
        let start = allocation.start;
        let index = if let Some(index) = self.spare.pop() {
            self.allocations[index as usize] = allocation;
            index
        } else {
            self.allocations.push(allocation);
            self.allocations.len() as u32 - 1
        };
        let slots = slot as usize..(slot + bytes / GLOBAL_SLOT + 1) as usize;
        if self.slots.len() < slots.end {
            self.slots.resize(slots.end, 0);
        }
        self.slots[slots].fill(index + 1);
        self.used += bytes;
        Ok(start)
    }

    /// The allocation that starts at an address becomes the device heap, without any block.
    pub(crate) fn make_heap(&mut self, start: u64) {
        if let Some(i) = self.index(start) {
            let a = &mut self.allocations[i];
            a.live = Bits::zeroed(a.bytes);
        }
    }

    /// A block of the heap begins to live, whose bytes nobody has written, or ends.
    pub(crate) fn heap_block(&self, address: u64, bytes: u64, lives: bool) {
        let Some(a) = self.find(address, bytes) else { return };
        let (from, to) = (address - a.start, address - a.start + bytes);
        if let Some(live) = &a.live {
            if lives {
                a.forget(from, bytes);
                live.set(from, to);
            } else {
                live.clear(from, to);
            }
        }
    }

    /// Finds `n` slots in a row. Slots of freed allocations are taken again only when the search comes round, so that
    /// a pointer that outlives its allocation is found out for as long as possible.
    fn find_slots(&mut self, n: u64) -> Option<u64> {
        let free = |this: &Self, slot: u64| match this.slots.get(slot as usize) {
            None | Some(0) => true,
            Some(index) => this.allocations[*index as usize - 1].freed,
        };
        let search = |this: &Self, from: u64, to: u64| {
            let mut start = from;
            let mut at = from;
            while at < to {
                if !free(this, at) {
                    start = at + 1;
                } else if at + 1 - start == n {
                    return Some(start);
                }
                at += 1;
            }
            None
        };
        // Behind the highest slot that was ever used all is free.
        let top = self.slots.len() as u64;
        let found = if self.next >= top {
            if SLOTS - self.next >= n { Some(self.next) } else { search(self, 0, SLOTS) }
        } else {
            search(self, self.next, SLOTS).or_else(|| search(self, 0, SLOTS))
        }?;
        self.next = found + n;
        // A freed allocation that loses a slot is forgotten as a whole.
        for slot in found..(found + n).min(top) {
            let index = self.slots[slot as usize];
            if index != 0 {
                let first = (self.allocations[index as usize - 1].start - GLOBAL_START) / GLOBAL_SLOT;
                let mut at = first as usize;
                while self.slots.get(at) == Some(&index) {
                    self.slots[at] = 0;
                    at += 1;
                }
                self.spare.push(index - 1);
            }
        }
        Some(found)
    }

    /// Frees an allocation of [`GlobalMemory::alloc`].
    ///
    /// # Errors
    /// Not the start of an allocation, or freed before.
    pub fn free(&mut self, address: u64) -> Result<(), Error> {
        let index = self.index(address);
        match index.map(|i| &mut self.allocations[i]).filter(|a| a.start == address) {
            Some(a) if a.freed => {
                Err(fault(ErrorKind::UseAfterFree, format!("`{}` at {address:#x} is freed twice", a.name)))
            }
            Some(a) => {
                a.freed = true;
                a.data = Buffer::zeroed(0).expect("nothing is asked for");
                a.written = None;
                a.sectors = None;
                a.lines = None;
                self.used -= a.bytes;
                Ok(())
            }
            None => Err(fault(
                ErrorKind::OutOfBounds,
                format!("no allocation starts at {address:#x}, which is freed"),
            )),
        }
    }

    #[inline(always)]
    fn index(&self, address: u64) -> Option<usize> {
        let slot = address.wrapping_sub(GLOBAL_START) / GLOBAL_SLOT;
        match self.slots.get(usize::try_from(slot).ok()?) {
            None | Some(0) => None,
            Some(index) => Some(*index as usize - 1),
        }
    }

    /// The allocation that holds all of `address..address + bytes`.
    #[inline(always)]
    pub(crate) fn find(&self, address: u64, bytes: u64) -> Option<&Allocation> {
        let allocation = &self.allocations[self.index(address)?];
        allocation.holds(address, bytes).then_some(allocation)
    }

    /// Why an access that [`GlobalMemory::find`] refuses is wrong.
    #[cold]
    pub(crate) fn explain(&self, address: u64, bytes: u64) -> (ErrorKind, String) {
        let access = format!("{bytes} byte{} at {address:#x}", if bytes == 1 { "" } else { "s" });
        if address < GLOBAL_START {
            return (ErrorKind::OutOfBounds, format!("{access}: the null page"));
        }
        let Some(a) = self.index(address).map(|i| &self.allocations[i]) else {
            return match region(address).filter(|_| address >= GLOBAL_END) {
                Some(what) => {
                    (ErrorKind::WrongSpace, format!("{access}, an address of {what}, not of global memory"))
                }
                None => (ErrorKind::OutOfBounds, format!("{access}: no allocation has this address")),
            };
        };
        let at = address - a.start;
        let what = format!("`{}` ({} bytes at {:#x})", a.name, a.bytes, a.start);
        if at >= a.bytes {
            let past = at - a.bytes;
            (ErrorKind::OutOfBounds, format!("{access}: {past} bytes behind the end of {what}"))
        } else if a.freed {
            (ErrorKind::UseAfterFree, format!("{access}: {at} bytes into {what}, which was freed"))
        } else {
            let over = bytes - (a.bytes - at);
            (ErrorKind::OutOfBounds, format!("{access}: reaches {over} bytes past the end of {what}"))
        }
    }

    /// The name of the allocation at an address and how far in the address lies, for messages.
    pub(crate) fn describe(&self, address: u64) -> String {
        match self.index(address).map(|i| &self.allocations[i]) {
            Some(a) => format!("`{}` + {}", a.name, address - a.start),
            None => format!("{address:#x}"),
        }
    }

    fn range(&self, address: u64, bytes: u64) -> Result<usize, Error> {
        if let Some(i) = self.index(address).filter(|i| self.allocations[*i].holds(address, bytes)) {
            return Ok(i);
        }
        let (kind, message) = self.explain(address, bytes);
        Err(fault(kind, message))
    }

    /// Writes bytes from the host.
    ///
    /// # Errors
    /// Not within one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        self.host_write(address, bytes.len() as u64, |to| to.copy_from_slice(bytes))
    }

    /// Sets `bytes` bytes to a value from the host.
    ///
    /// # Errors
    /// Not within one allocation.
    pub fn fill(&mut self, address: u64, value: u8, bytes: u64) -> Result<(), Error> {
        self.host_write(address, bytes, |to| to.fill(value))
    }

    /// Copies bytes within the device; what was not written there is not written here.
    ///
    /// # Errors
    /// Not within one allocation each.
    pub fn copy(&mut self, to: u64, from: u64, bytes: u64) -> Result<(), Error> {
        const PIECE: u64 = 4096;
        let source = &self.allocations[self.range(from, bytes)?];
        let at = from - source.start;
        let mut data = vec![0; bytes as usize];
        source.data.read(at as usize, &mut data);
        let pieces = (0..bytes).step_by(PIECE as usize).map(|from| from..bytes.min(from + PIECE));
        let partly = pieces.filter(|piece| !source.is_written(at + piece.start, piece.end - piece.start));
        let missing: Vec<u64> = partly.flatten().filter(|i| !source.is_written(at + i, 1)).collect();
        self.write(to, &data)?;
        let target = &self.allocations[self.range(to, bytes)?];
        missing.iter().for_each(|i| target.forget(to - target.start + i, 1));
        Ok(())
    }

    fn host_write(&mut self, address: u64, bytes: u64, f: impl FnOnce(&mut [u8])) -> Result<(), Error> {
        let i = self.range(address, bytes)?;
        let a = &mut self.allocations[i];
        let at = address - a.start;
        f(&mut a.data.bytes_mut()[at as usize..(at + bytes) as usize]);
        if bytes == a.bytes {
            a.all_written.store(true, Relaxed);
        } else {
            a.set_written(at, bytes);
        }
        Ok(())
    }

    /// Reads bytes for the host.
    ///
    /// # Errors
    /// Not within one allocation.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), Error> {
        let a = &self.allocations[self.range(address, bytes.len() as u64)?];
        a.data.read((address - a.start) as usize, bytes);
        Ok(())
    }

    /// Whether all of these bytes are initialised; also true where no check keeps track.
    ///
    /// # Errors
    /// Not within one allocation.
    pub fn is_written(&self, address: u64, bytes: u64) -> Result<bool, Error> {
        let a = &self.allocations[self.range(address, bytes)?];
        Ok(a.is_written(address - a.start, bytes))
    }

    /// To be called when a launch has ended: finds the allocations that are fully written by now, whose accesses then
    /// need no check any more.
    pub fn settle(&mut self) {
        for a in &mut self.allocations {
            if std::mem::take(a.news.get_mut()) && a.written.as_ref().is_some_and(|w| w.all(0, a.bytes)) {
                *a.all_written.get_mut() = true;
            }
        }
    }
}
