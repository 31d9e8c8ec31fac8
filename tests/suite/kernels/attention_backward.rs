use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::ops::*;
use bon_engine::backend::{AttentionSpec, Backend, Batch};
use bon_engine::cost::workloads::{GEMMA_270M, workloads};
use bon_engine::segments::Segments;

use super::{
    Case, activation, activation_of, check, coalescing, counted, counting, devices, outputs, single_of,
};
use crate::ops::{group, tree};
use crate::tolerance::{EPS, Rule};

/// The gradient for random q, k, v and do, with o and lse as the CPU computes them.
struct Gradient {
    segments: Segments,
    spec: AttentionSpec,
    /// The rows that are queries, where those are not all.
    wanted: Option<Vec<u32>>,
}

impl Case for Gradient {
    fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
        let Self { segments, spec, wanted } = self;
        // Two rows more than the segments need: such rows belong to nobody.
        let rows = segments.rows() + 2;
        let (wide, narrow) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let (ids, runs) = (vec![0; rows], segments.all_queries());
        let batch = Batch::new(&ids, segments, &runs);
        let (o, lse) = {
            let [q, k, v] =
                [(1, wide), (2, narrow), (3, narrow)].map(|(s, c)| activation(&Cpu::F32, s, rows, c));
            Cpu::F32.attention_forward(&q, &k, &v, &Cpu::F32.tables(&batch, &[*spec]), spec)
        };
        let [q, k, v] = [(1, wide), (2, narrow), (3, narrow)].map(|(s, c)| activation(b, s, rows, c));
        let d_o = activation(b, 4, rows, wide);
        let (o, lse) =
            (activation_of(b, rows, wide, o.as_f32()), single_of(b, rows, spec.heads, lse.as_f32()));
        let Some(wanted) = wanted else {
            let tables = b.tables(&batch, &[*spec]);
            let (dq, dk, dv) = b.attention_backward(&d_o, &q, &k, &v, &o, &lse, &tables, spec);
            return vec![dq, dk, dv];
        };
        let (ids, runs) = batch.narrowed(wanted);
        let tables = b.tables(&Batch::new(&ids, segments, &runs), &[*spec]);
        let some = |x: &B::Tensor| b.gather_rows(x, wanted);
        let lse: Vec<f32> = b
            .to_f32(&lse)
            .chunks_exact(spec.heads)
            .enumerate()
            .flat_map(|(row, lse)| if wanted.contains(&(row as u32)) { lse.to_vec() } else { Vec::new() })
            .collect();
        let lse = single_of(b, wanted.len(), spec.heads, &lse);
        let (dq, dk, dv) =
            b.attention_backward(&some(&d_o), &some(&q), &k, &v, &some(&o), &lse, &tables, spec);
        vec![dq, dk, dv]
    }
}

/// (query heads, key/value heads, head width)
type Heads = (usize, usize, usize);

#[track_caller]
fn gradient(segments: Segments, heads: Heads, scale: f32, softcap: Option<f32>, window: Option<usize>) {
    let (heads, kv_heads, head_dim) = heads;
    let spec = AttentionSpec { heads, kv_heads, head_dim, scale, softcap, window };
    check(&["dq", "dk", "dv"], Rule::Backward, &Gradient { segments, spec, wanted: None });
}

#[test]
fn gradients_are_right_for_all_heads_widths_caps_and_windows() {
    let variants = [
        (0.7, None, None),
        (0.1, Some(1.5), Some(2)),
        (0.0625, None, Some(3)),
        (0.7, Some(50.0), Some(8)),
        (0.2, Some(5.0), Some(100)),
    ];
    for (scale, softcap, window) in variants {
        for heads in [(1, 1, 64), (3, 1, 64), (8, 1, 64), (6, 2, 64), (2, 2, 128), (3, 1, 256)] {
            gradient(tree(), heads, scale, softcap, window);
        }
    }
}

#[test]
fn gradients_of_heads_of_512_are_right() {
    // Gemma 4's scale is 1.
    let variants =
        [(1.0, None, None), (0.1, Some(1.5), Some(2)), (0.7, Some(50.0), Some(8)), (0.2, None, Some(100))];
    for (scale, softcap, window) in variants {
        for heads in [(1, 1, 512), (4, 2, 512), (8, 1, 512)] {
            gradient(tree(), heads, scale, softcap, window);
        }
    }
    // One head: a tile is 32 keys x 16 queries, then 48 queries x 16 keys.
    gradient(Segments::separate(&[1, 15, 16, 17, 31, 32, 33, 47, 48, 49, 65]), (1, 1, 512), 0.2, None, None);
    // 48 pairs end amid a token's heads.
    gradient(Segments::separate(&[11, 24, 33]), (5, 1, 512), 0.2, None, None);
    for window in [15, 16, 17, 31, 32, 33, 48, 49, 63] {
        gradient(group(35, &[31, 3]), (1, 1, 512), 0.2, None, Some(window));
    }
    gradient(group(70, &[61]), (2, 1, 512), 0.0625, Some(50.0), Some(64));
    gradient(group(37, &[1, 40, 7]), (8, 1, 512), 0.3, None, None);
}

