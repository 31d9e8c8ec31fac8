// Row kernels: softmax, layer norm and RMS norm, one block or one warp per row, vector loads.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

template <bool MAX>
__device__ __forceinline__ float block_all(float v, float* scratch) {
#pragma unroll
    for (int o = 16; o; o >>= 1) {
        const float w = __shfl_xor_sync(0xffffffffu, v, o);
        v = MAX ? fmaxf(v, w) : v + w;
    }
    __syncthreads();  // scratch may still be read from the call before
    if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
    __syncthreads();
    v = scratch[0];
    for (int i = 1; i < blockDim.x / 32; ++i) v = MAX ? fmaxf(v, scratch[i]) : v + scratch[i];
    return v;
}

}  // namespace

// cols is a multiple of 4.
extern "C" __global__ void __launch_bounds__(256) softmax_rows(const float* __restrict__ in, float* __restrict__ out,
                                                               int cols) {
    __shared__ float scratch[8];
    const float4* x = reinterpret_cast<const float4*>(in + (size_t)blockIdx.x * cols);
    float4* y = reinterpret_cast<float4*>(out + (size_t)blockIdx.x * cols);
    float top = -INFINITY;
    for (int i = threadIdx.x; i < cols / 4; i += blockDim.x) {
        const float4 v = __ldg(x + i);
        top = fmaxf(top, fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w)));
    }
    top = block_all<true>(top, scratch);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < cols / 4; i += blockDim.x) {
        const float4 v = __ldg(x + i);
        const float4 e = make_float4(expf(v.x - top), expf(v.y - top), expf(v.z - top), expf(v.w - top));
        y[i] = e;
        sum += e.x + e.y + e.z + e.w;
    }
    sum = block_all<false>(sum, scratch);
    const float inverse = __frcp_rn(sum);
    for (int i = threadIdx.x; i < cols / 4; i += blockDim.x) {
        float4 e = y[i];
        e.x *= inverse;
        e.y *= inverse;
        e.z *= inverse;
        e.w *= inverse;
        y[i] = e;
    }
}

// A warp per row, any width, in one pass over registers (up to 32 * PER_LANE columns).
template <int PER_LANE>
__global__ void softmax_warp(const float* __restrict__ in, float* __restrict__ out, int rows, int cols) {
    const int row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= rows) return;
    float v[PER_LANE], top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
        const int col = i * 32 + threadIdx.x;
        v[i] = col < cols ? in[(size_t)row * cols + col] : -INFINITY;
        top = fmaxf(top, v[i]);
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, o));
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) sum += v[i] = __expf(v[i] - top);
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
        if (i * 32 + threadIdx.x < cols) out[(size_t)row * cols + i * 32 + threadIdx.x] = __fdividef(v[i], sum);
}
template __global__ void softmax_warp<4>(const float*, float*, int, int);

// mean and variance by Welford's updates, merged across lanes by Chan's formula.
extern "C" __global__ void layer_norm(const float* __restrict__ in, const float* __restrict__ gain,
                                      const float* __restrict__ bias, float* __restrict__ out, int cols, float eps) {
    __shared__ float means[32], squares[32];
    __shared__ int counts[32];
    const float* x = in + (size_t)blockIdx.x * cols;
    float mean = 0.0f, m2 = 0.0f;
    int count = 0;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
        const float v = x[i], d = v - mean;
        mean += d / ++count;
        m2 += d * (v - mean);
    }
    auto merge = [&](float mean_b, float m2_b, int count_b) {
        if (count_b == 0) return;
        const int n = count + count_b;
        const float d = mean_b - mean;
        mean += d * count_b / n;
        m2 += m2_b + d * d * ((float)count * count_b / n);
        count = n;
    };
#pragma unroll 1
    for (int o = 16; o; o >>= 1) {
        const float a = __shfl_down_sync(0xffffffffu, mean, o), b = __shfl_down_sync(0xffffffffu, m2, o);
        const int n = __shfl_down_sync(0xffffffffu, count, o);
        merge(a, b, n);
    }
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (lane == 0) {
        means[warp] = mean;
        squares[warp] = m2;
        counts[warp] = count;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < (blockDim.x + 31) / 32; ++w) merge(means[w], squares[w], counts[w]);
        means[0] = mean;
        squares[0] = rsqrtf(m2 / count + eps);
    }
    __syncthreads();
    mean = means[0];
    const float inverse = squares[0];
    for (int i = threadIdx.x; i < cols; i += blockDim.x)
        out[(size_t)blockIdx.x * cols + i] = fmaf((x[i] - mean) * inverse, gain[i], bias[i]);
}

// bf16 in and out, 8 per 16-byte load; gain as Gemma has it: 1 + weight.
extern "C" __global__ void __launch_bounds__(128) rms_norm_bf16(const __nv_bfloat16* __restrict__ in,
                                                                const __nv_bfloat16* __restrict__ weight,
                                                                __nv_bfloat16* __restrict__ out, int cols, float eps) {
    __shared__ float scratch[4];
    const uint4* x = reinterpret_cast<const uint4*>(in + (size_t)blockIdx.x * cols);
    const uint4* w = reinterpret_cast<const uint4*>(weight);
    uint4* y = reinterpret_cast<uint4*>(out + (size_t)blockIdx.x * cols);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) {
        const uint4 raw = x[i];
        const __nv_bfloat162* v = reinterpret_cast<const __nv_bfloat162*>(&raw);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = __bfloat1622float2(v[j]);
            sum = fmaf(f.x, f.x, fmaf(f.y, f.y, sum));
        }
    }
    sum = block_all<false>(sum, scratch);
    const float inverse = rsqrtf(sum / cols + eps);
    for (int i = threadIdx.x; i < cols / 8; i += blockDim.x) {
        const uint4 raw = x[i], gain = w[i];
        uint4 result;
        const __nv_bfloat162 *v = reinterpret_cast<const __nv_bfloat162*>(&raw),
                             *g = reinterpret_cast<const __nv_bfloat162*>(&gain);
        __nv_bfloat162* r = reinterpret_cast<__nv_bfloat162*>(&result);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 f = __bfloat1622float2(v[j]), s = __bfloat1622float2(g[j]);
            r[j] = __floats2bfloat162_rn(f.x * inverse * (1.0f + s.x), f.y * inverse * (1.0f + s.y));
        }
        y[i] = result;
    }
}
