"""The work of the engine's benchmarks in PyTorch and Transformers, on the same GPU.

    python3 tools/reference/gpu_bench.py [--model 2b|270m] [--op NAME] [--eager]
    python3 tools/reference/gpu_bench.py --engine [--model 2b|1b|270m] [--eager] [--output FILE.json]

First the ceilings: the rate of a large copy and of a large product. Then the ops of `cargo bench --bench kernels`: CUDA
events, L2 flushed, medians. Every op has the name, shapes and inputs of the engine's (`workloads` in
`src/backend/cuda/`), and is what a PyTorch user would write for it: eager, under torch.compile where that fuses
something, attention by SDPA or FlexAttention. Gradients are autograd's alone, of a forward pass that has kept what it
likes. `--list` prints names and runs nothing.

With --engine the work of `cargo bench --bench engine`, by the same names, in Transformers: models of the same shapes
with weights of the same distribution, prefill, `generate` with `num_return_sequences` and a static cache, and a
policy-gradient step with autocast and AdamW. What Transformers does not share is done for every stream: the prompt's
keys and values, and in training the prompt itself. So rates count the tokens that the engine has for the same work.

--eager leaves out torch.compile, which takes most of the time. Needs a PyTorch of 2.5 or newer with CUDA, and
Transformers for --engine; nothing else in the project does. `--device cpu --model tiny` runs either on a computer
without a GPU, to see that it works.
"""

import argparse
import json
import statistics
import time

try:
    import torch
    import torch._functorch.config
    import torch.nn.functional as F
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError as e:
    raise SystemExit(f"gpu_bench.py needs PyTorch 2.5 or newer: {e}")

GEMMA_1 = dict(layers=18, window=None, qk_norm=False, positions=8192)
GEMMA_3 = dict(layers=18, window=512, qk_norm=True, positions=32_768)
MODELS = {
    "2b": dict(name="Gemma 2B", d=2048, heads=8, kv=1, dh=256, f=16384, v=256_000, **GEMMA_1),
    "270m": dict(name="Gemma 3 270M", d=640, heads=4, kv=1, dh=256, f=2048, v=262_144, **GEMMA_3),
    "1b": dict(name="Gemma 3 1B", d=1152, heads=4, kv=1, dh=256, f=6912, v=262_144, **(GEMMA_3 | dict(layers=26))),
    "tiny": dict(name="tiny", d=104, heads=4, kv=1, dh=64, f=200, v=333, **(GEMMA_3 | dict(layers=6, window=8))),
}
# What is measured of a model; as in benches/engine.rs.
REAL = dict(prompt=512, streams=(1, 8, 32, 256), new=64, prefills=(1, 16), groups=(1, 4), responses=32, length=113)
TINY = dict(prompt=12, streams=(1, 3), new=4, prefills=(2,), groups=(1, 2), responses=3, length=5)
# All of these may be set by `main`.
DEVICE = "cuda"
EAGER = False
FLUSH_BYTES = 256 << 20
EPS = 1e-6
SCALE = 0.0625

# A compiled gradient may give its inputs away; here the same one is run again and again.
if hasattr(torch._functorch.config, "donated_buffer"):
    torch._functorch.config.donated_buffer = False


class Mark:
    """A moment, by the device's clock."""

    def __init__(self):
        if DEVICE == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()
        else:
            self.now = time.perf_counter()

    def seconds_since(self, earlier):
        if DEVICE == "cuda":
            self.event.synchronize()
            return earlier.event.elapsed_time(self.event) / 1e3
        return self.now - earlier.now


def timed(run):
    start = Mark()
    run()
    return Mark().seconds_since(start)


