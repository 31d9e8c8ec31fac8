// Token embedding.
//
//   forward:   x[t] = scale table[ids[t]]                 table [V, D] bf16, x [T, D] bf16
//   backward:  dtable[ids[t]] += scale dx[t]              dx [T, D] bf16, dtable [V, D] f32
//
// f32 arithmetic; forward one rounding at the store, backward one for each token that is added.
//
// Forward: a block per token, 16 bytes per thread. Backward: the host has sorted the tokens by id, so that a block
// owns a row of dtable and adds that row's tokens in order: no atomics, and the same bits each time. A thread owns 4
// columns and asks for 8 tokens' pieces before it adds the first, since the additions wait for each other but the
// reads need not.
//
// Bytes: forward 4 T D, backward 2 T D + 8 D for each different id; one FLOP per element. The limit is memory; where
// one id makes up much of the batch, its block is the last to end.

#include "common.cuh"

// The block's row of x.
__device__ __forceinline__ void embed(const bf16 *__restrict__ table, unsigned id, bf16 *__restrict__ x, unsigned cols,
                                      float scale) {
    const bf16 *from = table + size_t(id) * cols;
    bf16 *to = x + size_t(blockIdx.x) * cols;
    for (unsigned i = threadIdx.x; i < cols / 8; i += blockDim.x) {
        float value[8];
        widen(load8(from, i), value);
#pragma unroll
        for (int j = 0; j < 8; j++) value[j] *= scale;
        store8(to, i, narrow(value));
    }
}

// Grid: T blocks; D a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) embed_forward(
    const bf16 *__restrict__ table, const unsigned *__restrict__ ids, bf16 *__restrict__ x, unsigned cols,
    float scale) {
    embed(table, ids[blockIdx.x], x, cols, scale);
}

// Of tokens that were just drawn: ids[t] = draws[from[t]].token, of (token, log-prob). A row of NaN may have drawn what
// is no token; the host learns of it later, so here any token does.
extern "C" __global__ void __launch_bounds__(256) embed_forward_drawn(
    const bf16 *__restrict__ table, const uint2 *__restrict__ draws, const unsigned *__restrict__ from,
    bf16 *__restrict__ x, unsigned cols, unsigned vocab, float scale) {
    const unsigned id = draws[from[blockIdx.x]].x;
    embed(table, id < vocab ? id : 0, x, cols, scale);
}

// y += scale x, 4 columns.
__device__ __forceinline__ void add_scaled(float4 &y, float scale, uint2 x) {
    const float2 low = __bfloat1622float2(reinterpret_cast<const bf162 &>(x.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const bf162 &>(x.y));
    y = make_float4(fmaf(scale, low.x, y.x), fmaf(scale, low.y, y.y), fmaf(scale, high.x, y.z),
                    fmaf(scale, high.y, y.w));
}

// Run r, a block's, is {id, begin, end} at runs[3 r]: its tokens are order[begin..end]. D a multiple of 8.
extern "C" __global__ void __launch_bounds__(256) embed_backward(
    const bf16 *__restrict__ dx, const unsigned *__restrict__ runs, const unsigned *__restrict__ order,
    float *__restrict__ dtable, unsigned cols, float scale) {
    const unsigned id = runs[3 * blockIdx.x], begin = runs[3 * blockIdx.x + 1], end = runs[3 * blockIdx.x + 2];
    const unsigned pieces = cols / 4;
    const uint2 *from = reinterpret_cast<const uint2 *>(dx);
    float4 *to = reinterpret_cast<float4 *>(dtable) + size_t(id) * pieces;
    for (unsigned c = threadIdx.x; c < pieces; c += blockDim.x) {
        float4 sum = to[c];
        unsigned i = begin;
        for (; i + 8 <= end; i += 8) {
            uint2 x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = from[size_t(order[i + j]) * pieces + c];
#pragma unroll
            for (int j = 0; j < 8; j++) add_scaled(sum, scale, x[j]);
        }
        for (; i < end; i++) add_scaled(sum, scale, from[size_t(order[i]) * pieces + c]);
        to[c] = sum;
    }
}
