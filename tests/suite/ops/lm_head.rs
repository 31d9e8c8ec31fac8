use bon_engine::backend::cpu::lm_head::{gumbel_noise, logprob_backward, logprob_forward};
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Choice, Compute, HeadSpec, Target, Truncation};
use bon_engine::rng::DrawKey;

use half::bf16;

use super::{bits, laid_out, random, random_bf16, randoms, same_everywhere, wide};
use crate::tolerance::{BF16_ROUNDOFF, EPS, assert_within};

const PLAIN: HeadSpec = HeadSpec { softcap: None, temperature: 1.0 };
const CAPPED: HeadSpec = HeadSpec { softcap: Some(1.5), temperature: 0.7 };

/// What products with a bf16 embedding are computed in.
const BOTH: [Compute; 2] = [Compute::F32, Compute::Bf16];

/// R rows, V tokens, D columns, with targets: some rows have none, some several, some the same one twice.
struct Case {
    compute: Compute,
    head: HeadSpec,
    x: Tensor,
    embedding: Tensor,
    /// The embedding's values.
    e: Vec<f64>,
    targets: Vec<Target>,
    weights: Vec<f32>,
    /// What d_embedding holds before.
    before: Tensor,
}

/// The embedding as models hold it.
fn in_panels((embedding, values): (Tensor, Vec<f64>)) -> (Tensor, Vec<f64>) {
    (laid_out(&embedding), values)
}

impl Case {
    fn new(r: usize, v: usize, d: usize, head: HeadSpec, bf16: bool) -> Self {
        // Logits of size 4 or so: the caps bite and probabilities differ.
        let x = Tensor::f32(r, d, randoms(1, r * d).iter().map(|x| 4.0 * x).collect());
        let (embedding, e) =
            if bf16 { in_panels(random_bf16(2, v, d)) } else { (random(2, v, d), wide(&random(2, v, d))) };
        let target =
            |i: usize| Target { row: (i * 7 % r) as u32, token: ((i * 31 + 1) * (v / 3 + 1) % v) as u32 };
        let mut targets: Vec<Target> = (0..r + 2).filter(|i| i % 5 != 3).map(target).collect();
        targets.push(targets[0]);
        targets.push(Target { row: 0, token: v as u32 - 1 });
        let weights = randoms(3, targets.len());
        Self { compute: Compute::F32, head, x, embedding, e, targets, weights, before: random(4, v, d) }
    }

    fn computing(self, compute: Compute) -> Self {
        Self { compute, ..self }
    }

    fn forward(&self) -> (Vec<f32>, Vec<f32>) {
        let (logprobs, trace) =
            logprob_forward(&self.x, &self.embedding, &self.head, &self.targets, false, self.compute);
        (logprobs, trace.lse.as_f32().to_vec())
    }

    /// Log-probs, lse, dX, d_embedding. The last two do not depend on whether logits are kept.
    fn run(&self) -> [Tensor; 4] {
        let Case { compute, x, embedding, head, targets, weights, .. } = self;
        let [kept, again] = [true, false].map(|keep| {
            let (logprobs, trace) = logprob_forward(x, embedding, head, targets, keep, *compute);
            assert_eq!(trace.logits.is_some(), keep);
            let mut d_embedding = self.before.clone();
            let dx =
                logprob_backward(x, embedding, head, &trace, targets, weights, &mut d_embedding, *compute);
            [Tensor::f32(1, logprobs.len(), logprobs), trace.lse, dx, d_embedding]
        });
        for (kept, again) in kept.iter().zip(&again) {
            let bits = |x: &Tensor| x.as_f32().iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
            assert!(bits(kept) == bits(again), "logits that are kept change bits");
        }
        again
    }

