"""The GGUF container against the gguf package in both directions, spoiled files, and writes that are interrupted."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFWriter
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as T
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert_drafter.converters.errors import DrafterError, Problems, WrongInput
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf
from convert_drafter.converters.gguf_read import read_gguf

ARCH = KeyValue("general.architecture", T.STRING, "dflash")
KEYS = (
    KeyValue("general.name", T.STRING, "Ein Dräfter ✓"),
    ARCH,
    KeyValue("k.u8", T.UINT8, 255),
    KeyValue("k.i8", T.INT8, -128),
    KeyValue("k.u16", T.UINT16, 65535),
    KeyValue("k.i16", T.INT16, -32768),
    KeyValue("k.u32", T.UINT32, 2**32 - 1),
    KeyValue("k.i32", T.INT32, -(2**31)),
    KeyValue("k.u64", T.UINT64, 2**64 - 1),
    KeyValue("k.i64", T.INT64, -(2**63)),
    KeyValue("k.f32", T.FLOAT32, float(np.float32(1e-6))),
    KeyValue("k.f64", T.FLOAT64, 1e-300),
    KeyValue("k.yes", T.BOOL, True),
    KeyValue("k.empty", T.STRING, ""),
    KeyValue("a.bool", T.ARRAY, (True, False, True), T.BOOL),
    KeyValue("a.u8", T.ARRAY, (0, 255), T.UINT8),
    KeyValue("a.i32", T.ARRAY, (-1, 2, 2**31 - 1), T.INT32),
    KeyValue("a.f32", T.ARRAY, (0.5, -0.25), T.FLOAT32),
    KeyValue("tokenizer.ggml.tokens", T.ARRAY, ("<s>", "é", "", "a\nb", "\0", "中"), T.STRING),
)
TENSORS = (
    StoredTensor("f32.weight", (3, 5), Q.F32),
    StoredTensor("q8.weight", (4, 64), Q.Q8_0),
    StoredTensor("q4.weight", (2, 256), Q.Q4_K),
    StoredTensor("bf16.weight", (2, 3, 7), Q.BF16),
    StoredTensor("norm.weight", (9,), Q.F16),
    StoredTensor("scalar", (), Q.F32),
    StoredTensor("ids", (3,), Q.I64),
)


def content(tensor: StoredTensor) -> np.ndarray:
    return np.random.default_rng(len(tensor.name)).integers(0, 256, tensor.n_bytes, np.uint8)


def in_two(tensor: StoredTensor) -> Iterator[np.ndarray]:
    whole = content(tensor)
    yield whole[: len(whole) // 3]
    yield whole[len(whole) // 3 :]


def zeros(tensor: StoredTensor) -> list[np.ndarray]:
    return [np.zeros(tensor.n_bytes, np.uint8)]


def package_writes(path: Path, keys: tuple[KeyValue, ...], alignment: int | None = None) -> None:
    """The gguf package, used the ordinary way, with the same keys and tensors."""
    writer = GGUFWriter(path, "")
    if alignment:
        writer.data_alignment = alignment
    for key in keys:
        writer.add_key_value(key.key, key.value, key.type, key.element)
    for tensor in TENSORS:
        writer.add_tensor(tensor.name, content(tensor), raw_shape=stored_shape(tensor), raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """What add_tensor wants beside uint8 data: the last axis in bytes; it cannot do so for a tensor without axes."""
    return (*tensor.shape[:-1], tensor.row_bytes)


# Writing and reading


@pytest.mark.parametrize("keys", [KEYS, (*KEYS, KeyValue("general.alignment", T.UINT32, 128))], ids=["32", "128"])
def test_the_same_bytes_as_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Any) -> None:
    with_axes = tuple(tensor for tensor in TENSORS if tensor.shape)
    monkeypatch.setattr(sys.modules[__name__], "TENSORS", with_axes)
    package_writes(tmp_path / "package.gguf", keys, keys[-1].value if keys[-1].key == "general.alignment" else None)
    size = write_gguf(tmp_path / "ours.gguf", keys, with_axes, in_two)
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert ours == (tmp_path / "package.gguf").read_bytes()
    assert size == len(ours)


def test_round_trip(tmp_path: Path) -> None:
    """A path with a space and letters outside ASCII; key and tensor order are the given ones, nothing is added."""
    path = tmp_path / "ein dräfter ✓.gguf"
    write_gguf(path, KEYS, TENSORS, in_two)
    found = read_gguf(path)
    assert (found.path, found.version, found.alignment) == (path, 3, 32)
    assert tuple(found.keys.values()) == KEYS
    assert [type(key.value) for key in found.keys.values()] == [type(key.value) for key in KEYS]
    assert tuple(found.tensors.values()) == TENSORS
    for tensor in TENSORS:
        whole = content(tensor)
        assert found.offsets[tensor.name] % 32 == 0
        assert found.tensor_bytes(tensor.name).tobytes() == whole.tobytes()
        assert found.tensor_bytes(tensor.name, 2, 3).tolist() == [whole[2]]
        parts = list(found.slabs(tensor.name, 2 * tensor.row_bytes))
        assert all(part.shape[1] == tensor.row_bytes and len(part) <= 2 for part in parts)
        assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", KEYS, TENSORS, in_two)
    reader = GGUFReader(tmp_path / "m.gguf")
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert names == [key.key for key in KEYS]
    for key in KEYS:
        field = reader.fields[key.key]
        assert field.types == ([T.ARRAY, key.element] if key.element is not None else [key.type])
        assert field.contents() == (list(key.value) if isinstance(key.value, tuple) else key.value)
    for found, tensor in zip(reader.tensors, TENSORS, strict=True):
        assert (found.name, found.tensor_type) == (tensor.name, tensor.type)
        assert tuple(found.shape.tolist()) == tensor.shape[::-1]
        assert (found.n_elements, found.n_bytes) == (tensor.n_elements, tensor.n_bytes)
        assert found.data.tobytes() == content(tensor).tobytes()


def test_version_2_and_a_file_without_tensors_are_read(tmp_path: Path) -> None:
    """llama.cpp's vocab-only files have no tensors; version 2 differs from 3 in nothing that is read here."""
    raw = bytearray(gguf_bytes(tensors=[]))
    raw[4] = 2
    (tmp_path / "v.gguf").write_bytes(raw)
    found = read_gguf(tmp_path / "v.gguf")
    assert (found.version, list(found.keys), found.tensors) == (2, ["general.architecture"], {})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_data_may_be_any_array_whose_bytes_fit(tmp_path: Path, dtype: Any) -> None:
    """Also one that is not contiguous: its rows go out in order."""
    wide = np.arange(24).astype(dtype).reshape(4, 6)
    types = {np.float32: Q.F32, np.float16: Q.F16, ml_dtypes.bfloat16: Q.BF16, np.int64: Q.I64}
    write_gguf(tmp_path / "m.gguf", [ARCH], [StoredTensor("x", (4, 3), types[dtype])], lambda _: [wide[:, ::2]])
    assert read_gguf(tmp_path / "m.gguf").tensor_bytes("x").tobytes() == wide[:, ::2].tobytes()


