// The gradient of segment attention. Formula and shapes: `attention_backward` of src/backend/mod.rs.
//
// Let s = scale q.k, cap(s) = c tanh(s / c) (or s), P = exp(cap(s) - lse) where the query sees the key and 0 elsewhere, and
// D = dO.O for each query and head (which is the sum over its keys of P dP, Dao 2023). Then
//     dP = dO V^T     dS = P (dP - D) cap'     dV = P^T dO     dK = scale dS^T Q     dQ = scale dS K
// P is computed again from q, k and lse, so that no array of queries x keys is ever in memory.
//
// The G = H / K heads of a group are rows of one matrix: a *pair* is (query token, head of the group), and pair p is head p % G
// of token p / G. K and V are read once for all heads of a group therefore, and the products are equally large for any G. A
// query sees a key if both are of one chain of segments and 0 <= pos_q - pos_k < window. The kernels compute the second
// condition; the work lists, which the host makes (src/backend/cuda/attention_backward.rs), contain only tiles that meet the
// first and are visible to some query.
//
// Three passes without atomics, every sum in a fixed order:
//   1. attention_backward_stats computes the floats (lse log2(e), D) for each (row, head).
//   2. attention_backward_keys computes dK and dV, with a block for each (64 keys of a segment, kv head, part of the pairs that
//      see these keys). The pairs of a prompt's keys, which all responses see, are cut into several parts, because the blocks
//      would else be too few for the GPU; the f32 sums of parts go through memory, and attention_backward_sum adds them in order.
//   3. attention_backward_queries computes dQ, with a block for each (64 pairs of a segment, kv head), over keys in ascending
//      order of position.
//
// Limits. A product takes 2 Dh FLOPs for each (pair, key). Pass 2 computes four products and pass 3 three: seven instead of
// five, because both compute S and dP. Computing dQ in pass 2 would need atomics, or sums over key tiles in memory: f32 traffic
// of T H Dh for every 64 keys. Traffic: pass 2 reads 32 pairs of Q and dO, 128 Dh bytes, for 4 x 2 x 64 x 32 x Dh FLOPs, 128
// FLOPs a byte. Pass 3 reads 32 keys of K and V, 128 Dh bytes, for 3 x 2 x 64 x 32 x Dh FLOPs, 96 FLOPs a byte. Nearly all of
// it comes from L2, because the blocks of a segment read the same rows at about the same time. The limit of both passes is the
// tensor cores, unless shared memory is slower: mma.m16n8k16 takes 2 clocks of an SM (A100), and ldmatrix of four matrices
// takes 4 clocks, so that every ldmatrix must feed two mma. Hence:
// - the stationary operands (K and V in pass 2; Q and dO in pass 3) are loaded once, into registers, as operands of mma;
// - the streamed operands (tiles of 32 rows of Q and dO; of K and V) are double-buffered in shared memory, and every ldmatrix
//   of them feeds two mma. At Dh = 256 that takes 64 KiB and all registers: one block of 8 warps for each SM.
// On the diagonal and at the end of a window, a warp skips products of 16 x 16 or more in which no query sees a key.

#include "attention.cuh"

