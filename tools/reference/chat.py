#!/usr/bin/env python3
"""Write tests/goldens/chat.json: conversations, and what Transformers renders of them with chat templates.

    python3 tools/reference/chat.py                     # the templates of tests/goldens/chat
    python3 tools/reference/chat.py a.jinja b.jinja     # others, to standard output, for BON_CHAT_GOLDEN of the tests

The engine's tests render the same conversations.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO

TEMPLATES = REPO / "tests" / "goldens" / "chat"
OUT = REPO / "tests" / "goldens" / "chat.json"

SYSTEMS = [None, "Answer in one word.", "  Two lines,\n  with space around. \n"]
TEXTS = [
    "What is 2+2?",
    "  space around \n",
    "!{{ braces }} {% and %} {# comments #}",
    "<b>&amp; \"quotes\" 'too'</b>",
    "café – 数学 🙂\u00a0?",
    "tab\there\n\nand an empty line",
    "a </thought> b </thought> c?",
    "0",
    "\\n is two characters, \\frac{1}{2} is TeX",
]


def conversations():
    """Fifty of them: every text alone and under every system prompt, then longer ones, well formed or not."""
    found = []
    for system, text in itertools.product(SYSTEMS, TEXTS):
        head = [] if system is None else [("system", system)]
        found.append([*head, ("user", text)])
    for n in range(1, 10):
        turns = [(("user", "assistant")[i % 2], TEXTS[(n * 5 + i * 2) % len(TEXTS)]) for i in range(2 * n + 1)]
        found += [turns, [("system", SYSTEMS[1]), *turns]]
    found += [
        [("user", "one"), ("user", "two")],
        [("assistant", "one"), ("user", "two")],
        [("system", "one"), ("assistant", "two"), ("user", "three")],
        [("user", "one"), ("assistant", "two"), ("assistant", "three"), ("user", "four")],
        [("user", "one"), ("assistant", "two"), ("user", "three"), ("user", "four")],
    ]
    assert len(found) == 50
    return [[{"role": role, "content": content} for role, content in turns] for turns in found]


def render(template, messages):
    from transformers.utils.chat_template_utils import render_jinja_template

    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    try:
        rendered, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **names)
    except Exception as error:  # the template's own words, or Jinja's
        return {"error": str(error)}
    return rendered[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("templates", nargs="*", metavar="FILE.jinja", type=Path)
    args = parser.parse_args()
    venv_setup.enter_reference()
    talks = conversations()
    cases = []
    for file in args.templates or sorted(TEMPLATES.glob("*.jinja")):
        template = file.read_text()
        cases.append({"name": file.stem, "template": template, "rendered": [render(template, talk) for talk in talks]})
    text = json.dumps({"conversations": talks, "cases": cases}, indent=1, ensure_ascii=False) + "\n"
    if args.templates:
        sys.stdout.write(text)
    else:
        OUT.write_text(text)
        for case in cases:
            refused = sum(not isinstance(r, str) for r in case["rendered"])
            print(f"{case['name']}: {len(talks) - refused} conversations rendered, {refused} refused")


if __name__ == "__main__":
    venv_setup.run_main("chat", main)
