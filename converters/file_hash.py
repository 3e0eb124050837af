"""SHA-256 of a file's whole content; remembered only as long as the file is certainly the one that was read.

A time of modification says little: copying tools and `touch` set it, a write in the same tick leaves it. So a
remembered hash counts where device, inode, size, mtime and ctime are all as they were. ctime changes with every write,
rename and `touch`, and no call sets it, short of setting the system's clock. A file younger than `SETTLED` when it was
read is read again the next time: a write could fall into the same tick of the disk's clock (git calls such an entry
racy: Documentation/technical/racy-git.adoc).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import file_access

SETTLED = 2 * 10**9  # nanoseconds; FAT's clock ticks every two seconds, others' faster
CTIME_COUNTS = os.name != "nt"  # there it is the time of creation
SLAB_BYTES = 1 << 20
Advance = Callable[[int], None]
Identity = tuple[int, ...]  # device, inode, size in bytes, mtime and ctime in nanoseconds
_hashed: dict[Identity, str] = {}  # of this process: many recipes of one checkpoint read it once


@dataclass(frozen=True)
class FileHash:
    """`seen` is the identity of the file that was read, None where the hash must not be taken again without reading."""

    sha256: str
    seen: Identity | None = None


def identity(path: Path) -> Identity:
    """What tells one state of a file from another without reading it. Raises `WrongInput`."""
    with file_access(path, "read"):
        found = path.stat()
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def hash_file(
    path: Path, known: FileHash | None = None, rehash: bool = False, advance: Advance = lambda count: None
) -> FileHash:
    """The hash of a file's content; `known` and what this process read before are believed unless `rehash`.

    `advance` hears of bytes that are read. Raises `WrongInput` for what cannot be read or changes while it is.
    """
    before, now = identity(path), time.time_ns()
    if not rehash and known is not None and known.seen == before:
        return known
    settled = CTIME_COUNTS and all(moment < now - SETTLED for moment in before[-2:])
    digest = None if rehash or not settled else _hashed.get(before)
    if digest is None:
        digest = _read(path, advance)
        if identity(path) != before:
            raise WrongInput(f"{path}: changed while it was read, expected a file that nobody is writing; start again")
    if settled:
        _hashed[before] = digest
    return FileHash(digest, before if settled else None)


def _read(path: Path, advance: Advance) -> str:
    digest, slab = hashlib.sha256(), memoryview(bytearray(SLAB_BYTES))
    with file_access(path, "read"), path.open("rb", buffering=0) as file:
        while count := file.readinto(slab):
            digest.update(slab[:count])
            advance(count)
    return digest.hexdigest()


__all__ = ["Advance", "FileHash", "Identity", "hash_file", "identity"]
