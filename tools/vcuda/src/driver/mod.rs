//! Devices, contexts, and everything with a handle.

mod memory;
mod module;
mod stream;

pub use memory::{Block, Kind};
pub use stream::GREATEST_PRIORITY;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::CString;
use std::io::Write as _;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use ptxvm::{Arg, Checks, DevicePtr, Gpu, Options};

pub use self::module::ELF_HEADER;
use self::module::Loaded;
use self::stream::{Capture, Event, Stream};
use crate::code::{Code, say};
use crate::settings::Settings;
use crate::work::{self, Call, Function, Work};

/// The driver of this process.
static DRIVER: Mutex<Option<Driver>> = Mutex::new(None);
/// CUDA version of the driver where the environment says none.
static VERSION: Mutex<(i32, i32)> = Mutex::new((12, 4));
/// Bytes of the address space that each context has for itself.
const CONTEXT_SPACE: u64 = 1 << 38;

/// The legacy stream, whose name may also be 0.
pub const LEGACY: u64 = 1;
/// The stream of each thread.
pub const PER_THREAD: u64 = 2;

thread_local! {
    /// Handles of the contexts of this thread; the last one is current. Never dropped, because what a program gives back when
    /// it ends comes after a thread's own values are gone.
    static CURRENT: RefCell<ManuallyDrop<Vec<u64>>> = const { RefCell::new(ManuallyDrop::new(Vec::new())) };
    /// Whether this thread runs a function of the host that a stream calls.
    static IN_CALL: Cell<bool> = const { Cell::new(false) };
}

/// A new handle: never given twice, and nobody's address.
fn handle() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0xc0da_0000);
    NEXT.fetch_add(16, Ordering::Relaxed)
}

/// After cuInit.
pub struct Driver {
    /// The machine.
    pub settings: Settings,
    contexts: BTreeMap<u64, Context>,
    /// Primary contexts by device.
    primary: BTreeMap<i32, u64>,
    /// How many contexts there have been.
    made: u64,
}

/// A context.
pub struct Context {
    /// Its device.
    pub device: i32,
    handle: u64,
    retained: u32,
    gpu: Gpu,
    settings: Settings,
    memory: BTreeMap<u64, Block>,
    /// How many allocations there have been.
    allocated: u64,
    modules: BTreeMap<u64, Loaded>,
    functions: HashMap<u64, Arc<Function>>,
    /// Dynamic shared memory that functions may have, where it was set.
    dynamic: HashMap<u64, u32>,
    /// Kernels whose clusters may be larger than those that every device has.
    large_clusters: HashSet<u64>,
    streams: BTreeMap<u64, Stream>,
    /// The threads' own streams.
    of_threads: HashMap<ThreadId, u64>,
    /// Number of the last work of any stream.
    issued: u64,
    captures: HashMap<u64, Capture>,
    events: BTreeMap<u64, Event>,
    /// Events that streams have waited for.
    waited_for: Vec<u64>,
    graphs: BTreeMap<u64, Vec<Work>>,
    executables: BTreeMap<u64, Arc<[Work]>>,
    /// A kernel failed: nothing works from there on.
    failed: Option<Code>,
}

/// The version of the driver where the environment says none, for who loads this library in a runtime's place.
pub fn set_default_version(version: (i32, i32)) {
    *VERSION.lock().unwrap_or_else(PoisonError::into_inner) = version;
}

/// The version of the driver: major and minor.
pub fn version() -> Result<(i32, i32), Code> {
    let default = *VERSION.lock().unwrap_or_else(PoisonError::into_inner);
    Settings::read(default).map(|settings| settings.version).map_err(|_| Code::INVALID_VALUE)
}

