"""Importance matrices ("imatrix"): how much every column of a weight matters, as `llama-imatrix` measured it.

Both of its formats are read: GGUF (sums and counts), and the older binary one (.dat), which has no magic. What comes
out is what llama-quantize hands to ggml (common/imatrix-loader.cpp; load_imatrix in tools/quantize/quantize.cpp).
Every value is looked at when a file is opened, and kept in the file: memory holds one tensor's at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import MAX_NAME, KeyValue, StoredTensor, file_access
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.quant import QuantType
from convert_drafter.quant.base import F32Array

MAGIC = b"GGUF"
KEYS = "quantize.imatrix."
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS, MEANS = ".in_sum2", ".counts", ".in_sum"  # of a tensor's squared inputs, of its rows, of its inputs
# llama-quantize leaves an entry of another length out for these, and stops for every other tensor (src/llama-quant.cpp)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
ENTRY_BYTES, MAX_ENTRIES = 17, 2**16  # of the .dat format: what one takes at least; far more than a model has tensors
MAX_COUNT = 2**53
SLAB = 2**20  # values looked at in one go
ADVICE = "expected an importance matrix of llama-imatrix (GGUF or .dat)"


@dataclass(frozen=True)
class Entry:
    """One tensor's f32 values from byte `start` on; each of `counts` divides an equal share of them."""

    start: int
    size: int
    counts: tuple[float, ...]


@dataclass(frozen=True)
class Importance:
    """An importance matrix with good values only. `datasets` and `chunk_count` tell what it was measured on."""

    path: Path
    entries: Mapping[str, Entry]
    datasets: tuple[str, ...]
    chunk_count: int

    def weighs(self, name: str, shape: Sequence[int], kind: QuantType) -> bool:
        """Whether a tensor of this type has an entry to be weighted by; raises as `for_tensor`, reads nothing."""
        found = self._entry(name, shape[-1] * math.prod(shape[:-2]))
        return found is not None and kind.encode_weighted is not None

    def for_shape(self, name: str, shape: Sequence[int]) -> F32Array | None:
        """`for_tensor` of a tensor of this shape in torch order, the last two of which are a matrix."""
        return self.for_tensor(name, shape[-1], math.prod(shape[:-2]))

    def for_tensor(self, name: str, row: int, n_matrices: int = 1) -> F32Array | None:
        """Importance of a tensor's columns: (row,) f32, for stacked experts (n_matrices, row); None without an entry.

        Raises `WrongInput` where the entry is of another length: it was measured on another model.
        """
        entry = self._entry(name, row * n_matrices)
        if entry is None:
            return None
        with file_access(self.path, "read"), self.path.open("rb") as file:
            values = _read_values(self.path, file, name, entry.start, entry.size).reshape(len(entry.counts), -1)
        counts = np.array(entry.counts, np.float32)[:, None]
        # an expert that no token was sent to tells nothing: all its columns are equal
        means = np.divide(values, counts, out=np.ones_like(values), where=counts > 0)
        return means.reshape(row) if n_matrices == 1 else means.reshape(n_matrices, row)

    def _entry(self, name: str, size: int) -> Entry | None:
        entry = self.entries.get(name)
        if entry is None or entry.size == size:
            return entry
        if name in EMBEDDINGS:
            return None
        expected = f"{size} (its row times its matrices); it was measured on another model"
        raise WrongInput(f"{self.path}: {name}: found {entry.size} values, expected {expected}")

    def keys(self) -> tuple[KeyValue, ...]:
        """What a quantized file says about the matrix, as llama-quantize does (tools/quantize/quantize.cpp)."""
        string, u32 = GGUFValueType.STRING, GGUFValueType.UINT32
        return (
            KeyValue(f"{KEYS}file", string, self.path.name),
            *(KeyValue(f"{KEYS}dataset", string, name) for name in self.datasets[:1]),
            KeyValue(f"{KEYS}entries_count", u32, len(self.entries)),
            *(KeyValue(f"{KEYS}chunks_count", u32, count) for count in (self.chunk_count,) if count),
        )


