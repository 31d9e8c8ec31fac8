// The gradient of segment attention. Formula and shapes: `attention_backward` of src/backend/mod.rs.
//
// With s = scale q.k, cap(s) = c tanh(s / c) (or s), P = exp(cap(s) - lse) where the query sees the key and 0
// elsewhere, and per query and head D = dO.O (the sum over its keys of P dP, Dao 2023):
//     dP = dO V^T     dS = P (dP - D) cap'     dV = P^T dO     dK = scale dS^T Q     dQ = scale dS K
// P is computed again from q, k and lse: nothing of size queries x keys is ever in memory.
//
// The G = H / K heads of a group are rows of one matrix: a *pair* is (query token, head of the group), pair p being
// head p % G of token p / G. So K and V are read once for all heads, and the products are as large for any G. A query
// sees a key iff 0 <= pos_q - pos_k < window; that they are of one chain of segments is what the work lists say (made
// on the host, see src/backend/cuda/attention_backward.rs): tiles that nobody sees are not in them.
//
// Three passes without atomics, every sum in a fixed order:
//   1. attention_backward_stats: per (row, head) the floats (lse log2(e), D).
//   2. attention_backward_keys: a block per (64 keys of a segment, kv head, piece of the pairs that see them) makes dK
//      and dV. A prompt is seen by all responses: the list of its pairs is cut into pieces so that the GPU is filled;
//      partial sums go to memory in f32, and attention_backward_sum adds them in order.
//   3. attention_backward_queries: a block per (64 pairs of a segment, kv head) makes dQ, keys in order of position.
//
// What limits it. A product is 2 Dh FLOPs per (pair, key). Pass 2 makes four, pass 3 three: seven instead of five,
// since S and dP are made twice. To make dQ in pass 2 would take atomics, or sums over key tiles in memory: f32
// traffic of T H Dh for every 64 keys. Traffic: pass 2 reads 32 pairs of Q and dO, 128 Dh bytes, for 4 x 2 x 64 x 32 x
// Dh FLOPs: 128 FLOPs a byte; pass 3 reads 32 keys of K and V, 128 Dh bytes, for 3 x 2 x 64 x 32 x Dh: 96. Nearly all
// of it comes from the second-level cache, since the blocks of a segment read the same rows at about the same time. So
// tensor cores limit both, if shared memory does not: mma.m16n8k16 takes 2 clocks of an SM (A100), a ldmatrix of four
// matrices 4, so that one must feed two. Hence:
// - what stays (K, V in pass 2; Q, dO in pass 3) is loaded once, into registers, as operands of mma;
// - what streams (tiles of 32 rows of Q, dO; of K, V) is double-buffered in shared memory, and every ldmatrix of it
//   feeds two mma. At Dh = 256 that takes 64 KiB and all registers: one block of 8 warps per SM.
// On the diagonal, and at a window's end, a warp leaves out products of 16 x 16 or more that nobody sees.

#include "mma.cuh"

