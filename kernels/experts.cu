// A mixture of experts: a token t goes to those G of E MLPs for which it has the largest scores. Its g-th choice is route t G + g,
// and the routes of an expert, in the order of tokens, are the expert's rows.
//
//   route_forward                   e[t, g], share[t, g], weight[t, g]            scores [T, E]
//   route_order                     first, order, rows: the routes in the order of experts
//   experts_dispatch                X' [T G, D]: x[t] in each row of t
//   experts_geglu_forward           H [T G, Fe] = gelu_tanh(X' Wg^T) * (X' Wu^T), and the two products where they are kept
//   experts_matmul_forward          Y' [T G, D] = H Wd^T
//   experts_combine                 y[t] = sum over g of weight[t, g] y'[row of the route], in f32, rounded once
//
// and backward, with dY' the dispatched dy, of which each row is yet to meet the weight of its route:
//
//   experts_matmul_backward_input   dH = dY' Wd,  dX' = dGU [Wg; Wu]
//   experts_geglu_backward          d_weight = dh . h,  weight h,  and dGU [T G, 2 Fe], the gradients of gate and up, from weight dh
//   experts_matmul_backward_weight  dWd += dY'^T (weight H),  d[Wg; Wu] += dGU^T X', of each expert's rows
//   experts_combine                 dx, the sum over g of dx', without weights
//   route_backward                  d_scores from d_weight;  d_factors += d_weight share, over each expert's rows
//
// Weights are piles, one expert's on another's: Wg and Wu [E, 2 Fe, D], Wd [E, D, Fe]. Since Wg and Wu of an expert lie together, dX'
// is one product over k = 2 Fe.
//
// **The host knows nothing of routes.** A decode step is recorded once and replayed, and so grids depend on T, G and E alone.
// Products have as many blocks as experts could fill tiles at the worst, and each looks up what it has to do (`place`). Surplus
// blocks end at once.
//
// **The same bits for any T.** A row meets the weights of its expert in a chain of products over all of k (tile.cuh), whatever
// else is in its tile, and its token adds its rows up in the order of g. Sums over an expert's rows go in the order of tokens.
//
// **Movement.** Decoding reads the weights of each expert that has a row, once: 32 tokens of Gemma 4 26B-A4B go to some 110 of 128
// experts, 1.3 GB a layer. In training the blocks of an expert are neighbours, its tiles of rows fastest: its weights come from
// memory once, and its rows, a few MB, stay in L2.

#include "gelu.cuh"
#include "products.cuh"

// A lane holds a vector of scores, and one of a token's choices.
constexpr unsigned MAX_EXPERTS = 256;  // shared
constexpr unsigned MAX_TOP = 32;  // shared
static_assert(MAX_EXPERTS == 8 * WARP && MAX_TOP == WARP);
// Rows for which a block has a warp each.
constexpr unsigned WARPS = 4;  // shared

// ------------------------------------------------------------------------------------------------------------- routes

// The bits of a bf16 as an unsigned number that is greater for greater values. Zeros of both signs are equals, and a NaN is greater
// than all other numbers, or less if it is negative.
__device__ __forceinline__ unsigned ascending(unsigned bits) {
    if (bits == 0x8000u) return 0x8000u;
    return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}

// Its inverse, in f32.
__device__ __forceinline__ float value_of(unsigned ascending) {
    return __uint_as_float((ascending & 0x8000u ? ascending & 0x7fffu : ~ascending & 0xffffu) << 16);
}

// A warp for each token. A round finds the largest key, of which there is one: a score in its upper half and, below that, what is
// the larger the lower the expert's number is. Lane g holds the expert of round g. scores [T, count], factors [count].
// Launched by cuda/experts.rs: route_forward; grid (T / 4), 128 threads.
extern "C" __global__ void __launch_bounds__(128) route_forward(
    const bf16 *__restrict__ scores, const bf16 *__restrict__ factors, unsigned *__restrict__ experts,
    float *__restrict__ shares, float *__restrict__ weights, unsigned tokens, unsigned count, unsigned top, float scale) {
    const unsigned lane = threadIdx.x % WARP, t = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (t >= tokens) return;
    // 0: no expert, or one that is chosen.
    unsigned keys[8] = {}, best = 0, chosen = 0;
    if (lane < count / 8) {
        const uint4 v = reinterpret_cast<const uint4 *>(scores + size_t(t) * count)[lane];
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const unsigned bits = j % 2 == 0 ? words[j / 2] & 0xffffu : words[j / 2] >> 16;
            keys[j] = ascending(bits) << 16 | (0xffffu - (8 * lane + j));
            best = max(best, keys[j]);
        }
    }
    for (unsigned g = 0; g < top; g++) {
        const unsigned largest = __reduce_max_sync(ALL, best);
        if (lane == g) chosen = largest;
        if (best != largest) continue;
        best = 0;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (keys[j] == largest) keys[j] = 0;
            best = max(best, keys[j]);
        }
    }
    const float score = value_of(chosen >> 16), largest = __shfl_sync(ALL, score, 0);
    const float part = lane < top ? expf(scale * (score - largest)) : 0.0f;
    const float share = part / warp_sum(part);
    if (lane >= top) return;
    const unsigned expert = 0xffffu - (chosen & 0xffffu), route = t * top + lane;
    experts[route] = expert;
    shares[route] = share;
    weights[route] = share * __bfloat162float(factors[expert]);
}

