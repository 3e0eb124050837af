"""Parts of a drafter's facts that belong together: rotary embedding, windows, and features some kinds have."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from convert_drafter.converters.errors import BadFact

MROPE_SECTIONS = 4


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `method` is "linear" or "yarn"; `factor` is a ratio of context lengths; an optional number is None where it is the
    YaRN paper's (arXiv 2309.00071: PAPER below), said or unsaid.
    """

    method: str
    factor: float
    original_context_length: int | None = None
    extrapolation_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None

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


def yarn_attention(factor: float) -> float:
    """The paper's attention factor for a scaling factor; ggml's rope kernel multiplies it in by itself."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: base, rotated dimensions per head (the first ones, rotate-half), scaling.

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
        if self.dimensions <= 0 or self.dimensions % 2:
            raise BadFact("rope.dimensions", self.dimensions, "an even number above 0")
        if self.sections is not None and len(self.sections) != MROPE_SECTIONS:
            raise BadFact("rope.sections", self.sections, f"{MROPE_SECTIONS} widths")
        if self.scaling is not None and self.llama3 is not None:
            raise BadFact("rope.scaling.method", self.scaling.method, "one scaling, and there is Llama 3's as well")
        if self.proportion is not None and not 0 < self.proportion <= 1:
            raise BadFact("rope.proportion", self.proportion, "a share of the pairs, in (0, 1]")


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
class Experts:
    """A mixture in place of a feed-forward: `used` of `count` experts for a token, and one that is always used.

    An expert's own width is the drafter's `feed_forward_size`.
    """

    count: int
    used: int
    shared_feed_forward_size: int

    def __post_init__(self) -> None:
        if self.used > self.count:
            raise BadFact("experts.used", self.used, f"at most the {self.count} experts there are")
