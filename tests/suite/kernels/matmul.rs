//! Tiles are chosen by size and multiprocessors (src/backend/cuda/matmul.rs): up to 32 and 64 tokens, then 64 x 64
//! tiles, and 128 x 128 ones where they fill the GPU; the sizes below reach all of them with all their remainders on the
//! virtual GPU, which has 108 multiprocessors.

use bon_engine::backend::cuda::Tensor;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Geglu as _};
use bon_engine::cost::workloads::{GEMMA_2B, GEMMA_270M, workloads};
use bon_engine::device::vm::Report;

use super::{
    Case, activation, check, coalescing, counted_on, counting, devices, orders, single, traffic, weight,
};
use crate::tolerance::Rule;

/// Y = X W^T for up to three weights of these numbers of rows.
struct Forward {
    tokens: usize,
    width: usize,
    out: [usize; 3],
}

impl Case for Forward {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let x = activation(b, 1, self.tokens, self.width);
        let w: Vec<B::Tensor> = (2..)
            .zip(self.out)
            .filter(|(_, out)| *out > 0)
            .map(|(seed, out)| weight(b, seed, out, self.width))
            .collect();
        match &w[..] {
            [a] => b.matmul_forward(&x, [a]).into(),
            [a, c] => b.matmul_forward(&x, [a, c]).into(),
            [a, c, d] => b.matmul_forward(&x, [a, c, d]).into(),
            _ => unreachable!("one to three weights"),
        }
    }
}

fn forward(tokens: usize, width: usize, out: [usize; 3]) {
    let names = ["y0", "y1", "y2"];
    let n = out.iter().filter(|out| **out > 0).count();
    check(&names[..n], Rule::Forward, &Forward { tokens, width, out });
}

#[test]
fn forward_of_any_number_of_tokens() {
    for tokens in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 96, 127, 128, 129, 193] {
        forward(tokens, 72, [136, 0, 0]);
    }
}

#[test]
fn forward_of_any_width() {
    for (i, width) in [8, 16, 24, 56, 64, 72, 120, 128, 136, 192, 200, 640].into_iter().enumerate() {
        for tokens in [5, 37, 70] {
            forward(tokens, width, [[8, 72, 128, 136, 24, 56][i % 6], 0, 0]);
        }
    }
}

#[test]
fn forward_of_several_weights() {
    for tokens in [3, 40, 100] {
        forward(tokens, 64, [1024, 256, 256]);
        forward(tokens, 24, [8, 72, 0]);
        forward(tokens, 136, [72, 8, 136]);
    }
}

#[test]
fn forward_in_wide_and_large_tiles() {
    // Wide: 6912 features or more. Large: from 65 tokens on.
    for (tokens, width, out) in [
        (1, 8, [8200, 0, 0]),
        (19, 72, [8192, 8, 0]),
        (32, 24, [8056, 136, 0]),
        (33, 8, [8200, 0, 0]),
        (64, 72, [8000, 200, 0]),
        (65, 8, [13_704, 0, 0]),
        (200, 72, [6000, 104, 8]),
        (1000, 136, [1304, 0, 0]),
    ] {
        forward(tokens, width, out);
    }
}

/// Y = X W^T + H B^T of two weights and between them one without such.
struct LowRank {
    tokens: usize,
    width: usize,
    out: [usize; 3],
    rank: usize,
}

impl Case for LowRank {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (x, [p, q, r]) = (activation(b, 1, self.tokens, self.width), self.out);
        let w = [(2, p), (3, q), (4, r)].map(|(seed, out)| weight(b, seed, out, self.width));
        let h = [5, 6].map(|seed| activation(b, seed, self.tokens, self.rank));
        let low = [(7, p), (8, r)].map(|(seed, out)| weight(b, seed, out, self.rank));
        let [v, w, y] = &w;
        b.matmul_low_rank_forward(&x, [v, w, y], [Some((&h[0], &low[0])), None, Some((&h[1], &low[1]))])
            .into()
    }
}

