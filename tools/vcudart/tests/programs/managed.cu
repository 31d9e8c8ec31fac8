// Managed memory and managed variables, page-locked and registered memory; with -DBUG memory is used that was given back.
#include <cstdio>
#include <cstdlib>

__managed__ int counter = 40;
__managed__ float table[4] = {1, 2, 3, 4};

__global__ void work(int* x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) x[i] = x[i] * 2 + (int)table[i % 4];
    if (threadIdx.x == 0) counter += 2;
}

#define OK(call) do { cudaError_t e = (call); if (e != cudaSuccess) return printf("%s: %s\n", #call, cudaGetErrorName(e)), 1; } while (0)

static int check(const char* what, const int* x, int n) {
    for (int i = 0; i < n; ++i) {
        if (x[i] != 2 * i + i % 4 + 10) return printf("%s: x[%d] = %d\n", what, i, x[i]), 1;
    }
    return 0;
}

int main() {
    const int n = 100;
    table[0] = 10, table[1] = 11, table[2] = 12, table[3] = 13;
    int* x;
    OK(cudaMallocManaged(&x, n * sizeof(int)));
    for (int i = 0; i < n; ++i) x[i] = i;
#ifdef BUG
    int* stale = x;
    OK(cudaFree(x));
    work<<<1, 32>>>(stale, n);
    OK(cudaDeviceSynchronize());
#endif
    work<<<1, 32>>>(x, n);
    OK(cudaDeviceSynchronize());
    if (check("managed", x, n)) return 1;

    int *locked, *at;
    OK(cudaHostAlloc(&locked, n * sizeof(int), cudaHostAllocMapped));
    for (int i = 0; i < n; ++i) locked[i] = i;
    OK(cudaHostGetDevicePointer(&at, locked, 0));
    work<<<1, 32>>>(at, n);
    OK(cudaStreamSynchronize(0));
    if (check("locked", locked, n)) return 1;

    int* own = (int*)malloc(n * sizeof(int));
    for (int i = 0; i < n; ++i) own[i] = i;
    OK(cudaHostRegister(own, n * sizeof(int), cudaHostRegisterMapped));
    OK(cudaHostGetDevicePointer(&at, own, 0));
    work<<<1, 32>>>(at, n);
    OK(cudaDeviceSynchronize());
    if (check("registered", own, n)) return 1;
    OK(cudaHostUnregister(own));

    cudaPointerAttributes is;
    OK(cudaPointerGetAttributes(&is, x + 3));
    if (is.type != cudaMemoryTypeManaged || is.devicePointer != x + 3 || is.hostPointer != x + 3) return printf("managed?\n"), 1;
    OK(cudaPointerGetAttributes(&is, locked));
    if (is.type != cudaMemoryTypeHost) return printf("locked?\n"), 1;
    OK(cudaPointerGetAttributes(&is, own));
    if (is.type != cudaMemoryTypeUnregistered) return printf("own?\n"), 1;
    free(own);
    OK(cudaFree(x));
    OK(cudaFreeHost(locked));
    printf("counter %d\n", counter);
}
