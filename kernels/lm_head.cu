// The LM head fused with the ops that consume its logits: sampling, log-probs and their gradient. Formulas and shapes are in
// src/backend/lm_head.rs; tiles, chunks and the order of sums at the head of lm_head.cuh. E [V, D] is the embedding
// matrix, X [R, D] the rows.
//
//   l = softcap tanh((x . E_v) / softcap) / temperature;   lse = ln sum_v e^l;   log pi(v) = l - lse
//
// **lm_head_sample** draws argmax_v l + G_v with Gumbel noise G, which is a draw from pi (Maddison et al. 2014). A block (row
// tile, chunk) keeps each row's best token and running log-sum-exp in registers; a second kernel merges the chunks. Bytes: E is
// read once (Gemma 2B: 2 V D = 1049 MB); X, 128 KB for 32 rows, comes from L2 for every tile; 48 R for each of V / 512 chunks
// pass between the kernels. FLOPs: 2 R V D on the tensor cores, 33.6 G for 32 rows. The limit is memory, because 32 FLOPs a byte
// are far below the 200 and more at which a GPU is balanced, and the time is that of reading E. Noise (a Philox block for four
// logits, two logarithms for each) and sums take about 150 PTX instructions a logit: 3.8e7 instructions of warps for 32 rows x
// 256,000, which are 63 us of an A100's issue slots against 515 us of its memory (Gemma 3 270M: 165 us). Meanwhile the copies of
// two or more stages are in flight, and those of the other block on the multiprocessor.
//
// **Truncation** ranks a row's whole vocabulary. For at most 64 rows at a time, the walk writes logits (4 R V bytes), which
// several blocks for each row read twice. In the first pass they count tokens and weights by bins of the distance from the row's
// largest logit (lm_head_sample_histogram); from the sum of these histograms follows the bin in which the row is cut (.._cut).
// In the second pass (.._keep) tokens above that bin take part in the draw, and the few tokens in the bin are listed. A block
// for each row ranks the listed tokens exactly (.._truncated). All sums that decide which tokens stay are sums of integers, and
// so they are exact in any order of blocks. Bytes besides the walk: 12 R V, most of it from L2, and 24 KB for each block of the
// histogram, written and read.
//
// **lm_head_logprob_forward** is the same walk with 128 x 128 tiles. Its limit is the tensor cores: 2 R V D FLOPs, 4.3 T for
// 4096 rows of Gemma 2B. The V R logits, 4.2 GB in f32, are written only if there is room to keep them. E comes from DRAM once,
// because the blocks of one chunk run at the same time, and else, like X, from L2: 64 FLOPs a byte. There are 1.1 other PTX
// instructions per mma in the main loop, and 12 a logit after it.
//
// **lm_head_logprob_backward** computes tiles of logits again and writes dlogits, in bf16, for a range of the vocabulary that
// fits the workspace. kernels/matmul.cu computes dX = dlogits E, whose sums continue from range to range, and dE += dlogits^T X.
// FLOPs: 6 R V D. If the forward pass has kept the logits (f32, 4 R V bytes that are read once), **.._kept** reads these instead:
// 4 R V D FLOPs and the same bits.

#include "lm_head.cuh"

extern __shared__ __align__(128) unsigned char memory[];  // the stages; afterwards a chunk's results

// A (row, token) whose log-prob is computed or differentiated.
struct alignas(16) Target {  // shared
    unsigned row, token;
    unsigned index;  // forward: index of its logit in `found`
    float weight;    // backward: weight of its log-prob; each (row, token) occurs once
};
static_assert(sizeof(Target) == 16);

// All targets, sorted by (chunk, row tile): those of a block are list[offsets[b]] .. list[offsets[b + 1] - 1] with b = chunk *
// row tiles + row tile.
struct Targets {
    const unsigned *__restrict__ offsets;
    const Target *__restrict__ list;

    // Whether any of the targets first .. last - 1 is a logit of this warp in the tile. Most warps have none.
    template <typename W>
    __device__ __forceinline__ bool met(unsigned first, unsigned last, unsigned v0, unsigned row0) const {
        for (unsigned t = first; t < last; t++)
            if (list[t].token - v0 - W::half() * 64 < 64 && list[t].row - row0 - W::warp_column() < W::COLUMNS)
                return true;
        return false;
    }
};

// Finishes the logits of a tile in place, with the branches outside the loops. Logits of tokens that do not exist become -inf.
template <typename W>
__device__ __forceinline__ void finish_tile(W &w, const Head &head, unsigned v0, unsigned vocab) {
    auto each = [&](auto f) {
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int n = 0; n < W::N; n++)
#pragma unroll
                for (int c = 0; c < 4; c++) w.sum[i][n][c] = f(w.sum[i][n][c], 2 * i + c / 2);
    };
    each([&](float l, int) { return finish(l, head); });
    if (v0 + TILE_V > vocab)
        each([&](float l, int i) { return v0 + W::token() + i < vocab ? l : -INFINITE; });
}

// Running log-sum-exps of the thread's columns over a chunk.
template <typename W>
struct Sums {
    Sum of[W::N][2];

    __device__ __forceinline__ Sums() {
#pragma unroll
        for (int n = 0; n < W::N; n++) of[n][0] = of[n][1] = Sum::none();
    }

