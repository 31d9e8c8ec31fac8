//! The integration tests: one binary, one module per topic.

#[path = "suite/activations.rs"]
mod activations;
#[path = "../tools/ptxvm/tests/suite/arrows.rs"]
mod arrows;
#[path = "suite/bench.rs"]
mod bench;
#[path = "suite/chat.rs"]
mod chat;
#[path = "suite/checkpoint.rs"]
mod checkpoint;
#[path = "suite/child.rs"]
mod child;
#[path = "suite/cli.rs"]
mod cli;
#[path = "suite/delegating.rs"]
mod delegating;
#[path = "suite/device/mod.rs"]
mod device;
#[cfg(target_os = "linux")]
#[path = "suite/durability.rs"]
mod durability;
#[path = "suite/engine.rs"]
mod engine;
#[path = "suite/errors.rs"]
mod errors;
#[path = "suite/eval.rs"]
mod eval;
#[path = "suite/fixture.rs"]
mod fixture;
#[path = "suite/gemma_config.rs"]
mod gemma_config;
#[path = "suite/goldens.rs"]
mod goldens;
#[path = "suite/gpu_kit.rs"]
mod gpu_kit;
#[path = "suite/gradcheck.rs"]
mod gradcheck;
#[path = "suite/grid.rs"]
mod grid;
#[path = "suite/inputs.rs"]
mod inputs;
#[path = "suite/interrupt.rs"]
mod interrupt;
#[path = "suite/judging.rs"]
mod judging;
#[path = "suite/kernel_source.rs"]
mod kernel_source;
#[path = "suite/kernels/mod.rs"]
mod kernels;
#[path = "suite/kernels_readme.rs"]
mod kernels_readme;
#[path = "suite/lora.rs"]
mod lora;
#[path = "suite/math.rs"]
mod math;
#[path = "suite/metrics.rs"]
mod metrics;
#[path = "suite/moments.rs"]
mod moments;
#[path = "suite/objectives.rs"]
mod objectives;
#[path = "suite/offload.rs"]
mod offload;
#[path = "suite/ops/mod.rs"]
mod ops;
#[path = "suite/pages.rs"]
mod pages;
#[path = "suite/paper.rs"]
mod paper;
#[path = "suite/pass_rates.rs"]
mod pass_rates;
#[path = "suite/places.rs"]
mod places;
#[path = "suite/plan.rs"]
mod plan;
#[path = "suite/program.rs"]
mod program;
#[path = "suite/prompts.rs"]
mod prompts;
#[path = "suite/reports.rs"]
mod reports;
#[path = "suite/resume.rs"]
mod resume;
#[path = "suite/reward.rs"]
mod reward;
#[path = "suite/rounded/mod.rs"]
mod rounded;
#[path = "suite/sampler.rs"]
mod sampler;
#[path = "suite/sharing.rs"]
mod sharing;
#[path = "suite/snapshots.rs"]
mod snapshots;
#[path = "suite/sources.rs"]
mod sources;
#[path = "suite/steps.rs"]
mod steps;
#[path = "suite/tasks.rs"]
mod tasks;
#[path = "suite/text.rs"]
mod text;
#[path = "suite/tidy.rs"]
mod tidy;
#[path = "suite/tiny.rs"]
mod tiny;
#[path = "suite/tokenizer.rs"]
mod tokenizer;
#[path = "suite/tolerance.rs"]
mod tolerance;
#[path = "suite/train_config.rs"]
mod train_config;
#[path = "suite/training.rs"]
mod training;
#[path = "suite/turns.rs"]
mod turns;
#[path = "suite/verifier/mod.rs"]
mod verifier;
#[path = "suite/weigh.rs"]
mod weigh;