namespace {

constexpr unsigned THREADS = 256;
// Keys of a block of pass 2, pairs of a block of pass 3: 16 for each of four pairs of warps.
constexpr int STAY = 64;
// Rows of the tiles that stream.
constexpr int STREAM = 32;
constexpr float LOG2_E = 1.4426950408889634f;

// A piece of pass 2. 32 bytes.
struct KeyItem {
    unsigned row, position, keys;  // the tile: rows row.. of k and v at positions position.., `keys` of them
    unsigned first, offset, pairs; // pair p is pair offset + p of the tokens whose rows are tokens[first..]
    unsigned slot;                 // where partial sums go; ~0: there is one piece, and it writes the result
    unsigned unused;
};

// A tile of pass 3. 32 bytes.
struct QueryItem {
    unsigned row, position;    // the first pair's token
    unsigned offset, pairs;    // pair p is pair offset + p of the tokens at row..; offset < G
    unsigned first, keys;      // positions first..first + keys are seen by one of them or more
    unsigned chain;            // where chains[] says which rows these are
    unsigned unused;
};

// Positions begin.. lie at rows position + shift (modulo 2^32), up to the next entry's; a chain ends with begin = ~0.
struct ChainItem {
    unsigned begin, shift;
};

// The tile whose partial sums lie at slots slot..slot + pieces.
struct SumItem {
    unsigned row, keys, slot, pieces;
};

// How a dot product becomes P. `inner` and `cap` contain log2(e) (see the launcher).
struct Scores {
    float scale;     // on q.k
    float inner;     // on q.k in the exponent of 2: that of P, or that of e^2x in tanh(x)
    float cap;       // c log2(e); 0: none
    unsigned window; // 2^31: none
};

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// P of a dot product, and P cap'. tanh(x) = 1 - 2 / (1 + e^2x): off by some 2^-22 of 1, not of tanh(x): what a score,
// c tanh, needs, and 2^11 times better than tanh.approx.
__device__ __forceinline__ float probability(float dot, float lse, bool visible, const Scores &scores, float &slope) {
    float p;
    if (scores.cap == 0.0f) {
        p = exp2_fast(fmaf(dot, scores.inner, -lse));
        p = visible ? p : 0.0f;
        slope = p;
    } else {
        const float t = 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(dot * scores.inner));
        p = exp2_fast(fmaf(t, scores.cap, -lse));
        p = visible ? p : 0.0f;
        slope = p * fmaf(-t, t, 1.0f);
    }
    return p;
}

__device__ __forceinline__ unsigned pack(float low, float high) {
    const bf162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned *>(&pair);
}

// cp.async of 4 or 8 bytes; with `inside` false zeros are written.
template <int bytes>
__device__ __forceinline__ void copy_async_small(void *to, const void *from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)), "l"(from), "n"(bytes),
                 "r"(inside ? bytes : 0)
                 : "memory");
}

// Barriers of the two warps that share 16 rows: one number each, beside __syncthreads' 0.
__device__ __forceinline__ void pair_sync(int pair) {
    asm volatile("bar.sync %0, 64;\n" ::"r"(pair + 1) : "memory");
}
__device__ __forceinline__ void pair_arrive(int pair) {
    asm volatile("bar.arrive %0, 64;\n" ::"r"(pair + 1) : "memory");
}

// Tiles of `rows` rows in shared memory: DIM / 64 swizzled tiles of 64 columns side by side. Piece `piece` (8 columns)
// of row `row`:
template <int rows>
__device__ __forceinline__ int place(int row, int piece) {
    return piece / 8 * rows * TILE_K + swizzled(row, piece % 8);
}

// The loops load right operands of 16 x 16 from tiles of STREAM rows. From the address of the first, the `base`, that
// 16 columns further on is base ^ 32, then come base ^ 64 and base ^ 96: a swizzled place is an exclusive or with the
// row, and tiles lie at multiples of 128 bytes. 64 columns further on is the next tile of 64 columns. So an address
// costs one instruction for DIM / 64 loads; load_matrix of mma.cuh, which takes pointers, costs several a load.
constexpr int TILE_BYTES = STREAM * TILE_K * 2;

