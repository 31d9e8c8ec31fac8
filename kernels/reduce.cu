// Sums of squares of many f32 or bf16 tensors, in f64, for the norm of all gradients.
//
//   sums[i] = sum over k of x_i[k]^2
//
// Algorithm. Every tensor is cut into chunks of a constant size. A block sums a chunk; a second launch, with a block for each
// tensor, sums the sums of the tensor's chunks. Within a block thread t takes elements 4 t .. 4 t + 3 and then every 4 * THREADS
// elements further, and keeps four sums. The sums of threads are added by a butterfly in each warp, those of warps in ascending
// order. The order depends on the tensor's length alone. NaN and Inf stay non-finite through squares and sums.
//
// Sums are f64, because the square of an f32 is exact in f64 and no sum overflows. Bytes: 4 per element, of bf16 2. Instructions: one
// conversion and one FMA in f64 per element; even a GPU with one f64 unit for 64 f32 units does about as many of these as memory
// delivers elements.

#include "common.cuh"

constexpr unsigned THREADS = 256;  // shared

// A block's elements.
struct Chunk {  // shared
    const void *x;
    unsigned len;
    unsigned is_bf16;
};
static_assert(sizeof(Chunk) == 16);

// The sum over the threads of a block, in thread 0.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double sums[THREADS / WARP];
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = x;
    // Barrier: the sums of all warps, which thread 0 reads, are written.
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (unsigned w = 0; w < THREADS / WARP; w++) total += sums[w];
    }
    return total;
}

__device__ __forceinline__ float4 quad(const float *x, unsigned i) { return reinterpret_cast<const float4 *>(x)[i]; }
__device__ __forceinline__ float4 quad(const bf16 *x, unsigned i) {
    const uint2 words = reinterpret_cast<const uint2 *>(x)[i];
    const float2 low = __bfloat1622float2(reinterpret_cast<const bf162 &>(words.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const bf162 &>(words.y));
    return make_float4(low.x, low.y, high.x, high.y);
}

// The four sums of this thread.
template <typename T>
__device__ __forceinline__ void sum_squares(const T *x, unsigned len, double (&sums)[4]) {
    const unsigned quads = len / 4;
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < quads; i += THREADS) {
        const float4 v = quad(x, i);
        sums[0] = fma(double(v.x), double(v.x), sums[0]);
        sums[1] = fma(double(v.y), double(v.y), sums[1]);
        sums[2] = fma(double(v.z), double(v.z), sums[2]);
        sums[3] = fma(double(v.w), double(v.w), sums[3]);
    }
    // The last elements of a tensor whose length is no multiple of 4.
    const unsigned rest = 4 * quads + threadIdx.x;
    if (rest < len) {
        const double v = double(float(x[rest]));
        sums[0] = fma(v, v, sums[0]);
    }
}

// partials[b] = sum of squares of chunk b. Chunks begin at multiples of 16 bytes.
// Launched by cuda/reduce.rs: sum_squares; grid (chunks), 256 threads.
extern "C" __global__ void __launch_bounds__(256) reduce_squares(
    const Chunk *__restrict__ chunks, double *__restrict__ partials) {
    const Chunk chunk = chunks[blockIdx.x];
    double sums[4] = {};
    if (chunk.is_bf16) {
        sum_squares(in_global(static_cast<const bf16 *>(chunk.x)), chunk.len, sums);
    } else {
        sum_squares(in_global(static_cast<const float *>(chunk.x)), chunk.len, sums);
    }
    const double total = block_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// sums[i] = sum of partials[first[i]] .. partials[first[i + 1] - 1].
// Launched by cuda/reduce.rs: sum_squares; grid (tensors), 256 threads.
extern "C" __global__ void __launch_bounds__(256) reduce_partials(
    const double *__restrict__ partials, const unsigned *__restrict__ first, double *__restrict__ sums) {
    double sum = 0.0;
#pragma unroll 4
    for (unsigned i = first[blockIdx.x] + threadIdx.x; i < first[blockIdx.x + 1]; i += THREADS) sum += partials[i];
    const double total = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = total;
}
