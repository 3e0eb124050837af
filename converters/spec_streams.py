"""Parts of a drafter's facts that came with DeepSeek-V4 and Qwen4Exp: streams, and one key for all heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from convert_drafter.converters.errors import BadFact
from convert_drafter.converters.spec_parts import RopeScaling


@dataclass(frozen=True)
class SharedKey:
    """One key for all heads, which is its own value: the drafter's `head_dim` wide, the last `rope.dimensions` turned,
    in pairs of neighbours, and turned back in what a head gives.

    Queries come out of a state of `query_rank`. The heads of each of `output_groups` give `output_rank` numbers
    together.
    """

    query_rank: int
    output_groups: int
    output_rank: int


@dataclass(frozen=True)
class Streams:
    """Hyper-connections (arXiv 2409.19606): `count` states of a position in place of one, which every layer mixes.

    A state handed on is as wide as all of them side by side. Qwen4Exp gates the mixture through a state of `rank`;
    DeepSeek-V4 (mHC, arXiv 2512.24880) makes what mixes them add up to one both ways, in so many `iterations`, and
    `epsilon` keeps sums from zero.
    """

    count: int
    rank: int | None = None
    iterations: int | None = None
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.count < 2:
            raise BadFact("streams.count", self.count, "at least 2 streams")


COMPRESSION_RATIOS = (0, 4, 128)


@dataclass(frozen=True)
class Compression:
    """The target's layers that keep one key of several positions. A head has none, but its file is loaded as its
    target's.

    `ratios` are positions a key, 0 in a layer that only slides; these keys are turned by `theta` and `scaling`.
    """

    ratios: tuple[int, ...]  # one per layer of the target
    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise BadFact("compression.theta", self.theta, "a finite number above 0")
        if wrong := sorted(set(self.ratios) - set(COMPRESSION_RATIOS)):
            raise BadFact("compression.ratios", wrong, f"none but {', '.join(map(str, COMPRESSION_RATIOS))}")
