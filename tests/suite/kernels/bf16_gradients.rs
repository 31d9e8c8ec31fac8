//! Gradients that are summed up in bf16, on the CPU and by the kernels: those in f32, rounded once. Those of experts are in
//! `experts`.

use bon_engine::backend::adamw::BLOCK;
use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::lm_head::logprob_backward_within;
use bon_engine::backend::ops::*;
use bon_engine::backend::{
    AdamW, Backend, Batch, DType, HeadSpec, Moments, Quantised, Target, Update, Weight,
};
use bon_engine::segments::Segments;

use super::{activation, again, devices, rounded, single_of, weight, weight_of};
use crate::ops::randoms;

/// An op that adds to gradients of these shapes, which begin with what bf16 holds.
trait Adds {
    fn shapes(&self) -> Vec<(usize, usize)>;
    fn add<B: Backend>(&self, b: &B, grads: &mut [B::Tensor]);
}

/// What the op makes of gradients of a dtype, in f32.
fn sums<B: Backend>(b: &B, op: &impl Adds, dtype: DType) -> Vec<Vec<f32>> {
    let begin = |(seed, (rows, cols)): (u32, (usize, usize))| {
        let start = rounded(&randoms(40 + seed, rows * cols));
        match dtype {
            DType::F32 => single_of(b, rows, cols, &start),
            DType::Bf16 => weight_of(b, rows, cols, &start),
        }
    };
    let mut grads: Vec<B::Tensor> = (0..).zip(op.shapes()).map(begin).collect();
    op.add(b, &mut grads);
    b.check().expect("no finding");
    assert!(grads.iter().all(|x| b.dtype(x) == dtype));
    grads.iter().map(|x| b.to_f32(x)).collect()
}

fn holds<B: Backend>(b: &B, op: &impl Adds) -> Vec<Vec<f32>> {
    let (wide, narrow) = (sums(b, op, DType::F32), sums(b, op, DType::Bf16));
    for (wide, narrow) in wide.iter().zip(&narrow) {
        assert!(rounded(wide) == *narrow, "on {}", b.device_name());
    }
    assert!(wide != narrow, "nothing was rounded");
    narrow
}

#[track_caller]
fn check(op: &impl Adds) {
    holds(&Cpu::F32, op);
    for cuda in devices() {
        let got = holds(&cuda, op);
        for (again, how) in again(&cuda) {
            assert!(sums(&again, op, DType::Bf16) == got, "other bits {how}");
        }
    }
}

/// dW += dY^T X.
struct Product {
    tokens: usize,
    width: usize,
    out: usize,
}

impl Adds for Product {
    fn shapes(&self) -> Vec<(usize, usize)> {
        vec![(self.out, self.width)]
    }

    fn add<B: Backend>(&self, b: &B, grads: &mut [B::Tensor]) {
        let (dy, x) = (activation(b, 1, self.tokens, self.out), activation(b, 2, self.tokens, self.width));
        b.matmul_backward_weight(&dy, &x, &mut grads[0]);
    }
}

#[test]
fn of_products_in_all_tiles() {
    for (tokens, width, out) in [
        (1, 8, 8),
        (7, 72, 24),
        (8, 24, 136),
        (17, 128, 128),
        (31, 8, 200),
        (32, 136, 8),
        (63, 64, 72),
        (65, 200, 40),
        (129, 40, 136),
        // Large.
        (1, 13_704, 72),
        (65, 1304, 1000),
        (130, 200, 6000),
        // In parts.
        (1500, 72, 40),
        (1999, 136, 200),
    ] {
        check(&Product { tokens, width, out });
    }
}

/// Rows of an embedding, by tokens.
struct Embedding<'a> {
    ids: &'a [u32],
    cols: usize,
}

impl Adds for Embedding<'_> {
    fn shapes(&self) -> Vec<(usize, usize)> {
        vec![(50, self.cols)]
    }

    fn add<B: Backend>(&self, b: &B, grads: &mut [B::Tensor]) {
        let segments = Segments::separate(&[self.ids.len()]);
        let runs = segments.all_queries();
        let tables = b.tables(&Batch::new(self.ids, &segments, &runs), &[]);
        b.embed_backward(&activation(b, 2, self.ids.len(), self.cols), &tables, 25.3, &mut grads[0]);
    }
}