/// cuInit.
pub fn init() -> Result<(), Code> {
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    if driver.is_none() {
        let default = *VERSION.lock().unwrap_or_else(PoisonError::into_inner);
        let settings = Settings::read(default).map_err(|message| {
            say(&message);
            Code::INVALID_VALUE
        })?;
        *driver = Some(Driver { settings, contexts: BTreeMap::new(), primary: BTreeMap::new(), made: 0 });
    }
    match driver.as_ref().map(|d| (d.settings.init, d.settings.devices)) {
        Some((code @ 1.., _)) => Err(Code(code)),
        Some((_, 0)) => Err(Code::NO_DEVICE),
        _ => Ok(()),
    }
}

/// How many calls there have been.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// From now on, work that waits to run begins to run by itself when the program has made no call for this long: a program may
/// wait for work without a call, such as for what a function of the host says or a kernel writes to managed memory.
pub fn go_on_after(patience: Duration) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        std::thread::spawn(move || {
            loop {
                let before = CALLS.load(Ordering::Relaxed);
                std::thread::sleep(patience);
                // Its own calls are none of the program's, and work runs piece by piece, so that calls come between.
                while CALLS.load(Ordering::Relaxed) == before {
                    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
                    let contexts = driver.iter_mut().flat_map(|driver| driver.contexts.values_mut());
                    if !contexts.into_iter().any(|context| context.go_on()) {
                        break;
                    }
                }
            }
        });
    });
}

/// Calls `f` with the driver.
pub fn with<T>(f: impl FnOnce(&mut Driver) -> Result<T, Code>) -> Result<T, Code> {
    // The thread that runs a function of the host holds the lock.
    if IN_CALL.get() {
        say("a function of the host that a stream calls may not call CUDA");
        return Err(Code::NOT_PERMITTED);
    }
    CALLS.fetch_add(1, Ordering::Relaxed);
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    f(driver.as_mut().ok_or(Code::NOT_INITIALIZED)?)
}

/// Calls `f` with this thread's context, unless a kernel failed in it.
pub fn with_context<T>(f: impl FnOnce(&mut Context) -> Result<T, Code>) -> Result<T, Code> {
    with(|driver| {
        let context = driver.contexts.get_mut(&current()).ok_or(Code::INVALID_CONTEXT)?;
        match context.failed {
            Some(code) => Err(code),
            None => f(context),
        }
    })
}

/// The handle of this thread's context; 0 for none.
pub fn current() -> u64 {
    CURRENT.with_borrow(|all| all.last().copied().unwrap_or(0))
}

/// cuCtxSetCurrent; 0 for none.
pub fn set_current(context: u64) -> Result<(), Code> {
    with(|driver| {
        if context != 0 && !driver.contexts.contains_key(&context) {
            return Err(Code::INVALID_CONTEXT);
        }
        CURRENT.with_borrow_mut(|all| {
            all.pop();
            all.extend((context != 0).then_some(context));
        });
        Ok(())
    })
}

/// cuCtxPushCurrent.
pub fn push_current(context: u64) -> Result<(), Code> {
    with(|driver| {
        if !driver.contexts.contains_key(&context) {
            return Err(Code::INVALID_CONTEXT);
        }
        CURRENT.with_borrow_mut(|all| all.push(context));
        Ok(())
    })
}

/// cuCtxPopCurrent: the context that was current.
pub fn pop_current() -> Result<u64, Code> {
    with(|_| CURRENT.with_borrow_mut(|all| all.pop()).ok_or(Code::INVALID_CONTEXT))
}

impl Driver {
    /// Whether there is such a device.
    pub fn device(&self, ordinal: i32) -> Result<i32, Code> {
        let known = (0..self.settings.devices).contains(&ordinal);
        if known { Ok(ordinal) } else { Err(Code::INVALID_DEVICE) }
    }

