// Products with a weight W [out, in] (row-major bf16) and activations X [T, in]:
//
//     matmul_forward          Y [T, out]  = X W^T, of one to three weights that share X
//     matmul_low_rank_forward Y [T, out]  = X W^T + H B^T, where a low-rank adapter has such H [T, r] and B [out, r]
//     geglu_forward           H [T, F]    = gelu_tanh(X Wg^T) * (X Wu^T), and the two products where they are kept
//     matmul_backward_input   dX [T, in]  = sum over i <= 3 of dY_i W_i
//     matmul_backward_weight  dW [out, in] += dY^T X, f32 or (*_bf16_*) bf16, of which each element is rounded once
//
// All of them are the tile of tile.cuh with different layouts and epilogues. in and out are multiples of 8, T is any number. A
// result in bf16 is rounded once, from f32.
//
// | kernel | C[m, n] | A | B | k |
// |---|---|---|---|---|
// | forward | token, feature | X, ROWS | W, ROWS (geglu: INTERLEAVED, of Wg and Wu) | in |
// | low_rank_forward | token, feature | H, then X, ROWS | B, then W, ROWS | r, then in |
// | backward_input | token, in | dY, ROWS | W, COLUMNS | out, one weight after the other |
// | backward_weight | out, in | dY, COLUMNS | X, COLUMNS | T |
//
// Tokens are the rows (m) of C, because the two neighbours of a row of C that a thread holds are then neighbours in memory. Four
// lanes exchange such pairs for 16-byte vectors of a row, and no tile must be transposed through shared memory.
//
// **The same bits for any T.** An element is one chain over k (tile.cuh), and so the variants below differ in speed alone. The
// price is paid in decoding, where the chain cannot be cut into parts for several warps. An mma that waits for the one before
// it takes about 33 clocks on an A100 (published measurements): 34 thousand clocks, or 24 us, for the longest contraction of
// Gemma 2B (F = 16384), whose weights take 33 us to arrive.
//
// A gradient needs a fixed order, but it need not be the order of another product. Where the tiles are too few for a GPU, the
// chains of a gradient are cut into parts (.._part), whose f32 sums go through memory and are added in ascending order (.._sum).
// The cuts depend on the shape alone, so that all GPUs and tiles give the same bits. Movement: 8 bytes for each element and part.
//
// **Movement.** A tile reads (M + N) k 2 bytes for 2 M N k FLOPs: at 128 x 128, 64 FLOPs a byte from L2. For large T the limit
// is the tensor cores. For few tokens (decoding) it is the bytes of W; each is requested once, because one tile has all tokens,
// and X is requested by every tile, from L2: T / N of W's traffic. Variants, tokens x features:
//
// | tile | for | stages | shared memory |
// |---|---|---|---|
// | 32 x 16 | T <= 32 and very few features; only 2 warps, which read fewer bytes of shared memory twice | 12 of 64 | 72 KiB |
// | 32 x 32 | T <= 32 and few features: more blocks | 5 of 128 | 80 KiB |
// | 32 x 64 | T <= 32 | 4 of 64 | 48 KiB |
// | 64 x 32 | T <= 64 and few features | 4 of 128 | 96 KiB |
// | 64 x 64 | T <= 64; products whose 128 x 128 tiles would fill the multiprocessors unevenly | 3 of 64 | 48 KiB |
// | 128 x 128 | all other products: 4 warps with 64 x 64 each, two blocks for each multiprocessor | 2 of 64 | 64 KiB |

#include "products.cuh"

// ------------------------------------------------------------------------------------------------------------ forward

// One to three weights. The tiles of features are numbered through all weights; those of weight i begin at number first[i], which
// is ~0u if there is no such weight.
struct Weights {  // shared
    const bf16 *w[3];
    bf16 *y[3];
    unsigned out[3];
    unsigned first[3];
};
static_assert(sizeof(Weights) == 72);

// The weight that a block of a grid (tiles of tokens, tiles of features) multiplies with: its number, and what `Weights` says of it.
struct Weight {
    int number;
    const bf16 *w;
    bf16 *y;
    unsigned out, first;
};

// Selected, because an index would move `weights` to local memory.
__device__ __forceinline__ Weight weight_of_block(const Weights &weights) {
    Weight own = {0, weights.w[0], weights.y[0], weights.out[0], 0};
#pragma unroll
    for (int i = 1; i < 3; i++)
        if (blockIdx.y >= weights.first[i]) own = {i, weights.w[i], weights.y[i], weights.out[i], weights.first[i]};
    return own;
}

