// Constants and variables: copies to and from them, their addresses and sizes.
#include <cstdio>

#define OK(call) do { cudaError_t e = (call); if (e != cudaSuccess) return printf("%s: %s\n", #call, cudaGetErrorName(e)), 1; } while (0)

__constant__ float weights[8] = {1, 2, 3, 4, 5, 6, 7, 8};
__device__ int counter = 5;
__device__ float out[8];

__global__ void apply() {
    out[threadIdx.x] = weights[threadIdx.x] * counter;
}
__global__ void through(const float* p) { out[threadIdx.x] = p[threadIdx.x]; }

static int expect(const char* what, float a, float b, float c) {
    float got[8];
    OK(cudaMemcpyFromSymbol(got, out, sizeof got));
    if (got[0] != a || got[4] != b || got[7] != c) return printf("%s: %f %f %f\n", what, got[0], got[4], got[7]), 1;
    return 0;
}

int main() {
    apply<<<1, 8>>>();
    if (expect("initial", 5, 25, 40)) return 1;
    const float more[4] = {10, 20, 30, 40};
    OK(cudaMemcpyToSymbol(weights, more, sizeof more, 4 * sizeof(float)));
    const int two = 2;
    OK(cudaMemcpyToSymbol(counter, &two, sizeof two));
    apply<<<1, 8>>>();
    if (expect("set", 2, 20, 80)) return 1;
    size_t bytes;
    void* at;
    OK(cudaGetSymbolSize(&bytes, weights));
    OK(cudaGetSymbolAddress(&at, weights));
    through<<<1, 8>>>((const float*)at);
    if (expect("through an address", 1, 10, 40)) return 1;
    // What does not fit, and what is no symbol.
    if (cudaMemcpyToSymbol(weights, more, sizeof more, 20) != cudaErrorInvalidValue) return printf("fits?\n"), 1;
    int none;
    if (cudaGetSymbolAddress(&at, none) != cudaErrorInvalidSymbol) return printf("a symbol?\n"), 1;
    if (cudaGetLastError() != cudaErrorInvalidSymbol || cudaGetLastError() != cudaSuccess) return printf("last?\n"), 1;
    printf("%zu bytes of weights\n", bytes);
}
