// RMSNorm as Gemma has it, alone and fused with the residual addition before it.
//
//   norm(x; w) = x r (offset + w),  r = 1 / sqrt(mean(x^2) + eps)                    x [T, D], w [D]
//   add_norm:    sum = scale (x + norm(branch; post)),  without post scale (x + branch),  normed = norm(sum; pre)
//   add:         the same with post and without pre and normed
//
// Up to Gemma 3 weights are differences from 1, offset is 1; in Gemma 4 it is 0. scale is Gemma 4's layer scalar, else 1.
//
// Backward, with dn = dnormed, ds = dsum, g = dn (offset + pre), all of one row:
//   dx = scale (ds + r (g - sum r^2 mean(g sum))),    dpre  += dn sum r over all rows
//   with g' = dx (offset + post), r' that of branch:
//   dbranch = r' (g' - branch r'^2 mean(g' branch)),  dpost += dx branch r' over all rows
//
// All tensors are bf16, the gradients of weights f32; arithmetic is f32, and every result is rounded once, when it is stored.
// `normed` is computed from `sum` as stored, by the function that rms_norm_forward uses. A backward pass that computes it again
// from the stored sum gets the same bits therefore.
//
// Algorithm. A thread holds one vector (8 columns, 16 bytes) of a row, and a row is in the registers of D / 8 threads: every byte
// is read once, however often the formula needs it. Sums over a row go through shuffles within each warp and then through one
// word of shared memory for each warp, in an order that depends on D alone. Where there are many rows a block takes several, so
// that the weights, which every row needs, are read once for each block and stay in registers. The loads of the next row start
// before the block waits for the sums of this row.
//
// Bytes of a row: forward 4 D (read, write), add_norm 8 D, backward 8 D, with post 12 D. FLOPs: some 15 per element, far fewer
// than a GPU executes in the time of the bytes. The limit is memory, and so the design keeps many bytes in flight (16 to 64 for
// each thread) and reads nothing twice.

#include "partials.cuh"

// Sums each of N numbers over the threads of a row, which are `warps` warps that use the barrier `barrier`. All threads get the
// same bits. `partial` is a buffer of N * WARP floats. Callers alternate between two buffers, because the barrier inside a call
// proves that all threads have finished reading the buffer of the call before.
template <int N>
__device__ __forceinline__ void row_sum(float (&x)[N], float *partial, unsigned warp, unsigned warps,
                                        unsigned barrier) {
    const unsigned lane = threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < N; n++) {
        x[n] = warp_sum(x[n]);
        if (lane == 0) partial[n * WARP + warp] = x[n];
    }
    // Barrier: the sums of all warps of the row are written.
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(warps * WARP) : "memory");
#pragma unroll
    for (int n = 0; n < N; n++) x[n] = warp_sum(lane < warps ? partial[n * WARP + lane] : 0.0f);
}

