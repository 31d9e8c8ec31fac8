#!/usr/bin/env python3
"""What the optimizer's state costs in quality: loss curves of runs that differ in nothing else, with several seeds each.

    make moments                                       # run what examples/moments/results lacks, and write the table
    python3 tools/moments.py list                      # what there is to run, in its order, and what is done
    python3 tools/moments.py run --only 'f32|seed1'    # only runs whose names this pattern finds
    python3 tools/moments.py tables                    # write the table from the results that there are

A run trains with examples/moments/sum.toml and leaves some kB of JSON in examples/moments/results: the loss of every step, and
how many samples of held-out problems are right. The table is computed from these files. Weights are deleted. An
interrupted run goes on from its last checkpoint; a finished one is run again if its file is deleted.
"""

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from venv_setup import REPO, UserError, run_main

HOME = REPO / "examples" / "moments"
RESULTS = HOME / "results"
RUNS = REPO / "runs" / "moments"
ENGINE = REPO / "target" / "release" / "bon-engine"
DEVICE = "auto"
CONFIG = HOME / "sum.toml"
HELD_OUT = REPO / "examples" / "paper" / "sum.eval.jsonl"

# The states, the first of which the others are compared with.
STATES = {
    "f32": [],
    "8-bit moments": ["optimizer.moments=8bit", "optimizer.embedding_moments=8bit"],
    "no masters": ["optimizer.masters=false"],
    "8-bit moments, no masters": [
        "optimizer.moments=8bit",
        "optimizer.embedding_moments=8bit",
        "optimizer.masters=false",
    ],
}
SEEDS = (1, 2, 3)
SAMPLES = 8
# A curve is told in so many parts.
PARTS = 5
MARK = "<!-- What follows is written by `python3 tools/moments.py tables`. -->\n"


class Run:
    """A state with a seed."""

    def __init__(self, state, seed):
        self.state, self.seed = state, seed
        self.name = re.sub(r"[^a-z0-9]+", "-", state.lower()) + f".seed{seed}"

    @property
    def result(self):
        return RESULTS / f"{self.name}.json"


def all_runs():
    """A whole comparison with one seed first."""
    return [Run(state, seed) for seed in SEEDS for state in STATES]


def engine(*arguments):
    command = [ENGINE, *map(str, arguments), "--device", DEVICE]
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise UserError(f"bon-engine {arguments[0]} ended with status {done.returncode}; run again to go on from there")


