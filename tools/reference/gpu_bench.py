"""The work of `cargo bench --bench kernels` in PyTorch, on the same GPU: CUDA events, L2 flushed, medians.

    python3 tools/reference/gpu_bench.py [--model 2b|270m] [--op NAME]

Every op has the name, shapes and inputs of the engine's (`workloads` in `src/backend/cuda/`), and is what a PyTorch user
would write for it: eager, under torch.compile where that fuses something, attention by SDPA or FlexAttention. Gradients
are autograd's alone, of a forward pass that has kept what it likes. Needs a PyTorch of 2.5 or newer with CUDA; nothing
else in the project does.
"""

import argparse
import statistics

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

MODELS = {
    "2b": dict(name="Gemma 2B", d=2048, heads=8, kv=1, dh=256, f=16384, v=256_000),
    "270m": dict(name="Gemma 3 270M", d=640, heads=4, kv=1, dh=256, f=2048, v=262_144),
}
DEVICE = "cuda"
FLUSH_BYTES = 256 << 20
EPS = 1e-6
SCALE = 0.0625

# A compiled gradient may give its inputs away; here the same one is run again and again.
if hasattr(torch._functorch.config, "donated_buffer"):
    torch._functorch.config.donated_buffer = False


def seconds(run, repeats=20):
    """The median time of `run`, its inputs out of the L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def random(*shape, dtype=torch.bfloat16):
    return torch.rand(*shape, device=DEVICE).mul(2).sub(1).to(dtype)


def both(function):
    """(how, function)"""
    return [("eager", function), ("compiled", torch.compile(function, dynamic=False))]


def gradient(function, inputs, d_out, constants=()):
    """What computes the gradient of `inputs` alone; its first call makes the forward pass."""
    kept = []

    def run():
        if not kept:
            with torch.enable_grad():
                leaves = [x.clone().requires_grad_() for x in inputs]
                kept.extend((function(*leaves, *constants), leaves))
        return torch.autograd.grad(*kept, d_out, retain_graph=True)

    return run


def norm(x, w):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * (1 + w.float())).to(x.dtype)


def add_norm(x, w, branch):
    total = x + branch
    return total, norm(total, w)


def add_norm_post(x, branch, w, post):
    return add_norm(x, w, norm(branch, post))


def geglu(x, gate, up):
    gate, up = x @ gate.T, x @ up.T
    return F.gelu(gate, approximate="tanh") * up


def geglu_kept(x, gate, up):
    gate, up = x @ gate.T, x @ up.T
    return F.gelu(gate, approximate="tanh") * up, gate, up


def activation(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def rope(x, cos, sin):
    """x [T, heads, Dh], cos and sin [T, 1, Dh]"""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def norm_rope(x, w, cos, sin):
    return rope(norm(x, w), cos, sin)


def append(q, k, v, cos, sin, rows, cached_k, cached_v):
    cached_k.index_copy_(0, rows, rope(k, cos, sin))
    cached_v.index_copy_(0, rows, v)
    return rope(q, cos, sin)


def append_norm(q, k, v, w, cos, sin, rows, cached_k, cached_v):
    return append(norm(q, w), norm(k, w), v, cos, sin, rows, cached_k, cached_v)


def logprob(x, table, targets):
    return torch.log_softmax((x @ table.T).float(), -1).gather(1, targets[:, None])


def sample(x, table):
    logits = (x @ table.T).float()
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)))
    tokens = (logits + noise).argmax(-1, keepdim=True)
    return tokens, torch.log_softmax(logits, -1).gather(1, tokens)


def sample_truncated(x, table, top_k=64, top_p=0.95, min_p=0.01):
    """Top-k, top-p of what is left, min-p."""
    logits = (x @ table.T).float()
    best, tokens = logits.topk(top_k, -1)
    p = torch.softmax(best, -1)
    dropped = (p.cumsum(-1) - p >= top_p) | (p < min_p * p[:, :1])
    drawn = torch.multinomial(p.masked_fill(dropped, 0), 1)
    tokens = tokens.gather(1, drawn)
    return tokens, torch.log_softmax(logits, -1).gather(1, tokens)


def packed(prompt, responses, length, window):
    """FlexAttention's mask of a prompt and what follows on it, in one row each."""
    total = prompt + responses * length
    row = torch.arange(total, device=DEVICE)
    segment = torch.where(row < prompt, 0, 1 + (row - prompt) // max(length, 1))
    position = torch.where(row < prompt, row, prompt + (row - prompt) % max(length, 1))

    def visible(_batch, _head, q, k):
        distance = position[q] - position[k]
        shared = (segment[k] == 0) | (segment[k] == segment[q])
        return shared & (distance >= 0) & (distance < window)

    return total, create_block_mask(visible, None, None, total, total, device=DEVICE)


def ops(m):
    """(name, how, function); a function is good until the next is asked for."""
    yield from products(m)
    yield from attention(m)
    yield from head(m)
    yield from bound_by_memory(m)


def products(m):
    d, f, q, kv = m["d"], m["f"], m["heads"] * m["dh"], m["kv"] * m["dh"]
    for t in (32, 512):
        for name, out, width in (("q k v", q + 2 * kv, d), ("out", d, q), ("down", d, f)):
            x, w = random(t, width), random(out, width)
            yield f"matmul_forward {name}, T = {t}", "eager", lambda: x @ w.T
        x, gate, up = random(t, d), random(f, d), random(f, d)
        for how, function in both(geglu if t == 32 else geglu_kept):
            yield f"geglu_forward, T = {t}", how, lambda: function(x, gate, up)
    t = 512
    dq, dk, dv = random(t, q), random(t, kv), random(t, kv)
    wq, wk, wv = random(q, d), random(kv, d), random(kv, d)
    input_gradient = lambda: (dq @ wq).addmm_(dk, wk).addmm_(dv, wv)
    yield f"matmul_backward_input q k v, T = {t}", "eager", input_gradient
    x, dw = random(t, d), random(q, d, dtype=torch.float32)
    yield f"matmul_backward_weight q, T = {t}", "eager", lambda: dw.add_(dq.T @ x)


def attention(m):
    heads, kv, dh = m["heads"], m["kv"], m["dh"]
    gqa = dict(scale=SCALE, enable_gqa=True)
    t = 1024
    q, k, v = random(1, heads, t, dh), random(1, kv, t, dh), random(1, kv, t, dh)
    causal = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    yield f"attention_forward prefill of {t}", "SDPA", causal
    flex = torch.compile(flex_attention, dynamic=False)
    far = 1 << 30
    _, mask = packed(t, 0, 0, 512)
    yield f"attention_forward prefill of {t}, window 512", "flex", lambda: flex(q, k, v, block_mask=mask, **gqa)
    t, mask = packed(512, 4, 128, far)
    q, k, v = random(1, heads, t, dh), random(1, kv, t, dh), random(1, kv, t, dh)
    what = "prompt of 512 and 4 responses of 128"
    yield f"attention_forward {what}", "flex", lambda: flex(q, k, v, block_mask=mask, **gqa)
    # Every stream has the prompt's keys for itself, as in a cache that shares nothing.
    q, k, v = random(32, heads, 1, dh), random(32, kv, 640, dh), random(32, kv, 640, dh)
    decode = lambda: F.scaled_dot_product_attention(q, k, v, **gqa)
    yield "attention_forward decode, prompt of 512 and 32 tails of 128", "SDPA", decode
    for window in (far, 512):
        t, mask = packed(512, 4, 256, window)
        q, k, v = random(1, heads, t, dh), random(1, kv, t, dh), random(1, kv, t, dh)
        run = gradient(lambda *x: flex(*x, block_mask=mask, **gqa), (q, k, v), random(1, heads, t, dh))
        name = "attention_backward 512 + 4 x 256 tokens" + ("" if window == far else f", window {window}")
        yield name, "flex", run


def head(m):
    d, vocab = m["d"], m["v"]
    table = random(vocab, d)
    # Tokens and log-probs are read back, as the engine does.
    x = random(32, d)
    for how, function in both(sample):
        yield f"lm_head_sample 32 rows, {vocab} of {vocab} tokens", how, lambda: [y.cpu() for y in function(x, table)]
    x = random(16, d)
    truncated = lambda: [y.cpu() for y in sample_truncated(x, table)]
    yield f"lm_head_truncated 16 rows, {vocab} of {vocab} tokens", "eager", truncated
    x = random(256, d)
    targets = torch.arange(256, device=DEVICE) * 31
    for how, function in both(logprob):
        forward = lambda: function(x, table, targets).cpu()
        yield f"lm_head_logprob_forward 256 rows, {vocab} of {vocab} tokens", how, forward
    d_out = torch.full((256, 1), 0.5, device=DEVICE)
    for how, function in both(logprob):
        run = gradient(function, (x, table), d_out, (targets,))
        yield f"lm_head_logprob_backward 256 rows, {vocab} of {vocab} tokens", how, run


def bound_by_memory(m):
    d, f, heads, kv, dh = m["d"], m["f"], m["heads"], m["kv"], m["dh"]
    f32 = torch.float32
    shapes = [(heads * dh, d), (1, d)]
    elements = sum(a * b for a, b in shapes)
    masters = [torch.nn.Parameter(torch.zeros(s, device=DEVICE)) for s in shapes]
    copies = [x.detach().bfloat16() for x in masters]
    for x in masters:
        x.grad = torch.zeros_like(x)
    # Fused where that is a kernel.
    optimizer = torch.optim.AdamW(masters, 1e-3, (0.9, 0.95), 1e-8, weight_decay=0.1, fused=True)

    def adamw():
        gradients = [x.grad for x in masters]
        torch._foreach_mul_(gradients, 0.5)
        optimizer.step()
        torch._foreach_copy_(copies, masters)
        torch._foreach_zero_(gradients)

    yield f"adamw {elements} parameters", "fused", adamw
    tensors = [random(*s, dtype=f32) for s in shapes]
    squares = lambda: [x.square() for x in torch._foreach_norm(tensors)]
    yield f"sum_squares {elements} elements", "foreach", squares

    t = 2048
    ids = torch.arange(t, device=DEVICE)
    ids = (ids * ids % 1021 * 31 + ids % 7) % 4096
    table, dx, dtable = random(4096, d), random(t, d), torch.zeros(4096, d, device=DEVICE)
    for how, function in both(lambda ids, table: F.embedding(ids, table) * 25.25):
        yield f"embed_forward T = {t}", how, lambda: function(ids, table)
    backward = lambda: dtable.index_add_(0, ids, dx.float(), alpha=25.25)
    yield f"embed_backward T = {t}", "eager", backward
    gate, up, dh_ = random(256, f), random(256, f), random(256, f)
    for how, function in both(activation):
        yield "geglu_backward T = 256", how, gradient(function, (gate, up), dh_)

    for t in (32, 2048):
        x, branch, w, post = random(t, d), random(t, d), random(d), random(d)
        for how, function in both(norm):
            yield f"rms_norm_forward T = {t}", how, lambda: function(x, w)
        for how, function in both(add_norm):
            yield f"add_norm_forward T = {t}", how, lambda: function(x, w, branch)
        for how, function in both(add_norm_post):
            yield f"add_norm_forward post T = {t}", how, lambda: function(x, branch, w, post)
    d_out = (random(t, d), random(t, d))
    for how, function in both(add_norm):
        yield f"add_norm_backward T = {t}", how, gradient(function, (x, w), d_out, (branch,))
    for how, function in both(add_norm_post):
        yield f"add_norm_backward post T = {t}", how, gradient(function, (x, branch, w, post), d_out)

    w = random(dh)
    for t in (2048, 32):
        # As a model has them: once a pass, for all layers.
        angles = torch.arange(t, device=DEVICE)[:, None] * 10_000.0 ** (-torch.arange(0, dh, 2, device=DEVICE) / dh)
        angles = torch.cat((angles, angles), -1)[:, None]
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        q, dy = random(t, heads, dh), random(t, heads, dh)
        for how, function in both(rope):
            yield f"rope_forward q, T = {t}", how, lambda: function(q, cos, sin)
        for how, function in both(norm_rope):
            yield f"rope_forward norm q, T = {t}", how, lambda: function(q, w, cos, sin)
        if t == 2048:
            for how, function in both(rope):
                yield f"rope_backward q, T = {t}", how, gradient(function, (q,), dy, (cos, sin))
            for how, function in both(norm_rope):
                yield f"rope_backward norm q, T = {t}", how, gradient(function, (q, w), dy, (cos, sin))
            continue
        k, v, cached_k, cached_v = (random(t, kv, dh) for _ in range(4))
        rows = torch.arange(t, device=DEVICE)
        for how, function in both(append):
            yield f"rope_append q k v, T = {t}", how, lambda: function(q, k, v, cos, sin, rows, cached_k, cached_v)
        for how, function in both(append_norm):
            run = lambda: function(q, k, v, w, cos, sin, rows, cached_k, cached_v)
            yield f"rope_append norm q k v, T = {t}", how, run

    x, dy = random(2048, d), random(1536, d)
    picked = torch.arange(1536, device=DEVICE) * 4 // 3
    yield "gather_rows 1536 of 2048", "eager", lambda: x.index_select(0, picked)
    yield "scatter_rows 1536 into 2048", "eager", lambda: torch.zeros_like(x).index_copy_(0, picked, dy)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: both")
    parser.add_argument("--op", default="", metavar="NAME", help="only ops whose names begin so")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this PyTorch sees no CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    failed = False
    for key in [args.model] if args.model else MODELS:
        model = MODELS[key]
        # So many shapes of one function are compiled, then no more.
        torch._dynamo.reset()
        with torch.no_grad():
            for name, how, run in ops(model):
                if not name.startswith(args.op):
                    continue
                label = f"{model['name']}/{name} ({how})"
                try:
                    print(f"{label:<84} {1e6 * seconds(run):10.1f} us", flush=True)
                except Exception as e:  # one op that this PyTorch cannot do is no reason to know nothing of the others
                    failed = True
                    print(f"{label:<84} failed: {type(e).__name__}: {str(e).splitlines()[:1]}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