namespace {

constexpr unsigned THREADS = 256;  // shared
// Stationary rows of a block: keys in pass 2, pairs in pass 3. Each of the four pairs of warps has 16.
constexpr int STAY = 64;  // shared
// Rows of a streamed tile.
constexpr int STREAM = 32;  // shared

// A block's work in pass 2: a tile of keys and a part of the pairs that see it.
struct KeyItem {  // shared
    unsigned row, position, keys;  // the tile: `keys` rows of k and v from `row` on, at positions from `position` on
    unsigned first, offset, pairs; // pair p is pair offset + p of the tokens whose rows are tokens[first], tokens[first + 1], ..
    unsigned slot;                 // slot of the part's sums; ~0: the tile has one part, which writes the result itself
    unsigned unused;
};
static_assert(sizeof(KeyItem) == 32);

// A block's work in pass 3: a tile of pairs.
struct QueryItem {  // shared
    unsigned row, position;    // row and position of the first pair's token
    unsigned offset, pairs;    // pair p is pair offset + p of the tokens from `row` on; offset < G
    unsigned first, keys;      // at least one of the pairs sees a key at positions first .. first + keys - 1
    unsigned chain;            // index in `chains` of the first segment of its chain
    unsigned unused;
};
static_assert(sizeof(QueryItem) == 32);

// A segment of a chain: the keys at positions from `begin` up to the next item's `begin` lie in rows position + shift (modulo
// 2^32). The last item of a chain has begin = ~0.
struct ChainItem {  // shared
    unsigned begin, shift;
};
static_assert(sizeof(ChainItem) == 8);

// A tile of keys, as in KeyItem, whose sums of parts are in slots slot .. slot + parts - 1.
struct SumItem {  // shared
    unsigned row, keys, slot, parts;
};
static_assert(sizeof(SumItem) == 16);

// The constants by which a dot product q.k becomes P.
struct Scores {  // shared
    float scale;     // scale
    float inner;     // factor of q.k in an exponent of 2: scale log2(e), or with a soft-cap 2 scale log2(e) / c
    float cap;       // c log2(e); 0: no soft-cap
    unsigned window; // at most 2^31, which means no window
};
static_assert(sizeof(Scores) == 16);

// P of a dot product, and in `slope` P cap'.
__device__ __forceinline__ float probability(float dot, float lse, bool visible, const Scores &scores, float &slope) {
    float p;
    if (scores.cap == 0.0f) {
        p = exp2_approx(fmaf(dot, scores.inner, -lse));
        p = visible ? p : 0.0f;
        slope = p;
    } else {
        const float t = tanh_absolute(dot * scores.inner);
        p = exp2_approx(fmaf(t, scores.cap, -lse));
        p = visible ? p : 0.0f;
        slope = p * fmaf(-t, t, 1.0f);
    }
    return p;
}

// Barriers of the two warps that have the same 16 stationary rows. Each pair of warps has its own barrier; number 0 is that of
// __syncthreads.
__device__ __forceinline__ void pair_sync(int pair) {
    asm volatile("bar.sync %0, 64;\n" ::"r"(pair + 1) : "memory");
}
__device__ __forceinline__ void pair_arrive(int pair) {
    asm volatile("bar.arrive %0, 64;\n" ::"r"(pair + 1) : "memory");
}

// The loops load right operands of 16 x 16 from tiles of STREAM rows. If `base` is the address of the first 16 columns, the
// next 16 columns are at base ^ 32, then at base ^ 64 and base ^ 96, because a swizzled offset is an exclusive or with the row
// and panels begin at multiples of 128 bytes. The columns from 64 on are in the next panel, a constant further. An address
// therefore costs one instruction for DIM / 64 loads. load_matrix of mma.cuh, which takes pointers, costs several for each load.
constexpr int PANEL_BYTES = STREAM * TILE_K * 2;

// Base for operands whose columns are rows of the tile (B = Q^T: Q's rows are pairs). Matrices 0 and 1 are rows 0..8, columns
// 0..8 and 8..16.
__device__ __forceinline__ unsigned base_of_rows(const bf16 *tile) {
    const int lane = threadIdx.x % WARP;
    return shared_address(tile + swizzled(lane / 16 * 8 + lane % 8, lane / 8 % 2));
}

// Base for operands whose rows are rows of the tile (B = Q). Matrices 0 and 1 are columns 0..8, rows 0..8 and 8..16, transposed.
__device__ __forceinline__ unsigned base_of_columns(const bf16 *tile) {
    const int lane = threadIdx.x % WARP;
    return shared_address(tile + swizzled(lane % 16, lane / 16));
}

// Loads the 16 x DIM left operand that begins at row `row` of a tile of STAY rows.
template <int DIM>
__device__ __forceinline__ void load_operand(unsigned (&a)[DIM / 16][4], const bf16 *tile, int row) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < DIM / 16; k++) load_matrix(a[k], tile + swizzled_panels<STAY>(row + lane % 16, 2 * k + lane / 16));
}

