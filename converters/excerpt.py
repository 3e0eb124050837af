"""An excerpt of a safetensors file on a hub: some of its tensors as a file of their own, fetched by byte ranges.

The excerpt is a whole safetensors file: its header comes first and follows from the original's alone, the tensors after
it in their order. So an interrupted one is continued where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from convert_drafter.converters.checkpoint import EXCERPT_OF, HEADER_LIMIT
from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.json_text import json_object

LENGTH_BYTES = 8
Advance = Callable[[int], None]
Read = Callable[[int, int], Iterator[bytes]]  # the bytes from one position to before another, in pieces


@dataclass(frozen=True)
class RemoteHeader:
    """The header of a file that lies elsewhere: `tensors` are its entries, `data_start` is where they count from."""

    tensors: dict[str, Any]
    digest: str  # sha256 of its JSON
    data_start: int


@dataclass(frozen=True)
class Excerpt:
    """`header` goes first in the file, `ranges` (start, end) are the original's bytes that follow it."""

    header: bytes
    ranges: tuple[tuple[int, int], ...]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(end - start for start, end in self.ranges)


def read_remote_header(where: str, read: Read) -> RemoteHeader:
    """The header by two short reads. Raises `WrongInput` for what is no safetensors file."""
    length = int.from_bytes(b"".join(read(0, LENGTH_BYTES)), "little")
    if not 2 <= length <= HEADER_LIMIT:
        raise WrongInput(f"{where}: header length: found {length}, expected 2 to {HEADER_LIMIT}: no safetensors file")
    raw = b"".join(read(LENGTH_BYTES, LENGTH_BYTES + length))
    tensors = {name: entry for name, entry in json_object(where, raw).items() if name != "__metadata__"}
    for name, entry in tensors.items():
        if not _is_entry(entry):
            raise WrongInput(f"{where}: tensor {name!r}: found {entry!r}, expected dtype, shape and data_offsets")
    return RemoteHeader(tensors, sha256(raw).hexdigest(), LENGTH_BYTES + length)


def _is_entry(entry: Any) -> bool:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        return False
    return bool(0 <= offsets[0] <= offsets[1])


def plan_excerpt(original: RemoteHeader, names: Collection[str]) -> Excerpt:
    """The excerpt with these tensors."""
    wanted = sorted(set(names) & original.tensors.keys(), key=lambda name: original.tensors[name]["data_offsets"])
    entries: dict[str, Any] = {"__metadata__": {EXCERPT_OF: original.digest}}
    ranges: list[tuple[int, int]] = []
    at = 0
    for name in wanted:
        start, end = original.tensors[name]["data_offsets"]
        entries[name] = original.tensors[name] | {"data_offsets": [at, at + end - start]}
        at += end - start
        start, end = original.data_start + start, original.data_start + end
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
        elif start < end:
            ranges.append((start, end))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return Excerpt(len(text).to_bytes(LENGTH_BYTES, "little") + text, tuple(ranges))


def write_excerpt(excerpt: Excerpt, path: Path, read: Read, advance: Advance) -> None:
    """Fetch what `path` does not have yet; it appears whole, and what there is of it waits beside it until then."""
    if _begins(path, excerpt.header) and path.stat().st_size == excerpt.n_bytes:
        advance(excerpt.n_bytes)
        return
    partial = path.with_name(f".{path.name}.partial")  # hidden files are no weights
    have = partial.stat().st_size if partial.exists() else 0
    if have > excerpt.n_bytes or not _begins(partial, excerpt.header[:have]):
        have = 0
    with partial.open("r+b" if have else "wb") as file:
        file.seek(have)
        advance(have)
        for piece in _rest(excerpt, have, read):
            file.write(piece)
            advance(len(piece))
    partial.replace(path)


def _begins(path: Path, start: bytes) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _rest(excerpt: Excerpt, have: int, read: Read) -> Iterator[bytes]:
    """Everything after the first `have` bytes."""
    yield excerpt.header[have:]
    at = len(excerpt.header)
    for start, end in excerpt.ranges:
        skipped = min(max(have - at, 0), end - start)
        if start + skipped < end:
            yield from read(start + skipped, end)
        at += end - start
