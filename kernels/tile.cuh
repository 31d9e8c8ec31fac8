// A block's tile of a matrix product: C[m, n] += sum over k of A[m, k] B[n, k]. The M x N tile of C is held in the registers of
// the block's threads; operands are bf16, sums f32. The kernels of matmul.cu are this tile with different epilogues;
// that of lm_head.cuh has another source of copies for the pipeline.
//
// **One chain.** Every element of C is one chain of m16n8k16 products in ascending k, whatever the shape of the tile, the
// tile's position in the matrix, and the rest of the batch. The bits of an element are a function of its row of A, its row of B
// and its value before the product. (Stages beyond k are filled with zeros, which change no bit of a sum.) Launchers may
// therefore choose a tile by the size of the problem, and sampling (few tokens, small tiles) agrees with training (many
// tokens, large tiles).
//
// **Movement.** A stage is a part of shared memory that holds DEPTH columns of k of both operands. While warps multiply one
// stage, cp.async fills the stages after it; there is one barrier per stage. Per 16 of k, a warp reads (WM + WN) x 32 bytes of
// shared memory for WM WN / 128 products. At 64 x 64 these are 4 KiB for 32 products, which is half of what an A100's shared
// memory delivers in the time of the products (128 bytes a clock, 2 clocks a product).
//
// Use:
//     using P = Tile<128, 128, 2, 2, 64, 2, Layout::ROWS, Layout::ROWS>;     // __launch_bounds__(P::THREADS)
//     extern __shared__ __align__(128) unsigned char memory[];                // P::SHARED bytes
//     P p;                                                                    // sums of zero
//     p.multiply({x + row * ld, ld, rows - row}, {w + col * ld, ld, cols - col}, k, memory);   // again for more of k
//     p.each([&](int m, int n, float c0, float c1) { ... });                  // C[m, n] and C[m, n + 1] of the tile
// or read p.sum[i][j] with p.row(i), p.column(j); or call p.store(..) or p.add(..), which write whole rows of a matrix.
// p.load(..) continues sums that p.store(..) wrote in f32.
#pragma once

#include <utility>

#include "mma.cuh"

// Layout of an operand in memory.
enum class Layout {
    ROWS,         // element (i, k) at at[i ld + k]: k contiguous
    COLUMNS,      // element (i, k) at at[k ld + i]: k strided, read through ldmatrix.trans
    INTERLEAVED,  // ROWS of two matrices, alternating by eight: rows 16 i .. 16 i + 7 of the tile are rows 8 i .. 8 i + 7 of
                  // `at`, the next eight the same rows of `other`. A thread that holds column 16 i + c of C also holds
                  // column 16 i + 8 + c.
};

// One operand, relative to the tile. Copies move vectors of 8 elements: `at` is aligned to 16 bytes and ld a multiple of 8. If
// k (ROWS, INTERLEAVED) or `rows` (COLUMNS) is no multiple of 8, the last vector is read whole, up to 7 elements beyond the end and
// inside ld. With ROWS and INTERLEAVED these elements must be finite, because they are multiplied by zeros of the other operand
// (the rows of a COLUMNS operand that lie beyond k are zeros).
struct Operand {
    const bf16 *at;               // row 0 of the tile, k = 0
    size_t ld;                    // elements from row to row (COLUMNS: from k to k)
    int rows;                     // rows that exist from `at` on (INTERLEAVED: of each matrix); the others read as zero
    const bf16 *other = nullptr;  // INTERLEAVED: row 0 of the second matrix
};

// unroll<n>(f) calls f(Int<0>), f(Int<1>), ..., f(Int<n - 1>): a loop whose index is a constant expression, which immediate
// operands of instructions need.
template <int i>
struct Int {
    static constexpr int value = i;
};

template <typename F, int... i>
__device__ __forceinline__ void unroll(F &&f, std::integer_sequence<int, i...>) {
    (f(Int<i>{}), ...);
}

template <int n, typename F>
__device__ __forceinline__ void unroll(F &&f) {
    unroll(f, std::make_integer_sequence<int, n>{});
}

