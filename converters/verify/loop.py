"""Speculative decoding, engine-free: a drafter guesses tokens, the target checks all of them in one forward.

Greedy: a draft is accepted where it is the target's own choice, so the text is the target's, whatever the drafter says.
Drafts are not trusted. Fewer than were asked for are verified as they are, more are cut off; an id that is none of the
vocabulary's counts as drafted and is not accepted, like all that follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from numbers import Integral
from statistics import median
from time import perf_counter
from typing import Protocol

from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.verify.acceptance import Acceptance, counted, matching


class TargetModel(Protocol):
    """A target with the cache of one text. The last token of a text, the anchor, is emitted but not yet processed."""

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end a text; they belong to it."""

    @property
    def vocab_size(self) -> int:
        """Token ids that `verify` takes are below it."""

    def prefill(self, prompt: Sequence[int]) -> int:
        """Forget any earlier text, process this prompt, return the greedy token after it."""

    def verify(self, tokens: Sequence[int]) -> list[int]:
        """Process tokens after those kept, in one forward; the greedy token after each, as many as `tokens`.

        All of them are kept until `keep` says otherwise.
        """

    def keep(self, count: int) -> None:
        """Keep the first `count` (1 or more) of the tokens last verified and forget the rest."""


class DraftModel(Protocol):
    """A drafter with its context of one text: everything the target keeps, never the anchor.

    `advance` and `rollback` come after the target's `keep`, so its states of the kept tokens may be read.
    """

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forget any earlier context and take these tokens, all that the target has processed."""

    def draft(self, anchor: int, count: int) -> list[int]:
        """Guess the `count` tokens after `anchor`, fewer where it cannot; the context stays as it is."""

    def advance(self, matched: int) -> None:
        """The anchor and the first `matched` (1 or more) drafts are committed and become context."""

    def rollback(self) -> None:
        """The anchor alone is committed and becomes context."""


@dataclass(frozen=True)
class Step:
    """One verify step: what it committed, the target's own last token included; times in seconds.

    `matched` drafts are right; those behind the end of the text count, but are not among `tokens`.
    """

    tokens: tuple[int, ...]
    drafted: int
    matched: int
    speculative: bool  # a drafter was asked, or would have been with a draft length above 0
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True)
class Decoded:
    """A text and the steps that wrote it; its first token came from the prompt's own forward."""

    tokens: tuple[int, ...]
    steps: tuple[Step, ...]
    num_draft: int

    @property
    def acceptance(self) -> Acceptance:
        """Over the speculative steps so far, `num_draft` positions; drafts behind the text's end are not counted."""
        starts = accumulate((len(step.tokens) for step in self.steps), initial=1)
        speculative = [(n, step) for n, step in zip(starts, self.steps, strict=False) if step.speculative]
        rooms = ((min(step.drafted, len(self.tokens) - n), step) for n, step in speculative)
        return counted(((drafts, step.matched, len(step.tokens)) for drafts, step in rooms), self.num_draft)

    @property
    def median_draft_ms(self) -> float:
        """Milliseconds of drafting in a step, the drafter's reading of what was committed included."""
        return _median_ms(step.draft_seconds for step in self.steps)

    @property
    def median_verify_ms(self) -> float:
        """Milliseconds of the target's part of a step, mending its cache included."""
        return _median_ms(step.verify_seconds for step in self.steps)


def _median_ms(seconds: Iterable[float]) -> float:
    values = list(seconds)
    return 1000 * median(values) if values else 0.0


@dataclass(frozen=True)
class Request:
    """One text to write. It joins in round `arrives`; its target's cache and its drafter's context are its own."""

    target: TargetModel
    prompt: Sequence[int]
    max_tokens: int
    drafter: DraftModel | None = None
    arrives: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise WrongUsage(f"max_tokens: found {self.max_tokens}, expected 0 or more")
        if not self.prompt:
            raise WrongUsage("prompt: found no token, expected at least one")


Watch = Callable[[int, Decoded], None]  # number of the request, its text so far: called after each of its steps


def accept_prefix(draft: Sequence[int], target: Sequence[int]) -> list[int]:
    """The tokens to commit: the target's choices up to and with the first that differs from the draft.

    `draft` (K,) follows the anchor, `target` (K + 1,) are the target's choices after the anchor and after each draft;
    between 1 and K + 1 tokens come back. Raises `ValueError` for another number of choices.
    """
    if len(target) != len(draft) + 1:
        raise ValueError(f"the target's choices must be one more than the {len(draft)} drafts, found {len(target)}")
    return list(target[: matching(draft, target) + 1])