def test_advance_hears_of_every_byte(tmp_path: Path) -> None:
    heard: list[int] = []
    write_gguf(tmp_path / "m.gguf", KEYS, TENSORS, in_two, heard.append)
    assert sum(heard) == sum(tensor.n_bytes for tensor in TENSORS)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / name, KEYS, TENSORS, in_two)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("type_", GGML_QUANT_SIZES)
def test_sizes_of_every_type(type_: Q) -> None:
    block, size = GGML_QUANT_SIZES[type_]
    tensor = StoredTensor("x", (3, 5, 2 * block), type_)
    assert (tensor.n_elements, tensor.row_bytes, tensor.n_bytes) == (30 * block, 2 * size, 30 * size)
    if block > 1:
        with pytest.raises(WrongInput, match=f"tensor 'x': row length: found 1, expected a multiple of {block} for"):
            _ = StoredTensor("x", (3, 1), type_).n_bytes


def test_only_the_asked_bytes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", KEYS, TENSORS, in_two)
    found = read_gguf(tmp_path / "m.gguf")
    with pytest.raises(IndexError, match=r"bytes 0\.\.61 of 60"):
        found.tensor_bytes("f32.weight", 0, 61)
    os.truncate(found.path, found.offsets["ids"] + 4)
    with pytest.raises(WrongInput, match="'ids': found 4 bytes, expected 24: file changed"):
        found.tensor_bytes("ids")


