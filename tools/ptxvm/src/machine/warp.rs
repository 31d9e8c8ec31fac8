//! A warp while it runs: its registers, and where its lanes are.
//!
//! Lanes run in lockstep as one `Split` until they diverge at a branch. Each part is then a split of its own. At the
//! branch's immediate post-dominator stands a `Join`, where the parts wait for each other and become one split again.
//! Joins keep lanes together for speed; a program may not rely on them, because on hardware since Volta every thread makes
//! progress by itself. So splits that wait at a join are released when no other split of the warp can run, or when the
//! others seem to spin until they go on.

use super::copies::CopyQueue;
use super::memory::local::LocalMemory;
use super::products::Products;
use super::registers::Registers;

/// 32 threads that run in lockstep where they can.
pub struct Warp {
    /// Number in the block.
    pub id: u32,
    /// Lanes that have a thread and have not exited.
    pub live: u32,
    /// The frame that `regs` shows; only [`Warp::select`] sets it.
    frame: Frame,
    /// Registers.
    pub regs: Registers,
    /// Local memory of the 32 threads.
    pub local: LocalMemory,
    /// Asynchronous copies under way.
    pub copies: CopyQueue,
    /// Asynchronous products under way.
    pub(crate) products: Products,
}

impl Warp {
    /// The frame whose registers `regs` shows.
    pub(crate) fn frame(&self) -> Frame {
        self.frame
    }

    /// Shows the registers of `frame`: before anything of its function runs, and before its operands are read.
    #[inline(always)]
    pub(crate) fn select(&mut self, frame: Frame) {
        self.frame = frame;
        self.regs.select(frame.base as usize, frame.pred_base as usize);
    }
}

/// The frame of a running function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Index of the function.
    pub function: u32,
    /// First row.
    pub base: u32,
    /// First predicate.
    pub pred_base: u32,
    /// First byte of local memory.
    pub local_base: u32,
}

/// Whether a split can run, or which event it waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing.
    Ready,
    /// The other lanes of a warp-wide operation, at this pc.
    Converging,
    /// The block's barrier of this number.
    Barrier(u8),
}

/// Lanes that run together.
#[derive(Clone, Debug)]
pub(crate) struct Split {
    /// The next instruction.
    pub pc: u32,
    /// The lanes.
    pub mask: u32,
    /// The innermost join that they will meet others at.
    pub join: Option<u32>,
    /// The running frame.
    pub frame: Frame,
    /// Callers: their frames and the pc of the call.
    pub stack: Vec<(Frame, u32)>,
    /// Whether they can run.
    pub state: State,
}

/// A place where lanes that parted meet.
#[derive(Clone, Debug)]
pub(crate) struct JoinPoint {
    /// Its `Join` instruction.
    pub pc: u32,
    /// Lanes that are to arrive: the lanes that parted, without those that exited or were released.
    pub expected: u32,
    /// Lanes that wait here.
    pub arrived: u32,
    /// The join around it.
    pub parent: Option<u32>,
    /// The frame it lies in.
    pub frame: Frame,
    /// That frame's callers.
    pub stack: Vec<(Frame, u32)>,
}

impl JoinPoint {
    /// Whether it is the join at `pc` of this frame: a recursive function has one for each call.
    fn is_at(&self, pc: u32, frame: Frame) -> bool {
        self.pc == pc && self.frame == frame
    }
}

/// A warp and the state of its control flow.
pub(crate) struct WarpRun {
    pub warp: Warp,
    pub splits: Vec<Split>,
    joins: Vec<Option<JoinPoint>>,
    /// Times that a [`may_wait`](super::inst::Inst::may_wait) instruction ran while lanes waited at joins.
    pub spins: u32,
}

impl WarpRun {
    pub(crate) fn new(id: u32) -> Self {
        let warp = Warp {
            id,
            live: 0,
            frame: Frame::default(),
            regs: Registers::default(),
            local: LocalMemory::default(),
            copies: CopyQueue::default(),
            products: Products::default(),
        };
        Self { warp, splits: Vec::new(), joins: Vec::new(), spins: 0 }
    }

    /// Starts at `pc` with the lanes of `mask`.
    pub(crate) fn start(&mut self, pc: u32, mask: u32, function: u32) {
        self.warp.live = mask;
        self.warp.copies = CopyQueue::default();
        self.warp.products.clear();
        self.joins.clear();
        self.splits.clear();
        self.spins = 0;
        let frame = Frame { function, ..Frame::default() };
        self.splits.push(Split { pc, mask, join: None, frame, stack: Vec::new(), state: State::Ready });
    }

    fn new_join(&mut self, join: JoinPoint) -> u32 {
        if let Some(free) = self.joins.iter().position(Option::is_none) {
            self.joins[free] = Some(join);
            return free as u32;
        }
        self.joins.push(Some(join));
        self.joins.len() as u32 - 1
    }

    fn join(&mut self, i: u32) -> &mut JoinPoint {
        self.joins[i as usize].as_mut().expect("a split's join lives as long as the split")
    }

