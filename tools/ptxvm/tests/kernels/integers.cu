// Integer intrinsics and arithmetic: one row of results per thread.
#include <cuda_runtime.h>

extern "C" __global__ void bit_intrinsics(const unsigned* __restrict__ x, const unsigned* __restrict__ y,
                                          unsigned* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned a = x[i], b = y[i];
    const unsigned long long w = (unsigned long long)a << 32 | b;
    unsigned* r = out + (size_t)i * 32;
    r[0] = __popc(a);
    r[1] = __clz(a);
    r[2] = __ffs(a);
    r[3] = __brev(a);
    r[4] = __byte_perm(a, b, b & 0x7777);
    r[5] = __funnelshift_l(a, b, b & 63);
    r[6] = __funnelshift_r(a, b, a & 63);
    r[7] = __funnelshift_lc(a, b, b & 63);
    r[8] = __funnelshift_rc(a, b, a & 63);
    r[9] = __dp4a((int)a, (int)b, 5);
    r[10] = __dp4a(a, b, 5u);
    r[11] = __dp2a_lo((int)a, (int)b, -3);
    r[12] = __dp2a_hi(a, b, 3u);
    r[13] = __umulhi(a, b);
    r[14] = __mulhi((int)a, (int)b);
    r[15] = __umul24(a, b);
    r[16] = __mul24((int)a, (int)b);
    r[17] = __sad((int)a, (int)b, 7u);
    r[18] = __usad(a, b, 7u);
    r[19] = __hadd((int)a, (int)b);
    r[20] = __rhadd((int)a, (int)b);
    r[21] = __uhadd(a, b);
    r[22] = __urhadd(a, b);
    r[23] = __popcll(w);
    r[24] = __clzll(w);
    r[25] = __ffsll(w);
    const unsigned long long v = __brevll(w);
    r[26] = (unsigned)v;
    r[27] = (unsigned)(v >> 32);
    r[28] = (a & b) ^ (~a & 0x0f0f0f0fu) | (b & 0x00ff00ffu);
    r[29] = a << (b & 31) | b >> (a & 31);
    r[30] = (unsigned)((int)a >> (b & 31));
    r[31] = __vabsdiffu4(a, b) + __vadd2(a, b) + __vmaxs4(a, b) + __vcmpgtu2(a, b);
}

// Instructions that people reach for through inline PTX.
extern "C" __global__ void ptx_integers(const unsigned* __restrict__ x, const unsigned* __restrict__ y,
                                        unsigned* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned a = x[i], b = y[i];
    unsigned* r = out + (size_t)i * 16;
    asm("bfe.u32 %0, %1, %2, %3;" : "=r"(r[0]) : "r"(a), "r"(b & 31), "r"(b >> 8 & 31));
    asm("bfe.s32 %0, %1, %2, %3;" : "=r"(r[1]) : "r"(a), "r"(b & 31), "r"(b >> 8 & 31));
    asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(r[2]) : "r"(a), "r"(b), "r"(b & 31), "r"(b >> 8 & 31));
    asm("bfind.u32 %0, %1;" : "=r"(r[3]) : "r"(a));
    asm("bfind.s32 %0, %1;" : "=r"(r[4]) : "r"(a));
    asm("bfind.shiftamt.u32 %0, %1;" : "=r"(r[5]) : "r"(a));
    asm("lop3.b32 %0, %1, %2, %3, 0xE8;" : "=r"(r[6]) : "r"(a), "r"(b), "r"(i));
    asm("prmt.b32.f4e %0, %1, %2, %3;" : "=r"(r[7]) : "r"(a), "r"(b), "r"(b & 3));
    asm("prmt.b32.rc8 %0, %1, %2, %3;" : "=r"(r[8]) : "r"(a), "r"(b), "r"(b & 3));
    asm("mad24.lo.s32 %0, %1, %2, %3;" : "=r"(r[9]) : "r"(a), "r"(b), "r"(17));
    asm("mul24.hi.u32 %0, %1, %2;" : "=r"(r[10]) : "r"(a), "r"(b));
    asm("{ .reg .u32 lo; add.cc.u32 lo, %1, %2; addc.u32 %0, %1, 3; }" : "=r"(r[11]) : "r"(a), "r"(b));
    asm("{ .reg .u32 lo; sub.cc.u32 lo, %1, %2; subc.u32 %0, %2, 3; }" : "=r"(r[12]) : "r"(a), "r"(b));
    asm("{ .reg .u32 lo; mad.lo.cc.u32 lo, %1, %2, %2; madc.hi.u32 %0, %1, %2, 9; }" : "=r"(r[13]) : "r"(a), "r"(b));
    asm("slct.u32.s32 %0, %1, %2, %3;" : "=r"(r[14]) : "r"(a), "r"(b), "r"((int)(a ^ b)));
    asm("bmsk.clamp.b32 %0, %1, %2;" : "=r"(r[15]) : "r"(a & 63), "r"(b & 63));
}

