"""The hub's facts: everything a drafter is, each fact one field with one unit and one convention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from convert_drafter.converters.errors import BadFact
from convert_drafter.converters.spec_kinds import BEFORE_NORM, HEADS, OF_KIND, POSITIVE
from convert_drafter.converters.spec_parts import (
    ACTIVATIONS,
    MROPE_SECTIONS,
    NO_ROPE,
    PAPER,
    Convolution,
    DeltaAttention,
    Experts,
    Indexer,
    LatentAttention,
    LinearAttention,
    Llama3Bands,
    Rope,
    RopeScaling,
    Selector,
    SlidingLayers,
    SlidingWindow,
    StateSpace,
    Trunk,
    yarn_attention,
)
from convert_drafter.converters.spec_streams import Compression, SharedKey, Streams

MAX_VOCAB = 2**24


@dataclass(frozen=True)
class DrafterSpec:
    """Every fact about one drafter. None says "this drafter has none"; OF_KIND lists what a kind cannot be without.

    Raises `BadFact` where two facts of one config contradict each other, or one that its kind needs is missing.
    """

    kind: str
    layer_count: int
    hidden_size: int
    feed_forward_size: int
    head_count: int
    kv_head_count: int
    head_dim: int
    context_length: int  # tokens
    vocab_size: int  # rows of the target's embedding
    norm_epsilon: float
    rope: Rope
    target_layer_count: int
    target_hidden_size: int
    causal: bool  # inside the block: may a token only look at earlier ones
    block_size: int | None = None  # tokens of one block, the anchor included; None where tokens are drafted one by one
    mask_token_id: int | None = None
    capture_layers: tuple[int, ...] = ()  # zero-based; hidden state AFTER target layer k; order is fc's column order
    window: SlidingWindow | None = None
    value_head_dim: int | None = None  # where values are not as wide as keys
    sliding: SlidingLayers | None = None  # of the window's layers, where heads and theta above are the full ones' alone
    kv_head_counts: tuple[int, ...] = ()  # of each layer, where kv_head_count is the full ones' alone
    context_theta: float | None = None  # base for the context's keys where it differs from rope.theta (MiMo)
    attention_value_scale: float | None = None
    attention_scale: float | None = None  # of scores, where it is not 1 / sqrt(head_dim)
    activation: str | None = None  # of the feed-forward, where it is not the one that goes without saying for the kind
    embedding_scale: float | None = None
    logit_scale: float | None = None
    logit_softcap: float | None = None
    convolution: Convolution | None = None
    selector: Selector | None = None
    markov_rank: int | None = None
    confidence_head: bool | None = None
    sample_from_anchor: bool | None = None  # the anchor's own place drafts the first token
    draft_vocab_size: int | None = None  # rows of the drafter's own head, where they are not the target's
    norm_before_residual: bool | None = None  # is the feature normed before it goes into the residual too
    norm_before_fc: bool | None = None  # are captured states normed before they are fused
    linear_attention: LinearAttention | None = None
    latent_attention: LatentAttention | None = None
    indexer: Indexer | None = None
    delta_attention: DeltaAttention | None = None
    shared_key: SharedKey | None = None
    streams: Streams | None = None
    compression: Compression | None = None
    experts: Experts | None = None
    trunk: Trunk | None = None
    state_space: StateSpace | None = None
    layer_norm_epsilon: float | None = None  # of norms that take the mean away first; norm_epsilon is the same then

    @property
    def first_layer(self) -> int:
        """The number of the drafter's first layer: an MTP head goes on counting where its target's layers end."""
        return self.target_layer_count if self.kind in HEADS else 0

    @property
    def layers(self) -> range:
        """The numbers of the drafter's layers."""
        return range(self.first_layer, self.first_layer + self.layer_count)

    def of_layer(self, layer: int | None) -> DrafterSpec:
        """The facts as they hold in one layer: a sliding one may have heads of its own, and turn them otherwise."""
        if layer is None or layer not in self.layers or self.sliding is None or self.window is None:
            return self
        counted = layer - self.first_layer
        kv_heads = self.kv_head_counts[counted] if self.kv_head_counts else self.kv_head_count
        if not self.window.layers[counted]:
            return replace(self, kv_head_count=kv_heads)
        own = Rope(self.sliding.theta, self.sliding.dimensions)
        return replace(self, head_dim=self.sliding.head_dim, kv_head_count=kv_heads, rope=own)

    @property
    def has_chained_heads(self) -> bool:
        """Whether each of its layers drafts one token; any other drafter runs all of them for every token."""
        return self.kind in HEADS and self.layer_count > 1

    @property
    def draft_length(self) -> int:
        """The most tokens drafted in one step: a block without its anchor; a chain ends where llama.cpp ends it."""
        if self.block_size is None:
            return self.layer_count if self.has_chained_heads else CHAIN_LENGTH
        return self.block_size if self.sample_from_anchor else self.block_size - 1

    @property
    def value_width(self) -> int:
        """How wide a head's values are."""
        return self.value_head_dim or self.head_dim

    @property
    def other_width(self) -> bool | None:
        """True where the target's embedding does not fit, and the drafter needs one of its own."""
        return self.hidden_size != self.target_hidden_size or None

    def __post_init__(self) -> None:
        facts = facts_of(self)
        for field in sorted(OF_KIND.get(self.kind, frozenset()) - set(facts)):
            raise BadFact(field, None, "a value")
        for field in POSITIVE:
            if facts.get(field, 1) <= 0:  # type: ignore[operator]
                raise BadFact(field, facts[field], "a number above 0")
        for field, ok, expected in self._contradictions():
            if not ok:
                raise BadFact(field, facts.get(field, getattr(self, field.split(".")[0])), expected)

    def _contradictions(self) -> list[tuple[str, bool, str]]:
        """(field, holds, expected) for every rule that one config can break."""
        layers, depth, block, mask = self.capture_layers, self.target_layer_count, self.block_size, self.mask_token_id
        parts = 1 if self.shared_key is None else self.shared_key.output_groups
        hashed = 0 if self.trunk is None else self.trunk.hash_layer_count or 0
        group = 1 if self.convolution is None else self.convolution.group_size
        return [
            ("kv_head_count", self.head_count % self.kv_head_count == 0, f"a divisor of head_count {self.head_count}"),
            ("block_size", block is None or block >= 2, "at least 2: the anchor and one drafted token"),
            ("vocab_size", self.vocab_size <= MAX_VOCAB, f"at most {MAX_VOCAB}, far above any tokenizer"),
            (
                "mask_token_id",
                mask is None or 0 <= mask < self.vocab_size,
                f"inside the vocabulary of {self.vocab_size}",
            ),
            ("capture_layers", len(set(layers)) == len(layers), "each target layer once"),
            ("capture_layers", all(0 <= k < depth for k in layers), f"zero-based, below the target's depth {depth}"),
            ("rope", self.rope.dimensions <= self.head_dim, f"at most head_dim {self.head_dim} rotated dimensions"),
            (
                "rope.dimensions",
                self.latent_attention is None or self.rope.dimensions < self.head_dim,
                f"below head_dim {self.head_dim}: a part of each key is not rotated",
            ),
            ("indexer.head_dim", self._fits_indexer(), f"at least the {self.rope.dimensions} rotated dimensions"),
            ("shared_key.output_groups", self.head_count % parts == 0, f"a divisor of head_count {self.head_count}"),
            ("trunk.hash_layer_count", hashed <= depth, f"at most the target's depth {depth}"),
            ("activation", self.activation in (None, *ACTIVATIONS), f"one of {', '.join(ACTIVATIONS)}"),
            ("context_theta", self.context_theta is None or self.context_theta > 0, "a theta above 0"),
            ("sliding.head_dim", self.sliding is None or self.window is not None, "none where no layer slides"),
            ("draft_vocab_size", (self.draft_vocab_size or 1) <= self.vocab_size, f"at most {self.vocab_size}"),
            ("convolution.group_size", self.hidden_size % group == 0, f"a divisor of hidden_size {self.hidden_size}"),
            *self._lengths(),
        ]

    def _fits_indexer(self) -> bool:
        """Where an indexer has heads like the others, as many of their dimensions are rotated (Qwen4Exp)."""
        own = self.indexer
        return own is None or own.pool_size is None or self.rope.dimensions <= own.head_dim

    def _lengths(self) -> Iterator[tuple[str, bool, str]]:
        """The same of lists with an entry for each layer, the drafter's or its target's."""
        facts, depth, count = facts_of(self), self.target_layer_count, self.layer_count
        window = count if self.window is None else len(self.window.layers)
        yield "window", window == count, f"one entry for each of {count} layers"
        own = self.kv_head_counts
        yield "kv_head_counts", len(own) in (0, count), f"one entry for each of {count} layers"
        divides = all(n > 0 and self.head_count % n == 0 for n in own)
        yield "kv_head_counts", divides, f"divisors of head_count {self.head_count}"
        for path in (*_OF_TARGET_LAYERS, *(f"trunk.{name}" for name in OF_EACH_LAYER)):
            entries: Any = facts.get(path, ())
            yield path, len(entries) in (0, depth), f"one entry for each of the target's {depth} layers"


