// Products with weights, of one tile each: what the kernels of matmul.cu and, for the rows of an expert, of experts.cu have in
// common. Y, X, H and dW are row-major; m and n are the tile's first row and column. `memory` is the block's, P::SHARED bytes.
#pragma once

#include "tile.cuh"

// The variants; LA and LB are the layouts of the operands.
template <Layout LA, Layout LB>
using Tile32x16 = Tile<32, 16, 2, 1, 64, 12, LA, LB>;  // shared
template <Layout LA, Layout LB>
using Tile32x32 = Tile<32, 32, 2, 2, 128, 5, LA, LB>;  // shared
template <Layout LA, Layout LB>
using Tile32x64 = Tile<32, 64, 2, 2, 64, 4, LA, LB>;  // shared
template <Layout LA, Layout LB>
using Tile64x32 = Tile<64, 32, 2, 2, 128, 4, LA, LB>;  // shared
template <Layout LA, Layout LB>
using Tile64x64 = Tile<64, 64, 2, 2, 64, 3, LA, LB>;  // shared
template <Layout LA, Layout LB>
using Tile128x128 = Tile<128, 128, 2, 2, 64, 2, LA, LB>;  // shared

// Y[m .., n ..] = X W^T of the rows m .. end - 1, as many as the tile has: X [.., in], W [out, in], Y [.., out].
template <typename P>
__device__ __forceinline__ void store_product(const bf16 *x, const bf16 *w, bf16 *y, unsigned m, unsigned end, unsigned n,
                                              unsigned out, unsigned in, void *memory) {
    P p;
    p.multiply({x + size_t(m) * in, in, int(end - m)}, {w + size_t(n) * in, in, int(out - n)}, in, memory);
    p.store(y + size_t(m) * out + n, out, end - m, out - n);
}

// gelu(x) in its tanh form: x times the logistic function of 2 sqrt(2 / pi) (x + 0.044715 x^3).
__device__ __forceinline__ float gelu(float x) {
    const float v = 1.595769122f * fmaf(0.044715f * x * x, x, x);
    return __fdividef(x, 1.0f + __expf(-v));
}

// H[m .., n ..] = gelu(X Wg^T) * (X Wu^T) of the rows m .. end - 1, for N / 2 features: Wg and Wu [features, in]. The columns of the
// tile are gate and up, alternating by eight, so that a thread has both for a feature. gate and up, [.., features] like H, are
// null if they are not kept.
template <typename P>
__device__ __forceinline__ void store_geglu(const bf16 *x, const bf16 *w_gate, const bf16 *w_up, bf16 *h, bf16 *gate,
                                            bf16 *up, unsigned m, unsigned end, unsigned n, unsigned features, unsigned in,
                                            void *memory) {
    P p;
    p.multiply({x + size_t(m) * in, in, int(end - m)},
               {w_gate + size_t(n) * in, in, int(features - n), w_up + size_t(n) * in}, in, memory);
    const unsigned row = m + P::warp_row(), col = n + P::warp_column() / 2;
#pragma unroll
    for (int i = 0; i < P::MT; i++) {
        float a[P::NT / 2][4], b[P::NT / 2][4], product[P::NT / 2][4];
#pragma unroll
        for (int j = 0; j < P::NT / 2; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                a[j][e] = p.sum[i][2 * j][e];
                b[j][e] = p.sum[i][2 * j + 1][e];
                product[j][e] = gelu(a[j][e]) * b[j][e];
            }
        const size_t at = size_t(row + i * 16) * features + col;
        const int rows = int(end - row) - i * 16, cols = int(features - col);
        store_strip(product, h + at, features, rows, cols);
        if (gate != nullptr) {
            store_strip(a, gate + at, features, rows, cols);
            store_strip(b, up + at, features, rows, cols);
        }
    }
}

// dW[m .., n ..] += dY^T X of `rows` rows: dY has `out` columns, its rows are ld elements apart, X [rows, in], dW [out, in] in f32,
// or in bf16, to which the sum in f32 is rounded.
template <typename P, typename W>
__device__ __forceinline__ void add_gradient(const bf16 *dy, const bf16 *x, W *dw, unsigned rows, unsigned m, unsigned out,
                                             unsigned ld, unsigned n, unsigned in, void *memory) {
    P p;
    p.multiply({dy + m, ld, int(out - m)}, {x + n, in, int(in - n)}, rows, memory);
    p.add(dw + size_t(m) * in + n, in, out - m, in - n);
}
