// Segment attention, forward: o = softmax(cap(scale q k^T)) v, and lse = log sum exp of the visible scores. Visible to a query
// are the keys of its chain of segments (src/segments.rs) with pos_k <= pos_q < pos_k + window.
//
// Order. A row (query, head) has one order of arithmetic, whatever the other rows of the batch are and however its sequence is
// cut into segments. Sampling one token at a time and training on all tokens at once give the same bits therefore.
// - Absolute positions are cut into splits of 128 keys, two tiles of 64 keys each, wherever the rows of the keys lie.
// - Within a split: online softmax over its tiles from an empty state (m, l, o). With s the row's scores in a tile, in units
//   of log 2: m' = max(m, s), a = 2^(m - m'), p = 2^(s - m'), l = a l + sum p, o = a o + bf16(p) v. The sums over Dh (for s)
//   and over the tile's keys (for o) are chains of mma in steps of 16; `quad_sum` defines the order of the sum of p.
// - Splits are merged in ascending order: m = max(m1, m2), l = l1 2^(m1 - m) + l2 2^(m2 - m), o likewise.
// - o / l is rounded once.
// A tile or split of which a row sees no key leaves the row's state unchanged, bit for bit. Skipping it changes nothing.
//
// Work. An item is a tile of rows (the G = H / K heads of a kv head for consecutive queries, so that K and V are read once for
// the group) and a range of key positions that all of these queries reach through the same rows of K and V. The host makes the
// list of items (src/backend/cuda/attention.rs):
// - A whole item walks through all splits of its rows and writes o and lse. Prefill and training consist of these.
// - A part, for queries that come in small runs (decode), does one split and stores its state (m, l, o) in the workspace. The
//   streams of a prompt share the parts over the prompt's keys, where their rows are one tile; each stream has parts over its
//   own keys. All keys of a decode step are read at the same time, therefore, by as many blocks as there are splits. A second
//   launch merges the stored states.
// There are two shapes of items, 4 warps each. With 64 rows, a warp has 16 rows, all keys and all columns. With 16 rows and one
// split, all warps have the same rows; a warp computes s for 16 of a tile's keys and o for a quarter of the columns, and the
// warps exchange p and the row maxima through shared memory.
// Items of 64 rows of 512 columns are wide: o would take 256 registers of each thread, and so they have 8 warps. Four of them
// have the same 32 rows; a warp computes s for 32 of a split's keys and o for a quarter of the columns. They exchange p, the row
// maxima and the sums of p.
//
// Merging a split with the splits before it needs two o, and at 64 rows of 256 columns a thread has registers for only one. V
// is therefore processed in two halves of the columns, each half over both tiles: the o of the split is computed for 16
// columns at a time, over all keys of the split, and merged at once. No state goes through memory, however many splits there
// are.
//
// Movement of a whole item of 64 rows, per tile of 64 keys at Dh = 256: K and V, 64 KiB, are copied to shared memory for
// 4 64 64 256 = 4.2 MFLOP. From shared memory ldmatrix reads K and V once per warp, and Q once: 4 (32 + 32 + 8) KiB = 288 KiB,
// which take 2304 cycles at 128 bytes each. The products take 2048 cycles on an A100. The limit of large shapes is shared
// memory, closely followed by the tensor cores. The 64 KiB come from L2, again for every 64 rows: 28 bytes a cycle for each SM.
// A tile of 16 rows does a quarter of the products for the same 64 KiB, with half of the wavefronts. The state of a part costs
// 4 (Dh + 2) bytes a row, written and read.
// A wide item, per split of 128 keys: 256 KiB of K and V are copied for 16.8 MFLOP. An ldmatrix of K or V feeds the products of
// 32 rows, and one of Q those of 32 keys: a warp reads 32 KiB of Q, of K and of V and 8 KiB of p, 8 (32 + 32 + 32 + 8) KiB = 832
// KiB for all, in 6656 cycles, and the copies write for 2048. The products take 8192 cycles on an A100: shared memory and tensor
// cores are about as busy. (Warps with 16 rows and 64 keys, and half of the columns of o, would read 1184 KiB.) 29 bytes a cycle
// come from L2.
// Shared memory: Q, and two buffers, of which one is filled while the other is read; each holds a tile of K or half of the
// columns of a split's V. At 64 rows of 256 that is 96 KiB. Registers of a thread at that shape: 128 for o, 48 for s and for p.
// At a width of 512 that would be more than the 99 KiB that a block can have on GPUs of compute capability 8.6, 8.9 and 12.0. With
// 16 rows, a buffer holds half of a tile there, of K half of the columns and of V half of the keys: 82.5 KiB with Q. A wide item's
// buffer holds 64 columns of a split, 16 KiB: 98.5 KiB. p of a split, 16 KiB too, lies in a buffer between the last columns of K
// and the second of V, and is then kept in 64 registers beside the 128 for o.

#include "attention.cuh"

constexpr int KEYS = 64;       // shared: keys of a tile
constexpr int TILES = 2;       // shared: tiles of a split
constexpr int GROUPS = 4;      // groups of 16 keys of a tile
constexpr int THREADS = 128;   // shared
constexpr int WIDE_THREADS = 256;  // shared: of a block of items of 64 rows at Dh = 512
constexpr int WIDE_COLUMNS = 64;   // shared: columns of a stage of such items
constexpr int LOADS = 4;       // states that a thread of the merge loads before it uses the first

// A block's work: a tile of rows and a range of key positions.
struct Item {  // shared
    unsigned first;       // first row, counted query * G + head of the group
    unsigned rows;        // number of rows; 0: the item has no work
    unsigned low, high;   // least and greatest position of its queries
    unsigned begin, end;  // positions of keys; none if equal
    unsigned chain;       // index in `chains` of the first segment of its chain
    unsigned work_row;    // of a part: first row in the workspace
    unsigned kind;        // bits PART, FEW
};
static_assert(sizeof(Item) == 36);
constexpr unsigned PART = 1;  // shared: the item stores a state in the workspace
constexpr unsigned FEW = 2;   // shared: at most 16 rows, and keys of one split: the warps have the same rows

