// C = alpha * A B + beta * C in f32, row-major: naive, tiled, and with a register tile per thread.
#include <cuda_runtime.h>

extern "C" __global__ void sgemm_naive(int m, int n, int k, float alpha, const float* __restrict__ a,
                                       const float* __restrict__ b, float beta, float* __restrict__ c) {
    const int row = blockIdx.y * blockDim.y + threadIdx.y, col = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= m || col >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < k; ++i) sum += a[row * k + i] * b[i * n + col];
    c[row * n + col] = alpha * sum + beta * c[row * n + col];
}

template <int TILE>
__global__ void sgemm_tiled(int m, int n, int k, float alpha, const float* __restrict__ a, const float* __restrict__ b,
                            float beta, float* __restrict__ c) {
    __shared__ float as[TILE][TILE], bs[TILE][TILE];
    const int tx = threadIdx.x, ty = threadIdx.y;
    const int row = blockIdx.y * TILE + ty, col = blockIdx.x * TILE + tx;
    float sum = 0.0f;
    for (int base = 0; base < k; base += TILE) {
        as[ty][tx] = row < m && base + tx < k ? a[row * k + base + tx] : 0.0f;
        bs[ty][tx] = base + ty < k && col < n ? b[(base + ty) * n + col] : 0.0f;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILE; ++i) sum = fmaf(as[ty][i], bs[i][tx], sum);
        __syncthreads();
    }
    if (row < m && col < n) c[row * n + col] = alpha * sum + beta * c[row * n + col];
}
template __global__ void sgemm_tiled<16>(int, int, int, float, const float*, const float*, float, float*);
template __global__ void sgemm_tiled<32>(int, int, int, float, const float*, const float*, float, float*);

// 64x64 tiles, 8 deep, 4x4 outputs per thread, two buffers in shared memory. m, n, k are multiples of 4;
// rows of A and B are read as float4.
extern "C" __global__ void __launch_bounds__(256, 2)
    sgemm_register_tiled(int m, int n, int k, float alpha, const float* __restrict__ a, const float* __restrict__ b,
                         float beta, float* __restrict__ c) {
    constexpr int BM = 64, BN = 64, BK = 8;
    __shared__ __align__(16) float as[2][BK][BM + 4];
    __shared__ __align__(16) float bs[2][BK][BN];
    const int t = threadIdx.x, tx = t % 16, ty = t / 16;
    const int row0 = blockIdx.y * BM, col0 = blockIdx.x * BN;
    const bool loads_a = t < BM * BK / 4;  // the lower half brings A, the upper half B
    const int ar = t / (BK / 4), ac = t % (BK / 4) * 4;
    const int br = (t - 128) / (BN / 4), bc = t % (BN / 4) * 4;

    auto fetch = [&](int base) {
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (loads_a) {
            if (row0 + ar < m && base + ac < k) v = *reinterpret_cast<const float4*>(&a[(row0 + ar) * k + base + ac]);
        } else if (base + br < k && col0 + bc < n) {
            v = *reinterpret_cast<const float4*>(&b[(base + br) * n + col0 + bc]);
        }
        return v;
    };
    auto keep = [&](int buffer, float4 v) {
        if (loads_a) {
            as[buffer][ac + 0][ar] = v.x;
            as[buffer][ac + 1][ar] = v.y;
            as[buffer][ac + 2][ar] = v.z;
            as[buffer][ac + 3][ar] = v.w;
        } else {
            *reinterpret_cast<float4*>(&bs[buffer][br][bc]) = v;
        }
    };

    float sum[4][4] = {};
    keep(0, fetch(0));
    __syncthreads();
    int buffer = 0;
    for (int base = 0; base < k; base += BK, buffer ^= 1) {
        const bool more = base + BK < k;
        float4 next;
        if (more) next = fetch(base + BK);
#pragma unroll
        for (int i = 0; i < BK; ++i) {
            const float4 x = *reinterpret_cast<const float4*>(&as[buffer][i][ty * 4]);
            const float4 y = *reinterpret_cast<const float4*>(&bs[buffer][i][tx * 4]);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int s = 0; s < 4; ++s) sum[r][s] = fmaf(xs[r], ys[s], sum[r][s]);
        }
        if (more) keep(buffer ^ 1, next);
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const int row = row0 + ty * 4 + r, col = col0 + tx * 4;
        if (row >= m || col >= n) continue;
        float4* to = reinterpret_cast<float4*>(&c[row * n + col]);
        const float4 old = *to;
        *to = make_float4(alpha * sum[r][0] + beta * old.x, alpha * sum[r][1] + beta * old.y,
                          alpha * sum[r][2] + beta * old.z, alpha * sum[r][3] + beta * old.w);
    }
}
