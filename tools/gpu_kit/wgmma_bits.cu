// Does one chain over k have the same bits in mma.sync and in wgmma of every width?
//
// Sampling and training compute a log-prob from the same products, and it must come out as one number. Today both use
// mma.sync. Which of them may move to Hopper's wgmma depends on what this measures: each kernel here computes
// C = A B^T, 64 x N in f32 from bf16, as one chain of products of 16 over k in ascending order, mma.sync's way and
// wgmma's at each width N. tests/suite/gpu_kit.rs runs them and compares.
//
// Only GPUs of compute capability 9.0 have wgmma: this is compiled for sm_90a.

#include <cuda_bf16.h>
#include <stdint.h>

namespace {

constexpr int ROWS = 64;   // of C; both instructions' warps have 16 of them each
constexpr int WIDTH = 256; // columns of C in memory, whatever N is
constexpr int STEP = 16;   // of k, for one product
constexpr int THREADS = 128;

// rows x 16 of a row-major matrix, to shared memory as wgmma reads it without a swizzle: core matrices of 8 rows by 8
// of k, each 128 bytes; those of 8 more rows next, those of 8 more of k behind them all.
__device__ void to_core_matrices(__nv_bfloat16 *to, const __nv_bfloat16 *from, int k, int rows) {
    for (int i = threadIdx.x; i < rows * STEP; i += THREADS) {
        const int row = i / STEP, at = i % STEP;
        const int core = at / 8 * (rows / 8) + row / 8;
        to[core * 64 + row % 8 * 8 + at % 8] = from[size_t(row) * k + at];
    }
}

// Shared memory for wgmma: address, bytes to the next 8 of k, bytes to the next 8 rows, all in units of 16.
__device__ uint64_t descriptor(const __nv_bfloat16 *tile, int rows) {
    const uint64_t address = __cvta_generic_to_shared(tile);
    const uint64_t next_k = rows / 8 * 128, next_rows = 128;
    return (address & 0x3ffff) >> 4 | next_k >> 4 << 16 | next_rows >> 4 << 32;
}

// Two neighbours of k as an operand of mma.sync.
__device__ unsigned pair(const __nv_bfloat16 *x, int row, int k, int at) {
    return *reinterpret_cast<const unsigned *>(x + size_t(row) * k + at);
}

// The names of registers in a list: %0 to %9, and ten of any other tens.
#define ONES "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define NAMES_4 "%0, %1, %2, %3"
#define NAMES_8 NAMES_4 ", %4, %5, %6, %7"
#define NAMES_16 ONES ", %10, %11, %12, %13, %14, %15"
#define NAMES_32 ONES ", " TEN(1) ", " TEN(2) ", %30, %31"
#define TO_59 ONES ", " TEN(1) ", " TEN(2) ", " TEN(3) ", " TEN(4) ", " TEN(5)
#define NAMES_64 TO_59 ", %60, %61, %62, %63"
#define NAMES_128                                                                                                       \
    TO_59 ", " TEN(6) ", " TEN(7) ", " TEN(8) ", " TEN(9) ", " TEN(10) ", " TEN(11)                                     \
        ", %120, %121, %122, %123, %124, %125, %126, %127"
// What they stand for: elements of `sum` from `i` on.
#define SUMS_4(i) "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

} // namespace

// C by wgmma of width N, one warp group; COUNT accumulators a thread, and the numbers of the operands behind them.
#define WGMMA(N, COUNT, A, B)                                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
        wgmma_n##N(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int k) {                                   \
        __shared__ __align__(128) __nv_bfloat16 tile_a[ROWS * STEP], tile_b[N * STEP];                                  \
        float sum[COUNT] = {};                                                                                          \
        for (int at = 0; at < k; at += STEP) {                                                                          \
            /* The product before has read the tiles. */                                                                \
            __syncthreads();                                                                                            \
            to_core_matrices(tile_a, a + at, k, ROWS);                                                                  \
            to_core_matrices(tile_b, b + at, k, N);                                                                     \
            /* wgmma reads by another way than these stores went: they must be seen there, */                           \
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");                                                \
            /* and by all threads. */                                                                                   \
            __syncthreads();                                                                                            \
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");                                                     \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES_##COUNT "}, %" #A ", %" #B  \
                         ", 1, 1, 1, 0, 0;"                                                                             \
                         : SUMS_##COUNT(0)                                                                              \
                         : "l"(descriptor(tile_a, ROWS)), "l"(descriptor(tile_b, N)));                                  \
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");                                              \
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");                                              \
        }                                                                                                               \
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;                     \
        for (int i = 0; i < COUNT; i++)                                                                                 \
            c[(row + i / 2 % 2 * 8) * WIDTH + i / 4 * 8 + column + i % 2] = sum[i];                                     \
    }

WGMMA(8, 4, 4, 5)
WGMMA(16, 8, 8, 9)
WGMMA(32, 16, 16, 17)
WGMMA(64, 32, 32, 33)
WGMMA(128, 64, 64, 65)
WGMMA(256, 128, 128, 129)

// C by mma.sync: a warp has 16 rows, and goes through all columns by eights.
extern "C" __global__ void __launch_bounds__(THREADS)
    mma_sync(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int k) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
    for (int n = 0; n < WIDTH; n += 8) {
        float sum[4] = {};
        for (int at = column; at < k; at += STEP) {
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                         "{%8, %9}, {%0, %1, %2, %3};"
                         : SUMS_4(0)
                         : "r"(pair(a, row, k, at)), "r"(pair(a, row + 8, k, at)), "r"(pair(a, row, k, at + 8)),
                           "r"(pair(a, row + 8, k, at + 8)), "r"(pair(b, n + lane / 4, k, at)),
                           "r"(pair(b, n + lane / 4, k, at + 8)));
        }
        for (int i = 0; i < 4; i++) c[(row + i / 2 * 8) * WIDTH + n + column + i % 2] = sum[i];
    }
}
