"""The exact line that runs a drafter's file."""

from __future__ import annotations

import shlex
from pathlib import Path

from convert_drafter.converters.dialects import Cell
from convert_drafter.converters.holes import has_holes
from convert_drafter.converters.spec import DrafterSpec


def launch_line(
    cell: Cell, spec: DrafterSpec, target: Path | None, out: Path, line: str = "", drafted: int | None = None
) -> str:
    """The exact line that runs the drafter at `out`; a target that is no file, or has holes, is left to the user.

    `drafted` tokens in a step, the drafter's most without it.
    """
    named = target is not None and target.is_file() and not has_holes(target)
    return (line or cell.launch).format(
        target=shlex.quote(str(target)) if named else "TARGET.gguf",
        draft_type=cell.draft_type,
        drafter=shlex.quote(str(out)),
        drafted=drafted or spec.draft_length,
    )