// Grid: (tiles of tokens, tiles of features). Neighbouring blocks have the same tile of features, so that W is read from memory
// once; X stays in L2.
template <typename P>
__device__ __forceinline__ void forward(const bf16 *x, const Weights &weights, unsigned tokens, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Weight own = weight_of_block(weights);
    store_product<P>(x, own.w, own.y, blockIdx.x * P::M, tokens, (blockIdx.y - own.first) * P::N, own.out, in, memory);
}

// Launched by cuda/matmul.rs: launch_forward; grid (T / M, features / N of all weights), P::THREADS threads.
#define FORWARD(TILE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::ROWS>::THREADS) matmul_forward_##TILE( \
        const bf16 *__restrict__ x, const Weights weights, unsigned tokens, unsigned in) {                               \
        forward<Tile##TILE<Layout::ROWS, Layout::ROWS>>(x, weights, tokens, in);                                         \
    }

FORWARD(32x16)
FORWARD(32x32)
FORWARD(32x64)
FORWARD(64x32)
FORWARD(64x64)
FORWARD(128x128)

// What low-rank adapters add to the product of weight i: H_i B_i^T, with H_i [T, rank] and B_i [out_i, rank]. h[i] is null if there
// is no such adapter.
struct LowRank {  // shared
    const bf16 *h[3];
    const bf16 *b[3];
    unsigned rank;
};
static_assert(sizeof(LowRank) == 56);

// Grid as in `forward`. The chain of an element begins with the adapter's.
template <typename P>
__device__ __forceinline__ void low_rank_forward(const bf16 *x, const Weights &weights, unsigned tokens, unsigned in,
                                                 const LowRank &low_rank) {
    extern __shared__ __align__(128) unsigned char memory[];
    const Weight own = weight_of_block(weights);
    const bf16 *h = low_rank.h[0], *b = low_rank.b[0];
#pragma unroll
    for (int i = 1; i < 3; i++) {
        if (own.number == i) {
            h = low_rank.h[i];
            b = low_rank.b[i];
        }
    }
    const unsigned m = blockIdx.x * P::M, n = (blockIdx.y - own.first) * P::N, rank = low_rank.rank;
    P p;
    if (h != nullptr)
        p.multiply({h + size_t(m) * rank, rank, int(tokens - m)}, {b + size_t(n) * rank, rank, int(own.out - n)}, rank, memory);
    p.multiply({x + size_t(m) * in, in, int(tokens - m)}, {own.w + size_t(n) * in, in, int(own.out - n)}, in, memory);
    p.store(own.y + size_t(m) * own.out + n, own.out, tokens - m, own.out - n);
}

// Launched by cuda/matmul.rs: launch_forward; grid (T / M, features / N of all weights), P::THREADS threads.
#define LOW_RANK_FORWARD(TILE)                                                                                          \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::ROWS>::THREADS)                       \
        matmul_low_rank_forward_##TILE(const bf16 *__restrict__ x, const Weights weights, unsigned tokens, unsigned in, \
                                       const LowRank low_rank) {                                                        \
        low_rank_forward<Tile##TILE<Layout::ROWS, Layout::ROWS>>(x, weights, tokens, in, low_rank);                     \
    }

LOW_RANK_FORWARD(32x16)
LOW_RANK_FORWARD(32x32)
LOW_RANK_FORWARD(32x64)
LOW_RANK_FORWARD(64x32)
LOW_RANK_FORWARD(64x64)
LOW_RANK_FORWARD(128x128)

// Grid as in `forward`, with N / 2 features for each tile.
template <typename P>
__device__ __forceinline__ void geglu(const bf16 *x, const bf16 *w_gate, const bf16 *w_up, bf16 *h, bf16 *gate,
                                      bf16 *up, unsigned tokens, unsigned features, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    store_geglu<P>(x, w_gate, w_up, h, gate, up, blockIdx.x * P::M, tokens, blockIdx.y * (P::N / 2), features, in, memory);
}

// Launched by cuda/geglu.rs: geglu_forward; grid (T / M, 2 F / N), P::THREADS threads.
#define GEGLU_FORWARD(TILE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::INTERLEAVED>::THREADS) geglu_forward_##TILE( \
        const bf16 *__restrict__ x, const bf16 *__restrict__ w_gate, const bf16 *__restrict__ w_up, bf16 *__restrict__ h,      \
        bf16 *__restrict__ gate, bf16 *__restrict__ up, unsigned tokens, unsigned features, unsigned in) {                     \
        geglu<Tile##TILE<Layout::ROWS, Layout::INTERLEAVED>>(x, w_gate, w_up, h, gate, up, tokens, features, in);              \
    }

GEGLU_FORWARD(32x64)
GEGLU_FORWARD(64x64)
GEGLU_FORWARD(128x128)

// ----------------------------------------------------------------------------------------------------------- backward

