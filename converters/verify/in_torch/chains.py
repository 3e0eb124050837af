"""Chains drafted from many places of one text at once: what EAGLE-3 and MTP heads do, a row for each anchor.

A chain sees the positions before its anchor and its own drafts. So the anchors' queries stand beside each other in one
sequence, over the keys of the whole text and of every chain's drafts, and a mask says which of them are whose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables
from convert_drafter.converters.verify.in_torch.reference.eagle3 import Context as Features
from convert_drafter.converters.verify.in_torch.reference.eagle3 import Eagle3
from convert_drafter.converters.verify.in_torch.reference.mtp import Context as States
from convert_drafter.converters.verify.in_torch.reference.mtp import Mtp

Follow = Sequence[Sequence[int]]  # for each anchor the tokens that its drafts come after
# Tokens (A,), states (A, H), positions (A,), what is known, and where each may look (A, known + A)
#   -> states (A, H), their logits (A, vocab), and what is known with these A at its end.
Step = Callable[[Tensor, Tensor, Tensor, Any, Tensor], tuple[Tensor, Tensor, Any]]


class Start(NamedTuple):
    """Where A chains begin in a text of T positions."""

    states: Tensor  # (A, H): what stands before each anchor
    known: Any  # keys and values of the text, the same for all of them
    seen: Tensor  # (A,): how many of these each may see; its first draft is computed behind them
    step: Step


def of_eagle3(drafter: Eagle3, context: Features, anchors: Tensor, tables: Tables) -> Start:
    """Pair p - 1, the anchor at p with the feature before it, comes behind the p - 1 pairs that are complete."""

    def step(tokens: Tensor, states: Tensor, at: Tensor, known: Any, visible: Tensor) -> tuple[Tensor, Tensor, Any]:
        states, known = drafter(drafter.embed(tokens.tolist(), tables), states, at, known, visible)
        return states, drafter.spread(drafter.logits(states, tables.head)), known

    return Start(context.features[anchors - 1], context.past, anchors - 1, step)


def of_mtp(drafter: Mtp, context: States, anchors: Tensor, tables: Tables) -> Start:
    embedding, head = drafter.tables(tables)

    def step(tokens: Tensor, states: Tensor, at: Tensor, known: Any, visible: Tensor) -> tuple[Tensor, Tensor, Any]:
        states, known = drafter(embedding[tokens].to(states.dtype), states, at, known, visible)
        return states, drafter.logits(states, head), known

    return Start(context.states[anchors - 1], context[:2], anchors, step)


STARTS: Mapping[type, Callable[[Any, Any, Tensor, Tables], Start]] = {Eagle3: of_eagle3, Mtp: of_mtp}


def in_chains(drafter: Any) -> bool:
    """Whether `draft_chains` knows this drafter."""
    return type(drafter) in STARTS


@torch.no_grad()
def draft_chains(
    drafter: Any, context: Any, text: Sequence[int], anchors: Sequence[int], count: int, tables: Tables,
    follow: Follow | None = None,
) -> Drafted:  # fmt: skip
    """Drafts (A, count) and their logits (A, count, vocab) after each anchor, a position of the text that is not 0.

    `context` is of the whole text. As `ReferenceDrafter.draft` for each anchor, but for the order of additions.
    """
    places = torch.tensor(list(anchors), device=tables.embedding.device)
    states, known, seen, step = STARTS[type(drafter)](drafter, context, places, tables)
    visible = torch.arange(known[0].shape[-2], device=places.device) < seen[:, None]  # (A, T)
    itself = torch.eye(len(anchors), dtype=torch.bool, device=places.device)
    token = torch.tensor([text[place] for place in anchors], device=places.device)
    tokens, rows = list[Tensor](), list[Tensor]()
    for i in range(count):
        visible = torch.cat([visible, itself], dim=-1)
        states, logits, known = step(token, states, seen + i, known, visible)
        rows.append(logits)
        tokens.append(logits.argmax(-1))
        token = tokens[-1] if follow is None else _told(tokens[-1], i, follow)
    return Drafted(torch.stack(tokens, dim=1), torch.stack(rows, dim=1))


def _told(drafts: Tensor, i: int, follow: Follow) -> Tensor:
    """What the chains' next drafts come after: the i-th to follow, their own where there are fewer."""
    told = [chain[i] if i < len(chain) else int(own) for chain, own in zip(follow, drafts, strict=True)]
    return torch.tensor(told, device=drafts.device)
