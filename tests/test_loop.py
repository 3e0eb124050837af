"""Speculative decoding without an engine: whatever a drafter says, the text is the target's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.verify.acceptance import Acceptance
from convert_drafter.converters.verify.loop import (
    Decoded,
    Request,
    accept_prefix,
    greedy,
    serve,
    speculative_loop,
    speculative_step,
)

VOCAB = 50
PROMPT = (3, 1, 4)


def after(tokens: Sequence[int]) -> int:
    """The toy target's choice after these tokens: every one of them counts."""
    state = 7
    for token in tokens:
        state = (state * 31 + token * 17 + 5) % 1009
    return state % VOCAB


@dataclass
class Toy:
    """A target that knows its context only through the protocol, and counts forwards."""

    end_tokens: frozenset[int] = frozenset()
    choose: Callable[[Sequence[int]], int] = after
    vocab_size: int = VOCAB
    context: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)  # tokens of each verify
    pending: int | None = None

    def prefill(self, prompt: Sequence[int]) -> int:
        self.context, self.pending = list(prompt), None
        return self.choose(self.context)

    def verify(self, tokens: Sequence[int]) -> list[int]:
        assert self.pending is None, "keep comes between two verifications"
        assert all(0 <= token < self.vocab_size for token in tokens)
        self.forwards.append(len(tokens))
        start, self.pending = len(self.context), len(tokens)
        self.context += tokens
        return [self.choose(self.context[: start + i + 1]) for i in range(len(tokens))]

    def keep(self, count: int) -> None:
        assert self.pending is not None and 1 <= count <= self.pending
        del self.context[len(self.context) - self.pending + count :]
        self.pending = None

    def alone(self, prompt: Sequence[int], count: int) -> tuple[int, ...]:
        """The toy's own text, without any loop of ours."""
        tokens: list[int] = []
        while len(tokens) < count and not self.end_tokens.intersection(tokens):
            tokens.append(self.choose([*prompt, *tokens]))
        return tuple(tokens)


@dataclass
class Drafter:
    """Records its context as the protocol tells it; guesses with `guess(context with anchor, count)`."""

    guess: Callable[[Sequence[int], int], list[int]]
    context: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    prefills: int = 0
    last: list[int] = field(default_factory=list)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.context, self.prefills = list(tokens), self.prefills + 1

    def draft(self, anchor: int, count: int) -> list[int]:
        drafts = self.guess([*self.context, anchor], count)
        self.last = [anchor, *drafts]
        return drafts

    def advance(self, matched: int) -> None:
        assert matched >= 1
        self.calls.append(f"advance({matched})")
        self.context += self.last[: matched + 1]

    def rollback(self) -> None:
        self.calls.append("rollback")
        self.context += self.last[:1]


def perfect(context: Sequence[int], count: int) -> list[int]:
    drafts: list[int] = []
    for _ in range(count):
        drafts.append(after([*context, *drafts]))
    return drafts


def wrong(context: Sequence[int], count: int) -> list[int]:
    return [(token + 1) % VOCAB for token in perfect(context, count)]


def right_for(count: int) -> Callable[[Sequence[int], int], list[int]]:
    """The first `count` drafts are right, the others are not."""
    return lambda context, asked: [*perfect(context, asked)[:count], *wrong(context, asked)[count:]]


# --- accept_prefix ---


@pytest.mark.parametrize(
    ("draft", "target", "accepted"),
    [
        pytest.param([5, 3, 7], [5, 3, 7, 42], [5, 3, 7, 42], id="A2-3 all right, and the bonus"),
        pytest.param([5, 3, 7], [9, 3, 7, 42], [9], id="A2-4 the first differs"),
        pytest.param([5, 3, 7], [5, 3, 9, 42], [5, 3, 9], id="A2-5 the last differs"),
        pytest.param([5], [5, 6], [5, 6], id="A2-6 one, right"),
        pytest.param([5], [6, 5], [6], id="A2-6 one, wrong"),
        pytest.param([], [42], [42], id="A2-7 no draft"),
        pytest.param([5, 3, 7], [5, 9, 7, 42], [5, 9], id="A2-8 what is right again later does not count"),
    ],
)
def test_accept_prefix(draft: list[int], target: list[int], accepted: list[int]) -> None:
    assert accept_prefix(draft, target) == accepted


@pytest.mark.parametrize("count", [0, 3, 5])
def test_as_many_choices_as_tokens(count: int) -> None:
    """A2-2: K + 1 choices for K drafts, nothing else."""
    with pytest.raises(ValueError, match="must be one more than the 3 drafts"):
        accept_prefix([1, 2, 3], [1] * count)


