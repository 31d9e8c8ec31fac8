// AdamW (Loshchilov and Hutter 2019) for all parameters. With g the gradient times grad_scale:
//
//   m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
//   p = p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   the gradient becomes 0
//
// g is f32 or bf16. p is an f32 weight; or an f32 master weight whose copy in bf16 is the parameter; or a bf16 weight alone, for which the
// new p is rounded at random. A bf16 weight below 2^-56 becomes 0: see `MIN_WEIGHT` in src/backend/adamw.rs. m and v are f32, or
// codes of 8 bits with a scale for every 256 elements. The order of operations is that of src/backend/cpu/adamw.rs, which is
// PyTorch's, and every operation is correctly rounded: the results have the CPU's bits.
//
// A block takes a chunk: consecutive elements of one parameter, as many as the launcher puts in it, 65536 at most. A warp takes 256
// of them at a time, which are those of a scale, and a lane the elements 4 lane to 4 lane + 3 and 128 + 4 lane to 128 + 4 lane + 3:
// it reads 16 bytes of an f32 tensor at a time, 8 of a bf16 one, 4 of codes. Bytes per element, read and written: gradient 8, in bf16 4; m and v
// 16, or 4.06 as codes; weight 8, with a copy 10, bf16 alone 4. FLOPs: some 20; the two divisions and the root take some 40
// instructions, the codes as many again, a draw some 20. The limit is memory.

#include "random.cuh"

// Elements with a scale in common, of a warp at a time.
constexpr unsigned BLOCK = 256;

// A block's elements.
struct Chunk {  // shared
    float *grad;   // null if the gradient is bf16
    bf16 *grad_bf16;
    float *master; // null if there is the bf16 weight alone
    void *m, *v;   // f32 or codes
    float *m_scales, *v_scales; // null without codes
    bf16 *copy;    // null if the f32 weight is the parameter
    unsigned len;
    float keep;    // 1 - lr wd
    unsigned first; // the number within the parameter of the chunk's first 256 elements
    unsigned number; // the parameter's
};
static_assert(sizeof(Chunk) == 80);

struct Step {  // shared
    float grad_scale, new1, beta2, new2, size, root_correction, eps;
    unsigned key[2];
};
static_assert(sizeof(Step) == 36);

// The upper half of the bits of 2^-56.
constexpr unsigned MIN_WEIGHT = (127 - 56) << 7;

constexpr unsigned BUCKETS = 2948;
constexpr int FIRST_BUCKET = (127 - 23) * 128;

// A code of 8 bits: see `DynamicCode` in src/backend/adamw.rs, which makes it.
struct Code {  // shared
    float values[256];
    float middles[256];
    unsigned char first[BUCKETS];
    unsigned zero, least;
};
static_assert(sizeof(Code) == 5004);

// The code of the value nearest to x, from -1 to 1.
__device__ __forceinline__ unsigned nearest(const Code &code, float x) {
    const float size = fabsf(x);
    const int bucket = int(__float_as_uint(size) >> 16) - FIRST_BUCKET;
    const unsigned first = code.first[min(max(bucket, 0), int(BUCKETS) - 1)];
    const unsigned magnitude = max(first + (size > code.middles[first]), size > 0.0f ? code.least : 0);
    return x < 0.0f ? code.zero - min(magnitude, code.zero) : code.zero + magnitude;
}

// Four elements as they lie in memory, and one.
__device__ __forceinline__ void widen4(const float *x, float (&y)[4]) {
    const float4 four = *reinterpret_cast<const float4 *>(x);
    y[0] = four.x, y[1] = four.y, y[2] = four.z, y[3] = four.w;
}

__device__ __forceinline__ void narrow4(float *x, const float (&y)[4]) {
    *reinterpret_cast<float4 *>(x) = make_float4(y[0], y[1], y[2], y[3]);
}

__device__ __forceinline__ void widen4(const bf16 *x, unsigned (&y)[4]) {
    const uint2 words = *reinterpret_cast<const uint2 *>(x);
    y[0] = words.x & 0xffff, y[1] = words.x >> 16, y[2] = words.y & 0xffff, y[3] = words.y >> 16;
}

__device__ __forceinline__ void narrow4(bf16 *x, const unsigned (&y)[4]) {
    *reinterpret_cast<uint2 *>(x) = make_uint2(y[0] | y[1] << 16, y[2] | y[3] << 16);
}

