#!/usr/bin/env python3
"""The paper's comparison in the small: its methods on one model, with one budget of samples and several seeds.

    make paper                                      # run what examples/paper/results lacks, and write the tables
    python3 tools/paper.py list                     # what there is to run, in its order, and what is done
    python3 tools/paper.py run --only 'sum.*seed1'  # only runs whose names this pattern finds
    python3 tools/paper.py tables                   # write examples/paper/README.md from the results that there are
    python3 tools/paper.py tasks                    # write the tasks anew

A run trains with examples/paper/TASK.toml and its method's settings, evaluates the trained model on held-out problems,
and leaves some kB of JSON in examples/paper/results: how many of each problem's samples are right, and means of the
training's metrics. Whatever the tables say is computed from these files. Weights are deleted. An interrupted run goes on
from its last checkpoint; a finished one is run again if its file is deleted.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from venv_setup import REPO, UserError, run_main

HOME = REPO / "examples" / "paper"
RESULTS = HOME / "results"
README = HOME / "README.md"
TABLES = "<!-- What follows is written by `python3 tools/paper.py tables`. -->\n"
RUNS = REPO / "runs" / "paper"
ENGINE = REPO / "target" / "release" / "bon-engine"
DEVICE = "auto"

TASKS = {
    "difference": "a two-digit number minus a smaller one",
    "sum": "a two-digit plus a one-digit number",
}
# N of the objectives and of the headline figures, unless a method says otherwise.
N = 8
# What the tables tell: N of evaluation.
AT = (1, 2, 4, 8, 16, 32)
BASE = "base"
BOOTSTRAPS = 2000


class Method:
    """One way of training: its settings, and how many seeds it is run with."""

    def __init__(self, name, kind, n=N, seeds=3, **settings):
        self.name, self.n, self.seeds = name, n, seeds
        self.set = [f"objective.kind={kind}", *([f"objective.n={n}"] if n else [])]
        self.set += [f"objective.{key}={value}" for key, value in settings.items()]


METHODS = [
    Method("sft", "sft", n=None),
    Method("rl", "rl", n=None),
    Method("bon-sft", "bon-sft"),
    Method("bon-rl-s", "bon-rl-s"),
    Method("bon-rl-s, variational", "bon-rl-s", estimator="variational"),
    Method("bon-rlb", "bon-rlb"),
    # Under such a verifier this is `bon-rl-s`, coefficient by coefficient, so one seed shows it.
    Method("bon-rlb-p", "bon-rlb-p", seeds=1),
    Method("grpo", "grpo", n=None, seeds=1),
    Method("max-rl", "max-rl", n=None, seeds=1),
    Method("pkpo", "pkpo", seeds=1),
    *(Method(f"bon-rl-s, N = {n}", "bon-rl-s", n=n, seeds=1) for n in (2, 4, 16)),
]


class Run:
    """A method on a task with a seed, or the model as it was before."""

    def __init__(self, task, method, seed):
        self.task, self.method, self.seed = task, method, seed
        name = BASE if method is None else method.name
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self.name = f"{task}.{slug}" + ("" if method is None else f".seed{seed}")
        self.title = name

    @property
    def result(self):
        return RESULTS / f"{self.name}.json"


def all_runs():
    """Everything, the most telling first: each method's first seed before any method's second."""
    runs = [Run(task, None, 0) for task in TASKS]
    for seed in range(1, 1 + max(method.seeds for method in METHODS)):
        for task in TASKS:
            runs += [Run(task, method, seed) for method in METHODS if seed <= method.seeds]
    return runs


def engine(*arguments):
    command = [ENGINE, *map(str, arguments), "--device", DEVICE]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise UserError(f"bon-engine {arguments[0]} ended with status {done.returncode}; run again to go on from there")


def execute(run, settings):
    """Trains, evaluates, writes the result, and deletes the weights."""
    config = HOME / f"{run.task}.toml"
    place = RUNS / run.name
    chosen = [f"--set={setting}" for setting in settings]
    if run.method is None:
        place.mkdir(parents=True, exist_ok=True)
        model, metrics = [], []
    else:
        training = [f"--set={setting}" for setting in run.method.set]
        training += [f"--set=train.seed={run.seed}", f"--set=train.output={place}", *chosen]
        if not (place / "final").exists():
            resume = ["--resume"] if any(place.glob("checkpoints/step-*")) else []
            engine("train", config, *training, *resume)
            (place / "final").touch()
        model = ["--model", sorted(place.glob("checkpoints/step-*/model"))[-1]]
        metrics = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    report = place / "report.json"
    engine("eval", config, *model, *chosen, "--tasks", HOME / f"{run.task}.eval.jsonl", "--output", report)
    result = summary(run, json.loads(report.read_text()), metrics)
    RESULTS.mkdir(parents=True, exist_ok=True)
    write(run.result, compact(result))
    shutil.rmtree(place)


def summary(run, report, metrics):
    """What is kept of a run."""
    problems, figures = report["problems"], report["figures"]
    settings = dict(report["provenance"]["settings"])
    kept = {
        "task": run.task,
        "method": run.title,
        "settings": [] if run.method is None else run.method.set,
        "seed": run.seed,
        "program": settings["program"],
        "device": settings["device"],
        "samples": problems[0]["samples"],
        # Right samples of each problem, in the order of the task file.
        "passes": [round(problem["pass_at_n"][0] * problem["samples"]) for problem in problems],
    }
    for key in ("answer_entropy", "distinct_answers", "unanswered"):
        kept[key] = round(figures[key]["mean"], 4)
    # Means over a tenth of the steps each.
    width = max(1, len(metrics) // 10)
    kept["training"] = [
        {
            "step": part[-1]["step"],
            **{
                key: round(sum(step[key] for step in part) / len(part), 4)
                for key in ("reward_mean", "pass_at_1", "pass_at_n", "answer_entropy", "token_entropy", "grad_norm")
            },
            "logprob_gap_max": max(step["logprob_gap_max"] for step in part),
        }
        for part in (metrics[at : at + width] for at in range(0, len(metrics), width))
    ]
    return kept


def compact(result):
    """JSON with a line per key and per tenth of the training."""
    training = ",\n".join("  " + json.dumps(part) for part in result["training"])
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "training"]
    return "{\n" + ",\n".join(lines) + ',\n "training": [\n' + training + "\n ]\n}\n"


def pass_at(n, samples, right):
    """1 - C(M - c, n) / C(M, n), unbiased (Chen et al., arXiv 2107.03374)."""
    fail = 1.0
    for i in range(n):
        fail *= (samples - right - i) / (samples - i)
        if fail <= 0:
            return 1.0
    return 1 - fail


class Results:
    """The results that there are, and what is computed from them."""

    def __init__(self, directory):
        self.runs = {}
        for path in sorted(directory.glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            key = result["task"], result["method"]
            self.runs.setdefault(key, []).append(result)

    def of(self, task, method):
        return self.runs.get((task, method), [])

    def per_problem(self, task, method, n):
        """pass@n of each problem: one list per seed."""
        found = self.of(task, method)
        return [[pass_at(n, run["samples"], right) for right in run["passes"]] for run in found]

    def mean(self, task, method, key):
        found = self.of(task, method)
        return sum(run[key] for run in found) / len(found)


def average(values):
    return sum(values) / len(values)


def estimate(*terms):
    """The sum of sign x mean over `terms` (sign, lists per seed), and its 95 % interval by a bootstrap over problems,
    which all terms share, and within each term over seeds."""
    rng = random.Random(1)
    size = len(terms[0][1][0])
    drawn = []
    for _ in range(BOOTSTRAPS):
        problems = [int(rng.random() * size) for _ in range(size)]
        total = 0.0
        for sign, seeds in terms:
            chosen = [seeds[int(rng.random() * len(seeds))] for _ in seeds]
            total += sign * average([average([run[i] for i in problems]) for run in chosen])
        drawn.append(total)
    drawn.sort()
    mean = sum(sign * average([average(run) for run in seeds]) for sign, seeds in terms)
    return mean, drawn[round(0.025 * (BOOTSTRAPS - 1))], drawn[round(0.975 * (BOOTSTRAPS - 1))]


def row(*cells):
    return "| " + " | ".join(cells) + " |\n"


def head(*titles):
    return row(*titles) + "|" + "---|" * len(titles) + "\n"


def plain(figures):
    mean, low, high = figures
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def signed(figures):
    mean, low, high = figures
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def verdict(figures):
    _, low, high = figures
    return "holds" if low > 0 else "the opposite holds" if high < 0 else "undecided"


def methods_table(results, task):
    text = head("method", "seeds", "pass@1", f"pass@{N}", "pass@32", "pass@32 against `rl`", "distinct answers in 32")
    for name in [BASE, *(method.name for method in METHODS)]:
        seeds = results.of(task, name)
        if not seeds:
            continue
        against = ""
        if name != "rl" and results.of(task, "rl"):
            terms = [(1, results.per_problem(task, name, 32)), (-1, results.per_problem(task, "rl", 32))]
            against = signed(estimate(*terms))
        figures = [plain(estimate((1, results.per_problem(task, name, n)))) for n in (1, N, 32)]
        count = "" if name == BASE else str(len(seeds))
        text += row(f"`{name}`", count, *figures, against, f"{results.mean(task, name, 'distinct_answers'):.1f}")
    return text


def matrix(results, task):
    """N of training against N of evaluation."""
    rows = [("1 (`rl`)", "rl"), ("2", "bon-rl-s, N = 2"), ("4", "bon-rl-s, N = 4"), ("8", "bon-rl-s"), ("16", "bon-rl-s, N = 16")]
    rows = [(label, name) for label, name in rows if results.of(task, name)]
    if len(rows) < 2:
        return ""
    means = {name: [average([average(run) for run in results.per_problem(task, name, n)]) for n in AT] for _, name in rows}
    text = head("N of training", *(f"pass@{n}" for n in AT))
    for label, name in rows:
        best = [means[name][i] == max(all_[i] for all_ in means.values()) for i in range(len(AT))]
        text += row(label, *(f"**{x:.3f}**" if b else f"{x:.3f}" for x, b in zip(means[name], best)))
    return text


CLAIMS = [
    # What the paper says, and the difference that is above 0 if it is so: (better, worse, n).
    ("RL for one sample gains pass@1", "rl", BASE, 1),
    ("RL for one sample loses pass@32", BASE, "rl", 32),
    ("SFT loses pass@32", BASE, "sft", 32),
    ("BoN-RL gains pass@8 over RL", "bon-rl-s", "rl", N),
    ("BoN-RL gains pass@32 over RL", "bon-rl-s", "rl", 32),
    ("BoN-RLB gains pass@32 over RL", "bon-rlb", "rl", 32),
    ("BoN-RLB(P) gains pass@32 over RL", "bon-rlb-p", "rl", 32),
    ("BoN-SFT gains pass@32 over SFT", "bon-sft", "sft", 32),
    ("BoN-RL gains pass@32 over BoN-SFT", "bon-rl-s", "bon-sft", 32),
    ("Ours: the exact estimator gains pass@8 over the variational one", "bon-rl-s", "bon-rl-s, variational", N),
]


def claims_table(results, task):
    text = ""
    for claim, better, worse, n in CLAIMS:
        if results.of(task, better) and results.of(task, worse):
            found = estimate((1, results.per_problem(task, better, n)), (-1, results.per_problem(task, worse, n)))
            text += row(claim, signed(found), verdict(found))
    return text and "\n" + head("claim", "difference", "here") + text


def tables(directory):
    results = Results(directory)
    text = TABLES
    for task, words in TASKS.items():
        if not results.of(task, BASE):
            continue
        problems, samples = len(results.of(task, BASE)[0]["passes"]), results.of(task, BASE)[0]["samples"]
        text += f"\n## {task}: {words}\n\n"
        text += f"{problems} held-out problems, {samples} samples of each.\n\n"
        text += methods_table(results, task)
        text += claims_table(results, task)
        if found := matrix(results, task):
            text += "\nTrained for N, evaluated at N; the best of each column is bold:\n\n" + found
    done, wanted = sum(run.result.exists() for run in all_runs()), len(all_runs())
    return text + f"\n{done} of {wanted} runs are done.\n"


def write_tables(readme, check):
    """Replaces what follows the mark in the file, or checks that it is what the results say."""
    old = readme.read_text(encoding="utf-8")
    before, mark, _ = old.partition(TABLES)
    if not mark:
        raise UserError(f"{readme} does not hold the line {TABLES.strip()}")
    new = before + tables(RESULTS)
    if check and new != old:
        raise UserError(f"{readme} is not what the results say; run python3 tools/paper.py tables")
    write(readme, new)


def write(path, text):
    """Beside its place, then renamed, so that it is whole or not there."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