# Refused before anything is written

X = StoredTensor("x", (2,), Q.F32)


def array(value: Any, element: Any) -> KeyValue:
    return KeyValue("k", T.ARRAY, value, element)


WRONG_KEYS: list[tuple[str, KeyValue, str]] = [
    ("u8 above", KeyValue("k", T.UINT8, 256), "key 'k': found 256, expected UINT8"),
    ("u32 below", KeyValue("k", T.UINT32, -1), "key 'k': found -1, expected UINT32"),
    ("i32 above", KeyValue("k", T.INT32, 2**31), "expected INT32"),
    ("u64 above", KeyValue("k", T.UINT64, 2**64), "expected UINT64"),
    ("int is a bool", KeyValue("k", T.UINT32, True), "found True, expected UINT32"),
    ("int is a float", KeyValue("k", T.UINT32, 2.0), "found 2.0, expected UINT32"),
    ("bool is an int", KeyValue("k", T.BOOL, 1), "found 1, expected BOOL"),
    ("float is a bool", KeyValue("k", T.FLOAT32, True), "found True, expected FLOAT32"),
    ("float is text", KeyValue("k", T.FLOAT32, "1"), "found '1', expected FLOAT32"),
    ("float too large", KeyValue("k", T.FLOAT32, 1e39), "found 1e+39, expected FLOAT32"),
    ("numpy scalar", KeyValue("k", T.UINT32, np.uint32(1)), "expected UINT32"),  # type: ignore[arg-type]
    ("text is a number", KeyValue("k", T.STRING, 1), "found 1, expected STRING"),
    ("half a surrogate pair", KeyValue("k", T.STRING, "\ud800"), r"found '\ud800', expected STRING"),
    ("scalar is a tuple", KeyValue("k", T.UINT32, (1,)), "found (1,), expected UINT32"),
    ("array is a scalar", array(1, T.INT32), "key 'k': found 1 of"),
    ("array is empty", array((), T.INT32), "at least one"),
    ("array of nothing", array((1,), None), "found (1,) of None, expected a tuple of scalars"),
    ("array of arrays", array(((1,),), T.ARRAY), "expected a tuple of scalars"),
    ("array mixes", array((1, "a"), T.INT32), "found 'a', expected INT32"),
    ("array of ints as bools", array((0, 1), T.BOOL), "found 0, expected BOOL"),
    ("no name", KeyValue("", T.UINT8, 1), "key '': found no valid text"),
    ("twice", ARCH, "key 'general.architecture': found 2 times, expected once"),
    (
        "alignment 24",
        KeyValue("general.alignment", T.UINT32, 24),
        "found 24 of type UINT32, expected a UINT32, a power",
    ),
    ("alignment u64", KeyValue("general.alignment", T.UINT64, 32), "found 32 of type UINT64"),
    ("alignment 0", KeyValue("general.alignment", T.UINT32, 0), "found 0 of type UINT32"),
]


@pytest.mark.parametrize(("key", "part"), [row[1:] for row in WRONG_KEYS], ids=[row[0] for row in WRONG_KEYS])
def test_wrong_keys_are_named(tmp_path: Path, key: KeyValue, part: str) -> None:
    with pytest.raises(WrongInput) as caught:
        write_gguf(tmp_path / "m.gguf", [ARCH, key], [X], zeros)
    assert part in str(caught.value)
    assert str(tmp_path / "m.gguf") in str(caught.value)
    assert list(tmp_path.iterdir()) == []


WRONG_TENSORS: list[tuple[str, list[StoredTensor], str]] = [
    ("T-20 none", [], "found no tensor, expected at least one"),
    ("twice", [X, X], "tensor 'x': found 2 times"),
    ("no name", [StoredTensor("", (2,), Q.F32)], "name: expected 1 to 63 bytes"),
    ("name too long for ggml", [StoredTensor("é" * 32, (2,), Q.F32)], "name: expected 1 to 63 bytes"),
    ("five axes", [StoredTensor("x", (1,) * 5, Q.F32)], "shape: found (1, 1, 1, 1, 1), expected at most 4"),
    ("size 0", [StoredTensor("x", (2, 0), Q.F32)], "shape: found (2, 0), expected at most 4 sizes above 0"),
    ("overflow", [StoredTensor("x", (2**32, 2**31), Q.F32)], "product below 2^63"),
    ("row of 33 in Q8_0", [StoredTensor("x", (2, 33), Q.Q8_0)], "row length: found 33, expected a multiple of 32"),
]


