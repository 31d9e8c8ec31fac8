//! Control flow that is rarer than branches: branches through tables, calls, exits.

use super::frame::enter;
use super::meet::warp_barrier_here;
use super::{BlockRun, lanes, wait};
use crate::error::ErrorKind;
use crate::machine::barrier::BARRIERS;
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{Control, Exec, ParamCopy};
use crate::machine::launch::{LaunchState, Worker};
use crate::machine::layout::{FUNCTION_WINDOW, MAX_LOCAL_BYTES};
use crate::machine::system;
use crate::machine::warp::{Frame, State};

/// Most rows of a warp's registers, over all frames.
const MAX_ROWS: usize = 1 << 18;

impl BlockRun {
    /// Control flow that is rarer than branches, at the pc of split `s`, for the lanes `m`; sets the split's next pc.
    ///
    /// Never inlined, because it would cost the loop of [`BlockRun::run_split`] its registers.
    #[inline(never)]
    pub(super) fn control(
        &mut self,
        w: usize,
        s: usize,
        m: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<(), Stop> {
        let run = &mut self.warps[w];
        let pc = run.splits[s].pc;
        let mask = run.splits[s].mask;
        let live = run.warp.live;
        let inst = &launch.program.code[pc as usize];
        let Exec::Control(control) = &inst.exec else { unreachable!("the loop's own") };
        match control {
            Control::Branch { .. } | Control::Join => unreachable!("the loop's own"),
            Control::BranchTable { targets, join } => {
                let index = *run.warp.regs.get::<u32>(inst.src(0));
                self.need_defined(w, pc, m, launch, worker, "the index of a branch");
                let mut ways: Vec<(u32, u32)> = Vec::new();
                if mask & !m != 0 {
                    ways.push((pc + 1, mask & !m));
                }
                for lane in lanes(m) {
                    let Some(&target) = targets.get(index[lane] as usize) else {
                        let n = targets.len();
                        let message = format!("index {} of a branch with {n} targets", index[lane]);
                        return Err(self.stop(launch, w, pc, ErrorKind::OutOfBounds, 1 << lane, message));
                    };
                    match ways.iter_mut().find(|(pc, _)| *pc == target) {
                        Some((_, lanes)) => *lanes |= 1 << lane,
                        None => ways.push((target, 1 << lane)),
                    }
                }
                let run = &mut self.warps[w];
                if let [(target, _)] = ways.as_slice() {
                    run.splits[s].pc = *target;
                } else {
                    worker.counters.insts[pc as usize].divergent += 1;
                    run.part(s, &ways, *join);
                }
            }
            Control::Exit => self.exit(w, s, m, launch, worker)?,
            Control::Trap => {
                return Err(self.stop(
                    launch,
                    w,
                    pc,
                    ErrorKind::Trap,
                    m,
                    "the kernel stopped itself with `trap`".into(),
                ));
            }
            Control::Yield => run.splits[s].pc = pc + 1,
            Control::WarpBarrier => {
                self.need_defined(w, pc, m, launch, worker, "the membermask");
                let run = &mut self.warps[w];
                if warp_barrier_here(&run.warp.regs, inst, m, live) && m == mask {
                    self.block.clocks.warp_barrier(w as u32);
                    self.block.epochs.settle();
                    run.splits[s].pc = pc + 1;
                } else {
                    wait(run, s, m, State::Converging);
                    self.meet(w, launch, worker)?;
                }
            }
            Control::Warpgroup => {
                // It only stands for the end of the product.
                self.block.work.instructions -= 1;
                self.meet_group(w, s, launch)?;
            }
            Control::Barrier { aligned, .. } | Control::ClusterBarrier { aligned, .. } => {
                self.need_defined(w, pc, m, launch, worker, "the number or the count of a barrier");
                let run = &mut self.warps[w];
                if *aligned && m != live {
                    wait(run, s, m, State::Converging);
                    self.meet(w, launch, worker)?;
                } else {
                    if m != mask {
                        run.leave_behind(s, mask & !m, State::Ready, pc);
                        let rest = run.splits.len() - 1;
                        run.splits[rest].pc = pc + 1;
                    }
                    match control {
                        Control::ClusterBarrier { .. } => self.reach_cluster(w, pc, m, launch, worker)?,
                        _ => self.reach(w, pc, m, launch, worker)?,
                    }
                }
            }
            // `Return` reads the results from the call.
            Control::Call { function, args, results: _ } => {
                self.call(w, s, m, *function, args, launch)?;
            }
            Control::CallIndirect { args, .. } => {
                let at = *run.warp.regs.get::<u64>(inst.src(0));
                self.need_defined(w, pc, m, launch, worker, "the address of a call");
                // One function after another; the lanes of the others try again, and meet behind the call.
                let lane = m.trailing_zeros() as usize;
                let index = at[lane].wrapping_sub(FUNCTION_WINDOW);
                let f = launch.program.functions.get(index as usize).filter(|f| f.defined && !f.is_entry);
                let Some(f) = f else {
                    let message = format!("a call of {:#x}, which is no function of the module", at[lane]);
                    return Err(self.stop(launch, w, pc, ErrorKind::OutOfBounds, 1 << lane, message));
                };
                let fits =
                    args.len() == f.params.len() && args.iter().zip(&f.params).all(|(a, p)| a.1 >= p.bytes);
                if !fits {
                    let message = format!("a call of `{}` through a pointer with other parameters", f.name);
                    return Err(self.stop(launch, w, pc, ErrorKind::Invalid, 1 << lane, message));
                }
                let args: Vec<ParamCopy> = args
                    .iter()
                    .zip(&f.params)
                    .map(|(a, p)| ParamCopy { caller: a.0, callee: p.offset, bytes: p.bytes })
                    .collect();
                let same = lanes(m).filter(|i| at[*i] == at[lane]).fold(0, |all, i| all | 1 << i);
                let run = &mut self.warps[w];
                if m != mask {
                    run.part(s, &[(pc, m), (pc + 1, mask & !m)], join_behind(launch, pc));
                }
                if same != m {
                    run.part(s, &[(pc, same), (pc, m & !same)], join_behind(launch, pc));
                }
                self.call(w, s, same, index as u32, &args, launch)?;
            }
            Control::System { function, args, results } => {
                let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, 0);
                system::call(&mut ctx, *function, args, results, m)?;
                run.splits[s].pc = pc + 1;
            }
            Control::Return => {
                let split = &mut run.splits[s];
                // A function has one way out, which nothing guards: all lanes of the split return.
                let Some((frame, call)) = split.stack.pop() else {
                    return self.exit(w, s, m, launch, worker);
                };
                let (from, returns) =
                    (split.frame, &launch.program.functions[split.frame.function as usize].returns);
                split.frame = frame;
                split.pc = call + 1;
                let results: Vec<ParamCopy> = match &launch.program.code[call as usize].exec {
                    Exec::Control(Control::Call { results, .. }) => results.to_vec(),
                    Exec::Control(Control::CallIndirect { results, .. }) => results
                        .iter()
                        .zip(returns)
                        .map(|(r, p)| ParamCopy { caller: r.0, callee: p.offset, bytes: p.bytes.min(r.1) })
                        .collect(),
                    _ => Vec::new(),
                };
                for r in results {
                    run.warp.local.copy(m, from.local_base + r.callee, frame.local_base + r.caller, r.bytes);
                }
                let gone = launch.program.functions[from.function as usize].local_bytes;
                run.warp.local.end(m, from.local_base, gone);
            }
        }
        Ok(())
    }

