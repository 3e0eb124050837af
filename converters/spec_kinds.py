"""Which facts a kind of drafter cannot be without, beside those of every drafter; and which kinds are heads."""

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
_SLIDING_TRUNK = frozenset(
    f"trunk.{name}" for name in ("dense_layer_count", "feed_forward_size", "window_size", "sliding_layers")
)
_SLIDING = frozenset({"window.size", "window.layers"}.union(
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
}
BEFORE_NORM = frozenset({"mtp-step35", "mtp-mimo2"})  # heads that read and hand on states before the final norm
HEADS = frozenset(kind for kind in OF_KIND if kind.startswith("mtp-"))  # their layers are further ones of their target
