// Segment attention, forward: o = softmax(cap(scale q k^T)) v and lse = log sum exp of the visible scores, over the
// keys that src/segments.rs makes visible: those of the query's chain of segments with pos_k <= pos_q < pos_k + window.
//
// Order. A row (query, head) has one order of arithmetic, whatever it is batched with and however its sequence is cut
// into segments; so sampling one token at a time and training on all of them give the same bits:
// - Absolute positions are cut into tiles of 64 keys and splits of 8 tiles, wherever the keys' rows lie.
// - Within a split: online softmax over the tiles in order, from a fresh state (m, l, o). With s the row's scores in a
//   tile, in units of log 2: m' = max(m, s), a = 2^(m - m'), p = 2^(s - m'), l = a l + sum p, o = a o + bf16(p) v.
//   The sum over Dh (for s) and over the tile's keys (for o) are chains of mma in steps of 16; l is kept in 16 parts,
//   one for each 16 keys of a tile and lane of a quad, that only meet at the end.
// - The splits' states are merged in order: m = max(m1, m2), l = l1 2^(m1 - m) + l2 2^(m2 - m), o likewise.
// - o / l is rounded once.
// A tile or split that a row cannot see leaves its state as it is, bit for bit: whether it is skipped does not matter.
//
// Work. An item is a tile of rows (the G = H / K heads of a kv head for consecutive queries, so that K and V are read
// once for the group) and a range of key positions that all of them reach through the same rows of K and V. The host
// makes items (src/backend/cuda/attention.rs) for two launches:
// 1. Parts, for queries that come in small runs (decode): one split, or the beginning of one, per item. Streams of
//    one prompt share it: their rows are one problem. The state goes to the workspace.
// 2. Finishers, one for each tile of rows: continue a split that a part began, or walk through all splits from the
//    first visible key (prefill, training), merge with what lies in the workspace, and write o and lse.
// Two shapes, 4 warps each: 64 rows, where a warp has 16 rows, all keys and all columns; and 16 rows, where a warp has
// 16 of a tile's keys for s and a quarter of the columns for o, and p and the maxima pass through shared memory.
//
// Movement, per item of 64 rows and tile of 64 keys at Dh = 256: K and V, 64 KiB, to shared memory for 4 64 64 256 =
// 4.2 MFLOP. From there ldmatrix reads each of them once per warp, and Q once: 4 (32 + 32 + 8) KiB = 288 KiB, or 2304
// cycles at 128 bytes each; the products take 2048 cycles on an A100. So shared memory limits large shapes, closely
// followed by the tensor cores; the 64 KiB come from L2 (for each 64 rows anew), 28 bytes a cycle and SM. An item of 16
// rows does a quarter of the products for the same 64 KiB: memory limits decode. A state that passes through the
// workspace costs 4 (Dh + 17) bytes a row, written and read: for finishers once per split but the last.
// Shared memory: a tile of Q, one of K, one of V: 96 KiB at 64 rows of 256. V comes while s is computed, the next K
// while p v is. Registers: o alone takes 128 of a thread there; s 32, the rest leaves little.

#include "attention.cuh"

constexpr int KEYS = 64;    // keys of a tile
constexpr int SPLIT = 8;    // tiles of a split
constexpr int GROUPS = 4;   // 16 keys each, of a tile
constexpr int THREADS = 128;

// As in src/backend/cuda/attention.rs.
struct Item {
    unsigned first;       // first row, counted query * G + head of the group
    unsigned rows;        // number of rows
    unsigned low, high;   // least and greatest position of its queries
    unsigned begin, end;  // positions of keys; none if equal
    unsigned pieces;      // where its chain begins in the pieces
    unsigned work;        // its first row in slot 0 of the workspace
    unsigned stride;      // rows from slot to slot of the workspace
    unsigned slots;       // split s is in slot s % slots
    unsigned ready;       // splits from this one to that of `begin` lie complete in the workspace
    unsigned kind;        // PART, or a finisher; RESUME
};
constexpr unsigned PART = 1;    // ends in the workspace
constexpr unsigned RESUME = 2;  // begins with the state of its first split in the workspace

