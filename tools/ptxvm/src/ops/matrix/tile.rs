//! Registers to blocks of numbers and back, for all kernels of products.

use super::layout::Fragment;
use super::number::{Product, f16_to_f32, f32_to_f16};
use super::vectors::Vectors;
use crate::machine::inst::Inst;
use crate::machine::registers::{LANES, Reg, Registers, Value};

/// Where the operands' registers are. The sources of the instruction are A's, B's, C's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// A, B, C, D.
    pub(super) parts: [Fragment; 4],
    /// Where B's begin.
    pub(super) b_at: usize,
    /// Where C's begin.
    pub(super) c_at: usize,
}

impl Plan {
    /// The registers of A, of B and of C; behind each lie those of the next.
    #[inline(always)]
    pub(super) fn sources<'a>(&self, inst: &'a Inst) -> (&'a [Reg], &'a [Reg], &'a [Reg]) {
        let all = inst.srcs();
        (all, &all[self.b_at..], &all[self.c_at..])
    }
}

/// Computes D from A, B and C.
pub(super) type Kernel = fn(&Plan, &mut Registers, &Inst);

/// `f` of each element. As a plain loop it vectorises, which `array::map` does not.
#[inline(always)]
pub(super) fn each<T: Copy, U: Copy + Default, const N: usize>(
    values: &[T; N],
    f: impl Fn(T) -> U,
) -> [U; N] {
    let mut out = [U::default(); N];
    for i in 0..N {
        out[i] = f(values[i]);
    }
    out
}

/// A register of A as 8 rows of `KE` elements.
#[inline(always)]
pub(super) fn left<P: Product, M: Vectors, const KE: usize>(
    words: &[<P::Word as Value>::Raw; LANES],
) -> [[P::X; KE]; 8] {
    let mut left = [[P::X::default(); KE]; 8];
    if P::E == 2 {
        let pairs = M::zip(&each(words, |w| P::a(w, 0)), &each(words, |w| P::a(w, 1)));
        for g in 0..8 {
            left[g].copy_from_slice(&pairs[8 * g..8 * g + 8]);
        }
    } else if P::E == 1 {
        let values = each(words, |w| P::a(w, 0));
        for g in 0..8 {
            left[g].copy_from_slice(&values[4 * g..4 * g + 4]);
        }
    } else {
        for lane in 0..LANES {
            for sub in 0..P::E {
                left[lane / 4][lane % 4 * P::E + sub] = P::a(words[lane], sub);
            }
        }
    }
    left
}

/// A register of B as `KE` rows of 8 elements.
#[inline(always)]
pub(super) fn right<P: Product, M: Vectors, const KE: usize>(
    words: &[<P::Word as Value>::Raw; LANES],
) -> [[P::X; 8]; KE] {
    let mut right = [[P::X::default(); 8]; KE];
    for sub in 0..P::E {
        for (t, column) in M::columns(&each(words, |w| P::b(w, sub))).into_iter().enumerate() {
            right[t * P::E + sub] = column;
        }
    }
    right
}

/// An 8 x 8 block of C or D, by rows: lane l has elements 2l and 2l+1.
pub(super) type Block<T> = [T; 64];

/// The layout of a block of C or D in its registers, and the last step to D.
pub(super) trait Tile<Acc> {
    /// A register.
    type Word: Value;
    /// Registers of a block.
    const REGS: usize;
    /// Whether C is added after all products, by [`Tile::join`], and not before.
    const C_LAST: bool = false;
    fn load<M: Vectors>(regs: &Registers, at: &[Reg]) -> Block<Acc>;
    fn store<M: Vectors>(block: &Block<Acc>, out: &mut [[<Self::Word as Value>::Raw; LANES]]);
    #[inline(always)]
    fn join(acc: Acc, _c: Acc) -> Acc {
        acc
    }
}

macro_rules! pair_tile {
    ($name:ident: $acc:ty as $word:ty, |$raw:ident| $get:expr, |$v:ident| $put:expr $(, $rest:item)*) => {
        impl Tile<$acc> for $name {
            type Word = $word;
            const REGS: usize = 2;
            #[inline(always)]
            fn load<M: Vectors>(regs: &Registers, at: &[Reg]) -> Block<$acc> {
                each(&M::zip(regs.get::<$word>(at[0]), regs.get::<$word>(at[1])), |$raw| $get)
            }
            #[inline(always)]
            fn store<M: Vectors>(block: &Block<$acc>, out: &mut [[<$word as Value>::Raw; LANES]]) {
                out.copy_from_slice(&M::unzip(&each(block, |$v| $put)));
            }
            $($rest)*
        }
    };
}

/// f32; a NaN is stored as 0x7fffffff.
pub(super) struct TileF32;
pair_tile!(TileF32: f32 as u32, |r| f32::from_bits(r), |v| if v.is_nan() { 0x7fff_ffff } else { v.to_bits() });

/// f64; a NaN is stored as 0x7ff8000000000000, since which payload a host's fma passes on is not fixed.
pub(super) struct TileF64;
pair_tile!(TileF64: f64 as u64, |r| f64::from_bits(r), |v| if v.is_nan() { 0x7ff8 << 48 } else { v.to_bits() });

/// s32 that wraps.
pub(super) struct TileS32;
pair_tile!(TileS32: i32 as u32, |r| r as i32, |v| v as u32);

/// `.satfinite`: the exact sum, clamped to s32.
pub(super) struct TileSat;
pair_tile!(TileSat: i32 as u32, |r| r as i32, |v| v as u32,
    const C_LAST: bool = true;,
    #[inline(always)]
    fn join(acc: i32, c: i32) -> i32 {
        acc.saturating_add(c)
    }
);

/// f16, two to a register; sums are kept in f32 and rounded once.
pub(super) struct TileF16;
impl Tile<f32> for TileF16 {
    type Word = u32;
    const REGS: usize = 1;
    #[inline(always)]
    fn load<M: Vectors>(regs: &Registers, at: &[Reg]) -> Block<f32> {
        let row = regs.get::<u32>(at[0]);
        M::zip(&each(row, |w| f16_to_f32(w & 0xffff)), &each(row, |w| f16_to_f32(w >> 16)))
    }
    #[inline(always)]
    fn store<M: Vectors>(block: &Block<f32>, out: &mut [[u32; LANES]]) {
        let [low, high] = M::unzip(&each(block, f32_to_f16));
        for lane in 0..LANES {
            out[0][lane] = low[lane] | high[lane] << 16;
        }
    }
}
