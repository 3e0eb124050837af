"""Builds checkpoints as they are published, small and random, for tests to convert and to spoil."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

FIXTURES = Path(__file__).parent.parent / "fixtures"
PAIR = FIXTURES / "pair"
DTYPE_NAMES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "int64": "I64", "bool": "BOOL", "uint8": "U8",
    "int8": "I8", "int32": "I32", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
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


class Delete:
    """In place of a value: the key goes. Its name is the same in every process, so that tests of it have one."""

    def __repr__(self) -> str:
        return "DELETE"


DELETE = Delete()


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
    captures = inner.get("target_layer_ids") or config.get("target_layer_ids")
    captures = captures or config.get("aux_hidden_state_layer_ids") or [0]
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


def dflash2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a DFlash2 checkpoint has beside those."""
    inner, hidden, vocab = config["dflash_config"], config["hidden_size"], config["vocab_size"]
    taps, groups = inner["conv_kernel_size"], config["hidden_size"] // inner["conv_group_size"]
    rank = inner["selector_rank"]
    shapes: dict[str, tuple[int, ...]] = {
        "candidate_selector.hidden_projection.weight": (rank, hidden),
        "candidate_selector.predecessor_codebook": (vocab, rank),
        "candidate_selector.successor_codebook": (vocab, rank),
    }
    for i in range(config["num_hidden_layers"]):
        for part in ("attention_conv", "mlp_conv"):
            shapes[f"layers.{i}.{part}.base_kernel"] = (2, taps, hidden)
            shapes[f"layers.{i}.{part}.kernel_projection.weight"] = (2 * taps * groups, hidden)
    return shapes


def dspark_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """What a DSpark checkpoint has beside a DFlash one's."""
    rank = config.get("markov_rank") or config["dflash_config"]["markov_rank"]
    return {
        "markov_head.markov_w1.weight": (config["vocab_size"], rank),
        "markov_head.markov_w2.weight": (config.get("draft_vocab_size") or config["vocab_size"], rank),
        "confidence_head.proj.weight": (1, config["hidden_size"] + rank),
        "confidence_head.proj.bias": (1,),
    }


def reduced_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tables of a drafter that drafts some of its target's tokens only."""
    vocab, rows, hidden = config["vocab_size"], config["draft_vocab_size"], config["hidden_size"]
    return {"embed_tokens.weight": (vocab, hidden), "lm_head.weight": (rows, hidden), "d2t": (rows,), "t2d": (vocab,)}


def eagle3_shapes(config: Mapping[str, Any], layer: str = "midlayer.") -> dict[str, tuple[int, ...]]:
    """Names and shapes of an EAGLE-3 checkpoint with this config; absent keys are made up as in `_small_widths`."""
    full = {**_small_widths({"vocab_size": 1, "draft_vocab_size": 1}), "num_key_value_heads": 2, **config}
    full = {key: _small_widths({}).get(key) if value is None else value for key, value in full.items()}
    hidden, ff, d = full["hidden_size"], full["intermediate_size"], full["head_dim"]
    queries, keys = full["num_attention_heads"] * d, full["num_key_value_heads"] * d
    vocab, rows, width = full["vocab_size"], full["draft_vocab_size"], config.get("target_hidden_size") or hidden
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, 3 * width),
        "norm.weight": (hidden,),
        "embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (rows, hidden),
        f"{layer}hidden_norm.weight": (hidden,),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}mlp.down_proj.weight": (hidden, ff),
        f"{layer}mlp.gate_proj.weight": (ff, hidden),
        f"{layer}mlp.up_proj.weight": (ff, hidden),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        f"{layer}self_attn.k_proj.weight": (keys, 2 * hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, queries),
        f"{layer}self_attn.q_proj.weight": (queries, 2 * hidden),
        f"{layer}self_attn.v_proj.weight": (keys, 2 * hidden),
    }
    if full.get("norm_before_fc"):
        shapes["input_norm.weight"] = (3 * width,)
    return shapes | ({"d2t": (rows,), "t2d": (vocab,)} if rows < vocab else {})


