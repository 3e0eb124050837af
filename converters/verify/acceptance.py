"""Acceptance: what a walk of speculative decoding committed, per text or over many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Acceptance:
    """Verify steps, tokens they committed (the target's own included), drafts tried and right by draft position.

    A text's first token is the target's own before any drafting, and not counted.
    """

    steps: int
    committed: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def length(self) -> float:
        """Tokens committed per verify step."""
        return self.committed / self.steps if self.steps else 0.0

    @property
    def rate(self) -> float:
        """Accepted drafts over drafted ones."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else 0.0

    @property
    def by_position(self) -> tuple[float, ...]:
        """For each draft position, the share of its drafts that were accepted."""
        return tuple(a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True))


def matching(drafts: Sequence[int], tokens: Sequence[int]) -> int:
    """How many drafts are the text's tokens, from the first on."""
    pairs = enumerate(zip(drafts, tokens, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(drafts), len(tokens)))


def counted(steps: Iterable[tuple[int, int, int]], size: int) -> Acceptance:
    """Of verify steps (drafts before the text's end, how many were right, tokens committed), over `size` positions."""
    drafted, accepted, committed, count = [0] * size, [0] * size, 0, 0
    for drafts, right, tokens in steps:
        for i in range(drafts):
            drafted[i] += 1
            accepted[i] += i < right
        committed, count = committed + tokens, count + 1
    return Acceptance(count, committed, tuple(drafted), tuple(accepted))


def total(each: Iterable[Acceptance]) -> Acceptance:
    """The sum over texts; draft positions that one did not reach count as not drafted there."""
    walks = list(each)
    size = max((len(walk.drafted) for walk in walks), default=0)

    def added(name: str) -> tuple[int, ...]:
        return tuple(sum(counts[i] for w in walks if i < len(counts := getattr(w, name))) for i in range(size))

    return Acceptance(sum(w.steps for w in walks), sum(w.committed for w in walks), added("drafted"), added("accepted"))
