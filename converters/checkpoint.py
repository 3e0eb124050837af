"""A published checkpoint's safetensors: every header is checked before any data is read, rows are read on request.

Format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON header, the data.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from convert_drafter.converters.errors import Problems, WrongInput
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.weight_files import (
    MEND,
    Select,
    everything,
    find_config,
    find_weights,
    missing_parts,
    names,
    reading,
)

Array = npt.NDArray[Any]
Headers = dict[str, "TensorHeader"]
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("u1"), "I8": np.dtype("i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip
SLAB_BYTES = 16 * 2**20
EXCERPT_OF = "excerpt_of_header_sha256"  # in the metadata of a file with some tensors of another: that one's digest
HEADER_LIMIT = 100_000_000  # bytes; safetensors refuses longer headers too
COUNT_LIMIT, MAX_DIMS = 2**63, 8  # what stays within numpy's reach


@dataclass(frozen=True)
class TensorHeader:
    """A tensor as its file describes it: shape in torch order, `start` and `end` are byte positions in `file`.

    A quantized tensor is described as what it stands for: `stored` is its scheme, and `expand` makes its rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int
    stored: str = ""
    expand: Callable[[int, int], Array] | None = None

    @property
    def n_bytes(self) -> int:
        return self.end - self.start

    @property
    def rows(self) -> int:
        """Slices along the first axis; a tensor without axes has one."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers hold; `root` is the folder of config.json, `tensors` are sorted by name.

    `quantization` says how its weights are stored where that is not as floats; `left_out` maps tensors to reasons.
    """

    root: Path
    config_path: Path
    config: dict[str, object]
    tensors: Headers
    files: tuple[Path, ...]
    header_sha256: dict[str, str]  # file name -> digest of its JSON header, without the 8 length bytes
    unused: tuple[Path, ...] = ()  # weight files beside the index that it does not name
    quantization: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()  # names of tensors that were not chosen


def open_checkpoint(source: Path, select: Select = everything) -> Checkpoint:
    """Read and check the headers and config of a folder or of one .safetensors file; no tensor data is read.

    Shards without a tensor that `select` chooses are not opened and need not be there.

    Raises `WrongInput` where nothing can be read, `Problems` with everything that is wrong in the files.
    """
    with reading(source):
        found = find_weights(source, select)
        config_path = find_config(source, found.folder)
        config = json_object(str(config_path), config_path.read_bytes())
    problems = missing_parts(found.files) if found.weight_map is None else []
    read = {file.name: _read_header(file, problems) for file in found.files}
    headers = {name: tensors for name, (tensors, _) in read.items()}
    # After a damaged header its tensors would show again, as absent ones.
    if problems := problems or _misplaced(found.weight_map, headers):
        raise Problems(str(found.folder), problems)
    every = {name: header for tensors in headers.values() for name, header in tensors.items()}
    if not every:
        expected = f"expected a drafter's weights; {MEND}"
        raise WrongInput(f"{found.folder}: found no tensor in {names(found.files)}, {expected}")
    wanted = set(select((*every, *found.others)))
    tensors = {name: every[name] for name in sorted(every) if name in wanted}
    others = tuple(sorted({*found.others, *(every.keys() - wanted)}))
    digests = {name: digest for name, (_, digest) in read.items()}
    return Checkpoint(
        config_path.parent, config_path, config, tensors, found.files, digests, found.unused, others=others
    )


def header_of(path: Path) -> Headers:
    """The tensors that can be read of one file's header; what is wrong with it is said by `open_checkpoint`."""
    return _read_header(path, [])[0]


def read_rows(tensor: TensorHeader, start: int, stop: int) -> Array:
    """Rows start..stop of the first axis, `(stop - start, *shape[1:])`; a tensor without axes gives shape (1,).

    Raises `WrongInput` if the file got shorter since its header was read, IndexError for rows it does not have.
    """
    if not 0 <= start <= stop <= tensor.rows:
        raise IndexError(f"tensor {tensor.name!r}: rows {start}..{stop} of {tensor.rows}")
    if tensor.expand is not None:
        return tensor.expand(start, stop)
    rows = np.empty((stop - start, *tensor.shape[1:]), DTYPES[tensor.dtype])
    # A plain read and no mmap: mapped pages would count as resident memory for the whole run.
    with reading(tensor.file), tensor.file.open("rb") as file:
        file.seek(tensor.start + start * tensor.row_bytes)
        found = file.readinto(rows.reshape(-1).view(np.uint8).data)
    if found != rows.nbytes:
        text = f"found {found} bytes of rows {start}..{stop}, expected {rows.nbytes}; the file changed, start again"
        raise WrongInput(f"{tensor.file}: tensor {tensor.name!r}: {text}")
    return rows


