"""What the comparison's results say, as tables and plots. See tools/paper.py, which calls this.

Everything is computed from the files of examples/paper/results. Intervals are 95 % bootstraps over problems, which methods
share, and within a method over its seeds.
"""

import functools
import json
import operator
import random

import paper_plot

MARK = "<!-- What follows is written by `python3 tools/paper.py tables`. -->\n"
# The same in the project's README, which goes on after the second.
BETWEEN = ("<!-- Written by `python3 tools/paper.py tables`: -->\n", "<!-- up to here. -->\n")
# What the tables tell: N of evaluation.
AT = (1, 2, 4, 8, 16, 32)
# N of the headline figures, and the number of samples.
N, MOST = 8, 32
BASE = "base"
BOOTSTRAPS = 2000


class Results:
    """The results that there are, and what is computed from them."""

    def __init__(self, directory):
        self.runs, self.verifiers = {}, {}
        for path in sorted(directory.glob("*.json")):
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["method"] == "verifier":
                self.verifiers[result["task"]] = result
            else:
                self.runs.setdefault((result["task"], result["method"]), []).append(result)

    def of(self, task, method):
        return self.runs.get((task, method), [])

    def judged(self, task, method):
        """Those that the task's reward model has judged."""
        return [run for run in self.of(task, method) if run.get("chosen")]

    def per_problem(self, task, method, n):
        """pass@n of each problem: one list per seed."""
        return [[pass_at(n, run["samples"], right) for right in run["passes"]] for run in self.of(task, method)]

    def chosen(self, task, method, n):
        """Best-of-n by the reward model, likewise; pass@1 where n is 1."""
        runs = self.judged(task, method)
        if n == 1:
            return [[right / run["samples"] for right in run["passes"]] for run in runs]
        return [run["chosen"][str(n)] for run in runs]

    def mean(self, task, method, key):
        return average([run[key] for run in self.of(task, method)])


def pass_at(n, samples, right):
    """1 - C(M - c, n) / C(M, n), unbiased (Chen et al., arXiv 2107.03374)."""
    fail = 1.0
    for i in range(n):
        fail *= (samples - right - i) / (samples - i)
        if fail <= 0:
            return 1.0
    return 1 - fail


def average(values):
    return sum(values) / len(values)


@functools.cache
def resamples(size):
    """The bootstrap's choices of problems, the same for all figures."""
    rng = random.Random(1)
    return [operator.itemgetter(*(int(rng.random() * size) for _ in range(size))) for _ in range(BOOTSTRAPS)]


def estimate(*terms):
    """The sum of sign x mean over `terms` (sign, lists per seed), and its 95 % interval by a bootstrap over problems,
    which all terms share, and within each term over seeds."""
    rng = random.Random(2)
    size = len(terms[0][1][0])
    drawn = []
    for problems in resamples(size):
        total = 0.0
        for sign, seeds in terms:
            for _ in seeds:
                total += sign * sum(problems(seeds[int(rng.random() * len(seeds))])) / (size * len(seeds))
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


def shown(figure):
    return "-" if figure is None else f"{figure:.3f}"


def verdict(figures):
    _, low, high = figures
    return "holds" if low > 0 else "the opposite holds" if high < 0 else "undecided"


def methods_table(results, task, methods):
    text = head("method", "seeds", "pass@1", f"pass@{N}", "pass@32", "pass@32 against `rl`", "distinct answers in 32")
    for name in [BASE, *methods]:
        seeds = results.of(task, name)
        if not seeds:
            continue
        against = ""
        if name != "rl" and results.of(task, "rl"):
            terms = [(1, results.per_problem(task, name, MOST)), (-1, results.per_problem(task, "rl", MOST))]
            against = signed(estimate(*terms))
        figures = [plain(estimate((1, results.per_problem(task, name, n)))) for n in (1, N, MOST)]
        count = "" if name == BASE else str(len(seeds))
        text += row(f"`{name}`", count, *figures, against, f"{results.mean(task, name, 'distinct_answers'):.1f}")
    return text


