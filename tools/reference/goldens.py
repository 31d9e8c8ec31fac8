#!/usr/bin/env python3
"""Write the golden files of tests/goldens: tiny Gemmas and what Transformers computes with them.

    python3 tools/reference/goldens.py              # all models
    python3 tools/reference/goldens.py gemma2       # one of them

README.md beside this file lists what every file holds. The output is a function of this script and of
the pinned versions (and, in the last bits, of the processor): run it again and nothing changes.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import venv_setup
from venv_setup import REPO

OUT = REPO / "tests" / "goldens"
LENGTHS = [29, 23, 5]  # beyond three windows, of unequal length, and shorter than one window
TEMPERATURE = 0.7
ADAMW = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}
UPDATES = 10

# Every number below differs from Transformers' defaults where it can, so that a parser that
# ignores a field computes something visibly wrong. D = 40 makes sqrt(D) inexact in bf16, and
# the heads are wider than D / H.
SHAPE = {
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 16,
    "hidden_size": 40,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "vocab_size": 131,
}


def layer_types(pattern):
    return [{"L": "sliding_attention", "G": "full_attention"}[letter] for letter in pattern]


# name -> seed, shards, spread of the embedding and of q and k, config.json
MODELS = {
    # The old spelling of config.json, with the legacy name of the activation: "gelu" means the tanh one.
    "gemma1": {
        "seed": 1,
        "shards": 1,
        "embed_std": 0.2,
        "qk_std": 1.0,
        "config": {
            **SHAPE,
            "architectures": ["GemmaForCausalLM"],
            "model_type": "gemma",
            "torch_dtype": "float32",
            "hidden_act": "gelu",
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 3000.0,
        },
    },
    # Scores and logits are of the order of their caps, so both caps matter.
    "gemma2": {
        "seed": 2,
        "shards": 2,
        "embed_std": 0.8,
        "qk_std": 1.8,
        "config": {
            **SHAPE,
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "dtype": "float32",
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": layer_types("LGLG"),
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0},
            "sliding_window": 8,
        },
    },
    "gemma3": {
        "seed": 3,
        "shards": 1,
        "embed_std": 0.2,
        "qk_std": 1.0,
        "config": {
            **SHAPE,
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "dtype": "float32",
            "eos_token_id": [1, 106],
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": layer_types("LLLLLGL"),
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 20,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "sliding_window": 8,
        },
    },
    # The old spelling again; linear scaling touches the global layers only.
    "gemma3_linear": {
        "seed": 4,
        "shards": 1,
        "embed_std": 0.2,
        "qk_std": 1.0,
        "config": {
            **SHAPE,
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "torch_dtype": "float32",
            "hidden_activation": "gelu_pytorch_tanh",
            "num_hidden_layers": 5,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 20,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 500.0,
            "rope_scaling": {"factor": 4.0, "rope_type": "linear"},
            "rope_theta": 5000.0,
            "sliding_window": 6,
            "sliding_window_pattern": 3,
        },
    },
    # The text part of a vision-and-text model; the vision tower is there and takes no part.
    "gemma3_wrapper": {
        "seed": 5,
        "shards": 2,
        "embed_std": 0.2,
        "qk_std": 1.0,
        "config": {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "dtype": "float32",
            "eos_token_id": [1, 106],
            "boi_token_index": 128,
            "eoi_token_index": 129,
            "image_token_index": 130,
            "mm_tokens_per_image": 4,
            "text_config": {
                **{key: value for key, value in SHAPE.items() if key not in ("bos_token_id", "eos_token_id")},
                "model_type": "gemma3_text",
                "layer_types": layer_types("LLG"),
                "num_hidden_layers": 3,
                "num_key_value_heads": 2,
                "query_pre_attn_scalar": 20,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 8,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 8,
                "image_size": 8,
                "intermediate_size": 12,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "patch_size": 4,
                "vision_use_head": False,
            },
        },
    },
    "vaultgemma": {
        "seed": 6,
        "shards": 1,
        "embed_std": 0.8,
        "qk_std": 1.8,
        "config": {
            **SHAPE,
            "architectures": ["VaultGemmaForCausalLM"],
            "model_type": "vaultgemma",
            "dtype": "float32",
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": layer_types("LGL"),
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 24,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2000.0},
            "sliding_window": 8,
        },
    },
}

# Gemma 4's models have heads as wide as the kernels take them, which are compared as well. The dense ones come first, with the
# widths of global layers as they were published. The last layer is global whatever `layer_types` says, and each is scaled by a
# number of the checkpoint.
MODELS["gemma4"] = {
    "seed": 7,
    "shards": 1,
    "embed_std": 0.8,
    "qk_std": 1.0,
    "on_kernels": True,
    "config": {
        **SHAPE,
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "float32",
        "attention_k_eq_v": True,
        "eos_token_id": [1, 106, 50],
        "final_logit_softcapping": 6.0,
        "global_head_dim": 512,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "layer_types": layer_types("LLL"),
        "num_attention_heads": 2,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.4,
                "rope_theta": 50000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        },
        "sliding_window": 8,
    },
}

# The text part of a multimodal model, with the widths of layers as Transformers writes them, with projections of values and
# with most settings left out.
MODELS["gemma4_wrapper"] = {
    "seed": 8,
    "shards": 2,
    "embed_std": 0.2,
    "qk_std": 1.0,
    "on_kernels": True,
    "config": {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "float32",
        "eos_token_id": [1, 106],
        "boi_token_id": 125,
        "eoi_token_id": 126,
        "image_token_id": 127,
        "video_token_id": 128,
        "boa_token_id": 129,
        "eoa_token_index": 130,
        "audio_token_id": 124,
        "text_config": {
            **{key: value for key, value in SHAPE.items() if key not in ("bos_token_id", "eos_token_id")},
            "model_type": "gemma4_text",
            "head_dim": 64,
            "hidden_size_per_layer_input": 0,
            "layer_types": layer_types("LGLG"),
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "per_layer_config": {
                "01": {"head_dim": 128, "num_key_value_heads": 2},
                "03": {"head_dim": 128, "num_key_value_heads": 2},
            },
            "sliding_window": 8,
            "use_bidirectional_attention": "vision",
        },
        "vision_config": {
            "model_type": "gemma4_vision",
            "head_dim": 4,
            "hidden_size": 8,
            "intermediate_size": 12,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "patch_size": 4,
            "position_embedding_size": 16,
        },
        "audio_config": None,
    },
}

# The small ones: per-layer embeddings, which are not trained here, and last layers that read the keys and values of others and have
# wider MLPs. The file also holds the keys and values that those layers would have, as published ones do; nobody reads them.
MODELS["gemma4_e"] = {
    "seed": 13,
    "shards": 1,
    "embed_std": 0.2,
    "qk_std": 1.0,
    "unread": True,
    "on_kernels": True,
    "config": {
        **SHAPE,
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "float32",
        "final_logit_softcapping": 30.0,
        "global_head_dim": 256,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 24,
        "layer_types": layer_types("LGLLG"),
        "num_attention_heads": 2,
        "num_hidden_layers": 5,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "rms_norm_eps": 1e-6,
        "sliding_window": 8,
        "use_double_wide_mlp": True,
        "vocab_size_per_layer_input": 131,
    },
}

# The same kind with per-layer embeddings that are trained.
MODELS["gemma4_e_trained"] = {
    **{key: value for key, value in MODELS["gemma4_e"].items() if key != "unread"},
    "seed": 13,
    "trains_per_layer_embed": True,
    "config": {
        **MODELS["gemma4_e"]["config"],
        "global_head_dim": 64,
        "layer_types": layer_types("LGG"),
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 1,
    },
}

# A mixture of experts beside the MLP of every layer.
MODELS["gemma4_moe"] = {
    "seed": 7,
    "shards": 1,
    "embed_std": 0.4,
    "qk_std": 1.0,
    "on_kernels": True,
    "config": {
        **SHAPE,
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "dtype": "float32",
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "final_logit_softcapping": 30.0,
        "global_head_dim": 128,
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "layer_types": layer_types("LGG"),
        "moe_intermediate_size": 24,
        "num_attention_heads": 2,
        "num_experts": 8,
        "num_global_key_value_heads": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "sliding_window": 8,
        "top_k_experts": 3,
    },
}

# The families before Gemma 4 with heads of 64, which the kernels take, and all else as small as it goes: of these the goldens hold
# what the kernels are compared in, and the weights are stored in bf16.
NARROW = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}


def for_kernels(base, seed, pattern):
    recipe = MODELS[base]
    config = {**recipe["config"], "dtype": "bfloat16"}
    config.pop("torch_dtype", None)
    shape = {**NARROW, "num_hidden_layers": len(pattern)}
    if "G" in pattern and "L" in pattern:
        shape["layer_types"] = layer_types(pattern)
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], **shape}
    else:
        config.update(shape)
    return {**recipe, "seed": seed, "config": config, "on_kernels": True, "kernels_alone": True}


MODELS["gemma1_heads64"] = for_kernels("gemma1", 41, "GG")
MODELS["gemma2_heads64"] = for_kernels("gemma2", 42, "LG")
MODELS["vaultgemma_heads64"] = for_kernels("vaultgemma", 43, "LG")
MODELS["gemma3_wrapper_heads64"] = for_kernels("gemma3_wrapper", 44, "LGL")

# An LM head of its own, which no published Gemma has: `merge --untie` makes such.
MODELS["gemma3_untied"] = {
    "seed": 15,
    "shards": 1,
    "embed_std": 0.2,
    "qk_std": 1.0,
    "on_kernels": True,
    "config": {
        **SHAPE,
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "float32",
        "eos_token_id": [1, 106],
        "head_dim": 64,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": layer_types("LGL"),
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 64,
        "rms_norm_eps": 1e-6,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    },
}

# What stands before the name of a text model's tensor inside a vision-and-text model, and alone.
INSIDE, ALONE = "model.language_model.", "model."


def text_model(model):
    """The decoder, inside a vision-and-text model or alone."""
    return getattr(model.model, "language_model", model.model)


# ---------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------


def draw_weights(model, recipe):
    """Seeded weights that bf16 holds exactly, so that f32 and bf16 runs start from the same numbers."""
    import numpy as np
    import torch

    rng = np.random.default_rng(recipe["seed"])  # torch's own generator may change between versions
    # Gemma multiplies by 1 + w, Gemma 4 by w: neither factor may hide a missing weight.
    norm_mean = 1.0 if recipe["config"]["model_type"].startswith("gemma4") else 0.0
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    weights = {}
    for name, parameter in sorted({**dict(model.named_parameters()), **buffers}.items()):
        shape, mean = tuple(parameter.shape), 0.0
        if name.endswith("layer_scalar"):
            mean, std = 1.0, 0.25
        elif norm_mean and name.endswith(("q_norm.weight", "k_norm.weight")):
            # Gemma 4 scales scores by nothing else: they are sums of so many products.
            mean = shape[0] ** -0.25
            std = 0.3 * mean
        elif len(shape) == 1 or name.endswith("norm.weight"):
            mean, std = norm_mean, 0.3
        elif "embed_tokens" in name:
            std = recipe["embed_std"]
        else:
            std = shape[-1] ** -0.5
            if "q_proj" in name or "k_proj" in name:
                std *= recipe["qk_std"]
        values = torch.from_numpy(mean + rng.standard_normal(shape) * std)
        weights[name] = values.to(torch.bfloat16).to(torch.float32)
    return weights


def write_model(directory, recipe):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    # Our own JSON and not save_pretrained's, which would rewrite old spellings as new ones.
    write_json(directory / "config.json", recipe["config"])
    config = AutoConfig.from_pretrained(directory)
    weights = draw_weights(AutoModelForCausalLM.from_config(config), recipe)
    if recipe.get("unread"):
        text = recipe["config"]
        first = text["num_hidden_layers"] - text["num_kv_shared_layers"]
        for layer in range(first, text["num_hidden_layers"]):
            for part in ["k_proj", "v_proj", "k_norm"]:
                own = weights[f"model.layers.0.self_attn.{part}.weight"]
                weights[f"model.layers.{layer}.self_attn.{part}.weight"] = own.clone() + 1

    if recipe.get("kernels_alone"):
        weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    names, shards = sorted(weights), recipe["shards"]
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": {}}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index["weight_map"].update({name: file for name in part})
    write_json(directory / "model.safetensors.index.json", index)


def load(directory, dtype):
    from transformers import AutoModelForCausalLM

    # from_pretrained(dtype=bf16) keeps RoPE's frequencies in f32; model.to(bf16) would round them too.
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    assert not problems, f"{directory}: {problems}"
    trained = MODELS.get(directory.name, {}).get("trains_per_layer_embed", False)
    for name, parameter in model.named_parameters():
        if "embed_tokens_per_layer" in name:
            parameter.requires_grad_(trained)
    return model.eval()


# ---------------------------------------------------------------------------------------------------
# What is computed with it
# ---------------------------------------------------------------------------------------------------


def draw_sequences(recipe):
    """Begin with <bos>; otherwise no special token. In particular never the padding token: torch gives
    its embedding no gradient."""
    import numpy as np
    import torch

    rng = np.random.default_rng(100 + recipe["seed"])
    config = recipe["config"]
    # In models of text and other things the last stand for those.
    media = [value for key, value in config.items() if key.endswith(("_token_id", "_token_index")) and key[:3] != "eos"]
    vocab = config.get("vocab_size") or min(media)
    return [torch.from_numpy(np.concatenate([[2], rng.integers(3, vocab, n - 1)])) for n in LENGTHS]


def logits_of(model, ids):
    # One sequence at a time: no padding, so positions and masks are beyond doubt.
    return model(input_ids=ids[None], use_cache=False).logits[0]


def next_token_logprobs(logits, ids, temperature=1.0):
    """logprobs[t] = log p(ids[t + 1] | ids[..= t])"""
    logprobs = (logits[:-1].float() / temperature).log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None])[:, 0]


def mean_nll(model, sequences):
    """Mean over all predicted tokens of all sequences, not a mean of means."""
    total = sum(-next_token_logprobs(logits_of(model, ids), ids).sum() for ids in sequences)
    return total / sum(len(ids) - 1 for ids in sequences)


def hidden_states(model, ids):
    """The residual stream after the embedding, after every layer, and after the final norm."""
    import torch

    seen = {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        return hook

    text = text_model(model)
    parts = {"embed": text.embed_tokens, "norm": text.norm}
    parts.update({f"layer.{i}": layer for i, layer in enumerate(text.layers)})
    handles = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    with torch.no_grad():
        logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def routes(model, sequences):
    """The experts of every token in every layer that has some."""
    import torch

    seen = []
    routers = [module for name, module in text_model(model).named_modules() if name.endswith(".router")]
    handles = [router.register_forward_hook(lambda m, i, output: seen.append(output[2])) for router in routers]
    with torch.no_grad():
        for ids in sequences:
            logits_of(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def train(model, sequences):
    """Losses before, between and after the updates, and the gradient norm of each before clipping."""
    import torch

    parameters = [p for _, p in sorted(model.named_parameters()) if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=ADAMW["betas"], eps=ADAMW["eps"])
    losses, norms = [], []
    for _ in range(UPDATES):
        optimizer.zero_grad()
        loss = mean_nll(model, sequences)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, ADAMW["max_grad_norm"]).item())
        losses.append(loss.item())
        optimizer.step()
    with torch.no_grad():
        losses.append(mean_nll(model, sequences).item())
    return losses, norms


def gradients_of(model):
    named = model.named_parameters()
    return {key.replace(INSIDE, ALONE): p.grad for key, p in named if p.grad is not None}


def size_of(errors):
    return {"max": errors.abs().max().item(), "rms": errors.square().mean().sqrt().item()}


def updates(name, directory, model, sequences, loss):
    """What golden.json says of ten updates of AdamW from the model with that loss."""
    import numpy as np
    import torch

    model.zero_grad()
    losses, norms = train(model, sequences)
    # AdamW divides by what may be noise. Where that decides, ten updates in f32 say nothing: take another seed.
    _, exact = train(load(directory, torch.float32).double(), sequences)
    noise = max(abs(norm / true - 1) for norm, true in zip(norms, exact))
    assert noise < 5e-6, f"{name}: gradient norms in f32 and f64 differ by {noise:.1e}"
    assert losses[0] == loss and all(np.isfinite(losses)) and losses[-1] < losses[0]
    print(f"{name}: {UPDATES} updates, loss {losses[0]:.4f} -> {losses[-1]:.4f}, gradient norm {norms[0]:.3f}")
    return {"adamw": {**ADAMW, "updates": UPDATES, "losses": losses, "grad_norms": norms}}


def write_golden(name, recipe):
    import torch
    import transformers
    from safetensors.torch import save_file

    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    write_model(directory, recipe)
    model, model_bf16 = load(directory, torch.float32), load(directory, torch.bfloat16)
    sequences = draw_sequences(recipe)
    # A token between two experts goes to either by rounding, and then bf16 says nothing of f32: take another seed.
    pairs = zip(routes(model, sequences), routes(model_bf16, sequences))
    turned = sum((a != b).any(-1).sum().item() for a, b in pairs)
    assert turned == 0, f"{name}: {turned} tokens go to other experts in bf16"

    tensors, errors = {}, []
    with torch.no_grad():
        for i, ids in enumerate(sequences):
            logits, logits_bf16 = logits_of(model, ids), logits_of(model_bf16, ids).float()
            logprobs, logprobs_bf16 = next_token_logprobs(logits, ids), next_token_logprobs(logits_bf16, ids)
            tensors[f"input_ids.{i}"] = ids.to(torch.int32)
            tensors[f"logprobs.{i}"] = logprobs
            errors.append(logprobs_bf16 - logprobs)
            if recipe.get("kernels_alone"):
                continue
            tensors[f"logits.{i}"] = logits
            tensors[f"logprobs_t07.{i}"] = next_token_logprobs(logits, ids, TEMPERATURE)
            tensors[f"logits_bf16.{i}"] = logits_bf16
            tensors[f"logprobs_bf16.{i}"] = logprobs_bf16
    if not recipe.get("kernels_alone"):
        tensors.update({f"hidden.{key}": value for key, value in hidden_states(model, sequences[0]).items()})

    loss = mean_nll(model, sequences)
    loss.backward()
    gradients = gradients_of(model)
    # An LM head that is the embedding counts once.
    trained = [*text_model(model).parameters(), model.get_output_embeddings().weight]
    assert len(gradients) == len({id(p) for p in trained if p.requires_grad})
    tensors.update({f"grad.{key}": grad.clone() for key, grad in gradients.items()})
    adamw = {} if recipe.get("kernels_alone") else updates(name, directory, model, sequences, loss.item())
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, directory / "golden.safetensors")

    errors = torch.cat(errors)
    summary = {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "seed": recipe["seed"],
        "lengths": LENGTHS,
        "temperature": TEMPERATURE,
        "loss": loss.item(),
        "bf16_logprob_error": size_of(errors),
        **adamw,
    }
    if recipe.get("on_kernels"):
        mean_nll(model_bf16, sequences).backward()
        of_bf16 = gradients_of(model_bf16)
        differences = {key: of_bf16[key].float() - tensors[f"grad.{key}"] for key in of_bf16}
        summary["bf16_gradient_error"] = {key: size_of(difference) for key, difference in differences.items()}
    write_json(directory / "golden.json", summary)

    off = summary["bf16_logprob_error"]
    print(f"{name}: loss {loss.item():.4f}, bf16 log-prob error max {off['max']:.4f} rms {off['rms']:.4f}")
    for file in sorted(directory.iterdir()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        print(f"  {file.relative_to(REPO)}  {file.stat().st_size} bytes  {digest}")


# Adapters that PEFT makes of some of the models above. Ranks are no multiples of anything.
ADAPTERS = {
    "lora_gemma3": {
        "base": "gemma3",
        "seed": 21,
        "lora": {
            "r": 5,
            "lora_alpha": 7,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
    },
    # Values that are keys, layers that lack a map, and the other scale.
    "lora_gemma4": {
        "base": "gemma4",
        "seed": 22,
        "lora": {
            "r": 3,
            "lora_alpha": 4,
            "use_rslora": True,
            "target_modules": ["k_proj", "v_proj", "o_proj", "up_proj"],
        },
    },
    # A text part's names, and some of its layers.
    "lora_wrapper": {
        "base": "gemma3_wrapper",
        "seed": 23,
        "lora": {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": r".*language_model\.layers\.[02]\.(self_attn\.q_proj|mlp\.down_proj)",
        },
    },
}


def adapted(recipe, dtype):
    """The model with adapters of seeded matrices that bf16 holds exactly; neither of a pair is zero."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, bias="none", **recipe["lora"])
    model = get_peft_model(load(OUT / recipe["base"], dtype), config, autocast_adapter_dtype=False)
    rng = np.random.default_rng(recipe["seed"])
    for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        values = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) * 0.7 * parameter.shape[1] ** -0.5)
        parameter.data = values.to(torch.bfloat16).to(dtype)
    return model.eval()