// Writes 16 rows of accumulators times `factor`, rounded to bf16, to global memory. They pass through this warp's `buffer` in
// shared memory so that global memory is written by 16-byte vectors. Row r goes to to(r), which is null if there is no such row.
template <int TILES, typename To>
__device__ __forceinline__ void store_bf16(const float (&acc)[TILES][4], float factor, bf16 *buffer, To to) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        *reinterpret_cast<unsigned *>(buffer + swizzled_panels<16>(g, n) + 2 * t) = pack_bf16(acc[n][0] * factor, acc[n][1] * factor);
        *reinterpret_cast<unsigned *>(buffer + swizzled_panels<16>(g + 8, n) + 2 * t) =
            pack_bf16(acc[n][2] * factor, acc[n][3] * factor);
    }
    __syncwarp(); // a lane reads what other lanes wrote
#pragma unroll
    for (int i = 0; i < TILES / 2; i++) {
        const int vector = (i * WARP + lane) % TILES, row = (i * WARP + lane) / TILES;
        bf16 *out = to(row);
        if (out) {
            *reinterpret_cast<uint4 *>(out + vector * VECTOR) =
                *reinterpret_cast<const uint4 *>(buffer + swizzled_panels<16>(row, vector));
        }
    }
}

// sum + the products of two pairs of bf16. A bf16 is the upper half of a float, so that a shift or a mask widens it.
__device__ __forceinline__ float dot(unsigned a, unsigned b, float sum) {
    sum = fmaf(__uint_as_float(a << 16), __uint_as_float(b << 16), sum);
    return fmaf(__uint_as_float(a & 0xffff0000u), __uint_as_float(b & 0xffff0000u), sum);
}

// Pass 1. DIM / 8 lanes compute D of one (row, head), four times: a lane then has eight loads in flight, and a warp writes
// whole sectors. A block computes 8192 / DIM (row, head).
template <int DIM>
__device__ __forceinline__ void make_stats(
    const bf16 *d_o, const bf16 *o, const float *lse, float2 *out, unsigned count) {
    constexpr unsigned LANES = DIM / VECTOR, AT_ONCE = WARP / LANES, ROUNDS = 4;
    const unsigned lane = threadIdx.x % WARP, vector = lane % LANES;
    const unsigned first = (blockIdx.x * THREADS + threadIdx.x) / WARP * ROUNDS * AT_ONCE + lane / LANES;
    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 a[ROUNDS], b[ROUNDS];
#pragma unroll
    for (unsigned r = 0; r < ROUNDS; r++) {
        const unsigned i = first + r * AT_ONCE;
        a[r] = i < count ? reinterpret_cast<const uint4 *>(d_o + size_t(i) * DIM)[vector] : none;
        b[r] = i < count ? reinterpret_cast<const uint4 *>(o + size_t(i) * DIM)[vector] : none;
    }
    float mine = 0.0f; // D of round `vector`: each lane keeps and writes one of the four
#pragma unroll
    for (unsigned r = 0; r < ROUNDS; r++) {
        float sum = dot(a[r].x, b[r].x, dot(a[r].y, b[r].y, dot(a[r].z, b[r].z, dot(a[r].w, b[r].w, 0.0f))));
#pragma unroll
        for (unsigned step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL, sum, step);
        mine = vector == r ? sum : mine;
    }
    const unsigned i = first + vector * AT_ONCE;
    if (vector < ROUNDS && i < count) out[i] = make_float2(lse[i] * LOG2_E, mine);
}

