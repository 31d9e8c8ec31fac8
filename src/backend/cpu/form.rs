//! How the operands of a matrix product are rounded and laid out.
//!
//! With [`Compute::Bf16`] both operands are bf16, products are exact in f32, and sums are f32: terms come in pairs, the
//! odd one of a pair is added before the even one, each with one rounding. That is what VDPBF16PS computes, and what
//! all other paths reproduce. The instruction differs in one thing: it takes subnormal numbers for zero. So
//! activations below [`SMALL`] become zero where they are rounded, so do weights where AdamW rounds them, and products with a
//! matrix of a checkpoint that holds smaller ones do without the instruction: elsewhere every partial sum is a multiple of
//! 2^-126, the least normal number, because a product of two numbers of at least 2^-56 with 8 significant bits is a multiple of
//! 2^(-56 - 7 - 56 - 7).

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;

use super::packed::{unpack_columns, unpacked_rows};
use super::simd::{Isa, LANES, Simd, bf16_from_f32, f32_from_bf16, isa, multiversion};
use super::tasks::filled;
use super::{Data, Tensor};
use crate::backend::adamw::MIN_WEIGHT;
use crate::backend::{Compute, DType};

/// The least magnitude of a bf16 operand that is not zero: 2^-56.
pub const SMALL: f32 = MIN_WEIGHT;

/// Rows that a task rounds.
const BLOCK: usize = 48;

/// Bytes in a line of the cache.
pub(super) const LINE: usize = 64;

/// The operands of one product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// f32, a term after the other.
    F32,
    /// bf16 as f32, the odd term of a pair before the even one.
    Widened,
    /// bf16, a pair of terms in the place of one f32, for VDPBF16PS.
    Pairs,
}

impl Form {
    /// Of activations and matrices of one type.
    pub(super) fn with_weights(compute: Compute, w: &[&Tensor]) -> Self {
        let dtype = w[0].dtype();
        assert!(w.iter().all(|w| w.dtype() == dtype), "matrices of one type");
        match Self::of_activations(compute) {
            _ if dtype == DType::F32 => Self::F32,
            Self::Pairs if w.iter().any(|w| w.has_small()) => Self::Widened,
            form => form,
        }
    }

    /// Of activations alone.
    pub(super) fn of_activations(compute: Compute) -> Self {
        match compute {
            Compute::F32 => Self::F32,
            Compute::Bf16 if isa() == Isa::Avx512Bf16 => Self::Pairs,
            Compute::Bf16 => Self::Widened,
        }
    }

    /// Floats that hold `terms` terms of one element; the last pair may be half empty.
    pub(super) fn steps(self, terms: usize) -> usize {
        match self {
            Self::F32 => terms,
            Self::Widened => terms.next_multiple_of(2),
            Self::Pairs => terms.div_ceil(2),
        }
    }
}

/// Bytes of an operand's term as products with bf16 weights take it (f32 ones where `compute` says so).
pub fn term_bytes(compute: Compute) -> usize {
    Form::of_activations(compute).steps(2) * size_of::<f32>() / 2
}

/// What operands are made of.
pub(super) trait Term: Copy {
    /// In [`Form::F32`].
    fn wide(self) -> f32;
    /// The bits of a bf16 in the other forms.
    fn rounded(self) -> u16;
    /// As many as 32 bits hold, or less and zeros.
    fn word(x: &[Self]) -> f32;
}

impl Term for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }

    /// The nearest, or zero below [`SMALL`].
    #[inline(always)]
    fn rounded(self) -> u16 {
        without_small(bf16_from_f32(self)).to_bits()
    }

    #[inline(always)]
    fn word(x: &[Self]) -> f32 {
        x[0]
    }
}

impl Term for bf16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32_from_bf16(self)
    }

    /// Weights are bf16 already.
    #[inline(always)]
    fn rounded(self) -> u16 {
        self.to_bits()
    }

    #[inline(always)]
    fn word(x: &[Self]) -> f32 {
        pair(x[0].to_bits(), x.get(1).map_or(0, |odd| odd.to_bits()))
    }
}

