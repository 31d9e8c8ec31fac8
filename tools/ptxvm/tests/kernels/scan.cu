// Prefix sums: Blelloch in shared memory, warp shuffles, and a single pass over the grid with decoupled look-back.
#include <cuda_runtime.h>

// Exclusive, one block, 2 * blockDim.x elements; conflict-free offsets as in GPU Gems 3.
extern "C" __global__ void scan_blelloch(const int* __restrict__ in, int* __restrict__ out, int n) {
    extern __shared__ int s[];
    auto at = [](int i) { return i + (i >> 5); };
    const int t = threadIdx.x, size = 2 * blockDim.x;
    s[at(2 * t)] = 2 * t < n ? in[2 * t] : 0;
    s[at(2 * t + 1)] = 2 * t + 1 < n ? in[2 * t + 1] : 0;
    int offset = 1;
    for (int d = size >> 1; d > 0; d >>= 1, offset <<= 1) {
        __syncthreads();
        if (t < d) s[at(offset * (2 * t + 2) - 1)] += s[at(offset * (2 * t + 1) - 1)];
    }
    if (t == 0) s[at(size - 1)] = 0;
    for (int d = 1; d < size; d <<= 1) {
        offset >>= 1;
        __syncthreads();
        if (t < d) {
            const int left = at(offset * (2 * t + 1) - 1), right = at(offset * (2 * t + 2) - 1);
            const int v = s[left];
            s[left] = s[right];
            s[right] += v;
        }
    }
    __syncthreads();
    if (2 * t < n) out[2 * t] = s[at(2 * t)];
    if (2 * t + 1 < n) out[2 * t + 1] = s[at(2 * t + 1)];
}

template <typename T>
__device__ __forceinline__ T warp_inclusive(T v) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const T w = __shfl_up_sync(0xffffffffu, v, o);
        if (lane >= o) v += w;
    }
    return v;
}

template <typename T, int THREADS>
__device__ T block_inclusive(T v, T* total) {
    __shared__ T sums[THREADS / 32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    v = warp_inclusive(v);
    if (lane == 31) sums[warp] = v;
    __syncthreads();
    if (warp == 0) {
        const T w = warp_inclusive(lane < THREADS / 32 ? sums[lane] : T(0));
        if (lane < THREADS / 32) sums[lane] = w;
    }
    __syncthreads();
    *total = sums[THREADS / 32 - 1];
    return warp ? v + sums[warp - 1] : v;
}

// Shuffles in PTX, the way scan primitives write them: the predicate of shfl.up says whether the source was in range.
extern "C" __global__ void scan_warp_asm(const unsigned* __restrict__ in, unsigned* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned v = i < n ? in[i] : 0;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1)
        asm volatile(
            "{\n\t.reg .pred p;\n\t.reg .u32 r;\n\t"
            "shfl.sync.up.b32 r|p, %0, %1, 0, 0xffffffff;\n\t"
            "@p add.u32 %0, %0, r;\n\t}"
            : "+r"(v) : "r"(o));
    if (i < n) out[i] = v;
}

// One pass over the grid (Merrill and Garland): a block publishes its sum, then looks back until it meets a prefix.
// state[0] is a ticket; state[1 + tile] holds flag << 62 | value. All zero before the launch.
template <int THREADS, int PER_THREAD>
__global__ void __launch_bounds__(THREADS)
    scan_look_back(const unsigned* __restrict__ in, unsigned* __restrict__ out, unsigned long long* state, int n) {
    constexpr unsigned long long SUM = 1ull << 62, PREFIX = 2ull << 62, VALUE = (1ull << 62) - 1;
    __shared__ unsigned tile_shared, before_shared;
    if (threadIdx.x == 0) tile_shared = atomicAdd(reinterpret_cast<unsigned*>(state), 1u);
    __syncthreads();
    const unsigned tile = tile_shared;
    const int base = tile * THREADS * PER_THREAD + threadIdx.x * PER_THREAD;
    unsigned v[PER_THREAD], sum = 0;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        v[j] = base + j < n ? in[base + j] : 0;
        sum += v[j];
    }
    unsigned total;
    const unsigned mine = block_inclusive<unsigned, THREADS>(sum, &total) - sum;
    if (threadIdx.x == 0) {
        unsigned before = 0;
        if (tile > 0) {
            asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(state + 1 + tile), "l"(SUM | total) : "memory");
            for (int look = (int)tile - 1; look >= 0;) {
                unsigned long long s;
                asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(s) : "l"(state + 1 + look) : "memory");
                if (s == 0) continue;
                before += (unsigned)(s & VALUE);
                if (s & PREFIX) break;
                --look;
            }
        }
        asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(state + 1 + tile),
                     "l"(PREFIX | (before + total)) : "memory");
        before_shared = before;
    }
    __syncthreads();
    unsigned running = before_shared + mine;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        if (base + j < n) out[base + j] = running;
        running += v[j];
    }
}
template __global__ void scan_look_back<128, 4>(const unsigned*, unsigned*, unsigned long long*, int);

// Stream compaction: keep what is odd, in order inside a block; blocks take their place by one atomic.
extern "C" __global__ void compact(const int* __restrict__ in, int* __restrict__ out, int* __restrict__ count, int n) {
    __shared__ int place;
    const int i = blockIdx.x * 256 + threadIdx.x;
    const bool keep = i < n && (in[i] & 1);
    int total;
    const int rank = block_inclusive<int, 256>(keep, &total) - keep;
    if (threadIdx.x == 0) place = atomicAdd(count, total);
    __syncthreads();
    if (keep) out[place + rank] = in[i];
}
