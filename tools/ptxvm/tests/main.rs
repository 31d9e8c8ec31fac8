//! The integration tests: one binary, one module per topic.

mod support {
    pub(crate) mod exact;
    pub(crate) mod hopper;
    pub(crate) mod op;
    pub(crate) mod product;
    pub(crate) mod ptx;
    pub(crate) mod soup;
    pub(crate) mod warp;
}

#[path = "suite/arrows.rs"]
mod arrows;
#[path = "suite/async_copy.rs"]
mod async_copy;
#[path = "suite/atomic.rs"]
mod atomic;
#[path = "suite/barriers.rs"]
mod barriers;
#[path = "suite/bulk.rs"]
mod bulk;
#[path = "suite/calls.rs"]
mod calls;
#[path = "suite/cancel.rs"]
mod cancel;
#[cfg(feature = "cli")]
#[path = "suite/cli.rs"]
mod cli;
#[path = "suite/cluster.rs"]
mod cluster;
#[path = "suite/conformance_approx.rs"]
mod conformance_approx;
#[path = "suite/conformance_convert.rs"]
mod conformance_convert;
#[path = "suite/conformance_float.rs"]
mod conformance_float;
#[path = "suite/conformance_half.rs"]
mod conformance_half;
#[path = "suite/conformance_integer.rs"]
mod conformance_integer;
#[path = "suite/conformance_logic.rs"]
mod conformance_logic;
#[path = "suite/conformance_mixed.rs"]
mod conformance_mixed;
#[path = "suite/conformance_moves.rs"]
mod conformance_moves;
#[path = "suite/conformance_video.rs"]
mod conformance_video;
#[path = "suite/determinism.rs"]
mod determinism;
#[path = "suite/flow.rs"]
mod flow;
#[path = "suite/forms.rs"]
mod forms;
#[path = "suite/fuzz.rs"]
mod fuzz;
#[path = "suite/kernels.rs"]
mod kernels;
#[path = "suite/kernels_bulk.rs"]
mod kernels_bulk;
#[path = "suite/kernels_cluster.rs"]
mod kernels_cluster;
#[path = "suite/kernels_collective.rs"]
mod kernels_collective;
#[path = "suite/kernels_elementwise.rs"]
mod kernels_elementwise;
#[path = "suite/kernels_matrix.rs"]
mod kernels_matrix;
#[path = "suite/kernels_mbarrier.rs"]
mod kernels_mbarrier;
#[path = "suite/kernels_numbers.rs"]
mod kernels_numbers;
#[path = "suite/kernels_others.rs"]
mod kernels_others;
#[path = "suite/kernels_programs.rs"]
mod kernels_programs;
#[path = "suite/kernels_sync.rs"]
mod kernels_sync;
#[path = "suite/kernels_triton.rs"]
mod kernels_triton;
#[path = "suite/kernels_warpgroups.rs"]
mod kernels_warpgroups;
#[path = "suite/ldmatrix.rs"]
mod ldmatrix;
#[path = "suite/matrix.rs"]
mod matrix;
#[path = "suite/mbarrier.rs"]
mod mbarrier;
#[path = "suite/memory.rs"]
mod memory;
#[path = "suite/narrow.rs"]
mod narrow;
#[path = "suite/parse.rs"]
mod parse;
#[path = "suite/planted.rs"]
mod planted;
#[path = "suite/race.rs"]
mod race;
#[path = "suite/shuffle.rs"]
mod shuffle;
#[path = "suite/tensor.rs"]
mod tensor;
#[path = "suite/tidy.rs"]
mod tidy;
#[path = "suite/toolchain.rs"]
mod toolchain;
#[path = "suite/wgmma.rs"]
mod wgmma;
#[path = "suite/wmma.rs"]
mod wmma;
#[path = "suite/written.rs"]
mod written;
