//! The program: the instructions of all functions, and for each function the size and contents of a frame.

use super::inst::{Control, Exec, Inst, System};
use super::layout::{CONST_WINDOW, LOCAL_WINDOW, SHARED_WINDOW};
use super::memory::variables::SharedRange;
use super::registers::{Reg, Width};
use crate::error::ErrorKind;
use crate::types::Space;

/// A value known before a frame runs, some of them only when the module is on a device or the launch is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Constant {
    /// These bits.
    Bits(u64),
    /// The address of the module's global variable of this index, plus bytes.
    Global(u32, i64),
    /// The address of a function, as a number that `call` understands.
    Function(u32),
    /// An offset in the running frame's local memory; the second adds the frame's base and this window.
    Local(u32, u64),
    /// The start of dynamic shared memory plus bytes, in this window.
    DynamicShared(i64, u64),
    /// The address of the module's shared variable of this index; the second adds bytes and a window. Each kernel has a
    /// layout of its own, of the variables that it uses.
    Shared(u32, u64),
}

impl Constant {
    /// The same address, `bytes` further.
    #[must_use]
    pub fn plus(self, bytes: i64) -> Self {
        match self {
            Self::Bits(b) => Self::Bits(b.wrapping_add_signed(bytes)),
            Self::Global(i, a) => Self::Global(i, a.wrapping_add(bytes)),
            Self::Function(_) => self,
            // Local addresses wrap in their window's arithmetic.
            Self::Local(at, window) => Self::Local(at, window.wrapping_add_signed(bytes)),
            Self::DynamicShared(a, window) => Self::DynamicShared(a.wrapping_add(bytes), window),
            Self::Shared(i, window) => Self::Shared(i, window.wrapping_add_signed(bytes)),
        }
    }

    /// The generic address of an address in `space`.
    #[must_use]
    pub fn generic(self, space: Space) -> Self {
        match (self, space) {
            (Self::Shared(i, window), _) => Self::Shared(i, window.wrapping_add(SHARED_WINDOW)),
            (Self::Bits(b), Space::Const) => Self::Bits(b.wrapping_add(CONST_WINDOW)),
            (Self::Local(at, window), Space::Local) => Self::Local(at, window.wrapping_add(LOCAL_WINDOW)),
            (Self::DynamicShared(a, window), _) => Self::DynamicShared(a, window.wrapping_add(SHARED_WINDOW)),
            // Global addresses are generic, and so are those of parameters in this machine.
            _ => self,
        }
    }
}

