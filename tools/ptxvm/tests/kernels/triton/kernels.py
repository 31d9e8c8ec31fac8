"""Triton kernels of the tests, in the style of Triton's tutorials. make.py compiles them to PTX; nothing here runs."""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask), mask=mask)


@triton.jit
def dependent_add(x, y, out, n, BLOCK: tl.constexpr):
    """An addition that may start before the kernel in front of it has ended."""
    gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n)
    gdc_launch_dependents()
    tl.store(out + at, v, mask=at < n)


@triton.jit
def arcsine(x, out, n, BLOCK: tl.constexpr):
    """A function of CUDA's device library."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, libdevice.asin(tl.load(x + at, mask=at < n)), mask=at < n)


@triton.jit
def dropout(x, out, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n)
    kept = tl.rand(seed, at) > p
    tl.store(out + at, tl.where(kept, v / (1 - p), 0.0), mask=at < n)


@triton.jit
def softmax(out, x, stride, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    v = tl.load(x + row * stride + at, mask=at < cols, other=-float("inf"))
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(out + row * stride + at, e / tl.sum(e, axis=0), mask=at < cols)


@triton.jit
def softmax_rows(out, x, stride, rows, cols, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Programs that each take several rows, the next ones' loads in flight."""
    at = tl.arange(0, BLOCK)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        v = tl.load(x + row * stride + at, mask=at < cols, other=-float("inf"))
        e = tl.exp(v - tl.max(v, axis=0))
        tl.store(out + row * stride + at, e / tl.sum(e, axis=0), mask=at < cols)


@triton.jit
def layer_norm(x, gain, bias, out, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < cols
    v = tl.load(x + row * cols + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(v, axis=0) / cols
    d = tl.where(mask, v - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(d * d, axis=0) / cols + eps)
    g = tl.load(gain + at, mask=mask)
    b = tl.load(bias + at, mask=mask)
    tl.store(out + row * cols + at, d * inverse * g + b, mask=mask)


@triton.jit
def layer_norm_backward(
    dx, dy, x, gain, mean, inverse, dgain, dbias, locks, cols, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's dx; gradients of gain and bias are added to one of GROUPS rows of sums, under its lock."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < cols
    g = tl.load(dy + row * cols + at, mask=mask, other=0.0)
    unit = (tl.load(x + row * cols + at, mask=mask, other=0.0) - tl.load(mean + row)) * tl.load(inverse + row)
    unit = tl.where(mask, unit, 0.0)
    w = g * tl.load(gain + at, mask=mask, other=0.0)
    along = tl.sum(unit * w, axis=0) / cols
    level = tl.sum(w, axis=0) / cols
    tl.store(dx + row * cols + at, (w - (unit * along + level)) * tl.load(inverse + row), mask=mask)

    group = row % GROUPS
    lock = locks + group
    used = locks + GROUPS + group
    sums_gain = dgain + group * cols + at
    sums_bias = dbias + group * cols + at
    more_gain = g * unit
    more_bias = g
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    if tl.load(used) == 0:
        tl.atomic_xchg(used, 1)
    else:
        more_gain += tl.load(sums_gain, mask=mask)
        more_bias += tl.load(sums_bias, mask=mask)
    tl.store(sums_gain, more_gain, mask=mask)
    tl.store(sums_bias, more_bias, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@triton.jit
def column_sums(x, out, rows, cols, BM: tl.constexpr, BN: tl.constexpr):
    at = tl.program_id(0) * BN + tl.arange(0, BN)
    sum = tl.zeros((BM, BN), dtype=tl.float32)
    for base in range(0, rows, BM):
        r = base + tl.arange(0, BM)
        sum += tl.load(x + r[:, None] * cols + at[None, :], mask=(r[:, None] < rows) & (at[None, :] < cols), other=0.0)
    tl.store(out + at, tl.sum(sum, axis=0), mask=at < cols)
