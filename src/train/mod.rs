//! Training: what a run is told ([`config`]), what it draws on ([`inputs`], [`pass_rate`], [`scored`], [`schedule`],
//! [`policy`], [`optimizer`]), what it leaves behind ([`metrics`], [`tensorboard`], [`snapshot`], [`pools`] of an evaluation) and how it is
//! asked to end ([`interrupt`]). [`run`] is the loop: its head, then `step.rs`, [`policy`] and [`optimizer`] are what to read first;
//! `setup.rs` opens what a run needs, and [`evaluation`] is what it does between steps.
//!
//! A run directory holds `config.toml` (the resolved configuration), `metrics.jsonl`, `eval.jsonl`, `unjudged.jsonl`,
//! `eval/`, `tensorboard/`, `report.html` and `checkpoints/step-000123/`. All that a run needs to go on lies in a checkpoint
//! and the configuration: the random numbers are a function of (seed, step, prompt, stream, position), and the place in the
//! data is one integer.

pub mod config;
pub mod error;
pub mod evaluation;
pub mod inputs;
pub mod interrupt;
pub mod metrics;
pub mod optimizer;
pub mod pass_rate;
pub mod policy;
pub mod pools;
pub mod run;
pub mod schedule;
pub mod scored;
pub mod setup;
pub mod snapshot;
mod step;
pub mod tensorboard;