// Up to three terms dY_i W_i of a sum: dY_i [T, out_i], its rows ld_i elements apart, and W_i [out_i, in]. out_i is 0 if there is
// no such term. k counts through all terms.
struct Terms {  // shared
    const bf16 *dy[3];
    const bf16 *w[3];
    unsigned out[3];
    unsigned ld[3];
};
static_assert(sizeof(Terms) == 72);

// Adds to p the contraction over k = begin .. end - 1, for the tile at row m and column n of dX.
template <typename P>
__device__ __forceinline__ void contract(P &p, const Terms &terms, unsigned m, unsigned n, unsigned tokens, unsigned in,
                                         unsigned begin, unsigned end, void *memory) {
    // The loop is not unrolled, so that there is one copy of the code. It selects the operands instead of indexing `terms`,
    // because an index would move `terms` to local memory.
#pragma unroll 1
    for (int i = 0; i < 3; i++) {
        const bf16 *dy = i == 0 ? terms.dy[0] : i == 1 ? terms.dy[1] : terms.dy[2];
        const bf16 *w = i == 0 ? terms.w[0] : i == 1 ? terms.w[1] : terms.w[2];
        const unsigned out = i == 0 ? terms.out[0] : i == 1 ? terms.out[1] : terms.out[2];
        const unsigned ld = i == 0 ? terms.ld[0] : i == 1 ? terms.ld[1] : terms.ld[2];
        const unsigned from = min(begin, out), to = min(end, out);
        if (from < to)
            p.multiply({dy + size_t(m) * ld + from, ld, int(tokens - m)}, {w + size_t(from) * in + n, in, int(in - n)},
                       to - from, memory);
        begin -= from;
        end -= to;
    }
}

// Grid: (tiles of tokens, tiles of in).
template <typename P>
__device__ __forceinline__ void backward_input(const Terms &terms, bf16 *dx, unsigned tokens, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned m = blockIdx.x * P::M, n = blockIdx.y * P::N;
    P p;
    contract(p, terms, m, n, tokens, in, 0, ~0u, memory);
    p.store(dx + size_t(m) * in + n, in, tokens - m, in - n);
}

// Launched by cuda/matmul.rs: matmul_backward_input; grid (T / M, in / N), P::THREADS threads.
#define BACKWARD_INPUT(TILE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::COLUMNS>::THREADS)           \
        matmul_backward_input_##TILE(const Terms terms, bf16 *__restrict__ dx, unsigned tokens, unsigned in) { \
        backward_input<Tile##TILE<Layout::ROWS, Layout::COLUMNS>>(terms, dx, tokens, in);                      \
    }

BACKWARD_INPUT(64x64)
BACKWARD_INPUT(128x128)

// The same contraction in parts of `length`, a multiple of 64: partials [parts][T, in] in f32. The caller may pass k in several
// ranges, one for each launch, of which this one begins at k = `first`, a multiple of 16. A part that an earlier range began is
// continued, so that the ranges change no bit. Grid: (tiles of tokens, tiles of in, parts of which the range contains some k).
template <typename P>
__device__ __forceinline__ void backward_input_part(const Terms &terms, float *partials, unsigned tokens, unsigned in,
                                                    unsigned first, unsigned length) {
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned m = blockIdx.x * P::M, n = blockIdx.y * P::N;
    const unsigned part = first / length + blockIdx.z, begin = part * length;
    float *partial = partials + (size_t(part) * tokens + m) * in + n;
    P p;
    if (begin < first) p.load(partial, in, tokens - m, in - n);
    contract(p, terms, m, n, tokens, in, max(begin, first) - first, begin + length - first, memory);
    p.store(partial, in, tokens - m, in - n);
}

// Launched by cuda/matmul.rs: launch; grid (T / M, in / N, parts of the range), P::THREADS threads.
#define BACKWARD_INPUT_PART(TILE)                                                                                        \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::COLUMNS>::THREADS)                     \
        matmul_backward_input_part_##TILE(const Terms terms, float *__restrict__ partials, unsigned tokens, unsigned in, \
                                          unsigned first, unsigned length) {                                             \
        backward_input_part<Tile##TILE<Layout::ROWS, Layout::COLUMNS>>(terms, partials, tokens, in, first, length);      \
    }

BACKWARD_INPUT_PART(64x64)
BACKWARD_INPUT_PART(128x128)

// The sums over the parts, in ascending order, of four neighbouring elements from i on.
__device__ __forceinline__ float4 sum_parts(const float *partials, unsigned parts, size_t n, size_t i) {
    float4 sum = *reinterpret_cast<const float4 *>(partials + i);
#pragma unroll 4
    for (unsigned part = 1; part < parts; part++) {
        const float4 v = *reinterpret_cast<const float4 *>(partials + part * n + i);
        sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
    return sum;
}

// dX = the sum of its parts, rounded to bf16. n elements, a multiple of 8.
// Launched by cuda/matmul.rs: add_parts; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) matmul_backward_input_sum(
    const float *__restrict__ partials, bf16 *__restrict__ dx, unsigned parts, size_t n) {
    const size_t i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    if (i >= n) return;
    const float4 sum = sum_parts(partials, parts, n, i);
    *reinterpret_cast<uint2 *>(dx + i) = make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
}