/// The last tokens of prompts and some of their responses', as in layers that read the keys and values of others; keys that no
/// query sees have no gradient.
#[test]
fn some_tokens_are_queries() {
    let segments = group(150, &[70, 3, 40]);
    for (heads, kv_heads, head_dim) in [(1, 1, 64), (6, 2, 64), (4, 1, 256), (8, 1, 512)] {
        for window in [None, Some(40)] {
            let spec = AttentionSpec { heads, kv_heads, head_dim, scale: 0.2, softcap: None, window };
            let responses: Vec<u32> = (149..segments.rows() as u32).collect();
            let holes = responses.iter().copied().filter(|row| row % 5 != 0).collect();
            for wanted in [responses, holes, vec![149, 200], vec![3]] {
                let case = Gradient { segments: segments.clone(), spec, wanted: Some(wanted) };
                check(&["dq", "dk", "dv"], Rule::Backward, &case);
            }
        }
    }
}

#[test]
fn gradients_are_right_at_the_edges_of_tiles() {
    // One head: a tile is 64 keys x 32 queries, then 64 queries x 32 keys.
    gradient(Segments::separate(&[1, 2, 31, 32, 33, 63, 64, 65, 96, 97]), (1, 1, 64), 0.2, None, None);
    // 24 and 40 pairs at the end of a tile; a token's heads on both sides of an edge.
    gradient(Segments::separate(&[8, 13, 22, 43]), (3, 1, 64), 0.2, None, None);
    gradient(Segments::separate(&[33, 70]), (2, 1, 128), 0.2, None, None);
    gradient(Segments::separate(&[33, 70]), (1, 1, 256), 0.2, None, None);
    // 18, 34, 50, 72: a warp's products of 16 keys where one query sees one key.
    for window in [18, 31, 32, 33, 34, 50, 63, 64, 65, 72, 95] {
        gradient(group(70, &[61, 3]), (1, 1, 64), 0.2, None, Some(window));
    }
    gradient(group(70, &[61]), (4, 1, 256), 0.0625, Some(50.0), Some(64));
}

#[test]
fn a_prompt_collects_the_gradients_of_its_responses() {
    for responses in [vec![5], vec![1, 40, 7], (1..33).map(|i| 1 + i % 4).collect()] {
        gradient(group(1, &responses), (4, 1, 64), 0.3, None, None);
        gradient(group(37, &responses), (1, 1, 64), 0.3, None, Some(20));
    }
}

/// 8 heads of 299 and of 329 tokens: two tiles of the prompt's keys that are seen by three parts of pairs each, or with
/// five heads by two, the second of which begins amid a token's heads.
#[test]
fn parts_of_a_long_list_add_up() {
    let segments = || group(70, &(0..32).map(|i| 5 + i % 7).collect::<Vec<_>>());
    gradient(segments(), (8, 1, 64), 0.2, None, None);
    gradient(segments(), (10, 2, 64), 0.2, None, Some(64));
    gradient(segments(), (5, 1, 128), 0.2, Some(3.0), None);
    gradient(group(66, &[100, 80]), (5, 1, 256), 0.1, None, None);
    // Tiles of 32 keys, of which the prompt's are seen by two or three parts.
    gradient(group(34, &[60, 50]), (8, 1, 512), 0.1, None, None);
}

/// Layers with different windows share a batch's tables.
#[test]
fn lists_are_kept_per_window() {
    struct Two;
    impl Case for Two {
        fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
            let segments = Segments::separate(&[40]);
            let (ids, runs) = ([0; 40], segments.all_queries());
            let batch = Batch::new(&ids, &segments, &runs);
            let spec = AttentionSpec {
                heads: 2,
                kv_heads: 2,
                head_dim: 64,
                scale: 0.2,
                softcap: None,
                window: None,
            };
            let tables = b.tables(&batch, &[spec, AttentionSpec { window: Some(9), ..spec }]);
            let run = |window| {
                let spec = AttentionSpec { window, ..spec };
                let [q, k, v, o, d_o] = [1, 2, 3, 4, 5].map(|seed| activation(b, seed, 40, 128));
                let lse = single_of(b, 40, 2, &[4.0; 80]);
                b.attention_backward(&d_o, &q, &k, &v, &o, &lse, &tables, &spec).0
            };
            vec![run(None), run(Some(9)), run(None), run(Some(9))]
        }
    }
    for cuda in devices() {
        let dq = outputs(&cuda, &Two);
        assert_eq!(dq[0].as_f32(), dq[2].as_f32());
        assert_eq!(dq[1].as_f32(), dq[3].as_f32());
        assert_ne!(dq[0].as_f32(), dq[1].as_f32());
    }
}

