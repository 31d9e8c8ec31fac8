"""Experiments of many runs: each leaves some kB of JSON that is committed, and tables are computed from these files.

A tool says what its runs are and what one does; here is what it does that with, and its command line.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from venv_setup import REPO, UserError


class Experiment:
    """Where an experiment of a name has its things, and the program that it runs. The command line may change all but `home`."""

    def __init__(self, name):
        self.name = name
        self.home = REPO / "examples" / name
        self.results = self.home / "results"
        self.runs = REPO / "runs" / name
        self.engine = REPO / "target" / "release" / "bon-engine"
        self.device = "auto"

    def run(self, *arguments):
        """The program with these arguments; what it says of its results is not shown."""
        command = [self.engine, *map(str, arguments), "--device", self.device]
        done = subprocess.run(command, cwd=REPO, stdout=subprocess.DEVNULL)
        if done.returncode != 0:
            raise UserError(f"bon-engine {arguments[0]} ended with status {done.returncode}; run again to go on from there")

    def trained(self, config, place, settings):
        """Trains, or goes on with that, and returns the model's directory and the metrics of the steps."""
        if not (place / "final").exists():
            resume = ["--resume"] if any(place.glob("checkpoints/step-*")) else []
            self.run("train", config, *settings, f"--set=train.output={place}", *resume)
            (place / "final").touch()
        lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return sorted(place.glob("checkpoints/step-*/model"))[-1], [json.loads(line) for line in lines]

    def put(self, wanted, check):
        """Writes files, or checks that they are what the results say."""
        for path, text in wanted.items():
            if not check:
                write(path, text)
            elif not path.exists() or path.read_text(encoding="utf-8") != text:
                raise UserError(f"{path} is not what the results say; run python3 tools/{self.name}.py tables")

    def main(self, description, all_runs, execute, tables, more=None, after=lambda: None):
        """The command line: `all_runs()` have a `name` and a `result`, the file that `execute(run, settings)` writes,
        `tables(readme, check)` writes or checks what the results say, `more` are further words and what each does, and `after`
        comes when nothing is missing."""
        more = more or {}
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("what", choices=["run", "list", "tables", *more])
        add = parser.add_argument
        shown = f"examples/{self.name}"
        add("--only", default="", metavar="PATTERN", help="only runs in whose names this is found")
        add("--engine", type=Path, default=self.engine, help="the program [default: the release build]")
        add("--results", type=Path, default=self.results, help=f"where results are [default: {shown}/results]")
        add("--runs", type=Path, default=self.runs, help=f"where runs are while they last [default: runs/{self.name}]")
        add("--device", default=self.device, help="what computes, as the engine's --device [default: auto]")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting for every run")
        readme = self.home / "README.md"
        add("--readme", type=Path, default=readme, help=f"tables: where they go [default: {shown}/README.md]")
        add("--check", action="store_true", help="tables: fail if the files say something else")
        arguments = parser.parse_args()
        own = arguments.results == self.results
        self.engine, self.results, self.runs = (
            path.resolve() for path in (arguments.engine, arguments.results, arguments.runs)
        )
        self.device = arguments.device
        try:
            runs = [run for run in all_runs() if re.search(arguments.only, run.name)]
        except re.error as error:
            raise UserError(f"--only {arguments.only}: not a pattern: {error}") from None
        if not runs:
            raise UserError(
                f"--only {arguments.only}: no run has such a name; see python3 tools/{self.name}.py list"
            )
        if arguments.what in more:
            more[arguments.what]()
        elif arguments.what == "tables":
            tables(arguments.readme, arguments.check)
        elif arguments.what == "list":
            for run in runs:
                print(f"{'done' if run.result.exists() else '-':5} {run.name}")
        else:
            missing = [run for run in runs if not run.result.exists()]
            for i, run in enumerate(missing, 1):
                print(f"[{i}/{len(missing)}] {run.name}", file=sys.stderr, flush=True)
                execute(run, arguments.set)
                if own:
                    tables(arguments.readme, False)
            after()


def write(path, text):
    """Beside its place, then renamed, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def compact(result):
    """JSON with a line per key, and per item of a list of objects."""

    def shown(value):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join("  " + json.dumps(part) for part in value) + "\n ]"
        return json.dumps(value)

    return "{\n" + ",\n".join(f" {json.dumps(key)}: {shown(value)}" for key, value in result.items()) + "\n}\n"


def parted(path, mark):
    """A file's text before a line, that line, and the rest."""
    parts = path.read_text(encoding="utf-8").partition(mark)
    if not parts[1]:
        raise UserError(f"{path} does not hold the line {mark.strip()}")
    return parts


def flags(settings):
    return [f"--set={setting}" for setting in settings]


def passes(report):
    """Right samples of each problem, in the order of the task file."""
    return [round(problem["pass_at_n"][0] * problem["samples"]) for problem in report["problems"]]
