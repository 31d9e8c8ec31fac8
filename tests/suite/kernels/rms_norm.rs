use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, DType, NormSpec, ResidualSpec};

use super::{
    Case, activation, activation_of, activation_up_to, check, coalescing, counted, counting, devices,
    outputs, single, traffic, weight, workloads_of,
};
use crate::ops::{bits, randoms};
use crate::tolerance::Rule;

/// That of Gemma 1 to 3, without layer scalars.
const PLAIN: ResidualSpec = ResidualSpec { norm: NormSpec { eps: 1e-6, offset: 1.0 }, scale: 1.0 };
/// That of Gemma 4, at the end of a layer.
const SCALED: ResidualSpec = ResidualSpec { norm: NormSpec { eps: 1e-6, offset: 0.0 }, scale: 0.37 };
/// One vector; the last lane, warp and thread of a block and those beyond; the widths of Gemma 3 270M, 2B, 3 27B.
const WIDTHS: [usize; 12] = [8, 16, 248, 256, 264, 640, 1024, 1032, 2048, 2304, 5376, 8192];

struct Forward {
    rows: usize,
    cols: usize,
    /// Of x and the branch.
    size: f32,
    spec: ResidualSpec,
}

impl Forward {
    fn new(rows: usize, cols: usize) -> Self {
        Self { rows, cols, size: 1.0, spec: PLAIN }
    }
}

impl Case for Forward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (rows, cols) = (self.rows, self.cols);
        let [x, branch] = [1, 2].map(|seed| activation_up_to(b, self.size, seed, rows, cols));
        let [pre, post] = [3, 4].map(|seed| weight(b, seed, 1, cols));
        let normed = b.rms_norm_forward(&x, &pre, self.spec.norm);
        let (sum, after) = b.add_norm_forward(&x, &branch, None, &pre, self.spec);
        let (post_sum, post_after) = b.add_norm_forward(&x, &branch, Some(&post), &pre, self.spec);
        let alone = b.add_forward(&x, &branch, &post, self.spec);
        vec![normed, sum, after, post_sum, post_after, alone]
    }
}

const FORWARD: [&str; 6] = [
    "rms_norm",
    "sum",
    "normed after sum",
    "sum with post",
    "normed after sum with post",
    "sum with post alone",
];

#[test]
fn forward_at_every_width() {
    for cols in WIDTHS {
        check(&FORWARD, Rule::Forward, &Forward::new(3, cols));
    }
}

/// Gemma 4: weights are factors, and the sum is scaled.
#[test]
fn factors_and_layer_scalars() {
    for (i, cols) in WIDTHS.into_iter().enumerate() {
        check(&FORWARD, Rule::Forward, &Forward { spec: SCALED, ..Forward::new(3, cols) });
        check(&BACKWARD, Rule::Backward, &Backward { spec: SCALED, ..Backward::new(5, cols, i % 2 == 0) });
    }
}

/// Blocks of one row up to 1023 rows, of two from there; the last block may have one.
#[test]
fn forward_at_every_height() {
    for rows in [1, 2, 1023, 1024, 1025] {
        check(&FORWARD, Rule::Forward, &Forward::new(rows, 24));
    }
    check(&FORWARD, Rule::Forward, &Forward::new(4099, 8));
}

struct Backward {
    rows: usize,
    cols: usize,
    /// Of the sum and the branch.
    size: f32,
    with_d_sum: bool,
    spec: ResidualSpec,
}

impl Backward {
    fn new(rows: usize, cols: usize, with_d_sum: bool) -> Self {
        Self { rows, cols, size: 1.0, with_d_sum, spec: PLAIN }
    }
}

impl Case for Backward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (rows, cols) = (self.rows, self.cols);
        let [d_sum, d_normed] = [1, 2].map(|seed| activation(b, seed, rows, cols));
        let [sum, branch] = [3, 4].map(|seed| activation_up_to(b, self.size, seed, rows, cols));
        let d_sum = self.with_d_sum.then_some(&d_sum);
        let [pre, post] = [5, 6].map(|seed| weight(b, seed, 1, cols));
        let [mut d_pre, mut d_pre_2, mut d_post] = [7, 8, 9].map(|seed| single(b, seed, 1, cols));
        let (dx, none) = b.add_norm_backward(d_sum, &d_normed, &sum, (&pre, &mut d_pre), None, self.spec);
        assert!(none.is_none());
        let with_post = Some((&branch, &post, &mut d_post));
        let (dx_2, d_branch) =
            b.add_norm_backward(d_sum, &d_normed, &sum, (&pre, &mut d_pre_2), with_post, self.spec);
        // Of a sum that no norm follows, with one or two gradients.
        let mut d_post_3 = single(b, 10, 1, cols);
        let (dx_3, d_branch_3) = b.add_backward(&d_normed, d_sum, (&branch, &post, &mut d_post_3), self.spec);
        vec![dx, d_pre, dx_2, d_branch.expect("with post"), d_pre_2, d_post, dx_3, d_branch_3, d_post_3]
    }
}

