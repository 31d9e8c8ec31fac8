//! What AdamW's op is given: a step's figures, and of every parameter its gradient, its moments and its weight.

use std::sync::LazyLock;

use super::rows::Rows;

/// AdamW's figures for one step (Loshchilov and Hutter 2019; decoupled decay).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// First-moment decay.
    pub beta1: f32,
    /// Second-moment decay.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// 1, 2, 3...: for bias correction.
    pub step: u64,
    /// Factor on the gradient: the global-norm clip (and the accumulation's mean).
    pub grad_scale: f32,
    /// Of this step's draws: see [`Weight::Bf16`].
    pub key: [u32; 2],
}

impl AdamW {
    /// What the formula needs for every element, computed once, in f64: backends that share it agree to the bit.
    pub fn coefficients(&self) -> AdamWCoefficients {
        assert!(self.step > 0, "AdamW counts steps from 1");
        let (beta1, beta2, lr) = (f64::from(self.beta1), f64::from(self.beta2), f64::from(self.lr));
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        AdamWCoefficients {
            grad_scale: self.grad_scale,
            new1: (1.0 - beta1) as f32,
            beta2: self.beta2,
            new2: (1.0 - beta2) as f32,
            size: (lr / correction(beta1)) as f32,
            root_correction: correction(beta2).sqrt() as f32,
            eps: self.eps,
            key: self.key,
        }
    }

    /// The factor on a parameter with this decoupled weight decay: 1 - lr wd.
    pub fn keep(&self, weight_decay: f32) -> f32 {
        (1.0 - f64::from(self.lr) * f64::from(weight_decay)) as f32
    }
}

/// See [`AdamW::coefficients`]; with t the step and b1, b2 the decays. Laid out as `struct Step` of kernels/adamw.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::NoUninit)]
pub struct AdamWCoefficients {
    /// Factor on the gradient.
    pub grad_scale: f32,
    /// 1 - b1.
    pub new1: f32,
    /// b2.
    pub beta2: f32,
    /// 1 - b2.
    pub new2: f32,
    /// lr / (1 - b1^t).
    pub size: f32,
    /// sqrt(1 - b2^t).
    pub root_correction: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Of the draws.
    pub key: [u32; 2],
}

/// One parameter on its way through AdamW. All `[rows, cols]` of one shape.
pub struct Update<'a, T, C> {
    /// f32 or bf16 gradient; zeros afterwards.
    pub grad: &'a mut T,
    /// What of former gradients is known.
    pub moments: &'a mut Moments<T, C>,
    /// The parameter.
    pub weight: Weight<'a, T>,
    /// Decoupled weight decay of this parameter.
    pub weight_decay: f32,
}

/// Where an update's weight is.
pub enum Weight<'a, T> {
    /// In f32.
    F32(&'a mut T),
    /// In f32, its master; the parameter is bf16 and becomes that rounded to nearest even, or 0 below [`MIN_WEIGHT`].
    Master {
        /// f32.
        master: &'a mut T,
        /// bf16.
        copy: &'a mut T,
    },
    /// In bf16 alone. What the formula gives in f32 is rounded at random, to the neighbour away from zero with a probability
    /// of its distance from the other one in units of their distance (stochastic rounding, Gupta et al. 2015, "Deep Learning
    /// with Limited Numerical Precision"): its expectation is exact, so that updates too small for bf16 add up on average.
    /// The draw is [`Weight::counter`]'s. What is below [`MIN_WEIGHT`] then becomes 0.
    Bf16 {
        /// bf16.
        weight: &'a mut T,
        /// The parameter's number, which no other has.
        number: u32,
    },
}

impl<T> Weight<'_, T> {
    /// The counter of eight draws in block `block` of [`BLOCK`] elements of parameter `number`: half-word s, counted from the low
    /// end, of Philox over it are the 16 random bits of element 4 lane + s for s < 4, and of element 128 + 4 lane + s - 4 for
    /// the other four. So a warp whose lanes read 16 bytes at a time draws once for two such.
    pub fn counter(block: u32, lane: u32, number: u32) -> [u32; 4] {
        [32 * block + lane, number, 0, 0]
    }
}

