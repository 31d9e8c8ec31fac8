// cuda::barrier and cuda::pipeline of a block, as CUDA's programming guide uses them. Blocks have 256 threads, `pipe_roles`
// one warp more. With -DWRONG each kernel lacks the one thing that makes it right.
#include <cooperative_groups.h>
#include <cuda/barrier>
#include <cuda/pipeline>

namespace cg = cooperative_groups;
using Barrier = cuda::barrier<cuda::thread_scope_block>;
#pragma nv_diag_suppress static_var_with_dynamic_init

constexpr int N = 256;

// Each tile of N numbers is reversed.
extern "C" __global__ void reverse(const float* in, float* out, int tiles) {
  __shared__ Barrier ready;
  __shared__ float tile[N];
  const int i = threadIdx.x;
  if (i == 0) init(&ready, N);
  __syncthreads();
  for (int t = 0; t < tiles; t++) {
    tile[i] = in[t * N + i];
    auto arrived = ready.arrive();
#ifndef WRONG
    ready.wait(std::move(arrived));
#else
    (void)arrived;  // the other warps may not have stored
#endif
    out[t * N + i] = tile[N - 1 - i];
    ready.arrive_and_wait();
  }
}

// The first warp fills a ring of two tiles with its own stores, the others read it: two barriers for each tile.
extern "C" __global__ void ring(const float* in, float* out, int tiles) {
  __shared__ Barrier full[2], empty[2];
  __shared__ float tile[2][N - 32];
  const int i = threadIdx.x;
  if (i < 2) {
    init(&full[i], N);
    init(&empty[i], N);
  }
  __syncthreads();
  if (i < 32) {
    for (int t = 0; t < tiles; t++) {
      empty[t % 2].arrive_and_wait();
      for (int k = i; k < N - 32; k += 32) tile[t % 2][k] = 2 * in[t * (N - 32) + k];
      (void)full[t % 2].arrive();
    }
  } else {
    (void)empty[0].arrive();
    (void)empty[1].arrive();
    for (int t = 0; t < tiles; t++) {
      full[t % 2].arrive_and_wait();
#ifdef WRONG
      (void)empty[t % 2].arrive();  // the tile is still read
#endif
      out[t * (N - 32) + i - 32] = tile[t % 2][N - 1 - i];
#ifndef WRONG
      (void)empty[t % 2].arrive();
#endif
    }
  }
}

// All threads copy and all compute: a pipeline of the block with two stages.
extern "C" __global__ void pipe_unified(const float* in, float* out, int tiles) {
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 2> state;
  __shared__ alignas(16) float tile[2][N];
  auto block = cg::this_thread_block();
  auto pipe = cuda::make_pipeline(block, &state);
  const int i = threadIdx.x;
  int ahead = 0;
  for (int t = 0; t < tiles; t++) {
    for (; ahead < tiles && ahead < t + 2; ahead++) {
      pipe.producer_acquire();
      cuda::memcpy_async(block, tile[ahead % 2], in + ahead * N, cuda::aligned_size_t<16>(N * sizeof(float)), pipe);
      pipe.producer_commit();
    }
#ifndef WRONG
    pipe.consumer_wait();
#endif
    out[t * N + i] = tile[t % 2][N - 1 - i];
    pipe.consumer_release();
  }
}

// The last warp copies, the others compute: a pipeline with roles.
extern "C" __global__ void pipe_roles(const float* in, float* out, int tiles) {
  __shared__ cuda::pipeline_shared_state<cuda::thread_scope_block, 3> state;
  __shared__ alignas(16) float tile[3][N];
  auto block = cg::this_thread_block();
  const bool copies = threadIdx.x >= N;
  auto pipe =
      cuda::make_pipeline(block, &state, copies ? cuda::pipeline_role::producer : cuda::pipeline_role::consumer);
  const int i = threadIdx.x % N;
  for (int t = 0; t < tiles; t++) {
    if (copies) {
      pipe.producer_acquire();
      for (int k = i * 4; k < N; k += 128) {
        cuda::memcpy_async(&tile[t % 3][k], in + t * N + k, cuda::aligned_size_t<16>(16), pipe);
      }
      pipe.producer_commit();
    } else {
      pipe.consumer_wait();
#ifndef WRONG
      out[t * N + i] = tile[t % 3][N - 1 - i];
#else
      out[t * N + i] = tile[(t + 1) % 3][N - 1 - i];  // a stage that is still filled
#endif
      pipe.consumer_release();
    }
  }
}