// Rows whose splits are merged.
struct MergeItem {  // shared
    unsigned first, rows;  // as in Item
    unsigned work_row;     // row in the workspace of the first row's first split
    unsigned stride;       // rows of the workspace from split to split
    unsigned splits;       // number of splits
};
static_assert(sizeof(MergeItem) == 20);

// The arguments of all kernels; a kernel uses some of them.
struct Params {  // shared
    const bf16 *q, *k, *v;
    bf16 *o;
    float *lse;
    const Item *items;
    const MergeItem *merge_items;
    const ChainItem *chains;
    const unsigned *positions;  // of the query rows
    float *work;                // the workspace: o [K, work_rows, Dh], then (m, l) [K, work_rows, 2]
    unsigned work_rows;
    unsigned group;   // G
    unsigned window;  // at most 2^31, which means no window
    float inner;      // scale / c with a soft-cap c, else 0
    float outer;      // c log2(e) with a soft-cap c, else scale log2(e)
};
static_assert(sizeof(Params) == 104);

// Index in [T, H] of row f of this kv head, f counted query * G + head of the group: a row of q, o and lse.
__device__ __forceinline__ size_t head_of(const Params &p, unsigned f) {
    return (size_t(f / p.group) * gridDim.y + blockIdx.y) * p.group + f % p.group;
}

// The state of row `row` of this kv head in the workspace: its o, and its (m, l).
template <int DH>
__device__ __forceinline__ float *work_o(const Params &p, size_t row) {
    return p.work + (size_t(blockIdx.y) * p.work_rows + row) * DH;
}
template <int DH>
__device__ __forceinline__ float2 *work_ml(const Params &p, size_t row) {
    float *const first = p.work + size_t(gridDim.y) * p.work_rows * DH;
    return reinterpret_cast<float2 *>(first) + size_t(blockIdx.y) * p.work_rows + row;
}

// Merges two states of a row, the first of earlier keys than the second. An empty state has l = o = +0 and changes no bit of
// the other: its factor is -0, and +0 times -0 is -0, which changes no number that it is added to.
struct Merge {
    float m, first, second;

    __device__ Merge(float m1, float m2) {
        m = fmaxf(m1, m2);
        const bool no_first = m1 == -INFINITY, no_second = m2 == -INFINITY;
        first = no_first ? -0.0f : exp2_approx(m1 - m);
        second = no_first ? 1.0f : no_second ? -0.0f : exp2_approx(m2 - m);
    }

    __device__ float operator()(float x1, float x2) const { return __fmaf_rn(x1, first, __fmul_rn(x2, second)); }
};

// 1 / l, and lse, of a row with the state (m, l). A row that saw no key has the inverse 0 and the lse -inf.
__device__ __forceinline__ float inverse_of(float l) { return l == 0.0f ? 0.0f : 1.0f / l; }
__device__ __forceinline__ float lse_of(float m, float l) { return fmaf(m, LN_2, logf(l)); }

// The last step of a tile's sum of p. Before it, a thread has added its four p of each group of 16 keys, and then its groups;
// `quad_sum` adds the sums of the four threads of a quad.
__device__ __forceinline__ float quad_sum(float l) {
    l = __fadd_rn(l, __shfl_xor_sync(ALL, l, 1));
    return __fadd_rn(l, __shfl_xor_sync(ALL, l, 2));
}

template <int DH, int ROWS>
struct Shape {
    static constexpr bool SHARED = ROWS == 16;                 // whether all warps have the same rows
    static constexpr bool WIDE = !SHARED && DH == 512;         // whether four of eight warps have the same rows
    static constexpr int ROW_TILES = WIDE ? 2 : 1;             // m16 tiles of a warp's rows
    static constexpr int KEY_TILES = SHARED ? 2 : WIDE ? 4 : 8;  // n8 tiles of a warp's scores in a tile of keys
    static constexpr int COLUMN_TILES = DH / 8 / (SHARED || WIDE ? 4 : 1);  // n8 tiles of a warp's outputs
    static constexpr int CHUNKS = SHARED && DH == 512 ? 2 : 1;  // stages of a tile of K, or of V, if `SHARED`
    // Elements of Q, whose memory p reuses, and of a buffer.
    static constexpr int QUERIES = SHARED && DH < TILES * KEYS ? ROWS * TILES * KEYS : ROWS * DH;
    static constexpr int BUFFER = WIDE ? TILES * KEYS * WIDE_COLUMNS : KEYS * DH / CHUNKS;
};

// A warp's part of the state of 16 rows. m[r] and l[r] belong to row lane / 4 + 8 r.
template <int DH, int ROWS>
struct State {
    float m[2], l[2];
    float o[Shape<DH, ROWS>::COLUMN_TILES][4];

    __device__ void clear() {
#pragma unroll
        for (int r = 0; r < 2; r++) m[r] = -INFINITY, l[r] = 0.0f;
#pragma unroll
        for (int n = 0; n < Shape<DH, ROWS>::COLUMN_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[n][e] = 0.0f;
    }
};

// A block's item, its buffers in shared memory, and the position of this thread's warp in the tile.
template <int DH, int ROWS>
struct Block {
    using S = Shape<DH, ROWS>;
    using Scores = float[S::KEY_TILES][4];  // a warp's scores of 16 rows in a tile of keys
    using Sums = float[S::KEY_TILES / 2][2];  // sums of p, of each 16 keys, for rows lane / 4 + 8 r
    const Params &p;
    const Item item;
    static constexpr int COLUMNS = 8 * S::COLUMN_TILES;  // of a warp's outputs
    const int lane, warp, quad, t;                       // quad: lane / 4, t: lane % 4
    const int row0, key0;  // the warp's first row, and first key in a tile
    const int across;      // number of this warp among those that have the same rows
    bf16 *const sq, *const sa, *const sb;  // Q; the two buffers

    __device__ Block(const Params &p, bf16 *shared)
        : p(p), item(p.items[blockIdx.x]), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), quad(lane / 4),
          t(lane % 4), row0(S::SHARED ? 0 : S::WIDE ? warp / 4 * 32 : 16 * warp),
          key0(S::SHARED ? 16 * warp : S::WIDE ? warp % 2 * 32 : 0), across(S::SHARED ? warp : S::WIDE ? warp % 4 : 0),
          sq(shared), sa(sq + S::QUERIES), sb(sa + S::BUFFER) {}

