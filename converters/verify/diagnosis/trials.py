"""Trials: what a drafter does with some of its facts or weights mended, quickly on a passage or on whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.verify.acceptance import Acceptance, matching, total
from convert_drafter.converters.verify.diagnosis.view import View
from convert_drafter.converters.verify.in_torch.chains import draft_chains, in_chains
from convert_drafter.converters.verify.in_torch.drafting import Drafting, Variant, captured_states
from convert_drafter.converters.verify.in_torch.reference.dflash import Context, DFlash
from convert_drafter.converters.verify.in_torch.reference.drafter import Drafted, Tables
from convert_drafter.converters.verify.in_torch.same_drafts import compare
from convert_drafter.converters.verify.in_torch.target import TorchTarget
from convert_drafter.converters.verify.in_torch.texts import Text
from convert_drafter.converters.verify.measured import Agreement

PASSAGES, ANCHORS = 4, 16  # texts that are looked at, and neighbouring positions of each that are drafted from at once
BEYOND = 1e9  # nats: what drafts that are no numbers diverge by
COMPARED = 2  # every second of them: distributions are large


@dataclass(frozen=True)
class Score:
    """Tokens per verify step, and mean KL from the original in nats (None without one)."""

    length: float
    kl: float | None


@dataclass(frozen=True)
class Measurement:
    """A drafter on all texts."""

    walks: tuple[Acceptance, ...]
    kl: float | None

    @property
    def length(self) -> float:
        return total(self.walks).length

    @property
    def score(self) -> Score:
        return Score(self.length, self.kl)


@dataclass(frozen=True)
class Passage:
    """Neighbouring positions of a text; `wanted` are the original's log-probabilities (compared, drafts, vocab)."""

    text: Text
    anchors: range
    wanted: Tensor | None


class Trials:
    """One target, its texts, and the original if there is one. Raises `WrongInput` without a text to draft on."""

    def __init__(self, target: TorchTarget, texts: Sequence[Text], original: Variant | None) -> None:
        if not texts:
            raise WrongInput("prompts: nothing to draft: the target ends every one of them at once; give others")
        self._target, self._texts = target, texts
        self._original = None if original is None else Drafting(original, target)
        self._passages = [self._passage(text) for text in spread_texts(texts, PASSAGES)]

    def measure(self, view: View) -> Measurement:
        """On all texts; divergence at the positions the original would be asked at."""
        drafting, agreement, walks = self._drafting(view), Agreement(), list[Acceptance]()
        for text in self._texts:
            reading = drafting.read(text)
            walks.append(reading.walk())
            if self._original is not None:
                agreement += compare(self._original.read(text), reading)
        return Measurement(tuple(walks), None if self._original is None else min(agreement.kl, BEYOND))

    def length(self, variant: Variant) -> float:
        """Acceptance length of a drafter that is only walked with."""
        drafting = Drafting(variant, self._target)
        return total(drafting.walk(text) for text in self._texts).length

    def screen(self, view: View) -> Score:
        """On the passages alone."""
        drafting, steps, committed, divergence, drafts = self._drafting(view), 0, 0, 0.0, 0
        for passage in self._passages:
            drafted = blocks(drafting, passage.text, passage.anchors)
            for right in walk(drafted.tokens.tolist(), passage):
                steps, committed = steps + 1, committed + right + 1
            if passage.wanted is not None:
                off, count = _divergence(passage.wanted, drafted.logits[::COMPARED])
                divergence, drafts = divergence + off, drafts + count
        return Score(committed / steps, None if self._original is None else divergence / drafts)

    def _drafting(self, view: View) -> Drafting:
        return Drafting(Variant("mended", view.spec, view.weights, view.captures), self._target)

    def _passage(self, text: Text) -> Passage:
        """In the middle of the continuation, away from where there are few tokens left to draft."""
        first, end = text.prompt_length, len(text.tokens) - 1
        start = first + max(0, end - first - 2 * ANCHORS) // 2
        anchors = range(start, min(end, start + ANCHORS))
        if self._original is None:
            return Passage(text, anchors, None)
        wanted = blocks(self._original, text, anchors).logits[::COMPARED].log_softmax(-1)
        return Passage(text, anchors, wanted)


