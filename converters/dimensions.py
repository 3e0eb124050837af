"""Every width a drafter tensor can have, in words: rules say shapes with these, in torch order [out, in]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from convert_drafter.converters.spec import DrafterSpec

T = TypeVar("T")

DIMENSIONS: dict[str, Callable[[DrafterSpec], int]] = {
    "one": lambda s: 1,
    "two": lambda s: 2,
    "three": lambda s: 3,
    "hidden": lambda s: s.hidden_size,
    "pair": lambda s: 2 * s.hidden_size,
    "rotated_pairs": lambda s: s.rope.dimensions // 2,
    "features": lambda s: len(s.capture_layers) * s.target_hidden_size,
    "heads": lambda s: s.head_count,
    "head_dim": lambda s: s.head_dim,
    "queries": lambda s: s.head_count * s.head_dim,
    "keys": lambda s: s.kv_head_count * s.head_dim,
    "experts": lambda s: _part(s.experts).count,
    "expert_hidden": lambda s: _part(s.experts).latent_size or s.hidden_size,
    "shared_feed_forward": lambda s: _part(_part(s.experts).shared_feed_forward_size),
    "queries and gates": lambda s: 2 * s.head_count * s.head_dim,
    "embedding and state": lambda s: 2 * s.hidden_size,
    "target_hidden": lambda s: s.target_hidden_size,
    "target's embedding and state": lambda s: 2 * s.target_hidden_size,
    "query_rank": lambda s: _query_rank(s),
    "kv_rank": lambda s: _part(s.latent_attention).kv_rank,
    "kv_rank and rotated": lambda s: _part(s.latent_attention).kv_rank + s.rope.dimensions,
    "unrotated": lambda s: s.head_dim - s.rope.dimensions,
    "value_head_dim": lambda s: _part(s.latent_attention).value_head_dim,
    "values": lambda s: s.head_count * _part(s.latent_attention).value_head_dim,
    "heads of a group": lambda s: s.head_count * s.head_dim // _part(s.shared_key).output_groups,
    "outputs of groups": lambda s: _part(s.shared_key).output_groups * _part(s.shared_key).output_rank,
    "streams": lambda s: _part(s.streams).count,
    "all streams": lambda s: _part(s.streams).count * s.hidden_size,
    "mixing_rank": lambda s: _part(_part(s.streams).rank),
    "mixed streams": lambda s: _part(s.streams).count * (_part(s.streams).count + 2),  # in, out, and among each other
    "indexer_heads": lambda s: _part(s.indexer).head_count,
    "indexer_head_dim": lambda s: _part(s.indexer).head_dim,
    "indexer_queries": lambda s: _part(s.indexer).head_count * _part(s.indexer).head_dim,
    "qkv rows": lambda s: (s.head_count + s.kv_head_count) * s.head_dim + s.kv_head_count * s.value_width,
    "head outputs": lambda s: s.head_count * s.value_width,
    "feed_forward": lambda s: s.feed_forward_size,
    "vocab": lambda s: s.vocab_size,
    "draft_vocab": lambda s: s.draft_vocab_size or s.vocab_size,
    "markov_rank": lambda s: _part(s.markov_rank),
    "confidence": lambda s: s.hidden_size + _part(s.markov_rank),
    "taps": lambda s: _part(s.convolution).kernel_size,
    "kernels": lambda s: 2 * _part(s.convolution).kernel_size * s.hidden_size // _part(s.convolution).group_size,
    "selector_rank": lambda s: _part(s.selector).rank,
}


def _query_rank(spec: DrafterSpec) -> int:
    if spec.shared_key is not None:
        return spec.shared_key.query_rank
    return _part(_part(spec.latent_attention).query_rank)


def _part(part: T | None) -> T:
    """A feature that the kind of the rules cannot be without."""
    assert part is not None
    return part