/// The two moments of one parameter.
pub enum Moments<T, C> {
    /// As numbers, of the parameter's shape.
    F32 {
        /// The mean of gradients, f32.
        m: T,
        /// The mean of their squares, f32.
        v: T,
    },
    /// As codes of 8 bits, block by block (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv
    /// 2110.02861): element i of a block is its scale times a value of a [`DynamicCode`].
    Blockwise {
        /// The mean of gradients, in the signed code.
        m: Quantised<T, C>,
        /// The mean of their squares, in the unsigned code. No mean but 0, and those of a block without a larger one than
        /// 2^-125, has the code of 0, because m would be divided by eps alone (Li et al. 2023, "Memory Efficient Optimizers
        /// with 4-bit States", arXiv 2309.01507: the zero-point problem).
        v: Quantised<T, C>,
    },
}

/// A matrix in codes.
pub struct Quantised<T, C> {
    /// One for every element.
    pub codes: C,
    /// The largest magnitude of every block of [`BLOCK`] elements, row-major: `[1, blocks]`, f32.
    pub scales: T,
}

/// The least magnitude of a bf16 weight that AdamW writes, but for 0: 2^-56. Weights that begin at 0, as embeddings of tokens do
/// that no text holds, get updates of any size, and products of pairs on the CPU do without smaller numbers
/// ([`super::cpu::form`]); in a sum they count for nothing. The master keeps what is left out.
pub const MIN_WEIGHT: f32 = f32::from_bits((127 - 56) << 23);

/// Elements of a block, which have a scale in common; the last one of a matrix may have fewer.
pub const BLOCK: usize = 256;

/// A code of 8 bits for numbers from -1 to 1, or from 0 to 1, that is finer near 0: `dynamic tree quantization` of Dettmers
/// 2016, "8-Bit Approximations for Parallelism in Deep Learning" (arXiv 1511.04561), as `bitsandbytes` lays it out. The
/// decades from 1e-7..1e-6 to 0.1..1 are cut into 2^i (unsigned: 2^(i+1)) equal parts, i = 0 to 6, and their middles are values;
/// so are 0 and 1. Codes count values from the smallest. Laid out as `struct Code` of kernels/adamw.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, bytemuck::NoUninit)]
pub struct DynamicCode {
    /// The value of every code.
    pub values: [f32; 256],
    /// By magnitude, counted from 0: the middle between it and the next one; infinite behind the last.
    middles: [f32; 256],
    /// By the exponent and 7 bits of a number, counted from 2^-23: how many of `middles` are below all such numbers. Behind
    /// these lies at most one more that is below some.
    first: [u8; BUCKETS],
    /// The code of 0.
    zero: u32,
    /// The smallest magnitude of what is not 0.
    least: u32,
}

/// What numbers of a block with this scale are multiplied by to be encoded: 1 / scale, or 0 where that is not finite.
#[inline(always)]
pub fn inverse(scale: f32) -> f32 {
    const MIN_SCALE: f32 = f32::from_bits(2 << 23);
    if scale < MIN_SCALE { 0.0 } else { 1.0 / scale }
}

/// 2^-23 to 1 in steps of an exponent's 128th, rounded up to words.
const BUCKETS: usize = (23 * 128 + 1usize).next_multiple_of(4);
/// Exponent and 7 bits of 2^-23, which is less than half of any value but 0.
const FIRST_BUCKET: i32 = (127 - 23) * 128;

