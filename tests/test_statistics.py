"""The paired bootstrap: what it calls better, worse and undecided."""

from __future__ import annotations

import numpy as np
import pytest

from convert_drafter.converters.verify.acceptance import Acceptance, total
from convert_drafter.converters.verify.statistics import Difference, compare


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
