// AdamW (Loshchilov and Hutter 2019) for all parameters in one launch. With g the gradient times grad_scale:
//
//   m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
//   p = p (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   copy = p rounded to bf16; the gradient becomes 0
//
// g, p (the master weight), m and v are f32. The order of operations is that of src/backend/cpu/adamw.rs, which is PyTorch's, and
// every operation is correctly rounded: the results have the CPU's bits.
//
// A block takes a chunk: consecutive elements of one parameter, as many as the launcher puts in it. A thread takes 4 elements at a
// time: 16 bytes of each f32 tensor and 8 of the copy. Bytes per element: 16 read, 18 written (16 without a copy). FLOPs: some 20;
// the two divisions and the root take some 40 instructions. The limit is memory.

#include "common.cuh"

// A block's elements.
struct Chunk {  // shared
    float *grad, *master, *m, *v;
    bf16 *copy; // null if the master weight itself is the parameter
    unsigned len;
    float keep; // 1 - lr wd
};
static_assert(sizeof(Chunk) == 48);

struct Step {  // shared
    float grad_scale, new1, beta2, new2, size, root_correction, eps;
};
static_assert(sizeof(Step) == 28);

__device__ __forceinline__ void update(const Step &step, float keep, float grad, float &p, float &m, float &v) {
    const float g = __fmul_rn(grad, step.grad_scale);
    m = fmaf(step.new1, __fsub_rn(g, m), m);
    v = fmaf(step.beta2, v, __fmul_rn(__fmul_rn(step.new2, g), g));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), step.root_correction), step.eps);
    p = fmaf(-step.size, __fdiv_rn(m, denominator), __fmul_rn(p, keep));
}

// A chunk begins at a multiple of 16 bytes in each tensor, of 8 in the copy.
// Launched by cuda/adamw.rs: step; grid (chunks), 256 threads.
extern "C" __global__ void __launch_bounds__(256) adamw(const Chunk *__restrict__ chunks, Step step) {
    const Chunk c = chunks[blockIdx.x];
    const unsigned quads = c.len / 4;
    float *grad = in_global(c.grad), *master = in_global(c.master), *mean = in_global(c.m), *square = in_global(c.v);
    float4 *grads = reinterpret_cast<float4 *>(grad), *masters = reinterpret_cast<float4 *>(master);
    float4 *ms = reinterpret_cast<float4 *>(mean), *vs = reinterpret_cast<float4 *>(square);
    for (unsigned i = threadIdx.x; i < quads; i += blockDim.x) {
        const float4 g = grads[i];
        float4 p = masters[i], m = ms[i], v = vs[i];
        update(step, c.keep, g.x, p.x, m.x, v.x);
        update(step, c.keep, g.y, p.y, m.y, v.y);
        update(step, c.keep, g.z, p.z, m.z, v.z);
        update(step, c.keep, g.w, p.w, m.w, v.w);
        grads[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        masters[i] = p;
        ms[i] = m;
        vs[i] = v;
        if (c.copy) {
            const bf162 low = __floats2bfloat162_rn(p.x, p.y), high = __floats2bfloat162_rn(p.z, p.w);
            reinterpret_cast<uint2 *>(in_global(c.copy))[i] =
                make_uint2(reinterpret_cast<const unsigned &>(low), reinterpret_cast<const unsigned &>(high));
        }
    }
    // The last elements of a parameter whose number is no multiple of 4.
    const unsigned i = 4 * quads + threadIdx.x;
    if (i < c.len) {
        float p = master[i], m = mean[i], v = square[i];
        update(step, c.keep, grad[i], p, m, v);
        grad[i] = 0.0f;
        master[i] = p;
        mean[i] = m;
        square[i] = v;
        if (c.copy) in_global(c.copy)[i] = __float2bfloat16_rn(p);
    }
}
