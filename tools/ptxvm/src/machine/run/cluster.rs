//! Blocks that run at the same time as a cluster, and their barrier.

use super::{BlockRun, Progress, WarpStatus, lanes};
use crate::error::ErrorKind;
use crate::machine::barrier::CLUSTER;
use crate::machine::context::{Context, Stop};
use crate::machine::counters::BlockWork;
use crate::machine::inst::{Control, Exec};
use crate::machine::launch::{LaunchState, Worker};
use crate::machine::warp::State;

/// Blocks that are started together: a cluster, which mostly is one block.
pub(crate) struct ClusterRun {
    blocks: Vec<BlockRun>,
    done: Vec<bool>,
    /// The block that has the cluster's state.
    now: usize,
}

impl ClusterRun {
    /// Prepares for clusters of a launch; `start` begins one.
    pub(in crate::machine) fn new(launch: &LaunchState<'_>) -> Self {
        let n = launch.cluster_blocks() as usize;
        let mut blocks: Vec<BlockRun> = (0..n).map(|_| BlockRun::new(launch)).collect();
        if n > 1 || launch.kernel.meets_cluster {
            blocks[0].block.cluster = Some(Box::default());
        }
        Self { blocks, done: vec![false; n], now: 0 }
    }

    /// Begins the cluster of a number, x fastest.
    pub(in crate::machine) fn start(&mut self, launch: &LaunchState<'_>, number: u64) {
        let n = self.blocks.len();
        self.done.fill(false);
        self.enter(0);
        for rank in 0..n {
            self.enter(rank);
            self.blocks[rank].start(launch, number * n as u64 + rank as u64);
        }
    }

    /// Gives the cluster's state to another of its blocks.
    fn enter(&mut self, to: usize) {
        let from = std::mem::replace(&mut self.now, to);
        if from == to {
            return;
        }
        let n = self.blocks.len();
        let here = &mut self.blocks[from].block;
        let (mut cluster, mut clocks, progress) =
            (here.cluster.take(), std::mem::take(&mut here.clocks), here.progress);
        if let Some(cluster) = cluster.as_mut().filter(|c| c.memories.len() == n) {
            here.swap_memory(&mut cluster.memories[from]);
            self.blocks[to].block.swap_memory(&mut cluster.memories[to]);
            (cluster.rank, cluster.shown) = (to, to);
        }
        clocks.enter(to);
        let there = &mut self.blocks[to].block;
        (there.cluster, there.clocks, there.progress) = (cluster, clocks, progress);
    }

    /// Runs the blocks until they are done, or for one time slice of each warp.
    pub(in crate::machine) fn run(
        &mut self,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
        to_the_end: bool,
    ) -> Result<Progress, Stop> {
        if let [block] = self.blocks.as_mut_slice() {
            return block.run(launch, worker, to_the_end);
        }
        loop {
            let mut moved = false;
            for rank in 0..self.blocks.len() {
                if self.done[rank] {
                    continue;
                }
                self.enter(rank);
                let progress = self.blocks[rank].round(launch, worker)?;
                self.done[rank] = progress == Progress::Done;
                moved |= progress != Progress::Stuck;
            }
            if !self.done.contains(&false) {
                return Ok(Progress::Done);
            }
            if !moved {
                return Err(self.deadlock(launch));
            }
            if !to_the_end {
                return Ok(Progress::Ready);
            }
        }
    }

    /// The blocks' work so far.
    pub(in crate::machine) fn work(&self) -> impl Iterator<Item = BlockWork> {
        self.blocks.iter().map(BlockRun::work)
    }

    /// No warp of the cluster can go on. The first block's finding, with what the others wait for.
    fn deadlock(&mut self, launch: &LaunchState<'_>) -> Stop {
        let mut all: Vec<(usize, Stop)> = Vec::new();
        for rank in (0..self.blocks.len()).filter(|rank| !self.done[*rank]).collect::<Vec<_>>() {
            self.enter(rank);
            all.push((rank, self.blocks[rank].deadlock(launch)));
        }
        let (first, rest) = all.split_at_mut(1);
        for (rank, other) in rest {
            let what = other.0.message.split_once(": ").map_or("", |(_, what)| what);
            first[0].1.0.message.push_str(&format!("; in block {rank} of the cluster: {what}"));
        }
        let gone: Vec<usize> = (0..self.blocks.len()).filter(|rank| self.done[*rank]).collect();
        if !gone.is_empty() {
            first[0].1.0.message.push_str(&format!("; blocks {gone:?} of the cluster have left"));
        }
        all.swap_remove(0).1
    }
}