#[test]
fn of_embeddings_of_every_width_and_frequency() {
    let often: Vec<u32> = (0..70).map(|t| t * t % 11 * 4).collect();
    for cols in [8, 248, 264, 640, 2056] {
        check(&Embedding { ids: &[49, 0, 7, 31, 7, 1], cols });
        check(&Embedding { ids: &often, cols });
    }
}

/// The LM head, in ranges of the vocabulary.
struct Head {
    rows: usize,
    vocab: usize,
}

impl Head {
    fn targets(&self) -> (Vec<Target>, Vec<f32>) {
        let target = |i: usize| Target { row: (i % self.rows) as u32, token: (i * 37 % self.vocab) as u32 };
        let n = self.rows + 3;
        ((0..n).map(target).collect(), randoms(9, n))
    }
}

const HEAD: HeadSpec = HeadSpec { softcap: Some(30.0), temperature: 0.9 };

impl Adds for Head {
    fn shapes(&self) -> Vec<(usize, usize)> {
        vec![(self.vocab, 40)]
    }

    fn add<B: Backend>(&self, b: &B, grads: &mut [B::Tensor]) {
        let (x, embedding) = (activation(b, 3, self.rows, 40), weight(b, 4, self.vocab, 40));
        let (targets, weights) = self.targets();
        let (_, trace) = b.lm_head_logprob_forward(&x, &embedding, &HEAD, &targets, false);
        b.lm_head_logprob_backward(&x, &embedding, &HEAD, &trace, &targets, &weights, &mut grads[0]);
    }
}

#[test]
fn of_the_head() {
    for (rows, vocab) in [(1, 50), (37, 1100), (200, 700)] {
        check(&Head { rows, vocab });
    }
    // One chunk of the vocabulary at a time.
    let head = Head { rows: 5, vocab: 1300 };
    for cuda in devices() {
        let (x, embedding) = (activation(&cuda, 3, 5, 40), weight(&cuda, 4, 1300, 40));
        let (targets, weights) = head.targets();
        let (_, trace) = cuda.lm_head_logprob_forward(&x, &embedding, &HEAD, &targets, false);
        let run = |workspace: usize| {
            let mut d = cuda.zeros(DType::Bf16, 1300, 40);
            logprob_backward_within(
                workspace, &cuda, &x, &embedding, &HEAD, &trace, &targets, &weights, &mut d,
            );
            cuda.download(&d)
        };
        assert!(run(1) == run(1 << 30));
    }
}

/// A sum of squares is that of the same numbers in f32.
#[test]
fn squares_of_bf16_are_summed_up_as_those_of_f32() {
    fn sums<B: Backend>(b: &B) {
        for n in [1, 3, 4, 1027, 64 * 1024 + 5, 150_001] {
            let x = rounded(&randoms(n as u32, n));
            let (wide, narrow) = (single_of(b, 1, n, &x), weight_of(b, 1, n, &x));
            let got = b.sum_squares(&[&narrow, &wide]);
            assert!(got[0] == got[1] && got[0] > 0.0, "{n} on {}: {got:?}", b.device_name());
        }
    }
    sums(&Cpu::F32);
    for cuda in devices() {
        sums(&cuda);
        for bad in [f32::NAN, f32::INFINITY] {
            let mut x = vec![1.0; 777];
            x[700] = bad;
            assert!(!cuda.sum_squares(&[&weight_of(&cuda, 1, 777, &x)])[0].is_finite());
        }
    }
}