def speculative_step(
    target: TargetModel, drafter: DraftModel | None, anchor: int, count: int, most: int | None = None
) -> Step:
    """Draft `count` tokens after the anchor, verify them in one forward, and leave both models as the text goes on.

    At most `most` tokens are committed, none after an end token; the last committed token is the next anchor.
    """
    start = perf_counter()
    guessed = list(drafter.draft(anchor, count))[:count] if drafter is not None and count else []
    drafts = _valid(guessed, target.vocab_size)
    drafted = perf_counter()
    accepted = accept_prefix(drafts, target.verify([anchor, *drafts]))
    tokens = _ended(accepted[:most], target.end_tokens)
    target.keep(len(tokens))
    verified = perf_counter()
    if drafter is not None:
        _follow(drafter, len(tokens) - 1)
    draft_seconds = drafted - start + perf_counter() - verified
    matched = len(accepted) - 1
    return Step(tuple(tokens), len(guessed), matched, drafter is not None, draft_seconds, verified - drafted)


def _valid(drafts: Sequence[int], vocab_size: int) -> list[int]:
    """The drafts before the first that is no token: NaN logits have given ids of all kinds (A1-34)."""
    wrong = (i for i, t in enumerate(drafts) if not isinstance(t, Integral) or not 0 <= t < vocab_size)
    return [int(token) for token in drafts[: next(wrong, len(drafts))]]


def _ended(tokens: list[int], end_tokens: frozenset[int]) -> list[int]:
    """Up to and with the first end token."""
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return tokens[: end + 1]


def _follow(drafter: DraftModel, matched: int) -> None:
    if matched > 0:
        drafter.advance(matched)
    else:
        drafter.rollback()


@dataclass
class _Writing:
    """A request under way. `reading` is whether its drafter's context is what the target has processed."""

    request: Request
    num_draft: int
    tokens: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    reading: bool = False

    @property
    def done(self) -> bool:
        ended = bool(self.tokens) and self.tokens[-1] in self.request.target.end_tokens
        return ended or len(self.tokens) >= self.request.max_tokens

    @property
    def decoded(self) -> Decoded:
        return Decoded(tuple(self.tokens), tuple(self.steps), self.num_draft)

    def begin(self) -> None:
        if not self.done:
            self.tokens.append(self.request.target.prefill(self.request.prompt))

    def step(self, drafter: DraftModel | None) -> None:
        wanted = self.request.max_tokens - len(self.tokens)
        if drafter is not None and not self.reading:  # lazily, and again after steps it did not see (A4-7)
            drafter.prefill([*self.request.prompt, *self.tokens[:-1]])
        self.reading = drafter is not None
        count = min(self.num_draft, wanted)
        step = speculative_step(self.request.target, drafter, self.tokens[-1], count, wanted)
        self.tokens += step.tokens
        self.steps.append(step)


def serve(requests: Sequence[Request], num_draft: int, watch: Watch | None = None) -> list[Decoded]:
    """Write all texts, a step of each in every round; each comes out as if it were alone.

    Where exactly one is being written and it has a drafter, that one drafts; otherwise all are decoded plainly (A4-1).
    Raises `WrongUsage` for a negative draft length; what an engine raises passes through.
    """
    if num_draft < 0:
        raise WrongUsage(f"num_draft: found {num_draft}, expected 0 or more")
    texts = [_Writing(request, num_draft) for request in requests]
    waiting, active, now = set(range(len(texts))), set[int](), 0
    while waiting or active:
        arrived = {n for n in waiting if requests[n].arrives <= now}
        waiting -= arrived
        for n in sorted(arrived):
            texts[n].begin()
        active = {n for n in active | arrived if not texts[n].done}
        for n in sorted(active):
            texts[n].step(requests[n].drafter if len(active) == 1 else None)
            if watch is not None:
                watch(n, texts[n].decoded)
        now = now + 1 if active else min((requests[n].arrives for n in waiting), default=now)
    return [text.decoded for text in texts]


def speculative_loop(
    target: TargetModel,
    drafter: DraftModel | None,
    prompt: Sequence[int],
    max_tokens: int,
    num_draft: int,
    watch: Watch | None = None,
) -> Decoded:
    """Write at most `max_tokens` tokens after the prompt, drafting `num_draft` at a time; ends with an end token.

    Without a drafter it is plain greedy decoding. Raises `WrongUsage` for an empty prompt or a negative number.
    """
    return serve([Request(target, prompt, max_tokens, drafter)], num_draft, watch)[0]


def greedy(target: TargetModel, prompt: Sequence[int], max_tokens: int) -> Decoded:
    """The target's own text: what speculative decoding has to give, token by token."""
    return speculative_loop(target, None, prompt, max_tokens, 0)