/// x, or zero below [`SMALL`].
#[inline(always)]
pub(super) fn without_small(x: bf16) -> bf16 {
    let small = x.to_bits() & 0x7fff < (SMALL.to_bits() >> 16) as u16;
    if small { bf16::ZERO } else { x }
}

/// The f32 of a bf16's bits.
#[inline(always)]
fn wide(bits: u16) -> f32 {
    f32_from_bf16(bf16::from_bits(bits))
}

/// A pair of bf16 in the place of an f32, the even term in the lower half.
#[inline(always)]
fn pair(even: u16, odd: u16) -> f32 {
    f32::from_bits(u32::from(odd) << 16 | u32::from(even))
}

multiversion! {
    /// Lays down one row of terms: [`Form::steps`] floats.
    pub(super) fn put(form: Form, x: &[f32], out: &mut [f32]) {
        let (pairs, rest) = x.as_chunks::<2>();
        match form {
            Form::F32 => out.copy_from_slice(x),
            Form::Widened => {
                for (out, [even, odd]) in out.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
                    *out = [wide(odd.rounded()), wide(even.rounded())];
                }
                if let [even] = rest {
                    out[x.len() - 1..].copy_from_slice(&[0.0, wide(even.rounded())]);
                }
            }
            Form::Pairs => {
                for (out, [even, odd]) in out.iter_mut().zip(pairs) {
                    *out = pair(even.rounded(), odd.rounded());
                }
                if let [even] = rest {
                    out[pairs.len()] = pair(even.rounded(), 0);
                }
            }
        }
    }
}

multiversion! {
    /// Lays down two terms of many elements, the second perhaps missing (then empty), in rows `ld` apart.
    pub(super) fn put_rows<T: Term>(form: Form, even: &[T], odd: &[T], out: &mut [f32], ld: usize) {
        match form {
            Form::F32 => {
                for (out, x) in out.iter_mut().zip(even) {
                    *out = x.wide();
                }
                for (out, x) in out.iter_mut().skip(ld).zip(odd) {
                    *out = x.wide();
                }
            }
            Form::Widened => {
                let (first, second) = out.split_at_mut(ld);
                for (out, x) in first.iter_mut().zip(odd) {
                    *out = wide(x.rounded());
                }
                first[odd.len()..even.len()].fill(0.0);
                for (out, x) in second.iter_mut().zip(even) {
                    *out = wide(x.rounded());
                }
            }
            Form::Pairs if odd.is_empty() => {
                for (out, even) in out.iter_mut().zip(even) {
                    *out = pair(even.rounded(), 0);
                }
            }
            Form::Pairs => {
                for ((out, even), odd) in out.iter_mut().zip(even).zip(odd) {
                    *out = pair(even.rounded(), odd.rounded());
                }
            }
        }
    }
}

/// Rows of activations, as products take them.
pub(super) struct Rows<'a> {
    pub(super) form: Form,
    data: Cow<'a, [f32]>,
    /// Floats from row to row.
    pub(super) stride: usize,
}

impl<'a> Rows<'a> {
    /// Of rows of `cols` elements.
    pub(super) fn new(form: Form, x: &'a [f32], cols: usize) -> Self {
        let stride = form.steps(cols);
        let data = if form == Form::F32 {
            Cow::Borrowed(x)
        } else {
            let rows = x.len().checked_div(cols).unwrap_or(0);
            let all = |first: usize, block: &mut [f32]| {
                let x = x[first / stride * cols..].chunks_exact(cols);
                x.zip(block.chunks_exact_mut(stride)).for_each(|(x, out)| put(form, x, out));
            };
            let data = filled(rows * stride, BLOCK * stride, all);
            Cow::Owned(data)
        };
        Self { form, data, stride }
    }

    /// From row `first` on.
    pub(super) fn from(&self, first: usize) -> &[f32] {
        &self.data[first * self.stride..]
    }
}

