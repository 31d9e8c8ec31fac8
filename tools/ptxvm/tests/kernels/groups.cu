// Cooperative groups: a barrier of the grid, and tiles of more than a warp.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>

namespace cg = cooperative_groups;

// Each block adds its part up; after a barrier of the grid every block knows all sums.
extern "C" __global__ void grid_sums(const int* __restrict__ in, int* __restrict__ parts, int* __restrict__ out) {
    cg::grid_group grid = cg::this_grid();
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    atomicAdd(&sum, in[grid.thread_rank()]);
    __syncthreads();
    for (int round = 0; round < 3; ++round) {
        if (threadIdx.x == 0) parts[blockIdx.x] = sum + round;
        grid.sync();
        int all = 0;
        for (unsigned i = 0; i < gridDim.x; ++i) all += parts[i];
        grid.sync();
        if (threadIdx.x == 0) out[round * gridDim.x + blockIdx.x] = all;
    }
}

// The same without a barrier between writing the parts and reading them.
extern "C" __global__ void grid_sums_unordered(int* __restrict__ parts, int* __restrict__ out) {
    cg::grid_group grid = cg::this_grid();
    grid.sync();
    if (threadIdx.x == 0) parts[blockIdx.x] = blockIdx.x;
    int all = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) all += parts[i];
    if (threadIdx.x == 0) out[blockIdx.x] = all;
}

// Sums, the largest and the first value of tiles of 64 and of 128 threads, which no warp-wide instruction reaches.
template <int width>
static __device__ void tile_sums(const int* in, int* out, int n) {
    __shared__ cg::block_tile_memory<256> memory;
    cg::thread_block block = cg::this_thread_block(memory);
    auto tile = cg::tiled_partition<width>(block);
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const int x = in[i];
    const int sum = cg::reduce(tile, x, cg::plus<int>());
    tile.sync();
    const int most = cg::reduce(tile, x, cg::greater<int>());
    const int first = tile.shfl(x, 0);
    // By the letter, any() may overwrite what another lane's shfl() still reads: a vote orders no memory.
    tile.sync();
    const int any = tile.any(x == 7);
    out[i] = sum;
    out[n + i] = most;
    out[2 * n + i] = first + 1000 * any;
}

extern "C" __global__ void tiles_of_64(const int* in, int* out, int n) { tile_sums<64>(in, out, n); }
extern "C" __global__ void tiles_of_128(const int* in, int* out, int n) { tile_sums<128>(in, out, n); }
