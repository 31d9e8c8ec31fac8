#!/usr/bin/env python3
"""Write problems of MATH as tasks for the `boxed` verifier.

    python3 tools/math_tasks.py MATH                                 # the benchmark's folders train/ and test/
    python3 tools/math_tasks.py --train a.jsonl --eval b.jsonl       # or files of its layout, as MATH-500 is

Needs Python 3.9 or newer. What it reads is a folder with a JSON file for each problem, in folders by subject, or a file with a
problem in each line (.jsonl, gzipped or not). A problem has `problem` and `solution`; its answer is in `answer`, or else in the
solution's last \\boxed{...}. It writes train.jsonl and eval.jsonl. A line's `response` is the solution, which nothing but
`sft` and `bon-sft` reads; `subject` and `level` are kept.

The benchmark (Hendrycks et al., arXiv 2103.03874) is not fetched: github.com/hendrycks/math says where it is.
"""

import argparse
import gzip
import json
import re
import sys
from pathlib import Path

import venv_setup
from venv_setup import REPO, UserError


def boxed(text):
    r"""What the last \boxed{...} of a text holds, or \fbox{...}; also the one character or command of `\boxed 5`."""
    found = None
    for mark in re.finditer(r"\\(?:boxed|fbox)\s*", text):
        begin = mark.end()
        if text[begin : begin + 1] != "{":
            found = re.match(r"\\?[A-Za-z]+|.?", text[begin:]).group() or found
            continue
        depth = 0
        for at in range(begin, len(text)):
            if text[at] in "{}" and text[at - 1] != "\\":
                depth += 1 if text[at] == "{" else -1
                if depth == 0:
                    found = text[begin + 1 : at]
                    break
    return found


def convert(place, text):
    """A problem as a task."""
    try:
        problem = json.loads(text)
        prompt, solution = problem["problem"], problem["solution"]
        answer = problem.get("answer")
        if not all(isinstance(part, str) and part.strip() for part in (prompt, solution)):
            raise TypeError("problem and solution are texts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: no problem of MATH's layout ({error!r})") from None
    answer = boxed(solution) if answer is None else str(answer)
    if answer is None or not answer.strip():
        raise UserError(f"{place}: no `answer`, and the solution has no \\boxed{{...}} with one")
    task = {"prompt": prompt, "answer": answer, "response": solution}
    for key, other in (("subject", "type"), ("level", "level")):
        value = problem.get(key, problem.get(other))
        if value is not None:
            task[key] = value
    return task


def problems(path):
    """(place, JSON) of each problem of a folder or a file, in the order of names and lines."""
    if path.is_dir():
        # 2.json before 10.json.
        numbers = lambda file: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in file.with_suffix("").parts]
        for file in sorted(path.rglob("*.json"), key=numbers):
            yield str(file), file.read_text(encoding="utf-8")
        return
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            yield f"{path}: line {number}", line


def level(task):
    """5 of `Level 5` and of 5; None where it is unknown, as for MATH's `Level ?`."""
    found = re.search(r"\d+", str(task.get("level", "")))
    return int(found.group()) if found else None


def read(path, levels):
    tasks = [convert(place, text) for place, text in problems(path)]
    if not tasks:
        raise UserError(f"{path}: no problems; this is a folder of .json files, or a file with a problem in each line")
    if levels:
        tasks = [task for task in tasks if level(task) in levels]
        if not tasks:
            raise UserError(f"{path}: no problem has level {' or '.join(map(str, levels))}")
    return tasks


def part(folder, name):
    """`name` of the benchmark: a folder, or a file of lines."""
    choices = [folder / name, folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"]
    for choice in choices:
        if choice.exists():
            return choice
    raise UserError(f"{folder}: neither {', '.join(choice.name for choice in choices[:-1])} nor {choices[-1].name} is in it")


def main():
    parser = argparse.ArgumentParser(description="Write problems of MATH as tasks for the `boxed` verifier.")
    parser.add_argument("math", type=Path, nargs="?", help="the benchmark: a directory with train and test in it")
    parser.add_argument("--train", type=Path, help="problems to train on, instead of MATH/train")
    parser.add_argument("--eval", type=Path, help="problems to evaluate on, instead of MATH/test")
    parser.add_argument("--level", type=int, nargs="+", choices=range(1, 6), help="only problems of these levels")
    parser.add_argument("--out", type=Path, default=REPO / ".cache" / "math", help="directory to write (default: .cache/math)")
    args = parser.parse_args()
    if args.math is None and args.train is None and args.eval is None:
        parser.error("which problems? Give the directory of MATH, or --train and --eval")
    chosen = {"train": args.train, "eval": args.eval}
    if args.math is not None:
        chosen = {name: chosen[name] or part(args.math, folder) for name, folder in (("train", "train"), ("eval", "test"))}
    written = {name: read(path, args.level) for name, path in chosen.items() if path is not None}
    args.out.mkdir(parents=True, exist_ok=True)
    for name, tasks in written.items():
        place = args.out / f"{name}.jsonl"
        beside = place.with_name(place.name + ".partial")
        beside.write_text("".join(json.dumps(task) + "\n" for task in tasks), encoding="utf-8")
        beside.replace(place)
        print(f"math: wrote {len(tasks)} tasks to {place}")


if __name__ == "__main__":
    venv_setup.run_main("math", main)
