//! The inner loops of matrix products, which compilers do one element at a time when left to themselves.

use bytemuck::Pod;

use super::number::Product;
use crate::machine::registers::LANES;

/// The loops, for one instruction set.
pub(super) trait Vectors {
    /// e0 o0 e1 o1 ...
    #[inline(always)]
    fn zip<T: Pod>(even: &[T; LANES], odd: &[T; LANES]) -> [T; 64] {
        std::array::from_fn(|i| if i % 2 == 0 { even[i / 2] } else { odd[i / 2] })
    }

    /// The inverse of `zip`.
    #[inline(always)]
    fn unzip<T: Pod>(all: &[T; 64]) -> [[T; LANES]; 2] {
        std::array::from_fn(|odd| std::array::from_fn(|i| all[2 * i + odd]))
    }

    /// The columns of 8 rows of 4.
    #[inline(always)]
    fn columns<T: Pod>(rows: &[T; LANES]) -> [[T; 8]; 4] {
        std::array::from_fn(|t| std::array::from_fn(|g| rows[4 * g + t]))
    }

    /// Adds the products of 8 rows of `left` with the columns of `right`, k ascending.
    #[inline(always)]
    fn multiply<P: Product, const KE: usize>(
        left: &[[P::X; KE]; 8],
        right: &[[P::X; 8]; KE],
        sums: &mut [P::Acc; 64],
    ) {
        for (sums, factors) in sums.chunks_exact_mut(8).zip(left) {
            for (factor, others) in factors.iter().zip(right) {
                for n in 0..8 {
                    sums[n] = P::mul_add(*factor, others[n], sums[n]);
                }
            }
        }
    }
}

/// For every host.
pub(super) struct Plain;
impl Vectors for Plain {}

/// With AVX2 shuffles for elements of 32 bits. To be used in functions compiled for AVX2 or more alone.
#[cfg(target_arch = "x86_64")]
pub(super) struct Avx2;

#[cfg(target_arch = "x86_64")]
impl Vectors for Avx2 {
    #[inline(always)]
    fn zip<T: Pod>(even: &[T; LANES], odd: &[T; LANES]) -> [T; 64] {
        if size_of::<T>() != 4 {
            return Plain::zip(even, odd);
        }
        let mut all = [T::zeroed(); 64];
        // SAFETY: the caller's host has AVX2; the elements have 32 bits.
        unsafe { avx2::zip(even.as_ptr().cast(), odd.as_ptr().cast(), all.as_mut_ptr().cast()) };
        all
    }

    #[inline(always)]
    fn unzip<T: Pod>(all: &[T; 64]) -> [[T; LANES]; 2] {
        if size_of::<T>() != 4 {
            return Plain::unzip(all);
        }
        let mut parts = [[T::zeroed(); LANES]; 2];
        let [even, odd] = &mut parts;
        // SAFETY: as above.
        unsafe { avx2::unzip(all.as_ptr().cast(), even.as_mut_ptr().cast(), odd.as_mut_ptr().cast()) };
        parts
    }

    #[inline(always)]
    fn columns<T: Pod>(rows: &[T; LANES]) -> [[T; 8]; 4] {
        if size_of::<T>() != 4 {
            return Plain::columns(rows);
        }
        let mut columns = [[T::zeroed(); 8]; 4];
        // SAFETY: as above.
        unsafe { avx2::columns(rows.as_ptr().cast(), columns.as_mut_ptr().cast()) };
        columns
    }

