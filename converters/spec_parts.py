"""Parts of a drafter's facts that belong together: rotary embedding, windows, and features some kinds have."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from convert_drafter.converters.errors import BadFact

MROPE_SECTIONS = 4
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu")  # llama.cpp's names; both GELUs are the one of tanh
NO_TURN = 1.0  # the theta of what is not rotated at all


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `method` is "linear" or "yarn"; `factor` is a ratio of context lengths; an optional number is None where it is the
    YaRN paper's (arXiv 2309.00071: PAPER below), said or unsaid. With a `log_multiplier` scores are multiplied by the
    square of 0.1 * log_multiplier * ln(factor) + 1 (DeepSeek-V2's mscale_all_dim).
    """

    method: str
    factor: float
    original_context_length: int | None = None
    extrapolation_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    log_multiplier: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "method" and value is not None and not (math.isfinite(value) and value > 0):
                raise BadFact(f"rope.scaling.{field.name}", value, "a finite number above 0")


@dataclass(frozen=True)
class Llama3Bands:
    """Llama 3's scaling by bands of wavelengths: short ones keep their frequency, long ones are divided by `factor`.

    A wavelength counts by how often it fits into the original context: more than `high_freq_factor` times is short,
    less than `low_freq_factor` times is long, and in between is blended.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int  # tokens

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise BadFact(f"rope.llama3.{field.name}", value, "a finite number above 0")
        if self.high_freq_factor <= self.low_freq_factor:
            low = f"above low_freq_factor {self.low_freq_factor}"
            raise BadFact("rope.llama3.high_freq_factor", self.high_freq_factor, low)


# What YaRN's parameters are when nobody says otherwise.
PAPER = {"extrapolation_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}


def yarn_attention(factor: float, multiplier: float = 1.0) -> float:
    """The paper's attention factor for a scaling factor; ggml's rope kernel multiplies it in by itself."""
    return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, rotated dimensions per head (the first ones, rotate-half), scaling; `NO_ROPE` for none.

    `sections` is None unless the target positions its tokens with M-RoPE; then it holds the four section widths. With a
    `proportion` only so large a share of the pairs turns, the first ones; the others stay as they are.
    """

    theta: float
    dimensions: int
    scaling: RopeScaling | None = None
    sections: tuple[int, ...] | None = None
    llama3: Llama3Bands | None = None
    proportion: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise BadFact("rope.theta", self.theta, "a finite number above 0")
        if (self.theta, self.dimensions) != (NO_TURN, 0) and (self.dimensions <= 0 or self.dimensions % 2):
            raise BadFact("rope.dimensions", self.dimensions, "an even number above 0")
        if self.sections is not None and len(self.sections) != MROPE_SECTIONS:
            raise BadFact("rope.sections", self.sections, f"{MROPE_SECTIONS} widths")
        if self.scaling is not None and self.llama3 is not None:
            raise BadFact("rope.scaling.method", self.scaling.method, "one scaling, and there is Llama 3's as well")
        if self.proportion is not None and not 0 < self.proportion <= 1:
            raise BadFact("rope.proportion", self.proportion, "a share of the pairs, in (0, 1]")


NO_ROPE = Rope(NO_TURN, 0)


@dataclass(frozen=True)
class SlidingWindow:
    """A key is visible to a query of a sliding layer while `query position - key position < size` (tokens)."""

    size: int
    layers: tuple[bool, ...]  # one per layer, True = sliding

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise BadFact("window.size", self.size, "a number of tokens above 0")
        if not any(self.layers):
            raise BadFact("window.layers", self.layers, "at least one sliding layer (else the drafter has no window)")


@dataclass(frozen=True)
class SlidingLayers:
    """What sliding layers have otherwise than the full ones (Gemma 4): the width of a head, and how it is turned."""

    head_dim: int
    theta: float
    dimensions: int

    def __post_init__(self) -> None:
        if self.head_dim <= 0:
            raise BadFact("sliding.head_dim", self.head_dim, "a number above 0")
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise BadFact("sliding.theta", self.theta, "a finite number above 0")
        if not 0 < self.dimensions <= self.head_dim or self.dimensions % 2:
            raise BadFact("sliding.dimensions", self.dimensions, f"an even number, at most {self.head_dim}")


@dataclass(frozen=True)
class Convolution:
    """DFlash2's filters along a block: taps (the current token is the first), channels that share a dynamic kernel."""

    kernel_size: int
    group_size: int


@dataclass(frozen=True)
class Selector:
    """DFlash2's choice among the `top_k` likeliest tokens of a position, by codebooks of `rank` columns."""

    rank: int
    top_k: int


@dataclass(frozen=True)
class LinearAttention:
    """The target's layers of gated delta net (Qwen3.5). A head has none, but its file is loaded as its target's.

    Widths of heads in numbers, `kernel_size` in taps; `interval` is the target's own word for every so manieth layer
    that is none of them.
    """

    kernel_size: int
    key_head_dim: int
    key_head_count: int
    value_head_count: int
    value_head_dim: int
    layers: tuple[bool, ...]  # one per layer of the target, True = linear
    interval: int | None = None


