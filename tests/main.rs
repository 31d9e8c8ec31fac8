//! The integration tests: one binary, one module per topic.

#[path = "suite/config.rs"]
mod config;
#[path = "suite/eval.rs"]
mod eval;
#[path = "suite/objectives.rs"]
mod objectives;
#[path = "suite/ops/mod.rs"]
mod ops;
#[path = "suite/tokenizer.rs"]
mod tokenizer;
#[path = "suite/tolerance.rs"]
mod tolerance;
#[path = "suite/verifier.rs"]
mod verifier;
