//! Modules, their kernels and variables, launches, occupancy.

use std::ffi::{c_char, c_int, c_uint, c_void};

use ptxvm::Launch;

use super::{Entry, Handle, answer, checked, export, give, give_handle, kept, known, text};
use crate::code::{Code, say};
use crate::driver::{self, with_context};
use crate::fatbin;

/// CUlaunchAttributeID of launches all of whose blocks run at the same time.
const COOPERATIVE: c_uint = 2;
/// The same of launches that may begin before the kernel ahead has ended.
const PROGRAMMATIC_STREAM_SERIALIZATION: c_uint = 6;
/// The same of the blocks of a cluster.
const CLUSTER_DIMENSION: c_uint = 4;
/// The same of hints: access policy, synchronization policy, how clusters are placed, priority, memory domains, carveout.
const HINTS: [c_uint; 7] = [0, 1, 3, 5, 8, 9, 10];

/// The PTX of an image.
enum Image<'a> {
    /// In place.
    Text(&'a str),
    /// Taken out of a container.
    Held(String),
}

/// The PTX of an image: PTX, a fat binary, or a cubin ([`crate::driver::Context::opened`]).
///
/// # Safety
/// As the driver's documentation says of cuModuleLoadData's image, which lives as long as the result.
unsafe fn opened<'a>(image: *const c_void) -> Result<Image<'a>, Code> {
    // Anything shorter than a mark ends with a zero before it does.
    // SAFETY: the caller's word, for this whole function.
    let byte = |i: usize| unsafe { image.cast::<u8>().add(i).read() };
    let starts = |mark: [u8; 4]| (0..4).all(|i| byte(i) == mark[i]);
    if starts(*b"\x7fELF") {
        // SAFETY: as above.
        let header = unsafe { image.cast::<[u8; driver::ELF_HEADER]>().read() };
        // SAFETY: as above.
        let rest = unsafe { text(image.cast::<c_char>().add(driver::ELF_HEADER)) }.unwrap_or_default();
        return with_context(|context| context.opened(&header, rest)).map(Image::Text);
    }
    let mut container = image;
    if starts(fatbin::WRAPPER.to_le_bytes()) {
        // Magic, version, and where the container is.
        // SAFETY: as above.
        container = unsafe { image.cast::<*const c_void>().add(1).read() };
    } else if !starts(fatbin::MAGIC.to_le_bytes()) {
        // SAFETY: as above.
        return unsafe { text(image.cast()) }.map(Image::Text);
    }
    // SAFETY: as above.
    let bytes = unsafe { container_bytes(container) }.ok_or(Code::INVALID_IMAGE)?;
    with_context(|context| context.opened_fat(bytes)).map(Image::Held)
}

/// A fat binary's bytes, by its header.
///
/// # Safety
/// `container` is null or a fat binary, which lives as long as the result.
pub unsafe fn container_bytes<'a>(container: *const c_void) -> Option<&'a [u8]> {
    if container.is_null() {
        return None;
    }
    // SAFETY: the caller's word.
    let header = unsafe { container.cast::<[u8; fatbin::HEADER]>().read_unaligned() };
    let bytes = fatbin::size(&header)?;
    // SAFETY: as above.
    Some(unsafe { std::slice::from_raw_parts(container.cast(), bytes) })
}

/// CUlaunchAttribute.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    id: c_uint,
    _padding: c_uint,
    value: [c_int; 16],
}

/// CUlaunchConfig.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *const Attribute,
    count: c_uint,
}

impl Attribute {
    /// That of a launch all of whose blocks run at the same time.
    pub fn cooperative() -> Self {
        let mut value = [0; 16];
        value[0] = 1;
        Self { id: COOPERATIVE, _padding: 0, value }
    }
}

impl Config {
    /// A launch without attributes.
    pub fn new(grid: [c_uint; 3], block: [c_uint; 3], shared_bytes: c_uint, stream: Handle) -> Self {
        Self { grid, block, shared_bytes, stream, attributes: std::ptr::null(), count: 0 }
    }

    /// The same with attributes.
    #[must_use]
    pub fn with(self, attributes: *const Attribute, count: c_uint) -> Self {
        Self { attributes, count, ..self }
    }
}

/// The launch of a configuration: its shape, its stream, and whether it may begin before the kernel ahead has ended.
///
/// # Safety
/// As the driver's documentation says of cuLaunchKernelEx's configuration.
pub unsafe fn configured(config: &Config) -> Result<(Launch, Handle, bool), Code> {
    let Config { grid, block, shared_bytes, stream, attributes, count } = *config;
    let mut shape = Launch { grid, block, shared_bytes, cooperative: false, cluster: None };
    let mut early = false;
    for i in 0..count as usize {
        // SAFETY: the caller's word.
        let Attribute { id, value, .. } = unsafe { attributes.add(i).read() };
        match id {
            COOPERATIVE => shape.cooperative = value[0] != 0,
            PROGRAMMATIC_STREAM_SERIALIZATION => early = value[0] != 0,
            CLUSTER_DIMENSION => {
                shape.cluster = Some([value[0], value[1], value[2]].map(c_int::cast_unsigned))
            }
            _ if HINTS.contains(&id) => {}
            _ => {
                say(&format!("launch attribute {id} is not built"));
                return Err(Code::NOT_SUPPORTED);
            }
        }
    }
    Ok((shape, stream, early))
}

