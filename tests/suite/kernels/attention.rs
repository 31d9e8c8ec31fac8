use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::cuda::Cuda;
use bon_engine::backend::ops::*;
use bon_engine::backend::{AttentionSpec, Backend, Batch};
use bon_engine::cost::workloads::{GEMMA_2B, Workload};
use bon_engine::device::vm::{Options, Report, Vm};
use bon_engine::segments::{QueryRun, Segment, Segments};

use std::sync::Arc;

use super::{
    Case, activation, activation_of, check, coalescing, counted, counting, devices, orders, outputs, rounded,
    traffic, workloads_of,
};
use crate::ops::{bits, group, randoms, tree};
use crate::tolerance::{EPS, Rule};

struct Attention {
    segments: Segments,
    runs: Vec<QueryRun>,
    /// Of q.
    rows: usize,
    spec: AttentionSpec,
}

impl Attention {
    /// Every token is a query; rows between segments belong to nobody.
    fn training(segments: &Segments, spec: AttentionSpec) -> Self {
        Self { segments: segments.clone(), runs: segments.all_queries(), rows: segments.rows(), spec }
    }

    /// Row i of q is this token (local index) of this segment.
    fn decode(segments: &Segments, tokens: &[(usize, usize)], spec: AttentionSpec) -> Self {
        let run = |(row, &(segment, first))| QueryRun { segment, first, len: 1, row };
        let runs: Vec<QueryRun> = tokens.iter().enumerate().map(run).collect();
        Self { segments: segments.clone(), rows: runs.len(), runs, spec }
    }

    /// Runs it on these numbers.
    fn on<B: Backend>(&self, b: &B, q: &B::Tensor, k: &B::Tensor, v: &B::Tensor) -> Vec<B::Tensor> {
        let ids = vec![0; self.rows];
        let batch = Batch::new(&ids, &self.segments, &self.runs);
        let tables = b.tables(&batch, &[self.spec]);
        let (o, lse) = b.attention_forward(q, k, v, &tables, &self.spec);
        vec![o, lse]
    }
}

impl Case for Attention {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let q = activation(b, 1, self.rows, heads * head_dim);
        let kv = |seed| activation(b, seed, self.segments.rows(), kv_heads * head_dim);
        self.on(b, &q, &kv(2), &kv(3))
    }
}

fn spec(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    softcap: Option<f32>,
    window: Option<usize>,
) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, scale: 0.3, softcap, window }
}

fn segment(start: usize, len: usize, position: usize, prefix: Option<usize>) -> Segment {
    Segment { start, len, position, prefix }
}

fn forward(case: &Attention) {
    check(&["o", "lse"], Rule::Forward, case);
}

#[test]
fn right_for_all_heads_widths_caps_and_windows() {
    let capped = [
        (None, None),
        (Some(1.5), Some(1)),
        (None, Some(3)),
        (Some(50.0), Some(8)),
        (None, Some(16)),
        (Some(5.0), None),
    ];
    for (i, (heads, kv_heads)) in [(1, 1), (3, 1), (8, 1), (4, 2), (24, 1), (3, 3)].into_iter().enumerate() {
        for (j, (softcap, window)) in capped.into_iter().enumerate() {
            let head_dim = [64, 128, 256, 512][(i + j) % 4];
            forward(&Attention::training(&tree(), spec(heads, kv_heads, head_dim, softcap, window)));
        }
    }
}

#[test]
fn right_at_the_edges_of_tiles() {
    // One head: as many rows as queries, 64 and 16 being tiles of rows, 64 of keys.
    for len in [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129] {
        forward(&Attention::training(&Segments::separate(&[len]), spec(1, 1, 64, None, None)));
    }
    for window in [1, 63, 64, 65, 100] {
        forward(&Attention::training(&Segments::separate(&[150]), spec(1, 1, 64, None, Some(window))));
    }
    for len in [1, 31, 33, 63, 65, 127, 129, 193] {
        forward(&Attention::training(&Segments::separate(&[len]), spec(1, 1, 512, None, None)));
    }
    for window in [33, 65, 100] {
        forward(&Attention::training(&Segments::separate(&[150]), spec(1, 1, 512, None, Some(window))));
    }
    // Heads of a group that a tile cuts apart.
    forward(&Attention::training(&Segments::separate(&[30]), spec(64, 1, 512, None, None)));
    forward(&Attention::training(&Segments::separate(&[45]), spec(3, 1, 64, None, None)));
    forward(&Attention::training(&Segments::separate(&[19]), spec(24, 1, 64, None, Some(8))));
}