    __device__ __forceinline__ void add_tile(W &w) {
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float x[8];
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = w.at(n, j, i);
                add(of[n][j], x);
            }
    }

    // Merges them over the block's threads and writes partial[row0], .., one for each row. `memory` is 2 ROWS sums of unused
    // shared memory.
    __device__ __forceinline__ void store(void *memory, Sum *__restrict__ partial, unsigned row0) {
        Sum *halves = static_cast<Sum *>(memory);
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const Sum s = over_lanes(of[n][j]);
                if (threadIdx.x % WARP < 4) halves[W::half() * W::ROWS + W::column(n, j)] = s;
            }
        // Barrier: the sums of both halves of the tokens are written.
        __syncthreads();
        for (unsigned r = threadIdx.x; r < W::ROWS; r += W::THREADS)
            partial[row0 + r] = merge(halves[r], halves[W::ROWS + r]);
    }
};

// -------------------------------------------------------------------------------------------------------- sampling

// sums, best: [chunks][stride], where stride is the rows in whole tiles. Grid: row tiles x chunks.
template <typename W>
__device__ __forceinline__ void sample(const Operands &o, const Head &head, const Draw *__restrict__ draws,
                                       Sum *__restrict__ sums, uint4 *__restrict__ best) {
    const unsigned row0 = blockIdx.x * W::ROWS, begin = blockIdx.y * CHUNK, end = min(begin + CHUNK, o.vocab);
    const size_t out = size_t(blockIdx.y) * gridDim.x * W::ROWS;
    W w;
    Sums<W> running;
    Best chosen[W::N][2];
#pragma unroll
    for (int n = 0; n < W::N; n++) chosen[n][0] = chosen[n][1] = Best::none();
    w.tiles(o, begin, end, row0, memory, [&](unsigned v0) {
        finish_tile(w, head, v0, o.vocab);
        running.add_tile(w);
        const unsigned v = v0 + W::token();
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned row = row0 + W::column(n, j);
                float noise[8] = {};
                if (row < o.rows && draws[row].noisy) {
                    const Draw draw = draws[row];
                    const float4 low = gumbel4(draw, v / 4), high = gumbel4(draw, v / 4 + 1);
                    noise[0] = low.x, noise[1] = low.y, noise[2] = low.z, noise[3] = low.w;
                    noise[4] = high.x, noise[5] = high.y, noise[6] = high.z, noise[7] = high.w;
                }
                Best &b = chosen[n][j];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const float logit = w.at(n, j, i), score = __fadd_rn(logit, noise[i]);
                    // Of equal scores the first stays, because tokens ascend.
                    if (score > b.score) b = {score, logit, v + i};
                }
            }
    });
    running.store(memory, sums + out, row0);
    Best *halves = reinterpret_cast<Best *>(memory + 2 * W::ROWS * sizeof(Sum));
#pragma unroll
    for (int n = 0; n < W::N; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            Best b = chosen[n][j];
#pragma unroll
            for (int offset = 4; offset < int(WARP); offset *= 2) b = better(b, exchange(b, offset));
            if (threadIdx.x % WARP < 4) halves[W::half() * W::ROWS + W::column(n, j)] = b;
        }
    // Barrier: the best tokens of both halves are written.
    __syncthreads();
    for (unsigned r = threadIdx.x; r < W::ROWS; r += W::THREADS) {
        const Best b = better(halves[r], halves[W::ROWS + r]);
        best[out + row0 + r] = make_uint4(__float_as_uint(b.score), __float_as_uint(b.logit), b.token, 0);
    }
}

using Walk16 = Walk<16, 1, 4>;  // shared
using Walk32 = Walk<32, 2, 4>;  // shared
using Walk64 = Walk<64, 4, 3>;  // shared

// Launched by cuda/lm_head.rs: sample_all; grid (R / 16, chunks), 64 threads.
extern "C" __global__ void __launch_bounds__(64, 2) lm_head_sample_16(Operands o, Head head, const Draw *draws,
                                                                      Sum *sums, uint4 *best) {
    sample<Walk16>(o, head, draws, sums, best);
}

// Launched by cuda/lm_head.rs: sample_all; grid (R / 32, chunks), 128 threads.
extern "C" __global__ void __launch_bounds__(128) lm_head_sample_32(Operands o, Head head, const Draw *draws, Sum *sums,
                                                                    uint4 *best) {
    sample<Walk32>(o, head, draws, sums, best);
}

// Launched by cuda/lm_head.rs: sample_all; grid (R / 64, chunks), 256 threads.
extern "C" __global__ void __launch_bounds__(256, 2) lm_head_sample_64(Operands o, Head head, const Draw *draws,
                                                                       Sum *sums, uint4 *best) {
    sample<Walk64>(o, head, draws, sums, best);
}

// Merging chunks: a block of 256 threads takes 8 rows. Thread (slot, row) merges the chunks slot, slot + 32, ... in ascending
// order; then the slots of a row are merged in a tree. The order of a row's merges does not depend on R.
constexpr unsigned MERGE_ROWS = 8;  // shared
constexpr unsigned MERGE_SLOTS = 32;

// Joins the x of a row's slots; `join` is commutative.
template <typename T, typename Join>
__device__ __forceinline__ T merge_slots(T x, T (&warps)[8][MERGE_ROWS], Join &&join) {
    x = join(x, exchange(x, 8));
    x = join(x, exchange(x, 16));
    const unsigned row = threadIdx.x % MERGE_ROWS;
    if (threadIdx.x % WARP < MERGE_ROWS) warps[threadIdx.x / WARP][row] = x;
    // Barrier: the joined x of all warps are written.
    __syncthreads();
    x = warps[0][row];
    for (int i = 1; i < 8; i++) x = join(x, warps[i][row]);
    return x;
}

