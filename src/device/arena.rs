//! Device memory from a few large pieces of the driver's: an allocation in a training or decode loop costs a look into
//! an ordered set, never a driver call, which would wait for the device.
//!
//! Best fit, the lowest place among equals, and neighbours merge as they are freed. What it decides depends on the
//! sequence of calls alone, so a loop that gives back what it took gets the same addresses in every round. Allocations
//! of up to a mebibyte lie in pieces of their own, so that short-lived tables do not cut up the room for tensors.
//!
//! The arena keeps books and touches no memory: the caller brings pieces of address space.

use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Alignment of every allocation, and the unit that sizes are rounded up to.
pub const ALIGN: u64 = 256;
/// The largest small allocation.
pub const SMALL: u64 = 1 << 20;
/// Pieces for small allocations.
const SMALL_PIECE: u64 = 16 << 20;
/// The first piece for others; later ones grow with what is held, so that their number stays small.
const LARGE_PIECE: u64 = 64 << 20;
/// Unit of pieces: the driver's own granularity.
const PIECE_UNIT: u64 = 2 << 20;

/// Books on device memory.
#[derive(Debug, Default)]
pub struct Arena {
    small: Pool,
    large: Pool,
    /// Allocations that are pieces by themselves, and their sizes.
    alone: HashMap<u64, u64>,
    /// Bytes in use, and the most there ever were.
    used: u64,
    peak: u64,
}

/// (number of the piece, offset in it): unlike addresses, the same in every run.
type Place = (usize, u64);

#[derive(Debug, Default)]
struct Pool {
    /// Base and size of each piece; `None` where one was given back.
    pieces: Vec<Option<(u64, u64)>>,
    /// Free ranges: their sizes by place, and their places by size.
    free: BTreeMap<Place, u64>,
    by_size: BTreeSet<(u64, Place)>,
    /// Allocations by address.
    used: HashMap<u64, (Place, u64)>,
}

impl Pool {
    fn insert(&mut self, place: Place, size: u64) {
        self.free.insert(place, size);
        self.by_size.insert((size, place));
    }

    fn remove(&mut self, place: Place, size: u64) {
        self.free.remove(&place);
        self.by_size.remove(&(size, place));
    }

    fn take(&mut self, size: u64) -> Option<u64> {
        let &(found, place) = self.by_size.range((size, (0, 0))..).next()?;
        let (base, _) = self.pieces[place.0]?;
        self.remove(place, found);
        if found > size {
            self.insert((place.0, place.1 + size), found - size);
        }
        let address = base + place.1;
        self.used.insert(address, (place, size));
        Some(address)
    }

    fn give(&mut self, address: u64) -> Option<u64> {
        let ((piece, mut offset), size) = self.used.remove(&address)?;
        let mut whole = size;
        if let Some(&next) = self.free.get(&(piece, offset + size)) {
            self.remove((piece, offset + size), next);
            whole += next;
        }
        let before =
            self.free.range((piece, 0)..(piece, offset)).next_back().map(|(place, size)| (*place, *size));
        if let Some((place, before)) = before.filter(|(place, before)| place.1 + before == offset) {
            self.remove(place, before);
            offset = place.1;
            whole += before;
        }
        self.insert((piece, offset), whole);
        Some(size)
    }

    /// Takes a piece in, at the first number that is free.
    fn add(&mut self, base: u64, size: u64) {
        let number = self.pieces.iter().position(Option::is_none).unwrap_or_else(|| {
            self.pieces.push(None);
            self.pieces.len() - 1
        });
        self.pieces[number] = Some((base, size));
        self.insert((number, 0), size);
    }

    /// Pieces that nothing lies in; they are forgotten.
    fn drain_unused(&mut self) -> Vec<u64> {
        let mut bases = Vec::new();
        for number in 0..self.pieces.len() {
            let Some((base, size)) = self.pieces[number] else { continue };
            if self.free.get(&(number, 0)) == Some(&size) {
                self.remove((number, 0), size);
                self.pieces[number] = None;
                bases.push(base);
            }
        }
        bases
    }

    fn held(&self) -> u64 {
        self.pieces.iter().flatten().map(|(_, size)| size).sum()
    }
}

/// The size that an allocation of `bytes` takes up; `None` where it would overflow.
fn rounded(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(ALIGN)
}

impl Arena {
    /// An address for `bytes` bytes, or `None` where no piece has the room: bring one ([`Arena::piece_for`],
    /// [`Arena::add`]) and ask again.
    pub fn alloc(&mut self, bytes: u64) -> Option<u64> {
        let size = rounded(bytes)?;
        let address = self.pool(bytes).take(size)?;
        self.used += size;
        self.peak = self.peak.max(self.used);
        Some(address)
    }

    /// Gives an address back. False if it is none that [`Arena::alloc`] gave, or was given back before.
    pub fn free(&mut self, address: u64) -> bool {
        let size = self.small.give(address).or_else(|| self.large.give(address));
        self.used -= size.unwrap_or(0);
        size.is_some()
    }

    /// Sizes of pieces to ask the driver for when `bytes` find no room: the one that serves the future, then, if there
    /// is not as much, the one that serves this allocation.
    pub fn piece_for(&self, bytes: u64) -> Option<[u64; 2]> {
        let least = rounded(bytes)?.checked_next_multiple_of(PIECE_UNIT)?;
        let liked = match bytes <= SMALL {
            true => SMALL_PIECE,
            false => (self.large.held() / 8).max(LARGE_PIECE).next_multiple_of(PIECE_UNIT),
        };
        Some([liked.max(least), least])
    }

    /// Takes a piece in for an allocation of `bytes`: `size` bytes at `base`, both multiples of [`ALIGN`].
    pub fn add(&mut self, bytes: u64, base: u64, size: u64) {
        assert!(base != 0 && base.is_multiple_of(ALIGN) && size.is_multiple_of(ALIGN), "pieces are aligned");
        self.pool(bytes).add(base, size);
    }

    /// Takes note of an allocation that is a piece by itself: `bytes` bytes at `base`.
    pub fn add_alone(&mut self, base: u64, bytes: u64) {
        self.alone.insert(base, bytes);
        self.used += bytes;
        self.peak = self.peak.max(self.used);
    }

    /// Forgets it; the caller gives it back to the driver. False if there is none at this address.
    pub fn remove_alone(&mut self, base: u64) -> bool {
        let bytes = self.alone.remove(&base);
        self.used -= bytes.unwrap_or(0);
        bytes.is_some()
    }

    /// The bases of pieces that nothing lies in, which the caller gives back to the driver; they are forgotten.
    pub fn drain_unused(&mut self) -> Vec<u64> {
        let mut bases = self.small.drain_unused();
        bases.extend(self.large.drain_unused());
        bases
    }

    /// The bases of all pieces, in use or not; everything is forgotten.
    pub fn drain(&mut self) -> Vec<u64> {
        let Self { small, large, alone, .. } = std::mem::take(self);
        let pieces = small.pieces.into_iter().chain(large.pieces).flatten().map(|(base, _)| base);
        pieces.chain(alone.into_keys()).collect()
    }

    /// Whether an address is that of a small allocation.
    pub fn is_small(&self, address: u64) -> bool {
        self.small.used.contains_key(&address)
    }

    /// Bytes of all pieces.
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

    /// From here on, what is in use now is the most.
    pub fn reset_peak(&mut self) {
        self.peak = self.used;
    }

    fn pool(&mut self, bytes: u64) -> &mut Pool {
        if bytes <= SMALL { &mut self.small } else { &mut self.large }
    }
}
