use bon_engine::backend::cpu::attention::{backward, forward};
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{AttentionSpec, Batch};
use bon_engine::segments::{QueryRun, Segment, Segments};

use super::{bits, group, random, same_everywhere, tree, wide};
use crate::tolerance::{DERIVATIVE_ERROR, EPS, assert_within, derivative};

fn spec(
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    softcap: Option<f32>,
    window: Option<usize>,
) -> AttentionSpec {
    AttentionSpec { heads, kv_heads, head_dim, scale: 0.7, softcap, window }
}

/// Rows that token `t` of segment `s` sees, by definition: walk up the prefixes, keep what is near enough.
fn seen(segments: &Segments, s: usize, t: usize, window: Option<usize>) -> Vec<usize> {
    let list = segments.list();
    let query = list[s].position + t;
    let mut rows = Vec::new();
    let mut at = Some(s);
    while let Some(i) = at {
        for u in 0..list[i].len {
            let position = list[i].position + u;
            if position <= query && window.is_none_or(|w| query - position < w) {
                rows.push(list[i].start + u);
            }
        }
        at = list[i].prefix;
    }
    rows
}

/// What attention does, in f64, for every token; with the sizes that rounding errors scale with.
struct Reference {
    o: Vec<f64>,
    lse: Vec<f64>,
    /// Probability of (query row, head, key row), where seen.
    p: Vec<(usize, usize, usize, f64)>,
    /// Largest sum of |q_i k_i| * scale.
    largest: f64,
}

fn reference(q: &[f64], k: &[f64], v: &[f64], segments: &Segments, spec: &AttentionSpec) -> Reference {
    let (heads, dim) = (spec.heads, spec.head_dim);
    let rows = q.len() / (heads * dim);
    let scale = f64::from(spec.scale);
    let mut out = Reference {
        o: vec![0.0; q.len()],
        lse: vec![f64::NEG_INFINITY; rows * heads],
        p: Vec::new(),
        largest: 0.0,
    };
    for (s, segment) in segments.list().iter().enumerate() {
        for t in 0..segment.len {
            let keys = seen(segments, s, t, spec.window);
            let row = segment.start + t;
            for h in 0..heads {
                let q = &q[(row * heads + h) * dim..][..dim];
                let kv = |key: usize| (key * spec.kv_heads + h / (heads / spec.kv_heads)) * dim;
                let score = |key: usize| -> f64 {
                    let s = scale * q.iter().zip(&k[kv(key)..]).map(|(q, k)| q * k).sum::<f64>();
                    spec.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh())
                };
                let scores: Vec<f64> = keys.iter().map(|&key| score(key)).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let lse = max + total.ln();
                out.lse[row * heads + h] = lse;
                for (&key, s) in keys.iter().zip(scores) {
                    let p = (s - lse).exp();
                    out.p.push((row, h, key, p));
                    for d in 0..dim {
                        out.o[(row * heads + h) * dim + d] += p * v[kv(key) + d];
                    }
                    let size = scale * q.iter().zip(&k[kv(key)..]).map(|(q, k)| (q * k).abs()).sum::<f64>();
                    out.largest = out.largest.max(size);
                }
            }
        }
    }
    out
}

/// Relative error of a probability, in units of eps: the two scores it compares are wrong by their sizes times the
/// roundings of a dot product (Dh/16 + 5) and of scale, cap and shift (6 more), lse by its own; exp and the sum of
/// up to `keys` terms add theirs.
fn probability_error(largest: f64, dim: usize, keys: usize) -> f64 {
    2.0 * largest * (dim as f64 / 16.0 + 11.0) / 2.0 + keys as f64 / 32.0 + 8.0
}

fn inputs(rows: usize, spec: &AttentionSpec) -> (Tensor, Tensor, Tensor, Tensor) {
    let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    (random(1, rows, q), random(2, rows, kv), random(3, rows, kv), random(4, rows, q))
}

fn check_forward(segments: &Segments, spec: &AttentionSpec) {
    let rows = segments.rows() + 2;
    let (q, k, v, _) = inputs(rows, spec);
    let runs = segments.all_queries();
    let out = same_everywhere(|| {
        let (o, lse) = forward(&q, &k, &v, segments, &runs, spec);
        vec![o, lse]
    });
    let want = reference(&wide(&q), &wide(&k), &wide(&v), segments, spec);
    let c = probability_error(want.largest, spec.head_dim, segments.longest());
    // |v| < 1, so the sum of p |v| is below 1; one rounding per key as it is added.
    let o_bound = (c + segments.longest() as f64 / 2.0 + 2.0) * EPS;
    assert_within("o", out[0].as_f32(), &want.o, |_| o_bound);
    for (i, (&got, &want)) in out[1].as_f32().iter().zip(&want.lse).enumerate() {
        let bound = c * EPS + EPS * want.abs();
        let same = f64::from(got) == want; // -inf
        assert!(same || (f64::from(got) - want).abs() <= bound, "lse[{i}]: {got}, {want}");
    }
}

