//! The public machine: a device with memory, modules and launches.

use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use crate::compile::module::{error as load_error, load};
use crate::error::{Error, ErrorKind, Finding, Place};
use crate::machine::cluster::MAX_CLUSTER;
use crate::machine::grid;
use crate::machine::heap::{HEAP_BYTES, Heap};
use crate::machine::launch::{LaunchState, Waiting};
use crate::machine::layout::FUNCTION_WINDOW;
use crate::machine::memory::global::GlobalMemory;
use crate::machine::memory::variables::{DYNAMIC_SHARED, SharedRange};
use crate::machine::module::Module as Inner;
use crate::machine::options::Options;
use crate::machine::program::ClusterShape;
use crate::machine::program::{Constant, Function};
use crate::report::Report;

/// Most threads of a block.
const MAX_THREADS: u32 = 1024;
/// Most blocks in y and z; x may have 2^31 - 1.
const MAX_BLOCKS: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];
/// Most threads of a block in z.
const MAX_THREADS_Z: u32 = 64;

/// Decoded PTX, on no device yet. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Module(Arc<Inner>);

impl Module {
    /// Parses and decodes PTX; `name` stands for it in reports.
    ///
    /// # Errors
    /// If none of its kernels can be launched: `Fault` for text that is wrong, `Unsupported` for what the machine cannot run,
    /// with all places. If some can, only launching the others is an error; [`Module::refused`] lists all places.
    pub fn load(name: &str, text: &str) -> Result<Self, Error> {
        Ok(Self(Arc::new(load(name, text)?)))
    }

    /// Names of the kernels that a launch may name, in the order of the text.
    pub fn kernels(&self) -> Vec<&str> {
        self.0.kernels().map(|f| f.name.as_str()).collect()
    }

    /// All that is wrong or not supported, in the order of the text. Kernels that use none of it can be launched.
    pub fn refused(&self) -> Vec<Finding> {
        self.0.all_refused().iter().map(|refused| self.0.finding(refused)).collect()
    }

    /// Whether a kernel can be launched.
    pub fn runs(&self, kernel: &str) -> bool {
        self.0.kernels().any(|f| f.name == kernel && f.defined && f.refused.is_empty())
    }

    /// A kernel's parameters: bytes and alignment of each.
    pub fn params(&self, kernel: &str) -> Option<Vec<(u32, u32)>> {
        let f = self.0.kernels().find(|f| f.name == kernel)?;
        Some(f.params.iter().map(|p| (p.bytes, p.align)).collect())
    }

    /// Most threads that a block of a kernel may have.
    pub fn max_threads(&self, kernel: &str) -> Option<u32> {
        let f = self.0.kernels().find(|f| f.name == kernel)?;
        let allowed = f.required_threads.or(f.max_threads);
        Some(allowed.map_or(MAX_THREADS, |[x, y, z]| x.saturating_mul(y).saturating_mul(z).min(MAX_THREADS)))
    }

    /// What a kernel says of its clusters.
    pub fn cluster(&self, kernel: &str) -> Option<ClusterShape> {
        self.0.kernels().find(|f| f.name == kernel).map(|f| f.cluster)
    }

    /// A kernel's static shared memory in bytes.
    pub fn shared_bytes(&self, kernel: &str) -> Option<u32> {
        self.0.kernels().find(|f| f.name == kernel).map(|f| f.shared_bytes)
    }
}

/// A module on a device: its global variables have addresses.
#[derive(Clone, Debug)]
pub struct LoadedModule {
    module: Module,
    globals: Vec<u64>,
    constants: Vec<u8>,
    device: u64,
}

/// An address of device memory. Arithmetic on it is the caller's: `ptr.offset(bytes)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The address `bytes` further.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes))
    }
}

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// A pointer.
    Ptr(DevicePtr),
    /// 32 bits, unsigned.
    U32(u32),
    /// 32 bits, signed.
    I32(i32),
    /// 64 bits.
    U64(u64),
    /// Single precision.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// A structure by value, or any other bytes.
    Bytes(Vec<u8>),
}

