//! Runs a block: which warp is next, and a warp's instructions. `control` is control flow but for branches, `meet` where
//! lanes and warps wait for each other, `cluster` how blocks run together, `frame` how a function's frame is set up.

mod cluster;
mod control;
mod frame;
mod meet;

pub(crate) use self::cluster::ClusterRun;
use self::frame::{enter, enter_again};
use super::barrier::{BARRIERS, Barrier, CLUSTER, WARPS};
use super::block::{Block, Poll};
use super::context::{Context, Stop};
use super::counters::BlockWork;
use super::inst::{Control, Convergence, Exec, Inst};
use super::launch::{LaunchState, Worker};
use super::memory::lanes;
use super::memory::mbarrier::Awaited;
use super::memory::race::{BlockClock, Clocks};
use super::registers::{Definedness, LANES, Registers};
use super::warp::{Frame, State, WarpRun};
use super::written::follow;
use crate::error::ErrorKind;

/// Instructions that a warp runs before the block's other warps do, where no seed draws the length.
const TIME_SLICE: u64 = 1 << 16;
/// Atomics or strong loads that a warp may run while lanes of it wait at joins. Then a join is released, because the warp
/// may be spinning until those lanes go on, as in a spin lock whose owner has left the loop.
const SPINS: u32 = 1024;
/// Waits at mbarriers in vain that a warp may make in a row, before it counts as one that only waits. Programs that give up
/// some day give up earlier.
const VAIN_POLLS: u32 = 1 << 14;
/// Whether a warp can go on after its time slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WarpStatus {
    /// All lanes have exited.
    Done,
    /// All lanes wait for the block.
    Blocked,
    /// It can go on.
    Ready,
}

/// How a block's run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// All threads have exited.
    Done,
    /// It can go on: each warp had a time slice.
    Ready,
    /// No warp can go on, unless another block of the cluster does something.
    Stuck,
}

/// Waits of a warp in vain at mbarriers.
#[derive(Clone, Copy, Debug, Default)]
struct Vain {
    /// How many in a row, since the block's progress was last `progress`.
    polls: u32,
    progress: u64,
    /// The last.
    last: Option<Poll>,
}

/// A block and all that runs it.
pub(crate) struct BlockRun {
    block: Block,
    warps: Vec<WarpRun>,
    status: Vec<WarpStatus>,
    /// Those that the program names, then one for each warpgroup.
    barriers: Vec<Barrier>,
    /// Each warp's last wait in vain at an mbarrier.
    vain: Vec<Vain>,
    /// State of the schedule's random numbers; `None` runs warps in order.
    random: Option<u64>,
    /// Which registers a warp begins with, once a block has begun.
    begun: Option<Definedness>,
}

