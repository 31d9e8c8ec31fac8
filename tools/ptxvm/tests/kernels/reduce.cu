// Reductions: by warp shuffles, by block through shared memory, by segment, and over the grid.
#include <cuda_runtime.h>

template <typename T> struct Sum {
    static __device__ T identity() { return T(0); }
    __device__ T operator()(T a, T b) const { return a + b; }
};
template <typename T> struct Max {
    static __device__ T identity();
    __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};
template <> __device__ float Max<float>::identity() { return -__int_as_float(0x7f800000); }
template <> __device__ int Max<int>::identity() { return INT_MIN; }

template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T v, Op op) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
    return v;
}

template <typename T, typename Op, int THREADS>
__device__ T block_reduce(T v, Op op) {
    __shared__ T partial[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    v = warp_reduce(v, op);
    if (lane == 0) partial[warp] = v;
    __syncthreads();
    if (warp == 0) {
        v = lane < THREADS / 32 ? partial[lane] : Op::identity();
        v = warp_reduce(v, op);
    }
    return v;  // right in warp 0
}

// One partial result per block.
template <typename T, typename Op, int THREADS>
__global__ void __launch_bounds__(THREADS) reduce(const T* __restrict__ in, T* __restrict__ out, int n) {
    Op op;
    T v = Op::identity();
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < n; i += THREADS * gridDim.x) v = op(v, in[i]);
    v = block_reduce<T, Op, THREADS>(v, op);
    if (threadIdx.x == 0) out[blockIdx.x] = v;
}

template __global__ void reduce<float, Sum<float>, 256>(const float*, float*, int);
template __global__ void reduce<double, Sum<double>, 128>(const double*, double*, int);
template __global__ void reduce<float, Max<float>, 512>(const float*, float*, int);
template __global__ void reduce<int, Max<int>, 64>(const int*, int*, int);
template __global__ void reduce<long long, Sum<long long>, 1024>(const long long*, long long*, int);

// The classic tree in dynamic shared memory, with every step's barrier.
extern "C" __global__ void reduce_tree(const float* __restrict__ in, float* __restrict__ out, int n) {
    extern __shared__ float sums[];
    const unsigned t = threadIdx.x;
    const int i = blockIdx.x * blockDim.x + t;
    sums[t] = i < n ? in[i] : 0.0f;
    __syncthreads();
    for (unsigned s = blockDim.x / 2; s > 0; s >>= 1) {
        if (t < s) sums[t] += sums[t + s];
        __syncthreads();
    }
    if (t == 0) out[blockIdx.x] = sums[0];
}

// A warp per segment; offsets has segments + 1 entries.
extern "C" __global__ void segmented_sum(const float* __restrict__ in, const int* __restrict__ offsets,
                                         float* __restrict__ out, int segments) {
    const int segment = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (segment >= segments) return;
    float v = 0.0f;
    for (int i = offsets[segment] + lane; i < offsets[segment + 1]; i += 32) v += in[i];
#pragma unroll
    for (int offset = 16; offset; offset /= 2) v += __shfl_down_sync(0xffffffffu, v, offset);
    if (lane == 0) out[segment] = v;
}

// Dot product of floats, summed in double; blocks add up through an atomic.
extern "C" __global__ void dot_f64(const float* __restrict__ a, const float* __restrict__ b, double* __restrict__ out,
                                   int n) {
    double v = 0.0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += (double)a[i] * b[i];
    v = block_reduce<double, Sum<double>, 256>(v, Sum<double>());
    if (threadIdx.x == 0) atomicAdd(out, v);
}

// The warp-wide integer instructions of sm_80.
extern "C" __global__ void redux(const int* __restrict__ in, int* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned mask = __ballot_sync(0xffffffffu, i < n);
    if (i >= n) return;
    const int v = in[i];
    const int row = i / 32 * 8;
    const int r[8] = {__reduce_add_sync(mask, v),
                      __reduce_min_sync(mask, v),
                      __reduce_max_sync(mask, v),
                      (int)__reduce_min_sync(mask, (unsigned)v),
                      (int)__reduce_max_sync(mask, (unsigned)v),
                      (int)__reduce_and_sync(mask, (unsigned)v),
                      (int)__reduce_or_sync(mask, (unsigned)v),
                      (int)__reduce_xor_sync(mask, (unsigned)v)};
    if ((threadIdx.x & 31) == 0)
#pragma unroll
        for (int k = 0; k < 8; ++k) out[row + k] = r[k];
}

// The whole sum in one launch: the last block to arrive adds up what the others left.
__device__ unsigned int blocks_done = 0;

extern "C" __global__ void __launch_bounds__(128) sum_last_block(const float* __restrict__ in,
                                                                 volatile float* __restrict__ partial,
                                                                 float* __restrict__ out, int n) {
    __shared__ bool is_last;
    float v = 0.0f;
    for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += 128 * gridDim.x) v += in[i];
    v = block_reduce<float, Sum<float>, 128>(v, Sum<float>());
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = v;
        __threadfence();
        is_last = atomicInc(&blocks_done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    v = 0.0f;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += 128) v += partial[i];
    v = block_reduce<float, Sum<float>, 128>(v, Sum<float>());
    if (threadIdx.x == 0) *out = v;
}