def random_tensors(shapes: Mapping[str, tuple[int, ...]], dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Seeded normal weights; the same name and shape always give the same numbers."""
    out = {}
    for name, shape in shapes.items():
        if name in ("d2t", "t2d"):
            rows = shapes.get("d2t", (0,))[0]
            out[name] = np.zeros(shape, np.int64) if name == "d2t" else np.arange(*shape) < rows
            continue
        seed = np.random.default_rng(list(name.encode()))
        out[name] = (seed.standard_normal(shape, dtype=np.float32) * 0.05).astype(dtype)
    return out


def small_checkpoint(folder: Path, **changes: Any) -> Path:
    """A whole small checkpoint in `folder`, made from `small_config(**changes)`."""
    config = small_config(**changes)
    return write_checkpoint(folder, config, random_tensors(dflash_shapes(config)))


# --- the published configs, scaled down ---

CONFIGS = FIXTURES / "configs"
SMALL_HIDDEN, SMALL_FEED_FORWARD, SMALL_HEAD_DIM, SMALL_KV_HEADS, SMALL_VOCAB = 96, 160, 16, 2, 2048
MASKS = ("mask_token_id", "pard_token")


def published_config(name: str) -> dict[str, Any]:
    """A file of fixtures/configs as it is published."""
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def scaled_down(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with small widths and vocabulary; ratios, absent keys and all other keys stay as published.

    heads : kv heads keeps its ratio, heads * head_dim equals hidden_size exactly where it did; a mask id is taken
    modulo the small vocabulary.
    """
    out: dict[str, Any] = json.loads(json.dumps(config))
    small = _small_widths(config.get("transformer_layer_config", {}) | config)
    out |= {key: value for key, value in small.items() if isinstance(config.get(key), int)}
    for part in (out, out.get("dflash_config")):
        for key in MASKS:
            if part and isinstance(part.get(key), int):
                part[key] %= SMALL_VOCAB
    for key in ("text_config", "transformer_layer_config"):
        if key in out:
            out[key] = scaled_down(out[key])
    return out


def _small_widths(config: Mapping[str, Any]) -> dict[str, int]:
    heads, kv_heads, head_dim = (config.get(k) for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    small_heads = SMALL_KV_HEADS * (heads // kv_heads if heads and kv_heads else 4)
    square = bool(heads and head_dim) and heads * head_dim == config.get("hidden_size")
    assert square or small_heads * SMALL_HEAD_DIM != SMALL_HIDDEN
    hidden = small_heads * SMALL_HEAD_DIM if square else SMALL_HIDDEN
    return {
        "hidden_size": hidden,
        "target_hidden_size": hidden,
        "intermediate_size": SMALL_FEED_FORWARD,
        "num_attention_heads": small_heads,
        "num_key_value_heads": SMALL_KV_HEADS,
        "head_dim": SMALL_HEAD_DIM,
        "v_head_dim": SMALL_HEAD_DIM,
        "vocab_size": SMALL_VOCAB,
        "draft_vocab_size": SMALL_VOCAB if config.get("draft_vocab_size") == config.get("vocab_size") else 512,
    }


def published_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensors of a scaled-down config, with the biases, sinks and parts it announces; absent keys are made up."""
    full = {
        **_small_widths({"vocab_size": 1, "draft_vocab_size": 1}),
        "num_hidden_layers": 2,
        **{k: v for k, v in config.items() if v is not None},
    }
    shapes = dflash_shapes(full)
    inner = config.get("dflash_config") or {}
    for i in range(full["num_hidden_layers"]):
        attention = f"layers.{i}.self_attn."
        if config.get("attention_bias"):
            names = [f"{attention}{x}_proj" for x in "qkvo"]
            shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in names}
        if inner.get("attention_sink_bias"):
            shapes[f"{attention}attention_sink_bias"] = (full["num_attention_heads"],)
    shapes |= dflash2_shapes(full) if inner.get("selector_rank") else {}
    shapes |= dspark_shapes(full) if config.get("markov_rank") or inner.get("markov_rank") else {}
    return shapes | (reduced_shapes(full) if full["draft_vocab_size"] < full["vocab_size"] else {})


def tiny_target(folder: Path, **config: Any) -> Path:
    """A target's folder without weights, its config given; the tokenizer is the fixture's, with 2048 tokens."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(PAIR / "target" / name, folder / name)
    (folder / "config.json").write_text(json.dumps({"vocab_size": SMALL_VOCAB, **config}))
    return folder


def config_beside(folder: Path, weights: Path, config: Mapping[str, Any]) -> Path:
    """A checkpoint of this config and of weights that are there already (a link)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").symlink_to(weights)
    return folder