macro_rules! specials {
    ($($(#[$doc:meta])* $name:ident $text:literal $width:ident),* $(,)?) => {
        /// Special registers whose values stay the same while a warp runs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Special { $(#[doc = concat!("`", $text, "`")] $name),* }

        impl Special {
            /// The special register of a name, its component included.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)* _ => None }
            }

            /// Its width.
            pub const fn width(self) -> Width {
                match self { $(Self::$name => Width::$width),* }
            }
        }
    };
}

specials! {
    TidX "%tid.x" B32, TidY "%tid.y" B32, TidZ "%tid.z" B32,
    NtidX "%ntid.x" B32, NtidY "%ntid.y" B32, NtidZ "%ntid.z" B32,
    CtaidX "%ctaid.x" B32, CtaidY "%ctaid.y" B32, CtaidZ "%ctaid.z" B32,
    NctaidX "%nctaid.x" B32, NctaidY "%nctaid.y" B32, NctaidZ "%nctaid.z" B32,
    LaneId "%laneid" B32, WarpId "%warpid" B32, NwarpId "%nwarpid" B32,
    SmId "%smid" B32, NsmId "%nsmid" B32, GridId "%gridid" B64,
    LanemaskEq "%lanemask_eq" B32, LanemaskLt "%lanemask_lt" B32, LanemaskLe "%lanemask_le" B32,
    LanemaskGt "%lanemask_gt" B32, LanemaskGe "%lanemask_ge" B32,
    // The address of the grid's workspace: its high half, its low half.
    Envreg1 "%envreg1" B32, Envreg2 "%envreg2" B32,
    DynamicSmemSize "%dynamic_smem_size" B32, TotalSmemSize "%total_smem_size" B32,
    ReservedSmemOffset1 "%reserved_smem_offset_1" B32,
    IsExplicitCluster "%is_explicit_cluster" Pred,
    ClusteridX "%clusterid.x" B32, ClusteridY "%clusterid.y" B32, ClusteridZ "%clusterid.z" B32,
    NclusteridX "%nclusterid.x" B32, NclusteridY "%nclusterid.y" B32, NclusteridZ "%nclusterid.z" B32,
    ClusterCtaidX "%cluster_ctaid.x" B32, ClusterCtaidY "%cluster_ctaid.y" B32, ClusterCtaidZ "%cluster_ctaid.z" B32,
    ClusterNctaidX "%cluster_nctaid.x" B32, ClusterNctaidY "%cluster_nctaid.y" B32,
    ClusterNctaidZ "%cluster_nctaid.z" B32,
    ClusterCtarank "%cluster_ctarank" B32, ClusterNctarank "%cluster_nctarank" B32,
}

impl Special {
    /// Whether the blocks of a launch have different ones.
    pub(crate) const fn differs_by_block(self) -> bool {
        matches!(
            self,
            Self::CtaidX
                | Self::CtaidY
                | Self::CtaidZ
                | Self::ClusteridX
                | Self::ClusteridY
                | Self::ClusteridZ
                | Self::ClusterCtaidX
                | Self::ClusterCtaidY
                | Self::ClusterCtaidZ
                | Self::ClusterCtarank
                | Self::SmId
        )
    }

    /// Whether a name is a special register of PTX at all, also one that is not built (or read by an operation of its
    /// own, as the clocks are).
    pub fn is_known(name: &str) -> bool {
        let stem = name.split('.').next().unwrap_or(name);
        Self::from_name(name).is_some()
            || ["%clock", "%clock_hi", "%clock64", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi"]
                .contains(&stem)
            || ["%envreg", "%pm", "%reserved_smem_offset", "%aggr_smem_size", "%current_graph_exec"]
                .iter()
                .any(|prefix| stem.starts_with(prefix))
    }
}

/// A parameter of a function: offset in the kernel's parameter bank, or in the callee's local frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Param {
    /// Name, for messages.
    pub name: String,
    /// Where.
    pub offset: u32,
    /// How many bytes.
    pub bytes: u32,
    /// Alignment.
    pub align: u32,
}

/// A line that is wrong, or that the machine does not run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Line in the text, from 1; 0 where there is none.
    pub line: u32,
    /// `Invalid` or `Unsupported`.
    pub kind: ErrorKind,
    /// One sentence.
    pub message: String,
}

