// Streams, events and what orders them, functions of the host, a captured graph; with -DBUG a page-locked buffer is used again
// before its copy is done.
#include <cstdio>

#define OK(call) do { cudaError_t e = (call); if (e != cudaSuccess) return printf("%s: %s\n", #call, cudaGetErrorName(e)), 1; } while (0)

__global__ void twice(int* x) { x[threadIdx.x] *= 2; }
__global__ void plus(int* x, int by) { x[threadIdx.x] += by; }

static void CUDART_CB note(void* at) { *(int*)at += 1; }

int main() {
    int *x, *host;
    const size_t bytes = 32 * sizeof(int);
    OK(cudaMalloc(&x, bytes));
    OK(cudaMallocHost(&host, bytes));
    cudaStream_t a, b, apart;
    cudaEvent_t event, begin, end;
    OK(cudaStreamCreate(&a));
    OK(cudaStreamCreate(&b));
    OK(cudaStreamCreateWithFlags(&apart, cudaStreamNonBlocking));
    OK(cudaEventCreate(&event));
    OK(cudaEventCreate(&begin));
    OK(cudaEventCreate(&end));
    for (int i = 0; i < 32; ++i) host[i] = i;
    int called = 0;

    // b waits for a, and the default stream for both: (x * 2 + 1) * 2.
    OK(cudaEventRecord(begin, a));
    OK(cudaMemcpyAsync(x, host, bytes, cudaMemcpyHostToDevice, a));
#ifdef BUG
    for (int i = 0; i < 32; ++i) host[i] = 1000;
#endif
    twice<<<1, 32, 0, a>>>(x);
    OK(cudaEventRecord(event, a));
    OK(cudaStreamWaitEvent(b, event, 0));
    plus<<<1, 32, 0, b>>>(x, 1);
    OK(cudaLaunchHostFunc(b, note, &called));
    twice<<<1, 32>>>(x);
    OK(cudaEventRecord(end, 0));
    if (cudaEventQuery(end) != cudaErrorNotReady) return printf("nothing is done yet\n"), 1;
    if (cudaGetLastError() != cudaSuccess) return printf("not ready is no error\n"), 1;
    while (cudaEventQuery(end) == cudaErrorNotReady) {}
    float ms = -1;
    OK(cudaEventElapsedTime(&ms, begin, end));
    if (!(ms >= 0) || called != 1) return printf("%f ms, %d calls\n", ms, called), 1;
    int got[32];
    OK(cudaMemcpy(got, x, bytes, cudaMemcpyDeviceToHost));
    for (int i = 0; i < 32; ++i) {
        if (got[i] != (i * 2 + 1) * 2) return printf("x[%d] = %d\n", i, got[i]), 1;
    }

    // A graph of two streams, run three times: x + 5 + 7 each.
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    OK(cudaStreamBeginCapture(a, cudaStreamCaptureModeGlobal));
    plus<<<1, 32, 0, a>>>(x, 5);
    OK(cudaEventRecord(event, a));
    OK(cudaStreamWaitEvent(apart, event, 0));
    plus<<<1, 32, 0, apart>>>(x, 7);
    OK(cudaEventRecord(event, apart));
    OK(cudaStreamWaitEvent(a, event, 0));
    OK(cudaStreamEndCapture(a, &graph));
    OK(cudaGraphInstantiate(&exec, graph, 0));
    for (int i = 0; i < 3; ++i) OK(cudaGraphLaunch(exec, a));
    OK(cudaStreamSynchronize(a));
    OK(cudaMemcpy(host, x, bytes, cudaMemcpyDefault));
    for (int i = 0; i < 32; ++i) {
        if (host[i] != (i * 2 + 1) * 2 + 36) return printf("x[%d] = %d after the graph\n", i, host[i]), 1;
    }
    OK(cudaGraphExecDestroy(exec));
    OK(cudaGraphDestroy(graph));
    for (cudaEvent_t one : {event, begin, end}) OK(cudaEventDestroy(one));
    for (cudaStream_t one : {a, b, apart}) OK(cudaStreamDestroy(one));
    OK(cudaFree(x));
    OK(cudaFreeHost(host));
    OK(cudaDeviceReset());
    printf("all in order\n");
}