    // For the fields of the item that are rarely used. At 64 rows it reads them from global memory again, because kept in
    // registers they would cost the main loop some (common.cuh has the figures).
    __device__ const Item &item_in_memory() const {
        if constexpr (S::SHARED)
            return item;
        else
            return p.items[blockIdx.x];
    }

    // Row of the tile that this thread's m[r] and l[r] belong to, of m16 tile i of the warp's rows.
    __device__ unsigned row(int r, int i = 0) const { return row0 + 16 * i + quad + 8 * r; }

    // Column of a row of o at which n8 tile n of the warp's outputs begins. A wide item's warp has 16 of each stage's columns.
    __device__ int column(int n) const {
        if constexpr (S::WIDE)
            return n / 2 * WIDE_COLUMNS + 16 * across + n % 2 * 8;
        else
            return COLUMNS * across + 8 * n;
    }

    __device__ void load_queries() const {
        constexpr int VECTORS = DH / VECTOR, STEP = (S::WIDE ? WIDE_THREADS : THREADS) / VECTORS;
        const int vector = threadIdx.x % VECTORS;
#pragma unroll 2
        for (int row = threadIdx.x / VECTORS; row < ROWS; row += STEP) {
            const bool inside = row < item.rows;
            const size_t from = inside ? head_of(p, item_in_memory().first + row) * DH + vector * VECTOR : 0;
            copy_async(sq + swizzled_row<DH>(row, vector), p.q + from, inside);
        }
    }

    // Starts the copies of WIDTH columns, from `column` on, of the keys (or values) of `tiles` tiles from tile `tile` on, or of
    // COUNT keys of that tile from its key `skip` on. Rows of positions outside [begin, end) become zeros.
    template <int WIDTH, int COUNT = KEYS>
    __device__ void load(bf16 *to, const bf16 *from, int column, unsigned tile, unsigned tiles, unsigned skip = 0) const {
        constexpr int VECTORS = WIDTH / VECTOR, STEP = THREADS / VECTORS;
        const int vector = threadIdx.x % VECTORS, row = threadIdx.x / VECTORS;
        const unsigned begin = item.begin, end = item.end;
        unsigned chain = item_in_memory().chain;
        while (p.chains[chain].end <= max(tile * KEYS, begin)) chain++;
        const ChainItem here = p.chains[chain];
        // The offset of row + i is computed from that of `row` by one exclusive or, because i is a multiple of 8, or of STEP where
        // row < STEP.
        const int first = swizzled_row<WIDTH>(row, vector);
        from += blockIdx.y * DH + column + vector * VECTOR;
#pragma unroll 2
        for (int i = 0; i < tiles * COUNT; i += STEP) {
            const unsigned position = tile * KEYS + skip + row + i;
            const bool inside = position >= begin && position < end;
            unsigned key = 0;
            if (inside) {
                int delta = here.delta;
                if (position >= here.end) {
                    unsigned next = chain + 1;
                    while (position >= p.chains[next].end) next++;
                    delta = p.chains[next].delta;
                }
                key = position + delta;
            }
            copy_async(to + (first ^ i % 8 * VECTOR) + i * WIDTH, from + size_t(key) * gridDim.y * DH, inside);
        }
    }

    __device__ void load_keys(bf16 *to, unsigned tile) const {
        load<DH>(to, p.k, 0, tile, 1);
    }

    // s += q k^T over the WIDTH columns from `column` on, which are in `sk`, for the warp's rows and its keys. The first of its
    // keys is row `first_key` of `sk`.
    template <int WIDTH>
    __device__ void scores(Scores (&s)[S::ROW_TILES], const bf16 *sk, int first_key, int column = 0) const {
        const int query = swizzled_row<DH>(row0 + lane % 16, lane / 16);
        const int key = swizzled_row<WIDTH>(first_key + lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
        for (int d = 0; d < WIDTH / 16; d++) {
            unsigned a[S::ROW_TILES][4];
#pragma unroll
            for (int i = 0; i < S::ROW_TILES; i++)
                load_matrix(a[i], sq + moved<DH>(query, 16 * i, column / VECTOR + 2 * d));
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n += 2) {
                unsigned b[4];
                load_matrix(b, sk + moved<WIDTH>(key, 8 * n, 2 * d));
#pragma unroll
                for (int i = 0; i < S::ROW_TILES; i++) {
                    mma(s[i][n], a[i], b[0], b[1]);
                    mma(s[i][n + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    // Applies the soft-cap without its factor c, which `outer` contains, and sets the scores of invisible keys to -inf. The
    // rows are those of m16 tile i.
    __device__ void cap_and_mask(Scores &s, unsigned tile, int i = 0) const {
        if (p.inner != 0.0f) {
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[n][e] = tanh_relative(s[n][e] * p.inner);
        }
        const unsigned base = tile * KEYS;
        if (base + KEYS - 1 <= item_in_memory().low && item_in_memory().high - base < p.window) return;
        unsigned position[2];
#pragma unroll
        for (int r = 0; r < 2; r++)
            position[r] = row(r, i) < item.rows ? p.positions[(item_in_memory().first + row(r, i)) / p.group] : 0;
#pragma unroll
        for (int n = 0; n < S::KEY_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const unsigned key = base + key0 + 8 * n + 2 * t + e % 2;
                // For keys after the query the difference wraps around to 2^31 or more.
                if (position[e / 2] - key >= p.window) s[n][e] = -INFINITY;
            }
    }

    // The largest score of each row among the warp's keys.
    __device__ void maxima(const Scores &s, float (&row_max)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            row_max[r] = -INFINITY;
#pragma unroll
            for (int n = 0; n < S::KEY_TILES; n++) row_max[r] = fmaxf(row_max[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
            row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(ALL, row_max[r], 1));
            row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(ALL, row_max[r], 2));
        }
    }

    // Updates m, given a row's maximum of a tile's scores. The caller multiplies by the result the sums that belong to the old m.
    __device__ float advance(float row_max, float &m) const {
        const float before = m;
        m = fmaxf(before, row_max * p.outer);
        return exp2_approx(before - shift_of(m));
    }
    // What is subtracted from scores. Where no key was seen yet, p = 2^-inf = 0.
    __device__ static float shift_of(float m) { return m == -INFINITY ? 0.0f : m; }

    // p as operand fragments of 16 keys (two n8 tiles of s each), and this thread's part of the sum of p of each 16 keys.
    __device__ void exponentials(const Scores &s, const float (&m)[2], unsigned (*fragments)[4], Sums &sums) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float shift = shift_of(m[r]);
#pragma unroll
            for (int j = 0; j < S::KEY_TILES / 2; j++) {
                float x[4];
#pragma unroll
                for (int i = 0; i < 4; i++)
                    x[i] = exp2_approx(__fmaf_rn(s[2 * j + i / 2][2 * r + i % 2], p.outer, -shift));
                fragments[j][r] = pack_bf16(x[0], x[1]);
                fragments[j][2 + r] = pack_bf16(x[2], x[3]);
                sums[j][r] = __fadd_rn(__fadd_rn(x[0], x[1]), __fadd_rn(x[2], x[3]));
            }
        }
    }

    // Adds the sums of all groups of 16 keys that the warp has, in ascending order.
    __device__ static float added(const Sums &sums, int r) {
        float sum = sums[0][r];
#pragma unroll
        for (int j = 1; j < S::KEY_TILES / 2; j++) sum = __fadd_rn(sum, sums[j][r]);
        return sum;
    }

    // Stores the state of m16 tile i of the warp's rows in the workspace.
    __device__ void store(const State<DH, ROWS> &state, int i) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            if (row(r, i) >= item.rows) continue;
            const size_t to = size_t(item_in_memory().work_row) + row(r, i);
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n++)
                *reinterpret_cast<float2 *>(work_o<DH>(p, to) + column(n) + 2 * t) =
                    make_float2(state.o[n][2 * r], state.o[n][2 * r + 1]);
            // All lanes and warps that share a row have the same m and l.
            if (t == 0 && across == 0) *work_ml<DH>(p, to) = make_float2(state.m[r], state.l[r]);
        }
    }

