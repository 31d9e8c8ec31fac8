#!/usr/bin/env python3
"""Load what the engine saves into Transformers: the same kind of checkpoint, with nothing missing, nothing unknown and other parts
as they were.

    python3 tools/reference/saved.py                       # every golden model that is loaded as a whole
    python3 tools/reference/saved.py gemma4_wrapper        # one of them

Each model is trained for one step of `sft` by target/release/bon-engine (--engine: another program), so that every trained tensor
moves. Of what is saved Transformers must read each tensor bit for bit and compute the log-probs that the engine computes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO, UserError

GOLDENS = REPO / "tests" / "goldens"
MODELS = ["gemma1", "gemma2", "vaultgemma", "gemma3", "gemma3_untied", "gemma3_wrapper"]
MODELS += ["gemma4", "gemma4_e", "gemma4_e_trained", "gemma4_moe", "gemma4_wrapper"]
# Settings of some.
SETTINGS = {"gemma4_e_trained": ["--set", "model.per_layer_embeddings=trained"]}
# Where a wrapper's text part lies; what lies elsewhere is a tower's.
TEXT = "model.language_model."
IDS = [2, 8, 16, 9, 18, 7]
# Log-probs in f32 of these models are right to 1e-5 by a wide margin; a wrong tensor is off by orders of magnitude.
ALLOWED = 1e-4

CONFIG = """
[model]
path = "{model}"
[data]
tasks = "{tasks}"
[generate]
samples = 2
prompts_per_step = 2
max_new_tokens = 4
[objective]
kind = "sft"
[verifier]
kind = "numeric"
[optimizer]
lr = 1e-3
[train]
steps = 1
output = "{output}"
"""


def tokenizer():
    """One token per character of arithmetic, laid out as Gemma's."""
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    words = [*control, *"\n0123456789+-=?.,\u2581abcdefghijklmnopqrstuvwxyz"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": word, **flags, "special": True} for i, word in enumerate(control)]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": False, "merges": []}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": spaces,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {**model, "vocab": {word: i for i, word in enumerate(words)}},
    }


def engine(program, *arguments):
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{' '.join(map(str, arguments))} failed: {done.stderr.strip()}")
    return done.stdout


def tensors(directory):
    from safetensors.torch import load_file

    return {key: value for file in sorted(directory.glob("model*.safetensors")) for key, value in load_file(file).items()}


def check(name, program, place):
    import torch
    from transformers import AutoModelForCausalLM

    model, tasks = place / name, place / "tasks.jsonl"
    shutil.copytree(GOLDENS / name, model, ignore=shutil.ignore_patterns("golden.*"))
    (model / "tokenizer.json").write_text(json.dumps(tokenizer()))
    tasks.write_text("".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) + "\n" for a in range(8)))
    output, config = place / f"{name}.run", place / f"{name}.toml"
    config.write_text(CONFIG.format(model=model, tasks=tasks, output=output))
    engine(program, "train", config, "--device", "cpu", *SETTINGS.get(name, []))
    saved = output / "checkpoints" / "step-000001" / "model"

    before, after = tensors(model), tensors(saved)
    equal = {key for key in before if key in after and torch.equal(before[key], after[key])}
    inside = any(key.startswith(TEXT) for key in before)
    towers = {key for key in before if inside and not key.startswith(TEXT)}
    assert towers <= equal, f"{name}: {sorted(towers - equal)} changed"
    assert len(equal) < len(after), f"{name}: training changed nothing"
    own = {key for key in before if "embed_tokens_per_layer" in key}
    assert own <= equal or name in SETTINGS and not own & equal, f"{name}: per-layer embeddings"
    assert set(after) <= set(before), f"{name}: new tensors {sorted(set(after) - set(before))}"

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    loaded, info = AutoModelForCausalLM.from_pretrained(saved, **options)
    problems = {key: value for key, value in info.items() if value}
    read = {key: value for key, value in loaded.state_dict().items() if key in after}
    wrong = [key for key, value in read.items() if not torch.equal(value, after[key])]
    assert not problems and not wrong and len(read) == len(after), f"{name}: {problems} {wrong}"

    lines = place / "ids.jsonl"
    lines.write_text(json.dumps({"ids": IDS}) + "\n")
    found = json.loads(engine(program, "logprobs", "--model", saved, "--device", "cpu", "--input", lines))["logprobs"]
    with torch.no_grad():
        logits = loaded.eval()(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, :-1]
    want = logits.log_softmax(-1).gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0].tolist()
    off = max(abs(a - b) for a, b in zip(found, want, strict=True))
    assert off <= ALLOWED, f"{name}: log-probs are off by {off}"
    print(
        f"{name}: {type(loaded).__name__}, {len(read)} tensors bit-equal, {len(towers)} of towers as before, "
        f"log-probs off by {off:.1e}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; all if none is named")
    parser.add_argument("--engine", type=Path, default=REPO / "target" / "release" / "bon-engine")
    args = parser.parse_args()
    venv_setup.enter_reference()
    if unknown := [name for name in args.models if name not in MODELS]:
        raise UserError(f"no golden model {unknown[0]!r}: one of {', '.join(MODELS)}")
    if not args.engine.exists():
        raise UserError(f"there is no {args.engine}: cargo build --locked --release")
    with tempfile.TemporaryDirectory() as place:
        for name in args.models or MODELS:
            check(name, args.engine.resolve(), Path(place))


if __name__ == "__main__":
    venv_setup.run_main("saved", main)
