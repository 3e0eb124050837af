"""The best draft length as `verify --json` measured it (verify/reports/verdict.schema.json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert_drafter.converters.errors import WrongInput
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.json_text import json_object
from convert_drafter.converters.launch.resolve import Measured, Remark

SCHEMA, VERSION = "convert-drafter/verdict", 1
PAYS = "does it pay"


def read_measured(path: Path, drafter: Path) -> tuple[Measured, tuple[Remark, ...]]:
    """What was measured of this drafter. Raises `WrongInput` for anything but a verdict of `verify --json`."""
    with file_access(path, "read"):
        found = json_object(str(path), path.read_bytes())
    if found.get("schema") != SCHEMA or found.get("version") != VERSION:
        said = f"found schema {found.get('schema')!r} version {found.get('version')!r}"
        raise WrongInput(f"{path}: {said}, expected {SCHEMA!r} version {VERSION}, which `verify --json` writes")
    remarks: list[Remark] = []
    measured_of = Path(str(found.get("file"))).name
    if measured_of != drafter.name:
        remarks.append(Remark("measured_another", f"{path} was measured of {measured_of}, not {drafter.name}", True))
    figures = _figures(path, found)
    best, speedups = figures.get("best_length"), figures.get("speedup")
    if not isinstance(best, int) or isinstance(best, bool) or best < 1:
        remarks.append(Remark("no_times", f"{path}: no best draft length in it: the file's own is kept"))
        return Measured(None, None), tuple(remarks)
    speedup = speedups[best - 1] if isinstance(speedups, list) and best <= len(speedups) else None
    finite = isinstance(speedup, int | float) and math.isfinite(speedup)
    return Measured(best, float(speedup) if finite and speedup is not None else None), tuple(remarks)


def _figures(path: Path, verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    gates = verdict.get("gates")
    if not isinstance(gates, list) or not all(isinstance(gate, dict) for gate in gates):
        raise WrongInput(f"{path}: gates: found {type(gates).__name__}, expected a list of objects")
    figures = next((gate.get("figures") for gate in gates if gate.get("name") == PAYS), None)
    return figures if isinstance(figures, dict) else {}
