//! AdamW (Loshchilov and Hutter 2019), with PyTorch's order of operations.

use std::sync::LazyLock;

use half::bf16;
use rayon::prelude::*;

use super::form::without_small;
use super::packed::{pack_panels, unpack_panels};
use super::simd::{LANES, bf16_from_f32, f32_from_bf16, multiversion};
use super::sums::Sums;
use super::{Cpu, Data, Tensor};
use crate::backend::adamw::{BLOCK, inverse};
use crate::backend::{AdamW, AdamWCoefficients, DynamicCode, Moments, Optimize, Quantised, Update, Weight};
use crate::rng::{PHILOX_ROUNDS, philox_next_key, philox_round};

/// Elements per task, whole [`BLOCK`]s.
const CHUNK: usize = 256 * BLOCK;

/// Codes of 8 bits.
pub type Codes = Vec<u8>;

/// Consecutive elements of one parameter.
struct Chunk<'a> {
    grad: Sums<'a>,
    moments: MomentsChunk<'a>,
    weight: WeightChunk<'a>,
    /// Columns, where bf16 weights are packed: the chunk is then whole panels.
    packed: Option<usize>,
    keep: f32,
}

enum MomentsChunk<'a> {
    F32([&'a mut [f32]; 2]),
    Blockwise([QuantisedChunk<'a>; 2]),
}

struct QuantisedChunk<'a> {
    code: &'static DynamicCode,
    nearest: &'static Nearest,
    codes: &'a mut [u8],
    scales: &'a mut [f32],
}

enum WeightChunk<'a> {
    F32(&'a mut [f32]),
    Master { master: &'a mut [f32], copy: &'a mut [bf16] },
    Bf16 { weight: &'a mut [bf16], first: usize, number: u32 },
}

#[inline(always)]
fn update(c: AdamWCoefficients, keep: f32, grad: &[f32], p: &mut [f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(grad) {
        let g = g * c.grad_scale;
        *m = c.new1.mul_add(g - *m, *m);
        *v = c.beta2.mul_add(*v, c.new2 * g * g);
        let denominator = v.sqrt() / c.root_correction + c.eps;
        *p = (-c.size).mul_add(*m / denominator, *p * keep);
    }
}

#[inline(always)]
fn decode(code: &DynamicCode, codes: &[u8], scale: f32, x: &mut [f32]) {
    for (x, &c) in x.iter_mut().zip(codes) {
        *x = code.values[usize::from(c)] * scale;
    }
}

/// [`DynamicCode::nearest`] for all of a block: one word is looked up for each element, where that function looks up two bytes one
/// after the other, and all else is the same for all elements.
struct Nearest {
    /// By the exponent and 7 bits of a magnitude, counted from 2^-23: the code of the least of such magnitudes, and in the lower
    /// half the largest lower half of a magnitude that has that code. Those beyond have the next code, since no two middles between
    /// values are so near to each other.
    entries: [u32; ENTRIES],
    /// The code of 0.
    zero: u32,
}

/// 2^-23, below which every magnitude has the code of the next above 0 or of 0, to 1, in steps of an exponent's 128th.
const FIRST: u32 = (127 - 23) * 128;
const LAST: u32 = 23 * 128;
/// A power of two, so that no index is out of bounds.
const ENTRIES: usize = (LAST as usize + 1).next_power_of_two();

impl Nearest {
    fn signed() -> &'static Self {
        static NEAREST: LazyLock<Nearest> = LazyLock::new(|| Nearest::new(DynamicCode::signed()));
        &NEAREST
    }

    fn unsigned() -> &'static Self {
        static NEAREST: LazyLock<Nearest> = LazyLock::new(|| Nearest::new(DynamicCode::unsigned()));
        &NEAREST
    }

    fn new(code: &DynamicCode) -> Self {
        let mut entries = [0; ENTRIES];
        for (bucket, entry) in (FIRST..=FIRST + LAST).zip(&mut entries) {
            let of = |half: u32| code.nearest(f32::from_bits(bucket << 16 | half));
            let (mut same, mut beyond) = (0, 1 << 16);
            while beyond - same > 1 {
                let middle = same + (beyond - same) / 2;
                *if of(middle) == of(0) { &mut same } else { &mut beyond } = middle;
            }
            *entry = u32::from(of(0)) << 16 | same;
        }
        Self { entries, zero: code.nearest(0.0).into() }
    }

    /// The codes of `factor` x.
    #[inline(always)]
    fn codes(&self, x: &[f32; BLOCK], factor: f32) -> [u8; BLOCK] {
        let (mut bits, mut found, mut codes) = ([0; BLOCK], [0; BLOCK], [0; BLOCK]);
        for (bits, x) in bits.iter_mut().zip(x) {
            *bits = (x * factor).to_bits();
        }
        for (found, bits) in found.iter_mut().zip(&bits) {
            let bucket = (bits & MAGNITUDE) >> 16;
            *found = self.entries[(bucket.max(FIRST) - FIRST).min(LAST) as usize % ENTRIES];
        }
        for ((code, bits), found) in codes.iter_mut().zip(&bits).zip(&found) {
            let magnitude = bits & MAGNITUDE;
            let above = (found >> 16) + u32::from(bits & 0xffff > found & 0xffff) - self.zero;
            let above = if magnitude == 0 { 0 } else { above };
            // A NaN is not below 0.
            let negative = bits >> 31 == 1 && magnitude <= INFINITE;
            *code = (if negative { self.zero - above.min(self.zero) } else { self.zero + above }) as u8;
        }
        codes
    }
}

/// The bits of a number but for its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;
const INFINITE: u32 = 0x7f80_0000;

/// Returns the scale; x is zero beyond the codes.
#[inline(always)]
fn encode(nearest: &Nearest, x: &[f32; BLOCK], codes: &mut [u8]) -> f32 {
    // As whole numbers magnitudes have the same order.
    let scale = f32::from_bits(x.iter().fold(0, |largest, x| (x.to_bits() & MAGNITUDE).max(largest)));
    codes.copy_from_slice(&nearest.codes(x, inverse(scale))[..codes.len()]);
    scale
}

/// The 16 random bits of every element of a block of [`Weight::Bf16`].
#[inline(always)]
fn random_bits(block: usize, number: u32, key: [u32; 2]) -> [u32; BLOCK] {
    const LANES: usize = BLOCK / 8;
    // Philox of all lanes round by round, so that it vectorises.
    let [mut c0, mut c1, mut c2, mut c3] = [[0; LANES]; 4];
    for l in 0..LANES {
        [c0[l], c1[l], c2[l], c3[l]] = Weight::<Tensor>::counter(block as u32, l as u32, number);
    }
    let mut k = key;
    for _ in 0..PHILOX_ROUNDS {
        for l in 0..LANES {
            [c0[l], c1[l], c2[l], c3[l]] = philox_round([c0[l], c1[l], c2[l], c3[l]], k);
        }
        k = philox_next_key(k);
    }
    let mut bits = [0; BLOCK];
    for l in 0..LANES {
        for (s, word) in [c0[l], c1[l], c2[l], c3[l]].into_iter().enumerate() {
            let at = BLOCK / 2 * (s / 2) + 4 * l + 2 * (s % 2);
            (bits[at], bits[at + 1]) = (word & 0xffff, word >> 16);
        }
    }
    bits
}

multiversion! {
    fn update_chunk(c: AdamWCoefficients, chunk: &mut Chunk) {
        for block in 0..chunk.grad.len().div_ceil(BLOCK) {
            let range = block * BLOCK..chunk.grad.len().min((block + 1) * BLOCK);
            let n = range.len();
            let Chunk { grad, moments, weight, keep, .. } = &mut *chunk;
            let mut widened_grad = [0.0; BLOCK];
            let grad = match grad {
                Sums::F32(grad) => &mut grad[range.clone()],
                Sums::Bf16(grad) => {
                    for (wide, g) in widened_grad.iter_mut().zip(&mut grad[range.clone()]) {
                        *wide = f32_from_bf16(*g);
                        *g = bf16::ZERO;
                    }
                    &mut widened_grad[..n]
                }
            };
            let mut decoded = [[0.0; BLOCK]; 2];
            let [m, v] = match moments {
                MomentsChunk::F32(both) => both.each_mut().map(|x| &mut x[range.clone()]),
                MomentsChunk::Blockwise(both) => {
                    for (x, q) in decoded.iter_mut().zip(&*both) {
                        decode(q.code, &q.codes[range.clone()], q.scales[block], x);
                    }
                    decoded.each_mut().map(|x| &mut x[..n])
                }
            };
            let mut widened = [0.0; BLOCK];
            let p = match &mut *weight {
                WeightChunk::F32(p) | WeightChunk::Master { master: p, .. } => &mut p[range.clone()],
                WeightChunk::Bf16 { weight, .. } => {
                    for (p, w) in widened.iter_mut().zip(&weight[range.clone()]) {
                        *p = f32_from_bf16(*w);
                    }
                    &mut widened[..n]
                }
            };
            update(c, *keep, grad, p, m, v);
            grad.fill(0.0);
            match weight {
                WeightChunk::F32(_) => {}
                WeightChunk::Master { master, copy } => {
                    for (copy, p) in copy[range.clone()].iter_mut().zip(&master[range.clone()]) {
                        *copy = without_small(bf16_from_f32(*p));
                    }
                }
                WeightChunk::Bf16 { weight, first, number } => {
                    let bits = random_bits(*first + block, *number, c.key);
                    for ((w, p), bits) in weight[range.clone()].iter_mut().zip(&widened).zip(&bits) {
                        *w = without_small(bf16::from_bits((p.to_bits().wrapping_add(*bits) >> 16) as u16));
                    }
                }
            }
            if let MomentsChunk::Blockwise(both) = moments {
                for (x, q) in decoded.iter().zip(both) {
                    q.scales[block] = encode(q.nearest, x, &mut q.codes[range.clone()]);
                }
            }
        }
    }
}

/// [`update_chunk`] of weights that lie in panels, on a row-major copy.
fn update_packed(c: AdamWCoefficients, chunk: Chunk, cols: usize) {
    let Chunk { grad, moments, weight, packed, keep } = chunk;
    let mut rows = vec![bf16::ZERO; grad.len()];
    let (panels, weight) = match weight {
        WeightChunk::F32(_) => unreachable!("f32 weights are not packed"),
        WeightChunk::Master { master, copy } => (copy, WeightChunk::Master { master, copy: &mut rows }),
        WeightChunk::Bf16 { weight, first, number } => {
            unpack_panels(weight, cols, &mut rows);
            (weight, WeightChunk::Bf16 { weight: &mut rows, first, number })
        }
    };
    update_chunk(c, &mut Chunk { grad, moments, weight, packed, keep });
    pack_panels(&rows, cols, panels);
}

/// Whether the bf16 weights are packed.
fn is_packed(weight: &Weight<Tensor>) -> bool {
    let (Weight::Master { copy: weight, .. } | Weight::Bf16 { weight, .. }) = weight else { return false };
    matches!(weight.data(), Data::Packed(_))
}

fn chunks_of<T>(x: &mut [T], len: usize) -> Vec<&mut [T]> {
    x.chunks_mut(len).collect()
}

fn as_f32(x: &mut Tensor, shape: (usize, usize)) -> &mut [f32] {
    assert_eq!((x.rows, x.cols), shape);
    x.as_f32_mut()
}

fn as_bf16(x: &mut Tensor, shape: (usize, usize)) -> &mut [bf16] {
    assert_eq!((x.rows, x.cols), shape);
    let (Data::Bf16(x) | Data::Packed(x)) = x.data_mut() else {
        panic!("a weight beside or without a master is bf16")
    };
    x
}

fn quantised<'a>(
    x: &'a mut Quantised<Tensor, Codes>,
    (code, nearest): (&'static DynamicCode, &'static Nearest),
    (rows, cols): (usize, usize),
    chunk: usize,
) -> Vec<QuantisedChunk<'a>> {
    assert_eq!(x.codes.len(), rows * cols, "a code of every element");
    let scales = as_f32(&mut x.scales, (1, (rows * cols).div_ceil(BLOCK)));
    let both = x.codes.chunks_mut(chunk).zip(scales.chunks_mut(chunk / BLOCK));
    both.map(|(codes, scales)| QuantisedChunk { code, nearest, codes, scales }).collect()
}

