// The gradient of segment attention. Formula and shapes: src/backend/attention_backward.rs.
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
//
// At Dh = 512 (Gemma 4's global layers) the sums dV and dK of 64 keys would be all 65536 registers of an SM. Blocks that share the
// columns of the sums would each compute all of S and dP: 6 + 5 products instead of 4 + 3. Instead a block has fewer stationary
// rows, 32 keys or 48 pairs, and streamed tiles have 16 rows, so that all fits the 99 KiB that a block may have on every GPU. A
// warp has *all* rows of the block and a share of the columns: a quarter of those of one stationary operand (K or V; Q or dO), a
// quarter of dV or dK, an eighth of dQ. Registers of a thread in operand and sum: 64 + 128 in pass 2, as at 256; 96 + 96 in pass
// 3. Every ldmatrix feeds four mma in pass 2 and six in pass 3. The price is that no warp has all columns of a dot product: four
// warps have a part each, which go through shared memory in f32, and P and dS come back in bf16. For a tile of 16 rows and a
// warp, in clocks of an SM:
//
//     | pass | mma | ldmatrix | copies | parts | P cap' | P, dS | all of shared memory | FLOPs a byte of L2 |
//     | 2    | 128 | 64       | 32     | 24    | 4      | 10    | 134                  | 64                 |
//     | 3    | 144 | 48       | 32     | 48    | -      | 13.5  | 141.5                | 72                 |
//
// At Dh = 256 mma and shared memory are, for 32 rows, 256 and 304 in pass 2, and 192 and 236 in pass 3. Pass 3 has 48 pairs for
// the sake of L2: 32 would make 48 FLOPs a byte.

#include "attention.cuh"

