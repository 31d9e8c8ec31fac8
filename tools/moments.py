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

import json
import re
import shutil
import statistics

from experiment import Experiment, compact, flags, parted, passes, write
from venv_setup import REPO, run_main

MOMENTS = Experiment("moments")
CONFIG = MOMENTS.home / "sum.toml"
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
        return MOMENTS.results / f"{self.name}.json"


def all_runs():
    """A whole comparison with one seed first."""
    return [Run(state, seed) for seed in SEEDS for state in STATES]


def execute(run, extra):
    """Trains, evaluates, writes the result, and deletes the weights."""
    place = MOMENTS.runs / run.name
    settings = flags([*STATES[run.state], f"train.seed={run.seed}", *extra])
    model, steps = MOMENTS.trained(CONFIG, place, settings)
    report = place / "report.json"
    drawn = ["--tasks", HELD_OUT, "--samples", SAMPLES, "--examples", 0]
    MOMENTS.run("eval", CONFIG, *settings, "--model", model, *drawn, "--output", report)
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
        "passes": passes(written),
    }
    write(run.result, compact(kept))
    shutil.rmtree(place)


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
    before, mark, _ = parted(readme, MARK)
    MOMENTS.put({readme: before + mark + document()}, check)


def main():
    MOMENTS.main(__doc__, all_runs, execute, write_table)


if __name__ == "__main__":
    run_main("moments", main)
