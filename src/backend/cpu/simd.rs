//! Vector code without intrinsics: bodies are written once over blocks of [`LANES`] floats and compiled for every
//! instruction set by the macro `multiversion!`.
//!
//! Invariant: the instruction set never changes a bit of a result. Hence sums keep [`LANES`] accumulators on every
//! machine and join them in one fixed tree, products that are added are fused by [`f32::mul_add`] (one rounding,
//! in hardware or not), and the elementary functions below are built from such operations alone.

use half::bf16;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

/// Number of accumulators of every sum, and the width of a block: one AVX-512 register, two AVX registers.
pub const LANES: usize = 16;

/// A block of floats.
pub type Block = [f32; LANES];

/// The instruction sets that bodies are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// The target's baseline.
    Portable = 1,
    /// AVX2 and FMA.
    Avx2 = 2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512 = 3,
    /// AVX-512 and its bf16 instructions; only products of bf16 matrices differ from [`Isa::Avx512`].
    Avx512Bf16 = 4,
}

impl Isa {
    /// All of them, the least first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Avx512Bf16];
}

/// The instruction set in use; 0 until somebody asks.
static CURRENT: AtomicU8 = AtomicU8::new(0);

/// The instruction set in use: the best that this machine has, unless inside [`with_isa`].
#[inline]
pub fn isa() -> Isa {
    match CURRENT.load(Ordering::Relaxed) {
        4 => Isa::Avx512Bf16,
        3 => Isa::Avx512,
        2 => Isa::Avx2,
        1 => Isa::Portable,
        _ => {
            let best = detect();
            CURRENT.store(best as u8, Ordering::Relaxed);
            best
        }
    }
}

/// The best instruction set that this machine has.
pub fn detect() -> Isa {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            // SAFETY: the machine has the instruction, and what else the function needs.
            let bf16 = is_x86_feature_detected!("avx512bf16") && unsafe { x86::vdpbf16ps_is_as_documented() };
            return if bf16 { Isa::Avx512Bf16 } else { Isa::Avx512 };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            return Isa::Avx2;
        }
    }
    Isa::Portable
}

/// Runs `f` under `isa`, or under the best that this machine has where that is less. For tests and benchmarks:
/// results do not depend on it. Calls wait for each other, because the choice is the process's.
pub fn with_isa<R>(isa: Isa, f: impl FnOnce() -> R) -> R {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    struct Restore;
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.store(0, Ordering::Relaxed);
        }
    }
    let _lock = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let _restore = Restore;
    CURRENT.store(isa.min(detect()) as u8, Ordering::Relaxed);
    f()
}

/// A vector of [`LANES`] floats in registers, for kernels whose accumulators must stay there: the compiler keeps arrays
/// in registers in simple loops only. Every operation rounds as its scalar twin does.
///
/// Safety of all of it: the instruction set that the type stands for must be on.
pub(crate) trait Simd: Copy {
    /// Rows of a register tile.
    const ROWS: usize;
    /// Vectors in such a row: their product's accumulators fit the registers beside operands.
    const VECTORS: usize;
    /// The 16 floats at `p`, which the caller may read.
    unsafe fn load(p: *const f32) -> Self;
    /// N vectors, `stride` floats apart. A loop, as all on vectors is that has to be inlined: closures have no instruction set of
    /// their own, so that what they call is inlined into them too late, if at all.
    #[inline(always)]
    unsafe fn load_all<const N: usize>(p: *const f32, stride: usize) -> [Self; N] {
        // SAFETY: the caller's word.
        unsafe {
            let mut all = [Self::splat(0.0); N];
            for (i, x) in all.iter_mut().enumerate() {
                *x = Self::load(p.add(i * stride));
            }
            all
        }
    }
    /// Writes the 16 floats at `p`, which the caller may write.
    unsafe fn store(self, p: *mut f32);
    /// x in every lane.
    unsafe fn splat(x: f32) -> Self;
    /// self + a * b, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// [`sum`] of each of four vectors.
    unsafe fn sums(x: [Self; 4]) -> [f32; 4];
    /// Words of 32 bits: vector i holds word i of each of 16 rows `stride` bytes apart, the first at `p`.
    unsafe fn transposed(p: *const u8, stride: usize) -> [Self; 4];
    /// Asks for the line of the cache at `p`, which need not be there.
    fn prefetch(p: *const u8);
    /// The bf16 in the lower half of every lane, widened.
    unsafe fn low(self) -> Self;
    /// The bf16 in the upper half of every lane, widened.
    unsafe fn high(self) -> Self;
}