impl Arg {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Ptr(DevicePtr(v)) | Self::U64(v) => v.to_le_bytes().to_vec(),
            Self::U32(v) => v.to_le_bytes().to_vec(),
            Self::I32(v) => v.to_le_bytes().to_vec(),
            Self::F32(v) => v.to_le_bytes().to_vec(),
            Self::F64(v) => v.to_le_bytes().to_vec(),
            Self::Bytes(bytes) => bytes.clone(),
        }
    }
}

/// The shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Whether all blocks run at the same time and may wait for each other.
    pub cooperative: bool,
    /// Blocks of a cluster; `None` for what the kernel says, or one block.
    pub cluster: Option<[u32; 3]>,
}

impl Launch {
    /// A launch of `blocks` blocks of `threads` threads, in one dimension.
    pub const fn linear(blocks: u32, threads: u32) -> Self {
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared_bytes: 0,
            cooperative: false,
            cluster: None,
        }
    }
}

/// A virtual GPU.
pub struct Gpu {
    options: Options,
    memory: GlobalMemory,
    heap: Option<Mutex<Heap>>,
    /// Where the blocks of cooperative launches count each other.
    workspace: Option<DevicePtr>,
    serial: u32,
    id: u64,
    /// What the last launch printed.
    printed: String,
}

/// Bytes of the workspace that cooperative groups use.
const WORKSPACE_BYTES: usize = 8;

fn refuse<T>(kernel: &str, message: String) -> Result<T, Error> {
    let mut finding = Finding::load(ErrorKind::Launch, Place::default(), message);
    finding.kernel = kernel.to_owned();
    Err(Error::Fault(vec![finding]))
}

impl Gpu {
    /// A device without any allocation.
    pub fn new(options: Options) -> Self {
        static DEVICES: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let memory = GlobalMemory::new(&options);
        let id = DEVICES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Self { options, memory, heap: None, workspace: None, serial: 0, id, printed: String::new() }
    }

    /// How it is set up.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The first allocation will be `bytes` behind where it otherwise were, so that several devices have no address in common.
    pub fn begin_at(&mut self, bytes: u64) {
        self.memory.begin_at(bytes);
    }

    /// From now on the bytes of an allocation are the host program's at `host`, as of managed and page-locked memory. All
    /// count as written, because nobody sees the program write them.
    ///
    /// # Errors
    /// Not the start of an allocation.
    ///
    /// # Safety
    /// `host` is a multiple of 8, and the allocation's bytes, rounded up to a multiple of 8, can be read and written there
    /// until it is freed.
    pub unsafe fn back(&mut self, ptr: DevicePtr, host: NonNull<u64>) -> Result<(), Error> {
        // SAFETY: the caller's word.
        unsafe { self.memory.back(ptr.0, host) }
    }

    /// Allocates `bytes` uninitialised bytes.
    ///
    /// # Errors
    /// More than the device has.
    pub fn alloc(&mut self, bytes: usize) -> Result<DevicePtr, Error> {
        self.memory.alloc(bytes as u64, "").map(DevicePtr)
    }

    /// The same with a name for reports.
    ///
    /// # Errors
    /// More than the device has.
    pub fn alloc_named(&mut self, bytes: usize, name: &str) -> Result<DevicePtr, Error> {
        self.memory.alloc(bytes as u64, name).map(DevicePtr)
    }

    /// Frees an allocation; later accesses are faults.
    ///
    /// # Errors
    /// Not the start of an allocation, or freed before.
    pub fn free(&mut self, ptr: DevicePtr) -> Result<(), Error> {
        self.memory.free(ptr.0)
    }

    /// Copies bytes to the device.
    ///
    /// # Errors
    /// Outside an allocation.
    pub fn write(&mut self, ptr: DevicePtr, bytes: &[u8]) -> Result<(), Error> {
        self.memory.write(ptr.0, bytes)
    }

    /// Copies bytes from the device. Uninitialised bytes are 0.
    ///
    /// # Errors
    /// Outside an allocation.
    pub fn read(&self, ptr: DevicePtr, bytes: &mut [u8]) -> Result<(), Error> {
        self.memory.read(ptr.0, bytes)
    }

    /// Copies bytes within the device. What was never written at `from` counts as never written at `to`.
    ///
    /// # Errors
    /// Outside an allocation.
    pub fn copy(&mut self, to: DevicePtr, from: DevicePtr, bytes: usize) -> Result<(), Error> {
        self.memory.copy(to.0, from.0, bytes as u64)
    }

