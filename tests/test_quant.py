"""Encoders against the gguf package, byte for byte, on every kind of input that has broken one."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
from engine import llama_binary
from gguf import GGMLQuantizationType

from convert_drafter.quant import TYPES, QuantType, dequantize, quantize

ROWS, WIDTH = 64, 256


def inputs() -> dict[str, np.ndarray]:
    """Named (ROWS, WIDTH) f32 arrays."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
    outlier = normal * 0.01
    outlier[:, 7] = 30.0
    lonely = np.zeros_like(normal)
    lonely[np.arange(ROWS), np.arange(ROWS)] = -0.3
    halves = np.arange(ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH) % 255 - 127
    halves[:, ::32] = 127.0  # a scale of exactly one: codes fall on exact halves below
    return {
        "normal": normal,
        "heavy tails": rng.standard_t(2, (ROWS, WIDTH)).astype(np.float32),
        "constant": np.full((ROWS, WIDTH), 0.25, dtype=np.float32),
        "zero": np.zeros((ROWS, WIDTH), dtype=np.float32),
        "minus zero": np.full((ROWS, WIDTH), -0.0, dtype=np.float32),
        "denormal": (normal * np.float32(1e-40)).astype(np.float32),
        "tiny": normal * np.float32(1e-30),
        "huge": normal * np.float32(1e4),
        "outlier": outlier,
        "all negative": -np.abs(normal),
        "all positive": np.abs(normal),
        "one a row": lonely,
        "exact halves": halves / 2,
    }


@pytest.mark.parametrize("name", inputs())
@pytest.mark.parametrize("kind", TYPES)
def test_bytes_equal_the_gguf_package(kind: str, name: str) -> None:
    rows = inputs()[name]
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(rows, GGMLQuantizationType[kind])
    assert quantize(rows, TYPES[kind]).tobytes() == expected.tobytes()


@pytest.mark.engine
@pytest.mark.parametrize("name", inputs())
@pytest.mark.parametrize("kind", TYPES)
def test_bytes_equal_ggml(kind: str, name: str) -> None:
    rows = inputs()[name]
    assert quantize(rows, TYPES[kind]).tobytes() == ggml_quantize(rows, TYPES[kind])


def ggml_quantize(rows: np.ndarray, kind: QuantType) -> bytes:
    """What the real quantizer writes for f32 rows: `ggml_quantize_chunk` of libggml-base, x86-64."""
    library = ctypes.CDLL(str(llama_binary("libggml-base.so")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    out = np.empty(kind.n_bytes(rows.shape), dtype=np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (rows, out)]
    sizes = [ctypes.c_int64(n) for n in (0, *rows.shape)]
    assert library.ggml_quantize_chunk(kind.ggml_id, *pointers, *sizes, None) == out.nbytes
    return out.tobytes()


@pytest.mark.parametrize("kind", TYPES)
def test_decoders_equal_the_gguf_package(kind: str) -> None:
    data = quantize(inputs()["normal"], TYPES[kind])
    row_bytes = TYPES[kind].n_bytes((WIDTH,))
    expected = gguf.quants.dequantize(data.reshape(ROWS, row_bytes), GGMLQuantizationType[kind])
    found = dequantize(data, TYPES[kind], (ROWS, WIDTH))
    assert np.array_equal(found, expected.reshape(ROWS, WIDTH))


def test_chunks_do_not_change_the_bytes() -> None:
    """More weights than one cache-sized chunk give the same bytes as row by row."""
    rows = np.random.default_rng(2).standard_normal((700, 256), dtype=np.float32)
    by_row = b"".join(quantize(row, TYPES["Q8_0"]).tobytes() for row in rows)
    assert quantize(rows, TYPES["Q8_0"]).tobytes() == by_row


def test_a_row_of_broken_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="row of 40 is no multiple of the block of 32"):
        quantize(np.zeros((2, 40), dtype=np.float32), TYPES["Q8_0"])


@pytest.mark.parametrize("kind", TYPES)
def test_ids_block_sizes_and_bytes_are_ggml_s(kind: str) -> None:
    block, n_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert TYPES[kind].ggml_id == GGMLQuantizationType[kind].value
    assert (TYPES[kind].block, TYPES[kind].layout.itemsize) == (block, n_bytes)


def stored(weight: np.float32, kind: str) -> np.ndarray:
    """What comes back of a block with this one weight."""
    row = np.zeros((1, 32), dtype=np.float32)
    row[0, 3] = weight
    with np.errstate(over="ignore", invalid="ignore"):  # an infinite scale times a code of zero
        return dequantize(quantize(row, TYPES[kind]), TYPES[kind], (1, 32))[0]


# The smallest weight above `largest` that is lost; for Q8_0 one that is lost in any case.
TOO_LARGE = {
    "F32": np.float32(np.inf),
    "F16": np.float32(65520.0),  # half way to 65536, and the tie goes to the even one
    "BF16": np.array(0x7F7F8000, dtype=np.uint32).view(np.float32)[()],  # half way likewise
    "Q8_0": np.float32(TYPES["Q8_0"].largest * 1.001),
}


@pytest.mark.parametrize("kind", TYPES)
def test_largest_is_the_last_weight_that_stays_finite(kind: str) -> None:
    largest, lost = np.float32(TYPES[kind].largest), TOO_LARGE[kind]
    assert largest < lost
    for sign in (1, -1):
        assert np.isfinite(stored(sign * largest, kind)).all()
        assert not np.isfinite(stored(sign * lost, kind)).all()
    if kind != "Q8_0":
        below = np.nextafter(lost, np.float32(0))
        assert stored(below, kind)[3] == largest, "the last weight before the infinity is stored as the largest"
