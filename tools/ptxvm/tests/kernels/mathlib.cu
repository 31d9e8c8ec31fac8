// The math library as nvcc inlines it, in f32, f64 and the fast variants.
#include <cuda_runtime.h>

constexpr int KINDS = 24;

extern "C" __global__ void math_f32(const float* __restrict__ in, float* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = in[i], p = fabsf(v) + 1e-3f, u = v / (1.0f + p);  // any, positive, inside (-1, 1)
    float* r = out + (size_t)i * KINDS;
    r[0] = expf(v);
    r[1] = logf(p);
    r[2] = sinf(v);
    r[3] = cosf(v);
    r[4] = tanf(u);
    r[5] = tanhf(v);
    r[6] = erff(v);
    r[7] = powf(p, 1.7f);
    r[8] = sqrtf(p);
    r[9] = rsqrtf(p);
    r[10] = exp2f(u);
    r[11] = log2f(p);
    r[12] = log1pf(p);
    r[13] = expm1f(u);
    r[14] = atanf(v);
    r[15] = atan2f(v, 0.7f);
    r[16] = asinf(u);
    r[17] = acosf(u);
    r[18] = sinhf(u);
    r[19] = cbrtf(v);
    r[20] = hypotf(v, 3.0f);
    r[21] = fmodf(v, 0.37f);
    r[22] = 1.0f / p;
    r[23] = erfcf(u);
}

// Arguments far out: the reduction with 2/pi to 192 bits in a local array.
extern "C" __global__ void trig_large(const float* __restrict__ in, float* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    out[2 * i] = sinf(in[i]);
    out[2 * i + 1] = cosf(in[i]);
}

extern "C" __global__ void math_f64(const double* __restrict__ in, double* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const double v = in[i], p = fabs(v) + 1e-3, u = v / (1.0 + p);
    double* r = out + (size_t)i * KINDS;
    r[0] = exp(v);
    r[1] = log(p);
    r[2] = sin(v);
    r[3] = cos(v);
    r[4] = tan(u);
    r[5] = tanh(v);
    r[6] = v * 1e6;
    sincos(r[6], &r[6], &r[7]);
    r[8] = sqrt(p);
    r[9] = rsqrt(p);
    r[10] = exp2(u);
    r[11] = log2(p);
    r[12] = log1p(p);
    r[13] = expm1(u);
    r[14] = atan(v);
    r[15] = pow(p, 1.7);
    r[16] = asin(u);
    r[17] = cbrt(v);
    r[18] = 1.0 / p;
    r[19] = p / 3.0;
    r[20] = fmod(v, 0.37);
    r[21] = floor(v) + 2.0 * ceil(v) + 4.0 * rint(v) + 8.0 * trunc(v) + 16.0 * round(v);
    r[22] = ldexp(v, 12) + scalbn(u, -3);
    r[23] = erf(v);
}

// One hardware instruction each.
extern "C" __global__ void math_fast(const float* __restrict__ in, float* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = in[i], p = fabsf(v) + 1e-3f;
    float* r = out + (size_t)i * 12;
    r[0] = __expf(v);
    r[1] = __logf(p);
    r[2] = __sinf(v);
    r[3] = __cosf(v);
    r[4] = __powf(p, 1.3f);
    r[5] = __fdividef(v, p);
    asm("tanh.approx.f32 %0, %1;" : "=f"(r[6]) : "f"(v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r[7]) : "f"(p));
    asm("sqrt.approx.f32 %0, %1;" : "=f"(r[8]) : "f"(p));
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r[9]) : "f"(p));
    asm("ex2.approx.f32 %0, %1;" : "=f"(r[10]) : "f"(v));
    r[11] = __saturatef(v) + __log2f(p) + __log10f(p);
}

// IEEE operations in each rounding: exact results, to the bit.
extern "C" __global__ void roundings(const float* __restrict__ x, const float* __restrict__ y,
                                     float* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float a = x[i], b = y[i];
    float* r = out + (size_t)i * 32;
    r[0] = __fadd_rn(a, b);
    r[1] = __fadd_rz(a, b);
    r[2] = __fadd_ru(a, b);
    r[3] = __fadd_rd(a, b);
    r[4] = __fmul_rn(a, b);
    r[5] = __fmul_rz(a, b);
    r[6] = __fmul_ru(a, b);
    r[7] = __fmul_rd(a, b);
    r[8] = __fmaf_rn(a, b, a);
    r[9] = __fmaf_rz(a, b, a);
    r[10] = __fmaf_ru(a, b, a);
    r[11] = __fmaf_rd(a, b, a);
    r[12] = __fdiv_rn(a, b);
    r[13] = __fdiv_rz(a, b);
    r[14] = __fdiv_ru(a, b);
    r[15] = __fdiv_rd(a, b);
    r[16] = __fsqrt_rn(fabsf(a));
    r[17] = __fsqrt_rz(fabsf(a));
    r[18] = __fsqrt_ru(fabsf(a));
    r[19] = __fsqrt_rd(fabsf(a));
    r[20] = __double2float_rn((double)a * b);
    r[21] = __double2float_rz((double)a * b);
    r[22] = __int2float_rn((int)(a * 1e6f));
    r[23] = __int_as_float(__float2int_rn(a));
    r[24] = __int_as_float(__float2int_ru(a));
    r[25] = __int_as_float(__float2int_rd(a));
    r[26] = __int_as_float(__float2int_rz(a * 1e12f));
    r[27] = __uint_as_float(__float2uint_rn(a));
    r[28] = rintf(a) + floorf(b);
    r[29] = fminf(a, b) - fmaxf(a, b);
    r[30] = copysignf(a, b);
    r[31] = __int_as_float((isnan(a) ? 1 : 0) | (isinf(a) ? 2 : 0) | (signbit(a) ? 4 : 0) | (a < b ? 8 : 0) |
                           (a == b ? 16 : 0) | (!(a >= b) ? 32 : 0) | (a != b ? 64 : 0));
}

// Newton's method in double; every lane stops on its own.
extern "C" __global__ void newton_roots(const double* __restrict__ in, double* __restrict__ out,
                                        int* __restrict__ steps, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const double a = in[i];
    double x = a > 1.0 ? a : 1.0;
    int k = 0;
    for (; k < 200; ++k) {
        const double next = x - (x * x * x - a) / (3.0 * x * x);
        const bool done = fabs(next - x) <= 1e-15 * fabs(next);
        x = next;
        if (done) break;
    }
    out[i] = x;
    steps[i] = k;
}
