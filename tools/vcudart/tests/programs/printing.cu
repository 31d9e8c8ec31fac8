// printf between what the host prints, and an assertion that fails with -DBUG.
#include <cassert>
#include <cstdio>

__global__ void say(int n) {
    printf("thread %d of %s: %.2f\n", threadIdx.x, "the device", n / 4.0);
#ifdef BUG
    assert(threadIdx.x < 2);
#endif
}

int main() {
    printf("before\n");
    say<<<1, 3>>>(3);
    cudaError_t code = cudaDeviceSynchronize();
    printf("after: %s\n", cudaGetErrorName(code));
    return code != cudaSuccess;
}