__device__ __forceinline__ Sum sum_of_chunks(const Sum *__restrict__ sums, unsigned chunks, unsigned stride) {
    __shared__ Sum warps[8][MERGE_ROWS];
    const unsigned row = blockIdx.x * MERGE_ROWS + threadIdx.x % MERGE_ROWS;
    Sum s = Sum::none();
    for (unsigned c = threadIdx.x / MERGE_ROWS; c < chunks; c += MERGE_SLOTS)
        s = merge(s, sums[size_t(c) * stride + row]);
    return merge_slots(s, warps, [](const Sum &a, const Sum &b) { return merge(a, b); });
}

__device__ __forceinline__ float value(const Sum &s) { return __fadd_rn(s.max, logf(s.sum)); }

// out[row] = (token, its log-prob).
// Launched by cuda/lm_head.rs: sample_all; grid (R / 8), 256 threads.
extern "C" __global__ void __launch_bounds__(256) lm_head_sample_merge(
    const Sum *__restrict__ sums, const uint4 *__restrict__ best, unsigned chunks, unsigned stride, unsigned rows,
    uint2 *__restrict__ out) {
    __shared__ Best warps[8][MERGE_ROWS];
    const float lse = value(sum_of_chunks(sums, chunks, stride));
    const unsigned row = blockIdx.x * MERGE_ROWS + threadIdx.x % MERGE_ROWS;
    Best b = Best::none();
    for (unsigned c = threadIdx.x / MERGE_ROWS; c < chunks; c += MERGE_SLOTS) {
        const uint4 x = best[size_t(c) * stride + row];
        b = better(b, {__uint_as_float(x.x), __uint_as_float(x.y), x.z});
    }
    b = merge_slots(b, warps, [](const Best &a, const Best &b) { return better(a, b); });
    if (threadIdx.x < MERGE_ROWS && row < rows)
        out[row] = make_uint2(b.token, __float_as_uint(__fsub_rn(b.logit, lse)));
}

// ------------------------------------------------------------------------------------------------------ truncation

// sums as for `sample`. logits [rows][length], where length is vocab rounded up to 8; logits beyond vocab are -inf. There is at
// most one tile of rows. Grid: 1 x chunks.
template <typename W>
__device__ __forceinline__ void write_logits(const Operands &o, const Head &head, Sum *__restrict__ sums,
                                             float *__restrict__ logits, unsigned length) {
    const unsigned begin = blockIdx.y * CHUNK, end = min(begin + CHUNK, o.vocab);
    W w;
    Sums<W> running;
    w.tiles(o, begin, end, 0, memory, [&](unsigned v0) {
        finish_tile(w, head, v0, o.vocab);
        running.add_tile(w);
        // A lane's eight tokens are one sector of 32 bytes. Two neighbouring lanes exchange halves, so that each of the two
        // 16-byte stores writes whole sectors: the first the even lane's eight tokens, the second the odd lane's.
        const bool odd = threadIdx.x / 4 % 2;
        const unsigned v = v0 + W::token() - (odd ? 4 : 0);
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float first[4], second[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float low = w.at(n, j, i), high = w.at(n, j, i + 4);
                    const float other = __shfl_xor_sync(ALL, odd ? low : high, 4);
                    first[i] = odd ? other : low;
                    second[i] = odd ? high : other;
                }
                const unsigned row = W::column(n, j);
                if (row >= o.rows) continue;
                float *to = logits + size_t(row) * length + v;
                if (v < length) *reinterpret_cast<float4 *>(to) = make_float4(first[0], first[1], first[2], first[3]);
                if (v + 8 < length)
                    *reinterpret_cast<float4 *>(to + 8) = make_float4(second[0], second[1], second[2], second[3]);
            }
    });
    running.store(memory, sums + size_t(blockIdx.y) * W::ROWS, 0);
}

// Launched by cuda/lm_head.rs: sample_truncated; grid (1, chunks), 64 threads.
extern "C" __global__ void __launch_bounds__(64, 2) lm_head_sample_logits_16(Operands o, Head head, Sum *sums,
                                                                             float *logits, unsigned length) {
    write_logits<Walk16>(o, head, sums, logits, length);
}

// Launched by cuda/lm_head.rs: sample_truncated; grid (1, chunks), 128 threads.
extern "C" __global__ void __launch_bounds__(128) lm_head_sample_logits_32(Operands o, Head head, Sum *sums,
                                                                           float *logits, unsigned length) {
    write_logits<Walk32>(o, head, sums, logits, length);
}

// Launched by cuda/lm_head.rs: sample_truncated; grid (1, chunks), 256 threads.
extern "C" __global__ void __launch_bounds__(256, 2) lm_head_sample_logits_64(Operands o, Head head, Sum *sums,
                                                                              float *logits, unsigned length) {
    write_logits<Walk64>(o, head, sums, logits, length);
}

// A row's largest logit and log-sum-exp.
struct alignas(8) Stats {
    float max, lse;
};

// Launched by cuda/lm_head.rs: sample_truncated; grid (R / 8), 256 threads.
extern "C" __global__ void __launch_bounds__(256) lm_head_sample_stats(const Sum *__restrict__ sums, unsigned chunks,
                                                                       unsigned stride, unsigned rows,
                                                                       Stats *__restrict__ stats) {
    const Sum sum = sum_of_chunks(sums, chunks, stride);
    const unsigned row = blockIdx.x * MERGE_ROWS + threadIdx.x % MERGE_ROWS;
    if (threadIdx.x < MERGE_ROWS && row < rows) stats[row] = {sum.max, value(sum)};
}

using Wide = unsigned long long;

// The rank of a token as a number that ascends in order of preference: descending logit (NaN counts as -inf), then ascending id
// (below 2^22).
__device__ __forceinline__ Wide key_of(float logit, unsigned token) {
    const unsigned bits = __float_as_uint(logit == logit ? logit : -INFINITE);
    return Wide(bits & 0x80000000u ? bits : ~bits & 0x7fffffffu) << 22 | token;
}