def slabs(tensor: TensorHeader, max_bytes: int = SLAB_BYTES) -> Iterator[Array]:
    """All rows of a tensor in order, as many at a time as fit `max_bytes`, at least one."""
    for start, stop in row_ranges(tensor, max_bytes):
        yield read_rows(tensor, start, stop)


def row_ranges(tensor: TensorHeader, max_bytes: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """(start, stop) of slabs of rows that fit `max_bytes`; `together` rows are never parted, however large."""
    step = max(together, max_bytes // max(1, tensor.row_bytes) // together * together)
    return ((start, min(start + step, tensor.rows)) for start in range(0, tensor.rows, step))


def _read_header(path: Path, problems: list[str]) -> tuple[Headers, str]:
    """The tensors of one file and the sha256 of its header, or of the header of the file it is an excerpt of; what is
    wrong is added to `problems`."""
    tensors: Headers = {}
    faults: list[str] = []
    raw, digest = b"", None  # of an unreadable file
    try:
        raw, size = _header_bytes(path)
        for name, entry in json_object("header", raw).items():
            if name == "__metadata__":
                digest = entry.get(EXCERPT_OF) if isinstance(entry, dict) else None
            else:
                try:
                    tensors[name] = _tensor(path, name, entry, 8 + len(raw))
                except WrongInput as error:
                    faults.append(str(error))
        faults = faults or _layout_faults(list(tensors.values()), 8 + len(raw), size)
    except WrongInput as error:
        faults = [str(error)]
    problems += [f"{path.name}: {fault}; {MEND}" for fault in faults]
    return tensors, digest if isinstance(digest, str) else hashlib.sha256(raw).hexdigest()


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """(JSON header, size of the file); the length is held against the file before it is believed."""
    with reading(path), path.open("rb") as file:
        size = path.stat().st_size
        if not path.is_file():
            raise WrongInput("found a device or a pipe, expected a file")
        head = file.read(8)
        if head == b"version ":
            raise WrongInput("found a git-lfs pointer, expected the file it stands for: `git lfs pull`")
        length = int.from_bytes(head, "little")
        if 8 + length > size:
            raise WrongInput(f"truncated or foreign: the header promises {8 + length} bytes, the file has {size}")
        if length > HEADER_LIMIT:
            raise WrongInput(f"header length: found {length}, expected at most {HEADER_LIMIT}")
        return file.read(length), size


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorHeader:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _fault(name, "entry", entry, "an object of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        _fault(name, "dtype", dtype, f"one of {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMS or math.prod(max(1, n) for n in shape) >= COUNT_LIMIT:
        _fault(name, "shape", shape, f"at most {MAX_DIMS} whole numbers, their product below 2^63")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fault(name, "data_offsets", offsets, "[begin, end] with 0 <= begin <= end")
    n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        _fault(name, "data_offsets", offsets, f"{n_bytes} bytes between them for {dtype} {shape}")
    return TensorHeader(name, dtype, tuple(shape), path, data_start + offsets[0], data_start + offsets[1])


def _layout_faults(tensors: list[TensorHeader], data_start: int, size: int) -> list[str]:
    """The tensors have to fill their file: in bounds, no overlap, no hole, nothing after them."""
    end = max((tensor.end for tensor in tensors), default=data_start)
    if end > size:
        first = min((tensor for tensor in tensors if tensor.end > size), key=lambda tensor: tensor.start)
        return [f"truncated: the header promises {end} bytes, the file has {size}; tensor {first.name!r} is cut"]
    faults, at = [], data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != at:
            what = "overlaps the tensor before it" if tensor.start < at else "leaves a hole before it"
            faults.append(f"tensor {tensor.name!r}: {what}: found position {tensor.start}, expected {at}")
        at = max(at, tensor.end)
    return faults + ([f"found {size - at} bytes after the last tensor, expected none"] if at < size else [])


def _misplaced(weight_map: dict[str, str] | None, headers: dict[str, Headers]) -> list[str]:
    """Tensors that are not where the index, or without one the first file that holds them, says they are."""
    places = weight_map or {name: file for file in reversed(headers) for name in headers[file]}
    found = {(name, file) for file, tensors in headers.items() for name in tensors}
    absent = [f"{file}: tensor {name!r}: in the index, absent here" for name, file in places.items() - found]
    unknown = [
        f"{file}: tensor {name!r}: found here, expected only in {places.get(name, 'no file, the index lacks it')}"
        for name, file in found - places.items()
    ]
    return [f"{fault}; keep the files of one release" for fault in sorted(absent) + sorted(unknown)]


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < COUNT_LIMIT for value in values)


def _fault(name: str, field: str, found: object, expected: str) -> NoReturn:
    raise WrongInput(f"tensor {name!r}: {field}: found {reprlib.repr(found)}, expected {expected}")
