//! A device that has memory and nothing else: room is taken and given back as on a GPU, nothing is computed, and what is
//! read is zero. What a program takes of a GPU's memory can be known without one, because launchers do not look at numbers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::arena::Arena;
use super::{Arg, Cubin, Device, DeviceError, HostPtr, Kernel, Launch, Ptr};

/// Launchers choose tiles by it: an A100's number.
const MULTIPROCESSORS: u32 = 108;

/// The device. Clones share its memory.
#[derive(Debug, Clone)]
pub struct Dry(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    arena: Arena,
    /// Bytes of slabs that may be taken at once.
    memory: u64,
    /// What it says that there is left; `None`: what there is.
    says: Option<u64>,
    /// Sizes of the slabs, by address.
    slabs: HashMap<u64, u64>,
    next_address: u64,
    kernels: usize,
    /// Bytes that were copied from the host's memory and to it.
    bus: [u64; 2],
}

impl State {
    /// A slab of `size` bytes for an allocation of `bytes`, if there is as much memory.
    fn take_slab(&mut self, bytes: u64, size: u64) -> bool {
        let fits = self.slabs.values().sum::<u64>().checked_add(size).is_some_and(|held| held <= self.memory);
        if fits {
            self.arena.add(bytes, self.next_address, size);
            self.slabs.insert(self.next_address, size);
            self.next_address += size;
        }
        fits
    }

    /// As the driver's arena grows.
    fn grow(&mut self, bytes: u64) -> bool {
        let Some([liked, least]) = self.arena.slab_for(bytes) else { return false };
        if self.take_slab(bytes, liked) || self.take_slab(bytes, least) {
            return true;
        }
        for base in self.arena.drain_unused() {
            self.slabs.remove(&base);
        }
        self.take_slab(bytes, least)
    }
}

impl Dry {
    /// A device with so many bytes of memory.
    pub fn new(memory: u64) -> Self {
        Self::with(memory, None)
    }

    /// A device that says it has nothing left, and gives all that it is asked for: whoever adapts to what there is takes
    /// the least that he can.
    pub fn stingy() -> Self {
        Self::with(u64::MAX, Some(0))
    }

    fn with(memory: u64, says: Option<u64>) -> Self {
        let (slabs, next_address) = (HashMap::new(), 1 << 40);
        let arena = Arena::default();
        let state = State { arena, memory, says, slabs, next_address, kernels: 0, bus: [0; 2] };
        Self(Arc::new(Mutex::new(state)))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.state().arena.used()
    }

    /// Bytes copied from the host's memory to the device's, and back, since the last call.
    pub fn take_bus(&self) -> [u64; 2] {
        std::mem::take(&mut self.state().bus)
    }

    /// The most bytes that were in use at once since the last call.
    pub fn take_peak(&self) -> u64 {
        let mut state = self.state();
        let peak = state.arena.peak();
        state.arena.reset_peak();
        peak
    }
}

impl Device for Dry {
    fn name(&self) -> String {
        "dry (memory alone)".into()
    }

    fn multiprocessors(&self) -> u32 {
        MULTIPROCESSORS
    }

    fn load(&self, _: &str, _: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> {
        let mut state = self.state();
        let first = state.kernels;
        state.kernels += entries.len();
        Ok((first..state.kernels).map(Kernel).collect())
    }

    fn load_cubin(
        &self,
        name: &str,
        _: &[Cubin],
        entries: &[&str],
    ) -> Result<Option<Vec<Kernel>>, DeviceError> {
        self.load(name, "", entries).map(Some)
    }

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        let mut state = self.state();
        let size = bytes as u64;
        let found = state.arena.alloc(size);
        let address = match found {
            None if state.grow(size) => state.arena.alloc(size),
            found => found,
        };
        let lacking =
            || DeviceError::out_of_memory("dry", format!("out of memory: {bytes} bytes are asked for"));
        address.map(Ptr).ok_or_else(lacking)
    }

    fn free(&self, ptr: Ptr) {
        self.state().arena.free(ptr.0);
    }

    fn write(&self, _: Ptr, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn read(&self, _: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        bytes.fill(0);
        Ok(())
    }

    fn fill(&self, _: Ptr, _: u8, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn launch(&self, _: Kernel, _: &Launch, _: &[Arg]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        let mut state = self.state();
        let address = state.next_address;
        state.next_address += (bytes as u64).next_multiple_of(256);
        Ok(HostPtr(address))
    }

    fn host_free(&self, _: HostPtr) {}

    fn host_mapped(&self, ptr: HostPtr) -> Result<Ptr, DeviceError> {
        Ok(Ptr(ptr.0))
    }

    fn host_write(&self, _: HostPtr, _: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn host_read(&self, _: HostPtr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        bytes.fill(0);
        Ok(())
    }

    fn copy_in(&self, _: Ptr, _: HostPtr, bytes: usize) -> Result<(), DeviceError> {
        self.state().bus[0] += bytes as u64;
        Ok(())
    }

    fn copy_out(&self, _: HostPtr, _: Ptr, bytes: usize) -> Result<(), DeviceError> {
        self.state().bus[1] += bytes as u64;
        Ok(())
    }

    fn available(&self) -> Result<Option<u64>, DeviceError> {
        let state = self.state();
        Ok(Some(state.says.unwrap_or_else(|| state.memory.saturating_sub(state.arena.used()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_ends_and_comes_back() {
        let dry = Dry::new(100 << 20);
        let a = dry.alloc(60 << 20).expect("it fits");
        let e = dry.alloc(60 << 20).expect_err("it does not fit beside the first");
        assert!(e.out_of_memory);
        assert_eq!((dry.used(), dry.take_peak()), (60 << 20, 60 << 20));
        assert_eq!(dry.available().expect("no call fails"), Some(40 << 20));
        let b = dry.alloc(1000).expect("it fits");
        dry.free(a);
        assert_eq!(dry.alloc(70 << 20).map(|ptr| ptr.0.is_multiple_of(256)), Ok(true));
        assert_eq!(dry.take_peak(), (70 << 20) + 1024);
        dry.free(b);
        let mut bytes = [7; 4];
        dry.read(b, &mut bytes).expect("no call fails");
        assert_eq!(bytes, [0; 4]);
    }
}
