//! Devices, contexts, and everything with a handle.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

use ptxvm::error::ErrorKind;
use ptxvm::{Checks, DevicePtr, Error, Gpu, Launch, LoadedModule, Module, Options};

use crate::code::{Code, say};
use crate::settings::{Graphs, Settings};
use crate::work::{Function, Host, Work};

/// Dynamic and static shared memory that a block may have without asking for more.
const SHARED_UNASKED: u32 = 48 << 10;
/// Bytes before the sections of a 64-bit ELF file.
pub const ELF_HEADER: usize = 64;
/// Alignment of page-locked memory.
const PAGE: usize = 4096;

/// The driver of this process.
static DRIVER: Mutex<Option<Driver>> = Mutex::new(None);

thread_local! {
    /// Handle of the context that is current on this thread; 0 for none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
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
    /// Primary contexts by device.
    contexts: BTreeMap<i32, Context>,
}

/// Whether an entry point's text runs `griddepcontrol.wait` before it uses memory, other than its parameters, or leaves the
/// straight way; and has no load (`ld.global.nc`) that an assembler may move ahead of that.
fn waits(ptx: &str, entry: &str) -> bool {
    let body = ptx.split_once(&format!(".entry {entry}(")).and_then(|(_, rest)| rest.split_once('{'));
    let whole = body.and_then(|(_, body)| body.split("\n}").next());
    if whole.is_some_and(|body| body.contains("ld.global.nc")) {
        return false;
    }
    let early = |line: &str| {
        let words = line.split(|c: char| c.is_whitespace() || ";.".contains(c));
        let uses = line.contains('[') && !line.trim_start().starts_with("ld.param");
        uses || words.into_iter().any(|word| ["bra", "brx", "call", "ret", "exit"].contains(&word))
    };
    let mut lines = body.map_or("", |(_, body)| body).lines();
    lines
        .find_map(|line| {
            if line.contains("griddepcontrol.wait") { Some(true) } else { early(line).then_some(false) }
        })
        .unwrap_or(false)
}

struct Stream {
    queue: VecDeque<Work>,
    capture: Option<Capture>,
}

struct Capture {
    steps: Vec<Work>,
    broken: bool,
    thread: ThreadId,
    /// Whether calls that could break it are forbidden to all threads, not to its own alone.
    global: bool,
}

struct Event {
    timing: bool,
    /// Number of the last recording; 0 for none.
    recorded: u64,
    /// The stream it was recorded in.
    stream: u64,
    /// The last recording that work has passed, and when.
    passed: Option<(u64, Instant)>,
}

/// A primary context.
pub struct Context {
    handle: u64,
    retained: u32,
    gpu: Gpu,
    settings: Settings,
    /// Allocations: address and bytes.
    memory: BTreeMap<u64, u64>,
    /// Page-locked host memory: address and layout.
    locked: BTreeMap<usize, Layout>,
    modules: BTreeMap<u64, (LoadedModule, Module, String)>,
    functions: HashMap<u64, Arc<Function>>,
    /// Dynamic shared memory that functions may have, where it was set.
    dynamic: HashMap<u64, u32>,
    streams: BTreeMap<u64, Stream>,
    events: BTreeMap<u64, Event>,
    graphs: BTreeMap<u64, Vec<Work>>,
    executables: BTreeMap<u64, Arc<[Work]>>,
    /// A kernel failed: nothing works from there on.
    failed: Option<Code>,
}

/// cuInit.
pub fn init() -> Result<(), Code> {
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    if driver.is_none() {
        let settings = Settings::read().map_err(|message| {
            say(&message);
            Code::INVALID_VALUE
        })?;
        *driver = Some(Driver { settings, contexts: BTreeMap::new() });
    }
    match driver.as_ref().map(|d| (d.settings.init, d.settings.devices)) {
        Some((code @ 1.., _)) => Err(Code(code)),
        Some((_, 0)) => Err(Code::NO_DEVICE),
        _ => Ok(()),
    }
}

/// Calls `f` with the driver.
pub fn with<T>(f: impl FnOnce(&mut Driver) -> Result<T, Code>) -> Result<T, Code> {
    let mut driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    f(driver.as_mut().ok_or(Code::NOT_INITIALIZED)?)
}

