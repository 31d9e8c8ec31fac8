//! The reference is exact. An element of Y is one chain of fused multiply-adds from zero (in bf16 the odd term of a pair
//! before the even one); one of dX and dW is what was there and such chains of 512 terms. So equality of bits proves at
//! once that batch, tiles, threads and instruction set do not matter.

use bon_engine::backend::cpu::form::SMALL;
use bon_engine::backend::cpu::matmul::{backward_input, backward_weight, forward};
use bon_engine::backend::cpu::packed::fits;
use bon_engine::backend::cpu::{Cpu, Data, Tensor};
use bon_engine::backend::ops::*;
use bon_engine::backend::{Compute, DType};
use half::bf16;

use super::{bits, laid_out, random, random_bf16, same_everywhere};

/// X `[t, k]`, W `[n, k]` and dY `[t, n]`; what dX and dW hold before.
struct Case {
    compute: Compute,
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    dx: Tensor,
    dw: Tensor,
}

/// What weights are stored in, and what products are computed in.
const KINDS: [(bool, Compute); 3] = [(false, Compute::F32), (true, Compute::F32), (true, Compute::Bf16)];

/// An operand as it enters a product.
fn entering(compute: Compute, x: f32) -> f32 {
    match compute {
        Compute::F32 => x,
        Compute::Bf16 => match bf16::from_f32(x).to_f32() {
            x if x.abs() < SMALL => 0.0,
            x => x,
        },
    }
}

impl Case {
    fn new(t: usize, k: usize, n: usize, (bf16, compute): (bool, Compute)) -> Self {
        let w = if bf16 { random_bf16(2, n, k).0 } else { random(2, n, k) };
        Self { compute, x: random(1, t, k), w, dy: random(3, t, n), dx: random(4, t, k), dw: random(5, n, k) }
    }

    /// Y, dX, dW. The first two are the same of weights in panels.
    fn run(&self) -> [Tensor; 3] {
        let of_weights = |w: &Tensor| {
            let mut dx = self.dx.clone();
            backward_input(&self.dy, w, &mut dx, self.compute);
            let [y] = forward(&self.x, [w], self.compute);
            [y, dx]
        };
        let [y, dx] = of_weights(&self.w);
        if self.w.dtype() == DType::Bf16 && fits(self.w.rows, self.w.cols) {
            let packed = of_weights(&laid_out(&self.w));
            assert!(packed.iter().map(bits).eq([&y, &dx].map(bits)), "other bits of weights in panels");
        }
        let mut dw = self.dw.clone();
        backward_weight(&self.dy, &self.x, &mut dw, self.compute);
        [y, dx, dw]
    }

    fn reference(&self) -> [Tensor; 3] {
        let (t, k, n) = (self.x.rows, self.x.cols, self.w.rows);
        let entering = |x: &Tensor| x.as_f32().iter().map(|&x| entering(self.compute, x)).collect();
        let (x, dy): (Vec<f32>, Vec<f32>) = (entering(&self.x), entering(&self.dy));
        let w: Vec<f32> = match self.w.data() {
            Data::F32(w) => w.clone(),
            Data::Bf16(w) => w.iter().map(|w| w.to_f32()).collect(),
            Data::Packed(_) => unreachable!("cases are row-major"),
        };
        [
            self.chains(
                &Tensor::f32(t, n, vec![0.0; t * n]),
                k,
                k,
                |row, l| x[row * k + l],
                |l, out| w[out * k + l],
            ),
            self.chains(&self.dx, n, 512, |row, l| dy[row * n + l], |l, col| w[l * k + col]),
            self.chains(&self.dw, t, 512, |out, l| dy[l * n + out], |l, col| x[l * k + col]),
        ]
    }

    /// c\[i, j\] + sum over l < k of a(i, l) b(l, j), in chains of `length`.
    fn chains(
        &self,
        c: &Tensor,
        k: usize,
        length: usize,
        a: impl Fn(usize, usize) -> f32,
        b: impl Fn(usize, usize) -> f32,
    ) -> Tensor {
        let data = c.as_f32().iter().enumerate().map(|(at, &c0)| {
            let (i, j) = (at / c.cols, at % c.cols);
            (0..k).step_by(length.max(1)).fold(c0, |c, first| {
                let terms = length.min(k - first);
                let term = |l: usize| if l < terms { (a(i, first + l), b(first + l, j)) } else { (0.0, 0.0) };
                c + match self.compute {
                    Compute::F32 => chain(terms, term),
                    Compute::Bf16 => chain(terms.next_multiple_of(2), |l| term(l ^ 1)),
                }
            })
        });
        Tensor::f32(c.rows, c.cols, data.collect())
    }
}

/// The sum of so many products, each fused.
fn chain(terms: usize, term: impl Fn(usize) -> (f32, f32)) -> f32 {
    (0..terms).fold(0.0, |sum, l| {
        let (a, b) = term(l);
        a.mul_add(b, sum)
    })
}

