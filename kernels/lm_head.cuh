// Shared by the LM head's kernels: the walk over tiles of logits, the soft-cap and temperature of a logit, and running
// log-sum-exps.
//
// A tile is TILE_V tokens (rows of the embedding matrix, mma's A) x ROWS hidden states (mma's B). A block walks the tiles of
// one CHUNK of the vocabulary with the pipeline of stages of tile.cuh, which is not drained between tiles: while the threads
// finish the logits of one tile, the copies of the next tile's first stages are in flight.
//
// **Bits.** A logit is one chain of m16n8k16 products in ascending k from zero. Everything computed from it depends on its
// token's position in its chunk and on its own row alone. Chunks are cut at constant tokens and merged in one order. A row's
// log-sum-exp and its tokens' log-probs therefore have the same bits in sampling and in training, whatever the other rows are.
#pragma once

#include "random.cuh"
#include "tile.cuh"

constexpr int TILE_V = 128;  // shared
constexpr int CHUNK = 512;   // shared
constexpr float INFINITE = __builtin_huge_valf();

// The tokens of a tile are permuted: line 16 i + 8 h + g of 64 holds token 8 g + 2 i + h. A lane has lines g of all 8 x 8
// matrices of a product, which are eight neighbouring tokens therefore: two blocks of Philox, and one 16-byte store of bf16.
// The permutation moves bits, and so token_of(a + b) = token_of(a) + token_of(b) for lines a and b without common bits.
__host__ __device__ constexpr unsigned token_of(unsigned line) {
    return (line & ~63u) | (line & 7) << 3 | (line >> 3 & 7);
}

// The product's operands: the embedding matrix [vocab, width] and x [rows, width]; width is a multiple of 8.
struct Operands {  // shared
    const bf16 *__restrict__ embedding;
    const bf16 *__restrict__ x;
    unsigned vocab, rows, width;
};
static_assert(sizeof(Operands) == 32);

// The tiles of a block of 2 WARPS warps: WARPS along the rows times two along the tokens, 64 tokens each. `sum` has the logits of
// the thread's eight tokens and 2 N columns.
template <int ROWS_, int WARPS_, int STAGES_>
struct Walk : Tile<TILE_V, ROWS_, 2, WARPS_, TILE_K, STAGES_, Layout::ROWS, Layout::ROWS> {
    using Tile = ::Tile<TILE_V, ROWS_, 2, WARPS_, TILE_K, STAGES_, Layout::ROWS, Layout::ROWS>;
    using Tile::sum, Tile::warp_column, Tile::THREADS;
    static constexpr int ROWS = ROWS_;
    static constexpr int COLUMNS = Tile::WN;  // of a warp; rows of x are columns of the product
    static constexpr int N = Tile::NT;

    __device__ __forceinline__ Walk() : Tile(Tile::UNSET) {}

    // The logit of the thread's token i in its column (n, j).
    __device__ __forceinline__ float &at(int n, int j, int i) { return sum[i / 2][n][i % 2 * 2 + j]; }
    // In the tile: the warp's half of the tokens, the thread's first token, the thread's columns.
    static __device__ __forceinline__ unsigned half() { return threadIdx.x / WARP % 2; }
    static __device__ __forceinline__ unsigned token() { return half() * 64 + threadIdx.x % WARP / 4 * 8; }
    static __device__ __forceinline__ unsigned column(int n, int j) {
        return warp_column() + n * 8 + threadIdx.x % 4 * 2 + j;
    }

    // For each column (n, j) of the thread whose row exists, calls f(n, j, address of the thread's eight tokens in that row of
    // `matrix` [rows, ld]). The tile begins at row row0 and, in the matrix, at column v0.
    template <typename T, typename F>
    __device__ __forceinline__ void each_vector(T *matrix, size_t ld, unsigned v0, unsigned row0, unsigned rows, F &&f) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned row = row0 + column(n, j);
                if (row < rows) f(n, j, matrix + row * ld + v0 + token());
            }
    }

    // Computes the logits of tokens begin .. end - 1 (begin is a multiple of TILE_V) x rows row0 .. row0 + ROWS - 1, tile by
    // tile, and calls visit(first token of the tile) with each tile's logits in `sum`. Operands of tokens and rows that do not
    // exist are zeros. Afterwards the block may use `memory` (SHARED bytes) for anything.
    template <typename Visit>
    __device__ __forceinline__ void tiles(const Operands &o, unsigned begin, unsigned end, unsigned row0, void *memory,
                                          Visit &&visit) {
        Copies source(o, begin, end, row0);
        typename Tile::Pipeline pipeline(source, memory);
        for (unsigned v0 = begin; v0 < end; v0 += TILE_V) {
            Tile::zero();
            pipeline.multiply(sum, source, o.width);
            visit(v0);
        }
        pipeline.finish();
    }

