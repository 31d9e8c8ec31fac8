// One element per thread, grid-stride loops, vector loads with a scalar tail, cache operators.
#include <cuda_runtime.h>

extern "C" __global__ void vector_add(const float* __restrict__ a, const float* __restrict__ b,
                                      float* __restrict__ c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}

extern "C" __global__ void saxpy_grid_stride(int n, float alpha, const float* __restrict__ x, float* __restrict__ y) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        y[i] = fmaf(alpha, x[i], y[i]);
}

// 16 bytes per thread and step; whoever is left over goes one by one.
extern "C" __global__ void __launch_bounds__(256) saxpy_vec4(int n, float alpha, const float* __restrict__ x,
                                                             float* __restrict__ y) {
    const int stride = gridDim.x * blockDim.x;
    const int first = blockIdx.x * blockDim.x + threadIdx.x;
    const float4* __restrict__ x4 = reinterpret_cast<const float4*>(x);
    float4* __restrict__ y4 = reinterpret_cast<float4*>(y);
#pragma unroll 4
    for (int i = first; i < n / 4; i += stride) {
        const float4 a = x4[i];
        float4 b = y4[i];
        b.x = fmaf(alpha, a.x, b.x);
        b.y = fmaf(alpha, a.y, b.y);
        b.z = fmaf(alpha, a.z, b.z);
        b.w = fmaf(alpha, a.w, b.w);
        y4[i] = b;
    }
    for (int i = n / 4 * 4 + first; i < n; i += stride) y[i] = fmaf(alpha, x[i], y[i]);
}

template <typename To, typename From, int PER_THREAD>
__global__ void convert(const From* __restrict__ in, To* __restrict__ out, int n) {
    const int base = (blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
#pragma unroll
    for (int k = 0; k < PER_THREAD; ++k)
        if (base + k < n) out[base + k] = static_cast<To>(in[base + k]);
}

template __global__ void convert<unsigned char, int, 3>(const int*, unsigned char*, int);
template __global__ void convert<short, float, 2>(const float*, short*, int);
template __global__ void convert<float, signed char, 4>(const signed char*, float*, int);
template __global__ void convert<double, long long, 1>(const long long*, double*, int);
template __global__ void convert<unsigned long long, double, 1>(const double*, unsigned long long*, int);
template __global__ void convert<float, unsigned int, 1>(const unsigned int*, float*, int);
template __global__ void convert<int, double, 1>(const double*, int*, int);
template __global__ void convert<float, double, 1>(const double*, float*, int);

// Cache operators change where data is kept, never what it is.
extern "C" __global__ void copy_cached(const int* in, int* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int v;
    switch (i % 6) {
        case 0: v = __ldg(in + i); break;
        case 1: v = __ldcg(in + i); break;
        case 2: v = __ldca(in + i); break;
        case 3: v = __ldcs(in + i); break;
        case 4: v = __ldlu(in + i); break;
        default: v = __ldcv(in + i); break;
    }
    switch (i % 4) {
        case 0: __stwb(out + i, v); break;
        case 1: __stcg(out + i, v); break;
        case 2: __stcs(out + i, v); break;
        default: __stwt(out + i, v); break;
    }
}

// A 3-D grid of 3-D blocks: every index register takes part. The tensor is [nz][ny][nx] with a pitch in elements.
extern "C" __global__ void index_3d(long long* __restrict__ out, int nx, int ny, int nz, int pitch) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x;
    const int y = blockIdx.y * blockDim.y + threadIdx.y;
    const int z = blockIdx.z * blockDim.z + threadIdx.z;
    if (x >= nx || y >= ny || z >= nz) return;
    unsigned lane, warp;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    asm volatile("mov.u32 %0, %%warpid;" : "=r"(warp));
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    // %warpid is no part of the contract between program and machine, but inside a block it tells warps apart.
    out[((long long)z * ny + y) * pitch + x] = (long long)block << 32 | thread << 8 | lane | (warp > 64 ? 1ll << 62 : 0);
}
