//! The bytecode: instructions with their registers, and control flow.

use std::fmt;

use super::context::{Context, Stop};
use super::registers::{Reg, Registers};

/// A function of lanes alone: reads and writes registers of the lanes in the mask, nothing else, and cannot fail.
pub type LaneFn = fn(&mut Registers, &Inst, u32);

/// An instruction that needs more than registers: memory, other lanes, the block.
pub trait WarpOp: fmt::Debug + Send + Sync {
    /// Runs it for the lanes of `mask`, whose guard is true; there is at least one.
    ///
    /// It also sets the initialisation state of its destinations (`ctx.regs().set_defined`).
    ///
    /// # Errors
    /// Ends the launch: a fault that nothing can go on after. Findings that a kernel survives go to `ctx.finding`.
    fn execute(&self, ctx: &mut Context<'_>, inst: &Inst, mask: u32) -> Result<(), Stop>;
}

/// How an instruction runs.
pub enum Exec {
    /// Lane by lane.
    Lane(LaneFn),
    /// With the warp's surroundings.
    Warp(Box<dyn WarpOp>),
    /// Control flow: the scheduler's own.
    Control(Control),
}

impl fmt::Debug for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lane(_) => f.write_str("Lane"),
            Self::Warp(op) => op.fmt(f),
            Self::Control(control) => control.fmt(f),
        }
    }
}

/// How the initialisation state of the destinations follows from the sources'.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Defs {
    /// Defined in the lanes where every source is.
    #[default]
    All,
    /// The same, byte by byte: moves and bitwise logic. Structures with gaps are copied in pieces wider than their fields.
    Bytes,
    /// The same where bytes of the sources become others of the result.
    Moved(Moved),
    /// `selp`: sources are a, b, p; only the chosen one counts, byte by byte, and p.
    Select,
    /// Only the sources of these bits count, because bit fields are made piece by piece in uninitialised words: the result
    /// of `and` with a constant, and of `bfi`, counts as written although a part of the word may not be.
    Some(u8),
    /// The operation sets it itself (every [`WarpOp`] does).
    Own,
}

/// How an operation moves bytes. Numbers are bytes, and the last word of a pair says whether the sign fills up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moved {
    /// `mov {a, b, ..}, s`, into parts of this size.
    Split(u8),
    /// `mov d, {a, b, ..}`, of parts of this size.
    Join(u8),
    /// `shl` of a word of this size.
    Left(u8),
    /// `shr`.
    Right(u8, bool),
    /// `bfe`.
    Field(u8, bool),
    /// `shf`, to the left or to the right; `imm` is not 0 where the amount wraps.
    Funnel(bool),
    /// `prmt`; `imm` has the selectors of its modes.
    Permute,
    /// `cvt` of an integer of `from` bytes to one of `to`, and that to the register's width.
    Resize {
        /// The source type's size.
        from: u8,
        /// Whether it is signed.
        from_signed: bool,
        /// The destination type's size.
        to: u8,
        /// Whether it is signed.
        to_signed: bool,
    },
}

/// The class an instruction is counted under.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Class {
    /// Integer arithmetic, logic, shifts, comparisons of integers, moves, selections.
    Integer,
    /// 32-bit floating point; an fma is one instruction and two FLOPs.
    Float32,
    /// 64-bit floating point.
    Float64,
    /// f16 and bf16, packed or not.
    Half,
    /// ex2, lg2, sin, cos, tanh, rcp, rsqrt, sqrt, div.
    Special,
    /// Conversions between types.
    Convert,
    /// Tensor-core multiply-accumulate.
    Mma,
    /// Loads and stores of global memory, also through generic addresses, and cp.async.
    Global,
    /// Loads and stores of shared memory, ldmatrix and stmatrix.
    Shared,
    /// Loads and stores of local memory.
    Local,
    /// Loads of parameters and constants.
    Constant,
    /// atom and red.
    Atomic,
    /// Branches, calls, returns.
    Control,
    /// Barriers, fences, waits.
    Sync,
    /// shfl, vote, match, redux, activemask.
    Warp,
}

/// A predicate that decides lane by lane whether an instruction runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// The predicate.
    pub pred: Reg,
    /// Whether it runs where the predicate is false.
    pub negated: bool,
}

/// An instruction of the bytecode.
#[derive(Debug)]
pub struct Inst {
    /// The operation.
    pub exec: Exec,
    /// Lanes for which it does it.
    pub guard: Option<Guard>,
    /// Destinations, then sources; which is which place is the operation's own business.
    pub regs: Box<[Reg]>,
    /// How many of `regs` are destinations.
    pub dsts: u8,
    /// Initialisation rule.
    pub defs: Defs,
    /// Class for the counters.
    pub class: Class,
    /// For operations on `membermask` lanes (`shfl.sync`, `mma.sync`, ...): the scheduler runs it only when all lanes
    /// that it names are there.
    pub convergence: Convergence,
    /// Whether loops that wait for other threads contain it: atomics with a result, strong loads.
    pub may_wait: bool,
    /// Whether the warp's asynchronous products look after its registers themselves: `wgmma`.
    pub watched: bool,
    /// Small constants of the operation: a table, flags.
    pub imm: u64,
    /// Floating-point operations of one lane (of the whole warp for mma), for the counters.
    pub flops: u32,
    /// Index of the line in the module's table of places.
    pub place: u32,
}