@given(st.lists(st.integers(0, 2), max_size=8), st.data())
def test_accepted_are_the_targets_own(draft: list[int], data: st.DataObject) -> None:
    """A2-1, A2-8: between 1 and K + 1 tokens, a prefix of the target's choices, right but for the last."""
    target = data.draw(st.lists(st.integers(0, 2), min_size=len(draft) + 1, max_size=len(draft) + 1))
    accepted = accept_prefix(draft, target)
    assert 1 <= len(accepted) <= len(draft) + 1
    assert accepted == target[: len(accepted)]
    assert accepted[:-1] == draft[: len(accepted) - 1]
    assert len(accepted) == len(draft) + 1 or accepted[-1] != draft[len(accepted) - 1]


# --- one step ---


def begun(guess: Callable[[Sequence[int], int], list[int]]) -> tuple[Toy, Drafter, int]:
    """A target and a drafter that have read the prompt, and the anchor."""
    target, drafter = Toy(), Drafter(guess)
    anchor = target.prefill(PROMPT)
    drafter.prefill(PROMPT)
    return target, drafter, anchor


@pytest.mark.parametrize("right", range(5))
def test_a_step(right: int) -> None:
    """A2-9, A2-10, A4-2: one forward over the anchor and the drafts; both models then stand where the text does."""
    target, drafter, anchor = begun(right_for(right))
    step = speculative_step(target, drafter, anchor, 4)
    assert target.forwards == [5]
    assert step.tokens == Toy().alone([*PROMPT, anchor], right + 1)
    assert (step.drafted, step.matched) == (4, right)
    assert drafter.calls == [f"advance({right})" if right else "rollback"]
    assert target.context == drafter.context == [*PROMPT, anchor, *step.tokens[:-1]]


def test_a_step_without_drafts() -> None:
    """A2-10, T-41: no draft is asked for, the anchor is committed all the same."""
    target, drafter, anchor = begun(perfect)
    drafter.last = [anchor]
    step = speculative_step(target, drafter, anchor, 0)
    assert (len(step.tokens), step.drafted, target.forwards) == (1, 0, [1])
    assert drafter.calls == ["rollback"]


def test_an_error_of_the_target_passes_through() -> None:
    """A2-11: nothing is emitted, the drafter is told nothing."""
    target, drafter, anchor = begun(perfect)

    def fail(tokens: Sequence[int]) -> list[int]:
        raise MemoryError("GPU OOM")

    target.verify = fail  # type: ignore[method-assign]
    with pytest.raises(MemoryError, match="GPU OOM"):
        speculative_step(target, drafter, anchor, 4)
    assert drafter.calls == []


def test_a_target_that_answers_with_another_number_of_choices() -> None:
    target, drafter, anchor = begun(perfect)
    target.verify = lambda tokens: [1]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must be"):
        speculative_step(target, drafter, anchor, 4)


# --- the loop ---


def test_never_drafts_behind_the_end() -> None:
    """A2-12, A2-13: drafts are as many as tokens are still wanted."""
    asked: list[int] = []

    def guess(context: Sequence[int], count: int) -> list[int]:
        asked.append(count)
        return right_for(2)(context, count)

    out = speculative_loop(Toy(), Drafter(guess), PROMPT, 10, 4)
    assert len(out.tokens) == 10
    assert asked == [4, 4, 3]  # 1 + 3 + 3, then three are wanted


@pytest.mark.parametrize("guess", [perfect, wrong, right_for(2)])
@pytest.mark.parametrize("count", range(12))
def test_as_many_tokens_as_wanted(guess: Callable[[Sequence[int], int], list[int]], count: int) -> None:
    """A2-13, T-37: exactly, wherever in an accepted block the last one lies."""
    assert speculative_loop(Toy(), Drafter(guess), PROMPT, count, 4).tokens == Toy().alone(PROMPT, count)


@pytest.mark.parametrize("place", range(1, 12))
@pytest.mark.parametrize("guess", [perfect, wrong, right_for(2)])
def test_an_end_token_ends_the_text(guess: Callable[[Sequence[int], int], list[int]], place: int) -> None:
    """A2-14, T-37: it is included and nothing follows, wherever in an accepted block it lies."""
    text = Toy().alone(PROMPT, 20)
    end = frozenset([text[place - 1]])
    own = Toy(end).alone(PROMPT, 20)
    target, drafter = Toy(end), Drafter(guess)
    out = speculative_loop(target, drafter, PROMPT, 20, 4)
    assert out.tokens == own and out.tokens[-1] in end
    if out.steps:
        assert target.context == drafter.context == [*PROMPT, *own[:-1]]


def test_nothing_wanted() -> None:
    """A2-15: not a forward is spent, and no drafter is prefilled."""
    target, drafter = Toy(), Drafter(perfect)
    assert speculative_loop(target, drafter, PROMPT, 0, 4).tokens == ()
    assert (target.context, target.forwards, drafter.prefills) == ([], [], 0)
    assert len(speculative_loop(target, drafter, PROMPT, 1, 4).tokens) == 1
    assert (target.forwards, drafter.prefills) == ([], 0)