def seconds(run, repeats=20):
    """The median time of `run`, its inputs out of the L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    before = getattr(run, "before", lambda: None)
    for _ in range(3):
        before()
        run()
    times = []
    for _ in range(repeats):
        before()
        flush.zero_()
        times.append(timed(run))
    return statistics.median(times)


def random(*shape, dtype=torch.bfloat16):
    return torch.rand(*shape, device=DEVICE).mul(2).sub(1).to(dtype)


def both(function):
    """(how, function)"""
    compiled = [] if EAGER else [("compiled", torch.compile(function, dynamic=False))]
    return [("eager", function), *compiled]


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
    if DEVICE == "meta":
        return total, None
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
    for t in (32, 256, 512, 4096):
        for name, out, width in (("q k v", q + 2 * kv, d), ("out", d, q), ("down", d, f)):
            x, w = random(t, width), random(out, width)
            yield f"matmul_forward {name}, T = {t}", "eager", lambda: x @ w.T
        x, gate, up = random(t, d), random(f, d), random(f, d)
        for how, function in both(geglu if t <= 256 else geglu_kept):
            yield f"geglu_forward, T = {t}", how, lambda: function(x, gate, up)
    inputs = {"q k v": ((q, kv, kv), d), "out": ((d,), q), "down": ((d,), f), "gate up": ((f, f), d)}
    weights = {"q": (q, d), "k": (kv, d), "out": (d, q), "down": (d, f), "gate": (f, d)}
    for t in (512, 4096):
        for name, (outs, width) in inputs.items():
            if t == 4096 or name == "q k v":
                dy, w = [random(t, out) for out in outs], [random(out, width) for out in outs]

                def input_gradient():
                    dx = dy[0] @ w[0]
                    for y, v in zip(dy[1:], w[1:]):
                        dx.addmm_(y, v)

                yield f"matmul_backward_input {name}, T = {t}", "eager", input_gradient
        for name, (out, width) in weights.items():
            if t == 4096 or name == "q":
                dy, x, dw = random(t, out), random(t, width), random(out, width, dtype=torch.float32)
                yield f"matmul_backward_weight {name}, T = {t}", "eager", lambda: dw.add_(dy.T @ x)


def attention(m):
    heads, kv, dh = m["heads"], m["kv"], m["dh"]
    gqa = dict(scale=SCALE, enable_gqa=True)
    t = 1024
    q, k, v = random(1, heads, t, dh), random(1, kv, t, dh), random(1, kv, t, dh)
    causal = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, **gqa)
    yield f"attention_forward prefill of {t}", "SDPA", causal
    # Every stream has the prompt's keys for itself, as in a cache that shares nothing.
    for prompt, n in ((512, 32), (512, 256), (4096, 32)):
        q, k, v = random(n, heads, 1, dh), random(n, kv, prompt + 128, dh), random(n, kv, prompt + 128, dh)
        decode = lambda: F.scaled_dot_product_attention(q, k, v, **gqa)
        yield f"attention_forward decode, prompt of {prompt} and {n} tails of 128", "SDPA", decode
    # FlexAttention is fast only when it is compiled.
    if EAGER:
        return
    flex = torch.compile(flex_attention, dynamic=False)
    far = 1 << 30
    q, k, v = random(1, heads, t, dh), random(1, kv, t, dh), random(1, kv, t, dh)
    _, mask = packed(t, 0, 0, 512)
    yield f"attention_forward prefill of {t}, window 512", "flex", lambda: flex(q, k, v, block_mask=mask, **gqa)
    for responses in (4, 32):
        rows, mask = packed(512, responses, 128, far)
        q, k, v = random(1, heads, rows, dh), random(1, kv, rows, dh), random(1, kv, rows, dh)
        what = f"prompt of 512 and {responses} responses of 128"
        yield f"attention_forward {what}", "flex", lambda: flex(q, k, v, block_mask=mask, **gqa)
    for responses, length in ((4, 256), (32, 128)):
        for window in (far, 512):
            rows, mask = packed(512, responses, length, window)
            q, k, v = random(1, heads, rows, dh), random(1, kv, rows, dh), random(1, kv, rows, dh)
            run = gradient(lambda *x: flex(*x, block_mask=mask, **gqa), (q, k, v), random(1, heads, rows, dh))
            what = f"512 + {responses} x {length} tokens" + ("" if window == far else f", window {window}")
            yield f"attention_backward {what}", "flex", run


def head(m):
    d, vocab = m["d"], m["v"]
    table = random(vocab, d)
    # Tokens and log-probs are read back, as the engine does.
    for rows in (32, 256):
        x = random(rows, d)
        for how, function in both(sample):
            name = f"lm_head_sample {rows} rows, {vocab} of {vocab} tokens"
            yield name, how, lambda: [y.cpu() for y in function(x, table)]
    x = random(16, d)
    truncated = lambda: [y.cpu() for y in sample_truncated(x, table)]
    yield f"lm_head_truncated 16 rows, {vocab} of {vocab} tokens", "eager", truncated
    for rows in (256, 4096):
        x, targets = random(rows, d), torch.arange(rows, device=DEVICE) * 31 % vocab
        for how, function in both(logprob):
            forward = lambda: function(x, table, targets).cpu()
            yield f"lm_head_logprob_forward {rows} rows, {vocab} of {vocab} tokens", how, forward
        d_out = torch.full((rows, 1), 0.5, device=DEVICE)
        for how, function in both(logprob):
            run = gradient(function, (x, table), d_out, (targets,))
            yield f"lm_head_logprob_backward {rows} rows, {vocab} of {vocab} tokens", how, run


def bound_by_memory(m):
    d, f, heads, kv, dh = m["d"], m["f"], m["heads"], m["kv"], m["dh"]
    f32 = torch.float32
    matrix = (heads * dh, d)
    for name, dtype in (("bf16", torch.bfloat16), ("f32", f32)):
        fresh = lambda: torch.rand(matrix, dtype=dtype, device=DEVICE)
        yield f"random_{name} {heads * dh * d} elements", "eager", fresh
    for shapes in ((matrix, (1, d)), ((f, d), (1, d))):
        elements = sum(a * b for a, b in shapes)
        masters = [torch.nn.Parameter(random(*s, dtype=f32)) for s in shapes]
        copies = [x.detach().bfloat16() for x in masters]
        # Fused where that is a kernel.
        optimizer = torch.optim.AdamW(masters, 1e-3, (0.9, 0.95), 1e-8, weight_decay=0.1, fused=DEVICE != "meta")

        def adamw():
            gradients = [x.grad for x in masters]
            torch._foreach_mul_(gradients, 0.5)
            optimizer.step()
            torch._foreach_copy_(copies, masters)
            torch._foreach_zero_(gradients)

        # New gradients for every run: it leaves zeros behind.
        def renew():
            for x in masters:
                x.grad = random(*x.shape, dtype=f32)

        adamw.before = renew
        yield f"adamw {elements} parameters", "fused", adamw
        tensors = [random(*s, dtype=f32) for s in shapes]
        squares = lambda: [x.square() for x in torch._foreach_norm(tensors)]
        yield f"sum_squares {elements} elements", "foreach", squares

    t = 2048
    ids = torch.arange(t, device=DEVICE)
    ids = (ids * ids % 1021 * 31 + ids % 7) % 4096
    table, dx, dtable = random(4096, d), random(t, d), random(4096, d, dtype=f32)
    for how, function in both(lambda ids, table: F.embedding(ids, table) * 25.25):
        yield f"embed_forward T = {t}", how, lambda: function(ids, table)
    backward = lambda: dtable.index_add_(0, ids, dx.float(), alpha=25.25)
    yield f"embed_backward T = {t}", "eager", backward
    for t in (256, 4096):
        gate, up, dh_ = random(t, f), random(t, f), random(t, f)
        for how, function in both(activation):
            yield f"geglu_backward T = {t}", how, gradient(function, (gate, up), dh_)

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


# ------------------------------------------------------------------------------------------------------ the engine


class Missing(Exception):
    """What this machine lacks, in words."""


def parts(m):
    """A Transformers model class and its configuration."""
    try:
        import transformers
    except ImportError as e:
        raise Missing(f"--engine needs Transformers: {e}")
    common = dict(
        vocab_size=m["v"],
        hidden_size=m["d"],
        intermediate_size=m["f"],
        num_hidden_layers=m["layers"],
        num_attention_heads=m["heads"],
        num_key_value_heads=m["kv"],
        head_dim=m["dh"],
        max_position_embeddings=m["positions"],
        rms_norm_eps=EPS,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    if not m["qk_norm"]:
        return transformers.GemmaForCausalLM, transformers.GemmaConfig(hidden_activation="gelu_pytorch_tanh", **common)
    if not hasattr(transformers, "Gemma3ForCausalLM"):
        raise Missing(f"Transformers {transformers.__version__} has no Gemma3ForCausalLM: 4.50 and newer have")
    layers = ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(m["layers"])]
    config = transformers.Gemma3TextConfig(
        sliding_window=m["window"],
        layer_types=layers,
        query_pre_attn_scalar=m["dh"],
        **common,
    )
    return transformers.Gemma3ForCausalLM, config


def random_model(m, dtype):
    """Weights of the engine's distribution."""
    model_class, config = parts(m)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for p in model.parameters():
            spread = (3 / p.shape[-1]) ** 0.5 if p.dim() == 2 else 0.2
            p.uniform_(-spread, spread)
    return model.eval()