def write_adapter(name, recipe):
    import torch
    import peft
    from safetensors.torch import save_file

    directory = OUT / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model, model_bf16 = adapted(recipe, torch.float32), adapted(recipe, torch.bfloat16)
    model.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink(missing_ok=True)
    config = json.loads((directory / "adapter_config.json").read_text())
    write_json(directory / "adapter_config.json", {**config, "base_model_name_or_path": recipe["base"]})

    sequences = draw_sequences(MODELS[recipe["base"]])
    tensors, errors = {}, []
    with torch.no_grad():
        for i, ids in enumerate(sequences):
            logprobs = next_token_logprobs(logits_of(model, ids), ids)
            errors.append(next_token_logprobs(logits_of(model_bf16, ids).float(), ids) - logprobs)
            tensors[f"input_ids.{i}"] = ids.to(torch.int32)
            tensors[f"logprobs.{i}"] = logprobs
            logits = logits_of(model_bf16, ids).float()
            tensors[f"logits.{i}"], tensors[f"logits_bf16.{i}"] = logits_of(model, ids), logits
    loss = mean_nll(model, sequences)
    loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for key, parameter in trained.items():
        tensors["grad." + key.replace(".default.weight", ".weight")] = parameter.grad.clone()
    model.zero_grad()
    losses, norms = train(model, sequences)
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, directory / "golden.safetensors")
    errors = torch.cat(errors)
    summary = {
        "peft": peft.__version__,
        "base": recipe["base"],
        "seed": recipe["seed"],
        "lengths": LENGTHS,
        "loss": loss.item(),
        "bf16_logprob_error": {"max": errors.abs().max().item(), "rms": errors.square().mean().sqrt().item()},
        "adamw": {**ADAMW, "updates": UPDATES, "losses": losses, "grad_norms": norms},
    }
    write_json(directory / "golden.json", summary)
    print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, {len(trained)} matrices")


