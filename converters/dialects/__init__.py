"""Runtimes and their dialects: one Cell for each (kind, runtime) pair that a runtime has a loader for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from convert_drafter.converters.dialects import (
    ik_llama_cpp,
    llama_cpp,
    llama_cpp_gemma4_assistant,
    llama_cpp_mtp,
    llama_cpp_mtp_bailing,
    llama_cpp_mtp_cohere,
    llama_cpp_mtp_deepseek4,
    llama_cpp_mtp_hunyuan,
    llama_cpp_mtp_latent,
    llama_cpp_mtp_nemotron,
    llama_cpp_mtp_qwen4,
    llama_cpp_mtp_swa,
    lucebox,
)
from convert_drafter.converters.dialects.cell import Cell, read, read_all, write
from convert_drafter.converters.dialects.fitness import doubts, objections
from convert_drafter.converters.errors import WrongUsage
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.recipe_rules import layer_of
from convert_drafter.converters.spec import HEADS

CELLS: dict[tuple[str, str], Cell] = {
    (cell.kind, cell.runtime): cell
    for cell in (
        *(llama_cpp.DFLASH, ik_llama_cpp.DFLASH, lucebox.DFLASH),
        # DSpark's own tensors are Gemma-4 DSpark's too, which is told first
        *(llama_cpp.DFLASH2, llama_cpp.GEMMA4_DSPARK, llama_cpp.DSPARK, llama_cpp.EAGLE3),
        llama_cpp_gemma4_assistant.GEMMA4_ASSISTANT,
        *llama_cpp_mtp.CELLS,
        *llama_cpp_mtp_hunyuan.CELLS,
        *llama_cpp_mtp_cohere.CELLS,
        *llama_cpp_mtp_latent.CELLS,
        *llama_cpp_mtp_swa.CELLS,
        *llama_cpp_mtp_bailing.CELLS,
        *llama_cpp_mtp_deepseek4.CELLS,
        *llama_cpp_mtp_nemotron.CELLS,
        *llama_cpp_mtp_qwen4.CELLS,
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
    telling = [cell for cell in cells if _told(cell, names)]
    return next(iter([*telling, *(cell for cell in cells if cell.telling is None)]), None)


def _told(cell: Cell, names: Collection[str]) -> bool:
    """Whether the cell's telling tensor is among these names, in any layer."""
    if cell.telling is None:
        return False
    layers = {layer_of(name) for name in names} - {None} if cell.telling.per_layer else {None}
    return any(cell.tensor_name((cell.telling, layer)) in names for layer in layers)


def own_part(file: GGUFFile, cell: Cell) -> GGUFFile:
    """The file without the layers of a target that its drafter, a head, is attached to."""
    if cell.kind not in HEADS:
        return file
    first: int = read_all(cell, file.keys)[0].get("target_layer_count", 0)
    numbers = {name: layer_of(name) for name in file.tensors}
    own = {name: tensor for name, tensor in file.tensors.items() if (layer := numbers[name]) is None or layer >= first}
    return replace(file, tensors=own)


__all__ = [
    "CELLS",
    "RUNTIMES",
    "Cell",
    "cell_of_names",
    "doubts",
    "find_cell",
    "objections",
    "own_part",
    "read",
    "write",
]
