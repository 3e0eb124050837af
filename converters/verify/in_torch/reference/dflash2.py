"""What DFlash2 adds to DFlash in torch: convolutions along the block, and the choice of each draft by the one before.

Source of the algorithm: llama.cpp's `src/models/dflash.cpp` and `common/speculative.cpp` (11434), where the published
checkpoints draft.

Shapes: Q block positions, H hidden, k taps, g groups, V vocabulary, R rank, C candidates of a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convert_drafter.converters import spec as facts
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, followed


class Convolution(nn.Module):
    """A causal filter along one block. Its kernel is a fixed one plus one made of the sublayer's normed input.

    Side 0 filters what goes into the sublayer, side 1 what comes out; nothing is seen before the block's first token.
    """

    def __init__(self, part: facts.Convolution, hidden: int) -> None:
        super().__init__()
        self.taps, self.group = part.kernel_size, part.group_size
        groups = hidden // part.group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, part.kernel_size, hidden))
        self.kernel_projection = nn.Linear(hidden, 2 * part.kernel_size * groups, bias=False)

    def kernels(self, normed: Tensor) -> Tensor:
        """(..., Q, H) -> (2, ..., Q, k, H): a tap's weight for every channel, by side."""
        dynamic = self.kernel_projection(normed).unflatten(-1, (2, self.taps, -1))  # (..., Q, 2, k, g)
        return dynamic.repeat_interleave(self.group, dim=-1).movedim(-3, 0) + self._base(normed.ndim)

    def _base(self, dimensions: int) -> Tensor:
        """(2, k, H) with an axis for each leading dimension and the positions."""
        return self.base_kernel[(slice(None), *[None] * (dimensions - 1))]

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        """x (..., Q, H), kernel (..., Q, k, H) -> (..., Q, H): tap j weighs the token j places earlier."""
        length = x.shape[-2]
        earlier = [F.pad(x, (0, 0, j, 0))[..., :length, :] for j in range(self.taps)]
        return sum(kernel[..., j, :] * shifted for j, shifted in enumerate(earlier))


class CandidateSelector(nn.Module):
    """Among the likeliest tokens of each position, the one that goes best after the draft before it."""

    def __init__(self, part: facts.Selector, hidden: int, vocab: int) -> None:
        super().__init__()
        self.top_k = part.top_k
        self.hidden_projection = nn.Linear(hidden, part.rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab, part.rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab, part.rank))

    def forward(self, hidden: Tensor, logits: Tensor, anchor: int, follow: Sequence[int] | None) -> Drafted:
        """Final states (count, H) and logits (count, V) -> drafts, and the logits with the candidates' scores in."""
        unary, candidates = logits.topk(self.top_k, dim=-1)  # (count, C)
        states = self.hidden_projection(hidden)  # (count, R)
        before, tokens, scored = anchor, list[Tensor](), list[Tensor]()
        for i in range(len(logits)):
            pull = self.predecessor_codebook[before] * states[i]  # (R,)
            scores = unary[i] + self.successor_codebook[candidates[i]] @ pull  # (C,)
            tokens.append(candidates[i, scores.argmax()])
            scored.append(logits[i].scatter(0, candidates[i], scores))
            before = followed(tokens, follow)
        return Drafted(torch.stack(tokens), torch.stack(scored))
