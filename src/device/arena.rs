//! Device memory from slabs, a few large allocations of the driver's. An allocation in a training or decode loop costs one search
//! in an ordered set and no driver call, because a driver call would wait for the device.
//!
//! The arena allocates by best fit, at the lowest position among equal ranges, and merges neighbouring ranges as they are freed.
//! Its decisions depend on the sequence of calls alone. A loop that frees all that it allocated gets the same addresses in every
//! round therefore, which the replay of CUDA graphs needs; `cuMemAllocAsync` does not promise that. Allocations of up to a mebibyte
//! have slabs of their own, because short-lived arrays would otherwise fragment the memory of tensors.
//!
//! The arena does bookkeeping and accesses no memory: the caller allocates and frees the slabs.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Alignment of every allocation, and the unit that sizes are rounded up to.
pub const ALIGN: u64 = 256;
/// The largest small allocation.
pub const SMALL: u64 = 1 << 20;
/// Size of a slab for small allocations.
const SMALL_SLAB: u64 = 16 << 20;
/// Size of the first slab for large allocations. Later slabs grow with the bytes that are held, so that their number stays small.
const LARGE_SLAB: u64 = 64 << 20;
/// Unit of a slab's size: the driver's own granularity.
const SLAB_UNIT: u64 = 2 << 20;

/// The bookkeeping of device memory.
#[derive(Debug, Default)]
pub struct Arena {
    small: Pool,
    large: Pool,
    /// Allocations that are the driver's own, by address, and their sizes.
    alone: HashMap<u64, u64>,
    /// Bytes in use, and their maximum so far.
    used: u64,
    peak: u64,
}

/// (number of the slab, offset in it). Unlike an address it is the same in every run.
type Position = (usize, u64);

#[derive(Debug, Default)]
struct Pool {
    /// Base and size of each slab; `None` where one was given back.
    slabs: Vec<Option<(u64, u64)>>,
    /// Free ranges: sizes by position, and positions by size.
    free: BTreeMap<Position, u64>,
    by_size: BTreeSet<(u64, Position)>,
    /// Allocations by address.
    used: HashMap<u64, (Position, u64)>,
}

impl Pool {
    fn insert(&mut self, position: Position, size: u64) {
        self.free.insert(position, size);
        self.by_size.insert((size, position));
    }

    fn remove(&mut self, position: Position, size: u64) {
        self.free.remove(&position);
        self.by_size.remove(&(size, position));
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let &(found, position) = self.by_size.range((size, (0, 0))..).next()?;
        let (base, _) = self.slabs[position.0]?;
        self.remove(position, found);
        if found > size {
            self.insert((position.0, position.1 + size), found - size);
        }
        let address = base + position.1;
        self.used.insert(address, (position, size));
        Some(address)
    }

    fn give(&mut self, address: u64) -> Option<u64> {
        let ((slab, mut offset), size) = self.used.remove(&address)?;
        let mut whole = size;
        if let Some(&next) = self.free.get(&(slab, offset + size)) {
            self.remove((slab, offset + size), next);
            whole += next;
        }
        let before =
            self.free.range((slab, 0)..(slab, offset)).next_back().map(|(position, size)| (*position, *size));
        if let Some((position, before)) = before.filter(|(position, before)| position.1 + before == offset) {
            self.remove(position, before);
            offset = position.1;
            whole += before;
        }
        self.insert((slab, offset), whole);
        Some(size)
    }

    /// Adds a slab, under the first number that is free.
    fn add(&mut self, base: u64, size: u64) {
        let number = self.slabs.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slabs.push(None);
            self.slabs.len() - 1
        });
        self.slabs[number] = Some((base, size));
        self.insert((number, 0), size);
    }

    /// Removes the slabs without allocations and returns their addresses.
    fn drain_unused(&mut self) -> Vec<u64> {
        let mut bases = Vec::new();
        for number in 0..self.slabs.len() {
            let Some((base, size)) = self.slabs[number] else { continue };
            if self.free.get(&(number, 0)) == Some(&size) {
                self.remove((number, 0), size);
                self.slabs[number] = None;
                bases.push(base);
            }
        }
        bases
    }

    fn held(&self) -> u64 {
        self.slabs.iter().flatten().map(|(_, size)| size).sum()
    }
}