/// One update, of moments and weights kept in every way; returns weight, moments or their scales, and the gradient.
fn updated<B: Backend>(b: &B, n: usize, kind: usize, gradients: DType) -> Vec<Vec<f32>> {
    let sizes = [1.0, 1e-3, 0.0, 1e3, 1e-20];
    let grad: Vec<f32> = randoms(5, n).iter().enumerate().map(|(i, g)| g * sizes[i % 5]).collect();
    let mut grad = match gradients {
        DType::F32 => single_of(b, 1, n, &rounded(&grad)),
        DType::Bf16 => weight_of(b, 1, n, &grad),
    };
    let zeros = || b.zeros(DType::F32, 1, n);
    let quantised =
        || Quantised { codes: b.zero_codes(n), scales: b.zeros(DType::F32, 1, n.div_ceil(BLOCK)) };
    let mut moments = match kind {
        0 => Moments::F32 { m: zeros(), v: zeros() },
        _ => Moments::Blockwise { m: quantised(), v: quantised() },
    };
    let start = randoms(6, n);
    let (mut master, mut half) = (single_of(b, 1, n, &start), weight_of(b, 1, n, &start));
    let weight = match kind {
        0 => Weight::Master { master: &mut master, copy: &mut half },
        _ => Weight::Bf16 { weight: &mut half, number: 3 },
    };
    let hyper =
        AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step: 1, grad_scale: 0.37, key: [1, 2] };
    b.adamw(&hyper, &mut [Update { grad: &mut grad, moments: &mut moments, weight, weight_decay: 0.1 }]);
    b.check().expect("no finding");
    assert_eq!(b.dtype(&grad), gradients);
    let kept = match &moments {
        Moments::F32 { m, v } => [m, v].map(|x| b.to_f32(x)),
        Moments::Blockwise { m, v } => [m, v].map(|x| b.to_f32(&x.scales)),
    };
    let [m, v] = kept;
    vec![b.to_f32(&master), b.to_f32(&half), m, v, b.to_f32(&grad)]
}

#[test]
fn an_update_is_that_of_the_same_gradient_in_f32() {
    for n in [1, 3, 130, 256, 700, 64 * 1024 + 301] {
        for kind in 0..2 {
            let want = updated(&Cpu::F32, n, kind, DType::F32);
            assert!(want[4].iter().all(|&g| g == 0.0));
            assert!(updated(&Cpu::F32, n, kind, DType::Bf16) == want, "{n} on the CPU");
            for cuda in devices() {
                assert!(updated(&cuda, n, kind, DType::Bf16) == want, "{n} on {}", cuda.device_name());
            }
        }
    }
}

/// The error of n additions: n half units in the last place of the largest sum, at most, and as a rule a fraction of that.
#[test]
fn the_error_of_micro_batches_is_what_is_said() {
    const N: usize = 8;
    fn error<B: Backend>(b: &B, dtype: DType) -> (f64, Vec<f32>) {
        let (tokens, width, out) = (16, 64, 64);
        let mut dw = b.zeros(dtype, out, width);
        let mut exact = b.zeros(DType::F32, out, width);
        let mut largest = vec![0.0f32; out * width];
        for i in 0..N as u32 {
            let (dy, x) = (activation(b, 10 + i, tokens, out), activation(b, 50 + i, tokens, width));
            b.matmul_backward_weight(&dy, &x, &mut dw);
            b.matmul_backward_weight(&dy, &x, &mut exact);
            largest.iter_mut().zip(b.to_f32(&exact)).for_each(|(most, x)| *most = most.max(x.abs()));
        }
        let (got, want) = (b.to_f32(&dw), b.to_f32(&exact));
        for ((got, want), largest) in got.iter().zip(&want).zip(&largest) {
            // What is added to is off, too, by what was rounded before: hence twice as much room as the largest sum has.
            let bound = N as f32 * 2.0 * largest / 256.0;
            assert!((got - want).abs() <= bound, "{got} for {want}, at most {bound}");
        }
        let off: f64 = got.iter().zip(&want).map(|(a, b)| f64::from(a - b).powi(2)).sum();
        let size: f64 = want.iter().map(|x| f64::from(*x).powi(2)).sum();
        ((off / size).sqrt(), got)
    }
    let (none, _) = error(&Cpu::F32, DType::F32);
    assert_eq!(none, 0.0);
    let (some, _) = error(&Cpu::F32, DType::Bf16);
    let as_a_rule = (N as f64 / 3.0).sqrt() / 256.0;
    assert!(0.1 * as_a_rule < some && some <= as_a_rule, "{some}, as a rule {as_a_rule}");
    for cuda in devices() {
        assert!(error(&cuda, DType::Bf16).0 <= as_a_rule);
    }
}
