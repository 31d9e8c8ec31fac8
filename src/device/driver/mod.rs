//! A real GPU, through the CUDA driver. The driver's library is looked for when the first [`Gpu`] is opened: the
//! program starts on machines without one, and says what is missing when it is asked for a GPU.
//!
//! - One stream: work runs in the order in which it was asked for. Only copies between page-locked memory that the caller
//!   holds and the GPU have two more, one for each direction of the bus, with events between them ([`Lane`]).
//! - A module is machine code where there is some for the GPU that the driver takes. Else its PTX becomes machine code
//!   when it is loaded. The driver keeps that in its cache (`~/.nv/ComputeCache`), so that only the first start on a
//!   machine takes long.
//! - Memory comes from an [`Arena`], so that loops do not call the driver's allocator. What is freed may still be in
//!   use by work under way; what takes its place runs later, in the same stream.
//! - Host memory reaches the device through page-locked buffers: the caller may reuse its bytes at once, and a
//!   checkpoint's pages are read while earlier ones are on their way.
//! - [`Device::begin_read`] copies into page-locked memory, so that the host need not wait there and then.
//! - A sequence ([`Device::begin_sequence`]) that comes again is recorded as a CUDA graph and replayed. While one is
//!   collected, work is held back, so a table for a later launch may be written ahead of earlier ones; to keep that
//!   harmless, small memory that is freed meanwhile is used again only after the sequence.
//! - From compute capability 9.0 on a kernel's blocks take their places while the kernel before it still runs
//!   ([`mod@dependent`]).
//! - A kernel that fails is noticed by whatever waits for it, so the message of such an error names the launches before.
//! - With [`EXACT_ALLOC`] in the environment every allocation is one of the driver's, for tools that watch memory.
//!
//! Everything here runs in the tests, on a virtual GPU behind the driver's functions (`tools/vcuda`). No real GPU has
//! run it yet, so its speed, and what graphs gain, is not known.

mod lanes;
mod memory;
mod messages;
mod staging;
mod work;

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::{env, ptr};

use serde::Serialize;

use messages::{advice, check, is_fault, told};
use staging::{Landing, Staging};

use super::arena::{Arena, SMALL};
use super::dependent::{self, dependent};
use super::sequence::{Recordings, Step, Steps, Verdict};
use super::sys::{self, CUresult, Missing};
use super::{Arg, Cubin, Device, DeviceError, HostPtr, Kernel, Lane, Launch, MARKS, Ptr, Reading};

/// The oldest GPUs that the kernels run on: compute capability 8.0, Ampere.
const MIN_CAPABILITY: (i32, i32) = (8, 0);
/// Shared memory, static and dynamic, that a block may have without asking.
const SHARED_UNASKED: u32 = 48 << 10;
/// Page-locked memory: its parts, which are filled one after the other, and their size.
const STAGING_PARTS: usize = 4;
const STAGING_PART: usize = 8 << 20;
/// The largest read, in bytes, that goes directly to the caller's memory.
const MAX_DIRECT: usize = 256 << 10;
/// The least size of a [`Landing`]: a page.
const MIN_LANDING: usize = 4 << 10;
/// Size of the buffer for the log of the driver's compiler.
const LOG_BYTES: usize = 8 << 10;
/// CU_STREAM_NON_BLOCKING: no hidden order with the legacy stream.
const NON_BLOCKING: u32 = 1;
/// CU_EVENT_DISABLE_TIMING: cheaper to record.
const NO_TIMING: u32 = 2;

/// The number of launches that an error's message names.
const REMEMBERED: usize = 16;

/// The first CUDA version whose graphs keep programmatic dependencies between kernels.
const DEPENDENTS_IN_GRAPHS: (i32, i32) = (12, 3);

/// Environment variable: set to 0, a kernel is launched when the one before it has ended, on all GPUs.
pub const DEPENDENT_LAUNCH: &str = "BON_GPU_DEPENDENT_LAUNCH";

