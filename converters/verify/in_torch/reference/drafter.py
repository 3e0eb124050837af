"""What every torch reference can do, whatever its kind: read a text's states, and draft after a token.

A context is what a drafter keeps of the positions it has read. Only its own drafter looks into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from convert_drafter.converters.spec import DrafterSpec


class Tables(NamedTuple):
    """A target's embedding and output head, (vocab, H) each."""

    embedding: Tensor
    head: Tensor


class Drafted(NamedTuple):
    """Drafts (count,), and the logits (count, vocab) each was chosen by, given those before it."""

    tokens: Tensor
    logits: Tensor


class ReferenceDrafter(Protocol):
    """One drafter's mathematics. `depends` is whether a draft depends on the drafts before it.

    `embed_tokens` is the drafter's own embedding, None where it uses the target's.
    """

    spec: DrafterSpec
    depends: bool
    embed_tokens: nn.Embedding | None

    def read(self, context: Any, captured: Tensor, tokens: Sequence[int], tables: Tables) -> Any:
        """The context grown by captured states (n, K * H) of the next n positions; None is a context of nothing.

        `tokens` are the text's, from its first on, at least one for each position in the new context.
        """

    def until(self, context: Any, length: int) -> Any:
        """The context of the first `length` positions alone."""

    def draft(
        self, context: Any, anchor: int, count: int, tables: Tables, follow: Sequence[int] | None = None
    ) -> Drafted:
        """`count` drafts after `anchor`, the token at the first position that the context does not have.

        With `follow` each of them is drafted as if those before it had been these.
        """
