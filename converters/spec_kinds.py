"""Which facts a kind of drafter cannot be without, beside those of every drafter; which kinds are heads.

And which facts are numbers above 0.
"""

from __future__ import annotations

MAMBA = frozenset(
    f"state_space.{name}" for name in ("kernel_size", "state_size", "group_count", "head_count", "head_dim")
)
_BLOCK = frozenset({"block_size", "mask_token_id", "capture_layers"})
_DSPARK = frozenset({"markov_rank", "confidence_head", "sample_from_anchor"})
_LINEAR = frozenset(
    f"linear_attention.{name}"
    for name in ("kernel_size", "key_head_dim", "key_head_count", "value_head_count", "value_head_dim", "layers")
)
_EXPERTS = ("experts.count", "experts.used", "experts.shared_feed_forward_size")
_LATENT = tuple(f"latent_attention.{name}" for name in ("query_rank", "kv_rank", "value_head_dim"))
_TRUNK = ("trunk.dense_layer_count", "trunk.feed_forward_size")
_INDEXER = ("indexer.head_count", "indexer.head_dim", "indexer.top_k")
_DELTA = tuple(f"delta_attention.{name}" for name in ("kernel_size", "head_dim", "lower_bound", "layers"))
_CHOICE = ("experts.scoring", "experts.normed", "experts.scale")
_MIXED_STREAMS = tuple(f"streams.{name}" for name in ("count", "iterations", "epsilon"))
_GATED_STREAMS = ("streams.count", "streams.rank")
_SHARED_KEY = tuple(f"shared_key.{name}" for name in ("query_rank", "output_groups", "output_rank"))
_WINDOW = ("window.size", "window.layers")
_SLIDING_TRUNK = frozenset(
    f"trunk.{name}" for name in ("dense_layer_count", "feed_forward_size", "window_size", "sliding_layers")
)
_SLIDING = frozenset(set(_WINDOW).union(
    f"trunk.{name}"
    for name in ("sliding_layers", "kv_head_counts", "rope_theta", "experts.count", "expert_feed_forward_size")
))  # fmt: skip
OF_KIND: dict[str, frozenset[str]] = {
    "dflash": _BLOCK,
    "dflash2": _BLOCK | {"convolution.kernel_size", "convolution.group_size", "selector.rank", "selector.top_k"},
    "dspark": _BLOCK | _DSPARK,
    "gemma4-dspark": _BLOCK.union(_DSPARK, ("embedding_scale", "attention_scale", "activation")),
    "eagle3": frozenset({"capture_layers", "norm_before_residual", "norm_before_fc"}),
    "gemma4-assistant": frozenset(
        {"window.size", "window.layers", "sliding.head_dim", "sliding.theta", "sliding.dimensions"}
    ),
    "mtp-qwen35": _LINEAR | {"rope.sections"},
    "mtp-qwen35moe": _LINEAR | {"rope.sections", *_EXPERTS},
    "mtp-qwen3next": _LINEAR.union(_EXPERTS),
    "mtp-qwen4exp": _LINEAR | {"rope.sections", *_EXPERTS, *_INDEXER, "indexer.pool_size", *_GATED_STREAMS},
    "mtp-glm4moe": frozenset({*_EXPERTS, *_CHOICE, *_TRUNK}),
    "mtp-deepseek2": frozenset({*_EXPERTS, *_CHOICE, *_TRUNK, *_LATENT}),
    "mtp-glm-dsa": frozenset({*_EXPERTS, *_CHOICE, *_TRUNK, *_LATENT, *_INDEXER, "indexer.layers"}),
    "mtp-deepseek32": frozenset({*_EXPERTS, *_CHOICE, *_TRUNK, *_LATENT, *_INDEXER}),
    "mtp-hy_v3": frozenset({*_EXPERTS, *_CHOICE, "trunk.feed_forward_size"}),
    "mtp-nemotron_h_moe": frozenset({*_EXPERTS, *_CHOICE, "trunk.attention_layers", "trunk.mixture_layers"} | MAMBA),
    "mtp-cohere2moe": frozenset({*_EXPERTS[:2], *_CHOICE[:2], "logit_scale"} | _SLIDING_TRUNK),
    "mtp-step35": _SLIDING | {"trunk.head_counts"},
    "mtp-mimo2": _SLIDING | {"value_head_dim"},
    "mtp-bailingmoe3": frozenset({*_EXPERTS, *_CHOICE, *_TRUNK, *_LATENT[1:], *_DELTA}),
    "mtp-deepseek4": frozenset(
        {*_EXPERTS, *_CHOICE, "experts.limit", *_INDEXER, *_MIXED_STREAMS, *_SHARED_KEY, *_WINDOW}
        | {"compression.ratios", "compression.theta", "trunk.hash_layer_count"}
    ),
}
# Heads that read and hand on states before the final norm, or before several streams are one.
BEFORE_NORM = frozenset({"mtp-step35", "mtp-mimo2", "mtp-qwen4exp", "mtp-deepseek4"})
HEADS = frozenset(kind for kind in OF_KIND if kind.startswith("mtp-"))  # their layers are further ones of their target
POSITIVE = (
    *MAMBA,
    "layer_count", "hidden_size", "feed_forward_size", "head_count", "kv_head_count", "head_dim", "context_length",
    "vocab_size", "norm_epsilon", "target_layer_count", "target_hidden_size",
    "convolution.kernel_size", "convolution.group_size", "selector.rank", "selector.top_k",
    "markov_rank", "draft_vocab_size",
    "linear_attention.kernel_size", "linear_attention.key_head_dim", "linear_attention.key_head_count",
    "linear_attention.value_head_count", "linear_attention.value_head_dim",
    "latent_attention.query_rank", "latent_attention.kv_rank", "latent_attention.value_head_dim",
    "delta_attention.kernel_size", "delta_attention.head_dim",
    "indexer.head_count", "indexer.head_dim", "indexer.top_k",
    "shared_key.query_rank", "shared_key.output_groups", "shared_key.output_rank",
    "streams.count", "streams.rank", "streams.iterations", "streams.epsilon", "compression.theta",
    "experts.latent_size", "experts.limit",
    "experts.count", "experts.used", "experts.shared_feed_forward_size", "experts.groups", "experts.groups_used",
    "trunk.feed_forward_size", "trunk.window_size", "layer_norm_epsilon", "value_head_dim",
    "trunk.rope_theta", "trunk.expert_feed_forward_size", "trunk.experts.count", "trunk.experts.used",
    "trunk.experts.shared_feed_forward_size", "trunk.experts.scale",
    # a zero in these keys means "none" to llama.cpp, and would mean something else here
    "attention_value_scale", "attention_scale", "embedding_scale", "logit_scale", "logit_softcap", "experts.scale",
)  # fmt: skip
