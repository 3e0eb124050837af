"""A launch as plain data: what --json prints, and what a later `--against` reads (launch.schema.json)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert_drafter.converters.gguf_model import parts_of
from convert_drafter.converters.launch.launching import Launch
from convert_drafter.converters.repository import repository_of
from convert_drafter.converters.verify.in_llama_cpp.probe import Engine, libraries

SCHEMA, VERSION = "convert-drafter/launch", 1


def stamp(decided: Launch) -> dict[str, Any]:
    """What was asked, what it resolved to, and the files as they are now: size and time tell one that was replaced."""
    server, request, resolved = decided.server, decided.request, decided.resolved
    ngram = request.ngram
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "engine": decided.engine,
        "server": None if server is None else _server(server),
        "files": {"target": _file(decided.target), "drafter": _file(decided.drafter)},
        "requested": {
            "mode": request.mode,
            "draft_length": request.draft_length,
            "ngram": {"match": ngram.match, "shortest": ngram.shortest, "longest": ngram.longest},
            "extra": list(request.extra),
        },
        "resolved": {
            "mode": "+".join(resolved.ways) or None,
            "spec_type": decided.spec_type,
            "draft_length": resolved.draft_length,
            "default": resolved.default,
        },
        "command": list(decided.words),
        "line": decided.line,
        "ready": decided.ready,
        "remarks": [{"code": r.code, "text": r.text, "warning": r.warning} for r in decided.remarks],
    }


def _file(path: Path | None) -> dict[str, Any] | None:
    """Its absolute path, size and time of change, of all parts of a model; a folder has neither, a repository its name
    only."""
    if path is None:
        return None
    if repository_of(path) is not None:
        return {"path": str(path), **_state(())}
    return {"path": str(path.resolve()), **_state(parts_of(path))}


def _server(server: Engine) -> dict[str, Any]:
    """The program with its libraries; builds without git have one version for ever."""
    state = _state((server.path, *libraries(server.path)))
    return {"path": str(server.path.absolute()), "version": server.version, **state}


def _state(files: Iterable[Path]) -> dict[str, int | None]:
    states = [file.stat() for file in files if file.is_file()]
    return {
        "bytes": sum(state.st_size for state in states) if states else None,
        "modified_ns": max((state.st_mtime_ns for state in states), default=None),
    }