// Pass 2. Warps w and w + 4 have the same keys 16 w .. 16 w + 15. The first computes S^T = K Q^T, P and dV, the second dP^T =
// V dO^T, dS and dK; it receives P cap' from the first through shared memory. Each warp therefore has one operand of 16 x DIM
// and one sum of 16 x DIM in registers. P^T and dS^T have, as results of the first product, the register layout of left
// operands of the second.
template <int DIM>
__device__ __forceinline__ void make_dk_dv(
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
    const int copy_row = threadIdx.x / 8, copy_vector = threadIdx.x % 8;

    // K and V reach the registers through the two stages, whose size they have.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = copy_row + half * STREAM;
        const size_t from = (size_t(item.row + row) * kv_heads + kv_head) * DIM + copy_vector * VECTOR;
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            bf16 *to = tiles + swizzled_panels<STAY>(row, 8 * c + copy_vector);
            copy_async(to, k + from + c * TILE_K, row < item.keys);
            copy_async(to + 2 * TILE, v + from + c * TILE_K, row < item.keys);
        }
    }
    copy_commit();

    // Starts the copies of the next tile of pairs, of which this thread copies an eighth of a row. The token of the tile after it
    // is looked up at once, because the next copy would have to wait for the lookup.
    const unsigned end = item.offset + item.pairs;
    unsigned p = item.offset + copy_row; // pair of this thread's row in the next tile
    auto token_of = [&](unsigned p) { return tokens[item.first + min(p, end - 1) / group]; };
    unsigned token = token_of(p);
    auto copy = [&](unsigned stage) {
        const bool inside = p < end;
        const size_t at = size_t(token) * heads + kv_head * group + p % group;
        const size_t from = at * DIM + copy_vector * VECTOR;
        bf16 *to = tiles + stage * 2 * TILE + swizzled(copy_row, copy_vector);
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            copy_async(to + c * STREAM * TILE_K, q + from + c * TILE_K, inside);
            copy_async(to + c * STREAM * TILE_K + TILE, d_o + from + c * TILE_K, inside);
        }
        // Rows beyond the last pair are zeros in every array. They add nothing whatever P is, because dO = 0 and dP - D = 0.
        if (copy_vector == 0) {
            copy_async_small<8>(row_stats + stage * STREAM + copy_row, stats + at, inside);
            copy_async_small<4>(row_positions + stage * STREAM + copy_row, positions + token, inside);
        }
        copy_commit();
        p += STREAM;
        token = token_of(p);
    };

    copy_wait<0>();
    __syncthreads(); // all threads' copies of K and V are complete
    unsigned stay[DIM / 16][4];
    load_operand<DIM>(stay, tiles + kind * 2 * TILE, 16 * pair);
    __syncthreads(); // all warps have read K and V, whose memory the tiles of pairs now use
    const unsigned steps = (item.pairs + STREAM - 1) / STREAM;
    copy(0);

    const unsigned key_position = item.position + 16 * pair + g;
    float acc[DIM / 8][4] = {};
    for (unsigned i = 0; i < steps; i++) {
        copy_wait<0>();
        __syncthreads(); // all threads' copies of tile i are complete; all warps have read tile i - 1
        if (i + 1 < steps) copy((i + 1) % 2);
        // Whether any pair of the tile sees any of the 16 keys; each lane checks one pair. Both warps get the same answer.
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
                    load_matrix_at<false>(b, at + c * PANEL_BYTES + n * 16 * TILE_K * 2);
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
            pair_arrive(pair); // P cap' is in the slot; the loop's barrier precedes the next write to it
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
            const unsigned a[4] = {pack_bf16(s[2 * kk][0], s[2 * kk][1]), pack_bf16(s[2 * kk][2], s[2 * kk][3]),
                                   pack_bf16(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack_bf16(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const unsigned at = columns ^ 32 * j;
#pragma unroll
                for (int c = 0; c < DIM / TILE_K; c++) {
                    unsigned b[4];
                    load_matrix_at<true>(b, at + c * PANEL_BYTES + kk * 16 * TILE_K * 2);
                    mma(acc[8 * c + 2 * j], a, b[0], b[1]);
                    mma(acc[8 * c + 2 * j + 1], a, b[2], b[3]);
                }
            }
        }
    }

    // `volatile` makes the compiler read these fields again, because it has no register to keep them through the loop.
    const volatile KeyItem &done = items[blockIdx.x];
    const unsigned slot = done.slot, key_row = done.row, key_end = done.keys;
    const float factor = kind == 0 ? 1.0f : scores.scale;
    if (slot == ~0u) {
        bf16 *out = kind == 0 ? dv : dk;
        __syncthreads(); // all warps have read the tiles, whose memory `store_bf16` uses
        store_bf16(acc, factor, tiles + warp * 16 * DIM, [&](int r) -> bf16 * {
            const unsigned key = 16 * pair + r;
            return key < key_end ? out + (size_t(key_row + key) * kv_heads + kv_head) * DIM : nullptr;
        });
    } else {
        // partial [slot][kv head][dV, dK][STAY x DIM]: four lanes write a sector.
        float *out = partial + ((size_t(slot) * kv_heads + kv_head) * 2 + kind) * STAY * DIM + 16 * pair * DIM;
#pragma unroll
        for (int n = 0; n < DIM / 8; n++) {
            float2 *low = reinterpret_cast<float2 *>(out + g * DIM + 8 * n + 2 * t);
            __stcg(low, make_float2(acc[n][0] * factor, acc[n][1] * factor));
            __stcg(low + 8 * DIM / 2, make_float2(acc[n][2] * factor, acc[n][3] * factor));
        }
    }
}