// Rows are columns of the operand (B = Q^T: Q's rows are pairs): matrices 0, 1 are rows 0..8, columns 0..8 and 8..16.
__device__ __forceinline__ unsigned base_of_rows(const bf16 *tile) {
    const int lane = threadIdx.x % WARP;
    return shared_address(tile + swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

// Rows are rows of the operand (B = Q): matrices 0, 1 are columns 0..8, rows 0..8 and 8..16, transposed.
__device__ __forceinline__ unsigned base_of_columns(const bf16 *tile) {
    const int lane = threadIdx.x % WARP;
    return shared_address(tile + swizzled(lane % 16, lane / 16));
}

__device__ __forceinline__ void load_rows(unsigned (&b)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_columns(unsigned (&b)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}

// The 16 x DIM left operand that begins at row `row` of a tile of STAY rows.
template <int DIM>
__device__ __forceinline__ void load_operand(unsigned (&a)[DIM / 16][4], const bf16 *tile, int row) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) load_matrix(a[k], tile + place<STAY>(row + lane % 16, 2 * k + lane / 16));
}

// Writes 16 x columns bf16 out of accumulators through this warp's own `buffer` in shared memory, 16 bytes at a time:
// row r goes to to(r), which is null for rows that are not there.
template <int TILES, typename To>
__device__ __forceinline__ void store_rows(const float (&acc)[TILES][4], float factor, bf16 *buffer, To to) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        *reinterpret_cast<unsigned *>(buffer + place<16>(g, n) + 2 * t) = pack(acc[n][0] * factor, acc[n][1] * factor);
        *reinterpret_cast<unsigned *>(buffer + place<16>(g + 8, n) + 2 * t) =
            pack(acc[n][2] * factor, acc[n][3] * factor);
    }
    __syncwarp(); // the lanes below read what other lanes wrote
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
        const int piece = (i * WARP + lane) % TILES, row = (i * WARP + lane) / TILES;
        bf16 *out = to(row);
        if (out) {
            *reinterpret_cast<uint4 *>(out + piece * PIECE) =
                *reinterpret_cast<const uint4 *>(buffer + place<16>(row, piece));
        }
    }
}

// sum + the products of two pairs of bf16: a bf16 is the upper half of a float.
__device__ __forceinline__ float dot(unsigned a, unsigned b, float sum) {
    sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
    return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}

