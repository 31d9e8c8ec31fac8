"""Triton kernels of the tests, in the style of Triton's tutorials. make.py compiles them to PTX; nothing here runs."""

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    tl.store(out + at, tl.load(x + at, mask=mask) + tl.load(y + at, mask=mask), mask=mask)


@triton.jit
def softmax(out, x, stride, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
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
def attention(q, k, v, out, scale, tokens, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr):
    """Flash attention forward: q, k, v, out are [heads][tokens][D] in f16."""
    head = tl.program_id(1) * tokens * D
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    d = tl.arange(0, D)
    vq = tl.load(q + head + rows[:, None] * D + d[None, :], mask=rows[:, None] < tokens, other=0.0)
    top = tl.full((BM,), -float("inf"), dtype=tl.float32)
    sum = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, D), dtype=tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BM, tokens) if CAUSAL else tokens
    for base in range(0, end, BN):
        at = base + cols
        vk = tl.load(k + head + at[None, :] * D + d[:, None], mask=at[None, :] < tokens, other=0.0)
        s = tl.dot(vq, vk) * (scale * 1.4426950408889634)
        seen = at[None, :] < tokens
        if CAUSAL:
            seen = seen & (at[None, :] <= rows[:, None])
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        vv = tl.load(v + head + at[:, None] * D + d[None, :], mask=at[:, None] < tokens, other=0.0)
        sum = sum * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(tl.float16), vv, acc * shrink[:, None])
        top = new
    acc = acc / sum[:, None]
    tl.store(out + head + rows[:, None] * D + d[None, :], acc.to(tl.float16), mask=rows[:, None] < tokens)
