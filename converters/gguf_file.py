"""GGUF files: strict reading, atomic streaming writing.

Layout: docs/gguf.md of ggml; limits as in its gguf.cpp. Only here torch order meets ggml's, which is its reverse.
"""

from __future__ import annotations

import math
import os
import reprlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

from convert_drafter.converters.errors import Problems, WrongInput

Scalar = bool | int | float | str
Bytes = npt.NDArray[np.uint8]
Chunks = Iterable[npt.NDArray[Any]]
Advance = Callable[[int], None]
T = GGUFValueType
E = TypeVar("E", GGUFValueType, GGMLQuantizationType)

ARCHITECTURE, ALIGNMENT, SPLIT_COUNT = "general.architecture", "general.alignment", "split.count"
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 2**20
MAX_DIMS, MAX_NAME = 4, 63  # bytes of a tensor name; ggml's limit of 64 counts its closing zero
MAX_METADATA = 2**26  # bytes; the largest vocabularies fill a third
CODES = {  # of Python's struct module
    T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i", T.UINT64: "Q", T.INT64: "q",
    T.FLOAT32: "f", T.FLOAT64: "d", T.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry with its exact GGUF type; `element` is the element type of an ARRAY."""

    key: str
    type: GGUFValueType
    value: Scalar | tuple[Scalar, ...]
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a GGUF file: shape in torch order [out, in], type as ggml names it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the last axis; raises `WrongInput` if the row is no whole number of blocks."""
        length = self.shape[-1] if self.shape else 1
        block, size = GGML_QUANT_SIZES[self.type]
        if length % block:
            expected = f"a multiple of {block} for {self.type.name}"
            raise WrongInput(f"tensor {self.name!r}: row length: found {length}, expected {expected}: use another type")
        return length // block * size

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF whose metadata holds; dicts are in file order, `offsets` are absolute byte positions."""

    path: Path
    version: int
    alignment: int
    keys: dict[str, KeyValue]
    tensors: dict[str, StoredTensor]
    offsets: dict[str, int]

    def tensor_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes start..stop of a tensor as it is stored; only they are read. KeyError, IndexError: no such bytes."""
        size = self.tensors[name].n_bytes
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise IndexError(f"tensor {name!r}: bytes {start}..{stop} of {size}")
        found = np.empty(stop - start, np.uint8)
        with _deed(self.path, "read"), self.path.open("rb") as file:
            file.seek(self.offsets[name] + start)
            count = file.readinto(found.data)
        if count != len(found):
            raise WrongInput(f"{self.path}: tensor {name!r}: found {count} bytes, expected {len(found)}: file changed")
        return found

    def slabs(self, name: str, max_bytes: int = 16 * 2**20) -> Iterator[Bytes]:
        """All rows as stored, in order, `(rows, row_bytes)`: as many at a time as fit `max_bytes`, at least one."""
        row, size = self.tensors[name].row_bytes, self.tensors[name].n_bytes
        step = max(1, max_bytes // row) * row
        for start in range(0, size, step):
            yield self.tensor_bytes(name, start, min(start + step, size)).reshape(-1, row)


def write_gguf(
    path: Path, keys: Sequence[KeyValue], tensors: Sequence[StoredTensor], data: Callable[[StoredTensor], Chunks],
    advance: Advance = lambda n_bytes: None,
) -> int:  # fmt: skip
    """Write a GGUF under `path` completely or not at all; returns its size in bytes.

    `data(tensor)` yields arrays that together are exactly the tensor's bytes; `advance` hears of bytes gone out.
    Raises `Problems` for keys or tensors a GGUF cannot hold, `WrongInput` for wrong data or an unwritable place.
    """
    if problems := _key_problems(keys) + _tensor_problems(tensors):
        raise Problems(str(path), problems)
    alignment = _alignment(path, {entry.key: entry for entry in keys})
    partial = path.with_name(path.name + ".partial")
    try:
        with _deed(path, "written"):
            if path.is_dir():
                raise IsADirectoryError(None, "it is a folder; give a file name")
            _write_head(partial, keys, tensors, alignment)
            file = partial.open("ab", buffering=0)
        with file:
            for tensor in tensors:
                _write_tensor(path, file, tensor, data(tensor), advance)
                _put(path, file, memoryview(bytes(-tensor.n_bytes % alignment)))
            with _deed(path, "written"):
                os.fsync(file.fileno())
                size = file.tell()
        with _deed(path, "written"):
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)
    return size


def _write_head(partial: Path, keys: Sequence[KeyValue], tensors: Sequence[StoredTensor], alignment: int) -> None:
    """Everything before the data; the gguf package packs it, and adds no key of its own if it is given no name."""
    writer = GGUFWriter(None, "")
    writer.data_alignment = alignment
    for entry in keys:
        writer.add_key_value(entry.key, entry.value, entry.type, entry.element)
    for tensor in tensors:  # uint8 would say that the shape counts bytes, any other dtype is ignored
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, tensor.type)
    try:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for file in writer.fout or ():
            writer.write_padding(file, file.tell())
    finally:
        writer.close()