// The rows of expert e are first[e] .. first[e + 1] - 1; row r is route order[r], and route i is row rows[i]. A block finds the rows
// of one expert: it counts the routes of the experts before it, and its own in the part of each warp, and then each warp numbers
// its own. The barrier is the only meeting of warps: no order of theirs changes a number.
// Launched by cuda/experts.rs: route_forward; grid (E), 32 to 512 threads.
extern "C" __global__ void __launch_bounds__(512) route_order(
    const unsigned *__restrict__ experts, unsigned *__restrict__ first, unsigned *__restrict__ order,
    unsigned *__restrict__ rows, unsigned routes) {
    __shared__ unsigned before[WARP], own[WARP];
    const unsigned expert = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const unsigned warps = blockDim.x / WARP;
    // The warp's routes.
    const unsigned length = (routes + blockDim.x - 1) / blockDim.x * WARP;
    const unsigned begin = min(warp * length, routes), end = min(begin + length, routes);
    unsigned less = 0, equal = 0;
#pragma unroll 4
    for (unsigned i = begin + lane; i < end; i += WARP) {
        const unsigned e = experts[i];
        less += e < expert;
        equal += e == expert;
    }
    less = __reduce_add_sync(ALL, less);
    equal = __reduce_add_sync(ALL, equal);
    if (lane == 0) {
        before[warp] = less;
        own[warp] = equal;
    }
    // Barrier: all warps' counts are written.
    __syncthreads();
    const unsigned start = __reduce_add_sync(ALL, lane < warps ? before[lane] : 0);
    unsigned row = start + __reduce_add_sync(ALL, lane < warp ? own[lane] : 0);
    if (threadIdx.x == 0) {
        first[expert] = start;
        if (expert == gridDim.x - 1) first[gridDim.x] = routes;
    }
#pragma unroll 4
    for (unsigned i = begin; i < end; i += WARP) {
        const bool mine = i + lane < end && experts[i + lane] == expert;
        const unsigned all = __ballot_sync(ALL, mine);
        if (mine) {
            const unsigned to = row + __popc(all & ((1u << lane) - 1));
            order[to] = i + lane;
            rows[i + lane] = to;
        }
        row += __popc(all);
    }
}

// d_scores [T, count]: with d = d_weight factor, d_score = scale share (d - sum over g of share d), and 0 of experts that the token
// does not go to. A warp for each token, a lane for each of its choices; then a lane for each vector of experts.
// Launched by cuda/experts.rs: route_backward; grid (T / 4), 128 threads.
extern "C" __global__ void __launch_bounds__(128) route_backward(
    const float *__restrict__ d_weights, const unsigned *__restrict__ experts, const float *__restrict__ shares,
    const bf16 *__restrict__ factors, bf16 *__restrict__ d_scores, unsigned tokens, unsigned count, unsigned top,
    float scale) {
    const unsigned lane = threadIdx.x % WARP, t = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (t >= tokens) return;
    unsigned expert = 0;
    float share = 0.0f, d_share = 0.0f;
    if (lane < top) {
        const unsigned route = t * top + lane;
        expert = experts[route];
        share = shares[route];
        d_share = d_weights[route] * __bfloat162float(factors[expert]);
    }
    const float d_score = scale * share * (d_share - warp_sum(share * d_share));
    float x[8] = {};
    for (unsigned g = 0; g < top; g++) {
        const unsigned of = __shfl_sync(ALL, expert, g) - 8 * lane;
        const float d = __shfl_sync(ALL, d_score, g);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (of == j) x[j] = d;
    }
    if (lane < count / 8) store8(d_scores + size_t(t) * count, lane, narrow(x));
}

