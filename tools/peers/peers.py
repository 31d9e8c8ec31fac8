#!/usr/bin/env python3
"""Time llama.cpp, PyTorch with Transformers, vLLM, and the engine at the same work on this machine's CPU.

    make peers                              # all of it: downloads up to 5 GB and builds llama.cpp, once
    python3 tools/peers/peers.py --rounds 1 # one round instead of five
    python3 tools/peers/peers.py --plot     # only what the engine's cost grows with: .cache/peers/cost.svg

The model is Gemma 3 270M with bf16 weights, the same numbers for all four. One prompt is shared by N streams:

- llama.cpp: `llama-batched-bench -pps`, weights in BF16. It does not sample: its tokens are made up.
- Transformers, in bf16 or f32, whichever this machine multiplies faster: the prompt runs once and its cache is repeated
  N times; each token is drawn by inverting the distribution function of the softmax, which is faster than
  `torch.multinomial`.
- vLLM, in the same of the two: one request of N responses, the prompt in the prefix cache. See vllm_peer.py. Where it
  does not run, the table says so and why.
- the engine: `bon-engine bench`, which draws each token from the whole softmax and records its log-prob.

The training step is the policy gradient of 16 responses to one prompt, then AdamW on f32 master weights. In PyTorch
the prompt is shared by hand, which Transformers does not offer: it runs once with its graph kept, and its keys and
values are repeated for the responses. Products are computed under autocast to bf16 where that is the faster. The
memory told is the most that the process was resident with, its programs and libraries included.

Rounds alternate between the programs, and medians are told, because machines are noisy; of training they are those of
as many steps in a row, after one that warms up. Each round begins with the ceilings of this machine, of which the best
are told: what PyTorch reads per second, and what its products reach in f32 and bf16.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cost_plot
import fetch_gemma
import venv_setup
from venv_setup import REPO, UserError

HOME = REPO / ".cache" / "peers"
MODEL = REPO / ".cache" / "gemma-3-270m"
ENGINE = REPO / "target" / "release" / "bon-engine"
LLAMA_SDIST = "llama-cpp-python==0.3.36"  # its sources carry llama.cpp
TOOLS = ["cmake==4.1.2", "ninja==1.13.0"]
PROMPT = 205
NEW = 32
STREAMS = (1, 8, 32)
# The training step.
TASK, RESPONSES = 200, 16
VERIFIER = """import json, sys
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({"id": job["id"], "score": len(job["response"]) % 2}), flush=True)
"""
# Runs a command and writes down its peak, in KiB on Linux.
PEAK = """import resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
with open(sys.argv[1], "w") as out:
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=out)
sys.exit(code)
"""
# The plot.
PLOT_STREAMS, PLOT_PROMPTS, PLOT_RUNS = (1, 2, 4, 8, 16, 32, 64), (64, 128, 256, 512, 1024), 3
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


def say(text):
    print(f"peers: {text}", flush=True)


def run(command, log, **options):
    """Runs a command whose output is of interest only if it fails."""
    with open(log, "wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, **options).returncode
    if code != 0:
        last = Path(log).read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{Path(command[0]).name} failed ({last[0]}); all it said is in {log}")


def with_peak(command):
    """Runs a command; the most bytes it was resident with come second.

    A small process starts it, because the peak of a process begins with that of the one that started it.
    """
    peak = HOME / "peak"
    peak.unlink(missing_ok=True)
    command = [sys.executable, "-c", PEAK, peak, *command]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    return done, 1024 * int(peak.read_text()) if peak.exists() else 0


# ---------------------------------------------------------------------------------------------------
# Setting up
# ---------------------------------------------------------------------------------------------------


def build_llama(threads):
    """llama.cpp's programs, built for this machine."""
    programs = [HOME / "llama" / "bin" / name for name in ("llama-batched-bench", "llama-quantize")]
    if all(program.exists() for program in programs):
        return programs
    bin_dir = Path(sys.executable).parent
    sources = HOME / "sources"
    if not any(sources.glob("*.tar.gz")):
        say("fetching llama.cpp")
        sources.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
        run([*pip, "--dest", sources, LLAMA_SDIST], HOME / "fetch.log")
    unpacked = HOME / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(next(sources.glob("*.tar.gz"))) as archive:
        archive.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    tree = next(unpacked.glob("*/vendor/llama.cpp"))
    say("building llama.cpp (a quarter of an hour on two cores)")
    options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_CURL=OFF"]
    options += [f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER")]
    options += ["LLAMA_BUILD_TOOLS=ON", f"CMAKE_MAKE_PROGRAM={bin_dir / 'ninja'}"]
    build = [bin_dir / "cmake", "-S", tree, "-B", HOME / "llama", "-G", "Ninja", *(f"-D{o}" for o in options)]
    run(build, HOME / "configure.log")
    targets = [program.name for program in programs]
    run([bin_dir / "ninja", "-C", HOME / "llama", f"-j{threads}", *targets], HOME / "build.log")
    return programs


def write_gguf(quantize):
    """The model's GGUF file with its weights widened to BF16: the numbers of `model.safetensors`."""
    gguf = HOME / "gemma-3-270m-bf16.gguf"
    if gguf.exists():
        return gguf
    # The package with the parts is in the environment of `make gemma`.
    python = REPO / ".cache" / fetch_gemma.VENV_NAME / "bin" / "python"
    if not python.exists():
        raise UserError(f"{python} is missing; rm -r {MODEL} && make gemma")
    say("widening the model's GGUF file")
    packed, partial = HOME / "packed.gguf", HOME / "partial.gguf"
    assemble = "import sys, fetch_gemma; fetch_gemma.assemble(sys.argv[1])"
    run([python, "-c", assemble, packed], HOME / "assemble.log", cwd=REPO / "tools")
    run([quantize, "--allow-requantize", "--pure", packed, partial, "BF16"], HOME / "widen.log")
    partial.rename(gguf)
    packed.unlink()
    return gguf


def prompt_of(tokens):
    """A text that is so many tokens long, the one that begins it included."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = TEXT * (tokens // 8)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for end in range(tokens - 1, len(ids)):
        cut = tokenizer.decode(ids[:end])
        if len(tokenizer.encode(cut, add_special_tokens=False).ids) == tokens - 1:
            return cut, [2, *tokenizer.encode(cut, add_special_tokens=False).ids]
    raise UserError(f"no prompt of {tokens} tokens")


# ---------------------------------------------------------------------------------------------------
# The work, by program: seconds per piece of work
# ---------------------------------------------------------------------------------------------------


def with_llama(program, gguf, threads):
    cells = {}
    for streams in STREAMS:
        context = PROMPT + streams * NEW + 64
        command = [program, "-m", gguf, "-c", context, "-b", 2048, "-ub", 512, "-npp", PROMPT, "-ntg", NEW]
        command += ["-npl", streams, "-pps", "-t", threads, "-tb", threads, "--output-format", "jsonl"]
        done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not lines:
            message = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"llama-batched-bench failed: {message}")
        line = json.loads(lines[-1])
        cells[f"decode {streams}"] = line["t_tg"] / NEW
        if streams == 1:
            cells["prefill"] = line["t_pp"]
    return cells


def bench_engine(streams, prompt, new, rounds):
    """Medians of the seconds of the prompt and of a decode step (None without one), by number of streams."""
    command = [ENGINE, "bench", "--device", "cpu", "--model", MODEL, "--json"]
    command += ["-n", ",".join(map(str, streams)), "--prompt-tokens", prompt, "--new-tokens", new, "--rounds", rounds]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"bon-engine bench failed: {done.stderr.strip()}")
    found = {}
    for line in map(json.loads, done.stdout.splitlines()):
        steps = line["decoded_tokens"] / line["streams"]
        decode = statistics.median(line["decode_seconds"]) / steps if steps else None
        found[line["streams"]] = statistics.median(line["prompt_seconds"]), decode
    return found


def with_engine():
    found = bench_engine(STREAMS, PROMPT, NEW, 1)
    return {"prefill": found[1][0], **{f"decode {streams}": found[streams][1] for streams in STREAMS}}


def train_with_engine(rounds):
    """Seconds of each step but the first, which touches the optimizer's memory; and the peak of memory.

    Rewards differ, as they must for a gradient: a response is right if it has an odd number of characters.
    """
    out = HOME / "train"
    shutil.rmtree(out, ignore_errors=True)
    settings = {
        "model.path": str(MODEL), "data.tasks": str(HOME / "tasks.jsonl"), "train.output": str(out),
        "generate.samples": RESPONSES, "generate.prompts_per_step": 1, "generate.max_new_tokens": NEW,
        # Responses that begin with nothing alike, because the engine computes once what does, and PyTorch here does not.
        "generate.temperature": 10.0,
        "objective.kind": "rl", "verifier.kind": "command", "verifier.program": [sys.executable, "-c", VERIFIER],
        "train.steps": rounds + 1, "train.seed": 1,
    }  # fmt: skip
    config = HOME / "train.toml"
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    command = [ENGINE, "train", config, "--device", "cpu"]
    done, peak = with_peak(command)
    metrics = out / "metrics.jsonl"
    if done.returncode != 0 or not metrics.exists():
        raise UserError(f"bon-engine train failed: {done.stderr.strip()}")
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    if any(step["grad_norm"] == 0 for step in steps):
        raise UserError("a step of bon-engine had no gradient: all responses were right, or none")
    shutil.rmtree(out)
    return [s["seconds"]["forward_backward"] + s["seconds"]["optimizer"] for s in steps[1:]], peak


class Torch:
    """Transformers' Gemma 3."""

    def __init__(self, threads):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.load = torch, AutoModelForCausalLM.from_pretrained

    def prepare(self):
        """The ceilings of this machine, and the model in what they say is the faster."""
        torch = self.torch
        ceilings = self.measure()
        self.bf16 = ceilings["bf16"] >= ceilings["f32"]
        self.model = self.load(MODEL, dtype=torch.bfloat16 if self.bf16 else torch.float32).eval()
        return ceilings

    def measure(self):
        """Bytes read and operations done per second, at best."""
        torch = self.torch

        def best(f):
            times = []
            while len(times) < 5 and sum(times) < 10:
                start = time.perf_counter()
                f()
                times.append(time.perf_counter() - start)
            return min(times)

        flat = torch.ones(1 << 27, dtype=torch.int64)
        figures = {"read": flat.nbytes / best(flat.sum)}
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
            figures[name] = 2 * 1024**3 / best(lambda: a @ b)
        return figures

    def cells(self, ids):
        torch = self.torch
        cells = {}
        with torch.inference_mode():
            for streams in STREAMS:
                start = time.perf_counter()
                out = self.model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=1)
                token = self.draw(out.logits[:, -1].expand(streams, -1))
                if streams == 1:
                    cells["prefill"] = time.perf_counter() - start
                cache = out.past_key_values
                cache.batch_repeat_interleave(streams)
                start = time.perf_counter()
                for _ in range(NEW - 1):
                    out = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    token = self.draw(out.logits[:, -1])
                cells[f"decode {streams}"] = (time.perf_counter() - start) / (NEW - 1)
        return cells

    def draw(self, logits):
        """One token per row, by inverting the distribution function."""
        torch = self.torch
        mass = torch.softmax(logits.float(), -1).cumsum(-1)
        at = torch.rand(len(mass), 1) * mass[:, -1:]
        return torch.searchsorted(mass, at).clamp_(max=mass.shape[1] - 1)

    def train(self, rounds, bf16):
        """Seconds of each step but the first."""
        torch = self.torch
        model = self.load(MODEL, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-6, (0.9, 0.95), 1e-8, weight_decay=0.0, fused=True)
        prompt = torch.randint(3, 200_000, (1, TASK))
        responses = torch.randint(3, 200_000, (RESPONSES, NEW))
        weights = torch.linspace(-1, 1, RESPONSES)[:, None] / (RESPONSES * NEW)
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                head = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
                cache = head.past_key_values
                cache.batch_repeat_interleave(RESPONSES)
                tail = model(input_ids=responses[:, :-1], past_key_values=cache, use_cache=True)
                logits = torch.cat((head.logits.expand(RESPONSES, -1, -1), tail.logits), 1)
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), responses.flatten(), reduction="none"
            )
            (losses.view(RESPONSES, NEW) * weights).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        return seconds[1:]