    /// The lanes of split `s` go to several places: `ways` are (pc, lanes), not empty, at least two. They meet again
    /// at `meet`.
    pub(crate) fn part(&mut self, s: usize, ways: &[(u32, u32)], meet: Option<u32>) {
        let (frame, mask, outer) = (self.splits[s].frame, self.splits[s].mask, self.splits[s].join);
        let join = match meet {
            None => outer,
            // A loop whose lanes leave one after another parts again and again before the same join.
            Some(pc) if outer.is_some_and(|o| self.join(o).is_at(pc, frame)) => outer,
            Some(pc) => {
                let stack = self.splits[s].stack.clone();
                Some(self.new_join(JoinPoint { pc, expected: mask, arrived: 0, parent: outer, frame, stack }))
            }
        };
        let stack = self.splits[s].stack.clone();
        let (first, rest) = ways.split_first().expect("at least two ways");
        for &(pc, mask) in rest {
            self.splits.push(Split { pc, mask, join, frame, stack: stack.clone(), state: State::Ready });
        }
        let split = &mut self.splits[s];
        (split.pc, split.mask, split.join) = (first.0, first.1, join);
    }

    /// Split `s` stands at the `Join` of its pc. Gives whether it goes on (behind the join) or was taken in by it.
    pub(crate) fn arrive(&mut self, s: usize) -> bool {
        while let Some(i) = self.splits[s].join {
            let (pc, mask, frame) = (self.splits[s].pc, self.splits[s].mask, self.splits[s].frame);
            let join = self.join(i);
            if !join.is_at(pc, frame) {
                break;
            }
            join.arrived |= mask;
            if join.arrived != join.expected {
                self.splits.swap_remove(s);
                return false;
            }
            let (arrived, parent) = (join.arrived, join.parent);
            self.joins[i as usize] = None;
            self.splits[s].mask = arrived;
            self.splits[s].join = parent;
        }
        self.splits[s].pc += 1;
        true
    }

    /// Lanes end. Joins no longer expect them.
    pub(crate) fn exit(&mut self, lanes: u32) {
        self.warp.live &= !lanes;
        for i in 0..self.joins.len() {
            let Some(join) = &mut self.joins[i] else { continue };
            join.expected &= !lanes;
            join.arrived &= !lanes;
            if join.expected == 0 {
                // No lane is expected any more. Inner joins whose parent this is are empty, too; they and the splits get
                // this join's parent.
                let (parent, me) = (join.parent, Some(i as u32));
                self.joins[i] = None;
                self.joins.iter_mut().flatten().filter(|j| j.parent == me).for_each(|j| j.parent = parent);
                self.splits.iter_mut().filter(|s| s.join == me).for_each(|s| s.join = parent);
            } else if join.arrived == join.expected {
                self.release(i);
            }
        }
    }

    /// The lanes that wait at join `i` become a split that runs.
    fn release(&mut self, i: usize) {
        let Some(join) = &mut self.joins[i] else { return };
        let split = Split {
            pc: join.pc,
            mask: join.arrived,
            join: join.parent,
            frame: join.frame,
            stack: join.stack.clone(),
            state: State::Ready,
        };
        join.expected &= !join.arrived;
        join.arrived = 0;
        if join.expected == 0 {
            self.joins[i] = None;
        }
        // Behind inner joins at the same place, too: the instruction is a `Join` and looks again.
        self.splits.push(split);
    }

    /// Lets the lanes at the innermost join go on without the others. Gives whether there were any.
    pub(crate) fn release_one(&mut self) -> bool {
        let depth = |mut i: usize| {
            let mut depth = 0;
            while let Some(parent) = self.joins[i].as_ref().and_then(|j| j.parent) {
                depth += 1;
                i = parent as usize;
            }
            depth
        };
        let waiting =
            (0..self.joins.len()).filter(|i| self.joins[*i].as_ref().is_some_and(|j| j.arrived != 0));
        let Some(i) = waiting.max_by_key(|i| depth(*i)) else { return false };
        self.release(i);
        self.spins = 0;
        true
    }

    /// Whether lanes wait at a join.
    pub(crate) fn anyone_joined(&self) -> bool {
        self.joins.iter().flatten().any(|j| j.arrived != 0)
    }

    /// The lanes `part` of split `s` stay behind with `state`; the others go on at `pc`. Both parts must have lanes.
    pub(crate) fn leave_behind(&mut self, s: usize, part: u32, state: State, pc: u32) {
        let mut behind = self.splits[s].clone();
        behind.mask = part;
        behind.state = state;
        self.splits[s].mask &= !part;
        self.splits[s].pc = pc;
        self.splits.push(behind);
    }

    /// Makes one of ready splits that stand at the same place in the same frame.
    pub(crate) fn merge(&mut self) {
        let mut i = 0;
        while i < self.splits.len() {
            let mut j = i + 1;
            while j < self.splits.len() {
                let (a, b) = (&self.splits[i], &self.splits[j]);
                let same = a.state == State::Ready
                    && b.state == State::Ready
                    && (a.pc, a.join, a.frame) == (b.pc, b.join, b.frame)
                    && a.stack == b.stack;
                if same {
                    self.splits[i].mask |= self.splits[j].mask;
                    self.splits.swap_remove(j);
                } else {
                    j += 1;
                }
            }
            i += 1;
        }
    }
}