// A segment of a chain: keys at positions from the end of the piece before up to `end` are in rows position + delta.
struct Piece {
    unsigned end;
    int delta;
};

// As in src/backend/cuda/attention.rs.
struct Params {
    const bf16 *q, *k, *v;
    bf16 *o;
    float *lse;
    const Item *items;
    const Piece *pieces;
    const unsigned *positions;  // of query rows
    float *work;                // o [K rows, Dh], l [4, K rows, 4], m [K rows]
    unsigned work_rows;
    unsigned group;   // G
    unsigned window;  // at most 2^31, which is none
    float inner;      // scale / c with a soft-cap c, else 0
    float outer;      // (c, or scale) * log2 e
};

template <int DH, int ROWS>
struct Shape {
    static constexpr bool SHARED = ROWS == 16;                      // warps share the rows
    static constexpr int KEY_TILES = SHARED ? 2 : 8;                // n8 tiles of a warp's scores
    static constexpr int PARTS = SHARED ? 1 : GROUPS;               // of l
    static constexpr int COLUMN_TILES = DH / 8 / (SHARED ? 4 : 1);  // n8 tiles of a warp's outputs
};

// A warp's part of the state of 16 rows. Index r of a pair is row lane / 4 + 8 r.
template <int DH, int ROWS>
struct State {
    using S = Shape<DH, ROWS>;
    float m[2];
    float l[S::PARTS][2];
    float o[S::COLUMN_TILES][4];

    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            m[r] = -INFINITY;
#pragma unroll
            for (int p = 0; p < S::PARTS; p++) l[p][r] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < S::COLUMN_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[n][e] = 0.0f;
    }
};

// How two states of a row merge, the first being the earlier keys'. An empty one changes nothing.
struct Merge {
    float m, first, second;
    bool no_first, no_second;

    __device__ Merge(float m1, float m2) : no_first(m1 == -INFINITY), no_second(m2 == -INFINITY) {
        m = fmaxf(m1, m2);
        first = exp2_fast(m1 - m);
        second = exp2_fast(m2 - m);
    }

    __device__ float operator()(float x1, float x2) const {
        const float x = __fmaf_rn(x1, first, __fmul_rn(x2, second));
        return no_first ? x2 : no_second ? x1 : x;
    }
};

// What a warp of a block is and has.
template <int DH, int ROWS>
struct Block {
    using S = Shape<DH, ROWS>;
    const Params &p;
    const Item item;
    const int lane, warp, quad, t;  // quad: lane / 4, t: lane % 4
    const int row0, key0, column0;  // the warp's first row, key of a tile, column
    bf16 *const sq, *const sk, *const sv, *const sp;
    float (*const exchange)[16];

