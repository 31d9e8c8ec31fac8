#!/usr/bin/env python3
"""The paper's comparison in the small: its methods on one model, with one budget of samples and several seeds.

    make paper                                      # run what examples/paper/results lacks, and write the tables
    python3 tools/paper.py list                     # what there is to run, in its order, and what is done
    python3 tools/paper.py run --only 'sum.*seed1'  # only runs whose names this pattern finds
    python3 tools/paper.py tables                   # write tables and plots from the results that there are
    python3 tools/paper.py tasks                    # write the tasks anew

A run trains with examples/paper/TASK.toml and its method's settings, evaluates the trained model on held-out problems,
and leaves some kB of JSON in examples/paper/results: how many of each problem's samples are right, what the learned
verifier chooses among them, and means of the training's metrics. Whatever the tables say is computed from these files
(tools/paper_tables.py). Weights are deleted. An interrupted run goes on from its last checkpoint; a finished one is run
again if its file is deleted.

TASK.verifier is a reward model, made first: examples/paper/TASK.verifier.toml on samples of the model as it was. It stays
in runs/paper while runs of its task are missing, is deleted after the last, and made again, to the same bits, if another is
wanted.
"""

import hashlib
import json
import random
import re
import shutil
import sys

from experiment import Experiment, compact, flags, parted, passes, write
from venv_setup import REPO, UserError, run_main

import paper_tables

PAPER = Experiment("paper")

TASKS = {
    "difference": "a two-digit number minus a smaller one",
    "sum": "a two-digit plus a one-digit number",
}
# N of the objectives and of the headline figures, unless a method says otherwise.
N = 8
BASE, VERIFIER = "base", "verifier"
# What is right, where the reward model is the verifier.
ENVIRONMENT = 'environment={kind="numeric", pick="first"}'
# Of the model as it was, each problem's samples that the reward model learns from.
SCORED_SAMPLES = 16
MOST_WRONG = 7
# What the reward model is taught before.
TAUGHT = ['objective={kind="sft"}', "generate.prompts_per_step=32", "train.steps=120", "optimizer.lr=1e-5", "train.seed=1"]
# Of the runs that are evaluated at several; all other figures are at 1.
TEMPERATURES = (0.4, 0.7, 1.0, 1.3)
# What is kept problem by problem of what the verifier chooses, so that differences have intervals.
CHOSEN_AT = (N, 32)


class Method:
    """One way of training: its settings, how many seeds it is run with, whether the reward model takes part, and whether it is
    evaluated at several temperatures."""

    def __init__(self, name, kind, n=N, seeds=3, learned=False, grid=False, also=None, **settings):
        self.name, self.n, self.seeds, self.learned, self.grid = name, n, seeds, learned, grid
        self.set = [f"objective.kind={kind}", *([f"objective.n={n}"] if n else [])]
        self.set += [f"objective.{key}={value}" for key, value in settings.items()]
        self.set += [f"{key}={value}" for key, value in (also or {}).items()]


# A later stage is run when all seeds of the ones before it are done.
STAGES = [
    [
        Method("rl", "rl", n=None, grid=True),
        Method("bon-rl-s", "bon-rl-s", grid=True),
        Method("bon-sft", "bon-sft"),
        Method("bon-rlb", "bon-rlb"),
    ],
    [
        Method("bon-rl", "bon-rl", learned=True, selector="verifier", reward="environment"),
        Method("bon-rl-v", "bon-rl-v", learned=True),
    ],
    [
        Method("max-rl", "max-rl", n=None, seeds=1),
        Method("pkpo", "pkpo", seeds=1),
        Method("grpo", "grpo", n=None, seeds=1),
        *(Method(f"bon-rl-s, N = {n}", "bon-rl-s", n=n, seeds=1) for n in (2, 4, 16)),
    ],
    [
        Method("sft", "sft", n=None),
        Method("bon-rl-s, variational", "bon-rl-s", estimator="variational"),
        # Where verifier and environment are the same this is `bon-rl-s`, coefficient by coefficient, so one seed shows it.
        Method("bon-rlb-p", "bon-rlb-p", seeds=1),
    ],
    [
        Method("rl, KL = 0.1", "rl", n=None, seeds=1, also={"train.kl_coefficient": 0.1}),
        Method("bon-rl-s, KL = 0.1", "bon-rl-s", seeds=1, also={"train.kl_coefficient": 0.1}),
        Method("bon-rl-v, KL = 0.1", "bon-rl-v", seeds=1, learned=True, also={"train.kl_coefficient": 0.1}),
        Method("bon-rl-s, M = 8", "bon-rl-s", seeds=1, also={"generate.samples": 8, "generate.prompts_per_step": 16}),
        Method("bon-rl-s, M = 32", "bon-rl-s", seeds=1, also={"generate.samples": 32, "generate.prompts_per_step": 4}),
        Method("bon-rlb, penalize", "bon-rlb", seeds=1, negative_sign="penalize"),
        Method("bon-rlb, clip = 2", "bon-rlb", seeds=1, weight_clip=2.0),
        Method("bon-rlb, clip = inf", "bon-rlb", seeds=1, weight_clip="inf"),
    ],
]
# What the project's README tells of.
HEADLINE = ["rl", "bon-sft", "bon-rl-s", "bon-rlb", "bon-rl", "bon-rl-v"]
METHODS = [method for stage in STAGES for method in stage]