impl Simd for Block {
    const ROWS: usize = 6;
    const VECTORS: usize = 1;

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller may read 16 floats at p.
        unsafe { p.cast::<Self>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller may write 16 floats at p.
        unsafe { p.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        fma(&a, &b, self)
    }

    #[inline(always)]
    unsafe fn sums(x: [Self; 4]) -> [f32; 4] {
        x.map(sum)
    }

    #[inline(always)]
    unsafe fn transposed(p: *const u8, stride: usize) -> [Self; 4] {
        let mut words = [[0.0; LANES]; 4];
        for l in 0..LANES {
            // SAFETY: the caller may read 16 bytes of each row.
            let row: [f32; 4] = unsafe { p.add(l * stride).cast::<[f32; 4]>().read_unaligned() };
            for (words, word) in words.iter_mut().zip(row) {
                words[l] = word;
            }
        }
        words
    }

    #[inline(always)]
    fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn low(self) -> Self {
        map(self, |x| f32::from_bits(x.to_bits() << 16))
    }

    #[inline(always)]
    unsafe fn high(self) -> Self {
        map(self, |x| f32::from_bits(x.to_bits() & 0xffff_0000))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! [`Simd`](super::Simd) in registers. SAFETY of every block below: the trait's contract, the instruction set is on
    //! and the pointers are good for 16 floats.
    #![allow(clippy::undocumented_unsafe_blocks, reason = "the comment above is all blocks'")]

    use std::arch::x86_64::*;

    use super::Simd;

    /// One AVX-512 register.
    pub(crate) type Avx512 = __m512;

    /// The bits of a register as pairs of bf16.
    #[inline(always)]
    fn pairs(x: __m512) -> __m512bh {
        // SAFETY: both are 64 bytes of which every pattern is a value.
        unsafe { std::mem::transmute(x) }
    }

    /// Whether VDPBF16PS gives the bits that Intel documents ("Intel 64 and IA-32 Architectures Software Developer's
    /// Manual", volume 2): the product of the pairs' odd elements is added first, then that of the even ones, each fused
    /// and rounded to nearest even. The other paths compute that; a processor that rounds otherwise goes without it.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn vdpbf16ps_is_as_documented() -> bool {
        let mut state = 1_u32;
        // Both signs, magnitudes from 2^-16 to 2^15, all bits of the significand.
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let exponent = 111 + (state >> 3 & 31);
            f32::from_bits((state & 0x8000_0000) | exponent << 23 | (state >> 8 & 0x7f) << 16)
        };
        (0..64).all(|_| {
            let mut lanes = || -> [f32; super::LANES] { std::array::from_fn(|_| random()) };
            let [odd_a, even_a, odd_b, even_b] = [lanes(), lanes(), lanes(), lanes()];
            let sum: [f32; super::LANES] = std::array::from_fn(|_| random() * (1.0 + random() * 1e-6));
            let pair = |odd: f32, even: f32| f32::from_bits(odd.to_bits() | even.to_bits() >> 16);
            let a: super::Block = std::array::from_fn(|l| pair(odd_a[l], even_a[l]));
            let b: super::Block = std::array::from_fn(|l| pair(odd_b[l], even_b[l]));
            let mut got = [0.0f32; super::LANES];
            // SAFETY: arrays of 16 floats.
            unsafe {
                let load = |x: &super::Block| _mm512_loadu_ps(x.as_ptr());
                let sum = _mm512_dpbf16_ps(load(&sum), pairs(load(&a)), pairs(load(&b)));
                _mm512_storeu_ps(got.as_mut_ptr(), sum);
            }
            (0..super::LANES).all(|l| {
                let want = even_a[l].mul_add(even_b[l], odd_a[l].mul_add(odd_b[l], sum[l]));
                got[l].to_bits() == want.to_bits()
            })
        })
    }

    /// Lanes whose `fma` adds two products, of a pair of bf16 in every lane: VDPBF16PS.
    #[derive(Clone, Copy)]
    pub(crate) struct Pairs(__m512);