    fn check(&self) {
        let (r, v, d) = (self.x.rows, self.embedding.rows, self.x.cols);
        let (t, cap) = (f64::from(self.head.temperature), self.head.softcap.map(f64::from));
        let mut x = wide(&self.x);
        // In bf16, dlogits are rounded as the hidden states are.
        let mut entering = 0.0;
        if self.compute == Compute::Bf16 {
            x.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
            entering = 2.0 * BF16_ROUNDOFF;
        }
        let dots = |f: fn(f64) -> f64| -> Vec<f64> {
            let dot = |at: usize| (0..d).map(|j| f(x[at / v * d + j] * self.e[at % v * d + j])).sum();
            (0..r * v).map(dot).collect()
        };
        let (raw, size) = (dots(|p| p), dots(f64::abs));
        let finish = |raw: f64| cap.map_or(raw, |c| c * (raw / c).tanh()) / t;
        let logits: Vec<f64> = raw.iter().map(|&l| finish(l)).collect();
        let lse: Vec<f64> = logits
            .chunks(v)
            .map(|row| {
                let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                max + row.iter().map(|l| (l - max).exp()).sum::<f64>().ln()
            })
            .collect();

        // A logit has d fused additions, division by the cap, tanh (two ulp), product, division by T; the slope of the
        // cap is at most 1.
        let logit_error = |i: usize| EPS * (d as f64 / 2.0 * size[i] / t + 3.0 * logits[i].abs());
        // lse: the logits'; their difference from the maximum, exp, the additions (of a block of 96, of the 86 blocks of a
        // chunk, of chunks), ln, and the last sum.
        let sums = (96 + 86 + v / 8192) as f64 / 2.0;
        let lse_error: Vec<f64> = (0..r)
            .map(|row| {
                let all = row * v..(row + 1) * v;
                let logits_wrong = all.clone().map(logit_error).fold(0.0, f64::max);
                let range = 2.0 * all.map(|i| logits[i].abs()).fold(0.0, f64::max);
                logits_wrong + EPS * (range + sums + 4.0 + lse[row].abs())
            })
            .collect();

        let got = same_everywhere(|| self.run().into());
        assert_within("lse", got[1].as_f32(), &lse, |row| lse_error[row]);
        let at = |t: &Target| t.row as usize * v + t.token as usize;
        let want: Vec<f64> = self.targets.iter().map(|t| logits[at(t)] - lse[t.row as usize]).collect();
        assert_within("log-prob", got[0].as_f32(), &want, |i| {
            let t = &self.targets[i];
            logit_error(at(t)) + lse_error[t.row as usize] + EPS * want[i].abs()
        });

        // dlogits = (total softmax - sum of w onehot) cap' / T, and how wrong it may be: the probability by the errors of
        // logit and lse, cap' = 1 - tanh^2 by those of tanh, and a few roundings of each term.
        let (mut dl, mut dl_error, mut dl_size) = (vec![0.0; r * v], vec![0.0; r * v], vec![0.0; r * v]);
        let slope = |i: usize| cap.map_or(1.0, |c| 1.0 - (raw[i] / c).tanh().powi(2)) / t;
        let slope_error = |i: usize| {
            let tanh_wrong = |c: f64| EPS * (d as f64 / 2.0 * size[i] / c * t * slope(i) + 4.0);
            cap.map_or(0.0, |c| 2.0 * tanh_wrong(c) / t) + EPS * slope(i)
        };
        let mut total = vec![0.0; r];
        let mut total_size = vec![0.0; r];
        for (t, &w) in self.targets.iter().zip(&self.weights) {
            total[t.row as usize] += f64::from(w);
            total_size[t.row as usize] += f64::from(w).abs();
        }
        for i in 0..r * v {
            let p = (logits[i] - lse[i / v]).exp();
            dl[i] = total[i / v] * p * slope(i);
            let (weight, relative) = (total_size[i / v], logit_error(i) + lse_error[i / v] + 6.0 * EPS);
            dl_error[i] = weight * p * (slope(i) * relative + slope_error(i));
            dl_size[i] = weight * p * slope(i);
        }
        for (t, &w) in self.targets.iter().zip(&self.weights) {
            let (i, w) = (at(t), f64::from(w));
            dl[i] -= w * slope(i);
            dl_error[i] += w.abs() * (2.0 * EPS * slope(i) + slope_error(i));
            dl_size[i] += w.abs() * slope(i);
        }
        let (mut dx, mut dx_bound) = (vec![0.0; r * d], vec![0.0; r * d]);
        let mut de = wide(&self.before);
        // A chain over a chunk's tokens, then over chunks; and a chain over rows, begun with what is there.
        let (dx_sums, de_sums) = (EPS * (v.min(8192) + v / 8192) as f64 / 2.0, EPS * r as f64 / 2.0);
        let mut de_bound: Vec<f64> = de.iter().map(|e| de_sums * e.abs()).collect();
        for i in 0..r * v {
            dl_error[i] += entering * (dl[i].abs() + dl_error[i]);
            let (row, token) = (i / v, i % v);
            for j in 0..d {
                let (e, x) = (self.e[token * d + j], x[row * d + j]);
                dx[row * d + j] += dl[i] * e;
                de[token * d + j] += dl[i] * x;
                dx_bound[row * d + j] += (dl_error[i] + dx_sums * dl_size[i]) * e.abs();
                de_bound[token * d + j] += (dl_error[i] + de_sums * dl_size[i]) * x.abs();
            }
        }
        assert_within("dX", got[2].as_f32(), &dx, |i| dx_bound[i]);
        assert_within("d_embedding", got[3].as_f32(), &de, |i| de_bound[i]);
    }
}

