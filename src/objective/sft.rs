//! `sft`: maximum likelihood of the expert response, the paper's SFT baseline.
//!
//! ```text
//! grad log pi(y*)          c* = 1,  c_j = 0
//! ```

/// Coefficients of `m` samples, and the expert's.
pub(super) fn coefficients(m: usize) -> (Vec<f64>, Option<f64>) {
    (vec![0.0; m], Some(1.0))
}
