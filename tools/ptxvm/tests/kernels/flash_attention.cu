// Flash attention, forward: one warp owns 16 rows of queries, 64 per block; keys and values pass through shared
// memory 64 at a time; online softmax in registers; both products through mma.sync.
// q, k, v, o: [heads][tokens][D] in bf16; lse: [heads][tokens]. grid (ceil(tokens / 64), heads), block 128.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void load_x4(unsigned (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}
__device__ __forceinline__ void load_x4_trans(unsigned (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(p)) : "memory");
}
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ unsigned pack(float lo, float hi) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const unsigned*>(&v);
}
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(0xffffffffu, v, 1);
    return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

constexpr int BM = 64, BN = 64;

}  // namespace

template <int D, bool CAUSAL>
__global__ void __launch_bounds__(128)
    flash_forward(const __nv_bfloat16* __restrict__ q, const __nv_bfloat16* __restrict__ k,
                  const __nv_bfloat16* __restrict__ v, __nv_bfloat16* __restrict__ o, float* __restrict__ lse,
                  int tokens, float scale) {
    constexpr int PITCH = D + 8;  // 16 bytes of padding: eight rows of ldmatrix meet eight bank groups
    __shared__ __align__(16) __nv_bfloat16 qs[BM * PITCH], ks[BN * PITCH], vs[BN * PITCH];
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int row0 = blockIdx.x * BM;
    const size_t head = (size_t)blockIdx.y * tokens * D;

    auto load_tile = [&](__nv_bfloat16* to, const __nv_bfloat16* from, int first) {
#pragma unroll
        for (int i = t; i < BM * D / 8; i += 128) {
            const int r = i / (D / 8), c = i % (D / 8) * 8;
            const bool inside = first + r < tokens;
            const __nv_bfloat16* p = from + head + (size_t)(inside ? first + r : 0) * D + c;
            asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to + r * PITCH + c)),
                         "l"(p), "r"(inside ? 16 : 0) : "memory");
        }
    };

    load_tile(qs, q, row0);
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    unsigned qf[D / 16][4];
#pragma unroll
    for (int i = 0; i < D / 16; ++i) load_x4(qf[i], &qs[(warp * 16 + lane % 16) * PITCH + i * 16 + lane / 16 * 8]);

    const float log2_scale = scale * 1.44269504088896340736f;
    float out[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
    const int my_row = row0 + warp * 16 + lane / 4;
    const int end = CAUSAL ? min(tokens, row0 + BM) : tokens;

    for (int base = 0; base < end; base += BN) {
        __syncthreads();
        load_tile(ks, k, base);
        asm volatile("cp.async.commit_group;" ::: "memory");
        load_tile(vs, v, base);
        asm volatile("cp.async.commit_group;" ::: "memory");
        asm volatile("cp.async.wait_group 1;" ::: "memory");
        __syncthreads();

        float s[BN / 8][4] = {};
#pragma unroll
        for (int kk = 0; kk < D / 16; ++kk)
#pragma unroll
            for (int j = 0; j < BN / 16; ++j) {
                unsigned kf[4];
                load_x4(kf, &ks[(j * 16 + lane % 8 + lane / 16 * 8) * PITCH + kk * 16 + lane / 8 % 2 * 8]);
                mma(s[2 * j], qf[kk], kf[0], kf[1]);
                mma(s[2 * j + 1], qf[kk], kf[2], kf[3]);
            }
#pragma unroll
        for (int j = 0; j < BN / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int col = base + j * 8 + lane % 4 * 2 + e % 2, row = my_row + e / 2 * 8;
                const bool seen = col < tokens && (!CAUSAL || col <= row);
                s[j][e] = seen ? s[j][e] * log2_scale : -INFINITY;
            }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float m = top[h];
#pragma unroll
            for (int j = 0; j < BN / 8; ++j) m = fmaxf(m, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
            m = quad_max(m);
            const float safe = m == -INFINITY ? 0.0f : m;
            const float shrink = exp2_approx(top[h] - safe);
            top[h] = m;
            float part = 0.0f;
#pragma unroll
            for (int j = 0; j < BN / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) part += s[j][2 * h + e] = exp2_approx(s[j][2 * h + e] - safe);
            sum[h] = sum[h] * shrink + quad_sum(part);
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                out[j][2 * h] *= shrink;
                out[j][2 * h + 1] *= shrink;
            }
        }
        asm volatile("cp.async.wait_group 0;" ::: "memory");
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < BN / 16; ++kk) {
            // The accumulator's layout is that of an A operand: no trip through shared memory.
            const unsigned p[4] = {pack(s[2 * kk][0], s[2 * kk][1]), pack(s[2 * kk][2], s[2 * kk][3]),
                                   pack(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < D / 16; ++j) {
                unsigned vf[4];
                load_x4_trans(vf, &vs[(kk * 16 + lane % 16) * PITCH + j * 16 + lane / 16 * 8]);
                mma(out[2 * j], p, vf[0], vf[1]);
                mma(out[2 * j + 1], p, vf[2], vf[3]);
            }
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = my_row + 8 * h;
        if (row >= tokens) continue;
        const float inverse = 1.0f / sum[h];
#pragma unroll
        for (int j = 0; j < D / 8; ++j)
            *reinterpret_cast<unsigned*>(&o[head + (size_t)row * D + j * 8 + lane % 4 * 2]) =
                pack(out[j][2 * h] * inverse, out[j][2 * h + 1] * inverse);
        if (lane % 4 == 0) lse[(size_t)blockIdx.y * tokens + row] = (top[h] + log2f(sum[h])) * 0.69314718055994530942f;
    }
}

template __global__ void flash_forward<64, true>(const __nv_bfloat16*, const __nv_bfloat16*, const __nv_bfloat16*,
                                                 __nv_bfloat16*, float*, int, float);
template __global__ void flash_forward<32, false>(const __nv_bfloat16*, const __nv_bfloat16*, const __nv_bfloat16*,
                                                  __nv_bfloat16*, float*, int, float);
