"""What every torch reference can do, whatever its kind: read a text's states, and draft after a token.

A context is what a drafter keeps of the positions it has read. Only its own drafter looks into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from convert_drafter.converters.spec import DrafterSpec

NEVER = -1e30  # the logit of a token that is not in a reduced vocabulary; finite, so that a difference is a number
HEAD_ROWS = 2**15  # a head in fewer bits is widened piece by piece: whole, it takes gigabytes


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


def over_head(states: Tensor, head: Tensor) -> Tensor:
    """States (..., H) over `head` (rows, H), of any float dtype -> logits (..., rows) in the states' dtype."""
    return torch.cat([states @ rows.to(states.dtype).T for rows in head.split(HEAD_ROWS)], dim=-1)


def spread_over(vocab_size: int, d2t: Tensor | None, logits: Tensor) -> Tensor:
    """Logits over the drafter's own rows (..., rows) -> over the target's vocabulary (..., vocab_size)."""
    if d2t is None:
        return logits
    whole = logits.new_full((*logits.shape[:-1], vocab_size), NEVER)
    return whole.index_copy(-1, d2t.long(), logits)


def followed(tokens: Sequence[Tensor], follow: Sequence[int] | None) -> int:
    """The token that the next draft comes after: the last draft, or what stands in its place in `follow`."""
    i = len(tokens) - 1
    return int(tokens[i]) if follow is None or i >= len(follow) else follow[i]
