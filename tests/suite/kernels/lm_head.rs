use std::sync::Arc;

use bon_engine::backend::cpu::{Cpu, Tensor as CpuTensor};
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::cuda::lm_head::logprob_backward_within;
use bon_engine::backend::ops::*;
use bon_engine::backend::{Backend, Choice, HeadSpec, HeadTrace, Sampled, Target, Truncation};
use bon_engine::cost::figures::CHIPS;
use bon_engine::cost::workloads::GEMMA_270M;
use bon_engine::device::vm::{Checks, Options, Report, Vm};
use bon_engine::rng::{DrawKey, philox4x32};

use super::{
    activation_of, again, check, coalescing, counted, counting, devices, orders, outputs, rounded, single,
    single_of, traffic, weight, weight_of, workloads_of,
};
use crate::ops::{bits, randoms};
use crate::tolerance::{EPS, Rule, assert_within};

const PLAIN: HeadSpec = HeadSpec { softcap: None, temperature: 1.0 };
const CAPPED: HeadSpec = HeadSpec { softcap: Some(1.5), temperature: 0.7 };

/// R rows, V tokens, D columns, with targets: some rows have none, some several, some the same one twice.
#[derive(Clone)]
struct Case {
    head: HeadSpec,
    rows: usize,
    vocab: usize,
    width: usize,
    /// [R, D].
    x: Vec<f32>,
    targets: Vec<Target>,
    weights: Vec<f32>,
}

impl Case {
    fn new(rows: usize, vocab: usize, width: usize, head: HeadSpec) -> Self {
        // Logits of size 4 or so: the caps bite and probabilities differ.
        let scale = 7.0 / (width as f32).sqrt();
        let x = rounded(&randoms(1, rows * width).iter().map(|x| scale * x).collect::<Vec<_>>());
        let target = |i: usize| Target {
            row: (i * 7 % rows) as u32,
            token: ((i * 31 + 1) * (vocab / 3 + 1) % vocab) as u32,
        };
        let mut targets: Vec<Target> = (0..rows + 2).filter(|i| i % 5 != 3).map(target).collect();
        targets.push(targets[0]);
        targets.push(Target { row: 0, token: vocab as u32 - 1 });
        let weights = randoms(3, targets.len());
        Self { head, rows, vocab, width, x, targets, weights }
    }

    /// One of its rows with that row's targets, and where these stand among all.
    fn alone(&self, row: usize) -> (Self, Vec<usize>) {
        let mine: Vec<usize> =
            (0..self.targets.len()).filter(|&i| self.targets[i].row as usize == row).collect();
        let x = self.x[row * self.width..(row + 1) * self.width].to_vec();
        let targets = mine.iter().map(|&i| Target { row: 0, ..self.targets[i] }).collect();
        let weights = mine.iter().map(|&i| self.weights[i]).collect();
        (Self { rows: 1, x, targets, weights, ..self.clone() }, mine)
    }

    fn x<B: Backend>(&self, b: &B) -> B::Tensor {
        activation_of(b, self.rows, self.width, &self.x)
    }

    fn embedding<B: Backend>(&self, b: &B) -> B::Tensor {
        weight(b, 2, self.vocab, self.width)
    }

    fn forward<B: Backend>(&self, b: &B) -> (Vec<f32>, HeadTrace<B::Tensor>) {
        self.forward_keeping(b, false)
    }

    fn forward_keeping<B: Backend>(&self, b: &B, keep: bool) -> (Vec<f32>, HeadTrace<B::Tensor>) {
        b.lm_head_logprob_forward(&self.x(b), &self.embedding(b), &self.head, &self.targets, keep)
    }

    fn sample<B: Backend>(&self, b: &B, truncation: &Truncation, choices: &[Choice]) -> Vec<Sampled> {
        let out = b.lm_head_sample(&self.x(b), &self.embedding(b), &self.head, truncation, choices);
        if let Err(e) = b.check() {
            panic!("{e}");
        }
        out
    }
}

struct Forward<'a>(&'a Case);

impl super::Case for Forward<'_> {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let (logprobs, trace) = self.0.forward(b);
        vec![single_of(b, 1, logprobs.len(), &logprobs), trace.lse]
    }
}

struct Backward<'a>(&'a Case);

impl super::Case for Backward<'_> {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let case = self.0;
        let mut d_embedding = single(b, 4, case.vocab, case.width);
        let (x, embedding, (_, trace)) = (case.x(b), case.embedding(b), case.forward(b));
        let dx = b.lm_head_logprob_backward(
            &x,
            &embedding,
            &case.head,
            &trace,
            &case.targets,
            &case.weights,
            &mut d_embedding,
        );
        vec![dx, d_embedding]
    }
}

