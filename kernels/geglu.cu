// Gemma's gated activation, backward; the forward pass is an epilogue of matmul.cu.
//
//   h = gelu(gate) up, gelu(x) = x s, s = logistic(v) = (1 + tanh(v / 2)) / 2, v = 2 sqrt(2/pi) (x + 0.044715 x^3)
//   dup = dh x s,  dgate = dh up (s + x ds/dx),  ds/dx = s (1 - s) dv/dx
//
// All [T, F] bf16, arithmetic f32, one rounding at the store. With e = exp(-|v|), s and 1 - s are 1 / (1 + e) and
// e / (1 + e) in one order or the other: no difference of nearly equal numbers, as 1 + tanh would be.
//
// A thread takes 8 elements: three reads and two writes of 16 bytes, some 30 instructions each. Bytes: 10 T F; a GPU
// has time for 50 instructions and more in which 10 bytes travel, so the limit is memory.

#include "common.cuh"

// s, and x ds/dx.
__device__ __forceinline__ void gate_and_slope(float x, float &s, float &slope) {
    const float two_sqrt_2_over_pi = 1.595769f, cubic = 0.044715f;
    const float square = x * x;
    const float v = two_sqrt_2_over_pi * fmaf(cubic * square, x, x);
    const float e = expf(-fabsf(v));
    // 1 <= 1 + e <= 2, where the quick division is within 2 units of the last place.
    const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
    const float dv = two_sqrt_2_over_pi * fmaf(3.0f * cubic, square, 1.0f);
    s = v < 0.0f ? small : large;
    slope = small * large * dv * x;
}

// Grid: threads for n / 8 pieces.
extern "C" __global__ void __launch_bounds__(256) geglu_backward(
    const bf16 *__restrict__ dh, const bf16 *__restrict__ gate, const bf16 *__restrict__ up,
    bf16 *__restrict__ d_gate, bf16 *__restrict__ d_up, size_t pieces) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= pieces) return;
    float d[8], x[8], u[8], out_gate[8], out_up[8];
    widen(load8(dh, i), d);
    widen(load8(gate, i), x);
    widen(load8(up, i), u);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float s, slope;
        gate_and_slope(x[j], s, slope);
        out_gate[j] = d[j] * u[j] * (s + slope);
        out_up[j] = d[j] * (x[j] * s);
    }
    store8(d_gate, i, narrow(out_gate));
    store8(d_up, i, narrow(out_up));
}
