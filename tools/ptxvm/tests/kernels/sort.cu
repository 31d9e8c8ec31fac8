// Sorting and counting: LSD radix sort with match_any ranks, bitonic sort, histograms.
#include <cuda_runtime.h>

constexpr int RADIX_BITS = 4, RADIX = 1 << RADIX_BITS, SORT_THREADS = 128;

// counts[digit * gridDim.x + block]: ready for one exclusive scan over everything.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    radix_count(const unsigned* __restrict__ keys, unsigned* __restrict__ counts, int n, int shift) {
    __shared__ unsigned bins[RADIX];
    if (threadIdx.x < RADIX) bins[threadIdx.x] = 0;
    __syncthreads();
    const int i = blockIdx.x * SORT_THREADS + threadIdx.x;
    if (i < n) atomicAdd(&bins[(keys[i] >> shift) & (RADIX - 1)], 1u);
    __syncthreads();
    if (threadIdx.x < RADIX) counts[threadIdx.x * gridDim.x + blockIdx.x] = bins[threadIdx.x];
}

// Serial on purpose: one thread, one scan; the parallel ones are in scan.cu.
extern "C" __global__ void radix_offsets(unsigned* counts, int n) {
    unsigned sum = 0;
    for (int i = 0; i < n; ++i) {
        const unsigned c = counts[i];
        counts[i] = sum;
        sum += c;
    }
}

// Stable: warps take turns by their own row of counters; inside a warp the lanes with one digit rank by lane.
extern "C" __global__ void __launch_bounds__(SORT_THREADS)
    radix_scatter(const unsigned* __restrict__ keys, const unsigned* __restrict__ values,
                  unsigned* __restrict__ keys_out, unsigned* __restrict__ values_out,
                  const unsigned* __restrict__ offsets, int n, int shift) {
    constexpr int WARPS = SORT_THREADS / 32;
    __shared__ unsigned first[WARPS][RADIX];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int i = threadIdx.x; i < WARPS * RADIX; i += SORT_THREADS) (&first[0][0])[i] = 0;
    __syncthreads();
    const int i = blockIdx.x * SORT_THREADS + threadIdx.x;
    const bool inside = i < n;
    const unsigned key = inside ? keys[i] : 0;
    const unsigned digit = inside ? (key >> shift) & (RADIX - 1) : RADIX;
    const unsigned peers = __match_any_sync(0xffffffffu, digit);
    const unsigned rank = __popc(peers & ((1u << lane) - 1));
    if (inside && rank == 0) first[warp][digit] = __popc(peers);
    __syncthreads();
    if (threadIdx.x < RADIX) {
        unsigned sum = offsets[threadIdx.x * gridDim.x + blockIdx.x];
        for (int w = 0; w < WARPS; ++w) {
            const unsigned c = first[w][threadIdx.x];
            first[w][threadIdx.x] = sum;
            sum += c;
        }
    }
    __syncthreads();
    if (inside) {
        const unsigned to = first[warp][digit] + rank;
        keys_out[to] = key;
        values_out[to] = values[i];
    }
}

// One block sorts blockDim.x * 2 floats (a power of two) in dynamic shared memory.
extern "C" __global__ void bitonic_sort(float* data) {
    extern __shared__ float s[];
    const int t = threadIdx.x, n = 2 * blockDim.x;
    s[t] = data[blockIdx.x * n + t];
    s[t + blockDim.x] = data[blockIdx.x * n + t + blockDim.x];
    for (int size = 2; size <= n; size <<= 1)
        for (int stride = size / 2; stride > 0; stride >>= 1) {
            __syncthreads();
            const int at = 2 * t - (t & (stride - 1));
            const bool up = (at & size) == 0;
            const float a = s[at], b = s[at + stride];
            if ((a > b) == up) {
                s[at] = b;
                s[at + stride] = a;
            }
        }
    __syncthreads();
    data[blockIdx.x * n + t] = s[t];
    data[blockIdx.x * n + t + blockDim.x] = s[t + blockDim.x];
}

// A warp sorts 32 keys in registers.
extern "C" __global__ void bitonic_warp(unsigned long long* data, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
    unsigned long long v = i < n ? data[i] : ~0ull;
#pragma unroll
    for (int size = 2; size <= 32; size <<= 1)
#pragma unroll
        for (int stride = size / 2; stride > 0; stride >>= 1) {
            const unsigned long long w = __shfl_xor_sync(0xffffffffu, v, stride);
            const bool keep_small = ((lane & stride) == 0) == ((lane & size) == 0);
            v = keep_small ? (v < w ? v : w) : (v < w ? w : v);
        }
    if (i < n) data[i] = v;
}

// 256 bins from bytes, four per load; one private histogram per warp.
extern "C" __global__ void __launch_bounds__(192)
    histogram256(const unsigned* __restrict__ words, int count, unsigned* __restrict__ bins) {
    constexpr int WARPS = 6;
    __shared__ unsigned s[WARPS][256];
    for (int i = threadIdx.x; i < WARPS * 256; i += blockDim.x) (&s[0][0])[i] = 0;
    __syncthreads();
    unsigned* mine = s[threadIdx.x / 32];
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
        const unsigned w = words[i];
        atomicAdd(&mine[w & 255], 1u);
        atomicAdd(&mine[(w >> 8) & 255], 1u);
        atomicAdd(&mine[(w >> 16) & 255], 1u);
        atomicAdd(&mine[w >> 24], 1u);
    }
    __syncthreads();
    for (int b = threadIdx.x; b < 256; b += blockDim.x) {
        unsigned sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += s[w][b];
        if (sum) atomicAdd(&bins[b], sum);
    }
}
