"""The paired bootstrap: what it calls better, worse and undecided."""

from __future__ import annotations

import numpy as np
import pytest

from convert_drafter.converters.verify.acceptance import Acceptance, total
from convert_drafter.converters.verify.statistics import Difference, compare, length_interval, position_intervals


def walks(lengths: list[float], steps: int = 40) -> list[Acceptance]:
    return [Acceptance(steps, round(steps * length), (steps,) * 7, (0,) * 7) for length in lengths]


def noisy(mean: float, prompts: int, seed: int, spread: float = 0.3) -> list[float]:
    return np.random.default_rng(seed).normal(mean, spread, prompts).tolist()


def test_identical_walks_differ_by_nothing() -> None:
    same = walks([3.0, 2.0, 4.0])
    found = compare(same, same, 0.05)
    assert (found.relative, found.low, found.high, found.needed) == (0, 0, 0, None)
    assert found.holds(0.05) is True


def test_a_clear_loss_fails() -> None:
    found = compare(walks(noisy(3.4, 16, 1)), walks(noisy(1.3, 16, 2)), 0.05)
    assert found.holds(0.05) is False
    assert found.low < found.relative < found.high < -0.5


def test_a_gain_holds() -> None:
    found = compare(walks([2.0] * 8), walks([3.0] * 8), 0.05)
    assert found.holds(0.05) is True
    assert found.relative == pytest.approx(0.5)


def test_a_small_loss_with_few_prompts_is_undecided_and_says_how_many_more() -> None:
    original = noisy(3.4, 8, 3, 0.6)
    file = [length * 0.96 + wobble for length, wobble in zip(original, noisy(0, 8, 4, 0.3), strict=True)]
    found = compare(walks(original), walks(file), 0.05)
    assert found.holds(0.05) is None
    assert found.needed is not None and found.needed > 8


def test_more_prompts_of_the_same_kind_decide() -> None:
    """What `needed` promises: with that many prompts more the interval leaves the limit."""
    original, wobble = noisy(3.4, 400, 5, 0.6), noisy(0, 400, 6, 0.3)
    file = [length * 0.98 + w for length, w in zip(original, wobble, strict=True)]
    few = compare(walks(original[:8]), walks(file[:8]), 0.05)
    many = compare(walks(original), walks(file), 0.05)
    assert many.holds(0.05) is True
    assert many.high - many.low < (few.high - few.low) / 3


@pytest.mark.parametrize("prompts", [1, 2, 3])
def test_too_few_prompts_never_decide_unless_equal(prompts: int) -> None:
    found = compare(walks([3.0] * prompts), walks([1.0] * prompts), 0.05)
    assert found.holds(0.05) is None
    assert found.needed == 4 - prompts


def test_the_interval_covers_the_truth() -> None:
    """Of 200 samples from one distribution about 95 % of the intervals hold the true difference of -10 %."""
    hits = 0
    for seed in range(200):
        original = noisy(3.4, 24, 2 * seed + 100)
        file = [0.9 * a + w for a, w in zip(original, noisy(0, 24, 2 * seed + 101, 0.1), strict=True)]
        found = compare(walks(original, 200), walks(file, 200), 0.05)
        hits += found.low <= -0.1 <= found.high
    assert 176 <= hits <= 199


def test_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        compare(walks([3.0]), walks([3.0, 2.0]), 0.05)


def test_a_limit_met_exactly_holds() -> None:
    assert Difference(-0.05, -0.05, -0.05, 9, None).holds(0.05) is True


def test_total_adds_walks_of_different_depth() -> None:
    added = total([Acceptance(2, 5, (2, 2, 1), (2, 1, 0)), Acceptance(3, 4, (3, 1), (1, 0))])
    assert added == Acceptance(5, 9, (5, 3, 1), (3, 1, 0))
    assert added.length == pytest.approx(1.8)
    assert added.by_position == pytest.approx((0.6, 1 / 3, 0))
    assert added.rate == pytest.approx(4 / 9)
    assert total([]) == Acceptance(0, 0, (), ())
    assert total([]).length == 0


# --- of one drafter ---


def coins(prompts: int, share: float, seed: int) -> list[Acceptance]:
    """Texts of 30 steps with two draft positions: the first right so often, the second half as often."""
    random = np.random.default_rng(seed)
    found = []
    for right in random.binomial(30, share, prompts):
        second = int(random.binomial(30, share / 2))
        found.append(Acceptance(30, 30 + int(right) + second, (30, 30), (int(right), second)))
    return found


def test_intervals_of_one_drafter_cover_the_truth() -> None:
    """Of 80 samples about 95 % of the intervals hold the share they were drawn with, at each place, and the length."""
    hits = np.zeros(3)
    for seed in range(80):
        each = coins(24, 0.6, seed)
        first, second = position_intervals(each)
        length = length_interval(each)
        assert first and second and length
        hits += [low <= true <= high for (low, high), true in ((first, 0.6), (second, 0.3), (length, 1.9))]
    assert ((hits >= 69) & (hits <= 80)).all(), hits


def test_an_interval_lies_around_its_share_and_narrows_with_prompts() -> None:
    few, many = coins(8, 0.6, 0), coins(512, 0.6, 0)
    for each in (few, many):
        for share, interval in zip(total(each).by_position, position_intervals(each), strict=True):
            assert interval is not None and interval[0] <= share <= interval[1]
    widths = [high - low for each in (few, many) for low, high in filter(None, position_intervals(each)[:1])]
    assert widths[1] < widths[0] / 4


def test_intervals_of_too_few_or_of_nothing() -> None:
    each = coins(3, 0.6, 0)
    assert length_interval(each) is None and position_intervals(each) == ()
    shorter = [*coins(4, 0.6, 0), Acceptance(1, 1, (0, 0, 0), (0, 0, 0))]
    assert position_intervals(shorter)[2] is None and None not in position_intervals(shorter)[:2]