// d_factors [count] += the sum over each expert's rows of d_weight share. A warp for each expert: lane l adds rows l, l + 32, ...,
// and the lanes are added by a butterfly.
// Launched by cuda/experts.rs: route_backward; grid (E / 4), 128 threads.
extern "C" __global__ void __launch_bounds__(128) route_backward_factors(
    const float *__restrict__ d_weights, const float *__restrict__ shares, const unsigned *__restrict__ first,
    const unsigned *__restrict__ order, float *__restrict__ d_factors, unsigned count) {
    const unsigned lane = threadIdx.x % WARP, expert = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (expert >= count) return;
    const unsigned end = first[expert + 1];
    float sum = 0.0f;
#pragma unroll 4
    for (unsigned i = first[expert] + lane; i < end; i += WARP) {
        const unsigned route = order[i];
        sum = fmaf(d_weights[route], shares[route], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) d_factors[expert] += sum;
}

// ------------------------------------------------------------------------------------- from tokens to rows, and back

// to[rows[t G + g]] = x[t]: a block reads a token once and writes its G rows. x [T, cols], to [T G, cols].
// Launched by cuda/experts.rs: dispatch; grid (T), 32 to 512 threads.
extern "C" __global__ void __launch_bounds__(512) experts_dispatch(
    const bf16 *__restrict__ x, const unsigned *__restrict__ rows, bf16 *__restrict__ to, unsigned top, unsigned cols) {
    const unsigned vectors = cols / 8, *own = rows + size_t(blockIdx.x) * top;
    for (unsigned i = threadIdx.x; i < vectors; i += blockDim.x) {
        const bf16x8 v = load8(x, size_t(blockIdx.x) * vectors + i);
#pragma unroll 4
        for (unsigned g = 0; g < top; g++) store8(to, size_t(own[g]) * vectors + i, v);
    }
}

// y[t] = sum over g of weight[t, g] x[rows[t G + g]], in the order of g; weights are null if they are 1. x [T G, cols], y [T, cols].
// Launched by cuda/experts.rs: combine; grid (T), 32 to 512 threads.
extern "C" __global__ void __launch_bounds__(512) experts_combine(
    const bf16 *__restrict__ x, const unsigned *__restrict__ rows, const float *__restrict__ weights,
    bf16 *__restrict__ y, unsigned top, unsigned cols) {
    const unsigned vectors = cols / 8;
    const size_t first = size_t(blockIdx.x) * top;
    for (unsigned i = threadIdx.x; i < vectors; i += blockDim.x) {
        float sum[8] = {};
#pragma unroll 4
        for (unsigned g = 0; g < top; g++) {
            const float weight = weights == nullptr ? 1.0f : weights[first + g];
            float value[8];
            widen(load8(x, size_t(rows[first + g]) * vectors + i), value);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] = fmaf(weight, value[j], sum[j]);
        }
        store8(y, size_t(blockIdx.x) * vectors + i, narrow(sum));
    }
}

// ----------------------------------------------------------------------------------------------------------- products

// What a block of a product computes: the tile from row `row` of an expert on, whose rows end before `end`, and tile `column` of
// columns.
struct Place {
    unsigned expert, row, end, column;
};

// The tiles of all experts are numbered one expert after the other, and within an expert one tile of columns after the other, so
// that neighbouring blocks have the same weights. Returns whether there is a tile of the block's number. A lane counts the tiles of
// rows of eight experts, and each warp finds the place by itself.
template <int M>
__device__ __forceinline__ bool place(const unsigned *first, unsigned experts, unsigned columns, Place &found) {
    const unsigned lane = threadIdx.x % WARP, tile = blockIdx.x / columns;
    unsigned row[9] = {};  // first rows of the lane's experts and of the next
    if (lane < experts / 8) {
        const uint4 *vectors = reinterpret_cast<const uint4 *>(first) + 2 * lane, a = vectors[0], b = vectors[1];
        row[0] = a.x, row[1] = a.y, row[2] = a.z, row[3] = a.w;
        row[4] = b.x, row[5] = b.y, row[6] = b.z, row[7] = b.w;
        row[8] = first[8 * lane + 8];
    }
    unsigned tiles = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) tiles += (row[j + 1] - row[j] + M - 1) / M;
    unsigned end = tiles;
