// Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
#include <cuda_runtime.h>

struct Philox {
    unsigned k0, k1;
    __device__ uint4 operator()(uint4 c) const {
        unsigned a = k0, b = k1;
#pragma unroll
        for (int i = 0; i < 10; ++i) {
            const unsigned hi0 = __umulhi(0xD2511F53u, c.x), lo0 = 0xD2511F53u * c.x;
            const unsigned hi1 = __umulhi(0xCD9E8D57u, c.z), lo1 = 0xCD9E8D57u * c.z;
            c = make_uint4(hi1 ^ c.y ^ a, lo1, hi0 ^ c.w ^ b, lo0);
            a += 0x9E3779B9u;
            b += 0xBB67AE85u;
        }
        return c;
    }
};

extern "C" __global__ void philox_fill(uint4* __restrict__ out, int n, unsigned long long seed,
                                       unsigned long long offset) {
    const Philox philox{(unsigned)seed, (unsigned)(seed >> 32)};
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        const unsigned long long c = offset + i;
        out[i] = philox(make_uint4((unsigned)c, (unsigned)(c >> 32), 0u, 0u));
    }
}

// Two normals from two uniforms in (0, 1].
extern "C" __global__ void normal_fill(float2* __restrict__ out, int n, unsigned long long seed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint4 r = Philox{(unsigned)seed, (unsigned)(seed >> 32)}(make_uint4(i, 0, 1, 0));
    const float u = fmaf((float)r.x, 2.3283064365386963e-10f, 1.1641532182693481e-10f);
    const float v = fmaf((float)r.y, 2.3283064365386963e-10f, 1.1641532182693481e-10f);
    const float radius = sqrtf(-2.0f * logf(u));
    float s, c;
    sincospif(2.0f * v, &s, &c);
    out[i] = make_float2(radius * s, radius * c);
}

// A linear congruential generator with jump-ahead: 64-bit arithmetic and a data-dependent loop.
extern "C" __global__ void lcg_jump(unsigned long long* __restrict__ out, int n, unsigned long long seed) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    unsigned long long a = 6364136223846793005ull, c = 1442695040888963407ull, A = 1, C = 0;
    for (unsigned long long k = (unsigned long long)i * 977; k; k >>= 1) {
        if (k & 1) {
            A *= a;
            C = C * a + c;
        }
        c *= a + 1;
        a *= a;
    }
    out[i] = A * seed + C;
}
