#!/usr/bin/env python3
"""Write down what bitsandbytes makes of numbers in blocks of 8-bit codes.

    python3 tools/reference/blockwise.py

tests/goldens/blockwise.json: the values of its dynamic codes, signed and unsigned, and of 600 numbers of very different
sizes, in blocks of 256, the largest magnitude of each block and the codes.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO

OUT = REPO / "tests" / "goldens" / "blockwise.json"
SEED, NUMBERS, BLOCK = 5, 600, 256


def main():
    venv_setup.enter_reference("bitsandbytes")
    import torch
    from bitsandbytes import functional

    torch.manual_seed(SEED)
    numbers = torch.randn(NUMBERS) * torch.exp(3 * torch.randn(NUMBERS))
    found = {}
    for name, signed in [("signed", True), ("unsigned", False)]:
        values = functional.create_dynamic_map(signed=signed)
        own = numbers if signed else numbers.square()
        codes, state = functional.quantize_blockwise(own, code=values, blocksize=BLOCK)
        found[name] = {
            "values": values.tolist(),
            "numbers": own.tolist(),
            "scales": state.absmax.tolist(),
            "codes": codes.tolist(),
        }
    partial = OUT.with_suffix(".partial")
    partial.write_text(json.dumps(found) + "\n", encoding="utf-8")
    partial.replace(OUT)


if __name__ == "__main__":
    venv_setup.run_main("blockwise", main)