    impl Simd for Pairs {
        const ROWS: usize = Avx512::ROWS;
        const VECTORS: usize = Avx512::VECTORS;

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(p)) }
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self.0) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(x)) }
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm512_dpbf16_ps(self.0, pairs(a.0), pairs(b.0))) }
        }

        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            unsafe { Avx512::sums([a.0, b.0, c.0, d.0]) }
        }

        #[inline(always)]
        unsafe fn transposed(p: *const u8, stride: usize) -> [Self; 4] {
            let [a, b, c, d] = unsafe { Avx512::transposed(p, stride) };
            [Self(a), Self(b), Self(c), Self(d)]
        }

        #[inline(always)]
        fn prefetch(p: *const u8) {
            Avx512::prefetch(p);
        }

        #[inline(always)]
        unsafe fn low(self) -> Self {
            unsafe { Self(self.0.low()) }
        }

        #[inline(always)]
        unsafe fn high(self) -> Self {
            unsafe { Self(self.0.high()) }
        }
    }

    /// Two AVX registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256, __m256);

    /// The upper half of 16 lanes onto the lower.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq")]
    fn eight(x: __m512) -> __m256 {
        _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x))
    }

    /// The upper half of 8 lanes onto the lower.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn four(x: __m256) -> __m128 {
        _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x))
    }

    /// The rest of [`sum`](super::sum) once 16 lanes have become 8, four vectors at a time.
    #[inline(always)]
    unsafe fn sums_of_eight([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        unsafe {
            let (mut a, mut b, mut c, mut d) = (four(a), four(b), four(c), four(d));
            _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
            let sums = _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }

    impl Simd for __m512 {
        const ROWS: usize = 8;
        const VECTORS: usize = 3;

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { _mm512_loadu_ps(p) }
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe { _mm512_storeu_ps(p, self) }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            unsafe { _mm512_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { _mm512_fmadd_ps(a, b, self) }
        }

        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            unsafe { sums_of_eight([eight(a), eight(b), eight(c), eight(d)]) }
        }

        #[inline(always)]
        unsafe fn transposed(p: *const u8, stride: usize) -> [Self; 4] {
            unsafe {
                // Rows i, i + 4, i + 8 and i + 12 lie side by side, so that 4 x 4 words are transposed in each quarter.
                let rows = |i: usize| {
                    let row = |l: usize| _mm_loadu_ps(p.add(l * stride).cast());
                    let x = _mm512_castps128_ps512(row(i));
                    let x = _mm512_insertf32x4::<1>(x, row(i + 4));
                    let x = _mm512_insertf32x4::<2>(x, row(i + 8));
                    _mm512_insertf32x4::<3>(x, row(i + 12))
                };
                let (a, b, c, d) = (rows(0), rows(1), rows(2), rows(3));
                let (ab, cd) = (_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d));
                let (ab_high, cd_high) = (_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d));
                [
                    _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd),
                    _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd),
                    _mm512_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high),
                    _mm512_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high),
                ]
            }
        }

        #[inline(always)]
        fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }

        #[inline(always)]
        unsafe fn low(self) -> Self {
            unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self))) }
        }

        #[inline(always)]
        unsafe fn high(self) -> Self {
            unsafe {
                let mask = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(self), mask))
            }
        }
    }

    impl Simd for Avx2 {
        const ROWS: usize = 6;
        const VECTORS: usize = 1;

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            unsafe { Avx2(_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            unsafe {
                _mm256_storeu_ps(p, self.0);
                _mm256_storeu_ps(p.add(8), self.1);
            }
        }

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self {
            let v = unsafe { _mm256_set1_ps(x) };
            Avx2(v, v)
        }

        #[inline(always)]
        unsafe fn fma(self, a: Self, b: Self) -> Self {
            unsafe { Avx2(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
        }

        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            unsafe {
                sums_of_eight([
                    _mm256_add_ps(a.0, a.1),
                    _mm256_add_ps(b.0, b.1),
                    _mm256_add_ps(c.0, c.1),
                    _mm256_add_ps(d.0, d.1),
                ])
            }
        }

        #[inline(always)]
        unsafe fn transposed(p: *const u8, stride: usize) -> [Self; 4] {
            unsafe {
                let (x, y) = (eight_rows(p, stride), eight_rows(p.add(8 * stride), stride));
                [Avx2(x[0], y[0]), Avx2(x[1], y[1]), Avx2(x[2], y[2]), Avx2(x[3], y[3])]
            }
        }

        #[inline(always)]
        fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }

        #[inline(always)]
        unsafe fn low(self) -> Self {
            unsafe {
                let low = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(x)));
                Avx2(low(self.0), low(self.1))
            }
        }

        #[inline(always)]
        unsafe fn high(self) -> Self {
            unsafe {
                let mask = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32));
                Avx2(_mm256_and_ps(self.0, mask), _mm256_and_ps(self.1, mask))
            }
        }
    }

    /// [`transposed`](super::Simd::transposed) of 8 rows.
    #[inline(always)]
    unsafe fn eight_rows(p: *const u8, stride: usize) -> [__m256; 4] {
        unsafe {
            // Rows i and i + 4 lie side by side, so that 4 x 4 words are transposed in each half.
            let rows = |i: usize| {
                let row = |l: usize| _mm_loadu_ps(p.add(l * stride).cast());
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(row(i)), row(i + 4))
            };
            let (a, b, c, d) = (rows(0), rows(1), rows(2), rows(3));
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            [
                _mm256_shuffle_ps::<0b01_00_01_00>(ab, cd),
                _mm256_shuffle_ps::<0b11_10_11_10>(ab, cd),
                _mm256_shuffle_ps::<0b01_00_01_00>(ab_high, cd_high),
                _mm256_shuffle_ps::<0b11_10_11_10>(ab_high, cd_high),
            ]
        }
    }
}