namespace {

constexpr unsigned THREADS = 256;  // shared
// Stationary rows of a block: keys in pass 2, pairs in pass 3. Each of the four pairs of warps has 16.
constexpr int STAY = 64;  // shared
// Rows of a streamed tile.
constexpr int STREAM = 32;  // shared

// The same for heads of 512: keys of a block in pass 2, pairs of a block in pass 3, rows of a streamed tile.
constexpr int WIDE = 512;
constexpr int WIDE_KEYS = 32;  // shared
constexpr int WIDE_PAIRS = 48;  // shared
constexpr int WIDE_STREAM = 16;  // shared

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
// whole sectors. At DIM = 512 a lane has two vectors instead, twice. A block computes 8192 / DIM (row, head).
template <int DIM>
__device__ __forceinline__ void make_stats(
    const bf16 *d_o, const bf16 *o, const float *lse, float2 *out, unsigned count) {
    constexpr unsigned VECTORS = DIM / VECTOR > WARP ? DIM / VECTOR / WARP : 1; // of a lane
    constexpr unsigned LANES = DIM / VECTOR / VECTORS, AT_ONCE = WARP / LANES, ROUNDS = 4 / VECTORS;
    const unsigned lane = threadIdx.x % WARP, vector = lane % LANES;
    const unsigned first = (blockIdx.x * THREADS + threadIdx.x) / WARP * ROUNDS * AT_ONCE + lane / LANES;
    const uint4 none = make_uint4(0, 0, 0, 0);
    uint4 a[ROUNDS][VECTORS], b[ROUNDS][VECTORS];
#pragma unroll
    for (unsigned r = 0; r < ROUNDS; r++) {
        const unsigned i = first + r * AT_ONCE;
#pragma unroll
        for (unsigned v = 0; v < VECTORS; v++) {
            a[r][v] = i < count ? reinterpret_cast<const uint4 *>(d_o + size_t(i) * DIM)[vector + v * WARP] : none;
            b[r][v] = i < count ? reinterpret_cast<const uint4 *>(o + size_t(i) * DIM)[vector + v * WARP] : none;
        }
    }
    float mine = 0.0f; // D of round `vector`: each lane keeps and writes one
#pragma unroll
    for (unsigned r = 0; r < ROUNDS; r++) {
        float sum = 0.0f;
#pragma unroll
        for (unsigned v = 0; v < VECTORS; v++) {
            const uint4 x = a[r][v], y = b[r][v];
            sum = dot(x.x, y.x, dot(x.y, y.y, dot(x.z, y.z, dot(x.w, y.w, sum))));
        }
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

// Adds up the sums of parts of tiles of KEYS x DIM, in ascending order of slots. Grid: (tiles x KEYS DIM / 1024, kv heads, dV and
// dK); a thread adds 4 columns.
template <int DIM, int KEYS>
__device__ __forceinline__ void add_parts(
    const float *partial, const SumItem *items, bf16 *dk, bf16 *dv, unsigned kv_heads) {
    constexpr unsigned BLOCKS = KEYS * DIM / 4 / THREADS; // of a tile
    const SumItem item = items[blockIdx.x / BLOCKS];
    const unsigned at = (blockIdx.x % BLOCKS * THREADS + threadIdx.x) * 4, key = at / DIM;
    if (key >= item.keys) return;
    const size_t stride = size_t(kv_heads) * 2 * KEYS * DIM;
    const float *from = partial + item.slot * stride + (blockIdx.y * 2 + blockIdx.z) * KEYS * DIM + at;
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
    unsigned end = chain->end, shift = chain->delta;
    auto copy = [&](unsigned i) {
        const unsigned index = i * STREAM + copy_row, stage = i % 2, at = item.first + index;
        const bool inside = index < item.keys;
        while (inside && at >= end) {
            chain++;
            end = chain->end;
            shift = chain->delta;
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

// Heads of 512, whose shape the head of this file explains. A warp has a quarter (128) of the columns of one stationary operand, for
// all stationary rows of the block, and multiplies it by the same columns of the streamed tile. The result is a part of S or dP.
// It goes through shared memory by fragments of 16 stationary x 8 streamed rows: fragment 2 m + n has the stationary rows from
// 16 m on and the streamed rows from 8 n on. A warp adds the four parts of a fragment, in one order.

constexpr int QUARTER = WIDE / 4; // columns
constexpr int WIDE_TILE = WIDE_STREAM * WIDE;
constexpr int WIDE_PANEL_BYTES = WIDE_STREAM * TILE_K * 2;

// Starts copies of a sixteenth of a row, which begins with vector `vector`, to row `row` of a tile of ROWS rows.
template <int ROWS>
__device__ __forceinline__ void copy_wide(bf16 *tile, int row, int vector, const bf16 *from, bool inside) {
    bf16 *to = tile + swizzled_panels<ROWS>(row, vector);
#pragma unroll
    for (int c = 0; c < WIDE / (2 * TILE_K); c++) {
        copy_async(to + c * 2 * ROWS * TILE_K, from + vector * VECTOR + c * 2 * TILE_K, inside);
    }
}

// Loads 16 rows x QUARTER columns of a tile of ROWS rows as left operands.
template <int ROWS>
__device__ __forceinline__ void load_quarter(unsigned (&a)[QUARTER / 16][4], const bf16 *tile, int row, int quarter) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < QUARTER / 16; k++) {
        load_matrix(a[k], tile + swizzled_panels<ROWS>(row + lane % 16, quarter * (QUARTER / VECTOR) + 2 * k + lane / 16));
    }
}

// s = stay tile^T over the columns of this warp's quarter. `rows` is the base of its first panel for operands of rows.
template <int TILES>
__device__ __forceinline__ void multiply_quarter(
    float (&s)[TILES][2][4], const unsigned (&stay)[TILES][QUARTER / 16][4], unsigned rows) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const unsigned at = rows ^ 32 * j;
#pragma unroll
        for (int c = 0; c < QUARTER / TILE_K; c++) {
            unsigned b[4];
            load_matrix_at<false>(b, at + c * WIDE_PANEL_BYTES);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                mma(s[m][0], stay[m][4 * c + j], b[0], b[1]);
                mma(s[m][1], stay[m][4 * c + j], b[2], b[3]);
            }
        }
    }
}

// acc += a tile for 64 * PANELS columns. `columns` is the base of their first panel for operands of columns. Fragments of `a` lie
// in `operands` in the layout of results, which is that of left operands. acc[i] is of the stationary rows from 16 (i ^ flip) on.
template <int TILES, int PANELS>
__device__ __forceinline__ void add_product(
    float (&acc)[TILES][8 * PANELS][4], const uint2 *operands, unsigned columns, int flip) {
    const int lane = threadIdx.x % WARP;
    unsigned a[TILES][4];
#pragma unroll
    for (int i = 0; i < TILES; i++) {
        const uint2 low = operands[2 * (i ^ flip) * WARP + lane], high = operands[(2 * (i ^ flip) + 1) * WARP + lane];
        a[i][0] = low.x, a[i][1] = low.y, a[i][2] = high.x, a[i][3] = high.y;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const unsigned at = columns ^ 32 * j;
#pragma unroll
        for (int c = 0; c < PANELS; c++) {
            unsigned b[4];
            load_matrix_at<true>(b, at + c * WIDE_PANEL_BYTES);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                mma(acc[i][8 * c + 2 * j], a[i], b[0], b[1]);
                mma(acc[i][8 * c + 2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// A result in the layout of a left operand.
__device__ __forceinline__ uint2 packed(const float (&x)[4]) {
    return make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
}

// Barrier of the four warps that compute dV, or of the four that compute dK.
__device__ __forceinline__ void kind_sync(int kind) {
    asm volatile("bar.sync %0, 128;\n" ::"r"(kind + 5) : "memory");
}

// Pass 2. Warps 0 .. 3 compute S^T = K Q^T, P and dV, warps 4 .. 7 dP^T = V dO^T, dS and dK; warps w and w + 4 have quarter w of
// the columns of both products, so that either needs other warps only for the sum between them. Warps w and w + 4 also own the same
// fragment of S and of dP, number w. The bits of its quarter exchange a warp's two stationary and its two streamed halves, so that
// its result s[i][j] is fragment (2 i + j) ^ quarter: its own is always s[0][0], and no register is chosen by a variable.
//
// Warps w and w + 4 share a scheduler. The second of them computes dK of a tile in the round after, so that one multiplies while
// the other exchanges parts:
//     warps 0 .. 3    S       exchange    dV
//     warps 4 .. 7    dK      dP          exchange        (dK of the tile before)
// Q has three stages therefore, and dO two.
__device__ __forceinline__ void make_dk_dv_wide(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float2 *stats, const unsigned *positions,
    const KeyItem *items, const unsigned *tokens, bf16 *dk, bf16 *dv, float *partial, unsigned heads, unsigned kv_heads,
    const Scores &scores) {
    extern __shared__ __align__(128) unsigned char shared[];
    bf16 *tiles_q = reinterpret_cast<bf16 *>(shared);                        // [3 stages][WIDE_STREAM x WIDE]
    bf16 *tiles_d_o = tiles_q + 3 * WIDE_TILE;                               // [2 stages][WIDE_STREAM x WIDE]
    float4 *parts = reinterpret_cast<float4 *>(tiles_d_o + 2 * WIDE_TILE);   // [S, dP][owner][3 others][lane]
    float4 *slopes = parts + 2 * 4 * 3 * WARP;                               // [fragment][lane]
    uint2 *operands = reinterpret_cast<uint2 *>(slopes + 4 * WARP);          // [P, dS][fragment][lane]
    float2 *row_stats = reinterpret_cast<float2 *>(operands + 2 * 4 * WARP); // [2][WIDE_STREAM]
    unsigned *row_positions = reinterpret_cast<unsigned *>(row_stats + 2 * WIDE_STREAM);

    const KeyItem item = items[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const int warp = __shfl_sync(ALL, threadIdx.x / WARP, 0), lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int quarter = warp % 4, kind = warp / 4, flip_m = quarter / 2, flip_n = quarter % 2;
    const int copy_row = threadIdx.x / 16, copy_vector = threadIdx.x % 16;

    // K and V reach the registers through four of the stages, whose size they have.
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = copy_row + half * WIDE_STREAM;
        const size_t from = (size_t(item.row + row) * kv_heads + kv_head) * WIDE;
        copy_wide<WIDE_KEYS>(tiles_q, row, copy_vector, k + from, row < item.keys);
        copy_wide<WIDE_KEYS>(tiles_q + 2 * WIDE_TILE, row, copy_vector, v + from, row < item.keys);
    }
    copy_commit();

    // Starts the copies of the next tile of pairs, of which this thread copies a sixteenth of a row. The token of the tile after it
    // is looked up at once, because the next copy would have to wait for the lookup.
    const unsigned end = item.offset + item.pairs;
    unsigned p = item.offset + copy_row; // pair of this thread's row in the next tile
    auto token_of = [&](unsigned p) { return tokens[item.first + min(p, end - 1) / group]; };
    unsigned token = token_of(p);
    auto copy = [&](unsigned i) {
        const bool inside = p < end;
        const unsigned stage = i % 2;
        const size_t at = size_t(token) * heads + kv_head * group + p % group;
        copy_wide<WIDE_STREAM>(tiles_q + i % 3 * WIDE_TILE, copy_row, copy_vector, q + at * WIDE, inside);
        copy_wide<WIDE_STREAM>(tiles_d_o + stage * WIDE_TILE, copy_row, copy_vector, d_o + at * WIDE, inside);
        // Rows beyond the last pair are zeros in every array. They add nothing whatever P is, because dO = 0 and dP - D = 0.
        if (threadIdx.x % 16 == 0) {
            copy_async_small<8>(row_stats + stage * WIDE_STREAM + copy_row, stats + at, inside);
            copy_async_small<4>(row_positions + stage * WIDE_STREAM + copy_row, positions + token, inside);
        }
        copy_commit();
        p += WIDE_STREAM;
        token = token_of(p);
    };

    copy_wait<0>();
    __syncthreads(); // all threads' copies of K and V are complete
    unsigned stay[2][QUARTER / 16][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        load_quarter<WIDE_KEYS>(stay[i], tiles_q + kind * 2 * WIDE_TILE, 16 * (i ^ flip_m), quarter);
    }
    __syncthreads(); // all warps have read K and V, whose memory the tiles of pairs now use
    const unsigned steps = (item.pairs + WIDE_STREAM - 1) / WIDE_STREAM;
    copy(0);

    const unsigned key_position = item.position + 16 * flip_m + g; // of this lane's rows of the warp's own fragment
    // Every tile counts, because every pair of the list sees one of the keys.
    float acc[2][QUARTER / 8][4] = {};
    uint2 *operand = operands + kind * 4 * WARP;
    for (unsigned i = 0; i <= steps; i++) {
        copy_wait<0>();
        // All threads' copies of tile i are complete; all warps have read dO and slopes of tile i - 1, and Q of tile i - 2; dS of
        // tile i - 1 is written.
        __syncthreads();
        if (i + 1 < steps) copy(i + 1);
        const unsigned stage = i % 2;
        const bf16 *tile_d_o = tiles_d_o + stage * WIDE_TILE + quarter * WIDE_STREAM * QUARTER;

        // dK += dS^T Q of the tile before.
        if (kind == 1 && i > 0) {
            const bf16 *before = tiles_q + (i + 2) % 3 * WIDE_TILE + quarter * WIDE_STREAM * QUARTER;
            add_product<2, 2>(acc, operand, base_of_columns(before), flip_m);
        }
        if (i == steps) break;

        float s[2][2][4] = {};
        const bf16 *first = kind == 0 ? tiles_q + i % 3 * WIDE_TILE + quarter * WIDE_STREAM * QUARTER : tile_d_o;
        // As base_of_rows, but for the exchanged halves.
        multiply_quarter(s, stay, shared_address(first + swizzled((lane / 16 ^ flip_n) * 8 + lane % 8, lane / 8 % 2)));

        // Part r of fragment f is that of warp f ^ r. It is written by three warps, and in the registers of the fourth.
        float4 *const part = parts + kind * 4 * 3 * WARP + lane;
#pragma unroll
        for (int r = 1; r < 4; r++) {
            const float(&x)[4] = s[r / 2][r % 2];
            part[((quarter ^ r) * 3 + r - 1) * WARP] = make_float4(x[0], x[1], x[2], x[3]);
        }
        kind_sync(kind); // all parts are written; for dS: all warps have read that of tile i - 1
        float(&own)[4] = s[0][0];
#pragma unroll
        for (int r = 1; r < 4; r++) {
            const float4 x = part[(quarter * 3 + r - 1) * WARP];
            own[0] += x.x;
            own[1] += x.y;
            own[2] += x.z;
            own[3] += x.w;
        }

        const float4 st = *reinterpret_cast<const float4 *>(row_stats + stage * WIDE_STREAM + 8 * flip_n + 2 * t);
        float4 *slot = slopes + quarter * WARP + lane;
        if (kind == 0) {
            const uint2 at = *reinterpret_cast<const uint2 *>(row_positions + stage * WIDE_STREAM + 8 * flip_n + 2 * t);
            float slope[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const unsigned distance = (e % 2 ? at.y : at.x) - (key_position + e / 2 * 8);
                own[e] = probability(own[e], e % 2 ? st.z : st.x, distance < scores.window, scores, slope[e]);
            }
            *slot = make_float4(slope[0], slope[1], slope[2], slope[3]);
            pair_arrive(quarter); // P cap' is in the slot; the loop's barrier precedes the next write to it
        } else {
            pair_sync(quarter); // P cap' is in the slot
            const float4 slope = *slot;
            own[0] = slope.x * (own[0] - st.y);
            own[1] = slope.y * (own[1] - st.w);
            own[2] = slope.z * (own[2] - st.y);
            own[3] = slope.w * (own[3] - st.w);
        }
        operand[quarter * WARP + lane] = packed(own);

        // dV += P^T dO.
        if (kind == 0) {
            kind_sync(kind); // all fragments of P are written
            add_product<2, 2>(acc, operand, base_of_columns(tile_d_o), flip_m);
        }
    }

    // `volatile` makes the compiler read these fields again, because it has no register to keep them through the loop.
    const volatile KeyItem &done = items[blockIdx.x];
    const unsigned slot = done.slot, key_row = done.row, key_end = done.keys;
    const float factor = kind == 0 ? 1.0f : scores.scale;
    if (slot == ~0u) {
        bf16 *out = kind == 0 ? dv : dk;
        __syncthreads(); // all warps have read the tiles, whose memory `store_bf16` uses
#pragma unroll
        for (int i = 0; i < 2; i++) {
            store_bf16(acc[i], factor, tiles_q + (2 * warp + i) * 16 * QUARTER, [&](int r) -> bf16 * {
                const unsigned key = 16 * (i ^ flip_m) + r;
                return key < key_end ? out + (size_t(key_row + key) * kv_heads + kv_head) * WIDE + quarter * QUARTER : nullptr;
            });
        }
    } else {
        // partial [slot][kv head][dV, dK][WIDE_KEYS x WIDE]: four lanes write a sector.
        float *out = partial + ((size_t(slot) * kv_heads + kv_head) * 2 + kind) * WIDE_KEYS * WIDE + quarter * QUARTER;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float *rows = out + (16 * (i ^ flip_m) + g) * WIDE + 2 * t;
#pragma unroll
            for (int n = 0; n < QUARTER / 8; n++) {
                const float(&x)[4] = acc[i][n];
                __stcg(reinterpret_cast<float2 *>(rows + 8 * n), make_float2(x[0] * factor, x[1] * factor));
                __stcg(reinterpret_cast<float2 *>(rows + 8 * WIDE + 8 * n), make_float2(x[2] * factor, x[3] * factor));
            }
        }
    }
}

// Pass 3. Warps 0 .. 3 compute the parts of S, warps 4 .. 7 those of dP, warps 0 .. 5 one fragment of dS each, and every warp an
// eighth (64) of dQ's columns, in the round after. Half of the warps multiply while the other half exchanges, as in pass 2:
//     warps 0 .. 3    S       dS      dQ of the tile before
//     warps 4 .. 7    dP      dQ of the tile before       dS
// K has three stages therefore. V has one: its next tile is copied as soon as dP's parts are computed.
__device__ __forceinline__ void make_dq_wide(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const float2 *stats, const QueryItem *items,
    const ChainItem *chains, bf16 *dq, unsigned heads, unsigned kv_heads, const Scores &scores) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int GROUPS = WIDE_PAIRS / 16, FRAGMENTS = 2 * GROUPS;
    bf16 *tiles = reinterpret_cast<bf16 *>(shared);                            // [3 stages][WIDE_STREAM x WIDE] of K
    bf16 *tile_v = tiles + 3 * WIDE_TILE;                                      // [WIDE_STREAM x WIDE]
    float4 *parts = reinterpret_cast<float4 *>(tile_v + WIDE_TILE);            // [fragment][warp][lane]
    uint2 *operands = reinterpret_cast<uint2 *>(parts + FRAGMENTS * 8 * WARP); // [2][fragment][lane]
    // The rest is in shared memory because the registers are full. Q and dO, which come first, end before it.
    float2 *pair_stats = reinterpret_cast<float2 *>(tiles + 2 * WIDE_PAIRS * WIDE);         // [WIDE_PAIRS]
    unsigned *pair_positions = reinterpret_cast<unsigned *>(pair_stats + WIDE_PAIRS);       // [WIDE_PAIRS], from item.first on
    unsigned *key_rows = pair_positions + WIDE_PAIRS;                                       // [2 tiles][WIDE_STREAM]
    static_assert(4 * WIDE_TILE * 2 + FRAGMENTS * (8 * 16 + 2 * 8) * WARP <= 2 * WIDE_PAIRS * WIDE * 2, "operands end before them");

    const QueryItem item = items[blockIdx.x];
    const unsigned kv_head = blockIdx.y, group = heads / kv_heads;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int quarter = warp % 4, kind = warp / 4;
    const int copy_row = threadIdx.x / 16, copy_vector = threadIdx.x % 16;

    // Index in [T, H] of the (row, head) of pair p of this tile.
    auto row_head = [&](unsigned p) {
        return size_t(item.row + (item.offset + p) / group) * heads + kv_head * group + (item.offset + p) % group;
    };

    // Q and dO reach the registers through all of the shared memory.
    bf16 *const tile_d_o = tiles + WIDE_PAIRS * WIDE;
#pragma unroll
    for (int rows = 0; rows < GROUPS; rows++) {
        const unsigned row = copy_row + rows * 16;
        const size_t from = row_head(row) * WIDE;
        copy_wide<WIDE_PAIRS>(tiles, row, copy_vector, q + from, row < item.pairs);
        copy_wide<WIDE_PAIRS>(tile_d_o, row, copy_vector, d_o + from, row < item.pairs);
    }
    copy_commit();

    // Beyond the last pair Q, dO and D are zeros, and dQ is not stored.
    if (threadIdx.x < WIDE_PAIRS) {
        const unsigned p = threadIdx.x;
        pair_stats[p] = p < item.pairs ? stats[row_head(p)] : make_float2(0.0f, 0.0f);
        pair_positions[p] = item.position + (item.offset + p) / group - item.first;
    }

    // Looks up the row of key `index`, ~0 if there is none, by the chain item that contains its position. `volatile`: as in pass 2.
    auto look_up = [&](unsigned index) {
        const volatile QueryItem &its = items[blockIdx.x];
        const unsigned at = its.first + index;
        unsigned row = ~0u;
        if (index < its.keys) {
            const ChainItem *chain = chains + its.chain;
            while (at >= chain->end) chain++;
            row = at + chain->delta;
        }
        key_rows[index % (2 * WIDE_STREAM)] = row;
    };
    if (threadIdx.x < 2 * WIDE_STREAM) look_up(threadIdx.x);

    // Starts the copies of this thread's key of tile i.
    auto copy = [&](bf16 *to, const bf16 *from, unsigned i) {
        const unsigned row = key_rows[i % 2 * WIDE_STREAM + copy_row];
        const bool inside = row != ~0u;
        copy_wide<WIDE_STREAM>(to, copy_row, copy_vector, from + (size_t(row) * kv_heads + kv_head) * WIDE, inside);
        copy_commit();
    };

    copy_wait<0>();
    __syncthreads(); // all threads' copies of Q and dO are complete; what is in shared memory beside the tiles is written
    unsigned stay[GROUPS][QUARTER / 16][4];
#pragma unroll
    for (int m = 0; m < GROUPS; m++) load_quarter<WIDE_PAIRS>(stay[m], kind == 0 ? tiles : tile_d_o, 16 * m, quarter);
    __syncthreads(); // all warps have read Q and dO, whose memory the tiles of keys now use
    const unsigned steps = (item.keys + WIDE_STREAM - 1) / WIDE_STREAM;
    copy(tiles, k, 0);
    copy(tile_v, v, 0);

    // Every tile counts, because some pair of the item sees each of its keys.
    float acc[GROUPS][8][4] = {};
    for (unsigned i = 0; i <= steps; i++) {
        copy_wait<0>();
        // All threads' copies of tile i are complete; all warps have read K of tile i - 2 and the parts of tile i - 1; dS of tile
        // i - 1 is written.
        __syncthreads();
        if (i < steps) {
            const bf16 *tile_k = tiles + i % 3 * WIDE_TILE;
            if (i + 1 < steps) copy(tiles + (i + 1) % 3 * WIDE_TILE, k, i + 1);
            float s[GROUPS][2][4] = {};
            multiply_quarter(s, stay, base_of_rows((kind == 0 ? tile_k : tile_v) + quarter * WIDE_STREAM * QUARTER));
#pragma unroll
            for (int f = 0; f < FRAGMENTS; f++) {
                const float(&x)[4] = s[f / 2][f % 2];
                parts[(f * 8 + warp) * WARP + lane] = make_float4(x[0], x[1], x[2], x[3]);
            }
            __syncthreads(); // all parts are written; all warps have read V
            if (i + 1 < steps) copy(tile_v, v, i + 1);
        }

#pragma unroll 1
        for (int turn = 0; turn < 2; turn++) {
            if (turn != kind) {
                // dQ += dS K for 64 columns, of the tile before.
                if (i == 0) continue;
                const bf16 *before = tiles + (i + 2) % 3 * WIDE_TILE + warp * WIDE_STREAM * TILE_K;
                add_product<GROUPS, 1>(acc, operands + (i + 1) % 2 * FRAGMENTS * WARP, base_of_columns(before), 0);
            } else if (warp < FRAGMENTS && i < steps) {
                const int g = lane / 4, t = lane % 4;
                float sums[2][4] = {}; // S, dP
#pragma unroll
                for (int w = 0; w < 8; w++) {
                    const float4 x = parts[(warp * 8 + w) * WARP + lane];
                    sums[w / 4][0] += x.x;
                    sums[w / 4][1] += x.y;
                    sums[w / 4][2] += x.z;
                    sums[w / 4][3] += x.w;
                }
                // Keys beyond the last are zeros, at positions that no pair sees.
                const unsigned key_position = i * WIDE_STREAM + warp % 2 * 8 + 2 * t;
                float ds[4];
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int pair = warp / 2 * 16 + g + 8 * r;
                    const float2 st = pair_stats[pair];
                    const unsigned ahead = pair_positions[pair] - key_position;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float slope;
                        probability(sums[0][2 * r + e], st.x, ahead - e < scores.window, scores, slope);
                        ds[2 * r + e] = slope * (sums[1][2 * r + e] - st.y);
                    }
                }
                operands[(i % 2 * FRAGMENTS + warp) * WARP + lane] = packed(ds);
            } else if (warp == 7 && lane < WIDE_STREAM) {
                // For the copies of the next round. This warp has no fragment.
                look_up((i + 2) * WIDE_STREAM + lane);
            }
        }
    }
    __syncthreads(); // all warps have read the tiles, whose memory `store_bf16` uses
    // `volatile`: as in pass 2.
    const volatile QueryItem &done = items[blockIdx.x];
    const unsigned row = done.row, offset = done.offset, pairs = done.pairs;
#pragma unroll
    for (int m = 0; m < GROUPS; m++) {
        store_bf16(acc[m], scores.scale, tiles + (GROUPS * warp + m) * 16 * TILE_K, [&](int r) -> bf16 * {
            const unsigned p = offset + 16 * m + r;
            const size_t at = size_t(row + p / group) * heads + kv_head * group + p % group;
            return 16 * m + r < pairs ? dq + at * WIDE + warp * TILE_K : nullptr;
        });
    }
}

} // namespace

// Entry points for heads of DH: q, o, d_o, dq [T, H, Dh], k, v, dk, dv [T, K, Dh] bf16; lse [T, H] f32; stats [T, H] float2;
// positions [T].

// Launched by cuda/attention_backward.rs: attention_backward; grid (T H Dh / 8192), 256 threads.
#define STATS(DH)                                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) attention_backward_stats_##DH(                                       \
        const bf16 *__restrict__ d_o, const bf16 *__restrict__ o, const float *__restrict__ lse, float2 *__restrict__ out, \
        unsigned count) {                                                                                                  \
        make_stats<DH>(d_o, o, lse, out, count);                                                                           \
    }