#pragma unroll
    for (unsigned offset = 1; offset < WARP; offset *= 2) {
        const unsigned before = __shfl_up_sync(ALL, end, offset);
        if (lane >= offset) end += before;
    }
    const unsigned after = __ballot_sync(ALL, tile < end);
    if (after == 0) return false;
    // In the first lane that the tile does not lie behind, `begin` passes it at the tile's expert.
    unsigned begin = end - tiles, expert = 0, from = 0, to = 0, of_expert = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        if (begin <= tile) {
            expert = 8 * lane + j;
            from = row[j];
            to = row[j + 1];
            of_expert = begin;
        }
        begin += (row[j + 1] - row[j] + M - 1) / M;
    }
    const unsigned owner = __ffs(after) - 1;
    found.expert = __shfl_sync(ALL, expert, owner);
    from = __shfl_sync(ALL, from, owner);
    found.end = __shfl_sync(ALL, to, owner);
    const unsigned number = blockIdx.x - __shfl_sync(ALL, of_expert, owner) * columns;
    const unsigned count = (found.end - from + M - 1) / M;
    found.row = from + number % count * M;
    found.column = number / count;
    return true;
}

// Tiles of `size` columns that `columns` are.
__device__ __forceinline__ unsigned tiles_of(unsigned columns, unsigned size) { return (columns + size - 1) / size; }

// x [T G, in], w_gate_up [E, 2 features, in]; h, gate and up [T G, features], the last two null if they are not kept.
template <typename P>
__device__ __forceinline__ void geglu(const bf16 *x, const bf16 *w_gate_up, bf16 *h, bf16 *gate, bf16 *up,
                                      const unsigned *first, unsigned experts, unsigned features, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    Place at;
    if (!place<P::M>(first, experts, tiles_of(2 * features, P::N), at)) return;
    const bf16 *w = w_gate_up + size_t(at.expert) * 2 * features * in;
    store_geglu<P>(x, w, w + size_t(features) * in, h, gate, up, at.row, at.end, at.column * (P::N / 2), features, in, memory);
}

// Launched by cuda/experts.rs: geglu_forward; grid (tiles of rows, at most, times 2 Fe / N), P::THREADS threads.
#define GEGLU_FORWARD(TILE)                                                                                                \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::INTERLEAVED>::THREADS)                   \
        experts_geglu_forward_##TILE(const bf16 *__restrict__ x, const bf16 *__restrict__ w_gate_up, bf16 *__restrict__ h, \
                                     bf16 *__restrict__ gate, bf16 *__restrict__ up, const unsigned *__restrict__ first,   \
                                     unsigned experts, unsigned features, unsigned in) {                                   \
        geglu<Tile##TILE<Layout::ROWS, Layout::INTERLEAVED>>(x, w_gate_up, h, gate, up, first, experts, features, in);     \
    }

GEGLU_FORWARD(32x64)
GEGLU_FORWARD(64x64)
GEGLU_FORWARD(128x128)

// x [T G, in], w [E, out, in], y [T G, out].
template <typename P>
__device__ __forceinline__ void forward(const bf16 *x, const bf16 *w, bf16 *y, const unsigned *first, unsigned experts,
                                        unsigned out, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    Place at;
    if (!place<P::M>(first, experts, tiles_of(out, P::N), at)) return;
    store_product<P>(x, w + size_t(at.expert) * out * in, y, at.row, at.end, at.column * P::N, out, in, memory);
}

// Launched by cuda/experts.rs: matmul_forward; grid (tiles of rows, at most, times D / N), P::THREADS threads.
#define FORWARD(TILE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::ROWS>::THREADS)                        \
        experts_matmul_forward_##TILE(const bf16 *__restrict__ x, const bf16 *__restrict__ w, bf16 *__restrict__ y,      \
                                      const unsigned *__restrict__ first, unsigned experts, unsigned out, unsigned in) { \
        forward<Tile##TILE<Layout::ROWS, Layout::ROWS>>(x, w, y, first, experts, out, in);                               \
    }

FORWARD(32x64)
FORWARD(64x64)
FORWARD(128x128)

// dX [T G, in] = dY W: dY [T G, out], W [E, out, in].
template <typename P>
__device__ __forceinline__ void backward_input(const bf16 *dy, const bf16 *w, bf16 *dx, const unsigned *first,
                                               unsigned experts, unsigned out, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    Place at;
    if (!place<P::M>(first, experts, tiles_of(in, P::N), at)) return;
    const unsigned n = at.column * P::N;
    P p;
    p.multiply({dy + size_t(at.row) * out, out, int(at.end - at.row)},
               {w + size_t(at.expert) * out * in + n, in, int(in - n)}, out, memory);
    p.store(dx + size_t(at.row) * in + n, in, at.end - at.row, in - n);
}