@torch.inference_mode()
def blocks(drafting: Drafting, text: Text, anchors: range) -> Drafted:
    """Drafts (anchors, count) and their logits (anchors, count, vocab) f32 of all anchors; none sees another one."""
    count = min(drafting.variant.spec.draft_length, text.limit - 1 - anchors[-1])
    drafter, tables = drafting.drafter, drafting.target.tables
    context = drafter.read(None, captured_states(text, drafting.variant), text.tokens, tables)
    if in_chains(drafter):
        return draft_chains(drafter, context, text.tokens, anchors, count, tables)
    if isinstance(drafter, DFlash) and drafter.spec.convolution is None:
        each = blocks_at_once(drafter, context, text, anchors, count, tables)
    else:
        each = [drafter.draft(drafter.until(context, p), text.tokens[p], count, tables) for p in anchors]
    return Drafted(torch.stack([one.tokens for one in each]), torch.stack([one.logits.float() for one in each]))


def blocks_at_once(
    drafter: DFlash, context: Context, text: Text, anchors: range, count: int, tables: Tables
) -> list[Drafted]:
    """Every anchor's block in one pass: each sees the context before it, and itself."""
    spec, device = drafter.spec, tables.embedding.device
    embedding, head = drafter.tables(*tables)
    size = count if spec.sample_from_anchor else count + 1
    context_at = torch.arange(context[0][0].shape[-2], device=device)
    starts = torch.tensor(list(anchors), device=device)
    tokens = torch.full((len(anchors), size), spec.mask_token_id, device=device)
    tokens[:, 0] = torch.tensor([text.tokens[position] for position in anchors])
    at = (starts[:, None] + torch.arange(size, device=device)).flatten()  # (anchors * size,)
    mine = starts.repeat_interleave(size)
    sees_block = mine[:, None] == mine
    if spec.causal:
        sees_block = sees_block & (at[:, None] >= at)
    visible = torch.cat([context_at < mine[:, None], sees_block], dim=-1)
    hidden = drafter(embedding[tokens.flatten()].to(drafter.fc.weight.dtype), at, context, context_at, visible)
    hidden = hidden.unflatten(0, (len(anchors), size))[:, size - count :]
    logits = drafter.logits(hidden.flatten(0, 1), head).unflatten(0, (len(anchors), count))
    each = zip(hidden, logits, anchors, strict=True)
    return [drafter.choose(h, own, text.tokens[position], None) for h, own, position in each]


def walk(drafts: Sequence[Sequence[int]], passage: Passage) -> list[int]:
    """The verify steps within a passage: how many drafts are right in each."""
    steps, i = list[int](), 0
    while i < len(drafts):
        right = matching(drafts[i], passage.text.tokens[passage.anchors[i] + 1 :])
        steps.append(right)
        i += right + 1
    return steps


def spread_texts(texts: Sequence[Text], most: int) -> list[Text]:
    """A few texts, from the shortest to the longest."""
    ordered = sorted(texts, key=lambda text: len(text.tokens))
    count = min(most, len(texts))
    return [ordered[i * (len(texts) - 1) // max(1, count - 1)] for i in range(count)]


def _divergence(wanted: Tensor, logits: Tensor) -> tuple[float, int]:
    """Sum of KL over the drafts both have, and how many."""
    count = min(wanted.shape[1], logits.shape[1])
    wanted, found = wanted[:, :count], logits[:, :count].log_softmax(-1)
    off = (wanted.exp() * (wanted - found)).sum()
    return float(torch.nan_to_num(off, nan=BEYOND, posinf=BEYOND)), wanted.shape[0] * count
