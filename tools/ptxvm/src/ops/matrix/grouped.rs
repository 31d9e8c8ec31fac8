//! Float products summed as tensor cores sum them: in groups of k, aligned, cut off and truncated.
//!
//! # The model
//! A group is some neighbouring products of a row of A and a column of B, and the accumulator. With e(x) the exponent of
//! a number as it is stored (that of the smallest normal number where x is subnormal) and s(x) its significand:
//!
//! 1. A product is s(a) s(b) 2^(e(a) + e(b)), exact and not normalised: its significand lies in \[0, 4).
//! 2. E is the largest exponent of the group: of e(a) + e(b) over the products, and e(c).
//! 3. Each term is cut off below 2^(E - F), towards zero, and all are added exactly.
//! 4. The sum is rounded to f32 towards zero; beyond the largest f32 it is infinite. A sum of zero is +0.
//!
//! | | products of a group, 16-bit factors | tf32 | F |
//! |---|---|---|---|
//! | Ampere, Ada (sm_80, 86, 89) | 8 | 4 | 24 |
//! | Hopper (sm_90) | 16 | 8 | 25 |
//!
//! A deeper product is a chain of groups, k ascending: on Ampere `m16n8k16` adds k = 0..8 to C, then k = 8..16 to that.
//!
//! # Sources
//! NVIDIA documents none of this. That products are exact, aligned to the largest exponent of products and accumulator,
//! added without normalisation in between, and truncated: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of
//! NVIDIA tensor cores", PeerJ Computer Science 7:e330 (2021), by experiments on V100, T4 and A100. One bit more than
//! f32 has on Ampere and at least two on Hopper: Li, Li, Fang, Swirydowicz, Laguna and Gopalakrishnan, "FTTN:
//! feature-targeted testing for numerical properties of NVIDIA and AMD matrix accelerators" (2024, arXiv:2403.00232).
//! Sizes of groups, F and their order: Xie, Wang, Yang and Yang, "MMA-Sim: bit-accurate reference model of tensor cores
//! and matrix cores" (2025, arXiv:2511.10909), and Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores" (2025,
//! arXiv:2512.07004), who compared their models with GPUs on random inputs.
//!
//! # Uncertain
//! What those studies tried least: which exponent a product with a factor of zero has in step 2 (here 0 counts as
//! exponent -126 in every type, as in MMA-Sim; it shows only where all terms are tiny), sums beyond the largest f32, and
//! the sign of a sum of zero. Whether an element's sum is the same at every place of a tile is taken for granted.

use super::layout::Fragment;
use super::number::{Bf16, Elem, F16, Floats, Tf32, Widen};
use super::tile::{Kernel, Plan, Tile, TileF32, left, right};
#[cfg(target_arch = "x86_64")]
use super::vectors::Avx2;
use super::vectors::{Plain, Vectors};
use crate::machine::inst::Inst;
use crate::machine::isa::Isa;
use crate::machine::registers::{LANES, Registers};

/// Most blocks along k of a product that is summed in groups.
const BLOCKS: usize = 2;

/// How a generation groups and aligns: blocks of k (8 of 16-bit factors, 4 of tf32) of a group, and F.
pub(super) trait Generation {
    const BLOCKS: usize;
    const FRACTION: u32;
}

pub(super) struct Ampere;
impl Generation for Ampere {
    const BLOCKS: usize = 1;
    const FRACTION: u32 = 24;
}

pub(super) struct Hopper;
impl Generation for Hopper {
    const BLOCKS: usize = 2;
    const FRACTION: u32 = 25;
}

/// A factor's type, for taking its numbers apart.
pub(super) trait Factor: Widen<X = f32> {
    /// Bits of the significand behind the point.
    const FRACTION: u32;
    /// Exponent of the smallest normal number.
    const MIN_EXPONENT: i32;
}
impl Factor for Bf16 {
    const FRACTION: u32 = 7;
    const MIN_EXPONENT: i32 = -126;
}
impl Factor for F16 {
    const FRACTION: u32 = 10;
    const MIN_EXPONENT: i32 = -14;
}
impl Factor for Tf32 {
    const FRACTION: u32 = 10;
    const MIN_EXPONENT: i32 = -126;
}

