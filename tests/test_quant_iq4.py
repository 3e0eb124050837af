"""IQ4_NL and IQ4_XS: the nearest values, the grids that are left out, and blocks of nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ggml_oracle import ggml_quantize
from hypothesis import given
from hypothesis import strategies as st

from convert_drafter.quant import TYPES, dequantize, iq4_search, quantize
from convert_drafter.quant.columns import as_c
from convert_drafter.quant.iq4_search import BLOCK, VALUES, best_scales, pack_codes

F = np.float32
KINDS = ("IQ4_NL", "IQ4_XS")
MIDDLES = (VALUES[1:] + VALUES[:-1]) / 2
ZERO_CODES = 0x88  # twice the code of 1, the value nearest to zero


# --- nearest values ---


def best_index(x: np.float32) -> int:
    """`best_index_int8`: bisection, then the nearer neighbour; the upper one if they are equally near."""
    values = VALUES.astype(F)
    if x <= values[0]:
        return 0
    if x >= values[-1]:
        return 15
    low, high = 0, 15
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if x < values[middle] else (middle, high)
    return low if x - values[low] < values[high] - x else high


def around(x: float, steps: int = 20) -> list[np.float32]:
    """The f32 numbers next to x, x among them."""
    found = [F(x)]
    for _ in range(steps):
        found = [np.nextafter(found[0], F(-1e9)), *found, np.nextafter(found[-1], F(1e9))]
    return found


def codes_of(weights: list[np.float32], scale: float) -> list[int]:
    """The codes `pack_codes` gives each weight, alone in the first place of a block."""
    x = np.zeros((BLOCK, len(weights)), F)
    x[0] = weights
    with as_c():
        return [int(code) for code in pack_codes(x, np.full(len(weights), scale, F))[:, 0] & 15]


def test_codes_are_those_of_best_index_next_to_every_threshold() -> None:
    weights = [x for middle in (*MIDDLES, *VALUES, 0.0) for x in around(float(middle))]
    weights += [F(x) for x in (-1e30, -1e4, -300, -299.9, 299.9, 300, 1e4, 1e30)]
    assert codes_of(weights, 1.0) == [best_index(x) for x in weights]


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=50))
def test_codes_are_those_of_best_index(numbers: list[float]) -> None:
    weights = [F(x) for x in numbers]
    assert codes_of(weights, 1.0) == [best_index(x) for x in weights]


def test_codes_of_odd_scales() -> None:
    """Zero counts as infinite; a scale too small to invert makes infinities of weights, and NaN of zero."""
    assert codes_of([F(5), F(0), F(-5)], 0.0) == [8, 8, 8]
    assert codes_of([F(5), F(0), F(-5)], 1e-39) == [15, 15, 0]
    assert codes_of([F(1e-37), F(0), F(-1e-37)], 1e-38) == [best_index(F(x)) for x in (10, 0, -10)]
    assert codes_of([F(5), F(0), F(-5)], np.nan) == [15, 15, 15]


def test_no_weight_passes_two_thresholds_from_the_first_grid_to_the_last() -> None:
    outermost = (iq4_search.INNERMOST + iq4_search.GRIDS - 1) / iq4_search.INNERMOST
    for side in (MIDDLES[MIDDLES > 0], -MIDDLES[MIDDLES < 0][::-1]):
        assert (side[1:] / side[:-1] > outermost).all()


# --- the grids that are left out ---

LAID_ON = [127, *range(119, 136)]
ties = st.builds(lambda middle, grid: F(-middle / grid), st.sampled_from(MIDDLES), st.sampled_from(LAID_ON))
numbers = st.floats(-1, 1, width=32).map(F)
few = st.sampled_from([F(x) for x in (0, -0.0, 1, -1, 0.5, -0.25, 1e-4, -1e-7, 1e-20)])
blocks = st.lists(st.one_of(ties, numbers, few), min_size=BLOCK, max_size=BLOCK).map(np.array)
powers = st.integers(-40, 20).map(lambda power: F(2.0**power))


@st.composite
def columns_of_blocks(draw: Callable[..., np.ndarray]) -> np.ndarray:
    """(32, n) f32: some blocks whose largest weight is often exactly a scale times one."""
    drawn = draw(st.lists(st.builds(np.multiply, blocks, powers), min_size=1, max_size=4))
    x = np.stack(drawn, axis=1).astype(F)
    if draw(st.booleans()):
        x[draw(st.integers(0, BLOCK - 1))] = draw(powers)
    return np.ascontiguousarray(x)


importances = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1), st.floats(1e-30, 1e15)), min_size=BLOCK, max_size=BLOCK
)


@given(columns_of_blocks(), st.none() | importances)
def test_leaving_grids_out_changes_no_bit(x: np.ndarray, importance: list[float] | None) -> None:
    with as_c():
        weights = None if importance is None else np.sqrt(x * x + F(0.1)) * np.array(importance, F)[:, None]
        expected = best_scales(x, weights, plainly=True).copy()
        assert best_scales(x, weights).tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [1.0, 1e-8, 1e6])
@pytest.mark.parametrize("weighted", [False, True])
def test_leaving_grids_out_changes_no_bit_of_many_blocks(weighted: bool, size: float) -> None:
    """Of 20,000 blocks some have fits that differ by less than the error of f32, or sums of few bits."""
    x = np.random.default_rng(5).standard_normal((BLOCK, 20_000), dtype=F) * F(size)
    weights = np.random.default_rng(6).random(x.shape, dtype=F) if weighted else None
    with as_c():
        expected = best_scales(x, weights, plainly=True).copy()
        assert best_scales(x, weights).tobytes() == expected.tobytes()


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFFFF0000], ids=["f32", "bfloat16"])
def test_few_grids_are_fitted(mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """About two of fifteen a block: what makes the encoder several times as fast as ggml."""
    fitted: list[int] = []
    fit = iq4_search._fit_grid

    def counted(x: np.ndarray, weights: np.ndarray | None, places: np.ndarray, *rest: np.ndarray) -> None:
        fitted.append(places.size)
        fit(x, weights, places, *rest)

    monkeypatch.setattr(iq4_search, "_fit_grid", counted)
    normal = np.random.default_rng(7).standard_normal((64, 1024), dtype=F)
    quantize((normal.view(np.uint32) & np.uint32(mask)).view(F), TYPES["IQ4_NL"])
    assert sum(fitted) < 3 * normal.size / BLOCK


# --- blocks of nothing ---


@pytest.mark.parametrize("weight", [0.0, -0.0, 9e-16, -1e-30])
def test_negligible_blocks_are_zero(weight: float) -> None:
    rows = np.full((1, 256), weight, F)
    plain = quantize(rows, TYPES["IQ4_NL"]).view(TYPES["IQ4_NL"].layout)
    assert (plain["scale"].view(np.uint16) == 0).all()
    assert (plain["codes"] == ZERO_CODES).all()
    shared = quantize(rows, TYPES["IQ4_XS"]).view(TYPES["IQ4_XS"].layout)
    assert shared["scale"].view(np.uint16)[0] == 0x8000, "minus zero, as ggml stores it"
    assert (shared["upper"][0], *shared["lower"][0]) == (0xAAAA, 0, 0, 0, 0), "eight multiples of 0, stored as 32"
    assert (shared["codes"] == ZERO_CODES).all()


def test_a_negligible_block_among_others_has_a_multiple_of_zero() -> None:
    rows = np.random.default_rng(8).standard_normal((1, 256), dtype=F)
    rows[0, 64:96] = 1e-16
    found = quantize(rows, TYPES["IQ4_XS"]).view(TYPES["IQ4_XS"].layout)
    assert (found["codes"][0, 2] == ZERO_CODES).all()
    assert not dequantize(found.view(np.uint8), TYPES["IQ4_XS"], (256,))[64:96].any()


@pytest.mark.parametrize("n_rows", [1, 2])
def test_a_sum_of_minus_zeros_is_zero_as_in_c(n_rows: int) -> None:
    rows, importance = np.zeros((n_rows, BLOCK), F), np.zeros(BLOCK, F)
    rows[:, 0], rows[:, 1:] = -1, -0.0
    importance[1] = 1
    found = quantize(rows, TYPES["IQ4_NL"], importance).view(TYPES["IQ4_NL"].layout)
    assert (found["scale"].view(np.uint16) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_of_a_weight_up_to_the_largest_is_infinite(kind: str) -> None:
    """The worst case: the largest weight on -120, and all importance at one just below the threshold of 1 and 13."""
    rows = np.zeros((1, 256), F)
    rows[0, ::BLOCK], rows[0, 1::BLOCK] = TYPES[kind].largest, TYPES[kind].largest * -6.999 / 120
    importance = np.zeros(256, F)
    importance[1::BLOCK] = 1
    scale = quantize(rows, TYPES[kind], importance).view(TYPES[kind].layout)["scale"].astype(F)
    assert (np.abs(scale) > 60_000).all()
    assert np.isfinite(scale).all()


# --- ggml itself ---


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
@given(x=columns_of_blocks(), importance=st.none() | importances)
def test_bytes_equal_ggml(kind: str, x: np.ndarray, importance: list[float] | None) -> None:
    rows = np.clip(np.resize(x.T, (2, 256)), -TYPES[kind].largest, TYPES[kind].largest)
    weights = None if importance is None else np.resize(np.array(importance, F), 256)
    assert quantize(rows, TYPES[kind], weights).tobytes() == ggml_quantize(rows, TYPES[kind], weights)


@pytest.mark.engine
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_equal_ggml_with_negative_importance(kind: str) -> None:
    """No imatrix has it, and nothing may be left out then; the fit of every grid is still ggml's."""
    rng = np.random.default_rng(9)
    rows, importance = rng.standard_normal((64, 256), dtype=F), rng.standard_normal(256, dtype=F)
    assert quantize(rows, TYPES[kind], importance).tobytes() == ggml_quantize(rows, TYPES[kind], importance)
