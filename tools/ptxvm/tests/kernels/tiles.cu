// Groups of lanes: ballots, votes, matches, coalesced and tiled groups, sub-warp shuffles.
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_runtime.h>

namespace cg = cooperative_groups;

// Warp-aggregated counting: the lanes that got here elect one to do the atomic for all.
extern "C" __global__ void filter_aggregated(const int* __restrict__ in, int* __restrict__ out, int* __restrict__ count,
                                             int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n || in[i] % 3 != 0) return;
    const unsigned active = __activemask();
    const int leader = __ffs(active) - 1;
    unsigned below;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
    int base = 0;
    if ((threadIdx.x & 31) == leader) base = atomicAdd(count, __popc(active));
    base = __shfl_sync(active, base, leader);
    out[base + __popc(active & below)] = in[i];
}

extern "C" __global__ void filter_coalesced(const int* __restrict__ in, int* __restrict__ out, int* __restrict__ count,
                                            int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && in[i] % 3 == 0) {
        const auto group = cg::coalesced_threads();
        int base = 0;
        if (group.thread_rank() == 0) base = atomicAdd(count, group.size());
        out[group.shfl(base, 0) + group.thread_rank()] = in[i];
    }
}

// Votes and masks, one word per warp and kind.
extern "C" __global__ void votes(const int* __restrict__ in, unsigned* __restrict__ out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
    const int v = in[i];
    unsigned masks[5];
    asm("mov.u32 %0, %%lanemask_eq;" : "=r"(masks[0]));
    asm("mov.u32 %0, %%lanemask_le;" : "=r"(masks[1]));
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(masks[2]));
    asm("mov.u32 %0, %%lanemask_ge;" : "=r"(masks[3]));
    asm("mov.u32 %0, %%lanemask_gt;" : "=r"(masks[4]));
    unsigned r = __ballot_sync(0xffffffffu, v > 0);
    unsigned odd = 0;
    if (v & 1) odd = __ballot_sync(__activemask(), v > 2);  // the lanes with an odd number only
    int same;
    const unsigned all = __match_all_sync(0xffffffffu, v, &same);
    unsigned* row = out + (size_t)i * 12;
    row[0] = r;
    row[1] = odd;
    row[2] = __any_sync(0xffffffffu, v > 6);
    row[3] = __all_sync(0xffffffffu, v > -6);
    row[4] = __uni_sync(0xffffffffu, v > 0);
    row[5] = __match_any_sync(0xffffffffu, v);
    row[6] = all ^ same;
    row[7] = __match_any_sync(0xffffffffu, (unsigned long long)v << 33);
    row[8] = masks[0] ^ (1u << lane);
    row[9] = masks[1] - masks[2];
    row[10] = masks[3] + masks[2];
    row[11] = masks[4];
}

// Every shuffle with every width, with lanes out of range keeping their own value.
extern "C" __global__ void shuffles(const double* __restrict__ in, double* __restrict__ out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
    const double v = in[i];
    double* row = out + (size_t)i * 10;
    row[0] = __shfl_sync(0xffffffffu, v, lane * 7 + 3);
    row[1] = __shfl_sync(0xffffffffu, v, lane ^ 5, 8);
    row[2] = __shfl_up_sync(0xffffffffu, v, 3);
    row[3] = __shfl_up_sync(0xffffffffu, v, 2, 4);
    row[4] = __shfl_down_sync(0xffffffffu, v, 9);
    row[5] = __shfl_down_sync(0xffffffffu, v, 1, 16);
    row[6] = __shfl_xor_sync(0xffffffffu, v, 21);
    row[7] = __shfl_xor_sync(0xffffffffu, v, 9, 8);
    // Half a warp at a time, each under its own mask.
    if (lane < 16) row[8] = __shfl_sync(0x0000ffffu, v, 15 - lane);
    else row[8] = __shfl_sync(0xffff0000u, v, 47 - lane);
    row[9] = __shfl_sync(0xffffffffu, v, i % 2 ? 1 : 30);
}

template <int SIZE>
__device__ float tile_norm(cg::thread_block_tile<SIZE> tile, float v) {
    const float sum = cg::reduce(tile, v * v, cg::plus<float>());
    return v * rsqrtf(sum);
}

// Rows of SIZE floats scaled to length 1.
template <int SIZE>
__global__ void normalize_tiles(const float* __restrict__ in, float* __restrict__ out) {
    const auto block = cg::this_thread_block();
    const auto tile = cg::tiled_partition<SIZE>(block);
    const int i = block.group_index().x * block.size() + block.thread_rank();
    out[i] = tile_norm<SIZE>(tile, in[i]);
    block.sync();
    if (tile.any(out[i] != out[i]) && tile.thread_rank() == 0) out[i] = 0.0f;
}
template __global__ void normalize_tiles<4>(const float*, float*);
template __global__ void normalize_tiles<16>(const float*, float*);
template __global__ void normalize_tiles<32>(const float*, float*);

// Integer reductions of a group become redux on sm_80.
extern "C" __global__ void group_extremes(const int* __restrict__ in, int* __restrict__ out) {
    const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    const int v = in[blockIdx.x * blockDim.x + threadIdx.x];
    const int lo = cg::reduce(warp, v, cg::less<int>()), hi = cg::reduce(warp, v, cg::greater<int>());
    const unsigned bits = cg::reduce(warp, (unsigned)v, cg::bit_xor<unsigned>());
    if (warp.thread_rank() == 0) {
        const int w = blockIdx.x * warp.meta_group_size() + warp.meta_group_rank();
        out[3 * w] = lo;
        out[3 * w + 1] = hi;
        out[3 * w + 2] = (int)bits;
    }
}