// Pass 1. DIM / 8 lanes take a pair of (row, head), and four of these in turn: so eight loads of a lane are under way
// at once, and a warp writes whole sectors. A block makes 8192 / DIM pairs.
template <int DIM>
__device__ __forceinline__ void stats(
    const bf16 *d_o, const bf16 *o, const float *lse, float2 *out, unsigned count) {
    constexpr unsigned LANES = DIM / PIECE, AT_ONCE = WARP / LANES, ROUNDS = 4;
    const unsigned lane = threadIdx.x % WARP, piece = lane % LANES;
    const unsigned first = (blockIdx.x * THREADS + threadIdx.x) / WARP * ROUNDS * AT_ONCE + lane / LANES;
    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 a[ROUNDS], b[ROUNDS];
#pragma unroll
    for (unsigned r = 0; r < ROUNDS; r++) {
        const unsigned i = first + r * AT_ONCE;
        a[r] = i < count ? reinterpret_cast<const uint4 *>(d_o + size_t(i) * DIM)[piece] : none;
        b[r] = i < count ? reinterpret_cast<const uint4 *>(o + size_t(i) * DIM)[piece] : none;
    }
    float mine = 0.0f; // of round `piece`
#pragma unroll
    for (unsigned r = 0; r < ROUNDS; r++) {
        float sum = dot(a[r].x, b[r].x, dot(a[r].y, b[r].y, dot(a[r].z, b[r].z, dot(a[r].w, b[r].w, 0.0f))));
#pragma unroll
        for (unsigned step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
        mine = piece == r ? sum : mine;
    }
    const unsigned i = first + piece * AT_ONCE;
    if (piece < ROUNDS && i < count) out[i] = make_float2(lse[i] * LOG2_E, mine);
}

// Pass 2. Warps w and w + 4 share keys 16 w..: the first makes S^T = K Q^T, P and dV, the second dP^T = V dO^T, dS and
// dK; what the second needs of P it gets through shared memory. So each has one operand of 16 x DIM in registers and
// one sum of 16 x DIM, and P^T and dS^T are, as they leave the first product, left operands of the second.
template <int DIM>
__device__ __forceinline__ void keys(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float2 *stats, const unsigned *positions,
    const KeyItem *items, const unsigned *tokens, bf16 *dk, bf16 *dv, float *partial, unsigned heads, unsigned kv_heads,
    const Scores &scores) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int TILE = STREAM * DIM;
    bf16 *tiles = reinterpret_cast<bf16 *>(shared);                          // [2 stages][Q, dO][STREAM x DIM]
    float4 *exchange = reinterpret_cast<float4 *>(tiles + 4 * TILE);         // [4 pairs][4 tiles of 8 rows][lane]
    float2 *row_stats = reinterpret_cast<float2 *>(exchange + 4 * 4 * WARP); // [2][STREAM]
    unsigned *row_positions = reinterpret_cast<unsigned *>(row_stats + 2 * STREAM);

    const KeyItem item = items[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int pair = warp % 4, kind = warp / 4;
    const int copy_row = threadIdx.x / 8, copy_piece = threadIdx.x % 8;

    // K and V pass through the two stages, which have just their size, into registers.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = copy_row + half * STREAM;
        const size_t from = (size_t(item.row + row) * kv_heads + kv_head) * DIM + copy_piece * PIECE;
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            bf16 *to = tiles + place<STAY>(row, 8 * c + copy_piece);
            copy_async(to, k + from + c * TILE_K, row < item.keys);
            copy_async(to + 2 * TILE, v + from + c * TILE_K, row < item.keys);
        }
    }
    copy_commit();

    // Copies the tile of pairs `i` of which this thread does an eighth of a row. The row of the tile after it is looked
    // up at once, so that the copy does not wait for it.
    const unsigned end = item.offset + item.pairs;
    unsigned p = item.offset + copy_row; // of this thread's row of the tile that is copied next
    auto token_of = [&](unsigned p) { return tokens[item.first + min(p, end - 1) / group]; };
    unsigned token = token_of(p);
    auto copy = [&](unsigned stage) {
        const bool inside = p < end;
        const size_t at = size_t(token) * heads + kv_head * group + p % group;
        const size_t from = at * DIM + copy_piece * PIECE;
        bf16 *to = tiles + stage * 2 * TILE + swizzled(copy_row, copy_piece);
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            copy_async(to + c * STREAM * TILE_K, q + from + c * TILE_K, inside);
            copy_async(to + c * STREAM * TILE_K + TILE, d_o + from + c * TILE_K, inside);
        }
        // Rows that are not there are zeros throughout: whatever P is, dO = 0 and dP - D = 0.
        if (copy_piece == 0) {
            copy_async_small<8>(row_stats + stage * STREAM + copy_row, stats + at, inside);
            copy_async_small<4>(row_positions + stage * STREAM + copy_row, positions + token, inside);
        }
        copy_commit();
        p += STREAM;
        token = token_of(p);
    };

    copy_wait<0>();
    __syncthreads(); // all threads' copies of K and V are there
    unsigned stay[DIM / 16][4];
    load_operand<DIM>(stay, tiles + kind * 2 * TILE, 16 * pair);
    __syncthreads(); // all warps have read them; now the tiles of pairs go there
    const unsigned steps = (item.pairs + STREAM - 1) / STREAM;
    copy(0);

    const unsigned key_position = item.position + 16 * pair + g;
    float acc[DIM / 8][4] = {};
    for (unsigned i = 0; i < steps; i++) {
        copy_wait<0>();
        __syncthreads(); // all threads' copies of tile i are there, and nobody reads tile i - 1 any more
        if (i + 1 < steps) copy((i + 1) % 2);
        // Does any of the pairs, a lane each, see any of these 16 keys? Both warps find the same answer.
        const unsigned ahead = row_positions[i % 2 * STREAM + lane] - (key_position - g);
        if (!__any_sync(ALL, ahead < scores.window + 15)) continue;
        const bf16 *first = tiles + i % 2 * 2 * TILE + kind * TILE;        // Q; dO
        const bf16 *second = tiles + i % 2 * 2 * TILE + (1 - kind) * TILE; // dO; Q

        // s = stay first^T: 16 keys x STREAM pairs.
        float s[STREAM / 8][4] = {};
        const unsigned rows = base_of_rows(first);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const unsigned at = rows ^ 32 * j;
#pragma unroll
            for (int c = 0; c < DIM / TILE_K; c++) {
#pragma unroll
                for (int n = 0; n < STREAM / 16; n++) {
                    unsigned b[4];
                    load_rows(b, at + c * TILE_BYTES + n * 16 * TILE_K * 2);
                    mma(s[2 * n], stay[4 * c + j], b[0], b[1]);
                    mma(s[2 * n + 1], stay[4 * c + j], b[2], b[3]);
                }
            }
        }

        const float2 *tile_stats = row_stats + i % 2 * STREAM;
        float4 *slot = exchange + pair * 4 * WARP + lane;
        if (kind == 0) {
            const unsigned *tile_positions = row_positions + i % 2 * STREAM;
#pragma unroll
            for (int n = 0; n < STREAM / 8; n++) {
                const float4 st = *reinterpret_cast<const float4 *>(tile_stats + 8 * n + 2 * t);
                const uint2 at = *reinterpret_cast<const uint2 *>(tile_positions + 8 * n + 2 * t);
                float slope[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const unsigned distance = (e % 2 ? at.y : at.x) - (key_position + e / 2 * 8);
                    s[n][e] = probability(s[n][e], e % 2 ? st.z : st.x, distance < scores.window, scores, slope[e]);
                }
                slot[n * WARP] = make_float4(slope[0], slope[1], slope[2], slope[3]);
            }
            pair_arrive(pair); // P cap' is in the slot; the next is written only after the loop's barrier
        } else {
            pair_sync(pair); // P cap' is in the slot
#pragma unroll
            for (int n = 0; n < STREAM / 8; n++) {
                const float4 st = *reinterpret_cast<const float4 *>(tile_stats + 8 * n + 2 * t);
                const float4 slope = slot[n * WARP];
                s[n][0] = slope.x * (s[n][0] - st.y);
                s[n][1] = slope.y * (s[n][1] - st.w);
                s[n][2] = slope.z * (s[n][2] - st.y);
                s[n][3] = slope.w * (s[n][3] - st.w);
            }
        }

        // acc += s second: dV += P^T dO; dK += dS^T Q.
        const unsigned columns = base_of_columns(second);
