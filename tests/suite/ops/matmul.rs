//! The reference is exact: an element is one chain of fused multiply-adds in the order of the reduction, continued from
//! what the output holds. So equality of bits proves at once that batch, tiles, threads and instruction set do not
//! matter.

use bon_engine::backend::cpu::Tensor;
use bon_engine::backend::cpu::matmul::{backward_input, backward_weight, forward};

use super::{bits, random, random_bf16, same_everywhere};

/// X `[t, k]`, W `[n, k]` and dY `[t, n]`; what dX and dW hold before.
struct Case {
    x: Tensor,
    w: Tensor,
    /// W's values.
    w_wide: Vec<f32>,
    dy: Tensor,
    dx: Tensor,
    dw: Tensor,
}

impl Case {
    fn new(t: usize, k: usize, n: usize, bf16: bool) -> Self {
        let (w, w_wide) = match bf16 {
            false => (random(2, n, k), random(2, n, k).as_f32().to_vec()),
            true => {
                let (w, values) = random_bf16(2, n, k);
                (w, values.into_iter().map(|x| x as f32).collect())
            }
        };
        Self { x: random(1, t, k), w, w_wide, dy: random(3, t, n), dx: random(4, t, k), dw: random(5, n, k) }
    }

    /// Y, dX, dW.
    fn run(&self) -> [Tensor; 3] {
        let (mut dx, mut dw) = (self.dx.clone(), self.dw.clone());
        backward_input(&self.dy, &self.w, &mut dx);
        backward_weight(&self.dy, &self.x, &mut dw);
        [forward(&self.x, &self.w), dx, dw]
    }

    fn reference(&self) -> [Tensor; 3] {
        let (t, k, n) = (self.x.rows, self.x.cols, self.w.rows);
        let (x, w, dy) = (self.x.as_f32(), &self.w_wide, self.dy.as_f32());
        let zeros = Tensor::f32(t, n, vec![0.0; t * n]);
        [
            chains(&zeros, k, |row, l| x[row * k + l], |l, out| w[out * k + l]),
            chains(&self.dx, n, |row, l| dy[row * n + l], |l, col| w[l * k + col]),
            chains(&self.dw, t, |out, l| dy[l * n + out], |l, col| x[l * k + col]),
        ]
    }
}

/// c\[i, j\] + sum over l < k of a(i, l) b(l, j).
fn chains(c: &Tensor, k: usize, a: impl Fn(usize, usize) -> f32, b: impl Fn(usize, usize) -> f32) -> Tensor {
    let data = c.as_f32().iter().enumerate().map(|(at, &c0)| {
        let (i, j) = (at / c.cols, at % c.cols);
        (0..k).fold(c0, |sum, l| a(i, l).mul_add(b(l, j), sum))
    });
    Tensor::f32(c.rows, c.cols, data.collect())
}

#[track_caller]
fn check(shapes: impl Iterator<Item = (usize, usize, usize)>) {
    let cases: Vec<Case> =
        shapes.flat_map(|(t, k, n)| [false, true].map(|bf16| Case::new(t, k, n, bf16))).collect();
    let got = same_everywhere(|| cases.iter().flat_map(Case::run).collect());
    for (case, got) in cases.iter().zip(got.chunks_exact(3)) {
        for ((got, want), name) in got.iter().zip(&case.reference()).zip(["Y", "dX", "dW"]) {
            let (t, k, n, w) = (case.x.rows, case.x.cols, case.w.rows, case.w.dtype());
            assert!(bits(got) == bits(want), "{name} of T = {t}, in = {k}, out = {n}, {w:?}");
        }
    }
}

/// Lengths around every tile: 6 rows of A per register tile, 48 per block, 16 lanes per vector, 64 per panel.
fn lengths() -> impl Iterator<Item = usize> + Clone {
    (1..=20).chain([47, 48, 49, 63, 64, 65, 97])
}

/// Every pair of lengths, the third running through the list beside them.
fn pairs() -> impl Iterator<Item = (usize, usize, usize)> {
    lengths().enumerate().flat_map(|(i, a)| {
        lengths().enumerate().map(move |(j, b)| (a, b, lengths().cycle().nth(7 * i + 11 * j).unwrap_or(1)))
    })
}

#[test]
fn every_remainder_of_tokens_and_inputs() {
    check(pairs());
}

#[test]
fn every_remainder_of_tokens_and_outputs() {
    check(pairs().map(|(t, n, k)| (t, k, n)));
}

#[test]
fn every_remainder_of_inputs_and_outputs() {
    check(pairs().map(|(k, n, t)| (t, k, n)));
}

/// Beyond the terms of one pass, 128 and 512, and beyond the 192 tokens of a cut.
#[test]
fn long_reductions_and_many_tokens() {
    check(
        [(3, 1030, 50), (50, 3, 1030), (600, 20, 7), (321, 65, 49), (193, 513, 5), (257, 40, 130)]
            .into_iter(),
    );
}

/// Up to six tokens meet weights that are transposed in registers, if these come in whole blocks of 16 by 8.
#[test]
fn few_tokens() {
    check((1..=8).flat_map(|t| {
        [(8, 16), (16, 32), (24, 48), (136, 64), (640, 80), (640, 96), (136, 81), (137, 80)]
            .map(|(k, n)| (t, k, n))
    }));
}

#[test]
fn nothing_comes_of_nothing() {
    check([(0, 5, 7)].into_iter());
}
