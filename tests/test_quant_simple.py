"""What is special to the block types of 32 weights and to F16 and BF16: ties, casts, zeros' signs, logarithms."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from convert_drafter.quant import TYPES, dequantize, quantize
from convert_drafter.quant.floats import F16_MAX, to_f16

F = np.float32
SIGNED, WITH_MIN = ("Q4_0", "Q5_0"), ("Q4_1", "Q5_1")
BLOCK_TYPES = ("Q8_0", *SIGNED, *WITH_MIN, "MXFP4")


def blocks_of(name: str, *blocks: np.ndarray) -> np.ndarray:
    """What the blocks (32,) become in a type, as items of its layout."""
    return quantize(np.stack(blocks).astype(F), TYPES[name]).view(TYPES[name].layout)


def block(**weights: float) -> np.ndarray:
    """A block of zeros but for the weights `w3=0.5`."""
    out = np.zeros(32, F)
    for place, value in weights.items():
        out[int(place[1:])] = value
    return out


def neighbours(values: np.ndarray, count: int) -> np.ndarray:
    """Each positive f32 with the `count` next ones on both sides, as far as they are positive and finite."""
    bits = values.astype(F).view(np.int32)[:, None].astype(np.int64) + np.arange(-count, count + 1)
    return bits[(bits > 0) & (bits < 0x7F800000)].astype(np.uint32).view(F)


# --- F16 and BF16 ---


def test_f16_rounds_as_numpy_at_every_f16_and_half_way() -> None:
    every = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(F)
    half_way = (every[:-1].astype(np.float64) + every[1:]) / 2
    values = np.concatenate([neighbours(every, 2), neighbours(half_way, 2), [0]]).astype(F)
    values = values[values <= F16_MAX]
    for signed in (values, -values):
        assert np.array_equal(to_f16(signed).view(np.uint16), signed.astype(np.float16).view(np.uint16))


def test_bf16_rounds_half_way_to_even() -> None:
    upper = np.arange(0x7F7F, dtype=np.uint32)
    for lower, up in ((0x7FFF, 0), (0x8000, upper & 1), (0x8001, 1)):
        weights = (upper << 16 | np.uint32(lower)).view(F)
        for sign, bit in ((1, 0), (-1, 0x8000)):
            found = quantize(sign * weights, TYPES["BF16"]).view(np.uint16)
            assert np.array_equal(found, (upper + up) | bit)


# --- codes ---


def test_q8_0_rounds_halves_away_from_zero() -> None:
    for half in np.arange(0.5, 127, 1, dtype=F):  # the scale is 1
        below, above = np.nextafter(half, F(0)), np.nextafter(half, F(127))
        up = int(half + 0.5)
        codes = blocks_of("Q8_0", block(w0=127, w1=half, w2=-half, w3=below, w4=-below, w5=above))["codes"][0]
        assert codes[:6].tolist() == [127, up, -up, up - 1, 1 - up, up]


@pytest.mark.parametrize("name", SIGNED)
def test_the_first_of_equal_maxima_gives_the_scale_its_sign(name: str) -> None:
    found = blocks_of(name, block(w5=1, w20=-1), block(w5=-1, w20=1), block(w5=-1, w20=1, w21=-1, w22=0.99))
    size = 1 / 8 if name == "Q4_0" else 1 / 16
    assert found["scale"].tolist() == [-size, size, size]


@pytest.mark.parametrize("name", SIGNED)
def test_the_maximum_of_the_other_sign_is_cut_off(name: str) -> None:
    found = blocks_of(name, block(w1=-8, w2=8, w3=7.75))
    back = dequantize(found.view(np.uint8), TYPES[name], (32,))
    top = 7 if name == "Q4_0" else 7.5
    assert back[[1, 2, 3]].tolist() == [-8, top, top]


@pytest.mark.parametrize("name", SIGNED)
def test_the_scale_of_zeros_is_minus_zero(name: str) -> None:
    """0 / -8, whatever the zeros' signs."""
    found = blocks_of(name, block(), -block(), block(w3=-0.0))
    assert found["scale"].view(np.uint16).tolist() == [0x8000] * 3