/// The product of a variant as `G` sums it, if it is one that tensor cores sum in known groups and in f32.
pub(super) fn kernel<G: Generation>(isa: Isa, a: Elem, b: Elem, c: Elem, d: Elem) -> Option<Kernel> {
    match (a, b, c, d) {
        (Elem::F16, Elem::F16, Elem::F32, Elem::F32) => Some(compiled::<F16, G, 8>(isa)),
        (Elem::Bf16, Elem::Bf16, Elem::F32, Elem::F32) => Some(compiled::<Bf16, G, 8>(isa)),
        (Elem::Tf32, Elem::Tf32, Elem::F32, Elem::F32) => Some(compiled::<Tf32, G, 4>(isa)),
        _ => None,
    }
}

/// The product, compiled for an instruction set.
fn compiled<W: Factor, G: Generation, const KE: usize>(isa: Isa) -> Kernel {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma,bmi1,bmi2,popcnt,lzcnt,f16c")]
        fn avx2<W: Factor, G: Generation, const KE: usize>(plan: &Plan, regs: &mut Registers, inst: &Inst) {
            product::<W, G, Avx2, KE>(plan, regs, inst);
        }
        if isa >= Isa::Avx2 {
            // SAFETY: `Isa::Avx512` and `Isa::Avx2` are made by `detect` alone, which has seen the features.
            return |plan, regs, inst| unsafe { avx2::<W, G, KE>(plan, regs, inst) };
        }
    }
    let _ = isa;
    product::<W, G, Plain, KE>
}

/// A block of a factor taken apart: 8 rows of `KE` of A, or `KE` rows of 8 of B.
#[derive(Clone, Copy)]
struct Parts<const COLS: usize, const ROWS: usize> {
    value: [[f32; COLS]; ROWS],
    exponent: [[i32; COLS]; ROWS],
    /// Signed, with `Factor::FRACTION` bits behind the point, shifted up further where the caller asks for it.
    significand: [[i32; COLS]; ROWS],
    /// Whether there is an infinity or a NaN.
    special: bool,
}

impl<const COLS: usize, const ROWS: usize> Parts<COLS, ROWS> {
    const NONE: Self = Self {
        value: [[0.0; COLS]; ROWS],
        exponent: [[0; COLS]; ROWS],
        significand: [[0; COLS]; ROWS],
        special: false,
    };

    #[inline(always)]
    fn of<W: Factor>(value: [[f32; COLS]; ROWS], shift: u32) -> Self {
        let mut parts = Self { value, ..Self::NONE };
        let mut largest = 0;
        for row in 0..ROWS {
            for col in 0..COLS {
                let bits = value[row][col].to_bits();
                let (exponent, significand) = apart(bits, W::MIN_EXPONENT);
                largest = largest.max(bits << 1);
                parts.exponent[row][col] = exponent;
                // What is cut here is zero: the type has no more bits.
                let short = (significand >> (23 - W::FRACTION)) << shift;
                parts.significand[row][col] = if bits >> 31 != 0 { -(short as i32) } else { short as i32 };
            }
        }
        parts.special = largest >= 0xff00_0000;
        parts
    }
}

/// Exponent and significand, with 23 bits behind the point, of an f32's magnitude that came from a type whose smallest
/// normal number has the exponent `least`.
#[inline(always)]
fn apart(bits: u32, least: i32) -> (i32, u32) {
    let field = (bits >> 23 & 0xff) as i32;
    let exponent = field.max(1) - 127;
    let significand = bits & 0x7f_ffff | u32::from(field != 0) << 23;
    let below = (least - exponent).max(0);
    if bits << 1 == 0 { (-126, 0) } else { (exponent + below, significand >> below.min(31)) }
}

