// Waits for work without a call of CUDA: for a function of the host, and for what a kernel writes to managed memory.
#include <atomic>
#include <cstdio>
#include <unistd.h>

__global__ void store(volatile int* x) { *x = 42; }

static void CUDART_CB note(void* at) { ++*(std::atomic<int>*)at; }

int main() {
    int* x;
    std::atomic<int> called{0};
    if (cudaMallocManaged(&x, sizeof(int))) return 2;
    *x = 0;
    store<<<1, 1>>>(x);
    cudaLaunchHostFunc(0, note, &called);
    for (int i = 0; i < 400 && !called; ++i) usleep(10000);
    if (!called) return printf("nothing came\n"), 1;
    printf("called %d times, %d in managed memory\n", called.load(), *(volatile int*)x);
    cudaFree(x);
}