def test_progress_without_acceptance() -> None:
    """A2-16: a drafter that is always wrong costs time and nothing else."""
    target = Toy(choose=lambda tokens: 44)
    out = speculative_loop(target, Drafter(lambda context, count: [1] * count), PROMPT, 6, 3)
    assert out.tokens == (44,) * 6
    assert out.acceptance == Acceptance(5, 5, (5, 4, 3), (0, 0, 0))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_draft": -1}, "num_draft: found -1, expected 0 or more"),
        ({"max_tokens": -1}, "max_tokens: found -1, expected 0 or more"),
        ({"prompt": ()}, "prompt: found no token, expected at least one"),
    ],
)
def test_wrong_usage(change: dict[str, int], told: str) -> None:
    arguments = {"prompt": PROMPT, "max_tokens": 5, "num_draft": 4} | change
    with pytest.raises(WrongUsage, match=told):
        speculative_loop(Toy(), Drafter(perfect), **arguments)  # type: ignore[arg-type]


def test_greedy_is_the_targets_text_token_by_token() -> None:
    target = Toy()
    out = greedy(target, PROMPT, 9)
    assert out.tokens == Toy().alone(PROMPT, 9)
    assert target.forwards == [1] * 8
    assert out.acceptance == Acceptance(0, 0, (), ())
    assert out.median_draft_ms >= 0 and out.median_verify_ms > 0


def test_times_of_a_text_without_steps() -> None:
    out = greedy(Toy(), PROMPT, 1)
    assert (out.median_draft_ms, out.median_verify_ms) == (0, 0)


# --- drafts are not trusted ---


