// Token embedding.
//
//   forward:   x[t] = scale embedding[ids[t]]             embedding [V, D] bf16, x [T, D] bf16
//   backward:  d_embedding[ids[t]] += scale dx[t]         dx [T, D] bf16, d_embedding [V, D] f32 or bf16
//
// Arithmetic is f32. The forward pass rounds once, at the store; the backward pass rounds once for each token that it adds, and
// once more where d_embedding is bf16.
//
// Forward: a block for each token, 16 bytes for each thread. Backward: the host has sorted the tokens by id, so that a block owns
// a row of d_embedding and adds the row's tokens in ascending order, without atomics and with the same bits in every run. A
// thread owns 4 columns and loads them of 8 tokens before it adds the first, because the additions depend on each other but the
// loads do not.
//
// Bytes: forward 4 T D; backward 2 T D, and for each different id 8 D, or 4 D in bf16. One FLOP per element. The limit is memory; if one id is
// a large share of the batch, its block ends last.

#include "common.cuh"

// Computes the block's row of x.
__device__ __forceinline__ void embed(const bf16 *__restrict__ embedding, unsigned id, bf16 *__restrict__ x, unsigned cols,
                                      float scale) {
    const bf16 *from = embedding + size_t(id) * cols;
    bf16 *to = x + size_t(blockIdx.x) * cols;
    for (unsigned i = threadIdx.x; i < cols / 8; i += blockDim.x) {
        float value[8];
        widen(load8(from, i), value);
#pragma unroll
        for (int j = 0; j < 8; j++) value[j] *= scale;
        store8(to, i, narrow(value));
    }
}

// Launched by cuda/embed.rs: embed_forward; grid (T), 32 to 256 threads.
extern "C" __global__ void __launch_bounds__(256) embed_forward(
    const bf16 *__restrict__ embedding, const unsigned *__restrict__ ids, bf16 *__restrict__ x, unsigned cols,
    float scale) {
    embed(embedding, ids[blockIdx.x], x, cols, scale);
}

// For tokens of the latest draw, which the host has not read yet: the id of token t is the first word of draws[from[t]], a (token,
// log-prob). A row of NaN may have drawn a number that is no token. The host reports that later; here any token will do.
// Launched by cuda/embed.rs: embed_forward; grid (T), 32 to 256 threads.
extern "C" __global__ void __launch_bounds__(256) embed_forward_drawn(
    const bf16 *__restrict__ embedding, const uint2 *__restrict__ draws, const unsigned *__restrict__ from,
    bf16 *__restrict__ x, unsigned cols, unsigned vocab, float scale) {
    const unsigned id = draws[from[blockIdx.x]].x;
    embed(embedding, id < vocab ? id : 0, x, cols, scale);
}

// y += scale x, 4 columns.
__device__ __forceinline__ void add_scaled(float4 &y, float scale, uint2 x) {
    const float2 low = __bfloat1622float2(reinterpret_cast<const bf162 &>(x.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const bf162 &>(x.y));
    y = make_float4(fmaf(scale, low.x, y.x), fmaf(scale, low.y, y.y), fmaf(scale, high.x, y.z),
                    fmaf(scale, high.y, y.w));
}

// Four columns of a gradient's row, in f32 or, rounded at the store, in bf16.
__device__ __forceinline__ float4 load4(const float *x, size_t i) { return reinterpret_cast<const float4 *>(x)[i]; }
__device__ __forceinline__ void store4(float *x, size_t i, float4 v) { reinterpret_cast<float4 *>(x)[i] = v; }
__device__ __forceinline__ float4 load4(const bf16 *x, size_t i) {
    const uint2 words = reinterpret_cast<const uint2 *>(x)[i];
    const float2 low = __bfloat1622float2(reinterpret_cast<const bf162 &>(words.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const bf162 &>(words.y));
    return make_float4(low.x, low.y, high.x, high.y);
}
__device__ __forceinline__ void store4(bf16 *x, size_t i, float4 v) {
    reinterpret_cast<uint2 *>(x)[i] = make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

// Block r adds the tokens order[begin] .. order[end - 1] to row id, where {id, begin, end} is at runs[3 r]. D is a multiple of 8.
template <typename T>
__device__ __forceinline__ void add_tokens(const bf16 *__restrict__ dx, const unsigned *__restrict__ runs,
                                           const unsigned *__restrict__ order, T *__restrict__ d_embedding, unsigned cols,
                                           float scale) {
    const unsigned id = runs[3 * blockIdx.x], begin = runs[3 * blockIdx.x + 1], end = runs[3 * blockIdx.x + 2];
    const unsigned groups = cols / 4;
    const uint2 *from = reinterpret_cast<const uint2 *>(dx);
    T *to = d_embedding + size_t(id) * cols;
    for (unsigned c = threadIdx.x; c < groups; c += blockDim.x) {
        float4 sum = load4(to, c);
        unsigned i = begin;
        for (; i + 8 <= end; i += 8) {
            uint2 x[8];
#pragma unroll
            for (int j = 0; j < 8; j++) x[j] = from[size_t(order[i + j]) * groups + c];
#pragma unroll
            for (int j = 0; j < 8; j++) add_scaled(sum, scale, x[j]);
        }
        for (; i < end; i++) add_scaled(sum, scale, from[size_t(order[i]) * groups + c]);
        store4(to, c, sum);
    }
}

// Launched by cuda/embed.rs: embed_backward; grid (different ids), 32 to 256 threads.
extern "C" __global__ void __launch_bounds__(256) embed_backward(
    const bf16 *__restrict__ dx, const unsigned *__restrict__ runs, const unsigned *__restrict__ order,
    float *__restrict__ d_embedding, unsigned cols, float scale) {
    add_tokens(dx, runs, order, d_embedding, cols, scale);
}

// Launched by cuda/embed.rs: embed_backward; grid (different ids), 32 to 256 threads.
extern "C" __global__ void __launch_bounds__(256) embed_backward_bf16(
    const bf16 *__restrict__ dx, const unsigned *__restrict__ runs, const unsigned *__restrict__ order,
    bf16 *__restrict__ d_embedding, unsigned cols, float scale) {
    add_tokens(dx, runs, order, d_embedding, cols, scale);
}
