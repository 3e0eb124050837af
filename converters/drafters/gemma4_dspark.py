"""DSpark with the layers of Gemma 4: full attention whose keys serve as values, an embedding and a head of its own.

Config, tensor names and what is computed as DeepSpec publishes it (Gemma4DSparkModel); what a runtime computes as
llama.cpp does (src/models/dflash.cpp, conversion/gemma.py).
"""

from __future__ import annotations

import math

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import dflash, dspark
from convert_drafter.converters.drafters.captures import read_captures, read_target_depth, read_target_width
from convert_drafter.converters.drafters.decoder import ATTENTION
from convert_drafter.converters.drafters.gemma4 import (
    ASSUMED,
    DEFAULT,
    FULL,
    GELU,
    PROPORTIONAL,
    ROPE_FACTORS,
    SLIDING,
    layer_rules,
    made,
    read_full_rope,
)
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.drafters.rope import LAYER_TYPES
from convert_drafter.converters.plan import Dropped, TensorRule
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, Rope, SlidingWindow
from convert_drafter.converters.target import Target

KEYS_AS_VALUES, WINDOW = "attention_k_eq_v", "dflash_config.swa_window_size"
# A full layer has heads of its own (G-12); a sliding one's are dead, as is every window that no layer uses.
DEAD = ("head_dim", "num_key_value_heads", "num_kv_shared_layers", "use_bidirectional_attention", SLIDING)
IGNORED = (
    *dspark.IGNORED, *DEAD, "target_model_type", "target_text_model_type", "moe_intermediate_size", "num_experts",
    "top_k_experts", "vocab_size_per_layer_input", "rope_parameters.rope_type",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of the drafter. Raises `WrongInput` naming the key that is missing or wrong."""
    check(reader)
    count = dflash.read_layer_count(reader, headers)
    check_layer_types(reader, count)
    hidden = reader.get("hidden_size", int, "hidden_size")
    head_dim = reader.get("head_dim", int, "global_head_dim")
    captures = read_captures(reader)
    return DrafterSpec(
        kind="gemma4-dspark",
        layer_count=count,
        hidden_size=hidden,
        feed_forward_size=reader.get("feed_forward_size", int, "intermediate_size"),
        head_count=reader.get("head_count", int, "num_attention_heads"),
        kv_head_count=reader.get("kv_head_count", int, "num_global_key_value_heads"),
        head_dim=head_dim,
        context_length=reader.get("context_length", int, "max_position_embeddings"),
        vocab_size=reader.get("vocab_size", int, "vocab_size"),
        norm_epsilon=reader.get("norm_epsilon", float, "rms_norm_eps"),
        rope=read_rope(reader, head_dim),
        block_size=reader.get("block_size", int, *dflash.BLOCK_SIZES),
        mask_token_id=reader.get("mask_token_id", int, "dflash_config.mask_token_id", "mask_token_id"),
        capture_layers=captures,
        target_layer_count=read_target_depth(reader, target),
        target_hidden_size=read_target_width(reader, headers, target, len(captures)),
        causal=dflash.read_causal(reader, window := read_window(reader, count)),
        window=window,
        embedding_scale=read_embedding_scale(reader, hidden),
        logit_softcap=reader.find("logit_softcap", float, *dflash.SOFTCAPS) or None,  # zero turns it off
        activation=read_activation(reader),
        attention_scale=read_attention_scale(reader),
        markov_rank=reader.get("markov_rank", int, *dspark.RANKS),
        sample_from_anchor=dspark.read_sample_from_anchor(reader),
        confidence_head=dspark.read_heads(reader, headers),
    )


def check(reader: ConfigReader) -> None:
    """What llama.cpp's graph takes for granted; a config that says otherwise is another model."""
    for path, expected, why in ASSUMED:
        reader.expect(path, expected, why)
    reader.expect("use_double_wide_mlp", False, "every layer's feed-forward is as wide as intermediate_size says")
    reader.expect("draft_vocab_size", reader.get("vocab_size", int, "vocab_size"), "it drafts every token")
    if not reader.get("keys as values", bool, KEYS_AS_VALUES):
        expected = "true: llama.cpp norms values only where they are the keys, this model always does"
        raise reader.error(KEYS_AS_VALUES, "found False", expected)


def check_layer_types(reader: ConfigReader, count: int) -> None:
    """All full: a sliding layer of Gemma 4 has heads of another width and another theta."""
    types = dflash.read_layer_types(reader, count)
    if not types:
        raise reader.missing("layer_types", "the type of each layer", "layer_types")
    if set(types) != {LAYER_TYPES[0]}:
        expected = f"{LAYER_TYPES[0]} throughout: heads of two widths have no graph in llama.cpp's DSpark"
        raise reader.error("layer_types", f"found {', '.join(types)}", expected)


def read_window(reader: ConfigReader, count: int) -> SlidingWindow | None:
    """Full layers may be kept from looking further back than a window of the drafter's own; Gemma's is dead."""
    reader.ignore("sliding_window", WINDOW)
    reader.expect("use_sliding_window", False, "full layers do not slide")
    if not reader.find("window.layers", bool, "dflash_config.use_swa"):
        return None
    return SlidingWindow(reader.get("window.size", int, WINDOW), (True,) * count)


def read_rope(reader: ConfigReader, head_dim: int) -> Rope:
    """Of full layers; where nothing is said of layer types, of all."""
    return read_full_rope(
        reader, head_dim, (PROPORTIONAL, DEFAULT), FULL if reader.section(FULL) else "rope_parameters"
    )


def read_embedding_scale(reader: ConfigReader, hidden: int) -> float:
    scale = math.sqrt(hidden)
    for path in ("input_embedding_scale", "dflash_config.input_embedding_scale"):
        reader.expect(path, scale, "Gemma multiplies embeddings by the root of their width")
    reader.origins["embedding_scale"] = "the root of hidden_size, as in every Gemma"
    return scale


def read_activation(reader: ConfigReader) -> str:
    found = reader.get("activation", str, "hidden_activation")
    if found != GELU:
        raise reader.error("hidden_activation", f"found {found!r}", f"{GELU!r}: llama.cpp's converter takes no other")
    return found


def read_attention_scale(reader: ConfigReader) -> float:
    reader.origins["attention_scale"] = "Gemma 4 leaves scores as they are"
    return 1.0


def rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Every tensor of the kind; a config that ties the embedding has no head."""
    tied = not reader.raw or reader.find("head", bool, "tie_word_embeddings") is True
    return (
        TensorRule("fc.weight", Role.FUSION, ("hidden", "features")),
        TensorRule("hidden_norm.weight", Role.FUSION_NORM, ("hidden",)),
        TensorRule("norm.weight", Role.OUTPUT_NORM, ("hidden",)),
        TensorRule("embed_tokens.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden")),
        TensorRule("lm_head.weight", Role.OUTPUT, ("vocab", "hidden"), optional=tied),
        TensorRule(ROPE_FACTORS, Role.ROPE_FACTORS, ("rotated_pairs",), optional=True),
        *layer_rules(),
        TensorRule(f"{ATTENTION}k_proj.weight", Role.ATTN_K, ("keys", "hidden")),
        TensorRule(f"{ATTENTION}k_norm.weight", Role.ATTN_K_NORM, ("head_dim",)),
        *dspark.head_rules(reader),
    )


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    return ()


GEMMA4_DSPARK = Kind(
    name="gemma4-dspark",
    summary="DSpark with Gemma-4 layers, whose keys serve as values, over a Gemma 4",
    architectures=("Gemma4DSparkModel",),
    read_spec=read_spec,
    rules=rules,
    dropped=dropped,
    ignored=IGNORED,
    made=made,
)
