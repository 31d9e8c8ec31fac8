use bon_engine::backend::NormSpec;
use bon_engine::backend::cpu::rms_norm::{backward, forward};
use bon_engine::backend::cpu::{Data, Tensor};

use super::{random, random_bf16, randoms, same_everywhere, wide};
use crate::tolerance::{DERIVATIVE_ERROR, EPS, assert_within, derivative};

const NORM: NormSpec = NormSpec { eps: 1e-6, offset: 1.0 };

fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
    let n = w.len();
    let group = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / n as f64;
        let r = 1.0 / (mean + f64::from(NORM.eps)).sqrt();
        x.iter().zip(w).map(|(x, w)| x * r * (1.0 + w)).collect()
    };
    x.chunks(n).flat_map(group).collect()
}

fn check_forward(x: &Tensor, w: &Tensor, w_wide: &[f64]) {
    let y = &same_everywhere(|| vec![forward(x, Some(w), w.cols, NORM)])[0];
    let want = reference(&wide(x), w_wide);
    // n/16 fused additions and a tree of 4, under a root that halves their error; then 9 roundings.
    let c = w.cols as f64 / 64.0 + 7.0;
    assert_within("y", y.as_f32(), &want, |i| c * EPS * want[i].abs());
}

#[test]
fn forward_agrees_at_every_width() {
    for n in 1..=40 {
        let (x, w) = (random(n as u32, 3, n), random(99, 1, n));
        check_forward(&x, &w, &wide(&w));
        let (w, w_wide) = random_bf16(98, 1, n);
        check_forward(&x, &w, &w_wide);
    }
}

#[test]
fn forward_agrees_on_many_rows_and_on_heads() {
    let w = random(1, 1, 256);
    check_forward(&random(2, 150, 256), &w, &wide(&w));
    check_forward(&random(3, 90, 4 * 256), &w, &wide(&w));
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let (x, w) = (random(4, 120, 300), random(5, 1, 300));
    let whole = forward(&x, Some(&w), w.cols, NORM);
    for row in [0, 1, 57, 119] {
        let range = row * 300..(row + 1) * 300;
        let alone = forward(&Tensor::f32(1, 300, x.as_f32()[range.clone()].to_vec()), Some(&w), 300, NORM);
        assert_eq!(alone.as_f32(), &whole.as_f32()[range]);
    }
}

fn check_backward(rows: usize, heads: usize, n: usize) {
    let (x, dy, w) = (random(6, rows, heads * n), random(7, rows, heads * n), random(8, 1, n));
    let before = randoms(9, n);
    let out = same_everywhere(|| {
        let mut dw = Tensor::f32(1, n, before.clone());
        vec![backward(&dy, &x, Some((&w, &mut dw)), w.cols, NORM), dw]
    });
    let (xs, dys, ws) = (wide(&x), wide(&dy), wide(&w));
    let loss = |y: Vec<f64>| y.iter().zip(&dys).map(|(y, dy)| y * dy).sum::<f64>();

    let want: Vec<f64> = (0..xs.len())
        .map(|i| {
            let group = i / n * n..(i / n + 1) * n;
            let dy = &dys[group.clone()];
            let f = |x: &[f64]| reference(x, &ws).iter().zip(dy).map(|(y, dy)| y * dy).sum();
            derivative(&f, &xs[group], i % n)
        })
        .collect();
    // dx = r (g - xhat mean(g xhat)): two sums of n/16 + 5 roundings (the mean, and r squared), and 12 more.
    let c = n as f64 / 16.0 + 12.0;
    let size = |i: usize| {
        let group = i / n * n..(i / n + 1) * n;
        let r = 1.0 / (xs[group.clone()].iter().map(|x| x * x).sum::<f64>() / n as f64 + 1e-6).sqrt();
        let g = |j: usize| (dys[j] * (1.0 + ws[j % n])).abs();
        r * (g(i) + (r * xs[i]).abs() * group.map(|j| g(j) * (r * xs[j]).abs()).sum::<f64>() / n as f64)
    };
    assert_within("dx", out[0].as_f32(), &want, |i| (c * EPS + DERIVATIVE_ERROR) * size(i));

    let f = |w: &[f64]| loss(reference(&xs, w));
    let want: Vec<f64> = (0..n).map(|i| f64::from(before[i]) + derivative(&f, &ws, i)).collect();
    let y0 = reference(&xs, &vec![0.0; n]);
    // One rounding per row, and r's.
    let c = (rows * heads) as f64 / 2.0 + n as f64 / 64.0 + 7.0;
    let size = |i: usize| {
        (i..y0.len()).step_by(n).map(|j| (y0[j] * dys[j]).abs()).sum::<f64>() + before[i].abs() as f64
    };
    assert_within("dw", out[1].as_f32(), &want, |i| (c * EPS + DERIVATIVE_ERROR) * size(i));
}

#[test]
fn backward_agrees_with_differences_of_the_forward_pass() {
    for n in 1..=40 {
        check_backward(3, 1, n);
    }
    check_backward(5, 3, 16);
    check_backward(2, 1, 200);
}

#[test]
fn backward_is_the_same_everywhere_when_rows_are_many() {
    let (x, dy, (w, _)) = (random(6, 300, 200), random(7, 300, 200), random_bf16(8, 1, 200));
    let out = same_everywhere(|| {
        let mut dw = Tensor::f32(1, 200, vec![0.0; 200]);
        vec![backward(&dy, &x, Some((&w, &mut dw)), w.cols, NORM), dw]
    });
    assert!(matches!(out[1].data(), Data::F32(dw) if dw.iter().all(|x| x.is_finite() && *x != 0.0)));
}
