// Uniform random numbers: weights and inputs of benchmarks, made where they are used.
//
//   x[i] = center + spread u,  u = b / 2^24 - 1
//
// b is the upper 25 bits of word i mod 4 of Philox with the counter (i / 4, 0, 0) and the key (seed, 0), so that u is in [-1, 1].
// Every operation rounds to f32, and a bf16 is rounded once more: the numbers are those of src/backend/cpu/random.rs to the bit.
//
// A thread makes 16 bytes. Bytes per element: 2 or 4 written. Instructions per element: some 40, most of them of Philox. The limit
// is the issue of instructions.

#include "random.cuh"

struct Uniform {  // shared
    float center, spread;
    unsigned seed;
};
static_assert(sizeof(Uniform) == 12);

__device__ __forceinline__ float scaled(const Uniform &uniform, unsigned bits) {
    const float u = __uint2float_rn(bits >> 7) * 0x1p-24f - 1.0f;
    return uniform.center + uniform.spread * u;
}

// Computes elements 4 n .. 4 n + 3.
__device__ __forceinline__ void four(const Uniform &uniform, size_t n, float *x) {
    const uint4 bits = philox(make_uint4(unsigned(n), unsigned(n >> 32), 0, 0), uniform.seed, 0);
    x[0] = scaled(uniform, bits.x);
    x[1] = scaled(uniform, bits.y);
    x[2] = scaled(uniform, bits.z);
    x[3] = scaled(uniform, bits.w);
}

// x [n].
// Launched by cuda/random.rs: random; grid (bytes / 4096), 256 threads.
extern "C" __global__ void __launch_bounds__(256) random_bf16(bf16 *__restrict__ x, size_t n, Uniform uniform) {
    const size_t group = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    float values[8];
    four(uniform, 2 * group, values);
    four(uniform, 2 * group + 1, values + 4);
    const bf16x8 rounded = narrow(values);
    if (8 * group + 8 <= n) {
        store8(x, group, rounded);
    } else {
#pragma unroll
        for (unsigned i = 0; i < 8; i++)
            if (8 * group + i < n) x[8 * group + i] = i % 2 ? rounded.pair[i / 2].y : rounded.pair[i / 2].x;
    }
}

// x [n].
// Launched by cuda/random.rs: random; grid (bytes / 4096), 256 threads.
extern "C" __global__ void __launch_bounds__(256) random_f32(float *__restrict__ x, size_t n, Uniform uniform) {
    const size_t group = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    float values[4];
    four(uniform, group, values);
    if (4 * group + 4 <= n) {
        reinterpret_cast<float4 *>(x)[group] = make_float4(values[0], values[1], values[2], values[3]);
    } else {
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
            if (4 * group + i < n) x[4 * group + i] = values[i];
    }
}
