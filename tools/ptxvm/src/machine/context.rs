//! The surroundings of a running instruction.

use super::block::Block;
use super::launch::{LaunchState, Worker};
use super::registers::Registers;
use super::warp::Warp;
use crate::error::{ErrorKind, Finding, Threads};

/// The end of a launch by a fault. The finding is boxed: the way without one is the fast one.
#[derive(Debug)]
pub struct Stop(pub Box<Finding>);

/// The running warp, its block and its launch, as an instruction sees them.
pub struct Context<'a> {
    /// The warp.
    pub warp: &'a mut Warp,
    /// Its block: shared memory, barriers, clocks of the race check.
    pub block: &'a mut Block,
    /// The launch: global memory, parameters, options.
    pub launch: &'a LaunchState<'a>,
    /// Counters, findings and printed text of the host thread.
    pub worker: &'a mut Worker,
    /// The running instruction's index in the code.
    pub pc: u32,
    /// Instructions that the block's warps have executed so far: the value of `%clock`.
    pub ticks: u64,
}

impl<'a> Context<'a> {
    /// The surroundings of the instruction at `pc`, for the frame that the warp has selected. `ran` instructions have
    /// run that the block does not count yet.
    #[inline(always)]
    pub(crate) fn new(
        warp: &'a mut Warp,
        block: &'a mut Block,
        launch: &'a LaunchState<'a>,
        worker: &'a mut Worker,
        pc: u32,
        ran: u64,
    ) -> Self {
        let ticks = block.executed + ran;
        Self { warp, block, launch, worker, pc, ticks }
    }

    /// The warp's registers.
    #[inline(always)]
    pub fn regs(&mut self) -> &mut Registers {
        &mut self.warp.regs
    }

    fn make(&self, pc: u32, kind: ErrorKind, lanes: u32, message: String) -> Finding {
        Finding {
            kind,
            kernel: self.launch.kernel_name().to_owned(),
            at: self.launch.place(pc),
            other: None,
            threads: Some(Threads { block: self.block.index, warp: self.warp.id, lanes }),
            message,
            count: 1,
        }
    }

    /// A fault at the running instruction: `return Err(ctx.fault(...))`.
    #[cold]
    pub fn fault(&self, kind: ErrorKind, lanes: u32, message: String) -> Stop {
        Stop(Box::new(self.make(self.pc, kind, lanes, message)))
    }

    /// Records a finding that the kernel survives; `other` is the pc of a race's other party. Findings of the same
    /// kind at the same instruction are counted, not repeated: `message` is called for the first alone.
    #[cold]
    pub fn finding(
        &mut self,
        kind: ErrorKind,
        lanes: u32,
        other: Option<u32>,
        message: impl FnOnce() -> String,
    ) {
        if self.worker.seen(kind, self.pc) {
            return;
        }
        let mut finding = self.make(self.pc, kind, lanes, message());
        finding.other = other.map(|pc| self.launch.place(pc));
        self.worker.record(self.pc, self.block.order, finding);
    }
}
