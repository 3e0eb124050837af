"""The exact line that runs a drafter's file."""

from __future__ import annotations

import shlex
from pathlib import Path

from convert_drafter.converters.dialects import Cell
from convert_drafter.converters.spec import DrafterSpec


def launch_line(cell: Cell, spec: DrafterSpec, target: Path | None, out: Path, line: str = "") -> str:
    """The exact line that runs the drafter at `out`; a target that is no file is left to the user."""
    return (line or cell.launch).format(
        target=shlex.quote(str(target)) if target is not None and target.is_file() else "TARGET.gguf",
        draft_type=cell.draft_type,
        drafter=shlex.quote(str(out)),
        drafted=spec.draft_length,
    )