def _write_tensor(path: Path, file: FileIO, tensor: StoredTensor, chunks: Chunks, advance: Advance) -> None:
    sent = 0
    for chunk in chunks:
        piece = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        sent += len(piece)
        if sent > tensor.n_bytes:
            break
        _put(path, file, piece)
        advance(len(piece))
    if sent != tensor.n_bytes:
        raise WrongInput(f"{path}: tensor {tensor.name!r}: data: found {sent} bytes, expected {tensor.n_bytes}")


def _put(path: Path, file: FileIO, piece: memoryview) -> None:
    with _deed(path, "written"):
        while piece:  # an unbuffered write may take only a part
            piece = piece[file.write(piece) :]


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power cut; some systems cannot, and the file is complete without it."""
    with suppress(OSError), ExitStack() as stack:
        descriptor = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        os.fsync(descriptor)


def _key_problems(keys: Sequence[KeyValue]) -> list[str]:
    problems = [f"key {entry.key!r}: {misfit}" for entry in keys if (misfit := _misfit(entry))]
    if not any(entry.key == ARCHITECTURE and entry.type is T.STRING and entry.value for entry in keys):
        problems.append(f"key {ARCHITECTURE!r}: not found, expected the STRING that every runtime reads first")
    return problems + _repeated("key", [entry.key for entry in keys])


def _tensor_problems(tensors: Sequence[StoredTensor]) -> list[str]:
    if not tensors:
        return ["found no tensor, expected at least one: nothing of the source was recognized"]
    return list(filter(None, map(_tensor_fault, tensors))) + _repeated("tensor", [tensor.name for tensor in tensors])


def _repeated(what: str, names: list[str]) -> list[str]:
    return [f"{what} {name!r}: found {n} times, expected once" for name, n in Counter(names).items() if n > 1]


def _misfit(entry: KeyValue) -> str | None:
    """What does not fit the declared type, as text."""
    kind, values = (entry.element, entry.value) if entry.type is T.ARRAY else (entry.type, (entry.value,))
    if not entry.key or not _fits(T.STRING, entry.key):
        return "found no valid text, expected a name"
    if kind is None or kind is T.ARRAY or not isinstance(values, tuple) or not values:
        return f"found {reprlib.repr(entry.value)} of {kind!r}, expected a tuple of scalars, at least one"
    return next((f"found {value!r}, expected {kind.name}" for value in values if not _fits(kind, value)), None)


def _fits(kind: GGUFValueType, value: object) -> bool:
    try:
        if type(value) is str:
            return kind is T.STRING and value.encode() is not None
        known = type(value) is bool if kind is T.BOOL else type(value) in (int, float)
        return known and bool(struct.pack("<" + CODES[kind], value))
    except (KeyError, OverflowError, UnicodeEncodeError, struct.error):
        return False


def _tensor_fault(tensor: StoredTensor) -> str | None:
    """What ggml would refuse in a tensor's name, shape or type."""
    if not _fits(T.STRING, tensor.name) or not 0 < len(tensor.name.encode()) <= MAX_NAME:
        return f"tensor {tensor.name!r}: name: expected 1 to {MAX_NAME} bytes of UTF-8"
    sizes = len(tensor.shape) <= MAX_DIMS and all(type(size) is int and size > 0 for size in tensor.shape)
    if not sizes or tensor.n_elements >= 2**63:
        found = f"shape: found {reprlib.repr(tensor.shape)}"
        return f"tensor {tensor.name!r}: {found}, expected at most {MAX_DIMS} sizes above 0, their product below 2^63"
    try:
        _ = tensor.row_bytes
    except WrongInput as error:
        return str(error)
    return None