private:
    // The copies of the stages of all tiles, one tile after the other. Eight threads copy the eight vectors of a line: 128
    // contiguous bytes of a row.
    struct Copies {
        static constexpr unsigned LINES = THREADS / 8, COUNT_A = TILE_V / LINES, COUNT_B = ROWS / LINES;
        static constexpr int LINE_BYTES = TILE_K * int(sizeof(bf16));

        const unsigned width;
        const unsigned first_k, line, to;       // k, line and offset in bytes of the thread's first vector in a stage
        const bf16 *from_a, *const from_b;      // that vector in the matrices, in the next stage's tile at k = 0
        const size_t next_tile;                 // elements from tile to tile
        const int rows;                         // that exist from this thread's first on
        int tokens;                             // the same, in the next stage's tile
        unsigned k, left;                       // k of the next stage, and tiles from its tile on

        __device__ __forceinline__ Copies(const Operands &o, unsigned begin, unsigned end, unsigned row0)
            : width(o.width),
              first_k(threadIdx.x % 8 * VECTOR),
              line(threadIdx.x / 8),
              to(swizzled(line, threadIdx.x % 8) * sizeof(bf16)),
              from_a(o.embedding + size_t(begin + token_of(line)) * width + first_k),
              from_b(o.x + size_t(row0 + line) * width + first_k),
              next_tile(size_t(TILE_V) * width),
              rows(int(o.rows) - int(row0 + line)),
              tokens(int(min(o.vocab, end)) - int(begin + token_of(line))),
              k(0),
              left((end - begin + TILE_V - 1) / TILE_V) {}

        // Whether the thread's vectors of the next stage lie in a tile's rows. Copies of lines that do not exist write zeros.
        using Inside = bool;
        __device__ __forceinline__ bool inside() const { return left > 0 && k + first_k < width; }

        template <int part, int parts>
        __device__ __forceinline__ void copies(unsigned stage, bool inside) const {
            const int a = inside ? tokens : 0, b = inside ? rows : 0;
            unroll<COUNT_A>([&](auto i) {
                constexpr unsigned more = token_of(i.value * LINES);
                if (i.value % parts == part)
                    copy_async_at<i.value * LINES * LINE_BYTES>(stage + to, from_a + k + size_t(more) * width,
                                                                int(more) < a ? 16 : 0);
            });
            unroll<COUNT_B>([&](auto i) {
                constexpr unsigned more = i.value * LINES;
                if (i.value % parts == part)
                    copy_async_at<Tile::FeedA::BYTES + more * LINE_BYTES>(stage + to, from_b + k + size_t(more) * width,
                                                                          int(more) < b ? 16 : 0);
            });
        }

        __device__ __forceinline__ void next() {
            k += TILE_K;
            if (k >= width && left > 0) k = 0, left--, tokens -= TILE_V, from_a += next_tile;
        }
    };
};

// ------------------------------------------------------------------------------------------------------- of one logit

// The finished logit is softcap tanh(l / softcap) / temperature; softcap 0 means none. Divisions are products with reciprocals.
struct Head {  // shared
    float softcap, inverse_softcap, inverse_temperature;
};
static_assert(sizeof(Head) == 12);

// tanhf is used because tanh.approx has an error of 2^-11.
// Products and sums here and below name their rounding, because the compiler might otherwise fuse them in one kernel and not in
// another.
__device__ __forceinline__ float finish(float logit, const Head &head) {
    if (head.softcap > 0) logit = __fmul_rn(head.softcap, tanhf(__fmul_rn(logit, head.inverse_softcap)));
    return __fmul_rn(logit, head.inverse_temperature);
}

// e^x with a relative error of 2^-22, plus |x| 2^-24 from rounding x log2(e). It is the hardware's 2^x, which flushes subnormal
// results to zero; no sum here changes by them.
__device__ __forceinline__ float exponential(float x) { return exp2_approx(x * LOG2_E); }

// --------------------------------------------------------------------------------------------------- log-sum-exp

// A running log-sum-exp of some x: max is the largest x, sum the sum of e^(x - max). A NaN among the x makes `sum` NaN. If all x
// are -inf, it is (-inf, 0).
struct Sum {
    float max, sum;

    static __device__ __forceinline__ Sum none() { return {-INFINITE, 0}; }

    // The number to subtract from x, which is max unless max is -inf: e^(x - max) would be NaN if both were -inf.
    __device__ __forceinline__ float origin() const { return max == -INFINITE ? 0 : max; }
};

// The log-sum-exp of both. It commutes to the bit, so that in a butterfly all lanes get the same bits.
__device__ __forceinline__ Sum merge(const Sum &a, const Sum &b) {
    Sum c{fmaxf(a.max, b.max), 0};
    c.sum = __fadd_rn(__fmul_rn(a.sum, exponential(__fsub_rn(a.max, c.origin()))),
                      __fmul_rn(b.sum, exponential(__fsub_rn(b.max, c.origin()))));
    return c;
}

// Adds the eight logits that a thread has of a tile and a column. Each thread adds its eight terms first, and then their sum to
// its running sum, because a long tail of small terms added one by one to a sum near 1 would be rounded away.
__device__ __forceinline__ void add(Sum &s, const float (&x)[8]) {
    Sum tile{s.max, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) tile.max = fmaxf(tile.max, x[i]);
    const float origin = tile.origin();
    float e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = exponential(__fsub_rn(x[i], origin));
    tile.sum = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    s.sum = __fmaf_rn(s.sum, exponential(__fsub_rn(s.max, origin)), tile.sum);
    s.max = tile.max;
}

__device__ __forceinline__ Sum exchange(const Sum &s, int offset) {
    return {__shfl_xor_sync(ALL, s.max, offset), __shfl_xor_sync(ALL, s.sum, offset)};
}

// Merges the running log-sum-exps of the eight lanes that have a column's tokens.
__device__ __forceinline__ Sum over_lanes(Sum s) {
#pragma unroll
    for (int offset = 4; offset < int(WARP); offset *= 2) s = merge(s, exchange(s, offset));
    return s;
}

// The best token so far: the one with the highest score, and among equal scores the one with the lowest id.
struct Best {
    float score, logit;
    unsigned token;

    static __device__ __forceinline__ Best none() { return {-INFINITE, -INFINITE, 0}; }
};

__device__ __forceinline__ Best better(const Best &a, const Best &b) {
    return b.score > a.score || (b.score == a.score && b.token < a.token) ? b : a;
}

__device__ __forceinline__ Best exchange(const Best &a, int offset) {
    return {__shfl_xor_sync(ALL, a.score, offset), __shfl_xor_sync(ALL, a.logit, offset),
            __shfl_xor_sync(ALL, a.token, offset)};
}