// Bins in the same order, by the distance from the row's largest logit: distances from 2^-5 to 2^11 by exponent and seven bits of
// mantissa, all others in the nearest bin. The tokens are spread over bins at every temperature therefore, and few of them are in
// the bin in which a row is cut. A distance of NaN, which only a row with NaN has, counts as the largest.
constexpr unsigned BINS = 2048;  // shared
constexpr unsigned FIRST_BIN = (127 - 5) << 7;

__device__ __forceinline__ unsigned bin_of(float logit, const Stats &stats) {
    const unsigned bits = __float_as_uint(fminf(stats.max - logit, 2047.0f)) >> 16;
    return bits > FIRST_BIN ? min(bits - FIRST_BIN, BINS - 1) : 0;
}

// A token's probability in units of 2^-50: an integer, because sums of integers are the same in any order. NaN, which only a row
// with NaN has, counts as 0.
__device__ __forceinline__ Wide weight_of(float logit, const Stats &stats) {
    return __float2ull_rn(fmaxf(exponential(logit - stats.lse) * 0x1p50f, 0.0f));
}

// The least weight that top-p keeps of `total`.
__device__ __forceinline__ Wide reach(float top_p, Wide total) {
    const Wide least = __double2ull_ru(double(top_p) * double(total));
    return least > 1 ? least : 1;
}

__device__ __forceinline__ float floor_of(float log_min_p, const Stats &stats) {
    return log_min_p > -INFINITE ? stats.max + log_min_p : -INFINITE;
}

struct Histogram {
    unsigned low[BINS], high[BINS];  // lower and upper 32 bits of a bin's weight
    unsigned count[BINS];            // tokens of a bin

    __device__ __forceinline__ void clear() {
        for (unsigned bin = threadIdx.x; bin < BINS; bin += blockDim.x) low[bin] = high[bin] = count[bin] = 0;
    }

    // The halves of the weight are added separately, and the thread whose addition makes the low half wrap around adds the carry:
    // exact in any order. The reason is that GPUs add 32 bits to shared memory in one instruction, but 64 bits in a loop of
    // compare-and-swap, which threads that add to the same bin pass one after the other.
    __device__ __forceinline__ void add(unsigned bin, Wide weight) {
        atomicAdd(&count[bin], 1u);
        const unsigned part = unsigned(weight), before = atomicAdd(&low[bin], part);
        const unsigned rest = unsigned(weight >> 32) + (before + part < before);
        if (rest > 0) atomicAdd(&high[bin], rest);
    }

    // Valid after a barrier behind all additions.
    __device__ __forceinline__ Wide weight(unsigned bin) const { return Wide(high[bin]) << 32 | low[bin]; }
};

// The share of a row's tokens that a block of a grid (blocks, rows) takes, in units of four tokens.
struct Slice {
    unsigned length, begin, end;

    // Number of tokens of each share but the last.
    static __device__ __forceinline__ unsigned share(unsigned length, unsigned blocks) {
        return (length + blocks * 4 - 1) / (blocks * 4) * 4;
    }

    __device__ __forceinline__ explicit Slice(unsigned length) : length(length) {
        const unsigned own = share(length, gridDim.x);
        begin = min(blockIdx.x * own, length);
        end = min(begin + own, length);
    }

    // Calls f(first token, logits of four tokens) for this thread's tokens of the share.
    template <typename F>
    __device__ __forceinline__ void each(const float *logits, F &&f) const {
        const float *row = logits + size_t(blockIdx.y) * length;
        for (unsigned v = begin + threadIdx.x * 4; v < end; v += blockDim.x * 4) {
            const float4 x = *reinterpret_cast<const float4 *>(row + v);
            const float four[4] = {x.x, x.y, x.z, x.w};
            f(v, four);
        }
    }
};

