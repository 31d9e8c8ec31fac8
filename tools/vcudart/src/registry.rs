//! What a program registers before `main`: fat binaries with their kernels and variables. A binary is loaded into a context
//! when the first of its kernels or variables is asked for there.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vcuda::api::module::container_bytes;
use vcuda::code::{Code, say};
use vcuda::driver::{self, with, with_context};
use vcuda::fatbin;

use crate::error::{INVALID_FUNCTION, INVALID_SYMBOL};

/// Where a program has the address of a managed variable.
#[derive(Debug, Clone, Copy)]
struct Shadow(usize);

/// A variable of a program.
#[derive(Debug, Clone)]
struct Variable {
    host: usize,
    name: String,
    bytes: usize,
    managed: Option<Shadow>,
}

/// A registered fat binary.
#[derive(Debug, Default)]
struct Binary {
    /// Address of the container; 0 where there is none.
    container: usize,
    kernels: HashMap<usize, String>,
    variables: Vec<Variable>,
}

#[derive(Default)]
struct Registry {
    binaries: BTreeMap<usize, Binary>,
    next: usize,
    /// Modules by context and binary, or why there is none.
    modules: HashMap<(u64, usize), Result<u64, Code>>,
    /// The driver's functions by context and the address of the host's stub.
    functions: HashMap<(u64, usize), u64>,
    /// Contexts by device.
    primary: HashMap<i32, u64>,
}

/// Milliseconds without a call after which work runs although nobody waits for it.
const PATIENCE: u64 = 1000;

static REGISTRY: Mutex<Option<Registry>> = Mutex::new(None);

thread_local! {
    /// The device that this thread has chosen.
    static DEVICE: Cell<i32> = const { Cell::new(0) };
}

fn with_registry<T>(f: impl FnOnce(&mut Registry) -> T) -> T {
    let mut registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
    f(registry.get_or_insert_default())
}

/// This thread's device.
pub fn device() -> i32 {
    DEVICE.get()
}

/// What a runtime needs of a driver is of its own age, so the newest is the default.
extern "C" fn loaded() {
    driver::set_default_version((13, 2));
}

/// Has the dynamic linker call it, before a program can ask the driver.
#[used]
#[unsafe(link_section = ".init_array")]
static LOADED: extern "C" fn() = loaded;

/// Starts the driver, if need be.
pub fn start() -> Result<(), Code> {
    driver::init()?;
    let patience = with(|driver| Ok(driver.settings.patience))?.unwrap_or(PATIENCE);
    if patience > 0 {
        driver::go_on_after(Duration::from_millis(patience));
    }
    Ok(())
}

/// The handle of this thread's context, which is there from now on: the program's own, or its device's primary one.
pub fn context() -> Result<u64, Code> {
    start()?;
    match driver::current() {
        0 => choose(DEVICE.get()),
        current => Ok(current),
    }
}

/// Makes a device's primary context this thread's.
pub fn choose(device: i32) -> Result<u64, Code> {
    start()?;
    let known = with_registry(|registry| registry.primary.get(&device).copied());
    let context = match known {
        Some(context) => context,
        None => {
            let context = with(|driver| driver.retain(device))?;
            with_registry(|registry| registry.primary.insert(device, context));
            context
        }
    };
    driver::set_current(context)?;
    DEVICE.set(device);
    Ok(context)
}

/// Ends the primary context of this thread's device, with all in it.
pub fn reset() -> Result<(), Code> {
    start()?;
    let context = context()?;
    // What still waits runs first; an error of it ends with the context.
    let _ = with_context(|context| context.wait_all());
    let modules = with_registry(|registry| {
        registry.primary.retain(|_, known| *known != context);
        registry.functions.retain(|(of, _), _| *of != context);
        let modules: Vec<u64> = registry
            .modules
            .iter()
            .filter(|((of, _), _)| *of == context)
            .filter_map(|(_, m)| m.ok())
            .collect();
        registry.modules.retain(|(of, _), _| *of != context);
        modules
    });
    for module in modules {
        let _ = with_context(|context| context.unload(module));
    }
    let device = with(|driver| driver.device_of(context))?;
    driver::set_current(0)?;
    with(|driver| driver.reset(device))
}

/// Registers a fat binary: a wrapper of magic, version and the container's address. Returns its name.
///
/// # Safety
/// `wrapper` is null or such a wrapper, which lives as long as the program.
pub unsafe fn register(wrapper: *const c_void) -> usize {
    let container = if wrapper.is_null() {
        0
    } else {
        // SAFETY: the caller's word.
        let magic = unsafe { wrapper.cast::<u32>().read() };
        // SAFETY: as above; the address follows two numbers of 32 bits.
        let container = unsafe { wrapper.cast::<*const c_void>().add(1).read() };
        if magic == fatbin::WRAPPER { container.expose_provenance() } else { 0 }
    };
    with_registry(|registry| {
        registry.next += 1;
        let name = registry.next;
        registry.binaries.insert(name, Binary { container, ..Binary::default() });
        name
    })
}

/// Registers a kernel by the address of its stub on the host.
pub fn register_kernel(binary: usize, host: usize, name: &str) {
    with_registry(|registry| {
        if let Some(binary) = registry.binaries.get_mut(&binary) {
            binary.kernels.insert(host, name.to_owned());
        }
    });
}

