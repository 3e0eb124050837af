"""A drafter in torch, reading the hidden states of a target in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from convert_drafter.converters.errors import MissingEngine, Problems
from convert_drafter.converters.verify.job import INSTALL

try:
    import torch

    from convert_drafter.converters.verify.in_torch.reference.drafter import ReferenceDrafter
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
    from convert_drafter.converters.verify.in_torch.text import captures_of
except ImportError as error:
    raise MissingEngine(f"{error.name}: not installed, and the torch engine needs it: {INSTALL}") from error

CHUNK = 512  # positions fused at once


class TorchDrafter:
    """A `DraftModel` over the reference. Its context, of all kept positions, only ever grows.

    `captures` are the target's layers in the order of fc's columns, by default the drafter's own; -1 is the
    embedding's output. Raises `Problems` where drafter and target differ in a width.
    """

    def __init__(self, drafter: ReferenceDrafter, target: TorchTarget, captures: Sequence[int] | None = None) -> None:
        self.drafter, self.target = drafter, target
        self.captures = tuple(captures_of(drafter.spec) if captures is None else captures)
        self.length = 0  # positions in the context
        self.context: Any = None
        self._tokens: list[int] = []  # of those positions
        self._proposed: list[int] = []  # the anchor and the drafts after it
        if problems := misfits(drafter, target):
            raise Problems(f"drafter and target {target.name}", problems)
        target.capture(self.captures)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.length, self.context, self._tokens = 0, None, list(tokens)
        while self.length < len(tokens):
            self._read(min(CHUNK, len(tokens) - self.length))

    def draft(self, anchor: int, count: int) -> list[int]:
        """At most `draft_length` drafts: a block was never longer in training."""
        count = min(count, self.drafter.spec.draft_length)
        drafts = [] if count < 1 else self._drafts(anchor, count)
        self._proposed = [anchor, *drafts]
        return drafts

    def _drafts(self, anchor: int, count: int) -> list[int]:
        drafts: list[int] = self.drafter.draft(self.context, anchor, count, self.target.tables).tokens.tolist()
        return drafts

    def advance(self, matched: int) -> None:
        self._tokens += self._proposed[: matched + 1]
        self._read(matched + 1)

    def rollback(self) -> None:
        self._tokens += self._proposed[:1]
        self._read(1)

    @torch.inference_mode()
    def _read(self, count: int) -> None:
        """Take the target's next `count` kept positions into the context."""
        start, stop = self.length, self.length + count
        states = self.target.captured(start, stop)
        captured = torch.cat([states[layer] for layer in self.captures], dim=-1)  # (count, K * H)
        self.context = self.drafter.read(self.context, captured, self._tokens, self.target.tables)
        self.length = stop


def misfits(drafter: ReferenceDrafter, target: TorchTarget) -> list[str]:
    """Widths in which the drafter cannot read this target."""
    spec, (vocab, hidden) = drafter.spec, target.embedding.shape
    pairs = [("target_hidden_size", spec.target_hidden_size, target.hidden_size)]
    if drafter.embed_tokens is None:
        pairs.append(("hidden_size", spec.hidden_size, hidden))
    found = [f"{name}: found {own}, expected the target's {other}" for name, own, other in pairs if own != other]
    if drafter.embed_tokens is None and spec.mask_token_id is not None and spec.mask_token_id >= vocab:
        found.append(f"mask_token_id: found {spec.mask_token_id}, expected a row of the target's {vocab}")
    return found