// weights, counts [row][block][BINS]: each block's histogram of its tokens.
// Launched by cuda/lm_head.rs: sample_truncated; grid (blocks, R), 512 threads.
extern "C" __global__ void __launch_bounds__(512) lm_head_sample_histogram(const float *__restrict__ logits,
                                                                           const Stats *__restrict__ stats,
                                                                           unsigned vocab, unsigned length,
                                                                           Wide *__restrict__ weights,
                                                                           unsigned *__restrict__ counts) {
    __shared__ Histogram shared;
    shared.clear();
    // Barrier: all bins are empty.
    __syncthreads();
    const Stats own = stats[blockIdx.y];
    Slice(length).each(logits, [&](unsigned v, const float(&logit)[4]) {
#pragma unroll
        for (unsigned i = 0; i < 4; i++)
            if (v + i < vocab) shared.add(bin_of(logit[i], own), weight_of(logit[i], own));
    });
    // Barrier: all tokens are counted.
    __syncthreads();
    const size_t to = (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * BINS;
    for (unsigned bin = threadIdx.x; bin < BINS; bin += blockDim.x) {
        weights[to + bin] = shared.weight(bin);
        counts[to + bin] = shared.count[bin];
    }
}

constexpr unsigned SELECT_THREADS = 1024;
static_assert(BINS == 2 * SELECT_THREADS && SELECT_THREADS == WARP * WARP);

// Finds the bin at which a running sum over bins reaches a needed amount. Each thread has two neighbouring bins.
struct BinSearch {
    Wide warps[WARP];
    // Result of the last call of `find`: the bin, and the amount that is needed of that bin.
    unsigned bin;
    Wide need;

    // Returns the sum of x over the threads before this one, and in `total` over all threads.
    __device__ __forceinline__ Wide sum_before(Wide x, Wide &total) {
        const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        const Wide upto = running(x);
        if (lane == WARP - 1) warps[warp] = upto;
        // Barrier: the sums of all warps are written.
        __syncthreads();
        const Wide warps_upto = running(warps[lane]);
        total = __shfl_sync(ALL, warps_upto, WARP - 1);
        const Wide before = __shfl_sync(ALL, warps_upto, (warp + WARP - 1) % WARP);
        // Barrier: all threads have read the sums and the last result, which may be overwritten now.
        __syncthreads();
        return (warp > 0 ? before : 0) + upto - x;
    }

    // Finds the bin at which the running sum reaches needed(total); BINS if no bin does.
    template <typename Needed>
    __device__ __forceinline__ void find(const Wide (&amount)[2], Needed &&needed) {
        Wide total;
        const Wide before = sum_before(amount[0] + amount[1], total), wanted = needed(total);
        if (threadIdx.x == 0 && wanted > total) bin = BINS;
        if (before < wanted && wanted - before <= amount[0] + amount[1]) {
            const bool second = wanted - before > amount[0];
            bin = 2 * threadIdx.x + second;
            need = wanted - before - (second ? amount[0] : 0);
        }
        // Barrier: the result is written.
        __syncthreads();
    }

private:
    // Sum over the lanes up to this one.
    static __device__ __forceinline__ Wide running(Wide x) {
#pragma unroll
        for (int offset = 1; offset < int(WARP); offset *= 2) {
            const Wide below = __shfl_up_sync(ALL, x, offset);
            if (int(threadIdx.x % WARP) >= offset) x += below;
        }
        return x;
    }
};

// Where top-k and top-p cut a row: all tokens of bins below `first` stay, tokens of bins first .. last must be ranked, and tokens
// of later bins are dropped.
struct alignas(16) Cut {  // shared
    Wide weight;     // of the tokens that stay unranked
    Wide need;       // without top-k: weight that top-p needs of the ranked tokens
    unsigned count;  // number of the tokens that stay unranked
    unsigned first, last;
};
static_assert(sizeof(Cut) == 32);

// Cuts a row: keeps the top k of all tokens, and of these the top p. top_k 0 or top_p >= 1 means that there is no such cut.
// Launched by cuda/lm_head.rs: sample_truncated; grid (R), 1024 threads.
extern "C" __global__ void __launch_bounds__(1024, 1) lm_head_sample_cut(const Wide *__restrict__ weights,
                                                                         const unsigned *__restrict__ counts,
                                                                         unsigned blocks, unsigned top_k, float top_p,
                                                                         Cut *__restrict__ cuts) {
    __shared__ BinSearch search;
    __shared__ Cut cut;
    if (threadIdx.x == 0) search.need = 0;
    Wide weight[2] = {}, count[2] = {};
    for (unsigned b = 0; b < blocks; b++) {
        const size_t at = (size_t(blockIdx.x) * blocks + b) * BINS + 2 * threadIdx.x;
        const ulonglong2 w = *reinterpret_cast<const ulonglong2 *>(weights + at);
        const uint2 c = *reinterpret_cast<const uint2 *>(counts + at);
        weight[0] += w.x, weight[1] += w.y;
        count[0] += c.x, count[1] += c.y;
    }
    Wide total, tokens;
    const Wide weight_before = search.sum_before(weight[0] + weight[1], total);
    const Wide count_before = search.sum_before(count[0] + count[1], tokens);
    // Weight and count of all bins before `bin`.
    auto before = [&](unsigned bin) {
        const bool second = bin % 2;
        // Barrier: all threads have read the fields of `cut` that the last call wrote.
        __syncthreads();
        if (threadIdx.x == min(bin / 2, SELECT_THREADS - 1)) {
            cut.weight = bin == BINS ? total : weight_before + (second ? weight[0] : 0);
            cut.count = bin == BINS ? tokens : count_before + (second ? count[0] : 0);
        }
        // Barrier: the fields are written.
        __syncthreads();
    };
    unsigned first = BINS, last = BINS;
    // The least weight that top-k keeps: without the bin in which it cuts, which is not ranked yet.
    Wide least = total;
    if (top_k > 0) {
        search.find(count, [&](Wide) { return Wide(top_k); });
        first = last = search.bin;
        before(last);
        least = cut.weight;
    }
    if (top_p < 1) {
        search.find(weight, [&](Wide) { return reach(top_p, least); });
        first = min(search.bin, last);
        if (top_k == 0) last = first;
    }
    before(first);
    if (threadIdx.x == 0) cuts[blockIdx.x] = {cut.weight, search.need, cut.count, first, last};
}

// A token that stays, with the score by which it is drawn.
__device__ __forceinline__ Best scored(float logit, float noise, unsigned token) {
    return {__fadd_rn(logit, noise), logit, token};
}

// Writes to best[row][block] the best of the block's tokens that stay unranked and pass min-p; to list[row], in the block's share
// of it, the tokens that must be ranked; and to listed[row][block] the number of these. log_min_p -inf means no min-p.
// Launched by cuda/lm_head.rs: sample_truncated; grid (blocks, R), 512 threads.
extern "C" __global__ void __launch_bounds__(512) lm_head_sample_keep(
    const float *__restrict__ logits, const Stats *__restrict__ stats, const Draw *__restrict__ draws,
    const Cut *__restrict__ cuts, unsigned vocab, unsigned length, float log_min_p, uint4 *__restrict__ best,
    unsigned *__restrict__ listed, unsigned *__restrict__ list) {
    __shared__ unsigned count;
    __shared__ Best warps[512 / WARP];
    if (threadIdx.x == 0) count = 0;
    // Barrier: the count is 0.
    __syncthreads();
    const Stats own = stats[blockIdx.y];
    const Cut cut = cuts[blockIdx.y];
    const Draw draw = draws[blockIdx.y];
    const float floor = floor_of(log_min_p, own);
    const Slice slice(length);
    unsigned *to = list + size_t(blockIdx.y) * length + slice.begin;
    Best b{-INFINITE, -INFINITE, ~0u};  // loses against every token
    slice.each(logits, [&](unsigned v, const float(&logit)[4]) {
        unsigned kept = 0;
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            const unsigned bin = bin_of(logit[i], own);
            if (v + i >= vocab) continue;
            if (bin < cut.first)
                kept |= logit[i] < floor ? 0 : 1u << i;
            else if (bin <= cut.last)
                to[atomicAdd(&count, 1u)] = v + i;
        }
        if (kept == 0) return;
        const float4 noise = draw.noisy ? gumbel4(draw, v / 4) : make_float4(0, 0, 0, 0);
        if (kept & 1) b = better(b, scored(logit[0], noise.x, v));
        if (kept & 2) b = better(b, scored(logit[1], noise.y, v + 1));
        if (kept & 4) b = better(b, scored(logit[2], noise.z, v + 2));
        if (kept & 8) b = better(b, scored(logit[3], noise.w, v + 3));
    });
    for (int offset = WARP / 2; offset > 0; offset /= 2) b = better(b, exchange(b, offset));
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = b;
    // Barrier: the best tokens of all warps are written, and the list is complete.
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (unsigned i = 1; i < 512 / WARP; i++) b = better(b, warps[i]);
    const unsigned at = blockIdx.y * gridDim.x + blockIdx.x;
    best[at] = make_uint4(__float_as_uint(b.score), __float_as_uint(b.logit), b.token, 0);
    listed[at] = count;
}

