"""The files of a pair as a launch sees them: which ways of drafting they offer, and how long the drafts are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from convert_drafter.converters.checkpoint import open_checkpoint
from convert_drafter.converters.dialects import Cell, cell_of_names, own_part
from convert_drafter.converters.drafter_file import DrafterFile, cell_of_file, drafter_in
from convert_drafter.converters.errors import WrongInput, WrongUsage
from convert_drafter.converters.gguf_file import ARCHITECTURE
from convert_drafter.converters.gguf_model import read_model
from convert_drafter.converters.gguf_read import GGUFFile
from convert_drafter.converters.launch.resolve import Remark, Source
from convert_drafter.converters.pairing import check_pairing
from convert_drafter.converters.spec import HEADS, DrafterSpec
from convert_drafter.converters.structure import survey
from convert_drafter.converters.target import read_target
from convert_drafter.converters.verdict import Outcome

PREFIX = "draft-"


@dataclass(frozen=True)
class Pair:
    """`target` is a GGUF, or a folder that only tells about it. `sources` by way of drafting, the file's own first.

    `drafter` is the file that is a drafter of its own, None for a target that has a head or nothing in it; `weights`
    are the target's, the head's left out, `n_bytes` all of its file's tensors; None where nobody knows.
    """

    target: Path
    drafter: DrafterFile | None
    sources: dict[str, Source] = field(default_factory=dict)
    weights: int | None = None
    n_bytes: int | None = None
    remarks: tuple[Remark, ...] = ()


def read_pair(path: Path, target: Path | None) -> Pair:
    """Read what launching needs. Raises `WrongInput` for a file that is no drafter's, `WrongUsage` without a target."""
    if path.is_dir():
        said = "is a folder, expected a GGUF; `convert` makes one, or give --engine vllm or sglang for the checkpoint"
        raise WrongUsage(f"{path}: {said}")
    file = read_model(path)
    cell = _cell(file)
    if cell is None or _attached(file, cell):
        return _alone(file, cell, target)
    if target is None:
        raise WrongUsage(f"{path}: is a drafter on its own; give its target with --target")
    drafter = drafter_in(file, target=read_target(target))
    own = replace(source_of_way(cell, drafter.spec, path), n_bytes=_bytes_of(file))
    if target.is_dir():
        return Pair(target, drafter, {way_of(cell): own}, _weights_of_folder(target), None, _fit(drafter, target))
    base = read_model(target)
    sources = {way_of(cell): own} | {way: source for way, source in _heads(base).items() if way != way_of(cell)}
    return Pair(target, drafter, sources, _weights(base), _bytes_of(base), _fit(drafter, target))


def way_of(cell: Cell) -> str:
    """How a runtime's drafters of a kind draft; "" where the runtime has no name for it."""
    return cell.draft_type.removeprefix(PREFIX)


def _cell(file: GGUFFile) -> Cell | None:
    """T-34, A3-21: tensors tell, as a key or a name may promise a head that is not there."""
    entry = file.keys.get(ARCHITECTURE)
    return None if entry is None else cell_of_names(str(entry.value), file.tensors)


def _attached(file: GGUFFile, cell: Cell) -> bool:
    return cell.kind in HEADS and len(own_part(file, cell).tensors) < len(file.tensors)


def _alone(file: GGUFFile, cell: Cell | None, target: Path | None) -> Pair:
    """A target by itself, with a head in it or without."""
    same = target is not None and target.exists() and target.samefile(file.path)
    if target is not None and not same:
        if cell is None:
            cell_of_file(file)  # raises, naming what a drafter's would be
        said = "has a head and its target in it, so it takes no other target; leave --target out"
        raise WrongUsage(f"{file.path}: {said}")
    return Pair(file.path, None, _heads(file), _weights(file), _bytes_of(file))


def _heads(file: GGUFFile) -> dict[str, Source]:
    """The head in a target's own file."""
    cell = _cell(file)
    if cell is None or not _attached(file, cell):
        return {}
    spec = drafter_in(file).spec
    return {way_of(cell): source_of_way(cell, spec, None)}


def source_of_way(cell: Cell, spec: DrafterSpec, path: Path | None) -> Source:
    """Its longest drafts: a block, or a token of each head where there are several (common/speculative.cpp)."""
    length = spec.draft_length
    if spec.block_size is not None:
        anchor = "" if spec.sample_from_anchor else " without its anchor"
        return Source(path, length, length, f"the drafter's block of {spec.block_size}{anchor}")
    if cell.kind in HEADS:
        limit = spec.layer_count if spec.has_chained_heads else None
        return Source(path, limit, head=True, latent=spec.latent_attention is not None)
    return Source(path, None, length, "llama.cpp's own, for drafters that go on token by token")


def _bytes_of(file: GGUFFile) -> int:
    return sum(tensor.n_bytes for tensor in file.tensors.values())


def _weights(file: GGUFFile) -> int:
    cell = _cell(file)
    head = set(own_part(file, cell).tensors) if cell is not None and cell.kind in HEADS else set()
    return sum(tensor.n_elements for name, tensor in file.tensors.items() if name not in head)


def _weights_of_folder(folder: Path) -> int | None:
    """None for a folder of config and tokenizer only, which is all a conversion needs."""
    try:
        tensors = open_checkpoint(folder).tensors
    except WrongInput:
        return None
    return sum(math.prod(header.shape) for header in tensors.values())


def _fit(drafter: DrafterFile, target: Path) -> tuple[Remark, ...]:
    gate = check_pairing(survey(drafter.file, drafter.cell, read_target(target)), target)
    if gate.outcome is not Outcome.FAIL:
        return ()
    return (Remark("not_its_target", f"{gate.summary}: {gate.details[0]}; `doctor --target` has all", True),)