const BACKWARD: [&str; 9] = [
    "dx",
    "d pre",
    "dx with post",
    "d branch",
    "d pre with post",
    "d post",
    "dx alone",
    "d branch alone",
    "d post alone",
];

#[test]
fn backward_at_every_width() {
    for (i, cols) in WIDTHS.into_iter().enumerate() {
        check(&BACKWARD, Rule::Backward, &Backward::new(5, cols, i % 2 == 0));
    }
}

/// Groups without a row, blocks of 32 rows and a last one of less, more partial sums than are added up at once.
#[test]
fn backward_at_every_height() {
    for rows in [1, 2, 7, 8, 9, 31, 32, 33, 65, 1025] {
        check(&BACKWARD, Rule::Backward, &Backward::new(rows, 40, rows % 2 == 1));
    }
    // Two rows beyond 32 a block.
    check(&BACKWARD, Rule::Backward, &Backward::new(512 * 32 + 2, 8, true));
}

#[test]
fn no_rows_are_no_work() {
    for cuda in devices() {
        outputs(&cuda, &Forward::new(0, 16));
        let out = outputs(&cuda, &Backward::new(0, 16, true));
        assert_eq!(out[1].as_f32(), randoms(7, 16), "a gradient that nothing was added to");
    }
}

/// Where eps decides: 1e-3 is as large as its root, and at 1e-6 the post norm's result is.
#[test]
fn rows_as_small_as_eps() {
    for size in [1e-3, 1e-6] {
        check(&FORWARD, Rule::Forward, &Forward { size, ..Forward::new(3, 640) });
        check(&BACKWARD, Rule::Backward, &Backward { size, ..Backward::new(3, 640, true) });
    }
}

/// A row of zeros has a root mean square of sqrt(eps); large ones do not overflow in their squares' sum.
#[test]
fn rows_of_any_size() {
    struct Sizes;
    impl Case for Sizes {
        fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
            let scales = [0.0, 1e-8, 1e-3, 1.0, 1e4, 1e15];
            let x: Vec<f32> =
                randoms(1, 6 * 640).iter().enumerate().map(|(i, x)| x * scales[i / 640]).collect();
            vec![b.rms_norm_forward(&activation_of(b, 6, 640, &x), &weight(b, 2, 1, 640), PLAIN.norm)]
        }
    }
    check(&["normed"], Rule::Forward, &Sizes);
}

/// The first rows of a batch of any size have the same bits; and what a backward pass computes again from the stored
/// sum is what the forward pass gave.
#[test]
fn bits_do_not_depend_on_the_batch() {
    for cuda in devices() {
        let cols = 640;
        let few = outputs(&cuda, &Forward::new(7, cols));
        let many = outputs(&cuda, &Forward::new(1031, cols));
        for ((few, many), what) in few.iter().zip(&many).zip(FORWARD) {
            assert_eq!(bits(few)[..], bits(many)[..7 * cols], "{what}");
        }
        let [x, branch] = [1, 2].map(|seed| activation(&cuda, seed, 7, cols));
        let [pre, post] = [3, 4].map(|seed| weight(&cuda, seed, 1, cols));
        for post in [None, Some(&post)] {
            let (sum, normed) = cuda.add_norm_forward(&x, &branch, post, &pre, SCALED);
            assert_eq!(cuda.dtype(&normed), DType::Bf16);
            if let Some(post) = post {
                let alone = cuda.add_forward(&x, &branch, post, SCALED);
                assert_eq!(cuda.download(&alone), cuda.download(&sum), "with or without a norm behind it");
            }
            assert_eq!(
                cuda.download(&cuda.rms_norm_forward(&sum, &pre, SCALED.norm)),
                cuda.download(&normed)
            );
        }
    }
}

#[test]
fn every_byte_moves_once() {
    if !counting() {
        return;
    }
    for workload in ["rms_norm", "add_"].into_iter().flat_map(workloads_of) {
        let reports = counted(&workload);
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        let asked: u64 = reports.iter().map(|r| 32 * r.global.sectors).sum();
        let asked = asked as f64 / workload.bytes as f64;
        assert!(coalescing <= 1.05, "{}: {coalescing}", workload.name);
        assert!(traffic <= 1.05, "{}: {traffic}", workload.name);
        // A decode step's rows are in blocks of their own, and each block reads the weights.
        let ceiling = if workload.name.ends_with("T = 32") { 1.6 } else { 1.15 };
        assert!(asked <= ceiling, "{}: {asked}", workload.name);
        for report in &reports {
            assert_eq!(report.local.sectors, 0, "{}: local memory", workload.name);
        }
    }
}