@pytest.mark.parametrize("name", WITH_MIN)
def test_a_minimum_of_zero_has_the_sign_of_the_first_zero(name: str) -> None:
    positive = np.ones(32, F)
    first, second = positive.copy(), positive.copy()
    first[[3, 9]], second[[3, 9]] = (0.0, -0.0), (-0.0, 0.0)
    found = blocks_of(name, first, second, block(w3=-0.0), -block(), block(w0=-0.0))
    assert found["min"].view(np.uint16).tolist() == [0, 0x8000, 0, 0x8000, 0x8000]
    assert found["scale"][2:].view(np.uint16).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", SIGNED)
def test_a_scale_too_small_to_invert_gives_the_codes_zero(name: str) -> None:
    found = blocks_of(name, block(w3=1e-42, w20=-1e-43))[0]
    assert not found["codes"].any()
    assert "fifth" not in found.dtype.names or found["fifth"] == 0


@pytest.mark.parametrize("name", ("Q4_0", "Q4_1", "Q5_0", "Q5_1"))
def test_every_code_lies_where_it_is_decoded(name: str) -> None:
    kind, bits = TYPES[name], int(name[1])
    for seed in range(20):
        codes = np.random.default_rng(seed).integers(0, 2**bits, 32)
        codes[[seed, seed - 7]] = 0, 2**bits - 1
        weights = codes.astype(F) - (2 ** (bits - 1) if name in SIGNED else 3)
        assert np.array_equal(dequantize(quantize(weights, kind), kind, (32,)), weights)


# --- MXFP4 ---


def mxfp4(*weights: float) -> np.ndarray:
    row = np.zeros(32, F)
    row[: len(weights)] = weights
    return dequantize(quantize(row, TYPES["MXFP4"]), TYPES["MXFP4"], (32,))[: len(weights)]


def test_mxfp4_takes_the_smaller_of_two_equally_near_values() -> None:
    halves = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]  # the unit is 1: the largest is 4 or more, and less than 8
    lower, upper = [0, 0.5, 1, 1.5, 2, 3, 4], [0.5, 1, 1.5, 2, 3, 4, 6]
    for sign in (1, -1):
        for toward, expected in ((0, lower), (F(np.inf), upper)):
            moved = np.nextafter(np.array(halves, F), F(toward))
            assert mxfp4(4, *(sign * moved)).tolist()[1:] == [sign * value for value in expected]
        assert mxfp4(4, *(sign * np.array(halves))).tolist()[1:] == [sign * value for value in lower]


def test_mxfp4_does_not_use_the_code_of_minus_zero() -> None:
    codes = blocks_of("MXFP4", block(w0=4, w1=-0.0, w2=-0.25, w3=-1e-30, w4=-0.26))["codes"][0] & 15
    assert codes[:5].tolist() == [6, 0, 0, 0, 9]


def test_mxfp4_rounds_a_logarithm_just_below_a_whole_one_up() -> None:
    """So many weights below 2^k have a log2f of k: f32 is coarser for larger k. The counts are those of ggml."""
    for power, count in {0: 0, 1: 0, 2: 0, 3: 1, 5: 2, 10: 5, 17: 11, 100: 44, -1: 0, -2: 1, -4: 2, -100: 44}.items():
        bits = np.ldexp(F(1), power).view(np.int32) - np.arange(1, 100, dtype=np.int32)
        exponents = blocks_of("MXFP4", *(block(w3=weight) for weight in bits.view(F)))["exponent"]
        assert exponents.tolist() == [power + 125] * count + [power + 124] * (99 - count)


def test_mxfp4_wraps_the_exponent_of_denormals() -> None:
    found = blocks_of("MXFP4", block(w3=1e-45), block(w3=-1e-39), block(w3=2.0**-125), block())
    assert found["exponent"].tolist() == [256 - 149 + 125, 256 - 130 + 125, 0, 0]
    assert not found["codes"][[0, 1, 3]].any()
    assert found["codes"][2, 3] == 6


# --- all of them against ggml itself ---


