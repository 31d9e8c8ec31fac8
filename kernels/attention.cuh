// What attention's kernels share: tiles of keys in shared memory, and the soft-cap.
#pragma once

#include "mma.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Offset in elements of piece `piece` of row `row` in a tile whose rows have WIDTH bf16, a multiple of 64, or 32: the
// scheme of mma.cuh in every stretch of 128 bytes. Rows are a multiple of 128 bytes apart, or two lie in 128 bytes, so
// eight rows at one column lie in eight different groups of banks, and so do eight neighbouring pieces of one row (or two).
template <int WIDTH>
__device__ __forceinline__ int place(int row, int piece) {
    if (WIDTH < TILE_K) return swizzled(row / 2, row % 2 * 4 + piece);
    return row * WIDTH + ((piece & ~7) | ((piece ^ row) & 7)) * PIECE;
}

// place(row + rows, piece + pieces) given at = place(row, piece), where one XOR is left to compute: rows is a multiple
// of 8 (of 16 where two are in 128 bytes), and piece and pieces have no bit in common.
template <int WIDTH>
__device__ __forceinline__ int moved(int at, int rows, int pieces) {
    return (at ^ pieces % 8 * PIECE) + rows * WIDTH + pieces / 8 * TILE_K;
}

// 2^x within 2 ulp; 2^0 is 1 and 2^-inf is 0 exactly.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh within a few ulp: an odd minimax polynomial up to 0.625, 1 - 2 / (e^(2|x|) + 1) beyond. (The instruction
// tanh.approx is good to 2^-11 only: less than bf16's rounding, but a soft-cap of 50 multiplies it.)
__device__ __forceinline__ float tanh_accurate(float x) {
    const float a = fabsf(x), z = x * x;
    float p = 0.00214754f;
    p = fmaf(p, z, -0.008182677f);
    p = fmaf(p, z, 0.02170297f);
    p = fmaf(p, z, -0.053947203f);
    p = fmaf(p, z, 0.1333321f);
    p = fmaf(p, z, -0.3333333f);
    const float near = fmaf(p * z, x, x);
    const float far = 1.0f - __fdividef(2.0f, exp2_fast(2.0f * LOG2_E * a) + 1.0f);
    return a < 0.625f ? near : copysignf(far, x);
}
