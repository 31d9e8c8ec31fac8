// Gradients of weights that every row shares: each block of a backward kernel adds up its own rows and leaves one row
// of partial sums; the launch after it adds these up, in their order, to the gradient. So the order of the sum is
// fixed, where atomic additions would take whichever block comes first.
#pragma once

#include "common.cuh"

// Threads of a block: WARP columns times this many slices of the partial sums.
constexpr unsigned SLICES = 32;

// Where piece i, of 4 columns, of a row of gradients lies in shared memory: a thread has two neighbouring pieces and
// writes one at a time; these places let both that and reading consecutive columns meet every bank once.
__device__ __forceinline__ unsigned place(unsigned i) { return i ^ (i >> 3 & 1); }

// dw[c] += sum over b of partials[b][c]: partials [count, cols], dw [cols] f32. Grid: WARP columns a block.
//
// Slice s adds up rows s, s + SLICES, ... of its columns, each row of a warp being 128 consecutive bytes; then one warp
// adds up the slices. Bytes: 4 cols (count + 2), and nothing else costs anything; a thread that took a whole column
// alone would wait `count` times for memory, one that takes a slice of it 32 times less.
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
    // The first warp reads what all have written.
    __syncthreads();
    if (slice == 0 && c < cols) {
        float total = dw[c];
#pragma unroll
        for (unsigned s = 0; s < SLICES; s++) total += sums[s][lane];
        dw[c] = total;
    }
}