/// The arguments' bytes that `extra` of a launch names.
///
/// # Safety
/// As the driver's documentation says of cuLaunchKernel's `extra`.
unsafe fn buffer<'a>(extra: *mut Handle) -> Result<&'a [u8], Code> {
    let (mut start, mut bytes) = (std::ptr::null::<u8>(), 0);
    for i in (0..).step_by(2) {
        // SAFETY: the caller's word: names and values, up to a name of 0.
        let name = unsafe { extra.add(i).read() }.addr();
        if name == 0 {
            break;
        }
        // SAFETY: as above.
        let value = unsafe { extra.add(i + 1).read() };
        match name {
            1 => start = value.cast(), // CU_LAUNCH_PARAM_BUFFER_POINTER
            // SAFETY: as above.
            2 => bytes = unsafe { value.cast::<usize>().read() }, // CU_LAUNCH_PARAM_BUFFER_SIZE
            _ => return Err(Code::INVALID_VALUE),
        }
    }
    if start.is_null() || bytes > 32_764 {
        return Err(Code::INVALID_VALUE);
    }
    // SAFETY: as above.
    Ok(unsafe { std::slice::from_raw_parts(start, bytes) })
}

/// Launches a kernel with the arguments at `params`, or in the buffer that `extra` names.
///
/// # Safety
/// As the driver's documentation says of cuLaunchKernel's pointers.
pub unsafe fn launch(
    function: Handle,
    shape: Launch,
    stream: Handle,
    params: *mut Handle,
    extra: *mut Handle,
) -> Result<(), Code> {
    let places = with_context(|context| context.params(known(function)))?;
    let mut args = Vec::with_capacity(places.len());
    if !extra.is_null() {
        // SAFETY: the caller's word.
        let buffer = unsafe { buffer(extra) }?;
        for (i, (at, bytes)) in places.iter().enumerate() {
            let arg = buffer.get(*at as usize..*at as usize + *bytes as usize).ok_or_else(|| {
                say(&format!(
                    "argument {i} of {} lies behind the buffer of {} bytes",
                    places.len(),
                    buffer.len()
                ));
                Code::INVALID_VALUE
            })?;
            args.push(arg.to_vec());
        }
        return with_context(|context| context.launch(known(function), shape, args, known(stream)));
    }
    for (i, (_, bytes)) in places.iter().enumerate() {
        // SAFETY: the caller has as many pointers as the kernel has parameters, or none.
        let at = if params.is_null() { std::ptr::null_mut() } else { unsafe { params.add(i).read() } };
        if at.is_null() {
            say(&format!("argument {i} of {} is missing", places.len()));
            return Err(Code::INVALID_VALUE);
        }
        // SAFETY: each points to a value of its parameter's size.
        args.push(unsafe { std::slice::from_raw_parts(at.cast::<u8>(), *bytes as usize) }.to_vec());
    }
    with_context(|context| context.launch(known(function), shape, args, known(stream)))
}

