// The gradient of Gemma's gated activation. The forward pass is an epilogue of matmul.cu, except for the product with a layer's
// own input (Gemma 4 E2B, E4B), which both passes have here.
//
//   h = gelu(gate) up, gelu(x) = x s, s = logistic(v) = (1 + tanh(v / 2)) / 2, v = 2 sqrt(2/pi) (x + 0.044715 x^3)
//   dup = dh x s,  dgate = dh up (s + x ds/dx),  ds/dx = s (1 - s) dv/dx
//
// All tensors are [T, F] in bf16; arithmetic is f32, with one rounding at the store.
//
// A thread takes 8 elements: three loads and two stores of 16 bytes, and some 30 instructions for each element. Bytes: 10 T F. A
// GPU can issue 50 instructions and more in the time of 10 bytes, and so the limit is memory.

#include "gelu.cuh"

// Launched by cuda/geglu.rs: geglu_backward; grid (vectors / 256), 256 threads.
extern "C" __global__ void __launch_bounds__(256) geglu_backward(
    const bf16 *__restrict__ dh, const bf16 *__restrict__ gate, const bf16 *__restrict__ up,
    bf16 *__restrict__ d_gate, bf16 *__restrict__ d_up, size_t vectors) {
    const size_t i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= vectors) return;
    float d[8], x[8], u[8], out_gate[8], out_up[8];
    widen(load8(dh, i), d);
    widen(load8(gate, i), x);
    widen(load8(up, i), u);
    backward_of(d, x, u, out_gate, out_up);
    store8(d_gate, i, narrow(out_gate));
    store8(d_up, i, narrow(out_up));
}

// Vectors i of gate [T, P] stand for columns first .. first + P of a row of inputs [T, width]: the index there, in vectors.
__device__ __forceinline__ size_t input_of(unsigned i, unsigned vectors, unsigned first, unsigned width) {
    return size_t(i / vectors) * (width / 8) + first / 8 + i % vectors;
}

// h = gelu(gate) inputs[:, first ..].
// Launched by cuda/geglu.rs: gelu_product_forward; grid (vectors / 256), 256 threads.
extern "C" __global__ void __launch_bounds__(256) gelu_product_forward(
    const bf16 *__restrict__ gate, const bf16 *__restrict__ inputs, bf16 *__restrict__ h, unsigned count,
    unsigned vectors, unsigned first, unsigned width) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float x[8], u[8];
    widen(load8(gate, i), x);
    widen(load8(inputs, input_of(i, vectors, first, width)), u);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float s, slope;
        gate_and_slope(x[j], s, slope);
        x[j] = x[j] * s * u[j];
    }
    store8(h, i, narrow(x));
}

// d_gate, and the gradient of the input's columns, which it replaces.
// Launched by cuda/geglu.rs: gelu_product_backward; grid (vectors / 256), 256 threads.
extern "C" __global__ void __launch_bounds__(256) gelu_product_backward(
    const bf16 *__restrict__ dh, const bf16 *__restrict__ gate, const bf16 *__restrict__ inputs,
    bf16 *__restrict__ d_gate, bf16 *__restrict__ d_inputs, unsigned count, unsigned vectors, unsigned first,
    unsigned width) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const size_t input = input_of(i, vectors, first, width);
    float d[8], x[8], u[8], out_gate[8], out_up[8];
    widen(load8(dh, i), d);
    widen(load8(gate, i), x);
    widen(load8(inputs, input), u);
    backward_of(d, x, u, out_gate, out_up);
    store8(d_gate, i, narrow(out_gate));
    store8(d_inputs, input, narrow(out_up));
}
