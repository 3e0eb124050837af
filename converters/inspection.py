"""Inspect: what a checkpoint or a GGUF says about itself, every fact with the place it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from convert_drafter.converters.convert import Published, read_published
from convert_drafter.converters.dialects import CELLS, Cell, cell_of_names, objections, own_part, read
from convert_drafter.converters.dialects.cell import OWN_ROWS
from convert_drafter.converters.drafter_file import Fact, derived_facts
from convert_drafter.converters.drafters import rules_of
from convert_drafter.converters.errors import BadFact, WrongInput
from convert_drafter.converters.gguf_file import file_access
from convert_drafter.converters.gguf_read import GGUFFile, read_gguf
from convert_drafter.converters.hub_gguf import fetch_header, holds_gguf
from convert_drafter.converters.plan import plan_tensors
from convert_drafter.converters.recipes import RECIPES
from convert_drafter.converters.repository import GGUF
from convert_drafter.converters.spec import DrafterSpec, facts_of, required, spec_from


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


def inspect(path: Path, settings: Mapping[str, str] | None = None, target: Path | None = None) -> Inspection:
    """Inspect a checkpoint folder, a .safetensors file or a .gguf file; a checkpoint may need its target beside it.

    Raises `WrongInput` where it cannot be read.
    """
    if _is_gguf(path):
        return replace(inspect_gguf(fetch_header(path)), path=path)
    return inspect_checkpoint(path, settings, target)


def _is_gguf(path: Path) -> bool:
    """By its name alone where nothing is there, so that what is missed is a GGUF."""
    if path.is_file():
        with file_access(path, "read"), path.open("rb") as file:
            return path.suffix == GGUF or file.read(4) == b"GGUF"
    return holds_gguf(path) or (path.suffix == GGUF and not path.exists())


def inspect_checkpoint(path: Path, settings: Mapping[str, str] | None = None, target: Path | None = None) -> Inspection:
    published = read_published(path, target, settings)
    reader, spec = published.reader, published.spec
    cells = [cell for (kind, _), cell in CELLS.items() if kind == spec.kind]
    runtimes = {cell.runtime: "; ".join(_refusals(published, cell)) for cell in cells}
    facts = tuple(
        Fact(name, value, reader.origins.get(name, ""))
        for name, value in (facts_of(spec) | _storage(published)).items()
        if name != "kind"
    )
    headers = published.checkpoint.tensors.values()
    tensors = tuple(TensorLine(h.name, h.shape, h.stored or h.dtype, h.n_bytes) for h in headers)
    unread = (f"{key}: nobody reads this key" for key in reader.unread())
    return Inspection(path, "checkpoint", spec.kind, facts, tensors, runtimes, (*reader.warnings, *unread), {})


def _storage(published: Published) -> dict[str, str]:
    """How the weights are stored, where that is not as floats."""
    return {"quantization": found} if (found := published.checkpoint.quantization) else {}


def _refusals(published: Published, cell: Cell) -> list[str]:
    """Why this runtime could not run the checkpoint: tensors and facts, as a conversion would say it."""
    matcher = published.match()
    plan_tensors(matcher, RECIPES["F32"], cell.tensor_name, cell.runtime, cell.needs, transforms=cell.transforms)
    return [*matcher.problems, *objections(cell, published.spec)]


def inspect_gguf(path: Path) -> Inspection:
    file = read_gguf(path)
    entry = file.keys.get("general.architecture")
    if entry is None:
        raise WrongInput(f"{path}: general.architecture: missing, expected the architecture every runtime asks for")
    cell = cell_of_names(str(entry.value), file.tensors)
    facts = () if cell is None else tuple(_facts(cell, file))
    values = {fact.name: fact.value for fact in facts} | ({} if cell is None else {"kind": cell.kind})
    kind = "unknown" if cell is None else cell.kind
    tensors = tuple(TensorLine(t.name, t.shape, t.type.name, t.n_bytes) for t in file.tensors.values())
    runtimes = {} if cell is None else {cell.runtime: "; ".join(_faults(cell, own_part(file, cell), values))}
    keys = {key: _short(kv.value) for key, kv in file.keys.items()}
    return Inspection(path, f"GGUF ({entry.value})", kind, facts, tensors, runtimes, (), keys)


def _read_facts(cell: Cell, file: GGUFFile) -> dict[str, Any]:
    try:
        return {"kind": cell.kind} | read(cell, file.keys)
    except WrongInput as error:
        raise WrongInput(f"{file.path}: {error}") from error


def _faults(cell: Cell, file: GGUFFile, facts: Mapping[str, Any]) -> list[str]:
    """Keys and tensors that this runtime's loader misses or does not know."""
    keys = {row.field: row.key.format(a=cell.arch) for row in reversed(cell.rows)}
    missing = [f"{keys[name]}: missing" for name in sorted(required(cell.kind) & set(keys) - set(facts))]
    if missing:
        return missing
    try:  # only our own files tell the target's depth; any that has the captured layers will do
        spec = spec_from({"target_layer_count": max(facts.get("capture_layers", ()), default=0) + 1, **facts})
    except BadFact as bad:
        return [f"{keys.get(bad.field, bad.field)}: found {bad.found!r}, expected {bad.expected}"]
    if spec.layer_count > len(file.tensors):
        return [f"{keys['layer_count']}: found {spec.layer_count} layers, the file has {len(file.tensors)} tensors"]
    return _tensor_faults(cell, spec, file)


def _tensor_faults(cell: Cell, spec: DrafterSpec, file: GGUFFile) -> list[str]:
    rules = [rule for rule in rules_of(cell.kind) if rule.exists(spec)]
    known = {cell.tensor_name(key): (rule, key) for rule in rules for key in rule.keys(spec)}
    absent = [f"{name}: missing" for name, (rule, _) in known.items() if rule.needed(spec) and name not in file.tensors]
    unknown = [f"{name}: unknown tensor" for name in file.tensors if name not in known]
    found = [(name, *known[name]) for name in file.tensors if name in known]
    shapes = {name: rule.expected_shape(spec, layer) for name, rule, (_, layer) in found}
    misshaped = [
        f"{name}: found shape {list(stored.shape)}, expected {list(shapes[name])}"
        for name, stored in file.tensors.items()
        if stored.shape != shapes.get(name, stored.shape)
    ]
    return [*absent, *unknown, *misshaped]


def _facts(cell: Cell, file: GGUFFile) -> Iterator[Fact]:
    values = _read_facts(cell, file)
    keys = ((row.field, row.key.format(a=cell.arch)) for row in reversed((*cell.rows, *OWN_ROWS)))
    origins = {field: key for field, key in keys if key in file.keys}
    for name, value in values.items():
        if name != "kind":
            yield Fact(name, value, origins.get(name, f"no key: what {cell.runtime} takes"))
    for name, value, origin in derived_facts(file, cell, values, None):
        if name not in values:
            yield Fact(name, value, origin)


def _short(value: Any) -> Any:
    """Long lists (vocabularies) as their length; they are no reading matter."""
    return f"{len(value)} entries" if isinstance(value, tuple) and len(value) > 64 else value