/// Calls `f` with this thread's context, unless a kernel failed in it.
pub fn with_context<T>(f: impl FnOnce(&mut Context) -> Result<T, Code>) -> Result<T, Code> {
    with(|driver| {
        let current = CURRENT.get();
        let context =
            driver.contexts.values_mut().find(|c| c.handle == current).ok_or(Code::INVALID_CONTEXT)?;
        match context.failed {
            Some(code) => Err(code),
            None => f(context),
        }
    })
}

/// cuCtxSetCurrent; 0 for none.
pub fn set_current(context: u64) -> Result<(), Code> {
    with(|driver| {
        if context != 0 && !driver.contexts.values().any(|c| c.handle == context) {
            return Err(Code::INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    })
}

impl Driver {
    /// Whether there is such a device.
    pub fn device(&self, ordinal: i32) -> Result<i32, Code> {
        let known = (0..self.settings.devices).contains(&ordinal);
        if known { Ok(ordinal) } else { Err(Code::INVALID_DEVICE) }
    }

    /// An attribute of a device, by the driver's number.
    pub fn attribute(&self, which: u32) -> Result<i32, Code> {
        Ok(match which {
            1 => 1024,                           // MAX_THREADS_PER_BLOCK
            8 => SHARED_UNASKED as i32,          // MAX_SHARED_MEMORY_PER_BLOCK
            10 => 32,                            // WARP_SIZE
            16 => self.settings.multiprocessors, // MULTIPROCESSOR_COUNT
            75 => self.settings.capability.0,    // COMPUTE_CAPABILITY_MAJOR
            76 => self.settings.capability.1,    // COMPUTE_CAPABILITY_MINOR
            97 => self.settings.shared as i32,   // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            _ => return Err(Code::NOT_SUPPORTED),
        })
    }

    /// cuDevicePrimaryCtxRetain: the context's handle.
    pub fn retain(&mut self, device: i32) -> Result<u64, Code> {
        let device = self.device(device)?;
        let settings = &self.settings;
        let context = self.contexts.entry(device).or_insert_with(|| Context::new(settings));
        context.retained += 1;
        Ok(context.handle)
    }

    /// cuDevicePrimaryCtxRelease: the last one ends the context and all in it.
    pub fn release(&mut self, device: i32) -> Result<(), Code> {
        let context = self.contexts.get_mut(&device).ok_or(Code::INVALID_CONTEXT)?;
        context.retained -= 1;
        if context.retained == 0 {
            self.contexts.remove(&device);
        }
        Ok(())
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        let left = [
            ("allocations", self.memory.len()),
            ("page-locked buffers", self.locked.len()),
            ("modules", self.modules.len()),
            ("streams", self.streams.len()),
            ("events", self.events.len()),
            ("graphs", self.graphs.len() + self.executables.len()),
        ];
        let left: Vec<String> =
            left.iter().filter(|(_, n)| *n > 0).map(|(what, n)| format!("{n} {what}")).collect();
        if !left.is_empty() {
            say(&format!("a context ends with {}", left.join(", ")));
        }
        for (address, layout) in std::mem::take(&mut self.locked) {
            // SAFETY: allocated with this layout; nobody can name it any more.
            unsafe { dealloc(address as *mut u8, layout) };
        }
    }
}

impl Context {
    fn new(settings: &Settings) -> Self {
        let checks = if settings.checks { Checks::ALL } else { Checks::NONE };
        let options = Options {
            checks,
            counters: false,
            memory: settings.memory,
            shared: settings.shared,
            mma: settings.mma,
            ..Options::default()
        };
        Self {
            handle: handle(),
            retained: 0,
            gpu: Gpu::new(options),
            settings: settings.clone(),
            memory: BTreeMap::new(),
            locked: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: HashMap::new(),
            dynamic: HashMap::new(),
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            failed: None,
        }
    }

    // ---------------------------------------------------------------------------------------------------- running

    /// Runs a stream's work, up to a recording of an event or to the end.
    fn drain(&mut self, stream: u64, until: Option<(u64, u64)>) -> Result<(), Code> {
        loop {
            let queue = &mut self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?.queue;
            let Some(work) = queue.pop_front() else { return Ok(()) };
            let events = &mut self.events;
            let mut passed = |event: u64, serial: u64| {
                if let Some(event) = events.get_mut(&event) {
                    event.passed = Some((serial, Instant::now()));
                }
            };
            let fault = self.settings.fault.as_deref();
            if let Err(code) = work.run(&mut self.gpu, fault, &mut passed) {
                self.failed = Some(code);
                return Err(code);
            }
            if until.is_some_and(
                |(event, serial)| matches!(work, Work::Record(e, s) if e == event && s == serial),
            ) {
                return Ok(());
            }
        }
    }

    /// Runs all work.
    fn drain_all(&mut self) -> Result<(), Code> {
        let streams: Vec<u64> = self.streams.keys().copied().collect();
        streams.into_iter().try_for_each(|stream| self.drain(stream, None))
    }

    /// Whether work that has not run yet is of some kind.
    fn waits(&self, which: &dyn Fn(&Work) -> bool) -> bool {
        fn any(work: &Work, which: &dyn Fn(&Work) -> bool) -> bool {
            match work {
                Work::Graph(_, steps) => which(work) || steps.iter().any(|step| any(step, which)),
                _ => which(work),
            }
        }
        self.streams.values().flat_map(|s| &s.queue).any(|work| any(work, which))
    }

    /// Breaks captures that a call of this thread, which may wait for work, is not allowed in.
    fn unsafe_call(&mut self) -> Result<(), Code> {
        let thread = std::thread::current().id();
        let captures = self.streams.values_mut().filter_map(|s| s.capture.as_mut());
        let mut broken = false;
        for capture in captures.filter(|c| c.global || c.thread == thread) {
            capture.broken = true;
            broken = true;
        }
        if broken { Err(Code::CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    /// Puts work into a stream, or into what is recorded of it.
    fn put(&mut self, stream: u64, work: Work) -> Result<(), Code> {
        if stream == 0 {
            say("the legacy stream is not supported");
            return Err(Code::NOT_SUPPORTED);
        }
        let stream = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        match (&mut stream.capture, work) {
            (None, work) => stream.queue.push_back(work),
            (Some(capture), _) if capture.broken => return Err(Code::CAPTURE_INVALIDATED),
            (Some(capture), work @ (Work::Launch(..) | Work::Fill(..) | Work::In(_, Host::Locked(_), _))) => {
                capture.steps.push(work);
            }
            (Some(capture), _) => {
                say("a captured stream takes launches, fills and copies from page-locked memory");
                capture.broken = true;
                return Err(Code::CAPTURE_UNSUPPORTED);
            }
        }
        Ok(())
    }

    // ----------------------------------------------------------------------------------------------------- memory

    /// cuMemAlloc.
    pub fn alloc(&mut self, bytes: usize) -> Result<u64, Code> {
        self.unsafe_call()?;
        if bytes == 0 {
            return Err(Code::INVALID_VALUE);
        }
        let DevicePtr(address) = self.gpu.alloc(bytes).map_err(|_| Code::OUT_OF_MEMORY)?;
        self.memory.insert(address, bytes as u64);
        Ok(address)
    }

    /// cuMemFree: waits for all work.
    pub fn free(&mut self, address: u64) -> Result<(), Code> {
        self.unsafe_call()?;
        self.drain_all()?;
        let bytes = *self.memory.get(&address).ok_or(Code::INVALID_VALUE)?;
        let inside =
            |work: &Work| matches!(work, Work::Fill(to, ..) if (address..address + bytes).contains(to));
        if self.executables.values().any(|steps| steps.iter().any(inside)) {
            say("memory is given back that an executable graph fills");
            return Err(Code::ILLEGAL_STATE);
        }
        self.memory.remove(&address);
        self.gpu.free(DevicePtr(address)).map_err(|_| Code::INVALID_VALUE)
    }

    /// cuMemGetInfo: free and total.
    pub fn memory(&self) -> (u64, u64) {
        let used: u64 = self.memory.values().sum();
        (self.settings.memory - used.min(self.settings.memory), self.settings.memory)
    }

    fn range(&self, address: u64, bytes: usize) -> Result<(), Code> {
        let found = self.memory.range(..=address).next_back();
        let end = address.checked_add(bytes as u64);
        match found.zip(end) {
            Some(((start, size), end)) if end <= start + size => Ok(()),
            _ => {
                say(&format!("{bytes} bytes at {address:#x} are not within one allocation"));
                Err(Code::INVALID_VALUE)
            }
        }
    }

    /// cuMemHostAlloc.
    pub fn lock(&mut self, bytes: usize, flags: u32) -> Result<usize, Code> {
        if bytes == 0 || flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let layout = Layout::from_size_align(bytes, PAGE).map_err(|_| Code::INVALID_VALUE)?;
        // SAFETY: the layout has bytes.
        let address = unsafe { alloc_zeroed(layout) } as usize;
        if address == 0 {
            return Err(Code::OUT_OF_MEMORY);
        }
        self.locked.insert(address, layout);
        Ok(address)
    }

    /// cuMemFreeHost: waits for all work.
    pub fn unlock(&mut self, address: usize) -> Result<(), Code> {
        self.drain_all()?;
        let layout = self.locked.remove(&address).ok_or(Code::INVALID_VALUE)?;
        // SAFETY: allocated with this layout, and no work is left that could use it.
        unsafe { dealloc(address as *mut u8, layout) };
        Ok(())
    }

    /// Whether host memory is page-locked, all of it.
    fn is_locked(&self, address: usize, bytes: usize) -> bool {
        let found = self.locked.range(..=address).next_back();
        found.is_some_and(|(start, layout)| address - start + bytes <= layout.size())
    }

    /// cuMemcpyHtoDAsync.
    ///
    /// # Safety
    /// `bytes` bytes can be read at `from`.
    pub unsafe fn copy_in(&mut self, to: u64, from: usize, bytes: usize, stream: u64) -> Result<(), Code> {
        self.range(to, bytes)?;
        let from = if self.is_locked(from, bytes) {
            Host::Locked(from)
        } else {
            // SAFETY: the caller's word.
            Host::Copied(unsafe { std::slice::from_raw_parts(from as *const u8, bytes) }.into())
        };
        self.put(stream, Work::In(to, from, bytes))
    }

    /// cuMemcpyDtoHAsync, which waits unless the memory is page-locked.
    ///
    /// # Safety
    /// `bytes` bytes can be written at `to`.
    pub unsafe fn copy_out(&mut self, to: usize, from: u64, bytes: usize, stream: u64) -> Result<(), Code> {
        self.range(from, bytes)?;
        let locked = self.is_locked(to, bytes);
        self.put(stream, Work::Out(to, from, bytes))?;
        if locked { Ok(()) } else { self.drain(stream, None) }
    }

    /// cuMemsetD8Async.
    pub fn fill(&mut self, to: u64, value: u8, bytes: usize, stream: u64) -> Result<(), Code> {
        self.range(to, bytes)?;
        self.put(stream, Work::Fill(to, value, bytes))
    }

    // ---------------------------------------------------------------------------------------------------- modules

    /// The PTX of a cubin for this device. Machine code is nothing that a virtual GPU runs; what tests make in its place is
    /// a cubin's header with PTX behind it.
    pub fn opened<'a>(&self, header: &[u8; ELF_HEADER], rest: &'a str) -> Result<&'a str, Code> {
        // The second byte of e_flags.
        let made_for = i32::from(header[0x31]);
        let (major, minor) = self.settings.capability;
        let runs = made_for / 10 == major && made_for % 10 <= minor;
        if !runs || !rest.contains(".version ") {
            say(&format!("machine code for sm_{made_for} is refused"));
            return Err(Code::NO_BINARY_FOR_GPU);
        }
        Ok(rest)
    }

    /// cuModuleLoadDataEx; the second of an error is what the compiler says.
    pub fn load(&mut self, text: &str) -> Result<u64, (Code, String)> {
        self.unsafe_call().map_err(|code| (code, String::new()))?;
        let directive =
            |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
        let pair = |text: &str| {
            let (major, minor) = text.split_once('.')?;
            Some((major.parse::<i32>().ok()?, minor.parse::<i32>().ok()?))
        };
        let newest = self.settings.ptx();
        match pair(directive(".version")) {
            Some(version) if version > newest => {
                let told = format!(
                    "Unsupported .version {}.{}; current version is '{}.{}'",
                    version.0, version.1, newest.0, newest.1
                );
                return Err((Code::UNSUPPORTED_PTX_VERSION, told));
            }
            Some(_) => {}
            None => return Err((Code::INVALID_PTX, "Missing .version directive at start of file".into())),
        }
        let target: String =
            directive(".target").trim_start_matches("sm_").chars().take_while(char::is_ascii_digit).collect();
        let (major, minor) = self.settings.capability;
        if target.parse::<i32>().is_ok_and(|target| target > major * 10 + minor) {
            return Err((Code::NO_BINARY_FOR_GPU, format!("the text is for sm_{target}")));
        }
        let module = Module::load("module", text).map_err(|e| (Code::INVALID_PTX, e.to_string()))?;
        // A driver's compiler takes the whole text or none of it. What the machine does not support is for launches to say.
        let wrong: Vec<_> =
            module.refused().into_iter().filter(|f| f.kind != ErrorKind::Unsupported).collect();
        if !wrong.is_empty() {
            return Err((Code::INVALID_PTX, Error::Fault(wrong).to_string()));
        }
        let loaded = self.gpu.load(&module).map_err(|e| (Code::OUT_OF_MEMORY, e.to_string()))?;
        let name = handle();
        self.modules.insert(name, (loaded, module, text.to_owned()));
        Ok(name)
    }

    /// cuModuleUnload: no work may need it.
    pub fn unload(&mut self, module: u64) -> Result<(), Code> {
        let needed = |work: &Work| matches!(work, Work::Launch(f, ..) if f.owner == module);
        if self.waits(&needed) {
            say("a module is unloaded while its kernels wait to run");
            return Err(Code::ILLEGAL_STATE);
        }
        self.modules.remove(&module).ok_or(Code::INVALID_HANDLE)?;
        self.functions.retain(|_, function| function.owner != module);
        Ok(())
    }

    /// cuModuleGetFunction.
    pub fn function(&mut self, module: u64, name: &str) -> Result<u64, Code> {
        let (loaded, decoded, text) = self.modules.get(&module).ok_or(Code::INVALID_HANDLE)?;
        let known = self.functions.iter().find(|(_, f)| f.owner == module && f.name == name);
        if let Some((function, _)) = known {
            return Ok(*function);
        }
        let params = decoded.params(name).ok_or(Code::NOT_FOUND)?;
        let function = Function {
            owner: module,
            module: loaded.clone(),
            name: name.to_owned(),
            params: params.iter().map(|(bytes, _)| *bytes).collect(),
            shared: decoded.shared_bytes(name).unwrap_or(0),
            waits: waits(text, name),
        };
        let name = handle();
        self.functions.insert(name, Arc::new(function));
        Ok(name)
    }

    fn dynamic(&self, function: u64) -> Result<(u32, u32), Code> {
        let shared = self.functions.get(&function).ok_or(Code::INVALID_HANDLE)?.shared;
        let unasked = SHARED_UNASKED.saturating_sub(shared);
        Ok((shared, self.dynamic.get(&function).copied().unwrap_or(unasked)))
    }

    /// cuFuncGetAttribute, by the driver's number.
    pub fn function_attribute(&self, function: u64, which: u32) -> Result<i32, Code> {
        let (shared, dynamic) = self.dynamic(function)?;
        let (major, minor) = self.settings.capability;
        match which {
            1 => Ok(shared as i32),      // SHARED_SIZE_BYTES
            3 | 4 => Ok(0), // LOCAL_SIZE_BYTES, NUM_REGS: PTX runs as it is, and no register is assigned
            6 => Ok(major * 10 + minor), // BINARY_VERSION
            8 => Ok(dynamic as i32), // MAX_DYNAMIC_SHARED_SIZE_BYTES
            _ => Err(Code::NOT_SUPPORTED),
        }
    }

    /// cuOccupancyMaxActiveBlocksPerMultiprocessor, by threads, shared memory and number of blocks: none of registers.
    pub fn occupancy(&self, function: u64, threads: i32, shared_bytes: usize) -> Result<i32, Code> {
        let (fixed, dynamic) = self.dynamic(function)?;
        let threads =
            u32::try_from(threads).ok().filter(|n| (1..=1024).contains(n)).ok_or(Code::INVALID_VALUE)?;
        let asked = u32::try_from(shared_bytes).map_err(|_| Code::INVALID_VALUE)?;
        if asked > dynamic {
            return Ok(0);
        }
        let (most_threads, shared, blocks) = self.settings.multiprocessor();
        // Warps are whole, and the driver has a kibibyte of each block's shared memory.
        let by_threads = most_threads / threads.next_multiple_of(32);
        let by_shared = shared / (fixed + asked + (1 << 10));
        Ok(by_threads.min(by_shared).min(blocks) as i32)
    }

    /// cuFuncSetAttribute, by the driver's number.
    pub fn set_function_attribute(&mut self, function: u64, which: u32, value: i32) -> Result<(), Code> {
        let (shared, _) = self.dynamic(function)?;
        let value = u32::try_from(value).map_err(|_| Code::INVALID_VALUE)?;
        match which {
            8 if u64::from(shared) + u64::from(value) <= u64::from(self.settings.shared) => {
                self.dynamic.insert(function, value);
                Ok(())
            }
            8 => Err(Code::INVALID_VALUE),
            _ => Err(Code::NOT_SUPPORTED),
        }
    }

    /// Bytes of each of a kernel's parameters.
    pub fn params(&self, function: u64) -> Result<Vec<u32>, Code> {
        Ok(self.functions.get(&function).ok_or(Code::INVALID_HANDLE)?.params.clone())
    }

    /// cuLaunchKernel.
    pub fn launch(
        &mut self,
        function: u64,
        shape: Launch,
        args: Vec<Vec<u8>>,
        stream: u64,
    ) -> Result<(), Code> {
        let (_, dynamic) = self.dynamic(function)?;
        let kernel = Arc::clone(self.functions.get(&function).ok_or(Code::INVALID_HANDLE)?);
        let threads: u64 = shape.block.iter().map(|n| u64::from(*n)).product();
        let most = [i32::MAX as u32, 65_535, 65_535];
        let grid = shape.grid.iter().zip(most).all(|(n, most)| (1..=most).contains(n));
        if !grid || !(1..=1024).contains(&threads) || shape.block[2] > 64 {
            say(&format!("{}: no grid of {:?} blocks of {:?} threads", kernel.name, shape.grid, shape.block));
            return Err(Code::INVALID_VALUE);
        }
        if shape.shared_bytes > dynamic {
            let asked = shape.shared_bytes;
            say(&format!("{}: {asked} bytes of dynamic shared memory, {dynamic} are allowed", kernel.name));
            return Err(Code::INVALID_VALUE);
        }
        self.put(stream, Work::Launch(kernel, shape, args))?;
        let captured = self.streams.get(&stream).is_some_and(|s| s.capture.is_some());
        if self.settings.blocking && !captured { self.drain(stream, None) } else { Ok(()) }
    }

    /// A launch that may begin before the kernel ahead of it has ended: here it does not, so what would go wrong then is
    /// refused.
    pub fn may_begin_early(&self, function: u64, stream: u64) -> Result<(), Code> {
        let kernel = self.functions.get(&function).ok_or(Code::INVALID_HANDLE)?;
        let captured = self.streams.get(&stream).is_some_and(|s| s.capture.is_some());
        let Settings { capability, version, .. } = self.settings;
        if capability < (9, 0) || version < (11, 8) || captured && version < (12, 3) {
            say(&format!("{}: no programmatic launch on {capability:?} with CUDA {version:?}", kernel.name));
            return Err(Code::NOT_SUPPORTED);
        }
        if !kernel.waits {
            say(&format!("{} may begin early, and uses memory before it waits", kernel.name));
            return Err(Code::ILLEGAL_STATE);
        }
        Ok(())
    }

    // ----------------------------------------------------------------------------------------- streams and events

    /// cuStreamCreate.
    pub fn stream(&mut self, flags: u32) -> Result<u64, Code> {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        let name = handle();
        self.streams.insert(name, Stream { queue: VecDeque::new(), capture: None });
        Ok(name)
    }

    /// cuStreamDestroy: its work runs nevertheless.
    pub fn destroy_stream(&mut self, stream: u64) -> Result<(), Code> {
        self.drain(stream, None)?;
        self.streams.remove(&stream);
        Ok(())
    }

    /// cuStreamSynchronize.
    pub fn wait(&mut self, stream: u64) -> Result<(), Code> {
        if !self.streams.contains_key(&stream) {
            return Err(Code::INVALID_HANDLE);
        }
        self.unsafe_call()?;
        self.drain(stream, None)
    }

    /// cuEventCreate.
    pub fn event(&mut self, flags: u32) -> Result<u64, Code> {
        // 1: waiting sleeps. 2: no timing.
        if flags > 3 {
            return Err(Code::INVALID_VALUE);
        }
        let name = handle();
        self.events.insert(name, Event { timing: flags & 2 == 0, recorded: 0, stream: 0, passed: None });
        Ok(name)
    }

    /// cuEventDestroy.
    pub fn destroy_event(&mut self, event: u64) -> Result<(), Code> {
        self.events.remove(&event).map(drop).ok_or(Code::INVALID_HANDLE)
    }

    /// cuEventRecord.
    pub fn record(&mut self, event: u64, stream: u64) -> Result<(), Code> {
        let serial = handle();
        let known = self.events.get_mut(&event).ok_or(Code::INVALID_HANDLE)?;
        (known.recorded, known.stream) = (serial, stream);
        self.put(stream, Work::Record(event, serial))
    }

    /// cuEventSynchronize.
    pub fn wait_event(&mut self, event: u64) -> Result<(), Code> {
        self.unsafe_call()?;
        let known = self.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        let (stream, serial) = (known.stream, known.recorded);
        // An event that was never recorded, or whose stream has ended, has passed.
        let passed = serial == 0 || known.passed.is_some_and(|(passed, _)| passed == serial);
        if passed || !self.streams.contains_key(&stream) {
            return Ok(());
        }
        self.drain(stream, Some((event, serial)))
    }

    /// cuEventElapsedTime in milliseconds.
    pub fn elapsed(&self, from: u64, to: u64) -> Result<f32, Code> {
        let at = |event: u64| {
            let event = self
                .events
                .get(&event)
                .filter(|e| e.timing && e.recorded != 0)
                .ok_or(Code::INVALID_HANDLE)?;
            event.passed.filter(|(serial, _)| *serial == event.recorded).ok_or(Code::NOT_READY)
        };
        let ((_, from), (_, to)) = (at(from)?, at(to)?);
        Ok(to.duration_since(from).as_secs_f32() * 1e3)
    }

    // ----------------------------------------------------------------------------------------------------- graphs

    /// cuStreamBeginCapture; the mode by the driver's number.
    pub fn begin_capture(&mut self, stream: u64, mode: u32) -> Result<(), Code> {
        let graphs = self.settings.graphs;
        let stream = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        match (&stream.capture, mode) {
            _ if graphs == Graphs::None => Err(Code::NOT_SUPPORTED),
            (Some(_), _) => Err(Code::ILLEGAL_STATE),
            (None, 0 | 1) => {
                let thread = std::thread::current().id();
                stream.capture =
                    Some(Capture { steps: Vec::new(), broken: false, thread, global: mode == 0 });
                Ok(())
            }
            // Relaxed captures are not distinguished.
            _ => Err(Code::NOT_SUPPORTED),
        }
    }

    /// cuStreamEndCapture: the graph's handle.
    pub fn end_capture(&mut self, stream: u64) -> Result<u64, Code> {
        let stream = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
        let thread = std::thread::current().id();
        if stream.capture.as_ref().is_some_and(|c| c.thread != thread) {
            return Err(Code::CAPTURE_WRONG_THREAD);
        }
        let capture = stream.capture.take().ok_or(Code::CAPTURE_UNMATCHED)?;
        if capture.broken {
            return Err(Code::CAPTURE_INVALIDATED);
        }
        let name = handle();
        self.graphs.insert(name, capture.steps);
        Ok(name)
    }

    /// cuGraphInstantiateWithFlags: the executable graph's handle.
    pub fn instantiate(&mut self, graph: u64, flags: u64) -> Result<u64, Code> {
        let steps = self.graphs.get(&graph).ok_or(Code::INVALID_HANDLE)?.clone();
        if flags != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        let name = handle();
        self.executables.insert(name, steps.into());
        Ok(name)
    }

    /// cuGraphLaunch.
    pub fn launch_graph(&mut self, executable: u64, stream: u64) -> Result<(), Code> {
        let steps = Arc::clone(self.executables.get(&executable).ok_or(Code::INVALID_HANDLE)?);
        if self.settings.graphs == Graphs::Made {
            return Err(Code::OUT_OF_MEMORY);
        }
        self.put(stream, Work::Graph(executable, steps))
    }

    /// cuGraphDestroy.
    pub fn destroy_graph(&mut self, graph: u64) -> Result<(), Code> {
        self.graphs.remove(&graph).map(drop).ok_or(Code::INVALID_HANDLE)
    }

    /// cuGraphExecDestroy: it may not be waiting to run.
    pub fn destroy_executable(&mut self, executable: u64) -> Result<(), Code> {
        if self.waits(&|work| matches!(work, Work::Graph(name, _) if *name == executable)) {
            say("an executable graph is destroyed while it waits to run");
            return Err(Code::ILLEGAL_STATE);
        }
        self.executables.remove(&executable).map(drop).ok_or(Code::INVALID_HANDLE)
    }
}