// Adds up the sums of parts, in ascending order of slots. Grid: (tiles x DIM / 16, kv heads, dV and dK); a thread adds 4
// columns.
template <int DIM>
__device__ __forceinline__ void add_parts(
    const float *partial, const SumItem *items, bf16 *dk, bf16 *dv, unsigned kv_heads) {
    constexpr unsigned BLOCKS = STAY * DIM / 4 / THREADS; // of a tile
    const SumItem item = items[blockIdx.x / BLOCKS];
    const unsigned at = (blockIdx.x % BLOCKS * THREADS + threadIdx.x) * 4, key = at / DIM;
    if (key >= item.keys) return;
    const size_t stride = size_t(kv_heads) * 2 * STAY * DIM;
    const float *from = partial + item.slot * stride + (blockIdx.y * 2 + blockIdx.z) * STAY * DIM + at;
    float4 total = *reinterpret_cast<const float4 *>(from);
#pragma unroll 4
    for (unsigned i = 1; i < item.parts; i++) {
        const float4 x = *reinterpret_cast<const float4 *>(from + i * stride);
        total = make_float4(total.x + x.x, total.y + x.y, total.z + x.z, total.w + x.w);
    }
    bf16 *out = (blockIdx.z == 0 ? dv : dk) + (size_t(item.row + key) * kv_heads + blockIdx.y) * DIM + at % DIM;
    *reinterpret_cast<uint2 *>(out) = make_uint2(pack_bf16(total.x, total.y), pack_bf16(total.z, total.w));
}