def verifier_section(results, task, methods):
    """What the reward model is, and what it chooses among the samples of each method."""
    made = results.verifiers.get(task)
    names = [name for name in [BASE, *methods] if results.judged(task, name)]
    if not made or not names:
        return "", {}
    text = f"\n### {task}: Best-of-N by a verifier that was learned\n\n"
    checked = made["checked"]
    text += (
        f"`{made['config']}` made the reward model (`{made['architecture']}`, weights `{made['weights'][:12]}`) of "
        f"{made['responses']} responses to {made['problems']} problems, of which {made['right']} are right. Of {checked['samples']} "
        f"samples of the model as it was, to each of {checked['tasks']} others, it scores a right one above a wrong one in "
        f"{shown(checked['pair_accuracy'])} of the pairs of a problem, and in {shown(checked['auc'])} of all; Best-of-{checked['n']} "
        f"by it is right in {shown(checked['best_of_n'])}, where pass@1 is {shown(checked['pass_at_1'])} and pass@{checked['n']} "
        f"{shown(checked['pass_at_n'])}. The two columns on the right say the same of the samples of each method: the area under the "
        "ROC curve over all responses, and its mean over problems within a problem's.\n\n"
    )
    text += head(
        "method",
        "seeds",
        "pass@1",
        f"Best-of-{N}",
        f"pass@{N}",
        "Best-of-32",
        "pass@32",
        f"Best-of-{N} against `rl`",
        "AUC",
        "within problems",
    )
    for name in names:
        runs = results.judged(task, name)
        cells = []
        for n in (1, N, MOST):
            if n > 1:
                cells.append(plain(estimate((1, results.chosen(task, name, n)))))
            of_judged = [[pass_at(n, run["samples"], right) for right in run["passes"]] for run in runs]
            cells.append(f"{average([average(run) for run in of_judged]):.3f}")
        against = ""
        if name != "rl" and results.judged(task, "rl"):
            against = signed(estimate((1, results.chosen(task, name, N)), (-1, results.chosen(task, "rl", N))))
        known = [
            [run["verifier"][key] for run in runs if run["verifier"][key] is not None] for key in ("auc", "pair_accuracy")
        ]
        told = [shown(average(values) if values else None) for values in known]
        text += row(f"`{name}`", "" if name == BASE else str(len(runs)), *cells, against, *told)
    series = []
    for name in CHOSEN_PLOTTED:
        if runs := results.judged(task, name):
            series.append((name, [(n, average([run["best_of_n"][str(n)] for run in runs])) for n in AT]))
    plot = paper_plot.lines(f"Best-of-N by the learned verifier: {task}", "N", "Best-of-N", series)
    name = f"{task}.verifier.svg"
    return text + f"\n![Best-of-N by the learned verifier against N, a line for each method]({name})\n", {name: plot}


TRAINED_FOR = [
    ("1 (`rl`)", "rl"),
    ("2", "bon-rl-s, N = 2"),
    ("4", "bon-rl-s, N = 4"),
    ("8", "bon-rl-s"),
    ("16", "bon-rl-s, N = 16"),
]


def matrix(results, task):
    """N of training against N of evaluation."""
    rows = [(label, name) for label, name in TRAINED_FOR if results.of(task, name)]
    if len(rows) < 2:
        return "", {}
    means = {name: [average([average(run) for run in results.per_problem(task, name, n)]) for n in AT] for _, name in rows}
    text = "\nTrained for N, evaluated at N; the best of each column is bold:\n\n"
    text += head("N of training", *(f"pass@{n}" for n in AT))
    for label, name in rows:
        best = [means[name][i] == max(all_[i] for all_ in means.values()) for i in range(len(AT))]
        text += row(label, *(f"**{x:.3f}**" if b else f"{x:.3f}" for x, b in zip(means[name], best)))
    series = [(f"N = {label.split()[0]}", list(zip(AT, means[name]))) for label, name in rows]
    name = f"{task}.matrix.svg"
    plot = paper_plot.lines(f"Trained for N, evaluated at N: {task}", "N of evaluation", "pass@N", series)
    return text + f"\n![pass@N against N of evaluation, a line for each N of training]({name})\n", {name: plot}


