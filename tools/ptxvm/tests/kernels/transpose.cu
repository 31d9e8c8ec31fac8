// Tiled transposes: a padded tile keeps columns out of one bank.
#include <cuda_runtime.h>

template <typename T, int TILE, int ROWS>
__global__ void transpose(const T* __restrict__ in, T* __restrict__ out, int rows, int cols) {
    __shared__ T tile[TILE][TILE + 1];
    int x = blockIdx.x * TILE + threadIdx.x;
    int y = blockIdx.y * TILE + threadIdx.y;
#pragma unroll
    for (int j = 0; j < TILE; j += ROWS)
        if (x < cols && y + j < rows) tile[threadIdx.y + j][threadIdx.x] = in[(size_t)(y + j) * cols + x];
    __syncthreads();
    x = blockIdx.y * TILE + threadIdx.x;
    y = blockIdx.x * TILE + threadIdx.y;
#pragma unroll
    for (int j = 0; j < TILE; j += ROWS)
        if (x < rows && y + j < cols) out[(size_t)(y + j) * rows + x] = tile[threadIdx.x][threadIdx.y + j];
}

template __global__ void transpose<float, 32, 8>(const float*, float*, int, int);
template __global__ void transpose<double, 16, 16>(const double*, double*, int, int);
template __global__ void transpose<unsigned short, 32, 4>(const unsigned short*, unsigned short*, int, int);

// A warp transposes 8x4 bytes a lane group at a time with byte permutes: 4x4 bytes in registers.
extern "C" __global__ void transpose_bytes_4x4(const uint4* __restrict__ in, uint4* __restrict__ out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const uint4 v = in[i];
    const unsigned a = __byte_perm(v.x, v.y, 0x5140), b = __byte_perm(v.z, v.w, 0x5140);
    const unsigned c = __byte_perm(v.x, v.y, 0x7362), d = __byte_perm(v.z, v.w, 0x7362);
    out[i] = make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632), __byte_perm(c, d, 0x5410),
                        __byte_perm(c, d, 0x7632));
}
