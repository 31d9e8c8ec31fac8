// What the LM head's kernels share: the walk over tiles of logits, what finishes a logit, and running log-sum-exps.
//
// Tiles are TILE_V tokens (the table's rows, mma's A) x ROWS hidden states (B). A block walks the tiles of one CHUNK of
// the vocabulary with one pipeline of copies, that of tile.cuh, but never drained in between: while a tile's logits are
// finished, the copies of the next tile's first stages fly.
//
// **Bits.** A logit is one chain of m16n8k16 products in ascending k from zero, and what becomes of it depends on its
// token's place in its chunk and on no other row. Chunks are cut at constant places and merged in one order. So a row's
// log-sum-exp, and its token's log-prob, have the same bits in sampling and in training, beside whatever other rows.
#pragma once

#include "random.cuh"
#include "tile.cuh"

constexpr int TILE_V = 128;
constexpr int CHUNK = 512;
constexpr float INFINITE = __builtin_huge_valf();

// Tokens lie permuted in a tile: line 16 i + 8 h + g of 64 holds token 8 g + 2 i + h. So a lane, which has lines g of
// all 8 x 8 matrices of a product, has eight neighbouring tokens: two blocks of Philox, and one 16-byte store of bf16.
// This permutes bits, so the token of a sum of lines without common bits is the sum of their tokens.
__host__ __device__ constexpr unsigned token_of(unsigned line) {
    return (line & ~63u) | (line & 7) << 3 | (line >> 3 & 7);
}

// The product's operands: table [vocab, width] and x [rows, width]; width a multiple of 8.
struct Operands {
    const bf16 *__restrict__ table;
    const bf16 *__restrict__ x;
    unsigned vocab, rows, width;
};

// WARPS warps along the rows times two along the tokens, 64 each.
template <int ROWS_, int WARPS_, int STAGES_>
struct Walk {
    static constexpr int ROWS = ROWS_, WARPS = WARPS_, STAGES = STAGES_;
    static constexpr int THREADS = 64 * WARPS;
    static constexpr int COLUMNS = ROWS / WARPS;  // of a warp; rows of x are columns of the product
    static constexpr int N = COLUMNS / 8;
    static constexpr int A_BYTES = TILE_V * TILE_K * int(sizeof(bf16));
    static constexpr int STAGE = A_BYTES + ROWS * TILE_K * int(sizeof(bf16));
    static constexpr int SHARED = STAGES * STAGE;
    static_assert(N % 2 == 0 && STAGES >= 2);

    // Logits of the thread's eight tokens and 2 N columns, in the layout of mma's c.
    float sum[4][N][4];

    // Of its token i in column (n, j).
    __device__ __forceinline__ float &at(int n, int j, int i) { return sum[i / 2][n][i % 2 * 2 + j]; }
    // The first of its tokens, and its columns, in the tile.
    static __device__ __forceinline__ unsigned half() { return threadIdx.x / WARP % 2; }
    static __device__ __forceinline__ unsigned token() { return half() * 64 + threadIdx.x % WARP / 4 * 8; }
    static __device__ __forceinline__ unsigned warp_column() { return threadIdx.x / WARP / 2 * COLUMNS; }
    static __device__ __forceinline__ unsigned column(int n, int j) {
        return warp_column() + n * 8 + threadIdx.x % 4 * 2 + j;
    }

