"""Small checkpoints of targets with an MTP head, made by `fixtures/make_mtp.py`, for tests to convert and to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_mtp
import make_mtp_bailing
import make_mtp_cohere
import make_mtp_glm
import make_mtp_hunyuan
import make_mtp_latent
import make_mtp_mimo
import make_mtp_nemotron
import make_mtp_qwen4
import make_mtp_step
import numpy as np
from published import DELETE, changed
from safetensors.numpy import load_file, save_file

from convert_drafter.converters import ConvertJob
from convert_drafter.converters.convert import Conversion, prepare

SMALL = {
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "partial_rotary_factor": 0.5,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000_000,
        "rope_type": "default",
    },
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}


def small(folder: Path, prefix: str = "model.", shards: int = 1, **changes: Any) -> Path:
    """A target in which every width is another one, partly rotated, with an output head of its own."""
    return make_mtp.random(folder, prefix, shards, **{**SMALL, **changes})


MIXTURE = {
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "model_type": "qwen3_5_moe_text",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def mixture(folder: Path, **changes: Any) -> Path:
    """A target whose layers choose 3 of 8 experts."""
    made = make_mtp.random(folder, **{**SMALL, **MIXTURE, **changes})
    return reconfigure(made, intermediate_size=DELETE)


def qwen3_next(folder: Path, **changes: Any) -> Path:
    """A Qwen3-Next: its config is of an older fashion and says nothing of its head, its experts are apart."""
    made = mixture(folder, architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", **changes)
    gone = ("attn_output_gate", "layer_types", "mamba_ssm_dtype", "mtp_num_hidden_layers", "output_gate_type")
    older = dict.fromkeys([*gone, "mtp_use_dedicated_embeddings", "rope_parameters"], DELETE)
    new = {"decoder_sparse_step": 1, "intermediate_size": 96, "mlp_only_layers": [], "norm_topk_prob": True}
    return part_experts(reconfigure(made, **older, **new, rope_scaling=None, rope_theta=10_000_000))


def part_experts(folder: Path) -> Path:
    """The same checkpoint with a tensor for each expert."""
    path, found = folder / "model.safetensors", {}
    for name, tensor in load_file(path).items():
        if name.endswith("experts.gate_up_proj"):
            for i, both in enumerate(tensor):
                gate, up = np.split(both, 2)
                found[f"{name[:-12]}{i}.gate_proj.weight"] = gate.copy()
                found[f"{name[:-12]}{i}.up_proj.weight"] = up.copy()
        elif name.endswith("experts.down_proj"):
            found |= {f"{name[:-9]}{i}.down_proj.weight": down.copy() for i, down in enumerate(tensor)}
        else:
            found[name] = tensor
    save_file(found, path)
    return folder


def reconfigure(folder: Path, **changes: Any) -> Path:
    """Change a checkpoint's config by dotted paths, given with `__` for the dots."""
    path = folder / "config.json"
    spelled = {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(json.dumps(changed(json.loads(path.read_text()), spelled)))
    return folder


def without(folder: Path, *starts: str) -> Path:
    """Take the tensors away whose names begin so."""
    path = folder / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(starts)}
    save_file(tensors, path)
    return folder


def as_multimodal(folder: Path) -> Path:
    """The config as a vision model has it: the text model's facts in an object of their own."""
    path = folder / "config.json"
    text = json.loads(path.read_text())
    text.pop("architectures")
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "image_token_id": 2040,
        "model_type": "qwen3_5",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"depth": 2, "hidden_size": 32},
    }
    path.write_text(json.dumps(config))
    return folder


# Every family that has a head, by a short name.
SOURCES: dict[str, Callable[[Path], Path]] = {
    "trained": make_mtp.trained,
    "small": small,
    "mixture": mixture,
    "next": qwen3_next,
    "qwen4": make_mtp_qwen4.random,
    "glm": make_mtp_glm.random,
    "hunyuan": make_mtp_hunyuan.random,
    "nemotron": make_mtp_nemotron.random,
    "cohere": make_mtp_cohere.random,
    "cohere-centred": make_mtp_cohere.centred,
    "flash": make_mtp_latent.flash,
    "dsa": make_mtp_latent.dsa,
    "deepseek": make_mtp_latent.v32,
    "step": make_mtp_step.random,
    "mimo": make_mtp_mimo.random,
    "mimo-flash": make_mtp_mimo.flash,
    "mimo-ranks": make_mtp_mimo.ranked,
    "bailing": make_mtp_bailing.random,
}


def job(source: Path, out: Path, **options: Any) -> ConvertJob:
    return ConvertJob(source, options.pop("target", None), "llama.cpp", options.pop("recipe", "F32"), out, **options)


def planned(source: Path, **options: Any) -> Conversion:
    return prepare(job(source, source.parent / "out.gguf", **options))


__all__ = [
    "DELETE",
    "SOURCES",
    "as_multimodal",
    "job",
    "mixture",
    "part_experts",
    "planned",
    "qwen3_next",
    "reconfigure",
    "small",
    "without",
]
