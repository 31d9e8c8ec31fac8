//! Work: launches and copies in their order, and sequences of them as CUDA graphs.

use super::*;

impl State {
    /// A launch or a fill: held back in a sequence, else handed over.
    pub(super) fn ask(&mut self, step: Step) -> Result<(), DeviceError> {
        match &mut self.sequence {
            Some(sequence) => {
                sequence.steps.push(&step);
                Ok(())
            }
            None => self.run(&step),
        }
    }

    pub(super) fn run(&mut self, step: &Step) -> Result<(), DeviceError> {
        self.counts.single += 1;
        self.enqueue(step)
    }

    /// Puts a step into the stream, or into the graph that the stream is recorded into.
    pub(super) fn enqueue(&mut self, step: &Step) -> Result<(), DeviceError> {
        match step {
            Step::Fill(Ptr(to), value, bytes) => {
                // SAFETY: the driver checks the addresses.
                let result = unsafe { sys::cuMemsetD8Async(*to, *value, *bytes, self.stream) };
                self.check("set memory", result)
            }
            Step::Launch(kernel, launch, args) => self.launch(*kernel, launch, args),
        }
    }

    pub(super) fn launch(
        &mut self,
        kernel: Kernel,
        launch: &Launch,
        args: &[Arg],
    ) -> Result<(), DeviceError> {
        let Launch { grid, block, shared_bytes } = *launch;
        let Some(function) = self.kernels.get_mut(kernel.0) else {
            return Err(DeviceError::new(&self.name, format!("no kernel has the number {}", kernel.0)));
        };
        if shared_bytes > function.dynamic {
            let whole = u64::from(function.fixed) + u64::from(shared_bytes);
            if whole > u64::from(self.shared) {
                let message = format!(
                    "{} needs {whole} bytes of shared memory for a block, and this GPU has {}",
                    function.name, self.shared
                );
                return Err(DeviceError::new(&self.name, message));
            }
            let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is loaded.
            let result = unsafe { sys::cuFuncSetAttribute(function.handle, which, shared_bytes as c_int) };
            check(
                &self.name,
                &format!("give {} {shared_bytes} bytes of shared memory", function.name),
                result,
            )?;
            function.dynamic = shared_bytes;
        }
        let mut params: Vec<*mut c_void> = args
            .iter()
            .map(|arg| match arg {
                Arg::Ptr(Ptr(x)) | Arg::U64(x) => ptr::from_ref(x).cast_mut().cast(),
                Arg::U32(x) => ptr::from_ref(x).cast_mut().cast(),
                Arg::F32(x) => ptr::from_ref(x).cast_mut().cast(),
                Arg::Bytes(x) => x.as_ptr().cast_mut().cast(),
            })
            .collect();
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        let (handle, params, stream) = (function.handle, params.as_mut_ptr(), self.stream);
        // SAFETY: the function is loaded; the parameters point to values that outlive the call, which copies them. That
        // they are as many and as large as the kernel's is the launchers' part, and checked on the virtual GPU. Where the
        // stream may run it early, its text was made to wait first.
        let result = unsafe {
            if self.dependent {
                sys::launch_dependent(handle, grid, block, shared_bytes, stream, params)
            } else {
                sys::cuLaunchKernel(
                    handle,
                    gx,
                    gy,
                    gz,
                    bx,
                    by,
                    bz,
                    shared_bytes,
                    stream,
                    params,
                    ptr::null_mut(),
                )
            }
        };
        if result == CUresult::CUDA_SUCCESS {
            self.remember(Launched { kernel: kernel.0, shape: *launch });
            return Ok(());
        }
        let doing = format!("launch {} with grid {grid:?}, block {block:?}", function.name);
        self.check(&doing, result)
    }

    /// Hands over what a sequence has held back, as a graph if it came before.
    pub(super) fn submit(&mut self) -> Result<(), DeviceError> {
        let Some(sequence) = &mut self.sequence else { return Ok(()) };
        let steps = std::mem::take(&mut sequence.steps);
        sequence.fresh.clear();
        let freed = std::mem::take(&mut sequence.freed);
        let submitted = self.submit_steps(&steps);
        freed.into_iter().for_each(|address| self.give_back(address));
        submitted
    }