/// Environment variable: set to 1, every allocation is one of the driver's, of the exact size, and goes back to it when
/// it is freed. compute-sanitizer then sees each tensor's bounds, and what nobody wrote; nothing is replayed, and
/// allocations are slow.
pub const EXACT_ALLOC: &str = "BON_GPU_EXACT_ALLOC";

/// A GPU that the driver knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Its number: `cuda:<ordinal>`. CUDA counts the fastest first; with CUDA_DEVICE_ORDER=PCI_BUS_ID, as `nvidia-smi`.
    pub ordinal: usize,
    /// As NVIDIA calls it.
    pub name: String,
    /// Bytes of memory.
    pub memory: u64,
    /// Compute capability, as in (8, 0).
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Whether the kernels run on it.
    pub usable: bool,
    /// The newest CUDA that the driver knows, as in (12, 4).
    pub driver: (i32, i32),
}

/// Whether the machine has a CUDA driver, whatever that says.
pub fn installed() -> bool {
    sys::load() != Err(Missing::Library)
}

/// All GPUs, or why there is none.
pub fn gpus() -> Result<Vec<Description>, DeviceError> {
    init()?;
    let driver = version()?;
    let mut count = 0;
    // SAFETY: the driver is there and initialised; the pointer is to a local.
    check("cuda", "count GPUs", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    (0..usize::try_from(count).unwrap_or(0)).map(|ordinal| describe(ordinal, driver)).collect()
}

/// A GPU as a [`Device`].
#[derive(Debug)]
pub struct Gpu {
    name: String,
    multiprocessors: u32,
    state: Mutex<State>,
}

/// What the driver did, for tests and benchmarks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernels and fills that were launched one by one.
    pub single: u64,
    /// Sequences that were recorded as graphs.
    pub recorded: u64,
    /// Sequences that ran as graphs.
    pub replayed: u64,
    /// Calls of the driver's allocator.
    pub allocations: u64,
    /// Sequences that the driver could not record or replay; they ran step by step, and so did all after them.
    pub refused: u64,
}

/// Memory of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes that tensors and tables take up.
    pub used: u64,
    /// The most there were since the start, or since [`Gpu::reset_peak`].
    pub peak: u64,
    /// Bytes that are held of the driver.
    pub held: u64,
    /// Bytes that the driver has left, for us and others.
    pub free: u64,
    /// Bytes of the device.
    pub total: u64,
}

impl MemoryUse {
    /// Bytes that allocations may still take, though not in one range.
    pub fn available(&self) -> u64 {
        self.free + self.held - self.used
    }
}

/// What a kernel takes, as the driver has it of the machine code that it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Resources {
    /// The entry point.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread: what registers were written to, and arrays that have no registers.
    pub local: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// The architecture of the machine code, as in (8, 0).
    pub code: (u32, u32),
}

/// A sequence that was recorded.
#[derive(Debug)]
struct Graph {
    executable: sys::CUgraphExec,
    /// Its last launches, to be remembered when it is replayed.
    last: Vec<Launched>,
}

/// A launch that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Launched {
    /// Index of the kernel among the loaded ones.
    kernel: usize,
    shape: Launch,
}

#[derive(Debug)]
struct State {
    name: String,
    description: Description,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Those of [`Lane::In`] and [`Lane::Out`], once they are used.
    lanes: [sys::CUstream; 2],
    /// By mark, once it is used.
    marks: [sys::CUevent; MARKS],
    /// Page-locked memory that the caller holds.
    host: HashSet<u64>,
    /// Most shared memory of a block, static and dynamic.
    shared: u32,
    arena: Arena,
    /// Whether every allocation is one of the driver's ([`EXACT_ALLOC`]).
    exact: bool,
    /// Whether kernels begin before those ahead of them have ended ([`mod@dependent`]).
    dependent: bool,
    staging: Staging,
    landings: Vec<Landing>,
    modules: Vec<sys::CUmodule>,
    kernels: Vec<Function>,
    sequence: Option<Sequence>,
    recordings: Recordings<Graph>,
    /// The last launches, the oldest first.
    launched: VecDeque<Launched>,
    counts: Counts,
}

