// Products for sm_90a as the libraries of tensor cores are built: one warpgroup loads by TMA, others multiply by wgmma, and rings
// of mbarriers are between them. WRONG tells which mistake a kernel has.
#include <cuda/ptx>

#include <cstdint>

namespace ptx = cuda::ptx;

#ifndef WRONG
#define WRONG 0
#endif

// A tensor map, whatever is in it.
struct alignas(64) Map {
  char bytes[128];
};

// The tiles are K-major, 64 elements of 16 bits to a row, swizzled by 128 bytes: eight rows are 1024 bytes.
__device__ uint64_t k_major(const void* tile) {
  const uint64_t at = __cvta_generic_to_shared(tile);
  return at >> 4 | uint64_t(1) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

// The same bytes read as an MN-major tile of 64 columns: eight depths are 1024 bytes.
__device__ uint64_t mn_major(const void* tile) {
  const uint64_t at = __cvta_generic_to_shared(tile);
  return at >> 4 | uint64_t(512) << 16 | uint64_t(64) << 32 | uint64_t(1) << 62;
}

__device__ void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
__device__ void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#define FOUR(d, i) "+f"(d[4 * i]), "+f"(d[4 * i + 1]), "+f"(d[4 * i + 2]), "+f"(d[4 * i + 3])
#define THIRTY_TWO(d) FOUR(d, 0), FOUR(d, 1), FOUR(d, 2), FOUR(d, 3), FOUR(d, 4), FOUR(d, 5), FOUR(d, 6), FOUR(d, 7)
#define REGISTERS                                                                                        \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"

// d = a b + d, or a b: 64 x 64 x 16, both factors K-major in shared memory.
__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS ", %32, %33, p, 1, 1, 0, 0;\n}"
      : THIRTY_TWO(d)
      : "l"(a), "l"(b), "r"(add)
      : "memory");
}

// The same with a in registers and b MN-major.
__device__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " REGISTERS ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : THIRTY_TWO(d)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
               : "memory");
}

__device__ void await(uint64_t* barrier, int phase) {
  while (!ptx::mbarrier_try_wait_parity(barrier, phase & 1)) {}
}

__device__ void load(void* to, const Map& from, int x, int y, uint64_t* barrier) {
  const int32_t at[2] = {x, y};
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, to, &from, at, barrier);
}

constexpr int K = 64, STAGES = 3, ROWS = 128, COLUMNS = 64;

// c = a b^T for a of m x k, b of n x k, in tiles of 128 x 64: a persistent kernel with a warpgroup that loads and two that multiply.
extern "C" __global__ void __launch_bounds__(384)
    gemm(const __grid_constant__ Map a, const __grid_constant__ Map b, float* c, int m, int n, int k) {
  extern __shared__ __align__(1024) char shared[];
  auto a_tile = [&](int s) { return shared + s * (ROWS + COLUMNS) * K * 2; };
  auto b_tile = [&](int s) { return a_tile(s) + ROWS * K * 2; };
  __shared__ alignas(8) uint64_t full[STAGES], empty[STAGES];
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], 2);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  const int across = (n + COLUMNS - 1) / COLUMNS, tiles = (m + ROWS - 1) / ROWS * across, steps = (k + K - 1) / K;
  int at = 0;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread != 0) return;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
      for (int step = 0; step < steps; step++, at++) {
        const int s = at % STAGES;
        await(&empty[s], (at / STAGES) ^ 1);
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full[s], (ROWS + COLUMNS) * K * 2);
        load(a_tile(s), a, step * K, tile / across * ROWS, &full[s]);
        load(b_tile(s), b, step * K, tile % across * COLUMNS, &full[s]);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float d[32];
    for (int step = 0; step < steps; step++, at++) {
      const int s = at % STAGES;
      await(&full[s], at / STAGES);
      if (WRONG != 1) product_fence();
      for (int part = 0; part < K / 16; part++) {
        multiply(d, k_major(a_tile(s) + group * 64 * K * 2) + 2 * part, k_major(b_tile(s)) + 2 * part, step + part);
      }
      product_commit();
      // The products of the stage before are done, and who loads may have it; WRONG: this one's.
      product_wait<1>();
      if (thread == 0 && (WRONG == 2 || step > 0)) ptx::mbarrier_arrive(&empty[WRONG == 2 ? s : (at - 1) % STAGES]);
    }
    if (WRONG != 3) product_wait<0>();
    if (thread == 0 && WRONG != 2) ptx::mbarrier_arrive(&empty[(at - 1) % STAGES]);
    for (int i = 0; i < 32; i++) {
      const int row = tile / across * ROWS + group * 64 + thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
      const int column = tile % across * COLUMNS + i / 4 * 8 + thread % 4 * 2 + i % 2;
      if (row < m && column < n) c[row * n + column] = d[i];
    }
    if (WRONG == 3) product_wait<0>();
  }
}

