"""Importance matrices: the numbers llama-quantize would use, from both formats, and an error for every damaged file."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import llama_binary
from ggml_oracle import ggml_quantize
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from published import PAIR
from target_gguf import write_target

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.importance import read_importance
from convert_drafter.quant import QuantType

NAME = "blk.0.ffn_down.weight"
F32, F16, I32 = 0, 1, 26
Values = Sequence[float] | np.ndarray


# --- files made by hand ---


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def string(value: str) -> bytes:
    return struct.pack("<I", 8) + text(value)


def strings(*values: str) -> bytes:
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))


def u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


KEYS = {
    "general.type": string("imatrix"),
    "imatrix.datasets": strings("wiki.txt", "code.txt"),
    "imatrix.chunk_count": u32(7),
    "imatrix.chunk_size": u32(512),
}


def gguf_bytes(
    tensors: Mapping[str, tuple[Sequence[int], Values]], keys: Mapping[str, bytes] = KEYS, kind: int = F32
) -> bytes:
    """A GGUF of these tensors: name -> (ggml's sizes, values)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    head += b"".join(text(key) + value for key, value in keys.items())
    data = b""
    for name, (sizes, values) in tensors.items():
        head += text(name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + struct.pack("<IQ", kind, len(data))
        item = np.asarray(values, {F32: "<f4", F16: "<f2", I32: "<i4"}[kind]).tobytes()
        data += item + bytes(-len(item) % 32)
    return head + bytes(-len(head) % 32) + data


def entry(sums: Values, counts: Values, name: str = NAME) -> dict[str, tuple[Sequence[int], Values]]:
    n = max(1, len(counts))
    return {f"{name}.in_sum2": ((len(sums) // n, n), sums), f"{name}.counts": ((1, len(counts)), counts)}


def dat_bytes(
    entries: Sequence[tuple[str, int, Values]], end: tuple[int, str] | None = (7, "wiki.txt"), count: int | None = None
) -> bytes:
    """The older format: name, calls and values of each entry, then the chunks and the data set."""
    out = struct.pack("<i", len(entries) if count is None else count)
    for name, calls, values in entries:
        data = name.encode()
        out += struct.pack("<i", len(data)) + data + struct.pack("<ii", calls, len(values))
        out += np.asarray(values, "<f4").tobytes()
    if end is not None:
        data = end[1].encode()
        out += struct.pack("<ii", end[0], len(data)) + data
    return out


def written(folder: Path, data: bytes) -> Path:
    path = folder / "imatrix"
    path.write_bytes(data)
    return path


# --- the numbers ---


def test_gguf_gives_sums_over_counts_in_f32(tmp_path: Path) -> None:
    sums = np.array([1, 2, 4, 0.1, 1e-30, 3e38, 0, -0.0], np.float32)
    found = read_importance(written(tmp_path, gguf_bytes(entry(sums, [3]))))
    values = found.for_tensor(NAME, 8)
    assert values is not None and values.dtype == np.float32
    assert values.tobytes() == (sums / np.float32(3)).tobytes()
    assert found.datasets == ("wiki.txt", "code.txt")
    assert found.chunk_count == 7


def test_each_expert_has_its_own_count_and_one_without_is_all_ones(tmp_path: Path) -> None:
    """As load_imatrix in quantize.cpp: what was never measured weighs every column alike."""
    sums = [2, 4, 9, 9, 5, 10]
    values = read_importance(written(tmp_path, gguf_bytes(entry(sums, [2, 0, 5])))).for_tensor(NAME, 2, 3)
    assert values is not None
    assert values.tolist() == [[1, 2], [1, 1], [1, 2]]


def test_one_count_may_serve_several_matrices(tmp_path: Path) -> None:
    """A dense tensor of three dimensions is stored with a single count."""
    values = read_importance(written(tmp_path, gguf_bytes(entry([2, 4, 6, 8], [2])))).for_tensor(NAME, 2, 2)
    assert values is not None
    assert values.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(("count", "divisor"), [(2.5, 3), (3.5, 4), (2.49, 2), (0.5, 1), (0.25, None)])
def test_counts_are_whole_numbers_halves_up(tmp_path: Path, count: float, divisor: float | None) -> None:
    """lround in imatrix-loader.cpp; numpy's own rounding would take halves to even numbers."""
    values = read_importance(written(tmp_path, gguf_bytes(entry([12], [count])))).for_tensor(NAME, 1)
    assert values is not None
    assert values.tolist() == [1 if divisor is None else 12 / divisor]


@pytest.mark.parametrize(("calls", "divisor"), [(4, 4), (1, 1), (0, 1), (-3, 1)])
def test_dat_gives_values_over_calls(tmp_path: Path, calls: int, divisor: int) -> None:
    sums = np.array([1, 2, 0.3], np.float32)
    found = read_importance(written(tmp_path, dat_bytes([("a", 1, [5]), (NAME, calls, sums)])))
    values = found.for_tensor(NAME, 3)
    assert values is not None
    assert values.tobytes() == (sums / np.float32(divisor)).tobytes()
    assert (found.datasets, found.chunk_count) == (("wiki.txt",), 7)


@pytest.mark.parametrize("end", [None, (3, "")])
def test_dat_without_a_data_set(tmp_path: Path, end: tuple[int, str] | None) -> None:
    found = read_importance(written(tmp_path, dat_bytes([(NAME, 1, [1])], end)))
    assert (found.datasets, found.chunk_count) == ((), end[0] if end else 0)


def test_other_statistics_are_passed_over(tmp_path: Path) -> None:
    tensors = {
        **entry([2], [1]),
        f"{NAME}.in_sum": ((1, 1), [-5]),
        f"{NAME}.stats": ((2,), [np.nan, -1]),
    }
    assert list(read_importance(written(tmp_path, gguf_bytes(tensors))).entries) == [NAME]


def test_no_entry_is_none(tmp_path: Path) -> None:
    assert read_importance(written(tmp_path, gguf_bytes(entry([2], [1])))).for_tensor("output.weight", 1) is None


@pytest.mark.parametrize("data", [gguf_bytes(entry([1, 2, 3], [1])), dat_bytes([(NAME, 1, [1, 2, 3])])])
@pytest.mark.parametrize(("row", "matrices"), [(2, 1), (3, 2), (1, 1)])
def test_an_entry_of_another_length_is_refused(tmp_path: Path, data: bytes, row: int, matrices: int) -> None:
    found = read_importance(written(tmp_path, data))
    with pytest.raises(WrongInput, match=rf"imatrix: {NAME}: found 3 values, expected {row * matrices} "):
        found.for_tensor(NAME, row, matrices)


def test_an_embedding_of_another_length_is_left_out(tmp_path: Path) -> None:
    """As llama-quantize does for the two embeddings alone (tensor_name_match_token_embd)."""
    found = read_importance(written(tmp_path, gguf_bytes(entry([1, 2, 3], [1], "token_embd.weight"))))
    assert found.for_tensor("token_embd.weight", 4) is None
    assert found.for_tensor("token_embd.weight", 3) is not None


def test_values_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert_drafter.converters.importance.SLAB", 3)
    sums = np.arange(10, dtype=np.float32)
    sums[7] = np.nan
    with pytest.raises(WrongInput, match="value 7: found nan"):
        read_importance(written(tmp_path, gguf_bytes(entry(sums, [1]))))


# --- hostile and damaged files ---

BAD_VALUES = [np.nan, np.inf, -np.inf, -1.0, -1e-30]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_values_ggml_should_not_see_are_refused(tmp_path: Path, value: float, form: str) -> None:
    sums = [1, 2, value, 3]
    data = gguf_bytes(entry(sums, [1])) if form == "gguf" else dat_bytes([(NAME, 1, sums)])
    with pytest.raises(WrongInput, match=rf"imatrix: {NAME}: value 2: found {value:g}, expected a finite number"):
        read_importance(written(tmp_path, data))


@pytest.mark.parametrize("count", [np.nan, np.inf, -1.0, 1e30])
def test_counts_that_count_nothing_are_refused(tmp_path: Path, count: float) -> None:
    message = re.escape(f"{NAME}.counts: found {count:g}, expected a number of rows")
    with pytest.raises(WrongInput, match=message):
        read_importance(written(tmp_path, gguf_bytes(entry([1, 2], [1, count]))))


@pytest.mark.parametrize("key", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    """Without them llama-quantize stops too; a model's GGUF is the usual reason."""
    keys = {name: value for name, value in KEYS.items() if name != key}
    with pytest.raises(WrongInput, match=rf"imatrix: {key}: missing \(general.type: imatrix\), expected an importance"):
        read_importance(written(tmp_path, gguf_bytes(entry([1], [1]), keys)))


@pytest.mark.parametrize("change", [{"imatrix.datasets": u32(1)}, {"imatrix.chunk_count": string("7")}])
def test_keys_of_other_types_are_refused(tmp_path: Path, change: dict[str, bytes]) -> None:
    with pytest.raises(WrongInput, match="found other types"):
        read_importance(written(tmp_path, gguf_bytes(entry([1], [1]), {**KEYS, **change})))


SUMS_ONLY = {f"{NAME}.in_sum2": ((2,), [1, 2])}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "found no entry"),
        ({"output.weight": ((2,), [1, 2])}, "found no entry"),
        (SUMS_ONLY, "counts is missing"),
        ({f"{NAME}.counts": ((1,), [1])}, "in_sum2 is missing"),
        ({f"{NAME}.in_sum": ((1,), [1])}, "in_sum2 is missing"),
        ({**SUMS_ONLY, f"{NAME}.counts": ((1, 3), [1, 1, 1])}, "equal shares"),
        ({**entry([1, 2], [1]), f"{NAME}.in_sum": ((1,), [1])}, "equal shares"),
    ],
    ids=["no tensor", "a model's", "no counts", "counts alone", "means alone", "three counts for two", "short means"],
)
def test_entries_that_are_no_pair_are_refused(tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        read_importance(written(tmp_path, gguf_bytes(tensors)))


@pytest.mark.parametrize("kind", [F16, I32])
def test_other_tensor_types_are_refused(tmp_path: Path, kind: int) -> None:
    with pytest.raises(WrongInput, match=rf"{NAME}.in_sum2: found \w+, expected F32"):
        read_importance(written(tmp_path, gguf_bytes(entry([1, 2], [1]), kind=kind)))


ONE = dat_bytes([(NAME, 1, [1, 2])])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "number of entries: found 4 bytes, expected at most the 0"),
        (dat_bytes([(NAME, 1, [1])], count=0), "number of entries: found 0"),
        (dat_bytes([(NAME, 1, [1])], count=-1), "number of entries: found -1"),
        (dat_bytes([(NAME, 1, [1])], count=2**31 - 1), "number of entries: found 2147483647"),
        (dat_bytes([(NAME, 1, [1])] * 2), "name of entry 1: found 'blk.0.ffn_down.weight', expected a name of its own"),
        (dat_bytes([("", 1, [1, 2])]), "name of entry 0: found ''"),
        (dat_bytes([("x" * 64, 1, [1])]), "length of the name of entry 0: found 64, expected at most 63"),
        (ONE.replace(NAME.encode(), b"\xff" * len(NAME)), "name of entry 0: found .*, expected UTF-8"),
        (struct.pack("<ii", 1, -5) + ONE, "name of entry 0: found -5 bytes"),
        (dat_bytes([(NAME, 1, [])]), f"length of '{NAME}': found 0"),
        (ONE[:33] + struct.pack("<i", 2**30) + ONE[37:], f"length of '{NAME}': found 1073741824"),
        (ONE + b"more", "end: found 7 chunks and 4 more bytes"),
        (dat_bytes([(NAME, 1, [1])], (-1, "x")), "end: found -1 chunks"),
        (dat_bytes([(NAME, 1, [1])], (1, ""))[:-4] + struct.pack("<i", 2**31 - 1), "length of the data set"),
        (b"\x93NUMPY" + bytes(100), "number of entries: found 1297436307"),
        (b"GGUF", "version|magic|number"),
        (b"\0GGUF" + bytes(50), "number of entries"),
    ],
)
def test_what_is_no_dat_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(WrongInput, match=message):
        read_importance(written(tmp_path, data))


def test_nothing_there_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(WrongInput, match="cannot be read"):
            read_importance(path)


GOOD_GGUF = gguf_bytes({**entry([1, 2, 3, 4], [2, 0]), **entry([5, 6], [1], "b")})
GOOD_DAT = dat_bytes([(NAME, 2, [1, 2, 3]), ("b", 1, [4])])
WITHOUT_END = dat_bytes([(NAME, 2, [1, 2, 3]), ("b", 1, [4])], None)


@pytest.mark.parametrize(
    ("data", "lengths"),
    [
        (GOOD_GGUF, range(len(GOOD_GGUF.rstrip(b"\0")))),  # the last tensor's padding is in no reader's way
        (GOOD_DAT, set(range(len(GOOD_DAT))) - {len(WITHOUT_END)}),  # there older files end
    ],
    ids=["gguf", "dat"],
)
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, data: bytes, lengths: Iterable[int]) -> None:
    """T-70."""
    for size in lengths:
        with pytest.raises(WrongInput, match="imatrix"):
            read_importance(written(tmp_path, data[:size]))


