//! cudaDeviceProp, as CUDA 12 and CUDA 13 lay it out. Both have most fields, at different places.

use vcuda::code::Code;
use vcuda::driver::with;

macro_rules! layout {
    ($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[repr(C)]
        #[allow(non_snake_case, missing_docs, reason = "names of CUDA, which documents them")]
        pub struct $name { $(pub $field: $type,)* }

        impl $name {
            /// Each field: its name, where it begins, and its bytes.
            pub fn fields() -> Vec<(&'static str, usize, usize)> {
                vec![$((stringify!($field), std::mem::offset_of!(Self, $field), size_of::<$type>())),*]
            }

            fn zeros() -> Self {
                // SAFETY: numbers and arrays of them, of which zero bytes are valid ones.
                unsafe { std::mem::zeroed() }
            }
        }
    };
}

/// Both structures, of groups of fields that both have, behind some of which stand fields of CUDA 12 alone; and their ends.
macro_rules! layouts {
    (
        $({ $($field:ident: $type:ty,)* } $(12 { $($old:ident: $old_type:ty),* })?)*
        end 12 { $($end12:ident: $type12:ty,)* }
        end 13 { $($end13:ident: $type13:ty,)* }
    ) => {
        layout! {
            /// The structure that cudaGetDeviceProperties of CUDA 13 fills.
            Properties13 { $($($field: $type,)*)* $($end13: $type13,)* }
        }

        layout! {
            /// The structure that cudaGetDeviceProperties_v2 of CUDA 12 fills.
            Properties12 { $($($field: $type,)* $($($old: $old_type,)*)?)* $($end12: $type12,)* }
        }
    };
}

layouts! {
    {
        name: [u8; 256],
        uuid: [u8; 16],
        luid: [u8; 8],
        luidDeviceNodeMask: u32,
        totalGlobalMem: usize,
        sharedMemPerBlock: usize,
        regsPerBlock: i32,
        warpSize: i32,
        memPitch: usize,
        maxThreadsPerBlock: i32,
        maxThreadsDim: [i32; 3],
        maxGridSize: [i32; 3],
    } 12 { clockRate: i32 }
    {
        totalConstMem: usize,
        major: i32,
        minor: i32,
        textureAlignment: usize,
        texturePitchAlignment: usize,
    } 12 { deviceOverlap: i32 }
    {
        multiProcessorCount: i32,
    } 12 { kernelExecTimeoutEnabled: i32 }
    {
        integrated: i32,
        canMapHostMemory: i32,
    } 12 { computeMode: i32 }
    {
        maxTexture1D: i32,
        maxTexture1DMipmap: i32,
    } 12 { maxTexture1DLinear: i32 }
    {
        maxTexture2D: [i32; 2],
        maxTexture2DMipmap: [i32; 2],
        maxTexture2DLinear: [i32; 3],
        maxTexture2DGather: [i32; 2],
        maxTexture3D: [i32; 3],
        maxTexture3DAlt: [i32; 3],
        maxTextureCubemap: i32,
        maxTexture1DLayered: [i32; 2],
        maxTexture2DLayered: [i32; 3],
        maxTextureCubemapLayered: [i32; 2],
        maxSurface1D: i32,
        maxSurface2D: [i32; 2],
        maxSurface3D: [i32; 3],
        maxSurface1DLayered: [i32; 2],
        maxSurface2DLayered: [i32; 3],
        maxSurfaceCubemap: i32,
        maxSurfaceCubemapLayered: [i32; 2],
        surfaceAlignment: usize,
        concurrentKernels: i32,
        ECCEnabled: i32,
        pciBusID: i32,
        pciDeviceID: i32,
        pciDomainID: i32,
        tccDriver: i32,
        asyncEngineCount: i32,
        unifiedAddressing: i32,
    } 12 { memoryClockRate: i32 }
    {
        memoryBusWidth: i32,
        l2CacheSize: i32,
        persistingL2CacheMaxSize: i32,
        maxThreadsPerMultiProcessor: i32,
        streamPrioritiesSupported: i32,
        globalL1CacheSupported: i32,
        localL1CacheSupported: i32,
        sharedMemPerMultiprocessor: usize,
        regsPerMultiprocessor: i32,
        managedMemory: i32,
        isMultiGpuBoard: i32,
        multiGpuBoardGroupID: i32,
        hostNativeAtomicSupported: i32,
    } 12 { singleToDoublePrecisionPerfRatio: i32 }
    {
        pageableMemoryAccess: i32,
        concurrentManagedAccess: i32,
        computePreemptionSupported: i32,
        canUseHostPointerForRegisteredMem: i32,
        cooperativeLaunch: i32,
    } 12 { cooperativeMultiDeviceLaunch: i32 }
    {
        sharedMemPerBlockOptin: usize,
        pageableMemoryAccessUsesHostPageTables: i32,
        directManagedMemAccessFromHost: i32,
        maxBlocksPerMultiProcessor: i32,
        accessPolicyMaxWindowSize: i32,
        reservedSharedMemPerBlock: usize,
        hostRegisterSupported: i32,
        sparseCudaArraySupported: i32,
        hostRegisterReadOnlySupported: i32,
        timelineSemaphoreInteropSupported: i32,
        memoryPoolsSupported: i32,
        gpuDirectRDMASupported: i32,
        gpuDirectRDMAFlushWritesOptions: u32,
        gpuDirectRDMAWritesOrdering: i32,
        memoryPoolSupportedHandleTypes: u32,
        deferredMappingCudaArraySupported: i32,
        ipcEventSupported: i32,
        clusterLaunch: i32,
        unifiedFunctionPointers: i32,
    }
    end 12 {
        reserved2: [i32; 2],
        reserved1: [i32; 1],
        reserved: [i32; 60],
    }
    end 13 {
        deviceNumaConfig: i32,
        deviceNumaId: i32,
        mpsEnabled: i32,
        hostNumaId: i32,
        gpuPciDeviceID: u32,
        gpuPciSubsystemID: u32,
        hostNumaMultinodeIpcSupported: i32,
        reserved: [i32; 56],
    }
}