/// The rule's bound is that of bf16. Nothing of the forward pass is bf16 but its inputs, so it is held to f32 as well.
#[track_caller]
fn check_case(case: &Case) {
    check(&["log-probs", "lse"], Rule::Forward, &Forward(case));
    let exact = Exact::new(case);
    let want: Vec<f64> = case.targets.iter().map(|t| exact.logprob(t.row, t.token)).collect();
    for cuda in orders() {
        let got = outputs(&cuda, &Forward(case));
        let bound = |i: usize| {
            let t = case.targets[i];
            exact.lse_error[t.row as usize] + exact.error(t.row, t.token) + EPS * want[i].abs()
        };
        assert_within("log-probs in f32", got[0].as_f32(), &want, bound);
        assert_within("lse in f32", got[1].as_f32(), &exact.lse, |row| exact.lse_error[row]);
    }
    // With one token the gradient is zero but for rounding.
    if case.vocab > 1 {
        check(&["dX", "d_embedding"], Rule::Backward, &Backward(case));
    }
}

/// Finished logits and log-sum-exps in f64, and how far f32 may be from them.
struct Exact {
    vocab: usize,
    logits: Vec<f64>,
    errors: Vec<f64>,
    lse: Vec<f64>,
    lse_error: Vec<f64>,
}

impl Exact {
    fn new(case: &Case) -> Self {
        let (v, d) = (case.vocab, case.width);
        let e = rounded(&randoms(2, v * d));
        let (t, cap) = (f64::from(case.head.temperature), case.head.softcap.map(f64::from));
        let (mut logits, mut errors) = (Vec::new(), Vec::new());
        for (x, e) in case.x.chunks(d).flat_map(|x| e.chunks(d).map(move |e| (x, e))) {
            let products = x.iter().zip(e).map(|(x, e)| f64::from(*x) * f64::from(*e));
            let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()));
            let logit = cap.map_or(sum, |c| c * (sum / c).tanh()) / t;
            // Products are exact, d sums may be truncated, as tensor cores do; the slope of the cap is at most 1. Then
            // a product with 1 / cap, tanh within 2 ulp, products with cap and 1 / T, each of whose reciprocals is
            // rounded as well.
            errors.push(EPS * (d as f64 * size / t + 4.0 * logit.abs()));
            logits.push(logit);
        }
        let (mut lse, mut lse_error) = (Vec::new(), Vec::new());
        for (l, errors) in logits.chunks(v).zip(errors.chunks(v)) {
            let max = l.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let value = max + l.iter().map(|l| (l - max).exp()).sum::<f64>().ln();
            let (worst, range) = (errors.iter().copied().fold(0.0, f64::max), 2.0 * max.abs().max(1.0));
            // Differences from the maximum, 2^x within 2 ulp, sums in trees: 3 levels of a thread's tokens, 4 tiles, 3
            // levels of lanes, 2 halves, chunks by 32 in 32 slots; every merge rounds three times. Then ln, and a sum.
            let merges = 3.0 + 4.0 + 3.0 * (3.0 + 1.0 + (v / 16384) as f64 + 2.0 + 7.0);
            lse_error.push(worst + EPS * (range + 3.0 + merges / 2.0 + value.abs()));
            lse.push(value);
        }
        Self { vocab: v, logits, errors, lse, lse_error }
    }

    fn at(&self, row: u32, token: u32) -> usize {
        row as usize * self.vocab + token as usize
    }

    fn logprob(&self, row: u32, token: u32) -> f64 {
        self.logits[self.at(row, token)] - self.lse[row as usize]
    }

    fn error(&self, row: u32, token: u32) -> f64 {
        self.errors[self.at(row, token)]
    }
}

/// Gumbel noise of one token, and how far f32 may be from it.
fn noise(choice: &Choice, token: u32) -> (f64, f64) {
    let Choice::Draw(key) = choice else { return (0.0, 0.0) };
    let bits = philox4x32([token / 4, key.position, key.stream, key.prompt], key.key)[token as usize % 4];
    let u = (f64::from(bits) + 0.5) / 4_294_967_296.0;
    let e = -(-u).ln_1p();
    // u and 1 - u are rounded to 24 bits, E within 8 ulp of that, then a logarithm within 2 ulp.
    let moved = EPS * (u / (1.0 - u).max(EPS) / e + 1.0);
    (-e.ln(), moved + EPS * (8.0 + 2.0 * e.ln().abs()))
}