/// A decoded function.
#[derive(Debug, Default)]
pub struct Function {
    /// Its name.
    pub name: String,
    /// Whether a launch may name it.
    pub is_entry: bool,
    /// Whether it has a body.
    pub defined: bool,
    /// What keeps the function from running, and a kernel also what keeps those that it calls. A function of which anything
    /// itself is refused has no code.
    pub refused: Vec<Refused>,
    /// First instruction in the module's code.
    pub start: u32,
    /// Rows of a frame.
    pub rows: u32,
    /// Predicates of a frame.
    pub preds: u32,
    /// Registers that hold a constant, written when a frame starts.
    pub constants: Vec<(Reg, Constant)>,
    /// Registers that hold a special register, written when a frame starts.
    pub specials: Vec<(Reg, Special)>,
    /// Parameters: in the parameter bank for a kernel, in the local frame for a function.
    pub params: Vec<Param>,
    /// Return values, in the local frame.
    pub returns: Vec<Param>,
    /// Bytes of local memory a frame takes, a multiple of 16.
    pub local_bytes: u32,
    /// The pieces of the frame's local memory that are variables': offset and bytes. The rest is gaps.
    pub local_live: Vec<(u32, u32)>,
    /// Shared variables of the function, and for a kernel also of the functions that it calls: index, and for a kernel the
    /// offset.
    pub shared: Vec<(u32, u32)>,
    /// Bytes of static shared memory of a kernel, as a GPU counts them.
    pub shared_bytes: u32,
    /// Bytes that they take here, with the gaps between variables.
    pub shared_span: u64,
    /// Bytes of such a gap.
    pub shared_gap: u64,
    /// Where the kernel's shared variables lie, in order.
    pub variables: Vec<SharedRange>,
    /// Alignment of dynamic shared memory behind the static part.
    pub dynamic_align: u32,
    /// `.maxntid`
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`
    pub required_threads: Option<[u32; 3]>,
    /// Whether the order of blocks can show: global atomics that return a value or round, and accesses that wait.
    pub ordered: bool,
    /// The smallest access to shared memory, in bytes: the grain of the race check.
    pub shared_grain: u32,
    /// What it may use that is the system's.
    pub system: SystemMemory,
    /// Its directives about clusters.
    pub cluster: ClusterShape,
    /// Whether it may use the barrier of a cluster.
    pub meets_cluster: bool,
    /// Whether copies arrive at mbarriers, or the asynchronous proxy touches shared memory: the race check follows it as a party
    /// of its own.
    pub asynchronous: bool,
}

/// What a kernel says of the clusters that it runs in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterShape {
    /// `.reqnctapercluster`: the exact cluster, in blocks.
    pub required: Option<[u32; 3]>,
    /// `.maxclusterrank`: the most blocks of a cluster.
    pub most: Option<u32>,
    /// `.explicitcluster`: the launch must ask for clusters, or the kernel does.
    pub explicit: bool,
    /// `.blocksareclusters`: a launch counts its grid in clusters.
    pub counted: bool,
}

impl ClusterShape {
    /// Whether a launch must say the size of its clusters, since the kernel has them and does not.
    pub fn must_be_named(&self) -> bool {
        self.explicit && self.required.is_none()
    }
}

/// Memory of the system that cooperative groups use, and for that read the special registers that tell where it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemMemory {
    /// The grid's workspace, in which the blocks of a cooperative launch count each other: `%envreg1`, `%envreg2`.
    pub workspace: bool,
    /// The part of shared memory behind the block's: `%reserved_smem_offset_1`.
    pub reserved_shared: bool,
}

impl SystemMemory {
    /// What a function uses that reads these special registers.
    pub fn of(specials: &[(Reg, Special)]) -> Self {
        let reads = |special| specials.iter().any(|(_, s)| *s == special);
        Self {
            workspace: reads(Special::Envreg1) || reads(Special::Envreg2),
            reserved_shared: reads(Special::ReservedSmemOffset1),
        }
    }

    /// What two functions use.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            workspace: self.workspace || other.workspace,
            reserved_shared: self.reserved_shared || other.reserved_shared,
        }
    }
}

/// A line of the PTX, for reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlaceLine {
    /// Line in the PTX.
    pub line: u32,
    /// Index in the module's source files and line there; 0, 0 for none.
    pub source: (u32, u32),
    /// The same of the line in the function itself, where the code was inlined.
    pub inlined_at: (u32, u32),
    /// The function's index.
    pub function: u32,
}

/// A decoded module.
#[derive(Debug, Default)]
pub struct Program {
    /// All functions' instructions, one after another.
    pub code: Vec<Inst>,
    /// Kernels and functions.
    pub functions: Vec<Function>,
    /// Lines, by `Inst::place`.
    pub places: Vec<PlaceLine>,
}

impl Program {
    /// Whether any function calls `malloc` or `free`.
    pub fn calls_heap(&self) -> bool {
        self.code.iter().any(|inst| {
            let Exec::Control(Control::System { function, .. }) = &inst.exec else { return false };
            matches!(function, System::Malloc | System::Free)
        })
    }
}
