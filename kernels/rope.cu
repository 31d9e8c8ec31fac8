// Rotary position embedding in Transformers' "rotate half" layout, with the norm of every head before it where the
// model has one (Gemma 3 and 4), and the append to the KV cache.
//
//   y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin       a = i, b = i + Dh/2 of each head, i < Dh/2
//   angle = position * frequency[i];  with a norm, x stands for
//   norm(x; w) = x r (offset + w), r = 1/sqrt(mean(x^2) + eps);  x r without w
//
// The heads of v are normed without a weight (Gemma 4) and not rotated.
//
// Backward: the inverse rotation (sin negated) of dy gives d; with a norm and g = d (offset + w), over one head:
//   dx = r (g - x r^2 mean(g x)),  dw += d x r over all rows and heads
//
// x [T, heads Dh] bf16, y, dx alike; w [Dh] bf16, its gradient f32; arithmetic and angles f32, one rounding at the
// store. Dh is a multiple of 16 up to 512.
//
// Algorithm. A thread holds 8 columns of a head's first half and the 8 columns of the second half with which they are rotated:
// two 16-byte accesses. Dh/16 threads hold a head. If that is no power of two, a head is given the next power of two of lanes, of
// which the rest idle, so that sums over a head are butterflies within such a group of lanes. A block takes a few rows with all
// their heads, because the angles of a row are the same for all heads: its threads compute them once, into shared memory, while
// the loads that they have started complete. Frequencies are passed as kernel arguments (at most 1 KiB), so that no array is
// uploaded for a launch.
//
// Bytes per element: 4 (read, write); backward with a norm 6. FLOPs: some 3 per element, 20 with a norm, and 30 for each angle,
// which are 4 per element with 8 query heads and 15 with one key head. The limit is memory.

#include "partials.cuh"

// Threads of a block.
constexpr unsigned BLOCK = 256;  // shared
// Columns of a head that a thread holds: one vector of each half.
constexpr unsigned PER_THREAD = 16;  // shared

// frequency[i] of all pairs of columns (i, i + Dh/2).
struct Frequencies {  // shared
    float of[256];
};
static_assert(sizeof(Frequencies) == 1024);

// sin x and cos x within 2^-23 for |x| <= 2^18. CUDA's own functions are not used because they reduce large arguments through
// local memory.
//
// x = n pi/2 + r with |r| <= pi/4, where pi/2 is a sum of three floats (x less n times the first is exact). Minimax polynomials of
// r give sine and cosine, and n gives the quadrant. Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the mantissa.
__device__ __forceinline__ void sin_cos(float x, float &s, float &c) {
    const float round = 12582912.0f;
    const float shifted = fmaf(x, 0.636619747f, round);
    const unsigned quadrant = __float_as_uint(shifted);
    const float n = __fsub_rn(shifted, round);
    float r = fmaf(n, -1.57079637f, x);
    r = fmaf(n, 1.71512451e-15f, fmaf(n, 4.37113883e-8f, r));
    const float z = __fmul_rn(r, r);
    const float p = fmaf(fmaf(-0.000195172353f, z, 0.00833217800f), z, -0.166666552f);
    const float sine = fmaf(p, __fmul_rn(z, r), r);
    const float q = fmaf(fmaf(0.0000244383800f, z, -0.00138873665f), z, 0.0416666456f);
    const float cosine = fmaf(q, __fmul_rn(z, z), fmaf(-0.5f, z, 1.0f));
    // Odd quadrants swap the two; the sine is negative in 2 and 3, the cosine in 1 and 2.
    s = __uint_as_float(__float_as_uint(quadrant & 1 ? cosine : sine) ^ (quadrant & 2) << 30);
    c = __uint_as_float(__float_as_uint(quadrant & 1 ? sine : cosine) ^ ((quadrant + 1) & 2) << 30);
}

// The division of heads among the threads of a block.
struct Heads {
    unsigned heads, dim;
    // Threads that hold a head, and lanes of its group: lanes = 1 << shift.
    unsigned threads, shift, lanes;
    // Number of groups of a block, each with one head at a time; this thread's group, and its lane in the group.
    unsigned groups, group, lane;

    __device__ __forceinline__ Heads(unsigned heads, unsigned dim) : heads(heads), dim(dim) {
        threads = dim / PER_THREAD;
        shift = 32 - __clz(threads - 1);
        lanes = 1 << shift;
        groups = BLOCK >> shift;
        group = threadIdx.x >> shift;
        lane = threadIdx.x & (lanes - 1);
    }