#[test]
fn right_for_prompts_with_responses() {
    for (prompt, responses) in [(1, vec![3]), (1, vec![1, 20, 5]), (70, vec![30, 1, 65]), (64, vec![2; 32])] {
        for window in [None, Some(40)] {
            forward(&Attention::training(&group(prompt, &responses), spec(2, 1, 64, None, window)));
        }
    }
    forward(&Attention::training(&group(100, &[30, 40]), spec(8, 1, 256, Some(50.0), None)));
    forward(&Attention::training(&group(100, &[30, 40]), spec(8, 1, 512, None, None)));
}

#[test]
fn right_in_decode() {
    for (prompt, streams) in [(1, 1), (1, 3), (65, 1), (130, 3), (200, 32)] {
        for (heads, window) in [(1, None), (3, Some(8)), (8, None), (24, Some(100))] {
            // Each stream is at a place of its own; the tails have room to grow.
            let segments = group(prompt, &vec![90; streams]);
            let tokens: Vec<(usize, usize)> = (0..streams).map(|i| (i + 1, i * 37 % 90)).collect();
            forward(&Attention::decode(&segments, &tokens, spec(heads, 1, 64, None, window)));
        }
    }
    forward(&Attention::decode(&group(70, &[9; 5]), &[(1, 8), (2, 0), (4, 3)], spec(8, 2, 256, None, None)));
    forward(&Attention::decode(&group(70, &[9; 5]), &[(5, 8), (1, 0), (3, 3)], spec(6, 2, 128, None, None)));
    forward(&Attention::decode(&group(70, &[9; 5]), &[(5, 8), (1, 0), (3, 3)], spec(8, 2, 512, None, None)));
}

#[test]
fn right_across_splits() {
    let long = group(530, &[530, 530, 530]);
    for window in [None, Some(100), Some(520)] {
        let tokens = [(1, 529), (2, 500), (3, 0), (1, 493), (2, 494)];
        forward(&Attention::decode(&long, &tokens, spec(4, 2, 64, None, window)));
    }
    forward(&Attention::decode(&long, &[(1, 529), (2, 3)], spec(3, 3, 256, None, None)));
    forward(&Attention::decode(&long, &[(3, 500), (2, 3), (1, 499)], spec(24, 1, 128, Some(5.0), None)));
    forward(&Attention::decode(&long, &[(3, 500), (2, 3), (1, 499)], spec(8, 1, 512, None, None)));
    forward(&Attention::training(&group(500, &[40, 30]), spec(1, 1, 64, None, None)));
    // Prompts that end at the edges of tiles and splits of 128, and streams that have seen them.
    for prompt in [63, 64, 127, 128, 129, 192, 255, 256] {
        let segments = group(prompt, &[70, 130, 1]);
        for (heads, window) in [(1, None), (20, Some(100))] {
            let tokens = [(1, 0), (2, 129), (1, 69), (3, 0), (2, 64)];
            forward(&Attention::decode(&segments, &tokens, spec(heads, 1, 64, None, window)));
        }
    }
    // Several queries of a stream at once, and a run of one split between runs of two.
    let segments = group(100, &[60, 60, 60]);
    let runs = [(1, 20, 5), (2, 3, 4), (3, 24, 6)];
    let mut row = 0;
    let runs: Vec<QueryRun> = runs
        .into_iter()
        .map(|(segment, first, len)| {
            row += len;
            QueryRun { segment, first, len, row: row - len }
        })
        .collect();
    for heads in [1, 4, 10] {
        let (segments, runs) = (segments.clone(), runs.clone());
        forward(&Attention { segments, runs, rows: row, spec: spec(heads, 1, 128, None, Some(90)) });
    }
}

