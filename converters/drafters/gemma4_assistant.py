"""The assistant of Gemma 4: a small Gemma 4 that has no keys and values, and looks at those of its target.

Config and tensor names as transformers 5 has them (models/gemma4_assistant and models/gemma4); what a runtime computes
as llama.cpp does (src/models/gemma4-assistant.cpp, conversion/gemma.py).
"""

from __future__ import annotations

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.drafters import dflash
from convert_drafter.converters.drafters.captures import read_target_depth
from convert_drafter.converters.drafters.gemma4 import (
    ASSUMED,
    GELU,
    PROPORTIONAL,
    ROPE_FACTORS,
    SLIDING,
    layer_rules,
    made,
    read_full_rope,
)
from convert_drafter.converters.drafters.kind import Headers, Kind
from convert_drafter.converters.plan import Dropped, TensorRule, plain_name
from convert_drafter.converters.roles import Role
from convert_drafter.converters.spec import DrafterSpec, SlidingLayers, SlidingWindow
from convert_drafter.converters.target import Target

OWN_CACHE = "an assistant keeps no keys and values of its own"
# What llama.cpp's graph computes beside that; a config that says otherwise is another model. (path, expected, why)
OWN_ASSUMED: tuple[tuple[str, object, str], ...] = (
    ("hidden_activation", GELU, "llama.cpp always takes GELU in its tanh form"),
    ("vocab_size_per_layer_input", 0, "an input of each layer's own: llama.cpp has no graph for it in a drafter"),
    ("use_double_wide_mlp", False, "transformers refuses it of an assistant"),
    ("tie_word_embeddings", True, "llama.cpp takes the embedding for the head"),
    (f"{SLIDING}.rope_type", "default", "llama.cpp does not stretch the positions of sliding layers"),
    (f"{SLIDING}.partial_rotary_factor", 1, "sliding layers turn whole heads"),
)  # fmt: skip
IGNORED = (
    "architectures", "model_type", "text_config.architectures", "transformers_version", "dtype", "torch_dtype",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache",
    "_name_or_path", "name_or_path", "chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "num_experts", "top_k_experts",
    "moe_intermediate_size", "image_token_id", "audio_token_id", "video_token_id", "boi_token_id", "eoi_token_id",
    "boa_token_id", "eoa_token_id", "eoa_token_index", "use_ordered_embeddings", "num_centroids",
    "centroid_intermediate_top_k",
)  # fmt: skip


def read_spec(reader: ConfigReader, headers: Headers, target: Target | None) -> DrafterSpec:
    """Every fact of an assistant. Raises `WrongInput` naming the key that is missing or wrong."""
    reader.enter("text_config")
    for path, expected, why in (*ASSUMED, *OWN_ASSUMED):
        reader.expect(path, expected, why)
    layer_count = dflash.read_layer_count(reader, {plain_name(name): header for name, header in headers.items()})
    check_cache(reader, layer_count)
    window = read_window(reader, layer_count)
    full, sliding = read_heads(reader, window)
    kv_heads, counts = read_kv_heads(reader, window)
    width = read_backbone(reader, target)
    reader.origins["causal"] = "an assistant drafts one token after the other"
    return DrafterSpec(
        kind="gemma4-assistant",
        layer_count=layer_count,
        hidden_size=reader.get("hidden_size", int, "hidden_size"),
        feed_forward_size=reader.get("feed_forward_size", int, "intermediate_size"),
        head_count=reader.get("head_count", int, "num_attention_heads"),
        kv_head_count=kv_heads,
        kv_head_counts=counts,
        head_dim=full,
        context_length=reader.get("context_length", int, "max_position_embeddings"),
        vocab_size=reader.get("vocab_size", int, "vocab_size"),
        norm_epsilon=reader.get("norm_epsilon", float, "rms_norm_eps"),
        rope=read_full_rope(reader, full, (PROPORTIONAL,)),
        target_layer_count=read_target_depth(reader, target),
        target_hidden_size=width,
        causal=True,
        window=window,
        sliding=SlidingLayers(sliding, reader.get("sliding.theta", float, f"{SLIDING}.rope_theta"), sliding),
        logit_softcap=reader.find("logit_softcap", float, "final_logit_softcapping") or None,
    )


def check_cache(reader: ConfigReader, layer_count: int) -> None:
    """transformers takes no number or 0 for all layers, and refuses any other."""
    shared = reader.find("layers without a cache", int, "num_kv_shared_layers")
    if shared not in (None, 0, layer_count):
        found = f"found {shared}"
        raise reader.error(reader.places("num_kv_shared_layers")[0], found, f"all {layer_count} layers: {OWN_CACHE}")
    both_ways = reader.find("attention both ways", str, "use_bidirectional_attention")
    if both_ways not in (None, "vision"):  # of images alone
        what = "null or 'vision': llama.cpp takes the window as it is stated, transformers another one"
        raise reader.error(reader.origins["attention both ways"], f"found {both_ways!r}", what)


