//! Where lanes of a warp, and warps of a block, wait for each other: warp-wide operations and barriers.

use super::frame::broadcast;
use super::{BlockRun, WarpStatus, lanes as lanes_of};
use crate::error::ErrorKind;
use crate::machine::barrier::{BARRIERS, WARPS};
use crate::machine::context::{Context, Stop};
use crate::machine::inst::{BarrierKind, Control, Convergence, Exec, Inst};
use crate::machine::launch::{LaunchState, Worker};
use crate::machine::registers::{LANES, Registers};
use crate::machine::warp::{Frame, Split, State};

impl BlockRun {
    /// Runs warp-wide operations whose lanes are all there. Gives whether anybody went on.
    pub(super) fn meet(
        &mut self,
        w: usize,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<bool, Stop> {
        let mut moved = false;
        loop {
            let run = &self.warps[w];
            let waiting: Vec<(u32, Frame)> =
                run.splits.iter().filter(|s| s.state == State::Converging).map(|s| (s.pc, s.frame)).collect();
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
        let waits = |s: &&Split| s.state == State::Converging && s.pc == pc && s.frame == frame;
        let here = run.splits.iter().filter(waits).fold(0, |all, s| all | s.mask);
        let mask_reg = match (&inst.exec, inst.convergence) {
            (Exec::Control(Control::Barrier { .. }), _) => {
                if here != live {
                    return Ok(false);
                }
                self.gather(w, pc, frame, here, State::Ready);
                self.reach(w, pc, here, launch, worker)?;
                return Ok(true);
            }
            (Exec::Control(Control::ClusterBarrier { .. }), _) => {
                if here != live {
                    return Ok(false);
                }
                self.gather(w, pc, frame, here, State::Ready);
                self.reach_cluster(w, pc, here, launch, worker)?;
                return Ok(true);
            }
            (Exec::Control(Control::WarpBarrier), _) => inst.src(0),
            (_, Convergence::Mask(i)) => inst.src(i as usize),
            (_, Convergence::All | Convergence::None) => {
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
            return Err(self.stop(launch, w, pc, ErrorKind::WarpMask, strays, message));
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
                self.block.clocks.warp_barrier(w as u32);
                self.block.epochs.settle();
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
        for s in run.splits.iter().filter(|s| s.state == State::Converging) {
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
            if split.state != State::Converging || !barrier || part == 0 {
                continue;
            }
            let pc = split.pc;
            if part != split.mask {
                let rest = split.mask & !part;
                run.leave_behind(s, rest, State::Converging, pc);
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
            if split.state != State::Converging || split.pc != pc || split.frame != frame || part == 0 {
                continue;
            }
            if part != split.mask {
                let rest = split.mask & !part;
                run.leave_behind(s, rest, State::Converging, pc);
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
    pub(super) fn reach(
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
        let fault =
            |me: &Self, message: String| Err(me.stop(launch, w, pc, ErrorKind::Barrier, lanes, message));
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
        self.block.progress += 1;
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

    /// A warp has computed its part of a product; the last of its warpgroup wakes the others. It orders no memory.
    pub(super) fn meet_group(&mut self, w: usize, s: usize, launch: &LaunchState<'_>) -> Result<(), Stop> {
        let group = w / WARPS as usize;
        let id = BARRIERS + group;
        let (pc, mask) = (self.warps[w].splits[s].pc, self.warps[w].splits[s].mask);
        let waits = |other: &u32| {
            let found =
                self.warps[*other as usize].splits.iter().find(|s| s.state == State::Barrier(id as u8));
            found.filter(|s| s.pc != pc).map(|s| (*other, s.pc))
        };
        if let Some((other, at)) = self.barriers[id].warps.iter().find_map(waits) {
            let line = launch.place(at).line;
            let message =
                format!("warp {other} of the same warpgroup executes another product (line {line})");
            return Err(self.stop(launch, w, pc, ErrorKind::Wgmma, mask, message));
        }
        self.block.progress += 1;
        self.warps[w].splits[s].state = State::Barrier(id as u8);
        self.barriers[id].warps.push(w as u32);
        if self.barriers[id].warps.len() < WARPS as usize {
            return Ok(());
        }
        self.barriers[id].clear(self.warps.len());
        for w in group * WARPS as usize..(group + 1) * WARPS as usize {
            for split in self.warps[w].splits.iter_mut().filter(|s| s.state == State::Barrier(id as u8)) {
                split.state = State::Ready;
                split.pc += 1;
            }
            if self.status[w] == WarpStatus::Blocked {
                self.status[w] = WarpStatus::Ready;
            }
        }
        Ok(())
    }

    /// Opens barrier `id` if all that it waits for have arrived.
    pub(super) fn open(&mut self, id: usize, launch: &LaunchState<'_>, worker: &mut Worker) {
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
                if self.status[w] == WarpStatus::Blocked {
                    self.status[w] = WarpStatus::Ready;
                }
            }
        }
        let mut arrived = std::mem::take(&mut self.barriers[id].warps);
        if count.is_none() {
            // A barrier of all threads opens when the others have left, and what they wrote until then has been written.
            let left = self.warps.iter().enumerate().filter(|(_, w)| w.warp.live == 0);
            arrived.extend(left.map(|(w, _)| w as u32));
        }
        arrived.sort_unstable();
        arrived.dedup();
        self.block.clocks.barrier(&arrived, &waiting);
        self.block.epochs.settle();
        self.barriers[id].clear(self.warps.len());
    }
}

pub(super) fn warp_barrier_here(regs: &Registers, inst: &Inst, m: u32, live: u32) -> bool {
    let members = regs.get::<u32>(inst.src(0));
    let first = members[m.trailing_zeros() as usize];
    first & live == m && lanes_of(m).all(|lane| members[lane] == first)
}
