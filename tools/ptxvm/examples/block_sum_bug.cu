// The sum of each block's 256 elements. The bug: no __syncthreads() before the loop.
// To PTX: nvcc -ptx -lineinfo -arch=sm_80 block_sum_bug.cu
extern "C" __global__ void block_sum(const float *x, float *sums, int n)
{
    __shared__ float part[256];
    int i = blockIdx.x * 256 + threadIdx.x;
    part[threadIdx.x] = i < n ? x[i] : 0.0f;
    for (int step = 128; step > 0; step /= 2) {
        if (threadIdx.x < step) {
            part[threadIdx.x] += part[threadIdx.x + step];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = part[0];
    }
}