    /// Sets bytes.
    ///
    /// # Errors
    /// Outside an allocation.
    pub fn fill(&mut self, ptr: DevicePtr, value: u8, bytes: usize) -> Result<(), Error> {
        self.memory.fill(ptr.0, value, bytes as u64)
    }

    /// Puts a module's variables on the device.
    ///
    /// # Errors
    /// More memory than the device has.
    pub fn load(&mut self, module: &Module) -> Result<LoadedModule, Error> {
        let m = &module.0;
        if m.program.calls_heap() && self.heap.is_none() {
            let start = self.memory.alloc(HEAP_BYTES, "the device heap")?;
            self.memory.make_heap(start);
            self.heap = Some(Mutex::new(Heap::at(start)));
        }
        let mut globals: Vec<u64> = Vec::with_capacity(m.globals.len());
        for g in &m.globals {
            let at = self.memory.alloc(g.bytes.max(1), &g.name)?;
            // Variables without an initialiser hold zeros.
            self.memory.fill(at, 0, g.bytes.max(1))?;
            globals.push(at);
        }
        let value = |c: &Constant| match c {
            Constant::Global(i, addend) => globals[*i as usize].wrapping_add_signed(*addend),
            Constant::Function(i) => FUNCTION_WINDOW + u64::from(*i),
            Constant::Bits(bits) => *bits,
            // Addresses of a frame or of a kernel's shared memory: by PTX, no initial value may hold one.
            Constant::Local(..) | Constant::DynamicShared(..) | Constant::Shared(..) => 0,
        };
        for (g, at) in m.globals.iter().zip(&globals) {
            for (offset, bytes) in &g.init {
                self.memory.write(at + offset, bytes)?;
            }
            for (offset, pointer) in &g.pointers {
                self.memory.write(at + offset, &value(pointer).to_le_bytes())?;
            }
        }
        let mut constants = m.constants.clone();
        for (offset, pointer) in &m.constant_pointers {
            let at = *offset as usize;
            if let Some(place) = constants.get_mut(at..at + 8) {
                place.copy_from_slice(&value(pointer).to_le_bytes());
            }
        }
        Ok(LoadedModule { module: module.clone(), globals, constants, device: self.id })
    }

    /// The address and size of a global variable of a loaded module.
    pub fn global(&self, module: &LoadedModule, name: &str) -> Option<(DevicePtr, u64)> {
        let i = module.module.0.globals.iter().position(|g| g.name == name)?;
        Some((DevicePtr(module.globals[i]), module.module.0.globals[i].bytes))
    }