@pytest.mark.parametrize("good", [GOOD_GGUF, GOOD_DAT], ids=["gguf", "dat"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_a_damaged_file_is_no_traceback(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    spoiled = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(good) - 1))
        value = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        spoiled[place] = value
    read_everything(written(tmp_path, bytes(spoiled)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(data=b"\1\0\0\0\1\0\0\0a\0\0\0\0\1\0\0\0\0\0\0\0")
@given(data=st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: b"GGUF\3\0\0\0" + b))
def test_any_bytes_are_refused_or_read(tmp_path: Path, data: bytes) -> None:
    read_everything(written(tmp_path, data))


def read_everything(path: Path) -> None:
    try:
        found = read_importance(path)
    except WrongInput as error:
        assert str(path) in str(error)
        return
    for name, stored in found.entries.items():
        values = found.for_tensor(name, stored.size)
        assert values is not None and np.all(values >= 0) and np.all(np.isfinite(values))


# --- the real llama-imatrix and llama-quantize ---

Q4_0 = QuantType(
    "Q4_0", 2, 32, np.dtype([("scale", "<f2"), ("codes", "u1", 16)]), lambda w: w, lambda b: b, 65504.0
)  # only its size is used


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny target and its importance matrix in both formats, over 4 chunks."""
    folder = tmp_path_factory.mktemp("imatrix")
    write_target(PAIR / "target", folder / "target.gguf")
    lines = (f"Line {i}: the {word} of number {i * 7 % 13} is {i * i}." for i in range(60) for word in ("sum", "root"))
    (folder / "text.txt").write_text(" ".join(lines))
    for form in ("gguf", "dat"):
        options = ["-c", "64", "-b", "64", "--chunks", "4", "-t", "2", "--no-ppl", "--output-format", form]
        run(folder, "llama-imatrix", "-m", "target.gguf", "-f", "text.txt", "-o", f"imatrix.{form}", *options)
    return folder


def run(folder: Path, program: str, *arguments: str) -> None:
    done = subprocess.run([str(llama_binary(program)), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.engine
def test_both_formats_of_llama_imatrix_give_equal_numbers(measured: Path) -> None:
    """4 chunks: the older format multiplies by their number and rounds, which a power of two does not change."""
    new, old = (read_importance(measured / f"imatrix.{form}") for form in ("gguf", "dat"))
    assert (new.datasets, new.chunk_count) == (old.datasets, old.chunk_count) == (("text.txt",), 4)
    assert set(new.entries) == set(old.entries) and len(new.entries) == 6 * 7
    for name, stored in new.entries.items():
        one, other = new.for_tensor(name, stored.size), old.for_tensor(name, stored.size)
        assert one is not None and other is not None and one.tobytes() == other.tobytes()


@pytest.mark.engine
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_llama_quantize_uses_these_numbers(measured: Path, form: str) -> None:
    """Every tensor of its Q4_0, weight for weight, from our values and ggml's own quantizer."""
    out = f"{form}.gguf"
    run(measured, "llama-quantize", "--pure", "--imatrix", f"imatrix.{form}", "target.gguf", out, "Q4_0", "2")
    importance = read_importance(measured / f"imatrix.{form}")
    source, result = read_gguf(measured / "target.gguf"), read_gguf(measured / out)
    weighted = 0
    for name, stored in result.tensors.items():
        if stored.type.name != "Q4_0":
            continue
        rows = source.tensor_bytes(name).view("<f4").reshape(stored.shape)
        values = importance.for_tensor(name, stored.shape[-1])
        weighted += values is not None
        assert result.tensor_bytes(name).tobytes() == ggml_quantize(rows, Q4_0, values), name
    assert weighted == len(importance.entries)