impl Inst {
    /// An instruction that nothing guards, whose lanes wait for no others.
    pub fn new(exec: Exec, class: Class, dsts: &[Reg], srcs: &[Reg], place: u32) -> Self {
        let defs = if matches!(exec, Exec::Lane(_)) { Defs::All } else { Defs::Own };
        Self {
            exec,
            guard: None,
            regs: dsts.iter().chain(srcs).copied().collect(),
            dsts: dsts.len() as u8,
            defs,
            class,
            convergence: Convergence::None,
            may_wait: false,
            watched: false,
            imm: 0,
            flops: 0,
            place,
        }
    }

    /// The i-th destination.
    #[inline(always)]
    pub fn dst(&self, i: usize) -> Reg {
        self.regs[i]
    }

    /// The i-th source.
    #[inline(always)]
    pub fn src(&self, i: usize) -> Reg {
        self.regs[self.dsts as usize + i]
    }

    /// All sources.
    #[inline(always)]
    pub fn srcs(&self) -> &[Reg] {
        &self.regs[self.dsts as usize..]
    }
}

/// Which lanes must execute an instruction together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Convergence {
    /// Each lane for itself.
    #[default]
    None,
    /// The lanes that the source register of this index names (`membermask`).
    Mask(u8),
    /// All lanes of the warp that have not exited (`.aligned` operations: mma.sync, ldmatrix).
    All,
}

/// Control flow. Targets are indices into the module's code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// `bra`: lanes with a true guard go to `target`; where they part, they meet again at `join`.
    Branch {
        /// Where to.
        target: u32,
        /// The immediate post-dominator, where there is one before the function's end.
        join: Option<u32>,
    },
    /// `brx.idx`: source 0 indexes `targets`.
    BranchTable {
        /// Where to, by index.
        targets: Box<[u32]>,
        /// The immediate post-dominator.
        join: Option<u32>,
    },
    /// Lanes that parted wait here for each other.
    Join,
    /// `call` of a known function.
    Call {
        /// Index of the function in the module.
        function: u32,
        /// (caller's, callee's, bytes): parameter memory to copy in; offsets into the two local frames.
        args: Box<[ParamCopy]>,
        /// The same, back.
        results: Box<[ParamCopy]>,
    },
    /// `call` through a register (source 0); arguments are matched to the callee's parameters when it is known.
    CallIndirect {
        /// Offset in the caller's local frame and bytes, argument by argument.
        args: Box<[(u32, u32)]>,
        /// The same for results.
        results: Box<[(u32, u32)]>,
    },
    /// `call` of a function that the system provides (`vprintf`, `__assertfail`, `malloc`, `free`).
    System {
        /// Which.
        function: System,
        /// Offset in the caller's local frame and bytes, argument by argument.
        args: Box<[(u32, u32)]>,
        /// The same for results.
        results: Box<[(u32, u32)]>,
    },
    /// `ret`: of a kernel, the same as `exit`.
    Return,
    /// `exit`
    Exit,
    /// `bar.sync`, `barrier.sync`, `bar.arrive`, `bar.red`. Sources: barrier number, thread count (or none), predicate.
    Barrier {
        /// Whether lanes wait, and which reduction they compute.
        kind: BarrierKind,
        /// Whether all lanes of the warp must reach it together.
        aligned: bool,
        /// Whether a thread count was given (source 1).
        counted: bool,
    },
    /// `barrier.cluster.arrive` and, where it does not arrive, `.wait`.
    ClusterBarrier {
        /// Whether it arrives.
        arrives: bool,
        /// Whether all lanes of the warp must reach it together.
        aligned: bool,
        /// Whether it releases: an arrival that is not `.relaxed`.
        orders: bool,
    },
    /// `bar.warp.sync`, source 0 the membermask.
    WarpBarrier,
    /// Behind a product of a warpgroup: its warps wait for each other, since none's part is done before all are.
    Warpgroup,
    /// `trap`
    Trap,
    /// `brkpt`, `nanosleep`, `yield`-like: let others run.
    Yield,
}

/// A piece of parameter memory to copy at a call or return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParamCopy {
    /// Offset in the caller's local frame.
    pub caller: u32,
    /// Offset in the callee's local frame.
    pub callee: u32,
    /// How many bytes.
    pub bytes: u32,
}

/// Variants of block barriers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarrierKind {
    /// Wait for all.
    Sync,
    /// Count, do not wait.
    Arrive,
    /// Wait, and count true predicates into a 32-bit destination.
    Popc,
    /// Wait, predicate destination: all true.
    And,
    /// Wait, predicate destination: one true.
    Or,
}

/// Functions that CUDA's runtime provides to device code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// `vprintf(format, arguments)`
    Vprintf,
    /// `__assertfail(message, file, line, function, size)`
    AssertFail,
    /// `malloc(bytes)`
    Malloc,
    /// `free(pointer)`
    Free,
}
