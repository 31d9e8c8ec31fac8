"""Triton's products of matrices. make.py compiles them to PTX; nothing here runs."""

import triton
import triton.language as tl


@triton.jit
def matmul(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[m][n] = a[m][k] b[k][n], bf16 in, f32 out."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    pa = a + (rows % m)[:, None] * k + ks[None, :]
    pb = b + ks[:, None] * n + (cols % n)[None, :]
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, tl.cdiv(k, BK)):
        left = k - i * BK
        va = tl.load(pa, mask=ks[None, :] < left, other=0.0)
        vb = tl.load(pb, mask=ks[:, None] < left, other=0.0)
        sum = tl.dot(va, vb, sum)
        pa += BK
        pb += BK * n
    tl.store(c + rows[:, None] * n + cols[None, :], sum, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def leaky(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.jit
def grouped_tile(tile, rows, cols, GROUP: tl.constexpr):
    """A tile's row and column in the order that keeps GROUP rows of tiles together in the cache."""
    width = GROUP * cols
    first = tile // width * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + tile % width % height, tile % width // height


@triton.jit
def matmul_leaky(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr):
    """c[m][n] = leaky(a[m][k] b[n][k]^T) in f16."""
    row, col = grouped_tile(tl.program_id(0), tl.cdiv(m, BM), tl.cdiv(n, BN), GROUP)
    rows = row * BM + tl.arange(0, BM)
    cols = col * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    pa = a + (rows % m)[:, None] * k + ks[None, :]
    pb = b + ks[:, None] + (cols % n)[None, :] * k
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, tl.cdiv(k, BK)):
        left = k - i * BK
        va = tl.load(pa, mask=ks[None, :] < left, other=0.0)
        vb = tl.load(pb, mask=ks[:, None] < left, other=0.0)
        sum = tl.dot(va, vb, sum)
        pa += BK
        pb += BK
    sum = leaky(sum).to(tl.float16)
    tl.store(c + rows[:, None] * n + cols[None, :], sum, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def matmul_tf32(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c[m][n] = a[m][k] b[n][k]^T, f32 in tf32."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, k, BK):
        at = i + ks
        va = tl.load(a + rows[:, None] * k + at[None, :], mask=(rows[:, None] < m) & (at[None, :] < k), other=0.0)
        vb = tl.load(b + at[:, None] + cols[None, :] * k, mask=(cols[None, :] < n) & (at[:, None] < k), other=0.0)
        sum = tl.dot(va, vb, sum, input_precision="tf32")
    tl.store(c + rows[:, None] * n + cols[None, :], sum, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def matmul_groups(
    pointers, shapes, groups, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr
):
    """Products of several shapes by PROGRAMS programs: pointers[g] = (a, b, c), shapes[g] = (m, n, k), all multiples
    of the tiles'. f16 in and out."""
    tile = tl.program_id(0)
    before = 0
    for g in range(groups):
        m = tl.load(shapes + 3 * g)
        n = tl.load(shapes + 3 * g + 1)
        k = tl.load(shapes + 3 * g + 2)
        across = tl.cdiv(n, BN)
        tiles = tl.cdiv(m, BM) * across
        a = tl.load(pointers + 3 * g).to(tl.pointer_type(tl.float16))
        b = tl.load(pointers + 3 * g + 1).to(tl.pointer_type(tl.float16))
        c = tl.load(pointers + 3 * g + 2).to(tl.pointer_type(tl.float16))
        while tile < before + tiles:
            rows = (tile - before) // across * BM + tl.arange(0, BM)
            cols = (tile - before) % across * BN + tl.arange(0, BN)
            ks = tl.arange(0, BK)
            sum = tl.zeros((BM, BN), dtype=tl.float32)
            for i in range(0, k, BK):
                va = tl.load(a + rows[:, None] * k + (i + ks)[None, :])
                vb = tl.load(b + (i + ks)[:, None] * n + cols[None, :])
                sum = tl.dot(va, vb, sum)
            tl.store(c + rows[:, None] * n + cols[None, :], sum.to(tl.float16))
            tile += PROGRAMS
        before += tiles


@triton.jit
def matmul_groups_maps(
    pointers, shapes, groups, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr
):
    """The same with tensor maps that the programs make, b as [n][k]."""
    tile = tl.program_id(0)
    before = 0
    for g in range(groups):
        m = tl.load(shapes + 3 * g)
        n = tl.load(shapes + 3 * g + 1)
        k = tl.load(shapes + 3 * g + 2)
        across = tl.cdiv(n, BN)
        tiles = tl.cdiv(m, BM) * across
        if tile < before + tiles:
            a = tl.load(pointers + 3 * g).to(tl.pointer_type(tl.float16))
            b = tl.load(pointers + 3 * g + 1).to(tl.pointer_type(tl.float16))
            c = tl.load(pointers + 3 * g + 2).to(tl.pointer_type(tl.float16))
            map_a = tl.make_tensor_descriptor(a, shape=[m, k], strides=[k, 1], block_shape=[BM, BK])
            map_b = tl.make_tensor_descriptor(b, shape=[n, k], strides=[k, 1], block_shape=[BN, BK])
            map_c = tl.make_tensor_descriptor(c, shape=[m, n], strides=[n, 1], block_shape=[BM, BN])
            while tile < before + tiles:
                row = (tile - before) // across * BM
                col = (tile - before) % across * BN
                sum = tl.zeros((BM, BN), dtype=tl.float32)
                for i in range(0, k, BK):
                    sum = tl.dot(map_a.load([row, i]), map_b.load([col, i]).T, sum)
                map_c.store([row, col], sum.to(tl.float16))
                tile += PROGRAMS
        before += tiles


@triton.jit
def matmul_persistent(
    a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):
    """c[m][n] = a[m][k] b[n][k]^T in f16, each program taking several tiles; loads through pointers."""
    down = tl.cdiv(m, BM)
    across = tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=FLATTEN):
        row, col = grouped_tile(tile, down, across, GROUP)
        rows = row * BM + tl.arange(0, BM)
        cols = col * BN + tl.arange(0, BN)
        rows = tl.max_contiguous(tl.multiple_of(tl.where(rows < m, rows, 0), BM), BM)
        cols = tl.max_contiguous(tl.multiple_of(tl.where(cols < n, cols, 0), BN), BN)
        sum = tl.zeros((BM, BN), dtype=tl.float32)
        for i in range(0, tl.cdiv(k, BK)):
            ks = i * BK + tl.arange(0, BK)
            va = tl.load(a + rows[:, None] * k + ks[None, :], mask=ks[None, :] < k, other=0.0)
            vb = tl.load(b + ks[:, None] + cols[None, :] * k, mask=ks[:, None] < k, other=0.0)
            sum = tl.dot(va, vb, sum)
        rows = row * BM + tl.arange(0, BM)
        cols = col * BN + tl.arange(0, BN)
        sum = sum.to(tl.float16)
        tl.store(c + rows[:, None] * n + cols[None, :], sum, mask=(rows[:, None] < m) & (cols[None, :] < n))


@triton.jit
def matmul_maps(
    map_a, map_b, map_c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, HALVES: tl.constexpr,
):
    """The same through tensor maps of the host; c is written in halves of a tile."""
    down = tl.cdiv(m, BM)
    across = tl.cdiv(n, BN)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row, col = grouped_tile(tile, down, across, GROUP)
        sum = tl.zeros((BM, BN), dtype=tl.float32)
        for i in range(0, tl.cdiv(k, BK)):
            va = map_a.load([row * BM, i * BK])
            vb = map_b.load([col * BN, i * BK])
            sum = tl.dot(va, vb.T, sum)
        if HALVES:
            sum = tl.permute(tl.reshape(sum, (BM, 2, BN // 2)), (0, 2, 1))
            left, right = tl.split(sum)
            map_c.store([row * BM, col * BN], left.to(map_c.dtype))
            map_c.store([row * BM, col * BN + BN // 2], right.to(map_c.dtype))
        else:
            map_c.store([row * BM, col * BN], sum.to(map_c.dtype))


@triton.jit
def matmul_scaled(
    a, scale_a, b, scale_b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACK: tl.constexpr
):
    """c[m][n] = a[m][k] b[k][n], of a in e4m3 and b in e2m1 or e5m2, with a scale (ue8m0) for 32 along k."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    ks = tl.arange(0, BK)
    kb = tl.arange(0, BK // PACK)
    kscale = tl.arange(0, BK // 32)
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(0, k, BK):
        va = tl.load(a + rows[:, None] * k + (i + ks)[None, :])
        vb = tl.load(b + (i // PACK + kb)[:, None] * n + cols[None, :])
        sa = tl.load(scale_a + rows[:, None] * (k // 32) + (i // 32 + kscale)[None, :])
        sb = tl.load(scale_b + cols[:, None] * (k // 32) + (i // 32 + kscale)[None, :])
        sum = tl.dot_scaled(va, sa, "e4m3", vb, sb, "e2m1" if PACK == 2 else "e5m2", sum)
    tl.store(c + rows[:, None] * n + cols[None, :], sum, mask=(rows[:, None] < m) & (cols[None, :] < n))
