"""Does drafting pay: what a verify step costs against what it commits, by draft length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from convert_drafter.converters.verify.acceptance import Acceptance


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one step: plain decoding of a token, drafting n tokens, and verifying them with their anchor."""

    plain: float
    draft: Mapping[int, float]
    verify: Mapping[int, float]

    def step(self, length: int) -> float:
        """One speculative step with `length` drafts; between measured lengths times are interpolated."""
        return _between(self.draft, length) + _between(self.verify, length)


def _between(times: Mapping[int, float], length: int) -> float:
    known = sorted(times)
    return float(np.interp(length, known, [times[n] for n in known]))


@dataclass(frozen=True)
class Payoff:
    """`break_even` is the acceptance length at which drafting `length` tokens costs as much as plain decoding."""

    length: int
    break_even: float
    speedup: tuple[float, ...]  # by draft length, 1 first

    @property
    def best_length(self) -> int:
        return 1 + max(range(len(self.speedup)), key=self.speedup.__getitem__)


def payoff(walk: Acceptance, times: StepTimes) -> Payoff:
    """The speed-up to expect at each draft length from the acceptance curve and the measured times."""
    speedup = [expected * times.plain / times.step(n) for n, expected in enumerate(expected_lengths(walk), 1)]
    length = len(speedup)
    return Payoff(length, times.step(length) / times.plain, tuple(speedup))


def expected_lengths(walk: Acceptance) -> list[float]:
    """Tokens a step commits with 1, 2 ... drafts: the target's own, and each draft as often as it was reached."""
    return [1 + reached for reached in accumulate(walk.by_position)]


def lengths_to_time(size: int) -> Sequence[int]:
    """Draft lengths worth timing: few, and the longest."""
    return sorted({n for n in (1, 2, 4, 8, 16, 32) if n < size} | {size})
