"""The ops of `cargo bench --bench kernels` in PyTorch, on the same GPU: CUDA events, L2 flushed, medians.

    python3 tools/reference/gpu_bench.py [--model 2b|270m]

Each op is what a PyTorch user would write for it: eager, and under torch.compile where that fuses something. Shapes are
those of `workloads` in `src/backend/cuda/`. Needs a PyTorch with CUDA; nothing else in the project does.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F

MODELS = {
    "2b": dict(name="Gemma 2B", d=2048, heads=8, kv=1, dh=256, f=16384, v=256_000),
    "270m": dict(name="Gemma 3 270M", d=640, heads=4, kv=1, dh=256, f=2048, v=262_144),
}
FLUSH_BYTES = 256 << 20


def seconds(run, repeats=20):
    """The median time of `run`, its inputs out of the L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
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
    return torch.rand(*shape, device="cuda").mul(2).sub(1).to(dtype)


def norm(x, w, eps=1e-6):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (1 + w.float())).to(x.dtype)


def add_norm(x, branch, w):
    total = x + branch
    return total, norm(total, w)


def geglu(x, gate, up):
    return F.gelu(x @ gate.T, approximate="tanh") * (x @ up.T)


def logprob(x, table, targets):
    return torch.log_softmax((x @ table.T).float(), -1).gather(1, targets[:, None])


def sample(x, table):
    logits = (x @ table.T).float()
    noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)))
    tokens = (logits + noise).argmax(-1, keepdim=True)
    return tokens, torch.log_softmax(logits, -1).gather(1, tokens)


def ops(m):
    """(name, FLOPs, function)"""
    d, f, q, kv = m["d"], m["f"], m["heads"] * m["dh"], m["kv"] * m["dh"]
    for t in (32, 512):
        x = random(t, d)
        for name, out, width in (("q k v", q + 2 * kv, d), ("out", d, q), ("down", d, f)):
            a, w = random(t, width), random(out, width)
            yield f"matmul_forward {name}, T = {t}", 2 * t * out * width, lambda a=a, w=w: a @ w.T
        gate, up = random(f, d), random(f, d)
        for how, function in (("eager", geglu), ("compiled", torch.compile(geglu))):
            yield f"geglu_forward, T = {t} ({how})", 4 * t * f * d, lambda x=x, g=gate, u=up, c=function: c(x, g, u)
        w = random(d)
        branch = random(t, d)
        for how, function in (("eager", add_norm), ("compiled", torch.compile(add_norm))):
            yield f"add_norm_forward T = {t} ({how})", 0, lambda x=x, b=branch, w=w, c=function: c(x, b, w)
    t = 512
    dy, x, dw = random(t, q), random(t, d), random(q, d, dtype=torch.float32)
    yield f"matmul_backward_weight q, T = {t}", 2 * t * q * d, lambda: dw.add_(dy.T @ x)
    for length in (512, 2048):
        query = random(1, m["heads"], length, m["dh"])
        key, value = random(1, m["kv"], length, m["dh"]), random(1, m["kv"], length, m["dh"])

        def attend(q=query, k=key, v=value):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        yield f"attention_forward, causal, T = {length}", 2 * m["heads"] * length**2 * m["dh"], attend
    table = random(m["v"], d)
    x = random(32, d)
    yield "lm_head_sample R = 32", 2 * 32 * m["v"] * d, lambda: sample(x, table)
    rows, targets = random(512, d), torch.randint(0, m["v"], (512,), device="cuda")
    yield "lm_head_logprob_forward R = 512", 2 * 512 * m["v"] * d, lambda: logprob(rows, table, targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, help="default: both")
    chosen = parser.parse_args().model
    if not torch.cuda.is_available():
        raise SystemExit("this PyTorch sees no CUDA GPU")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")
    for key in [chosen] if chosen else MODELS:
        model = MODELS[key]
        with torch.no_grad():
            for name, flops, run in ops(model):
                took = seconds(run)
                rate = f"  {flops / took / 1e12:7.1f} TFLOP/s" if flops else ""
                print(f"{model['name']}: {name:<44} {1e6 * took:10.1f} us{rate}", flush=True)


if __name__ == "__main__":
    main()