#[test]
fn agrees_at_every_remainder_of_the_vocabulary() {
    for v in (1..=20).chain([95, 96, 97, 131, 191, 192, 193]) {
        Case::new(5, v, 9, PLAIN, false).check();
        for compute in BOTH {
            Case::new(5, v, 9, CAPPED, true).computing(compute).check();
        }
    }
}

#[test]
fn agrees_at_every_remainder_of_rows_and_columns() {
    for n in (1..=20).chain([47, 48, 49, 63, 64, 65, 97]) {
        Case::new(n, 101, 9, CAPPED, false).check();
        for compute in BOTH {
            Case::new(n, 21, 9, PLAIN, true).computing(compute).check();
            Case::new(5, 101, n, CAPPED, true).computing(compute).check();
        }
    }
}

/// Chunks of 8192 tokens, and the 256 rows of a tile and the 512 of a pass of the gradient.
#[test]
fn agrees_beyond_a_chunk_and_a_pass() {
    for compute in BOTH {
        Case::new(3, 8192 + 97, 24, CAPPED, true).computing(compute).check();
        Case::new(2 * 256, 97, 16, PLAIN, true).computing(compute).check();
        Case::new(512 + 67, 203, 32, CAPPED, true).computing(compute).check();
        // In panels.
        Case::new(256 + 9, 8192 + 112, 64, CAPPED, true).computing(compute).check();
    }
    Case::new(3, 2 * 8192 + 1, 10, PLAIN, false).check();
    Case::new(256 + 67, 203, 17, CAPPED, false).check();
}

/// What a row gives must not depend on the rows beside it: sampling and training meet a row in different company.
#[test]
fn a_row_does_not_depend_on_its_batch() {
    for (compute, v, d) in BOTH.iter().flat_map(|c| [(*c, 8192 + 97, 20), (*c, 8192 + 112, 32)]) {
        let case = Case::new(140, v, d, CAPPED, true).computing(compute);
        let [logprobs, lse, dx, _] = case.run();
        for row in [0, 15, 16, 63, 64, 139] {
            let mut alone = Case::new(140, v, d, CAPPED, true).computing(compute);
            alone.x = Tensor::f32(1, d, case.x.as_f32()[row * d..(row + 1) * d].to_vec());
            let mine: Vec<usize> =
                (0..case.targets.len()).filter(|&i| case.targets[i].row as usize == row).collect();
            alone.targets = mine.iter().map(|&i| Target { row: 0, ..case.targets[i] }).collect();
            alone.weights = mine.iter().map(|&i| case.weights[i]).collect();
            let [logprobs_alone, lse_alone, dx_alone, _] = alone.run();
            assert_eq!(lse_alone.as_f32()[0].to_bits(), lse.as_f32()[row].to_bits(), "row {row}");
            assert_eq!(bits(&dx_alone), bits(&dx)[row * d..(row + 1) * d], "row {row}");
            let want: Vec<u32> = mine.iter().map(|&i| logprobs.as_f32()[i].to_bits()).collect();
            assert_eq!(bits(&logprobs_alone), want, "row {row}");
        }
    }
}

/// A draw for every row, all keys different.
fn draws(rows: usize) -> Vec<Choice> {
    let key = |i: u32| DrawKey { key: [7, 8], prompt: i / 32, stream: i % 32, position: 3 * i };
    (0..rows as u32).map(|i| Choice::Draw(key(i))).collect()
}

/// Tokens and log-probs of a sampling call, so that they can be compared by bits.
fn sampled(case: &Case, truncation: &Truncation, choices: &[Choice]) -> Vec<Tensor> {
    let out = Cpu { compute: case.compute }.lm_head_sample(
        &case.x,
        &case.embedding,
        &case.head,
        truncation,
        choices,
    );
    let tokens = out.iter().map(|s| f32::from_bits(s.token)).collect();
    let logprobs = out.iter().map(|s| s.logprob).collect();
    vec![Tensor::f32(1, out.len(), tokens), Tensor::f32(1, out.len(), logprobs)]
}

