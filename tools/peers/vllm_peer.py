#!/usr/bin/env python3
"""Time vLLM at the work of peers.py on this machine's CPU: a program of its own, because it pins an older PyTorch.

It reads one JSON line of settings and then does the work once for each further line, answering each with one JSON line
of seconds per piece of work. The first answer is about vLLM itself; `{"error": ...}` stands for whatever went wrong.

All that vLLM needs here is in vllm_requirements.txt, installed without dependencies: the wheel asks for a build of
PyTorch that is not among Python's packages, and for much that only its server needs. PyPI's build of PyTorch loads
CUDA's libraries even where there is no GPU: they are those of .cache/venv-peers, which saves 3 GB.

Decoding is what N streams of NEW tokens take more than N of one token, both on a prompt that is in the prefix cache;
the prompt is one that was never seen, and its first token. Tokens are drawn from the whole softmax; log-probs are not
asked for. The model goes through torch.compile, which takes a C++ compiler and, the first time, two minutes.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO, UserError

REQUIREMENTS = Path(__file__).with_name("vllm_requirements.txt")


def load(settings):
    os.environ.update(
        OMP_NUM_THREADS=str(settings["threads"]), VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0",
        HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="WARNING",
        VLLM_CACHE_ROOT=settings["cache"], TORCHINDUCTOR_CACHE_DIR=settings["cache"] + "/inductor",
    )  # fmt: skip
    from vllm import LLM

    # Of a cached prompt, less than a block and the last token are computed for each stream: all of them in one step.
    new, prompt, most = settings["new"], len(settings["prompt"]), max(settings["streams"])
    return LLM(
        model=settings["model"], dtype=settings["dtype"], seed=1, block_size=32,
        max_model_len=prompt + new, max_num_seqs=most, max_num_batched_tokens=max(prompt, most * 32),
        enable_prefix_caching=True, skip_tokenizer_init=True,
    )  # fmt: skip


def work(llm, settings):
    from vllm import SamplingParams

    def seconds(ids, streams, new):
        params = SamplingParams(n=streams, max_tokens=new, temperature=1.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0].outputs
        taken = time.perf_counter() - start
        if [len(out.token_ids) for out in outputs] != [new] * streams:
            raise UserError("vLLM did not sample as many tokens as it was asked for")
        return taken

    prompt, new = settings["prompt"], settings["new"]
    unseen = [prompt[0], *(random.randrange(3, 200_000) for _ in prompt[1:])]
    cells = {"prefill": seconds(unseen, 1, 1)}
    seconds(prompt, 1, 1)  # into the prefix cache
    for streams in settings["streams"]:
        first = seconds(prompt, streams, 1)
        cells[f"decode {streams}"] = (seconds(prompt, streams, new) - first) / (new - 1)
    return cells


def answer(what):
    print(json.dumps(what), flush=True)


def serve():
    if sys.version_info < (3, 11):
        raise UserError("it needs Python 3.11")
    lines = REQUIREMENTS.read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    # For the process that enter() makes of this one, and for those that vLLM starts.
    cache = REPO / ".cache"
    cuda = [str(path) for venv in ("venv-vllm", "venv-peers") for path in cache.glob(f"{venv}/lib/*/*/nvidia/*/lib")]
    os.environ["LD_LIBRARY_PATH"] = ":".join(cuda)
    venv_setup.enter("venv-vllm", requirements, ["--no-deps"], " (vLLM and its torch: 1 GB to download, once)")
    settings = json.loads(sys.stdin.readline())
    start = time.perf_counter()
    llm = load(settings)
    loading = time.perf_counter() - start
    work(llm, {**settings, "new": 2})  # warms up
    answer({"loading": loading})
    for _ in sys.stdin:
        answer(work(llm, settings))


def main():
    try:
        serve()
    except Exception as error:
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        answer({"error": last if isinstance(error, UserError) else f"{type(error).__name__}: {last}"})
        raise


if __name__ == "__main__":
    venv_setup.run_main("vllm_peer", main)
