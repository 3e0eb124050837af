"""Small models of many architectures for the recipes: the names, shapes and keys that decide types, and no weights.

llama-quantize reads a file's hyper-parameters but builds no model, so a file need not have every tensor.
`fixtures/recipes` holds what it decided about them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.quantize import stored_type
from convert_drafter.converters.type_choice import Candidate

U32, F32, STRING, BOOL = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.BOOL
RECORDED = Path(__file__).parent.parent / "fixtures" / "recipes" / "llama-quantize.json"
Shape = tuple[int, ...]
WIDTH = 256


@dataclass(frozen=True)
class Model:
    """A file to be: keys without the architecture's prefix, shapes in torch order, types where they are not F32."""

    architecture: str
    keys: Mapping[str, Any]
    tensors: Mapping[str, Shape]
    types: Mapping[str, str] = field(default_factory=dict)

    def stored(self) -> list[StoredTensor]:
        return [
            StoredTensor(name, shape, GGMLQuantizationType[self.types.get(name, "F32")])
            for name, shape in self.tensors.items()
        ]

    def candidates(self) -> list[Candidate]:
        return [Candidate(tensor.name, tensor.shape, stored_type(tensor.type)) for tensor in self.stored()]

    def write(self, path: Path) -> Path:
        keys = [KeyValue("general.architecture", STRING, self.architecture)]
        keys += [_key(f"{self.architecture}.{name}", value) for name, value in self.keys.items()]

        def zeros(tensor: StoredTensor) -> Iterator[np.ndarray]:
            yield np.zeros(tensor.n_bytes, np.uint8)

        write_gguf(path, keys, self.stored(), zeros)
        return path


def _key(name: str, value: Any) -> KeyValue:
    if isinstance(value, tuple):
        return KeyValue(name, GGUFValueType.ARRAY, value, _key(name, value[0]).type)
    kinds = {bool: BOOL, int: U32, float: F32, str: STRING}
    return KeyValue(name, kinds[type(value)], value)


def facts(layers: int, heads: int = 4, kv_heads: int | None = 4, experts: int = 0, **more: Any) -> dict[str, Any]:
    """The keys every loader asks for, and those that decide types."""
    keys: dict[str, Any] = {
        "context_length": 64,
        "embedding_length": WIDTH,
        "block_count": layers,
        "feed_forward_length": WIDTH,
        "attention.head_count": heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.layer_norm_epsilon": 1e-6,
    }
    if kv_heads is not None:
        keys["attention.head_count_kv"] = kv_heads
    if experts:
        keys |= {"expert_count": experts, "expert_used_count": 1}
    return keys | {name.replace("__", "."): value for name, value in more.items()}