def execute(run, extra):
    """Trains, evaluates, writes the result, and deletes the weights."""
    place = RUNS / run.name
    settings = [f"--set={setting}" for setting in (*STATES[run.state], f"train.seed={run.seed}", *extra)]
    if not (place / "final").exists():
        resume = ["--resume"] if any(place.glob("checkpoints/step-*")) else []
        engine("train", CONFIG, *settings, f"--set=train.output={place}", *resume)
        (place / "final").touch()
    steps = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    model = sorted(place.glob("checkpoints/step-*/model"))[-1]
    report = place / "report.json"
    engine(
        "eval", CONFIG, *settings, "--model", model, "--tasks", HELD_OUT, "--samples", SAMPLES, "--examples", 0, "--output", report
    )
    written = json.loads(report.read_text(encoding="utf-8"))
    told = written["provenance"]["settings"]
    kept = {
        "state": run.state,
        "settings": STATES[run.state],
        "seed": run.seed,
        "program": told["program"],
        "device": told["device"],
        "loss": [float(f"{step['loss']:.5g}") for step in steps],
        "seconds": {
            phase: round(statistics.fmean(step["seconds"][phase] for step in steps), 3)
            for phase in ("forward_backward", "optimizer")
        },
        "samples": written["problems"][0]["samples"],
        # Right samples of each problem, in the order of the task file.
        "passes": [round(problem["pass_at_n"][0] * problem["samples"]) for problem in written["problems"]],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    write(run.result, "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()) + "\n}\n")
    shutil.rmtree(place)


def write(path, text):
    """Beside its place, then renamed, so that it is whole or not there."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def parts_of(losses):
    """Means over parts of the run."""
    width = max(1, len(losses) // PARTS)
    return [statistics.fmean(losses[at : at + width]) for at in range(0, width * min(PARTS, len(losses)), width)]


def pass_at_1(result):
    return sum(result["passes"]) / (len(result["passes"]) * result["samples"])


def signed(x, digits=4):
    return f"{x:+.{digits}f}"


def document():
    """The table of what there is, and what it says."""
    found = {state: {} for state in STATES}
    for run in all_runs():
        if run.result.exists():
            found[run.state][run.seed] = json.loads(run.result.read_text(encoding="utf-8"))
    first = next(iter(STATES))
    base = {seed: parts_of(result["loss"]) for seed, result in found[first].items()}
    runs = all_runs()
    done = f"\n{sum(run.result.exists() for run in runs)} of {len(runs)} runs are done.\n"
    if not base:
        return f"\nNo run of `{first}` is done, with which the others are compared.\n" + done
    count = len(next(iter(base.values())))
    steps = len(next(iter(found[first].values()))["loss"])
    width = max(1, steps // PARTS)
    ranges = [f"{at * width + 1}-{(at + 1) * width}" for at in range(count)]
    lines = [
        "",
        "Mean loss per part of the run, over seeds; below, in how far a seed's run differs from the same seed's run with "
        f"`{first}`: mean and largest magnitude over seeds, and beside them what seeds differ in themselves, the largest "
        f"difference between two of `{first}`.",
        "",
        "| state | seeds | " + " | ".join(f"steps {steps}" for steps in ranges) + " | pass@1, held out |",
        "|---|---|" + "---|" * (count + 1),
    ]
    for state, results in found.items():
        if results:
            curves = [parts_of(result["loss"]) for result in results.values()]
            means = [f"{statistics.fmean(part):.4f}" for part in zip(*curves)]
            passes = f"{statistics.fmean(map(pass_at_1, results.values())):.3f}"
            lines.append(f"| `{state}` | {len(results)} | " + " | ".join((*means, passes)) + " |")
    noise = None
    if len(base) > 1:
        noise = [max(part) - min(part) for part in zip(*base.values())]
        shares = [pass_at_1(result) for result in found[first].values()]
        lines += [
            "",
            "| difference | seeds | " + " | ".join(f"steps {steps}" for steps in ranges) + " | pass@1, held out |",
            "|---|---|" + "---|" * (count + 1),
            f"| between seeds of `{first}` | {len(base)} | "
            + " | ".join((*(f"{part:.4f}" for part in noise), f"{max(shares) - min(shares):.3f}"))
            + " |",
        ]
    verdicts = []
    for state, results in found.items():
        seeds = sorted(base.keys() & results.keys())
        if state == first or not seeds or not noise:
            continue
        differences = [
            [own - other for own, other in zip(parts_of(results[seed]["loss"]), base[seed])] for seed in seeds
        ]
        parts = list(zip(*differences))
        cells = [f"{signed(statistics.fmean(part))}, {max(map(abs, part)):.4f}" for part in parts]
        shares = [pass_at_1(results[seed]) - pass_at_1(found[first][seed]) for seed in seeds]
        cells.append(f"{signed(statistics.fmean(shares), 3)}, {max(map(abs, shares)):.3f}")
        lines.append(f"| `{state}` from `{first}` | {len(seeds)} | " + " | ".join(cells) + " |")
        within = all(abs(statistics.fmean(part)) <= of_seeds for part, of_seeds in zip(parts, noise))
        verdicts.append(
            f"`{state}`: the mean difference of the loss is {'within' if within else 'not within'} what seeds differ in, in "
            f"{'every part' if within else 'some part'} of the run."
        )
    lines += ["", *(f"- {verdict}" for verdict in verdicts)] if verdicts else []
    return "\n".join(lines) + "\n" + done


def write_table(readme, check):
    """Replaces what follows the mark in the file, or checks that it is what the results say."""
    before, mark, _ = readme.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise UserError(f"{readme} does not hold the line {MARK.strip()}")
    wanted = before + mark + document()
    if not check:
        write(readme, wanted)
    elif readme.read_text(encoding="utf-8") != wanted:
        raise UserError(f"{readme} is not what the results say; run python3 tools/moments.py tables")


def main():
    global ENGINE, DEVICE, RESULTS, RUNS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "list", "tables"])
    parser.add_argument("--only", default="", metavar="PATTERN", help="only runs in whose names this is found")
    parser.add_argument("--engine", type=Path, default=ENGINE, help="the program [default: the release build]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are [default: examples/moments/results]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are while they last [default: runs/moments]")
    parser.add_argument("--device", default="auto", help="what computes, as the engine's --device [default: auto]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for every run")
    parser.add_argument(
        "--readme", type=Path, default=HOME / "README.md", help="tables: where it goes [default: examples/moments/README.md]"
    )
    parser.add_argument("--check", action="store_true", help="tables: fail if the file says something else")
    arguments = parser.parse_args()
    own = arguments.results == RESULTS
    ENGINE, RESULTS, RUNS = (path.resolve() for path in (arguments.engine, arguments.results, arguments.runs))
    DEVICE = arguments.device
    try:
        runs = [run for run in all_runs() if re.search(arguments.only, run.name)]
    except re.error as error:
        raise UserError(f"--only {arguments.only}: not a pattern: {error}") from None
    if not runs:
        raise UserError(f"--only {arguments.only}: no run has such a name; see python3 tools/moments.py list")
    if arguments.what == "tables":
        write_table(arguments.readme, arguments.check)
    elif arguments.what == "list":
        for run in runs:
            print(f"{'done' if run.result.exists() else '-':5} {run.name}")
    else:
        missing = [run for run in runs if not run.result.exists()]
        for i, run in enumerate(missing, 1):
            print(f"[{i}/{len(missing)}] {run.name}", file=sys.stderr, flush=True)
            execute(run, arguments.set)
            if own:
                write_table(arguments.readme, check=False)


if __name__ == "__main__":
    run_main("moments", main)
