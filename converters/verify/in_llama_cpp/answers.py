"""The real engine: a target with or without its drafter in llama-server, and what it answers to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.verify.acceptance import Acceptance, counted, matching
from convert_drafter.converters.verify.in_llama_cpp.probe import Engine
from convert_drafter.converters.verify.in_llama_cpp.serving import DFLASH, LIMITS, Limits, Server, Setup, quiet, serving
from convert_drafter.converters.verify.measured import Watch

# Every knob that could move the choice of a token is spelled out: a GGUF may carry sampling defaults of its own.
SAMPLING: Mapping[str, Any] = {
    "temperature": 0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "seed": 1,
    "cache_prompt": False,
}
WARM_UP_TOKENS = 16  # of the run that is thrown away: the first pays for pages and graphs (T-69)
ROUND_CONTEXT = 256


@dataclass(frozen=True)
class Step:
    """One forward of the target after the first token: how many drafts it verified and accepted, what it committed."""

    drafted: int
    accepted: int
    committed: int


@dataclass(frozen=True)
class Answer:
    """A text and what it cost. `steps` is None where the server does not tell them apart; times in milliseconds.

    `accepted` counts drafts behind the text's end, as the server does. `draft_ms` comes from the server's trace.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    steps: tuple[Step, ...] | None
    prompt_ms: float
    predicted_ms: float
    cached: int
    stop: str
    draft_ms: float | None = None

    @property
    def verify_steps(self) -> int:
        """Forwards after the first token. A target whose cache cannot rewind repeats one after a rejected draft."""
        if self.steps is not None:
            return len(self.steps)
        return max(1, len(self.tokens) - 1 - self.accepted)  # drafts behind the text's end count as accepted

    @property
    def acceptance(self) -> Acceptance:
        """As the torch loop counts it: drafts behind the text's end are left out. No curve where there are no steps."""
        committed = len(self.tokens) - 1
        if self.steps is None:
            return Acceptance(self.verify_steps, committed, (), ())
        size = max((step.drafted for step in self.steps), default=0)
        before = accumulate((step.committed for step in self.steps), initial=0)
        rooms = ((min(step.drafted, committed - n), step) for n, step in zip(before, self.steps, strict=False))
        return counted(((drafts, step.accepted, step.committed) for drafts, step in rooms), size)


@dataclass(frozen=True)
class EngineRun:
    """Answers to `prompts`, in their order, and every setting they depend on."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[Answer, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float | None:
        """Over all answers, prompts not counted; None where no time was told."""
        milliseconds = sum(answer.predicted_ms for answer in self.answers)
        return 1000 * sum(len(a.tokens) - 1 for a in self.answers) / milliseconds if milliseconds > 0 else None

    @property
    def step_ms(self) -> float | None:
        """Mean milliseconds of a verify step, its drafting included."""
        steps = sum(answer.verify_steps for answer in self.answers)
        return sum(answer.predicted_ms for answer in self.answers) / steps if steps else None

    @property
    def draft_ms(self) -> float | None:
        """Mean milliseconds of drafting in a verify step; None where the server does not trace it."""
        told = [answer.draft_ms for answer in self.answers if answer.draft_ms is not None]
        steps = sum(answer.verify_steps for answer in self.answers)
        return sum(told) / steps if steps and len(told) == len(self.answers) else None


@dataclass(frozen=True)
class Comparison:
    """The same prompts with and without a drafter. `first_difference` is by prompt: a token's index, None where none.

    `speedup` is tokens per second with the drafter over those without.
    """

    first_difference: tuple[int | None, ...]
    speedup: float | None

    @property
    def prompts(self) -> int:
        return len(self.first_difference)

    @property
    def same(self) -> int:
        return self.first_difference.count(None)


def compare(drafting: EngineRun, alone: EngineRun) -> Comparison:
    """Whether the drafter changed a text, and what it gained. Raises `ValueError` for runs of different prompts."""
    if drafting.prompts != alone.prompts:
        raise ValueError("lossless is asked of runs on the same prompts")
    pairs = zip(drafting.answers, alone.answers, strict=True)
    fast, slow = drafting.tokens_per_second, alone.tokens_per_second
    return Comparison(
        tuple(first_difference(a.tokens, b.tokens) for a, b in pairs), fast / slow if fast and slow else None
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first index at which two texts differ; where one goes on, the end of the other."""
    same = matching(ours, theirs)
    return None if same == len(ours) == len(theirs) else same