def without_entry(
    importance: Importance | None, tensors: Iterable[tuple[str, Sequence[int], QuantType]]
) -> Iterator[str]:
    """A warning that names tensors (name, shape, type) which importance could have served but has nothing for.

    Raises `WrongInput` for an entry that was measured on another model.
    """
    if importance is None:
        return
    quantized = [(name, kind, importance.weighs(name, shape, kind)) for name, shape, kind in tensors if kind.block > 1]
    weighted = [name for name, kind, _ in quantized if kind.encode_weighted]
    lacking = [name for name, kind, weighs in quantized if kind.encode_weighted and not weighs]
    if not weighted:
        yield f"{importance.path}: used for nothing: no tensor gets a type that weighs columns"
    if lacking:
        names = ", ".join(lacking[:4]) + (" ..." if len(lacking) > 4 else "")
        yield f"{importance.path}: no entry for {len(lacking)} of {len(weighted)} tensors, quantized without: {names}"


def read_importance(path: Path) -> Importance:
    """Open an importance matrix. Raises `WrongInput` naming file and entry for whatever ggml should not see."""
    with file_access(path, "read"), path.open("rb") as file:
        found = _from_gguf(path, read_gguf(path)) if file.read(len(MAGIC)) == MAGIC else _from_dat(path, file)
        for name, entry in found.entries.items():
            _check_values(path, file, name, entry)
    return found


def _check_values(path: Path, file: BufferedReader, name: str, entry: Entry) -> None:
    for first in range(0, entry.size, SLAB):
        values = _read_values(path, file, name, entry.start + 4 * first, min(SLAB, entry.size - first))
        if not (values.min() >= 0 and values.max() < np.inf):  # False for NaN
            index = int(np.argmin((values >= 0) & (values < np.inf)))
            found = f"value {first + index}: found {values[index]:g}"
            raise WrongInput(f"{path}: {name}: {found}, expected a finite number not below 0")


def _read_values(path: Path, file: BufferedReader, name: str, start: int, count: int) -> F32Array:
    values = np.empty(count, "<f4")
    file.seek(start)
    n_bytes = file.readinto(values.view(np.uint8).data)
    if n_bytes != values.nbytes:
        raise WrongInput(f"{path}: {name}: found {n_bytes} bytes, expected {values.nbytes}: the file changed")
    return values


# --- GGUF ---


def _from_gguf(path: Path, file: GGUFFile) -> Importance:
    for key in (DATASETS, CHUNK_COUNT, CHUNK_SIZE):  # llama-quantize demands them too
        if key not in file.keys:
            kind = file.keys["general.type"].value if "general.type" in file.keys else "not said"
            raise WrongInput(f"{path}: {key}: missing (general.type: {kind}), {ADVICE}")
    datasets, chunks = file.keys[DATASETS], file.keys[CHUNK_COUNT]
    if datasets.element is not GGUFValueType.STRING or chunks.type is not GGUFValueType.UINT32:
        raise WrongInput(f"{path}: {DATASETS}, {CHUNK_COUNT}: found other types, expected strings and a UINT32")
    entries = {name: _gguf_entry(path, file, name) for name in _measured(file.tensors)}
    if not entries:
        raise WrongInput(f"{path}: found no entry, {ADVICE}")
    return Importance(path, entries, tuple(map(str, datasets.value)), int(chunks.value))  # type: ignore[arg-type]