    #[inline(always)]
    fn multiply<P: Product, const KE: usize>(
        left: &[[P::X; KE]; 8],
        right: &[[P::X; 8]; KE],
        sums: &mut [P::Acc; 64],
    ) {
        if P::F32 {
            // SAFETY: as above; X and Acc are f32.
            unsafe {
                avx2::multiply(KE, left.as_ptr().cast(), right.as_ptr().cast(), sums.as_mut_ptr().cast())
            };
        } else {
            Plain::multiply::<P, KE>(left, right, sums);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256i, _mm256_broadcast_ss, _mm256_castps_si256, _mm256_castsi256_ps, _mm256_fmadd_ps,
        _mm256_loadu_ps, _mm256_loadu_si256, _mm256_permute2x128_si256, _mm256_permute4x64_epi64,
        _mm256_permutevar8x32_epi32, _mm256_setr_epi32, _mm256_shuffle_ps, _mm256_storeu_ps,
        _mm256_storeu_si256, _mm256_unpackhi_epi32, _mm256_unpackhi_epi64, _mm256_unpacklo_epi32,
        _mm256_unpacklo_epi64,
    };

    /// # Safety
    /// AVX2; 32, 32 and 64 readable or writable elements.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn zip(even: *const u32, odd: *const u32, all: *mut u32) {
        for i in 0..4 {
            // SAFETY: 8 elements at 8i <= 24, 16 at 16i <= 48.
            unsafe {
                let a = _mm256_loadu_si256(even.add(8 * i).cast());
                let b = _mm256_loadu_si256(odd.add(8 * i).cast());
                let low = _mm256_unpacklo_epi32(a, b);
                let high = _mm256_unpackhi_epi32(a, b);
                let to: *mut __m256i = all.add(16 * i).cast();
                _mm256_storeu_si256(to, _mm256_permute2x128_si256::<0x20>(low, high));
                _mm256_storeu_si256(to.add(1), _mm256_permute2x128_si256::<0x31>(low, high));
            }
        }
    }

    /// # Safety
    /// AVX2; 64, 32 and 32 readable or writable elements.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn unzip(all: *const u32, even: *mut u32, odd: *mut u32) {
        for i in 0..4 {
            // SAFETY: as in `zip`.
            unsafe {
                let from: *const __m256i = all.add(16 * i).cast();
                let x = _mm256_castsi256_ps(_mm256_loadu_si256(from));
                let y = _mm256_castsi256_ps(_mm256_loadu_si256(from.add(1)));
                // x0 x2 y0 y2 | x4 x6 y4 y6, then the middle quarters change places.
                let a = _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(x, y));
                let b = _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(x, y));
                _mm256_storeu_si256(even.add(8 * i).cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(a));
                _mm256_storeu_si256(odd.add(8 * i).cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(b));
            }
        }
    }

    /// # Safety
    /// AVX2; 32 readable and 32 writable elements.
    #[inline]
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn columns(rows: *const u32, columns: *mut u32) {
        // Two rows at a time: a0 b0 a1 b1 | a2 b2 a3 b3.
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        // SAFETY: 8 elements at 8i <= 24.
        unsafe {
            let pair =
                |i: usize| _mm256_permutevar8x32_epi32(_mm256_loadu_si256(rows.add(8 * i).cast()), order);
            let (p, q, r, s) = (pair(0), pair(1), pair(2), pair(3));
            let (even0, odd0) = (_mm256_unpacklo_epi64(p, q), _mm256_unpackhi_epi64(p, q));
            let (even1, odd1) = (_mm256_unpacklo_epi64(r, s), _mm256_unpackhi_epi64(r, s));
            let to: *mut __m256i = columns.cast();
            _mm256_storeu_si256(to, _mm256_permute2x128_si256::<0x20>(even0, even1));
            _mm256_storeu_si256(to.add(1), _mm256_permute2x128_si256::<0x20>(odd0, odd1));
            _mm256_storeu_si256(to.add(2), _mm256_permute2x128_si256::<0x31>(even0, even1));
            _mm256_storeu_si256(to.add(3), _mm256_permute2x128_si256::<0x31>(odd0, odd1));
        }
    }

    /// # Safety
    /// AVX2 and FMA; 8 rows of `depth` readable elements, `depth` rows of 8, and 8 writable rows of 8.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn multiply(depth: usize, left: *const f32, right: *const f32, sums: *mut f32) {
        for row in [0, 4] {
            // SAFETY: rows below 8, elements of `left` below `depth`.
            unsafe {
                let sum = |i: usize| sums.add(8 * (row + i));
                let mut acc = [0, 1, 2, 3].map(|i| _mm256_loadu_ps(sum(i)));
                for k in 0..depth {
                    let others = _mm256_loadu_ps(right.add(8 * k));
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let factor = _mm256_broadcast_ss(&*left.add((row + i) * depth + k));
                        *acc = _mm256_fmadd_ps(factor, others, *acc);
                    }
                }
                for (i, acc) in acc.into_iter().enumerate() {
                    _mm256_storeu_ps(sum(i), acc);
                }
            }
        }
    }
}
