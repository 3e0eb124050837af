"""A DFlash drafter in torch, reading the hidden states of a target in torch."""

from __future__ import annotations

from collections.abc import Sequence

from convert_drafter.converters.errors import MissingEngine, Problems
from convert_drafter.converters.verify.job import INSTALL

try:
    import torch

    from convert_drafter.converters.verify.in_torch.reference.dflash import Context, DFlash, draft
    from convert_drafter.converters.verify.in_torch.target import TorchTarget
except ImportError as error:
    raise MissingEngine(f"{error.name}: not installed, and the torch engine needs it: {INSTALL}") from error

CHUNK = 512  # positions fused at once


class TorchDrafter:
    """A `DraftModel` over the reference. Its context, keys and values of all kept positions, only ever grows.

    `captures` are the target's layers in the order of fc's columns, by default the drafter's own; -1 is the
    embedding's output. Raises `Problems` where drafter and target differ in a width.
    """

    def __init__(self, drafter: DFlash, target: TorchTarget, captures: Sequence[int] | None = None) -> None:
        self.drafter, self.target = drafter, target
        self.captures = tuple(drafter.spec.capture_layers if captures is None else captures)
        self.length = 0  # positions in the context
        self.context: Context = []
        if problems := misfits(drafter, target):
            raise Problems(f"drafter and target {target.name}", problems)
        target.capture(self.captures)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.length, self.context = 0, []
        while self.length < len(tokens):
            self._read(min(CHUNK, len(tokens) - self.length))

    def draft(self, anchor: int, count: int) -> list[int]:
        """At most block_size - 1 drafts: the block was never longer in training."""
        count = min(count, self.drafter.spec.block_size - 1)
        if count < 1:
            return []
        logits = draft(self.drafter, self.target.embedding, self.target.head, self.context, anchor, count)
        drafts: list[int] = logits.argmax(-1).tolist()
        return drafts

    def advance(self, matched: int) -> None:
        self._read(matched + 1)

    def rollback(self) -> None:
        self._read(1)

    @torch.inference_mode()
    def _read(self, count: int) -> None:
        """Take the target's next `count` kept positions into the context."""
        start, stop = self.length, self.length + count
        states = self.target.captured(start, stop)
        captured = torch.cat([states[layer] for layer in self.captures], dim=-1)  # (count, K * H)
        new = self.drafter.inject(self.drafter.fuse(captured), torch.arange(start, stop, device=captured.device))
        old = self.context or [(k[..., :0, :], v[..., :0, :]) for k, v in new]
        pairs = zip(old, new, strict=True)
        self.context = [(torch.cat([a, k], dim=-2), torch.cat([b, v], dim=-2)) for (a, b), (k, v) in pairs]
        self.length = stop


def misfits(drafter: DFlash, target: TorchTarget) -> list[str]:
    """Widths in which the drafter cannot read this target."""
    spec, (vocab, hidden) = drafter.spec, target.embedding.shape
    pairs = [("target_hidden_size", spec.target_hidden_size, target.hidden_size)]
    if drafter.embed_tokens is None:
        pairs.append(("hidden_size", spec.hidden_size, hidden))
    found = [f"{name}: found {own}, expected the target's {other}" for name, own, other in pairs if own != other]
    if drafter.embed_tokens is None and spec.mask_token_id >= vocab:
        found.append(f"mask_token_id: found {spec.mask_token_id}, expected a row of the target's {vocab}")
    return found