const TRUNCATIONS: [Truncation; 2] =
    [Truncation { top_k: 0, top_p: 1.0, min_p: 0.0 }, Truncation { top_k: 50, top_p: 0.9, min_p: 1e-3 }];

#[test]
fn sampling_gives_the_same_bits_everywhere_and_the_log_prob_of_training() {
    let shapes = [(8192 + 97, 20), (8192 + 112, 32)];
    let with_shapes =
        |(compute, truncation)| shapes.into_iter().map(move |shape| (compute, truncation, shape));
    let cases = BOTH.iter().flat_map(|c| TRUNCATIONS.iter().map(move |t| (*c, t)));
    for (compute, truncation, (v, d)) in cases.flat_map(with_shapes) {
        let case = Case::new(83, v, d, CAPPED, true).computing(compute);
        let choices = draws(83);
        let out = same_everywhere(|| sampled(&case, truncation, &choices));
        let tokens = bits(&out[0]);
        let targets: Vec<Target> = (0..).zip(&tokens).map(|(row, &token)| Target { row, token }).collect();
        let (logprobs, _) =
            logprob_forward(&case.x, &case.embedding, &case.head, &targets, false, case.compute);
        assert_eq!(bits(&out[1]), logprobs.iter().map(|l| l.to_bits()).collect::<Vec<_>>());
        // Not all the same token, and not the most probable one throughout.
        let greedy = bits(&sampled(&case, truncation, &[Choice::Greedy; 83])[0]);
        let distinct: std::collections::BTreeSet<_> = tokens.iter().collect();
        assert!(distinct.len() > 20 && tokens != greedy);
    }
}

/// Most noise is never computed, because the token cannot win with it. The draw is that of all noise: of logits that are
/// near and far apart, as large as temperatures make them, and rising, so that the best so far says little.
#[test]
fn a_draw_is_the_argmax_over_the_noise_of_all_tokens() {
    const V: usize = 2 * 8192 + 97;
    let mut winners = std::collections::BTreeSet::new();
    for (scale, temperature) in [(0.01, 1.0), (1.0, 1.0), (8.0, 1.0), (1.0, 0.01), (1.0, 1e-6), (1.0, 1e6)] {
        for rising in [0.0, 1e-3, 0.1] {
            let x = Tensor::f32(20, 1, randoms(1, 20).iter().map(|x| 1.0 + x * x).collect());
            let logits = randoms(2, V).into_iter().zip(0..).map(|(e, i)| e * scale + rising * i as f32);
            let embedding = Tensor::f32(V, 1, logits.collect());
            let head = HeadSpec { softcap: None, temperature };
            let drawn = Cpu::F32.lm_head_sample(&x, &embedding, &head, &Truncation::default(), &draws(20));
            for (row, (drawn, choice)) in drawn.iter().zip(draws(20)).enumerate() {
                let Choice::Draw(key) = choice else { panic!("a draw") };
                let score = |v: usize| {
                    let logit = x.as_f32()[row] * embedding.as_f32()[v] / temperature;
                    logit + gumbel_noise(&key, v as u32)
                };
                let best = (0..V).rev().max_by(|&a, &b| score(a).total_cmp(&score(b)));
                assert_eq!(Some(drawn.token as usize), best, "row {row}, {scale}, {temperature}, {rising}");
                winners.insert(drawn.token);
            }
        }
    }
    assert!(winners.len() > 50, "{}", winners.len());
}

#[test]
fn a_draw_does_not_depend_on_its_batch() {
    let mut case = Case::new(83, 300, 20, PLAIN, false);
    let whole = case.x.clone();
    for truncation in &TRUNCATIONS {
        let mut choices = draws(83);
        choices[5] = Choice::Greedy;
        case.x = whole.clone();
        let all = sampled(&case, truncation, &choices);
        for row in [0, 4, 5, 6, 15, 16, 63, 64, 82] {
            case.x = Tensor::f32(1, 20, whole.as_f32()[row * 20..(row + 1) * 20].to_vec());
            let alone = sampled(&case, truncation, &choices[row..=row]);
            for (alone, all) in alone.iter().zip(&all) {
                assert_eq!(bits(alone)[0], bits(all)[row], "row {row}");
            }
        }
    }
}

