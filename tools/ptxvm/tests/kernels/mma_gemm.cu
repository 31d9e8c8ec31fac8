// Tensor-core GEMM as libraries write it: cp.async into three stages, XOR swizzle, ldmatrix, mma.sync.
// C[m][n] = A[m][k] B[n][k]^T (B stored with k contiguous), f32 out. k is a multiple of 8 (16-byte rows), m and n any.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

__device__ __forceinline__ unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// `bytes` of 16 come from memory, the rest is zero.
__device__ __forceinline__ void copy_16(void* to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;\n" ::); }
template <int N> __device__ __forceinline__ void wait_group() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N));
}

__device__ __forceinline__ void load_x4(unsigned (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p)));
}

template <typename T> struct Mma;
template <> struct Mma<__nv_bfloat16> {
    static __device__ __forceinline__ void run(float (&d)[4], const unsigned (&a)[4], const unsigned* b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};
template <> struct Mma<__half> {
    static __device__ __forceinline__ void run(float (&d)[4], const unsigned (&a)[4], const unsigned* b) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

constexpr int BK = 32;      // 64 bytes a row: four chunks of 16 bytes
constexpr int CHUNKS = BK / 8;
constexpr int STAGES = 3;

// Two rows share a 128-byte line; the chunk moves with the line so that 8 rows of one column meet 8 different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * BK + ((chunk ^ (row >> 1)) & (CHUNKS - 1)) * 8;
}

}  // namespace

template <typename T, int BM, int BN, int WARPS_M, int WARPS_N>
__global__ void __launch_bounds__(32 * WARPS_M * WARPS_N)
    mma_gemm(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ c, int m, int n, int k) {
    constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N, MT = WM / 16, NT = WN / 8;
    static_assert(WM % 16 == 0 && WN % 16 == 0, "a warp owns whole fragments");
    extern __shared__ __align__(128) unsigned char bytes[];
    T* as = reinterpret_cast<T*>(bytes);
    T* bs = as + STAGES * BM * BK;

    const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
    const int wm = warp % WARPS_M * WM, wn = warp / WARPS_M * WN;
    const int row0 = blockIdx.y * BM, col0 = blockIdx.x * BN;

    auto fetch = [&](int stage, int base) {
#pragma unroll
        for (int i = t; i < BM * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, chunk = i % CHUNKS, at = base + chunk * 8;
            const bool inside = row0 + row < m && at < k;
            copy_16(&as[stage * BM * BK + swizzled(row, chunk)], inside ? a + (size_t)(row0 + row) * k + at : a,
                    inside ? 16 : 0);
        }
#pragma unroll
        for (int i = t; i < BN * CHUNKS; i += THREADS) {
            const int row = i / CHUNKS, chunk = i % CHUNKS, at = base + chunk * 8;
            const bool inside = col0 + row < n && at < k;
            copy_16(&bs[stage * BN * BK + swizzled(row, chunk)], inside ? b + (size_t)(col0 + row) * k + at : b,
                    inside ? 16 : 0);
        }
        commit();
    };

    float sum[MT][NT][4] = {};
    const int steps = (k + BK - 1) / BK;
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        if (s < steps) fetch(s, s * BK);
        else commit();
    }
    for (int step = 0; step < steps; ++step) {
        wait_group<STAGES - 2>();
        __syncthreads();
        // The stage that everybody left before the barrier is free again.
        if (step + STAGES - 1 < steps) fetch((step + STAGES - 1) % STAGES, (step + STAGES - 1) * BK);
        else commit();
        const T* at = as + step % STAGES * BM * BK;
        const T* bt = bs + step % STAGES * BN * BK;
#pragma unroll
        for (int kk = 0; kk < BK / 16; ++kk) {
            unsigned af[MT][4], bf[NT / 2][4];
#pragma unroll
            for (int i = 0; i < MT; ++i)
                load_x4(af[i], &at[swizzled(wm + i * 16 + lane % 16, kk * 2 + lane / 16)]);
#pragma unroll
            for (int j = 0; j < NT / 2; ++j)  // two n-tiles: rows 0-7 and 8-15, each with both halves of k
                load_x4(bf[j], &bt[swizzled(wn + j * 16 + lane % 8 + lane / 16 * 8, kk * 2 + lane / 8 % 2)]);
#pragma unroll
            for (int i = 0; i < MT; ++i)
#pragma unroll
                for (int j = 0; j < NT; ++j) Mma<T>::run(sum[i][j], af[i], &bf[j / 2][j % 2 * 2]);
        }
    }
    wait_group<0>();

    const int r = lane / 4, q = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row0 + wm + i * 16 + r + e / 2 * 8, col = col0 + wn + j * 8 + q + e % 2;
                if (row < m && col < n) c[(size_t)row * n + col] = sum[i][j][e];
            }
}

