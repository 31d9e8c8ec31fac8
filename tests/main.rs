//! The integration tests: one binary, one module per topic.

#[path = "suite/ops/mod.rs"]
mod ops;
#[path = "suite/tolerance.rs"]
mod tolerance;