__device__ __forceinline__ float sum_squares(const float (&x)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

// r of a row from its sum of squares; per_col is 1 / D.
__device__ __forceinline__ float reciprocal_rms(float squares, float per_col, float eps) {
    return rsqrtf(fmaf(squares, per_col, eps));
}

// y = x r (offset + w).
__device__ __forceinline__ void normalize(const float (&x)[8], float r, const bf16x8 &w, float offset, float (&y)[8]) {
    float weight[8];
    widen(w, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = x[i] * r * (offset + weight[i]);
}

// Rows of blockIdx.x * per_block and the following. Without ADD there is neither branch nor sum, and x is what is
// normed. Without PRE there is no normed.
template <bool ADD, bool POST, bool PRE = true>
__device__ __forceinline__ void forward(const bf16 *x, const bf16 *branch, const bf16 *post, const bf16 *pre, bf16 *sum,
                                        bf16 *normed, unsigned rows, unsigned cols, unsigned per_block, float eps,
                                        float offset, float scale) {
    __shared__ float partial[2][WARP];
    const unsigned vector = threadIdx.x, vectors = cols / 8;
    const unsigned warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const unsigned first = blockIdx.x * per_block, end = min(first + per_block, rows);
    // The last warp may have lanes beyond the row, which hold zeros and take part in the sums.
    const bool inside = vector < vectors;
    bf16x8 w_pre = {}, w_post = {}, next_x = {}, next_branch = {};
    if (inside) {
        if (PRE) w_pre = load8(pre, vector);
        if (POST) w_post = load8(post, vector);
        next_x = load8(x, size_t(first) * vectors + vector);
        if (ADD) next_branch = load8(branch, size_t(first) * vectors + vector);
    }
    const float per_col = 1.0f / cols;
    unsigned parity = 0;  // which buffer of `partial` the next sum uses
    for (unsigned row = first; row < end; row++) {
        const size_t at = size_t(row) * vectors + vector;
        float value[8], added[8], scratch[1];
        bf16x8 x_packed = next_x;
        widen(next_x, value);
        if (ADD) widen(next_branch, added);
        if (inside && row + 1 < end) {
            next_x = load8(x, at + vectors);
            if (ADD) next_branch = load8(branch, at + vectors);
        }
        if (POST) {
            scratch[0] = sum_squares(added);
            row_sum(scratch, partial[parity], warp, warps, 0);
            parity ^= 1;
            keep_packed(w_post);
            normalize(added, reciprocal_rms(scratch[0], per_col, eps), w_post, offset, added);
            if (!PRE) {
                // x is kept packed meanwhile, because ptxas spills here for sm_80.
                keep_packed(x_packed);
                widen(x_packed, value);
            }
        }
        if (ADD) {
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = (value[i] + added[i]) * scale;
            const bf16x8 stored = narrow(value);
            if (inside) store8(sum, at, stored);
            widen(stored, value);
        }
        if (PRE) {
            scratch[0] = sum_squares(value);
            row_sum(scratch, partial[parity], warp, warps, 0);
            parity ^= 1;
            if (ADD) keep_packed(w_pre);
            normalize(value, reciprocal_rms(scratch[0], per_col, eps), w_pre, offset, value);
            if (inside) store8(normed, at, narrow(value));
        }
    }
}

// All four: a block has as many warps as a row of D / 8 vectors needs.
// Launched by cuda/rms_norm.rs: rms_norm_forward; grid (rows / per_block), D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) rms_norm_forward(
    const bf16 *__restrict__ x, const bf16 *__restrict__ w, bf16 *__restrict__ y, unsigned rows, unsigned cols,
    unsigned per_block, float eps, float offset) {
    forward<false, false>(x, nullptr, nullptr, w, nullptr, y, rows, cols, per_block, eps, offset, 1.0f);
}

// Launched by cuda/rms_norm.rs: add_norm_forward; grid (rows / per_block), D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_norm_forward(
    const bf16 *__restrict__ x, const bf16 *__restrict__ branch, const bf16 *__restrict__ pre, bf16 *__restrict__ sum,
    bf16 *__restrict__ normed, unsigned rows, unsigned cols, unsigned per_block, float eps, float offset,
    float scale) {
    forward<true, false>(x, branch, nullptr, pre, sum, normed, rows, cols, per_block, eps, offset, scale);
}

// Launched by cuda/rms_norm.rs: add_norm_forward; grid (rows / per_block), D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_norm_forward_post(
    const bf16 *__restrict__ x, const bf16 *__restrict__ branch, const bf16 *__restrict__ post,
    const bf16 *__restrict__ pre, bf16 *__restrict__ sum, bf16 *__restrict__ normed, unsigned rows, unsigned cols,
    unsigned per_block, float eps, float offset, float scale) {
    forward<true, true>(x, branch, post, pre, sum, normed, rows, cols, per_block, eps, offset, scale);
}

// Launched by cuda/rms_norm.rs: add_forward; grid (rows / per_block), D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_forward(
    const bf16 *__restrict__ x, const bf16 *__restrict__ branch, const bf16 *__restrict__ post, bf16 *__restrict__ sum,
    unsigned rows, unsigned cols, unsigned per_block, float eps, float offset, float scale) {
    forward<true, true, false>(x, branch, post, nullptr, sum, nullptr, rows, cols, per_block, eps, offset, scale);
}

// The most groups of a block of the backward pass. A group is the threads of one row; each has its own hardware barrier.
constexpr unsigned MAX_GROUPS = 8;  // shared

// The gradient of one norm for a thread's vector of a row, given dy, x, and the row's sums of x^2 and dy (offset + w) x. Computes dx,
// and adds the gradient of the weight to `dw`.
__device__ __forceinline__ void norm_backward(const float (&dy)[8], const float (&x)[8], const bf16x8 &w, float offset,
                                              float squares, float product, float per_col, float eps, float (&dx)[8],
                                              float (&dw)[8]) {
    const float r = reciprocal_rms(squares, per_col, eps);
    const float coefficient = product * r * r * per_col;
    float weight[8];
    widen(w, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        dw[i] = fmaf(dy[i], x[i] * r, dw[i]);
        dx[i] = r * fmaf(-coefficient, x[i], dy[i] * (offset + weight[i]));
    }
}

