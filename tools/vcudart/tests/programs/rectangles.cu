// Pitched memory, 2D and 3D copies and fills.
#include <cstdio>
#include <cstring>

#define OK(call) do { cudaError_t e = (call); if (e != cudaSuccess) return printf("%s: %s\n", #call, cudaGetErrorName(e)), 1; } while (0)

__global__ void add(char* x, size_t pitch, int width, int rows) {
    for (int r = blockIdx.x; r < rows; r += gridDim.x)
        for (int c = threadIdx.x; c < width; c += blockDim.x) x[r * pitch + c] += 1;
}

int main() {
    const int width = 37, rows = 5, slices = 3;
    char host[rows][width], back[rows][width + 3];
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < width; ++c) host[r][c] = (char)(r * 7 + c);
    char* x;
    size_t pitch;
    OK(cudaMallocPitch(&x, &pitch, width, rows));
    if (pitch < width) return printf("pitch %zu\n", pitch), 1;
    OK(cudaMemcpy2D(x, pitch, host, width, width, rows, cudaMemcpyHostToDevice));
    add<<<2, 32>>>(x, pitch, width, rows);
    OK(cudaMemset2D(x + 2 * pitch, pitch, 9, 4, 2));
    memset(back, 1, sizeof back);
    OK(cudaMemcpy2D(back, width + 3, x, pitch, width, rows, cudaMemcpyDeviceToHost));
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < width + 3; ++c) {
            char want = c >= width ? 1 : (r == 2 || r == 3) && c < 4 ? 9 : (char)(host[r][c] + 1);
            if (back[r][c] != want) return printf("row %d, column %d: %d\n", r, c, back[r][c]), 1;
        }
    }
    if (cudaMemcpy2D(back, 8, x, pitch, width, rows, cudaMemcpyDeviceToHost) == cudaSuccess) return printf("narrow?\n"), 1;
    cudaGetLastError();

    cudaPitchedPtr box;
    cudaExtent extent = make_cudaExtent(width, rows, slices);
    OK(cudaMalloc3D(&box, extent));
    OK(cudaMemset3D(box, 3, extent));
    static char cube[slices][rows][width];
    cudaMemcpy3DParms copy = {};
    copy.srcPtr = box;
    copy.dstPtr = make_cudaPitchedPtr(cube, width, width, rows);
    copy.dstPos = make_cudaPos(0, 0, 1);
    copy.extent = make_cudaExtent(width, rows, slices - 1);
    copy.kind = cudaMemcpyDeviceToHost;
    OK(cudaMemcpy3D(&copy));
    for (int s = 0; s < slices; ++s)
        for (int i = 0; i < rows * width; ++i)
            if ((&cube[s][0][0])[i] != (s ? 3 : 0)) return printf("slice %d\n", s), 1;
    printf("pitch %zu\n", pitch);
}
