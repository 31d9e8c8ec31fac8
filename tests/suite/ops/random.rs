use bon_engine::backend::cpu::Cpu;
use bon_engine::backend::ops::*;
use bon_engine::backend::{DType, Uniform};
use bon_engine::rng::philox4x32;
use half::bf16;

use super::{bits, same_everywhere, wide};

/// The definition, one element at a time: all of it but the last sum and its factor is exact in f64.
fn element(uniform: &Uniform, i: usize) -> f32 {
    let counter = [(i / 4) as u32, ((i as u64 / 4) >> 32) as u32, 0, 0];
    let b = philox4x32(counter, [uniform.seed, 0])[i % 4] >> 7;
    // A number of 25 bits in the 24 of an f32.
    let u = f64::from(b as f32) / 16_777_216.0 - 1.0;
    let product = (f64::from(uniform.spread) * f64::from(u as f32)) as f32;
    (f64::from(uniform.center) + f64::from(product)) as f32
}

#[test]
fn every_element_is_its_own_draw() {
    for uniform in [Uniform::up_to(1.0, 1), Uniform { seed: 9, center: 0.37, spread: 0.3 }] {
        for n in (1..=9).chain([16_383, 16_384, 16_385, 50_001]) {
            let out = same_everywhere(|| {
                [DType::F32, DType::Bf16].map(|t| Cpu::F32.random(&uniform, t, 1, n)).into()
            });
            let want: Vec<f32> = (0..n).map(|i| element(&uniform, i)).collect();
            assert!(out[0].as_f32() == want, "{n} elements of {uniform:?}");
            let rounded = want.iter().map(|x| u32::from(bf16::from_f32(*x).to_bits()));
            assert!(bits(&out[1]).into_iter().eq(rounded), "{n} elements of {uniform:?} in bf16");
        }
    }
}

/// Mean and variance of a uniform variable, each within six standard deviations of such a sample's.
#[test]
fn draws_fill_their_range() {
    let (n, center, spread) = (90_000, 0.25, 0.5);
    let x = wide(&Cpu::F32.random(&Uniform { seed: 5, center, spread }, DType::F32, 300, 300));
    let (center, spread) = (f64::from(center), f64::from(spread));
    assert!(x.iter().all(|x| (x - center).abs() <= spread));
    let mean = x.iter().sum::<f64>() / f64::from(n);
    let variance = x.iter().map(|x| (x - center).powi(2)).sum::<f64>() / f64::from(n);
    let root = f64::from(n).sqrt();
    assert!((mean - center).abs() <= 6.0 * spread / 3f64.sqrt() / root, "{mean}");
    // The fourth moment is spread^4 / 5, so the squares' variance is spread^4 (1/5 - 1/9).
    assert!((variance - spread.powi(2) / 3.0).abs() <= 6.0 * spread.powi(2) * (4.0f64 / 45.0).sqrt() / root);
}

#[test]
fn seeds_differ() {
    let [a, b] = [1, 2].map(|seed| Cpu::F32.random(&Uniform::up_to(1.0, seed), DType::F32, 1, 64));
    assert!(a.as_f32().iter().zip(b.as_f32()).all(|(a, b)| a != b));
}
