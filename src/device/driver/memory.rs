//! Memory of the GPU: slabs from the driver, cut up by the arena.

use super::*;

impl State {
    pub(super) fn alloc(&mut self, bytes: usize) -> Result<Ptr, DeviceError> {
        let bytes = bytes as u64;
        let found = if self.exact { Some(self.alloc_exactly(bytes)?) } else { self.arena.alloc(bytes) };
        let address = match found {
            Some(address) => address,
            None => {
                self.grow(bytes)?;
                self.arena.alloc(bytes).expect("a slab that is large enough was just added")
            }
        };
        if let Some(sequence) = self.sequence.as_mut().filter(|_| bytes <= SMALL) {
            sequence.fresh.insert(address, sequence.steps.len());
        }
        Ok(Ptr(address))
    }

    /// Gets a slab from the driver that `bytes` fit into.
    pub(super) fn grow(&mut self, bytes: u64) -> Result<(), DeviceError> {
        let sizes = self.arena.slab_for(bytes);
        let Some(sizes) = sizes else { return Err(self.out_of_memory(bytes)) };
        for size in sizes {
            if self.take_slab(bytes, size)? {
                return Ok(());
            }
        }
        // Pieces that nothing lies in any more may be too small each, but not together. Graphs name addresses in them,
        // and take up memory.
        self.synchronize()?;
        for graph in self.recordings.drain() {
            // SAFETY: it has left the records, and no work is under way.
            self.check("give a graph back", unsafe { sys::cuGraphExecDestroy(graph.executable) })?;
        }
        for base in self.arena.drain_unused() {
            // SAFETY: the arena forgot the slab, and no work is under way.
            self.check("give memory back", unsafe { sys::cuMemFree_v2(base) })?;
        }
        match self.take_slab(bytes, sizes[1])? {
            true => Ok(()),
            false => Err(self.out_of_memory(bytes)),
        }
    }

    pub(super) fn take_slab(&mut self, bytes: u64, size: u64) -> Result<bool, DeviceError> {
        let base = self.driver_memory(size)?;
        if let Some(base) = base {
            self.arena.add(bytes, base, size);
        }
        Ok(base.is_some())
    }

    /// Memory that is an allocation of the driver's by itself.
    pub(super) fn alloc_exactly(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        let Some(base) = self.driver_memory(bytes)? else { return Err(self.out_of_memory(bytes)) };
        self.arena.add_alone(base, bytes);
        Ok(base)
    }

    /// Asks the driver for memory; `None` where there is not as much.
    pub(super) fn driver_memory(&mut self, bytes: u64) -> Result<Option<u64>, DeviceError> {
        self.counts.allocations += 1;
        let mut base = 0;
        // SAFETY: the pointer is to a local.
        let result = unsafe { sys::cuMemAlloc_v2(&mut base, usize::try_from(bytes).unwrap_or(usize::MAX)) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Ok(None);
        }
        self.check("allocate memory", result)?;
        Ok(Some(base))
    }

    pub(super) fn out_of_memory(&self, bytes: u64) -> DeviceError {
        let (free, total) = self.free_and_total().unwrap_or((0, self.description.memory));
        let message = format!(
            "out of memory: {} are asked for; of {} this process uses {} and keeps {} for reuse in ranges that are \
             too small, {} are free; `nvidia-smi` shows other processes",
            gib(bytes),
            gib(total),
            gib(self.arena.used()),
            gib(self.arena.held() - self.arena.used()),
            gib(free),
        );
        DeviceError::out_of_memory(&self.name, message)
    }

    pub(super) fn free(&mut self, address: u64) {
        match &mut self.sequence {
            // Work that is held back may use it: of large memory, what takes its place is used later.
            Some(sequence) if !sequence.steps.is_empty() && (self.exact || self.arena.is_small(address)) => {
                sequence.fresh.remove(&address);
                sequence.freed.push(address);
            }
            _ => self.give_back(address),
        }
    }

    /// To the arena, or to the driver what the arena only keeps books of.
    pub(super) fn give_back(&mut self, address: u64) {
        if self.arena.remove_alone(address) {
            // An error has been returned before, or the next call returns it.
            let _ = self.wait();
            // SAFETY: the memory is ours, forgotten, and no work is under way.
            let _ = self.check("give memory back", unsafe { sys::cuMemFree_v2(address) });
        } else {
            self.arena.free(address);
        }
    }
}