def scaling(results, task):
    """N x T before and after training: the best temperature for each N, and how pass@N grows."""
    names = [name for name in (BASE, "rl", "bon-rl-s") if any(run.get("temperatures") for run in results.of(task, name))]
    if not names:
        return "", {}
    text = f"\n### {task}: N and temperature together\n\n"
    text += "Means over seeds; a and b are of pass@N ~ exp(a N^b), `off` is the most that pass@N is from it at any N.\n\n"
    text += head("method", "seeds", "T", "pass@1", f"pass@{N}", "pass@32", "a", "b", "off", "distinct answers in 32")
    series = []
    for name in names:
        runs = [run["temperatures"] for run in results.of(task, name) if run.get("temperatures")]
        for i, at in enumerate(runs[0]):
            same = [run[i] for run in runs]
            passed = {n: average([part["pass_at_n"][str(n)] for part in same]) for n in AT}
            fits = [part for part in same if part["a"]]
            a, b = ([f"{average([part[key][0] for part in fits]):.2f}" for key in "ab"]) if fits else ("", "")
            off = [abs(part["pass_at_n"][n] - fitted) for part in fits for n, fitted in part["fitted"].items()]
            cells = [f"{passed[n]:.3f}" for n in (1, N, MOST)]
            distinct = average([part["distinct_answers"] for part in same])
            text += row(
                f"`{name}`",
                "" if name == BASE else str(len(runs)),
                str(at["temperature"]),
                *cells,
                a,
                b,
                f"{max(off):.3f}" if off else "",
                f"{distinct:.1f}",
            )
        series.append(
            (
                name,
                [
                    (part["temperature"], average([run[i]["pass_at_n"][str(MOST)] for run in runs]))
                    for i, part in enumerate(runs[0])
                ],
            )
        )
    text += (
        "\nThe best temperature for each N, in brackets the share of resamples of the problems in which it is the best:\n\n"
    )
    text += head("method", *(f"N = {n}" for n in AT))
    for name in names:
        found = [run["best_temperatures"] for run in results.of(task, name) if run.get("temperatures")]
        cells = []
        for n in AT:
            of_n = [best["pass_at_n"] for run in found for best in run if best["n"] == n]
            cells.append(", ".join(f"{best['temperature']} ({best['share']:.2f})" for best in of_n))
        text += row(f"`{name}`", *cells)
    name = f"{task}.temperatures.svg"
    plot = paper_plot.lines(f"pass@{MOST} by temperature: {task}", "temperature", f"pass@{MOST}", series, log=False)
    return text + f"\n![pass@{MOST} against the temperature, before and after training]({name})\n", {name: plot}


ABLATIONS = [
    # What is changed of which method.
    ("the paper's variational estimator", "bon-rl-s, variational", "bon-rl-s"),
    ("M = 8 samples of each of 16 prompts", "bon-rl-s, M = 8", "bon-rl-s"),
    ("M = 32 samples of each of 4 prompts", "bon-rl-s, M = 32", "bon-rl-s"),
    ("KL to the model as it was, 0.1", "bon-rl-s, KL = 0.1", "bon-rl-s"),
    ("KL to the model as it was, 0.1", "rl, KL = 0.1", "rl"),
    ('`negative_sign = "penalize"`', "bon-rlb, penalize", "bon-rlb"),
    ("`weight_clip = 2`", "bon-rlb, clip = 2", "bon-rlb"),
    ("`weight_clip = inf`", "bon-rlb, clip = inf", "bon-rlb"),
]


def ablations(results, task):
    text = ""
    for change, name, of in ABLATIONS:
        if results.of(task, name) and results.of(task, of):
            cells = [
                signed(estimate((1, results.per_problem(task, name, n)), (-1, results.per_problem(task, of, n))))
                for n in (1, N, MOST)
            ]
            text += row(f"`{of}`", change, str(len(results.of(task, name))), *cells)
    title = f"\n### {task}: one thing changed\n\nDifferences from the method without the change.\n\n"
    return text and title + head("method", "change", "seeds", "pass@1", f"pass@{N}", "pass@32") + text