def read_window(reader: ConfigReader, layer_count: int) -> SlidingWindow:
    """Of both types at least one layer; the last is full, or transformers makes it so without llama.cpp knowing."""
    types = dflash.read_layer_types(reader, layer_count)
    if not types:
        raise reader.missing("window.layers", "the type of each layer", "layer_types")
    slides = tuple(name == "sliding_attention" for name in types)
    if not any(slides) or slides[-1]:
        found = f"found {', '.join(types)}"
        expected = "at least one sliding layer, and the last one full: llama.cpp knows an assistant with both"
        raise reader.error(reader.origins["window.layers"], found, expected)
    return SlidingWindow(reader.get("window.size", int, "sliding_window"), slides)


def of_layers(window: SlidingWindow, sliding: bool, key: str) -> list[str]:
    """Where newer configs state what a layer has of its own."""
    return [f"per_layer_config.{i}.{key}" for i, slides in enumerate(window.layers) if slides == sliding]


def read_heads(reader: ConfigReader, window: SlidingWindow) -> tuple[int, int]:
    """Widths of a head in full and in sliding layers."""
    sliding = reader.get("sliding.head_dim", int, "head_dim")
    reader.origins["sliding.dimensions"] = reader.origins["sliding.head_dim"]
    for path in of_layers(window, True, "head_dim"):
        reader.expect(path, sliding, "sliding layers are alike")
    return reader.get("head_dim", int, "global_head_dim", *of_layers(window, False, "head_dim")), sliding


def read_kv_heads(reader: ConfigReader, window: SlidingWindow) -> tuple[int, tuple[int, ...]]:
    """Heads of the target's keys and values in full layers; in each layer, where full layers have a number of theirs.

    transformers looks at a number of theirs only where keys serve as values, llama.cpp's converter everywhere.
    """
    key, all_layers = "num_key_value_heads", reader.get("kv_head_count", int, "num_key_value_heads")
    for path in of_layers(window, True, key):
        reader.expect(path, all_layers, "sliding layers are alike")
    stated = reader.find("kv_head_counts", int, "num_global_key_value_heads")
    alike = reader.find("keys as values", bool, "attention_k_eq_v")
    if stated not in (None, all_layers) and not alike:
        found = f"found {stated} without attention_k_eq_v"
        told = "transformers passes over it, llama.cpp does not; settle it with --set"
        raise reader.error(reader.origins["kv_head_counts"], found, f"{all_layers}: {told}")
    full = reader.find("kv_head_counts", int, "num_global_key_value_heads", *of_layers(window, False, key))
    if full is None:
        return all_layers, ()
    reader.origins["kv_head_count"] = reader.origins["kv_head_counts"]
    return full, tuple(all_layers if slides else full for slides in window.layers)


def read_backbone(reader: ConfigReader, target: Target | None) -> int:
    width = reader.get("target_hidden_size", int, "backbone_hidden_size")
    if target is not None and target.hidden_size != width:
        expected = f"{target.hidden_size}, the hidden size of the target {target.name}"
        raise reader.error(reader.origins["target_hidden_size"], f"found {width}", expected)
    return width


def rules(reader: ConfigReader) -> tuple[TensorRule, ...]:
    """Every tensor an assistant has; there are no keys and values."""
    return (
        TensorRule("pre_projection.weight", Role.NEXTN_PRE_PROJ, ("hidden", "target's embedding and state")),
        TensorRule("post_projection.weight", Role.NEXTN_POST_PROJ, ("target_hidden", "hidden")),
        TensorRule("embed_tokens.weight", Role.TOKEN_EMBEDDING, ("vocab", "hidden")),
        TensorRule("norm.weight", Role.OUTPUT_NORM, ("hidden",)),
        TensorRule(ROPE_FACTORS, Role.ROPE_FACTORS, ("rotated_pairs",)),
        *layer_rules(),
    )


def dropped(reader: ConfigReader) -> tuple[Dropped, ...]:
    why = "it looks for the next token among the likeliest groups of tokens alone; llama.cpp looks among all"
    return (
        Dropped("masked_embedding.centroids.weight", why),
        Dropped("masked_embedding.token_ordering", why),
    )


GEMMA4_ASSISTANT = Kind(
    name="gemma4-assistant",
    summary="Gemma-4 assistant: a small Gemma 4 over its target's keys and values, drafting token by token",
    architectures=("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"),
    read_spec=read_spec,
    rules=rules,
    dropped=dropped,
    ignored=IGNORED,
    made=made,
)