impl DynamicCode {
    /// From -1 to 1: -1 itself has no code.
    pub fn signed() -> &'static Self {
        static CODE: LazyLock<DynamicCode> = LazyLock::new(|| DynamicCode::new(true));
        &CODE
    }

    /// From 0 to 1.
    pub fn unsigned() -> &'static Self {
        static CODE: LazyLock<DynamicCode> = LazyLock::new(|| DynamicCode::new(false));
        &CODE
    }

    fn new(signed: bool) -> Self {
        let mut magnitudes = vec![0.0];
        for i in 0..7 {
            let parts = 1 << if signed { i } else { i + 1 };
            let middle = |k| 0.1 + 0.9 * (f64::from(k) + 0.5) / f64::from(parts);
            magnitudes.extend((0..parts).map(|k| (middle(k) * 10f64.powi(i - 6)) as f32));
        }
        magnitudes.push(1.0);
        let negative = magnitudes[1..magnitudes.len() - 1].iter().rev().map(|x| -x);
        let negative: Vec<f32> = if signed { negative.collect() } else { Vec::new() };
        let zero = negative.len();
        let values: Vec<f32> = negative.into_iter().chain(magnitudes.iter().copied()).collect();
        let mut middles = [f32::INFINITY; 256];
        for (middle, pair) in middles.iter_mut().zip(magnitudes.windows(2)) {
            *middle = (pair[0] + pair[1]) / 2.0;
        }
        let mut first = [0; BUCKETS];
        for (bucket, first) in first.iter_mut().enumerate() {
            let least = f32::from_bits(((FIRST_BUCKET as usize + bucket) as u32) << 16);
            *first = middles.partition_point(|&middle| middle < least) as u8;
        }
        let values = values.try_into().expect("256 values");
        Self { values, middles, first, zero: zero as u32, least: u32::from(!signed) }
    }

    /// The code of the value nearest to x, from -1 to 1; that of the smaller magnitude if two are. The unsigned code of a positive
    /// x is never that of 0.
    #[inline(always)]
    pub fn nearest(&self, x: f32) -> u8 {
        let size = x.abs();
        let bucket = (size.to_bits() >> 16) as i32 - FIRST_BUCKET;
        let first = u32::from(self.first[bucket.clamp(0, BUCKETS as i32 - 1) as usize]);
        let magnitude = first + u32::from(size > self.middles[first as usize & 255]);
        let magnitude = magnitude.max(if size > 0.0 { self.least } else { 0 });
        (if x < 0.0 { self.zero - magnitude.min(self.zero) } else { self.zero + magnitude }) as u8
    }
}

/// AdamW, and what it begins with.
pub trait Optimize: Rows {
    /// [`Rows::widened`] to the host's memory, as [`host_zeros`](super::Platform::host_zeros).
    fn host_widened(&self, x: &Self::Tensor) -> Self::Tensor {
        self.widened(x)
    }
    /// One update of every parameter; its gradient is zero afterwards. With g the gradient times `grad_scale` and t the step:
    /// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    /// p = p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Self::Tensor, Self::Codes>]);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest value of all, the first among equals by magnitude.
    fn searched(code: &DynamicCode, x: f32) -> u8 {
        let distance = |c: u8| (f64::from(code.values[usize::from(c)]) - f64::from(x)).abs();
        let order = |a: &u8, b: &u8| {
            let size = |c: u8| code.values[usize::from(c)].abs();
            distance(*a).total_cmp(&distance(*b)).then(size(*a).total_cmp(&size(*b)))
        };
        (0..=255).min_by(order).expect("256 codes")
    }

    #[test]
    fn values_ascend_and_stand_where_they_are_known_to() {
        for (code, zero) in [(DynamicCode::signed(), 127), (DynamicCode::unsigned(), 0)] {
            assert!(code.values.is_sorted_by(|a, b| a < b));
            assert_eq!((code.values[zero], code.values[255]), (0.0, 1.0));
        }
        let (signed, unsigned) = (&DynamicCode::signed().values, &DynamicCode::unsigned().values);
        assert_eq!((signed[128], signed[0]), (0.55e-6, -0.992_968_75));
        assert_eq!((unsigned[1], unsigned[254]), (0.325e-6, 0.996_484_4));
    }

    #[test]
    fn the_nearest_value_is_found() {
        for (code, signed) in [(DynamicCode::signed(), true), (DynamicCode::unsigned(), false)] {
            // Every edge of a bucket, every value and every middle, and the numbers beside them.
            let edges =
                (0..BUCKETS as u32).map(|bucket| f32::from_bits((FIRST_BUCKET as u32 + bucket) << 16));
            let all = edges.chain(code.values).chain(code.middles).filter(|x| (0.0..=1.0).contains(x));
            for x in all.flat_map(|x| [x.next_down().max(0.0), x, x.next_up().min(1.0)]) {
                for x in if signed { vec![x, -x] } else { vec![x] } {
                    let (found, want) = (code.nearest(x), searched(code, x));
                    // A middle is rounded to f32: x beside it may be as near to either, as far as f32 tells.
                    let near = |c: u8| (code.values[usize::from(c)] - x).abs();
                    let equal = (near(found) - near(want)).abs() <= f32::EPSILON * x.abs();
                    let lifted = !signed && x > 0.0 && want == 0 && found == 1;
                    assert!(found == want || equal || lifted, "{x:e}: {found}, not {want}");
                }
            }
        }
    }
}