class Run:
    """A method on a task with a seed; the model as it was, `base`; or the task's reward model."""

    def __init__(self, task, method, seed=0, name=None):
        self.task, self.method, self.seed = task, method, seed
        self.title = name or method.name
        slug = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        self.name = f"{task}.{slug}" + (f".seed{seed}" if method else "")

    @property
    def result(self):
        return PAPER.results / f"{self.name}.json"


def all_runs():
    """Everything, the most telling first."""
    runs = []
    for task in TASKS:
        runs += [Run(task, None, name=name) for name in (VERIFIER, BASE)]
        for stage in STAGES:
            for seed in range(1, 1 + max(method.seeds for method in stage)):
                runs += [Run(task, method, seed) for method in stage if seed <= method.seeds]
    return runs


def execute(run, extra):
    """Trains, evaluates, writes the result, and deletes the weights."""
    verifier, verified = reward_model(run.task, extra)
    if run.title == VERIFIER:
        return
    judged = flags([f'verifier={{kind="model", path="{verifier}"}}', ENVIRONMENT])
    config = PAPER.home / f"{run.task}.toml"
    place = PAPER.runs / run.name
    place.mkdir(parents=True, exist_ok=True)
    model, metrics = [], []
    if run.method:
        settings = flags(run.method.set) + (judged if run.method.learned else [])
        found, metrics = PAPER.trained(config, place, [*settings, f"--set=train.seed={run.seed}", *flags(extra)])
        model = ["--model", found]
    report = place / "report.json"
    grid = ["--temperatures", ",".join(map(str, TEMPERATURES))] if run.method is None or run.method.grid else []
    tasks = ["--tasks", PAPER.home / f"{run.task}.eval.jsonl"]
    PAPER.run("eval", config, *model, *judged, *flags(extra), *tasks, "--examples", "0", *grid, "--output", report)
    write(run.result, compact(summary(run, json.loads(report.read_text()), metrics, verified["weights"])))
    shutil.rmtree(place)


def reward_model(task, extra):
    """The task's reward model and its result; made if it is not there."""
    place = PAPER.runs / f"{task}.{VERIFIER}"
    model, result = place / "model", PAPER.results / f"{task}.{VERIFIER}.json"
    if model.exists() and result.exists():
        return model, json.loads(result.read_text())
    place.mkdir(parents=True, exist_ok=True)
    tasks, part, samples, scored, checked = (
        place / f"{name}.jsonl" for name in ("tasks", "taught", "samples", "scored", "checked")
    )
    problems = verifier_problems(task)
    own = len(problems) // 10
    write(tasks, as_lines(problems))
    write(part, as_lines(problems[own:]))
    if not samples.exists():
        drawn = ["--tasks", tasks, "--samples", SCORED_SAMPLES, "--save-samples", samples]
        PAPER.run("eval", PAPER.home / f"{task}.toml", *flags(extra), *drawn, "--output", place / "samples.json")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    write(checked, "".join(json.dumps(line) + "\n" for line in lines[:own]))
    write(scored, "".join(json.dumps(distinct(line)) + "\n" for line in lines[own:]))
    # First the right answers, then which responses are right.
    taught = [*flags(TAUGHT), f"--set=data.tasks={part}", *flags(extra)]
    taught, _ = PAPER.trained(PAPER.home / f"{task}.toml", place / "taught", taught)
    config = PAPER.home / f"{task}.{VERIFIER}.toml"
    settings = [
        f"--set=data.tasks={scored}",
        f"--set=data.eval_tasks={checked}",
        *flags(extra),
        f"--set=model.path={taught}",
    ]
    found, metrics = PAPER.trained(config, place / "trained", settings)
    kept = verifier_summary(task, scored, place / "trained", found, metrics)
    if result.exists() and (before := json.loads(result.read_text()))["weights"] != kept["weights"]:
        raise UserError(
            f"the reward model made here ({kept['weights']}) is not that of {result} ({before['weights']}): another program or "
            f"device made it. To begin anew with this one, delete the results of task {task}"
        )
    write(result, compact(kept))
    shutil.rmtree(model, ignore_errors=True)
    found.replace(model)
    shutil.rmtree(place / "taught")
    shutil.rmtree(place / "trained")
    return model, kept


