"""A file of which only some bytes are there: as long as the whole one, with holes for the rest.

Every offset is the whole file's own, so that what reads the header and some tensors needs to know nothing of it. A file
of ranges beside it tells what is there, and that no other program may load it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.excerpt import Read
from convert_drafter.converters.repository import Watch, check_room

RANGES = ".ranges.json"
FIRST, MOST = 2**18, 2**23  # bytes of a start asked for at a time: as many as are there, within these
Range = tuple[int, int]  # from one byte to before another


def has_holes(path: Path) -> bool:
    """Whether no program may load this file."""
    return _notes(path).exists()


def _notes(path: Path) -> Path:
    return path.with_name(f".{path.name}{RANGES}")


class FileWithHoles:
    """`ranges` are there, in order and apart from each other; `size` is the whole file's, in bytes."""

    def __init__(self, name: str, path: Path, read: Read) -> None:
        self.name, self.path, self.read = name, path, read
        self.ranges: list[Range] = []
        self.size, self.complete_header = 0, False
        if path.exists() and has_holes(path):
            known: Any = json.loads(_notes(path).read_text())
            if known["size"] == path.stat().st_size:
                self.size, self.complete_header = known["size"], known["header"]
                self.ranges = [(start, end) for start, end in known["ranges"]]

    def make(self, size: int) -> None:
        """Nothing but a hole."""
        self.size = size
        self.record()  # first: a file with holes is never without its notes
        with self.path.open("wb") as file:
            file.truncate(size)

    def record(self) -> None:
        notes = _notes(self.path)
        new = notes.with_suffix(".new")
        new.write_text(json.dumps({"size": self.size, "header": self.complete_header, "ranges": self.ranges}))
        new.replace(notes)

    def fill(self, wanted: Iterable[Range], watch: Watch = lambda name, done, total: None) -> None:
        """Fetch what is not there of these ranges; what came before an interruption is kept."""
        missing = [part for whole in joined(wanted) for part in without(whole, self.ranges)]
        total, done = sum(end - start for start, end in missing), 0
        check_room(self.path.parent, total)
        for start, end in missing:
            at = start
            try:
                with self.path.open("r+b") as file:
                    file.seek(start)
                    for piece in self.read(start, end):
                        file.write(piece)
                        at, done = at + len(piece), done + len(piece)
                        watch(self.name, done, total)
            finally:
                self.ranges = joined([*self.ranges, (start, at)])
                self.record()


class Start:
    """The start of a file, fetched as far as it is read; `failed` where it could not be."""

    def __init__(self, partly: FileWithHoles) -> None:
        self.partly, self.at, self.failed = partly, 0, False
        self.there = partly.ranges[0][1] if partly.ranges and partly.ranges[0][0] == 0 else 0

    def read(self, count: int, /) -> bytes:
        end = min(self.at + count, self.partly.size)
        while self.there < end:
            more = min(self.there + min(max(self.there, FIRST), MOST), self.partly.size)
            try:
                self.partly.fill([(0, more)])
            except WrongInput:
                self.failed = True
                raise
            self.there = more
        with self.partly.path.open("rb") as file:
            file.seek(self.at)
            found = file.read(end - self.at)
        self.at = end
        return found


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes in order, ranges that touch or overlap as one, empty ones left out."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def without(whole: Range, there: Iterable[Range]) -> Iterator[Range]:
    """What of `whole` is in none of the ranges, which are in order and apart."""
    at, stop = whole
    for start, end in there:
        if at < min(start, stop):
            yield at, min(start, stop)
        at = max(at, end)
    if at < stop:
        yield at, stop


__all__ = ["FileWithHoles", "Start", "has_holes"]
