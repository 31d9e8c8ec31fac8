//! "Something that runs PTX": one trait at the level of the CUDA driver, so that the same launchers, arguments and PTX run on a
//! GPU ([`driver`]) and on the virtual GPU ([`vm`]).
//!
//! Work is ordered: work that is asked for first runs first, but for copies from and to page-locked memory of the host, which
//! have lanes of their own ([`Lane`]). Only [`Device::read`], [`Device::end_read`] and
//! [`Device::synchronize`] wait.
//!
//! [`dry`] has memory and runs nothing. [`arena`] does the bookkeeping of a GPU's memory and [`sequence`] that of its CUDA
//! graphs; [`dependent`] makes PTX whose launches overlap. None of them calls the driver.

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

    /// Page-locked memory of the host, aligned to 256 bytes and zero; `bytes` > 0. Takes long: the host's pages are found and
    /// pinned.
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

/// Methods of an `impl` of [`Device`](crate::device::Device) that another device answers:
/// `delegate_device!(self, self.vm; name, free);`. This macro and the types of the signatures are in scope.
#[macro_export]
macro_rules! delegate_device {
    ($self:ident, $to:expr; $($method:ident),+ $(,)?) => { $(delegate_device! { @$method $self, $to })+ };
    (@fn $self:ident, $to:expr, $method:ident($($arg:ident: $of:ty),*) $(-> $result:ty)?) => {
        fn $method(&$self, $($arg: $of),*) $(-> $result)? {
            $to.$method($($arg),*)
        }
    };
    (@name $($to:tt)*) => { delegate_device! { @fn $($to)*, name() -> String } };
    (@model $($to:tt)*) => { delegate_device! { @fn $($to)*, model() -> String } };
    (@multiprocessors $($to:tt)*) => { delegate_device! { @fn $($to)*, multiprocessors() -> u32 } };
    (@load $($to:tt)*) => { delegate_device! { @fn $($to)*, load(name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> } };
    (@load_cubin $($to:tt)*) => { delegate_device! { @fn $($to)*, load_cubin(name: &str, cubins: &[Cubin], entries: &[&str]) -> Result<Option<Vec<Kernel>>, DeviceError> } };
    (@alloc $($to:tt)*) => { delegate_device! { @fn $($to)*, alloc(bytes: usize) -> Result<Ptr, DeviceError> } };
    (@free $($to:tt)*) => { delegate_device! { @fn $($to)*, free(ptr: Ptr) } };
    (@write $($to:tt)*) => { delegate_device! { @fn $($to)*, write(dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError> } };
    (@read $($to:tt)*) => { delegate_device! { @fn $($to)*, read(src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> } };
    (@begin_read $($to:tt)*) => { delegate_device! { @fn $($to)*, begin_read(src: Ptr, bytes: usize) -> Result<Reading, DeviceError> } };
    (@end_read $($to:tt)*) => { delegate_device! { @fn $($to)*, end_read(reading: Reading) -> Result<Vec<u8>, DeviceError> } };
    (@fill $($to:tt)*) => { delegate_device! { @fn $($to)*, fill(dst: Ptr, value: u8, bytes: usize) -> Result<(), DeviceError> } };
    (@launch $($to:tt)*) => { delegate_device! { @fn $($to)*, launch(kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError> } };
    (@synchronize $($to:tt)*) => { delegate_device! { @fn $($to)*, synchronize() -> Result<(), DeviceError> } };
    (@available $($to:tt)*) => { delegate_device! { @fn $($to)*, available() -> Result<Option<u64>, DeviceError> } };
    (@host_alloc $($to:tt)*) => { delegate_device! { @fn $($to)*, host_alloc(bytes: usize) -> Result<HostPtr, DeviceError> } };
    (@host_free $($to:tt)*) => { delegate_device! { @fn $($to)*, host_free(ptr: HostPtr) } };
    (@host_mapped $($to:tt)*) => { delegate_device! { @fn $($to)*, host_mapped(ptr: HostPtr) -> Result<Ptr, DeviceError> } };
    (@host_write $($to:tt)*) => { delegate_device! { @fn $($to)*, host_write(dst: HostPtr, bytes: &[u8]) -> Result<(), DeviceError> } };
    (@host_read $($to:tt)*) => { delegate_device! { @fn $($to)*, host_read(src: HostPtr, bytes: &mut [u8]) -> Result<(), DeviceError> } };
    (@copy_in $($to:tt)*) => { delegate_device! { @fn $($to)*, copy_in(dst: Ptr, src: HostPtr, bytes: usize) -> Result<(), DeviceError> } };
    (@copy_out $($to:tt)*) => { delegate_device! { @fn $($to)*, copy_out(dst: HostPtr, src: Ptr, bytes: usize) -> Result<(), DeviceError> } };
    (@mark $($to:tt)*) => { delegate_device! { @fn $($to)*, mark(lane: Lane, mark: usize) -> Result<(), DeviceError> } };
    (@wait_for $($to:tt)*) => { delegate_device! { @fn $($to)*, wait_for(lane: Lane, mark: usize) -> Result<(), DeviceError> } };
    (@begin_sequence $($to:tt)*) => { delegate_device! { @fn $($to)*, begin_sequence() -> Result<(), DeviceError> } };
    (@end_sequence $($to:tt)*) => { delegate_device! { @fn $($to)*, end_sequence() -> Result<(), DeviceError> } };
    (@timed $($to:tt)*) => { delegate_device! { @fn $($to)*, timed(f: &mut dyn FnMut()) -> Result<f64, DeviceError> } };
}

pub use delegate_device;

impl<D: Device + ?Sized> Device for Arc<D> {
    delegate_device!(
        self,
        (**self); name, model, multiprocessors, load, load_cubin, alloc, free, write, read, begin_read, end_read, fill, launch,
        synchronize, available, host_alloc, host_free, host_mapped, host_write, host_read, copy_in, copy_out, mark, wait_for,
        begin_sequence, end_sequence, timed,
    );
}
