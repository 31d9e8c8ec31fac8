//! The device heap: `malloc` and `free` of device code.
//!
//! A piece of global memory of [`HEAP_BYTES`], as CUDA gives without being asked. Bounds are checked for the heap as a
//! whole; reads of uninitialised bytes are found as everywhere.

use std::collections::BTreeMap;

/// Bytes of the heap (`cudaLimitMallocHeapSize`).
pub const HEAP_BYTES: u64 = 8 << 20;
/// Alignment of every block.
const ALIGN: u64 = 16;

/// Blocks of the heap that are in use: offset and bytes.
#[derive(Debug, Default)]
pub struct Heap {
    /// First address.
    pub start: u64,
    used: BTreeMap<u64, u64>,
}

impl Heap {
    /// An empty heap at an address.
    pub fn at(start: u64) -> Self {
        Self { start, used: BTreeMap::new() }
    }

    /// The lowest free place for `bytes` bytes; 0 where there is none, as `malloc` says.
    pub fn malloc(&mut self, bytes: u64) -> u64 {
        let Some(bytes) = bytes.max(1).checked_next_multiple_of(ALIGN) else { return 0 };
        let mut at = 0;
        for (start, size) in &self.used {
            if start - at >= bytes {
                break;
            }
            at = start + size;
        }
        if at + bytes > HEAP_BYTES {
            return 0;
        }
        self.used.insert(at, bytes);
        self.start + at
    }

    /// Frees a block; `false` for an address that `malloc` did not give.
    pub fn free(&mut self, address: u64) -> bool {
        address == 0 || address.checked_sub(self.start).is_some_and(|at| self.used.remove(&at).is_some())
    }
}