// One thread's copies of an operand: COUNT vectors of every stage, on lines that are LINES apart. A line is a row of the
// operand (ROWS, INTERLEAVED) or one k (COLUMNS). In shared memory the lines of a stage are cut into swizzled tiles of 64 columns
// (mma.cuh), stored one after the other: [line length / 64][lines][64].
template <int ROWS, int DEPTH, int THREADS, Layout layout>
struct Feed {
    static constexpr bool STRIDED = layout == Layout::COLUMNS;
    static constexpr int LENGTH = STRIDED ? ROWS : DEPTH;          // elements of a line
    static constexpr int ALL_LINES = STRIDED ? DEPTH : ROWS;
    static constexpr int LINES = THREADS / (LENGTH / VECTOR);       // lines that the block copies at once
    static constexpr int COUNT = ALL_LINES / LINES;
    static constexpr int BYTES = ROWS * DEPTH * int(sizeof(bf16));  // of a stage
    // Lines of the matrix in memory between two vectors of a thread.
    static constexpr int SOURCE_LINES = layout == Layout::INTERLEAVED ? LINES / 2 : LINES;
    // All vectors of a thread have the same position in their swizzled lines and, with INTERLEAVED, the same matrix.
    static_assert(LENGTH % TILE_K == 0 && ALL_LINES % LINES == 0 && LINES % 8 == 0);
    static_assert(layout != Layout::INTERLEAVED || LINES % 16 == 0);

    const bf16 *from;   // the next vector
    size_t step;        // elements from vector to vector of a stage
    size_t stage_step;  // elements from the end of a stage's vectors to the next stage's first (COLUMNS: always 0)
    int to;             // offset in bytes of the first vector in a stage
    int limit;          // lines that exist from the first vector on; with COLUMNS `lines` counts them by `left` instead
    int first_k;        // k of the first vector in a stage

    __device__ __forceinline__ explicit Feed(const Operand &o) {
        const int vector = int(threadIdx.x) % (LENGTH / VECTOR), line = int(threadIdx.x) / (LENGTH / VECTOR);
        const bool second = layout == Layout::INTERLEAVED && line / 8 % 2 == 1;
        const int source = layout == Layout::INTERLEAVED ? line / 16 * 8 + line % 8 : line;
        from = (second ? o.other : o.at) + size_t(source) * o.ld + vector * VECTOR;
        step = SOURCE_LINES * o.ld;
        stage_step = DEPTH - COUNT * step;
        to = (vector / 8 * ALL_LINES * TILE_K + swizzled(line, vector % 8)) * int(sizeof(bf16));
        limit = STRIDED ? (vector * VECTOR < o.rows ? 0x7fffffff : 0) : o.rows - source;
        first_k = STRIDED ? line : vector * VECTOR;
        // Every stage uses these.
        keep_computed(step, stage_step, to, limit, first_k);
    }

    // Number of existing lines from this thread's first on, in a stage that begins `left` before the end of k.
    __device__ __forceinline__ int lines(int left) const {
        if constexpr (STRIDED) return min(left - first_k, limit);
        return first_k < left ? limit : 0;
    }

    // Starts the copy of vector i of the stage. A stage calls it for all i in ascending order, then calls `next`.
    template <int i>
    __device__ __forceinline__ void copy(unsigned stage, int lines) {
        copy_async_at<i * LINES * TILE_K * int(sizeof(bf16))>(stage + to, from, i * SOURCE_LINES < lines ? 16 : 0);
        from += step;
        keep_advancing(from);
    }

    __device__ __forceinline__ void next() {
        if constexpr (!STRIDED) from += stage_step;
    }
};

// The addresses at which one lane reads an operand's fragments with ldmatrix, 16 rows x 16 k each. For A the four matrices
// come in the order of the registers of mma's a. For B the second and third matrix are exchanged: registers 0 and 1 are b0
// and b1 of the first 8 rows, registers 2 and 3 those of the other 8, because mma takes b0 and b1 from neighbouring registers
// and the compiler would otherwise move them.
template <int ROWS, int DEPTH, Layout layout, bool IS_B>
struct Fragments {
    static constexpr bool STRIDED = layout == Layout::COLUMNS;

    int offset;  // in bytes from the operand's stage, of the warp's first 16 rows and the first 16 of k

    // `first`: the warp's first row, a multiple of 16.
    __device__ __forceinline__ explicit Fragments(int first) {
        const int lane = threadIdx.x % WARP;
        // Bits 0 and 1 of the number of the matrix whose row this lane addresses.
        const int second = lane / 8 % 2, third = lane / 16;
        const int row = (IS_B ? third : second) * 8, k = (IS_B ? second : third) * 8;
        if constexpr (STRIDED) {
            const int vector = (first + row) / VECTOR;
            offset = vector / 8 * DEPTH * TILE_K + swizzled(k + lane % 8, vector % 8);
        } else {
            offset = swizzled(first + row + lane % 8, k / VECTOR);
        }
        offset *= int(sizeof(bf16));
    }