    // o / l and lse of m16 tile i of the warp's rows; zero and -inf for a row that saw nothing. These rows of Q are needed no
    // more.
    __device__ void finish(const State<DH, ROWS> &state, int i = 0) const {
        float inverse[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            inverse[r] = inverse_of(state.l[r]);
            if (t == 0 && across == 0 && row(r, i) < item.rows)
                p.lse[head_of(p, item_in_memory().first + row(r, i))] = lse_of(state.m[r], state.l[r]);
        }
        // o passes through a part of these rows of Q's memory that is the warp's, so that global memory is written in whole
        // vectors.
        constexpr int VECTORS = S::COLUMN_TILES;
#pragma unroll
        for (int n = 0; n < S::COLUMN_TILES; n++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                bf16 *to = sq + swizzled_row<DH>(row(r, i), VECTORS * across + n) + 2 * t;
                *reinterpret_cast<unsigned *>(to) =
                    pack_bf16(state.o[n][2 * r] * inverse[r], state.o[n][2 * r + 1] * inverse[r]);
            }
        __syncwarp();  // a lane reads what other lanes wrote
#pragma unroll 2
        for (int j = lane; j < 16 * VECTORS; j += WARP) {
            const unsigned row = row0 + 16 * i + j / VECTORS;
            const int n = j % VECTORS;
            if (row < item.rows)
                *reinterpret_cast<uint4 *>(p.o + head_of(p, item_in_memory().first + row) * DH + column(n)) =
                    *reinterpret_cast<const uint4 *>(sq + swizzled_row<DH>(row, VECTORS * across + n));
        }
    }

    __device__ void end(const State<DH, ROWS> &state, int i = 0) const {
        if (item_in_memory().kind & PART)
            store(state, i);
        else
            finish(state, i);
    }
};