template __global__ void mma_gemm<__nv_bfloat16, 64, 64, 2, 2>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int,
                                                               int, int);
template __global__ void mma_gemm<__half, 128, 64, 4, 2>(const __half*, const __half*, float*, int, int, int);

// The other B layout: B[k][n] with n contiguous, through ldmatrix.trans; one warp, one 16x16 tile, k in steps of 16.
extern "C" __global__ void mma_gemm_trans(const __nv_bfloat16* __restrict__ a, const __nv_bfloat16* __restrict__ b,
                                          float* __restrict__ c, int m, int n, int k) {
    __shared__ __align__(16) __nv_bfloat16 as[16][24], bs[16][24];
    const int lane = threadIdx.x, row0 = blockIdx.y * 16, col0 = blockIdx.x * 16;
    float sum[2][4] = {};
    for (int base = 0; base < k; base += 16) {
        for (int i = lane; i < 256; i += 32) {
            const int r = i / 16, s = i % 16;
            as[r][s] = row0 + r < m && base + s < k ? a[(row0 + r) * k + base + s] : __float2bfloat16(0.0f);
            bs[r][s] = base + r < k && col0 + s < n ? b[(base + r) * n + col0 + s] : __float2bfloat16(0.0f);
        }
        __syncwarp();
        unsigned af[4], bf[4];
        load_x4(af, &as[lane % 16][lane / 16 * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                     : "=r"(bf[0]), "=r"(bf[1]), "=r"(bf[2]), "=r"(bf[3])
                     : "r"(shared_address(&bs[lane % 16][lane / 16 * 8])));
        Mma<__nv_bfloat16>::run(sum[0], af, &bf[0]);
        Mma<__nv_bfloat16>::run(sum[1], af, &bf[2]);
        __syncwarp();
    }
    for (int j = 0; j < 2; ++j)
        for (int e = 0; e < 4; ++e) {
            const int row = row0 + lane / 4 + e / 2 * 8, col = col0 + j * 8 + lane % 4 * 2 + e % 2;
            if (row < m && col < n) c[row * n + col] = sum[j][e];
        }
}

// One warp, one fragment, straight from global memory: the shapes that GEMMs above do not use. Each lane gathers its
// registers by the tables of the PTX ISA; A is row-major, B is stored [n][k].
extern "C" __global__ void mma_m16n8k8_bf16(const unsigned short* a, const unsigned short* b, float* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto pair = [](const unsigned short* p) { return *reinterpret_cast<const unsigned*>(p); };
    const unsigned a0 = pair(a + g * 8 + q * 2), a1 = pair(a + (g + 8) * 8 + q * 2), b0 = pair(b + g * 8 + q * 2);
    float r[4];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%7,%7,%7};"
        : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
        : "r"(a0), "r"(a1), "r"(b0), "f"(0.5f));
    for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + q * 2 + e % 2] = r[e];
}

