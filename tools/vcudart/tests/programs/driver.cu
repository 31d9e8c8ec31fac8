// The driver's functions, beside the runtime's in one program.
#include <cstdio>
#include <cstring>
#include <cuda.h>

#define OK(call) do { CUresult r = (call); if (r != CUDA_SUCCESS) { const char* s; cuGetErrorName(r, &s); return printf("%s: %s\n", #call, s), 1; } } while (0)
#define IS(call, want) do { CUresult r = (call); if (r != want) return printf("%s: %d\n", #call, (int)r), 1; } while (0)

static const char* const ptx = R"(.version 9.2
.target sm_80
.address_size 64
.visible .const .align 4 .u32 step = 3;
.visible .global .align 4 .u32 total = 7;
.visible .global .attribute(.managed) .align 4 .u32 shared_word = 5;
.visible .entry bump(.param .u64 at) .maxntid 64, 1, 1 {
.reg .b32 %r<4>;
.reg .b64 %rd<4>;
mov.u32 %r1, %tid.x;
ld.param.u64 %rd1, [at];
mul.wide.u32 %rd2, %r1, 4;
add.u64 %rd1, %rd1, %rd2;
ld.global.u32 %r2, [%rd1];
ld.const.u32 %r3, [step];
add.u32 %r2, %r2, %r3;
st.global.u32 [%rd1], %r2;
ret;
}
)";

