//! Streams, events and graphs.
//!
//! Work has a number, in the order of the calls. A stream's queue may hold [`Work::After`]: then another stream's work up to a
//! number runs first. So events order streams, and the legacy stream is ordered with all that are not asked to be apart.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Instant;

use super::{Context, LEGACY, PER_THREAD, handle};
use crate::code::{Code, say};
use crate::settings::Graphs;
use crate::work::{Boxed, Call, Host, Side, Work};

pub(super) struct Stream {
    /// Work and its number.
    queue: VecDeque<(u64, Work)>,
    /// The capture that it takes part in.
    capture: Option<u64>,
    /// Whether it is ordered with the legacy stream.
    blocking: bool,
    priority: i32,
    /// Number of the last work that was put in.
    last: u64,
}

impl Stream {
    pub(super) fn new(blocking: bool, priority: i32) -> Self {
        Self { queue: VecDeque::new(), capture: None, blocking, priority, last: 0 }
    }

    /// Whether all work up to a number has run.
    fn passed(&self, serial: u64) -> bool {
        self.queue.front().is_none_or(|(next, _)| *next > serial)
    }
}

pub(super) struct Capture {
    /// The stream that began it.
    origin: u64,
    steps: Vec<Work>,
    broken: bool,
    thread: ThreadId,
    /// Whether calls that could break it are forbidden to all threads, to its own alone, or (relaxed) to none.
    mode: u32,
}

pub(super) struct Event {
    timing: bool,
    /// Number of the last recording; 0 for none.
    recorded: u64,
    /// The stream it was recorded in.
    stream: u64,
    /// The capture it was recorded in.
    captured: Option<u64>,
    /// The last recording that work has passed, and when.
    pub(super) passed: Option<(u64, Instant)>,
}

/// Whether a captured stream takes this work.
fn capturable(work: &Work) -> bool {
    let pageable = |side: &Boxed| matches!(side.at, Side::Host(Host::Copied(_)));
    match work {
        Work::Copy(to, from, _) => !pageable(to) && !pageable(from),
        Work::Launch(..) | Work::Fill(..) | Work::Call(..) => true,
        _ => false,
    }
}

impl Context {
    /// The stream that a handle names: the legacy stream has two names, and each thread a stream under the third.
    fn key(&mut self, stream: u64) -> Result<u64, Code> {
        match stream {
            0 | LEGACY => Ok(LEGACY),
            PER_THREAD => {
                let (of_threads, streams) = (&mut self.of_threads, &mut self.streams);
                Ok(*of_threads.entry(std::thread::current().id()).or_insert_with(|| {
                    let name = handle();
                    streams.insert(name, Stream::new(true, 0));
                    name
                }))
            }
            _ if self.streams.contains_key(&stream) => Ok(stream),
            _ => Err(Code::INVALID_HANDLE),
        }
    }

    /// Runs a stream's work, up to a number, and what of others' must have run before.
    fn drain(&mut self, stream: u64, until: u64) -> Result<(), Code> {
        let mut open = vec![(stream, until)];
        while let Some(&(stream, until)) = open.last() {
            let after = match self.streams.get(&stream).and_then(|s| s.queue.front()) {
                Some((serial, _)) if *serial > until => None,
                Some((_, Work::After(other, at))) => Some(Some((*other, *at))),
                Some(_) => Some(None),
                None => None,
            };
            match after {
                None => {
                    open.pop();
                }
                Some(Some((other, at))) if self.streams.get(&other).is_some_and(|s| !s.passed(at)) => {
                    open.push((other, at));
                }
                Some(_) => self.step(stream)?,
            }
        }
        Ok(())
    }

    /// Runs the next work of a stream.
    fn step(&mut self, stream: u64) -> Result<(), Code> {
        let next = self.streams.get_mut(&stream).and_then(|s| s.queue.pop_front());
        let Some((serial, work)) = next else { return Ok(()) };
        let run = self.run(&work, serial);
        if let Err(code) = run {
            self.failed = Some(code);
        }
        run
    }

    /// Runs all work of a stream.
    pub(super) fn drain_stream(&mut self, stream: u64) -> Result<(), Code> {
        let stream = self.key(stream)?;
        self.drain(stream, u64::MAX)
    }

    /// Runs all work.
    pub(super) fn drain_all(&mut self) -> Result<(), Code> {
        let streams: Vec<u64> = self.streams.keys().copied().collect();
        streams.into_iter().try_for_each(|stream| self.drain(stream, u64::MAX))
    }

