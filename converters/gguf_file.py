"""GGUF files: their entries with exact types, and atomic streaming writing.

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
from io import FileIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter

from convert_drafter.converters.errors import Problems, WrongInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Scalar = bool | int | float | str
Bytes = npt.NDArray[np.uint8]
Chunks = Iterable[npt.NDArray[Any]]
Advance = Callable[[int], None]
T = GGUFValueType

ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
DEFAULT_ALIGNMENT, MAX_ALIGNMENT = 32, 2**20
MAX_DIMS, MAX_NAME = 4, 63  # bytes of a tensor name; ggml's limit of 64 counts its closing zero
CODES = {  # of Python's struct module
    T.UINT8: "B", T.INT8: "b", T.UINT16: "H", T.INT16: "h", T.UINT32: "I", T.INT32: "i", T.UINT64: "Q", T.INT64: "q",
    T.FLOAT32: "f", T.FLOAT64: "d", T.BOOL: "?",
}  # fmt: skip


BUSY = "another run is writing it; wait for that run or choose another output"


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


def partial_name(path: Path) -> Path:
    """Where a GGUF grows until it is complete."""
    return path.with_name(path.name + ".partial")


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
    alignment = alignment_of(path, {entry.key: entry for entry in keys})
    with file_access(path, "written"):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder; give a file name")
        partial = partial_name(path)
        file = _claim(partial)
    try:
        with file:
            with file_access(path, "written"):
                _write_head(partial, keys, tensors, alignment)
                file.seek(0, os.SEEK_END)
            for tensor in tensors:
                _write_tensor(path, file, tensor, data(tensor), advance)
                _put(path, file, memoryview(bytes(-tensor.n_bytes % alignment)))
            with file_access(path, "written"):
                os.fsync(file.fileno())
                size = file.tell()
                _own(file, partial)
                partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)
    return size


def _claim(partial: Path) -> FileIO:
    """The partial file, emptied, that no other run may write; what a killed run left behind is used again."""
    if partial.is_symlink():
        partial.unlink()
    file = FileIO(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+")
    try:
        _lock(file, partial)
        _own(file, partial)
        file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


def remove_partial(path: Path) -> None:
    """Take away what a killed run left of `path`, unless another run is writing it."""
    partial = partial_name(path)
    if partial.is_file():
        with suppress(WrongInput, OSError), _claim(partial):
            partial.unlink()


def _own(file: FileIO, partial: Path) -> None:
    """Raise `WrongInput` where another run finished between our opening the file and locking it."""
    there = partial.stat() if partial.exists() else None
    if there is None or not os.path.samestat(os.fstat(file.fileno()), there):
        raise WrongInput(f"{partial}: {BUSY}")


def _lock(file: IO[bytes], partial: Path) -> None:
    """Held until the file is closed, also by a kill. Without locks (Windows, some network disks) nothing is checked."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise WrongInput(f"{partial}: {BUSY}") from error
    except OSError:
        return


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
    with file_access(path, "written"):
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
    return list(filter(None, map(tensor_fault, tensors))) + _repeated("tensor", [tensor.name for tensor in tensors])


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


def tensor_fault(tensor: StoredTensor) -> str | None:
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


def alignment_of(path: Path, keys: Mapping[str, KeyValue]) -> int:
    entry = keys.get(ALIGNMENT, KeyValue(ALIGNMENT, T.UINT32, DEFAULT_ALIGNMENT))
    size = entry.value
    if entry.type is not T.UINT32 or not isinstance(size, int) or not 0 < size <= MAX_ALIGNMENT or size & (size - 1):
        expected = f"a UINT32, a power of two up to {MAX_ALIGNMENT}"
        raise WrongInput(f"{path}: key {ALIGNMENT!r}: found {size!r} of type {entry.type.name}, expected {expected}")
    return size


@contextmanager
def file_access(path: Path, deed: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WrongInput(f"{path}: cannot be {deed}: {error.strerror or error}") from error