    // Floats of shared memory for the angles of a row.
    __device__ __forceinline__ unsigned angles() const { return PER_THREAD * lanes; }

    // Whether this thread holds columns of the block's head number `item`, counted through the heads of `rows` rows.
    __device__ __forceinline__ bool has(unsigned item, unsigned rows) const {
        return lane < threads && item < rows * heads;
    }

    // Sum of x over the lanes of a head, in an order that depends on Dh alone. All lanes get the same bits. Idle lanes add zeros.
    __device__ __forceinline__ float sum(float x) const {
        for (unsigned offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
        return x;
    }
};

// A thread's columns of a head: 8 of each half.
struct Part {
    bf16x8 a, b;

    __device__ __forceinline__ void load(const bf16 *head, const Heads &h) {
        a = load8(head, h.lane);
        b = load8(head + h.dim / 2, h.lane);
    }

    __device__ __forceinline__ void store(bf16 *head, const Heads &h) const {
        store8(head, h.lane, a);
        store8(head + h.dim / 2, h.lane, b);
    }
};

// Computes cos and sin of the angles of `rows` rows from row `first` on: for each row [cos, sin][2][lanes][4], where pair
// 8 l + 4 k + e, of lane l, is at [k][l][e]. With this layout lanes write consecutive words, and later read consecutive vectors.
// The angles of idle lanes are never read.
__device__ __forceinline__ void compute_angles(float *angles, const unsigned *positions,
                                               const Frequencies &frequencies, const Heads &h, unsigned first,
                                               unsigned rows, float sign) {
    const unsigned pairs = h.angles() / 2;
    for (unsigned i = threadIdx.x; i < rows * pairs; i += BLOCK) {
        const unsigned row = i >> (h.shift + 3), at = i & (pairs - 1);
        const unsigned e = at & 3, l = at >> 2 & (h.lanes - 1), k = at >> (h.shift + 2);
        float s, c;
        sin_cos(float(positions[first + row]) * frequencies.of[8 * l + 4 * k + e], s, c);
        float *to = angles + row * h.angles() + at;
        to[0] = c;
        to[pairs] = sign * s;
    }
}

// Rotates a thread's pairs (a[i], b[i]) by the angles of a row.
__device__ __forceinline__ void rotate(float (&a)[8], float (&b)[8], const float *angles, const Heads &h) {
    const float4 *cosines = reinterpret_cast<const float4 *>(angles), *sines = cosines + 2 * h.lanes;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        const float4 c4 = cosines[k * h.lanes + h.lane], s4 = sines[k * h.lanes + h.lane];
        const float c[4] = {c4.x, c4.y, c4.z, c4.w}, s[4] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float x = a[4 * k + e], y = b[4 * k + e];
            a[4 * k + e] = fmaf(x, c[e], -(y * s[e]));
            b[4 * k + e] = fmaf(y, c[e], x * s[e]);
        }
    }
}

__device__ __forceinline__ float sum_squares(const float (&a)[8], const float (&b)[8]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(b[i], b[i], fmaf(a[i], a[i], sum));
    return sum;
}

