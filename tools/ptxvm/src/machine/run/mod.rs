//! Runs a block: which warp is next, what its control flow does, and when everybody waits for everybody.

use super::barrier::{BARRIERS, Barrier};
use super::block::Block;
use super::context::{Context, Stop};
use super::counters::BlockWork;
use super::inst::{BarrierKind, Control, Defs, Exec, Inst, ParamCopy, Sync};
use super::launch::{LaunchState, Worker};
use super::layout::{FUNCTION_WINDOW, LOCAL_LIMIT};
use super::program::Special;
use super::registers::{LANES, Reg, Registers, Width};
use super::system;
use super::warp::{Frame, State, WarpRun};
use crate::error::Kind;

/// Instructions that a warp runs before others get a turn, when no seed makes turns random.
const TURN: u64 = 1 << 16;
/// Atomics or strong loads that a warp may run while lanes of it wait at joins, before those are let go: it may wait for
/// them, as in a spin lock whose owner left the loop.
const SPINS: u32 = 1024;
/// Most rows of a warp's registers, over all frames.
const ROW_LIMIT: usize = 1 << 18;

/// How a warp's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// All lanes have exited.
    Done,
    /// All lanes wait for the block.
    Blocked,
    /// It could go on.
    Over,
}

/// How a block's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// All threads have exited.
    Done,
    /// It could go on: each warp had a turn.
    Over,
}

/// A block and all that runs it.
pub(crate) struct BlockRun {
    block: Block,
    warps: Vec<WarpRun>,
    status: Vec<Turn>,
    barriers: Vec<Barrier>,
    /// State of the schedule's random numbers; `None` runs warps in order.
    random: Option<u64>,
}

/// The next number of splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn lanes_of(mask: u32) -> impl Iterator<Item = usize> {
    (0..LANES).filter(move |i| mask >> i & 1 != 0)
}

fn broadcast(regs: &mut Registers, reg: Reg, mask: u32, value: u64) {
    match reg.width {
        Width::None => return,
        Width::Pred => regs.set_pred(reg, mask, if value != 0 { u32::MAX } else { 0 }),
        Width::B16 | Width::B32 => regs.set::<u32>(reg, mask, &[value as u32; LANES]),
        Width::B64 => regs.set::<u64>(reg, mask, &[value; LANES]),
        Width::B128 => regs.set::<u128>(reg, mask, &[u128::from(value); LANES]),
    }
    regs.set_defined(reg, mask, u32::MAX);
}

impl BlockRun {
    /// Prepares for blocks of a launch; `start` begins one.
    pub(super) fn new(launch: &LaunchState<'_>) -> Self {
        let threads: u32 = launch.block.iter().product();
        let warps = threads.div_ceil(LANES as u32);
        Self {
            block: Block { index: [0; 3], number: 0, warps, executed: 0, ..Block::default() },
            warps: (0..warps).map(WarpRun::new).collect(),
            status: vec![Turn::Done; warps as usize],
            barriers: vec![Barrier::default(); BARRIERS],
            random: None,
        }
    }