/// The next number of splitmix64.
pub(super) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl BlockRun {
    /// Prepares for blocks of a launch; `start` begins one.
    pub(super) fn new(launch: &LaunchState<'_>) -> Self {
        let threads: u32 = launch.block.iter().product();
        let warps = threads.div_ceil(LANES as u32);
        Self {
            block: Block { index: [0; 3], number: 0, warps, executed: 0, ..Block::default() },
            warps: (0..warps).map(WarpRun::new).collect(),
            status: vec![WarpStatus::Done; warps as usize],
            barriers: vec![Barrier::default(); BARRIERS + warps.div_ceil(WARPS) as usize],
            vain: vec![Vain::default(); warps as usize],
            random: None,
            begun: None,
        }
    }

    /// Begins the block of the grid that comes `order`-th. The first one of a cluster begins that, too.
    pub(super) fn start(&mut self, launch: &LaunchState<'_>, order: u64) {
        let [gx, gy, _] = launch.grid.map(u64::from);
        let (blocks, index) = (launch.cluster_blocks(), launch.index_of(order));
        let number = u64::from(index[0]) + gx * (u64::from(index[1]) + gy * u64::from(index[2]));
        (self.block.order, self.block.number, self.block.index) = (order, number, index);
        self.block.executed = 0;
        self.block.epochs = BlockClock::default();
        self.block.warp_lines.start();
        self.block.work = BlockWork::default();
        let reserved = launch.kernel.system.reserved_shared;
        let agent = launch.kernel.asynchronous;
        let parties = Clocks::parties(blocks as u32, self.block.warps, agent);
        self.block.shared.start(launch.shared_span, reserved, launch.kernel.shared_grain, parties);
        if order.is_multiple_of(blocks) {
            self.block.clocks.start(blocks as u32, self.block.warps, agent);
            let live = self.block.cluster.is_some().then(|| self.first_lanes(launch));
            if let (Some(cluster), Some(live)) = (&mut self.block.cluster, live) {
                cluster.start(blocks as usize, &live);
            }
        }
        self.block.flights.clear();
        self.block.products.clear();
        self.block.bulk.clear();
        self.block.poll = None;
        (self.block.granted, self.block.refused) = (0, false);
        self.vain.fill(Vain::default());
        self.random = launch.seed.map(|seed| seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        let threads: u32 = launch.block.iter().product();
        for barrier in &mut self.barriers {
            barrier.clear(self.warps.len());
        }
        self.status.fill(WarpStatus::Ready);
        for (i, w) in self.warps.iter_mut().enumerate() {
            let first = i as u32 * LANES as u32;
            let here = (threads - first).min(LANES as u32);
            let mask = if here == LANES as u32 { u32::MAX } else { (1 << here) - 1 };
            let f = launch.kernel;
            w.start(f.start, mask, launch.kernel_index);
            let frame = Frame { function: launch.kernel_index, ..Frame::default() };
            match &self.begun {
                None => enter(w, launch, frame, u32::MAX, &self.block),
                Some(begun) => enter_again(w, launch, frame, begun, &self.block),
            }
        }
        if self.begun.is_none() {
            let f = launch.kernel;
            self.begun =
                self.warps.first().map(|w| w.warp.regs.definedness(f.rows as usize, f.preds as usize));
        }
    }

    /// Runs the block until it is done, or for one time slice of each warp.
    pub(super) fn run(
        &mut self,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
        to_the_end: bool,
    ) -> Result<Progress, Stop> {
        loop {
            match self.round(launch, worker)? {
                Progress::Stuck => return Err(self.deadlock(launch)),
                Progress::Ready if to_the_end => {}
                progress => return Ok(progress),
            }
        }
    }

    /// Runs the block for one time slice of each warp.
    fn round(&mut self, launch: &LaunchState<'_>, worker: &mut Worker) -> Result<Progress, Stop> {
        if self.block.cluster.is_some() {
            self.wake_cluster(launch, worker);
        }
        let mut moved = false;
        for k in 0..self.warps.len() {
            let (w, slice) = match &mut self.random {
                None => (k, TIME_SLICE),
                Some(state) => {
                    let r = random(state);
                    ((r >> 32) as usize % self.warps.len(), 1 + (r & 255))
                }
            };
            if self.status[w] == WarpStatus::Ready {
                moved = true;
                self.status[w] = self.run_warp(w, slice, launch, worker)?;
                if self.vain[w].polls >= VAIN_POLLS && self.all_wait() {
                    return Ok(Progress::Stuck);
                }
            }
        }
        if self.status.iter().all(|s| *s == WarpStatus::Done) {
            self.end(launch, worker)?;
            return Ok(Progress::Done);
        }
        let stuck = !moved && !self.status.contains(&WarpStatus::Ready);
        Ok(if stuck { Progress::Stuck } else { Progress::Ready })
    }

    /// All threads have exited.
    fn end(&mut self, launch: &LaunchState<'_>, worker: &mut Worker) -> Result<(), Stop> {
        let pc = launch.kernel.start;
        if self.block.cluster.is_some() {
            let warps = self.block.warps;
            let mut ctx = Context::new(&mut self.warps[0].warp, &mut self.block, launch, worker, pc, 0);
            ctx.leave_cluster(warps);
        }
        if self.block.bulk.is_empty() {
            return Ok(());
        }
        Context::new(&mut self.warps[0].warp, &mut self.block, launch, worker, pc, 0).end_bulk()
    }

    /// The block's work so far.
    pub(super) fn work(&self) -> BlockWork {
        self.block.work
    }

    fn stop(
        &self,
        launch: &LaunchState<'_>,
        w: usize,
        pc: u32,
        kind: ErrorKind,
        lanes: u32,
        message: String,
    ) -> Stop {
        let mut finding = crate::error::Finding::load(kind, launch.place(pc), message);
        finding.kernel = launch.kernel_name().to_owned();
        finding.threads = Some(crate::error::Threads { block: self.block.index, warp: w as u32, lanes });
        Stop(Box::new(finding))
    }

    /// A warp has waited in vain at an mbarrier.
    #[cold]
    fn poll_in_vain(&mut self, w: usize, poll: Poll) {
        let vain = &mut self.vain[w];
        if vain.progress != self.block.progress {
            *vain = Vain { progress: self.block.progress, ..Vain::default() };
        }
        vain.polls += 1;
        vain.last = Some(poll);
    }

    /// Whether all warps only wait: nothing has happened since each began to.
    fn all_wait(&self) -> bool {
        let waits = |(status, vain): (&WarpStatus, &Vain)| {
            *status != WarpStatus::Ready || vain.polls >= VAIN_POLLS && vain.progress == self.block.progress
        };
        self.status.iter().zip(&self.vain).all(waits)
    }

    /// The finding when no warp of the block can run.
    fn deadlock(&mut self, launch: &LaunchState<'_>) -> Stop {
        let stuck = |converging: bool| {
            let all =
                self.warps.iter().enumerate().flat_map(|(w, run)| run.splits.iter().map(move |s| (w, s)));
            all.filter(|(_, s)| (s.state == State::Converging) == converging).collect::<Vec<_>>()
        };
        // The cause are lanes that wait for lanes of their own warp, if there are any: barriers wait for them.
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
            match *id as usize {
                id if id < BARRIERS => format!("warps {warps:?} wait at barrier {id} (line {line})"),
                id if id == CLUSTER as usize => {
                    format!("warps {warps:?} wait at the cluster's barrier (line {line})")
                }
                _ => format!("warps {warps:?} wait for the other warps of their warpgroup (line {line})"),
            }
        });
        let mut told: Vec<String> = told.collect();
        let first = waiting.iter().find(|(_, s)| matches!(s.state, State::Barrier(_)));
        let (mut w, s) = first.map_or((0, None), |(w, s)| (*w, Some(s)));
        let (mut pc, mut mask) = s.map_or((launch.kernel.start, 0), |s| (s.pc, s.mask));
        // Who waits at an mbarrier is told first, since warps at a barrier may wait for it.
        let polls = self.polls(launch);
        if let Some((warps, poll, _)) = polls.first() {
            (w, pc, mask) = (warps[0] as usize, poll.pc, poll.lanes);
        }
        told.splice(0..0, polls.iter().map(|(warps, _, what)| format!("warps {warps:?} {what}")));
        let told = told.join("; ");
        self.stop(launch, w, pc, ErrorKind::Deadlock, mask, format!("no warp of the block can go on: {told}"))
    }

    /// The warps that only wait at mbarriers, those that wait at the same place for the same together: with their waits in
    /// words.
    fn polls(&mut self, launch: &LaunchState<'_>) -> Vec<(Vec<u32>, Poll, String)> {
        let mut all: Vec<(Vec<u32>, Poll, String)> = Vec::new();
        for (w, vain) in self.vain.iter().enumerate() {
            let only_waits = self.status[w] == WarpStatus::Ready && vain.polls >= VAIN_POLLS;
            let Some(poll) = vain.last.filter(|_| only_waits) else { continue };
            let what = match poll.awaited {
                Awaited::Parity(parity) => format!("the phase of parity {}", parity & 1),
                Awaited::State(_) => "the phase of their state".to_owned(),
            };
            let coming = self.block.flights.coming(poll.at);
            let object = self.block.shared.mbarriers.at(poll.at);
            let counts = object.map_or_else(|why| why, |object| object.describe_without(coming));
            let (line, at) = (launch.place(poll.pc).line, poll.at);
            let told = format!("wait for {what} of the mbarrier at {at:#x} (line {line}), whose {counts}");
            match all.iter_mut().find(|(.., other)| *other == told) {
                Some((warps, ..)) => warps.push(w as u32),
                None => all.push((vec![w as u32], poll, told)),
            }
        }
        all
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
            Exec::Control(Control::Barrier { .. } | Control::ClusterBarrier { .. }) => {
                (ErrorKind::Barrier, "a barrier that the whole warp must reach")
            }
            _ => (ErrorKind::WarpMask, "a warp-wide operation whose mask names lanes that do not take part"),
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

    // ---------------------------------------------------------------------------------------------- a warp's time slice

    fn run_warp(
        &mut self,
        w: usize,
        slice: u64,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<WarpStatus, Stop> {
        let mut left = slice;
        loop {
            let run = &mut self.warps[w];
            if let Some(s) = run.splits.iter().position(|s| s.state == State::Ready) {
                if left == 0 {
                    // The split may spin: the warp's others get the next time slice.
                    run.splits.rotate_left(1);
                    if self.block.executed > launch.budget {
                        let (pc, mask) = (self.warps[w].splits[0].pc, self.warps[w].splits[0].mask);
                        let message =
                            format!("the block has executed its budget of {} instructions", launch.budget);
                        return Err(self.stop(launch, w, pc, ErrorKind::Budget, mask, message));
                    }
                    return Ok(WarpStatus::Ready);
                }
                let most = left.min(launch.budget.saturating_sub(self.block.executed) + 1);
                let ran = match run.warp.products.watched() {
                    false => self.run_split::<false>(w, s, most, launch, worker)?,
                    true => self.run_split::<true>(w, s, most, launch, worker)?,
                };
                self.block.executed += ran;
                left = left.saturating_sub(ran.max(1));
                if let Some(poll) = self.block.poll.take() {
                    // What it waits for is the others' to do.
                    self.poll_in_vain(w, poll);
                    left = 0;
                }
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
                return Ok(WarpStatus::Done);
            }
            if self.meet(w, launch, worker)? {
                continue;
            }
            let run = &mut self.warps[w];
            // Lanes at a join are released first, because the instruction that the others wait at may lie behind the join.
            if run.splits.iter().any(|s| s.state == State::Converging) && run.release_one() {
                continue;
            }
            if run.splits.iter().any(|s| matches!(s.state, State::Barrier(_))) {
                if run.anyone_joined() && run.release_one() {
                    continue;
                }
                return Ok(WarpStatus::Blocked);
            }
            if run.release_one() {
                continue;
            }
            let (pc, mask) = run.splits.first().map_or((launch.kernel.start, 0), |s| (s.pc, s.mask));
            return Err(self.stuck_warp(launch, w, pc, mask));
        }
    }

    /// Runs split `s` until it waits, diverges or ends, for at most `most` instructions. Returns how many it ran. With `WATCH` the
    /// warp's asynchronous products look at each instruction; where that begins or ends, it returns as well.
    fn run_split<const WATCH: bool>(
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
                    ctx.finding(ErrorKind::Uninitialized, lanes, None, || {
                        "the predicate that guards this was never written, or follows from a value that was not".into()
                    });
                }
            }
            if WATCH
                && m != 0
                && !inst.watched
                && let Some((misuse, other)) = run.warp.products.touch(inst, frame.base)
            {
                let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, ran);
                ctx.misused(misuse, other);
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
                        if inst.convergence != Convergence::None
                            && !all_here(&run.warp.regs, inst, m, run.warp.live)
                        {
                            run.splits[s].pc = pc;
                            wait(run, s, m, State::Converging);
                            worker.counters.insts[pc as usize].warps -= 1;
                            worker.counters.insts[pc as usize].lanes -= u64::from(m.count_ones());
                            self.block.work.instructions -= 1;
                            self.meet(w, launch, worker)?;
                            return Ok(ran);
                        }
                        let mut ctx = Context::new(&mut run.warp, &mut self.block, launch, worker, pc, ran);
                        op.execute(&mut ctx, inst, m)?;
                        if run.warp.products.watched() != WATCH {
                            run.splits[s].pc = pc + 1;
                            return Ok(ran);
                        }
                        if inst.may_wait {
                            run.spins = if run.anyone_joined() { run.spins + 1 } else { 0 };
                            let in_vain = self.block.poll.is_some();
                            self.block.progress += u64::from(!in_vain);
                            if run.spins >= SPINS || in_vain {
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
                Exec::Control(_) => {
                    run.splits[s].pc = pc;
                    if m == 0 {
                        pc += 1;
                        continue;
                    }
                    self.control(w, s, m, launch, worker)?;
                    return Ok(ran);
                }
            }
        }
        run.splits[s].pc = pc;
        Ok(ran)
    }
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
    match inst.convergence {
        Convergence::None => true,
        Convergence::All => m == u32::MAX,
        Convergence::Mask(i) => {
            let members = regs.get::<u32>(inst.src(i as usize));
            let first = members[m.trailing_zeros() as usize];
            first & live == m && lanes(m).all(|lane| members[lane] == first)
        }
    }
}