__device__ __forceinline__ void scale(float (&x)[8], float r, const bf16x8 &w, float offset) {
    float weight[8];
    widen(w, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = x[i] * r * (offset + weight[i]);
}

// Heads of one tensor, the same number in every row: y = rotation of x, or of its norm. Row t goes to row to[t] of y, or to row t
// if `to` is null.
struct HeadsToRotate {
    const bf16 *x;
    bf16 *y;
    const unsigned *to;
    unsigned heads;
    bool turned;    // whether they are rotated
    const bf16 *w;  // the norm's weight, or null
};

// Norms and rotates the heads of q, and of k and v if they have heads, for per_block rows from blockIdx.x * per_block on. h counts
// the heads of all three. `angles` is shared memory for the angles of per_block rows; it is not used if q is not rotated.
template <bool NORM>
__device__ __forceinline__ void rotate_heads(const HeadsToRotate &q, const HeadsToRotate &k, const HeadsToRotate &v,
                                     const unsigned *positions, const Frequencies &frequencies, const Heads &h,
                                     unsigned rows, unsigned per_block, float sign, float eps, float offset,
                                     float *angles) {
    const unsigned first = blockIdx.x * per_block, here = min(per_block, rows - first);
    Part next = {}, weight = {};
    const bf16 *weight_of = nullptr;
    // f of the tensor of head number `head` of a row and of the head's number in it.
    const auto of_tensor = [&](unsigned head, auto f) {
        if (head < q.heads)
            f(q, head);
        else if (head - q.heads < k.heads)
            f(k, head - q.heads);
        else
            f(v, head - q.heads - k.heads);
    };
    const auto load = [&](unsigned item) {
        const unsigned row = first + item / h.heads;
        of_tensor(item % h.heads, [&](const HeadsToRotate &of, unsigned head) {
            next.load(of.x + (size_t(row) * of.heads + head) * h.dim, h);
        });
    };
    if (h.has(h.group, here)) load(h.group);
    // Loads the norm's weight of a head, unless the thread has it already from the head before.
    const auto weigh = [&](unsigned item) {
        const bf16 *w = nullptr;
        of_tensor(item % h.heads, [&](const HeadsToRotate &of, unsigned) { w = of.w; });
        if (w == weight_of) return;
        weight = {};
        if (w) weight.load(w, h);
        weight_of = w;
    };
    if (NORM && h.has(h.group, here)) weigh(h.group);
    if (q.turned) compute_angles(angles, positions, frequencies, h, first, here, sign);
    const float per_column = 1.0f / h.dim;
    // Barrier: the angles, which every thread reads, are written.
    __syncthreads();
    // All threads do the same number of rounds, because the lanes of a warp take part in each other's sums.
    for (unsigned base = 0; base < here * h.heads; base += h.groups) {
        const unsigned item = base + h.group;
        const unsigned row = item / h.heads;
        float a[8], b[8];
        widen(next.a, a);
        widen(next.b, b);
        if (h.has(item + h.groups, here)) load(item + h.groups);
        if (NORM) {
            const float sum = h.sum(h.has(item, here) ? sum_squares(a, b) : 0.0f);
            const float r = rsqrtf(fmaf(sum, per_column, eps));
            if (h.has(item, here)) weigh(item);
            keep_packed(weight.a);
            keep_packed(weight.b);
            // Without a weight the factor is r alone.
            const float add = weight_of ? offset : 1.0f;
            scale(a, r, weight.a, add);
            scale(b, r, weight.b, add);
        }
        if (h.has(item, here)) {
            of_tensor(item % h.heads, [&](const HeadsToRotate &of, unsigned head) {
                if (of.turned) rotate(a, b, angles + row * h.angles(), h);
                const size_t out = of.to ? of.to[first + row] : first + row;
                const Part result = {narrow(a), narrow(b)};
                result.store(of.y + (out * of.heads + head) * h.dim, h);
            });
        }
    }
}

// Shared memory: the angles of per_block rows. sign is 1, or -1 for the inverse rotation, which is the gradient if there is no norm.
// Launched by cuda/rope.rs: rotate; grid (rows / per_block), 256 threads.
extern "C" __global__ void __launch_bounds__(256) rope_forward(
    const bf16 *__restrict__ x, bf16 *__restrict__ y, const unsigned *__restrict__ positions,
    const __grid_constant__ Frequencies frequencies, unsigned rows, unsigned heads, unsigned dim, unsigned per_block,
    float sign) {
    extern __shared__ float4 shared[];
    rotate_heads<false>({x, y, nullptr, heads, true, nullptr}, {}, {}, positions, frequencies, Heads(heads, dim), rows,
                        per_block, sign, 0.0f, 0.0f, reinterpret_cast<float *>(shared));
}

// Norms heads, with the weight w unless that is null, and rotates them if `turned`.
// Launched by cuda/rope.rs: rope_forward; grid (rows / per_block), 256 threads.
extern "C" __global__ void __launch_bounds__(256) rope_forward_norm(
    const bf16 *__restrict__ x, const bf16 *__restrict__ w, bf16 *__restrict__ y,
    const unsigned *__restrict__ positions, const __grid_constant__ Frequencies frequencies, unsigned rows,
    unsigned heads, unsigned dim, unsigned per_block, float eps, float offset, unsigned turned) {
    extern __shared__ float4 shared[];
    rotate_heads<true>({x, y, nullptr, heads, turned != 0, w}, {}, {}, positions, frequencies, Heads(heads, dim), rows,
                       per_block, 1.0f, eps, offset, reinterpret_cast<float *>(shared));
}

// Copies the block's rows of v into the cache, by 16-byte vectors.
__device__ __forceinline__ void copy_rows(const bf16 *v, bf16 *cached, const unsigned *to, unsigned rows,
                                          unsigned per_block, unsigned cols) {
    const unsigned first = blockIdx.x * per_block, here = min(per_block, rows - first), vectors = cols / 8;
    const uint4 *from = reinterpret_cast<const uint4 *>(v) + size_t(first) * vectors;
    for (unsigned i = threadIdx.x; i < here * vectors; i += BLOCK) {
        const unsigned row = i / vectors;
        reinterpret_cast<uint4 *>(cached)[size_t(to[first + row]) * vectors + i % vectors] = from[i];
    }
}

// rope_forward of q; and of k, to rows `to` of the cache, where v is copied as well. These rows are all different. One launch does
// all three, because the time of a decode step, which has few rows, is that of its launches.
// Launched by cuda/rope.rs: rope_append; grid (rows / per_block), 256 threads.
extern "C" __global__ void __launch_bounds__(256) rope_append(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, bf16 *__restrict__ rotated_q,
    bf16 *__restrict__ cached_k, bf16 *__restrict__ cached_v, const unsigned *__restrict__ to,
    const unsigned *__restrict__ positions, const __grid_constant__ Frequencies frequencies, unsigned rows,
    unsigned heads, unsigned kv_heads, unsigned dim, unsigned per_block) {
    extern __shared__ float4 shared[];
    copy_rows(v, cached_v, to, rows, per_block, kv_heads * dim);
    rotate_heads<false>({q, rotated_q, nullptr, heads, true, nullptr}, {k, cached_k, to, kv_heads, true, nullptr}, {},
                        positions, frequencies, Heads(heads + kv_heads, dim), rows, per_block, 1.0f, 0.0f, 0.0f,
                        reinterpret_cast<float *>(shared));
}

// The same with norms of q and k and, if `norm_v`, of v, which has no weight.
// Launched by cuda/rope.rs: rope_append; grid (rows / per_block), 256 threads.
extern "C" __global__ void __launch_bounds__(256) rope_append_norm(
    const bf16 *__restrict__ q, const bf16 *__restrict__ k, const bf16 *__restrict__ v, const bf16 *__restrict__ w_q,
    const bf16 *__restrict__ w_k, bf16 *__restrict__ rotated_q, bf16 *__restrict__ cached_k,
    bf16 *__restrict__ cached_v, const unsigned *__restrict__ to, const unsigned *__restrict__ positions,
    const __grid_constant__ Frequencies frequencies, unsigned rows, unsigned heads, unsigned kv_heads, unsigned dim,
    unsigned per_block, float eps, float offset, unsigned norm_v) {
    extern __shared__ float4 shared[];
    if (!norm_v) copy_rows(v, cached_v, to, rows, per_block, kv_heads * dim);
    const unsigned v_heads = norm_v ? kv_heads : 0;
    rotate_heads<true>({q, rotated_q, nullptr, heads, true, w_q}, {k, cached_k, to, kv_heads, true, w_k},
                       {v, cached_v, to, v_heads, false, nullptr}, positions, frequencies,
                       Heads(heads + kv_heads + v_heads, dim), rows, per_block, 1.0f, eps, offset,
                       reinterpret_cast<float *>(shared));
}

// The gradient of the norm for 8 columns: replaces d, the gradient of the norm's result, by dx, and adds the gradient of w to the
// float4 i and i + 1 of the group's gradient in shared memory.
__device__ __forceinline__ void norm_backward(float (&d)[8], const float (&x)[8], const bf16x8 &w, float offset,
                                              float r, float coefficient, float4 *dw, unsigned i) {
    float weight[8];
    widen(w, weight);
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float4 &sum = dw[bank_swizzle(i + k)];
        float4 more = sum;
        more.x = fmaf(d[4 * k], x[4 * k] * r, more.x);
        more.y = fmaf(d[4 * k + 1], x[4 * k + 1] * r, more.y);
        more.z = fmaf(d[4 * k + 2], x[4 * k + 2] * r, more.z);
        more.w = fmaf(d[4 * k + 3], x[4 * k + 3] * r, more.w);
        sum = more;
    }
#pragma unroll
    for (int j = 0; j < 8; j++) d[j] = r * fmaf(-coefficient, x[j], d[j] * (offset + weight[j]));
}