def forget_reward_models():
    """Deletes those of tasks that nothing is missing of."""
    for task in TASKS:
        place = PAPER.runs / f"{task}.{VERIFIER}"
        if place.exists() and all(run.result.exists() for run in all_runs() if run.task == task):
            shutil.rmtree(place)
            print(
                f"{place.relative_to(PAPER.runs.parent)} is deleted, a reward model: "
                f"{PAPER.results.name}/{place.name}.json has its figures",
                file=sys.stderr,
            )


def distinct(problem):
    """A problem with the right one of its samples, or the right answer if none is, and the first wrong ones that differ: what a
    selector has to tell apart, in shares that it can learn from."""
    texts = {}
    for response in problem["responses"]:
        texts.setdefault(response["text"].strip(), response)
    right = [response for response in texts.values() if response["score"] == 1]
    wrong = [response for response in texts.values() if response["score"] != 1]
    answer = {"text": problem["response"].rstrip("\n"), "score": 1.0}
    return {**problem, "responses": (right or [answer])[:1] + wrong[:MOST_WRONG]}


CHECKED = ("tasks", "samples", "n", "pass_at_1", "pass_at_n", "best_of_n", "auc", "pair_accuracy")


def rounded(value):
    return round(value, 4) if isinstance(value, float) else value


def verifier_summary(task, scored, run, model, metrics):
    """What is kept of a reward model, with what it says of samples of problems that it was not trained on."""
    checked = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    config = json.loads((model / "config.json").read_text())
    lines = [json.loads(line)["responses"] for line in scored.read_text().splitlines()]
    return {
        "task": task,
        "method": VERIFIER,
        "config": f"examples/paper/{task}.{VERIFIER}.toml",
        "architecture": config["architectures"][0],
        "weights": weights_hash(model),
        "problems": len(lines),
        "responses": sum(map(len, lines)),
        "right": sum(response["score"] == 1 for responses in lines for response in responses),
        "checked": {key: rounded(checked.get(key)) for key in CHECKED},
        # Means over a tenth of the steps each, of what was said of responses before they were learnt from.
        "training": tenths(metrics, lambda step: step["verifier"], ("accuracy", "auc", "pair_accuracy"), ("loss",)),
    }


def weights_hash(model):
    """The first half of SHA-256 of a model's weights."""
    found = hashlib.sha256()
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()[:32]


def tenths(metrics, of, keys, of_step=(), most=()):
    """Means, and largest values, over a tenth of the steps each."""
    width = max(1, len(metrics) // 10)
    return [
        {
            "step": part[-1]["step"],
            **{key: mean_of([of(step)[key] for step in part]) for key in keys},
            **{key: mean_of([step[key] for step in part]) for key in of_step},
            **{key: max(step[key] for step in part) for key in most},
        }
        for part in (metrics[at : at + width] for at in range(0, len(metrics), width))
    ]


def mean_of(values):
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 4) if known else None


def summary(run, written, metrics, verifier):
    """What is kept of a run: figures at temperature 1 and, of a grid, at each."""
    reports = {
        float(report["provenance"]["settings"]["generate.temperature"]): report
        for report in written.get("reports", [written])
    }
    report = reports[1.0]
    settings, figures = report["provenance"]["settings"], report["figures"]
    kept = {
        "task": run.task,
        "method": run.title,
        "settings": run.method.set if run.method else [],
        "seed": run.seed,
        "program": settings["program"],
        "device": settings["device"],
        "samples": report["problems"][0]["samples"],
        "passes": passes(report),
    }
    for key in ("answer_entropy", "distinct_answers", "unanswered"):
        kept[key] = round(figures[key]["mean"], 4)
    kept["verifier"] = {"weights": verifier, **calibration(report)}
    # Whether what the verifier chooses among so many is right, and by problem.
    kept["best_of_n"] = {n: round(chosen["mean"], 4) for n, chosen in zip(report["ns"], figures["best_of_n"])}
    kept["chosen"] = {n: by_problem(report, "best_of_n", n) for n in CHOSEN_AT if n in report["ns"]}
    if len(reports) > 1:
        kept["temperatures"] = [at_temperature(temperature, report) for temperature, report in reports.items()]
        kept["best_temperatures"] = [
            {
                "n": best["n"],
                **{
                    key: {"temperature": best[key]["temperature"], "share": round(best[key]["share"], 3)}
                    for key in ("pass_at_n", "best_of_n")
                },
            }
            for best in written["best"]
        ]
    keys = ("reward_mean", "pass_at_1", "pass_at_n", "best_of_n_reward", "answer_entropy", "token_entropy", "grad_norm")
    kept["training"] = tenths(metrics, lambda step: step, keys, most=("logprob_gap_max",))
    return kept