    /// An attribute of a device, by the driver's number (CUdevice_attribute).
    pub fn attribute(&self, which: u32, device: i32) -> Result<i32, Code> {
        let (threads, shared, blocks) = self.settings.multiprocessor();
        Ok(match which {
            1..=3 => 1024,                      // MAX_THREADS_PER_BLOCK, MAX_BLOCK_DIM_X, _Y
            4 => 64,                            // MAX_BLOCK_DIM_Z
            5 | 11 => i32::MAX,                 // MAX_GRID_DIM_X, MAX_PITCH
            6 | 7 => 65_535,                    // MAX_GRID_DIM_Y, _Z
            8 => module::SHARED_UNASKED as i32, // MAX_SHARED_MEMORY_PER_BLOCK
            9 => 65_536,                        // TOTAL_CONSTANT_MEMORY
            10 => 32,                           // WARP_SIZE
            12 | 82 => 65_536,                  // MAX_REGISTERS_PER_BLOCK, _PER_MULTIPROCESSOR
            // Nothing here has a clock or a bus: round numbers, so that programs can divide by them.
            13 | 36 => 1_000_000,                // CLOCK_RATE, MEMORY_CLOCK_RATE
            37 => 1024,                          // GLOBAL_MEMORY_BUS_WIDTH
            38 => 40 << 20,                      // L2_CACHE_SIZE
            14 | 30 => 512,                      // TEXTURE_ALIGNMENT, SURFACE_ALIGNMENT
            51 => 32,                            // TEXTURE_PITCH_ALIGNMENT
            15 | 19 | 31 | 41 => 1, // GPU_OVERLAP, CAN_MAP_HOST_MEMORY, CONCURRENT_KERNELS, UNIFIED_ADDRESSING
            16 => self.settings.multiprocessors, // MULTIPROCESSOR_COUNT
            33 => device + 1,       // PCI_BUS_ID
            39 => threads as i32,   // MAX_THREADS_PER_MULTIPROCESSOR
            40 => 2,                // ASYNC_ENGINE_COUNT
            75 => self.settings.capability.0, // COMPUTE_CAPABILITY_MAJOR
            76 => self.settings.capability.1, // COMPUTE_CAPABILITY_MINOR
            78..=80 => 1, // STREAM_PRIORITIES_SUPPORTED, GLOBAL_L1_CACHE_SUPPORTED, LOCAL_L1_CACHE_SUPPORTED
            81 => shared as i32, // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
            83 | 89 | 90 => 1, // MANAGED_MEMORY, CONCURRENT_MANAGED_ACCESS, COMPUTE_PREEMPTION_SUPPORTED
            87 => 2,      // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
            95 | 99 | 115 => 1, // COOPERATIVE_LAUNCH, HOST_REGISTER_SUPPORTED, MEMORY_POOLS_SUPPORTED
            97 => self.settings.shared as i32, // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            106 => blocks as i32, // MAX_BLOCKS_PER_MULTIPROCESSOR
            111 => 1 << 10, // RESERVED_SHARED_MEMORY_PER_BLOCK
            131 | 134 => -1, // NUMA_ID, HOST_NUMA_ID
            120 | 127 => i32::from(self.settings.capability >= (9, 0)), // CLUSTER_LAUNCH, TENSOR_MAP_ACCESS_SUPPORTED
            // What it has not: textures and surfaces, peers, virtual memory management, and what is newer.
            17..=148 => 0,
            _ => return Err(Code::INVALID_VALUE),
        })
    }

    fn make(&mut self, device: i32) -> u64 {
        let context = Context::new(&self.settings, device, self.made);
        self.made += 1;
        let name = context.handle;
        self.contexts.insert(name, context);
        name
    }

    /// cuCtxCreate: the context's handle, current from now on.
    pub fn create(&mut self, device: i32) -> Result<u64, Code> {
        let device = self.device(device)?;
        let name = self.make(device);
        CURRENT.with_borrow_mut(|all| all.push(name));
        Ok(name)
    }

    /// cuCtxDestroy.
    pub fn destroy(&mut self, context: u64) -> Result<(), Code> {
        if self.primary.values().any(|primary| *primary == context) {
            return Err(Code::INVALID_CONTEXT);
        }
        self.contexts.remove(&context).ok_or(Code::INVALID_CONTEXT)?;
        CURRENT.with_borrow_mut(|all| all.retain(|one| *one != context));
        Ok(())
    }