// Sum of d (offset + w) x over 8 columns.
__device__ __forceinline__ float sum_products(const float (&d)[8], const float (&x)[8], const bf16x8 &w, float offset) {
    float weight[8], sum = 0.0f;
    widen(w, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(d[i] * (offset + weight[i]), x[i], sum);
    return sum;
}

// Writes dx, and the gradient of w over the block's rows as one row of `partials` [blocks, Dh]. Without a weight w is null, and
// there are no partials. Heads that were not `turned` are not turned back. A block takes `per_block` rows,
// `at_once` of them at a time. Each group adds up its gradient of w in shared memory, where every thread owns its columns; at the
// end the groups' gradients are added in ascending order. They are not kept in registers because these would halve the number of
// threads that wait for memory at the same time. Shared memory: groups * Dh floats, and the angles of at_once rows.
// Launched by cuda/rope.rs: rope_backward; grid (rows / per_block), 256 threads.
extern "C" __global__ void __launch_bounds__(256, 4) rope_backward_norm(
    const bf16 *__restrict__ dy, const bf16 *__restrict__ x, const bf16 *__restrict__ w, bf16 *__restrict__ dx,
    float *__restrict__ partials, const unsigned *__restrict__ positions,
    const __grid_constant__ Frequencies frequencies, unsigned rows, unsigned heads, unsigned dim, unsigned per_block,
    unsigned at_once, float eps, float offset, unsigned turned) {
    extern __shared__ float4 shared[];
    const Heads h(heads, dim);
    const float add = w ? offset : 1.0f;  // weights of 0 stand for none
    float *angles = reinterpret_cast<float *>(shared + h.groups * (dim / 4));
    float4 *dw = shared + h.group * (dim / 4); // the group's gradient of w
    const unsigned end = min((blockIdx.x + 1) * per_block, rows), a = 2 * h.lane, b = a + dim / 8;
    const float per_column = 1.0f / dim;
    Part weight = {};
    if (h.lane < h.threads) {
        if (w) weight.load(w, h);
        const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        dw[bank_swizzle(a)] = dw[bank_swizzle(a + 1)] = dw[bank_swizzle(b)] = dw[bank_swizzle(b + 1)] = zero;
    }
    for (unsigned first = blockIdx.x * per_block; first < end; first += at_once) {
        const unsigned here = min(at_once, end - first);
        const size_t start = size_t(first) * heads * dim;
        if (turned) compute_angles(angles, positions, frequencies, h, first, here, -1.0f);
        // Barrier: the angles, which every thread reads, are written.
        __syncthreads();
        // All threads do the same number of rounds, because the lanes of a warp take part in each other's sums.
        for (unsigned base = 0; base < here * heads; base += h.groups) {
            const unsigned item = base + h.group;
            const bool inside = h.has(item, here);
            Part part_d = {}, part_x = {};
            if (inside) {
                part_d.load(dy + start + size_t(item) * dim, h);
                part_x.load(x + start + size_t(item) * dim, h);
            }
            float d_a[8], d_b[8], x_a[8], x_b[8];
            widen(part_d.a, d_a);
            widen(part_d.b, d_b);
            widen(part_x.a, x_a);
            widen(part_x.b, x_b);
            float squares = 0.0f, products = 0.0f;
            if (inside) {
                if (turned) rotate(d_a, d_b, angles + item / heads * h.angles(), h);
                squares = sum_squares(x_a, x_b);
                products = sum_products(d_a, x_a, weight.a, add) + sum_products(d_b, x_b, weight.b, add);
            }
            const float r = rsqrtf(fmaf(h.sum(squares), per_column, eps));
            const float coefficient = h.sum(products) * r * r * per_column;
            keep_packed(weight.a);
            keep_packed(weight.b);
            keep_packed(part_x.a);
            keep_packed(part_x.b);
            widen(part_x.a, x_a);
            widen(part_x.b, x_b);
            if (inside) {
                norm_backward(d_a, x_a, weight.a, add, r, coefficient, dw, a);
                norm_backward(d_b, x_b, weight.b, add, r, coefficient, dw, b);
                const Part result = {narrow(d_a), narrow(d_b)};
                result.store(dx + start + size_t(item) * dim, h);
            }
        }
        // Barrier: all threads have read the angles, which those of the next rows overwrite; after the last rows, the gradients
        // of all groups are complete.
        __syncthreads();
    }
    const float *gradients = reinterpret_cast<const float *>(shared);
    if (!w) return;
    for (unsigned c = threadIdx.x; c < dim; c += BLOCK) {
        float total = 0.0f;
        for (unsigned g = 0; g < h.groups; g++) total += gradients[g * dim + 4 * bank_swizzle(c / 4) + c % 4];
        partials[size_t(blockIdx.x) * dim + c] = total;
    }
}

// Adds the rows of partial sums of all blocks to the gradient.
// Launched by cuda/rope.rs: rope_backward; grid (Dh / 32), 1024 threads.
extern "C" __global__ void __launch_bounds__(1024) rope_backward_weight(
    const float *__restrict__ partials, float *__restrict__ dw, unsigned count, unsigned cols) {
    add_partials(partials, count, cols, dw);
}