#[test]
fn agrees_at_every_edge_of_the_vocabulary() {
    for vocab in [1, 2, 7, 8, 9, 63, 65, 127, 128, 129, 511, 513, 1100] {
        check_case(&Case::new(3, vocab, 24, CAPPED));
    }
}

#[test]
fn agrees_at_every_edge_of_rows() {
    for rows in [1, 2, 63, 64, 65, 127, 128, 129, 270] {
        check_case(&Case::new(rows, 131, 16, PLAIN));
    }
}

#[test]
fn agrees_at_every_edge_of_the_width() {
    for width in [8, 16, 56, 64, 72, 128, 136, 320] {
        check_case(&Case::new(3, 150, width, CAPPED));
    }
}

/// So wide that the gradients' products come in large tiles.
#[test]
fn agrees_where_rows_are_wide() {
    check_case(&Case::new(70, 72, 13_704, PLAIN));
}

/// Many targets of one token, and of one row.
#[test]
fn targets_may_crowd() {
    let mut case = Case::new(140, 600, 16, CAPPED);
    case.targets = (0..140).map(|row| Target { row, token: 7 }).collect();
    case.targets.extend((0..300).rev().map(|i| Target { row: 131, token: 2 * i }));
    case.weights = randoms(3, case.targets.len());
    check_case(&case);
}

#[test]
fn nothing_asked_is_nothing_done() {
    for device in devices() {
        let mut case = Case::new(2, 131, 8, PLAIN);
        case.targets.clear();
        case.weights.clear();
        let (logprobs, HeadTrace { lse, .. }) = case.forward(&device);
        let want = outputs(&Cpu::F32, &Forward(&case)).remove(1);
        assert!(logprobs.is_empty());
        let bound = Exact::new(&case).lse_error;
        let want: Vec<f64> = want.as_f32().iter().map(|x| f64::from(*x)).collect();
        assert_within("lse", &device.to_f32(&lse), &want, |row| 2.0 * bound[row]);
        // Without a weight there is no gradient.
        let out = outputs(&device, &Backward(&case));
        assert!(out[0].as_f32().iter().all(|x| *x == 0.0));
        assert_eq!(out[1].as_f32(), randoms(4, 131 * 8));
        let none = Case { rows: 0, x: Vec::new(), ..case };
        assert!(none.sample(&device, &NONE, &[]).is_empty());
        assert!(none.sample(&device, &TRUNCATIONS[0], &[]).is_empty());
        let out = outputs(&device, &Backward(&none));
        assert_eq!((out[0].rows, out[0].cols, out[1].as_f32()), (0, 8, &randoms(4, 131 * 8)[..]));
    }
}