    // The four addresses in a stage from which all fragments of the warp are constant offsets away. Two vectors further along
    // a line, the swizzled address differs by an exclusive or with bits 5 and 6 and is no constant offset away.
    __device__ __forceinline__ void addresses(unsigned (&address)[4], unsigned stage) const {
        const unsigned first = stage + offset;
#pragma unroll
        for (int i = 0; i < 4; i++) address[i] = first ^ (i * 32);
    }

    // Loads the fragment of rows 16 i .. 16 i + 15 of the warp and k 16 step .. 16 step + 15 of the stage.
    template <int i, int step>
    static __device__ __forceinline__ void load(unsigned (&r)[4], const unsigned (&address)[4]) {
        constexpr int TILES = 16 * TILE_K * int(sizeof(bf16));  // 16 lines
        if constexpr (STRIDED)
            load_matrix_at<true, i / 4 * DEPTH / 16 * TILES + step * TILES>(r, address[i % 4]);
        else
            load_matrix_at<false, step / 4 * ROWS / 16 * TILES + i * TILES>(r, address[step % 4]);
    }
};

// Transposes 4 x 4 words over the four lanes of a quad: lane t holds word t of each of four vectors r0 .. r3, and receives all
// words of vector t.
__device__ __forceinline__ uint4 transpose_quad(unsigned r0, unsigned r1, unsigned r2, unsigned r3) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const unsigned x = __shfl_xor_sync(ALL, odd ? r0 : r1, 1), y = __shfl_xor_sync(ALL, odd ? r2 : r3, 1);
    const unsigned p0 = odd ? x : r0, p1 = odd ? r1 : x, q0 = odd ? y : r2, q1 = odd ? r3 : y;
    const unsigned s = __shfl_xor_sync(ALL, high ? p0 : q0, 2), t = __shfl_xor_sync(ALL, high ? p1 : q1, 2);
    return high ? make_uint4(s, t, q0, q1) : make_uint4(p0, p1, s, t);
}

// Stores 16 rows x 8 TILES columns, in the layout of mma's c, as bf16 in 16-byte vectors. `y` points to the element (0, 0);
// `rows` and `cols` (a multiple of 8) are the rows and columns that the matrix has from there on.
template <int TILES>
__device__ __forceinline__ void store_strip(const float (&c)[TILES][4], bf16 *y, size_t ld, int rows, int cols) {
    static_assert(TILES == 2 || TILES % 4 == 0);
    const int row = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    if constexpr (TILES == 2) {
        // A quad holds two rows of two tiles: four vectors.
        const uint4 v = transpose_quad(pack_bf16(c[0][0], c[0][1]), pack_bf16(c[1][0], c[1][1]), pack_bf16(c[0][2], c[0][3]),
                                       pack_bf16(c[1][2], c[1][3]));
        const int r = row + t / 2 * 8, col = t % 2 * 8;
        if (r < rows && col < cols) *reinterpret_cast<uint4 *>(y + r * ld + col) = v;
    } else {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < TILES; j += 4) {
                const uint4 v = transpose_quad(pack_bf16(c[j][2 * half], c[j][2 * half + 1]),
                                               pack_bf16(c[j + 1][2 * half], c[j + 1][2 * half + 1]),
                                               pack_bf16(c[j + 2][2 * half], c[j + 2][2 * half + 1]),
                                               pack_bf16(c[j + 3][2 * half], c[j + 3][2 * half + 1]));
                const int r = row + half * 8, col = (j + t) * 8;
                if (r < rows && col < cols) *reinterpret_cast<uint4 *>(y + r * ld + col) = v;
            }
        }
    }
}

// M_ x N_: the tile. WARPS_M x WARPS_N warps share it; a warp's part is a multiple of 16 x 16. DEPTH: k per stage, 64 or
// 128. LA, LB: layouts of the operands in memory.
template <int M_, int N_, int WARPS_M, int WARPS_N, int DEPTH, int STAGES, Layout LA, Layout LB>
struct Tile {
    static constexpr int M = M_, N = N_;
    static constexpr int THREADS = WARPS_M * WARPS_N * int(WARP);
    // Rows and columns of a warp's part, and the m16n8 products in them.
    static constexpr int WM = M / WARPS_M, WN = N / WARPS_N;
    static constexpr int MT = WM / 16, NT = WN / 8;
    static constexpr int STEPS = DEPTH / 16;