#[test]
fn rows_of_no_run_are_zero() {
    let segments = tree();
    let runs = vec![QueryRun { segment: 2, first: 1, len: 2, row: 4 }];
    let case = Attention { segments, runs, rows: 50, spec: spec(2, 1, 64, None, None) };
    for cuda in devices() {
        let out = outputs(&cuda, &case);
        for row in (0..50).filter(|r| !(4..6).contains(r)) {
            assert!(out[0].as_f32()[row * 128..(row + 1) * 128].iter().all(|&x| x == 0.0));
            assert!(out[1].as_f32()[row * 2..(row + 1) * 2].iter().all(|&x| x == f32::NEG_INFINITY));
        }
        assert!(out[1].as_f32()[4 * 2..6 * 2].iter().all(|x| x.is_finite()));
    }
}

/// One sequence of `len` tokens, and layouts of it in rows.
struct Sequence {
    spec: AttentionSpec,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Sequence {
    fn new(len: usize, spec: AttentionSpec) -> Self {
        let numbers = |seed, heads| randoms(seed, len * heads * spec.head_dim);
        Self { spec, q: numbers(1, spec.heads), k: numbers(2, spec.kv_heads), v: numbers(3, spec.kv_heads) }
    }

    /// The bits of (o, lse) of the sequence's tokens `tokens`, which are the queries `runs` in this order. The
    /// sequence is the chain that ends with segment `leaf`; other rows hold other numbers.
    fn bits(
        &self,
        cuda: &Cuda,
        segments: &Segments,
        leaf: usize,
        runs: &[QueryRun],
        rows: usize,
        tokens: &[(usize, usize)],
    ) -> Vec<Vec<u32>> {
        let AttentionSpec { heads, kv_heads, head_dim, .. } = self.spec;
        let kv = |x: &[f32], seed| {
            let width = kv_heads * head_dim;
            let mut out = randoms(seed, segments.rows() * width);
            for s in segments.chain(leaf).into_iter().map(|s| segments.list()[s]) {
                // A leaf may be longer than the sequence.
                let len = s.len.min((x.len() / width).saturating_sub(s.position));
                out[s.start * width..][..len * width]
                    .copy_from_slice(&x[s.position * width..][..len * width]);
            }
            activation_of(cuda, segments.rows(), width, &out)
        };
        let width = heads * head_dim;
        let mut q = randoms(11, rows * width);
        for &(token, row) in tokens {
            q[row * width..][..width].copy_from_slice(&self.q[token * width..][..width]);
        }
        let case = Attention { segments: segments.clone(), runs: runs.to_vec(), rows, spec: self.spec };
        let q = activation_of(cuda, rows, width, &q);
        let out = case.on(cuda, &q, &kv(&self.k, 12), &kv(&self.v, 13));
        cuda.check().expect("the device is content");
        let (o, lse) = (cuda.to_f32(&out[0]), cuda.to_f32(&out[1]));
        let of = |&(_, row): &(usize, usize)| {
            o[row * width..][..width]
                .iter()
                .chain(&lse[row * heads..][..heads])
                .map(|x| x.to_bits())
                .collect()
        };
        tokens.iter().map(of).collect()
    }

    /// Every token at once, nothing shared.
    fn whole(&self, cuda: &Cuda) -> Vec<Vec<u32>> {
        let len = self.q.len() / self.spec.heads / self.spec.head_dim;
        let segments = Segments::separate(&[len]);
        let tokens: Vec<(usize, usize)> = (0..len).map(|t| (t, t)).collect();
        self.bits(cuda, &segments, 0, &segments.all_queries(), len, &tokens)
    }
}

#[test]
fn a_token_has_the_same_bits_alone_and_among_others() {
    for cuda in orders() {
        let specs = [
            (150, spec(1, 1, 64, None, None)),
            (150, spec(8, 1, 64, Some(3.0), Some(100))),
            (90, spec(3, 1, 128, None, Some(1))),
            (90, spec(4, 2, 256, None, Some(33))),
            (70, spec(24, 1, 64, None, None)),
            (150, spec(2, 1, 512, None, None)),
            (70, spec(4, 2, 512, Some(5.0), Some(33))),
        ];
        for (len, spec) in specs {
            let sequence = Sequence::new(len, spec);
            let whole = sequence.whole(&cuda);
            let same = |what: &str, tokens: &[(usize, usize)], bits: Vec<Vec<u32>>| {
                for (&(t, _), bits) in tokens.iter().zip(bits) {
                    assert!(bits == whole[t], "token {t} has other bits: {what}, {spec:?}");
                }
            };

            // One query at a time.
            let segments = Segments::separate(&[len]);
            for t in [0, 1, 8, 15, 16, 63, 64, 65, 69, 128, 149].into_iter().filter(|&t| t < len) {
                let runs = [QueryRun { segment: 0, first: t, len: 1, row: 0 }];
                same("alone", &[(t, 0)], sequence.bits(&cuda, &segments, 0, &runs, 1, &[(t, 0)]));
            }

            for (root, prompt) in [(1, 2), (4, 60), (33, 31), (5, 40)] {
                // Root, prompt and response, laid out backwards with gaps; other responses and another prompt beside.
                let response = len - root - prompt;
                let starts = [response + prompt + 8, response + 3, 0];
                let mut list = vec![
                    segment(starts[0], root, 0, None),
                    segment(starts[1], prompt, root, Some(0)),
                    segment(len + 20, 11, root + prompt, Some(1)),
                    segment(starts[2], response, root + prompt, Some(1)),
                    segment(len + 31, 3, root, Some(0)),
                    segment(len + 35, 90, root + 3, Some(4)),
                ];
                let segments = Segments::new(list.clone()).expect("a valid table");
                let row_of = |t: usize| match t {
                    t if t < root => starts[0] + t,
                    t if t < root + prompt => starts[1] + t - root,
                    t => starts[2] + t - root - prompt,
                };
                let tokens: Vec<(usize, usize)> = (0..len).map(|t| (t, row_of(t))).collect();
                let bits =
                    sequence.bits(&cuda, &segments, 3, &segments.all_queries(), segments.rows(), &tokens);
                same(&format!("{root} + {prompt}"), &tokens, bits);

                // A step of decoding of 33 streams, at different places, one of them the sequence's; its neighbours
                // share the root, or the prompt, or nothing.
                list.push(segment(len + 125, 40, 0, None));
                let first = list.len();
                for i in 0..30 {
                    list.push(segment(len + 165 + 50 * i, 50, root + prompt, Some(1)));
                }
                let segments = Segments::new(list).expect("a valid table");
                for t in [root + prompt, (root + prompt + 13).min(len - 1), len - 1] {
                    let mine = (3, t - root - prompt);
                    let mut tokens: Vec<(usize, usize)> = (0..15).map(|i| (first + i, i * 7 % 50)).collect();
                    tokens.push(mine);
                    tokens.extend([(2, 5), (5, 80), (6, 39)]);
                    tokens.extend((15..30).map(|i| (first + i, i * 11 % 50)));
                    let case = Attention::decode(&segments, &tokens, spec);
                    let bits = sequence.bits(&cuda, &segments, 3, &case.runs, case.rows, &[(t, 15)]);
                    same("decode", &[(t, 15)], bits);
                }
            }
        }
    }
}

#[test]
fn a_token_has_the_same_bits_across_splits() {
    for cuda in orders() {
        const LEN: usize = 1100;
        let of_64 = [(2, None), (1, Some(600)), (2, Some(100))].map(|(heads, window)| (heads, 64, window));
        for (heads, head_dim, window) in of_64.into_iter().chain([(1, 512, Some(520))]) {
            let sequence = Sequence::new(LEN, spec(heads, 1, head_dim, None, window));
            let segments = Segments::separate(&[LEN]);
            // Runs of many rows walk through the splits one by one.
            let many = |first: usize| {
                let runs = [QueryRun { segment: 0, first, len: 70, row: 0 }];
                let tokens: Vec<(usize, usize)> = (0..70).map(|i| (first + i, i)).collect();
                sequence.bits(&cuda, &segments, 0, &runs, 70, &tokens)
            };
            for first in [480, 990, 1030] {
                let want = many(first);
                let few: Vec<usize> = [511, 512, 513, 999, 1023, 1024, 1025, 1059, 1099]
                    .into_iter()
                    .filter(|t| (first..first + 70).contains(t))
                    .collect();
                for &t in &few {
                    let runs = [QueryRun { segment: 0, first: t, len: 1, row: 0 }];
                    let got = sequence.bits(&cuda, &segments, 0, &runs, 1, &[(t, 0)]);
                    assert!(got[0] == want[t - first], "token {t} alone, window {window:?}");
                }
                // Streams whose prompt ends within a split, at a split's end, in the last split.
                for prompt in [400, 512, 700, 1000] {
                    let mut list = vec![segment(0, prompt, 0, None)];
                    for i in 0..4 {
                        list.push(segment(prompt + i * (LEN - prompt), LEN - prompt, prompt, Some(0)));
                    }
                    let segments = Segments::new(list).expect("a valid table");
                    for &t in few.iter().filter(|&&t| t >= prompt) {
                        let place = |i: usize| (t - prompt + 30 * i) % (LEN - prompt);
                        let tokens = [(1, place(1)), (3, t - prompt), (2, place(2)), (4, place(3))];
                        let case = Attention::decode(&segments, &tokens, sequence.spec);
                        let got = sequence.bits(&cuda, &segments, 3, &case.runs, 4, &[(t, 1)]);
                        assert!(got[0] == want[t - first], "token {t} after {prompt}, window {window:?}");
                    }
                }
            }
        }
    }
}

/// Which blocks do a row's splits depends on how many multiprocessors there are to fill; its bits do not.
#[test]
fn a_token_has_the_same_bits_on_gpus_of_all_sizes() {
    if !counting() {
        return;
    }
    for (heads, head_dim, window) in [(8, 64, None), (20, 128, Some(200)), (4, 256, None), (8, 512, None)] {
        let segments = group(300, &[40; 9]);
        let tokens: Vec<(usize, usize)> = (0..9).map(|i| (i + 1, 39 - i % 2 * 20)).collect();
        let case = Attention::decode(&segments, &tokens, spec(heads, 1, head_dim, None, window));
        let on = |multiprocessors| {
            let vm = Arc::new(Vm::new(Options::default()).with_multiprocessors(multiprocessors));
            let cuda = Cuda::new(Box::new(Arc::clone(&vm))).expect("the kernels load");
            vm.keep_reports();
            let out = outputs(&cuda, &case);
            let kernels: Vec<String> = vm.take_reports().into_iter().map(|r| r.kernel).collect();
            (out, kernels)
        };
        let (few, many) = (on(1), on(1000));
        // Otherwise the same blocks did it.
        assert_eq!(few.1, [64, 0].map(|rows| kernel(head_dim, rows)), "{heads} heads");
        assert_eq!(many.1, [16, 0].map(|rows| kernel(head_dim, rows)), "{heads} heads");
        for (few, many) in few.0.iter().zip(&many.0) {
            assert_eq!(bits(few), bits(many), "{heads} heads of {head_dim}, window {window:?}");
        }
    }
}

/// The kernel of this many rows, or the one that merges splits.
fn kernel(head_dim: usize, rows: usize) -> String {
    let what = if rows == 0 { "merge".to_owned() } else { format!("rows_{rows}") };
    format!("attention_forward_{head_dim}_{what}")
}

#[test]
fn a_token_does_not_see_what_it_must_not() {
    for cuda in devices() {
        let spec = spec(2, 1, 64, None, Some(6));
        let segments = Segments::separate(&[140]);
        let seen = 65..=70;
        let runs = [QueryRun { segment: 0, first: 70, len: 1, row: 0 }];
        let mut sequence = Sequence::new(140, spec);
        let want = sequence.bits(&cuda, &segments, 0, &runs, 1, &[(70, 0)]);
        for hidden in (0..140).filter(|t| !seen.contains(t)) {
            sequence.k[hidden * 64..(hidden + 1) * 64].fill(f32::NAN);
            sequence.v[hidden * 64..(hidden + 1) * 64].fill(f32::INFINITY);
        }
        assert_eq!(sequence.bits(&cuda, &segments, 0, &runs, 1, &[(70, 0)]), want);
    }
}

/// With one visible key lse is its capped score; with more, the scores' errors are averaged. So lse shows what bf16 hides:
/// the error of tanh and of the sums.
#[test]
fn lse_is_as_good_as_f32_allows() {
    for (softcap, window) in [(None, None), (Some(1.5), Some(1)), (Some(5.0), None), (Some(50.0), Some(8))] {
        let spec = spec(3, 1, 64, softcap, window);
        let case = Attention::training(&tree(), spec);
        let exact = outputs(&Cpu::F32, &case);
        // The largest sum of |scale q k|, and so of any part of it. One rounding per product for the kernel, one for
        // 16 and a tree for the oracle, 16 for what follows in both.
        let (dim, rows) = (spec.head_dim, case.rows);
        let (q, k) = (rounded(&randoms(1, rows * 3 * dim)), rounded(&randoms(2, rows * dim)));
        let absolute =
            |q: &[f32], k: &[f32]| q.iter().zip(k).map(|(q, k)| f64::from(q * k).abs()).sum::<f64>();
        let sums = q.chunks(dim).flat_map(|q| k.chunks(dim).map(move |k| absolute(q, k)));
        let size = f64::from(spec.scale) * sums.fold(0.0, f64::max);
        let bound = (dim as f64 + dim as f64 / 16.0 + 5.0 + 16.0) * EPS / 2.0 * size;
        for cuda in orders() {
            let got = outputs(&cuda, &case);
            for (i, (&got, &want)) in got[1].as_f32().iter().zip(exact[1].as_f32()).enumerate() {
                let off = f64::from(got) - f64::from(want);
                assert!(got == want || off.abs() <= bound, "lse[{i}]: {got}, {want}, {softcap:?} {window:?}");
            }
        }
    }
}

#[test]
fn little_is_moved_and_multiplied_in_vain() {
    if !counting() {
        return;
    }
    let workloads = workloads_of("attention_forward");
    assert_eq!(workloads.len(), 13);
    for workload in workloads {
        let reports = counted(&workload);
        let sum = |f: fn(&Report) -> u64| reports.iter().map(f).sum::<u64>() as f64;
        let name = &workload.name;
        let multiplied = sum(|r| r.mma_flops) / workload.flops as f64;
        let requested = 32.0 * sum(|r| r.global.sectors);
        assert!(coalescing(&reports) <= 1.05, "{name}");
        assert_eq!(
            sum(|r| r.shared.wavefronts),
            sum(|r| r.shared.ideal_wavefronts),
            "{name}: bank conflicts"
        );
        assert_eq!(sum(|r| r.local.requests), 0.0, "{name}: local memory");
        if let Some(decode) = Decode::of(&workload) {
            // K and V are asked for once for every tile of rows, and Q for every split; a split's state of each row is
            // written and read.
            let width = decode.width;
            let kv = |keys: f64| keys * width * 4.0;
            let splits = decode.splits + 1.0;
            let states = 2.0 * decode.rows * splits * (width + 2.0) * 4.0;
            let rows = decode.rows * (width * 2.0 * (splits + 1.0) + 4.0);
            // Each warp asks for its item, nine words, and for each of up to four stages (eight of heads of 512) for the
            // segment that its keys are in, four words.
            let warps = f64::from(reports[0].grid[0]) * 4.0;
            let stages = if width == 512.0 { 8.0 } else { 4.0 };
            let tables = warps * (9.0 + 4.0 * stages) * 32.0;
            let asked = kv(decode.prompt) * decode.tiles + kv(32.0 * 128.0) + rows + tables;
            assert!(requested <= 1.05 * (asked + states), "{name}: {requested}");
            assert!(traffic(&workload, &reports) <= 1.05 * (1.0 + states / workload.bytes as f64), "{name}");
            decode.is_done_by_short_blocks(name, &reports);
        } else {
            // Of the tiles that a mask cuts, all products are made: at the diagonal, and at a window's other edge.
            let most = if name.contains("window") { 1.15 } else { 1.10 };
            assert!(multiplied <= most, "{name}: {multiplied}");
            // KiB of shared memory for a tile, by the head of attention.cu: what copies write and ldmatrix reads. Tiles that a
            // mask cuts are read whole, and warps exchange p.
            let kib = if width_of(&workload) == 512.0 { 128.0 + 416.0 } else { 64.0 + 288.0 };
            let products = 4.0 * 64.0 * 64.0 * width_of(&workload);
            let wavefronts = sum(|r| r.mma_flops) / products * kib * 1024.0 / 128.0;
            assert!(sum(|r| r.shared.wavefronts) <= 1.15 * wavefronts, "{name}: of {wavefronts}");
            // No state passes through memory.
            assert!(traffic(&workload, &reports) <= 1.05, "{name}");
            assert_eq!(reports.len(), 1, "{name}");
        }
    }
}

/// The width of a workload's heads.
fn width_of(workload: &Workload) -> f64 {
    let width = if workload.name.contains("Dh 512") { 512 } else { GEMMA_2B.shape.head_dim };
    width as f64
}

/// A decode step of 32 streams with tails of 128.
struct Decode {
    /// Of a head.
    width: f64,
    /// Rows: H heads of each.
    rows: f64,
    prompt: f64,
    /// Of the prompt.
    splits: f64,
    /// Tiles of rows that share the prompt.
    tiles: f64,
    /// Rows of such a tile.
    tile: f64,
}

impl Decode {
    fn of(workload: &Workload) -> Option<Self> {
        let (_, rest) = workload.name.split_once("decode, prompt of ")?;
        let prompt: f64 = rest.split(' ').next()?.parse().expect("a number");
        // A step's FLOPs are 4 Dh for each stream, head and key.
        let width = width_of(workload);
        let rows = workload.flops as f64 / (4.0 * width * (prompt + 128.0));
        // Where tiles of 16 do not fill the GPU more than once, they are done in half the time.
        let tile = if prompt == 512.0 { 16.0 } else { 64.0 };
        Some(Self { width, rows, prompt, splits: prompt / 128.0, tiles: rows / tile, tile })
    }

