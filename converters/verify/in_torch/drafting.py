"""A drafter on a text that is already known: what it would have drafted, and how much of that is right.

The same steps as the loop's, without the target in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.acceptance import Acceptance, counted, matching
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted
from convert_drafter.converters.verify.in_torch.target import TorchTarget
from convert_drafter.converters.verify.in_torch.text import captures_of
from convert_drafter.converters.verify.in_torch.texts import Text
from convert_drafter.converters.verify.in_torch.weights import Weights, reference


@dataclass(frozen=True)
class Variant:
    """A drafter as some runtime would see it.

    `captures` are zero-based target layers, or numbers below 0 that `text` has a name for.
    """

    name: str
    spec: DrafterSpec
    weights: Weights
    captures: tuple[int, ...]


def variant(name: str | Path, spec: DrafterSpec, weights: Weights) -> Variant:
    return Variant(str(name), spec, weights, captures_of(spec))


class Reading:
    """A drafter that has read a whole text; every position of it can be drafted from."""

    def __init__(self, drafting: Drafting, text: Text, context: Any) -> None:
        self.text, self.size = text, drafting.variant.spec.draft_length
        self._drafting, self._context = drafting, context
        self._drafts: dict[int, list[int]] = {}
        self._last: tuple[object, Drafted] | None = None  # one step's logits: a large vocabulary's are megabytes

    def drafted(self, position: int, follow: Sequence[int] | None = None) -> Drafted:
        """What the loop would draft after the token at `position`; with `follow` as if it had drafted these."""
        follow = follow if self._drafting.drafter.depends else None
        asked = (position, None if follow is None else tuple(follow))
        if self._last is None or self._last[0] != asked:
            self._last = asked, self._draft(position, follow)
            if follow is None:
                self._drafts[position] = self._last[1].tokens.tolist()
        return self._last[1]

    @torch.inference_mode()
    def _draft(self, position: int, follow: Sequence[int] | None) -> Drafted:
        drafter, text = self._drafting.drafter, self.text
        count = min(self.size, text.limit - 1 - position)
        context = drafter.until(self._context, position)
        return drafter.draft(context, text.tokens[position], count, self._drafting.target.tables, follow)

    def drafts(self, position: int) -> list[int]:
        if position not in self._drafts:
            self.drafted(position)
        return self._drafts[position]

    def steps(self) -> Iterator[tuple[int, list[int], int]]:
        """Speculative decoding of the text: each anchor's position, its drafts, and how many of them are right."""
        position, end = self.text.prompt_length, len(self.text.tokens) - 1  # the first token is the target's own
        while position < end:
            drafts = self.drafts(position)[: end - position]
            right = matching(drafts, self.text.tokens[position + 1 :])
            yield position, drafts, right
            position += min(right + 1, end - position)

    def walk(self) -> Acceptance:
        end = len(self.text.tokens) - 1
        steps = ((len(drafts), right, min(right + 1, end - position)) for position, drafts, right in self.steps())
        return counted(steps, self.size)


class Drafting:
    """A variant ready to draft for a target."""

    def __init__(self, variant: Variant, target: TorchTarget) -> None:
        self.variant, self.target = variant, target
        self.drafter = reference(variant.spec, variant.weights)

    @torch.inference_mode()
    def read(self, text: Text) -> Reading:
        context = self.drafter.read(None, captured_states(text, self.variant), text.tokens, self.target.tables)
        return Reading(self, text, context)

    def walk(self, text: Text) -> Acceptance:
        return self.read(text).walk()


def captured_states(text: Text, variant: Variant) -> Tensor:
    """States of a text after the capture layers, side by side: (T, K * H)."""
    return torch.cat([text.states[k] for k in variant.captures], dim=-1)