// Pass 3. Warps w and w + 4 have the same pairs 16 w .. 16 w + 15, and both have the Q and dO of these in registers. The first
// computes S, dP and dS for the first 16 keys of a tile, the second for the other 16. They exchange dS; then the first computes
// the first half of dQ's columns, the second the other half.
template <int DIM>
__device__ __forceinline__ void make_dq(
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
    const int copy_row = threadIdx.x / 8, copy_vector = threadIdx.x % 8;

    // Index in [T, H] of the (row, head) of pair p of this tile.
    auto row_head = [&](unsigned p) {
        return size_t(item.row + (item.offset + p) / group) * heads + kv_head * group + (item.offset + p) % group;
    };

    // Q and dO reach the registers through the two stages, whose size they have.
#pragma unroll
    for (int rows = 0; rows < 2; rows++) {
        const unsigned row = copy_row + rows * STREAM;
        const size_t from = row_head(row) * DIM + copy_vector * VECTOR;
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            bf16 *to = tiles + swizzled_panels<STAY>(row, 8 * c + copy_vector);
            copy_async(to, q + from + c * TILE_K, row < item.pairs);
            copy_async(to + 2 * TILE, d_o + from + c * TILE_K, row < item.pairs);
        }
    }
    copy_commit();

    // lse, D and position of this lane's two pairs. Beyond the last pair Q, dO and D are zeros, and dQ is not stored.
    float lse[2], delta[2];
    unsigned position[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const unsigned p = 16 * pair + g + 8 * r;
        const float2 st = p < item.pairs ? stats[row_head(p)] : make_float2(0.0f, 0.0f);
        lse[r] = st.x;
        delta[r] = st.y;
        position[r] = item.position + (item.offset + p) / group;
    }

    // Rows of this thread's keys, by the chain item that contains the position. Positions ascend from tile to tile.
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
        const size_t from = (size_t(at + shift) * kv_heads + kv_head) * DIM + copy_vector * VECTOR;
        bf16 *to = tiles + stage * 2 * TILE + swizzled(copy_row, copy_vector);
#pragma unroll
        for (int c = 0; c < DIM / TILE_K; c++) {
            copy_async(to + c * STREAM * TILE_K, k + from + c * TILE_K, inside);
            copy_async(to + c * STREAM * TILE_K + TILE, v + from + c * TILE_K, inside);
        }
        copy_commit();
    };

    copy_wait<0>();
    __syncthreads(); // all threads' copies of Q and dO are complete
    unsigned stay_q[DIM / 16][4], stay_d_o[DIM / 16][4];
    load_operand<DIM>(stay_q, tiles, 16 * pair);
    load_operand<DIM>(stay_d_o, tiles + 2 * TILE, 16 * pair);
    __syncthreads(); // all warps have read Q and dO, whose memory the tiles of keys now use
    const unsigned steps = (item.keys + STREAM - 1) / STREAM;
    copy(0);

    float acc[DIM / 16][4] = {};
    for (unsigned i = 0; i < steps; i++) {
        copy_wait<0>();
        __syncthreads(); // all threads' copies of tile i are complete; all warps have read tile i - 1
        if (i + 1 < steps) copy(i + 1);
        const bf16 *tile_k = tiles + i % 2 * 2 * TILE;

        // Whether any of the 16 pairs sees any of the 16 keys from `key` on. Both warps get the same answers.
        const unsigned first_key = item.first + i * STREAM;
        auto seen = [&](unsigned key) {
            return __any_sync(ALL, min(position[0] - key, position[1] - key) < scores.window + 15);
        };
        const bool own = seen(first_key + 16 * half);
        if (!own && !seen(first_key + 16 * (1 - half))) continue;

        // dS for 16 pairs x 16 keys.
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
                    load_matrix_at<false>(b, at_k + c * PANEL_BYTES);
                    mma(s[0], stay_q[4 * c + j], b[0], b[1]);
                    mma(s[1], stay_q[4 * c + j], b[2], b[3]);
                    load_matrix_at<false>(b, at_v + c * PANEL_BYTES);
                    mma(dp[0], stay_d_o[4 * c + j], b[0], b[1]);
                    mma(dp[1], stay_d_o[4 * c + j], b[2], b[3]);
                }
            }
            // Keys beyond the last are zeros, at positions that no pair sees.
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
        slot[half * WARP] = make_uint4(pack_bf16(dp[0][0], dp[0][1]), pack_bf16(dp[0][2], dp[0][3]), pack_bf16(dp[1][0], dp[1][1]),
                                       pack_bf16(dp[1][2], dp[1][3]));
        pair_sync(pair); // both halves of dS are in the slots; the loop's barrier precedes the next write to them

        // dQ += dS K for 16 pairs x half of the columns: half of a panel at DIM = 64, else half of the panels.
        constexpr int STEPS = DIM == TILE_K ? 2 : 4;
        unsigned columns = base_of_columns(tile_k);
        columns = DIM == TILE_K ? columns ^ half * 64 : columns + half * (DIM / TILE_K / 2) * PANEL_BYTES;
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
                    load_matrix_at<true>(b, at + c * PANEL_BYTES + kk * 16 * TILE_K * 2);
                    mma(acc[2 * (STEPS * c + j)], a, b[0], b[1]);
                    mma(acc[2 * (STEPS * c + j) + 1], a, b[2], b[3]);
                }
            }
        }
    }
    __syncthreads(); // all warps have read the tiles, whose memory `store_bf16` uses
    store_bf16(acc, scores.scale, tiles + warp * 16 * DIM, [&](int r) -> bf16 * {
        const unsigned p = 16 * pair + r;
        return p < item.pairs ? dq + row_head(p) * DIM + half * (DIM / 2) : nullptr;
    });
}

} // namespace

