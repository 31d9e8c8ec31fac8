// A matrix is transposed by tiles that are copied as boxes of a tensor; with -DBUG nobody waits for the boxes. The function that
// makes the map is looked up, so that the program needs no libcuda to link with.
#include <cuda.h>
#include <cuda/ptx>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace ptx = cuda::ptx;

constexpr int TILE = 32;

__global__ void transpose(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to) {
    __shared__ alignas(128) float in[TILE][TILE], out[TILE][TILE];
    __shared__ alignas(8) uint64_t came;
    const int x = threadIdx.x, y = threadIdx.y;
    const int32_t here[2] = {int(blockIdx.x) * TILE, int(blockIdx.y) * TILE}, there[2] = {here[1], here[0]};
    if (x == 0 && y == 0) {
        ptx::mbarrier_init(&came, 1);
        ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
        ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &came, sizeof in);
        ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, in, &from, here, &came);
    }
    __syncthreads();
#ifndef BUG
    while (!ptx::mbarrier_try_wait_parity(&came, 0)) {}
#endif
    for (int i = y; i < TILE; i += blockDim.y) out[x][i] = in[i][x];
    ptx::fence_proxy_async(ptx::space_shared);
    __syncthreads();
    if (x == 0 && y == 0) {
        ptx::cp_async_bulk_tensor(ptx::space_global, ptx::space_shared, &to, there, out);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read(ptx::n32_t<0>());
    }
}

#define OK(call) do { auto e = (call); if (e) return printf("line %d: %d\n", __LINE__, int(e)), 1; } while (0)

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
using Look = CUresult (*)(const char*, void**, int, cuuint64_t, CUdriverProcAddressQueryResult*);

int main() {
    // 100 columns and 70 rows: the last boxes stick out.
    const cuuint64_t columns = 100, rows = 70;
    std::vector<float> host(columns * rows);
    for (size_t i = 0; i < host.size(); ++i) host[i] = i;
    float *a, *b;
    OK(cudaMalloc(&a, host.size() * 4));
    OK(cudaMalloc(&b, 104 * 104 * 4));
    OK(cudaMemcpy(a, host.data(), host.size() * 4, cudaMemcpyHostToDevice));
    Encode encode, same;
    Look look;
    cudaDriverEntryPointQueryResult found;
    OK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void**)&encode, 12000, cudaEnableDefault, &found));
    OK(found != cudaDriverEntryPointSuccess);
    OK(cudaGetDriverEntryPointByVersion("cuGetProcAddress", (void**)&look, 12000, cudaEnableDefault, &found));
    CUdriverProcAddressQueryResult status;
    OK(look("cuTensorMapEncodeTiled", (void**)&same, 12000, 0, &status));
    OK(same != encode || status != CU_GET_PROC_ADDRESS_SUCCESS);
    CUtensorMap from, to;
    const cuuint32_t box[2] = {TILE, TILE}, step[2] = {1, 1};
    auto make = [&](CUtensorMap* map, float* at, cuuint64_t width, cuuint64_t height, cuuint64_t stride) {
        const cuuint64_t dims[2] = {width, height}, strides[1] = {stride};
        return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, at, dims, strides, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
            CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    };
    OK(make(&from, a, columns, rows, columns * 4));
    OK(make(&to, b, rows, columns, 72 * 4));
    // Rows of 70 floats do not begin at multiples of 16 bytes.
    OK(make(&to, b, rows, columns, 70 * 4) != CUDA_ERROR_INVALID_VALUE);
    OK(make(&to, b, rows, columns, 72 * 4));
    transpose<<<dim3(4, 3), dim3(TILE, 8)>>>(from, to);
    OK(cudaGetLastError());
    std::vector<float> back(columns * 72);
    OK(cudaMemcpy2D(back.data(), 72 * 4, b, 72 * 4, 70 * 4, columns, cudaMemcpyDeviceToHost));
    for (size_t r = 0; r < columns; ++r) {
        for (size_t c = 0; c < rows; ++c) {
            if (back[r * 72 + c] != host[c * columns + r]) return printf("wrong at %zu, %zu\n", r, c), 1;
        }
    }
    printf("transposed\n");
}