@pytest.mark.parametrize(("tensors", "part"), [row[1:] for row in WRONG_TENSORS], ids=[row[0] for row in WRONG_TENSORS])
def test_wrong_tensors_are_named(tmp_path: Path, tensors: list[StoredTensor], part: str) -> None:
    """T-20: without a tensor nothing is written."""
    with pytest.raises(Problems) as caught:
        write_gguf(tmp_path / "m.gguf", [ARCH], tensors, zeros)
    assert part in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "key", [None, KeyValue("general.architecture", T.UINT8, 1), KeyValue("general.architecture", T.STRING, "")]
)
def test_the_architecture_has_to_be_given(tmp_path: Path, key: KeyValue | None) -> None:
    with pytest.raises(Problems, match=r"key 'general\.architecture': not found, expected the STRING"):
        write_gguf(tmp_path / "m.gguf", [key] if key else [], [X], zeros)


# Interrupted


@pytest.mark.parametrize(("count", "found"), [(7, "7"), (9, "9"), (0, "0")])
def test_data_of_the_wrong_size(tmp_path: Path, count: int, found: str) -> None:
    with pytest.raises(WrongInput, match=f"tensor 'x': data: found {found} bytes, expected 8"):
        write_gguf(tmp_path / "m.gguf", [ARCH], [X], lambda _: [np.zeros(count, np.uint8)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), ValueError("x"), WrongInput("x"), TimeoutError("x")])
def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, trouble: BaseException) -> None:
    """T-23, T-65: no partial file, an older file keeps its bytes, and the error is not taken for a full disk."""

    def data(tensor: StoredTensor) -> Iterator[np.ndarray]:
        yield np.zeros(4, np.uint8)
        raise trouble

    (tmp_path / "m.gguf").write_bytes(b"older")
    with pytest.raises(type(trouble)):
        write_gguf(tmp_path / "m.gguf", [ARCH], [X], data)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.gguf", b"older")]


def test_the_final_name_appears_only_at_the_end(tmp_path: Path) -> None:
    """T-23, T-65."""

    def data(tensor: StoredTensor) -> Iterator[np.ndarray]:
        assert [path.name for path in tmp_path.iterdir()] == ["m.gguf.partial"]
        yield np.zeros(8, np.uint8)

    write_gguf(tmp_path / "m.gguf", [ARCH], [X], data)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from gguf import GGMLQuantizationType as Q, GGUFValueType as T
from convert_drafter.converters.gguf_file import KeyValue, StoredTensor, write_gguf

def data(tensor):
    yield np.zeros(4096, np.uint8)
    os.kill(os.getpid(), signal.SIGKILL)

arch = KeyValue("general.architecture", T.STRING, "dflash")
write_gguf(Path(sys.argv[1]), [arch], [StoredTensor("x", (2048,), Q.F32)], data)
"""


def test_a_killed_write_leaves_no_file_and_the_next_one_succeeds(tmp_path: Path) -> None:
    """T-23, T-65: SIGKILL lets nobody clean up, so the stale partial file is the next run's to overwrite."""
    path = tmp_path / "m.gguf"
    child = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf.partial"]
    write_gguf(path, [ARCH], [X], zeros)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]
    assert read_gguf(path).tensor_bytes("x").tolist() == [0] * 8


def parent_is_a_file(tmp: Path) -> Path:
    (tmp / "file").write_bytes(b"")
    return tmp / "file" / "m.gguf"


def is_a_folder(tmp: Path) -> Path:
    (tmp / "m.gguf").mkdir()
    return tmp / "m.gguf"


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (parent_is_a_file, "Not a directory"),
        (is_a_folder, "it is a folder"),
        (lambda tmp: tmp / "missing" / "m.gguf", "No such file or directory"),
        (lambda tmp: tmp / ("m" * 300), "File name too long"),
    ],
    ids=["parent is a file", "is a folder", "missing folder", "name too long"],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, build: Callable[[Path], Path], reason: str) -> None:
    path = build(tmp_path)
    with pytest.raises(WrongInput) as caught:
        write_gguf(path, [ARCH], [X], zeros)
    assert f"{path}: cannot be written: {reason}" in str(caught.value)