#pragma unroll
        for (int kk = 0; kk < STREAM / 16; kk++) {
            const unsigned a[4] = {pack(s[2 * kk][0], s[2 * kk][1]), pack(s[2 * kk][2], s[2 * kk][3]),
                                   pack(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned at = columns ^ 32 * j;
#pragma unroll
                for (int c = 0; c < DIM / TILE_K; c++) {
                    unsigned b[4];
                    load_columns(b, at + c * TILE_BYTES + kk * 16 * TILE_K * 2);
                    mma(acc[8 * c + 2 * j], a, b[0], b[1]);
                    mma(acc[8 * c + 2 * j + 1], a, b[2], b[3]);
                }
            }
        }
    }

    // Read again: no register is left to keep it through the loop.
    const volatile KeyItem &done = items[blockIdx.x];
    const unsigned slot = done.slot, key_row = done.row, key_end = done.keys;
    const float factor = kind == 0 ? 1.0f : scores.scale;
    if (slot == ~0u) {
        bf16 *out = kind == 0 ? dv : dk;
        __syncthreads(); // all warps are done with the tiles, in whose place each turns its sums into rows
        store_rows(acc, factor, tiles + warp * 16 * DIM, [&](int r) -> bf16 * {
            const unsigned key = 16 * pair + r;
            return key < key_end ? out + (size_t(key_row + key) * kv_heads + kv_head) * DIM : nullptr;
        });
    } else {
        // [slot][kv head][dV, dK][STAY x DIM]: four lanes write a sector.
        float *out = partial + ((size_t(slot) * kv_heads + kv_head) * 2 + kind) * STAY * DIM + 16 * pair * DIM;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            float2 *low = reinterpret_cast<float2 *>(out + g * DIM + 8 * n + 2 * t);
            __stcg(low, make_float2(acc[n][0] * factor, acc[n][1] * factor));
            __stcg(low + 8 * DIM / 2, make_float2(acc[n][2] * factor, acc[n][3] * factor));
        }
    }
}

