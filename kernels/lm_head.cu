// The LM head fused with what consumes it: sampling, log-probs and their gradient. Formulas and shapes: `lm_head_*` of
// src/backend/mod.rs; tiles, chunks and the order of sums: lm_head.cuh. E [V, D] is the table, X [R, D] the rows.
//
//   l = x . E_v, finished: softcap tanh(l / softcap) / temperature;   lse = ln sum_v e^l;   log pi(v) = l - lse
//
// **lm_head_sample** draws argmax_v l + G_v, G Gumbel noise: a draw from pi (Maddison et al. 2014). Blocks (row tile,
// chunk) keep, in registers, each row's best token and running log-sum-exp; a second kernel merges chunks. Movement, in
// bytes: E once (Gemma 2B: 2 V D = 1049 MB; X, 128 KB for 32 rows, comes from L2 for every tile), and 48 R for each of
// V / 512 chunks between the kernels. FLOPs: 2 R V D on the tensor cores, 33.6 G for 32 rows: 32 FLOPs a byte, far
// below what a GPU balances (200 and more), so memory is the limit, and the time is that of reading the table. About
// 150 instructions of PTX a logit for noise (a Philox block of four, twice a logarithm each) and sums: 3.8e7 of warps
// for 32 rows x 256,000, 63 us of an A100's issue slots, against 515 us of its memory (Gemma 3 270M: 165 us). The
// copies of two stages and more fly meanwhile, and those of the other block on the multiprocessor.
//
// **Truncation** ranks a row's whole vocabulary: for at most 16 rows at a time, logits are written (4 R V) and read by
// one block per row that finds the last token to keep by radix selection, then draws among those kept.
//
// **lm_head_logprob_forward** is the same walk with 128 x 128 tiles, limited by the tensor cores: 2 R V D FLOPs, 4.3 T
// for 4096 rows of Gemma 2B; the V R logits would be 2.1 GB in bf16, and never exist. Blocks of one chunk run side by
// side, so E comes from DRAM once and otherwise, like X, from L2: 64 FLOPs a byte. Per mma, 1.1 other instructions of
// PTX in the main loop, and 12 a logit behind it.
//
// **lm_head_logprob_backward** computes logit tiles again and writes dlogits, bf16, for a range of the vocabulary that
// fits the workspace; kernels/matmul.cu makes dX = dlogits E, whose sums go on from range to range, and
// dE += dlogits^T X of it. FLOPs: 6 R V D.

#include "lm_head.cuh"

extern __shared__ __align__(128) unsigned char memory[];  // stages, then a chunk's results

// A token whose logit is asked for. Sorted by (chunk, row tile); `list` of a block: offsets[chunk * row tiles + tile]
// and the next.
struct alignas(16) Target {
    unsigned row, token;
    unsigned index;  // forward: where the logit goes
    float weight;    // backward: of this (row, token), which occurs once
};

struct Targets {
    const unsigned *__restrict__ offsets;
    const Target *__restrict__ list;

    // Whether this warp has logits of any of them in the tile. Most have none, and look no further.
    template <typename W>
    __device__ __forceinline__ bool met(unsigned first, unsigned last, unsigned v0, unsigned row0) const {
        for (unsigned t = first; t < last; t++)
            if (list[t].token - v0 - W::half() * 64 < 64 && list[t].row - row0 - W::warp_column() < W::COLUMNS)
                return true;
        return false;
    }
};

// Finishes the logits of a tile in place, with the branches outside of the loops. Tokens that do not exist: -inf.
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

// Log-sum-exps of the thread's columns; after a chunk, of the block's rows to memory: partial[chunk][stride].
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

    // `memory`: 2 ROWS sums of shared memory that nobody uses.
    __device__ __forceinline__ void store(void *memory, Sum *__restrict__ partial, unsigned row0) {
        Sum *halves = static_cast<Sum *>(memory);
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const Sum s = over_lanes(of[n][j]);
                if (threadIdx.x % WARP < 4) halves[W::half() * W::ROWS + W::column(n, j)] = s;
            }
        // Both halves of the tokens are there.
        __syncthreads();
        for (unsigned r = threadIdx.x; r < W::ROWS; r += W::THREADS)
            partial[row0 + r] = merge(halves[r], halves[W::ROWS + r]);
    }
};

