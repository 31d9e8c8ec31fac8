// The three instructions of the tensor-core kernels (cp.async, ldmatrix, mma) and the layout of their operands in shared
// memory.
//
// A tile in shared memory has rows of 64 bf16: 128 bytes, or eight 16-byte vectors. The swizzle stores vector c of row r at
// position c ^ (r % 8) of the row (`swizzled`). No access has bank conflicts then: ldmatrix reads one vector of eight rows at
// once, cp.async writes eight vectors of one row, and either eight vectors lie in eight different groups of four banks.
#pragma once

#include "common.cuh"

// bf16 elements of a row of a tile, and of a vector.
constexpr int TILE_K = 64;  // shared
constexpr int VECTOR = 8;  // shared

// Offset in elements of vector `vector` (0..8) of row `row` in a swizzled tile.
__device__ __forceinline__ int swizzled(int row, int vector) { return row * TILE_K + ((vector ^ (row % 8)) * VECTOR); }

__device__ __forceinline__ unsigned shared_address(const void *p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Starts a copy of 16 bytes from global memory to the address `to` + offset of shared memory, bypassing L1. `bytes` is 16, or 0
// to read nothing and write zeros. Both addresses are multiples of 16; `from` must be valid only if `bytes` is 16.
template <int offset = 0>
__device__ __forceinline__ void copy_async_at(unsigned to, const void *from, unsigned bytes) {
    asm volatile("cp.async.cg.shared.global [%0+%1], [%2], 16, %3;\n" ::"r"(to), "n"(offset), "l"(from), "r"(bytes)
                 : "memory");
}

// The same with a pointer. If `inside` is false, the copy reads nothing and writes zeros.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool inside = true) {
    copy_async_at(shared_address(to), from, inside ? 16 : 0);
}

// The same for 4 or 8 bytes, through L1, which is the only way for so few.
template <int bytes>
__device__ __forceinline__ void copy_async_small(void *to, const void *from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(to)), "l"(from), "n"(bytes),
                 "r"(inside ? bytes : 0)
                 : "memory");
}

// Closes a group: all copies that this thread started since the last call.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are incomplete. The copies of other threads are complete only after
// a barrier that follows their wait.
template <int pending>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// ldmatrix: loads four 8 x 8 matrices of bf16, each transposed if `transposed`. Lane l passes the address, less the constant
// offset, of row l % 8 of matrix l / 8. Register i receives two neighbours of matrix i (or of its transpose): row lane / 4,
// columns 2 (lane % 4) and 2 (lane % 4) + 1.
template <bool transposed, int offset = 0>
__device__ __forceinline__ void load_matrix_at(unsigned (&r)[4], unsigned address) {
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4+%5];\n"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address), "n"(offset)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4+%5];\n"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address), "n"(offset)
                     : "memory");
}

// The same with a pointer.
__device__ __forceinline__ void load_matrix(unsigned (&r)[4], const bf16 *row) {
    load_matrix_at<false>(r, shared_address(row));
}
__device__ __forceinline__ void load_matrix_transposed(unsigned (&r)[4], const bf16 *row) {
    load_matrix_at<true>(r, shared_address(row));
}

// c += a b: a 16 x 16 (rows x k), b 16 x 8 (k x columns), both bf16, c f32. With g = lane / 4 and t = lane % 4:
// a = {(g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..)}, b = {(k 2t.., column g), (k 2t + 8.., column g)},
// c = {(g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)}.
__device__ __forceinline__ void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
