use bon_engine::backend::cpu::geglu::{backward, forward};
use bon_engine::backend::cpu::{Cpu, Tensor};
use bon_engine::backend::ops::*;

use super::{random, randoms, same_everywhere, wide};
use crate::tolerance::{DERIVATIVE_ERROR, EPS, assert_within, derivative};

/// The definition, in f64: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
}

/// A gate from -9 to 9 and an `up` around 1.
fn inputs(n: usize) -> (Tensor, Tensor, Tensor) {
    let gate = randoms(1, n).into_iter().map(|x| 9.0 * x).collect();
    (Tensor::f32(1, n, gate), random(2, 1, n), random(3, 1, n))
}

/// How much relative error the exponent's own roundings put into a gate at x: the argument times 4 roundings.
fn argument(x: f64) -> f64 {
    4.0 * (0.8 * (x + 0.044715 * x * x * x)).abs() * 2.0
}

#[test]
fn agrees_at_every_length() {
    for n in (1..=40).chain([50_000]) {
        let (gate, up, dh) = inputs(n);
        let out = same_everywhere(|| {
            let (dgate, dup) = backward(&dh, &gate, &up);
            vec![forward(&gate, &up), dgate, dup]
        });
        let (g, u, d) = (wide(&gate), wide(&up), wide(&dh));
        // exp, 1 + e, the quotient and two products, beside the argument. Where the definition in f64 cancels, it is
        // itself exact to 1e-16 of x.
        let bound = |i: usize, size: f64| (8.0 + argument(g[i])) * EPS * size + 1e-15 * g[i].abs();
        let want: Vec<f64> = (0..n).map(|i| gelu(g[i]) * u[i]).collect();
        assert_within("h", out[0].as_f32(), &want, |i| bound(i, want[i].abs()));
        let want: Vec<f64> = (0..n).map(|i| gelu(g[i]) * d[i]).collect();
        assert_within("dup", out[2].as_f32(), &want, |i| bound(i, want[i].abs()));
        let want: Vec<f64> = (0..n).map(|i| d[i] * u[i] * derivative(&|x| gelu(x[0]), &[g[i]], 0)).collect();
        // The derivative is s + x s': two terms that may cancel, of size s and |x s'| <= 4 s.
        let s = |x: f64| if x.abs() < 1e-3 { 0.5 } else { gelu(x) / x };
        assert_within("dgate", out[1].as_f32(), &want, |i| {
            let slope = (g[i].abs() * 1.6 * (1.0 + 0.134145 * g[i] * g[i])) * s(g[i]) * (1.0 - s(g[i]));
            bound(i, (d[i] * u[i]).abs() * (s(g[i]) + slope)) + DERIVATIVE_ERROR * (d[i] * u[i]).abs()
        });
    }
}

#[test]
fn the_far_ends_are_finite() {
    let gate = Tensor::f32(1, 4, vec![-1e4, -40.0, 40.0, 1e4]);
    let one = Tensor::f32(1, 4, vec![1.0; 4]);
    assert_eq!(forward(&gate, &one).as_f32(), [0.0, 0.0, 40.0, 1e4]);
    assert_eq!(backward(&one, &gate, &one).0.as_f32(), [0.0, 0.0, 1.0, 1.0]);
}

/// The product with some columns of a matrix has the bits of the product with those alone, and their gradient goes there.
#[test]
fn products_with_columns() {
    for (rows, width, first, cols) in [(1, 1, 0, 1), (5, 7, 2, 3), (40, 900, 300, 256)] {
        let (gate, inputs, dh) = (random(1, rows, cols), random(2, rows, width), random(3, rows, cols));
        let before = random(4, rows, width);
        let out = same_everywhere(|| {
            let mut d_inputs = before.clone();
            let h = Cpu::F32.gelu_product_forward(&gate, &inputs, first);
            let d_gate = Cpu::F32.gelu_product_backward(&dh, &gate, &inputs, first, &mut d_inputs);
            vec![h, d_gate, d_inputs]
        });
        let columns = |x: &Tensor| {
            let rows = x.as_f32().chunks_exact(width).flat_map(|row| row[first..first + cols].to_vec());
            Tensor::f32(x.rows, cols, rows.collect())
        };
        let up = columns(&inputs);
        let (d_gate, d_up) = backward(&dh, &gate, &up);
        assert_eq!((&out[0], &out[1]), (&forward(&gate, &up), &d_gate));
        assert_eq!(columns(&out[2]), d_up);
        let outside = |(i, _): &(usize, &f32)| !(first..first + cols).contains(&(i % width));
        let kept = out[2].as_f32().iter().enumerate().filter(outside);
        assert!(kept.eq(before.as_f32().iter().enumerate().filter(outside)));
    }
}