#[test]
fn products_with_adapters_in_all_tiles() {
    for (i, (tokens, width, out)) in [
        (1, 72, [136, 8, 24]),
        (32, 24, [1304, 1304, 8]),
        (19, 72, [8192, 8, 72]),
        (33, 136, [72, 8, 136]),
        (64, 72, [8000, 200, 8]),
        (65, 8, [13_704, 8, 8]),
        (200, 72, [6000, 104, 8]),
    ]
    .into_iter()
    .enumerate()
    {
        let rank = [8, 16, 64, 72][i % 4];
        check(&["y0", "y1", "y2"], Rule::Forward, &LowRank { tokens, width, out, rank });
    }
}

/// What sampling computes of a few rows, training computes of many.
#[test]
fn a_row_with_an_adapter_has_the_same_bits_in_any_batch_and_tile() {
    for cuda in devices() {
        let (width, out, rank) = (72, 136, 24);
        let (w, low) = (weight(&cuda, 2, out, width), weight(&cuda, 3, out, rank));
        let (x, h) = (activation(&cuda, 1, 300, width), activation(&cuda, 4, 300, rank));
        let run = |rows: &[u32]| {
            let (x, h) = (cuda.gather_rows(&x, rows), cuda.gather_rows(&h, rows));
            let [y] = cuda.matmul_low_rank_forward(&x, [&w], [Some((&h, &low))]);
            cuda.download(&y)
        };
        let all = run(&(0..300).collect::<Vec<_>>());
        for rows in [vec![0], (0..5).collect(), (7..40).collect(), (100..164).collect::<Vec<u32>>()] {
            assert!(run(&rows) == part(&all, out, &rows, out), "rows {rows:?}");
        }
    }
}

/// h, and gate and up where they are kept.
struct Geglu {
    tokens: usize,
    width: usize,
    features: usize,
    keep: bool,
}

impl Case for Geglu {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let x = activation(b, 1, self.tokens, self.width);
        let (gate, up) = (weight(b, 2, self.features, self.width), weight(b, 3, self.features, self.width));
        let (h, kept) = b.geglu_forward(&x, &gate, &up, self.keep);
        match kept {
            Some((gate, up)) => vec![h, gate, up],
            None => vec![h],
        }
    }
}

#[test]
fn geglu_in_all_tiles() {
    // The third group is large.
    for (i, (tokens, width, features)) in [
        (1, 8, 8),
        (2, 24, 24),
        (7, 72, 32),
        (16, 64, 40),
        (17, 640, 72),
        (31, 136, 64),
        (32, 64, 256),
        (33, 8, 8),
        (48, 72, 24),
        (64, 136, 32),
        (63, 128, 40),
        (65, 24, 72),
        (127, 72, 136),
        (128, 64, 8),
        (129, 200, 32),
        (65, 72, 6808),
        (200, 8, 3000),
        (1000, 72, 648),
    ]
    .into_iter()
    .enumerate()
    {
        let keep = i % 3 != 0;
        let names = ["h", "gate", "up"];
        check(&names[..if keep { 3 } else { 1 }], Rule::Forward, &Geglu { tokens, width, features, keep });
    }
}

/// dX of one to three weights.
struct BackwardInput {
    tokens: usize,
    width: usize,
    out: [usize; 3],
}

impl Case for BackwardInput {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let pairs: Vec<_> = (0..)
            .zip(self.out)
            .filter(|(_, out)| *out > 0)
            .map(|(i, out)| (activation(b, 1 + i, self.tokens, out), weight(b, 5 + i, out, self.width)))
            .collect();
        vec![b.matmul_backward_input(&pairs.iter().map(|(dy, w)| (dy, w)).collect::<Vec<_>>())]
    }
}

#[test]
fn backward_input_in_all_tiles() {
    for (tokens, width, out) in [
        (1, 8, [8, 0, 0]),
        (2, 64, [64, 0, 0]),
        (7, 72, [24, 8, 0]),
        (31, 136, [72, 0, 0]),
        (33, 56, [128, 72, 8]),
        (63, 128, [256, 64, 64]),
        (64, 64, [640, 0, 0]),
        (65, 200, [136, 200, 0]),
        (127, 24, [64, 128, 192]),
        (129, 72, [72, 8, 136]),
        // Large.
        (65, 13_704, [24, 0, 0]),
        (200, 6000, [64, 8, 72]),
        (1000, 1304, [136, 0, 0]),
        // In parts, which begin and end anywhere in the weights.
        (37, 72, [1272, 0, 0]),
        (65, 136, [200, 1000, 72]),
    ] {
        check(&["dx"], Rule::Backward, &BackwardInput { tokens, width, out });
    }
}

