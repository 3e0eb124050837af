"""Does what runs have to be started again? What it resolved to is compared with what is now resolved (T-27).

One function answers for everybody (A3-25): the command, and whoever serves from Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.json_text import json_object, value_at
from convert_drafter.converters.launch.modes import DRAFTERS, NGRAM
from convert_drafter.converters.launch.stamp import SCHEMA, VERSION

Stamp = Mapping[str, Any]
UNKNOWN = object()


@dataclass(frozen=True)
class Reason:
    """One thing that differs: as it runs, and as it would be."""

    what: str
    running: Any
    wanted: Any


@dataclass(frozen=True)
class Compared:
    """A value that a running server cannot change. `matters` tells where it does, from what was resolved."""

    what: str
    keys: tuple[str, ...]
    matters: Callable[[tuple[str, ...]], bool] = lambda ways: True


def _drafts(ways: tuple[str, ...]) -> bool:
    """A3-22, A3-24: without a drafter the draft length does nothing."""
    return any(way in DRAFTERS for way in ways)


TABLE = (
    Compared("engine", ("engine",)),
    Compared("server", ("server",)),
    Compared("target", ("files", "target")),
    Compared("drafter", ("files", "drafter")),
    Compared("drafting", ("resolved", "spec_type")),
    Compared("default drafting", ("resolved", "default")),
    # None and a number differ either way, or a number once given could never be taken back (A3-23)
    Compared("draft length asked for", ("requested", "draft_length"), _drafts),
    Compared("draft length", ("resolved", "draft_length"), _drafts),
    Compared("n-gram lengths", ("requested", "ngram"), lambda ways: NGRAM in ways),
    Compared("other options", ("requested", "extra")),
)


def reasons(running: Stamp, wanted: Stamp) -> tuple[Reason, ...]:
    """Why a reload is needed; none where the server may stay. Equal reasons mean equal command lines."""
    ways = tuple((wanted["resolved"]["mode"] or "").split("+"))
    both = [(row, *(value_at(each, row.keys, UNKNOWN) for each in (running, wanted))) for row in TABLE]
    found = [Reason(row.what, one, other) for row, one, other in both if row.matters(ways) and one != other]
    if not found and running["command"] != wanted["command"]:
        found.append(Reason("command line", running["line"], wanted["line"]))
    return tuple(found)


def read_stamp(path: Path) -> dict[str, Any]:
    """What `launch --json` wrote. Raises `WrongInput` naming what is missing."""
    with file_access(path, "read"):
        found = json_object(str(path), path.read_bytes())
    if found.get("schema") != SCHEMA or found.get("version") != VERSION:
        said = f"found schema {found.get('schema')!r} version {found.get('version')!r}"
        raise WrongInput(f"{path}: {said}, expected {SCHEMA!r} version {VERSION}, which `launch --json` writes")
    missing = [".".join(keys) for keys in _needed() if value_at(found, keys, UNKNOWN) is UNKNOWN]
    if missing:
        raise WrongInput(f"{path}: {', '.join(missing)}: missing, expected what `launch --json` writes")
    return found


def _needed() -> Iterator[tuple[str, ...]]:
    yield from (row.keys for row in TABLE)
    yield from (("resolved", "mode"), ("command",), ("line",))
