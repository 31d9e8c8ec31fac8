//! "Something that runs PTX": one trait at the level of the CUDA driver, so that the same launchers, arguments and PTX run on a
//! GPU ([`driver`]) and on the virtual GPU ([`vm`]).
//!
//! Work is ordered: work that is asked for first runs first, but for copies from and to page-locked memory of the host, which
//! have lanes of their own ([`Lane`]). Only [`Device::read`], [`Device::end_read`] and
//! [`Device::synchronize`] wait.
//!
//! [`dry`] has memory and runs nothing. [`arena`] does the bookkeeping of a GPU's memory and [`sequence`] that of its CUDA graphs; [`dependent`] makes PTX whose
//! launches overlap. None of them calls the driver.

pub mod arena;
pub mod dependent;
pub mod driver;
pub mod dry;
pub mod host;
pub mod sequence;
mod sys;
pub mod vm;

use std::sync::Arc;
use std::time::Instant;

use thiserror::Error;

/// What went wrong on a device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{device}: {message}")]
pub struct DeviceError {
    /// Which device.
    pub device: String,
    /// What happened, and what to do about it.
    pub message: String,
    /// Whether no memory is left. The caller may then ask for less.
    pub out_of_memory: bool,
}

impl DeviceError {
    /// Any error but one of memory that ran out.
    pub fn new(device: impl Into<String>, message: impl Into<String>) -> Self {
        Self { device: device.into(), message: message.into(), out_of_memory: false }
    }

    /// The error of memory that ran out.
    pub fn out_of_memory(device: impl Into<String>, message: impl Into<String>) -> Self {
        Self { device: device.into(), message: message.into(), out_of_memory: true }
    }
}

/// An address in the device's memory; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ptr(pub u64);

/// An address in page-locked memory of the host, for a device's calls alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HostPtr(pub u64);

impl HostPtr {
    /// So many bytes further.
    pub fn at(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// What a device does beside other things. Work of one lane is ordered; lanes wait for each other where they are told to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Everything but the copies of the two others.
    Compute,
    /// [`Device::copy_in`].
    In,
    /// [`Device::copy_out`].
    Out,
}

/// Marks of lanes that may be in use at once.
pub const MARKS: usize = 8;

/// An entry point that has been loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel(pub usize);

/// The shape of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Launch {
    /// Blocks along x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block along x, y, z.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

impl Launch {
    /// A grid of `blocks` blocks of `threads` threads, without dynamic shared memory.
    pub fn linear(blocks: usize, threads: u32) -> Self {
        let blocks = u32::try_from(blocks).expect("a grid of fewer than 2^32 blocks");
        Self { grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 0 }
    }

    /// The same with dynamic shared memory.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared_bytes: u32::try_from(bytes).expect("a block's shared memory is small"), ..self }
    }
}

/// A kernel's argument.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    /// A pointer.
    Ptr(Ptr),
    /// `unsigned`.
    U32(u32),
    /// `unsigned long long`.
    U64(u64),
    /// `float`.
    F32(f32),
    /// A struct by value, as the kernel lays it out.
    Bytes(Vec<u8>),
}

impl From<Ptr> for Arg {
    fn from(x: Ptr) -> Self {
        Arg::Ptr(x)
    }
}

impl From<u32> for Arg {
    fn from(x: u32) -> Self {
        Arg::U32(x)
    }
}

impl From<u64> for Arg {
    fn from(x: u64) -> Self {
        Arg::U64(x)
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Arg::F32(x)
    }
}

impl From<usize> for Arg {
    /// Kernels count in 32 bits; offsets they compute in 64.
    fn from(x: usize) -> Self {
        Arg::U32(u32::try_from(x).expect("counts of a launch fit 32 bits"))
    }
}

/// A read that [`Device::begin_read`] began.
#[derive(Debug)]
pub enum Reading {
    /// The bytes.
    Done(Vec<u8>),
    /// The device's number of the buffer that will receive them. The buffer is reused when this is dropped.
    UnderWay(Arc<usize>),
}

/// Machine code of a module, as ptxas writes it; from compute capability 9.0 on, of the text that [`dependent::dependent`]
/// makes.
#[derive(Debug, Clone, Copy)]
pub struct Cubin<'a> {
    /// Compute capability that it is made for, as in (8, 6): it runs on GPUs of the same major version and this or a later
    /// minor one.
    pub capability: (i32, i32),
    /// CUDA version of its ptxas, as in (13, 2): drivers of the same major version or a later one take it.
    pub cuda: (i32, i32),
    /// The ELF file, whole.
    pub image: &'a [u8],
}