// Adds up what pass 2 left in slots, in order. Grid: (tiles x DIM / 16, kv heads, dV and dK); a thread makes 4
// columns.
template <int DIM>
__device__ __forceinline__ void sum(
    const float *partial, const SumItem *items, bf16 *dk, bf16 *dv, unsigned kv_heads) {
    constexpr unsigned PARTS = STAY * DIM / 4 / THREADS;
    const SumItem item = items[blockIdx.x / PARTS];
    const unsigned at = (blockIdx.x % PARTS * THREADS + threadIdx.x) * 4, key = at / DIM;
    if (key >= item.keys) return;
    const size_t stride = size_t(kv_heads) * 2 * STAY * DIM;
    const float *from = partial + item.slot * stride + (blockIdx.y * 2 + blockIdx.z) * STAY * DIM + at;
    float4 total = *reinterpret_cast<const float4 *>(from);
#pragma unroll 4
    for (unsigned i = 1; i < item.pieces; i++) {
        const float4 x = *reinterpret_cast<const float4 *>(from + i * stride);
        total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
    }
    bf16 *out = (blockIdx.z == 0 ? dv : dk) + (size_t(item.row + key) * kv_heads + blockIdx.y) * DIM + at % DIM;
    *reinterpret_cast<uint2 *>(out) = make_uint2(pack(total.x, total.y), pack(total.z, total.w));
}

