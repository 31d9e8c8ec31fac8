//! The sampler draws from the distribution that it says: chi-squared tests with fixed seeds, so that they pass or fail
//! for good. A sound sampler fails one of them with a probability of 1e-6.

use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Choice, DType, HeadSpec, Truncation};
use bon_engine::generate::{Prompt, Sampling, generate};
use bon_engine::rng::{Domain, DrawKey, derive_key};
use bon_engine::train::policy::{Continued, Forward};

use crate::ops::random;
use crate::tiny;

const NONE: Truncation = Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Pearson's test of counts against probabilities, cells with fewer than 8 expected draws thrown together. A token of
/// probability 0 must not have been drawn.
#[track_caller]
fn assert_drawn_from(what: &str, counts: &[u64], probabilities: &[f64]) {
    assert_eq!(counts.len(), probabilities.len());
    assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-5, "{what}: not a distribution");
    let n: u64 = counts.iter().sum();
    let (mut statistic, mut cells, mut rest) = (0.0, 0.0, (0.0, 0.0));
    let mut add = |count: f64, expected: f64| {
        statistic += (count - expected).powi(2) / expected;
        cells += 1.0;
    };
    for (&count, p) in counts.iter().zip(probabilities) {
        let (count, expected) = (count as f64, p * n as f64);
        if *p == 0.0 {
            assert_eq!(count, 0.0, "{what}: a token that is cut off was drawn");
        } else if expected >= 8.0 {
            add(count, expected);
        } else {
            rest = (rest.0 + count, rest.1 + expected);
        }
    }
    if rest.1 > 0.0 {
        add(rest.0, rest.1);
    }
    let dof: f64 = cells - 1.0;
    if dof == 0.0 {
        return;
    }
    // Wilson and Hilferty 1931: the cube root of chi-squared / dof is about normal. 4.75 standard deviations: 1e-6.
    let spread = 2.0 / (9.0 * dof);
    let z = ((statistic / dof).cbrt() - (1.0 - spread)) / spread.sqrt();
    assert!(z < 4.75, "{what}: chi-squared {statistic:.1} with {dof} degrees of freedom ({z:.1} sigma)");
    // Counts that fit too well are no draws either.
    assert!(z > -4.75, "{what}: chi-squared {statistic:.1} with {dof} degrees of freedom ({z:.1} sigma)");
}