    /// cuDevicePrimaryCtxRetain: the context's handle.
    pub fn retain(&mut self, device: i32) -> Result<u64, Code> {
        let device = self.device(device)?;
        let name = match self.primary.get(&device) {
            Some(name) => *name,
            None => self.make(device),
        };
        self.primary.insert(device, name);
        self.contexts.get_mut(&name).ok_or(Code::UNKNOWN)?.retained += 1;
        Ok(name)
    }

    /// cuDevicePrimaryCtxRelease: the last one ends the context and all in it.
    pub fn release(&mut self, device: i32) -> Result<(), Code> {
        let name = *self.primary.get(&device).ok_or(Code::INVALID_CONTEXT)?;
        let context = self.contexts.get_mut(&name).ok_or(Code::UNKNOWN)?;
        context.retained -= 1;
        if context.retained == 0 {
            self.reset(device)?;
        }
        Ok(())
    }

    /// cuDevicePrimaryCtxReset: the context ends, whoever has retained it.
    pub fn reset(&mut self, device: i32) -> Result<(), Code> {
        self.device(device)?;
        if let Some(name) = self.primary.remove(&device) {
            self.contexts.remove(&name);
        }
        Ok(())
    }

    /// cuDevicePrimaryCtxGetState: whether the context exists.
    pub fn is_active(&self, device: i32) -> Result<bool, Code> {
        Ok(self.primary.contains_key(&self.device(device)?))
    }

    /// The device of a context.
    pub fn device_of(&self, context: u64) -> Result<i32, Code> {
        self.contexts.get(&context).map(|c| c.device).ok_or(Code::INVALID_CONTEXT)
    }

    /// All contexts.
    pub fn contexts_mut(&mut self) -> impl Iterator<Item = &mut Context> {
        self.contexts.values_mut()
    }

    /// The context in whose memory an address of the device lies.
    pub fn owner(&mut self, address: u64) -> Option<&mut Context> {
        self.contexts.values_mut().find(|context| context.on_device(address))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let count = |which: &dyn Fn(Kind) -> bool| self.memory.values().filter(|b| which(b.kind)).count();
        let named = |stream: &&u64| **stream != LEGACY && !self.of_threads.values().any(|own| own == *stream);
        let left = [
            ("allocations", count(&|kind| matches!(kind, Kind::Device | Kind::Managed))),
            ("page-locked buffers", count(&|kind| matches!(kind, Kind::Locked | Kind::Registered(_)))),
            ("modules", self.modules.len()),
            ("streams", self.streams.keys().filter(named).count()),
            ("events", self.events.len()),
            ("graphs", self.graphs.len() + self.executables.len()),
        ];
        let left: Vec<String> =
            left.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
        if !left.is_empty() {
            say(&format!("a context ends with {}", left.join(", ")));
        }
        for (address, block) in std::mem::take(&mut self.memory) {
            // What lies over pages of the host's must not be used any more before these go.
            let _ = self.gpu.free(DevicePtr(address));
            if matches!(block.kind, Kind::Managed | Kind::Locked | Kind::ManagedVariable) {
                memory::unmap(address, block.bytes);
            }
        }
    }
}

impl Context {
    fn new(settings: &Settings, device: i32, number: u64) -> Self {
        let checks = if settings.checks { Checks::ALL } else { Checks::NONE };
        let options = Options {
            checks,
            counters: false,
            memory: settings.memory,
            shared: settings.shared,
            multiprocessors: settings.multiprocessors as u32,
            mma: settings.mma,
            ..Options::default()
        };
        let mut gpu = Gpu::new(options);
        // Addresses tell whose memory it is, for as many contexts as there is room for.
        gpu.begin_at(number % 60 * CONTEXT_SPACE);
        Self {
            device,
            handle: handle(),
            retained: 0,
            gpu,
            settings: settings.clone(),
            memory: BTreeMap::new(),
            allocated: 0,
            modules: BTreeMap::new(),
            functions: HashMap::new(),
            dynamic: HashMap::new(),
            large_clusters: HashSet::new(),
            streams: BTreeMap::from([(LEGACY, Stream::new(true, 0))]),
            of_threads: HashMap::new(),
            issued: 0,
            captures: HashMap::new(),
            events: BTreeMap::new(),
            waited_for: Vec::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            failed: None,
        }
    }

