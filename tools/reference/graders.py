#!/usr/bin/env python3
"""Ask math-verify, a grader built on SymPy, about the answers on which the `boxed` verifier is tested.

    python3 tools/reference/graders.py

Rewrites the fourth column of tests/goldens/math_verify.tsv: whether math-verify takes the first, in a box, for the
second. Where that differs from the third, what `boxed` says, the test asks for a fifth: who is right, and why.
"""

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO

PAIRS = REPO / "tests" / "goldens" / "math_verify.tsv"


def verdict(found, wanted):
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0)]
    read = lambda answer: parse(f"\\boxed{{{answer}}}", extraction_config=config)
    return int(verify(read(wanted), read(found)))


def main():
    venv_setup.enter("venv-graders", ["math-verify==0.9.0", "latex2sympy2_extended==1.11.0", "sympy==1.14.0"])
    logging.disable(logging.CRITICAL)
    lines = []
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        found, wanted, ours, _, *reason = line.split("\t")
        lines.append("\t".join([found, wanted, ours, str(verdict(found, wanted)), *reason]) + "\n")
    partial = PAIRS.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(PAIRS)


if __name__ == "__main__":
    venv_setup.run_main("graders", main)