    pub(super) fn submit_steps(&mut self, steps: &Steps) -> Result<(), DeviceError> {
        // A graph names addresses, which are the driver's to give to others where every allocation is its own.
        let alone = self.exact || self.counts.refused > 0;
        let verdict = if alone { Verdict::Run } else { self.recordings.look(steps) };
        let graph = match verdict {
            Verdict::Run => None,
            Verdict::Replay(graph) => {
                let Graph { executable, last } = graph;
                let (executable, last) = (*executable, last.clone());
                last.into_iter().for_each(|launched| self.remember(launched));
                Some(executable)
            }
            // To record launches is to launch them, as far as the last ones are remembered.
            Verdict::Record => self.record(steps)?,
        };
        if let Some(graph) = graph {
            // SAFETY: the graph was instantiated in this context and is destroyed only when it leaves the records.
            let result = unsafe { sys::cuGraphLaunch(graph, self.stream) };
            // The driver gets memory for a graph when it first runs. Without any left, nothing has run.
            if result != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                self.counts.replayed += 1;
                return self.check("replay a graph", result);
            }
            self.counts.refused += 1;
        }
        steps.iter().try_for_each(|step| self.run(&step))
    }

    /// Records steps as a graph and keeps it; `None` where the driver cannot.
    pub(super) fn record(&mut self, steps: &Steps) -> Result<Option<sys::CUgraphExec>, DeviceError> {
        let (mut graph, mut executable) = (ptr::null_mut(), ptr::null_mut());
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream exists; nothing but the steps goes into it until the end of the recording, which comes in
        // any case.
        let (asked, ended) = unsafe {
            let began = sys::cuStreamBeginCapture_v2(self.stream, mode);
            if began != CUresult::CUDA_SUCCESS {
                self.counts.refused += 1;
                return Ok(None);
            }
            let asked = steps.iter().try_for_each(|step| self.enqueue(&step));
            (asked, sys::cuStreamEndCapture(self.stream, &mut graph))
        };
        // SAFETY: the graph, where there is one, is ours; an executable one does not need it any more.
        let made = unsafe {
            let whole = asked.is_ok() && ended == CUresult::CUDA_SUCCESS;
            let made = match whole {
                true => sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0),
                false => CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
            };
            if !graph.is_null() {
                sys::cuGraphDestroy(graph);
            }
            made
        };
        if made != CUresult::CUDA_SUCCESS {
            self.counts.refused += 1;
            return Ok(None);
        }
        self.counts.recorded += 1;
        let launches = steps.iter().filter_map(|step| match step {
            Step::Launch(kernel, shape, _) => Some(Launched { kernel: kernel.0, shape }),
            Step::Fill(..) => None,
        });
        let mut last: Vec<Launched> = launches.collect();
        last.drain(..last.len().saturating_sub(REMEMBERED));
        if let Some(left) = self.recordings.keep(steps, Graph { executable, last }) {
            // The driver may still be replaying it.
            self.wait()?;
            // SAFETY: it has left the records, and no work is under way.
            self.check("give a graph back", unsafe { sys::cuGraphExecDestroy(left.executable) })?;
        }
        Ok(Some(executable))
    }

    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream exists.
        self.check("finish the work", unsafe { sys::cuStreamSynchronize(self.stream) })
    }

    pub(super) fn synchronize(&mut self) -> Result<(), DeviceError> {
        self.submit()?;
        self.wait()
    }

    pub(super) fn begin_sequence(&mut self) -> Result<(), DeviceError> {
        if self.sequence.is_some() {
            return Err(DeviceError::new(&self.name, "a sequence begins within another"));
        }
        self.sequence = Some(Sequence::default());
        Ok(())
    }

    pub(super) fn end_sequence(&mut self) -> Result<(), DeviceError> {
        let submitted = self.submit();
        match self.sequence.take() {
            Some(_) => submitted,
            None => Err(DeviceError::new(&self.name, "a sequence ends that did not begin")),
        }
    }
}