// Computes a split's o for the warp's rows and the half of the columns whose V is in `sv`, and merges it into o.
template <int DH>
__device__ __forceinline__ void outputs(const unsigned (&a)[TILES * GROUPS][4], bool second_tile,
                                        const float (&scale)[2], const bf16 *sv, const Merge (&merge)[2],
                                        float (*o)[4]) {
    constexpr int HALF = DH / 2, AT_ONCE = 2;
    const int value = swizzled_row<HALF>(threadIdx.x % 16, threadIdx.x % WARP / 16);
#pragma unroll
    for (int n = 0; n < HALF / 8; n += AT_ONCE) {
        float own[AT_ONCE][4] = {};
#pragma unroll
        for (int j = 0; j < TILES * GROUPS; j++) {
            if (j == GROUPS) {
                if (!second_tile) break;
#pragma unroll
                for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                    for (int e = 0; e < 4; e++) own[i][e] *= scale[e / 2];
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i += 2) {
                unsigned b[4];
                load_matrix_transposed(b, sv + moved<HALF>(value, 16 * j, n + i));
                mma(own[i], a[j], b[0], b[1]);
                mma(own[i + 1], a[j], b[2], b[3]);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
            for (int e = 0; e < 4; e++) o[n + i][e] = merge[e / 2](o[n + i][e], own[i][e]);
    }
}

// A whole item, or a part of 64 rows: walks through all its splits.
template <int DH>
__device__ __forceinline__ void all_splits(const Block<DH, 64> &b) {
    const Params &p = b.p;
    State<DH, 64> state;
    state.clear();
    // m and l of the block's rows are kept in shared memory, because o leaves too few registers.
    float2 *const ml = reinterpret_cast<float2 *>(b.sb + Shape<DH, 64>::BUFFER);
    if (threadIdx.x < 64) ml[threadIdx.x] = make_float2(-INFINITY, 0.0f);
    unsigned tile = b.item.begin / KEYS;
    const bool active = b.row0 < b.item.rows;  // a warp without rows only takes part in copies
    b.load_queries();
    b.load_keys(b.sa, tile);
    copy_commit();
    const auto stop = [&] { return (b.item.end + KEYS - 1) / KEYS; };
    while (tile < stop()) {
        const unsigned tiles = min(TILES - tile % TILES, stop() - tile);
        // m, l, p of this split alone.
        float m[2] = {-INFINITY, -INFINITY}, l[2], scale[2];
        unsigned a[TILES * GROUPS][4];
        copy_wait<0>();
        __syncthreads();  // the first tile of K (and Q) is complete; all warps have read the second half of V
        if (tiles == TILES) b.load_keys(b.sb, tile + 1);
        copy_commit();
        if (active) {
            float s[1][8][4] = {}, row_max[2], sums[GROUPS][2];
            b.template scores<DH>(s, b.sa, 0);
            b.cap_and_mask(s[0], tile);
            b.maxima(s[0], row_max);
#pragma unroll
            for (int r = 0; r < 2; r++) b.advance(row_max[r], m[r]);
            b.exponentials(s[0], m, a, sums);
#pragma unroll
            for (int r = 0; r < 2; r++) l[r] = b.added(sums, r);
        }
        copy_wait<0>();
        __syncthreads();  // the second tile of K is complete; all warps have read the first
        b.template load<DH / 2>(b.sa, p.v, 0, tile, tiles);
        copy_commit();
        Merge merge[2] = {Merge(0.0f, 0.0f), Merge(0.0f, 0.0f)};
        if (active) {
            if (tiles == TILES) {
                float s[1][8][4] = {}, row_max[2], sums[GROUPS][2];
                b.template scores<DH>(s, b.sb, 0);
                b.cap_and_mask(s[0], tile + 1);
                b.maxima(s[0], row_max);
#pragma unroll
                for (int r = 0; r < 2; r++) scale[r] = b.advance(row_max[r], m[r]);
                b.exponentials(s[0], m, a + GROUPS, sums);
#pragma unroll
                for (int r = 0; r < 2; r++) l[r] = __fmaf_rn(l[r], scale[r], b.added(sums, r));
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 before = ml[b.row(r)];
                merge[r] = Merge(before.x, m[r]);
                const float all = merge[r](before.y, quad_sum(l[r]));
                __syncwarp();  // all four threads of a row have read ml; barriers precede their next read
                if (b.t == 0) ml[b.row(r)] = make_float2(merge[r].m, all);
            }
        }
        copy_wait<0>();
        __syncthreads();  // the first half of V is complete; all warps have read the second tile of K
        b.template load<DH / 2>(b.sb, p.v, DH / 2, tile, tiles);
        copy_commit();
        if (active) outputs<DH>(a, tiles == TILES, scale, b.sa, merge, state.o);
        copy_wait<0>();
        __syncthreads();  // the second half of V is complete; all warps have read the first
        if (tile + tiles < stop()) b.load_keys(b.sa, tile + tiles);
        copy_commit();
        if (active) outputs<DH>(a, tiles == TILES, scale, b.sb, merge, state.o + DH / 16);
        tile += tiles;
    }
    if (!active) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float2 all = ml[b.row(r)];
        state.m[r] = all.x;
        state.l[r] = all.y;
    }
    b.end(state);
}

// What the warps that have the same rows of a wide item exchange, and the state (m, l) of each row.
struct WideExchange {  // shared
    union {
        float maxima[4][64];        // by warp of the four and row, until p is complete
        float sums[TILES][64 * 4];  // of a tile's p, by row and thread of a quad, from then on
    };
    float2 ml[64];
};
static_assert(sizeof(WideExchange) == 2560);

// A wide item: walks through all its splits. Of the four warps that have the same rows, number b.across computes s for keys
// 32 across .. 32 across + 31 of each split and o for columns 16 across .. 16 across + 15 of each chunk of 64.
template <int DH>
__device__ __forceinline__ void all_splits_wide(const Block<DH, 64> &b) {
    using S = Shape<DH, 64>;
    constexpr int CHUNKS = DH / WIDE_COLUMNS, SPLIT = TILES * KEYS;
    constexpr int VECTORS = WIDE_COLUMNS / VECTOR, STEP = WIDE_THREADS / VECTORS, COUNT = SPLIT / STEP;
    const Params &p = b.p;
    WideExchange &exchange = *reinterpret_cast<WideExchange *>(b.sb + S::BUFFER);
    State<DH, 64> state[2];
    state[0].clear(), state[1].clear();
    if (threadIdx.x < 64) exchange.ml[threadIdx.x] = make_float2(-INFINITY, 0.0f);
    const bool active = b.row0 < b.item.rows;  // a warp without rows only takes part in copies
    const int own_tile = b.across / 2;         // the tile of a split that has the warp's keys
    const bool later = b.across % 2 != 0;      // whether they are the tile's later keys

    // Rows in memory of the keys that this thread copies, for all chunks of a split.
    constexpr unsigned NONE = ~0u;
    unsigned keys[COUNT];
    const auto find_keys = [&](unsigned tile) {
        unsigned chain = b.item_in_memory().chain;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const unsigned position = tile * KEYS + threadIdx.x / VECTORS + i * STEP;
            keys[i] = NONE;
            if (position < b.item.begin || position >= b.item.end) continue;
            while (position >= p.chains[chain].end) chain++;
            keys[i] = position + p.chains[chain].delta;
        }
    };
    // Starts the copies of a chunk of K or V; keys outside [begin, end) become zeros.
    const int copied = swizzled(threadIdx.x / VECTORS, threadIdx.x % VECTORS);
    const auto load = [&](bf16 *to, const bf16 *from, int chunk, unsigned tiles) {
        from += blockIdx.y * DH + chunk * WIDE_COLUMNS + threadIdx.x % VECTORS * VECTOR;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (i * STEP >= tiles * KEYS) break;
            const bool inside = keys[i] != NONE;
            const size_t key = inside ? keys[i] : 0;
            copy_async(to + copied + i * STEP * WIDE_COLUMNS, from + key * gridDim.y * DH, inside);
        }
        copy_commit();
    };
    const auto buffer = [&](int chunk) { return chunk % 2 == 0 ? b.sa : b.sb; };
    bf16 *const sp = b.sb;  // p [64, 128], between the last chunk of K and the second of V
    // Calls f(i, r) for each of the thread's rows: row r of m16 tile i.
    const auto each_row = [](auto &&f) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) f(i, r);
    };
    const auto sum_of = [&](int tile, int i, int r) -> float & {
        return exchange.sums[tile][(b.row0 + 16 * i + 8 * r) * 4 + b.lane];
    };

    unsigned tile = b.item.begin / KEYS;
    const auto stop = [&] { return (b.item.end + KEYS - 1) / KEYS; };
    const auto tiles_from = [&](unsigned tile) { return min(TILES - tile % TILES, stop() - tile); };
    b.load_queries();
    find_keys(tile);
    load(b.sa, p.k, 0, tiles_from(tile));
    while (tile < stop()) {
        const unsigned tiles = tiles_from(tile);
        const bool both = tiles == TILES;
        const bool scoring = active && own_tile < tiles;
        // All warps set these and m, scale and a below, though not all use them. Otherwise ptxas would keep the values of the
        // split before, in registers that there are not.
        float s[2][4][4] = {}, sums[2][2][2] = {};
#pragma unroll 2
        for (int n = 0; n < CHUNKS; n++) {
            copy_wait<0>();
            __syncthreads();  // chunk n of K (and Q) is complete; all warps have read chunk n - 1, or the last of V
            if (n + 1 < CHUNKS)
                load(buffer(n + 1), p.k, n + 1, tiles);
            else
                load(b.sa, p.v, 0, tiles);
            if (scoring) b.template scores<WIDE_COLUMNS>(s, buffer(n), 32 * b.across, n * WIDE_COLUMNS);
        }
        if (scoring) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float row_max[2];
                b.cap_and_mask(s[i], tile + own_tile, i);
                b.maxima(s[i], row_max);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (b.t == 0) exchange.maxima[b.across][b.row(r, i)] = row_max[r];
            }
        }
        __syncthreads();  // the maxima are complete; all warps have read the last chunk of K, whose memory p takes
        float m[2][2] = {}, scale[2][2] = {};
        if (active) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float own_m[2];  // after the warp's tile
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float(&of)[4][64] = exchange.maxima;
                    const int row = b.row(r, i);
                    m[i][r] = -INFINITY;
                    b.advance(fmaxf(of[0][row], of[1][row]), m[i][r]);
                    own_m[r] = m[i][r];
                    if (both) scale[i][r] = b.advance(fmaxf(of[2][row], of[3][row]), m[i][r]);
                    if (own_tile > 0) own_m[r] = m[i][r];
                }
                if (!scoring) continue;
                unsigned fragments[2][4];
                b.exponentials(s[i], own_m, fragments, sums[i]);