def _alignment(path: Path, keys: Mapping[str, KeyValue]) -> int:
    entry = keys.get(ALIGNMENT, KeyValue(ALIGNMENT, T.UINT32, DEFAULT_ALIGNMENT))
    size = entry.value
    if entry.type is not T.UINT32 or not isinstance(size, int) or not 0 < size <= MAX_ALIGNMENT or size & (size - 1):
        expected = f"a UINT32, a power of two up to {MAX_ALIGNMENT}"
        raise WrongInput(f"{path}: key {ALIGNMENT!r}: found {size!r} of type {entry.type.name}, expected {expected}")
    return size


@contextmanager
def _deed(path: Path, deed: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WrongInput(f"{path}: cannot be {deed}: {error.strerror or error}") from error


class _Cursor:
    """Walks the metadata from the file's start; a length is held against the file before it is believed."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        self.at, self.data, self.limit = 0, bytearray(), min(self.size, MAX_METADATA)

    def wrong(self, what: str, found: object, expected: object) -> WrongInput:
        return WrongInput(f"{self.path}: byte {self.at}: {what}: found {found}, expected {expected}")

    def load(self, count: int, what: str) -> None:
        """Have `count` bytes from the position on in `data`."""
        end = self.at + count
        if end <= len(self.data):
            return
        if end > self.limit:
            raise self.wrong(what, f"{self.limit - self.at} bytes left", f"{count}: truncated or damaged")
        self.data += self.file.read(max(end - len(self.data), 2**20))
        if end > len(self.data):
            raise self.wrong(what, f"{len(self.data)} bytes in the file", f"{self.size}; it changed while being read")

    def numbers(self, kind: GGUFValueType, count: int, what: str) -> tuple[Any, ...]:
        start, n_bytes = self.at, count * struct.calcsize("<" + CODES[kind])
        self.load(n_bytes, what)
        self.at += n_bytes
        if kind is T.BOOL and max(self.data[start : self.at], default=0) > 1:
            raise self.wrong(what, "a BOOL above 1", "0 or 1")
        return struct.unpack_from(f"<{count}{CODES[kind]}", self.data, start)

    def number(self, kind: GGUFValueType, what: str) -> int:
        return int(self.numbers(kind, 1, what)[0])

    def member(self, kinds: type[E], what: str) -> E:
        number = self.number(T.UINT32, what)
        try:
            return kinds(number)
        except ValueError as error:
            raise self.wrong(
                what, f"{kinds.__name__} {number}", f"one of {', '.join(kind.name for kind in kinds)}"
            ) from error

    def string(self, what: str) -> str:
        self.load(8, what)
        start = self.at + 8
        end = start + int.from_bytes(self.data[self.at : start], "little")
        self.load(end - self.at, what)
        try:
            text = self.data[start:end].decode()
        except UnicodeDecodeError as error:
            raise self.wrong(what, error, "UTF-8 text") from error
        self.at = end
        return text

    def values(self, kind: GGUFValueType, count: int, what: str) -> tuple[Scalar, ...]:
        if kind is not T.STRING:
            return self.numbers(kind, count, what)
        if 8 * count > self.size - self.at:  # each string has at least its length
            raise self.wrong(what, f"{count} strings", f"at most the {self.size - self.at} bytes that are left")
        return tuple([self.string(what) for _ in range(count)])


def read_gguf(path: Path) -> GGUFFile:
    """Read and check all metadata of a little-endian GGUF, version 2 or 3, and no tensor data; raises `WrongInput`."""
    keys: dict[str, KeyValue] = {}
    tensors: dict[str, StoredTensor] = {}
    with _deed(path, "read"), path.open("rb") as file:
        cursor = _Cursor(path, file)
        version, n_tensors, n_keys = _read_counts(cursor)
        for _ in range(n_keys):
            _read_key(cursor, keys)
        alignment = _alignment(path, keys)
        relative = [_read_tensor(cursor, tensors) for _ in range(n_tensors)]
    return GGUFFile(path, version, alignment, keys, tensors, _offsets(cursor, tensors, relative, alignment))


def _read_counts(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of keys)."""
    magic = bytes(cursor.numbers(T.UINT8, 4, "magic"))
    if magic != b"GGUF":
        raise cursor.wrong("magic", magic, "b'GGUF': this is no GGUF file")
    version = cursor.number(T.UINT32, "version")
    if version not in (2, 3):
        what = "big-endian GGUF" if version & 0xFFFF == 0 else f"version {version}"
        raise cursor.wrong("version", what, "little-endian version 2 or 3; convert the model again")
    counts = [cursor.number(T.UINT64, what) for what in ("number of tensors", "number of keys")]
    for count, what, least in zip(counts, ("tensors", "keys"), (24, 13), strict=True):  # bytes that one takes at least
        if count * least > cursor.size - cursor.at:
            raise cursor.wrong(f"number of {what}", count, f"as many as fit a file of {cursor.size} bytes")
    return version, counts[0], counts[1]


def _read_key(cursor: _Cursor, keys: dict[str, KeyValue]) -> None:
    key = cursor.string("key")
    what = f"key {key!r}"
    if not key or key in keys:
        raise cursor.wrong(what, "it twice" if key else "no name", "names of their own")
    kind = cursor.member(T, what)
    element = cursor.member(T, what) if kind is T.ARRAY else None
    if element is T.ARRAY:
        raise cursor.wrong(what, "an array of arrays", "an array of scalars")
    count = 1 if element is None else cursor.number(T.UINT64, what)
    values = cursor.values(kind if element is None else element, count, what)
    keys[key] = KeyValue(key, kind, values[0] if element is None else values, element)
    if key == SPLIT_COUNT and values and values[0] not in (0, 1):
        raise cursor.wrong(what, f"one of {values[0]} parts", "a whole model; join it with `llama-gguf-split --merge`")


def _read_tensor(cursor: _Cursor, tensors: dict[str, StoredTensor]) -> int:
    """Adds one tensor to `tensors`; returns its offset within the data."""
    name = cursor.string("tensor name")
    what = f"tensor {name!r}"
    if name in tensors:
        raise cursor.wrong(what, "it twice", "names of their own")
    dims = cursor.numbers(T.UINT64, cursor.number(T.UINT32, what), what)
    tensors[name] = StoredTensor(name, dims[::-1], cursor.member(GGMLQuantizationType, what))
    if fault := _tensor_fault(tensors[name]):
        raise WrongInput(f"{cursor.path}: byte {cursor.at}: {fault}")
    return cursor.number(T.UINT64, what)


def _offsets(cursor: _Cursor, tensors: dict[str, StoredTensor], relative: list[int], alignment: int) -> dict[str, int]:
    """Where each tensor starts in the file: one after another, aligned, inside the file; ggml loads nothing else."""
    start = at = cursor.at + -cursor.at % alignment
    offsets = {}
    for tensor, offset in zip(tensors.values(), relative, strict=True):
        where = f"{cursor.path}: tensor {tensor.name!r}"
        if start + offset != at:
            fault = "overlaps the one before it" if start + offset < at else "leaves a hole before it"
            fault = f"is not aligned to {alignment}" if offset % alignment else fault
            raise WrongInput(f"{where} {fault}: found offset {offset}, expected {at - start}")
        offsets[tensor.name] = at
        end = at + tensor.n_bytes
        if end > cursor.size:
            raise WrongInput(f"{where}: truncated: it ends at byte {end}, the file at {cursor.size}; download it again")
        at = end + -end % alignment
    return offsets