/// Compiles a function for every instruction set and calls the one that [`isa`] names. Functions that the body
/// calls must be `#[inline(always)]`, else they stay at the baseline (slow, never wrong). In the body, `S` names the
/// set's [`Simd`] type. Calls name the function's own type parameters.
macro_rules! multiversion {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($param:ident: $bound:path),+>)? ($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?
        $body:block
    ) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "functions have what they have")]
        $vis fn $name $(<$($param: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::extra_unused_type_parameters, reason = "not every body names the set")]
            fn body<S: $crate::backend::cpu::simd::Simd $($(, $param: $bound)+)?>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
            fn avx512 $(<$($param: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::backend::cpu::simd::x86::Avx512 $($(, $param)+)?>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$($param: $bound),+>)? ($($arg: $ty),*) $(-> $ret)? {
                body::<$crate::backend::cpu::simd::x86::Avx2 $($(, $param)+)?>($($arg),*)
            }

            match $crate::backend::cpu::simd::isa() {
                // SAFETY: `isa` names a set only where the machine has it.
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::simd::Isa::Avx512 | $crate::backend::cpu::simd::Isa::Avx512Bf16 => unsafe {
                    avx512 $(::<$($param),+>)? ($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::backend::cpu::simd::Isa::Avx2 => unsafe { avx2 $(::<$($param),+>)? ($($arg),*) },
                _ => body::<$crate::backend::cpu::simd::Block $($(, $param)+)?>($($arg),*),
            }
        }
    };
}
pub(crate) use multiversion;

multiversion! {
    /// Asks for all of x, which another core may have written: line by line as a kernel comes to it, each would be waited for.
    pub(super) fn prefetch(x: &[f32]) {
        for line in x.chunks(LANES) {
            S::prefetch(line.as_ptr().cast());
        }
    }
}

/// `f` of every lane.
#[inline(always)]
pub fn map(x: Block, f: impl Fn(f32) -> f32) -> Block {
    let mut y = [0.0; LANES];
    for l in 0..LANES {
        y[l] = f(x[l]);
    }
    y
}

/// a * b + c of every lane.
#[inline(always)]
pub fn fma(a: &Block, b: &Block, mut c: Block) -> Block {
    for l in 0..LANES {
        c[l] = a[l].mul_add(b[l], c[l]);
    }
    c
}

/// The first floats of a block that is otherwise zero.
#[inline(always)]
pub fn padded(x: &[f32]) -> Block {
    let mut block = [0.0; LANES];
    block[..x.len()].copy_from_slice(x);
    block
}

