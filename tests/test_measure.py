"""The error measure against plain float64 arithmetic, whole and in pieces."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_drafter.quant import TYPES, dequantize, quantize
from convert_drafter.quant.measure import PIECE, Errors, measure

F = np.float32


def noisy(size: int, noise: float, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An original and a copy, (size,) f32."""
    rng = np.random.default_rng(seed)
    original = rng.standard_normal(size, dtype=F)
    return original, (original + rng.standard_normal(size) * noise).astype(F)


def plainly(original: np.ndarray, copy: np.ndarray) -> tuple[float, float, float, float]:
    """RMSE, relative error, largest error and cosine, as one would write them down."""
    x, y = original.astype(np.float64), copy.astype(np.float64)
    rmse = np.sqrt(np.mean((x - y) ** 2))
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    return rmse, rmse / np.sqrt(np.mean(x**2)), np.abs(x - y).max(), cosine


def assert_close(found: Errors, expected: tuple[float, ...]) -> None:
    assert (found.rmse, found.relative, found.max, found.cosine) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 31, PIECE, 3 * PIECE + 7])
@pytest.mark.parametrize("noise", [1e-6, 0.1, 100.0])
def test_against_plain_arithmetic(size: int, noise: float) -> None:
    original, copy = noisy(size, noise)
    assert_close(measure(original, copy), plainly(original, copy))


@given(st.lists(st.integers(0, 5000), max_size=6))
def test_errors_of_pieces_add_up(cuts: list[int]) -> None:
    original, copy = noisy(5000, 0.1)
    bounds = [0, *sorted(cuts), 5000]
    parts = [measure(original[a:b], copy[a:b]) for a, b in pairwise(bounds)]
    whole = sum(parts, Errors())
    assert whole.count == 5000
    assert_close(whole, plainly(original, copy))


def test_any_shape() -> None:
    original, copy = noisy(6000, 0.1)
    assert measure(original.reshape(20, 300), copy.reshape(20, 300)) == measure(original, copy)
    assert measure(original.reshape(300, 20).T, copy.reshape(300, 20).T).max == measure(original, copy).max
    with pytest.raises(ValueError, match=r"original \(6000,\) and copy \(5999,\) differ in shape"):
        measure(original, copy[1:])


def test_an_equal_copy_has_no_error() -> None:
    original, _ = noisy(1000, 0.0)
    found = measure(original, original.copy())
    assert (found.rmse, found.relative, found.max) == (0, 0, 0)
    assert found.cosine == pytest.approx(1)


def test_zeros() -> None:
    zeros, ones = np.zeros(10, F), np.ones(10, F)
    both, lost, made = measure(zeros, zeros), measure(ones, zeros), measure(zeros, ones)
    assert (both.rmse, both.relative, both.cosine) == (0, 0, 1)
    assert (lost.rmse, lost.relative, lost.cosine) == (1, 1, 0)
    assert (made.rmse, made.relative, made.cosine) == (1, math.inf, 0)


def test_no_weights() -> None:
    empty = measure(np.zeros(0, F), np.zeros(0, F))
    assert empty == Errors() == Errors() + empty
    assert (empty.rmse, empty.relative, empty.cosine) == (0, 0, 1)


def test_huge_and_tiny_weights_do_not_overflow_or_vanish() -> None:
    for size in (3e38, 1e-40):
        original = np.full(100, size, F)
        assert measure(original, original / 2).relative == pytest.approx(0.5, rel=1e-4)


def test_a_largest_error_below_the_original_counts() -> None:
    assert measure(np.array([1, 2], F), np.array([4, 2.5], F)).max == 3
    assert measure(np.array([4, 2], F), np.array([1, 2.5], F)).max == 3


def test_more_bits_less_error() -> None:
    rows = noisy(64 * 256, 0.0)[0].reshape(64, 256)
    errors = [
        measure(rows, dequantize(quantize(rows, TYPES[kind]), TYPES[kind], rows.shape)).relative
        for kind in ("F32", "F16", "Q8_0", "IQ4_XS")
    ]
    assert errors == sorted(errors)
    assert errors[0] == 0 < errors[1] and errors[-1] < 0.1
