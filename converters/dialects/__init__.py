"""Runtimes and their dialects: one Cell for each (kind, runtime) pair that a runtime has a loader for."""

from __future__ import annotations

from collections.abc import Collection

from convert_drafter.converters.dialects import ik_llama_cpp, llama_cpp, lucebox
from convert_drafter.converters.dialects.cell import Cell, doubts, objections, read, write
from convert_drafter.converters.errors import WrongUsage

CELLS: dict[tuple[str, str], Cell] = {
    (cell.kind, cell.runtime): cell
    for cell in (
        *(llama_cpp.DFLASH, ik_llama_cpp.DFLASH, lucebox.DFLASH),
        *(llama_cpp.DFLASH2, llama_cpp.DSPARK, llama_cpp.EAGLE3),
    )
}
RUNTIMES: tuple[str, ...] = tuple(dict.fromkeys(runtime for _, runtime in CELLS))


def find_cell(kind: str, runtime: str) -> Cell:
    """The cell of a pair. Raises `WrongUsage` naming what that runtime does load."""
    if (kind, runtime) not in CELLS:
        loads = ", ".join(k for k, r in CELLS if r == runtime) or "nothing"
        raise WrongUsage(f"{runtime} has no loader for {kind} drafters; it loads: {loads}")
    return CELLS[kind, runtime]


def cell_of_names(arch: str, names: Collection[str]) -> Cell | None:
    """The cell of a file that says `general.architecture = arch` and has tensors of these names.

    Kinds share an architecture: the one whose telling tensor is there, else the one that needs none.
    """
    cells = [cell for cell in CELLS.values() if cell.arch == arch]
    telling = [cell for cell in cells if cell.telling is not None and cell.tensor_name((cell.telling, None)) in names]
    return next(iter([*telling, *(cell for cell in cells if cell.telling is None)]), None)


__all__ = ["CELLS", "RUNTIMES", "Cell", "cell_of_names", "doubts", "find_cell", "objections", "read", "write"]