// Pass 3. Warps w and w + 4 share pairs 16 w.., whose Q and dO each has in registers: the first makes S, dP and dS of
// the tile's first 16 keys, the second of the others; when they have swapped dS, the first adds to the first half of
// dQ's columns, the second to the other.
template <int DIM>
__device__ __forceinline__ void queries(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float2 *stats, const QueryItem *items,
    const ChainItem *chains, bf16 *dq, unsigned heads, unsigned kv_heads, const Scores &scores) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int TILE = STREAM * DIM;
    bf16 *tiles = reinterpret_cast<bf16 *>(shared);                // [2 stages][K, V][STREAM x DIM]
    uint4 *exchange = reinterpret_cast<uint4 *>(tiles + 4 * TILE); // [4 pairs][half][lane]

    const QueryItem item = items[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int pair = warp % 4, half = warp / 4;
    const int copy_row = threadIdx.x / 8, copy_piece = threadIdx.x % 8;

    // (row, head) of pair p of this tile, as an index into [T, H].
    auto place_of = [&](unsigned p) {
        return size_t(item.row + (item.offset + p) / group) * heads + kv_head * group + (item.offset + p) % group;
    };

    // Q and dO pass through the two stages, which have just their size, into registers.
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const unsigned row = copy_row + part * STREAM;
        const size_t from = place_of(row) * DIM + copy_piece * PIECE;
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            bf16 *to = tiles + place<STAY>(row, 8 * c + copy_piece);
            copy_async(to, q + from + c * TILE_K, row < item.pairs);
            copy_async(to + 2 * TILE, d_o + from + c * TILE_K, row < item.pairs);
        }
    }
    copy_commit();

    // This lane's two pairs. Pairs that are not there have zeros for Q, dO and D, and nobody stores their dQ.
    float lse[2], delta[2];
    unsigned position[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const unsigned p = 16 * pair + g + 8 * r;
        const float2 st = p < item.pairs ? stats[place_of(p)] : make_float2(0.0f, 0.0f);
        lse[r] = st.x;
        delta[r] = st.y;
        position[r] = item.position + (item.offset + p) / group;
    }

    // The chain's entry that this thread's key is in; keys come in order of position.
    const ChainItem *chain = chains + item.chain;
    unsigned shift = chain[0].shift, next = chain[1].begin;
    auto copy = [&](unsigned i) {
        const unsigned index = i * STREAM + copy_row, stage = i % 2, at = item.first + index;
        const bool inside = index < item.keys;
        while (inside && at >= next) {
            chain++;
            shift = chain[0].shift;
            next = chain[1].begin;
        }
        const size_t from = (size_t(at + shift) * kv_heads + kv_head) * DIM + copy_piece * PIECE;
        bf16 *to = tiles + stage * 2 * TILE + swizzled(copy_row, copy_piece);
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            copy_async(to + c * STREAM * TILE_K, k + from + c * TILE_K, inside);
            copy_async(to + c * STREAM * TILE_K + TILE, v + from + c * TILE_K, inside);
        }
        copy_commit();
    };

    copy_wait<0>();
    __syncthreads(); // all threads' copies of Q and dO are there
    unsigned stay_q[DIM / 16][4], stay_d_o[DIM / 16][4];
    load_operand<DIM>(stay_q, tiles, 16 * pair);
    load_operand<DIM>(stay_d_o, tiles + 2 * TILE, 16 * pair);
    __syncthreads(); // all warps have read them; now the tiles of keys go there
    const unsigned steps = (item.keys + STREAM - 1) / STREAM;
    copy(0);

    float acc[DIM / 16][4] = {};
    for (unsigned i = 0; i < steps; i++) {
        copy_wait<0>();
        __syncthreads(); // all threads' copies of tile i are there, and nobody reads tile i - 1 any more
        if (i + 1 < steps) copy(i + 1);
        const bf16 *tile_k = tiles + i % 2 * 2 * TILE;

        // Does any of the 16 pairs see any key of this warp's half, of the other's? Both warps find the same answers.
        const unsigned first_key = item.first + i * STREAM;
        auto seen = [&](unsigned key) {
            return __any_sync(ALL, min(position[0] - key, position[1] - key) < scores.window + 15);
        };
        const bool own = seen(first_key + 16 * half);
        if (!own && !seen(first_key + 16 * (1 - half))) continue;

        // dS of 16 pairs x 16 keys.
        float dp[2][4] = {};
        if (own) {
            float s[2][4] = {};
            const unsigned rows_k = base_of_rows(tile_k + 16 * half * TILE_K), rows_v = rows_k + TILE * 2;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned at_k = rows_k ^ 32 * j, at_v = rows_v ^ 32 * j;
#pragma unroll
                for (int c = 0; c < DIM / TILE_K; c++) {
                    unsigned b[4];
                    load_rows(b, at_k + c * TILE_BYTES);
                    mma(s[0], stay_q[4 * c + j], b[0], b[1]);
                    mma(s[1], stay_q[4 * c + j], b[2], b[3]);
                    load_rows(b, at_v + c * TILE_BYTES);
                    mma(dp[0], stay_d_o[4 * c + j], b[0], b[1]);
                    mma(dp[1], stay_d_o[4 * c + j], b[2], b[3]);
                }
            }
            // Keys beyond the tile's last are zeros at positions that no pair sees.
            const unsigned key_position = first_key + 16 * half + 2 * t;
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const unsigned distance = position[e / 2] - (key_position + 8 * n + e % 2);
                    float slope;
                    probability(s[n][e], lse[e / 2], distance < scores.window, scores, slope);
                    dp[n][e] = slope * (dp[n][e] - delta[e / 2]);
                }
            }
        }
        uint4 *slot = exchange + pair * 2 * WARP + lane;
        slot[half * WARP] = make_uint4(pack(dp[0][0], dp[0][1]), pack(dp[0][2], dp[0][3]), pack(dp[1][0], dp[1][1]),
                                       pack(dp[1][2], dp[1][3]));
        pair_sync(pair); // both halves of dS are there; they are written again only after the loop's barrier

        // dQ += dS K, 16 pairs x half of the columns: half of a tile at DIM = 64, else of the tiles.
        constexpr int STEPS = DIM == TILE_K ? 2 : 4;
        unsigned columns = base_of_columns(tile_k);
        columns = DIM == TILE_K ? columns ^ half * 64 : columns + half * (DIM / TILE_K / 2) * TILE_BYTES;
