// What is refused, and with which error.
#include <cstdio>

__global__ void nothing() {}
__global__ __launch_bounds__(64) void small() {}
__global__ void large() { extern __shared__ char room[]; room[threadIdx.x] = 1; }

static int wrong = 0;
static void expect(const char* what, cudaError_t got, cudaError_t want) {
    cudaError_t last = cudaGetLastError();
    if (got != want || last != want) printf("%s: %s, then %s\n", what, cudaGetErrorName(got), cudaGetErrorName(last)), wrong = 1;
}
static cudaError_t after_launch() { return cudaPeekAtLastError(); }

int main() {
    int *x, host[4];
    expect("none", cudaMalloc(&x, 16), cudaSuccess);
    expect("too much memory", cudaMalloc(&x, 1ull << 60), cudaErrorMemoryAllocation);
    cudaMalloc(&x, 16);
    nothing<<<1, 1025>>>();
    expect("threads", after_launch(), cudaErrorInvalidConfiguration);
    nothing<<<dim3(1, 70000), 1>>>();
    expect("blocks", after_launch(), cudaErrorInvalidConfiguration);
    nothing<<<0, 1>>>();
    expect("no block", after_launch(), cudaErrorInvalidConfiguration);
    small<<<1, 65>>>();
    expect("launch bounds", after_launch(), cudaErrorInvalidConfiguration);
    large<<<1, 32, 100000>>>();
    expect("shared memory", after_launch(), cudaErrorInvalidValue);
    expect("asked for", cudaFuncSetAttribute(large, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000), cudaSuccess);
    large<<<1, 32, 100000>>>();
    expect("allowed", cudaDeviceSynchronize(), cudaSuccess);
    expect("past the end", cudaMemcpy(x, host, 20, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    expect("direction", cudaMemcpy(x, host, 16, (cudaMemcpyKind)9), cudaErrorInvalidMemcpyDirection);
    expect("wrong side", cudaMemcpy(host, x, 16, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    expect("not ours", cudaFree(host), cudaErrorInvalidValue);
    expect("device", cudaSetDevice(7), cudaErrorInvalidDevice);
    expect("stream", cudaStreamSynchronize((cudaStream_t)0x1234), cudaErrorInvalidResourceHandle);
    expect("function", cudaLaunchKernel((void*)host, 1, 1, nullptr, 0, 0), cudaErrorInvalidDeviceFunction);
    expect("free", cudaFree(x), cudaSuccess);
    expect("twice", cudaFree(x), cudaErrorInvalidValue);
    printf(wrong ? "wrong\n" : "all as expected: %s\n", cudaGetErrorString(cudaErrorInvalidConfiguration));
    return wrong;
}