CHAIN_LENGTH = 3
_OF_TARGET_LAYERS = ("linear_attention.layers", "delta_attention.layers", "indexer.layers", "compression.ratios")
OF_EACH_LAYER = (
    *("sliding_layers", "attention_layers", "mixture_layers", "head_counts", "kv_head_counts"),
    *("expert_clamps", "shared_clamps"),
)


# --- the spec as a flat table of facts: what dialects, inspect and doctor work on ---

_NESTED: dict[str, type] = {
    "rope": Rope,
    "rope.scaling": RopeScaling,
    "rope.llama3": Llama3Bands,
    "window": SlidingWindow,
    "sliding": SlidingLayers,
    "convolution": Convolution,
    "selector": Selector,
    "linear_attention": LinearAttention,
    "latent_attention": LatentAttention,
    "indexer": Indexer,
    "delta_attention": DeltaAttention,
    "shared_key": SharedKey,
    "streams": Streams,
    "compression": Compression,
    "compression.scaling": RopeScaling,
    "experts": Experts,
    "trunk": Trunk,
    "trunk.experts": Experts,
    "trunk.llama3": Llama3Bands,
    "state_space": StateSpace,
}


# Field paths that every drafter has.
COMMON = {field.name for field in fields(DrafterSpec) if field.default is MISSING and field.name != "rope"} | {
    "rope.theta",
    "rope.dimensions",
}