def logarithms() -> np.ndarray:
    powers = np.ldexp(1.0, np.arange(-149, 128))
    weights = neighbours(powers, 100)
    rows = np.zeros((len(weights), 32), F)
    rows[:, 5], rows[:, 9], rows[:, 10:26] = weights, -weights / 3, weights[:, None] * np.linspace(-1, 1, 16, dtype=F)
    return rows


def equal_maxima() -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.choice(np.array([-1, 1, 0.5, -0.25, 0, -0.0], F), (2000, 32)) * F(rng.random())


def halves() -> np.ndarray:
    rng = np.random.default_rng(2)
    rows = rng.integers(-254, 255, (2000, 32)).astype(F) / 2
    rows[np.arange(2000), rng.integers(0, 32, 2000)] = rng.choice([-127, 127, 8, -8, 16, -16, 15, 31], 2000)
    moved = np.nextafter(rows, rng.choice(np.array([-np.inf, np.inf], F), rows.shape))
    return np.where(rng.random(rows.shape) < 0.5, rows, moved)


def denormals() -> np.ndarray:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << rng.integers(1, 26, (2000, 1)), (2000, 32)) | rng.integers(0, 2, (2000, 32)) << 31
    return bits.astype(np.uint32).view(F)


def zeros() -> np.ndarray:
    rng = np.random.default_rng(4)
    rows = np.where(rng.random((2000, 32)) < 0.5, F(0), F(-0.0))
    rows[1::2] = np.where(rng.random((1000, 32)) < 0.3, rng.random((1000, 32), F), rows[1::2])
    return rows.astype(F)


def extremes() -> np.ndarray:
    rng = np.random.default_rng(5)
    return rng.choice(np.array([-1, 1, -0.999, 0.999, 0.3, 0], F), (2000, 32))


AWKWARD = (logarithms, equal_maxima, halves, denormals, zeros)


@pytest.mark.engine
@pytest.mark.parametrize("make", AWKWARD)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_awkward_blocks_equal_ggml(name: str, make: Callable[[], np.ndarray]) -> None:
    from ggml_oracle import ggml_quantize

    kind, rows = TYPES[name], make()
    rows = rows[np.abs(rows).max(axis=1) <= kind.largest]
    assert quantize(rows, kind).tobytes() == ggml_quantize(rows, kind)


@pytest.mark.engine
@pytest.mark.parametrize("name", (*BLOCK_TYPES, "F16", "BF16"))
def test_the_largest_weights_equal_ggml(name: str) -> None:
    from ggml_oracle import ggml_quantize

    rows = extremes() * F(TYPES[name].largest)
    assert quantize(rows, TYPES[name]).tobytes() == ggml_quantize(rows, TYPES[name])


@pytest.mark.engine
@pytest.mark.parametrize("make", (equal_maxima, halves, denormals, zeros))
@pytest.mark.parametrize("name", (*SIGNED, *WITH_MIN))
def test_awkward_blocks_equal_ggml_with_importance(name: str, make: Callable[[], np.ndarray]) -> None:
    from ggml_oracle import ggml_quantize

    rng = np.random.default_rng(6)
    for width in (32, 96, 4000):  # the whole row weighs in
        rows = make().reshape(-1)
        rows = rows[: rows.size // width * width].reshape(-1, width)
        for importance in (rng.random(width, F), np.zeros(width, F), np.where(rng.random(width) < 0.1, F(1), F(0))):
            assert quantize(rows, TYPES[name], importance).tobytes() == ggml_quantize(rows, TYPES[name], importance)


@pytest.mark.parametrize("make", AWKWARD)
@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_awkward_blocks_decode_as_in_the_gguf_package(name: str, make: Callable[[], np.ndarray]) -> None:
    kind, rows = TYPES[name], make()
    rows = rows[np.abs(rows).max(axis=1) <= kind.largest]
    data = quantize(rows, kind).reshape(len(rows), -1)
    expected = gguf.quants.dequantize(data, GGMLQuantizationType[name])
    assert dequantize(data, kind, rows.shape).tobytes() == expected.tobytes()