// Sum of dy (offset + w) x over a vector.
__device__ __forceinline__ float sum_products(const float (&dy)[8], const float (&x)[8], const bf16x8 &w,
                                              float offset) {
    float weight[8], sum = 0.0f;
    widen(w, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(dy[i] * (offset + weight[i]), x[i], sum);
    return sum;
}

// A block takes `per_block` rows. Each of its groups of D / 8 threads takes one row at a time, independently of the other groups.
// At the end the groups' gradients of the weights are added up, in ascending order of groups, to one row of `partials` [blocks,
// cols]: those of pre, then those of post. d_sum may be null. Without PRE, d_normed is a second gradient of the sum, which may be
// null.
template <bool PRE, bool POST>
__device__ __forceinline__ void backward(const bf16 *d_sum, const bf16 *d_normed, const bf16 *sum, const bf16 *pre,
                                         const bf16 *branch, const bf16 *post, bf16 *dx, bf16 *d_branch,
                                         float *partials, unsigned rows, unsigned cols, unsigned per_block,
                                         float eps, float offset, float scale) {
    __shared__ float scratch[MAX_GROUPS][2][3][WARP];
    extern __shared__ float4 gathered[]; // [groups, cols]
    const unsigned vectors = cols / 8, warps = (vectors + WARP - 1) / WARP;
    const unsigned group = threadIdx.x / (warps * WARP), groups = blockDim.x / (warps * WARP);
    const unsigned vector = threadIdx.x % (warps * WARP), warp = vector / WARP;
    const unsigned end = min((blockIdx.x + 1) * per_block, rows);
    const bool inside = vector < vectors;
    // The weights [2, cols] are kept in shared memory, because registers are scarce here.
    bf16 *weights = reinterpret_cast<bf16 *>(gathered);
    if (inside && group == 0) {
        if (PRE) store8(weights, vector, load8(pre, vector));
        if (POST) store8(weights, vectors + vector, load8(post, vector));
    }
    // Barrier: the first group has written the weights, which all groups read.
    __syncthreads();
    // Lanes beyond the row hold zeros, whatever the weight.
    const bf16 *own = weights + 8 * min(vector, vectors - 1);
    float d_pre[8] = {}, d_post[8] = {};
    const float per_col = 1.0f / cols;
    unsigned parity = 0;  // which buffer of `scratch` the next sum uses
    for (unsigned row = blockIdx.x * per_block + group; row < end; row += groups) {
        const size_t at = size_t(row) * vectors + vector;
        bf16x8 dy_packed = {}, s_packed = {}, b_packed = {}, ds_packed = {};
        if (inside) {
            if (PRE || d_normed) dy_packed = load8(d_normed, at);
            if (PRE) s_packed = load8(sum, at);
            if (POST) b_packed = load8(branch, at);
            if (d_sum) ds_packed = load8(d_sum, at);
        }
        float dy[8], x[8], gradient[8], b[8];
        widen(dy_packed, dy);
        widen(s_packed, x);
        widen(b_packed, b);
        float squares[1] = {};  // of the branch
        if (PRE) {
            // With POST the sum of squares of branch joins this call, because it depends on no later result.
            float sums[POST ? 3 : 2];
            sums[0] = sum_squares(x);
            sums[1] = sum_products(dy, x, load8(own, 0), offset);
            if (POST) sums[2] = sum_squares(b);
            row_sum(sums, scratch[group][parity][0], warp, warps, 1 + group);
            parity ^= 1;
            if (POST) squares[0] = sums[2];
            keep_packed(s_packed);
            keep_packed(dy_packed);
            widen(s_packed, x);
            widen(dy_packed, dy);
            norm_backward(dy, x, load8(own, 0), offset, sums[0], sums[1], per_col, eps, gradient, d_pre);
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) gradient[i] = dy[i];
        }
        widen(ds_packed, dy);
#pragma unroll
        for (int i = 0; i < 8; i++) gradient[i] = (gradient[i] + dy[i]) * scale;
        if (inside) store8(dx, at, narrow(gradient));
        if (POST) {
            keep_packed(b_packed);
            widen(b_packed, b);
            // The sum of squares of branch, where it is not known yet, joins this call.
            float sums[PRE ? 1 : 2];
            sums[0] = sum_products(gradient, b, load8(own, vectors), offset);
            if (!PRE) sums[PRE ? 0 : 1] = sum_squares(b);
            row_sum(sums, scratch[group][parity][0], warp, warps, 1 + group);
            parity ^= 1;
            if (!PRE) squares[0] = sums[PRE ? 0 : 1];
            float out[8];
            norm_backward(gradient, b, load8(own, vectors), offset, squares[0], sums[0], per_col, eps, out, d_post);
            if (inside) store8(d_branch, at, narrow(out));
        }
    }
    // Barrier: all groups have read the weights, whose memory the gradients use now.
    __syncthreads();
#pragma unroll
    for (int which = 0; which < PRE + POST; which++) {
        const float(&dw)[8] = PRE && which == 0 ? d_pre : d_post;
        if (inside) {
            float4 *to = gathered + group * (cols / 4);
            to[bank_swizzle(2 * vector)] = make_float4(dw[0], dw[1], dw[2], dw[3]);
            to[bank_swizzle(2 * vector + 1)] = make_float4(dw[4], dw[5], dw[6], dw[7]);
        }
        // Barrier: the gradients of all groups are written.
        __syncthreads();
        float4 *out = reinterpret_cast<float4 *>(partials + (size_t(which) * gridDim.x + blockIdx.x) * cols);
        for (unsigned c = threadIdx.x; c < cols / 4; c += blockDim.x) {
            float4 total = gathered[bank_swizzle(c)];
            for (unsigned g = 1; g < groups; g++) {
                const float4 more = gathered[g * (cols / 4) + bank_swizzle(c)];
                total = make_float4(total.x + more.x, total.y + more.y, total.z + more.z, total.w + more.w);
            }
            out[c] = total;
        }
        // Barrier: all threads have read the gradients, which those of the other weight overwrite.
        if (which == 0 && PRE && POST) __syncthreads();
    }
}