// Launched by cuda/experts.rs: matmul_backward_input; grid (tiles of rows, at most, times in / N), P::THREADS threads.
#define BACKWARD_INPUT(TILE)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::ROWS, Layout::COLUMNS>::THREADS)                         \
        experts_matmul_backward_input_##TILE(const bf16 *__restrict__ dy, const bf16 *__restrict__ w, bf16 *__restrict__ dx, \
                                             const unsigned *__restrict__ first, unsigned experts, unsigned out,             \
                                             unsigned in) {                                                                  \
        backward_input<Tile##TILE<Layout::ROWS, Layout::COLUMNS>>(dy, w, dx, first, experts, out, in);                       \
    }

BACKWARD_INPUT(64x64)
BACKWARD_INPUT(128x128)

// dW [E, out, in] += dY^T X of each expert's rows: dY [T G, out], X [T G, in]. What no row of an expert adds to stays as it is. Grid:
// (tiles of in, tiles of out, experts).
template <typename P, typename W>
__device__ __forceinline__ void backward_weight(const bf16 *dy, const bf16 *x, W *dw, const unsigned *first,
                                                unsigned out, unsigned in) {
    extern __shared__ __align__(128) unsigned char memory[];
    const unsigned expert = blockIdx.z, begin = first[expert], rows = first[expert + 1] - begin;
    if (rows == 0) return;
    add_gradient<P>(dy + size_t(begin) * out, x + size_t(begin) * in, dw + size_t(expert) * out * in, rows,
                    blockIdx.y * P::M, out, out, blockIdx.x * P::N, in, memory);
}

// Launched by cuda/experts.rs: matmul_backward_weight; grid (in / N, out / M, E), P::THREADS threads.
#define BACKWARD_WEIGHT(NAME, TILE, W)                                                                                     \
    extern "C" __global__ void __launch_bounds__(Tile##TILE<Layout::COLUMNS, Layout::COLUMNS>::THREADS)                    \
        experts_matmul_backward_weight_##NAME(const bf16 *__restrict__ dy, const bf16 *__restrict__ x, W *__restrict__ dw, \
                                              const unsigned *__restrict__ first, unsigned out, unsigned in) {             \
        backward_weight<Tile##TILE<Layout::COLUMNS, Layout::COLUMNS>>(dy, x, dw, first, out, in);                          \
    }

BACKWARD_WEIGHT(64x64, 64x64, float)
BACKWARD_WEIGHT(128x128, 128x128, float)
BACKWARD_WEIGHT(bf16_64x64, 64x64, bf16)
BACKWARD_WEIGHT(bf16_128x128, 128x128, bf16)

// A warp for each row. With w the weight of its route: d_weight = dh . h, weighted = w h, and the gradients of gate and up from
// w dh. dh, gate, up, h and weighted [T G, features], d_gate_up [T G, 2 features]; weights and d_weights by route.
// Launched by cuda/experts.rs: geglu_backward; grid (T G / 4), 128 threads.
extern "C" __global__ void __launch_bounds__(128) experts_geglu_backward(
    const bf16 *__restrict__ dh, const bf16 *__restrict__ gate, const bf16 *__restrict__ up, const bf16 *__restrict__ h,
    const unsigned *__restrict__ order, const float *__restrict__ weights, bf16 *__restrict__ weighted,
    bf16 *__restrict__ d_gate_up, float *__restrict__ d_weights, unsigned rows, unsigned features) {
    const unsigned lane = threadIdx.x % WARP, row = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const unsigned vectors = features / 8, route = order[row];
    const float weight = weights[route];
    float dot = 0.0f;
    for (unsigned i = lane; i < vectors; i += WARP) {
        const size_t at = size_t(row) * vectors + i;
        float d[8], x[8], u[8], product[8], out_gate[8], out_up[8];
        widen(load8(dh, at), d);
        widen(load8(gate, at), x);
        widen(load8(up, at), u);
        widen(load8(h, at), product);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            dot = fmaf(d[j], product[j], dot);
            d[j] *= weight;
            product[j] *= weight;
        }
        backward_of(d, x, u, out_gate, out_up);
        store8(weighted, at, narrow(product));
        store8(d_gate_up, at + size_t(row) * vectors, narrow(out_gate));
        store8(d_gate_up, at + size_t(row + 1) * vectors, narrow(out_up));
    }
    dot = warp_sum(dot);
    if (lane == 0) d_weights[route] = dot;
}
