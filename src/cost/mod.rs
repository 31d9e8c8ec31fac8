//! The cost of the kernels: [`workloads`] are ops at the shapes of real models, [`figures`] counts what they do on the virtual GPU
//! and bounds the time of it on a chip.
//!
//! The launchers of [`crate::backend::cuda`] know none of this. It serves `bon-engine kernels`, the benchmarks, and the tests
//! that hold kernels to ceilings.

pub mod figures;
pub mod workloads;