/// Columns that [`pack_weights`] takes of packed weights at a time.
const COLUMNS: usize = 64;

/// Columns `lanes` of rows `terms` of W, for products in which W's rows are the terms: rows of `ld` floats, zero
/// beyond the lanes.
pub(super) fn pack_weights(
    form: Form,
    w: &Tensor,
    terms: Range<usize>,
    lanes: Range<usize>,
    out: &mut [f32],
    ld: usize,
) {
    let cols = w.cols;
    if let Data::Packed(w) = w.data() {
        if !terms.start.is_multiple_of(LANES) {
            let w = unpacked_rows(w, cols, terms.clone());
            return pack_weights(form, &w, 0..terms.len(), lanes, out, ld);
        }
        // The panels' rows, column by column.
        let mut rows = [bf16::ZERO; LANES * COLUMNS];
        for first in terms.clone().step_by(LANES) {
            let panel = &w[first * cols..][..LANES * cols];
            let n = LANES.min(terms.end - first);
            let out = &mut out[form.steps(first - terms.start) * ld..][..form.steps(n) * ld];
            out.fill(0.0);
            for at in lanes.clone().step_by(COLUMNS) {
                let width = COLUMNS.min(lanes.end - at);
                unpack_columns(panel, at, &mut rows, width);
                put_pairs(form, &rows[..n * width], width, 0..width, &mut out[at - lanes.start..], ld);
            }
        }
        return;
    }
    out.fill(0.0);
    let rows = terms.start * cols..terms.end * cols;
    match w.data() {
        Data::F32(w) => put_pairs(form, &w[rows], cols, lanes, out, ld),
        Data::Bf16(w) => put_pairs(form, &w[rows], cols, lanes, out, ld),
        Data::Packed(_) => unreachable!("seen to"),
    }
}

/// Lays down columns `lanes` of all rows of w, whose rows are the terms, in rows of `ld` floats.
pub(super) fn put_pairs<T: Term>(
    form: Form,
    w: &[T],
    cols: usize,
    lanes: Range<usize>,
    out: &mut [f32],
    ld: usize,
) {
    for (two, out) in w.chunks(2 * cols).zip(out.chunks_mut(form.steps(2) * ld)) {
        let (even, odd) = two.split_at(cols);
        put_rows(form, &even[lanes.clone()], if odd.is_empty() { odd } else { &odd[lanes.clone()] }, out, ld);
    }
}

multiversion! {
    /// Whether a weight is below [`SMALL`] without being zero.
    pub(super) fn any_small(w: &[bf16]) -> bool {
        let mut any = 0_u16;
        for w in w {
            // Zero wraps around to the largest.
            let less_one = (w.to_bits() & 0x7fff).wrapping_sub(1);
            any |= u16::from(less_one < (SMALL.to_bits() >> 16) as u16 - 1);
        }
        any != 0
    }
}

/// A [`Form`] of weights, as a type: how the words of a row, 32 bits each, become floats of a product.
pub(super) trait Layout {
    /// As stored.
    type Weight: Term;
    /// Weights in a word.
    const WEIGHTS: usize = 4 / size_of::<Self::Weight>();
    /// Floats that a word becomes.
    const FLOATS: usize;
    /// Whether words are read where weights lie in memory.
    const STREAMED: bool = true;

    /// What a word in every lane becomes: [`Layout::FLOATS`] vectors, the rest is not used.
    ///
    /// # Safety
    /// `S` is on.
    unsafe fn floats<S: Simd>(words: S) -> [S; 2];
}

/// f32 weights in [`Form::F32`].
pub(super) struct Floats;

impl Layout for Floats {
    type Weight = f32;
    const FLOATS: usize = 1;
    const STREAMED: bool = false;

    #[inline(always)]
    unsafe fn floats<S: Simd>(words: S) -> [S; 2] {
        [words, words]
    }
}

/// bf16 weights in [`Form::F32`].
pub(super) struct InOrder;

impl Layout for InOrder {
    type Weight = bf16;
    const FLOATS: usize = 2;

