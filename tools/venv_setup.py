"""A private virtual environment per tool: made on first use, remade when its pins change."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """Something the reader of the message can act on; shown as one line, without a traceback."""


def run_main(tool, main):
    """Call main() and turn what a user can act on into one line and exit status 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{tool}: error: {error}")
    except OSError as error:
        sys.exit(f"{tool}: error: {error.filename or 'system'}: {error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(f"{tool}: interrupted; run it again to start over")


def enter(name, requirements, pip_options=(), note=""):
    """Run the calling script again inside .cache/<name>, built from `requirements` (a list of pip's
    requirement lines) if need be. Returns only in a process that is already inside."""
    directory = REPO / ".cache" / name
    if Path(sys.prefix).resolve() == directory.resolve():
        return
    python = directory / "bin" / "python"
    # The stamp is written last, so an interrupted installation is done again.
    stamp = directory / "requirements.installed"
    wanted = "\n".join(requirements)
    if not (python.exists() and stamp.exists() and stamp.read_text() == wanted):
        print(f"making .cache/{name}{note}", file=sys.stderr, flush=True)
        build(directory, python, requirements, pip_options)
        stamp.write_text(wanted)
    os.execv(python, [str(python), *sys.argv])


def build(directory, python, requirements, pip_options):
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", directory], capture_output=True, text=True)
    if made.returncode != 0:
        message = (made.stderr + made.stdout).strip().splitlines() or ["no message"]
        raise UserError(
            f"python -m venv failed ({message[-1]}); install Python's venv module "
            "(Debian, Ubuntu: apt install python3-venv) and run again"
        )
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_options]
    done = subprocess.run([*pip, *requirements], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise UserError(
            f"pip could not install what is needed ({errors[-1]}); "
            "this needs the network once: check it and run again"
        )


def enter_reference(*more):
    """The environment of tools/reference. One that already has torch, Transformers and `more` modules is used as it is."""
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", *more)):
        return
    lines = (REPO / "tools" / "reference" / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    enter("venv-reference", requirements, note=" (torch: up to 3 GB to download, once)")