// The most blocks among which a row's tokens are divided.
constexpr unsigned MAX_BLOCKS = 16;  // shared

// Shared memory of the block that ranks a row.
struct Select {
    Histogram bins;
    BinSearch search;
    unsigned offsets[MAX_BLOCKS + 1];  // sum of the lengths of the lists before each block's
    unsigned lowest, highest;           // least and greatest upper 32 bits of the keys
    Best best[SELECT_THREADS / WARP];
};

// A row's listed tokens, and the key of the last token that is kept so far, in order of preference.
struct Listed {
    const float *logits;
    const unsigned *list;
    unsigned share, count;
    // The thread's first token, kept in registers because usually a thread has at most one.
    unsigned own_token;
    float own_logit;
    Wide last = ~0ull;

    __device__ __forceinline__ Listed(const Select &shared, const float *logits, const unsigned *list, unsigned share,
                                   unsigned blocks)
        : logits(logits), list(list), share(share), count(shared.offsets[blocks]), own_token(0), own_logit(0) {
        if (threadIdx.x < count) own_token = token(shared, threadIdx.x), own_logit = logits[own_token];
    }

    // Token i of the blocks' lists, counted through all lists.
    __device__ __forceinline__ unsigned token(const Select &shared, unsigned i) const {
        unsigned block = 0;
        while (i >= shared.offsets[block + 1]) block++;
        return list[block * share + i - shared.offsets[block]];
    }

    // Calls f(token, logit, key) for this thread's tokens among those that are kept so far.
    template <typename F>
    __device__ __forceinline__ void each(const Select &shared, F &&f) const {
        for (unsigned i = threadIdx.x; i < count; i += SELECT_THREADS) {
            const unsigned v = i == threadIdx.x ? own_token : token(shared, i);
            const float logit = i == threadIdx.x ? own_logit : logits[v];
            const Wide key = key_of(logit, v);
            if (key <= last) f(v, logit, key);
        }
    }

    // Keeps tokens in order of preference until the sum of their weights reaches the needed amount. It is a radix selection by
    // key, eleven bits at a time from the highest bits in which keys differ, with integer weights, so that the order of additions
    // does not matter. `weigh(logit)` is a token's weight; `needed(total)` is the needed amount, at least 1, given the weight of
    // all tokens that were kept before. If all tokens together weigh less, all stay.
    template <typename Weigh, typename Needed>
    __device__ void keep(Select &shared, Weigh &&weigh, Needed &&needed) {
        if (threadIdx.x == 0) shared.lowest = ~0u, shared.highest = 0;
        // Barrier: lowest and highest are set.
        __syncthreads();
        unsigned lowest = ~0u, highest = 0;
        each(shared, [&](unsigned, float, Wide key) {
            lowest = min(lowest, unsigned(key >> 22));
            highest = max(highest, unsigned(key >> 22));
        });
        lowest = __reduce_min_sync(ALL, lowest);
        highest = __reduce_max_sync(ALL, highest);
        if (threadIdx.x % WARP == 0) atomicMin(&shared.lowest, lowest), atomicMax(&shared.highest, highest);
        // Barrier: all keys are included in lowest and highest.
        __syncthreads();
        if (shared.lowest > shared.highest) return;  // no token is left to choose from
        Wide low = Wide(shared.lowest) << 22, span = (Wide(shared.highest - shared.lowest) + 1) << 22;
        bool first = true;
        Wide need = 0;
        while (true) {
            // Counts the keys low .. low + span - 1 by bins; span is a power of two after the first round.
            const int bits = 64 - __clzll(static_cast<long long>(span - 1)), shift = max(bits - 11, 0);
            shared.bins.clear();
            // Barrier: all bins are empty.
            __syncthreads();
            each(shared, [&](unsigned, float logit, Wide key) {
                if (key - low < span) shared.bins.add(unsigned((key - low) >> shift), weigh(logit));
            });
            // Barrier: all tokens are counted.
            __syncthreads();
            const Wide weights[2] = {shared.bins.weight(2 * threadIdx.x), shared.bins.weight(2 * threadIdx.x + 1)};
            shared.search.find(weights, [&](Wide total) { return first ? needed(total) : need; });
            const unsigned bin = shared.search.bin;
            if (bin == BINS) return;
            need = shared.search.need;
            first = false;
            low += Wide(bin) << shift;
            span = Wide(1) << shift;
            // The last kept token is found: it is the only token of its bin, or all tokens of the bin have its key.
            if (shared.bins.count[bin] == 1 || shift == 0) break;
            // Barrier: all threads have read the bin's count.
            __syncthreads();
        }
        last = low + span - 1;
    }
};

