"""Builds checkpoints as they are published, small and random, for tests to convert and to spoil."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures"
PAIR = FIXTURES / "pair"
DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "bool": "BOOL", "uint8": "U8"}
Tensors = Mapping[str, np.ndarray]


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file made by hand: 8 bytes of header length, the JSON header, the data."""
    header, offset = {}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for a in tensors.values()))


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def small_config(**changes: Any) -> dict[str, Any]:
    """A complete DFlash config with every width small; `changes` are dotted paths, DELETE removes a key."""
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "block_size": 8,
        "dflash_config": {"mask_token_id": 250, "target_layer_ids": [1, 3]},
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 6,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000000, "rope_type": "default"},
        "vocab_size": 256,
    }
    return changed(config, changes)


DELETE = object()


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` with dotted paths set; DELETE removes a key, None stays null."""
    out: dict[str, Any] = json.loads(json.dumps(config))
    for path, value in changes.items():
        *parents, last = path.split(".")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is DELETE:
            node.pop(last, None)
        else:
            node[last] = value
    return out


def dflash_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a DFlash checkpoint with this config, as z-lab publishes them."""
    inner = config.get("dflash_config") or {}
    captures = inner.get("target_layer_ids") or config.get("target_layer_ids") or [0]
    hidden, ff, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(captures) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}."
        shapes |= {
            f"{layer}input_layernorm.weight": (hidden,),
            f"{layer}mlp.down_proj.weight": (hidden, ff),
            f"{layer}mlp.gate_proj.weight": (ff, hidden),
            f"{layer}mlp.up_proj.weight": (ff, hidden),
            f"{layer}post_attention_layernorm.weight": (hidden,),
            f"{layer}self_attn.k_norm.weight": (d,),
            f"{layer}self_attn.k_proj.weight": (keys, hidden),
            f"{layer}self_attn.o_proj.weight": (hidden, queries),
            f"{layer}self_attn.q_norm.weight": (d,),
            f"{layer}self_attn.q_proj.weight": (queries, hidden),
            f"{layer}self_attn.v_proj.weight": (keys, hidden),
        }
    return shapes


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Seeded normal weights; the same name and shape always give the same numbers."""
    out = {}
    for name, shape in shapes.items():
        seed = np.random.default_rng(list(name.encode()))
        out[name] = (seed.standard_normal(shape, dtype=np.float32) * 0.05).astype(dtype)
    return out


def small_checkpoint(folder: Path, **changes: Any) -> Path:
    """A whole small checkpoint in `folder`, made from `small_config(**changes)`."""
    config = small_config(**changes)
    return write_checkpoint(folder, config, random_tensors(dflash_shapes(config)))
