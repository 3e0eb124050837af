"""What DSpark adds to DFlash in torch: a Markov head that lets each draft depend on the one before, and a confidence.

Source of the algorithm: deepseek-ai/DeepSpec (arXiv 2606.18132) and llama.cpp's `src/models/dflash.cpp` (11434).

Shapes: count drafts, H hidden, V the target's vocabulary, D rows of the drafter's own (V where it is not reduced),
R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, followed


class MarkovHead(nn.Module):
    """A bigram of low rank on top of the block's logits."""

    def __init__(self, rank: int, vocab: int, draft_vocab: int) -> None:
        super().__init__()
        self.markov_w1 = nn.Embedding(vocab, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab, bias=False)

    def forward(
        self, logits: Tensor, anchor: int, follow: Sequence[int] | None, spread: Callable[[Tensor], Tensor]
    ) -> Drafted:
        """Logits (count, D) -> drafts, and the logits (count, V) with each one's bias; `spread` maps (D,) to (V,)."""
        before, tokens, biased = anchor, list[Tensor](), list[Tensor]()
        for own in logits:
            row = spread(own + self.markov_w2(self.markov_w1.weight[before]))
            tokens.append(row.argmax())
            biased.append(row)
            before = followed(tokens, follow)
        return Drafted(torch.stack(tokens), torch.stack(biased))


class ConfidenceHead(nn.Module):
    """How likely a draft is right, by its final state and the row of the token before it: where drafting may stop.

    Drafts do not depend on it, and nothing here stops early: every runtime is told to draft all of them.
    """

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1, bias=bias)
