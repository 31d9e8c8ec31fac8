#!/usr/bin/env python3
"""Compare the engine's log-probabilities with those of Transformers on a real model.

    python3 tools/reference/parity.py                          # Transformers -> .cache/parity/reference.jsonl
    python3 tools/reference/parity.py --compare engine.jsonl   # f32 engine: largest error at most 1e-3
    python3 tools/reference/parity.py --compare engine.jsonl --bf16

Every line of the reference is {"name", "prompt", "ids", "logprobs_f32", "logprobs_bf16"}; every line of the
engine is {"ids", "logprobs"}. logprobs[t] is log p(ids[t + 1] | ids[..= t]), so there is one fewer than
ids. Comparing needs only Python.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO, UserError

F32_TOLERANCE = 1e-3
# In bf16 there is no fixed tolerance: an engine that rounds less often than eager Transformers should be
# closer to f32 than it is. Twice its error leaves room for chance; the floor is f32's own noise.
BF16_FACTOR, BF16_FLOOR = 2.0, 1e-3


def read_lines(path, keys):
    lines = []
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                missing = [key for key in keys if key not in line]
            except (ValueError, TypeError):
                raise UserError(f"{path}:{number}: not a JSON object") from None
            if missing:
                raise UserError(f"{path}:{number}: lacks {missing[0]!r}")
            lines.append(line)
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


# ---------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------


def reference_logprobs(directory, dtype, sequences):
    import torch
    from transformers import AutoModelForCausalLM

    # dtype is given here and not by model.to(), which would round RoPE's frequencies as well.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    for ids in sequences:
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
        logprobs = []
        # In pieces: in f32, 600 rows of 262144 logits and their softmax take more than a gigabyte.
        for rows, targets in zip(logits[:-1].split(64), tokens[1:].split(64)):
            logprobs += rows.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()
        yield logprobs


def make_reference(args):
    if not (args.model / "config.json").exists():
        raise UserError(f"{args.model} holds no model; run python3 tools/fetch_gemma.py, or name one with --model")
    prompts = read_lines(args.prompts, ["name", "prompt"])
    venv_setup.enter_reference()

    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    sequences = [tokenizer(line["prompt"]).input_ids for line in prompts]

    lines = [
        {"name": line["name"], "prompt": line["prompt"], "ids": ids} for line, ids in zip(prompts, sequences)
    ]
    for key, dtype in (("logprobs_f32", torch.float32), ("logprobs_bf16", torch.bfloat16)):
        for line, logprobs in zip(lines, reference_logprobs(args.model, dtype, sequences)):
            line[key] = logprobs
            print(f"{key} {line['name']}: {len(line['ids'])} tokens", file=sys.stderr, flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    partial = args.out.with_name(args.out.name + ".partial")  # a half-written reference must not be found
    partial.write_text(text, encoding="utf-8")
    partial.replace(args.out)
    print(f"wrote {len(lines)} prompts, {sum(map(len, sequences))} tokens, to {args.out}")
    naive = [error for line in lines for error in differences(line["logprobs_bf16"], line["logprobs_f32"])]
    print(f"bf16 Transformers against f32: max {max(naive):.3g}, mean {mean(naive):.3g}, rms {rms(naive):.3g}")


# ---------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------


def differences(left, right):
    return [abs(a - b) for a, b in zip(left, right)]


def mean(errors):
    return sum(errors) / len(errors)


def rms(errors):
    return math.sqrt(mean([e * e for e in errors]))


def report(rows):
    """Print a line per prompt and one for all; return all errors of (the engine, naive bf16)."""
    print("absolute difference of log-probabilities from f32 Transformers")
    print(f"{'':23} {'':6} {'engine':^32}   {'bf16 Transformers':^32}")
    print(f"{'prompt':23} {'tokens':>6}" + 2 * f" {'max':>10} {'mean':>10} {'rms':>10}  ")
    engine, naive = [], []
    for name, logprobs, line in rows:
        engine.append(differences(logprobs, line["logprobs_f32"]))
        naive.append(differences(line["logprobs_bf16"], line["logprobs_f32"]))
        print_row(name, engine[-1], naive[-1])
    engine, naive = sum(engine, []), sum(naive, [])
    print_row("all", engine, naive)
    return engine, naive


def print_row(name, *columns):
    figures = [f" {max(errors):10.2e} {mean(errors):10.2e} {rms(errors):10.2e}  " for errors in columns]
    print(f"{name:23} {len(columns[0]):6}" + "".join(figures))


def compare(args):
    reference = read_lines(args.out, ["name", "ids", "logprobs_f32", "logprobs_bf16"])
    engine = {tuple(line["ids"]): line["logprobs"] for line in read_lines(args.compare, ["ids", "logprobs"])}
    rows = []
    for line in reference:
        logprobs = engine.get(tuple(line["ids"]))
        if logprobs is None:
            raise UserError(f"{args.compare} has no line with the ids of prompt {line['name']!r}")
        if len(logprobs) != len(line["ids"]) - 1:
            raise UserError(
                f"prompt {line['name']!r} has {len(line['ids'])} ids, so {len(line['ids']) - 1} log-probabilities "
                f"are expected, not {len(logprobs)}"
            )
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in logprobs):
            raise UserError(f"prompt {line['name']!r} has a log-probability that is not a finite number")
        rows.append((line["name"], logprobs, line))

    errors, naive = report(rows)
    if args.bf16:
        found, limit, what = rms(errors), BF16_FACTOR * rms(naive) + BF16_FLOOR, "rms error"
    else:
        found, limit, what = max(errors), args.tolerance, "largest error"
    verdict = "passed" if found <= limit else "FAILED"
    print(f"parity {verdict}: {what} {found:.3g}, limit {limit:.3g}")
    return found <= limit


def main():
    parser = argparse.ArgumentParser(description="Compare log-probabilities with Transformers on a real model.")
    parser.add_argument(
        "--model",
        type=Path,
        default=REPO / ".cache" / "gemma-3-270m",
        help="Hugging Face directory (default: .cache/gemma-3-270m)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        default=Path(__file__).resolve().parent / "parity_prompts.jsonl",
        help="JSON lines with name and prompt (default: parity_prompts.jsonl beside this script)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REPO / ".cache" / "parity" / "reference.jsonl",
        help="the reference, to write or to compare with (default: .cache/parity/reference.jsonl)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default: 1)")
    parser.add_argument("--compare", type=Path, metavar="ENGINE", help="compare this file with the reference")
    parser.add_argument("--bf16", action="store_true", help="judge a bf16 engine, by the error of bf16 Transformers")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=F32_TOLERANCE,
        help=f"largest error allowed to an f32 engine (default: {F32_TOLERANCE})",
    )
    args = parser.parse_args()
    if args.compare is None:
        make_reference(args)
    elif not args.out.exists():
        raise UserError(f"{args.out} does not exist; make it with python3 tools/reference/parity.py")
    elif not compare(args):
        sys.exit(1)


if __name__ == "__main__":
    venv_setup.run_main("parity", main)