HELD_OUT, MOST_TRAINED = 200, 1500


def write_tasks():
    """In a fixed shuffle; the first are held out. What a configuration's prefix shows is not asked for."""
    everything = {
        "sum": [(f"{a} + {b} =", a + b) for a in range(11, 100) for b in range(2, 10)],
        "difference": [(f"{a} - {b} =", a - b) for a in range(21, 100) for b in range(11, a - 9)],
    }
    for task, problems in everything.items():
        config = (HOME / f"{task}.toml").read_text(encoding="utf-8")
        problems = [problem for problem in problems if f"\n{problem[0]} " not in config]
        random.Random(1).shuffle(problems)
        parts = {"eval": problems[:HELD_OUT], "train": problems[HELD_OUT : HELD_OUT + MOST_TRAINED]}
        for part, chosen in parts.items():
            # The expert's response is what few-shot examples look like: a blank, the answer, the end of the line.
            lines = (
                json.dumps({"prompt": prompt, "answer": str(answer), "response": f" {answer}\n"}) + "\n"
                for prompt, answer in chosen
            )
            write(HOME / f"{task}.{part}.jsonl", "".join(lines))


def main():
    global ENGINE, DEVICE, RESULTS, RUNS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "list", "tables", "tasks"])
    parser.add_argument("--only", default="", metavar="PATTERN", help="only runs in whose names this is found")
    parser.add_argument("--engine", type=Path, default=ENGINE, help="the program [default: the release build]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are [default: examples/paper/results]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are while they last [default: runs/paper]")
    parser.add_argument("--device", default="auto", help="what computes, as the engine's --device [default: auto]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for every run")
    parser.add_argument("--readme", type=Path, default=README, help="tables: where they go [default: examples/paper/README.md]")
    parser.add_argument("--check", action="store_true", help="tables: fail if the file says something else")
    arguments = parser.parse_args()
    ENGINE, RESULTS, RUNS = (path.resolve() for path in (arguments.engine, arguments.results, arguments.runs))
    DEVICE = arguments.device
    try:
        runs = [run for run in all_runs() if re.search(arguments.only, run.name)]
    except re.error as error:
        raise UserError(f"--only {arguments.only}: not a pattern: {error}") from None
    if not runs:
        raise UserError(f"--only {arguments.only}: no run has such a name; see python3 tools/paper.py list")
    if arguments.what == "tasks":
        write_tasks()
    elif arguments.what == "tables":
        write_tables(arguments.readme, arguments.check)
    elif arguments.what == "list":
        for run in runs:
            print(f"{'done' if run.result.exists() else '-':5} {run.name}")
    else:
        missing = [run for run in runs if not run.result.exists()]
        for i, run in enumerate(missing, 1):
            print(f"[{i}/{len(missing)}] {run.name}", file=sys.stderr, flush=True)
            execute(run, arguments.set)
            if RESULTS == README.parent / "results":
                write_tables(README, check=False)


if __name__ == "__main__":
    run_main("paper", main)