def train_with_torch(rounds, bf16):
    """The same in a process of its own, and the peak of memory."""
    steps = ["--rounds", rounds, "--torch-steps", "bf16" if bf16 else "f32"]
    done, peak = with_peak([sys.executable, Path(__file__).resolve(), *steps])
    if done.returncode != 0:
        raise UserError(f"PyTorch's training steps failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1]), peak


class Vllm:
    """vLLM in a process that stays for all rounds. Where it does not run, `error` tells why."""

    def __init__(self, ids, threads, bf16):
        program = Path(__file__).with_name("vllm_peer.py")
        self.log, self.error = HOME / "vllm.log", None
        with open(self.log, "wb") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen([sys.executable, str(program)], text=True, **pipes)
        dtype = "bfloat16" if bf16 else "float32"
        cache = str(HOME / "vllm")
        self.ask(model=str(MODEL), prompt=ids, streams=STREAMS, new=NEW, threads=threads, dtype=dtype, cache=cache)

    def ask(self, **line):
        """One line there and one back; None where vLLM does not run."""
        if self.error is None:
            try:
                print(json.dumps(line), file=self.process.stdin, flush=True)
            except BrokenPipeError:
                pass  # what it said last tells why
            lines = (json.loads(text) for text in self.process.stdout if text.startswith("{"))
            answer = next(lines, {"error": f"it ended; all it said is in {self.log}"})
            self.error = answer.get("error")
        return None if self.error else answer

    def close(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.wait()


# ---------------------------------------------------------------------------------------------------
# The table and the plot
# ---------------------------------------------------------------------------------------------------


def tokens_of(cell):
    return PROMPT if cell == "prefill" else int(cell.split()[1])


def table(measured, steps, ceilings):
    """Markdown: rates by program, and the engine's share of the better peer and of the machine's limit."""
    parameters, width, vocabulary = 268_098_176, 640, 262_144
    programs = list(measured)
    lines = ["| work | " + " | ".join(programs) + " | against the best peer | of the limit |"]
    lines.append("|---|" + "---:|" * (len(programs) + 2))
    for cell in ["prefill", *(f"decode {n}" for n in STREAMS)]:
        tokens = tokens_of(cell)
        medians = {p: statistics.median(round_[cell] for round_ in measured[p]) for p in programs if measured[p]}
        rates = {p: tokens / seconds for p, seconds in medians.items()}
        ours, best = rates["bon-engine"], max(rate for p, rate in rates.items() if p != "bon-engine")
        # Weights are read once; products take two operations per weight and token. A prompt needs logits once.
        logits = 1 if cell == "prefill" else tokens
        flops = 2 * (tokens * (parameters - vocabulary * width) + logits * vocabulary * width)
        least = max(2 * parameters / ceilings["read"], flops / max(ceilings["f32"], ceilings["bf16"]))
        share = least / medians["bon-engine"]
        name = f"prompt of {PROMPT} tokens" if cell == "prefill" else f"decode, {tokens} stream" + "s" * (tokens > 1)
        row = " | ".join(f"{rates[p]:.1f} tokens/s" if p in rates else "does not run here" for p in programs)
        lines.append(f"| {name} | {row} | {ours / best:.2f} x | {100 * share:.0f} % |")
    medians = {p: statistics.median(seconds) for p, (seconds, _) in steps.items()}
    row = {p: f"{medians[p]:.2f} s, {peak / 1e9:.1f} GB" for p, (_, peak) in steps.items()}
    name = f"training step, {RESPONSES} x {NEW} tokens on a prompt of {TASK}"
    share = medians["Transformers"] / medians["bon-engine"]
    lines.append(f"| {name} | " + " | ".join(row.get(p, "cannot") for p in programs) + f" | {share:.2f} x | |")
    return "\n".join(lines)


def plot(threads):
    """Writes the plot of what the engine's cost grows with, and tells its points."""
    say("the engine's cost over streams and prompts")
    decode = [(n, step) for n, (_, step) in bench_engine(PLOT_STREAMS, PROMPT, NEW, PLOT_RUNS).items()]
    prompts = [(tokens, bench_engine((1,), tokens, 1, PLOT_RUNS)[1][0]) for tokens in PLOT_PROMPTS]
    title = f"bon-engine, Gemma 3 270M in bf16, on {machine()}, {threads} threads"
    panels = [
        (f"a decode step, prompt of {PROMPT} tokens", "streams", "seconds per step", "stream"),
        ("the prompt, with the first token of 1 stream", "tokens of the prompt", "seconds", "token"),
    ]
    axes = (0, 8, 16, 32, 64), (0, 256, 512, 1024)
    panels = [(*panel, points, at) for panel, points, at in zip(panels, (decode, prompts), axes)]
    (HOME / "cost.svg").write_text(cost_plot.svg(title, panels))
    for (heading, *_, unit, points, _) in panels:
        print(f"{heading}: {cost_plot.formula(points, unit)}; " + ", ".join(f"{n}: {s:.3f} s" for n, s in points))
    say(f"the plot is {HOME / 'cost.svg'}")


def machine():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which medians are told (default: 5)")
    parser.add_argument("--plot", action="store_true", help="only the plot of the engine's cost")
    parser.add_argument("--torch-steps", choices=("bf16", "f32"), help="only PyTorch's training steps, as JSON")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    reference = (REPO / "tools" / "reference" / "requirements.txt").read_text().splitlines()
    requirements = [line for line in reference if line and not line.startswith("#")] + TOOLS
    venv_setup.enter("venv-peers", requirements, note=" (torch: up to 3 GB to download, once)")
    threads = len(os.sched_getaffinity(0))
    if args.torch_steps:
        print(json.dumps(Torch(threads).train(args.rounds, args.torch_steps == "bf16")))
        return
    if not ENGINE.exists():
        raise UserError("target/release/bon-engine is missing; cargo build --locked --release")

    HOME.mkdir(parents=True, exist_ok=True)
    if args.plot:
        plot(threads)
        return
    bench, quantize = build_llama(threads)
    gguf = write_gguf(quantize)
    _, ids = prompt_of(PROMPT)
    task, _ = prompt_of(TASK)
    (HOME / "tasks.jsonl").write_text(json.dumps({"prompt": task, "answer": "odd"}) + "\n")

    torch = Torch(threads)
    ceilings = torch.prepare()
    say(f"{machine()}, {threads} threads; Transformers and vLLM compute in {'bf16' if torch.bf16 else 'f32'}")
    vllm = Vllm(ids, threads, torch.bf16)
    measured = {"llama.cpp": [], "Transformers": [], "vLLM": [], "bon-engine": []}
    for i in range(args.rounds):
        say(f"round {i + 1} of {args.rounds}")
        ceilings = {key: max(rate, ceilings[key]) for key, rate in torch.measure().items()}
        measured["llama.cpp"].append(with_llama(bench, gguf, threads))
        measured["Transformers"].append(torch.cells(ids))
        measured["vLLM"].append(vllm.ask())
        measured["bon-engine"].append(with_engine())
    vllm.close()
    if vllm.error:
        measured["vLLM"] = []
    say("training steps")
    steps = {"Transformers": train_with_torch(args.rounds, torch.bf16)}
    steps["bon-engine"] = train_with_engine(args.rounds)
    result = table(measured, steps, ceilings)
    raw = dict(machine=machine(), threads=threads, ceilings=ceilings, seconds=measured, vllm_error=vllm.error)
    raw["step_seconds"], raw["step_peak_bytes"] = ({p: step[i] for p, step in steps.items()} for i in (0, 1))
    (HOME / "peers.json").write_text(json.dumps(raw, indent=1) + "\n")
    read, f32, bf16 = (ceilings[key] / 1e9 for key in ("read", "f32", "bf16"))
    print(f"The machine reads {read:.1f} GB/s; products reach {f32:.0f} GFLOP/s in f32, {bf16:.0f} in bf16.\n")
    print(result)
    if vllm.error:
        print(f"\nvLLM does not run here: {vllm.error}")
    say(f"all figures are in {HOME / 'peers.json'}")
    plot(threads)


if __name__ == "__main__":
    venv_setup.run_main("peers", main)
