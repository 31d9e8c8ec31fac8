// The same products through nvcuda::wmma, one warp per 16x16 tile. m, n, k are multiples of 16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <mma.h>

using namespace nvcuda;

template <typename T, typename Acc>
__global__ void wmma_gemm(const T* __restrict__ a, const T* __restrict__ b, Acc* __restrict__ c, int m, int n, int k,
                          Acc scale) {
    const int row = (blockIdx.y * blockDim.y + threadIdx.y) * 16, col = blockIdx.x * 16;
    if (row >= m) return;
    wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::col_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, Acc> fc;
    wmma::fill_fragment(fc, Acc(0));
    for (int i = 0; i < k; i += 16) {
        wmma::load_matrix_sync(fa, a + row * k + i, k);
        wmma::load_matrix_sync(fb, b + col * k + i, k);
        wmma::mma_sync(fc, fa, fb, fc);
    }
#pragma unroll
    for (int i = 0; i < fc.num_elements; ++i) fc.x[i] = fc.x[i] * scale;
    wmma::store_matrix_sync(c + row * n + col, fc, n, wmma::mem_row_major);
}

template __global__ void wmma_gemm<__half, float>(const __half*, const __half*, float*, int, int, int, float);
template __global__ void wmma_gemm<__nv_bfloat16, float>(const __nv_bfloat16*, const __nv_bfloat16*, float*, int, int,
                                                         int, float);
template __global__ void wmma_gemm<signed char, int>(const signed char*, const signed char*, int*, int, int, int, int);

// 32x8x16 and 8x32x16, B row-major, through shared memory, C column-major.
extern "C" __global__ void wmma_shapes(const __half* __restrict__ a, const __half* __restrict__ b,
                                       float* __restrict__ c_tall, float* __restrict__ c_wide) {
    __shared__ __align__(32) __half s[32 * 16 + 16 * 32];
    for (int i = threadIdx.x; i < 512; i += 32) {
        s[i] = a[i];
        s[512 + i] = b[i];
    }
    __syncwarp();
    {
        wmma::fragment<wmma::matrix_a, 32, 8, 16, __half, wmma::row_major> fa;
        wmma::fragment<wmma::matrix_b, 32, 8, 16, __half, wmma::row_major> fb;
        wmma::fragment<wmma::accumulator, 32, 8, 16, float> fc;
        wmma::fill_fragment(fc, 1.0f);
        wmma::load_matrix_sync(fa, s, 16);
        wmma::load_matrix_sync(fb, s + 512, 32);
        wmma::mma_sync(fc, fa, fb, fc);
        wmma::store_matrix_sync(c_tall, fc, 32, wmma::mem_col_major);
    }
    {
        wmma::fragment<wmma::matrix_a, 8, 32, 16, __half, wmma::row_major> fa;
        wmma::fragment<wmma::matrix_b, 8, 32, 16, __half, wmma::row_major> fb;
        wmma::fragment<wmma::accumulator, 8, 32, 16, __half> fc;
        wmma::fill_fragment(fc, __float2half(0.0f));
        wmma::load_matrix_sync(fa, s, 16);
        wmma::load_matrix_sync(fb, s + 512, 32);
        wmma::mma_sync(fc, fa, fb, fc);
        __shared__ __align__(32) __half out[8 * 32];
        wmma::store_matrix_sync(out, fc, 32, wmma::mem_row_major);
        __syncwarp();
        for (int i = threadIdx.x; i < 256; i += 32) c_wide[i] = __half2float(out[i]);
    }
}

// tf32: 16x16x8.
extern "C" __global__ void wmma_tf32(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c,
                                     int k) {
    wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::row_major> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 8, float> fc;
    wmma::load_matrix_sync(fc, c, 16, wmma::mem_row_major);
    for (int i = 0; i < k; i += 8) {
        wmma::load_matrix_sync(fa, a + i, k);
        wmma::load_matrix_sync(fb, b + i * 16, 16);
        for (int e = 0; e < fa.num_elements; ++e) fa.x[e] = wmma::__float_to_tf32(fa.x[e]);
        for (int e = 0; e < fb.num_elements; ++e) fb.x[e] = wmma::__float_to_tf32(fb.x[e]);
        wmma::mma_sync(fc, fa, fb, fc);
    }
    wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}