#pragma unroll
                for (int j = 0; j < 2; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int vector = 4 * b.across + 2 * j + e / 2;
                        bf16 *to = sp + swizzled_row<SPLIT>(b.row(e % 2, i), vector) + 2 * b.t;
                        *reinterpret_cast<unsigned *>(to) = fragments[j][e];
                    }
            }
        }
        __syncthreads();  // p is complete; all warps have read the maxima, whose memory the sums take
        unsigned a[2][TILES * GROUPS][4] = {};
        Merge merge[2][2] = {{Merge(0.0f, 0.0f), Merge(0.0f, 0.0f)}, {Merge(0.0f, 0.0f), Merge(0.0f, 0.0f)}};
        if (active) {
            const int at = swizzled_row<SPLIT>(b.row0 + b.lane % 16, b.lane / 16);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < TILES * GROUPS; j++) {
                    if (j >= GROUPS && !both) break;
                    load_matrix(a[i][j], sp + moved<SPLIT>(at, 16 * i, 2 * j));
                }
            each_row([&](int i, int r) { merge[i][r] = Merge(exchange.ml[b.row(r, i)].x, m[i][r]); });
        }
        // The sums of p of a tile pass from the warp of its earlier keys to that of its later keys, which adds its own, and then
        // to the first warp, which has l. The barriers of the chunks of V lie between.
        if (scoring && !later) each_row([&](int i, int r) { sum_of(own_tile, i, r) = b.added(sums[i], r); });
        const auto finish_sums = [&](int chunk) {
            if (chunk == 0 && scoring && later)
                each_row([&](int i, int r) {
                    float &sum = sum_of(own_tile, i, r);
                    sum = __fadd_rn(__fadd_rn(sum, sums[i][0][r]), sums[i][1][r]);
                });
            if (b.across > 0) return;
            if (chunk == 0)
                each_row([&](int i, int r) {
                    if (b.t == 0) exchange.ml[b.row(r, i)].x = merge[i][r].m;
                });
            if (chunk == 1)
                each_row([&](int i, int r) {
                    float l = sum_of(0, i, r);
                    if (both) l = __fmaf_rn(l, scale[i][r], sum_of(1, i, r));
                    float &of_row = exchange.ml[b.row(r, i)].y;
                    const float all = merge[i][r](of_row, quad_sum(l));
                    __syncwarp();  // all four threads of a row have read its l; barriers precede their next read
                    if (b.t == 0) of_row = all;
                });
        };
        tile += tiles;
        const int value = swizzled(b.lane % 16, 2 * b.across + b.lane / 16);
#pragma unroll
        for (int n = 0; n < CHUNKS; n++) {
            copy_wait<0>();
            // Chunk n of V is complete; all warps have read chunk n - 1. Of chunk 0: all warps have read p and ml, and the sums of
            // earlier keys are complete. Of chunk 1: the sums are complete.
            __syncthreads();
            if (n + 1 < CHUNKS) {
                load(buffer(n + 1), p.v, n + 1, tiles);
            } else if (tile < stop()) {
                find_keys(tile);
                load(b.sa, p.k, 0, tiles_from(tile));
            }
            if (!active) continue;
            finish_sums(n);
            float own[2][2][4] = {};  // the split's o
#pragma unroll
            for (int j = 0; j < TILES * GROUPS; j++) {
                if (j == GROUPS) {
                    if (!both) break;
#pragma unroll
                    for (int i = 0; i < 2; i++)
#pragma unroll
                        for (int c = 0; c < 2; c++)
#pragma unroll
                            for (int e = 0; e < 4; e++) own[i][c][e] *= scale[i][e / 2];
                }
                unsigned v[4];
                load_matrix_transposed(v, buffer(n) + moved<WIDE_COLUMNS>(value, 16 * j, 0));
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    mma(own[i][0], a[i][j], v[0], v[1]);
                    mma(own[i][1], a[i][j], v[2], v[3]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int c = 0; c < 2; c++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        float &o = state[i].o[2 * n + c][e];
                        o = merge[i][e / 2](o, own[i][c][e]);
                    }
        }
    }
    if (!active) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float2 all = exchange.ml[b.row(r, i)];
            state[i].m[r] = all.x;
            state[i].l[r] = all.y;
        }
        b.end(state[i], i);
    }
}