@dataclass(frozen=True)
class LatentAttention:
    """Queries, and keys with values, out of narrow states (DeepSeek-V2, arXiv 2405.04434): MLA.

    `query_rank` and `kv_rank` are the widths of these states. A head's key is the drafter's `head_dim` wide; its last
    `rope.dimensions`, in pairs of neighbours, are rotated and the same in all heads. A value is `value_head_dim` wide.
    Without a `query_rank` queries come out of the hidden state itself.
    """

    kv_rank: int
    value_head_dim: int
    query_rank: int | None = None


@dataclass(frozen=True)
class Indexer:
    """What chooses the `top_k` positions that a query of sparse attention looks at (DeepSeek-V3.2, arXiv 2512.02556).

    `layers` says which of the target's layers choose for themselves, where not all do: the others take over the choice
    of the layer before. With a `pool_size` so many positions in a row are chosen together, by the mean of their keys
    (Qwen4Exp).
    """

    head_count: int
    head_dim: int
    top_k: int
    layers: tuple[bool, ...] | None = None  # one per layer of the target, True = chooses
    pool_size: int | None = None

    def __post_init__(self) -> None:
        if self.pool_size is not None and self.pool_size < 2:
            raise BadFact("indexer.pool_size", self.pool_size, "at least 2 positions that are chosen together")
        if self.pool_size is not None and self.top_k % self.pool_size:
            raise BadFact("indexer.top_k", self.top_k, f"a multiple of the {self.pool_size} chosen together")


@dataclass(frozen=True)
class DeltaAttention:
    """The target's layers of Kimi delta attention (arXiv 2510.26692). A head has none, but its file is loaded as its
    target's.

    `kernel_size` in taps, `head_dim` of queries, keys and values alike; `lower_bound` is that of the forget gate, in
    log space.
    """

    kernel_size: int
    head_dim: int
    lower_bound: float
    layers: tuple[bool, ...]  # one per layer of the target, True = delta attention

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lower_bound) and self.lower_bound < 0):
            raise BadFact("delta_attention.lower_bound", self.lower_bound, "a finite number below 0")


SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


@dataclass(frozen=True)
class Experts:
    """A mixture in place of a feed-forward: `used` of `count` experts for a token, and one that is always used.

    An expert's own width is the drafter's `feed_forward_size`. How experts are chosen and weighed is None where it
    goes without saying for the kind: `scoring` makes scores of a router's outputs, `normed` makes those of the chosen
    experts add up to one, `scale` multiplies them. Only experts in the `groups_used` best of `groups` are chosen. They
    read and give states of `latent_size`, where that is not the drafter's hidden size. What goes into an activation is
    cut off at `limit`.
    """

    count: int
    used: int
    shared_feed_forward_size: int | None = None
    scoring: str | None = None
    normed: bool | None = None
    scale: float | None = None
    groups: int | None = None
    groups_used: int | None = None
    latent_size: int | None = None
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.used > self.count:
            raise BadFact("experts.used", self.used, f"at most the {self.count} experts there are")
        if self.scoring not in (None, *SCORINGS):
            raise BadFact("experts.scoring", self.scoring, f"one of {', '.join(SCORINGS)}")
        groups, used = self.groups or 1, self.groups_used or 1
        if self.count % groups:
            raise BadFact("experts.groups", self.groups, f"a divisor of {self.count} experts")
        if used > groups or self.used > used * (self.count // groups):
            raise BadFact("experts.groups_used", self.groups_used, f"up to {groups}, that hold the {self.used} used")


@dataclass(frozen=True)
class Trunk:
    """What only a target's own layers are built by: a head has no use for it, but its file is loaded as its target's.

    The first `dense_layer_count` layers are no mixtures; `feed_forward_size` is their width. Lists have an entry for
    each layer: which of them slide (over `window_size` tokens, where that is not the head's own), attend at all or are
    mixtures, how many heads they have, and where a mixture's activations are cut off (0: nowhere), of its experts and
    of the one that is always used. `rope_theta` and `llama3` are of full layers, where the head's slide; `experts` of a
    mixture that the head has none of, `expert_feed_forward_size` the width of one. In the first `hash_layer_count`
    layers a token itself says which experts it goes to.
    """

    dense_layer_count: int | None = None
    feed_forward_size: int | None = None
    window_size: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    attention_layers: tuple[bool, ...] = ()
    mixture_layers: tuple[bool, ...] = ()
    head_counts: tuple[int, ...] = ()
    kv_head_counts: tuple[int, ...] = ()
    rope_theta: float | None = None
    llama3: Llama3Bands | None = None
    experts: Experts | None = None
    expert_feed_forward_size: int | None = None
    expert_clamps: tuple[float, ...] = ()
    shared_clamps: tuple[float, ...] = ()
    hash_layer_count: int | None = None


@dataclass(frozen=True)
class StateSpace:
    """The target's Mamba-2 layers (Nemotron-H), in widths and counts; `kernel_size` in taps. A head has none."""

    kernel_size: int
    state_size: int
    group_count: int
    head_count: int
    head_dim: int
