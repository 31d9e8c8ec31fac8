//! Gradients of parameters, to which ops add in f32: an f32 one holds the sum, a bf16 one what it is rounded to.

use std::cell::RefCell;

use half::bf16;

use super::simd::{bf16_from_f32, f32_from_bf16, multiversion};
use super::{Data, Tensor};

/// Elements of a gradient, or some that follow one another.
pub enum Sums<'a> {
    /// In f32.
    F32(&'a mut [f32]),
    /// In bf16.
    Bf16(&'a mut [bf16]),
}

multiversion! {
    fn widen(x: &[bf16], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = f32_from_bf16(*x);
        }
    }
}

multiversion! {
    fn narrow(x: &[f32], y: &mut [bf16]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = bf16_from_f32(*x);
        }
    }
}

impl<'a> Sums<'a> {
    /// Those of a tensor.
    pub fn of(x: &'a mut Tensor) -> Self {
        match x.data_mut() {
            Data::F32(x) => Self::F32(x),
            Data::Bf16(x) => Self::Bf16(x),
            Data::Packed(_) => unreachable!("gradients are not packed"),
        }
    }

    /// How many.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Parts of `len` elements, of which the last may have fewer.
    pub fn chunks(self, len: usize) -> Vec<Self> {
        match self {
            Self::F32(x) => x.chunks_mut(len).map(Self::F32).collect(),
            Self::Bf16(x) => x.chunks_mut(len).map(Self::Bf16).collect(),
        }
    }

    /// Those from `first` on, `len` of them.
    pub fn part(self, first: usize, len: usize) -> Self {
        match self {
            Self::F32(x) => Self::F32(&mut x[first..first + len]),
            Self::Bf16(x) => Self::Bf16(&mut x[first..first + len]),
        }
    }

    /// Calls `f` with all of them in f32, and rounds what it leaves to nearest even where they are bf16.
    pub fn add(&mut self, f: impl FnOnce(&mut [f32])) {
        thread_local! {
            static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        match self {
            Self::F32(x) => f(x),
            Self::Bf16(x) => {
                // Taken out, because `f` may come here again, on this thread, with another task of the pool's.
                let mut wide = WIDE.take();
                wide.resize(x.len(), 0.0);
                widen(x, &mut wide);
                f(&mut wide);
                narrow(&wide, x);
                WIDE.set(wide);
            }
        }
    }
}

impl Default for Sums<'_> {
    fn default() -> Self {
        Self::F32(&mut [])
    }
}
