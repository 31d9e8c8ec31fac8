// Barriers: named, split, over the grid; dynamic shared memory; printf and assert.
#include <assert.h>
#include <cuda_runtime.h>
#include <stdio.h>

// Warps 0-1 produce, warps 2-3 consume, two buffers, four named barriers: full[2] = 1, 2 and empty[2] = 3, 4.
extern "C" __global__ void __launch_bounds__(128) producer_consumer(const int* __restrict__ in, int* __restrict__ out,
                                                                    int rounds) {
    __shared__ int buffer[2][64];
    const int t = threadIdx.x % 64;
    if (threadIdx.x < 64) {
        for (int i = 0; i < rounds; ++i) {
            const int b = i & 1;
            if (i >= 2) asm volatile("bar.sync %0, 128;" ::"r"(3 + b) : "memory");
            buffer[b][t] = in[i * 64 + t] * 3;
            asm volatile("bar.arrive %0, 128;" ::"r"(1 + b) : "memory");
        }
    } else {
        for (int i = 0; i < rounds; ++i) {
            const int b = i & 1;
            asm volatile("bar.sync %0, 128;" ::"r"(1 + b) : "memory");
            out[i * 64 + t] = buffer[b][63 - t] + i;
            if (i + 2 < rounds) asm volatile("bar.arrive %0, 128;" ::"r"(3 + b) : "memory");
        }
    }
}

// Each half of the block has its own barrier and its own trip count.
extern "C" __global__ void half_barriers(int* __restrict__ out) {
    __shared__ int s[128];
    const int half = threadIdx.x / 64, t = threadIdx.x % 64;
    int* mine = s + half * 64;
    mine[t] = t;
    const int trips = half ? 5 : 9;
    for (int i = 0; i < trips; ++i) {
        asm volatile("barrier.sync %0, %1;" ::"r"(1 + half), "n"(64) : "memory");
        const int v = mine[(t + 1) % 64];
        asm volatile("barrier.sync %0, %1;" ::"r"(1 + half), "n"(64) : "memory");
        mine[t] = v + 1;
    }
    out[blockIdx.x * 128 + threadIdx.x] = mine[t];
}

// A barrier for the whole grid, by hand. All blocks must run at once: launch cooperatively.
__device__ unsigned int grid_arrived = 0;
__device__ volatile unsigned int grid_sense = 0;

__device__ void grid_sync() {
    __syncthreads();
    if (threadIdx.x == 0) {
        const unsigned sense = grid_sense;
        __threadfence();
        if (atomicAdd(&grid_arrived, 1u) == gridDim.x - 1) {
            grid_arrived = 0;
            __threadfence();
            grid_sense = sense + 1;
        } else {
            while (grid_sense == sense) {}
        }
        __threadfence();
    }
    __syncthreads();
}

// Heat in one dimension: neighbours' cells come from other blocks.
extern "C" __global__ void grid_diffusion(float* a, float* b, int n, int steps) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    for (int s = 0; s < steps; ++s) {
        if (i < n) {
            const float left = __ldcg(a + (i ? i - 1 : n - 1)), right = __ldcg(a + (i + 1 < n ? i + 1 : 0));
            __stcg(b + i, 0.25f * left + 0.5f * __ldcg(a + i) + 0.25f * right);
        }
        grid_sync();
        float* c = a;
        a = b;
        b = c;
    }
}

// Several arrays in one dynamic allocation.
extern "C" __global__ void dynamic_shared(const double* __restrict__ in, double* __restrict__ out, int n) {
    extern __shared__ __align__(16) unsigned char raw[];
    double* d = reinterpret_cast<double*>(raw);
    int* index = reinterpret_cast<int*>(d + blockDim.x);
    unsigned char* flag = reinterpret_cast<unsigned char*>(index + blockDim.x);
    const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
    d[t] = i < n ? in[i] : 0.0;
    index[t] = (t * 37 + 11) % blockDim.x;
    flag[t] = (unsigned char)(t & 1);
    __syncthreads();
    unsigned size;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(size));
    if (i < n) out[i] = d[index[t]] * (flag[index[t]] ? -1.0 : 1.0) + size;
}

extern "C" __global__ void print_and_check(const int* __restrict__ in, int* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (i % 16 == 0) printf("thread %d of %s: %5.2f %c %llu\n", i, "print", in[i] * 0.5, 'x', 1ull << i);
    assert(in[i] >= 0);
    out[i] = in[i] + 1;
}

extern "C" __global__ void trap_at(int* out, int bad) {
    if (threadIdx.x == bad) __trap();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void heap(int* __restrict__ out) {
    int* p = static_cast<int*>(malloc(sizeof(int) * 4));
    p[1] = threadIdx.x;
    out[threadIdx.x] = p[1];
    free(p);
}