/// The sum of the lanes in the one order that the engine knows: halves onto halves.
#[inline(always)]
pub fn sum(x: Block) -> f32 {
    let x: [f32; 8] = std::array::from_fn(|l| x[l] + x[l + 8]);
    let x: [f32; 4] = std::array::from_fn(|l| x[l] + x[l + 4]);
    (x[0] + x[2]) + (x[1] + x[3])
}

/// The dot product of two slices of one length: lane l sums the elements l, l + 16, l + 32..., then [`sum`].
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    debug_assert_eq!(a.len(), b.len());
    let mut acc = [0.0; LANES];
    let (a_blocks, a_rest) = a.as_chunks::<LANES>();
    let (b_blocks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_blocks.iter().zip(b_blocks) {
        acc = fma(a, b, acc);
    }
    if !a_rest.is_empty() {
        acc = fma(&padded(a_rest), &padded(b_rest), acc);
    }
    sum(acc)
}

/// y += a x.
#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    debug_assert_eq!(x.len(), y.len());
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// 1.5 * 2^23: adding it leaves the nearest integer (ties to even) in the low bits of a float's mantissa.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts; the first has 15 significant bits, so its product with an exponent is exact.
const LN_2_HIGH: f32 = 0.693_145_75;
const LN_2_LOW: f32 = 1.428_606_8e-6;

/// 2^n for -126 <= n <= 127.
#[inline(always)]
fn exp2_int(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// e^x within 1 ulp, subnormal results included; 0 for -inf, inf for +inf, NaN for NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2; e^r = 1 + r + r^2 p(r) with a minimax p; 2^n in two factors, so that neither
/// overflow nor gradual underflow needs a branch.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Beyond these bounds the result is 0 or inf all the same. NaN passes both comparisons unchanged.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, x));
    let mut p = 0.000_197_902_44_f32;
    p = p.mul_add(r, 0.001_394_475_8);
    p = p.mul_add(r, 0.008_333_498);
    p = p.mul_add(r, 0.041_666_295);
    p = p.mul_add(r, 0.166_666_66);
    p = p.mul_add(r, 0.5);
    let e = p.mul_add(r * r, r) + 1.0;
    let half = exponent >> 1;
    e * exp2_int(half) * exp2_int(exponent.wrapping_sub(half))
}

/// Natural logarithm within 1 ulp, subnormal x included; -inf for 0, NaN below 0, inf for inf, NaN for NaN.
///
/// x = 2^e m with m in \[1/sqrt 2, sqrt 2); ln m = f - f^2/2 + f^3 p(f) with f = m - 1 (exact) and a minimax p.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    let subnormal = x < f32::MIN_POSITIVE;
    let bits = (if subnormal { x * 8_388_608.0 } else { x }).to_bits() as i32;
    // The exponent that leaves a mantissa in [1/sqrt 2, sqrt 2).
    let e = bits.wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32) >> 23;
    let f = f32::from_bits(bits.wrapping_sub(e << 23) as u32) - 1.0;
    let e = e as f32 - if subnormal { 23.0 } else { 0.0 };
    let z = f * f;
    let mut p = 0.067_466_4_f32;
    p = p.mul_add(f, -0.116_756_52);
    p = p.mul_add(f, 0.118_881_62);
    p = p.mul_add(f, -0.124_055_89);
    p = p.mul_add(f, 0.142_195_52);
    p = p.mul_add(f, -0.166_679_96);
    p = p.mul_add(f, 0.200_021_19);
    p = p.mul_add(f, -0.250_000_1);
    p = p.mul_add(f, 0.333_333_13);
    let low = (-0.5f32).mul_add(z, e.mul_add(LN_2_LOW, f * z * p));
    let y = e.mul_add(LN_2_HIGH, f + low);
    let y = if x > 0.0 { y } else { f32::NAN };
    let y = if x == 0.0 { f32::NEG_INFINITY } else { y };
    if x == f32::INFINITY { x } else { y }
}

/// tanh x within 2 ulp; tiny x comes back as it is, NaN for NaN.
///
/// An odd minimax polynomial up to 0.625, 1 - 2 / (e^(2|x|) + 1) beyond.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let z = x * x;
    let mut p = 0.002_147_54_f32;
    p = p.mul_add(z, -0.008_182_677);
    p = p.mul_add(z, 0.021_702_97);
    p = p.mul_add(z, -0.053_947_203);
    p = p.mul_add(z, 0.133_332_1);
    p = p.mul_add(z, -0.333_333_3);
    let near = (p * z).mul_add(x, x).copysign(x); // keeps -0
    let far = (1.0 - 2.0 / (exp(a + a) + 1.0)).copysign(x);
    if a < 0.625 { near } else { far }
}

