use bon_engine::backend::cpu::Tensor;
use bon_engine::backend::cpu::reduce::sum_squares;

use super::{random, randoms, same_everywhere, wide};

#[test]
fn sum_squares_agrees_at_every_length() {
    for n in (1..=40).chain([16_384, 16_385, 100_003]) {
        let x = random(n as u32, 1, n);
        let got = sum_squares(&x);
        let want: f64 = wide(&x).iter().map(|x| x * x).sum();
        assert!((got - want).abs() <= n as f64 * f64::EPSILON * want, "{n}: {got}, {want}");
        // An f64 as two halves, so that every bit is compared.
        same_everywhere(|| {
            let bits = sum_squares(&x).to_bits();
            vec![Tensor::f32(1, 2, vec![f32::from_bits(bits as u32), f32::from_bits((bits >> 32) as u32)])]
        });
    }
}

#[test]
fn what_is_not_finite_shows() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 20_000, 39_999] {
            let mut x = randoms(1, 40_000);
            x[place] = bad;
            assert!(!sum_squares(&Tensor::f32(1, 40_000, x)).is_finite());
        }
    }
    // Squares that overflow f32 do not: the sum is f64.
    assert_eq!(sum_squares(&Tensor::f32(1, 1, vec![2f32.powi(100)])), 2f64.powi(200));
}
