// Shared by all kernels: types, 16-byte vectors of bf16, and reductions over a warp in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using bf162 = __nv_bfloat162;

constexpr unsigned WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Two f32, rounded to bf16, in one register: `low` in its lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    const bf162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const unsigned &>(pair);
}

// 2^x within 2 ulp, subnormal results flushed to zero. 2^0 is 1 and 2^-inf is 0 exactly.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A vector: eight bf16, which one 16-byte access moves. `widen` converts it to f32, `narrow` rounds f32 to nearest even.
struct alignas(16) bf16x8 {
    bf162 pair[4];
};

__device__ __forceinline__ void widen(const bf16x8 &v, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 p = __bfloat1622float2(v.pair[i]);
        x[2 * i] = p.x;
        x[2 * i + 1] = p.y;
    }
}

__device__ __forceinline__ bf16x8 narrow(const float (&x)[8]) {
    bf16x8 v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.pair[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    return v;
}

// Sum over the lanes of a warp by a butterfly of exchanges: all lanes get the same bits.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
    return x;
}

// Vector `i` of x by one 16-byte access. The cast to uint4 is there because the compiler turns a plain copy of a bf16x8 into
// four accesses of 4 bytes.
__device__ __forceinline__ bf16x8 load8(const bf16 *x, size_t i) {
    const uint4 words = reinterpret_cast<const uint4 *>(x)[i];
    return reinterpret_cast<const bf16x8 &>(words);
}

__device__ __forceinline__ void store8(bf16 *x, size_t i, const bf16x8 &v) {
    reinterpret_cast<uint4 *>(x)[i] = reinterpret_cast<const uint4 &>(v);
}

// **Register tricks.** An empty asm statement that claims to change a value hides from the compiler where the value came from. The
// three functions here are such statements, and `item_in_memory` of attention.cu is a fourth trick. Their effect is that of one
// compiler, here nvcc and ptxas 13.2, in registers of a thread on sm_80; tests/suite/kernels/resources.rs holds that no kernel
// spills and that enough warps fit a multiprocessor:
//
// | trick | kernel | registers with it | without |
// |---|---|---|---|
// | keep_packed | add_norm_forward_post | 41 | 50 |
// | keep_computed | matmul_forward_32x64 | 54 | 64 |
// | keep_advancing | matmul_forward_32x16 | 40 | 54 |
// | item_in_memory | attention_forward_64_rows_64 | 146 | 155 |
// | item_in_memory | attention_forward_256_rows_64 | 255, no spill | 255, 8 bytes spilled |

// Makes the compiler keep a vector in four registers and widen it again at the next use (four shifts, four masks), because it
// cannot know that the eight widened floats would still be valid.
__device__ __forceinline__ void keep_packed(bf16x8 &value) {
    unsigned(&words)[4] = reinterpret_cast<unsigned(&)[4]>(value);
    asm volatile("" : "+r"(words[0]), "+r"(words[1]), "+r"(words[2]), "+r"(words[3]));
}

// Makes the compiler keep values that are computed once before a loop. It would otherwise recompute them in every round.
__device__ __forceinline__ void keep_computed(size_t &a, size_t &b, int &c, int &d, int &e) {
    asm volatile("" : "+l"(a), "+l"(b), "+r"(c), "+r"(d), "+r"(e));
}

// Makes the compiler advance a pointer by one addition after another. It would otherwise compute p + i step for every i.
template <typename T>
__device__ __forceinline__ void keep_advancing(const T *&p) {
    asm volatile("" : "+l"(p));
}

// Tells the compiler that a pointer read from memory points to global memory, because it cannot derive that and would emit
// generic accesses.
template <typename T>
__device__ __forceinline__ T *in_global(T *p) {
    __builtin_assume(__isGlobal(p));
    return p;
}