// -------------------------------------------------------------------------------------------------------- sampling

// sums, best: [chunks][stride], stride the rows in whole tiles. Grid: row tiles x chunks.
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
                    // Tokens ascend: among equals the first stays.
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
    // Both halves of the tokens are there.
    __syncthreads();
    for (unsigned r = threadIdx.x; r < W::ROWS; r += W::THREADS) {
        const Best b = better(halves[r], halves[W::ROWS + r]);
        best[out + row0 + r] = make_uint4(__float_as_uint(b.score), __float_as_uint(b.logit), b.token, 0);
    }
}

using Rows16 = Walk<16, 1, 4>;
using Rows32 = Walk<32, 2, 4>;
using Rows64 = Walk<64, 4, 3>;

extern "C" __global__ void __launch_bounds__(64, 2) lm_head_sample_16(Operands o, Head head, const Draw *draws,
                                                                      Sum *sums, uint4 *best) {
    sample<Rows16>(o, head, draws, sums, best);
}

extern "C" __global__ void __launch_bounds__(128) lm_head_sample_32(Operands o, Head head, const Draw *draws, Sum *sums,
                                                                    uint4 *best) {
    sample<Rows32>(o, head, draws, sums, best);
}

extern "C" __global__ void __launch_bounds__(256, 2) lm_head_sample_64(Operands o, Head head, const Draw *draws,
                                                                       Sum *sums, uint4 *best) {
    sample<Rows64>(o, head, draws, sums, best);
}

// Merging chunks: a block of 256 threads takes 8 rows; thread (slot, row) the chunks slot, slot + 32, ..., in order;
// then slots are merged in a tree. A row's merges are the same whatever R.
constexpr unsigned MERGE_ROWS = 8, MERGE_SLOTS = 32;

// `join`, which is commutative, of a row's slots.
template <typename T, typename Join>
__device__ __forceinline__ T over_slots(T x, T (&warps)[8][MERGE_ROWS], Join &&join) {
    x = join(x, exchange(x, 8));
    x = join(x, exchange(x, 16));
    const unsigned row = threadIdx.x % MERGE_ROWS;
    if (threadIdx.x % WARP < MERGE_ROWS) warps[threadIdx.x / WARP][row] = x;
    // All warps' parts are there.
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
    return over_slots(s, warps, [](const Sum &a, const Sum &b) { return merge(a, b); });
}

__device__ __forceinline__ float value(const Sum &s) { return __fadd_rn(s.max, logf(s.sum)); }

// out[row] = (token, its log-prob). Grid: R / 8.
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
    b = over_slots(b, warps, [](const Best &a, const Best &b) { return better(a, b); });
    if (threadIdx.x < MERGE_ROWS && row < rows)
        out[row] = make_uint2(b.token, __float_as_uint(__fsub_rn(b.logit, lse)));
}

// ------------------------------------------------------------------------------------------------------ truncation