#[inline(always)]
fn product<W: Factor, G: Generation, M: Vectors, const KE: usize>(
    plan: &Plan,
    regs: &mut Registers,
    inst: &Inst,
) {
    const { assert!(KE == 4 * W::E && 2 * W::FRACTION <= G::FRACTION) };
    let Plan { parts: [fa, fb, fc, fd], .. } = *plan;
    let (a, b, c) = plan.sources(inst);
    let blocks = usize::from(fa.k_blocks());
    assert!(blocks <= BLOCKS, "a product of {blocks} blocks along k");
    let shift = G::FRACTION - 2 * W::FRACTION;
    // D's registers may be the factors' too: nothing is written before all is read.
    let mut out = [[0u32; LANES]; 8];
    let of_b = |fb: &Fragment, regs: &Registers, col, k: usize| {
        Parts::of::<W>(right::<Floats<W, W>, M, KE>(regs.get::<u32>(b[usize::from(fb.b(col, k as u8))])), 0)
    };
    for row in 0..fa.shape.m / 8 {
        let mut lefts = [Parts::<KE, 8>::NONE; BLOCKS];
        for (k, part) in lefts.iter_mut().enumerate().take(blocks) {
            let words = regs.get::<u32>(a[usize::from(fa.a(row, k as u8))]);
            *part = Parts::of::<W>(left::<Floats<W, W>, M, KE>(words), shift);
        }
        for col in 0..fa.shape.n / 8 {
            let mut acc = TileF32::load::<M>(regs, &c[usize::from(fc.c(row, col))..]);
            for first in (0..blocks).step_by(G::BLOCKS) {
                let mut rights = [Parts::<8, KE>::NONE; BLOCKS];
                let depth = G::BLOCKS.min(blocks - first);
                for (k, part) in rights.iter_mut().enumerate().take(depth) {
                    *part = of_b(&fb, regs, col, first + k);
                }
                sum::<G, KE>(&lefts[first..first + depth], &rights[..depth], &mut acc);
            }
            TileF32::store::<M>(&acc, &mut out[usize::from(fd.c(row, col))..][..2]);
        }
    }
    for (i, reg) in inst.regs[..usize::from(inst.dsts)].iter().enumerate() {
        regs.set::<u32>(*reg, u32::MAX, &out[i]);
    }
}

/// Adds one group to each of the 8 x 8 accumulators.
#[inline(always)]
fn sum<G: Generation, const KE: usize>(left: &[Parts<KE, 8>], right: &[Parts<8, KE>], acc: &mut [f32; 64]) {
    let special = left.iter().any(|part| part.special) || right.iter().any(|part| part.special);
    for (row, acc) in acc.chunks_exact_mut(8).enumerate() {
        let start: [f32; 8] = std::array::from_fn(|n| acc[n]);
        let mut largest = [0; 8];
        let mut of_c = [0; 8];
        for n in 0..8 {
            (largest[n], of_c[n]) = apart(start[n].to_bits(), -126);
        }
        let exponent_of_c = largest;
        for (a, b) in left.iter().zip(right) {
            for (e, others) in a.exponent[row].iter().zip(&b.exponent) {
                for n in 0..8 {
                    largest[n] = largest[n].max(e + others[n]);
                }
            }
        }
        // 16 products below 2^27 stay below 2^31: significands are below 2.
        let mut sums = [0i32; 8];
        for (a, b) in left.iter().zip(right) {
            let factors = a.exponent[row].iter().zip(&a.significand[row]);
            for ((e, s), (exponents, significands)) in factors.zip(b.exponent.iter().zip(&b.significand)) {
                for n in 0..8 {
                    let product = s * significands[n];
                    let below = (largest[n] - (e + exponents[n])).min(31);
                    let kept = (product.unsigned_abs() >> below) as i32;
                    sums[n] += if product < 0 { -kept } else { kept };
                }
            }
        }
        for n in 0..8 {
            let below = (largest[n] - exponent_of_c[n]).min(31);
            let kept = f64::from((of_c[n] << (G::FRACTION - 23)) >> below);
            let all = f64::from(sums[n]) + if start[n].to_bits() >> 31 != 0 { -kept } else { kept };
            acc[n] = truncate(all, largest[n] - G::FRACTION as i32);
        }
        if special || start.iter().any(|x| !x.is_finite()) {
            for n in 0..8 {
                // Finite terms never leave the range of f64: what is not finite here has a term that is not.
                let mut all = f64::from(start[n]);
                for (a, b) in left.iter().zip(right) {
                    for (x, others) in a.value[row].iter().zip(&b.value) {
                        all += f64::from(*x) * f64::from(others[n]);
                    }
                }
                if !all.is_finite() {
                    acc[n] = all as f32;
                }
            }
        }
    }
}

/// `x` 2^`exponent` as f32, towards zero; beyond the largest, infinite. `x` is an integer below 2^32.
#[inline(always)]
fn truncate(x: f64, exponent: i32) -> f32 {
    const fn power(exponent: i32) -> f64 {
        f64::from_bits(((exponent + 1023) as u64) << 52)
    }
    let exact = x * power(exponent);
    // A normal f32 has 24 bits, 29 less than an f64; a subnormal one is a multiple of 2^-149.
    let normal = f64::from_bits(exact.to_bits() & !((1 << 29) - 1));
    let subnormal = (exact * power(149)).trunc() * power(-149);
    // Adding zero makes -0 of a cut term +0.
    (if exact.abs() < power(-126) { subnormal } else { normal } + 0.0) as f32
}