/// sin x and cos x within 2^-23 for |x| <= 2^18: RoPE's angles.
///
/// x = n pi/2 + r with |r| <= pi/4 and pi/2 in three parts (x less n times the first is exact), minimax polynomials
/// of r, and the quadrant from n.
#[inline(always)]
pub fn sin_cos(x: f32) -> (f32, f32) {
    let shifted = x.mul_add(std::f32::consts::FRAC_2_PI, ROUND);
    let n = shifted - ROUND;
    let quadrant = shifted.to_bits();
    let r = n.mul_add(-1.570_796_4, x);
    let r = n.mul_add(1.715_124_5e-15, n.mul_add(4.371_139e-8, r));
    let z = r * r;
    let p = (-0.000_195_172_35_f32).mul_add(z, 0.008_332_178).mul_add(z, -0.166_666_55);
    let sin = p.mul_add(z * r, r);
    let p = 0.000_024_438_38_f32.mul_add(z, -0.001_388_736_7).mul_add(z, 0.041_666_646);
    let cos = p.mul_add(z * z, (-0.5f32).mul_add(z, 1.0));
    let (s, c) = if quadrant & 1 == 0 { (sin, cos) } else { (cos, sin) };
    // sin is negative in quadrants 2 and 3, cos in 1 and 2.
    let s = f32::from_bits(s.to_bits() ^ (quadrant & 2) << 30);
    let c = f32::from_bits(c.to_bits() ^ (quadrant.wrapping_add(1) & 2) << 30);
    (s, c)
}

/// The nearest bfloat16, ties to even; NaN stays NaN.
#[inline(always)]
pub fn bf16_from_f32(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if x.is_nan() { bits >> 16 | 0x40 } else { rounded } as u16)
}