    using FeedA = Feed<M, DEPTH, THREADS, LA>;
    using FeedB = Feed<N, DEPTH, THREADS, LB>;
    using FragmentsA = Fragments<M, DEPTH, LA, false>;
    using FragmentsB = Fragments<N, DEPTH, LB, true>;

    static constexpr int STAGE = FeedA::BYTES + FeedB::BYTES;
    // Bytes of shared memory, aligned to 128.
    static constexpr int SHARED = STAGES * STAGE;

    static_assert(WM % 16 == 0 && WN % 16 == 0 && DEPTH % TILE_K == 0 && STAGES >= 2);
    // A warp's rows of a strided operand lie in one tile of 64 columns, or are whole tiles.
    static_assert(LA != Layout::COLUMNS || TILE_K % WM == 0 || WM % TILE_K == 0);
    static_assert(LB != Layout::COLUMNS || TILE_K % WN == 0 || WN % TILE_K == 0);

    // sum[i][j] in the layout of mma's c: {(r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)}, r = row(i), c = column(j).
    float sum[MT][NT][4];

    __device__ __forceinline__ Tile() { zero(); }

    // Sums that are not set, for those who zero them themselves.
    enum Unset { UNSET };
    __device__ __forceinline__ explicit Tile(Unset) {}

    __device__ __forceinline__ void zero() {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
                for (int e = 0; e < 4; e++) sum[i][j][e] = 0;
    }

    // First row and column of this thread's warp in the tile.
    static __device__ __forceinline__ int warp_row() { return int(threadIdx.x / WARP) % WARPS_M * WM; }
    static __device__ __forceinline__ int warp_column() { return int(threadIdx.x / WARP) / WARPS_M * WN; }
    // Row of sum[i][..][0] and column of sum[..][j][0] of this thread in the tile.
    static __device__ __forceinline__ int row(int i) { return warp_row() + i * 16 + int(threadIdx.x % WARP) / 4; }
    static __device__ __forceinline__ int column(int j) { return warp_column() + j * 8 + int(threadIdx.x) % 4 * 2; }

    // The pipeline of stages. Its source S of copies has
    //     S::Inside inside() const                                 what of the next stage exists in the matrices
    //     void copies<part, parts>(unsigned stage, S::Inside)      starts number `part` of `parts` parts of its copies
    //     void next()                                              goes on to the stage behind it
    // A lies at the beginning of a stage and B behind it, both as Feed stores them. Elements that do not exist are zeros. The pipeline
    // also asks for stages behind the last one; no warp reads them.
    struct Pipeline {
        const unsigned begin, end;  // of the stages
        unsigned read, write;       // the stage to multiply next, and the stage to copy to next
        FragmentsA a;
        FragmentsB b;

        // Starts the copies of all stages but one.
        template <typename S>
        __device__ __forceinline__ Pipeline(S &source, void *memory)
            : begin(shared_address(memory)),
              end(begin + SHARED),
              read(begin),
              write(begin),
              a(warp_row()),
              b(warp_column()) {
#pragma unroll
            for (int s = 0; s < STAGES - 1; s++) {
                source.template copies<0, 1>(write, source.inside());
                copy_commit();
                source.next();
                write += STAGE;
            }
        }

        // sum += A B^T over the next k, rounded up to whole stages, while copies fill the stages after them.
        template <typename S>
        __device__ __forceinline__ void multiply(float (&sum)[MT][NT][4], S &source, int k) {
            // Variables, because with members in their place nvcc 13.2 orders the loop's instructions otherwise.
            const unsigned shared = begin, shared_end = end;
            unsigned from = read, to = write;
#pragma unroll 1  // the body is long: a copy of it would only cost instruction cache
            for (int at = 0; at < k; at += DEPTH) {
                copy_wait<STAGES - 2>();
                // Barrier: all threads' copies of this stage are complete, and all warps have read the stage before it, which
                // the copies below overwrite.
                __syncthreads();
                unsigned address_a[4], address_b[4];
                a.addresses(address_a, from);
                b.addresses(address_b, from + FeedA::BYTES);
                unsigned x[2][MT][4], y[2][NT / 2][4];
                load<0>(x[0], y[0], address_a, address_b);
                const auto inside = source.inside();
                unroll<STEPS>([&](auto step) {
                    constexpr int s = decltype(step)::value;
                    // Loads the fragments of the next step while this step's are multiplied.
                    if constexpr (s + 1 < STEPS) load<s + 1>(x[(s + 1) % 2], y[(s + 1) % 2], address_a, address_b);
                    // Copies are spread over the steps of the first half, because they then do not delay the products and,
                    // where STAGES is 2, have the time of the second half to complete.
                    if constexpr (s < STEPS / 2) source.template copies<s, STEPS / 2>(to, inside);
#pragma unroll
                    for (int i = 0; i < MT; i++)
#pragma unroll
                        for (int j = 0; j < NT; j++)
                            mma(sum[i][j], x[s % 2][i], y[s % 2][j / 2][j % 2 * 2], y[s % 2][j / 2][j % 2 * 2 + 1]);
                });
                copy_commit();
                source.next();
                from = from + STAGE == shared_end ? shared : from + STAGE;
                to = to + STAGE == shared_end ? shared : to + STAGE;
            }
            read = from;
            write = to;
        }