    /// Its handle.
    pub fn handle(&self) -> u64 {
        self.handle
    }

    /// The machine.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    // ---------------------------------------------------------------------------------------------------- running

    /// Runs a piece of work.
    fn run(&mut self, work: &Work, serial: u64) -> Result<(), Code> {
        match work {
            Work::Copy(to, from, extent) => work::copy(&mut self.gpu, to, from, *extent),
            Work::Fill(to, pattern, row, extent) => work::fill(&mut self.gpu, *to, pattern, *row, *extent),
            Work::Launch(function, ..) if self.settings.fault.as_ref() == Some(&function.name) => {
                say(&format!("launch of {}: it fails because VCUDA_FAULT names it", function.name));
                Err(Code::ILLEGAL_ADDRESS)
            }
            Work::Launch(function, shape, args) => self.run_kernel(function, shape, args),
            Work::Record(event) => {
                if let Some(event) = self.events.get_mut(event) {
                    event.passed = Some((serial, Instant::now()));
                }
                Ok(())
            }
            Work::After(..) => Ok(()),
            Work::Call(call, data) => {
                let data = std::ptr::with_exposed_provenance_mut(*data);
                IN_CALL.set(true);
                match call {
                    // SAFETY: a function and an argument of the program's, as the driver's documentation says of them.
                    Call::Plain(f) => unsafe { f(data) },
                    Call::Callback(f, stream) => {
                        let stream = std::ptr::without_provenance_mut(*stream as usize);
                        // SAFETY: as above.
                        unsafe { f(stream, 0, data) };
                    }
                }
                IN_CALL.set(false);
                Ok(())
            }
            Work::Free(address) => self.forget(*address),
            Work::Graph(_, steps) => steps.iter().try_for_each(|step| self.run(step, serial)),
        }
    }

    fn run_kernel(
        &mut self,
        function: &Function,
        shape: &ptxvm::Launch,
        args: &[Vec<u8>],
    ) -> Result<(), Code> {
        let named = work::demangled(&function.name);
        let Some(module) = self.modules.get_mut(&function.owner) else {
            say(&format!("launch of {named}: its module is unloaded"));
            return Err(Code::INVALID_HANDLE);
        };
        // Constants are what was copied to them.
        for (name, at, bytes) in &module.constants {
            let mut data = vec![0; *bytes];
            let read = self.gpu.read(DevicePtr(*at), &mut data);
            let done = read.and_then(|()| self.gpu.write_constant(&mut module.loaded, name, &data));
            done.map_err(|e| work::failed("constants", &e))?;
        }
        let args: Vec<Arg> = args.iter().map(|bytes| Arg::Bytes(bytes.clone())).collect();
        let run = self.gpu.launch(&module.loaded, &function.name, shape, &args);
        print(self.gpu.printed());
        let notes = |report: ptxvm::Report| {
            report.notes.iter().for_each(|note| say(&format!("a note on the launch of {named}: {note}")));
        };
        run.map(notes).map_err(|mut e| {
            if let ptxvm::Error::Fault(findings) | ptxvm::Error::Unsupported(findings) = &mut e {
                findings.iter_mut().for_each(|f| f.kernel = work::demangled(&f.kernel));
            }
            work::failed(&format!("launch of {named}"), &e)
        })
    }
}

/// Prints what a kernel printed, in its place among what the program prints through C's library.
fn print(text: &str) {
    if text.is_empty() {
        return;
    }
    let _ = std::io::stdout().flush();
    let clean: Vec<u8> = text.bytes().filter(|b| *b != 0).collect();
    if let Ok(text) = CString::new(clean) {
        // SAFETY: both texts end with a zero, and the format takes one.
        unsafe { libc::printf(c"%s".as_ptr(), text.as_ptr()) };
    }
}