    /// A finding: `lanes` read a register that they never wrote.
    /// Tells of sources of an instruction that nobody wrote.
    fn need_defined(
        &mut self,
        w: usize,
        pc: u32,
        lanes: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
        what: &str,
    ) {
        let run = &mut self.warps[w];
        let srcs = launch.program.code[pc as usize].srcs().iter().filter(|reg| reg.is_some());
        let undefined = srcs.fold(0, |all, reg| all | lanes & !run.warp.regs.defined(*reg));
        if launch.checks.init && undefined != 0 {
            let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, 0);
            ctx.finding(ErrorKind::Uninitialized, undefined, None, || format!("{what} was never written"));
        }
    }

    pub(super) fn exit(
        &mut self,
        w: usize,
        s: usize,
        m: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<(), Stop> {
        let run = &mut self.warps[w];
        let split = &mut run.splits[s];
        split.mask &= !m;
        split.pc += 1;
        if split.mask == 0 {
            run.splits.swap_remove(s);
        }
        run.exit(m);
        self.block.progress += 1;
        let gone = run.warp.live == 0;
        if self.block.cluster.is_some() {
            self.exit_cluster(w, m, launch, worker);
        }
        if gone {
            // Barriers without a count wait only for warps that still run.
            for id in 0..BARRIERS {
                self.open(id, launch, worker);
            }
        }
        Ok(())
    }

    fn call(
        &mut self,
        w: usize,
        s: usize,
        m: u32,
        function: u32,
        args: &[ParamCopy],
        launch: &LaunchState<'_>,
    ) -> Result<(), Stop> {
        let run = &mut self.warps[w];
        let pc = run.splits[s].pc;
        let rest = run.splits[s].mask & !m;
        if rest != 0 {
            run.part(s, &[(pc, m), (pc + 1, rest)], join_behind(launch, pc));
        }
        let caller = run.splits[s].frame;
        let from = &launch.program.functions[caller.function as usize];
        let to = &launch.program.functions[function as usize];
        let frame = Frame {
            function,
            base: caller.base + from.rows,
            pred_base: caller.pred_base + from.preds,
            local_base: caller.local_base + from.local_bytes,
        };
        let local_end = u64::from(frame.local_base) + u64::from(to.local_bytes);
        let rows_end = frame.base as usize + to.rows as usize;
        let depth = run.splits[s].stack.len();
        if local_end > u64::from(MAX_LOCAL_BYTES) || rows_end > MAX_ROWS || depth > 10_000 {
            let message = format!("{} calls deep, {local_end} bytes of local memory", depth + 1);
            return Err(self.stop(launch, w, pc, ErrorKind::StackOverflow, m, message));
        }
        run.splits[s].stack.push((caller, pc));
        run.splits[s].frame = frame;
        run.splits[s].pc = to.start;
        enter(run, launch, frame, m, &self.block);
        for a in args {
            run.warp.local.copy(m, caller.local_base + a.caller, frame.local_base + a.callee, a.bytes);
        }
        Ok(())
    }
}

/// The join behind a call that may part lanes; there is none where lanes only exit.
fn join_behind(launch: &LaunchState<'_>, pc: u32) -> Option<u32> {
    let behind = launch.program.code.get(pc as usize + 1)?;
    matches!(behind.exec, Exec::Control(Control::Join)).then_some(pc + 1)
}