#pragma unroll
        for (int kk = 0; kk < STREAM / 16; kk++) {
            const uint4 d = slot[kk * WARP];
            const unsigned a[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
            for (int j = 0; j < STEPS; j++) {
                const unsigned at = columns ^ 32 * j;
#pragma unroll
                for (int c = 0; c < DIM / 32 / STEPS; c++) {
                    unsigned b[4];
                    load_columns(b, at + c * TILE_BYTES + kk * 16 * TILE_K * 2);
                    mma(acc[2 * (STEPS * c + j)], a, b[0], b[1]);
                    mma(acc[2 * (STEPS * c + j) + 1], a, b[2], b[3]);
                }
            }
        }
    }
    __syncthreads(); // all warps are done with the tiles, in whose place each turns its sums into rows
    store_rows(acc, scores.scale, tiles + warp * 16 * DIM, [&](int r) -> bf16 * {
        const unsigned p = 16 * pair + r;
        return p < item.pairs ? dq + place_of(p) * DIM + half * (DIM / 2) : nullptr;
    });
}

} // namespace

// q, o, d_o, dq [T, H, Dh], k, v, dk, dv [T, K, Dh] bf16; lse [T, H] f32; stats [T, H] pairs of floats; positions [T].
// Blocks of 256 threads; dynamic shared memory as the launcher says.

// Dh = 64. Grid: T H / 128, rounded up.
extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_64(
    const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out,
    unsigned count) {
    stats<64>(d_o, o, lse, out, count);
}

// Grid: (items, K).
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_64(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,
    const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,
    unsigned heads, unsigned kv_heads, Scores scores) {
    keys<64>(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);
}

// Grid: (4 x items, K, 2).
extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_64(
    const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv,
    unsigned kv_heads) {
    sum<64>(partial, items, dk, dv, kv_heads);
}

// Grid: (items, K).
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_64(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,
    bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {
    queries<64>(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);
}

// Dh = 128. Grid: T H / 64, rounded up.
extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_128(
    const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out,
    unsigned count) {
    stats<128>(d_o, o, lse, out, count);
}

// Grid: (items, K).
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_128(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,
    const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,
    unsigned heads, unsigned kv_heads, Scores scores) {
    keys<128>(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);
}

// Grid: (8 x items, K, 2).
extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_128(
    const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv,
    unsigned kv_heads) {
    sum<128>(partial, items, dk, dv, kv_heads);
}

// Grid: (items, K).
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_128(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,
    bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {
    queries<128>(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);
}

// Dh = 256. Grid: T H / 32, rounded up.
extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_256(
    const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out,
    unsigned count) {
    stats<256>(d_o, o, lse, out, count);
}

// Grid: (items, K).
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_256(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,
    const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,
    unsigned heads, unsigned kv_heads, Scores scores) {
    keys<256>(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);
}

// Grid: (16 x items, K, 2).
extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_256(
    const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv,
    unsigned kv_heads) {
    sum<256>(partial, items, dk, dv, kv_heads);
}

// Grid: (items, K).
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_256(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,
    bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {
    queries<256>(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);
}
