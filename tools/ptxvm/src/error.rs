//! Errors, of three kinds: the program is wrong, the machine cannot run it, or the machine has a defect.

use std::fmt;

/// A failed load, copy or launch.
#[derive(Clone, Debug, PartialEq)]
pub enum Error {
    /// The text, an argument or a program's behaviour is wrong. For a launch, all findings, the gravest first.
    Fault(Vec<Finding>),
    /// The machine cannot run this yet. All places, in order.
    Unsupported(Vec<Finding>),
    /// A defect of ptxvm itself; please report it with the PTX.
    Internal(String),
}

/// The kind of a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The text is no PTX: the parser's message.
    Syntax,
    /// PTX that no assembler accepts: unknown names, wrong operand types.
    Invalid,
    /// An instruction, variant or directive that the machine does not run.
    Unsupported,
    /// Grid, block, shared memory or arguments that do not fit the kernel or the device.
    Launch,
    /// An address outside every allocation, beyond its end, or in the null page.
    OutOfBounds,
    /// Memory that was freed.
    UseAfterFree,
    /// An address that its access size does not divide.
    Misaligned,
    /// A store to constant memory or parameters, or an access to a space where the address does not lie.
    WrongSpace,
    /// An uninitialised value reaches memory, a branch or an address.
    Uninitialized,
    /// Two warps, or two lanes, touch the same shared memory without a barrier between them.
    SharedRace,
    /// Two blocks, or two warps of one, touch the same global memory without ordering.
    GlobalRace,
    /// Data of an asynchronous copy touched before its wait.
    AsyncRace,
    /// A barrier that only some lanes of a warp reach, or whose thread counts contradict each other.
    Barrier,
    /// An mbarrier that is used before its init or after its inval, with wrong counts or states, or by ordinary accesses.
    Mbarrier,
    /// Shared memory of another block of the cluster that may not have started or may have left, or of none that there is.
    Cluster,
    /// A tensor map that is none or lacks a field, a value that a field may not have, or a copy that does not fit its map.
    TensorMap,
    /// A `wgmma` without its fence, or registers touched that one under way uses.
    Wgmma,
    /// A warp-wide instruction whose mask names lanes that do not take part.
    WarpMask,
    /// No warp of a block can go on: each waits for another.
    Deadlock,
    /// The instruction budget is used up.
    Budget,
    /// `trap`, or a device-side assertion.
    Trap,
    /// Integer division by zero: its result is undefined. It is a note of the report where nothing else is found.
    DivisionByZero,
    /// The call stack or a thread's local memory is full.
    StackOverflow,
    /// Lanes of a warp pass values through `volatile` shared memory without `__syncwarp`, as if they ran in step. It is a note of
    /// the report and ends no launch, because such accesses do not race by the memory model.
    InStep,
}

impl ErrorKind {
    /// Whether a launch may go well with it.
    pub(crate) fn may_be_a_note(self) -> bool {
        matches!(self, Self::InStep | Self::DivisionByZero)
    }
}

/// Where in the PTX, and in the source it came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The PTX file as the caller named it.
    pub file: String,
    /// Line in the PTX, from 1; 0 where there is none.
    pub line: u32,
    /// The instruction, as written; empty where there is none.
    pub text: String,
    /// `file:line` of the `.cu`, where `.loc` gives it.
    pub source: Option<String>,
    /// The line in the kernel or function itself, where the code was inlined.
    pub inlined_at: Option<String>,
}

/// Which threads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Threads {
    /// The block's index in the grid.
    pub block: [u32; 3],
    /// The warp's number in its block.
    pub warp: u32,
    /// The lanes concerned, one bit each.
    pub lanes: u32,
}

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq)]
pub struct Finding {
    /// Its kind.
    pub kind: ErrorKind,
    /// The kernel, or the function the text is in; empty for a module's directives.
    pub kernel: String,
    /// Where in the text.
    pub at: Place,
    /// Where the other party of a race is.
    pub other: Option<Place>,
    /// The threads; `None` outside a launch.
    pub threads: Option<Threads>,
    /// One sentence with the figures: address, sizes, the allocation.
    pub message: String,
    /// How often the same thing happened at the same place in the launch.
    pub count: u64,
}

impl Finding {
    /// A finding outside a launch.
    pub fn load(kind: ErrorKind, at: Place, message: impl Into<String>) -> Self {
        Self {
            kind,
            kernel: String::new(),
            at,
            other: None,
            threads: None,
            message: message.into(),
            count: 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", if self.file.is_empty() { "<ptx>" } else { &self.file })?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        if !self.text.is_empty() {
            write!(f, ": `{}`", self.text)?;
        }
        if let Some(source) = &self.source {
            match &self.inlined_at {
                Some(call) => write!(f, " (from {source}, inlined at {call})")?,
                None => write!(f, " (from {source})")?,
            }
        }
        Ok(())
    }
}

impl fmt::Display for Threads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "block ({x},{y},{z}) warp {} ", self.warp)?;
        if self.lanes == u32::MAX {
            return write!(f, "all lanes");
        }
        write!(f, "lane{} ", if self.lanes.count_ones() == 1 { "" } else { "s" })?;
        let mut rest = self.lanes;
        let mut first = true;
        while rest != 0 {
            let from = rest.trailing_zeros();
            let run = (rest >> from).trailing_ones();
            write!(f, "{}{from}", if first { "" } else { "," })?;
            if run > 1 {
                write!(f, "-{}", from + run - 1)?;
            }
            first = false;
            rest &= !(((1u64 << run) - 1) << from) as u32;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}\n  at {}", self.kind, self.message, self.at)?;
        if !self.kernel.is_empty() {
            write!(f, "\n  in {}", self.kernel)?;
        }
        if let Some(threads) = &self.threads {
            write!(f, ", {threads}")?;
        }
        if let Some(other) = &self.other {
            write!(f, "\n  against {other}")?;
        }
        if self.count > 1 {
            write!(f, "\n  {} times in this launch", self.count)?;
        }
        Ok(())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (head, findings) = match self {
            Self::Fault(findings) if findings.iter().all(|f| f.kind == ErrorKind::Launch) => {
                ("the launch is wrong", findings)
            }
            Self::Fault(findings) => ("the program is wrong", findings),
            Self::Unsupported(findings) => ("not supported by this machine", findings),
            Self::Internal(message) => return write!(f, "a defect of ptxvm, please report it: {message}"),
        };
        write!(f, "{head}:")?;
        for finding in findings {
            write!(f, "\n{finding}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