        // Waits for the copies behind the last stage: they read nothing, but they write zeros. Afterwards the block may use the
        // memory for anything.
        static __device__ __forceinline__ void finish() {
            copy_wait<0>();
            // Barrier: no thread reads the stages or copies to them any more.
            __syncthreads();
        }

    private:
        template <int step>
        static __device__ __forceinline__ void load(unsigned (&x)[MT][4], unsigned (&y)[NT / 2][4],
                                                    const unsigned (&address_a)[4], const unsigned (&address_b)[4]) {
            unroll<MT>([&](auto i) { FragmentsA::template load<i.value, step>(x[i.value], address_a); });
            unroll<NT / 2>([&](auto j) { FragmentsB::template load<j.value, step>(y[j.value], address_b); });
        }
    };

    // sum += A B^T over k. All threads of the block call it. Afterwards the block may use `memory` for anything.
    __device__ __forceinline__ void multiply(const Operand &a, const Operand &b, int k, void *memory) {
        Feeds source{FeedA(a), FeedB(b), k};
        Pipeline pipeline(source, memory);
        pipeline.multiply(sum, source, k);
        pipeline.finish();
    }

    // Calls f(m, n, C[m, n], C[m, n + 1]) for each pair of neighbours that this thread holds; m and n count in the tile.
    template <typename F>
    __device__ __forceinline__ void each(F &&f) const {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
            for (int j = 0; j < NT; j++) {
                f(row(i), column(j), sum[i][j][0], sum[i][j][1]);
                f(row(i) + 8, column(j), sum[i][j][2], sum[i][j][3]);
            }
    }

    // y[m, n] = C[m, n], rounded to bf16. `y` points to the tile's element (0, 0); `rows` and `cols` (a multiple of 8) are the
    // rows and columns that the matrix has from there on.
    __device__ __forceinline__ void store(bf16 *y, size_t ld, int rows, int cols) const {
        const int m = warp_row(), n = warp_column();
#pragma unroll
        for (int i = 0; i < MT; i++)
            store_strip<NT>(sum[i], y + (m + i * 16) * ld + n, ld, rows - m - i * 16, cols - n);
    }

    // y[m, n] = C[m, n] in f32; cols a multiple of 4.
    __device__ __forceinline__ void store(float *y, size_t ld, int rows, int cols) const {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int m = vector_row(i), n = vector_column();
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float4 v = exchange_pair(sum[i][j]);
                if (m < rows && n + j * 8 < cols) *reinterpret_cast<float4 *>(y + m * ld + n + j * 8) = v;
            }
        }
    }

    // C[m, n] = y[m, n], as `store` wrote it in f32: the next call of `multiply` continues the chains of the stored sums.
    __device__ __forceinline__ void load(const float *y, size_t ld, int rows, int cols) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int m = vector_row(i), n = vector_column();