impl Optimize for Cpu {
    fn adamw(&self, hyper: &AdamW, updates: &mut [Update<Tensor, Vec<u8>>]) {
        let c = hyper.coefficients();
        let mut chunks = Vec::new();
        for u in updates {
            let shape = (u.grad.rows, u.grad.cols);
            let packed = is_packed(&u.weight).then_some(shape.1);
            // Whole panels of whole blocks.
            let chunk = packed.map_or(CHUNK, |cols| CHUNK.next_multiple_of(LANES * cols));
            let f32_of = |x| chunks_of(as_f32(x, shape), chunk);
            let keep = hyper.keep(u.weight_decay);
            let moments: Vec<MomentsChunk> = match u.moments {
                Moments::F32 { m, v } => {
                    f32_of(m).into_iter().zip(f32_of(v)).map(|(m, v)| MomentsChunk::F32([m, v])).collect()
                }
                Moments::Blockwise { m, v } => {
                    let m = quantised(m, (DynamicCode::signed(), Nearest::signed()), shape, chunk);
                    let v = quantised(v, (DynamicCode::unsigned(), Nearest::unsigned()), shape, chunk);
                    m.into_iter().zip(v).map(|(m, v)| MomentsChunk::Blockwise([m, v])).collect()
                }
            };
            let weight: Vec<WeightChunk> = match &mut u.weight {
                Weight::F32(weight) => f32_of(weight).into_iter().map(WeightChunk::F32).collect(),
                Weight::Master { master, copy } => {
                    let both = f32_of(master).into_iter().zip(chunks_of(as_bf16(copy, shape), chunk));
                    both.map(|(master, copy)| WeightChunk::Master { master, copy }).collect()
                }
                Weight::Bf16 { weight, number } => {
                    let weights = chunks_of(as_bf16(weight, shape), chunk).into_iter().enumerate();
                    let of =
                        |(i, weight)| WeightChunk::Bf16 { weight, first: i * chunk / BLOCK, number: *number };
                    weights.map(of).collect()
                }
            };
            let all = Sums::of(u.grad).chunks(chunk).into_iter().zip(moments).zip(weight);
            chunks.extend(all.map(|((grad, moments), weight)| Chunk { grad, moments, weight, packed, keep }));
        }
        chunks.into_par_iter().for_each(|chunk| match chunk.packed {
            Some(cols) => update_packed(c, chunk, cols),
            None => update_chunk(c, &mut { chunk }),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_encoded_as_its_elements_are() {
        for (code, nearest) in
            [(DynamicCode::signed(), Nearest::signed()), (DynamicCode::unsigned(), Nearest::unsigned())]
        {
            // Every bucket from below the first to above the last: its ends, and where its code changes, with the numbers
            // beside that.
            let mut all: Vec<u32> = vec![0, 1, 0x007f_ffff, 0x3f80_0001, INFINITE - 1, INFINITE];
            for bucket in FIRST - 300..FIRST + LAST + 10 {
                let entry = nearest.entries[(bucket.max(FIRST) - FIRST).min(LAST) as usize];
                let change = entry & 0xffff;
                let halves = [0, 1, 0xffff, change.saturating_sub(1), change, (change + 1).min(0xffff)];
                all.extend(halves.map(|half| bucket << 16 | half));
            }
            all.extend(code.values.map(|value| value.to_bits() & MAGNITUDE));
            let signs = if code.values[0] < 0.0 { &[1.0, -1.0][..] } else { &[1.0] };
            for sign in signs {
                for part in all.chunks(BLOCK) {
                    let mut x = [0.0; BLOCK];
                    x.iter_mut().zip(part).for_each(|(x, bits)| *x = sign * f32::from_bits(*bits));
                    let want = x.map(|x| code.nearest(x));
                    assert_eq!(nearest.codes(&x, 1.0), want, "{sign} {part:x?}");
                }
            }
            assert_eq!(nearest.codes(&[f32::NAN; BLOCK], 1.0), [code.nearest(f32::NAN); BLOCK]);
            assert_eq!(nearest.codes(&[-0.0; BLOCK], 1.0), [code.nearest(0.0); BLOCK]);
        }
    }
}