// Row maxima and sums of p of each tile, which the warps of an item of 16 rows exchange.
struct Exchange {
    float maxima[TILES][4][16];    // by warp and row
    float sums[TILES][4][16 * 4];  // by warp, row and thread of a quad
};

// An item of 16 rows and one split. Copies of K and V start as early as two buffers allow, because memory limits this shape. A
// tile comes in CHUNKS stages, K in chunks of its columns and V in chunks of its keys.
template <int DH>
__device__ __forceinline__ void one_split(const Block<DH, 16> &b) {
    const Params &p = b.p;
    using S = Shape<DH, 16>;
    constexpr int STAGES = TILES * S::CHUNKS;  // of K, and as many of V
    bf16 *const sp = b.sq;  // p [16, 128], one tile after the other, in Q's memory
    Exchange &exchange = *reinterpret_cast<Exchange *>(b.sb + S::BUFFER);
    State<DH, 16> state;
    state.clear();
    const unsigned tile = b.item.begin / KEYS;
    if (b.item.begin == b.item.end) {  // rows that belong to no run
        b.finish(state);
        return;
    }
    const unsigned tiles = (b.item.end + KEYS - 1) / KEYS - tile;
    const auto buffer = [&](int n) { return n % 2 == 0 ? b.sa : b.sb; };
    const auto load = [&](int n) {  // stage n, of K and then V
        const int i = n / S::CHUNKS % TILES, chunk = n % S::CHUNKS;
        if (i > 0 && tiles < TILES) return;
        if (n < STAGES)
            b.template load<DH / S::CHUNKS>(buffer(n), p.k, chunk * (DH / S::CHUNKS), tile + i, 1);
        else
            b.template load<DH, KEYS / S::CHUNKS>(buffer(n), p.v, 0, tile + i, 1, chunk * (KEYS / S::CHUNKS));
    };
    b.load_queries();
#pragma unroll
    for (int n = 0; n < 2; n++) {
        load(n);
        copy_commit();
    }

    float s[1][S::KEY_TILES][4], row_max[2], scale[2];
    unsigned a[TILES][4];
    const auto send_maxima = [&](int i) {
        b.maxima(s[0], row_max);
        if (b.t == 0) {
            exchange.maxima[i][b.warp][b.quad] = row_max[0];
            exchange.maxima[i][b.warp][b.quad + 8] = row_max[1];
        }
    };
    const auto use_maxima = [&](int i) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = b.quad + 8 * r;
            const float(&of)[4][16] = exchange.maxima[i];
            row_max[r] = fmaxf(fmaxf(of[0][row], of[1][row]), fmaxf(of[2][row], of[3][row]));
            scale[r] = b.advance(row_max[r], state.m[r]);
        }
        float sums[1][2];
        b.exponentials(s[0], state.m, a + i, sums);
#pragma unroll
        for (int r = 0; r < 2; r++) exchange.sums[i][b.warp][b.lane + WARP * r] = sums[0][r];
    };
#pragma unroll
    for (int n = 0; n < STAGES; n++) {
        const int i = n / S::CHUNKS, chunk = n % S::CHUNKS;
        if (n == 0)
            copy_wait<1>();
        else
            copy_wait<0>();
        // Stage n (and Q) is complete; all warps have read stage n - 1. The maxima of tile i - 1 are complete.
        __syncthreads();
        if (n > 0) {
            load(n + 1);
            copy_commit();
        }
        if (i > 0 && chunk == 0) use_maxima(i - 1);
        if (i > 0 && tiles < TILES) continue;
        if (chunk == 0) {
#pragma unroll
            for (int j = 0; j < S::KEY_TILES; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[0][j][e] = 0.0f;
        }
        b.template scores<DH / S::CHUNKS>(s, buffer(n), b.key0, chunk * (DH / S::CHUNKS));
        if (chunk < S::CHUNKS - 1) continue;
        b.cap_and_mask(s[0], tile + i);
        send_maxima(i);
    }
    __syncthreads();  // the second maxima are complete; all warps have read Q and the last stage of K
    load(STAGES + 1);
    if (tiles == TILES) use_maxima(1);
    copy_commit();
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            bf16 *to = sp + i * 16 * TILE_K + swizzled(b.quad + e % 2 * 8, b.key0 / 8 + e / 2) + 2 * b.t;
            if (i < tiles) *reinterpret_cast<unsigned *>(to) = a[i][e];
        }
    const int value = swizzled_row<DH>(b.lane % 16, b.across * S::COLUMN_TILES + b.lane / 16);