    __device__ Block(const Params &p, bf16 *shared)
        : p(p), item(p.items[blockIdx.x]), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), quad(lane / 4),
          t(lane % 4), row0(S::SHARED ? 0 : 16 * warp), key0(S::SHARED ? 16 * warp : 0),
          column0(S::SHARED ? warp * DH / 4 : 0), sq(shared), sk(sq + ROWS * DH), sv(sk + KEYS * DH),
          sp(sv + KEYS * DH), exchange(reinterpret_cast<float(*)[16]>(sp + 16 * KEYS)) {}

    // The item where it lies, for what is seldom needed: it would cost registers in the loop.
    __device__ const Item &cold() const { return p.items[blockIdx.x]; }

    // Row `row` of the item in q, o (in heads) and lse.
    __device__ size_t head_of(unsigned row) const {
        const unsigned f = cold().first + row;
        return (size_t(f / p.group) * gridDim.y + blockIdx.y) * p.group + f % p.group;
    }

    // Row lane / 4 + 8 r of the warp's.
    __device__ unsigned row(int r) const { return row0 + quad + 8 * r; }

    __device__ void load_queries() const {
        constexpr int PIECES = DH / PIECE, STEP = THREADS / PIECES;
        const int piece = threadIdx.x % PIECES;
#pragma unroll 2
        for (int row = threadIdx.x / PIECES; row < ROWS; row += STEP) {
            const bool inside = row < item.rows;
            copy_async(sq + place<DH>(row, piece), p.q + (inside ? head_of(row) * DH + piece * PIECE : 0), inside);
        }
    }

    // Starts copying the keys (or values) of a tile. `chain` is the piece of the tile's first key and moves on.
    // Positions outside [begin, end) become zeros.
    __device__ void load_keys(bf16 *to, const bf16 *from, unsigned tile, unsigned &chain) const {
        constexpr int PIECES = DH / PIECE, STEP = THREADS / PIECES;
        const int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
        const unsigned begin = item.begin, end = item.end, start = max(tile * KEYS, begin);
        while (p.pieces[chain].end <= start) chain++;
        const Piece here = p.pieces[chain];
        // For place(row + i, piece) with little to compute: i is a multiple of 8, or of 4 where row < 4.
        const int first = place<DH>(row, piece);
        from += blockIdx.y * DH + piece * PIECE;
#pragma unroll 2
        for (int i = 0; i < KEYS; i += STEP) {
            const unsigned position = tile * KEYS + row + i;
            const bool inside = position >= begin && position < end;
            unsigned key = 0;
            if (inside) {
                int delta = here.delta;
                if (position >= here.end) {
                    unsigned next = chain + 1;
                    while (position >= p.pieces[next].end) next++;
                    delta = p.pieces[next].delta;
                }
                key = position + delta;
            }
            copy_async(to + (first ^ i % 8 * PIECE) + i * DH, from + size_t(key) * gridDim.y * DH, inside);
        }
    }

    // s = q k^T of the warp's rows and keys.
    __device__ void scores(float (&s)[S::KEY_TILES][4]) const {
#pragma unroll
        for (int n = 0; n < S::KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = 0.0f;
        const int query = place<DH>(row0 + lane % 16, lane / 16);
        const int key = place<DH>(key0 + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int d = 0; d < DH / 16; d++) {
            unsigned a[4];
            load_matrix(a, sq + moved<DH>(query, 0, 2 * d));
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n += 2) {
                unsigned b[4];
                load_matrix(b, sk + moved<DH>(key, 8 * n, 2 * d));
                mma(s[n], a, b[0], b[1]);
                mma(s[n + 1], a, b[2], b[3]);
            }
        }
    }

    // The soft-cap without its factor, and the mask.
    __device__ void cap_and_mask(float (&s)[S::KEY_TILES][4], unsigned tile) const {
        if (p.inner != 0.0f) {
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[n][e] = tanh_accurate(s[n][e] * p.inner);
        }
        const unsigned base = tile * KEYS;
        if (base + KEYS - 1 <= cold().low && cold().high - base < p.window) return;
        unsigned position[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
            position[r] = row(r) < item.rows ? p.positions[(cold().first + row(r)) / p.group] : 0;
#pragma unroll
        for (int n = 0; n < S::KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const unsigned key = base + key0 + 8 * n + 2 * t + e % 2;
                // Keys after the query wrap around to 2^31 and more.
                if (position[e / 2] - key >= p.window) s[n][e] = -INFINITY;
            }
    }

    // The greatest of each row's scores among the warp's keys.
    __device__ void maxima(const float (&s)[S::KEY_TILES][4], float (&most)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            most[r] = -INFINITY;
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n++) most[r] = fmaxf(most[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            most[r] = fmaxf(most[r], __shfl_xor_sync(ALL, most[r], 1));
            most[r] = fmaxf(most[r], __shfl_xor_sync(ALL, most[r], 2));
        }
    }

    // Online softmax: scores become p; m, l and o move on to the new maximum.
    __device__ void softmax(float (&s)[S::KEY_TILES][4], const float (&most)[2], State<DH, ROWS> &state) const {
        float scale[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float m = fmaxf(state.m[r], most[r] * p.outer);
            const float shift = m == -INFINITY ? 0.0f : m;  // nothing seen yet: p = 2^-inf = 0
            scale[r] = exp2_fast(state.m[r] - shift);
            state.m[r] = m;
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n++) {
                s[n][2 * r] = exp2_fast(__fmaf_rn(s[n][2 * r], p.outer, -shift));
                s[n][2 * r + 1] = exp2_fast(__fmaf_rn(s[n][2 * r + 1], p.outer, -shift));
            }
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) {
                const float(&a)[4] = s[2 * i], (&b)[4] = s[2 * i + 1];
                const float sum = __fadd_rn(__fadd_rn(a[2 * r], a[2 * r + 1]), __fadd_rn(b[2 * r], b[2 * r + 1]));
                state.l[i][r] = __fmaf_rn(state.l[i][r], scale[r], sum);
            }
        }
        // Maxima settle early; products with 1 are not missed.
        if (__any_sync(ALL, scale[0] != 1.0f || scale[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) state.o[n][e] *= scale[e / 2];
        }
    }

    __device__ static unsigned pack(float low, float high) {
        const bf162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const unsigned &>(pair);
    }

    // The warp's p into shared memory, for all warps.
    __device__ void share(const float (&s)[S::KEY_TILES][4]) const {
#pragma unroll
        for (int n = 0; n < S::KEY_TILES; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bf16 *to = sp + swizzled(quad + 8 * r, key0 / 8 + n) + 2 * t;
                *reinterpret_cast<unsigned *>(to) = pack(s[n][2 * r], s[n][2 * r + 1]);
            }
    }

    // o += p v of the warp's rows and columns.
    __device__ void outputs(const float (&s)[S::KEY_TILES][4], State<DH, ROWS> &state) const {
        const int value = place<DH>(lane % 16, column0 / 8 + lane / 16);
#pragma unroll
        for (int j = 0; j < GROUPS; j++) {
            unsigned a[4];
            if constexpr (S::SHARED) {
                load_matrix(a, sp + swizzled(lane % 16, 2 * j + lane / 16));
            } else {
                // A fragment of the product of s is two of p's.
                a[0] = pack(s[2 * j][0], s[2 * j][1]);
                a[1] = pack(s[2 * j][2], s[2 * j][3]);
                a[2] = pack(s[2 * j + 1][0], s[2 * j + 1][1]);
                a[3] = pack(s[2 * j + 1][2], s[2 * j + 1][3]);
            }
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n += 2) {
                unsigned b[4];
                load_matrix_transposed(b, sv + moved<DH>(value, 16 * j, n));
                mma(state.o[n], a, b[0], b[1]);
                mma(state.o[n + 1], a, b[2], b[3]);
            }
        }
    }

    // Where row(r) lies in the workspace's slot of a split.
    __device__ size_t work_row(unsigned split, int r) const {
        // Computed where it is needed: the compiler would do it before the loop, at the cost of registers there.
        asm volatile("" : "+r"(split));
        return size_t(blockIdx.y) * p.work_rows + cold().work + split % cold().slots * cold().stride + row(r);
    }
    __device__ float2 *work_o(size_t row, int n) const {
        return reinterpret_cast<float2 *>(p.work + row * DH + column0 + 8 * n + 2 * t);
    }
    __device__ float *work_l(size_t row, int i) const {
        const size_t rows = size_t(gridDim.y) * p.work_rows, part = key0 / 16 + i;
        return p.work + rows * DH + (part * rows + row) * 4 + t;
    }
    __device__ float *work_m(size_t row) const {
        return p.work + size_t(gridDim.y) * p.work_rows * (DH + 16) + row;
    }

    __device__ void store(unsigned split, const State<DH, ROWS> &state) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (row(r) >= item.rows) continue;
            const size_t to = work_row(split, r);
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n++)
                *work_o(to, n) = make_float2(state.o[n][2 * r], state.o[n][2 * r + 1]);
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) *work_l(to, i) = state.l[i][r];
            // All lanes and warps that share a row have the same m.
            if (t == 0 && (!S::SHARED || warp == 0)) *work_m(to) = state.m[r];
        }
    }

    __device__ void load(unsigned split, State<DH, ROWS> &state) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (row(r) >= item.rows) continue;
            const size_t from = work_row(split, r);
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n++) {
                const float2 x = *work_o(from, n);
                state.o[n][2 * r] = x.x;
                state.o[n][2 * r + 1] = x.y;
            }
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) state.l[i][r] = *work_l(from, i);
            state.m[r] = *work_m(from);
        }
    }

    // Merges the state with what lies in a split's slot, whose keys are the earlier ones; with `earlier` the state's
    // are.
    template <bool earlier>
    __device__ void merge(unsigned split, State<DH, ROWS> &state) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (row(r) >= item.rows) continue;
            const size_t from = work_row(split, r);
            const float m = *work_m(from);
            const Merge both = earlier ? Merge(state.m[r], m) : Merge(m, state.m[r]);
            const auto into = [&](float &mine, float other) {
                mine = earlier ? both(mine, other) : both(other, mine);
            };
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n++) {
                const float2 x = *work_o(from, n);
                into(state.o[n][2 * r], x.x);
                into(state.o[n][2 * r + 1], x.y);
            }
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) into(state.l[i][r], *work_l(from, i));
            state.m[r] = both.m;
        }
    }

    // o / l and lse; zero and -inf for a row that saw nothing.
    __device__ void finish(const State<DH, ROWS> &state) const {
        float inverse[2];
        float total[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float part[S::PARTS];
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) {
                part[i] = state.l[i][r];
                part[i] += __shfl_xor_sync(ALL, part[i], 1);
                part[i] += __shfl_xor_sync(ALL, part[i], 2);
            }
            if constexpr (S::SHARED) {
                if (t == 0) exchange[warp][quad + 8 * r] = part[0];
            } else {
                total[r] = ((part[0] + part[1]) + part[2]) + part[3];
            }
        }
        if constexpr (S::SHARED) {
            __syncthreads();  // the parts of l are there; no warp needs Q any more
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int i = quad + 8 * r;
                total[r] = ((exchange[0][i] + exchange[1][i]) + exchange[2][i]) + exchange[3][i];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            inverse[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
            if (t == 0 && (!S::SHARED || warp == 0) && row(r) < item.rows)
                p.lse[head_of(row(r))] = fmaf(state.m[r], LN_2, logf(total[r]));
        }
        // Through the warp's rows and columns of the tile of Q, so that whole rows are written.
#pragma unroll
        for (int n = 0; n < S::COLUMN_TILES; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bf16 *to = sq + place<DH>(row(r), column0 / 8 + n) + 2 * t;
                *reinterpret_cast<unsigned *>(to) =
                    pack(state.o[n][2 * r] * inverse[r], state.o[n][2 * r + 1] * inverse[r]);
            }
        __syncwarp();  // other lanes wrote what this one reads
        constexpr int PIECES = S::COLUMN_TILES;
#pragma unroll 2
        for (int i = lane; i < 16 * PIECES; i += WARP) {
            const unsigned row = row0 + i / PIECES;
            const int piece = column0 / 8 + i % PIECES;
            if (row < item.rows)
                *reinterpret_cast<uint4 *>(p.o + head_of(row) * DH + piece * PIECE) =
                    *reinterpret_cast<const uint4 *>(sq + place<DH>(row, piece));
        }
    }

    __device__ void run() const {
        State<DH, ROWS> state;
        state.clear();
        if (item.begin == item.end) {  // rows that belong to no run
            finish(state);
            return;
        }
        unsigned tile = item.begin / KEYS;
        const unsigned stop = (item.end + KEYS - 1) / KEYS;
        const bool active = row0 < item.rows;  // a warp without rows only helps to copy

        unsigned chain = item.pieces;
        load_queries();
        load_keys(sk, p.k, tile, chain);
        copy_commit();

        // Splits before this one that parts have done: merged into the slot of the first.
        if (item.ready + 1 < tile / SPLIT) {
            load(item.ready, state);
            for (unsigned split = item.ready + 1; split < tile / SPLIT; split++) merge<true>(split, state);
            __syncthreads();  // all have read the slot's maxima
            store(item.ready, state);
            state.clear();
        }
        if (item.kind & RESUME) load(tile / SPLIT, state);

        for (; tile < stop; tile++) {
            const bool more = tile + 1 < stop;
            copy_wait<0>();
            __syncthreads();  // the tile of K (and Q) is there for all; all have left V, p and the maxima
            load_keys(sv, p.v, tile, chain);
            copy_commit();
            float s[S::KEY_TILES][4], most[2];
            if (active) {
                scores(s);
                cap_and_mask(s, tile);
                maxima(s, most);
            }
            if constexpr (S::SHARED) {
                if (t == 0) {
                    exchange[warp][quad] = most[0];
                    exchange[warp][quad + 8] = most[1];
                }
                __syncthreads();  // the maxima are there; all have left the tile of K
                // Memory limits this shape: the next K follows at once.
                if (more) load_keys(sk, p.k, tile + 1, chain);
                copy_commit();
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int i = quad + 8 * r;
                    most[r] =
                        fmaxf(fmaxf(exchange[0][i], exchange[1][i]), fmaxf(exchange[2][i], exchange[3][i]));
                }
                softmax(s, most, state);
                share(s);
                copy_wait<1>();
                __syncthreads();  // the tile of V is there for all, and p
            } else {
                if (active) softmax(s, most, state);
                copy_wait<0>();
                __syncthreads();  // the tile of V is there for all; all have left the tile of K
                if (more) load_keys(sk, p.k, tile + 1, chain);
                copy_commit();
            }
            if (!active) continue;
            outputs(s, state);

            if (more && (tile + 1) % SPLIT != 0) continue;
            if (item.kind & PART) {
                store(tile / SPLIT, state);
                continue;
            }
            if (tile / SPLIT > item.ready) merge<false>(item.ready, state);
            if (!more) continue;
            if constexpr (S::SHARED)
                __syncthreads();  // all that share a row have read its maximum in the slot
            else
                __syncwarp();  // likewise
            // A thread reads back what it stored itself, except for the maxima: before that there are barriers.
            store(item.ready, state);
            state.clear();
        }
        if (!(item.kind & PART) && (S::SHARED || active)) finish(state);
    }
};

