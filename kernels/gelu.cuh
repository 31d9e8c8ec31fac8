// The gated activation of Gemma's MLPs and its gradient, of one vector. The formulas are in geglu.cu. With e = exp(-|v|), s and
// 1 - s are 1 / (1 + e) and e / (1 + e), or for negative v the other way round. That avoids the cancellation of 1 + tanh.
#pragma once

#include "common.cuh"

// Computes s, and x ds/dx.
__device__ __forceinline__ void gate_and_slope(float x, float &s, float &slope) {
    const float two_sqrt_2_over_pi = 1.595769f, cubic = 0.044715f;
    const float square = x * x;
    const float v = two_sqrt_2_over_pi * fmaf(cubic * square, x, x);
    const float e = expf(-fabsf(v));
    // The divisor is in 1 .. 2, where __fdividef has an error of at most 2 ulp.
    const float large = __fdividef(1.0f, 1.0f + e), small = e * large;
    const float dv = two_sqrt_2_over_pi * fmaf(3.0f * cubic, square, 1.0f);
    s = v < 0.0f ? small : large;
    slope = small * large * dv * x;
}

// The gradients by gate x and up u of a vector.
__device__ __forceinline__ void backward_of(const float (&d)[8], const float (&x)[8], const float (&u)[8],
                                            float (&d_gate)[8], float (&d_up)[8]) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float s, slope;
        gate_and_slope(x[j], s, slope);
        d_gate[j] = d[j] * u[j] * (s + slope);
        d_up[j] = d[j] * (x[j] * s);
    }
}
