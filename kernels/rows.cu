// Moving rows: the simplest kernels here, and the ones to read first.
//
//   gather:   out[i] = x[rows[i]]
//   scatter:  dx[rows[i]] = dy[i], zero elsewhere: the gradient of gather for rows that do not repeat
//   widen:    y[i] = x[i] in f32
//   add:      sum[i] += x[i], with sum in f32
//   narrow:   x[i] = sum[i] in bf16
//   scale:    y[i] = factor x[i]
//
// x is bf16, and a row is a multiple of 8 elements. The first three compute nothing, and so they round nothing.
//
// A block moves one row, and a thread 16 bytes at a time. The blocks of scatter are the rows of its result, for each of which the
// host has looked up the source, because the zeros are then written in the same pass and every row is written exactly once,
// whatever the order of blocks.
//
// Bytes: gather 4 cols for each row; scatter 2 cols for each row of dx and 2 cols for each row of dy; both 4 for each index; widen
// and narrow 6, add 10, scale 4 for each element. The limit is memory.

#include "common.cuh"

// x [X, cols], out [n, cols].
// Launched by cuda/rows.rs: gather_rows; grid (rows of out), 32 to 256 threads.
extern "C" __global__ void __launch_bounds__(256) gather_rows(
    const bf16 *__restrict__ x, const unsigned *__restrict__ rows, bf16 *__restrict__ out, unsigned cols) {
    const uint4 *from = reinterpret_cast<const uint4 *>(x + size_t(rows[blockIdx.x]) * cols);
    uint4 *to = reinterpret_cast<uint4 *>(out + size_t(blockIdx.x) * cols);
    for (unsigned i = threadIdx.x; i < cols / 8; i += blockDim.x) to[i] = from[i];
}

// dx [total, cols], dy [n, cols]; source[r] is the i with rows[i] = r, or ~0u if there is no such i.
// Launched by cuda/rows.rs: scatter_rows; grid (rows of dx), 32 to 256 threads.
extern "C" __global__ void __launch_bounds__(256) scatter_rows(
    const bf16 *__restrict__ dy, const unsigned *__restrict__ source, bf16 *__restrict__ dx, unsigned cols) {
    const unsigned i = source[blockIdx.x];
    uint4 *to = reinterpret_cast<uint4 *>(dx + size_t(blockIdx.x) * cols);
    const uint4 *from = reinterpret_cast<const uint4 *>(dy + size_t(i) * cols);
    for (unsigned c = threadIdx.x; c < cols / 8; c += blockDim.x)
        to[c] = i == ~0u ? make_uint4(0, 0, 0, 0) : from[c];
}

// x bf16 and y f32 have n elements, a multiple of 4. A thread writes 16 bytes of y, so that a warp writes whole sectors.
// Launched by cuda/rows.rs: widened; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) widen_rows(
    const bf16 *__restrict__ x, float *__restrict__ y, unsigned long long n) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const uint2 four = *reinterpret_cast<const uint2 *>(x + i);
    // A bf16 is the upper half of an f32. The first of a pair is in the lower half of the word.
    *reinterpret_cast<float4 *>(y + i) =
        make_float4(__uint_as_float(four.x << 16), __uint_as_float(four.x & 0xffff0000u),
                    __uint_as_float(four.y << 16), __uint_as_float(four.y & 0xffff0000u));
}

// x bf16 and sum f32 have n elements, a multiple of 4. A thread takes 4, as in widen_rows.
// Launched by cuda/rows.rs: accumulate; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) accumulate_rows(
    const bf16 *__restrict__ x, float *__restrict__ sum, unsigned long long n) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const uint2 four = *reinterpret_cast<const uint2 *>(x + i);
    float4 &to = *reinterpret_cast<float4 *>(sum + i);
    const float4 before = to;
    to = make_float4(before.x + __uint_as_float(four.x << 16), before.y + __uint_as_float(four.x & 0xffff0000u),
                     before.z + __uint_as_float(four.y << 16), before.w + __uint_as_float(four.y & 0xffff0000u));
}

// sum f32 and x bf16 have n elements, a multiple of 4.
// Launched by cuda/rows.rs: narrowed; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) narrow_rows(
    const float *__restrict__ sum, bf16 *__restrict__ x, unsigned long long n) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const float4 four = *reinterpret_cast<const float4 *>(sum + i);
    alignas(8) const bf162 pairs[2] = {__floats2bfloat162_rn(four.x, four.y), __floats2bfloat162_rn(four.z, four.w)};
    // One store, because a warp's stores of half of it would each write half of every sector.
    *reinterpret_cast<uint2 *>(x + i) = *reinterpret_cast<const uint2 *>(pairs);
}

// x and y bf16 have n elements, a multiple of 4.
// Launched by cuda/rows.rs: scaled; grid (n / 1024), 256 threads.
extern "C" __global__ void __launch_bounds__(256) scale_rows(
    const bf16 *__restrict__ x, bf16 *__restrict__ y, unsigned long long n, float factor) {
    const size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (i >= n) return;
    const uint2 four = *reinterpret_cast<const uint2 *>(x + i);
    // As in widen_rows.
    *reinterpret_cast<uint2 *>(y + i) =
        make_uint2(pack_bf16(factor * __uint_as_float(four.x << 16), factor * __uint_as_float(four.x & 0xffff0000u)),
                   pack_bf16(factor * __uint_as_float(four.y << 16), factor * __uint_as_float(four.y & 0xffff0000u)));
}
