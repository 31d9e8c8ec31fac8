//! The virtual GPU: the same PTX and launches as on a real one, run on the CPU with a sanitizer's checks.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

pub use ptxvm::machine::counters::BlockWork;
pub use ptxvm::{Checks, MmaOrder, Options, Report};
use ptxvm::{DevicePtr, Gpu, LoadedModule, Module};

use super::{Arg, Device, DeviceError, HostPtr, Kernel, Launch, Ptr};

/// What a virtual GPU says of itself unless it is told otherwise: an A100's number.
const MULTIPROCESSORS: u32 = 108;

/// A virtual GPU as a [`Device`].
pub struct Vm {
    state: Mutex<State>,
    multiprocessors: u32,
    mma: MmaOrder,
}

struct State {
    gpu: Gpu,
    modules: Vec<LoadedModule>,
    /// (index into `modules`, name), by [`Kernel`].
    kernels: Vec<(usize, String)>,
    /// Reports of launches since [`Vm::take_reports`], where they are kept.
    reports: Option<Vec<Report>>,
    /// Bytes that were copied from the host's memory and to it.
    bus: [u64; 2],
}

/// Parsed modules, by their text: every device of a process shares them.
static PARSED: LazyLock<Mutex<HashMap<String, Module>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn error(e: ptxvm::Error) -> DeviceError {
    DeviceError::new("vm", e.to_string())
}

impl Vm {
    /// A device without any allocation.
    pub fn new(options: Options) -> Self {
        let mma = options.mma;
        let state = State {
            gpu: Gpu::new(options),
            modules: Vec::new(),
            kernels: Vec::new(),
            reports: None,
            bus: [0; 2],
        };
        Self { state: Mutex::new(state), multiprocessors: MULTIPROCESSORS, mma }
    }

    /// The same device with so many multiprocessors. It computes as before; launchers choose tiles by the number.
    pub fn with_multiprocessors(self, multiprocessors: u32) -> Self {
        Self { multiprocessors, ..self }
    }

    /// Keeps a report of every launch from here on.
    pub fn keep_reports(&self) {
        self.state().reports = Some(Vec::new());
    }

    /// The reports of the launches since the last call, in order.
    pub fn take_reports(&self) -> Vec<Report> {
        self.state().reports.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Bytes that went from page-locked memory of the host to the device, and back, since the last call. They are counted here and
    /// copied at once; how long a bus would take is arithmetic.
    pub fn take_bus(&self) -> [u64; 2] {
        std::mem::take(&mut self.state().bus)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    fn copy(&mut self, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<(), DeviceError> {
        let mut held = vec![0; bytes];
        self.gpu.read(src, &mut held).map_err(error)?;
        self.gpu.write(dst, &held).map_err(error)
    }
}

impl Device for Vm {
    fn name(&self) -> String {
        match self.mma {
            MmaOrder::Chain => "vm (a virtual GPU on the CPU)".into(),
            order => format!("vm (a virtual GPU on the CPU, products summed as on {})", order.name()),
        }
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn load(&self, name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> {
        let mut parsed = lock(&PARSED);
        let module = match parsed.get(ptx) {
            Some(module) => module.clone(),
            None => {
                let module = Module::load(name, ptx).map_err(error)?;
                parsed.insert(ptx.to_owned(), module.clone());
                module
            }
        };
        drop(parsed);
        let mut state = self.state();
        let loaded = state.gpu.load(&module).map_err(error)?;
        let index = state.modules.len();
        state.modules.push(loaded);
        let first = state.kernels.len();
        state.kernels.extend(entries.iter().map(|name| (index, (*name).to_owned())));
        Ok((first..state.kernels.len()).map(Kernel).collect())
    }

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        // It takes any size that there is room for.
        let none =
            |_| DeviceError::out_of_memory("vm", format!("out of memory: {bytes} bytes are asked for"));
        self.state().gpu.alloc(bytes).map(|ptr| Ptr(ptr.0)).map_err(none)
    }

    fn free(&self, ptr: Ptr) {
        // Only what `alloc` gave comes here, once.
        let _ = self.state().gpu.free(DevicePtr(ptr.0));
    }

    fn write(&self, dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.state().gpu.write(DevicePtr(dst.0), bytes).map_err(error)
    }

    fn read(&self, src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.state().gpu.read(DevicePtr(src.0), bytes).map_err(error)
    }

    fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<(), DeviceError> {
        self.state().gpu.fill(DevicePtr(dst.0), value, bytes).map_err(error)
    }

    fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError> {
        let mut state = self.state();
        let State { gpu, modules, kernels, reports, .. } = &mut *state;
        let (module, name) = &kernels[kernel.0];
        let shape = ptxvm::Launch {
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            cooperative: false,
            cluster: None,
        };
        let args: Vec<ptxvm::Arg> = args
            .iter()
            .map(|arg| match arg {
                Arg::Ptr(Ptr(x)) => ptxvm::Arg::Ptr(DevicePtr(*x)),
                Arg::U32(x) => ptxvm::Arg::U32(*x),
                Arg::U64(x) => ptxvm::Arg::U64(*x),
                Arg::F32(x) => ptxvm::Arg::F32(*x),
                Arg::Bytes(x) => ptxvm::Arg::Bytes(x.clone()),
            })
            .collect();
        let report = gpu.launch(&modules[*module], name, &shape, &args).map_err(error)?;
        if let Some(reports) = reports {
            reports.push(report);
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    // The device's memory is the host's, and all that is asked for is done at once.

    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        let ptr = self.alloc(bytes)?;
        self.fill(ptr, 0, bytes)?;
        Ok(HostPtr(ptr.0))
    }

    fn host_free(&self, ptr: HostPtr) {
        self.free(Ptr(ptr.0));
    }

    fn host_mapped(&self, ptr: HostPtr) -> Result<Ptr, DeviceError> {
        Ok(Ptr(ptr.0))
    }

    fn host_write(&self, dst: HostPtr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write(Ptr(dst.0), bytes)
    }

    fn host_read(&self, src: HostPtr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.read(Ptr(src.0), bytes)
    }

    fn copy_in(&self, dst: Ptr, src: HostPtr, bytes: usize) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.bus[0] += bytes as u64;
        state.copy(DevicePtr(dst.0), DevicePtr(src.0), bytes)
    }

    fn copy_out(&self, dst: HostPtr, src: Ptr, bytes: usize) -> Result<(), DeviceError> {
        let mut state = self.state();
        state.bus[1] += bytes as u64;
        state.copy(DevicePtr(dst.0), DevicePtr(src.0), bytes)
    }
}