#[test]
fn forward_agrees_for_all_heads_widths_and_windows() {
    for (heads, kv_heads) in [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (6, 2), (5, 5), (24, 1)] {
        for (softcap, window) in
            [(None, None), (Some(1.5), Some(1)), (None, Some(3)), (Some(50.0), Some(8)), (None, Some(100))]
        {
            check_forward(&tree(), &spec(heads, kv_heads, 16, softcap, window));
        }
    }
    for dim in 1..=40 {
        check_forward(&tree(), &spec(4, 2, dim, None, Some(7)));
    }
    check_forward(&group(200, &[130, 1, 90]), &spec(4, 1, 64, None, Some(150)));
}

#[test]
fn rows_that_nobody_asks_for_are_zero() {
    let segments = tree();
    let spec = spec(2, 1, 8, None, None);
    let (q, k, v, _) = inputs(50, &spec);
    let runs = [QueryRun { segment: 2, first: 1, len: 2, row: 4 }];
    let (o, lse) = forward(&q, &k, &v, &segments, &runs, &spec);
    for row in (0..50).filter(|r| !(4..6).contains(r)) {
        assert!(o.as_f32()[row * 16..(row + 1) * 16].iter().all(|&x| x == 0.0));
        assert!(lse.as_f32()[row * 2..(row + 1) * 2].iter().all(|&x| x == f32::NEG_INFINITY));
    }
    assert!(lse.as_f32()[4 * 2..6 * 2].iter().all(|x| x.is_finite()));
}

/// Rows of x, in this order.
fn rows_of(x: &Tensor, rows: impl Iterator<Item = usize>) -> Tensor {
    let data: Vec<f32> = rows.flat_map(|r| x.as_f32()[r * x.cols..(r + 1) * x.cols].to_vec()).collect();
    Tensor::f32(data.len() / x.cols, x.cols, data)
}

#[test]
fn one_sequence_gives_the_same_bits_however_it_is_cut() {
    const T: usize = 75;
    for (heads, kv_heads, dim) in [(1, 1, 24), (4, 1, 64), (4, 2, 16), (3, 3, 40), (24, 1, 8)] {
        for (softcap, window) in [(None, None), (Some(2.0), Some(9)), (None, Some(1)), (Some(30.0), Some(40))]
        {
            let spec = spec(heads, kv_heads, dim, softcap, window);
            let (q, k, v, _) = inputs(T, &spec);
            let whole = Segments::separate(&[T]);
            let (o, lse) = forward(&q, &k, &v, &whole, &whole.all_queries(), &spec);

            // Decode: one query at a time, in one call each.
            for t in [0, 1, 8, 15, 16, 17, 39, 40, 74] {
                let runs = [QueryRun { segment: 0, first: t, len: 1, row: 0 }];
                let (o_t, lse_t) = forward(&rows_of(&q, t..t + 1), &k, &v, &whole, &runs, &spec);
                assert_eq!(bits(&o_t), bits(&rows_of(&o, t..t + 1)), "token {t} alone, {spec:?}");
                assert_eq!(bits(&lse_t), bits(&rows_of(&lse, t..t + 1)), "token {t} alone, {spec:?}");
            }

            // Root, prompt and response, laid out backwards with gaps; a second response of other tokens beside it.
            for (root, prompt) in [(1, 2), (5, 23), (16, 16), (33, 41)] {
                let response = T - root - prompt;
                let starts = [response + prompt + 8, response + 3, 0];
                let segments = Segments::new(vec![
                    Segment { start: starts[0], len: root, position: 0, prefix: None },
                    Segment { start: starts[1], len: prompt, position: root, prefix: Some(0) },
                    Segment { start: T + 20, len: 11, position: root + prompt, prefix: Some(1) },
                    Segment { start: starts[2], len: response, position: root + prompt, prefix: Some(1) },
                ])
                .expect("a valid table");
                let row_of = |t: usize| match t {
                    t if t < root => starts[0] + t,
                    t if t < root + prompt => starts[1] + t - root,
                    t => starts[2] + t - root - prompt,
                };
                let scatter = |x: &Tensor, seed: u32| {
                    let mut y = random(seed, segments.rows(), x.cols);
                    for t in 0..T {
                        let row = row_of(t) * x.cols;
                        y.as_f32_mut()[row..row + x.cols]
                            .copy_from_slice(&x.as_f32()[t * x.cols..][..x.cols]);
                    }
                    y
                };
                let (q, k, v) = (scatter(&q, 11), scatter(&k, 12), scatter(&v, 13));
                let (o_cut, lse_cut) = forward(&q, &k, &v, &segments, &segments.all_queries(), &spec);
                assert_eq!(
                    bits(&rows_of(&o_cut, (0..T).map(row_of))),
                    bits(&o),
                    "{root} + {prompt}, {spec:?}"
                );
                assert_eq!(bits(&rows_of(&lse_cut, (0..T).map(row_of))), bits(&lse));
            }
        }
    }
}