STATS(64)
STATS(128)
STATS(256)
STATS(512)

// Launched by cuda/attention_backward.rs: attention_backward; grid (key items, K), 256 threads.
#define KEYS(DH, MAKE)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256) attention_backward_keys_##DH(                                       \
        const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o, \
        const float2 *__restrict__ stats, const unsigned *__restrict__ positions, const KeyItem *__restrict__ items,      \
        const unsigned *__restrict__ tokens, bf16 *__restrict__ dk, bf16 *__restrict__ dv, float *__restrict__ partial,   \
        unsigned heads, unsigned kv_heads, Scores scores) {                                                               \
        MAKE(q, k, v, d_o, stats, positions, items, tokens, dk, dv, partial, heads, kv_heads, scores);                    \
    }

KEYS(64, make_dk_dv<64>)
KEYS(128, make_dk_dv<128>)
KEYS(256, make_dk_dv<256>)
KEYS(512, make_dk_dv_wide)

// ROWS: keys of a block of the kernel before.
// Launched by cuda/attention_backward.rs: attention_backward; grid (sum items ROWS Dh / 1024, K, 2), 256 threads.
#define SUM(DH, ROWS)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(256) attention_backward_sum_##DH(                                          \
        const float *__restrict__ partial, const SumItem *__restrict__ items, bf16 *__restrict__ dk, bf16 *__restrict__ dv, \
        unsigned kv_heads) {                                                                                                \
        add_parts<DH, ROWS>(partial, items, dk, dv, kv_heads);                                                              \
    }

SUM(64, STAY)
SUM(128, STAY)
SUM(256, STAY)
SUM(512, WIDE_KEYS)

// Launched by cuda/attention_backward.rs: attention_backward; grid (query items, K), 256 threads.
#define QUERIES(DH, MAKE)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) attention_backward_queries_##DH(                                    \
        const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ d_o, \
        const float2 *__restrict__ stats, const QueryItem *__restrict__ items, const ChainItem *__restrict__ chains,      \
        bf16 *__restrict__ dq, unsigned heads, unsigned kv_heads, Scores scores) {                                        \
        MAKE(q, k, v, d_o, stats, items, chains, dq, heads, kv_heads, scores);                                            \
    }

QUERIES(64, make_dq<64>)
QUERIES(128, make_dq<128>)
QUERIES(256, make_dq<256>)
QUERIES(512, make_dq_wide)
