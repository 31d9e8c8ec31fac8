// Gradients of a weight that all rows of activations share. Each block of a backward kernel adds up its own rows and writes
// one row of partial sums; a second launch adds the rows of partial sums to the gradient in ascending order. The order of
// the sum is fixed therefore, which atomic additions cannot give because they follow the order in which blocks run.
#pragma once

#include "common.cuh"

// Threads of a block: WARP columns times this many slices of the partial sums.
constexpr unsigned SLICES = 32;

// Index in shared memory of the i-th group of 4 columns of a row of gradients. A thread writes two neighbouring groups, one
// at a time; the exchange of groups keeps these writes and the reads of consecutive columns free of bank conflicts.
__device__ __forceinline__ unsigned bank_swizzle(unsigned i) { return i ^ (i >> 3 & 1); }

// dw[c] += sum over b of partials[b][c]: partials [count, cols], dw [cols] f32. Grid: one block for WARP columns.
//
// Slice s of the block adds up rows s, s + SLICES, ... of the block's columns, where a warp reads 128 consecutive bytes of a
// row; then one warp adds up the slices. Bytes: 4 cols (count + 2), which is the only cost. The slices are there because a
// thread that added a whole column alone would wait for memory `count` times one after the other; a slice waits 32 times
// less often.
__device__ __forceinline__ void add_partials(const float *partials, unsigned count, unsigned cols, float *dw) {
    __shared__ float sums[SLICES][WARP];
    const unsigned lane = threadIdx.x % WARP, slice = threadIdx.x / WARP;
    const unsigned c = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (c < cols) {
#pragma unroll 4
        for (unsigned b = slice; b < count; b += SLICES) sum += partials[size_t(b) * cols + c];
    }
    sums[slice][lane] = sum;
    // Barrier: the first warp reads the sums that all warps have written.
    __syncthreads();
    if (slice == 0 && c < cols) {
        float total = dw[c];
#pragma unroll
        for (unsigned s = 0; s < SLICES; s++) total += sums[s][lane];
        dw[c] = total;
    }
}