// dW [out, in] += dY^T X: every element of dW is read and written once, by the block that has its sum over all tokens. The rows
// of dY are ld elements apart. Grid: (tiles of in, tiles of out).
template <typename P, typename W>
__device__ __forceinline__ void backward_weight(const bf16 *dy, const bf16 *x, W *dw, unsigned tokens, unsigned out,
                                                unsigned ld, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    add_gradient<P>(dy, x, dw, tokens, blockIdx.y * P::M, out, ld, blockIdx.x * P::N, in, memory);
}

// Launched by cuda/matmul.rs: add_backward_weight; grid (in / N, out / M), P::THREADS threads.
#define BACKWARD_WEIGHT(NAME, TILE, W)                                                                             \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::COLUMNS, Layout::COLUMNS>::THREADS)            \
        matmul_backward_weight_##NAME(const bf16 *__restrict__ dy, const bf16 *__restrict__ x, W *__restrict__ dw, \
                                      unsigned tokens, unsigned out, unsigned ld, unsigned in) {                   \
        backward_weight<Tile##TILE<Layout::COLUMNS, Layout::COLUMNS>>(dy, x, dw, tokens, out, ld, in);             \
    }

BACKWARD_WEIGHT(64x64, 64x64, float)
BACKWARD_WEIGHT(128x128, 128x128, float)
BACKWARD_WEIGHT(bf16_64x64, 64x64, bf16)
BACKWARD_WEIGHT(bf16_128x128, 128x128, bf16)

// The same contraction in parts of `length` tokens: partials [parts][out, in] in f32. Grid: (tiles of in, tiles of out,
// parts).
template <typename P>
__device__ __forceinline__ void backward_weight_part(const bf16 *dy, const bf16 *x, float *partials, unsigned tokens,
                                                     unsigned out, unsigned ld, unsigned in, unsigned length) {
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned m = blockIdx.y * P::M, n = blockIdx.x * P::N, begin = blockIdx.z * length;
    P p;
    p.multiply({dy + size_t(begin) * ld + m, ld, int(out - m)}, {x + size_t(begin) * in + n, in, int(in - n)},
               min(length, tokens - begin), memory);
    p.store(partials + (size_t(blockIdx.z) * out + m) * in + n, in, out - m, in - n);
}

// Launched by cuda/matmul.rs: matmul_backward_weight; grid (in / N, out / M, parts), P::THREADS threads.
#define BACKWARD_WEIGHT_PART(TILE)                                                                                                \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::COLUMNS, Layout::COLUMNS>::THREADS)                           \
        matmul_backward_weight_part_##TILE(const bf16 *__restrict__ dy, const bf16 *__restrict__ x, float *__restrict__ partials, \
                                           unsigned tokens, unsigned out, unsigned ld, unsigned in, unsigned length) {            \
        backward_weight_part<Tile##TILE<Layout::COLUMNS, Layout::COLUMNS>>(dy, x, partials, tokens, out, ld, in, length);         \
    }

BACKWARD_WEIGHT_PART(64x64)
BACKWARD_WEIGHT_PART(128x128)

// dW += the sum of its parts. n elements, a multiple of 8.
// Launched by cuda/matmul.rs: add_parts; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) matmul_backward_weight_sum(
    const float *__restrict__ partials, float *__restrict__ dw, unsigned parts, size_t n) {
    const size_t i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    if (i >= n) return;
    float4 *to = reinterpret_cast<float4 *>(dw + i);
    const float4 before = *to, sum = sum_parts(partials, parts, n, i);
    *to = make_float4(before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w);
}

// dW, in bf16, += the sum of its parts. n elements, a multiple of 8.
// Launched by cuda/matmul.rs: add_parts; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) matmul_backward_weight_sum_bf16(
    const float *__restrict__ partials, bf16 *__restrict__ dw, unsigned parts, size_t n) {
    const size_t i = (size_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    if (i >= n) return;
    uint2 *to = reinterpret_cast<uint2 *>(dw + i);
    const uint2 before = *to;
    const float4 sum = sum_parts(partials, parts, n, i);
    const float2 low = __bfloat1622float2(reinterpret_cast<const bf162 &>(before.x));
    const float2 high = __bfloat1622float2(reinterpret_cast<const bf162 &>(before.y));
    *to = make_uint2(pack_bf16(low.x + sum.x, low.y + sum.y), pack_bf16(high.x + sum.z, high.y + sum.w));
}