// SAFETY: the handles are used under the mutex alone, with the context made current on the thread that does.
unsafe impl Send for State {}

#[derive(Debug)]
struct Function {
    handle: sys::CUfunction,
    name: String,
    /// Static shared memory of a block, and dynamic that it may have.
    fixed: u32,
    dynamic: u32,
}

/// Work between begin and end.
#[derive(Debug, Default)]
struct Sequence {
    /// Held back.
    steps: Steps,
    /// Small allocations of this sequence: how many steps there were when it was made.
    fresh: HashMap<u64, usize>,
    /// Small memory freed meanwhile: steps that are held back may use it.
    freed: Vec<u64>,
}

/// Finds and initialises the driver, once.
fn init() -> Result<(), DeviceError> {
    static DONE: OnceLock<Result<(), DeviceError>> = OnceLock::new();
    let start = || {
        sys::load().map_err(|missing| {
            let message = match missing {
                Missing::Library => "no CUDA driver: libcuda.so.1 is not on this machine; install NVIDIA's driver, \
                                     start a container with its GPUs (`docker run --gpus all`), or use --device cpu"
                    .to_owned(),
                Missing::Function(name) => format!(
                    "the CUDA driver is too old: it has no {name}; install one of CUDA 11.4 (R470) or newer, or use \
                     --device cpu"
                ),
            };
            DeviceError::new("cuda", message)
        })?;
        // SAFETY: the driver was found.
        check("cuda", "start the CUDA driver", unsafe { sys::cuInit(0) })
    };
    DONE.get_or_init(start).clone()
}

fn version() -> Result<(i32, i32), DeviceError> {
    let mut version = 0;
    // SAFETY: the pointer is to a local.
    check("cuda", "ask for the driver's version", unsafe { sys::cuDriverGetVersion(&mut version) })?;
    Ok((version / 1000, version % 1000 / 10))
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, DeviceError> {
    let mut value = 0;
    // SAFETY: the pointer is to a local.
    check("cuda", "ask what a GPU can do", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })?;
    Ok(value)
}

fn handle_of(ordinal: usize) -> Result<sys::CUdevice, DeviceError> {
    let mut device = 0;
    let ordinal = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: the pointer is to a local.
    check("cuda", "find the GPU", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
    Ok(device)
}

fn describe(ordinal: usize, driver: (i32, i32)) -> Result<Description, DeviceError> {
    use sys::CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
    };
    let device = handle_of(ordinal)?;
    let (mut name, mut memory) = ([0 as c_char; 256], 0);
    // SAFETY: the pointers are to locals, the name's with its length; the driver ends it with a zero.
    let name = unsafe {
        check("cuda", "ask for a GPU's name", sys::cuDeviceGetName(name.as_mut_ptr(), 256, device))?;
        check("cuda", "ask for a GPU's memory", sys::cuDeviceTotalMem_v2(&mut memory, device))?;
        CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
    };
    let capability = (attribute(device, MAJOR)?, attribute(device, MINOR)?);
    let multiprocessors = u32::try_from(attribute(device, MULTIPROCESSORS)?).unwrap_or(0).max(1);
    let usable = capability >= MIN_CAPABILITY;
    Ok(Description { ordinal, name, memory: memory as u64, capability, multiprocessors, usable, driver })
}

/// A size for people.
fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / (1u64 << 30) as f64)
}