CLAIMS = [
    # What the paper says, and the difference that is above 0 if it is so: (better, worse, n).
    ("RL for one sample gains pass@1", "rl", BASE, 1),
    ("RL for one sample loses pass@32", BASE, "rl", MOST),
    ("SFT loses pass@32", BASE, "sft", MOST),
    ("BoN-RL gains pass@8 over RL", "bon-rl-s", "rl", N),
    ("BoN-RL gains pass@32 over RL", "bon-rl-s", "rl", MOST),
    ("BoN-RLB gains pass@32 over RL", "bon-rlb", "rl", MOST),
    ("BoN-RLB(P) gains pass@32 over RL", "bon-rlb-p", "rl", MOST),
    ("BoN-SFT gains pass@32 over SFT", "bon-sft", "sft", MOST),
    ("BoN-RL gains pass@32 over BoN-SFT", "bon-rl-s", "bon-sft", MOST),
    ("Training for 2 gains pass@2 over training for 8", "bon-rl-s, N = 2", "bon-rl-s", 2),
    ("Training for 8 gains pass@8 over training for 2", "bon-rl-s", "bon-rl-s, N = 2", N),
    ("Training for 16 gains pass@32 over training for 8", "bon-rl-s, N = 16", "bon-rl-s", MOST),
    ("Ours: the exact estimator gains pass@8 over the variational one", "bon-rl-s", "bon-rl-s, variational", N),
]
CHOSEN_PLOTTED = [BASE, "rl", "bon-sft", "bon-rl-s", "bon-rl", "bon-rl-v"]
# The same of Best-of-N by the learned verifier.
CHOSEN_CLAIMS = [
    ("Choosing among 8 gains over one sample, before training", BASE, BASE, (N, 1)),
    ("RL for one sample gains Best-of-8", "rl", BASE, N),
    ("BoN-RL-V gains Best-of-8 over RL", "bon-rl-v", "rl", N),
    ("BoN-RL-V gains Best-of-8 over BoN-RL-S", "bon-rl-v", "bon-rl-s", N),
    ("BoN-RL, the verifier selects and the environment rewards, gains Best-of-8 over RL", "bon-rl", "rl", N),
    ("The same gains Best-of-8 over BoN-RL-S", "bon-rl", "bon-rl-s", N),
    ("The same gains Best-of-8 over BoN-RL-V", "bon-rl", "bon-rl-v", N),
]


def claims(results, tasks):
    """What the paper says, and what is so on each task."""
    tasks = [task for task in tasks if results.of(task, BASE)]
    text = ""
    for of, per_problem, listed in (
        (results.of, results.per_problem, CLAIMS),
        (results.judged, results.chosen, CHOSEN_CLAIMS),
    ):
        for claim, better, worse, n in listed:
            plus, minus = n if isinstance(n, tuple) else (n, n)
            cells = []
            for task in tasks:
                found = None
                if of(task, better) and of(task, worse):
                    found = estimate((1, per_problem(task, better, plus)), (-1, per_problem(task, worse, minus)))
                cells.append(f"{verdict(found)}: {signed(found)}" if found else "")
            if any(cells):
                text += row(claim, *cells)
    title = "\n## The paper's claims\n\nDifferences, which are above 0 where the claim holds.\n\n"
    return text and title + head("claim", *(f"`{task}`" for task in tasks)) + text


def document(results, tasks, methods):
    """All tables, and the plots by their names."""
    text, plots = claims(results, tasks), {}
    for task, words in tasks.items():
        if not results.of(task, BASE):
            continue
        problems, samples = len(results.of(task, BASE)[0]["passes"]), results.of(task, BASE)[0]["samples"]
        text += f"\n## {task}: {words}\n\n"
        text += f"{problems} held-out problems, {samples} samples of each.\n\n"
        text += methods_table(results, task, methods)
        for part in (matrix, scaling):
            more, drawn = part(results, task)
            text, plots = text + more, {**plots, **drawn}
        more, drawn = verifier_section(results, task, methods)
        text, plots = text + more, {**plots, **drawn}
        text += ablations(results, task)
    return text, plots


def headline(results, task, methods):
    """The most telling, for the project's README."""
    names = [name for name in [BASE, *methods] if results.of(task, name)]
    learned = any(results.judged(task, name) for name in names)
    text = head("method", "seeds", "pass@1", f"pass@{N}", f"pass@{MOST}", *[f"Best-of-{N} by a learned verifier"] * learned)
    for name in names:
        cells = [plain(estimate((1, results.per_problem(task, name, n)))) for n in (1, N, MOST)]
        judged = results.chosen(task, name, N)
        count = "" if name == BASE else str(len(results.of(task, name)))
        text += row(f"`{name}`", count, *cells, *[plain(estimate((1, judged))) if judged else ""] * learned)
    return text