def block(layer: int, row: int = WIDTH, down: int | None = None, experts: int = 0) -> dict[str, Shape]:
    """A layer of a transformer; with experts their matrices are stacked."""
    shapes: dict[str, Shape] = {"attn_norm": (row,), "ffn_norm": (row,), "attn_q_norm": (64,)}
    shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (2, row))
    stack = (experts,) if experts else ()
    kind = "_exps" if experts else ""
    shapes |= {f"ffn_{name}{kind}": (*stack, 2, row) for name in ("gate", "up")}
    shapes[f"ffn_down{kind}"] = (*stack, 2, down or row)
    if experts:
        shapes["ffn_gate_inp"] = (experts, row)
    return {f"blk.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def layers(count: int, make: Callable[[int], dict[str, Shape]] = block) -> dict[str, Shape]:
    return {name: shape for layer in range(count) for name, shape in make(layer).items()}


def ends(row: int = WIDTH, tied: bool = False) -> dict[str, Shape]:
    head: dict[str, Shape] = {} if tied else {"output.weight": (3, row)}
    return {"token_embd.weight": (3, row), **head, "output_norm.weight": (row,)}


def dflash(count: int, row: int = WIDTH, down: int | None = None) -> Model:
    """A DFlash2 drafter with a Markov head: every tensor that only a drafter has."""
    tensors: dict[str, Shape] = {"fc.weight": (2, 3 * row), "enc.output_norm.weight": (row,)}
    tensors |= {"output_norm.weight": (row,), "conf_proj.weight": (1, row + 32), "conf_proj.bias": (1,)}
    tensors |= {f"markov_w{n}.weight": (3, 32) for n in (1, 2)}
    tensors |= {"selector_hidden.weight": (2, row)}
    tensors |= {f"selector_{name}.weight": (3, 64) for name in ("predecessor", "successor")}
    tensors |= layers(count, lambda layer: block(layer, row, down))
    for layer in range(count):
        tensors |= {f"blk.{layer}.{part}_conv_base": (2, 4, row) for part in ("attn", "ffn")}
        tensors |= {f"blk.{layer}.{part}_conv_proj.weight": (2, row) for part in ("attn", "ffn")}
        tensors[f"blk.{layer}.attn_sinks.weight"] = (8,)
    return Model("dflash", facts(count, target_layers=(1, 2, 3), block_size=8), tensors)


def llama(
    count: int, heads: int = 4, kv_heads: int | None = 4, experts: int = 0, tied: bool = False, row: int = WIDTH
) -> Model:
    tensors = ends(row, tied) | layers(count, lambda layer: block(layer, row, experts=experts))
    return Model("llama", facts(count, heads, kv_heads, experts), tensors)


def falcon(count: int, tied: bool = False, experts: int = 0) -> Model:
    """One matrix for queries, keys and values."""

    def part(layer: int) -> dict[str, Shape]:
        names = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        return {f"blk.{layer}.{name}.weight": (2, WIDTH) for name in names}

    return Model("falcon", facts(count, experts=experts), ends(tied=tied) | layers(count, part))


def mtp() -> Model:
    """The MTP block of a trunk of 8 layers, without the trunk."""
    tensors = block(8) | {f"blk.8.nextn.{name}.weight": (WIDTH,) for name in ("enorm", "hnorm", "shared_head_norm")}
    for name in ("eh_proj", "embed_tokens", "shared_head_head"):
        tensors[f"blk.8.nextn.{name}.weight"] = (2, WIDTH)
    keys = facts(9, nextn_predict_layers=1, rope__dimension_sections=(1, 1, 1, 1))
    keys |= {f"ssm.{name}": 4 for name in ("conv_kernel", "inner_size", "state_size", "time_step_rank", "group_count")}
    return Model("qwen35", keys, tensors | ends())


def hybrid() -> Model:
    """Attention in every fourth layer, so that its number is not the layer's; heads as one number per layer."""
    tensors = ends()
    for layer in range(9):
        part = block(layer)
        kept = {n: s for n, s in part.items() if layer % 4 == 3 or "attn_" not in n}
        tensors |= kept | {f"blk.{layer}.ssm_conv1d.weight": (WIDTH, 4), f"blk.{layer}.ssm_in.weight": (2, WIDTH)}
    return Model("llama", facts(9, heads=(8,) * 9, kv_heads=(2,) * 9), tensors)  # type: ignore[arg-type]


def eagle3() -> Model:
    """One layer, a table of its own vocabulary in 64-bit integers, and a head."""
    tensors = {"fc.weight": (2, 3 * WIDTH), "d2t": (4,), "output.weight": (4, WIDTH), "output_norm.weight": (WIDTH,)}
    keys = facts(1, 8, 2, target_layers=(1, 2, 3), target_hidden_size=WIDTH)
    return Model("eagle3", keys, tensors | block(0), {"d2t": "I64"})


def bailing() -> Model:
    """Three dimensions in attention and in experts, with one layer that has none."""
    tensors = ends()
    for layer in range(4):
        tensors |= block(layer, experts=4 if layer else 0) | {f"blk.{layer}.attn_k_b.weight": (4, 2, WIDTH)}
    keys = facts(4, kv_heads=0, experts=4, expert_feed_forward_length=WIDTH, expert_shared_count=1)
    keys |= {"leading_dense_block_count": 1, "expert_weights_scale": 1.0, "expert_weights_norm": True}
    keys |= {"expert_gating_func": 2, "kda.gate_lower_bound": -5.0, **MLA}
    return Model("bailingmoe3", keys, tensors)


MLA = {
    "attention.key_length_mla": 64,
    "attention.value_length_mla": 64,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "ssm.conv_kernel": 4,
    "kda.head_dim": 64,
}


def glm5() -> Model:
    """A model that keeps some tensors at 8 bits and leaves many small ones alone; others see nothing in these names."""
    keys = facts(3, experts=4, expert_feed_forward_length=WIDTH, expert_shared_count=1, **MLA)
    indexer = {"head_count": 4, "key_length": 64, "top_k": 8, "kpool": 4}
    keys |= {f"attention.indexer.{name}": value for name, value in indexer.items()}
    keys |= {f"hyper_connection.{name}": 4 for name in ("count", "sinkhorn_iterations")}
    keys |= {"hyper_connection.epsilon": 1e-6, "nextn_predict_layers": 1}
    tensors = {name: shape for name, shape in oddities().tensors.items() if not name.startswith("v.blk")}
    tensors["blk.2.nextn.eh_proj.weight"] = (2, WIDTH)
    return Model("glm5-next", keys, tensors)


def granite() -> Model:
    """A loader that counts a layer more than the file's key."""
    names = ("token_ids_activate", "token_ids_substitute")
    keys = facts(7, logit_scale=1.0, adapters__count=1, adapters__lora_rank=4)
    keys |= {f"adapters.{name}": (1,) for name in names}
    return Model("graniteswitch", keys, ends() | layers(7))


PIECES = (
    "position_embd", "token_types", "per_layer_token_embd", "per_layer_model_proj", "v.patch_embd", "v.position_embd",
    "a.rvq.codebook", "mm.a.code_embd", "sam.pos_embd", "sam.neck.0", "sam.net_2", "v.blk.0.rel_pos",
    "mm.patch_merger", "v.blk.0.attn_qkv", "v.blk.0.attn_q", "v.blk.0.ffn_down", "cls",
)  # fmt: skip
PARTS = (
    "altup_proj", "laurel_l", "ssm_conv1d", "shortconv.conv", "shortconv.in_proj", "indexer.k_proj", "indexer.q_proj",
    "indexer.proj", "attn_rel_b", "time_mix_first", "time_mix_w0", "time_mix_w1", "time_mix_w2", "time_mix_v0",
    "time_mix_v1", "time_mix_v2", "time_mix_a0", "time_mix_a1", "time_mix_a2", "time_mix_g1", "time_mix_g2",
    "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused", "time_mix_key", "ffn_gate_inp",
    "ffn_gate_inp_shexp", "ffn_gate_tid2eid", "attn_kv_b", "attn_kv_a_mqa", "attn_q_a", "attn_q_b", "attn_k_b",
    "attn_v_b", "cross_attn_v", "attn_gate", "ffn_down_shexp", "ffn_up_shexp", "ffn_gate_shexp", "ffn_conv_proj",
    "hc_attn_fn", "ssm_f_a", "ssm_f_b", "ssm_g_a", "ssm_g_b", "ssm_beta", "attn_sinks", "indexer.attn_q_b",
    "indexer.attn_k", "indexer_compressor_gate", "indexer_compressor_ape", "ssm_norm",
)  # fmt: skip


def oddities() -> Model:
    """Every name that llama-quantize leaves alone or treats apart, in one file that no loader would take."""
    tensors = {f"{name}.weight": (2, WIDTH) for name in PIECES} | ends()
    for layer in range(3):
        tensors |= {f"blk.{layer}.{name}.weight": (2, WIDTH) for name in PARTS}
        tensors |= {f"blk.{layer}.attn_v.{kind}": (2, WIDTH) for kind in ("scale", "weight_scale", "bias")}
        tensors |= {f"blk.{layer}.row.weight": (1, WIDTH), f"blk.{layer}.column.weight": (WIDTH, 1)}
        tensors |= {f"blk.{layer}.stack.weight": (1, 2, WIDTH), f"blk.{layer}.pile.weight": (2, 1, WIDTH)}
        tensors |= {f"blk.{layer}.heap.weight": (2, 1, 1, WIDTH), f"blk.{layer}.attn_v.weight": (2, WIDTH)}
    types = {"blk.0.altup_proj.weight": "F16", "blk.1.attn_v.weight": "BF16", "cls.weight": "F16"}
    return Model("llama", facts(3), tensors, types)


def models() -> dict[str, Model]:
    return {
        "dflash": dflash(5),
        "dflash, rows of 288": dflash(5, 288),
        "dflash, rows of 100": dflash(2, 100),
        "dflash, feed forward of 2880": dflash(5, down=2880),
        "llama": llama(16),
        "llama, tied": llama(12, tied=True),
        "llama, rows of 32": llama(9, row=32),
        "llama, rows of 100, tied": llama(2, row=100, tied=True),
        "llama, 3 queries per key": llama(9, heads=6, kv_heads=2),
        "llama, 4 queries per key": llama(9, heads=8, kv_heads=2),
        "llama, no key heads given": llama(8, kv_heads=None),
        "llama, 65B": llama(80),
        "llama, 70B": llama(80, kv_heads=1),
        "llama, 8 experts": llama(17, experts=8),
        "llama, 8 experts, 80 layers": llama(80, kv_heads=1, experts=8),
        "llama, 4 experts": llama(16, experts=4, tied=True),
        "qwen2, 72B": Model("qwen2", facts(80), ends() | layers(80)),
        "jais2, 70B": Model("jais2", facts(68), ends() | layers(68)),
        "qwen3moe": Model("qwen3moe", facts(8, experts=16), ends() | layers(8, lambda n: block(n, experts=16))),
        "falcon": falcon(17),
        "falcon, tied": falcon(8, tied=True),
        "falcon, 8 experts": falcon(2, experts=8),
        "mtp": mtp(),
        "hybrid": hybrid(),
        "oddities": oddities(),
        "eagle3": eagle3(),
        "bailingmoe3": bailing(),
        "glm5-next": glm5(),
        "graniteswitch": granite(),
        "nanbeige": Model("nanbeige", facts(6, num_loops=2), ends() | layers(6)),
    }


# --- what was decided ---

# name without the layer -> its type in every layer, or all of them in order; without those of the recipe's own type,
# and with F32 (what no recipe quantizes) only for the recipe F16
Decisions = dict[str, str]


def condensed(types: Mapping[str, str], own: str) -> Decisions:
    """Types by tensor name as they are recorded; `own` is the recipe's type."""
    by_name: dict[str, list[str]] = {}
    for name in sorted(types, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")]):
        by_name.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(types[name])
    shared = {name: " ".join(found if len(set(found)) > 1 else found[:1]) for name, found in by_name.items()}
    left_out = {own} if own == "F16" else {own, "F32"}
    return {name: found for name, found in sorted(shared.items()) if found not in left_out}


def recorded() -> dict[str, dict[str, Decisions]]:
    """What llama-quantize decided: model -> recipe -> decisions."""
    found: dict[str, dict[str, Decisions]] = json.loads(RECORDED.read_text())
    return found