impl Gpu {
    /// Opens `cuda:<ordinal>`.
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        let known = gpus()?;
        let Some(description) = known.get(ordinal) else {
            let message = match known.len() {
                0 => "the driver sees no GPU: look at `nvidia-smi` and CUDA_VISIBLE_DEVICES, or use --device cpu".into(),
                1 => "there is one GPU, cuda:0".into(),
                n => format!("there are {n} GPUs, cuda:0 to cuda:{}", n - 1),
            };
            return Err(DeviceError::new(format!("cuda:{ordinal}"), message));
        };
        let name = format!("cuda:{ordinal} ({})", description.name);
        if !description.usable {
            let (major, minor) = description.capability;
            let message = format!(
                "this GPU has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or newer; use \
                 another GPU or --device cpu"
            );
            return Err(DeviceError::new(&name, message));
        }
        let state = State::open(name.clone(), description.clone())?;
        Ok(Self { name, multiprocessors: description.multiprocessors, state: Mutex::new(state) })
    }

    /// What it is.
    pub fn description(&self) -> Description {
        self.state().description.clone()
    }

    /// What was done so far.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// How full it is.
    pub fn memory(&self) -> Result<MemoryUse, DeviceError> {
        let state = self.current()?;
        let (free, total) = state.free_and_total()?;
        let arena = &state.arena;
        Ok(MemoryUse { used: arena.used(), peak: arena.peak(), held: arena.held(), free, total })
    }

    /// What the kernels take that were loaded, in that order.
    pub fn resources(&self) -> Result<Vec<Resources>, DeviceError> {
        let state = self.current()?;
        state.kernels.iter().map(|function| state.resources(function)).collect()
    }

    /// The launches since this was last asked, at most the last 16, in their order: the kernel's name, the launch, and
    /// how many of its blocks a multiprocessor holds at once. They are not remembered any more for messages of errors.
    pub fn take_launches(&self) -> Result<Vec<(String, Launch, u32)>, DeviceError> {
        let mut state = self.current()?;
        let launched = std::mem::take(&mut state.launched);
        launched
            .iter()
            .map(|Launched { kernel, shape }| {
                let function = &state.kernels[*kernel];
                Ok((function.name.clone(), *shape, state.blocks(function, shape)?))
            })
            .collect()
    }

    /// Begins to measure [`MemoryUse::peak`] anew.
    pub fn reset_peak(&self) {
        self.state().arena.reset_peak();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, with the context current on this thread.
    fn current(&self) -> Result<MutexGuard<'_, State>, DeviceError> {
        let state = self.state();
        state.make_current()?;
        Ok(state)
    }
}

/// Whether the driver's compiler is to say what it does (see CONTRIBUTING.md): it then gets all PTX, keeps the lines of
/// the source for debuggers and profilers, and its log goes to standard error.
fn tells_compiler() -> bool {
    std::env::var_os("BON_ENGINE_JIT_LOG").is_some_and(|value| !value.is_empty() && value != "0")
}

/// Loads PTX, which ends with a zero, or a cubin into the context that is current on this thread. In vain, the second is
/// what the driver's compiler says of it.
fn load_image(name: &str, image: &[u8]) -> Result<sys::CUmodule, (CUresult, String)> {
    use sys::CUjit_option as Jit;
    let (mut errors, mut log) = (vec![0u8; LOG_BYTES], vec![0u8; LOG_BYTES]);
    // Numbers are passed in the pointers themselves.
    let number = ptr::without_provenance_mut::<c_void>;
    let mut settings = vec![
        (Jit::CU_JIT_ERROR_LOG_BUFFER, errors.as_mut_ptr().cast()),
        (Jit::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, number(LOG_BYTES)),
    ];
    if tells_compiler() {
        settings.extend([
            (Jit::CU_JIT_INFO_LOG_BUFFER, log.as_mut_ptr().cast()),
            (Jit::CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES, number(LOG_BYTES)),
            (Jit::CU_JIT_LOG_VERBOSE, number(1)),
            (Jit::CU_JIT_GENERATE_LINE_INFO, number(1)),
        ]);
    }
    let (mut options, mut values): (Vec<Jit>, Vec<*mut c_void>) = settings.into_iter().unzip();
    let mut module = ptr::null_mut();
    // SAFETY: image, options, values and logs outlive the call; there are as many values as options.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let told = |log: &[u8]| {
        let text = log.split(|byte| *byte == 0).next().map(String::from_utf8_lossy);
        text.unwrap_or_default().trim().to_owned()
    };
    if tells_compiler() {
        // That standard error is closed is no reason to fail.
        let _ = writeln!(std::io::stderr(), "{name}: {}", told(&log));
    }
    if result == CUresult::CUDA_SUCCESS { Ok(module) } else { Err((result, told(&errors))) }
}