/// Registers a variable by its address on the host; of a managed one, of the pointer to it.
pub fn register_variable(binary: usize, host: usize, name: &str, bytes: usize, managed: bool) {
    with_registry(|registry| {
        if let Some(binary) = registry.binaries.get_mut(&binary) {
            let managed = managed.then_some(Shadow(host));
            binary.variables.push(Variable { host, name: name.to_owned(), bytes, managed });
        }
    });
}

/// Forgets a binary, at the end of a program.
pub fn unregister(binary: usize) {
    let last = with_registry(|registry| {
        registry.binaries.remove(&binary);
        registry.binaries.is_empty()
    });
    if last && with(|driver| Ok(driver.contexts_mut().any(|context| context.has_work()))) == Ok(true) {
        say("the program ends while work waits to run: nobody waited for it, so it did not run");
    }
}

impl Registry {
    /// The module of a binary in a context.
    fn module(&mut self, context: u64, binary: usize) -> Result<u64, Code> {
        if let Some(known) = self.modules.get(&(context, binary)) {
            return *known;
        }
        let loaded = self.load(binary);
        self.modules.insert((context, binary), loaded);
        if let (Ok(module), Some(binary)) = (loaded, self.binaries.get(&binary)) {
            for variable in &binary.variables {
                if let Some(Shadow(shadow)) = variable.managed {
                    let (at, _) = with_context(|context| context.variable(module, &variable.name))?;
                    // SAFETY: the program registered the pointer, which is its own for as long as it runs.
                    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(shadow).write(at) };
                }
            }
        }
        loaded
    }

    fn load(&self, binary: usize) -> Result<u64, Code> {
        let container = self.binaries.get(&binary).map_or(0, |b| b.container);
        let capability = with_context(|context| Ok(context.settings().capability))?;
        // SAFETY: registered as a container, which lives as long as the program.
        let bytes = unsafe { container_bytes(std::ptr::with_exposed_provenance(container)) };
        let Some(bytes) = bytes else {
            say(
                "the program's fat binary is broken, or from a compiler that this runtime does not know; build it anew",
            );
            return Err(Code::INVALID_IMAGE);
        };
        let (arch, text) = fatbin::ptx(bytes, capability).map_err(|bad| {
            say(&bad.to_string());
            if matches!(bad, fatbin::Bad::Broken(_)) { Code::INVALID_IMAGE } else { Code::NO_BINARY_FOR_GPU }
        })?;
        let program = std::env::current_exe().ok();
        let program = program.as_deref().and_then(|path| path.file_name()).and_then(|name| name.to_str());
        let name = format!("{}.sm_{arch}.ptx", program.unwrap_or("program"));
        with_context(|context| Ok(context.load_named(&name, &text)))?.map_err(|(code, told)| {
            say(&format!("{name}: {told}"));
            code
        })
    }
}

/// The driver's function of a kernel, by the address of its stub, or by the driver's handle itself.
pub fn function(host: usize) -> Result<u64, Code> {
    let context = context()?;
    let found = with_registry(|registry| {
        if let Some(known) = registry.functions.get(&(context, host)) {
            return Ok(Some(*known));
        }
        let found = registry.binaries.iter().find(|(_, binary)| binary.kernels.contains_key(&host));
        let Some((binary, name)) = found.map(|(b, binary)| (*b, binary.kernels[&host].clone())) else {
            return Ok(None);
        };
        let module = registry.module(context, binary)?;
        let function = with_context(|context| context.function(module, &name)).map_err(|code| {
            say(&format!("the program's PTX has no kernel {}", vcuda::work::demangled(&name)));
            if code == Code::NOT_FOUND { INVALID_FUNCTION } else { code }
        })?;
        registry.functions.insert((context, host), function);
        Ok(Some(function))
    })?;
    match found {
        Some(function) => Ok(function),
        // A handle of the driver's.
        None => {
            let handle = host as u64;
            let known = with_context(|context| context.params(handle)).is_ok();
            if known { Ok(handle) } else { Err(INVALID_FUNCTION) }
        }
    }
}

/// A variable's address on the device and its bytes, by its address on the host.
pub fn variable(host: usize) -> Result<(u64, usize), Code> {
    let context = context()?;
    with_registry(|registry| {
        let of = |binary: &Binary| binary.variables.iter().find(|v| v.host == host).cloned();
        let found = registry.binaries.iter().find_map(|(name, binary)| Some((*name, of(binary)?)));
        let (binary, variable) = found.ok_or(INVALID_SYMBOL)?;
        let module = registry.module(context, binary)?;
        let (at, bytes) =
            with_context(|context| context.variable(module, &variable.name)).map_err(|code| {
                say(&format!("the program's PTX has no variable {}", vcuda::work::demangled(&variable.name)));
                if code == Code::NOT_FOUND { INVALID_SYMBOL } else { code }
            })?;
        Ok((at, bytes.min(variable.bytes)))
    })
}

/// Loads a binary now, because the host is about to use its managed variables.
pub fn begin(binary: usize) -> Result<(), Code> {
    let context = context()?;
    with_registry(|registry| registry.module(context, binary).map(drop))
}