int main() {
    OK(cuInit(0));
    CUdevice device;
    OK(cuDeviceGet(&device, 0));
    CUcontext primary, own, now;
    IS(cuCtxGetDevice(&device), CUDA_ERROR_INVALID_CONTEXT);
    OK(cuDevicePrimaryCtxRetain(&primary, device));
    OK(cuCtxPushCurrent(primary));
    CUdeviceptr at;
    OK(cuMemAlloc(&at, 64));
    OK(cuCtxPopCurrent(&now));
    if (now != primary) return printf("another context\n"), 1;
#if CUDA_VERSION >= 13000
    CUctxCreateParams none = {};
    OK(cuCtxCreate(&own, &none, 0, device));
#else
    OK(cuCtxCreate(&own, 0, device));
#endif
    IS(cuMemFree(at), CUDA_ERROR_INVALID_VALUE);
    OK(cuCtxDestroy(own));
    OK(cuCtxSetCurrent(primary));
    OK(cuMemFree(at));

    // Compilers say what is wrong where they are asked to.
    char log[200] = "";
    CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    void* values[] = {log, (void*)sizeof log};
    CUmodule module;
    IS(cuModuleLoadDataEx(&module, ".version 7.0\n.target sm_80\n.address_size 64\n.entry k() { nothing; }\n", 2, options, values), CUDA_ERROR_INVALID_PTX);
    if (!strstr(log, "nothing")) return printf("log: %s\n", log), 1;
    OK(cuModuleLoadData(&module, ptx));
    CUfunction bump;
    const char* name;
    int threads;
    OK(cuModuleGetFunction(&bump, module, "bump"));
    IS(cuModuleGetFunction(&bump, module, "none"), CUDA_ERROR_NOT_FOUND);
    OK(cuFuncGetName(&name, bump));
    OK(cuFuncGetAttribute(&threads, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, bump));
    if (strcmp(name, "bump") || threads != 64) return printf("%s, %d threads\n", name, threads), 1;

    // Variables: a constant is what was copied to it, a managed one is the host's as well.
    CUdeviceptr step, total, word;
    size_t bytes;
    OK(cuModuleGetGlobal(&step, &bytes, module, "step"));
    OK(cuModuleGetGlobal(&total, nullptr, module, "total"));
    OK(cuModuleGetGlobal(&word, nullptr, module, "shared_word"));
    if (bytes != 4 || *(int*)word != 5) return printf("%zu bytes\n", bytes), 1;
    *(int*)word = 50;
    void* args[] = {&word};
    OK(cuLaunchKernel(bump, 1, 1, 1, 1, 1, 1, 0, 0, args, nullptr));
    OK(cuMemsetD32(step, 100, 1));
    size_t at_least = 8, offset, size;
    void* extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &word, CU_LAUNCH_PARAM_BUFFER_SIZE, &at_least, CU_LAUNCH_PARAM_END};
    OK(cuLaunchKernel(bump, 1, 1, 1, 1, 1, 1, 0, 0, nullptr, extra));
    at_least = 4;
    IS(cuLaunchKernel(bump, 1, 1, 1, 1, 1, 1, 0, 0, nullptr, extra), CUDA_ERROR_INVALID_VALUE);
    OK(cuFuncGetParamInfo(bump, 0, &offset, &size));
    if (offset != 0 || size != 8) return printf("parameter\n"), 1;
    OK(cuLaunchCooperativeKernel(bump, 1, 1, 1, 1, 1, 1, 0, CU_STREAM_LEGACY, args));
    void* also[] = {&total};
    OK(cuLaunchKernel(bump, 1, 1, 1, 1, 1, 1, 0, CU_STREAM_PER_THREAD, also, nullptr));
    OK(cuCtxSynchronize());
    int got;
    OK(cuMemcpyDtoH(&got, total, 4));
    if (*(int*)word != 253 || got != 107) return printf("%d, %d\n", *(int*)word, got), 1;
    IS(cuLaunchKernel(bump, 1, 1, 1, 65, 1, 1, 0, 0, args, nullptr), CUDA_ERROR_INVALID_VALUE);

    // Fills and copies of rectangles, and by whatever the addresses are.
    CUdeviceptr x;
    size_t pitch;
    unsigned short back[3][8];
    OK(cuMemAllocPitch(&x, &pitch, 16, 3, 4));
    OK(cuMemsetD2D16(x, pitch, 0x1234, 8, 3));
    CUDA_MEMCPY2D copy = {};
    copy.srcMemoryType = CU_MEMORYTYPE_DEVICE, copy.srcDevice = x, copy.srcPitch = pitch, copy.srcY = 1;
    copy.dstMemoryType = CU_MEMORYTYPE_HOST, copy.dstHost = back, copy.dstPitch = 16;
    copy.WidthInBytes = 16, copy.Height = 2;
    memset(back, 0, sizeof back);
    OK(cuMemcpy2D(&copy));
    if (back[1][7] != 0x1234 || back[2][0] != 0) return printf("rectangle\n"), 1;
    IS(cuMemsetD32(x + 2, 0, 1), CUDA_ERROR_INVALID_VALUE);
    OK(cuMemcpy(x, word, 4));
    OK(cuMemcpy((CUdeviceptr)&got, x, 4));
    if (got != 253) return printf("%d through memory\n", got), 1;
    unsigned is_managed;
    OK(cuPointerGetAttribute(&is_managed, CU_POINTER_ATTRIBUTE_IS_MANAGED, word));
    if (!is_managed) return printf("not managed\n"), 1;

    // Functions by name, and what there is not.
    void* found;
    CUdriverProcAddressQueryResult how;
    OK(cuGetProcAddress("cuMemAlloc", &found, 12000, 0, &how));
    OK(((CUresult(*)(CUdeviceptr*, size_t))found)(&at, 4));
    OK(cuMemFree(at));
    OK(cuGetProcAddress("cuNothing", &found, 12000, 0, &how));
    if (found || how != CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND) return printf("found\n"), 1;

    // A library is a module; the runtime uses the same context.
    CUlibrary library;
    CUkernel kernel;
    OK(cuLibraryLoadData(&library, ptx, nullptr, nullptr, 0, nullptr, nullptr, 0));
    OK(cuLibraryGetKernel(&kernel, library, "bump"));
    int* y;
    if (cudaMalloc(&y, 64 * 4) || cudaMemset(y, 0, 64 * 4)) return printf("runtime\n"), 1;
    void* theirs[] = {&y};
    OK(cuLaunchKernel((CUfunction)kernel, 1, 1, 1, 64, 1, 1, 0, 0, theirs, nullptr));
    if (cudaMemcpy(&got, y + 63, 4, cudaMemcpyDeviceToHost) || got != 3) return printf("%d from the library\n", got), 1;
    OK(cuLibraryUnload(library));
    OK(cuModuleUnload(module));
    IS(cuModuleUnload(module), CUDA_ERROR_INVALID_HANDLE);
    cudaFree(y);
    OK(cuMemFree(x));
    OK(cuDevicePrimaryCtxRelease(device));
    printf("driver and runtime agree\n");
}
