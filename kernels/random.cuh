// Counter-based random numbers, as src/rng.rs and src/backend/cpu/lm_head.rs make them: a draw depends on its key and
// counter alone, not on which thread makes it.
#pragma once

#include "common.cuh"

// The RNG key of a row's draws, 32 bytes. `noisy` is 0 for rows that choose greedily.
struct alignas(16) Draw {  // shared
    unsigned key[2];
    unsigned position, stream;
    unsigned prompt, noisy;
    unsigned unused[2];
};
static_assert(sizeof(Draw) == 32);

// Philox4x32-10 (Salmon et al., SC'11): ten rounds over four words of counter. A round is two products of 32 x 32 bits to 64
// and two three-way exclusive ors; between rounds two Weyl constants are added to the key.
__device__ __forceinline__ uint4 philox(uint4 counter, unsigned key0, unsigned key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const unsigned long long p0 = 0xD2511F53ull * counter.x, p1 = 0xCD9E8D57ull * counter.z;
        counter = make_uint4(unsigned(p1 >> 32) ^ counter.y ^ key0, unsigned(p1),
                             unsigned(p0 >> 32) ^ counter.w ^ key1, unsigned(p0));
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// Standard Gumbel noise from 32 random bits: -ln E with E = -ln(1 - u), u in (0, 1). E is computed from u near 0, and ln(1 - u)
// is corrected for the rounding of 1 - u (Kahan's log1p), because the smallest E decide draws. The logarithm is logf because
// __logf, the hardware's, has an absolute error of 2^-22 near 1.
__device__ __forceinline__ float gumbel(unsigned bits) {
    const float u = fminf((__uint2float_rn(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
    const float w = 1.0f - u;
    const float e = w == 1.0f ? u : -logf(w) * __fdividef(u, 1.0f - w);
    return -logf(e);
}

// Gumbel noise of the four tokens 4 n .. 4 n + 3 of a row.
__device__ __forceinline__ float4 gumbel4(const Draw &draw, unsigned n) {
    const uint4 bits = philox(make_uint4(n, draw.position, draw.stream, draw.prompt), draw.key[0], draw.key[1]);
    return make_float4(gumbel(bits.x), gumbel(bits.y), gumbel(bits.z), gumbel(bits.w));
}
