"""Gluon kernels of the tests: what Triton's kernels leave to its compiler is written out."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def copied_add(x, y, out, n, BLOCK: gl.constexpr, TURNS: gl.constexpr):
    """out = x + y, a program's TURNS pieces of BLOCK through a ring of two cp.async stages."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    sx = gl.allocate_shared_memory(gl.float32, [2, BLOCK], flat)
    sy = gl.allocate_shared_memory(gl.float32, [2, BLOCK], flat)
    at = gl.program_id(0) * BLOCK * TURNS + gl.arange(0, BLOCK, layout)
    async_copy.async_load(sx.index(0), x + at, mask=at < n)
    async_copy.async_load(sy.index(0), y + at, mask=at < n)
    async_copy.commit_group()
    for i in range(TURNS):
        more = at + BLOCK
        ahead = (more < n) & (i + 1 < TURNS)
        async_copy.async_load(sx.index((i + 1) % 2), x + more, mask=ahead)
        async_copy.async_load(sy.index((i + 1) % 2), y + more, mask=ahead)
        async_copy.commit_group()
        async_copy.wait_group(1)
        gl.store(out + at, sx.index(i % 2).load(layout) + sy.index(i % 2).load(layout), mask=at < n)
        at = more


@gluon.jit
def ring_matmul(map_a, map_b, map_c, k, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr):
    """c = a[m][k] b[n][k]^T in f16: a ring of STAGES copies, one product in flight while the next copy is awaited."""
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    sa = gl.allocate_shared_memory(gl.float16, [STAGES, BM, BK], map_a.layout)
    sb = gl.allocate_shared_memory(gl.float16, [STAGES, BN, BK], map_b.layout)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
    row = gl.program_id(0) * BM
    col = gl.program_id(1) * BN
    turns = (k + BK - 1) // BK
    for s in gl.static_range(STAGES - 1):
        wanted = s < turns
        mbarrier.expect(ready.index(s), map_a.nbytes_per_cta + map_b.nbytes_per_cta, pred=wanted)
        tma.async_load(map_a, [row, s * BK], ready.index(s), sa.index(s), pred=wanted)
        tma.async_load(map_b, [col, s * BK], ready.index(s), sb.index(s), pred=wanted)
    acc = gl.zeros((BM, BN), gl.float32, acc_layout)
    for i in range(turns):
        at = i % STAGES
        mbarrier.wait(ready.index(at), (i // STAGES) & 1)
        acc = warpgroup_mma(sa.index(at), sb.index(at).permute((1, 0)), acc, is_async=True)
        # The product before is done, so its stage is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        j = i + STAGES - 1
        to = j % STAGES
        mbarrier.expect(ready.index(to), map_a.nbytes_per_cta + map_b.nbytes_per_cta, pred=j < turns)
        tma.async_load(map_a, [row, j * BK], ready.index(to), sa.index(to), pred=j < turns)
        tma.async_load(map_b, [col, j * BK], ready.index(to), sb.index(to), pred=j < turns)
    acc = warpgroup_mma_wait(0, deps=[acc])
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(s))
    sc = gl.allocate_shared_memory(gl.float16, [BM, BN], map_c.layout)
    sc.store(acc.to(gl.float16))
    fence_async_shared()
    tma.async_store(map_c, [row, col], sc)
    tma.store_wait(0)


@gluon.jit
def load_tiles(map_a, map_b, sa, sb, ready, free, row, col, turns, BK: gl.constexpr, STAGES: gl.constexpr):
    for i in range(turns):
        s = i % STAGES
        mbarrier.wait(free.index(s), (i // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(s), map_a.nbytes_per_cta + map_b.nbytes_per_cta)
        tma.async_load(map_a, [row, i * BK], ready.index(s), sa.index(s))
        tma.async_load(map_b, [col, i * BK], ready.index(s), sb.index(s))


@gluon.jit
def multiply_tiles(map_c, sa, sb, sc, ready, free, row, col, turns, STAGES: gl.constexpr):
    BM: gl.constexpr = sa.shape[1]
    BN: gl.constexpr = sb.shape[1]
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    acc = gl.zeros((BM, BN), gl.float32, acc_layout)
    for i in range(turns):
        s = i % STAGES
        mbarrier.wait(ready.index(s), i // STAGES & 1)
        acc = warpgroup_mma(sa.index(s), sb.index(s).permute((1, 0)), acc)
        mbarrier.arrive(free.index(s), count=1)
    sc.store(acc.to(gl.float16))
    fence_async_shared()
    tma.async_store(map_c, [row, col], sc)
    tma.store_wait(0)


@gluon.jit
def partitioned_matmul(
    map_a, map_b, map_c, k, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr
):
    """The same by partitions of warps: one warp loads, four multiply and store."""
    sa = gl.allocate_shared_memory(gl.float16, [STAGES, BM, BK], map_a.layout)
    sb = gl.allocate_shared_memory(gl.float16, [STAGES, BN, BK], map_b.layout)
    sc = gl.allocate_shared_memory(gl.float16, [BM, BN], map_c.layout)
    ready = mbarrier.allocate_mbarrier(batch=STAGES)
    free = mbarrier.allocate_mbarrier(batch=STAGES)
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    row = gl.program_id(0) * BM
    col = gl.program_id(1) * BN
    turns = (k + BK - 1) // BK
    gl.warp_specialize(
        [
            (multiply_tiles, (map_c, sa, sb, sc, ready, free, row, col, turns, STAGES)),
            (load_tiles, (map_a, map_b, sa, sb, ready, free, row, col, turns, BK, STAGES)),
        ],
        [1],
        [24],
    )
