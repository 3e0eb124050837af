"""The pair's target as a GGUF, for the engine tests: a minimal Qwen3 writer on the project's own GGUF helpers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters.checkpoint import open_checkpoint, slabs
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.target import target_tokenizer

T = GGUFValueType
U16, U32, F32, STRING = T.UINT16, T.UINT32, T.FLOAT32, T.STRING
GLOBAL = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in GLOBAL:
        return GLOBAL[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest.removesuffix('.weight')]}.weight"


def target_keys(folder: Path) -> tuple[KeyValue, ...]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    counts = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
    }
    return (
        KeyValue("general.architecture", STRING, "qwen3"),
        KeyValue("general.name", STRING, "tiny target"),
        *(KeyValue(f"qwen3.{key}", U32, value) for key, value in counts.items()),
        KeyValue("qwen3.attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]),
        KeyValue("qwen3.rope.freq_base", F32, config["rope_parameters"]["rope_theta"]),
        *target_tokenizer(folder, config["vocab_size"]).keys,
    )


def write_target(folder: Path, out: Path) -> Path:
    """The target in F32, so that llama.cpp and torch compute with the same numbers."""
    headers = {gguf_name(name): header for name, header in open_checkpoint(folder).tensors.items()}
    stored = [StoredTensor(name, header.shape, GGMLQuantizationType.F32) for name, header in headers.items()]

    def data(tensor: StoredTensor) -> Iterator[np.ndarray]:
        return (slab.astype(np.float32) for slab in slabs(headers[tensor.name]))

    write_gguf(out, target_keys(folder), stored, data)
    return out


def split_gguf(path: Path, prefix: Path, count: int = 3) -> list[Path]:
    """The same model as so many files, as llama-gguf-split makes them: all keys in the first, the tensors in turn."""
    file = read_gguf(path)
    names = list(file.tensors)
    parts = [prefix.with_name(f"{prefix.name}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for i, part in enumerate(parts):
        numbers = [KeyValue(f"split.{key}", U16, n) for key, n in (("no", i), ("count", count))]
        keys = [*(file.keys.values() if i == 0 else [file.keys["general.architecture"]]), *numbers]
        stored = [file.tensors[name] for name in names[i::count]]
        write_gguf(part, keys, stored, lambda tensor: [file.tensor_bytes(tensor.name)])
    return parts