#[track_caller]
fn check_cases(cases: &[Case]) {
    let got = same_everywhere(|| cases.iter().flat_map(Case::run).collect());
    for (case, got) in cases.iter().zip(got.chunks_exact(3)) {
        for ((got, want), name) in got.iter().zip(&case.reference()).zip(["Y", "dX", "dW"]) {
            let (t, k, n, w) = (case.x.rows, case.x.cols, case.w.rows, case.w.dtype());
            let compute = case.compute;
            assert!(bits(got) == bits(want), "{name} of T = {t}, in = {k}, out = {n}, {w:?} in {compute:?}");
        }
    }
}

#[track_caller]
fn check(shapes: impl Iterator<Item = (usize, usize, usize)>) {
    let cases = shapes.flat_map(|(t, k, n)| KINDS.map(|kind| Case::new(t, k, n, kind)));
    check_cases(&cases.collect::<Vec<_>>());
}

/// Lengths around every tile: 5 or 8 rows of A per register tile, 48 per block, 16 lanes per vector, 96 per panel.
fn lengths() -> impl Iterator<Item = usize> + Clone {
    (1..=20).chain([47, 48, 49, 64, 65, 95, 96, 97])
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

/// Weights in panels of 16 rows, of 32 columns: every remainder of a register tile of 3 vectors and of a panel, more words than a
/// pass takes, more terms than a chain has, and more tokens than a cut.
#[test]
fn weights_in_panels() {
    check((1..=17).flat_map(|t| [(32, 16), (64, 32), (96, 48), (640, 64), (32, 80)].map(|(k, n)| (t, k, n))));
    check(
        [(8, 2048, 96), (49, 1088, 112), (65, 2048, 32), (97, 64, 544), (193, 1088, 208), (409, 32, 592)]
            .into_iter(),
    );
}

/// What a panel cannot hold is not put into one.
#[test]
fn only_whole_panels_are_packed() {
    for (rows, cols, packed) in [(16, 32, true), (17, 32, false), (16, 48, false), (1, 640, false)] {
        let w = laid_out(&random_bf16(1, rows, cols).0);
        assert_eq!(matches!(w.data(), Data::Packed(_)), packed, "[{rows}, {cols}]");
        assert_eq!(Cpu::F32.download(&w), Cpu::F32.download(&random_bf16(1, rows, cols).0));
        assert_eq!(Cpu::F32.to_f32(&w), Cpu::F32.to_f32(&random_bf16(1, rows, cols).0));
    }
    assert!(matches!(laid_out(&random(1, 16, 32)).data(), Data::F32(_)));
}

/// Up to six tokens meet f32 weights that are transposed in registers, if these come in whole blocks of 16 by 4.
#[test]
fn few_tokens() {
    check((1..=11).flat_map(|t| {
        [(8, 16), (16, 32), (24, 48), (136, 64), (640, 80), (640, 96), (136, 81), (137, 80)]
            .map(|(k, n)| (t, k, n))
    }));
}

/// The instruction takes subnormal numbers for zero, which the other paths do not.
#[test]
fn small_numbers_have_the_same_bits_everywhere() {
    let small = |x: &mut Tensor, exponent: i32| {
        let factor =
            |i: usize| if i.is_multiple_of(3) { 1.0 } else { f32::powi(2.0, exponent - i as i32 % 9) };
        match x.data_mut() {
            Data::F32(x) => x.iter_mut().enumerate().for_each(|(i, x)| *x *= factor(i)),
            Data::Bf16(x) => {
                x.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(x.to_f32() * factor(i)));
            }
            Data::Packed(_) => unreachable!("cases are row-major"),
        }
    };
    let mut cases = Vec::new();
    for (of_x, of_w) in [(-50, -50), (-58, -40), (-40, -58), (-70, -70), (-120, -4), (-4, -124)] {
        for kind in KINDS {
            let mut case = Case::new(7, 70, 40, kind);
            small(&mut case.x, of_x);
            small(&mut case.dy, of_x);
            small(&mut case.w, of_w);
            cases.push(case);
        }
    }
    check_cases(&cases);
}

/// What was found of the weights is forgotten when they change.
#[test]
fn weights_that_become_small_are_noticed() {
    let mut case = Case::new(3, 33, 5, (true, Compute::Bf16));
    check_cases(std::slice::from_ref(&case));
    let Data::Bf16(w) = case.w.data_mut() else { panic!("bf16 weights") };
    w.iter_mut().for_each(|w| *w = bf16::from_f32(w.to_f32() * 1e-36));
    case.x.as_f32_mut().iter_mut().for_each(|x| *x *= 1e-3);
    check_cases(&[case]);
}

#[test]
fn what_is_not_a_number_stays_so() {
    let [y] = {
        let mut case = Case::new(2, 40, 3, (true, Compute::Bf16));
        case.x.as_f32_mut()[33] = f32::NAN;
        case.x.as_f32_mut()[40 + 7] = f32::INFINITY;
        forward(&case.x, [&case.w], Compute::Bf16)
    };
    assert!(y.as_f32()[..3].iter().all(|y| y.is_nan()), "{y:?}");
    assert!(y.as_f32()[3..].iter().all(|y| y.is_infinite()), "{y:?}");
}

#[test]
fn nothing_comes_of_nothing() {
    check([(0, 5, 7)].into_iter());
}
