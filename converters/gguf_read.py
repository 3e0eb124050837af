"""GGUF files, reading: every count, length and offset is held against the file before it is believed.

Layout: docs/gguf.md of ggml; limits as in its gguf.cpp. The gguf package's own reader trusts lengths and recurses into
nested arrays, so metadata is parsed here; tensor data is read only when asked for.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import (
    CODES,
    Bytes,
    KeyValue,
    Scalar,
    StoredTensor,
    T,
    alignment_of,
    file_access,
    tensor_fault,
)

E = TypeVar("E", GGUFValueType, GGMLQuantizationType)
ReadOn = Callable[[int], bytes]  # so many bytes of a file, from its start on
SPLIT_COUNT = "split.count"
MAX_METADATA = 2**26  # bytes; the largest vocabularies fill a third
LONG = 1024  # entries of a list that skimming walks over; what tells a layer from another is shorter


@dataclass(frozen=True)
class Skipped:
    """A long list that was not decoded: how many entries, and the SHA-256 of its bytes as they lie in the file.

    Of a list of strings these are each one's UTF-8 length (8 bytes, little endian) and its UTF-8 bytes, which is what
    `tokenizer.vocabulary_hash` digests.
    """

    count: int
    sha256: str


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF whose metadata holds; dicts are in file order, `offsets` are absolute byte positions.

    Of a file that was skimmed, `skipped` are its long lists, which are not among the keys, and `fault` says what is
    wrong with where its tensors lie; `parts` is the number of files it was split into.
    """

    path: Path
    version: int
    alignment: int
    keys: dict[str, KeyValue]
    tensors: dict[str, StoredTensor]
    offsets: dict[str, int]
    skipped: dict[str, Skipped] = field(default_factory=dict)
    fault: str = ""
    parts: int = 1

    def tensor_bytes(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes start..stop of a tensor as it is stored; only they are read. KeyError, IndexError: no such bytes."""
        size = self.tensors[name].n_bytes
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise IndexError(f"tensor {name!r}: bytes {start}..{stop} of {size}")
        found = np.empty(stop - start, np.uint8)
        with file_access(self.path, "read"), self.path.open("rb") as file:
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


class _Cursor:
    """Walks the metadata from the file's start; a length is held against the file before it is believed."""

    at_once, whole = 2**20, True  # bytes read at a time; whether a part of a model is refused

    def __init__(self, path: Path, read: ReadOn, size: int) -> None:
        self.path, self.read, self.size = path, read, size
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
        self.data += self.read(max(end - len(self.data), self.at_once))
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


class _PartReader(_Cursor):
    """Takes a part of a model for what it is."""

    whole = False


class _Skimmer(_Cursor):
    """Walks over long lists without decoding them, and takes a part of a model for what it is."""

    at_once, whole = 2**14, False

    def __init__(self, path: Path, read: ReadOn, size: int) -> None:
        super().__init__(path, read, size)
        self.skipped: dict[str, Skipped] = {}

    def values(self, kind: GGUFValueType, count: int, what: str) -> tuple[Scalar, ...]:
        if count <= LONG:
            return super().values(kind, count, what)
        start = self.at
        if kind is T.STRING:
            self._walk_strings(count, what)
        else:
            n_bytes = count * struct.calcsize("<" + CODES[kind])
            self.load(n_bytes, what)
            self.at += n_bytes
        digest = hashlib.sha256(memoryview(self.data)[start : self.at]).hexdigest()
        self.skipped[what] = Skipped(count, digest)
        return ()

    def _walk_strings(self, count: int, what: str) -> None:
        length, at, data = struct.Struct("<Q").unpack_from, self.at, self.data  # a vocabulary has 250,000 of them
        for _ in range(count):
            if at + 8 > len(data):
                self.at = at
                self.load(8, what)
            n_bytes = length(data, at)[0]
            at += 8 + n_bytes
            if at > len(data):
                self.at = at - n_bytes
                self.load(n_bytes, what)
        self.at = at


def read_gguf(path: Path) -> GGUFFile:
    """Read and check all metadata of a little-endian GGUF, version 2 or 3, and no tensor data; raises `WrongInput`."""
    file, cursor, relative = _read(path, _Cursor)
    return replace(file, offsets=_offsets(cursor, file.tensors, relative, file.alignment))


def read_part(path: Path) -> GGUFFile:
    """`read_gguf` of a file that may be one of several of a model."""
    file, cursor, relative = _read(path, _PartReader)
    return replace(file, offsets=_offsets(cursor, file.tensors, relative, file.alignment), parts=_parts(file.keys))


def skim_gguf(path: Path) -> GGUFFile:
    """`read_gguf` for many files: long lists are walked over, parts of a model and files cut short are taken as well.

    `WrongInput` where the metadata itself cannot be read.
    """
    file, cursor, relative = _read(path, _Skimmer)
    assert isinstance(cursor, _Skimmer)
    skipped = {key: found for key in file.keys if (found := cursor.skipped.get(f"key {key!r}")) is not None}
    keys = {key: entry for key, entry in file.keys.items() if key not in skipped}
    offsets, fault = dict[str, int](), ""
    try:
        offsets = _offsets(cursor, file.tensors, relative, file.alignment)
    except WrongInput as error:
        fault = str(error).removeprefix(f"{path}: ")
    return replace(file, keys=keys, offsets=offsets, skipped=skipped, fault=fault, parts=_parts(keys))


def _parts(keys: dict[str, KeyValue]) -> int:
    """Of how many files this is one."""
    count = keys.get(SPLIT_COUNT)
    return max(1, count.value) if count is not None and isinstance(count.value, int) else 1


def _read(path: Path, walker: type[_Cursor]) -> tuple[GGUFFile, _Cursor, list[int]]:
    """The file without absolute offsets, where its metadata ends, and the offsets within its data."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise WrongInput(f"{path}: is a device or a pipe, expected a file")
    with file_access(path, "read"), path.open("rb") as file:
        cursor = walker(path, file.read, os.fstat(file.fileno()).st_size)
        found, relative = _walk(cursor)
    return found, cursor, relative


def walk_metadata(path: Path, read: ReadOn, size: int) -> None:
    """Read all metadata of a file that comes bit by bit, of `size` bytes; `WrongInput` where it cannot be read."""
    _walk(_Skimmer(path, read, size))


def _walk(cursor: _Cursor) -> tuple[GGUFFile, list[int]]:
    keys: dict[str, KeyValue] = {}
    tensors: dict[str, StoredTensor] = {}
    version, n_tensors, n_keys = _read_counts(cursor)
    for _ in range(n_keys):
        _read_key(cursor, keys)
    alignment = alignment_of(cursor.path, keys)
    relative = [_read_tensor(cursor, tensors) for _ in range(n_tensors)]
    return GGUFFile(cursor.path, version, alignment, keys, tensors, {}), relative


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
    if cursor.whole and key == SPLIT_COUNT and values and values[0] not in (0, 1):
        raise cursor.wrong(what, f"one of {values[0]} parts", "a whole model; join it with `llama-gguf-split --merge`")


def _read_tensor(cursor: _Cursor, tensors: dict[str, StoredTensor]) -> int:
    """Adds one tensor to `tensors`; returns its offset within the data."""
    name = cursor.string("tensor name")
    what = f"tensor {name!r}"
    if name in tensors:
        raise cursor.wrong(what, "it twice", "names of their own")
    dims = cursor.numbers(T.UINT64, cursor.number(T.UINT32, what), what)
    tensors[name] = StoredTensor(name, dims[::-1], cursor.member(GGMLQuantizationType, what))
    if fault := tensor_fault(tensors[name]):
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
