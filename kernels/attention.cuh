// Shared by attention.cu and attention_backward.cu: chains of segments, layouts of tiles in shared memory, and the tanh of the
// soft-cap.
#pragma once

#include "mma.cuh"

// A segment of a chain: the keys at positions from the `end` of the item before up to `end` lie in rows position + delta.
struct ChainItem {  // shared
    unsigned end;
    int delta;
};
static_assert(sizeof(ChainItem) == 8);

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

// Offset in elements of vector `vector` of row `row` in a tile of `rows` rows that is stored as panels: swizzled tiles of 64
// columns, one after the other.
template <int rows>
__device__ __forceinline__ int swizzled_panels(int row, int vector) {
    return vector / 8 * rows * TILE_K + swizzled(row, vector % 8);
}

// The tanh of a soft-cap c tanh(s / c). There are three, which differ in accuracy and cost; replacing one by another would change the
// bits of results:
//
// | function | used by | error | cost and reason |
// |---|---|---|---|
// | tanh_relative | attention forward | a few ulp | tanh_absolute and a polynomial; keeps the relative accuracy of scores near 0 |
// | tanh_absolute | attention backward | 2^-22 of 1 | one exponential, one division; c tanh is only added in an exponent |
// | tanhf | LM head | 1 ulp | CUDA's own; its instructions are hidden behind the product |
//
// None is the instruction tanh.approx, because its error, 2^-11, is multiplied by c, which is 30 or 50.

// An odd minimax polynomial up to 0.625, 1 - 2 / (e^(2|x|) + 1) beyond.
__device__ __forceinline__ float tanh_relative(float x) {
    const float a = fabsf(x), z = x * x;
    float p = 0.00214754f;
    p = fmaf(p, z, -0.008182677f);
    p = fmaf(p, z, 0.02170297f);
    p = fmaf(p, z, -0.053947203f);
    p = fmaf(p, z, 0.1333321f);
    p = fmaf(p, z, -0.3333333f);
    const float near = fmaf(p * z, x, x);
    const float far = 1.0f - __fdividef(2.0f, exp2_approx(2.0f * LOG2_E * a) + 1.0f);
    return a < 0.625f ? near : copysignf(far, x);
}

// 1 - 2 / (1 + e^(2x)), given x 2 log2(e).
__device__ __forceinline__ float tanh_absolute(float exponent) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_approx(exponent));
}