def by_problem(report, key, n):
    at = report["ns"].index(n)
    return [round(problem[key][at], 4) for problem in report["problems"]]


def calibration(report):
    """How far the verifier tells right from wrong; where all are right or all wrong there is nothing to tell."""
    found = report["calibration"]
    flat = {**found, **(found["probabilities"] or {})}
    return {
        key: flat[key] and round(flat[key], 4) for key in ("auc", "pair_accuracy", "mean_score", "accuracy", "brier", "ece")
    }


def at_temperature(temperature, report):
    """pass@N and what the verifier chooses, with the fit pass@N ~ exp(a N^b)."""
    figures, fit = report["figures"], report["scaling"] or {}
    kept = {"temperature": temperature}
    for key in ("pass_at_n", "best_of_n"):
        kept[key] = {n: round(figure["mean"], 4) for n, figure in zip(report["ns"], figures[key])}
    for key in ("a", "b"):
        kept[key] = fit and [round(value, 4) for value in (fit[key]["mean"], *(fit[key]["ci95"] or []))]
    kept["fitted"] = {point["n"]: round(point["fitted"], 4) for point in fit.get("points", [])}
    kept["distinct_answers"] = round(figures["distinct_answers"]["mean"], 2)
    return kept


HELD_OUT, MOST_TRAINED = 200, 1500


def problems_of(task):
    """Prompts and answers in a fixed shuffle: those held out, those trained on, and the others. What a configuration's prefix
    shows is not asked for."""
    everything = {
        "sum": [(f"{a} + {b} =", a + b) for a in range(11, 100) for b in range(2, 10)],
        "difference": [(f"{a} - {b} =", a - b) for a in range(21, 100) for b in range(11, a - 9)],
    }[task]
    config = (PAPER.home / f"{task}.toml").read_text(encoding="utf-8")
    problems = [problem for problem in everything if f"\n{problem[0]} " not in config]
    random.Random(1).shuffle(problems)
    trained = HELD_OUT + MOST_TRAINED
    return {"eval": problems[:HELD_OUT], "train": problems[HELD_OUT:trained], "others": problems[trained:]}


def verifier_problems(task):
    """What the reward model learns from: none that is held out, and none that policies are trained on where there are others."""
    problems = problems_of(task)
    return problems["others"] or problems["train"]


def as_lines(problems):
    """The expert's response is what few-shot examples look like: a blank, the answer, the end of the line."""
    lines = ({"prompt": prompt, "answer": str(answer), "response": f" {answer}\n"} for prompt, answer in problems)
    return "".join(json.dumps(line) + "\n" for line in lines)


def write_tasks():
    for task in TASKS:
        problems = problems_of(task)
        for part in ("eval", "train"):
            write(PAPER.home / f"{task}.{part}.jsonl", as_lines(problems[part]))


def write_tables(readme, check):
    """Replaces what follows the mark in the file, the plots beside it and the table in the project's README, or checks that they
    are what the results say."""
    results = paper_tables.Results(PAPER.results)
    text, plots = paper_tables.document(results, TASKS, [method.name for method in METHODS])
    runs = all_runs()
    text += f"\n{sum(run.result.exists() for run in runs)} of {len(runs)} runs are done.\n"
    before, mark, _ = parted(readme, paper_tables.MARK)
    wanted = {readme: before + mark + text, **{readme.parent / name: plot for name, plot in plots.items()}}
    if readme == PAPER.home / "README.md":
        begin, end = paper_tables.BETWEEN
        before, mark, rest = parted(REPO / "README.md", begin)
        _, mark_of_end, after = parted(REPO / "README.md", end)
        table = paper_tables.headline(results, next(iter(TASKS)), HEADLINE)
        wanted[REPO / "README.md"] = f"{before}{mark}\n{table}\n{mark_of_end}{after}"
    PAPER.put(wanted, check)


def main():
    PAPER.main(__doc__, all_runs, execute, write_tables, more={"tasks": write_tasks}, after=forget_reward_models)


if __name__ == "__main__":
    run_main("paper", main)