def prompts(m, count, length):
    return torch.randint(3, m["v"], (count, length), device=DEVICE)


def peak(reset=False):
    """Bytes in use at once at most since the last reset; `None` without a GPU."""
    if DEVICE != "cuda":
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


class Told:
    """A line per figure as it comes, and all of them as JSON."""

    def __init__(self, output):
        self.output, self.figures, self.failed = output, [], False

    def figure(self, name, how, text, **values):
        print(f"{name + ' (' + how + ')':<56} {text}", flush=True)
        self.figures.append(dict(name=name, how=how, **values))
        if self.output:
            with open(self.output, "w") as file:
                json.dump(dict(torch=torch.__version__, figures=self.figures), file, indent=2)

    def attempt(self, name, how, run):
        """Runs `run`, which gives (text, values). What this machine cannot do is no reason to know nothing more."""
        try:
            text, values = run()
            self.figure(name, how, text, **values)
        except Exception as e:
            self.failed = True
            why = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:160]}"
            self.figure(name, how, f"failed: {why}", failed=why)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def ceilings(told):
    """The rates of a large copy and of a large product."""
    real = DEVICE == "cuda"
    rows, n = (8192, 8192) if real else (16, 256)

    def copy():
        x = random(rows, 65_536)
        y = torch.empty_like(x)
        spent = seconds(lambda: y.copy_(x))
        rate = 2 * x.numel() * x.element_size() / spent
        return f"{rate / 1e12:.3f} TB/s ({1e3 * spent:.3f} ms)", dict(bytes_per_s=rate)

    def product():
        x, w = random(n, n), random(n, n)
        spent = seconds(lambda: x @ w.T)
        rate = 2 * n**3 / spent
        return f"{rate / 1e12:.3f} TFLOP/s ({n}^3 in {1e3 * spent:.3f} ms)", dict(flops_per_s=rate)

    with torch.no_grad():
        told.attempt("ceiling/copy", "eager", copy)
        told.attempt("ceiling/product", "eager", product)