def _measured(tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    """The tensors that something was stored for, in file order; other statistics are passed over."""
    suffixes = (SUMS, COUNTS, MEANS)
    names = (name.removesuffix(s) for name in tensors for s in suffixes if name.endswith(s))
    return iter(dict.fromkeys(names))


def _gguf_entry(path: Path, file: GGUFFile, name: str) -> Entry:
    for suffix in (SUMS, COUNTS):
        stored = file.tensors.get(name + suffix)
        if stored is None:
            raise WrongInput(f"{path}: {name}: {name}{suffix} is missing: sums and counts belong together")
        if stored.type is not GGMLQuantizationType.F32:
            raise WrongInput(f"{path}: {name}: {stored.name}: found {stored.type.name}, expected F32")
    sums, counts, means = (file.tensors.get(name + suffix) for suffix in (SUMS, COUNTS, MEANS))
    assert sums is not None and counts is not None
    if sums.n_elements % counts.n_elements or (means is not None and means.n_elements != sums.n_elements):
        found = ", ".join(f"{t.n_elements} in {t.name}" for t in (sums, counts, means) if t is not None)
        raise WrongInput(f"{path}: {name}: found {found}, expected equal shares of the sums for each count")
    return Entry(file.offsets[sums.name], sums.n_elements, _gguf_counts(path, file, counts))


def _gguf_counts(path: Path, file: GGUFFile, stored: StoredTensor) -> tuple[float, ...]:
    """Whole numbers in F32, rounded as the loader does it: halves away from zero."""
    counts = file.tensor_bytes(stored.name).view("<f4").astype(np.float64)
    if not (counts.min() >= 0 and counts.max() <= MAX_COUNT):  # False for NaN
        bad = counts[np.argmin((counts >= 0) & (counts <= MAX_COUNT))]
        raise WrongInput(f"{path}: {stored.name}: found {bad:g}, expected a number of rows")
    return tuple(np.floor(counts + 0.5).tolist())


# --- .dat ---


def _from_dat(path: Path, file: BufferedReader) -> Importance:
    """Number of entries; of each: name, calls, values; then (not in old files) the chunks and the data set's name."""
    reader = _Dat(path, file)
    count = reader.number("number of entries")
    if not 0 < count <= min(MAX_ENTRIES, reader.left // ENTRY_BYTES):
        raise reader.wrong("number of entries", count, f"as many as fit the file; {ADVICE}")
    entries: dict[str, Entry] = {}
    for index in range(count):
        name = reader.text(f"name of entry {index}", MAX_NAME)
        if not name or name in entries:
            raise reader.wrong(f"name of entry {index}", repr(name), f"a name of its own; {ADVICE}")
        entries[name] = reader.entry(name)
    chunks, datasets = 0, tuple[str, ...]()
    if reader.left:
        chunks = reader.number("number of chunks")
        datasets = tuple(filter(None, (reader.text("data set", reader.left),)))
    if reader.left or chunks < 0:
        found = f"{chunks} chunks and {reader.left} more bytes"
        raise reader.wrong("end", found, f"a count and nothing more; {ADVICE}")
    return Importance(path, entries, datasets, chunks)


class _Dat:
    """Walks a .dat file; a length is held against the file before it is believed."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path, self.file, self.size = path, file, os.fstat(file.fileno()).st_size
        self.at = 0

    @property
    def left(self) -> int:
        return self.size - self.at

    def wrong(self, what: str, found: object, expected: str) -> WrongInput:
        return WrongInput(f"{self.path}: byte {self.at}: {what}: found {found}, expected {expected}")

    def take(self, count: int, what: str) -> bytes:
        if not 0 <= count <= self.left:
            raise self.wrong(what, f"{count} bytes", f"at most the {self.left} that are left; {ADVICE}")
        self.file.seek(self.at)
        data = self.file.read(count)
        if len(data) != count:
            raise self.wrong(what, f"{len(data)} bytes", f"{count}: the file changed")
        self.at += count
        return data

    def number(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little", signed=True)

    def text(self, what: str, limit: int) -> str:
        count = self.number(f"length of the {what}")
        if count > limit:
            raise self.wrong(f"length of the {what}", count, f"at most {limit}; {ADVICE}")
        data = self.take(count, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(what, error, f"UTF-8 text; {ADVICE}") from error

    def entry(self, name: str) -> Entry:
        """Sums over calls; a file that counted none holds means already."""
        calls, size, start = self.number(f"calls of {name!r}"), self.number(f"length of {name!r}"), self.at
        if not 0 < 4 * size <= self.left:
            raise self.wrong(f"length of {name!r}", size, f"1 to the {self.left // 4} values that are left; truncated?")
        self.at += 4 * size
        return Entry(start, size, (float(max(calls, 1)),))