#pragma unroll
            for (int j = 0; j < NT; j++) {
                float4 v = make_float4(0, 0, 0, 0);
                if (m < rows && n + j * 8 < cols) v = *reinterpret_cast<const float4 *>(y + m * ld + n + j * 8);
                const float four[4] = {v.x, v.y, v.z, v.w};
                v = exchange_pair(four);
                sum[i][j][0] = v.x, sum[i][j][1] = v.y, sum[i][j][2] = v.z, sum[i][j][3] = v.w;
            }
        }
    }

    // y[m, n] += C[m, n] in f32; cols a multiple of 4.
    __device__ __forceinline__ void add(float *y, size_t ld, int rows, int cols) const {
#pragma unroll
        for (int i = 0; i < MT; i++) {
            const int m = vector_row(i), n = vector_column();
            float *at = y + m * ld + n;
            // All loads stand before the first store, so that a thread waits for memory once per 16 rows and not once per
            // vector. __syncwarp orders nothing between lanes here: it keeps the compiler from moving the loads behind it.
            float4 held[NT];
#pragma unroll
            for (int j = 0; j < NT; j++)
                if (m < rows && n + j * 8 < cols) held[j] = *reinterpret_cast<const float4 *>(at + j * 8);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float4 c = exchange_pair(sum[i][j]);
                float4 v = held[j];
                v.x += c.x;
                v.y += c.y;
                v.z += c.z;
                v.w += c.w;
                if (m < rows && n + j * 8 < cols) *reinterpret_cast<float4 *>(at + j * 8) = v;
            }
        }
    }

    // y[m, n] = y[m, n] + C[m, n], summed in f32 and rounded to bf16 once; cols a multiple of 8.
    __device__ __forceinline__ void add(bf16 *y, size_t ld, int rows, int cols) const {
        static_assert(NT % 4 == 0);
        const int n = warp_column() + int(threadIdx.x) % 4 * 8;
#pragma unroll
        for (int i = 0; i < MT; i++) {
            // Loads stand before stores for the reason that they do for f32.
            uint4 held[2][NT / 4];
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < NT / 4; j++) {
                    const int m = row(i) + half * 8;
                    held[half][j] = make_uint4(0, 0, 0, 0);
                    if (m < rows && n + j * 32 < cols)
                        held[half][j] = *reinterpret_cast<const uint4 *>(y + m * ld + n + j * 32);
                }
            __syncwarp();
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int j = 0; j < NT / 4; j++) {
                    // Vectors of rows become the pairs of mma's c, and these vectors again.
                    const uint4 v = held[half][j], pairs = transpose_quad(v.x, v.y, v.z, v.w);
                    const auto added = [&](unsigned pair, int tile) {
                        const float *c = &sum[i][4 * j + tile][2 * half];
                        return pack_bf16(__uint_as_float(pair << 16) + c[0], __uint_as_float(pair & 0xffff0000u) + c[1]);
                    };
                    const uint4 out = transpose_quad(added(pairs.x, 0), added(pairs.y, 1), added(pairs.z, 2), added(pairs.w, 3));
                    const int m = row(i) + half * 8;
                    if (m < rows && n + j * 32 < cols) *reinterpret_cast<uint4 *>(y + m * ld + n + j * 32) = out;
                }
        }
    }

private:
    // In f32 two neighbouring lanes hold 4 columns of two rows. They exchange two values so that each lane has a 16-byte vector
    // of one row, the even lane of row r, the odd lane of row r + 8. Row and column of this thread's vector of sum[i][0]; the
    // vector of sum[i][j] is 8 j columns further.
    static __device__ __forceinline__ int vector_row(int i) { return row(i) + (threadIdx.x & 1 ? 8 : 0); }
    static __device__ __forceinline__ int vector_column() { return column(0) - (threadIdx.x & 1 ? 2 : 0); }

    // Converts the layout of mma's c to vectors of a row and, because it is its own inverse, back.
    static __device__ __forceinline__ float4 exchange_pair(const float (&c)[4]) {
        const bool odd = threadIdx.x & 1;
        const float p = __shfl_xor_sync(ALL, odd ? c[0] : c[2], 1);
        const float q = __shfl_xor_sync(ALL, odd ? c[1] : c[3], 1);
        return odd ? make_float4(p, q, c[2], c[3]) : make_float4(c[0], c[1], p, q);
    }

    // The copies of two operands in memory.
    struct Feeds {
        FeedA a;
        FeedB b;
        int left;  // elements of k from the next stage on

        struct Inside {
            int a, b;  // lines
        };

        __device__ __forceinline__ Inside inside() const { return {a.lines(left), b.lines(left)}; }

        template <int part, int parts>
        __device__ __forceinline__ void copies(unsigned stage, const Inside &lines) {
            constexpr int first_a = FeedA::COUNT * part / parts, end_a = FeedA::COUNT * (part + 1) / parts;
            constexpr int first_b = FeedB::COUNT * part / parts, end_b = FeedB::COUNT * (part + 1) / parts;
            unroll<end_a - first_a>([&](auto i) { a.template copy<first_a + i.value>(stage, lines.a); });
            unroll<end_b - first_b>([&](auto i) { b.template copy<first_b + i.value>(stage + FeedA::BYTES, lines.b); });
        }

        __device__ __forceinline__ void next() {
            a.next();
            b.next();
            left -= DEPTH;
        }
    };
};
