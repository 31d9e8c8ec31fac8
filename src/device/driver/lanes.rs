//! Page-locked memory that the caller holds, and the two streams of its copies.

use super::*;

/// CU_MEMHOSTALLOC_DEVICEMAP: kernels may read it.
const MAPPED: u32 = 2;

/// The driver's form of an address.
pub(super) fn pointer(ptr: HostPtr) -> *mut c_void {
    ptr::with_exposed_provenance_mut(ptr.0 as usize)
}

impl State {
    pub(super) fn host_alloc(&mut self, bytes: usize) -> Result<HostPtr, DeviceError> {
        let mut memory = ptr::null_mut();
        // SAFETY: the pointer is to a local; what is made is given back by `host_free`, or when the state is dropped.
        let result = unsafe { sys::cuMemHostAlloc(&mut memory, bytes, MAPPED) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let message = format!(
                "the host has no {} more that can be page-locked; free memory there, raise a container's limit, or do without \
                 optimizer.offload and model.per_layer_embeddings = \"host\"",
                gib(bytes as u64)
            );
            return Err(DeviceError::out_of_memory(&self.name, message));
        }
        self.check("get page-locked memory", result)?;
        // SAFETY: the driver's memory of so many bytes, which nobody else knows of.
        unsafe { ptr::write_bytes(memory.cast::<u8>(), 0, bytes) };
        let address = memory.expose_provenance() as u64;
        self.host.insert(address);
        Ok(HostPtr(address))
    }

    pub(super) fn host_free(&mut self, ptr: HostPtr) -> Result<(), DeviceError> {
        self.wait_for_all()?;
        if self.host.remove(&ptr.0) {
            // SAFETY: it is ours, forgotten, and no work is under way.
            self.check("give page-locked memory back", unsafe { sys::cuMemFreeHost(pointer(ptr)) })?;
        }
        Ok(())
    }

    pub(super) fn host_mapped(&self, ptr: HostPtr) -> Result<Ptr, DeviceError> {
        let mut address = 0;
        // SAFETY: the pointer is to a local, and the memory page-locked.
        let result = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, pointer(ptr), 0) };
        self.check("map memory of the host", result)?;
        Ok(Ptr(address))
    }

    pub(super) fn host_write(&mut self, dst: HostPtr, bytes: &[u8]) -> Result<(), DeviceError> {
        self.wait_for_all()?;
        // SAFETY: the caller has so many bytes there, and no work is under way that uses them.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), pointer(dst).cast(), bytes.len()) };
        Ok(())
    }

    pub(super) fn host_read(&mut self, src: HostPtr, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.wait_for_all()?;
        // SAFETY: as above.
        unsafe {
            ptr::copy_nonoverlapping(pointer(src).cast_const().cast(), bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    /// The work of all lanes, also that which is held back.
    fn wait_for_all(&mut self) -> Result<(), DeviceError> {
        self.synchronize()?;
        for lane in self.lanes.iter().filter(|lane| !lane.is_null()) {
            // SAFETY: the stream exists.
            self.check("finish copies", unsafe { sys::cuStreamSynchronize(*lane) })?;
        }
        Ok(())
    }

    fn lane(&mut self, lane: Lane) -> Result<sys::CUstream, DeviceError> {
        let number = match lane {
            Lane::Compute => return Ok(self.stream),
            Lane::In => 0,
            Lane::Out => 1,
        };
        if self.lanes[number].is_null() {
            let mut stream = ptr::null_mut();
            // SAFETY: the pointer is to a local.
            self.check("make a stream", unsafe { sys::cuStreamCreate(&mut stream, NON_BLOCKING) })?;
            self.lanes[number] = stream;
        }
        Ok(self.lanes[number])
    }

    pub(super) fn copy_in(&mut self, dst: Ptr, src: HostPtr, bytes: usize) -> Result<(), DeviceError> {
        let stream = self.lane(Lane::In)?;
        // SAFETY: the caller has so many bytes at both places, and keeps their order by marks.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(dst.0, pointer(src).cast_const(), bytes, stream) };
        self.check("copy to the GPU", result)
    }

    pub(super) fn copy_out(&mut self, dst: HostPtr, src: Ptr, bytes: usize) -> Result<(), DeviceError> {
        let stream = self.lane(Lane::Out)?;
        // SAFETY: as above.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(pointer(dst), src.0, bytes, stream) };
        self.check("copy from the GPU", result)
    }

    pub(super) fn mark(&mut self, lane: Lane, mark: usize) -> Result<(), DeviceError> {
        self.submit()?;
        let stream = self.lane(lane)?;
        if self.marks[mark].is_null() {
            let mut event = ptr::null_mut();
            // SAFETY: the pointer is to a local.
            self.check("make an event", unsafe { sys::cuEventCreate(&mut event, NO_TIMING) })?;
            self.marks[mark] = event;
        }
        // SAFETY: event and stream exist.
        self.check("mark work", unsafe { sys::cuEventRecord(self.marks[mark], stream) })
    }

    pub(super) fn wait_for(&mut self, lane: Lane, mark: usize) -> Result<(), DeviceError> {
        self.submit()?;
        let stream = self.lane(lane)?;
        if self.marks[mark].is_null() {
            return Ok(());
        }
        // SAFETY: event and stream exist. It waits for the recording of now, whatever is recorded later.
        self.check("order work", unsafe { sys::cuStreamWaitEvent(stream, self.marks[mark], 0) })
    }
}
