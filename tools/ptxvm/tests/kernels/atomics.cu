// Atomics of every kind, CAS loops, locks, and flags with acquire and release.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// One result word per operation; all threads take part, so every order gives the same words.
extern "C" __global__ void atomic_integers(const int* __restrict__ in, int* __restrict__ out,
                                           unsigned long long* __restrict__ wide, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int v = in[i];
    atomicAdd(&out[0], v);
    atomicSub(&out[1], v);
    atomicMin(&out[2], v);
    atomicMax(&out[3], v);
    atomicMin(reinterpret_cast<unsigned*>(&out[4]), (unsigned)v);
    atomicMax(reinterpret_cast<unsigned*>(&out[5]), (unsigned)v);
    atomicAnd(&out[6], v | 0x00ff00f0);
    atomicOr(&out[7], v & 0x0ff0);
    atomicXor(&out[8], v);
    atomicInc(reinterpret_cast<unsigned*>(&out[9]), 99u);
    atomicDec(reinterpret_cast<unsigned*>(&out[10]), 77u);
    atomicExch(&out[11], 42);
    atomicCAS(&out[12], 0, 7);
    atomicAdd(&wide[0], (unsigned long long)(long long)v);
    atomicMin(reinterpret_cast<long long*>(&wide[1]), (long long)v << 20);
    atomicMax(reinterpret_cast<long long*>(&wide[2]), (long long)v << 20);
    atomicMin(&wide[3], (unsigned long long)(long long)v);
    atomicMax(&wide[4], (unsigned long long)(long long)v);
    atomicAnd(&wide[5], ~(1ull << (v & 63)));
    atomicOr(&wide[6], 1ull << (v & 63));
    atomicXor(&wide[7], 0x123456789abcdefull * v);
    atomicExch(&wide[8], 43ull);
    atomicCAS(&wide[9], 0ull, 9ull);
}

// What atomics return: tickets, each once.
extern "C" __global__ void tickets(unsigned* counter, unsigned* taken) {
    __shared__ unsigned local;
    if (threadIdx.x == 0) local = 0;
    __syncthreads();
    const unsigned here = atomicAdd(&local, 1u), there = atomicAdd_system(counter, 1u);
    taken[there] = blockIdx.x << 16 | here;
}

__device__ double add_by_cas(double* address, double v) {
    unsigned long long* p = reinterpret_cast<unsigned long long*>(address);
    unsigned long long old = *p, assumed;
    do {
        assumed = old;
        old = atomicCAS(p, assumed, __double_as_longlong(v + __longlong_as_double(assumed)));
    } while (assumed != old);
    return __longlong_as_double(old);
}
__device__ float max_by_cas(float* address, float v) {
    int* p = reinterpret_cast<int*>(address);
    int old = *p;
    while (__int_as_float(old) < v) {
        const int assumed = old;
        old = atomicCAS(p, assumed, __float_as_int(v));
        if (old == assumed) break;
    }
    return __int_as_float(old);
}
// Values are small whole numbers, so that sums do not depend on the order.
extern "C" __global__ void atomic_floats(const float* __restrict__ in, float* __restrict__ f, double* __restrict__ d,
                                         __half2* __restrict__ h, __nv_bfloat16* __restrict__ b, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = in[i];
    atomicAdd(&f[0], v);
    max_by_cas(&f[1], v);
    atomicAdd(&d[0], (double)v);
    add_by_cas(&d[1], (double)v);
    if (i < 50) {
        atomicAdd(h, __floats2half2_rn(v, -v));
        atomicAdd(b, __float2bfloat16(1.0f));
        atomicAdd(reinterpret_cast<__half*>(h + 1), __float2half(v));
        atomicAdd(reinterpret_cast<__nv_bfloat162*>(b + 2), __floats2bfloat162_rn(1.0f, 2.0f));
    }
    atomicExch(&f[2], 5.0f);
}

// Scoped atomics and reductions in shared memory.
extern "C" __global__ void atomic_shared(const unsigned* __restrict__ in, unsigned long long* __restrict__ out, int n) {
    __shared__ unsigned add, low, high;
    __shared__ unsigned long long wide;
    __shared__ float sum;
    if (threadIdx.x == 0) {
        add = 0;
        low = ~0u;
        high = 0;
        wide = 0;
        sum = 0.0f;
    }
    __syncthreads();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        atomicAdd_block(&add, in[i]);
        atomicMin_block(&low, in[i]);
        atomicMax_block(&high, in[i]);
        atomicAdd(&wide, (unsigned long long)in[i] * in[i]);
        atomicAdd(&sum, (float)(in[i] & 15));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned long long* row = out + blockIdx.x * 5;
        row[0] = add;
        row[1] = low;
        row[2] = high;
        row[3] = wide;
        row[4] = (unsigned long long)sum;
    }
}

// A lock that one thread of each block takes; the data behind it is not atomic.
extern "C" __global__ void spin_lock(int* lock, int* __restrict__ count, double* __restrict__ mean,
                                     const double* __restrict__ in) {
    if (threadIdx.x == 0) {
        while (atomicCAS(lock, 0, 1) != 0) __nanosleep(20);
        __threadfence();
        const int n = *(volatile int*)count + 1;
        const double m = *(volatile double*)mean;
        *(volatile double*)mean = m + (in[blockIdx.x] - m) / n;
        *(volatile int*)count = n;
        __threadfence();
        atomicExch(lock, 0);
    }
}

// Every thread of a warp takes the lock in turn: needs independent progress of diverged lanes.
extern "C" __global__ void spin_lock_lanes(int* lock, int* __restrict__ value) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            __threadfence();
            *(volatile int*)value = *(volatile int*)value * 3 + 1;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}

// Blocks hand a message around: flag with release and acquire in PTX, payload in plain memory.
extern "C" __global__ void message_ring(unsigned* flags, int* __restrict__ payload) {
    const unsigned b = blockIdx.x;
    if (b > 0) {
        if (threadIdx.x == 0) {
            unsigned ready;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(ready) : "l"(flags + b - 1) : "memory");
            } while (ready == 0);
        }
        __syncthreads();
    }
    const int before = b > 0 ? payload[(b - 1) * blockDim.x + (threadIdx.x + 1) % blockDim.x] : (int)threadIdx.x;
    payload[b * blockDim.x + threadIdx.x] = before + 1;
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(flags + b), "r"(1u) : "memory");
    }
}

// The same with volatile and fences, inside one block and in shared memory, warp to warp.
extern "C" __global__ void warp_relay(int* __restrict__ out) {
    __shared__ volatile int turn;
    __shared__ volatile int value;
    if (threadIdx.x == 0) {
        turn = 0;
        value = 1;
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) {
        while (turn != warp) {}
        __threadfence_block();
        value = value * 5 + warp;
        __threadfence_block();
        turn = warp + 1;
    }
    __syncthreads();
    if (threadIdx.x == 0) *out = value;
}