/// While streams decode, those that continue one prefix are computed together.
#[test]
fn streams_that_decode_together_have_the_bits_of_each_alone() {
    // Responses of two prompts behind one beginning, some far ahead of others: windows of 40 begin anywhere in a prompt, those
    // of 10 leave it behind.
    let s = |start, len, position, prefix| Segment { start, len, position, prefix };
    let mut list = vec![s(0, 21, 0, None), s(21, 70, 21, Some(0)), s(91, 35, 21, Some(0))];
    for (i, len) in [1, 9, 30, 2, 17, 41, 3, 5, 8, 60, 1, 1].into_iter().enumerate() {
        let prompt = list[1 + i / 7];
        let last = list[list.len() - 1];
        list.push(s(last.start + last.len, len, prompt.position + prompt.len, Some(1 + i / 7)));
    }
    // Two that parted late from each other, and one that did at once.
    for prefix in [14, 14, 2] {
        let (before, last) = (list[prefix], list[list.len() - 1]);
        list.push(s(last.start + last.len, 4, before.position + before.len, Some(prefix)));
    }
    let segments = Segments::new(list).expect("a valid table");
    let runs = |lens: &[usize]| {
        let mut row = 0;
        let mut run = |segment: usize, len: usize| {
            let first = segments.list()[segment].len - len;
            row += len;
            QueryRun { segment, first, len, row: row - len }
        };
        let all: Vec<QueryRun> = (3..18)
            .filter(|&segment| segment != 14)
            .zip(lens)
            .map(|(segment, &len)| run(segment, len))
            .collect();
        all
    };
    for threads in [1, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
        for (heads, kv_heads, dim) in [(1, 1, 24), (4, 1, 64), (4, 2, 16), (3, 3, 40), (24, 1, 8)] {
            for window in [None, Some(1), Some(10), Some(40)] {
                let spec = spec(heads, kv_heads, dim, None, window);
                let (q, k, v, _) = inputs(segments.rows(), &spec);
                for lens in [[1; 14], [1, 2, 1, 1, 3, 1, 1, 5, 1, 2, 1, 1, 2, 1]] {
                    let runs = runs(&lens);
                    let (o, lse) = pool.install(|| forward(&q, &k, &v, &segments, &runs, &spec));
                    for run in runs {
                        let rows = || run.row..run.row + run.len;
                        let alone = [QueryRun { row: 0, ..run }];
                        let (o_alone, lse_alone) =
                            forward(&rows_of(&q, rows()), &k, &v, &segments, &alone, &spec);
                        assert_eq!(bits(&o_alone), bits(&rows_of(&o, rows())), "{run:?}, {spec:?}");
                        assert_eq!(bits(&lse_alone), bits(&rows_of(&lse, rows())), "{run:?}, {spec:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_does_not_see_what_it_must_not() {
    let spec = spec(2, 1, 16, None, Some(6));
    let (q, k, v, _) = inputs(40, &spec);
    let segments = Segments::separate(&[40]);
    let (o, _) = forward(&q, &k, &v, &segments, &segments.all_queries(), &spec);
    let (mut k, mut v) = (k, v);
    for hidden in (0..40).filter(|t| !(15..=20).contains(t)) {
        k.as_f32_mut()[hidden * 16..(hidden + 1) * 16].fill(f32::NAN);
        v.as_f32_mut()[hidden * 16..(hidden + 1) * 16].fill(f32::INFINITY);
    }
    let (spoiled, _) = forward(&q, &k, &v, &segments, &segments.all_queries(), &spec);
    assert_eq!(bits(&rows_of(&spoiled, 20..21)), bits(&rows_of(&o, 20..21)));
}

fn check_backward(segments: &Segments, spec: &AttentionSpec, samples: usize) {
    check_queries(segments, spec, samples, None);
    // Of some tokens alone: no response's first, and of the prefixes only the last.
    let rows = 0..segments.rows() as u32;
    let last = |row: u32| segments.list().iter().any(|s| (s.start + s.len) as u32 == row + 1);
    let some: Vec<u32> = rows.filter(|&row| last(row) || row % 3 == 1).collect();
    check_queries(segments, spec, samples, Some(&some));
}

/// The gradient where the queries are the rows `wanted`: that of all where the others' outputs have none.
fn check_queries(segments: &Segments, spec: &AttentionSpec, samples: usize, wanted: Option<&[u32]>) {
    let rows = segments.rows();
    let (q, k, v, mut d_o) = inputs(rows, spec);
    let all = segments.all_queries();
    let (o, lse) = forward(&q, &k, &v, segments, &all, spec);
    let got = match wanted {
        None => same_everywhere(|| {
            let (dq, dk, dv) = backward(&d_o, &q, &k, &v, &o, &lse, segments, &all, spec);
            vec![dq, dk, dv]
        }),
        Some(wanted) => {
            let ids = vec![0; rows];
            let (_, runs) = Batch::new(&ids, segments, &all).narrowed(wanted);
            let some = |x: &Tensor| Cpu::F32.gather_rows(x, wanted);
            let got = same_everywhere(|| {
                let (dq, dk, dv) =
                    backward(&some(&d_o), &some(&q), &k, &v, &some(&o), &some(&lse), segments, &runs, spec);
                vec![Cpu::F32.scatter_rows(&dq, wanted, rows), dk, dv]
            });
            d_o = Cpu::F32.scatter_rows(&some(&d_o), wanted, rows);
            got
        }
    };

    let (heads, dim) = (spec.heads, spec.head_dim);
    let (qs, ks, vs, d_os) = (wide(&q), wide(&k), wide(&v), wide(&d_o));
    let base = reference(&qs, &ks, &vs, segments, spec);
    // Sizes: dq_i = sum over keys of scale p (dp - delta) k_i with the sums behind dp and delta taken absolutely.
    let mut size = [vec![0.0; qs.len()], vec![0.0; ks.len()], vec![0.0; vs.len()]];
    let kv_of = |h: usize, key: usize| (key * spec.kv_heads + h / (heads / spec.kv_heads)) * dim;
    let at = |row: usize, h: usize| (row * heads + h) * dim;
    let absolute = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum() };
    let mut delta = vec![0.0; rows * heads];
    for &(row, h, key, p) in &base.p {
        delta[row * heads + h] += p * absolute(&d_os[at(row, h)..][..dim], &vs[kv_of(h, key)..][..dim]);
    }
    for &(row, h, key, p) in &base.p {
        let (a, b) = (at(row, h), kv_of(h, key));
        let dp = absolute(&d_os[a..a + dim], &vs[b..b + dim]);
        let ds = f64::from(spec.scale) * p * (dp + delta[row * heads + h]);
        for d in 0..dim {
            size[0][a + d] += ds * ks[b + d].abs();
            size[1][b + d] += ds * qs[a + d].abs();
            size[2][b + d] += p * d_os[a + d].abs();
        }
    }
    // The probability's error, dp's and delta's dots, 1 - tanh^2 (amplified by at most the size of the score), one
    // rounding per term of the sum.
    let terms =
        (base.p.len() / rows.max(1) + segments.list().iter().map(|s| s.len).sum::<usize>() * heads) as f64;
    let c = 2.0 * probability_error(base.largest, dim, segments.longest())
        + dim as f64 / 16.0
        + 10.0
        + terms / 2.0;

    let loss = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
        reference(q, k, v, segments, spec).o.iter().zip(&d_os).map(|(o, d)| o * d).sum()
    };
    let check = |name: &str, x: &[f64], got: &Tensor, size: &[f64], loss: &dyn Fn(&[f64]) -> f64| {
        let picked: Vec<usize> = (0..x.len()).step_by((x.len() / samples).max(1)).collect();
        let want: Vec<f64> = picked.iter().map(|&j| derivative(loss, x, j)).collect();
        let got: Vec<f32> = picked.iter().map(|&j| got.as_f32()[j]).collect();
        assert_within(name, &got, &want, |j| (c * EPS + DERIVATIVE_ERROR) * size[picked[j]]);
    };
    check("dq", &qs, &got[0], &size[0], &|x| loss(x, &ks, &vs));
    check("dk", &ks, &got[1], &size[1], &|x| loss(&qs, x, &vs));
    check("dv", &vs, &got[2], &size[2], &|x| loss(&qs, &ks, x));
}

#[test]
fn backward_agrees_with_differences_of_the_forward_pass() {
    for (heads, kv_heads, dim) in [(1, 1, 5), (4, 1, 16), (4, 2, 7), (3, 3, 8), (6, 2, 33), (24, 1, 4)] {
        for (softcap, window) in [(None, None), (Some(1.5), Some(4)), (None, Some(1)), (Some(3.0), None)] {
            check_backward(&tree(), &spec(heads, kv_heads, dim, softcap, window), 37);
        }
    }
}

#[test]
fn backward_agrees_where_the_stream_is_longer_than_a_chunk() {
    check_backward(&group(280, &[60, 5, 33]), &spec(2, 1, 8, None, None), 11);
    check_backward(&group(280, &[60, 5, 33]), &spec(4, 2, 8, Some(2.0), Some(270)), 11);
}
