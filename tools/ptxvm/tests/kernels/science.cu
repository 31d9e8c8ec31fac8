// n-body, convolution with a constant filter, Mandelbrot, a stencil with a halo, conjugate-gradient pieces.
#include <cuda_runtime.h>

// Softened gravity; tiles of bodies through shared memory. w is the mass.
extern "C" __global__ void nbody(const float4* __restrict__ bodies, float4* __restrict__ acceleration, int n,
                                 float softening) {
    extern __shared__ float4 tile[];
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const float4 me = i < n ? bodies[i] : make_float4(0, 0, 0, 0);
    float ax = 0, ay = 0, az = 0;
    for (int base = 0; base < n; base += blockDim.x) {
        tile[threadIdx.x] = base + threadIdx.x < n ? bodies[base + threadIdx.x] : make_float4(0, 0, 0, 0);
        __syncthreads();
#pragma unroll 8
        for (int j = 0; j < blockDim.x; ++j) {
            const float4 b = tile[j];
            const float x = b.x - me.x, y = b.y - me.y, z = b.z - me.z;
            const float inverse = rsqrtf(x * x + y * y + z * z + softening);
            const float f = b.w * inverse * inverse * inverse;
            ax = fmaf(x, f, ax);
            ay = fmaf(y, f, ay);
            az = fmaf(z, f, az);
        }
        __syncthreads();
    }
    if (i < n) acceleration[i] = make_float4(ax, ay, az, 0.0f);
}

// The filter is a table that the module itself brings: 7 x 7, binomial, not normalised.
#define ROW(w) w * 1.0f, w * 6.0f, w * 15.0f, w * 20.0f, w * 15.0f, w * 6.0f, w * 1.0f
__constant__ float filter[49] = {ROW(1), ROW(6), ROW(15), ROW(20), ROW(15), ROW(6), ROW(1)};
__constant__ short2 corners[4] = {{-3, -3}, {3, -3}, {-3, 3}, {3, 3}};

template <int RADIUS, int TILE>
__global__ void convolve(const float* __restrict__ in, float* __restrict__ out, int width, int height) {
    constexpr int SIDE = TILE + 2 * RADIUS;
    __shared__ float s[SIDE][SIDE];
    const int x0 = blockIdx.x * TILE - RADIUS, y0 = blockIdx.y * TILE - RADIUS;
    for (int i = threadIdx.y * TILE + threadIdx.x; i < SIDE * SIDE; i += TILE * TILE) {
        const int x = min(max(x0 + i % SIDE, 0), width - 1), y = min(max(y0 + i / SIDE, 0), height - 1);
        s[i / SIDE][i % SIDE] = in[y * width + x];
    }
    __syncthreads();
    const int x = blockIdx.x * TILE + threadIdx.x, y = blockIdx.y * TILE + threadIdx.y;
    if (x >= width || y >= height) return;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j <= 2 * RADIUS; ++j)
#pragma unroll
        for (int i = 0; i <= 2 * RADIUS; ++i)
            sum = fmaf(filter[j * 7 + i], s[threadIdx.y + j][threadIdx.x + i], sum);
    // A lookup with an index that only the thread knows.
    const short2 c = corners[(x ^ y) & 3];
    out[y * width + x] = sum - s[threadIdx.y + RADIUS + c.y][threadIdx.x + RADIUS + c.x];
}
template __global__ void convolve<3, 16>(const float*, float*, int, int);

template <typename T>
__device__ int escape(T cx, T cy, int limit) {
    T x = 0, y = 0;
    for (int i = 0; i < limit; ++i) {
        const T xx = x * x, yy = y * y;
        if (xx + yy > T(4)) return i;
        y = T(2) * x * y + cy;
        x = xx - yy + cx;
    }
    return limit;
}

template <typename T>
__global__ void mandelbrot(int* __restrict__ out, int width, int height, T left, T top, T step, int limit) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    if (x < width && y < height) out[y * width + x] = escape<T>(left + x * step, top + y * step, limit);
}
template __global__ void mandelbrot<float>(int*, int, int, float, float, float, int);
template __global__ void mandelbrot<double>(int*, int, int, double, double, double, int);

// One Jacobi step in double; the count of cells that moved by more than tol goes through a block-wide vote.
extern "C" __global__ void jacobi(const double* __restrict__ in, double* __restrict__ out, int* __restrict__ moving,
                                  int width, int height, double tol) {
    const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
    bool moved = false;
    if (x < width && y < height) {
        const int i = y * width + x;
        const bool edge = x == 0 || y == 0 || x == width - 1 || y == height - 1;
        const double v = edge ? in[i] : 0.25 * (in[i - 1] + in[i + 1] + in[i - width] + in[i + width]);
        out[i] = v;
        moved = fabs(v - in[i]) > tol;
    }
    const int count = __syncthreads_count(moved);
    const int any = __syncthreads_or(moved), all = __syncthreads_and(moved);
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        atomicAdd(&moving[0], count);
        atomicAdd(&moving[1], any != 0);
        atomicAdd(&moving[2], all != 0);
    }
}

// Sparse matrix (CSR) by vector, a warp per row with a loop whose length differs by row.
extern "C" __global__ void spmv_csr(int rows, const int* __restrict__ row_start, const int* __restrict__ columns,
                                    const double* __restrict__ values, const double* __restrict__ x,
                                    double* __restrict__ y) {
    const int row = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, lane = threadIdx.x & 31;
    if (row >= rows) return;
    double sum = 0.0;
    for (int i = row_start[row] + lane; i < row_start[row + 1]; i += 32) sum = fma(values[i], x[columns[i]], sum);
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, o);
    if (lane == 0) y[row] = sum;
}
