//! Kernels: launches, attributes, occupancy.

use std::ffi::{c_char, c_int, c_uint, c_void};

use vcuda::api::kept;
use vcuda::api::module as driver_module;
use vcuda::api::module::{Attribute, Config};
use vcuda::driver::with_context;

use super::{Handle, answer, checked, export, give};
use crate::error::INVALID_CONFIGURATION;
use crate::registry;
use vcuda::code::Code;

/// dim3.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Dim3 {
    x: c_uint,
    y: c_uint,
    z: c_uint,
}

/// cudaLaunchConfig_t.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LaunchConfig {
    grid: Dim3,
    block: Dim3,
    shared_bytes: usize,
    stream: Handle,
    attributes: *const Attribute,
    count: c_uint,
}

/// cudaFuncAttributes up to where CUDA 12 and 13 agree.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FunctionAttributes {
    shared_bytes: usize,
    constant_bytes: usize,
    local_bytes: usize,
    threads: c_int,
    registers: c_int,
    ptx_version: c_int,
    binary_version: c_int,
    cache_mode: c_int,
    dynamic_shared_bytes: c_int,
    carveout: c_int,
    cluster: [c_int; 6],
    reserved: [c_int; 16],
}

fn handle(function: u64) -> Handle {
    std::ptr::without_provenance_mut(function as usize)
}

/// Launches a kernel; what the driver calls an invalid value of the shape is an invalid configuration here.
unsafe fn launch(stub: Handle, config: LaunchConfig, args: *mut Handle) -> Result<(), Code> {
    let function = registry::function(stub.addr())?;
    let LaunchConfig { grid, block, shared_bytes, stream, attributes, count } = config;
    let threads = u64::from(block.x) * u64::from(block.y) * u64::from(block.z);
    let most = with_context(|context| context.function_attribute(function, 0))? as u64;
    let dynamic = with_context(|context| context.function_attribute(function, 8))?;
    let shared_bytes = u32::try_from(shared_bytes).map_err(|_| INVALID_CONFIGURATION)?;
    let config = Config::new([grid.x, grid.y, grid.z], [block.x, block.y, block.z], shared_bytes, stream)
        .with(attributes, count);
    // A launch that may begin before the kernel ahead has ended need not, and begins behind it.
    // SAFETY: the caller's word.
    let done = unsafe {
        driver_module::configured(&config).and_then(|(shape, stream, _)| {
            driver_module::launch(handle(function), shape, stream, args, std::ptr::null_mut())
        })
    };
    let blocks = [grid.x > i32::MAX as u32, grid.y > 65_535, grid.z > 65_535, block.z > 64].contains(&true);
    let none = [grid.x, grid.y, grid.z].contains(&0) || threads == 0;
    let wrong = blocks || none || threads > most.min(1024);
    match done {
        Err(Code::INVALID_VALUE) if wrong => Err(INVALID_CONFIGURATION),
        // More dynamic shared memory than the kernel was allowed.
        Err(Code::INVALID_VALUE) if shared_bytes > dynamic as u32 => Err(Code::INVALID_VALUE),
        done => done,
    }
}

