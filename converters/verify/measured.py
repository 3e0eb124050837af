"""What an engine measured, as plain numbers: the gates decide on these, whichever engine they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from convert_drafter.converters.verify.acceptance import Acceptance

Watch = Callable[[str, int, int], None]  # phase, done, of how many


@dataclass(frozen=True)
class Agreement:
    """Drafts of two drafters on the same inputs, by draft position: how many were compared, how many were equal.

    `divergence` is the sum of KL(original || file) over them, in nats; `lacking` are drafts that a shorter block of the
    file does not have, which count as differing.
    """

    compared: tuple[int, ...] = ()
    equal: tuple[int, ...] = ()
    divergence: float = 0.0
    lacking: int = 0

    @property
    def top1(self) -> float:
        """Share of equal first choices."""
        return sum(self.equal) / sum(self.compared) if self.compared else 1.0

    @property
    def kl(self) -> float:
        """Mean divergence of a draft, nats."""
        return self.divergence / sum(self.compared) if self.compared else 0.0

    @property
    def top1_by_position(self) -> tuple[float, ...]:
        return tuple(e / c if c else 1.0 for e, c in zip(self.equal, self.compared, strict=True))

    def __add__(self, other: Self) -> Agreement:
        if not self.compared or not other.compared:
            return self if self.compared else other
        return Agreement(
            tuple(map(sum, zip(self.compared, other.compared, strict=True))),
            tuple(map(sum, zip(self.equal, other.equal, strict=True))),
            self.divergence + other.divergence,
            self.lacking + other.lacking,
        )


@dataclass(frozen=True)
class Loss:
    """A prompt whose text with the drafter differs from the target's own, from token `at` of the continuation on.

    `margin` is how far apart the target's two best tokens are there, in nats; None where nobody knows.
    """

    prompt: str
    at: int
    margin: float | None


@dataclass(frozen=True)
class Measured:
    """Per prompt, in one order; `texts` are the target's continuations. Without a source `originals` is empty.

    `expected` compares the original with its noisy twin: what quantization alone would do.
    """

    prompts: tuple[str, ...] = ()
    texts: tuple[tuple[int, ...], ...] = ()
    files: tuple[Acceptance, ...] = ()
    originals: tuple[Acceptance, ...] = ()
    losses: tuple[Loss, ...] = ()
    agreement: Agreement = field(default_factory=Agreement)
    expected: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class SweepPoint:
    """Acceptance with a context of `context` tokens, per prompt."""

    context: int
    files: tuple[Acceptance, ...]
    originals: tuple[Acceptance, ...]