export! { TABLE:
    /// Loads PTX, or a cubin that holds some ([`driver::Context::opened`]). Of the options, the logs and what is asked of
    /// the compiler for debuggers are honoured, and others are refused.
    fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        count: c_uint,
        options: *const c_uint,
        values: *const Handle,
    ) {
        // Of errors and of what else there is to say: where to, and how much room there is.
        let (mut log, mut room): ([*mut u8; 2], [usize; 2]) = ([std::ptr::null_mut(); 2], [0; 2]);
        let (mut verbose, mut lines) = (false, false);
        for i in 0..count as usize {
            match (options.add(i).read(), values.add(i).read()) {
                (3, value) => log[1] = value.cast(),       // INFO_LOG_BUFFER
                (4, value) => room[1] = value.addr(),      // INFO_LOG_BUFFER_SIZE_BYTES
                (5, value) => log[0] = value.cast(),       // ERROR_LOG_BUFFER
                (6, value) => room[0] = value.addr(),      // ERROR_LOG_BUFFER_SIZE_BYTES
                // WALL_TIME, OPTIMIZATION_LEVEL, CACHE_MODE and the like: hints to a compiler that there is none of.
                (0 | 1 | 7 | 9 | 11 | 14, _) => {}
                (12, value) => verbose = value.addr() != 0, // LOG_VERBOSE
                (13, value) => lines = value.addr() != 0,  // GENERATE_LINE_INFO
                _ => return Err(Code::NOT_SUPPORTED),
            }
        }
        let say_in = |which: usize, message: &str| {
            if !log[which].is_null() && room[which] > 0 {
                let n = message.len().min(room[which] - 1);
                std::ptr::copy_nonoverlapping(message.as_ptr(), log[which], n);
                log[which].add(n).write(0);
            }
        };
        if image.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let held;
        let text = match opened(image)? {
            Image::Text(text) => text,
            Image::Held(text) => {
                held = text;
                &held
            }
        };
        if verbose {
            let lines = if lines { "with" } else { "without" };
            say_in(1, &format!("compiled {lines} line numbers"));
        }
        match with_context(|context| Ok(context.load(text)))? {
            Ok(handle) => give_handle(module, handle),
            Err((code, message)) => {
                say_in(0, &message);
                Err(code)
            }
        }
    }

    /// Unloads a module.
    fn cuModuleUnload(module: Handle) {
        with_context(|context| context.unload(known(module)))
    }

    /// A kernel of a module.
    fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) {
        let name = text(name)?;
        give_handle(function, with_context(|context| context.function(known(module), name))?)
    }

    /// A kernel's needs and limits.
    fn cuFuncGetAttribute(value: *mut c_int, which: c_uint, function: Handle) {
        give(value, with_context(|context| context.function_attribute(known(function), which))?)
    }

    /// Allows a kernel something.
    fn cuFuncSetAttribute(function: Handle, which: c_uint, value: c_int) {
        with_context(|context| context.set_function_attribute(known(function), which, value))
    }

    /// The most blocks of a cluster of a kernel.
    fn cuOccupancyMaxPotentialClusterSize(size: *mut c_int, function: Handle, config: *const Config) {
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        give(size, with_context(|context| context.most_blocks_of_cluster(known(function)))? as c_int)
    }

    /// How many clusters of a launch the device holds at once.
    fn cuOccupancyMaxActiveClusters(clusters: *mut c_int, function: Handle, config: *const Config) {
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let (shape, ..) = configured(&config.read())?;
        give(clusters, with_context(|context| context.clusters_at_once(known(function), &shape))?)
    }

    /// How many blocks of a kernel a multiprocessor holds at once.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        function: Handle,
        threads: c_int,
        shared_bytes: usize,
    ) {
        give(blocks, with_context(|context| context.occupancy(known(function), threads, shared_bytes))?)
    }

    /// Runs a kernel.
    fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        params: *mut Handle,
        extra: *mut Handle,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let shape = Launch { grid, block, shared_bytes, cooperative: false, cluster: None };
        launch(function, shape, stream, params, extra)
    }

    /// Launches a kernel with attributes.
    fn cuLaunchKernelEx(config: *const Config, function: Handle, params: *mut Handle, extra: *mut Handle) {
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let (shape, stream, early) = configured(&config.read())?;
        if early {
            with_context(|context| context.may_begin_early(known(function), known(stream)))?;
        }
        launch(function, shape, stream, params, extra)
    }

    /// Launches a kernel all of whose blocks run at the same time.
    fn cuLaunchCooperativeKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        params: *mut Handle,
    ) {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let shape = Launch { grid, block, shared_bytes, cooperative: true, cluster: None };
        launch(function, shape, stream, params, std::ptr::null_mut())
    }

    /// Loads PTX, a fat binary, or a cubin that holds PTX.
    fn cuModuleLoadData(module: *mut Handle, image: *const c_void) {
        checked(cuModuleLoadDataEx(module, image, 0, std::ptr::null(), std::ptr::null()))
    }

    /// Loads a fat binary.
    fn cuModuleLoadFatBinary(module: *mut Handle, image: *const c_void) {
        checked(cuModuleLoadData(module, image))
    }

    /// Loads a file.
    fn cuModuleLoad(module: *mut Handle, path: *const c_char) {
        let path = text(path)?;
        let mut image = std::fs::read(path).map_err(|e| {
            say(&format!("{path}: {e}"));
            Code::FILE_NOT_FOUND
        })?;
        // Text ends with a zero, and a broken container is no longer than its header says.
        if let Some(header) = image.first_chunk() {
            let least = fatbin::size(header).unwrap_or(0);
            if least > image.len() {
                say(&format!("{path}: the fat binary ends too early"));
                return Err(Code::INVALID_IMAGE);
            }
        }
        image.resize(image.len() + driver::ELF_HEADER, 0);
        checked(cuModuleLoadData(module, image.as_ptr().cast()))
    }

    /// A variable of a module; one of address and bytes may be null.
    fn cuModuleGetGlobal_v2(address: *mut u64, bytes: *mut usize, module: Handle, name: *const c_char) {
        let name = text(name)?;
        let (at, size) = with_context(|context| context.variable(known(module), name))?;
        if !address.is_null() {
            give(address, at)?;
        }
        if bytes.is_null() { Ok(()) } else { give(bytes, size) }
    }

    /// When modules are loaded: at once.
    fn cuModuleGetLoadingMode(mode: *mut c_uint) {
        give(mode, 1)
    }

    /// A kernel's name.
    fn cuFuncGetName(name: *mut *const c_char, function: Handle) {
        let told = with_context(|context| context.function_name(known(function)).map(str::to_owned))?;
        give(name, kept(told))
    }

    /// A kernel's module.
    fn cuFuncGetModule(module: *mut Handle, function: Handle) {
        give_handle(module, with_context(|context| context.function_module(known(function)))?)
    }

    /// A parameter of a kernel: where it is, and its bytes.
    fn cuFuncGetParamInfo(function: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        let places = with_context(|context| context.params(known(function)))?;
        let (at, size) = *places.get(index).ok_or(Code::INVALID_VALUE)?;
        give(offset, at as usize)?;
        let size = size as usize;
        if bytes.is_null() { Ok(()) } else { give(bytes, size) }
    }

    /// A hint of how caches are cut, of which there are none.
    fn cuFuncSetCacheConfig(function: Handle, config: c_uint) {
        with_context(|context| context.params(known(function)))?;
        if config <= 3 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// How many blocks of a kernel a multiprocessor holds at once; flags ask for no caching.
    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int,
        function: Handle,
        threads: c_int,
        shared_bytes: usize,
        flags: c_uint,
    ) {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        checked(cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared_bytes))
    }

    /// The block of most threads at once on a multiprocessor, and the least grid that fills the device with such blocks.
    fn cuOccupancyMaxPotentialBlockSize(
        least_grid: *mut c_int,
        block: *mut c_int,
        function: Handle,
        shared_of: Option<unsafe extern "C" fn(c_int) -> usize>,
        shared_bytes: usize,
        limit: c_int,
    ) {
        let multiprocessors = with_context(|context| Ok(context.settings().multiprocessors))?;
        let most = with_context(|context| context.function_attribute(known(function), 0))?;
        let most = if limit > 0 { most.min(limit) } else { most };
        let mut best = (0, 0, 0);
        for threads in (1..=most / 32).rev().map(|warps| warps * 32) {
            let shared = shared_of.map_or(shared_bytes, |f| f(threads));
            let blocks = with_context(|context| context.occupancy(known(function), threads, shared))?;
            if blocks * threads > best.0 {
                best = (blocks * threads, threads, blocks);
            }
        }
        give(least_grid, best.2 * multiprocessors)?;
        give(block, best.1)
    }

    /// Bytes of dynamic shared memory that each of so many blocks at once may have.
    fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: *mut usize, function: Handle, blocks: c_int, threads: c_int) {
        give(bytes, with_context(|context| context.available_shared(known(function), blocks, threads))?)
    }

    /// Loads a library: a module of this thread's context. Options of compiler and library are hints but for the logs, which
    /// cuModuleLoadDataEx has.
    fn cuLibraryLoadData(
        library: *mut Handle,
        image: *const c_void,
        options: *const c_uint,
        values: *const Handle,
        count: c_uint,
        _library_options: *const c_uint,
        _library_values: *const Handle,
        library_count: c_uint,
    ) {
        if library_count != 0 {
            say("options of cuLibraryLoadData are not built");
            return Err(Code::NOT_SUPPORTED);
        }
        checked(cuModuleLoadDataEx(library, image, count, options, values))
    }

    /// Unloads a library.
    fn cuLibraryUnload(library: Handle) {
        checked(cuModuleUnload(library))
    }

    /// A kernel of a library.
    fn cuLibraryGetKernel(kernel: *mut Handle, library: Handle, name: *const c_char) {
        checked(cuModuleGetFunction(kernel, library, name))
    }

    /// The module of a library.
    fn cuLibraryGetModule(module: *mut Handle, library: Handle) {
        give_handle(module, known(library))
    }

    /// A variable of a library.
    fn cuLibraryGetGlobal(address: *mut u64, bytes: *mut usize, library: Handle, name: *const c_char) {
        checked(cuModuleGetGlobal_v2(address, bytes, library, name))
    }

    /// A managed variable of a library.
    fn cuLibraryGetManaged(address: *mut u64, bytes: *mut usize, library: Handle, name: *const c_char) {
        checked(cuModuleGetGlobal_v2(address, bytes, library, name))
    }

    /// The function of a kernel: the same.
    fn cuKernelGetFunction(function: *mut Handle, kernel: Handle) {
        with_context(|context| context.params(known(kernel)))?;
        give_handle(function, known(kernel))
    }
}