// sums as above; logits [rows][length]: length is vocab rounded up to 8, what lies beyond vocab is -inf. rows <= 16.
// Grid: 1 x chunks.
extern "C" __global__ void __launch_bounds__(64, 2) lm_head_sample_logits(Operands o, Head head, Sum *__restrict__ sums,
                                                                       float *__restrict__ logits, unsigned length) {
    using W = Rows16;
    const unsigned begin = blockIdx.y * CHUNK, end = min(begin + CHUNK, o.vocab);
    W w;
    Sums<W> running;
    w.tiles(o, begin, end, 0, memory, [&](unsigned v0) {
        finish_tile(w, head, v0, o.vocab);
        running.add_tile(w);
        // A lane's eight tokens are a sector of 32 bytes. Neighbours exchange halves, so that each of the two stores of
        // 16 bytes writes whole sectors: first the even lane's eight tokens, then the odd one's.
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

// Tokens in order of preference: descending logit (NaN as -inf), then ascending id. `rank` ascends in that order.
__device__ __forceinline__ unsigned rank_of(float logit) {
    const unsigned bits = __float_as_uint(logit == logit ? logit : -INFINITE);
    return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

constexpr unsigned SELECT_THREADS = 1024, BINS = 2048;

// What one row's block shares.
struct Select {
    unsigned low[BINS], high[BINS];  // of a bin's weight
    unsigned count[BINS];
    // What the first warp found: the bin, and what is needed of it.
    unsigned bin, bin_count;
    unsigned long long need;
    Best best[SELECT_THREADS / WARP];
    float max[SELECT_THREADS / WARP];

    __device__ __forceinline__ void clear(unsigned bin) { low[bin] = high[bin] = count[bin] = 0; }

    // Logits lie close together, so that most tokens meet in a few bins. GPUs add 32 bits to shared memory in one
    // instruction, but 64 bits in a loop of compare-and-swap, which all that meet go through one after the other. So
    // the halves are added apart, and whoever makes the low one wrap around carries: exact in any order.
    __device__ __forceinline__ void add(unsigned bin, unsigned long long weight) {
        atomicAdd(&count[bin], 1u);
        const unsigned part = unsigned(weight), before = atomicAdd(&low[bin], part);
        const unsigned rest = unsigned(weight >> 32) + (before + part < before);
        if (rest > 0) atomicAdd(&high[bin], rest);
    }

    // When all have added.
    __device__ __forceinline__ unsigned long long weight(unsigned bin) const {
        return (unsigned long long)high[bin] << 32 | low[bin];
    }
};

// A row's tokens and the last one kept so far, in order of preference.
struct Row {
    const float *__restrict__ logits;
    unsigned vocab, length;
    unsigned last_rank = ~0u, last_token = ~0u;

    __device__ __forceinline__ bool keeps(unsigned rank, unsigned token) const {
        return rank < last_rank || (rank == last_rank && token <= last_token);
    }

    // f(token, logit) for this thread's share of all tokens.
    template <typename F>
    __device__ __forceinline__ void each(F &&f) const {
        for (unsigned v = threadIdx.x * 4; v < length; v += SELECT_THREADS * 4) {
            const float4 x = *reinterpret_cast<const float4 *>(logits + v);
            const float l[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (unsigned i = 0; i < 4; i++)
                if (v + i < vocab) f(v + i, l[i]);
        }
    }

    // Keeps the tokens until their weights reach what is needed: radix selection over (rank, token), eleven bits at a
    // time, in integers, so that the order of additions does not matter. `weigh(logit)` is a token's weight;
    // `needed(total)` what is needed, at least 1, of the weight of all tokens kept before. Without that much all stay.
    template <typename Weigh, typename Needed>
    __device__ void keep(Select &shared, Weigh &&weigh, Needed &&needed) {
        unsigned rank = 0, token = 0;  // the digits found so far
        unsigned long long need = 0;
        for (int level = 0; level < 5; level++) {
            for (unsigned i = threadIdx.x; i < BINS; i += SELECT_THREADS) shared.clear(i);
            // The bins are empty; and all have read what the level before found.
            __syncthreads();
            // Where this level's digit begins, and the one above it: ranks have digits of 11, 11 and 10 bits, tokens 11
            // and 11.
            const int shift = level == 0 ? 21 : level == 1 ? 10 : level == 3 ? 11 : 0;
            const int above = level == 1 ? 21 : level == 2 ? 10 : level == 4 ? 11 : 32;
            each([&](unsigned v, float logit) {
                const unsigned r = rank_of(logit);
                if (!keeps(r, v)) return;
                const unsigned digits = level < 3 ? r : v, found = level < 3 ? rank : token;
                if (level >= 3 && r != rank) return;
                if (above < 32 && digits >> above != found >> above) return;
                const unsigned bin = digits >> shift & (level == 2 ? 1023u : level == 3 ? ~0u : 2047u);
                shared.add(bin, weigh(logit));
            });
            // All tokens are counted.
            __syncthreads();
            if (threadIdx.x < WARP) {
                if (level == 0) {
                    unsigned long long total = 0;
                    for (unsigned i = threadIdx.x; i < BINS; i += WARP) total += shared.weight(i);
                    for (int offset = WARP / 2; offset > 0; offset /= 2) total += __shfl_xor_sync(ALL, total, offset);
                    need = needed(total);
                }
                find(shared, need);
            }
            // The bin is found.
            __syncthreads();
            const unsigned bin = shared.bin, count = shared.bin_count;
            need = shared.need;
            if (bin == BINS) return;
            const unsigned mask = (1u << shift) - 1;
            if (level < 3)
                rank |= bin << shift;
            else
                token |= bin << shift;
            // One token in the bin: it is the last. (What is kept of a bin in full is its own last digits.)
            if (level == 4 || count == 1) {
                last_rank = level < 3 ? rank | mask : rank;
                last_token = level < 3 ? ~0u : token | mask;
                return;
            }
        }
    }

private:
    // The first warp: the bin in which the running sum of weights reaches `need`; BINS if none does.
    static __device__ __forceinline__ void find(Select &shared, unsigned long long need) {
        unsigned long long before = 0;
        for (unsigned first = 0; first < BINS; first += WARP) {
            const unsigned long long own = shared.weight(first + threadIdx.x);
            unsigned long long sum = own;
#pragma unroll
            for (int offset = 1; offset < int(WARP); offset *= 2) {
                const unsigned long long below = __shfl_up_sync(ALL, sum, offset);
                if (int(threadIdx.x) >= offset) sum += below;
            }
            const unsigned reached = __ballot_sync(ALL, before + sum >= need);
            if (reached) {
                if (int(threadIdx.x) == __ffs(int(reached)) - 1) {
                    shared.bin = first + threadIdx.x;
                    shared.bin_count = shared.count[first + threadIdx.x];
                    shared.need = need - (before + sum - own);
                }
                return;
            }
            before += __shfl_sync(ALL, sum, WARP - 1);
        }
        if (threadIdx.x == 0) shared.bin = BINS, shared.bin_count = 0, shared.need = 0;
    }
};

// One row: keeps top-k of all tokens, of these top-p, of these min-p, and takes the best of what is left. Probabilities
// are counted in units of 2^-50: integers add up in any order. top_k 0, top_p >= 1, log_min_p -inf: no such cut.
// Grid: rows.
extern "C" __global__ void __launch_bounds__(1024, 1) lm_head_sample_truncated(
    const float *__restrict__ logits, const float *__restrict__ lse, const Draw *__restrict__ draws, unsigned vocab,
    unsigned length, unsigned top_k, float top_p, float log_min_p, uint2 *__restrict__ out) {
    __shared__ Select shared;
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Row row{logits + size_t(blockIdx.x) * length, vocab, length};
    const float all = lse[blockIdx.x];
    if (top_k > 0 && top_k < vocab)
        row.keep(shared, [](float) { return 1ull; }, [&](unsigned long long) { return (unsigned long long)top_k; });
    if (top_p < 1)
        row.keep(
            shared, [&](float logit) { return __float2ull_rn(exponential(logit - all) * 0x1p50f); },
            [&](unsigned long long total) {
                const unsigned long long reach = __double2ull_ru(double(top_p) * double(total));
                return reach > 1 ? reach : 1;
            });
    float floor = -INFINITE;
    if (log_min_p > -INFINITE) {
        float max = -INFINITE;
        row.each([&](unsigned, float logit) { max = fmaxf(max, logit); });
        max = warp_max(max);
        if (lane == 0) shared.max[warp] = max;
        // All warps' maxima are there.
        __syncthreads();
        floor = warp_max(shared.max[lane]) + log_min_p;
    }

    const Draw draw = draws[blockIdx.x];
    Best best{-INFINITE, -INFINITE, ~0u};  // loses against every token
    row.each([&](unsigned v, float logit) {
        if (!row.keeps(rank_of(logit), v) || logit < floor) return;
        float score = logit;
        if (draw.noisy) {
            const float4 four = gumbel4(draw, v / 4);
            score = __fadd_rn(logit, v % 4 == 0 ? four.x : v % 4 == 1 ? four.y : v % 4 == 2 ? four.z : four.w);
        }
        best = better(best, {score, logit, v});
    });
    for (int offset = WARP / 2; offset > 0; offset /= 2) best = better(best, exchange(best, offset));
    if (lane == 0) shared.best[warp] = best;
    // All warps' best tokens are there.
    __syncthreads();
    best = shared.best[lane];
    for (int offset = WARP / 2; offset > 0; offset /= 2) best = better(best, exchange(best, offset));
    // A row of NaN has no best token: it says so by its log-prob.
    if (threadIdx.x == 0)
        out[blockIdx.x] = make_uint2(best.token == ~0u ? 0 : best.token, __float_as_uint(__fsub_rn(best.logit, all)));
}

// -------------------------------------------------------------------------------------------------------- log-probs

// 64 x 64 logits a warp; 64 KiB of shared memory, so that two blocks share an SM where it has 128 KiB: one multiplies
// while the other finishes its logits.
using Rows128 = Walk<128, 2, 2>;

// found[target.index] = the target's logit; sums as in sampling. Grid: row tiles x chunks.
extern "C" __global__ void __launch_bounds__(128) lm_head_logprob_forward(Operands o, Head head, Targets targets,
                                                                          Sum *__restrict__ sums,
                                                                          float *__restrict__ found) {
    using W = Rows128;
    const unsigned row0 = blockIdx.x * W::ROWS, begin = blockIdx.y * CHUNK, end = min(begin + CHUNK, o.vocab);
    const unsigned list = blockIdx.y * gridDim.x + blockIdx.x;
    const unsigned first = targets.offsets[list], last = targets.offsets[list + 1];
    W w;
    Sums<W> running;
    w.tiles(o, begin, end, row0, memory, [&](unsigned v0) {
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

// lse [rows]. Grid: R / 8.
extern "C" __global__ void __launch_bounds__(256) lm_head_logprob_forward_merge(
    const Sum *__restrict__ sums, unsigned chunks, unsigned stride, unsigned rows, float *__restrict__ lse) {
    const float x = value(sum_of_chunks(sums, chunks, stride));
    const unsigned row = blockIdx.x * MERGE_ROWS + threadIdx.x % MERGE_ROWS;
    if (threadIdx.x < MERGE_ROWS && row < rows) lse[row] = x;
}

// ---------------------------------------------------------------------------------------------------------- gradient

// dlogits[row][v - v0] = (total[row] pi(v) - weight of (row, v)) d finished / d l, of the chunks from chunk0 (token v0)
// on: [rows][ld], ld at least as many tokens as the grid's chunks have. Tokens beyond the vocabulary, up to the end of
// their tile: 0. Grid: row tiles x chunks.
extern "C" __global__ void __launch_bounds__(128) lm_head_logprob_backward(
    Operands o, Head head, Targets targets, const float *__restrict__ lse, const float *__restrict__ total,
    unsigned chunk0, bf16 *__restrict__ dlogits, unsigned ld) {
    using W = Rows128;
    const unsigned chunk = chunk0 + blockIdx.y, list = chunk * gridDim.x + blockIdx.x;
    const unsigned row0 = blockIdx.x * W::ROWS, begin = chunk * CHUNK, end = min(begin + CHUNK, o.vocab);
    const unsigned first = targets.offsets[list], last = targets.offsets[list + 1];
    W w;
    w.tiles(o, begin, end, row0, memory, [&](unsigned v0) {
        const unsigned token = v0 + W::token();
        const bool any = targets.met<W>(first, last, v0, row0);
#pragma unroll
        for (int n = 0; n < W::N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned row = row0 + W::column(n, j);
                if (row >= o.rows) continue;
                const float row_lse = lse[row], row_total = total[row];
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
                    d[i] = token + i < o.vocab ? row_total * p : 0;
                }
                if (any)
                    for (unsigned t = first; t < last; t++) {
                        const Target target = targets.list[t];
                        if (target.row != row) continue;
#pragma unroll
                        for (int i = 0; i < 8; i++)
                            if (target.token == token + i) d[i] -= target.weight;
                    }
#pragma unroll
                for (int i = 0; i < 8; i++) d[i] *= slope[i];
                bf16 *to = dlogits + size_t(row) * ld + (token - chunk0 * CHUNK);
                *reinterpret_cast<uint4 *>(to) =
                    make_uint4(pack(d[0], d[1]), pack(d[2], d[3]), pack(d[4], d[5]), pack(d[6], d[7]));
            }
    });
}