export! {
    /// Launches a kernel.
    fn cudaLaunchKernel(
        stub: Handle,
        grid: Dim3,
        block: Dim3,
        args: *mut Handle,
        shared_bytes: usize,
        stream: Handle,
    ) {
        let (attributes, count) = (std::ptr::null(), 0);
        launch(stub, LaunchConfig { grid, block, shared_bytes, stream, attributes, count }, args)
    }

    /// Launches a kernel with attributes.
    fn cudaLaunchKernelExC(config: *const LaunchConfig, stub: Handle, args: *mut Handle) {
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        launch(stub, config.read(), args)
    }

    /// Launches a kernel all of whose blocks run at the same time.
    fn cudaLaunchCooperativeKernel(
        stub: Handle,
        grid: Dim3,
        block: Dim3,
        args: *mut Handle,
        shared_bytes: usize,
        stream: Handle,
    ) {
        let cooperative = Attribute::cooperative();
        let (attributes, count) = (&raw const cooperative, 1);
        launch(stub, LaunchConfig { grid, block, shared_bytes, stream, attributes, count }, args)
    }

    /// A kernel's needs and limits.
    fn cudaFuncGetAttributes(to: *mut FunctionAttributes, stub: Handle) {
        let function = registry::function(stub.addr())?;
        let told = |which: u32| with_context(|context| context.function_attribute(function, which));
        give(
            to,
            FunctionAttributes {
                shared_bytes: told(1)? as usize,
                constant_bytes: told(2)? as usize,
                local_bytes: told(3)? as usize,
                threads: told(0)?,
                registers: told(4)?,
                ptx_version: told(5)?,
                binary_version: told(6)?,
                cache_mode: told(7)?,
                dynamic_shared_bytes: told(8)?,
                carveout: told(9)?,
                cluster: [told(10)?, told(11)?, told(12)?, told(13)?, told(15)?, told(14)?],
                reserved: [0; 16],
            },
        )
    }

    /// Allows a kernel something.
    fn cudaFuncSetAttribute(stub: Handle, which: c_uint, value: c_int) {
        let function = registry::function(stub.addr())?;
        with_context(|context| context.set_function_attribute(function, which, value))
    }

    /// A hint of how caches are cut, of which there are none.
    fn cudaFuncSetCacheConfig(stub: Handle, config: c_uint) {
        checked(driver_module::cuFuncSetCacheConfig(handle(registry::function(stub.addr())?), config))
    }

    /// A hint of how wide banks of shared memory are, which later devices do not have.
    fn cudaFuncSetSharedMemConfig(stub: Handle, config: c_uint) {
        registry::function(stub.addr())?;
        if config <= 2 { Ok(()) } else { Err(Code::INVALID_VALUE) }
    }

    /// A kernel's name in the PTX.
    fn cudaFuncGetName(name: *mut *const c_char, stub: Handle) {
        let function = registry::function(stub.addr())?;
        let told = with_context(|context| context.function_name(function).map(str::to_owned))?;
        give(name, kept(told))
    }

    /// A parameter of a kernel: where it is, and its bytes.
    fn cudaFuncGetParamInfo(stub: Handle, index: usize, offset: *mut usize, bytes: *mut usize) {
        let function = registry::function(stub.addr())?;
        checked(driver_module::cuFuncGetParamInfo(handle(function), index, offset, bytes))
    }

    /// How many blocks of a kernel a multiprocessor holds at once.
    fn cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: *mut c_int,
        stub: Handle,
        threads: c_int,
        shared_bytes: usize,
    ) {
        checked(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, shared_bytes, 0))
    }

    /// The same; flags ask for no caching.
    fn cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int,
        stub: Handle,
        threads: c_int,
        shared_bytes: usize,
        flags: c_uint,
    ) {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        let function = registry::function(stub.addr())?;
        give(blocks, with_context(|context| context.occupancy(function, threads, shared_bytes))?)
    }

    /// Bytes of dynamic shared memory that each of so many blocks at once may have.
    fn cudaOccupancyAvailableDynamicSMemPerBlock(bytes: *mut usize, stub: Handle, blocks: c_int, threads: c_int) {
        let function = registry::function(stub.addr())?;
        give(bytes, with_context(|context| context.available_shared(function, blocks, threads))?)
    }

    /// The most blocks of a cluster of a kernel.
    fn cudaOccupancyMaxPotentialClusterSize(size: *mut c_int, stub: Handle, config: *const LaunchConfig) {
        let function = registry::function(stub.addr())?;
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        give(size, with_context(|context| context.most_blocks_of_cluster(function))? as c_int)
    }

    /// How many clusters of a launch the device holds at once.
    fn cudaOccupancyMaxActiveClusters(clusters: *mut c_int, stub: Handle, config: *const LaunchConfig) {
        let function = registry::function(stub.addr())?;
        if config.is_null() {
            return Err(Code::INVALID_VALUE);
        }
        let LaunchConfig { grid, block, shared_bytes, stream, attributes, count } = config.read();
        let shared_bytes = u32::try_from(shared_bytes).map_err(|_| Code::INVALID_VALUE)?;
        let config = Config::new([grid.x, grid.y, grid.z], [block.x, block.y, block.z], shared_bytes, stream)
            .with(attributes, count);
        checked(driver_module::cuOccupancyMaxActiveClusters(clusters, handle(function), &raw const config))
    }

    /// A function of the host behind a stream's work.
    fn cudaLaunchHostFunc(stream: Handle, f: Option<unsafe extern "C" fn(*mut c_void)>, data: Handle) {
        registry::context()?;
        checked(vcuda::api::stream::cuLaunchHostFunc(stream, f, data))
    }
}