impl<'a> Cubin<'a> {
    /// Of the machine code that runs on a GPU of this compute capability under a driver of this CUDA version, that for the latest
    /// GPU.
    pub fn fitting(all: &[Cubin<'a>], capability: (i32, i32), driver: (i32, i32)) -> Option<Cubin<'a>> {
        let runs = |c: &&Cubin| {
            c.capability.0 == capability.0 && c.capability.1 <= capability.1 && c.cuda.0 <= driver.0
        };
        all.iter().filter(runs).max_by_key(|c| c.capability).copied()
    }
}

/// The calls that launchers make to a device.
pub trait Device: Send + Sync {
    /// The name by which a user recognises it.
    fn name(&self) -> String;
    /// What of its name bits may depend on: like devices have the same. Which of several it is makes no difference.
    fn model(&self) -> String {
        self.name()
    }
    /// Multiprocessors: how many blocks run side by side at least. Launchers may choose a tile by it, and never an order
    /// of sums, so that results are the same on every device.
    fn multiprocessors(&self) -> u32;
    /// Loads a module of PTX and returns its entry points in the order of `entries`. `name` is for messages.
    fn load(&self, name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError>;
    /// [`Device::load`] of the module's machine code; `None` if the device runs none of `cubins` and needs the PTX.
    fn load_cubin(
        &self,
        _name: &str,
        _cubins: &[Cubin],
        _entries: &[&str],
    ) -> Result<Option<Vec<Kernel>>, DeviceError> {
        Ok(None)
    }
    /// Memory, aligned to 256 bytes, its contents undefined; `bytes` > 0. Cheap: no driver call once warm.
    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError>;
    /// Frees memory. Work that was asked for before may still use it.
    fn free(&self, ptr: Ptr);
    /// Host to device.
    fn write(&self, dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError>;
    /// Device to host; waits for all work.
    fn read(&self, src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError>;
    /// Starts a read of bytes as they are after all earlier work, without waiting for that work. Later work may change the bytes at
    /// once.
    fn begin_read(&self, src: Ptr, bytes: usize) -> Result<Reading, DeviceError> {
        let mut read = vec![0; bytes];
        self.read(src, &mut read)?;
        Ok(Reading::Done(read))
    }
    /// The bytes; waits for the work before [`Device::begin_read`], and for none after it.
    fn end_read(&self, reading: Reading) -> Result<Vec<u8>, DeviceError> {
        match reading {
            Reading::Done(bytes) => Ok(bytes),
            Reading::UnderWay(_) => Err(DeviceError::new(self.name(), "the read is another device's")),
        }
    }
    /// Sets bytes.
    fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<(), DeviceError>;
    /// Runs a kernel.
    fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError>;
    /// Waits for all work.
    fn synchronize(&self) -> Result<(), DeviceError>;
    /// Bytes that allocations may still take, though not in one range; `None` if the device has no memory of its own.
    fn available(&self) -> Result<Option<u64>, DeviceError> {
        Ok(None)
    }

    /// Page-locked memory of the host, aligned to 256 bytes and zero; `bytes` > 0. Takes long: the host's pages are found and pinned.
    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        let message = format!("it holds nothing in the host's memory, and {bytes} bytes are asked for");
        Err(DeviceError::new(self.name(), message))
    }
    /// Gives it back, when all work has ended.
    fn host_free(&self, _ptr: HostPtr) {}
    /// Where kernels find memory of [`Device::host_alloc`]: each of their accesses goes over the bus.
    fn host_mapped(&self, ptr: HostPtr) -> Result<Ptr, DeviceError> {
        Err(DeviceError::new(self.name(), format!("{ptr:?} is nothing that it holds")))
    }
    /// Changes the host's memory, when all work has ended.
    fn host_write(&self, dst: HostPtr, _bytes: &[u8]) -> Result<(), DeviceError> {
        Err(DeviceError::new(self.name(), format!("{dst:?} is nothing that it holds")))
    }
    /// Reads the host's memory, when all work has ended.
    fn host_read(&self, src: HostPtr, _bytes: &mut [u8]) -> Result<(), DeviceError> {
        Err(DeviceError::new(self.name(), format!("{src:?} is nothing that it holds")))
    }
    /// Copies from the host's memory to the device's, in [`Lane::In`].
    fn copy_in(&self, _dst: Ptr, src: HostPtr, _bytes: usize) -> Result<(), DeviceError> {
        Err(DeviceError::new(self.name(), format!("{src:?} is nothing that it holds")))
    }
    /// Copies from the device's memory to the host's, in [`Lane::Out`].
    fn copy_out(&self, dst: HostPtr, _src: Ptr, _bytes: usize) -> Result<(), DeviceError> {
        Err(DeviceError::new(self.name(), format!("{dst:?} is nothing that it holds")))
    }
    /// Sets a mark, below [`MARKS`], behind all that a lane has been asked for so far.
    fn mark(&self, _lane: Lane, _mark: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    /// What a lane is asked for from here on begins when what is before the mark, where it was set last, has ended.
    fn wait_for(&self, _lane: Lane, _mark: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Begins a sequence: the work up to [`Device::end_sequence`] is likely to come again with the same arguments, and a GPU then
    /// replays it as one CUDA graph. Results are the same as without a sequence. Sequences do not nest, and only one thread works
    /// with a device during a sequence.
    ///
    /// A sequence pays if its kernels are shorter than the time to launch one (some microseconds) and if all of it repeats: same
    /// kernels, shapes, addresses and numbers. Numbers that change from step to step belong in arrays that kernels read. An array
    /// that is allocated and written before the next launch does not split a sequence; reads and other writes split it, into parts
    /// that may repeat each by itself.
    fn begin_sequence(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Ends the sequence. All of its work has then been handed to the device.
    fn end_sequence(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Seconds of the work that `f` asks for, by a GPU's own clock, or else by the host's.
    fn timed(&self, f: &mut dyn FnMut()) -> Result<f64, DeviceError> {
        self.synchronize()?;
        let start = Instant::now();
        f();
        self.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }
}

impl<D: Device + ?Sized> Device for Arc<D> {
    fn name(&self) -> String {
        (**self).name()
    }

    fn model(&self) -> String {
        (**self).model()
    }

    fn multiprocessors(&self) -> u32 {
        (**self).multiprocessors()
    }

    fn load(&self, name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> {
        (**self).load(name, ptx, entries)
    }

    fn load_cubin(
        &self,
        name: &str,
        cubins: &[Cubin],
        entries: &[&str],
    ) -> Result<Option<Vec<Kernel>>, DeviceError> {
        (**self).load_cubin(name, cubins, entries)
    }

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        (**self).alloc(bytes)
    }

    fn free(&self, ptr: Ptr) {
        (**self).free(ptr);
    }

    fn write(&self, dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError> {
        (**self).write(dst, bytes)
    }

    fn read(&self, src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        (**self).read(src, bytes)
    }

    fn begin_read(&self, src: Ptr, bytes: usize) -> Result<Reading, DeviceError> {
        (**self).begin_read(src, bytes)
    }

    fn end_read(&self, reading: Reading) -> Result<Vec<u8>, DeviceError> {
        (**self).end_read(reading)
    }

    fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<(), DeviceError> {
        (**self).fill(dst, value, bytes)
    }

    fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError> {
        (**self).launch(kernel, launch, args)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        (**self).synchronize()
    }

    fn available(&self) -> Result<Option<u64>, DeviceError> {
        (**self).available()
    }

    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        (**self).host_alloc(bytes)
    }

    fn host_free(&self, ptr: HostPtr) {
        (**self).host_free(ptr);
    }

    fn host_mapped(&self, ptr: HostPtr) -> Result<Ptr, DeviceError> {
        (**self).host_mapped(ptr)
    }

    fn host_write(&self, dst: HostPtr, bytes: &[u8]) -> Result<(), DeviceError> {
        (**self).host_write(dst, bytes)
    }

    fn host_read(&self, src: HostPtr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        (**self).host_read(src, bytes)
    }

    fn copy_in(&self, dst: Ptr, src: HostPtr, bytes: usize) -> Result<(), DeviceError> {
        (**self).copy_in(dst, src, bytes)
    }

    fn copy_out(&self, dst: HostPtr, src: Ptr, bytes: usize) -> Result<(), DeviceError> {
        (**self).copy_out(dst, src, bytes)
    }

    fn mark(&self, lane: Lane, mark: usize) -> Result<(), DeviceError> {
        (**self).mark(lane, mark)
    }

    fn wait_for(&self, lane: Lane, mark: usize) -> Result<(), DeviceError> {
        (**self).wait_for(lane, mark)
    }

    fn begin_sequence(&self) -> Result<(), DeviceError> {
        (**self).begin_sequence()
    }

    fn end_sequence(&self) -> Result<(), DeviceError> {
        (**self).end_sequence()
    }

    fn timed(&self, f: &mut dyn FnMut()) -> Result<f64, DeviceError> {
        (**self).timed(f)
    }
}
