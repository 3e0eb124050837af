"""Repair: a drafter's file again, with facts put right that its metadata had wrong. Tensor bytes are copied.

It is a redialect for the file's own runtime: read with the right facts in front of the file's, written through the
same table, with what was changed in the file's provenance. Wrong tensors cannot be mended by a key: convert again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from convert_drafter.converters.destination import refuse_overwriting
from convert_drafter.converters.drafter_file import SETTABLE, cell_of_file
from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.gguf_file import KeyValue
from convert_drafter.converters.gguf_read import read_gguf
from convert_drafter.converters.redialect import (
    ARRAY,
    SETTINGS,
    STRING,
    Redialection,
    RedialectJob,
    prepare_redialect,
    write_redialection,
)
from convert_drafter.converters.spec import required

WINDOW = {"window.size", "window.layers"}
NOTHING = "null"  # how "this drafter has none" is spelled among the settings


def repair(file: Path, facts: Mapping[str, Any], out: Path) -> Path:
    """Write `file` to `out` with these facts (field path -> value, None where the drafter has none); returns `out`.

    Raises `WrongUsage` where there is nothing to repair by a fact or `out` is the file itself, `WrongInput` for a file
    that is no drafter's or that does not fit together with the new facts.
    """
    if not facts:
        raise WrongUsage(f"{file}: no fact of its metadata is to be changed; wrong tensors have to be converted again")
    _check(file, facts)
    refuse_overwriting(out, [file])
    write_redialection(prepare_repair(file, facts, out))
    return out


def prepare_repair(file: Path, facts: Mapping[str, Any], out: Path) -> Redialection:
    """Everything decided, nothing written. Raises as `repair` does."""
    gone = sorted(name for name, value in facts.items() if value is None)
    settings = {name: json.dumps(value) for name, value in facts.items() if value is not None}
    if WINDOW.intersection(gone):  # a window that no layer uses is none, whatever of it the file has
        settings, gone = settings | {"window.layers": "[false]"}, [name for name in gone if name not in WINDOW]
    decided = prepare_redialect(RedialectJob(file, None, cell_of_file(read_gguf(file)).runtime, out, settings=settings))
    return replace(decided, keys=(*_recorded(_without(decided, gone), gone), *_unread(decided)))


def _check(file: Path, facts: Mapping[str, Any]) -> None:
    needed = required(cell_of_file(read_gguf(file)).kind)
    for name, value in facts.items():
        if name not in SETTABLE:
            raise WrongUsage(f"{name}: no fact of a drafter's file; there are: {', '.join(sorted(SETTABLE))}")
        if value is None and name in needed:
            raise WrongUsage(f"{name}: found no value to repair {file} with, expected one: every drafter has it")


def _without(decided: Redialection, gone: list[str]) -> list[KeyValue]:
    """The keys but those of facts the drafter does not have."""
    arch = decided.cell.arch
    dropped = {row.key.format(a=arch) for row in decided.cell.rows if row.field in gone}
    return [entry for entry in decided.keys if entry.key not in dropped]


def _recorded(keys: list[KeyValue], gone: list[str]) -> list[KeyValue]:
    """What was taken away stands beside what was set."""
    if not gone:
        return keys
    said = tuple(f"{name}={NOTHING}" for name in gone)
    place = next((n for n, entry in enumerate(keys) if entry.key == SETTINGS), None)
    before = () if place is None else keys[place].value
    entry = KeyValue(SETTINGS, ARRAY, (*before, *said), STRING)  # type: ignore[misc]
    return [*keys, entry] if place is None else [*keys[:place], entry, *keys[place + 1 :]]


def _unread(decided: Redialection) -> list[KeyValue]:
    """Keys that no table knows stay: the file is to be the same but for the facts."""
    return [decided.drafter.file.keys[name] for name in decided.drafter.unread()]