/// Layers with heads of different widths, whose tiles differ, share a batch's tables.
#[test]
fn lists_are_kept_per_width_of_tiles() {
    struct Last([usize; 2]);
    impl Case for Last {
        fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
            let segments = Segments::separate(&[70]);
            let (ids, runs) = ([0; 70], segments.all_queries());
            let batch = Batch::new(&ids, &segments, &runs);
            let spec = |head_dim| AttentionSpec {
                heads: 2,
                kv_heads: 2,
                head_dim,
                scale: 0.2,
                softcap: None,
                window: None,
            };
            let tables = b.tables(&batch, &self.0.map(spec));
            let run = |head_dim| {
                let [q, k, v, o, d_o] = [1, 2, 3, 4, 5].map(|seed| activation(b, seed, 70, 2 * head_dim));
                let lse = single_of(b, 70, 2, &[4.0; 140]);
                b.attention_backward(&d_o, &q, &k, &v, &o, &lse, &tables, &spec(head_dim))
            };
            let [_, (dq, dk, dv)] = self.0.map(run);
            vec![dq, dk, dv]
        }
    }
    for cuda in devices() {
        for width in [64, 512] {
            let [shared, alone] =
                [[576 - width, width], [width; 2]].map(|widths| outputs(&cuda, &Last(widths)));
            for (shared, alone) in shared.iter().zip(&alone) {
                assert_eq!(shared.as_f32(), alone.as_f32(), "Dh {width}");
            }
        }
    }
}

/// Where a token sees itself alone, P = 1 whatever the score is: dq and dk are zero but for what rounds, and dv is do.
#[test]
fn a_token_alone_has_no_gradient_by_its_score() {
    struct Values(Gradient);
    impl Case for Values {
        fn run<B: Backend>(&self, b: &B) -> Vec<B::Tensor> {
            self.0.run(b).pop().into_iter().collect()
        }
    }
    const SCALE: f32 = 0.1;
    let spec = AttentionSpec {
        heads: 3,
        kv_heads: 1,
        head_dim: 64,
        scale: SCALE,
        softcap: Some(1.5),
        window: Some(1),
    };
    let case = || Gradient { segments: tree(), spec, wanted: None };
    check(&["dv"], Rule::Backward, &Values(case()));
    for cuda in devices() {
        let got = outputs(&cuda, &case());
        // dP and D are sums of 64 products of numbers below 1, rounded 64 times each; 3 heads come together in dk.
        let bound = f64::from(SCALE) * 3.0 * 64.0 * 64.0 * EPS;
        for (what, x) in ["dq", "dk"].iter().zip(&got) {
            let largest = x.as_f32().iter().fold(0.0, |m: f64, x| m.max(f64::from(x.abs())));
            assert!(largest <= bound, "{what}: {largest:e}, allowed {bound:e}");
        }
    }
}

/// At the shape of Gemma 3 270M; that of Gemma 2B differs in the number of heads and takes twice as long.
#[test]
fn products_are_made_of_what_is_seen() {
    if !counting() {
        return;
    }
    let all = workloads(&GEMMA_270M).into_iter();
    for workload in all.filter(|w| w.name.starts_with("attention_backward")) {
        let reports = counted(&workload);
        assert!(coalescing(&reports) <= 1.05, "{}", workload.name);
        // Two of the five products are made twice.
        let useful = workload.flops as f64 * 7.0 / 5.0;
        let executed = reports.iter().map(|r| r.mma_flops).sum::<u64>() as f64;
        assert!(executed <= 1.10 * useful, "{}: {executed} FLOPs, useful {useful}", workload.name);
        for r in &reports {
            let what = format!("{}, {}", workload.name, r.kernel);
            assert_eq!(r.shared.wavefronts, r.shared.ideal_wavefronts, "{what}: bank conflicts");
            assert_eq!(r.local.requests, 0, "{what}: local memory");
            // The two that memory limits touch every sector once.
            if r.kernel.contains("_stats_") || r.kernel.contains("_sum_") {
                let (requested, unique) = (r.global.sectors, r.unique_sectors.0 + r.unique_sectors.1);
                assert!(requested as f64 <= 1.05 * unique as f64, "{what}: {requested} sectors of {unique}");
            }
        }
    }
}
