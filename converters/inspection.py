"""Inspect: what a checkpoint or a GGUF says about itself, every fact with the place it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_drafter.converters.config import ConfigReader
from convert_drafter.converters.convert import Published, read_published
from convert_drafter.converters.dialects import CELLS, Cell, cell_of_arch, objections, read
from convert_drafter.converters.dialects.cell import OWN_ROWS
from convert_drafter.converters.drafters import KINDS
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.plan import match_tensors, plan_tensors
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.spec import REQUIRED, DrafterSpec, facts_of, spec_from


@dataclass(frozen=True)
class Fact:
    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class TensorLine:
    """One tensor; shape in torch order."""

    name: str
    shape: tuple[int, ...]
    type: str
    n_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What is known about a file. `runtimes` maps each runtime to "" where it can load it, else to the reason."""

    path: Path
    format: str
    kind: str
    facts: tuple[Fact, ...]
    tensors: tuple[TensorLine, ...]
    runtimes: Mapping[str, str]
    warnings: tuple[str, ...]
    keys: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "format": self.format,
            "kind": self.kind,
            "facts": {f.name: {"value": f.value, "origin": f.origin} for f in self.facts},
            "tensors": [{"name": t.name, "shape": t.shape, "type": t.type, "bytes": t.n_bytes} for t in self.tensors],
            "runtimes": dict(self.runtimes),
            "warnings": list(self.warnings),
            "keys": dict(self.keys),
        }


def inspect(path: Path, settings: Mapping[str, str] | None = None) -> Inspection:
    """Inspect a checkpoint folder, a .safetensors file or a .gguf file. Raises `WrongInput` where it cannot be read."""
    if path.is_file() and _is_gguf(path):
        return inspect_gguf(path)
    return inspect_checkpoint(path, settings)


def _is_gguf(path: Path) -> bool:
    with file_access(path, "read"), path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def inspect_checkpoint(path: Path, settings: Mapping[str, str] | None = None) -> Inspection:
    published = read_published(path, settings=settings)
    reader, spec = published.reader, published.spec
    cells = [cell for (kind, _), cell in CELLS.items() if kind == spec.kind]
    runtimes = {cell.runtime: "; ".join(_refusals(published, cell)) for cell in cells}
    facts = tuple(
        Fact(name, value, reader.origins.get(name, "")) for name, value in facts_of(spec).items() if name != "kind"
    )
    tensors = tuple(TensorLine(h.name, h.shape, h.dtype, h.n_bytes) for h in published.checkpoint.tensors.values())
    unread = (f"{key}: nobody reads this key" for key in reader.unread())
    return Inspection(path, "checkpoint", spec.kind, facts, tensors, runtimes, (*reader.warnings, *unread), {})


def _refusals(published: Published, cell: Cell) -> list[str]:
    """Why this runtime could not run the checkpoint: tensors and facts, as a conversion would say it."""
    kind, reader, spec = published.kind, published.reader, published.spec
    matcher = match_tensors(spec, kind.rules(reader), kind.dropped(reader), published.checkpoint.tensors)
    plan_tensors(matcher, RECIPES["F32"], cell.tensor_name, cell.runtime, cell.needs)
    return [*matcher.problems, *objections(cell, spec)]


def inspect_gguf(path: Path) -> Inspection:
    file = read_gguf(path)
    entry = file.keys.get("general.architecture")
    if entry is None:
        raise WrongInput(f"{path}: general.architecture: missing, expected the architecture every runtime asks for")
    cell = cell_of_arch(str(entry.value))
    facts = () if cell is None else tuple(_facts(cell, file, path))
    kind = "unknown" if cell is None else cell.kind
    tensors = tuple(TensorLine(t.name, t.shape, t.type.name, t.n_bytes) for t in file.tensors.values())
    runtimes = {} if cell is None else {cell.runtime: "; ".join(_faults(cell, file))}
    keys = {key: _short(kv.value) for key, kv in file.keys.items()}
    return Inspection(path, f"GGUF ({entry.value})", kind, facts, tensors, runtimes, (), keys)


def _faults(cell: Cell, file: GGUFFile) -> list[str]:
    """Keys and tensors that this runtime's loader misses or does not know."""
    facts = read(cell, file.keys)
    keys = {row.field: row.key.format(a=cell.arch) for row in reversed(cell.rows)}
    missing = [f"{keys[name]}: missing" for name in sorted(REQUIRED & set(keys) - set(facts))]
    facts.setdefault("kind", cell.kind)
    if missing:
        return missing
    try:
        spec = spec_from({"target_layer_count": max(facts["capture_layers"]) + 1, "target_hidden_size": 1} | facts)
    except BadFact as bad:
        return [f"{keys.get(bad.field, bad.field)}: found {bad.found!r}, expected {bad.expected}"]
    if spec.layer_count > len(file.tensors):
        return [f"{keys['layer_count']}: found {spec.layer_count} layers, the file has {len(file.tensors)} tensors"]
    return _tensor_faults(cell, spec, file)


def _tensor_faults(cell: Cell, spec: DrafterSpec, file: GGUFFile) -> list[str]:
    known = {
        cell.tensor_name((rule.role, layer)): rule
        for rule in KINDS[cell.kind].rules(ConfigReader({}, ""))
        for layer in (range(spec.layer_count) if rule.role.per_layer else [None])
    }
    absent = [f"{name}: missing" for name, rule in known.items() if not rule.optional and name not in file.tensors]
    unknown = [f"{name}: unknown tensor" for name in file.tensors if name not in known]
    misshaped = [
        f"{name}: found shape {list(stored.shape)}, expected {list(known[name].expected_shape(spec))}"
        for name, stored in file.tensors.items()
        if name in known and stored.shape != known[name].expected_shape(spec)
    ]
    return [*absent, *unknown, *misshaped]


def _facts(cell: Cell, file: GGUFFile, path: Path) -> list[Fact]:
    try:
        values = read(cell, file.keys)
    except WrongInput as error:
        raise WrongInput(f"{path}: {error}") from error
    origins = {row.field: row.key.format(a=cell.arch) for row in reversed((*cell.rows, *OWN_ROWS))}
    return [
        Fact(name, value, origins.get(name, f"fixed by {cell.runtime}"))
        for name, value in values.items()
        if name != "kind"
    ]


def _short(value: Any) -> Any:
    """Long lists (vocabularies) as their length; they are no reading matter."""
    return f"{len(value)} entries" if isinstance(value, tuple) and len(value) > 64 else value
