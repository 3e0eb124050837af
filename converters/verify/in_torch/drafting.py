"""A drafter on a text that is already known: what it would have drafted, and how much of that is right.

The same steps as the loop's, without the target in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verify.acceptance import Acceptance, counted, matching
from convert_drafter.converters.verify.in_torch.reference.dflash import Context, draft
from convert_drafter.converters.verify.in_torch.target import TorchTarget
from convert_drafter.converters.verify.in_torch.texts import Text
from convert_drafter.converters.verify.in_torch.weights import Weights, reference


@dataclass(frozen=True)
class Variant:
    """A drafter as some runtime would see it; `captures` are zero-based target layers, -1 the embedding's output."""

    name: str
    spec: DrafterSpec
    weights: Weights
    captures: tuple[int, ...]


def variant(name: str | Path, spec: DrafterSpec, weights: Weights) -> Variant:
    return Variant(str(name), spec, weights, spec.capture_layers)


class Reading:
    """A drafter that has read a whole text; every position of it can be drafted from."""

    def __init__(self, drafting: Drafting, text: Text, context: Context) -> None:
        self.text, self.size = text, drafting.variant.spec.block_size - 1
        self._drafting, self._context = drafting, context
        self._drafts: dict[int, list[int]] = {}
        self._last: tuple[int, Tensor] | None = None  # one block's logits: with a large vocabulary they are megabytes

    def logits(self, position: int) -> Tensor:
        """Logits (count, vocab) of the tokens after the one at `position`, as the loop would draft them there."""
        if self._last is None or self._last[0] != position:
            self._last = position, self._draft(position)
            self._drafts[position] = self._last[1].argmax(-1).tolist()
        return self._last[1]

    @torch.inference_mode()
    def _draft(self, position: int) -> Tensor:
        target, text = self._drafting.target, self.text
        count = min(self.size, text.limit - 1 - position)
        context = [(k[..., :position, :], v[..., :position, :]) for k, v in self._context]
        anchor = text.tokens[position]
        return draft(self._drafting.drafter, target.embedding, target.head, context, anchor, count)

    def drafts(self, position: int) -> list[int]:
        if position not in self._drafts:
            self.logits(position)
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
        captured = torch.cat([text.states[k] for k in self.variant.captures], dim=-1)  # (T, K * H)
        features = self.drafter.fuse(captured)
        return Reading(self, text, self.drafter.inject(features, torch.arange(len(captured))))

    def walk(self, text: Text) -> Acceptance:
        return self.read(text).walk()