GARBAGE: dict[str, Callable[[Sequence[int], int], list[int]]] = {
    "none at all": lambda context, count: [],
    "fewer": lambda context, count: perfect(context, count)[: count // 2],
    "more": lambda context, count: perfect(context, count + 5),
    "beyond the vocabulary": lambda context, count: [VOCAB] * count,
    "negative": lambda context, count: [-1] * count,
    "huge": lambda context, count: [2**63] * count,
    "NaN": lambda context, count: [float("nan")] * count,  # type: ignore[list-item]
    "no number": lambda context, count: [None] * count,  # type: ignore[list-item]
    "right, then none": lambda context, count: [*perfect(context, 1), -1, *perfect(context, count)[2:]],
    "numpy": lambda context, count: list(np.array(perfect(context, count))),
}


@pytest.mark.parametrize("guess", GARBAGE.values(), ids=GARBAGE)
def test_garbage_costs_nothing_but_time(guess: Callable[[Sequence[int], int], list[int]]) -> None:
    """A1-34: what is no token is not accepted, and never reaches the target."""
    assert speculative_loop(Toy(), Drafter(guess), PROMPT, 40, 4).tokens == Toy().alone(PROMPT, 40)


def test_an_invalid_draft_counts_as_drafted() -> None:
    out = speculative_loop(Toy(), Drafter(GARBAGE["right, then none"]), PROMPT, 7, 3)
    assert out.acceptance == Acceptance(3, 6, (3, 3, 2), (3, 0, 0))


DRAFTS = st.lists(st.one_of(st.booleans(), st.integers(-2, VOCAB + 2), st.just(float("nan"))), max_size=9)


@given(st.lists(DRAFTS, min_size=1, max_size=12), st.integers(0, 40), st.integers(0, 7), st.sets(st.integers(0, 49)))
def test_any_drafter_any_acceptance(
    script: list[list[bool | float | int]], max_tokens: int, num_draft: int, ends: set[int]
) -> None:
    """A2-17, T-38, T-39: `True` in the script is a right draft, `False` a wrong one, a number is drafted as it is."""
    rounds = iter(script * 50)

    def guess(context: Sequence[int], count: int) -> list[int]:
        pairs = zip(perfect(context, 9), next(rounds), strict=False)
        return [r if d is True else (r + 1) % VOCAB if d is False else d for r, d in pairs]  # type: ignore[misc]

    target, drafter = Toy(frozenset(ends)), Drafter(guess)
    contexts = list[tuple[list[int], list[int], tuple[int, ...]]]()

    def watch(number: int, text: Decoded) -> None:
        contexts.append((list(target.context), list(drafter.context), text.tokens))

    if num_draft == 0:
        drafter.advance = drafter.rollback = lambda *_: None  # type: ignore[method-assign]
    out = speculative_loop(target, drafter, PROMPT, max_tokens, num_draft, watch)
    assert out.tokens == Toy(frozenset(ends)).alone(PROMPT, max_tokens)
    assert len(target.forwards) == len(out.steps) == out.acceptance.steps
    assert out.acceptance.committed == max(0, len(out.tokens) - 1)
    for of_target, of_drafter, tokens in contexts:
        assert of_target == [*PROMPT, *tokens[:-1]]
        assert num_draft == 0 or of_drafter == of_target


@pytest.mark.parametrize("right", range(5))
def test_the_next_draft_is_a_fresh_drafters(right: int) -> None:
    """T-40: also after everything was accepted, where the last draft was never the drafter's input."""
    drafter = Drafter(right_for(right))

    def watch(number: int, text: Decoded) -> None:
        fresh = Drafter(right_for(right))
        fresh.prefill([*PROMPT, *text.tokens[:-1]])
        assert drafter.draft(text.tokens[-1], 4) == fresh.draft(text.tokens[-1], 4)

    speculative_loop(Toy(), drafter, PROMPT, 30, 4, watch)


def test_acceptance_by_position() -> None:
    """Drafts behind the end of the text are neither right nor wrong."""
    target = Toy(frozenset([Toy().alone(PROMPT, 6)[-1]]))
    out = speculative_loop(target, Drafter(right_for(2)), PROMPT, 100, 4)
    assert [len(step.tokens) for step in out.steps] == [3, 2]
    assert out.acceptance == Acceptance(2, 5, (2, 2, 1, 1), (2, 2, 0, 0))
    assert out.acceptance.length == 2.5


# --- several requests ---


def test_one_request_drafts_several_do_not() -> None:
    """A4-1, A4-3, A4-7: a second request comes in round 2 and has gone in round 5."""
    first, second = Drafter(right_for(1)), Drafter(right_for(1))
    requests = [Request(Toy(), PROMPT, 20, first), Request(Toy(), (9, 9), 4, second, arrives=2)]
    rounds: list[int] = []
    texts = serve(requests, 3, lambda number, text: rounds.append(number))
    assert [text.tokens for text in texts] == [Toy().alone(PROMPT, 20), Toy().alone((9, 9), 4)]
    assert rounds[:8] == [0, 0, 0, 1, 0, 1, 0, 1]
    assert [step.speculative for step in texts[0].steps][:6] == [True, True, False, False, False, True]
    assert not any(step.speculative for step in texts[1].steps)
    assert (first.prefills, second.prefills) == (2, 0)
    assert first.context == [*PROMPT, *texts[0].tokens[:-1]]


def test_acceptance_of_a_request_counts_its_speculative_steps() -> None:
    """A4-6: per request, cumulative, and readable while it runs."""
    rates: list[float] = []
    requests = [Request(Toy(), PROMPT, 12, Drafter(right_for(1))), Request(Toy(), PROMPT, 3, None, arrives=1)]
    watch = {0: lambda text: rates.append(text.acceptance.rate), 1: lambda text: None}
    texts = serve(requests, 2, lambda number, text: watch[number](text))
    assert [(len(s.tokens), s.speculative) for s in texts[0].steps[:3]] == [(2, True), (1, False), (1, False)]
    assert texts[0].acceptance.committed == sum(len(s.tokens) for s in texts[0].steps if s.speculative)
    assert rates[0] == 0.5 and len(rates) == len(texts[0].steps)


@dataclass
class Arrival:
    prompt: list[int]
    wanted: int
    arrives: int
    seed: int | None


ARRIVALS = st.builds(
    Arrival,
    st.lists(st.integers(0, 49), min_size=1, max_size=4),
    st.integers(0, 25),
    st.integers(0, 12),
    st.one_of(st.none(), st.integers(0, 9)),
)


def random_guess(seed: int) -> Callable[[Sequence[int], int], list[int]]:
    source = random.Random(seed)
    return lambda context, count: [*perfect(context, source.randrange(count + 1)), source.randrange(-1, VOCAB + 1)]


@given(st.lists(ARRIVALS, max_size=5), st.integers(1, 5), st.sets(st.integers(0, 49), max_size=3))
def test_requests_come_and_go(arrivals: list[Arrival], num_draft: int, ends: set[int]) -> None:
    """A4-1, A4-3: whoever else is there, each text is the target's own."""
    drafters = [None if a.seed is None else Drafter(random_guess(a.seed)) for a in arrivals]
    requests = [
        Request(Toy(frozenset(ends)), a.prompt, a.wanted, d, a.arrives) for a, d in zip(arrivals, drafters, strict=True)
    ]

    def watch(number: int, text: Decoded) -> None:
        drafter = drafters[number]
        if drafter is not None and text.steps[-1].speculative:
            assert drafter.context == [*arrivals[number].prompt, *text.tokens[:-1]]

    texts = serve(requests, num_draft, watch)
    assert [t.tokens for t in texts] == [Toy(frozenset(ends)).alone(a.prompt, a.wanted) for a in arrivals]


def test_no_requests() -> None:
    assert serve([], 4) == []