/// Several draws after a row are those after as many rows like it.
#[test]
fn draws_after_one_row_are_those_after_rows_like_it() {
    let rows = [0, 0, 0, 2, 3, 3, 20, 20, 20, 20, 41];
    for (compute, truncation) in BOTH.into_iter().flat_map(|c| TRUNCATIONS.map(|t| (c, t))) {
        let case = Case::new(42, 8192 + 97, 20, CAPPED, true).computing(compute);
        let mut choices = draws(rows.len());
        choices[1] = Choice::Greedy;
        let cpu = Cpu { compute };
        let repeated = cpu.gather_rows(&case.x, &rows);
        let want = cpu.lm_head_sample(&repeated, &case.embedding, &case.head, &truncation, &choices);
        let mut room = cpu.draws(rows.len());
        cpu.lm_head_draw(&case.x, &case.embedding, &case.head, &truncation, &rows, &choices, &mut room);
        assert_eq!(cpu.take_draw(&mut room).unwrap(), want, "{truncation:?}");
        assert!(want[0] != want[2], "noise of their own");
    }
}

#[test]
fn greedy_takes_the_most_probable_token_and_the_lowest_of_equals() {
    const V: usize = 8192 + 97;
    let case = Case::new(70, V, 12, PLAIN, false);
    let mut flat = Case::new(3, V, 12, CAPPED, false);
    flat.embedding = Tensor::f32(V, 12, vec![0.5; V * 12]);
    // Logits to the bit (see the matmul), so that near ties are decided as they must be.
    let (x, e) = (case.x.as_f32(), case.embedding.as_f32());
    let logit =
        |row: usize, v: usize| (0..12).fold(0.0f32, |sum, j| x[row * 12 + j].mul_add(e[v * 12 + j], sum));
    for truncation in &TRUNCATIONS {
        let tokens = bits(&sampled(&case, truncation, &[Choice::Greedy; 70])[0]);
        for (row, token) in tokens.into_iter().enumerate() {
            let best = (0..V).rev().max_by(|&a, &b| logit(row, a).total_cmp(&logit(row, b)));
            assert_eq!(Some(token as usize), best, "row {row}");
        }
        assert_eq!(bits(&sampled(&flat, truncation, &[Choice::Greedy; 3])[0]), [0, 0, 0]);
    }
}

/// One likely token and 8191 others that together weigh 3e-4, but each too little to change 1 in f32.
#[test]
fn a_long_tail_is_not_lost() {
    let (v, row) = (8192, Tensor::f32(1, 1, vec![1.0]));
    for peak in [0, 95, 96, 5000, 8191] {
        let mut logits = vec![-17.0; v];
        logits[peak] = 0.0;
        let target = Target { row: 0, token: peak as u32 };
        let (_, trace) =
            logprob_forward(&row, &Tensor::f32(v, 1, logits), &PLAIN, &[target], false, Compute::F32);
        let want = (8191.0 * f64::exp(-17.0)).ln_1p();
        // The additions of a block, and of the blocks.
        assert_within("lse", trace.lse.as_f32(), &[want], |_| (96.0 + 86.0) / 2.0 * EPS);
    }
}

#[test]
fn a_broken_row_says_so_and_breaks_no_other() {
    for (broken, head) in [(f32::NAN, CAPPED), (f32::NAN, PLAIN), (f32::INFINITY, PLAIN)] {
        let mut case = Case::new(20, 131, 12, head, false);
        let (logprobs, lse) = case.forward();
        let draws = draws(20);
        let sound = TRUNCATIONS.map(|t| sampled(&case, &t, &draws));
        case.x.as_f32_mut()[7 * 12 + 3] = broken;
        let (logprobs_now, lse_now) = case.forward();
        let agree = |row: usize, now: f32, before: f32| match row {
            7 => !now.is_finite(),
            _ => now.to_bits() == before.to_bits(),
        };
        assert!((0..20).all(|row| agree(row, lse_now[row], lse[row])));
        let row = |i: usize| case.targets[i].row as usize;
        assert!((0..logprobs.len()).all(|i| agree(row(i), logprobs_now[i], logprobs[i])));
        for (truncation, sound) in TRUNCATIONS.iter().zip(&sound) {
            let now = sampled(&case, truncation, &draws);
            assert!((0..20).all(|row| agree(row, now[1].as_f32()[row], sound[1].as_f32()[row])));
            assert!((0..20).all(|row| row == 7 || bits(&now[0])[row] == bits(&sound[0])[row]));
        }
    }
}