/// The size of an allocation of `bytes`; `None` if it overflows.
fn rounded(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(ALIGN)
}

impl Arena {
    /// Allocates `bytes` bytes. `None` if no slab has room: then add a slab ([`Arena::slab_for`], [`Arena::add`]) and call again.
    pub fn alloc(&mut self, bytes: u64) -> Option<u64> {
        let size = rounded(bytes)?;
        let address = self.pool(bytes).take(size)?;
        self.used += size;
        self.peak = self.peak.max(self.used);
        Some(address)
    }

    /// Frees an address. False if [`Arena::alloc`] did not return it, or if it was freed before.
    pub fn free(&mut self, address: u64) -> bool {
        let size = self.small.give(address).or_else(|| self.large.give(address));
        self.used -= size.unwrap_or(0);
        size.is_some()
    }

    /// Two sizes of a slab for an allocation of `bytes` that had no room: one with room for later allocations, and, if the
    /// driver has less memory, the least one.
    pub fn slab_for(&self, bytes: u64) -> Option<[u64; 2]> {
        let least = rounded(bytes)?.checked_next_multiple_of(SLAB_UNIT)?;
        let liked = match bytes <= SMALL {
            true => SMALL_SLAB,
            false => (self.large.held() / 8).max(LARGE_SLAB).next_multiple_of(SLAB_UNIT),
        };
        Some([liked.max(least), least])
    }

    /// Adds a slab for an allocation of `bytes`: `size` bytes at `base`, both multiples of [`ALIGN`].
    pub fn add(&mut self, bytes: u64, base: u64, size: u64) {
        assert!(base != 0 && base.is_multiple_of(ALIGN) && size.is_multiple_of(ALIGN), "slabs are aligned");
        self.pool(bytes).add(base, size);
    }

    /// Records an allocation that is the driver's own: `bytes` bytes at `base`.
    pub fn add_alone(&mut self, base: u64, bytes: u64) {
        self.alone.insert(base, bytes);
        self.used += bytes;
        self.peak = self.peak.max(self.used);
    }

    /// Removes the record; the caller frees the allocation. False if there is none at this address.
    pub fn remove_alone(&mut self, base: u64) -> bool {
        let bytes = self.alone.remove(&base);
        self.used -= bytes.unwrap_or(0);
        bytes.is_some()
    }

    /// Removes the slabs without allocations and returns their addresses, which the caller frees.
    pub fn drain_unused(&mut self) -> Vec<u64> {
        let mut bases = self.small.drain_unused();
        bases.extend(self.large.drain_unused());
        bases
    }

    /// Removes everything and returns the addresses of all slabs and of the driver's own allocations.
    pub fn drain(&mut self) -> Vec<u64> {
        let Self { small, large, alone, .. } = std::mem::take(self);
        let slabs = small.slabs.into_iter().chain(large.slabs).flatten().map(|(base, _)| base);
        slabs.chain(alone.into_keys()).collect()
    }

    /// Whether an address is that of a small allocation.
    pub fn is_small(&self, address: u64) -> bool {
        self.small.used.contains_key(&address)
    }

    /// Bytes of all slabs and of the driver's own allocations.
    pub fn held(&self) -> u64 {
        self.small.held() + self.large.held() + self.alone.values().sum::<u64>()
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.used
    }

    /// The most bytes that were in use at once since [`Arena::reset_peak`].
    pub fn peak(&self) -> u64 {
        self.peak
    }

    /// Sets the peak to the bytes in use now.
    pub fn reset_peak(&mut self) {
        self.peak = self.used;
    }

    fn pool(&mut self, bytes: u64) -> &mut Pool {
        if bytes <= SMALL { &mut self.small } else { &mut self.large }
    }
}