impl BlockRun {
    /// Lanes of a warp reach `barrier.cluster.arrive` or `.wait`; the splits that hold them stand at `pc`.
    pub(super) fn reach_cluster(
        &mut self,
        w: usize,
        pc: u32,
        lanes: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) -> Result<(), Stop> {
        let Exec::Control(Control::ClusterBarrier { arrives, orders, .. }) =
            launch.program.code[pc as usize].exec
        else {
            unreachable!("the instruction is the cluster's barrier")
        };
        self.block.progress += 1;
        let (block, run) = (&mut self.block, &mut self.warps[w]);
        let Some(cluster) = &mut block.cluster else {
            unreachable!("a kernel with the instruction has a cluster")
        };
        let here =
            |s: &crate::machine::warp::Split| s.pc == pc && s.mask & lanes != 0 && s.state == State::Ready;
        if arrives {
            if let Err(what) = cluster.arrive(w, lanes) {
                return Err(self.stop(launch, w, pc, ErrorKind::Barrier, lanes, what.to_owned()));
            }
            Context::new(&mut run.warp, block, launch, worker, pc, 0).bring_to_cluster_barrier(orders);
            run.splits.iter_mut().filter(|s| here(s)).for_each(|s| s.pc = pc + 1);
            self.open_cluster(launch, worker);
            return Ok(());
        }
        let passed = match cluster.wait(w, lanes) {
            Ok(passed) => passed,
            Err(what) => return Err(self.stop(launch, w, pc, ErrorKind::Barrier, lanes, what.to_owned())),
        };
        for s in 0..run.splits.len() {
            if !here(&run.splits[s]) {
                continue;
            }
            let go = run.splits[s].mask & passed;
            if go == 0 {
                run.splits[s].state = State::Barrier(CLUSTER);
                continue;
            }
            if go != run.splits[s].mask {
                let rest = run.splits[s].mask & !go;
                run.leave_behind(s, rest, State::Barrier(CLUSTER), pc);
            }
            run.splits[s].pc = pc + 1;
        }
        if passed != 0 {
            Context::new(&mut run.warp, block, launch, worker, pc, 0).pass_cluster_barrier(passed);
        }
        Ok(())
    }

    /// Completes the phase of the cluster's barrier if it can, and then wakes the block's warps. The other blocks' wake when
    /// these run.
    pub(super) fn open_cluster(&mut self, launch: &LaunchState<'_>, worker: &mut Worker) {
        if self.block.cluster.as_mut().is_some_and(|c| c.complete()) {
            worker.counters.barriers += 1;
            self.block.progress += 1;
            self.wake_cluster(launch, worker);
        }
    }

    /// Lets warps go on that wait for a phase of the cluster's barrier which is complete.
    pub(super) fn wake_cluster(&mut self, launch: &LaunchState<'_>, worker: &mut Worker) {
        for w in 0..self.warps.len() {
            let (block, run) = (&mut self.block, &mut self.warps[w]);
            let mut woken = 0;
            for s in 0..run.splits.len() {
                let split = &run.splits[s];
                let Some(cluster) = block.cluster.as_ref().filter(|_| split.state == State::Barrier(CLUSTER))
                else {
                    continue;
                };
                let (mask, pc) = (split.mask, split.pc);
                let go = cluster.wait(w, mask).unwrap_or(0);
                if go == 0 {
                    continue;
                }
                if go != mask {
                    run.leave_behind(s, mask & !go, State::Barrier(CLUSTER), pc);
                }
                run.splits[s].state = State::Ready;
                run.splits[s].pc = pc + 1;
                woken |= go;
            }
            if woken != 0 {
                let pc = launch.kernel.start;
                Context::new(&mut run.warp, block, launch, worker, pc, 0).pass_cluster_barrier(woken);
                run.merge();
                if self.status[w] == WarpStatus::Blocked {
                    self.status[w] = WarpStatus::Ready;
                }
            }
        }
    }

    /// Lanes exit, for whom the cluster's barrier no longer waits.
    pub(super) fn exit_cluster(
        &mut self,
        w: usize,
        lanes: u32,
        launch: &LaunchState<'_>,
        worker: &mut Worker,
    ) {
        if let Some(cluster) = &mut self.block.cluster {
            cluster.exit(w, lanes);
            self.open_cluster(launch, worker);
        }
    }

    /// The lanes of each warp when the block begins.
    pub(super) fn first_lanes(&self, launch: &LaunchState<'_>) -> Vec<u32> {
        let threads: u32 = launch.block.iter().product();
        let lanes = |first: u32| {
            lanes(u32::MAX).filter(|i| first + (*i as u32) < threads).fold(0, |all, i| all | 1 << i)
        };
        (0..self.warps.len() as u32).map(|w| lanes(32 * w)).collect()
    }
}