/// softmax(cap(logits) / T) of one row, in f64.
fn softmax(x: &Tensor, embedding: &Tensor, head: &HeadSpec) -> Vec<f64> {
    let dot = |e: &[f32]| e.iter().zip(x.as_f32()).map(|(&e, &x)| f64::from(e) * f64::from(x)).sum::<f64>();
    let cap = |l: f64| head.softcap.map_or(l, |c| f64::from(c) * (l / f64::from(c)).tanh());
    let weights: Vec<f64> = embedding
        .as_f32()
        .chunks(embedding.cols)
        .map(|e| (cap(dot(e)) / f64::from(head.temperature)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / total).collect()
}

/// What is left of a distribution: top-k of all, top-p of these, min-p of those, each renormalised.
fn truncated(p: &[f64], truncation: &Truncation) -> Vec<f64> {
    let normalised = |p: Vec<f64>| {
        let total: f64 = p.iter().sum();
        p.into_iter().map(|p| p / total).collect::<Vec<_>>()
    };
    let rank = |p: &[f64], v: usize| p.iter().filter(|&&other| other > p[v]).count();
    let top_k = if truncation.top_k == 0 { p.len() } else { truncation.top_k };
    let p = normalised((0..p.len()).map(|v| if rank(p, v) < top_k { p[v] } else { 0.0 }).collect());
    // A token stays while those before it have not reached top_p.
    let before = |v: usize| p.iter().filter(|&&other| other > p[v]).sum::<f64>();
    let top_p = f64::from(truncation.top_p);
    let p = normalised(
        (0..p.len()).map(|v| if top_p == 1.0 || before(v) < top_p { p[v] } else { 0.0 }).collect(),
    );
    let floor = f64::from(truncation.min_p) * p.iter().copied().fold(0.0, f64::max);
    normalised(p.into_iter().map(|p| if p >= floor { p } else { 0.0 }).collect())
}

/// Draws once per key from one row's distribution.
fn draw(
    x: &Tensor,
    embedding: &Tensor,
    head: &HeadSpec,
    truncation: &Truncation,
    keys: impl Iterator<Item = DrawKey>,
) -> Vec<usize> {
    let choices: Vec<Choice> = keys.map(Choice::Draw).collect();
    let mut draws = Cpu::F32.draws(choices.len());
    Cpu::F32.lm_head_draw(x, embedding, head, truncation, &vec![0; choices.len()], &choices, &mut draws);
    Cpu::F32.take_draw(&mut draws).unwrap().into_iter().map(|s| s.token as usize).collect()
}

fn counts(drawn: impl Iterator<Item = usize>, cells: usize) -> Vec<u64> {
    let mut counts = vec![0; cells];
    drawn.for_each(|token| counts[token] += 1);
    counts
}

/// Keys of 64 streams at many positions of some prompts.
fn keys(n: u32, seed: u64, step: u64) -> impl Iterator<Item = DrawKey> {
    let key = derive_key(seed, Domain::Sample, step);
    (0..n).map(move |i| DrawKey { key, prompt: i / 4096, stream: i % 64, position: i / 64 % 64 + 17 })
}

#[test]
fn draws_follow_the_distribution_at_every_temperature() {
    for (vocab, softcap) in [(2, None), (23, None), (23, Some(2.0)), (131, None)] {
        let x = Tensor::f32(1, 8, random(1, 1, 8).as_f32().iter().map(|x| 3.0 * x).collect());
        let embedding = random(2, vocab, 8);
        for temperature in [0.5, 1.0, 1.7] {
            let head = HeadSpec { softcap, temperature };
            let drawn = draw(&x, &embedding, &head, &NONE, keys(60_000, 1, 0));
            let what = format!("{vocab} tokens at temperature {temperature}");
            assert_drawn_from(&what, &counts(drawn.into_iter(), vocab), &softmax(&x, &embedding, &head));
        }
    }
}

#[test]
fn truncated_draws_follow_what_is_left_of_the_distribution() {
    let (x, embedding) = (random(1, 1, 8), random(2, 40, 8));
    for temperature in [0.5, 1.0, 1.7] {
        let head = HeadSpec { softcap: None, temperature };
        let whole = softmax(&x, &embedding, &head);
        let mut kept = Vec::new();
        for truncation in [
            Truncation { top_k: 1, ..NONE },
            Truncation { top_k: 7, ..NONE },
            Truncation { top_k: 40, ..NONE },
            Truncation { top_k: 1000, ..NONE },
            Truncation { top_p: 0.8, ..NONE },
            Truncation { top_p: 0.01, ..NONE },
            Truncation { min_p: 0.1, ..NONE },
            Truncation { top_k: 9, top_p: 0.9, ..NONE },
            Truncation { top_k: 9, min_p: 0.3, ..NONE },
            Truncation { top_k: 12, top_p: 0.95, min_p: 0.05 },
        ] {
            let left = truncated(&whole, &truncation);
            kept.push(left.iter().filter(|&&p| p > 0.0).count());
            let drawn = draw(&x, &embedding, &head, &truncation, keys(20_000, 2, 0));
            let what = format!("{truncation:?} at temperature {temperature}");
            assert_drawn_from(&what, &counts(drawn.into_iter(), 40), &left);
        }
        assert_eq!((kept[0], kept[1], kept[2], kept[3], kept[5]), (1, 7, 40, 40, 1));
        assert!(kept[4] > 2 && kept[4] < 40 && kept[6] > 2 && kept[6] < 40, "{kept:?}");
    }
}

/// Where the most probable token reaches top_p exactly, the next one is out; of equal ones the lower id is in.
#[test]
fn an_exact_sum_is_enough_for_top_p() {
    let x = Tensor::f32(1, 1, vec![1.0]);
    // Two halves, whose sum no rounding touches, among tokens that even f64 gives no probability.
    let embedding = Tensor::f32(5, 1, vec![-1e4, 0.5, -1e4, 0.5, -1e4]);
    for temperature in [0.5, 1.0, 1.7] {
        let head = HeadSpec { softcap: None, temperature };
        for (top_p, kept) in [(0.499_999, &[1][..]), (0.5, &[1]), (0.500_001, &[1, 3]), (1.0, &[1, 3])] {
            let truncation = Truncation { top_p, ..NONE };
            let drawn = draw(&x, &embedding, &head, &truncation, keys(500, 3, 0));
            let found = counts(drawn.into_iter(), 5);
            let found: Vec<usize> = (0..5).filter(|&v| found[v] > 0).collect();
            assert_eq!(found, kept, "top_p = {top_p} at temperature {temperature}");
        }
    }
}

/// Draws under keys that differ in one field alone are independent: the joint distribution of the two is the product.
#[test]
fn neighbouring_keys_draw_independently() {
    let (x, embedding) = (random(3, 1, 8), random(4, 6, 8));
    let head = HeadSpec { softcap: None, temperature: 1.0 };
    let p = softmax(&x, &embedding, &head);
    let product: Vec<f64> = p.iter().flat_map(|a| p.iter().map(move |b| a * b)).collect();
    let all = |keys: Vec<DrawKey>| draw(&x, &embedding, &head, &NONE, keys.into_iter());
    let first: Vec<DrawKey> = keys(30_000, 1, 0).collect();
    let with = |f: &dyn Fn(DrawKey) -> DrawKey| -> Vec<DrawKey> { first.iter().map(|&k| f(k)).collect() };
    // Prompts, streams and positions of `first` are bounded; these steps lead out of it.
    for (what, second) in [
        ("streams", with(&|k| DrawKey { stream: k.stream + 64, ..k })),
        ("the next stream", with(&|k| DrawKey { stream: k.stream ^ 1, ..k })),
        ("the next position", with(&|k| DrawKey { position: k.position ^ 1, ..k })),
        ("the next prompt", with(&|k| DrawKey { prompt: k.prompt + 8, ..k })),
        (
            "stream and position swapped",
            with(&|k| DrawKey { stream: k.position + 100, position: k.stream + 100, ..k }),
        ),
        ("the next seed", keys(30_000, 2, 0).collect()),
        ("the next step", keys(30_000, 1, 1).collect()),
    ] {
        let pairs = all(first.clone()).into_iter().zip(all(second));
        assert_drawn_from(what, &counts(pairs.map(|(a, b)| a * 6 + b), 36), &product);
    }
}

/// Of whole models: the first two tokens of many streams follow pi(a) pi(b | a).
#[test]
fn generation_follows_the_model() {
    const STREAMS: usize = 6000;
    let model = tiny::model("gemma2", DType::F32);
    let prompt = [&[2][..], &tiny::tokens(1, 11)].concat();
    for temperature in [0.5, 1.0, 1.7] {
        let truncation = NONE;
        let sampling = Sampling { temperature, truncation, max_new_tokens: 2, seed: 5, step: 0 };
        let request = Prompt { ids: &prompt, number: 3, streams: STREAMS };
        let drawn = generate::<Cpu>(&model, &[request], &sampling, |_| false, |_, _, _| {}).unwrap();
        let vocab = model.config.vocab_size;
        let pairs: Vec<[u32; 2]> =
            (0..vocab as u32).flat_map(|a| (0..vocab as u32).map(move |b| [a, b])).collect();
        let responses: Vec<&[u32]> = pairs.iter().map(|p| &p[..]).collect();
        let groups = [Continued { prompt: &prompt, responses: &responses }];
        let logprobs = Forward::new(&model, &groups, temperature).logprobs;
        let joint: Vec<f64> = logprobs.chunks(2).map(|l| (f64::from(l[0]) + f64::from(l[1])).exp()).collect();
        let cell = |tokens: &[u32]| tokens[0] as usize * vocab + tokens[1] as usize;
        let drawn = drawn[0].iter().map(|r| cell(&r.tokens));
        let what = format!("pairs at temperature {temperature}");
        assert_drawn_from(&what, &counts(drawn, vocab * vocab), &joint);
    }
}