    /// A variable of constant memory: its bytes.
    pub fn constant<'a>(&self, module: &'a LoadedModule, name: &str) -> Option<&'a [u8]> {
        let (_, at, size) = module.module.0.constant_names.iter().find(|(n, ..)| n == name)?;
        module.constants.get(*at as usize..(at + size) as usize)
    }

    /// What the last launch printed with `printf`, also where it failed.
    pub fn printed(&self) -> &str {
        &self.printed
    }

    /// Writes a variable of constant memory, as `cudaMemcpyToSymbol` does.
    ///
    /// # Errors
    /// No such variable, or more bytes than it has.
    pub fn write_constant(&self, module: &mut LoadedModule, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let found = module.module.0.constant_names.iter().find(|(n, ..)| n == name);
        let Some(&(_, at, size)) = found else {
            return refuse("", format!("the module has no constant `{name}`"));
        };
        if bytes.len() > size as usize {
            return refuse("", format!("{} bytes for the constant `{name}`, which has {size}", bytes.len()));
        }
        module.constants[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Runs a kernel to its end.
    ///
    /// # Errors
    /// `Fault` with all findings: the one that ended the launch first, then those of the checks. A launch with any finding
    /// is a failed one, although the kernel may have run to its end.
    pub fn launch(
        &mut self,
        loaded: &LoadedModule,
        kernel: &str,
        shape: &Launch,
        args: &[Arg],
    ) -> Result<Report, Error> {
        let module = &*loaded.module.0;
        if loaded.device != self.id {
            return refuse(kernel, "the module is loaded on another device".into());
        }
        let found = module.program.functions.iter().position(|f| f.is_entry && f.defined && f.name == kernel);
        let Some(index) = found else {
            let known = loaded.module.kernels().join(", ");
            return refuse(kernel, format!("`{}` has no kernel `{kernel}`; it has: {known}", module.name));
        };
        let f = &module.program.functions[index];
        if !f.refused.is_empty() {
            return Err(load_error(module.refused(f)));
        }
        self.printed.clear();
        let cluster = cluster_of(f, shape)?;
        let mut shape = *shape;
        if f.cluster.counted {
            let blocks = |i: usize| shape.grid[i].saturating_mul(cluster[i]);
            shape.grid = [blocks(0), blocks(1), blocks(2)];
        }
        let shape = &shape;
        self.check_shape(f, shape, cluster)?;
        let params = pack(f, args)?;
        let align = f.dynamic_align.max(1);
        let too_much = |bytes: u64| {
            let most = self.options.shared;
            refuse(
                kernel,
                format!("{bytes} bytes of shared memory, static and dynamic; the device has {most} a block"),
            )
        };
        let total =
            u64::from(f.shared_bytes).next_multiple_of(u64::from(align)) + u64::from(shape.shared_bytes);
        let total = if shape.shared_bytes == 0 { u64::from(f.shared_bytes) } else { total };
        if total > u64::from(self.options.shared) {
            return too_much(total);
        }
        // The same with the gaps between variables.
        let mut variables = f.variables.clone();
        let (dynamic_shared, span) = match u64::from(shape.shared_bytes) {
            0 => (f.shared_span, f.shared_span),
            bytes => {
                let gap = if f.shared_span > 0 { f.shared_gap } else { 0 };
                let from = (f.shared_span + gap).next_multiple_of(u64::from(align));
                let name = DYNAMIC_SHARED.to_owned();
                variables.push(SharedRange { name, from, end: from + bytes });
                (from, from + bytes)
            }
        };
        let workspace = if shape.cooperative && f.system.workspace { self.cleared_workspace()?.0 } else { 0 };
        self.serial = self.serial.wrapping_add(1).max(1);
        let state = LaunchState {
            module,
            program: &module.program,
            kernel: f,
            kernel_index: index as u32,
            globals: &loaded.globals,
            memory: &self.memory,
            constants: &loaded.constants,
            params: &params,
            checks: self.options.checks,
            counters: self.options.counters,
            budget: self.options.budget,
            seed: self.options.seed,
            multiprocessors: self.options.multiprocessors,
            mma: self.options.mma,
            grid: shape.grid,
            block: shape.block,
            cluster,
            explicit_cluster: shape.cluster.is_some() || f.cluster.required.is_some(),
            shared_bytes: total as u32,
            shared_span: span as u32,
            variables,
            dynamic_shared: dynamic_shared as u32,
            workspace,
            heap: self.heap.as_ref(),
            waiting: Waiting::new(shape.grid.iter().zip(cluster).map(|(n, c)| u64::from(n / c)).product()),
            serial: self.serial,
        };
        let threads = match self.options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let outcome = grid::run(&state, threads, shape.cooperative);
        let unique = outcome.counters.unique_sectors;
        let unique = (unique.read, unique.written);
        self.memory.settle();
        self.printed.clone_from(&outcome.printed);
        // A division is told of beside anything that may follow from it.
        let alone = outcome.findings.iter().all(|finding| finding.kind.may_be_a_note());
        let (notes, findings): (Vec<_>, Vec<_>) =
            outcome.findings.into_iter().partition(|finding| match finding.kind {
                ErrorKind::DivisionByZero => alone,
                kind => kind.may_be_a_note(),
            });
        if !findings.is_empty() {
            return Err(load_error(findings));
        }
        let shapes = [shape.grid, shape.block];
        let counters = &outcome.counters;
        let mut report = Report::new(module, kernel, shapes, total as u32, counters, unique, outcome.printed);
        report.notes = notes;
        Ok(report)
    }

    /// The workspace of a launch that begins.
    fn cleared_workspace(&mut self) -> Result<DevicePtr, Error> {
        let place = match self.workspace {
            Some(place) => place,
            None => self.alloc_named(WORKSPACE_BYTES, "the grid's workspace")?,
        };
        self.workspace = Some(place);
        self.write(place, &[0; WORKSPACE_BYTES])?;
        Ok(place)
    }

    fn check_shape(&self, f: &Function, shape: &Launch, cluster: [u32; 3]) -> Result<(), Error> {
        let Launch { grid, block, .. } = shape;
        let told = |[x, y, z]: [u32; 3]| format!("({x},{y},{z})");
        if grid.contains(&0) || grid.iter().zip(MAX_BLOCKS).any(|(n, most)| *n > most) {
            return refuse(&f.name, format!("a grid of {}: 1 to 2^31-1, 65535, 65535 blocks", told(*grid)));
        }
        let threads = block.iter().try_fold(1u32, |all, n| all.checked_mul(*n)).unwrap_or(u32::MAX);
        if block.contains(&0) || threads > MAX_THREADS || block[2] > MAX_THREADS_Z {
            return refuse(&f.name, format!("a block of {}: 1 to {MAX_THREADS} threads", told(*block)));
        }
        if let Some(required) = f.required_threads.filter(|r| r != block) {
            let message = format!("a block of {}: the kernel requires {}", told(*block), told(required));
            return refuse(&f.name, message);
        }
        // `.maxntid` limits the product of its dimensions.
        if let Some(most) = f.max_threads {
            let most_threads = most.iter().try_fold(1u32, |all, n| all.checked_mul(*n)).unwrap_or(u32::MAX);
            if threads > most_threads {
                let message =
                    format!("a block of {}: the kernel allows {most_threads} threads", told(*block));
                return refuse(&f.name, message);
            }
        }
        if grid.iter().zip(cluster).any(|(blocks, n)| !blocks.is_multiple_of(n)) {
            let message =
                format!("a grid of {}: no multiple of the cluster of {}", told(*grid), told(cluster));
            return refuse(&f.name, message);
        }
        let blocks: u64 = grid.iter().map(|n| u64::from(*n)).product();
        let most = u64::from(self.options.multiprocessors) * 32;
        if shape.cooperative && blocks > most {
            return refuse(
                &f.name,
                format!("{blocks} blocks cannot run at the same time; the most is {most}"),
            );
        }
        Ok(())
    }
}

/// The blocks of a cluster of a launch.
fn cluster_of(f: &Function, shape: &Launch) -> Result<[u32; 3], Error> {
    let told = |[x, y, z]: [u32; 3]| format!("({x},{y},{z})");
    let cluster = match (shape.cluster, f.cluster.required) {
        (Some(asked), Some(required)) if asked != required => {
            let message = format!("clusters of {}: the kernel requires {}", told(asked), told(required));
            return refuse(&f.name, message);
        }
        (None, None) if f.cluster.explicit => {
            let message = "the kernel runs in clusters, and the launch names no size of them".to_owned();
            return refuse(&f.name, message);
        }
        (asked, required) => asked.or(required).unwrap_or([1; 3]),
    };
    let most = f.cluster.most.map_or(MAX_CLUSTER, |most| most.min(MAX_CLUSTER));
    let blocks = cluster.iter().fold(1u32, |all, n| all.saturating_mul(*n));
    if blocks == 0 || blocks > most {
        return refuse(&f.name, format!("clusters of {}: 1 to {most} blocks", told(cluster)));
    }
    Ok(cluster)
}

/// Puts the arguments where the kernel reads its parameters.
fn pack(f: &Function, args: &[Arg]) -> Result<Vec<u8>, Error> {
    if args.len() != f.params.len() {
        let message = format!("{} arguments; `{}` takes {}", args.len(), f.name, f.params.len());
        return refuse(&f.name, message);
    }
    let bytes = f.params.last().map_or(0, |p| p.offset + p.bytes);
    let mut bank = vec![0; bytes as usize];
    for (i, (p, arg)) in f.params.iter().zip(args).enumerate() {
        let value = arg.bytes();
        if value.len() != p.bytes as usize {
            let message =
                format!("argument {i} (`{}`) has {} bytes, {} are given", p.name, p.bytes, value.len());
            return refuse(&f.name, message);
        }
        bank[p.offset as usize..(p.offset + p.bytes) as usize].copy_from_slice(&value);
    }
    Ok(bank)
}