/// Fills what both have.
macro_rules! common {
    ($to:ident, $device:ident) => {{
        let attribute = |which: u32| with(|driver| driver.attribute(which, $device));
        let name = format!("vcuda (a virtual GPU on the CPU), device {}", $device);
        $to.name[..name.len()].copy_from_slice(name.as_bytes());
        $to.uuid = *b"vcuda           ";
        $to.uuid[15] = $device as u8;
        $to.totalGlobalMem = with(|driver| Ok(driver.settings.memory))? as usize;
        for (to, which) in
            [(&mut $to.sharedMemPerBlock, 8), (&mut $to.memPitch, 11), (&mut $to.totalConstMem, 9)]
        {
            *to = attribute(which)? as usize;
        }
        for (to, which) in [
            (&mut $to.textureAlignment, 14),
            (&mut $to.texturePitchAlignment, 51),
            (&mut $to.surfaceAlignment, 30),
            (&mut $to.sharedMemPerMultiprocessor, 81),
            (&mut $to.sharedMemPerBlockOptin, 97),
            (&mut $to.reservedSharedMemPerBlock, 111),
        ] {
            *to = attribute(which)? as usize;
        }
        $to.maxThreadsDim = [attribute(2)?, attribute(3)?, attribute(4)?];
        $to.maxGridSize = [attribute(5)?, attribute(6)?, attribute(7)?];
        for (to, which) in [
            (&mut $to.regsPerBlock, 12),
            (&mut $to.warpSize, 10),
            (&mut $to.maxThreadsPerBlock, 1),
            (&mut $to.major, 75),
            (&mut $to.minor, 76),
            (&mut $to.multiProcessorCount, 16),
            (&mut $to.integrated, 18),
            (&mut $to.canMapHostMemory, 19),
            (&mut $to.concurrentKernels, 31),
            (&mut $to.ECCEnabled, 32),
            (&mut $to.pciBusID, 33),
            (&mut $to.pciDeviceID, 34),
            (&mut $to.pciDomainID, 50),
            (&mut $to.tccDriver, 35),
            (&mut $to.asyncEngineCount, 40),
            (&mut $to.unifiedAddressing, 41),
            (&mut $to.memoryBusWidth, 37),
            (&mut $to.l2CacheSize, 38),
            (&mut $to.persistingL2CacheMaxSize, 108),
            (&mut $to.maxThreadsPerMultiProcessor, 39),
            (&mut $to.streamPrioritiesSupported, 78),
            (&mut $to.globalL1CacheSupported, 79),
            (&mut $to.localL1CacheSupported, 80),
            (&mut $to.regsPerMultiprocessor, 82),
            (&mut $to.managedMemory, 83),
            (&mut $to.isMultiGpuBoard, 84),
            (&mut $to.multiGpuBoardGroupID, 85),
            (&mut $to.hostNativeAtomicSupported, 86),
            (&mut $to.pageableMemoryAccess, 88),
            (&mut $to.concurrentManagedAccess, 89),
            (&mut $to.computePreemptionSupported, 90),
            (&mut $to.canUseHostPointerForRegisteredMem, 91),
            (&mut $to.cooperativeLaunch, 95),
            (&mut $to.pageableMemoryAccessUsesHostPageTables, 100),
            (&mut $to.directManagedMemAccessFromHost, 101),
            (&mut $to.maxBlocksPerMultiProcessor, 106),
            (&mut $to.accessPolicyMaxWindowSize, 109),
            (&mut $to.hostRegisterSupported, 99),
            (&mut $to.hostRegisterReadOnlySupported, 113),
            (&mut $to.memoryPoolsSupported, 115),
            (&mut $to.clusterLaunch, 120),
            (&mut $to.unifiedFunctionPointers, 129),
        ] {
            *to = attribute(which)?;
        }
    }};
}

/// A device's properties in the layout of CUDA 13.
///
/// # Errors
/// No such device.
pub fn properties13(device: i32) -> Result<Properties13, Code> {
    with(|driver| driver.device(device))?;
    let mut to = Properties13::zeros();
    common!(to, device);
    (to.deviceNumaId, to.hostNumaId) = (-1, -1);
    Ok(to)
}

/// The same in the layout of CUDA 12.
///
/// # Errors
/// No such device.
pub fn properties12(device: i32) -> Result<Properties12, Code> {
    with(|driver| driver.device(device))?;
    let mut to = Properties12::zeros();
    common!(to, device);
    let attribute = |which: u32| with(|driver| driver.attribute(which, device));
    (to.clockRate, to.memoryClockRate) = (attribute(13)?, attribute(36)?);
    (to.deviceOverlap, to.singleToDoublePrecisionPerfRatio) = (attribute(15)?, attribute(87)?);
    Ok(to)
}
