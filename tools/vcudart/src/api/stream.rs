//! Streams, events and graphs by capture: the driver's, with a context.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};

use vcuda::api::stream as driver;
use vcuda::code::{Code, say};
use vcuda::driver::with_context;

use super::{Handle, answer, checked, export, give, known};
use crate::registry;

export! {
    /// A stream.
    fn cudaStreamCreate(stream: *mut Handle) {
        checked(cudaStreamCreateWithFlags(stream, 0))
    }

    /// A stream; 1 for one that is not ordered with the legacy stream.
    fn cudaStreamCreateWithFlags(stream: *mut Handle, flags: c_uint) {
        registry::context()?;
        checked(driver::cuStreamCreate(stream, flags))
    }

    /// A stream with a priority, which changes nothing.
    fn cudaStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int) {
        registry::context()?;
        checked(driver::cuStreamCreateWithPriority(stream, flags, priority))
    }

    /// Ends a stream.
    fn cudaStreamDestroy(stream: Handle) {
        registry::context()?;
        checked(driver::cuStreamDestroy_v2(stream))
    }

    /// Waits for a stream.
    fn cudaStreamSynchronize(stream: Handle) {
        registry::context()?;
        checked(driver::cuStreamSynchronize(stream))
    }

    /// Whether a stream's work is done.
    fn cudaStreamQuery(stream: Handle) {
        registry::context()?;
        checked(driver::cuStreamQuery(stream))
    }

    /// Has a stream wait for an event.
    fn cudaStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) {
        registry::context()?;
        checked(driver::cuStreamWaitEvent(stream, event, flags))
    }

    /// The flags of a stream.
    fn cudaStreamGetFlags(stream: Handle, flags: *mut c_uint) {
        registry::context()?;
        checked(driver::cuStreamGetFlags(stream, flags))
    }

    /// The priority of a stream.
    fn cudaStreamGetPriority(stream: Handle, priority: *mut c_int) {
        registry::context()?;
        checked(driver::cuStreamGetPriority(stream, priority))
    }

    /// A hint of caches, of how threads wait, or of priority: an attribute of launches (1, 3, 8), whose value makes no difference.
    fn cudaStreamSetAttribute(stream: Handle, which: c_uint, value: *const c_void) {
        registry::context()?;
        with_context(|context| context.stream_told(known(stream)))?;
        if value.is_null() || ![1, 3, 8].contains(&which) {
            return Err(Code::INVALID_VALUE);
        }
        Ok(())
    }

    /// Gives back what caches keep: nothing.
    fn cudaCtxResetPersistingL2Cache() {
        registry::context().map(drop)
    }

    /// A number of a stream: its handle.
    fn cudaStreamGetId(stream: Handle, id: *mut c_ulonglong) {
        registry::context()?;
        with_context(|context| context.stream_told(known(stream)))?;
        give(id, known(stream).max(vcuda::driver::LEGACY))
    }

    /// A function of the host behind a stream's work, with stream and status.
    fn cudaStreamAddCallback(
        stream: Handle,
        f: Option<unsafe extern "C" fn(*mut c_void, c_uint, *mut c_void)>,
        data: Handle,
        flags: c_uint,
    ) {
        registry::context()?;
        checked(driver::cuStreamAddCallback(stream, f, data, flags))
    }

    /// Who may use managed memory while work runs, which is nobody here.
    fn cudaStreamAttachMemAsync(stream: Handle, address: Handle, bytes: usize, flags: c_uint) {
        registry::context()?;
        checked(vcuda::api::memory::cuStreamAttachMemAsync(stream, known(address), bytes, flags))
    }

    /// Records the calls that follow instead of running them.
    fn cudaStreamBeginCapture(stream: Handle, mode: c_uint) {
        registry::context()?;
        checked(driver::cuStreamBeginCapture_v2(stream, mode))
    }

    /// Ends that.
    fn cudaStreamEndCapture(stream: Handle, graph: *mut Handle) {
        registry::context()?;
        checked(driver::cuStreamEndCapture(stream, graph))
    }

    /// Whether a stream is captured: 0 no, 1 yes, 2 it was broken.
    fn cudaStreamIsCapturing(stream: Handle, status: *mut c_uint) {
        registry::context()?;
        checked(driver::cuStreamIsCapturing(stream, status))
    }

    /// An event.
    fn cudaEventCreate(event: *mut Handle) {
        checked(cudaEventCreateWithFlags(event, 0))
    }

    /// An event; 1 for waiting asleep, 2 for no timing.
    fn cudaEventCreateWithFlags(event: *mut Handle, flags: c_uint) {
        registry::context()?;
        checked(driver::cuEventCreate(event, flags))
    }

    /// Ends an event.
    fn cudaEventDestroy(event: Handle) {
        registry::context()?;
        checked(driver::cuEventDestroy_v2(event))
    }

    /// Records an event behind a stream's work.
    fn cudaEventRecord(event: Handle, stream: Handle) {
        registry::context()?;
        checked(driver::cuEventRecord(event, stream))
    }

    /// The same; flags are for captures.
    fn cudaEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) {
        registry::context()?;
        checked(driver::cuEventRecordWithFlags(event, stream, flags))
    }

    /// Waits for an event.
    fn cudaEventSynchronize(event: Handle) {
        registry::context()?;
        checked(driver::cuEventSynchronize(event))
    }

    /// Whether an event's work is done.
    fn cudaEventQuery(event: Handle) {
        registry::context()?;
        checked(driver::cuEventQuery(event))
    }

    /// Milliseconds that this machine took between two events.
    fn cudaEventElapsedTime(milliseconds: *mut f32, from: Handle, to: Handle) {
        registry::context()?;
        checked(driver::cuEventElapsedTime(milliseconds, from, to))
    }

    /// Makes a graph executable.
    fn cudaGraphInstantiate(executable: *mut Handle, graph: Handle, flags: c_ulonglong) {
        registry::context()?;
        checked(driver::cuGraphInstantiateWithFlags(executable, graph, flags))
    }

    /// The same.
    fn cudaGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: c_ulonglong) {
        checked(cudaGraphInstantiate(executable, graph, flags))
    }

    /// Puts a graph's work where it would be needed, which is done already.
    fn cudaGraphUpload(_executable: Handle, stream: Handle) {
        registry::context()?;
        with_context(|context| context.stream_told(known(stream)).map(drop))
    }

    /// Runs an executable graph.
    fn cudaGraphLaunch(executable: Handle, stream: Handle) {
        registry::context()?;
        checked(driver::cuGraphLaunch(executable, stream))
    }

    /// Ends a graph.
    fn cudaGraphDestroy(graph: Handle) {
        registry::context()?;
        checked(driver::cuGraphDestroy(graph))
    }

    /// Ends an executable graph.
    fn cudaGraphExecDestroy(executable: Handle) {
        registry::context()?;
        checked(driver::cuGraphExecDestroy(executable))
    }

    /// How many nodes a graph has; their handles are not built.
    fn cudaGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        registry::context()?;
        checked(driver::cuGraphGetNodes(graph, nodes, count))
    }

    /// Where a profiler begins: there is none.
    fn cudaProfilerStart() {
        registry::context().map(drop)
    }

    /// Where it ends.
    fn cudaProfilerStop() {
        registry::context().map(drop)
    }

    /// The address of a driver's function by its name.
    fn cudaGetDriverEntryPoint(
        symbol: *const c_char,
        address: *mut *const (),
        flags: c_ulonglong,
        status: *mut c_uint,
    ) {
        registry::start()?;
        let mut found = 0;
        let code = vcuda::api::device::cuGetProcAddress_v2(symbol, address, 0, flags, &raw mut found);
        if !status.is_null() {
            give(status, found)?;
        }
        checked(code)
    }

    /// The same for a version of the driver; it has one form of each.
    fn cudaGetDriverEntryPointByVersion(
        symbol: *const c_char,
        address: *mut *const (),
        _version: c_uint,
        flags: c_ulonglong,
        status: *mut c_uint,
    ) {
        checked(cudaGetDriverEntryPoint(symbol, address, flags, status))
    }

    /// Tables that only NVIDIA's own libraries know.
    fn cudaGetExportTable(_table: *mut *const c_void, _which: *const [u8; 16]) {
        say("the program uses a library of NVIDIA's that needs NVIDIA's own runtime: it cannot run here");
        Err(Code::NOT_SUPPORTED)
    }
}