def decode(model, m, sizes, streams, compiled):
    """`generate` with a static cache: the time between its calls of a stopping criterion."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Clock(StoppingCriteria):
        def __init__(self):
            self.marks = []

        def __call__(self, ids, scores, **_):
            self.marks.append(Mark())
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    ids = prompts(m, 1, sizes["prompt"])
    options = dict(
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=streams,
        max_new_tokens=sizes["new"],
        min_new_tokens=sizes["new"],
        cache_implementation="static",
    )
    if not compiled:
        options["disable_compile"] = True

    def sample():
        clock = Clock()
        start = Mark()
        model.generate(ids, stopping_criteria=StoppingCriteriaList([clock]), **options)
        marks = [start, *clock.marks]
        return [b.seconds_since(a) for a, b in zip(marks, marks[1:])]

    with torch.no_grad():
        # The first call allocates and compiles.
        sample()
        peak(reset=True)
        first, *steps = sample()
    step, rate = statistics.median(steps), streams * len(steps) / sum(steps)
    text = f"{1e3 * step:.3f} ms a step, {rate:.1f} tokens/s, first token after {1e3 * first:.3f} ms"
    values = dict(ms_per_step=1e3 * step, tokens_per_s=rate, first_token_ms=1e3 * first, peak_bytes=peak())
    return text, values


def prefill(model, m, sizes, count):
    ids = prompts(m, count, sizes["prompt"])
    with torch.no_grad():
        run = lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)
        run()
        spent = statistics.median(timed(run) for _ in range(5))
    rate = ids.numel() / spent
    return f"{1e3 * spent:.3f} ms, {rate:.1f} tokens/s", dict(seconds=spent, tokens_per_s=rate)


def train(m, sizes, groups):
    """A policy-gradient step on f32 weights under autocast, in the largest micro-batches that fit."""
    model = random_model(m, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, (0.9, 0.95), 1e-8, weight_decay=0.0, fused=DEVICE == "cuda")
    n, length, prompt = sizes["responses"], sizes["length"], sizes["prompt"]
    each = prompts(m, groups, prompt).repeat_interleave(n, 0)
    ids = torch.cat((each, prompts(m, groups * n, length)), 1)
    signs = torch.where(torch.arange(groups * n, device=DEVICE) % 2 == 0, 1.0, -0.5)
    weights = (signs / (groups * n * length))[:, None]

    def step(micro):
        start = Mark()
        for at in range(0, groups * n, micro):
            part = ids[at : at + micro]
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = model(input_ids=part, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
            losses = F.cross_entropy(logits.float().flatten(0, 1), part[:, prompt:].flatten(), reduction="none")
            (losses.view(-1, length) * weights[at : at + micro]).sum().backward()
        between = Mark()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        end = Mark()
        return between.seconds_since(start), end.seconds_since(between)

    micro = n
    while True:
        try:
            step(micro)
            peak(reset=True)
            spent = [step(micro) for _ in range(3)]
            break
        except torch.cuda.OutOfMemoryError:
            optimizer.zero_grad()
            torch.cuda.empty_cache()
            if micro == 1:
                raise
            micro //= 2
    passes, update = (statistics.median(x) for x in zip(*spent))
    tokens = groups * (prompt + n * (length - 1))
    rate = tokens / (passes + update)
    text = (
        f"{1e3 * (passes + update):.3f} ms, {rate:.1f} tokens/s: forward and backward {1e3 * passes:.3f}, optimizer "
        f"{1e3 * update:.3f}; {micro} sequences at a time"
    )
    values = dict(
        seconds=passes + update,
        tokens_per_s=rate,
        response_tokens_per_s=groups * n * length / (passes + update),
        optimizer_ms=1e3 * update,
        sequences_at_a_time=micro,
        peak_bytes=peak(),
    )
    return text, values


def engine(key, told):
    m = MODELS[key]
    sizes = TINY if key == "tiny" else REAL
    name = m["name"]
    model = random_model(m, torch.bfloat16)
    for count in sizes["prefills"]:
        label = f"{name}/prefill {count} x {sizes['prompt']}"
        told.attempt(label, "eager", lambda: prefill(model, m, sizes, count))
    for streams in sizes["streams"]:
        told.attempt(f"{name}/decode N = {streams}", "eager", lambda: decode(model, m, sizes, streams, False))
    del model
    for groups in sizes["groups"]:
        tokens = groups * (sizes["prompt"] + sizes["responses"] * (sizes["length"] - 1))
        told.attempt(f"{name}/train {tokens} tokens", "autocast", lambda: train(m, sizes, groups))
    if EAGER:
        return
    model = random_model(m, torch.bfloat16)
    for streams in sizes["streams"]:
        torch._dynamo.reset()
        told.attempt(f"{name}/decode N = {streams}", "compiled", lambda: decode(model, m, sizes, streams, True))


def main():
    global DEVICE, EAGER, FLUSH_BYTES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: all that are benchmarked")
    parser.add_argument("--op", default="", metavar="NAME", help="only ops whose names begin so")
    parser.add_argument("--engine", action="store_true", help="the engine's work in Transformers")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--output", metavar="FILE.json", help="with --engine: also write the figures there")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--list", action="store_true", help="print the ops' names")
    args = parser.parse_args()
    DEVICE, EAGER = args.device, args.eager
    if args.list:
        # Shapes without memory.
        DEVICE = "meta"
        for key in [args.model] if args.model else ("2b", "270m"):
            names = (f"{MODELS[key]['name']}/{name}" for name, *_ in ops(MODELS[key]))
            print("\n".join(dict.fromkeys(names)))
        return
    if DEVICE == "cpu":
        FLUSH_BYTES = 1 << 20
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this PyTorch sees no CUDA GPU")
    chip = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if DEVICE == "cuda" else "CPU"
    print(f"{chip}, PyTorch {torch.__version__}", flush=True)
    told = Told(args.output)
    ceilings(told)
    if args.engine:
        try:
            for key in [args.model] if args.model else ("270m", "1b", "2b"):
                engine(key, told)
        except Missing as e:
            raise SystemExit(str(e))
        raise SystemExit(told.failed)
    failed = told.failed
    for key in [args.model] if args.model else ("2b", "270m"):
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