// Division and remainder of every width; divisors are not 0.
extern "C" __global__ void divisions(const long long* __restrict__ x, const long long* __restrict__ y,
                                     long long* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const long long a = x[i], b = y[i];
    const int a32 = (int)a, b32 = (int)b | 1;
    const short a16 = (short)a, b16 = (short)(b | 1);
    long long* r = out + (size_t)i * 14;
    r[0] = a / b;
    r[1] = a % b;
    r[2] = (long long)((unsigned long long)a / (unsigned long long)b);
    r[3] = (long long)((unsigned long long)a % (unsigned long long)b);
    r[4] = a32 / b32;
    r[5] = a32 % b32;
    r[6] = (unsigned)a32 / (unsigned)b32;
    r[7] = (unsigned)a32 % (unsigned)b32;
    r[8] = a16 / b16;
    r[9] = (unsigned short)a16 % (unsigned short)b16;
    r[10] = a / 1000000007ll;
    r[11] = a32 % 10;
    r[12] = (unsigned)a32 / 7u;
    r[13] = (unsigned long long)a / 641ull;
}

// 64-bit and 128-bit: products, carries, shifts.
extern "C" __global__ void wide_integers(const unsigned long long* __restrict__ x,
                                         const unsigned long long* __restrict__ y, unsigned long long* __restrict__ out,
                                         int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const unsigned long long a = x[i], b = y[i];
    unsigned long long* r = out + (size_t)i * 16;
    const unsigned __int128 p = (unsigned __int128)a * b;
    r[0] = (unsigned long long)p;
    r[1] = (unsigned long long)(p >> 64);
    r[2] = __umul64hi(a, b);
    r[3] = (unsigned long long)__mul64hi((long long)a, (long long)b);
    const unsigned __int128 s = p + ((unsigned __int128)b << 64 | a) - (a ^ b);
    r[4] = (unsigned long long)s;
    r[5] = (unsigned long long)(s >> 64);
    const unsigned __int128 t = p >> (a & 127), u = p << (b & 127);
    r[6] = (unsigned long long)t;
    r[7] = (unsigned long long)(u >> 64);
    const unsigned __int128 q = p / ((unsigned __int128)b + 12345), m = p % ((unsigned __int128)a >> 7 | 1);
    r[8] = (unsigned long long)q;
    r[9] = (unsigned long long)m;
    r[10] = a << (b & 63) | a >> (64 - (b & 63) & 63);
    r[11] = (unsigned long long)((long long)a >> (b & 63));
    r[12] = (unsigned long long)((long long)(int)a * (int)b + (long long)b);
    r[13] = (unsigned long long)(unsigned)a * (unsigned)b + a;
    r[14] = llabs((long long)a) + (unsigned long long)max((long long)a, (long long)b);
    r[15] = (a < b) + 2 * ((long long)a < (long long)b) + 4 * (p > s);
}

// Bytes and shorts: wrap-around, sign extension and saturating conversions.
extern "C" __global__ void small_integers(const int* __restrict__ in, short* __restrict__ out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int v = in[i];
    const signed char c = (signed char)v;
    const unsigned char u = (unsigned char)(v >> 3);
    const short s = (short)(v >> 5);
    short* r = out + (size_t)i * 8;
    r[0] = (short)(c * u);
    r[1] = (short)(s + c);
    r[2] = (short)(signed char)(c << 3);
    r[3] = (short)(unsigned char)(u - c);
    r[4] = (short)(s >> (u & 15));
    r[5] = (short)((unsigned short)s >> (u & 15));
    asm("cvt.sat.s16.s32 %0, %1;" : "=h"(r[6]) : "r"(v));
    asm("{ .reg .u16 t; cvt.sat.u8.s32 t, %1; mov.b16 %0, t; }" : "=h"(r[7]) : "r"(v));
}
