//! The device heap: `malloc` and `free` of device code.
//!
//! A piece of global memory of [`HEAP_BYTES`], as CUDA gives without being asked. Each block has a gap behind it that belongs to
//! none, and a freed place is given out again only when the search comes round, so that overruns and uses after `free` are
//! found.

use std::collections::BTreeMap;

use super::context::{Context, Stop};
use super::memory::access::Part;
use super::memory::lanes;
use super::registers::LANES;
use crate::error::ErrorKind;

/// Bytes of the heap (`cudaLimitMallocHeapSize`).
pub const HEAP_BYTES: u64 = 8 << 20;
/// Alignment of every block, and the least gap between two.
const ALIGN: u64 = 16;

/// Blocks of the heap: offset and bytes.
#[derive(Debug, Default)]
pub struct Heap {
    /// First address.
    pub start: u64,
    used: BTreeMap<u64, u64>,
    /// Blocks that were freed, and whose place no other has taken.
    freed: BTreeMap<u64, u64>,
    /// Where the search for a place goes on.
    next: u64,
}

/// The bytes of a block with its gap.
fn room(bytes: u64) -> Option<u64> {
    bytes.max(1).checked_next_multiple_of(ALIGN)?.checked_add(ALIGN)
}

impl Heap {
    /// An empty heap at an address.
    pub fn at(start: u64) -> Self {
        Self { start, ..Self::default() }
    }

    /// The lowest place from `from` on that has room.
    fn place(&self, from: u64, needed: u64) -> Option<u64> {
        let mut at = from;
        let before = self.used.range(..from).next_back();
        if let Some((start, bytes)) = before {
            at = at.max(start + room(*bytes)?);
        }
        for (start, bytes) in self.used.range(from..) {
            if *start >= at && start - at >= needed {
                break;
            }
            at = at.max(start + room(*bytes)?);
        }
        (at.checked_add(needed)? <= HEAP_BYTES).then_some(at)
    }

    /// A free place for `bytes` bytes; 0 where there is none, as `malloc` says.
    pub fn malloc(&mut self, bytes: u64) -> u64 {
        let Some(needed) = room(bytes).filter(|n| *n <= HEAP_BYTES) else { return 0 };
        let Some(at) = self.place(self.next, needed).or_else(|| self.place(0, needed)) else { return 0 };
        self.next = at + needed;
        let over =
            |(start, bytes): (&u64, &u64)| *start < at + needed && start + room(*bytes).unwrap_or(0) > at;
        let gone: Vec<u64> =
            self.freed.iter().filter(|block| over(*block)).map(|(start, _)| *start).collect();
        gone.iter().for_each(|start| _ = self.freed.remove(start));
        self.used.insert(at, bytes.max(1));
        self.start + at
    }

    /// Frees a block and gives its bytes; `None` for an address that `malloc` did not give.
    pub fn free(&mut self, address: u64) -> Option<u64> {
        let at = address.checked_sub(self.start)?;
        let bytes = self.used.remove(&at)?;
        self.freed.insert(at, bytes);
        Some(bytes)
    }

    /// Why an access to bytes of the heap that belong to no block is wrong.
    fn explain(&self, address: u64, bytes: u64) -> (ErrorKind, String) {
        let access = format!("{bytes} byte{} at {address:#x}", if bytes == 1 { "" } else { "s" });
        let at = address.saturating_sub(self.start);
        let within = |blocks: &BTreeMap<u64, u64>, reach: u64| {
            let (start, bytes) = blocks.range(..=at).next_back().map(|(start, bytes)| (*start, *bytes))?;
            (at < start + bytes + reach).then_some((start, bytes))
        };
        let block = |start: u64, bytes: u64| {
            format!("a block of {bytes} bytes at {:#x} of the device heap", self.start + start)
        };
        if let Some((start, n)) = within(&self.freed, 0) {
            let what = block(start, n);
            return (
                ErrorKind::UseAfterFree,
                format!("{access}: {} bytes into {what}, which was freed", at - start),
            );
        }
        let message = match within(&self.used, u64::MAX / 2) {
            Some((start, n)) if at < start + n => {
                format!(
                    "{access}: reaches {} bytes past the end of {}",
                    at + bytes - start - n,
                    block(start, n)
                )
            }
            Some((start, n)) => {
                format!("{access}: {} bytes behind the end of {}", at - start - n, block(start, n))
            }
            None => format!("{access} of the device heap: no block has this address"),
        };
        (ErrorKind::OutOfBounds, message)
    }
}

impl Context<'_> {
    /// Refuses an access to bytes of the heap that belong to no block.
    #[cold]
    pub(crate) fn check_heap(&self, part: &Part<'_>, at: &[u64; LANES], bytes: u64) -> Result<(), Stop> {
        let wrong = lanes(part.lanes).find(|lane| !part.allocation.is_live(part.offset(at[*lane]), bytes));
        let Some(lane) = wrong else { return Ok(()) };
        let mut told = (ErrorKind::OutOfBounds, String::new());
        self.launch.heap(|heap| told = heap.explain(at[lane], bytes));
        Err(self.fault(told.0, 1 << lane, told.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_gaps_and_are_reused_late() {
        let mut heap = Heap::at(1 << 20);
        let (a, b) = (heap.malloc(10), heap.malloc(16));
        assert_eq!((a, b), (1 << 20, (1 << 20) + 32));
        assert_eq!(heap.free(a), Some(10));
        assert_eq!(heap.free(a), None);
        // The freed place is not the next one, but it is taken when nothing else is left.
        assert_eq!(heap.malloc(10), b + 32);
        assert_eq!(heap.malloc(HEAP_BYTES - 96 - 16), b + 64);
        assert_eq!(heap.explain(a + 4, 4).0, ErrorKind::UseAfterFree);
        assert_eq!((heap.malloc(10), heap.malloc(1)), (a, 0));
        assert_eq!(heap.explain(a + 8, 4).0, ErrorKind::OutOfBounds);
        assert_eq!((heap.malloc(HEAP_BYTES), heap.malloc(u64::MAX)), (0, 0));
    }
}
