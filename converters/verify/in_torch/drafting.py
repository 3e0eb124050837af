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
from convert_drafter.converters.verify.in_torch.chains import Follow, draft_chains, in_chains
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


AT_ONCE = 16  # chains drafted in one pass; the logits of as many are kept, a large vocabulary's are megabytes


class Reading:
    """A drafter that has read a whole text; every position of it can be drafted from."""

    def __init__(self, drafting: Drafting, text: Text, context: Any) -> None:
        self.text, self.size = text, drafting.variant.spec.draft_length
        self.at_once = AT_ONCE if in_chains(drafting.drafter) else 1  # positions it drafts from in one pass
        self._drafting, self._context = drafting, context
        self._drafts: dict[int, list[int]] = {}
        self._last: tuple[object, list[Drafted]] | None = None  # of the last request

    def drafted(self, positions: Sequence[int], follow: Follow | None = None) -> list[Drafted]:
        """What the loop would draft after the tokens at these positions; with `follow` as if it had drafted these."""
        follow = follow if self._drafting.drafter.depends else None
        asked = (tuple(positions), None if follow is None else tuple(map(tuple, follow)))
        if self._last is None or self._last[0] != asked:
            self._last = asked, self._draft(positions, follow)
            if follow is None:
                self._drafts |= {p: d.tokens.tolist() for p, d in zip(positions, self._last[1], strict=True)}
        return self._last[1]

    @torch.inference_mode()
    def _draft(self, positions: Sequence[int], follow: Follow | None) -> list[Drafted]:
        drafter, tokens, tables = self._drafting.drafter, self.text.tokens, self._drafting.target.tables
        counts = [min(self.size, self.text.limit - 1 - position) for position in positions]
        if in_chains(drafter):
            every = draft_chains(drafter, self._context, tokens, positions, max(counts), tables, follow)
            return [Drafted(*(part[:n] for part in chain)) for n, *chain in zip(counts, *every, strict=True)]
        told = [None] * len(positions) if follow is None else follow
        places = zip(positions, counts, told, strict=True)
        return [drafter.draft(drafter.until(self._context, p), tokens[p], n, tables, f) for p, n, f in places]

    def drafts(self, position: int) -> list[int]:
        if position not in self._drafts:
            self.drafted(range(position, min(position + self.at_once, len(self.text.tokens) - 1)))
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