    /// Two launches, and the longest block of the first has two tiles of keys: so a prompt of any length takes as long,
    /// while there are multiprocessors left.
    fn is_done_by_short_blocks(&self, name: &str, reports: &[Report]) {
        assert_eq!(reports.len(), 2, "{name}");
        assert_eq!(reports[1].shared.wavefronts, 0, "{name}: the second launch only adds up");
        let (blocks, few) = (self.splits * self.tiles, 32.0);
        // A tile of keys, K and V: copied in; read by each warp where it has rows of its own, else once by all. With it Q
        // and, where warps share rows, p, read by each of four. 128 bytes a wavefront.
        let (of_keys, of_queries) = (64.0 * 2.0 * self.width / 128.0, 16.0 * 2.0 * self.width / 128.0);
        // What warps that share rows tell each other: p, maxima and sums, written by four, the latter read from four by four.
        let exchange = 16.0 + 2.0 * (8.0 + 32.0);
        let of_few =
            2.0 * (2.0 * of_keys + 2.0 * of_keys + 4.0 * (of_queries + 16.0) + exchange) + of_queries;
        let of_many = 2.0 * (2.0 * of_keys + 2.0 * 4.0 * of_keys + 4.0 * of_queries) + 4.0 * of_queries;
        let longest = if self.tile == 16.0 { of_few } else { of_many };
        let wavefronts = reports[0].shared.wavefronts as f64;
        // And m and l of 64 rows.
        assert!(wavefronts <= 1.05 * (blocks * longest + few * of_few), "{name}: {wavefronts}");
        // Four blocks of 64 rows once did the prompt of 512, eight tiles each; and each stream's two followed.
        if self.prompt == 512.0 {
            assert!(blocks + few <= 132.0, "{name}: more than a wave");
            let before = 4.0 * (of_many - 4.0 * of_queries) + 4.0 * of_queries + of_few;
            assert!(4.0 * 1.05 * longest <= before, "{name}: {longest} of {before}");
        }
    }
}
