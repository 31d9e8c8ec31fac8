// CUDA for clang without NVIDIA's headers: the few declarations that it needs, then kernels.
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __constant__ __attribute__((constant))

#define TID __nvvm_read_ptx_sreg_tid_x()
#define BLOCK __nvvm_read_ptx_sreg_ctaid_x()
#define THREADS __nvvm_read_ptx_sreg_ntid_x()
#define BLOCKS __nvvm_read_ptx_sreg_nctaid_x()

extern "C" __global__ void axpy(const double* x, double* y, double a, long n) {
    for (long i = BLOCK * THREADS + TID; i < n; i += BLOCKS * THREADS) y[i] = __builtin_fma(a, x[i], y[i]);
}

// Block sum through shuffles and shared memory, one atomic per block.
extern "C" __global__ void sum(const int* in, int* out, int n) {
    __shared__ int partial[32];
    int v = 0;
    for (int i = BLOCK * THREADS + TID; i < n; i += BLOCKS * THREADS) v += in[i];
    for (int o = 16; o; o >>= 1) v += __nvvm_shfl_sync_bfly_i32(0xffffffffu, v, o, 31);
    if (TID % 32 == 0) partial[TID / 32] = v;
    __syncthreads();
    if (TID == 0) {
        for (int w = 1; w < THREADS / 32; ++w) v += partial[w];
        __nvvm_atom_add_gen_i(out, v);
    }
}

// The sieve of the smallest factors, with 64-bit division, and the mean of a and b without overflow.
extern "C" __global__ void smallest_factor(const unsigned long* in, unsigned long* out, int n) {
    int i = BLOCK * THREADS + TID;
    if (i >= n) return;
    unsigned long v = in[i], d = 2;
    while (d * d <= v && v % d) d += 1 + (d & 1);
    out[i] = d * d <= v ? d : v;
}

struct Node {
    int value;
    short left, right;
};

// Walks a binary tree in memory with a stack of its own: an array in local memory, loads of a struct.
extern "C" __global__ void tree_sums(const Node* nodes, const short* roots, long* out, int n) {
    int i = BLOCK * THREADS + TID;
    if (i >= n) return;
    short stack[32];
    int top = 0;
    long total = 0;
    stack[top++] = roots[i];
    while (top) {
        const Node node = nodes[stack[--top]];
        total += (long)node.value * (top + 1);
        if (node.right >= 0) stack[top++] = node.right;
        if (node.left >= 0) stack[top++] = node.left;
    }
    out[i] = total;
}

__constant__ unsigned char sbox[16] = {12, 5, 6, 11, 9, 0, 10, 13, 3, 14, 15, 8, 4, 7, 1, 2};

// A substitution and permutation network on 64 bits (PRESENT's layers without keys), table in constant memory.
extern "C" __global__ void present_rounds(unsigned long* data, int n, int rounds) {
    int i = BLOCK * THREADS + TID;
    if (i >= n) return;
    unsigned long s = data[i];
    for (int r = 0; r < rounds; ++r) {
        unsigned long t = 0, p = 0;
        for (int k = 0; k < 16; ++k) t |= (unsigned long)sbox[s >> 4 * k & 15] << 4 * k;
        for (int k = 0; k < 63; ++k) p |= (t >> k & 1) << (16 * k % 63);
        s = (p | (t & 1ul << 63)) ^ (unsigned long)r;
    }
    data[i] = s;
}

// A call that stays a call, by value and by pointer.
__attribute__((device, noinline)) float horner(const float* c, int n, float x) {
    float v = 0.0f;
    while (n--) v = v * x + c[n];
    return v;
}
extern "C" __global__ void polynomial(const float* c, int degree, const float* x, float* y, int n) {
    int i = BLOCK * THREADS + TID;
    if (i < n) y[i] = horner(c, degree + 1, x[i]);
}
