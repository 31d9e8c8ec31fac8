// All blocks wait for each other; with -DBUG they do not.
#include <cooperative_groups.h>
#include <cstdio>

namespace cg = cooperative_groups;

__global__ void shift(const int* from, int* between, int* to, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    between[i] = from[i] + 1;
#ifndef BUG
    cg::this_grid().sync();
#endif
    to[i] = between[(i + blockDim.x) % n];
    auto tile = cg::tiled_partition<8>(cg::this_thread_block());
    to[i] = tile.shfl(to[i], 7 - tile.thread_rank());
}

#define OK(call) do { cudaError_t e = (call); if (e != cudaSuccess) return printf("%s\n", cudaGetErrorName(e)), 1; } while (0)

int main() {
    int held, n = 4 * 64, host[256], *x, *y, *z;
    cudaDeviceProp device;
    OK(cudaGetDeviceProperties(&device, 0));
    OK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&held, shift, 64, 0));
    if (!device.cooperativeLaunch || held < 1) return printf("cannot\n"), 1;
    for (int** p : {&x, &y, &z}) OK(cudaMalloc(p, sizeof host));
    for (int i = 0; i < n; ++i) host[i] = i;
    OK(cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice));
    void* args[] = {&x, &y, &z, &n};
    dim3 many(held * device.multiProcessorCount + 1);
    if (cudaLaunchCooperativeKernel((void*)shift, many, 64, args) != cudaErrorCooperativeLaunchTooLarge) return printf("fits?\n"), 1;
    cudaGetLastError();
    OK(cudaLaunchCooperativeKernel((void*)shift, 4, 64, args));
    OK(cudaMemcpy(host, z, sizeof host, cudaMemcpyDeviceToHost));
    for (int i = 0; i < n; ++i) {
        int from = i / 8 * 8 + 7 - i % 8;
        if (host[i] != (from + 64) % n + 1) return printf("z[%d] = %d\n", i, host[i]), 1;
    }
    printf("the grid has waited\n");
}
