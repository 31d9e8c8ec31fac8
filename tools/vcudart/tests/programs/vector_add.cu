// Adds vectors; with -DBUG the last block writes behind the end.
#include <cstdio>
#include <vector>

__global__ void add(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
#ifdef BUG
    c[i] = a[i < n ? i : 0] + b[i < n ? i : 0];
#else
    if (i < n) c[i] = a[i] + b[i];
#endif
}

int main() {
    const int n = 1000;
    std::vector<float> a(n), b(n), c(n);
    for (int i = 0; i < n; ++i) a[i] = i, b[i] = 2 * i;
    float *da, *db, *dc;
    cudaMalloc(&da, n * sizeof(float));
    cudaMalloc(&db, n * sizeof(float));
    cudaMalloc(&dc, n * sizeof(float));
    cudaMemcpy(da, a.data(), n * sizeof(float), cudaMemcpyHostToDevice);
    cudaMemcpy(db, b.data(), n * sizeof(float), cudaMemcpyHostToDevice);
    add<<<(n + 255) / 256, 256>>>(da, db, dc, n);
    cudaError_t launched = cudaGetLastError();
    cudaError_t copied = cudaMemcpy(c.data(), dc, n * sizeof(float), cudaMemcpyDeviceToHost);
    if (launched != cudaSuccess || copied != cudaSuccess) {
        printf("failed: %s\n", cudaGetErrorName(launched != cudaSuccess ? launched : copied));
        return 1;
    }
    for (int i = 0; i < n; ++i) {
        if (c[i] != 3 * i) return printf("c[%d] = %f\n", i, c[i]), 1;
    }
    cudaFree(da), cudaFree(db), cudaFree(dc);
    printf("%d sums are right\n", n);
}