// Ranks a row's listed tokens; keeps of them the top k, of these the top p, and of these those that pass min-p; and draws the best
// of the kept tokens and of those that stay unranked.
// Launched by cuda/lm_head.rs: sample_truncated; grid (R), 1024 threads.
extern "C" __global__ void __launch_bounds__(1024, 1) lm_head_sample_truncated(
    const float *__restrict__ logits, const Stats *__restrict__ stats, const Draw *__restrict__ draws,
    const Cut *__restrict__ cuts, const uint4 *__restrict__ bests, const unsigned *__restrict__ listed,
    const unsigned *__restrict__ list, unsigned blocks, unsigned length, unsigned top_k, float top_p, float log_min_p,
    uint2 *__restrict__ out) {
    __shared__ Select shared;
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (threadIdx.x == 0) {
        unsigned sum = 0;
        for (unsigned b = 0; b < blocks; b++) {
            shared.offsets[b] = sum;
            sum += listed[blockIdx.x * blocks + b];
        }
        shared.offsets[blocks] = sum;
    }
    // Barrier: the offsets are written.
    __syncthreads();
    const Stats own = stats[blockIdx.x];
    const Cut cut = cuts[blockIdx.x];
    const size_t first = size_t(blockIdx.x) * length;
    Listed row(shared, logits + first, list + first, Slice::share(length, blocks), blocks);
    if (row.count > 0) {
        if (top_k > 0) row.keep(shared, [](float) { return Wide(1); }, [&](Wide) { return Wide(top_k - cut.count); });
        if (top_p < 1)
            row.keep(
                shared, [&](float logit) { return weight_of(logit, own); },
                [&](Wide total) {
                    // With top-k, all tokens that stay are unranked or listed. Without it, the listed tokens are a part of the row,
                    // whose needed weight lm_head_sample_cut has computed.
                    return top_k > 0 ? reach(top_p, cut.weight + total) - cut.weight : cut.need;
                });
    }
    Best best{-INFINITE, -INFINITE, ~0u};  // loses against every token
    if (threadIdx.x < blocks) {
        const uint4 x = bests[blockIdx.x * blocks + threadIdx.x];
        best = {__uint_as_float(x.x), __uint_as_float(x.y), x.z};
    }
    const Draw draw = draws[blockIdx.x];
    const float floor = floor_of(log_min_p, own);
    row.each(shared, [&](unsigned v, float logit, Wide) {
        if (logit < floor) return;
        float noise = 0;
        if (draw.noisy) {
            const float4 four = gumbel4(draw, v / 4);
            noise = v % 4 == 0 ? four.x : v % 4 == 1 ? four.y : v % 4 == 2 ? four.z : four.w;
        }
        best = better(best, scored(logit, noise, v));
    });
    for (int offset = WARP / 2; offset > 0; offset /= 2) best = better(best, exchange(best, offset));
    if (lane == 0) shared.best[warp] = best;
    // Barrier: the best tokens of all warps are written.
    __syncthreads();
    best = shared.best[lane];
    for (int offset = WARP / 2; offset > 0; offset /= 2) best = better(best, exchange(best, offset));
    // A row of NaN has no best token. It returns token 0, and its log-prob is NaN.
    if (threadIdx.x == 0)
        out[blockIdx.x] =
            make_uint2(best.token == ~0u ? 0 : best.token, __float_as_uint(__fsub_rn(best.logit, own.lse)));
}

// -------------------------------------------------------------------------------------------------------- log-probs

// A warp has 64 x 64 logits. A block takes 64 KiB of shared memory, so that an SM with 128 KiB holds two blocks, of which one
// multiplies while the other finishes its logits.
using Walk128 = Walk<128, 2, 2>;  // shared

// found[target.index] = the target's finished logit. sums as for `sample`. logits [rows][ld] receives the logits before they are
// finished, where ld is the number of tokens of all chunks; null if they are not kept.
// Launched by cuda/lm_head.rs: lm_head_logprob_forward; grid (R / 128, chunks), 128 threads.
extern "C" __global__ void __launch_bounds__(128) lm_head_logprob_forward(Operands o, Head head, Targets targets,
                                                                          Sum *__restrict__ sums,
                                                                          float *__restrict__ found,
                                                                          float *__restrict__ logits, unsigned ld) {
    using W = Walk128;
    const unsigned row0 = blockIdx.x * W::ROWS, begin = blockIdx.y * CHUNK, end = min(begin + CHUNK, o.vocab);
    const unsigned list = blockIdx.y * gridDim.x + blockIdx.x;
    const unsigned first = targets.offsets[list], last = targets.offsets[list + 1];
    W w;
    Sums<W> running;
    w.tiles(o, begin, end, row0, memory, [&](unsigned v0) {
        if (logits != nullptr)
            w.each_vector(logits, ld, v0, row0, o.rows, [&](int n, int j, float *to) {
#pragma unroll
                for (int i = 0; i < 8; i += 4)
                    *reinterpret_cast<float4 *>(to + i) =
                        make_float4(w.at(n, j, i), w.at(n, j, i + 1), w.at(n, j, i + 2), w.at(n, j, i + 3));
            });
        finish_tile(w, head, v0, o.vocab);
        running.add_tile(w);
        if (!targets.met<W>(first, last, v0, row0)) return;
        const unsigned token = v0 + W::token();
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                for (unsigned t = first; t < last; t++) {
                    const Target target = targets.list[t];
                    if (target.row != row0 + W::column(n, j)) continue;
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (target.token == token + i) found[target.index] = w.at(n, j, i);
                }
    });
    running.store(memory, sums + size_t(blockIdx.y) * gridDim.x * W::ROWS, row0);
}