template <int DH, int ROWS>
__device__ __forceinline__ void forward(const Params &p) {
    extern __shared__ uint4 shared[];
    const Block<DH, ROWS> block(p, reinterpret_cast<bf16 *>(shared));
    block.run();
}

// Grid: (items, K). Shared memory: (rows + 128) Dh bf16; with 16 rows 2304 bytes more.
// Four blocks: ptxas aims at 128 registers here in any case, and spills a few on sm_80 unless they are asked for.
extern "C" __global__ void __launch_bounds__(128, 4) attention_forward_64_rows_64(const __grid_constant__ Params p) {
    forward<64, 64>(p);
}
extern "C" __global__ void __launch_bounds__(128) attention_forward_128_rows_64(const __grid_constant__ Params p) {
    forward<128, 64>(p);
}
extern "C" __global__ void __launch_bounds__(128) attention_forward_256_rows_64(const __grid_constant__ Params p) {
    forward<256, 64>(p);
}
extern "C" __global__ void __launch_bounds__(128) attention_forward_64_rows_16(const __grid_constant__ Params p) {
    forward<64, 16>(p);
}
extern "C" __global__ void __launch_bounds__(128) attention_forward_128_rows_16(const __grid_constant__ Params p) {
    forward<128, 16>(p);
}
extern "C" __global__ void __launch_bounds__(128) attention_forward_256_rows_16(const __grid_constant__ Params p) {
    forward<256, 16>(p);
}
