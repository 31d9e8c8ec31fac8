"""Triton's attention. make.py compiles them to PTX; nothing here runs."""

import triton
import triton.language as tl


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


@triton.jit
def attention_maps(
    map_q, map_k, map_v, map_out, tops, scale, tokens, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, SPECIALIZE: tl.constexpr,
):
    """Flash attention forward through tensor maps of [heads * tokens][D]; tops: log2 of each row's sum. Tokens are a
    multiple of BM, which is one of BN."""
    head = tl.program_id(1) * tokens
    first = tl.program_id(0) * BM
    rows = first + tl.arange(0, BM)
    cols = tl.arange(0, BN)
    vq = map_q.load([head + first, 0])
    top = tl.full((BM,), -float("inf"), dtype=tl.float32)
    sum = tl.zeros((BM,), dtype=tl.float32)
    acc = tl.zeros((BM, D), dtype=tl.float32)
    end = first + BM if CAUSAL else tokens
    for base in tl.range(0, end, BN, warp_specialize=SPECIALIZE):
        s = tl.dot(vq, map_k.load([head + base, 0]).T) * (scale * 1.4426950408889634)
        if CAUSAL:
            s = tl.where((base + cols)[None, :] <= rows[:, None], s, -float("inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        p = tl.exp2(s - new[:, None])
        shrink = tl.exp2(top - new)
        sum = sum * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(tl.float16), map_v.load([head + base, 0]), acc * shrink[:, None])
        top = new
    tl.store(tops + head + rows, top + tl.log2(sum))
    map_out.store([head + first, 0], (acc / sum[:, None]).to(tl.float16))


@triton.jit
def attention_backward(
    q, k, v, dout, tops, deltas, dq, dk, dv, scale, tokens, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr
):
    """Gradients of causal attention. A program of head program_id(1): dk and dv of BN keys, then dq of BN queries.
    deltas: sums of out * dout over D. All of [heads][tokens][D] in f16, results in f32."""
    head = tl.program_id(1) * tokens
    first = tl.program_id(0) * BN
    own = first + tl.arange(0, BN)
    d = tl.arange(0, D)
    here = (head + own)[:, None] * D + d[None, :]
    vk = tl.load(k + here)
    vv = tl.load(v + here)
    sum_k = tl.zeros((BN, D), dtype=tl.float32)
    sum_v = tl.zeros((BN, D), dtype=tl.float32)
    for base in range(first, tokens, BM):
        rows = base + tl.arange(0, BM)
        there = (head + rows)[:, None] * D + d[None, :]
        vq = tl.load(q + there)
        vo = tl.load(dout + there)
        p = tl.exp2(tl.dot(vk, vq.T) * (scale * 1.4426950408889634) - tl.load(tops + head + rows)[None, :])
        p = tl.where(own[:, None] <= rows[None, :], p, 0.0)
        sum_v = tl.dot(p.to(tl.float16), vo, sum_v)
        ds = p * (tl.dot(vv, vo.T) - tl.load(deltas + head + rows)[None, :])
        sum_k = tl.dot(ds.to(tl.float16), vq, sum_k)
    tl.store(dk + here, sum_k * scale)
    tl.store(dv + here, sum_v)

    own_q = tl.load(q + here)
    own_o = tl.load(dout + here)
    top = tl.load(tops + head + own)
    delta = tl.load(deltas + head + own)
    sum_q = tl.zeros((BN, D), dtype=tl.float32)
    for base in range(0, first + BN, BM):
        cols = base + tl.arange(0, BM)
        there = (head + cols)[:, None] * D + d[None, :]
        other_k = tl.load(k + there)
        other_v = tl.load(v + there)
        p = tl.exp2(tl.dot(own_q, other_k.T) * (scale * 1.4426950408889634) - top[:, None])
        p = tl.where(cols[None, :] <= own[:, None], p, 0.0)
        ds = p * (tl.dot(own_o, other_v.T) - delta[:, None])
        sum_q = tl.dot(ds.to(tl.float16), other_k, sum_q)
    tl.store(dq + here, sum_q * scale)