def context_for(prompts: Sequence[Sequence[int]], new_tokens: int, draft_length: int = 0) -> int:
    """Context size, in tokens: near its end llama-server drafts less, so that there is room for a draft and more."""
    needed = max(map(len, prompts)) + new_tokens + draft_length + 8
    return -(-needed // ROUND_CONTEXT) * ROUND_CONTEXT


def run_prompts(
    engine: Engine,
    target: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    drafter: Path | None = None,
    draft_length: int | None = None,
    threads: int | None = None,
    on_progress: Watch = quiet,
    limits: Limits = LIMITS,
    draft_type: str = DFLASH,
) -> EngineRun:
    """Start the engine, answer every prompt, stop it. Give the drafter's own draft length and its cell's draft type.

    Raises `MissingEngine` for one too old, `WrongInput` for prompts it cannot take, `EngineFailure` where it crashes,
    hangs or answers nonsense.
    """
    context = context_for(prompts, new_tokens, draft_length or 0) if prompts else ROUND_CONTEXT
    setup = Setup(target, context, drafter, draft_length, threads, draft_type)
    with serving(engine, setup, on_progress, limits) as server:
        return answer_all(server, prompts, new_tokens, on_progress)


def answer_all(
    server: Server,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    on_progress: Watch = quiet,
) -> EngineRun:
    """Every prompt once, after a run that is thrown away. Raises `WrongInput` for one that is empty or given twice."""
    asked = tuple(map(tuple, prompts))
    _check(asked, new_tokens)
    phase = f"llama.cpp: {'with the drafter' if server.setup.drafter else 'the target alone'}"
    complete(server, asked[0][::-1], min(new_tokens, WARM_UP_TOKENS), "the first run")
    answers, numbers = [], []
    for i, prompt in enumerate(asked):
        on_progress(phase, i, len(asked))
        numbers.append(server.completions)
        answers.append(complete(server, prompt, new_tokens, f"prompt {i + 1} of {len(asked)}"))
    on_progress(phase, len(asked), len(asked))
    answers = _with_draft_times(answers, numbers, server.draft_milliseconds())
    return EngineRun(asked, tuple(answers), _settings(server, answers, new_tokens))


def _check(prompts: Sequence[tuple[int, ...]], new_tokens: int) -> None:
    if not prompts or new_tokens < 1:
        raise WrongInput(f"found {len(prompts)} prompts and {new_tokens} new tokens, expected at least one of each")
    seen: dict[tuple[int, ...], int] = {}
    for i, prompt in enumerate(prompts, 1):
        if not prompt:
            raise WrongInput(f"prompt {i}: found no tokens, expected at least one")
        if prompt in seen:
            raise WrongInput(f"prompt {i}: the same as prompt {seen[prompt]}; expected each prompt once")
        seen[prompt] = i


def complete(server: Server, prompt: Sequence[int], new_tokens: int, name: str) -> Answer:
    """The greedy continuation of one prompt, of at most `new_tokens` tokens."""
    body = {"prompt": list(prompt), "n_predict": new_tokens, "return_tokens": True, **SAMPLING}
    events = server.stream({**body, "stream": True, "timings_per_token": True, "return_progress": True}, name)
    final = events[-1]
    with server.reading(name):
        timings = final["timings"]
        count = int(final["tokens_predicted"])
        tokens = [token for event in events for token in event.get("tokens") or ()]
        steps = _steps(events, count, server.setup.draft_length)
        accepted = int(timings.get("draft_n_accepted", 0))
        answer = Answer(
            tokens=tuple(tokens),
            drafted=int(timings.get("draft_n", 0)),
            accepted=accepted,
            steps=steps,
            prompt_ms=float(timings["prompt_ms"]),
            predicted_ms=float(timings["predicted_ms"]),
            cached=int(timings.get("cache_n", 0)),
            stop=str(final.get("stop_type", "unknown")),
        )
    if len(tokens) == count:
        return answer
    # a token that ends inside a character is never sent alone: ask for all of them at once
    whole = server.complete(body, name)
    with server.reading(name):
        return replace(answer, tokens=tuple(map(int, whole["tokens"])))


def _steps(events: Sequence[Mapping[str, Any]], count: int, draft_length: int | None) -> tuple[Step, ...] | None:
    """The forwards of an answer from its events: in each, the drafts counted so far grow by that step's.

    What no draft accounts for are forwards of one token: the last of a text, or those that repeat a step.
    """
    told = [event["timings"] for event in events if event.get("tokens") and "timings" in event]
    if count > 1 and not told:
        return None
    totals = dict.fromkeys((int(t.get("draft_n", 0)), int(t.get("draft_n_accepted", 0))) for t in told)
    steps, room = [], count - 1
    for (drafted, accepted), (more, matched) in pairwise(dict.fromkeys([(0, 0), *totals])):
        step = Step(more - drafted, matched - accepted, min(matched - accepted + 1, room))
        if step.drafted > (draft_length or 0) or not 0 <= step.accepted <= step.drafted:
            return None  # two steps whose tokens were not sent one by one
        steps.append(step)
        room -= step.committed
    return (*steps, *[Step(0, 0, 1)] * room)


def _with_draft_times(answers: Sequence[Answer], numbers: Sequence[int], totals: Sequence[float]) -> list[Answer]:
    """`totals` are the server's running sums, one a completion; `numbers` tell which completion an answer was."""
    if not totals:
        return list(answers)
    spent = [after - before for before, after in pairwise([0.0, *totals])]
    known = dict(enumerate(spent))
    return [replace(answer, draft_ms=known.get(n)) for answer, n in zip(answers, numbers, strict=True)]


def _settings(server: Server, answers: Sequence[Answer], new_tokens: int) -> dict[str, Any]:
    return {
        **server.settings,
        "sampling": dict(SAMPLING),
        "new_tokens": new_tokens,
        "first_run": "thrown away",
        "cached_tokens": sum(answer.cached for answer in answers),
    }