// Launched by cuda/rms_norm.rs: add_norm_backward; grid (rows / per_block), groups x D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_norm_backward(
    const bf16 *__restrict__ d_sum, const bf16 *__restrict__ d_normed, const bf16 *__restrict__ sum,
    const bf16 *__restrict__ pre, bf16 *__restrict__ dx, float *__restrict__ partials, unsigned rows, unsigned cols,
    unsigned per_block, float eps, float offset, float scale) {
    backward<true, false>(d_sum, d_normed, sum, pre, nullptr, nullptr, dx, nullptr, partials, rows, cols, per_block, eps, offset,
                    scale);
}

// Launched by cuda/rms_norm.rs: add_norm_backward; grid (rows / per_block), groups x D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_norm_backward_post(
    const bf16 *__restrict__ d_sum, const bf16 *__restrict__ d_normed, const bf16 *__restrict__ sum,
    const bf16 *__restrict__ pre, const bf16 *__restrict__ branch, const bf16 *__restrict__ post,
    bf16 *__restrict__ dx, bf16 *__restrict__ d_branch, float *__restrict__ partials, unsigned rows, unsigned cols,
    unsigned per_block, float eps, float offset, float scale) {
    backward<true, true>(d_sum, d_normed, sum, pre, branch, post, dx, d_branch, partials, rows, cols, per_block, eps, offset,
                   scale);
}

// Launched by cuda/rms_norm.rs: add_backward; grid (rows / per_block), groups x D / 8 in whole warps, at most 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_backward(
    const bf16 *__restrict__ d_sum, const bf16 *__restrict__ more, const bf16 *__restrict__ branch,
    const bf16 *__restrict__ post, bf16 *__restrict__ dx, bf16 *__restrict__ d_branch, float *__restrict__ partials,
    unsigned rows, unsigned cols, unsigned per_block, float eps, float offset, float scale) {
    backward<false, true>(d_sum, more, nullptr, nullptr, branch, post, dx, d_branch, partials, rows, cols, per_block, eps,
                          offset, scale);
}

// Adds the rows of partial sums of all blocks to the gradients of two weights, by blockIdx.y.
// Launched by cuda/rms_norm.rs: add_weights; grid (D / 32, weights), 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) add_norm_backward_weight(
    const float *__restrict__ partials, float *__restrict__ d_first, float *__restrict__ d_second, unsigned count,
    unsigned cols) {
    const size_t matrix = size_t(count) * cols;
    add_partials(partials + blockIdx.y * matrix, count, cols, blockIdx.y == 0 ? d_first : d_second);
}