// f16 accumulators: two packed registers.
extern "C" __global__ void mma_m16n8k16_f16_accumulate(const __half* a, const __half* b, __half* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto pair = [](const __half* p) { return *reinterpret_cast<const unsigned*>(p); };
    const unsigned a0 = pair(a + g * 16 + q * 2), a1 = pair(a + (g + 8) * 16 + q * 2);
    const unsigned a2 = pair(a + g * 16 + q * 2 + 8), a3 = pair(a + (g + 8) * 16 + q * 2 + 8);
    const unsigned b0 = pair(b + g * 16 + q * 2), b1 = pair(b + g * 16 + q * 2 + 8);
    unsigned r[2];
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%8};"
        : "=r"(r[0]), "=r"(r[1])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0u));
    *reinterpret_cast<unsigned*>(d + g * 8 + q * 2) = r[0];
    *reinterpret_cast<unsigned*>(d + (g + 8) * 8 + q * 2) = r[1];
}

extern "C" __global__ void mma_m16n8k8_tf32(const float* a, const float* b, float* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    auto tf32 = [](float v) {
        unsigned r;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(v));
        return r;
    };
    const unsigned a0 = tf32(a[g * 8 + q]), a1 = tf32(a[(g + 8) * 8 + q]), a2 = tf32(a[g * 8 + q + 4]),
                   a3 = tf32(a[(g + 8) * 8 + q + 4]);
    const unsigned b0 = tf32(b[g * 8 + q]), b1 = tf32(b[g * 8 + q + 4]);
    float r[4];
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
        : "=f"(r[0]), "=f"(r[1]), "=f"(r[2]), "=f"(r[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
    for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + q * 2 + e % 2] = r[e];
}

// Double precision tensor cores: a warp, 8x8x4.
extern "C" __global__ void mma_m8n8k4_f64(const double* a, const double* b, double* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    double r0 = 1.0, r1 = -1.0;
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(r0), "+d"(r1)
        : "d"(a[g * 4 + q]), "d"(b[g * 4 + q]));
    d[g * 8 + q * 2] = r0;
    d[g * 8 + q * 2 + 1] = r1;
}

// Integers: C[m][n] = A[m][k] B[n][k]^T, s8 into s32, one warp per 16x8 tile, k a multiple of 32.
extern "C" __global__ void mma_gemm_s8(const signed char* __restrict__ a, const signed char* __restrict__ b,
                                       int* __restrict__ c, int m, int n, int k) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4, row0 = blockIdx.y * 16, col0 = blockIdx.x * 8;
    int r[4] = {};
    auto load = [&](const signed char* p, int row, int rows, int at) {
        return row < rows ? *reinterpret_cast<const int*>(p + (size_t)row * k + at) : 0;
    };
    for (int base = 0; base < k; base += 32) {
        const int a0 = load(a, row0 + g, m, base + q * 4), a1 = load(a, row0 + g + 8, m, base + q * 4);
        const int a2 = load(a, row0 + g, m, base + q * 4 + 16), a3 = load(a, row0 + g + 8, m, base + q * 4 + 16);
        const int b0 = load(b, col0 + g, n, base + q * 4), b1 = load(b, col0 + g, n, base + q * 4 + 16);
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    for (int e = 0; e < 4; ++e) {
        const int row = row0 + g + e / 2 * 8, col = col0 + q * 2 + e % 2;
        if (row < m && col < n) c[(size_t)row * n + col] = r[e];
    }
}

// u8 x s8 with saturation of the sum, 16x8x16.
extern "C" __global__ void mma_m16n8k16_u8s8_satfinite(const unsigned char* a, const signed char* b, const int* c,
                                                       int* d) {
    const int g = threadIdx.x / 4, q = threadIdx.x % 4;
    const int a0 = *(const int*)(a + g * 16 + q * 4), a1 = *(const int*)(a + (g + 8) * 16 + q * 4);
    const int b0 = *(const int*)(b + g * 16 + q * 4);
    int r[4];
    for (int e = 0; e < 4; ++e) r[e] = c[(g + e / 2 * 8) * 8 + q * 2 + e % 2];
    asm("mma.sync.aligned.m16n8k16.row.col.satfinite.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3])
        : "r"(a0), "r"(a1), "r"(b0));
    for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + q * 2 + e % 2] = r[e];
}
