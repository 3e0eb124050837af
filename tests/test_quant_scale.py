"""The symmetric scale searches and the types made of them, Q6_K and Q3_K: the fast ways against the literal ones."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from ggml_oracle import ggml_quantize
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convert_drafter.quant import TYPES, ScaleOverflow, dequantize, quantize, scale_search
from convert_drafter.quant.columns import as_c, largest_of
from convert_drafter.quant.scale_descent import descend_plain, descend_scale
from convert_drafter.quant.scale_search import search_codes, search_plain, search_scale

F = np.float32
KINDS = ["Q6_K", "Q3_K"]
GRIDS = [(32, 16), (4, 16), (8, 32), (16, 32)]  # nmax, weights of a block

FEW = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -0.25, 31.5 / 32, -31.5 / 32, 3.5 / 4, 1e-30, -1e-15])
MANY = st.one_of(FEW, st.floats(-1, 1, width=32), st.floats(-(2.0**20), 2.0**20, width=32))
MAGNITUDES = st.sampled_from([1.0, 1.0, 0.02, 1e-6, 1e-14, 1e-30, 1e6, 1e12])
IMPORTANCES = st.one_of(st.just(0.0), st.floats(0, 2, width=32), st.sampled_from([1e-30, 1e30]))


@st.composite
def blocks(draw: st.DrawFn, block: int) -> np.ndarray:
    """(block, n) f32, the values of one or of several kinds."""
    x = draw(arrays(F, (block, draw(st.integers(1, 6))), elements=draw(st.sampled_from([FEW, MANY]))))
    with np.errstate(under="ignore"):
        return x * F(draw(MAGNITUDES))


def normal(block: int, columns: int = 3000) -> np.ndarray:
    return np.random.default_rng(block).standard_normal((block, columns), dtype=np.float32)


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.tobytes() == expected.tobytes()


def check_search(x: np.ndarray, nmax: int, weights: np.ndarray | None = None) -> None:
    """The fast search gives the scales and codes of the literal one."""
    with as_c():
        plain = search_plain(x, nmax, np.square(x) if weights is None else weights)
        codes = np.clip(scale_search.nearest_int(x * plain.inverse), -nmax, nmax - 1) + nmax
    codes[:, plain.empty] = 0
    scale, found = search_codes(x, nmax, weights)
    assert same_bits(scale, plain.scale)
    assert np.array_equal(found, codes)
    assert same_bits(search_scale(x, nmax, weights), plain.scale)


@pytest.mark.parametrize(("nmax", "block"), GRIDS)
def test_search_equals_the_literal_one_on_normal_weights(nmax: int, block: int) -> None:
    x = normal(block)
    check_search(x, nmax)
    check_search(x, nmax, np.abs(x[::-1]))
    check_search(x, nmax, np.where(x[::-1] > 1, 0, x[::-1] ** 2))


@pytest.mark.parametrize(("nmax", "block"), GRIDS)
@given(data=st.data())
def test_search_equals_the_literal_one_on_odd_blocks(nmax: int, block: int, data: st.DataObject) -> None:
    x = data.draw(blocks(block))
    weights = data.draw(st.none() | arrays(F, x.shape, elements=IMPORTANCES))
    check_search(x, nmax, weights)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1e31])
def test_search_takes_numbers_that_are_no_weights(value: float) -> None:
    """Q3_K searches once more over the scales it found, which may have overflowed."""
    x = normal(16, 40)
    x[5, ::3] = value
    check_search(x, 32)
    check_search(x, 32, np.ones_like(x))
    x[:, 1] = value
    check_search(x, 32)


@pytest.mark.parametrize("largest", [0.0, -0.0, 9e-16, -9e-16])
def test_an_empty_block_has_scale_and_codes_zero(largest: float) -> None:
    x = normal(16, 3)
    x[:, 1] = 0
    x[7, 1] = largest
    scale, codes = search_codes(x, 32)
    assert scale[1] == 0 and not codes[:, 1].any()
    assert scale[[0, 2]].all() and codes[:, [0, 2]].any()
    assert descend_scale(x, 4)[1] == 0 and not descend_plain(x, 4)[1][:, 1].any()


def test_a_block_without_importance_has_scale_zero() -> None:
    x = normal(16, 3)
    assert search_scale(x, 32, np.zeros_like(x)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("sign", [1, -1])
def test_of_equal_magnitudes_the_first_is_the_largest(sign: int) -> None:
    x = np.zeros((16, 1), F)
    x[3], x[9] = sign, -sign
    assert largest_of(x).tolist() == [sign]
    assert search_codes(x, 32)[1][[3, 9], 0].tolist() == [1, 63], "the largest weight has a code below zero's, 32"
    check_search(x, 32)


@pytest.mark.parametrize(("nmax", "block"), GRIDS)
@given(data=st.data())
def test_every_change_of_codes_begins_a_run(nmax: int, block: int, data: st.DataObject) -> None:
    x = data.draw(blocks(block))
    x = np.hstack([x, normal(block, 200)])
    x = x[:, np.abs(x).max(axis=0) >= scale_search.NEGLIGIBLE]
    with as_c():
        largest = largest_of(x)
        runs = scale_search._runs(x, largest, nmax)
        grids = [np.rint(x * (-(F(nmax) + step) / largest)) for step in scale_search.STEPS]
    codes = np.clip(grids, -nmax, nmax - 1)
    changed = (codes[1:] != codes[:-1]).any(axis=1)
    marked = runs >> np.arange(1, 19, dtype=np.uint32)[:, None] & 1
    assert (marked >= changed).all()
    assert (runs & 1).all()


def check_descent(x: np.ndarray) -> None:
    assert same_bits(descend_scale(x, 4), descend_plain(x, 4)[0])


def test_descent_equals_the_literal_one_on_normal_weights() -> None:
    check_descent(normal(16, 30_000))
    check_descent(np.random.default_rng(0).standard_t(1, (16, 20_000)).astype(F))


@given(data=st.data())
def test_descent_equals_the_literal_one_on_odd_blocks(data: st.DataObject) -> None:
    check_descent(data.draw(blocks(16)))


@pytest.mark.parametrize("magnitude", [1e-14, 1e-12, 1e-9, 3e5, 1e12, 1e20])
def test_descent_where_sums_underflow_or_overflow(magnitude: float) -> None:
    with np.errstate(under="ignore"):
        check_descent(normal(16, 500) * F(magnitude))


def test_some_columns_make_all_five_passes() -> None:
    """Otherwise the limit is not tested: with one pass less a scale would differ."""
    x = normal(16, 30_000)
    scale = descend_scale(x, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert_drafter.quant.scale_descent.PASSES", 4)
        assert not same_bits(descend_scale(x, 4), scale)


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_decoded_as_by_the_gguf_package(kind: str) -> None:
    stored = np.random.default_rng(1).integers(0, 256, (500, TYPES[kind].layout.itemsize), dtype=np.uint8)
    stored[:, -1] &= 0b10111011  # f16 scales below infinity
    expected = gguf.quants.dequantize(stored, GGMLQuantizationType[kind])
    assert same_bits(dequantize(stored, TYPES[kind], (500, 256)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_weights_have_finite_scales(kind: str) -> None:
    rng = np.random.default_rng(2)
    rows = (rng.choice([-1, 1, 0.75, 0.5, -0.05], (200, 512)) * TYPES[kind].largest).astype(F)
    for importance in (None, (rng.random(512) ** 8).astype(F), np.where(rng.random(512) < 0.7, 0, 1).astype(F)):
        blocks = quantize(rows, TYPES[kind], importance).view(TYPES[kind].layout)
        assert np.isfinite(blocks["scale"]).all()


def adversarial(rng: np.random.Generator, largest: float) -> list[np.ndarray]:
    """(4, 512) f32 arrays, each of a kind that has broken a quantizer or could."""
    shape = (4, 512)
    plain = rng.standard_normal(shape)
    spread = 10.0 ** np.repeat(rng.uniform(-16, 5, (4, 32)), 16, axis=1)
    made = [
        plain,
        plain * spread,
        np.round(plain * 3),
        rng.standard_t(1.2, shape),
        np.where(rng.random(shape) < 0.95, 0, plain),
        np.where(np.arange(512) % 16 == 3, plain, 0),
        rng.choice([0.0, -0.0, 1, -1, 0.5, -0.125], shape),
        (1 + rng.integers(-4, 5, shape) * 2.0**-23) * rng.choice([1, -1], shape),
        np.where(rng.random(shape) < 0.06, 100 * plain, 0.01 * plain),
    ]
    scales = [1, 0.02, 1e-6, 1e-30, 1e-40, largest]
    return [np.clip(x * rng.choice(scales), -largest, largest).astype(F) for x in made]


@pytest.mark.engine
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_equal_ggml_with_and_without_importance(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    even, uneven = rng.random(512), 10.0 ** rng.uniform(-30, 30, 512)
    importances = [None, even, np.where(even < 0.3, 0, even), np.zeros(512), uneven]
    for rows in adversarial(rng, TYPES[kind].largest):
        for weights in (None if importance is None else importance.astype(F) for importance in importances):
            expected = ggml_quantize(rows, TYPES[kind], weights)
            if np.isfinite(np.frombuffer(expected, TYPES[kind].layout)["scale"]).all():
                assert quantize(rows, TYPES[kind], weights).tobytes() == expected
            else:  # a scale that ggml writes as infinite is refused
                with pytest.raises(ScaleOverflow):
                    quantize(rows, TYPES[kind], weights)
