// A histogram whose bins are spread over the blocks of a cluster; with -DBUG a block leaves before the others have read from it.
#include <cooperative_groups.h>
#include <cstdio>
#include <vector>

namespace cg = cooperative_groups;

constexpr int BINS = 16;

__global__ void count(const int* x, int n, int* bins) {
    __shared__ int mine[BINS];
    auto cluster = cg::this_cluster();
    const int blocks = cluster.num_blocks(), rank = cluster.block_rank();
    if (threadIdx.x < BINS) mine[threadIdx.x] = 0;
    cluster.sync();
    for (int i = cg::this_grid().thread_rank(); i < n; i += cg::this_grid().num_threads()) {
        const int bin = x[i] % (blocks * BINS);
        atomicAdd(cluster.map_shared_rank(&mine[bin % BINS], bin / BINS), 1);
    }
    cluster.sync();
    // The first block takes what all have.
    if (rank == 0) {
        for (int i = threadIdx.x; i < blocks * BINS; i += blockDim.x) {
            atomicAdd(&bins[i], *cluster.map_shared_rank(&mine[i % BINS], i / BINS));
        }
    }
#ifndef BUG
    cluster.sync();
#endif
}

// Its launches count clusters of two blocks, not blocks.
__global__ void __block_size__((64, 1, 1), (2, 1, 1)) pairs(int* blocks) {
    if (threadIdx.x == 0) atomicAdd(&blocks[cg::this_cluster().block_rank()], 1);
}

#define OK(call) do { cudaError_t e = (call); if (e != cudaSuccess) return printf("%s\n", cudaGetErrorName(e)), 1; } while (0)

int main() {
    constexpr int N = 5000;
    std::vector<int> host(N), bins(8 * BINS);
    for (int i = 0; i < N; ++i) host[i] = i * 7 % 1013;
    int *x, *found, can, largest, at_once;
    OK(cudaDeviceGetAttribute(&can, cudaDevAttrClusterLaunch, 0));
    if (!can) return printf("no clusters\n"), 1;
    OK(cudaMalloc(&x, N * sizeof(int)));
    OK(cudaMemcpy(x, host.data(), N * sizeof(int), cudaMemcpyHostToDevice));
    OK(cudaMalloc(&found, bins.size() * sizeof(int)));
    for (int blocks : {1, 2, 4, 8}) {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {unsigned(blocks), 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = 8, config.blockDim = 64, config.attrs = &attribute, config.numAttrs = 1;
        OK(cudaOccupancyMaxPotentialClusterSize(&largest, count, &config));
        OK(cudaOccupancyMaxActiveClusters(&at_once, count, &config));
        if (largest != 8 || at_once < 1) return printf("%d blocks, %d clusters\n", largest, at_once), 1;
        OK(cudaMemset(found, 0, bins.size() * sizeof(int)));
        OK(cudaLaunchKernelEx(&config, count, (const int*)x, N, found));
        OK(cudaMemcpy(bins.data(), found, bins.size() * sizeof(int), cudaMemcpyDeviceToHost));
        std::vector<int> want(bins.size());
        for (int v : host) ++want[v % (blocks * BINS)];
        if (bins != want) return printf("wrong with %d blocks\n", blocks), 1;
        // Sixteen blocks are more than every device has.
        attribute.val.clusterDim = {16, 1, 1}, config.gridDim = 16;
        if (cudaLaunchKernelEx(&config, count, (const int*)x, N, found) != cudaErrorInvalidClusterSize) return printf("16 fit\n"), 1;
        cudaGetLastError();
    }
    OK(cudaMemset(found, 0, 2 * sizeof(int)));
    pairs<<<3, 64>>>(found);
    OK(cudaMemcpy(bins.data(), found, 2 * sizeof(int), cudaMemcpyDeviceToHost));
    if (bins[0] != 3 || bins[1] != 3) return printf("%d and %d blocks of 3 clusters\n", bins[0], bins[1]), 1;
    printf("all counted\n");
}
