// Prints the places of fields, which tests compare with the structures of this library, and calls what fills these.
#include <cstddef>
#include <cstdio>

int main() {
#define FIELD(f) printf(#f " %zu %zu\n", offsetof(cudaDeviceProp, f), sizeof(((cudaDeviceProp*)0)->f));
#include FIELDS
    printf("size %zu\n", sizeof(cudaDeviceProp));
    cudaDeviceProp p;
    if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) return 1;
    int shared, version;
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
    cudaDriverGetVersion(&version);
    printf("%d.%d, %d multiprocessors, %d bytes, %d threads, warps of %d, CUDA %d\n", p.major, p.minor, p.multiProcessorCount, shared,
           p.maxThreadsDim[2], p.warpSize, version / 1000);
    cudaFuncAttributes f;
    return cudaFuncGetAttributes(&f, (void*)main) == cudaErrorInvalidDeviceFunction ? 0 : 2;
}
