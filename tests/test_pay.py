"""What drafting pays, and which contexts a length sweep takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from published import PAIR

from convert_drafter.converters.convert import read_published
from convert_drafter.converters.verify.acceptance import Acceptance
from convert_drafter.converters.verify.pay import StepTimes, expected_lengths, lengths_to_time, payoff
from convert_drafter.converters.verify.prompts import Encoded
from convert_drafter.converters.verify.sweep import LONGEST, NEW_TOKENS, PROMPTS, context_lengths, contexts

WALK = Acceptance(100, 270, (100, 100, 100, 100), (80, 50, 30, 10))


def test_expected_lengths_follow_the_curve() -> None:
    assert expected_lengths(WALK) == pytest.approx([1.8, 2.3, 2.6, 2.7])
    assert expected_lengths(WALK)[-1] == pytest.approx(WALK.length)


def test_free_drafts_pay_most_at_the_longest_block() -> None:
    found = payoff(WALK, StepTimes(10, {1: 0, 4: 0}, {1: 10, 4: 10}))
    assert (found.best_length, found.break_even) == (4, 1)
    assert found.speedup == pytest.approx((1.8, 2.3, 2.6, 2.7))


def test_costly_verification_favours_a_shorter_block() -> None:
    found = payoff(WALK, StepTimes(10, {1: 1, 4: 1}, {1: 10, 2: 11, 4: 30}))
    assert found.best_length == 2
    assert found.break_even == pytest.approx(3.1)  # more than the 2.7 that four drafts commit
    assert found.speedup[3] < 1 < found.speedup[1]


def test_times_between_measured_lengths_are_interpolated() -> None:
    assert StepTimes(10, {2: 4, 4: 8}, {2: 10, 4: 20}).step(3) == pytest.approx(21)


@pytest.mark.parametrize(("size", "lengths"), [(1, [1]), (7, [1, 2, 4, 7]), (15, [1, 2, 4, 8, 15]), (2, [1, 2])])
def test_timed_lengths_hold_the_longest(size: int, lengths: list[int]) -> None:
    assert lengths_to_time(size) == lengths


def test_contexts_reach_below_and_above_the_window() -> None:
    """T-55, A1-30: a fault of the window shows only beyond it."""
    spec = read_published(PAIR / "drafter", PAIR / "target").spec
    assert spec.window is not None
    found = context_lengths(spec, 2048)
    assert found[0] < spec.window.size < found[-1]
    assert all(n + NEW_TOKENS <= 2048 for n in found)
    assert list(found) == sorted(set(found))


def test_contexts_pass_the_trained_length_where_the_target_has_room() -> None:
    spec = read_published(PAIR / "drafter", PAIR / "target").spec
    short = replace(spec, context_length=512)
    assert max(context_lengths(short, 100_000)) > 512
    assert max(context_lengths(spec, 100_000)) <= LONGEST
    assert context_lengths(spec, 40) == ()


def test_contexts_are_distinct_and_exactly_as_long_as_asked() -> None:
    prompts = [Encoded(str(n), tuple(range(n, n + 10))) for n in range(6)]
    found = contexts(prompts, 77)
    assert len(found) == PROMPTS
    assert {len(context.tokens) for context in found} == {77}
    assert len({context.tokens for context in found}) == PROMPTS
    assert len(contexts(prompts[:1], 77)) == 1
