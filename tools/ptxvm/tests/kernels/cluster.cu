// Clusters for sm_90: blocks that use each other's shared memory. With -DWRONG each kernel lacks the one thing that makes it
// right.
#include <cooperative_groups.h>
#include <cuda/barrier>
#include <cuda/ptx>

#include <cstdint>

namespace cg = cooperative_groups;
namespace ptx = cuda::ptx;

// A histogram whose bins are spread over the blocks of a cluster; each cluster adds its counts to those of the grid.
extern "C" __global__ void cluster_histogram(const int* in, int n, unsigned* bins, int bins_per_block) {
  extern __shared__ unsigned mine[];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  for (int i = threadIdx.x; i < bins_per_block; i += blockDim.x) mine[i] = 0;
#ifndef WRONG
  cluster.sync();
#endif
  for (int i = cg::this_grid().thread_rank(); i < n; i += cg::this_grid().num_threads()) {
    const int bin = min(max(in[i], 0), blocks * bins_per_block - 1);
    atomicAdd(cluster.map_shared_rank(mine, bin / bins_per_block) + bin % bins_per_block, 1);
  }
  cluster.sync();
  for (int i = threadIdx.x; i < bins_per_block; i += blockDim.x) atomicAdd(&bins[rank * bins_per_block + i], mine[i]);
}

// The sum of squares of a row for each cluster: blocks add up parts of it, and the first one reads what the others have.
extern "C" __global__ void __cluster_dims__(4, 1, 1) cluster_norm(const float* in, float* out, int columns) {
  __shared__ float part[8], sum;
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), row = blockIdx.x / 4;
  float s = 0;
  for (int i = rank * blockDim.x + threadIdx.x; i < columns; i += 4 * blockDim.x) s += in[row * columns + i] * in[row * columns + i];
  for (int step = 16; step; step /= 2) s += __shfl_xor_sync(~0u, s, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int w = 0; w < blockDim.x / 32; w++) sum += part[w];
  }
  cluster.sync();
  if (rank == 0 && threadIdx.x == 0) {
    float all = 0;
    for (int r = 0; r < 4; r++) all += *cluster.map_shared_rank(&sum, r);
    out[row] = all;
  }
#ifndef WRONG
  cluster.sync();  // nobody leaves while the first block reads
#endif
}

// A tensor map, whatever is in it.
struct alignas(64) Map {
  char bytes[128];
};

constexpr int M = 32, N = 32, K = 16, STAGES = 2, CONSUMERS = 128;

// C = A B in blocks of M x N. The two blocks of a cluster lie over each other and need the same tile of B: each loads half of
// it for both. A warp of one thread fills a ring of stages; four warps empty it, and tell both blocks, because both write there.
extern "C" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(CONSUMERS + 32)
    multicast_gemm(const __grid_constant__ Map a, const __grid_constant__ Map b, float* c, int n, int k) {
  __shared__ alignas(128) float tile_a[STAGES][M][K], tile_b[STAGES][K][N];
  __shared__ alignas(8) uint64_t full[STAGES], empty[STAGES];
  cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], 2 * CONSUMERS);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  cluster.sync();
  if (threadIdx.x >= CONSUMERS) {
    if (threadIdx.x == CONSUMERS) {
      for (int t = 0; t < k / K; t++) {
        const int s = t % STAGES;
        while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &empty[s], (t / STAGES & 1) ^ 1)) {}
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full[s], sizeof(tile_a[0]) + sizeof(tile_b[0]));
        const int32_t at_a[2] = {t * K, int32_t(blockIdx.y * M)};
        const int32_t at_b[2] = {int32_t(blockIdx.x * N), int32_t(t * K + rank * K / 2)};
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile_a[s], &a, at_a, &full[s]);
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile_b[s][rank * K / 2], &b, at_b, &full[s], 3);
      }
    }
  } else {
    float sums[M * N / CONSUMERS] = {};
    for (int t = 0; t < k / K; t++) {
      const int s = t % STAGES;
      while (!ptx::mbarrier_try_wait_parity(ptx::sem_acquire, ptx::scope_cluster, &full[s], t / STAGES & 1)) {}
      for (int i = 0; i < M * N / CONSUMERS; i++) {
        const int row = threadIdx.x / N + i * (CONSUMERS / N), column = threadIdx.x % N;
        for (int j = 0; j < K; j++) sums[i] += tile_a[s][row][j] * tile_b[s][j][column];
      }
#ifndef WRONG
      for (int r = 0; r < 2; r++) {
        ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cluster, ptx::space_cluster, cluster.map_shared_rank(&empty[s], r));
      }
#else
      for (int r = 0; r < 2; r++) ptx::mbarrier_arrive(&empty[s]);  // twice its own, and the other block does not know
#endif
    }
    for (int i = 0; i < M * N / CONSUMERS; i++) {
      const int row = blockIdx.y * M + threadIdx.x / N + i * (CONSUMERS / N), column = blockIdx.x * N + threadIdx.x % N;
      c[row * n + column] = sums[i];
    }
  }
  cluster.sync();
}

constexpr int PIECE = 64;

// Each block hands its numbers to the next one of the cluster, n times round: by st.async the first time, then in bulk.
extern "C" __global__ void cluster_ring(const int* in, int* out, int rounds) {
  __shared__ alignas(16) int piece[3][PIECE];
  __shared__ alignas(8) uint64_t came;
  cg::cluster_group cluster = cg::this_cluster();
  const int i = threadIdx.x, blocks = cluster.num_blocks(), next = (cluster.block_rank() + 1) % blocks;
  if (i == 0) {
    ptx::mbarrier_init(&came, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  cluster.sync();
  uint64_t* there = cluster.map_shared_rank(&came, next);
  if (i == 0) ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &came, sizeof(piece[0]));
  ptx::st_async(cluster.map_shared_rank(&piece[0][i], next), in[blockIdx.x * PIECE + i], there);
  while (!ptx::mbarrier_try_wait_parity(&came, 0)) {}
  for (int round = 1; round < rounds; round++) {
    if (i == 0) ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &came, sizeof(piece[0]));
    piece[2][i] = piece[(round - 1) % 2][i] + 1;
#ifndef WRONG
    ptx::fence_proxy_async(ptx::space_shared);
#endif
    cluster.sync();  // all have read what is overwritten now
    if (i == 0) {
      ptx::cp_async_bulk(ptx::space_cluster, ptx::space_shared, cluster.map_shared_rank(piece[round % 2], next), piece[2], sizeof(piece[0]), there);
    }
    while (!ptx::mbarrier_try_wait_parity(&came, round & 1)) {}
    cluster.sync();  // the copies have read piece[2]
  }
  out[blockIdx.x * PIECE + i] = piece[(rounds - 1) % 2][i];
  cluster.sync();
}