    /// Runs a piece of work, if there is any. An error of it is for the next call to tell.
    pub(super) fn go_on(&mut self) -> bool {
        let waiting = |s: &Stream| s.queue.front().map(|(serial, _)| *serial);
        let next = self.streams.iter().filter_map(|(name, s)| Some((waiting(s)?, *name))).min();
        match next {
            // The work with the lowest number has nothing before it that has not run.
            Some((_, stream)) if self.failed.is_none() => {
                let _ = self.step(stream);
                true
            }
            _ => false,
        }
    }

    /// Whether there is work that has not run yet.
    pub fn has_work(&self) -> bool {
        self.failed.is_none() && self.waits(&|work| !matches!(work, Work::Record(_) | Work::After(..)))
    }

    /// Whether work that has not run yet is of some kind.
    pub(super) fn waits(&self, which: &dyn Fn(&Work) -> bool) -> bool {
        fn any(work: &Work, which: &dyn Fn(&Work) -> bool) -> bool {
            match work {
                Work::Graph(_, steps) => which(work) || steps.iter().any(|step| any(step, which)),
                _ => which(work),
            }
        }
        self.streams.values().flat_map(|s| &s.queue).any(|(_, work)| any(work, which))
    }

    /// Breaks captures that a call of this thread, which may wait for work, is not allowed in.
    pub(super) fn unsafe_call(&mut self) -> Result<(), Code> {
        let thread = std::thread::current().id();
        let mut broken = false;
        let forbids = |c: &&mut Capture| c.mode == 0 || c.mode == 1 && c.thread == thread;
        for capture in self.captures.values_mut().filter(forbids) {
            capture.broken = true;
            broken = true;
        }
        if broken { Err(Code::CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    /// Whether a stream is captured.
    pub(super) fn capturing(&mut self, stream: u64) -> Result<bool, Code> {
        let stream = self.key(stream)?;
        Ok(self.streams.get(&stream).is_some_and(|s| s.capture.is_some()))
    }

    /// Breaks the capture of a stream by work that it does not take.
    pub(super) fn uncapturable(&mut self, stream: u64) -> Result<(), Code> {
        let stream = self.key(stream)?;
        let capture = self.streams.get(&stream).and_then(|s| s.capture);
        if let Some(capture) = capture.and_then(|name| self.captures.get_mut(&name)) {
            if capture.broken {
                return Err(Code::CAPTURE_INVALIDATED);
            }
            capture.broken = true;
        }
        say("a captured stream takes launches, fills and copies from page-locked memory");
        Err(Code::CAPTURE_UNSUPPORTED)
    }

    /// Puts work into a stream, or into what is recorded of it; its number, 0 where it is recorded.
    pub(super) fn number(&mut self, stream: u64, work: Work) -> Result<u64, Code> {
        let stream = self.key(stream)?;
        let capture = self.streams.get(&stream).and_then(|s| s.capture);
        if let Some(capture) = capture.and_then(|name| self.captures.get_mut(&name)) {
            if capture.broken {
                return Err(Code::CAPTURE_INVALIDATED);
            }
            if !capturable(&work) {
                return self.uncapturable(stream).map(|()| 0);
            }
            capture.steps.push(work);
            return Ok(0);
        }
        // The legacy stream waits for those that are ordered with it, and they for it.
        let mut ahead: Vec<(u64, u64)> = Vec::new();
        if stream == LEGACY {
            if self.streams.values().any(|s| s.blocking && s.capture.is_some()) {
                self.captures.values_mut().for_each(|capture| capture.broken = true);
                say("the legacy stream is used while a stream that is ordered with it is captured");
                return Err(Code::CAPTURE_IMPLICIT);
            }
            let others = self.streams.iter().filter(|(name, s)| **name != LEGACY && s.blocking);
            ahead.extend(others.filter(|(_, s)| !s.queue.is_empty()).map(|(name, s)| (*name, s.last)));
        } else if self.streams.get(&stream).is_some_and(|s| s.blocking) {
            let legacy = self.streams.get(&LEGACY).filter(|s| !s.queue.is_empty());
            ahead.extend(legacy.map(|s| (LEGACY, s.last)));
        }
        let mut push = |work: Work| {
            self.issued += 1;
            if let Some(s) = self.streams.get_mut(&stream) {
                s.queue.push_back((self.issued, work));
                s.last = self.issued;
            }
        };
        ahead.into_iter().for_each(|(other, at)| push(Work::After(other, at)));
        push(work);
        let first = self.streams.keys().find(|name| **name > PER_THREAD) == Some(&stream);
        if self.settings.early && stream > PER_THREAD && !first {
            self.drain(stream, u64::MAX)?;
        }
        Ok(self.issued)
    }

    /// Puts work into a stream, or into what is recorded of it.
    pub(super) fn put(&mut self, stream: u64, work: Work) -> Result<(), Code> {
        self.number(stream, work).map(drop)
    }

    // ----------------------------------------------------------------------------------------- streams and events

    /// cuStreamCreateWithPriority.
    pub fn stream(&mut self, flags: u32, priority: i32) -> Result<u64, Code> {
        if flags > 1 {
            return Err(Code::INVALID_VALUE);
        }
        let name = handle();
        // What has no such priority gets the next one that there is.
        self.streams.insert(name, Stream::new(flags == 0, priority.clamp(GREATEST_PRIORITY, 0)));
        Ok(name)
    }

    /// Flags and priority of a stream.
    pub fn stream_told(&mut self, stream: u64) -> Result<(u32, i32), Code> {
        let stream = self.key(stream)?;
        let s = self.streams.get(&stream).ok_or(Code::INVALID_HANDLE)?;
        Ok((u32::from(!s.blocking), s.priority))
    }

    /// cuStreamDestroy: its work runs nevertheless.
    pub fn destroy_stream(&mut self, stream: u64) -> Result<(), Code> {
        if stream <= PER_THREAD || !self.streams.contains_key(&stream) {
            return Err(Code::INVALID_HANDLE);
        }
        self.drain(stream, u64::MAX)?;
        self.streams.remove(&stream);
        Ok(())
    }

    /// cuStreamSynchronize.
    pub fn wait(&mut self, stream: u64) -> Result<(), Code> {
        let stream = self.key(stream)?;
        self.unsafe_call()?;
        self.drain(stream, u64::MAX)?;
        if stream == LEGACY {
            // It waits for what is ordered with it, whether or not it has work of its own.
            let others = self.streams.iter().filter(|(_, s)| s.blocking).map(|(name, _)| *name);
            let others: Vec<u64> = others.collect();
            return others.into_iter().try_for_each(|other| self.drain(other, u64::MAX));
        }
        Ok(())
    }

    /// cuCtxSynchronize.
    pub fn wait_all(&mut self) -> Result<(), Code> {
        self.unsafe_call()?;
        self.drain_all()
    }

    /// cuStreamQuery. Each time a piece of work runs, so that a program that asks again and again gets to the end.
    pub fn query(&mut self, stream: u64) -> Result<(), Code> {
        let stream = self.key(stream)?;
        self.unsafe_call()?;
        self.ask(stream, u64::MAX)
    }

    fn ask(&mut self, stream: u64, until: u64) -> Result<(), Code> {
        let next = self.streams.get(&stream).and_then(|s| s.queue.front()).map(|(serial, _)| *serial);
        match next.filter(|serial| *serial <= until) {
            None => Ok(()),
            Some(serial) => self.drain(stream, serial).and(Err(Code::NOT_READY)),
        }
    }

    /// cuStreamWaitEvent.
    pub fn wait_for_event(&mut self, stream: u64, event: u64) -> Result<(), Code> {
        let stream = self.key(stream)?;
        let known = self.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        let (other, at, captured) = (known.stream, known.recorded, known.captured);
        if let Some(capture) = captured.filter(|name| self.captures.contains_key(name)) {
            let s = self.streams.get_mut(&stream).ok_or(Code::INVALID_HANDLE)?;
            return match s.capture {
                // Steps run in the order of the calls, which is one that the events allow.
                None => {
                    s.capture = Some(capture);
                    Ok(())
                }
                Some(own) if own == capture => Ok(()),
                Some(_) => Err(Code::CAPTURE_MERGE),
            };
        }
        if self.capturing(stream)? {
            say("a captured stream waits for an event of work that is not captured");
            self.uncapturable(stream).or(Err(Code::CAPTURE_ISOLATION))?;
        }
        if !self.waited_for.contains(&event) {
            self.waited_for.push(event);
        }
        if self.waited_for.iter().position(|known| *known == event).map(|i| i + 1)
            == Some(self.settings.forgotten)
        {
            return Ok(());
        }
        // An event that was never recorded is one that has passed.
        if at == 0 || other == stream || self.streams.get(&other).is_none_or(|s| s.passed(at)) {
            return Ok(());
        }
        self.put(stream, Work::After(other, at))
    }

    /// cuLaunchHostFunc, cuStreamAddCallback.
    pub fn call(&mut self, stream: u64, call: Call, data: usize) -> Result<(), Code> {
        self.put(stream, Work::Call(call, data))
    }

    /// cuEventCreate.
    pub fn event(&mut self, flags: u32) -> Result<u64, Code> {
        // 1: waiting sleeps. 2: no timing.
        if flags > 3 {
            return Err(Code::INVALID_VALUE);
        }
        let name = handle();
        let timing = flags & 2 == 0;
        self.events.insert(name, Event { timing, recorded: 0, stream: 0, captured: None, passed: None });
        Ok(name)
    }

    /// cuEventDestroy.
    pub fn destroy_event(&mut self, event: u64) -> Result<(), Code> {
        self.events.remove(&event).map(drop).ok_or(Code::INVALID_HANDLE)
    }

    /// cuEventRecord.
    pub fn record(&mut self, event: u64, stream: u64) -> Result<(), Code> {
        if !self.events.contains_key(&event) {
            return Err(Code::INVALID_HANDLE);
        }
        let stream = self.key(stream)?;
        let captured = self.streams.get(&stream).and_then(|s| s.capture);
        let recorded = if captured.is_some() { 0 } else { self.number(stream, Work::Record(event))? };
        if let Some(event) = self.events.get_mut(&event) {
            (event.recorded, event.stream, event.captured) = (recorded, stream, captured);
        }
        Ok(())
    }

    /// An event's stream and number, unless it has passed or was never recorded.
    fn pending(&self, event: u64) -> Result<Option<(u64, u64)>, Code> {
        let known = self.events.get(&event).ok_or(Code::INVALID_HANDLE)?;
        if known.captured.is_some() {
            return Err(Code::CAPTURED_EVENT);
        }
        let (stream, serial) = (known.stream, known.recorded);
        let passed = serial == 0 || self.streams.get(&stream).is_none_or(|s| s.passed(serial));
        Ok((!passed).then_some((stream, serial)))
    }

    /// cuEventSynchronize.
    pub fn wait_event(&mut self, event: u64) -> Result<(), Code> {
        self.unsafe_call()?;
        match self.pending(event)? {
            Some((stream, serial)) => self.drain(stream, serial),
            None => Ok(()),
        }
    }

    /// cuEventQuery, as [`Context::query`].
    pub fn query_event(&mut self, event: u64) -> Result<(), Code> {
        match self.pending(event)? {
            Some((stream, serial)) => self.ask(stream, serial),
            None => Ok(()),
        }
    }

    /// cuEventElapsedTime in milliseconds: how long this machine took for the work between, or until somebody waited for it.
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
        let forth = to.saturating_duration_since(from).as_secs_f32();
        Ok((forth - from.saturating_duration_since(to).as_secs_f32()) * 1e3)
    }

    // ----------------------------------------------------------------------------------------------------- graphs

    /// cuStreamBeginCapture; the mode by the driver's number.
    pub fn begin_capture(&mut self, stream: u64, mode: u32) -> Result<(), Code> {
        if self.settings.graphs == Graphs::None {
            return Err(Code::NOT_SUPPORTED);
        }
        let origin = self.key(stream)?;
        if origin == LEGACY {
            return Err(Code::CAPTURE_UNSUPPORTED);
        }
        let stream = self.streams.get_mut(&origin).ok_or(Code::INVALID_HANDLE)?;
        if stream.capture.is_some() {
            return Err(Code::ILLEGAL_STATE);
        }
        if mode > 2 {
            return Err(Code::INVALID_VALUE);
        }
        let name = handle();
        stream.capture = Some(name);
        let thread = std::thread::current().id();
        self.captures.insert(name, Capture { origin, steps: Vec::new(), broken: false, thread, mode });
        Ok(())
    }

    /// cuStreamIsCapturing: none, active, invalidated.
    pub fn capture_status(&mut self, stream: u64) -> Result<u32, Code> {
        let stream = self.key(stream)?;
        let capture = self.streams.get(&stream).and_then(|s| s.capture);
        Ok(capture.and_then(|name| self.captures.get(&name)).map_or(0, |c| 1 + u32::from(c.broken)))
    }

    /// cuStreamEndCapture: the graph's handle.
    pub fn end_capture(&mut self, stream: u64) -> Result<u64, Code> {
        let stream = self.key(stream)?;
        let name = self.streams.get(&stream).and_then(|s| s.capture).ok_or(Code::CAPTURE_UNMATCHED)?;
        let capture = self.captures.get(&name).ok_or(Code::CAPTURE_UNMATCHED)?;
        if capture.mode != 2 && capture.thread != std::thread::current().id() {
            return Err(Code::CAPTURE_WRONG_THREAD);
        }
        if capture.origin != stream {
            return Err(Code::CAPTURE_UNMATCHED);
        }
        let capture = self.captures.remove(&name).ok_or(Code::CAPTURE_UNMATCHED)?;
        self.streams.values_mut().filter(|s| s.capture == Some(name)).for_each(|s| s.capture = None);
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

    /// cuGraphGetNodes: how many.
    pub fn graph_nodes(&self, graph: u64) -> Result<usize, Code> {
        self.graphs.get(&graph).map(Vec::len).ok_or(Code::INVALID_HANDLE)
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

/// The greatest priority of a stream; the least is 0.
pub const GREATEST_PRIORITY: i32 = -5;
