"""Encoders and decoders, byte for byte: against golden blocks, the gguf package, and (marked engine) ggml itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from weights import named_importance, named_rows, stream

from convert_drafter.quant import TYPES, OutOfRange, QuantType, ScaleOverflow, dequantize, quantize, transcode

BLOCKS = Path(__file__).parent.parent / "fixtures" / "blocks"
WEIGHTED = [name for name, kind in TYPES.items() if kind.encode_weighted]
SHAPES = [(16, 1024), (3, 256), (1, 256)]  # many super-blocks, few, and one: numpy sums a single column differently
NOT_WEIGHTED_BY_GGML = {"F32", "F16", "BF16", "Q8_0", "MXFP4"}
PACKAGE_ENCODES = ("F32", "F16", "BF16", "Q8_0")  # its other encoders give zero scales another sign than ggml


@cache
def golden() -> dict[str, np.ndarray]:
    """rows (n, 512) and importance (512,) f32, and for each type the bytes ggml wrote (fixtures/make_blocks.py)."""
    with np.load(BLOCKS / "blocks.npz") as found:
        return dict(found)


def compare(found: np.ndarray, expected: bytes, kind: QuantType) -> None:
    """Equal bytes, or the first block that differs with its fields."""
    if found.tobytes() == expected:
        return
    ours, theirs = found.view(kind.layout), np.frombuffer(expected, kind.layout)
    index = next(i for i in range(len(ours)) if ours[i].tobytes() != theirs[i].tobytes())
    count = sum(a.tobytes() != b.tobytes() for a, b in zip(ours, theirs, strict=True))
    pytest.fail(f"{kind.name}: {count} of {len(ours)} blocks differ, first {index}:\n{ours[index]}\n{theirs[index]}")


def compare_weighted(rows: np.ndarray, kind: QuantType, importance: np.ndarray) -> None:
    """Equal to ggml; where ggml writes an infinite scale, refused."""
    from ggml_oracle import ggml_quantize

    expected = ggml_quantize(rows, kind, importance)
    blocks = np.frombuffer(expected, kind.layout)
    halves = [name for name in blocks.dtype.names or () if blocks.dtype[name] == np.float16]
    if all(np.isfinite(blocks[name]).all() for name in halves):
        compare(quantize(rows, kind, importance), expected, kind)
    else:
        with pytest.raises(ScaleOverflow):
            quantize(rows, kind, importance)


@pytest.mark.parametrize("name", TYPES)
def test_golden_blocks(name: str) -> None:
    compare(quantize(golden()["rows"], TYPES[name]), golden()[name].tobytes(), TYPES[name])


@pytest.mark.parametrize("name", WEIGHTED)
def test_golden_blocks_with_importance(name: str) -> None:
    found = quantize(golden()["rows"], TYPES[name], golden()["importance"])
    compare(found, golden()[f"{name} weighted"].tobytes(), TYPES[name])


def test_the_types_without_importance_are_those_of_ggml() -> None:
    assert set(TYPES) - set(WEIGHTED) == NOT_WEIGHTED_BY_GGML & set(TYPES)


@pytest.mark.parametrize("name", PACKAGE_ENCODES)
def test_bytes_equal_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    for rows in named_rows(min(kind.largest, 6e4)).values():
        with np.errstate(all="ignore"):
            expected = gguf.quants.quantize(rows, GGMLQuantizationType[name])
        compare(quantize(rows, kind), expected.tobytes(), kind)


@pytest.mark.parametrize("name", TYPES)
def test_decoders_equal_the_gguf_package(name: str) -> None:
    kind = TYPES[name]
    for rows in named_rows(kind.largest).values():
        data = quantize(rows, kind).reshape(len(rows), -1)
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(data, GGMLQuantizationType[name])
        assert np.array_equal(dequantize(data, kind, rows.shape), expected.reshape(rows.shape))


@pytest.mark.parametrize("name", TYPES)
def test_decoders_equal_the_gguf_package_on_any_bytes(name: str) -> None:
    kind = TYPES[name]
    data = np.random.default_rng(3).integers(0, 256, (64, kind.n_bytes((1024,))), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, GGMLQuantizationType[name])
        found = dequantize(data, kind, (64, 1024))
    assert np.array_equal(found, expected.reshape(64, 1024), equal_nan=True)


@pytest.mark.engine
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_bytes_equal_ggml(name: str, shape: tuple[int, int]) -> None:
    from ggml_oracle import ggml_quantize

    kind = TYPES[name]
    for rows in named_rows(kind.largest, *shape).values():
        compare(quantize(rows, kind), ggml_quantize(rows, kind), kind)


@pytest.mark.engine
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_bytes_equal_ggml(name: str, shape: tuple[int, int]) -> None:
    kind = TYPES[name]
    for importance in named_importance(shape[1]).values():
        for rows in named_rows(kind.largest, *shape).values():
            compare_weighted(rows, kind, importance)


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_ten_million_weights_equal_ggml(name: str) -> None:
    from ggml_oracle import ggml_quantize

    for rows in stream(10_000_000, TYPES[name].largest, seed=100):
        compare(quantize(rows, TYPES[name]), ggml_quantize(rows, TYPES[name]), TYPES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTED)
def test_millions_of_weighted_weights_equal_ggml(name: str) -> None:
    kind = TYPES[name]
    for number, rows in enumerate(stream(3_000_000, kind.largest, seed=200)):
        kinds_of_importance = list(named_importance(rows.shape[1], seed=number).values())
        compare_weighted(rows, kind, kinds_of_importance[number % len(kinds_of_importance)])


@pytest.mark.parametrize("name", TYPES)
def test_chunks_and_threads_do_not_change_the_bytes(name: str) -> None:
    """More weights than one chunk holds give the same bytes as row by row, and in any order."""
    kind = TYPES[name]
    rows = np.random.default_rng(2).standard_normal((2 * kind.chunk // 512 + 3, 512), dtype=np.float32)
    by_row = b"".join(quantize(row, kind).tobytes() for row in rows[::64])
    found = quantize(rows, kind)
    assert found.reshape(len(rows), -1)[::64].tobytes() == by_row
    with ThreadPoolExecutor(3) as pool:
        assert quantize(rows, kind, run=pool.map).tobytes() == found.tobytes()


@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_rows_do_not_know_each_other(name: str) -> None:
    """More than one chunk of rows that do not divide it, also on threads."""
    kind, rng = TYPES[name], np.random.default_rng(2)
    rows = rng.standard_normal((kind.chunk // 3072 + 40, 3072), dtype=np.float32)
    importance = rng.random(3072, dtype=np.float32)
    by_row = b"".join(quantize(row, kind, importance).tobytes() for row in rows[::32])
    with ThreadPoolExecutor(2) as pool:
        found = quantize(rows, kind, importance, pool.map)
    assert found.reshape(len(rows), -1)[::32].tobytes() == by_row


@pytest.mark.parametrize("source", ["BF16", "F16", "Q8_0"])
def test_transcoding_is_decoding_and_encoding(source: str) -> None:
    rows = np.random.default_rng(4).standard_normal((40, 4096), dtype=np.float32)
    data = quantize(rows, TYPES[source])
    for kind in TYPES.values():
        expected = quantize(dequantize(data, TYPES[source], rows.shape), kind)
        assert np.array_equal(transcode(data, TYPES[source], kind, rows.shape), expected)


def test_encoding_leaves_the_weights_alone() -> None:
    rows = named_rows(1.0)["mixed"]
    for kind in TYPES.values():
        before = rows.copy()
        quantize(rows, kind)
        assert rows.tobytes() == before.tobytes()


@pytest.mark.parametrize("name", TYPES)
def test_ids_block_sizes_and_bytes_are_ggml_s(name: str) -> None:
    block, n_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    assert TYPES[name].ggml_id == GGMLQuantizationType[name].value
    assert (TYPES[name].block, TYPES[name].layout.itemsize) == (block, n_bytes)


def test_a_row_of_broken_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="row of 40 is no multiple of the block of 32"):
        quantize(np.zeros((2, 40), dtype=np.float32), TYPES["Q8_0"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", TYPES)
def test_what_cannot_be_stored_is_refused(name: str, bad: float) -> None:
    rows = np.zeros((300, 256), dtype=np.float32)
    rows[299, 5] = bad
    with pytest.raises(OutOfRange) as refusal:
        quantize(rows, TYPES[name])
    assert refusal.value.index == 299 * 256 + 5


@pytest.mark.parametrize("name", TYPES)
def test_the_largest_weight_comes_back_finite(name: str) -> None:
    kind = TYPES[name]
    for sign in (1, -1):
        for rest in (0, -sign * kind.largest, sign * kind.largest / 2):
            row = np.full((1, 256), rest, np.float32)
            row[0, 3] = sign * np.float32(kind.largest)
            back = dequantize(quantize(row, kind), kind, row.shape)
            assert np.isfinite(back).all()
            assert abs(back[0, 3] - row[0, 3]) <= 0.5 * kind.largest
            row[0, 3] = sign * np.float32(min(kind.largest * 1.001, float(np.finfo(np.float32).max)))
            if abs(row[0, 3]) > kind.largest:
                with pytest.raises(OutOfRange):
                    quantize(row, kind)


def test_scales_that_overflow_are_refused() -> None:
    """Importance can fit a minimum far below the smallest weight; ggml writes an infinite one."""
    rows = np.clip(named_rows(1.0)["normal"] / 3, -1, 1) * np.float32(TYPES["Q4_1"].largest)
    importance = named_importance(rows.shape[1])["wide spread"]
    with pytest.raises(ScaleOverflow, match="their scale overflows in Q4_1") as refusal:
        quantize(rows, TYPES["Q4_1"], importance)
    start = refusal.value.index
    assert start % 32 == 0
    quantize(
        rows.reshape(-1, 32)[: start // 32].reshape(-1)[: start // 1024 * 1024].reshape(-1, 1024),
        TYPES["Q4_1"],
        importance,
    )


@pytest.mark.parametrize("name", WEIGHTED)
def test_importance_has_to_be_one_row(name: str) -> None:
    with pytest.raises(ValueError, match=r"importance: found shape \(256,\), expected \(1024,\)"):
        quantize(np.zeros((2, 1024), np.float32), TYPES[name], np.ones(256, np.float32))


@pytest.mark.parametrize("name", TYPES)
def test_without_the_exact_einsum(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On ARM numpy's einsum fuses multiply and add, so sums take the other way there."""
    monkeypatch.setattr("convert_drafter.quant.columns.EINSUM_IS_EXACT", False)
    test_golden_blocks(name)
    if name in WEIGHTED:
        test_golden_blocks_with_importance(name)


@pytest.mark.engine
@pytest.mark.parametrize("width", [9216, 17408])
@pytest.mark.parametrize("name", WEIGHTED)
def test_wide_weighted_rows_equal_ggml(name: str, width: int) -> None:
    from ggml_oracle import ggml_quantize

    rng = np.random.default_rng(8)
    rows, importance = rng.standard_normal((3, width), dtype=np.float32), rng.random(width, dtype=np.float32)
    compare(quantize(rows, TYPES[name], importance), ggml_quantize(rows, TYPES[name], importance), TYPES[name])