/// The gradient of the logits comes in ranges of chunks where the workspace is small. Its sums go on from range to range,
/// so how much memory was free does not tell; nor does it whether there was some to keep the logits.
#[test]
fn the_gradient_has_the_same_bits_whatever_memory_there_is() {
    let run = |case: &Case, cuda: &Cuda, workspace: usize, keep: bool| -> [Vec<u32>; 2] {
        let mut d_embedding = single(cuda, 4, case.vocab, case.width);
        let (x, embedding, (_, trace)) =
            (case.x(cuda), case.embedding(cuda), case.forward_keeping(cuda, keep));
        let kept = trace.logits.as_ref().map_or(0, |logits| cuda.download(logits).len() as u64);
        assert_eq!(kept > 0, keep);
        assert!(kept <= HeadTrace::<()>::logits_bytes(case.rows, case.vocab));
        let (head, targets, weights) = (&case.head, &case.targets, &case.weights);
        let dx = logprob_backward_within(
            workspace,
            cuda,
            &x,
            &embedding,
            head,
            &trace,
            targets,
            weights,
            &mut d_embedding,
        );
        cuda.check().expect("the device is content");
        [(case.rows, dx), (case.vocab, d_embedding)]
            .map(|(rows, x)| bits(&CpuTensor::f32(rows, case.width, cuda.to_f32(&x))))
    };
    for (case, chunks) in [
        (Case::new(131, 2 * 512 + 77, 8, CAPPED), 0..3),
        // In parts of 192: ranges of 3 chunks end where a part does, of 4 and 5 within one.
        (Case::new(3, 5080, 8, CAPPED), 3..6),
    ] {
        for device in orders() {
            let want = run(&case, &device, usize::MAX, false);
            for (chunks, keep) in chunks.clone().flat_map(|chunks| [(chunks, false), (chunks, true)]) {
                let got = run(&case, &device, chunks * case.rows * 512 * 2, keep);
                assert!(got == want, "{chunks} chunks at once, logits kept: {keep}");
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- sampling

/// More chunks than the merging kernels take in one pass.
const MANY_CHUNKS: usize = 33 * 512 + 5;
const NONE: Truncation = Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 };
const TRUNCATIONS: [Truncation; 6] = [
    Truncation { top_k: 50, top_p: 0.9, min_p: 1e-3 },
    Truncation { top_k: 1, ..NONE },
    Truncation { top_k: 37, ..NONE },
    Truncation { top_p: 0.813, ..NONE },
    Truncation { top_k: 400, top_p: 0.01, min_p: 0.0 },
    Truncation { min_p: 0.1, ..NONE },
];

/// All keys different; every fifth row is greedy.
fn choices(rows: usize) -> Vec<Choice> {
    let key = |i: u32| DrawKey { key: [7, 8 + i % 2], prompt: i / 32, stream: 37 * i, position: 3 * i };
    (0..rows as u32).map(|i| if i % 5 == 4 { Choice::Greedy } else { Choice::Draw(key(i)) }).collect()
}

#[track_caller]
fn assert_same(what: &str, got: &[Sampled], want: &[Sampled]) {
    let of = |s: &[Sampled]| s.iter().map(|s| (s.token, s.logprob.to_bits())).collect::<Vec<_>>();
    assert_eq!(of(got), of(want), "{what}");
}

#[test]
fn draws_are_exact_but_for_rounding() {
    let shapes = [(1, 1), (1, 9), (2, 127), (15, 513), (16, 130), (17, 1100), (32, 129), (33, 255), (64, 65)];
    let shapes = [&shapes[..], &[(70, 300), (3, MANY_CHUNKS)]].concat();
    let (mut decided, mut all) = (0, 0);
    for (device, (i, &(rows, vocab))) in
        devices().into_iter().flat_map(|d| shapes.iter().enumerate().map(move |shape| (d.clone(), shape)))
    {
        let width = [8, 72, 136][i % 3];
        let case = Case::new(rows, vocab, width, [PLAIN, CAPPED][i % 2]);
        let choices = choices(rows);
        let got = case.sample(&device, &NONE, &choices);
        let (cpu, exact) = (case.sample(&Cpu::F32, &NONE, &choices), Exact::new(&case));
        for (row, choice) in choices.iter().enumerate() {
            let r = row as u32;
            let score = |v: u32| {
                let (noise, error) = noise(choice, v);
                let score = exact.logits[exact.at(r, v)] + noise;
                (score, error + exact.error(r, v) + EPS * score.abs())
            };
            let best = (0..vocab as u32).max_by(|a, b| score(*a).0.total_cmp(&score(*b).0)).expect("a token");
            let ((most, error), (own, own_error)) = (score(best), score(got[row].token));
            assert!(own + own_error + error >= most, "row {row} of {rows} x {vocab}: {own} < {most}");
            // Where no other token is near, the CPU draws this one, too.
            let near = |v: u32| v != best && score(v).0 + score(v).1 + error >= most;
            all += 1;
            if !(0..vocab as u32).any(near) {
                decided += 1;
                assert_eq!((got[row].token, cpu[row].token), (best, best), "row {row} of {rows} x {vocab}");
            }
        }
        let want: Vec<f64> = (0..).zip(&got).map(|(row, s)| exact.logprob(row, s.token)).collect();
        let logprobs: Vec<f32> = got.iter().map(|s| s.logprob).collect();
        assert_within("log-probs", &logprobs, &want, |row| {
            exact.lse_error[row] + exact.error(row as u32, got[row].token) + EPS * want[row].abs()
        });
    }
    assert!(decided * 20 >= all * 19, "{decided} of {all} draws are decided beyond rounding");
}

/// The heart of on-policy training: what sampling records is what training computes, to the bit, in any company.
#[test]
fn sampling_gives_the_log_prob_of_training() {
    for device in orders() {
        let whole = Case::new(131, 1100, 72, CAPPED);
        let choices = choices(whole.rows);
        let rows = |range: std::ops::Range<usize>| Case {
            rows: range.len(),
            x: whole.x[range.start * whole.width..range.end * whole.width].to_vec(),
            targets: Vec::new(),
            ..whole.clone()
        };
        for truncation in [&NONE, &TRUNCATIONS[0]] {
            let sampled = whole.sample(&device, truncation, &choices);
            let targets = (0..).zip(&sampled).map(|(row, s)| Target { row, token: s.token }).collect();
            let (logprobs, _) = Case { targets, ..whole.clone() }.forward(&device);
            let recorded = |s: &[Sampled]| s.iter().map(|s| s.logprob.to_bits()).collect::<Vec<_>>();
            assert_eq!(recorded(&sampled), logprobs.iter().map(|l| l.to_bits()).collect::<Vec<_>>());
            // In every tiling, and at other places in it.
            for part in [0..1, 5..19, 40..72, 90..131] {
                let again = rows(part.clone()).sample(&device, truncation, &choices[part.clone()]);
                assert_same("a part", &again, &sampled[part]);
            }
        }
        let (logprobs, HeadTrace { lse, .. }) = whole.forward(&device);
        let lse = device.to_f32(&lse);
        for row in [0, 5, 128] {
            let (alone, mine) = whole.alone(row);
            let (logprobs_alone, alone) = alone.forward(&device);
            assert_eq!(device.to_f32(&alone.lse)[0].to_bits(), lse[row].to_bits(), "row {row}");
            let want: Vec<u32> = mine.iter().map(|&i| logprobs[i].to_bits()).collect();
            assert_eq!(logprobs_alone.iter().map(|l| l.to_bits()).collect::<Vec<_>>(), want, "row {row}");
        }
    }
}

/// Draws that activations a few roundings away would decide otherwise may go either way, and are left out.
#[test]
fn truncated_draws_are_those_of_the_cpu() {
    let (mut decided, mut all) = (0, 0);
    for (rows, vocab, head) in [(19, 1100, PLAIN), (3, 1, PLAIN), (3, 37, CAPPED), (3, 129, CAPPED)] {
        let (case, choices) = (Case::new(rows, vocab, 24, head), choices(rows));
        for truncation in &TRUNCATIONS {
            let tokens = |s: Vec<Sampled>| s.iter().map(|s| s.token).collect::<Vec<_>>();
            let want = tokens(case.sample(&Cpu::F32, truncation, &choices));
            // 24 products in f32 are off by less than 24 x 2^-24 of their sizes' sum.
            let near = [11, 12, 13, 14].map(|seed| {
                let noise = randoms(seed, case.x.len());
                let x: Vec<f32> =
                    case.x.iter().zip(noise).map(|(x, r)| x * (1.0 + r / (1 << 15) as f32)).collect();
                let x = single_of(&Cpu::F32, rows, case.width, &x);
                tokens(Cpu::F32.lm_head_sample(&x, &case.embedding(&Cpu::F32), &head, truncation, &choices))
            });
            let clear: Vec<usize> =
                (0..rows).filter(|&row| near.iter().all(|n| n[row] == want[row])).collect();
            (decided, all) = (decided + clear.len(), all + rows);
            for cuda in devices() {
                let got = tokens(case.sample(&cuda, truncation, &choices));
                for &row in &clear {
                    assert_eq!(got[row], want[row], "{truncation:?} of {vocab}, row {row}");
                }
            }
        }
    }
    assert!(decided * 20 >= all * 19, "{decided} of {all} draws are decided beyond rounding");
}

/// Few tokens and many draws, so that a token too many or too few is noticed.
#[test]
fn truncation_cuts_where_the_cpu_cuts() {
    for device in devices() {
        let (vocab, rows) = (13, 48);
        // Logits 0, 1/8, 1/8, 2/8, ..., in some order.
        let e: Vec<f32> = (0..vocab * 8)
            .map(|i| if i % 8 == 0 { (i / 8 * 5 % vocab / 2) as f32 / 8.0 } else { 0.0 })
            .collect();
        let x: Vec<f32> = (0..rows * 8).map(|i| if i % 8 == 0 { 1.0 } else { 0.0 }).collect();
        let choices = choices(rows);
        let mut truncations: Vec<Truncation> = [2, 3, 8].map(|top_k| Truncation { top_k, ..NONE }).into();
        truncations.extend([0.0, 0.15, 0.5, 0.9].map(|top_p| Truncation { top_p, ..NONE }));
        truncations.extend([0.6, 0.8].map(|min_p| Truncation { min_p, ..NONE }));
        truncations.push(Truncation { top_k: 9, top_p: 0.7, min_p: 0.0 });
        let mut sizes = Vec::new();
        for truncation in &truncations {
            let tokens = |s: &[Sampled]| s.iter().map(|s| s.token).collect::<Vec<_>>();
            let (xs, es) = (activation_of(&device, rows, 8, &x), weight_of(&device, vocab, 8, &e));
            let got = tokens(&device.lm_head_sample(&xs, &es, &PLAIN, truncation, &choices));
            let (xs, es) = (activation_of(&Cpu::F32, rows, 8, &x), weight_of(&Cpu::F32, vocab, 8, &e));
            let want = tokens(&Cpu::F32.lm_head_sample(&xs, &es, &PLAIN, truncation, &choices));
            assert_eq!(got, want, "{truncation:?}");
            sizes.push(got.iter().collect::<std::collections::BTreeSet<_>>().len());
        }
        assert_eq!(sizes[..4], [2, 3, 8, 1], "all tokens that are left are drawn: {sizes:?}");
    }
}

/// Weights of tokens that meet in a bin are added in halves of 32 bits. Here one token has 0.986 of the probability and
/// 2000 have some 2^-17 each, 1.8 x 2^32 units: every other low half wraps around. Without their carries a third of the
/// 2000 would be kept, where it should be three quarters.
#[test]
fn weights_add_up_beyond_32_bits() {
    let (vocab, rows) = (2001, 2000);
    let (e, x) = (|v: usize| if v == 0 { 11.875 } else { 0.0 }, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    let e: Vec<f32> = (0..vocab * 8).map(|i| if i % 8 == 0 { e(i / 8) } else { 0.0 }).collect();
    let first = 11.875f64.exp();
    let total = first + (vocab - 1) as f64;
    let truncation = Truncation { top_p: ((first + 0.75 * (total - first)) / total) as f32, ..NONE };
    // What draws one of the 2000 from the whole vocabulary still draws it if it is kept.
    let choices = choices(rows);
    let (xs, es) = (activation_of(&Cpu::F32, rows, 8, &x.repeat(rows)), weight_of(&Cpu::F32, vocab, 8, &e));
    let whole = Cpu::F32.lm_head_sample(&xs, &es, &PLAIN, &NONE, &choices);
    let (choices, tokens): (Vec<Choice>, Vec<u32>) =
        choices.into_iter().zip(whole.iter().map(|s| s.token)).filter(|(_, token)| *token > 0).unzip();
    for device in devices() {
        let (xs, es) = (
            activation_of(&device, tokens.len(), 8, &x.repeat(tokens.len())),
            weight_of(&device, vocab, 8, &e),
        );
        let got = device.lm_head_sample(&xs, &es, &PLAIN, &truncation, &choices);
        let mut middle = 0;
        for (token, got) in tokens.iter().zip(got) {
            match *token {
                ..=1480 => assert_eq!(got.token, *token),
                1520.. => assert_ne!(got.token, *token),
                _ => {}
            }
            middle += usize::from((700..=1480).contains(token));
        }
        assert!(middle >= 3, "{middle} draws of what is kept thanks to carries");
    }
}

/// Logits that are small integers, so the same in any arithmetic: many are equal, across tiles, chunks and the digits of
/// radix selection, and the lowest id comes first.
#[test]
fn ties_go_to_the_lowest_token() {
    let (vocab, rows) = (4200, 6);
    let integers = |seed: u32, n: usize, most: f32| -> Vec<f32> {
        randoms(seed, n).into_iter().map(|x| (x * most).round()).collect()
    };
    let (x, e) = (integers(5, rows * 8, 1.4), integers(6, vocab * 8, 2.4));
    let sample = |b: &dyn Fn(&Truncation, &[Choice]) -> Vec<Sampled>| -> Vec<Vec<u32>> {
        let mut all = Vec::new();
        for truncation in [&[NONE, Truncation { top_k: 2900, ..NONE }][..], &TRUNCATIONS].concat() {
            for choices in [vec![Choice::Greedy; rows], choices(rows)] {
                all.push(b(&truncation, &choices).iter().map(|s| s.token).collect());
            }
        }
        all
    };
    for device in devices() {
        let (xs, es) = (activation_of(&device, rows, 8, &x), weight_of(&device, vocab, 8, &e));
        let got = sample(&|truncation, choices| device.lm_head_sample(&xs, &es, &PLAIN, truncation, choices));
        device.check().expect("the device is content");
        let (xs, es) = (activation_of(&Cpu::F32, rows, 8, &x), weight_of(&Cpu::F32, vocab, 8, &e));
        let want =
            sample(&|truncation, choices| Cpu::F32.lm_head_sample(&xs, &es, &PLAIN, truncation, choices));
        assert_eq!(got, want);
        let logit = |row: usize, v: usize| (0..8).map(|j| x[row * 8 + j] * e[v * 8 + j]).sum::<f32>();
        for (row, token) in got[0].iter().enumerate() {
            let best = (0..vocab).rev().max_by(|&a, &b| logit(row, a).total_cmp(&logit(row, b)));
            assert_eq!(Some(*token as usize), best, "row {row}");
        }
    }
}

#[test]
fn draws_depend_on_no_schedule() {
    for (rows, vocab) in [(3, 700), (20, 300), (40, 140)] {
        let (case, choices) = (Case::new(rows, vocab, 40, CAPPED), choices(rows));
        for truncation in [&NONE, &TRUNCATIONS[0]] {
            for device in devices() {
                let want = case.sample(&device, truncation, &choices);
                for (again, how) in again(&device) {
                    assert_same(how, &case.sample(&again, truncation, &choices), &want);
                }
            }
        }
    }
}

#[test]
fn a_broken_row_says_so_and_breaks_no_other() {
    for device in devices() {
        for (broken, head) in [(f32::NAN, CAPPED), (f32::NAN, PLAIN), (f32::INFINITY, PLAIN)] {
            let mut case = Case::new(20, 131, 16, head);
            let choices = choices(20);
            let run = |case: &Case| {
                let (logprobs, HeadTrace { lse, .. }) = case.forward(&device);
                let draws =
                    [&NONE, &TRUNCATIONS[0], &TRUNCATIONS[5]].map(|t| case.sample(&device, t, &choices));
                (logprobs, device.to_f32(&lse), draws)
            };
            let (logprobs, lse, sound) = run(&case);
            case.x[7 * 16 + 3] = broken;
            let (logprobs_now, lse_now, now) = run(&case);
            let agree = |row: usize, now: f32, before: f32| match row {
                7 => !now.is_finite(),
                _ => now.to_bits() == before.to_bits(),
            };
            assert!((0..20).all(|row| agree(row, lse_now[row], lse[row])));
            let row = |i: usize| case.targets[i].row as usize;
            assert!((0..logprobs.len()).all(|i| agree(row(i), logprobs_now[i], logprobs[i])));
            for (now, sound) in now.iter().zip(&sound) {
                assert!((0..20).all(|row| agree(row, now[row].logprob, sound[row].logprob)));
                assert!((0..20).all(|row| row == 7 || now[row].token == sound[row].token));
                assert!(now[7].token < 131);
            }
        }
    }
}

/// One likely token and thousands of others that together weigh 7e-4, but each too little to change 1 in f32.
#[test]
fn a_long_tail_is_not_lost() {
    for device in devices() {
        let vocab = MANY_CHUNKS;
        let x = activation_of(&device, 1, 8, &[1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        for peak in [0, 5000, vocab - 1] {
            let mut e = vec![0.0; vocab * 8];
            e.iter_mut().step_by(8).for_each(|e| *e = -17.0);
            e[peak * 8] = 0.0;
            let target = Target { row: 0, token: peak as u32 };
            let embedding = weight_of(&device, vocab, 8, &e);
            let (logprobs, trace) = device.lm_head_logprob_forward(&x, &embedding, &PLAIN, &[target], false);
            let want = ((vocab - 1) as f64 * f64::exp(-17.0)).ln_1p();
            // Of a thread's 32 tokens a tile's 7 beside the peak are lost at worst, 4e-8 each; then some 14 sums near 1.
            let bound = 7.0 * f64::exp(-17.0) + 14.0 * EPS / 2.0;
            assert!(bound < want / 100.0);
            assert_within("lse", &device.to_f32(&trace.lse), &[want], |_| bound);
            assert_within("log-prob", &logprobs, &[-want], |_| bound);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ ceilings

/// Global memory and tensor cores are used as the head of kernels/lm_head.cu says, at a slice of the real vocabulary.
#[test]
fn sampling_reads_the_table_once() {
    if !counting() {
        return;
    }
    for workload in workloads_of("lm_head_sample") {
        let reports = counted(&workload);
        let main = &reports[0];
        let [tiles, rows] = [main.grid[1] as u64 * 4, 32];
        let name = format!("{}: {main}", workload.name);
        assert!(coalescing(&reports) <= 1.05, "{name}");
        assert!(traffic(&workload, &reports) <= 1.05, "{name}");
        // The embedding once, and the rows again for every tile, out of L2; and by every thread its four draws, out of L1.
        let width = workload.flops / (2 * rows * tiles * 128);
        let asked = tiles * ((128 + rows) * width * 2 + u64::from(main.block[0]) * 4 * 40);
        assert!(main.global.bytes as f64 <= 1.01 * asked as f64, "{name}");
        assert_lean(main, workload.flops, &name);
    }
}

#[test]
fn truncation_reads_whole_sectors() {
    if !counting() {
        return;
    }
    for workload in workloads_of("lm_head_truncated") {
        let reports = counted(&workload);
        assert!(coalescing(&reports) <= 1.05, "{}", workload.name);
        // The walk alone: histograms do not shrink with the vocabulary, of which this is a slice.
        assert!(traffic(&workload, &reports[..1]) <= 1.05, "{}", workload.name);
        assert!(reports.iter().all(|r| r.local.requests == 0), "{}", workload.name);
        assert_lean(&reports[0], workload.flops, &workload.name);
    }
}

/// At the whole vocabulary, what ranks and draws takes less time than reading the embedding of Gemma 3 270M once does, let
/// alone a larger one: modelled for an H100, the longest block of each launch times the blocks that a multiprocessor has.
#[test]
fn truncation_costs_less_than_the_table() {
    if !counting() {
        return;
    }
    let h100 = CHIPS.iter().find(|chip| chip.name == "H100").expect("its figures");
    let (rows, width) = (16, 8);
    let x: Vec<f32> = randoms(1, rows * width).iter().map(|x| 2.5 * x).collect();
    let vm = Vm::new(Options { checks: Checks::NONE, ..Options::default() });
    let vm = Arc::new(vm.with_multiprocessors(h100.multiprocessors));
    let cuda = Cuda::new(Box::new(Arc::clone(&vm))).expect("the kernels load");
    let (x, embedding) =
        (activation_of(&cuda, rows, width, &x), weight(&cuda, 2, GEMMA_270M.shape.vocab, width));
    vm.keep_reports();
    cuda.lm_head_sample(&x, &embedding, &PLAIN, &TRUNCATIONS[0], &choices(rows));
    cuda.check().expect("the device is content");
    let (mut told, mut seconds) = (String::new(), 0.0);
    for report in &vm.take_reports()[1..] {
        let blocks: u32 = report.grid.iter().product();
        let waves = f64::from(blocks.div_ceil(h100.multiprocessors));
        let of_block = |all: u64| all as f64 / f64::from(blocks);
        let clocks =
            (of_block(report.instructions().warps) / 4.0).max(of_block(report.shared.wavefronts)) * waves;
        let bytes = 32.0 * (report.unique_sectors.0 + report.unique_sectors.1) as f64;
        let own = (clocks / h100.clock).max(bytes / h100.bandwidth);
        seconds += own;
        told += &format!(
            "\n  {}: {blocks} blocks, {} instructions of warps, {} wavefronts, {:.1} MB, {:.2} us",
            report.kernel,
            report.instructions().warps,
            report.shared.wavefronts,
            bytes / 1e6,
            1e6 * own
        );
    }
    let read = 2.0 * (GEMMA_270M.shape.vocab * GEMMA_270M.shape.hidden) as f64 / h100.bandwidth;
    assert!(seconds < 0.5 * read, "{:.1} us, the embedding {:.1} us:{told}", 1e6 * seconds, 1e6 * read);
}

fn assert_lean(main: &Report, flops: u64, name: &str) {
    assert!(main.mma_flops as f64 <= 1.10 * flops as f64, "{name}");
    assert!(main.shared.wavefronts as f64 <= 1.01 * main.shared.ideal_wavefronts as f64, "{name}");
    assert_eq!(main.local.requests, 0, "{name}");
}

#[test]
fn logits_are_computed_by_tensor_cores_alone() {
    if !counting() {
        return;
    }
    for workload in workloads_of("lm_head_logprob") {
        let reports = counted(&workload);
        let main = &reports[0];
        let name = format!("{}: {main}", workload.name);
        assert!(coalescing(&reports) <= 1.05, "{name}");
        // The backward workload counts three products, one of which is the first kernel's.
        let products = if main.kernel == "lm_head_logprob_backward" { 3 } else { 1 };
        assert_lean(main, workload.flops / products, &name);
        let mma = main.classes.iter().find(|(c, _)| format!("{c:?}") == "Mma").map_or(0, |(_, n)| n.warps);
        // The main loop's, and those of a lane's logits.
        let logits = u64::from(main.grid[0] * 128 * main.grid[1] * 512) / 32;
        let other = main.instructions().warps - mma;
        assert!(other as f64 <= 1.15 * mma as f64 + 20.0 * logits as f64, "{name}");
        let total: u64 = reports.iter().map(|r| r.mma_flops).sum();
        assert!(total as f64 <= 1.10 * workload.flops as f64, "{name}: {total} FLOPs");
    }
}
