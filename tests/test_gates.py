"""The gates' decisions on numbers: which pass, which fail, what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
from published import PAIR

from convert_drafter.converters.convert import read_published
from convert_drafter.converters.spec import DrafterSpec
from convert_drafter.converters.verdict import Outcome
from convert_drafter.converters.verify import gates
from convert_drafter.converters.verify.acceptance import Acceptance
from convert_drafter.converters.verify.measured import Agreement, Loss, Measured, SweepPoint
from convert_drafter.converters.verify.pay import StepTimes, payoff

GOOD = Acceptance(40, 136, (40, 40, 40), (36, 32, 28))
BAD = Acceptance(40, 44, (40, 40, 40), (4, 0, 0))


@pytest.fixture(scope="module")
def spec() -> DrafterSpec:
    return read_published(PAIR / "drafter", PAIR / "target").spec


def measured(file: Acceptance = GOOD, original: Acceptance | None = GOOD, prompts: int = 8, **more: object) -> Measured:
    names = tuple(f"prompt {n}" for n in range(prompts))
    found = Measured(names, (), (file,) * prompts, (original,) * prompts if original else ())
    return replace(found, **more)


def test_the_same_text_is_lossless() -> None:
    gate = gates.lossless(measured(), 1e-4)
    assert (gate.outcome, gate.figures) == (Outcome.PASS, {"prompts": 8, "same": 8, "ties": 0})


def test_another_text_fails_and_names_the_prompt() -> None:
    """T-50: gibberish with speculation on."""
    gate = gates.lossless(measured(losses=(Loss("prompt 3", 17, 0.2),)), 1e-4)
    assert gate.outcome is Outcome.FAIL
    assert gate.details == ("prompt 3: another text from token 17 on; its two best tokens are 0.2 nats apart, no tie",)


def test_a_rounding_tie_is_said_and_passes() -> None:
    gate = gates.lossless(measured(losses=(Loss("prompt 3", 17, 1e-6),)), 1e-4)
    assert gate.outcome is Outcome.PASS
    assert gate.figures == {"prompts": 8, "same": 7, "ties": 1}
    assert "rounding tie at token 17" in gate.details[0]


def test_a_difference_nobody_can_judge_fails() -> None:
    assert gates.lossless(measured(losses=(Loss("p", 0, None),)), 1e-4).outcome is Outcome.FAIL


@pytest.mark.parametrize(
    ("kl", "expected", "outcome"),
    [
        (0.0, 0.0, Outcome.PASS),
        (5e-7, 0.0, Outcome.PASS),
        (7e-5, 0.0, Outcome.FAIL),  # a window one token too wide
        (0.02, 0.0, Outcome.FAIL),
        (0.02, 0.01, Outcome.PASS),
        (0.2, 0.01, Outcome.FAIL),
        (float("inf"), 0.01, Outcome.FAIL),
    ],
)
def test_drafts_may_differ_by_what_quantization_explains(kl: float, expected: float, outcome: Outcome) -> None:
    compared = (100, 100)
    found = measured(
        agreement=Agreement(compared, (99, 90), kl * 200), expected=Agreement(compared, compared, expected * 200)
    )
    assert gates.same_drafts(found).outcome is outcome


@pytest.mark.parametrize(
    ("positions", "kl", "outcome"),
    [
        (152, 0.036, Outcome.UNDECIDED),
        (400, 0.036, Outcome.FAIL),
        (152, 0.061, Outcome.FAIL),
        (152, 0.029, Outcome.PASS),
    ],
)
def test_few_drafts_do_not_condemn_a_file(positions: int, kl: float, outcome: Outcome) -> None:
    """A near tie or two makes a right file look further away than its quantization explains."""
    agreement = Agreement((positions,), (positions,), kl * positions)
    gate = gates.same_drafts(
        measured(agreement=agreement, expected=Agreement((positions,), (positions,), 0.01 * positions))
    )
    assert gate.outcome is outcome
    assert ("more or longer prompts tell" in " ".join(gate.details)) is (outcome is Outcome.UNDECIDED)


def test_without_a_source_drafts_are_not_compared() -> None:
    gate = gates.same_drafts(measured(original=None))
    assert gate.outcome is Outcome.SKIPPED and "--source" in gate.summary


def test_acceptance_passes_fails_and_cannot_tell() -> None:
    assert gates.acceptance(measured(), 0.05, None).outcome is Outcome.PASS
    worse = gates.acceptance(measured(BAD), 0.05, None)
    assert worse.outcome is Outcome.FAIL and "-67.6%" in worse.summary
    few = gates.acceptance(measured(BAD, prompts=2), 0.05, None)
    assert few.outcome is Outcome.UNDECIDED and "about 2 more prompts" in few.details[0]


def test_a_collapse_is_seen_without_the_original() -> None:
    """The worst thing in the field: it loads, its text is right, and 2 % of its drafts are accepted."""
    gate = gates.acceptance(measured(BAD, None), 0.05, None)
    assert gate.outcome is Outcome.FAIL and "10% of first drafts are right: collapsed" in gate.details[0]
    assert gates.acceptance(measured(GOOD, None), 0.05, None).outcome is Outcome.ADVICE


def test_a_least_length_is_asked_for() -> None:
    assert gates.acceptance(measured(), 0.05, 3.4).outcome is Outcome.PASS
    gate = gates.acceptance(measured(), 0.05, 3.5)
    assert gate.outcome is Outcome.FAIL and "at least 3.5 were asked for" in gate.details[-1]
    assert gates.acceptance(Measured(), 0.05, None).outcome is Outcome.FAIL


def test_a_collapse_beyond_the_window_fails(spec: DrafterSpec) -> None:
    """T-55: full attention where layers slide is fine up to the window, and collapses after it."""
    points = [SweepPoint(24, (GOOD,) * 4, (GOOD,) * 4), SweepPoint(400, (BAD,) * 4, (GOOD,) * 4)]
    gate = gates.length_sweep(points, spec)
    assert gate.outcome is Outcome.FAIL
    assert gate.details == ("with 400 tokens of context 1.10 per verify step, the original 3.40",)
    assert gate.figures["points"][1] == {"context": 400, "prompts": 4, "original": 3.4, "file": 1.1}


def test_a_cliff_of_the_original_is_said_and_passes(spec: DrafterSpec) -> None:
    """A1-30"""
    points = [SweepPoint(n, (walk,) * 4, (walk,) * 4) for n, walk in ((24, GOOD), (400, BAD))]
    gate = gates.length_sweep(points, spec)
    assert gate.outcome is Outcome.PASS
    assert gate.details == ("a cliff between 24 and 400 tokens of context; the original has it too",)
    alone = gates.length_sweep([replace(point, originals=()) for point in points], spec)
    assert alone.outcome is Outcome.ADVICE and "--source" in alone.details[0]
    assert gates.length_sweep([], spec).outcome is Outcome.SKIPPED


def test_what_does_not_pay_is_said() -> None:
    good = gates.does_it_pay(payoff(GOOD, times := StepTimes(10, {1: 1, 3: 2}, {1: 10, 3: 12})), times, "torch")
    assert good.outcome is Outcome.ADVICE and good.summary.startswith("draft 3: 2.4")
    slow = StepTimes(10, {1: 90, 3: 90}, {1: 10, 3: 10})
    assert gates.does_it_pay(payoff(GOOD, slow), slow, "torch").summary.startswith("no draft length pays")


@pytest.mark.parametrize("texts", [1, 2, 3, 4])
def test_a_collapse_needs_no_more_than_one_text(spec: DrafterSpec, texts: int) -> None:
    """T-55: few texts leave a doubt of a small loss, not of a collapse."""
    gate = gates.length_sweep([SweepPoint(400, (BAD,) * texts, (GOOD,) * texts)], spec)
    assert gate.outcome is Outcome.FAIL
    worse = replace(GOOD, steps=44)
    doubtful = gates.length_sweep([SweepPoint(400, (worse,) * texts, (GOOD,) * texts)], spec)
    assert doubtful.outcome is Outcome.PASS


def test_a_cliff_is_the_original_s_only_where_it_falls_too(spec: DrafterSpec) -> None:
    """A1-30"""
    file, original = Acceptance(40, 76, (40,) * 3, (20, 9, 7)), Acceptance(40, 100, (40,) * 3, (30, 20, 10))
    gate = gates.length_sweep([SweepPoint(24, (GOOD,), (GOOD,)), SweepPoint(400, (file,), (original,))], spec)
    assert gate.details == ("a cliff between 24 and 400 tokens of context; the original has not",)


def test_too_little_drafting_decides_nothing() -> None:
    """One new token a prompt: nothing can be accepted, and nothing that equals it is as good."""
    nothing = Acceptance(1, 1, (1, 0, 0), (0, 0, 0))
    gate = gates.acceptance(measured(nothing, nothing), 0.05, None)
    assert gate.outcome is Outcome.UNDECIDED and "too few to tell" in gate.details[0]
    silent = Acceptance(40, 40, (), ())
    assert gates.acceptance(measured(silent, None), 0.05, None).details == ("nothing was drafted at all",)
    assert gates.lossless(Measured(), 1e-3).outcome is Outcome.SKIPPED


def test_a_shorter_block_drafts_less() -> None:
    found = measured(agreement=Agreement((10, 10), (10, 0), 0.0, 10), expected=Agreement((10, 10), (10, 10)))
    gate = gates.same_drafts(found)
    assert gate.outcome is Outcome.FAIL and "10 drafts of the original are not there" in gate.details[-1]
