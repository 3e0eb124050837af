"""How sure a difference between two drafters is: a paired bootstrap over prompts.

Acceptance length is a ratio of sums, so prompts are drawn, never steps: the steps of one text depend on each other.
Source of the method: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapters 8 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert_drafter.converters.verify.acceptance import Acceptance

DRAWS = 10_000
SEED = 20  # the same answers for the same numbers
TAIL = 2.5  # percent below and above the interval
CHUNK = 1 << 21  # counts at once: memory stays bounded however many prompts there are
LEAST = 4  # prompts: fewer cannot show how much prompts differ


@dataclass(frozen=True)
class Difference:
    """Relative difference of the acceptance length of `file` to `original`, with its 95 % interval.

    -0.02 is 2 % worse. `needed` is how many more prompts would decide, None where these decide or none ever would.
    """

    relative: float
    low: float
    high: float
    prompts: int
    needed: int | None

    def holds(self, max_drop: float) -> bool | None:
        """True: not worse by more than `max_drop`; False: worse; None: these prompts do not tell."""
        if self.low >= -max_drop:
            return True
        return False if self.high < -max_drop else None


def compare(original: Sequence[Acceptance], file: Sequence[Acceptance], max_drop: float) -> Difference:
    """The difference over the same prompts, in the same order. Raises `ValueError` where they are not."""
    if len(original) != len(file) or not original:
        raise ValueError("a paired comparison needs both drafters on the same prompts")
    if any(walk.steps < 1 for walk in (*original, *file)):
        raise ValueError("a prompt without a verify step compares nothing")
    pairs = np.array(
        [(a.committed, a.steps, b.committed, b.steps) for a, b in zip(original, file, strict=True)], np.float64
    )  # (prompts, 4)
    relative = float(_relative(pairs.sum(0)))
    if list(original) == list(file):
        low = high = relative
    elif len(pairs) < LEAST:
        low, high = -math.inf, math.inf
    else:
        low, high = np.percentile(_relative(_drawn(pairs)), (TAIL, 100 - TAIL)).tolist()
    found = Difference(relative, low, high, len(pairs), None)
    if found.holds(max_drop) is not None:
        return found
    return Difference(relative, low, high, len(pairs), _needed(found, max_drop))


def length_interval(each: Sequence[Acceptance]) -> tuple[float, float] | None:
    """The 95 % interval of the acceptance length over prompts; None of too few."""
    if len(each) < LEAST:
        return None
    sums = _drawn(np.array([(walk.committed, walk.steps) for walk in each], np.float64))
    return _interval(sums[:, 0], sums[:, 1])


def position_intervals(each: Sequence[Acceptance]) -> tuple[tuple[float, float] | None, ...]:
    """The same of the share accepted at each draft position; () of too few prompts, None where nothing was drafted."""
    size = max((len(walk.drafted) for walk in each), default=0)
    if len(each) < LEAST or not size:
        return ()
    counts = np.zeros((len(each), 2, size))  # accepted, drafted
    for i, walk in enumerate(each):
        counts[i, :, : len(walk.drafted)] = walk.accepted, walk.drafted
    sums = _drawn(counts.reshape(len(each), -1)).reshape(DRAWS, 2, size)
    return tuple(_interval(sums[:, 0, i], sums[:, 1, i]) for i in range(size))


def _interval(parts: NDArray[np.float64], wholes: NDArray[np.float64]) -> tuple[float, float] | None:
    """Of the ratio, over the draws that have one."""
    there = wholes > 0
    if not there.any():
        return None
    low, high = np.percentile(parts[there] / wholes[there], (TAIL, 100 - TAIL)).tolist()
    return low, high


def _drawn(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums over prompts drawn with replacement, by how often each was drawn: (prompts, n) -> (DRAWS, n)."""
    random, count = np.random.default_rng(SEED), len(pairs)
    step = max(1, CHUNK // count)
    sizes = [min(step, DRAWS - start) for start in range(0, DRAWS, step)]
    return np.concatenate([random.multinomial(count, np.full(count, 1 / count), size) @ pairs for size in sizes])


def _relative(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 4) sums of committed and steps of both -> (...) length of the second over that of the first, minus one."""
    committed, steps, file_committed, file_steps = np.moveaxis(sums, -1, 0)
    relative: NDArray[np.float64] = (file_committed / file_steps) / (committed / steps) - 1
    return relative


def _needed(found: Difference, max_drop: float) -> int | None:
    """More prompts until an interval around the same difference leaves `-max_drop`: its width falls with the root."""
    if not math.isfinite(found.low):
        return LEAST - found.prompts
    distance = abs(found.relative + max_drop)
    half = (found.high - found.low) / 2
    if not distance:
        return None
    return max(1, math.ceil(found.prompts * (half / distance) ** 2) - found.prompts)