__device__ __forceinline__ void widen4(const unsigned char *x, unsigned (&y)[4]) {
    const unsigned word = *reinterpret_cast<const unsigned *>(x);
#pragma unroll
    for (int i = 0; i < 4; i++) y[i] = word >> 8 * i & 0xff;
}

__device__ __forceinline__ void narrow4(unsigned char *x, const unsigned (&y)[4]) {
    *reinterpret_cast<unsigned *>(x) = y[0] | y[1] << 8 | y[2] << 16 | y[3] << 24;
}

__device__ __forceinline__ float widen1(float x) { return x; }
__device__ __forceinline__ unsigned widen1(bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ unsigned widen1(unsigned char x) { return x; }
__device__ __forceinline__ void narrow1(float *x, float y) { *x = y; }
__device__ __forceinline__ void narrow1(bf16 *x, unsigned y) { *x = __ushort_as_bfloat16(y); }
__device__ __forceinline__ void narrow1(unsigned char *x, unsigned y) { *x = y; }

// The lane's eight of n elements from x on, as numbers or, where they are bf16 or codes, as bits; 0 behind the last.
template <typename T, typename Y>
__device__ __forceinline__ void read8(const T *x, unsigned lane, unsigned n, Y (&y)[8]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned at = BLOCK / 2 * half + 4 * lane;
        Y four[4] = {};
        if (at + 4 <= n) {
            widen4(x + at, four);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (at + i < n) four[i] = widen1(x[at + i]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) y[4 * half + i] = four[i];
    }
}

template <typename T, typename Y>
__device__ __forceinline__ void write8(T *x, unsigned lane, unsigned n, const Y (&y)[8]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const unsigned at = BLOCK / 2 * half + 4 * lane;
        const Y four[4] = {y[4 * half], y[4 * half + 1], y[4 * half + 2], y[4 * half + 3]};
        if (at + 4 <= n) {
            narrow4(x + at, four);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (at + i < n) narrow1(x + at + i, four[i]);
        }
    }
}

// The lane's eight of a block of codes: value times scale.
__device__ __forceinline__ void decode(const Code &code, const unsigned char *codes, float scale, unsigned lane, unsigned n,
                                       float (&x)[8]) {
    unsigned bits[8];
    read8(codes, lane, n, bits);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __fmul_rn(code.values[bits[i]], scale);
}

// Writes a block as codes and returns its scale, the largest magnitude. What is behind the last element must be 0 on the way in, as
// read8 makes it and an update of nothing leaves it.
__device__ __forceinline__ float encode(const Code &code, unsigned char *codes, unsigned lane, unsigned n, const float (&x)[8]) {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(x[i]));
    const float scale = warp_max(largest), inverse = scale < 0x1p-125f ? 0.0f : __fdiv_rn(1.0f, scale);
    unsigned bits[8];
#pragma unroll
    for (int i = 0; i < 8; i++) bits[i] = nearest(code, __fmul_rn(x[i], inverse));
    write8(codes, lane, n, bits);
    return scale;
}

__device__ __forceinline__ void update(const Step &step, float keep, float grad, float &p, float &m, float &v) {
    const float g = __fmul_rn(grad, step.grad_scale);
    m = fmaf(step.new1, __fsub_rn(g, m), m);
    v = fmaf(step.beta2, v, __fmul_rn(__fmul_rn(step.new2, g), g));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), step.root_correction), step.eps);
    p = fmaf(-step.size, __fdiv_rn(m, denominator), __fmul_rn(p, keep));
}

