// A sum in shared memory, by a function of a header's kind that is inlined; with -DBUG a barrier is missing.
#include <cstdio>

template <class T>
__device__ __forceinline__ T block_sum(T* partial, T value) {
    partial[threadIdx.x] = value;
    __syncthreads();
    for (int stride = blockDim.x / 2; stride > 0; stride /= 2) {
        if (threadIdx.x < stride) partial[threadIdx.x] += partial[threadIdx.x + stride];
#ifndef BUG
        __syncthreads();
#endif
    }
    return partial[0];
}

template <class T>
__global__ void sums(const T* x, T* out) {
    __shared__ T partial[256];
    T sum = block_sum(partial, x[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

template <class T>
int run() {
    const int blocks = 3, n = blocks * 256;
    T *x, *out, host[n], got[blocks];
    for (int i = 0; i < n; ++i) host[i] = T(i);
    cudaMalloc(&x, sizeof host);
    cudaMalloc(&out, sizeof got);
    cudaMemcpy(x, host, sizeof host, cudaMemcpyHostToDevice);
    sums<<<blocks, 256>>>(x, out);
    cudaError_t code = cudaMemcpy(got, out, sizeof got, cudaMemcpyDeviceToHost);
    if (code != cudaSuccess) return printf("failed: %s\n", cudaGetErrorName(code)), 1;
    for (int b = 0; b < blocks; ++b) {
        T want = 0;
        for (int i = 0; i < 256; ++i) want += T(b * 256 + i);
        if (got[b] != want) return printf("block %d is wrong\n", b), 1;
    }
    cudaFree(x), cudaFree(out);
    return 0;
}

int main() {
    if (run<int>() || run<double>()) return 1;
    printf("sums of int and double are right\n");
}
