// Bulk copies and tensor maps for sm_90, as CUDA's programming guide and libraries use them. With -DWRONG each kernel lacks the
// one thing that makes it right.
#include <cuda/barrier>
#include <cuda/ptx>

#include <cstdint>

using Barrier = cuda::barrier<cuda::thread_scope_block>;
namespace ptx = cuda::ptx;
#pragma nv_diag_suppress static_var_with_dynamic_init

constexpr int N = 256;

// Each tile of N numbers is reversed: loaded in bulk two tiles ahead, and stored in bulk.
extern "C" __global__ void bulk_reverse(const float* in, float* out, int tiles) {
  __shared__ alignas(128) float tile[2][N], result[N];
  __shared__ Barrier full[2];
  const int i = threadIdx.x;
  if (i < 2) init(&full[i], N);
  __syncthreads();
  auto load = [&](int t) {
    if (i == 0) cuda::device::memcpy_async_tx(tile[t % 2], in + t * N, cuda::aligned_size_t<16>(sizeof(tile[0])), full[t % 2]);
  };
  auto arrive = [&](int t) {
    return i == 0 ? cuda::device::barrier_arrive_tx(full[t % 2], 1, sizeof(tile[0])) : full[t % 2].arrive();
  };
  load(0);
  for (int t = 0; t < tiles; t++) {
    auto arrived = arrive(t);
    if (t + 1 < tiles) load(t + 1);
    full[t % 2].wait(std::move(arrived));
    result[i] = tile[t % 2][N - 1 - i];
#ifndef WRONG
    ptx::fence_proxy_async(ptx::space_shared);
#endif
    __syncthreads();
    if (i == 0) {
      ptx::cp_async_bulk(ptx::space_global, ptx::space_shared, out + t * N, result, sizeof(result));
      ptx::cp_async_bulk_commit_group();
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    }
    __syncthreads();
  }
}

// A tensor map, whatever is in it.
struct alignas(64) Map {
  char bytes[128];
};

constexpr int ROWS = 32, COLUMNS = 32, STAGES = 3;

// out = in + in of the matrix's transpose, in boxes of 32 x 32 words: a warp of one thread fills a ring of stages, four warps
// empty it. The last box of a row or column may stick out.
extern "C" __global__ void __launch_bounds__(160)
    tma_add_transposed(const __grid_constant__ Map in, const __grid_constant__ Map out, int boxes) {
  __shared__ alignas(1024) float tile[STAGES][2][ROWS][COLUMNS];
  __shared__ alignas(1024) float result[ROWS][COLUMNS];
  __shared__ alignas(8) uint64_t full[STAGES], empty[STAGES];
  const int i = threadIdx.x;
  if (i == 0) {
    for (int s = 0; s < STAGES; s++) {
      ptx::mbarrier_init(&full[s], 1);
      ptx::mbarrier_init(&empty[s], 128);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  if (i >= 128) {
    if (i != 128) return;
    for (int k = 0; k < boxes * boxes; k++) {
      const int s = k % STAGES, x = k % boxes, y = k / boxes;
#ifndef WRONG
      while (!ptx::mbarrier_try_wait_parity(&empty[s], (k / STAGES & 1) ^ 1)) {}
#else
      while (!ptx::mbarrier_try_wait_parity(&empty[s], k / STAGES & 1)) {}  // waits for a phase that has no cause to complete
#endif
      ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &full[s], sizeof(tile[0]));
      const int32_t here[2] = {x * COLUMNS, y * ROWS}, there[2] = {y * COLUMNS, x * ROWS};
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile[s][0], &in, here, &full[s]);
      ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, tile[s][1], &in, there, &full[s]);
    }
    return;
  }
  for (int k = 0; k < boxes * boxes; k++) {
    const int s = k % STAGES, x = k % boxes, y = k / boxes;
    while (!ptx::mbarrier_try_wait_parity(&full[s], k / STAGES & 1)) {}
    for (int e = i; e < ROWS * COLUMNS; e += 128) {
      const int r = e / COLUMNS, c = e % COLUMNS;
      // The boxes are swizzled by 128 bytes: pieces of four words change places within their row.
      auto place = [](int r, int c) { return (c / 4 ^ r % 8) * 4 + c % 4; };
      result[r][place(r, c)] = tile[s][0][r][place(r, c)] + tile[s][1][c][place(c, r)];
    }
    ptx::mbarrier_arrive(&empty[s]);
    ptx::fence_proxy_async(ptx::space_shared);
    asm volatile("bar.sync 1, 128;" ::: "memory");
    if (i == 0) {
      const int32_t here[2] = {x * COLUMNS, y * ROWS};
      ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &out, here, result);
      ptx::cp_async_bulk_commit_group();
      ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    }
    asm volatile("bar.sync 1, 128;" ::: "memory");
  }
}
