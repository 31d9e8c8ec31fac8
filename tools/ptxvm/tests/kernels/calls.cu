// Calls: recursion, function pointers, virtual functions, structs by value, local arrays, switch tables, alloca-free
// variadic printf aside (see sync.cu).
#include <cuda_runtime.h>

__device__ __noinline__ unsigned long long ackermann(unsigned m, unsigned n) {
    if (m == 0) return n + 1;
    if (n == 0) return ackermann(m - 1, 1);
    return ackermann(m - 1, (unsigned)ackermann(m, n - 1));
}

// Lanes of one warp recurse to different depths.
extern "C" __global__ void recursion(unsigned long long* out) {
    const unsigned t = threadIdx.x;
    out[blockIdx.x * blockDim.x + t] = ackermann(t % 3, t % 7);
}

// Quicksort in place, recursing into both halves; each thread has its own run.
__device__ __noinline__ void quicksort(int* a, int lo, int hi) {
    if (lo >= hi) return;
    const int pivot = a[(lo + hi) / 2];
    int i = lo, j = hi;
    while (i <= j) {
        while (a[i] < pivot) ++i;
        while (a[j] > pivot) --j;
        if (i <= j) {
            const int v = a[i];
            a[i++] = a[j];
            a[j--] = v;
        }
    }
    quicksort(a, lo, j);
    quicksort(a, i, hi);
}
extern "C" __global__ void quicksort_runs(int* data, int runs, int length) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < runs) quicksort(data + i * length, 0, length - 1);
}

typedef float (*Unary)(float);
__device__ __noinline__ float twice(float x) { return x + x; }
__device__ __noinline__ float square(float x) { return x * x; }
__device__ __noinline__ float negate(float x) { return -x; }
__device__ __noinline__ float reciprocal(float x) { return 1.0f / x; }
__device__ Unary table[4] = {twice, square, negate, reciprocal};

// A table in memory, an index that differs inside the warp.
extern "C" __global__ void function_pointers(const float* __restrict__ in, const int* __restrict__ which,
                                             float* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = table[which[i] & 3](in[i]);
}

struct Shape {
    float w;
    __device__ explicit Shape(float w) : w(w) {}
    __device__ virtual float area() const = 0;
    __device__ virtual float scaled(float s) const { return s * area(); }
};
struct Square : Shape {
    __device__ explicit Square(float w) : Shape(w) {}
    __device__ float area() const override { return w * w; }
};
struct Disc : Shape {
    __device__ explicit Disc(float w) : Shape(w) {}
    __device__ float area() const override { return 3.25f * w * w; }
    __device__ float scaled(float s) const override { return Shape::scaled(s) + 1.0f; }
};
struct Box : Square {
    float h;
    __device__ Box(float w, float h) : Square(w), h(h) {}
    __device__ float area() const override { return 2.0f * Square::area() + 4.0f * w * h; }
};
__device__ __noinline__ float measure(const Shape& shape, float s) { return shape.scaled(s); }

extern "C" __global__ void virtual_calls(const float* __restrict__ in, float* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const Square a(in[i]);
    const Disc b(in[i]);
    const Box c(in[i], 0.5f);
    const Shape* shapes[3] = {&a, &b, &c};
    out[i] = measure(*shapes[i % 3], 2.0f);
}

struct Big {
    double d;
    float f[5];
    short s;
    signed char c[3];
};
__device__ __noinline__ Big mix(Big x, int k, double2 p) {
    x.d = x.d * p.x + p.y;
    for (int i = 0; i < 5; ++i) x.f[i] += k * i;
    x.s = (short)(x.s * k);
    x.c[k & 1] = (signed char)(x.c[2] - k);
    return x;
}
// A struct as kernel parameter and as argument and result of calls.
extern "C" __global__ void struct_by_value(Big base, double* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    base.s += (short)i;
    const Big r = mix(mix(base, i, make_double2(0.5, 1.0)), 3, make_double2(-1.0, i));
    double sum = r.d + r.s;
    for (int j = 0; j < 5; ++j) sum += r.f[j] * (j + 1);
    for (int j = 0; j < 3; ++j) sum += r.c[j] * (j + 100);
    out[i] = sum;
}

// A stack machine per thread: local memory with indices only the run knows, and a dense switch (a branch table).
extern "C" __global__ void stack_machine(const unsigned char* __restrict__ code, int length,
                                         const int* __restrict__ in, int* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int stack[16], top = 0, pc = 0, steps = 0;
    stack[top++] = in[i];
    while (pc < length && ++steps < 500) {
        const unsigned char op = code[pc++];
        switch (op) {
            case 0: stack[top] = stack[top - 1]; ++top; break;                                        // dup
            case 1: --top; stack[top - 1] += stack[top]; break;                                       // add
            case 2: --top; stack[top - 1] *= stack[top]; break;                                       // mul
            case 3: { int v = stack[top - 1]; stack[top - 1] = stack[top - 2]; stack[top - 2] = v; break; }  // swap
            case 4: stack[top++] = code[pc++]; break;                                                 // push
            case 5: --top; stack[top - 1] -= stack[top]; break;                                       // sub
            case 6: --top; if (stack[top] > 0) pc -= code[pc] + 1; else ++pc; break;                  // loop back
            case 7: --top; stack[top - 1] ^= stack[top]; break;                                       // xor
            case 8: --top; stack[top - 1] &= stack[top]; break;                                       // and
            case 9: stack[top - 1] >>= 1; break;                                                      // half
            case 10: --top; break;                                                                    // drop
            case 11: stack[top - 1] = stack[top - 1] / 3 + stack[top - 1] % 7; break;                 // div
            default: pc = length; break;                                                              // stop
        }
    }
    out[i] = stack[top - 1] + top * 1000003 + steps;
}

// Gaussian elimination with pivoting on a matrix in local memory.
template <int N>
__device__ __noinline__ double determinant(double (&m)[N][N]) {
    double det = 1.0;
    for (int c = 0; c < N; ++c) {
        int p = c;
        for (int r = c + 1; r < N; ++r)
            if (fabs(m[r][c]) > fabs(m[p][c])) p = r;
        if (m[p][c] == 0.0) return 0.0;
        if (p != c) {
            for (int k = c; k < N; ++k) {
                const double v = m[c][k];
                m[c][k] = m[p][k];
                m[p][k] = v;
            }
            det = -det;
        }
        det *= m[c][c];
        for (int r = c + 1; r < N; ++r) {
            const double f = m[r][c] / m[c][c];
            for (int k = c; k < N; ++k) m[r][k] -= f * m[c][k];
        }
    }
    return det;
}
extern "C" __global__ void determinants(const double* __restrict__ in, double* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    double m[5][5];
    for (int j = 0; j < 25; ++j) m[j / 5][j % 5] = in[i * 25 + j];
    out[i] = determinant(m);
}

// Early returns, breaks out of nested loops and a goto: control flow without structure.
extern "C" __global__ void tangled(const int* __restrict__ in, int* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int v = in[i], r = 0;
again:
    for (int a = 0; a < 10; ++a) {
        if (v < 0) {
            out[i] = r - 1;
            return;
        }
        for (int b = a; b < 10; ++b) {
            r += a ^ b;
            if ((v + b) % 11 == 0) goto leave;
            if ((v ^ a) % 5 == 0) break;
            if ((r & 15) == 7) continue;
            r += 2;
        }
        v = v * 3 - a;
        if (v > 1000) v -= 1013;
    }
leave:
    if (r % 3 == 1 && r < 500) {
        v += r % 17;
        ++r;
        goto again;
    }
    out[i] = r;
}