def required(kind: str) -> frozenset[str]:
    """Field paths that every drafter of a kind has."""
    return OF_KIND[kind] | COMMON


def facts_of(spec: DrafterSpec) -> dict[str, object]:
    """Field path -> value, nested facts as "rope.theta"; a feature the drafter does not have is left out."""
    return dict(_flatten(spec, ""))


def _flatten(part: object, prefix: str) -> Iterator[tuple[str, object]]:
    for field in fields(part):  # type: ignore[arg-type]
        path, value = f"{prefix}{field.name}", getattr(part, field.name)
        if path in _NESTED and value is not None:
            yield from _flatten(value, f"{path}.")
        elif value is not None and value != ():
            yield path, value


def spec_from(facts: Mapping[str, object]) -> DrafterSpec:
    """The inverse of `facts_of`. Raises `BadFact` naming a required fact that is missing or contradicts another."""
    spec: DrafterSpec = _build(DrafterSpec, facts, "")
    return spec


def _build(part: type, facts: Mapping[str, object], prefix: str) -> Any:
    values = {}
    for field in fields(part):
        path = f"{prefix}{field.name}"
        if path in _NESTED and any(name.startswith(f"{path}.") for name in facts):
            values[field.name] = _build(_NESTED[path], facts, f"{path}.")
        elif path in facts:
            values[field.name] = facts[path]
        elif field.default is MISSING:
            raise BadFact(path, None, "a value")
    return part(**values)


__all__ = [
    "ACTIVATIONS",
    "BEFORE_NORM",
    "CHAIN_LENGTH",
    "COMMON",
    "HEADS",
    "MAX_VOCAB",
    "MROPE_SECTIONS",
    "NO_ROPE",
    "OF_KIND",
    "PAPER",
    "Compression",
    "Convolution",
    "DeltaAttention",
    "DrafterSpec",
    "Experts",
    "Indexer",
    "LatentAttention",
    "LinearAttention",
    "Llama3Bands",
    "Rope",
    "RopeScaling",
    "Selector",
    "SharedKey",
    "SlidingLayers",
    "SlidingWindow",
    "StateSpace",
    "Streams",
    "Trunk",
    "facts_of",
    "required",
    "spec_from",
    "yarn_attention",
]
