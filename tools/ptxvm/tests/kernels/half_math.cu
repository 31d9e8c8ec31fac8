// f16 and bf16 arithmetic, packed and scalar, and the conversions between formats.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

constexpr int KINDS = 16;

extern "C" __global__ void half2_ops(const __half2* __restrict__ x, const __half2* __restrict__ y,
                                     __half2* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const __half2 a = x[i], b = y[i];
    __half2* r = out + (size_t)i * KINDS;
    r[0] = __hadd2(a, b);
    r[1] = __hsub2(a, b);
    r[2] = __hmul2(a, b);
    r[3] = __hfma2(a, b, a);
    r[4] = __hmin2(a, b);
    r[5] = __hmax2(a, b);
    r[6] = __hneg2(a);
    r[7] = __habs2(a);
    r[8] = __hfma2_relu(a, b, b);
    r[9] = __hadd2_sat(a, b);
    r[10] = __h2div(a, b);
    r[11] = __hlt2(a, b);
    r[12] = __lowhigh2highlow(a);
    r[13] = h2rint(a);
    r[14] = __hmax2_nan(a, b);
    r[15] = __halves2half2(__low2half(a) + __high2half(b), __hmul(__high2half(a), __low2half(b)));
}

extern "C" __global__ void bfloat2_ops(const __nv_bfloat162* __restrict__ x, const __nv_bfloat162* __restrict__ y,
                                       __nv_bfloat162* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const __nv_bfloat162 a = x[i], b = y[i];
    __nv_bfloat162* r = out + (size_t)i * KINDS;
    r[0] = __hadd2(a, b);
    r[1] = __hsub2(a, b);
    r[2] = __hmul2(a, b);
    r[3] = __hfma2(a, b, a);
    r[4] = __hmin2(a, b);
    r[5] = __hmax2(a, b);
    r[6] = __hneg2(a);
    r[7] = __habs2(a);
    r[8] = __hfma2_relu(a, b, b);
    r[9] = __hgt2(a, b);
    r[10] = __h2div(a, b);
    r[11] = __bfloat162bfloat162(__low2bfloat16(a));
    r[12] = __lowhigh2highlow(b);
    r[13] = h2trunc(a);
    r[14] = __hmin2_nan(a, b);
    r[15] = __floats2bfloat162_rn(__low2float(a) * 1.5f, __high2float(b) * -0.3f);
}

// f32 to the small formats in every rounding, and back.
extern "C" __global__ void narrow(const float* __restrict__ in, unsigned short* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float v = in[i];
    unsigned short* r = out + (size_t)i * 12;
    r[0] = __half_as_ushort(__float2half_rn(v));
    r[1] = __half_as_ushort(__float2half_rz(v));
    r[2] = __half_as_ushort(__float2half_ru(v));
    r[3] = __half_as_ushort(__float2half_rd(v));
    r[4] = __bfloat16_as_ushort(__float2bfloat16_rn(v));
    r[5] = __bfloat16_as_ushort(__float2bfloat16_rz(v));
    r[6] = __bfloat16_as_ushort(__float2bfloat16_ru(v));
    r[7] = __bfloat16_as_ushort(__float2bfloat16_rd(v));
    r[8] = __half_as_ushort(__double2half((double)v * 1.0000001));
    r[9] = (unsigned short)__half2short_rn(__float2half_rn(v));
    r[10] = (unsigned short)__half2ushort_rz(__float2half_rn(v));
    r[11] = __half_as_ushort(__int2half_rn((int)(v * 3.0f)));
}

// All 65536 halves to float: subnormals, infinities, NaN.
extern "C" __global__ void widen(float* __restrict__ half_out, float* __restrict__ bfloat_out) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    half_out[i] = __half2float(__ushort_as_half((unsigned short)i));
    bfloat_out[i] = __bfloat162float(__ushort_as_bfloat16((unsigned short)i));
}

// Functions that go through f32 and the approximate units.
extern "C" __global__ void half_functions(const __half* __restrict__ in, __half* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const __half v = in[i];
    __half* r = out + (size_t)i * 8;
    r[0] = hexp(v);
    r[1] = hlog(__habs(v));
    r[2] = hsqrt(__habs(v));
    r[3] = hrsqrt(__habs(v));
    r[4] = hrcp(v);
    r[5] = hsin(v);
    r[6] = hcos(v);
    r[7] = htanh(v);
}
