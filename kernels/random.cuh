// Counter-based random numbers, as src/rng.rs and src/backend/cpu/lm_head.rs make them: a draw depends on its key and
// counter alone, not on which thread makes it.
#pragma once

#include "common.cuh"

// The RNG key of a row's draws; 32 bytes, as the launcher uploads it. Rows that choose greedily have `noisy` 0.
struct alignas(16) Draw {
    unsigned key[2];
    unsigned position, stream;
    unsigned prompt, noisy;
    unsigned unused[2];
};

// Philox4x32-10 (Salmon et al., SC'11): ten rounds over four words of counter. A round is two wide products and two
// three-way exclusive ors; the key moves on by two Weyl constants.
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

// Standard Gumbel noise from 32 random bits: -ln E with E = -ln(1 - u), u in (0, 1). Small E decide draws, so E is
// taken from u near 0, and ln(1 - u) is corrected for the rounding of 1 - u (Kahan's log1p). logf, not __logf: near 1
// the hardware's logarithm is exact to an absolute 2^-22 only.
__device__ __forceinline__ float gumbel(unsigned bits) {
    const float u = fminf((__uint2float_rn(bits) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f);
    const float w = 1.0f - u;
    const float e = w == 1.0f ? u : -logf(w) * __fdividef(u, 1.0f - w);
    return -logf(e);
}

// The noise of the four tokens 4 n .. 4 n + 3 of a row.
__device__ __forceinline__ float4 gumbel4(const Draw &draw, unsigned n) {
    const uint4 bits = philox(make_uint4(n, draw.position, draw.stream, draw.prompt), draw.key[0], draw.key[1]);
    return make_float4(gumbel(bits.x), gumbel(bits.y), gumbel(bits.z), gumbel(bits.w));
}