@pytest.mark.parametrize("call", ["fsync", "write"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(GGUFWriter, "write_kv_data_to_file", full)
    with pytest.raises(WrongInput, match=r"m\.gguf: cannot be written: No space left on device"):
        write_gguf(tmp_path / "m.gguf", [ARCH], [X], zeros)
    assert list(tmp_path.iterdir()) == []


# Spoiled files


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, *value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + b"".join(value)


def info(name: str = "x", dims: tuple[int, ...] = (8,), type_: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type_, offset)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


NAMED = key("general.architecture", 8, text("dflash"))


def gguf_bytes(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: int = 32,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF\3\0\0\0",
) -> bytes:
    """A GGUF from raw parts, with `data` zero bytes after the padding; `counts` may lie."""
    keys = [NAMED] if keys is None else [NAMED, *keys]
    tensors = [info()] if tensors is None else tensors
    n_tensors, n_keys = counts or (len(tensors), len(keys))
    head = magic + u64(n_tensors) + u64(n_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 2**62
SPOILED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "byte 0: magic: found 0 bytes left, expected 4: truncated"),
    ("not GGUF", b"PK\3\4" + bytes(40), "magic: found b'PK\\x03\\x04', expected b'GGUF'"),
    ("T-70 head cut", gguf_bytes()[:14], "number of tensors: found 6 bytes left, expected 8"),
    ("version 1", gguf_bytes(magic=b"GGUF\1\0\0\0"), "found version 1, expected little-endian version 2 or 3"),
    ("version 4", gguf_bytes(magic=b"GGUF\4\0\0\0"), "found version 4"),
    ("big-endian", gguf_bytes(magic=b"GGUF\0\0\0\3"), "found big-endian GGUF, expected little-endian"),
    ("count of tensors", gguf_bytes(counts=(HUGE, 1)), f"number of tensors: found {HUGE}, expected as many as fit"),
    ("count of keys", gguf_bytes(counts=(1, 2**64 - 1)), f"number of keys: found {2**64 - 1}, expected as many"),
    ("key too long", gguf_bytes([u64(HUGE) + b"k"]), "byte 70: key: found 90 bytes left, expected 4611686018427387912"),
    ("key is empty", gguf_bytes([key("", 0, b"\0")]), "key '': found no name"),
    ("key not UTF-8", gguf_bytes([key(b"\xff", 0, b"\0")]), "byte 70: key: found 'utf-8' codec can't decode"),
    ("key twice", gguf_bytes([NAMED]), "key 'general.architecture': found it twice"),
    ("value type 13", gguf_bytes([key("k", 13)]), "key 'k': found GGUFValueType 13, expected one of UINT8, INT8"),
    ("string too long", gguf_bytes([key("k", 8, u64(2**64 - 1))]), "key 'k': found"),
    ("string not UTF-8", gguf_bytes([key("k", 8, text(b"\xc3"))]), "key 'k': found 'utf-8' codec can't decode"),
    ("bool of 2", gguf_bytes([key("k", 7, b"\2")]), "key 'k': found a BOOL above 1, expected 0 or 1"),
    ("array of arrays", gguf_bytes([key("k", 9, u32(9), u64(1))]), "key 'k': found an array of arrays"),
    ("array of type 99", gguf_bytes([key("k", 9, u32(99), u64(1))]), "key 'k': found GGUFValueType 99"),
    ("array too long", gguf_bytes([key("k", 9, u32(4), u64(HUGE))]), "key 'k': found"),
    ("strings too many", gguf_bytes([key("k", 9, u32(8), u64(HUGE))]), f"key 'k': found {HUGE} strings, expected"),
    ("alignment 24", gguf_bytes([key("general.alignment", 4, u32(24))]), "'general.alignment': found 24 of type"),
    ("alignment 0", gguf_bytes([key("general.alignment", 4, u32(0))]), "found 0 of type UINT32"),
    ("alignment 2^31", gguf_bytes([key("general.alignment", 4, u32(2**31))]), f"found {2**31} of type UINT32"),
    ("alignment text", gguf_bytes([key("general.alignment", 8, text("32"))]), "found '32' of type STRING"),
    ("split", gguf_bytes([key("split.count", 2, b"\3\0")]), "'split.count': found one of 3 parts"),
    ("tensor twice", gguf_bytes(tensors=[info(), info(offset=32)], data=64), "tensor 'x': found it twice"),
    ("tensor name empty", gguf_bytes(tensors=[info("")]), "tensor '': name: expected 1 to 63 bytes"),
    ("tensor name long", gguf_bytes(tensors=[info("x" * 64)]), "name: expected 1 to 63 bytes"),
    ("five dims", gguf_bytes(tensors=[info(dims=(1,) * 5)]), "tensor 'x': shape: found (1, 1, 1, 1, 1), expected"),
    ("2^32-1 dims", gguf_bytes(tensors=[text("x") + b"\xff" * 4 + bytes(20)]), "tensor 'x': found 77 bytes left"),
    ("dim 0", gguf_bytes(tensors=[info(dims=(0, 2))]), "tensor 'x': shape: found (2, 0), expected at most 4"),
    ("overflow", gguf_bytes(tensors=[info(dims=(2**32, 2**32))]), "their product below 2^63"),
    ("ggml type 137", gguf_bytes(tensors=[info(type_=137)]), "'x': found GGMLQuantizationType 137, expected one of"),
    ("row of 8 in Q8_0", gguf_bytes(tensors=[info(type_=8)]), "row length: found 8, expected a multiple of 32"),
    ("offset not aligned", gguf_bytes(tensors=[info(offset=8)], data=64), "'x' is not aligned to 32: found offset 8"),
    ("offset hole", gguf_bytes(tensors=[info(offset=32)], data=64), "'x' leaves a hole before it: found offset 32"),
    ("offset overlap", gguf_bytes(tensors=[info(), info("y")]), "'y' overlaps the one before it: found offset 0"),
    ("offset 2^64-32", gguf_bytes(tensors=[info(offset=2**64 - 32)]), "leaves a hole before it"),
    ("T-70 data cut", gguf_bytes()[:-1], "tensor 'x': truncated: it ends at byte 160, the file at 159"),
    ("T-70 no data", gguf_bytes(tensors=[info(dims=(2**40,))]), "tensor 'x': truncated: it ends at byte"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "part"), [row[1:] for row in SPOILED], ids=[row[0] for row in SPOILED])
def test_spoiled_files_are_named_without_allocating(tmp_path: Path, raw: bytes, part: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(WrongInput) as caught:
            read_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert part in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert peak < 2**22


def test_metadata_has_a_limit(tmp_path: Path) -> None:
    """A sparse file is long enough for what it claims; no vocabulary is."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes([key("k", 8, u64(10**9))]))
    os.truncate(path, 2 * 10**9)
    with pytest.raises(WrongInput, match="key 'k': found 67108781 bytes left, expected 1000000008"):
        read_gguf(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match=r"m\.gguf: cannot be read: No such file"):
        read_gguf(tmp_path / "m.gguf")


VALID = gguf_bytes(
    [key("k", 9, u32(8), u64(2), text("a"), text("é")), key("b", 9, u32(7), u64(2), b"\1\0"), key("f", 6, u32(7))],
    [info(), info("y", (32, 2), 8, 32)],
    128,
)
DAMAGE = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=4)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=DAMAGE, cut=st.integers(0, 2 * len(VALID)))
def test_damage_is_read_or_refused_never_a_crash(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    """T-70: flipped bytes and cut ends."""
    raw = bytearray(VALID)
    for at, value in flips:
        raw[at] = value
    path = tmp_path / "m.gguf"
    path.write_bytes(raw[: cut if cut < len(VALID) else None])
    try:
        found = read_gguf(path)
    except DrafterError:
        return
    for name in found.tensors:
        assert len(found.tensor_bytes(name)) == found.tensors[name].n_bytes


def test_the_undamaged_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(VALID)
    found = read_gguf(tmp_path / "m.gguf")
    assert (found.keys["k"].value, found.keys["b"].value) == (("a", "é"), (True, False))
    assert found.tensors["y"] == StoredTensor("y", (2, 32), Q.Q8_0)