/// dW, added to what was there.
struct BackwardWeight {
    tokens: usize,
    width: usize,
    out: usize,
}

impl Case for BackwardWeight {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (dy, x) = (activation(b, 1, self.tokens, self.out), activation(b, 2, self.tokens, self.width));
        let mut dw = single(b, 3, self.out, self.width);
        b.matmul_backward_weight(&dy, &x, &mut dw);
        vec![dw]
    }
}

#[test]
fn backward_weight_in_all_tiles() {
    for (tokens, width, out) in [
        (1, 8, 8),
        (2, 64, 64),
        (7, 72, 24),
        (8, 24, 136),
        (15, 56, 72),
        (17, 128, 128),
        (31, 8, 200),
        (32, 136, 8),
        (33, 192, 56),
        (63, 64, 72),
        (64, 72, 64),
        (65, 200, 40),
        (127, 16, 16),
        (128, 136, 120),
        (129, 40, 136),
        (300, 64, 64),
        // Large.
        (1, 13_704, 72),
        (65, 1304, 1000),
        (130, 200, 6000),
        // In parts.
        (1500, 72, 40),
        (1999, 136, 200),
    ] {
        check(&["dw"], Rule::Backward, &BackwardWeight { tokens, width, out });
    }
}

#[test]
fn no_tokens_are_nothing_to_do() {
    for b in devices() {
        let (x, w) = (activation(&b, 1, 0, 64), weight(&b, 2, 72, 64));
        let [y] = b.matmul_forward(&x, [&w]);
        assert_eq!(b.shape(&y), (0, 72));
        assert_eq!(b.shape(&b.geglu_forward(&x, &w, &w, true).0), (0, 72));
        assert_eq!(b.shape(&b.matmul_backward_input(&[(&y, &w)])), (0, 64));
        let mut dw = single(&b, 3, 72, 64);
        let before = b.download(&dw);
        b.matmul_backward_weight(&y, &x, &mut dw);
        assert!(b.download(&dw) == before);
        b.check().expect("no error");
    }
}

/// The first columns of some rows of a bf16 matrix.
fn part(bytes: &[u8], cols: usize, rows: &[u32], first_cols: usize) -> Vec<u8> {
    rows.iter().flat_map(|&r| bytes[r as usize * cols * 2..][..first_cols * 2].to_vec()).collect()
}

#[test]
fn a_row_has_the_same_bits_in_any_batch_and_tile() {
    for b in orders() {
        const T: u32 = 200;
        const K: usize = 328;
        const OUT: usize = 6800;
        let x = activation(&b, 1, T as usize, K);
        // 128 x 128 tiles, as in training.
        let w = weight(&b, 2, OUT, K);
        let first = weight(&b, 2, 200, K);
        let [all] = b.matmul_forward(&x, [&w]);
        let all = b.download(&all);
        let (one, several) = (vec![77], vec![129, 3, 64]);
        let batches =
            [one, several, (0..32).collect(), (50..83).collect(), (66..T).collect(), (20..T).collect()];
        for rows in batches {
            let x = b.gather_rows(&x, &rows);
            // Wide tiles, and, with fewer weights, narrow ones.
            for (w, out) in [(&w, OUT), (&first, 200)] {
                let [y, _] = b.matmul_forward(&x, [w, &first]);
                assert!(
                    b.download(&y) == part(&all, OUT, &rows, out),
                    "{} rows from {}, {out}",
                    rows.len(),
                    rows[0]
                );
            }
        }
        b.check().expect("no error");
    }
}

