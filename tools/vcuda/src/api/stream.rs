//! Streams, events and graphs.

use std::ffi::{c_int, c_uint, c_void};

use super::{Entry, Handle, answer, checked, export, give, give_handle, known};
use crate::code::{Code, say};
use crate::driver::{self, with_context};
use crate::work::Call;

export! { TABLE:
    /// A stream.
    fn cuStreamCreate(stream: *mut Handle, flags: c_uint) {
        give_handle(stream, with_context(|context| context.stream(flags, 0))?)
    }

    /// Ends a stream.
    fn cuStreamDestroy_v2(stream: Handle) {
        with_context(|context| context.destroy_stream(known(stream)))
    }

    /// Waits for a stream.
    fn cuStreamSynchronize(stream: Handle) {
        with_context(|context| context.wait(known(stream)))
    }

    /// Records the calls that follow instead of running them.
    fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) {
        with_context(|context| context.begin_capture(known(stream), mode))
    }

    /// Ends that.
    fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) {
        let ended = with_context(|context| context.end_capture(known(stream)));
        give_handle(graph, ended.unwrap_or(0))?;
        ended.map(drop)
    }

    /// An event.
    fn cuEventCreate(event: *mut Handle, flags: c_uint) {
        give_handle(event, with_context(|context| context.event(flags))?)
    }

    /// Ends an event.
    fn cuEventDestroy_v2(event: Handle) {
        with_context(|context| context.destroy_event(known(event)))
    }

    /// Records an event behind a stream's work.
    fn cuEventRecord(event: Handle, stream: Handle) {
        with_context(|context| context.record(known(event), known(stream)))
    }

    /// Waits for an event.
    fn cuEventSynchronize(event: Handle) {
        with_context(|context| context.wait_event(known(event)))
    }

    /// Milliseconds between two events.
    fn cuEventElapsedTime(milliseconds: *mut f32, from: Handle, to: Handle) {
        give(milliseconds, with_context(|context| context.elapsed(known(from), known(to)))?)
    }

    /// Makes a graph executable.
    fn cuGraphInstantiateWithFlags(executable: *mut Handle, graph: Handle, flags: u64) {
        give_handle(executable, with_context(|context| context.instantiate(known(graph), flags))?)
    }

    /// Runs an executable graph.
    fn cuGraphLaunch(executable: Handle, stream: Handle) {
        with_context(|context| context.launch_graph(known(executable), known(stream)))
    }

    /// Ends a graph.
    fn cuGraphDestroy(graph: Handle) {
        with_context(|context| context.destroy_graph(known(graph)))
    }

    /// Ends an executable graph.
    fn cuGraphExecDestroy(executable: Handle) {
        with_context(|context| context.destroy_executable(known(executable)))
    }

    /// A stream with a priority, which changes nothing.
    fn cuStreamCreateWithPriority(stream: *mut Handle, flags: c_uint, priority: c_int) {
        give_handle(stream, with_context(|context| context.stream(flags, priority))?)
    }

    /// Whether a stream's work is done.
    fn cuStreamQuery(stream: Handle) {
        with_context(|context| context.query(known(stream)))
    }

    /// Has a stream wait for an event.
    fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        with_context(|context| context.wait_for_event(known(stream), known(event)))
    }

    /// The flags of a stream.
    fn cuStreamGetFlags(stream: Handle, flags: *mut c_uint) {
        give(flags, with_context(|context| context.stream_told(known(stream)))?.0)
    }

    /// The priority of a stream.
    fn cuStreamGetPriority(stream: Handle, priority: *mut c_int) {
        give(priority, with_context(|context| context.stream_told(known(stream)))?.1)
    }

    /// The context of a stream.
    fn cuStreamGetCtx(stream: Handle, context: *mut Handle) {
        with_context(|context| context.stream_told(known(stream)).map(drop))?;
        give_handle(context, driver::current())
    }

    /// A function of the host behind a stream's work.
    fn cuLaunchHostFunc(stream: Handle, f: Option<unsafe extern "C" fn(*mut c_void)>, data: Handle) {
        let call = Call::Plain(f.ok_or(Code::INVALID_VALUE)?);
        with_context(|context| context.call(known(stream), call, data.expose_provenance()))
    }

    /// The same with stream and status.
    fn cuStreamAddCallback(
        stream: Handle,
        f: Option<unsafe extern "C" fn(*mut c_void, c_uint, *mut c_void)>,
        data: Handle,
        flags: c_uint,
    ) {
        if flags != 0 {
            return Err(Code::INVALID_VALUE);
        }
        let call = Call::Callback(f.ok_or(Code::INVALID_VALUE)?, known(stream));
        with_context(|context| context.call(known(stream), call, data.expose_provenance()))
    }

    /// Whether a stream is captured: 0 no, 1 yes, 2 it was broken.
    fn cuStreamIsCapturing(stream: Handle, status: *mut c_uint) {
        give(status, with_context(|context| context.capture_status(known(stream)))?)
    }

    /// Whether an event's work is done.
    fn cuEventQuery(event: Handle) {
        with_context(|context| context.query_event(known(event)))
    }

    /// Records an event; flags are for captures.
    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) {
        if flags != 0 {
            return Err(Code::NOT_SUPPORTED);
        }
        checked(cuEventRecord(event, stream))
    }

    /// The second form, which differs in what it says of broken contexts alone.
    fn cuEventElapsedTime_v2(milliseconds: *mut f32, from: Handle, to: Handle) {
        checked(cuEventElapsedTime(milliseconds, from, to))
    }

    /// How many nodes a graph has; their handles are not built.
    fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) {
        if !nodes.is_null() {
            say("nodes of graphs are not built");
            return Err(Code::NOT_SUPPORTED);
        }
        give(count, with_context(|context| context.graph_nodes(known(graph)))?)
    }
}