#pragma unroll
    for (int n = 0; n < STAGES; n++) {
        const int i = n / S::CHUNKS, chunk = n % S::CHUNKS;
        if (i == tiles) break;
        if (n == 0)
            copy_wait<1>();
        else
            copy_wait<0>();
        __syncthreads();  // stage n of V, p and the sums are complete; all warps have read stage n - 1
        if (n > 0 && n + 1 < STAGES) {
            load(STAGES + n + 1);
            copy_commit();
        }
        if (chunk == 0) {
            if (i > 0) {
#pragma unroll
                for (int n = 0; n < S::COLUMN_TILES; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) state.o[n][e] *= scale[e / 2];
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int row = b.lane + WARP * r;
                const float(&of)[4][64] = exchange.sums[i];
                const float sum = __fadd_rn(__fadd_rn(__fadd_rn(of[0][row], of[1][row]), of[2][row]), of[3][row]);
                state.l[r] = i == 0 ? sum : __fmaf_rn(state.l[r], scale[r], sum);
            }
        }
        const bf16 *sv = buffer(n);
#pragma unroll
        for (int j = 0; j < GROUPS / S::CHUNKS; j++) {
            unsigned of[4];
            const int group = chunk * (GROUPS / S::CHUNKS) + j;
            load_matrix(of, sp + i * 16 * TILE_K + swizzled(b.lane % 16, 2 * group + b.lane / 16));
#pragma unroll
            for (int n = 0; n < S::COLUMN_TILES; n += 2) {
                unsigned v[4];
                load_matrix_transposed(v, sv + moved<DH>(value, 16 * j, n));
                mma(state.o[n], of, v[0], v[1]);
                mma(state.o[n + 1], of, v[2], v[3]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) state.l[r] = quad_sum(state.l[r]);
    __syncthreads();  // all warps have read p, whose memory `end` may use for o
    b.end(state);
}

// For lists in which all items have at most 16 rows.
template <int DH>
__device__ __forceinline__ void forward_few(const Params &p) {
    extern __shared__ uint4 shared[];
    if (p.items[blockIdx.x].rows == 0) return;
    one_split(Block<DH, 16>(p, reinterpret_cast<bf16 *>(shared)));
}

// For lists of items of any kind.
template <int DH>
__device__ __forceinline__ void forward_any(const Params &p) {
    extern __shared__ uint4 shared[];
    if (p.items[blockIdx.x].kind & FEW) {
        if (threadIdx.x < THREADS) forward_few<DH>(p);  // barriers do not wait for threads that have ended
    } else if constexpr (Shape<DH, 64>::WIDE) {
        all_splits_wide(Block<DH, 64>(p, reinterpret_cast<bf16 *>(shared)));
    } else {
        all_splits(Block<DH, 64>(p, reinterpret_cast<bf16 *>(shared)));
    }
}

// Merges the splits of a row in ascending order, one row for each warp, and writes o and lse. The limit is the latency of
// memory, and so a thread loads 4 columns (2 where heads have 64) of each 128 for several splits before it uses the first.
template <int DH>
__device__ __forceinline__ void merge_splits(const Params &p) {
    constexpr int WIDTH = DH == 64 ? 2 : 4, COUNT = DH / WIDTH / WARP;
    struct alignas(4 * WIDTH) Columns {
        float of[WIDTH];
    };
    struct alignas(2 * WIDTH) Rounded {
        bf162 of[WIDTH / 2];
    };
    const MergeItem rows = p.merge_items[blockIdx.x];
    if (blockIdx.z >= rows.rows) return;
    const unsigned lane = threadIdx.x;
    float m = -INFINITY, l = 0.0f;
    Columns o[COUNT] = {};
#pragma unroll 1
    for (unsigned first = 0; first < rows.splits; first += LOADS) {
        float2 ml[LOADS];
        Columns more[LOADS][COUNT];
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if (first + i >= rows.splits) break;
            const size_t row = rows.work_row + blockIdx.z + size_t(first + i) * rows.stride;
            ml[i] = *work_ml<DH>(p, row);
#pragma unroll
            for (int c = 0; c < COUNT; c++)
                more[i][c] = reinterpret_cast<const Columns *>(work_o<DH>(p, row))[lane + WARP * c];
        }
#pragma unroll
        for (int i = 0; i < LOADS; i++) {
            if (first + i >= rows.splits) break;
            const Merge merge(m, ml[i].x);
            m = merge.m;
            l = merge(l, ml[i].y);
#pragma unroll
            for (int c = 0; c < COUNT; c++)
#pragma unroll
                for (int e = 0; e < WIDTH; e++) o[c].of[e] = merge(o[c].of[e], more[i][c].of[e]);
        }
    }
    const size_t head = head_of(p, rows.first + blockIdx.z);
    const float inverse = inverse_of(l);
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        Rounded out;
#pragma unroll
        for (int e = 0; e < WIDTH; e += 2)
            out.of[e / 2] = __floats2bfloat162_rn(o[c].of[e] * inverse, o[c].of[e + 1] * inverse);
        reinterpret_cast<Rounded *>(p.o + head * DH)[lane + WARP * c] = out;
    }
    if (lane == 0) p.lse[head] = lse_of(m, l);
}

// Items of any kind. Shared memory: (64 + 128) Dh bf16 for Q and the buffers, and (m, l) of 64 rows; if wide, 64 Dh + 2 128 64
// bf16 and a WideExchange.
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128, 3) attention_forward_64_rows_64(const __grid_constant__ Params p) {
    forward_any<64>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128) attention_forward_128_rows_64(const __grid_constant__ Params p) {
    forward_any<128>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128) attention_forward_256_rows_64(const __grid_constant__ Params p) {
    forward_any<256>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 256 threads.
extern "C" __global__ void __launch_bounds__(256) attention_forward_512_rows_64(const __grid_constant__ Params p) {
    forward_any<512>(p);
}

// Items of at most 16 rows. They take fewer registers, and less shared memory: Q or p, 16 rows of at least 128
// bf16, two buffers of 64 Dh bf16 (at a width of 512, 32 Dh), and an Exchange. The 4 of the launch bounds allows 128 registers,
// with which nothing spills.
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128, 4) attention_forward_64_rows_16(const __grid_constant__ Params p) {
    forward_few<64>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128, 4) attention_forward_128_rows_16(const __grid_constant__ Params p) {
    forward_few<128>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128, 4) attention_forward_256_rows_16(const __grid_constant__ Params p) {
    forward_few<256>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (items, K), 128 threads.
extern "C" __global__ void __launch_bounds__(128) attention_forward_512_rows_16(const __grid_constant__ Params p) {
    forward_few<512>(p);
}

// The merge after a list with parts.
// Launched by cuda/attention.rs: attention_forward; grid (merge items, K, the most rows of a merge item), 32 threads.
extern "C" __global__ void __launch_bounds__(32) attention_forward_64_merge(const __grid_constant__ Params p) {
    merge_splits<64>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (merge items, K, the most rows of a merge item), 32 threads.
extern "C" __global__ void __launch_bounds__(32) attention_forward_128_merge(const __grid_constant__ Params p) {
    merge_splits<128>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (merge items, K, the most rows of a merge item), 32 threads.
extern "C" __global__ void __launch_bounds__(32) attention_forward_256_merge(const __grid_constant__ Params p) {
    merge_splits<256>(p);
}
// Launched by cuda/attention.rs: attention_forward; grid (merge items, K, the most rows of a merge item), 32 threads.
extern "C" __global__ void __launch_bounds__(32) attention_forward_512_merge(const __grid_constant__ Params p) {
    merge_splits<512>(p);
}
