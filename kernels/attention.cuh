// Shared by the kernels of attention.cu: the layout of tiles in shared memory, and the soft-cap.
#pragma once

#include "mma.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Offset in elements of vector `vector` of row `row` in a tile whose rows have WIDTH bf16: 32, or a multiple of 64. Every 128
// bytes of the tile are swizzled as in mma.cuh. Rows begin a multiple of 128 bytes apart, or two rows share 128 bytes, and so
// neither the vectors of eight rows at one column nor eight neighbouring vectors of one row (or two) have bank conflicts.
template <int WIDTH>
__device__ __forceinline__ int swizzled_row(int row, int vector) {
    if (WIDTH < TILE_K) return swizzled(row / 2, row % 2 * 4 + vector);
    return row * WIDTH + ((vector & ~7) | ((vector ^ row) & 7)) * VECTOR;
}

// swizzled_row(row + rows, vector + vectors), given at = swizzled_row(row, vector), by a single exclusive or. `rows` is a
// multiple of 8 (of 16 where two rows share 128 bytes), and `vector` and `vectors` have no bit in common.
template <int WIDTH>
__device__ __forceinline__ int moved(int at, int rows, int vectors) {
    return (at ^ vectors % 8 * VECTOR) + rows * WIDTH + vectors / 8 * TILE_K;
}

// 2^x within 2 ulp; 2^0 is 1 and 2^-inf is 0 exactly.
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh within a few ulp: an odd minimax polynomial up to 0.625, 1 - 2 / (e^(2|x|) + 1) beyond. The instruction tanh.approx is
// not used because its error, 2^-11, is multiplied by the soft-cap, which is 50.
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
