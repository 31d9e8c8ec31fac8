//! `sft`: maximum likelihood of the expert response, the paper's SFT baseline.
//!
//! ```text
//! grad log pi(y*)          c* = 1,  c_j = 0
//! ```

use super::{Expert, Objective, Weighed};

/// `sft`.
pub const SFT: Objective = Objective {
    coefficient: "1 for the expert response",
    when: "the baseline without samples",
    needs_n: false,
    needs_samples: false,
    expert: Expert::Response,
    binary: false,
    required: &[],
    optional: &[],
    compute: |_, group| Ok(Weighed { expert: Some(1.0), ..vec![0.0; group.scores.len()].into() }),
};