// lse [rows].
// Launched by cuda/lm_head.rs: merge; grid (R / 8), 256 threads.
extern "C" __global__ void __launch_bounds__(256) lm_head_logprob_forward_merge(
    const Sum *__restrict__ sums, unsigned chunks, unsigned stride, unsigned rows, float *__restrict__ lse) {
    const float x = value(sum_of_chunks(sums, chunks, stride));
    const unsigned row = blockIdx.x * MERGE_ROWS + threadIdx.x % MERGE_ROWS;
    if (threadIdx.x < MERGE_ROWS && row < rows) lse[row] = x;
}

// ---------------------------------------------------------------------------------------------------------- gradient

// The arguments of the gradient: dlogits[row][v - v0] = (total[row] pi(v) - weight of (row, v)) d finished / d l for the chunks
// from chunk0 on, whose first token is v0. dlogits is [rows][ld], where ld is at least the number of tokens of the grid's chunks.
// Columns of tokens beyond the vocabulary, up to the end of their tile, become 0. Grid: row tiles x chunks.
struct Gradient {  // shared
    Targets targets;
    const float *__restrict__ lse;
    const float *__restrict__ total;
    bf16 *__restrict__ dlogits;
    unsigned chunk0, ld;
};
static_assert(sizeof(Gradient) == 48);

// A block's share of the gradient.
template <typename W>
struct Share {
    unsigned row0, begin, end;
    unsigned first, last;  // the block's targets are first .. last - 1

    __device__ __forceinline__ Share(const Gradient &g, unsigned vocab) {
        const unsigned chunk = g.chunk0 + blockIdx.y, list = chunk * gridDim.x + blockIdx.x;
        row0 = blockIdx.x * W::ROWS, begin = chunk * CHUNK, end = min(begin + CHUNK, vocab);
        first = g.targets.offsets[list], last = g.targets.offsets[list + 1];
    }

    // Writes dlogits of the tile whose logits are in w.
    __device__ __forceinline__ void write(W &w, const Gradient &g, const Head &head, unsigned v0, unsigned rows,
                                          unsigned vocab) const {
        const unsigned token = v0 + W::token();
        const bool any = g.targets.met<W>(first, last, v0, row0);
        w.each_vector(g.dlogits, g.ld, v0 - g.chunk0 * CHUNK, row0, rows, [&](int n, int j, bf16 *to) {
            const unsigned row = row0 + W::column(n, j);
            const float row_lse = g.lse[row], row_total = g.total[row];
            float d[8], slope[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float l = w.at(n, j, i);
                slope[i] = head.inverse_temperature;
                if (head.softcap > 0) {
                    const float tanh = tanhf(l * head.inverse_softcap);
                    l = head.softcap * tanh;
                    slope[i] *= 1.0f - tanh * tanh;
                }
                const float p = exponential(l * head.inverse_temperature - row_lse);
                d[i] = token + i < vocab ? row_total * p : 0;
            }
            if (any)
                for (unsigned t = first; t < last; t++) {
                    const Target target = g.targets.list[t];
                    if (target.row != row) continue;
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (target.token == token + i) d[i] -= target.weight;
                }
#pragma unroll
            for (int i = 0; i < 8; i++) d[i] *= slope[i];
            *reinterpret_cast<uint4 *>(to) =
                make_uint4(pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]), pack_bf16(d[6], d[7]));
        });
    }
};

// Launched by cuda/lm_head.rs: logprob_backward_within; grid (R / 128, chunks of the range), 128 threads.
extern "C" __global__ void __launch_bounds__(128) lm_head_logprob_backward(Operands o, Head head, Gradient g) {
    using W = Walk128;
    const Share<W> share(g, o.vocab);
    W w;
    w.tiles(o, share.begin, share.end, share.row0, memory,
            [&](unsigned v0) { share.write(w, g, head, v0, o.rows, o.vocab); });
}

// The same from the logits [rows][kept_ld] that lm_head_logprob_forward has written.
// Launched by cuda/lm_head.rs: logprob_backward_within; grid (R / 128, chunks of the range), 128 threads.
extern "C" __global__ void __launch_bounds__(128) lm_head_logprob_backward_kept(Operands o, Head head, Gradient g,
                                                                                const float *__restrict__ logits,
                                                                                unsigned kept_ld) {
    using W = Walk128;
    const Share<W> share(g, o.vocab);
    W w;
    for (unsigned v0 = share.begin; v0 < share.end; v0 += TILE_V) {
        w.each_vector(logits, kept_ld, v0, share.row0, o.rows, [&](int n, int j, const float *from) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                const float4 four = *reinterpret_cast<const float4 *>(from + i);
                w.at(n, j, i) = four.x, w.at(n, j, i + 1) = four.y;
                w.at(n, j, i + 2) = four.z, w.at(n, j, i + 3) = four.w;
            }
        });
        share.write(w, g, head, v0, o.rows, o.vocab);
    }
}