# Sequence classifiers with one label around some of the models above: reward models.
CLASSIFIERS = {
    "score_gemma3": {"base": "gemma3", "seed": 31, "architecture": "Gemma3TextForSequenceClassification"},
    "score_wrapper": {"base": "gemma3_wrapper", "seed": 32, "architecture": "Gemma3ForSequenceClassification"},
}
LABELS = [1.0, 0.0, 0.3]  # of the sequences


def write_classifier(name, recipe):
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification

    base, directory = OUT / recipe["base"], OUT / name
    weights = {key: value for file in sorted(base.glob("model*.safetensors")) for key, value in load_file(file).items()}
    config = json.loads((base / "config.json").read_text())
    width = (config.get("text_config") or config)["hidden_size"]
    rng = np.random.default_rng(recipe["seed"])
    score = torch.from_numpy(rng.standard_normal((1, width)) * width**-0.5).to(torch.bfloat16).to(torch.float32)
    with tempfile.TemporaryDirectory() as whole:
        whole = Path(whole)
        label = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        write_json(whole / "config.json", {**config, **label, "architectures": [recipe["architecture"]]})
        save_file({**weights, "score.weight": score}, whole / "model.safetensors", metadata={"format": "pt"})
        options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
        model, info = AutoModelForSequenceClassification.from_pretrained(whole, **options)
    problems = {key: value for key, value in info.items() if value}
    assert not problems and type(model).__name__ == recipe["architecture"], f"{name}: {problems}"
    model.eval()

    sequences = draw_sequences(MODELS[recipe["base"]])
    # In one padded batch, so that the position is the class's own choice.
    pad, longest = model.config.get_text_config().pad_token_id, max(LENGTHS)
    padded = torch.stack([torch.nn.functional.pad(ids, (0, longest - len(ids)), value=pad) for ids in sequences])
    logits = model(input_ids=padded, attention_mask=(padded != pad).long(), use_cache=False).logits[:, 0]
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(LABELS))
    loss.backward()
    text = ("model.layers.", "model.embed_tokens.", "model.norm.", "score.")
    gradients = {key: grad for key, grad in gradients_of(model).items() if key.startswith(text)}
    tensors = {f"input_ids.{i}": ids.to(torch.int32) for i, ids in enumerate(sequences)}
    tensors.update({"score.weight": score, "scores": logits, "labels": torch.tensor(LABELS)})
    tensors.update({f"grad.{key}": grad.clone() for key, grad in gradients.items()})
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    save_file({key: value.detach().contiguous() for key, value in tensors.items()}, directory / "golden.safetensors")
    write_json(directory / "golden.json", {"base": recipe["base"], "lengths": LENGTHS, "loss": loss.item()})
    print(f"{name}: loss {loss.item():.4f}, logits {[round(x, 4) for x in logits.tolist()]}, {len(gradients)} gradients")


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description="Write the golden files of tests/goldens.")
    names = [*MODELS, *ADAPTERS, *CLASSIFIERS]
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"which of {', '.join(names)} (default: all)")
    args = parser.parse_args()
    unknown = [name for name in args.models if name not in names]
    if unknown:
        raise venv_setup.UserError(f"no model called {unknown[0]}; there are {', '.join(names)}")
    venv_setup.enter_reference("peft")

    import torch
    import transformers

    torch.set_num_threads(1)  # one thread, one order of summation
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in args.models or names:
        if name in MODELS:
            write_golden(name, MODELS[name])
        elif name in CLASSIFIERS:
            write_classifier(name, CLASSIFIERS[name])
        else:
            write_adapter(name, ADAPTERS[name])


if __name__ == "__main__":
    venv_setup.run_main("goldens", main)
