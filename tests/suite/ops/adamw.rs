use bon_engine::backend::adamw::{BLOCK, MIN_WEIGHT, inverse};
use bon_engine::backend::cpu::adamw::Codes;
use bon_engine::backend::cpu::{Cpu, Data, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{AdamW, DynamicCode, Moments, Quantised, Update, Weight};
use bon_engine::rng::philox4x32;
use half::bf16;

use super::{laid_out, random, random_bf16, randoms, same_everywhere, wide};
use crate::tolerance::{EPS, assert_within};

const WEIGHT_DECAY: f32 = 0.1;

fn hyper(step: u64) -> AdamW {
    AdamW { lr: 3e-2, beta1: 0.9, beta2: 0.95, eps: 1e-8, step, grad_scale: 0.37, key: [step as u32, 9] }
}

fn zeros(n: usize) -> Tensor {
    Tensor::f32(1, n, vec![0.0; n])
}

fn f32_moments(n: usize) -> Moments<Tensor, Codes> {
    Moments::F32 { m: zeros(n), v: zeros(n) }
}

fn blockwise_moments(n: usize) -> Moments<Tensor, Codes> {
    let quantised = || Quantised { codes: vec![0; n], scales: zeros(n.div_ceil(BLOCK)) };
    Moments::Blockwise { m: quantised(), v: quantised() }
}

/// One update of one parameter.
fn step_one(
    hyper: &AdamW,
    weight_decay: f32,
    grad: &Tensor,
    moments: &mut Moments<Tensor, Codes>,
    weight: Weight<Tensor>,
) {
    let mut grad = grad.clone();
    Cpu::F32.adamw(hyper, &mut [Update { grad: &mut grad, moments, weight, weight_decay }]);
    assert!(grad.as_f32().iter().all(|&g| g == 0.0));
}

#[test]
fn five_steps_agree_with_the_formula() {
    for n in (1..=40).chain([70_000]) {
        const STEPS: u64 = 5;
        let start = random(1, 1, n);
        let grads: Vec<Tensor> = (0..STEPS).map(|t| random(10 + t as u32, 1, n)).collect();
        let out = same_everywhere(|| {
            let (mut p, mut moments) = (start.clone(), f32_moments(n));
            let mut copy = Tensor::new(1, n, Data::Bf16(vec![bf16::ZERO; n]));
            for (t, g) in (1..).zip(&grads) {
                let weight = Weight::Master { master: &mut p, copy: &mut copy };
                step_one(&hyper(t), WEIGHT_DECAY, g, &mut moments, weight);
            }
            let Moments::F32 { m, v } = moments else { unreachable!("they stay as they are") };
            vec![p, m, v, copy]
        });
        let h = hyper(1);
        let (lr, b1, b2) = (f64::from(h.lr), f64::from(h.beta1), f64::from(h.beta2));
        let (mut p, mut m, mut v) = (wide(&start), vec![0.0; n], vec![0.0; n]);
        for (t, g) in (1..).zip(&grads) {
            for (i, g) in wide(g).into_iter().enumerate() {
                let g = g * f64::from(h.grad_scale);
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                let root = (v[i] / (1.0 - b2.powi(t))).sqrt() + f64::from(h.eps);
                p[i] -= lr * f64::from(WEIGHT_DECAY) * p[i] + lr * m[i] / (1.0 - b1.powi(t)) / root;
            }
        }
        // |g| <= 0.37, so |m| <= 0.37 and v <= 0.37^2; a handful of roundings per step.
        assert_within("m", out[1].as_f32(), &m, |_| 3.0 * STEPS as f64 * EPS * 0.37);
        assert_within("v", out[2].as_f32(), &v, |i| 3.0 * STEPS as f64 * EPS * v[i]);
        // An update is at most about lr * sqrt(steps) (m and v see the same gradients), its error comes from m above.
        assert_within("p", out[0].as_f32(), &p, |i| {
            let update_error = lr * 15.0 * EPS * 0.37 / v[i].sqrt();
            STEPS as f64 * (EPS + 6.0 * EPS * lr * 2.3 + update_error)
        });
        let Data::Bf16(copy) = out[3].data() else { panic!("the copy changed its dtype") };
        assert!(copy.iter().zip(out[0].as_f32()).all(|(c, &p)| *c == bf16::from_f32(p)));
        assert!(copy.iter().all(|c| c.to_f32().abs() >= MIN_WEIGHT));
    }
}

/// torch.optim.AdamW (2.x, float32), lr 0.01, betas (0.9, 0.999), eps 1e-8, weight_decay 0.01: three steps.
#[test]
fn agrees_with_pytorch() {
    let mut p = Tensor::f32(1, 3, vec![1.0, -0.5, 0.25]);
    let mut moments = f32_moments(3);
    for (t, g) in [[0.1, -2.0, 1e-4], [0.3, 1.0, -1e-4], [-0.2, 0.5, 3e-4]].into_iter().enumerate() {
        let hyper = AdamW { lr: 0.01, beta2: 0.999, grad_scale: 1.0, ..hyper(t as u64 + 1) };
        step_one(&hyper, 0.01, &Tensor::f32(1, 3, g.to_vec()), &mut moments, Weight::F32(&mut p));
    }
    let want = [0.9779461026191711, -0.48657500743865967, 0.2348487824201584];
    // PyTorch rounds as often as we do, in another order: a few units of the update beside p's own rounding.
    assert_within("p", p.as_f32(), &want, |i| 2.0 * EPS * want[i].abs() + 20.0 * EPS * 0.01);
}

#[test]
fn a_gradient_scale_is_a_scaled_gradient() {
    let n = 33;
    let g = randoms(5, n);
    let run = |grad_scale: f32, g: Vec<f32>| {
        let (mut p, mut moments) = (random(6, 1, n), f32_moments(n));
        let hyper = AdamW { grad_scale, ..hyper(1) };
        step_one(&hyper, WEIGHT_DECAY, &Tensor::f32(1, n, g), &mut moments, Weight::F32(&mut p));
        let Moments::F32 { m, v } = moments else { unreachable!("they stay as they are") };
        (p, m, v)
    };
    assert_eq!(run(0.25, g.clone()), run(1.0, g.iter().map(|g| 0.25 * g).collect()));
}

/// What codes stand for.
fn decoded(x: &Quantised<Tensor, Codes>, code: &DynamicCode) -> Vec<f32> {
    let scale = |i: usize| x.scales.as_f32()[i / BLOCK];
    x.codes.iter().enumerate().map(|(i, &c)| code.values[usize::from(c)] * scale(i)).collect()
}

/// An update with moments in codes is that of the f32 moments that the codes stand for, and what is kept of its moments are
/// their nearest values.
#[test]
fn moments_in_codes_are_read_updated_and_rounded() {
    for n in [1, 3, 255, 256, 257, 1000, 70_000] {
        let start = random(1, 1, n);
        same_everywhere(|| {
            let (mut p, mut moments) = (start.clone(), blockwise_moments(n));
            for t in 1..=4 {
                let sizes = [1.0, 1e-3, 0.0, 30.0, 1e-12];
                let grad: Vec<f32> =
                    randoms(10 + t as u32, n).iter().enumerate().map(|(i, g)| g * sizes[i % 5]).collect();
                let grad = Tensor::f32(1, n, grad);
                let Moments::Blockwise { m, v } = &moments else { unreachable!("they stay as they are") };
                let [m, v] = [decoded(m, DynamicCode::signed()), decoded(v, DynamicCode::unsigned())];
                let mut wide = Moments::F32 { m: Tensor::f32(1, n, m), v: Tensor::f32(1, n, v) };
                let mut want = p.clone();
                step_one(&hyper(t), WEIGHT_DECAY, &grad, &mut wide, Weight::F32(&mut want));
                step_one(&hyper(t), WEIGHT_DECAY, &grad, &mut moments, Weight::F32(&mut p));
                assert_eq!(p, want);
                let (Moments::F32 { m, v }, Moments::Blockwise { m: m8, v: v8 }) = (&wide, &moments) else {
                    unreachable!("they stay as they are")
                };
                for (x, x8, code) in [(m, m8, DynamicCode::signed()), (v, v8, DynamicCode::unsigned())] {
                    let blocks = x.as_f32().chunks(BLOCK).zip(x8.codes.chunks(BLOCK)).zip(x8.scales.as_f32());
                    for ((x, codes), &scale) in blocks {
                        assert_eq!(scale, x.iter().fold(0.0, |a: f32, x| a.max(x.abs())));
                        let nearest = |x: &f32| code.nearest(x * inverse(scale));
                        assert!(codes.iter().eq(&x.iter().map(nearest).collect::<Vec<u8>>()));
                    }
                }
                // What is divided by is 0 only where it was.
                let scales = v8.scales.as_f32();
                assert!(scales.iter().all(|&scale| scale == 0.0 || inverse(scale) > 0.0));
                let v8 = decoded(v8, DynamicCode::unsigned());
                assert!(v.as_f32().iter().zip(&v8).all(|(v, v8)| (*v == 0.0) == (*v8 == 0.0)));
            }
            let Moments::Blockwise { m, v } = moments else { unreachable!("they stay as they are") };
            let codes = |x: Codes| Tensor::f32(1, n, x.into_iter().map(f32::from).collect());
            vec![p, codes(m.codes), codes(v.codes), m.scales, v.scales]
        });
    }
}

/// A weight without a master is, of the two bf16 around the new value, the one that its random bits say; those are the half-words
/// of Philox that [`Weight::Bf16`] tells of.
#[test]
fn weights_without_masters_are_rounded_by_their_random_bits() {
    for n in [1, 127, 128, 130, 256, 700, 66_000] {
        let start: Vec<bf16> = randoms(3, n).into_iter().map(bf16::from_f32).collect();
        let grad = random(4, 1, n);
        let number = 7;
        let out = same_everywhere(|| {
            let (mut weight, mut moments) =
                (Tensor::new(1, n, Data::Bf16(start.clone())), blockwise_moments(n));
            step_one(
                &hyper(1),
                WEIGHT_DECAY,
                &grad,
                &mut moments,
                Weight::Bf16 { weight: &mut weight, number },
            );
            vec![weight]
        });
        let mut exact = Tensor::f32(1, n, start.iter().map(|w| w.to_f32()).collect());
        step_one(&hyper(1), WEIGHT_DECAY, &grad, &mut f32_moments(n), Weight::F32(&mut exact));
        let Data::Bf16(out) = out[0].data() else { panic!("the weight changed its dtype") };
        for (i, (out, exact)) in out.iter().zip(exact.as_f32()).enumerate() {
            let (block, within) = ((i / BLOCK) as u32, i % BLOCK);
            let (lane, half_word) = ((within % 128 / 4) as u32, within / 128 * 4 + within % 4);
            let word =
                philox4x32(Weight::<Tensor>::counter(block, lane, number), hyper(1).key)[half_word / 2];
            let bits = word >> (16 * (half_word % 2)) & 0xffff;
            assert_eq!(u32::from(out.to_bits()), (exact.to_bits() + bits) >> 16, "element {i} of {n}");
        }
    }
}

/// Weights that begin at 0 and have hardly a gradient: the master keeps what is too small for products of pairs, until it is not.
#[test]
fn the_least_weights_are_zero_in_bf16_alone() {
    let bits = |x: f32| bf16::from_f32(x);
    let least = MIN_WEIGHT;
    for (start, want) in [
        (least, least),
        (-least, -least),
        (least * (1.0 - 0.001), least),
        (least * 0.99, 0.0),
        (-least * 0.5, 0.0),
        (1e-30, 0.0),
        (0.0, 0.0),
    ] {
        let (mut master, mut copy) =
            (Tensor::f32(1, 1, vec![start]), Tensor::new(1, 1, Data::Bf16(vec![bf16::ONE])));
        let weight = Weight::Master { master: &mut master, copy: &mut copy };
        step_one(&hyper(1), 0.0, &zeros(1), &mut f32_moments(1), weight);
        assert_eq!(master.as_f32(), [start]);
        assert_eq!(copy.data(), &Data::Bf16(vec![bits(want)]), "{start:e}");
        let mut weight = Tensor::new(1, 1, Data::Bf16(vec![bits(start)]));
        step_one(
            &hyper(1),
            0.0,
            &zeros(1),
            &mut f32_moments(1),
            Weight::Bf16 { weight: &mut weight, number: 0 },
        );
        assert_eq!(weight.data(), &Data::Bf16(vec![bits(want)]), "{start:e}");
    }
}

/// Weights in panels become what row-major ones do, with f32 moments and 8-bit ones, with masters and without.
#[test]
fn weights_in_panels_are_updated_as_others_are() {
    for (rows, cols) in [(16, 32), (48, 96), (208, 640)] {
        let n = rows * cols;
        let (start, master) = random_bf16(5, rows, cols);
        let master: Vec<f32> = master.into_iter().map(|x| x as f32).collect();
        let grad = random(6, rows, cols);
        for blockwise in [false, true] {
            let moments = || {
                let matrix = || Tensor::f32(rows, cols, vec![0.0; n]);
                if blockwise { blockwise_moments(n) } else { Moments::F32 { m: matrix(), v: matrix() } }
            };
            let all = |start: &Tensor| {
                let mut results = Vec::new();
                for t in 1..=2 {
                    let (mut copy, mut master) = (start.clone(), Tensor::f32(rows, cols, master.clone()));
                    let weight = Weight::Master { master: &mut master, copy: &mut copy };
                    step_one(&hyper(t), WEIGHT_DECAY, &grad, &mut moments(), weight);
                    let mut alone = start.clone();
                    let weight = Weight::Bf16 { weight: &mut alone, number: 9 };
                    step_one(&hyper(t), WEIGHT_DECAY, &grad, &mut moments(), weight);
                    results.extend([master, copy, alone].map(|x| Cpu::F32.download(&x)));
                }
                results
            };
            let packed = laid_out(&start);
            assert!(matches!(packed.data(), Data::Packed(_)));
            assert!(all(&packed) == all(&start), "[{rows}, {cols}], 8-bit moments: {blockwise}");
        }
    }
}

/// The mean of many roundings is the value, and what bf16 holds stays.
#[test]
fn rounding_at_random_is_exact_in_expectation() {
    let n = 64 * BLOCK;
    let of = |start: f32, lr: f32, t: u64| {
        let mut weight = Tensor::new(1, n, Data::Bf16(vec![bf16::from_f32(start); n]));
        let mut moments = f32_moments(n);
        let grad = Tensor::f32(1, n, vec![1.0; n]);
        let hyper = AdamW { lr, grad_scale: 1.0, ..hyper(t) };
        step_one(&hyper, 0.0, &grad, &mut moments, Weight::Bf16 { weight: &mut weight, number: 1 });
        Cpu::F32.to_f32(&weight).into_iter().map(f64::from).collect::<Vec<f64>>()
    };
    // With beta1 and beta2 corrected for, the first step is lr: a hundredth of the distance of neighbours below 1.
    let lr = 0.01 / 256.0;
    for start in [1.0, -1.0] {
        let rounded = of(start, lr, 1);
        let mean = rounded.iter().sum::<f64>() / n as f64;
        // Above -1 neighbours are 2^-7 apart. Four standard deviations of the mean of so many.
        let apart: f64 = if start > 0.0 { 1.0 / 256.0 } else { 1.0 / 128.0 };
        let share = f64::from(lr) / apart;
        let error = 4.0 * apart * (share * (1.0 - share) / n as f64).sqrt();
        assert!((mean - (f64::from(start) - f64::from(lr))).abs() < error, "{mean}");
        assert!(rounded.iter().all(|x| [0.0, apart].contains(&(f64::from(start) - x))));
    }
    assert!(of(0.5, 0.25, 1).iter().all(|&x| (x - 0.25).abs() <= 1.0 / 512.0));
}

/// The CPU's own ops say so.
#[test]
fn codes_come_back_as_they_went() {
    let codes: Vec<u8> = (0..=255).collect();
    assert_eq!(Cpu::F32.download_codes(&Cpu::F32.upload_codes(&codes)), codes);
}

/// The codes are those of bitsandbytes: its values up to the last bits, its blocks' scales, and of every number a code that is as
/// near as its own. On the CPU it does not take the nearest of the small ones. No mean but 0 has the code of 0.
#[test]
fn codes_are_those_of_bitsandbytes() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../goldens/blockwise.json")).unwrap();
    for (name, code, least) in
        [("signed", DynamicCode::signed(), 0), ("unsigned", DynamicCode::unsigned(), 1)]
    {
        let of = |key: &str| -> Vec<f32> {
            let numbers = golden[name][key].as_array().unwrap().iter();
            numbers.map(|x| x.as_f64().unwrap() as f32).collect()
        };
        let (values, numbers, scales) = (of("values"), of("numbers"), of("scales"));
        for (ours, theirs) in code.values.iter().zip(&values) {
            assert!(
                (ours - theirs).abs() <= 2.0 * f32::EPSILON * theirs.abs(),
                "{ours:e}, theirs {theirs:e}"
            );
        }
        for (block, &scale) in numbers.chunks(BLOCK).zip(&scales) {
            assert_eq!(block.iter().fold(0.0, |a: f32, x| a.max(x.abs())), scale);
        }
        let codes = golden[name]["codes"].as_array().unwrap();
        for (i, (x, theirs)) in numbers.iter().zip(codes).enumerate() {
            let (x, theirs) = (x * inverse(scales[i / BLOCK]), theirs.as_u64().unwrap() as u8);
            let ours = code.nearest(x);
            let error = |c: u8| (code.values[usize::from(c)] - x).abs();
            let lifted = error(0) < error(1) && least == 1 && ours == 1;
            let near = error(ours) <= error(theirs) * (1.0 + 1e-4);
            assert!(near || lifted, "{name} {x:e}: {ours}, theirs {theirs}");
        }
    }
}