// q, o, d_o, dq [T, H, Dh], k, v, dk, dv [T, K, Dh] bf16; lse [T, H] f32; stats [T, H] float2; positions [T].

// Dh = 64.
// Launched by cuda/attention_backward.rs: backward; grid (T H Dh / 8192), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_64(
    const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out,
    unsigned count) {
    make_stats<64>(d_o, o, lse, out, count);
}

// Launched by cuda/attention_backward.rs: backward; grid (key items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_64(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,
    const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,
    unsigned heads, unsigned kv_heads, Scores scores) {
    make_dk_dv<64>(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);
}

// Launched by cuda/attention_backward.rs: backward; grid (sum items Dh / 16, K, 2), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_64(
    const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv,
    unsigned kv_heads) {
    add_parts<64>(partial, items, dk, dv, kv_heads);
}

// Launched by cuda/attention_backward.rs: backward; grid (query items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_64(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,
    bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {
    make_dq<64>(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);
}

// Dh = 128.
// Launched by cuda/attention_backward.rs: backward; grid (T H Dh / 8192), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_128(
    const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out,
    unsigned count) {
    make_stats<128>(d_o, o, lse, out, count);
}

// Launched by cuda/attention_backward.rs: backward; grid (key items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_128(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,
    const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,
    unsigned heads, unsigned kv_heads, Scores scores) {
    make_dk_dv<128>(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);
}

// Launched by cuda/attention_backward.rs: backward; grid (sum items Dh / 16, K, 2), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_128(
    const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv,
    unsigned kv_heads) {
    add_parts<128>(partial, items, dk, dv, kv_heads);
}

// Launched by cuda/attention_backward.rs: backward; grid (query items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_128(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,
    bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {
    make_dq<128>(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);
}

// Dh = 256.
// Launched by cuda/attention_backward.rs: backward; grid (T H Dh / 8192), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_256(
    const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out,
    unsigned count) {
    make_stats<256>(d_o, o, lse, out, count);
}

// Launched by cuda/attention_backward.rs: backward; grid (key items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_256(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,
    const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,
    unsigned heads, unsigned kv_heads, Scores scores) {
    make_dk_dv<256>(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);
}

// Launched by cuda/attention_backward.rs: backward; grid (sum items Dh / 16, K, 2), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_256(
    const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv,
    unsigned kv_heads) {
    add_parts<256>(partial, items, dk, dv, kv_heads);
}

// Launched by cuda/attention_backward.rs: backward; grid (query items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_256(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o,
    const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,
    bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {
    make_dq<256>(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);
}
