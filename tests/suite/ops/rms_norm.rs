use bon_engine::backend::cpu::rms_norm::{backward, forward};
use bon_engine::backend::cpu::{Cpu, Data, Tensor};
use bon_engine::backend::{NormSpec, ResidualSpec, RmsNorm};

use super::{random, random_bf16, randoms, same_everywhere, wide};
use crate::tolerance::{DERIVATIVE_ERROR, EPS, assert_within, derivative};

const NORM: NormSpec = NormSpec { eps: 1e-6, offset: 1.0 };

fn reference(x: &[f64], w: &[f64]) -> Vec<f64> {
    norm(x, w, NORM)
}

fn norm(x: &[f64], w: &[f64], spec: NormSpec) -> Vec<f64> {
    let n = w.len();
    let group = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / n as f64;
        let r = 1.0 / (mean + f64::from(spec.eps)).sqrt();
        x.iter().zip(w).map(|(x, w)| x * r * (f64::from(spec.offset) + w)).collect()
    };
    x.chunks(n).flat_map(group).collect()
}

/// dx and dw of [`norm`] over the rows of x, and the sizes of what they are the sums of, by its formula:
/// dx = r (g - xhat mean(g xhat)) with g = dy (offset + w), dw = sum of dy xhat.
fn norm_gradient(dy: &[f64], x: &[f64], w: &[f64], spec: NormSpec) -> [Vec<f64>; 4] {
    let n = w.len();
    let (mut dw, mut dw_size) = (vec![0.0; n], vec![0.0; n]);
    let (mut dx, mut dx_size) = (Vec::new(), Vec::new());
    for (dy, x) in dy.chunks(n).zip(x.chunks(n)) {
        let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n as f64 + f64::from(spec.eps)).sqrt();
        let g: Vec<f64> = dy.iter().zip(w).map(|(dy, w)| dy * (f64::from(spec.offset) + w)).collect();
        let mean = |of: fn(f64) -> f64| g.iter().zip(x).map(|(g, x)| of(g * r * x)).sum::<f64>() / n as f64;
        let (sum, size) = (mean(|x| x), mean(f64::abs));
        for i in 0..n {
            dx.push(r * (g[i] - r * x[i] * sum));
            dx_size.push(r * (g[i].abs() + (r * x[i]).abs() * size));
            dw[i] += dy[i] * r * x[i];
            dw_size[i] += (dy[i] * r * x[i]).abs();
        }
    }
    [dx, dx_size, dw, dw_size]
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

/// Sums of the residual stream with the norms around them, forward and backward, as every family has them: offset 1 or 0, a layer
/// scalar or none, a norm behind the branch or none. What passes from one part to the next in memory is compared part by part.
#[test]
fn sums_and_their_norms_agree() {
    const ROWS: usize = 5;
    for (n, offset, scale) in [(1, 1.0, 1.0), (40, 1.0, 1.0), (200, 0.0, 0.75), (33, 0.0, 1.0)] {
        let spec = ResidualSpec { norm: NormSpec { eps: 1e-6, offset }, scale };
        let input = |seed| random(seed, ROWS, n);
        let (x, branch, d_sum, d_normed) = (input(10), input(11), input(12), input(13));
        let (pre, post) = (random(14, 1, n), random(15, 1, n));
        let (zero, scale) = (|| Tensor::f32(1, n, vec![0.0; n]), f64::from(scale));
        // Of a norm: n/16 fused additions and a tree of 4, under a root; 9 roundings. Of its gradient: two such sums, 12 roundings.
        let (c, c_back) = (n as f64 / 64.0 + 7.0, n as f64 / 16.0 + 12.0);
        for with_post in [false, true] {
            let post = with_post.then_some(&post);
            let sums = same_everywhere(|| {
                let (sum, normed) = Cpu::F32.add_norm_forward(&x, &branch, post, &pre, spec);
                let alone = post.map(|post| Cpu::F32.add_forward(&x, &branch, post, spec));
                [sum, normed].into_iter().chain(alone).collect()
            });
            let [sum, normed, ..] = &sums[..] else { unreachable!("a sum and its norm") };
            assert!(sums.get(2).is_none_or(|alone| alone.as_f32() == sum.as_f32()), "the same sum");
            let (xs, branches) = (wide(&x), wide(&branch));
            let added = post.map_or(branches.clone(), |post| norm(&branches, &wide(post), spec.norm));
            let want: Vec<f64> = xs.iter().zip(&added).map(|(x, b)| scale * (x + b)).collect();
            assert_within("sum", sum.as_f32(), &want, |i| {
                scale * ((c + 2.0) * added[i].abs() + 2.0 * xs[i].abs()) * EPS
            });
            let sum64 = wide(sum);
            let want = norm(&sum64, &wide(&pre), spec.norm);
            assert_within("normed", normed.as_f32(), &want, |i| c * EPS * want[i].abs());

            let out = same_everywhere(|| {
                let (mut d_pre, mut d_post) = (zero(), zero());
                let behind = post.map(|post| (&branch, post, &mut d_post));
                let (dx, d_branch) = Cpu::F32.add_norm_backward(
                    Some(&d_sum),
                    &d_normed,
                    sum,
                    (&pre, &mut d_pre),
                    behind,
                    spec,
                );
                assert_eq!(d_branch.is_some(), with_post);
                [dx, d_pre].into_iter().chain(d_branch).chain(with_post.then_some(d_post)).collect()
            });
            let [through, size, dw, dw_size] =
                norm_gradient(&wide(&d_normed), &sum64, &wide(&pre), spec.norm);
            let d_sums = wide(&d_sum);
            let want: Vec<f64> = through.iter().zip(&d_sums).map(|(a, b)| scale * (a + b)).collect();
            let bound = |i: usize| scale * ((c_back + 2.0) * size[i] + 2.0 * d_sums[i].abs()) * EPS;
            assert_within("dx", out[0].as_f32(), &want, bound);
            let c_weight = ROWS as f64 + c;
            assert_within("dw before", out[1].as_f32(), &dw, |i| c_weight * EPS * dw_size[i]);
            let Some(post) = post else { continue };
            // From dx as it was stored.
            let [d_branch, size, dw, dw_size] =
                norm_gradient(&wide(&out[0]), &branches, &wide(post), spec.norm);
            assert_within("d branch", out[2].as_f32(), &d_branch, |i| c_back * EPS * size[i]);
            assert_within("dw behind", out[3].as_f32(), &dw, |i| c_weight * EPS * dw_size[i]);

            let out = same_everywhere(|| {
                let mut d_post = zero();
                let behind = (&branch, post, &mut d_post);
                let (dx, d_branch) = Cpu::F32.add_backward(&d_sum, Some(&d_normed), behind, spec);
                vec![dx, d_branch, d_post]
            });
            let more = wide(&d_normed);
            let want: Vec<f64> = d_sums.iter().zip(&more).map(|(a, b)| scale * (a + b)).collect();
            assert_within("dx", out[0].as_f32(), &want, |i| {
                2.0 * scale * EPS * (d_sums[i].abs() + more[i].abs())
            });
            let [d_branch, size, dw, dw_size] =
                norm_gradient(&wide(&out[0]), &branches, &wide(post), spec.norm);
            assert_within("d branch", out[1].as_f32(), &d_branch, |i| c_back * EPS * size[i]);
            assert_within("dw behind", out[2].as_f32(), &dw, |i| c_weight * EPS * dw_size[i]);
        }
    }
}