#[test]
fn a_row_of_geglu_has_the_same_bits_in_any_batch_and_tile() {
    for b in orders() {
        const T: u32 = 200;
        const K: usize = 200;
        const F: usize = 3000;
        let x = activation(&b, 1, T as usize, K);
        let (gate, up) = (weight(&b, 2, F, K), weight(&b, 3, F, K));
        let run = |x: &Tensor, keep: bool| {
            let (h, kept) = b.geglu_forward(x, &gate, &up, keep);
            (b.download(&h), kept.map(|(gate, up)| (b.download(&gate), b.download(&up))))
        };
        let (all, kept) = run(&x, true);
        let (all_gate, all_up) = kept.expect("they are kept");
        // gate and up are the products that matmul_forward gives.
        let products = b.matmul_forward(&x, [&gate, &up]).map(|y| b.download(&y));
        assert!(products == [all_gate, all_up]);
        let batches: [Vec<u32>; 5] =
            [vec![77], vec![129, 3, 64], (0..32).collect(), (50..83).collect(), (20..86).collect()];
        for rows in batches {
            let (h, _) = run(&b.gather_rows(&x, &rows), false);
            assert!(h == part(&all, F, &rows, F), "{} rows from {}", rows.len(), rows[0]);
        }
        b.check().expect("no error");
    }
}

/// Instructions of the main loop other than mma, for each mma: the lines that ran most often.
pub(super) fn overhead(report: &Report) -> f64 {
    let most = report.lines.iter().map(|line| line.warps).max().expect("something ran");
    let lines = report.lines.iter().filter(|line| line.warps == most).count() as f64;
    let mma = report.classes.iter().find(|(class, _)| format!("{class:?}") == "Mma").expect("products").1;
    let products = mma.warps as f64 / most as f64;
    (lines - products) / products
}

#[test]
fn products_are_lean() {
    if !counting() {
        return;
    }
    let mut kernels = std::collections::BTreeSet::new();
    let all =
        [GEMMA_2B, GEMMA_270M].iter().flat_map(|model| workloads(model).into_iter().map(move |w| (model, w)));
    for (model, workload) in all {
        let Some((_, width)) = [
            ("matmul_forward q k v", model.shape.hidden),
            ("matmul_forward down", model.shape.intermediate),
            ("matmul_forward A of q", model.shape.hidden),
            ("geglu_forward", model.shape.hidden),
            ("matmul_backward", 0),
        ]
        .into_iter()
        .find(|(name, _)| workload.name.starts_with(name)) else {
            continue;
        };
        // The weights of Gemma 2B's MLP take too long. The gradients of adapters come in tiles wider than the rank, some in parts.
        let of_adapters = workload.name.starts_with("matmul_backward") && workload.name.contains(", rank ");
        if workload.bytes > 50 << 20 || of_adapters {
            continue;
        }
        // A GPU of one multiprocessor takes large tiles for all that has more than 64 tokens.
        let multiprocessors = if workload.name.ends_with("q k v, T = 512") { 1 } else { 108 };
        let reports = counted_on(&workload, multiprocessors);
        let [report] = &reports[..] else { panic!("{}: one launch", workload.name) };
        let conflicts = report.shared.wavefronts as f64 / report.shared.ideal_wavefronts as f64;
        let (coalescing, traffic) = (coalescing(&reports), traffic(&workload, &reports));
        let flops = report.mma_flops as f64 / workload.flops as f64;
        let what = format!(
            "{} by {}: sectors {coalescing:.3}, traffic {traffic:.3}, FLOPs {flops:.3}, shared {conflicts:.3}, {:.2} \
             instructions per product",
            workload.name,
            report.kernel,
            overhead(report),
        );
        assert!(coalescing <= 1.0 && traffic <= 1.0 && flops <= 1.0 && conflicts <= 1.0, "{what}");
        assert_eq!(report.local.requests, 0, "{what}");
        if report.kernel.ends_with("128x128") {
            assert!(overhead(report) <= 1.0, "{what}");
        }
        // While the tokens fit one tile, a weight's byte is asked for once. X is asked for by every tile.
        if workload.name.ends_with("T = 32") {
            let x = 32 * width as u64 * 2;
            assert_eq!(report.global.bytes, workload.bytes + u64::from(report.grid[1] - 1) * x, "{what}");
        }
        kernels.insert(report.kernel.clone());
    }
    for kernel in [
        "matmul_forward_32x16",
        "matmul_forward_32x32",
        "matmul_forward_64x64",
        "matmul_forward_128x128",
        "geglu_forward_32x64",
        "geglu_forward_128x128",
        "matmul_backward_input_128x128",
        "matmul_backward_weight_128x128",
    ] {
        assert!(kernels.contains(kernel), "{kernel} has no workload");
    }
}