// A chunk begins at a multiple of 256 elements of its parameter.
template <bool BLOCKWISE>
__device__ __forceinline__ void update_chunk(const Chunk *chunks, const Step &step, const Code *codes) {
    const Chunk c = chunks[blockIdx.x];
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const unsigned blocks = (c.len + BLOCK - 1) / BLOCK;
    // With codes a warp takes as many blocks in a row as it has lanes, each of which holds the scales of one, so that they are read
    // and written at once. A chunk has no more of them.
    const unsigned begin = BLOCKWISE ? WARP * warp : warp, end = BLOCKWISE ? min(blocks, begin + WARP) : blocks;
    const unsigned own = begin + lane;
    float m_scales = 0.0f, v_scales = 0.0f;
    if (BLOCKWISE && own < end) {
        m_scales = in_global(c.m_scales)[own];
        v_scales = in_global(c.v_scales)[own];
    }
    for (unsigned block = begin; block < end; block += BLOCKWISE ? 1 : warps) {
        const unsigned at = block * BLOCK, n = min(BLOCK, c.len - at);
        float g[8], p[8], m[8], v[8];
        if (c.grad) {
            const float nothing[8] = {};
            read8(in_global(c.grad) + at, lane, n, g);
            write8(in_global(c.grad) + at, lane, n, nothing);
        } else {
            const unsigned nothing[8] = {};
            unsigned bits[8];
            read8(in_global(c.grad_bf16) + at, lane, n, bits);
            write8(in_global(c.grad_bf16) + at, lane, n, nothing);
#pragma unroll
            for (int i = 0; i < 8; i++) g[i] = __uint_as_float(bits[i] << 16);
        }
        if (c.master) {
            read8(in_global(c.master) + at, lane, n, p);
        } else {
            unsigned bits[8];
            read8(in_global(c.copy) + at, lane, n, bits);
#pragma unroll
            for (int i = 0; i < 8; i++) p[i] = __uint_as_float(bits[i] << 16);
        }
        if (BLOCKWISE) {
            const unsigned char *ms = in_global(static_cast<unsigned char *>(c.m)), *vs = in_global(static_cast<unsigned char *>(c.v));
            decode(codes[0], ms + at, __shfl_sync(ALL, m_scales, block - begin), lane, n, m);
            decode(codes[1], vs + at, __shfl_sync(ALL, v_scales, block - begin), lane, n, v);
        } else {
            read8(in_global(static_cast<float *>(c.m)) + at, lane, n, m);
            read8(in_global(static_cast<float *>(c.v)) + at, lane, n, v);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) update(step, c.keep, g[i], p[i], m[i], v[i]);
        if (BLOCKWISE) {
            // Behind the last element a code stood for no number.
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (BLOCK / 2 * (i / 4) + 4 * lane + i % 4 >= n) m[i] = v[i] = 0.0f;
            const float m_scale = encode(codes[0], in_global(static_cast<unsigned char *>(c.m)) + at, lane, n, m);
            const float v_scale = encode(codes[1], in_global(static_cast<unsigned char *>(c.v)) + at, lane, n, v);
            if (own == block) {
                m_scales = m_scale;
                v_scales = v_scale;
            }
        } else {
            write8(in_global(static_cast<float *>(c.m)) + at, lane, n, m);
            write8(in_global(static_cast<float *>(c.v)) + at, lane, n, v);
        }
        unsigned bits[8];
        if (c.master) {
            write8(in_global(c.master) + at, lane, n, p);
#pragma unroll
            for (int i = 0; i < 8; i++) bits[i] = __bfloat16_as_ushort(__float2bfloat16_rn(p[i]));
        } else {
            const uint4 draw = philox(make_uint4(WARP * (c.first + block) + lane, c.number, 0, 0), step.key[0], step.key[1]);
            const unsigned words[4] = {draw.x, draw.y, draw.z, draw.w};
#pragma unroll
            for (int i = 0; i < 8; i++)
                bits[i] = (__float_as_uint(p[i]) + (words[i / 2] >> 16 * (i % 2) & 0xffff)) >> 16;
        }
#pragma unroll
        for (int i = 0; i < 8; i++)
            if ((bits[i] & 0x7fff) < MIN_WEIGHT) bits[i] = 0;
        if (c.copy) write8(in_global(c.copy) + at, lane, n, bits);
    }
    if (BLOCKWISE && own < end) {
        in_global(c.m_scales)[own] = m_scales;
        in_global(c.v_scales)[own] = v_scales;
    }
}

// Launched by cuda/adamw.rs: step; grid (chunks), 256 threads.
extern "C" __global__ void __launch_bounds__(256) adamw(const Chunk *__restrict__ chunks, Step step) {
    update_chunk<false>(chunks, step, nullptr);
}

// `codes`: that of m, then that of v.
// Launched by cuda/adamw.rs: step; grid (chunks), 256 threads.
extern "C" __global__ void __launch_bounds__(256)
    adamw_blockwise(const Chunk *__restrict__ chunks, Step step, const Code *__restrict__ codes) {
    __shared__ Code in_shared[2];
    const unsigned *from = reinterpret_cast<const unsigned *>(codes);
    unsigned *to = reinterpret_cast<unsigned *>(in_shared);
    for (unsigned i = threadIdx.x; i < sizeof(in_shared) / sizeof(unsigned); i += blockDim.x) to[i] = from[i];
    __syncthreads(); // because a thread looks up what others have copied
    update_chunk<true>(chunks, step, in_shared);
}
