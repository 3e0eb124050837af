"""How a launch looks: a line that a shell takes as it is, and why a reload is needed. Nothing is printed here."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from convert_drafter.converters.launch.launching import Launch
from convert_drafter.converters.launch.reload import Reason
from convert_drafter.converters.launch.stamp import stamp

WIDTH, INDENT = 80, 4
SCHEMA, VERSION = "convert-drafter/reload", 1


def line(words: Sequence[str]) -> str:
    """The words for a shell, folded between options where they are longer than a terminal is wide."""
    lines = [""]
    for part in _options(words):
        joined = f"{lines[-1]} {part}".lstrip() if len(lines) == 1 else f"{lines[-1]} {part}"
        if lines[-1].strip() and len(joined) > WIDTH - 2:  # room for the backslash
            lines.append(" " * (INDENT - 1) + f" {part}")
        else:
            lines[-1] = joined
    return " \\\n".join(lines)


def _options(words: Sequence[str]) -> Iterator[str]:
    """An option with its values is one piece."""
    piece: list[str] = []
    for word in words:
        if piece and (word.startswith("-") or len(piece) > 1):
            yield shlex.join(piece)
            piece = []
        piece.append(word)
    yield shlex.join(piece)


def remarks(decided: Launch) -> list[str]:
    """Lines for standard error, so that standard output is the command line alone."""
    return [f"{'warning' if remark.warning else 'note'}: {remark.text}" for remark in decided.remarks]


def reload(reasons: Sequence[Reason]) -> str:
    if not reasons:
        return "no reload needed: what runs is what would be started"
    lines = [f"  {r.what}: {_value(r.running)} -> {_value(r.wanted)}" for r in reasons]
    return "\n".join(["reload needed:", *lines])


def _value(value: Any) -> str:
    """A file by its path; what else it has differs where the paths are the same."""
    if isinstance(value, dict) and "bytes" in value:
        said = " ".join(str(value[key]) for key in ("path", "version") if key in value)
        return said if value["bytes"] is None else f"{said} ({value['bytes']} bytes)"
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return shlex.join(value) or "none"
    return "none" if value is None else str(value)


def reload_json(reasons: Sequence[Reason], decided: Launch) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "needed": bool(reasons),
        "reasons": [{"what": r.what, "running": r.running, "wanted": r.wanted} for r in reasons],
        "launch": stamp(decided),
    }