__device__ uint32_t pair(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Attention with heads of 64, 64 keys at a time, each of two warpgroups with 64 queries; o = softmax(q k^T) v. Scores stay in
// registers, where they are the first factor of the second product.
extern "C" __global__ void __launch_bounds__(384)
    attention(const __grid_constant__ Map q, const __grid_constant__ Map k, const __grid_constant__ Map v, float* o, int queries, int keys) {
  extern __shared__ __align__(1024) char shared[];
  char* q_tile = shared;
  auto k_tile = [&](int s) { return shared + (2 + 2 * s) * 64 * K * 2; };
  auto v_tile = [&](int s) { return shared + (3 + 2 * s) * 64 * K * 2; };
  __shared__ alignas(8) uint64_t ready, full[STAGES], empty[STAGES];
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&ready, 1);
    for (int s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], 2);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  const int steps = (keys + 63) / 64;
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (thread != 0) return;
    ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &ready, 128 * K * 2);
    load(q_tile, q, 0, blockIdx.x * 128, &ready);
    for (int step = 0; step < steps; step++) {
      const int s = step % STAGES;
      await(&empty[s], (step / STAGES) ^ 1);
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full[s], 2 * 64 * K * 2);
      load(k_tile(s), k, 0, step * 64, &full[s]);
      load(v_tile(s), v, 0, step * 64, &full[s]);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  float out[32] = {}, most[2] = {-1e30f, -1e30f}, sum[2] = {};
  await(&ready, 0);
  for (int step = 0; step < steps; step++) {
    const int s = step % STAGES;
    await(&full[s], step / STAGES);
    float score[32];
    product_fence();
    for (int part = 0; part < 4; part++) {
      multiply(score, k_major(q_tile + group * 64 * K * 2) + 2 * part, k_major(k_tile(s)) + 2 * part, part);
    }
    product_commit();
    product_wait<0>();
    for (int half = 0; half < 2; half++) {
      float top = most[half];
      for (int i = 0; i < 32; i++) {
        if (i / 2 % 2 != half) continue;
        if (step * 64 + i / 4 * 8 + thread % 4 * 2 + i % 2 >= keys) score[i] = -1e30f;
        top = fmaxf(top, score[i]);
      }
      top = quad_max(top);
      const float shrink = __expf(most[half] - top);
      most[half] = top;
      sum[half] *= shrink;
      for (int i = 0; i < 32; i++) {
        if (i / 2 % 2 != half) continue;
        score[i] = __expf(score[i] - top);
        sum[half] += score[i];
        out[i] *= shrink;
      }
    }
    uint32_t p[4][4];
    for (int part = 0; part < 4; part++) {
      for (int i = 0; i < 4; i++) p[part][i] = pair(score[8 * part + 2 * i], score[8 * part + 2 * i + 1]);
    }
    if (WRONG != 4) product_fence();
    for (int part = 0; part < 4; part++) multiply(out, p[part], mn_major(v_tile(s)) + 128 * part);
    product_commit();
    product_wait<0>();
    if (thread == 0) ptx::mbarrier_arrive(&empty[s]);
  }
  for (int i = 0; i < 32; i++) {
    const int half = i / 2 % 2;
    float all = sum[half] + __shfl_xor_sync(~0u, sum[half], 1);
    all += __shfl_xor_sync(~0u, all, 2);
    const int row = blockIdx.x * 128 + group * 64 + thread / 32 * 16 + thread % 32 / 4 + half * 8;
    const int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
    if (row < queries) o[row * 64 + column] = out[i] / all;
  }
}