impl State {
    fn open(name: String, description: Description) -> Result<Self, DeviceError> {
        let device = handle_of(description.ordinal)?;
        let optin = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared = u32::try_from(attribute(device, optin)?).unwrap_or(0);
        let mut context = ptr::null_mut();
        // SAFETY: the pointer is to a local. Released when the state is dropped.
        check(&name, "open the GPU", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let dependent = description.capability >= dependent::CAPABILITY
            && description.driver >= DEPENDENTS_IN_GRAPHS
            && sys::launches_dependents()
            && env::var_os(DEPENDENT_LAUNCH).is_none_or(|value| value != "0");
        // From here on, dropping gives back whatever is there.
        let mut state = Self {
            name,
            description,
            device,
            context,
            stream: ptr::null_mut(),
            lanes: [ptr::null_mut(); 2],
            marks: [ptr::null_mut(); MARKS],
            host: HashSet::new(),
            shared,
            arena: Arena::default(),
            exact: env::var_os(EXACT_ALLOC).is_some_and(|value| value == "1"),
            dependent,
            staging: Staging {
                memory: ptr::null_mut(),
                events: [ptr::null_mut(); STAGING_PARTS],
                part: 0,
                filled: 0,
            },
            landings: Vec::new(),
            modules: Vec::new(),
            kernels: Vec::new(),
            sequence: None,
            recordings: Recordings::default(),
            launched: VecDeque::with_capacity(REMEMBERED),
            counts: Counts::default(),
        };
        state.make_current()?;
        let mut stream = ptr::null_mut();
        // SAFETY: the context is current and the pointer to a local.
        state.check("make a stream", unsafe { sys::cuStreamCreate(&mut stream, NON_BLOCKING) })?;
        state.stream = stream;
        Ok(state)
    }

    fn check(&self, doing: &str, result: CUresult) -> Result<(), DeviceError> {
        check(&self.name, doing, result).map_err(|mut e| {
            if is_fault(result) {
                e.message.push_str(&self.told_launches());
            }
            e
        })
    }

    /// The last launches, for the message of an error: one of them failed, or one of the graph's that was replayed.
    fn told_launches(&self) -> String {
        if self.launched.is_empty() {
            return String::new();
        }
        let mut told = String::from("; launched before, the latest first:");
        for (i, Launched { kernel, shape }) in self.launched.iter().rev().enumerate() {
            let Launch { grid, block, shared_bytes } = shape;
            let separator = if i == 0 { "" } else { "," };
            let name = &self.kernels[*kernel].name;
            // Writing to a string cannot fail.
            let _ = write!(told, "{separator} {name} with grid {grid:?}, block {block:?}");
            if *shared_bytes > 0 {
                let _ = write!(told, ", {shared_bytes} bytes of shared memory");
            }
        }
        told
    }

    fn remember(&mut self, launched: Launched) {
        if self.launched.len() == REMEMBERED {
            self.launched.pop_front();
        }
        self.launched.push_back(launched);
    }

    fn make_current(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained for as long as `self` lives.
        self.check("use the GPU from this thread", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    fn free_and_total(&self) -> Result<(u64, u64), DeviceError> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to locals.
        self.check("ask for free memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }

    // --------------------------------------------------------------------------------------------------- modules

    /// Looks up the entry points of a module that was just loaded, and keeps it.
    fn enter(
        &mut self,
        module: sys::CUmodule,
        name: &str,
        entries: &[&str],
    ) -> Result<Vec<Kernel>, DeviceError> {
        self.modules.push(module);
        let first = self.kernels.len();
        for entry in entries {
            let wanted = CString::new(*entry)
                .map_err(|_| DeviceError::new(&self.name, format!("the name {entry:?} holds a zero byte")))?;
            let mut handle = ptr::null_mut();
            // SAFETY: the module was just loaded, the name ends with a zero.
            let result = unsafe { sys::cuModuleGetFunction(&mut handle, module, wanted.as_ptr()) };
            self.check(&format!("find the kernel {entry} in {name}"), result)?;
            let mut fixed = 0;
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded, the pointer is to a local.
            let result = unsafe { sys::cuFuncGetAttribute(&mut fixed, which, handle) };
            self.check(&format!("ask what {entry} needs"), result)?;
            let fixed = u32::try_from(fixed).unwrap_or(0);
            let dynamic = SHARED_UNASKED.saturating_sub(fixed);
            self.kernels.push(Function { handle, name: (*entry).to_owned(), fixed, dynamic });
        }
        Ok((first..self.kernels.len()).map(Kernel).collect())
    }

    fn resources(&self, function: &Function) -> Result<Resources, DeviceError> {
        use sys::CUfunction_attribute::{
            CU_FUNC_ATTRIBUTE_BINARY_VERSION as CODE, CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES as LOCAL,
            CU_FUNC_ATTRIBUTE_NUM_REGS as REGISTERS,
        };
        let ask = |which| {
            let mut value = 0;
            // SAFETY: the function is loaded, the pointer is to a local.
            let result = unsafe { sys::cuFuncGetAttribute(&mut value, which, function.handle) };
            self.check(&format!("ask what {} needs", function.name), result)?;
            Ok(u32::try_from(value).unwrap_or(0))
        };
        let code = ask(CODE)?;
        Ok(Resources {
            kernel: function.name.clone(),
            registers: ask(REGISTERS)?,
            local: ask(LOCAL)?,
            shared: function.fixed,
            code: (code / 10, code % 10),
        })
    }

    /// How many blocks of a launch a multiprocessor holds at once.
    fn blocks(&self, function: &Function, shape: &Launch) -> Result<u32, DeviceError> {
        let mut blocks = 0;
        let threads: u32 = shape.block.iter().product();
        let threads = c_int::try_from(threads).unwrap_or(c_int::MAX);
        // SAFETY: the function is loaded, the pointer is to a local.
        let result = unsafe {
            let shared = shape.shared_bytes as usize;
            sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, function.handle, threads, shared)
        };
        self.check(&format!("ask how many blocks of {} run side by side", function.name), result)?;
        Ok(u32::try_from(blocks).unwrap_or(0))
    }

    fn refused_module(&self, name: &str, ptx: &str, result: CUresult, said: &str) -> DeviceError {
        let (major, minor) = self.description.driver;
        let said =
            if said.is_empty() { String::new() } else { format!("; the driver's compiler says: {said}") };
        let message = match result {
            CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => {
                let version =
                    ptx.lines().find_map(|line| line.strip_prefix(".version ")).unwrap_or("?").trim();
                // PTX 7.x came with CUDA 11.x; later the minor versions part, within half a year of each other.
                let needs = match version.split_once('.') {
                    Some(("7", minor)) => format!("CUDA 11.{minor}"),
                    Some(("8", _)) => "CUDA 12".into(),
                    _ => "a newer CUDA".into(),
                };
                format!(
                    "{name} is PTX {version}, and this driver knows CUDA {major}.{minor}; install a driver of {needs} \
                     or newer, or use --device cpu{said}"
                )
            }
            CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND => format!(
                "the driver's PTX compiler is missing: install libnvidia-ptxjitcompiler.so.1, a part of the driver of \
                 CUDA {major}.{minor}, or use --device cpu"
            ),
            CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED => {
                "compiling PTX is switched off: unset CUDA_DISABLE_PTX_JIT".into()
            }
            _ => format!("cannot load {name}: {}{}{said}", told(result), advice(result)),
        };
        DeviceError::new(&self.name, message)
    }

    // ---------------------------------------------------------------------------------------------------- memory
}

impl Drop for State {
    fn drop(&mut self) {
        // Errors have been returned before, or no longer matter to anybody.
        // SAFETY: all handles are ours, each is given back once, and none is used by work under way.
        unsafe {
            if sys::cuCtxSetCurrent(self.context) == CUresult::CUDA_SUCCESS {
                for stream in [self.stream].into_iter().chain(self.lanes).filter(|stream| !stream.is_null()) {
                    sys::cuStreamSynchronize(stream);
                }
                for stream in self.lanes.iter().filter(|stream| !stream.is_null()) {
                    sys::cuStreamDestroy_v2(*stream);
                }
                for event in self.marks.iter().filter(|event| !event.is_null()) {
                    sys::cuEventDestroy_v2(*event);
                }
                for host in self.host.drain() {
                    sys::cuMemFreeHost(lanes::pointer(HostPtr(host)));
                }
                for graph in self.recordings.drain() {
                    sys::cuGraphExecDestroy(graph.executable);
                }
                for event in self.staging.events.iter().filter(|event| !event.is_null()) {
                    sys::cuEventDestroy_v2(*event);
                }
                if !self.staging.memory.is_null() {
                    sys::cuMemFreeHost(self.staging.memory.cast());
                }
                for landing in self.landings.drain(..) {
                    if !landing.event.is_null() {
                        sys::cuEventDestroy_v2(landing.event);
                    }
                    sys::cuMemFreeHost(landing.memory.cast());
                }
                for base in self.arena.drain() {
                    sys::cuMemFree_v2(base);
                }
                for module in self.modules.drain(..) {
                    sys::cuModuleUnload(module);
                }
                if !self.stream.is_null() {
                    sys::cuStreamDestroy_v2(self.stream);
                }
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

/// Two events, given back when dropped.
struct Stopwatch([sys::CUevent; 2]);

impl Drop for Stopwatch {
    fn drop(&mut self) {
        for event in self.0.iter().filter(|event| !event.is_null()) {
            // SAFETY: the event is ours.
            unsafe { sys::cuEventDestroy_v2(*event) };
        }
    }
}

impl Device for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn model(&self) -> String {
        format!("cuda ({})", self.state().description.name)
    }

    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn load(&self, name: &str, ptx: &str, entries: &[&str]) -> Result<Vec<Kernel>, DeviceError> {
        // The driver compiles with the context current on this thread, and without our lock: other modules meanwhile, on
        // other threads.
        let waits = self.current()?.description.capability >= dependent::CAPABILITY;
        let ptx = if waits { &dependent(ptx) } else { ptx };
        let text = CString::new(ptx)
            .map_err(|_| DeviceError::new(&self.name, format!("{name} holds a zero byte")))?;
        let loaded = load_image(name, text.as_bytes_with_nul());
        let mut state = self.state();
        let module = loaded.map_err(|(result, said)| state.refused_module(name, ptx, result, &said))?;
        state.enter(module, name, entries)
    }

    fn load_cubin(
        &self,
        name: &str,
        cubins: &[Cubin],
        entries: &[&str],
    ) -> Result<Option<Vec<Kernel>>, DeviceError> {
        let mut state = self.current()?;
        let Description { capability, driver, .. } = state.description;
        let fitting = Cubin::fitting(cubins, capability, driver).filter(|_| !tells_compiler());
        // A driver that refuses it says so again of the PTX, if the reason is another.
        let module = fitting.and_then(|cubin| load_image(name, cubin.image).ok());
        module.map(|module| state.enter(module, name, entries)).transpose()
    }

    fn alloc(&self, bytes: usize) -> Result<Ptr, DeviceError> {
        self.current()?.alloc(bytes)
    }

    fn free(&self, ptr: Ptr) {
        let mut state = self.state();
        // Only then does the driver hear of it. An error of its is told by the next call.
        if state.exact {
            let _ = state.make_current();
        }
        state.free(ptr.0);
    }

    fn write(&self, dst: Ptr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.current()?.write(dst.0, bytes)
    }

    fn read(&self, src: Ptr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.current()?.read(src.0, bytes)
    }

    fn begin_read(&self, src: Ptr, bytes: usize) -> Result<Reading, DeviceError> {
        self.current()?.begin_read(src.0, bytes)
    }

    fn end_read(&self, reading: Reading) -> Result<Vec<u8>, DeviceError> {
        self.current()?.end_read(reading)
    }

    fn fill(&self, dst: Ptr, value: u8, bytes: usize) -> Result<(), DeviceError> {
        self.current()?.ask(Step::Fill(dst, value, bytes))
    }

    fn launch(&self, kernel: Kernel, launch: &Launch, args: &[Arg]) -> Result<(), DeviceError> {
        if let Some(sequence) = &mut self.state().sequence {
            sequence.steps.launch(kernel, launch, args);
            return Ok(());
        }
        let mut state = self.current()?;
        state.counts.single += 1;
        state.launch(kernel, launch, args)
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        self.current()?.synchronize()
    }

    fn available(&self) -> Result<Option<u64>, DeviceError> {
        Ok(Some(self.memory()?.available()))
    }

    fn host_alloc(&self, bytes: usize) -> Result<HostPtr, DeviceError> {
        self.current()?.host_alloc(bytes)
    }

    fn host_free(&self, ptr: HostPtr) {
        // An error has been returned before, or the next call returns it.
        let _ = self.current().and_then(|mut state| state.host_free(ptr));
    }

    fn host_mapped(&self, ptr: HostPtr) -> Result<Ptr, DeviceError> {
        self.current()?.host_mapped(ptr)
    }

    fn host_write(&self, dst: HostPtr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.current()?.host_write(dst, bytes)
    }

    fn host_read(&self, src: HostPtr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.current()?.host_read(src, bytes)
    }

    fn copy_in(&self, dst: Ptr, src: HostPtr, bytes: usize) -> Result<(), DeviceError> {
        self.current()?.copy_in(dst, src, bytes)
    }

    fn copy_out(&self, dst: HostPtr, src: Ptr, bytes: usize) -> Result<(), DeviceError> {
        self.current()?.copy_out(dst, src, bytes)
    }

    fn mark(&self, lane: Lane, mark: usize) -> Result<(), DeviceError> {
        self.current()?.mark(lane, mark)
    }

    fn wait_for(&self, lane: Lane, mark: usize) -> Result<(), DeviceError> {
        self.current()?.wait_for(lane, mark)
    }

    fn begin_sequence(&self) -> Result<(), DeviceError> {
        self.current()?.begin_sequence()
    }

    fn end_sequence(&self) -> Result<(), DeviceError> {
        self.current()?.end_sequence()
    }

    fn timed(&self, f: &mut dyn FnMut()) -> Result<f64, DeviceError> {
        let mut watch = Stopwatch([ptr::null_mut(); 2]);
        let mark = |state: &mut State, event| {
            state.submit()?;
            // SAFETY: event and stream exist.
            state.check("mark a time", unsafe { sys::cuEventRecord(event, state.stream) })
        };
        let mut state = self.current()?;
        for event in &mut watch.0 {
            // SAFETY: the pointer is to a local.
            state.check("make an event", unsafe { sys::cuEventCreate(event, 0) })?;
        }
        mark(&mut state, watch.0[0])?;
        // `f` asks this device for work.
        drop(state);
        f();
        let mut state = self.current()?;
        mark(&mut state, watch.0[1])?;
        state.wait()?;
        let mut milliseconds = 0.0;
        // SAFETY: both events were recorded and have passed; the pointer is to a local.
        let result = unsafe { sys::cuEventElapsedTime(&mut milliseconds, watch.0[0], watch.0[1]) };
        state.check("read the time", result)?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}