    // Calls f(logits of the thread's eight tokens, where they lie in a matrix [rows, ld]) for each of its columns that is one
    // of `rows` rows from row0 on; its tokens from v0 on.
    template <typename T, typename F>
    __device__ __forceinline__ void each_piece(T *matrix, size_t ld, unsigned v0, unsigned row0, unsigned rows, F &&f) {
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned row = row0 + column(n, j);
                if (row < rows) f(n, j, matrix + row * ld + v0 + token());
            }
    }

    // Calls visit(first token) with the logits in `sum` for every tile of tokens begin .. end (begin a multiple of
    // TILE_V) x rows row0 .. row0 + ROWS, in order. What has no token or no row is a product with zeros. Afterwards
    // `memory` (SHARED bytes) is free.
    template <typename Visit>
    __device__ __forceinline__ void tiles(const Operands &o, unsigned begin, unsigned end, unsigned row0, void *memory,
                                          Visit &&visit) {
        // Eight threads copy a line's eight pieces: 128 contiguous bytes of a row.
        constexpr unsigned LINES = THREADS / 8, COUNT_A = TILE_V / LINES, COUNT_B = ROWS / LINES;
        constexpr int LINE_BYTES = TILE_K * int(sizeof(bf16));
        const unsigned piece = threadIdx.x % 8 * PIECE, line = threadIdx.x / 8;
        const unsigned shared = shared_address(memory);
        const unsigned to = swizzled(line, threadIdx.x % 8) * sizeof(bf16);
        const bf16 *from_a = o.table + size_t(begin + token_of(line)) * o.width + piece;
        const bf16 *from_b = o.x + size_t(row0 + line) * o.width + piece;
        const size_t next_tile = size_t(TILE_V) * o.width;
        const int rows = int(o.rows) - int(row0 + line);
        int tokens = int(min(o.vocab, end)) - int(begin + token_of(line));  // from this thread's first on
        unsigned k = 0, left = (end - begin + TILE_V - 1) / TILE_V;         // the stage to copy next, tiles from it on
        // The copies of part `part` of `parts`; those of lines that do not exist write zeros.
        auto copies = [&](int part, int parts, unsigned stage) {
            const bool inside = left > 0 && k + piece < o.width;
            const int a = inside ? tokens : 0, b = inside ? rows : 0;
            unroll<COUNT_A>([&](auto i) {
                constexpr unsigned more = token_of(i.value * LINES);
                if (i.value % parts == part)
                    copy_async_at<i.value * LINES * LINE_BYTES>(stage + to, from_a + k + size_t(more) * o.width,
                                                                int(more) < a ? 16 : 0);
            });
            unroll<COUNT_B>([&](auto i) {
                constexpr unsigned more = i.value * LINES;
                if (i.value % parts == part)
                    copy_async_at<A_BYTES + more * LINE_BYTES>(stage + to, from_b + k + size_t(more) * o.width,
                                                               int(more) < b ? 16 : 0);
            });
        };
        auto next = [&] {
            k += TILE_K;
            if (k >= o.width && left > 0) k = 0, left--, tokens -= TILE_V, from_a += next_tile;
        };
        auto advance = [&](unsigned stage) { return stage + STAGE == shared + SHARED ? shared : stage + STAGE; };

        unsigned write = shared, read = shared;
#pragma unroll
        for (int s = 0; s < STAGES - 1; s++) {
            copies(0, 1, write);
            copy_commit();
            next();
            write += STAGE;
        }
        using FragmentsA = Fragments<TILE_V, TILE_K, Layout::ROWS, false>;
        using FragmentsB = Fragments<ROWS, TILE_K, Layout::ROWS, true>;
        const FragmentsA fragments_a(half() * 64);
        const FragmentsB fragments_b(warp_column());
        for (unsigned v0 = begin; v0 < end; v0 += TILE_V) {
            zero();
            for (unsigned at = 0; at < o.width; at += TILE_K) {
                copy_wait<STAGES - 2>();
                // All threads' copies of this stage have arrived; and all warps have read the stage before it, which
                // the copies below overwrite.
                __syncthreads();
                unsigned address_a[4], address_b[4], x[2][4][4], y[2][N / 2][4];
                fragments_a.addresses(address_a, read);
                fragments_b.addresses(address_b, read + A_BYTES);
                auto load = [&](auto step) {
                    constexpr int s = step.value;
                    unroll<4>([&](auto i) { FragmentsA::template load<i.value, s>(x[s % 2][i.value], address_a); });
                    unroll<N / 2>([&](auto j) { FragmentsB::template load<j.value, s>(y[s % 2][j.value], address_b); });
                };
                load(Int<0>{});
                unroll<TILE_K / 16>([&](auto step) {
                    constexpr int s = step.value, STEPS = TILE_K / 16;
                    // The fragments of the next step come while this one's are multiplied; and copies, early, so that
                    // they have the other steps to arrive in where STAGES is 2.
                    if constexpr (s + 1 < STEPS) load(Int<s + 1>{});
                    if constexpr (s < STEPS / 2) copies(s, STEPS / 2, write);
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int n = 0; n < N; n++)
                            mma(sum[i][n], x[s % 2][i], y[s % 2][n / 2][n % 2 * 2], y[s % 2][n / 2][n % 2 * 2 + 1]);
                });
                copy_commit();
                next();
                read = advance(read);
                write = advance(write);
            }
            visit(v0);
        }
        // The last stages' copies read nothing, but write zeros.
        copy_wait<0>();
        // Nobody reads or copies any more: the memory is free.
        __syncthreads();
    }

private:
    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) sum[i][n][c] = 0;
    }
};

// ------------------------------------------------------------------------------------------------------- of one logit

// softcap tanh(l / softcap), then / temperature; softcap 0 is none. Divisions are products with reciprocals.
struct Head {
    float softcap, inverse_softcap, inverse_temperature;
};

// tanhf, not tanh.approx, which is exact to 2^-11 only.
// Products and sums here and below are explicit: fused or not as the compiler likes, they might differ by kernel.
__device__ __forceinline__ float finish(float logit, const Head &head) {
    if (head.softcap > 0) logit = __fmul_rn(head.softcap, tanhf(__fmul_rn(logit, head.inverse_softcap)));
    return __fmul_rn(logit, head.inverse_temperature);
}

// e^x within 2^-22 and what rounding x log2(e) costs: |x| 2^-24. The hardware's 2^x, without the steps that make it
// exact for subnormal results, which no sum here can feel.
__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}

// --------------------------------------------------------------------------------------------------- log-sum-exp

// sum of e^(x - max) over some x: what log-sum-exps are merged from. NaN stays in `sum`; only -inf: (-inf, 0).
struct Sum {
    float max, sum;

    static __device__ __forceinline__ Sum none() { return {-INFINITE, 0}; }

    // e^(x - max) must not be NaN where both are -inf.
    __device__ __forceinline__ float origin() const { return max == -INFINITE ? 0 : max; }
};

// Exactly commutative, so that in a butterfly all lanes get the same bits.
__device__ __forceinline__ Sum merge(const Sum &a, const Sum &b) {
    Sum c{fmaxf(a.max, b.max), 0};
    c.sum = __fadd_rn(__fmul_rn(a.sum, exponential(__fsub_rn(a.max, c.origin()))),
                      __fmul_rn(b.sum, exponential(__fsub_rn(b.max, c.origin()))));
    return c;
}

// Adds the eight logits that a thread has of a tile. Their own sum first, and sums by thread: added one by one to a sum
// near 1, a long tail would be rounded away.
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

// Over the eight lanes that have a column's tokens.
__device__ __forceinline__ Sum over_lanes(Sum s) {
#pragma unroll
    for (int offset = 4; offset < int(WARP); offset *= 2) s = merge(s, exchange(s, offset));
    return s;
}

// The best token: highest score, lowest token among equals.
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