/// The float that a bfloat16 stands for.
#[inline(always)]
pub fn f32_from_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    multiversion! {
        fn exp_all(x: &[f32], y: &mut [f32]) {
            for (y, x) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(x.as_chunks().0) {
                *y = map(*x, exp);
            }
        }
    }
    multiversion! {
        fn ln_all(x: &[f32], y: &mut [f32]) {
            for (y, x) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(x.as_chunks().0) {
                *y = map(*x, ln);
            }
        }
    }
    multiversion! {
        fn tanh_all(x: &[f32], y: &mut [f32]) {
            for (y, x) in y.as_chunks_mut::<LANES>().0.iter_mut().zip(x.as_chunks().0) {
                *y = map(*x, tanh);
            }
        }
    }
    multiversion! {
        fn dot_all(a: &[f32], b: &[f32]) -> f32 {
            dot(a, b)
        }
    }

    /// Every `stride`-th float there is, both signs, infinities and some NaN included.
    fn floats(stride: usize) -> Vec<f32> {
        let mut x: Vec<f32> = (0..=u32::MAX).step_by(stride).map(f32::from_bits).collect();
        x.extend([0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0, f32::MIN_POSITIVE, f32::MAX]);
        x.truncate(x.len() / LANES * LANES);
        x
    }

    /// Distance of `got` from `want` in units of `want`'s last place (gradual underflow counted as such).
    fn ulps(got: f32, want: f64) -> f64 {
        let rounded = want as f32;
        if got == rounded || got.is_nan() && want.is_nan() {
            return 0.0;
        }
        if !got.is_finite() || !rounded.is_finite() {
            return f64::INFINITY;
        }
        let exponent = i32::from(rounded.abs().to_bits().wrapping_shr(23) as u8).max(1) - 127;
        (f64::from(got) - want).abs() / f64::powi(2.0, exponent - 23)
    }

    /// Checks an elementary function on a sweep of all floats: accuracy, and the same bits on every instruction
    /// set.
    fn check(all: fn(&[f32], &mut [f32]), reference: fn(f64) -> f64, bound: f64) {
        let x = floats(4001);
        let run = |isa| {
            let mut y = vec![0.0; x.len()];
            with_isa(isa, || all(&x, &mut y));
            y
        };
        let portable = run(Isa::Portable);
        for (&x, &y) in x.iter().zip(&portable) {
            let off = ulps(y, reference(f64::from(x)));
            assert!(off <= bound, "f({x:e}) = {y:e}: off by {off} ulp");
        }
        for isa in Isa::ALL {
            for ((&x, y), want) in x.iter().zip(run(isa)).zip(&portable) {
                let same = y.to_bits() == want.to_bits() || y.is_nan() && want.is_nan();
                assert!(same, "f({x:e}) differs on {isa:?}: {y:e}, {want:e}");
            }
        }
    }

    #[test]
    fn exp_is_accurate_everywhere_and_the_same_on_every_instruction_set() {
        check(exp_all, f64::exp, 1.0);
    }

    #[test]
    fn ln_is_accurate_everywhere_and_the_same_on_every_instruction_set() {
        check(ln_all, f64::ln, 1.0);
    }

    #[test]
    fn tanh_is_accurate_everywhere_and_the_same_on_every_instruction_set() {
        check(tanh_all, f64::tanh, 2.0);
    }

    multiversion! {
        fn sin_cos_all(x: &[f32], sin: &mut [f32], cos: &mut [f32]) {
            for ((x, s), c) in x.iter().zip(sin).zip(cos) {
                (*s, *c) = sin_cos(*x);
            }
        }
    }

    #[test]
    fn sin_cos_is_accurate_over_the_angles_of_rope_and_the_same_on_every_instruction_set() {
        let x: Vec<f32> = floats(4001).into_iter().filter(|x| x.abs() <= 262_144.0).collect();
        let run = |isa| {
            let (mut s, mut c) = (vec![0.0; x.len()], vec![0.0; x.len()]);
            with_isa(isa, || sin_cos_all(&x, &mut s, &mut c));
            (s, c)
        };
        let (sin, cos) = run(Isa::Portable);
        for ((&x, &s), &c) in x.iter().zip(&sin).zip(&cos) {
            let (want_s, want_c) = f64::from(x).sin_cos();
            let off = (f64::from(s) - want_s).abs().max((f64::from(c) - want_c).abs());
            assert!(off <= f64::from(f32::EPSILON), "sin_cos({x:e}) is off by {off:e}");
        }
        let bits =
            |(s, c): (Vec<f32>, Vec<f32>)| -> Vec<u32> { s.iter().chain(&c).map(|x| x.to_bits()).collect() };
        let portable = bits((sin, cos));
        for isa in Isa::ALL {
            assert!(bits(run(isa)) == portable, "{isa:?} differs");
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for x in floats(997) {
            let (got, want) = (bf16_from_f32(x), bf16::from_f32(x));
            assert!(got == want || got.is_nan() && want.is_nan(), "{x:e}: {got:e}, {want:e}");
            assert!(f32_from_bf16(got) == want.to_f32() || want.is_nan());
        }
    }

    #[test]
    fn signed_zeros_and_infinities() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(ln(0.0), f32::NEG_INFINITY);
        assert_eq!(ln(1.0).to_bits(), 0);
        assert_eq!(tanh(-0.0).to_bits(), (-0.0f32).to_bits());
        assert_eq!(tanh(1e-30), 1e-30);
        assert_eq!(tanh(f32::NEG_INFINITY), -1.0);
        assert!(exp(f32::NAN).is_nan() && ln(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }

    #[test]
    fn dot_is_accurate_at_every_length_and_the_same_on_every_instruction_set() {
        let a: Vec<f32> = (0..100).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = (0..100).map(|i| (i as f32 * 1.3).cos()).collect();
        for n in 0..100 {
            let want: f64 = (0..n).map(|i| f64::from(a[i]) * f64::from(b[i])).sum();
            let norm: f64 = (0..n).map(|i| f64::from(a[i] * b[i]).abs()).sum();
            let run = |isa| with_isa(isa, || dot_all(&a[..n], &b[..n]));
            let got = run(Isa::Portable);
            // n / 16 fused additions and a tree of four.
            let bound = (n / LANES + 5) as f64 * f64::from(f32::EPSILON) / 2.0 * norm;
            assert!((f64::from(got) - want).abs() <= bound, "length {n}");
            for isa in Isa::ALL {
                assert_eq!(run(isa).to_bits(), got.to_bits(), "length {n} on {isa:?}");
            }
        }
    }
}