    #[inline(always)]
    unsafe fn floats<S: Simd>(words: S) -> [S; 2] {
        // SAFETY: the caller's word.
        unsafe { [words.low(), words.high()] }
    }
}

/// bf16 weights in [`Form::Widened`].
pub(super) struct OddFirst;

impl Layout for OddFirst {
    type Weight = bf16;
    const FLOATS: usize = 2;

    #[inline(always)]
    unsafe fn floats<S: Simd>(words: S) -> [S; 2] {
        // SAFETY: the caller's word.
        unsafe { [words.high(), words.low()] }
    }
}

/// bf16 weights in [`Form::Pairs`].
pub(super) struct InPairs;

impl Layout for InPairs {
    type Weight = bf16;
    const FLOATS: usize = 1;

    #[inline(always)]
    unsafe fn floats<S: Simd>(words: S) -> [S; 2] {
        [words, words]
    }
}

/// The transposition of weights `[rows, cols]`, as floats of a product: those that word k of row l becomes (words count
/// from `ks.start`) lie in lane l of rows of `out` from `k * L::FLOATS` on, `ld` apart. Lanes come in whole vectors.
#[inline(always)]
fn transpose<S: Simd, L: Layout>(
    w: &[L::Weight],
    cols: usize,
    ks: &Range<usize>,
    out: &mut [f32],
    ld: usize,
) {
    let (rows, words) = (w.len() / cols, ks.len().div_ceil(L::WEIGHTS));
    assert!(ks.end <= cols && rows.next_multiple_of(LANES) <= ld && out.len() >= words * L::FLOATS * ld);
    for l in (0..rows).step_by(LANES) {
        let w = &w[l * cols..];
        let whole = if rows - l < LANES { 0 } else { ks.len() / L::WEIGHTS / 4 * 4 };
        for k in (0..whole).step_by(4) {
            let from = w[ks.start + k * L::WEIGHTS..].as_ptr().cast::<u8>();
            if k.is_multiple_of(LINE / 4) {
                for r in 0..LANES {
                    S::prefetch(from.wrapping_add(r * cols * size_of::<L::Weight>() + 2 * LINE));
                }
            }
            // SAFETY: 16 bytes of 16 rows, and vectors in the rows of these words, by the assertion; `multiversion!`
            // found `S`.
            unsafe {
                let words = S::transposed(from, cols * size_of::<L::Weight>());
                put_words::<S, L>(words, out.as_mut_ptr().add(k * L::FLOATS * ld + l), ld);
            }
        }
        for k in whole..words {
            let mut lanes = [0.0; LANES];
            let at = ks.start + k * L::WEIGHTS..ks.end.min(ks.start + (k + 1) * L::WEIGHTS);
            for (lane, w) in lanes.iter_mut().zip(w.chunks_exact(cols)) {
                *lane = Term::word(&w[at.clone()]);
            }
            // SAFETY: as above, of one word.
            unsafe {
                put_words::<S, L>([S::load(lanes.as_ptr())], out.as_mut_ptr().add(k * L::FLOATS * ld + l), ld)
            };
        }
    }
}

/// Writes the floats that words become.
///
/// # Safety
/// The caller owns a vector in each of their rows, `ld` floats apart, and `S` is on.
#[inline(always)]
unsafe fn put_words<S: Simd, L: Layout>(words: impl IntoIterator<Item = S>, to: *mut f32, ld: usize) {
    for (j, word) in words.into_iter().enumerate() {
        // SAFETY: the caller's word.
        unsafe {
            let floats = L::floats(word);
            for (f, float) in floats.into_iter().take(L::FLOATS).enumerate() {
                float.store(to.add((j * L::FLOATS + f) * ld));
            }
        }
    }
}

multiversion! {
    pub(super) fn transposed<L: Layout>(w: &[L::Weight], cols: usize, ks: &Range<usize>, out: &mut [f32], ld: usize) {
        transpose::<S, L>(w, cols, ks, out, ld);
    }
}