    /// Begins block `number` of the grid.
    pub(super) fn start(&mut self, launch: &LaunchState<'_>, number: u64) {
        let [gx, gy, _] = launch.grid.map(u64::from);
        self.block.number = number;
        self.block.index = [(number % gx) as u32, (number / gx % gy) as u32, (number / gx / gy) as u32];
        self.block.executed = 0;
        self.block.work = BlockWork::default();
        self.block.shared.start(launch.shared_bytes, launch.kernel.shared_grain, self.block.warps);
        self.block.clocks.start(self.block.warps);
        self.random = launch.seed.map(|seed| seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        let threads: u32 = launch.block.iter().product();
        for barrier in &mut self.barriers {
            barrier.clear(self.warps.len());
        }
        self.status.fill(Turn::Over);
        for (i, w) in self.warps.iter_mut().enumerate() {
            let first = i as u32 * LANES as u32;
            let here = (threads - first).min(LANES as u32);
            let mask = if here == LANES as u32 { u32::MAX } else { (1 << here) - 1 };
            let f = launch.kernel;
            w.start(f.start, mask, launch.kernel_index);
            let frame = Frame { function: launch.kernel_index, ..Frame::default() };
            enter(w, launch, frame, u32::MAX, &self.block);
        }
    }

    /// Runs the block until it is done, or for one turn of each warp.
    pub(super) fn run(
        &mut self,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
        to_the_end: bool,
    ) -> Result<Progress, Stop> {
        loop {
            let mut moved = false;
            for k in 0..self.warps.len() {
                let (w, turn) = match &mut self.random {
                    None => (k, TURN),
                    Some(state) => {
                        let r = random(state);
                        ((r >> 32) as usize % self.warps.len(), 1 + (r & 255))
                    }
                };
                if self.status[w] == Turn::Over {
                    moved = true;
                    self.status[w] = self.run_warp(w, turn, launch, worker)?;
                }
            }
            if self.status.iter().all(|s| *s == Turn::Done) {
                return Ok(Progress::Done);
            }
            if !moved && !self.status.contains(&Turn::Over) {
                return Err(self.deadlock(launch));
            }
            if !to_the_end {
                return Ok(Progress::Over);
            }
        }
    }

    /// What the block has done.
    pub(super) fn work(&self) -> BlockWork {
        self.block.work
    }

    fn stop(
        &self,
        launch: &LaunchState<'_>,
        w: usize,
        pc: u32,
        kind: Kind,
        lanes: u32,
        message: String,
    ) -> Stop {
        let mut finding = crate::error::Finding::load(kind, launch.place(pc), message);
        finding.kernel = launch.kernel_name().to_owned();
        finding.threads = Some(crate::error::Threads { block: self.block.index, warp: w as u32, lanes });
        Stop(Box::new(finding))
    }

    /// Nobody can go on.
    fn deadlock(&self, launch: &LaunchState<'_>) -> Stop {
        let stuck = |sync: bool| {
            let all =
                self.warps.iter().enumerate().flat_map(|(w, run)| run.splits.iter().map(move |s| (w, s)));
            all.filter(|(_, s)| (s.state == State::Sync) == sync).collect::<Vec<_>>()
        };
        // Lanes that wait for lanes of their own warp are the cause; others wait for them.
        if let Some((w, s)) = stuck(true).first() {
            return self.stuck_warp(launch, *w, s.pc, s.mask);
        }
        let waiting = stuck(false);
        let mut at: Vec<(u32, u32, Vec<u32>)> = Vec::new();
        for (w, s) in &waiting {
            let State::Barrier(id) = s.state else { continue };
            match at.iter_mut().find(|(pc, b, _)| (*pc, *b) == (s.pc, u32::from(id))) {
                Some((.., warps)) => warps.push(*w as u32),
                None => at.push((s.pc, u32::from(id), vec![*w as u32])),
            }
        }
        let told = at.iter().map(|(pc, id, warps)| {
            let line = launch.place(*pc).line;
            format!("warps {warps:?} wait at barrier {id} (line {line})")
        });
        let told = told.collect::<Vec<_>>().join("; ");
        let (w, s) = waiting.first().map_or((0, None), |(w, s)| (*w, Some(s)));
        let (pc, mask) = s.map_or((launch.kernel.start, 0), |s| (s.pc, s.mask));
        self.stop(launch, w, pc, Kind::Deadlock, mask, format!("no warp of the block can go on: {told}"))
    }

    /// Lanes of a warp wait for lanes of it that never come.
    fn stuck_warp(&self, launch: &LaunchState<'_>, w: usize, pc: u32, mask: u32) -> Stop {
        let run = &self.warps[w];
        let others = run.splits.iter().filter(|s| s.pc != pc);
        let others = others.map(|s| format!("lanes {:08x} at line {}", s.mask, launch.place(s.pc).line));
        let others = others.collect::<Vec<_>>().join(", ");
        let others = if others.is_empty() { "no other lane is left".to_owned() } else { others };
        let inst = &launch.program.code[pc as usize];
        let (kind, what) = match &inst.exec {
            Exec::Control(Control::Barrier { .. }) => {
                (Kind::Barrier, "a barrier that the whole warp must reach")
            }
            _ => (Kind::WarpMask, "a warp-wide operation whose mask names lanes that do not take part"),
        };
        let live = run.warp.live;
        self.stop(
            launch,
            w,
            pc,
            kind,
            mask,
            format!("lanes {mask:08x} of {live:08x} reached {what}, and wait for ever: {others}"),
        )
    }

    // ---------------------------------------------------------------------------------------------- a warp's turn

    fn run_warp(
        &mut self,
        w: usize,
        turn: u64,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<Turn, Stop> {
        let mut left = turn;
        loop {
            let run = &mut self.warps[w];
            if let Some(s) = run.splits.iter().position(|s| s.state == State::Ready) {
                if left == 0 {
                    // Somebody spins: others of the warp get the next turn.
                    run.splits.rotate_left(1);
                    if self.block.executed > launch.budget {
                        let (pc, mask) = (self.warps[w].splits[0].pc, self.warps[w].splits[0].mask);
                        let message =
                            format!("the block has executed its budget of {} instructions", launch.budget);
                        return Err(self.stop(launch, w, pc, Kind::Budget, mask, message));
                    }
                    return Ok(Turn::Over);
                }
                let ran = self.run_split(
                    w,
                    s,
                    left.min(launch.budget.saturating_sub(self.block.executed) + 1),
                    launch,
                    worker,
                )?;
                self.block.executed += ran;
                left = left.saturating_sub(ran.max(1));
                let run = &mut self.warps[w];
                if run.spins >= SPINS {
                    run.release_one();
                    run.splits.rotate_left(1);
                }
                if self.block.executed > launch.budget {
                    left = 0;
                }
                continue;
            }
            if self.warps[w].warp.live == 0 {
                return Ok(Turn::Done);
            }
            if self.meet(w, launch, worker)? {
                continue;
            }
            let run = &mut self.warps[w];
            // Lanes at a join come first: what others wait for may lie behind it.
            if run.splits.iter().any(|s| s.state == State::Sync) && run.release_one() {
                continue;
            }
            if run.splits.iter().any(|s| matches!(s.state, State::Barrier(_))) {
                if run.anyone_joined() && run.release_one() {
                    continue;
                }
                return Ok(Turn::Blocked);
            }
            if run.release_one() {
                continue;
            }
            let (pc, mask) = run.splits.first().map_or((launch.kernel.start, 0), |s| (s.pc, s.mask));
            return Err(self.stuck_warp(launch, w, pc, mask));
        }
    }

    /// Runs split `s` until it waits, parts or ends, for at most `most` instructions. Gives how many it ran.
    fn run_split(
        &mut self,
        w: usize,
        s: usize,
        most: u64,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<u64, Stop> {
        let code = launch.program.code.as_slice();
        let init = launch.checks.init;
        let run = &mut self.warps[w];
        let split = &run.splits[s];
        let (mut pc, mask, frame) = (split.pc, split.mask, split.frame);
        run.warp.select(frame);
        let mut ran = 0;
        while ran < most {
            let inst = &code[pc as usize];
            let mut m = mask;
            if let Some(guard) = inst.guard {
                let p = run.warp.regs.pred(guard.pred);
                m &= if guard.negated { !p } else { p };
                if init && run.warp.regs.defined(guard.pred) & mask != mask {
                    let lanes = mask & !run.warp.regs.defined(guard.pred);
                    run.splits[s].pc = pc;
                    let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, ran);
                    ctx.finding(Kind::Uninitialized, lanes, None, || {
                        "the predicate that guards this was never written, or follows from a value that was not".into()
                    });
                }
            }
            ran += 1;
            let count = &mut worker.counters.insts[pc as usize];
            count.warps += u64::from(m != 0);
            count.lanes += u64::from(m.count_ones());
            self.block.work.instructions += u64::from(m != 0);
            match &inst.exec {
                Exec::Lane(f) => {
                    if m != 0 {
                        f(&mut run.warp.regs, inst, m);
                        if init {
                            follow(&mut run.warp.regs, inst, m);
                        }
                    }
                    pc += 1;
                }
                Exec::Warp(op) => {
                    if m != 0 {
                        if inst.sync != Sync::None && !all_here(&run.warp.regs, inst, m, run.warp.live) {
                            run.splits[s].pc = pc;
                            wait(run, s, m, State::Sync);
                            worker.counters.insts[pc as usize].warps -= 1;
                            worker.counters.insts[pc as usize].lanes -= u64::from(m.count_ones());
                            self.block.work.instructions -= 1;
                            self.meet(w, launch, worker)?;
                            return Ok(ran);
                        }
                        let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, ran);
                        op.execute(&mut ctx, inst, m)?;
                        if inst.may_wait {
                            run.spins = if run.anyone_joined() { run.spins + 1 } else { 0 };
                            if run.spins >= SPINS {
                                run.splits[s].pc = pc + 1;
                                return Ok(ran);
                            }
                        }
                    }
                    pc += 1;
                }
                Exec::Control(Control::Branch { target, join }) => {
                    if m == mask {
                        pc = *target;
                    } else if m == 0 {
                        pc += 1;
                    } else {
                        count.divergent += 1;
                        run.part(s, &[(pc + 1, mask & !m), (*target, m)], *join);
                        return Ok(ran);
                    }
                }
                Exec::Control(Control::Join) => {
                    // A join only marks where lanes meet.
                    self.block.work.instructions -= u64::from(m != 0);
                    run.splits[s].pc = pc;
                    let before = mask;
                    if !run.arrive(s) || run.splits[s].mask != before {
                        return Ok(ran);
                    }
                    pc += 1;
                }
                Exec::Control(control) => {
                    run.splits[s].pc = pc;
                    if m == 0 {
                        pc += 1;
                        continue;
                    }
                    self.control(control, inst, w, s, m, launch, worker)?;
                    return Ok(ran);
                }
            }
        }
        run.splits[s].pc = pc;
        Ok(ran)
    }

    // ---------------------------------------------------------------------------------------------- control flow

    /// Control flow that is rarer than branches, for the lanes `m` of split `s`; sets the split's next pc.
    #[allow(clippy::too_many_arguments)]
    fn control(
        &mut self,
        control: &Control,
        inst: &Inst,
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
        match control {
            Control::Branch { .. } | Control::Join => unreachable!("the loop's own"),
            Control::BranchTable { targets, join } => {
                let index = *run.warp.regs.get::<u32>(inst.src(0));
                if launch.checks.init && run.warp.regs.defined(inst.src(0)) & m != m {
                    self.undefined(w, pc, inst.src(0), m, launch, worker, "the index of a branch");
                }
                let mut ways: Vec<(u32, u32)> = Vec::new();
                if mask & !m != 0 {
                    ways.push((pc + 1, mask & !m));
                }
                for lane in lanes_of(m) {
                    let Some(&target) = targets.get(index[lane] as usize) else {
                        let n = targets.len();
                        let message = format!("index {} of a branch with {n} targets", index[lane]);
                        return Err(self.stop(launch, w, pc, Kind::OutOfBounds, 1 << lane, message));
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
                    Kind::Trap,
                    m,
                    "the kernel stopped itself with `trap`".into(),
                ));
            }
            Control::Yield => run.splits[s].pc = pc + 1,
            Control::WarpBarrier => {
                if warp_barrier_here(&run.warp.regs, inst, m, live) && m == mask {
                    self.block.clocks.warp_barrier(w as u32, m);
                    run.splits[s].pc = pc + 1;
                } else {
                    wait(run, s, m, State::Sync);
                    self.meet(w, launch, worker)?;
                }
            }
            Control::Barrier { aligned, .. } => {
                if *aligned && m != live {
                    wait(run, s, m, State::Sync);
                    self.meet(w, launch, worker)?;
                } else {
                    if m != mask {
                        run.leave_behind(s, mask & !m, State::Ready, pc);
                        let rest = run.splits.len() - 1;
                        run.splits[rest].pc = pc + 1;
                    }
                    self.reach(w, pc, m, launch, worker)?;
                }
            }
            // `Return` reads the results from the call.
            Control::Call { function, args, results: _ } => {
                self.call(w, s, m, *function, args, launch)?;
            }
            Control::CallIndirect { args, .. } => {
                let at = *run.warp.regs.get::<u64>(inst.src(0));
                if launch.checks.init && run.warp.regs.defined(inst.src(0)) & m != m {
                    self.undefined(w, pc, inst.src(0), m, launch, worker, "the address of a call");
                }
                // One function after another; the lanes of the others try again, and meet behind the call.
                let lane = m.trailing_zeros() as usize;
                let index = at[lane].wrapping_sub(FUNCTION_WINDOW);
                let f = launch.program.functions.get(index as usize).filter(|f| f.defined && !f.is_entry);
                let Some(f) = f else {
                    let message = format!("a call of {:#x}, which is no function of the module", at[lane]);
                    return Err(self.stop(launch, w, pc, Kind::OutOfBounds, 1 << lane, message));
                };
                let fits =
                    args.len() == f.params.len() && args.iter().zip(&f.params).all(|(a, p)| a.1 >= p.bytes);
                if !fits {
                    let message = format!("a call of `{}` through a pointer with other parameters", f.name);
                    return Err(self.stop(launch, w, pc, Kind::Invalid, 1 << lane, message));
                }
                let args: Vec<ParamCopy> = args
                    .iter()
                    .zip(&f.params)
                    .map(|(a, p)| ParamCopy { caller: a.0, callee: p.offset, bytes: p.bytes })
                    .collect();
                let same = lanes_of(m).filter(|i| at[*i] == at[lane]).fold(0, |all, i| all | 1 << i);
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
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn undefined(
        &mut self,
        w: usize,
        pc: u32,
        reg: Reg,
        m: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
        what: &str,
    ) {
        let run = &mut self.warps[w];
        let lanes = m & !run.warp.regs.defined(reg);
        let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, 0);
        ctx.finding(Kind::Uninitialized, lanes, None, || format!("{what} was never written"));
    }

    fn exit(
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
        if run.warp.live == 0 {
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
        if local_end > u64::from(LOCAL_LIMIT) || rows_end > ROW_LIMIT || depth > 10_000 {
            let message = format!("{} calls deep, {local_end} bytes of local memory", depth + 1);
            return Err(self.stop(launch, w, pc, Kind::StackOverflow, m, message));
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

    // ---------------------------------------------------------------------------------------------- meeting

    /// Runs warp-wide operations whose lanes are all there. Gives whether anybody went on.
    fn meet(&mut self, w: usize, launch: &LaunchState<'_>, worker: &mut Worker) -> Result<bool, Stop> {
        let mut moved = false;
        loop {
            let run = &self.warps[w];
            let waiting: Vec<(u32, Frame)> =
                run.splits.iter().filter(|s| s.state == State::Sync).map(|s| (s.pc, s.frame)).collect();
            let mut went = false;
            for (pc, frame) in waiting {
                if self.meet_at(w, pc, frame, launch, worker)? {
                    went = true;
                    break;
                }
            }
            if !went {
                break;
            }
            moved = true;
        }
        if moved {
            self.warps[w].merge();
        }
        Ok(moved)
    }

    fn meet_at(
        &mut self,
        w: usize,
        pc: u32,
        frame: Frame,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<bool, Stop> {
        let inst = &launch.program.code[pc as usize];
        let run = &mut self.warps[w];
        run.warp.select(frame);
        let live = run.warp.live;
        let waits = |s: &&super::warp::Split| s.state == State::Sync && s.pc == pc && s.frame == frame;
        let here = run.splits.iter().filter(waits).fold(0, |all, s| all | s.mask);
        let mask_reg = match (&inst.exec, inst.sync) {
            (Exec::Control(Control::Barrier { .. }), _) => {
                if here != live {
                    return Ok(false);
                }
                self.gather(w, pc, frame, here, State::Ready);
                self.reach(w, pc, here, launch, worker)?;
                return Ok(true);
            }
            (Exec::Control(Control::WarpBarrier), _) => inst.src(0),
            (_, Sync::Mask(i)) => inst.src(i as usize),
            (_, Sync::All | Sync::None) => {
                if here != u32::MAX {
                    return Ok(false);
                }
                self.execute_synced(w, pc, frame, here, launch, worker)?;
                return Ok(true);
            }
        };
        let row = *run.warp.regs.get::<u32>(mask_reg);
        let lanes: Vec<usize> = lanes_of(here).collect();
        let strays: u32 = lanes.iter().filter(|i| row[**i] >> **i & 1 == 0).fold(0, |all, i| all | 1 << i);
        if strays != 0 {
            let lane = strays.trailing_zeros() as usize;
            let members = row[lane];
            let message =
                format!("lane {lane} executes it with the mask {members:08x}, which does not name it");
            return Err(self.stop(launch, w, pc, Kind::WarpMask, strays, message));
        }
        for &lane in &lanes {
            let members = row[lane];
            let group = lanes.iter().filter(|i| row[**i] == members).fold(0, |all, i| all | 1 << i);
            let barrier = matches!(inst.exec, Exec::Control(Control::WarpBarrier));
            // Lanes may wait for each other at different `bar.warp.sync`; other operations must be the same one.
            let elsewhere = if barrier { self.at_warp_barriers(w, members, launch) } else { 0 };
            if members & live & !(group | elsewhere) != 0 {
                continue;
            }
            if barrier {
                self.block.clocks.warp_barrier(w as u32, members & live);
                self.pass_warp_barriers(w, members & live, launch);
            } else {
                self.execute_synced(w, pc, frame, group, launch, worker)?;
            }
            return Ok(true);
        }
        Ok(false)
    }

    /// Lanes that wait at a `bar.warp.sync` with this mask, wherever it stands.
    fn at_warp_barriers(&mut self, w: usize, members: u32, launch: &LaunchState<'_>) -> u32 {
        let run = &mut self.warps[w];
        let selected = run.warp.frame();
        let mut all = 0;
        for s in run.splits.iter().filter(|s| s.state == State::Sync) {
            let inst = &launch.program.code[s.pc as usize];
            if matches!(inst.exec, Exec::Control(Control::WarpBarrier)) {
                run.warp.select(s.frame);
                let masks = run.warp.regs.get::<u32>(inst.src(0));
                all |= lanes_of(s.mask).filter(|i| masks[*i] == members).fold(0, |all, i| all | 1 << i);
            }
        }
        run.warp.select(selected);
        all
    }

    fn pass_warp_barriers(&mut self, w: usize, lanes: u32, launch: &LaunchState<'_>) {
        let run = &mut self.warps[w];
        for s in 0..run.splits.len() {
            let split = &run.splits[s];
            let barrier =
                matches!(launch.program.code[split.pc as usize].exec, Exec::Control(Control::WarpBarrier));
            let part = split.mask & lanes;
            if split.state != State::Sync || !barrier || part == 0 {
                continue;
            }
            let pc = split.pc;
            if part != split.mask {
                let rest = split.mask & !part;
                run.leave_behind(s, rest, State::Sync, pc);
            }
            run.splits[s].state = State::Ready;
            run.splits[s].pc = pc + 1;
        }
    }

    /// Takes the lanes `lanes` out of the splits that wait at `pc`, and gives each of the parts `state`.
    fn gather(&mut self, w: usize, pc: u32, frame: Frame, lanes: u32, state: State) {
        let run = &mut self.warps[w];
        for s in 0..run.splits.len() {
            let split = &run.splits[s];
            let part = split.mask & lanes;
            if split.state != State::Sync || split.pc != pc || split.frame != frame || part == 0 {
                continue;
            }
            if part != split.mask {
                let rest = split.mask & !part;
                run.leave_behind(s, rest, State::Sync, pc);
            }
            run.splits[s].state = state;
        }
    }

    fn execute_synced(
        &mut self,
        w: usize,
        pc: u32,
        frame: Frame,
        lanes: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<(), Stop> {
        let inst = &launch.program.code[pc as usize];
        let count = &mut worker.counters.insts[pc as usize];
        count.warps += 1;
        count.lanes += u64::from(lanes.count_ones());
        self.block.work.instructions += 1;
        self.block.executed += 1;
        self.gather(w, pc, frame, lanes, State::Ready);
        let run = &mut self.warps[w];
        for split in
            run.splits.iter_mut().filter(|s| s.state == State::Ready && s.pc == pc && s.mask & lanes != 0)
        {
            split.pc = pc + 1;
        }
        if let Exec::Warp(op) = &inst.exec {
            let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, 0);
            op.execute(&mut ctx, inst, lanes)?;
        }
        Ok(())
    }

    /// Lanes of a warp reach a block barrier; the splits that hold them stand at `pc`.
    fn reach(
        &mut self,
        w: usize,
        pc: u32,
        lanes: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<(), Stop> {
        let inst = &launch.program.code[pc as usize];
        let Exec::Control(Control::Barrier { kind, counted, .. }) = inst.exec else {
            unreachable!("the instruction is a barrier")
        };
        let regs = &self.warps[w].warp.regs;
        let first = lanes.trailing_zeros() as usize;
        let id = regs.get::<u32>(inst.src(0))[first];
        let count = counted.then(|| regs.get::<u32>(inst.src(1))[first]);
        let fault = |me: &Self, message: String| Err(me.stop(launch, w, pc, Kind::Barrier, lanes, message));
        for lane in lanes_of(lanes) {
            let other =
                (regs.get::<u32>(inst.src(0))[lane], counted.then(|| regs.get::<u32>(inst.src(1))[lane]));
            if other != (id, count) {
                return fault(self, format!("lanes name different barriers or counts: {id} and {}", other.0));
            }
        }
        if id as usize >= BARRIERS {
            return fault(self, format!("barrier {id}: there are {BARRIERS}"));
        }
        let most = self.block.warps * LANES as u32;
        if let Some(count) = count.filter(|c| c % LANES as u32 != 0 || *c == 0 || *c > most) {
            return fault(
                self,
                format!("a count of {count} threads: it must be a multiple of 32 up to the block's {most}"),
            );
        }
        let pred = regs.pred(inst.src(2)) ^ if inst.imm != 0 { u32::MAX } else { 0 };
        let live = self.warps[w].warp.live;
        let barrier = &mut self.barriers[id as usize];
        if let Some(before) = barrier.count.filter(|b| *b != count) {
            let told = |c: Option<u32>| c.map_or("all threads".to_owned(), |c| format!("{c} threads"));
            let message =
                format!("barrier {id} is used for {} here and for {} elsewhere", told(count), told(before));
            return fault(self, message);
        }
        barrier.count = Some(count);
        let reduces = |k: BarrierKind| !matches!(k, BarrierKind::Sync | BarrierKind::Arrive);
        if let Some(before) = barrier.kind.filter(|b| *b != kind && (reduces(*b) || reduces(kind))) {
            return fault(self, format!("barrier {id} does {kind:?} here and {before:?} elsewhere"));
        }
        barrier.kind = Some(kind);
        barrier.arrived[w] |= lanes;
        // Barriers count whole warps: lanes that exited or never were count as well.
        barrier.threads += if lanes == live {
            LANES as u32
        } else if barrier.arrived[w] == live {
            LANES as u32 - (live & !lanes).count_ones()
        } else {
            lanes.count_ones()
        };
        barrier.warps.push(w as u32);
        barrier.popc += (pred & lanes).count_ones();
        barrier.seen.0 |= !pred & lanes != 0;
        barrier.seen.1 |= pred & lanes != 0;
        if let Some(count) = count
            && barrier.threads > count
        {
            let threads = barrier.threads;
            return fault(self, format!("{threads} threads arrive at barrier {id}, which opens at {count}"));
        }
        let arrive = kind == BarrierKind::Arrive;
        for split in self.warps[w].splits.iter_mut() {
            if split.pc == pc && split.mask & lanes != 0 && split.state == State::Ready {
                if arrive {
                    split.pc = pc + 1;
                } else {
                    split.state = State::Barrier(id as u8);
                }
            }
        }
        self.open(id as usize, launch, worker);
        Ok(())
    }

    /// Opens barrier `id` if all that it waits for have arrived.
    fn open(&mut self, id: usize, launch: &LaunchState<'_>, worker: &mut Worker) {
        let barrier = &self.barriers[id];
        let Some(count) = barrier.count else { return };
        let complete = match count {
            Some(count) => barrier.threads >= count,
            None => self.warps.iter().zip(&barrier.arrived).all(|(w, arrived)| w.warp.live & !arrived == 0),
        };
        if !complete {
            return;
        }
        worker.counters.barriers += 1;
        let (popc, seen) = (barrier.popc, barrier.seen);
        let mut waiting = Vec::new();
        for (w, run) in self.warps.iter_mut().enumerate() {
            let mut woke = false;
            for s in 0..run.splits.len() {
                if run.splits[s].state != State::Barrier(id as u8) {
                    continue;
                }
                woke = true;
                let (pc, mask, frame) = (run.splits[s].pc, run.splits[s].mask, run.splits[s].frame);
                let inst = &launch.program.code[pc as usize];
                run.warp.select(frame);
                if let Exec::Control(Control::Barrier { kind, .. }) = inst.exec {
                    let value = match kind {
                        BarrierKind::Popc => u64::from(popc),
                        BarrierKind::And => u64::from(!seen.0),
                        BarrierKind::Or => u64::from(seen.1),
                        BarrierKind::Sync | BarrierKind::Arrive => 0,
                    };
                    broadcast(&mut run.warp.regs, inst.dst(0), mask, value);
                }
                run.splits[s].pc = pc + 1;
                run.splits[s].state = State::Ready;
            }
            if woke {
                waiting.push(w as u32);
                run.merge();
                if self.status[w] == Turn::Blocked {
                    self.status[w] = Turn::Over;
                }
            }
        }
        let mut arrived = std::mem::take(&mut self.barriers[id].warps);
        arrived.sort_unstable();
        arrived.dedup();
        self.block.clocks.barrier(&arrived, &waiting);
        self.barriers[id].clear(self.warps.len());
    }
}

/// The join behind a call that may part lanes; there is none where lanes only exit.
fn join_behind(launch: &LaunchState<'_>, pc: u32) -> Option<u32> {
    let behind = launch.program.code.get(pc as usize + 1)?;
    matches!(behind.exec, Exec::Control(Control::Join)).then_some(pc + 1)
}

/// The lanes `m` of split `s` wait in `state` at the split's pc; the rest goes on behind it.
fn wait(run: &mut WarpRun, s: usize, m: u32, state: State) {
    let rest = run.splits[s].mask & !m;
    let pc = run.splits[s].pc;
    if rest != 0 {
        run.leave_behind(s, rest, State::Ready, pc);
        let last = run.splits.len() - 1;
        run.splits[last].pc = pc + 1;
        run.splits[s].pc = pc;
    }
    run.splits[s].state = state;
}

/// Whether all lanes that a warp-wide operation needs are among `m`, as one group.
#[inline(always)]
fn all_here(regs: &Registers, inst: &Inst, m: u32, live: u32) -> bool {
    match inst.sync {
        Sync::None => true,
        Sync::All => m == u32::MAX,
        Sync::Mask(i) => {
            let members = regs.get::<u32>(inst.src(i as usize));
            let first = members[m.trailing_zeros() as usize];
            first & live == m && lanes_of(m).all(|lane| members[lane] == first)
        }
    }
}

fn warp_barrier_here(regs: &Registers, inst: &Inst, m: u32, live: u32) -> bool {
    let members = regs.get::<u32>(inst.src(0));
    let first = members[m.trailing_zeros() as usize];
    first & live == m && lanes_of(m).all(|lane| members[lane] == first)
}

/// Keeps the initialisation state of what an operation of lanes wrote.
#[inline(always)]
fn follow(regs: &mut Registers, inst: &Inst, m: u32) {
    let defined = match inst.defs {
        Defs::All | Defs::Bytes => inst.srcs().iter().fold(u32::MAX, |all, r| all & regs.defined(*r)),
        Defs::Select => {
            let (a, b, p) = (inst.src(0), inst.src(1), inst.src(2));
            let chosen = regs.pred(p) ^ if inst.imm & 1 != 0 { u32::MAX } else { 0 };
            regs.defined(p) & ((regs.defined(a) & chosen) | (regs.defined(b) & !chosen))
        }
        Defs::Some(which) => {
            let counted = inst.srcs().iter().enumerate().filter(|(i, _)| which >> i & 1 != 0);
            counted.fold(u32::MAX, |all, (_, r)| all & regs.defined(*r))
        }
        Defs::Own => return,
    };
    if inst.defs == Defs::Bytes && regs.any_partly() && m & !defined != 0 {
        return follow_bytes(regs, inst, m, defined);
    }
    for i in 0..inst.dsts as usize {
        regs.set_defined(inst.dst(i), m, defined);
    }
}

/// The same for an operation on bytes some of whose sources are written in part.
#[cold]
fn follow_bytes(regs: &mut Registers, inst: &Inst, m: u32, defined: u32) {
    let written =
        |lane: usize| inst.srcs().iter().fold(u16::MAX, |all, r| all & regs.written_bytes(*r, lane));
    let bytes: Vec<(usize, u16)> = lanes_of(m & !defined).map(|lane| (lane, written(lane))).collect();
    regs.set_defined(inst.dst(0), m, defined);
    for (lane, bytes) in bytes {
        regs.set_written_bytes(inst.dst(0), lane, bytes);
    }
}

/// Selects the frame of a function and sets it up in the lanes of `mask`.
fn enter(run: &mut WarpRun, launch: &LaunchState<'_>, frame: Frame, mask: u32, block: &Block) {
    let f = &launch.program.functions[frame.function as usize];
    run.warp.select(frame);
    let regs = &mut run.warp.regs;
    regs.reserve(f.rows as usize, f.preds as usize);
    regs.forget(f.rows as usize, f.preds as usize, mask);
    for (reg, constant) in &f.constants {
        broadcast(regs, *reg, mask, launch.resolve(*constant, frame.local_base));
    }
    for (reg, special) in &f.specials {
        set_special(regs, *reg, mask, *special, launch, run.warp.id, block);
    }
    if f.local_bytes > 0 {
        run.warp.local.reserve(frame.local_base + f.local_bytes);
        run.warp.local.forget(mask, frame.local_base, f.local_bytes);
    }
}

fn set_special(
    regs: &mut Registers,
    reg: Reg,
    mask: u32,
    special: Special,
    launch: &LaunchState<'_>,
    warp: u32,
    block: &Block,
) {
    use Special as S;
    let [bx, by, bz] = launch.block;
    let [gx, gy, gz] = launch.grid;
    let [cx, cy, cz] = block.index;
    let mut lanes = [0; LANES];
    for (i, lane) in lanes.iter_mut().enumerate() {
        let thread = warp * LANES as u32 + i as u32;
        let bit = 1u32 << i;
        *lane = match special {
            S::TidX => thread % bx,
            S::TidY => thread / bx % by,
            S::TidZ => thread / bx / by,
            S::NtidX => bx,
            S::NtidY => by,
            S::NtidZ => bz,
            // Without clusters of several blocks, each block is a cluster.
            S::CtaidX | S::ClusteridX => cx,
            S::CtaidY | S::ClusteridY => cy,
            S::CtaidZ | S::ClusteridZ => cz,
            S::NctaidX | S::NclusteridX => gx,
            S::NctaidY | S::NclusteridY => gy,
            S::NctaidZ | S::NclusteridZ => gz,
            S::LaneId => i as u32,
            S::WarpId => warp,
            S::NwarpId => block.warps,
            S::SmId => (block.number % u64::from(launch.multiprocessors)) as u32,
            S::NsmId => launch.multiprocessors,
            S::LanemaskEq => bit,
            S::LanemaskLt => bit - 1,
            S::LanemaskLe => bit | (bit - 1),
            S::LanemaskGt => !(bit | (bit - 1)),
            S::LanemaskGe => !(bit - 1),
            S::DynamicSmemSize => launch.shared_bytes - launch.dynamic_shared,
            S::TotalSmemSize => launch.shared_bytes,
            // The system's part of shared memory is not there: whoever uses its address (barriers of cooperative-group
            // tiles wider than a warp do) gets an out-of-bounds fault; unoptimised code takes the address everywhere.
            S::ReservedSmemOffset1 => 0xffff_fc00,
            S::ClusterCtaidX | S::ClusterCtaidY | S::ClusterCtaidZ | S::ClusterCtarank => 0,
            S::ClusterNctaidX | S::ClusterNctaidY | S::ClusterNctaidZ | S::ClusterNctarank => 1,
            S::GridId | S::IsExplicitCluster => 0,
        };
    }
    match special {
        S::GridId => broadcast(regs, reg, mask, u64::from(launch.serial)),
        S::IsExplicitCluster => broadcast(regs, reg, mask, 0),
        _ => {
            regs.set::<u32>(reg, mask, &lanes);
            regs.set_defined(reg, mask, u32::MAX);
        }
    }
}
